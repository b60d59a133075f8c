"""`videodistill train-default`: what its options become, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from videodistill.cli import app
from videodistill.engine.checks import ASSETS
from videodistill.training import default_model


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls of the training function, which only says that it began."""
    calls = []

    def train(work: Path, out: Path, *, log: Callable[[str], None], **options: object) -> None:
        log("stage 1 of 5: videos")
        calls.append((work, out, options))

    monkeypatch.setattr(default_model, "train_default", train)
    return calls


def test_options(called: list[tuple], tmp_path: Path) -> None:
    out, work = str(tmp_path / "out"), str(tmp_path / "work")
    given = ["--out", out, "--work", work, "--controls", "--workers", "3"]
    result = CliRunner().invoke(app, ["train-default", *given])
    assert result.exit_code == 0, result.output
    assert called == [(Path(work), Path(out), {"controls": True, "workers": 3})]
    first, last = result.stdout.splitlines()
    assert re.fullmatch(r" +0:0\d  stage 1 of 5: videos", first)
    assert re.fullmatch(r" +0:0\d  the model and its card are in .*", last) and out in last


def test_defaults_make_the_bundled_model(called: list[tuple]) -> None:
    assert CliRunner().invoke(app, ["train-default"]).exit_code == 0
    options = {"controls": False, "workers": 2}
    assert called == [(Path("runs/default-model"), ASSETS / "default", options)]


def test_bad_folders_and_workers_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    good = str(tmp_path / "good")
    for arguments, named in (
        (["--work", good, "--out", good, "--workers", "0"], ["--workers", "--help"]),
        (["--work", str(file), "--out", good], [str(file), "choose another folder"]),
        (["--work", good, "--out", str(file / "deep" / "er")], [str(file), "another folder"]),
        (["--work", "/proc/self/work", "--out", good], ["/proc/self/work", "another folder"]),
    ):
        result = CliRunner().invoke(app, ["train-default", *arguments])
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert all(part in result.stderr for part in named), result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
