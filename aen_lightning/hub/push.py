"""Publishing dictionaries: everything in one commit, or nothing."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from aen_lightning.hub.card import Entry, hub_id, missing_for_dashboards, render_card
from aen_lightning.hub.retry import N_ATTEMPTS, HubError, hub_errors, is_transient, with_retries
from aen_lightning.hub.staging import PublishedArchitecture, stage
from aen_lightning.runs.dictionary import find_dictionaries

_README = "README.md"
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME)


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

    def card(self, existing: str | None = None, others: Sequence[Entry] = (), revision: str | None = None) -> str:
        """The README of a branch, with the dictionaries that it holds already."""
        mine = {e.sae_id for e in self.entries}
        entries = sorted([*self.entries, *(e for e in others if e.sae_id not in mine)], key=lambda e: e.sae_id)
        return render_card(self.repo_id, entries, existing=existing, revision=revision or "main", **self.card_options)

    def tree(self) -> str:
        """The files with their sizes, a line each, and the sum."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes[_README] = len(self.card().encode())
        lines = [f"{human_size(size):>10}  {name}" for name, size in sorted(sizes.items())]
        return "\n".join([*lines, f"{human_size(sum(sizes.values())):>10}  in {len(sizes)} files"])


@dataclass(frozen=True)
class Published:
    """What :func:`push` did: the repository's address, the commit's hash, and the IDs it holds."""

    url: str
    commit: str
    sae_ids: list[str]


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
        plan = Plan(repo_id, [], {}, card_options={"base_model": None, "dataset": None, "license_name": license_name})
        for number, dictionary in enumerate(dictionaries):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            cfg, files = stage(dictionary, folder, architecture=architecture, model_name=model_name, dataset=dataset)
            plan.entries.append(Entry(dictionary.sae_id, cfg))
            plan.files |= {f"{dictionary.sae_id}/{name}": path for name, path in files.items()}
        plan.notes += _notes(plan.entries)
        yield plan


def push(
    root: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    architecture: PublishedArchitecture = "standard",
    sae_id: str | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
    license_name: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Published:
    """Publish every finished dictionary of a folder in one commit, with a model card.

    Safe to repeat: what arrived before is not sent again, and a push that changes nothing makes no commit. Dictionaries with other
    IDs, and card text of other hands, stay.

    Args:
        root: A run's folder, a SAELens folder, or a folder of several.
        repo_id: ``OWNER/REPO``; made if missing.
        revision: Branch; made if missing. None: ``main``.
        private: Make the repository private. An existing public one is refused.
        architecture: ``standard``: dictionaries trained as ``aen`` load without this package; ``aen``: they keep the name.
        sae_id: Name of the only dictionary; None: from the folders' names, or its hook.
        model_name: Written into the metadata, where the run knew only a local folder: ``EleutherAI/pythia-70m-deduped``.
        dataset: Likewise: ``EleutherAI/the_pile_deduplicated``.
        license_name: For the card: ``mit``, ``apache-2.0``, ...
        endpoint: Of another Hub; None: ``HF_ENDPOINT``, or huggingface.co.
        token: None: huggingface_hub's own login.

    Raises:
        HubError: If the Hub refuses or stays out of reach; nothing was published then.
        ValueError: For what cannot be published.
    """
    with plan_push(
        root, repo_id, architecture=architecture, sae_id=sae_id, model_name=model_name, dataset=dataset,
        license_name=license_name,
    ) as plan:  # fmt: skip
        return publish(plan, revision=revision, private=private, endpoint=endpoint, token=token)


def publish(
    plan: Plan,
    *,
    revision: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Published:
    """Carry out a plan; arguments and errors as for :func:`push`."""
    secret = token or get_token()
    if secret is None:
        raise HubError(f"publishing to {plan.repo_id} needs a login: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint, token=secret)
    with hub_errors(plan.repo_id, "publishing to"):
        _ensure_repo(api, plan.repo_id, revision, private)
        head = with_retries(lambda: api.model_info(plan.repo_id, revision=revision), "reading the repository").sha
        assert head is not None
        present = with_retries(
            lambda: [
                f for f in api.list_repo_tree(plan.repo_id, recursive=True, revision=head) if isinstance(f, RepoFile)
            ],
            "listing the repository",
        )
        paths = {f.path for f in present}
        others = [e for e in _remote_entries(api, plan.repo_id, head, paths) if e is not None]
        readme = _fetch(api, plan.repo_id, _README, head) if _README in paths else None
        card = plan.card(existing=readme, others=others, revision=revision)
        _refuse_secret(secret, plan, card)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(path)) for name, path in plan.files.items()
        ]
        operations.append(CommitOperationAdd(_README, card.encode()))
        stale = {f"{e.sae_id}/{name}" for e in plan.entries for name in _SAE_FILES} - plan.files.keys()
        operations += [CommitOperationDelete(path, is_folder=False) for path in sorted(stale & paths)]
        sae_ids = [e.sae_id for e in plan.entries]
        commit = _commit(api, plan.repo_id, revision, head, operations, sae_ids)
        _verify(api, plan, commit)
    return Published(f"{api.endpoint}/{plan.repo_id}", commit, sae_ids)


def _ensure_repo(api: HfApi, repo_id: str, revision: str | None, private: bool) -> None:
    with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), "creating the repository")
    if private and not with_retries(lambda: api.model_info(repo_id), "reading the repository").private:
        raise HubError(
            f"{repo_id} exists and is public, but --private was asked for: nothing was published; "
            "make it private in its settings first, or choose another name"
        )
    if revision not in (None, "main"):
        with_retries(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True), "creating the branch")


