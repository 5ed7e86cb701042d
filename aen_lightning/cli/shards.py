"""``aen shards verify|info|convert``."""

from __future__ import annotations

from typing import Literal


def verify(path: str) -> None:
    """Check every shard against the manifest: SHA-256, shapes, dtypes.

    Args:
        path: Folder of the set.
    """
    from aen_lightning.shards import verify as verified

    manifest = verified(path)
    print(f"{path}: {len(manifest.shards)} shards, {manifest.n_tokens:,} tokens: all as the manifest says")


def info(path: str) -> None:
    """Say what a set of activations is.

    Args:
        path: Folder of the set.
    """
    from aen_lightning.shards import info as describe

    print(describe(path))


def convert(
    path: str,
    target: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    force_disk: bool = False,
) -> None:
    """Convert shards to SAELens's cached-activation dataset, or that to shards.

    Args:
        path: Folder of shards, or of a dataset that SAELens cached.
        target: New folder.
        dtype: Of the new set; SAELens's has no bfloat16. null: the same.
        force_disk: Begin even if the disk seems too small.
    """
    from aen_lightning.shards import convert as converted

    done = converted(path, target, dtype=dtype, force_disk=force_disk)
    print(f"{done.path}: {done.n_tokens:,} tokens in {done.dtype}")
    for note in done.notes:
        print(f"note: {note}")
