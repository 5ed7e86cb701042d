"""The exact training step of an SAE, computed on the non-zeros of its code.

After a few hundred steps about 99 % of the feature activations are zero, and every product of the step but the
encoder's can skip them without changing a single number beyond rounding. A step has two stages, because an adaptive
penalty needs the code's statistics before it can weigh the code::

    code = sparse.encode(x, W_enc, b_enc, b_dec)              # no autograd graph
    ...  code.feature_sums, code.feature_counts, code.l0      # statistics: EMA, weights, dead features
    out = sparse.loss(x, code, W_enc, b_enc, W_dec, b_dec, l1_weights=l1 * u, l2_coefficient=l2)
    out.loss.backward()                                       # exact gradients of all four parameters

:func:`encode` makes the code of a ReLU or JumpReLU SAE, :func:`encode_topk` and :func:`encode_batch_topk` that of a
TopK and a BatchTopK one, and :func:`encode_dense` a dense one, for the first steps, when most features still fire:
:func:`loss` takes them all. :func:`gated_loss` is the objective of a gated SAE. :class:`DensitySwitch` chooses between
dense and sparse by the measured density. For an objective of your own, :func:`activations`, :func:`decode` and
:func:`per_entry` are the differentiable parts that these are made of; :func:`positive_entries` is the code that they end in.
Nothing here knows SAELens, Lightning or the penalty's formula: the functions take tensors.
"""

from __future__ import annotations

from aen_lightning.sparse.codes import DenseCode, SparseCode
from aen_lightning.sparse.dense import encode_dense
from aen_lightning.sparse.encoding import encode, feature_major_
from aen_lightning.sparse.functions import activations, decode, per_entry
from aen_lightning.sparse.gated import GatedLoss, gated_loss, positive_entries
from aen_lightning.sparse.objective import SparseLoss, loss
from aen_lightning.sparse.optim import FusedAdam
from aen_lightning.sparse.padded import PaddedCode
from aen_lightning.sparse.row_adam import RowAdam
from aen_lightning.sparse.screening import screening_pays
from aen_lightning.sparse.switch import DensitySwitch
from aen_lightning.sparse.topk import encode_batch_topk, encode_topk

__all__ = [
    "DenseCode",
    "DensitySwitch",
    "FusedAdam",
    "GatedLoss",
    "PaddedCode",
    "RowAdam",
    "SparseCode",
    "SparseLoss",
    "activations",
    "decode",
    "encode",
    "encode_batch_topk",
    "encode_dense",
    "encode_topk",
    "feature_major_",
    "gated_loss",
    "loss",
    "per_entry",
    "positive_entries",
    "screening_pays",
]
