from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest


@pytest.fixture
def script(load_script):
    return load_script("draw")


RUNS = [
    {"variant": "a", "target_l0": 16, "l0": 15.0, "ev": 0.5, "seed": 0, "d_sae": 64},
    {"variant": "a", "target_l0": 16, "l0": 17.0, "ev": 0.7, "seed": 1, "d_sae": 64},
    {"variant": "a", "target_l0": 8, "l0": 8.0, "ev": 0.4, "seed": 0, "d_sae": 64},
    {"variant": "b & c", "target_l0": 8, "l0": 8.0, "ev": 0.3, "seed": 0, "d_sae": 64},
    {"variant": "b & c", "target_l0": 16, "l0": 16.0, "ev": None, "seed": 0, "d_sae": 64},
]


def test_seeds_become_one_point_with_their_spread(script):
    found = script.points(RUNS, x="l0", y="ev", group="target_l0")
    assert found["a"] == [
        script.Point(8.0, 0.4, 0.0),
        script.Point(16.0, pytest.approx(0.6), pytest.approx(0.02**0.5)),
    ]
    assert found["b & c"] == [script.Point(8.0, 0.3, 0.0)]


def test_conditions_compare_numbers_as_numbers(script):
    assert script.select(RUNS, ["target_l0=8.0", "variant=a"]) == [RUNS[2]]
    with pytest.raises(ValueError, match="no run has target_l0=9"):
        script.select(RUNS, ["target_l0=9"])
    with pytest.raises(ValueError, match="key=value, got 'l0'"):
        script.select(RUNS, ["l0"])


def test_of_several_rates_a_point_takes_the_one_that_did_best_on_the_first_seed(script):
    at = {"variant": "a", "target_l0": 8, "d_sae": 64}
    runs = [
        {**at, "seed": 1, "lr": 0.1, "ev": 0.9},  # the best of all, but not the first seed's
        {**at, "seed": 0, "lr": 0.1, "ev": 0.5},
        {**at, "seed": 0, "lr": 0.2, "ev": 0.6},
        {**at, "seed": 1, "lr": 0.2, "ev": 0.7},
        {**at, "target_l0": 16, "seed": 0, "lr": 0.1, "ev": 0.4},
    ]
    assert script.best_of(runs, "lr", group="target_l0") == runs[2:]


def test_a_metric_that_no_run_has_is_named_with_those_there_are(script):
    with pytest.raises(ValueError, match=r"'mcc'; there are d_sae, ev, l0"):
        script.points(RUNS, x="l0", y="mcc", group="target_l0")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.61, 0.79, [0.65, 0.7, 0.75]),
        (-3, 52, [0, 10, 20, 30, 40, 50]),
    ],
)
def test_ticks_are_round(script, low, high, expected):
    assert script.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (15.8, 130.0, [16, 32, 64, 128]),
        (16.0, 64.0, [16, 32, 64]),
        (0.2, 5000.0, [0.25, 1, 4, 16, 64, 256, 1024, 4096]),
        (17.0, 31.0, [18, 20, 22, 24, 26, 28, 30]),
    ],
)
def test_a_logarithmic_axis_is_marked_at_powers_of_two(script, low, high, expected):
    assert script.powers_of_two(low, high) == pytest.approx(expected)


def test_four_variants_have_four_shapes(script):
    shapes = {script._marker(0, 0, i).partition("fill=")[0] for i in range(4)}
    assert len(shapes) == 4


@pytest.mark.parametrize("log", [[], ["--log-x"]])
def test_the_figure_is_an_svg_with_every_point_inside_it(script, tmp_path, log):
    (tmp_path / "runs.json").write_text(json.dumps({"runs": RUNS}))
    out = tmp_path / "figure.svg"
    script.main([str(tmp_path / "runs.json"), "--y", "ev", "l0", "--out", str(out), *log])
    svg = ET.fromstring(out.read_text(encoding="utf-8"))
    width, height = float(svg.get("width")), float(svg.get("height"))
    name = "{http://www.w3.org/2000/svg}"
    circles = svg.findall(f"{name}circle")
    assert len(circles) == 1 + 2 * 2  # the legend's, and two points of "a" in each of two panels
    assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles)
    assert "b & c" in [text.text for text in svg.findall(f"{name}text")]
    assert len([p for p in svg.findall(f"{name}path") if p.get("class") == "error"]) == 2


def test_widths_are_not_mixed(script, tmp_path):
    runs = [*RUNS, {**RUNS[0], "d_sae": 128}]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    script.main([str(tmp_path / "runs.json"), "--out", str(tmp_path / "f.svg")])
    assert "a, 128 features" in (tmp_path / "f.svg").read_text(encoding="utf-8")


def test_a_file_without_runs_is_refused(script, tmp_path, capsys):
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "no.json"), "--out", str(tmp_path / "f.svg")])
    assert "holds no list of runs" in capsys.readouterr().err
