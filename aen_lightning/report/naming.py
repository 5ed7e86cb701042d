"""Short names and colours for many dictionaries: by family, and by what varies inside one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aen_lightning.saes.aen_config import ARCHITECTURE

if TYPE_CHECKING:
    from aen_lightning.report.trained import TrainedSAE

# Okabe and Ito (2008): told apart with every kind of colour vision
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B", "#8A6A00")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
_NAMES = {
    "standard": "L1 (SAELens)", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU",
    "gated": "gated", "matryoshka_batchtopk": "Matryoshka BatchTopK", "relaxed": "refit",
}  # fmt: skip
_SYMBOLIC = {"lambda_1": "λ₁", "lambda_2": "λ₂", "gamma": "γ", "ema_decay": "β"}


def family_of(architecture: str | None, settings: dict[str, Any]) -> str:
    """What kind of SAE it is, for legends.

    The AEN family has four members, by which of its two terms are switched off, each with or without the
    starvation guard.

    Args:
        architecture: What it was trained as, if that is known.
        settings: What it was trained with.
    """
    if architecture == ARCHITECTURE:
        adaptive, quadratic = settings.get("gamma") != 0, settings.get("lambda_2") != 0
        names = {
            (True, True): "AEN", (True, False): "adaptive lasso",
            (False, True): "elastic net", (False, False): "L1",
        }  # fmt: skip
        guard = " + guard" if settings.get("starvation_guard") else ""
        finish = {"topk": "TopK", "jumprelu": "JumpReLU"}.get(str(settings.get("hard_finish")), "BatchTopK")
        return names[adaptive, quadratic] + guard + (f", then {finish}" if settings.get("hard_k") else "")
    return _NAMES.get(str(architecture), architecture or "SAE")


def has_own_weights(settings: dict[str, Any]) -> bool:
    """Whether each feature of an AEN-SAE so trained pays by a weight of its own."""
    return settings.get("gamma", 1) != 0 or bool(settings.get("starvation_guard"))


def name_dictionaries(dictionaries: Sequence[TrainedSAE]) -> None:
    """Set each label: the run, if there are several, then the family and the settings that vary in it."""
    runs = list(dict.fromkeys(d.run for d in dictionaries))
    for run in runs:
        mine = [d for d in dictionaries if d.run == run]
        for d in mine:
            d.label = run if len(mine) == 1 else _label(d, [o for o in mine if o.family == d.family])
        twice = [d for d in mine if sum(o.label == d.label for o in mine) > 1]
        for d in twice:
            d.label = d.name
        if len(mine) > 1 and len(runs) > 1:
            for d in mine:
                d.label = f"{run}: {d.label}"


def _label(d: TrainedSAE, family: Sequence[TrainedSAE]) -> str:
    varying = [k for k in d.settings if len({repr(o.settings.get(k)) for o in family}) > 1]
    parts = [f"{_SYMBOLIC.get(k, k)}={_short(d.settings[k])}" for k in varying]
    return " ".join([d.family, *parts])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def family_styles(dictionaries: Sequence[TrainedSAE]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family."""
    families = list(dict.fromkeys(d.family for d in dictionaries))
    return {f: (_COLOURS[i % len(_COLOURS)], _SYMBOLS[i % len(_SYMBOLS)]) for i, f in enumerate(families)}


def colours(dictionaries: Sequence[TrainedSAE]) -> dict[str, str]:
    """A colour for each label: one each while they last, then the family's, darkest for the smallest L0."""
    if len(dictionaries) <= len(_COLOURS):
        return {d.label: colour for d, colour in zip(dictionaries, _COLOURS, strict=False)}
    styles, found = family_styles(dictionaries), {}
    for family, (colour, _) in styles.items():
        mine = sorted((d for d in dictionaries if d.family == family), key=lambda d: d.metrics.get("l0", 0.0))
        for i, d in enumerate(mine):
            found[d.label] = _lighter(colour, 0.65 * i / max(1, len(mine) - 1))
    return found


def _lighter(colour: str, share: float) -> str:
    rgb = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in rgb)
