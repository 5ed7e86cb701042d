"""Feature absorption, on dictionaries of which it is known by construction what they absorb."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.evaluate import TextInputs, evaluate_dictionary
from aen_lightning.evaluate.absorption import absorbed_words, first_letter_absorption
from aen_lightning.evaluate.first_letters import MAX_WORDS, PREFIX, Word, first_letter_words, read_words
from tests.support.tiny_models import D_MODEL, tiny_model

N_LETTERS, N_WORDS = 4, 40
SPECIAL = 4  # coordinate of a property that words of every letter may have
HEIGHT = 4.0


def planted_words() -> tuple[torch.Tensor, list[Word]]:
    """Words a, b, c, d: coordinate 0 to 3 says the letter.

    The special property is on one of a letter's 32 training words, and on two of its eight tests, which are the
    5th, 10th, ... word.
    """
    words = [Word(n, letter) for n, letter in enumerate("abcd" * N_WORDS)]
    x = torch.zeros(len(words), 6)
    for n, word in enumerate(words):
        x[n, "abcd".index(word.letter)] = HEIGHT
        x[n, SPECIAL] = HEIGHT * (n // N_LETTERS in (0, 4, 9))
    return x, words


def planted_dictionary(*, absorbs: bool) -> SAE[Any]:
    """Features 0 to 3 are the letters, 4 is the special property, and 5, of special words of a, is both.

    Either feature 5 has taken special words of a from 0 and 4, or 0 and 4 fire on them, too, and 5 never does.
    Both reconstruct every word exactly.
    """
    W_enc, b_enc, W_dec = torch.zeros(6, 6), torch.zeros(6), torch.eye(6)
    W_enc[:5, :5] = torch.eye(5)
    W_dec[5] = torch.tensor([1.0, 0, 0, 0, 1.0, 0])
    b_enc[5] = -HEIGHT
    if absorbs:
        W_enc[SPECIAL, 0] = W_enc[0, SPECIAL] = -1.0
        W_enc[:, 5] = W_dec[5]
    sae = StandardSAE(StandardSAEConfig(d_in=6, d_sae=6, apply_b_dec_to_input=False))
    sae.load_state_dict({"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": torch.zeros(6)})
    x, _ = planted_words()
    torch.testing.assert_close(sae(x), x)
    return sae.requires_grad_(False)


def test_the_rate_is_that_which_was_planted() -> None:
    found = first_letter_absorption(planted_dictionary(absorbs=True), *planted_words())
    assert (found["n_words"], found["n_test"], found["accuracy_of_activations"]) == (160, 32, 1.0)
    a = found["letters"]["a"]
    assert (a["n_train"], a["n_test"], a["n_right"], a["main_features"]) == (32, 8, 8, [0])
    assert (a["silent"], a["full"], a["fraction"]) == (0.25, 0.25, 0.25)  # two of eight tests
    assert a["absorbing_features"] == [[5, 2]]
    assert a["f1"] == pytest.approx(2 * 6 / (6 + 8))  # feature 0 finds six of the eight, and nothing else
    for letter, main in zip("bcd", (1, 2, 3), strict=True):
        other = found["letters"][letter]
        assert other["main_features"] == [main]
        assert (other["silent"], other["full"], other["fraction"], other["f1"]) == (0, 0, 0, 1)
        assert other["absorbing_features"] == []
    assert (found["silent"], found["full"], found["fraction"]) == (0.0625, 0.0625, 0.0625)


def test_a_dictionary_that_absorbs_nothing_has_a_rate_of_0() -> None:
    found = first_letter_absorption(planted_dictionary(absorbs=False), *planted_words())
    assert (found["silent"], found["full"], found["fraction"], found["f1"]) == (0, 0, 0, 1)
    assert [v["main_features"] for v in found["letters"].values()] == [[0], [1], [2], [3]]


def test_a_letter_that_is_split_in_two_has_two_main_features_and_absorbs_nothing() -> None:
    x, words = planted_words()
    x[:, SPECIAL] = HEIGHT * torch.tensor([n // N_LETTERS % 2 == 0 for n in range(len(words))])
    found = first_letter_absorption(planted_dictionary(absorbs=True), x, words)
    a = found["letters"]["a"]
    assert sorted(a["main_features"]) == [0, 5]
    assert (a["silent"], a["full"], a["fraction"], a["f1"]) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("x", "full_by", "fraction"),
    [
        # the probe's direction is coordinate 0; feature 0 is main, feature 1 (cosine 0.8), feature 2 (0.02)
        ([5.0, 0.0, 0.0, 0.0], -1, 0.0),  # main alone
        ([0.0, 5.0, 0.0, 0.0], 1, 1.0),  # feature 1 alone gives 4 of 4
        ([2.0, 5.0, 0.0, 0.0], -1, 2 / 3),  # 4 of 6 beside main's 2
        ([5.0, 2.5, 0.0, 0.0], -1, 0.0),  # 2 of 7 is less than 0.4
        ([0.0, 0.0, 50.0, 0.0], -1, 0.0),  # 1 of 1, along a direction that is hardly the probe's
        ([0.0, 0.0, 0.0, 0.0], -1, 0.0),  # nothing there
    ],
)
def test_words_by_hand(x: list[float], full_by: int, fraction: float) -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=4, apply_b_dec_to_input=False))
    W_dec = torch.tensor(
        [[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0.02, 0, (1 - 0.02**2) ** 0.5, 0], [0, 0, 0, 1.0]]
    )
    acts = torch.tensor([x])
    # a bias a little below 0 keeps what is silent silent, however the inverse is rounded
    sae.load_state_dict(
        {"W_enc": W_dec.inverse(), "b_enc": torch.full((4,), -1e-3), "W_dec": W_dec, "b_dec": torch.zeros(4)}
    )
    found = absorbed_words(sae.requires_grad_(False), acts @ W_dec, torch.tensor([3.0, 0, 0, 0]), [0])
    assert found.by.tolist() == [full_by]
    assert found.fraction.tolist() == pytest.approx([fraction], abs=1e-3)
    assert found.silent.tolist() == [x[0] == 0]


def tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def spelled(letter: str, n: int) -> list[str]:
    return [f"{letter}{first}{second}" for first in "aeiou" for second in "bcdfghklmnprstvwxyz"][:n]


def test_words_are_tokens_that_begin_a_word_of_letters_alone() -> None:
    others = [
        "<unk>",
        "Ġapple",
        "Ġof",
        "Ġo'clock",
        "Ġx1y",
        "inner",
        "Ġélan",
        *(f"Ġ{w}" for w in spelled("q", 19)),
    ]
    wanted = [f"Ġ{w}" for w in ("Bird", *spelled("b", 30), *spelled("c", 20))]
    found = first_letter_words(tokenizer([*others, *wanted]))
    first = len(others)
    assert [word.token for word in found] == list(range(first, first + 51))
    assert [word.letter for word in found] == ["b"] * 31 + ["c"] * 20
    many = [f"{w}{v}" for w in spelled("d", 50) for v in "aeiou"]
    whole_words = first_letter_words(tokenizer(["<unk>", *spelled("b", 20), *many]))
    assert [word.token for word in whole_words] == list(range(1, 21 + MAX_WORDS))
    with pytest.raises(
        ValueError, match=r"needs at least 20 words for each of two first letters; .* b: 5, c: 20$"
    ):
        first_letter_words(tokenizer(["<unk>", *spelled("b", 5), *spelled("c", 20)]))


def test_absorption_is_a_section_of_the_result_and_reads_each_word_after_the_same_words() -> None:
    vocabulary = ["<unk>", *spelled("b", 31), *spelled("c", 32)]
    model = tiny_model("llama")
    data = TextActivationsDataModule(
        hook_name="blocks.1.hook_resid_post", model=model, tokenizer=tokenizer(vocabulary), context_size=16,
        dataset=Dataset.from_dict({"tokens": [[5 + i for i in range(16)]] * 4}), held_out_documents=4,
        train_batch_size_tokens=16,
    )  # fmt: skip
    inputs = TextInputs(data)
    words = first_letter_words(tokenizer(vocabulary))
    x = read_words(inputs, words)
    ids = torch.tensor([[*tokenizer(vocabulary)(PREFIX)["input_ids"], words[7].token]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(x[7], hidden[0, -1])
    sae = SAE.from_dict({"architecture": "standard", "d_in": D_MODEL, "d_sae": 24}).requires_grad_(False)
    result = evaluate_dictionary(sae, inputs, suites=("core", "absorption"))
    assert result["absorption"] == first_letter_absorption(sae, x, words)
    assert (result["absorption"]["n_words"], result["absorption"]["n_test"]) == (63, 12)
    assert evaluate_dictionary(sae, inputs)["absorption"] is None
