"""A budget goes by the gradients at outputs where the calibration has them, and says so; else by relative squares."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backward import squares_by_hand
from conftest import Run
from copies import write_models
from helpers import tensors_in
from pico_language import TEXT

from laser.checkpoint.reader import open_checkpoint
from laser.compensate.compensate import Request
from laser.compensate.places import ParameterPlace, find_places
from laser.evaluation.text import Text, cut_windows, load_tokenizer
from laser.moments import Moments
from laser.selection import Selection

WINDOWS = ("--window", 64, "--windows", 6, "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def made(run: Run, models: Path, kind: str, out: Path, *words: Any) -> dict[str, Any]:
    code, told, err = run("compensate", models / kind, models / f"{kind}-3", "-o", out, *words, "--json")
    assert code == 0, err
    return json.loads(told)


def expected_ranks(models: Path, kind: str, moments: Moments, bits: float) -> dict[str, int]:
    """By the whole model's own gradients and plain singular values; the dearest rank per bit first, one at a time.

    What a rank takes away of E||g^T e||^2 over all tokens: share of them * mean g^2 * s^2 of (W - Q) C^(1/2).
    """
    original, copy = open_checkpoint(models / kind), open_checkpoint(models / f"{kind}-3")
    windows = cut_windows(Text("text", TEXT), load_tokenizer(original.path), length=64, limit=6)
    gradients, places = squares_by_hand(original, windows.windows), find_places(original, copy, Selection()).places
    weights = sum(place.shape[0] * place.shape[1] for place in places)
    most = Request(bits=bits).solved(places)
    bought: dict[str, list[torch.Tensor]] = {}

    def worth(place: ParameterPlace) -> torch.Tensor:
        W, Q = place.read(original).double(), place.read(copy, copied=True).double()
        name = place.matrices[0].name
        if not moments.tokens(name):
            return torch.zeros(0)
        whole = moments.metric(name, original.read(place.matrices[0].tensor)).moment
        values, vectors = torch.linalg.eigh(whole)
        s = torch.linalg.svdvals((W - Q) @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T)
        sizes = {m.name: m.shape[0] for m in place.matrices}
        mean = sum(gradients[n] * m for n, m in sizes.items()) / sum(sizes.values())
        return s[:most].square() * mean * moments.tokens(name) / moments.calibration.tokens

    for place in places:
        bought.setdefault(place.parameter, []).append(worth(place))
    shapes = {place.parameter: (sum(place.shape), place.experts) for place in places}
    left, ranks, queue = bits * weights, dict.fromkeys(bought, 0), []
    for name, each in bought.items():
        gains = torch.nn.utils.rnn.pad_sequence(each).sum(1)
        cost = 16 * shapes[name][0] * shapes[name][1]
        queue += [(float(gain) / cost, name, cost) for gain in gains]
    full = set[str]()
    for _, name, cost in sorted(queue, reverse=True):
        if name not in full and cost <= left:
            ranks[name], left = ranks[name] + 1, left - cost
        else:
            full.add(name)
    return ranks


@pytest.mark.parametrize("kind, bits", [("llama", 3), ("mixtral", 2)])
def test_a_budget_is_spent_where_the_loss_minds_most(
    run: Run, models: Path, tmp_path: Path, kind: str, bits: float
) -> None:
    text = ("--text", models / "text.txt", *WINDOWS)
    found = made(run, models, kind, tmp_path / "a", *text, "--bits", bits)
    code, _, err = run("calibrate", models / kind, "-o", tmp_path / "m", *text, "--gradients", "--ledoit-wolf")
    assert code == 0, err
    moments = Moments.load(tmp_path / "m")
    ranks = expected_ranks(models, kind, moments, bits)
    of_entries: dict[str, int] = {}
    for entry in found["entries"]:
        parameter = entry["name"].partition("[")[0]
        of_entries[parameter] = max(of_entries.get(parameter, 0), entry["rank"])
    differ = {name for name, rank in ranks.items() if rank != of_entries.get(name, 0)}
    assert not differ and len(set(ranks.values())) > 2
    assert found["by_gradients"] is True
    assert "spent by the loss's gradients at the outputs" in (tmp_path / "a" / "README.md").read_text()


def test_moments_with_gradients_are_gone_by_and_others_are_not(run: Run, models: Path, tmp_path: Path) -> None:
    text, felt, plain = ("--text", models / "text.txt", *WINDOWS), tmp_path / "felt", tmp_path / "plain"
    for path, words in ((felt, ("--gradients",)), (plain, ())):
        assert run("calibrate", models / "llama", "-o", path, *text, *words)[0] == 0
    words = ("--bits", 3, "--device", "cpu")
    by_text = made(run, models, "llama", tmp_path / "t", *text, "--bits", 3)
    by_felt = made(run, models, "llama", tmp_path / "f", "--moments", felt, *words)
    by_plain = made(run, models, "llama", tmp_path / "p", "--moments", plain, *words)
    for words_, by in (((*text, "--bits", 3), "loss's gradients"), (("--moments", plain, *words), "share of each")):
        code, told, err = run(
            "compensate", models / "llama", models / "llama-3", "-o", tmp_path / "d", *words_, "--dry-run"
        )
        assert code == 0 and f"the budget would be spent by the {by}" in told + err
        assert ("for the gradients the text runs back: 0.0" in told + err) is (words_[0] == "--text")
    adapters = [tensors_in(tmp_path / name) for name in "tfp"]
    assert all(torch.equal(adapters[0][n], W) for n, W in adapters[1].items())
    assert by_text["entries"] == by_felt["entries"] != by_plain["entries"]
    assert by_felt["by_gradients"] and "by_gradients" not in by_plain and "by" not in by_plain["run"]
    assert "spent by the share of each output's own size" in (tmp_path / "p" / "README.md").read_text()
    same = made(run, models, "llama", tmp_path / "r", "--moments", felt, "--rank", 2, "--device", "cpu")
    assert "by_gradients" not in same and "spent" not in (tmp_path / "r" / "README.md").read_text()
    code, out, err = run(
        "compensate", models / "llama", models / "llama-3", "-o", tmp_path / "s", "--moments", felt, *words
    )
    assert code == 0 and "bits per weight, spent by the loss's gradients at the outputs; written to" in out + err
