"""Which matrices a command is about: by layer, role and regular expression on the tensor's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from laser.checkpoint.matrices import ALIASES, KEPT_STACKS, PROTECTED, Matrix
from laser.errors import UsageError
from laser.reasons import Kind, Why

MAIN = "decoder"  # what the language model's own layers may be called; they need no name


@dataclass(frozen=True)
class Selection:
    """Empty fields select everything that is not protected; a protected role or stack is selected only by its name.

    layers: numbers of the language model's own layers; "mtp:3" is layer 3 of the stack mtp, "mtp:all" all of them.
    """

    layers: tuple[int | str, ...] = ()
    roles: tuple[str, ...] = ()
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for what is no regular expression, before anything is matched by it."""
        for text in (self.include, self.exclude):
            try:
                re.compile(text or "")
            except (re.error, OverflowError, RecursionError) as error:
                raise UsageError(
                    f"{text!r} is not a regular expression ({error}); try to quote or escape it"
                ) from error

    def describe(self) -> dict[str, object]:
        return {
            "layers": list(self.layers),
            "roles": list(self.roles),
            "include": self.include,
            "exclude": self.exclude,
        }

    def why_not(self, matrix: Matrix) -> Why | None:
        """None if the matrix is selected and has a spectrum, else the reason why it is left alone."""
        why = self._not_asked(matrix)
        return Why(Kind.FAILED, f"skipped: {matrix.no_spectrum}") if why is None and matrix.no_spectrum else why

    def skipped(self, matrices: Sequence[Matrix]) -> dict[str, str]:
        """What is selected and has no spectrum for how it is stored: name -> why."""
        found = {m.name: self.why_not(m) for m in matrices if m.no_spectrum}
        return {name: why.text for name, why in found.items() if why is not None and why.kind is Kind.FAILED}

    def why_not_tensor(self, tensor: Matrix) -> Why | None:
        """The same for what is done to tensors of any shape: protected are none, and no spectrum is asked of them."""
        return self._not_asked(tensor, every=True)

    def _not_asked(self, matrix: Matrix, every: bool = False) -> Why | None:
        roles = {r for role in self.roles for r in (role, ALIASES.get(role, role))}
        stacks = {str(entry).partition(":")[0] for entry in self.layers}
        if not matrix.is_matrix and not every:
            return Why(Kind.NOT_A_MATRIX, f"not a matrix: shape {list(matrix.shape)}")
        if roles and matrix.role not in roles:
            return Why(Kind.NOT_SELECTED, f"role {matrix.role} not selected")
        if not roles and not every and matrix.role in PROTECTED and matrix.role not in stacks:
            return Why(Kind.PROTECTED, f"role {matrix.role} is kept unless asked for")
        if not every and matrix.stack in KEPT_STACKS and matrix.stack not in stacks | roles:
            return Why(Kind.PROTECTED, f"stack {matrix.stack} is kept unless asked for")
        if self.layers and not {matrix.place, f"{matrix.stack or MAIN}:all"} & set(self.layers):
            return Why(Kind.NOT_SELECTED, f"layer {matrix.place} not selected")
        if self.include is not None and not re.search(self.include, matrix.name):
            return Why(Kind.NOT_SELECTED, "not included by the expression")
        if self.exclude is not None and re.search(self.exclude, matrix.name):
            return Why(Kind.NOT_SELECTED, "excluded by the expression")
        return None

    def left_out(self, matrices: Sequence[Matrix], skipped: Mapping[str, Why]) -> list[str]:
        """The matrices that are selected here and were not in the scan, by the reasons that it gave."""
        asked = [m.name for m in matrices if self.why_not(m) is None and m.name in skipped]
        return [name for name in asked if skipped[name].kind is Kind.NOT_SELECTED]

    def never_scanned(self, matrices: Sequence[Matrix], skipped: Mapping[str, Why]) -> int | str | None:
        """A role or layer that is named here, of which the scan had nothing; None where there is none."""
        for entry in (*self.roles, *self.layers):
            alone = Selection(roles=(entry,)) if entry in self.roles else Selection(layers=(entry,))
            asked = [m for m in matrices if alone.why_not(m) is None]
            if asked and len(alone.left_out(asked, skipped)) == len(asked):
                return entry
        return None

    def check(self, matrices: Sequence[Matrix]) -> None:
        """Raises UsageError for a role, layer or expression that matches nothing in this model."""
        roles = {m.role for m in matrices}
        for role in self.roles:
            if not {role, ALIASES.get(role, role)} & roles:
                usual = roles - set(PROTECTED) or roles
                raise UsageError(f"no matrix has role {role!r}; try --roles {','.join(sorted(usual))}")
        stacks: dict[str, list[int]] = {}
        for stack, layer in sorted({(m.stack, m.layer) for m in matrices if m.layer is not None}):
            stacks.setdefault(stack, []).append(layer)
        there = {m.place for m in matrices} | {f"{stack or MAIN}:all" for stack in stacks}
        for entry in self.layers:
            if entry not in there:
                spans = [f"{stack}:{ns[0]}-{ns[-1]}" if stack else f"{ns[0]}-{ns[-1]}" for stack, ns in stacks.items()]
                raise UsageError(
                    f"the model has no layer {entry}; try --layers {' or '.join(spans) or '(this model has no layers)'}"
                )
        if not all(self.why_not(m) for m in matrices):
            return
        for name, why in self.skipped(matrices).items():
            raise UsageError(f"no selected matrix has a spectrum: {name} is {why}; try the model's bf16 release")
        if self == Selection():
            kept = sorted({m.role for m in matrices if m.is_matrix})
            raise UsageError(
                f"no matrix here is cut unless asked for: their roles are {', '.join(kept) or '(no matrix at all)'}; "
                "check that this is the checkpoint you mean, and its config.json"
            )
        raise UsageError("the selection matches no matrix; try fewer of --layers, --roles, --include, --exclude")


def parse_layers(text: str | None) -> tuple[int | str, ...]:
    """`0,4,20-31,mtp:0-1,encoder:all` to layers, each stack's sorted. Raises UsageError for anything else."""
    layers: set[tuple[str, int]] = set()
    for part in (text or "").replace(" ", "").split(",") if text else ():
        match = re.fullmatch(r"(?:(?P<stack>[a-z]+):)?(?:(?P<first>\d+)(?:-(?P<last>\d+))?|(?P<all>all))", part)
        if not match or (match["all"] and not match["stack"]):
            raise UsageError(
                f"layers {text!r} are not numbers and ranges, perhaps of a named stack; "
                "try --layers 0,4,20-31 or --layers mtp:0"
            )
        stack = match["stack"] or MAIN
        if match["all"]:
            layers.add((stack, -1))
            continue
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first or last > 100_000:
            raise UsageError(f"layers {part!r} do not rise; try --layers {last}-{first}")
        layers |= {(stack, number) for number in range(first, last + 1)}
    ordered = sorted(layers, key=lambda layer: (layer[0] != MAIN, layer))
    spelled = {-1: "all"}
    return tuple(n if stack == MAIN and n >= 0 else f"{stack}:{spelled.get(n, n)}" for stack, n in ordered)


def parse_roles(text: str | None) -> tuple[str, ...]:
    """`w1,w2,q` to role names, in the order given."""
    return tuple(part for part in (text or "").replace(" ", "").split(",") if part)
