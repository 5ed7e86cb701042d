"""Draws a benchmark's results: one metric against another, a line a variant, error bars over seeds. Writes SVG.

    python benchmarks/draw.py RESULTS.json --x l0 --y ev --out ev.svg
    python benchmarks/draw.py frontier.json --x l0 --y dead_pct --where d_sae=9216 --log-x --out dead.svg
    python benchmarks/draw.py synth.json --x l0 --y mcc f1 --best lr --out recovery.svg     two panels side by side

RESULTS.json is a list of runs, or an object with that list under ``runs``: each an object with ``variant``, the
metrics, and what tells points from repetitions. Runs of a variant with the same ``--group`` value (default
``target_l0`` where the runs have it, else ``l0``) are seeds of one point: its mean, with a bar of one standard
deviation. With ``--best KEY`` a point takes the runs with that value of KEY alone which gave the most explained
variance on its first seed. Runs of several ``d_sae`` become variants of their own. Runs without one of the metrics are left out
of that panel.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from aen_lightning.files import write_text

NAMES = {
    "l0": "L0",
    "ev": "explained variance",
    "dead_pct": "dead features (%)",
    "ce_recovered": "CE recovered",
    "mcc": "MCC",
    "f1": "F1",
}
# told apart by people who see few colours, too (Okabe and Ito), and by shape
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 440, 330, 62, 14, 46


@dataclass(frozen=True)
class Point:
    """Mean and standard deviation over the seeds of one setting of a variant."""

    x: float
    y: float
    y_std: float


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in a results file.

    Raises:
        ValueError: If it holds none.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    runs = content.get("runs") if isinstance(content, dict) else content
    if (
        not isinstance(runs, list)
        or not runs
        or not all(isinstance(r, dict) and "variant" in r for r in runs)
    ):
        raise ValueError(f"{path} holds no list of runs, each an object with 'variant'")
    return runs


def select(runs: Sequence[dict[str, Any]], conditions: Sequence[str]) -> list[dict[str, Any]]:
    """The runs for which every ``key=value`` holds; values are compared as numbers where both are.

    Raises:
        ValueError: For a condition of another form, or if no run is left.
    """
    left = list(runs)
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"--where takes key=value, got {condition!r}")
        left = [run for run in left if _same(run.get(key), value)]
    if not left:
        raise ValueError(f"no run has {', '.join(conditions)}")
    return left


def best_of(runs: Sequence[dict[str, Any]], key: str, *, group: str) -> list[dict[str, Any]]:
    """Of each variant and group, the runs with the ``key`` of the highest ``ev`` on the lowest seed."""

    def point(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["variant"], run.get("d_sae"), run.get(group)

    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: (run["seed"], -run["ev"])):
        best.setdefault(point(run), run)
    return [run for run in runs if run.get(key) == best[point(run)].get(key)]


def _same(found: Any, wanted: str) -> bool:
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return str(found) == wanted
    try:
        return float(wanted) == float(found)
    except ValueError:
        return False


def points(runs: Sequence[dict[str, Any]], *, x: str, y: str, group: str) -> dict[str, list[Point]]:
    """By variant, in order of first appearance, its points by ascending x.

    Raises:
        ValueError: If no run has both metrics.
    """
    gathered: dict[str, dict[Any, list[tuple[float, float]]]] = {}
    for run in runs:
        if run.get(x) is not None and run.get(y) is not None:
            same = gathered.setdefault(run["variant"], {}).setdefault(run.get(group), [])
            same.append((run[x], run[y]))
    if not gathered:
        known = sorted({key for run in runs for key in run})
        raise ValueError(f"no run has both {x!r} and {y!r}; there are {', '.join(known)}")
    found: dict[str, list[Point]] = {}
    for variant, groups in gathered.items():
        made = []
        for pairs in groups.values():
            ys = [pair[1] for pair in pairs]
            std = statistics.stdev(ys) if len(ys) > 1 else 0.0
            made.append(Point(statistics.fmean(pair[0] for pair in pairs), statistics.fmean(ys), std))
        found[variant] = sorted(made, key=lambda p: p.x)
    return found


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About ``n`` round numbers in [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - n))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def powers_of_two(low: float, high: float) -> list[float]:
    """Those in [low, high], all above zero, at most about nine; round numbers where there are fewer than two."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    powers = [2.0**i for i in range(first, last + 1, max(1, -(-(last - first) // 8)))]
    return powers if len(powers) > 1 else ticks(low, high)


