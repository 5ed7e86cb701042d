"""The options of data modules that read text, each said once. Constructors and command lines take them one by
one."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sae_lens.util import get_special_token_ids

from aen_lightning.data.documents import HfDataset, open_dataset
from aen_lightning.data.mixing import MixingBuffer
from aen_lightning.data.token_filter import TokenFilter
from aen_lightning.files.redaction import without_secrets
from aen_lightning.language_model.source import LanguageModelOptions
from aen_lightning.saes.input_scaling import ScalingKind
from aen_lightning.spelling import suggest

# jsonargparse reads the types of inherited fields as they are: `from __future__ import annotations` would
# make strings of them


def require_at_least(least: int, **options: float | None) -> None:
    """Refuse an option below ``least``; None passes.

    Raises:
        ValueError: Names the option.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def refuse_unknown(options: Mapping[str, Any], accepted: Callable[..., Any], *others: str) -> None:
    """Refuse an option that ``accepted``, which takes them all, has no parameter for.

    Args:
        options: By name.
        accepted: E.g. a dataclass.
        others: Further names that the caller takes itself.

    Raises:
        TypeError: Names the option and the nearest that exists.
    """
    known = [*others, *inspect.signature(accepted).parameters]
    for name in options:
        if name not in known:
            raise TypeError(
                f"there is no option {name!r}{suggest(name, known)}; there are {', '.join(sorted(known))}"
            )


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Which documents are read, and how they become rows of tokens.

    Args:
        dataset_path: Hub name, folder, file, glob, or list of files: see
            ``aen_lightning.data.documents.open_dataset``.
        dataset_name: Subset of a Hub dataset.
        dataset_split: Which split to read, e.g. ``train``, or, not streamed, ``train[:-500]``.
        streaming: Read the dataset as the run goes instead of loading it first.
        text_column: Column with text or token ids; None finds it.
        context_size: Tokens a row.
        prepend_bos: Begin every row with BOS.
        sequence_separator_token: Between documents: ``bos``, ``eos``, ``sep``, a token id, or None.
        exclude_special_tokens: Leave out activations at BOS, EOS, PAD and SEP tokens; the model still sees
            these.
        exclude_token_ids: Leave out activations at these tokens, too.
        stream_retries: Failures in a row that reading the dataset survives.
        stream_backoff_seconds: Wait after the first of them, then doubled; each wait is announced.

    Raises:
        ValueError: For a value out of range.
    """

    dataset_path: str | list[str] | None = None
    dataset_name: str | None = None
    dataset_split: str = "train"
    streaming: bool = False
    text_column: str | None = None
    context_size: int = 128
    prepend_bos: bool = False
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "eos"
    exclude_special_tokens: bool = True
    exclude_token_ids: Sequence[int] = ()
    stream_retries: int = 5
    stream_backoff_seconds: float = 2.0

    def __post_init__(self) -> None:
        require_at_least(1, context_size=self.context_size)
        require_at_least(
            0, stream_retries=self.stream_retries, stream_backoff_seconds=self.stream_backoff_seconds
        )

    def excluded_token_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Ids of tokens to leave out, ascending; of a tokenizer that is None no special tokens are known."""
        special = self.exclude_special_tokens and tokenizer is not None
        return tuple(
            sorted({*(get_special_token_ids(tokenizer) if special else ()), *self.exclude_token_ids})
        )

    def metadata(self) -> dict[str, Any]:
        """What an SAE should say of the text it was trained on, in SAELens's metadata keys."""
        names = (
            "dataset_path", "dataset_name", "dataset_split", "context_size", "prepend_bos",
            "sequence_separator_token", "exclude_special_tokens",
        )  # fmt: skip
        return dict(without_secrets({name: getattr(self, name) for name in names}))

    def require_dataset_path(self) -> str | list[str]:
        """``dataset_path``.

        Raises:
            ValueError: If it is None.
        """
        if self.dataset_path is None:
            raise ValueError(
                "dataset_path is missing: give a Hub name, a folder or files (or, in Python, dataset=)"
            )
        return self.dataset_path

    def open_dataset(self) -> HfDataset:
        """The documents; errors as ``aen_lightning.data.documents.open_dataset``."""
        path = self.require_dataset_path()
        return open_dataset(path, name=self.dataset_name, split=self.dataset_split, streaming=self.streaming)


