"""A small Hub on the loopback: files by HEAD and by byte range behind a redirect, listings, tokens, faults on demand.

It takes uploads as the Hub does without Xet: repositories and branches made, files asked about, large ones put into a
store, and commits, which name their parent.

It speaks what huggingface_hub and laser ask for, counts every byte that it sends, and never runs longer than its test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import pytest

PIECE = 1 << 18
TOKEN = "hf_of_the_tests"


class Content(Protocol):
    """What a file holds; not necessarily in memory."""

    @property
    def size(self) -> int: ...
    @property
    def etag(self) -> str: ...
    def read(self, start: int, end: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, start: int, end: int) -> bytes:
        return self.data[start:end]


@dataclass(frozen=True)
class Generated:
    """A header, and behind it a tile again and again: 10 GB of weights that lie nowhere."""

    header: bytes
    size: int
    tile: bytes
    etag: str

    def read(self, start: int, end: int) -> bytes:
        parts = [self.header[start:end]]
        at, end = max(start - len(self.header), 0), min(end, self.size) - len(self.header)
        while at < end:
            offset = at % len(self.tile)
            parts.append(self.tile[offset : offset + end - at])
            at += len(parts[-1])
        return b"".join(parts)


@dataclass
class Repo:
    files: dict[str, Content]
    commit: str = "a" * 40
    private: bool = False
    gated: bool = False
    branches: dict[str, Repo] = field(default_factory=dict)  # besides main
    history: dict[str, dict[str, Content]] = field(default_factory=dict)  # files by earlier commits

    def at(self, revision: str | None) -> Repo | None:
        """The branch or commit that is called so, which may be this one."""
        if revision in (None, "main", self.commit):
            return self
        for branch, repo in self.branches.items():
            if revision in (branch, repo.commit):
                return repo
        old = self.history.get(revision or "")
        return None if old is None else replace(self, files=old, commit=revision or "")

    def take(self, files: dict[str, Content]) -> str:
        """A commit after which these are the files."""
        self.history[self.commit] = self.files
        told = "\n".join([self.commit, *(f"{name} {content.etag}" for name, content in sorted(files.items()))])
        self.files, self.commit = files, hashlib.sha1(told.encode()).hexdigest()
        return self.commit


@dataclass
class Fault:
    """What to do to requests whose path matches, so many times: a status, a drop after half the body, other bytes.

    kind: "status", "drop", "commit" (another X-Repo-Commit), "whole" (ranges ignored), "short" (half of the range, as
    if that were all); of what is sent here "status", "close" (before anything is done) and "lost" (done, no answer)
    """

    kind: str
    path: str
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "GET"


@dataclass
class Hub:
    """The server's state, for a test to change and to look at."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    noted: list[tuple[str, str, str | None, int]] = field(default_factory=list)  # method, path, range, body's bytes
    leaked: list[str] = field(default_factory=list)  # paths of the storage that were sent a token
    store: dict[str, bytes] = field(default_factory=dict)  # large files that were sent, by sha256
    put: list[str] = field(default_factory=list)  # those, in order, as often as they were sent
    before: Callable[[str, str], None] | None = None  # called with (method, path) before what is sent here is handled
    lock: threading.Lock = field(default_factory=threading.Lock)
    idle: threading.Condition = field(default_factory=threading.Condition)
    busy: int = 0  # requests that are being answered
    # Hostile answers. rewrite: (method, path, headers) -> the headers sent; instead: writes an answer of its own to a
    # request (the handler) and says so.
    rewrite: Callable[[str, str, dict[str, str]], dict[str, str]] | None = None
    instead: Callable[[Any, str], bool] | None = None

    def add(self, name: str, folder: Path, **options: Any) -> Repo:
        files: dict[str, Content] = {
            str(p.relative_to(folder)): Bytes(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()
        }
        self.repos[name] = Repo(files, **options)
        return self.repos[name]

    @property
    def log(self) -> list[tuple[str, str, str | None, int]]:
        """The requests so far, once none is being answered: a client may have its answer before it is noted here."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.busy == 0, 10)
        return self.noted

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent so far for paths that match."""
        return sum(count for _, path, _, count in self.log if re.search(pattern, path))

    def fault(self, method: str, path: str, kinds: tuple[str, ...]) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.kind in kinds and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def blob_id(content: Content) -> str:
    """How git calls a file."""
    return hashlib.sha1(b"blob %d\0" % content.size + content.read(0, content.size)).hexdigest()


def described(name: str, content: Content) -> dict[str, Any]:
    """A file as a listing with metadata tells of it."""
    told = {"rfilename": name, "size": content.size}
    if not name.endswith((".safetensors", ".bin")):
        return told | {"blobId": blob_id(content)}
    lfs = {"size": content.size, "sha256": content.etag, "pointerSize": 130}
    return told | {"blobId": hashlib.sha1(content.etag.encode()).hexdigest(), "lfs": lfs}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each small answer waits 40 ms for an acknowledgement

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.counted(self.answer)

        def do_GET(self) -> None:
            self.counted(self.answer)

        def counted(self, work: Callable[[], None]) -> None:
            with hub.idle:
                hub.busy += 1
            try:
                work()
            finally:
                with hub.idle:
                    hub.busy -= 1
                    hub.idle.notify_all()

        def do_POST(self) -> None:
            self.counted(self.given)

        def do_PUT(self) -> None:
            self.counted(self.given)

        def given(self) -> None:
            """Something is sent here."""
            path = unquote(urlsplit(self.path).path)
            if hub.before is not None:
                hub.before(self.command, path)
            fault = hub.fault(self.command, path, ("status", "close", "lost"))
            if fault is not None and fault.kind == "close":
                self.close_connection = True
                return
            body = self.rfile.read(length := int(self.headers.get("Content-Length") or 0))
            if len(body) < length:  # the client went away
                self.close_connection = True
                return
            if hub.instead is not None and hub.instead(self, path):
                return self.note(path, 0)
            status, told = (fault.status, {}) if fault and fault.kind == "status" else self.taken(path, body)
            if fault is not None and fault.kind == "lost":
                self.close_connection = True
                return
            headers = {"Content-Type": "application/json"} | (fault.headers if fault else {})
            if isinstance(told, str):
                headers, told = headers | {"X-Error-Code": told}, {}
            self.send(status, headers, json.dumps(told).encode())

        def taken(self, path: str, body: bytes) -> tuple[int, Any]:
            """Status and answer to what was sent; a string is an error's code."""
            if match := re.fullmatch(r"/upload/([0-9a-f]{64})", path):
                hub.put.append(match[1])
                if hashlib.sha256(body).hexdigest() != match[1]:
                    return 400, {"error": "another sha256"}
                hub.store[match[1]] = body
                return 200, {}
            if path == "/api/validate-yaml":
                return 200, {"warnings": [], "errors": []}
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return 401, {"error": "Invalid username or password."}
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.repos:
                    return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
                attributes = Bytes(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
                private = asked.get("visibility") == "private" or asked.get("private") is True
                hub.repos[name] = Repo({".gitattributes": attributes}, "c" * 40, private)
                return 200, {"url": f"{hub.url}/{name}"}
            if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                return 200, {"objects": [self.wanted(entry) for entry in json.loads(body)["objects"]]}
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
            repo = hub.repos.get(match[1]) if match else None
            if match is None or repo is None:
                return 404, "RepoNotFound"
            if match[2] == "branch":
                if repo.at(match[3]) is not None:
                    return 409, {"error": "Reference already exists"}
                repo.branches[match[3]] = Repo(dict(repo.files), repo.commit, repo.private)
                return 200, {}
            at = repo.at(match[3])
            if at is None:
                return 404, "RevisionNotFound"
            return self.about(at, body) if match[2] == "preupload" else self.committed(match[1], at, body)

        def wanted(self, entry: dict[str, Any]) -> dict[str, Any]:
            """What to do with a large file: nothing where it is in the store."""
            known = {"oid": entry["oid"], "size": entry["size"]}
            here = entry["oid"] in hub.store
            return known if here else known | {"actions": {"upload": {"href": f"{hub.url}/upload/{entry['oid']}"}}}

        def about(self, repo: Repo, body: bytes) -> tuple[int, Any]:
            """Which files are large ones, which are not wanted, and what is there of each."""
            told, asked = [], json.loads(body)
            ignored = repo.files.get(".gitignore", Bytes(b""))
            patterns = ignored.read(0, ignored.size).decode().split() + asked.get("gitIgnore", "").split()
            for file in asked["files"]:
                there = repo.files.get(file["path"])
                large = file["path"].endswith((".safetensors", ".bin"))
                oid = None if there is None else there.etag if large else blob_id(there)
                ignore = any(fnmatch(file["path"], pattern) for pattern in patterns)
                mode = "lfs" if large else "regular"
                told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
            return 200, {"files": told}

        def committed(self, name: str, repo: Repo, body: bytes) -> tuple[int, Any]:
            lines = [json.loads(line) for line in body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, repo.commit):
                return 412, {"error": "A commit has happened since. Please refresh and try again."}
            files = dict(repo.files)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = Bytes(base64.b64decode(value["content"]))
                if line["key"] == "lfsFile":
                    if value["oid"] not in hub.store:
                        return 400, {"error": f"{value['path']} was never uploaded"}
                    files[value["path"]] = Bytes(hub.store[value["oid"]])
            oid = repo.take(files)
            return 200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid}

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.instead is not None and hub.instead(self, path):
                return self.note(path, 0)
            if fault := hub.fault(self.command, path, ("status",)):
                return self.send(fault.status, fault.headers, b"")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?", path):
                return self.listing(match[1], match[2], match[3])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.resolve(path, *match.groups())
            if match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
                if self.headers.get("Authorization"):
                    hub.leaked.append(path)
                content = hub.repos[match[1]].files[match[2]]
                return self.content(path, content, {"ETag": '"of-the-storage"'})
            self.send(404, {}, b"")

        def repo(self, name: str, revision: str | None) -> Repo | None:
            """The repository at that revision if this request may see it; otherwise it has been answered."""
            repo = hub.repos.get(name)
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repo is not None and repo.gated and not authorised:
                self.send(403 if self.headers.get("Authorization") else 401, {"X-Error-Code": "GatedRepo"}, b"")
            elif repo is None or (repo.private and not authorised):
                self.send(401 if not authorised else 404, {"X-Error-Code": "RepoNotFound"}, b"")
            elif (found := repo.at(revision)) is None:
                self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
            else:
                return found
            return None

        def listing(self, name: str, what: str | None, revision: str | None) -> None:
            repo = self.repo(name, revision)
            if repo is None:
                return
            files = [{"type": "file", "path": n, "size": c.size, "oid": c.etag[:40]} for n, c in repo.files.items()]
            siblings: list[dict[str, Any]] = [{"rfilename": n} for n in repo.files]
            if "blobs=" in self.path.lower():
                siblings = [described(n, c) for n, c in repo.files.items()]
            info = {"id": name, "sha": repo.commit, "private": repo.private, "siblings": siblings}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(files if what == "tree" else info).encode())

        def resolve(self, path: str, name: str, revision: str, file: str) -> None:
            repo = self.repo(name, revision)
            if repo is None:
                return
            commit = "b" * 40 if hub.fault(self.command, path, ("commit",)) else repo.commit
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            content = repo.files.get(file)
            if content is None:
                return self.send(404, headers | {"X-Error-Code": "EntryNotFound"}, b"")
            if not file.endswith((".safetensors", ".bin")):
                return self.content(path, content, headers | {"ETag": f'"{content.etag[:40]}"'})
            headers |= {"X-Linked-Etag": f'"{content.etag}"', "X-Linked-Size": str(content.size)}
            place = hub.url.replace("127.0.0.1", "localhost")  # another host, so that a token must not follow
            self.send(302, headers | {"Location": f"{place}/storage/{name}/{file}?signed=1"}, b"")

        def content(self, path: str, content: Content, headers: dict[str, str]) -> None:
            start, end, status = 0, content.size, 200
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted and not hub.fault(self.command, path, ("whole",)):
                start, end = int(wanted[1]), min(int(wanted[2] or content.size) + 1, content.size)
                status = 206
                if start >= content.size:
                    return self.send(416, headers | {"Content-Range": f"bytes */{content.size}"}, b"")
                if hub.fault(self.command, path, ("short",)):
                    end = (start + end) // 2
                headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{content.size}"}
            self.send_response(status)
            self.send_headers(path, headers | {"Content-Length": str(end - start)})
            sent = 0
            if self.command == "GET":
                stop = (start + end) // 2 if hub.fault("GET", path, ("drop",)) else end
                try:
                    for at in range(start, stop, PIECE):
                        self.wfile.write(content.read(at, min(at + PIECE, stop)))
                        sent += min(at + PIECE, stop) - at
                except OSError:  # the client went away
                    self.close_connection = True
                if stop < end:
                    self.close_connection = True
            self.note(path, sent)

        def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            self.send_headers(unquote(urlsplit(self.path).path), headers | {"Content-Length": str(len(body))})
            if self.command != "HEAD":
                self.wfile.write(body)
            self.note(unquote(urlsplit(self.path).path), len(body) if self.command != "HEAD" else 0)

        def send_headers(self, path: str, headers: dict[str, str]) -> None:
            for key, value in (hub.rewrite(self.command, path, headers) if hub.rewrite else headers).items():
                self.send_header(key, value)
            self.end_headers()

        def note(self, path: str, count: int) -> None:
            with hub.lock:
                hub.noted.append((self.command, path, self.headers.get("Range"), count))

    return Handler


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may go away in the middle of a request; everything else is a fault of this file."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def serving() -> Iterator[Hub]:
    """A server on a free port of 127.0.0.1, for as long as the block runs."""
    hub = Hub("")
    server = Server(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def connect(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub in this process talk to `hub`, with an empty cache and no token."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    # No certificates: reading the system's is half of what a test over the loopback, by plain HTTP, costs.
    cache.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(cache.parent))
    close_session()
