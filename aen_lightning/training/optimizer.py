"""Optimizer and learning-rate schedule of a run."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sae_lens.training.optim import get_lr_scheduler
from torch import nn

from aen_lightning.saes.lengths import Length, check_length, in_steps

SchedulerName = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optimizer and SAELens's learning-rate schedule.

    Args:
        lr: Learning rate.
        optimizer: Class path of a ``torch.optim.Optimizer`` that takes ``params, lr=...``.
        optimizer_kwargs: Further arguments of the optimizer. Adam and AdamW run fused (not in ``16-mixed``)
            unless ``fused`` is given.
        lr_scheduler_name: SAELens's ``constant``, ``cosineannealing`` or ``cosineannealingwarmrestarts``.
        lr_warm_up_steps: Optimizer steps of linear warm-up, or a share of the run, a float in (0, 1).
        lr_decay_steps: Optimizer steps, or a share, of linear decay to zero at the end; needs ``max_steps`` on the
            Trainer.
        lr_end: Rate at the end of a cosine schedule. None: a tenth of ``lr``, as in SAELens.
        n_restart_cycles: Cycles of ``cosineannealingwarmrestarts``.

    Raises:
        ValueError: For a rate that is not positive, or an optimizer or argument that does not exist.
    """

    lr: float = 1e-3
    optimizer: str = "torch.optim.Adam"
    optimizer_kwargs: dict[str, Any] | None = None
    lr_scheduler_name: SchedulerName = "constant"
    lr_warm_up_steps: Length = 0
    lr_decay_steps: Length = 0
    lr_end: float | None = None
    n_restart_cycles: int = 1

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        check_length(self.lr_warm_up_steps, "lr_warm_up_steps")
        check_length(self.lr_decay_steps, "lr_decay_steps")
        accepted = inspect.signature(self.optimizer_class).parameters
        unknown = [key for key in self.optimizer_kwargs or {} if key not in accepted]
        if unknown:
            raise ValueError(
                f"{self.optimizer} takes no argument {unknown[0]!r}; it takes {', '.join(accepted)}"
            )

    @property
    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The class that ``optimizer`` names."""
        module_name, _, name = self.optimizer.rpartition(".")
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                "optimizer must be the class path of a torch optimizer such as 'torch.optim.AdamW', got "
                f"{self.optimizer!r}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise ValueError(f"optimizer {self.optimizer!r} is not a torch.optim.Optimizer")
        return found

    @property
    def is_plain_adam(self) -> bool:
        """Whether it is torch's Adam with nothing but a learning rate."""
        return self.optimizer_class is torch.optim.Adam and not self.optimizer_kwargs

    def configure(
        self,
        groups: Sequence[Iterable[nn.Parameter]],
        *,
        training_steps: int | float,
        device: torch.device,
        scaled_gradients: bool,
        optimizer_class: type[torch.optim.Optimizer] | None = None,
    ) -> OptimizerLRScheduler:
        """One optimizer with a group for each SAE, and its schedule, stepped once per optimizer step.

        Args:
            groups: The parameters of each SAE.
            training_steps: Length of the run in optimizer steps; infinite if it is not known.
            device: Where the parameters are.
            scaled_gradients: Whether the gradients are those of a scaled loss (``16-mixed``), which a fused
                Adam unscales within its step: too late for clipping.
            optimizer_class: In place of the one named, with the same arguments.

        Raises:
            ValueError: For a schedule that must know the end of a run that has none.
        """
        arguments: dict[str, Any] = {"lr": self.lr, **(self.optimizer_kwargs or {})}
        # Adam's fused kernel takes the same steps several times faster
        if self.optimizer_class in (torch.optim.Adam, torch.optim.AdamW) and not scaled_gradients:
            arguments.setdefault("fused", device.type in ("cpu", "cuda"))
        optimizer = (optimizer_class or self.optimizer_class)(
            [{"params": list(g)} for g in groups], **arguments
        )
        known = training_steps != float("inf")
        if (self.lr_decay_steps or self.lr_scheduler_name != "constant") and not known:
            raise ValueError(
                "lr_decay_steps and cosine schedules need to know the end: set trainer.max_steps"
            )
        scheduler = get_lr_scheduler(
            self.lr_scheduler_name,
            optimizer=optimizer,
            training_steps=int(training_steps) if known else 0,
            lr=self.lr,
            warm_up_steps=in_steps(self.lr_warm_up_steps, training_steps, "lr_warm_up_steps"),
            decay_steps=in_steps(self.lr_decay_steps, training_steps, "lr_decay_steps"),
            lr_end=self.lr / 10 if self.lr_end is None else self.lr_end,
            num_cycles=self.n_restart_cycles,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
