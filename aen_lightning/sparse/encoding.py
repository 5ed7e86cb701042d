"""From activations to a code: the encoder product in blocks that fit the cache, and the non-zeros of each block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aen_lightning.sparse.codes import DenseCode, SparseCode, csr, offsets_of
from aen_lightning.sparse.screening import screen_features, screen_tokens, screening_pays

# One block of pre-activations: 16 MiB in float32. Larger blocks leave the cache (and glibc maps them anew each time),
# smaller ones waste the packing that BLAS does for every product.
_BLOCK_ELEMENTS = 2**22
_MIN_FEATURES = 256
_MIN_TOKENS = 256
# Above this share of candidates in a block, the full-precision product of the block is cheaper than its samples.
_MAX_CANDIDATES = 0.02
_ALL_TRUE = 0x0101010101010101  # eight True bytes, in either byte order


def _check(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> None:
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[0]:
        raise ValueError(
            f"x must be (batch, d_in) and W_enc (d_in, d_sae), got {tuple(x.shape)} and {tuple(W_enc.shape)}; "
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


def encoder_input(x: Tensor, W_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """What the encoder multiplies: ``x`` in the parameters' dtype, less ``b_dec`` unless that is None."""
    x = x.detach().to(W_enc.dtype)
    return x if b_dec is None else x - b_dec.detach()


def _product_dtype(W_enc: Tensor) -> torch.dtype:
    """Dtype of the encoder product: that of autocast where it is on, as in the dense ``x @ W_enc``."""
    device_type = W_enc.device.type
    if W_enc.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return W_enc.dtype


def _nonzero_flat(negative: Tensor) -> Tensor:
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


@torch.compiler.disable
@torch.no_grad()
def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    screen: bool | None = None,
    block_elements: int = _BLOCK_ELEMENTS,
) -> SparseCode:
    """Code of a ReLU SAE, ``relu((x - b_dec) @ W_enc + b_enc)``, as its non-zeros.

    The product runs in blocks of features, so that no (batch, d_sae) tensor ever exists. Under autocast it runs in
    autocast's dtype, like the dense product; the bias is added in the parameters' dtype.

    Args:
        x: (batch, d_in) activations, as the loss will see them. Cast to the parameters' dtype.
        W_enc: (d_in, d_sae), float32 or float64; fastest when feature-major (:func:`feature_major_`).
        b_enc: (d_sae,).
        b_dec: (d_in,), subtracted from ``x`` first; None for ``apply_b_dec_to_input=False``.
        screen: Rule out negative pre-activations with a certified bfloat16 product and compute the rest in full
            precision (:mod:`aen_lightning.sparse.screening`). The same code to rounding. None: where it pays.
        block_elements: Pre-activations in memory at a time; rounded to whole features.
    Returns:
        The code, without autograd graph: :func:`~aen_lightning.sparse.loss` knows its derivative.
    Raises:
        ValueError: If shapes disagree, or ``screen`` is asked for in another dtype than float32 or under autocast.
        TypeError: If the parameters are neither float32 nor float64.
    """
    _check(x, W_enc, b_enc, b_dec)
    dtype = _product_dtype(W_enc)
    if screen is None:
        screen = dtype == W_enc.dtype and screening_pays(x.device, dtype)
    elif screen and dtype != torch.float32:
        raise ValueError(f"screen=True needs a float32 encoder product, but this one is {dtype}; use screen=None")
    weight, bias = W_enc.detach().t(), b_enc.detach()
    batch, d_sae = x.shape[0], W_enc.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        inputs = encoder_input(x, W_enc, b_dec)
        step = _features_per_block(batch, d_sae, block_elements)
        blocks = range(0, d_sae, step)
        if screen:
            tokens_side = screen_tokens(inputs).t()
            buffer = inputs.new_empty((min(step, d_sae), batch), dtype=torch.bfloat16)
            parts = [
                _screened_block(inputs, tokens_side, weight[j : j + step], bias[j : j + step], buffer) for j in blocks
            ]
        else:
            low = inputs.to(dtype).t()
            buffer = inputs.new_empty((min(step, d_sae), batch), dtype=dtype)
            parts = [_plain_block(low, weight[j : j + step], bias[j : j + step], buffer) for j in blocks]
        tokens = torch.cat([part[0] for part in parts])
        features = torch.cat([part[1] + j for part, j in zip(parts, blocks, strict=True)])
        values = torch.cat([part[2] for part in parts])
        return SparseCode(offsets_of(features, d_sae), tokens, features, values, (batch, d_sae))


