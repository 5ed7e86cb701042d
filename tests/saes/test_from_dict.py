"""A dict is checked key by key before SAELens, which drops what it does not know, makes a config of it."""

from __future__ import annotations

from typing import Any

import pytest

from aen_lightning.saes.from_dict import build_sae_config

AEN = {"d_in": 4, "d_sae": 8}


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"lambda_1": "strong"}, r"^sae\.lambda_1 must be float, got 'strong'$"),
        ({"gamma": True}, r"^sae\.gamma must be float, got True$"),
        ({"d_sae": 8.0}, r"^sae\.d_sae must be int, got 8\.0$"),
        ({"warmup_delay_steps": None}, r"^sae\.warmup_delay_steps must be int \| float, got None$"),
        ({"decoder_init_norm": "0.1"}, r"^sae\.decoder_init_norm must be float \| None, got '0\.1'$"),
        ({"sparse_step": True}, r"^sae\.sparse_step must be 'auto' or 'on' or 'off', got True$"),
        ({"device": 0}, r"^sae\.device must be str, got 0$"),
        ({"gamam": 1}, r"^sae has no key 'gamam' for architecture 'aen' \(did you mean 'gamma'\?\)$"),
        ({"zzz": 1}, r"^sae has no key 'zzz' for architecture 'aen'; it takes .*\bd_in, d_sae\b"),
        ({"architecture": "topk"}, r"^sae\.k must be at most d_sae=8, got 100 \(architecture 'topk'\)$"),
        (
            {"architecture": "matryoshka_batchtopk", "k": 2, "matryoshka_widths": [4, "8"]},
            r"must be list\[int\], got",
        ),
        ({"architecture": "tpok"}, r"^unknown SAE architecture 'tpok' \(did you mean 'topk'\?\)"),
    ],
)
def test_what_is_wrong_is_named(sae: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_sae_config(AEN | sae)


def test_what_is_right_arrives_unchanged() -> None:
    cfg = build_sae_config(
        AEN | {"lambda_1": 1, "gamma": 1, "decoder_init_norm": None, "metadata": {"hook_name": "h"}}
    )
    assert (cfg.l1_coefficient, cfg.gamma, cfg.decoder_init_norm) == (4, 1, None)
    assert cfg.metadata["hook_name"] == "h"
    widths = {"architecture": "matryoshka_batchtopk", "k": 2.5, "matryoshka_widths": [4, 8]}
    assert build_sae_config(AEN | widths).matryoshka_widths == [4, 8]
