"""Models on the Hub, `org/name[@revision]`: from the cache where they are in it, otherwise only what is needed.

Opening a model fetches its config, its index and the headers of its shards, and pins the commit. Weights then come by
byte range, or as whole shards into the Hub's own cache, one ahead of the work.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from laser.checkpoint.answers import session
from laser.checkpoint.formats import what_lies_on_hub
from laser.checkpoint.ranges import TRIES, RemoteFile, fetch, log, look_at, pause, transport_errors
from laser.checkpoint.safetensors import Shard, check_length, file_pieces, parse_header, read_header, sha256_of
from laser.checkpoint.side_files import WEIGHTS, folded, is_one_file, modules_of
from laser.checkpoint.weights import files_in, index_at, order
from laser.errors import LONGEST, CheckpointError, LaserError, first_line
from laser.files import read_regular

T = TypeVar("T")
# Bytes of a shard in the cache up to which it is hashed when it is opened; all are before an output is made of them.
SMALL = 64 << 20
_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOENT),
)

ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


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
        """One hash over the shards' ETags: equal for equal weights. None where the cache does not tell them."""
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
            if told := recognised(repo, revision):
                raise CheckpointError(told) from error
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
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    with hub_errors(repo, revision):
        names = sorted(plain_names(repo, HfApi().model_info(repo, revision=revision).siblings))
        return what_lies_on_hub(repo, names, lambda name: read_regular(_to_cache(repo, name, revision)))


def listing(hub: Hub) -> frozenset[str]:
    """Names of the repository's files; those in the cache where it has all that would be loaded, and nobody answers.

    Not those in the cache without asking: the repository may have a file that is loaded before them. Where the Hub's
    own client was told that it has none, which it remembers in the cache's folder .no_exist, nobody is asked.
    """
    here, whole = files_in(hub.folder), _is_whole(hub.folder)
    if whole:
        absent = hub.folder.parents[1] / ".no_exist" / hub.commit
        before = takewhile(lambda name: name not in here, _order(hub.folder))
        if all((absent / name).exists() for name in before):
            return here
    try:
        with hub_errors(hub.repo, hub.revision):
            names = _names(hub) if whole else _patiently(lambda: _names(hub), hub.repo)
    except CheckpointError:
        if not whole:
            raise
        return here
    _require_apart(hub, names)
    return frozenset(names)


def _names(hub: Hub) -> list[str]:
    from huggingface_hub import HfApi

    return plain_names(hub.repo, HfApi().model_info(hub.repo, revision=hub.commit).siblings)


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
        told = repr(hostile)
        raise CheckpointError(
            f"{repo} lists a file {told if len(told) <= 60 else told[:57] + '...'}, expected a path inside the "
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
        found = list(pool.map(lambda name: _header(hub, name), names))
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


def _header(hub: Hub, name: str) -> tuple[str, Shard]:
    local = hub.folder / name
    if local.exists():
        require_inside_cache(local)
        etag, shard = _cached_etag(local), read_header(local)
        require_content(replace(hub, etags={name: etag}), SMALL)
        return etag, shard
    with hub_errors(hub.repo, hub.revision):
        file, first = look_at(RemoteFile(hub.repo, name, hub.commit), 8)
        size, length = file.size or 0, int.from_bytes(first, "little")
        check_length(name, size, length)
        text = b"".join(fetch(file, 8, 8 + length))

    def data(start: int, end: int) -> Iterator[memoryview]:
        if local.exists():
            yield from file_pieces(local, start, end)
            return
        with hub_errors(hub.repo, hub.revision):
            yield from fetch(file, start, end)

    etag, lock = file.etag or "", Lock()

    def whole() -> Path:
        with lock:  # of several that need it, one fetches it
            return _download(replace(hub, etags={name: etag}), name)

    return etag, replace(parse_header(name, local, size, text, data), whole=whole)


def _cached_etag(local: Path) -> str:
    """The cache calls a file by its ETag, and links to it where the system has links; "" where it has not."""
    return local.readlink().name if local.is_symlink() else ""


def side_files(hub: Hub) -> None:
    """Everything that is not weights into the snapshot's folder. Where the Hub is off line, what is there has to do."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return
    try:
        with hub_errors(hub.repo, hub.revision):
            weights = [f"*{suffix}{more}" for suffix in (*WEIGHTS, ".index.json") for more in ("", ".gz")]
            snapshot_download(hub.repo, revision=hub.commit, ignore_patterns=weights)
            if modules := [f"{module}/*" for module in modules_of(hub.folder)]:
                snapshot_download(hub.repo, revision=hub.commit, allow_patterns=modules)
    except CheckpointError as error:
        if not _is_whole(hub.folder):
            raise
        log.warning("%s; going on with the files in the cache", error)


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


def _to_cache(repo: str, name: str, revision: str | None) -> Path:
    """A file by the Hub's own client, which waits where it is told to and resumes what was cut off."""
    from huggingface_hub import hf_hub_download

    return Path(_patiently(lambda: hf_hub_download(repo, name, revision=revision), f"{repo}/{name}"))


def _patiently(ask: Callable[[], T], what: str) -> T:
    """The Hub's answer; its client gives up at the first one that says that the server is out of order."""
    from huggingface_hub.errors import HfHubHTTPError

    for failures in range(TRIES):
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code < 500 or failures == TRIES - 1:
                raise
            pause(failures, f"{what}: status {error.response.status_code}")
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
        if told := _of_the_cache(error):
            raise CheckpointError(f"{repo}: {told}") from error
        told = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{repo}: the Hub cannot be reached ({told}); run the same command again later"
        ) from error
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
    status, told = error.response.status_code, ""
    if writing and status in (409, 412):
        return (
            f"{repo}: somebody has committed to it meanwhile, or it is being made (status {status}); run the same "
            "command again"
        )
    if writing and status in (400, 413, 422) and error.server_message:
        told = f" ({' '.join(str(error.server_message).split())[:LONGEST]})"
    as_who = "write to it" if writing else "read it"
    remedy = {
        401: "log in with `hf auth login`",
        403: f"log in with `hf auth login` as someone who may {as_who}",
        **dict.fromkeys((400, 413, 422), "mend what it refuses, and run the same command again" if told else ""),
    }
    advice = remedy.get(status) or "run the same command again later"
    return f"{repo}: the Hub answered with status {status}{told}; {advice}"


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
