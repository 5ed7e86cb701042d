from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from aen_lightning.runs import find_dictionaries
from aen_lightning.runs.dictionary import read_activation_scale
from aen_lightning.runs.ids import check_id
from aen_lightning.saes.export import export_sae
from aen_lightning.saes.input_scaling import InputScaling
from tests.support.runs import D_SAE, make_run, trained


def test_ids_are_folders_without_what_every_run_has(tmp_path: Path):
    for run in ("l1/version_0", "aen/version_0", "aen/version_1"):
        make_run(tmp_path / run)
    assert [d.sae_id for d in find_dictionaries(tmp_path)] == ["aen/version_0", "aen/version_1", "l1"]
    assert [d.sae_id for d in find_dictionaries(tmp_path / "l1")] == ["blocks.3.hook_resid_post"]
    step = tmp_path / "l1" / "version_0" / "sae" / "step_10"
    assert [d.sae_id for d in find_dictionaries(step)] == ["blocks.3.hook_resid_post"]
    assert [d.sae_id for d in find_dictionaries(tmp_path / "l1", sae_id="mine")] == ["mine"]


def test_several_dictionaries_of_one_run(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for name in ("a", "b"):
        export_sae(trained(), run / "sae" / "final" / name)
        export_sae(trained(), run / "sae" / "step_10" / name)
    for file in (run / "sae" / "final").glob("*.*"):
        file.unlink()
    found = find_dictionaries(run)
    assert [(d.sae_id, d.name, d.run) for d in found] == [("a", "a", run), ("b", "b", run)]


def test_folders_without_a_finished_dictionary_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_dictionaries(tmp_path / "nothing")
    export_sae(trained(), tmp_path / "run" / "sae" / "step_10")
    with pytest.raises(FileNotFoundError, match=r"no dictionary below.*step_N"):
        find_dictionaries(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be the ID"):
        find_dictionaries(tmp_path / "run" / "sae" / "step_10", sae_id="../up")


def test_a_hook_name_that_is_no_id_is_refused_by_its_file(tmp_path: Path):
    export_sae(trained(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "../up"
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: '../up' cannot be the ID"):
        find_dictionaries(tmp_path)


def test_an_id_is_for_one_dictionary(tmp_path: Path):
    for run in ("a", "b"):
        make_run(tmp_path / run)
    with pytest.raises(ValueError, match=r"one dictionary only, and below .* there are 2"):
        find_dictionaries(tmp_path, sae_id="mine")


@pytest.mark.parametrize("sae_id", ["", "a//b", "a/../b", ".git/x", "a b", "ä"])
def test_ids_that_are_no_folders_are_refused(sae_id: str):
    with pytest.raises(ValueError, match="cannot be the ID of a dictionary"):
        check_id(sae_id)


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "holds a list"), ("{", "is not JSON"), ('{"d_in": 3}', "has no d_sae")]
)
def test_a_config_that_is_none_is_named(tmp_path: Path, content: str, message: str):
    make_run(tmp_path)
    (tmp_path / "sae" / "final" / "cfg.json").write_text(content)
    with pytest.raises(ValueError, match=rf"cfg\.json.*{message}"):
        find_dictionaries(tmp_path)


def test_an_exported_dictionary_gives_back_what_training_left(tmp_path: Path):
    sae = trained()
    sae.l1_weights.copy_(torch.linspace(0.1, 9, D_SAE))
    sparsity = torch.linspace(-5, -1, D_SAE)
    export_sae(sae, tmp_path, input_scaling=InputScaling("per_token"), log_sparsity=sparsity)
    (found,) = find_dictionaries(tmp_path)
    assert found.training_architecture == "aen"
    assert found.cfg["architecture"] == "standard"
    assert_close(found.l1_weights(), sae.l1_weights)
    assert_close(found.log_sparsity(), sparsity)
    assert_close(found.W_dec(), torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1))


def test_l1_weights_of_a_dictionary_saved_for_training_lie_among_its_weights(tmp_path: Path):
    sae = trained()
    sae.l1_weights.fill_(3.0)
    sae.save_model(tmp_path)
    (found,) = find_dictionaries(tmp_path)
    assert_close(found.l1_weights(), torch.full((D_SAE,), 3.0))
    assert found.log_sparsity() is None


def test_running_means_alone_are_no_l1_weights(tmp_path: Path):
    export_sae(trained(), tmp_path)
    save_file({"feature_acts_ema": torch.ones(D_SAE)}, tmp_path / "adaptive_state.safetensors")
    assert find_dictionaries(tmp_path)[0].l1_weights() is None


def test_the_average_scale_beside_a_checkpoint(tmp_path: Path):
    assert read_activation_scale(tmp_path) is None
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.5}))
    assert read_activation_scale(tmp_path) == 0.5
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": "half"}))
    with pytest.raises(ValueError, match="scaling_factor: expected a valid number, got 'half'"):
        read_activation_scale(tmp_path)


@pytest.mark.parametrize("kind", ["none", "per_token", "average"])
def test_exported_files_may_be_read_as_the_umask_says(tmp_path: Path, kind: str):
    before = os.umask(0o022)
    try:
        folder = make_run(tmp_path, kind=kind) / "sae" / "final"
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert modes == dict.fromkeys(
        ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "adaptive_state.safetensors"), "0o644"
    )
