"""Eight SAEs on one live stream of activations, against eight separate runs: same data, same steps, same
results.

    python benchmarks/sweep.py --model models/smollm2-135m --text text.jsonl.gz     a real model (benchmarks/make_smollm2.py)
    python benchmarks/sweep.py --quick --json out.json                              a random model of a few layers

Both ways build their data module and load the model anew, as a user's runs do. The separate runs and the
sweep are timed in one process, the sweep between the halves of the separate runs, so that a machine that
slows down or speeds up does not favour one side. The weights must agree bit for bit, or the script fails.
``--prefetch N`` has the language model make N batches ahead in a thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from aen_lightning.data import TextActivationsDataModule
from aen_lightning.training.module import SAEModule, SweepModule

LAMBDAS = (1e-2, 5e-3, 2e-3, 1e-3)
SEEDS = (0, 1)


def random_model() -> dict[str, Any]:
    """A Llama of 6 layers with random weights, and random token rows to read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8
    )
    rows = torch.randint(10, 4096, (4000, 128), generator=torch.Generator().manual_seed(0))
    return {
        "model": AutoModelForCausalLM.from_config(config),
        "dataset": Dataset.from_dict({"input_ids": rows.tolist()}),
        "hook_name": "blocks.4.hook_resid_post",
        "exclude_special_tokens": False,
        "sequence_separator_token": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub name of a language model; without it a random one")
    parser.add_argument("--text", help="text for --model: a file, a folder or a dataset on the Hub")
    parser.add_argument("--hook", default="blocks.14.hook_resid_post", help="hook of --model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1024, help="tokens a training batch")
    parser.add_argument("--expansion", type=int, default=8, help="d_sae / d_in")
    parser.add_argument("--prefetch", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="20 steps on the random model")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    if options.quick:
        options.model, options.steps = None, 20
    if bool(options.model) != bool(options.text):
        parser.error("--model and --text go together")
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    source: dict[str, Any] = {
        "model_name": options.model,
        "hook_name": options.hook,
        "dataset_path": options.text,
    }
    if options.model is None:
        source = random_model()

    def data() -> TextActivationsDataModule:
        return TextActivationsDataModule(
            **source,
            input_scaling="per_token",
            train_batch_size_tokens=options.batch,
            store_batch_size_prompts=16,
            held_out_documents=0,
            prefetch=options.prefetch,
        )

    probe = data()
    probe.setup("fit")
    d_in = probe.d_in
    assert isinstance(d_in, int)
    sae = {
        "architecture": "aen",
        "d_in": d_in,
        "d_sae": options.expansion * d_in,
        "lambda_2": 1e-5,
        "decoder_init_norm": 0.1,
    }

    def fit(module: SAEModule | SweepModule) -> float:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=options.steps,
            gradient_clip_val=float(d_in),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[],
        )
        start = time.perf_counter()
        trainer.fit(module, datamodule=data())
        return time.perf_counter() - start

    grid = [(l1, seed) for l1 in LAMBDAS for seed in SEEDS]
    separate: dict[tuple[float, int], SAEModule] = {}
    seconds: list[float] = []

    def run_alone(members: list[tuple[float, int]]) -> None:
        for l1, seed in members:
            separate[l1, seed] = SAEModule({**sae, "lambda_1": l1}, seed=seed)
            seconds.append(fit(separate[l1, seed]))

    run_alone(grid[:4])
    sweep = SweepModule({**sae, "lambda_1": list(LAMBDAS)}, seed=list(SEEDS))
    together = fit(sweep)
    run_alone(grid[4:])
    for member, tracked in zip(sweep.members, sweep.tracked, strict=True):
        alone = separate[member.sae["lambda_1"], member.seed].sae
        if not torch.equal(alone.W_dec, tracked.sae.W_dec):
            raise SystemExit(f"{member.name} differs between the sweep and its own run")
    total = sum(seconds)
    tokens = options.steps * options.batch
    print(
        f"{len(grid)} SAEs of {options.expansion * d_in} x {d_in}, {options.steps} steps of "
        f"{options.batch} tokens, {options.threads} threads"
    )
    print(f"{'one stream':<16}{together:>9.1f} s{len(grid) * tokens / together:>12.0f} SAE-tokens/s")
    print(f"{'separate runs':<16}{total:>9.1f} s{len(grid) * tokens / total:>12.0f} SAE-tokens/s")
    print(f"{'ratio':<16}{together / total:>9.2f}   (weights equal bit for bit)")
    if options.json:
        numbers = {
            "one_stream_s": together,
            "separate_s": total,
            "ratio": together / total,
            "n_saes": len(grid),
        }
        options.json.write_text(json.dumps({"sweep": numbers}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
