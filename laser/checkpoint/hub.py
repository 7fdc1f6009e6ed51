"""Models on the Hub, `org/name[@revision]`: from the cache where they are in it, otherwise only what is needed.

Opening a model fetches its config, its index and the headers of its shards, and pins the commit. Weights then come by
byte range, or as whole shards into the Hub's own cache, one ahead of the work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from laser.checkpoint.answers import bare, hub_errors, session, shown_download, transport_errors
from laser.checkpoint.formats import what_lies_on_hub
from laser.checkpoint.safetensors import Shard, check_length, file_pieces, parse_header, read_header, sha256_of
from laser.checkpoint.side_files import WEIGHTS, folded, is_one_file, modules_of
from laser.checkpoint.weights import files_in, index_at, order
from laser.errors import CheckpointError
from laser.files import read_regular

T = TypeVar("T")
# Bytes of a shard in the cache up to which it is hashed when it is opened; all are before an output is made of them.
SMALL_FILE = 64 << 20
SLOW_TRIES = 6  # in a row that bring less than STEP
STEP = 1 << 20  # bytes

ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


log = logging.getLogger("laser")


@dataclass(frozen=True)
class Hub:
    """Where a checkpoint comes from. folder: its snapshot in the Hub's cache, which may hold only some of its files."""

    repo: str
    revision: str | None  # as it was asked for
    commit: str
    folder: Path
    etags: Mapping[str, str] = field(default_factory=dict)  # by shard: the content's sha256, as the Hub says

    @property
    def content(self) -> str | None:
        """One hash over the shards' ETags: equal for equal weights. None where the cache does not have them."""
        if not self.etags or "" in self.etags.values():
            return None
        return hashlib.sha256("\n".join(f"{n} {e}" for n, e in sorted(self.etags.items())).encode()).hexdigest()


def find(model: str) -> Hub | None:
    """The model called `model`, its config.json fetched if need be; None where that is no Hub id.

    Raises CheckpointError where the Hub has no such model, does not give it, or cannot be reached.
    """
    match = ID.fullmatch(model)
    if not match:
        return None
    from huggingface_hub import try_to_load_from_cache

    repo, revision = match["repo"], match["revision"]
    if revision is not None and (not is_inside(revision) or revision.startswith("-")):
        raise CheckpointError(f"{revision!r} is no revision of {repo}; name a branch, tag or commit, or {repo} alone")
    with hub_errors(repo, revision):
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(cached, str):
        require_inside_cache(Path(cached))
    if isinstance(cached, str) and _is_whole(Path(cached).parent):
        return Hub(repo, revision, Path(cached).parent.name, Path(cached).parent)
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(repo, revision):
        try:
            path = _to_cache(repo, "config.json", revision)
        except LocalEntryNotFoundError:
            raise  # the Hub cannot be reached
        except EntryNotFoundError as error:
            if what := recognised(repo, revision):
                raise CheckpointError(what) from error
            raise
    return Hub(repo, revision, path.parent.name, path.parent)


def _order(folder: Path) -> tuple[str, ...]:
    """The files for which transformers looks, by a snapshot's config; whoever opens it says how that is damaged."""
    try:
        config = json.loads(read_regular(folder / "config.json"))
    except (OSError, ValueError):
        config = None
    return order(config if isinstance(config, dict) else {})


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot in the cache has all the weights that would be loaded if the repository had no other files."""
    start = next((name for name in _order(folder) if (folder / name).exists()), None)
    if start is None or not start.endswith(".json"):
        return start is not None
    files = set(index_at(folder / start).values())  # none where it is damaged: whoever opens it says how
    return all((folder / name).exists() for name in files)


def recognised(repo: str, revision: str | None) -> str | None:
    """What a repository without config.json or without weights is, by the names of its files; None where that is not
    known, or where the Hub is off line."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    with hub_errors(repo, revision):
        return what_lies_on_hub(
            repo, sorted(_hub_names(repo, revision)), lambda name: read_regular(_to_cache(repo, name, revision))
        )


def listing(hub: Hub) -> frozenset[str]:
    """Names of the repository's files; those in the cache where it has all that would be loaded, and nobody answers.

    Not those in the cache without asking: the repository may have a file that is loaded before them. Where the cache
    remembers that it has none, nobody is asked.
    """
    here, whole = files_in(hub.folder), _is_whole(hub.folder)
    if whole:
        before = takewhile(lambda name: name not in here, _order(hub.folder))
        if all(_is_known_to_be_absent(hub, name) for name in before):
            return here
    try:
        with hub_errors(hub.repo, hub.revision):
            asked = (hub.repo, hub.commit)
            names = _hub_names(*asked) if whole else _patiently(lambda: _hub_names(*asked), hub.repo)
    except CheckpointError:
        if not whole:
            raise
        return here
    _require_apart(hub, names)
    return frozenset(names)


