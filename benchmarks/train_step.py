"""One training step of a ReLU SAE, side by side: ours on the non-zeros, ours dense, SAELens's, plain
autograd.

    python benchmarks/train_step.py                      all shapes and sparsities, with memory
    python benchmarks/train_step.py --quick --json out.json
    python benchmarks/train_step.py --autocast           every contestant under bfloat16 autocast
    python benchmarks/train_step.py --profile            where our step spends its time
    python benchmarks/train_step.py --crossover          the density at which dense and sparse cost the same
    python benchmarks/train_step.py --growth             cost against d_sae at fixed L0

A step is everything: forward, loss, backward, clipping to norm 1, Adam; for ours also the statistics, the
adaptive weights and the projection of the decoder rows. All contestants run in one process, turn by turn, and
medians are compared, so that a busy machine slows all alike. On a machine too busy for that, ``--cpu-time``
takes one thread and its CPU time, which leaves only the shared caches and memory to disturb. The learning
rate is 0: Adam does its full work, but the weights and with them L0 stay put. Tokens are Gaussian, scaled to
norm sqrt(d_in); the decoder is random with unit rows, the encoder its transpose, one bias sets the mean L0. A
Gaussian has more pre-activations just below zero than a trained SAE, which is the hard case for the screening
of the encoder product. Ours uses Adam with ``fused=True`` (SAELens's trainer does not); the "plain autograd"
row has it too, which isolates that effect.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig, sparse
from aen_lightning.saes import penalty
from aen_lightning.saes.step_schedule import StepSchedule

SHAPES = ((4096, 512, 4096), (2048, 576, 18432), (1024, 1024, 32768))
L0S = (16, 32, 64, 128)
L1, L2, CLIP = 0.5, 0.05, 1.0


class Problem:
    """Weights and a batch with a given mean L0; every contestant starts from copies of the same weights."""

    def __init__(self, batch: int, d_in: int, d_sae: int, l0: float, autocast: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, d_in, generator=generator)
        self.x = x * (d_in**0.5 / x.norm(dim=1, keepdim=True))
        W_dec = torch.randn(d_sae, d_in, generator=generator)
        self.W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        sample = (self.x[:256] @ self.W_dec.t()).flatten()
        rank = round(sample.numel() * (1 - l0 / d_sae))
        self.b_enc = torch.full((d_sae,), -float(sample.kthvalue(max(1, rank)).values))
        self.b_dec = torch.zeros(d_in)
        self.batch, self.d_in, self.d_sae, self.l0, self.autocast = batch, d_in, d_sae, l0, autocast

    def parameters(self) -> dict[str, nn.Parameter]:
        """Fresh contiguous copies of the weights."""
        tensors = {"W_enc": self.W_dec.t(), "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return {
            name: nn.Parameter(value.clone(memory_format=torch.contiguous_format))
            for name, value in tensors.items()
        }

    def precision(self) -> AbstractContextManager[Any]:
        """The context a forward pass runs in."""
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext()


class OurStep:
    """The AEN step built from the functions of ``aen_lightning.sparse`` and ``aen_lightning.saes.penalty``,
    without an SAE around them.

    ``mark`` is called after each phase, for ``--profile``.
    """

    def __init__(
        self, problem: Problem, *, dense: bool = False, feature_major: bool = True, screen: bool | None = None
    ) -> None:
        self.problem, self.dense, self.screen = problem, dense, screen
        self.p = problem.parameters()
        if feature_major and not dense:
            sparse.feature_major_(self.p["W_enc"])
        self.optimizer = sparse.FusedAdam(self.p.values(), lr=0.0)
        self.switch = sparse.DensitySwitch()
        self.ema = torch.ones(problem.d_sae)
        self.fired_ago = torch.zeros(problem.d_sae)
        self.mark: Callable[[str], None] = lambda _: None

    def step(self) -> Tensor:
        """One training step; returns its loss."""
        p, x = self.p, self.problem.x
        screen = self.switch.screen if self.screen is None else self.screen
        with self.problem.precision():
            if self.dense:
                code: sparse.SparseCode | sparse.DenseCode = sparse.encode_dense(
                    x, p["W_enc"], p["b_enc"], p["b_dec"]
                )
            else:
                code = sparse.encode(x, p["W_enc"], p["b_enc"], p["b_dec"], screen=screen)
            self.switch.observe(code)
            self.mark("encode")
            self.ema.lerp_(code.feature_sums / x.shape[0], 1e-3)
            self.fired_ago.add_(1).masked_fill_(code.feature_counts > 0, 0)
            weights = penalty.adaptive_weights(
                self.ema, gamma=0.5, reference_fraction=0.05, weight_min=0.01, weight_max=10.0
            )
            self.mark("statistics")
            out = sparse.loss(x, code, l1_weights=L1 * weights, l2_coefficient=L2, **p)
            loss = out.loss
            self.mark("decode and loss")
        loss.backward()
        self.mark("backward")
        nn.utils.clip_grad_norm_(list(p.values()), CLIP)
        self.mark("clip")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.mark("adam")
        with torch.no_grad():
            norm = torch.linalg.vector_norm(p["W_dec"], dim=1, keepdim=True)
            p["W_dec"].div_(norm)
        self.mark("projection")
        return loss.detach()


class ProductStep:
    """The step as ``SAEModule`` takes it.

    ``AENTrainingSAE.training_forward_pass``, backward, clip, Adam, projection.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sae = AENTrainingSAE(
            AENTrainingSAEConfig(
                d_in=problem.d_in, d_sae=problem.d_sae, warmup_delay_steps=0, sparse_step="on"
            )
        )
        with torch.no_grad():
            for name, value in problem.parameters().items():
                getattr(self.sae, name).copy_(value)
        sparse.feature_major_(self.sae.W_enc)
        self.sae.density_switch.sparse = True
        self.optimizer = sparse.FusedAdam(self.sae.parameters(), lr=0.0)

    def step(self) -> Tensor:
        """One training step; returns its loss."""
        with self.problem.precision():
            output = self.sae.scheduled_forward_pass(
                TrainStepInput(
                    sae_in=self.problem.x,
                    coefficients={"l1": L1, "l2": L2},
                    dead_neuron_mask=None,
                    n_training_steps=1,
                    is_logging_step=False,
                ),
                StepSchedule(),
            )
        if not output.feature_acts.is_sparse:
            raise RuntimeError("the step went dense: this benchmark is about the sparse one")
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.normalize_decoder()
        return output.loss.detach()


