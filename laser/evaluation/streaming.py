"""A model in pieces: embedding, decoder layers, head. The last of them stay in memory, the others are read and freed.

The pieces are transformers' own modules, built on the meta device and filled by our reader, so nothing of the
architecture is written twice. Masks, rotary embeddings and everything else that a layer is called with are recorded
from a call of the model's own `forward`, in which each layer only notes its arguments. What comes behind the layers is
the same `forward` again, its last layer giving back the states that are to be scored. Peak memory of a streamed pass
is one piece, in `dtype`, and the activations (see `activations`).

Piece 0 is the embedding, piece i + 1 is layer i, the last piece is the head. `boundary p` means the hidden states that
enter piece p. The few parameters outside of these, such as the final norm, are loaded with the first and the last.

Whether a model is its layers one after the other is checked once, before the first number: see `prove`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.errors import LaserError, UsageError, is_out_of_memory
from laser.evaluation.activations import Activations, Store, keep_heap_flat
from laser.evaluation.ahead import Ahead, Tensors, copy_in
from laser.evaluation.causal import (
    build_causal,
    check_causal,
    check_windows,
    grows_between,
    probes,
    same_logits,
    say_unused,
)
from laser.evaluation.layout import (
    Part,
    by_layers,
    check_embedding,
    compute_buffers,
    decoder_of,
    edited,
    fill,
    keep_dtypes,
    not_by_layers,
    owner_of,
    stack_of,
)
from laser.evaluation.text import Window

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rows of logits at a time: 256 x 128,000 float32 are 128 MiB.
HEAD_ROWS = 256
PROBE_ROWS = 5  # fewer than the probe has, so that a head that looks beyond its row is caught


# Numbers of values that a layer is tried to give back: a tensor, or the states first in a tuple of so many.
TUPLES = (0, 1, 2, 3, 4)


class _Enough(Exception):
    """Ends a forward of which the rest is not wanted."""


def require_dtype(dtype: str) -> None:
    """Raises UsageError for a dtype in which nothing is evaluated."""
    if dtype not in MODEL_DTYPES:
        raise UsageError(f"no evaluation in {dtype!r}; try --dtype {'|'.join(MODEL_DTYPES)}")


@dataclass(frozen=True)
class Call:
    """What the model calls one layer with, its hidden states left out. `keyword`: their name, None: the first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, torch.Tensor]:
        if args:
            return Call(args[1:], kwargs, None), args[0]
        name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        return Call((), {k: v for k, v in kwargs.items() if k != name}, name), kwargs[name]

    def of(self, layer: Any, hidden: torch.Tensor) -> Any:
        if self.keyword is None:
            return layer(hidden, *self.args, **self.kwargs)
        return layer(**{self.keyword: hidden}, **self.kwargs)


@dataclass(frozen=True)
class Scores:
    """Per window."""

    sums: tuple[float, ...]  # loss of its scored tokens, nats
    greedy: tuple[bool, ...]  # whether each of them was the model's first choice


