"""calibrate: run a text through the model and keep the second moments of each matrix's inputs.

In memory are one layer, its moments and the states between two layers. After each layer its moments and the states are
on the disk in OUTPUT.partial/, so a calibration that was killed goes on with the next layer (calibration_parts.py). The
end of it joins those files to one, byte by byte, whatever their size.

A product of some hundred inputs is float32, as the inputs are; the sums over the text are float64.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from laser.calibration_parts import Parts
from laser.checkpoint.matrices import DoubtWarning, Matrix, list_matrices
from laser.checkpoint.reader import Checkpoint, by_whole_shards
from laser.checkpoint.source import Source, require_unchanged
from laser.choices import WINDOW
from laser.differences.opened import opened_model
from laser.errors import CheckpointError, NumericalError, UsageError, not_finite
from laser.evaluation.activations import Activations
from laser.evaluation.evaluate import check_vocabulary
from laser.evaluation.gradients import gradients_at_outputs
from laser.evaluation.streaming import LayeredModel
from laser.evaluation.taps import SharedInput, Tap, run_one_expert_at_a_time
from laser.evaluation.text import Text, Windows, windows_named
from laser.files import tidy_up, unfinished
from laser.moments import Moments, MomentsHeader, Site, fingerprint, to_correlations
from laser.selection import Selection
from laser.spectral.devices import full_precision

# Inputs of at most this width get their whole moment: 128 MiB in float64. Wider ones (w2 of Mixtral: 14336) are known
# by the moment of their outputs.
FULL_SIDE = 4096
NUMBERS_IN_A_FILE = 4 << 20  # numbers of moments that one file takes: 16 to 32 MiB of a layer that is not finished
GATHERED_ROWS = 1024  # inputs that are gathered before they are multiplied: thin products would wait for memory


class Accumulator:
    """The unfinished sums of one site."""

    def __init__(self, shared_input: SharedInput, form: str) -> None:
        self.input, self.form, self.names = shared_input, form, shared_input.names
        self.tokens, self.side, self.fourth_ = 0, 0, 0.0
        self.total_: torch.Tensor | None = None  # (k, k) or (k,), float64
        self._waiting: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Inputs x (T, n) and outputs y (T, m)."""
        self.tokens += len(x)
        if self.form == "outputs":
            x = y[:, self.input.rows[0]]
        self.side = x.shape[1]
        self._waiting.append(x.detach().clone())
        if sum(map(len, self._waiting)) >= GATHERED_ROWS:
            self.flush()

    @property
    def size(self) -> int:
        """Numbers that it has once it is finished."""
        return self.side if self.form == "diagonal" else self.side**2

    def flush(self) -> None:
        if not self._waiting:
            return
        z = torch.cat(self._waiting)
        dtype, z = z.dtype, z.float()
        self._waiting.clear()
        # Not every device has float64: what is added up over the text is added up on the host.
        self.fourth_ += float(z.square().sum(1).cpu().double().square().sum())
        part = z.square().sum(0) if self.form == "diagonal" else z.T @ z
        if not torch.isfinite(part).all():
            raise NumericalError(
                f"the input of {self.input.names[0]} is not finite: the activations overflow or the weights hold NaN; "
                f"{not_finite(dtype, '--dtype float32 and --force')}"
            )
        part = part.cpu()
        self.total_ = part.double() if self.total_ is None else self.total_.add_(part)

    def finish(self, layer: int, weights: tuple[str, ...]) -> tuple[Site, dict[str, torch.Tensor]]:
        """The site and its tensors, means over the tokens; no tensors where there were none."""
        self.flush()
        fourth = self.fourth_ / max(self.tokens, 1)
        site = Site(self.input.names[0], layer, self.form, self.tokens, fourth, self.names, weights)
        if self.total_ is None:
            return site, {}
        mean = self.total_ / self.tokens
        if self.form == "diagonal":
            return site, {site.arrays[1]: mean}
        return site, dict(zip(site.arrays, to_correlations(mean), strict=True))


