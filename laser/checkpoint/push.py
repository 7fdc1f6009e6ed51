"""A finished output to the Hub: large files first, then one commit with all of them, then a look at what lies there.

Until that commit nobody sees anything of it, and it names the commit on which it was made: so a push that ends early,
or meets somebody else's, leaves no mixture behind. The Hub keeps large files that were sent, and asks for none twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from laser.checkpoint.answers import COMMIT, hub_errors, session
from laser.checkpoint.at_rest import OPTIONS_FILE, damage
from laser.checkpoint.hub import ID, is_inside, plain_names
from laser.checkpoint.reader import OUTCOME, open_checkpoint
from laser.checkpoint.safetensors import parse_json
from laser.checkpoint.side_files import folded, is_desktops, is_opened, is_weights
from laser.checkpoint.writer import BESIDE, JOURNAL, is_kept
from laser.errors import CheckpointError, LaserError, OutputError, UsageError
from laser.files import claimed, read_regular

AT_A_TIME = 5  # shards that are sent side by side: as many threads as the Hub's client has for that
COMMITTED = "and committed"
PATH_LINE = re.compile(
    rb"^[^#\n]*:\s+['\"]?(?:[^\n]*\+)?(?:[/~\\]|\.\.?/|\w:\\|\w+://)", re.MULTILINE
)  # an option that names a place on some machine
NOTES = ".cache"  # of clients, on what they have transferred; in a directory that came from the Hub


@dataclass(frozen=True)
class Pushed:
    """What lies on the Hub now. replaced: names of files that were others before; beside: of files that are not ours,
    and that nothing loads with the model."""

    address: str
    commit: str
    replaced: tuple[str, ...]
    beside: tuple[str, ...]


def push(out: Path, repo: str, *, private: bool = False, revision: str | None = None) -> Pushed:
    """Upload the directory `out` to a branch of the model repository `repo`; either is made if it is not there.

    Called again after an interruption, it sends only what is missing. Raises UsageError for a name that no repository
    or branch can have. Raises OutputError where `out` is no finished output of laser, somebody is at work on it, or the
    repository holds what would be mixed up with it. Raises CheckpointError where its files do not fit together, or the
    Hub refuses or has something else than was sent.
    """
    if (named := ID.fullmatch(repo)) is None or named["revision"] is not None or named["repo"].endswith("/.."):
        raise UsageError(f"{repo!r} is no repository on the Hub; try org/name, and --revision for a branch")
    if revision is not None and (not re.fullmatch(r"\w[\w./-]{0,199}", revision) or not is_inside(revision)):
        raise UsageError(f"{revision[:60]!r} is no branch; try --revision trial, or leave it out")
    with claimed(out):  # else what is uploaded could be half of one output and half of the next
        outcome = _finished_output(out)
        files = {
            name: path
            for path in sorted(out.rglob("*"))
            if path.is_file() and not _is_aside(name := path.relative_to(out).as_posix())
        }
        if OPTIONS_FILE in files and names_a_place(read_regular(files[OPTIONS_FILE])):
            del files[OPTIONS_FILE]
        return _Push(out, repo, revision, files, outcome["shards"]).run(private)


def names_a_place(options: bytes) -> bool:
    """Whether a run's file of options is not published with its output: it names a place on a machine."""
    return PATH_LINE.search(options) is not None


def _is_aside(name: str) -> bool:
    """Whether a file of an output, by its path there, is no part of it and not uploaded."""
    return name.split("/")[0] == NOTES or is_desktops(name.rpartition("/")[2])


