"""A config whose leftover quantization_config would make transformers quantise, or expect packed, plain weights."""

from __future__ import annotations

from typing import Any

from laser.checkpoint.quantised import leftover
from laser.checkpoint.reader import Checkpoint


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `from_pretrained` is given so that it loads the weights as they are stored: nothing, or `config` without
    that section where the stored weights are plain. Raises as transformers does for a config that it does not know.
    """
    if leftover(checkpoint.name, checkpoint.config, checkpoint.tensors) is None:
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True, trust_remote_code=False)
    for section in ("quantization_config", "compression_config"):
        if hasattr(config, section):
            delattr(config, section)
    return {"config": config}
