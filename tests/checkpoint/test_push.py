"""laser push against a Hub on the loopback: what exit 0 says lies there, and every other end is one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import sampled
from helpers import snapshot
from hub_server import TOKEN, Bytes, Fault, Hub, Repo, connect, serving
from huggingface_hub import HfApi, close_session, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import laser
from laser.checkpoint import answers
from laser.plan import make_plan
from laser.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # within the Hub's client
ID = "maker/made"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output with a card of its own."""
    from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory

    folder = tmp_path_factory.mktemp("push")
    checkpoint = laser.open_checkpoint(write_checkpoint_directory(folder / "pico", mixtral_tensors(), mixtral_config()))
    laser.reduce(checkpoint, make_plan(laser.scan(checkpoint, Selection(roles=("q",))), "rank:4"), folder / "made")
    (folder / "made" / "README.md").write_text("# made\n")
    return folder / "made"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without repositories, on which somebody is logged in; nobody waits."""
    with serving() as server:
        connect(server, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        disable_progress_bars()
        yield server
        enable_progress_bars()
        close_session()


def lies_there(hub: Hub, out: Path, revision: str | None = None) -> bool:
    """Whether a branch holds an output, byte for byte."""
    there = hub.repos[ID].at(revision)
    assert there is not None
    files = {name: content.read(0, content.size) for name, content in there.files.items()}
    return snapshot(out).items() <= files.items()


def refused(run: Run, *words: object) -> str:
    """The one line in which a push ends."""
    code, told, err = run("push", *words)
    lines = [line for line in err.splitlines() if line.startswith("laser: ") and "warning" not in line]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err and "uploaded to" not in told, (code, told, err)
    return lines[0]


def test_an_output_is_uploaded_and_again_without_sending(hub: Hub, out: Path, run: Run) -> None:
    code, told, err = run("push", out, ID, "--private")
    assert code == 0 and f"uploaded to {hub.url}/{ID}" in told and hub.repos[ID].private, err
    assert lies_there(hub, out) and set(hub.repos[ID].files) == {*snapshot(out), ".gitattributes"}
    commit, sent = hub.repos[ID].commit, len(hub.put)
    assert sent == 3
    code, told, _ = run("push", out, ID, "--private", "--json")
    assert code == 0 and json.loads(told)["address"] == f"{hub.url}/{ID}" and json.loads(told)["commit"] == commit
    assert (hub.repos[ID].commit, len(hub.put)) == (commit, sent)


@pytest.mark.parametrize("place", ["text.txt", "/home/me/text.txt", "~/text.txt", "'/home/me/a: b'", "ray://box:10001"])
def test_options_are_published_unless_they_name_a_place_of_this_machine(
    hub: Hub, out: Path, run: Run, place: str
) -> None:
    (out / "laser.yaml").write_text(f"# laser run m -o OUT\nrule: mp-edge\ntext: {place}\nwindow: 512\n")
    assert run("push", out, ID)[0] == 0
    assert ("laser.yaml" in hub.repos[ID].files) == (place == "text.txt") and "laser.json" in hub.repos[ID].files


def test_what_is_not_finished_is_not_uploaded(hub: Hub, out: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "is not a finished output of laser" in refused(run, tmp_path / "folder", ID)
    shard = sorted(out.glob("*.safetensors"))[0]
    (out / f"{shard.name}.partial").write_bytes(b"")
    assert "is not a finished output of laser" in refused(run, out, ID)
    (out / f"{shard.name}.partial").unlink()
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "truncated" in refused(run, out, ID)
    assert not hub.log


@pytest.mark.parametrize("name", ["notes.txt", ".env", "laser.lock", "deeper/x", "laser/x.tmp", "x.safetensors.tmp"])
def test_what_laser_did_not_write_is_not_uploaded(hub: Hub, out: Path, run: Run, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"secret")
    assert f"holds {name}, which laser did not write" in refused(run, out, ID)
    (out / name).unlink()
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(out / "config.json")
    assert "holds README.md, which laser did not write" in refused(run, out, ID)
    (out / "README.md").unlink()
    config = (out / "config.json").read_bytes()
    (out / "config.json").write_bytes(config + b" ")
    assert "config.json: found sha256" in refused(run, out, ID)
    assert not hub.log


def test_off_line_it_says_so(out: Path, run: Run) -> None:
    assert "maker/x: the Hub cannot be reached" in refused(run, out, "maker/x")


# --- interrupted ------------------------------------------------------------------------------------------------------

REQUESTS = {
    "create": ("POST", "/api/repos/create"),
    "card": ("POST", "/api/validate-yaml"),
    "modes": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "bytes": ("PUT", "/upload/"),
    "commit": ("POST", "/commit/"),
}
FAULTS = {
    "closed": ("close", 0, {}),
    "lost": ("lost", 0, {}),
    **{str(status): ("status", status, {}) for status in (400, 401, 403, 412, 429, 503)},
    "wait": ("status", 429, {"Retry-After": "1000000"}),
}


@pytest.mark.parametrize("fault", sampled(FAULTS, 4))
@pytest.mark.parametrize("request_", REQUESTS)
def test_interrupted_at_a_request(hub: Hub, out: Path, run: Run, request_: str, fault: str) -> None:
    method, path = REQUESTS[request_]
    kind, status, headers = FAULTS[fault]
    hub.faults.append(Fault(kind, path, 99, status or 500, headers, method))
    line = refused(run, out, ID)
    assert any(words in line for words in ("run the same command again", "log in with", "push to a new")), line
    if request_ in ("card", "commit"):
        assert "3 of 3 shards are uploaded and kept, " in line
        known = fault[:1] == "4"  # a refusal
        assert not known or "nothing is committed" in line
    if (request_, fault) == ("commit", "lost"):
        assert lies_there(hub, out) and "whether they are committed is not known" in line
    hub.faults.clear()
    sent = len(hub.put)
    assert run("push", out, ID)[0] == 0 and lies_there(hub, out)
    all_sent = request_ in ("card", "commit") or (request_, fault) == ("bytes", "lost")
    assert len(hub.put) - sent == (0 if all_sent else 3)


@pytest.mark.parametrize("request_", ["modes", "batch", "bytes"])
def test_one_fault_is_waited_out(hub: Hub, out: Path, run: Run, request_: str) -> None:
    method, path = REQUESTS[request_]
    hub.faults += [Fault("status", path, 1, 503, {}, method), Fault("close", path, 1, 0, {}, method)]
    assert run("push", out, ID)[0] == 0 and lies_there(hub, out)


def test_the_second_shard_is_refused(hub: Hub, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # One after another, or the second may be refused before the first is sent.
    monkeypatch.setattr("laser.checkpoint.push.AT_A_TIME", 1)

    def instead(handler: Any, path: str) -> bool:
        if path.startswith("/upload/") and len(hub.put) == 1:
            handler.send(403, {}, b"")
            return True
        return False

    hub.instead = instead
    assert "1 of 3 shards are uploaded" in refused(run, out, ID)
    hub.instead = None
    assert run("push", out, ID)[0] == 0 and lies_there(hub, out) and len(hub.put) == 3


# --- conflicts --------------------------------------------------------------------------------------------------------


def filled(hub: Hub, **files: bytes) -> None:
    """The repository, with these files in it; __ stands for a dot."""
    hub.repos[ID] = Repo({name.replace("__", "."): Bytes(data) for name, data in files.items()})


@pytest.mark.parametrize("when", ["/preupload/", "/upload/", "/commit/"])
def test_somebody_commits_in_between(hub: Hub, out: Path, run: Run, when: str) -> None:
    filled(hub, notes__md=b"theirs")
    seen: list[str] = []

    def before(method: str, path: str) -> None:
        if when in path and not seen:
            seen.append(path)
            repo = hub.repos[ID]
            repo.take(repo.files | {"chat_template.jinja": Bytes(b"theirs")})

    hub.before = before
    line = refused(run, out, ID)
    assert "somebody has committed" in line and "run the same command again" in line
    assert not {"laser.json", "config.json"} & set(hub.repos[ID].files)
    assert "chat_template.jinja, which is not in" in refused(run, out, ID)


@pytest.mark.parametrize(
    "name",
    "model.safetensors pytorch_model.bin.index.json adapter_config.json chat_template.jinja modeling_x.py "
    "tokenizer.model processor_config.json model-00001-of-00002.safetensors consolidated.safetensors "
    "additional_chat_templates/x.jinja model.gguf".split(),
)
def test_what_would_be_loaded_with_ours_is_no_mixture(hub: Hub, out: Path, run: Run, name: str) -> None:
    (out / name).unlink(missing_ok=True)
    filled(hub, **{name: b"{}"})
    line = refused(run, out, ID)
    assert f"{ID} holds {name}, which is not in" in line and "push to a new repository" in line
    assert set(hub.repos[ID].files) == {name} and not hub.put


@pytest.mark.parametrize("name", ["Config.json", "README.MD", "Laser/x.json", "MODEL.SAFETENSORS.INDEX.JSON", "laser"])
def test_names_that_differ_by_case_only(hub: Hub, out: Path, run: Run, name: str) -> None:
    (out / "laser").mkdir(exist_ok=True)
    (out / "laser" / "leaderboard.json").write_text("{}")
    filled(hub, **{name: b"theirs"})
    line = refused(run, out, ID)
    assert f"{ID} holds {name}, and {out} " in line and "push to a new repository" in line
    assert set(hub.repos[ID].files) == {name} and not hub.put


def test_other_files_stay_and_are_told(hub: Hub, out: Path, run: Run) -> None:
    filled(hub, notes__md=b"theirs", LICENSE__txt=b"theirs", README__md=b"theirs")
    code, told, _ = run("push", out, ID)
    assert code == 0 and lies_there(hub, out)
    assert (
        "replaced on the Hub: README.md\n" in told
        and "left on the Hub, as they were there: LICENSE.txt, notes.md\n" in told
    )
    assert hub.repos[ID].files["notes.md"] == Bytes(b"theirs")


def test_a_gitignore_leaves_nothing_out_unsaid(hub: Hub, out: Path, run: Run) -> None:
    filled(hub, __gitignore=b"*.safetensors\n")
    line = refused(run, out, ID)
    assert "model-00001-of-00003.safetensors" in line and ".gitignore" in line


@pytest.mark.parametrize("revision", ["trial", "refs/pr/1"])
def test_a_branch_is_made(hub: Hub, out: Path, run: Run, revision: str) -> None:
    filled(hub, notes__md=b"theirs")
    assert run("push", out, ID, "--revision", revision)[0] == 0
    assert lies_there(hub, out, revision) and set(hub.repos[ID].files) == {"notes.md"}
    filled(hub, model__safetensors=b"theirs")
    assert "holds model.safetensors" in refused(run, out, ID, "--revision", revision)


@pytest.mark.parametrize("revision", ["../../x", "", "-x", "a b", "a//b", "x" * 300, "a\nb"])
def test_names_that_are_no_branch(hub: Hub, out: Path, run: Run, revision: str) -> None:
    code, _, err = run("push", out, ID, f"--revision={revision}")
    assert code in (1, 2) and err.count("\n") == 1 and not hub.log


@pytest.mark.parametrize("repo", ["made", "a/b/c", "a/b@c", "../b", "a/..", "-a/b", "a b/c", "", "a/b\n"])
def test_names_that_are_no_repository(hub: Hub, out: Path, run: Run, repo: str) -> None:
    code, _, err = run("push", out, "--", repo)
    assert code in (1, 2) and err.count("\n") == 1 and not hub.log


def test_private_is_not_public(hub: Hub, out: Path, run: Run) -> None:
    filled(hub, notes__md=b"theirs")
    assert f"{ID} is public" in refused(run, out, ID, "--private")
    assert set(hub.repos[ID].files) == {"notes.md"} and not hub.put


def test_a_shard_damaged_at_rest_is_not_published(hub: Hub, out: Path, run: Run) -> None:
    shard = out / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    line = refused(run, out, ID)
    assert f"{shard.name}: found sha256" in line and "laser verify" in line
    assert set(hub.repos[ID].files) <= {".gitattributes"}


def test_notes_of_other_clients_stay_here(hub: Hub, out: Path, run: Run) -> None:
    (out / ".cache" / "other").mkdir(parents=True)
    (out / ".cache" / "other" / "secret").write_text("secret")
    assert run("push", out, ID)[0] == 0
    assert not [name for name in hub.repos[ID].files if name.startswith(".cache")]


# --- hostile answers --------------------------------------------------------------------------------------------------


def answer(where: str, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    def instead(handler: Any, path: str) -> bool:
        if where not in path:
            return False
        handler.send(status, {"Content-Type": "application/json"} | (headers or {}), body)
        return True

    return instead


def chunked(where: str) -> Any:
    """A body without end."""

    def instead(handler: Any, path: str) -> bool:
        if where not in path:
            return False
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for _ in range(10**6):
                handler.wfile.write(b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16)))
        except OSError:
            handler.close_connection = True
        return True

    return instead


HTML = b"<html><body>Sign in to the hotel's network</body></html>"
HOSTILE: dict[str, Any] = {}
for name, (_, where) in REQUESTS.items():
    HOSTILE |= {f"{name} html": answer(where, HTML), f"{name} endless": chunked(where)}
    HOSTILE |= {f"{name} {body[:12]!r}": answer(where, body) for body in (b"[]", b"null", b"[" * 99999)}
    HOSTILE |= {f"{name} packed": answer(where, b"{}", headers={"Content-Encoding": "gzip"})}
    HOSTILE |= {f"{name} elsewhere": answer(where, b"", 307, {"Location": "file:///etc/passwd"})}
for oid in ("../../escaped", "", "A" * 40, "x\x1b[2J", 1, None, ["a"], "a" * 9999):
    told = json.dumps({"commitUrl": "https://x/y/commit/z", "commitOid": oid}).encode()
    HOSTILE |= {f"commit {str(oid)[:12]!r}": answer("/commit/", told)}
for url in ("javascript:x", "../..", 1):
    told = json.dumps({"commitUrl": url, "commitOid": "d" * 40}).encode()
    HOSTILE |= {f"commit url {url}": answer("/commit/", told)}
HOSTILE |= {
    "commit in words": answer("/commit/", json.dumps({"commitUrl": "u", "commitOid": "e" * 40}).encode()),
    "modes of others": answer("/preupload/", b'{"files": []}'),
    "modes unknown": answer("/preupload/", b'{"files": [{"path": "config.json", "uploadMode": "x"}]}'),
    "batch errors": answer("/objects/batch", b'{"objects": [{"oid":"","size":1,"error":{"code":1,"message":"x"}}]}'),
    "batch of others": answer("/objects/batch", b'{"objects": [{"oid": "../x", "size": 1, "actions": {}}]}'),
    "batch to a file": answer(
        "/objects/batch",
        b'{"objects": [{"oid":"a","size":1,"actions":{"upload":{"href":"file:///etc/x"}}}]}',
    ),
    "create again and again": answer(
        "/api/repos/create", b'{"error": "Cannot create repo: another conflicting operation is in progress"}', 409
    ),
    "card refused": answer("/api/validate-yaml", b'{"errors": [{"message": "license is unknown"}]}', 400),
    "list html": answer("/api/models/", HTML),
    "list of names": answer("/api/models/", b'{"id": "x", "sha": "../x", "siblings": [{"rfilename": "../x"}]}'),
    "list of nothing": answer("/api/models/", b'{"id": "x", "sha": null, "siblings": null}'),
}  # fmt: skip


@pytest.mark.parametrize("what", sampled(HOSTILE, 4))
def test_hostile_answers(
    hub: Hub, out: Path, run: Run, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit: a body as long as laser really allows would be sent for minutes.
    monkeypatch.setattr(answers, "LARGEST_LISTING", 1 << 20)
    before = snapshot(out)
    hub.instead = HOSTILE[what]
    code, told, err = run("push", out, ID)
    if code == 0:  # the answer did not matter
        assert lies_there(hub, out)
    lines = [line for line in err.splitlines() if line.startswith("laser: ") and "warning" not in line]
    assert (code == 0 or len(lines) == 1) and "Traceback" not in err and "\x1b" not in told + err, err
    assert code == 0 or any(word in lines[0] for word in ("again", "HF_ENDPOINT", "do not", "mend", "log in")), lines
    assert snapshot(out) == before and {p.name for p in tmp_path.iterdir()} <= {"made", "cache", ".made.lock"}


@pytest.mark.parametrize("where", ["/objects/batch", "/api/validate-yaml", "/commit/", "/revision/"])
def test_answers_are_looked_at_after_a_broken_connection(
    hub: Hub, out: Path, run: Run, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a connection that was refused the client closes all, and with them what looks at answers."""
    sent = HfApi.preupload_lfs_files

    def broken(*given: Any, **options: Any) -> None:
        sent(*given, **options)
        if options["num_threads"] == 1:  # ours, and not that within a commit, which has nothing left to send
            close_session()

    monkeypatch.setattr(HfApi, "preupload_lfs_files", broken)
    # One after another, as above.
    monkeypatch.setattr("laser.checkpoint.push.AT_A_TIME", 1)

    def instead(handler: Any, path: str) -> bool:
        if where not in path or not hub.put:
            return False
        handler.send(200, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"{}")
        return True

    hub.instead = instead
    assert "has Content-Encoding 'gzip'" in refused(run, out, ID)


def test_an_upload_that_is_too_slow_is_given_up(hub: Hub, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 40))
    # A limit: pico would be sent in one piece.
    monkeypatch.setattr(answers, "PIECE", 1 << 10)
    monkeypatch.setattr(answers.time, "monotonic", lambda: float(next(clock)))
    line = refused(run, out, ID)
    assert "too slow" in line and "run the same command again" in line


def test_nobody_is_logged_in(hub: Hub, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "log in with `hf auth login`" in refused(run, out, ID)
