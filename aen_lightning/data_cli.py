"""``aen harvest``, ``aen shards`` and ``aen plan``: activations to disk, and what it takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import Namespace, namespace_to_dict
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from aen_lightning.harvest import HarvestDataModule, HarvestModule, run_harvest
from aen_lightning.harvest.run import add_harvest_arguments
from aen_lightning.plan import plan
from aen_lightning.recipes_index import find_config
from aen_lightning.shards.commands import add_shards_arguments, run_shards
from aen_lightning.training_cli import prepare_arguments


class _HarvestCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_harvest_arguments(parser)


def harvest_command(args: Sequence[str]) -> int:
    """Harvest activations to disk with a recipe's settings; run again it goes on where it stopped."""
    prepare_arguments(args)
    cli = _HarvestCLI(HarvestModule, HarvestDataModule, run=False, save_config_callback=None)
    manifest = run_harvest(cli.trainer, cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        print(f"{manifest.n_tokens:,} tokens in {len(manifest.shards)} shards")
    return 0


def shards_command(args: Sequence[str]) -> int:
    """``aen shards verify|info|convert``."""
    parser = argparse.ArgumentParser(prog="aen shards", description="Look after sets of activations on disk.")
    add_shards_arguments(parser)
    run_shards(parser.parse_args(args))
    return 0


def plan_command(args: Sequence[str]) -> int:
    """Print what a recipe takes, without running it."""
    parser = argparse.ArgumentParser(
        prog="aen plan",
        description="Parameters, memory per rank, disk, FLOPs and time of a recipe of `aen fit` or `aen harvest`, without running it.",
    )
    parser.add_argument("--config", required=True, help="a config file or the name of a recipe")
    parser.add_argument("--tflops-per-s", type=float, help="what one rank sustains, in 1e12 operations per second")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value, such as trainer.devices=4"
    )
    options = parser.parse_args(args)
    config = Namespace(yaml.safe_load(find_config(options.config).read_text(encoding="utf-8")))
    for assignment in options.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {assignment!r}")
        config[key] = yaml.safe_load(value)
    settings: dict[str, Any] = namespace_to_dict(config)
    print(plan(settings, tflops_per_s=options.tflops_per_s))
    return 0
