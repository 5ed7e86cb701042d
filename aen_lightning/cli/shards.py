"""``aen shards verify|info|convert``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from aen_lightning.files import DTYPES
from aen_lightning.shards.convert import convert
from aen_lightning.shards.read import info, verify


def add_shards_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the subcommands of ``aen shards``; ``run_shards`` acts on what it parsed."""
    commands = parser.add_subparsers(dest="shards_command", required=True)
    for name, text in (
        ("verify", "check every shard against the manifest: SHA-256, shapes, dtypes"),
        ("info", "say what a set of activations is"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("path", help="folder of the set")
    text = "convert shards to SAELens's cached-activation dataset, or that to shards"
    sub = commands.add_parser("convert", help=text, description=text)
    sub.add_argument("path", help="folder of shards, or of a dataset that SAELens cached")
    sub.add_argument("target", help="new folder")
    sub.add_argument("--dtype", choices=list(DTYPES), help="of the new set (SAELens's has no bfloat16)")
    sub.add_argument("--force-disk", action="store_true", help="begin even if the disk seems too small")


def run_shards(args: argparse.Namespace) -> None:
    """Do what ``aen shards`` was asked; raises ``ShardError`` for a damaged set."""
    if args.shards_command == "verify":
        manifest = verify(args.path)
        print(f"{args.path}: {len(manifest.shards)} shards, {manifest.n_tokens:,} tokens: all as the manifest says")
    elif args.shards_command == "info":
        print(info(args.path))
    else:
        done = convert(args.path, args.target, dtype=args.dtype, force_disk=args.force_disk)
        print(f"{done.path}: {done.n_tokens:,} tokens in {done.dtype}")
        for note in done.notes:
            print(f"note: {note}")


def shards_command(args: Sequence[str]) -> int:
    """``aen shards verify|info|convert``."""
    parser = argparse.ArgumentParser(prog="aen shards", description="Look after sets of activations on disk.")
    add_shards_arguments(parser)
    run_shards(parser.parse_args(args))
    return 0
