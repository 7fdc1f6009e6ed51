"""Whether a model is a copy of another, smaller or not: asked before anything is calibrated or solved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from laser.checkpoint.fused import config_entry, number_or_none
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.compensate.places import ParameterPlace
from laser.compensate.rescaled import FOLLOWING, Rescaled, is_scaled_beyond, likeness, pairs
from laser.compensate.verdict import size_of
from laser.differences.difference import AGREE
from laser.errors import DoubtWarning, UsageError
from laser.spectral.correction import MovedScales

NOTHING_LIKE = 0.2  # cosine of a weight with its copy, as that of one cut to 4 % of its squares; of others it is near 0
ROWS_SEEN = 1024  # rows of an embedding that tell it from another, at the least
# What config.json says of a model's function that no weight shows, as this module asks for it
NUMBERS_ASKED = ("depth", "head", "key_value", "width", "num_experts_per_tok")
ENTRIES_ASKED = ("hidden_act", "hidden_activation", "rms_norm_eps", "layer_norm_eps", "sliding_window")
ROPE = ("rope_theta", "rope_parameters.rope_theta")
AS_THEY_ARE = ("embedding", "head", "router")  # roles of matrices that are as they are, corrected or not
LOOSE = ("scale", "buffer", "head", "embedding", "position")  # roles of what one may have and another not


def require_same_model(original: Checkpoint, copy: Checkpoint) -> None:
    """What config.json and headers say against a copy. Warns of tensors that the original has not.

    Raises UsageError for two that are swapped, another function, or a norm, bias, embedding or head that is missing.
    """
    _require_not_swapped(original, copy)
    _require_same_config(original, copy)
    _require_all_beside(original, copy)


def require_copy(original: Checkpoint, copy: Checkpoint, places: Sequence[ParameterPlace]) -> Rescaled:
    """The scales that were moved in a copy.

    Raises UsageError for a copy that is none: of the first, middle and last place nothing is like the original, all
    places are the original's, an embedding, head or router is another, or no weight makes up for a changed norm. Also
    as `require_same_matrix` of a place in each layer, and NumericalError for NaN or Inf in these places.
    """
    some = {place.name: place for place in (places[0], places[len(places) // 2], places[-1])}
    rescaled = Rescaled(original, copy)
    best = max(likeness(*rescaled.both(place)) for place in some.values())
    if best < AGREE:
        best = max(likeness(*rescaled.both(place), rescaled.of(place)) for place in some.values())
    if best < AGREE:
        raise UsageError(
            f"{copy.name} is no copy of {original.name}: the cosine of their weights is {best:.2f} at the most, "
            f"expected over {AGREE}; try the copy of this model"
        )
    _require_rest_alike(original, copy)
    if all(torch.equal(*rescaled.both(place)) for place in places):
        raise UsageError(
            f"{copy.name} lost nothing: all of the {len(places)} weights to correct are those of {original.name}; "
            "try the smaller copy, or other --roles"
        )
    rescaled.require_made_up_for()
    layers: dict[object, list[ParameterPlace]] = {}
    for place in places:
        layers.setdefault(place.matrices[0].place, []).append(place)
    for number, layer in enumerate(layers.values()):  # a place of each, another one each time; all are seen when solved
        place = layer[number % len(layer)]
        require_same_matrix(place, *rescaled.both(place), rescaled.of(place))
    return rescaled


def require_same_matrix(place: ParameterPlace, W: torch.Tensor, Q: torch.Tensor, scales: MovedScales | None) -> None:
    """Raises UsageError where a copy Q (m, n) of W with these scales is another matrix, though not nothing at all, or
    most of what it lost are other scales."""
    found = likeness(W, Q, scales)
    if found < NOTHING_LIKE and bool(Q.any()):
        raise UsageError(
            f"{place.name}: the copy's is another matrix, with a cosine of {found:.2f}, expected over {NOTHING_LIKE}; "
            "try the copy of this model"
        )
    if is_scaled_beyond(W, Q, scales):
        raise UsageError(
            f"{place.name}: the copy's rows or columns have scales of their own that laser cannot take back, "
            "expected the original's; try a copy whose scales stay where the original has them"
        )


def require_directions(rank: int | None, places: Sequence[ParameterPlace]) -> None:
    """Raises UsageError for a rank that no place has."""
    most = max(min(place.shape) for place in places)
    if rank is not None and rank > most:
        raise UsageError(f"found --rank {rank}, and no weight to correct has more than rank {most}; try --rank 8")


def _require_not_swapped(original: Checkpoint, copy: Checkpoint) -> None:
    """Raises UsageError where the original is packed and takes fewer bytes than a copy with plain weights."""
    if original.packed and not copy.packed and size_of(original) < size_of(copy):
        raise UsageError(
            f"{original.name} holds {original.packed} weights, and {copy.name} larger, plain ones, though the original "
            f"comes first; try laser compensate {copy.name} {original.name}"
        )


def _rope_factor(checkpoint: Checkpoint) -> float:
    """By how much positions are stretched. Where that stands, also by kind of layer, depends on what wrote the file."""
    found = config_entry(checkpoint.config, "rope_parameters") or config_entry(checkpoint.config, "rope_scaling")
    each = [found, *found.values()] if isinstance(found, Mapping) else []
    factors = [entry.get("factor") for entry in each if isinstance(entry, Mapping)]
    return max((float(factor) for factor in factors if isinstance(factor, int | float)), default=1.0)


def _require_same_config(original: Checkpoint, copy: Checkpoint) -> None:
    """Raises UsageError where both say what decides the function, and it is not the same."""

    def said(checkpoint: Checkpoint) -> dict[str, object]:
        numbers: dict[str, object] = {what: number_or_none(checkpoint.config, what) for what in NUMBERS_ASKED}
        theta = next((found for key in ROPE if (found := config_entry(checkpoint.config, key)) is not None), None)
        words: dict[str, object] = {what: config_entry(checkpoint.config, what) for what in ENTRIES_ASKED}
        return numbers | words | {"rope_theta": theta, "a rope factor": _rope_factor(checkpoint)}

    shown = {"depth": "layers", "head": "heads", "key_value": "heads of keys", "width": "numbers a head"}
    theirs = said(copy)
    for what, expected in said(original).items():
        if None not in (expected, theirs[what]) and theirs[what] != expected:
            raise UsageError(
                f"{copy.name}: config.json has {shown.get(what, what)}: {theirs[what]}, expected {expected} as in "
                f"{original.name}; try the copy of this model"
            )


def _require_rest_alike(original: Checkpoint, copy: Checkpoint) -> None:
    """Raises UsageError where an embedding, head or router, which is not corrected, is another matrix."""
    ours, theirs = list_matrices(original), list_matrices(copy)
    both = [(m, other) for m, other in pairs(ours, theirs) if m.role in AS_THEY_ARE and m.is_matrix]
    heads = [m for m in theirs if m.role == "head" and m.is_matrix and not m.stack]
    if not any(m.role == "head" for m in ours):  # it is tied: what the copy has for it is the embedding once more
        both += [(m, head) for m in ours if m.role == "embedding" and not m.stack for head in heads]
    for mine, other in both:
        if mine.shape != other.shape or mine.no_spectrum or other.no_spectrum:
            continue
        some = slice(None, None, max(mine.shape[0] // ROWS_SEEN, 1))
        found = likeness(original.read(mine.tensor, mine.part)[some], copy.read(other.tensor, other.part)[some])
        if found < NOTHING_LIKE:
            raise UsageError(
                f"{copy.name}: {other.name} is another matrix than {mine.name} of {original.name}, with a cosine of "
                f"{found:.2f}, expected over {NOTHING_LIKE}; try the copy of this model"
            )


def _require_all_beside(original: Checkpoint, copy: Checkpoint) -> None:
    """Raises UsageError where the copy lacks what is no matrix; warns of what it has that the original has not."""
    ours, theirs = list_matrices(original), list_matrices(copy)

    def only_of(some: Sequence[Matrix], checkpoint: Checkpoint, others: Sequence[Matrix]) -> list[Matrix]:
        """What is not zero, as the biases are that some tools add."""
        known = {m.name for m, _ in pairs(some, others)}
        apart = [m for m in some if m.name not in known and not m.stack]
        return [m for m in apart if bool(checkpoint.read(m.tensor, m.part).any())]

    there = {m.role for m in theirs if not m.stack}
    looked_up = [m for m in ours if m.role in ("embedding", "head") and not m.stack]
    if not any(m.role == "head" for m in looked_up) and "head" in there:
        looked_up = []  # of two that are tied one is stored, under either name
    missing = [m.tensor for m in looked_up if m.role not in there]
    if missing := [*missing, *(m.tensor for m in only_of(ours, original, theirs) if m.role in (*FOLLOWING, "sinks"))]:
        raise UsageError(
            f"{copy.name} has no {missing[0]}, which {original.name} has; try the whole copy of this model"
        )
    if more := [m.tensor for m in only_of(theirs, copy, ours) if m.role not in LOOSE]:
        warnings.warn(
            f"{copy.name}: {original.name} has none of {len(more)} tensors, such as {more[0]}; they are not corrected",
            DoubtWarning,
            stacklevel=2,
        )
