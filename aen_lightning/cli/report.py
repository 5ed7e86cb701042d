"""``aen report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aen_lightning.cli.inputs import EvaluationInputs


@dataclass(frozen=True, kw_only=True)
class FeaturePages:
    """Pages of features.

    Args:
        features: Show the texts on which features fire; runs the language model, or reads --shards.
        features_of: Of these dictionaries, by name in the report or folder (implies --features).
        n_features: Features a dictionary, from rare to frequent; 0: every one.
        feature_ids: These features instead (implies --features).
        n_contexts: Texts a feature, where it is strongest.
        context_window: Tokens before the strongest one; half as many after.
        output_tokens: Promoted and suppressed tokens, which need the LM head.
    """

    features: bool = False
    features_of: list[str] | None = None
    n_features: int = 200
    feature_ids: list[int] | None = None
    n_contexts: int = 8
    context_window: int = 16
    output_tokens: bool = True


def report(
    run: list[str],
    *,
    out: str = "report.html",
    title: str | None = None,
    results: list[str] | None = None,
    max_geometry_features: int = 32768,
    png: str | None = None,
    browser: str | None = None,
    pages: FeaturePages = FeaturePages(),
    inputs: EvaluationInputs = EvaluationInputs(),  # noqa: B008  # frozen
) -> None:
    """One self-contained HTML file about one or more runs.

    Training curves, dead features, trade-offs, adaptive weights, geometry, a table that compares them, and
    with --features the texts on which features fire.

    Args:
        run: Folder of aen fit or aen sweep (version_N, or its parent), or a dictionary (cfg.json).
        out: Where to write.
        title: Heading of the page.
        results: JSON files of aen evaluate, diagnose and compare. evaluation.json and diagnosis.json in a
            dictionary's folder are found without.
        max_geometry_features: No cosines for larger dictionaries.
        png: Folder for pictures of the page and of each figure, taken with the Chromium or Chrome that is
            there.
        browser: Path of the one to use. null: found by name.
        pages: Which features to show.
        inputs: What features fire on.
    """
    from aen_lightning.cli.output import remark
    from aen_lightning.files import write_text
    from aen_lightning.progress import working
    from aen_lightning.report.browser import find_browser, take_pictures
    from aen_lightning.report.collect import collect
    from aen_lightning.report.figures import make_figures
    from aen_lightning.report.html import render_report

    # before any work: a browser that was asked for by name has to be there
    found = find_browser(browser) if png else None
    collected = collect(run, results or [])
    wanted = pages.features or pages.features_of or pages.feature_ids
    features = _features(collected, pages, inputs) if wanted else []
    with working("drawing figures"):
        figures = make_figures(collected, max_geometry_features=max_geometry_features)
    path = write_text(out, render_report(collected, figures, features, title=title))
    for note in collected.notes:
        remark(f"note: {note}")
    remark(f"wrote {path}")
    if png and found is None:
        remark(
            "no pictures: there is no chromium, chromium-browser, google-chrome or chrome here (give "
            "--browser PATH)"
        )
    elif png and found is not None:
        ids = ["summary", *(f.id for f in figures), *(["features"] if features else [])]
        with working("taking pictures"):
            pictures = take_pictures(found, path, Path(png), ids)
        for picture in pictures:
            remark(f"wrote {picture}")


def _features(collected: Any, pages: FeaturePages, given: EvaluationInputs) -> list[dict[str, Any]]:
    from aen_lightning.cli.opening import InputOpener, device_of
    from aen_lightning.evaluate.dictionary import load_dictionary
    from aen_lightning.language_model.source import load_tokenizer
    from aen_lightning.report.activations import collect_activations
    from aen_lightning.report.features import feature_pages
    from aen_lightning.report.vocabulary import load_unembedding, token_texts

    opener, made = InputOpener(given, whole_lm=False), []
    for d in _chosen(collected, pages.features_of):
        if d.folder is None:
            raise ValueError(f"{d.label} was not exported, so its features cannot be shown")
        sae = load_dictionary(d.folder, device=device_of(given), dtype=given.dtype)
        inputs = opener.open(sae)
        activations = collect_activations(sae, inputs)
        described, metadata = inputs.describe(), sae.cfg.metadata
        model_name = given.model_name or described.get("model_name") or metadata["model_name"]
        if not model_name:
            raise ValueError("nothing says which language model the token ids belong to: give --model_name")
        revision = given.revision or metadata["revision"]
        kwargs = opener.language_model_kwargs(metadata)
        unembedding = None
        if pages.output_tokens:
            hook_name = given.hook_name or described["hook_name"]
            unembedding = load_unembedding(
                model_name, hook_name, revision=revision, model_from_pretrained_kwargs=kwargs
            )
            if unembedding is None:
                collected.notes.append(
                    f"{d.label}: no promoted output tokens, as decoder directions at {hook_name} are not "
                    "read by the "
                    "LM head."
                )
        page = feature_pages(
            sae,
            activations,
            token_texts(load_tokenizer(model_name, revision=revision, model_from_pretrained_kwargs=kwargs)),
            unembedding=unembedding,
            feature_ids=pages.feature_ids,
            n_features=pages.n_features,
            n_contexts=pages.n_contexts,
            window=pages.context_window,
        )
        made.append({"label": d.label, "note": _note(page, described, pages)} | page)
    return made


def _chosen(collected: Any, names: Sequence[str] | None) -> list[Any]:
    known = collected.dictionaries
    by_name = {d.label: d for d in known} | {d.name: d for d in known if d.name}
    labels = ", ".join(repr(d.label) for d in known)
    if names is None:
        if len(known) > 1:
            raise ValueError(
                f"the report has {len(known)} dictionaries: say whose features, by --features_of {labels}"
            )
        return known
    by_name |= {n: d for n in names for d in known if d.folder == Path(n).resolve()}
    if unknown := [n for n in names if n not in by_name]:
        raise ValueError(f"no dictionary {unknown[0]!r} in the report: there are {labels}")
    return [by_name[n] for n in names]


def _note(page: dict[str, Any], described: dict[str, Any], pages: FeaturePages) -> str:
    source = described.get("dataset_path") or described.get("path")
    source = ", ".join(map(str, source)) if isinstance(source, list) else source
    kind = (
        "held-out text"
        if described["kind"] == "text"
        else "activations on disk, in runs that may cross documents"
    )
    chosen = (
        "the ones asked for"
        if pages.feature_ids
        else "chosen evenly from the rarest to the most frequent"
        if pages.n_features
        else "all of them"
    )
    return (
        f"{page['n_tokens']:,} tokens in {page['n_rows']:,} rows of {kind} ({source}); {page['n_fired']:,} "
        "of "
        f"{page['d_sae']:,} features fired on them; {len(page['features']):,} are shown, {chosen}."
    )
