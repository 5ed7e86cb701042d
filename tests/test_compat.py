"""Each seam of ``aen_lightning.compat``, on the library as it is installed."""

from __future__ import annotations

import ast
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchmetrics import MeanMetric
from transformers.utils import cached_file

from aen_lightning.compat import (
    FullPrecisionBuffers,
    compute_again,
    consolidate_saelens_shards,
    exit_at_once,
    find_in_repository,
    initialize,
    is_index_into_other_rows,
    local_slice,
    requeue_signal,
    version_of,
    with_own_children,
)
from tests.support.tiny_models import tiny_model

PACKAGE = Path(__file__).parents[1] / "aen_lightning"


class Statistics(FullPrecisionBuffers, nn.Module):
    full_precision_buffers = ("mean", "unused")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.tensor([1.0001]))
        self.register_buffer("other", torch.tensor([1.0001]))
        self.register_buffer("unused", None)


def test_every_cast_and_move_of_torch_goes_through_apply():
    for cast in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: nn.Sequential(m).half()[0],
    ):
        module = cast(Statistics())
        assert module.weight.dtype == module.other.dtype != torch.float32
        assert module.mean.dtype == torch.float32
        assert torch.equal(module.mean, torch.tensor([1.0001]))
    assert Statistics().double().mean.dtype == torch.float64
    assert Statistics().to("meta").to(torch.bfloat16).mean.dtype == torch.float32


def test_a_copy_with_children_of_its_own_leaves_the_original_alone():
    original = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    clone = with_own_children(original)
    clone[1] = nn.Identity()
    x = torch.tensor([[1.0, -2.0]])
    assert isinstance(original[1], nn.ReLU)
    assert torch.equal(clone(x), original[2](original[0](x)))
    assert clone[0] is original[0]


def test_the_slice_of_a_rank_is_all_of_it_if_it_is_alone():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        tensor = distribute_tensor(torch.zeros(5, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
        assert local_slice(tensor) == (slice(0, 5), slice(0, 3))
    finally:
        torch.distributed.destroy_process_group()


def test_slurms_requeue_signal_is_known_of_any_strategy(monkeypatch: pytest.MonkeyPatch):
    def trainer(*plugins: SLURMEnvironment) -> Trainer:
        return Trainer(accelerator="cpu", devices=1, logger=False, plugins=list(plugins))

    assert requeue_signal(trainer()) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert requeue_signal(trainer(SLURMEnvironment())) == signal.SIGUSR1
    assert requeue_signal(trainer(SLURMEnvironment(requeue_signal=signal.SIGUSR2))) == signal.SIGUSR2
    assert requeue_signal(trainer(SLURMEnvironment(auto_requeue=False))) is None


def test_transformers_computes_rotary_frequencies_again():
    base = tiny_model("llama").base_model
    expected = 10_000 ** (-torch.arange(0, 12, 2) / 12)  # of heads of width 12
    base.rotary_emb.inv_freq.zero_()
    initialize(base, base.rotary_emb)
    torch.testing.assert_close(base.rotary_emb.inv_freq, expected)


def test_a_file_that_is_not_in_the_repository_is_none(tmp_path: Path):
    (tmp_path / "there.json").write_text("{}")
    assert find_in_repository(str(tmp_path), "there.json") == tmp_path / "there.json"
    assert find_in_repository(str(tmp_path), "missing.json") is None
    with pytest.raises(OSError, match=r"missing\.json"):  # what the public function does with it
        cached_file(str(tmp_path), "missing.json")


def test_datasets_lists_rows_of_another_table():
    dataset = Dataset.from_dict({"n": [1, 2, 3]})
    assert not is_index_into_other_rows(dataset)
    assert is_index_into_other_rows(dataset.select([2, 0]))
    assert not is_index_into_other_rows(dataset.select([2, 0]).flatten_indices())


def test_saelens_makes_one_dataset_of_several(tmp_path: Path):
    for i in range(2):
        Dataset.from_dict({"n": [2 * i, 2 * i + 1]}).save_to_disk(tmp_path / "pieces" / f"shard_{i:05d}")
    (tmp_path / "whole").mkdir()
    consolidate_saelens_shards(tmp_path / "pieces", tmp_path / "whole")
    assert load_from_disk(tmp_path / "whole")["n"][:] == [0, 1, 2, 3]
    assert not list(tmp_path.rglob("pieces/**/*.arrow"))  # moved, not copied


def test_a_metric_is_computed_again_from_changed_states():
    metric = MeanMetric()
    metric.update(4.0)
    assert metric.compute() == 4.0
    metric.mean_value = torch.tensor(6.0)
    assert metric.compute() == 4.0  # what it gave before
    assert compute_again(metric) == 6.0


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py")]:
        if path.name != "compat.py":
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def _is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.startswith("__")


def _own_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            yield node.attr


def _private_names_used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword):
            yield node.value.lineno, node.arg or ""
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from ((node.lineno, str(a.value)) for a in node.args[1:2] if isinstance(a, ast.Constant))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = "" if isinstance(node, ast.Import) else node.module or ""
            if module.partition(".")[0] not in ("aen_lightning", "__future__"):
                names = [
                    *module.split("."),
                    *(part for alias in node.names for part in alias.name.split(".")),
                ]
                yield from ((node.lineno, name) for name in names)


def test_no_private_name_of_a_library_outside_compat():
    own = {name for _, tree in _modules() for name in _own_names(tree)}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in _modules()
        for line, name in _private_names_used(tree)
        if _is_private(name) and name not in own
    ]
    assert not found, "to aen_lightning/compat.py, with a test: " + ", ".join(sorted(found))


@pytest.mark.parametrize(
    "line",
    [
        "model._name", "self._name", "getattr(model, '_name', None)", "model._name = 1", "call(_name=1)",
        "from torch._name import x", "from torch import _name", "import torch._name",
    ],
)  # fmt: skip
def test_the_search_finds_each_way_to_touch_one(line: str):
    assert "_name" in [name for _, name in _private_names_used(ast.parse(line))]
    assert "_name" not in _own_names(ast.parse(line))


def test_a_change_in_place_moves_the_version_and_a_read_does_not():
    tensor = torch.ones(3)
    before = version_of(tensor)
    tensor.sum()
    assert version_of(tensor) == before
    tensor.add_(1)
    assert version_of(tensor) > before


def test_an_exit_at_once_ends_a_process_from_any_thread():
    process = multiprocessing.get_context("fork").Process(target=_exits_in_a_thread)
    process.start()
    process.join(30)
    assert process.exitcode == 7


def _exits_in_a_thread() -> None:
    threading.Thread(target=exit_at_once, args=(7,)).start()
    threading.Event().wait()
