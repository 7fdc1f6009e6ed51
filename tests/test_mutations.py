"""A tensor renamed, reshaped or of another type, at random: a right result or a clear error, never a silent skip."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mixtral_config, mixtral_tensors
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import laser
from laser.checkpoint.matrices import DoubtWarning
from laser.checkpoint.safetensors import BITS, TORCH
from laser.errors import LaserError

RANK = 4
TINY = mixtral_config() | {"num_hidden_layers": 1, "num_local_experts": 2}
LAYER0 = re.compile(r"model\.(embed|norm|layers\.0\.(?!.*experts\.[23]))|lm_head")
FUSED = {
    "model.layers.0.self_attn.qkv_proj.weight": (64, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_up_proj.weight": (96, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 48),
    "model.layers.0.input_layernorm.weight": (32,),
}
EXPERTS = {
    "model.layers.0.mlp.experts.gate_up_proj": (2, 32, 96),
    "model.layers.0.mlp.experts.down_proj": (2, 48, 32),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (2, 96),
    "model.layers.0.mlp.router.weight": (2, 32),
}


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


MODELS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "mixtral": (TINY, {name: t for name, t in mixtral_tensors().items() if LAYER0.match(name)}),
    "phi3": (TINY | {"model_type": "phi3"}, random_tensors(FUSED)),
    "gpt_oss": (TINY | {"model_type": "gpt_oss"}, random_tensors(EXPERTS)),
    "unheard_of": (TINY | {"model_type": "unheard_of"}, random_tensors(FUSED | EXPERTS)),
}
Header = dict[str, dict[str, Any]]


def rename(header: Header, name: str, data: st.DataObject) -> None:
    others = st.sampled_from([*header, *(n for _, tensors in MODELS.values() for n in tensors)])
    edits = st.sampled_from([name[:-1], name + ".x", name.replace("layers.0", "layers.1"), name.upper(), "", "w"])
    header[data.draw(others | edits | st.text(max_size=20), label="new name")] = header.pop(name)


def reshape(header: Header, name: str, data: st.DataObject) -> None:
    """Other numbers, or the same number of elements in another order or number of dimensions."""
    shape = header[name]["shape"]
    size = math.prod(shape)
    factor = data.draw(st.sampled_from([n for n in range(1, 97) if size % n == 0]), label="factor")
    same = st.sampled_from([[size], [factor, size // factor], [1, factor, size // factor], shape[::-1], [*shape, 1]])
    header[name]["shape"] = data.draw(same | st.lists(st.integers(-1, 99), max_size=4), label="new shape")


def retype(header: Header, name: str, data: st.DataObject) -> None:
    """Another type, mostly of the same width, so that it passes the header's own arithmetic."""
    narrow = st.sampled_from([dtype for dtype, bits in BITS.items() if bits == 16])
    header[name]["dtype"] = data.draw(narrow | st.sampled_from([*BITS, "BF17", "", 7]), label="new dtype")


MUTATIONS: tuple[Callable[[Header, str, st.DataObject], None], ...] = (rename, reshape, retype)


def mutate(path: Path, data: st.DataObject) -> None:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    for _ in range(data.draw(st.integers(1, 2), label="mutations")):
        mutation = data.draw(st.sampled_from(MUTATIONS), label="mutation")
        mutation(header, data.draw(st.sampled_from(sorted(header)), label="tensor"), data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mutations")
    for model, (config, tensors) in MODELS.items():
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
    return {model: folder / model for model in MODELS}


@pytest.mark.slow
@settings(max_examples=120)
@given(model=st.sampled_from(sorted(MODELS)), data=st.data())
def test_a_mutated_model_is_right_or_refused(sources: dict[str, Path], model: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        shutil.copytree(sources[model], source)
        mutate(source / "model.safetensors", data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DoubtWarning)
                checkpoint = laser.open_checkpoint(source)
                plan = laser.make_plan(laser.scan(checkpoint), f"rank:{RANK}")
                laser.reduce(checkpoint, plan, out)
        except LaserError as error:
            event(f"refused: {type(error).__name__}")
            assert str(error) and not (out / "model.safetensors").exists()
            return
        event("written")
        check(model, source, out, plan)


def check(model: str, source: Path, out: Path, plan: laser.Plan) -> None:
    """Every stored number is in a line with its reason; what was reduced has its rank, what was not is as it was."""
    assert plan.coverage["unaccounted"] == 0
    assert all(line.why.text for line in plan.lines)
    raw, written = source.joinpath("model.safetensors").read_bytes(), out.joinpath("model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    assert written[:length] == raw[:length] and len(written) == len(raw)
    header = {name: entry for name, entry in json.loads(raw[8:length]).items() if name != "__metadata__"}
    assert sum(math.prod(entry["shape"]) for entry in header.values()) == sum(line.parameters for line in plan.lines)
    reduced = {line.name.partition("[")[0] for line in plan.lines if line.action == "reduce"}
    for name, entry in header.items():
        start, end = (length + offset for offset in entry["data_offsets"])
        if name not in reduced:
            assert raw[start:end] == written[start:end], name
            continue
        before, after = (
            torch.frombuffer(bytearray(text[start:end]), dtype=TORCH[entry["dtype"]]).view(entry["shape"]).double()
            for text in (raw, written)
        )
        for W, B in zip(logical(model, name, before), logical(model, name, after), strict=True):
            slow = torch.linalg.svd(W, full_matrices=False)
            best = (slow.U[:, :RANK] * slow.S[:RANK]) @ slow.Vh[:RANK]
            assert torch.linalg.norm(B - best) <= 0.01 * torch.linalg.norm(W), name


def logical(model: str, name: str, W: torch.Tensor) -> list[torch.Tensor]:
    """The matrices in a tensor of MODELS, by hand."""
    if model == "phi3" and name.endswith("qkv_proj.weight"):
        return list(W.split([32, 16, 16]))
    if model == "phi3" and name.endswith("gate_up_proj.weight"):
        return list(W.chunk(2))
    if model == "gpt_oss" and name.endswith("experts.gate_up_proj"):
        return [W[e][:, i::2] for e in range(len(W)) for i in range(2)]
    if model == "mixtral" and name.endswith("experts.gate_up_proj"):  # as transformers 5 may save it
        return [half for e in range(len(W)) for half in W[e].chunk(2)]
    return list(W) if W.dim() == 3 else [W]


def test_the_models_are_right_before_they_are_mutated(sources: dict[str, Path], tmp_path: Path) -> None:
    for model in MODELS.keys() - {"unheard_of"}:
        checkpoint = laser.open_checkpoint(sources[model])
        plan = laser.make_plan(laser.scan(checkpoint), f"rank:{RANK}")
        laser.reduce(checkpoint, plan, tmp_path / model)
        check(model, sources[model], tmp_path / model, plan)
        changed = load_file(tmp_path / model / "model.safetensors")
        assert any(not torch.equal(changed[name], t) for name, t in MODELS[model][1].items())
