from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from huggingface_hub import ModelCard
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from aen_lightning.hub import (
    HubError,
    load_pretrained,
    look_up,
    plan_push,
    pull,
    push,
)
from aen_lightning.hub.card import Entry, render_card
from aen_lightning.runs import scrub
from aen_lightning.spelling import printable
from tests.support.commands import push_command
from tests.support.hub_client import new_cache
from tests.support.hub_server import TOKEN, HubServer
from tests.support.runs import D_IN, D_SAE, make_run, trained

REPO = "tester/saes"
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3)) * 3


def test_a_sweep_is_one_commit_in_saelens_layout(tmp_path: Path, hub: HubServer) -> None:
    for seed, name in enumerate(("a", "b")):
        make_run(tmp_path / "sweep" / name, seed)
    done = push(tmp_path / "sweep", REPO)
    assert [c.oid for c in hub.commits(REPO)] == [done.commit]
    assert sorted(hub.files(REPO)) == ["README.md"] + [
        f"{i}/{file}"
        for i in "ab"
        for file in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    ]
    original = (tmp_path / "sweep" / "a" / "sae" / "final" / "sae_weights.safetensors").read_bytes()
    assert hub.files(REPO)["a/sae_weights.safetensors"] == original
    assert hub.authorizations == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("kind", ["none", "per_token", "average"])
