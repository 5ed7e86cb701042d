"""``aen plan``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import Namespace, namespace_to_dict

from aen_lightning.cli.recipes import find_config
from aen_lightning.harvest.plan import plan


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
