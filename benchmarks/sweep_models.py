#!/usr/bin/env python3
"""Every causal model type that transformers can build small: the whole flow, and the streamed loss against the whole.

    python benchmarks/sweep_models.py [KIND ...] [--json FILE] [--smoke]

For each type a random float32 model of transformers' own class is saved, scanned, planned to half rank, reduced,
verified and loaded again. Its loss by a plain call of the model is held against `laser.evaluate`, whole and streamed:
equal, or refused with one sentence. Each tensor of two or more dimensions is counted as cut, kept by a rule, or listed.
A traceback (anything but a LaserError) and a difference without a word are what this script looks for.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import laser
from laser.errors import LaserError
from laser.evaluation.evaluate import evaluate
from laser.evaluation.text import Window, Windows

VOCABULARY, TOLERANCE, SECONDS, LARGEST = 300, 1e-4, 300, 30_000_000
# Whatever a config class calls its sizes; a class gets those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "dim_ff": 48, "ffn_hidden_size": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "intermediate_size_mlp": 56, "head_dim": 8,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "max_target_positions": 128,
    "max_source_positions": 64, "sliding_window": 16, "attention_window": 16, "num_codebooks": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_start_index": 1, "shared_expert_intermediate_size": 40, "shared_intermediate_size": 40, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "expert_ffn_hidden_size": 24, "zero_expert_num": 2,
    "expand": 2, "state_size": 8, "time_step_rank": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_dt_rank": 4, "mamba_expand": 2, "mamba_d_ssm": 64, "num_mamba_heads": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "image_size": 28, "patch_size": 14, "out_hidden_size": 32, "projection_dim": 32, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
MLA: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 16}
INDEXER: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
# What a type needs besides: entries of its config, by name of the nested config where there is one.
MORE: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots3_note_text": {"num_key_value_heads": 4}, "zaya": {"num_experts_per_tok": 1},
    "axk1": MLA, "axk2": MLA, "deepseek_v2": MLA, "deepseek_v3": MLA, "deepseek_v32": MLA | INDEXER,
    "glm4_moe_lite": MLA, "glm_moe_dsa": MLA | INDEXER, "longcat_flash": MLA, "minicpm3": MLA, "youtu": MLA,
    "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "num_heads": 4, "hidden_size": 32, "expand": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_shape": [8, 16],
                 "axial_pos_embds_dim": [16, 16], "attention_head_size": 8},
    "xlm": {"emb_dim": 32, "n_words": VOCABULARY, "n_langs": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16,
              "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_head_dim": 16,
               "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                     "activation_sparsity_pattern": [0.0, 0.0]},
    "qwen3_next": LINEAR, "qwen3_5_text": LINEAR, "qwen3_5_moe_text": LINEAR,
}  # fmt: skip
SMOKE = ("llama", "mixtral", "gpt2", "nanochat", "bert", "bart")


def small(cls: Any) -> Any:
    """A small config of this class, and of the classes that it nests."""
    known = inspect.signature(cls.__init__).parameters
    entries = {key: value for key, value in SIZES.items() if key in known}
    for key, nested in (getattr(cls, "sub_configs", None) or {}).items():
        if key in known:
            automatic = nested.__name__ == "AutoConfig"  # any text model will do
            entries[key] = (
                small(CONFIG_MAPPING["llama"]) if automatic and "text" in key else {} if automatic else small(nested)
            )
            if automatic and "text" not in key:
                del entries[key]
    more = MORE.get(cls.model_type, {})
    return cls(**entries | {key: value for key, value in more.items() if key in known})


def build(kind: str) -> Any:
    config = small(CONFIG_MAPPING[kind])
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters at these sizes")
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, x in model.named_parameters():
        if x.dim() > 1:
            x.data.copy_(torch.randn(x.shape) * 0.3 / max(1.0, x.shape[-1] / 64) ** 0.5)
        elif not name.endswith(("A_log", "dt_bias", ".D")):
            x.data.add_(torch.randn(x.shape) * 0.05)
    return model.eval()


def plain_loss(model: Any, windows: Windows) -> float:
    """Mean loss per token in nats, window by window, by the model's own call and nothing of laser."""
    total, count = 0.0, 0
    for window in windows.windows:
        ids = torch.from_numpy(window.tokens)[None]
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(window.tokens) - 1
    return total / count


