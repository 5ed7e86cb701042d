"""Damaged, hostile and merely odd files, and what must hold whatever is in them.

Every input is a good file with a few changes, opened the way a user would. It is taken, and then what it says is
true; or it is refused in one line that names it. No other error, no code of it run, nothing written elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from aen_lightning.cli.errors import UsageError, one_line
from aen_lightning.cli.main import run
from aen_lightning.evaluate import load_dictionary
from aen_lightning.language_model.checkpoint_files import read_weight_map
from aen_lightning.report import collect
from aen_lightning.report.figures import make_figures
from aen_lightning.report.result_tables import comparison_tables, result_tables
from aen_lightning.report.tables import summary_table
from aen_lightning.runs.checkpoint import require_checkpoint
from aen_lightning.runs.curves import read_curves
from aen_lightning.runs.provenance import collect_provenance
from aen_lightning.shards import ShardSet, convert
from tests.support.runs import make_run
from tests.support.shard_sets import write_set

LONGEST_LINE = 2000


@dataclass
class Tally:
    """What became of the inputs of one kind: accepted at every door, or refused at one or more."""

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Kind:
    """A kind of file.

    Args:
        make: Writes a good folder.
        file: The file in it that is changed.
        doors: Each opens the folder.
        truth: Raises AssertionError if what a door accepted is not so.
        n_true: So many of the doors, from the first, read all that ``truth`` is about.
        read: Content of the file, to be changed as data; None: bytes only.
        write: Its reverse.
    """

    make: Callable[[Path], Any]
    file: str
    doors: tuple[Callable[[Path], Any], ...]
    truth: Callable[[Path], None] = lambda folder: None
    read: Callable[[Path], Any] | None = None
    write: Callable[[Path, Any], None] | None = None
    n_true: int = 9


class RunsCode:
    """Unpickled, it touches a file."""

    def __init__(self, sentinel: str) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.sentinel,)


# --- values and changes -------------------------------------------------------------------------------------

NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 16, 99, 2**31, 2**53, 2**63, 2**64, 10**12, 10**400]),
    st.sampled_from([float("nan"), float("inf"), -0.0, 0.5, 1e308, 7.0]),
    st.sampled_from(
        ["", "../x", "/etc/passwd", "..\\x", "a/b", "\x1b[2J", "\ud800", "\u202e", "\0", "nan", "1e999", "a" * 3000,
         "{{7*7}}", "<b>", "\n", "none", "topk", "jumprelu", "temporal", "bfloat16", "complex64", "shard-00001.safetensors",
         "to_dict", "__class__", "self", "blocks.0.hook_resid_post", "os.system", "9" * 5000]),
    st.text(max_size=8),
    st.lists(st.integers(-2, 2**40), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(-2, 5), max_size=3),
    st.sampled_from([[[[]]], {"a": {"b": []}}, {"trust_remote_code": True}, {"value": "x", "se": None}]),
)  # fmt: skip


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested data, from the top."""
    yield at
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*at, key))
    elif isinstance(content, list):
        for i, value in enumerate(content[:6]):
            yield from places(value, (*at, i))


