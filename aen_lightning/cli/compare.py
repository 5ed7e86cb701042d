"""``aen compare``: are the same features found again?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aen_lightning.diagnostics.stability import compare_dictionaries
from aen_lightning.evaluate.dictionary import describe_dictionary, load_dictionary, log_sparsity
from aen_lightning.evaluate.results import head, number, short_names, table, write_result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aen compare",
        description="Match the features of two or more dictionaries (seeds, runs, releases) by cosine with the best one-to-one "
        "assignment, and say which share is found again.",
    )
    parser.add_argument("dictionary", nargs="+", help="two or more: folder with cfg.json, or RELEASE:ID")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument(
        "--threshold", type=float, nargs="+", default=[0.7, 0.9], metavar="C",
        help="cosines from which a pair is the same feature (default: 0.7 0.9)",
    )  # fmt: skip
    parser.add_argument("--with-dead", action="store_true", help="count features that never fire, too")
    parser.add_argument("--no-baseline", action="store_true", help="do not match with random directions")
    parser.add_argument(
        "--neighbours",
        type=int,
        default=32,
        metavar="N",
        help="candidates a feature where there are many (default: 32)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    return parser


def compare_command(args: Sequence[str]) -> int:
    """``aen compare DICTIONARY DICTIONARY... [options]``; returns the exit code.

    Raises:
        ValueError: Or OSError, with one clear line, for what cannot be compared.
    """
    options = _parser().parse_args(args)
    if len(options.dictionary) < 2:
        raise ValueError(f"aen compare needs at least two dictionaries, got {options.dictionary[0]} alone")
    names = short_names(options.dictionary)
    atoms: dict[str, Tensor] = {}
    live: dict[str, Tensor] = {}
    described = {}
    for name, reference in zip(names, options.dictionary, strict=True):
        sae = load_dictionary(reference, device=options.device)
        atoms[name] = sae.W_dec.detach()
        described[name] = describe_dictionary(sae, reference)
        sparsity = None if options.with_dead else log_sparsity(reference)
        if sparsity is not None:
            live[name] = alive(sparsity)
    found = compare_dictionaries(
        atoms,
        live=live,
        thresholds=options.threshold,
        baseline=not options.no_baseline,
        n_neighbours=options.neighbours,
    )
    result: dict[str, Any] = head("compare") | {"dictionaries": described} | found
    if options.json is not None:
        print(f"wrote {write_result(result, options.json)}")
    print(comparison_table(result))
    return 0


def alive(log_sparsity: Tensor) -> Tensor:
    """Features that fired at all, from SAELens's ``log10(rate + 1e-10)``; bool, shape (d_sae,)."""
    return torch.isfinite(log_sparsity) & (log_sparsity > -9.5)


def comparison_table(result: dict[str, Any]) -> str:
    """The table on screen: a row a pair, then chance."""
    thresholds = list(result["pairs"][0]["found_again"])
    rows = [
        [
            f"{pair['a']}  ~  {pair['b']}{'' if pair['exact'] else ' (near neighbours)'}",
            number(pair["cosine"]["mean"]),
            number(pair["cosine"]["p50"]),
            *(f"{100 * pair['found_again'][t][side]:.1f} %" for t in thresholds for side in ("of_a", "of_b")),
        ]
        for pair in result["pairs"]
    ]
    for name, chance in result.get("random_baseline", {}).items():
        shares = [f"{100 * chance['found_again'][t]:.1f} %" for t in thresholds]
        rows.append(
            [f"{name}  ~  random", number(chance["cosine"]["mean"]), number(chance["cosine"]["p50"])]
            + [cell for share in shares for cell in (share, "")]
        )
    header = ["pair", "mean cosine", "median", *(f"{t} {side}" for t in thresholds for side in ("of 1st", "of 2nd"))]
    text = [table(rows, header=header)]
    if len(result["n_features"]) > 2:
        shares = result["found_in_all"]
        body = [[name, *(f"{100 * shares[name][t]:.1f} %" for t in thresholds)] for name in shares]
        text.append(table(body, header=["found in all others", *thresholds]))
    dead = result["dead_features_left_out"]
    counts = ", ".join(f"{name}: {result['n_compared'][name]:,} of {n:,}" for name, n in result["n_features"].items())
    text.append(f"features compared{' (dead ones left out)' if dead else ''}: {counts}")
    return "\n\n".join(text)
