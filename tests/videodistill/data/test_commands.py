from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from videodistill.data import commands
from videodistill.errors import UserError

TINY = ["--frames", "16", "--size", "32", "--workers", "1"]


def run(*arguments: str):
    return CliRunner().invoke(commands.app, ["make", *arguments])


def test_make_writes_what_it_says(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = run(out, "--split", "train=11", "--split", "test=1", "--questions", "3", *TINY)
    assert result.exception is None
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        "train: 11 videos, 176 frames, 33 questions",
        "test: 1 videos, 16 frames, 3 questions",
    ]
    assert lines[2].startswith(f"{out} is complete, ")
    assert "train: 11/11 videos" in result.stderr
    biased = run(out, "--split", "biased=1", "--bias", "0.5", "--reverse-bias", "--frames", "16-20")
    assert biased.exception is None
    splits = json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]
    assert list(splits) == ["biased", "test", "train"]
    assert splits["biased"]["arguments"] == {
        "videos": 1,
        "frames": [16, 20],
        "size": 96,
        "fps": 12.0,
        "bias": 0.5,
        "reverse_bias": True,
        "questions": 8,
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--split", "train"], "--split train: write NAME=COUNT"),
        (["--split", "train=many"], "--split train=many: write NAME=COUNT"),
        (["--split", "train=0"], "split train: 0 videos"),
        (["--split", "a=1", "--split", "a=2"], "split a is named twice"),
        (["--split", "a=1", "--frames", "64-"], None),
        (["--split", "a=1", "--frames", "x"], "--frames x: write 64"),
        (["--split", "a=1", "--frames", "-3"], "--frames -3: write 64"),
        (["--split", "a=1", "--frames", "8"], "frames 8: a video has 16 to 1024"),
        (["--split", "a=1", "--workers", "-2"], "workers -2"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], named: str | None) -> None:
    result = run(str(tmp_path / "out"), *arguments)
    if named is None:
        assert result.exception is None
        return
    assert isinstance(result.exception, UserError)
    assert named in str(result.exception)
    assert not (tmp_path / "out").exists()
