"""Whether few features of a dictionary hold what a text is: sparse probing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from aen_lightning.evaluate.dictionary import run_dictionary
from aen_lightning.evaluate.inputs import TextInputs
from aen_lightning.evaluate.probing_texts import TASKS, Task
from aen_lightning.progress import counted


@torch.no_grad()
def sparse_probing(
    sae: SAE[Any], inputs: TextInputs, *, tasks: Mapping[str, Task] = TASKS, sizes: Sequence[int] = (1, 2, 5)
) -> dict[str, Any]:
    """Train a linear probe on the k features that differ most between two kinds of text, and test it.

    A text is the mean over its tokens of the features' activations (or of the raw activations, for the probe
    that bounds what can be had). Features are chosen by the difference of their means over the training
    texts.

    Args:
        sae: From ``load_dictionary``.
        inputs: Gives the language model, the tokenizer and the hook; its own rows are not read.
        tasks: Labelled texts.
        sizes: The k.

    Returns:
        The section ``probing``: ``sizes``; ``tasks``: by name ``n_train``, ``n_test``, ``features`` (those of
        the largest k, the best first), ``accuracy`` (a list as long as ``sizes``), ``accuracy_of_activations``
        (of a probe on all d_in raw activations); and the means over tasks of these two.

    Source: Gurnee et al., arXiv:2305.01610; as an evaluation of dictionaries SAEBench, arXiv:2503.09532, whose
        texts are others: numbers are not to be compared with its.
    """
    texts = list(
        dict.fromkeys(text for task in tasks.values() for split in task for kind in split for text in kind)
    )
    means = {
        text: _means(sae, inputs, text)
        for text in counted(texts, "reading texts to probe", len(texts), "texts")
    }
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        (x, y), (x_test, y_test) = (_stacked(means, split, 0) for split in task)
        h, h_test = (_stacked(means, split, 1)[0] for split in task)
        difference = (h[y == 0].mean(dim=0) - h[y == 1].mean(dim=0)).abs()
        best = difference.argsort(descending=True, stable=True)[: max(sizes)]
        found[name] = {
            "n_train": len(y),
            "n_test": len(y_test),
            "features": best.tolist(),
            "accuracy": [_accuracy(h[:, best[:k]], y, h_test[:, best[:k]], y_test) for k in sizes],
            "accuracy_of_activations": _accuracy(x, y, x_test, y_test),
        }
    return {
        "sizes": list(sizes),
        "tasks": found,
        "accuracy": [sum(t["accuracy"][i] for t in found.values()) / len(found) for i in range(len(sizes))],
        "accuracy_of_activations": sum(t["accuracy_of_activations"] for t in found.values()) / len(found),
    }


def _means(sae: SAE[Any], inputs: TextInputs, text: str) -> tuple[Tensor, Tensor]:
    """Means over the tokens of a text, shapes (d_in,) and (d_sae,), float64.

    The first token is left out where there are others: nothing stands before it, and it is often an outlier.
    """
    tokens = torch.tensor([inputs.data.source.tokenizer()(text)["input_ids"]])
    x = inputs.data.language_model.activations(tokens)[inputs.hook.hook_name].float()[0]
    x = x[1:] if len(x) > 1 else x
    feature_acts = run_dictionary(sae, x)[0]
    return x.double().mean(dim=0).cpu(), feature_acts.double().mean(dim=0).cpu()


def _stacked(
    means: Mapping[str, tuple[Tensor, Tensor]], kinds: tuple[list[str], list[str]], which: int
) -> tuple[Tensor, Tensor]:
    rows = torch.stack([means[text][which] for kind in kinds for text in kind])
    return rows, torch.cat([torch.full((len(kind),), float(i)) for i, kind in enumerate(kinds)]).double()


def _accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Of a logistic regression, trained on (n, d) and labels (n,) of 0 and 1, on the test texts."""
    weights = fit_logistic(x, y)
    return float(((x_test @ weights[:-1] + weights[-1] > 0) == (y_test > 0.5)).double().mean())


@torch.enable_grad()
def fit_logistic(x: Tensor, y: Tensor, *, l2: float = 1e-2, balanced: bool = False) -> Tensor:
    """Weights and, last, the intercept of a logistic regression on standardised inputs, for inputs as they are.

    Args:
        x: Shape (n, d).
        y: Labels 0 and 1, shape (n,).
        l2: Weight of half the squared norm of the weights, beside the mean loss.
        balanced: Give a 1 the weight of as many zeros as there are for each, for labels with few ones.

    Returns:
        Shape (d + 1,), float64.
    """
    mean, std = x.double().mean(dim=0), x.double().std(dim=0, correction=0)
    scale = torch.where(std > 1e-12, 1 / std.clamp_min(1e-12), 0.0)
    z, y = (x.double() - mean) * scale, y.double()
    weight_of_ones = (len(y) - y.sum()) / y.sum() if balanced else None
    weights = torch.zeros(z.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(z @ weights[:-1] + weights[-1], y, pos_weight=weight_of_ones)
        value = value + 0.5 * l2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    plain = weights.detach()[:-1] * scale
    return torch.cat([plain, (weights.detach()[-1] - plain @ mean).unsqueeze(0)])