def calibrate(
    checkpoint: Checkpoint | str | Path,
    windows: Windows | Text | str | Path,
    path: str | Path,
    selection: Selection | None = None,
    *,
    window: int = WINDOW,
    limit: int | None = None,
    diagonal: bool = False,
    shrink: bool = False,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    full_side: int = FULL_SIDE,
    wide: str = "outputs",
    few: bool = False,
    gradients: bool = False,
    anew: bool = False,
    tick: Callable[[int], None] = lambda _: None,
    expect: Callable[[int], None] = lambda _: None,
) -> Moments:
    """Write to `path` the moments that the selected matrices of `checkpoint` need, over all inputs of `windows`.

    windows: cut already, or a text, or its file, of which `limit` windows of `window` tokens are taken.
    diagonal: only the diagonal of C, cheap and small, as ASVD goes by.
    shrink: shrink the moments when they are used (Ledoit-Wolf), for texts with fewer tokens than dimensions.
    full_side: see FULL_SIDE.
    wide: what is kept of inputs wider than that. It is the moment of their "outputs", or their "diagonal".
    few: also for a text with fewer tokens than dimensions; whoever uses the moments has to shrink them.
    gradients: keep also the mean square gradient at each matrix's outputs, by one pass back over the text.
    `anew` drops the partial work of another
    calibration. A calibration that was killed when all but tidying up was done is found whole.
    `tick` is called with each layer, and before them `expect` with how many these will be.
    Raises UsageError for a selection that matches nothing or a text with fewer tokens than any matrix has
    dimensions, NumericalError naming the matrix whose input holds NaN or Inf, RecordError for a partial run of another
    kind.
    """
    selection, checkpoint, path = selection or Selection(), opened_model(checkpoint), Path(path)
    windows = windows_named(windows, checkpoint.path, window, limit)
    matrices = list_matrices(checkpoint)
    selection.check(matrices)
    check_vocabulary(checkpoint, windows)
    checkpoint = by_whole_shards(checkpoint)
    model = LayeredModel(checkpoint, dtype=dtype, device=device)
    model.check(windows.windows)
    # What the model does not run sees no input: MTP layers, leftover heads, towers of other modalities.
    layers = {m.name: model.layer_of(m.name) for m in matrices if selection.why_not(m) is None}
    chosen = [m for m in matrices if layers.get(m.name) is not None]
    if not chosen:
        raise UsageError("the selection holds no matrix of a decoder layer; try --roles w1,w2,w3,q,k,v,o")
    tokens = sum(len(w.tokens) - 1 for w in windows.windows)
    lenient = shrink or diagonal or few
    _check_length(chosen, tokens, windows, lenient)
    named = {m.name: m for m in chosen}
    by_layer: dict[int, list[Matrix]] = {}
    for matrix in chosen:
        by_layer.setdefault(layers[matrix.name] or 0, []).append(matrix)
    first = min(by_layer)
    source = Source.of(checkpoint)
    run = {
        **source.stated(),
        "windows": windows.sha256,
        "selection": selection.describe(),
        "options": [
            *(diagonal, shrink, dtype, full_side),
            *([wide] if wide != "outputs" else []),
            *(["gradients"] if gradients else []),
        ],
        "version": MomentsHeader.version,  # of what lies there
    }
    partial = unfinished(path)
    begun = partial.exists()
    parts = Parts(partial, run, anew)
    if begun and not parts.others and (made := Moments.found_again(run, path)):  # killed or stopped while it tidied up
        tidy_up(partial, path)
        return made
    run_one_expert_at_a_time(model)
    states = model.embed(windows.windows)
    todo = by_layer.keys() - parts.layers
    layer = 0
    if parts.boundary and not any(left < parts.boundary for left in todo):
        layer = parts.load_states(states)
    end = model.layers if parts.walked_back is None else parts.walked_back  # of what gradients are still asked for
    expect(max((left + 1 - layer for left in todo), default=0) + gradients * (2 * end - first) * (end > first))
    while any(layer <= left for left in todo):
        if layer in todo:
            sites = _run_layer(model, layer, by_layer[layer], states, diagonal, full_side, wide)
            if layer == first and not lenient:
                _check_experts(sites, named, windows)
            # Before anything is kept that was made of it. Bytes are looked at in the end: at each layer all 45,000
            # matrices of 61 layers would take longer than to run them.
            require_unchanged(checkpoint, stamps_only=True)
            batches = _batches(sites)
            for number, batch in enumerate(batches):
                parts.save_sites(layer, *_finished_sites(batch, layer, checkpoint, named), number, len(batches))
        else:
            model.run_layer(layer, states)
        tick_of, layer = layer, layer + 1
        if layer > parts.boundary:
            parts.save_states(layer, states)
        elif not any(layer <= left < parts.boundary for left in todo):  # what was lost is there again
            layer = parts.load_states(states)
        tick(tick_of)
    model.store.free(states)
    if gradients:
        upstream = model.room_for(windows.windows)
        begun = parts.load_gradients(upstream)
        for layer, squares in gradients_at_outputs(model, windows.windows, by_layer, upstream, begun, tick):
            require_unchanged(checkpoint, stamps_only=True)
            parts.save_gradients(layer, upstream, squares)
    try:
        require_unchanged(checkpoint)
    except CheckpointError:
        parts.drop()  # of layers that were read while the weights changed
        raise
    whole = {"text": windows.text, "text_sha256": windows.text_sha256, "windows_sha256": windows.sha256}
    whole |= {"window": windows.length, "windows": len(windows.windows), "tokens": tokens}
    whole |= {"dtype": dtype, "shrink": shrink, "diagonal": diagonal}
    parts.join(path, source, whole)
    tidy_up(partial, path)
    return Moments.load(path)


