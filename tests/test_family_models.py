"""Each family from transformers' own model to transformers' own logits; the page of families says what is seen here."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import CONFIGS, END, OTHERS, RANK, START, TWINS, build, causal, everything, examine, line_of, truncated
from safetensors.torch import load_file, save_file
from trainers import by_axolotl, by_scripts

import laser
from laser.checkpoint.families import FAMILIES, LLAMA
from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.slices import Slice
from laser.summary import ALWAYS_UNFROZEN, summarise

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "families.md").read_text()
TABLE = PAGE[PAGE.find(START) : PAGE.find(END)]


@pytest.mark.slow
@pytest.mark.parametrize("family", everything())
def test_reduced_on_disk_is_reduced_in_memory(family: str, tmp_path: Path) -> None:
    row = examine(family, tmp_path)
    assert row.unaccounted == 0
    assert row.changed and row.verified and row.parameters_equal and row.logits_equal
    if f"transformers {transformers.__version__}," in TABLE:
        assert line_of(row) in TABLE, "run python scripts/render_families.py"


def test_what_is_not_examined_has_the_rows_of_what_is() -> None:
    assert {kind for kind, *_ in (OTHERS | CONFIGS).values()} <= FAMILIES.keys()
    for family, twin in TWINS.items():
        assert FAMILIES[family] == FAMILIES[twin]


@pytest.mark.slow
def test_a_family_joins_by_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with Llama's names, which transformers knows and laser does not."""
    # The table is where a family is added.
    monkeypatch.setitem(FAMILIES, "hyperclovax", LLAMA)
    assert "hyperclovax" in everything()
    row = examine("hyperclovax", tmp_path)
    assert row.unaccounted == 0 and row.matrices == 2 * 7
    assert row.changed and row.verified and row.parameters_equal and row.logits_equal


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize("family", ["Llama 3", "Gemma 2", "GPT-2"])
def test_tied_embeddings_are_reduced_once(family: str, stored: str, tmp_path: Path) -> None:
    """Reduced by its role, a tied embedding is still tied, and both its uses see the reduced matrix."""
    model = build(family)
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    if stored == "twice":
        tensors = load_file(source / "model.safetensors")
        (embedding,) = [t for name, t in tensors.items() if re.search(r"embed_tokens|wte", name)]
        save_file(tensors | {"lm_head.weight": embedding.clone()}, source / "model.safetensors", {"format": "pt"})
        edit_config(source, tie_word_embeddings=True)  # GPT-2's does not say what is its default
    checkpoint = laser.open_checkpoint(source)
    chosen = laser.Selection(roles=("embedding",))
    spectra = laser.scan(checkpoint, chosen)
    assert len(spectra.values) == (1 if stored == "once" else 2)
    plan = laser.make_plan(spectra, f"rank:{RANK}", chosen)
    laser.reduce(checkpoint, plan, out)
    assert not laser.verify(checkpoint, out).problems and not plan.coverage["unaccounted"]
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    weight = loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight is weight
    embedding = model.get_input_embeddings().weight
    embedding.data.copy_(truncated(embedding.data))
    assert torch.allclose(weight, embedding, atol=2e-6, rtol=1e-5)
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "PhiMoE", "DeepSeek-V3"])
def test_experts_saved_as_they_are_in_memory(family: str, tmp_path: Path) -> None:
    """transformers 5 can save experts fused (save_original_format=False) and reads that again; the result is equal."""
    model = build(family)
    logits = []
    for name, original in (("hub", True), ("memory", False)):
        source, out = tmp_path / name, tmp_path / f"{name}-out"
        model.save_pretrained(source, save_original_format=original)
        checkpoint = laser.open_checkpoint(source)
        plan = laser.make_plan(laser.scan(checkpoint), f"rank:{RANK}")
        assert not plan.coverage["unaccounted"]
        laser.reduce(checkpoint, plan, out)
        assert any("[0,up]" in line.name for line in plan.lines) != original
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(loaded(input_ids=torch.arange(3, 19)[None]).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GPT-OSS", "GPT-NeoX", "Granite-MoE"])
def test_a_fused_tensor_is_resumed_to_the_byte(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two matrices of one tensor; a damaged one is noticed and made again."""
    build(family).save_pretrained(tmp_path / "source")
    checkpoint = laser.open_checkpoint(tmp_path / "source")
    plan = laser.make_plan(laser.scan(checkpoint), f"rank:{RANK}")
    laser.reduce(checkpoint, plan, tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    true_read, reads, stop = laser.Checkpoint.read, [], [0]

    def killed(self: laser.Checkpoint, name: str, cut: Slice | None = None) -> torch.Tensor:
        reads.append((name, cut))
        if len(reads) == stop[0]:
            raise KeyboardInterrupt
        return true_read(self, name, cut)

    for stop[0] in (2, 7, 5):
        reads.clear()
        with monkeypatch.context() as patch:
            # `tick` comes when a matrix is written; this ends before the next is read.
            patch.setattr(laser.Checkpoint, "read", killed)
            with pytest.raises(KeyboardInterrupt):
                laser.reduce(checkpoint, plan, tmp_path / "killed", resume=True)
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    partial = tmp_path / "killed" / "model.safetensors.partial"
    with partial.open("r+b") as file:  # every third byte of the fused tensors
        for info in checkpoint.tensors.values():
            if len(info.shape) == 3 or "query_key_value.weight" in info.name:
                for at in range(info.start, info.end, 3):
                    file.seek(at)
                    file.write(b"?")
    damaged = partial.read_bytes()
    laser.reduce(checkpoint, plan, tmp_path / "killed", resume=True)
    found = (tmp_path / "killed" / "model.safetensors").read_bytes()
    assert found == expected and damaged != expected


def test_multimodal_checkpoints_keep_their_other_half(tmp_path: Path) -> None:
    """Gemma 3 and Llama 4 are released with a vision tower: its tensors are kept, the language model's are reduced."""
    names = {
        "language_model.model.layers.0.self_attn.q_proj.weight": "q",
        "model.language_model.layers.0.mlp.down_proj.weight": "down",
        "language_model.lm_head.weight": "head",
        "language_model.model.embed_tokens.weight": "embedding",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": "vision",
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight": "vision",
        "multi_modal_projector.linear_1.weight": "vision",
    }
    save_file({name: torch.ones(8, 8) for name in names}, tmp_path / "model.safetensors")
    for kind in ("gemma3", "llama4"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        found = {m.name: m.role for m in list_matrices(laser.open_checkpoint(tmp_path))}
        if kind == "llama4":  # its dense layers are called otherwise
            found["model.language_model.layers.0.mlp.down_proj.weight"] = "down"
        assert found == names


def test_other_tools_are_given_names_that_they_know(tmp_path: Path) -> None:
    """Axolotl's list names parameters: a fused tensor once, not the matrices that it holds."""
    build("GPT-OSS").save_pretrained(tmp_path)
    checkpoint = laser.open_checkpoint(tmp_path)
    text = summarise(laser.scan(checkpoint)).unfrozen_yaml(100)
    named = [line[3:-1] for line in text.splitlines() if line.startswith("- ^") and line.endswith("$")]
    assert len(named) == len(set(named)) and set(named) <= checkpoint.tensors.keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in named


# One of each kind of rows, and those that lie otherwise in transformers' parameters than the first of their kind.
LAYOUTS = {FAMILIES[kind]: family for family, (kind, _) in reversed(causal().items())}
LAYOUTS = (*LAYOUTS.values(), "OLMo", "Apertus", "Granite-MoE, shared", "Qwen3.5", "Phi-4-multimodal")


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYOUTS)
def test_what_is_chosen_is_what_is_trained(family: str, tmp_path: Path) -> None:
    """Every second matrix is chosen and zeroed on disk. What is then zero in transformers' own model, and nothing else,
    is what the two readers of the list would train."""
    model = build(family)
    model.save_pretrained(tmp_path)
    checkpoint = laser.open_checkpoint(tmp_path)
    summary = summarise(laser.scan(checkpoint), "laser-rmt")
    rows = tuple(r for r in summary.rows if r.snr_over_largest is not None)[::2]
    text = replace(summary, rows=rows).unfrozen_yaml(100)
    tensors = load_file(tmp_path / "model.safetensors")
    matrices = {m.name: m for m in list_matrices(checkpoint)}
    for matrix in (matrices[row.name] for row in rows):
        if matrix.part is None:
            tensors[matrix.tensor].zero_()
        else:
            matrix.part.put(tensors[matrix.tensor], torch.zeros(matrix.shape))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    old, changed = dict(model.named_parameters()), {}
    for name, new in loaded.named_parameters():
        if places := {i for i, (a, b) in enumerate(zip(old[name], new, strict=True)) if not torch.equal(a, b)}:
            changed[name] = places
    sizes = {name: len(parameter) for name, parameter in old.items()}
    trained = by_axolotl(text, sizes)
    always = {name: set(range(sizes[name])) for name in ALWAYS_UNFROZEN if name in sizes}
    assert trained.keys() == (changed | always).keys()
    for name, places in trained.items():  # parts of one dimension are trained with their parameter, experts alone
        assert places == (changed[name] if old[name].dim() == 3 else set(range(sizes[name])))
    assert ("# A parameter that holds" in text) == any(
        row.name != matrices[row.name].tensor and old.get(matrices[row.name].tensor, torch.empty(0)).dim() == 2
        for row in rows
    )
    # Scripts train by the names on disk, where the model has them: experts are one there, or not named.
    assert by_scripts(text, sizes) == trained.keys() & (checkpoint.tensors.keys() | set(ALWAYS_UNFROZEN))
    # Under transformers 4 the parameters were the tensors, and both train what was chosen.
    stored = {name: info.shape[0] for name, info in checkpoint.tensors.items() if info.shape}
    named = {matrices[row.name].tensor for row in rows} | (stored.keys() & set(ALWAYS_UNFROZEN))
    assert by_scripts(text, stored) == by_axolotl(text, stored).keys() == named


def test_a_model_without_its_head_is_trained_under_the_names_that_it_gets(tmp_path: Path) -> None:
    """GPT-2 lies on the Hub as its own class saved it: transformers puts `transformer.` before every name."""
    model = build("GPT-2")
    model.transformer.save_pretrained(tmp_path)
    checkpoint = laser.open_checkpoint(tmp_path)
    assert "h.1.attn.c_attn.weight" in checkpoint.tensors
    summary = summarise(laser.scan(checkpoint), "fraction:0.5")
    text = summary.unfrozen_yaml(100)
    sizes = {name: len(parameter) for name, parameter in model.named_parameters()}
    expected = {name for name in sizes if re.fullmatch(r"transformer\.h\.\d\.\w+\.c_\w+\.weight", name)}
    assert len(expected) == 8 and by_scripts(text, sizes) == expected == by_axolotl(text, sizes).keys()
