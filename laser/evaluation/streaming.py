"""A model in pieces: embedding, decoder layers, head. Each is resident, or loaded from the checkpoint and freed.

The pieces are transformers' own modules, built on the meta device and filled by our reader, so nothing of the
architecture is written twice: masks, rotary embeddings and everything else that a layer is called with are recorded
from a call of the model's own `forward` in which each layer only notes its arguments. Peak memory of a streamed pass
is one piece, in `dtype`, and the activations (see `activations`).

Piece 0 is the embedding, piece i + 1 is layer i, the last piece is the final norm and the head. `boundary p` means the
hidden states that enter piece p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laser.checkpoint.families import list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.errors import UsageError
from laser.evaluation.activations import Activations, Store, keep_heap_flat
from laser.evaluation.layout import Part, build_skeleton, edited, parts_of, piece_of
from laser.evaluation.text import Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rows of logits at a time: 256 x 128,000 float32 are 128 MiB.
HEAD_ROWS = 256


@dataclass(frozen=True)
class Scores:
    """Per window."""

    sums: tuple[float, ...]  # loss of its scored tokens, nats
    greedy: tuple[bool, ...]  # whether each of them was the model's first choice


class LayeredModel:
    """One checkpoint as pieces to run one after the other. `resident` keeps each piece once it has been loaded.

    `edits` maps names of matrices to what stands in for them, in storage dtype; see `edit`.
    `layer_forwards` counts decoder layers times windows that were run: the cost of everything.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        resident: bool = False,
        store: Store | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"no evaluation in {dtype!r}; try --dtype {'|'.join(DTYPES)}")
        self.checkpoint, self.dtype, self.device = checkpoint, DTYPES[dtype], torch.device(device)
        self.resident, self.store = resident, store or Store()
        if not resident:
            keep_heap_flat()
        self.model = build_skeleton(checkpoint, self.dtype)
        self.inner = self.model.model
        self.inner.rotary_emb.to(self.device)
        self.layers = len(self.inner.layers)
        self.edits: dict[str, torch.Tensor] = {}
        self.layer_forwards = 0
        self._loaded: set[int] = set()
        self._spare: dict[torch.Size, list[torch.Tensor]] = {}  # memory of pieces that were freed, by shape
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # window length -> per layer
        self._pieces: list[dict[str, tuple[Part, ...]]] = [{} for _ in range(self.layers + 2)]
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self._pieces[piece_of(checkpoint, name, self.layers)][name] = parts_of(
                checkpoint, name, tuple(parameter.shape)
            )
        self._matrices = {m.name: m for m in list_matrices(checkpoint)}
        self._places: dict[str, list[tuple[int, str, Part]]] = {}
        for piece, parameters in enumerate(self._pieces):
            for name, parts in parameters.items():
                for part in parts:
                    self._places.setdefault(part.tensor, []).append((piece, name, part))

    @property
    def width(self) -> int:
        """H, the size of a hidden state."""
        return int(self.model.config.hidden_size)

    def _places_of(self, name: str) -> list[tuple[int, str, Part]]:
        matrix = self._matrices.get(name)
        if matrix is None or matrix.tensor not in self._places:
            raise UsageError(f"{name} is used by no piece of {self.checkpoint.name}; try laser scan to list them")
        return self._places[matrix.tensor]

    def first_piece(self, name: str) -> int:
        """The first piece that uses a matrix: all boundaries up to it stay what they are when it is edited."""
        return min(piece for piece, _, _ in self._places_of(name))

    def edit(self, name: str, W: torch.Tensor | None) -> None:
        """Put W (m, n) in the place of a matrix; None puts back the bytes of the checkpoint."""
        if W is None:
            self.edits.pop(name, None)
        else:
            self.edits[name] = W
        for piece, parameter, part in self._places_of(name):
            if piece in self._loaded:
                self.model.get_parameter(parameter).data[part.where].copy_(self._read(part.tensor))

    def _read(self, tensor: str) -> torch.Tensor:
        return edited(self.checkpoint, tensor, self.edits, self._matrices)

    def _load(self, piece: int) -> None:
        if piece in self._loaded:
            return
        shapes = {name: self.model.get_parameter(name).shape for name in self._pieces[piece]}
        self._spare = {shape: tensors for shape, tensors in self._spare.items() if shape in shapes.values()}
        for name, parts in self._pieces[piece].items():
            spare = self._spare.get(shapes[name])
            filled = spare.pop() if spare else torch.empty(shapes[name], dtype=self.dtype, device=self.device)
            for part in parts:
                filled[part.where].copy_(self._read(part.tensor))
            self._set(name, filled)
        self._loaded.add(piece)

    def _free(self, piece: int) -> None:
        if self.resident:
            return
        for name in self._pieces[piece]:
            parameter = self.model.get_parameter(name)
            # The next layer has the same shapes and is read into the same memory.
            self._spare.setdefault(parameter.shape, []).append(parameter.data)
            self._set(name, torch.empty_like(parameter, device="meta"))
        self._loaded.discard(piece)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        # A new Parameter in its module only: a tied head and embedding are two places here, filled from one tensor.
        setattr(self.model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))

    def unload(self) -> None:
        """Free every piece, resident or not."""
        resident, self.resident = self.resident, False
        for piece in tuple(self._loaded):
            self._free(piece)
        self.resident = resident
        self._spare.clear()

    # --- the pieces in order ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, windows: Sequence[Window]) -> Activations:
        """Boundary 1: what enters the first layer. Also records what the layers are called with."""
        activations = self.store.allocate([len(w.tokens) - 1 for w in windows], self.width, self.dtype)
        self._load(0)
        for number, window in enumerate(windows):
            activations.window(number).copy_(self._record(self._ids(window)))
        self._free(0)
        return activations

    def _ids(self, window: Window) -> torch.Tensor:
        return torch.from_numpy(window.tokens[:-1])[None].to(self.device)  # (1, T)

    def _record(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the model's own forward with every layer replaced by a note of its arguments; (T, H)."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append((args, kwargs))
            return hidden

        replaced = [*self.inner.layers, self.inner.norm]
        for module in replaced[:-1]:
            module.forward = note
        self.inner.norm.forward = lambda hidden: hidden
        try:
            hidden = self.inner(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for module in replaced:
                del module.forward  # the class's own again
        self._calls.setdefault(ids.shape[1], calls)
        return hidden[0]

    def _layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, H) through one decoder layer."""
        args, kwargs = self._calls[len(hidden)][layer]
        out = self.inner.layers[layer](hidden[None], *args, **kwargs)
        self.layer_forwards += 1
        return (out[0] if isinstance(out, tuple) else out)[0]

    @torch.no_grad()
    def run_layer(self, layer: int, activations: Activations) -> None:
        """All windows through one decoder layer, in place."""
        self._load(layer + 1)
        for number in range(len(activations.starts) - 1):
            hidden = activations.window(number)
            hidden.copy_(self._layer(layer, hidden.to(self.device)))
        self._free(layer + 1)

    @torch.no_grad()
    def score(self, activations: Activations, windows: Sequence[Window]) -> Scores:
        """Final norm, head and loss: what the scored tokens of each window cost."""
        self._load(self.layers + 1)
        sums, greedy = [], []
        for number, window in enumerate(windows):
            hidden = activations.window(number)[-window.scored :]
            targets = torch.from_numpy(window.tokens[-window.scored :])
            total, first = 0.0, True
            for start in range(0, window.scored, HEAD_ROWS):
                rows = hidden[start : start + HEAD_ROWS].to(self.device)
                losses, hits = token_losses(self._logits(rows), targets[start : start + HEAD_ROWS])
                total += float(losses.cpu().double().sum())
                first = first and bool(hits.all())
            sums.append(total)
            greedy.append(first)
        self._free(self.layers + 1)
        return Scores(tuple(sums), tuple(greedy))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, V) by the model's own forward behind the layers, so that scaled or capped logits are right."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        states: Any = self.inner.norm(hidden[None])
        self.inner.forward = lambda **_: MoeModelOutputWithPast(last_hidden_state=states)
        try:
            return self.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits[0]
        finally:
            del self.inner.forward

    def losses(self, windows: Sequence[Window], tick: Callable[[], None] = lambda: None) -> Scores:
        """A whole pass. `tick` is called after each piece."""
        activations = self.embed(windows)
        tick()
        for layer in range(self.layers):
            self.run_layer(layer, activations)
            tick()
        scores = self.score(activations, windows)
        self.store.free(activations)
        tick()
        return scores

    # --- backwards -------------------------------------------------------------------------------------------------

    def gradients(
        self, windows: Sequence[Window], boundaries: Mapping[int, Activations], tensors: Sequence[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """d loss / d W for each named tensor (m, n), the loss being the mean over all scored tokens, nats per token.

        `boundaries` holds the activations that enter each layer from the first that matters to the head. Layers are
        run again one at a time, last first, each with its gradients freed before the next: one layer in memory, twice.
        """
        wanted = {name: self._places_of(name)[0] for name in tensors}
        if shared := [name for name in tensors if len(self._places_of(name)) > 1 or wanted[name][0] == 0]:
            raise UsageError(f"{shared[0]} is the embedding, which has no place among the layers; leave its role out")
        total = sum(w.scored for w in windows)
        first = min(piece for piece, _, _ in wanted.values())
        lengths = [len(w.tokens) - 1 for w in windows]
        upstream = self.store.allocate(lengths, self.width, self.dtype)
        for piece in range(self.layers + 1, first - 1, -1):
            names = [name for name, place in wanted.items() if place[0] == piece]
            self._load(piece)
            parameters = {wanted[name][1]: self.model.get_parameter(wanted[name][1]) for name in names}
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for number, window in enumerate(windows):
                entering = boundaries[piece].window(number).to(self.device, copy=True).requires_grad_(True)
                with torch.enable_grad():
                    self._backward(piece, entering, window, upstream.window(number), total)
                assert entering.grad is not None
                upstream.window(number).copy_(entering.grad)
            for name in names:
                _, parameter, part = wanted[name]
                gradient = parameters[parameter].grad
                if gradient is None:
                    gradient = torch.zeros_like(parameters[parameter])
                cut, whole = self._matrices[name].cut, gradient[part.where].detach()
                yield name, (cut.of(whole) if cut else whole).clone()
            for parameter in parameters.values():
                parameter.grad = None
                parameter.requires_grad_(False)
            self._free(piece)
        self.store.free(upstream)

    def _backward(self, piece: int, entering: torch.Tensor, window: Window, upstream: torch.Tensor, total: int) -> None:
        if piece <= self.layers:
            self._layer(piece - 1, entering).backward(upstream.to(self.device))
            return
        targets = torch.from_numpy(window.tokens[-window.scored :])
        losses, _ = token_losses(self._logits(entering[-window.scored :]), targets)
        (losses.sum() / total).backward()


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each target in nats (k,), float32 whatever the logits' dtype, and whether it is the largest logit.

    logits (k, V), targets (k,).
    """
    logits, targets = logits.float(), targets.to(logits.device)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
