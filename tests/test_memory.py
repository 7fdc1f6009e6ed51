"""Memory: the one reader of what is free, what is chosen by it before a model is loaded, and one line where it ends."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import Methods, Run, sampled, write_checkpoint_directory
from pico_language import TEXT, make_model, write_tokenizer

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.choices import ACCEPT
from laser.cli import LESS, VERBS, main, memory
from laser.engine.crew import Crew, worker_bytes
from laser.errors import CheckpointError, OutOfMemory, is_out_of_memory
from laser.evaluation.activations import Store, pinned_bytes
from laser.evaluation.causal import build_causal
from laser.evaluation.footprint import LEAST_SPACE, Needs, layered_needs, whole_needs
from laser.evaluation.layout import NotByLayers
from laser.evaluation.placement import Asked, Placement, place, smaller_windows
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Window
from laser.spectral import devices
from laser.spectral.host_memory import host_free_bytes

CPU = torch.device("cpu")
KB, MB, GB = 1024, 1 << 20, 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return make_model(tmp_path / "m", "mixtral")


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Of 12 small layers."""
    (tmp_path / "text.txt").write_text(TEXT)
    return make_llama(tmp_path / "m", 12, hidden=32, width=64)


def make_llama(path: Path, layers: int, hidden: int = 512, width: int = 2048) -> Path:
    """A Llama of noise with a tokenizer; by default 17 MB a layer in float32, half of that on disk."""
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    noise = (0.02 * torch.randn(max(width, 128), hidden, generator=torch.Generator().manual_seed(0))).bfloat16()
    tensors = {f"model.layers.{i}.{n}.weight": noise.flatten()[: a * b].reshape(a, b).roll(i, 0).clone()
               for i in range(layers) for n, (a, b) in shapes.items()}  # fmt: skip
    ones = torch.ones(hidden).bfloat16()
    tensors |= {f"model.layers.{i}.{n}_layernorm.weight": ones.clone()
                for i in range(layers) for n in ("input", "post_attention")}  # fmt: skip
    tensors |= {"model.norm.weight": ones, "model.embed_tokens.weight": noise[:64], "lm_head.weight": noise[64:128]}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": 64, "max_position_embeddings": 128, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    write_checkpoint_directory(path, {n: t.contiguous() for n, t in tensors.items()}, config)
    return write_tokenizer(path)


# --- the reader -------------------------------------------------------------------------------------------------------


def machine(root: Path, available: int = 100 * GB, cgroup: str = "0::/\n", mounts: str = "") -> Path:
    for name, text in {
        "proc/meminfo": f"MemTotal: 999999999 kB\nMemAvailable:   {available // KB} kB\n",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mounts,
        "proc/self/status": "VmSize:\t 4096 kB\nVmData:\t 1024 kB\n",
    }.items():
        write(root / name, text)
    return root


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text))


def group(folder: Path, limit: object, used: int, **stat: int) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", "".join(f"{name} {count}\n" for name, count in stat.items()))


V2 = "35 25 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw\n"
V1 = "35 25 0:30 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"


def test_without_a_container_it_is_what_the_system_gives(tmp_path: Path) -> None:
    assert host_free_bytes(root=machine(tmp_path, 7 * GB)) == 7 * GB
    assert devices.free_bytes(devices.HOST) == pytest.approx(host_free_bytes(), rel=0.2)


def test_the_tightest_of_all_groups_counts_and_cached_files_are_no_use(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/a/b/c\n", mounts=V2)
    top = root / "sys/fs/cgroup"
    group(top / "a/b/c", "max", 1 * GB)
    group(top / "a/b", 8 * GB, 6 * GB, active_file=1 * GB, inactive_file=2 * GB)
    group(top / "a", 64 * GB, 1 * GB)
    assert host_free_bytes(root=root) == 5 * GB
    group(top / "a/b", 8 * GB, 6 * GB, active_file=1 * GB, inactive_file=2 * GB, file_mapped=2 * GB)
    assert host_free_bytes(root=root) == 3 * GB  # pages that a program maps are in use
    group(top / "a", 2 * GB, 1 * GB)
    assert host_free_bytes(root=root) == 1 * GB
    write(top / "a/b/c/memory.high", GB + MB)  # from there on it is slowed down
    assert host_free_bytes(root=root) == 1 * MB
    group(top / "a", 1 * GB, 2 * GB)  # over its limit
    assert host_free_bytes(root=root) == 0


@pytest.mark.parametrize("path", ["/docker/abc", "/../..", "/elsewhere", "/"])
def test_in_a_container_the_mount_begins_at_its_own_group(tmp_path: Path, path: str) -> None:
    mounts = V2.replace(" / /sys", " /docker/abc /sys") if path == "/docker/abc" else V2
    root = machine(tmp_path, cgroup=f"0::{path}\n", mounts=mounts)
    group(root / "sys/fs/cgroup", 2 * GB, 1 * GB)
    assert host_free_bytes(root=root) == 1 * GB


def test_the_older_groups_count_as_well(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="3:cpu,cpuacct:/x\n4:memory:/job\n0::/\n", mounts=V1)
    folder = root / "sys/fs/cgroup/memory"
    for place_, limit, used in ((folder, 9223372036854771712, 50 * GB), (folder / "job", 4 * GB, 3 * GB)):
        write(place_ / "memory.limit_in_bytes", limit)
        write(place_ / "memory.usage_in_bytes", used)
    write(folder / "job/memory.stat", f"inactive_file 7\ntotal_inactive_file {GB}\ntotal_active_file 0\n")
    assert host_free_bytes(root=root) == 2 * GB


@pytest.mark.parametrize("text", ["", "max", "no number", "-1"])
def test_files_that_say_nothing_are_passed_over(tmp_path: Path, text: str) -> None:
    root = machine(tmp_path, 3 * GB, mounts=V2 + "broken line\n")
    write(root / "sys/fs/cgroup/memory.max", text)
    write(root / "sys/fs/cgroup/memory.current", 5)
    assert host_free_bytes(root=root) == 3 * GB


def test_limits_of_the_process_count_and_mapped_files_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, limits = machine(tmp_path), {resource.RLIMIT_DATA: 101 * MB, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    assert host_free_bytes(root=root) == 100 * MB and host_free_bytes(30 * MB, root) == 70 * MB
    limits[resource.RLIMIT_AS] = 14 * MB
    assert host_free_bytes(root=root) == 10 * MB


def test_other_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:   1000.\nPages active:  9999.\n"
    told += "Pages inactive:  500.\nPages speculative:  10.\nPages purgeable:  2.\n"
    # What a Mac prints.
    monkeypatch.setattr("laser.spectral.host_memory._output", lambda _: told)
    monkeypatch.setattr("sys.platform", "darwin")
    assert host_free_bytes(root=tmp_path) == 16384 * 1512
    monkeypatch.setattr("sys.platform", "other")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}[name])
    assert host_free_bytes(root=tmp_path) == 4096 * 500