class LayeredModel:
    """One checkpoint as pieces to run one after the other.

    `resident` is how many of the last pieces stay once they are loaded, the head being the last; None: all of them.
    `edits` maps names of matrices to what stands in for them, in storage dtype; see `edit` and `swapped`.
    `layer_forwards` counts decoder layers times windows that were run, `loads` pieces that were read: the cost of
    everything. `ahead`: a thread reads the next piece meanwhile, which takes the memory of one more.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        resident: int | None = 0,
        store: Store | None = None,
        ahead: bool = False,
    ) -> None:
        require_dtype(dtype)
        self.checkpoint, self.dtype, self.device = checkpoint, MODEL_DTYPES[dtype], torch.device(device)
        self.resident, self.store = resident, store or Store()
        if resident is not None:
            keep_heap_flat()
        self.model = build_causal(checkpoint, self.dtype)
        with by_layers(checkpoint):
            compute_buffers(checkpoint, self.model)
            check_embedding(checkpoint, self.model)
            keep_dtypes(self.model, self.dtype)
            self.stack, self.blocks = stack_of(checkpoint, self.model)
            self._filling = fill(checkpoint, self.model)
        self.layers = len(self.blocks)
        self.edits: dict[str, torch.Tensor] = {}
        self.layer_forwards = self.loads = 0
        self._loaded: set[int] = set()
        self._held: set[int] = set()  # not freed before they are let go
        self._ahead = Ahead(self.device) if ahead and resident is not None else None
        self._spare: dict[tuple[Any, ...], list[torch.Tensor]] = {}  # memory of pieces that were freed
        self._calls: dict[int, list[Call]] = {}  # window length -> per layer
        self._returns: int | None = None  # see TUPLES
        # Of one token's state; some models hand on several streams, (n, H).
        self._state: tuple[int, ...] = (int(self.model.config.get_text_config().hidden_size),)
        self._checked, self._proved = 0, False  # the longest window that was looked at
        self._pieces: list[dict[str, tuple[Part, ...]]] = [{} for _ in range(self.layers + 3)]
        for name, piece in self._where_used().items():
            self._pieces[piece][name] = self._filling.parts[name]
        for name, buffer in list(self.model.named_buffers()):
            if buffer.device.type != "meta":
                owner, leaf = owner_of(self.model, name)
                owner._buffers[leaf] = buffer.to(self.device)
        self._matrices = {m.name: m for m in list_matrices(checkpoint)}
        self._places: dict[str, list[tuple[int, str, Part]]] = {}
        for piece, parameters in enumerate(self._pieces):
            for name, parts in parameters.items():
                for part in parts:
                    self._places.setdefault(part.tensor, []).append((piece, name, part))
        parts = (part.tensor for parts in self._filling.parts.values() for part in parts)
        say_unused(checkpoint, {*self._filling.unused, *(name for name in parts if name not in self._places)})

    @property
    def _rest(self) -> int:
        """The piece behind the last: what is neither embedding, layer nor head."""
        return self.layers + 2

    def together(self, piece: int) -> tuple[int, ...]:
        """The pieces that a step needs: embedding and head need the rest as well."""
        return (piece,) if 0 < piece <= self.layers else (piece, self._rest)

    def in_memory(self, piece: int) -> bool:
        """Whether a piece is read at most once, however often it is run."""
        return self._stays(piece)

    def _where_used(self) -> dict[str, int]:
        """Parameter -> piece. Towers of other modalities, which a text does not reach, are in none."""
        names = {id(module): name for name, module in self.model.named_modules()}
        base, decoder = self.model.base_model, names[id(decoder_of(self.model))]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        within = "" if base is self.model else names[id(base)] + "."
        found = {}
        for name in self._filling.parts:
            owner, _ = owner_of(self.model, name)
            if name.startswith(self.stack + "."):
                found[name] = int(name.removeprefix(self.stack + ".").split(".")[0]) + 1
            elif owner is embedding:
                found[name] = 0
            elif owner is head:
                found[name] = self.layers + 1
            elif not within or not name.startswith(within) or name.startswith(decoder + "."):
                found[name] = self._rest
        return found

    @property
    def width(self) -> int:
        """H, the size of a hidden state: of all of its streams where layers hand on more than one."""
        return math.prod(self._state)

    def runs(self, name: str) -> bool:
        """Whether a matrix is used at all: MTP layers, leftover heads and towers of other modalities are not."""
        return name in self._matrices and self._matrices[name].tensor in self._places

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that uses a matrix, None where none does."""
        pieces = {piece for piece, _, _ in self._places_of(name)} if self.runs(name) else set()
        return pieces.pop() - 1 if len(pieces) == 1 and 0 < min(pieces) <= self.layers else None

    def parts(self, layer: int) -> dict[str, tuple[Part, ...]]:
        """Each parameter of a decoder layer by its name in the model, and what fills it."""
        return self._pieces[layer + 1]

    def _places_of(self, name: str) -> list[tuple[int, str, Part]]:
        if not self.runs(name):
            raise UsageError(f"{name} is used by no piece of {self.checkpoint.name}; try laser scan to list them")
        return self._places[self._matrices[name].tensor]

    def pieces_of(self, name: str) -> set[int]:
        """The pieces that use a matrix."""
        return {piece for piece, _, _ in self._places_of(name)}

    def first_piece(self, name: str) -> int:
        """The first piece that uses a matrix: all boundaries up to it stay what they are when it is edited."""
        return min(0 if piece == self._rest else piece for piece, _, _ in self._places_of(name))

    def edit(self, name: str, W: torch.Tensor | None) -> None:
        """Put W (m, n) in the place of a matrix; None puts back the bytes of the checkpoint."""
        self.edits = {key: value for key, value in self.edits.items() if key != name} | ({} if W is None else {name: W})
        if self._ahead is not None and any(piece == self._ahead.piece for piece, _, _ in self._places_of(name)):
            self._give_back(self._ahead.take())  # it may have been read without this edit
        for piece, parameter, part in self._places_of(name):
            if piece in self._loaded:
                copy_in(self._value(parameter).data[part.where], self._read(part.tensor, self.edits))

    @contextlib.contextmanager
    def swapped(self, edits: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, matrices (m, n) by name stand in for others in the pieces that are held; behind it the values from
        before are there again, bit for bit, and nothing was read anew."""
        before, edited_before = list[tuple[torch.Tensor, torch.Tensor]](), self.edits
        self.edits = {**edited_before, **edits}
        try:
            for name in edits:
                for piece, parameter, part in self._places_of(name):
                    if piece in self._held:
                        place = self._value(parameter).data[part.where]
                        before.append((place, place.clone()))
                        copy_in(place, self._read(part.tensor, self.edits))
            yield
        finally:
            self.edits = edited_before
            for place, values in reversed(before):
                place.copy_(values)

    @contextlib.contextmanager
    def held(self, *pieces: int, then: int | None = None) -> Iterator[None]:
        """Inside, these pieces are loaded. `then`: the piece that will be needed next, which is read meanwhile."""
        for piece in pieces:
            self._load(piece)
        new = set(pieces) - self._held
        self._held |= new
        if then is not None and self._ahead is not None and self._ahead.piece is None and then not in self._loaded:
            self._ahead.start(then, self._vessels(then), functools.partial(self._fill, then, self.edits))
        try:
            yield
        finally:
            self._held -= new
            for piece in pieces:
                self._free(piece)

    def _read(self, tensor: str, edits: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A tensor with these edits, which may be other than the model's by the time that a thread reads it."""
        return edited(self.checkpoint, tensor, edits, self._matrices)

    def _value(self, name: str) -> torch.Tensor:
        """A parameter or stored buffer as it is now."""
        owner, leaf = owner_of(self.model, name)
        return getattr(owner, leaf)

    def _load(self, piece: int) -> None:
        if piece in self._loaded:
            return
        if self._ahead is not None and self._ahead.piece == piece:
            tensors = self._ahead.take()
        else:
            tensors = self._vessels(piece)
            self._fill(piece, self.edits, tensors)
        for name, tensor in tensors.items():
            self._set(name, tensor)
        self.loads += 1
        self._loaded.add(piece)

    def _vessels(self, piece: int) -> Tensors:
        """Memory for each parameter of a piece, that of pieces that were freed first."""
        kinds = {name: self._kind(name) for name in self._pieces[piece]}
        if piece != self._rest:  # which comes beside another piece
            self._spare = {kind: tensors for kind, tensors in self._spare.items() if kind in kinds.values()}
        found = {}
        for name, (shape, dtype) in kinds.items():
            spare = self._spare.get((shape, dtype))
            found[name] = spare.pop() if spare else torch.empty(shape, dtype=dtype, device=self.device)
        return found

    def _fill(self, piece: int, edits: Mapping[str, torch.Tensor], tensors: Tensors) -> None:
        """Read a piece."""
        for name, parts in self._pieces[piece].items():
            for part in parts:
                copy_in(tensors[name][part.where], self._read(part.tensor, edits))

    def _give_back(self, tensors: Tensors) -> None:
        """Keep memory for the next piece of these shapes."""
        for tensor in tensors.values():
            self._spare.setdefault((tensor.shape, tensor.dtype), []).append(tensor)

    def kinds(self) -> list[list[torch.Tensor]]:
        """Of each piece the tensors that it is loaded into, in its dtypes; last what is neither embedding, layer nor
        head."""
        return [[self._value(name) for name in parameters] for parameters in self._pieces]

    def _kind(self, name: str) -> tuple[torch.Size, torch.dtype]:
        value = self._value(name)
        return value.shape, value.dtype

    def _stays(self, piece: int) -> bool:
        """Whether a piece that is loaded is kept. What is none of the pieces stays with the last of them."""
        return self.resident is None or (0 < self.resident and piece >= self.layers + 2 - self.resident)

    def _free(self, piece: int) -> None:
        """Give up the memory of a piece that need not stay."""
        if piece in self._loaded and piece not in self._held and not self._stays(piece):
            self._drop(piece)

    def _drop(self, piece: int) -> None:
        values = {name: self._value(name) for name in self._pieces[piece]}
        # The next layer has the same shapes and is read into the same memory.
        self._give_back({name: value.data for name, value in values.items()})
        for name, value in values.items():
            self._set(name, torch.empty_like(value, device="meta"))
        self._loaded.discard(piece)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        owner, leaf = owner_of(self.model, name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            # A new Parameter in its module only: a tied head and embedding are two places, filled from one tensor.
            setattr(owner, leaf, torch.nn.Parameter(tensor, requires_grad=False))

    def unload(self) -> None:
        """Free every piece, also those that stay."""
        if self._ahead is not None:
            self._ahead.close()
        for piece in tuple(self._loaded):
            self._drop(piece)
        self._spare.clear()

    # --- the pieces in order ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, windows: Sequence[Window]) -> Activations:
        """Boundary 1: what enters the first layer. Also records what the layers are called with.

        Before the first: raises UsageError for a model that is not its layers one after the other, see `prove`.
        """
        self.prove(windows)
        activations = self.room_for(windows)
        self._load(0)
        self._load(self._rest)
        with by_layers(self.checkpoint):
            for number, window in enumerate(windows):
                activations.window(number).copy_(self._record(self._ids(window.tokens)))
        self._free(0)
        self._free(self._rest)
        return activations

    def _ids(self, tokens: Any) -> torch.Tensor:
        return torch.from_numpy(tokens[:-1].copy())[None].to(self.device)  # (1, T)

    def _record(self, ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, (T, H), and into `_calls` what each layer is called with besides.

        The model's own forward with every layer replaced by a note of its arguments. Raises UsageError where something
        happens to the states between two layers, or the layers are not called once each in their order.
        """
        if self._returns is not None:
            entered, calls = self._noted(ids, self._returns)
        else:
            entered, calls = self._first_noted(ids)
        self._calls.setdefault(ids.shape[1], calls)
        return entered[0]

    def _first_noted(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """As `_noted`, by trying what a layer gives back: the model would fail on another kind of answer."""
        failed: Exception | None = None
        for count in TUPLES:
            try:
                found = self._noted(ids, count)
            except (LaserError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                failed = failed if isinstance(failed, LaserError) else error
                continue
            self._returns = count
            return found
        assert failed is not None
        raise failed

    def _noted(self, ids: torch.Tensor, returns: int) -> tuple[torch.Tensor, list[Call]]:
        calls: list[Call] = []
        entered: list[torch.Tensor] = []

        def note(layer: int, *args: Any, **kwargs: Any) -> Any:
            call, hidden = Call.split(args, kwargs)
            if layer != len(calls):
                raise not_by_layers(self.checkpoint, f"layer {layer} is called where layer {len(calls)} is expected")
            if calls and hidden is not entered[0]:
                raise not_by_layers(self.checkpoint, f"something is done to the states between two layers, at {layer}")
            calls.append(call)
            entered.append(hidden)
            if layer == self.layers - 1:
                raise _Enough
            return self._answer(hidden, returns)

        with self._layers_as(note), contextlib.suppress(_Enough):
            self.model(input_ids=ids, use_cache=False)
        if len(calls) != self.layers:
            raise not_by_layers(self.checkpoint, f"{len(calls)} of its {self.layers} layers are called")
        shape, expected = tuple(entered[0].shape), (1, ids.shape[1], *self._state)
        if not self._proved and len(shape) > 2 and shape[:2] == expected[:2]:
            self._state = shape[2:]
        elif shape != expected:
            raise not_by_layers(self.checkpoint, f"its layers take states of shape {shape}, expected {expected}")
        return entered[0].flatten(2), calls

    @staticmethod
    def _answer(hidden: torch.Tensor, returns: int) -> Any:
        """What a layer gives back around its states: see TUPLES."""
        return (hidden, *[None] * (returns - 1)) if returns else hidden

    @contextlib.contextmanager
    def _layers_as(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Inside, calling layer i is forward(i, ...)."""
        for number, block in enumerate(self.blocks):
            block.forward = functools.partial(forward, number)
        try:
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)  # the class's own again

    def _layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, H) through one decoder layer."""
        out = self._calls[len(hidden)][layer].of(self.blocks[layer], hidden.unflatten(1, self._state)[None])
        self.layer_forwards += 1
        return (out[0] if isinstance(out, tuple | list) else out)[0].flatten(1)

    @torch.no_grad()
    def run_layer(self, layer: int, activations: Activations) -> None:
        """All windows through one decoder layer, in place."""
        self._load(layer + 1)
        with by_layers(self.checkpoint):
            for number in range(len(activations.starts) - 1):
                hidden = activations.window(number)
                hidden.copy_(self._layer(layer, hidden.to(self.device)))
        self._free(layer + 1)

    @torch.no_grad()
    def score(self, activations: Activations, windows: Sequence[Window]) -> Scores:
        """Final norm, head and loss: what the scored tokens of each window cost."""
        self._load(self.layers + 1)
        self._load(self._rest)
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
        self._free(self._rest)
        return Scores(tuple(sums), tuple(greedy))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, V) by the model's own forward behind the layers, so that scaled or capped logits are right."""
        embedding = self.model.get_input_embeddings()
        empty = hidden.new_zeros(1, len(hidden), embedding.weight.shape[1])

        def pass_on(layer: int, *args: Any, **kwargs: Any) -> Any:
            states = hidden.unflatten(1, self._state)[None] if layer == self.layers - 1 else Call.split(args, kwargs)[1]
            return self._answer(states, self._returns or 0)

        embedding.forward = lambda *_, **__: empty
        try:
            with self._layers_as(pass_on):
                ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
                return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del embedding.forward

    # --- whether the pieces are the model --------------------------------------------------------------------------

    def check(self, windows: Sequence[Window]) -> None:
        """Raises UsageError for windows that the model has no positions or no embedding for; reads no weight."""
        longest = max(len(w.tokens) for w in windows)
        if longest > self._checked:
            check_windows(self.checkpoint, self.model, windows)
        if grown := grows_between(self.model, [len(w.tokens) - 1 for w in windows]):
            raise not_by_layers(
                self.checkpoint,
                f"rope_type dynamic treats two texts of {grown} tokens unlike, by the longest text before them",
            )
        self._checked = max(self._checked, longest)

    @torch.no_grad()
    def prove(self, windows: Sequence[Window]) -> None:
        """Hold the pieces against the model's own forward, once, on a few tokens of `windows`.

        The forward runs two texts at once, untouched but that each layer is loaded when it is called and freed behind.
        Before each of these calls the texts go through the layer one by one, as in a pass, and so does a third, the
        second with another last token, which must change no earlier prediction. What layers hand on by other ways than
        their states is then another text's, and shows. The cost is one more walk through the layers.
        Raises UsageError where the losses differ, with both, and for windows that the model has no positions for.
        """
        self.check(windows)
        if self._proved:
            return
        forwards = self.layer_forwards
        with by_layers(self.checkpoint):
            self._prove(windows)
        self.layer_forwards, self._proved = forwards, True

    def _prove(self, windows: Sequence[Window]) -> None:
        texts = probes(windows)
        self._load(0)
        self._load(self._rest)
        states = [self._record(self._ids(tokens)) for tokens in texts]
        visited: list[int] = []

        def visit(layer: int, *args: Any, **kwargs: Any) -> Any:
            del self.blocks[layer].forward  # from here on its own
            visited.append(layer)
            if layer == 0:
                self._free(0)
            self._load(layer + 1)
            # The layers are called as for the first text; it comes to them last, behind the others.
            for text in (1, 2, 0):
                states[text] = self._layer(layer, states[text])
            out = self.blocks[layer].forward(*args, **kwargs)
            self._returns = len(out) if isinstance(out, tuple | list) else 0
            self._free(layer + 1)
            if layer == self.layers - 1:
                self._load(self.layers + 1)
            return out

        with self._layers_as(visit):
            whole = self.model(input_ids=torch.cat([self._ids(t) for t in texts[:2]]), use_cache=False).logits
        if visited != list(range(self.layers)) or whole.device.type == "meta":
            raise not_by_layers(self.checkpoint, f"its forward calls the layers {visited[:9]}, expected each in order")
        layered = [torch.cat([self._logits(rows) for rows in s.split(PROBE_ROWS)]) for s in states]
        self._free(self.layers + 1)
        self._free(self._rest)
        self._calls.clear()
        targets = [torch.from_numpy(tokens[1:].copy()) for tokens in texts]
        for text in (0, 1):
            found, expected = (token_losses(x[text], targets[text])[0] for x in (layered, whole))
            if not same_logits(found, expected, self.dtype):
                raise not_by_layers(
                    self.checkpoint,
                    f"on {len(found)} tokens its layers one after the other give {float(found.mean()):.5f} nats per "
                    f"token, its own forward {float(expected.mean()):.5f}",
                )
        check_causal(self.checkpoint, layered[1], layered[2], self.dtype)

    @property
    def pieces(self) -> int:
        """Of a whole pass: the embedding, each layer, and the head."""
        return self.layers + 2

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
        if shared := [name for name in tensors if len(self._places_of(name)) > 1 or self.first_piece(name) == 0]:
            raise UsageError(f"{shared[0]} is used outside of the layers or in several; leave its role out")
        first = min(piece for piece, _, _ in wanted.values())
        upstream = self.room_for(windows)
        for piece in range(self.layers + 1, first - 1, -1):
            names = [name for name, place in wanted.items() if place[0] == piece]
            with self.held(*self.together(piece)):
                parameters = {wanted[name][1]: self._value(wanted[name][1]) for name in names}
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                self.run_back(piece, windows, boundaries[piece], upstream)
                for name in names:
                    _, parameter, part = wanted[name]
                    gradient = parameters[parameter].grad
                    if gradient is None:
                        gradient = torch.zeros_like(parameters[parameter])
                    own_part, whole = self._matrices[name].part, gradient[part.where].detach()
                    yield name, (own_part.of(whole) if own_part else whole).clone()
                for parameter in parameters.values():
                    parameter.grad = None
                    parameter.requires_grad_(False)
        self.store.free(upstream)

    def room_for(self, windows: Sequence[Window]) -> Activations:
        """Room for the states of every input of `windows`, or for the gradients at them."""
        return self.store.allocate([len(w.tokens) - 1 for w in windows], self.width, self.dtype)

    def run_back(self, piece: int, windows: Sequence[Window], boundary: Activations, upstream: Activations) -> None:
        """Through one piece, a layer or the head, which runs again from the states that enter it.

        `upstream`, in place: the gradient of the mean loss over all scored tokens, nats per token, at the states that
        leave the layer becomes that at those that enter it. What the head finds there does not count.
        """
        total = sum(w.scored for w in windows)
        with self.held(*self.together(piece)):
            for number, window in enumerate(windows):
                entering = boundary.window(number).to(self.device, copy=True).requires_grad_(True)
                with torch.enable_grad():
                    self._backward(piece, entering, window, upstream.window(number), total)
                assert entering.grad is not None
                upstream.window(number).copy_(entering.grad)

    def _backward(self, piece: int, entering: torch.Tensor, window: Window, upstream: torch.Tensor, total: int) -> None:
        if piece <= self.layers:
            self._layer(piece - 1, entering).backward(upstream.to(self.device))
            return
        targets = torch.from_numpy(window.tokens[-window.scored :])
        for start in range(0, window.scored, HEAD_ROWS):
            rows = entering[-window.scored :][start : start + HEAD_ROWS]
            losses, _ = token_losses(self._logits(rows), targets[start : start + HEAD_ROWS])
            (losses.sum() / total).backward()


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each target in nats (k,), float32 whatever the logits' dtype, and whether it is the largest logit.

    logits (k, V), targets (k,).
    """
    logits, targets = logits.float(), targets.to(logits.device)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
