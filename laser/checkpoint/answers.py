"""What every answer of a Hub has to be before the Hub's client believes it, and what to say of one that refuses.

The client makes paths in its cache of commits and ETags, waits as long as a server asks, and reads what comes. So each
answer is looked at first, redirects too, and its body is counted and timed while it arrives.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from laser.errors import LONGEST, CheckpointError, LaserError, first_line

LONGEST_WAIT = 300.0  # seconds that a server may ask for
TRANSIENT = (408, 429, 500, 502, 503, 504)
RATE_SECONDS = 60.0  # seconds of waiting over which a rate is measured
LEAST_RATE = 1024.0  # bytes/s; at it 1 GB takes 11 days, so nobody's connection is meant by what is slower
PIECE = 1 << 16  # bytes that are sent between two looks at the clock
LARGEST_LISTING = 100_000_000  # bytes; also of a file whose size the server does not give
LARGEST_ERROR = 1_000_000  # bytes of the body of a refusal
COMMIT = re.compile(r"[0-9a-f]{40}")
# It becomes a file's name in the cache. The client strips W and / from its start.
ETAG = re.compile(r"[0-9A-VX-Za-vx-z][\w.+=-]{0,127}", re.ASCII)
SIZE = re.compile(r"[0-9]{1,16}")
_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOENT),
)


# Who shows how far a download is. Not handed from call to call: a shard is fetched when some thread reads it.
_shown_by: list[Callable[[str], type]] = []


@contextmanager
def downloads_shown_by(bar: Callable[[str], type]) -> Iterator[None]:
    """Within it a download, on whatever thread, is shown by the class that `bar` gives for the file's name.

    The class mimics tqdm."""
    _shown_by.append(bar)
    try:
        yield
    finally:
        _shown_by.remove(bar)


def shown_download(name: str) -> type | None:
    """The class of the bar of a file's download; None for that of the Hub's own client."""
    return _shown_by[-1](name) if _shown_by else None


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
        shown = found if len(found) <= 60 else f"{found[:57]}..."
        return CheckpointError(
            f"{where}: the answer has {what} {shown!r}, expected {expected}; this is no Hub, or one out of order: "
            "check HF_ENDPOINT and proxies"
        )

    if status == 409 and path.endswith("/api/repos/create"):  # the client would ask again without end or pause
        raise CheckpointError(f"{where}: it is there, or is being made (status 409); run the same command again")
    if status in TRANSIENT:
        require_short_wait(answer, where)
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
    # A range or a file whose length is given ends there; everything else must end somewhere.
    length = int(headers["Content-Length"]) if "Content-Length" in headers else None
    largest = LARGEST_ERROR if status >= 400 else LARGEST_LISTING if length is None or "/api/" in path else length
    if length is not None and length > largest:
        raise CheckpointError(f"{where}: the answer has {length} bytes, expected at most {largest}; check HF_ENDPOINT")
    answer.stream = _guarded(answer.stream, where, largest)


def _guarded(stream: Any, where: str, largest: int) -> Any:
    """The body, given up where it comes too slowly or does not end. Time spent on what has arrived does not count."""

    from httpx2 import SyncByteStream

    class Guarded(SyncByteStream):
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
                if waited >= RATE_SECONDS:
                    require_rate(since, waited, where)
                    waited, since = 0.0, 0
                yield piece

        def close(self) -> None:
            stream.close()

    return Guarded()


def _paced(stream: Any, where: str) -> Any:
    """What is sent, given up where it is taken too slowly."""

    from httpx2 import SyncByteStream

    class Paced(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            waited, since = 0.0, 0
            for whole in stream:
                for at in range(0, len(whole), PIECE):
                    piece = whole[at : at + PIECE]
                    before = time.monotonic()
                    yield piece
                    waited, since = waited + time.monotonic() - before, since + len(piece)
                    if waited >= RATE_SECONDS:
                        require_rate(since, waited, where, "takes")
                        waited, since = 0.0, 0

        def close(self) -> None:
            stream.close()

    return Paced()


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


def require_short_wait(answer: Any, where: str) -> None:
    """Raises CheckpointError where the server asks for more than LONGEST_WAIT, which the client would wait."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(answer.headers)
    after = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*", answer.headers.get("Retry-After", ""))
    for seconds in (float(after[1]) if after else 0.0, float(limit.reset_in_seconds) if limit else 0.0):
        if seconds > LONGEST_WAIT:
            raise CheckpointError(
                f"{where}: the Hub limits requests (status {answer.status_code}) and asks to wait {seconds:.0f} s; run "
                "the same command again after that, or log in with `hf auth login`"
            )


