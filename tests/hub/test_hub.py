from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import disable_progress_bars
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.hub import (
    HubError,
    authors_checkpoint_loader,
    find_dictionaries,
    load_pretrained,
    look_up,
    plan_push,
    pull,
    push,
)
from aen_lightning.runs.provenance import collect, scrub
from aen_lightning.saes.export import export_sae
from aen_lightning.saes.input_scaling import InputScaling
from tests.support.commands import import_command, pull_command, push_command
from tests.support.hub_server import TOKEN, HubServer, running_hub

REPO = "tester/saes"
D_IN, D_SAE = 8, 16


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, noted instead of waited."""
    noted: list[float] = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HubServer]:
    """A Hub on the loopback, an empty cache, and a login."""
    disable_progress_bars()
    with running_hub() as server:
        use_endpoint(monkeypatch, server.endpoint)
        new_cache(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT sets when huggingface_hub is imported."""
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


def new_cache(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(path))


def trained(seed: int = 0, **changes: Any) -> AENTrainingSAE:
    torch.manual_seed(seed)
    sae = AENTrainingSAE(AENTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **changes))
    metadata = {
        "model_name": "EleutherAI/pythia-70m-deduped", "model_class_name": "AutoModelForCausalLM",
        "hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "gpt_neox.layers.3", "context_size": 128,
        "dataset_path": "EleutherAI/the_pile_deduplicated", "prepend_bos": False, "model_from_pretrained_kwargs": {},
    }  # fmt: skip
    for key, value in metadata.items():
        sae.cfg.metadata[key] = value
    return sae


def make_run(folder: Path, seed: int = 0, kind: str = "per_token", config: str | None = None) -> Path:
    """A run's folder as ``aen fit`` leaves it."""
    scaling = InputScaling("average", 0.25) if kind == "average" else InputScaling(kind)  # type: ignore[arg-type]
    for name in ("step_10", "final"):
        export_sae(trained(seed), folder / "sae" / name, input_scaling=scaling, log_sparsity=torch.full((D_SAE,), -2.0))
    (folder / "metrics.csv").write_text(
        "metrics/l0,metrics/explained_variance,details/n_training_samples,step,val/metrics/l0,val/metrics/explained_variance\n"
        "40,0.5,4096,9,,\n,,,9,39,0.51\n33,0.8,8192,19,,\n,,,20,32.5,0.8125\n"
    )
    default = "seed_everything: 7\ntrainer: {max_steps: 20, logger: null}\nmodel: {lr: 0.001, sae: {architecture: aen, gamma: 0.5}}\n"
    (folder / "config.yaml").write_text(config or default)
    return folder


X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3)) * 3


# --- what is found and what it is called --------------------------------------------------------------------------


def test_ids_are_folders_without_what_every_run_has(tmp_path: Path) -> None:
    for run in ("l1/version_0", "aen/version_0", "aen/version_1"):
        make_run(tmp_path / run)
    assert [d.sae_id for d in find_dictionaries(tmp_path)] == ["aen/version_0", "aen/version_1", "l1"]
    assert [d.sae_id for d in find_dictionaries(tmp_path / "l1")] == ["blocks.3.hook_resid_post"]
    assert [d.sae_id for d in find_dictionaries(tmp_path / "l1" / "version_0" / "sae" / "step_10")] == [
        "blocks.3.hook_resid_post"
    ]
    assert [d.sae_id for d in find_dictionaries(tmp_path / "l1", sae_id="mine")] == ["mine"]


def test_several_dictionaries_of_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("a", "b"):
        export_sae(trained(), run / "sae" / "final" / name)
        export_sae(trained(), run / "sae" / "step_10" / name)
    for file in (run / "sae" / "final").glob("*.*"):
        file.unlink()
    found = find_dictionaries(run)
    assert [(d.sae_id, d.name, d.run) for d in found] == [("a", "a", run), ("b", "b", run)]
    (run / "metrics.csv").write_text(
        "a/metrics/l0,b/metrics/l0,val/a/metrics/l0,b/val/metrics/l0,details/n_training_samples\n1,2,3,4,64\n"
    )
    a, b = (collect(d) for d in found)
    assert (a["training_metrics"], a["evaluation"], a["n_training_samples"]) == ({"metrics/l0": 1.0}, {"l0": 3.0}, 64)
    assert (b["training_metrics"], b["evaluation"]) == ({"metrics/l0": 2.0}, {"l0": 4.0})


