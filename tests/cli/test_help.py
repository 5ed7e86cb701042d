"""Help pages of the commands that LightningCLI parses: made of source, checked against the real parsers."""

from __future__ import annotations

import dataclasses
import inspect
import re

import lightning.pytorch as pl
import pytest

from aen_lightning import AENTrainingSAEConfig
from aen_lightning.cli.help import Option, options_in_source, page, plain
from aen_lightning.cli.main import main
from aen_lightning.cli.training_help import training_help
from aen_lightning.training.module import SAEModule


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")


def options_of(command: str) -> set[str]:
    """Full names of the options on the page: what the section's title says before KEY, and what is below."""
    found, prefix = set(), ""
    for line in training_help(command).splitlines():
        if m := re.search(r"(--[\w.]+\.)KEY", line):
            prefix = m[1]
        elif line == "The run:":
            prefix = ""
        elif m := re.match(r"  ([\w.-]+)", line):
            found.add(prefix + m[1])
    return found


def test_fit_fits_a_screen_and_says_what_matters() -> None:
    text = training_help("fit")
    lines = text.splitlines()
    assert len(lines) <= 64
    assert max(map(len, lines)) <= 110
    assert (
        "  gamma FLOAT [0.5]                   Exponent of the adaptive weights, >= 0, dimensionless."
        in lines
    )
    assert "  d_in INT                            (required) Width of the activations." in lines
    assert "  lr FLOAT [0.001]                    Learning rate." in lines
    for phrase in (
        "SpikedDataModule",
        "--ckpt_path",
        "--help_all",
        "aen recipes list",
        "--model.sae.help jumprelu",
    ):
        assert phrase in text


def test_every_field_of_the_sae_is_on_the_page_with_its_default() -> None:
    text = training_help("fit")
    inherited = {f.name for f in dataclasses.fields(AENTrainingSAEConfig.__bases__[0])} - {
        "decoder_init_norm"
    }
    for field in dataclasses.fields(AENTrainingSAEConfig):
        if field.name not in inherited:
            (line,) = [line for line in text.splitlines() if line.startswith(f"  {field.name} ")]
            if field.default not in (None, False):
                assert f"[{field.default}]" in line


@pytest.mark.parametrize("command", ["fit", "validate", "test", "sweep", "refit", "harvest", "plan"])
def test_every_option_on_a_page_is_one_of_the_parser(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "plan":
        assert options_of("plan") == {"--config", "--tflops_per_s", "--measured"}
        return
    with pytest.raises(SystemExit):
        main([command, "--help_all"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    fields = {f"--model.sae.{f.name}" for f in dataclasses.fields(AENTrainingSAEConfig)}
    fields |= {"--model.sae.architecture", "--model.sae.lambda_1", "--model.sae.lambda_2"}
    classes = {"--data.SpikedDataModule", "--data.ActivationsDataModule", "--data.TextActivationsDataModule"}
    on_the_page = options_of(command)
    assert len(on_the_page) > 10
    assert on_the_page - fields - classes - {"--quiet", "--json"} <= known


def test_what_the_page_says_of_the_trainer_is_so() -> None:
    parameters = inspect.signature(pl.Trainer).parameters
    for name, default in (("max_steps", -1), ("devices", "auto")):
        assert f"  --trainer.{name} INT [{default}]" in training_help("fit")
        assert parameters[name].default == default


def test_reading_a_class_from_its_source_gives_its_signature() -> None:
    summary, options = options_in_source("training.module", "SAEModule")
    assert summary == plain((SAEModule.__doc__ or "").split("\n")[0])
    signature = inspect.signature(SAEModule.__init__).parameters
    assert options
    for option in options:
        parameter = signature[option.name]
        assert option.default == (None if parameter.default is parameter.empty else repr(parameter.default))
        assert option.type == parameter.annotation
        assert option.meaning in plain(SAEModule.__doc__ or "")


def test_the_fields_of_another_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.sae.help", "jumprelu"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^  jumprelu_bandwidth FLOAT \[0.05\] +bandwidth for the JumpReLU activation$", out, re.MULTILINE
    )
    assert re.search(r"^  jumprelu_sparsity_loss_mode \[step\]", out, re.MULTILINE)
    assert "One of step, tanh, quadratic." in " ".join(out.split())
    assert re.search(r"^  d_sae INT +\(required\) Number of features\.$", out, re.MULTILINE)
    assert main(["fit", "--model.sae.help=topk"]) == 0
    assert re.search(r"^  k INT \[100\]", capsys.readouterr().out, re.MULTILINE)


def test_the_keys_of_a_data_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--data.help", "ActivationsDataModule"])
    assert exit_info.value.code == 0
    assert "--data.held_out_fraction" in capsys.readouterr().out


def test_a_page_keeps_whole_clauses_where_an_option_has_one_line() -> None:
    options = [
        Option(
            "a", "int", "1", "The first clause is short enough for its line; " + "what follows is not " * 5
        ),
        Option("much_too_long_a_name_for_the_column", "float", "None", "word " * 30),
        Option("b", "Literal['x', 'y']", None, "Pick."),
    ]
    lines = page("u", "d", [("t", options)], one_line=True).splitlines()
    assert lines[5:] == [
        "  a INT [1]                           The first clause is short enough for its line.",
        "  much_too_long_a_name_for_the_column FLOAT",
        f"{'':<38}{'word ' * 13}...",
        "  b                                   (required) Pick. One of x, y.",
    ]
