"""SynthSAEBench (arXiv:2602.14687): data with known features, SAELens's generator and metrics, all variants
with the same start, samples, order and budget.

    python benchmarks/synth_sae_bench.py                      an eighth of the published size, three seeds
    python benchmarks/synth_sae_bench.py --l0 4 8 12 16       the same at several L0
    python benchmarks/synth_sae_bench.py --quick --json FILE  a few minutes: one seed, one learning rate
    python benchmarks/synth_sae_bench.py --full               the published model, 200 M samples: a GPU

The baselines are SAELens's ``standard``, ``batchtopk`` (with its auxiliary loss; ``batchtopk-annealed`` with a k
that falls from twice the L0, too) and ``jumprelu`` (the settings its authors publish for this benchmark), trained
by ``SAEModule``, which takes SAELens's own steps; every learning rate of a grid is tried on the first seed and the
best by explained variance is kept, for each variant and L0 on its own. What is measured is the dictionary
exported and loaded by plain SAELens. Explained variance grows
with L0, so thresholds of exported JumpReLU dictionaries (all but those with an L1 term to the end) are scaled
by one factor until L0 is the target on other samples; ``exported_l0`` is the L0 before that.
``--full`` builds the published model from its published config. Finished runs are kept in ``--out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from annealing import AnnealK
from calibration import calibrate
from sae_lens import SAE
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.util import temporary_seed
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aen_lightning.callbacks import HardFinish, InitializeFromData, TargetL0
from aen_lightning.files import write_json
from aen_lightning.presets import preset, with_preset
from aen_lightning.training.module import SAEModule

RESULTS_FILE = "results.json"
EVAL_SEED = 2**31 - 1
METRICS = ("l0", "ev", "mcc", "f1", "uniqueness", "dead_pct")
PUBLISHED = {
    "jumprelu": {"ev": 0.7951, "f1": 0.7317, "mcc": 0.7527},
    "batchtopk": {"ev": 0.7923, "f1": 0.7316, "mcc": 0.7574},
    "l1": {"ev": 0.7654, "f1": 0.5562, "mcc": 0.6039},
}
"""At full size and L0 25 (SAELens's documentation, docs/synth_sae_bench.md)."""


@dataclass(frozen=True)
class Size:
    """How large the benchmark is.

    Args:
        n_features: True features.
        d_in: Width of the activations.
        d_sae: Features of the SAE; a quarter of the true ones, as published.
        n_roots: Root nodes of the hierarchy.
        min_prob: Firing probability of the rarest feature.
        n_orthogonalization_steps: Steps that spread the true directions.
        steps: Training steps.
        batch_size: Samples a step.
        n_eval_samples: Fresh samples to measure on.
        l0: Target: about what the true features that an SAE of this width can hold have.
        lrs: Learning rates to try on the first seed.
        jumprelu_lrs: The same for JumpReLU, whose thresholds must travel far in a short run.
        seeds: Of the training samples and the start.
    """

    n_features: int
    d_in: int
    d_sae: int
    n_roots: int
    min_prob: float
    n_orthogonalization_steps: int
    steps: int
    batch_size: int
    n_eval_samples: int
    l0: float
    lrs: tuple[float, ...]
    jumprelu_lrs: tuple[float, ...]
    seeds: tuple[int, ...]


SIZES = {
    "quick": Size(1024, 64, 256, 8, 4e-3, 20, 600, 256, 16_384, 6, (1e-2,), (6e-3,), (0,)),
    "small": Size(
        2048, 96, 512, 16, 2e-3, 50, 2000, 512, 50_000, 8, (3e-3, 6e-3, 1e-2), (3e-3, 6e-3, 1e-2), (0, 1, 2)
    ),
    "full": Size(16_384, 768, 4096, 128, 5e-4, 100, 195_312, 1024, 500_000, 25, (3e-4,), (3e-4,), (0, 1, 2)),
}


# --- data --------------------------------------------------------------------------------------------------
def synthetic_model(size: Size, device: str = "cpu") -> SyntheticModel:
    """SynthSAEBench's model at this size."""
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=size.n_features,
            hidden_dim=size.d_in,
            firing_probability=ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=0.4, min_prob=size.min_prob
            ),
            hierarchy=HierarchyConfig(
                total_root_nodes=size.n_roots,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                mutually_exclusive_min_depth=0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            orthogonalization=OrthogonalizationConfig(num_steps=size.n_orthogonalization_steps, lr=3e-4),
            correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            bias=0.5,
            seed=42,
        ),
        device=device,
    )


