"""The language model of a harvest, as a LightningModule that only predicts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from transformers import PretrainedConfig

from aen_lightning.data.token_filter import TokenFilter
from aen_lightning.files import DTYPES, ModelDtype
from aen_lightning.language_model.cut_model import (
    CutModel,
    load_config,
    load_cut_model,
    resolve_hooks,
)
from aen_lightning.language_model.hook_points import Hook


class HarvestModule(pl.LightningModule):
    """Runs a language model up to the deepest hook point and hands on the activations of the tokens to keep.

    Nothing is loaded before Lightning asks for the model, and then only the layers that the hook points need.
    Under ``ModelParallelStrategy`` the weights are sharded over the ranks (FSDP2) and each rank reads its own
    part of them only.

    Args:
        model_name: Hub name or folder of a Hugging Face causal language model.
        hook_names: Which activations, all taken in one pass. See
            ``aen_lightning.language_model.hook_points.resolve_hook``.
        revision: Branch, tag or commit on the Hub.
        model_dtype: Of weights and computation: ``float32``, ``bfloat16`` or ``float16``.
        dtype: On disk; None: the same.
        norm_outlier_multiple: Leave out tokens whose norm, at any of the hook points, exceeds this multiple
            of the median norm in their batch (attention sinks: 100 times and more). None: keep them.
        model_from_pretrained_kwargs: For ``AutoModel.from_pretrained``, e.g. a ``quantization_config`` for 8
            or 4 bits.

    Raises:
        ValueError: For an unknown dtype or a multiple that is not above 1; from ``hooks`` for a hook point
            that does not exist.
    """

    def __init__(
        self,
        model_name: str,
        hook_names: list[str],
        revision: str | None = None,
        model_dtype: ModelDtype = "float32",
        dtype: ModelDtype | None = None,
        norm_outlier_multiple: float | None = None,
        model_from_pretrained_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("model_dtype", model_dtype), ("dtype", dtype or model_dtype)):
            if value not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
        self.model_name, self.hook_names, self.revision = model_name, list(hook_names), revision
        self.model_dtype, self.stored_dtype = model_dtype, dtype or model_dtype
        self.token_filter = TokenFilter(norm_outlier_multiple=norm_outlier_multiple)
        self.model_from_pretrained_kwargs = dict(model_from_pretrained_kwargs or {})
        # outside the module tree: Lightning must neither move nor save it
        self.language_model: CutModel | None = None

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """Config of the whole model."""
        return load_config(
            self.model_name,
            revision=self.revision,
            model_from_pretrained_kwargs=self.model_from_pretrained_kwargs,
        )

    @cached_property
    def hooks(self) -> tuple[Hook, ...]:
        """The hook points, found in the config alone."""
        return resolve_hooks(self.hf_config, self.hook_names)

    @property
    def d_in(self) -> dict[str, int]:
        """Width at each hook point, by hook name."""
        return {h.hook_name: h.d_in for h in self.hooks}

    def settings(self) -> dict[str, Any]:
        """What decides the values that are written."""
        return {
            "model_name": self.model_name,
            "revision": self.revision,
            "hook_names": [h.hook_name for h in self.hooks],
            "model_dtype": self.model_dtype,
            "dtype": self.stored_dtype,
            "norm_outlier_multiple": self.token_filter.norm_outlier_multiple,
            "model_from_pretrained_kwargs": {
                k: v if isinstance(v, (str, int, float, bool, list, dict, type(None))) else str(v)
                for k, v in sorted(self.model_from_pretrained_kwargs.items())
            },
        }

    def configure_model(self) -> None:
        """Load the model where the strategy wants it: whole on each rank, or sharded."""
        nothing_to_do = getattr(self.trainer.datamodule, "n_batches", None) == 0  # type: ignore[attr-defined]
        if self.language_model is not None or nothing_to_do:
            return
        strategy, device = self.trainer.strategy, self.trainer.strategy.root_device
        if isinstance(strategy, FSDPStrategy):
            raise ValueError(
                "strategy 'fsdp' would keep the whole model on every rank: take ModelParallelStrategy with "
                "data_parallel_size: (number of ranks) and tensor_parallel_size: 1"
            )
        if isinstance(strategy, ModelParallelStrategy):
            from aen_lightning.language_model.fsdp import load_sharded_cut_model

            mesh = strategy.device_mesh
            if mesh["tensor_parallel"].size() > 1:
                n = mesh.size()
                raise ValueError(
                    f"ModelParallelStrategy has tensor_parallel_size {mesh['tensor_parallel'].size()}; the "
                    f"harvest shards weights over data-parallel ranks: set data_parallel_size: {n} and "
                    "tensor_parallel_size: 1"
                )
            self.language_model = load_sharded_cut_model(
                self.model_name,
                self.hook_names,
                mesh=mesh["data_parallel"],
                revision=self.revision,
                dtype=self.model_dtype,
                device=device,
                model_from_pretrained_kwargs=self.model_from_pretrained_kwargs,
            )
        else:
            self.language_model = load_cut_model(
                self.model_name,
                self.hook_names,
                revision=self.revision,
                dtype=self.model_dtype,
                device=device,
                model_from_pretrained_kwargs=self.model_from_pretrained_kwargs,
            )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Activations of one batch of token rows.

        Args:
            batch: From ``HarvestDataModule``: ``input_ids`` (batch, context); ``position_ids`` or None;
                ``keep`` (n_kept,): flat positions of the tokens to keep, or None for all.
            batch_idx: Unused.

        Returns:
            ``activations``: for each hook point (n, d_in) in the dtype on disk; ``token_ids`` (n,);
                ``n_outliers``.
        """
        assert self.language_model is not None
        seen = self.language_model.activations(batch["input_ids"], position_ids=batch["position_ids"])
        keep, ids = batch["keep"], batch["input_ids"].flatten()
        activations = {name: x.flatten(0, 1) for name, x in seen.items()}
        if keep is not None:
            activations, ids = {name: x[keep] for name, x in activations.items()}, ids[keep]
        n_outliers = 0
        usual = self.token_filter.by_norm(list(activations.values()))
        if usual is not None and (n_outliers := len(usual) - int(usual.sum())):
            activations, ids = {name: x[usual] for name, x in activations.items()}, ids[usual]
        stored = DTYPES[self.stored_dtype]
        return {
            "activations": {n: _fitting(x, stored, n) for n, x in activations.items()},
            "token_ids": ids,
            "n_outliers": n_outliers,
        }

    def on_predict_start(self) -> None:
        """Before documents are masked from each other, make sure that this model can do it."""
        if getattr(self.trainer.datamodule, "mask_documents", False):  # type: ignore[attr-defined]
            self.check_documents_are_masked()

    def check_documents_are_masked(self) -> None:
        """Change one of two documents in a row and see whether the other notices.

        transformers finds documents in ``position_ids`` that begin again, but not every architecture passes
        them on to its mask.

        Raises:
            ValueError: If it notices.
        """
        assert self.language_model is not None
        ids, positions = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[0, 1, 0, 1]])
        seen = [
            self.language_model.activations(x, position_ids=positions)
            for x in (ids, torch.tensor([[1, 2, 6, 7]]))
        ]
        if not all(torch.equal(seen[0][h][:, 2:], seen[1][h][:, 2:]) for h in seen[0]):
            raise ValueError(
                f"models of type {self.hf_config.model_type!r} cannot mask documents in packed rows "
                "(transformers does not give their position_ids to the mask): set mask_documents: false, or "
                "pack: false"
            )

    def teardown(self, stage: str) -> None:
        """Free the model."""
        self.language_model = None


def _fitting(x: Tensor, dtype: torch.dtype, hook_name: str) -> Tensor:
    """Cast to the dtype on disk; only float16 can fail to hold what a model computes."""
    converted = x.to(dtype)
    if dtype == torch.float16 and x.dtype != dtype and not torch.equal(converted.isfinite(), x.isfinite()):
        raise ValueError(
            f"an activation at {hook_name!r} of size {x.abs().max().item():.4g} does not fit float16 "
            "(65504): store bfloat16 or float32, or leave attention sinks out with norm_outlier_multiple"
        )
    return converted
