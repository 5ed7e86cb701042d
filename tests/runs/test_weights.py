"""A stranger's dictionary: every field that is read is what it should be, and every number is finite."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aen_lightning.evaluate import load_dictionary
from aen_lightning.report import collect, make_figures
from aen_lightning.runs import find_dictionaries
from aen_lightning.runs.weights import check_weights
from aen_lightning.saes.export import export_sae
from tests.support.commands import compare_command, diagnose_command, push_command
from tests.support.runs import D_IN, D_SAE, make_run, trained


def put(*place: str, value: Any) -> Any:
    def change(cfg: dict[str, Any]) -> Any:
        for key in place[:-1]:
            cfg = cfg[key]
        cfg[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("d_in", value=-1), "d_in: expected greater than or equal to 1, got -1"),
        (put("d_in", value="8"), "d_in: expected a valid integer, got '8'"),
        (put("d_in", value=True), "d_in: expected a valid integer, got True"),
        (put("d_sae", value=2**40), "d_sae: expected less than or equal to"),
        (put("d_sae", value=None), "d_sae: expected a valid integer, got None"),
        (put("architecture", value=["standard"]), "architecture: expected a valid string"),
        (put("dtype", value=3), "dtype: expected a valid string"),
        (put("metadata", value=[1]), "metadata: expected"),
        (put("metadata", "sae_lens_version", value=6), "metadata.sae_lens_version: expected a valid string, got 6"),
        (put("metadata", "sae_lens_version", value="six"), "metadata.sae_lens_version: expected a version such as"),
        (put("metadata", "to_dict", value=1), "not 'to_dict', the name of a method"),
        (put("metadata", "__class__", value=1), "not '__class__'"),
        (put("metadata", "self", value=1), "not 'self'"),
        (put("metadata", "hook_name", value=3), "metadata.hook_name: expected a valid string"),
        (put("metadata", "context_size", value=0), "metadata.context_size: expected greater than or equal to 1"),
        (put("metadata", "training_architecture_details", value=[]), "training_architecture_details: expected"),
        (put("metadata", "model_from_pretrained_kwargs", value="x"), "model_from_pretrained_kwargs: expected"),
        (put("metadata", "provenance", value={"evaluation": {"l0": "x"}}), "evaluation.l0: expected a valid number"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named_at_every_door(tmp_path: Path, change: Any, message: str):
    export_sae(trained(), tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    cfg = json.loads(path.read_text())
    change(cfg)
    path.write_text(json.dumps(cfg))
    for door in (load_dictionary, find_dictionaries, lambda folder: collect([folder])):
        with pytest.raises(ValueError, match=message) as caught:
            door(tmp_path / "sae")
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"{}", None])
def test_damaged_weights_are_named(tmp_path: Path, damage: bytes | None):
    export_sae(trained(), tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5] if damage is None else damage)
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        load_dictionary(tmp_path)
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        diagnose_command([str(tmp_path), "--no_inputs", "--l1_weights", str(weights)])
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no sae_weights\.safetensors"):
        load_dictionary(tmp_path)


def spoil(folder: Path, name: str, value: float) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[5] = value
    save_file(tensors, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_a_number_that_is_not_finite_is_neither_loaded_nor_published(tmp_path: Path, name: str, value: float):
    run = make_run(tmp_path / "run")
    final = run / "sae" / "final"
    spoil(final, name, value)
    message = rf"{name} holds 1 of \d+ numbers that are not finite"
    doors = [
        partial(load_dictionary, final),
        partial(push_command, [str(run), "me/sae", "--dry_run"]),
        partial(push_command, [str(run), "me/sae"]),
        partial(compare_command, [str(final), str(final)]),
        partial(
            check_weights, json.loads((final / "cfg.json").read_text()), final / "sae_weights.safetensors"
        ),
    ]
    if name == "W_dec":
        doors += [find_dictionaries(run)[0].W_dec, lambda: make_figures(collect([run]))]
    for door in doors:
        with pytest.raises(ValueError, match=message):
            door()


def test_a_training_checkpoint_of_nans_is_not_published_either(tmp_path: Path):
    sae = trained()
    with torch.no_grad():
        sae.W_enc[0, 0] = float("nan")
    sae.save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match="W_enc holds 1 of 128 numbers that are not finite"):
        push_command([str(tmp_path / "sae"), "me/sae", "--dry_run"])


def test_what_lies_beside_the_weights_fits_them(tmp_path: Path):
    export_sae(trained(), tmp_path, log_sparsity=torch.zeros(D_SAE))
    save_file({"sparsity": torch.zeros(3)}, tmp_path / "sparsity.safetensors")
    save_file({"l1_weights": torch.ones(D_SAE, 2)}, tmp_path / "adaptive_state.safetensors")
    (found,) = find_dictionaries(tmp_path)
    for read in (found.log_sparsity, found.l1_weights):
        with pytest.raises(ValueError, match=f"expected one for each of {D_SAE} features"):
            read()
    save_file({"W_dec": torch.zeros(D_IN, D_SAE)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=rf"W_dec has shape \({D_IN}, {D_SAE}\) where the config means"):
        found.W_dec()


def test_a_config_of_saelens_5_still_opens(tmp_path: Path):
    export_sae(trained(), tmp_path)
    cfg = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_post", "hook_layer": 3, "hook_head_index": None, "context_size": 128,
        "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "prepend_bos": True,
        "finetuning_scaling_factor": False, "normalize_activations": "none", "dataset_path": "a/b",
        "dataset_trust_remote_code": True, "sae_lens_training_version": "3.18.2", "neuronpedia_id": None,
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert load_dictionary(tmp_path).cfg.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert find_dictionaries(tmp_path)[0].sae_id == "blocks.3.hook_resid_post"
