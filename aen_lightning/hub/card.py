"""The model card: what is in the repository, how to load it, how it was trained and measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformer_lens.supported_models import MODEL_ALIASES

from aen_lightning.hub.markdown import code, number, table
from aen_lightning.runs.provenance import is_local_path
from aen_lightning.spelling import printable

_BEGIN = "<!-- aen-lightning: this part is written by `aen push`; text outside of it is kept -->"
_END = "<!-- aen-lightning: end -->"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TAGS = ("saelens", "sparse-autoencoder", "mechanistic-interpretability")
_FIRST_METRICS = ("l0", "explained_variance", "dead_features_pct", "mse", "shrinkage_ratio")
_TRAINING_METRICS = ("l0", "explained_variance", "mse", "shrinkage_ratio", "dead_features")
_SCALING = {
    "none": "none needed",
    "constant_norm_rescale": (
        "each token to norm sqrt(d_in), undone on the way out; done by the dictionary itself"
    ),
    "layer_norm": "layer norm, undone on the way out; done by the dictionary itself",
}


@dataclass(frozen=True)
class Entry:
    """A dictionary as the card shows it: its ID and its published ``cfg.json``."""

    sae_id: str
    cfg: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """SAELens metadata."""
        return dict(self.cfg.get("metadata") or {})

    @property
    def provenance(self) -> dict[str, Any]:
        """What ``provenance.collect`` found."""
        return dict(self.metadata.get("provenance") or {})


def render_card(
    repo_id: str,
    entries: Sequence[Entry],
    *,
    existing: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    license_name: str | None = None,
    revision: str = "main",
) -> str:
    """The README of a repository of dictionaries.

    Args:
        repo_id: ``OWNER/REPO``.
        entries: All dictionaries that the repository will hold.
        existing: The README it has now: text and metadata of other hands are kept.
        base_model: Hub ID of the language model, where the dictionaries' metadata has none.
        dataset: Hub ID of the data set, likewise.
        license_name: For the card's ``license``.
        revision: Branch that it is for.
    """
    data, before, after = _existing(existing, repo_id)
    ours = ModelCardData(
        library_name="saelens",
        tags=[*_TAGS, *_tags(entries)],
        base_model=_one_or_many([base_model] if base_model else _base_models(entries)),
        datasets=[dataset] if dataset else _datasets(entries) or None,
        license=license_name,
    ).to_dict()
    tags = list(dict.fromkeys([*(data.get("tags") or []), *ours["tags"]]))
    data = {**data, **ours, "tags": tags}
    card = ModelCard(
        f"---\n{ModelCardData(**data).to_yaml()}\n---\n"
        f"{before}{_BEGIN}\n{printable(_body(repo_id, entries, revision))}\n{_END}\n{after}"
    )
    return str(card.content)


def _existing(text: str | None, repo_id: str) -> tuple[dict[str, Any], str, str]:
    if text is None:
        return {}, f"\n# {repo_id.rsplit('/', 1)[-1]}\n\n", ""
    card = ModelCard(text, ignore_metadata_errors=True)
    before, begin, rest = card.text.partition(_BEGIN)
    if not begin:
        return card.data.to_dict(), f"{card.text.rstrip()}\n\n", ""
    return card.data.to_dict(), before, rest.partition(_END)[2].lstrip("\n")


def _body(repo_id: str, entries: Sequence[Entry], revision: str) -> str:
    sections = [
        "Sparse autoencoders in [SAELens](https://github.com/decoderesearch/SAELens) format. "
        "They take and return raw, unscaled activations.",
        _overview(entries),
        _usage(repo_id, entries, revision),
        _evaluation(entries),
        _training(entries),
        _dashboards(repo_id, entries, revision),
        _method(entries),
    ]
    return "\n\n".join(section for section in sections if section)


def _overview(entries: Sequence[Entry]) -> str:
    rows = []
    for e in entries:
        m, scaling = e.metadata, e.cfg.get("normalize_activations", "none")
        rows.append(
            [
                f"`{e.sae_id}`", e.cfg.get("architecture", "standard"), m.get("training_architecture"),
                e.cfg["d_in"], e.cfg["d_sae"], e.cfg.get("dtype"), m.get("model_name"),
                code(m.get("hook_name")), _SCALING.get(scaling, scaling),
            ]
        )  # fmt: skip
    head = ["ID", "architecture", "trained as", "d_in", "d_sae", "dtype", "model", "hook", "input scaling"]
    return "## Dictionaries\n\n" + table(head, rows)


def _usage(repo_id: str, entries: Sequence[Entry], revision: str) -> str:
    first = entries[0]
    plugin = any(e.cfg.get("architecture") == "aen" for e in entries)
    needs = (
        "import aen_lightning  # pip install aen-lightning: registers the architecture `aen`\n"
        if plugin
        else ""
    )
    pinned = f"""```python
{needs}from huggingface_hub import snapshot_download
from sae_lens import SAE

folder = snapshot_download("{repo_id}", revision="{revision}", allow_patterns="{first.sae_id}/*")  # a branch, tag or commit
sae = SAE.load_from_disk(f"{{folder}}/{first.sae_id}")
```"""
    if revision != "main":  # SAE.from_pretrained knows no other
        return f"## Use\n\n{pinned}"
    return f"""## Use

```python
{needs}from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{first.sae_id}")
feature_acts = sae.encode(activations)  # (..., {first.cfg["d_in"]}) -> (..., {first.cfg["d_sae"]})
reconstruction = sae.decode(feature_acts)
```

At a fixed revision:

