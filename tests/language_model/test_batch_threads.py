"""Parts of a batch on cores of their own: the same activations, really at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aen_lightning.language_model.batch_threads import BatchThreads
from aen_lightning.language_model.cut_model import CutModel, cut_model
from aen_lightning.language_model.hook_points import known_hooks
from tests.support.tiny_models import FAMILIES, N_LAYERS, tiny_model

LAST = f"blocks.{N_LAYERS - 1}.hook_resid_post"
ROWS = torch.randint(3, 60, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def cut(model: PreTrainedModel, hook_names: list[str], min_tokens: int) -> CutModel:
    found = cut_model(model, hook_names)
    found._threads = BatchThreads(min_tokens=min_tokens)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_give_the_activations_of_the_whole_batch(family: str) -> None:
    model = tiny_model(family)
    hooks = list(known_hooks(model.config))
    positions = torch.arange(16).repeat(5, 1)
    for names in ([LAST], hooks):
        whole, parts = cut(model, names, 10**6), cut(model, names, 16)
        kinds: list[dict[str, Tensor]] = [{}, {"position_ids": positions}]
        expected = [whole.activations(ROWS, **kwargs) for kwargs in kinds]
        threads: set[int] = set()
        together = threading.Barrier(2, timeout=60)

        def meet(*_: Any, seen: set[int] = threads, together: threading.Barrier = together) -> None:
            together.wait()  # both parts are in the model now; one thread alone would not get past this
            seen.add(threading.get_ident())

        block = next(m for n, m in parts.model.named_modules() if n.endswith("layers.0") or n == "h.0")
        handle = block.register_forward_hook(meet)
        for kwargs, values in zip(kinds, expected, strict=True):
            found = parts.activations(ROWS, **kwargs)
            assert list(found) == list(values)
            for name, value in values.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        handle.remove()
        assert len(threads - {threading.get_ident()}) == 2


def test_each_part_has_its_rows_of_the_attention_mask() -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(ROWS)
    for row in range(5):
        mask[row, : 2 * row] = 0  # padded on the left, every row differently
    whole, parts = cut(model, [LAST], 10**6), cut(model, [LAST], 16)
    expected, found = (m.activations(ROWS, attention_mask=mask)[LAST] for m in (whole, parts))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-6)


def test_parts_run_at_the_same_time_in_order_and_with_their_share_of_the_threads() -> None:
    together, rows = threading.Barrier(2, timeout=60), BatchThreads(min_tokens=1)

    def run(part: Tensor, nothing: None) -> tuple[list[int], int, None]:
        together.wait()  # passes only if both are here
        return part[:, 0].tolist(), torch.get_num_threads(), nothing

    for _ in range(2):
        assert rows.map(run, 2, torch.arange(5)[:, None], None) == [([0, 1, 2], 1, None), ([3, 4], 1, None)]
    assert torch.get_num_threads() == 2
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]  # nor do threads that come later inherit the workers' setting


@pytest.mark.parametrize(
    ("shape", "n_threads", "n_parts"),
    [
        ((8, 128), 2, 2),
        ((8, 127), 2, 1),
        ((1, 4096), 2, 1),
        ((32, 128), 4, 4),
        ((3, 2048), 4, 3),
        ((0, 8), 2, 1),
    ],
)
def test_a_batch_is_cut_for_the_threads_there_are_into_parts_worth_it(
    shape: tuple[int, int], n_threads: int, n_parts: int
) -> None:
    torch.set_num_threads(n_threads)
    assert BatchThreads(min_tokens=512).n_parts(torch.zeros(shape)) == n_parts


def test_parts_run_in_the_modes_of_the_caller() -> None:
    rows = BatchThreads(min_tokens=1)

    def modes(_: Tensor) -> tuple[Any, ...]:
        return (
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
        )

    x = torch.zeros(2, 1)
    assert rows.map(modes, 2, x) == [(False, True, torch.float32)] * 2
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert rows.map(modes, 2, x) == [(False, False, torch.bfloat16)] * 2
    with torch.inference_mode():
        assert rows.map(modes, 2, x) == [(True, False, torch.float32)] * 2


def test_an_error_in_a_part_is_raised_after_all_have_ended() -> None:
    ended: list[int] = []
    failed = threading.Event()

    def run(part: Tensor) -> None:
        if part.item() == 0:
            failed.set()
            raise ValueError("part 0 failed")
        failed.wait()
        ended.append(int(part.item()))

    with pytest.raises(ValueError, match="part 0 failed"):
        BatchThreads(min_tokens=1).map(run, 2, torch.arange(2))
    assert ended == [1]


def test_a_model_whose_weights_move_is_run_whole() -> None:
    model: Any = tiny_model("llama").base_model
    assert CutModel(model, ())._threads is not None
    assert CutModel(model, (), batch_threads=False)._threads is None
    model.hf_device_map = {"": "cpu"}
    assert CutModel(model, ())._threads is None
