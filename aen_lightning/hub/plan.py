"""What would be published: made without the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from aen_lightning.files import human_size
from aen_lightning.hub.card import Entry, hub_id, missing_for_dashboards, render_card
from aen_lightning.hub.staging import PublishedArchitecture, stage
from aen_lightning.runs.dictionary import find_dictionaries

README = "README.md"
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass
class Plan:
    """What would be published: made without the network.

    Args:
        repo_id: ``OWNER/REPO``.
        entries: The dictionaries, as the card shows them.
        files: Path in the repository to path on disk.
        notes: What the reader of a dry run should know.
        card_options: Passed on to :func:`~aen_lightning.hub.card.render_card`.
    """

    repo_id: str
    entries: list[Entry]
    files: dict[str, Path]
    notes: list[str] = field(default_factory=list)
    card_options: dict[str, str | None] = field(default_factory=dict)

    def card(
        self, existing: str | None = None, others: Sequence[Entry] = (), revision: str | None = None
    ) -> str:
        """The README of a branch, with the dictionaries that it holds already."""
        mine = {e.sae_id for e in self.entries}
        entries = sorted(
            [*self.entries, *(e for e in others if e.sae_id not in mine)], key=lambda e: e.sae_id
        )
        return render_card(
            self.repo_id, entries, existing=existing, revision=revision or "main", **self.card_options
        )

    def tree(self) -> str:
        """The files with their sizes, a line each, and the sum."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes[README] = len(self.card().encode())
        lines = [f"{human_size(size):>10}  {name}" for name, size in sorted(sizes.items())]
        return "\n".join([*lines, f"{human_size(sum(sizes.values())):>10}  in {len(sizes)} files"])


@contextmanager
def plan_push(
    root: str | Path,
    repo_id: str,
    *,
    architecture: PublishedArchitecture = "standard",
    sae_id: str | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
    license_name: str | None = None,
) -> Iterator[Plan]:
    """Prepare what :func:`push` publishes; the plan's files last as long as the context.

    Raises:
        ValueError: For a name that cannot be a repository, or a dictionary that cannot be published.
        FileNotFoundError: If there is no dictionary.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"the repository must be given as OWNER/REPO, got {repo_id!r}")
    if architecture not in ("standard", "aen"):
        raise ValueError(f"architecture must be 'standard' or 'aen', got {architecture!r}")
    dictionaries = find_dictionaries(root, sae_id=sae_id)
    with TemporaryDirectory(prefix="aen-push-") as temporary:
        plan = Plan(
            repo_id, [], {}, card_options={"base_model": None, "dataset": None, "license_name": license_name}
        )
        for number, dictionary in enumerate(dictionaries):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            cfg, files = stage(
                dictionary, folder, architecture=architecture, model_name=model_name, dataset=dataset
            )
            plan.entries.append(Entry(dictionary.sae_id, cfg))
            plan.files |= {f"{dictionary.sae_id}/{name}": path for name, path in files.items()}
        plan.notes += _notes(plan.entries)
        yield plan


def _notes(entries: Sequence[Entry]) -> list[str]:
    notes = []
    for e in entries:
        if e.metadata.get("model_name") is None and str(e.metadata.get("dataset_path", "")).startswith(
            "synthetic/"
        ):
            continue
        missing = missing_for_dashboards(e.metadata)
        if missing:
            notes.append(
                f"{e.sae_id}: no {', '.join(missing)} in its metadata; SAEDashboard and Neuronpedia need them"
            )
        model_name = e.metadata.get("model_name")
        if model_name and hub_id(str(model_name)) is None and "/" not in str(model_name):
            notes.append(
                f"{e.sae_id}: model_name is {model_name!r}; if that is a folder, give the Hub's name with "
                f"--model_name"
            )
    return notes