def _remote_entries(api: HfApi, repo_id: str, head: str, paths: set[str]) -> Iterator[Entry | None]:
    for path in sorted(paths):
        folder, _, name = path.rpartition("/")
        if name == SAE_CFG_FILENAME and f"{folder}/{SAE_WEIGHTS_FILENAME}" in paths:
            cfg = json.loads(_fetch(api, repo_id, path, head))
            yield Entry(folder, cfg) if "d_in" in cfg and "d_sae" in cfg else None


def _fetch(api: HfApi, repo_id: str, path: str, commit: str) -> str:
    file = with_retries(lambda: api.hf_hub_download(repo_id, path, revision=commit), f"reading {path}")
    return Path(file).read_text(encoding="utf-8")


def _refuse_secret(secret: str, plan: Plan, card: str) -> None:
    texts = {_README: card} | {n: p.read_text(encoding="utf-8") for n, p in plan.files.items() if n.endswith(".json")}
    for name, text in texts.items():
        if secret in text:
            raise ValueError(f"{name} would contain the access token of this login: nothing was published")


def _commit(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    head: str,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    sae_ids: Sequence[str],
) -> str:
    """One commit on top of ``head``, and only there; its mark tells whether one whose answer was lost arrived."""
    mark = f"aen push {uuid.uuid4().hex}"
    names = ", ".join(sae_ids[:5]) + (f" and {len(sae_ids) - 5} more" if len(sae_ids) > 5 else "")

    def attempt() -> str:
        try:
            info: CommitInfo = api.create_commit(
                repo_id,
                operations,
                commit_message=f"Publish {names}",
                commit_description=mark,
                revision=revision,
                parent_commit=head,
            )
        except RuntimeError as error:  # how the client reports a file that it could not upload
            if isinstance(error.__cause__, HTTPError | OSError):
                raise error.__cause__ from None
            raise
        except HTTPError as error:
            arrived = _arrived(api, repo_id, revision, head, mark)
            if arrived is None:
                raise
            if not is_transient(error) and error.response.status_code != 412:  # type: ignore[attr-defined]
                raise
            return arrived
        return str(info.oid)

    return with_retries(attempt, f"publishing to {repo_id}", n_attempts=N_ATTEMPTS)


def _arrived(api: HfApi, repo_id: str, revision: str | None, head: str, mark: str) -> str | None:
    try:
        latest = api.list_repo_commits(repo_id, revision=revision)[0]
    except HTTPError:  # it cannot be told now; the next attempt asks again, and parent_commit forbids doing it twice
        return None
    return latest.commit_id if latest.commit_id != head and mark in latest.message else None


def _verify(api: HfApi, plan: Plan, commit: str) -> None:
    """Compare sizes of what the Hub holds now with the files here (hashes were checked when it took them)."""
    names = list(plan.files)
    held = with_retries(
        lambda: [
            f for f in api.list_repo_tree(plan.repo_id, recursive=True, revision=commit) if isinstance(f, RepoFile)
        ],
        "checking what was published",
    )
    sizes = {f.path: f.size for f in held}
    wrong = [name for name in names if sizes.get(name) != plan.files[name].stat().st_size]
    if wrong:
        raise HubError(f"after publishing to {plan.repo_id}, {wrong[0]} is not there in full: run the command again")


def _notes(entries: Sequence[Entry]) -> list[str]:
    notes = []
    for e in entries:
        if e.metadata.get("model_name") is None and str(e.metadata.get("dataset_path", "")).startswith("synthetic/"):
            continue
        missing = missing_for_dashboards(e.metadata)
        if missing:
            notes.append(f"{e.sae_id}: no {', '.join(missing)} in its metadata; SAEDashboard and Neuronpedia need them")
        model_name = e.metadata.get("model_name")
        if model_name and hub_id(str(model_name)) is None and "/" not in str(model_name):
            notes.append(
                f"{e.sae_id}: model_name is {model_name!r}; if that is a folder, give the Hub's name with --model-name"
            )
    return notes


def human_size(n_bytes: int) -> str:
    """``4.3 GB``: powers of ten."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
