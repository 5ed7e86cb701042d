"""What an SAE's training step costs on a GPU: every kernel's error, every stage's time, beside what was predicted.

    python benchmarks/gpu_step.py --json gpu.json        at most 8 minutes
    python benchmarks/gpu_step.py --dry-run              on any machine, tiny shapes, to see that it runs to the end

It needs this package and what it needs, and on the machine itself no network. A bare machine takes the wheels of
``pip download aen-lightning triton`` for its Python along (torch for CUDA brings Triton with it), then
``pip install --no-index --find-links FOLDER aen-lightning``.

Sections: ceilings of the card (copies, products at the encoder's shape) · kernels against dense float64 · steps at the
shapes of Llama-3.1-8B (4096, 4096, 131072) and Pythia-70M (8192, 512, 4096) · the Trainer's own steps, progress bar on
and off, and what waits for the device in them · the density at which dense and sparse cost the same · a language
model's activations copied to pageable and to pinned memory. A section that fails is named in the table and in the
JSON (``errors``); the others run. Batches rotate; the learning rate is 0, so that weights and L0 stay put. ``uniform``:
all features fire alike; ``heavy``: rates fall as a power of the rank, and 45 % of the features are silent.
A dry run without a GPU times nothing: its numbers prove that it runs. It takes Triton's interpreter for the kernels;
without Triton it checks the operators of PyTorch that stand in for them, and says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts import TRITON  # isort: skip  # before torch

import torch
from gpu_parts.card import card_here, ceilings, crossover, harvest_copies
from gpu_parts.contestants import contestants
from gpu_parts.kernels import kernel_errors
from gpu_parts.problem import Problem
from gpu_parts.timing import free, measure_step
from gpu_parts.trainer import trainer_steps


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'step':52}{'L0':>5}{'firing':>9}{'ms':>9}{'predicted':>11}{'steps/s':>9}{'GiB':>7}{'ops':>6}{'syncs':>7}"
    lines, shape = [head], None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            lines.append(f"  (batch, d_in, d_sae) = {tuple(shape)}")

        def cell(value: Any, form: str, width: int) -> str:
            return f"{'-' if value is None else format(value, form):>{width}}"

        lines.append(
            f"{row['name']:52}{row['l0']:5.0f}{row['firing']:>9}{cell(row['ms'], '.2f', 9)}"
            f"{cell(row['predicted_ms'], '.2f', 11)}{cell(row['steps_per_s'], '.1f', 9)}"
            f"{cell(row['peak_gib'], '.1f', 7)}{cell(row['operations'], 'd', 6)}{cell(row['syncs'], '.2g', 7)}"
        )
    return "\n".join(lines)


class Run:
    """The sections in order, within the time there is; what one raises is kept and the next one runs."""

    def __init__(self, device: str, args: argparse.Namespace) -> None:
        self.args, self.device, self.start = args, device, time.monotonic()
        name, self.card = card_here(device)
        self.result: dict[str, Any] = {
            "device": name, "dry_run": args.dry_run, "torch": torch.__version__, "triton": TRITON,
            "kernels": [], "syncs_per_step": None, "steps": [], "errors": {}, "skipped": [],
        }  # fmt: skip

    def section(self, name: str, work: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        """Run one, unless time is up."""
        spent = time.monotonic() - self.start
        if spent > 60 * self.args.minutes:
            self.result["skipped"].append(f"{name}: no time left")
            return
        print(f"[{spent:5.0f} s] {name}", flush=True)
        try:
            keep(work())
        except Exception as error:  # noqa: BLE001  # one section must not take the others with it
            self.result["errors"][name] = f"{type(error).__name__}: {error}"
            print(f"  failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        free(self.device)
        self.save()

    def save(self) -> None:
        """Write what there is so far."""
        if self.args.json:
            self.args.json.write_text(json.dumps(self.result, indent=1) + "\n")

    def all(self) -> None:
        """All sections, then the table."""
        device, tiny, result = self.device, self.args.dry_run, self.result
        llama, pythia = ((16, 32, 256), (32, 16, 64)) if tiny else ((4096, 4096, 131072), (8192, 512, 4096))
        l0s, wide_l0 = ((2.0, 4.0), 4.0) if tiny else ((64.0, 128.0), 225.0)
        repeats = 2 if tiny else 20
        if not TRITON:
            result["skipped"].append("Triton is not installed: its kernels; PyTorch's operators were checked")
        if device == "cpu":
            result["skipped"].append(
                "no GPU: times, memory and launches say nothing; the run proves that it runs"
            )
        self.section("kernels", lambda: kernel_errors(device), lambda found: result.update(kernels=found))
        self.section("ceilings", lambda: ceilings(device, llama), lambda found: result.update(ceilings=found))
        cases = [(llama, l0, heavy) for l0 in l0s for heavy in (False, True)] + [(pythia, wide_l0, False)]
        for shape, l0, heavy in cases:
            problem = Problem(*shape, l0, device, heavy=heavy)
            for name, make in contestants(problem):
                self.section(
                    f"{name} at {shape}, L0 {l0:g}{', heavy' if heavy else ''}",
                    lambda n=name, p=problem, m=make: measure_step(n, p, m, repeats, self.card),
                    result["steps"].append,
                )
            if not heavy and l0 != l0s[1]:
                self.section(
                    f"SAEModule under the Trainer at {shape}",
                    lambda p=problem: trainer_steps(p, 24 if tiny else 60, self.card),
                    result["steps"].extend,
                )
            del problem
        self.section(
            "crossover",
            lambda: crossover(device, llama, repeats),
            lambda found: result.update(crossover=found),
        )
        self.section(
            "harvest", lambda: harvest_copies(device, tiny), lambda found: result.update(harvest=found)
        )
        syncs = [row["syncs"] for row in result["steps"] if row["name"].startswith("SAEModule")]
        result["syncs_per_step"] = max(syncs) if syncs else None
        self.save()
        self.show()

    def show(self) -> None:
        """Print what was found."""
        result = self.result
        print(f"\n{result['device']}, torch {result['torch']}\n")
        for kernel in result["kernels"]:
            print(f"  {kernel['name']:24} max error {kernel['max_error']:.1e} ({kernel['backend']})")
        for key in ("ceilings", "harvest"):
            for name, value in result.get(key, {}).items():
                print(f"  {name:24} {value:,.2f}")
        for row in result.get("crossover", []):
            print(
                f"  density {row['density']:.3f}: dense {row['dense']:.2f} ms, sparse {row['sparse, rows']:.2f} ms"
            )
        print("\n" + table(result["steps"]))
        print(f"\nsyncs a step outside logging steps, under the Trainer: {result['syncs_per_step']}")
        for text in result["skipped"]:
            print(f"skipped: {text}")
        for name, text in result["errors"].items():
            print(f"failed: {name}: {text[:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on any machine")
    parser.add_argument("--json", type=Path, help="write the results here, after each section")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no section after this time")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use: --dry-run shows that the script runs")
    Run("cpu" if args.dry_run else "cuda", args).all()


if __name__ == "__main__":
    main()
