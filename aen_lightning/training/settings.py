"""What decides how a run goes: kept in its checkpoints, and compared when another run goes on from one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl

from aen_lightning.callbacks import HardFinish
from aen_lightning.runs.provenance import scrub

_CHANGE_NOTHING = {
    "EvaluateDictionaries", "ExportSAE", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "PublishToHub",
    "RankWatch", "RichProgressBar", "SaveOnSignal", "Throughput", "TQDMProgressBar",
}  # fmt: skip
"""Callbacks that watch and write only."""


def settings_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a command's configuration decides how the run goes, in plain values and without secrets.

    Local paths keep their last part, so data may move.
    """
    plain = json.loads(json.dumps(config, default=str))
    callbacks = (plain.get("trainer") or {}).get("callbacks") or []
    named = {
        c["class_path"].rpartition(".")[2]: c.get("init_args") or {} for c in callbacks if "class_path" in c
    }
    settings = {key: plain[key] for key in ("seed_everything", "model", "data") if plain.get(key) is not None}
    settings["callbacks"] = {name: args for name, args in named.items() if name not in _CHANGE_NOTHING}
    return dict(scrub(settings))


def settings_of_run(module: pl.LightningModule, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same of a run: of its configuration if it has one, else of its hyper-parameters; and its Trainer's."""
    trainer = module.trainer
    if config is None:
        data = getattr(trainer, "datamodule", None)
        own = {"model": _public(module.hparams), "data": _public(getattr(data, "hparams", {}))}
        config = {key: values for key, values in own.items() if values}
    settings = settings_of_config(config)
    algorithm = trainer.gradient_clip_algorithm
    settings["trainer"] = {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": None if algorithm is None else str(getattr(algorithm, "value", algorithm)),
        "precision": str(trainer.precision),
        # ranks that share the features of one SAE see the same batch, so their number changes nothing
        "n_ranks": 1 if getattr(module, "shard_features", False) else trainer.world_size,
    }
    optimizer = getattr(module, "optimizer_settings", None)
    knows_the_end = any(isinstance(c, HardFinish) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if optimizer is not None:
        knows_the_end = (
            knows_the_end or bool(optimizer.lr_decay_steps) or optimizer.lr_scheduler_name != "constant"
        )
    if knows_the_end:
        settings["trainer"]["max_steps"] = trainer.max_steps
    return settings


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what LightningCLI adds."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of two runs, as ``model.lr was 0.001, now 0.01``.

    Sections that one of them does not know are left out, and so are arguments that are missing in ``old``, which an earlier
    version did not have; but not fields of an SAE, of which only those that were given are there.
    """
    said = []
    for section in old:
        if section not in new:
            continue
        before, after = dict(_leaves(old[section], section)), dict(_leaves(new[section], section))
        for key in sorted({*before, *after}):
            added_later = key not in before and not key.startswith(("model.sae.", "callbacks."))
            if not added_later and before.get(key) != after.get(key):
                said.append(f"{key} was {_shown(before, key)}, now {_shown(after, key)}")
    return said


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, member in value.items():
            yield from _leaves(member, f"{name}.{key}")
    elif value != {}:
        yield name, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"
