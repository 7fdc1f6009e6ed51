"""Publishing: the card is made of what lies in an output, and of nothing that belongs to other weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.checkpoint.source import Source
from laser.cli import main
from laser.errors import OutputError, RecordError, UsageError
from laser.evaluation.leaderboard import Leaderboard, TaskScore
from laser.evaluation.perplexity import Perplexity, record_of_losses
from laser.evaluation.text import Window, Windows
from laser.outcome import Outcome
from laser.pipeline import reduce, scan
from laser.plan import make_plan
from laser.records import sealed
from laser.report.publish import (
    EVAL,
    EVAL_SOURCE,
    LEADERBOARD,
    LEADERBOARD_SOURCE,
    SEARCH_FILE,
    SOURCE_FILE,
    describe_source,
    hub_origin,
    write_card,
)
from laser.verification import verify


@pytest.fixture
def reduced(pico: Path, tmp_path: Path) -> tuple[Checkpoint, Path]:
    """pico with five matrices reduced; (source, output)."""
    checkpoint = open_checkpoint(pico)
    reduce(checkpoint, make_plan(scan(checkpoint), "mp-edge", lowest_snr=5), tmp_path / "out")
    return checkpoint, tmp_path / "out"


@pytest.fixture
def searched(pico: Path, tmp_path: Path) -> tuple[Checkpoint, Path]:
    """The same, by a plan that says it came out of a search."""
    checkpoint = open_checkpoint(pico)
    plan = make_plan(scan(checkpoint), "mp-edge", lowest_snr=5)
    reduce(checkpoint, replace(plan, selection={**plan.selection, "accept": "better"}), tmp_path / "out")
    return checkpoint, tmp_path / "out"


def board(of: Checkpoint) -> Leaderboard:
    score = TaskScore("winogrande", "acc", 0.5, 0.5, 2, 5, (1.0, 0.0))
    return Leaderboard("pico", of.identity, (score,), 2, {}, {}, {}, None, of.fingerprint.stated())


def loss(of: Checkpoint, *sums: float) -> Perplexity:
    windows = Windows((Window(np.array([1, 2]), 1),) * len(sums), "wiki", "0", 2, "windows", True, None)
    return record_of_losses(
        windows,
        sums,
        model="pico",
        identity=of.identity,
        weights=of.fingerprint.stated(),
        dtype="float32",
        device="cpu",
    )


def metadata(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text().split("---\n")[1])


def test_the_card_comes_from_the_records(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    board(source).save(out / LEADERBOARD_SOURCE)
    board(open_checkpoint(out)).save(out / LEADERBOARD)
    path = write_card(out, source, hash_source=True)
    text = path.read_text()
    assert path == out / "README.md" and text.startswith("---\n") and "\n# out\n" in text
    assert metadata(path)["license"] == "apache-2.0" and "model-index" in metadata(path)
    assert "5 were reduced, 55 were copied byte for byte" in text
    assert "Winogrande (5-shot), acc, 2 rows | 50.00 ± 50.00 % | 50.00 ± 50.00 % |" in text
    assert "Marchenko and Pastur 1967" in text
    for shard in source.shards:  # both hashes of every shard
        assert hashlib.sha256(shard.path.read_bytes()).hexdigest() in text
        assert hashlib.sha256((out / shard.name).read_bytes()).hexdigest() in text
    assert verify(source, out).problems == ()


def test_evaluations_by_hand_are_told(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    (out / EVAL).parent.mkdir()
    loss(source, 2.0, 2.5, 1.5).save(out / EVAL_SOURCE)
    loss(open_checkpoint(out), 2.25, 2.75, 1.5).save(out / EVAL)
    assert main(["card", str(out)]) == 0
    text = (out / "README.md").read_text()
    assert "wiki" in text and "2.0000 ± 0.2887" in text and "+0.1667 ± 0.0833" in text and "worse" in text
    (out / EVAL).unlink()
    assert "wiki" not in write_card(out).read_text()  # one alone compares nothing


def test_evaluations_of_two_precisions_are_not_judged(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    after = replace(loss(open_checkpoint(out), 2.25, 2.75, 1.75), dtype="bfloat16", device="cuda:0")
    (out / EVAL).parent.mkdir()
    loss(source, 2.0, 2.5, 1.5).save(out / EVAL_SOURCE)
    after.save(out / EVAL)
    text = write_card(out).read_text()
    assert text.count("not like with like: dtype float32 against bfloat16, device cpu against cuda") == 2
    assert "Worse than the source" not in text and "**worse**" not in text


def test_it_can_be_made_again_without_the_source(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    first = write_card(out, source).read_bytes()
    assert (out / SOURCE_FILE).exists()
    assert write_card(out).read_bytes() == first


def test_the_commands_of_a_run_outlive_the_run(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    write_card(out, source, commands=("laser run pico -o out --as-it-was",))
    assert "```sh\nlaser run pico -o out --as-it-was\nlaser verify" in write_card(out).read_text()
    document = json.loads((out / SOURCE_FILE).read_bytes())
    (out / SOURCE_FILE).write_text(
        json.dumps(sealed(document | {"outcome": {"model.safetensors": "0"}}))
    )  # of another output
    assert "--as-it-was" not in write_card(out).read_text()


def test_without_the_source_ever_the_licence_is_not_invented(reduced: tuple[Checkpoint, Path]) -> None:
    _, out = reduced
    found = metadata(write_card(out))
    assert "license" not in found and "base_model" not in found
    assert "names no licence; see `LICENSE`" in (out / "README.md").read_text()


MIT = (
    """MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files """
    + "(the Software) to deal " * 36
)


@pytest.mark.slow
@pytest.mark.parametrize("readme", ["---\nlicense: mit\n: [\n---\n", "---\nlanguage: en\n---\n", "", None])
def test_a_licence_that_no_card_names_is_looked_for_beside_it(
    reduced: tuple[Checkpoint, Path], readme: str | None
) -> None:
    source, out = reduced
    (source.path / "README.md").unlink()
    if readme is not None:
        (source.path / "README.md").write_text(readme)
    (source.path / "LICENSE").write_text(MIT)
    (source.path / "NOTICE").write_text("of no licence\n")
    path = write_card(out, source)
    assert metadata(path)["license"] == "mit" and "`LICENSE` (mit), `NOTICE`" in path.read_text()
    assert ("has metadata that are not valid YAML" in path.read_text()) == (readme is not None and "[" in readme)
    assert write_card(out).read_text() == path.read_text()  # what an earlier card found is kept


@pytest.mark.slow
@pytest.mark.parametrize("wild", ["date: 2024-13-45", "x: !!int y", "x: !!timestamp y", "x: " + "[" * 5000, "\tx"])
def test_a_readme_of_somebody_else_may_hold_anything(reduced: tuple[Checkpoint, Path], wild: str) -> None:
    source, out = reduced
    (out / "README.md").write_text(f"---\n{wild}\ntags: [laser-rmt]\n---\n")
    with pytest.raises(OutputError, match=r"not written by laser; try --force"):
        write_card(out, source)


def test_a_card_is_written_for_a_name_of_any_bytes(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    named = out.rename(out.parent / "a\n---\nb$ \udcff")
    text = write_card(named, source).read_text()
    assert "# a --- b\\$ \\\\udcff\n" in text and yaml.safe_load(text.split("---\n")[1])["license"] == "apache-2.0"
    assert write_card(named).read_text() == text


def test_a_readme_of_somebody_else_is_left_alone(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    (out / "README.md").write_text("---\ntags: [mine]\n---\n# By hand\n")
    with pytest.raises(OutputError, match=r"not written by laser; try --force"):
        write_card(out, source)
    assert "By hand" in (out / "README.md").read_text()
    write_card(out, source, force=True)
    write_card(out, source)  # our own may be replaced
    assert "By hand" not in (out / "README.md").read_text()


@pytest.mark.slow
def test_records_of_other_weights_are_refused(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    # A reduction shares the headers of its source: only laser.json tells their records apart.
    result = open_checkpoint(out)
    assert result.identity != source.identity
    other = {"weights": {"samples": "0" * 64}}  # of a fine-tune with the same headers
    for file, record in (
        (LEADERBOARD, board(source)),
        (LEADERBOARD, replace(board(source), identity="0" * 64)),
        (LEADERBOARD_SOURCE, replace(board(source), **other)),
        (EVAL_SOURCE, replace(loss(source, 2.0), weights={})),
        (LEADERBOARD_SOURCE, board(result)),
        (EVAL, loss(source, 2.0)),
        (EVAL_SOURCE, loss(result, 2.0)),
    ):
        record.save(out / file)
        with pytest.raises(RecordError, match="weights are not those that the card speaks of"):
            write_card(out, source)
        (out / file).unlink()
    assert not (out / "README.md").exists()


def test_a_card_needs_an_output_and_its_own_source(
    reduced: tuple[Checkpoint, Path], make_pico: Callable[..., Path], tmp_path: Path
) -> None:
    _, out = reduced
    with pytest.raises(RecordError, match="no such file"):
        write_card(tmp_path)
    with pytest.raises(RecordError, match="made from pico"):
        write_card(out, open_checkpoint(make_pico("another", rms_norm_eps=1e-6)))
    (out / SOURCE_FILE).parent.mkdir()
    (out / SOURCE_FILE).write_text('{"kind": "source", "version": 2, "name": "x"}')
    with pytest.raises(RecordError, match="not a whole source file"):
        write_card(out)


def test_base_model_by_hand(reduced: tuple[Checkpoint, Path]) -> None:
    source, out = reduced
    assert metadata(write_card(out, source, base_model="org/pico"))["base_model"] == "org/pico"
    with pytest.raises(UsageError, match="try OWNER/NAME"):
        write_card(out, source, base_model="my model")


def test_a_snapshot_of_the_hub_tells_id_revision_and_hashes(pico: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--org--pico-moe/snapshots/0123abc"
    blobs = tmp_path / "hub/models--org--pico-moe/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in pico.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (blobs / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / digest)
    checkpoint = open_checkpoint(snapshot)
    about = describe_source(checkpoint)
    assert (about.hub_id, about.revision) == ("org/pico-moe", "0123abc")
    expected = {s.name: hashlib.sha256((pico / s.name).read_bytes()).hexdigest() for s in checkpoint.shards}
    assert about.shards == expected and len(expected) == 3
    assert hub_origin(pico) == (None, None) and describe_source(open_checkpoint(pico)).shards == {}


def test_parameters_are_counted(pico: Path) -> None:
    tensors = open_checkpoint(pico).tensors.values()
    assert describe_source(open_checkpoint(pico)).parameters == sum(t.end - t.start for t in tensors) // 2  # bf16


@pytest.mark.slow
def test_the_verb_card(
    reduced: tuple[Checkpoint, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = reduced
    assert (
        main(["card", str(out), "--source", str(source.path), "--base-model", "org/pico", "--name", "pico-laser"]) == 0
    )
    assert capsys.readouterr().out == f"written to {out / 'README.md'}\n"
    text = (out / "README.md").read_text()
    assert "\n# pico-laser\n" in text and str(source.path) not in text
    assert main(["card", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(out / "README.md")}
    (out / "README.md").write_text("mine")
    assert main(["card", str(out)]) == 1
    assert "try --force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "arc"], "no task is called 'arc'"),
        (["--dtype", "int8"], "unknown --dtype 'int8'"),
        (["--batch-size", "0"], "holds no row"),
        ([], "try -o FILE"),
    ],
)
def test_the_verb_leaderboard_refuses(
    words: list[str], message: str, pico: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", str(pico), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install 'laser-rmt[eval]'")
def test_measure_both_and_publish(
    speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way by the command line, and then the card's own code."""
    rows = [
        {"sentence": f"ann met eve {i} times as _ was late.", "option1": "ann", "option2": "eve", "answer": "12"[i % 2]}
        for i in range(12)
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/winogrande.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    common = ["--tasks", "winogrande", "--data", "rows", "--device", "cpu"]
    assert main(["run", "speaker", "-o", "out", "--rule", "rank:3", "--device", "cpu"]) == 0
    assert main(["leaderboard", "speaker", "-o", f"out/{LEADERBOARD_SOURCE}", *common]) == 0
    assert main(["leaderboard", "out", *common]) == 0
    printed = capsys.readouterr().out
    assert "winogrande" in printed and f"written to {tmp_path / 'out' / LEADERBOARD}" in printed
    assert "Winogrande (5-shot), acc, 7 rows" in printed and not list(Path("out/laser").glob("*.partial"))
    assert main(["leaderboard", "out", *common, "--dtype", "bfloat16", "--force", "--json"]) == 0
    odd = json.loads(capsys.readouterr().out)["against_source"]
    assert [row["verdict"] for row in odd] == ["not like with like: dtype float32 against bfloat16"]
    assert odd[0]["unlike"] == [{"what": "dtype", "before": "float32", "after": "bfloat16"}]
    assert main(["leaderboard", "out", *common, "--force"]) == 0
    assert main(["leaderboard", "out", *common]) == 1  # there already
    assert main(["card", "out", "--source", "speaker"]) == 0
    text = Path("out/README.md").read_text()
    assert "laser leaderboard speaker -o leaderboard-source.json --device cpu --tasks winogrande --data rows\n" in text
    assert "acc, 7 rows" in text and "rows_scored: 7" in text and str(tmp_path) not in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block, dtype in ((blocks[0], torch.float32), (blocks[1], torch.bfloat16)):  # full and half precision
        space: dict[str, Any] = {}
        exec(block + blocks[5].replace("100", "3"), space)
        assert space["model"].dtype == dtype
    assert len(capsys.readouterr().out.splitlines()) >= 2  # each said something


@pytest.mark.parametrize(("rule", "measured"), [("rank:3", ["pico", "out"]), ("fraction:1", ["pico"])])
def test_run_measures_source_and_result_and_equal_weights_once(
    rule: str, measured: list[str], pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_leaderboard(checkpoint: Checkpoint, **_: Any) -> Leaderboard:
        seen.append(checkpoint.name)
        return board(checkpoint)

    # pico is no model that lm-eval can measure.
    monkeypatch.setattr("laser.cli.publish.run_leaderboard", run_leaderboard)
    monkeypatch.setattr("laser.cli.run.require_leaderboard", lambda *_, **__: None)  # pico has no tokenizer
    out = tmp_path / "out"
    words = ["run", pico, "-o", out, "--rule", rule, "--no-search", "--leaderboard", "--roles", "q"]
    assert main([str(w) for w in words]) == 0
    assert seen == measured
    assert Leaderboard.load(out / LEADERBOARD).identity == open_checkpoint(out).identity
    assert "Winogrande (5-shot), acc, 2 rows | 50.00 ± 50.00 % | 50.00 ± 50.00 % |" in (out / "README.md").read_text()


HELD: dict[str, Any] = {"objective": "loss", "unit": "nats per token", "text": "t", "units": 2, "tokens": 9}
HELD |= {"before": 3.0, "before_se": 0.2, "after": 3.5, "after_se": 0.2, "d": 0.5, "se": 0.1, "asked": None}
TRIED = {"label": "q", "rule": "rank:2", "ranks": {"q": 2}, "d": 0.5, "se": None, "accepted": False, "alone": False}
TRIED |= {"predicted": None, "layer_forwards": 3, "seconds": 0.1}


def as_searched(source: Checkpoint, out: Path) -> dict[str, Any]:
    """What a search that ended in this output would have written."""
    accepted = [
        TRIED | {"label": name, "ranks": {name: line.rank}, "accepted": True}
        for name, line in Outcome.load(out).plan.reductions.items()
    ]
    found: dict[str, Any] = {"kind": "search", "version": 2, "held_out": [HELD], "trials": [TRIED, *accepted]}
    return found | {"source": asdict(Source.of(source)), "calibration": HELD, "rank_correlation": None, "families": {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("held_out", {}, None),
        ("held_out", {"before": "x"}, 'held_out 1: before is "x", expected a number or null'),
        ("held_out", {"tokens": 9.5}, "held_out 1: tokens is 9.5"),
        ("held_out", {"se": [1]}, "held_out 1: se"),
        ("trials", {"ranks": []}, "trial 1 (q): ranks"),
        ("trials", {"accepted": "no"}, 'trial 1 (q): accepted is "no", expected true or false'),
        ("trials", {"d": "x"}, "trial 1 (q): d"),
    ],
)
def test_a_searchs_record_is_checked_whole(
    searched: tuple[Checkpoint, Path], part: str, change: dict[str, object], message: str | None
) -> None:
    out, document = searched[1], as_searched(*searched)
    document[part] = [document[part][0] | change, *document[part][1:]]
    (out / SEARCH_FILE).parent.mkdir(exist_ok=True)
    (out / SEARCH_FILE).write_text(json.dumps(sealed(document)))
    if message is None:
        assert "+0.5000 ± 0.1000" in write_card(out).read_text()
        return
    with pytest.raises(RecordError, match=re.escape(message)):
        write_card(out)


def test_a_search_that_was_changed_is_refused(searched: tuple[Checkpoint, Path]) -> None:
    out, document = searched[1], as_searched(*searched)
    (out / SEARCH_FILE).parent.mkdir(exist_ok=True)
    (out / SEARCH_FILE).write_text(json.dumps(sealed(document) | {"held_out": [HELD | {"after": 2.0}]}))
    with pytest.raises(RecordError, match="changed or damaged since it was written"):
        write_card(out)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["name", "readme", "config", "tokenizer_config", "parameters", "shards", "hub_id"])
def test_the_record_of_a_source_is_checked_whole(reduced: tuple[Checkpoint, Path], key: str) -> None:
    source, out = reduced
    write_card(out, source)
    document = json.loads((out / SOURCE_FILE).read_text())
    (out / SOURCE_FILE).write_text(json.dumps(document | {key: [5]}))
    with pytest.raises(RecordError, match=rf"{key} is \[5\], expected"):
        write_card(out)
