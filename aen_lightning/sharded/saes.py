"""Training SAEs that hold the features of one rank; each overrides only what crosses the parts.

Parameters are DTensors, which is how they are stored; all arithmetic is on their local parts. Vectors of one number
a feature that are no parameters (running means, L1 weights, firing counts) are whole on every rank: they are small,
and then the reference level and the guard are what they are on one rank.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.distributed as dist
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE, TrainingSAE, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import act_times_W_dec
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from typing_extensions import override

from aen_lightning.metrics import firing_counts
from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.saes.aen_config import HardFinishName
from aen_lightning.saes.penalty import elastic_net_terms
from aen_lightning.saes.step_schedule import StepSchedule
from aen_lightning.saes.tangent import without_radial_gradient
from aen_lightning.sharded.sharding import FeatureSharding, encode


class FeatureSharded:
    """Mixin of a training SAE whose features are sharded over ranks; on the meta device until :meth:`shard`."""

    cfg: Any
    dtype: torch.dtype
    sharding: FeatureSharding | None = None

    @property
    def parts(self) -> FeatureSharding:
        """How the features lie on the ranks.

        Raises:
            RuntimeError: Before :meth:`shard`.
        """
        if self.sharding is None:
            raise RuntimeError("the sharded SAE has no weights yet: a Trainer makes them when its fit begins")
        return self.sharding

    def local(self, name: str) -> Tensor:
        """This rank's part of a parameter, differentiable."""
        parameter: DTensor = getattr(self, name)
        return parameter.to_local()

    def shard(self, whole: TrainingSAE[Any], mesh: DeviceMesh, device: torch.device) -> None:
        """Take this rank's part of the weights of ``whole``, which is of the same config, and all of its state."""
        self.sharding = FeatureSharding(mesh, self.cfg.d_sae)
        module = cast(nn.Module, self)
        for name, parameter in whole.named_parameters():
            setattr(module, name, self.sharding.parameter(name, parameter, device))
        for name, buffer in whole.named_buffers():
            setattr(module, name, buffer.to(device, copy=True))

    def own_part(self) -> TrainingSAE[Any]:
        """An SAE of this rank's features alone, of the architecture's own class, whose weights are these weights."""
        module, part = cast(nn.Module, self), self.parts.part
        cfg = copy.deepcopy(self.cfg)
        device, cfg.device, cfg.d_sae = cfg.device, "meta", self.parts.n_local
        sae = SAE_TRAINING_CLASS_REGISTRY[cfg.architecture()][0](cfg)
        state: dict[str, Tensor] = {}
        for name, value in module.state_dict().items():
            if isinstance(value, DTensor):
                state[name] = value.to_local()
            else:
                state[name] = value[part] if value.shape == (self.cfg.d_sae,) else value
        sae.load_state_dict(state, assign=True)
        return cast("TrainingSAE[Any]", sae.to(device=device))

    def whole_firing_counts(self, feature_acts: Tensor) -> Tensor:
        """How often each feature fired, shape (d_sae,), int64, from this rank's activations."""
        return self.parts.gather(firing_counts(feature_acts))

    # --- what is common to the architectures ---------------------------------------------------------------
    def hidden_pre(self, x: Tensor) -> Tensor:
        """Pre-activations of this rank's features, shape (batch, n_local)."""
        b_dec = self.local("b_dec") if self.cfg.apply_b_dec_to_input else None
        return encode(self.parts, x.to(self.dtype), self.local("W_enc"), self.local("b_enc"), b_dec)


class ShardedAENTrainingSAE(FeatureSharded, AENTrainingSAE):
    """``aen`` with features sharded over ranks."""

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = self.hidden_pre(x)
        return self.activation_fn(hidden_pre), hidden_pre

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        W_dec = self.local("W_dec")
        if self.cfg.remove_radial_gradient:
            W_dec = without_radial_gradient(W_dec)
        return self.parts.sum(feature_acts @ W_dec) + self.local("b_dec")

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        own = elastic_net_terms(feature_acts, self.l1_weights[self.parts.part], self._slopes(feature_acts))
        l1, l2 = self.parts.sum(torch.stack(own)).unbind()
        return {
            "l1_loss": step_input.coefficients["l1"] * l1,
            "l2_loss": self._l2_coefficient(step_input) * l2,
        }

    @override
    def observe_and_refresh(
        self, mean_feature_acts: Tensor, n_firings: Tensor | None, n_tokens: int, schedule: StepSchedule
    ) -> None:
        if not self.training:
            return
        if n_firings is None:
            mean_feature_acts = self.parts.gather(mean_feature_acts)
        else:  # one collective for both; float32 counts exactly up to 16 million tokens
            own = torch.stack((mean_feature_acts, n_firings.to(mean_feature_acts.dtype)), dim=1)
            mean_feature_acts, n_firings = self.parts.gather(own).unbind(dim=1)
        super().observe_and_refresh(mean_feature_acts, n_firings, n_tokens, schedule)

    @override
    @torch.no_grad()
    def normalize_decoder(self) -> None:
        W_dec, norm = self.local("W_dec"), self.decoder_norm[self.parts.part]
        exact = W_dec.to(norm.dtype)
        W_dec.copy_(exact.addcmul(exact, self._row_growth(exact, norm)))

    @override
    def prepare_hard_phase(self, finish: HardFinishName) -> None:
        if finish == "jumprelu":
            self.harden(1, finish)

    @override
    def harden(self, k: float, finish: HardFinishName = "batchtopk") -> None:
        raise NotImplementedError("a hard phase (HardFinish) is not supported with shard_features")