def test_an_apple_gpu_says_how_much_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 5 * GB)
    assert devices.free_bytes(devices.Device("mps", torch.float32, True, "pretends")) == 7 * GB


# --- what is chosen ---------------------------------------------------------------------------------------------------

WHOLE, STREAMED = Needs(0, 10 * GB), Needs(0, 3 * GB)


def needs_of(asked: Asked, resident: int | None) -> Needs:
    """Of a pretended model: a narrower dtype halves it, a window costs 1 MB a token, a GPU takes it off the host."""
    counted = (WHOLE if resident is None else STREAMED).host // (2 if asked.dtype == "bfloat16" else 1)
    counted += asked.tokens * MB
    return Needs(0, counted) if asked.device == "cpu" else Needs(counted, 100 * MB)


def ways(asked: Asked) -> list[tuple[str, Asked]]:
    return memory._ways(asked)


@pytest.mark.parametrize(
    ("free", "stream", "device", "told"),
    [
        (11 * GB, None, "cpu", False),  # whole
        (4 * GB, None, "cpu", True),
        (11 * GB, True, "cpu", True),
        (11 * GB, False, "cpu", False),
        (None, None, "cpu", False),  # nobody knows, so it is tried
        (1_900 * 10**6, None, "cpu", "--dtype bfloat16 --window 256"),
        (2 * GB, None, "cpu", "--dtype bfloat16"),
        (7 * GB, False, "cpu", "--stream"),
        (2 * GB, True, "cpu", "--dtype bfloat16"),
        (1 * MB, None, "cpu", "a machine with "),
        (1 * MB, None, "cuda", "--device cpu"),
    ],
)
def test_whole_or_by_layers_or_refused_with_what_fits(
    free: int | None, stream: bool | None, device: str, told: bool | str
) -> None:
    asked = Asked("float32", device, 511, stream)

    def free_of(name: str, mapped: int) -> int | None:
        return free if name == device else 50 * GB

    if isinstance(told, bool):
        placed = place("m", asked, needs_of, free_of, ways(asked))
        assert placed.stream is told
        chosen_by_memory = stream is None and told
        assert placed.news is chosen_by_memory
        if chosen_by_memory:
            assert re.search(r"11\.27 GB .*4\.29 GB are free: running it layer by layer, .*3\.76 GB", placed.why)
        return
    with pytest.raises(OutOfMemory, match=re.escape(f"try {told}")) as refused:
        place("m", asked, needs_of, free_of, ways(asked))
    assert refused.value.exit_code == 1


def test_what_cannot_be_run_by_layers_is_refused_and_not_sent_in_a_circle() -> None:
    def only_whole(asked: Asked, resident: int | None) -> Needs:
        if resident is not None:
            raise NotByLayers("m cannot be run layer by layer: it is a knot", "try laser eval without --stream")
        return needs_of(asked, None)

    asked = Asked("float32", "cpu", 511)
    for stream in (None, True):
        wanted = Asked("float32", "cpu", 511, stream)
        with pytest.raises(OutOfMemory, match=r"it is a knot; try (--no-stream )?--dtype bfloat16") as refused:
            place("m", wanted, only_whole, lambda *_: 6 * GB, ways(wanted))
        assert ("--no-stream" in str(refused.value)) is bool(stream)
    with pytest.raises(NotByLayers, match="without --stream"):  # which would work
        place("m", Asked("float32", "cpu", 511, True), only_whole, lambda *_: 20 * GB, [])
    assert not place("m", asked, only_whole, lambda *_: 20 * GB, []).stream


def test_states_between_the_pieces_take_half_of_what_is_left() -> None:
    asked = Asked("float32", "cpu", 0, True)
    assert place("m", asked, needs_of, lambda *_: 4 * GB, []).store().limit == GB // 2
    assert place("m", asked, needs_of, lambda *_: 64 * GB, []).store().limit == 2 * GB  # no more than ever
    assert [way.tokens for _, way in smaller_windows(Asked("float32", "cpu", 127))] == [63, 31]


