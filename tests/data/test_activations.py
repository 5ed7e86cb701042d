"""Reading activations for training: the order, the split, scaling, resume, several hooks, SAELens's cache,
ranks."""

import itertools
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close

from aen_lightning.data.activations import ActivationsDataModule
from aen_lightning.data.order import ShuffledOrder
from aen_lightning.saes.input_scaling import InputScaling
from aen_lightning.shards import ShardError, convert
from tests.support.shard_sets import HOOK, flip_byte, write_set


def set_up(path: Path, **kwargs: Any) -> ActivationsDataModule:
    data = ActivationsDataModule(
        str(path), **({"train_batch_size_tokens": 8, "held_out_fraction": 0.0} | kwargs)
    )
    data.prepare_data()
    data.setup("fit")
    return data


def first(data: ActivationsDataModule, n: int) -> list[Any]:
    iterator = iter(data.train_dataloader())
    batches = list(itertools.islice(iterator, n))
    iterator.close()
    return batches


# --- the order ----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    n_rows=st.integers(1, 300),
    block_rows=st.integers(1, 40),
    window_rows=st.integers(1, 200),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 300), max_size=5),
)
def test_each_epoch_is_a_permutation_however_it_is_cut(
    n_rows: int, block_rows: int, window_rows: int, seed: int, epoch: int, cuts: list[int]
):
    def order() -> ShuffledOrder:
        return ShuffledOrder(n_rows, seed=seed, block_rows=block_rows, window_rows=window_rows)

    whole = order().rows(epoch * n_rows, n_rows)
    assert sorted(whole) == list(range(n_rows))
    edges = sorted({0, n_rows, *(c % (n_rows + 1) for c in cuts)})
    pieces = [
        order().rows(epoch * n_rows + a, b - a) for a, b in itertools.pairwise(edges)
    ]  # each from a fresh object
    assert np.array_equal(np.concatenate(pieces), whole)


def test_order_is_a_pure_function_and_seeds_and_epochs_differ():
    order = ShuffledOrder(1000, seed=1, block_rows=8, window_rows=256)
    late = order.batch(70, 32)
    order.batch(3, 32)  # going back changes nothing
    assert np.array_equal(order.batch(70, 32), late)
    assert np.array_equal(ShuffledOrder(1000, seed=1, block_rows=8, window_rows=256).batch(70, 32), late)
    assert not np.array_equal(ShuffledOrder(1000, seed=2, block_rows=8, window_rows=256).batch(70, 32), late)
    assert not np.array_equal(order.rows(0, 1000), order.rows(1000, 1000))


def test_ranks_share_out_the_stream_of_one_process():
    order = ShuffledOrder(1000, seed=0, block_rows=8, window_rows=256)
    together = [order.batch(step, 60) for step in range(10)]
    apart = [[order.batch(step, 20, rank=r, world_size=3) for r in range(3)] for step in range(10)]
    for whole, parts in zip(together, apart, strict=True):
        assert np.array_equal(np.sort(np.concatenate(parts)), whole)