def _batches(sites: list[Accumulator]) -> list[list[Accumulator]]:
    """What goes to one file of `sites`, which is emptied: one that is large, or hundreds of a layer's small experts."""
    batches, size = list[list[Accumulator]](), NUMBERS_IN_A_FILE
    while sites:
        site = sites.pop(0)
        size += site.size
        if size > NUMBERS_IN_A_FILE:
            batches.append([])
            size = site.size
        batches[-1].append(site)
    return batches


def _finished_sites(
    batch: list[Accumulator], layer: int, checkpoint: Checkpoint, named: Mapping[str, Matrix]
) -> tuple[list[Site], dict[str, torch.Tensor]]:
    """The sites of a batch and their tensors; `batch` is emptied, so that a layer's moments are in memory once."""
    sites, tensors = list[Site](), dict[str, torch.Tensor]()
    while batch:
        accumulator = batch.pop(0)
        weights = (checkpoint.read(named[n].tensor, named[n].part) for n in accumulator.names)
        site, its = accumulator.finish(layer, tuple(map(fingerprint, weights)))
        sites.append(site)
        tensors |= its
    return sites, tensors


def _check_length(chosen: Sequence[Matrix], tokens: int, windows: Windows, lenient: bool) -> None:
    smallest = min(min(m.shape) for m in chosen)
    if tokens < smallest and not lenient:
        raise UsageError(
            f"{windows.text} gives {tokens} tokens, and the smallest of these matrices has {smallest} dimensions: no "
            "matrix can be seen from all sides; try more --windows or a longer --text, or --ledoit-wolf"
        )


def _check_experts(sites: Sequence[Accumulator], named: Mapping[str, Matrix], windows: Windows) -> None:
    """After the first layer, since the others get about as many: the rest may take hours."""
    seen = [(site.tokens, named[n]) for site in sites for n in site.names if named[n].expert is not None]
    if seen and all(tokens < min(matrix.shape) for tokens, matrix in seen):
        most, matrix = max(seen, key=lambda pair: pair[0])
        raise UsageError(
            f"{windows.text} is too short: no expert of layer {matrix.layer} has seen as many tokens as it has "
            f"dimensions, found {most} at the most, expected {min(matrix.shape)}; try more --windows, a longer --text, "
            "--ledoit-wolf, or --roles q,k,v,o"
        )


def _run_layer(
    model: LayeredModel,
    layer: int,
    here: Sequence[Matrix],
    states: Activations,
    diagonal: bool,
    full_side: int,
    wide: str,
) -> list[Accumulator]:
    """All windows through one layer, and the inputs that its matrices have seen there, also of those that saw none."""
    shapes = {m.name: m.shape for m in here}
    sites: list[Accumulator] = []
    # Empty list: these matrices share another site's input tensor, whose accumulator already counts it.
    leaders: dict[tuple[str, ...], list[Accumulator]] = {}
    # q, k and v get the very same tensor, one after the other. The last few inputs are kept alive, or another tensor
    # might get the memory of one that was freed.
    recent: deque[tuple[torch.Tensor, Accumulator]] = deque(maxlen=4)

    def listen(shared_input: SharedInput, x: torch.Tensor, y: torch.Tensor) -> None:
        if shared_input.names not in leaders:
            shared = [s for t, s in recent if t.data_ptr() == x.data_ptr() and t.shape == x.shape]
            if shared and shared[0].form != "outputs":
                shared[0].names += shared_input.names
                leaders[shared_input.names] = []
            else:
                tall = any(shapes[name][0] >= shapes[name][1] for name in shared_input.names)
                form = "diagonal" if diagonal else "full" if tall or x.shape[1] <= full_side else wide
                # Parts of a fused tensor share their inputs, and not their outputs.
                parts = (
                    [SharedInput((n,), (r,)) for n, r in zip(shared_input.names, shared_input.rows, strict=True)]
                    if form == "outputs"
                    else [shared_input]
                )
                leaders[shared_input.names] = [Accumulator(part, form) for part in parts]
                sites.extend(leaders[shared_input.names])
        for site in leaders[shared_input.names]:
            site.add(x, y)
            recent.append((x, site))

    with full_precision(), Tap(model, layer, here, listen):
        model.run_layer(layer, states)
    seen = {name for site in sites for name in site.names}
    unseen = [m for m in here if m.name not in seen]
    if unheard := [m.name for m in unseen if m.expert is None]:  # an expert may really have seen nothing
        warnings.warn(
            f"{len(unheard)} matrices of layer {layer}, such as {unheard[0]}, are multiplied in a way that cannot be "
            "followed, so their inputs are not in the moments",
            DoubtWarning,
            stacklevel=2,
        )
    return sites + [Accumulator(SharedInput((m.name,), ()), "full") for m in unseen if m.expert is not None]
