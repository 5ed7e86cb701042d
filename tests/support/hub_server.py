"""A Hugging Face Hub on the loopback: what huggingface_hub asks of it when it publishes and fetches models,
and failures at will.

Large files go through the LFS protocol, downloads answer ranges, commits are atomic and know their parent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "loopbackTESTtoken" * 2
LFS_SUFFIXES = (".safetensors", ".pt")


@dataclass
class Commit:
    oid: str
    title: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("0" * 40, "initial", "", {})]}
    )

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for log in self.branches.values() for c in log if c.oid == revision), None)


@dataclass
class Failure:
    """What happens to the next ``times`` requests that match.

    Args:
        match: Regular expression for "METHOD path".
        action: ``status``; ``drop`` (close without an answer); ``drop_body`` (close in the middle of the
            body); ``short`` (a body that is complete, but too short); ``corrupt`` (one byte of the body, or
            of the upload, differs); ``lost`` (done, but not answered).
        status: For ``status``.
        headers: For ``status``.
        times: How often.
    """

    match: str
    action: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class HubServer:
    """State of the Hub, and the server in front of it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.log: list[str] = []
        self.authorizations: set[str] = set()
        self.ranges: list[str] = []
        self.chunk_size: int | None = None  # set: uploads go in parts of so many bytes
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()
        server = self

        class Handler(_Handler):
            hub = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"

    def fail(self, match: str, action: str, **options: object) -> None:
        self.failures.append(Failure(match, action, **options))  # type: ignore[arg-type]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        return {path: self.content(blob) for path, blob in commit.files.items()}

    def content(self, blob: bytes) -> bytes:
        return self.lfs[blob[4:].decode()] if blob.startswith(b"lfs:") else blob

    def add(self, repo_id: str, files: dict[str, bytes], **options: bool) -> str:
        """A repository with one commit, without the protocol."""
        repo = self.repos.setdefault(repo_id, Repo(**options))
        stored: dict[str, bytes] = dict(repo.branches["main"][-1].files)
        for path, data in files.items():
            oid = hashlib.sha256(data).hexdigest()
            if path.endswith(LFS_SUFFIXES):
                self.lfs[oid] = data
            stored[path] = f"lfs:{oid}".encode() if path.endswith(LFS_SUFFIXES) else data
        commit = Commit(_oid(repo_id, str(len(repo.branches["main"]))), "added", "", stored)
        repo.branches["main"].append(commit)
        return commit.oid

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """After the one that made the repository."""
        return self.repos[repo_id].branches[revision][1:]

    def requests(self, match: str) -> list[str]:
        return [line for line in self.log if re.search(match, line)]


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=lambda: server.http.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def _oid(*parts: str) -> str:
    return hashlib.sha1("\0".join(parts).encode()).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    # --- one request ---------------------------------------------------------------------------------------
    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = (
            self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        line = f"{self.command} {self.route}"
        with self.hub.lock:
            self.hub.log.append(line)
            if "Authorization" in self.headers:
                self.hub.authorizations.add(self.headers["Authorization"])
            self.failure = self._next_failure(line)
        if self.failure is not None and self.failure.action == "drop":
            return self._hang_up()
        if self.failure is not None and self.failure.action == "status":
            return self._send(self.failure.status, b'{"error": "injected"}', self.failure.headers)
        for pattern, method, function in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and method == self.command:
                with self.hub.lock:
                    return function(self, *match.groups())
        return self._send(404, b"{}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _handle

    def _next_failure(self, line: str) -> Failure | None:
        for failure in self.hub.failures:
            if failure.times > 0 and re.search(failure.match, line):
                failure.times -= 1
                return failure
        return None

    def _chunked(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().strip(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _hang_up(self) -> None:
        self.close_connection = True

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        action = self.failure.action if self.failure is not None else None
        if action == "lost":
            return self._hang_up()
        if action == "corrupt" and self.command == "GET":
            data = bytes([data[0] ^ 1]) + data[1:]
        if action == "short":
            data = data[: len(data) // 2]
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        if action == "short":
            headers["Content-Length"] = str(len(data))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if action == "drop_body" else data)
        if action == "drop_body":
            self._hang_up()
        return None

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message},
        )

    @property
    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo | None:
        """The repository if this request may have it; else the refusal is sent."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._logged_in):
            self._refuse(404 if self._logged_in else 401, "RepoNotFound", "Repository not found")
            return None
        if write and not self._logged_in:
            self._refuse(403, "Forbidden", "You need write rights")
            return None
        return repo

    def _commit_of(self, repo_id: str, revision: str) -> Commit | None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        commit = repo.find(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        return commit

    # --- the API -------------------------------------------------------------------------------------------
    def whoami(self) -> None:
        if not self._logged_in:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        return self._json({"type": "user", "name": "tester", "orgs": []})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if not self._logged_in:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if repo_id in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(private=private)
        return self._json({"url": url, "name": repo_id})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return None
        if branch in repo.branches:
            return self._json({"error": "Reference already exists"}, 409)
        repo.branches[branch] = list(repo.branches["main"])
        return self._json({})

    def info(self, repo_id: str, revision: str = "main") -> None:
        commit = self._commit_of(repo_id, revision)
        if commit is not None:
            repo = self.hub.repos[repo_id]
            siblings = [{"rfilename": path} for path in commit.files]
            self._json(
                {
                    "id": repo_id,
                    "modelId": repo_id,
                    "sha": commit.oid,
                    "private": repo.private,
                    "siblings": siblings,
                    "tags": [],
                }
            )

    def tree(self, repo_id: str, revision: str) -> None:
        commit = self._commit_of(repo_id, revision)
        if commit is None:
            return
        entries: list[dict[str, object]] = []
        for path, blob in commit.files.items():
            data = self.hub.content(blob)
            entry: dict[str, object] = {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": _git_hash(blob),
            }
            if blob.startswith(b"lfs:"):
                entry["lfs"] = {"oid": blob[4:].decode(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def commits_of(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        if repo is not None:
            self._json(
                [
                    {
                        "id": c.oid,
                        "title": c.title,
                        "message": c.message,
                        "authors": [],
                        "date": "2026-01-01T00:00:00.000Z",
                    }
                    for c in reversed(repo.branches[revision])
                ]
            )

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        if self._repo(repo_id, write=True) is None:
            return
        commit = self._commit_of(repo_id, revision)
        if commit is None:
            return
        answer = []
        for file in json.loads(self.body)["files"]:
            blob = commit.files.get(file["path"])
            oid = None if blob is None else blob[4:].decode() if blob.startswith(b"lfs:") else _git_hash(blob)
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry: dict[str, object] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                upload: dict[str, object] = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
                if self.hub.chunk_size is not None:
                    n_parts = -(-wanted["size"] // self.hub.chunk_size)
                    urls = {str(n): f"{upload['href']}/{n}" for n in range(1, n_parts + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.chunk_size), **urls}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs-verify"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        corrupt = self.failure is not None and self.failure.action == "corrupt"
        self.hub.lfs[oid] = bytes([self.body[0] ^ 1]) + self.body[1:] if corrupt else self.body
        self._send(200)

    def lfs_put_part(self, oid: str, part: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        stated = {p["partNumber"]: p["etag"].strip('"') for p in json.loads(self.body)["parts"]}
        parts = self.hub.parts.pop(oid, {})
        if stated != {n: hashlib.md5(data).hexdigest() for n, data in parts.items()}:
            return self._json({"error": "parts are missing or wrong"}, 400)
        self.hub.lfs[oid] = b"".join(data for _, data in sorted(parts.items()))
        return self._json({})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        data = self.hub.lfs.get(wanted["oid"], b"")
        if len(data) != wanted["size"] or hashlib.sha256(data).hexdigest() != wanted["oid"]:
            self.hub.lfs.pop(wanted["oid"], None)
            return self._json({"error": "the uploaded object has another SHA-256"}, 422)
        return self._json({})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        log = repo.branches.get(revision)
        if log is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if header.get("parentCommit") not in (None, log[-1].oid):
            return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = dict(log[-1].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._json({"error": f"LFS object {value['oid']} was never uploaded"}, 400)
                files[value["path"]] = f"lfs:{value['oid']}".encode()
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        title = header["summary"]
        oid = _oid(repo_id, revision, str(len(log)), title, header["description"])
        log.append(Commit(oid, title, header["description"], files))
        return self._json(
            {
                "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}",
                "commitOid": oid,
                "pullRequestUrl": None,
            }
        )

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_of(repo_id, revision)
        if commit is None:
            return None
        if self.hub.repos[repo_id].gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        if path not in commit.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        data = self.hub.content(blob)
        etag = blob[4:].decode() if blob.startswith(b"lfs:") else _git_hash(blob)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if blob.startswith(b"lfs:"):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, headers | {"Content-Length": str(len(data))})
        self.hub.ranges.append(asked[0])
        start, end = int(asked[1]), int(asked[2] or len(data) - 1)
        return self._send(
            206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        )


_ID = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    (r"/api/whoami-v2", "GET", _Handler.whoami),
    (r"/api/repos/create", "POST", _Handler.create_repo),
    (r"/api/validate-yaml", "POST", _Handler.validate_yaml),
    (rf"/api/models/{_ID}", "GET", _Handler.info),
    (rf"/api/models/{_ID}/revision/(.+)", "GET", _Handler.info),
    (rf"/api/models/{_ID}/tree/([^/]+)", "GET", _Handler.tree),
    (rf"/api/models/{_ID}/commits/(.+)", "GET", _Handler.commits_of),
    (rf"/api/models/{_ID}/branch/(.+)", "POST", _Handler.create_branch),
    (rf"/api/models/{_ID}/preupload/(.+)", "POST", _Handler.preupload),
    (rf"/api/models/{_ID}/commit/(.+)", "POST", _Handler.commit),
    (rf"/{_ID}\.git/info/lfs/objects/batch", "POST", _Handler.lfs_batch),
    (r"/lfs/([0-9a-f]{64})", "PUT", _Handler.lfs_put),
    (r"/lfs/([0-9a-f]{64})/(\d+)", "PUT", _Handler.lfs_put_part),
    (r"/lfs/([0-9a-f]{64})", "POST", _Handler.lfs_complete),
    (r"/lfs-verify", "POST", _Handler.lfs_verify),
    (rf"/{_ID}/resolve/([^/]+)/(.+)", "HEAD", _Handler.resolve),
    (rf"/{_ID}/resolve/([^/]+)/(.+)", "GET", _Handler.resolve),
]