class Samples(IterableDataset[Tensor]):
    """Endless training batches; batch i is a function of (seed, i), so every variant sees the same.

    Args:
        model: Where they are from.
        batch_size: Samples a batch.
        seed: Of all of them.
        keep: Keep what was made for the next variant (memory: steps * batch_size * d_in * 4 bytes).
    """

    def __init__(self, model: SyntheticModel, *, batch_size: int, seed: int, keep: bool) -> None:
        self.model, self.batch_size, self.seed, self.keep = model, batch_size, seed, keep
        self._made: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        index = 0
        while True:
            if index < len(self._made):
                yield self._made[index]
            else:
                with torch.no_grad(), temporary_seed(self.seed * 1_000_000 + index):
                    batch = self.model.sample(self.batch_size)
                if self.keep:
                    self._made.append(batch)
                yield batch
            index += 1


# --- variants ----------------------------------------------------------------------------------------------
class SteerJumpReLU(pl.Callback):
    """Multiplies a JumpReLU SAE's L0 coefficient until L0 is the target, which ``TargetL0`` does not.

    After the autotuner of SynthSAEBench's experiments, at the speed that a short run needs.

    Args:
        l0: The target.
        gain: Largest change of the multiplier's logarithm per step.
        start: Multiplier of the first step.
    """

    def __init__(self, l0: float, gain: float, start: float = 0.1) -> None:
        self.l0, self.gain = l0, gain
        self._log = math.log(start)
        self._average: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set the multiplier of this step."""
        pl_module.sparsity_multipliers[""].fill_(math.exp(self._log))  # type: ignore[operator,index]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Move it by how far L0 is off."""
        l0 = float(outputs["n_firings"][""].sum()) / outputs["n_tokens"]
        self._average = l0 if self._average is None else 0.95 * self._average + 0.05 * l0
        self._log += self.gain * math.tanh(3 * math.log(max(self._average, 0.1) / self.l0))
        self._log = min(math.log(100), max(math.log(1e-3), self._log))


VARIANTS: dict[str, dict[str, Any]] = {
    "l1": {"architecture": "standard", "l1_coefficient": 0.2, "decoder_init_norm": 1.0},
    "batchtopk": {"architecture": "batchtopk", "decoder_init_norm": 1.0},
    "batchtopk-annealed": {"architecture": "batchtopk", "decoder_init_norm": 1.0},
    "jumprelu": {
        "architecture": "jumprelu",
        "jumprelu_sparsity_loss_mode": "step",
        "jumprelu_bandwidth": 1.0,
        "jumprelu_init_threshold": 1.0,
        "l0_coefficient": 1.0,
        "pre_act_loss_coefficient": None,
        "decoder_init_norm": 0.5,
    },
    "recommended": {"architecture": "aen"},
    "aen": {"architecture": "aen"},
    "aen-mcp": {"architecture": "aen", "penalty": "mcp"},
}
"""SAE fields by variant, those of AEN-SAEs besides the preset ``recommended``, of which ``aen`` and ``aen-mcp``
leave out the hard finish: they are differentiable throughout."""


