"""A finished output to the Hub, by the Hub's own client, which resumes what was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laser.checkpoint.at_rest import CARD, damage
from laser.checkpoint.headers import parse_json
from laser.checkpoint.hub import hub_errors
from laser.checkpoint.locks import claimed
from laser.checkpoint.reader import INDEX, OUTCOME, open_checkpoint
from laser.checkpoint.regular import read_regular
from laser.checkpoint.side_files import is_weights
from laser.checkpoint.writer import JOURNAL, RECORDS
from laser.errors import OutputError


def push(out: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload the directory `out` to the model repository `repo`, made if it is not there; returns its address.

    Called again after an interruption, it sends only what is missing. Raises OutputError where `out` is no finished
    output of laser, or somebody is at work on it; CheckpointError where its files do not fit together or the Hub
    refuses.
    """
    from huggingface_hub import HfApi

    with claimed(out):  # else what is uploaded could be half of one output and half of the next
        unfinished = (out / JOURNAL).exists() or any(out.glob("*.partial"))
        if unfinished or not (out / OUTCOME).is_file():
            raise OutputError(f"{out} is not a finished output of laser; finish it with laser reduce --resume first")
        outcome, read = (
            parse_json(read_regular(out / OUTCOME), out / OUTCOME),
            {s.name for s in open_checkpoint(out).shards},
        )
        made = set(outcome.get("shards") or ()) if isinstance(outcome, dict) else set()
        if made != read:
            raise OutputError(
                f"{out} was written as {', '.join(sorted(made)[:3])}, but {', '.join(sorted(read)[:3])} would be "
                "loaded; remove what was put there since, and check it with laser verify"
            )
        _require_as_written(out, outcome)
        api = HfApi()
        with hub_errors(repo, revision):
            address = api.create_repo(repo, private=private, exist_ok=True)
            there = api.list_repo_files(repo) if revision is None else []  # a branch may have to be made first
            other = sorted(n for n in there if n not in {*made, INDEX} and "/" not in n and is_weights(n))
            if other:  # model.safetensors comes before an index: whoever loads it would get the old weights
                raise OutputError(
                    f"{repo} holds {other[0]}, which is not in {out}: the two would be a mixture; remove it there, or "
                    "push to a new repository"
                )
            api.upload_folder(repo_id=repo, folder_path=out, revision=revision, commit_message="Upload by laser push")
    return str(address)


def _require_as_written(out: Path, outcome: Mapping[str, Any]) -> None:
    """Raises OutputError where a directory holds what laser did not write, or something else in its place."""
    known = {*outcome.get("files", ()), *outcome.get("shards", ()), INDEX, OUTCOME, CARD}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name.split("/")[0] == ".cache":  # the client's own notes on what is uploaded, which it leaves out
            continue
        strange = path.is_symlink() or path.name.endswith((".lock", ".tmp"))
        if strange or (not path.is_dir() and name not in known and not name.startswith(f"{RECORDS}/")):
            raise OutputError(
                f"{out} holds {name}, which laser did not write, and which would be public; move it away first"
            )
    if problems := damage(out, outcome):
        raise OutputError(f"{out}: {problems[0]}; make it again with --force, or look at all with laser verify")
