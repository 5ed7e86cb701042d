"""``aen compare``: are the same features found again?"""

from __future__ import annotations

from typing import Any


def compare(
    dictionary: list[str],
    *,
    out: str | None = None,
    threshold: list[float] = [0.7, 0.9],  # noqa: B006  # jsonargparse shows it; nothing changes it
    with_dead: bool = False,
    baseline: bool = True,
    neighbours: int = 32,
    device: str = "cpu",
) -> None:
    """Which features two or more dictionaries (seeds, runs, releases) share.

    Features are matched by cosine with the best one-to-one assignment.

    Args:
        dictionary: Two or more: folder with cfg.json, or RELEASE:ID.
        out: File for the result.
        threshold: Cosines from which a pair is the same feature.
        with_dead: Count features that never fire, too.
        baseline: Match with random directions, too.
        neighbours: Candidates a feature where there are many.
        device: Where to compute.
    """
    from aen_lightning.cli.output import answer, remark
    from aen_lightning.diagnostics.stability import compare_dictionaries
    from aen_lightning.evaluate.dictionary import describe_dictionary, load_dictionary, log_sparsity
    from aen_lightning.evaluate.results import head, short_names, write_result

    if len(dictionary) < 2:
        raise ValueError(f"at least two dictionaries are needed, got {dictionary[0]} alone")
    names = short_names(dictionary)
    atoms: dict[str, Any] = {}
    live: dict[str, Any] = {}
    described = {}
    for name, reference in zip(names, dictionary, strict=True):
        sae = load_dictionary(reference, device=device)
        atoms[name] = sae.W_dec.detach()
        described[name] = describe_dictionary(sae, reference)
        sparsity = None if with_dead else log_sparsity(reference)
        if sparsity is not None:
            live[name] = alive(sparsity)
    found = compare_dictionaries(
        atoms, live=live, thresholds=threshold, baseline=baseline, n_neighbours=neighbours
    )
    result: dict[str, Any] = head("compare") | {"dictionaries": described} | found
    if out is not None:
        remark(f"wrote {write_result(result, out)}")
    answer(result, lambda: comparison_table(result))


def alive(log_sparsity: Any) -> Any:
    """Features that fired at all, from SAELens's ``log10(rate + 1e-10)``; bool, shape (d_sae,)."""
    import torch

    return torch.isfinite(log_sparsity) & (log_sparsity > -9.5)


def comparison_table(result: dict[str, Any]) -> str:
    """The table on screen: a row a pair, then chance."""
    from aen_lightning.evaluate.results import number, table

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
    header = [
        "pair",
        "mean cosine",
        "median",
        *(f"{t} {side}" for t in thresholds for side in ("of 1st", "of 2nd")),
    ]
    text = [table(rows, header=header)]
    if len(result["n_features"]) > 2:
        shares = result["found_in_all"]
        body = [[name, *(f"{100 * shares[name][t]:.1f} %" for t in thresholds)] for name in shares]
        text.append(table(body, header=["found in all others", *thresholds]))
    dead = result["dead_features_left_out"]
    counts = ", ".join(
        f"{name}: {result['n_compared'][name]:,} of {n:,}" for name, n in result["n_features"].items()
    )
    text.append(f"features compared{' (dead ones left out)' if dead else ''}: {counts}")
    return "\n\n".join(text)
