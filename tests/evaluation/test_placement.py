"""What of a search stays in memory: never more than is free, more with more, and the same bits whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico_language import TEXT, make_model

from laser.checkpoint.reader import open_checkpoint
from laser.errors import OutOfMemory
from laser.evaluation.activations import Store, pinned_bytes
from laser.evaluation.footprint import Needs, layered_needs, states_bytes
from laser.evaluation.objective import Loss
from laser.evaluation.placement import Alive, Asked, Placement, place
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.text import Text, Windows, cut_windows, load_tokenizer
from laser.pipeline import scan
from laser.searching.search import search_plan
from laser.selection import Selection
from laser.spectral.devices import choose_device

CPU = torch.device("cpu")
MB, GB = 10**6, 10**9


# --- the choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretended:
    """A model of a head, so many layers of one size, and an embedding, on one device of a machine."""

    layers: int
    layer: int
    others: int  # head and embedding, each
    work: int  # what passes through
    device: str
    alive: Alive

    def needs_of(self, asked: Asked, resident: int | None) -> Needs:
        pieces = [self.others, *[self.layer] * self.layers, self.others]
        stay = 0 if resident is None else len(pieces) - resident
        read = [sum(pieces[i : min(i + 1 + bool(resident), stay)]) for i in range(stay)]
        count = self.work + sum(pieces[stay:]) + max(read, default=0)
        return Needs(0, count) if self.device == "cpu" else Needs(count, self.work)

    def placed(self, here: int | None, there: int | None, stream: bool | None = None) -> Placement:
        asked = Asked("float32", self.device, 31, stream)
        return place("m", asked, self.needs_of, lambda name, _: here if name == "cpu" else there, [], self.alive)

    def taken(self, placed: Placement) -> tuple[int, int]:
        """On the host, and on the device."""
        needs = self.needs_of(Asked("float32", self.device, 31), placed.resident)
        assert needs == placed.needs
        on_device = needs.device + placed.device_states
        shared = on_device if self.device == "mps" else 0
        return needs.host + placed.host_states + shared, on_device

    def read(self, placed: Placement) -> int:
        """Layers that a search of one walk for each of its waves reads."""
        return 0 if not placed.stream else -(-self.alive.variants // placed.variants) * (self.layers - placed.layers)


@st.composite
def pretended(draw: st.DrawFn) -> Pretended:
    layers, sizes = draw(st.integers(1, 12)), st.integers(1, 100)
    alive = Alive(layers, draw(sizes), draw(st.integers(1, 40)), kept=draw(st.integers(0, 9)))
    return Pretended(
        layers, draw(sizes), draw(sizes), draw(sizes), draw(st.sampled_from(["cpu", "cuda", "mps"])), alive
    )


@pytest.mark.slow
@settings(max_examples=400)
@given(pretended(), st.integers(0, 6000), st.integers(0, 6000), st.integers(0, 500), st.integers(0, 500))
def test_what_is_chosen_fits_and_grows_with_what_is_free(
    model: Pretended, here: int, there: int, more: int, more_there: int
) -> None:
    before: Placement | None = None
    for host, device in ((here, there), (here + more, there + more_there)):
        try:
            placed = model.placed(host, device)
        except OutOfMemory:
            assert before is None  # what fitted fits with more
            continue
        taken = model.taken(placed)
        assert taken[0] <= host and (taken[1] <= device or model.device == "cpu")
        assert placed.stream <= placed.variants <= model.alive.variants * placed.stream
        assert placed.layers == (model.layers if placed.resident is None else max(placed.resident - 1, 0))
        if placed.resident is not None and placed.resident < model.layers:  # not one more piece would have fitted
            least = model.needs_of(Asked("float32", model.device, 31), 0)
            wider = model.needs_of(Asked("float32", model.device, 31), placed.resident + 1)
            spare = [host - least.host, device - least.device]
            if model.device == "mps":
                spare = [spare[0] - least.device, min(spare[0] - least.device, spare[1])]
            states = model.alive.wanted(spare[model.device != "cpu"], whole=False)
            rooms = {"cpu": host - wider.host, "cuda": device - wider.device}
            rooms["mps"] = min(rooms["cpu"] - wider.device, rooms["cuda"])
            assert states > rooms[model.device]
        if before is not None:
            ranks = [model.layers + 2 if p.resident is None else p.resident for p in (before, placed)]
            assert ranks[0] <= ranks[1] and model.read(placed) <= model.read(before)
        before = placed


def test_the_choice_is_said_with_its_reason() -> None:
    model = Pretended(32, 2 * GB, 1 * GB, 1 * GB, "cpu", Alive(32, 1 * GB, 60))
    whole = "m needs 70.00 GB of memory to be loaded whole, and {}.00 GB are free: {}"
    told = {
        (None, 200): whole.format(200, "all of it stays in memory"),
        (None, 70): whole.format(70, "all of it stays in memory"),
        (None, 45): whole.format(
            45, "the last 9 of 32 layers stay in memory, the others are read at each pass; up to 19 variants at a time"
        ),
        (None, 11): whole.format(
            11, "only the head stays in memory, the layers are read at each pass; up to 3 variants at a time"
        ),
        (None, 4): whole.format(
            4, "each layer is read at each pass; up to 1 variant at a time, its states in files"
        ),
        (True, 200): "m needs 3.00 GB of memory layer by layer, and 200.00 GB are free: each layer is read at each "
        "pass; up to 60 variants at a time",
        (False, 67): "m needs 67.00 GB of memory to be loaded whole, and 67.00 GB are free: all of it stays in memory",
    }  # fmt: skip
    for (stream, free), expected in told.items():
        placed = model.placed(free * GB, None, stream)
        assert placed.why == expected
        assert placed.news is (stream is None and placed.stream)


# --- states -----------------------------------------------------------------------------------------------------------


def test_states_lie_on_the_device_then_in_memory_then_in_files(tmp_path: Path) -> None:
    """The device is the host, which cannot be told apart here but by what is counted."""
    size = 5 * 3 * 4
    store = Store(2 * size + 1, tmp_path, device=CPU, device_limit=size)
    room, found = [], []
    for _ in range(4):
        room.append(store.room([2, 3], 3, torch.float32))
        found.append(store.allocate([2, 3], 3, torch.float32))
    assert room == [3, 2, 1, 0] and (store.device_used, store.used) == (size, 2 * size)
    for number, states in enumerate(found):
        states.hidden.fill_(number)
    assert [float(states.window(1).mean()) for states in found] == [0, 1, 2, 3] and not list(tmp_path.iterdir())
    store.free(found[0])
    store.free(found[3])  # a file is nobody's memory
    assert store.room([2, 3], 3, torch.float32) == 1 and store.device_used == 0
    store.free(found[1])
    assert store.room([2, 3], 3, torch.float32) == 2 and store.room([], 3, torch.float32) > 0
    assert store.allocate([5], 3, torch.float32).hidden.shape == (5, 3) and store.device_used == size


def test_states_beside_a_cuda_device_are_counted_as_they_are_pinned(tmp_path: Path) -> None:
    assert [pinned_bytes(n) for n in (0, 1, 3, 64, 65)] == [0, 1, 4, 64, 128]
    store = Store(1 << 20, tmp_path, device=torch.device("cuda"))
    assert store.room([9], 1 << 10, torch.float32) == (1 << 20) // (1 << 16)  # 36 KiB each: 64
    placed = Pretended(4, MB, MB, MB, "cuda", Alive(4, 9 << 20, 20, kept=5)).placed(10 * GB, 100 * MB)
    assert placed.resident is None and placed.device_states == 5 * (9 << 20)  # 5 states, and 3 that wait
    assert placed.host_states == 3 * (16 << 20)


# --- a model of which the last pieces stay ----------------------------------------------------------------------------


def windows_of(path: Path) -> Windows:
    return cut_windows(Text("t", TEXT), load_tokenizer(path), length=32, limit=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "tied"])
def test_what_stays_is_read_once_and_gives_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", kind))
    windows = windows_of(checkpoint.path).windows
    name, W = "model.layers.1.self_attn.q_proj.weight", torch.zeros(32, 32, dtype=torch.bfloat16)
    found = []
    for resident in (0, 1, 2, 3, 4, 5, None):
        model = LayeredModel(checkpoint, resident=resident)
        read: list[str] = []
        monkeypatch.setattr(
            model, "_read", lambda name, edits, own=model._read, read=read: (read.append(name), own(name, edits))[1]
        )
        first = model.losses(windows)
        read.clear()
        again = model.losses(windows)
        layers = {int(name.split(".")[2]) for name in read if ".layers." in name}
        stay = model.layers + 1 if resident is None else resident
        assert layers == set(range(max(model.layers + 1 - max(stay, 1), 0)))
        assert ("lm_head.weight" in read) is (stay == 0) or kind == "tied"
        assert ("model.embed_tokens.weight" in read) is (stay < 5 and resident is not None)
        model.edit(name, W)
        edited = model.losses(windows)
        model.edit(name, None)
        found.append((first, again, edited, model.losses(windows)))
        kinds = [any(t.device.type != "meta" for t in tensors) for tensors in model.kinds()[:-1]]
        assert kinds == [number >= len(kinds) - stay or resident is None for number in range(len(kinds))]
        model.unload()
        assert all(p.device.type == "meta" for p in model.model.parameters())
    assert all(each == found[0] for each in found) and found[0][1] == found[0][3] != found[0][2]


def test_each_piece_that_stays_needs_more_and_all_of_them_what_the_whole_does(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    model = LayeredModel(checkpoint, device="meta", resident=None)
    for backward in (False, True):
        needs = [layered_needs(model, CPU, 31, k, backward).host for k in (*range(model.layers + 3), None)]
        # Where the embedding and one layer are read, both are there together: that is all of it.
        assert needs == sorted(set(needs)) + needs[-3:] and len(set(needs)) == model.layers + 1
    assert states_bytes(model, windows_of(checkpoint.path).windows) == 3 * 31 * 32 * 4


# --- a search with room for few states --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_finds_the_same_however_few_states_have_room(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "mixtral"))
    windows, others = windows_of(checkpoint.path), Text("h", TEXT[::-1])
    held_out = cut_windows(others, load_tokenizer(checkpoint.path), length=32, limit=2)
    spectra, size = scan(checkpoint, device=choose_device("cpu")), 3 * 31 * 32 * 4
    found = []
    for states in range(9):
        # Kept edits take room from states, so that kept states give way in the middle of a search.
        store = Store(states * size, tmp_path, device=CPU, device_limit=(states % 3) * size)
        model = LayeredModel(checkpoint, resident=2, store=store, ahead=states % 2 == 0)
        result = search_plan(
            model, spectra, ["rank:8", "rank:2"], Loss(windows), [Loss(held_out)], accept="any-drop",
            selection=Selection(roles=("q", "k", "o")), device=choose_device("cpu"),
        )  # fmt: skip
        assert store.used <= states * size and not list(tmp_path.glob("laser-activations*"))
        model.unload()
        found.append(([(t.label, t.rule, t.d, t.se, t.accepted) for t in result.trials], result.plan, result.held_out))
    assert all(each == found[0] for each in found) and any(t[4] for t in found[0][0])
