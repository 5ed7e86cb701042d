"""LightningDataModules that feed an SAE: synthetic spikes, live language models, activation shards."""

from aen_lightning.data.activations import ActivationsDataModule
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.saes.input_scaling import InputScaling

__all__ = ["ActivationsDataModule", "InputScaling", "SpikedDataModule", "TextActivationsDataModule"]
