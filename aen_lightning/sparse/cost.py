"""What a training step costs on a GPU, by arithmetic: bytes moved and operations, over the rates of a card.

One model for ``aen plan`` and for ``benchmarks/gpu_step.py``, which puts it beside what it measures. The rates are
assumptions about what a kernel sustains, not data sheets; no time is a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Path = Literal["autograd", "dense", "sparse", "sparse, rows"]
"""``autograd``: six products; ``dense``: five (:func:`~aen_lightning.sparse.encode_dense`); ``sparse``: the kernels,
with torch's Adam; ``sparse, rows``: with :class:`~aen_lightning.sparse.RowAdam`."""

_MATRICES = 2  # W_enc and W_dec


@dataclass(frozen=True)
class Card:
    """What a card sustains.

    Args:
        bf16: TFLOP/s of large bf16 products.
        tf32: TFLOP/s of float32 products in TF32.
        fp32: TFLOP/s of float32 products without it.
        bandwidth: TB/s of its memory.
        memory_gib: Its memory.
    """

    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory_gib: float


CARDS = {
    "a100": Card(bf16=250, tf32=120, fp32=18, bandwidth=1.6, memory_gib=80),
    "h100": Card(bf16=720, tf32=400, fp32=51, bandwidth=3.0, memory_gib=80),
    "h200": Card(bf16=720, tf32=400, fp32=51, bandwidth=4.3, memory_gib=141),
}


@dataclass(frozen=True)
class Step:
    """A training step of an SAE.

    Args:
        batch: Tokens.
        d_in: Width of the activations.
        d_sae: Features.
        l0: Mean active features per token.
        low: Whether products run in bfloat16 (``bf16-mixed``); else in float32.
        tf32: Whether float32 products run in TF32.
        silent: Share of features that have not fired for so long that their rows rest.
    """

    batch: int
    d_in: int
    d_sae: int
    l0: float
    low: bool = True
    tf32: bool = False
    silent: float = 0.0

    @property
    def n_weights(self) -> int:
        """Entries of both weight matrices."""
        return _MATRICES * self.d_in * self.d_sae

    def milliseconds(self, card: Card, path: Path) -> dict[str, float]:
        """Predicted time by part; their sum is the step's, launches and the host left out."""
        rate = card.bf16 if self.low else card.tf32 if self.tf32 else card.fp32
        product = 2 * self.batch * self.d_in * self.d_sae / rate / 1e9
        code, width = self.batch * self.d_sae, 2 if self.low else 4
        copies = 6 * self.n_weights if self.low else 0  # read in float32, written in bfloat16

        def moved(n_bytes: float) -> float:
            return n_bytes / card.bandwidth / 1e9

        times: dict[str, float]
        if path in ("autograd", "dense"):
            passes = 26 if path == "autograd" else 12  # over a tensor of the code's size
            times = {
                "products": product * (6 if path == "autograd" else 5),
                "elementwise": moved(passes * code * width + 2 * copies),
            }
        else:
            n = self.batch * self.l0
            read = 4 if path == "sparse" else width  # the decoder's rows: float32, or the optimizer's copy
            tokens = self.batch * self.d_in
            times = {
                # the products stay in the cache for the compaction, so that they cost one pass
                "encoder": product + moved(code * width + (copies / 2 if path == "sparse" else 0)),
                "sort": moved(n * 8 * 16),
                "decode and loss": moved(n * self.d_in * read + tokens * 12),
                # the batch and its gradient are read from the cache at about twice the memory's rate
                "backward": moved(n * self.d_in * 2 * width / 2 + self.n_weights * (4 + 4 / _MATRICES)),
            }
        if path == "sparse, rows":
            moving = 1 - self.silent
            times["norm"] = moved(4 * self.n_weights)
            # weight and both moments read and written, gradient read, copy written
            times["optimizer"] = moved(self.n_weights * moving * (28 + (2 if self.low else 0)))
        else:
            times["clip"] = moved(12 * self.n_weights)
            times["optimizer"] = moved(28 * self.n_weights)
            times["projection"] = moved(12 * self.n_weights / _MATRICES)
        return times

    def gibibytes(self, path: Path) -> dict[str, float]:
        """Predicted memory by part, an allocator's slack and the code itself left out."""
        weights, code = 4 * self.n_weights, self.batch * self.d_sae
        width = 2 if self.low else 4
        memory = {"weights": weights, "gradients": weights, "moments": 2 * weights}
        if self.low:
            # one matrix at a time, or the optimizer's copies of both
            memory["bf16 copies"] = 2 * self.n_weights // (1 if path == "sparse, rows" else _MATRICES)
        if path == "autograd":
            memory["code"] = 3 * code * 4
        elif path == "dense":
            memory["code"] = 2 * code * width
        else:
            memory["code"] = int(2 * self.batch * self.l0 * 64) + 2**24 * width
        return {name: n_bytes / 2**30 for name, n_bytes in memory.items()}
