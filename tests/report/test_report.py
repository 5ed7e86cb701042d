"""The report: numbers against the files they come from, features against the whole language model, the page in a browser."""

from __future__ import annotations

import csv
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning.cli.inputs import EvaluationInputs
from aen_lightning.cli.opening import InputOpener
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.evaluate import ShardInputs, load_dictionary
from aen_lightning.report import collect, feature_pages, make_figures, render_report
from aen_lightning.report.browser import dump_dom, find_browser, measure, take_pictures
from aen_lightning.report.drawing import MAX_POINTS, log_axis, thin
from aen_lightning.report.features import collect_activations, load_unembedding, token_texts
from aen_lightning.report.naming import family_of, has_own_weights
from aen_lightning.training.module import SAEModule, SweepModule
from aen_lightning.training.pareto import pareto_fronts, sweep_table, write_table
from tests.support.commands import compare_command, evaluate_command, report_command
from tests.support.shard_sets import HOOK as SHARD_HOOK
from tests.support.shard_sets import write_set
from tests.support.tiny_models import D_MODEL, EOS, save_tiny_model, tiny_model, tiny_tokenizer

HOOK, CONTEXT, D_SAE = "blocks.1.hook_resid_post", 8, 24
BROWSER = find_browser()
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome here: the page is not looked at in a browser"
)
GRID: list[dict[str, Any]] = [
    {"architecture": "aen", "d_in": 8, "d_sae": 24, "l1_coefficient": [0.02, 0.2], "l2_coefficient": 0.001, "ema_decay": 0.9, "warmup_delay_steps": 5, "warmup_ramp_steps": 10},
    {"architecture": "aen", "d_in": 8, "d_sae": 24, "l1_coefficient": 0.1, "l2_coefficient": 0.0, "gamma": 0.0},
    {"architecture": "topk", "d_in": 8, "d_sae": 24, "k": [2, 4]},
]  # fmt: skip


def trainer(root: Path, **kwargs: Any) -> pl.Trainer:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from aen_lightning.callbacks import DeadFeatureTracker

    return pl.Trainer(
        accelerator="cpu", devices=1, max_steps=40, log_every_n_steps=4, val_check_interval=20, logger=CSVLogger(str(root), name=""),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        callbacks=[ModelCheckpoint(save_last=True), DeadFeatureTracker(window_steps=10)], **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepModule]:
    """A real sweep: five SAEs of three families, and the module that trained them."""
    root = tmp_path_factory.mktemp("sweep")
    module = SweepModule(GRID, seed=0, lr=3e-3, dead_feature_window=5)
    data = SpikedDataModule(d_in=8, n_features=24, k=2, train_batch_size_tokens=32, n_eval_samples=128)
    fit = trainer(root)
    fit.fit(module, datamodule=data)
    folder = root / "version_0"
    write_table(sweep_table(fit, module, data), folder)
    return folder, module


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary on a tiny language model, random, with documents beside it."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    lm = save_tiny_model("llama", folder)
    words = torch.randint(4, 64, (60, 20), generator=generator).tolist()
    documents = folder / "text.jsonl"
    documents.write_text("".join(json.dumps({"text": " ".join(f"w{t}" for t in d)}) + "\n" for d in words))
    metadata = SAEMetadata(
        model_name=lm, model_class_name="AutoModelForCausalLM", hook_name=HOOK, dataset_path=str(documents), context_size=CONTEXT,
        prepend_bos=False, sequence_separator_token="eos", exclude_special_tokens=True,
    )  # fmt: skip
    cfg = StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata, normalize_activations="constant_norm_rescale")
    sae = StandardSAE(cfg)
    with torch.no_grad():
        sae.W_enc.normal_(0, 0.3, generator=generator)
        sae.W_dec.normal_(0, 0.3, generator=generator)
        sae.b_enc.fill_(-0.9)
        sae.b_enc[5] = -100.0  # never fires
    path = folder / "dictionary"
    sae.save_model(path)
    return path