def transport_errors() -> tuple[type[BaseException], ...]:
    """What the Hub's client raises for a connection that fails."""
    from httpx2 import HTTPError

    return (HTTPError, OSError)


def _cause(error: BaseException) -> str:
    """Why the Hub cannot be reached, where the client says it: (status 429), (ConnectError), or nothing."""
    cause = error.__cause__
    response = getattr(cause, "response", None)
    return (
        f" (status {response.status_code})" if response is not None else f" ({type(cause).__name__})" if cause else ""
    )


@contextmanager
def hub_errors(repo: str, revision: str | None, *, writing: bool = False) -> Iterator[None]:
    """What the Hub's client raises, as a CheckpointError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        BadRequestError,
        EntryNotFoundError,
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        session()
        failed: BaseException | None = None
        try:
            yield
        except RuntimeError as error:  # of a thread that sends a file: it says which, its cause what is wrong
            failed = error.__cause__ or error
        if failed is not None:
            raise failed
    except LaserError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: ask for access on {constants.ENDPOINT}/{repo}, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no such model: the Hub has no {repo}, or not for you; check the spelling, or log in with `hf auth login`"
        ) from error
    except LocalTokenNotFoundError as error:
        raise CheckpointError(f"{repo}: nobody is logged in; log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo} has no revision {revision}; try {repo} alone, or a branch, tag or commit"
        ) from error
    except LocalEntryNotFoundError as error:
        _require_address(repo, error)
        if isinstance(error.__cause__, FileMetadataError):
            raise CheckpointError(f"{repo}: {first_line(error.__cause__)}; check HF_ENDPOINT and proxies") from error
        raise CheckpointError(
            f"no such model: {repo} is neither a directory nor in the Hub cache, and the Hub cannot be reached"
            f"{_cause(error)}; try `hf download {repo}` where it can"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo} lacks a file ({str(error).splitlines()[-1]}); try another model") from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo} is not a Hub id ({error}); try org/name or a directory") from error
    except HfHubHTTPError as error:
        raise CheckpointError(_status(repo, error, writing)) from error
    except transport_errors() as error:
        _require_address(repo, error)
        if why := _of_the_cache(error):
            raise CheckpointError(f"{repo}: {why}") from error
        why = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{repo}: the Hub cannot be reached ({why}); run the same command again later") from error
    except Exception as error:  # the client trusts an answer's structure; what one breaks can be of any type
        if isinstance(error.__cause__, BadRequestError):
            raise CheckpointError(
                f"{repo}: the Hub refuses what is sent ({' '.join(str(error).split())[:LONGEST]}); mend that, and run "
                "the same command again"
            ) from error
        raise CheckpointError(
            f"{repo}: the Hub's answer makes no sense ({type(error).__name__}: {first_line(error)}); check HF_ENDPOINT "
            "and proxies, or run the same command again later"
        ) from error


def _status(repo: str, error: Any, writing: bool) -> str:
    """What to say of an answer that refuses."""
    status, message = error.response.status_code, ""
    if writing and status in (409, 412):
        return (
            f"{repo}: somebody has committed to it meanwhile, or it is being made (status {status}); run the same "
            "command again"
        )
    if writing and status in (400, 413, 422) and error.server_message:
        message = f" ({' '.join(str(error.server_message).split())[:LONGEST]})"
    as_who = "write to it" if writing else "read it"
    remedy = {
        401: "log in with `hf auth login`",
        403: f"log in with `hf auth login` as someone who may {as_who}",
        **dict.fromkeys((400, 413, 422), "mend what it refuses, and run the same command again" if message else ""),
    }
    advice = remedy.get(status) or "run the same command again later"
    return f"{repo}: the Hub answered with status {status}{message}; {advice}"


def _require_address(repo: str, error: BaseException) -> None:
    """Raises CheckpointError where the Hub could not be reached because HF_ENDPOINT is no address at all."""
    from huggingface_hub import constants

    if not re.fullmatch(r"https?://[^/\s?#]+(/\S*)?", constants.ENDPOINT):
        raise CheckpointError(
            f"{repo}: HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address of a Hub; unset it, or try "
            "HF_ENDPOINT=https://huggingface.co"
        ) from error


def _of_the_cache(error: BaseException) -> str | None:
    """What is wrong with the cache's disk, where an error came from it and not from the network."""
    from huggingface_hub import constants

    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    move = "or set HF_HUB_CACHE (or HF_HOME) to a directory elsewhere, and run the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk of the Hub's cache {constants.HF_HUB_CACHE} is full ({error.strerror}), whole files in it are "
            f"kept; free some space, {move}"
        )
    return (
        f"the Hub's cache {constants.HF_HUB_CACHE} cannot be used ({error.strerror}: {error.filename}); "
        f"check its permissions, {move}"
    )
