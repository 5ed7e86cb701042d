"""The whole evaluation through Lightning: add the callback to a config, and ``aen test`` runs it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from aen_lightning.data.activations import ActivationsDataModule
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.evaluate.dictionary import load_dictionary
from aen_lightning.evaluate.evaluate import RESULT_FILE, evaluate_dictionary
from aen_lightning.evaluate.inputs import Inputs, ShardInputs, SyntheticInputs, TextInputs
from aen_lightning.evaluate.results import write_result

_LOGGED = {
    "downstream/ce_increase": ("downstream", "ce_increase", "spliced", "value"),
    "downstream/ce_recovered_mean": ("downstream", "ce_recovered", "mean", "value"),
    "downstream/ce_recovered_zero": ("downstream", "ce_recovered", "zero", "value"),
    "downstream/kl": ("downstream", "kl", "spliced", "value"),
    "raw/explained_variance": ("reconstruction", "raw", "explained_variance", "value"),
    "raw/cosine": ("reconstruction", "raw", "cosine", "value"),
    "features/gini": ("features", "gini"),
    "features/normalized_entropy": ("features", "normalized_entropy"),
    "features/top_1pct_mass": ("features", "top_1pct_mass"),
    "features/top_10pct_mass": ("features", "top_10pct_mass"),
    "ground_truth/matched_cosine": ("ground_truth", "matched_cosine"),
    "ground_truth/support_f1": ("ground_truth", "support", "f1"),
}


class EvaluateDictionaries(pl.Callback):
    """At the end of ``trainer.test``, what ``aen evaluate`` does with the exported dictionaries, on the data
    module's test split.

    Writes ``evaluation.json`` (with several SAEs ``NAME/evaluation.json``) below ``output_dir`` and logs the
    main numbers as ``test/downstream/...``, ``test/raw/...``, ``test/features/...`` and
    ``test/ground_truth/...``. Runs on the first rank only.

    Args:
        downstream: Cross-entropy and KL, for which the whole language model is loaded (on text from a Hugging
            Face model).
        n_rows: Most rows of text; None: the whole split.
        n_downstream_rows: Most rows for the downstream metrics; None: as many.
        batch_size_prompts: Rows a model call.
        output_dir: Folder; None: ``evaluation`` in the logger's folder.
    """

    def __init__(
        self,
        downstream: bool = True,
        n_rows: int | None = 256,
        n_downstream_rows: int | None = 64,
        batch_size_prompts: int = 16,
        output_dir: str | None = None,
    ) -> None:
        for name, value in (("n_rows", n_rows), ("n_downstream_rows", n_downstream_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        if batch_size_prompts < 1:
            raise ValueError(f"batch_size_prompts must be at least 1, got {batch_size_prompts}")
        self.downstream, self.n_rows, self.n_downstream_rows = downstream, n_rows, n_downstream_rows
        self.batch_size_prompts, self.output_dir = batch_size_prompts, output_dir

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export, load as any user would, evaluate, log."""
        log_dir = trainer.log_dir  # asks all ranks
        if not trainer.is_global_zero:
            return
        module = cast(Any, pl_module)
        inputs = self._inputs(getattr(trainer, "datamodule", None), str(trainer.strategy.root_device))
        output = Path(self.output_dir or Path(log_dir or ".") / "evaluation")
        for name in module.saes:
            with tempfile.TemporaryDirectory() as folder:
                module.export(folder, name=name)
                sae = load_dictionary(folder, device=str(trainer.strategy.root_device))
            result = evaluate_dictionary(
                sae,
                inputs,
                reference=name or output,
                n_downstream_rows=self.n_downstream_rows,
                downstream_batch_size_prompts=max(1, self.batch_size_prompts // 4),
            )
            write_result(result, output / name / RESULT_FILE)
            logged = {key: _at(result, path) for key, path in _LOGGED.items()}
            prefix = f"test/{name}/" if name else "test/"
            pl_module.log_dict(
                {prefix + k: v for k, v in logged.items() if v is not None}, rank_zero_only=True
            )

    def _inputs(self, data: Any, device: str) -> Inputs:
        if isinstance(data, SpikedDataModule):
            return SyntheticInputs(data, n_samples=data.hparams["n_eval_samples"])
        if isinstance(data, ActivationsDataModule):
            return ShardInputs(
                str(data.path), data.hook_names[0], held_out_fraction=data.held_out_fraction,
                exclude_token_ids=data.exclude_token_ids,
            )  # fmt: skip
        if isinstance(data, TextActivationsDataModule):
            lm = data.source.whole_model(device) if self.downstream else None
            return TextInputs(data, n_rows=self.n_rows, batch_size_prompts=self.batch_size_prompts, lm=lm)
        raise TypeError(
            "EvaluateDictionaries knows SpikedDataModule, ActivationsDataModule and "
            "TextActivationsDataModule, got "
            f"{type(data).__name__}: evaluate the exported folder with `aen evaluate`"
        )


def _at(result: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        if result is None:
            return None
        result = result[key]
    return cast("float | None", result)
