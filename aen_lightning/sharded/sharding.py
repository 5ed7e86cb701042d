"""How the features of one SAE lie on the ranks, and the collectives that the parts need."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

FEATURE_DIM = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "b_dec": None}
"""Along which dimension a parameter holds the features; None: it has none, and every rank holds it whole."""


class FeatureSharding:
    """Feature ``j`` of ``d_sae`` belongs to one rank, which holds its encoder column, bias and decoder row.

    Ranks hold equally many features, in order, the last ones fewer where ``d_sae`` is no multiple (as DTensor
    splits). Every rank has the whole batch.

    Args:
        mesh: One-dimensional, the ranks that share the features.
        d_sae: Number of features.

    Raises:
        ValueError: If a rank would hold none.
    """

    def __init__(self, mesh: DeviceMesh, d_sae: int) -> None:
        self.mesh, self.d_sae = mesh, d_sae
        self.rank, self.world_size = mesh.get_local_rank(), mesh.size()
        self.most = -(-d_sae // self.world_size)
        if self.most * (self.world_size - 1) >= d_sae:
            raise ValueError(
                f"d_sae {d_sae} leaves the last of {self.world_size} ranks without features "
                f"({self.most} on each before it): take fewer ranks, or a multiple of {self.world_size}"
            )
        self.part = slice(self.rank * self.most, min(d_sae, (self.rank + 1) * self.most))
        """The features of this rank."""

    @property
    def n_local(self) -> int:
        """Number of features on this rank."""
        return self.part.stop - self.part.start

    @property
    def _group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    # --- storage -------------------------------------------------------------------------------------------
    def parameter(self, name: str, whole: Tensor, device: torch.device) -> nn.Parameter:
        """This rank's part of a whole parameter, as a DTensor, which checkpoints know how to put together."""
        dim = FEATURE_DIM[name]
        local = whole if dim is None else whole.narrow(dim, self.part.start, self.n_local)
        return nn.Parameter(
            DTensor.from_local(
                local.detach().to(device, copy=True).contiguous(),
                self.mesh,
                [Replicate() if dim is None else Shard(dim)],
                run_check=False,
                shape=whole.shape,
                stride=(whole.shape[1], 1) if whole.ndim == 2 else (1,),
            )
        )

    # --- collectives ---------------------------------------------------------------------------------------
    def sum(self, partial: Tensor) -> Tensor:
        """Sum over the ranks, in at least float32; its gradient is every summand's gradient."""
        out: Tensor = _Sum.apply(partial.to(torch.promote_types(partial.dtype, torch.float32)), self._group)
        return out

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the ranks, without gradient, into a new tensor."""
        out = tensor.detach().clone()
        dist.all_reduce(out, op=op, group=self._group)
        return out

    def stack(self, local: Tensor) -> Tensor:
        """Every rank's tensor, of one shape, along a new first dimension; without gradient."""
        local = local.detach().contiguous()
        out = local.new_empty(self.world_size, *local.shape)
        dist.all_gather(list(out.unbind()), local, group=self._group)
        return out

    def gather(self, local: Tensor) -> Tensor:
        """The whole of a tensor of shape (n_local, ...): (d_sae, ...), without gradient."""
        padded = local.detach().new_zeros(self.most, *local.shape[1:])
        padded[: self.n_local] = local.detach()
        return self.stack(padded).flatten(0, 1)[: self.d_sae]

    def token_share(self, *rows: Tensor, feature_acts: Tensor) -> tuple[Tensor, ...]:
        """This rank's share of the tokens, with all features: what a data-parallel rank would have.

        Metrics, which add over ranks, then need to know nothing of the parts.

        Args:
            *rows: Whole tensors of shape (batch, ...), equal on every rank.
            feature_acts: This rank's features, shape (batch, n_local).

        Returns:
            The rows, then the activations of shape (share, d_sae), without gradient.
        """
        bounds = [len(feature_acts) * r // self.world_size for r in range(self.world_size + 1)]
        n_tokens = [stop - start for start, stop in pairwise(bounds)]
        mine = slice(bounds[self.rank], bounds[self.rank + 1])
        widths = [min(self.d_sae, (r + 1) * self.most) - r * self.most for r in range(self.world_size)]
        sent = feature_acts.detach().contiguous().flatten()
        received = sent.new_empty(n_tokens[self.rank] * self.d_sae)
        dist.all_to_all_single(
            received,
            sent,
            [n_tokens[self.rank] * width for width in widths],
            [n * self.n_local for n in n_tokens],
            group=self._group,
        )
        blocks = received.split([n_tokens[self.rank] * width for width in widths])
        acts = torch.cat([b.view(-1, w) for b, w in zip(blocks, widths, strict=True)], dim=1)
        return (*(r.detach()[mine] for r in rows), acts)

    # --- selection -----------------------------------------------------------------------------------------
    def keep_largest(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Which of this rank's entries are among the ``k`` largest of all ranks, row by row.

        Each rank sends its ``min(k, n)`` largest. Ties are broken somehow, the same on every rank, so that
        exactly ``k`` are kept.

        Args:
            values: Shape (rows, n); ``n`` may differ between ranks, at most ``most``-fold of one feature's.
            k: At most the number of entries of all ranks in a row.

        Returns:
            Positions in ``values`` and whether each is kept, both (rows, min(k, n)).
        """
        rows, n = values.shape
        # the rank with most features has the widest rows; the others fill up
        width = min(k, n * self.most // self.n_local)
        found = values.detach().topk(min(k, n), dim=-1, sorted=False)
        candidates = values.new_full((rows, width), -torch.inf)
        candidates[:, : found.values.shape[1]] = found.values
        everyone = self.stack(candidates).transpose(0, 1).flatten(1)
        kept = torch.zeros_like(everyone, dtype=torch.bool)
        kept.scatter_(1, everyone.topk(k, dim=-1, sorted=False).indices, True)
        mine = kept[:, self.rank * width :][:, : found.values.shape[1]]
        return found.indices, mine

    # --- safety --------------------------------------------------------------------------------------------
    def check_same(self, batch: Tensor) -> None:
        """See that every rank has the same batch, without which the parts do not make one SAE.

        Raises:
            ValueError: If they differ.
        """
        x = batch.detach().double()
        weights = torch.arange(1, len(x) + 1, device=x.device, dtype=x.dtype)
        said = torch.stack([x.new_tensor(len(x)), x.sum(), x.square().sum(), weights @ x.sum(dim=1)])
        everyone = self.stack(said)
        if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
            raise ValueError(
                "features are sharded over the ranks, so every rank needs the same whole batch, but the ranks' "
                f"batches differ (tokens: {everyone[:, 0].int().tolist()}): let the data depend on the seed "
                "alone, as the data modules of aen_lightning.data do"
            )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        out = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Encode(torch.autograd.Function):
    """``(x - b_dec) @ W_enc + b_enc`` for this rank's features, with the gradient of ``b_dec`` over all.

    That gradient is ``-W_enc @ sum_b d`` with d the gradient of the result, a product with a vector: autograd
    would multiply the whole batch by ``W_enc`` for it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, group: Any
    ) -> Tensor:
        centred = x if b_dec is None else x - b_dec
        ctx.save_for_backward(centred, W_enc)
        ctx.has_b_dec, ctx.group, ctx.b_enc_dtype = b_dec is not None, group, b_enc.dtype
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.product_dtype = torch.get_autocast_dtype(device) if autocast else W_enc.dtype
        return centred @ W_enc + b_enc

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (centred, W_enc), (grad,) = ctx.saved_tensors, grads
        total = grad.sum(dim=0, dtype=torch.promote_types(grad.dtype, torch.float32))
        if not ctx.has_b_dec:
            b_dec_grad = None
        else:
            b_dec_grad = -(W_enc.to(total.dtype) @ total)
            dist.all_reduce(b_dec_grad, group=ctx.group)
            b_dec_grad = b_dec_grad.to(W_enc.dtype)
        W_enc_grad = (centred.to(ctx.product_dtype).T @ grad.to(ctx.product_dtype)).to(W_enc.dtype)
        return None, W_enc_grad, total.to(ctx.b_enc_dtype), b_dec_grad, None


def encode(
    sharding: FeatureSharding, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None
) -> Tensor:
    """Pre-activations of this rank's features, shape (batch, n_local).

    Args:
        sharding: Whose part the weights are.
        x: The whole batch, shape (batch, d_in); no gradient flows into it.
        W_enc: Shape (d_in, n_local).
        b_enc: Shape (n_local,).
        b_dec: Subtracted from ``x``, shape (d_in,); None: nothing is. Its gradient is that over all features.
    """
    return cast(Tensor, _Encode.apply(x, W_enc, b_enc, b_dec, sharding.mesh.get_group()))
