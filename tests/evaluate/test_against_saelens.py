"""Agreement with SAELens's `run_evals` on the same tokens, and dictionaries of which the answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, run_evals
from sae_lens.evals import EvalConfig
from sae_lens.load_model import load_model
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.training.activation_scaler import ActivationScaler
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.evaluate import (
    SyntheticInputs,
    evaluate_dictionary,
    evaluate_downstream,
    evaluate_reconstruction,
    load_dictionary,
)
from aen_lightning.evaluate.results import write_result
from tests.support.evaluation import (
    CONTEXT,
    D_SAE,
    HF_HOOK,
    dictionary,
    identity_dictionary,
    text_inputs,
)
from tests.support.tiny_models import D_MODEL, EOS


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("normalize_activations", ["none", "constant_norm_rescale"])
def test_agrees_with_run_evals_on_the_same_tokens(
    model_path: str, rows: list[list[int]], architecture: str, normalize_activations: str, tmp_path: Path
):
    dictionary(architecture, normalize_activations=normalize_activations).save_model(tmp_path)
    sae = load_dictionary(tmp_path)
    inputs = text_inputs(AutoModelForCausalLM.from_pretrained(model_path), rows)
    result = evaluate_dictionary(sae, inputs)

    proxy = load_model("AutoModelForCausalLM", model_path, device="cpu", hook_names=[HF_HOOK])
    n = inputs.n_units
    theirs: dict[str, Any] = {}
    features: dict[str, Any] = {}
    for part in ({"compute_ce_loss": True, "compute_kl": True},
                 {"compute_sparsity_metrics": True, "compute_variance_metrics": True, "compute_l2_norms": True,
                  "compute_featurewise_density_statistics": True}):  # fmt: skip
        dataset = Dataset.from_dict({"tokens": inputs.rows.tolist()})
        options: dict[str, Any] = {"streaming": False, "store_batch_size_prompts": n, "context_size": CONTEXT}
        store = ActivationsStore.from_sae(proxy, sae, dataset, **options)
        assert torch.equal(
            ActivationsStore.from_sae(proxy, sae, dataset, **options).get_batch_tokens(n), inputs.rows
        )
        config = EvalConfig(
            batch_size_prompts=n, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, **part
        )
        metrics, features = run_evals(
            sae, store, proxy, ActivationScaler(), config, exclude_special_tokens=True
        )
        for group in metrics.values():
            theirs |= group

    raw, down = result["reconstruction"]["raw"], result["downstream"]
    ours = {
        "l0": result["sparsity"]["l0"], "l1": result["sparsity"]["l1"], "explained_variance": raw["r2"],
        "mse": raw["squared_error"], "cossim": raw["cosine"], "l2_ratio": raw["l2_ratio"],
        "relative_reconstruction_bias": raw["relative_reconstruction_bias"], "ce_loss_without_sae": down["ce"]["clean"],
        "ce_loss_with_sae": down["ce"]["spliced"], "ce_loss_with_ablation": down["ce"]["zero_ablated"],
        "ce_loss_score": down["ce_recovered"]["zero"], "kl_div_with_sae": down["kl"]["spliced"],
        "kl_div_with_ablation": down["kl"]["zero_ablated"], "kl_div_score": down["kl_recovered"]["zero"],
    }  # fmt: skip
    for name, found in ours.items():
        assert found["value"] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name
        assert found["se"] is None or found["se"] >= 0
    assert 0 < ours["l0"]["value"] < D_SAE
    found = evaluate_reconstruction(sae, inputs)
    assert_close(found.density, torch.tensor(features["feature_density"]).double(), atol=1e-4, rtol=0)
    dead = sum(d == 0 for d in features["feature_density"])
    assert result["features"]["n_dead"] == dead
    assert result["features"]["n_tokens"] == sum(t != EOS for row in rows[1::2] for t in row)


def test_scaled_space_is_that_of_the_paper():
    """In raw space a token of large norm decides everything, in scaled space it counts like the others."""
    sae = dictionary("standard", normalize_activations="constant_norm_rescale")
    data = SpikedDataModule(d_in=D_MODEL, n_features=32, k=3)
    inputs = SyntheticInputs(data, n_samples=64)
    inputs.x[0] *= 1000
    found = evaluate_reconstruction(sae, inputs).spaces
    x = inputs.x * (D_MODEL**0.5 / inputs.x.norm(dim=-1, keepdim=True))
    plain = dictionary("standard")  # the same weights, fed scaled tokens
    x_hat = plain(x)
    variance = lambda t: t.var(dim=0, correction=0).sum().item()  # noqa: E731
    assert found["scaled"]["explained_variance"]["value"] == pytest.approx(
        1 - variance(x - x_hat) / variance(x), abs=1e-4
    )
    assert found["scaled"]["mse"]["value"] == pytest.approx((x - x_hat).square().mean().item(), rel=1e-4)
    assert found["raw"]["mse"]["value"] > 100 * found["scaled"]["mse"]["value"]
    # norms are equal in scaled space, so are ratios per token in both
    for name in ("cosine", "l2_ratio"):
        assert found["raw"][name]["value"] == pytest.approx(found["scaled"][name]["value"], abs=1e-5)


@pytest.mark.parametrize("normalize_activations", ["none", "constant_norm_rescale", "layer_norm"])
def test_a_perfect_dictionary_costs_the_model_nothing_whatever_its_scaling(
    model_path: str, rows: list[list[int]], normalize_activations: str
):
    sae = identity_dictionary(normalize_activations)
    inputs = text_inputs(AutoModelForCausalLM.from_pretrained(model_path), rows)
    result = evaluate_dictionary(sae, inputs, n_downstream_rows=6)
    down = result["downstream"]
    assert down["n_rows"] == 6
    assert down["ce_increase"]["spliced"]["value"] == pytest.approx(0, abs=1e-4)
    assert down["kl"]["spliced"]["value"] == pytest.approx(0, abs=1e-5)
    assert down["ce_recovered"]["mean"]["value"] == pytest.approx(1, abs=1e-3)
    assert result["reconstruction"]["raw"]["explained_variance"]["value"] == pytest.approx(1, abs=1e-5)
    assert result["reconstruction"]["scaled"]["mse"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_dictionary_that_says_the_mean_recovers_nothing(model_path: str, rows: list[list[int]]):
    inputs = text_inputs(AutoModelForCausalLM.from_pretrained(model_path), rows)
    sae = identity_dictionary("none")
    mean = evaluate_reconstruction(sae, inputs).mean_activation
    kept = torch.cat([b.x[b.keep] for b in inputs])
    assert_close(mean, kept.mean(dim=0), atol=1e-5, rtol=1e-5)
    sae.W_dec.data.zero_()
    sae.b_dec.data.copy_(mean)
    down = evaluate_downstream(sae, inputs, mean, ablate="counted")
    assert down["ce_recovered"]["mean"]["value"] == pytest.approx(0, abs=1e-4)
    assert down["kl"]["spliced"]["value"] == pytest.approx(down["kl"]["mean_ablated"]["value"], rel=1e-4)
    # with every position ablated, special tokens too, the ablation is another one
    everywhere = evaluate_downstream(sae, inputs, mean, ablate="all")
    assert everywhere["kl"]["mean_ablated"]["value"] != pytest.approx(
        down["kl"]["mean_ablated"]["value"], rel=1e-4
    )


def test_standard_errors_shrink_with_the_number_of_rows(model_path: str):
    tokens = torch.randint(4, 64, (240, CONTEXT), generator=torch.Generator().manual_seed(3)).tolist()
    sae, lm = dictionary("standard"), AutoModelForCausalLM.from_pretrained(model_path)
    results = [evaluate_dictionary(sae, text_inputs(lm, tokens[:n])) for n in (30, 240)]
    for path in (("sparsity", "l0"), ("downstream", "ce", "spliced"), ("downstream", "ce_recovered", "zero")):
        few, many = results
        for key in path:
            few, many = few[key], many[key]
        assert 1.5 < few["se"] / many["se"] < 6, path  # sqrt(8) = 2.8
        assert abs(few["value"] - many["value"]) < 5 * few["se"], path


@pytest.mark.parametrize("architecture", sorted(a for a in SAE_CLASS_REGISTRY if "transcoder" not in a))
def test_every_architecture_of_saelens_is_evaluated(
    model_path: str, rows: list[list[int]], architecture: str, tmp_path: Path
):
    torch.manual_seed(0)
    fields = {"k": 4, "n_heads": 2, "sae_diff_type": "topk", "kval_topk": 4, "bottleneck_factor": 2}
    sae = SAE.from_dict(
        {"architecture": architecture, "d_in": D_MODEL, "d_sae": D_SAE, "metadata": {}, **fields}
    )
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.3)
    sae.save_model(tmp_path)
    result = evaluate_dictionary(
        load_dictionary(tmp_path),
        text_inputs(AutoModelForCausalLM.from_pretrained(model_path), rows),
        n_downstream_rows=3,
    )
    assert 0 < result["sparsity"]["l0"]["value"] <= D_SAE
    assert result["reconstruction"]["raw"]["mse"]["value"] > 0
    assert result["downstream"]["kl"]["spliced"]["value"] > 0
    write_result(result, tmp_path / "evaluation.json")  # no nan in it


def test_transcoders_are_refused(tmp_path: Path):
    fields = {"d_in": 4, "d_out": 4, "d_sae": 8, "apply_b_dec_to_input": False}
    SAE.from_dict({"architecture": "transcoder", **fields}).save_model(tmp_path)
    with pytest.raises(ValueError, match="is a transcoder: it predicts another activation"):
        load_dictionary(tmp_path)
