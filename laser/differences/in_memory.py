"""What a checkpoint's tensors are in memory: PEFT adapts the modules that transformers builds, by their names there.

The model of config.json is built without weights, by the class that config.json names, and no other code. Each tensor's
name in memory is asked of transformers' own loader. What transformers does not build is not known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from laser.checkpoint.reader import Checkpoint
from laser.errors import is_out_of_memory

WEIGHT = ".weight"
# PEFT takes these names out of target_modules, as those of experts, for model_types that transformers converts as the
# key, and puts parameters of the experts in their place. A linear layer of that name it adapts as a parameter.
TAKEN_FOR_EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
# PEFT refuses adapters of these modules in these models, whose kernels read the weights past the module.
PAST_THE_MODULE = frozenset({"out_proj", "conv1d"})
LAYERS_BUILT, EXPERTS_BUILT = 1 << 10, 1 << 16
MANY = re.compile("layers|n_layer|depth|blocks")
MAMBAS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


@dataclass(frozen=True)
class Memory:
    """A model in memory, and which tensors of a checkpoint make its parameters.

    shapes: of its parameters and stored buffers; kinds: of its modules: "linear", "embedding", or ""
    transposed: modules whose parameters of experts are (experts, in, out); tied: parameter -> those that are the same
    names: tensor -> parameter that it makes, or is a part of; whole: parameter -> the one tensor that makes it
    """

    model_type: str
    task: str | None
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]
    transposed: frozenset[str]
    tied: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]
    whole: Mapping[str, str]
    taken: frozenset[str]

    def adapted_as(self, module: str) -> str | None:
        """How PEFT adapts a module's weight: as "linear", "embedding" or "parameter"; None: not at all."""
        leaf, kind = module.rpartition(".")[2], self.kinds.get(module)
        if self.model_type in MAMBAS and leaf in PAST_THE_MODULE:
            return None
        if kind and leaf in self.taken:
            return "parameter"
        return kind or None

    def tensors_of(self, module: str) -> list[str]:
        """The parameters and stored buffers of a module, which PEFT loads together where it was trained whole."""
        return [name for name in self.shapes if name.startswith(f"{module}.")]


def memory_of(checkpoint: Checkpoint, tensors: Iterable[str] | None = None) -> Memory | None:
    """Of a checkpoint's model, and of its tensors, or these; None where transformers does not build it."""
    return _memory(json.dumps(dict(checkpoint.config), sort_keys=True), tuple(tensors or checkpoint.tensors))


@lru_cache(2)
def _memory(config: str, tensors: tuple[str, ...]) -> Memory | None:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = _skeleton_of(json.loads(config), len(tensors))
        return None if model is None else _seen(model, tensors)
    except Exception as error:  # the code of some hundred models: whatever it raises, its names are not known
        if is_out_of_memory(error):
            raise
        return None
    finally:
        logging.set_verbosity(verbosity)


def _skeleton_of(config: dict[str, Any], tensors: int) -> Any:
    """The model on the meta device: no memory, no weights, and no code but transformers' own."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    of_class = getattr(transformers, name, None) if isinstance(name, str) else None
    kind: Any = CONFIG_MAPPING[config["model_type"]]
    made: Any = kind.from_dict(kind._decode_special_floats(config))
    if not _is_possible(config, max(tensors, LAYERS_BUILT)):
        return None
    with torch.device("meta"):
        if isinstance(of_class, type) and issubclass(of_class, transformers.PreTrainedModel):
            return of_class._from_config(made)
        if named:
            return None
        return transformers.AutoModelForCausalLM.from_config(made, trust_remote_code=False)


def _is_possible(config: Any, layers: int) -> bool:
    """Whether config.json counts no more layers and experts than a model may have: modules for them take for ever."""
    if not isinstance(config, dict):
        return True
    for key, value in config.items():
        most = EXPERTS_BUILT if "expert" in key else layers if MANY.search(key) else None
        if most is not None and isinstance(value, int) and value > most:
            return False
    return all(_is_possible(value, layers) for value in config.values())


def _seen(model: Any, tensors: tuple[str, ...]) -> Memory:
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    names: dict[str, str] = {}
    whole: dict[str, str] = {}
    for tensor in tensors:
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:
            name, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if name in state:
            names[tensor] = name
            if pattern is None:
                whole.setdefault(name, tensor)
    same: dict[int, list[str]] = {}
    for name, value in state.items():
        same.setdefault(id(value), []).append(name)
    kinds, transposed = {}, set()
    for name, module in model.named_modules():
        embedding = isinstance(module, torch.nn.Embedding)
        kinds[name] = "embedding" if embedding else "linear" if isinstance(module, torch.nn.Linear) else ""
        if getattr(module, "is_transposed", False):
            transposed.add(name)
    kind = str(model.config.model_type)
    return Memory(
        kind, _task_of(model), {name: tuple(value.shape) for name, value in state.items()}, kinds,
        frozenset(transposed), {n: tuple(o for o in group if o != n) for group in same.values() for n in group},
        names, whole, TAKEN_FOR_EXPERTS.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, kind), frozenset()),
    )  # fmt: skip


def _task_of(model: Any) -> str | None:
    """PEFT's word for what a model does, by which it chooses its methods; None for one that continues no text."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
