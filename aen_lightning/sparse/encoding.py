"""From activations to a code: the encoder product in blocks that fit the cache, and what is kept of each block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from aen_lightning.sparse import backend
from aen_lightning.sparse.codes import SparseCode, csr, offsets_of
from aen_lightning.sparse.low_copies import low_copy
from aen_lightning.sparse.padded import PaddedCode, padded_code
from aen_lightning.sparse.precision import full_sums
from aen_lightning.sparse.screening import screen_features, screen_tokens, screening_pays

# One block of pre-activations: 16 MiB in float32. Larger blocks leave the cache (and glibc maps them anew each
# time), smaller ones waste the packing that BLAS does for every product.
BLOCK_ELEMENTS = 2**22
_MIN_FEATURES = 256
# Room for one activation in 64: by arithmetic twice the density up to which a GPU gains (not measured).
_CAPACITY_SHARE = 64
_MIN_CAPACITY = 2**12
_KERNEL_BLOCK_ELEMENTS = 2**24  # 4096 features of 4096 tokens: meant to fit a GPU's cache (not measured)
# Above this share of candidates in a block, the full-precision product of the block is cheaper than its samples.
_MAX_CANDIDATES = 0.02
_ALL_TRUE = 0x0101010101010101  # eight True bytes, in either byte order

Entries = tuple[Tensor, Tensor, Tensor]
"""Tokens, features and values of some entries of a code, by feature and then by token."""


def check_shapes(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless these can be encoded with each other."""
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[0]:
        raise ValueError(
            f"x must be (batch, d_in) and W_enc (d_in, d_sae), got {tuple(x.shape)} and "
            f"{tuple(W_enc.shape)}; "
            "flatten leading dimensions of x first"
        )
    if not x.shape[0]:
        raise ValueError("x has no tokens: a mean over an empty batch is undefined; drop empty batches")
    if b_enc.shape != W_enc.shape[1:]:
        raise ValueError(f"b_enc must be (d_sae,) = ({W_enc.shape[1]},), got {tuple(b_enc.shape)}")
    if b_dec is not None and b_dec.shape != W_enc.shape[:1]:
        raise ValueError(f"b_dec must be (d_in,) = ({W_enc.shape[0]},), got {tuple(b_dec.shape)}")
    if W_enc.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"the sparse step needs float32 or float64 parameters, got {W_enc.dtype}; "
            "for lower precision keep float32 parameters and use autocast (Lightning: precision 'bf16-mixed')"
        )


