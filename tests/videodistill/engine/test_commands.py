"""`videodistill extract`: from folders and datasets, with what became of each video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.videodistill.engine.material import make_video
from tests.videodistill.tiny import tiny_clip
from videodistill.cli import app
from videodistill.engine.feature_cache import FeatureCache


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extract")
    (folder / "videos" / "deep").mkdir(parents=True)
    make_video(folder / "videos" / "a.avi", frames=8)
    make_video(folder / "videos" / "deep" / "b.avi", frames=9)
    shutil.copy(folder / "videos" / "a.avi", folder / "videos" / "copy.avi")
    (folder / "empty").mkdir()
    tiny_clip(folder / "encoder")
    tiny_clip(folder / "other", seed=1)
    rows = ["video,question,answer,a0,a1", "a.mp4,what?,x,x,y", "deep/b.mp4,what?,y,x,y"]
    (folder / "own").mkdir()
    (folder / "own" / "train.csv").write_text("\n".join(rows))
    (folder / "own" / "test.csv").write_text("\n".join([*rows, "none.mp4,what?,y,x,y"]))
    return folder


@pytest.fixture
def run(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.chdir(here)

    def invoke(*args: str):
        settings = ("--encoder", "encoder", "--frames", "4", "--workers", "1")
        return CliRunner().invoke(
            app, ["extract", "--out", str(tmp_path / "out"), *settings, *args]
        )

    return invoke


def test_a_folder_of_videos(run: Callable, tmp_path: Path) -> None:
    result = run("videos")
    assert result.exit_code == 0, result.output
    told = f"{tmp_path / 'out'}: 2 videos encoded, 0 reused, 1 duplicates, 0 failed; "
    assert result.stdout.startswith(told)
    assert "features: 3/3 videos" in result.stderr
    assert set(FeatureCache.open(tmp_path / "out")) == {"a.avi", "deep/b.avi", "copy.avi"}
    again = json.loads(run("videos", "--json").stdout)
    assert again.pop("seconds") > 0
    assert again == {
        "encoded": 0,
        "reused": 3,
        "duplicates": 0,
        "failed": {},
        "notices": {},
        "broken": [],
        "folder": str(tmp_path / "out"),
    }


def test_a_dataset_with_a_missing_video(run: Callable, tmp_path: Path) -> None:
    complete = run("own", "own/train.csv", "--videos", "videos")
    assert complete.exit_code == 0 and "2 videos encoded" in complete.stdout
    result = run("own", "own", "--videos", "videos")
    assert result.exit_code == 1
    assert "0 videos encoded, 2 reused, 0 duplicates, 1 failed" in result.stdout
    assert "videos without features: 1\n  none.mp4: no such file: check the path" in result.stdout
    assert FeatureCache.open(tmp_path / "out").videos == ("a.mp4", "deep/b.mp4")
    retried = json.loads(run("own", "own", "--videos", "videos", "--retry", "--json").stdout)
    assert retried["failed"] == {"none.mp4": "no such file: check the path"}


def test_a_broken_annotation_is_listed(run: Callable, here: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text((here / "own" / "train.csv").read_text() + "\na.mp4,what?\n")
    result = run("own", str(bad), "--videos", "videos")
    assert result.exit_code == 1
    assert "annotations that cannot be read: 1" in result.stdout and "bad.csv:4" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none"], "none: no such folder"),
        (["empty"], "empty: holds no videos"),
        (["own"], "extract own: give its folder, too"),
        (["ours", "own"], "no dataset ours; there are"),
        (["videos", "--videos", "videos"], "--videos is only for the videos of a dataset"),
        (["videos", "--frames", "0"], "--frames 0"),
        (["videos", "--precision", "fp8"], "precision 'fp8': use one of fp32, bf16"),
        (["videos", "--device", "abacus"], "--device abacus cannot be used"),
        (["videos", "--encoder", "empty"], "empty has no config.json"),
    ],
)
def test_bad_arguments(run: Callable, tmp_path: Path, arguments: list[str], named: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_where_and_how_exactly_can_be_told(run: Callable, tmp_path: Path) -> None:
    result = run("videos", "--device", "cpu", "--precision", "bf16")
    assert result.exit_code == 0, result.output
    assert FeatureCache.open(tmp_path / "out").precision == "bf16"
    result = run("videos")
    assert result.exit_code == 2 and "in bf16, not of" in result.stderr


def test_a_cache_of_another_encoder_is_refused(run: Callable) -> None:
    run("videos")
    result = run("videos", "--encoder", "other")
    assert result.exit_code == 2
    assert "index.jsonl: is of the encoder" in result.stderr
