"""What a dictionary costs its language model: cross-entropy and KL with the reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from aen_lightning.evaluate.dictionary import run_dictionary
from aen_lightning.evaluate.inputs import TextInputs
from aen_lightning.language_model.hook_points import Hook
from aen_lightning.metrics import Estimate, estimate, jackknife
from aen_lightning.progress import counted as in_progress

Ablate = Literal["all", "counted"]
CONDITIONS = ("clean", "spliced", "zero_ablated", "mean_ablated")


@contextmanager
def replaced_activation(
    lm: Any, hook: Hook, replace: Callable[[Tensor], Tensor], shape: torch.Size
) -> Iterator[None]:
    """While open, forward passes of ``lm`` go on with ``replace(activation)`` at the hook.

    Args:
        lm: A transformers causal LM.
        hook: Where.
        replace: From (batch, context, d_in) to the same shape.
        shape: (batch, context) of the coming passes; some families flatten it inside a block.

    Raises:
        ValueError: For a hook that only reads the residual stream beside its way (``hook_resid_mid``).
    """
    if hook.reads == "input" and hook.hook_name.endswith("hook_resid_mid"):
        raise ValueError(
            f"cannot splice at {hook.hook_name!r}: the norm that reads it has a copy, and the residual "
            "stream goes past it; "
            "skip the downstream metrics, or take hook_resid_post"
        )

    def swap(x: Tensor) -> Tensor:
        return replace(x.reshape(*shape, hook.d_in)).to(x.dtype).reshape(x.shape)

    def on_output(_module: Any, _args: Any, output: Any) -> Any:
        return (swap(output[0]), *output[1:]) if isinstance(output, tuple) else swap(output)

    def on_input(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (swap(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": swap(kwargs["hidden_states"])}

    module = lm.base_model.get_submodule(hook.module)
    handle = (
        module.register_forward_hook(on_output)
        if hook.reads == "output"
        else module.register_forward_pre_hook(on_input, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def evaluate_downstream(
    sae: SAE[Any],
    inputs: TextInputs,
    mean_activation: Tensor,
    *,
    n_rows: int | None = None,
    batch_size_prompts: int = 4,
    ablate: Ablate = "all",
) -> dict[str, Any]:
    """Cross-entropy and KL of the next-token distribution with the activation replaced, on rows of held-out
    text.

    The reconstruction is that of raw activations, so any scaling is undone before it is spliced in. Tokens
    that do not count (special ones, norm outliers) keep their own activation then. A loss counts if the token
    it is predicted *from* counts, as in SAELens's ``run_evals``.

    Args:
        sae: The dictionary.
        inputs: Text with the whole language model (``lm``).
        mean_activation: What mean ablation puts in, shape (d_in,).
        n_rows: Rows to take, from the first; None: all.
        batch_size_prompts: Rows a model call; each makes four of (rows, context, vocabulary) logits in turn.
        ablate: ``all``: ablations replace every position, as in SAELens; ``counted``: the positions the
            dictionary replaces.

    Returns:
        The section ``downstream`` of the JSON (see :mod:`aen_lightning.evaluate`), standard errors over rows.

    Raises:
        ValueError: Without a language model, or for a hook that cannot be spliced at.
    """
    if inputs.lm is None:
        raise ValueError("downstream metrics need the whole language model: give lm")
    lm, hook = inputs.lm, inputs.hook
    device = next(lm.parameters()).device
    sums: list[Tensor] = []

    calls = inputs.rows[:n_rows].to(device).split(batch_size_prompts)
    for tokens in in_progress(calls, "splicing into the language model", len(calls)):
        counted: dict[str, Tensor] = {}

        def splice(x: Tensor, tokens: Tensor = tokens, counted: dict[str, Tensor] = counted) -> Tensor:
            keep = counted["keep"] = inputs.keep(tokens, x)
            x_hat = run_dictionary(sae, x)[1].to(x.device, x.dtype)
            return torch.where(keep.unsqueeze(-1), x_hat, x)

        def fill(x: Tensor, value: Tensor, tokens: Tensor = tokens) -> Tensor:
            filled = value.to(x.device, x.dtype).expand_as(x)
            return filled if ablate == "all" else torch.where(inputs.keep(tokens, x).unsqueeze(-1), filled, x)

        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            "spliced": splice,
            "zero_ablated": lambda x: fill(x, torch.zeros(())),
            "mean_ablated": lambda x: fill(x, mean_activation),
        }
        clean = log_softmax(lm(input_ids=tokens, use_cache=False).logits.float(), dim=-1)
        losses, divergences = [_losses(clean, tokens)], [torch.zeros(tokens.shape, device=device)]
        for replace in replacements.values():
            with replaced_activation(lm, hook, replace, tokens.shape):
                logits = lm(input_ids=tokens, use_cache=False).logits.float()
            changed = log_softmax(logits, dim=-1)
            losses.append(_losses(changed, tokens))
            divergences.append(kl_div(changed, clean, reduction="none", log_target=True).sum(dim=-1))
        keep = counted["keep"].to(device)
        ce = (torch.stack(losses) * keep[:, :-1]).sum(dim=-1)
        kl = (torch.stack(divergences) * keep).sum(dim=-1)
        n = torch.stack([keep[:, :-1].sum(dim=-1), keep.sum(dim=-1)])
        sums.append(torch.cat([ce, kl, n]).T.double().cpu())
    return _summary(torch.cat(sums), ablate)


def _losses(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Loss of predicting each next token, shape (rows, context - 1)."""
    return cross_entropy(log_probs[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def _summary(sums: Tensor, ablate: Ablate) -> dict[str, Any]:
    """From sums per row: 4 of losses, 4 of divergences, 2 counts."""
    n_losses, n_divergences = (int(n) for n in sums[:, 8:].sum(dim=0))
    if n_losses == 0:
        raise ValueError("no token is left for the downstream metrics: every one is special; give other data")

    def of(statistic: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
        value, se = jackknife(sums, lambda s: statistic(s[:4] / s[8], s[4:8] / s[9]))
        return estimate(value, se)

    def by_name(
        statistic: Callable[[Tensor, Tensor, int], Tensor], first: int, end: str = ""
    ) -> dict[str, Estimate]:
        return {
            name.removesuffix(end): of(partial(_at_index, statistic, i))
            for i, name in enumerate(CONDITIONS)
            if i >= first
        }

    return {
        "n_tokens": n_losses,
        "n_tokens_kl": n_divergences,
        "n_rows": len(sums),
        "ablate": ablate,
        "ce": by_name(lambda ce, kl, i: ce[i], 0),
        "ce_increase": by_name(lambda ce, kl, i: ce[i] - ce[0], 1),
        "ce_recovered": by_name(lambda ce, kl, i: 1 - (ce[1] - ce[0]) / (ce[i] - ce[0]), 2, "_ablated"),
        "kl": by_name(lambda ce, kl, i: kl[i], 1),
        "kl_recovered": by_name(lambda ce, kl, i: 1 - kl[1] / kl[i], 2, "_ablated"),
    }


def _at_index(statistic: Callable[[Tensor, Tensor, int], Tensor], i: int, ce: Tensor, kl: Tensor) -> Tensor:
    return statistic(ce, kl, i)
