"""The null test for users, and the list of numbers per matrix with the files that other tools read."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import by_axolotl, by_scripts

import laser
from laser.errors import RecordError, UsageError
from laser.null import null_test
from laser.pipeline import scan
from laser.selection import Selection
from laser.spectra import Spectra
from laser.spectral.permutation import permuted
from laser.spectral.rules import apply_rule
from laser.summary import Summary, SummaryRow, summarise


def test_counts_are_those_of_permuting_by_hand(pico: Path) -> None:
    checkpoint, chosen = laser.open_checkpoint(pico), Selection(roles=("w1",), layers=(0,))
    test = null_test(checkpoint, chosen, rules=("laser-rmt", "gavish-donoho"), draws=2)
    by_hand = []
    for expert in range(4):
        W = checkpoint.read(f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight")
        for seed in (0, 1):
            s = torch.linalg.svdvals(permuted(W, seed).double()).numpy()
            by_hand.append(apply_rule("laser-rmt", s, (48, 32)).rank)
    row = test.rows[0]
    assert (row.rule, row.role, row.matrices, row.most_kept) == ("laser-rmt", "w1", 4, max(by_hand))
    assert row.mean_kept == pytest.approx(np.mean(by_hand))
    assert row.share_kept == pytest.approx(np.mean(by_hand) / 32)
    assert row.found is None


@pytest.mark.slow
def test_rules_find_about_nothing_but_laser_rmt_does(pico: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    spectra = scan(checkpoint, null_draws=19)
    rules = ("laser-rmt", "mp-edge", "tracy-widom:0.05", "bema", "parallel:0.2")
    test = null_test(checkpoint, rules=rules, spectra=spectra)
    roles = ("w1", "w2", "w3", "q", "k", "v", "o")
    assert {(row.rule, row.role) for row in test.rows} == {(rule, role) for rule in rules for role in roles}
    for row in test.rows:
        assert row.found is not None and row.found > 1  # the pico model's three spikes
        if row.rule == "laser-rmt":
            assert row.share_kept > 0.2
        else:
            # Of 3,600 permutations of w1 mp-edge keeps 3 and more in 2 %, by this order and by NumPy's shuffle.
            assert row.mean_kept <= 1 and row.most_kept <= 3
    assert json.loads(test.to_json())["rows"][0]["rule"] == "laser-rmt"


@pytest.mark.slow
def test_row_permutation_keeps_the_rows_variances(make_pico: Callable[..., Path]) -> None:
    random = np.random.default_rng(0)
    W = random.standard_normal((200, 80)) * np.geomspace(1, 30, 200)[:, None] ** 0.5
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.from_numpy(W.astype(np.float32))}
    checkpoint = laser.open_checkpoint(make_pico(tensors=tensors, shards=1))
    kept = {
        kind: {r.rule: r.mean_kept for r in null_test(checkpoint, rules=("mp-edge", "bema"), permutation=kind).rows}
        for kind in ("entries", "rows")
    }
    # Shuffled over the matrix it is plain noise; with its rows it looks like signal to the law of equal variances.
    assert kept["entries"]["mp-edge"] <= 2 < kept["rows"]["mp-edge"]
    assert kept["rows"]["bema"] <= 2


def test_a_matrix_that_is_not_finite_is_named(make_pico: Callable[..., Path]) -> None:
    tensors = {f"model.layers.0.self_attn.{r}_proj.weight": torch.ones(8, 8) * torch.arange(8.0) for r in "qk"}
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = math.nan
    test = null_test(laser.open_checkpoint(make_pico(tensors=tensors, shards=1)), rules=("mp-edge",))
    assert [row.role for row in test.rows] == ["q"]
    assert "not finite" in test.skipped["model.layers.0.self_attn.k_proj.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"draws": 0}, "try --draws 1"), ({"permutation": "columns"}, "entries, rows"), ({"rules": ("mp",)}, "no rule")],
)
def test_null_tests_that_make_no_sense(pico: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        null_test(laser.open_checkpoint(pico), **options)  # pyright: ignore[reportArgumentType]


def test_spectra_of_another_checkpoint_are_refused(pico: Path, make_pico: Callable[..., Path]) -> None:
    other = scan(laser.open_checkpoint(make_pico(rope_theta=5.0)), Selection(roles=("q",)))
    with pytest.raises(RecordError, match="make the spectra again"):
        null_test(laser.open_checkpoint(pico), spectra=other)


# --- summary ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spectra(pico: Path) -> Spectra:
    return scan(laser.open_checkpoint(pico), Selection(layers=(0, 1)))


def strict(text: str | bytes) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_summary_is_one_row_per_scanned_matrix(spectra: Spectra) -> None:
    summary = summarise(spectra, "gavish-donoho")
    assert [row.name for row in summary.rows] == list(spectra.values)
    for row in summary.rows:
        s = spectra.values[row.name]
        assert row.largest == s[0] and row.full_rank == len(s) == min(row.rows, row.columns)
        assert row.rank == np.count_nonzero(s > (row.threshold or 0.0))
        assert row.snr == pytest.approx(s[: row.rank].sum() / s[row.rank :].sum())
        assert row.snr_over_largest == pytest.approx((row.snr or 0) / s[0])
        assert 0 <= row.lower_edge < row.upper_edge < row.largest
        assert (row.lower_edge == 0) == (row.rows == row.columns)
        assert 0.03 < row.sigma < 0.08 and 0 < row.sigma_error < 0.01  # the pico model's noise has 0.05


def test_csv_and_json_say_the_same(spectra: Spectra) -> None:
    summary = summarise(spectra)
    table = list(csv.DictReader(summary.to_csv().splitlines()))
    document = strict(summary.to_json())
    assert isinstance(document, dict) and len(table) == len(document["rows"]) == len(spectra.values)
    for line, row in zip(table, document["rows"], strict=True):
        assert line.keys() == row.keys()
        assert all(line[key] == ("" if value is None else str(value)) for key, value in row.items())


def test_undefined_scores_are_left_out_and_never_infinite(spectra: Spectra) -> None:
    whole = summarise(spectra, "fraction:1")  # everything kept: no value at or below a threshold, no ratio
    assert all(row.snr is None for row in whole.rows)
    assert strict(whole.snr_json()) == {}
    assert whole.unfrozen_yaml(50).count("- ^") == 2


def test_snr_file_is_the_one_that_spectrum_reads(spectra: Spectra) -> None:
    document = strict(summarise(spectra, "laser-rmt").snr_json())
    assert isinstance(document, dict) and len(document) == len(spectra.values)
    entry = document["model.layers.1.block_sparse_moe.experts.2.w3"]
    assert entry["type"] == "block_sparse_moe.experts.w3" and entry["snr"] > 0
    assert {e["type"] for e in document.values()} >= {"self_attn.q_proj", "block_sparse_moe.experts.w1"}


def test_unfrozen_list_matches_what_it_names_and_nothing_else(spectra: Spectra) -> None:
    summary = summarise(spectra, "laser-rmt")
    text = summary.unfrozen_yaml(50)
    written = [line for line in text.splitlines() if not line.startswith("#")]
    assert written[:3] == ["unfrozen_parameters:", "- ^lm_head.weight$", "- ^model.embed_tokens.weight$"]
    names = [m.name for m in spectra.matrices]
    # Open at the end, a pattern would match these, or layer 10 as well as layer 1.
    strangers = [name + end for name in names for end in ("x", ".bias")]
    strangers += [name.replace("layers.1.", "layers.10.") for name in names]
    sizes = dict.fromkeys([*names, *strangers], 4)
    matched = by_scripts(text, sizes)
    assert by_axolotl(text, sizes) == {name: {0, 1, 2, 3} for name in matched}
    assert matched <= set(names)
    # Half of each type: 4 of the 8 w1, 1 of the 2 q, and the head and the embedding. The best of each is among them.
    assert sum("w1" in name for name in matched) == 4 and sum("q_proj" in name for name in matched) == 1
    assert len(matched) == 2 + 3 * 4 + 4 * 1
    best = max((r for r in summary.rows if r.role == "w1"), key=lambda r: r.snr_over_largest or 0.0)
    assert best.name in matched


STRANGE = (
    *("$a", "_a", "a|b", "a`b", "a'b", 'a"b', "a\\b", "a\\", "(a", "a)+", "a.+b", "a*", "a?", "[a", "a[1:2]", "{a}"),
    *(
        "a b",
        " a ",
        "a - b",
        "- a",
        "# a",
        "a #b",
        "a: b",
        "a:",
        "&a",
        "*a",
        "!a",
        "%a",
        "@a",
        "~",
        "null",
        "no",
        "1e3",
    ),
    *(
        "a\nb",
        "a\r\n- b",
        "a\tb",
        "a\x00b",
        "a\x1b[31m",
        "a\x85b",
        "a\u2028b",
        "a\u202eb",
        "\ufeffa",
        "é",
        "模型",
        "😀",
    ),
    *("a,b", "=a()", "h.0.a", "layers.0.a", "-", "---", "...", "<<", "^a$", "a$", "a.b.", ".a"),
)


def test_any_name_is_matched_by_both_readers_and_is_one_line(spectra: Spectra) -> None:
    summary = summarise(spectra, "laser-rmt")
    row = next(r for r in summary.rows if r.snr_over_largest is not None)
    for name in STRANGE:
        only = replace(summary, rows=(replace(row, name=name),))
        text = only.unfrozen_yaml(100)
        assert text.isascii() and text.replace("\n", "").isprintable()
        sizes = dict.fromkeys([name, name + "y", "y" + name, name[:-1], name.swapcase() + "y"], 2)
        assert by_scripts(text, sizes) == {name}, name
        assert by_axolotl(text, sizes) == {name: {0, 1}}, name
        assert list(strict(only.snr_json())) == [name]  # pyright: ignore[reportArgumentType, reportCallIssue]
        (line,) = csv.DictReader(io.StringIO(only.to_csv(), newline=""))
        assert line["name"] == name
        assert strict(only.to_json())["rows"][0]["name"] == name  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("percent", [0.0, -1.0, 101.0, math.nan])
def test_impossible_shares_are_refused(spectra: Spectra, percent: float) -> None:
    with pytest.raises(UsageError, match="try 50"):
        summarise(spectra).unfrozen_yaml(percent)


def test_zero_matrices_and_empty_selections(make_pico: Callable[..., Path]) -> None:
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(6, 8)}
    spectra = scan(laser.open_checkpoint(make_pico(tensors=tensors, shards=1)))
    (row,) = summarise(spectra).rows
    assert (row.rank, row.sigma, row.snr, row.alpha, row.stable_rank) == (0, 0.0, None, None, 0.0)
    strict(summarise(spectra).to_json())
    with pytest.raises(UsageError, match="no selected matrix was scanned"):
        summarise(replace(spectra, values={}))
    assert isinstance(summarise(spectra), Summary) and isinstance(row, SummaryRow)
