"""The loss of a gated SAE: a penalised gate chooses the features, a second head measures them without shrinkage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aen_lightning.sparse import backend
from aen_lightning.sparse.codes import SparseCode, offsets_of, segment_sums
from aen_lightning.sparse.encoding import nonzero_flat
from aen_lightning.sparse.functions import decode, per_entry, projections
from aen_lightning.sparse.objective import mean_squared_error, penalty_terms
from aen_lightning.sparse.padded import PaddedCode, packed


class GatedLoss(NamedTuple):
    """The terms of the gated objective, scalars of the parameters' dtype, and what the SAE gives.

    ``mse_loss`` and ``gate_mse_loss`` are summed over d_in and averaged over the batch; ``l1_loss`` and ``l2_loss``
    are already weighted. ``sae_out`` is (batch, d_in). ``code`` holds the activations h, without graph.
    """

    mse_loss: Tensor
    gate_mse_loss: Tensor
    l1_loss: Tensor
    l2_loss: Tensor
    sae_out: Tensor
    code: SparseCode

    @property
    def loss(self) -> Tensor:
        """The sum of the four terms."""
        return self.mse_loss + self.gate_mse_loss + self.l1_loss + self.l2_loss


@torch.compiler.disable
def gated_loss(
    x: Tensor,
    gate_code: SparseCode,
    W_enc: Tensor,
    b_gate: Tensor,
    r_mag: Tensor,
    b_mag: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    l1_weights: Tensor | None = None,
    slopes: Tensor | None = None,
    l2_coefficient: float = 0.0,
    apply_b_dec_to_input: bool = True,
) -> GatedLoss:
    r"""Loss of a gated SAE with exact gradients, given the code of its gate.

    With :math:`u = (x - b_{dec}) W_{enc}`, the gate :math:`s = \mathrm{relu}(u + b_{gate})` and the activations
    :math:`h = 1[u + b_{gate} > 0] \, \mathrm{relu}(e^{r_{mag}} u + b_{mag})`,

    .. math::
        \frac1B \sum_b \|h_b W_{dec} + b_{dec} - x_b\|^2 + \|s_b \bar W_{dec} + \bar b_{dec} - x_b\|^2
        + \sum_j \mathtt{l1\_weights}_j \, \mathtt{slopes}_{bj} \, s_{bj} + l_2 \sum_j s_{bj}^2

    where a bar stops the gradient. The support of h lies in that of s: one encoder product serves both.

    Args:
        x: (batch, d_in) activations.
        gate_code: ``encode(x, W_enc, b_gate, b_dec)``, from the same, unchanged parameters.
        W_enc: (d_in, d_sae).
        b_gate: (d_sae,).
        r_mag: (d_sae,) logarithm of the magnitude head's scale.
        b_mag: (d_sae,).
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
        l1_weights: (d_sae,) as for :func:`~aen_lightning.sparse.loss`, on the gate.
        slopes: (nnz,) as there, on the gate.
        l2_coefficient: Of the gate's squared values.
        apply_b_dec_to_input: Whether the code was made with ``b_dec`` subtracted from ``x``.
    Raises:
        ValueError: If the code belongs to another batch or dictionary size.
    Source: Rajamanoharan et al. (2024), arXiv:2404.16014, with a weighted penalty and a ridge term.
    """
    expected = (x.shape[0], W_dec.shape[0])
    if gate_code.shape != expected:
        raise ValueError(f"the code is {gate_code.shape}, but x and W_dec make (batch, d_sae) = {expected}")
    with torch.autocast(x.device.type, enabled=False):
        shift = b_dec if apply_b_dec_to_input else None
        u = projections(x, W_enc, b_gate, shift, gate_code)
        gate = u + per_entry(b_gate, gate_code)
        h = torch.relu(per_entry(r_mag.exp(), gate_code) * u + per_entry(b_mag, gate_code))
        sae_out = decode(h, W_dec, b_dec, gate_code)
        gate_out = decode(gate, W_dec.detach(), b_dec.detach(), gate_code)
        return GatedLoss(
            mean_squared_error(sae_out, x),
            mean_squared_error(gate_out, x),
            *penalty_terms(gate, gate_code, l1_weights, slopes, l2_coefficient),
            sae_out,
            positive_entries(gate_code, h.detach()),
        )


def positive_entries(code: SparseCode, values: Tensor) -> SparseCode:
    """The code with other values, less the entries that are not positive in them."""
    if backend.triton_serves(values.device):
        used = torch.arange(values.numel(), device=values.device) < code.feature_offsets[-1]
        kept = used & ((values <= 0) == 0)
        n_entries = None
        if isinstance(code, PaddedCode):  # one that overflowed stays so
            n_entries = code.counts.sum()
        return packed(code.tokens, code.features, values, kept, code.shape, segment_sums, n_entries)
    kept = nonzero_flat(values <= 0)
    features = code.features[kept]
    return SparseCode(
        offsets_of(features, code.shape[1]), code.tokens[kept], features, values[kept], code.shape
    )
