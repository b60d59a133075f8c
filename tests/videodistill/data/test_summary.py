"""`data check DATASET PATH`: what it counts, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.videodistill.data.test_datasets import LAYOUTS, lay_out
from videodistill.cli import app
from videodistill.data.datasets import get_dataset
from videodistill.data.summary import summarise


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def entries(*answers: str, start: int, word: str = "who") -> list[dict[str, Any]]:
    return [
        {"answer": answer, "id": start + i, "question": f"{word} is it {i}?", "video_id": i % 2}
        for i, answer in enumerate(answers)
    ]


@pytest.fixture
def msvd(tmp_path: Path) -> Path:
    train = entries("man", "man", "cat", start=0) + entries("eat", "eat", start=9, word="what")
    test = entries("man", "dog", start=20) + entries("eat", "", start=30, word="what")
    return lay_out(tmp_path / "msvd", {"train_qa.json": train, "test_qa.json": test})


def test_counts(msvd: Path) -> None:
    found = summarise(get_dataset("msvd-qa"), msvd)
    assert found["dataset"] == "msvd-qa" and found["videos"] is None
    assert found["vocabulary"] == {"source": str(msvd / "train_qa.json"), "answers": 3}
    test = found["splits"]["test"]
    assert test.pop("broken") == [
        f"{msvd / 'test_qa.json'}: entry 4: answer must be a text that is not empty, not ''"
    ]
    assert test == {
        "file": str(msvd / "test_qa.json"),
        "questions": 3,
        "videos": 2,
        "types": {"what": 1, "who": 2},
        "without_answer": 0,
        "without_text": 0,
        "ceiling": pytest.approx(200 / 3),
        "priors": {"answer": 33.33, "first_two_words": 66.67},
    }
    train = found["splits"]["train"]
    assert train["questions"] == 5 and train["ceiling"] is None and train["priors"] is None


def test_one_file_uses_the_training_split_beside_it(msvd: Path) -> None:
    found = summarise(get_dataset("msvd-qa"), msvd / "test_qa.json")
    assert list(found["splits"]) == ["test"]
    assert found["splits"]["test"]["priors"]["first_two_words"] == 66.67


def test_real_anchors(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "msvd_qa"
    found = summarise(get_dataset("msvd-qa"), folder, answers=folder / "answer_set.txt")
    assert {name: split["questions"] for name, split in found["splits"].items()} == {
        "train": 30933,
        "val": 6415,
        "test": 13157,
    }
    test = found["splits"]["test"]
    assert round(test["priors"]["answer"], 1) == 14.1
    assert round(test["priors"]["first_two_words"], 1) == 19.4
    assert round(test["ceiling"], 1) == 90.8
    assert found["vocabulary"]["answers"] == 1000


@pytest.mark.parametrize(
    ("dataset", "folder", "questions"),
    [
        ("nextqa-mc", "nextqa_mc", {"val": 4996, "test": 8564}),
        ("nextqa-oe", "nextqa_oe", {"val": 5343, "test": 9178}),
        ("nextgqa", "nextgqa", {"val": 3358}),
        ("activitynet-qa", "activitynet_qa", {"val": 18000, "test": 8000}),
    ],
)
def test_real_folders(
    shared_data: Path, dataset: str, folder: str, questions: dict[str, int]
) -> None:
    found = summarise(get_dataset(dataset), shared_data / "annotations" / folder)
    assert {name: split["questions"] for name, split in found["splits"].items()} == questions
    assert not any(split["broken"] for split in found["splits"].values())
    assert all(split["without_answer"] == 0 for split in found["splits"].values())


def test_choices_are_guessed_among_and_have_no_ceiling(tmp_path: Path) -> None:
    head = "video,question,answer,a0,a1"
    files = {
        "train.csv": f"{head}\na.mp4,is it?,no,yes,no\na.mp4,is it?,no,yes,no\na.mp4,q,x,x,y\n",
        "test.csv": f"{head}\na.mp4,is it?,no,yes,no\nb.mp4,is it?,yes,no,yes\nb.mp4,q,x,y,x\n",
    }
    found = summarise(get_dataset("own"), lay_out(tmp_path, files))
    assert found["vocabulary"] is None
    assert found["splits"]["test"]["ceiling"] is None
    assert found["splits"]["test"]["priors"] == {"answer": 66.67, "first_two_words": 66.67}


def test_what_is_printed(msvd: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "vid1.mp4").write_bytes(b"")
    result = run("msvd-qa", msvd, "--videos", videos)
    assert result.exit_code == 1 and result.stderr == ""
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert rows["test"] == ["3", "2", "33.3%", "66.7%", "66.7%"]
    assert rows["train"] == ["5", "2", "-", "-", "-"]
    assert rows["who"] == ["3", "2"]
    assert "test: annotations that cannot be read: 1\n" in result.stdout
    assert "entry 4: answer must be a text" in result.stdout
    assert f"videos in {videos}: 1 found\nvideos missing: 1\n  vid0.avi\n" in result.stdout


def test_json_and_exit_status(msvd: Path, tmp_path: Path) -> None:
    result = run("msvd-qa", msvd, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == summarise(get_dataset("msvd-qa"), msvd)
    assert run("msvd-qa", msvd / "train_qa.json").exit_code == 0
    good = lay_out(tmp_path / "own", LAYOUTS["own"])
    (good / "a.mp4").write_bytes(b"")
    assert run("own", good, "--videos", good).exit_code == 0
    (good / "a.mp4").unlink()
    assert run("own", good, "--videos", good).exit_code == 1


def test_what_is_not_known_is_told(tmp_path: Path) -> None:
    layout = LAYOUTS["egoschema"]
    silent = {key: value for key, value in layout["questions.json"][0].items() if key != "question"}
    folder = lay_out(tmp_path, {"questions.json": [silent]})
    printed = run("egoschema", folder).stdout
    assert "test: the answer to 1 questions is not known" in printed
    assert "test: 1 questions have no text" in printed


def refused(result: Any, *named: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("videodistill: error: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in named), result.stderr


def test_bad_arguments_are_one_line(msvd: Path, tmp_path: Path) -> None:
    refused(run("msvd", msvd), "no dataset msvd; there are nextqa-mc")
    refused(run("msvd-qa"), "data check msvd-qa: give its folder, too")
    refused(run("msvd-qa", tmp_path / "none"), "none: no such file or folder")
    refused(run("star", msvd), "no file of STAR there")
    refused(run("msvd-qa", msvd, "--videos", tmp_path / "none"), "none: no such folder")
    refused(run("msvd-qa", msvd, "--answers", tmp_path / "none.txt"), "none.txt: No such file")
    (tmp_path / "empty.txt").write_text("\n")
    refused(run("msvd-qa", msvd, "--answers", tmp_path / "empty.txt"), "holds no answer")
    refused(run("msvd-qa", msvd, "--train", "a"), "--train is only for the check of the procedural")
    refused(run(msvd, "--videos", msvd), "--videos is only for the check of a dataset")
    refused(run("procedural", msvd), "dataset.json", "data make")
    twice = json.dumps(entries("man", start=0) * 2)
    (msvd / "train_qa.json").write_text(twice)
    refused(run("msvd-qa", msvd), "train_qa.json: entry 2: question id 0 is given at")
