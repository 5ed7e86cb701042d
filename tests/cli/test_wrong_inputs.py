"""Wrong uses of the command line, each with the line it gives: exit code 2, one line, no traceback, no result left behind."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from aen_lightning.cli.main import main

FIT = "fit --config debug --trainer.max_steps=1"
# a command, and what its line says
WRONG = [
    ("fti", "no command 'fti' (did you mean 'fit'?)"),
    ("--hlep", "no option '--hlep' (did you mean '--help'?)"),
    ("recipes shwo", "no command 'recipes shwo' (did you mean 'show'?)"),
    ("recipes show", "missing name; usage: aen recipes show NAME"),
    ("recipes show spikd", "no config file or recipe 'spikd' (did you mean 'spiked'?)"),
    ("recipes copy", "missing name; usage: aen recipes copy NAME [FILE]"),
    ("shards", "shards what? There are shards verify, shards info, shards convert"),
    ("shards verfy", "no command 'shards verfy' (did you mean 'verify'?)"),
    ("fit", "missing model.sae, data; usage: --config FILE_OR_RECIPE [--KEY VALUE ...]"),
    ("fit --config spikd", "no config file or recipe 'spikd' (did you mean 'spiked'?)"),
    ("fit --config empty.yaml", "empty.yaml is empty"),
    (
        "fit --config notyaml.yaml",
        "notyaml.yaml is not valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    ("fit --config typo.yaml", "missing model.sae, data; usage: --config FILE_OR_RECIPE [--KEY VALUE ...]"),
    ("fit --config list.yaml", "list.yaml must hold sections such as trainer, model and data, got a list"),
    ("fit --confg debug", "no option --confg (did you mean '--config'?)"),
    (FIT + " --model.lrr=1", "no option --model.lrr (did you mean '--model.lr'?)"),
    (FIT + " --trainer.max_stepps=1", "no option --trainer.max_stepps (did you mean '--trainer.max_steps'?)"),
    (FIT + " --data.init_args.kk=1", "data: SpikedDataModule has no option 'kk' (did you mean 'k'?)"),
    (FIT + " --data.kk=1", "data: SpikedDataModule has no option 'kk' (did you mean 'k'?)"),
    (FIT + " --model.lr=fast", "model.lr: expected float, got 'fast'"),
    (FIT + " --model.lr=0", "lr must be positive, got 0.0"),
    (FIT + " --model.sae.lambda_1=strong", "sae.lambda_1 must be float, got 'strong'"),
    (
        FIT + " --model.sae.lamda_1=1",
        "sae has no key 'lamda_1' for architecture 'aen' (did you mean 'lambda_1'?)",
    ),
    (FIT + " --model.sae.gamma=-1", "AENTrainingSAEConfig.gamma must be a finite number >= 0, got -1"),
    (
        FIT + " --model.sae.d_in=33",
        "the SAE has d_in=33, but SpikedDataModule gives activations of width 32: set",
    ),
    (FIT + " --model.sae.d_sae=0", "AENTrainingSAEConfig.d_sae must be a positive integer, got 0"),
    (
        FIT + " --model.sae.architecture=aenn",
        "unknown SAE architecture 'aenn' (did you mean 'aen'?); SAELens can train",
    ),
    (FIT + " --model.sae=topk", "model.sae: expected dict, got 'topk'"),
    (FIT + " --model.sae.k=4", "sae has no key 'k' for architecture 'aen'; it takes"),
    (FIT + " --model.sae.penalty=l2", "sae.penalty must be 'l1' or 'mcp' or 'scad' or 'log', got 'l2'"),
    (
        FIT + " --model.optimizer=torch.optim.Adm",
        "optimizer must be the class path of a torch optimizer such as",
    ),
    (FIT + " --model.optimizer=Adam", "optimizer must be the class path of a torch optimizer such as"),
    (
        FIT + " --model.lr_scheduler_name=cosine",
        "model.lr_scheduler_name: expected 'constant' or 'cosineannealing' or",
    ),
    (FIT + " --model.seed=x", "model.seed: expected int or null, got 'x'"),
    (
        FIT + " --trainer.accelerator=gup",
        "You selected an invalid accelerator name: `accelerator='gup'`. Available",
    ),
    (
        FIT + " --trainer.accelerator=gpu",
        "No supported gpu backend found! (trainer.accelerator=auto takes what is there)",
    ),
    (FIT + " --trainer.devices=many", "`devices` selected with `CPUAccelerator` should be an int > 0."),
    (FIT + " --trainer.precision=fp8", "trainer.precision: expected int or 'transformer-engine' or"),
    (FIT + " --trainer.strategy=dpp", "`strategy='dpp'`"),
    (FIT + " --trainer.callbacks=Nope", "trainer.callbacks: no class 'Nope'"),
    (FIT + " --trainer.callbacks=aen_lightning.callbacks.TargetL0", "trainer.callbacks: TargetL0 lacks l0"),
    (
        FIT + " --trainer.callbacks=aen_lightning.callbacks.TargetL0 --trainer.callbacks.l0=-1",
        "TargetL0.l0 must be above 0, got -1.0",
    ),
    (FIT + " --ckpt_path=nowhere.ckpt", "Checkpoint file not found: nowhere.ckpt"),
    (FIT + " --ckpt_path=text.txt", "text.txt is no checkpoint, or was cut off while it was written"),
    (FIT + " --num_threads=0", "num_threads must be >= 1, got 0"),
    (FIT + " extra", "unexpected argument 'extra'; usage: --config FILE_OR_RECIPE [--KEY VALUE ...]"),
    (FIT + " --data=Spiked", "data: no class 'Spiked'"),
    (FIT + " --seed_everything=abc", "seed_everything: expected true or false or int, got 'abc'"),
    (
        "sweep --config debug --model.sae.gamma=[]",
        "the sweep has no member: give sae at least one dict, and every list at least",
    ),
    ("refit --config debug", "no key 'model.sae.architecture' in the config"),
    (
        "refit --config smollm2-135m-refit --model.dictionary=nowhere",
        "no dictionary 'nowhere': expected a folder with cfg.json and",
    ),
    ("harvest --config smollm2-135m-harvest --model.model_name=nowhere/model", "nowhere/model"),
    ("harvest --config smollm2-135m-harvest --data.n_tokens=-1", "n_tokens must be at least 1, got -1"),
    (
        "harvest --config smollm2-135m-harvest --data.n_token=1",
        "no option --data.n_token (did you mean '--data.n_tokens'?)",
    ),
    ("harvest --config debug", "missing model.model_name; usage: --config FILE_OR_RECIPE [--KEY VALUE ...]"),
    ("plan", "needs --config with a recipe of `aen fit` (one model.sae) or `aen harvest`"),
    ("plan --config debug --foo.bar=1", "no option --foo.bar"),
    ("plan --config debug --tflops_per_s=-1", "tflops_per_s must be above 0, got -1.0"),
    ("evaluate", "missing dictionary; usage: aen evaluate DICTIONARY... [options]"),
    ("evaluate nowhere", "no dictionary 'nowhere': expected a folder with cfg.json and"),
    ("evaluate folder", "folder holds no dictionary (no cfg.json)"),
    ("evaluate nodict", "nodict/cfg.json holds a list, expected a JSON object"),
    ("evaluate folder --n_row=3", "no option --n_row (did you mean '--n_rows'?)"),
    ("evaluate folder --ablate=none", "ablate: expected 'all' or 'counted', got 'none'"),
    ("evaluate folder --n_rows=x", "n_rows: expected int, got 'x'"),
    (
        "evaluate folder folder --out=x.json",
        "--out takes one dictionary; several are written to evaluation.json in their",
    ),
    ("diagnose", "missing dictionary; usage: aen diagnose DICTIONARY [options]"),
    ("diagnose nowhere", "no dictionary 'nowhere': expected a folder with cfg.json and"),
    (
        "diagnose folder --only=coherense",
        "only: expected 'coherence' or 'active_gram' or 'lipschitz' or 'coding_gap' or",
    ),
    ("diagnose folder --n_sample=0", "--n_sample must be at least 1, got 0"),
    ("compare nowhere", "at least two dictionaries are needed, got nowhere alone"),
    ("compare nowhere folder", "no dictionary 'nowhere': expected a folder with cfg.json and"),
    ("compare folder folder --threshold=x", "threshold: expected float, got 'x'"),
    ("report", "missing run; usage: aen report RUN... [options]"),
    ("report nowhere", "nowhere is no folder: expected what aen fit or aen sweep writes (metrics.csv,"),
    ("report folder", "folder holds no run: expected what aen fit or aen sweep writes (metrics.csv,"),
    ("report folder --titel=x", "no option --titel (did you mean '--title'?)"),
    ("push", "missing folder, repo; usage: aen push FOLDER REPO [options]"),
    ("push nowhere a/b", "no folder 'nowhere': give a run's folder, a SAELens folder, or a folder of"),
    ("push folder a/b", "no dictionary below 'folder': looked for cfg.json beside"),
    ("push folder a/b --architecture=topk", "architecture: expected 'standard' or 'aen', got 'topk'"),
    ("pull", "missing repo; usage: aen pull REPO [ID] [options]"),
    ("pull nowhere --revison=x", "no option --revison (did you mean '--revision'?)"),
    ("import nowhere.pt out", "no file 'nowhere.pt'"),
    ("import junk.pt", "missing folder; usage: aen import CHECKPOINT FOLDER [options]"),
    (
        "import junk.pt out --kind=foo",
        "kind: expected 'adaptive_elastic_net' or 'adaptive_lasso' or 'elastic_net' or",
    ),
    ("import text.txt out --k=x", "k: expected int or null, got 'x'"),
    ("shards verify", "missing path; usage: aen shards verify PATH"),
    ("shards verify nowhere", "nowhere holds no manifest.json: it is not a set of activation shards"),
    ("shards info folder", "folder holds no activations: neither our manifest.json (aen harvest) nor a"),
    ("shards convert nowhere", "missing target; usage: aen shards convert PATH TARGET [options]"),
    (
        "shards convert folder out",
        "folder holds no activations: neither our manifest.json (aen harvest) nor a",
    ),
    (
        "shards convert folder out --dtype=int8",
        "dtype: expected 'float32' or 'bfloat16' or 'float16' or null, got 'int8'",
    ),
    ("demo --steps=3", "--steps must be at least 100 for the table to mean anything, got 3"),
    ("demo --steps=x", "steps: expected int, got 'x'"),
    ("demo --l1_warmup=2", "--l1_warmup must be in [0, 1], got 2.0"),
    ("demo --stpes=100", "no option --stpes (did you mean '--steps'?)"),
    (
        "plan --config debug --trainer.devices=x",
        "trainer.devices must be a positive number, a list or 'auto', got 'x'",
    ),
    ("import junk.pt out", "junk.pt"),
]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with things that are not what a command wants."""
    files = {
        "empty.yaml": "",
        "notyaml.yaml": "a: [1",
        "typo.yaml": "modle: {}\n",
        "list.yaml": "- 1\n",
        "text.txt": "hello\n",
        "junk.pt": "junk",
        "nodict/cfg.json": "[1]",
    }
    (tmp_path / "folder").mkdir()
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aen"])
    # Lightning's handler may hold a stream that pytest has closed since; that is no slip of the user's
    monkeypatch.setattr(logging, "raiseExceptions", False)
    return tmp_path


@pytest.mark.parametrize(("command", "line"), WRONG, ids=[command for command, _ in WRONG])
def test_a_slip_gives_one_line_and_code_2(
    desk: Path, capsys: pytest.CaptureFixture[str], command: str, line: str
):
    before = {path for path in desk.rglob("*") if path.is_file()}
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert line in error
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("aen")
    # where the slip shows only once the data are there, Lightning has opened its log
    left = {path for path in desk.rglob("*") if path.is_file() and "version_0" not in path.parts}
    assert left == before


def test_a_misspelt_section_of_a_config_is_named(desk: Path, capsys: pytest.CaptureFixture[str]):
    from aen_lightning.cli.recipes import find_config

    recipe = find_config("debug").read_text()
    (desk / "almost.yaml").write_text(recipe + "modle: {lr: 1}\n")
    assert main(["fit", "--config", "almost.yaml"]) == 2
    assert "no section 'modle' in the config (did you mean 'model'?)" in capsys.readouterr().err