class Page(HTMLParser):
    """Checks that elements nest, and gathers what a browser would fetch, the scripts' data and the text."""

    VOID = ("meta", "link", "br", "img", "input", "col", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.fetched: list[str] = []
        self.data: dict[str, str] = {}
        self.policy, self.text, self._id = "", "", ""
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [str(values[k]) for k in ("src", "href", "data", "poster", "srcset") if values.get(k)]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])
        self._id = str(values.get("id", ""))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] == ["script"]:
            self.data[self._id] = data
        elif self.stack[-1:] != ["style"]:
            self.text += data

    def traces(self, figure: str) -> list[dict[str, Any]]:
        (found,) = [f for f in json.loads(self.data["figure-data"]) if f["id"] == figure]
        return list(found["figure"]["data"])


def written(runs: list[Path], **kwargs: Any) -> Page:
    report = collect(runs)
    return Page(render_report(report, make_figures(report), **kwargs))


# --- runs ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_numbers_of_metrics_csv(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    page = written([folder])
    with (folder / "metrics.csv").open() as f:
        rows = list(csv.DictReader(f))
    labels = ["AEN λ₁=0.0025", "AEN λ₁=0.025", "L1", "TopK k=2", "TopK k=4"]  # l1 / d_in, by hand
    curves = page.traces("training")
    assert {t["legendgroup"] for t in curves} == set(labels)
    for key, axis, factor in (
        ("metrics/l0", "y2", 1),
        ("losses/mse_loss", "y3", 1),
        ("sparsity/recovery_rate", "y3", 100),
    ):
        traces = curves if factor == 1 else page.traces("dead")
        for label, member in zip(labels, module.members, strict=True):
            column = f"{member.name}/{key}"
            expected = {int(r["step"]): factor * float(r[column]) for r in rows if r[column]}
            (trace,) = [t for t in traces if t["legendgroup"] == label and t["yaxis"] == axis and t["mode"] == "lines"]
            assert trace["x"] == list(expected)
            assert trace["y"] == pytest.approx(list(expected.values()), rel=1e-12)
    silent = next(t for t in page.traces("dead") if t["legendgroup"] == "TopK k=2" and t["yaxis"] == "y")["y"]
    counts = [float(n) for r in rows if (n := r[f"{module.members[3].name}/sparsity/dead_features"])]
    assert silent == pytest.approx([100 * c / 24 for c in counts])


