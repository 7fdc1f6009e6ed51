"""Which weights count: whatever lies in a folder, laser reads what transformers loads, and writes what it loads.

Each layout is a tiny Llama in some disorder. The reference is transformers itself, on the source and on the output.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Fault, Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from laser.checkpoint.push import push
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.checkpoint.safetensors import pieces, read_header
from laser.checkpoint.weights import INDEX, ORDER, PICKLE, PICKLE_INDEX, SINGLE, merge, read_by_vllm, start_of
from laser.errors import CheckpointError, DoubtWarning, OutputError
from laser.pipeline import reduce, scan
from laser.plan import make_plan
from laser.verification import verify

Tensors = dict[str, torch.Tensor]
Q, K, LAST = (f"model.layers.{at}.weight" for at in ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.up_proj"))
FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 20,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def llama(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def matrix(m: int, n: int) -> torch.Tensor:
        return 0.3 * torch.randn(m, n, generator=generator)

    tensors = {"model.embed_tokens.weight": matrix(20, 16)}
    for at in ("model.layers.0.", "model.layers.1."):
        for role, rows in {"q": 16, "k": 8, "v": 8, "o": 16}.items():
            tensors[f"{at}self_attn.{role}_proj.weight"] = matrix(rows, 16)
        for role, shape in {"gate": (24, 16), "down": (16, 24), "up": (24, 16)}.items():
            tensors[f"{at}mlp.{role}_proj.weight"] = matrix(*shape)
        tensors |= {
            f"{at}{norm}.weight": 1 + matrix(1, 16)[0] for norm in ("input_layernorm", "post_attention_layernorm")
        }
    return tensors | {"model.norm.weight": torch.ones(16), "lm_head.weight": matrix(20, 16)}


def put(path: Path, tensors: Tensors) -> None:
    """One file, in the format of its suffix."""
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt", "made_by": "the tests"})
    else:
        torch.save(tensors, path)


def add(path: Path, tensors: Tensors) -> None:
    put(path, (load_file(path) if path.suffix == ".safetensors" else torch.load(path)) | tensors)


def remove(path: Path, name: str) -> None:
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    put(path, {key: tensor for key, tensor in tensors.items() if key != name})


def write_index(folder: Path, weight_map: Mapping[str, str], name: str = INDEX, **metadata: Any) -> None:
    (folder / name).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def sharded(folder: Path, seed: int = 0, files: tuple[str, ...] = (FIRST, SECOND, THIRD), index: str = INDEX) -> None:
    tensors = llama(seed)
    names, size = list(tensors), -(-len(tensors) // len(files))
    weight_map = {}
    for i, file in enumerate(files):
        part = names[i * size : (i + 1) * size]
        put(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map, index, total_size=sum(t.nbytes for t in tensors.values()))


def point(folder: Path, name: str, file: str | None, index: str = INDEX) -> None:
    """Let the index say that a tensor is in `file`, or nothing of it."""
    document = json.loads((folder / index).read_text())
    del document["weight_map"][name]
    document["weight_map"] |= {name: file} if file else {}
    (folder / index).write_text(json.dumps(document))


BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def pickled(folder: Path) -> None:
    sharded(folder, 0, BINS, PICKLE_INDEX)


# --- layouts that can be read: name -> (how it is made, what is told of it: a pattern, or None for nothing)


def tidy(f: Path) -> None:
    sharded(f)


def copies_differ(f: Path) -> None:
    sharded(f)
    add(f / THIRD, {Q: llama(9)[Q]})


def copies_differ_and_the_index_names_the_last(f: Path) -> None:
    copies_differ(f)
    point(f, Q, THIRD)


def copies_are_equal(f: Path) -> None:
    sharded(f)
    add(f / SECOND, {Q: llama()[Q], K: llama()[K]})


def three_copies(f: Path) -> None:
    sharded(f)
    add(f / SECOND, {Q: llama(8)[Q]})
    add(f / THIRD, {Q: llama(9)[Q]})


def an_earlier_copy(f: Path) -> None:
    """The index and the order of files agree on the last copy."""
    sharded(f)
    add(f / FIRST, {"lm_head.weight": llama(9)["lm_head.weight"], LAST: llama(9)[LAST]})


def copy_in_another_dtype(f: Path) -> None:
    sharded(f)
    add(f / FIRST, {LAST: llama(9)[LAST].half()})


def a_shard_of_nothing_else(f: Path) -> None:
    """Every tensor of the first shard is in another one too."""
    sharded(f)
    add(f / SECOND, load_file(f / FIRST))


def not_in_the_index(f: Path) -> None:
    sharded(f)
    point(f, Q, None)
    point(f, LAST, None)


def in_another_shard(f: Path) -> None:
    sharded(f)
    point(f, Q, SECOND)


def moved_copied_and_not_indexed(f: Path) -> None:
    in_another_shard(f)
    add(f / THIRD, {K: llama(9)[K]})
    point(f, LAST, None)


def shards_that_nothing_names(f: Path) -> None:
    sharded(f)
    put(f / "model-00004-of-00004.safetensors", {Q: llama(9)[Q]})


def index_without_metadata(f: Path) -> None:
    sharded(f)
    document = json.loads((f / INDEX).read_text())
    (f / INDEX).write_text(json.dumps({"weight_map": document["weight_map"]}))


def file_beside_shards(f: Path) -> None:
    sharded(f)
    put(f / SINGLE, llama(5))


def file_beside_a_stale_index(f: Path) -> None:
    file_beside_shards(f)
    for shard in (FIRST, SECOND, THIRD):
        (f / shard).unlink()


def file_beside_an_old_index_of_more_layers(f: Path) -> None:
    """As a pruned model that was saved over the one that it was made of."""
    file_beside_a_stale_index(f)
    document = json.loads((f / INDEX).read_text())
    document["weight_map"]["model.layers.7.mlp.up_proj.weight"] = THIRD
    (f / INDEX).write_text(json.dumps(document))


def file_without_a_tied_head(f: Path) -> None:
    """The index of an earlier save names a head, which the file has as the embedding."""
    file_beside_its_own_index(f)
    remove(f / SINGLE, "lm_head.weight")
    (f / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))


def file_beside_its_own_index(f: Path) -> None:
    put(f / SINGLE, llama())
    write_index(f, dict.fromkeys(llama(), SINGLE))


def file_beside_a_broken_index(f: Path) -> None:
    put(f / SINGLE, llama())
    (f / INDEX).write_text("{")


def file_beside_shards_without_index(f: Path) -> None:
    file_beside_shards(f)
    (f / INDEX).unlink()


def file_beside_a_pickle(f: Path) -> None:
    put(f / SINGLE, llama())
    put(f / PICKLE, llama(5))


def shards_beside_a_pickle(f: Path) -> None:
    sharded(f)
    put(f / PICKLE, llama(5))


def file_beside_pickled_shards(f: Path) -> None:
    put(f / SINGLE, llama())
    sharded(f, 5, BINS, PICKLE_INDEX)


def variants_beside_the_file(f: Path) -> None:
    put(f / SINGLE, llama())
    put(f / "model.fp16.safetensors", llama(5))
    put(f / "pytorch_model.fp16.bin", llama(6))


def variants_beside_the_index(f: Path) -> None:
    sharded(f)
    put(f / "model.fp32.safetensors", llama(5))
    write_index(f, dict.fromkeys(llama(), "model.fp32.safetensors"), "model.safetensors.index.fp32.json")


def adapter_beside_the_file(f: Path) -> None:
    put(f / SINGLE, llama())
    put(f / "other.safetensors", {"lora": torch.ones(2, 2)})


def weights_in_a_subfolder_too(f: Path) -> None:
    sharded(f)
    (f / "sub").mkdir()
    put(f / "sub" / SINGLE, llama(5))


def consolidated_beside_shards(f: Path) -> None:
    sharded(f)
    put(f / "consolidated.safetensors", llama(5))


def named_in_the_config(f: Path) -> None:
    put(f / "these.safetensors", llama())
    put(f / SINGLE, llama(5))
    (f / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": "these.safetensors"}))


def index_named_in_the_config(f: Path) -> None:
    """It goes before the file that would come first by its name."""
    file_beside_shards(f)
    (f / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": INDEX}))


def a_folder_called_as_the_file(f: Path) -> None:
    sharded(f)
    (f / SINGLE).mkdir()


def pickles(f: Path) -> None:
    pickled(f)


def pickle_copies_differ(f: Path) -> None:
    pickled(f)
    add(f / BINS[1], {Q: llama(9)[Q]})


def pickle_copies_are_equal(f: Path) -> None:
    pickled(f)
    add(f / BINS[1], {Q: llama()[Q]})


def pickle_not_in_the_index(f: Path) -> None:
    pickled(f)
    point(f, Q, None, PICKLE_INDEX)


def pickle_in_another_shard(f: Path) -> None:
    pickled(f)
    point(f, Q, BINS[1], PICKLE_INDEX)


def pickle_beside_pickled_shards(f: Path) -> None:
    pickled(f)
    put(f / PICKLE, llama(5))


def pickle_beside_shards_without_index(f: Path) -> None:
    sharded(f)
    (f / INDEX).unlink()
    put(f / PICKLE, llama(5))


LAYOUTS: dict[Callable[[Path], None], str | None] = {
    tidy: None,
    copies_differ: rf"{Q} is in {FIRST} and in {THIRD}, with other values: the last file's copy is read, as",
    copies_differ_and_the_index_names_the_last: rf"{Q} is in {FIRST} and in {THIRD}, with other values",
    copies_are_equal: rf"{K} is in {FIRST} and in {SECOND} \(and 1 more .*, with the same values",
    three_copies: rf"{Q} is in {FIRST} and in {SECOND} and in {THIRD}, with other values",
    an_earlier_copy: rf"is in {FIRST} and in {THIRD} \(and 1 more .*, with other values",
    copy_in_another_dtype: rf"{LAST} is in {FIRST} and in {THIRD}, with other values",
    a_shard_of_nothing_else: rf"is in {FIRST} and in {SECOND} \(and \d more .*, with the same values",
    not_in_the_index: rf"{Q} is in {FIRST} and not in the index \(and 1 more .*: read, as transformers and vLLM do",
    in_another_shard: rf"{Q} is in {FIRST}, where the index says {SECOND}: read, as transformers and vLLM do",
    moved_copied_and_not_indexed: r"where the index says .*",
    shards_that_nothing_names: None,
    index_without_metadata: rf"{INDEX} has no metadata, without which transformers does not load it",
    file_beside_shards: rf"{SINGLE} is read, as transformers does; vLLM would read {FIRST}, .*{THIRD} instead",
    file_beside_a_stale_index: rf"{SINGLE} is read, .*vLLM would read nothing, for the index names no file",
    file_beside_an_old_index_of_more_layers: rf"{SINGLE} is read, .*vLLM would read nothing",
    file_without_a_tied_head: None,
    file_beside_its_own_index: None,
    file_beside_a_broken_index: rf"{SINGLE} is read, .*vLLM would read nothing",
    file_beside_shards_without_index: rf"{SINGLE} is read, .*vLLM would read {FIRST}.* as well",
    file_beside_a_pickle: None,
    shards_beside_a_pickle: None,
    file_beside_pickled_shards: None,
    variants_beside_the_file: r"vLLM would read model.fp16.safetensors as well",
    variants_beside_the_index: None,
    adapter_beside_the_file: r"vLLM would read other.safetensors as well",
    weights_in_a_subfolder_too: None,
    consolidated_beside_shards: r"vLLM would read consolidated.safetensors instead",
    named_in_the_config: rf"these.safetensors is read, as transformers does; vLLM would read {SINGLE} as well",
    index_named_in_the_config: None,
    a_folder_called_as_the_file: None,
    pickles: None,
    pickle_copies_differ: rf"{Q} is in model-00001-of-00002.safetensors and in model-00002-.*, with other values",
    pickle_copies_are_equal: rf"{Q} is in model-00001-of-00002.safetensors and in .*, with the same values",
    pickle_not_in_the_index: rf"{Q} is in model-00001-of-00002.safetensors and not in the index",
    pickle_in_another_shard: rf"{Q} is in model-00001-of-00002.safetensors, where the index says model-00002",
    pickle_beside_pickled_shards: rf"{PICKLE} is read, .*vLLM would read {BINS[0]}, {BINS[1]} as well",
    pickle_beside_shards_without_index: rf"{PICKLE} is read, .*vLLM would read {FIRST}.* instead",
}


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def layout(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, layout: Callable[[Path], None]) -> Path:
    return made(tmp_path / "source", layout)


def made(path: Path, layout: Callable[[Path], None]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    layout(path)
    return path


@dataclass(frozen=True)
class Opened:
    checkpoint: Checkpoint
    told: tuple[str, ...]


def opened(model: str | Path, need: str = "ranges") -> Opened:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = open_checkpoint(model, need)
    assert all(issubclass(w.category, DoubtWarning) for w in caught)
    return Opened(checkpoint, tuple(str(w.message) for w in caught))


def loaded(path: Path) -> Tensors:
    """What transformers makes of a folder; every parameter has to come from it."""
    from transformers import AutoModelForCausalLM

    result: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    model, info = result
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return {name: parameter.data for name, parameter in model.named_parameters()}


def truncated(W: torch.Tensor, rank: int) -> np.ndarray[Any, Any]:
    u, s, v = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def check_flow(checkpoint: Checkpoint, expected: Tensors, out: Path) -> None:
    """scan, plan, reduce, verify; the output as transformers loads it, and as whoever reads every file of it."""
    plan = make_plan(scan(checkpoint), "fraction:0.5")
    assert plan.reductions.keys() >= {Q, K, LAST} and plan.coverage["unaccounted"] == 0
    outcome = reduce(checkpoint, plan, out)
    found = verify(checkpoint, out)
    assert not found.problems and found.touched == len(plan.reductions) == 14
    result = loaded(out)
    for name, W in expected.items():
        if name in plan.reductions:
            assert plan.reductions[name].rank == min(W.shape) // 2
            np.testing.assert_allclose(result[name], truncated(W, min(W.shape) // 2), atol=1e-5)
        else:
            assert torch.equal(result[name], W)
    files = sorted(out.glob("*.safetensors"))
    everywhere = [(name, file.name) for file in files for name in load_file(file)]
    assert sorted(name for name, _ in everywhere) == sorted(checkpoint.tensors)  # no second copy for anybody to find
    if (out / INDEX).exists():
        assert json.loads((out / INDEX).read_text())["weight_map"] == dict(everywhere)
    again = opened(out)
    assert not again.told and {file.name for file in files} == {shard.name for shard in again.checkpoint.shards}
    assert set(checkpoint.left_out) <= set(outcome.left_out)


@pytest.mark.slow
def test_the_weights_are_those_that_transformers_loads(
    folder: Path, layout: Callable[[Path], None], tmp_path: Path
) -> None:
    found = opened(folder)
    pattern = LAYOUTS[layout]
    if pattern is None:
        assert not found.told
    else:
        assert [told for told in found.told if re.search(f"^source: .*{pattern}", told)]
    if layout is index_without_metadata:  # transformers does not load that, and loads the output
        expected = llama()
    else:
        expected = loaded(folder)
    checkpoint = found.checkpoint
    assert checkpoint.tensors.keys() == expected.keys()
    for name, W in expected.items():
        assert torch.equal(checkpoint.read(name).float(), W)
    check_flow(checkpoint, {name: checkpoint.read(name) for name in expected}, tmp_path / "out")


# --- refusals: name -> (how it is made, what the error says)


def variant(f: Path) -> None:
    put(f / "model.fp16.safetensors", llama())


def variant_of_an_index(f: Path) -> None:
    sharded(f, 0, ("model.fp32-00001-of-00001.safetensors",), "model.safetensors.index.fp32.json")


def variant_of_a_pickled_index(f: Path) -> None:
    sharded(f, 0, ("pytorch_model.fp16-00001-of-00002.bin", BINS[1]), "pytorch_model.bin.index.fp16.json")


def variant_beside_a_pickle_of_it(f: Path) -> None:
    variant(f)
    put(f / "pytorch_model.fp16.bin", llama())


def only_in_a_subfolder(f: Path) -> None:
    (f / "language_model").mkdir()
    sharded(f / "language_model")


def index_whose_shards_are_missing(f: Path) -> None:
    """transformers goes by the index, and would not look at the pickle."""
    shards_beside_a_pickle(f)
    (f / SECOND).unlink()


def in_no_shard(f: Path) -> None:
    """transformers would make it up."""
    sharded(f)
    remove(f / FIRST, Q)


def pickle_in_no_shard(f: Path) -> None:
    pickled(f)
    remove(f / BINS[0], Q)


def distributed_beside_the_file(f: Path) -> None:
    put(f / SINGLE, llama())
    put(f / "shard-00001-model-00001-of-00001.safetensors", llama(5))


def index_of_another_name(f: Path) -> None:
    sharded(f, 0, (FIRST, SECOND), "these.safetensors.index.json")
    put(f / SINGLE, llama(5))
    (f / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": "these.safetensors.index.json"}))


def file_outside(f: Path) -> None:
    put(f / SINGLE, llama())
    (f / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": "../these.safetensors"}))


def part_of_the_shards(f: Path) -> None:
    """One of the shards has the name of the file that transformers would load alone."""
    sharded(f, 0, (FIRST, SINGLE))


def file_that_lacks_what_the_index_has(f: Path) -> None:
    sharded(f)
    put(f / SINGLE, {"lm_head.weight": llama(5)["lm_head.weight"]})


def pickle_that_lacks_what_the_index_has(f: Path) -> None:
    pickled(f)
    put(f / PICKLE, {"lm_head.weight": llama(5)["lm_head.weight"]})


def two_names_of_one_parameter(f: Path) -> None:
    sharded(f)
    add(f / THIRD, {Q.removeprefix("model."): llama(9)[Q]})


def shards_without_index(f: Path) -> None:
    sharded(f)
    (f / INDEX).unlink()


def shards_without_index_beside_a_lone_pickle(f: Path) -> None:
    shards_without_index(f)
    put(f / "weights.pt", llama())


def a_lone_part(f: Path) -> None:
    put(f / BINS[0], llama())


def pickles_that_would_become_one(f: Path) -> None:
    sharded(f, 0, ("model-1.bin", "pytorch_model-1.bin"), PICKLE_INDEX)


REFUSED: dict[Callable[[Path], None], str] = {
    variant: r"holds a variant only, .*found model.fp16.safetensors",
    variant_of_an_index: r"holds a variant only, .*found model.fp32-00001-of-00001.safetensors",
    variant_of_a_pickled_index: rf"holds {BINS[1]} and no {PICKLE_INDEX}",
    variant_beside_a_pickle_of_it: r"holds a variant only, .*found model.fp16.safetensors",
    only_in_a_subfolder: r"its folder language_model holds weights: try .*source/language_model$",
    index_whose_shards_are_missing: rf"{INDEX} names {SECOND}, which is missing .* the index, and {PICKLE} is read",
    in_no_shard: rf"{INDEX} says that {Q} is in {FIRST}, which does not hold it, nor does another",
    pickle_in_no_shard: rf"{PICKLE_INDEX} says that {Q} is in {BINS[0]}, which does not hold it, nor does another",
    distributed_beside_the_file: r"holds shard-00001-model-00001-of-00001.safetensors, .* which transformers joins and",
    index_of_another_name: rf"names 'these.safetensors.index.json' .* call an index {INDEX}",
    file_outside: r"config.json names '../these.safetensors' as the weights",
    part_of_the_shards: rf"loads {SINGLE} and not .*, but it lacks .*says is in {FIRST}; remove {SINGLE}, or",
    file_that_lacks_what_the_index_has: rf"loads {SINGLE} and not what {INDEX} names, but it lacks",
    pickle_that_lacks_what_the_index_has: rf"loads {PICKLE} and not what {PICKLE_INDEX} names, but it lacks",
    two_names_of_one_parameter: rf"{Q.removeprefix('model.')} is in {THIRD}, and {Q} in {FIRST}: transformers",
    shards_without_index: rf"holds {FIRST}, {SECOND}, {THIRD} and no {INDEX}",
    shards_without_index_beside_a_lone_pickle: rf"holds {FIRST}, {SECOND}, {THIRD} and no {INDEX}",
    a_lone_part: rf"holds {BINS[0]} and no {PICKLE_INDEX}",
    pickles_that_would_become_one: r"names model-1.bin and pytorch_model-1.bin, which would become one file",
}


@pytest.mark.parametrize("attack", REFUSED, ids=lambda attack: attack.__name__)
def test_what_cannot_be_meant_alike_is_refused(tmp_path: Path, attack: Callable[[Path], None]) -> None:
    with pytest.raises(CheckpointError, match=REFUSED[attack]):
        open_checkpoint(made(tmp_path / "source", attack))


def test_a_lone_pickle_of_another_name_is_read_and_said(tmp_path: Path) -> None:
    folder = made(tmp_path / "source", lambda f: put(f / "weights.pt", llama()))
    found = opened(folder)
    assert found.told == (
        "source: weights.pt is read as the model; transformers loads it only under the name pytorch_model.bin",
    )
    check_flow(found.checkpoint, llama(), tmp_path / "out")


# --- the rule by itself


def test_the_order_of_files_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    for names in chain.from_iterable(combinations(ORDER, count) for count in range(1, 5)):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "b", "c": "b.x", "d": "a"}}))
        files, index = _get_resolved_checkpoint_files(folder, None, None, None, {}, False)
        start = start_of(names, {}, folder)
        assert start and files
        if start.endswith(".json"):
            assert index and [Path(file).name for file in files] == ["a", "b", "b.x"]
        else:
            assert index is None and [Path(file).name for file in files] == [start]


def as_vllm_does(folder: Path) -> set[str]:
    """DefaultModelLoader._prepare_weights with load_format "auto", and what it calls, as of vLLM 0.11."""
    mistral = list(folder.glob("consolidated*.safetensors"))
    patterns = ["consolidated*.safetensors"] if mistral else ["*.safetensors", "*.bin", "*.pt"]
    index = folder / ("consolidated.safetensors.index.json" if mistral else INDEX)
    files: list[Path] = []
    for pattern in patterns:
        files += folder.glob(pattern)
        if files:
            break
    if not files or files[0].suffix != ".safetensors":
        blacklist = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
        return {file.name for file in files} - blacklist
    if not index.is_file():
        return {file.name for file in files}
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except ValueError:
        return set()
    return {file.name for file in files} & named


def test_what_vllm_would_read(folder: Path) -> None:
    names = {file.name for file in folder.iterdir() if file.is_file()}
    index = folder / INDEX
    try:
        indexed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    except ValueError:
        indexed = set()
    assert read_by_vllm(names, indexed) == as_vllm_does(folder)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=40)
def test_the_last_copy_counts_whatever_lies_where(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any tensors in any files, against what transformers does: a dictionary, updated file by file."""
    folder, merged = tmp_path_factory.mktemp("merge"), {}
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.int8])
    for i in range(data.draw(st.integers(1, 4))):
        names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True))
        tensors = {n: torch.randn(data.draw(st.integers(0, 3)), 3).to(data.draw(dtypes)) for n in names}
        put(folder / f"{i}.safetensors", tensors)
        merged |= tensors
    shards = tuple(read_header(file) for file in sorted(folder.iterdir()))
    found = merge(shards)
    everywhere = [info.name for shard in found.shards for info in shard.tensors]
    assert sorted(everywhere) == sorted(merged) == sorted(found.tensors)
    checkpoint = Checkpoint(folder, {}, b"", None, found.shards, found.tensors)
    assert all(torch.equal(checkpoint.read(name), W) if W.is_floating_point() else True for name, W in merged.items())
    for shard in found.shards:  # byte for byte what a file of these tensors holds
        whole = b"".join(pieces(shard, 0, shard.size))
        assert len(whole) == shard.size and shard.header == whole[: len(shard.header)]
        a, b = sorted(data.draw(st.integers(0, shard.size)) for _ in range(2))
        assert b"".join(pieces(shard, a, b)) == whole[a:b]
        (folder / "again.safetensors").write_bytes(whole)
        again = load_file(folder / "again.safetensors")
        assert all(torch.equal(again[info.name], merged[info.name]) for info in shard.tensors)
        assert read_header(folder / "again.safetensors").tensors == tuple(
            replace(info, shard="again.safetensors") for info in shard.tensors
        )


