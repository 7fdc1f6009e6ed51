"""Hostile checkpoints: each attack breaks a whole one in its own way; HOSTILE says what the error must say."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laser.checkpoint.reader import INDEX

SECOND = "model-00002-of-00003.safetensors"


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the JSON header of a shard; the data stays."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(k for k in header if k != "__metadata__")]


def missing_shard(path: Path) -> None:
    (path / SECOND).unlink()


def path_outside(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"lm_head.weight": "../../etc/passwd.safetensors"}))


def absolute_path(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"lm_head.weight": "/etc/passwd.safetensors"}))


def tensor_not_in_shard(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"not.there": SECOND}))


def truncated(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(raw[:-10])


def longer(path: Path) -> None:
    with (path / SECOND).open("ab") as file:
        file.write(b"more")


def cut_in_header(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(raw[:50])


def empty_shard(path: Path) -> None:
    (path / SECOND).write_bytes(b"")


def endless_header(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(struct.pack("<Q", 2**60) + raw[8:])


def huge_header(path: Path) -> None:
    with (path / SECOND).open("wb") as file:  # sparse: takes no room
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)


def overlapping(path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = [k for k in header if k != "__metadata__"]
        twins = [(a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"]]
        a, b = twins[0]
        header[b]["data_offsets"] = header[a]["data_offsets"]

    edit_header(path / SECOND, change)


def out_of_range(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(data_offsets=[10**9, 2 * 10**9]))


def falling_offsets(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(data_offsets=[20, 10]))


def wrong_size(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h)["shape"].append(3))


def negative_shape(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(shape=[-1, 4]))


def unknown_dtype(path: Path) -> None:
    edit_header(path / SECOND, lambda h: first(h).update(dtype="BF17"))


def not_json(path: Path) -> None:
    raw = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(raw[:8] + b"}" + raw[9:])


def list_header(path: Path) -> None:
    (path / SECOND).write_bytes(struct.pack("<Q", 2) + b"[]")


def key_twice(path: Path) -> None:
    (path / SECOND).write_bytes(struct.pack("<Q", 32) + b'{"a":{"dtype":"F32"},"a":{}}    ')


def index_without_map(path: Path) -> None:
    (path / INDEX).write_text("{}")


def broken_index(path: Path) -> None:
    (path / INDEX).write_text("{")


def broken_config(path: Path) -> None:
    (path / "config.json").write_text("[1]")


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def pickle_in_index(path: Path) -> None:
    edit_index(path, lambda i: i["weight_map"].update({"lm_head.weight": "pytorch_model.bin"}))


def only_pickles(path: Path) -> None:
    for file in (*path.glob("*.safetensors"), path / INDEX):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def nothing_there(path: Path) -> None:
    for file in (*path.glob("*.safetensors"), path / INDEX):
        file.unlink()


HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (missing_shard, rf"index.json names {SECOND}, which is missing .*finish the download"),
    (path_outside, r"lm_head.weight points to '../../etc/passwd.safetensors', expected the name of a file"),
    (absolute_path, r"lm_head.weight points to '/etc/passwd"),
    (tensor_not_in_shard, rf"says that not.there is in {SECOND}, which does not hold it"),
    (truncated, rf"{SECOND}: .* has offsets .*truncated or damaged; download it again"),
    (longer, rf"{SECOND}: found \d+ bytes, expected \d+ by its header: bytes after the last tensor"),
    (cut_in_header, rf"{SECOND} is truncated: found 50 bytes, expected a header of \d+"),
    (empty_shard, rf"{SECOND} is truncated: found 0 bytes"),
    (endless_header, rf"{SECOND} is truncated: found \d+ bytes, expected a header of {2**60} bytes"),
    (huge_header, rf"{SECOND}: header of 100000001 bytes, expected at most 100000000"),
    (overlapping, rf"{SECOND}: .* (overlaps the tensor|leaves a hole) before it: found offset \d+, expected \d+"),
    (out_of_range, rf"{SECOND}: .* has offsets \[1000000000, 2000000000\]"),
    (falling_offsets, rf"{SECOND}: .* has offsets \[20, 10\], expected two rising numbers"),
    (wrong_size, rf"{SECOND}: .* holds \d+ bytes, expected \d+ for BF16"),
    (negative_shape, rf"{SECOND}: the entry of .* has no valid shape"),
    (unknown_dtype, rf"{SECOND}: .* has dtype 'BF17', expected one of F64"),
    (not_json, rf"{SECOND} is not valid JSON"),
    (list_header, rf"{SECOND}: the header is a list, expected an object"),
    (key_twice, rf"{SECOND} is not valid JSON .*a key stands twice"),
    (index_without_map, "found no weight_map"),
    (broken_index, rf"{INDEX} is not valid JSON"),
    (broken_config, "config.json: found list, expected a JSON object"),
    (no_config, "cannot read .*config.json: No such file"),
    (pickle_in_index, "lm_head.weight is in 'pytorch_model.bin', expected a .safetensors file"),
    (only_pickles, r"pytorch_model.bin is not a zip file, .* it was not opened"),
    (nothing_there, "holds neither model.safetensors.index.json nor model.safetensors"),
]
