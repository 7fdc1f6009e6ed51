"""What a command line can choose between, where the table's own file would import torch for a help page."""

from __future__ import annotations

DEVICES = ("auto", "cuda", "mps", "cpu")
# Of the matrices that are measured, in any family, and of three that are kept unless asked for.
ROLES = ("q", "k", "v", "o", "w1", "w2", "w3", "gate", "down", "up", "q_a", "q_b", "kv_a", "kv_b")
ROLES += ("x", "z", "out", "b", "c", "linear", "router", "embedding", "head")
ROUNDS = 300  # steps of the solver behind `laser unmerge`, per matrix and rank, at the most
# What a search tries of the differences from a base, mildest first.
OF_DIFFERENCES = ("rounding", "scale:0.75", "scale:0.5", "scale:0.25")
WINDOW = 512  # tokens of a text that are scored at once, BOS included
# d: mean paired change of the objective (lower is better), se: its standard error. `better` also asks for d < 0: an
# expert that no calibration token reaches gives d = se = 0, and what was not measured is not better.
ACCEPT = {
    "better": lambda d, se: d < 0 and d <= -se,
    "no-worse": lambda d, se: d <= se,
    "any-drop": lambda d, se: d < 0,
}
