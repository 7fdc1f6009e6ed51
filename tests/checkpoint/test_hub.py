"""Models on the Hub, against a server on the loopback: what is fetched, what it costs, and what goes wrong."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot
from hub_server import TOKEN, Bytes, Fault, Hub, connect, serving
from huggingface_hub import close_session

from laser.checkpoint import hub as hub_module
from laser.checkpoint.hub import Hub as Origin
from laser.checkpoint.hub import drop
from laser.checkpoint.reader import INDEX, open_checkpoint
from laser.errors import CheckpointError, RecordError, UsageError
from laser.pipeline import reduce, scan
from laser.plan import make_plan
from laser.selection import Selection
from laser.verification import verify

ID = "maker/pico"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
SELECTED = Selection(layers=(1,), roles=("w2", "q"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(pico: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has pico under the name ID."""
    with serving() as server:
        server.add(ID, pico)
        connect(server, cache, monkeypatch)
        monkeypatch.setattr(hub_module.time, "sleep", lambda _: None)
        yield server
        close_session()


def test_scan_moves_headers_and_the_wanted_matrices(hub: Hub, pico: Path) -> None:
    remote, local = open_checkpoint(ID), open_checkpoint(pico)
    assert (remote.name, remote.identity) == ("pico", local.identity)
    headers = sum(len(shard.header) for shard in local.shards)
    assert hub.sent("safetensors$") == headers
    spectra, wanted = scan(remote, SELECTED), scan(local, SELECTED)
    assert spectra.values.keys() == wanted.values.keys()
    assert all((spectra.values[name] == s).all() for name, s in wanted.values.items())
    matrices = sum(local.tensors[name].end - local.tensors[name].start for name in wanted.values)
    assert hub.sent("safetensors$") == headers + matrices
    assert not list(remote.path.glob("*.safetensors")) and not hub.leaked


@pytest.mark.slow
def test_reduce_downloads_each_shard_once_and_says_the_same(hub: Hub, pico: Path, tmp_path: Path) -> None:
    remote, local = open_checkpoint(ID), open_checkpoint(pico)
    outcome = reduce(remote, make_plan(scan(remote, SELECTED), "rank:4"), tmp_path / "out")
    reduce(local, make_plan(scan(local, SELECTED), "rank:4"), tmp_path / "wanted")
    made, wanted = snapshot(tmp_path / "out"), snapshot(tmp_path / "wanted")
    assert made.keys() == wanted.keys()
    assert all(made[name] == data for name, data in wanted.items() if name != "laser.json")
    assert outcome.run["content"] == outcome.plan.source.content is not None
    sizes = sum(shard.size for shard in local.shards)
    gets = [path for method, path, asked, _ in hub.log if method == "GET" and "storage" in path and asked is None]
    assert len(gets) == 3 and sum(hub.sent(path) for path in gets) < 2 * sizes
    before = hub.sent("safetensors$")
    again = open_checkpoint(ID)  # now it is in the cache, and nobody is asked for weights
    assert not verify(again, tmp_path / "out").problems and hub.sent("safetensors$") == before
    assert all(shard.data is None for shard in again.shards)


@pytest.mark.slow
def test_hashes_of_the_hub_and_bytes_of_a_directory(hub: Hub, pico: Path, tmp_path: Path) -> None:
    """A record of one kind meets a checkpoint with the other: decided where it can be, refused with the reason else."""
    remote, local = open_checkpoint(ID), open_checkpoint(pico)
    before = len(hub.log)
    assert remote.fingerprint.samples is None and remote.fingerprint.content and local.fingerprint.content is None
    assert len(hub.log) == before  # nobody asks for thousands of ranges
    plan = make_plan(scan(remote, SELECTED), "rank:4")
    reduce(local, plan, tmp_path / "out")  # the files are read whole, and have the Hub's hashes
    with pytest.raises(RecordError, match=r"only the hashes of its files are known.*hf download maker/pico"):
        reduce(remote, make_plan(scan(local, SELECTED), "rank:4"), tmp_path / "other")
    cached = open_checkpoint(ID, "weights")
    assert cached.fingerprint.stated().keys() == {"content", "samples"}
    for made in (plan, make_plan(scan(local, SELECTED), "rank:4")):
        made.source.require(cached, "plan")
    data = bytearray((pico / FIRST).read_bytes())
    data[-1] ^= 1
    (pico / FIRST).write_bytes(data)
    with pytest.raises(RecordError, match="made from other weights of pico"):
        plan.source.require(open_checkpoint(pico), "plan")