def _is_known_to_be_absent(hub: Hub, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub.repo, name, revision=hub.commit)
    return found is not None and not isinstance(found, str)  # it is not known, or the file's path


def _hub_names(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    return plain_names(repo, HfApi().model_info(repo, revision=revision).siblings)


def _require_apart(hub: Hub, names: Sequence[str]) -> None:
    """Raises CheckpointError for names of which the cache's disk would keep one."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(folded(name), name)
        if twin != name and is_one_file(hub.folder / "CONFIG.JSON", hub.folder / "config.json"):
            raise CheckpointError(
                f"{hub.repo} holds {twin} and {name}, and the disk of the Hub's cache makes no difference between the "
                "two; set HF_HUB_CACHE to a directory on another disk, and remove this model from the old one"
            )


def plain_names(repo: str, siblings: Sequence[Any] | None) -> list[str]:
    """Names of a listing. Raises CheckpointError for one that is no path inside a repository."""
    names = [file.rfilename for file in siblings or ()]
    if hostile := next((name for name in names if not isinstance(name, str) or not is_inside(name)), None):
        shown = repr(hostile)
        raise CheckpointError(
            f"{repo} lists a file {shown if len(shown) <= 60 else shown[:57] + '...'}, expected a path inside the "
            "repository; do not use this model"
        )
    return names


def is_inside(name: str) -> bool:
    """Whether a name, with / between its parts, is a path inside a folder on every system, and can be shown."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        return False
    return "\\" not in name and all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name)


def headers(hub: Hub, names: Sequence[str]) -> tuple[Hub, tuple[Shard, ...]]:
    """The shards by their headers alone, eight at a time, and the model with their ETags."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: _remote_header(hub, name), names))
    return replace(hub, etags={shard.name: etag for etag, shard in found}), tuple(shard for _, shard in found)


def require_inside_cache(local: Path) -> None:
    """Raises CheckpointError for an entry of a snapshot that links to a file outside the Hub's cache."""
    link = local.resolve()
    snapshot = next(p for p in local.parents if p.parent.name == "snapshots")
    repository = snapshot.parents[1]  # its blobs may lie on another disk as a whole; newer caches share blobs
    if not any(link.is_relative_to(p.resolve()) for p in (repository.parent, repository / "blobs")):
        raise CheckpointError(
            f"{local} links to {link}, which is not in the Hub's cache; remove the link, and run the same command again"
        )


def require_content(hub: Hub, largest: int | None = None) -> None:
    """Raises CheckpointError for a file of weights in the cache that has not the sha256 by which the cache calls it.

    largest: bytes up to which a file is read for that; None: each, about a second per GB.
    """
    for name, expected in hub.etags.items():
        local = hub.folder / name
        if not re.fullmatch(r"[0-9a-f]{64}", expected) or not local.exists():
            continue
        if largest is not None and local.stat().st_size > largest:
            continue
        if (found := sha256_of(local)) != expected:
            raise CheckpointError(
                f"{local} was damaged in the Hub's cache: found sha256 {found[:12]}, expected {expected[:12]}; remove "
                f"{local.resolve()}, and run the same command again"
            )


