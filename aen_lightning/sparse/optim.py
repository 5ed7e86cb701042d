"""Adam for parameters stored feature by feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from aen_lightning import compat


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)`` that does not copy a transposed parameter to update it, and clips in its kernel.

    PyTorch's fused kernel on CPU takes contiguous memory: it copies a feature-major ``W_enc``, its gradient and
    both moments at every step, which makes the step several times slower. Adam works element by element, so the
    kernel gets the transposed views, which are contiguous. Same numbers, same arguments, same state dict.

    ``max_norm`` of a group, if it has one, clips the gradients by the norm over the group, as
    ``torch.nn.utils.clip_grad_norm_`` does: the kernel divides by what a gradient scaler would have multiplied with,
    so that clipping reads and writes no gradient of its own. Parameters must then be float32.

    Args:
        params: As for ``torch.optim.Adam``.
        **kwargs: As for ``torch.optim.Adam``; ``fused`` is set.
    Raises:
        ValueError: If ``fused=False`` is asked for.
        TypeError: If this PyTorch's Adam has another inside than the one that this class reaches into.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        if not kwargs.setdefault("fused", True):
            raise ValueError("FusedAdam is fused by definition; use torch.optim.Adam for fused=False")
        if not self.supported():
            raise TypeError(
                "FusedAdam was written against another torch.optim.Adam than that of torch "
                f"{torch.__version__}; "
                "use torch.optim.Adam"
            )
        super().__init__(params, **kwargs)
        compat.on_adam_tensors(self, self._before_kernel)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or load: what is hooked into an instance does not travel with it."""
        super().__setstate__(state)
        compat.on_adam_tensors(self, self._before_kernel)

    def _before_kernel(self, group: dict[str, Any], lists: tuple[list[Tensor], ...]) -> None:
        max_norm, grads = group.get("max_norm"), lists[1]
        self.grad_scale = _clip_divisor(grads, max_norm) if max_norm and grads else None
        _contiguous(lists)

    @staticmethod
    def supported() -> bool:
        """Whether this PyTorch's Adam has the inside that this class reaches into."""
        return compat.adam_tensors_known()


def _clip_divisor(grads: list[Tensor], max_norm: float) -> Tensor:
    return ((get_total_norm(grads) + 1e-6) / max_norm).clamp_min(1)  # the inverse of clip_grad_norm_'s factor


def _contiguous(lists: tuple[list[Tensor], ...]) -> None:
    """Put the transposed views in the place of matrices that are stored transposed, all of a parameter's or none:
    the kernel walks parameter, gradient and moments side by side."""
    for i, param in enumerate(lists[0]):
        together = [tensors[i] for tensors in lists if tensors]
        if not param.is_contiguous() and all(t.ndim == 2 and t.t().is_contiguous() for t in together):
            for tensors in lists:
                if tensors:
                    tensors[i] = tensors[i].detach().t()
