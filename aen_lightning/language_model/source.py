"""The language model of a stream of text: known from its config, loaded when first run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedModel

from aen_lightning.language_model.cut_model import (
    ActivationModel,
    ModelDtype,
    cut_model,
    load_config,
    load_cut_model,
    resolve_hooks,
)
from aen_lightning.language_model.hook_points import Hook

ModelClassName = Literal["AutoModelForCausalLM", "HookedTransformer", "TransformerBridge"]


class LanguageModelSource:
    """Gives hooks, tokenizer and limits before any weight is read, and the model when it is first asked for.

    A TransformerLens model says what it is only once loaded.

    Args:
        model_name: Hub name or folder; for TransformerLens classes, the name it has there. None if ``model`` is given.
        hook_names: Where activations are taken.
        model_class_name: ``AutoModelForCausalLM`` (cut after the deepest hook), or a TransformerLens class.
        revision: Of the model on the Hub.
        model_from_pretrained_kwargs: Passed on when the model is loaded.
        model_dtype: Of weights and computation.
        tokenizer_name: None: the model's own.
        device: Where to load it; asked when it is loaded.
        model: A loaded model: of transformers or TransformerLens, or any ``ActivationModel``.
        tokenizer: A tokenizer.
    """

    def __init__(
        self,
        model_name: str | None,
        hook_names: list[str],
        *,
        model_class_name: ModelClassName,
        revision: str | None,
        model_from_pretrained_kwargs: dict[str, Any],
        model_dtype: ModelDtype,
        tokenizer_name: str | None,
        device: Callable[[], str],
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.model_name, self.hook_names, self.model_class_name = model_name, hook_names, model_class_name
        self.revision, self.model_dtype, self.tokenizer_name = revision, model_dtype, tokenizer_name
        self.model_from_pretrained_kwargs, self.device = model_from_pretrained_kwargs, device
        self.given_model, self._given_tokenizer = model, tokenizer
        self._loaded: ActivationModel | None = None
        self._hooks: tuple[Hook, ...] | None = None

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """The hooks, found in the model's config."""
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
        """The tokenizer, or None if a given model has none. A hook that does not exist is reported before."""
        _ = self.hooks
        if self._given_tokenizer is None:
            name = self.tokenizer_name or (None if self._is_tl else self.model_name)
            if name is None:
                return getattr(self._inner(), "tokenizer", None)
            passed = ("gguf_file", "token", "cache_dir", "local_files_only", "subfolder")
            kwargs = {k: v for k, v in self.model_from_pretrained_kwargs.items() if k in passed}
            self._given_tokenizer = AutoTokenizer.from_pretrained(name, revision=self.revision or "main", **kwargs)
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
        """Model and hook in SAELens's metadata keys, for an SAE on the first hook."""
        hook = self.hooks[0]
        metadata: dict[str, Any] = {
            "model_name": self.model_name or _name_of(self.given_model),
            "model_class_name": self.model_class_name,
            "hook_name": hook.hook_name,
            "hook_head_index": None,
            "model_from_pretrained_kwargs": _plain(self.model_from_pretrained_kwargs),
            "revision": self.revision,
        }
        if hook.hf_hook_name is not None:
            metadata["hf_hook_name"] = hook.hf_hook_name
        if hook.hook_name.endswith("hook_z"):
            metadata["reshape_activations"] = "hook_z"
        return metadata

    @property
    def _is_tl(self) -> bool:
        return self.model_class_name != "AutoModelForCausalLM"

    @property
    def _known_once_loaded(self) -> bool:
        return self.given_model is not None or self._is_tl

    def _inner(self) -> Any:
        """The transformers or TransformerLens model."""
        return getattr(self._loaded, "model", self.given_model)

    def _config(self) -> Any:
        assert self.model_name is not None
        return load_config(
            self.model_name, revision=self.revision, model_from_pretrained_kwargs=self.model_from_pretrained_kwargs
        )

    def _load(self) -> ActivationModel:
        given = self.given_model
        if given is not None:
            if hasattr(given, "run_with_cache"):
                from aen_lightning.language_model.transformer_lens import TLModel

                return TLModel(given, self.hook_names)
            return cut_model(given, self.hook_names) if isinstance(given, PreTrainedModel) else given
        assert self.model_name is not None
        kwargs: dict[str, Any] = {
            "revision": self.revision, "dtype": self.model_dtype, "device": self.device(),
            "model_from_pretrained_kwargs": self.model_from_pretrained_kwargs,
        }  # fmt: skip
        if self.model_class_name == "AutoModelForCausalLM":
            return load_cut_model(self.model_name, self.hook_names, **kwargs)
        from aen_lightning.language_model.transformer_lens import load_tl_model

        return load_tl_model(self.model_class_name, self.model_name, self.hook_names, **kwargs)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of ``kwargs`` that JSON can hold; a quantization config, e.g., says how the model was run, not which."""
    plain = {}
    for name, value in kwargs.items():
        if isinstance(value, bool | int | float | str | list | dict | type(None)):
            plain[name] = json.loads(json.dumps(value, default=str))
    return plain


def _name_of(model: Any) -> str:
    config = getattr(model, "cfg", None) or getattr(model, "config", None)
    return str(getattr(config, "model_name", None) or getattr(config, "_name_or_path", None) or type(model).__name__)
