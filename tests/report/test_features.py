from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning.cli.inputs import EvaluationInputs
from aen_lightning.cli.opening import InputOpener
from aen_lightning.evaluate import ShardInputs, load_dictionary
from aen_lightning.report import feature_pages
from aen_lightning.report.activations import collect_activations
from aen_lightning.report.vocabulary import load_unembedding, token_texts
from aen_lightning.training.module import SweepModule
from tests.support.commands import report_command
from tests.support.report_pages import CONTEXT, D_SAE, HOOK
from tests.support.shard_sets import HOOK as SHARD_HOOK
from tests.support.shard_sets import write_set
from tests.support.tiny_models import D_MODEL, EOS, save_tiny_model, tiny_model, tiny_tokenizer


def reference(dictionary: Path, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes by the whole language model of transformers and SAELens's own encode, in float64.

    (rows, context, d_sae); and keep.
    """
    sae = SAE.load_from_disk(dictionary).double()
    lm = AutoModelForCausalLM.from_pretrained(sae.cfg.metadata.model_name, dtype=torch.float64)
    with torch.no_grad():
        hidden = lm(inputs.rows, output_hidden_states=True).hidden_states[2]  # embedding, block 0, block 1
        x = hidden * (D_MODEL**0.5 / hidden.norm(dim=-1, keepdim=True))
        codes = torch.relu(
            (x - sae.b_dec * (1.0 if sae.cfg.apply_b_dec_to_input else 0.0)) @ sae.W_enc + sae.b_enc
        )
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
    page = feature_pages(
        sae, activations, token_texts(tiny_tokenizer()), unembedding=head, feature_ids=range(D_SAE)
    )
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
        top = [c for c in feature["contexts"] if c["quantile"] is None]
        fired = (codes > 0).flatten(0, 1)
        both = (fired & fired[:, feature["id"], None]).sum(dim=0).double()
        either = (fired | fired[:, feature["id"], None]).sum(dim=0)
        jaccard = torch.where(torch.arange(D_SAE) == feature["id"], 0.0, both / either.clamp_min(1))
        wanted = jaccard.sort(descending=True).values[:5]
        assert [j for _, j in feature["together"]] == pytest.approx(wanted[wanted > 0].tolist(), abs=1e-4)
        assert all(jaccard[i] == pytest.approx(j, abs=1e-4) for i, j in feature["together"])
        expected_counts = torch.histc(h[h > 0], 24, 0, float(h.max())).long().tolist()
        assert sum(feature["acts"]["counts"]) == sum(expected_counts) == int((h > 0).sum())
        assert feature["acts"]["counts"][-1] >= 1
        assert (feature["acts"]["from"], feature["acts"]["to"]) == (
            0,
            pytest.approx(float(h.max()), rel=1e-3),
        )
        row_of_logits = logits[feature["id"]]
        assert sum(feature["logits"]["counts"]) == len(row_of_logits)
        ends = (feature["logits"]["from"], feature["logits"]["to"])
        assert ends == pytest.approx((float(row_of_logits.min()), float(row_of_logits.max())), rel=1e-3)
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


def test_contexts_are_sampled_by_strength_and_texts_come_once(dictionary: Path):
    sae, inputs = opened(dictionary)
    inputs.rows[3] = inputs.rows[7]  # boilerplate
    page = feature_pages(
        sae, collect_activations(sae, inputs), token_texts(tiny_tokenizer()), n_features=D_SAE, n_contexts=1
    )
    frequent = page["features"][-1]
    texts = ["".join(c["tokens"]) for c in frequent["contexts"]]
    assert len(set(texts)) == len(texts) == 9
    strengths = {
        q: [c["acts"][c["peak"]] for c in frequent["contexts"] if c["quantile"] == q]
        for q in (None, 0.9, 0.75, 0.5, 0.25)
    }
    assert [len(values) for values in strengths.values()] == [1, 2, 2, 2, 2]
    means = [sum(values) / len(values) for values in strengths.values()]
    assert means == sorted(means, reverse=True)
    counts = [f["density"] for f in page["features"]]
    assert counts == sorted(counts)
    assert all(counts)
    every = feature_pages(sae, collect_activations(sae, inputs), str, n_features=0)
    assert sorted(f["id"] for f in every["features"]) == list(range(D_SAE))
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


def test_the_command_says_whose_features_it_needs(
    sweep: tuple[Path, SweepModule], dictionary: Path, tmp_path: Path
):
    out = str(tmp_path / "r.html")
    for wanted in (["--features"], ["--feature_ids", "3"]):
        with pytest.raises(
            ValueError, match=r"5 dictionaries: say whose features, by --features_of 'AEN λ₁=0.0025'"
        ):
            report_command([str(sweep[0]), *wanted, "-o", out])
    with pytest.raises(ValueError, match="no dictionary 'nobody' in the report"):
        report_command([str(sweep[0]), "--features_of", "nobody", "-o", out])
    with pytest.raises(ValueError, match="synthetic data has neither"):
        report_command([str(sweep[0]), "--features_of", "TopK k=2", "-o", out])
    with pytest.raises(FileNotFoundError, match="no browser 'nonesuch'"):
        report_command([str(dictionary), "--png", str(tmp_path), "--browser", "nonesuch", "-o", out])