def _remote_header(hub: Hub, name: str) -> tuple[str, Shard]:
    local = hub.folder / name
    if local.exists():
        require_inside_cache(local)
        etag, shard = _cached_etag(local), read_header(local)
        require_content(replace(hub, etags={name: etag}), SMALL_FILE)
        return etag, shard
    with hub_errors(hub.repo, hub.revision):
        file = _remote_file(hub, name)
        length = int.from_bytes(b"".join(_fetch(file, 0, 8)), "little")
        check_length(name, file.size, length)
        text = b"".join(_fetch(file, 8, 8 + length))

    def data(start: int, end: int) -> Iterator[memoryview]:
        if local.exists():
            yield from file_pieces(local, start, end)
            return
        with hub_errors(hub.repo, hub.revision):
            yield from _fetch(file, start, end)

    lock = Lock()

    def whole() -> Path:
        with lock:  # of several that need it, one fetches it
            return _download(replace(hub, etags={name: file.etag}), name)

    return file.etag, replace(parse_header(name, local, file.size, text, data), whole=whole)


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit. etag: for weights, the sha256 of the content; "" where there is none."""

    repo: str
    name: str
    commit: str
    etag: str
    size: int


def _remote_file(hub: Hub, name: str) -> RemoteFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    metadata = get_hf_file_metadata(hf_hub_url(hub.repo, name, revision=hub.commit), retry_on_errors=True)
    if metadata.size is None:
        raise CheckpointError(f"{hub.repo}/{name}: the Hub does not give its size; check HF_ENDPOINT and proxies")
    file = RemoteFile(hub.repo, name, hub.commit, metadata.etag or "", metadata.size)
    _require_unchanged(file, commit=metadata.commit_hash)
    return file


def _fetch(file: RemoteFile, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of a file, in pieces as they arrive. Raises CheckpointError.

    The client's backoff is for answers that ask for it. Connections that break are ours: only into a file can the
    client go on behind the bytes that have arrived.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, http_stream_backoff

    url = hf_hub_url(file.repo, file.name, revision=file.commit)
    failures, end = 0, min(end, file.size)
    while start < end:
        session()
        before, reason = start, "connection closed early"
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
        try:
            with http_stream_backoff("GET", url, headers=headers, retry_on_exceptions=()) as answer:
                _require_range(answer, file, start)
                for piece in answer.iter_bytes():  # as it comes: pieces of a size would be lost with a connection
                    if start + len(piece) > end:
                        raise CheckpointError(f"{file.name}: the Hub sent more than was asked for; run again")
                    start += len(piece)
                    yield memoryview(piece)
        except (HfHubHTTPError, OfflineModeIsEnabled):
            raise  # an answer, and not a broken connection
        except transport_errors() as error:
            reason = f"{type(error).__name__}: {error}"
        if start >= end:
            return
        failures = failures + 1 if start - before < STEP else 0
        if failures >= SLOW_TRIES:
            raise CheckpointError(
                f"{file.repo}/{file.name}: bytes {start}-{end - 1} could not be fetched in {SLOW_TRIES} tries "
                f"({reason}); "
                "run the same command again later"
            )
        _pause(failures, f"{file.repo}/{file.name}: {reason}")


def _require_range(answer: Any, file: RemoteFile, start: int) -> None:
    """Raises CheckpointError for an answer that is no range of this very file, HfHubHTTPError for a refusal."""
    from huggingface_hub.utils import hf_raise_for_status

    if answer.status_code >= 400:
        answer.read()
        hf_raise_for_status(answer)
    span = re.fullmatch(r"bytes (\d{1,16})-\d{1,16}/(\d{1,16})", answer.headers.get("Content-Range", ""))
    if answer.status_code != 206 or not span or int(span[1]) != start:
        raise CheckpointError(
            f"{file.repo}/{file.name}: status {answer.status_code}, expected a range from byte {start}: "
            f"this server does not serve ranges; try `hf download {file.repo}` first"
        )
    hops = [*answer.history, answer]
    # The Hub's name for the content: of the file behind a redirect where there is one, not of the storage's copy.
    linked = [hop.headers["X-Linked-Etag"] for hop in hops if "X-Linked-Etag" in hop.headers]
    etag = bare([*linked, answer.headers.get("ETag", "")][0])
    commits = {hop.headers["X-Repo-Commit"] for hop in hops if "X-Repo-Commit" in hop.headers}
    _require_unchanged(file, ETag=etag, size=int(span[2]), commit=commits.pop() if len(commits) == 1 else None)


def _require_unchanged(file: RemoteFile, **found: str | int | None) -> None:
    """Raises CheckpointError where an answer has another value than is known of a file; None: it has none."""
    for what, value in found.items():
        known = getattr(file, what.lower())
        if value is not None and value != known:
            raise CheckpointError(
                f"{file.repo}/{file.name} changed on the Hub while it was read: found {what} {value}, expected "
                f"{known}; run the command again"
            )


def _pause(failures: int, why: str) -> None:
    """Wait before the next try, longer after each failure."""
    seconds = min(8.0, 0.25 * 2**failures)
    log.warning("%s; trying again in %g s", why, seconds)
    time.sleep(seconds)


def _cached_etag(local: Path) -> str:
    """The cache calls a file by its ETag, and links to it where the system has links; "" where it has not."""
    return local.readlink().name if local.is_symlink() else ""


def side_files(hub: Hub) -> None:
    """Everything that is not weights into the snapshot's folder. Where the Hub is off line, what is there has to do."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return
    try:
        with hub_errors(hub.repo, hub.revision), _no_bars():
            weights = [f"*{suffix}{more}" for suffix in (*WEIGHTS, ".index.json") for more in ("", ".gz")]
            snapshot_download(hub.repo, revision=hub.commit, ignore_patterns=weights)
            if modules := [f"{module}/*" for module in modules_of(hub.folder)]:
                snapshot_download(hub.repo, revision=hub.commit, allow_patterns=modules)
    except CheckpointError as error:
        if not _is_whole(hub.folder):
            raise
        log.warning("%s; going on with the files in the cache", error)