def make_run(variant: str, size: Size, *, lr: float, seed: int) -> tuple[SAEModule, list[pl.Callback]]:
    """The module and the callbacks of a variant."""
    fields = {**VARIANTS[variant], "d_in": size.d_in, "d_sae": size.d_sae}
    callbacks: list[pl.Callback] = [InitializeFromData(active_share=0.05)]
    if variant == "l1":
        callbacks.append(TargetL0(size.l0))
    elif variant.startswith("batchtopk"):
        fields["k"] = size.l0
        if variant == "batchtopk-annealed":
            callbacks.append(AnnealK(2 * size.l0, size.l0, int(0.4 * size.steps)))
    elif variant == "jumprelu":  # its threshold is part of its start
        callbacks = [
            InitializeFromData(active_share=None),
            SteerJumpReLU(size.l0, gain=max(3e-4, 35 / size.steps)),
        ]
    else:
        chosen = preset("recommended", l0=size.l0)
        fields = with_preset(fields, chosen.sae)
        arguments = dict(chosen.callbacks)
        if variant != "recommended":
            del arguments[HardFinish]
            arguments[TargetL0] = {**arguments[TargetL0], "headroom": 1.0}
        callbacks = [make(**given) for make, given in arguments.items()]
    module = SAEModule(
        fields,
        seed=seed,
        lr=lr,
        lr_decay_steps=0.2,
        dead_feature_window=max(20, min(1000, size.steps // 20)),
    )
    return module, callbacks


def run(
    variant: str, size: Size, model: SyntheticModel, samples: Samples, *, lr: float, seed: int
) -> dict[str, Any]:
    """Train one SAE, export it, load it with SAELens, measure it with SAELens."""
    started = time.process_time()
    module, callbacks = make_run(variant, size, lr=lr, seed=seed)
    trainer = pl.Trainer(
        accelerator="cpu" if str(model.device) == "cpu" else "auto",
        devices=1,
        max_steps=size.steps,
        log_every_n_steps=1000,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    trainer.fit(module, train_dataloaders=DataLoader(samples, batch_size=None))
    with tempfile.TemporaryDirectory() as folder:
        sae = SAE.load_from_disk(module.export(Path(folder) / "sae"), device=model.device)
    with torch.no_grad(), temporary_seed(EVAL_SEED - 1):
        x = model.sample(8192)
        exported_l0 = float((sae.encode(x) > 0).sum(dim=-1).float().mean())
    if sae.cfg.architecture() == "jumprelu":
        calibrate(sae, x, size.l0)
    with temporary_seed(EVAL_SEED):
        found = eval_sae_on_synthetic_data(
            sae,
            model.feature_dict,
            model.activation_generator,
            num_samples=size.n_eval_samples,
            batch_size=size.batch_size,
        )
    return {
        "variant": variant,
        "d_sae": size.d_sae,
        "target_l0": size.l0,
        "lr": lr,
        "seed": seed,
        "steps": size.steps,
        "batch_size": size.batch_size,
        "l0": found.sae_l0,
        "exported_l0": exported_l0,
        "true_l0": found.true_l0,
        "ev": found.explained_variance,
        "mcc": found.mcc,
        "f1": found.classification.f1_score,
        "precision": found.classification.precision,
        "recall": found.classification.recall,
        "uniqueness": found.uniqueness,
        "dead_pct": 100 * found.dead_latents / size.d_sae,
        "shrinkage": found.shrinkage,
        "cpu_s": round(time.process_time() - started, 1),
    }


# --- what it says ------------------------------------------------------------------------------------------
def best_lrs(rows: Sequence[dict[str, Any]], first_seed: int) -> dict[str, float]:
    """By variant, the learning rate with the best explained variance on the first seed."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["seed"] == first_seed and row["ev"] > best.get(row["variant"], {"ev": -math.inf})["ev"]:
            best[row["variant"]] = row
    return {variant: row["lr"] for variant, row in best.items()}


def published_order(means: dict[str, dict[str, float]]) -> dict[str, bool]:
    """By metric (``ev``, ``f1``, ``mcc``), whether BatchTopK and JumpReLU are above L1, as published.

    BatchTopK and JumpReLU themselves are within .005 of each other there, and their order is not judged.
    """
    return {
        metric: min(means["batchtopk"][metric], means["jumprelu"][metric]) > means["l1"][metric]
        for metric in ("ev", "f1", "mcc")
    }


def summarise(rows: Sequence[dict[str, Any]], lrs: dict[str, float]) -> dict[str, dict[str, float]]:
    """By variant, the mean of every metric over the seeds at its best learning rate, and ``METRIC_std``."""
    out: dict[str, dict[str, float]] = {}
    for variant, lr in lrs.items():
        mine = [row for row in rows if row["variant"] == variant and row["lr"] == lr]
        out[variant] = {"lr": lr, "seeds": len(mine)}
        for metric in METRICS:
            values = [row[metric] for row in mine]
            out[variant][metric] = statistics.fmean(values)
            if len(values) > 1:
                out[variant][f"{metric}_std"] = statistics.stdev(values)
    return out


def table(means: dict[str, dict[str, float]]) -> str:
    """A Markdown table."""
    digits = {"l0": 1, "dead_pct": 2, "ev": 4}
    lines = ["| variant | lr | seeds | " + " | ".join(METRICS) + " |", "|--" * (3 + len(METRICS)) + "|"]
    for variant, mean in means.items():
        cells = []
        for metric in METRICS:
            spread = mean.get(f"{metric}_std")
            n = digits.get(metric, 3)
            cells.append(f"{mean[metric]:.{n}f}" + ("" if spread is None else f" ± {spread:.{n}f}"))
        lines.append(f"| {variant} | {mean['lr']:g} | {mean['seeds']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes: whether it runs")
    parser.add_argument("--full", action="store_true", help="the published size; needs a GPU")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the size")
    parser.add_argument("--l0", type=float, nargs="+", help="targets; default: that of the size")
    parser.add_argument("--lrs", type=float, nargs="+", help="for all variants; default: those of the size")
    parser.add_argument("--steps", type=int, help="default: that of the size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/synth-sae-bench"), help="finished runs")
    parser.add_argument("--json", type=Path, help="write runs and means to this file")
    options = parser.parse_args(arguments)
    if options.quick and options.full:
        parser.error("--quick and --full exclude each other")
    name = "quick" if options.quick else "full" if options.full else "small"
    size = SIZES[name]
    chosen = {
        "seeds": options.seeds,
        "lrs": options.lrs,
        "jumprelu_lrs": options.lrs,
        "steps": options.steps,
    }
    size = Size(**{**vars(size), **{key: value for key, value in chosen.items() if value is not None}})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    store = options.out / f"{name}-{RESULTS_FILE}"
    rows: list[dict[str, Any]] = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else []
    sizes = [replace(size, l0=l0) for l0 in options.l0 or [size.l0]]
    model = synthetic_model(size, options.device)
    for seed in size.seeds:
        samples = Samples(model, batch_size=size.batch_size, seed=seed, keep=not options.full)
        for at, variant in itertools.product(sizes, options.variants):
            same = [row for row in rows if _belongs(row, at) and row["variant"] == variant]
            best = best_lrs(same, size.seeds[0])
            for lr in _lrs(at, variant) if seed == size.seeds[0] else [best[variant]]:
                if any(row["seed"] == seed and row["lr"] == lr for row in same):
                    continue
                rows.append(run(variant, at, model, samples, lr=lr, seed=seed))
                print(rows[-1], flush=True)
                write_json(store, rows)
    found: dict[str, Any] = {"size": name, "runs": [], "means": {}, "published_order": {}}
    for at in sizes:
        wanted = [
            row
            for row in rows
            if _belongs(row, at) and row["variant"] in options.variants and row["seed"] in size.seeds
        ]
        means = summarise(wanted, best_lrs(wanted, size.seeds[0]))
        print(f"L0 {at.l0:g}\n{table(means)}")
        found["runs"] += wanted
        found["means"][f"{at.l0:g}"] = means
        if set(PUBLISHED) <= set(means):
            found["published_order"][f"{at.l0:g}"] = order = published_order(means)
            print("BatchTopK and JumpReLU above L1, as published:", order)
    if options.json:
        write_json(options.json, found)


def _lrs(size: Size, variant: str) -> tuple[float, ...]:
    return size.jumprelu_lrs if variant == "jumprelu" else size.lrs


def _belongs(row: dict[str, Any], size: Size) -> bool:
    """Whether a run has this L0 and length, and one of the learning rates."""
    return (
        row["target_l0"] == size.l0 and row["steps"] == size.steps and row["lr"] in _lrs(size, row["variant"])
    )


if __name__ == "__main__":
    main()
