"""Adaptive elastic net SAEs (AEN-SAE, arXiv:2605.05341) for SAELens, trained with PyTorch Lightning.

Importing this package registers the SAELens architecture ``aen``; that is its only side effect. It imports
torch, SAELens and Lightning only when one of its names is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aen_lightning.registration import register_with_sae_lens

if TYPE_CHECKING:
    from aen_lightning.saes.aen import AENSAE, AENTrainingSAE
    from aen_lightning.saes.aen_config import AENSAEConfig, AENTrainingSAEConfig
    from aen_lightning.training.module import SAEModule

__version__ = "0.1.0"

__all__ = [
    "AENSAE",
    "AENSAEConfig",
    "AENTrainingSAE",
    "AENTrainingSAEConfig",
    "SAEModule",
    "__version__",
]

_MODULES = {
    "AENSAE": "aen_lightning.saes.aen",
    "AENSAEConfig": "aen_lightning.saes.aen_config",
    "AENTrainingSAE": "aen_lightning.saes.aen",
    "AENTrainingSAEConfig": "aen_lightning.saes.aen_config",
    "SAEModule": "aen_lightning.training.module",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_sae_lens()
