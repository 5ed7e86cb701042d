"""Harvest and reading, side by side in one run: ours, SAELens's, and the bare work.

    python benchmarks/harvest.py --quick                                   # small random model, under two
    minutes python benchmarks/harvest.py --model FOLDER_OR_NAME --layer 14 --json out.json

Harvest: tokens per second of `aen harvest`, of SAELens's CacheActivationsRunner on the same Hugging Face
model, and of the bare forward pass of the cut model (same rows, same batches, nothing written), each in a
process of its own, as its users run it. Imports and model loading are left out everywhere; writing is in.
Ours runs the rows of a batch side by side on a CPU (language_model/batch_threads.py), the limit as torch
does; without --quick the limit is also measured with rows side by side ("limit_threads"). Read: rows per
second of ActivationsDataModule, fully shuffled; of SAELens's cached reader, which does not shuffle; and of
reading the same files from end to end. Train: steps of the same SAE fed from disk and from memory. Memory:
peak resident set of a process that harvests, its imports included.

Contenders run in turns of a fraction of a second (slices.py) where they are processes, and whole turns where
not; ratios are medians over --turns, since a shared machine drifts by more than they differ. "_cpu" ratios
are of CPU seconds over all threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import datasets  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from slices import Spans, python, ready, report, run_in_slices  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast  # noqa: E402

from aen_lightning.data.activations import ActivationsDataModule  # noqa: E402
from aen_lightning.harvest import HarvestDataModule, HarvestModule, ShardWriter, run_harvest  # noqa: E402
from aen_lightning.shards import Manifest, ShardFolder, ShardStream, to_saelens  # noqa: E402

CONTEXT, ROWS_A_CALL, READ_D_IN, READ_BATCH = 128, 32, 576, 4096  # 32 rows a call: the default of both


class LoadOutside(HarvestModule):
    """Stops the clock while it loads: that is not part of the claim."""

    spans: Spans

    def configure_model(self) -> None:  # noqa: D102
        self.spans.__exit__()
        super().configure_model()
        self.spans.__enter__()


def random_model(folder: Path) -> str:
    """A Llama of 7 million weights a block, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models

    config = LlamaConfig(
        hidden_size=READ_D_IN, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocab = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 4096)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)
    return str(folder)


def token_dataset(model: str, n_rows: int) -> datasets.Dataset:
    """Rows of tokens, as text would be after packing; no special tokens among them."""
    vocab_size = AutoConfig.from_pretrained(model).vocab_size
    rows = torch.randint(100, vocab_size, (n_rows, CONTEXT), generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


def harvest_ours(spans: Spans, model: str, layer: int, data: Path, out: Path, shard_size_mib: float) -> int:
    """A harvest to disk; returns the tokens."""
    module = LoadOutside(model, [f"blocks.{layer}.hook_resid_post"])
    module.spans = spans
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=out.parent,
        callbacks=[ShardWriter(str(out), shard_size_mib=shard_size_mib)],
    )  # fmt: skip
    rows = HarvestDataModule(str(data), context_size=CONTEXT, batch_size_prompts=ROWS_A_CALL)
    with spans:
        return run_harvest(trainer, module, rows).n_tokens