@st.composite
def changed(draw: st.DrawFn, good: Any) -> Any:
    """The data with one to three changes."""
    content = copy.deepcopy(good)

    def nasty() -> Any:
        return copy.deepcopy(
            draw(NASTY)
        )  # the next change may reach into it, and must not change NASTY itself

    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(content))))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return nasty()
            if isinstance(content, dict):
                content[draw(st.text(max_size=6) | st.sampled_from(["to_dict", "self", "schema"]))] = nasty()
            continue
        holder = content
        for part in place[:-1]:
            holder = holder[part]
        change = draw(st.sampled_from(["replace", "replace", "replace", "delete", "twice", "rename", "near"]))
        old = holder[place[-1]]
        if change == "delete":
            del holder[place[-1]]
        elif change == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(old))
        elif change == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = holder.pop(place[-1])
        elif change == "near" and isinstance(old, int | float) and not isinstance(old, bool):
            holder[place[-1]] = old + draw(st.sampled_from([-1, 1, 10**6, -2 * abs(old) or -1]))
        else:
            holder[place[-1]] = nasty()
    return content


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """The bytes cut off, changed in places, or others altogether."""
    how = draw(st.sampled_from(["cut", "flip", "flip", "insert", "head", "other"]))
    at = draw(st.integers(0, max(0, len(good) - 1)))
    if how == "cut":
        return good[:at]
    if how == "insert":
        return good[:at] + draw(st.binary(min_size=1, max_size=20)) + good[at:]
    if how == "head":
        return draw(st.sampled_from([0, 7, 2**32, 2**62, 2**64 - 1])).to_bytes(8, "little") + good[8:]
    if how == "other":
        return draw(st.binary(max_size=200))
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    return bytes(content)


# --- the kinds ----------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_yaml(path: Path, content: Any) -> None:
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
        path.write_text(yaml.safe_dump(content), encoding="utf-8")


def _write_checkpoint(path: Path, content: Any) -> None:
    torch.save(content, path)


def _command(*words: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> None:
        run([word.replace("{}", str(folder)) for word in words])

    return call


def _shards(folder: Path) -> None:
    write_set(folder / "set", [7, 9])


def _cache(folder: Path) -> None:
    _shards(folder)
    with contextlib.redirect_stderr(io.StringIO()):
        convert(folder / "set", folder / "cache")


def _whole_set(folder: Path) -> None:
    """What was verified is all there, once, and as it was hashed."""
    content = _read_json(folder / "set" / "manifest.json")
    files = [s["file"] for s in content["shards"]]
    assert files == [f"shard-{i:05d}.safetensors" for i in range(len(files))]
    assert content["n_shards"] in (None, len(files))
    for shard in content["shards"]:
        path = folder / "set" / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert len(load_file(path)["token_ids"]) == shard["n_tokens"]


def _dictionary(folder: Path) -> None:
    make_run(folder / "run")
    shutil.rmtree(folder / "run" / "sae" / "step_10")


def _true_dictionary(folder: Path) -> None:
    final = folder / "run" / "sae" / "final"
    weights, cfg = load_file(final / "sae_weights.safetensors"), _read_json(final / "cfg.json")
    assert all(bool(t.isfinite().all()) for t in weights.values())
    assert tuple(weights["W_dec"].shape) == (cfg["d_sae"], cfg["d_in"])


def _report(folder: Path) -> None:
    report = collect([folder / "run"], sorted(folder.glob("*.json")))
    summary_table(report)
    result_tables(report)
    comparison_tables(report)


def _results(folder: Path) -> None:
    _dictionary(folder)
    final = folder / "run" / "sae" / "final"
    estimate = {"value": 0.5, "se": 0.1}
    _write_json(
        final / "evaluation.json",
        {"command": "evaluate", "schema": 1, "created": "2026-01-01T00:00:00Z", "versions": {"torch": "2"},
         "dictionary": {"path": str(final)}, "sparsity": {"l0": estimate, "l1": estimate},
         "features": {"n_tokens": 10, "dead_pct": 5.0, "gini": 0.5},
         "reconstruction": {"raw": {"cosine": estimate}, "scaled": {"explained_variance": estimate}}},
    )  # fmt: skip
    _write_json(
        final / "diagnosis.json",
        {"command": "diagnose", "schema": 1, "dictionary": {"path": str(final)}, "coherence": {"mean": 0.5},
         "composition": {"sizes": [1, 2], "lost_share": [0, 0.5], "spurious": [0, 1.5]},
         "coding_gap": {"excess_pct": {"p50": 1.0}}},
    )  # fmt: skip


def _comparison(folder: Path) -> None:
    _dictionary(folder)
    cosine = {"mean": 0.9, "min": 0.1, "p10": 0.2, "p50": 0.9, "p90": 1.0, "max": 1.0}
    _write_json(
        folder / "comparison.json",
        {"command": "compare", "schema": 1, "created": "x", "versions": {"torch": None}, "dictionaries": {"a": {}, "b": {}},
         "n_features": {"a": 6, "b": 6}, "n_compared": {"a": 3, "b": 6}, "dead_features_left_out": True,
         "pairs": [{"a": "a", "b": "b", "exact": True, "n_pairs": 3, "cosine": cosine,
                    "found_again": {"0.7": {"of_a": 0.5, "of_b": 0.25}}}],
         "found_in_all": {"a": {"0.7": 0.5}, "b": {"0.7": 0.5}},
         "random_baseline": {n: {"cosine": cosine, "found_again": {"0.7": 0.0}} for n in "ab"}},
    )  # fmt: skip


def _sweep(folder: Path) -> None:
    _dictionary(folder)
    (folder / "run" / "sweep.csv").write_text(
        "name,architecture,gamma,l0,explained_variance,mse,shrinkage_ratio,dead_features_pct,d_in,d_sae,seed,n_training_samples\n"
        "a,aen,0.5,3,0.5,0.1,0.9,10,8,16,0,64\nb,topk,,4,0.6,0.1,0.9,0,8,16,1,64\n"
    )


def _read_csv(path: Path) -> Any:
    return [line.split(",") for line in path.read_text().splitlines()]


def _write_csv(path: Path, content: Any) -> None:
    rows = content if isinstance(content, list) else [content]
    lines = [",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def _config(folder: Path) -> None:
    recipe = {
        "seed_everything": 1,
        "model": {"lr": 0.001, "sae": {"architecture": "aen", "d_in": 32, "d_sae": 64, "gamma": 0.5}},
        "data": {"class_path": "SpikedDataModule", "init_args": {"d_in": 32, "n_features": 64, "k": 4}},
        "trainer": {"max_steps": 10, "accelerator": "cpu", "devices": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))


def _run_config(folder: Path) -> None:
    _dictionary(folder)
    config = {"seed_everything": 7, "model": {"lr": 1e-3, "sae": {"gamma": 0.5}}, "data": {"class_path": "x"},
              "trainer": {"max_steps": 5, "strategy": "auto"}}  # fmt: skip
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))


