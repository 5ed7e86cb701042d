"""``aen diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from aen_lightning.cli.inputs import EvaluationInputs

Section = Literal["coherence", "active_gram", "lipschitz", "coding_gap", "composition"]


def diagnose(
    dictionary: str,
    *,
    out: str | None = None,
    only: list[Section] | None = None,
    no_inputs: bool = False,
    n_sample: int = 128,
    n_lipschitz: int = 32,
    refine: int = 0,
    l1_coefficient: float | None = None,
    l2_coefficient: float | None = None,
    l1_weights: str | None = None,
    inputs: EvaluationInputs = EvaluationInputs(),  # noqa: B008  # frozen
) -> None:
    """What ails a dictionary.

    Coherence of its atoms, geometry of those active together, how far a small change of the input moves the
    code, how far the encoder is from the exact code, and what becomes of features that are active together.
    Writes diagnosis.json into the dictionary's folder.

    Args:
        dictionary: Folder with cfg.json, or RELEASE:ID as for SAE.from_pretrained.
        out: File for the result. null: diagnosis.json in the dictionary's folder.
        only: These sections alone: coherence, active_gram, lipschitz, coding_gap, composition.
        no_inputs: Only what needs no data: the coherence.
        n_sample: Tokens to solve exactly.
        n_lipschitz: Of these, so many for Lipschitz constants.
        refine: Proximal gradient steps on the encoder's codes: what so many would win of what the encoder loses. 0: none.
        l1_coefficient: Of the coding problem, in SAELens's form. null: as trained.
        l2_coefficient: Of the coding problem, in SAELens's form. null: as trained.
        l1_weights: safetensors file with the adaptive weights l1_weights, e.g. sae_weights.safetensors of a
            training checkpoint. null: adaptive_state.safetensors beside the dictionary, else computed anew
            from mean activations.
        inputs: What to diagnose on.
    """
    from aen_lightning.cli.opening import InputOpener, device_of
    from aen_lightning.cli.output import answer, remark
    from aen_lightning.diagnostics.diagnose import RESULT_FILE, SECTIONS, diagnose_dictionary
    from aen_lightning.evaluate.dictionary import load_dictionary
    from aen_lightning.evaluate.results import result_path, write_result

    for name, value in (("n_sample", n_sample), ("n_lipschitz", n_lipschitz)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if refine < 0:
        raise ValueError(f"--refine must be at least 0, got {refine}")
    sections = tuple(only or SECTIONS)
    sae = load_dictionary(dictionary, device=device_of(inputs), dtype=inputs.dtype)
    needs_inputs = not no_inputs and set(sections) != {"coherence"}
    result = diagnose_dictionary(
        sae,
        InputOpener(inputs, whole_lm=False).open(sae) if needs_inputs else None,
        reference=dictionary,
        sections=sections,
        n_sample=n_sample,
        n_lipschitz=n_lipschitz,
        l1_coefficient=l1_coefficient,
        l2_coefficient=l2_coefficient,
        l1_weights=_weights_of(dictionary, l1_weights),
        activation_scale=_state_of(dictionary, "activation_scale"),
        n_refine=refine,
    )
    if (path := result_path(dictionary, out, RESULT_FILE)) is not None:
        write_result(result, path)
        remark(f"wrote {path}")
    answer(result, lambda: diagnosis_table(result))


def _weights_of(dictionary: str, given: str | None) -> Any:
    """The adaptive weights from the file given, or from the state that our exports keep beside a dictionary."""
    from aen_lightning.files import read_safetensors_header, read_tensor

    if given is not None:
        weights = read_tensor(given, "l1_weights")
        if weights is None:
            has = ", ".join(read_safetensors_header(given))
            raise ValueError(f"{given} has no tensor l1_weights; it has {has}")
        return weights
    return _state_of(dictionary, "l1_weights")


def _state_of(dictionary: str, name: str) -> Any:
    """A tensor of the state beside a dictionary; None if there is none, as with the means of an imported checkpoint."""
    from aen_lightning.files import read_tensor
    from aen_lightning.saes.export import ADAPTIVE_STATE_FILENAME

    beside = Path(dictionary) / ADAPTIVE_STATE_FILENAME
    return read_tensor(beside, name) if beside.is_file() else None


def diagnosis_table(result: dict[str, Any]) -> str:
    """The table on screen, with a word on what each number means."""
    from aen_lightning.evaluate.results import number, table

    rows: list[list[str]] = []

    def spread(label: str, s: dict[str, Any], meaning: str = "") -> None:
        rows.append(
            [
                label,
                number(s["mean"]),
                number(s["p10"]),
                number(s["p50"]),
                number(s["p90"]),
                number(s["max"]),
                meaning,
            ]
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
            "encoder, bound",
            li["encoder"]["bound"],
            "" if li["encoder"]["is_continuous"] else "but this encoder jumps",
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
            if (refined := gap.get("refined")) is not None:
                single(
                    f"{label}: after {refined['n_steps']} steps", refined[name], "proximal steps on its codes"
                )
            single(f"{label}: exact", gap[name]["exact"])
        single("support found (Jaccard)", gap["support"]["jaccard"])
        s = gap["starvation"]
        single("features used: encoder", s["features_fired_by_encoder"])
        single(
            "features used: exact",
            s["features_fired_by_exact"],
            f"{s['dead_used_by_exact']} of {s['dead']} dead ones among them",
        )
        single(
            "largest relative gap", gap["certificate"]["max_relative_gap"], "certificate of the exact code"
        )
    text = [table(rows, header=["", "mean", "p10", "median", "p90", "max", ""])] if rows else []
    if (co := result["composition"]) is not None:
        names = (
            ("lost_share", "lost"), ("spurious", "spurious"), ("magnitude_ratio", "magnitude"),
            ("spurious_energy", "spurious energy"), ("reconstruction_error", "error"), ("interference", "interference"),
        )  # fmt: skip
        body = [
            [
                str(k),
                *(number(co[name][i]) for name, _ in names),
                number(co["random_sphere"]["interference"][i]),
            ]
            for i, k in enumerate(co["sizes"])
        ]
        text.append(
            "features active together, decoded and encoded again (last: interference of random atoms)"
        )
        text.append(table(body, header=["k", *(label for _, label in names), "at random"]))
    if (cv := result.get("convexity")) is not None:
        text.append(_said_of_convexity(cv))
    text += [f"skipped {name}: {why}" for name, why in result["skipped"].items()]
    return "\n\n".join(text)


def _said_of_convexity(found: dict[str, Any]) -> str:
    from aen_lightning.evaluate.results import number

    penalty, l2 = found["penalty"], number(found["l2_coefficient"])
    if found["l2_needed"] is None:
        return (
            f"convexity of coding with {penalty}: not known, as no activation_scale is beside the dictionary"
        )
    needed = number(found["l2_needed"])
    if found["is_convex"]:
        return f"coding with {penalty} is convex for every dictionary: l2_coefficient {l2}, needed {needed}"
    return (
        f"coding with {penalty} need not be convex: l2_coefficient {l2}, needed {needed} for every dictionary"
    )
