"""A Hub that lies, dawdles or breaks: each answer ends in one line, and nothing is written outside the cache."""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import sampled
from hub_server import Bytes, Hub, connect, serving
from huggingface_hub import close_session

from laser.checkpoint import answers
from laser.checkpoint.hub import is_inside
from laser.checkpoint.reader import open_checkpoint
from laser.cli import main
from laser.errors import CheckpointError, LaserError
from laser.pipeline import reduce, scan
from laser.plan import make_plan
from laser.selection import Selection

ID = "maker/pico"
SHARD = "model-00002-of-00003.safetensors"
WAIT = time.sleep
OURS = {"models--maker--pico", ".locks", "CACHEDIR.TAG", ".gitignore"}
Rewrite = Callable[[str, str, dict[str, str]], dict[str, str]]


@pytest.fixture
def hub(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has pico under the name ID; nobody waits."""
    (tmp_path / "place").mkdir()
    with serving() as server:
        server.add(ID, pico)
        connect(server, tmp_path / "place" / "cache", monkeypatch)
        monkeypatch.setattr(answers.time, "sleep", lambda _: None)  # the module's own: the client's waits too
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server
        close_session()


def refused(hub: Hub, tmp_path: Path, model: str = ID) -> str:
    """The one line in which opening `model` ends, with nothing written but in the cache."""
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(model, "weights")
    assert time.perf_counter() - start < 20
    line = str(error.value)
    assert len(line.splitlines()) == 1 and len(line) < 700, line
    place = tmp_path / "place"  # of the cache; a path with .. in it would end here, or in tmp_path
    assert {p.name for p in place.iterdir()} <= {"cache"} and not list(tmp_path.rglob("escaped*"))
    assert not (place / "cache").exists() or {p.name for p in (place / "cache").iterdir()} <= OURS
    return line


def header(method: str, where: str, **changes: str | None) -> Rewrite:
    """Other headers in answers to `method` whose path holds `where`; None removes one."""
    found = {name.replace("_", "-"): value for name, value in changes.items()}

    def rewrite(asked: str, path: str, headers: dict[str, str]) -> dict[str, str]:
        if asked != method or where not in path:
            return headers
        kept = {k: v for k, v in headers.items() if k.lower() not in {n.lower() for n in found}}
        return kept | {k: v for k, v in found.items() if v is not None}

    return rewrite


# --- headers ----------------------------------------------------------------------------------------------------------

COMMITS = (
    "",
    "main",
    "a" * 39,
    "A" * 40,
    "../../escaped",
    "/escaped",
    "a" * 41,
    "g" * 40,
    "..",
    "\xe9" * 40,
    "a" * 9999,
)
ETAGS = (
    "..",
    "../../escaped",
    "/escaped",
    "a/b",
    '"../escaped"',
    'W/"../escaped"',
    "W..",
    "x" * 129,
    "x" * 9999,
    "a b",
)
ETAGS = (*ETAGS, "\xe9", ".", "W/", '""', "a\\b", "-rf")
SIZES = ("-1", "1e9", "NaN", "9" * 30, "0x10", "1, 2", "")
REDIRECTS = ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "javascript:x", "gopher://127.0.0.1:1/x")

HEADERS: dict[str, Rewrite] = {}
for where, method in (("config.json", "HEAD"), (SHARD, "GET"), (SHARD, "HEAD")):
    told = f"{method} {where}"
    HEADERS |= {f"commit {c[:20]!r} {told}": header(method, where, X_Repo_Commit=c) for c in COMMITS}
    HEADERS |= {
        f"etag {e[:20]!r} {told}": header(method, f"resolve/{'a' * 40}/{where}", X_Linked_Etag=e)
        if where == SHARD
        else header(method, where, ETag=e)
        for e in ETAGS
    }
    HEADERS |= {f"linked size {s!r} {told}": header(method, where, X_Linked_Size=s) for s in SIZES}
HEADERS |= {f"redirect {to}": header("GET", f"/{SHARD}", Location=to) for to in REDIRECTS}
HEADERS |= {f"encoding {e}": header("GET", "config.json", Content_Encoding=e) for e in ("gzip", "br", "zstd", "x")}
RANGES = ("bytes 0-7/*", "bytes 9-17/99", "", "bytes 0-7/-1", "chars 0-7/99", "bytes 0-7/" + "9" * 99, "x")
HEADERS |= {f"range {r}": header("GET", f"storage/{ID}/{SHARD}", Content_Range=r) for r in RANGES}


@pytest.mark.parametrize("what", sampled(HEADERS, 4))
def test_hostile_headers(hub: Hub, tmp_path: Path, what: str) -> None:
    hub.rewrite = HEADERS[what]
    refused(hub, tmp_path)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize(
    ("rewrite", "line"),
    [
        (header("HEAD", "config.json", X_Repo_Commit="../../escaped"), "has commit '../../escaped', expected 40 hexad"),
        (header("HEAD", "config.json", ETag='"../escaped"'), "expected up to 128 letters and digits"),
        (
            header("GET", f"/{SHARD}", Location="file:///etc/passwd"),
            "redirect to 'file:///etc/passwd', expected an add",
        ),
        (header("GET", "config.json", Content_Encoding="gzip"), "Content-Encoding 'gzip', expected none"),
        (header("HEAD", "config.json", ETag=None), "ETag"),
        (header("HEAD", "config.json", X_Repo_Commit=None), "X-Repo-Commit"),
        (header("HEAD", "config.json", X_Linked_Size="999999"), "of size 999999"),
        (header("HEAD", "config.json", X_Linked_Size=str(1 << 40)), "too large"),
        (header("HEAD", SHARD, X_Linked_Size=None), "does not give its size"),
        (header("HEAD", SHARD, X_Linked_Size="0"), f"{SHARD} is truncated: found 0 bytes"),
        (header("HEAD", SHARD, X_Linked_Size="999999"), "changed on the Hub while it was read: found size"),
        (header("HEAD", SHARD, X_Linked_Etag='"x"'), "changed on the Hub while it was read: found ETag"),
        (header("HEAD", SHARD, X_Repo_Commit="b" * 40), "changed on the Hub while it was read: found commit b"),
    ],
)
def test_lines_say_found_and_expected(hub: Hub, tmp_path: Path, rewrite: Rewrite, line: str) -> None:
    hub.rewrite = rewrite
    assert line in refused(hub, tmp_path)


# --- statuses and waits -----------------------------------------------------------------------------------------------


def always(status: int, where: str, headers: dict[str, str] | None = None, body: bytes = b"") -> Any:
    def instead(handler: Any, path: str) -> bool:
        if where in path:
            handler.send(status, headers or {}, body)
        return where in path

    return instead


WAITS = ("1000000000", "9" * 400, "301", "\xb2", "-5", "Wed, 21 Oct 2099 07:28:00 GMT", "nan", "1e9")
ANSWERS: dict[str, Any] = {}
for where in ("/api/", "config.json", "storage"):
    ANSWERS |= {f"{s} {where}": always(s, where) for s in (204, 304, 400, 401, 403, 404, 408, 418, 451, 500, 503, 999)}
ANSWERS |= {f"wait {w[:12]!r} {s}": always(s, "storage", {"Retry-After": w}) for w in WAITS for s in (429, 503)}
ANSWERS |= {f"wait {w[:12]!r} config": always(429, "config.json", {"Retry-After": w}) for w in WAITS}
ANSWERS |= {
    "ratelimit": always(429, "config.json", {"RateLimit": '"api";r=0;t=1000000000'}),
    "ratelimit without end": always(429, "storage", {"RateLimit": f'"api";r=0;t={"9" * 400}'}),
    "a loop": always(302, "storage", {"Location": "/storage/again"}),
    "a loop of the config": always(302, "config.json", {"Location": "/config.json"}),
    "an error of a list": always(500, "/api/", {"Content-Type": "application/json"}, b"[1]"),
    "an error of a number": always(404, "config.json", {"Content-Type": "application/json"}, b"1"),
    "a huge error": always(403, "storage", {}, b"x" * (answers.LARGEST_ERROR + 1)),
    "many lines": always(403, "/api/", {"X-Error-Message": "a" * 3000}, b"x\n" * 3000),
    "escapes": always(403, "/api/", {"Content-Type": "text/plain"}, "\x1b[2J\u202e".encode()),
}


@pytest.mark.parametrize("what", sampled(ANSWERS, 4))
def test_statuses_and_waits(hub: Hub, tmp_path: Path, what: str) -> None:
    hub.instead = ANSWERS[what]
    refused(hub, tmp_path)


# --- listings ---------------------------------------------------------------------------------------------------------

NAMES = ("../escaped", "/escaped", "a/../../escaped", "a\0b", "a\nb", "\x1b[2Jx", "a\u202eb", "x" * 256, "", ".", "..")
NAMES = (*NAMES, "a\\b", "..\\escaped", "a//b", "a/", "./a", "a/./b", "\ud800", "a\rb", "\u2028", "\x7f")
SIBLINGS: tuple[Any, ...] = (1, "x", [1], [[]], {"a": 1}, [{}], [None])
BODIES: dict[str, bytes] = {
    **{f"name {n[:20]!r}": json.dumps({"id": ID, "siblings": [{"rfilename": n}]}).encode() for n in NAMES},
    **{f"name of type {n}": json.dumps({"id": ID, "siblings": [{"rfilename": n}]}).encode() for n in (1, None, [], {})},
    **{f"siblings {s}": json.dumps({"id": ID, "siblings": s}).encode() for s in SIBLINGS},
    **{f"all of it {b[:9]!r}": b for b in (b"", b"[", b"[]", b"1", b"null", b'"x"', b"NaN", b"\xff\xfe", b"[" * 99999)},
    "no id": b"{}",
    "a date": json.dumps({"id": ID, "lastModified": "yesterday", "siblings": []}).encode(),
    "empty": json.dumps({"id": ID, "siblings": []}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("what", sampled(BODIES, 4))
def test_hostile_listings(hub: Hub, tmp_path: Path, what: str) -> None:
    hub.instead = always(200, "/api/", {"Content-Type": "application/json"}, BODIES[what])
    refused(hub, tmp_path)


def test_names_inside() -> None:
    assert all(is_inside(n) for n in ("config.json", "2_Dense/config.json", ".gitattributes", "a b", "\u00e9", "a..b"))
    assert not any(is_inside(n) for n in NAMES)


MODELS = (
    "a/b@../../escaped",
    "a/b@..",
    "a/b@/escaped",
    "a/b@-x",
    "a/b@a//b",
    "a/b@a/",
    "a/..",
    "../b",
    "a/b@",
    "a@b/c",
)
MODELS = (
    *MODELS,
    "a/b/c",
    "a--b/c",
    "\u00e9/b",
    "a/b@.",
    "-a/b",
    "a/-b",
    "a/b@a/../b",
    "x" * 300 + "/b",
    "a/" + "b" * 97,
)


@pytest.mark.parametrize("model", MODELS)
def test_names_that_a_user_may_give(hub: Hub, tmp_path: Path, model: str) -> None:
    refused(hub, tmp_path, model)
    assert not [path for _, path, _, _ in hub.log if ".." in path]


# --- bodies -----------------------------------------------------------------------------------------------------------


def chunked(hub: Hub, where: str, piece: bytes, pause: float = 0.0, status: int = 200) -> Any:
    """A body without end, a piece at a time, of a file whose size is right."""

    def instead(handler: Any, path: str) -> bool:
        if where not in path or handler.command == "HEAD":
            return False
        handler.send_response(status)
        name = path.rpartition("/")[2]
        size = hub.repos[ID].files[name].size if name in hub.repos[ID].files else 99999
        for key, value in {"Transfer-Encoding": "chunked", "Content-Range": f"bytes 0-7/{size}"}.items():
            handler.send_header(key, value)
        handler.end_headers()
        try:
            for _ in range(10**6):
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                WAIT(pause)
        except OSError:
            handler.close_connection = True
        return True

    return instead


@pytest.mark.parametrize("where", ["/api/", "config.json", "storage"])
@pytest.mark.parametrize("status", [200, 206, 403])
def test_bodies_without_end(hub: Hub, tmp_path: Path, where: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit: a body as long as laser really allows would be sent for minutes.
    monkeypatch.setattr(answers, "LARGEST_LISTING", 1 << 20)
    monkeypatch.setattr(answers, "LARGEST_ERROR", 1 << 16)
    hub.instead = chunked(hub, where, b"x" * (1 << 16), status=status)
    refused(hub, tmp_path)


@pytest.mark.parametrize("where", ["/api/", "config.json", "storage"])
def test_a_server_that_is_too_slow_is_given_up(
    hub: Hub, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit: laser really waits for half a minute.
    monkeypatch.setattr(answers, "RATE_SECONDS", 0.05)
    hub.instead = chunked(hub, where, b"x", pause=0.02, status=206 if where == "storage" else 200)
    line = refused(hub, tmp_path)
    assert "too slow: found" in line and "expected at least 1024" in line and "same command" in line


@pytest.mark.slow
@pytest.mark.parametrize("where", sampled(["/api/", "config.json", "storage"], 3))
def test_a_server_that_says_nothing_is_given_up(
    hub: Hub, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{limit}", 0.1)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.1)

    def instead(handler: Any, path: str) -> bool:
        if where in path:
            WAIT(0.5)
            handler.close_connection = True
        return where in path

    hub.instead = instead
    refused(hub, tmp_path)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_full_or_closed_cache_is_called_that(
    hub: Hub, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, "the reason", "blob")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fails)
    line = refused(hub, tmp_path)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert ("is full" if full else "cannot be used") in line
    assert str(tmp_path / "place" / "cache") in line and "HF_HUB_CACHE (or HF_HOME)" in line


def test_a_cache_that_may_only_be_read_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint(ID, "weights")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    assert open_checkpoint(ID).tensors


@pytest.mark.parametrize("place", [0, 4000, -1])
@pytest.mark.parametrize("small", [True, False])
def test_a_file_damaged_in_the_cache_is_not_believed(
    hub: Hub, tmp_path: Path, place: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(scan(open_checkpoint(ID, "weights"), Selection(roles=("q",))), "rank:4")
    blob = (open_checkpoint(ID).path / SHARD).resolve()
    data = bytearray(blob.read_bytes())
    data[place] ^= 1
    blob.write_bytes(data)
    if not small:
        # A limit: a file that laser calls large is one of gigabytes.
        monkeypatch.setattr("laser.checkpoint.hub.SMALL_FILE", 0)
    with pytest.raises(LaserError) as error:
        reduce(open_checkpoint(ID), plan, tmp_path / "out")
    assert place != -1 or not small or f"remove {blob}" in str(error.value)
    assert not (tmp_path / "out" / "laser.json").exists()


@pytest.mark.parametrize("name", ["config.json", SHARD, "model.safetensors.index.json"])
def test_links_out_of_the_cache_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    folder = open_checkpoint(ID, "weights").path
    outside = tmp_path / "elsewhere"
    shutil.copyfile(folder / name, outside)
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    assert f"{name} links to {outside}, which is not in the Hub's cache" in refused(hub, tmp_path)


def test_a_run_in_one_pass_does_not_believe_a_damaged_file_either(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blob = (open_checkpoint(ID, "weights").path / SHARD).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    # A limit: a file that laser calls large is one of gigabytes.
    monkeypatch.setattr("laser.checkpoint.hub.SMALL_FILE", 0)
    assert main(["run", ID, "-o", str(tmp_path / "out"), "--rule", "rank:4", "--no-search"]) == 1
    assert f"remove {blob}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "laser.json").exists()


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "http://", "/etc", "file:///etc"])
def test_an_endpoint_that_is_no_address_is_called_that(
    hub: Hub, endpoint: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    code, _, err = run("scan", "maker/pico", "--dry-run")
    assert code == 1 and err.count("\n") == 1
    assert f"HF_ENDPOINT is {endpoint!r}, which is no address of a Hub" in err


@pytest.mark.parametrize("name", ["Config.JSON", "MODEL-00002-OF-00003.safetensors", "Tokenizer.json"])
@pytest.mark.parametrize("case_counts", [True, False])
def test_names_that_differ_by_case_only(
    hub: Hub, pico: Path, tmp_path: Path, name: str, case_counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that makes no difference of case, one of the two would be taken for the other."""
    hub.repos[ID].files |= {name: Bytes(b"{}"), "tokenizer.json": Bytes(b"[]")}
    if case_counts:
        assert open_checkpoint(ID, "weights").identity == open_checkpoint(pico).identity
        return
    # A disk that makes no difference of case: there is none here.
    monkeypatch.setattr("laser.checkpoint.hub.is_one_file", lambda a, b: a.name.lower() == b.name.lower())
    line = refused(hub, tmp_path)
    assert name in line and "the disk of the Hub's cache makes no difference between the two" in line


@pytest.mark.parametrize("case_counts", [True, False])
def test_an_output_has_both_of_names_that_differ_by_case(
    pico: Path, tmp_path: Path, case_counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pico / "Config.JSON").write_text("{}")
    (pico / "notes").mkdir()
    for name in ("a.txt", "A.txt"):
        (pico / "notes" / name).write_text(name)
    plan = make_plan(scan(open_checkpoint(pico), Selection(roles=("q",))), "rank:4")
    if case_counts:
        reduce(open_checkpoint(pico), plan, tmp_path / "out")
        for name in ("config.json", "Config.JSON", "notes/a.txt", "notes/A.txt"):
            assert (tmp_path / "out" / name).read_bytes() == (pico / name).read_bytes()
        return
    # A disk that makes no difference of case: there is none here.
    monkeypatch.setattr("laser.checkpoint.writer.is_one_file", lambda a, b: a.name.lower() == b.name.lower())
    with pytest.raises(LaserError, match="makes no difference between the two"):
        reduce(open_checkpoint(pico), plan, tmp_path / "out")
    assert not (tmp_path / "out" / "laser.json").exists()
