"""The language model of a stream of text: known from its config, loaded when first run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aen_lightning.files import DTYPES, ModelDtype
from aen_lightning.files.redaction import without_secrets
from aen_lightning.language_model.cut_model import (
    ActivationModel,
    cut_model,
    load_config,
    load_cut_model,
    resolve_hooks,
)
from aen_lightning.language_model.hook_points import Hook

ModelClassName = Literal["AutoModelForCausalLM", "HookedTransformer", "TransformerBridge"]

# jsonargparse reads the types of inherited fields as they are: `from __future__ import annotations` would
# make strings of them


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    """Which language model runs, and how.

    Args:
        model_name: Hub name or folder of the language model; for TransformerLens classes, the name it has
            there.
        model_class_name: ``AutoModelForCausalLM`` (cut after the deepest hook point), or a TransformerLens
            class.
        revision: Of the model on the Hub.
        model_from_pretrained_kwargs: Passed on when the model is loaded (``device_map``,
            ``quantization_config``, ...).
        model_dtype: Of the language model: weights and computation.
        autocast_lm: Run it under bfloat16 autocast.
        device: Of the language model and the shuffle buffer; None: where the trainer puts the SAE.
        tokenizer_name: None: the model's own.
    """

    model_name: str | None = None
    model_class_name: ModelClassName = "AutoModelForCausalLM"
    revision: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    model_dtype: ModelDtype = "float32"
    autocast_lm: bool = False
    device: str | None = None
    tokenizer_name: str | None = None


class LanguageModelSource:
    """Gives hook points, tokenizer and limits before any weight is read, and the model when it is first asked
    for.

    A TransformerLens model says what it is only once loaded.

    Args:
        options: Which model.
        hook_names: Where activations are taken.
        device: Where to load it if the options do not say; asked when it is loaded.
        model: A loaded model: of transformers or TransformerLens, or any ``ActivationModel``.
        tokenizer: A tokenizer.

    Raises:
        ValueError: If there is neither a ``model_name`` nor a model.
    """

    def __init__(
        self,
        options: LanguageModelOptions,
        hook_names: Sequence[str],
        *,
        device: Callable[[], str],
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        if model is None and options.model_name is None:
            raise ValueError("model_name is missing: give a Hub name or a folder (or, in Python, model=)")
        self.options, self.hook_names, self.device = options, list(hook_names), device
        self.given_model, self._given_tokenizer = model, tokenizer
        self._kwargs = dict(options.model_from_pretrained_kwargs or {})
        self._loaded: ActivationModel | None = None
        self._hooks: tuple[Hook, ...] | None = None

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """The hook points, found in the model's config."""
        if self._hooks is None:
            if self._known_once_loaded:
                self._hooks = tuple(self.model.hooks)
            else:
                self._hooks = resolve_hooks(self._config(), self.hook_names)
        return self._hooks

    @property
    def model(self) -> ActivationModel:
        """The frozen language model, loaded when first asked for."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def free(self) -> None:
        """Forget a model that was loaded here."""
        if self.given_model is None:
            self._loaded = None

    def tokenizer(self) -> Any:
        """The tokenizer, or None if a given model has none. A hook point that does not exist is reported
        before."""
        _ = self.hooks
        if self._given_tokenizer is None:
            name = self.options.tokenizer_name or (None if self._is_tl else self.options.model_name)
            if name is None:
                return getattr(self._inner(), "tokenizer", None)
            self._given_tokenizer = load_tokenizer(
                name, revision=self.options.revision, model_from_pretrained_kwargs=self._kwargs
            )
        return self._given_tokenizer

    def check_context_size(self, context_size: int) -> None:
        """See whether the model has so many positions.

        Raises:
            ValueError: If it has not.
        """
        if self._known_once_loaded:
            model = self._inner()
            config = getattr(model, "cfg", None) or getattr(model, "config", None)
        else:
            config = self._config()
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_ctx", None)
        if isinstance(limit, int) and context_size > limit:
            raise ValueError(f"context_size is {context_size}, but the model has {limit} positions: lower it")

    def metadata(self) -> dict[str, Any]:
        """Model and hook point in SAELens's metadata keys, for an SAE on the first hook point."""
        hook = self.hooks[0]
        metadata: dict[str, Any] = {
            "model_name": self.options.model_name or _name_of(self.given_model),
            "model_class_name": self.options.model_class_name,
            "hook_name": hook.hook_name,
            "hook_head_index": None,
            "model_from_pretrained_kwargs": _plain(self._kwargs),
            "revision": self.options.revision,
        }
        if hook.hf_hook_name is not None:
            metadata["hf_hook_name"] = hook.hf_hook_name
        if hook.hook_name.endswith("hook_z"):
            metadata["reshape_activations"] = "hook_z"
        return metadata

    @property
    def _is_tl(self) -> bool:
        return self.options.model_class_name != "AutoModelForCausalLM"

    @property
    def _known_once_loaded(self) -> bool:
        return self.given_model is not None or self._is_tl

    def _inner(self) -> Any:
        """The transformers or TransformerLens model."""
        return getattr(self._loaded, "model", self.given_model)

    def _config(self) -> Any:
        assert self.options.model_name is not None
        return load_config(
            self.options.model_name, revision=self.options.revision, model_from_pretrained_kwargs=self._kwargs
        )

    def _load(self) -> ActivationModel:
        given = self.given_model
        if given is not None:
            if hasattr(given, "run_with_cache"):
                from aen_lightning.language_model.transformer_lens import TLModel

                return TLModel(given, self.hook_names)
            return cut_model(given, self.hook_names) if isinstance(given, PreTrainedModel) else given
        options = self.options
        assert options.model_name is not None
        kwargs: dict[str, Any] = {
            "revision": options.revision, "dtype": options.model_dtype,
            "device": options.device or self.device(),
            "model_from_pretrained_kwargs": self._kwargs,
        }  # fmt: skip
        if options.model_class_name == "AutoModelForCausalLM":
            return load_cut_model(options.model_name, self.hook_names, **kwargs)
        from aen_lightning.language_model.transformer_lens import load_tl_model

        return load_tl_model(options.model_class_name, options.model_name, self.hook_names, **kwargs)

    def whole_model(self, device: str) -> Any:
        """The transformers model with all its layers and its LM head: the one given, or loaded anew from
        ``model_name``.

        Args:
            device: Where to load it, unless ``model_from_pretrained_kwargs`` has a ``device_map``.

        Returns:
            None where there is none: for a TransformerLens model, or a model of another kind given without
            its name.
        """
        if isinstance(self.given_model, PreTrainedModel):
            return self.given_model
        if self._is_tl or self.options.model_name is None:
            return None
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.options.model_name, revision=self.options.revision or "main",
            dtype=DTYPES[self.options.model_dtype],
            **self._kwargs,
        )  # fmt: skip
        return model if "device_map" in self._kwargs else model.to(device)


def load_tokenizer(
    name: str, *, revision: str | None = None, model_from_pretrained_kwargs: dict[str, Any] | None = None
) -> Any:
    """A tokenizer, with what ``model_from_pretrained_kwargs`` says about where to find it."""
    passed = ("gguf_file", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    kwargs = {k: v for k, v in (model_from_pretrained_kwargs or {}).items() if k in passed}
    return AutoTokenizer.from_pretrained(name, revision=revision or "main", **kwargs)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of ``kwargs`` that JSON can hold, and anyone may see; a quantization config, e.g., says how the
    model was run, not which."""
    plain: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, bool | int | float | str | list | dict | type(None)):
            plain[name] = json.loads(json.dumps(value, default=str))
    return dict(without_secrets(plain))


def _name_of(model: Any) -> str:
    config = getattr(model, "cfg", None) or getattr(model, "config", None)
    return str(
        getattr(config, "model_name", None) or getattr(config, "name_or_path", None) or type(model).__name__
    )
