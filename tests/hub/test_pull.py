from __future__ import annotations

import json
import os
import re
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
from sae_lens import SAE

from aen_lightning.hub import (
    HubError,
    authors_checkpoint_loader,
    load_pretrained,
    pull,
    push,
)
from tests.support.commands import import_command, pull_command
from tests.support.hub_client import new_cache, use_endpoint
from tests.support.hub_server import HubServer
from tests.support.runs import D_IN, D_SAE, make_run

REPO = "tester/saes"
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3)) * 3


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
        {
            "a/cfg.json": json.dumps({**good, "architecture": "unheard"}).encode(),
            "a/sae_weights.safetensors": b"x",
        },
    )
    with pytest.raises(ValueError, match="architecture 'unheard'"):
        pull("tester/new")
    assert hub.requests("GET .*sae_weights") == []  # refused before the weights are fetched
    hub.add(
        REPO,
        {"a/cfg.json": json.dumps(good).encode(), "a/sae_weights.safetensors": b"not safetensors at all"},
    )
    with pytest.raises(ValueError, match="is no safetensors file, or a damaged one"):
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


def test_pulled_files_may_be_read_as_the_umask_says(tmp_path: Path, hub: HubServer) -> None:
    push(make_run(tmp_path / "run"), REPO)
    before = os.umask(0o022)
    try:
        folder = pull(REPO).path
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert modes == dict.fromkeys(("cfg.json", "sae_weights.safetensors", "sparsity.safetensors"), "0o644")


def test_nothing_from_a_repository_is_obeyed_by_the_terminal(
    tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    final = make_run(tmp_path / "run") / "sae" / "final"
    cfg = json.loads((final / "cfg.json").read_text())
    cfg["metadata"] |= {"model_name": "\x1b]0;pwned\x07\x1b[2Jmodel", "hook_name": "a\x9bb\u202eline\nline"}
    files = {"a/cfg.json": json.dumps(cfg).encode(), "a/sae_weights.safetensors": (final / "sae_weights.safetensors").read_bytes()}  # fmt: skip
    hub.add("tester/hostile", files)
    for args in (["tester/hostile"], ["tester/hostile", "a"]):
        pull_command(args)
        out = capsys.readouterr().out
        assert "model" in out
        assert not [c for c in out if not c.isprintable() and c != "\n"]


def test_a_config_that_cannot_be_is_refused_before_weights_are_fetched(hub: HubServer) -> None:
    hub.add("tester/wrong", {"a/cfg.json": b'{"d_in": -1, "d_sae": 4}', "a/sae_weights.safetensors": b"x"})
    with pytest.raises(ValueError, match=r"tester/wrong, a/cfg\.json: d_in: expected greater than or equal to 1"):
        pull("tester/wrong")