def _no_bars() -> AbstractContextManager[Any]:
    """Without the client's own bars, of many small files, where somebody else shows downloads, or is to be quiet."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    stated = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # in the environment, which the client lets win
    return nullcontext() if stated or shown_download("") is None else disable_progress_bars()


def download(hub: Hub, names: Sequence[str]) -> Hub:
    """Whole files into the cache, each checked against its ETag where that is a sha256; the model with their ETags."""
    return replace(hub, etags={name: _cached_etag(_download(hub, name)) for name in names})


def _download(hub: Hub, name: str) -> Path:
    local = hub.folder / name
    if local.exists():
        require_inside_cache(local)
        return local
    with hub_errors(hub.repo, hub.revision):
        path = _to_cache(hub.repo, name, hub.commit)
    expected, found = hub.etags.get(name, ""), _cached_etag(path)
    if expected and found and found != expected:
        raise CheckpointError(
            f"{hub.repo}/{name} changed on the Hub: found ETag {found}, expected {expected}; run the command again"
        )
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        if (digest := sha256_of(path)) != expected:
            drop(hub, name)  # or the cache would give the damaged file to everybody
            raise CheckpointError(
                f"{hub.repo}/{name}: found sha256 {digest}, expected {expected}: damaged on its way; run again"
            )
    return path


def fetched(model: str, names: Sequence[str]) -> Path | None:
    """The folder in the cache with these files of a repository, all of one commit; None where `model` is no Hub id."""
    match = ID.fullmatch(model)
    if match is None:
        return None
    repo, revision = match["repo"], match["revision"]
    if revision is not None and (not is_inside(revision) or revision.startswith("-")):
        raise CheckpointError(f"{revision!r} is no revision of {repo}; name a branch, tag or commit, or {repo} alone")
    folder = None
    with hub_errors(repo, revision):
        for name in names:
            path = _to_cache(repo, name, folder.name if folder else revision)
            require_inside_cache(path)
            folder = path.parent
    return folder


def _to_cache(repo: str, name: str, revision: str | None) -> Path:
    """A file by the Hub's own client, which waits where it is asked to and resumes what was cut off."""
    from huggingface_hub import hf_hub_download

    shown: Any = shown_download(name)
    fetched = _patiently(lambda: hf_hub_download(repo, name, revision=revision, tqdm_class=shown), f"{repo}/{name}")
    return Path(fetched)


def _patiently(ask: Callable[[], T], what: str) -> T:
    """The Hub's answer; its client gives up at the first one that says that the server is out of order."""
    from huggingface_hub.errors import HfHubHTTPError

    for failures in range(SLOW_TRIES):
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code < 500 or failures == SLOW_TRIES - 1:
                raise
            _pause(failures, f"{what}: status {error.response.status_code}")
    raise AssertionError("unreachable")


def drop(hub: Hub, name: str) -> None:
    """Remove a file from the cache: its link, and its content unless something else there links to it too."""
    from huggingface_hub import scan_cache_dir

    place = hub.folder.resolve() / name
    if not place.is_symlink() and not place.exists():
        return
    found = scan_cache_dir(hub.folder.parents[2])
    files = (file for repo in found.repos for revision in repo.revisions for file in revision.files)
    found.delete_files(*(file for file in files if file.file_path == place)).execute()
    place.unlink(missing_ok=True)  # in a folder that the client takes for damaged


def hub_origin(path: Path) -> tuple[str | None, str | None]:
    """(id, revision) of a snapshot in the Hub's cache, models--OWNER--NAME/snapshots/REVISION; else (None, None)."""
    if path.parent.name != "snapshots" or not path.parent.parent.name.startswith("models--"):
        return None, None
    return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
