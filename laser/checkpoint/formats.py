"""What people bring that is no checkpoint of the Hub's format, and what makes one of it.

Recognised by the names of files alone, plus the adapter's own config; nothing is opened that could be large. A row of
the table per format; the first that matches is named.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser.checkpoint.side_files import ADAPTER
from laser.files import open_regular, read_regular

GGUF = b"GGUF"  # how such a file begins
LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins, in place of the file itself
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.\w+)")
# Weights by the names that transformers looks for.
WHOLE_FILES = re.compile(r"(model\.safetensors|pytorch_model\.bin)(\.index\.json)?")
# Pickles that are no model: a trainer's state, an adapter, a part of a whole, or a variant of one.
NO_MODEL = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*|model_optim_rng|distrib_optim)\.(bin|pt|pth)"
    r"|(adapter_model|pytorch_lora_weights|mm_projector|ggml-.*|params_shard_\d+|openvino_.*)\.bin"
    r"|consolidated\.\d+\.pth?|.*_(model|optim)_states\.pt|hf_model_\d+.*\.pt|lit_model\.pth|pytorch_model\.[a-z]\w*(-\d+-of-\d+)?\.bin"
)
DEEPEST_FOLDER = 3  # folders that are looked into
MOST_FILES = 20_000  # files that are looked at
TIDY_FILES = "config.json and model.safetensors"
# Prompts and the like are no change of the weights: nothing can be merged.
UNMERGED = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA")
CONVERT = "try `laser convert {at} -o {out}`, and give {out}"
ORIGINAL = "start from the PyTorch or safetensors model that it was made from"
COPY = "copy config.json and the tokenizer's files beside the result"
RESAVE = "from transformers import AutoModelForCausalLM as M; M.from_pretrained({path!r}, HOW).save_pretrained({out!r})"


@dataclass(frozen=True)
class Format:
    """One format that people bring: how it is recognised, and what to do about it.

    pattern: of a file's path inside the folder
    what: of what it is a sign
    remedy: what to do

    A remedy may name:

    {path}, {name}     the folder, and its name
    {at}, {parent}     the file, and its folder
    {below}, {base}    that group of the pattern, and the folder above it
    {out}              a new directory
    {python}           the command that runs `python`, a template of code
    """

    pattern: str
    what: str
    remedy: str
    python: str = ""


FORMATS = (
    Format(
        r"laser/journal\.jsonl",
        "an unfinished output of laser",
        "repeat the command that makes it, with --resume",
    ),
    Format(
        r".*\.(incomplete|partial|crdownload|aria2)",
        "a download or an output that is not finished",
        "finish it: repeat the command that makes it",
    ),
    Format(
        r"(.*/)?adapters\.(safetensors|npz)",
        "an adapter of MLX",
        "merge it: try `mlx_lm.fuse --model BASE --adapter-path {parent} --save-path {out}`, and give {out}",
    ),
    Format(
        r"adapter_model\.(safetensors|bin)",
        "an adapter without its adapter_config.json",
        "finish the download, merge it into its base with peft, and give the result",
    ),
    Format(
        r"pytorch_lora_weights\.(safetensors|bin)",
        "a LoRA of diffusers",
        "give a language model: this is one for images",
    ),
    Format(
        r"layer_\d+-model_\d+-model_states\.pt|(.*/)?(?P<below>global_step\d+)/layer_\d+-model_\d+-model_states\.pt",
        "a checkpoint of GPT-NeoX",
        "convert it with tools/ckpts/convert_neox_to_hf.py of GPT-NeoX, and give the result",
    ),
    Format(
        r"(.*/)?(?P<below>[^/]+)/((bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt",
        "a training state of DeepSpeed",
        "try `python -m deepspeed.utils.zero_to_fp32 {base} {out} -t {below} --safe_serialization`, "
        f"{COPY}, and give {{out}}",
    ),
    Format(
        r"((bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt",
        "a training state of DeepSpeed",
        "try `python -m deepspeed.utils.zero_to_fp32 {path}/.. {out} -t {name} --safe_serialization`, "
        f"{COPY}, and give {{out}}",
    ),
    Format(
        r"(.*/)?(mp_rank_\d+(_\d+)*/(model_optim_rng|distrib_optim|model_rng)\.pt|latest_checkpointed_iteration\.txt)"
        r"|(model_optim_rng|distrib_optim)\.pt",
        "a training state of Megatron-LM",
        "convert it with the export of Megatron Bridge or tools/checkpoint/convert.py of Megatron-LM, and give the "
        "result",
    ),
    Format(
        r"(.*/)?lit_model\.pth",
        "a checkpoint of LitGPT",
        "convert it with `litgpt convert_from_litgpt {parent} {out}` and its guide to the Hub's format, and give that",
    ),
    Format(
        r"(original/)?consolidated\.\d+\.pth?",
        "weights in Meta's own format",
        "take the Hub's version of this model, or give the folder with params.json and these files alone to laser "
        "convert",
    ),
    Format(
        r".*\.nemo|(.*/)?model_config\.yaml",
        "a model of NeMo 1",
        "convert it with NeMo's scripts/checkpoint_converters/convert_MODEL_nemo_to_hf.py, and give the result",
    ),
    Format(
        r"(.*/)?(?P<below>context)/(model|io)\.(yaml|json)",
        "a model of NeMo 2",
        "try `nemo llm export path={base} target=hf output_path={out}`, and give {out}",
    ),
    Format(
        r"(?!.*optim)(.*/)?__\d+_\d+\.distcp",
        "a sharded state of PyTorch's distributed checkpoints (FSDP)",
        f"try `accelerate merge-weights {{parent}} {{out}}`, {COPY}, and give {{out}}",
    ),
    Format(
        r"model-rank-\d+-part-\d+\.safetensors",
        "a sharded state of vLLM, cut among GPUs",
        "give the model that vLLM saved it from",
    ),
    Format(
        r"(.*/)?rank\d+\.(engine|safetensors)|.*\.(engine|trt)",
        "a build of TensorRT",
        ORIGINAL,
    ),
    Format(
        r"(.*/)?hf_model_\d+(_\d+)?\.(pt|safetensors)",
        "a checkpoint of torchtune without its index",
        "write it again with torchtune's FullModelHFCheckpointer and safe_serialization, which adds the index",
    ),
    Format(
        r"(.*/)?ep\d+-ba\d+(-rank\d+)?\.pt",
        "a training state of Composer",
        "convert it with scripts/inference/convert_composer_to_hf.py of llm-foundry, and give the result",
    ),
    Format(r"(?:.*/)?(?!mmproj)[^/]*\.gguf", "a GGUF file", CONVERT),
    Format(
        r".*\.gguf[._-].*",
        "a GGUF file in pieces or packed",
        "join or unpack it (`cat PIECES > model.gguf`), and try `laser convert model.gguf -o {out}`",
    ),
    Format(r"(?:.*/)?ggml-[^/]*\.bin|.*\.(ggml|llamafile)|.*\.ggmlv\d.*", "a file of llama.cpp before GGUF", ORIGINAL),
    Format(
        r"(?:model|pytorch_model)\.(?P<variant>[a-z]\w*)(-\d+-of-\d+)?\.(safetensors|bin)",
        "a variant only, which is not loaded unless it is asked for",
        f"try `{{python}}`, {COPY}, and give {{out}}",
        RESAVE.replace("HOW", "variant={variant!r}, dtype='auto'"),
    ),
    Format(
        r"(?:.*/)?tf_model(-\d+-of-\d+)?\.h5",
        "weights of TensorFlow",
        f"with transformers before 5 and TensorFlow, try `{{python}}`, {COPY}, and give {{out}}",
        RESAVE.replace("HOW", "from_tf=True"),
    ),
    Format(
        r"(?:.*/)?flax_model(-\d+-of-\d+)?\.msgpack",
        "weights of Flax",
        f"with transformers before 5 and Flax, try `{{python}}`, {COPY}, and give {{out}}",
        RESAVE.replace("HOW", "from_flax=True"),
    ),
    Format(
        r"(?:.*/)?[^/]*\.weights\.h5|.*\.keras",
        "weights of Keras",
        "load it with keras_hub, write it with `export_to_transformers`, and give the result",
    ),
    Format(
        r"(.*/)?([^/]*\.ckpt[^/]*\.(index|meta|data-.*)|saved_model\.pb|variables/.*)",
        "a checkpoint of TensorFlow",
        ORIGINAL + ", or convert it with the script of its family in transformers before 5",
    ),
    Format(
        r"(.*/)?(_METADATA|_CHECKPOINT_METADATA|ocdbt\.process_\d+/.*|manifest\.ocdbt)",
        "a checkpoint of JAX (Orbax)",
        "export it with the library that wrote it, as MaxText's to_huggingface, and give the result",
    ),
    Format(r"(?:.*/)?[^/]*\.onnx([._]data)?", "an export to ONNX", ORIGINAL),
    Format(r"(?:.*/)?openvino_[^/]*\.(xml|bin)", "an export to OpenVINO", ORIGINAL),
    Format(r".*\.(mlmodel|mlpackage/.*|mlmodelc/.*)", "an export to Core ML", ORIGINAL),
    Format(r".*\.(tflite|task|litertlm|pte|ptl)", "an export for phones", ORIGINAL),
    Format(r"(.*/)?(mlc-chat-config\.json|ndarray-cache\.json|params_shard_\d+\.bin)", "a build of MLC", ORIGINAL),
    Format(r"rust_model\.ot", "weights for Rust", ORIGINAL),
    Format(r".*\.(pdparams|pdmodel)", "weights of PaddlePaddle", ORIGINAL),
    Format(r"(.*/)?weights(\.\d+)?\.npz", "weights of MLX in NumPy's format", ORIGINAL),
    Format(r".*\.(npz|npy)", "weights in NumPy's format", ORIGINAL),
    Format(
        r".*\.ckpt",
        "a training state of Lightning",
        "load it with the code that trained it, save its model with save_pretrained, and give that",
    ),
    Format(
        r"model_index\.json|(.*/)?diffusion_pytorch_model.*",
        "a pipeline of diffusers",
        "give the subfolder of a language model, as text_encoder",
    ),
    Format(r".*\.(tar|tgz|zip|7z|rar)|.*\.tar\.\w+", "an archive", "unpack it, and give the folder inside"),
    Format(
        r".*\.(safetensors|bin|pth?)\.(gz|bz2|xz|zst|lz4)",
        "weights that are packed",
        "unpack them: `gunzip {at}` or the like",
    ),
    Format(r".*\.(pkl|pickle|joblib)", "a pickle, which may run any code", ORIGINAL),
)  # fmt: skip
FORMAT_ROWS = tuple((row, re.compile(row.pattern)) for row in FORMATS)


def what_lies_in(folder: Path) -> str | None:
    """What a folder without config.json or without weights is, and what to do; None where nothing is recognised."""
    return _recognise(folder, _file_names(folder), lambda name: read_regular(folder / name))


def what_lies_on_hub(repo: str, names: Sequence[str], read: Callable[[str], bytes]) -> str | None:
    """The same for a repository of these files, as it would lie in a local folder of its name."""
    folder = repo.rpartition("/")[2]
    stated = _recognise(Path(folder), names, read)
    return stated and f"{repo} on the Hub, after `hf download {repo} --local-dir {folder}`: {stated}"


def _recognise(folder: Path, names: Sequence[str], read: Callable[[str], bytes]) -> str | None:
    top = {name for name in names if "/" not in name}
    if ADAPTER in top and not {"adapters.safetensors", "adapters.npz"} & top:
        return _adapter(folder, "", read)
    if any(WHOLE_FILES.fullmatch(name) for name in top):
        return None  # weights by their right names: what is wrong is in the files
    return (
        _inside(folder, names, read) or _incomplete(folder, top) or _by_table(folder, names) or _misnamed(folder, top)
    )


def what_is(file: Path) -> str:
    """What a file is that was given in place of a checkpoint directory, and what to do."""
    found = _by_name(file)
    return found or f"{file} is a file, expected a checkpoint directory; try {shlex.quote(str(file.parent))}"


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its name or its first bytes (Ollama's blobs have no name)."""
    return path.is_file() and (path.suffix.lower() == ".gguf" or begins_with(path, GGUF))


