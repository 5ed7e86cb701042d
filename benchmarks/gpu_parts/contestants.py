"""The training steps that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor, nn

from aen_lightning import sparse
from aen_lightning.saes import penalty
from aen_lightning.sparse import cost
from gpu_parts.problem import CLIP, L1, L2, Problem


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
            self.ema.lerp_(code.feature_means, 1e-3)
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
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.path == "sparse, rows":
            return
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
