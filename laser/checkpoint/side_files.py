"""Which files beside a model's weights go with an output, and which stay behind.

A copy of the weights in another format, or of another moment of the training, would be an unreduced model inside a
reduced one: whoever loads it measures nothing that laser did. So they stay behind, and the outcome names them.

So do links, but for those of the Hub's cache to its own blobs: an output may be published, and a link in a downloaded
model can lead to anything on this machine. Shards may be links to anywhere, as people put them on other disks: of
their bytes only tensors go out, which the header accounts for to the last byte.
"""

from __future__ import annotations

import errno
import json
import os
import re
import unicodedata
from pathlib import Path

from laser.errors import CheckpointError
from laser.files import LARGEST_FILE, open_regular, read_regular

# How files of weights end, in any format.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".pkl", ".pickle", ".joblib", ".nemo", ".torchscript"),
    *(".gguf", ".ggml", ".llamafile", ".onnx", ".onnx_data", ".ort", ".tflite", ".mlmodel", ".pte", ".engine", ".trt"),
    *(".h5", ".hdf5", ".keras", ".pb", ".msgpack", ".npz", ".npy", ".ot", ".pdparams", ".pdopt", ".tensors", ".mar"),
    *(".task", ".litertlm", ".ptl", ".plan", ".uff", ".pdiparams", ".mnn", ".rknn", ".caffemodel", ".wts", ".weights"),
    *(".dlc", ".bmodel", ".om"),
    *(".partial", ".incomplete", ".part", ".tmp", ".crdownload", ".aria2", ".tar", ".tgz", ".zip", ".7z", ".rar"),
)
# What may follow: packed, cut into pieces, put aside, numbered.
_FURTHER = r"(?:~|[._-](?:gz|bz2|xz|zst|lz4|br|zip|tar|7z|bak|old|orig|data|part[\w-]*|split[\w-]*|\d+\w*|a[a-z]))*"
_ENDS = "|".join(map(re.escape, WEIGHTS))
_WEIGHTS = re.compile(
    rf".*(?:{_ENDS}|\.onnx[._]data){_FURTHER}"  # model.safetensors.gz, model.onnx_data_1, model.gguf-split-a
    r"|.*\.ckpt[.-].*|.*\.data-\d+-of-\d+|.*\.(?:tar|zip)\.\w+"  # TensorFlow's checkpoints; packed archives
    r"|(?:_checkpoint)?_metadata|manifest\.ocdbt"  # JAX's
    r"|.*\.index(?:\.[\w-]+)?\.json|variables\.index|openvino_.*\.xml"  # says which of those files holds what
    r"|consolidated.*|q?model.*\.ggmlv\d.*"
)
# What only a trainer's state needs.
_STATE = re.compile(r"\.metadata|latest|latest_checkpointed_iteration\.txt|zero_to_fp32\.py")
# Folders of which nothing travels: a trainer's states, models of Core ML and of JAX.
_FOLDERS = re.compile(r"(?:checkpoint-|global_step)\d+|.*\.(?:mlpackage|mlmodelc|zarr)|ocdbt\.process_\d+")
ADAPTER = "adapter_config.json"
MODULES = "modules.json"  # sentence-transformers: which subfolders are modules of the model


# What a desktop puts into every folder that it shows, on its own and at any time: Finder, and Windows' Explorer.
_DESKTOP = re.compile(r"\.ds_store|\._.*|thumbs\.db|desktop\.ini")


def is_desktops(name: str) -> bool:
    """Whether a desktop keeps a file of that name: it belongs to no model, and says nothing of whose a folder is."""
    return bool(_DESKTOP.fullmatch(name.lower()))


def is_weights(name: str) -> bool:
    """Whether a file of that name holds weights, in any format, or belongs to such files."""
    return bool(_WEIGHTS.fullmatch(name.lower()) or _STATE.fullmatch(name))


def folded(name: str) -> str:
    """The same for names that a disk may take for one: those of macOS and Windows make no difference of case."""
    return unicodedata.normalize("NFC", name).casefold()


def is_one_file(a: Path, b: Path) -> bool:
    """Whether two paths whose names differ by case only lead to one file, as on a disk that makes no difference."""
    try:
        return a.samefile(b) and a not in a.parent.iterdir()
    except OSError:
        return False


