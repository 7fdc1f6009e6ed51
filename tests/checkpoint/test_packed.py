"""Packed weights as the plain ones that they stand for: bit for bit, open to look at, closed to a reduction."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, mixtral_config, mixtral_tensors, write_checkpoint_directory
from pico_language import TEXT, make_model

from laser.checkpoint.packed import AWQ_ORDER, unpack_awq, unpack_gptq
from laser.checkpoint.reader import open_checkpoint
from laser.errors import CheckpointError, UsageError
from laser.evaluation.as_stored import as_stored

Q = "model.layers.0.self_attn.q_proj"
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which column each place of an int32 holds, as AutoAWQ packs them


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def packed_rows(q: torch.Tensor, bits: int) -> torch.Tensor:
    """q (n, m), whole numbers, along its rows into int32: number by number."""
    each = 32 // bits
    return torch.tensor(
        [[signed(sum(int(q[i + k, j]) << bits * k for k in range(each))) for j in range(q.shape[1])]
         for i in range(0, len(q), each)], dtype=torch.int32
    )  # fmt: skip


def packed_columns(q: torch.Tensor, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    each = 32 // bits
    order = places or tuple(range(each))
    return torch.tensor(
        [[signed(sum(int(row[j + order[k]]) << bits * k for k in range(each))) for j in range(0, len(row), each)]
         for row in q], dtype=torch.int32
    )  # fmt: skip


def numbers(m: int, n: int, groups: int, bits: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (n, m), zeros (groups, m) and scales (groups, m)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (n, m), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, m), generator=generator)
    return q, zeros, (torch.rand(groups, m, generator=generator) * 0.1 + 1e-3).half()


def by_hand(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: list[int]) -> torch.Tensor:
    """W (m, n), number by number, in the arithmetic of 16 bits."""
    n, m = q.shape
    rows = [
        [(scales[group[i], j] * (int(q[i, j]) - int(zeros[group[i], j]))).item() for i in range(n)] for j in range(m)
    ]
    return torch.tensor(rows, dtype=torch.float16)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form, offset", [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_is_what_it_says(bits: int, form: str, offset: int) -> None:
    m, n, groups = 32, 64, 4
    q, zeros, scales = numbers(m, n, groups, bits)
    group = torch.randperm(n, generator=torch.Generator().manual_seed(1)) % groups  # as act order leaves them
    parts = {"qweight": packed_rows(q, bits), "qzeros": packed_columns(zeros - offset, bits), "scales": scales}
    found = unpack_gptq({**parts, "g_idx": group.int()}, bits, offset)
    assert found.dtype == torch.float16 and torch.equal(found, by_hand(q, zeros, scales, group.tolist()))
    plain = unpack_gptq(parts, bits, offset)
    assert torch.equal(plain, by_hand(q, zeros, scales, [i * groups // n for i in range(n)]))
    with pytest.raises(ValueError, match="beyond 4"):
        unpack_gptq({**parts, "g_idx": torch.full((n,), 4, dtype=torch.int32)}, bits, offset)


def test_awq_is_what_it_says() -> None:
    m, n, groups = 32, 48, 3
    q, zeros, scales = numbers(m, n, groups, 4)
    parts = {"qweight": packed_columns(q, 4, AWQ_PLACES), "qzeros": packed_columns(zeros, 4, AWQ_PLACES)}
    found = unpack_awq({**parts, "scales": scales})
    assert torch.equal(found, by_hand(q, zeros, scales, [i * groups // n for i in range(n)]))
    assert [AWQ_PLACES.index(i) for i in range(8)] == list(AWQ_ORDER)


def written(path: Path, kind: str, spoil: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> Path:
    """A pico Mixtral whose first q is packed."""
    (m, n), tensors = mixtral_tensors()[f"{Q}.weight"].shape, mixtral_tensors()
    del tensors[f"{Q}.weight"]
    q, zeros, scales = numbers(m, n, 2, 4)
    if kind == "gptq":
        tensors |= {f"{Q}.qweight": packed_rows(q, 4), f"{Q}.qzeros": packed_columns(zeros - 1, 4)}
        tensors |= {f"{Q}.scales": scales, f"{Q}.g_idx": (torch.arange(n) // (n // 2)).int()}
    elif kind == "awq":
        tensors |= {f"{Q}.qweight": packed_columns(q, 4, AWQ_PLACES), f"{Q}.scales": scales}
        tensors |= {f"{Q}.qzeros": packed_columns(zeros, 4, AWQ_PLACES)}
    else:
        tensors |= {f"{Q}.weight": mixtral_tensors()[f"{Q}.weight"].to(torch.float8_e4m3fn)}
        tensors |= {f"{Q}.weight_scale": torch.linspace(0.5, 2, m)[:, None], f"{Q}.input_scale": torch.ones(())}
    spoil(tensors)
    how = {} if kind == "fp8" else {"quantization_config": {"quant_method": kind, "bits": 4, "group_size": n // 2}}
    return write_checkpoint_directory(path, tensors, mixtral_config() | how, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8"])
def test_a_packed_checkpoint_is_open_to_scan_and_delta_and_closed_to_reduce(
    run: Run, tmp_path: Path, kind: str
) -> None:
    from laser.checkpoint.matrices import list_matrices

    path = written(tmp_path / "packed", kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.packed and f"{Q}.weight" in checkpoint.tensors and f"{Q}.scales" not in checkpoint.tensors
    matrix = next(m for m in list_matrices(checkpoint) if m.name == f"{Q}.weight")
    assert (matrix.role, matrix.layer, matrix.no_spectrum) == ("q", 0, None)
    W = checkpoint.read(f"{Q}.weight")
    if kind == "fp8":
        stored, scale = checkpoint.origin.raw(f"{Q}.weight"), checkpoint.origin.raw(f"{Q}.weight_scale")  # pyright: ignore
        assert torch.equal(W, stored.float() * scale)
    else:
        q, zeros, scales = numbers(W.shape[0], W.shape[1], 2, 4)
        n = W.shape[1]
        assert torch.equal(W, by_hand(q, zeros, scales, [i * 2 // n for i in range(n)]))
    code, _, err = run("scan", path, "-o", tmp_path / "s", "--roles", "q", "--json")
    assert code == 0, err
    from laser.spectra import Spectra

    values = Spectra.load(tmp_path / "s").values[f"{Q}.weight"]
    assert values[0] == pytest.approx(float(torch.linalg.matrix_norm(W.double(), 2)), rel=1e-5)
    plain = make_model(tmp_path / "plain", "mixtral")
    (tmp_path / "text.txt").write_text(TEXT)
    for file in plain.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    unpacked = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    as_plain = write_checkpoint_directory(tmp_path / "as_plain", unpacked, mixtral_config(), 1)
    for file in plain.glob("tokenizer*"):
        (as_plain / file.name).write_bytes(file.read_bytes())
    words = ("--text", tmp_path / "text.txt", "--window", 32, "--windows", 2, "--json")
    losses = [json.loads(run("eval", model, *words)[1])["evaluations"][0]["nll"] for model in (path, as_plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # whole or not, whatever transformers makes of it
    if kind == "fp8":
        with pytest.raises(UsageError, match=r"of which its config.json says nothing.*try laser eval"):
            as_stored(checkpoint)
    code, _, err = run("delta", plain, path, "-o", tmp_path / "d", "--roles", "q")
    assert code == 0, err
    assert run("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", "rank:4")[0] == 0
    for words in (
        ("reduce", path, tmp_path / "p", "-o", tmp_path / "out"),
        ("run", path, "-o", tmp_path / "out", "--no-search", "--rule", "rank:4", "--roles", "q"),
        ("search", path, "-o", tmp_path / "p2", "--roles", "q"),
    ):
        code, _, err = run(*words)
        assert code == 2 and "which can be looked at and not reduced; reduce the unquantised model" in err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, spoil, expected", [
    ("gptq", lambda t: t.pop(f"{Q}.scales"), "q_proj.scales is missing"),
    ("gptq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :8]}), "do not fit"),
    ("gptq", lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"][:8]}), "do not fit"),
    ("awq", lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:, :1]}), "do not fit"),
    ("awq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].to(torch.int32)}), "not int32 and floats"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, kind: str, spoil: Callable[[dict[str, torch.Tensor]], object], expected: str
) -> None:
    def contiguous(tensors: dict[str, torch.Tensor]) -> None:
        spoil(tensors)
        tensors.update({name: tensor.contiguous() for name, tensor in tensors.items()})

    with pytest.raises(CheckpointError, match=rf"{expected}.*start from the unquantised model"):
        open_checkpoint(written(tmp_path / "packed", kind, contiguous))


STATE = "weight.quant_state.bitsandbytes__nf4"
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
GROUP = {"config_groups": {"a": {"targets": ["re:("]}}}


def says(document: str) -> torch.Tensor:
    return torch.tensor(list(document.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("config, tensors, expected", [
    ({}, {STATE: says("[" * 5000)}, "does not say which matrix"),
    ({}, {STATE: says('{"shape": [32], "dtype": "float16"}')}, "does not say which matrix"),
    ({}, {STATE: says('{"shape": [32, 9999999999], "dtype": "float16"}')}, "has no 4 bits for each"),
    ({}, {STATE: torch.zeros(20000, dtype=torch.uint8)}, "does not say which matrix"),
    ({}, {"SCB": torch.ones(7)}, "fits no int8 matrix"),
    (CT, {"weight_scale": torch.ones(32, 1), "weight_packed": torch.ones(32, 4).int()}, "weight_shape is missing"),
    (CT, {"weight_scale": torch.ones(32, 1), "weight_packed": torch.ones(32, 4).int(),
          "weight_shape": torch.tensor([32, 2**60])}, "says no shape of"),
    (CT, {"weight_scale": torch.ones(32, 1), "weight": torch.ones(32, 4).to(torch.int8)}, "names no config_groups"),
    (CT | GROUP, {"weight_scale": torch.ones(32, 1), "weight": torch.ones(32, 4).to(torch.int8)}, "no expression"),
    (CT, {"weight_scale": torch.ones(32, 1).int(), "weight": torch.ones(32, 4).to(torch.int8)}, "scales no weight"),
])  # fmt: skip
def test_hostile_parts_are_refused_before_they_are_unpacked(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], expected: str
) -> None:
    found = mixtral_tensors()
    if "weight_packed" in tensors:
        del found[f"{Q}.weight"]
    found |= {f"{Q}.weight": torch.zeros(64, 1, dtype=torch.uint8)} if STATE in tensors else {}
    found |= {f"{Q}.{name}": tensor for name, tensor in tensors.items()}
    told = mixtral_config() | ({"quantization_config": config} if config else {})
    path = write_checkpoint_directory(tmp_path / "packed", found, told, 1)
    with pytest.raises(CheckpointError, match=rf"{expected}.*start from the unquantised model"):
        open_checkpoint(path)


@pytest.mark.parametrize("config, expected", [
    ({"quant_method": "gptq", "bits": 3}, "of 3 bits as 'gptq', expected 2, 4, 8 bits"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "as 'marlin'"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "as 'gemv', expected 4 bits as gemm"),
    ({}, "GPTQ or AWQ"),
])  # fmt: skip
def test_other_packings_of_the_same_names_are_refused(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    path = written(tmp_path / "packed", "gptq")
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes and transformers
@pytest.mark.parametrize("how", ["nf4", "nf4 twice", "fp4", "int8"])
def test_bitsandbytes_is_what_transformers_dequantises(run: Run, tmp_path: Path, how: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from laser.evaluation.evaluate import evaluate
    from laser.evaluation.text import Text, cut_windows, load_tokenizer

    model = make_model(tmp_path / "model", "llama", dtype="float32")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if how == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=how[:3], bnb_4bit_use_double_quant="twice" in how
        )
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    path = tmp_path / "packed"
    loaded.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((model / file).read_bytes())
    checkpoint = open_checkpoint(path)
    assert checkpoint.packed == "bitsandbytes"
    plain = dict(loaded.dequantize(torch.float32).named_parameters())
    compared = 0
    for name in checkpoint.tensors:
        if "proj" in name:
            assert torch.equal(checkpoint.read(name).float(), plain[name].float()), name
            compared += not torch.equal(plain[name].float(), open_checkpoint(model).read(name).float())
    assert compared == 21
    windows = cut_windows(Text("text", "ann met eve, and 42 others. " * 9), load_tokenizer(model), length=48, limit=2)
    streamed = evaluate(checkpoint, windows, stream=True)
    with torch.no_grad():
        logits = [loaded(torch.from_numpy(w.tokens[:-1].copy())[None]).logits[0] for w in windows.windows]
    expected = [
        float(torch.nn.functional.cross_entropy(x.float(), torch.from_numpy(w.tokens[1:].copy())))
        for x, w in zip(logits, windows.windows, strict=True)
    ]
    assert streamed.losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized", "float-quantized"])
def test_compressed_tensors_is_what_its_library_gives(tmp_path: Path, form: str) -> None:
    """W4A16 in groups with zeros, int8 and FP8 per row: against what the library quantises a weight to."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    (m, n), tensors = mixtral_tensors()[f"{Q}.weight"].shape, mixtral_tensors()
    W = tensors.pop(f"{Q}.weight")
    weights: dict[str, Any] = {"num_bits": 8, "type": form.partition("-")[0], "symmetric": True, "strategy": "channel"}
    state = {"weight": W, "weight_scale": (W.float().abs().amax(1, keepdim=True) / 120).bfloat16()}
    if form == "pack-quantized":
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
        groups = W.float().reshape(m, n // 16, 16)
        state["weight_scale"] = ((groups.amax(2) - groups.amin(2)) / 15).bfloat16()
        zero = torch.round(-groups.amin(2) / state["weight_scale"].float() - 8).clamp(-8, 7)
        state["weight_zero_point"] = zero.to(torch.int8)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    made = compressors.BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    tensors |= {f"{Q}.{name}": tensor for name, tensor in made.items()}
    how = {"quant_method": "compressed-tensors", "format": form}
    how |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    path = write_checkpoint_directory(tmp_path / "packed", tensors, mixtral_config() | {"quantization_config": how}, 2)
    checkpoint = open_checkpoint(path)
    found = checkpoint.read(f"{Q}.weight")
    expected = forward.fake_quantize(W, state["weight_scale"], state.get("weight_zero_point"), scheme.weights)
    assert checkpoint.packed == "compressed-tensors" and found.dtype == torch.bfloat16
    assert torch.equal(found, expected) and not torch.equal(found, W)


def test_what_needs_a_library_says_which(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pico: Callable[..., Path]
) -> None:
    from laser.checkpoint import packed

    # Whether a library is there is asked of Python itself.
    monkeypatch.setattr(packed, "_installed", lambda _: False)
    tensors = mixtral_tensors()
    tensors |= {f"{Q}.weight": torch.zeros(tensors[f"{Q}.weight"].shape, dtype=torch.int8)}
    tensors |= {f"{Q}.SCB": torch.ones(len(tensors[f"{Q}.weight"]))}
    code, _, err = run("scan", make_pico(shards=1, tensors=tensors), "--dry-run")
    assert code == 1 and "bitsandbytes is not installed" in err and "try pip install bitsandbytes" in err
