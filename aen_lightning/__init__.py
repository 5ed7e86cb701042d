"""Adaptive elastic net SAEs (AEN-SAE, arXiv:2605.05341) for SAELens, trained with PyTorch Lightning.

Importing this package registers the SAELens architecture ``aen``; that is its only side effect.
"""

from aen_lightning.saes.aen import AENSAE, AENSAEConfig, AENTrainingSAE, AENTrainingSAEConfig, register
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

register()
