"""What a run leaves and goes on from: checkpoints of one and the same run, with finite numbers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from aen_lightning.callbacks.modules import prefixed
from aen_lightning.saes.input_scaling import InputScaling
from aen_lightning.training.finite import (
    FiniteWatch,
    NonFiniteError,
    non_finite_tensors,
    require_finite,
    say,
    state_of,
)
from aen_lightning.training.sae_holder import SAEHolder
from aen_lightning.training.settings import differences, settings_of_run


class RunState(SAEHolder):
    """The part of the training module that is saved, and that refuses to save or resume what is not sound.

    Attributes:
        n_training_samples: Tokens trained on, over all ranks.
        n_skipped_rows: Rows of activations left out because they were not finite, over all ranks.
        finite_watch: Notes what is not finite, on the device.
        run_config: See :class:`~aen_lightning.training.base.SAETrainingModule`.
        accept_changed_config: Likewise.
        input_scaling: The scaling of the training data.
        in_refit: Whether the run has come to its refit.
    """

    n_training_samples: int
    n_skipped_rows: int
    finite_watch: FiniteWatch
    run_config: Mapping[str, Any] | None
    accept_changed_config: bool
    input_scaling: InputScaling
    in_refit: bool

    def check_finite(self, *, batch_size: int | None = None) -> None:
        """End the run if a batch, a loss or an SAE was or is not finite. Every rank must call it; waits for the device.

        Raises:
            NonFiniteError: With the first step, batch and rank, and the names of the tensors.
        """
        strategy = self.trainer.strategy
        found = strategy.all_gather(self.finite_watch.found().to(self.device)).reshape(-1, 2, 4).cpu()
        tensors = [
            prefixed(name, tensor)
            for name, sae in self.saes.items()
            for tensor in non_finite_tensors(state_of(sae))
        ]
        somewhere = strategy.reduce_boolean_decision(bool(tensors), all=False)
        problem = say(found, tensors, batch_size=batch_size)
        if problem or somewhere:
            raise NonFiniteError(
                f"not finite: {problem or 'weights on another rank'}. Nothing of it was written. For rows of "
                "activations look at the data or set model.on_non_finite to skip; for a loss lower model.lr"
            )
        if self.finite_watch.mode == "skip":
            local = torch.as_tensor(self.finite_watch.n_skipped_rows, device=self.device)
            self.n_skipped_rows = int(cast(Tensor, strategy.reduce(local.clone(), reduce_op="sum")))

    def on_train_end(self) -> None:
        """Look once more before the last dictionary is written."""
        self.check_finite()
        if self.n_skipped_rows:
            rank_zero_warn(
                f"{self.n_skipped_rows} rows of activations were not finite and left out of training"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights alone do not say, as plain values.

        Raises:
            NonFiniteError: If the run has diverged, before anything is written.
        """
        self.require_finite()
        checkpoint["aen_lightning"] = {
            "n_training_samples": self.n_training_samples,
            "n_skipped_rows": self.n_skipped_rows,
            "settings": settings_of_run(self, self.run_config),
            "input_scaling": {"kind": self.input_scaling.kind, "factor": self.input_scaling.factor},
            "tracked": [tracked.extra_state() for tracked in self.tracked],
        }

    def _is_attached(self) -> bool:
        """Whether a Trainer drives the module; ``load_from_checkpoint`` needs none."""
        try:
            return self.trainer is not None
        except RuntimeError:
            return False

    def _compare_settings(self, checkpoint: dict[str, Any]) -> None:
        if not self._is_attached() or self.trainer.state.fn != TrainerFn.FITTING:
            return
        # without settings: of an earlier version
        old = checkpoint["aen_lightning"].get("settings") or {"model": checkpoint.get("hyper_parameters", {})}
        if not (changed := differences(old, settings_of_run(self, self.run_config))):
            return
        said = "the checkpoint is of a run with other settings: " + "; ".join(changed)
        if not self.accept_changed_config:
            raise ValueError(
                f"{said}. Take the same settings, or --force_resume (in Python module.accept_changed_config = True)"
            )
        rank_zero_warn(
            f"{said}. Weights, optimizer and schedule, the learning rate too, go on as in the checkpoint"
        )

    def require_finite(self) -> None:
        """Refuse to have a diverged run written: on all ranks together while it trains, on each by itself after it."""
        if self.trainer.state.status == TrainerStatus.RUNNING and self.trainer.state.fn == TrainerFn.FITTING:
            self.check_finite()
            return
        for name, sae in self.saes.items():
            require_finite(sae, f"the SAE {name!r}" if name else "the SAE")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added.

        Raises:
            NonFiniteError: If a weight, a statistic or the optimizer's state is not finite.
            ValueError: In a fit, if the run was another one; not with ``accept_changed_config``, which warns.
        """
        self._compare_settings(checkpoint)
        optimizers = checkpoint.get("optimizer_states", [])
        # in a sharded checkpoint the tensors are not here; what writes it has looked at them
        if bad := non_finite_tensors(_tensors_in([checkpoint.get("state_dict", {}), *optimizers])):
            raise NonFiniteError(
                f"the checkpoint holds numbers that are not finite, in {', '.join(bad[:4])}: it was saved after the "
                "run diverged; resume from an earlier one"
            )
        state = checkpoint["aen_lightning"]
        self.n_training_samples = state["n_training_samples"]
        self.n_skipped_rows = state.get("n_skipped_rows", 0)  # 0: of an earlier version
        self.input_scaling = InputScaling(**state["input_scaling"])
        for tracked, extra in zip(self.tracked, state["tracked"], strict=True):
            tracked.load_extra_state(extra)
        self.in_refit = any(extra.get("in_refit", False) for extra in state["tracked"])
        if self.sharded_features is not None:
            self.sharded_features.load(self.trainer, self)


def _tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, by the path to each."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, member in items:
            yield from _tensors_in(member, f"{name}.{key}" if name else str(key))
