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
import gc
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TRITON = importlib.util.find_spec("triton") is not None
if TRITON and "--dry-run" in os.sys.argv:  # type: ignore[attr-defined]
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig  # noqa: E402
from sae_lens.config import SAETrainerConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

from aen_lightning import AENTrainingSAEConfig, sparse  # noqa: E402
from aen_lightning.saes import penalty  # noqa: E402
from aen_lightning.sparse import backend, cost  # noqa: E402
from aen_lightning.training.module import SAEModule  # noqa: E402

L1, L2, CLIP = 0.5, 0.05, 1.0
SILENT = 0.45
N_BATCHES = 4
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class Problem:
    """Weights and batches with a given mean L0. ``heavy``: 45 % of the features silent, the others' rates as 1/rank^0.8."""

    def __init__(
        self, batch: int, d_in: int, d_sae: int, l0: float, device: str, *, heavy: bool = False
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def rows(n: int) -> Tensor:
            x = normal(n, d_in)
            return x.div_(x.norm(dim=1, keepdim=True))

        self.batches = [rows(batch).mul_(d_in**0.5) for _ in range(N_BATCHES)]
        self.W_dec = rows(d_sae)
        rates = torch.full((d_sae,), l0 / d_sae, dtype=torch.float64)
        if heavy:
            rates = torch.arange(1, d_sae + 1, dtype=torch.float64).pow(-0.8)
            rates[int((1 - SILENT) * d_sae) :] = 0
            for _ in range(20):  # no feature fires more than on half the tokens
                rates = (rates * (l0 / rates.sum())).clamp_max(0.5)
            rates = rates[torch.randperm(d_sae, generator=torch.Generator().manual_seed(1))]
        # a pre-activation of these tokens has a standard normal distribution
        self.b_enc = torch.special.ndtri(rates).clamp_min(-1e3).float().to(device)
        self.b_dec = torch.zeros(d_in, device=device)
        self.shape, self.l0, self.heavy, self.device = (batch, d_in, d_sae), l0, heavy, device
        self.turn = 0

    def next_batch(self) -> Tensor:
        """The batches in turn."""
        self.turn += 1
        return self.batches[self.turn % N_BATCHES]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Fresh copies of the weights."""
        tensors = {"W_enc": self.W_dec.t(), "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return {
            name: nn.Parameter(value.clone(memory_format=torch.contiguous_format))
            for name, value in tensors.items()
        }


# --- contestants ---------------------------------------------------------------------------------------------


class SAELensStep:
    """``SAETrainer.step`` on SAELens's own standard SAE, in bf16."""

    path: cost.Path = "autograd"

    def __init__(self, problem: Problem) -> None:
        batch, d_in, d_sae = problem.shape
        cfg = StandardTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, l1_coefficient=L1, apply_b_dec_to_input=True, device=problem.device
        )
        sae = StandardTrainingSAE(cfg)
        sae.load_state_dict({name: value.detach() for name, value in problem.parameters().items()})
        trainer_cfg = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=batch, lr=0.0, lr_end=0.0, autocast=True,
            device=problem.device,
        )  # fmt: skip
        self.trainer = SAETrainer(trainer_cfg, sae, data_provider=iter(()))
        self.problem = problem

    def step(self) -> None:
        """One training step."""
        self.trainer.step(self.problem.next_batch())