def _finished_output(out: Path) -> Mapping[str, Any]:
    """The record of an output that may be published. Raises OutputError."""
    unfinished = (out / JOURNAL).exists() or any(out.glob("*.partial"))
    if unfinished or not (out / OUTCOME).is_file():
        raise OutputError(f"{out} is not a finished output of laser; finish it with laser reduce --resume first")
    outcome = parse_json(read_regular(out / OUTCOME), out / OUTCOME)
    read = {shard.name for shard in open_checkpoint(out).shards}
    made = set(outcome.get("shards") or ()) if isinstance(outcome, dict) else set()
    if made != read:
        raise OutputError(
            f"{out} was written as {', '.join(sorted(made)[:3])}, but {', '.join(sorted(read)[:3])} would be "
            "loaded; remove what was put there since, and check it with laser verify"
        )
    _require_as_written(out, outcome)
    return outcome


def _require_as_written(out: Path, outcome: Mapping[str, Any]) -> None:
    """Raises OutputError where a directory holds what laser did not write, or something else in its place."""
    known = {*outcome.get("files", ()), *outcome.get("shards", ()), *BESIDE}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if _is_aside(name) or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or (name not in known and not is_kept(name)):
            raise OutputError(
                f"{out} holds {name}, which laser did not write, and which would be public; move it away first"
            )
    if problems := damage(out, outcome):
        raise OutputError(f"{out}: {problems[0]}; make it again with --force, or look at all with laser verify")