def test_folders_without_a_finished_dictionary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_dictionaries(tmp_path / "nothing")
    export_sae(trained(), tmp_path / "run" / "sae" / "step_10")
    with pytest.raises(FileNotFoundError, match=r"no dictionary below.*step_N"):
        find_dictionaries(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be the ID"):
        find_dictionaries(tmp_path / "run" / "sae" / "step_10", sae_id="../up")
    with pytest.raises(ValueError, match="OWNER/REPO, got 'repo'"), plan_push(tmp_path, "repo"):
        pass


# --- publishing ---------------------------------------------------------------------------------------------------


def test_a_sweep_is_one_commit_in_saelens_layout(tmp_path: Path, hub: HubServer) -> None:
    for seed, name in enumerate(("a", "b")):
        make_run(tmp_path / "sweep" / name, seed)
    done = push(tmp_path / "sweep", REPO)
    assert [c.oid for c in hub.commits(REPO)] == [done.commit]
    assert sorted(hub.files(REPO)) == ["README.md"] + [
        f"{i}/{file}" for i in "ab" for file in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
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
    assert push(tmp_path / "one", REPO, sae_id="one").commit == first  # nothing changed: no commit, nothing sent
    assert len(hub.requests("PUT /lfs/")) == uploads
    push(make_run(tmp_path / "two", seed=1), REPO, sae_id="two")
    card = hub.files(REPO)["README.md"].decode()
    assert look_up(REPO).sae_ids == ["one", "two"]
    assert card.count("\n| `one` |") == card.count("\n| `two` |") == 3  # dictionaries, evaluation, training
    (tmp_path / "two" / "sae" / "final" / "sparsity.safetensors").unlink()
    push(tmp_path / "two", REPO, sae_id="two")
    assert "two/sparsity.safetensors" not in hub.files(REPO)
    assert "one/sparsity.safetensors" in hub.files(REPO)


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
    assert (provenance["seed"], provenance["n_training_samples"], provenance["n_training_steps"]) == (7, 8192, 20)
    assert provenance["environment_at_publishing"]["torch"] == torch.__version__
    assert cfg["metadata"]["training_architecture"] == "aen"
    assert cfg["architecture"] == "standard"


def test_the_snippet_in_the_card_works(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    push(make_run(tmp_path / "run"), REPO)
    snippets = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)
    assert len(snippets) == 2
    # SAELens and snapshot_download were imported with another endpoint: fill the cache, then run the snippets from it
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
        "data: {init_args: {dataset_path: /home/me/text.jsonl, model_from_pretrained_kwargs: {token: abc123}, x: hf_aaaaaaaaaaaaaaaaaaaaaaaa}}\n"
    )
    run = make_run(tmp_path / "run", config=config)
    cfg_file = run / "sae" / "final" / "cfg.json"
    cfg = json.loads(cfg_file.read_text())
    cfg["metadata"] |= {"model_name": "/home/me/models/llama", "model_from_pretrained_kwargs": {"token": "abc123"}}
    cfg_file.write_text(json.dumps(cfg))
    push(run, REPO)
    text = b"".join(v for k, v in hub.files(REPO).items() if not k.endswith(".safetensors")).decode()
    for secret in ("abc123", "hf_aaaa", "/home/me", TOKEN, str(tmp_path)):
        assert secret not in text
    assert json.loads(hub.files(REPO)["blocks.3.hook_resid_post/cfg.json"])["metadata"]["model_name"] == "llama"
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


# --- fetching -----------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_fetched_and_config_first(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / "sweep" / name)
    push(tmp_path / "sweep", REPO)
    new_cache(monkeypatch, tmp_path / "fresh")
    hub.log.clear()
    assert pull_command([REPO]) == 0
    assert re.search(r"a +standard +8 -> 16 +blocks.3.hook_resid_post", capsys.readouterr().out)
    assert {line.split("/")[-1] for line in hub.requests("GET .*resolve")} == {"cfg.json"}
    hub.log.clear()
    assert pull_command([REPO, "b"]) == 0
    assert "SAE.load_from_disk" in capsys.readouterr().out
    assert {line.split("/", 5)[5] for line in hub.requests("GET .*resolve")} == {
        "b/sae_weights.safetensors", "b/sparsity.safetensors",
    }  # fmt: skip


def test_revision_is_pinned(tmp_path: Path, hub: HubServer) -> None:
    old = push(make_run(tmp_path / "old"), REPO)
    before = pull(REPO)
    new = push(make_run(tmp_path / "new", seed=1), REPO)
    assert (before.commit, pull(REPO).commit, pull(REPO, revision=old.commit[:40]).commit) == (
        old.commit,
        new.commit,
        old.commit,
    )
    assert torch.equal(load_pretrained(REPO, revision=old.commit)(X), SAE.load_from_disk(before.path)(X))
    assert not torch.equal(load_pretrained(REPO)(X), SAE.load_from_disk(before.path)(X))


def test_clear_answers(tmp_path: Path, hub: HubServer) -> None:
    push(make_run(tmp_path / "run"), REPO)
    hub.add("tester/gated", {"a/cfg.json": b"{}", "a/sae_weights.safetensors": b"x"}, gated=True)
    hub.add("tester/empty", {"README.md": b"hello"})
    for repo, options, message in (
        ("tester/none", {}, "reading tester/none: there is no such repository"),
        (REPO, {"revision": "v9"}, "not this revision"),
        (REPO, {"sae_id": "other"}, "no dictionary 'other'; it has blocks.3.hook_resid_post"),
        ("tester/empty", {}, "holds no SAELens dictionary"),
        ("tester/gated", {}, "gated: accept its conditions"),
    ):
        with pytest.raises(HubError, match=message):
            pull(repo, **options)  # type: ignore[arg-type]


def test_weights_that_disagree_with_their_config_are_refused(tmp_path: Path, hub: HubServer) -> None:
    push(make_run(tmp_path / "run"), REPO, sae_id="a")
    files = hub.files(REPO)
    good = json.loads(files["a/cfg.json"])
    hub.add(REPO, {"a/cfg.json": json.dumps({**good, "d_sae": 17}).encode()})
    with pytest.raises(ValueError, match=r"W_enc has shape \(8, 16\) where the config means \(8, 17\)"):
        pull(REPO)
    hub.add(REPO, {"a/cfg.json": json.dumps({**good, "dtype": "bfloat16"}).encode()})
    with pytest.raises(ValueError, match="float32 where the config says bfloat16"):
        pull(REPO)
    hub.log.clear()
    hub.add(
        "tester/new",
        {"a/cfg.json": json.dumps({**good, "architecture": "unheard"}).encode(), "a/sae_weights.safetensors": b"x"},
    )
    with pytest.raises(ValueError, match="architecture 'unheard'"):
        pull("tester/new")
    assert hub.requests("GET .*sae_weights") == []  # refused before the weights are fetched
    hub.add(REPO, {"a/cfg.json": json.dumps(good).encode(), "a/sae_weights.safetensors": b"not safetensors at all"})
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        pull(REPO)


def test_without_a_connection_the_cache_answers(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    push(run, REPO)
    commit = pull(REPO).commit
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert pull(REPO).commit == commit
    assert torch.equal(load_pretrained(REPO)(X), SAE.load_from_disk(run / "sae" / "final")(X))
    with pytest.raises(HubError, match="this process is offline"):
        pull("tester/other")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens
    assert pull(REPO).commit == commit
    with pytest.raises(HubError, match="no connection to the Hub"):
        pull("tester/other")


# --- failures -----------------------------------------------------------------------------------------------------

_WEIGHTS_GET = r"GET .*resolve/.*sae_weights"
_PUBLISHING = [
    (r"POST /api/repos/create", "status", {"status": 503}),
    (r"POST .*preupload", "status", {"status": 429, "headers": {"Retry-After": "3"}}),
    (r"POST .*lfs/objects/batch", "drop", {}),
    (r"PUT /lfs", "status", {"status": 500}),
    (r"PUT /lfs", "drop", {"times": 2}),
    (r"POST /lfs-verify", "status", {"status": 502}),
    (r"POST .*commit/main", "status", {"status": 500, "times": 2}),
    (r"POST .*commit/main", "status", {"status": 429, "headers": {"Retry-After": "7"}}),
    (r"POST .*commit/main", "drop", {}),
    (r"POST .*commit/main", "lost", {}),
    (r"GET .*tree", "status", {"status": 504}),
]
_FETCHING = [
    (r"GET /api/models", "status", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=5'}}),
    (r"HEAD .*resolve", "status", {"status": 500}),
    (_WEIGHTS_GET, "status", {"status": 500, "times": 2}),
    (_WEIGHTS_GET, "status", {"status": 429, "headers": {"Retry-After": "2"}}),
    (_WEIGHTS_GET, "drop", {}),
    (_WEIGHTS_GET, "drop_body", {}),
    (_WEIGHTS_GET, "short", {}),
    (_WEIGHTS_GET, "corrupt", {}),
    (r"GET .*resolve/.*cfg.json", "corrupt", {}),
]


@pytest.mark.parametrize(("match", "action", "options"), _PUBLISHING)
def test_publishing_survives(
    tmp_path: Path, hub: HubServer, waits: list[float], match: str, action: str, options: dict[str, Any]
) -> None:
    run = make_run(tmp_path / "run")
    hub.fail(match, action, **options)
    done = push(run, REPO)
    assert hub.failures[0].times == 0, "the failure never happened"
    assert [c.oid for c in hub.commits(REPO)] == [done.commit]  # once, and whole
    assert len(hub.files(REPO)) == 4
    if wanted := options.get("headers", {}).get("Retry-After"):
        assert max(waits) >= float(wanted)


@pytest.mark.parametrize(("match", "action", "options"), _FETCHING)
def test_fetching_survives(
    tmp_path: Path, hub: HubServer, waits: list[float], match: str, action: str, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = make_run(tmp_path / "run")
    push(run, REPO)
    new_cache(monkeypatch, tmp_path / "fresh")
    hub.fail(match, action, **options)
    hub.log.clear()
    sae = load_pretrained(REPO)
    assert hub.failures[0].times == 0, "the failure never happened"
    assert torch.equal(sae(X), SAE.load_from_disk(run / "sae" / "final")(X))


@pytest.mark.parametrize(
    ("match", "action", "options", "message"),
    [
        (r"PUT /lfs", "status", {"status": 500}, "still fails after 5 attempts: 500"),
        (r"PUT /lfs", "drop", {}, "no connection to the Hub"),
        (r"PUT /lfs", "corrupt", {}, "another SHA-256"),
        (r"PUT /lfs", "status", {"status": 403}, "log in with `hf auth login`"),
        (r"POST .*commit/main", "status", {"status": 503}, "still fails after 5 attempts: 503"),
        (r"POST .*commit/main", "status", {"status": 429}, "still fails after 5 attempts: 429"),
        (r"POST .*commit/main", "drop", {}, "no connection to the Hub"),
    ],
)
def test_publishing_that_fails_for_good_leaves_the_repository_as_it_was_and_can_be_resumed(
    tmp_path: Path, hub: HubServer, match: str, action: str, options: dict[str, Any], message: str
) -> None:
    before = hub.add(REPO, {"README.md": b"# Mine\n", "a/cfg.json": b"{}"})
    hub.fail(match, action, times=10_000, **options)
    run = make_run(tmp_path / "run")
    with pytest.raises(HubError, match=message) as error:
        push(run, REPO)
    assert TOKEN not in str(error.value)
    assert [c.oid for c in hub.commits(REPO)] == [before]
    assert hub.files(REPO) == {"README.md": b"# Mine\n", "a/cfg.json": b"{}"}
    hub.failures.clear()
    hub.log.clear()
    arrived = len(hub.lfs)
    push(run, REPO)
    assert len(hub.requests("PUT /lfs")) == 2 - arrived  # weights and sparsity, less what had arrived
    assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize(
    ("match", "action", "options", "message"),
    [
        (_WEIGHTS_GET, "status", {"status": 500}, "still fails after 5 attempts: 500"),
        (_WEIGHTS_GET, "drop_body", {}, "incomplete|no connection"),
        (_WEIGHTS_GET, "short", {}, "arrives incomplete, 5 times in a row"),
        (_WEIGHTS_GET, "corrupt", {}, "another hash than the Hub states for it, twice"),
        (r"HEAD .*resolve", "status", {"status": 500}, "the Hub cannot be reached: 500"),
    ],
)
def test_fetching_that_fails_for_good_leaves_nothing_wrong_in_the_cache(
    tmp_path: Path, hub: HubServer, match: str, action: str, options: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = make_run(tmp_path / "run")
    push(run, REPO)
    new_cache(monkeypatch, tmp_path / "fresh")
    hub.fail(match, action, times=10_000, **options)
    with pytest.raises(HubError, match=message):
        load_pretrained(REPO)
    assert list((tmp_path / "fresh").rglob("*sae_weights*")) == []
    hub.failures.clear()
    assert torch.equal(load_pretrained(REPO)(X), SAE.load_from_disk(run / "sae" / "final")(X))


def test_an_upload_in_parts_survives_a_failure_in_the_middle(tmp_path: Path, hub: HubServer) -> None:
    hub.chunk_size = 500
    run = make_run(tmp_path / "run")
    hub.fail(r"PUT /lfs/\w+/2", "status", status=500)
    hub.fail(r"PUT /lfs/\w+/3", "drop")
    push(run, REPO)
    assert [failure.times for failure in hub.failures] == [0, 0]
    original = (run / "sae" / "final" / "sae_weights.safetensors").read_bytes()
    assert hub.files(REPO)["blocks.3.hook_resid_post/sae_weights.safetensors"] == original
    assert len(hub.requests(r"PUT /lfs/\w+/\d+")) >= len(original) // 500


def test_a_concurrent_commit_is_not_overwritten(tmp_path: Path, hub: HubServer) -> None:
    run = make_run(tmp_path / "run")
    hub.add(REPO, {"README.md": b"# Mine\n"})

    class Slow(dict[str, bytes]):
        def __setitem__(
            self, key: str, value: bytes
        ) -> None:  # while weights are being uploaded, somebody else commits
            if len(hub.commits(REPO)) == 1:
                hub.add(REPO, {"README.md": b"# Theirs\n"})
            super().__setitem__(key, value)

    hub.lfs = Slow()
    with pytest.raises(HubError, match="somebody else changed the repository meanwhile"):
        push(run, REPO)
    assert hub.files(REPO) == {"README.md": b"# Theirs\n"}
    push(run, REPO)
    assert hub.files(REPO)["README.md"].decode().count("# Theirs") == 1


def test_a_dropped_download_goes_on_where_it_stopped(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(make_run(tmp_path / "run"), REPO)
    new_cache(monkeypatch, tmp_path / "fresh")
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 64)
    hub.fail(_WEIGHTS_GET, "drop_body")
    pull(REPO)
    assert re.fullmatch(r"bytes=\d{2,}-", hub.ranges[-1])


def test_authors_checkpoints_come_from_the_hub_too(tmp_path: Path, hub: HubServer) -> None:
    file = "checkpoints/llama8b/topk/seed0/k2_llm-topk_baseline_sweep000-seed0.pt"
    state = {
        "b_dec": torch.randn(D_IN), "encoder.weight": torch.randn(D_SAE, D_IN), "encoder.bias": torch.randn(D_SAE),
        "decoder.weight": torch.randn(D_IN, D_SAE),
    }  # fmt: skip
    torch.save({"model_state_dict": state}, tmp_path / "k2.pt")
    hub.add("authors/saes", {file: (tmp_path / "k2.pt").read_bytes()})
    hub.fail(r"GET .*resolve/.*\.pt", "status", status=500)
    assert import_command([f"hf://authors/saes/{file}", str(tmp_path / "out")]) == 0
    imported = SAE.load_from_disk(tmp_path / "out")
    converted = SAE.from_pretrained("authors/saes", file, converter=authors_checkpoint_loader)
    assert imported.cfg.k == 2
    assert torch.equal(converted(X), imported(X))
    assert ((converted.encode(X) > 0).sum(dim=1) <= 2).all()
    push(tmp_path / "out", REPO)  # and may be published in turn
    assert torch.equal(load_pretrained(REPO)(X), imported(X))
    with pytest.raises(HubError, match=r"has no file 'checkpoints/none.pt'"):
        import_command(["hf://authors/saes/checkpoints/none.pt", str(tmp_path / "o")])
