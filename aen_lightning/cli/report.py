"""``aen report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from aen_lightning.cli.inputs import InputOpener, add_input_arguments, device_of
from aen_lightning.evaluate.dictionary import load_dictionary
from aen_lightning.evaluate.inputs import TextInputs
from aen_lightning.report import (
    Report,
    TrainedSAE,
    collect,
    collect_activations,
    feature_pages,
    find_browser,
    load_unembedding,
    make_figures,
    render_report,
    take_pictures,
    token_texts,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aen report",
        description="One self-contained HTML file about one or more runs: training curves, dead features, trade-offs, adaptive weights, "
        "geometry, a table that compares them, and with --features the texts on which features fire.",
    )
    parser.add_argument(
        "run", nargs="+", help="folder of aen fit or aen sweep (version_N, or its parent), or a dictionary (cfg.json)"
    )
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="where to write (default: report.html)"
    )
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FILE",
        help="JSONs of aen evaluate, diagnose and compare (evaluation.json and diagnosis.json in a dictionary's folder are found without)",
    )  # fmt: skip
    parser.add_argument(
        "--max-geometry-features",
        type=int,
        default=32768,
        metavar="N",
        help="no cosines for larger dictionaries (default: 32768)",
    )
    parser.add_argument(
        "--png",
        metavar="FOLDER",
        help="also write pictures of the page and of each figure, with the Chromium or Chrome that is there",
    )
    parser.add_argument("--browser", metavar="PATH", help="the one to use (default: found by name)")
    group = parser.add_argument_group("pages of features")
    group.add_argument(
        "--features",
        action="store_true",
        help="show the texts on which features fire; runs the language model, or reads --shards",
    )
    group.add_argument(
        "--features-of",
        nargs="+",
        metavar="NAME",
        help="of these dictionaries, by name in the report or folder (implies --features)",
    )
    group.add_argument("--n-features", type=int, default=200, metavar="N", help="from rare to frequent (default: 200)")
    group.add_argument("--feature-ids", type=int, nargs="+", metavar="ID", help="these features instead")
    group.add_argument(
        "--n-contexts", type=int, default=8, metavar="N", help="texts a feature, where it is strongest (default: 8)"
    )
    group.add_argument(
        "--context-window",
        type=int,
        default=16,
        metavar="N",
        help="tokens before the strongest one; half as many after (default: 16)",
    )
    group.add_argument(
        "--no-output-tokens", action="store_true", help="leave promoted and suppressed tokens out, and so the LM head"
    )
    add_input_arguments(parser, n_rows=256)
    return parser


def report_command(args: Sequence[str]) -> int:
    """``aen report RUN... [options]``; returns the exit code.

    Raises:
        ValueError: Or OSError, with one clear line, for runs that cannot be read and features that cannot be shown.
    """
    options = _parser().parse_args(args)
    # before any work: a browser that was asked for by name has to be there
    browser = find_browser(options.browser) if options.png else None
    report = collect(options.run, options.results)
    features = _features(report, options) if options.features or options.features_of else []
    figures = make_figures(report, max_geometry_features=options.max_geometry_features)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(report, figures, features, title=options.title), encoding="utf-8")
    for note in report.notes:
        print(f"note: {note}")
    print(f"wrote {path}")
    if options.png and browser is None:
        print("no pictures: there is no chromium, chromium-browser, google-chrome or chrome here (give --browser PATH)")
    elif options.png and browser is not None:
        ids = ["summary", *(f.id for f in figures), *(["features"] if features else [])]
        for picture in take_pictures(browser, path, Path(options.png), ids):
            print(f"wrote {picture}")
    return 0


def _features(report: Report, options: argparse.Namespace) -> list[dict[str, Any]]:
    opener, pages = InputOpener(options, whole_lm=False), []
    for d in _chosen(report, options.features_of):
        if d.folder is None:
            raise ValueError(f"{d.label} was not exported, so its features cannot be shown")
        sae = load_dictionary(d.folder, device=device_of(options), dtype=options.dtype)
        inputs = opener.open(sae)
        activations = collect_activations(sae, inputs)
        described, metadata = inputs.describe(), sae.cfg.metadata
        model_name = options.model_name or described.get("model_name") or metadata["model_name"]
        if not model_name:
            raise ValueError("nothing says which language model the token ids belong to: give --model-name")
        revision = options.revision or metadata["revision"]
        kwargs = (inputs.data.options.model_from_pretrained_kwargs or {}) if isinstance(inputs, TextInputs) else {}
        unembedding: torch.Tensor | None = None
        if not options.no_output_tokens:
            hook_name = options.hook_name or described["hook_name"]
            unembedding = load_unembedding(
                model_name, hook_name, revision=revision, model_from_pretrained_kwargs=kwargs
            )
            if unembedding is None:
                report.notes.append(
                    f"{d.label}: no promoted output tokens, as decoder directions at {hook_name} are not read by the LM head."
                )
        page = feature_pages(
            sae,
            activations,
            token_texts(AutoTokenizer.from_pretrained(model_name, revision=revision or "main")),
            unembedding=unembedding,
            feature_ids=options.feature_ids,
            n_features=options.n_features,
            n_contexts=options.n_contexts,
            window=options.context_window,
        )
        pages.append({"label": d.label, "note": _note(page, described, options)} | page)
    return pages


def _chosen(report: Report, names: Sequence[str] | None) -> list[TrainedSAE]:
    by_name = {d.label: d for d in report.dictionaries} | {d.name: d for d in report.dictionaries if d.name}
    labels = ", ".join(repr(d.label) for d in report.dictionaries)
    if names is None:
        if len(report.dictionaries) > 1:
            raise ValueError(
                f"the report has {len(report.dictionaries)} dictionaries: say whose features, by --features-of {labels}"
            )
        return report.dictionaries
    by_name |= {n: d for n in names for d in report.dictionaries if d.folder == Path(n).resolve()}
    if unknown := [n for n in names if n not in by_name]:
        raise ValueError(f"no dictionary {unknown[0]!r} in the report: there are {labels}")
    return [by_name[n] for n in names]


def _note(page: dict[str, Any], described: dict[str, Any], options: argparse.Namespace) -> str:
    source = described.get("dataset_path") or described.get("path")
    source = ", ".join(map(str, source)) if isinstance(source, list) else source
    kind = "held-out text" if described["kind"] == "text" else "activations on disk, in runs that may cross documents"
    chosen = "the ones asked for" if options.feature_ids else "chosen evenly from the rarest to the most frequent"
    return (
        f"{page['n_tokens']:,} tokens in {page['n_rows']:,} rows of {kind} ({source}); {page['n_fired']:,} of {page['d_sae']:,} features "
        f"fired on them; {len(page['features']):,} are shown, {chosen}."
    )
