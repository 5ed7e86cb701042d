"""Description length and sparse probing, against numbers worked out by hand and an independent optimum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.optimize
import torch
from datasets import Dataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.evaluate import SyntheticInputs, TextInputs, evaluate_dictionary
from aen_lightning.evaluate.inputs import InputBatch, Inputs
from aen_lightning.evaluate.mdl import description_length
from aen_lightning.evaluate.probing import fit_logistic, sparse_probing
from aen_lightning.evaluate.probing_texts import TASKS, Task
from tests.support.tiny_models import D_MODEL, tiny_model, tiny_tokenizer


class Given(Inputs):
    """Activations given one by one."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.n_units, self.d_in = x, len(x), x.shape[1]

    def __iter__(self) -> Any:
        yield InputBatch(self.x.unsqueeze(1), torch.ones(len(self.x), 1, dtype=torch.bool), 0)

    def describe(self) -> dict[str, Any]:
        return {"kind": "given"}


def identity(d: int) -> SAE[Any]:
    """Feature j is coordinate j, where positive."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=d, apply_b_dec_to_input=False))
    with torch.no_grad():
        for W in (sae.W_enc, sae.W_dec):
            W.copy_(torch.eye(d))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.requires_grad_(False)


def test_description_length_by_hand() -> None:
    # feature 0: 0, 0, 1, 4; feature 1: always 2; feature 2: never
    x = torch.tensor([[0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [1.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
    found = description_length(identity(3), Given(x), levels=(1, 2, 8), tolerance=0.5)
    # with one level feature 0 is 0 or active, half of the time each; with more its two values are told apart
    assert found["bits_per_token"] == pytest.approx([1.0, 1.5, 1.5])
    # levels stand for their middle: of one level 2 for 1 and 4, and 1 for 2; of two 1 and 3, and 1.5; of eight
    # 0.75 and 3.75, and 1.875
    expected = [1 + 4 + 4 * 1, 0 + 1 + 4 * 0.25, 2 * 0.0625 + 4 * 0.015625]
    assert found["mse"] == pytest.approx([e / 12 for e in expected])
    assert found["mse_unrounded"] == 0
    assert found["chosen"] is None  # no rounding keeps an error of nothing
    assert found["n_tokens"] == 4


def test_the_fewest_levels_that_are_good_enough_are_chosen() -> None:
    data = SpikedDataModule(d_in=16, n_features=32, k=3)
    sae = SAE.from_dict(
        {"architecture": "standard", "d_in": 16, "d_sae": 32, "apply_b_dec_to_input": False}
    ).requires_grad_(False)
    found = description_length(sae, SyntheticInputs(data, n_samples=512))
    chosen = found["levels"].index(found["chosen"]["levels"])
    limit = 1.01 * found["mse_unrounded"]
    assert found["mse"][chosen] <= limit
    assert all(mse > limit for mse in found["mse"][:chosen])
    assert found["bits_per_token"] == sorted(found["bits_per_token"])
    assert found["bits_per_token"][-1] <= 32 * math.log2(257)


def test_the_probe_is_the_optimum_of_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 20.0, 0.1]) + 5
    y = (x[:, 0] + torch.randn(40, generator=generator, dtype=torch.float64) > 5).double()
    z = ((x - x.mean(dim=0)) / x.std(dim=0, correction=0)).numpy()

    def loss(w: Any) -> float:
        t = torch.from_numpy(z @ w[:3] + w[3])
        return float(torch.nn.functional.binary_cross_entropy_with_logits(t, y)) + 0.005 * float(
            w[:3] @ w[:3]
        )

    best = scipy.optimize.minimize(
        loss, [0.0] * 4, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 5000}
    )
    found = fit_logistic(x, y)
    torch.testing.assert_close(
        x @ found[:3] + found[3], torch.from_numpy(z @ best.x[:3] + best.x[3]), rtol=1e-3, atol=1e-4
    )


def text_inputs() -> TextInputs:
    rows = torch.randint(4, 64, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    data = TextActivationsDataModule(
        hook_name="blocks.1.hook_resid_post", model=tiny_model("llama"), tokenizer=tiny_tokenizer(), context_size=16,
        dataset=Dataset.from_dict({"tokens": rows}), held_out_documents=4, train_batch_size_tokens=16,
    )  # fmt: skip
    return TextInputs(data)


def test_probing_finds_the_feature_that_tells_texts_apart() -> None:
    inputs = text_inputs()
    kinds = [[f"w4 w{word} w{i}" for i in range(20, 40)] for word in (10, 50)]
    task = Task((kinds[0][:14], kinds[1][:14]), (kinds[0][14:], kinds[1][14:]))

    def direction() -> torch.Tensor:
        means = []
        for kind in kinds:
            tokens = torch.tensor([tiny_tokenizer()(text)["input_ids"] for text in kind[:14]])
            x = inputs.data.language_model.activations(tokens)["blocks.1.hook_resid_post"]
            means.append(x[:, 1:].mean(dim=(0, 1)))
        return means[1] - means[0]

    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=8, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        W = 0.01 * torch.randn(D_MODEL, 8, generator=generator)
        W[:, 5] = direction()  # feature 5 is the difference, and no other is
        sae.W_enc.copy_(W)
        sae.b_enc.fill_(1.0)
    found = sparse_probing(sae.requires_grad_(False), inputs, tasks={"which": task}, sizes=(1, 2))
    (result,) = found["tasks"].values()
    assert result["features"][0] == 5
    assert (result["n_train"], result["n_test"]) == (28, 12)
    assert result["accuracy"][0] >= 0.9
    assert result["accuracy_of_activations"] >= 0.9
    assert found["accuracy"] == result["accuracy"]
    backwards = Task(task.train, (task.test[1], task.test[0]))
    assert sparse_probing(sae, inputs, tasks={"": backwards}, sizes=(1,))["accuracy"] == pytest.approx(
        [1 - result["accuracy"][0]]
    )


def test_our_texts_are_labelled_evenly_and_tested_on_other_words() -> None:
    for name, task in TASKS.items():
        for split in task:
            assert len(split[0]) == len(split[1]) >= 12, name
        train, test = ({text for kind in split for text in kind} for split in task)
        assert not train & test
        assert len(train) + len(test) == sum(len(kind) for split in task for kind in split)


def test_suites_are_sections_of_the_result_and_need_what_they_need() -> None:
    inputs, sae = text_inputs(), identity(D_MODEL)
    result = evaluate_dictionary(sae, inputs, suites=("core", "mdl", "probing"))
    assert result["mdl"]["n_tokens"] == inputs.rows.numel() == 32
    assert result["probing"]["tasks"].keys() == TASKS.keys()
    plain = evaluate_dictionary(sae, inputs)
    assert (plain["mdl"], plain["probing"]) == (None, None)
    with pytest.raises(ValueError, match="needs a language model"):
        evaluate_dictionary(sae, Given(torch.randn(4, D_MODEL)), suites=("probing",))
    with pytest.raises(ValueError, match="no suite 'prob'"):
        evaluate_dictionary(sae, inputs, suites=("prob",))
