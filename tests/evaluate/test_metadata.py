"""A stranger's dictionary may say what it was trained on, and may not have this machine run code for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from aen_lightning.evaluate.metadata import language_model_kwargs, synthetic_data
from tests.support.commands import diagnose_command, evaluate_command, report_command
from tests.support.shard_sets import HOOK, write_set
from tests.support.text import documents
from tests.support.tiny_models import D_MODEL, save_tiny_model

CODE = """
from pathlib import Path
from transformers import {base}
Path({sentinel!r}).touch()

class Hostile({base}):
    model_type = "gpt2-hostile"
"""


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "the code of the repository ran"


@pytest.fixture
def model(tmp_path: Path, sentinel: Path) -> Path:
    """A model whose config and tokenizer come as code in its repository."""
    folder = Path(save_tiny_model("gpt2", tmp_path))
    for file, key, auto, base in (
        ("config.json", "model_type", "AutoConfig", "GPT2Config"),
        ("tokenizer_config.json", "tokenizer_class", "AutoTokenizer", "PreTrainedTokenizerFast"),
    ):
        content = json.loads((folder / file).read_text())
        content[key] = "gpt2-hostile" if key == "model_type" else "Hostile"
        module = f"hostile_{auto.lower()}"
        content["auto_map"] = {
            auto: f"{module}.Hostile" if auto == "AutoConfig" else [None, f"{module}.Hostile"]
        }
        (folder / file).write_text(json.dumps(content))
        (folder / f"{module}.py").write_text(CODE.format(base=base, sentinel=str(sentinel)))
    return folder


def dictionary(folder: Path, **metadata: Any) -> Path:
    known = {
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "blocks.1.hook_resid_post",
        "context_size": 8,
    }
    sae = SAE.from_dict(
        {"architecture": "standard", "d_in": D_MODEL, "d_sae": 24, "metadata": known | metadata}
    )
    sae.save_model(folder)
    return folder


ASKS: dict[str, Any] = {"trust_remote_code": True}


@pytest.mark.parametrize(
    ("command", "asks"),
    [("evaluate", ASKS), ("evaluate", {}), ("evaluate cut", {}), ("diagnose", ASKS), ("report", ASKS)],
)
def test_no_code_of_the_models_repository_runs(
    command: str, asks: dict[str, Any], model: Path, sentinel: Path, tmp_path: Path
):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents(200)))
    sae = dictionary(
        tmp_path / "sae", model_name=str(model), dataset_path=str(tmp_path / "text.jsonl"), held_out_documents=100,
        model_from_pretrained_kwargs=asks,
    )  # fmt: skip
    with pytest.raises(ValueError, match="trust_remote_code"):
        {
            "evaluate": lambda: evaluate_command([str(sae)]),
            "evaluate cut": lambda: evaluate_command([str(sae), "--no_downstream"]),
            "diagnose": lambda: diagnose_command([str(sae)]),
            "report": lambda: report_command([str(sae), "--features", "--out", str(tmp_path / "page.html")]),
        }[command]()
    assert not sentinel.exists()


def test_no_code_runs_by_way_of_a_set_of_shards_either(model: Path, sentinel: Path, tmp_path: Path):
    write_set(tmp_path / "set", [400], d_in={HOOK: D_MODEL})
    path = tmp_path / "set" / "manifest.json"
    content = json.loads(path.read_text())
    content["metadata"] |= {
        "model_name": str(model),
        "model_from_pretrained_kwargs": {"trust_remote_code": True},
    }
    path.write_text(json.dumps(content))
    sae = dictionary(tmp_path / "sae", hook_name=HOOK)
    with pytest.raises(ValueError, match="trust_remote_code"):
        report_command([str(sae), "--features", "--shards", str(tmp_path / "set"), "--held_out_fraction", "1",
                        "--out", str(tmp_path / "page.html")])  # fmt: skip
    assert not sentinel.exists()


def test_the_user_may_let_it_run(model: Path, sentinel: Path, tmp_path: Path):
    sae = dictionary(tmp_path / "sae", model_name=str(model), dataset_path=str(tmp_path / "missing.jsonl"))
    with pytest.raises((ValueError, OSError)):  # it goes on to what is not there
        evaluate_command([str(sae), "--trust_remote_code"])
    assert sentinel.exists()


def kwargs_of(asked: dict[str, Any], **options: Any) -> dict[str, Any]:
    metadata = SAEMetadata(
        model_class_name="AutoModelForCausalLM", model_from_pretrained_kwargs=asked, model_name="a/b"
    )
    return language_model_kwargs(metadata, **options)


def test_what_is_harmless_is_followed_and_what_is_of_no_effect_left_out():
    asked = {"attn_implementation": "eager", "subfolder": "a/b", "variant": "fp16", "gguf_file": "q.gguf",
             "device_map": "auto", "token": "x", "cache_dir": "/somewhere", "torch_dtype": "float16",
             "quantization_config": None}  # fmt: skip
    assert kwargs_of(asked) == {"trust_remote_code": False, "attn_implementation": "eager", "subfolder": "a/b",
                                "variant": "fp16", "gguf_file": "q.gguf"}  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        {"attn_implementation": "somebody/kernel"}, {"quantization_config": {"load_in_4bit": True}},
        {"subfolder": "../x"}, {"subfolder": "/x"}, {"gguf_file": "a/b"}, {"config": "x"}, {"adapter_kwargs": {"a": 1}},
        {"code_revision": "x"}, {"custom_generate": "x"}, {"state_dict": {}}, {"key_mapping": {"a": "b"}},
    ],
)  # fmt: skip
def test_all_else_must_come_from_the_user(asked: dict[str, Any]):
    with pytest.raises(ValueError, match="which only you may: give --model_from_pretrained_kwargs"):
        kwargs_of(asked)
    assert kwargs_of(asked, given=asked) == {"trust_remote_code": False, **asked}


def test_what_the_user_gives_stands_for_all():
    assert kwargs_of({"trust_remote_code": True, "subfolder": "x"}, given={}) == {"trust_remote_code": False}
    assert kwargs_of({"trust_remote_code": True}, trust_remote_code=True) == {"trust_remote_code": True}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"d_in": 8, "n_feature": 3}, r"there is no key 'n_feature' \(did you mean 'n_features'\?\)"),
        ({"d_in": "8"}, "d_in: expected a valid integer, got '8'"),
        ({"d_in": 9}, "d_in is 9, and the dictionary's is 8"),
        ({"d_in": 8, "n_features": 10**9}, "1000000000 features take"),
        ({"d_in": 8, "rho": float("nan")}, "rho: expected a finite number"),
    ],
)
def test_synthetic_data_are_what_the_distribution_can_be(parameters: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        synthetic_data(parameters, d_in=8, n_samples=16)


def test_what_an_earlier_version_left_in_synthetic_data_does_no_harm():
    left = {"d_in": 8, "n_features": 16, "k": 2, "_class_path": "aen_lightning.data.SpikedDataModule"}
    assert synthetic_data(left, d_in=8, n_samples=16).hparams["n_features"] == 16
