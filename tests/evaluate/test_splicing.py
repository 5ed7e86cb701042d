"""A reconstruction in the place of its activation, at every kind of hook point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from aen_lightning.evaluate import (
    replaced_activation,
)
from aen_lightning.language_model.hook_points import resolve_hook
from tests.support.tiny_models import tiny_model


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
