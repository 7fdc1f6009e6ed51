"""One backward pass through the whole model, by transformers and autograd: the reference for a streamed one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from laser.checkpoint.reader import Checkpoint
from laser.evaluation.evaluate import load_whole
from laser.evaluation.text import Window


def squares_by_hand(checkpoint: Checkpoint, windows: Sequence[Window]) -> dict[str, float]:
    """The mean square gradient at the outputs of every linear layer and expert: one backward, every output kept.

    An expert's products are written out here, since no module makes them.
    """
    whole: Any = load_whole(checkpoint, "float32")
    whole.config._experts_implementation = "eager"
    outputs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(name: str, y: Any) -> Any:
        y.retain_grad()
        outputs[name].append(y)
        return y

    def experts(layer: int) -> Any:
        def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            module, prefix = whole.model.layers[layer].mlp.experts, f"model.layers.{layer}.block_sparse_moe.experts."
            out = torch.zeros_like(hidden)
            for expert in range(len(module.gate_up_proj)):
                token, place = torch.where(index == expert)
                if len(token):
                    w1, w3 = module.gate_up_proj[expert].chunk(2)
                    gate = keep(f"{prefix}{expert}.w1.weight", hidden[token] @ w1.T)
                    up = keep(f"{prefix}{expert}.w3.weight", hidden[token] @ w3.T)
                    x = torch.nn.functional.silu(gate) * up
                    y = keep(f"{prefix}{expert}.w2.weight", x @ module.down_proj[expert].T)
                    out = out.index_add(0, token, y * weights[token, place, None])
            return out

        return forward

    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(lambda _, __, y, name=name: keep(f"{name}.weight", y))
        if name.endswith("mlp.experts"):
            module.forward = experts(int(name.split(".")[2]))
    loss, total = torch.zeros(()), sum(w.scored for w in windows)
    for window in windows:
        logits = whole(input_ids=torch.from_numpy(window.tokens[:-1])[None], use_cache=False).logits[0]
        targets = torch.from_numpy(window.tokens[1:])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = loss + losses[-window.scored :].sum() / total
    loss.backward()
    found = {n: torch.cat([g.grad.flatten(0, -2) for g in ys if g.grad is not None]) for n, ys in outputs.items()}
    return {name: float(g.double().square().mean()) for name, g in found.items()}
