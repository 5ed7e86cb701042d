"""The options that say what to evaluate on: of ``aen evaluate``, ``aen diagnose`` and ``aen report``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """Inputs. What is not given comes from the dictionary's metadata.

    Args:
        dataset_path: Documents: a Hub name, a folder, or files (.jsonl, .parquet, .txt, ...).
        shards: Folder of activations on disk, instead of text: no language model, no downstream metrics.
        synthetic: Fresh samples of the synthetic distribution that the dictionary was trained on.
        model_name: Hugging Face name or folder of the language model.
        revision: Of the language model on the Hub.
        model_dtype: Of the language model.
        trust_remote_code: Let code from the language model's repository run. Only if you have read it.
        model_from_pretrained_kwargs: What to load the language model with, as JSON. null: what is harmless of
            the metadata's.
        hook_name: Where activations are taken, e.g. blocks.14.hook_resid_post.
        dataset_name: Subset of a Hub dataset.
        dataset_split: Split to read. null: as trained, else train.
        text_column: Column with text or token ids. null: found.
        streaming: Read the dataset as needed instead of loading it.
        held_out_documents: So many documents at the beginning are the held-out ones. null: as trained, else
            512.
        split: Odd (test) or even (validation) held-out documents.
        n_rows: Rows of text to take; 0: all.
        context_size: Tokens a row.
        prepend_bos: Begin every row with BOS.
        sequence_separator_token: Between documents: bos, eos, sep, none, or a token id.
        exclude_special_tokens: Leave BOS, EOS, PAD and SEP out. null: as in training, else yes.
        exclude_token_ids: Leave these tokens out, too.
        norm_outlier_multiple: Leave out tokens whose norm is above this multiple of the median; 0: none.
        batch_size_prompts: Rows a model call.
        held_out_fraction: Of shards: the share at the end, in (0, 1]; 1: all.
        n_tokens: Of shards and synthetic data: rows to take.
        device: Of language model and dictionary. null: cuda if there is one.
        dtype: Of the dictionary. null: as stored.
    """

    dataset_path: list[str] | None = None
    shards: str | None = None
    synthetic: bool = False
    model_name: str | None = None
    revision: str | None = None
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    hook_name: str | None = None
    dataset_name: str | None = None
    dataset_split: str | None = None
    text_column: str | None = None
    streaming: bool = False
    held_out_documents: int | None = None
    split: Literal["test", "validation"] = "test"
    n_rows: int = 256
    context_size: int | None = None
    prepend_bos: bool | None = None
    sequence_separator_token: int | Literal["bos", "eos", "sep", "none"] | None = None
    exclude_special_tokens: bool | None = None
    exclude_token_ids: list[int] | None = None
    norm_outlier_multiple: float | None = None
    batch_size_prompts: int = 16
    held_out_fraction: float = 0.01
    n_tokens: int | None = None
    device: str | None = None
    dtype: Literal["float32", "float64", "bfloat16"] | None = None
