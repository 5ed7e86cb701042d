"""The exact training step of a ReLU (or TopK) SAE, computed on the non-zeros of its code.

After a few hundred steps about 99 % of the feature activations are zero, and every product of the step but the
encoder's can skip them without changing a single number beyond rounding. A step has two stages, because an adaptive
penalty needs the code's statistics before it can weigh the code::

    code = sparse.encode(x, W_enc, b_enc, b_dec)              # no autograd graph
    ...  code.feature_sums, code.feature_counts, code.l0      # statistics: EMA, weights, dead features
    out = sparse.loss(x, code, W_enc, b_enc, W_dec, b_dec, l1_weights=l1 * u, l2_coefficient=l2)
    out.loss.backward()                                       # exact gradients of all four parameters

:func:`encode_topk` makes a TopK code for the same :func:`loss`; :func:`encode_dense` a dense one, for the first
steps, when most features still fire. :class:`DensitySwitch` chooses between them by the measured density.
Nothing here knows SAELens, Lightning or the penalty's formula: the functions take tensors.
"""

from __future__ import annotations

from aen_lightning.sparse.codes import DenseCode, SparseCode
from aen_lightning.sparse.encoding import encode, encode_dense, encode_topk, feature_major_
from aen_lightning.sparse.objective import SparseLoss, loss
from aen_lightning.sparse.optim import FusedAdam
from aen_lightning.sparse.screening import screening_pays
from aen_lightning.sparse.switch import DensitySwitch

__all__ = [
    "DenseCode",
    "DensitySwitch",
    "FusedAdam",
    "SparseCode",
    "SparseLoss",
    "encode",
    "encode_dense",
    "encode_topk",
    "feature_major_",
    "loss",
    "screening_pays",
]