def harvest_saelens(
    spans: Spans, model: str, layer: int, data: Path, out: Path, shard_size_mib: float
) -> int:
    """SAELens's run; returns the tokens it made, since it knows whole buffers only."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    rows, config = datasets.load_from_disk(str(data)), AutoConfig.from_pretrained(model)
    d_in, n_tokens = config.hidden_size, len(rows) * CONTEXT
    cfg = CacheActivationsRunnerConfig(
        dataset_path="unused", model_name=model, model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{layer}",
        d_in=d_in, training_tokens=n_tokens, context_size=CONTEXT, model_batch_size=ROWS_A_CALL,
        dtype="float32", device="cpu",
        prepend_bos=False, streaming=False, shuffle=False, new_cached_activations_path=str(out),
        buffer_size_gb=min(shard_size_mib * 2**20, n_tokens * d_in * 4) / 1e9 * 1.0000001,
    )  # fmt: skip
    runner = CacheActivationsRunner(cfg, override_dataset=rows)
    with spans:
        return len(runner.run()) * CONTEXT


def forward_limit(spans: Spans, model: str, layer: int, data: Path, *, threads: bool) -> int:
    """The cut model's forward passes alone, as torch runs them or with rows side by side; returns the
    tokens."""
    from aen_lightning.language_model.cut_model import load_cut_model

    lm = load_cut_model(model, [f"blocks.{layer}.hook_resid_post"])
    rows = torch.tensor(datasets.load_from_disk(str(data))["input_ids"][:])
    with torch.inference_mode(), spans:
        for batch in rows.split(ROWS_A_CALL):
            lm.activations(batch) if threads else lm.model(input_ids=batch)
    return rows.numel()


def worker(name: str, model: str, layer: int, data: Path, out: Path, shard_mib: float) -> None:
    """One contender, alone in this process."""

    def run(spans: Spans, data: Path, out: Path) -> int:
        if name.startswith("limit"):
            return forward_limit(spans, model, layer, data, threads=name == "limit_threads")
        harvest = harvest_saelens if name == "saelens" else harvest_ours
        return harvest(spans, model, layer, data, out, shard_mib)

    token_dataset(model, ROWS_A_CALL).save_to_disk(str(out / "few"))
    run(Spans(), out / "few", out / "warm-up")
    ready()
    n_tokens = run(spans := Spans(), data, out / "set")
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    report(spans, n_tokens=n_tokens, peak_mib=peak)


def bench_harvest(
    model: str, layer: int, n_rows: int, turns: int, folder: Path, more: bool
) -> dict[str, float]:
    """Tokens per second of each; ratios are taken turn by turn."""
    token_dataset(model, n_rows).save_to_disk(str(folder / "tokens"))
    shard_mib = (
        n_rows * CONTEXT * AutoConfig.from_pretrained(model).hidden_size * 4 / 2**20 / 2
    )  # two shards, two buffers
    contenders = ["ours", "saelens", "limit", *(["limit_threads"] if more else [])]
    options = {"model": model, "layer": layer, "folder": folder, "shard_mib": shard_mib}
    commands = {name: python(__file__, worker=name, **options) for name in contenders}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, done in run_in_slices(commands).items():
            seconds[name].append((done.wall / done.result["n_tokens"], done.cpu / done.result["n_tokens"]))
    return _rates_and_cpu_ratios(seconds, "tok_s")


def bench_memory(model: str, layer: int, folder: Path) -> dict[str, float]:
    """Peak memory, each in a process of its own: same tokens, each with its own default size of shard or
    buffer.

    SAELens's default buffer, 2 GB, is cut down to the tokens of this run, which it would otherwise exceed.
    """
    out = {}
    for name, shard_mib in {"ours": 256.0, "saelens": 2e9 / 2**20}.items():
        options = {"worker": name, "model": model, "layer": layer, "folder": folder, "shard_mib": shard_mib}
        done = run_in_slices({name: python(__file__, **options)})
        out[f"{name}_peak_mib"] = done[name].result["peak_mib"]
    out["ours_to_saelens"] = out["ours_peak_mib"] / out["saelens_peak_mib"]
    return out


def write_read_set(folder: Path, n_rows: int) -> None:
    """The same random float32 rows as shards and as SAELens's cache."""
    hook, generator = "blocks.0.hook_resid_post", torch.Generator().manual_seed(0)
    ShardFolder(folder / "set").begin(Manifest({hook: READ_D_IN}, "float32", CONTEXT))
    per_shard = n_rows // 4
    for index in range(4):
        stream = ShardStream(folder / "set", index, {hook: READ_D_IN}, "float32", per_shard)
        stream.append({hook: torch.randn(per_shard, READ_D_IN, generator=generator)}, torch.zeros(per_shard))
        stream.close()
    ShardFolder(folder / "set").collect(complete=True)
    to_saelens(folder / "set", folder / "cache")


def bench_read(n_rows: int, turns: int, folder: Path) -> dict[str, float]:
    """Rows per second, the files in the page cache for all three."""
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    write_read_set(folder, n_rows)
    hook, n_batches = "blocks.0.hook_resid_post", n_rows // READ_BATCH
    data = ActivationsDataModule(
        str(folder / "set"), train_batch_size_tokens=READ_BATCH, held_out_fraction=0.0
    )
    data.prepare_data()
    data.setup()
    lm = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=8, n_ctx=CONTEXT, d_head=8, d_vocab=9, act_fn="relu", device="cpu"
        )
    )

    def ours() -> int:
        batches = iter(data.train_dataloader())
        n = sum(len(b) for b in itertools.islice(batches, n_batches))
        batches.close()
        return n

    def saelens() -> int:
        store = ActivationsStore(
            model=lm, dataset=None, streaming=False, hook_name=hook, hook_head_index=None,
            context_size=CONTEXT, d_in=READ_D_IN,
            n_batches_in_buffer=64, total_training_tokens=n_rows,
            store_batch_size_prompts=READ_BATCH // CONTEXT,
            train_batch_size_tokens=READ_BATCH, prepend_bos=False, normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32", cached_activations_path=str(folder / "cache"),
        )  # fmt: skip
        return sum(len(store.get_raw_llm_batch()[0]) for _ in range(n_batches))

    def sequential() -> int:
        buffer = bytearray(READ_BATCH * READ_D_IN * 4)
        n_bytes = 0
        for path in sorted((folder / "set").glob("*.safetensors")):
            with path.open("rb", buffering=0) as f:
                while n := f.readinto(buffer):
                    n_bytes += n
        return n_bytes // (READ_D_IN * 4)

    seconds: dict[str, list[float]] = {"ours": [], "saelens": [], "sequential": []}
    for turn in range(turns + 1):
        for name, read in (("ours", ours), ("saelens", saelens), ("sequential", sequential)):
            start = time.perf_counter()
            n = read()
            if turn:
                seconds[name].append((time.perf_counter() - start) / n)
    return _rates(seconds, "rows_s")


