"""Peak memory (and speed) of coherence on a dictionary of random bf16 weights, beyond the dictionary itself.

python benchmarks/coherence_memory.py                       # 131072 x 4096, the first 20 of 528 blocks
python benchmarks/coherence_memory.py --blocks 0            # all of them: 70 TFLOP, about half an hour on one CPU core

The claim: below 6 GB beyond the dictionary. Every block works in the same buffers, so the peak is reached
within the first few; the benchmark prints it after them, and after as many as asked for.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from aen_lightning.diagnostics.coherence import coherence

GIB = 2**30


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-sae", type=int, default=131072)
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--chunk-size", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=20, help="pairs of chunks to work through; 0: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    W_dec = torch.empty(args.d_sae, args.d_in, dtype=torch.bfloat16)
    for rows in W_dec.split(
        4096
    ):  # in place: normal_ of a bf16 tensor would not make a float32 copy, randn().to() would
        rows.normal_()
    coherence(torch.randn(8, 8))  # what torch allocates once
    before = peak_gib()
    start = time.perf_counter()
    found = coherence(W_dec, chunk_size=args.chunk_size, max_blocks=args.blocks or None)
    seconds = time.perf_counter() - start

    n_chunks = -(-args.d_sae // args.chunk_size)
    n_blocks = n_chunks * (n_chunks + 1) // 2
    done = min(args.blocks or n_blocks, n_blocks)
    result = {
        "d_sae": args.d_sae,
        "d_in": args.d_in,
        "chunk_size": args.chunk_size,
        "blocks": done,
        "blocks_in_all": n_blocks,
        "dictionary_gib": W_dec.numel() * W_dec.element_size() / GIB,
        "peak_gib": peak_gib(),
        "beyond_dictionary_gib": peak_gib() - before,
        "seconds": seconds,
        "seconds_in_all_estimated": seconds * n_blocks / done,
        "max_abs_cosine": float(found.max_abs_cosine.max()),
    }
    for name, value in result.items():
        print(f"{name:26} {value:,.3f}" if isinstance(value, float) else f"{name:26} {value:,}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
