"""``aen diagnose``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from aen_lightning.cli.inputs import InputOpener, add_input_arguments, device_of
from aen_lightning.diagnostics.diagnose import RESULT_FILE, SECTIONS, diagnose_dictionary
from aen_lightning.evaluate.dictionary import load_dictionary
from aen_lightning.evaluate.results import number, result_path, table, write_result
from aen_lightning.saes.export import ADAPTIVE_STATE_FILENAME


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aen diagnose",
        description="What ails a dictionary: coherence of its atoms, geometry of those active together, how far a small change of the "
        "input moves the code, how far the encoder is from the exact code, and what becomes of features that are active together. "
        "Writes diagnosis.json into the dictionary's folder.",
    )
    parser.add_argument("dictionary", help="folder with cfg.json, or RELEASE:ID as for SAE.from_pretrained")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--no-inputs", action="store_true", help="only what needs no data: the coherence")
    parser.add_argument("--n-sample", type=int, default=128, metavar="N", help="tokens to solve exactly (default: 128)")
    parser.add_argument(
        "--n-lipschitz", type=int, default=32, metavar="N", help="of these, for Lipschitz constants (default: 32)"
    )
    parser.add_argument(
        "--l1-coefficient", type=float, help="of the coding problem, in SAELens's form (default: as trained)"
    )
    parser.add_argument(
        "--l2-coefficient", type=float, help="of the coding problem, in SAELens's form (default: as trained)"
    )
    parser.add_argument(
        "--l1-weights", metavar="FILE",
        help="safetensors file with the adaptive weights l1_weights, e.g. sae_weights.safetensors of a training checkpoint "
        "(default: adaptive_state.safetensors beside the dictionary, else computed anew from mean activations)",
    )  # fmt: skip
    add_input_arguments(parser, n_rows=256)
    return parser


def diagnose_command(args: Sequence[str]) -> int:
    """``aen diagnose DICTIONARY [options]``; returns the exit code.

    Raises:
        ValueError: Or OSError, with one clear line, for what cannot be diagnosed.
    """
    options = _parser().parse_args(args)
    sections = tuple(options.only or SECTIONS)
    for name in ("n_sample", "n_lipschitz"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    sae = load_dictionary(options.dictionary, device=device_of(options), dtype=options.dtype)
    needs_inputs = not options.no_inputs and set(sections) != {"coherence"}
    result = diagnose_dictionary(
        sae,
        InputOpener(options, whole_lm=False).open(sae) if needs_inputs else None,
        reference=options.dictionary,
        sections=sections,
        n_sample=options.n_sample,
        n_lipschitz=options.n_lipschitz,
        l1_coefficient=options.l1_coefficient,
        l2_coefficient=options.l2_coefficient,
        l1_weights=_weights_of(options.dictionary, options.l1_weights),
    )
    if (path := result_path(options.dictionary, options.json, RESULT_FILE)) is not None:
        write_result(result, path)
        print(f"wrote {path}")
    print(diagnosis_table(result))
    return 0


def _weights_of(dictionary: str, given: str | None) -> Tensor | None:
    """The adaptive weights from the file given, or from the state that our exports keep beside a dictionary."""
    if given is not None:
        return _read_weights(given)
    beside = Path(dictionary) / ADAPTIVE_STATE_FILENAME
    if not beside.is_file():
        return None
    with safe_open(beside, framework="pt") as f:
        # an imported checkpoint has the running means only
        return f.get_tensor("l1_weights") if "l1_weights" in f.keys() else None  # noqa: SIM118  # no __contains__


def _read_weights(path: str) -> Tensor:
    with safe_open(path, framework="pt") as f:
        names = list(f.keys())
        if "l1_weights" not in names:
            raise ValueError(f"{path} has no tensor l1_weights; it has {', '.join(names)}")
        return f.get_tensor("l1_weights")


def diagnosis_table(result: dict[str, Any]) -> str:
    """The table on screen, with a word on what each number means."""
    rows: list[list[str]] = []

    def spread(label: str, s: dict[str, Any], meaning: str = "") -> None:
        rows.append(
            [label, number(s["mean"]), number(s["p10"]), number(s["p50"]), number(s["p90"]), number(s["max"]), meaning]
        )

    def single(label: str, value: float | None, meaning: str = "") -> None:
        rows.append([label, number(value), "", "", "", "", meaning])

    if (c := result["coherence"]) is not None:
        rows.append(["coherence"])
        spread("nearest |cosine|", c, f"{100 * c['share_above_0.9']:.2g} % of atoms above 0.9")
    if (g := result["active_gram"]) is not None:
        rows.append([f"atoms active together ({g['n_tokens']} tokens)"])
        spread("smallest eigenvalue", g["min_eigenvalue"], "1 if orthogonal, 0 if dependent")
        spread("condition number", g["condition_number"])
        spread("leakage per pair", g["leakage_per_pair"], "overlap with inactive atoms, root mean square")
        spread("cross-leverage, worst atom", g["cross_leverage_max"], "1: the active atoms can write it")
    if (li := result["lipschitz"]) is not None:
        rows.append([f"change of the code per change of the input ({li['n_tokens']} tokens)"])
        spread("encoder, small steps", li["encoder"]["empirical"])
        single(
            "encoder, bound", li["encoder"]["bound"], "" if li["encoder"]["is_continuous"] else "but this encoder jumps"
        )
        if (m := li["coding_map"]) is not None:
            spread("exact code, small steps", m["empirical"])
            single("exact code, bound", m["bound"], "1 / (2 sqrt(l2))" if m["bound"] else "none: l2 is 0")
    if (gap := result["coding_gap"]) is not None:
        rows.append([f"the encoder against the exact code ({gap['n_tokens']} tokens)"])
        spread("objective above optimum, %", gap["excess_pct"], "the encoder's loss by not solving")
        single("  of it by magnitudes", gap["from_magnitudes_share"], "the rest by the choice of features")
        for name, label in (("explained_variance", "explained variance"), ("l0", "L0")):
            single(f"{label}: encoder", gap[name]["encoder"])
            single(f"{label}: exact", gap[name]["exact"])
        single("support found (Jaccard)", gap["support"]["jaccard"])
        s = gap["starvation"]
        single("features used: encoder", s["features_fired_by_encoder"])
        single(
            "features used: exact",
            s["features_fired_by_exact"],
            f"{s['dead_used_by_exact']} of {s['dead']} dead ones among them",
        )
        single("largest relative gap", gap["certificate"]["max_relative_gap"], "certificate of the exact code")
    text = [table(rows, header=["", "mean", "p10", "median", "p90", "max", ""])] if rows else []
    if (co := result["composition"]) is not None:
        names = (
            ("lost_share", "lost"), ("spurious", "spurious"), ("magnitude_ratio", "magnitude"),
            ("reconstruction_error", "error"), ("interference", "interference"),
        )  # fmt: skip
        body = [[str(k), *(number(co[name][i]) for name, _ in names)] for i, k in enumerate(co["sizes"])]
        text.append("features active together, decoded and encoded again")
        text.append(table(body, header=["k", *(label for _, label in names)]))
    text += [f"skipped {name}: {why}" for name, why in result["skipped"].items()]
    return "\n\n".join(text)
