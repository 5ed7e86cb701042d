"""``aen demo``.

The recommended AEN and the paper's beside L1 and TopK on one synthetic stream, without downloads.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any, Literal

_D_IN, _D_SAE, _K = 128, 256, 8


def _variants(n_steps: int, l1_warmup: float) -> dict[str, dict[str, Any]]:
    """The SAEs without a preset."""
    # the published delay and ramp, 10 000 and 2 000 of 50 000 steps, shortened with the run; the paper has no
    # warm-up of the L1 term, which here is a quarter of the run for both: without it twice as many features
    # die (--l1_warmup 0 shows it)
    schedule = {
        "warmup_delay_steps": n_steps // 5,
        "warmup_ramp_steps": n_steps // 25,
        "l1_warmup_steps": round(l1_warmup * n_steps),
    }
    aen = {"architecture": "aen", "lambda_1": 5e-3, "lambda_2": 1e-4, "ema_decay": 0.9999, **schedule}
    return {
        "AEN-paper": aen,
        "AEN-guard": {**aen, "starvation_guard": 0.1},
        "L1": {**aen, "lambda_2": 0.0, "gamma": 0.0},
        "TopK": {"architecture": "topk", "k": _K},
    }


def demo(
    *,
    steps: int = 6000,
    out: str = "demo-output",
    preset: Literal["recommended", "paper"] = "recommended",
    l1_warmup: float = 0.25,
) -> None:
    """The recommended AEN and the paper's beside L1 and TopK on one stream of synthetic activations.

    Trains the SAEs, prints the comparison, and loads the first dictionary back through SAELens. Downloads
    nothing.

    Args:
        preset: recommended: all of them. paper: without the recommended one.
        steps: Training steps of each SAE, at least 100.
        out: Folder for logs and dictionaries.
        l1_warmup: Share of the run over which the L1 term rises, in [0, 1].
    """
    if steps < 100:
        raise ValueError(f"--steps must be at least 100 for the table to mean anything, got {steps}")
    if not 0 <= l1_warmup <= 1:
        raise ValueError(f"--l1_warmup must be in [0, 1], got {l1_warmup}")
    import torch
    from sae_lens import SAE

    print(
        f"Spiked synthetic data: {_D_SAE} features in {_D_IN} dimensions, {_K} active per sample, expected "
        f"cosine 0.3.\nEach SAE sees the same {steps} batches of 256 samples.\n"
    )
    header = (
        f"{'SAE':<13}{'L0':>8}{'EV':>9}{'dead %':>9}{'shrinkage':>11}{'matched cosine':>16}{'seconds':>9}"
    )
    print(header + "\n" + "-" * len(header))
    # the table is what to read here, not Lightning's notes on devices and products; its import, which `aen` has done by now,
    # sets this level
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # matrices this small only lose by a second thread
    variants: dict[str, dict[str, Any] | None] = {**_variants(steps, l1_warmup)}
    if preset == "recommended":
        variants = {"AEN": None, **variants}
    folders = {}
    for name, sae in variants.items():
        start = time.perf_counter()
        folders[name] = _train(sae, steps, Path(out) / name.lower(), f"training {name}")
        row = _evaluate(folders[name])
        print(
            f"{name:<13}{row['l0']:>8.1f}{row['ev']:>9.3f}{row['dead']:>9.2f}{row['shrinkage']:>11.3f}"
            f"{row['matched']:>16.3f}{time.perf_counter() - start:>9.0f}",
            flush=True,
        )
    print(
        "\nL0: active features per sample (the truth is 8). EV: explained variance. dead %: features silent\n"
        "on 8192 held-out samples. shrinkage: |reconstruction| / |input|. matched cosine: to the true\n"
        "dictionary, 1 is every feature found.\n"
        "AEN: aen_lightning.presets.recommended. AEN-paper: as published.\nAEN-guard: that with starvation_guard 0.1.\n"
    )
    loaded = SAE.load_from_disk(next(iter(folders.values())))
    print(
        f"Loaded back with sae_lens.SAE.load_from_disk: {type(loaded).__name__}, W_dec "
        f"{tuple(loaded.W_dec.shape)}"
    )
    print("Dictionaries (SAELens folders) and metrics.csv of each run:")
    for name, folder in folders.items():
        print(f"  {name:<13}{folder}")


def _data() -> Any:
    from aen_lightning.data.synthetic import SpikedDataModule

    return SpikedDataModule(d_in=_D_IN, n_features=_D_SAE, k=_K, rho=0.3, train_batch_size_tokens=256, seed=0)


def _train(sae: dict[str, Any] | None, steps: int, folder: Path, what: str) -> Path:
    """Train the recommended SAE, or the one with these fields; ``what`` is said of it meanwhile."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    from aen_lightning.callbacks import DeadFeatureTracker, ExportSAE
    from aen_lightning.cli.run_progress import RunProgress
    from aen_lightning.presets import recommended
    from aen_lightning.training.module import SAEModule

    pl.seed_everything(0, verbose=False)
    callbacks: list[pl.Callback] = []
    if sae is None:
        module, callbacks = recommended(d_in=_D_IN, d_sae=_D_SAE, l0=_K, max_steps=steps)
    else:
        module = SAEModule({"d_in": _D_IN, "d_sae": _D_SAE, **sae})
    export = ExportSAE(dirpath=str(folder / "sae"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        # the published clip of 1.0 is in the paper's units, 1/d_in of SAELens's
        gradient_clip_val=float(_D_IN),
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=100,
        callbacks=[
            *callbacks,
            export,
            DeadFeatureTracker(window_steps=max(1, steps // 5)),
            RunProgress(what),
        ],
    )
    with warnings.catch_warnings():
        # said by Lightning and pointless here: the stream needs no workers, and CSVLogger reuses a folder by
        # design
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        trainer.fit(module, datamodule=_data())
    assert export.last_path is not None  # ExportSAE writes at the end of every fit
    return export.last_path


def _evaluate(folder: Path) -> dict[str, float]:
    """Metrics of the dictionary as it lies on disk, on the held-out split."""
    import torch
    from sae_lens import SAE

    from aen_lightning.metrics import L0, DeadFeatures, ExplainedVariance, ShrinkageRatio, matched_cosine

    data, sae = _data(), SAE.load_from_disk(folder)
    l0, ev, dead, shrinkage = L0(), ExplainedVariance(_D_IN), DeadFeatures(_D_SAE), ShrinkageRatio()
    for x in data.test_dataloader():
        with torch.no_grad():
            feature_acts = sae.encode(x)
            x_hat = sae.decode(feature_acts)
        l0.update(feature_acts)
        dead.update(feature_acts)
        ev.update(x, x_hat)
        shrinkage.update(x, x_hat)
    return {
        "l0": l0.compute().item(),
        "ev": ev.compute().item(),
        "dead": dead.compute().item(),
        "shrinkage": shrinkage.compute().item(),
        "matched": matched_cosine(sae.W_dec, data.feature_vectors),
    }
