"""`videodistill score`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.videodistill.data.test_datasets import LAYOUTS, lay_out
from tests.videodistill.evaluation.test_wups import TAXONOMY
from videodistill.cli import app
from videodistill.evaluation import commands


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


def made(folder: Path, predictions: Any, name: str = "made.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(predictions))
    return path


def test_published_predictions(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "nextqa_mc"
    predictions = folder / "HGA-bert-ft-h256-val-example.json"
    result = run("nextqa-mc", folder / "val.csv", predictions)
    assert result.exit_code == 0 and result.stderr == ""
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert rows["all"] == ["4996", "49.74"]
    told = json.loads(run("nextqa-mc", folder, predictions, "--split", "val", "--json").stdout)
    assert told["metrics"]["all"]["questions"] == 4996
    assert (told["dataset"], told["split"], told["vocabulary"]) == ("nextqa-mc", "val", None)


def test_what_is_wrong_is_listed(tmp_path: Path) -> None:
    rows = "".join(f"a.mp4,what?,red,{n}\n" for n in range(12))
    folder = lay_out(tmp_path, {"test.csv": f"video,question,answer,question_id\n{rows},,,x\n"})
    result = run("own", folder, made(tmp_path, {"0": "red", "99": "red"}))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "group                    questions   percent",
        "all                             13      7.69",
        "questions without a usable prediction, counted as wrong: 11",
        *(f"  {n}: no prediction" for n in range(1, 11)),
        "  and 1 more; --json lists all",
        "annotations that cannot be read, counted as wrong: 1",
        f"  {folder / 'test.csv'}:14: video must be a text that is not empty, not None",
        "predictions to no question of this split, ignored: 1",
        "  99",
    ]
    told = json.loads(run("own", folder, tmp_path / "made.json", "--json").stdout)
    assert len(told["unanswered"]) == 11 and told["unknown"] == ["99"] and len(told["broken"]) == 1


def test_answers_that_training_lacks_are_wrong(tmp_path: Path) -> None:
    def rows(*answers: str) -> list[dict[str, Any]]:
        return [
            {"answer": answer, "id": n, "question": "who is it?", "video_id": 1}
            for n, answer in enumerate(answers)
        ]

    layout = {"train_qa.json": rows("man"), "test_qa.json": rows("man", "dog")}
    folder = lay_out(tmp_path, layout)
    predictions = made(tmp_path, {"0": "man", "1": "dog"})
    result = run("msvd-qa", folder, predictions, "--split", "test")
    assert "all                              2     50.00" in result.stdout
    assert "\nceiling: 50.0%; right answers" in result.stdout
    assert f"not among the 1 of {folder / 'train_qa.json'} count as wrong" in result.stdout
    (tmp_path / "answers.txt").write_text("man\ndog\n")
    options = ("--split", "test", "--answers", tmp_path / "answers.txt", "--json")
    told = json.loads(run("msvd-qa", folder, predictions, *options).stdout)
    assert told["metrics"]["all"]["percent"] == 100
    assert told["vocabulary"] == {
        "source": str(tmp_path / "answers.txt"),
        "answers": 2,
        "ceiling": 100.0,
    }
    (folder / "train_qa.json").unlink()
    told = json.loads(run("msvd-qa", folder, predictions, "--json").stdout)
    assert told["metrics"]["all"]["percent"] == 100 and told["vocabulary"] is None
    assert "any answer may be right" in run("msvd-qa", folder, predictions).stdout


def test_evidence_from_a_file_of_its_own(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, LAYOUTS["nextgqa"])
    predictions = made(tmp_path, {"7_6": {"prediction": 2, "answer": 2}})
    evidence = made(tmp_path, {"7_6": [1.0, 2.0]}, "evidence.json")
    result = run("nextgqa", folder, predictions, "--evidence", evidence, "--json")
    metrics = json.loads(result.stdout)["metrics"]
    assert metrics["Acc@GQA"]["percent"] == metrics["mIoU"]["percent"] == 100
    metrics = json.loads(run("nextgqa", folder, predictions, "--json").stdout)["metrics"]
    assert metrics["Acc@GQA"]["percent"] == 0 and metrics["all"]["percent"] == 100


def test_open_ended_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay_out(tmp_path, {"val.csv": LAYOUTS["nextqa-oe"]["test.csv"]})
    predictions = made(tmp_path, {"7": {"6": "home"}})
    refused(run("nextqa-oe", folder, predictions), "stopwords.txt: No such file")
    (folder / "stopwords.txt").write_text("the\n")
    monkeypatch.setattr(commands, "WordNet", lambda: TAXONOMY)
    result = run("nextqa-oe", folder, predictions)
    assert result.stdout.splitlines()[0].split() == ["group", "questions", "WUPS"]
    assert result.stdout.splitlines()[-1].split() == ["all", "1", "100.00"]


def refused(result: Any, *named: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("videodistill: error: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in named), result.stderr


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, LAYOUTS["nextqa-mc"])
    predictions = made(tmp_path, {"7_6": 2})
    refused(run("nextqa", folder, predictions), "no dataset nextqa")
    refused(run("nextqa-mc", folder, predictions), "which split?", "one of train, val")
    refused(run("nextqa-mc", folder, predictions, "--split", "test"), "no split test; give --split")
    refused(run("nextqa-mc", folder / "train.csv", tmp_path / "none"), "none: No such file")
    refused(run("nextqa-mc", folder / "train.csv", made(tmp_path, {"x": 1})), "another split?")
    refused(run("star", folder, predictions), "no file of STAR there")
    one = (folder / "train.csv", predictions)
    refused(run("nextqa-mc", *one, "--answers", predictions), "--answers is only for open-ended")
    refused(run("nextqa-mc", *one, "--evidence", predictions), "--evidence is only for nextgqa")