class CompiledStep:
    """The dense formula under autocast, compiled, with fused Adam: what plain PyTorch can do."""

    path: cost.Path = "dense"

    def __init__(self, problem: Problem) -> None:
        self.problem, self.p = problem, problem.parameters()
        self.optimizer = torch.optim.Adam(self.p.values(), lr=0.0, fused=True)
        self.ema = torch.ones(problem.shape[2], device=problem.device)
        # on a CPU it would need a compiler
        self.loss = torch.compile(self._loss) if problem.device == "cuda" else self._loss

    def _loss(self, x: Tensor) -> Tensor:
        p = self.p
        h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        self.ema.lerp_(h.detach().float().mean(dim=0), 1e-3)
        mse = (h @ p["W_dec"] + p["b_dec"] - x).square().sum(dim=-1).mean()
        return mse + L1 * h.sum(dim=-1).mean() + L2 * h.square().sum(dim=-1).mean()

    def step(self) -> None:
        """One training step."""
        p = self.p
        with torch.autocast(self.problem.device, dtype=torch.bfloat16):
            loss = self.loss(self.problem.next_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(list(p.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            p["W_dec"].div_(torch.linalg.vector_norm(p["W_dec"], dim=1, keepdim=True))


class OurStep:
    """The AEN step of the functions of ``aen_lightning.sparse``, with torch's fused Adam."""

    def __init__(self, problem: Problem, path: cost.Path) -> None:
        self.problem, self.path = problem, path
        self.p = problem.parameters()
        sparse.feature_major_(self.p["W_enc"])
        self.ema = torch.ones(problem.shape[2], device=problem.device)
        self.optimizer: Any = sparse.FusedAdam(self.p.values(), lr=0.0)
        if path == "sparse, rows":
            norms = torch.ones(problem.shape[2], device=problem.device)
            self.optimizer = sparse.RowAdam(self.p.values(), lr=0.0, low_dtype=torch.bfloat16)
            self.optimizer.hold_rows(self.p["W_dec"], lambda: norms)
            self.optimizer.param_groups[0]["max_norm"] = CLIP
        self.capacity = int(2 * problem.shape[0] * problem.l0) + 2**12

    def rest(self) -> None:
        """As though the silent features had been silent for long."""
        if isinstance(self.optimizer, sparse.RowAdam):
            for state in self.optimizer.state.values():
                state["silent_steps"].mul_(1000)

    def step(self) -> None:
        """One training step."""
        p, x = self.p, self.problem.next_batch()
        with torch.autocast(self.problem.device, dtype=torch.bfloat16):
            code: Any
            if self.path == "dense":
                code = sparse.encode_dense(x, p["W_enc"], p["b_enc"], p["b_dec"])
            else:
                code = sparse.encode(x, p["W_enc"], p["b_enc"], p["b_dec"], capacity=self.capacity)
            self.ema.lerp_(code.feature_sums / x.shape[0], 1e-3)
            weights = penalty.adaptive_weights(
                self.ema, gamma=0.5, reference_fraction=0.05, weight_min=0.01, weight_max=10.0
            )
            loss = sparse.loss(x, code, l1_weights=L1 * weights, l2_coefficient=L2, **p).loss
        if isinstance(code, sparse.PaddedCode) and code.overflowed:
            raise RuntimeError("the code overflowed: this benchmark is about the sparse step")
        loss.backward()
        self.update()

    def update(self) -> None:
        """Clip, Adam, projection."""
        p = self.p
        if self.path == "sparse, rows":
            self.optimizer.step()
            self.optimizer.zero_grad()
            return
        nn.utils.clip_grad_norm_(list(p.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            p["W_dec"].div_(torch.linalg.vector_norm(p["W_dec"], dim=1, keepdim=True))


def contestants(problem: Problem) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and constructors; one at a time fits the card."""
    yield "SAELens's trainer, bf16", lambda: SAELensStep(problem)
    yield "compiled dense, fused Adam", lambda: CompiledStep(problem)
    yield "ours, dense", lambda: OurStep(problem, "dense")
    if problem.l0 / problem.shape[2] < 0.02 or problem.device == "cpu":
        yield "ours, sparse kernels, fused Adam", lambda: OurStep(problem, "sparse")
        yield "ours, sparse kernels, RowAdam", lambda: OurStep(problem, "sparse, rows")


# --- measuring -----------------------------------------------------------------------------------------------


def timed(step: Callable[[], Any], device: str, *, warmup: int, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` steps, by events of the device."""
    for _ in range(warmup):
        step()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a device, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.n_waits = self.n_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_operations += 1
        self.n_waits += func.overloadpacket.__name__ in WAITS
        return func(*args, **(kwargs or {}))


def waits_of(step: Callable[[], Any], device: str) -> tuple[int, int]:
    """How often a step makes the host wait for the device, and of how many operations it consists."""
    with Waits() as counted:
        step()
    if device == "cpu":
        return counted.n_waits, counted.n_operations
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught), counted.n_operations


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_step(
    name: str, problem: Problem, make: Callable[[], Any], repeats: int, card: cost.Card | None
) -> dict[str, Any]:
    free(problem.device)
    contestant = make()
    if isinstance(contestant, OurStep):
        timed(contestant.step, problem.device, warmup=2, repeats=1)
        contestant.rest()
    times = timed(contestant.step, problem.device, warmup=3, repeats=repeats)
    waits, operations = waits_of(contestant.step, problem.device)
    batch, d_in, d_sae = problem.shape
    model = cost.Step(batch, d_in, d_sae, problem.l0, silent=SILENT if problem.heavy else 0.0)
    median = statistics.median(times)
    return {
        "name": name, "shape": problem.shape, "l0": problem.l0, "firing": "heavy" if problem.heavy else "uniform",
        "ms": median, "steps_per_s": 1e3 / median, "operations": operations, "syncs": waits,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if problem.device == "cuda" else None,
        "predicted_ms": sum(model.milliseconds(card, contestant.path).values()) if card else None,
        "predicted_gib": sum(model.gibibytes(contestant.path).values()),
    }  # fmt: skip


# --- sections ------------------------------------------------------------------------------------------------


def ceilings(device: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """TB/s of a copy, and TFLOP/s of the encoder's product in bf16, TF32 and float32."""
    batch, d_in, d_sae = shape
    x, w = torch.randn(batch, d_in, device=device), torch.randn(d_sae, d_in, device=device)
    found, to = {}, torch.empty_like(w)
    ms = statistics.median(timed(lambda: to.copy_(w), device, warmup=2, repeats=5))
    found["copy_tb_per_s"] = 2 * w.nbytes / ms / 1e9
    flops = 2 * batch * d_in * d_sae
    low_x, low_w = x.bfloat16(), w.bfloat16()
    ms = statistics.median(timed(lambda: low_w @ low_x.t(), device, warmup=2, repeats=5))
    found["bf16_tflops"] = flops / ms / 1e9
    before = torch.get_float32_matmul_precision()
    for name, precision in (("tf32_tflops", "high"), ("fp32_tflops", "highest")):
        torch.set_float32_matmul_precision(precision)
        ms = statistics.median(timed(lambda: w @ x.t(), device, warmup=1, repeats=3))
        found[name] = flops / ms / 1e9
    torch.set_float32_matmul_precision(before)
    return found


def kernel_errors(device: str) -> list[dict[str, Any]]:
    """Each kernel against dense float64 on a small problem with empty features and one that fires on every token.

    Outputs are poisoned with NaN. Errors are relative to the largest entry of the exact result.
    """
    kind = "triton" if TRITON and (device == "cuda" or os.environ.get("TRITON_INTERPRET")) else "torch"
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN
    try:
        return [
            {"name": name, "max_error": error, "backend": kind}
            for name, error in sorted(_kernel_errors(device, kind).items())
        ]
    finally:
        torch.use_deterministic_algorithms(False)


def _relative(actual: Tensor, exact: Tensor) -> float:
    error = (actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")


def _kernel_errors(device: str, kind: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch, d_in, d_sae = (24, 37, 48) if device == "cpu" else (300, 1000, 2000)
    x, W_enc, W_dec, b_enc = normal(batch, d_in), normal(d_in, d_sae), normal(d_sae, d_in), normal(d_sae) - 3
    b_enc[::5], b_enc[1] = -1e3, 1e3
    b_dec = normal(d_in)
    pre = (x.double() - b_dec.double()) @ W_enc.double() + b_enc.double()
    h = pre.relu()
    errors = {}
    moved = nn.Parameter(W_dec.clone())
    moved.grad = normal(d_sae, d_in)
    moved.grad[::3] = 0
    exact_row = moved.detach().double() - 1e-2 * moved.grad.double().sign()  # Adam's first step, eps aside
    exact_row = torch.where(moved.grad == 0, moved.detach().double(), exact_row)
    exact_row = exact_row / exact_row.norm(dim=1, keepdim=True)
    with _kernels(kind):
        optimizer = sparse.RowAdam([moved], lr=1e-2, eps=1e-30)
        optimizer.hold_rows(moved, lambda: torch.ones(d_sae, device=device))
        optimizer.step()
        errors["Adam, clip, projection"] = _relative(moved.detach(), exact_row)
        padded = sparse.encode(x, W_enc, b_enc, b_dec, capacity=batch * d_sae, screen=False)
        errors["compaction, padded"] = _relative(padded.to_dense(), h)
        for name, make, keep in (
            ("TopK", lambda: sparse.encode_topk(x, W_enc, b_enc, b_dec, k=4), 4),
            ("BatchTopK", lambda: sparse.encode_batch_topk(x, W_enc, b_enc, b_dec, k=4), 4 * batch),
        ):
            flat = h if name == "TopK" else h.view(1, -1)
            top = torch.zeros_like(flat).scatter(1, flat.topk(keep, dim=1).indices, 1.0) * flat
            errors[name] = _relative(make().to_dense(), top.view_as(h))
        threshold = torch.full_like(b_enc, 0.5)
        jump = sparse.encode(
            x, W_enc, b_enc, b_dec, threshold=threshold, capacity=batch * d_sae, screen=False
        )
        errors["JumpReLU"] = _relative(jump.to_dense(), h * (h > 0.5))
        ones = torch.full_like(b_enc, 0.1)
        gated = sparse.gated_loss(x, padded, W_enc, b_enc, ones, b_enc + 0.3, W_dec, b_dec)
        magnitude = (ones.double().exp() * (pre - b_enc.double()) + b_enc.double() + 0.3).relu() * (pre > 0)
        errors["gated"] = _relative(gated.code.to_dense(), magnitude)
        code = sparse.encode(x, W_enc, b_enc, b_dec, screen=False)
        errors["compaction"] = _relative(code.to_dense(), h)
        errors["statistics"] = _relative(code.feature_sums, h.sum(dim=0))
        at = torch.zeros_like(h)
        at[code.tokens, code.features] = sparse.per_entry(b_enc, code).double()
        errors["per entry"] = _relative(at, b_enc.double() * (h > 0))
        p = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        p = {name: nn.Parameter(value.clone()) for name, value in p.items()}
        out = sparse.loss(x, code, **p, l1_weights=torch.full_like(b_enc, L1), l2_coefficient=L2)
        grads = torch.autograd.grad(out.loss, list(p.values()))
    exact = {name: value.detach().double().requires_grad_() for name, value in p.items()}
    h = ((x.double() - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"]).relu()
    sae_out = h @ exact["W_dec"] + exact["b_dec"]
    loss = (sae_out - x).square().sum(dim=1).mean() + L1 * h.sum(1).mean() + L2 * h.square().sum(1).mean()
    errors["decode"] = _relative(out.sae_out.detach(), sae_out.detach())
    errors["loss"] = _relative(out.loss.detach(), loss.detach())
    for name, actual, wanted in zip(p, grads, torch.autograd.grad(loss, list(exact.values())), strict=True):
        errors[f"gradient of {name}"] = _relative(actual, wanted)
    return errors


class _kernels:  # a context manager
    """Triton's kernels on a CPU as well, which the interpreter can do."""

    def __init__(self, kind: str) -> None:
        self.on_cpu = kind == "triton" and not torch.cuda.is_available()

    def __enter__(self) -> None:
        if self.on_cpu:
            self.before = backend.triton_serves
            backend.triton_serves = lambda device: True

    def __exit__(self, *exc: Any) -> None:
        if self.on_cpu:
            backend.triton_serves = self.before


class _Stream(IterableDataset[Tensor]):
    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.problem.next_batch()


class _Clock(pl.Callback):
    """Times steps 10 on, by events; logging steps are among them, as in a run."""

    def __init__(self, device: str) -> None:
        self.device, self.marks = device, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def ms(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return float(self.marks[3].elapsed_time(self.marks[-1])) / (len(self.marks) - 4)
        return 1e3 * (self.marks[-1] - self.marks[3]) / (len(self.marks) - 4)


class _SyncedSteps(pl.Callback):
    """What waits for the device between two logging steps of a fit."""

    def __init__(self, device: str, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.n_syncs = 0
        self._waits: Any = None

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.first:
            if self.device == "cuda":
                self._waits = warnings.catch_warnings(record=True)
                self.caught = self._waits.__enter__()
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            else:
                self._waits = Waits()
                self._waits.__enter__()
        elif trainer.global_step == self.last and self._waits is not None:
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                self.n_syncs = sum("synchroniz" in str(w.message) for w in self.caught)
            else:
                self.n_syncs = self._waits.n_waits
            self._waits.__exit__(None, None, None)
            self._waits = None


def trainer_steps(problem: Problem, n_steps: int, card: cost.Card | None) -> list[dict[str, Any]]:
    """``SAEModule`` under Lightning's Trainer: float32, bf16, with and without its progress bar."""
    batch, d_in, d_sae = problem.shape
    rows = []
    for precision, bar in (("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True)):
        free(problem.device)
        cfg = AENTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1, l2_coefficient=L2)
        module = SAEModule.from_config(cfg, lr=1e-12)
        with torch.no_grad():
            for name, value in problem.parameters().items():
                getattr(module.sae, name).copy_(value)
        if problem.device == "cpu":  # a CPU's sparse step looks for non-zeros, a GPU's never does
            module.sae.density_switch = sparse.DensitySwitch(threshold=1e-9)
        # logging at steps 1 and n: the steps between are a run's ordinary ones
        clock, synced = _Clock(problem.device), _SyncedSteps(problem.device, 5, n_steps - 2)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                accelerator="gpu" if problem.device == "cuda" else "cpu", devices=1, precision=precision,
                max_steps=n_steps, log_every_n_steps=n_steps, gradient_clip_val=CLIP, logger=False,
                enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=bar,
                default_root_dir=folder, callbacks=[clock, synced],
            )  # fmt: skip
            trainer.fit(module, DataLoader(_Stream(problem), batch_size=None))
        dense = not module.sae.density_switch.sparse
        path: cost.Path = "dense" if dense else "sparse, rows" if problem.device == "cuda" else "sparse"
        model = cost.Step(batch, d_in, d_sae, problem.l0, low=precision == "bf16-mixed", tf32=True)
        ms = clock.ms()
        rows.append(
            {
                "name": f"SAEModule, {precision}, bar {'on' if bar else 'off'} ({path})",
                "shape": problem.shape,
                "l0": problem.l0,
                "firing": "heavy" if problem.heavy else "uniform",
                "ms": ms,
                "steps_per_s": 1e3 / ms,
                "operations": None,
                "syncs": synced.n_syncs / max(1, synced.last - synced.first),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if problem.device == "cuda" else None,
                "predicted_ms": sum(model.milliseconds(card, path).values()) if card else None,
                "predicted_gib": sum(model.gibibytes(path).values()),
            }
        )
    return rows


def crossover(device: str, shape: tuple[int, int, int], repeats: int) -> list[dict[str, Any]]:
    """Dense and sparse step over the density, in bf16."""
    batch, d_in, d_sae = shape
    rows = []
    for density in (0.001, 0.002, 0.004, 0.008, 0.016):
        problem = Problem(batch, d_in, d_sae, max(1.0, density * d_sae), device)
        row: dict[str, Any] = {"density": density}
        for path in ("dense", "sparse, rows"):
            free(device)
            step = OurStep(problem, path)  # type: ignore[arg-type]
            row[path] = statistics.median(timed(step.step, device, warmup=2, repeats=repeats))
            del step
        rows.append(row)
    return rows


def harvest_copies(device: str, tiny: bool) -> dict[str, float]:
    """Tokens per second of a random Llama of 17 layers, its activations copied to pageable and to pinned memory."""
    from transformers import LlamaConfig, LlamaModel

    sizes = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        if tiny
        else {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 17,
            "num_attention_heads": 32,
        }
    )
    config = LlamaConfig(**sizes, num_key_value_heads=4 if tiny else 8, vocab_size=1000)
    with torch.device(device):
        model = LlamaModel(config).bfloat16().eval()
    batch, context = (2, 16) if tiny else (128, 128)
    ids = torch.randint(0, 1000, (batch, context), device=device)
    found = {}
    from aen_lightning.device_copies import HostCopy, side_stream

    for name, pinned in (("pageable", False), ("pinned", True)):
        stream = side_stream(torch.device(device)) if pinned else None

        @torch.inference_mode()
        def call(pinned: bool = pinned, stream: Any = stream) -> None:
            x = model(input_ids=ids, use_cache=False).last_hidden_state
            if not pinned:
                x.to("cpu")
            else:
                HostCopy(x, stream)

        ms = statistics.median(timed(call, device, warmup=2, repeats=5))
        found[f"{name}_tokens_per_s"] = batch * context / ms * 1e3
    return found


# --- the whole -----------------------------------------------------------------------------------------------


def card_here(device: str) -> tuple[str, cost.Card | None]:
    """The name of the card, and what the model of cost assumes of it."""
    if device == "cpu":
        return "no GPU: predictions are an H100's", cost.CARDS["h100"]
    name = torch.cuda.get_device_name()
    return name, next((card for key, card in cost.CARDS.items() if key.upper() in name.upper()), None)


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
