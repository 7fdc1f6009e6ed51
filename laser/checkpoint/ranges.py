"""Byte ranges of files on the Hub: asked for again where a connection drops, and refused where a file has changed.

A file is known by its ETag, which the first answer brings and every later one has to repeat; for weights it is the
sha256 of the content. Waiting and trying again are bounded. Tokens are those of `hf auth login`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from laser.checkpoint.answers import AGAIN, asked_wait, bare, session
from laser.errors import CheckpointError

TRIES = 6  # in a row that bring less than STEP
STEP = 1 << 20  # bytes

log = logging.getLogger("laser")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit. etag and size are None until an answer has told them."""

    repo: str
    name: str
    commit: str
    etag: str | None = None
    size: int | None = None


def look_at(file: RemoteFile, count: int) -> tuple[RemoteFile, bytes]:
    """The file with its ETag and size, and its first `count` bytes (fewer where it is shorter)."""
    answers: list[RemoteFile] = []
    data = b"".join(_fetch(file, 0, count, answers))
    return answers[0], data


def fetch(file: RemoteFile, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a file, in pieces as they arrive. Raises CheckpointError."""
    return _fetch(file, start, end, [])


def _fetch(file: RemoteFile, start: int, end: int, answers: list[RemoteFile]) -> Iterator[memoryview]:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file.repo, file.name, revision=file.commit)
    failures, reason = 0, "no answer"
    while start < end:
        before, wait = start, None
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
                if answer.status_code in AGAIN:
                    reason, wait = f"status {answer.status_code}", asked_wait(answer, f"{file.repo}/{file.name}")
                else:
                    file = _checked(answer, file, start)
                    answers.append(file)
                    end = min(end, file.size or 0)
                    for piece in answer.iter_bytes():  # as it comes: pieces of a size would be lost with a connection
                        if start + len(piece) > end:
                            raise CheckpointError(f"{file.name}: the Hub sent more than was asked for; run again")
                        start += len(piece)
                        yield memoryview(piece)
                    reason = "connection closed early"
        except (HfHubHTTPError, OfflineModeIsEnabled):
            raise  # an answer, and not a broken connection
        except transport_errors() as error:
            reason = f"{type(error).__name__}: {error}"
        if start >= end:
            return
        failures = failures + 1 if start - before < STEP else 0
        if failures >= TRIES:
            raise CheckpointError(
                f"{file.repo}/{file.name}: bytes {start}-{end - 1} could not be fetched in {TRIES} tries ({reason}); "
                "run the same command again later"
            )
        pause(failures, f"{file.repo}/{file.name}: {reason}", wait)


def pause(failures: int, why: str, asked: float | None = None) -> None:
    """Wait before the next try, longer after each failure, or as long as the server asked."""
    seconds = min(8.0, 0.25 * 2**failures) if asked is None else asked
    log.warning("%s; trying again in %g s", why, seconds)
    time.sleep(seconds)


def transport_errors() -> tuple[type[BaseException], ...]:
    """What the Hub's client raises for a connection that fails. Its library (httpx, then httpx2) depends on the
    client's version, so its base is taken from the client's own error."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__mro__[1], OSError)


def _checked(answer: Any, file: RemoteFile, start: int) -> RemoteFile:
    """The file as an answer describes it. Raises CheckpointError for another one than was asked for, or a refusal."""
    from huggingface_hub.utils import hf_raise_for_status

    if answer.status_code >= 400:
        if answer.status_code == 416:  # nothing there: it has become shorter, or was empty from the first
            raise CheckpointError(
                f"{file.repo}/{file.name} is truncated: found no bytes from {start}, expected "
                f"{file.size or 'a header'}; run the same command again, or try another revision"
            )
        answer.read()
        hf_raise_for_status(answer)
    hops = [*answer.history, answer]
    etag = _etag(hops)
    span = re.fullmatch(r"bytes (\d{1,16})-\d{1,16}/(\d{1,16})", answer.headers.get("Content-Range", ""))
    if answer.status_code != 206 or not span or int(span[1]) != start:
        raise CheckpointError(
            f"{file.repo}/{file.name}: status {answer.status_code}, expected a range from byte {start}: "
            f"this server does not serve ranges; try `hf download {file.repo}` first"
        )
    found = replace(file, etag=etag, size=int(span[2]))
    commits = {hop.headers["X-Repo-Commit"] for hop in hops if "X-Repo-Commit" in hop.headers}
    for what, old, new in (
        ("ETag", file.etag, found.etag),
        ("size", file.size, found.size),
        ("commit", file.commit, commits.pop() if len(commits) == 1 else file.commit),
    ):
        if old is not None and old != new:
            raise CheckpointError(
                f"{file.repo}/{file.name} changed on the Hub while it was read: found {what} {new}, expected {old}; "
                "run the command again"
            )
    return found


def _etag(hops: list[Any]) -> str | None:
    """The Hub's name for the content: of the file behind a redirect where there is one, not of the storage's copy."""
    linked: list[Mapping[str, str]] = [h.headers for h in hops if "X-Linked-Etag" in h.headers]
    raw = linked[0]["X-Linked-Etag"] if linked else hops[-1].headers.get("ETag")
    return bare(raw) if raw else None
