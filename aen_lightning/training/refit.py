"""The relaxed refit of a dictionary under Lightning."""

from __future__ import annotations

from typing import Any

from aen_lightning.evaluate.dictionary import load_dictionary
from aen_lightning.saes.relaxed import RelaxedTrainingSAE
from aen_lightning.training.base import SAETrainingModule


class RefitModule(SAETrainingModule):
    """Refits a dictionary's magnitudes and decoder on its own support, see :mod:`aen_lightning.saes.relaxed`.

    Which features are active on a token stays as it is, so L0 and dead features do, too; what an L1 penalty
    shrank is restored. The result is exported as a SAELens ``jumprelu`` SAE, which loads without this
    package.

    Args:
        dictionary: A SAELens folder, or ``RELEASE:ID`` on the Hub, of architecture ``standard``, ``aen`` or
            ``jumprelu``. The data must be what it was trained on: the same hook, ``input_scaling: per_token``
            where it scales each token.
        **training: As for :class:`~aen_lightning.training.base.SAETrainingModule`: ``lr``,
            ``lr_decay_steps``, ...

    Raises:
        FileNotFoundError: If there is no such dictionary.
        ValueError: For an architecture without thresholds; at ``setup``, if the data are not what the
            dictionary is for.
    """

    def __init__(self, dictionary: str, **training: Any) -> None:
        source = load_dictionary(dictionary)
        super().__init__({"": RelaxedTrainingSAE.of(source)}, **training)
        self.save_hyperparameters(logger=False)
        self._scaled_by = (
            "per_token" if source.cfg.normalize_activations == "constant_norm_rescale" else "none"
        )
        self._hook_name = source.cfg.metadata.hook_name

    def setup(self, stage: str) -> None:
        """Check that the data are those of the dictionary before any work."""
        datamodule = getattr(self.trainer, "datamodule", None)
        scaling = getattr(datamodule, "input_scaling", None)
        kind = getattr(scaling, "kind", "none")
        name = self.hparams["dictionary"]
        if kind != self._scaled_by:
            raise ValueError(
                f"{name} was trained on activations scaled by {self._scaled_by!r}, the data module scales "
                f"by {kind!r}: "
                f"set its input_scaling to {self._scaled_by!r}"
            )
        hook_name = getattr(datamodule, "sae_metadata", {}).get("hook_name")
        if hook_name is not None and self._hook_name is not None and hook_name != self._hook_name:
            raise ValueError(
                f"{name} is for {self._hook_name}, the data are of {hook_name}: set the data's hook_name "
                f"to {self._hook_name!r}"
            )
        super().setup(stage)
