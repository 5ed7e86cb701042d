"""The relaxed refit: same support, magnitudes restored, exported as JumpReLU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from aen_lightning.cli.main import main
from aen_lightning.saes.input_scaling import InputScaling
from aen_lightning.saes.relaxed import RelaxedTrainingSAE
from aen_lightning.training.refit import RefitModule
from tests.support.streams import loader
from tests.support.training import make_trainer, step_input


def random_sae(architecture: str, **fields: Any) -> SAE[Any]:
    torch.manual_seed(0)
    is_jump = architecture == "jumprelu"
    cfg = (JumpReLUSAEConfig if is_jump else StandardSAEConfig)(d_in=16, d_sae=48, **fields)
    sae: SAE[Any] = JumpReLUSAE(cfg) if is_jump else StandardSAE(cfg)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.3 * torch.randn_like(p))
        if is_jump:
            sae.threshold.copy_(torch.rand(48) - 0.2)
    return sae


def step(refit: RelaxedTrainingSAE, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    refit.training_forward_pass(step_input(x)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_it_starts_as_the_dictionary_and_never_leaves_its_support(
    tmp_path: Path, architecture: str, apply_b_dec_to_input: bool
) -> None:
    source = random_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input, dtype="float64")
    x = torch.randn(500, 16, dtype=torch.float64)
    refit = RelaxedTrainingSAE.of(source)
    assert_close(refit(x), source(x))
    optimizer = torch.optim.Adam([p for p in refit.parameters() if p.requires_grad], lr=0.05)
    # far from what the dictionary reconstructs, so that many offsets are pushed against their bound
    for _ in range(50):
        step(refit, 0.2 * x, optimizer)
    assert (refit.offset < -refit.threshold).any()
    refit.save_inference_model(tmp_path)
    found = SAE.load_from_disk(tmp_path, dtype="float64")
    assert type(found) is JumpReLUSAE
    support = source.encode(x) > 0
    assert 0.05 < support.double().mean() < 0.6
    assert torch.equal(refit.encode(x) > 0, support)
    assert torch.equal(found.encode(x) > 0, support)
    assert (found.threshold >= 0).all()
    assert_close(found(x), refit(x))
    assert_close(found.W_dec.norm(dim=-1), torch.ones(48, dtype=torch.float64))
    assert (found(x) - source(x)).abs().max() > 0.1


def test_it_finds_what_an_l1_penalty_took_away() -> None:
    # one active feature at a time and an orthonormal dictionary: soft thresholding by 0.5 has lost exactly
    # 0.5 of each magnitude
    source = random_sae("standard", dtype="float64")
    eye = torch.eye(48, 16, dtype=torch.float64)
    with torch.no_grad():
        source.W_enc.copy_(eye.T)
        source.W_dec.copy_(eye)
        source.b_enc.fill_(-0.5)
        source.b_dec.zero_()
    refit = RelaxedTrainingSAE.of(source)
    optimizer = torch.optim.Adam([p for p in refit.parameters() if p.requires_grad], lr=0.02)
    for i in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - i / 600)
        generator = torch.Generator().manual_seed(i)
        which = torch.randint(0, 16, (256,), generator=generator)
        size = 1 + 2 * torch.rand(256, 1, dtype=torch.float64, generator=generator)
        x = size * eye[which]
        step(refit, x, optimizer)
    assert_close(source(x), (size - 0.5) * eye[which])
    assert_close(refit(x), x, rtol=0, atol=5e-3)
    assert_close(refit.offset[:16], torch.full((16,), 0.5, dtype=torch.float64), rtol=0, atol=0.02)
    assert torch.equal(refit.offset[16:], torch.zeros(32, dtype=torch.float64))  # never fired, never touched


def test_what_has_no_thresholds_is_refused() -> None:
    from sae_lens import TopKSAE, TopKSAEConfig

    with pytest.raises(
        ValueError, match=r"needs a dictionary whose features fire above a threshold .* got 'topk'"
    ):
        RelaxedTrainingSAE.of(TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)))


class Data(pl.LightningDataModule):
    """A stream that says what it is."""

    d_in = 16

    def __init__(self, kind: Any = "none", hook_name: str = "blocks.1.hook_resid_post") -> None:
        super().__init__()
        self.input_scaling = InputScaling(kind)
        self.sae_metadata = {"hook_name": hook_name}

    def train_dataloader(self) -> DataLoader[Tensor]:
        return loader()


def saved(path: Path, **fields: Any) -> str:
    sae = random_sae("standard", **fields)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(path)
    return str(path)


def test_data_that_are_not_the_dictionarys_are_refused(tmp_path: Path) -> None:
    scaled = saved(tmp_path / "scaled", normalize_activations="constant_norm_rescale")
    with pytest.raises(
        ValueError, match=r"scaled by 'per_token', the data module scales by 'none': set its input_scaling"
    ):
        make_trainer(tmp_path, 3).fit(RefitModule(scaled), datamodule=Data())
    raw = saved(tmp_path / "raw")
    with pytest.raises(ValueError, match=r"scaled by 'none', the data module scales by 'per_token'"):
        make_trainer(tmp_path, 3).fit(RefitModule(raw), datamodule=Data("per_token"))
    with pytest.raises(
        ValueError, match=r"is for blocks\.1\.hook_resid_post, the data are of blocks\.2\.hook_mlp_out"
    ):
        make_trainer(tmp_path, 3).fit(RefitModule(raw), datamodule=Data(hook_name="blocks.2.hook_mlp_out"))


def test_a_refit_on_scaled_tokens_is_exported_for_raw_ones_and_resumes(tmp_path: Path) -> None:
    name = saved(tmp_path / "scaled", normalize_activations="constant_norm_rescale")
    module = RefitModule(name)
    trainer = make_trainer(tmp_path, 10)
    trainer.fit(module, datamodule=Data("per_token"))
    x = 30 * torch.randn(64, 16)
    scale = 4 / x.norm(dim=-1, keepdim=True)
    found = SAE.load_from_disk(tmp_path / "sae" / "final")
    assert_close(found(x), module.saes[""](x * scale) / scale, rtol=1e-4, atol=1e-3)
    assert found.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert found.cfg.metadata.training_architecture == "relaxed"
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    read = RefitModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    for key, value in module.state_dict().items():
        assert torch.equal(read.state_dict()[key], value), key


def test_the_command_shows_held_out_metrics_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["aen"])
    quick = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    train = [
        "--trainer.max_steps=300",
        f"--trainer.default_root_dir={tmp_path / 'fit'}",
        "--model.sae.lambda_1=0.02",
    ]
    assert main(["fit", "--config", "debug", *train, *quick]) == 0
    dictionary = str(next((tmp_path / "fit").glob("version_*")) / "sae" / "final")
    config = Path(next((tmp_path / "fit").glob("version_*")) / "config.yaml").read_text()
    import yaml

    config_of_fit = yaml.safe_load(config)
    (tmp_path / "refit.yaml").write_text(
        yaml.safe_dump({"data": config_of_fit["data"], "trainer": {"accelerator": "cpu", "max_steps": 200}})
    )
    where = ["--config", str(tmp_path / "refit.yaml"), f"--trainer.default_root_dir={tmp_path / 'refit'}"]
    capsys.readouterr()
    assert main(["refit", *where, f"--model.dictionary={dictionary}", "--model.lr=0.003", *quick]) == 0
    (folder,) = (tmp_path / "refit").glob("version_*")
    assert str(folder / "refit.csv") in capsys.readouterr().out
    table = pd.read_csv(folder / "refit.csv", index_col="metric")
    assert table.after["explained_variance"] > table.before["explained_variance"] + 0.01
    assert table.after["l0"] == pytest.approx(table.before["l0"], rel=1e-4)
    assert table.after["dead_features_pct"] == table.before["dead_features_pct"]
    assert json.loads((folder / "sae" / "final" / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert main(["refit", *where, "--model.dictionary=nowhere"]) == 2
    assert "no dictionary 'nowhere'" in capsys.readouterr().err
