"""Command-line arguments that say what to evaluate on, for ``aen evaluate`` and ``aen diagnose``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.evaluate.inputs import Inputs, ShardInputs, SyntheticInputs, TextInputs
from aen_lightning.files import DTYPES


def add_input_arguments(parser: argparse.ArgumentParser, *, n_rows: int) -> None:
    """Add the arguments that :func:`open_inputs` reads; ``n_rows`` is the default number of rows of text."""
    add = parser.add_argument_group("inputs (what is not given comes from the dictionary's metadata)").add_argument
    add(
        "--dataset-path",
        nargs="+",
        metavar="PATH",
        help="documents: Hub name, folder, or files (.jsonl, .parquet, .txt, ...)",
    )
    add(
        "--shards",
        metavar="FOLDER",
        help="activations on disk, instead of text: no language model, no downstream metrics",
    )
    add("--synthetic", action="store_true", help="fresh samples of the synthetic distribution it was trained on")
    add("--model-name", help="Hugging Face name or folder of the language model")
    add("--revision", help="of the language model on the Hub")
    add("--model-dtype", choices=list(DTYPES), default="float32", help="of the language model (default: float32)")
    add("--hook-name", help="where activations are taken, e.g. blocks.14.hook_resid_post")
    add("--dataset-name", help="subset of a Hub dataset")
    add("--dataset-split", help="split to read (default: train)")
    add("--text-column", help="column with text or token ids (default: found)")
    add("--streaming", action="store_true", help="read the dataset as needed instead of loading it")
    add("--held-out-documents", type=int, metavar="N",
        help="the first N documents are the held-out ones, as in training (default: as trained, else 512)")  # fmt: skip
    add(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="odd (test) or even (validation) held-out documents",
    )
    add("--n-rows", type=int, default=n_rows, metavar="N", help=f"rows of text to take (default: {n_rows}; 0: all)")
    add("--context-size", type=int, help="tokens a row")
    add("--prepend-bos", action=argparse.BooleanOptionalAction, default=None, help="begin every row with BOS")
    add("--sequence-separator-token", help="between documents: bos, eos, sep, none, or a token id")
    add("--exclude-special-tokens", action=argparse.BooleanOptionalAction, default=None,
        help="leave BOS, EOS, PAD and SEP out (default: as in training, else yes)")  # fmt: skip
    add("--exclude-token-ids", type=int, nargs="*", default=None, metavar="ID", help="leave these tokens out, too")
    add("--norm-outlier-multiple", type=float, metavar="X",
        help="leave out tokens whose norm is above X times the median; 0: none")  # fmt: skip
    add("--batch-size-prompts", type=int, default=16, metavar="N", help="rows a model call (default: 16)")
    add(
        "--held-out-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="of shards: share at the end (default: 0.01; 1: all)",
    )
    add("--n-tokens", type=int, metavar="N", help="of shards and synthetic data: rows to take")
    add("--device", help="of language model and dictionary (default: cuda if there is one)")
    add("--dtype", choices=("float32", "float64", "bfloat16"), help="of the dictionary (default: as stored)")


def device_of(args: argparse.Namespace) -> str:
    """Where to compute."""
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


class InputOpener:
    """Opens the inputs of one dictionary after another, loading a language model only once.

    Args:
        args: Parsed arguments of :func:`add_input_arguments`.
        whole_lm: Whether the whole language model is needed (downstream metrics); else it is cut after the hook.
    """

    def __init__(self, args: argparse.Namespace, *, whole_lm: bool) -> None:
        self.args, self.whole_lm = args, whole_lm
        self._opened: dict[str, Inputs] = {}
        self._lms: dict[str, Any] = {}

    def open(self, sae: SAE[Any]) -> Inputs:
        """The inputs for a dictionary.

        Raises:
            ValueError: If arguments and metadata do not say what to read, or its width is not the dictionary's.
        """
        args, metadata = self.args, sae.cfg.metadata
        synthetic = metadata["synthetic_data"]
        if args.synthetic or (synthetic and not (args.shards or args.dataset_path)):
            if not synthetic:
                raise ValueError(
                    "--synthetic needs a dictionary trained by SpikedDataModule; this one's metadata has no synthetic_data"
                )
            inputs = self._once(f"synthetic {synthetic}", lambda: self._synthetic(synthetic))
        elif args.shards:
            hook_name = args.hook_name or metadata["hook_name"]
            inputs = self._once(f"shards {hook_name}", lambda: self._shards(hook_name))
        else:
            options = self._text_options(metadata)
            inputs = self._once(f"text {options}", lambda: self._text(options, _lm_kwargs(metadata)))
        if inputs.d_in != sae.cfg.d_in:
            raise ValueError(
                f"the dictionary has d_in={sae.cfg.d_in}, but the inputs are {inputs.d_in} wide: another hook or model is needed"
            )
        return inputs

    def _once(self, key: str, make: Any) -> Inputs:
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]

    def _synthetic(self, parameters: dict[str, Any]) -> Inputs:
        return SyntheticInputs(SpikedDataModule(**parameters), n_samples=self.args.n_tokens or 8192)

    def _shards(self, hook_name: str | None) -> Inputs:
        args = self.args
        return ShardInputs(
            args.shards, hook_name, held_out_fraction=args.held_out_fraction, exclude_token_ids=args.exclude_token_ids or (),
            n_tokens=args.n_tokens,
        )  # fmt: skip

    def _text_options(self, metadata: Any) -> dict[str, Any]:
        args = self.args
        model_name = args.model_name or _hugging_face_name(metadata["model_name"], metadata["model_class_name"])
        hook_name = args.hook_name or metadata["hook_name"]
        dataset_path = args.dataset_path or metadata["dataset_path"]
        for name, value in (("model-name", model_name), ("hook-name", hook_name), ("dataset-path", dataset_path)):
            if not value:
                raise ValueError(f"the dictionary's metadata does not say what to read: give --{name} (or --shards)")
        special, given = metadata["exclude_special_tokens"], args.exclude_special_tokens
        excluded = list(args.exclude_token_ids or (special if isinstance(special, list) else ()))
        outliers = (
            metadata["norm_outlier_multiple"] if args.norm_outlier_multiple is None else args.norm_outlier_multiple
        )
        # None is a separator, too: none
        separator = metadata.get("sequence_separator_token", "eos")
        if args.sequence_separator_token is not None:
            text = args.sequence_separator_token
            separator = None if text == "none" else int(text) if text.isdigit() else text
        own_dataset = args.dataset_path is None
        return {
            "model_name": model_name,
            "hook_name": hook_name,
            "revision": args.revision or metadata["revision"],
            "dataset_path": dataset_path,
            "dataset_name": args.dataset_name or (metadata["dataset_name"] if own_dataset else None),
            "dataset_split": args.dataset_split or (metadata["dataset_split"] if own_dataset else None) or "train",
            "text_column": args.text_column,
            "streaming": args.streaming,
            "context_size": args.context_size or metadata["context_size"] or 128,
            "prepend_bos": bool(metadata["prepend_bos"]) if args.prepend_bos is None else args.prepend_bos,
            "sequence_separator_token": separator,
            "exclude_special_tokens": special is not False if given is None else given,
            "exclude_token_ids": excluded,
            "norm_outlier_multiple": outliers or None,
            "held_out_documents": metadata.get("held_out_documents", 512)
            if args.held_out_documents is None
            else args.held_out_documents,
            "model_dtype": args.model_dtype,
        }

    def _text(self, options: dict[str, Any], lm_kwargs: dict[str, Any]) -> Inputs:
        args, lm = self.args, None
        device = device_of(args)
        if self.whole_lm:
            lm = self._language_model(options, lm_kwargs, device)
            tokenizer = AutoTokenizer.from_pretrained(options["model_name"], revision=options["revision"] or "main")
            data = TextActivationsDataModule(**options, model=lm, tokenizer=tokenizer)
        else:
            data = TextActivationsDataModule(**options, model_from_pretrained_kwargs=lm_kwargs, device=device)
        return TextInputs(
            data, split=args.split, n_rows=args.n_rows or None, batch_size_prompts=args.batch_size_prompts, lm=lm
        )

    def _language_model(self, options: dict[str, Any], kwargs: dict[str, Any], device: str) -> Any:
        name, revision = options["model_name"], options["revision"] or "main"
        key = f"{name} {revision} {kwargs}"
        if key not in self._lms:
            lm: Any = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=DTYPES[options["model_dtype"]], **kwargs
            )
            self._lms[key] = lm if "device_map" in kwargs else lm.to(device)
        return self._lms[key]


def _lm_kwargs(metadata: Any) -> dict[str, Any]:
    """What to load the language model with; the arguments of a TransformerLens model are not those of a Hugging Face one.

    Raises:
        ValueError: If TransformerLens changed the weights so that its activations are others.
    """
    kwargs = dict(metadata["model_from_pretrained_kwargs"] or {})
    if metadata["model_class_name"] == "AutoModelForCausalLM":
        return kwargs
    if changed := [k for k in ("center_writing_weights", "fold_value_biases") if kwargs.get(k)]:
        raise ValueError(
            f"the dictionary was trained on activations of a TransformerLens model with {changed[0]}, which are not those of the "
            "Hugging Face model: harvest them with SAELens's CacheActivationsRunner and give --shards"
        )
    return {}


def _hugging_face_name(name: str | None, model_class_name: str | None) -> str | None:
    """The Hub name of a model that metadata may call by its TransformerLens name (``pythia-70m``)."""
    if name is None or "/" in name or Path(name).is_dir() or model_class_name == "AutoModelForCausalLM":
        return name
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return str(get_official_model_name(name))
    except ValueError:
        return name
