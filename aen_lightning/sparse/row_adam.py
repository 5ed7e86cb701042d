"""Adam for the rows of an SAE's matrices, most of which have no gradient at most steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from aen_lightning.sparse import backend
from aen_lightning.sparse.low_copies import keep_low_copy, low_copy

# By then the first moment is so small that a row moves by less than its rounding: 256 steps of a decay of 0.9.
_NEGLIGIBLE = 2e-12


class Hyperparameters(NamedTuple):
    """What one step needs besides tensors.

    ``step_size`` is the rate over the first bias correction, ``correction2`` the root of the second; a row silent for
    ``cold_after`` steps rests.
    """

    step_size: float
    beta1: float
    beta2: float
    correction2: float
    eps: float
    cold_after: int


class RowAdam(torch.optim.Adam):
    """``torch.optim.Adam`` in one pass over each matrix, which leaves out rows that have long been silent.

    A row whose gradient is zero still moves under Adam, by its first moment, which decays: after some 256 steps (for a
    decay of 0.9) it moves by less than its rounding. From then on the row rests, and with it its moments; when it has
    a gradient again, the moments catch up by one multiplication. The numbers are those of ``torch.optim.Adam`` to
    rounding, and so is :meth:`state_dict`, for which all rows catch up. The same pass clips the gradient
    (``max_norm`` of a group, by the norm over the group), projects rows to a norm (:meth:`hold_rows`) and keeps a copy
    in low precision (``low_dtype``), which the functions of this package find.

    On GPUs with Triton it is one kernel; elsewhere PyTorch's operators, for tests. Matrices are taken as they lie in
    memory: a transposed one has its columns as rows.

    Args:
        params: As for ``torch.optim.Adam``; float32 or float64.
        low_dtype: Of the copies; None: none.
        **kwargs: ``lr``, ``betas`` and ``eps``, as for ``torch.optim.Adam``.

    Raises:
        ValueError: For another option of ``torch.optim.Adam`` than these.
    """

    def __init__(self, params: Any, *, low_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        kwargs.pop("fused", None)  # it is, by definition
        for name in kwargs:
            if name not in ("lr", "betas", "eps"):
                raise ValueError(f"RowAdam takes lr, betas and eps, got {name}={kwargs[name]!r}")
        super().__init__(params, foreach=False, **kwargs)
        for group in self.param_groups:
            group.setdefault("max_norm", None)
        self.low_dtype = low_dtype
        self._norms: dict[Tensor, Callable[[], Tensor]] = {}

    def hold_rows(self, parameter: Tensor, norms: Callable[[], Tensor]) -> None:
        """From now on project each row of a matrix to its norm, (rows,), after each step."""
        self._norms[parameter] = norms

    def holds_rows(self, parameter: Tensor) -> bool:
        """Whether :meth:`hold_rows` was called for it."""
        return parameter in self._norms

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see ``torch.optim.Optimizer.step``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                grads = [as_rows(p.grad, p) for p in params]
                squares = [row_squares(grad) for grad in grads]
                clip = _clip_factor(squares, group.get("max_norm"))
                for p, grad, square in zip(params, grads, squares, strict=True):
                    self._update(p, grad, square, clip, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, squares: Tensor, clip: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(p, squares)
        state["step"] += 1
        n, (beta1, beta2) = float(state["step"].numpy()), group["betas"]
        h = Hyperparameters(
            group["lr"] / (1 - beta1**n), beta1, beta2, math.sqrt(1 - beta2**n), group["eps"], _cold_after(beta1)
        )  # fmt: skip
        low = None
        if self.low_dtype is not None and p.ndim == 2:
            low = low_copy(p, self.low_dtype)
            low = p.to(self.low_dtype) if low is None else low
        update_rows(
            as_rows(p, p), grad, as_rows(state["exp_avg"], p), as_rows(state["exp_avg_sq"], p),
            state["silent_steps"], squares, clip,
            self._norms[p]() if p in self._norms else None, None if low is None else as_rows(low, p), h,
        )  # fmt: skip
        if low is not None:
            keep_low_copy(p, low)

    def _state_of(self, p: Tensor, squares: Tensor) -> dict[str, Any]:
        state = cast("dict[str, Any]", self.state[p])
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if "silent_steps" not in state:  # new, or loaded from torch's Adam
            state["silent_steps"] = torch.zeros(squares.shape, dtype=torch.int32, device=p.device)
        # torch's loading takes these to the parameter's dtype and device
        state["silent_steps"] = state["silent_steps"].to(p.device, torch.int32)
        state["step"] = state["step"].cpu()
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != p.stride():
                state[name] = torch.empty_like(p).copy_(state[name])
        return state

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As torch's, after all rows caught up, with ``silent_steps`` for each parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                if "silent_steps" in self.state.get(p, {}):
                    self._catch_up(p, group["betas"])
        return super().state_dict()

    def _catch_up(self, p: Tensor, betas: tuple[float, float]) -> None:
        state, cold_after = self.state[p], _cold_after(betas[0])
        silent = state["silent_steps"].to(torch.int32)
        missed = (silent - cold_after).clamp_min(0).to(p.dtype).unsqueeze(1)
        for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
            as_rows(state[name], p).mul_(torch.pow(torch.full_like(missed, beta), missed))
        state["silent_steps"] = silent.clamp_max(cold_after)


def _cold_after(beta1: float) -> int:
    return math.ceil(math.log(_NEGLIGIBLE) / math.log(beta1)) if beta1 > 0 else 0


def as_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of a parameter's shape as a contiguous matrix, in the order in which the parameter lies in memory."""
    tensor = tensor.detach()
    if like.ndim == 2:
        return (tensor if like.is_contiguous() else tensor.t()).contiguous()
    # a vector in lines that a program can hold
    n = like.numel()
    return tensor.contiguous().view(-1, next(w for w in (1024, 256, 64, 16, 4, 1) if n % w == 0))


