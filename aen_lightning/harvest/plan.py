"""What a recipe will take, worked out from it without running it: parameters, memory, disk, FLOPs, time.

Counts are exact (the models are built on the meta device, without weights). Memory and FLOPs are the terms
that grow with the model; an allocator's slack and the code itself come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from aen_lightning.files import DTYPES
from aen_lightning.language_model.cut_model import build_cut_model, load_config, resolve_hooks
from aen_lightning.language_model.families import cut_config, layers_of
from aen_lightning.sparse import cost

GIB = 2**30
_PLANNED_L0 = 100  # about the paper's on Llama; the dense step does not depend on it
_DOCUMENT_START_BYTES = 5  # a token waiting to be harvested: int32 and a mark


@dataclass
class Plan:
    """The answer of ``plan``; ``str()`` of it is a table.

    Args:
        kind: ``harvest`` or ``fit``.
        numbers: By name; the unit is the end of the name (``_gib``, ``_per_s``, ...), counts have none.
        notes: How to read them.
    """

    kind: str
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(map(len, self.numbers))
        lines = [f"{name:<{width}}  {_readable(value):>14}" for name, value in self.numbers.items()]
        return "\n".join([f"plan of aen {self.kind}", *lines, *(f"note: {note}" for note in self.notes)])


def _readable(value: float) -> str:
    if isinstance(value, int) or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def plan(
    config: dict[str, Any], *, tflops_per_s: float | None = None, model_config: PretrainedConfig | None = None
) -> Plan:
    """Work out what a recipe takes.

    Args:
        config: Contents of a recipe of ``aen harvest`` or ``aen fit``, overrides applied.
        tflops_per_s: What one rank sustains, in 1e12 floating-point operations per second; gives tokens per
            second and hours.
        model_config: Config of the language model; None: loaded by the recipe's ``model_name``.

    Raises:
        ValueError: If the recipe is neither, or lacks what is needed; OSError if the model's config cannot be
            found.
    """
    if tflops_per_s is not None and not tflops_per_s > 0:
        raise ValueError(f"tflops_per_s must be above 0, got {tflops_per_s}")
    model = config.get("model") or {}
    data = config.get("data") or {}
    data = data.get("init_args", data if "class_path" not in data else {})
    world_size, notes = _world_size(config.get("trainer") or {})
    if "hook_names" in model and "shards" in config:
        made = Plan("harvest", notes=notes)
        _plan_harvest(made, config, model, data, world_size, model_config)
    elif "sae" in model:
        made = Plan("fit", notes=notes)
        _plan_fit(made, config, model["sae"], data, world_size, model_config)
    else:
        raise ValueError(
            "cannot plan this config: a harvest has model.hook_names and shards, a fit has model.sae; got "
            "the sections "
            f"{', '.join(config) or 'none'} with model keys {', '.join(model) or 'none'}"
        )
    _add_totals(made, data, world_size)
    if tflops_per_s is not None:
        rate = world_size * tflops_per_s * 1e12 / made.numbers["flops_per_token"]
        made.numbers["tokens_per_s"] = rate
        if "tokens" in made.numbers:
            made.numbers["hours"] = made.numbers["tokens"] / rate / 3600
        made.notes.append(
            f"rates are those of {tflops_per_s:g} TFLOP/s sustained on each of {world_size} rank(s), "
            "nothing else waiting"
        )
    return made


def _add_totals(made: Plan, data: dict[str, Any], world_size: int) -> None:
    """What a rank holds of all that is listed, and how many tokens a step takes on all ranks together."""
    made.numbers["memory_per_rank_gib"] = sum(
        value for name, value in made.numbers.items() if name.endswith("_per_rank_gib")
    )
    if made.kind == "fit":
        batch = int(data.get("train_batch_size_tokens", 4096))
        made.numbers |= {"ranks": world_size, "effective_batch_tokens": batch * world_size}


def _world_size(trainer: dict[str, Any]) -> tuple[int, list[str]]:
    devices, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes") or 1)
    if isinstance(devices, int) and devices > 0:
        return devices * nodes, []
    if isinstance(devices, (list, tuple)):
        return len(devices) * nodes, []
    if devices not in ("auto", -1, "-1"):
        raise ValueError(f"trainer.devices must be a positive number, a list or 'auto', got {devices!r}")
    return nodes, [f"devices {devices!r} is taken as one device a node"]


def _is_sharded(trainer: dict[str, Any]) -> bool:
    strategy = trainer.get("strategy")
    name = strategy.get("class_path", "") if isinstance(strategy, dict) else str(strategy)
    return name.rpartition(".")[2] == "ModelParallelStrategy"


def _n_bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _plan_lm(
    made: Plan,
    model_config: PretrainedConfig,
    hook_names: list[str],
    dtype: str,
    context_size: int,
    shards_over: int,
) -> dict[str, int]:
    """Rows about the language model up to the deepest hook; returns the widths of the hooks."""
    hooks = resolve_hooks(model_config, hook_names)
    deepest = max(h.layer for h in hooks)
    cut = cut_config(model_config, deepest)
    cut.dtype = DTYPES[dtype]
    with torch.device("meta"):
        base = build_cut_model(cut, hooks)
    blocks = layers_of(base)
    n_block = [_n_bytes(b.parameters()) for b in blocks]
    total = _n_bytes(base.parameters())
    rest = total - sum(n_block)
    made.numbers["lm_parameters"] = sum(p.numel() for p in base.parameters())
    made.numbers["lm_blocks"] = deepest + 1
    if shards_over > 1:
        # a unit is gathered while the one before it still computes
        share, gathered = total / shards_over, max(rest, 2 * max(n_block))
        made.numbers["lm_memory_per_rank_gib"] = (share + gathered) / GIB
        made.notes.append(
            f"FSDP2: {share / GIB:.3f} GiB of weights stay on each rank, up to {gathered / GIB:.3f} GiB "
            "are gathered at a time"
        )
    else:
        made.numbers["lm_memory_per_rank_gib"] = total / GIB
    matmuls = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim >= 2)
    head_dim = getattr(cut, "head_dim", None) or cut.hidden_size // cut.num_attention_heads
    # scores and weighted values: 2 products of 2 FLOPs over half the context, causally
    attention = 2 * cut.num_attention_heads * head_dim * context_size * len(blocks)
    made.numbers["lm_flops_per_token"] = 2 * matmuls + attention
    return {h.hook_name: h.d_in for h in hooks}


def _plan_harvest(
    made: Plan, config: dict[str, Any], model: dict[str, Any], data: dict[str, Any], world_size: int,
    model_config: PretrainedConfig | None,
) -> None:  # fmt: skip
    if model_config is None:
        model_config = load_config(
            model["model_name"], revision=model.get("revision"),
            model_from_pretrained_kwargs=model.get("model_from_pretrained_kwargs"),
        )  # fmt: skip
    model_dtype, context_size = model.get("model_dtype", "float32"), int(data.get("context_size", 128))
    sharded = world_size if _is_sharded(config.get("trainer") or {}) else 1
    widths = _plan_lm(made, model_config, model["hook_names"], model_dtype, context_size, sharded)
    stored = DTYPES[model.get("dtype") or model_dtype]
    per_token = sum(widths.values()) * stored.itemsize + 4
    waiting = int((config.get("shards") or {}).get("queue_size", 4)) + 2
    batch = int(data.get("batch_size_prompts", 32)) * context_size
    made.numbers["batches_in_flight_per_rank_gib"] = waiting * batch * per_token / GIB
    made.numbers["flops_per_token"] = made.numbers.pop("lm_flops_per_token")
    made.numbers["disk_bytes_per_token"] = per_token
    if (n_tokens := data.get("n_tokens")) is None:
        made.notes.append("n_tokens is not set: the whole dataset; disk and time are per token")
        return
    made.numbers["tokens"] = int(n_tokens)
    made.numbers["disk_gib"] = n_tokens * per_token / GIB
    made.numbers["disk_while_running_gib"] = n_tokens * (per_token + _DOCUMENT_START_BYTES) / GIB
    made.notes.append("disk is an upper bound: tokens left out by filters are not stored")


def _plan_fit(
    made: Plan, config: dict[str, Any], sae: dict[str, Any], data: dict[str, Any], world_size: int,
    model_config: PretrainedConfig | None,
) -> None:  # fmt: skip
    live = 0.0
    hook_name = data.get("hook_name")
    if data.get("model_name") and hook_name:
        model_config = model_config or load_config(data["model_name"], revision=data.get("revision"))
        names = [hook_name] if isinstance(hook_name, str) else list(hook_name)
        _plan_lm(
            made,
            model_config,
            names,
            data.get("model_dtype", "float32"),
            int(data.get("context_size", 128)),
            1,
        )
        live = made.numbers["lm_flops_per_token"]
    module = _sae_on_meta(sae)
    n = sum(p.numel() for p in module.parameters())
    weights, buffers = _n_bytes(module.parameters()), _n_bytes(module.buffers())
    d_in, d_sae = int(module.cfg.d_in), int(module.cfg.d_sae)  # type: ignore[union-attr, arg-type]
    shards = world_size if _is_sharded(config.get("trainer") or {}) else 1
    batch = int(data.get("train_batch_size_tokens", 4096))
    made.numbers |= {
        "sae_parameters": n,
        "sae_weights_per_rank_gib": (weights + buffers) / shards / GIB,
        "gradients_per_rank_gib": weights / shards / GIB,
        "adam_per_rank_gib": 2 * weights / shards / GIB,
        # hidden_pre, feature_acts and the gradient of one of them, float32
        "dense_activations_per_rank_gib": 3 * batch * d_sae * 4 / GIB,
        # products: two forward; backward both weights' and feature_acts' gradient
        "sae_flops_per_token": 10 * d_in * d_sae,
        "sae_flops_per_token_if_sparse": 2 * d_in * d_sae,
        "flops_per_token": live + 10 * d_in * d_sae,
    }
    made.notes.append(
        "sae_flops_per_token is a dense step; once features are sparse only the encoder product remains"
    )
    _plan_step(made, config.get("trainer") or {}, batch, d_in, d_sae)
    steps = (config.get("trainer") or {}).get("max_steps")
    if isinstance(steps, int) and steps > 0:
        made.numbers["tokens"] = steps * batch * world_size


def _plan_step(made: Plan, trainer: dict[str, Any], batch: int, d_in: int, d_sae: int) -> None:
    """Rows about the step on one H100, by the model of cost of ``benchmarks/gpu_step.py``."""
    low = str(trainer.get("precision")) == "bf16-mixed"
    step = cost.Step(batch, d_in, d_sae, _PLANNED_L0, low=low, tf32=True)
    paths: tuple[tuple[str, cost.Path], ...] = (("dense", "dense"), ("sparse", "sparse, rows"))
    for name, path in paths:
        made.numbers[f"h100_{name}_step_ms"] = sum(step.milliseconds(cost.CARDS["h100"], path).values())
        made.numbers[f"h100_{name}_step_gib"] = sum(step.gibibytes(path).values())
    made.notes.append(
        f"h100_* is one SAE's step on one H100 by arithmetic, {'bf16' if low else 'TF32'} products, L0 {_PLANNED_L0}, "
        "language model and data left out; benchmarks/gpu_step.py prints it beside what it measures"
    )


def _sae_on_meta(sae: dict[str, Any]) -> nn.Module:
    from sae_lens import TrainingSAE

    from aen_lightning.saes.from_dict import build_sae_config

    return TrainingSAE.from_dict(build_sae_config(sae).to_dict() | {"device": "meta"})