def pointer(path: Path) -> str | None:
    """What a file is that Git LFS has left in place of the real one; None for any other."""
    if not begins_with(path, LFS):
        return None
    return f"{path.name} is a pointer of Git LFS and not the file itself; run `git lfs pull` in {path.parent}"


def begins_with(path: Path, magic: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _file_names(folder: Path) -> list[str]:
    """Paths of files inside, those of the folder itself first."""
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and len(inside.parts) < DEEPEST_FOLDER)
        names += sorted((inside / file).as_posix() for file in files)
        if len(names) > MOST_FILES:
            break
    return names


def _adapter(folder: Path, place: str, read: Callable[[str], bytes]) -> str:
    """An adapter in the subfolder `place`: its kind, its base, and how to merge the two."""
    try:
        config = json.loads(read(f"{place}/{ADAPTER}" if place else ADAPTER))
    except (OSError, ValueError, RecursionError):
        config = None
    folder = folder / place
    config = config if isinstance(config, dict) else {}
    kind, base = _word_of(config.get("peft_type")), _word_of(config.get("base_model_name_or_path"))
    what = f"{folder} is a PEFT adapter{f' ({kind})' if kind else ''} of {base or 'a base that it does not name'}"
    if kind in UNMERGED:
        return f"{what}, which adds to the input and changes no weights; give the base itself: {base or 'see its card'}"
    base, out = base or "BASE", f"{folder}-merged"
    command = (
        f"import peft, transformers as t; b = {base!r}; m = t.AutoModelForCausalLM.from_pretrained(b, dtype='auto'); "
        f"peft.PeftModel.from_pretrained(m, {str(folder)!r}).merge_and_unload().save_pretrained({out!r}); "
        f"t.AutoTokenizer.from_pretrained(b).save_pretrained({out!r})"
    )
    return f"{what}, no model of its own; merge it: try `python -c {_quoted(command)}`, and give {out}"