def encoder_input(x: Tensor, W_enc: Tensor, b_dec: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """What the encoder multiplies: ``x`` less ``b_dec`` unless that is None, computed in the parameters' dtype.

    ``dtype`` is that of the result; None: the parameters'.
    """
    x, dtype = x.detach().to(W_enc.dtype), dtype or W_enc.dtype
    if b_dec is None:
        return x.to(dtype)
    if dtype == x.dtype:
        return x - b_dec.detach()
    # on a GPU one pass: no difference in full precision is written
    return torch.sub(x, b_dec.detach(), out=torch.empty_like(x, dtype=dtype))


def product_dtype(W_enc: Tensor) -> torch.dtype:
    """Dtype of the encoder product: that of autocast where it is on, as in the dense ``x @ W_enc``."""
    device_type = W_enc.device.type
    if W_enc.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return W_enc.dtype


class EncoderBlocks:
    """The encoder product of one batch, a block of features at a time; iterates over each block's first feature.

    Args:
        x: (batch, d_in).
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        b_dec: (d_in,) or None.
        screen: As in :func:`encode`.
        block_elements: As in :func:`encode`.
    """

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        screen: bool | None,
        block_elements: int,
    ) -> None:
        check_shapes(x, W_enc, b_enc, b_dec)
        dtype = product_dtype(W_enc)
        if screen is None:
            screen = dtype == W_enc.dtype and screening_pays(x.device, dtype)
        elif screen and dtype != torch.float32:
            raise ValueError(
                f"screen=True needs a float32 encoder product, but this one is {dtype}; use screen=None"
            )
        self.batch, self.d_sae, self.dtype = x.shape[0], W_enc.shape[1], W_enc.dtype
        # a copy that the optimizer keeps spares the cast
        kept = low_copy(W_enc, dtype)
        self._weight, self._bias = (W_enc.detach() if kept is None or screen else kept).t(), b_enc.detach()
        self._step = _features_per_block(self.batch, self.d_sae, block_elements)
        inputs = encoder_input(x, W_enc, b_dec)
        self._tokens_side = screen_tokens(inputs).t() if screen else None
        self._inputs = inputs.to(dtype)
        self._buffer = inputs.new_empty(
            (min(self._step, self.d_sae), self.batch), dtype=torch.bfloat16 if screen else dtype
        )

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, self.d_sae, self._step))

    def entries(self, start: int, floor: Tensor | None = None) -> Entries:
        """The entries of the block at ``start`` that are above ``floor``.

        Args:
            start: The block's first feature.
            floor: (d_sae,) or scalar, at least 0, in the parameters' dtype; None for 0.
        """
        block = slice(start, start + self._step)
        weight, bias = self._weight[block], self._bias[block]
        if floor is not None:
            floor = floor[block] if floor.ndim else floor.expand_as(bias)
        if self._tokens_side is None:
            tokens, features, values = _plain_block(self._inputs.t(), weight, bias, floor, self._buffer)
        else:
            tokens, features, values = _screened_block(
                self._inputs, self._tokens_side, weight, bias, floor, self._buffer
            )
        return tokens, features + start, values

    def code_by_kernels(self, floor: Tensor | None) -> SparseCode:
        """The code of all blocks by the Triton kernels, with one synchronisation at the end, to learn its size.

        Args:
            floor: (d_sae,), at least 0, in the parameters' dtype; None for 0.
        """
        code = self.padded_code(floor, max(_MIN_CAPACITY, self.batch * self.d_sae // _CAPACITY_SHARE))
        return (self.padded_code(floor, code.nnz) if code.overflowed else code).trimmed()

    def padded_code(self, floor: Tensor | None, capacity: int) -> PaddedCode:
        """As :meth:`code_by_kernels`, without a synchronisation, in tensors of the given capacity."""
        from aen_lightning.sparse import triton_kernels

        bias = self._bias.contiguous()
        floor = torch.zeros_like(bias) if floor is None else floor.contiguous()
        offsets = torch.zeros(self.d_sae + 1, dtype=torch.int64, device=bias.device)
        tokens, features = (torch.zeros(capacity, dtype=torch.int64, device=bias.device) for _ in range(2))
        values, sums = bias.new_zeros(capacity), torch.empty_like(bias)
        for start in self:
            block = slice(start, start + self._step)
            weight = self._weight[block].to(self._inputs.dtype)
            z = torch.mm(weight, self._inputs.t(), out=self._buffer[: weight.shape[0]])
            triton_kernels.compact(
                z, bias[block], floor[block], start, offsets, tokens, features, values, sums
            )
        return padded_code(offsets, tokens, features, values, sums, (self.batch, self.d_sae))

    def code(self, parts: list[Entries]) -> SparseCode:
        """The code of all entries kept; they lie in feature order."""
        tokens, features, values = joined(parts)
        return SparseCode(
            offsets_of(features, self.d_sae), tokens, features, values, (self.batch, self.d_sae)
        )


def joined(parts: list[Entries]) -> Entries:
    """The parts one after the other."""
    tokens, features, values = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(features), torch.cat(values)


@torch.compiler.disable
@torch.no_grad()
def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    screen: bool | None = None,
    capacity: int | None = None,
    block_elements: int | None = None,
) -> SparseCode:
    """Code of a ReLU SAE, ``relu((x - b_dec) @ W_enc + b_enc)``, or of a JumpReLU SAE, as its non-zeros.

    The product runs in blocks of features, so that no (batch, d_sae) tensor ever exists. Under autocast it runs in
    autocast's dtype, like the dense product; the bias is added in the parameters' dtype.

    Args:
        x: (batch, d_in) activations, as the loss will see them. Cast to the parameters' dtype.
        W_enc: (d_in, d_sae), float32 or float64; fastest when feature-major (:func:`feature_major_`).
        b_enc: (d_sae,).
        b_dec: (d_in,), subtracted from ``x`` first; None for ``apply_b_dec_to_input=False``.
        threshold: (d_sae,) of a JumpReLU SAE: a positive pre-activation is kept, whole, where it is above its
            feature's threshold. No gradient reaches it. None for ReLU.
        screen: Rule out negative pre-activations with a certified bfloat16 product and compute the rest in full
            precision (:mod:`aen_lightning.sparse.screening`). The same code to rounding. None: where it pays.
        capacity: Entries to make room for. Where the kernels of this package run, the code is then a
            :class:`PaddedCode`, and the host waits for nothing; look at its ``overflowed`` before you use a result.
        block_elements: Pre-activations in memory at a time, rounded to whole features; None: by device.
    Returns:
        The code, without autograd graph: :func:`~aen_lightning.sparse.loss` knows its derivative.
    Raises:
        ValueError: If shapes disagree, or ``screen`` is asked for in another dtype than float32 or under autocast.
        TypeError: If the parameters are neither float32 nor float64.
    """
    if threshold is not None:
        if threshold.shape != b_enc.shape:
            raise ValueError(
                f"threshold must be (d_sae,) = {tuple(b_enc.shape)}, got {tuple(threshold.shape)}; "
                "expand one threshold for all features"
            )
        threshold = threshold.detach().to(b_enc.dtype).clamp_min(0)
    kernels = not screen and backend.triton_serves(
        x.device
    )  # they read a block twice at most: nothing to screen
    if block_elements is None:
        block_elements = _KERNEL_BLOCK_ELEMENTS if kernels else BLOCK_ELEMENTS
    blocks = EncoderBlocks(x, W_enc, b_enc, b_dec, False if kernels else screen, block_elements)
    with torch.autocast(x.device.type, enabled=False):
        if kernels:
            if capacity is not None:
                return blocks.padded_code(threshold, capacity)
            return blocks.code_by_kernels(threshold)
        return blocks.code([blocks.entries(start, threshold) for start in blocks])


def nonzero_flat(negative: Tensor) -> Tensor:
    """Flat positions, ascending, where a contiguous bool tensor is False."""
    flat = negative.view(-1)
    if flat.device.type != "cpu" or flat.numel() % 8:
        return flat.logical_not().nonzero().squeeze(1)
    # CPU nonzero() goes element by element; with 99 % True, looking at eight at a time is about four times faster.
    words = (flat.view(torch.int64) != _ALL_TRUE).nonzero().squeeze(1)
    inside = flat.view(-1, 8).index_select(0, words).logical_not_().view(-1).nonzero().squeeze(1)
    return words.index_select(0, inside >> 3).mul_(8).add_(inside & 7)


def _features_per_block(batch: int, d_sae: int, block_elements: int) -> int:
    per_block = block_elements // max(1, batch)
    per_block = max(_MIN_FEATURES, per_block - per_block % 8)
    # Even blocks: the last one is not a sliver.
    n_blocks = -(-d_sae // per_block)
    even = -(-d_sae // n_blocks)
    return min(per_block, even + -even % 8)


def _above(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest ``t`` of ``dtype`` with ``z + bias > 0`` exactly when ``z > t``, for ``z`` of ``dtype``."""
    exact = -bias
    rounded = exact.to(dtype)
    if dtype == bias.dtype:
        return rounded
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.to(bias.dtype) > exact, below, rounded)


def _lowered(bias: Tensor, floor: Tensor | None) -> Tensor:
    """A bias with which every pre-activation above the floor is positive; some that are just below it, too."""
    if floor is None:
        return bias
    return bias - floor + (bias.abs() + floor) * (8 * torch.finfo(bias.dtype).eps)


def _kept(entries: Entries, below: Tensor) -> Entries:
    tokens, features, values = entries
    kept = nonzero_flat(below)
    return tokens.index_select(0, kept), features.index_select(0, kept), values.index_select(0, kept)


# Below: comparisons are `<=` and their complement rather than `>`, so that a NaN stays.


def _plain_block(x_t: Tensor, weight: Tensor, bias: Tensor, floor: Tensor | None, buffer: Tensor) -> Entries:
    """Entries of ``weight @ x_t + bias`` above the floor, 0 if None; features count within the block."""
    batch = x_t.shape[1]
    z = torch.mm(weight.to(x_t.dtype), x_t, out=buffer[: weight.shape[0]])
    # Comparing with the bias saves a pass to add it.
    at = nonzero_flat(z <= _above(_lowered(bias, floor), z.dtype).unsqueeze(1))
    features = at.div(batch, rounding_mode="floor")
    values = z.view(-1).index_select(0, at).to(bias.dtype) + bias.index_select(0, features)
    entries = at - features * batch, features, values
    return entries if floor is None else _kept(entries, values <= floor.index_select(0, features))


def _screened_block(
    x: Tensor, tokens_side: Tensor, weight: Tensor, bias: Tensor, floor: Tensor | None, buffer: Tensor
) -> Entries:
    """As :func:`_plain_block`, with the candidates found in bfloat16 and computed in float32."""
    batch = x.shape[0]
    rows = weight.contiguous()  # a no-op when feature-major
    norm = torch.linalg.vector_norm(rows, dim=1)
    side = screen_features(rows, norm, _lowered(bias, floor))
    with full_sums(x.device):  # the bound covers sums in float32 only
        upper = torch.mm(side, tokens_side, out=buffer[: rows.shape[0]])
    # The sign bit of a bfloat16 is that of its bits as an int16, which is read several times faster than comparing.
    # A bound of exactly 0 counts as a candidate, which is safe.
    at = nonzero_flat(torch.signbit(upper.view(torch.int16)))
    # The sign bit of a NaN is arbitrary, so a diverged encoder takes the plain product, which keeps it.
    if at.numel() > _MAX_CANDIDATES * upper.numel() or not bool(torch.isfinite(norm).all()):
        return _plain_block(x.t(), rows, bias, floor, x.new_empty((rows.shape[0], batch)))
    features = at.div(batch, rounding_mode="floor")
    tokens = at - features * batch
    zeros = x.new_zeros(at.numel())
    candidates = csr(offsets_of(features, rows.shape[0]), tokens, zeros, (rows.shape[0], batch))
    values = torch.sparse.sampled_addmm(candidates, rows, x.t(), beta=0.0).values()
    values = values + bias.index_select(0, features)
    below = values <= (0 if floor is None else floor.index_select(0, features))
    return _kept((tokens, features, values), below)


@torch.no_grad()
def feature_major_(W_enc: nn.Parameter) -> None:
    """Store an encoder weight feature by feature, in place: same shape, values and state dict key, strides (1, d_in).

    Every product of the sparse step reads or writes whole features. In this layout the weight's gradient is born in
    place, and neither the weight nor the gradient is transposed at each step. Autograd, the optimizers and
    checkpoints keep the layout. safetensors does not store strided tensors: call ``.contiguous()`` when saving. FSDP
    shards contiguous parameters only.
    """
    W_enc.data = W_enc.data.t().contiguous().t()