def _threshold(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest ``t`` of ``dtype`` with ``z + bias > 0`` exactly when ``z > t``, for ``z`` of ``dtype``."""
    exact = -bias
    rounded = exact.to(dtype)
    if dtype == bias.dtype:
        return rounded
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.to(bias.dtype) > exact, below, rounded)


def _plain_block(x_t: Tensor, weight: Tensor, bias: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Non-zeros of ``relu(weight @ x_t + bias)``: tokens, features (within the block), values; feature-major."""
    batch = x_t.shape[1]
    z = torch.mm(weight.to(x_t.dtype), x_t, out=buffer[: weight.shape[0]])
    # Comparing with the bias saves a pass to add it. `<=` and its complement rather than `>`, so that a NaN stays.
    at = _nonzero_flat(z <= _threshold(bias, z.dtype).unsqueeze(1))
    features = at.div(batch, rounding_mode="floor")
    values = z.view(-1).index_select(0, at).to(bias.dtype) + bias.index_select(0, features)
    return at - features * batch, features, values


def _screened_block(
    x: Tensor, tokens_side: Tensor, weight: Tensor, bias: Tensor, buffer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_plain_block`, with the candidates found in bfloat16 and computed in float32."""
    batch = x.shape[0]
    rows = weight.contiguous()  # a no-op when feature-major
    norm = torch.linalg.vector_norm(rows, dim=1)
    upper = torch.mm(screen_features(rows, norm, bias), tokens_side, out=buffer[: rows.shape[0]])
    # The sign bit of a bfloat16 is that of its bits as an int16, which is read several times faster than comparing. A
    # bound of exactly 0 counts as a candidate, which is safe.
    at = _nonzero_flat(torch.signbit(upper.view(torch.int16)))
    # The sign bit of a NaN is arbitrary, so a diverged encoder takes the plain product, which keeps it.
    if at.numel() > _MAX_CANDIDATES * upper.numel() or not bool(torch.isfinite(norm).all()):
        return _plain_block(x.t(), rows, bias, x.new_empty((rows.shape[0], batch)))
    features = at.div(batch, rounding_mode="floor")
    tokens = at - features * batch
    zeros = x.new_zeros(at.numel())
    candidates = csr(offsets_of(features, rows.shape[0]), tokens, zeros, (rows.shape[0], batch))
    values = torch.sparse.sampled_addmm(candidates, rows, x.t(), beta=0.0).values()
    values = values + bias.index_select(0, features)
    kept = _nonzero_flat(values <= 0)
    return tokens.index_select(0, kept), features.index_select(0, kept), values.index_select(0, kept)


@torch.compiler.disable
@torch.no_grad()
def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    k: int,
    decoder_norm: Tensor | None = None,
    block_elements: int = _BLOCK_ELEMENTS,
) -> SparseCode:
    """Code of a TopK SAE: the k largest pre-activations of each token, negative ones dropped.

    Args:
        x: (batch, d_in) activations.
        W_enc: (d_in, d_sae), float32 or float64.
        b_enc: (d_sae,).
        b_dec: (d_in,), subtracted from ``x`` first, or None.
        k: How many features a token may have, at least 1 and at most d_sae.
        decoder_norm: (d_sae,) ``W_dec.norm(dim=-1)`` for SAELens's ``rescale_acts_by_decoder_norm=True``: features
            are ranked by pre-activation times norm, which are also the activations users see. The reconstruction
            divides by the norm again, so the norm's own gradient cancels and none is computed.
        block_elements: Pre-activations in memory at a time; rounded to whole tokens.
    Raises:
        ValueError: If shapes disagree or k is out of range.
        TypeError: If the parameters are neither float32 nor float64.
    """
    _check(x, W_enc, b_enc, b_dec)
    batch, d_sae = x.shape[0], W_enc.shape[1]
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}")
    dtype = _product_dtype(W_enc)
    weight, bias = W_enc.detach().to(dtype), b_enc.detach()
    scale = None if decoder_norm is None else decoder_norm.detach()
    step = max(_MIN_TOKENS, block_elements // d_sae)
    values, features = [], []
    with torch.autocast(x.device.type, enabled=False):
        inputs = encoder_input(x, W_enc, b_dec).to(dtype)
        for i in range(0, batch, step):
            # The bias promotes a half-precision product, as it does in dense code.
            pre = torch.mm(inputs[i : i + step], weight) + bias
            top = _row_topk(pre if scale is None else pre * scale, k)
            features.append(top)
            values.append(pre.gather(1, top))
    value, feature = torch.cat(values).view(-1), torch.cat(features).view(-1)
    token = torch.arange(batch, device=x.device).repeat_interleave(k)
    kept = _nonzero_flat(value <= 0)
    value, feature, token = value[kept], feature[kept], token[kept]
    order = feature.to(torch.int32).sort(stable=True).indices
    return SparseCode(offsets_of(feature, d_sae), token[order], feature[order], value[order], (batch, d_sae), scale)


_GROUPS_PER_K = 8
_GROUP = 16


def _row_topk(ranked: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row, (rows, k).

    The k largest lie in the k groups whose maxima are largest, so only those groups are ranked: a vectorised maximum
    replaces a selection over the whole row.
    """
    rows, columns = ranked.shape
    n_groups = columns // _GROUP
    if columns % _GROUP or n_groups < _GROUPS_PER_K * k:
        return ranked.topk(k, dim=1, sorted=False).indices
    grouped = ranked.view(
        rows, _GROUP, n_groups
    )  # group g: columns g, g + n_groups, ... so that the maximum vectorises
    groups = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = grouped.gather(2, groups.unsqueeze(1).expand(rows, _GROUP, k)).flatten(1)
    winner = members.topk(k, dim=1, sorted=False).indices
    return groups.gather(1, winner % k) + winner.div(k, rounding_mode="floor") * n_groups


@torch.compiler.disable
@torch.no_grad()
def encode_dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None) -> DenseCode:
    """The code of :func:`encode` as one dense tensor, for batches in which a good part of the features fire.

    Args:
        x: (batch, d_in) activations.
        W_enc: (d_in, d_sae), float32 or float64.
        b_enc: (d_sae,).
        b_dec: (d_in,), subtracted from ``x`` first, or None.
    Raises:
        ValueError: If shapes disagree.
        TypeError: If the parameters are neither float32 nor float64.
    """
    _check(x, W_enc, b_enc, b_dec)
    dtype = _product_dtype(W_enc)
    with torch.autocast(x.device.type, enabled=False):
        inputs = encoder_input(x, W_enc, b_dec)
        pre = torch.mm(inputs.to(dtype), W_enc.detach().to(dtype)).to(W_enc.dtype)
        return DenseCode(pre.add_(b_enc.detach()).relu_())


@torch.no_grad()
def feature_major_(W_enc: nn.Parameter) -> None:
    """Store an encoder weight feature by feature, in place: same shape, values and state dict key, strides (1, d_in).

    Every product of the sparse step reads or writes whole features. In this layout the weight's gradient is born in
    place, and neither the weight nor the gradient is transposed at each step. Autograd, the optimizers and
    checkpoints keep the layout. safetensors does not store strided tensors: call ``.contiguous()`` when saving. FSDP
    shards contiguous parameters only.
    """
    W_enc.data = W_enc.data.t().contiguous().t()