def some_windows() -> Windows:
    generator = np.random.default_rng(0)
    # Of two lengths, the last short: a cache of what layers are called with goes by length.
    tokens = [generator.integers(3, VOCABULARY, n).astype(np.int64) for n in (33, 33, 17)]
    return Windows(tuple(Window(t, len(t) - 1) for t in tokens), "random", "0" * 64, 33, "windows", False, None)


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def attempt(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the sentence of its refusal as {"refused": ...}, or {"traceback": ...}."""
    try:
        return call()
    except LaserError as error:
        return {"refused": str(error)}
    except (KeyboardInterrupt, TimeoutError):
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [""])[0][:160]
        return {"traceback": f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"}


def account(plan: laser.Plan, matrices: Sequence[laser.Matrix]) -> dict[str, int]:
    """Matrices (two dimensions or more) by what becomes of them."""
    found: Counter[str] = Counter()
    for line, matrix in zip(plan.lines, matrices, strict=True):
        if len(matrix.shape) < 2 or min(matrix.shape) == 0:
            continue
        found["cut" if line.action == "reduce" else "listed" if matrix.role == "other" else f"kept: {matrix.role}"] += 1
    return dict(found)


def flow(source: Path, folder: Path) -> dict[str, Any]:
    """scan, plan to half rank, reduce, verify; then transformers loads what was written and saves it again."""
    checkpoint = laser.open_checkpoint(source)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spectra = laser.scan(checkpoint)
    plan = laser.make_plan(spectra, "fraction:0.5")
    row: dict[str, Any] = {"account": account(plan, spectra.matrices)}
    row["unaccounted"] = plan.coverage["unaccounted"]
    row["warning"] = [str(w.message) for w in told]
    laser.reduce(checkpoint, plan, folder / "out")
    row["problems"] = list(laser.verify(checkpoint, folder / "out").problems)
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (source, folder / "out")
    )
    after.save_pretrained(folder / "again")
    written = {k: v for f in (folder / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    again = {k: v for f in (folder / "again").glob("*.safetensors") for k, v in load_file(f).items()}
    stored = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    cut = {k for k, v in written.items() if not torch.equal(stored[k], v)}
    row["lost"] = sorted(k for k in cut & again.keys() if not torch.equal(again[k], written[k]))[:3]
    state = before.state_dict()
    row["changed"] = sum(
        not torch.equal(state[k], v) for k, v in after.state_dict().items() if state[k].dtype == v.dtype
    )
    return row


def examine(kind: str, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind}
    try:
        model = build(kind)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return row | {"unbuilt": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
    windows, source = some_windows(), folder / "source"
    try:
        plain_loss(model, windows)
        model.save_pretrained(source)
        # What transformers loads, which is what was saved but for a bug of its own (Youtu's padding row).
        row["plain"] = plain_loss(transformers.AutoModelForCausalLM.from_pretrained(source), windows)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return row | {"unbuilt": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
    del model
    row |= {"flow": attempt(lambda: flow(source, folder))}
    for name, stream in (("whole", False), ("streamed", True)):
        row[name] = attempt(lambda s=stream: evaluate(laser.open_checkpoint(source), windows, stream=s).nll)
    return row


def verdict(row: Mapping[str, Any], name: str) -> str:
    found = row[name]
    if isinstance(found, dict):
        return "refused" if "refused" in found else "TRACEBACK"
    return "equal" if abs(found - row["plain"]) < TOLERANCE * max(1.0, abs(row["plain"])) else "DIFFERENT"


def summarise(row: Mapping[str, Any]) -> dict[str, str]:
    if "unbuilt" in row:
        return {"flow": "unbuilt", "whole": "unbuilt", "streamed": "unbuilt"}
    told = row["flow"]
    state = "TRACEBACK" if "traceback" in told else "refused" if "refused" in told else "right"
    if state == "right" and (told["problems"] or told["unaccounted"] or told["lost"]):
        state = "WRONG"
    return {"flow": state, "whole": verdict(row, "whole"), "streamed": verdict(row, "streamed")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types; default: all of this transformers")
    parser.add_argument("--json", type=Path, help="write every row there")
    parser.add_argument("--smoke", action="store_true", help=f"only {', '.join(SMOKE)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows, counts = [], {name: Counter() for name in ("flow", "whole", "streamed")}
    for kind in given.kinds or (SMOKE if given.smoke else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                with limit(SECONDS):
                    row = examine(kind, Path(folder))
            except TimeoutError as error:
                row = {"kind": kind, "unbuilt": str(error)}
        rows.append(row)
        states = summarise(row)
        for name, state in states.items():
            counts[name][state] += 1
        print(
            f"{kind:26s}",
            *(f"{name} {state:10s}" for name, state in states.items()),
            f"{time.perf_counter() - start:5.1f} s",
            flush=True,
        )
        detail = [row.get("unbuilt")]
        for name in ("flow", "whole", "streamed"):
            found = row.get(name)
            if isinstance(found, dict):
                detail += [f"{name}: {found[k]}" for k in ("refused", "traceback", "problems", "lost") if found.get(k)]
            elif name in row and states[name] == "DIFFERENT":
                detail.append(f"{name}: {found:.6f}, plain {row['plain']:.6f}")
        if isinstance(row.get("flow"), dict) and "account" in row["flow"]:
            detail.append(", ".join(f"{k} {v}" for k, v in row["flow"]["account"].items()))
        for line in filter(None, detail):
            print("    ", str(line)[:300], flush=True)
    print()
    for name, counter in counts.items():
        print(f"{name:9s}", ", ".join(f"{state} {n}" for state, n in counter.most_common()))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    return int(any(state in ("TRACEBACK", "DIFFERENT", "WRONG") for c in counts.values() for state in c))


if __name__ == "__main__":
    sys.exit(main())
