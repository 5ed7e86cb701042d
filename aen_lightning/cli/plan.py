"""``aen plan``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers import AutoConfig, PretrainedConfig

from aen_lightning.cli.config import configs_in, read_config
from aen_lightning.cli.errors import UsageError
from aen_lightning.cli.harvest import HarvestCLI
from aen_lightning.cli.output import answer
from aen_lightning.cli.parser import normalized
from aen_lightning.cli.training import AENCLI, OneLineCLI, errors_of_use
from aen_lightning.files.checked import shortened
from aen_lightning.harvest.measured import read_measured
from aen_lightning.harvest.plan import plan as plan_recipe
from aen_lightning.training.module import SAEModule

_SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
# the models of our recipes, so that planning them needs no network
_SHAPES: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {"model_type": "gpt2"},
    "EleutherAI/pythia-70m-deduped": {
        "model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 8, "vocab_size": 50304, "max_position_embeddings": 2048,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2,
    "models/smollm2-135m": _SMOLLM2,  # where the recipe expects it
}  # fmt: skip


class _Parsed(OneLineCLI):
    """Parses a recipe as the command that runs it would, and makes nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--tflops_per_s", type=float | None, default=None)
        parser.add_argument("--measured", type=Path | None, default=None)

    def before_instantiate_classes(self) -> None:
        """Nothing to prepare."""

    def instantiate_classes(self) -> None:
        """Nothing to make."""


class _Fit(_Parsed, AENCLI):
    pass


class _Harvest(_Parsed, HarvestCLI):
    pass


def plan(args: Sequence[str]) -> None:
    """Print what a recipe takes, without running it; the arguments are those of the command that would."""
    sections: dict[str, Any] = {}
    for path in configs_in(normalized(args)):
        sections |= read_config(path)
    for name in ("model", "data", "trainer"):
        if not isinstance(sections.get(name), dict | None):
            raise UsageError(
                f"{name} in the config must hold settings by name, got {shortened(sections[name])}"
            )
    model = sections.get("model") or {}
    if "hook_names" in model:
        cli: LightningCLI = _Harvest(args)
    elif isinstance(model.get("sae"), dict):
        cli = _Fit(SAEModule, args, run=False)
    else:
        raise UsageError(
            "needs --config with a recipe of `aen fit` (one model.sae) or `aen harvest` (model.hook_names); "
            f"got the sections {', '.join(sections) or 'none'} with model keys {', '.join(model) or 'none'}"
        )
    settings = cli.config.as_dict()
    settings["trainer"]["devices"] = _counted(settings["trainer"]["devices"])
    with errors_of_use(cli):
        made = plan_recipe(
            settings, tflops_per_s=settings["tflops_per_s"], model_config=known_model(settings)
        )
        measured = None if settings["measured"] is None else read_measured(settings["measured"])
    record: dict[str, Any] = {
        "command": "plan", "kind": made.kind, "numbers": made.numbers, "notes": made.notes,
    }  # fmt: skip
    if measured is not None:
        record["measured"] = [step.as_numbers() for step in measured.steps]
    answer(record, lambda: str(made) if measured is None else f"{made}\n\n{measured}")


def _counted(devices: Any) -> Any:
    """The Trainer takes a number typed as text for a number; so do we."""
    return int(devices) if isinstance(devices, str) and devices.isdigit() else devices


def known_model(settings: dict[str, Any]) -> PretrainedConfig | None:
    """The config of the recipe's language model, if it is one of ours and no folder here."""
    data = settings.get("data") or {}
    name = settings["model"].get("model_name") or data.get("init_args", {}).get("model_name")
    if name not in _SHAPES or Path(name).is_dir():
        return None
    return AutoConfig.for_model(**_SHAPES[name])
