"""FP8 with block scales: read, reduced and written back, or as bfloat16; packed formats refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory
from helpers import snapshot, tensors_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.quantised import dequantise, quantise, rounding
from laser.checkpoint.reader import INDEX, open_checkpoint
from laser.errors import CheckpointError, UsageError
from laser.pipeline import reduce, scan
from laser.plan import make_plan
from laser.selection import Selection
from laser.verification import verify

BLOCK = (16, 16)
SELECTED = Selection(layers=(1,), roles=("w2", "q", "k"))
CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3"}}


def is_reducible(name: str) -> bool:
    return "self_attn" in name or "experts" in name


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """pico with its attention and experts in FP8, blocks of 16 x 16: some of them cut off at the edge (48 x 32)."""
    tensors: dict[str, torch.Tensor] = {}
    for name, W in mixtral_tensors().items():
        if is_reducible(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(W, torch.float32, BLOCK)
        else:
            tensors[name] = W
    return write_checkpoint_directory(tmp_path / "fp8", tensors, mixtral_config() | CONFIG)


def slow_quantise(W: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Block after block, element after element, by the list of all 253 finite values of e4m3."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = np.unique(codes[torch.isfinite(codes)].numpy())
    m, n = W.shape
    q, scales = torch.empty(m, n), torch.empty(math.ceil(m / block[0]), math.ceil(n / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            amax = float(W[part].abs().max())
            scales[i, j] = amax / 448 if amax else 1.0
            for r, c in np.ndindex(*W[part].shape):
                x = float(W[part][r, c] / scales[i, j])
                q[part][r, c] = float(values[np.argmin(np.abs(values - x))])
    return q, scales


@pytest.mark.parametrize("shape", [(32, 32), (40, 24), (3, 50), (16, 1)])
def test_quantise_against_a_slow_loop(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    W = torch.randn(*shape, generator=generator) * torch.logspace(-6, 2, shape[0])[:, None]
    W[: min(16, shape[0]), : min(16, shape[1])] = 0  # a block of zeros
    q, scale = quantise(W, torch.float32, BLOCK)
    slow_q, slow_scale = slow_quantise(W, BLOCK)
    assert q.dtype == torch.float8_e4m3fn and torch.equal(scale, slow_scale)
    back, slow = dequantise(q, scale, BLOCK), torch.empty(shape)
    for r, c in np.ndindex(*shape):
        slow[r, c] = slow_q[r, c] * slow_scale[r // 16, c // 16]
    half = rounding(back, scale, BLOCK)
    assert ((back - W).abs() <= half * (1 + 1e-6)).all()
    assert ((slow - W).abs() <= half * (1 + 1e-6)).all()
    different = q.float() != slow_q  # only where two values are equally near
    assert torch.allclose((back - W).abs()[different], (slow - W).abs()[different], rtol=1e-4)
    again_q, again_scale = quantise(back, torch.float32, BLOCK)
    assert torch.equal(dequantise(again_q, again_scale, BLOCK), back)  # nothing is lost twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_kinds(dtype: torch.dtype) -> None:
    W = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    q, scale = quantise(W, dtype, BLOCK, powers_of_two=True)
    assert scale.dtype == dtype and torch.equal(torch.log2(scale.float()), torch.log2(scale.float()).round())
    q, scale = quantise(W, dtype, BLOCK)
    back = dequantise(q, scale, BLOCK)
    # A scale rounded down to bf16 makes the largest values saturate, by less than half their own unit.
    assert ((back - W).abs() <= rounding(back, scale, BLOCK) * (1 + 1e-6)).all()


def test_transformers_reads_it_the_same(fp8: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    checkpoint, theirs = open_checkpoint(fp8), Fp8Dequantize(None)
    assert checkpoint.fp8 is not None
    for weight, scale in checkpoint.fp8.scales.items():
        wanted = theirs._dequantize_one(checkpoint.raw(weight), checkpoint.raw(scale), torch.float32)
        assert torch.equal(checkpoint.read(weight), wanted)


def test_scan_measures_the_dequantised_matrices(fp8: Path) -> None:
    checkpoint = open_checkpoint(fp8)
    spectra = scan(checkpoint, SELECTED)
    assert len(spectra.values) == 2 + 4
    for name, s in spectra.values.items():
        W = checkpoint.read(name).double().numpy()
        assert s == pytest.approx(np.linalg.svd(W, compute_uv=False), rel=1e-6, abs=1e-6 * s[0])
    assert {m.role for m in list_matrices(checkpoint) if m.name.endswith("_scale_inv")} == {"scale"}


@pytest.mark.slow
def test_written_back_as_fp8(fp8: Path, tmp_path: Path) -> None:
    source, out = open_checkpoint(fp8), tmp_path / "out"
    outcome = reduce(source, make_plan(scan(source, SELECTED), "rank:4"), out)
    result = open_checkpoint(out)
    assert [s.header for s in result.shards] == [s.header for s in source.shards]
    assert (out / "config.json").read_bytes() == (fp8 / "config.json").read_bytes()
    assert result.fp8 is not None and not any(name.endswith("_scale_inv") for name in outcome.matrices)
    new_scales = {result.fp8.scales[name] for name in outcome.matrices}
    for name in source.tensors:
        if name in outcome.matrices:
            U, s, Vh = torch.linalg.svd(source.read(name).double(), full_matrices=False)
            wanted = (U[:, :4] * s[:4] @ Vh[:4]).float()
            half = rounding(result.read(name), result.raw(result.fp8.scales[name]), BLOCK)
            assert ((result.read(name) - wanted).abs() <= half * (1 + 1e-4) + 1e-7).all()
        elif name not in new_scales:
            assert torch.equal(result.raw(name).view(torch.uint8), source.raw(name).view(torch.uint8))
    found = verify(source, out)
    assert not found.problems and found.touched == 12


@pytest.mark.slow
def test_written_as_bfloat16(fp8: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    source, out = open_checkpoint(fp8), tmp_path / "out"
    plan = make_plan(scan(source, SELECTED), "rank:4")
    plan.save(tmp_path / "plan.json")
    assert run("reduce", fp8, tmp_path / "plan.json", "-o", out, "--output-dtype", "bfloat16")[0] == 0
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    index = json.loads((out / INDEX).read_text())
    tensors = tensors_in(out)
    assert index["weight_map"].keys() == tensors.keys() == mixtral_tensors().keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        if name in plan.reductions:
            U, s, Vh = torch.linalg.svd(source.read(name).double(), full_matrices=False)
            assert torch.allclose(tensor.double(), U[:, :4] * s[:4] @ Vh[:4], rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(tensor, source.read(name).to(torch.bfloat16))
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    code, printed, _ = run("verify", fp8, out)
    assert code == 0 and "0 problems" in printed
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.tensor([[1, 5, 7]])).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_killed_and_resumed_is_the_same_to_the_byte(fp8: Path, tmp_path: Path, dtype: str | None) -> None:
    source = open_checkpoint(fp8)
    plan = make_plan(scan(source, SELECTED), "rank:4")
    reduce(source, plan, tmp_path / "whole", dtype=dtype)
    left = 0

    def killed(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    for survived in (0, 1, 2):
        left = survived
        with pytest.raises(KeyboardInterrupt):
            reduce(source, plan, tmp_path / "out", dtype=dtype, resume=True, tick=killed)
        assert not (tmp_path / "out" / INDEX).exists()
    reduce(source, plan, tmp_path / "out", dtype=dtype, resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.slow
def test_run_writes_both_weights_and_scales(fp8: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    code, _, err = run("run", fp8, "-o", tmp_path / "out", "--no-search", "--rule", "rank:4", "--layers", "1")
    assert code == 0, err
    code, printed, _ = run("verify", fp8, tmp_path / "out")
    assert code == 0 and "0 problems" in printed


@pytest.mark.slow
def test_weights_and_scales_in_different_shards(fp8: Path, tmp_path: Path) -> None:
    tensors = tensors_in(fp8)
    ordered = dict(sorted(tensors.items(), key=lambda item: item[0].endswith("_scale_inv")))
    path = write_checkpoint_directory(tmp_path / "apart", ordered, mixtral_config() | CONFIG)
    source, together = open_checkpoint(path), open_checkpoint(fp8)
    reduce(source, make_plan(scan(source, SELECTED), "rank:4"), tmp_path / "out")
    reduce(together, make_plan(scan(together, SELECTED), "rank:4"), tmp_path / "wanted")
    made, wanted = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "wanted")
    assert all(torch.equal(made.raw(n).view(torch.uint8), wanted.raw(n).view(torch.uint8)) for n in source.tensors)


def test_dtype_is_for_quantised_sources(pico: Path, tmp_path: Path, fp8: Path) -> None:
    source = open_checkpoint(pico)
    plan = make_plan(scan(source, SELECTED), "rank:4")
    with pytest.raises(UsageError, match="is not quantised, and its dtype is kept; try without --output-dtype"):
        reduce(source, plan, tmp_path / "out", dtype="bfloat16")
    source = open_checkpoint(fp8)
    with pytest.raises(UsageError, match="no reduction is written as 'float16'; try --output-dtype bfloat16"):
        reduce(source, make_plan(scan(source, SELECTED), "rank:4"), tmp_path / "out", dtype="float16")


Q = "model.layers.0.self_attn.q_proj"
PACKED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, {f"{Q}.qweight": torch.zeros(4, 32, dtype=torch.int32)}),
    "AWQ": ({"quant_method": "awq", "bits": 4}, {f"{Q}.qzeros": torch.zeros(4, 4, dtype=torch.int32)}),
    "GPTQ or AWQ": ({}, {f"{Q}.qweight": torch.zeros(4, 32, dtype=torch.int32)}),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {f"{Q}.weight.absmax": torch.ones(8)}),
    "MXFP4": (
        {"quant_method": "mxfp4"},
        {
            "model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
            "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(2, 4, 1, dtype=torch.uint8),
        },
    ),
    "hqq": ({"quant_method": "hqq"}, {f"{Q}.W_q": torch.zeros(16, 32, dtype=torch.uint8)}),
    "eetq": ({"quant_method": "eetq"}, {f"{Q}.weight": torch.zeros(32, 32, dtype=torch.int8)}),
    "MLX": (
        {"group_size": 32, "bits": 4},
        {f"{Q}.weight": torch.zeros(32, 4, dtype=torch.uint32), f"{Q}.scales": torch.ones(32, 1)},
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_formats_are_refused_with_advice(make_pico: Callable[..., Path], kind: str, run: Any) -> None:
    config, tensors = PACKED[kind]
    path = make_pico(
        shards=1, tensors=mixtral_tensors() | tensors, **({"quantization_config": config} if config else {})
    )
    code, _, err = run("scan", path, "--dry-run")
    assert code == 1 and f"other holds {kind} weights" in err and "start from the unquantised model" in err


def test_fp8_whose_scales_do_not_fit_is_refused(fp8: Path) -> None:
    shard = sorted(fp8.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    scale = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file(tensors | {scale: torch.ones(7, 7)}, shard)
    with pytest.raises(CheckpointError, match=rf"{scale} is F32 \[7, 7\], expected F32"):
        open_checkpoint(fp8)
    tensors.pop(scale)
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match="does not hold it"):
        open_checkpoint(fp8)
    index = json.loads((fp8 / INDEX).read_text())
    del index["weight_map"][scale]
    (fp8 / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is F8_E4M3 without a scale per block"):
        open_checkpoint(fp8)


ONE = f"{Q}.weight"
STORED = {"int8": torch.int8, "int32": torch.int32, "fp8": torch.float8_e4m3fn}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", STORED)
def test_one_matrix_without_a_spectrum_is_skipped_in_every_verb(
    make_pico: Callable[..., Path], tmp_path: Path, run: Callable[..., Any], dtype: str
) -> None:
    tensors = mixtral_tensors()
    tensors[ONE] = torch.ones(tensors[ONE].shape).to(STORED[dtype])
    path = make_pico(shards=1, tensors=tensors)
    told = f"{ONE}: skipped: stored as "
    code, out, err = run("scan", path, "--roles", "q", "--dry-run")
    assert code == 0 and told in out and "2 matrices on" in out, err
    document = json.loads(run("scan", path, "--roles", "q", "--dry-run", "--json")[1])
    assert ONE in document["skipped"] and ONE not in document["names"]
    for _ in range(2):  # the second finds the spectra of the first
        code, out, err = run("scan", path, "-o", tmp_path / "s", "--roles", "q", "--force")
        assert code == 0 and told in out and "2 matrices in" in out, err
    code, out, err = run("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", "rank:4")
    assert code == 0 and told in out and "2 to reduce" in out and "1 skipped" in out, err
    assert run("reduce", path, tmp_path / "p", "-o", tmp_path / "out")[0] == 0
    code, out, err = run("run", path, "-o", tmp_path / "run", "--no-search", "--rule", "rank:4", "--roles", "q")
    assert code == 0 and told in out, err
    for made in ("out", "run"):
        assert run("verify", path, tmp_path / made)[0] == 0
        after = load_file(tmp_path / made / "model.safetensors")
        assert torch.equal(after[ONE].view(torch.uint8), tensors[ONE].view(torch.uint8))
    # Alone, it is what stops each of them, and not a matter of layers and roles.
    only = ("--include", r"layers\.0\.self_attn\.q_proj")
    for words in (("scan", path, "--dry-run"), ("plan", tmp_path / "s", "-o", tmp_path / "p2", "--rule", "rank:4")):
        code, _, err = run(*words, *only)
        assert code == 2 and f"no selected matrix has a spectrum: {told[:-12]}" in err.replace(
            " is skipped", ": skipped"
        )


def test_where_nothing_has_a_spectrum_the_reason_is_told(make_pico: Callable[..., Path], run: Any) -> None:
    """As of FP8 with scales under names that nobody knows: it is not that roles are kept unless asked for."""
    plain = mixtral_tensors()
    tensors = {name: x.to(torch.float8_e4m3fn) if "layers" in name else x for name, x in plain.items()}
    tensors |= {f"{name}_factor": torch.ones(()) for name in plain if "layers" in name}
    code, _, err = run("scan", make_pico(shards=1, tensors=tensors), "--dry-run")
    assert code == 2 and "no selected matrix has a spectrum" in err and "found no scales" in err


def test_a_plan_of_skipped_matrices_says_why(make_pico: Callable[..., Path], tmp_path: Path) -> None:
    tensors = mixtral_tensors()
    tensors[ONE][0, 0] = math.nan
    spectra = scan(open_checkpoint(make_pico(shards=1, tensors=tensors)), Selection(layers=(0,), roles=("q",)))
    with pytest.raises(UsageError, match=r"no selected matrix has a spectrum: .*q_proj.weight is skipped: not finite"):
        make_plan(spectra, "rank:4", Selection(layers=(0,), roles=("q",)))


def test_spectra_know_which_fp8_has_scales(fp8: Path, tmp_path: Path) -> None:
    spectra = scan(open_checkpoint(fp8), SELECTED)
    spectra.save(tmp_path / "s")
    loaded = spectra.load(tmp_path / "s")
    assert loaded.matrices == tuple(replace(m, part=None) for m in spectra.matrices)
    assert any(m.dtype == "F8_E4M3" and m.scaled for m in loaded.matrices)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "mxfp4", "modules_to_not_convert": []},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
    ids=lambda c: str(next(iter(c.values()))),
)
def test_a_leftover_quantization_config_is_said_and_passed_by(
    make_pico: Callable[..., Path], tmp_path: Path, run: Callable[..., Any], config: dict[str, Any]
) -> None:
    path = make_pico(shards=1, tensors=mixtral_tensors(), quantization_config=config)
    assert open_checkpoint(path).fp8 is None
    code, out, err = run("run", path, "-o", tmp_path / "out", "--no-search", "--rule", "rank:4", "--roles", "q")
    assert code == 0 and "3 to reduce" in out
    assert err.count("config.json says that the weights are quantised") == 1 and "remove its quantization_config" in err
    assert run("verify", path, tmp_path / "out")[0] == 0


def test_scales_without_a_config_can_be_written_as_bfloat16(fp8: Path, tmp_path: Path) -> None:
    config = {k: v for k, v in json.loads((fp8 / "config.json").read_text()).items() if k != "quantization_config"}
    (fp8 / "config.json").write_text(json.dumps(config))
    sizes = {n: t for f in sorted(fp8.glob("*.safetensors")) for n, t in load_file(f).items()}
    whole = {n: torch.ones(1, 1) if n.endswith("_scale_inv") else t for n, t in sizes.items()}  # blocks of 128
    for file in sorted(fp8.glob("*.safetensors")):
        save_file({n: whole[n] for n in load_file(file)}, file, {"format": "pt"})
    source = open_checkpoint(fp8)
    assert source.fp8 is not None
    reduce(source, make_plan(scan(source, SELECTED), "rank:4"), tmp_path / "out", dtype="bfloat16")
    assert open_checkpoint(tmp_path / "out").fp8 is None


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_a_leftover_config_beside_a_mask_or_one_odd_matrix(
    make_pico: Callable[..., Path], run: Callable[..., Any], method: str
) -> None:
    """Masks of GPT-2 are bytes; one matrix without scales is skipped whatever config.json says of it."""
    tensors = mixtral_tensors() | {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    tensors[ONE] = tensors[ONE].to(torch.float8_e4m3fn)
    path = make_pico(shards=1, tensors=tensors, quantization_config={"quant_method": method, "bits": 4})
    code, out, err = run("scan", path, "--roles", "q", "--dry-run")
    assert code == 0 and f"{ONE}: skipped: stored as F8_E4M3" in out, err


def test_a_leftover_config_of_the_text_model_is_said_too(make_pico: Callable[..., Path], run: Any) -> None:
    """transformers looks for it there as well."""
    told = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path = make_pico(shards=1, tensors=mixtral_tensors(), text_config=told)
    assert "weights are quantised (GPTQ)" in run("scan", path, "--roles", "q", "--dry-run")[2]


@pytest.mark.parametrize("config", [{"quant_method": "awq", "bits": 4}, {"load_in_4bit": True}], ids=["awq", "bnb"])
def test_a_leftover_config_leaves_the_measured_losses_alone(
    make_pico: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    from laser.evaluation.evaluate import load_whole

    tokens = torch.arange(3, 40)[None]
    plain, left = (
        load_whole(open_checkpoint(make_pico(name, shards=1, **more)), "float32")
        for name, more in (("plain", {}), ("left", {"quantization_config": config}))
    )
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, left(tokens).logits)
