"""``aen shards verify|info|convert``."""

from __future__ import annotations

from typing import Literal


def verify(path: str) -> None:
    """Check every shard against the manifest: SHA-256, shapes, dtypes.

    Args:
        path: Folder of the set.
    """
    from aen_lightning.cli.output import answer
    from aen_lightning.shards import verify as verified

    manifest = verified(path)
    n_shards, n_tokens = len(manifest.shards), manifest.n_tokens
    answer(
        {"path": path, "n_shards": n_shards, "n_tokens": n_tokens},
        lambda: f"{path}: {n_shards} shards, {n_tokens:,} tokens: all as the manifest says",
    )


def info(path: str) -> None:
    """Say what a set of activations is.

    Args:
        path: Folder of the set.
    """
    from aen_lightning.cli.output import answer
    from aen_lightning.shards import info as describe
    from aen_lightning.shards import open_activations

    text = describe(path)
    source = open_activations(path, allow_incomplete=True, verify="never")
    manifest = getattr(source, "manifest", None)  # SAELens's own format has none
    facts = {
        "path": path,
        "d_in": source.d_in,
        "dtype": str(source.dtype).removeprefix("torch."),
        "context_size": source.context_size,
        "n_tokens": source.n_tokens,
        "metadata": source.metadata,
        "counts": manifest.counts if manifest else {},
        "filters": manifest.filters if manifest else {},
        "n_shards": len(manifest.shards) if manifest else None,
        "complete": manifest.complete if manifest else True,
    }
    answer(facts, lambda: text)


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
