"""What the Hub client lacks: a wait and another try around whole calls, and errors that say what to do.

``huggingface_hub`` already waits and tries again for single requests that fail with 429 or 5xx, resumes a
download whose connection drops, and skips uploads that arrived. It does not try again when the final commit
fails, when a download's ``GET`` answers 5xx, or when the file that came has the wrong length.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from aen_lightning.retry import retry

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_WRONG_LENGTH = "Consistency check failed"  # how huggingface_hub's OSError for a short download begins
N_ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 300.0


class HubError(OSError):
    """A request to the Hub that failed for good; the message says what to do about it."""


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: a busy or failing server, a broken connection, a file cut short.

    ``LocalEntryNotFoundError`` is none: before it, the client has asked for the file's metadata six times.
    """
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    return isinstance(error, HTTPError) or (isinstance(error, OSError) and _WRONG_LENGTH in str(error))


def with_retries(call: Callable[[], _T], what: str, *, n_attempts: int = N_ATTEMPTS) -> _T:
    """Call until it succeeds, waiting 1, 2, 4, ... seconds, or as long as the server asks for.

    Args:
        call: Must be safe to repeat.
        what: For the log: "downloading cfg.json".
        n_attempts: Calls in all.

    Returns:
        What ``call`` returned.

    Raises:
        Exception: The error of the last attempt, or the first one that a repetition cannot mend, as it is.
    """

    def announce(error: Exception, wait: float, attempt: int) -> None:
        _log.warning(
            "%s: %s; again in %.0f s (attempt %d of %d)", what, summary(error), wait, attempt, n_attempts
        )

    return retry(
        call, attempts=n_attempts, worth_it=is_transient, announce=announce, wait_seconds=_FIRST_WAIT_SECONDS,
        longest_wait_seconds=_LONGEST_WAIT_SECONDS, asked_wait=_asked_wait,
    )  # fmt: skip


def _asked_wait(error: Exception) -> float:
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    retry_after = error.response.headers.get("Retry-After", "")
    rate_limit = re.search(r";\s*t\s*=\s*(\d+)", error.response.headers.get("RateLimit", ""))
    return float(retry_after if retry_after.isdigit() else rate_limit.group(1) if rate_limit else 0)


def summary(error: Exception) -> str:
    """One line that tells what happened, without addresses' query strings (they may be signed) and without
    headers.
    """
    if isinstance(error, HfHubHTTPError):
        request = error.response.request
        said = error.server_message or error.response.reason_phrase
        return f"{error.response.status_code} ({said}) from {request.method} {request.url.path}"
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return first_line.split("?", 1)[0]


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Turn the client's errors into :class:`HubError` with one line that says what was asked for and what to
    do.

    Args:
        repo_id: ``OWNER/REPO``.
        doing: "reading", "publishing to", ...
    """
    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError) as error:
        advice = _advice(error, repo_id)
        if advice is None:
            raise
        raise HubError(f"{doing} {repo_id}: {advice}") from error


def _advice(error: Exception, repo_id: str) -> str | None:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return (
            f"the repository is gated: accept its conditions on its page ({repo_id}) with your account, "
            "then log in here with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and the account logged in here may not read it: "
            "check the name, and log in with `hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return "the repository exists, but not this revision (a branch, a tag or a commit)"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the repository exists, but has no file {_file_of(error)} at this revision"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        cause = error.__cause__
        if isinstance(cause, HTTPError):
            return f"not in the local cache, and the Hub cannot be reached: {summary(cause)}; try again later"
        return "not in the local cache, and this process is offline (HF_HUB_OFFLINE): fetch it once with a connection"
    if status in (401, 403):
        return (
            f"the Hub refuses: {summary(error)}; log in with `hf auth login` (or set HF_TOKEN) as an "
            "account, and with "
            "a token, that has the right to do this"
        )
    if status == 412:
        return "somebody else changed the repository meanwhile; nothing was published: run the command again"
    if status in _TRANSIENT_STATUS:
        return (
            f"the Hub still fails after {N_ATTEMPTS} attempts: {summary(error)}; run the command again later"
        )
    if status is not None:
        return f"the Hub refuses: {summary(error)}"
    if isinstance(error, HTTPError):
        return f"no connection to the Hub: {summary(error)}; run the command again later"
    if _WRONG_LENGTH in str(error):
        return f"a file arrives incomplete, {N_ATTEMPTS} times in a row: {summary(error)}"
    return None


def _file_of(error: HfHubHTTPError) -> str:
    path = error.response.request.url.path
    return repr(path.split("/resolve/", 1)[1].split("/", 1)[-1]) if "/resolve/" in path else path