def _provenance(folder: Path) -> None:
    # curves of an SAE that has no dictionary are reported, too
    (found,) = (d.dictionary for d in collect([folder / "run"]).dictionaries if d.dictionary is not None)
    json.dumps(collect_provenance(found), allow_nan=False)


def _checkpoint(folder: Path) -> None:
    content = {
        "epoch": 0, "global_step": 10, "pytorch-lightning_version": "2.6.0", "state_dict": {"sae.W_enc": torch.ones(2, 2)},
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"x": {}}, "optimizer_states": [{"state": {}}],
        "lr_schedulers": [], "hyper_parameters": {"lr": 0.1},
    }  # fmt: skip
    torch.save(content, folder / "run.ckpt")


def _authors(folder: Path) -> None:
    state = {"b_dec": torch.zeros(4), "encoder.weight": torch.randn(6, 4), "encoder.bias": torch.zeros(6),
             "decoder.weight": torch.randn(4, 6), "ema_abs_activations": torch.ones(6), "_step_count": torch.tensor(5)}  # fmt: skip
    content = {"model_state_dict": state, "run_name": "adaptive_elastic_net", "trainer_config": {"lambda_1": 0.1, "gamma": 0.5},
               "run_metadata": {"d_in": 4}, "metrics_history": [{"l0": 3.0}]}  # fmt: skip
    torch.save(content, folder / "adaptive_elastic_net.pt")


