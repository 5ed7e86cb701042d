"""TransformerLens models behind the interface of ``aen_lightning.language_model.cut_model.CutModel``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from sae_lens.load_model import load_model
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from aen_lightning.files import DTYPES, ModelDtype
from aen_lightning.language_model.hook_points import Hook

TLClassName = Literal["HookedTransformer", "TransformerBridge"]


class TLModel:
    """A loaded ``HookedTransformer`` or ``TransformerBridge``, run only up to the block after the deepest
    hook point.

    Args:
        model: The TransformerLens model. It is put into eval mode and frozen.
        hook_names: Names of its hook points; activations split by head are flattened to n_heads * d_head.

    Raises:
        ValueError: If there is no name or the model has no such hook point.
    """

    def __init__(self, model: Any, hook_names: Sequence[str]) -> None:
        if not hook_names:
            raise ValueError("at least one hook name is needed, got none")
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        layers = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hook_names]
        self._stop_at_layer = None if None in layers else max(layer for layer in layers if layer is not None)
        self.hooks: tuple[Hook, ...] = tuple(Hook(name, None, 0, 0, name) for name in hook_names)
        probe = self._run(torch.zeros(1, 1, dtype=torch.long))
        for name in hook_names:
            if name not in probe:
                near = difflib.get_close_matches(name, list(model.hook_dict), n=3)
                raise ValueError(
                    f"hook point {name!r} does not exist in this {type(model).__name__} of "
                    f"{model.cfg.n_layers} layers.{' Did you mean ' + ', '.join(near) + '?' if near else ''}"
                )
        self.hooks = tuple(
            Hook(name, None, (layer or model.cfg.n_layers) - 1, probe[name][0, 0].numel(), name)
            for name, layer in zip(hook_names, layers, strict=True)
        )

    @property
    def device(self) -> torch.device:
        """Where ``input_ids`` belong."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _run(self, input_ids: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        names = [h.hook_name for h in self.hooks]
        cache: dict[str, Tensor]
        _, cache = self.model.run_with_cache(
            input_ids.to(self.device), names_filter=lambda name: name in names,
            stop_at_layer=self._stop_at_layer,
            return_cache_object=False, prepend_bos=False, **kwargs,
        )  # fmt: skip
        return cache

    def activations(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As ``CutModel.activations``; TransformerLens takes no ``position_ids``.

        Raises:
            ValueError: If ``position_ids`` is given.
        """
        if position_ids is not None:
            raise ValueError(
                "TransformerLens models take no position_ids: use model_class_name: AutoModelForCausalLM"
            )
        masks = {} if attention_mask is None else {"attention_mask": attention_mask.to(self.device)}
        cache = self._run(input_ids, **masks)
        return {h.hook_name: cache[h.hook_name].reshape(*input_ids.shape, h.d_in) for h in self.hooks}


def load_tl_model(
    model_class_name: TLClassName,
    model_name: str,
    hook_names: Sequence[str],
    *,
    revision: str | None = None,
    dtype: ModelDtype = "float32",
    device: torch.device | str = "cpu",
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
) -> TLModel:
    """Load a TransformerLens model whole (it cannot be cut before loading), HookedTransformer the way SAELens
    does.

    Args:
        model_class_name: SAELens's name of the class.
        model_name: As TransformerLens knows it.
        hook_names: Names of hook points.
        revision: Branch, tag or commit on the Hub.
        dtype: Of weights and activations.
        device: Where to put it.
        model_from_pretrained_kwargs: Passed on to ``HookedTransformer.from_pretrained_no_processing`` or
            ``TransformerBridge.boot_transformers``.
    """
    kwargs = {"dtype": DTYPES[dtype], **(model_from_pretrained_kwargs or {})}
    if revision is not None:
        kwargs["revision"] = revision
    if model_class_name == "TransformerBridge":
        model: Any = TransformerBridge.boot_transformers(model_name, device=device, **kwargs)
    else:
        model = load_model(model_class_name, model_name, device=device, model_from_pretrained_kwargs=kwargs)
    return TLModel(model, hook_names)