class InMemory(pl.LightningDataModule):
    """The batches of another data module, read beforehand."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:  # noqa: D102
        return itertools.cycle(self.batches)


class StepTimer(pl.Callback):
    """From the end of a step to the end of a later one."""

    def __init__(self, spans: Spans, first: int, last: int) -> None:
        self.spans, self.first, self.last = spans, first, last

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:  # noqa: D102
        if trainer.global_step == self.first:
            ready()
            self.spans.__enter__()
        if trainer.global_step == self.last:
            self.spans.__exit__()


def train_worker(name: str, folder: Path, steps: int) -> None:
    """Steps of one SAE, fed from disk or from memory, alone in this process."""
    from aen_lightning.training.module import SAEModule

    data: Any = ActivationsDataModule(
        str(folder / "set"), train_batch_size_tokens=1024, held_out_fraction=0.0
    )
    if name == "memory":
        data.prepare_data()
        data.setup()
        data = InMemory(list(itertools.islice(data.train_dataloader(), 32)))
    spans = Spans()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps + 5, logger=False, enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False, callbacks=[StepTimer(spans, 5, steps + 5)], default_root_dir=folder,
    )  # fmt: skip
    sae = {"architecture": "standard", "d_in": READ_D_IN, "d_sae": 2304, "l1_coefficient": 1.0}
    trainer.fit(SAEModule(sae=sae), data)
    report(spans, steps=steps)


def bench_train(steps: int, turns: int, folder: Path) -> dict[str, float]:
    """Steps per second of one SAE, fed from disk and from memory."""
    commands = {name: python(__file__, worker=name, folder=folder, rows=steps) for name in ("disk", "memory")}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(turns):
        for name, done in run_in_slices(commands).items():
            seconds[name].append((done.wall / steps, done.cpu / steps))
    return _rates_and_cpu_ratios(seconds, "steps_s")


def _rates_and_cpu_ratios(seconds: dict[str, list[tuple[float, float]]], unit: str) -> dict[str, float]:
    """Of wall and CPU seconds: all of the first, and the second's ratios, which other work on the machine
    disturbs less."""
    wall, cpu = (_rates({name: [x[i] for x in v] for name, v in seconds.items()}, unit) for i in (0, 1))
    return wall | {f"{k}_cpu": v for k, v in cpu.items() if "_to_" in k}


def _rates(seconds: dict[str, list[float]], unit: str) -> dict[str, float]:
    """Rates by median, and the median over turns of the first contender's rate divided by each other's."""
    first, *others = seconds
    out = {f"{name}_{unit}": 1 / statistics.median(s) for name, s in seconds.items()}
    for other in others:
        pairs = zip(seconds[first], seconds[other], strict=True)
        out[f"{first}_to_{other}"] = statistics.median(b / a for a, b in pairs)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small random model, little of everything: under two minutes"
    )
    parser.add_argument(
        "--model", help="Hugging Face name or folder of a Llama-like model; default: small and random"
    )
    parser.add_argument("--layer", type=int, help="block whose output is taken; default: the middle one")
    parser.add_argument(
        "--rows", type=int, default=128, help=f"rows of {CONTEXT} tokens a turn of the harvest"
    )
    parser.add_argument("--read_rows", type=int, default=400_000, help=f"rows of {READ_D_IN} float32 to read")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", help="where to put files; default: a temporary folder")
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--only", nargs="*", choices=["harvest", "memory", "read", "train"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--shard_mib", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("lightning.pytorch", "transformers", "sae_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-harvest-") as temporary:
        folder = Path(temporary)
        if args.worker in ("disk", "memory"):
            train_worker(args.worker, Path(args.folder), args.rows)
            return
        if args.worker:
            data = Path(args.folder) / "tokens"
            worker(args.worker, args.model, args.layer, data, folder / "out", args.shard_mib)
            return
        if args.quick:
            args.rows, args.read_rows, args.turns = 2 * ROWS_A_CALL, 131_072, 2
        model = args.model or random_model(folder / "model")
        layer = (
            args.layer if args.layer is not None else AutoConfig.from_pretrained(model).num_hidden_layers // 2
        )
        wanted = args.only or (["harvest", "read"] if args.quick else ["harvest", "memory", "read", "train"])
        results: dict[str, dict[str, float]] = {}
        if "harvest" in wanted:
            results["harvest"] = bench_harvest(model, layer, args.rows, args.turns, folder, not args.quick)
        if "memory" in wanted:
            if "harvest" not in wanted:
                token_dataset(model, args.rows).save_to_disk(str(folder / "tokens"))
            results["memory"] = bench_memory(model, layer, folder)
        if "read" in wanted or "train" in wanted:
            results["read"] = bench_read(args.read_rows, args.turns, folder)
        if "train" in wanted:
            results["train"] = bench_train(12 if args.quick else 80, args.turns, folder)
        print(f"{model}, block {layer}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
        for part, numbers in results.items():
            for name, value in numbers.items():
                print(
                    f"{part:<8} {name:<22} {value:>14,.3f}"
                    if "_to_" in name
                    else f"{part:<8} {name:<22} {value:>14,.1f}"
                )
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
