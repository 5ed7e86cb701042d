"""The variants that benchmarks/frontier.py compares: what each one's SAE, callbacks and learning rate are."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from annealing import AnnealK
from resampling import ResampleDead

from aen_lightning.callbacks import HardFinish, InitializeFromData, ReviveSilent, TargetL0
from aen_lightning.presets import preset


@dataclass
class Run:
    """One SAE to train: fields of its config, learning rate, callbacks, and how its biases start."""

    sae: dict[str, Any]
    lr: float = 3e-3
    start: InitializeFromData = field(
        default_factory=lambda: InitializeFromData(b_dec="mean", active_share=0.05)
    )
    callbacks: list[pl.Callback] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    decay: float = 0.2

    def change(self, setting: str) -> None:
        """Another value: ``KEY=VALUE`` for a field of the SAE, ``start.KEY``, ``HardFinish.KEY``, ``TargetL0.KEY``, ``lr`` or ``decay``.

        ``decay`` is the share of the run, at its end, over which the learning rate falls.
        """
        key, _, text = setting.partition("=")
        value = _value(text)
        owner, _, name = key.rpartition(".")
        if key in ("lr", "decay"):
            setattr(self, key, value)
        elif not owner:
            self.sae[key] = value
        else:
            found = (
                [self.start] if owner == "start" else [c for c in self.callbacks if type(c).__name__ == owner]
            )
            if not found or not hasattr(found[0], name):
                raise SystemExit(f"--change {setting}: this variant has no {key}")
            setattr(found[0], name, value)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name, such as mcp
        return text


def _aen(l0: float, **sae: Any) -> Run:
    penalised: dict[str, Any] = {
        "architecture": "aen", "l1_coefficient": 0.3, "l2_coefficient": 0.0, "gamma": 0.0,
        "starvation_guard": 0.1, "guard_min": 0.02, "remove_radial_gradient": True, "decoder_init_norm": 1.0,
    }  # fmt: skip
    return Run(penalised | sae, callbacks=[TargetL0(l0, reach_at=0.15)])


def _preset(l0: float, architecture: str) -> Run:
    chosen = preset("recommended", architecture=architecture, l0=l0)
    sae = {"architecture": architecture, **chosen.sae}
    training = dict(chosen.training)
    del training["lr_decay_steps"]  # the same for all
    arguments = dict(chosen.callbacks)
    start = InitializeFromData(**arguments.pop(InitializeFromData))
    callbacks = [make(**given) for make, given in arguments.items()]
    return Run(sae, training.pop("lr"), start, callbacks, training)


def recommended(l0: float, steps: int) -> Run:
    """The preset: a guarded L1 start, then BatchTopK on the same weights."""
    return _preset(l0, "aen")


def hard_from_start(l0: float, steps: int) -> Run:
    """BatchTopK with the auxiliary loss, in our parametrisation: unit decoder rows, no radial gradient."""
    run = recommended(l0, steps)
    run.callbacks = [HardFinish(l0, at=1 / steps)]
    return run


def jumprelu_finish(l0: float, steps: int) -> Run:
    """The preset with a hard phase that trains a threshold for each feature."""
    run = recommended(l0, steps)
    run.callbacks = [
        HardFinish(l0, at=c.at, finish="jumprelu") if isinstance(c, HardFinish) else c for c in run.callbacks
    ]
    return run


def guarded_l1(l0: float, steps: int) -> Run:
    """The same without the finish: differentiable throughout."""
    return _aen(l0)


def aen_gated(l0: float, steps: int) -> Run:
    """The preset of the gated AEN, the relaxed refit trained jointly: no hard phase."""
    return _preset(l0, "aen_gated")


def l1(l0: float, steps: int) -> Run:
    """The L1 SAE of SAELens."""
    return Run(
        {"architecture": "standard", "l1_coefficient": 0.3, "decoder_init_norm": 1.0},
        callbacks=[TargetL0(l0, reach_at=0.15)],
    )


def l1_resampled(l0: float, steps: int) -> Run:
    """The same with resampling of dead features, four times in the first half, as its authors did."""
    run = l1(l0, steps)
    run.training = {"dead_feature_window": max(1, min(100, steps // 20))}
    run.callbacks.append(ResampleDead([steps * share // 8 for share in (1, 2, 3, 4)]))
    return run


def jumprelu(l0: float, steps: int) -> Run:
    """The JumpReLU SAE of SAELens with Gemma Scope 2's quadratic loss, which holds L0 at a target itself.

    The loss is flat at the target, so one coefficient serves every L0: at 10 L0 is a few percent off. Bandwidth and
    threshold are those that SAELens's authors publish for SynthSAEBench, where activations are of this size, too.
    """
    return Run(
        {
            "architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": l0,
            "l0_coefficient": 10.0, "jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 1.0, "decoder_init_norm": 1.0,
        }
    )  # fmt: skip


def mcp(l0: float, steps: int) -> Run:
    """Guarded MCP, whose silent features are raised: differentiable throughout, the map too."""
    run = _aen(l0, penalty="mcp")
    run.callbacks.append(ReviveSilent())
    return run


def gated(l0: float, steps: int) -> Run:
    """Gated SAE of SAELens."""
    return Run(
        {"architecture": "gated", "l1_coefficient": 0.3, "decoder_init_norm": 1.0},
        callbacks=[TargetL0(l0, reach_at=0.15)],
    )


def batchtopk(l0: float, steps: int) -> Run:
    """BatchTopK with the auxiliary loss, SAELens's."""
    return Run(
        {"architecture": "batchtopk", "k": l0, "aux_loss_coefficient": 1.0, "decoder_init_norm": 1.0},
        training={"dead_feature_window": 100},
    )


def batchtopk_annealed(l0: float, steps: int) -> Run:
    """The same with a k that falls from twice the L0 over the first 40 % of the run, as long as the preset is penalised."""
    run = batchtopk(l0, steps)
    run.callbacks.append(AnnealK(2 * l0, l0, int(0.4 * steps)))
    return run


def topk(l0: float, steps: int) -> Run:
    """TopK with the auxiliary loss, SAELens's."""
    return Run(
        {"architecture": "topk", "k": int(l0), "aux_loss_coefficient": 1.0, "decoder_init_norm": 1.0},
        training={"dead_feature_window": 100},
    )


VARIANTS: dict[str, Callable[[float, int], Run]] = {
    f.__name__: f
    for f in (
        recommended,
        batchtopk,
        batchtopk_annealed,
        hard_from_start,
        jumprelu_finish,
        guarded_l1,
        mcp,
        aen_gated,
        topk,
        jumprelu,
        l1,
        l1_resampled,
        gated,
    )
}