def modules_of(folder: Path) -> tuple[str, ...]:
    """Subfolders whose weights are parts of the model and no copies of it, as `2_Dense`.

    Named by modules.json, or called as sentence-transformers calls them and with a config of their own.
    """
    try:
        listed = json.loads(read_regular(folder / MODULES))
    except (OSError, ValueError, RecursionError):
        listed = []
    entries = [x for x in listed if isinstance(x, dict)] if isinstance(listed, list) else []
    whole = {str(x.get("path")) for x in entries if str(x.get("type")).endswith(".Transformer")}  # a model itself
    named = {x["path"].strip("/") for x in entries if isinstance(x.get("path"), str)}
    called = {p.parent.name for p in folder.glob("[0-9]*/config.json") if re.fullmatch(r"\d+_\w+", p.parent.name)}
    return tuple(sorted((named | called) - whole - {"", "."}))


def stays_behind(folder: Path, relative: Path, modules: tuple[str, ...]) -> bool:
    """Whether the file `relative` to a source's `folder` must not go with its output."""
    place, inside = relative.as_posix(), relative.parent
    if any(_FOLDERS.fullmatch(part) for part in inside.parts):
        return True
    if any(place.startswith(f"{module}/") for module in modules):
        return False
    if relative.name == ADAPTER or relative.stem == "adapter_model":
        # At the top, transformers would load the adapter and its base in the model's place. A subfolder's is asked for
        # by name (as Phi-4-multimodal's vision-lora), and is no copy of the weights.
        return len(relative.parts) == 1 or not (folder / inside / ADAPTER).is_file()
    return is_weights(relative.name)


# What transformers opens beside the weights, by the names that it knows.
_OPENED = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece"
    r"|sentencepiece|tekken|processor|preprocessor).*|.*\.(model|index\.json|py)"
)


def is_opened(name: str) -> bool:
    """Whether transformers opens a file of that name beside the weights."""
    return bool(_OPENED.fullmatch(name.lower()))


def require_small_files(folder: Path) -> None:
    """Raises CheckpointError where transformers, asked to open a folder, would wait for ever or read without end."""
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if not is_opened(path.name) or path.is_dir():
            continue
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
            if size > LARGEST_FILE:
                raise OSError(errno.EFBIG, f"it has {size} bytes, expected at most {LARGEST_FILE}")
        except FileNotFoundError:  # a link that leads nowhere: nobody waits for it
            continue
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}; download it again, or remove it") from error


def foreign_links(folder: Path) -> list[Path]:
    """What transformers opens beside the weights and is a link to another place: without it a copy does not load."""
    opened = (path for path in sorted(folder.iterdir()) if is_opened(path.name))
    return [path for path in opened if path.is_symlink() and not path.is_dir() and own_file(folder, path) is None]


def own_file(folder: Path, path: Path) -> Path | None:
    """The regular file, and no link, behind the `path` inside a source's `folder`, if it is the source's own.

    None for what is no regular file, and for a link, or a path through one, to anywhere but the blobs of the Hub's
    cache, models--OWNER--NAME/blobs. A blob may be a link itself, into the store that newer caches share.
    """
    try:
        place, target = path.parent.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or round and round
        return None
    folder = folder.resolve()
    if not target.is_file() or not (place == folder or folder in place.parents):
        return None
    if target == place / path.name:
        return target
    snapshots = next(
        (p for p in folder.parents if p.name == "snapshots"), None
    )  # a model may be a folder of its repository
    if snapshots is None or not snapshots.parent.name.startswith("models--"):
        return None
    model = snapshots.parent
    blobs = (model / "blobs").resolve()
    blob = Path(os.path.normpath(place / path.readlink()))
    if blob.parent.resolve() != blobs:
        return None
    store = (model.parent / "blobs").resolve()  # <cache>/blobs/<2 hex>/<xet hash>
    return target if target.parent == blobs or target.parent.parent == store else None


def read_own(folder: Path, name: str) -> bytes | None:
    """The bytes of a source's own small file; None where it has none of that name, or a link in its place."""
    file = own_file(folder, folder / name)
    return None if file is None else read_regular(file, follow=False)