class ShardedTopKTrainingSAE(FeatureSharded, TopKTrainingSAE):
    """SAELens's ``topk`` with features sharded over ranks: the ``k`` largest of all ranks, token by token."""

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = self.hidden_pre(x)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.local("W_dec").norm(dim=-1)
        return self._select(hidden_pre), hidden_pre

    def _select(self, hidden_pre: Tensor) -> Tensor:
        return self._largest(hidden_pre, int(self.cfg.k)).relu()

    def _largest(self, values: Tensor, k: int) -> Tensor:
        """The ``k`` largest of each row over all ranks, this rank's part of them, zeros elsewhere."""
        positions, kept = self.parts.keep_largest(values, k)
        found = torch.where(kept, values.gather(-1, positions), values.new_zeros(()))
        return torch.zeros_like(values).scatter(-1, positions, found)

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return self._times_W_dec(feature_acts) + self.local("b_dec")

    def _times_W_dec(self, feature_acts: Tensor) -> Tensor:
        rescale = self.cfg.rescale_acts_by_decoder_norm
        return self.parts.sum(act_times_W_dec(feature_acts, self.local("W_dec"), rescale))

    @override
    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        # SAELens's, with the largest taken over all ranks; the mask is of all features
        if dead_neuron_mask is None or (n_dead := int(dead_neuron_mask.sum())) == 0:
            return sae_out.new_tensor(0.0)
        residual = (sae_in - sae_out).detach()
        k_aux = sae_in.shape[-1] // 2
        scale = min(n_dead / k_aux, 1.0)
        dead = dead_neuron_mask[self.parts.part]
        among_dead = torch.where(dead, hidden_pre, hidden_pre.new_tensor(-torch.inf))
        recons = self._times_W_dec(self._largest(among_dead, min(k_aux, n_dead)))
        auxk_loss = (recons - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * scale * auxk_loss


class ShardedBatchTopKTrainingSAE(ShardedTopKTrainingSAE, BatchTopKTrainingSAE):
    """SAELens's ``batchtopk`` with features sharded over ranks: the ``k * batch`` largest of all ranks."""

    @override
    def _select(self, hidden_pre: Tensor) -> Tensor:
        acts = hidden_pre.relu()
        return self._largest(acts.reshape(1, -1), int(self.cfg.k * len(acts))).view_as(acts)

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        infinite = acts_topk.new_tensor(torch.inf)
        least = self.parts.all_reduce(
            torch.where(acts_topk > 0, acts_topk, infinite).min(), op=dist.ReduceOp.MIN
        )
        super().update_topk_threshold(torch.where(least < infinite, least, 0).reshape(1, 1))


_CLASSES: dict[str, type[TrainingSAE[Any]]] = {
    "aen": ShardedAENTrainingSAE,
    "topk": ShardedTopKTrainingSAE,
    "batchtopk": ShardedBatchTopKTrainingSAE,
}


def empty_sharded_sae(cfg: TrainingSAEConfig) -> TrainingSAE[Any]:
    """An SAE for sharding, without weights until :meth:`FeatureSharded.shard` gives it this rank's.

    Raises:
        ValueError: For what cannot be sharded.
    """
    check_can_shard(cfg)
    cfg = copy.deepcopy(cfg)
    if isinstance(getattr(cfg, "sparse_step", None), str):
        cfg.sparse_step = "off"
    device, cfg.device = cfg.device, "meta"
    sae = _CLASSES[cfg.architecture()](cfg)
    sae.cfg.device = device
    for name, parameter in list(sae.named_parameters()):  # nothing, so that moving the module does no harm
        setattr(sae, name, nn.Parameter(torch.empty(0, dtype=parameter.dtype)))
    for name, buffer in list(sae.named_buffers()):
        setattr(sae, name, torch.empty(0, dtype=buffer.dtype))
    return sae


def check_can_shard(cfg: TrainingSAEConfig) -> None:
    """Refuse what the sharded step does not compute.

    Raises:
        ValueError: With what to change.
    """
    architecture = cfg.architecture()
    if architecture not in _CLASSES:
        raise ValueError(
            f"shard_features can train {', '.join(_CLASSES)}, not architecture {architecture!r}: train it whole "
            "on each GPU (strategy ddp)"
        )
    for name, refused, mend in (
        ("normalize_activations", ("constant_norm_rescale", "layer_norm"), "the data module's input_scaling"),
        ("sparse_step", ("on",), "'auto' or 'off': the step on the non-zeros is not sharded"),
        ("use_sparse_activations", (True,), "false"),
    ):
        if (value := getattr(cfg, name, None)) in refused:
            raise ValueError(f"shard_features does not go with {name}={value!r}: use {mend}")
    if getattr(cfg, "hard_k", None) is not None:
        raise ValueError("shard_features does not go with hard_k: leave it out")
    if getattr(cfg, "hard_finish", None) == "jumprelu":
        raise ValueError("shard_features does not go with hard_finish='jumprelu': leave it out")
