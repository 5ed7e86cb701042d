"""``aen harvest``."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from aen_lightning.callbacks import RankWatch
from aen_lightning.cli.output import answer
from aen_lightning.cli.summary import harvest_result, harvest_text
from aen_lightning.cli.training import OneLineCLI, errors_of_use, prepare_process
from aen_lightning.harvest import HarvestDataModule, HarvestModule, ShardWriter, run_harvest
from aen_lightning.harvest.writer import writer_of


class HarvestCLI(OneLineCLI):
    """LightningCLI with the sections ``shards`` and ``rank_watch``, and arguments that are given once."""

    def __init__(self, args: Sequence[str]) -> None:
        prepare_process()
        super().__init__(
            HarvestModule,
            HarvestDataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See the class."""
        parser.add_lightning_class_args(ShardWriter, "shards")
        parser.add_lightning_class_args(RankWatch, "rank_watch")
        parser.link_arguments("model.model_name", "data.model_name")
        parser.link_arguments("model.revision", "data.revision")


def harvest(args: Sequence[str]) -> None:
    """Harvest activations to disk with a recipe's settings; run again it goes on where it stopped."""
    cli = HarvestCLI(args)
    with errors_of_use(cli):
        manifest = run_harvest(cli.trainer, cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        result = harvest_result(manifest, writer_of(cli.trainer).path)
        answer(result, lambda: harvest_text(result))
