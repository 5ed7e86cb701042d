"""The JumpReLU finish against loops over single activations, and its export against SAELens's JumpReLU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, TrainingSAE
from torch.testing import assert_close

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig, sparse
from aen_lightning.saes.jump_thresholds import keep_above
from tests.support.training import step_input

BANDWIDTH = 0.8


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pre-activations (30, 6), offsets, and a gradient of the loss for each activation."""
    generator = torch.Generator().manual_seed(0)
    pre, gradient = (torch.randn(30, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    return pre + 0.5, 0.3 * torch.randn(6, dtype=torch.float64, generator=generator), gradient


def test_what_is_kept_and_how_thresholds_learn_is_that_of_loops():
    pre, offsets, gradient = problem()
    learned = offsets.clone().requires_grad_()
    acts, level = keep_above(pre, learned, n_kept=40, bandwidth=BANDWIDTH)
    (acts * gradient).sum().backward()

    scores = sorted(
        (float(pre[b, j] - offsets[j]) for b in range(30) for j in range(6) if pre[b, j] > 0), reverse=True
    )
    expected_level = (scores[39] + scores[40]) / 2
    assert float(level) == pytest.approx(expected_level)
    width = BANDWIDTH * expected_level
    slopes, near = [0.0] * 6, [0] * 6
    for j in range(6):
        threshold = max(0.0, expected_level + float(offsets[j]))
        for b in range(30):
            value = float(pre[b, j])
            assert float(acts[b, j]) == (value if value > threshold else 0.0)
            if (
                value > 0 and abs(value - threshold) < width / 2
            ):  # JumpReLU's straight-through estimate (arXiv:2407.14435)
                slopes[j] -= threshold / width * float(gradient[b, j])
                near[j] += 1
    expected = [slopes[j] - near[j] / sum(near) * sum(slopes) for j in range(6)]
    assert learned.grad is not None
    assert learned.grad.tolist() == pytest.approx(expected)
    assert max(map(abs, expected)) > 0.5
    assert int((acts > 0).sum()) == 40


def test_the_gradient_is_the_derivative_of_the_error_where_l0_is_held():
    """Of many activations spread evenly: the error as a function of the offsets, its level found anew each time."""
    generator = torch.Generator().manual_seed(1)
    pre = 2 * torch.rand(400_000, 2, dtype=torch.float64, generator=generator)
    target = torch.tensor([1.0, 0.25], dtype=torch.float64)  # what an activation is worth

    def error(offsets: torch.Tensor) -> torch.Tensor:
        acts, _ = keep_above(pre, offsets, n_kept=300_000, bandwidth=0.4)
        return -(acts * target).sum() / len(pre)

    offsets = torch.tensor([0.1, -0.1], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(error(offsets), offsets)
    step = torch.tensor([0.01, 0.0], dtype=torch.float64)
    with torch.no_grad():
        by_hand = float(error(offsets + step) - error(offsets - step)) / 0.02
    assert float(found[0]) == pytest.approx(by_hand, rel=0.02)
    assert float(found.sum()) == pytest.approx(0, abs=1e-9)  # a shift of all offsets is taken up by the level


@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_exported_as_jumprelu_with_a_threshold_for_each_feature(tmp_path: Path, scale: float | None):
    torch.manual_seed(0)
    sae = AENTrainingSAE(AENTrainingSAEConfig(d_in=8, d_sae=40, hard_finish="jumprelu"))
    sae.harden(4, "jumprelu")
    assert sae.threshold_offsets is not None
    with torch.no_grad():
        sae.threshold_offsets.uniform_(-0.1, 0.1)
    for n in range(5):
        sae.training_forward_pass(step_input(torch.randn(64, 8), n))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(40, 1) + 0.5)  # a step that no projection has followed
    x = torch.randn(200, 8)
    sae.save_model(tmp_path / "training")
    again = TrainingSAE.load_from_disk(tmp_path / "training")
    sae.eval()
    out = sae(x)
    assert_close(again.eval()(x), out)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
        x, out = x / scale, out / scale
    sae.save_inference_model(tmp_path / "sae")
    read = SAE.load_from_disk(tmp_path / "sae")
    assert type(read) is JumpReLUSAE
    assert_close(read(x), out, rtol=1e-4, atol=1e-5)
    assert read.threshold.std() > 0.01
    assert 2 < (read.encode(x) > 0).sum(-1).float().mean() < 8


def test_fewer_positive_activations_than_asked_for_are_all_kept():
    pre = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
    acts, level = keep_above(pre, torch.zeros(2), n_kept=3, bandwidth=0.5)
    assert acts.tolist() == [[1.0, 0.0], [2.0, 0.0]]
    assert float(level) == 0


def test_the_step_on_the_non_zeros_is_the_dense_one(monkeypatch: pytest.MonkeyPatch):
    """Sixty steps of Adam in float64: the same losses, gradients, thresholds and statistics, also where L0 jumps."""
    saes = []
    for sparse_step in ("on", "off"):
        torch.manual_seed(0)
        config = AENTrainingSAEConfig(
            d_in=8, d_sae=40, dtype="float64", sparse_step=sparse_step, starvation_guard=0.1, hard_finish="jumprelu",
            aux_loss_coefficient=1.0, remove_radial_gradient=True, decoder_init_norm=1.0,
        )  # fmt: skip
        sae = AENTrainingSAE(config)
        sae.harden(3.5, "jumprelu")
        saes.append((sae, torch.optim.Adam(sae.parameters(), lr=1e-2)))
    encodings: list[tuple[int, bool]] = []  # of this step: entries, and whether all that is positive
    encode = sparse.encode

    def counted(*args: Any, **options: Any) -> sparse.SparseCode:
        code = encode(*args, **options)
        encodings.append((code.nnz, "threshold" not in options))
        return code

    monkeypatch.setattr(sparse, "encode", counted)
    whole = []
    generator = torch.Generator().manual_seed(3)
    for n in range(60):
        x = torch.randn(64, 8, dtype=torch.float64, generator=generator)
        if n == 40:
            x = 0.2 * x  # the level falls to a fifth: what was encoded does not suffice
        silent = torch.arange(40) < 5
        encodings.clear()
        found = []
        for sae, optimizer in saes:
            step = step_input(x, n)
            step.dead_neuron_mask = silent
            out = sae.training_forward_pass(step)
            optimizer.zero_grad()
            out.loss.backward()
            acts = out.feature_acts
            found.append((out, acts.to_dense() if acts.is_sparse else acts))
        (ours, our_acts), (dense, dense_acts) = found
        assert ours.feature_acts.is_sparse
        assert not dense.feature_acts.is_sparse
        assert_close(ours.loss, dense.loss)
        assert_close(our_acts, dense_acts)
        if n < 40:
            assert int((our_acts > 0).sum()) == int(3.5 * 64)
        if encodings[-1][1]:
            whole.append(n)
        elif n > 0:  # at the start there is no level to go by
            assert encodings[0][0] < int((dense.hidden_pre > 0).sum())
        for (name, mine), (_, theirs) in zip(*(sae.named_parameters() for sae, _ in saes), strict=True):
            assert_close(mine.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")
        for (name, mine), (_, theirs) in zip(*(sae.named_buffers() for sae, _ in saes), strict=True):
            assert_close(mine, theirs, msg=lambda m, n=name: f"{n}: {m}")
        for _, optimizer in saes:
            optimizer.step()
    offsets = saes[0][0].threshold_offsets
    assert offsets is not None
    assert offsets.abs().max() > 0.1
    # one encoding of a part of what is positive is enough, but where the level jumps
    assert 40 in whole
    assert len(whole) < 6


def test_what_is_not_positive_teaches_no_threshold():
    """Around a threshold of .075 the window is .166 wide on each side: .05 and .2 count there, -.05 does not."""
    found = []
    for below in (-0.05, -10.0):
        pre = torch.tensor([[1.5, 0.05], [0.5, 0.2], [0.4, below]], dtype=torch.float64)
        offsets = torch.tensor([0.0, -0.4], dtype=torch.float64, requires_grad=True)
        # scores 1.5, .5, .4 and .45, .6: to keep three the level lies between .5 and .45
        acts, level = keep_above(pre, offsets, n_kept=3, bandwidth=0.7)
        assert float(level.detach()) == pytest.approx(0.475)
        (acts * torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)).sum().backward()
        found.append(offsets.grad)
    assert_close(found[0], found[1])