# --- the Hub: the same rule, from its listing, from a whole cache, and from one that lacks what goes first


ID = "maker/source"


ON_THE_HUB = (
    tidy,
    copies_differ,
    a_shard_of_nothing_else,
    not_in_the_index,
    in_another_shard,
    file_beside_shards,
    file_beside_a_stale_index,
    shards_beside_a_pickle,
    variants_beside_the_file,
    weights_in_a_subfolder_too,
    consolidated_beside_shards,
    named_in_the_config,
    pickle_copies_differ,
    pickle_beside_shards_without_index,
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ON_THE_HUB, ids=lambda layout: layout.__name__)
def test_the_hub_is_read_as_a_folder_is(
    hub: Hub, layout: Callable[[Path], None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, folder)
    local, remote = opened(folder), opened(ID)
    compared = re.compile("(with (the same|other) values|which were not compared).*")
    for found in (remote, cached := opened(ID, "weights")):
        assert found.checkpoint.identity == local.checkpoint.identity
        for name in local.checkpoint.tensors:
            assert torch.equal(found.checkpoint.read(name), local.checkpoint.read(name))
        told = [sentence.replace(ID, "source") for sentence in found.told]
        assert [compared.sub("", sentence) for sentence in told] == [
            compared.sub("", sentence) for sentence in local.told
        ]
    assert [told.replace(ID, "source") for told in cached.told] == list(local.told)  # now they can be compared
    expected = {name: local.checkpoint.read(name) for name in local.checkpoint.tensors}
    there = loaded(cached.checkpoint.path)  # as eval does
    assert all(torch.equal(there[name], W) for name, W in expected.items())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    forget(hub)
    offline = opened(ID).checkpoint
    assert offline.identity == local.checkpoint.identity and not hub.log
    if layout in (copies_differ, file_beside_shards):
        check_flow(remote.checkpoint, expected, tmp_path / "remote")
        check_flow(offline, expected, tmp_path / "offline")


def forget(hub: Hub) -> None:
    hub.sent()  # waits until everything is in the log
    hub.log.clear()


def test_a_cache_without_the_file_that_goes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are all there, but the repository has one file too, which transformers would fetch and load."""
    folder = made(tmp_path / "source", file_beside_shards)
    hub.add(ID, folder)
    from huggingface_hub import hf_hub_download

    for name in ("config.json", INDEX, FIRST, SECOND, THIRD):
        hf_hub_download(ID, name)
    shards = hub.repos[ID].files
    assert torch.equal(opened(ID).checkpoint.read(Q), llama(5)[Q])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # then transformers has only the shards too
    assert torch.equal(opened(ID).checkpoint.read(Q), llama(0)[Q])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.repos[ID] = replace(hub.repos[ID], files={name: data for name, data in shards.items() if name != SINGLE})
    with pytest.raises(Exception, match="404"):
        hf_hub_download(ID, SINGLE, revision="a" * 40)
    forget(hub)
    assert torch.equal(opened(ID).checkpoint.read(Q), llama(0)[Q])
    assert not hub.log  # the client remembers that there is none


@pytest.mark.parametrize("how", ["out of order", "not there"])
def test_a_hub_that_does_not_answer_when_the_cache_is_whole(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    hub.add(ID, made(tmp_path / "source", tidy))
    open_checkpoint(ID, "weights")
    if how == "not there":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub.faults.append(Fault("status", "api/models", times=1, status=503))
    assert torch.equal(open_checkpoint(ID).read(Q), llama()[Q])
    assert hub.faults[0].times == (how == "not there")
    (tmp_path / "cache").rename(tmp_path / "gone")  # without a cache it is waited for
    hub.faults[:] = [Fault("status", "api/models", times=2, status=503)]
    if how == "out of order":
        monkeypatch.setattr("time.sleep", lambda _: None)
        assert torch.equal(open_checkpoint(ID).read(Q), llama()[Q]) and hub.faults[0].times == 0


def test_weights_in_a_subfolder_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, made(tmp_path / "source", only_in_a_subfolder))
    with pytest.raises(
        CheckpointError, match=rf"its folder language_model .* `hf download {ID} .*try DIR/language_model"
    ):
        open_checkpoint(ID)


# --- the command line, and outputs that somebody put files into


@pytest.mark.slow
def test_every_verb_says_it_once(tmp_path: Path, run: Callable[..., Any]) -> None:
    source, spectra, plan = (tmp_path / name for name in ("source", "s.safetensors", "plan.json"))
    made(source, copies_differ)
    verbs = [
        ("scan", source, "--dry-run"),
        ("scan", source, "-o", spectra),
        ("plan", spectra, "-o", plan, "--rule", "fraction:0.5"),
        ("reduce", source, plan, "-o", tmp_path / "out", "--dry-run"),
        ("reduce", source, plan, "-o", tmp_path / "out"),
        ("verify", source, tmp_path / "out"),
    ]
    for verb in verbs:
        code, _, err = run(*verb)
        assert code == 0
        assert err.count(f"laser: warning: source: {Q} is in {FIRST} and in {THIRD}") == (verb[0] != "plan")
    left_out = json.loads((tmp_path / "out" / "laser.json").read_text())["left_out"]
    assert f"{Q} of {FIRST}" in left_out


def test_what_was_put_beside_an_output_is_found(tmp_path: Path) -> None:
    source = open_checkpoint(made(tmp_path / "source", tidy))
    out = tmp_path / "out"
    reduce(source, make_plan(scan(source), "fraction:0.5"), out)
    put(out / SINGLE, llama())  # whole again, and loaded before the shards
    with pytest.warns(DoubtWarning, match=f"{SINGLE} is read"):
        assert verify(source, out).problems
    with pytest.warns(DoubtWarning), pytest.raises(OutputError, match=f"{FIRST}.* but {SINGLE} would be loaded"):
        push(out, "maker/out")


@pytest.mark.slow
def test_killed_and_resumed_with_copies_left_out(tmp_path: Path) -> None:
    source = opened(made(tmp_path / "source", moved_copied_and_not_indexed)).checkpoint
    plan = make_plan(scan(source), "fraction:0.5")
    reduce(source, plan, tmp_path / "whole")

    for limit in (3, 7):
        left = iter(range(limit))

        def killed(*_: object, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reduce(source, plan, tmp_path / "out", resume=True, tick=killed)
    reduce(source, plan, tmp_path / "out", resume=True)
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            assert (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()
