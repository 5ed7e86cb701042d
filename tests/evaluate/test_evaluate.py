"""Evaluation.

Formulas by hand, agreement with SAELens's `run_evals` on the same tokens, splicing, inputs, the command.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, run_evals
from sae_lens.evals import EvalConfig
from sae_lens.load_model import load_model
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning import SAEModule
from aen_lightning.callbacks import EvaluateDictionaries
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.evaluate import (
    Inputs,
    ShardInputs,
    SyntheticInputs,
    TextInputs,
    evaluate_dictionary,
    evaluate_downstream,
    evaluate_reconstruction,
    load_dictionary,
    replaced_activation,
    saebench_dictionary,
)
from aen_lightning.evaluate.results import number, short_names, table, write_result
from aen_lightning.language_model.hook_points import resolve_hook
from aen_lightning.metrics import (
    L1,
    MSE,
    R2,
    Cosine,
    ExplainedVariance,
    FeatureUse,
    L2Ratio,
    RelativeReconstructionBias,
    SquaredError,
    density_histogram,
    jackknife,
    jackknife_metric,
    utilisation,
)
from tests.support.commands import evaluate_command
from tests.support.shard_sets import HOOK as SHARD_HOOK
from tests.support.shard_sets import write_set
from tests.support.tiny_models import D_MODEL, EOS, save_tiny_model, tiny_model, tiny_tokenizer

HOOK = "blocks.1.hook_resid_post"
HF_HOOK = "model.layers.1"
CONTEXT = 16
D_SAE = 40


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    """24 rows of token ids, with an EOS somewhere in most."""
    tokens = torch.randint(4, 64, (24, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[torch.arange(20), torch.arange(20) % CONTEXT] = EOS
    return tokens.tolist()


def text_inputs(model: Any, rows: list[list[int]], **options: Any) -> TextInputs:
    data = TextActivationsDataModule(
        hook_name=options.pop("hook_name", HOOK), model=model, tokenizer=tiny_tokenizer(), context_size=CONTEXT,
        dataset=Dataset.from_dict({"tokens": rows}), held_out_documents=len(rows), train_batch_size_tokens=16, **options,
    )  # fmt: skip
    return TextInputs(data, lm=model, batch_size_prompts=5)


def dictionary(architecture: str, *, normalize_activations: str = "none", seed: int = 0) -> SAE[Any]:
    fields: dict[str, Any] = {"k": 6} if architecture == "topk" else {}
    sae = SAE.from_dict(
        {
            "architecture": architecture, "d_in": D_MODEL, "d_sae": D_SAE, "normalize_activations": normalize_activations,
            "metadata": {"hook_name": HF_HOOK, "model_name": "tiny", "prepend_bos": False}, **fields,
        }
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if name == "W_dec" else 0.1)
    sae.W_enc.data = 2 * sae.W_dec.data.T.contiguous()
    if architecture == "jumprelu":
        sae.threshold.data = torch.full((D_SAE,), 0.3)
    return sae.requires_grad_(False)


def identity_dictionary(normalize_activations: str) -> SAE[Any]:
    """Reconstructs anything: a feature for each coordinate and sign."""
    sae = SAE.from_dict(
        {
            "architecture": "standard",
            "d_in": D_MODEL,
            "d_sae": 2 * D_MODEL,
            "normalize_activations": normalize_activations,
        }
    )
    eye = torch.eye(D_MODEL)
    W_dec = torch.cat([eye, -eye])
    sae.load_state_dict(
        {"W_dec": W_dec, "W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(len(W_dec)), "b_dec": 0 * eye[0]}
    )
    return sae.requires_grad_(False)


# --- formulas by hand -------------------------------------------------------------------------------------
def test_metrics_by_hand():
    x, x_hat = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    expected = {
        Cosine(): (3 / 5 + 1) / 2,
        L2Ratio(): (3 / 5 + 1 / 2) / 2,
        SquaredError(): (16 + 1) / 2,
        RelativeReconstructionBias(): (9 + 1) / (9 + 2),
        # variances of x: (1.5^2 + 1^2) summed over dimensions; squared error 8.5
        R2(2): 1 - 8.5 / (2.25 + 1),
    }
    for metric, value in expected.items():
        metric.update(x[:1], x_hat[:1])
        metric.update(x[1:], x_hat[1:])
        assert metric.compute().item() == pytest.approx(value), type(metric).__name__
    l1 = L1()
    l1.update(torch.tensor([[1.0, 0.0, 2.0], [0.0, -3.0, 0.0]]))
    assert l1.compute().item() == 3


def test_feature_use_counts_firings_and_strength():
    use = FeatureUse(3)
    use.update(torch.tensor([[1.0, 0.0, 0.0], [3.0, 1e-13, 0.0]]))
    use.update(torch.tensor([[[0.0, 0.0, -4.0]]]))
    found = use.compute()
    assert_close(found["density"], torch.tensor([2 / 3, 0, 1 / 3], dtype=torch.float64))
    assert_close(found["mean_when_active"][[0, 2]], torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_utilisation_by_hand():
    even = utilisation(torch.full((200,), 0.3))
    assert even["gini"] == pytest.approx(0, abs=1e-12)
    assert even["normalized_entropy"] == pytest.approx(1)
    assert (even["top_1pct_mass"], even["top_10pct_mass"]) == (pytest.approx(0.01), pytest.approx(0.1))
    one = torch.zeros(200)
    one[7] = 0.5
    alone = utilisation(one)
    assert alone["gini"] == pytest.approx(1 - 1 / 200)
    assert alone["normalized_entropy"] == pytest.approx(0, abs=1e-12)
    assert alone["top_1pct_mass"] == 1
    # rates 1 and 3: mean absolute difference 1 over all ordered pairs, over twice the mean of 2; entropy of
    # (1/4, 3/4) over log 2
    two = utilisation(torch.tensor([3.0, 1.0]))
    assert two["gini"] == pytest.approx(0.25)
    assert two["normalized_entropy"] == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))
    assert all(math.isnan(v) for v in utilisation(torch.zeros(4)).values())


def test_density_histogram_puts_every_feature_somewhere():
    found = density_histogram(torch.tensor([0.0, 1.0, 0.011, 0.0099, 1e-9]))
    assert found["n_never"] == 1
    assert sum(found["counts"]) == 4
    assert (found["counts"][0], found["counts"][-1]) == (1, 1)
    edges = found["log10_edges"]
    assert (edges[0], edges[-1], len(edges)) == (-7, 0, len(found["counts"]) + 1)
    assert found["counts"][edges.index(-2)] == 1
    assert found["counts"][edges.index(-2) - 1] == 1


def test_jackknife_of_a_mean_is_the_textbook_standard_error():
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = torch.stack([values, torch.ones(50, dtype=torch.float64)], dim=1)
    mean, se = jackknife(sums, lambda s: s[0] / s[1])
    assert_close(mean, values.mean())
    assert_close(se, values.std() / 50**0.5)
    assert jackknife(sums[:1], lambda s: s[0])[1].isnan()


def test_jackknife_of_metrics_pools_groups_and_estimates_their_spread():
    torch.manual_seed(0)
    groups, x, x_hat = [], torch.randn(40, 8, 3), torch.randn(40, 8, 3)
    for a, b in zip(x, x_hat, strict=True):
        metric = MSE()
        metric.update(a, b)
        groups.append(metric)
    found = jackknife_metric(groups)
    assert found["value"] == pytest.approx((x - x_hat).square().mean().item(), rel=1e-6)
    per_group = (x - x_hat).square().mean(dim=(1, 2))
    assert found["se"] == pytest.approx((per_group.std() / 40**0.5).item(), rel=1e-3)
    variance = ExplainedVariance(3)
    variance.update(x[0], x_hat[0])
    assert jackknife_metric([variance])["se"] is None
    assert jackknife_metric([MSE(), groups[0]])["value"] == pytest.approx(groups[0].compute().item())


# --- the whole of it against SAELens ----------------------------------------------------------------------
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


# --- splicing ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "opt"])
@pytest.mark.parametrize(
    "kind",
    ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post"],
)
def test_splicing_its_own_activation_changes_nothing_and_another_one_does(family: str, kind: str):
    lm = tiny_model(family)
    hook = resolve_hook(lm.config, f"blocks.2.{kind}")
    tokens = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    clean = lm(input_ids=tokens).logits
    seen: list[Tensor] = []

    def same(x: Tensor) -> Tensor:
        seen.append(x)
        return x.clone()

    with replaced_activation(lm, hook, same, tokens.shape):
        assert_close(lm(input_ids=tokens).logits, clean)
    assert [tuple(x.shape) for x in seen] == [(2, 7, hook.d_in)]
    with replaced_activation(lm, hook, lambda x: 2 * x.flip(-1), tokens.shape):
        assert (lm(input_ids=tokens).logits - clean).abs().max() > 1e-3
    assert_close(lm(input_ids=tokens).logits, clean)  # nothing is left behind


def test_zeroed_heads_are_a_zeroed_attention_output():
    """Two hooks that must agree.

    Without a bias, no input to the output projection is no output of attention.
    """
    lm, tokens = tiny_model("llama"), torch.randint(4, 64, (2, 7))
    logits = []
    for kind in ("attn.hook_z", "hook_attn_out"):
        with replaced_activation(
            lm, resolve_hook(lm.config, f"blocks.1.{kind}"), torch.zeros_like, tokens.shape
        ):
            logits.append(lm(input_ids=tokens).logits)
    assert_close(*logits)


def test_a_hook_beside_the_stream_is_refused():
    lm = tiny_model("llama")
    hook = resolve_hook(lm.config, "blocks.1.hook_resid_mid")
    splice = replaced_activation(lm, hook, torch.zeros_like, torch.Size((1, 1)))
    with pytest.raises(ValueError, match=r"cannot splice at 'blocks\.1\.hook_resid_mid'"):
        splice.__enter__()


# --- inputs -----------------------------------------------------------------------------------------------
def test_text_inputs_are_the_test_batches_of_training(model_path: str, rows: list[list[int]]):
    """The same activations, in the same order, that `aen test` sees; norm outliers left out alike."""
    lm = AutoModelForCausalLM.from_pretrained(model_path)
    inputs = text_inputs(lm, rows, norm_outlier_multiple=1.2, store_batch_size_prompts=5)
    kept = torch.cat([b.x[b.keep] for b in inputs])
    expected = torch.cat(list(inputs.data.test_dataloader()))
    assert_close(kept, expected)
    assert len(kept) < sum(t != EOS for row in rows[1::2] for t in row)
    assert inputs.describe()["excluded_token_ids"] == [0, 1, 2]
    assert_close(inputs.tokens(7), expected[:7])


def test_inputs_do_not_depend_on_how_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, model_path: str, rows: list[list[int]]
):
    sae = dictionary("standard")
    inputs = text_inputs(AutoModelForCausalLM.from_pretrained(model_path), rows)
    whole = evaluate_reconstruction(sae, inputs)
    monkeypatch.setattr("aen_lightning.evaluate.reconstruction.tokens_per_chunk", lambda _: 1)
    inputs.batch_size_prompts = 2
    parts = evaluate_reconstruction(sae, inputs)
    for a, b in ((whole.sparsity, parts.sparsity), (whole.spaces["scaled"], parts.spaces["scaled"])):
        for name in a:
            assert a[name]["value"] == pytest.approx(b[name]["value"], rel=1e-5)
            assert a[name]["se"] == pytest.approx(b[name]["se"], rel=1e-3)
    assert_close(whole.density, parts.density)


def test_shard_inputs_take_the_end_of_the_set_and_leave_tokens_out(tmp_path: Path):
    path, x, ids = shard_set(tmp_path)
    inputs = ShardInputs(str(path), SHARD_HOOK, held_out_fraction=0.5, tokens_per_unit=8)
    kept = torch.cat([b.x[b.keep] for b in inputs])
    assert_close(kept, x[len(x) - len(x) // 2 :])
    assert inputs.n_units == -(-(len(x) // 2) // 8)
    everything = ShardInputs(str(path), SHARD_HOOK, held_out_fraction=1.0, exclude_token_ids=[int(ids[3])])
    kept = torch.cat([b.x[b.keep] for b in everything])
    assert_close(kept, x[ids != ids[3]])
    with pytest.raises(ValueError, match=r"has no activations of 'blocks\.9"):
        ShardInputs(str(path), "blocks.9.hook_resid_post")
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        ShardInputs(str(path), SHARD_HOOK, held_out_fraction=0)


def shard_set(folder: Path) -> tuple[Path, Tensor, Tensor]:
    path = folder / "shards"
    expected, ids = write_set(path, [20, 17])
    return path, expected[SHARD_HOOK], ids


def test_a_dictionary_that_never_fires_has_a_result_too(tmp_path: Path):
    sae = dictionary("standard")
    sae.b_enc.data.fill_(-1e6)
    result = evaluate_dictionary(
        sae, SyntheticInputs(SpikedDataModule(d_in=D_MODEL, n_features=32, k=3), n_samples=64)
    )
    assert result["features"]["dead_pct"] == 100
    assert result["features"]["gini"] is None
    assert result["sparsity"]["l0"]["value"] == 0
    write_result(result, tmp_path / "evaluation.json")


def test_nothing_left_to_evaluate_is_said():
    class Nothing(Inputs):
        n_units, d_in = 1, D_MODEL

        def __iter__(self):
            from aen_lightning.evaluate import InputBatch

            yield InputBatch(torch.ones(1, 3, D_MODEL), torch.zeros(1, 3, dtype=torch.bool), 0)

        def describe(self) -> dict[str, Any]:
            return {}

    with pytest.raises(ValueError, match="no token is left"):
        evaluate_reconstruction(dictionary("standard"), Nothing())


# --- through Lightning ------------------------------------------------------------------------------------
def lightning_test(
    data: pl.LightningDataModule, tmp_path: Path, sae: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EvaluateDictionaries(output_dir=str(tmp_path / "out"))],
    )  # fmt: skip
    logged = trainer.test(SAEModule(sae=sae), datamodule=data, verbose=False)[0]
    return json.loads((tmp_path / "out" / "evaluation.json").read_text()), logged


def test_the_callback_evaluates_at_the_end_of_a_test(model_path: str, rows: list[list[int]], tmp_path: Path):
    lm = AutoModelForCausalLM.from_pretrained(model_path)
    data = text_inputs(lm, rows, input_scaling="per_token").data
    result, logged = lightning_test(data, tmp_path, {"architecture": "aen", "d_in": D_MODEL, "d_sae": D_SAE})
    assert result["dictionary"]["normalize_activations"] == "constant_norm_rescale"
    # the module measures in the space it trains in, before export; the evaluation after it: the same numbers
    scaled = result["reconstruction"]["scaled"]
    for name in ("explained_variance", "mse", "shrinkage_ratio"):
        assert scaled[name]["value"] == pytest.approx(logged[f"test/metrics/{name}"], rel=1e-4)
    assert result["sparsity"]["l0"]["value"] == pytest.approx(logged["test/metrics/l0"], rel=1e-5)
    assert result["features"]["dead_pct"] == pytest.approx(logged["test/metrics/dead_features_pct"], abs=1e-4)
    assert logged["test/downstream/kl"] == pytest.approx(result["downstream"]["kl"]["spliced"]["value"])


def test_the_callback_on_synthetic_data_and_on_data_it_does_not_know(tmp_path: Path):
    data = SpikedDataModule(d_in=8, n_features=16, k=2, n_eval_samples=64)
    result, logged = lightning_test(data, tmp_path, {"architecture": "topk", "d_in": 8, "d_sae": 16, "k": 2})
    assert logged["test/ground_truth/matched_cosine"] == pytest.approx(
        result["ground_truth"]["matched_cosine"]
    )
    with pytest.raises(TypeError, match="got NoneType"):
        EvaluateDictionaries()._inputs(None, "cpu")
    with pytest.raises(ValueError, match="n_rows must be at least 1"):
        EvaluateDictionaries(n_rows=0)


# --- loading and the command ------------------------------------------------------------------------------
def test_load_dictionary_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with cfg\.json"):
        load_dictionary(tmp_path / "nowhere")
    dictionary("standard").save_model(tmp_path / "run" / "sae")
    with pytest.raises(FileNotFoundError, match=r"no cfg.json\); give one of .*sae"):
        load_dictionary(tmp_path / "run")
    cfg = json.loads((tmp_path / "run" / "sae" / "cfg.json").read_text())
    for change, message in (
        ({"architecture": "nonesuch"}, "holds no dictionary for inference"),
        ({"normalize_activations": "expected_average_only_in"}, "no scale came with it"),
        ({"architecture": "jumprelu"}, "holds no dictionary for inference"),
    ):
        (tmp_path / "run" / "sae" / "cfg.json").write_text(json.dumps(cfg | change))
        with pytest.raises(ValueError, match=message):
            load_dictionary(tmp_path / "run" / "sae")


def test_an_average_scale_left_by_saelens_is_folded_in(tmp_path: Path):
    sae = dictionary("standard")
    x = torch.randn(5, D_MODEL)
    expected = sae(4.0 * x) / 4.0
    sae.cfg.normalize_activations = "expected_average_only_in"
    sae.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 4.0}))
    assert_close(load_dictionary(tmp_path)(x), expected)


def save_for_command(model_path: str, folder: Path, rows: list[list[int]], **metadata: Any) -> Path:
    sae = dictionary("standard", normalize_activations="constant_norm_rescale")
    Dataset.from_dict({"tokens": rows}).to_parquet(folder / "rows.parquet")
    values = {
        "hook_name": HOOK, "model_name": model_path, "model_class_name": "AutoModelForCausalLM", "context_size": CONTEXT,
        "dataset_path": str(folder / "rows.parquet"), "exclude_special_tokens": True, **metadata,
    }  # fmt: skip
    for key, value in values.items():
        sae.cfg.metadata[key] = value
    sae.save_model(folder / "sae")
    return folder / "sae"


def test_evaluate_command_needs_nothing_but_the_folder(
    model_path: str, rows: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = save_for_command(model_path, tmp_path, rows)
    assert evaluate_command([str(folder), "--held-out-documents", "24"]) == 0
    result = json.loads((folder / "evaluation.json").read_text())
    lm = AutoModelForCausalLM.from_pretrained(model_path)
    expected = evaluate_dictionary(load_dictionary(folder), text_inputs(lm, rows), reference=folder)
    for section in ("sparsity", "reconstruction", "downstream"):
        assert json.dumps(result[section]) == json.dumps(expected[section])
    assert result["data"]["n_tokens"] == sum(t != EOS for row in rows[1::2] for t in row)
    text = capsys.readouterr().out
    assert "CE recovered, mean ablation" in text
    assert "matched cosine" not in text

    out = tmp_path / "out.json"
    args = [
        str(folder),
        "--held-out-documents",
        "24",
        "--no-downstream",
        "--per-feature",
        "--out",
        str(out),
        "--split",
        "validation",
    ]
    assert evaluate_command(args) == 0
    result = json.loads(out.read_text())
    assert result["downstream"] is None
    assert len(result["features"]["density"]) == D_SAE
    assert result["data"]["n_tokens"] == sum(t != EOS for row in rows[0::2] for t in row)


def test_evaluate_command_on_shards_and_on_synthetic_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, x, _ = shard_set(tmp_path)
    sae = SAE.from_dict(
        {"architecture": "standard", "d_in": x.shape[1], "d_sae": 24, "metadata": {"hook_name": SHARD_HOOK}}
    )
    sae.save_model(tmp_path / "a")
    assert evaluate_command([str(tmp_path / "a"), "--shards", str(path), "--held-out-fraction", "1"]) == 0
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["data"]["kind"] == "shards"

    data = SpikedDataModule(d_in=D_MODEL, n_features=32, k=3, seed=1)
    perfect = SAE.from_dict(
        {"architecture": "standard", "d_in": D_MODEL, "d_sae": 32, "metadata": data.sae_metadata}
    )
    perfect.W_dec.data.copy_(data.feature_vectors)
    perfect.save_model(tmp_path / "b")
    assert evaluate_command([str(tmp_path / "b"), "--n-tokens", "512"]) == 0
    result = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert result["ground_truth"]["matched_cosine"] == pytest.approx(1, abs=1e-6)
    assert result["ground_truth"]["support"]["true_l0"] == 3
    assert "matched cosine" in capsys.readouterr().out


def test_evaluate_command_refuses_what_does_not_fit(model_path: str, rows: list[list[int]], tmp_path: Path):
    folder = save_for_command(model_path, tmp_path, rows)
    with pytest.raises(ValueError, match="--out takes one dictionary"):
        evaluate_command([str(folder), str(folder), "--out", "x.json"])
    with pytest.raises(ValueError, match=r"the dictionary has d_in=16, but the inputs are 24 wide"):
        evaluate_command(
            [
                str(folder),
                "--held-out-documents",
                "24",
                "--no-downstream",
                "--hook-name",
                "blocks.1.mlp.hook_post",
            ]
        )
    dictionary("standard").save_model(tmp_path / "bare")
    with pytest.raises(ValueError, match="give --dataset_path"):
        evaluate_command([str(tmp_path / "bare")])
    with pytest.raises(ValueError, match="metadata has no synthetic_data"):
        evaluate_command([str(folder), "--synthetic"])


def test_saebench_gets_unit_atoms_the_same_outputs_and_the_names_it_reads(
    model_path: str, rows: list[list[int]], tmp_path: Path
):
    folder = save_for_command(model_path, tmp_path, rows)
    name, sae = saebench_dictionary(folder)
    assert name == "sae"
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    x = torch.randn(6, D_MODEL)
    assert_close(sae(x), load_dictionary(folder)(x), atol=1e-5, rtol=1e-5)
    # what SAEBench's loader does with a SAELens 6 dictionary: fields of the metadata become attributes of cfg
    for field in ("hook_name", "model_name", "context_size", "exclude_special_tokens"):
        setattr(sae.cfg, field, getattr(sae.cfg.metadata, field))
        assert getattr(sae.cfg, field) is not None
    assert sae.cfg.d_sae == D_SAE
    assert (sae.dtype, sae.device.type) == (torch.float32, "cpu")
    folder = save_for_command(model_path, tmp_path, rows, hook_name=HF_HOOK)
    with pytest.raises(ValueError, match="needs a TransformerLens hook_name"):
        saebench_dictionary(folder)


def test_results_are_written_whole_and_read_well(tmp_path: Path):
    path = write_result({"a": 1.5, "b": None}, tmp_path / "deep" / "x.json")
    assert json.loads(path.read_text()) == {"a": 1.5, "b": None}
    with pytest.raises(ValueError, match="which JSON has not"):
        write_result({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1.5, "b": None}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert number(0.123456, 0.00123) == "0.1235 ± 0.0012"
    assert number(None) == "-"
    assert table([["a", "1"], ["head"], ["bb", "22"]]) == "a    1\n\nhead\nbb  22"
    assert short_names(["x/run1/sae", "x/run2/sae"]) == ["run1/sae", "run2/sae"]
    assert short_names(["a", "a"]) == ["1: a", "2: a"]