def _word_of(value: Any) -> str:
    """A name from a stranger's file, on one line."""
    return "".join(c for c in value if c.isprintable())[:200] if isinstance(value, str) else ""


def _quoted(code: str) -> str:
    """Python for a shell, in double quotes where it can be: its own are single."""
    return shlex.quote(code) if re.search(r'["$`\\!]', code) else f'"{code}"'


def _inside(folder: Path, names: Sequence[str], read: Callable[[str], bytes]) -> str | None:
    """Checkpoints in subfolders: a trainer's last one, a Hub cache's snapshot, one of several models."""
    places = {name.rpartition("/")[0] for name in names if name.endswith(("/config.json", f"/{ADAPTER}"))}
    held = {
        place for place in places
        for name in names
        if name.startswith(f"{place}/")
        and (WHOLE_FILES.fullmatch(name[len(place) + 1 :]) or name == f"{place}/{ADAPTER}")
    }  # fmt: skip
    if not held:
        return None
    steps = {int(m[1]): place for place in held if (m := re.fullmatch(r"(?:.*/)?checkpoint-(\d+)", place))}
    first = steps[max(steps)] if steps else sorted(held)[0]
    what = "the output of a trainer" if steps else "no checkpoint itself"
    if f"{first}/config.json" not in names:  # an adapter, as checkpoint-500/
        return _adapter(folder, first, read)
    several = f"; there are {len(held) - 1} more" if len(held) > 1 else ""
    there = f"found {first}/config.json, expected {TIDY_FILES} at its top"
    return f"{folder} is {what}: {there}; try {folder / first}{several}"


