"""What a repository on the Hub holds at one commit, and files of it, checked as they come."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from aen_lightning.files import read_json
from aen_lightning.hub.retry import N_ATTEMPTS, HubError, hub_errors, is_transient, with_retries
from aen_lightning.runs.weights import check_config


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repository: bytes, and its SHA-256 (large files) or git hash (small ones), if known."""

    size: int
    sha256: str | None = None
    git_hash: str | None = None


@dataclass(frozen=True)
class Remote:
    """What a repository holds at one commit.

    Args:
        repo_id: ``OWNER/REPO``.
        commit: Hash of the commit.
        files: Every file of it, by path; of an offline cache, every file that is cached.
        offline: Whether the Hub was out of reach and the local cache answered.
        revision: What was asked for: a branch, a tag or a commit.
    """

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]
    offline: bool = False
    revision: str = "main"

    @property
    def sae_ids(self) -> list[str]:
        """IDs of the dictionaries: folders with a config and weights."""
        folders = [path.rpartition("/")[0] for path in self.files if path.endswith(f"/{SAE_CFG_FILENAME}")]
        return sorted(folder for folder in folders if f"{folder}/{SAE_WEIGHTS_FILENAME}" in self.files)


def look_up(
    repo_id: str, revision: str | None = None, *, endpoint: str | None = None, token: str | None = None
) -> Remote:
    """List a repository at a revision; where the Hub cannot be reached, list what the local cache has of it.

    Args:
        repo_id: ``OWNER/REPO``.
        revision: Branch, tag or commit. None: ``main``.
        endpoint: Of another Hub.
        token: None: huggingface_hub's own login, if any.

    Raises:
        HubError: If there is no such repository or revision, if it may not be read, or if it is neither
            reachable nor cached.
    """
    api = HfApi(endpoint=endpoint, token=token)
    cached = _cached(repo_id, revision)
    n_attempts = N_ATTEMPTS if cached is None else 2  # where the cache can answer, nobody should wait long
    with hub_errors(repo_id, "reading"):
        try:
            info = with_retries(
                lambda: api.model_info(repo_id, revision=revision),
                f"looking up {repo_id}",
                n_attempts=n_attempts,
            )
            commit = str(info.sha)
            held = list_files(api, repo_id, commit, f"listing {repo_id}")
        except (HTTPError, OfflineModeIsEnabled) as error:
            refused = isinstance(error, HfHubHTTPError) and not is_transient(error)
            if refused or cached is None:
                raise
            return cached
    files = {
        f.path: RemoteFile(f.size, f.lfs.sha256 if f.lfs else None, None if f.lfs else f.blob_id)
        for f in held
    }
    return Remote(repo_id, commit, files, revision=revision or "main")


def list_files(api: HfApi, repo_id: str, commit: str, what: str) -> list[RepoFile]:
    """Every file of a commit; ``what`` is for the log."""
    return with_retries(
        lambda: [
            entry
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)
            if isinstance(entry, RepoFile)
        ],
        what,
    )


def _cached(repo_id: str, revision: str | None) -> Remote | None:
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    files = {
        path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Remote(repo_id, folder.name, files, offline=True, revision=revision or "main")


def choose(remote: Remote, sae_id: str | None) -> str:
    """``sae_id`` if the repository has it; without one, the only dictionary it has.

    Raises:
        HubError: If there is none, no such one, or more than one to choose from.
    """
    ids = remote.sae_ids
    where = (
        f"{remote.repo_id} (commit {remote.commit[:8]}{', from the local cache' if remote.offline else ''})"
    )
    if not ids:
        raise HubError(
            f"{where} holds no SAELens dictionary: no {SAE_CFG_FILENAME} beside {SAE_WEIGHTS_FILENAME}"
        )
    if sae_id is None and len(ids) == 1:
        return ids[0]
    if sae_id in ids:
        return str(sae_id)
    asked = "say which one" if sae_id is None else f"no dictionary {sae_id!r}"
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    raise HubError(f"{where}: {asked}; it has {', '.join(ids[:20])}{more}")


def read_config(
    remote: Remote, sae_id: str, *, endpoint: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """``cfg.json`` of a dictionary, checked; nothing else is fetched.

    Raises:
        HubError: If it cannot be had.
        ValueError: If it is no config of a dictionary; names the field.
    """
    name = f"{sae_id}/{SAE_CFG_FILENAME}"
    file = download(remote, name, HfApi(endpoint=endpoint, token=token))
    return check_config(read_json(file), f"{remote.repo_id}, {name}")


def download(remote: Remote, path: str, api: HfApi) -> Path:
    """A file of the commit, with the hash that the Hub states for it; fetched once more if it has another."""
    expected = remote.files[path]

    def fetch(force: bool) -> Path:
        def at(revision: str) -> Path:
            return Path(
                api.hf_hub_download(
                    remote.repo_id,
                    path,
                    revision=revision,
                    force_download=force,
                    local_files_only=remote.offline,
                )
            )

        if path.endswith(SAE_CFG_FILENAME) and not remote.offline:
            # by its name, so that the cache remembers which commit it means and can answer offline
            file = at(remote.revision)
            if remote.commit in file.parts:
                return file
        return at(remote.commit)

    with hub_errors(remote.repo_id, "reading"):
        for force in (False, True):
            try:
                file = with_retries(partial(fetch, force), f"downloading {path}")
            except EntryNotFoundError:
                if not remote.offline:
                    raise
                raise HubError(
                    f"{path} of {remote.repo_id} is not in the local cache, and the Hub is out of reach"
                ) from None
            if _hash_is(file, expected):
                return file
    blob = file.resolve()
    file.unlink()
    blob.unlink(missing_ok=True)
    raise HubError(
        f"{path} of {remote.repo_id} arrives with another hash than the Hub states for it, twice in a row: "
        f"the copy was "
        "deleted; try again later, or from another network"
    )


def _hash_is(file: Path, expected: RemoteFile) -> bool:
    if expected.sha256 is not None:
        with file.open("rb") as stream:
            return sha_fileobj(stream).hex() == expected.sha256
    return expected.git_hash is None or git_hash(file.read_bytes()) == expected.git_hash