def _load_tensors(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def _import(folder: Path) -> None:
    file, out = str(folder / "adaptive_elastic_net.pt"), str(folder / "out")
    run(["import", file, out, "--model_name", "a/b", "--hook_name", "blocks.0.hook_resid_post"])


def _index(folder: Path) -> None:
    _write_json(folder / "model.safetensors.index.json",
                {"metadata": {"total_size": 9}, "weight_map": {"h.0.w": "model-1.safetensors", "h.1.w": "model-2.safetensors"}})  # fmt: skip


def _plain_index(folder: Path) -> None:
    files = read_weight_map(folder / "model.safetensors.index.json").values()
    assert all(Path(name).name == name and name not in ("", ".", "..") for name in files)


def _final(folder: Path) -> Path:
    return folder / "run" / "sae" / "final"


_OPEN_SET = (_command("shards", "verify", "{}/set"), _command("shards", "info", "{}/set"))
_OPEN_DICTIONARY = (
    lambda folder: load_dictionary(_final(folder)),
    _command("push", "{}/run", "me/sae", "--dry_run"),
    _report,
)

KINDS: dict[str, Kind] = {
    "manifest": Kind(_shards, "set/manifest.json", _OPEN_SET, _whole_set, _read_json, _write_json, 1),
    "shard": Kind(
        _shards, "set/shard-00001.safetensors", (*_OPEN_SET[:1], lambda f: ShardSet(f / "set")), _whole_set, n_true=1
    ),
    "verification notes": Kind(
        _shards, "set/.verified.json", (lambda f: ShardSet(f / "set"),), _whole_set, _read_json, _write_json
    ),
    "saelens cache": Kind(
        _cache, "cache/state.json", (_command("shards", "info", "{}/cache"),), read=_read_json, write=_write_json
    ),
    "cfg.json": Kind(_dictionary, "run/sae/final/cfg.json", _OPEN_DICTIONARY, _true_dictionary, _read_json, _write_json, 2),
    "weights": Kind(_dictionary, "run/sae/final/sae_weights.safetensors", _OPEN_DICTIONARY, _true_dictionary, n_true=2),
    "sparsity": Kind(
        _dictionary, "run/sae/final/sparsity.safetensors", (lambda f: make_figures(collect([f / "run"])),)
    ),
    "checkpoint": Kind(
        _checkpoint, "run.ckpt", (lambda f: require_checkpoint(f / "run.ckpt"),), read=_load_tensors,
        write=_write_checkpoint,
    ),
    "authors' checkpoint": Kind(
        _authors, "adaptive_elastic_net.pt", (_import,), read=_load_tensors, write=_write_checkpoint
    ),
    "model index": Kind(
        _index, "model.safetensors.index.json", (lambda f: read_weight_map(f / "model.safetensors.index.json"),),
        _plain_index, _read_json, _write_json,
    ),
    "config": Kind(
        _config, "config.yaml", (_command("plan", "--config", "{}/config.yaml"),),
        read=lambda path: yaml.safe_load(path.read_text()), write=_write_yaml,
    ),
    "config of a run": Kind(
        _run_config, "run/config.yaml", (_provenance, _command("push", "{}/run", "me/sae", "--dry_run")),
        read=lambda path: yaml.safe_load(path.read_text()), write=_write_yaml,
    ),
    "comparison": Kind(_comparison, "comparison.json", (_report,), read=_read_json, write=_write_json),
    "evaluation": Kind(_results, "run/sae/final/evaluation.json", (_report,), read=_read_json, write=_write_json),
    "diagnosis": Kind(
        _results, "run/sae/final/diagnosis.json", (_report, lambda f: make_figures(collect([f / "run"]))),
        read=_read_json, write=_write_json,
    ),
    "sweep": Kind(_sweep, "run/sweep.csv", (_report,), read=_read_csv, write=_write_csv),
    "metrics": Kind(
        _dictionary, "run/metrics.csv", (_report, lambda f: read_curves(f / "run"), _provenance), read=_read_csv,
        write=_write_csv,
    ),
}  # fmt: skip


# --- one input, and many ------------------------------------------------------------------------------------


def _tree(folder: Path, leave_out: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
        if not str(path.relative_to(folder)).startswith(leave_out)
    }


_TURNS_WRITING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def _obeyed(text: str) -> bool:
    """Whether a terminal would do something else with a text than show it."""
    return any(
        (unicodedata.category(c) in ("Cc", "Cs") and c not in "\r\n\t")
        or unicodedata.bidirectional(c) in _TURNS_WRITING
        for c in text
    )


def _complaint(error: Exception, case: Path) -> str | None:
    """What is wrong with how an input was refused; None if nothing."""
    line, cause = str(error), error.__cause__
    if isinstance(error, UsageError):
        line = one_line(error)
        raw = (
            isinstance(cause, TypeError | AttributeError | LookupError)
            and type(cause).__name__ != "NSKeyError"
        )
        if raw and str(cause) == str(error):
            return f"obscure {type(cause).__name__}: {cause}"
    elif not isinstance(error, ValueError | OSError):
        return f"raw {type(error).__name__}: {error}"
    named = str(case) in line or "adaptive_elastic_net.pt" in line
    if not named and not (
        isinstance(error, UsageError) and (case / "config.yaml").is_file()
    ):  # there, the option
        return f"names no file: {line}"
    if len(line) > LONGEST_LINE:
        return f"{len(line)} characters: {line[:200]}"
    return f"a terminal would obey it: {line!r}" if _obeyed(line) else None


def try_one(kind: Kind, content: Any, is_bytes: bool, root: Path, tally: Tally) -> None:
    """Write one input, open it at every door, and note what is wrong."""
    tally.tried += 1
    case, good, sentinel = root / "case", root / "good", root / "code ran"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(good, case)
    path = case / kind.file
    if is_bytes:
        path.write_bytes(content)
    else:
        assert kind.write is not None
        kind.write(path, content)
    before = _tree(root, "case")
    n_accepted = 0
    for number, door in enumerate(kind.doors):
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()) as out,
                contextlib.redirect_stderr(out),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                door(case)
            n_accepted += 1
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what we look for
            if complaint := _complaint(error, case):
                tally.faults.append(complaint)
        else:
            if _obeyed(out.getvalue()):
                tally.faults.append(f"printed what a terminal obeys: {out.getvalue()!r}")
            try:
                if number < kind.n_true:
                    kind.truth(case)
            except Exception as error:  # noqa: BLE001
                tally.faults.append(f"accepted, and it is not so: {type(error).__name__} {error}")
    tally.accepted += n_accepted == len(kind.doors)
    tally.refused += n_accepted < len(kind.doors)
    if sentinel.exists():
        tally.faults.append("code ran")
        sentinel.rmdir()
    if _tree(root, "case") != before:
        tally.faults.append("wrote outside of the input's folder")


def fuzz(name: str, count: int, root: Path, *, at: int = 0) -> Tally:
    """``count`` inputs of a kind.

    Args:
        name: One of ``KINDS``.
        count: How many.
        root: An empty folder.
        at: Seed.
    """
    kind, tally = KINDS[name], Tally()
    (root / "good").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.make(root / "good")
    path = root / "good" / kind.file
    raw = path.read_bytes()
    inputs: Any = damaged(raw).map(lambda content: (content, True))
    if kind.read is not None:
        good = kind.read(path)
        as_data = changed(good).map(lambda content: (content, False))
        if path.suffix in (".pt", ".ckpt"):
            hostile = st.just(({"state_dict": RunsCode(str(root / "code ran"))}, False))
            inputs = st.one_of(as_data, as_data, inputs, hostile)
        else:
            inputs = st.one_of(as_data, as_data, as_data, inputs)

    @seed(at)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(inputs)
    def many(made: tuple[Any, bool]) -> None:
        if tally.tried < count:
            try_one(kind, *made, root, tally)

    first = Tally()
    try_one(kind, raw, True, root, first)
    assert (first.accepted, first.faults) == (1, []), f"the good {name} is refused: {first.faults}"
    many()
    return tally
