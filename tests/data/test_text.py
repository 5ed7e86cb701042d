"""Live activations of tiny random models: which tokens are read, in which order, and what becomes of them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from aen_lightning.data.text import TextActivationsDataModule
from tests.support.text import documents, packed_by_hand
from tests.support.tiny_models import D_MODEL, EOS, PAD, save_tiny_model, tiny_model, tiny_tokenizer

HOOK = "blocks.1.hook_resid_post"
pytestmark = pytest.mark.filterwarnings("ignore:the dataset is exhausted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(
            json.dumps({"text": document, "id": i}) + "\n" for i, document in enumerate(documents(120))
        )
    return str(path)


def make(folder: str, text_file: str, **options: Any) -> TextActivationsDataModule:
    defaults: dict[str, Any] = {
        "hook_name": HOOK, "dataset_path": text_file, "context_size": 16, "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 32, "buffer_size_tokens": 128, "held_out_documents": 20, "seed": 3,
    }  # fmt: skip
    datamodule = TextActivationsDataModule(model_name=folder, **{**defaults, **options})
    datamodule.setup()
    return datamodule


def take(datamodule: TextActivationsDataModule, n: int) -> list[Any]:
    return list(islice(iter(datamodule.train_dataloader()), n))


# --- what a batch holds -------------------------------------------------------------------------------------


def test_unshuffled_batches_are_the_whole_models_hidden_states_without_special_tokens(
    folder: str, text_file: str
):
    datamodule = make(
        folder, text_file, held_out_documents=0, shuffle_documents=False, activations_mixing_fraction=0.0,
        buffer_size_tokens=32,
    )  # fmt: skip
    assert datamodule.d_in == D_MODEL
    batches = take(datamodule, 8)
    rows = list(islice(packed_by_hand(documents(120), 16), 20))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = []
    for call in (torch.stack(rows[i : i + 4]) for i in range(0, 20, 4)):
        with torch.no_grad():
            hidden = whole(call, output_hidden_states=True, use_cache=False).hidden_states[2]
        expected.append(hidden[call != EOS])
    assert torch.equal(torch.cat(batches), torch.cat(expected)[: 8 * 32])
    assert all(b.dtype == torch.float32 and b.shape == (32, D_MODEL) for b in batches)
    n_seen = datamodule.token_counts["seen"]
    n_special = sum(int((row == EOS).sum()) for row in rows[: n_seen // 16])
    assert n_special > 0
    assert datamodule.token_counts == {
        "seen": n_seen, "dropped_special": n_special, "dropped_outliers": 0, "trained_on": 8 * 32,
    }  # fmt: skip


def test_excluded_tokens_are_gone_and_counted(folder: str, text_file: str):
    kept_all = make(folder, text_file, hook_name="hook_embed", exclude_special_tokens=False)
    datamodule = make(folder, text_file, hook_name="hook_embed", exclude_token_ids=[31, 32])
    embedding = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight

    def tokens_in(batches: list[Tensor]) -> Counter[int]:
        return Counter(torch.cdist(torch.cat(batches), embedding).argmin(dim=1).tolist())

    assert {31, 32, EOS} <= set(tokens_in(take(kept_all, 40)))
    assert not {31, 32, EOS, PAD} & set(tokens_in(take(datamodule, 40)))
    assert kept_all.token_counts["dropped_special"] == 0
    assert datamodule.sae_metadata["exclude_special_tokens"] == [0, 1, 2, 31, 32]


def test_norm_outliers_are_left_out_and_counted(tmp_path: Path, text_file: str):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[33] *= 1000
    datamodule = make(
        "", text_file, model=model, tokenizer=tiny_tokenizer(), hook_name="hook_embed",
        norm_outlier_multiple=5.0,
        held_out_documents=0, shuffle_documents=False,
    )  # fmt: skip
    batches = torch.cat(take(datamodule, 30))
    assert not torch.isclose(batches, model.transformer.wte.weight[33]).all(dim=1).any()
    counts = datamodule.token_counts
    rows = islice(packed_by_hand(documents(120) * 3, 16), counts["seen"] // 16)
    assert counts["dropped_outliers"] == sum(int((row == 33).sum()) for row in rows) > 0


def test_several_hooks_are_aligned_and_equal_the_single_ones(folder: str, text_file: str):
    names = [HOOK, "blocks.0.attn.hook_z"]
    both = make(folder, text_file, hook_name=names)
    assert both.d_in == {HOOK: D_MODEL, "blocks.0.attn.hook_z": 24}
    assert set(both.input_scaling) == set(both.d_in)
    batches = take(both, 6)
    for name in names:
        alone = make(folder, text_file, hook_name=name)
        assert torch.equal(torch.cat([b[name] for b in batches]), torch.cat(take(alone, 6)))


def test_a_list_of_one_hook_gives_a_dict(folder: str, text_file: str):
    (batch,) = take(make(folder, text_file, hook_name=["model.layers.1"]), 1)
    assert list(batch) == [HOOK]  # by the TransformerLens name, however it was asked for


def test_per_token_scaling_gives_norm_sqrt_d_in(folder: str, text_file: str):
    batch = torch.cat(take(make(folder, text_file, input_scaling="per_token"), 3))
    torch.testing.assert_close(batch.norm(dim=1), torch.full((96,), D_MODEL**0.5))


def test_average_scaling_measures_the_beginning_of_the_dataset_and_costs_training_nothing(
    folder: str, text_file: str
):
    raw = make(folder, text_file)
    scaled = make(folder, text_file, input_scaling="average", n_batches_for_norm_estimate=3)
    call = torch.stack(list(islice(packed_by_hand(documents(120), 16), 12)))
    with torch.no_grad():
        hidden = AutoModelForCausalLM.from_pretrained(folder)(call, output_hidden_states=True).hidden_states[
            2
        ]
    factor = D_MODEL**0.5 / float(hidden[call != EOS].double().norm(dim=1).mean())
    assert scaled.input_scaling.factor == pytest.approx(factor, rel=1e-5)
    for a, b in zip(take(raw, 5), take(scaled, 5), strict=True):
        torch.testing.assert_close(a * scaled.input_scaling.factor, b)
    assert raw.token_counts == scaled.token_counts


# --- evaluation ---------------------------------------------------------------------------------------------


def test_evaluation_is_repeatable_shared_by_ranks_and_finite(folder: str, text_file: str, monkeypatch: Any):
    datamodule = make(folder, text_file, held_out_documents=40)
    once, twice = list(datamodule.val_dataloader()), list(datamodule.val_dataloader())
    assert len(once) == len(twice) > 2
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    take(datamodule, 3)
    assert all(torch.equal(a, b) for a, b in zip(once, datamodule.val_dataloader(), strict=True))
    assert not torch.equal(once[0][:8], next(iter(datamodule.test_dataloader()))[:8])
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(
            "aen_lightning.data.text.rank_and_world_size", lambda trainer, rank=rank: (rank, 2)
        )
        ranks.append(list(make(folder, text_file, held_out_documents=40).val_dataloader()))
    assert len(ranks[0]) == len(ranks[1])
    # as many rows on each rank, so at most one row of 16 tokens is lost
    assert 0 <= sum(map(len, once)) - sum(len(b) for rank in ranks for b in rank) <= 16
    assert make(folder, text_file, held_out_documents=0).val_dataloader() == []


def test_n_eval_batches_limits_the_batches(folder: str, text_file: str):
    assert len(list(make(folder, text_file, held_out_documents=40, n_eval_batches=2).test_dataloader())) == 2


# --- order, randomness, resuming ----------------------------------------------------------------------------


def test_the_global_generator_is_neither_used_nor_heeded(folder: str, text_file: str):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    datamodule = make(folder, text_file)
    first = take(datamodule, 10)
    list(datamodule.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, take(make(folder, text_file), 10), strict=True))


@pytest.mark.parametrize("options", [
    {}, {"activations_mixing_fraction": 0.0}, {"activations_mixing_fraction": 0.9, "buffer_size_tokens": 200},
    {"hook_name": [HOOK, "blocks.0.attn.hook_z"]}, {"norm_outlier_multiple": 1.3},
    {"input_scaling": "average"},
    {"streaming": True}, {"prefetch": 2},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:resuming")
def test_a_resumed_stream_goes_on_bit_for_bit(folder: str, text_file: str, options: dict[str, Any]):
    uninterrupted = make(folder, text_file, **options)
    expected = take(uninterrupted, 30)
    for n in (1, 2, 7, 20):
        first = make(folder, text_file, **options)
        take(first, n)
        state = first.state_dict()
        json.dumps(state)
        first.teardown()
        resumed = make(folder, text_file, **options)
        resumed.load_state_dict(state)
        for ours, theirs in zip(take(resumed, 30 - n), expected[n:], strict=True):
            pairs = [(ours[h], theirs[h]) for h in ours] if isinstance(ours, dict) else [(ours, theirs)]
            assert all(torch.equal(a, b) for a, b in pairs)
        if "norm_outlier_multiple" not in options and "prefetch" not in options:
            assert resumed.token_counts == uninterrupted.token_counts
        resumed.teardown()
    uninterrupted.teardown()


def test_resuming_runs_the_model_for_the_buffer_only(folder: str, text_file: str):
    first = make(folder, text_file)
    take(first, 150)
    resumed = make(folder, text_file)
    resumed.load_state_dict(first.state_dict())
    model, calls = resumed.language_model, []
    run = model.activations
    model.activations = lambda tokens: calls.append(tokens) or run(tokens)  # type: ignore[method-assign]
    take(resumed, 1)
    assert first.token_counts["seen"] // (4 * 16) > 75  # calls in the first run
    assert len(calls) < 20


def test_other_settings_on_resuming_are_said(folder: str, text_file: str):
    state = make(folder, text_file).state_dict()
    with pytest.warns(UserWarning, match=r"differs .* in seed: it goes on after 0 batches"):
        make(folder, text_file, seed=4).load_state_dict(state)


def test_prefetching_changes_nothing_and_ends_with_teardown(folder: str, text_file: str):
    import threading

    expected = take(
        make(folder, text_file), 12
    )  # first: loading a model may start threads of others, a progress bar's
    before = threading.active_count()
    prefetching = make(folder, text_file, prefetch=3)
    assert all(torch.equal(a, b) for a, b in zip(take(prefetching, 12), expected, strict=True))
    assert threading.active_count() == before + 1
    prefetching.teardown()
    assert threading.active_count() == before
    assert prefetching.source._loaded is None


class Recorder(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[Tensor] = []
        self.val: list[Tensor] = []

    def training_step(self, batch: Tensor) -> Tensor:
        self.batches.append(batch)
        return self.weight.sum()

    def validation_step(self, batch: Tensor) -> None:
        self.val.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path, "max_epochs": -1, "enable_checkpointing": False,
    }  # fmt: skip
    return pl.Trainer(**{**defaults, **options})


@pytest.mark.parametrize("epochs", [{}, {"limit_train_batches": 4}])
def test_lightning_resumes_where_it_stopped_twice(
    folder: str, text_file: str, tmp_path: Path, epochs: dict[str, int]
):
    whole = Recorder()
    trainer(tmp_path, max_steps=14, val_check_interval=None, **epochs).fit(
        whole, datamodule=make(folder, text_file)
    )
    assert len(whole.batches) == 14
    batches, path = [], None
    for stop in (3, 9, 14):
        part = Recorder()
        fit = trainer(tmp_path, max_steps=stop, **epochs)
        fit.fit(part, datamodule=make(folder, text_file), ckpt_path=path, weights_only=True if path else None)
        path = tmp_path / f"{stop}.ckpt"
        fit.save_checkpoint(path)
        batches += part.batches
    assert len(batches) == 14
    assert all(torch.equal(a, b) for a, b in zip(batches, whole.batches, strict=True))


def test_lightning_checkpoints_in_mid_run_hold_the_right_position(
    folder: str, text_file: str, tmp_path: Path
):
    whole = Recorder()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer(tmp_path, max_steps=12, enable_checkpointing=True, callbacks=[saver]).fit(
        whole, datamodule=make(folder, text_file)
    )
    resumed = Recorder()
    trainer(tmp_path, max_steps=12).fit(
        resumed, datamodule=make(folder, text_file), ckpt_path=tmp_path / "step=5.ckpt", weights_only=True
    )
    assert len(resumed.batches) == 7
    assert all(torch.equal(a, b) for a, b in zip(resumed.batches, whole.batches[5:], strict=True))


def test_the_model_is_in_no_checkpoint(folder: str, text_file: str, tmp_path: Path):
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(Recorder(), datamodule=make(folder, text_file))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 20_000
    assert list(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == ["weight"]


# --- errors before any work ---------------------------------------------------------------------------------


def test_setup_reads_no_weights_and_a_wrong_hook_is_an_error(tmp_path: Path, text_file: str):
    folder = Path(save_tiny_model("llama", tmp_path))
    (folder / "model.safetensors").unlink()
    assert make(str(folder), text_file).d_in == D_MODEL
    with pytest.raises(
        ValueError, match=r"hook point 'blocks\.1\.hook_resid_pst' does not exist .* Did you mean"
    ):
        make(str(folder), text_file, hook_name="blocks.1.hook_resid_pst")
    with pytest.raises(ValueError, match="context_size is 65, but the model has 64 positions"):
        make(str(folder), text_file, context_size=65)
    with pytest.raises(
        ValueError, match="sequence_separator_token is 'sep', but the tokenizer has no such token"
    ):
        make(str(folder), text_file, sequence_separator_token="sep")
    with pytest.raises(
        ValueError, match="no text_column 'txt': set text_column to one of its columns, text, id"
    ):
        make(str(folder), text_file, text_column="txt")
    with pytest.raises(RuntimeError, match="is not set up"):
        TextActivationsDataModule(
            model_name=str(folder), hook_name=HOOK, dataset_path=text_file
        ).val_dataloader()


def test_metadata_is_what_saelens_needs_to_use_the_sae(folder: str, text_file: str):
    metadata = make(
        folder, text_file, model_from_pretrained_kwargs={"attn_implementation": "eager"}
    ).sae_metadata
    expected = {
        "model_name": folder, "hook_name": HOOK, "hf_hook_name": "model.layers.1",
        "model_class_name": "AutoModelForCausalLM", "context_size": 16, "prepend_bos": False,
        "exclude_special_tokens": True, "dataset_path": text_file,
        "model_from_pretrained_kwargs": {"attn_implementation": "eager"}, "sequence_separator_token": "eos",
    }  # fmt: skip
    assert expected.items() <= metadata.items()
    z = make(folder, text_file, hook_name="blocks.0.attn.hook_z").sae_metadata
    assert z["reshape_activations"] == "hook_z"
    assert "hf_hook_name" not in z


def test_a_transformer_lens_model_gives_the_same_activations(folder: str, text_file: str):
    bridge = make(folder, text_file, model_class_name="TransformerBridge")
    assert bridge.d_in == D_MODEL
    for a, b in zip(take(bridge, 3), take(make(folder, text_file), 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # eager attention against SDPA
