from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub.utils import disable_progress_bars
from lightning.pytorch.loggers import CSVLogger
from sae_lens import SAE

from aen_lightning import SAEModule
from aen_lightning.callbacks.publish import PublishToHub
from aen_lightning.data import SpikedDataModule
from aen_lightning.hub import HubError, load_pretrained
from tests.support.hub_server import TOKEN, HubServer, running_hub

REPO = "tester/run"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    disable_progress_bars()
    with running_hub() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (
            ("ENDPOINT", server.endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_DISABLE_XET", True),
        ):  # fmt: skip
            monkeypatch.setattr(hub_constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def fit(folder: Path, callback: PublishToHub, max_steps: int = 4, fast_dev_run: bool = False) -> pl.Trainer:
    torch.manual_seed(0)
    module = SAEModule({"architecture": "aen", "d_in": 8, "d_sae": 16, "lambda_1": 1e-3, "lambda_2": 1e-4})
    data = SpikedDataModule(
        d_in=8, n_features=16, k=2, train_batch_size_tokens=32, n_eval_samples=64, input_scaling="per_token"
    )
    trainer = pl.Trainer(
        max_steps=max_steps, callbacks=[callback], accelerator="cpu", logger=CSVLogger(str(folder), name=""),
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=2, log_every_n_steps=1,
        fast_dev_run=fast_dev_run, enable_checkpointing=False, default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def test_a_run_is_published_when_it_ends(tmp_path: Path, hub: HubServer) -> None:
    callback = PublishToHub(REPO, sae_id="spiked", private=True)
    fit(tmp_path, callback)
    assert [c.oid for c in hub.commits(REPO)] == [callback.published_commit]
    assert hub.repos[REPO].private
    card = hub.files(REPO)["README.md"].decode()
    assert "On held-out tokens" in card  # the validation of this very run
    x = torch.randn(3, 8)
    local = SAE.load_from_disk(tmp_path / "version_0" / "sae" / "final")
    assert local.cfg.normalize_activations == "constant_norm_rescale"
    assert torch.equal(load_pretrained(REPO, "spiked")(x), local(x))


def test_a_trial_run_publishes_nothing(tmp_path: Path, hub: HubServer) -> None:
    fit(tmp_path, PublishToHub(REPO), fast_dev_run=True)
    assert hub.log == []


def test_without_a_login_the_run_does_not_begin(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="log in with `hf auth login`"):
        fit(tmp_path, PublishToHub(REPO))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(HubError, match="needs a login"):
        fit(tmp_path, PublishToHub(REPO))
    assert list(tmp_path.rglob("sae_weights.safetensors")) == []


def test_a_hub_that_fails_leaves_the_run_whole_and_says_how_to_go_on(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.fail(r"POST .*commit/main", "status", status=503, times=100)
    with pytest.raises(HubError, match=r"503.*`aen push` publishes them"):
        fit(tmp_path, PublishToHub(REPO))
    assert hub.commits(REPO) == []
    SAE.load_from_disk(tmp_path / "version_0" / "sae" / "final")


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="'standard' or 'aen', got 'topk'"):
        PublishToHub(REPO, architecture="topk")  # type: ignore[arg-type]
