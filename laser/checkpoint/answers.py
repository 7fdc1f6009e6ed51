"""What every answer of a Hub has to be before the Hub's client believes it: one place for all of its requests.

The client makes paths in its cache of commits and ETags, waits as long as a server asks, and reads what comes. So each
answer is looked at first, redirects too, and its body is counted and timed while it arrives.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from laser.errors import CheckpointError

LONGEST_WAIT = 300.0  # seconds that a server may ask for
AGAIN = (408, 429, 500, 502, 503, 504)
WINDOW = 60.0  # seconds of waiting over which a rate is measured
LEAST_RATE = 1024.0  # bytes/s; at it 1 GB takes 11 days, so nobody's connection is meant by what is slower
PIECE = 1 << 16  # bytes that are sent between two looks at the clock
LARGEST_LISTING = 100_000_000  # bytes; also of a file whose size the server does not tell
LARGEST_ERROR = 1_000_000  # bytes of the body of a refusal
COMMIT = re.compile(r"[0-9a-f]{40}")
# It becomes a file's name in the cache. The client strips W and / from its start.
ETAG = re.compile(r"[0-9A-VX-Za-vx-z][\w.+=-]{0,127}", re.ASCII)
SIZE = re.compile(r"[0-9]{1,16}")


def session() -> Any:
    """The HTTP client that huggingface_hub shares among its requests, whose answers are looked at from now on."""
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks
    if _look not in hooks["response"]:  # another client may have taken its place after a broken connection
        client.event_hooks = {"request": [*hooks["request"], _ask], "response": [*hooks["response"], _look]}
    return client


def _ask(request: Any) -> None:
    """No request waits for ever, and no answer comes packed: a few bytes could become gigabytes."""
    from huggingface_hub import constants

    reading = request.method in ("GET", "HEAD")
    where = f"{request.url.host}{request.url.path}"[:200]
    longest = float(constants.HF_HUB_DOWNLOAD_TIMEOUT) if reading else LONGEST_WAIT  # a commit takes its time
    limits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: longest if limits.get(kind) is None else limits[kind] for kind in ("connect", "read", "write", "pool")
    }
    request.headers["Accept-Encoding"] = "identity"
    if not reading:
        request.stream = _paced(request.stream, where)


def _look(answer: Any) -> None:
    """Raises CheckpointError for an answer that no Hub gives."""
    request, headers, status = answer.request, answer.headers, answer.status_code
    where, path = f"{request.url.host}{request.url.path}"[:200], request.url.path

    def refuse(what: str, found: str, expected: str) -> CheckpointError:
        told = found if len(found) <= 60 else f"{found[:57]}..."
        return CheckpointError(
            f"{where}: the answer has {what} {told!r}, expected {expected}; this is no Hub, or one out of order: "
            "check HF_ENDPOINT and proxies"
        )

    if status == 409 and path.endswith("/api/repos/create"):  # the client would ask again without end or pause
        raise CheckpointError(f"{where}: it is there, or is being made (status 409); run the same command again")
    if status in AGAIN:
        asked_wait(answer, where)
    commit, linked = headers.get("X-Repo-Commit"), headers.get("X-Linked-Etag")
    if commit is not None and not COMMIT.fullmatch(commit):
        raise refuse("commit", commit, "40 hexadecimal digits")
    etag = linked or (headers.get("ETag") if request.method == "HEAD" or "/resolve" in path else None)
    if etag is not None and not ETAG.fullmatch(bare(etag)):
        raise refuse("ETag", etag, "up to 128 letters and digits")
    for name in ("X-Linked-Size", "Content-Length"):
        if name in headers and not SIZE.fullmatch(headers[name]):
            raise refuse(name, headers[name], "a size in bytes")
    if headers.get("Content-Encoding", "identity").lower() != "identity" and request.method != "HEAD":
        raise refuse("Content-Encoding", headers["Content-Encoding"], "none, which was asked for")
    target = headers.get("Location")
    if target is not None and 300 <= status < 400:
        scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", target)
        if scheme and scheme[1].lower() not in ("http", "https"):
            raise refuse("redirect to", target, "an address of http or https")
        if request.url.scheme == "https" and scheme and scheme[1].lower() == "http":
            raise refuse("redirect to", target, "an address of https")
    if request.method == "HEAD":
        return
    # A range or a file whose length is told ends there; everything else must end somewhere.
    told = int(headers["Content-Length"]) if "Content-Length" in headers else None
    largest = LARGEST_ERROR if status >= 400 else LARGEST_LISTING if told is None or "/api/" in path else told
    if told is not None and told > largest:
        raise CheckpointError(f"{where}: the answer has {told} bytes, expected at most {largest}; check HF_ENDPOINT")
    answer.stream = _guarded(answer.stream, where, largest)


def _guarded(stream: Any, where: str, largest: int) -> Any:
    """The body, given up where it comes too slowly or does not end. Time spent on what has arrived does not count."""

    class Guarded(_kind_of(stream)):
        def __iter__(self) -> Iterator[bytes]:
            pieces, so_far, waited, since = iter(stream), 0, 0.0, 0
            while True:
                before = time.monotonic()
                piece = next(pieces, None)
                waited += time.monotonic() - before
                if piece is None:
                    return
                so_far, since = so_far + len(piece), since + len(piece)
                if so_far > largest:
                    raise CheckpointError(
                        f"{where}: the Hub sent {so_far} bytes and goes on, expected at most {largest}; "
                        "check HF_ENDPOINT and proxies"
                    )
                if waited >= WINDOW:
                    require_rate(since, waited, where)
                    waited, since = 0.0, 0
                yield piece

        def close(self) -> None:
            stream.close()

    return Guarded()


def _paced(stream: Any, where: str) -> Any:
    """What is sent, given up where it is taken too slowly."""

    class Paced(_kind_of(stream)):
        def __iter__(self) -> Iterator[bytes]:
            waited, since = 0.0, 0
            for whole in stream:
                for at in range(0, len(whole), PIECE):
                    piece = whole[at : at + PIECE]
                    before = time.monotonic()
                    yield piece
                    waited, since = waited + time.monotonic() - before, since + len(piece)
                    if waited >= WINDOW:
                        require_rate(since, waited, where, "takes")
                        waited, since = 0.0, 0

        def close(self) -> None:
            stream.close()

    return Paced()


def _kind_of(stream: Any) -> type:
    """The class that the client asks of a body. Its library (httpx, then httpx2) depends on the client's version."""
    return next(c for c in type(stream).__mro__ if c.__name__ == "SyncByteStream")


