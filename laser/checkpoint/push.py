"""A finished output to the Hub, by the Hub's own client, which resumes what was interrupted."""

from __future__ import annotations

from pathlib import Path

from laser.checkpoint.headers import parse_json
from laser.checkpoint.hub import hub_errors
from laser.checkpoint.reader import OUTCOME, open_checkpoint
from laser.checkpoint.regular import read_regular
from laser.errors import OutputError

JOURNAL = "laser/journal.jsonl"


def push(out: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload the directory `out` to the model repository `repo`, made if it is not there; returns its address.

    Called again after an interruption, it sends only what is missing. Raises OutputError where `out` is no finished
    output of laser, CheckpointError where its files do not fit together or the Hub refuses.
    """
    from huggingface_hub import HfApi

    unfinished = (out / JOURNAL).exists() or any(out.glob("*.partial"))
    if unfinished or not (out / OUTCOME).is_file():
        raise OutputError(f"{out} is not a finished output of laser; finish it with laser reduce --resume first")
    if links := [path for path in sorted(out.rglob("*")) if path.is_symlink()]:
        raise OutputError(f"{links[0]} is a link, and what it leads to would be published; put a copy in its place")
    outcome, read = (
        parse_json(read_regular(out / OUTCOME), out / OUTCOME),
        {s.name for s in open_checkpoint(out).shards},
    )
    made = set(outcome.get("shards") or ()) if isinstance(outcome, dict) else set()
    if made != read:
        raise OutputError(
            f"{out} was written as {', '.join(sorted(made)[:3])}, but {', '.join(sorted(read)[:3])} would be loaded; "
            "remove what was put there since, and check it with laser verify"
        )
    api = HfApi()
    with hub_errors(repo, revision):
        address = api.create_repo(repo, private=private, exist_ok=True)
        large = getattr(api, "upload_large_folder", None)  # not in version 2 of the client: its upload_folder resumes
        if large is not None:
            large(repo_id=repo, folder_path=out, repo_type="model", revision=revision)
        else:
            api.upload_folder(repo_id=repo, folder_path=out, revision=revision, commit_message="Upload by laser push")
    return str(address)