class SAELensStep:
    """``SAETrainer.step`` on SAELens's own standard SAE."""

    def __init__(self, problem: Problem) -> None:
        cfg = StandardTrainingSAEConfig(
            d_in=problem.d_in, d_sae=problem.d_sae, l1_coefficient=L1, apply_b_dec_to_input=True, device="cpu"
        )
        sae = StandardTrainingSAE(cfg)
        sae.load_state_dict({name: value.detach() for name, value in problem.parameters().items()})
        trainer_cfg = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=problem.batch,
            lr=0.0,
            lr_end=0.0,
            autocast=problem.autocast,
        )
        self.trainer = SAETrainer(trainer_cfg, sae, data_provider=iter(()))
        self.x = problem.x

    def step(self) -> Tensor:
        """One training step; returns its loss."""
        return self.trainer.step(self.x).loss.detach()


class AutogradStep:
    """The dense formula in plain PyTorch, with fused Adam."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.p = problem, problem.parameters()
        self.optimizer = torch.optim.Adam(self.p.values(), lr=0.0, fused=True)

    def step(self) -> Tensor:
        """One training step; returns its loss."""
        p, x = self.p, self.problem.x
        with self.problem.precision():
            h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
            mse = (h @ p["W_dec"] + p["b_dec"] - x).square().sum(dim=-1).mean()
            loss = mse + L1 * h.sum(dim=-1).mean() + L2 * h.square().sum(dim=-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(list(p.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class TopKGatherStep(AutogradStep):
    """TopK as the common sparse-decoder trainers do it.

    Dense encoder, ``topk``, embedding-bag decoder, autograd.
    """

    def step(self) -> Tensor:
        """One training step; returns its loss."""
        p, x = self.p, self.problem.x
        with self.problem.precision():
            top = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).topk(
                int(self.problem.l0), sorted=False
            )
        decoded = embedding_bag(top.indices, p["W_dec"], mode="sum", per_sample_weights=top.values.float())
        loss = (decoded + p["b_dec"] - x).square().sum(dim=-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(list(p.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class OurTopKStep(OurStep):
    """The same TopK SAE through ``sparse.encode_topk``."""

    def step(self) -> Tensor:
        """One training step; returns its loss."""
        p, x = self.p, self.problem.x
        with self.problem.precision():
            code = sparse.encode_topk(x, p["W_enc"], p["b_enc"], p["b_dec"], k=int(self.problem.l0))
            loss = sparse.loss(x, code, **p).loss
        loss.backward()
        nn.utils.clip_grad_norm_(list(p.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Products:
    """Dense products alone, without a step around them: the encoder's, or the five of a dense step."""

    def __init__(self, problem: Problem, *, all_five: bool) -> None:
        dtype = torch.bfloat16 if problem.autocast else torch.float32
        self.x, self.W_dec = problem.x.to(dtype), problem.W_dec.to(dtype)
        self.W_enc = self.W_dec.t().contiguous()
        self.h = torch.empty(problem.batch, problem.d_sae, dtype=dtype)
        self.all_five = all_five

    def step(self) -> None:
        """The products, results thrown away."""
        # Written to memory that exists: the pages of a new result would cost another third.
        torch.mm(self.x, self.W_enc, out=self.h)
        if self.all_five:
            grad = self.h @ self.W_dec
            torch.mm(self.h.t(), grad)
            grad_h = grad @ self.W_dec.t()
            torch.mm(self.x.t(), grad_h)