def test_every_batch_mixes_over_the_whole_set():
    """With windows of 1/16 of the set, a batch still spans it, and neighbours rarely share a batch."""
    n, size = 65_536, 1024
    order = ShuffledOrder(n, seed=0, block_rows=16, window_rows=4096)
    batches = [order.batch(step, size) for step in range(n // size)]
    for rows in batches:
        counts = np.histogram(rows, bins=8, range=(0, n))[0]
        assert counts.min() > 60  # 128 expected in each eighth of the set
    batch_of = np.empty(n, dtype=int)
    for step, rows in enumerate(batches):
        batch_of[rows] = step
    assert (
        np.mean(batch_of[1:] == batch_of[:-1]) < 0.3
    )  # a quarter of a window is one batch; 1 if read in order


def test_set_within_one_window_is_permuted_uniformly():
    """Position of row 0 over many seeds: flat, by a chi-square test against 16 equal bins."""
    positions = [int(np.flatnonzero(ShuffledOrder(64, seed=s).rows(0, 64) == 0)[0]) for s in range(1600)]
    counts = np.histogram(positions, bins=16, range=(0, 64))[0]
    assert ((counts - 100.0) ** 2 / 100).sum() < 37.7  # 99.9 % point of chi-square with 15 degrees of freedom


def test_order_rejects_nonsense():
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        ShuffledOrder(10, seed=0, block_rows=0)


# --- batches ------------------------------------------------------------------------------------------------


def test_an_epoch_of_batches_has_every_row_once(tmp_path: Path):
    expected, _ = write_set(tmp_path, [20, 1, 43])
    batches = first(set_up(tmp_path), 8)
    assert all(b.shape == (8, 6) and b.dtype == torch.float32 for b in batches)
    assert sorted(map(tuple, torch.cat(batches).tolist())) == sorted(map(tuple, expected[HOOK].tolist()))


def test_stream_is_endless_and_later_epochs_have_another_order(tmp_path: Path):
    write_set(tmp_path, [64])
    batches = first(set_up(tmp_path), 24)
    assert not torch.equal(torch.cat(batches[:8]), torch.cat(batches[8:16]))
    assert_close(torch.cat(batches[16:]).sum(0), torch.cat(batches[:8]).sum(0))


def test_prefetching_changes_nothing_and_its_thread_ends(tmp_path: Path):
    write_set(tmp_path, [64])
    threads = threading.active_count()
    ahead, now = first(set_up(tmp_path, prefetch=3), 12), first(set_up(tmp_path, prefetch=0), 12)
    assert all(torch.equal(a, b) for a, b in zip(ahead, now, strict=True))
    assert threading.active_count() == threads


def test_several_hooks_stay_aligned(tmp_path: Path):
    expected, _ = write_set(tmp_path, [30, 34], d_in={HOOK: 6, "b": 3, "c": 2})
    data = set_up(tmp_path, hook_name=["b", HOOK])
    assert data.d_in == {"b": 3, HOOK: 6}
    table = {tuple(b.tolist()): a for a, b in zip(expected[HOOK], expected["b"], strict=True)}
    for batch in first(data, 8):
        assert list(batch) == ["b", HOOK]
        for a, b in zip(batch[HOOK], batch["b"], strict=True):
            assert torch.equal(table[tuple(b.tolist())], a)
    assert first(set_up(tmp_path, hook_name="c"), 1)[0].shape == (8, 2)
    with pytest.raises(ValueError, match="several hook points"):
        set_up(tmp_path)


def test_per_token_scaling_is_the_papers(tmp_path: Path):
    write_set(tmp_path, [64], dtype="bfloat16")
    raw, scaled = (first(set_up(tmp_path, input_scaling=kind), 3) for kind in ("none", "per_token"))
    for x, y in zip(raw, scaled, strict=True):
        assert_close(y, 6**0.5 * x / (x**2).sum(1, keepdim=True).sqrt())
        assert_close(y.norm(dim=1), torch.full((8,), 6**0.5))


def test_average_scaling_has_mean_norm_sqrt_d_in(tmp_path: Path):
    expected, _ = write_set(tmp_path, [64])
    data = set_up(tmp_path, input_scaling="average")
    factor = (
        6**0.5 / expected[HOOK].norm(dim=1).mean().item()
    )  # 64 rows are one epoch: all are behind the estimate
    assert isinstance(data.input_scaling, InputScaling)
    assert data.input_scaling.factor == pytest.approx(factor, rel=1e-6)
    assert_close(torch.cat(first(data, 8)).norm(dim=1).mean(), torch.tensor(6**0.5))


def test_held_out_rows_are_the_end_and_never_trained_on(tmp_path: Path):
    expected, _ = write_set(tmp_path, [40, 60], context_size=4)
    data = set_up(tmp_path, held_out_fraction=0.2)
    held_out = list(data.val_dataloader())
    assert [len(b) for b in held_out] == [8, 8, 4] == [len(b) for b in data.test_dataloader()]
    assert torch.equal(torch.cat(held_out), expected[HOOK][80:])
    assert torch.equal(torch.cat(list(data.val_dataloader())), torch.cat(held_out))  # repeatable
    trained = {tuple(row) for batch in first(data, 40) for row in batch.tolist()}
    assert trained == {
        tuple(row) for row in expected[HOOK][:76].tolist()
    }  # 4 rows between: no context on both sides
    assert data.token_counts == {"read": 102, "special": 2, "train": 76, "held_out": 20, "excluded": 0}
    assert len(set_up(tmp_path).val_dataloader()) == 0


def test_excluded_token_ids_are_gone(tmp_path: Path):
    expected, ids = write_set(tmp_path, [64])
    data = set_up(tmp_path, exclude_token_ids=[0, 7, 63])
    trained = {tuple(row) for batch in first(data, 30) for row in batch.tolist()}
    kept = [i for i in ids.tolist() if i not in (0, 7, 63)]
    assert trained == {tuple(row) for row in expected[HOOK][kept].tolist()}
    assert data.token_counts["excluded"] == 3


def test_saelens_cache_is_read_in_the_same_order(tmp_path: Path):
    write_set(tmp_path / "set", [24, 40], context_size=4)
    convert(tmp_path / "set", tmp_path / "cache")
    ours, theirs = (first(set_up(tmp_path / d, held_out_fraction=0.1), 10) for d in ("set", "cache"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_metadata_is_saelenss(tmp_path: Path):
    write_set(tmp_path, [64])
    metadata = set_up(tmp_path).sae_metadata
    assert metadata == {"model_name": "tiny", "hook_name": HOOK, "context_size": 4}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"hook_name": "blocks.7.hook_resid_post"},
            "no activations of 'blocks.7.hook_resid_post'; it has blocks.0",
        ),
        ({"train_batch_size_tokens": 65}, "leaves 64 tokens to train on"),
        ({"train_batch_size_tokens": 0}, "train_batch_size_tokens must be at least 1, got 0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"input_scaling": "layer_norm"}, "got 'layer_norm'"),
        ({"prefetch": -1}, "prefetch must be at least 0"),
        ({"verify": "often"}, "got 'often'"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, kwargs: dict[str, Any], message: str):
    write_set(tmp_path, [64])
    with pytest.raises(ValueError, match=message):
        set_up(tmp_path, **kwargs)


def test_damaged_shard_is_named_before_training(tmp_path: Path):
    write_set(tmp_path, [30, 34])
    set_up(tmp_path)
    flip_byte(tmp_path / "shard-00001.safetensors")
    with pytest.raises(ShardError, match=r"shard-00001\.safetensors is damaged"):
        set_up(tmp_path)


# --- under a Trainer ----------------------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Trains one parameter, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(6))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return (batch * self.weight).pow(2).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        assert batch.shape[1] == 6

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(path: Path, max_steps: int, *, root: Path, resume: Path | None = None, **kwargs: Any) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=max_steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root, callbacks=[ModelCheckpoint(root, filename="{step}", every_n_train_steps=5,
        save_top_k=-1)], **kwargs,
    )  # fmt: skip
    data = ActivationsDataModule(
        str(path), train_batch_size_tokens=8, held_out_fraction=0.1, input_scaling="per_token"
    )
    trainer.fit(model, data, ckpt_path=None if resume is None else str(resume))
    return model


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 4, "max_epochs": -1},
        {"val_check_interval": 3},
    ],
)
def test_training_resumes_exactly(tmp_path: Path, kwargs: dict[str, Any]):
    write_set(tmp_path / "set", [30, 34])
    whole = fit(tmp_path / "set", 12, root=tmp_path / "a", **kwargs)
    cut = fit(tmp_path / "set", 5, root=tmp_path / "b", **kwargs)
    resumed = fit(tmp_path / "set", 12, root=tmp_path / "b", resume=tmp_path / "b" / "step=5.ckpt", **kwargs)
    seen = cut.seen + resumed.seen
    assert len(seen) == len(whole.seen) == 12 * kwargs.get("accumulate_grad_batches", 1)
    assert all(torch.equal(a, b) for a, b in zip(seen, whole.seen, strict=True))
    assert torch.equal(resumed.weight, whole.weight)
