"""Registration of an architecture of this package with SAELens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sae_lens import SAE, TrainingSAE, TrainingSAEConfig, register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig


def register_architecture(
    sae_class: type[SAE[Any]],
    config_class: type[SAEConfig],
    training_sae_class: type[TrainingSAE[Any]],
    training_config_class: type[TrainingSAEConfig],
) -> None:
    """Register both classes; a second call, or a reload of their module, does no harm.

    Raises:
        ValueError: If another package has registered the name.
    """
    _register(SAE_CLASS_REGISTRY, register_sae_class, sae_class, config_class)
    _register(
        SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, training_sae_class, training_config_class
    )


def _register(
    registry: dict[str, tuple[Any, Any]],
    register_fn: Callable[..., None],
    sae_class: type[SAE[Any]],
    config_class: type[SAEConfig],
) -> None:
    name = config_class.architecture()
    known = registry.get(name)
    if known is not None and known[0].__module__ != sae_class.__module__:
        raise ValueError(
            f"SAELens already has an architecture {name!r} from {known[0].__module__}; "
            "import only one package that registers it"
        )
    # A reloaded module has new classes: the registry must hand out those.
    registry.pop(name, None)
    register_fn(name, sae_class, config_class)
