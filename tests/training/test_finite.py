"""Nothing that is not finite trains on in silence, is written, or is taken up again."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aen_lightning.training.finite import FiniteWatch, NonFiniteError, non_finite_tensors
from aen_lightning.training.module import SAEModule, SweepModule
from tests.support.streams import batch_at, loader
from tests.support.training import SAE_FIELDS, make_trainer

NAN, INF = float("nan"), float("inf")


class Damaged(IterableDataset[Tensor]):
    """The usual batches with nan or infinity in rows 3 to 7 of batch 5, and nothing else, or with these rows replaced."""

    def __init__(self, value: float, *, replaced: bool = False) -> None:
        self.value, self.replaced = value, replaced

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(10_000):
            x = batch_at(index, batch_size=64, d_in=16)
            if index == 5 and self.replaced:
                x = torch.cat([x[:3], x[8:], x[:3], x[8:10]])
            elif index == 5:
                x[3:8, index % 3] = self.value
            yield x


def data(value: float, **kwargs: Any) -> DataLoader[Tensor]:
    return DataLoader(Damaged(value, **kwargs), batch_size=None)


def make_module(**kwargs: Any) -> SAEModule:
    torch.manual_seed(0)
    return SAEModule(SAE_FIELDS, **kwargs)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rows_that_are_not_finite_end_the_run_with_their_place(tmp_path: Path, value: float):
    trainer = make_trainer(tmp_path, 40, log_every_n_steps=10)
    with pytest.raises(
        NonFiniteError, match=r"5 of 64 rows of activations in step 5 \(batch 5, rank 0\).*W_enc"
    ):
        trainer.fit(make_module(), data(value))
    assert trainer.global_step == 9  # the next logging step
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_would_be_written_before_the_next_logging_step_is_not(tmp_path: Path):
    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1)
    trainer = make_trainer(tmp_path, 8, log_every_n_steps=1000, enable_checkpointing=True, callbacks=[saver])
    with pytest.raises(NonFiniteError, match="step 5"):
        trainer.fit(make_module(), data(NAN))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["epoch=0-step=4.ckpt"]
    assert [p.name for p in (tmp_path / "sae").iterdir()] == ["step_4"]


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(tmp_path: Path):
    module, trainer = make_module(), make_trainer(tmp_path, 3)
    trainer.fit(module, loader())
    module.sae.b_enc.data[2] = NAN
    with pytest.raises(NonFiniteError, match="b_enc"):
        module.on_save_checkpoint({})  # by itself: the export that goes with a checkpoint refuses as well


def test_at_the_end_of_a_run_nothing_is_exported(tmp_path: Path):
    with pytest.raises(NonFiniteError, match="step 5"):
        make_trainer(tmp_path, 7, log_every_n_steps=1000).fit(make_module(), data(NAN))
    assert not (tmp_path / "sae").exists()


def test_a_learning_rate_out_of_all_bounds_is_named_with_the_tensors(tmp_path: Path):
    module = SweepModule([{**SAE_FIELDS}, {**SAE_FIELDS, "gamma": 0.1}], lr=1e30)
    with pytest.raises(NonFiniteError, match=r"the loss in step 1 \(batch 1, rank 0\); now sae/b_dec, "):
        make_trainer(tmp_path, 40, log_every_n_steps=5).fit(module, loader())


def test_skipped_rows_give_way_to_other_rows_of_the_batch_and_are_counted(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    module, same = make_module(on_non_finite="skip"), make_module()
    with pytest.warns(UserWarning, match="5 rows of activations were not finite"):
        make_trainer(tmp_path, 20, log_every_n_steps=10, logger=logger).fit(module, data(NAN))
    make_trainer(tmp_path / "same", 20).fit(same, data(NAN, replaced=True))
    for name, value in module.sae.state_dict().items():
        assert torch.equal(value, same.sae.state_dict()[name]), name
    with (Path(logger.log_dir) / "metrics.csv").open() as f:
        counts = [float(row["details/n_skipped_rows"]) for row in csv.DictReader(f)]
    assert counts == [5, 5]


def test_the_count_goes_on_after_a_resume(tmp_path: Path):
    module = make_module(on_non_finite="skip")
    trainer = make_trainer(tmp_path, 10)
    with pytest.warns(UserWarning, match="5 rows"):
        trainer.fit(module, data(NAN))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make_module(on_non_finite="skip")
    with pytest.warns(UserWarning, match="10 rows"):
        make_trainer(tmp_path, 20).fit(resumed, data(INF), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_a_batch_without_one_finite_row_becomes_zeros():
    watch = FiniteWatch("skip")
    x = torch.full((4, 3), NAN)
    assert torch.equal(watch.rows(x, step=0, batch_idx=0), torch.zeros(4, 3))
    x[2] = 1.0
    assert torch.equal(watch.rows(x, step=1, batch_idx=1), torch.ones(4, 3))
    assert int(watch.n_skipped_rows) == 7


def test_the_first_of_many_steps_is_named_whatever_the_batches_sizes():
    watch = FiniteWatch("stop")
    for step in range(200):
        x = torch.zeros(3 if step % 90 == 89 else 4, 2)
        x[:2][torch.tensor([step >= 100, step in (71, 89, 130)])] = NAN
        watch.rows(x, step=step, batch_idx=1000 + step)
        watch.losses(torch.tensor([0.0, INF if step == 199 else 1.0]), step=step, batch_idx=step)
    assert watch.found().tolist() == [[71, 1071, 1, 1], [199, 199, 1, 1]]
    watch.begin()
    assert watch.found().tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path: Path, where: str):
    trainer = make_trainer(tmp_path, 3)
    trainer.fit(make_module(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    if where == "weights":
        checkpoint["state_dict"]["tracked.0.sae.b_dec"][1] = NAN
    else:
        checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][1] = INF
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(NonFiniteError, match="b_dec" if where == "weights" else r"state\.0\.exp_avg"):
        make_trainer(tmp_path, 5).fit(
            make_module(), loader(), ckpt_path=tmp_path / "b.ckpt", weights_only=True
        )


def test_neither_export_nor_save_takes_a_diverged_sae(tmp_path: Path):
    module, trainer = make_module(), make_trainer(tmp_path, 3)
    trainer.fit(module, loader())
    with torch.no_grad():
        module.sae.W_dec[0, 0] = NAN
    with pytest.raises(NonFiniteError, match="W_dec"):
        module.export(tmp_path / "x")
    with pytest.raises(NonFiniteError, match="W_dec"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert not list(tmp_path.glob("x*"))


def test_tensors_by_hand():
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, NAN]), "c": torch.tensor([[INF]], dtype=torch.bfloat16),
               "n": torch.arange(3), "empty": torch.ones(0)}  # fmt: skip
    assert non_finite_tensors(tensors.items()) == ["b", "c"]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_held_out_rows_that_are_not_finite_are_named_or_left_out(tmp_path: Path, stage: str):
    kept = [batch_at(i, batch_size=64, d_in=16) for i in range(6)]
    kept[5] = torch.cat([kept[5][:3], kept[5][8:]])

    def measured(rows: Any, **kwargs: Any) -> dict[str, float]:
        trainer = make_trainer(tmp_path, 1, limit_val_batches=6, limit_test_batches=6)
        (found,) = getattr(trainer, stage)(make_module(**kwargs), rows, verbose=False)
        return dict(found)

    with pytest.raises(NonFiniteError, match=r"5 of 64 rows of held-out activations .* \(batch 5, rank 0\)"):
        measured(data(NAN))
    found, expected = measured(data(NAN), on_non_finite="skip"), measured(DataLoader(kept, batch_size=None))
    assert found == expected
    assert all(math.isfinite(value) for value in found.values())


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="on_non_finite must be 'stop' or 'skip', got 'ignore'"):
        make_module(on_non_finite="ignore")
