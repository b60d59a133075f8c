"""`data check`: what it counts and trains on a tiny data set, what it prints, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.videodistill.tiny import tiny_clip
from videodistill.cli import app
from videodistill.data import check
from videodistill.data.procedural.make import Split, make_dataset
from videodistill.data.procedural.questions import FAMILIES
from videodistill.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "data"
    splits = {"train": Split(5, (16, 16), 32), "test": Split(3, (17, 20), 32)}
    make_dataset(folder, splits | {"single": Split(1, (16, 16), 32, questions=1)}, workers=1)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("encoder"))


def checked(dataset: Path, encoder: Path, train: str = "train", **options: Any) -> dict[str, Any]:
    few = {"question_steps": 10, "frame_steps": 3, "workers": 1}
    return check.check_dataset(dataset, train, "test", encoder, **(few | options))


def test_counts_and_accuracies(dataset: Path, encoder: Path) -> None:
    lines: list[str] = []
    found = checked(dataset, encoder, videos=4, log=lines.append)
    assert found["questions"] == {"train": 40, "test": 24}
    assert found["families"] == {name: 12.5 for name in sorted(FAMILIES)}
    answers = [
        entry["answer"]
        for entry in json.loads((dataset / "annotations/test/egotaskqa.json").read_text())
    ]
    assert found["answers"] == 100 * max(map(answers.count, answers)) / 24
    assert set(found["priors"]) == {"answer", "first_two_words"}
    assert set(found["question_only"]) == {*FAMILIES, "all"}
    assert set(found["one_frame"]) == {*FAMILIES, "direct", "indirect", "all"}
    for part in ("question_only", "one_frame"):
        rows = [found[part][family] for family in FAMILIES]
        assert all(0 <= value <= 100 for value in rows)
        assert found[part]["all"] == pytest.approx(sum(rows) / len(rows), abs=0.02)
    assert len(lines) == 2


def test_the_same_twice(dataset: Path, encoder: Path) -> None:
    assert checked(dataset, encoder) == checked(dataset, encoder)


def test_its_answers_are_scored_by_family_and_reference(dataset: Path, tmp_path: Path) -> None:
    questions = check._open(dataset, "test")
    answers = {question.question_id: question.answer for question in questions[:12]}
    (tmp_path / "made.json").write_text(json.dumps(answers))
    arguments = ["score", "procedural", str(dataset), str(tmp_path / "made.json"), "--json"]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--split", "test"]).stdout)
    assert set(told["metrics"]) == {*FAMILIES, "direct", "indirect", "all"}
    assert told["metrics"]["all"] == {"percent": 50.0, "questions": 24}


def test_only_so_many_training_videos(dataset: Path) -> None:
    questions = check._open(dataset, "train")
    kept = check._about(questions, 2)
    assert {question.video for question in kept} == {"train-000000.mp4", "train-000001.mp4"}
    assert len(kept) == 16
    assert check._about(questions, 99) == questions


def test_a_split_of_one_question_is_refused(dataset: Path, encoder: Path) -> None:
    with pytest.raises(UserError, match="single has a single question"):
        checked(dataset, encoder, train="single")


def run(*arguments: str):
    return CliRunner().invoke(app, ["data", "check", *arguments])


def refused(result: Any, *named: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("videodistill: error: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in named), result.stderr


def test_bad_input_is_one_line(dataset: Path, tmp_path: Path) -> None:
    refused(run(str(tmp_path / "none")), "none", "dataset.json", "data make")
    refused(run(str(tmp_path)), str(tmp_path), "dataset.json", "data make")
    refused(run(str(dataset), "--train", "tarin"), "no split tarin", "test, train")
    refused(run(str(dataset), "--test", "tets"), "no split tets")
    refused(run(str(dataset), "--workers", "0"), "--workers", "--help")
    refused(run(str(dataset), "--encoder", "no/such/one"), "no/such/one")
    broken = tmp_path / "broken"
    shutil.copytree(dataset / "annotations", broken / "annotations")
    described = broken / "dataset.json"
    described.write_text("{")
    refused(run(str(broken)), str(described), "not valid JSON")
    described.write_text("{}")
    refused(run(str(broken)), str(described), "no splits")
    described.write_text('{"splits": {"train": {"arguments": {}}}}')
    refused(run(str(broken)), "split train is not finished", "goes on")
    shutil.copyfile(dataset / "dataset.json", described)
    annotations = broken / "annotations" / "train" / "nextqa_mc.csv"
    annotations.write_text("".join(annotations.read_text().splitlines(keepends=True)[:-1]))
    refused(run(str(broken)), "40 questions in egotaskqa.json, 39 in nextqa_mc.csv")


@pytest.mark.parametrize(("blind", "one"), [(20.0, 30.0), (40.5, 30.0), (20.0, 45.5)])
def test_the_table_and_the_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blind: float, one: float
) -> None:
    def found(dataset: Path, train: str, test: str, encoder: Path, **options: Any) -> dict:
        assert (dataset, train, test, encoder) == (tmp_path, "a", "b", Path("eyes"))
        assert options.pop("workers") == 3
        options.pop("log")("training")
        assert not options
        return {
            "questions": {"a": 300, "b": 100},
            "families": {"count": 40.0, "where": 60.0},
            "answers": 7.25,
            "priors": {"answer": 6.0, "first_two_words": 19.5},
            "question_only": {"count": 31.0, "where": 22.0, "all": blind},
            "one_frame": {"count": 33.0, "where": 44.0, "all": one},
        }

    monkeypatch.setattr(check, "check_dataset", found)
    given = ["--train", "a", "--test", "b", "--encoder", "eyes", "--workers", "3"]
    result = run(str(tmp_path), *given)
    passed = (blind, one) == (20.0, 30.0)
    assert result.exit_code == (0 if passed else 1)
    assert result.stdout.splitlines()[0] == "questions: 300 in a, 100 in b"
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert rows["count"] == ["40.0%", "31.0%", "33.0%"]
    assert rows["all"] == ["100.0%", f"{blind}%", f"{one}%"]
    assert rows["limit"] == ["40.0%", "45.0%"]
    assert result.stderr.splitlines()[0] == "training"
    assert ("without looking properly" in result.stderr) != passed
