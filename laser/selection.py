"""Which matrices a command is about: by layer, role and regular expression on the tensor's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from laser.checkpoint.families import ALIASES, PROTECTED, Matrix
from laser.errors import UsageError


@dataclass(frozen=True)
class Selection:
    """Empty fields select everything that is not protected; a protected role is selected only by its name."""

    layers: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    include: str | None = None
    exclude: str | None = None

    def describe(self) -> dict[str, object]:
        return {
            "layers": list(self.layers),
            "roles": list(self.roles),
            "include": self.include,
            "exclude": self.exclude,
        }

    def why_not(self, matrix: Matrix) -> str | None:
        """None if the matrix is selected and has a spectrum, else the reason why it is left alone."""
        why = self._not_asked(matrix)
        return f"skipped: {matrix.no_spectrum}" if why is None and matrix.no_spectrum else why

    def skipped(self, matrices: Sequence[Matrix]) -> dict[str, str]:
        """What is selected and has no spectrum for how it is stored: name -> why."""
        asked = (m for m in matrices if m.no_spectrum and self._not_asked(m) is None)
        return {m.name: self.why_not(m) or "" for m in asked}

    def _not_asked(self, matrix: Matrix) -> str | None:
        roles = {r for role in self.roles for r in (role, ALIASES.get(role, role))}
        if not matrix.is_matrix:
            return f"not a matrix: shape {list(matrix.shape)}"
        if roles and matrix.role not in roles:
            return f"role {matrix.role} not selected"
        if not roles and matrix.role in PROTECTED:
            return f"role {matrix.role} is kept unless asked for"
        if self.layers and matrix.layer not in self.layers:
            return f"layer {matrix.layer} not selected"
        if self.include is not None and not re.search(self.include, matrix.name):
            return "not included by the expression"
        if self.exclude is not None and re.search(self.exclude, matrix.name):
            return "excluded by the expression"
        return None

    def check(self, matrices: Sequence[Matrix]) -> None:
        """Raises UsageError for a role, layer or expression that matches nothing in this model."""
        roles = {m.role for m in matrices}
        for role in self.roles:
            if not {role, ALIASES.get(role, role)} & roles:
                raise UsageError(f"no matrix has role {role!r}; try --roles {','.join(sorted(roles))}")
        layers = sorted({m.layer for m in matrices if m.layer is not None})
        for layer in self.layers:
            if layer not in layers:
                span = f"{layers[0]}-{layers[-1]}" if layers else "(this model has no layers)"
                raise UsageError(f"the model has no layer {layer}; try --layers {span}")
        for text in (self.include, self.exclude):
            try:
                re.compile(text or "")
            except re.error as error:
                raise UsageError(
                    f"{text!r} is not a regular expression ({error}); try to quote or escape it"
                ) from error
        if all(self.why_not(m) for m in matrices):
            for name, why in self.skipped(matrices).items():
                raise UsageError(f"no selected matrix has a spectrum: {name} is {why}; try the model's bf16 release")
            raise UsageError("the selection matches no matrix; try fewer of --layers, --roles, --include, --exclude")


def parse_layers(text: str | None) -> tuple[int, ...]:
    """`0,4,20-31` to layer numbers, sorted. Raises UsageError for anything else."""
    layers: set[int] = set()
    for part in (text or "").replace(" ", "").split(",") if text else ():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise UsageError(f"layers {text!r} are not numbers and ranges; try --layers 0,4,20-31")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > 100_000:
            raise UsageError(f"layers {part!r} do not rise; try --layers {last}-{first}")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def parse_roles(text: str | None) -> tuple[str, ...]:
    """`w1,w2,q` to role names, in the order given."""
    return tuple(part for part in (text or "").replace(" ", "").split(",") if part)
