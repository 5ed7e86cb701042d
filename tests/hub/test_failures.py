"""A Hub that fails, at every place where it can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from sae_lens import SAE

from aen_lightning.hub import (
    HubError,
    load_pretrained,
    pull,
    push,
)
from tests.support.hub_client import new_cache
from tests.support.hub_server import TOKEN, HubServer
from tests.support.runs import D_IN, make_run

REPO = "tester/saes"
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3)) * 3


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