{pinned}"""


def _evaluation(entries: Sequence[Entry]) -> str:
    sections = ["## Evaluation"]
    held_out = {e.sae_id: e.provenance.get("evaluation") or {} for e in entries}
    if any(held_out.values()):
        sections.append(
            "On held-out tokens, the last values logged; errors are in the space the dictionary trained in "
            "(after input scaling)."
        )
        sections.append(_metric_table(held_out))
    in_training = {
        e.sae_id: {
            name: value
            for key, value in (e.provenance.get("training_metrics") or {}).items()
            if (name := key.removeprefix("metrics/").removeprefix("sparsity/")) in _TRAINING_METRICS
        }
        for e in entries
        if not held_out[e.sae_id]
    }
    if any(in_training.values()):
        sections.append("Not measured on held-out tokens; on the last training batch that was logged:")
        sections.append(_metric_table(in_training))
    if len(sections) == 1:
        sections.append("No metrics were recorded.")
    return "\n\n".join(sections)


def _metric_table(found: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    names.sort(key=lambda n: (_FIRST_METRICS.index(n) if n in _FIRST_METRICS else len(_FIRST_METRICS), n))
    rows = [[f"`{sae_id}`", *(number(metrics.get(n)) for n in names)] for sae_id, metrics in found.items()]
    return table(["ID", *names], rows)


def _training(entries: Sequence[Entry]) -> str:
    rows, recipes = [], []
    for e in entries:
        p, m = e.provenance, e.metadata
        environment = p.get("environment_at_publishing") or {}
        rows.append(
            [
                f"`{e.sae_id}`", m.get("dataset_path"), m.get("context_size"),
                number(p.get("n_training_samples")), number(p.get("n_training_steps")),
                p.get("seed"), m.get("sae_lens_training_version"),
                ", ".join(f"{k} {v}" for k, v in environment.items()),
                code(p.get("git_commit_at_publishing")),
            ]
        )  # fmt: skip
        settings = p.get("recipe") or m.get("training_architecture_details")
        if settings:
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120).rstrip()
            recipes.append(
                f"<details><summary><code>{e.sae_id}</code></summary>\n\n```yaml\n{text}\n```\n\n</details>"
            )
    head = [
        "ID", "data set", "context", "tokens", "steps", "seed", "SAELens in training",
        "installed when published", "git commit when published",
    ]  # fmt: skip
    common = []
    for column in (-2, -1):  # what is the same for all stands once
        values = {row[column] for row in rows}
        if len(rows) > 1 and len(values) == 1 and (value := values.pop()):
            common.append(f"{head[column].capitalize()}: {value}.")
            for row in rows:
                row[column] = None
    return "\n\n".join(["## Training", table(head, rows), *common, *recipes])


def _dashboards(repo_id: str, entries: Sequence[Entry], revision: str) -> str:
    entry = next((e for e in entries if not missing_for_dashboards(e.metadata)), None)
    if entry is None:
        return ""
    m = entry.metadata
    dataset = m["dataset_path"] if isinstance(m["dataset_path"], str) else m["dataset_path"][0]
    name = repo_id.rsplit("/", 1)[-1]
    at = "" if revision == "main" else f" --revision {revision}"
    return f"""## Feature dashboards

With [SAEDashboard](https://github.com/jbloomAus/SAEDashboard), in Neuronpedia's format:

```sh
hf download {repo_id}{at} --include "{entry.sae_id}/*" --local-dir {name}
neuronpedia-runner --from-local-sae --sae-set {name} --sae-path {name}/{entry.sae_id} --np-set-name {name} \\
    --dataset-path {dataset} --n-tokens-in-prompt {m["context_size"]} --output-dir neuronpedia_outputs
```"""


def _method(entries: Sequence[Entry]) -> str:
    if not any(e.metadata.get("training_architecture") == "aen" for e in entries):
        return ""
    return """## Method

`aen`: adaptive elastic net sparse autoencoders, F. Chaudhry, K. Yano, A. Monod, *Feature Starvation as Geometric Instability in
Sparse Autoencoders*, [arXiv:2605.05341](https://arxiv.org/abs/2605.05341)."""


def missing_for_dashboards(metadata: dict[str, Any]) -> list[str]:
    """Metadata that SAEDashboard's and Neuronpedia's runners read and this dictionary lacks."""
    return [
        key for key in ("model_name", "hook_name", "context_size", "dataset_path") if not metadata.get(key)
    ]


def _tags(entries: Sequence[Entry]) -> list[str]:
    trained = {str(e.metadata.get("training_architecture") or e.cfg.get("architecture")) for e in entries}
    return sorted(printable(name) for name in trained - {"None"})


def _one_or_many(values: list[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else values or None


def _base_models(entries: Sequence[Entry]) -> list[str]:
    official = {alias.lower(): name for name, aliases in MODEL_ALIASES.items() for alias in aliases}
    names = [str(e.metadata.get("model_name") or "") for e in entries]
    return list(dict.fromkeys(i for n in names if (i := hub_id(official.get(n.lower(), n)))))


def _datasets(entries: Sequence[Entry]) -> list[str]:
    paths = [e.metadata.get("dataset_path") for e in entries]
    flat = [str(p) for path in paths for p in (path if isinstance(path, list) else [path]) if p]
    return list(dict.fromkeys(i for p in flat if not p.startswith("synthetic/") and (i := hub_id(p))))


def hub_id(name: str) -> str | None:
    """``name`` if it can be ``OWNER/NAME`` on the Hub and is nothing on this machine."""
    return name if _HUB_ID.fullmatch(name) and not is_local_path(name) and not Path(name).exists() else None