@pytest.mark.slow
def test_what_is_in_the_cache_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint(ID, "weights")
    hub.log.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint(ID)
    assert checkpoint.hub and checkpoint.hub.content and scan(checkpoint, SELECTED).values and not hub.log
    assert (checkpoint.path / "LICENSE").exists()  # "weights" brought the side files too


def test_a_half_full_cache_is_completed_by_ranges(hub: Hub, pico: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(ID, FIRST)
    before = hub.sent(FIRST)
    checkpoint = open_checkpoint(ID)
    assert [shard.data is None for shard in checkpoint.shards] == [True, False, False]
    assert checkpoint.identity == open_checkpoint(pico).identity and hub.sent(FIRST) == before
    assert checkpoint.hub is not None
    assert checkpoint.hub.etags == {s.name: Bytes((pico / s.name).read_bytes()).etag for s in checkpoint.shards}


def test_a_revision_is_named_after_an_at_sign(hub: Hub) -> None:
    assert open_checkpoint(f"{ID}@{'a' * 40}").identity == open_checkpoint(f"{ID}@main").identity
    with pytest.raises(CheckpointError, match=f"{ID} has no revision v2; try {ID} alone"):
        open_checkpoint(f"{ID}@v2")


@pytest.mark.slow
def test_evict_leaves_no_shard_and_resumes_without_the_finished_ones(
    hub: Hub, pico: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(ID)
    plan = make_plan(scan(checkpoint, SELECTED), "rank:4")
    reduce(checkpoint, plan, tmp_path / "whole")
    for file in (*cache.rglob("*.safetensors"), *(p for p in cache.rglob("blobs/*") if len(p.name) == 64)):
        file.unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    checkpoint = open_checkpoint(ID)
    with pytest.raises(KeyboardInterrupt):
        reduce(checkpoint, plan, tmp_path / "out", evict=True, tick=killed)
    assert not (tmp_path / "out" / INDEX).exists()
    reduce(open_checkpoint(ID), plan, tmp_path / "out", evict=True, resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert not list(cache.rglob("*.safetensors")) and not [p for p in cache.rglob("blobs/*") if len(p.name) == 64]
    assert not verify(open_checkpoint(ID), tmp_path / "out").problems  # by ranges again
    with pytest.raises(UsageError, match="is a directory, and a source is never changed"):
        reduce(open_checkpoint(pico), plan, tmp_path / "other", evict=True)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_another_revision_still_uses_stays_in_the_cache(tmp_path: Path, damaged: bool) -> None:
    repo = tmp_path / "models--maker--pico"
    content = repo / "blobs" / "content"
    content.parent.mkdir(parents=True)
    content.write_bytes(b"weights")
    links = [repo / "snapshots" / (commit * 40) / "x.safetensors" for commit in "ab"]
    for link in links:
        link.parent.mkdir(parents=True)
        link.symlink_to("../../blobs/content")
    if damaged:  # the client passes over a model whose cache it cannot read
        (links[0].parent / "lost").symlink_to("../../blobs/lost")
    for number, link in enumerate(links):
        drop(Origin("maker/pico", None, link.parent.name, link.parent), link.name)
        drop(Origin("maker/pico", None, link.parent.name, link.parent), "not-there")
        assert not link.is_symlink() and content.exists() == (damaged or number == 0)


def test_one_file_and_pickles(hub: Hub, make_pico: Callable[..., Path], tmp_path: Path) -> None:
    one = make_pico("one", shards=1)
    hub.add("maker/one", one)
    assert open_checkpoint("maker/one").identity == open_checkpoint(one).identity
    from safetensors.torch import load_file

    torch.save(load_file(one / "model.safetensors"), one / "pytorch_model.bin")
    (one / "model.safetensors").unlink()
    hub.add("maker/pickled", one)
    checkpoint = open_checkpoint("maker/pickled")
    reduce(checkpoint, make_plan(scan(checkpoint, SELECTED), "rank:4"), tmp_path / "out", evict=True)
    assert (tmp_path / "out" / "model.safetensors").exists() and not (checkpoint.path / "pytorch_model.bin").exists()


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "not there": ({}, "maker/nothing", r"the Hub has no maker/nothing, or not for you; check the spelling, or log in"),
    "private": ({"private": True}, ID, r"the Hub has no maker/pico, or not for you; .*`hf auth login`"),
    "gated": ({"gated": True}, ID, r"maker/pico is gated: ask for access on http://127.0.0.1:\d+/maker/pico, then"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_say_what_to_do(hub: Hub, run: Callable[..., Any], tmp_path: Path, what: str) -> None:
    options, model, message = REFUSALS[what]
    for key, value in options.items():
        setattr(hub.repos[ID], key, value)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)
    code, out, err = run("scan", model, "-o", tmp_path / "spectra.safetensors")
    assert (code, out) == (1, "") and not (tmp_path / "spectra.safetensors").exists()
    assert err.splitlines()[-1].startswith("laser: ")


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_the_login_of_the_hub_opens_it_and_stays_there(hub: Hub, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    setattr(hub.repos[ID], kind, True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert scan(open_checkpoint(ID), SELECTED).values
    assert hub.sent("^/storage") and not hub.leaked  # the storage's signed address needs no token


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "storage", times=3, status=429, headers={"Retry-After": "0"}),
        Fault("status", "resolve/.*safetensors", times=3, status=503),
        Fault("status", "resolve/.*safetensors", times=3, status=503, method="HEAD"),
        Fault("drop", "storage", times=4),
        Fault("short", "storage", times=4),
    ],
    ids=lambda f: f.kind + str(f.status) + f.method,
)
def test_a_bad_moment_is_waited_for(hub: Hub, pico: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    hub.faults.append(fault)
    remote, local = open_checkpoint(ID), open_checkpoint(pico)
    for name in local.tensors:
        assert torch.equal(remote.read(name), local.read(name))
    assert fault.times == 0 and waits
    if fault.status == 429:
        assert waits == [1.0] * 3  # the client adds a second to what it is asked for
    # What had arrived before a drop is not asked for again.
    assert hub.sent("storage") == sum(shard.size for shard in local.shards)


def test_tries_are_bounded(hub: Hub) -> None:
    hub.faults.append(Fault("status", "storage", times=10**6, status=429))
    with pytest.raises(CheckpointError, match=r"answered with status 429; run the same command again later"):
        open_checkpoint(ID)
    hub.faults[:] = [Fault("status", "storage", times=10**6, status=429, headers={"Retry-After": "4000"})]
    with pytest.raises(CheckpointError, match=r"limits requests \(status 429\) and asks to wait 4000 s"):
        open_checkpoint(ID)
    hub.faults[:] = [Fault("drop", "storage", times=10**6)]
    with pytest.raises(CheckpointError, match="in 6 tries"):
        open_checkpoint(ID)


def change(hub: Hub, name: str) -> None:
    """The same header, other weights."""
    content = hub.repos[ID].files[name]
    hub.repos[ID].files[name] = Bytes(content.read(0, content.size - 2) + b"??")


def test_a_file_that_changes_under_our_hands(hub: Hub, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ID)
    plan = make_plan(scan(checkpoint, SELECTED), "rank:4")
    change(hub, SECOND)
    with pytest.raises(CheckpointError, match=rf"{SECOND} changed on the Hub .*: found ETag \w+, expected \w+"):
        checkpoint.read(checkpoint.shards[1].tensors[0].name)
    with pytest.raises(CheckpointError, match=rf"{SECOND} changed on the Hub: found ETag"):
        reduce(checkpoint, plan, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(RecordError, match=r"the plan was made from other weights of pico: .* changed on the Hub"):
        reduce(open_checkpoint(ID), plan, tmp_path / "other")


def test_another_commit_and_a_server_without_ranges(hub: Hub) -> None:
    checkpoint = open_checkpoint(ID)
    hub.faults.append(Fault("commit", SECOND))
    with pytest.raises(CheckpointError, match=r"found commit b+, expected a+"):
        checkpoint.read(checkpoint.shards[1].tensors[0].name)
    hub.faults.append(Fault("whole", "storage"))
    with pytest.raises(CheckpointError, match="does not serve ranges; try `hf download maker/pico` first"):
        checkpoint.read(checkpoint.shards[1].tensors[1].name)


def test_damaged_on_its_way(hub: Hub, tmp_path: Path, cache: Path) -> None:
    """The storage sends other bytes than those whose hash the Hub tells."""
    checkpoint = open_checkpoint(ID)
    plan = make_plan(scan(checkpoint, SELECTED), "rank:4")
    content = hub.repos[ID].files[SECOND]
    right = content.etag

    class Damaged(Bytes):
        @property
        def etag(self) -> str:
            return right

    hub.repos[ID].files[SECOND] = Damaged(content.read(0, content.size - 2) + b"??")
    for attempt in (lambda: reduce(checkpoint, plan, tmp_path / "out"), lambda: open_checkpoint(ID, "weights")):
        with pytest.raises(CheckpointError, match=rf"{SECOND}: found sha256 \w+, expected {right}: damaged on its way"):
            attempt()
        assert not list(cache.rglob(SECOND)) and not list(cache.rglob(right))
    hub.repos[ID].files[SECOND] = content
    reduce(checkpoint, plan, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / INDEX).exists()


def hostile_index(hub: Hub) -> None:
    index = json.loads(hub.repos[ID].files[INDEX].read(0, 1 << 20))
    index["weight_map"]["lm_head.weight"] = "../../x.safetensors"
    hub.repos[ID].files[INDEX] = Bytes(json.dumps(index).encode())


HOSTILE: dict[str, tuple[Callable[[Hub], object], str]] = {
    "index": (hostile_index, "points to '../../x.safetensors'"),
    "shard missing": (lambda h: h.repos[ID].files.pop(SECOND), f"maker/pico lacks a file .*{SECOND}"),
    "truncated": (
        lambda h: h.repos[ID].files.update({SECOND: Bytes(h.repos[ID].files[SECOND].read(0, 30000))}),
        "truncated or damaged",
    ),
    "four bytes": (lambda h: h.repos[ID].files.update({SECOND: Bytes(b"abcd")}), "is truncated: found 4 bytes"),
    "no bytes": (lambda h: h.repos[ID].files.update({SECOND: Bytes(b"")}), SECOND),
    "endless header": (lambda h: h.repos[ID].files.update({SECOND: Bytes(b"\xff" * 64)}), f"{SECOND} is truncated"),
    "no weights": (
        lambda h: [h.repos[ID].files.pop(n) for n in list(h.repos[ID].files) if "model" in n],
        "holds neither model.safetensors.index.json nor model.safetensors",
    ),
    "no config": (lambda h: h.repos[ID].files.pop("config.json"), "maker/pico lacks a file"),
}  # fmt: skip


OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "an adapter": (
        {
            "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}',
            "adapter_model.bin": "",
        },
        r"on the Hub, after `hf download maker/pico --local-dir pico`: pico is a PEFT adapter \(LORA\) of org/base",
    ),
    "GGUF": ({"pico-Q8_0.gguf": "GGUF"}, r"--local-dir pico`: pico holds a GGUF file: .*`laser convert pico/pico-Q8_0"),
    "GGUF beside a config": ({"x.gguf": "GGUF", "config.json": "{}"}, "`laser convert pico/x.gguf -o pico-hub`"),
    "Flax": ({"config.json": "{}", "flax_model.msgpack": ""}, "pico holds weights of Flax"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_repositories_of_other_formats_are_named(hub: Hub, what: str) -> None:
    files, message = OTHERS[what]
    hub.repos[ID].files.clear()
    hub.repos[ID].files.update({name: Bytes(text.encode()) for name, text in files.items()})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ID)


def test_modules_of_subfolders_come_with_the_side_files(hub: Hub, tmp_path: Path) -> None:
    more = {
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"small",
        "x.gguf": b"large",
        "a/b.onnx": b"large",
    }
    hub.repos[ID].files.update({name: Bytes(data) for name, data in more.items()})
    remote = open_checkpoint(ID)
    plan = make_plan(scan(remote, SELECTED), "rank:4")
    reduce(remote, plan, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"small"
    assert hub.sent(r"gguf$|onnx$") == 0 and not list((tmp_path / "out").rglob("*.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_repositories(hub: Hub, what: str) -> None:
    attack, message = HOSTILE[what]
    attack(hub)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ID)


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(
        CheckpointError, match=r"neither a directory nor in the Hub cache, and the Hub cannot be reached"
    ):
        open_checkpoint(ID)
