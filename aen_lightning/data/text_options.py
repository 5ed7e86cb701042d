"""What the options of ``TextActivationsDataModule`` may be, and which of them decide the order of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aen_lightning.data.mixing import MixingBuffer

# a run resumed with another value of one of these meets its tokens in another order
RELEVANT_TO_ORDER = (
    "model_name", "hook_name", "dataset_path", "dataset_name", "dataset_split", "streaming", "context_size",
    "prepend_bos", "sequence_separator_token", "store_batch_size_prompts", "train_batch_size_tokens",
    "activations_mixing_fraction", "exclude_special_tokens", "norm_outlier_multiple", "held_out_documents",
    "shuffle_documents", "document_shuffle_buffer", "seed",
)  # fmt: skip


def check_text_options(
    o: dict[str, Any], hook_names: Sequence[str], *, buffer_size: int, has_model: bool, has_dataset: bool
) -> None:
    """See whether the options can work at all, before anything is opened.

    Args:
        o: The arguments of ``TextActivationsDataModule``, by name.
        hook_names: Its ``hook_name`` as a list.
        buffer_size: Tokens that set off shuffling.
        has_model: A model is given as an object.
        has_dataset: A dataset is.

    Raises:
        ValueError: For a value out of range or one that is missing.
    """
    for name in (
        "context_size", "store_batch_size_prompts", "train_batch_size_tokens", "n_batches_for_norm_estimate",
    ):  # fmt: skip
        if o[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {o[name]}")
    for name in ("held_out_documents", "prefetch", "stream_retries", "stream_backoff_seconds"):
        if o[name] < 0:
            raise ValueError(f"{name} must not be negative, got {o[name]}")
    if o["n_eval_batches"] is not None and o["n_eval_batches"] < 1:
        raise ValueError(f"n_eval_batches must be at least 1 or None, got {o['n_eval_batches']}")
    if o["held_out_documents"] == 1:
        raise ValueError("held_out_documents must be 0 or at least 2 (validation and test take half each), got 1")
    if o["norm_outlier_multiple"] is not None and o["norm_outlier_multiple"] <= 1:
        raise ValueError(f"norm_outlier_multiple must be above 1 or None, got {o['norm_outlier_multiple']}")
    if o["input_scaling"] not in ("none", "per_token", "average"):
        raise ValueError(f"input_scaling must be 'none', 'per_token' or 'average', got {o['input_scaling']!r}")
    MixingBuffer(
        buffer_size, o["train_batch_size_tokens"], o["activations_mixing_fraction"]
    )  # raises for sizes that do not fit
    if not hook_names:
        raise ValueError("hook_name is missing: give e.g. hook_name='blocks.3.hook_resid_post'")
    if not has_model and o["model_name"] is None:
        raise ValueError("model_name is missing: give a Hub name or a folder (or, in Python, model=)")
    if not has_dataset and o["dataset_path"] is None:
        raise ValueError("dataset_path is missing: give a Hub name, a folder or files (or, in Python, dataset=)")
