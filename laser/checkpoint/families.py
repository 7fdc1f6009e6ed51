"""From tensor names to layer, role and expert. Each model family is a row of a table; adding one is adding a row.

Roles: q, k, v, o (attention); w1, w2, w3 (Mixtral's experts) and gate, down, up (dense MLPs: the same three matrices
under Llama's names); router, embedding, head, norm. w1 and gate, w2 and down, w3 and up select each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from laser.checkpoint.reader import Checkpoint, TensorInfo
from laser.errors import CheckpointError

LAYER = r"model\.layers\.(?P<layer>\d+)\."
ATTENTION = {role: rf"{LAYER}self_attn\.{role}_proj\.weight" for role in "qkvo"}
DENSE = {role: rf"{LAYER}mlp\.{role}_proj\.weight" for role in ("gate", "up", "down")}
AROUND = {
    "norm": rf"{LAYER}(input_layernorm|post_attention_layernorm)\.weight|model\.norm\.weight",
    "embedding": r"model\.embed_tokens\.weight",
    "head": r"lm_head\.weight",
}
EXPERTS = {w: rf"{LAYER}block_sparse_moe\.experts\.(?P<expert>\d+)\.{w}\.weight" for w in ("w1", "w2", "w3")}

# config.json's model_type -> role -> pattern of the whole tensor name
FAMILIES: dict[str, Mapping[str, str]] = {
    "mixtral": {**ATTENTION, **EXPERTS, "router": rf"{LAYER}block_sparse_moe\.gate\.weight", **AROUND},
    "mistral": {**ATTENTION, **DENSE, **AROUND},
    "llama": {**ATTENTION, **DENSE, **AROUND},
}

ALIASES = {"w1": "gate", "w2": "down", "w3": "up", "gate": "w1", "down": "w2", "up": "w3"}
# Never reduced unless asked for by role: a router of 8 rows decides everything, embeddings and head are look-ups.
PROTECTED = ("router", "embedding", "head", "norm", "other")


@dataclass(frozen=True)
class Matrix:
    """A tensor of the checkpoint and what it is, known from headers alone."""

    name: str
    role: str  # "other" for a name that the family's row does not know
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_matrix(self) -> bool:
        """Two-dimensional, not empty: something that has a singular spectrum."""
        return len(self.shape) == 2 and min(self.shape) > 0

    @property
    def cost(self) -> int:
        """m * n * min(m, n): proportional to the work of a factorisation; 0 for what is no matrix."""
        return 0 if not self.is_matrix else self.shape[0] * self.shape[1] * min(self.shape)


def list_matrices(checkpoint: Checkpoint) -> list[Matrix]:
    """Every tensor of the checkpoint, in file order, with its layer, role and expert.

    Raises CheckpointError for a family that is not in the table.
    """
    family = checkpoint.config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.name}/config.json: model_type is {family!r}, expected one of {', '.join(FAMILIES)}"
        )
    rows = [(role, re.compile(pattern)) for role, pattern in FAMILIES[family].items()]
    return [_matrix(info, rows) for info in checkpoint.tensors.values()]


def _matrix(info: TensorInfo, rows: list[tuple[str, re.Pattern[str]]]) -> Matrix:
    for role, pattern in rows:
        if match := pattern.fullmatch(info.name):
            numbers = {k: int(v) for k, v in match.groupdict().items() if v is not None}
            return Matrix(info.name, role, numbers.get("layer"), numbers.get("expert"), info.shape, info.dtype)
    return Matrix(info.name, "other", None, None, info.shape, info.dtype)
