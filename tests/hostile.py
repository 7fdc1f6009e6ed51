"""Hostile checkpoints: each attack breaks a whole one in its own way; HOSTILE says what the error must say."""

import json
import random
import struct
from collections.abc import Callable, Mapping
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


# --- headers at random: what laser takes, safetensors takes -----------------------------------------------------------

VALUES = (
    *("null", "true", "-0", "0", "-1", "1", "1.0", "1e2", "1e400", "NaN", "-Infinity", str(2**63), str(2**64)),
    *("9" * 400, "9" * 5000, '""', '"F32"', '"BF17"', '"\\ud800"', '"\\ud83d\\ude00"', '"a\\u0000"', "[]", "{}", "[1]"),
    *("[0,4]", "[4,0]", "[0,4,4]", "[-0,4]", '["F32"]', '{"a":"b"}', '{"a":1}', '{"a":1,"a":2}', "[" * 90 + "]" * 90),
    *("[" * 130 + "]" * 130, "[" * 5000 + "]" * 5000, f"[{2**62},{2**62},0]", f"[0,{2**64 - 1}]", f"[{2**32},{2**32}]"),
)
KEYS = ("dtype", "shape", "data_offsets", "__metadata__", "extra", "", "a\\u0000b", "\\ud800", "é")
BYTES = (b"", b"\xff", b"\xef\xbb\xbf", b"\0", b" ", b"\n", b"\t", b"\x0c", b'"', b",", b"0", b"-", b"}", b"\xc2\xa0")


def mutated_header(draw: random.Random, header: Mapping[str, Any]) -> bytes:
    """The JSON text of a header of which one to three things are changed: values, keys, or the bytes themselves."""
    entries = {json.dumps(key): {json.dumps(k): json.dumps(v) for k, v in e.items()} for key, e in header.items()}
    whole: dict[str, str] = {}  # entries that are replaced by one value
    more: list[tuple[str, str]] = []  # keys that come again, or are new
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = draw.choice(list(entries))
        kind = draw.randrange(6)
        if kind == 0:
            entries[name][draw.choice(list(entries[name]) or ['"dtype"'])] = draw.choice(VALUES)
        elif kind == 1:
            entries[name][f'"{draw.choice(KEYS)}"'] = draw.choice(VALUES)
        elif kind == 2 and entries[name]:
            del entries[name][draw.choice(list(entries[name]))]
        elif kind == 3:
            whole[name] = draw.choice(VALUES)
        elif kind == 4:
            more.append((f'"{draw.choice(KEYS)}"', draw.choice(VALUES)))
        else:
            more.append((name, "{}"))
    pairs = [(k, whole.get(k) or "{" + ",".join(f"{a}:{b}" for a, b in e.items()) + "}") for k, e in entries.items()]
    text = ("{" + ",".join(f"{k}:{v}" for k, v in draw.sample(pairs, len(pairs)) + more) + "}").encode()
    if draw.random() < 0.3:
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(BYTES) + text[at + draw.randint(0, 1) :]
    return text


CONFIG_VALUES = (
    *("null", "true", "-1", "0", "1", "1000000000", "1e308", "NaN", "Infinity", "9" * 4000, "9" * 5000, "0.5", '""'),
    *('"\\u0000\\u001b[2J\\u202e"', '"mixtral"', '"nothing_of_the_kind"', "[]", "{}", '[1,"a",null]', '{"a":{"b":[]}}'),
    *("[" * 500 + "]" * 500, "[" * 100000 + "]" * 100000, '"' + "x" * 100000 + '"', '{"a":1,"a":2}', '"\\ud800"'),
)


def mutated_config(draw: random.Random, config: Mapping[str, Any]) -> bytes:
    """A config's JSON text of which one to three entries, or all, are changed."""
    if draw.random() < 0.1:
        return draw.choice(CONFIG_VALUES).encode()
    pairs = {json.dumps(key): json.dumps(value) for key, value in config.items()}
    for _ in range(draw.choice((1, 1, 2, 3))):
        more = ("quantization_config", "text_config", "rope_scaling", "transformers_weights", "layer_types", "auto_map")
        key = draw.choice([*pairs, *map(json.dumps, more)])
        pairs[key] = draw.choice(CONFIG_VALUES)
    return ("{" + ",".join(f"{key}:{value}" for key, value in pairs.items()) + "}").encode()