def _incomplete(folder: Path, top: set[str]) -> str | None:
    """Shards without an index: which there are, and which are missing."""
    matches = [m for name in sorted(top) if (m := SHARD.fullmatch(name)) and m["end"] in (".safetensors", ".bin")]
    matches = [m for m in matches if re.fullmatch(r"model|pytorch_model", m["stem"])]
    if not matches:
        return None
    m, there = matches[0], {int(m["number"]) for m in matches if m["count"] == matches[0]["count"]}
    count, index = int(m["count"]), f"{m['stem']}{m['end']}.index.json"
    missing = [
        f"{m['stem']}-{n:05d}-of-{count:05d}{m['end']}" for n in range(1, min(count, 99999) + 1) if n not in there
    ]
    named = ", ".join(m[0] for m in matches[:4]) + (" ..." if len(matches) > 4 else "")
    lost = f"; {len(missing)} of {count} shards are missing too, as {missing[0]}" if missing else ""
    return f"{folder} holds {named} and no {index}{lost}; finish the download and try again"


def _by_table(folder: Path, names: Sequence[str]) -> str | None:
    for row, pattern in FORMAT_ROWS:
        for name in names:
            if match := pattern.fullmatch(name):
                remedy = _remedy(row, match, folder, folder / name, f"{folder}-hub")
                return f"{folder} holds {row.what}: found {name}, expected {TIDY_FILES}; {remedy}"
    return None


def _by_name(file: Path) -> str | None:
    """The same table for a single file."""
    if message := pointer(file):
        return message
    name = "model.gguf" if is_gguf(file) else file.name
    shard = SHARD.fullmatch(file.name)
    out = shard["stem"] if shard else file.stem if file.suffix else f"{file.name}-hub"
    for row, pattern in FORMAT_ROWS:
        if match := pattern.fullmatch(name):
            remedy = _remedy(row, match, file.parent, file, str(file.parent / out))
            return f"{file} is {row.what}, expected a checkpoint directory; {remedy}"
    return None


def _remedy(row: Format, match: re.Match[str], folder: Path, file: Path, out: str) -> str:
    groups = match.groupdict()
    base, below = file.parent, groups.get("below") or ""
    while below and base.name != below:
        base = base.parent
    base = base.parent if below else folder
    code = row.python.format(path=str(folder), out=out, variant=groups.get("variant"))
    places = {"path": folder, "name": folder.name, "at": file, "parent": file.parent, "base": base, "below": below}
    stated = {key: shlex.quote(str(place)) for key, place in (places | {"out": out}).items()}
    return row.remedy.format(**stated, python=f"python -c {_quoted(code)}")


def _misnamed(folder: Path, top: set[str]) -> str | None:
    """A single safetensors file under a name of its own."""
    files = sorted(name for name in top if name.endswith(".safetensors"))
    if len(files) != 1 or "config.json" not in top:
        return None
    at, right = (shlex.quote(str(folder / name)) for name in (files[0], "model.safetensors"))
    return (
        f"{folder} holds {files[0]}, which transformers does not look for, expected model.safetensors; if it is the "
        f"whole model, try `mv {at} {right}`"
    )