@dataclass(frozen=True, kw_only=True)
class TextOptions(DatasetOptions, LanguageModelOptions):
    """A stream of a language model's activations on text.

    Args:
        hook_name: Where activations are taken, see ``aen_lightning.language_model.hook_points.resolve_hook``;
            or a list of such names.
        store_batch_size_prompts: Rows a model call.
        train_batch_size_tokens: Tokens a training batch, on each rank.
        buffer_size_tokens: Tokens that set off shuffling; None: the larger of 8 training batches and 2 model
            calls.
        activations_mixing_fraction: Share of the buffer kept for the next round, in [0, 1]; 0: no shuffling.
        norm_outlier_multiple: Leave out tokens whose norm is above this multiple of the median norm in their
            model call (attention sinks), at any of the hook points; None: none.
        input_scaling: ``none``; ``per_token``: each row to norm sqrt(d_in); ``average``: all rows by one
            factor, which makes the mean norm sqrt(d_in).
        n_batches_for_norm_estimate: Model calls on the beginning of the dataset for that factor; training
            loses none.
        held_out_documents: The first so many documents are kept from training; 0: no validation and no test.
        n_eval_batches: Most batches a rank in validation and in testing; None: all.
        shuffle_documents: Take documents in a new random order each epoch.
        document_shuffle_buffer: Documents in the shuffle buffer of a streamed dataset.
        seed: Of both shuffles.
        prefetch: Training batches made ahead in a thread.

    Raises:
        ValueError: For a value out of range.
    """

    hook_name: str | list[str] = ""
    store_batch_size_prompts: int = 32
    train_batch_size_tokens: int = 4096
    buffer_size_tokens: int | None = None
    activations_mixing_fraction: float = 0.5
    norm_outlier_multiple: float | None = None
    input_scaling: ScalingKind = "none"
    n_batches_for_norm_estimate: int = 16
    held_out_documents: int = 512
    n_eval_batches: int | None = None
    shuffle_documents: bool = True
    document_shuffle_buffer: int = 1000
    seed: int = 0
    prefetch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(
            1, store_batch_size_prompts=self.store_batch_size_prompts, n_eval_batches=self.n_eval_batches,
            train_batch_size_tokens=self.train_batch_size_tokens,
            n_batches_for_norm_estimate=self.n_batches_for_norm_estimate,
        )  # fmt: skip
        require_at_least(0, held_out_documents=self.held_out_documents, prefetch=self.prefetch)
        if self.held_out_documents == 1:
            raise ValueError(
                "held_out_documents must be 0 or at least 2 (validation and test take half each), got 1"
            )
        if self.input_scaling not in ("none", "per_token", "average"):
            raise ValueError(
                f"input_scaling must be 'none', 'per_token' or 'average', got {self.input_scaling!r}"
            )
        if not self.hook_names:
            raise ValueError("hook_name is missing: give e.g. hook_name='blocks.3.hook_resid_post'")
        # raise for sizes that do not fit
        MixingBuffer(self.buffer_size, self.train_batch_size_tokens, self.activations_mixing_fraction)
        TokenFilter(norm_outlier_multiple=self.norm_outlier_multiple)

    @property
    def hook_names(self) -> list[str]:
        """``hook_name`` as a list."""
        return [
            name for name in ([self.hook_name] if isinstance(self.hook_name, str) else self.hook_name) if name
        ]

    @property
    def buffer_size(self) -> int:
        """Tokens that set off shuffling."""
        if self.buffer_size_tokens is not None:
            return self.buffer_size_tokens
        return max(8 * self.train_batch_size_tokens, 2 * self.store_batch_size_prompts * self.context_size)

    def deciding_order(self) -> dict[str, Any]:
        """The options of which each decides which tokens a run meets when: one resumed with others meets
        others."""
        names = (
            "model_name", "hook_name", "dataset_path", "dataset_name", "dataset_split", "streaming",
            "context_size",
            "prepend_bos", "sequence_separator_token", "store_batch_size_prompts", "train_batch_size_tokens",
            "activations_mixing_fraction", "exclude_special_tokens", "norm_outlier_multiple",
            "held_out_documents",
            "shuffle_documents", "document_shuffle_buffer", "seed",
        )  # fmt: skip
        deciding = {name: getattr(self, name) for name in names}
        return deciding | {
            "exclude_token_ids": list(self.exclude_token_ids),
            "buffer_size_tokens": self.buffer_size,
        }
