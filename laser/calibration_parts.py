"""What an unfinished calibration keeps in OUTPUT.partial/: files of sites, and the states before the next layer.

Where gradients are asked for, also those at the outputs of the layers that were walked back, and at the states that
enter the last of these.

Every file carries a checksum of all that is in it, and says which calibration it belongs to. One that is not as it was
written, or belongs to another, is as good as missing: its layer is run again, and no other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from laser.checkpoint.safetensors import join, read_header
from laser.checkpoint.slices import tensor_sha256
from laser.checkpoint.source import Source
from laser.errors import CheckpointError, DoubtWarning, OutputError, RecordError, first_line, is_out_of_memory
from laser.evaluation.activations import Activations
from laser.files import PASSING, disk_errors, require_regular, write_atomically
from laser.moments import Calibration, MomentsHeader, Site
from laser.records import decode, differences, fingerprint_in, has_shape, parse_record, plain

STATES, GRADIENTS = "states.safetensors", "gradients.safetensors"
OF_SITES = {"sites": tuple[Site, ...], "layer": int, "number": int, "of": int}  # beside the run

_OWN = re.compile(r"(layer-\d{5}-\d{5}|states|gradients)\.safetensors")  # what lies in a partial directory


def _is_foreign(path: Path) -> bool:
    """Whether laser did not write this: by its name, or since it is no file, or safetensors that say nothing of it."""
    if not (_OWN.fullmatch(path.name) or PASSING.fullmatch(path.name)) or path.is_symlink() or not path.is_file():
        return True
    if path.suffix != ".safetensors":
        return False
    try:
        header = json.loads(read_header(path).header[8:])
    except CheckpointError:
        return False  # damaged: whose it was is not to be seen
    known = {"run", "check", "sites", "number", "of", "boundary", "squares"}
    return not known & header.get("__metadata__", {}).keys()


class Parts:
    """The files of one calibration `run` in the directory `partial`, which is made.

    Raises RecordError where it holds the states of another calibration, or more than one layer; files of another that
    got no further than its first layer are removed, with a DoubtWarning.
    """

    def __init__(self, partial: Path, run: Mapping[str, Any], anew: bool = False) -> None:
        self.partial, self.run = partial, dict(run)
        if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
            raise OutputError(f"{partial} is in the way: a directory of that name is needed; move it away")
        with disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
            if foreign := sorted(p.name for p in partial.iterdir() if _is_foreign(p)):
                raise OutputError(f"{partial} holds {foreign[0]}, which laser did not write; move it away")
        stated = {
            file: found
            for file in (partial / STATES, partial / GRADIENTS, *self._files())
            if (found := self._header_of(file))
        }
        others = [found for found in stated.values() if differences(found["run"], run)]
        own = {file: found for file, found in stated.items() if found not in others}
        if others and not anew:
            models = [f"{run_.get('model')} ({fingerprint_in(run_).short})" for run_ in (others[0]["run"], run)]
            why = (
                f"{partial} belongs to another calibration, begun with {models[0]}, found {models[1]}: "
                f"{', '.join(differences(others[0]['run'], run))} differ"
            )
            if any("boundary" in found for found in others) or len({found["layer"] for found in others}) > 1:
                raise RecordError(f"{why}; repeat its command, or try --force")
            warnings.warn(f"{why}; it got no further than its first layer, and begins anew", DoubtWarning, stacklevel=3)
        self.others = bool(others)  # whether it held work of another calibration
        # The layer that the states there enter.
        self.boundary: int = own.pop(partial / STATES, {"boundary": 0})["boundary"]
        # By matrix, the gradients at the outputs of all layers from `walked_back` on; None before any was.
        back = own.pop(partial / GRADIENTS, None)
        self.walked_back: int | None = None if back is None else back["boundary"]
        self.squares: dict[str, float] = {} if back is None else back["squares"]
        self.layers = self._whole_layers(own)

    def drop(self) -> None:
        """Forget what was made of weights that changed meanwhile."""
        with disk_errors(self.partial):
            shutil.rmtree(self.partial)

    def _whole_layers(self, own: Mapping[Path, Mapping[str, Any]]) -> set[int]:
        """Layers of which every file is there; what belongs to none of them is removed. own: what this run's say."""
        found: dict[int, dict[int, int]] = {}
        for file, stated in own.items():
            if file == self._file(stated["layer"], stated["number"]):
                found.setdefault(stated["layer"], {})[stated["number"]] = stated["of"]
        whole = {layer for layer, sites in found.items() if {len(sites)} == set(sites.values())}
        for file in self._files():
            if file not in {self._file(layer, number) for layer in whole for number in found[layer]}:
                with disk_errors(file):
                    file.unlink()
        return whole

    def _files(self) -> list[Path]:
        return sorted(self.partial.glob("layer-*.safetensors"))

    def _file(self, layer: int, number: int) -> Path:
        return self.partial / f"layer-{layer:05d}-{number:05d}.safetensors"

    def _header_of(self, path: Path) -> dict[str, Any] | None:
        """What the metadata of a file say that is as it was written; None for any other, or none."""
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                stated = dict(file.metadata() or {})
                check = stated.pop("check", "")
                if check != _part_sum(stated, {name: file.get_tensor(name) for name in file.keys()}):
                    return None
            known = {key: parse_record(stated[key]) for key in stated}
            of_sites = path.name not in (STATES, GRADIENTS)
            shape = {"run": dict} | (OF_SITES if of_sites else {"boundary": int})
            shape |= {"squares": dict[str, float]} if path.name == GRADIENTS else {}
            if not has_shape(known, shape) or known.get("boundary", 0) < 0:
                return None
            return known
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):  # which says nothing of the file
                raise
            return None

    def _write(self, path: Path, stated: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        stated = stated | {"run": json.dumps(self.run)}
        write_atomically(path, save(tensors, metadata=stated | {"check": _part_sum(stated, tensors)}))

    def save_sites(
        self, layer: int, sites: Sequence[Site], tensors: dict[str, torch.Tensor], number: int, of: int
    ) -> None:
        """These sites of a layer, as file `number` of its `of`."""
        stated = {"sites": json.dumps([plain(site) for site in sites])}
        stated |= {"layer": str(layer), "number": str(number), "of": str(of)}
        self._write(self._file(layer, number), stated, tensors)

    def save_states(self, boundary: int, states: Activations) -> None:
        """What enters the layer `boundary`."""
        self._write(self.partial / STATES, {"boundary": str(boundary)}, {"states": states.hidden})
        self.boundary = boundary

    def load_states(self, states: Activations) -> int:
        """Fills `states` with what enters the layer that it returns."""
        self._load(STATES, states)
        return self.boundary

    def save_gradients(self, layer: int, upstream: Activations, squares: Mapping[str, float]) -> None:
        """Of a layer that was walked back: at the states that enter it, and at its matrices' outputs."""
        self.walked_back, self.squares = layer, {**self.squares, **squares}
        stated = {"boundary": str(layer), "squares": json.dumps(self.squares)}
        self._write(self.partial / GRADIENTS, stated, {"states": upstream.hidden})

    def load_gradients(self, upstream: Activations) -> int | None:
        """Fills `upstream` with what is at the states that enter the layer that it returns; None before any."""
        if self.walked_back is not None:
            self._load(GRADIENTS, upstream)
        return self.walked_back

    def _load(self, name: str, states: Activations) -> None:
        try:
            with safe_open(self.partial / name, framework="pt") as file:
                there = file.get_tensor("states")
        except (SafetensorError, OSError) as error:
            message = first_line(error)
            raise RecordError(f"{self.partial / name} cannot be read ({message}); start afresh with --force") from error
        if there.shape != states.hidden.shape or there.dtype != states.hidden.dtype:
            raise RecordError(
                f"{self.partial / name} holds {there.dtype} of shape {list(there.shape)}, expected "
                f"{states.hidden.dtype} of {list(states.hidden.shape)}; start afresh with --force"
            )
        states.hidden.copy_(there)

    def join(self, path: Path, source: Source, whole: dict[str, Any]) -> None:
        """The sites' files as one at `path`, with the record that tells of them, and of gradients if there are any."""
        digest, sites, hashes = hashlib.sha256(), list[Site](), dict[str, str]()
        for file in self._files():
            with safe_open(file, framework="pt") as opened:
                stated = parse_record((opened.metadata() or {})["sites"])
                found = decode(OF_SITES["sites"], stated, str(file), "start afresh with --force")
                here = {name: tensor_sha256(opened.get_tensor(name)) for name in opened.keys()}
            for site in found:
                if self.walked_back is not None:  # what met no token has none
                    site = replace(site, gradients=tuple(self.squares.get(name, 0.0) for name in site.matrices))
                its = sorted((name, here[name]) for name in here.keys() & set(site.arrays))
                digest.update(json.dumps([plain(site), its]).encode())
                hashes |= its
                sites.append(site)
        digest.update(json.dumps([source.identity, source.weights.stated(), whole]).encode())
        header = MomentsHeader(
            source, Calibration(identity=digest.hexdigest(), **whole), self.run, tuple(sites), hashes
        )
        join(self._files(), path, header.metadata)


def _part_sum(stated: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    named: Sequence[Any] = [(n, str(t.dtype), list(t.shape), tensor_sha256(t)) for n, t in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([sorted(stated.items()), named]).encode()).hexdigest()