def test_validation_is_drawn_as_points_beside_the_lines(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    table = pd.read_csv(folder / "metrics.csv")
    expected = table[f"{module.members[0].name}/val/metrics/explained_variance"].dropna()
    points = [t for t in written([folder]).traces("training") if t["mode"] == "markers" and t.get("yaxis", "y") == "y"]
    assert len(points) == 5
    assert points[0]["y"] == pytest.approx(list(expected))


def test_the_table_and_the_fronts_are_those_of_the_sweep(sweep: tuple[Path, SweepModule]):
    folder, _ = sweep
    table = pd.read_csv(folder / "sweep.csv")
    page = written([folder])
    for value in table["explained_variance"]:
        assert f"{value:.4g}" in page.text
    points = {}
    for trace in page.traces("pareto-dead-features-pct"):
        if trace["mode"] == "markers":
            points[trace["name"]] = sorted(zip(trace["x"], trace["y"], strict=True))
    families = table.assign(architecture=["AEN", "AEN", "L1", "TopK", "TopK"])
    for family, mine in families.groupby("architecture"):
        assert points[family] == sorted(zip(mine["l0"], mine["dead_features_pct"], strict=True))
    front = pareto_fronts(families, "explained_variance", higher_is_better=True)
    lines = [t for t in page.traces("pareto-explained-variance") if t["mode"] == "lines"]
    assert {t["legendgroup"]: t["x"] for t in lines} == {
        f: [p["l0"] for p in points] for f, points in front.items() if len(points) > 1
    }


def test_adaptive_weights_are_those_of_the_module_and_others_have_none(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    found = collect([folder]).dictionaries
    for d, tracked in zip(found[:2], module.tracked, strict=False):
        assert d.l1_weights is not None
        assert_close(torch.from_numpy(d.l1_weights), tracked.sae.l1_weights)
        assert d.l1_weights.max() > 1.2  # the ramp has begun
    assert [d.l1_weights for d in found[2:]] == [None] * 3
    traces = written([folder]).traces("weights")
    assert [t["legendgroup"] for t in traces] == [d.label for d in found[:2]]
    assert sum(traces[0]["y"]) == pytest.approx(100)
    assert f"{(found[0].l1_weights >= 10).mean():.1%} at the maximum 10" in traces[0]["hovertemplate"]  # type: ignore[operator]
    assert {t["legendgroup"] for t in written([folder]).traces("adaptive")} == {d.label for d in found[:2]}


def test_density_accounts_for_every_feature(sweep: tuple[Path, SweepModule], tmp_path: Path):
    folder = collect([sweep[0]]).dictionaries[0].folder
    assert folder is not None
    SAE.load_from_disk(folder).save_model(tmp_path / "d")
    rates = np.array([0.0] * 6 + [1e-4] * 6 + [0.05] * 6 + [1.0] * 6)
    save_file({"sparsity": torch.tensor(np.log10(rates + 1e-10)).float()}, tmp_path / "d" / "sparsity.safetensors")
    histogram, bar = written([tmp_path / "d"]).traces("density")
    assert sum(histogram["y"]) == pytest.approx(75)
    assert bar["x"] == pytest.approx([25])
    assert sorted(histogram["y"])[-3:] == pytest.approx([25, 25, 25])


def test_the_geometry_is_that_of_the_dictionary(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    W = torch.nn.functional.normalize(module.tracked[3].sae.W_dec.detach().double(), dim=-1)
    nearest = (W @ W.T).fill_diagonal_(0).abs().max(dim=-1).values
    expected = 100 * np.histogram(nearest.numpy(), np.linspace(0, 1, 51))[0] / 24
    assert written([folder]).traces("geometry")[3]["y"] == pytest.approx(list(expected))
    report = collect([folder])
    assert "geometry" not in [f.id for f in make_figures(report, max_geometry_features=23)]
    assert "--max-geometry-features" in report.notes[-1]


def test_the_page_fetches_nothing_and_nothing_breaks_out_of_it(sweep: tuple[Path, SweepModule]):
    report = collect([sweep[0]])
    nasty = "</script><img src=http://example.invalid/x><!--<script>"
    report.dictionaries[0].label = report.configs["sweep & <b>"] = nasty
    features = [{"label": nasty, "note": nasty, "features": []}]
    page = Page(render_report(report, make_figures(report), features, title=nasty))
    assert page.policy.startswith("default-src 'none'")
    assert all(a.startswith("#") for a in page.fetched)
    assert json.loads(page.data["feature-data"]) == features
    assert nasty in page.text


def test_one_run_with_a_resumed_and_a_long_curve(sweep: tuple[Path, SweepModule], tmp_path: Path):
    run = tmp_path / "version_3"
    (tmp_path / "version_10").mkdir()
    run.mkdir()
    steps = [*range(0, 6000, 2), 5998]  # the last step was logged again after a restart
    lines = [f"{s},{s / 10},{'' if s else 0.5}" for s in steps]
    lines[-1] = "5998,1234.5,"
    (run / "metrics.csv").write_text("step,losses/mse_loss,metrics/l0\n" + "\n".join(lines) + "\n")
    report = collect([run])
    (trace,) = [t for t in Page(render_report(report, make_figures(report))).traces("training") if t["mode"] == "lines"]
    assert len(trace["y"]) == MAX_POINTS
    assert (trace["x"][0], trace["x"][-1], trace["y"][-1]) == (0, 5998, 1234.5)
    assert "exported no dictionary" in report.notes[0]
    assert report.dictionaries[0].metrics == {"l0": 0.5}
    with pytest.raises(FileNotFoundError, match=r"version_10 holds no run: expected what aen fit"):
        collect([tmp_path])
    (tmp_path / "version_10").rmdir()
    (tmp_path / "version_0").mkdir()
    assert "the last, version_3" in collect([tmp_path]).notes[0]


def test_results_of_other_commands_find_their_dictionary(
    dictionary: Path, sweep: tuple[Path, SweepModule], tmp_path: Path
):
    result = tmp_path / "mine.json"
    evaluate_command(
        [
            str(dictionary),
            "--out",
            str(result),
            "--n-rows",
            "6",
            "--held-out-documents",
            "20",
            "--n-downstream-rows",
            "2",
        ]
    )
    content = json.loads(result.read_text())
    report = collect([dictionary, sweep[0]], [result])
    assert report.dictionaries[0].evaluation == content
    page = Page(render_report(report, make_figures(report)))
    kl = content["downstream"]["kl"]["spliced"]
    assert f"{kl['value']:.4g} ± {kl['se']:.2g}" in page.text
    with pytest.raises(ValueError, match=r"mine\.json is about .* which is no dictionary of this report"):
        collect([sweep[0]], [result])
    result.write_text("{}")
    with pytest.raises(ValueError, match=r"mine\.json is no result of aen evaluate"):
        collect([dictionary], [result])
    result.write_text("not json")
    with pytest.raises(ValueError, match=r"mine\.json is not JSON"):
        collect([dictionary], [result])


def test_several_comparisons_are_told_apart(sweep: tuple[Path, SweepModule], tmp_path: Path):
    members = [str(d.folder) for d in collect([sweep[0]]).dictionaries]
    results = [tmp_path / "first.json", tmp_path / "second.json"]
    for result, pair in zip(results, (members[:2], members[2:4]), strict=True):
        compare_command([*pair, "--out", str(result), "--with-dead"])
    report = collect([sweep[0]], results)
    text = render_report(report, make_figures(report))
    ids = re.findall(r'<(?:section|h2|div)[^>]* id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "an id that two parts have leads to the first of them only"
    assert "(aen compare, 1 of 2)" in text
    assert "(aen compare, 2 of 2)" in text
    for result in results:
        (pair,) = json.loads(result.read_text())["pairs"]
        assert f"{pair['a']} – {pair['b']}" in text
        assert f"{pair['cosine']['mean']:.4g}" in text


def test_log_axes_have_plain_numbers_and_thinning_keeps_the_ends():
    axis = log_axis([3.0, 40.0, None, 0.0])
    assert axis["range"][0] < np.log10(3) < np.log10(40) < axis["range"][1]
    assert {"5", "10", "20"} <= set(axis["ticktext"])
    series = thin(pd.Series(range(5 * MAX_POINTS)))
    assert (len(series), series.iloc[0], series.iloc[-1]) == (MAX_POINTS, 0, 5 * MAX_POINTS - 1)


# --- features -----------------------------------------------------------------------------------------------------


def reference(dictionary: Path, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes by the whole language model of transformers and SAELens's own encode, in float64: (rows, context, d_sae); and keep."""
    sae = SAE.load_from_disk(dictionary).double()
    lm = AutoModelForCausalLM.from_pretrained(sae.cfg.metadata.model_name, dtype=torch.float64)
    with torch.no_grad():
        hidden = lm(inputs.rows, output_hidden_states=True).hidden_states[2]  # embedding, block 0, block 1
        x = hidden * (D_MODEL**0.5 / hidden.norm(dim=-1, keepdim=True))
        codes = torch.relu((x - sae.b_dec * (1.0 if sae.cfg.apply_b_dec_to_input else 0.0)) @ sae.W_enc + sae.b_enc)
    return codes, inputs.rows != EOS


def opened(dictionary: Path, **options: Any) -> tuple[Any, Any]:
    sae = load_dictionary(dictionary)
    inputs = EvaluationInputs(n_rows=12, held_out_documents=20, **options)
    return sae, InputOpener(inputs, whole_lm=False).open(sae)


def test_features_agree_with_the_whole_language_model(dictionary: Path):
    sae, inputs = opened(dictionary)
    codes, keep = reference(dictionary, inputs)
    lm = tiny_model("llama")
    activations = collect_activations(sae, inputs)
    head = load_unembedding(str(sae.cfg.metadata.model_name), HOOK)
    page = feature_pages(sae, activations, token_texts(tiny_tokenizer()), unembedding=head, feature_ids=range(D_SAE))
    assert page["n_tokens"] == int(keep.sum())
    assert not keep.all()  # special tokens are among them
    codes[~keep] = 0
    assert page["n_fired"] == int((codes > 0).any(dim=(0, 1)).sum()) < D_SAE
    logits = sae.W_dec @ lm.lm_head.weight.T
    unit = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    for feature in page["features"]:
        h = codes[..., feature["id"]]
        if feature["id"] == 5:
            assert (feature["density"], feature["contexts"]) == (0, [])
            continue
        assert feature["density"] == pytest.approx(float((h > 0).sum() / keep.sum()))
        assert feature["max"] == pytest.approx(float(h.max()), rel=1e-4)
        assert feature["mean"] == pytest.approx(float(h[h > 0].mean()), rel=1e-4)
        top = [c for c in feature["contexts"] if c["kind"] == "top"]
        best = h.amax(dim=1).sort(descending=True).values
        n = min(8, int((best > 0).sum()))
        assert [c["acts"][c["peak"]] for c in top] == pytest.approx(best[:n].tolist(), rel=1e-3)
        row, at = divmod(int(h.argmax()), CONTEXT)
        words = ["</s>" if t == EOS else f"w{t}" for t in inputs.rows[row].tolist()]
        begin = 0  # a window of 16 reaches the row's beginning
        assert top[0]["tokens"] == words[begin : at + 9]
        expected = [float(v) if k else None for v, k in zip(h[row], keep[row], strict=True)][: at + 9]
        assert [a is None for a in top[0]["acts"]] == [e is None for e in expected]
        assert [a or 0 for a in top[0]["acts"]] == pytest.approx([e or 0 for e in expected], rel=1e-3)
        assert [i for i, _ in feature["neighbours"]] == cosines[feature["id"]].topk(5).indices.tolist()
        promoted, suppressed = logits[feature["id"]].topk(8), (-logits[feature["id"]]).topk(8)
        texts = token_texts(tiny_tokenizer())
        assert [t for t, _ in feature["promoted"]] == [texts(i) for i in promoted.indices.tolist()]
        assert [v for _, v in feature["suppressed"]] == pytest.approx((-suppressed.values).tolist(), abs=1e-3)


def test_ordinary_contexts_are_near_the_median_and_texts_come_once(dictionary: Path):
    sae, inputs = opened(dictionary)
    inputs.rows[3] = inputs.rows[7]  # boilerplate
    page = feature_pages(
        sae, collect_activations(sae, inputs), token_texts(tiny_tokenizer()), n_features=D_SAE, n_contexts=3
    )
    frequent = page["features"][-1]
    texts = ["".join(c["tokens"]) for c in frequent["contexts"]]
    assert len(set(texts)) == len(texts) == 5
    median = [c["acts"][c["peak"]] for c in frequent["contexts"] if c["kind"] == "ordinary"]
    assert len(median) == 2
    assert max(median) < frequent["contexts"][0]["acts"][frequent["contexts"][0]["peak"]]
    counts = [f["density"] for f in page["features"]]
    assert counts == sorted(counts)
    assert all(counts)
    with pytest.raises(ValueError, match="there is no feature 24: the dictionary has features 0 to 23"):
        feature_pages(sae, collect_activations(sae, inputs), str, feature_ids=[24])


def test_features_of_shards_show_the_tokens_beside_the_activations(tmp_path: Path):
    expected, ids = write_set(tmp_path / "shards", [30, 20])
    sae = StandardSAE(StandardSAEConfig(d_in=6, d_sae=6, apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(6))  # feature j is coordinate j, where positive
        sae.b_enc.zero_()
    inputs = ShardInputs(str(tmp_path / "shards"), held_out_fraction=1.0, tokens_per_unit=8)
    page = feature_pages(sae, collect_activations(sae, inputs), lambda i: f"<{i}>", feature_ids=[2], window=2)
    x = expected[SHARD_HOOK][:, 2]
    best = int(x.argmax())
    (feature,) = page["features"]
    top = feature["contexts"][0]
    assert top["tokens"][top["peak"]] == f"<{int(ids[best])}>"
    assert top["acts"][top["peak"]] == pytest.approx(float(x[best]), rel=1e-3)
    assert feature["density"] == pytest.approx(float((x > 0).float().mean()))
    assert page["n_tokens"] == 50


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_unembedding_is_that_of_the_whole_model(family: str, tmp_path: Path):
    path = save_tiny_model(family, tmp_path)
    head = load_unembedding(path, HOOK)
    assert head is not None
    assert_close(head, AutoModelForCausalLM.from_pretrained(path).lm_head.weight.detach())
    assert load_unembedding(path, "blocks.1.mlp.hook_post") is None
    assert load_unembedding(path, "blocks.1.attn.hook_z") is None


def test_the_command_says_whose_features_it_needs(sweep: tuple[Path, SweepModule], dictionary: Path, tmp_path: Path):
    out = str(tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"5 dictionaries: say whose features, by --features_of 'AEN λ₁=0.0025'"):
        report_command([str(sweep[0]), "--features", "-o", out])
    with pytest.raises(ValueError, match="no dictionary 'nobody' in the report"):
        report_command([str(sweep[0]), "--features-of", "nobody", "-o", out])
    with pytest.raises(ValueError, match="synthetic data has neither"):
        report_command([str(sweep[0]), "--features-of", "TopK k=2", "-o", out])
    with pytest.raises(FileNotFoundError, match="no browser 'nonesuch'"):
        report_command([str(dictionary), "--png", str(tmp_path), "--browser", "nonesuch", "-o", out])


# --- the page in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_of_everything(
    sweep: tuple[Path, SweepModule], dictionary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    arguments = [
        str(sweep[0]),
        str(dictionary),
        "--features-of",
        str(dictionary),
        "--n-rows",
        "8",
        "--held-out-documents",
        "20",
    ]
    assert report_command([*arguments, "-o", str(path)]) == 0
    return path


def test_without_a_browser_the_report_is_written_and_says_so(
    dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report_command([str(dictionary), "-o", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]) == 0
    assert "no pictures: there is no chromium" in capsys.readouterr().out
    assert (tmp_path / "r.html").is_file()
    assert not (tmp_path / "png").exists()


@pytest.mark.slow
@needs_browser
def test_in_a_browser_every_figure_is_drawn_and_features_are_searched(page_of_everything: Path):
    assert BROWSER is not None
    data = Page(page_of_everything.read_text(encoding="utf-8")).data
    figures, (features,) = json.loads(data["figure-data"]), json.loads(data["feature-data"])
    dom = dump_dom(BROWSER, page_of_everything)
    for figure in figures:
        start = dom.index(f'id="plot-{figure["id"]}"')
        assert "main-svg" in dom[start : start + 2000], figure["id"]
    rows = re.findall(r'<tr class="row"[^>]*id="feature-(\d+)"', dom)
    assert {int(r) for r in rows} == {f["id"] for f in features["features"]}
    wanted = features["features"][0]
    dom = dump_dom(BROWSER, page_of_everything, f"q={wanted['id']}")
    assert re.findall(r'<tr class="row"[^>]*id="feature-(\d+)"', dom) == [str(wanted["id"])]
    assert "Where it is strongest" in dom  # a single hit is unfolded
    assert f"1 of {len(features['features'])} features" in dom


@pytest.mark.slow
@needs_browser
def test_pictures_have_the_size_of_what_they_show_and_are_not_blank(page_of_everything: Path, tmp_path: Path):
    assert BROWSER is not None
    heights = measure(BROWSER, page_of_everything, "open=2&rows=24")
    _, picture = take_pictures(BROWSER, page_of_everything, tmp_path / "png", ["training"])
    content = picture.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # of a PNG's first chunk
    assert (width, height) == (1280, heights["legend"] + heights["training"] + 30)
    assert len(content) > 40_000  # a blank page of this size takes 5 kB


def test_a_run_of_one_sae_has_its_label_and_its_last_validation(tmp_path: Path):
    module = SAEModule({**GRID[0], "l1_coefficient": 0.02}, lr=3e-3)
    data = SpikedDataModule(d_in=8, n_features=24, k=2, train_batch_size_tokens=32, n_eval_samples=128)
    trainer(tmp_path / "alone").fit(module, datamodule=data)
    (d,) = collect([tmp_path / "alone"]).dictionaries
    assert (d.label, d.family, d.metrics_source) == ("alone/version_0", "AEN", "validation, last")
    last = pd.read_csv(tmp_path / "alone" / "version_0" / "metrics.csv")["val/metrics/l0"].dropna().iloc[-1]
    assert d.metrics["l0"] == last
    assert d.settings["lambda_1"] == pytest.approx(0.02 / 8)
    assert d.l1_weights is not None
    assert_close(torch.from_numpy(d.l1_weights), module.sae.l1_weights)


@pytest.mark.parametrize(
    ("settings", "family", "own_weights"),
    [
        ({"gamma": 0.5, "lambda_2": 1e-4, "starvation_guard": 0.0}, "AEN", True),
        ({"gamma": 0.0, "lambda_2": 0.0}, "L1", False),
        ({"gamma": 0.0, "lambda_2": 0.0, "starvation_guard": 0.1}, "L1 + guard", True),
        ({"gamma": 0.5, "lambda_2": 0.0, "starvation_guard": 0.1}, "adaptive lasso + guard", True),
    ],
)
def test_the_family_says_whether_there_was_a_guard(settings: dict[str, Any], family: str, own_weights: bool):
    assert family_of({"metadata": {"training_architecture": "aen"}}, settings) == family
    assert has_own_weights(settings) == own_weights
