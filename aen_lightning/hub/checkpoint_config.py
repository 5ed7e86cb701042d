"""The ``cfg.json`` of an authors' checkpoint: what it says, and what the paths in their repository mean."""

from __future__ import annotations

import re
from typing import Any, Literal

import sae_lens

from aen_lightning.hub.checkpoint import Checkpoint

AUTHORS_REPO = "farischaudhry/adaptive-elastic-net-sae"
Scaling = Literal["per_token", "none"]
_PILE = {"dataset_path": "EleutherAI/the_pile_deduplicated", "context_size": 128, "prepend_bos": False,
         "sequence_separator_token": "eos", "model_from_pretrained_kwargs": {},
         "hook_head_index": None}  # fmt: skip
# what the folder names of the authors' repository mean (paper, section "training protocol")
_MODELS: dict[str, dict[str, Any]] = {
    "llama8b": {"model_name": "meta-llama/Llama-3.1-8B", "hook_name": "blocks.16.hook_resid_post",
                "hf_hook_name": "model.layers.16", **_PILE},
    "pythia": {"model_name": "EleutherAI/pythia-70m-deduped", "hook_name": "blocks.3.hook_resid_post",
               "hf_hook_name": "gpt_neox.layers.3", **_PILE},
}  # fmt: skip
_ALIASES = {"llama": "llama8b", "llama8b": "llama8b", "pythia": "pythia", "pythia70m": "pythia"}
_SYNTHETIC = re.compile(r"(spiked|synthetic)([_-].*)?")


def config_of(checkpoint: Checkpoint, metadata: dict[str, Any], scaling: Scaling | None) -> dict[str, Any]:
    """The config of an inference SAE.

    Args:
        checkpoint: The checkpoint.
        metadata: From :func:`metadata_of`.
        scaling: Of the activations it was trained on; None: per token, or none for synthetic data.

    Raises:
        ValueError: For a scaling that is none.
    """
    if scaling not in (None, "per_token", "none"):
        raise ValueError(f"input_scaling must be 'per_token' or 'none', got {scaling!r}")
    if scaling is None:
        scaling = "none" if _is_synthetic(checkpoint) else "per_token"
    cfg: dict[str, Any] = {
        "architecture": "topk" if checkpoint.kind == "topk" else "standard",
        "d_in": checkpoint.d_in,
        "d_sae": checkpoint.d_sae,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "constant_norm_rescale" if scaling == "per_token" else "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if checkpoint.kind == "topk":
        cfg |= {"k": int(checkpoint.settings["k"]), "rescale_acts_by_decoder_norm": False}
    return cfg


def metadata_of(checkpoint: Checkpoint, model_name: str | None, hook_name: str | None) -> dict[str, Any]:
    """SAELens's metadata.

    Args:
        checkpoint: The checkpoint.
        model_name: Language model, where the checkpoint's path does not say it.
        hook_name: TransformerLens name of the hook, likewise.

    Raises:
        ValueError: If nothing says model and hook.
    """
    folder = next((p for p in checkpoint.source.lower().split("/") if p in _ALIASES), None)
    known = dict(_MODELS[_ALIASES[folder]]) if folder is not None else {}
    if hook_name is not None and hook_name != known.get("hook_name"):
        known.pop("hf_hook_name", None)
    known |= {k: v for k, v in (("model_name", model_name), ("hook_name", hook_name)) if v is not None}
    if not {"model_name", "hook_name"} <= known.keys() and not _is_synthetic(checkpoint):
        raise ValueError(
            f"{checkpoint.source} does not say which model and hook it is for (the authors' paths do, as in "
            "checkpoints/llama8b/...): give both (--model_name, --hook_name)"
        )
    return {
        # what says to SAELens that this config has the keys of version 6; it was not trained with SAELens
        "sae_lens_version": sae_lens.__version__,
        "sae_lens_training_version": None,
        **known,
        "training_architecture": {"adaptive_elastic_net": "aen", "l1": "standard"}.get(
            checkpoint.kind, checkpoint.kind
        ),
        "training_architecture_details": {"kind": checkpoint.kind, **checkpoint.settings},
        "imported_from": {
            "file": checkpoint.source
            if checkpoint.source.startswith(AUTHORS_REPO)
            else checkpoint.source.rsplit("/", 1)[-1],
            "run_name": checkpoint.run_name,
            "paper": "arXiv:2605.05341",
            "metrics": checkpoint.metrics,
        },
    }


def _is_synthetic(checkpoint: Checkpoint) -> bool:
    return any(_SYNTHETIC.fullmatch(part) for part in checkpoint.source.lower().split("/"))