def test_what_a_search_keeps_goes_to_a_file_where_memory_is_short(tmp_path: Path) -> None:
    W = torch.randn(16, 8).bfloat16()
    for limit, kept_is_given in ((W.nbytes, True), (W.nbytes - 1, False)):
        store = Store(limit, tmp_path)
        kept = store.keep(W)
        assert torch.equal(kept, W) and (kept is W) is kept_is_given
        assert store.keep(W) is not W and store.used <= limit
    assert not list(tmp_path.iterdir())


def test_the_needs_are_those_of_shapes(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    built, layered = build_causal(checkpoint), LayeredModel(checkpoint, resident=None)
    parameters = sum(p.numel() for p in built.parameters())
    there = whole_needs(checkpoint, built, torch.float32, CPU, 32)
    assert there.device == 0 and there.mapped == sum(s.size for s in checkpoint.shards)
    assert there.host > LEAST_SPACE + 4.4 * parameters
    on_gpu = whole_needs(checkpoint, built, torch.float32, torch.device("cuda"), 32)
    assert 0 < on_gpu.device - LEAST_SPACE < on_gpu.host - LEAST_SPACE + 1.1 * 32 * 64 * 8 * 4
    needs = [layered_needs(layered, CPU, t, r).host for t, r in ((32, 0), (64, 0), (64, None))]
    assert needs[0] < needs[1] < needs[2] < there.host + 4 * parameters
    assert layered_needs(layered, CPU, 32, 0, backward=True).host > needs[0]


# --- the verbs --------------------------------------------------------------------------------------------------------


def between(monkeypatch: pytest.MonkeyPatch, path: Path, tokens: int, share: float, beside: int = 0) -> None:
    """Pretend that so much is free: between what streaming a model needs (0) and what it needs whole (1).

    beside: bytes that a search needs besides the pieces.
    """
    checkpoint = open_checkpoint(path)
    layered = LayeredModel(checkpoint, resident=None)
    streamed = layered_needs(layered, CPU, tokens, 0).host
    # A search keeps the pieces, eval has transformers load them: the smaller need of the two.
    whole = layered_needs(layered, CPU, tokens, None).host
    # So much memory as this test needs to be free: this machine has another amount.
    monkeypatch.setattr(memory, "free", lambda *_: int(streamed + share * (whole - streamed)) + beside)


def cut_bytes(path: Path) -> int:
    """What cutting the largest of the matrices q and v needs, which a search does beside the pieces."""
    return worker_bytes([m for m in list_matrices(open_checkpoint(path)) if m.role in ("q", "v")], devices.HOST)


@pytest.mark.slow
def test_eval_streams_by_itself_and_says_so(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", model, "--text", tmp_path / "text.txt", "--window", 32, "--json")
    code, out, err = run(*words)
    assert code == 0 and not err
    between(monkeypatch, model, 31, 0.5)
    code, streamed, err = run(*words)
    assert code == 0 and err.count("\n") == 1
    assert re.match(r"laser: m needs 0\.\d+ GB .* and 0\.\d+ GB are free: running it layer by layer, which needs", err)
    losses = [json.loads(text)["evaluations"][0]["nll"] for text in (out, streamed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    code, _, err = run(*words, "--no-stream")
    assert code == 1 and err.strip().endswith("; try --stream")
    assert run(*words, "--stream")[0] == 0


def unwarned(err: str) -> str:
    """Without the warning that windows are longer than the model was made for, which comes before memory is asked."""
    return "".join(line for line in err.splitlines(True) if not line.startswith("laser: warning: "))


@pytest.mark.slow
def test_the_command_that_a_refusal_names_works(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", model, "--text", tmp_path / "text.txt")
    for share in (-0.02, -0.2, -0.5):
        between(monkeypatch, model, 511, share)
        code, _, err = run(*words)
        err = unwarned(err)
        assert code == 1 and "layer by layer, and " in err and err.count("\n") == 1
        flags = shlex.split(err.rsplit("; try ", 1)[1])
        if flags[0].startswith("--"):
            assert run(*words, *flags)[0] == 0
        else:
            assert flags[:3] == ["a", "machine", "with"]
    # As in `between`.
    monkeypatch.setattr(memory, "free", lambda *_: 1 * MB)
    assert "; try a machine with 0." in run(*words)[2]


@pytest.mark.slow
def test_run_keeps_its_promise_and_finds_the_same(
    run: Run, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--text", tmp_path / "text.txt", "--window", 32, "--windows", 4, "--held-out-windows", 2)
    words = (
        *words,
        "--rule",
        "fraction:0.9,fraction:0.5",
        "--roles",
        "q,v",
        "--accept",
        "any-drop",
        "--layers",
        "2,6,10",
    )
    beside = cut_bytes(deep) + 5 * 4 * 31 * 32 * 4  # and five states
    told = {}
    for out, share in {"whole": None, "part": 0.9, "read": 0.0}.items():
        if share is not None:
            between(monkeypatch, deep, 31, share, beside)
        code, _, told[out] = run("run", deep, "-o", tmp_path / out, *words)
        assert code == 0, told
    assert not told["whole"] and "laser: m needs 0.07 GB" in told["part"]
    assert "the last 4 of 12 layers stay in memory, the others are read at each pass" in told["part"]
    assert "each layer is read at each pass; up to 3 variants at a time" in told["read"]
    plans = [(tmp_path / out / "laser/plan.json").read_bytes() for out in told]
    assert plans[0] == plans[1] == plans[2] and b"accepted" in plans[0]
    trials = [json.loads((tmp_path / out / "laser/search.json").read_text()) for out in told]
    for record in trials:
        del record["check"]  # over the seconds as well
        for trial in record["trials"]:
            del trial["seconds"], trial["layer_forwards"]
    assert trials[0] == trials[1] == trials[2]
    code, _, err = run("run", deep, "-o", tmp_path / "c", *words, "--no-stream")
    assert code == 1 and "try --stream" in err and not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_on_a_device_layers_and_states_share_its_memory_and_leave_room_to_cut(
    name: str, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(deep)
    where, matrices = devices.Device(name, torch.float32, name == "mps", "pretends"), list_matrices(checkpoint)
    windows = tuple(Window(np.arange(3, 35), 31) for _ in range(200))  # of states as large as the layers
    size = 200 * 31 * 32 * 4
    built = LayeredModel(checkpoint, device="meta", resident=None)
    streamed, whole = (layered_needs(built, torch.device(name), 31, k).device for k in (0, None))
    cut = worker_bytes(matrices, where)
    # A device of so much memory, and a host of the other figure.
    rooms = {"cpu": 10 * GB}
    # There is no such device here.
    monkeypatch.setattr(memory, "free", lambda name, *_: rooms[name])

    def placed(on_device: int) -> Placement:
        rooms[name] = on_device
        crew = Crew((where,))
        return memory.for_search(checkpoint, windows, [], matrices, crew, where, "float32", None, variants=15)

    found = placed(whole + cut + 5 * size)
    assert found.resident is None and found.device_states == 5 * size
    # The others of 16 wait in pinned memory, which an Apple GPU has none of besides its own.
    assert found.host_states == (11 * pinned_bytes(size) if name == "cuda" else 0)
    part = placed(whole + cut + 5 * size - 1)
    assert part.stream and part.layers == 10 and part.device_states == 5 * size
    assert part.variants == (15 if name == "cuda" else 3)
    assert f"on {name} to be loaded" in part.why and "the last 10 of 12 layers stay in memory" in part.why
    assert placed(streamed).resident == 0 and placed(streamed).device_states == 0
    with pytest.raises(OutOfMemory, match=r"try --dtype bfloat16"):
        placed(streamed - 1)
    store = found.store(CPU)  # as it is used: the device is pretended
    lengths = [31] * 200
    assert store.room(lengths, 32, torch.float32) == 5 + found.host_states // size
    assert store.allocate(lengths, 32, torch.float32).hidden.shape == (6200, 32) and store.device_used == size


@pytest.mark.slow
def test_run_names_the_dtype_that_fits_and_its_search_records_it(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--text", tmp_path / "text.txt", "--window", 32, "--windows", 4, "--held-out-windows", 2)
    words = ("run", model, "-o", tmp_path / "o", *words, "--rule", "fraction:0.9", "--roles", "q,v")
    need = {
        dtype: layered_needs(LayeredModel(open_checkpoint(model), dtype=dtype, resident=None), CPU, 31, 0).host
        for dtype in ("float32", "bfloat16")
    }
    cut = cut_bytes(model)
    # As in `between`.
    monkeypatch.setattr(memory, "free", lambda *_: sum(need.values()) // 2 + cut)
    for dry in ((), ("--dry-run",)):
        code, _, err = run(*words, *dry)
        assert code == 1 and err.strip().endswith("; try --dtype bfloat16") and not (tmp_path / "o").exists()
    assert run(*words, "--dtype", "float16")[::2] == (
        2, "laser: no evaluation in 'float16'; try --dtype float32|bfloat16\n"
    )  # fmt: skip
    found = json.loads(run(*words, "--dtype", "bfloat16", "--dry-run", "--json")[1])["search"]
    assert found["dtype"] == "bfloat16" and found["stream"]
    assert run(*words, "--dtype", "bfloat16")[0] == 0
    assert json.loads((tmp_path / "o/laser/plan.json").read_text())["selection"]["dtype"] == "torch.bfloat16"


def test_a_leaderboard_is_refused_before_the_work(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pico is no model that lm-eval can measure; what comes before that is tested.
    for verb in ("run", "publish"):
        monkeypatch.setattr(f"laser.cli.{verb}.require_leaderboard", lambda *_, **__: None)
    # As above.
    monkeypatch.setattr("laser.cli.run.lm_eval_is_here", lambda: True)
    monkeypatch.setattr("laser.cli.run.leaderboards", lambda *_: pytest.fail("run"))
    # As in `between`.
    monkeypatch.setattr(memory, "free", lambda *_: 1 * MB)
    code, _, err = run("leaderboard", model, "-o", tmp_path / "l.json", "--batch-size", 4)
    assert code == 1 and "to be loaded whole" in err and "; try a machine with " in err and err.count("\n") == 1
    out = ("run", model, "-o", tmp_path / "o", "--no-search", "--rule", "rank:4", "--roles", "q")
    code, _, err = run(*out, "--leaderboard")
    assert code == 1 and err.strip().endswith("try --no-leaderboard") and not (tmp_path / "o").exists()
    assert run(*out, "--no-leaderboard")[0] == 0
    # One that was not asked for is left out, which is said: the reduction needs no more than a matrix.
    monkeypatch.setattr("laser.cli.run._search_measure", lambda *_: None)
    assert memory.for_run_leaderboard(open_checkpoint(model), devices.choose_device("cpu"), needed=False) is None


# --- dry runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_counts_the_search(
    run: Run, deep: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--text", tmp_path / "text.txt", "--window", 32, "--windows", 5, "--held-out-windows", 3, "--roles", "q,v")
    for verb, out, rules in (("run", "o", "--rule"), ("search", "p.json", "--rules")):
        command = (verb, deep, "-o", tmp_path / out, *words, rules, "fraction:0.9,fraction:0.5", "--lowest-snr", 4)
        code, told, _ = run(*command, "--dry-run", "--json")
        assert not reads
        found = json.loads(told)["search"]
        assert code == 0 and found["candidates"] == 4 and found["trials"] == 8
        assert found["texts"] == (1 + 4 * 2) * 5 + 2 * 3 and found["tokens"] == found["texts"] * 31
        assert found["seconds"] > 0 and found["peak_bytes"] > LEAST_SPACE and not found["stream"]
        assert (found["layers_in_memory"], found["variants_at_a_time"], found["dtype"]) == (12, 0, "float32")
        chosen = "all of it stays in memory"
        assert found["placed"].endswith(chosen)
        code, told, _ = run(*command, "--dry-run")
        assert code == 0 and "search: at most 4 candidates in 8 trials, 51 windows" in told and chosen in told
    cut = cut_bytes(deep)
    between(monkeypatch, deep, 31, 0.9, beside=cut + 5 * 5 * 31 * 32 * 4)
    code, told, err = run(*command, "--dry-run", "--json")
    found = json.loads(told)["search"]
    assert found["stream"] and (found["layers_in_memory"], found["variants_at_a_time"]) == (5, 8)
    assert err == f"laser: {found['placed']}\n"
    assert not (tmp_path / "o").exists() and not (tmp_path / "p.json").exists()


class Counted(LayeredModel):
    """One that counts the windows and tokens that it answers, over all that are made."""

    made: ClassVar[list[Counted]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.windows = self.tokens = 0
        self.made.append(self)

    def score(self, activations: Any, windows: Sequence[Window]) -> Any:
        self.windows += len(windows)
        self.tokens += sum(len(w.tokens) - 1 for w in windows)
        return super().score(activations, windows)

    @classmethod
    def counts(cls) -> tuple[int, int, int]:
        return (
            sum(m.windows for m in cls.made),
            sum(m.tokens for m in cls.made),
            sum(m.layer_forwards for m in cls.made),
        )


SEARCHES: dict[str, tuple[tuple[str, ...], bool]] = {  # the flags, and whether what is estimated is exact
    "layers": (("--rules", "fraction:0.9,fraction:0.5", "--lowest-snr", "all"), True),
    "embedding": (("--rules", "fraction:0.5", "--lowest-snr", "all", "--roles", "q,embedding"), True),
    "snr": (("--rules", "fraction:0.5", "--lowest-snr", "all", "--order", "snr"), False),
    "lowest": (("--rules", "fraction:0.9,fraction:0.5", "--lowest-snr", "3"), False),
    "shortlist": (("--rules", "fraction:0.5", "--shortlist", "gradient:99"), True),
    "short": (("--rules", "fraction:0.5", "--shortlist", "gradient:3"), False),
    "grid": (("--grid", "fraction:0.9,0.5"), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(SEARCHES, 4))
@pytest.mark.parametrize("accept", ["all", "nothing"])
def test_what_is_estimated_of_a_search_is_what_it_runs(
    name: str, accept: str, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly where every candidate is tried in the order of the layers and one is kept; else it is not exceeded."""
    flags, exact = SEARCHES[name]
    # The table is where a way to accept is added.
    monkeypatch.setitem(ACCEPT, "any-drop", lambda d, se: accept == "all")
    # The command makes the model itself.
    monkeypatch.setattr("laser.cli.search.LayeredModel", Counted)
    monkeypatch.setattr(Counted, "made", [])
    words = (
        "search",
        model,
        "-o",
        tmp_path / "p.json",
        "--text",
        tmp_path / "text.txt",
        "--window",
        16,
        "--windows",
        3,
    )
    words = (
        *words,
        "--held-out-windows",
        2,
        "--accept",
        "any-drop",
        *(() if "--roles" in flags else ("--roles", "q,v")),
    )
    estimated = json.loads(run(*words, *flags, "--dry-run", "--json")[1])["search"]
    assert Counted.counts() == (0, 0, 0)
    code, out, err = run(*words, *flags, "--json")
    assert code == 0, err
    trials = json.loads(out)["trials"]
    found = (len({t["label"] for t in trials}), len(trials), *Counted.counts())
    counted = tuple(estimated[key] for key in ("candidates", "trials", "texts", "tokens", "layer_forwards"))
    assert all(here <= there for here, there in zip(found, counted, strict=True)), (found, counted)
    if exact and accept == "all":
        assert found == counted
    # With the spectra there, which ones are tried is known: candidates and trials are those of the search.
    again = json.loads(run(*words, *flags, "--dry-run", "--json", "--force")[1])["search"]
    known = tuple(again[key] for key in ("candidates", "trials", "texts", "tokens", "layer_forwards"))
    assert all(a <= b <= c for a, b, c in zip(found, known, counted, strict=True)), (found, known, counted)
    if name == "lowest" and accept == "all":
        assert known == found


def test_a_dry_run_is_refused_where_the_run_is(run: Run, model: Path, tmp_path: Path) -> None:
    """The exit code and what is said, for requests that cannot be met."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    bare = write_checkpoint_directory(tmp_path / "bare", dict.fromkeys(["x"], torch.ones(2)), {"model_type": "llama"})
    text = ("--text", tmp_path / "text.txt")
    for words in (
        ("run", model, "-o", tmp_path / "taken", *text),
        ("run", model, "-o", model / "inside", *text),
        ("run", model, "-o", tmp_path / "o", "--text", tmp_path / "none.txt"),
        ("run", model, "-o", tmp_path / "o", *text, "--layers", "99"),
        ("run", model, "-o", tmp_path / "o", *text, "--roles", "w9"),
        ("run", model, "-o", tmp_path / "o", *text, "--rule", "none"),
        ("run", model, "-o", tmp_path / "o", *text, "--rule", "data:energy:0.9"),
        ("run", model, "-o", tmp_path / "o", *text, "--method", "magic"),
        ("run", model, "-o", tmp_path / "o", *text, "--windows", 0),
        ("run", model, "-o", tmp_path / "o", *text, "--shrink", "frobenius"),
        ("run", model, "-o", tmp_path / "o", "--moments", tmp_path / "none"),
        ("run", bare, "-o", tmp_path / "o", *text),
        ("search", model, "-o", tmp_path / "nowhere/p.json", *text),
        ("search", model, "-o", tmp_path / "p.json", *text, "--objective", "accuracy"),
        ("search", bare, "-o", tmp_path / "p.json", *text),
        ("leaderboard", model, "-o", tmp_path / "l.json", "--tasks", "none"),
        ("leaderboard", model, "-o", tmp_path / "l.json", "--dtype", "float8"),
        ("leaderboard", model),
    ):
        real, dry = run(*words), run(*words, "--dry-run")
        assert real[0] == dry[0] != 0 and real[2] == dry[2], words
    assert not (tmp_path / "o").exists()


# --- out of memory ----------------------------------------------------------------------------------------------------

KINDS: list[BaseException] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.\nMore lines."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, max allowed: 9.07 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Invalid buffer size: 47.68 GB"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", KINDS, ids=lambda e: f"{type(e).__name__} {str(e)[:12]}")
def test_out_of_memory_is_one_line(
    error: BaseException, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    # Memory that runs out where the work is: a command takes no stand-in for it.
    monkeypatch.setattr("laser.cli.measure.evaluate", fail)
    monkeypatch.setattr("laser.cli.flow.scan_into", fail)
    text = ("--text", tmp_path / "text.txt")
    code, out, err = run("eval", model, *text)
    err = unwarned(err)
    assert code == 1 and not out and err.count("\n") == 1 and err.startswith("laser: out of memory (")
    assert "try --stream, or a smaller --window" in err
    assert ("--device cpu" in err) is any(word in str(error) for word in ("CUDA", "MPS", "Invalid"))
    assert "--stream" not in run("eval", model, *text, "--stream")[2]
    code, _, err = run("scan", model, "-o", tmp_path / "s")
    assert code == 1 and "what is finished is kept, run the same command again" in err
    on_device = any(word in str(error) for word in ("CUDA", "MPS", "Invalid"))
    assert ("begin anew with --force and --device cpu\n" if on_device else "try --device cpu --workers 1;") in err


def test_numpy_and_other_wrappers_are_known_and_other_errors_are_not() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 62, dtype=np.uint8)
    assert is_out_of_memory(caught.value)
    wrapped = ValueError("cannot be built")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    for error in (RuntimeError("shape mismatch"), OSError(28, "No space left on device"), ValueError(), None):
        assert not is_out_of_memory(error)


def test_what_to_try_is_what_the_verb_has(run: Run) -> None:
    for less in LESS:
        for verb in less.verbs:
            told = run(verb, "--help")[1]
            for option in (word for word in less.way.split() if word.startswith("--")):
                assert option in told, (less.way, verb)


MEASURED = "m -o new.json --spectra s.safetensors --text text.txt --windows 2 --held-out-windows 2 --window"
# What is asked first, how many reads it gets, and what memory is saved with. Each of the ways that a journal can take.
SAVINGS = {
    "scan": ("m -o new --roles q", 2, ["--device cpu --workers 1"]),
    "reduce": ("m p.json -o new", 2, ["--device cpu --workers 1"]),
    "run": ("m -o new --no-search --rule rank:4 --roles q", 2, ["--device cpu --workers 1"]),
    "search": (f"{MEASURED} 32 --no-stream", 60, ["--stream", "--window 16"]),
    "calibrate": (
        "m -o new --text text.txt --window 32 --windows 2 --roles q",
        90,
        ["--window 24"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", SAVINGS)
def test_what_is_said_to_be_kept_is_kept_and_what_begins_anew_does(
    verb: str, run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (words, reads, ways), read = SAVINGS[verb], Checkpoint.read
    begun = [*verb.split(), *words.split()]
    left = [reads]

    def counted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return read(*arguments)

    def start() -> str:
        for path in tmp_path.glob("new*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (tmp_path / "search.jsonl").unlink(missing_ok=True)
        left[0] = reads
        with monkeypatch.context() as patch:
            # Memory that runs out in a command, at a place that is counted.
            patch.setattr(Checkpoint, "read", counted)
            code, _, err = run(*begun)
        assert code == 1 and err.startswith("laser: out of memory (") and "what is finished is kept" in err
        return err

    for way in ways:
        option = way.split()[0]
        told, _, anew = start().partition("or begin anew with --force and ")
        assert option in told + anew
        resume = ["--resume"] * (verb in ("reduce", "run"))
        again = [word for word in begun if word != "--no-stream"] + way.split()
        if option in anew:
            code, _, err = run(*again, *resume)
            assert code == 1 and "belongs to another" in err, err
            resume = ["--force"]
        code, _, err = run(*again, *resume)
        assert code == 0, err


def test_what_does_nothing_is_not_advised(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('rule = "rank:4"\n')

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    # As in test_out_of_memory_is_one_line.
    monkeypatch.setattr("laser.cli.run.run_flow", fail)
    code, _, err = run("run", made / "m", "-o", tmp_path / "out", "--recipe", recipe)
    assert code == 1 and "try --device cpu --workers 1; what is finished is kept" in err
    assert not any(option in err for option in ("--stream", "--window", "--no-leaderboard"))


# Verb -> the rest of its command line, and where memory runs out in it.
VERBS_AND_FAULTS: dict[str, tuple[str, str]] = {
    "info": ("m", "laser.cli.look.take_inventory"),
    "scan": ("m -o new.safetensors", "laser.checkpoint.reader.Checkpoint.read"),
    "plan": ("s.safetensors --rule rank:4 -o new.json", "laser.cli.flow.make_plan"),
    "reduce": ("m p.json -o new", "laser.checkpoint.reader.Checkpoint.read"),
    "verify": ("m out", "laser.cli.flow.verify_output"),
    "run": ("m -o new --no-search --rule rank:4 --roles q", "laser.checkpoint.reader.Checkpoint.read"),
    "eval": ("m --text text.txt --window 32 --windows 2 --stream", "laser.checkpoint.reader.Checkpoint.read"),
    "calibrate": ("m -o new --text text.txt --window 32 --windows 2", "laser.checkpoint.reader.Checkpoint.read"),
    "search": ("m -o new.json --spectra s.safetensors --text text.txt --window 32 --windows 2 --held-out-windows 2",
               "laser.checkpoint.reader.Checkpoint.read"),
    "leaderboard": ("m -o new.json --tasks winogrande", "laser.cli.publish.require_leaderboard"),
    "card": ("out --force", "laser.cli.publish.write_card"),
    "push": ("out me/it", "laser.cli.publish.push_directory"),
    "null": ("m --roles q", "laser.cli.look.null_test"),
    "spectra": ("s.safetensors", "laser.cli.look.summarise"),
    "plot": ("s.safetensors -o new.png --heat kept", "laser.cli.look.plots.encoded"),
    "report": ("s.safetensors -o new.html", "laser.cli.look.page.render_page"),
    "convert": ("m -o new", "laser.cli.convert.open_checkpoint"),
    "devices": ("--probe", "laser.cli.devices.measure_device"),
    "delta": ("m out -o new", "laser.cli.delta.scan_into"),
    "unmerge": ("m out -o new", "laser.cli.adapters.open_stored"),
    "rebuild": ("m out -o new", "laser.cli.adapters.open_stored"),
    "compensate": ("m out --plain --roles q -o new", "laser.checkpoint.reader.Checkpoint.read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    make_model(folder / "m", "mixtral")
    chosen = ["--roles", "q"]
    assert main(["scan", str(folder / "m"), "-o", str(folder / "s.safetensors"), *chosen]) == 0
    plan = ["plan", str(folder / "s.safetensors"), "-o", str(folder / "p.json"), "--rule", "rank:4"]
    assert main(plan) == 0
    assert main(["reduce", str(folder / "m"), str(folder / "p.json"), "-o", str(folder / "out")]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS_AND_FAULTS)
def test_out_of_memory_is_one_line_in_every_verb(
    verb: str, run: Run, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert VERBS_AND_FAULTS.keys() == {verb.__name__ for verb in VERBS}
    words, place = VERBS_AND_FAULTS[verb]
    goes_on = {"scan", "reduce", "run", "calibrate", "search", "leaderboard", "delta", "unmerge", "compensate"}
    monkeypatch.chdir(made)
    errors = (KINDS[0], MemoryError(), damaged(OSError(12, "Cannot allocate memory")))  # each a kind of its own
    for number, error in enumerate(errors):
        reached: list[int] = []

        def fail(*_: Any, error: BaseException = error, reached: list[int] = reached, **__: Any) -> None:
            reached.append(1)
            raise error

        with monkeypatch.context() as patch:
            # As in test_out_of_memory_is_one_line.
            patch.setattr(place, fail)
            code, out, err = run(verb, *words.replace(" new", f" {verb}{number}new").split())
        assert reached and code == 1 and err.count("\n") == 1 and "Traceback" not in out + err, err
        assert err.startswith("laser: out of memory (") and "; try " in err and "download it again" not in err
        assert ("what is finished is kept" in err) is (verb in goes_on)
        assert "--workers" not in err or "--device cpu --workers 1" in err
    assert not [path for path in made.glob("*new*") if path.suffix in (".png", ".html", ".safetensors")]


def damaged(error: BaseException) -> BaseException:
    """As a reader says it that takes every error for the file's."""
    found = CheckpointError("model.safetensors cannot be read; download it again")
    found.__cause__ = error
    return found


def test_what_was_handled_before_an_error_of_ours_is_not_its_cause() -> None:
    """A device had too little, the host went on, and then something else was wrong."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise CheckpointError("another thing")  # noqa: B904
    except CheckpointError as error:
        assert not is_out_of_memory(error)
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("a library says it so")  # noqa: B904
    except ValueError as error:
        assert is_out_of_memory(error)


def test_workers_that_cannot_be_started_are_out_of_memory(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was started ends, and nothing is waited for that was not."""
    start, started = Thread.start, []

    def refuse(thread: Thread) -> None:
        if started and thread.name.startswith("laser"):
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(Thread, "start", refuse)
    code, _, err = run("scan", made / "m", "-o", tmp_path / "new.safetensors", "--workers", 2)
    assert code == 1 and err.startswith("laser: out of memory (can't start new thread)") and err.count("\n") == 1
    assert not any(thread.is_alive() for thread in started)


# --- Ray, of which only what it says is made --------------------------------------------------------------------------


class Cluster:
    """As much of Ray as a visit asks for: what `get` gives, in turn."""

    class exceptions:
        OutOfMemoryError = type("OutOfMemoryError", (Exception,), {})
        ObjectStoreFullError = type("ObjectStoreFullError", (Exception,), {})
        WorkerCrashedError = type("WorkerCrashedError", (Exception,), {})

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def remote(self, **_: Any) -> Any:
        return lambda task: SimpleNamespace(remote=lambda *arguments: (task, arguments))

    def put(self, item: Any) -> Any:
        return item

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1}

    def wait(self, pending: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return pending[:num_returns], pending[num_returns:]

    def get(self, reference: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        task, arguments = reference
        return task(*arguments)

    def cancel(self, _: Any) -> None:
        pass


@pytest.mark.parametrize(
    "answer, told",
    [
        (None, r"out of memory \(CUDA out of memory"),
        (Cluster.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMore."),
         r"out of memory \(Ray: Task was killed"),
        (Cluster.exceptions.ObjectStoreFullError("Failed to put object"), r"out of memory \(Ray: Failed"),
        (Cluster.exceptions.WorkerCrashedError("died"), "a worker of Ray ended 6 times .* try --engine threads"),
    ],
)  # fmt: skip
def test_out_of_memory_in_a_task_of_ray_is_one_line(
    answer: Any, told: str, run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.\nMore lines.")

    # A cluster that answers so.
    monkeypatch.setattr("laser.engine.ray.connect", lambda _: Cluster(answer))
    monkeypatch.setattr("laser.checkpoint.reader.Checkpoint.read", fail)
    code, _, err = run("scan", made / "m", "-o", tmp_path / "new.safetensors", "--engine", "ray", "--device", "cpu")
    assert code == 1 and err.count("\n") == 1 and re.match(f"laser: {told}", err), err
    assert "--workers" not in err


def test_a_matrix_is_not_skipped_for_want_of_memory(run: Run, model: Path, tmp_path: Path, methods: Methods) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 1.00 GiB")

    methods.values.update(dict.fromkeys(methods.values, fail))
    code, _, err = run("scan", model, "-o", tmp_path / "s.safetensors")
    assert code == 1 and "out of memory (Unable to allocate 1.00 GiB)" in err
    assert not (tmp_path / "s.safetensors").exists()


# --- for real ---------------------------------------------------------------------------------------------------------


def limited(megabytes: int, work: Callable[[], int]) -> int:
    """`work` in a child that may take so much more data memory than it has at its start; its exit code."""
    child = os.fork()
    if not child:
        code = 99
        try:
            signal.alarm(100)
            torch.set_num_threads(1)
            status = Path("/proc/self/status").read_text()
            held = 1024 * int(status.split("VmData:")[1].split()[0])
            resource.setrlimit(resource.RLIMIT_DATA, (held + megabytes * MB, resource.RLIM_INFINITY))
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


NEEDS_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's limit of data memory")


@pytest.mark.slow
@NEEDS_LINUX
def test_a_model_larger_than_the_limit_is_evaluated(tmp_path: Path) -> None:
    """214 MB in float32, under 160 MB above the libraries: whole it is refused, and would have failed."""
    path = make_llama(tmp_path / "m", 12)
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", str(tmp_path / "text.txt"), "--window", "32", "--windows", "2"]
    assert main(["eval", str(path), *text]) == 0  # what is imported and built once is there before the limit

    def laser(*words: str) -> Callable[[], int]:
        return lambda: main([words[0], str(path), *text, *words[1:]])

    assert limited(160, laser("eval")) == 0
    assert limited(160, laser("eval", "--no-stream")) == 1


@pytest.mark.slow
@NEEDS_LINUX
def test_a_search_of_a_model_three_times_as_large_as_the_limit_finds_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, limit = make_llama(tmp_path / "m", 78, width=1024), 256
    (tmp_path / "text.txt").write_text(TEXT)
    words = [str(path), "--text", str(tmp_path / "text.txt"), "--window", "32", "--windows", "2", "--roles", "k"]
    words += ["--held-out-windows", "2", "--layers", "60,72", "--accept", "any-drop", "--device", "cpu"]
    run = ["run", *words, "--search", "--rule", "rank:8,rank:64", "--workers", "1", "-o"]
    search = ["search", *words, "--rules", "rank:8,rank:64", "-o", str(tmp_path / "p.json")]  # writes no weights
    assert sum(t.numel() for t in build_causal(open_checkpoint(path)).parameters()) * 4 > 3 * limit * MB
    assert main([*run, str(tmp_path / "dry"), "--dry-run"]) == 0  # what is imported is there before the limit
    assert limited(4000, lambda: main(search)) == 0
    assert "laser: m needs" not in capfd.readouterr().err
    assert limited(limit, lambda: main([*run, str(tmp_path / "out")])) == 0
    err = capfd.readouterr().err
    assert re.match(
        r"laser: m needs 1\.\d+ GB of memory to be loaded whole, and 0\.\d+ GB are free: the last [1-9] of 78 layers "
        r"stay in memory, the others are read at each pass; up to 4 variants at a time\n", err
    ), err  # fmt: skip
    assert limited(limit, lambda: main([*run, str(tmp_path / "none"), "--no-stream"])) == 1
    plans = [json.loads(path.read_text()) for path in (tmp_path / "p.json", tmp_path / "out/laser/plan.json")]
    assert plans[0] == plans[1] and "reduce" in {line["action"] for line in plans[0]["lines"]}
