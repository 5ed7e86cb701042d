"""The code of a dictionary on held-out tokens: where each feature fires, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from scipy.sparse import csc_array

from aen_lightning.evaluate.dictionary import scaled_space, to_scaled_space, tokens_per_chunk
from aen_lightning.evaluate.inputs import Inputs, ShardInputs, TextInputs
from aen_lightning.metrics import ACTIVE_THRESHOLD

MAX_ACTIVATIONS = 2**27
"""Most non-zero activations held at once: 8 bytes each, 1 GiB, and as much again while they are sorted."""


@dataclass
class Activations:
    """The code of a dictionary on rows of tokens.

    Args:
        tokens: Token ids, (n_rows, context); -1 where a row is filled up.
        keep: Whether a token counts, (n_rows, context), bool; special tokens and outliers do not.
        feature_acts: Non-zero activations, (n_rows * context, d_sae), sparse by column.
    """

    tokens: NDArray[np.int64]
    keep: NDArray[np.bool_]
    feature_acts: csc_array[Any]

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.keep.sum())

    def of(self, feature: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Where a feature fires (numbers of tokens, ascending), and how strongly."""
        matrix = self.feature_acts
        part = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
        return matrix.indices[part], matrix.data[part]


@torch.no_grad()
def collect_activations(sae: SAE[Any], inputs: Inputs) -> Activations:
    """Encode held-out tokens, in one pass, and keep what fires.

    Args:
        sae: From ``load_dictionary``.
        inputs: Text, or shards with token ids.

    Raises:
        ValueError: If the inputs have no tokens, or more fires than memory is meant for.
    """
    tokens = _tokens(inputs)
    keep, rows, columns, values, n_active = np.zeros(tokens.shape, dtype=bool), [], [], [], 0
    for batch in inputs.counted("looking where features fire"):
        flat, kept = batch.x.flatten(0, 1), batch.keep.flatten().cpu()
        keep[batch.first_unit : batch.first_unit + len(batch.keep)] = batch.keep.cpu().numpy()
        for index in kept.nonzero().squeeze(-1).split(tokens_per_chunk(sae)):
            x = to_scaled_space(sae, flat[index.to(flat.device)])
            with scaled_space(sae):
                h = sae.encode(x.to(sae.dtype))
            h = h.to_dense() if h.is_sparse else h
            token, feature = (h.abs() > ACTIVE_THRESHOLD).nonzero(as_tuple=True)
            values.append(h[token, feature].float().cpu().numpy())
            rows.append((index[token.cpu()] + batch.first_unit * tokens.shape[1]).numpy().astype(np.int32))
            columns.append(feature.cpu().numpy().astype(np.int32))
            n_active += len(token)
            if n_active > MAX_ACTIVATIONS:
                raise ValueError(
                    f"more than {MAX_ACTIVATIONS:,} activations (L0 is about "
                    f"{n_active / max(1, keep.sum()):,.0f}): take fewer tokens, "
                    "with --n_rows for text or --n_tokens for shards"
                )
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return Activations(tokens, keep, csc_array(entries, shape=(tokens.size, sae.cfg.d_sae)))


def _tokens(inputs: Inputs) -> NDArray[np.int64]:
    if isinstance(inputs, TextInputs):
        return inputs.rows.numpy().astype(np.int64)
    if isinstance(inputs, ShardInputs):
        ids = inputs.source.token_ids()
        if ids is None:
            raise ValueError(f"{inputs.source.path} has no token ids, so there are no texts to show")
        mine = ids[inputs.start : inputs.start + inputs.n_rows].numpy().astype(np.int64)
        filled = np.pad(mine, (0, inputs.n_units * inputs.unit - len(mine)), constant_values=-1)
        return filled.reshape(inputs.n_units, inputs.unit)
    raise ValueError(
        "pages of features need text, or shards with token ids; a dictionary of synthetic data has neither"
    )