def draw(panels: Sequence[tuple[str, str, dict[str, list[Point]]]], *, log_x: bool = False) -> str:
    """An SVG of panels (name of x, name of y, points by variant) side by side, with one legend."""
    variants = list(dict.fromkeys(variant for _, _, found in panels for variant in found))
    width, legend = WIDTH * len(panels), 22 * math.ceil(len(variants) / 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + legend}" '
        f'viewBox="0 0 {width} {HEIGHT + legend}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{HEIGHT + legend}" fill="white"/>',
    ]
    for i, (x_name, y_name, found) in enumerate(panels):
        parts += _panel(i * WIDTH, x_name, y_name, found, variants, log_x)
    column = width / 3
    for i, variant in enumerate(variants):
        cx, cy = LEFT + (i % 3) * column, HEIGHT + 22 * (i // 3)
        parts += [_marker(cx, cy, i), f'<text x="{cx + 10:.1f}" y="{cy + 4:.1f}">{escape(variant)}</text>']
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    offset: float,
    x_name: str,
    y_name: str,
    found: dict[str, list[Point]],
    variants: Sequence[str],
    log_x: bool,
) -> list[str]:
    everything = [p for line in found.values() for p in line]
    to_axis = math.log10 if log_x else float
    x_low, x_high = _range([to_axis(p.x) for p in everything])
    y_low, y_high = _range([v for p in everything for v in (p.y - p.y_std, p.y + p.y_std)])
    left, right, top, bottom = offset + LEFT, offset + WIDTH - 14, TOP, HEIGHT - BOTTOM

    def at_x(value: float) -> float:
        return left + (to_axis(value) - x_low) / (x_high - x_low) * (right - left)

    def at_y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top)

    parts = []
    for tick in powers_of_two(10**x_low, 10**x_high) if log_x else ticks(x_low, x_high):
        parts.append(f'<path d="M{at_x(tick):.1f} {top}V{bottom}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{at_x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(y_low, y_high):
        parts.append(f'<path d="M{left} {at_y(tick):.1f}H{right}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 34}" text-anchor="middle">{escape(x_name)}</text>')
    half = (top + bottom) / 2
    parts.append(
        f'<text transform="translate({offset + 14} {half:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>"
    )
    for variant, line in found.items():
        i = variants.index(variant)
        colour = COLOURS[i % len(COLOURS)]
        if len(line) > 1:
            path = "L".join(f"{at_x(p.x):.1f} {at_y(p.y):.1f}" for p in line)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for p in line:
            if p.y_std:
                parts.append(
                    f'<path d="M{at_x(p.x):.1f} {at_y(p.y - p.y_std):.1f}V{at_y(p.y + p.y_std):.1f}" '
                    f'stroke="{colour}" stroke-width="2" class="error"/>'
                )
            parts.append(_marker(at_x(p.x), at_y(p.y), i))
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.06 * abs(low) or 1.0
    return low - margin, high + margin


def _marker(x: float, y: float, index: int) -> str:
    style = f'fill="{COLOURS[index % len(COLOURS)]}" stroke="white"'
    shape = index % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {style}/>'
    if shape == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}/>'
    if shape == 2:
        return f'<path d="M{x:.1f} {y - 5.5:.1f}L{x + 5:.1f} {y + 4:.1f}H{x - 5:.1f}Z" {style}/>'
    diamond = f"M{x:.1f} {y - 5.5:.1f}L{x + 5.5:.1f} {y:.1f}L{x:.1f} {y + 5.5:.1f}L{x - 5.5:.1f} {y:.1f}Z"
    return f'<path d="{diamond}" {style}/>'


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="joined, if several")
    parser.add_argument("--x", default="l0", help="metric on the horizontal axis")
    parser.add_argument("--y", nargs="+", default=["ev"], help="metrics on the vertical axis, a panel each")
    parser.add_argument("--group", help="what runs of one point have in common")
    parser.add_argument("--where", nargs="+", default=[], metavar="KEY=VALUE", help="only these runs")
    parser.add_argument("--variants", nargs="+", help="only these, in this order")
    parser.add_argument("--best", metavar="KEY", help="such as lr: of runs that differ in it, only the best")
    parser.add_argument("--log-x", action="store_true", help="logarithmic horizontal axis")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    try:
        runs = select([run for path in options.results for run in read_runs(path)], options.where)
        if options.variants:
            runs = [run for variant in options.variants for run in runs if run["variant"] == variant]
        if len({run.get("d_sae") for run in runs}) > 1:
            runs = [{**run, "variant": f"{run['variant']}, {run.get('d_sae')} features"} for run in runs]
        group = options.group or ("target_l0" if any("target_l0" in run for run in runs) else "l0")
        if options.best:
            runs = best_of(runs, options.best, group=group)
        panels = [
            (
                NAMES.get(options.x, options.x),
                NAMES.get(y, y),
                points(runs, x=options.x, y=y, group=group),
            )
            for y in options.y
        ]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write_text(options.out, draw(panels, log_x=options.log_x))


if __name__ == "__main__":
    main()
