from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videodistill.errors import UserError
from videodistill.evaluation.predictions import Prediction, read_evidence, read_predictions


def write(folder: Path, value: Any, name: str = "predictions.json") -> Path:
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value, indent=1))
    return path


@pytest.mark.parametrize(
    "layout",
    [
        {"a_0": 3, "a_1": "red"},
        {"a_0": {"prediction": 3, "answer": 1}, "a_1": {"prediction": "red", "answer": 1}},
        {"a_0": {"answer": 3}, "a_1": {"answer": "red"}},
        {"a": {"0": 3, "1": "red"}},
        [{"question_id": "a_0", "answer": 3}, {"question_id": "a_1", "answer": "red"}],
        [{"q_uid": "a_0", "pred": 3.0}, {"qid": "a_1", "pred_answer": "red", "answer": "blue"}],
        {"Sequence": [{"question_id": "a_0", "answer": 3}, {"id": "a_1", "answer": "red"}]},
    ],
)
def test_layouts(tmp_path: Path, layout: Any) -> None:
    expected = {"a_0": Prediction(3), "a_1": Prediction("red")}
    assert read_predictions(write(tmp_path, layout)) == expected
    if isinstance(layout, list):
        assert read_predictions(write(tmp_path, layout, "predictions.jsonl")) == expected


def test_ids_may_be_numbers_and_more_may_be_told(tmp_path: Path) -> None:
    entries = [
        {"id": 7, "answer": "red", "evidence": [1, 2.5]},
        {"id": 8, "error": "b.mp4: the file is empty"},
        {"id": 9, "answer": None},
    ]
    assert read_predictions(write(tmp_path, entries)) == {
        "7": Prediction("red", (1.0, 2.5)),
        "8": Prediction(error="b.mp4: the file is empty"),
        "9": Prediction(),
    }


def test_published_files(shared_data: Path) -> None:
    folder = shared_data / "annotations"
    found = read_predictions(folder / "nextqa_mc" / "HGA-bert-ft-h256-val-example.json")
    assert len(found) == 4996 and found["4010069381_6"] == Prediction(4)
    found = read_predictions(folder / "nextqa_oe" / "HGA-same-att-qns23ans7-val-example.json")
    assert len(found) == 5343 and found["2809330695_2"] == Prediction("wants to get the toy")


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ([{"question": "what?", "answer": "red"}], "entry 1: no object with the id"),
        (["red"], "entry 1: no object with the id"),
        ([{"id": 1, "result": "red"}], "entry 1: no prediction"),
        ([{"id": 1, "answer": ["red"]}], "entry 1: a prediction must be a text or an index"),
        ({"a_0": True}, "a_0: a prediction must be a text or an index, not True"),
        ({"a_0": 0.5}, "a_0: a prediction must be a text or an index, not 0.5"),
        ([{"id": 1, "answer": "a"}, {"id": "1", "answer": "b"}], "question 1 has a prediction"),
        ({"a_0": 1, "a": {"0": 1}}, "question a_0 has a prediction"),
        ([{"id": 1, "answer": "a", "evidence": [2, 1]}], "evidence: [[2, 1]] is not a list"),
    ],
)
def test_broken(tmp_path: Path, layout: Any, named: str) -> None:
    path = write(tmp_path, layout)
    with pytest.raises(UserError) as error:
        read_predictions(path)
    assert str(error.value).startswith(f"{path}: ") and named in str(error.value)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    with pytest.raises(UserError, match="No such file"):
        read_predictions(path)
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(UserError, match="'a' is given twice"):
        read_predictions(path)
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"predictions\.json:1: not valid JSON"):
        read_predictions(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_predictions(path)


def test_evidence(tmp_path: Path) -> None:
    assert read_evidence(write(tmp_path, {"a_0": [1, 2]})) == {"a_0": (1.0, 2.0)}
    with pytest.raises(UserError, match=r"question a_0: \[3\] is not"):
        read_evidence(write(tmp_path, {"a_0": 3}))
