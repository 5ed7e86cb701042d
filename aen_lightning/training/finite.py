"""Keeps numbers that are not finite out of an SAE, and out of everything that a run writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

OnNonFinite = Literal["stop", "skip"]

_READ_AFTER = 64  # steps, of which little is kept: a number for each row


class NonFiniteError(ValueError):
    """A run, a checkpoint or a dictionary that holds numbers that are not finite."""


def non_finite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors with a nan or an infinity. Waits for the device once."""
    names, flags = [], []
    for name, tensor in tensors:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if tensor.is_floating_point() and tensor.numel():
            names.append(name)
            # many times faster than isfinite of all, and without a copy of it in memory
            flags.append(torch.stack(tensor.detach().aminmax()).isfinite().all())
    if not flags:
        return []
    bad = torch.stack([flag.to(flags[0].device) for flag in flags]).logical_not()
    return [name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad]


class _Noted(NamedTuple):
    step: int
    batch_idx: int
    numbers: Tensor


class FiniteWatch:
    """Notes on the device, without waiting for it, what was first not finite in a run and when.

    Args:
        mode: ``stop``: a batch with a row that is not finite ends the run at the next look. ``skip``: other rows of the
            batch take the place of such rows, and they are counted; only a loss that is not finite then ends it.

    Raises:
        ValueError: For another mode.
    """

    def __init__(self, mode: OnNonFinite) -> None:
        if mode not in ("stop", "skip"):
            raise ValueError(f"on_non_finite must be 'stop' or 'skip', got {mode!r}")
        self.mode = mode
        self.begin()

    def begin(self, n_skipped_rows: int = 0) -> None:
        """Forget what was noted, and go on counting from a number."""
        self.n_skipped_rows: Tensor | int = n_skipped_rows
        # of rows and of losses the step, the batch, their number, 1 if there were any: (2, 4)
        self._first: Tensor | None = None
        # what steps have left, not looked at yet: step, batch, numbers
        self._unread: tuple[list[_Noted], list[_Noted]] = ([], [])

    def rows(self, x: Tensor, *, step: int, batch_idx: int) -> Tensor:
        """Look at the rows of a batch, (batch, d_in); returns it, in ``skip`` with finite rows only."""
        sums = x.detach().sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        if self.mode == "stop":
            self._note(0, sums, step, batch_idx)
            return x
        finite = sums.isfinite()
        self.n_skipped_rows = self.n_skipped_rows + (~finite).sum()
        # the finite rows in their order, again and again until the batch is full; nothing here asks for their number
        order = (~finite).sort(stable=True).indices
        at = order[torch.arange(len(x), device=x.device) % finite.sum().clamp(min=1)]
        # of a batch without any finite row zeros remain
        return torch.where(finite.any(), x[at], torch.zeros_like(x))

    def held_out_rows(self, x: Tensor, *, batch_idx: int, rank: int) -> Tensor:
        """The rows of a held-out batch, (n, d_in); in ``skip`` the finite ones only. Waits for the device.

        Raises:
            NonFiniteError: In ``stop``, if there is another.
        """
        finite = x.isfinite().all(-1)
        n_bad = len(x) - int(finite.sum())
        if not n_bad:
            return x
        if self.mode == "stop":
            raise NonFiniteError(
                f"{n_bad} of {len(x)} rows of held-out activations are not finite (batch {batch_idx}, rank {rank}): "
                "harvest them again, or leave them out with model.on_non_finite=skip"
            )
        return x[finite]

    def losses(self, losses: Tensor, *, step: int, batch_idx: int) -> None:
        """Look at the losses of a batch, (n_saes,)."""
        self._note(1, losses.detach(), step, batch_idx)

    def _note(self, kind: int, numbers: Tensor, step: int, batch_idx: int) -> None:
        # many steps are looked at in the operations of one
        unread = self._unread[kind]
        if unread and (len(unread) == _READ_AFTER or unread[0].numbers.shape != numbers.shape):
            self._read(kind)
        unread.append(_Noted(step, batch_idx, numbers))

    def _read(self, kind: int) -> None:
        unread = self._unread[kind]
        if not unread:
            return
        numbers = torch.stack([noted.numbers for noted in unread])
        places = torch.tensor([noted[:2] for noted in unread])
        if numbers.is_cuda:  # from pageable memory the host would wait for the copy
            places = places.pin_memory().to(numbers.device, non_blocking=True)
        unread.clear()
        n_bad = numbers.isfinite().logical_not().sum(dim=1)
        seen = torch.column_stack((places, n_bad, n_bad > 0))
        now = seen.index_select(0, seen[:, 3].argmax().view(1))[0]  # the first of those that are bad
        if self._first is None:
            self._first = torch.zeros(2, 4, dtype=torch.int64, device=numbers.device)
        self._first[kind] = torch.where(self._first[kind, 3] > 0, self._first[kind], now)

    def found(self) -> Tensor:
        """What was noted, shape (2, 4), int64: for rows and losses the step, the batch, their number, and 1 if any."""
        for kind in (0, 1):
            self._read(kind)
        return torch.zeros(2, 4, dtype=torch.int64) if self._first is None else self._first


def say(found: Tensor, tensors: list[str], *, batch_size: int | None) -> str | None:
    """In words what is not finite, or None if all is.

    Args:
        found: From all ranks, shape (n_ranks, 2, 4), as :meth:`FiniteWatch.found`.
        tensors: Names of parameters and buffers that are not finite.
        batch_size: Rows of a batch on one rank, if it is known.
    """
    parts = []
    of = "" if batch_size is None else f" of {batch_size}"
    for kind in (0, 1):
        seen = [(int(f[kind, 0]), rank, f[kind].tolist()) for rank, f in enumerate(found) if f[kind, 3]]
        if seen:
            step, rank, (_, batch, number, _) = min(seen)
            what = f"{number}{of} rows of activations" if kind == 0 else "the loss"
            parts.append(f"{what} in step {step} (batch {batch}, rank {rank})")
    if tensors:
        more = f" and {len(tensors) - 4} more" if len(tensors) > 4 else ""
        parts.append(f"now {', '.join(tensors[:4])}{more}")
    return "; ".join(parts) or None


def require_finite(module: nn.Module, what: str) -> None:
    """Refuse weights or buffers that are not finite.

    Raises:
        NonFiniteError: Naming ``what`` and the tensors.
    """
    if bad := non_finite_tensors(state_of(module)):
        raise NonFiniteError(
            f"{what} holds numbers that are not finite, in {', '.join(bad)}: it has diverged"
        )


def state_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return [*module.named_parameters(), *module.named_buffers()]
