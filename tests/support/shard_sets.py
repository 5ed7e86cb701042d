"""Small sets of activations on disk, and damage to them."""

from __future__ import annotations

from pathlib import Path

import torch

from aen_lightning.shards import Manifest, ShardFolder, ShardStream

HOOK = "blocks.0.hook_resid_post"


def write_set(
    folder: Path,
    sizes: list[int],
    *,
    d_in: dict[str, int] | None = None,
    dtype: str = "float32",
    context_size: int = 4,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A finished set with random rows, appended in pieces of 3; returns what it should hold."""
    d_in = d_in or {HOOK: 6}
    generator = torch.Generator().manual_seed(0)
    expected = {
        h: torch.randn(sum(sizes), d, generator=generator).to(getattr(torch, dtype)) for h, d in d_in.items()
    }
    ids = torch.arange(sum(sizes), dtype=torch.int32)
    writer = ShardFolder(folder)
    writer.begin(
        Manifest(
            d_in, dtype, context_size, metadata={"model_name": "tiny", "hook_name": HOOK}, n_shards=len(sizes)
        )
    )
    at = 0
    for index, size in enumerate(sizes):
        stream = ShardStream(folder, index, d_in, dtype, capacity=size + 5)  # room that filters leave unused
        for i in range(at, at + size, 3):
            piece = slice(i, min(i + 3, at + size))
            stream.append({h: x[piece] for h, x in expected.items()}, ids[piece])
        stream.count(read=size + 1, special=1)
        stream.close()
        at += size
    writer.collect(complete=True)
    return expected, ids


def flip_byte(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
