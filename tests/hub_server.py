"""A small Hub on the loopback: files by HEAD and by byte range behind a redirect, listings, tokens, faults on demand.

It speaks what huggingface_hub and laser ask for, counts every byte that it sends, and never runs longer than its test.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Fault:
    """What to do to requests whose path matches, so many times: a status, a drop after half the body, other bytes.

    kind: "status", "drop", "commit" (another X-Repo-Commit), "whole" (ranges ignored), "short" (half of the range, as
    if that were all)
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
    log: list[tuple[str, str, str | None, int]] = field(default_factory=list)  # method, path, range, bytes of the body
    leaked: list[str] = field(default_factory=list)  # paths of the storage that were sent a token
    commits: list[dict[str, Any]] = field(default_factory=list)  # what was pushed
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

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent so far for paths that match. A client may have its answer before it is in the log."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.busy == 0, 10)
        with self.lock:
            return sum(count for _, path, _, count in self.log if re.search(pattern, path))

    def fault(self, method: str, path: str, kinds: tuple[str, ...]) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.kind in kinds and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each small answer waits 40 ms for an acknowledgement

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.counted()

        def do_GET(self) -> None:
            self.counted()

        def counted(self) -> None:
            with hub.idle:
                hub.busy += 1
            try:
                self.answer()
            finally:
                with hub.idle:
                    hub.busy -= 1
                    hub.idle.notify_all()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.posted(unquote(urlsplit(self.path).path), body)

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

        def repo(self, name: str) -> Repo | None:
            """The repository if this request may see it; otherwise it has been answered."""
            repo = hub.repos.get(name)
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repo is not None and repo.gated and not authorised:
                self.send(403 if self.headers.get("Authorization") else 401, {"X-Error-Code": "GatedRepo"}, b"")
            elif repo is None or (repo.private and not authorised):
                self.send(401 if not authorised else 404, {"X-Error-Code": "RepoNotFound"}, b"")
            else:
                return repo
            return None

        def listing(self, name: str, what: str | None, revision: str | None) -> None:
            repo = self.repo(name)
            if repo is None:
                return
            if revision not in (None, "main", repo.commit):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
            files = [{"type": "file", "path": n, "size": c.size, "oid": c.etag[:40]} for n, c in repo.files.items()]
            info = {"id": name, "sha": repo.commit, "siblings": [{"rfilename": n} for n in repo.files]}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(files if what == "tree" else info).encode())

        def resolve(self, path: str, name: str, revision: str, file: str) -> None:
            repo = self.repo(name)
            if repo is None:
                return
            if revision not in ("main", repo.commit):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
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

        def posted(self, path: str, body: bytes) -> None:
            self.send(404, {}, b"")

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
                hub.log.append((self.command, path, self.headers.get("Range"), count))

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """A server on a free port of 127.0.0.1, for as long as the block runs."""
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
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
