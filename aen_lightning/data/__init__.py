"""LightningDataModules that feed an SAE: synthetic spikes, live language models, activation shards."""

from aen_lightning.data.scaling import InputScaling
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.data.text import TextActivationsDataModule

__all__ = ["InputScaling", "SpikedDataModule", "TextActivationsDataModule"]
