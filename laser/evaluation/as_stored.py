"""Have transformers load the weights that are stored, and nothing that the files beside them add."""

from __future__ import annotations

from typing import Any

from laser.checkpoint.quantised import leftover, method_of
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.side_files import ADAPTER
from laser.errors import UsageError


def as_stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `from_pretrained` is given so that it loads the weights as laser reads them; nothing for a tidy checkpoint.

    A leftover quantization_config would make it quantise plain weights, or expect packed ones: it gets a config
    without. An adapter that lies beside the weights would be put on top of them by peft, where that is installed: it is
    made to look for adapters where there are none. Raises as transformers does for a config that it does not know, and
    UsageError for packed weights that config.json does not tell of: they would be taken for other numbers.
    """
    if checkpoint.packed and checkpoint.origin is not None and not method_of(checkpoint.origin.config):
        raise UsageError(
            f"{checkpoint.name} holds {checkpoint.packed} weights of which its config.json says nothing, so "
            "transformers cannot load them; try laser eval, which unpacks them itself"
        )
    asked: dict[str, Any] = {}
    if (checkpoint.path / ADAPTER).is_file():
        asked["adapter_kwargs"] = {"subfolder": "no-adapter"}
    if leftover(checkpoint.name, checkpoint.config, checkpoint.tensors) is None:
        return asked
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True, trust_remote_code=False)
    for place in (config, config.get_text_config(decoder=True)):
        for section in ("quantization_config", "compression_config"):
            if hasattr(place, section):
                delattr(place, section)
    return asked | {"config": config}
