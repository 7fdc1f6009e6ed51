"""laser push: what is uploaded and what is refused; the Hub's client is a double here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import laser
from laser.plan import make_plan
from laser.selection import Selection


class Api:
    """Remembers what it was asked for."""

    calls: list[tuple[str, dict[str, Any]]]
    there: tuple[str, ...] = ()  # in the repository

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append(("create", {"repo": repo, **options}))
        return f"https://hub/{repo}"

    def list_repo_files(self, repo: str) -> list[str]:
        return [".gitattributes", "README.md", "model.safetensors.index.json", *self.there]

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


@pytest.fixture
def out(pico: Path, tmp_path: Path) -> Path:
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(laser.scan(checkpoint, Selection(roles=("q",))), "rank:4")
    laser.reduce(checkpoint, plan, tmp_path / "out")
    return tmp_path / "out"


def test_a_finished_output_is_uploaded(out: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Api.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    code, printed, _ = run("push", out, "maker/pico-laser", "--private")
    assert code == 0 and "uploaded to https://hub/maker/pico-laser" in printed
    assert [what for what, _ in Api.calls] == ["create", "upload"]
    assert Api.calls[0][1] == {"repo": "maker/pico-laser", "private": True, "exist_ok": True}
    assert Api.calls[1][1]["folder_path"] == out and Api.calls[1][1]["repo_id"] == "maker/pico-laser"


def test_what_is_not_finished_is_not_uploaded(
    out: Path, pico: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Api.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert "is not a finished output of laser" in run("push", pico, "maker/x")[2]
    shard = sorted(out.glob("*.safetensors"))[0]
    (out / f"{shard.name}.partial").write_bytes(b"")
    assert "is not a finished output of laser" in run("push", out, "maker/x")[2]
    (out / f"{shard.name}.partial").unlink()
    shard.write_bytes(shard.read_bytes()[:-4])
    assert run("push", out, "maker/x")[0] == 1
    assert Api.calls == []


def test_off_line_it_says_so(out: Path, run: Callable[..., Any]) -> None:
    code, _, err = run("push", out, "maker/x")
    assert code == 1 and "maker/x: the Hub cannot be reached" in err


@pytest.mark.parametrize("name", ["notes.txt", ".env", "laser.lock", "deeper/x", "laser/x.tmp", "x.safetensors.tmp"])
def test_what_laser_did_not_write_is_not_uploaded(
    out: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Api.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"secret")
    assert f"holds {name}, which laser did not write" in run("push", out, "maker/x")[2]
    (out / name).unlink()
    (out / "README.md").unlink(missing_ok=True)
    (out / "README.md").symlink_to(out / "config.json")
    assert "holds README.md, which laser did not write" in run("push", out, "maker/x")[2]
    (out / "README.md").unlink()
    config = (out / "config.json").read_bytes()
    (out / "config.json").write_bytes(config + b" ")
    assert "config.json: found sha256" in run("push", out, "maker/x")[2]
    assert Api.calls == []


def test_a_repository_with_other_weights_is_not_mixed(
    out: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Filled(Api):
        there = ("model.safetensors",)

    Filled.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Filled)
    assert "maker/x holds model.safetensors, which is not in" in run("push", out, "maker/x")[2]
    assert [what for what, _ in Filled.calls] == ["create"]