def test_push_and_pull_give_the_same_outputs(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = make_run(tmp_path / "run", kind=kind)
    done = push(run, REPO)
    new_cache(monkeypatch, tmp_path / "other cache")
    sae = load_pretrained(REPO)
    local = SAE.load_from_disk(run / "sae" / "final")
    assert torch.equal(sae(X), local(X))
    # raw activations in, raw activations out: as the training SAE between the scaling and its inverse
    original = trained()
    scale = {
        "none": torch.tensor(1.0),
        "average": torch.tensor(0.25),
        "per_token": D_IN**0.5 / X.norm(dim=1, keepdim=True),
    }[kind]
    assert_close(sae(X), original.decode(original.encode(X * scale)) / scale)
    assert pull(REPO).commit == done.commit


_PLAIN_USER = """
import json, sys, torch
from sae_lens import SAE
sae = SAE.from_pretrained(sys.argv[1], sys.argv[2])
assert not any(name.startswith("aen_lightning") for name in sys.modules)
print(json.dumps(sae(torch.tensor(json.loads(sys.argv[3]))).tolist()), type(sae).__name__)
"""


@pytest.mark.slow
def test_saelens_alone_loads_what_was_published(tmp_path: Path, hub: HubServer) -> None:
    run = make_run(tmp_path / "run")
    push(run, REPO)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "fresh"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    answer = subprocess.run(
        [sys.executable, "-c", _PLAIN_USER, REPO, "blocks.3.hook_resid_post", json.dumps(X.tolist())],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    values, class_name = answer.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert class_name == "StandardSAE"
    assert torch.equal(torch.tensor(json.loads(values)), SAE.load_from_disk(run / "sae" / "final")(X))


def test_a_second_push_adds_and_keeps(tmp_path: Path, hub: HubServer) -> None:
    push(make_run(tmp_path / "one"), REPO, sae_id="one")
    first = hub.commits(REPO)[-1].oid
    uploads = len(hub.requests("PUT /lfs/"))
    assert (
        push(tmp_path / "one", REPO, sae_id="one").commit == first
    )  # nothing changed: no commit, nothing sent
    assert len(hub.requests("PUT /lfs/")) == uploads
    push(make_run(tmp_path / "two", seed=1), REPO, sae_id="two")
    card = hub.files(REPO)["README.md"].decode()
    assert look_up(REPO).sae_ids == ["one", "two"]
    assert card.count("\n| `one` |") == card.count("\n| `two` |") == 3  # dictionaries, evaluation, training
    (tmp_path / "two" / "sae" / "final" / "sparsity.safetensors").unlink()
    push(tmp_path / "two", REPO, sae_id="two")
    assert "two/sparsity.safetensors" not in hub.files(REPO)
    assert "one/sparsity.safetensors" in hub.files(REPO)


def test_a_repository_has_an_owner(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OWNER/REPO, got 'repo'"), plan_push(tmp_path, "repo"):
        pass


def test_text_of_other_hands_stays_in_the_card(tmp_path: Path, hub: HubServer) -> None:
    hub.add(REPO, {"README.md": b"---\nlicense: mit\ntags: [mine]\n---\n# My title\n\nMy words.\n"})
    run = make_run(tmp_path / "run")
    for _ in range(2):
        push(run, REPO)
        card = ModelCard(hub.files(REPO)["README.md"].decode())
        assert card.text.count("# My title\n\nMy words.") == 1
        assert card.text.count("## Dictionaries") == 1
        assert card.data.license == "mit"
        assert card.data.tags is not None
        assert {"mine", "saelens", "aen"} <= set(card.data.tags)
    own = hub.files(REPO)["README.md"].decode() + "\nAnd a postscript.\n"
    hub.add(REPO, {"README.md": own.encode()})
    push(make_run(tmp_path / "other", seed=1), REPO, sae_id="other")
    assert hub.files(REPO)["README.md"].decode().rstrip().endswith("And a postscript.")


def test_card_and_provenance(tmp_path: Path, hub: HubServer) -> None:
    push(make_run(tmp_path / "run"), REPO, license_name="mit")
    files = hub.files(REPO)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "saelens"
    assert card.data.base_model == "EleutherAI/pythia-70m-deduped"
    assert card.data.datasets == ["EleutherAI/the_pile_deduplicated"]
    assert card.data.license == "mit"
    evaluation = re.search(r"\| ID \| l0 \| explained_variance \|\n.*\n(.*)\n", card.text)
    assert evaluation is not None
    assert evaluation[1] == "| `blocks.3.hook_resid_post` | 32.5 | 0.8125 |"
    assert "gamma: 0.5" in card.text
    assert "neuronpedia-runner --from-local-sae" in card.text
    assert "--dataset-path EleutherAI/the_pile_deduplicated --n-tokens-in-prompt 128" in card.text
    cfg = json.loads(files["blocks.3.hook_resid_post/cfg.json"])
    provenance = cfg["metadata"]["provenance"]
    assert provenance["evaluation"] == {"l0": 32.5, "explained_variance": 0.8125}
    assert (provenance["seed"], provenance["n_training_samples"], provenance["n_training_steps"]) == (
        7,
        8192,
        20,
    )
    assert provenance["environment_at_publishing"]["torch"] == torch.__version__
    assert cfg["metadata"]["training_architecture"] == "aen"
    assert cfg["architecture"] == "standard"


def test_the_snippet_in_the_card_works(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(make_run(tmp_path / "run"), REPO)
    snippets = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)
    assert len(snippets) == 2
    # SAELens and snapshot_download were imported with another endpoint: fill the cache, then run the snippets
    # from it
    pull(REPO)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    for snippet in snippets:
        names: dict[str, Any] = {"activations": X}
        exec(snippet, names)
        assert torch.equal(names["sae"](X), SAE.load_from_disk(tmp_path / "run" / "sae" / "final")(X))


def test_secrets_and_local_paths_are_not_published(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (
        "seed_everything: 1\nmodel: {lr: 0.1}\n"
        "data: {init_args: {dataset_path: /home/me/text.jsonl, model_from_pretrained_kwargs: {token: "
        "abc123}, x: hf_aaaaaaaaaaaaaaaaaaaaaaaa}}\n"
    )
    run = make_run(tmp_path / "run", config=config)
    cfg_file = run / "sae" / "final" / "cfg.json"
    cfg = json.loads(cfg_file.read_text())
    cfg["metadata"] |= {
        "model_name": "/home/me/models/llama",
        "model_from_pretrained_kwargs": {"token": "abc123"},
    }
    cfg_file.write_text(json.dumps(cfg))
    push(run, REPO)
    text = b"".join(v for k, v in hub.files(REPO).items() if not k.endswith(".safetensors")).decode()
    for secret in ("abc123", "hf_aaaa", "/home/me", TOKEN, str(tmp_path)):
        assert secret not in text
    assert (
        json.loads(hub.files(REPO)["blocks.3.hook_resid_post/cfg.json"])["metadata"]["model_name"] == "llama"
    )
    assert scrub({"n_tokens": 5, "sequence_separator_token": 3, "max_tokens": "8"}) == {
        "n_tokens": 5, "sequence_separator_token": 3, "max_tokens": "8",
    }  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "blocks.3.hook_resid_post")  # a "token" that the metadata holds
    with pytest.raises(ValueError, match="would contain the access token"):
        push(run, REPO)


def test_architecture_and_folders_saved_for_training(tmp_path: Path, hub: HubServer) -> None:
    sae = trained()
    sae.save_model(tmp_path / "training")
    push(tmp_path / "training", REPO, architecture="aen", sae_id="kept")
    assert json.loads(hub.files(REPO)["kept/cfg.json"])["architecture"] == "aen"
    assert "import aen_lightning" in hub.files(REPO)["README.md"].decode()
    assert_close(load_pretrained(REPO, "kept")(X), sae(X))
    scaled = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, normalize_activations="expected_average_only_in")
    )
    scaled.save_model(tmp_path / "scaled")
    with pytest.raises(ValueError, match="does not hold the factor"):
        push(tmp_path / "scaled", REPO, sae_id="scaled")
    (tmp_path / "scaled" / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    push(tmp_path / "scaled", REPO, sae_id="scaled")
    assert_close(load_pretrained(REPO, "scaled")(X), scaled.decode(scaled.encode(X * 0.5)) / 0.5)


def test_private_and_branches(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    push(run, REPO, private=True, revision="v1")
    assert hub.repos[REPO].private
    assert hub.commits(REPO) == []
    assert len(hub.commits(REPO, "v1")) == 1
    card = hub.files(REPO, "v1")["README.md"].decode()
    assert 'revision="v1"' in card
    assert "from_pretrained" not in card  # it can only read main
    assert look_up(REPO, "v1").sae_ids == ["blocks.3.hook_resid_post"]
    hub.add("tester/open", {})
    with pytest.raises(HubError, match="is public, but --private"):
        push(run, "tester/open", private=True)
    assert list(hub.files("tester/open")) == []
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    new_cache(monkeypatch, tmp_path / "other")
    with pytest.raises(HubError, match="no such repository, or it is private"):
        pull(REPO, revision="v1")
    with pytest.raises(HubError, match="needs a login: run `hf auth login`"):
        push(run, REPO)


def test_weights_that_do_not_fit_are_not_published(tmp_path: Path, hub: HubServer) -> None:
    run = make_run(tmp_path / "run")
    weights = run / "sae" / "final" / "sae_weights.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="the weights are float16 where the config says float32"):
        push(run, REPO)
    assert REPO not in hub.repos


def test_dry_run_prints_tree_sizes_and_card_without_network(
    tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert push_command([str(run), REPO, "--dry-run", "--id", "mine"]) == 0
    out = capsys.readouterr().out
    assert "mine/sae_weights.safetensors" in out
    assert "library_name: saelens" in out
    assert hub.log == []
    assert push_command([str(run), REPO, "--id", "mine"]) == 0
    assert f'SAE.from_pretrained("{REPO}", "mine")' in capsys.readouterr().out
    assert TOKEN not in out


@pytest.mark.parametrize("text", ["\x1b[2J", "\u202e", "a\x04b"])
def test_what_a_terminal_or_a_reader_would_obey_is_shown_in_the_card_not_passed_on(text: str):
    cfg = {
        "architecture": "standard", "d_in": 8, "d_sae": 16, "dtype": text,
        "metadata": {
            "model_name": text, "hook_name": text, "dataset_path": text, "training_architecture": text,
            "sae_lens_training_version": text, "context_size": 128,
        },
    }  # fmt: skip
    theirs = "# me\n\n\u05d0\u200f of other hands\n"  # a mark of direction that belongs there
    card = render_card("me/sae", [Entry("x", cfg)], existing=theirs)
    ours = card.replace(theirs.rstrip(), "")
    assert "\u05d0\u200f of other hands" in card
    assert text not in ours
    assert printable(text) in ours