def row_squares(grad: Tensor) -> Tensor:
    """(rows,) sums of squares; above 0 for every row that is not zero."""
    if _by_kernel(grad):
        from aen_lightning.sparse import triton_adam

        return triton_adam.squares(grad)
    square = grad.square().sum(dim=1)
    return torch.where((square == 0) & (grad != 0).any(dim=1), torch.finfo(grad.dtype).tiny, square)


def update_rows(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    silent: Tensor,
    squares: Tensor,
    clip: Tensor,
    norms: Tensor | None,
    low: Tensor | None,
    h: Hyperparameters,
) -> None:
    """One step of Adam on contiguous (rows, width) matrices, in place.

    Args:
        param: The parameter.
        grad: Its gradient.
        exp_avg: First moment; of a resting row as it was when the row came to rest.
        exp_avg_sq: Second moment, likewise.
        silent: (rows,) int32, steps in a row without a gradient.
        squares: (rows,), 0 where the gradient is.
        clip: Scalar by which the gradient is multiplied.
        norms: (rows,) that rows are projected to; None: they are not.
        low: Copy of the parameter in low precision, or None.
        h: The numbers.
    """
    if _by_kernel(param):
        from aen_lightning.sparse import triton_adam

        triton_adam.update(param, grad, exp_avg, exp_avg_sq, silent, squares, clip, norms, low, h)
        return
    active = (squares == 0).logical_not().unsqueeze(1)
    n_silent = silent.unsqueeze(1)
    moves = active | (n_silent < h.cold_after)
    missed = torch.where(active, (n_silent - h.cold_after).clamp_min(0), 0).to(param.dtype)
    g = torch.where(active, grad * clip, 0)
    m = exp_avg * (torch.pow(h.beta1, missed) * h.beta1) + (1 - h.beta1) * g
    v = exp_avg_sq * (torch.pow(h.beta2, missed) * h.beta2) + (1 - h.beta2) * g * g
    p = param - h.step_size * m / (v.sqrt() / h.correction2 + h.eps)
    if norms is not None:
        scale = norms.to(p.dtype).unsqueeze(1) / torch.linalg.vector_norm(p, dim=1, keepdim=True).clamp_min(
            1e-12
        )
        p = p * scale.masked_fill((scale - 1).abs() <= 8 * torch.finfo(p.dtype).eps, 1.0)
    for old, new in ((exp_avg, m), (exp_avg_sq, v), (param, p)):
        old.copy_(torch.where(moves, new, old))
    if low is not None:
        low.copy_(param)
    silent.copy_(torch.where(active.squeeze(1), 0, silent + 1))


def _by_kernel(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and backend.triton_serves(tensor.device)


def _clip_factor(squares: list[Tensor], max_norm: float | None) -> Tensor:
    if not max_norm:
        return squares[0].new_ones(())
    norm = torch.stack([s.sum() for s in squares]).sum().sqrt()
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