def require_rate(count: int, seconds: float, where: str, what: str = "sends") -> None:
    """Raises CheckpointError where `count` bytes in so many seconds are less than LEAST_RATE."""
    if count / seconds < LEAST_RATE:
        kept = "whole files in the cache are kept" if what == "sends" else "files that were sent whole are kept"
        raise CheckpointError(
            f"{where}: the Hub is too slow: found {count / seconds:.0f} bytes/s in {seconds:.0f} s, expected at least "
            f"{LEAST_RATE:.0f}; {kept}, run the same command again on a better connection"
        )


def bare(etag: str) -> str:
    """An ETag without its marks."""
    return etag.removeprefix("W/").strip('"')


def asked_wait(answer: Any, where: str) -> float | None:
    """Seconds that the server asks to wait, by Retry-After or RateLimit; None where it says nothing.

    Raises CheckpointError where they are more than LONGEST_WAIT.
    """
    told = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*", answer.headers.get("Retry-After", "")) or re.search(
        r"\bt\s*=\s*(\d+)", answer.headers.get("RateLimit", "")
    )
    if not told:
        return None
    if float(told[1]) > LONGEST_WAIT:
        raise CheckpointError(
            f"{where}: the Hub limits requests (status {answer.status_code}) and asks to wait {float(told[1]):.0f} s; "
            "run the same command again after that, or log in with `hf auth login`"
        )
    return float(told[1])