clock = time.perf_counter  # seconds; --cpu-time takes time.process_time


def interleaved(contestants: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median seconds of each contestant's step, taken in turn; one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, contestant in contestants.items():
            start = clock()
            contestant.step()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(step: Callable[[], Any]) -> float:
    """Most memory (MiB) that PyTorch's allocator held at once during a step, beyond what lived before it.

    From the profiler's record of every allocation: exact, unlike resident memory, and blind only to scratch
    space inside BLAS.
    """
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak / 2**20


def measure(problem: Problem, repeats: int, extras: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Times (s) and peaks (MiB) of every contestant."""
    contestants: dict[str, Any] = {
        "ours": ProductStep(problem),
        "ours, bare functions": OurStep(problem),
        "saelens": SAELensStep(problem),
        "dense": OurStep(problem, dense=True),
        "encoder product": Products(problem, all_five=False),
    }
    if extras:
        contestants["ours, d_in-major W_enc"] = OurStep(problem, feature_major=False)
        if not problem.autocast:
            contestants["ours, no screening"] = OurStep(problem, screen=False)
        contestants["plain autograd"] = AutogradStep(problem)
        contestants["five products"] = Products(problem, all_five=True)
        contestants["TopK, ours"] = OurTopKStep(problem)
        contestants["TopK, gather"] = TopKGatherStep(problem)
    seconds = interleaved(contestants, repeats)
    peaks = {name: peak_mib(contestants[name].step) for name in ("ours", "dense", "saelens")}
    return seconds, peaks


def show(problem: Problem, seconds: dict[str, float], peaks: dict[str, float]) -> None:
    print(f"\nbatch {problem.batch}, d_in {problem.d_in}, d_sae {problem.d_sae}, L0 {problem.l0:g}")
    ours, floor = seconds["ours"], seconds["encoder product"]
    print(f"  {'':26}{'ms':>9}{'/ ours':>9}{'/ encoder':>11}{'peak MiB':>10}")
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        peak = f"{peaks[name]:10.0f}" if name in peaks else ""
        print(f"  {name:26}{1e3 * value:9.1f}{value / ours:9.2f}{value / floor:11.2f}{peak}")


def row(problem: Problem, seconds: dict[str, float], peaks: dict[str, float]) -> dict[str, float]:
    return {
        "batch": problem.batch,
        "d_in": problem.d_in,
        "d_sae": problem.d_sae,
        "l0": problem.l0,
        "ours_s": seconds["ours"],
        "dense_s": seconds["dense"],
        "saelens_s": seconds["saelens"],
        "encoder_product_s": seconds["encoder product"],
        "ours_peak_mib": peaks["ours"],
        "saelens_peak_mib": peaks["saelens"],
    }


def show_profile(problem: Problem, repeats: int) -> None:
    """Median milliseconds of each phase of our step."""
    contestant, phases = OurStep(problem), {}
    last = 0.0

    def mark(name: str) -> None:
        nonlocal last
        now = clock()
        phases.setdefault(name, []).append(now - last)
        last = now

    contestant.step()
    contestant.mark = mark
    for _ in range(repeats):
        last = clock()
        contestant.step()
    medians = {name: statistics.median(values) for name, values in phases.items()}
    total = sum(medians.values())
    print(
        f"\nbatch {problem.batch}, d_in {problem.d_in}, d_sae {problem.d_sae}, L0 {problem.l0:g}: "
        f"{1e3 * total:.0f} ms"
    )
    for name, value in medians.items():
        print(f"  {name:18}{1e3 * value:8.1f} ms{100 * value / total:6.0f} %")


def crossover(repeats: int, autocast: bool) -> None:
    """Dense against sparse step over the density of the code."""
    for batch, d_in, d_sae in SHAPES[:2]:
        print(f"\nbatch {batch}, d_in {d_in}, d_sae {d_sae}\n  density %   dense ms  sparse ms")
        for density in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2):
            problem = Problem(batch, d_in, d_sae, density * d_sae, autocast)
            seconds = interleaved(
                {"dense": OurStep(problem, dense=True), "sparse": OurStep(problem)}, repeats
            )
            print(f"  {100 * density:9.0f}{1e3 * seconds['dense']:11.0f}{1e3 * seconds['sparse']:11.0f}")


def growth(repeats: int, autocast: bool) -> None:
    """Cost against d_sae at batch 1024, d_in 512, L0 32."""
    print("\n  d_sae      ours ms  saelens ms  encoder product ms")
    for d_sae in (4096, 8192, 16384, 32768, 65536):
        problem = Problem(1024, 512, d_sae, 32, autocast)
        contestants = {
            "ours": OurStep(problem),
            "saelens": SAELensStep(problem),
            "p": Products(problem, all_five=False),
        }
        seconds = interleaved(contestants, repeats)
        print(
            "  "
            f"{d_sae:6}{1e3 * seconds['ours']:12.0f}{1e3 * seconds['saelens']:12.0f}{1e3 * seconds['p']:20.0f}"
        )


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    """The measurements asked for, one at a time: each holds its own weights."""
    for shape in SHAPES[: 1 if args.quick else args.shapes]:
        for l0 in [32] if args.quick else args.l0:
            yield Problem(*shape, l0, args.autocast)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as a list of objects")
    parser.add_argument("--quick", action="store_true", help="the first shape at L0 32 only")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast for every contestant")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps per contestant")
    parser.add_argument("--threads", type=int, default=None, help="PyTorch threads (default: its own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, for a busy machine")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    parser.add_argument("--l0", type=int, nargs="+", default=list(L0S), help="sparsities to measure")
    parser.add_argument(
        "--no-extras", action="store_true", help="only the contestants that the JSON holds (as with --quick)"
    )
    parser.add_argument("--profile", action="store_true", help="the phases of our step, instead")
    parser.add_argument("--crossover", action="store_true", help="dense against sparse over density, instead")
    parser.add_argument("--growth", action="store_true", help="cost over d_sae, instead")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.cpu_time:
        global clock
        clock, args.threads = time.process_time, 1
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{'bf16 autocast' if args.autocast else 'float32'}"
    )
    if args.crossover:
        return crossover(args.repeats, args.autocast)
    if args.growth:
        return growth(args.repeats, args.autocast)
    rows = []
    for problem in problems(args):
        if args.profile:
            show_profile(problem, args.repeats)
            continue
        seconds, peaks = measure(problem, args.repeats, extras=not (args.no_extras or args.quick))
        show(problem, seconds, peaks)
        rows.append(row(problem, seconds, peaks))
        if args.json:  # after each: a long run that is interrupted keeps what it has
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
