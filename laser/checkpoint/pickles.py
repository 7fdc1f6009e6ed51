"""Weights in pickles (`pytorch_model*.bin`, `.pt`), read without running what a pickle may hold.

Only `torch.load(weights_only=True, mmap=True)` opens them: an unpickler that knows tensors and containers and refuses
every other name, over a file that is mapped and not read. Each file is then seen as the safetensors file that it would
be, so a reduction of pickles writes safetensors.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch

from laser.checkpoint.formats import pointer
from laser.checkpoint.safetensors import DTYPES, Shard, virtual_shard
from laser.errors import CheckpointError, first_line
from laser.files import LARGEST_FILE, open_regular

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MOST_HASHED = 1_000_000
SUFFIXES = (".bin", ".pt", ".pth")
RESAVE_ADVICE = "load it on a machine that you can spare, save it with safetensors (save_pretrained does), and try that"


def safetensors_name(name: str) -> str:
    """The name of the safetensors file made from a pickle: pytorch_model-00001-of-00002.bin to model-...safetensors."""
    return re.sub(r"^pytorch_model", "model", Path(name).stem) + ".safetensors"


def read_pickle(path: Path, name: str | None = None) -> Shard:
    """The safetensors shard (called `name`, or as `safetensors_name` says) that a pickled state dict would make.

    Weights are read when they are asked for, a tensor at a time. Raises CheckpointError, and runs nothing, for a
    pickle that holds anything but tensors under names, is damaged, or was written before torch 1.6.
    """
    try:
        stamp = _stamp(path)
        with open_regular(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}; download it again") from error
    if message := pointer(path):
        raise CheckpointError(message)
    if magic != b"PK\x03\x04":
        raise CheckpointError(
            f"{path.name} is not a zip file, as torch.save writes since torch 1.6: an old pickle, or none at all; it "
            f"was not opened; {RESAVE_ADVICE}"
        )
    sizes = _looked_into(path)
    tensors = _load_pickle(path, stamp)
    for key, value in tensors.items():
        held = value.untyped_storage().nbytes()
        if value.device.type != "cpu" or held not in sizes or value.numel() * value.element_size() > held:
            raise CheckpointError(
                f"{path.name}: {key} has shape {list(value.shape)}, more than the file holds of it, or not in its "
                f"place; {RESAVE_ADVICE}"
            )
    entries = [(key, DTYPES[value.dtype], tuple(value.shape)) for key, value in tensors.items()]

    def tensor(key: str) -> torch.Tensor:
        if _stamp(path) != stamp:
            raise CheckpointError(f"{path.name} changed while it was read; run again")
        return _load_pickle(path, stamp)[key]

    return replace(virtual_shard(name or safetensors_name(path.name), path, entries, tensor), stamp=stamp)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _looked_into(path: Path) -> frozenset[int]:
    """Sizes in bytes of a pickle's storages. Raises CheckpointError for a zip that torch would take for what it is not.

    torch maps what is packed as if it were not, checks no checksum, and takes one of two files of a name.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as packed:
            entries = packed.infolist()
            if len({entry.filename.lower() for entry in entries}) < len(entries):  # torch looks for them so
                raise CheckpointError(f"{path.name} holds two files of one name; {RESAVE_ADVICE}")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise CheckpointError(f"{path.name} is compressed, which torch.save never does; {RESAVE_ADVICE}")
            for entry in entries:
                if entry.filename.lower().endswith("/data.pkl"):
                    if entry.file_size > LARGEST_FILE:
                        raise CheckpointError(
                            f"{path.name}: its pickle has {entry.file_size} bytes, expected at most {LARGEST_FILE}; "
                            f"{RESAVE_ADVICE}"
                        )
                    if _hashing(packed.read(entry)) > MOST_HASHED:
                        raise CheckpointError(f"{path.name} holds tuples in tuples without end; {RESAVE_ADVICE}")
            return frozenset(entry.file_size for entry in entries)
    except CheckpointError:
        raise
    except Exception as error:  # hostile bytes can fail in any way
        raise CheckpointError(f"{path.name} cannot be read ({first_line(error)}); {RESAVE_ADVICE}") from error


def _hashing(pickled: bytes) -> int:
    """The most values that Python would hash for one tuple in a pickle: a tuple of two of a tuple of two, and so on,
    costs few bytes and, as a key, more time than there is. Known without making anything: the stack holds the costs."""
    stack, marks, memo, most = list[int](), list[int](), dict[int, int](), 0
    for code, value, _ in pickletools.genops(pickled):
        name = code.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            at = marks.pop()
            cost = 1 + sum(stack[at:])
            del stack[at:]
            if name == "TUPLE":
                stack.append(cost)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [1 + sum(stack[-count:])]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [sum(stack[-2:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[cast(int, value)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[cast(int, value)])
        elif name in ("APPEND", "BUILD"):
            stack.pop()
        elif name == "SETITEM":
            del stack[-2:]
        elif name == "BINPERSID":
            stack[-1] = 1
        elif name not in ("PROTO", "STOP"):
            stack.append(1)
        most = max(most, stack[-1] if stack else 0)
        if most > MOST_HASHED:
            break
    return most


@lru_cache(maxsize=2)  # the file in work and the one before it; mapped memory, given back by the system as it needs
def _load_pickle(path: Path, stamp: tuple[int, int]) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants {wanted[1]}" if wanted else f"is not plain data ({str(error).splitlines()[-1][:80]})"
        raise CheckpointError(
            f"{path.name} {what}, expected tensors only: a pickle that wants more can run any code, so it was refused "
            f"and nothing in it was run; {RESAVE_ADVICE}"
        ) from error
    except Exception as error:  # hostile bytes can fail in any way
        raise CheckpointError(f"{path.name} cannot be read ({first_line(error)}); {RESAVE_ADVICE}") from error
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{path.name} holds a {type(state).__name__}, expected tensors under names; {RESAVE_ADVICE}"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path.name}: {key!r} is a {type(value).__name__}, expected a tensor; a training state rather than a "
                "model? save its model alone and try that"
            )
        lazy = value.dtype in DTYPES and (value.is_conj() or value.is_neg())  # a sign that is not in the bytes
        if value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES or lazy:
            raise CheckpointError(
                f"{path.name}: {key} is {value.dtype}, {value.layout}, expected a dense tensor of "
                f"{', '.join(DTYPES.values())}; {RESAVE_ADVICE}"
            )
    return dict(state)
