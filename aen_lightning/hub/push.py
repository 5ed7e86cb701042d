"""Publishing dictionaries: everything in one commit, or nothing."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from aen_lightning.files import read_json
from aen_lightning.hub.card import Entry
from aen_lightning.hub.plan import README, Plan, plan_push
from aen_lightning.hub.remote import list_files
from aen_lightning.hub.retry import N_ATTEMPTS, HubError, hub_errors, is_transient, with_retries
from aen_lightning.hub.staging import PublishedArchitecture
from aen_lightning.runs.weights import check_config

_log = logging.getLogger(__name__)
_SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME)


@dataclass(frozen=True)
class Published:
    """What :func:`push` did: the repository's address, the commit's hash, and the IDs it holds."""

    url: str
    commit: str
    sae_ids: list[str]


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

    Safe to repeat: what arrived before is not sent again, and a push that changes nothing makes no commit.
    Dictionaries with other IDs, and card text of other hands, stay.

    Args:
        root: A run's folder, a SAELens folder, or a folder of several.
        repo_id: ``OWNER/REPO``; made if missing.
        revision: Branch; made if missing. None: ``main``.
        private: Make the repository private. An existing public one is refused.
        architecture: ``standard``: dictionaries trained as ``aen`` load without this package; ``aen``: they
            keep the name.
        sae_id: Name of the only dictionary; None: from the folders' names, or its hook.
        model_name: Written into the metadata, where the run knew only a local folder:
            ``EleutherAI/pythia-70m-deduped``.
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
        head = with_retries(
            lambda: api.model_info(plan.repo_id, revision=revision), "reading the repository"
        ).sha
        assert head is not None
        paths = {f.path for f in list_files(api, plan.repo_id, head, "listing the repository")}
        others = list(_remote_entries(api, plan.repo_id, head, paths))
        readme = _fetch(api, plan.repo_id, README, head) if README in paths else None
        existing = None if readme is None else readme.read_text(encoding="utf-8")
        card = plan.card(existing=existing, others=others, revision=revision)
        _refuse_secret(secret, plan, card)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(path)) for name, path in plan.files.items()
        ]
        operations.append(CommitOperationAdd(README, card.encode()))
        stale = {f"{e.sae_id}/{name}" for e in plan.entries for name in _SAE_FILES} - plan.files.keys()
        operations += [CommitOperationDelete(path, is_folder=False) for path in sorted(stale & paths)]
        sae_ids = [e.sae_id for e in plan.entries]
        commit = _commit(api, plan.repo_id, revision, head, operations, sae_ids)
        _verify(api, plan, commit)
    return Published(f"{api.endpoint}/{plan.repo_id}", commit, sae_ids)


def _ensure_repo(api: HfApi, repo_id: str, revision: str | None, private: bool) -> None:
    with_retries(
        lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), "creating the repository"
    )
    if private and not with_retries(lambda: api.model_info(repo_id), "reading the repository").private:
        raise HubError(
            f"{repo_id} exists and is public, but --private was asked for: nothing was published; "
            "make it private in its settings first, or choose another name"
        )
    if revision not in (None, "main"):
        with_retries(
            lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True), "creating the branch"
        )


def _remote_entries(api: HfApi, repo_id: str, head: str, paths: set[str]) -> Iterator[Entry]:
    for path in sorted(paths):
        folder, _, name = path.rpartition("/")
        if name == SAE_CFG_FILENAME and f"{folder}/{SAE_WEIGHTS_FILENAME}" in paths:
            try:
                cfg = check_config(read_json(_fetch(api, repo_id, path, head)), path)
            except ValueError as error:
                _log.warning("%s is not shown in the model card: %s", folder, error)
            else:
                yield Entry(folder, cfg)


def _fetch(api: HfApi, repo_id: str, path: str, commit: str) -> Path:
    return Path(with_retries(lambda: api.hf_hub_download(repo_id, path, revision=commit), f"reading {path}"))


def _refuse_secret(secret: str, plan: Plan, card: str) -> None:
    texts = {README: card} | {
        n: p.read_text(encoding="utf-8") for n, p in plan.files.items() if n.endswith(".json")
    }
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
    """One commit on top of ``head``, and only there; its mark tells whether a lost answer meant success."""
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
    except HTTPError:
        # it cannot be told now; the next attempt asks again, and parent_commit forbids doing it twice
        return None
    return latest.commit_id if latest.commit_id != head and mark in latest.message else None


def _verify(api: HfApi, plan: Plan, commit: str) -> None:
    """Compare sizes of what the Hub holds now with the files here (hashes were checked when it took them)."""
    sizes = {f.path: f.size for f in list_files(api, plan.repo_id, commit, "checking what was published")}
    wrong = [name for name in plan.files if sizes.get(name) != plan.files[name].stat().st_size]
    if wrong:
        raise HubError(
            f"after publishing to {plan.repo_id}, {wrong[0]} is not there in full: run the command again"
        )
