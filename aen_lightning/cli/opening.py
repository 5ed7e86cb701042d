"""Opens what the command line says to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from aen_lightning.cli.inputs import EvaluationInputs
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.evaluate.inputs import Inputs, ShardInputs, SyntheticInputs, TextInputs
from aen_lightning.evaluate.metadata import language_model_kwargs, synthetic_data
from aen_lightning.language_model.cut_model import DTYPES
from aen_lightning.language_model.source import load_tokenizer


def device_of(options: EvaluationInputs) -> str:
    """Where to compute."""
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


class InputOpener:
    """Opens the inputs of one dictionary after another, loading a language model only once.

    Args:
        options: What the user asked for.
        whole_lm: Whether the whole language model is needed (downstream metrics); else it is cut after the
            hook.
    """

    def __init__(self, options: EvaluationInputs, *, whole_lm: bool) -> None:
        self.options, self.whole_lm = options, whole_lm
        self._opened: dict[str, Inputs] = {}
        self._lms: dict[str, Any] = {}

    def open(self, sae: SAE[Any]) -> Inputs:
        """The inputs for a dictionary.

        Raises:
            ValueError: If arguments and metadata do not say what to read, or its width is not the
                dictionary's.
        """
        given, metadata = self.options, sae.cfg.metadata
        synthetic = metadata["synthetic_data"]
        if given.synthetic or (synthetic and not (given.shards or given.dataset_path)):
            if not synthetic:
                raise ValueError(
                    "--synthetic needs a dictionary trained by SpikedDataModule; this one's metadata has no "
                    "synthetic_data"
                )
            inputs = self._once(f"synthetic {synthetic}", lambda: self._synthetic(synthetic, sae.cfg.d_in))
        elif given.shards:
            hook_name = given.hook_name or metadata["hook_name"]
            inputs = self._once(f"shards {hook_name}", lambda: self._shards(hook_name))
        else:
            options = self._text_options(metadata)
            kwargs = self.language_model_kwargs(metadata)
            inputs = self._once(f"text {options} {kwargs}", lambda: self._text(options, kwargs))
        if inputs.d_in != sae.cfg.d_in:
            raise ValueError(
                f"the dictionary has d_in={sae.cfg.d_in}, but the inputs are {inputs.d_in} wide: another "
                "hook or model "
                "is needed"
            )
        return inputs

    def _once(self, key: str, make: Any) -> Inputs:
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]

    def language_model_kwargs(self, metadata: Any) -> dict[str, Any]:
        """What to load the language model with, by the user's word or, where it is harmless, the metadata's.

        Raises:
            ValueError: If the metadata asks for what only the user may.
        """
        given = self.options
        return language_model_kwargs(
            metadata,
            given=given.model_from_pretrained_kwargs,
            trust_remote_code=given.trust_remote_code,
        )

    def _synthetic(self, parameters: dict[str, Any], d_in: int) -> Inputs:
        n_samples = self.options.n_tokens or 8192
        # dictionaries of earlier versions have LightningCLI's own keys among them
        own = {key: value for key, value in parameters.items() if not key.startswith("_")}
        return SyntheticInputs(synthetic_data(own, d_in=d_in, n_samples=n_samples), n_samples=n_samples)

    def _shards(self, hook_name: str | None) -> Inputs:
        given = self.options
        assert given.shards is not None
        return ShardInputs(
            given.shards, hook_name, held_out_fraction=given.held_out_fraction,
            exclude_token_ids=given.exclude_token_ids or (), n_tokens=given.n_tokens,
        )  # fmt: skip

    def _text_options(self, metadata: Any) -> dict[str, Any]:
        given = self.options
        model_name = given.model_name or _hugging_face_name(
            metadata["model_name"], metadata["model_class_name"]
        )
        hook_name = given.hook_name or metadata["hook_name"]
        dataset_path = given.dataset_path or metadata["dataset_path"]
        for name, value in (
            ("model_name", model_name),
            ("hook_name", hook_name),
            ("dataset_path", dataset_path),
        ):
            if not value:
                raise ValueError(
                    f"the dictionary's metadata does not say what to read: give --{name} (or --shards)"
                )
        special, asked = metadata["exclude_special_tokens"], given.exclude_special_tokens
        # None is a separator, too: none
        separator = _or(given.sequence_separator_token, metadata.get("sequence_separator_token", "eos"))
        own_dataset = given.dataset_path is None
        return {
            "model_name": model_name,
            "hook_name": hook_name,
            "revision": given.revision or metadata["revision"],
            "dataset_path": dataset_path,
            "dataset_name": given.dataset_name or (metadata["dataset_name"] if own_dataset else None),
            "dataset_split": given.dataset_split
            or (metadata["dataset_split"] if own_dataset else None)
            or "train",
            "text_column": given.text_column,
            "streaming": given.streaming,
            "context_size": given.context_size or metadata["context_size"] or 128,
            "prepend_bos": _or(given.prepend_bos, bool(metadata["prepend_bos"])),
            "sequence_separator_token": None if separator == "none" else separator,
            "exclude_special_tokens": special is not False if asked is None else asked,
            "exclude_token_ids": list(
                given.exclude_token_ids or (special if isinstance(special, list) else ())
            ),
            "norm_outlier_multiple": _or(given.norm_outlier_multiple, metadata["norm_outlier_multiple"])
            or None,
            "held_out_documents": _or(given.held_out_documents, metadata.get("held_out_documents", 512)),
            "model_dtype": given.model_dtype,
        }

    def _text(self, options: dict[str, Any], lm_kwargs: dict[str, Any]) -> Inputs:
        given, lm = self.options, None
        device = device_of(given)
        if self.whole_lm:
            lm = self._language_model(options, lm_kwargs, device)
            tokenizer = load_tokenizer(
                options["model_name"], revision=options["revision"], model_from_pretrained_kwargs=lm_kwargs
            )
            data = TextActivationsDataModule(**options, model=lm, tokenizer=tokenizer)
        else:
            data = TextActivationsDataModule(**options, model_from_pretrained_kwargs=lm_kwargs, device=device)
        return TextInputs(
            data,
            split=given.split,
            n_rows=given.n_rows or None,
            batch_size_prompts=given.batch_size_prompts,
            lm=lm,
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


def _or(given: Any, otherwise: Any) -> Any:
    """What the user gave, 0 and False among it, else the other."""
    return otherwise if given is None else given


def _hugging_face_name(name: str | None, model_class_name: str | None) -> str | None:
    """The Hub name of a model that metadata may call by its TransformerLens name (``pythia-70m``)."""
    if name is None or "/" in name or Path(name).is_dir() or model_class_name == "AutoModelForCausalLM":
        return name
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return str(get_official_model_name(name))
    except ValueError:
        return name
