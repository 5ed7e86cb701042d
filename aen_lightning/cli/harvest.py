"""``aen harvest``."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from aen_lightning.cli.training import prepare_arguments
from aen_lightning.harvest import HarvestDataModule, HarvestModule, ShardWriter, run_harvest


class HarvestCLI(LightningCLI):
    """LightningCLI with the section ``shards``, and arguments that are given once."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See the class."""
        parser.add_lightning_class_args(ShardWriter, "shards")
        parser.link_arguments("model.model_name", "data.model_name")
        parser.link_arguments("model.revision", "data.revision")


def harvest_command(args: Sequence[str]) -> int:
    """Harvest activations to disk with a recipe's settings; run again it goes on where it stopped."""
    prepare_arguments(args)
    cli = HarvestCLI(HarvestModule, HarvestDataModule, run=False, save_config_callback=None)
    manifest = run_harvest(cli.trainer, cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        print(f"{manifest.n_tokens:,} tokens in {len(manifest.shards)} shards")
    return 0