@dataclass
class _Push:
    """One upload. shards: their sha256 by laser.json, where it has them; sent: how many of them are on the Hub now, and
    committed: whether they are, should it end early."""

    out: Path
    repo: str
    revision: str | None
    files: Mapping[str, Path]
    shards: Mapping[str, str | None]
    sent: int | None = None
    committed: str = "nothing is committed"

    def run(self, private: bool) -> Pushed:
        from huggingface_hub import CommitOperationAdd, HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi()
        try:
            with hub_errors(self.repo, self.revision, writing=True):
                there = self._head(api, private)
                before = self._listed(there)
                self._require_unmixed(before)
                additions = {
                    name: CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                    for name, path in self.files.items()
                }
                self._send(api, additions)
                session()
                self.committed = "whether they are committed is not known"
                commit = api.create_commit(
                    self.repo, list(additions.values()), commit_message="Upload by laser push",
                    revision=self.revision, parent_commit=there.sha,
                ).oid  # fmt: skip
                if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
                    raise CheckpointError(
                        f"{self.repo}: the commit is called {str(commit)[:60]!r}, expected 40 hexadecimal digits; "
                        "run the same command again"
                    )
                session()
                after = self._listed(api.model_info(self.repo, revision=commit, files_metadata=True))
                self._require_there(additions, after)
        except LaserError as error:
            if self.sent is None:
                raise
            causes = (error.__cause__, error.__cause__ and error.__cause__.__cause__)
            refused = any(isinstance(e, HfHubHTTPError) and e.response.status_code < 500 for e in causes)
            committed = "nothing is committed" if refused and self.committed != COMMITTED else self.committed
            why, mark, advice = str(error).rpartition("; ")
            state = f"{self.sent} of {len(self.shards)} shards are uploaded and kept, {committed}"
            raise type(error)(f"{why or advice}; {state}{mark}{advice if mark else ''}") from error
        others = sorted(before.keys() - self.files.keys() - {".gitattributes"})
        old = sorted(n for n in before.keys() & self.files.keys() if not _same_commit(before[n], after[n]))
        return Pushed(f"{constants.ENDPOINT}/{self.repo}", commit, tuple(old), tuple(others))

    def _head(self, api: Any, private: bool) -> Any:
        """The branch as it is now, with its files; made, and its repository too, where it is not there."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def head(revision: str | None) -> Any:
            return api.model_info(self.repo, revision=revision, files_metadata=True)

        try:
            main = head(None)
        except RepositoryNotFoundError:
            api.create_repo(self.repo, private=private, exist_ok=True)
            main = head(None)
        if private and main.private is False:
            raise OutputError(
                f"{self.repo} is public, and would stay so; make it private on its page, leave --private out, or push "
                "to a new repository"
            )
        if self.revision is None:
            return main
        try:
            return head(self.revision)
        except RevisionNotFoundError:
            api.create_branch(self.repo, branch=self.revision, exist_ok=True)
            return head(self.revision)

    def _listed(self, info: Any) -> dict[str, Any]:
        """Files of the repository by name."""
        if info.sha is not None and not COMMIT.fullmatch(info.sha):
            raise CheckpointError(
                f"{self.repo} is at commit {str(info.sha)[:60]!r}, expected 40 hexadecimal digits; check HF_ENDPOINT"
            )
        return dict(zip(plain_names(self.repo, info.siblings), info.siblings or (), strict=True))

    def _require_unmixed(self, there: Mapping[str, Any]) -> None:
        """Raises OutputError where the repository holds what somebody would load with the output, or in its place."""
        ours = {folded(part): part for name in self.files for part in _paths(name)}
        for name in sorted(there):
            if name in self.files:
                continue
            alike = next((ours[folded(part)] for part in _paths(name) if ours.get(folded(part), part) != part), None)
            if alike is None and name in ours.values():  # a file where we have a folder
                alike = f"{name}/"
            if alike is not None:
                raise OutputError(
                    f"{self.repo} holds {name}, and {self.out} {alike}: a disk that makes no difference between the "
                    "two would keep one of them; remove it there, or push to a new repository"
                )
            if _is_loaded(name):
                raise OutputError(
                    f"{self.repo} holds {name}, which is not in {self.out}: the two would be a mixture; remove it "
                    "there, or push to a new repository"
                )

    def _send(self, api: Any, additions: Mapping[str, Any]) -> None:
        """The shards, a few at a time; each must be the one that laser.json knows."""
        names, self.sent = sorted(self.shards), 0
        for at in range(0, len(names), AT_A_TIME):
            some = names[at : at + AT_A_TIME]
            session()  # a connection that was refused may have cost the one before
            api.preupload_lfs_files(
                self.repo, [additions[name] for name in some], revision=self.revision, num_threads=AT_A_TIME,
                free_memory=False,
            )  # fmt: skip
            self.sent += len(some)
            for name in some:
                found, expected = additions[name].upload_info.sha256.hex(), self.shards[name]
                if expected is not None and found != expected:
                    raise OutputError(
                        f"{self.out / name}: found sha256 {found[:12]}, expected {expected[:12]}; look at all with "
                        "laser verify, and make the output again with --force"
                    )

    def _require_there(self, additions: Mapping[str, Any], there: Mapping[str, Any]) -> None:
        """Raises CheckpointError unless the commit holds each file as it was sent."""
        from huggingface_hub.utils.sha import git_hash

        self.committed = COMMITTED
        for name, addition in additions.items():
            if name not in there:
                raise CheckpointError(
                    f"{self.repo} did not take {name}; if its .gitignore names it, mend that and run the same command "
                    "again"
                )
            entry, sent = there[name], addition.upload_info
            if entry.lfs is not None:
                same = entry.lfs.sha256 == sent.sha256.hex()
            else:
                same = entry.blob_id == git_hash(read_regular(self.files[name]))
            if entry.size != sent.size or not same:
                raise CheckpointError(
                    f"{self.repo} has another {name} than was sent: somebody has committed, or the Hub is out of "
                    "order; run the same command again"
                )


def _is_loaded(name: str) -> bool:
    """Whether a file of a repository takes part where its model is loaded."""
    folder, _, last = name.rpartition("/")
    if folder in ("", "additional_chat_templates"):
        return is_weights(last) or is_opened(last) or bool(folder)
    return False


def _same_commit(a: Any, b: Any) -> bool:
    return a.blob_id == b.blob_id and (a.lfs and a.lfs.sha256) == (b.lfs and b.lfs.sha256)


def _paths(name: str) -> Sequence[str]:
    """A file's path and those of the folders that it lies in."""
    path = PurePosixPath(name)
    return [str(path), *(str(p) for p in path.parents if p.parts)]
