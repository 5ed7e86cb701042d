"""Options said once: refused when they make no sense, and all of them on the command line."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from aen_lightning.data.options import DatasetOptions, TextOptions
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.harvest import HarvestDataModule
from tests.support.tiny_models import BOS, EOS, PAD, tiny_tokenizer


def parser(datamodule: type) -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(datamodule, "data")
    return made


@pytest.mark.parametrize(
    ("datamodule", "options", "own"),
    [
        (TextActivationsDataModule, TextOptions, {"model", "tokenizer", "dataset"}),
        (
            HarvestDataModule, DatasetOptions,
            {"model_name", "revision", "n_tokens", "batch_size_prompts", "pack", "mask_documents"},
        ),
    ],
)  # fmt: skip
def test_the_command_line_has_each_option_with_its_default_type_and_help(
    datamodule: type, options: type, own: set[str]
):
    found = parser(datamodule)
    defaults = found.get_defaults().data
    named = {field.name: field.default for field in fields(options)}
    assert set(vars(defaults)) == named.keys() | own
    assert {name: defaults[name] for name in named} == named
    described = " ".join(found.format_help().split())
    assert "Unvalidated" not in described  # what jsonargparse says where it cannot tell the type
    meanings = " ".join(str(c.__doc__) for c in options.__mro__ if c is not object)
    for name in named:
        meaning = re.search(rf" {name}: (.+)", meanings)
        assert meaning, name
        assert " ".join(meaning[1].split()[:3]) in described, name


@pytest.mark.parametrize(
    "argument",
    ["model_dtype=int8", "model_class_name=GPT", "streaming=7", "exclude_token_ids=[a]", "context_size=x"],
)
def test_the_command_line_checks_types(argument: str):
    with pytest.raises(ArgumentError, match=argument.partition("=")[0]):
        parser(TextActivationsDataModule).parse_args([f"--data.{argument}"])


def test_a_name_that_does_not_exist_is_an_error_with_the_nearest():
    with pytest.raises(
        TypeError, match=r"no option 'contxt_size' \(did you mean 'context_size'\?\); there are .*seed"
    ):
        TextActivationsDataModule(contxt_size=8)
    with pytest.raises(TypeError, match=r"no option 'prefetch'; there are .*n_tokens"):
        HarvestDataModule("text.jsonl", prefetch=8)


@pytest.mark.parametrize(("option", "value", "message"), [
    ("context_size", 0, "context_size must be at least 1, got 0"),
    ("stream_retries", -1, "stream_retries must be at least 0, got -1"),
    ("stream_backoff_seconds", -0.5, "stream_backoff_seconds must be at least 0, got -0.5"),
    ("held_out_documents", -1, "must be at least 0, got -1"),
    ("held_out_documents", 1, "0 or at least 2"),
    ("norm_outlier_multiple", 0.5, "must be above 1 or None, got 0.5"),
    ("input_scaling", "mean", "must be 'none', 'per_token' or 'average', got 'mean'"),
    ("buffer_size_tokens", 8, r"at least a batch \(32 tokens\), got 8"),
    ("activations_mixing_fraction", 1.5, r"in \[0, 1\], got 1.5"),
    ("hook_name", "", "hook_name is missing"),
    ("hook_name", [], "hook_name is missing"),
    ("n_eval_batches", 0, "at least 1, got 0"),
    ("prefetch", -1, "prefetch must be at least 0, got -1"),
])  # fmt: skip
def test_values_out_of_range_are_refused(option: str, value: Any, message: str):
    good: dict[str, Any] = {"hook_name": "blocks.1.hook_resid_post", "train_batch_size_tokens": 32}
    assert TextOptions(**good).buffer_size == 2 * 32 * 128  # two model calls, more than 8 batches
    with pytest.raises(ValueError, match=message):
        TextOptions(**{**good, option: value})


def test_a_model_and_a_dataset_are_needed():
    with pytest.raises(ValueError, match="model_name is missing: give a Hub name or a folder"):
        TextActivationsDataModule(hook_name="blocks.1.hook_resid_post", dataset_path="text.jsonl")
    with pytest.raises(ValueError, match="dataset_path is missing: give a Hub name, a folder or files"):
        TextActivationsDataModule(hook_name="blocks.1.hook_resid_post", model_name="gpt2")


def test_special_tokens_are_those_of_the_tokenizer():
    assert DatasetOptions(exclude_token_ids=[9, EOS]).excluded_token_ids(tiny_tokenizer()) == (
        BOS,
        EOS,
        PAD,
        9,
    )
    assert DatasetOptions(exclude_special_tokens=False).excluded_token_ids(tiny_tokenizer()) == ()
    assert DatasetOptions(exclude_token_ids=[9]).excluded_token_ids(None) == (9,)
