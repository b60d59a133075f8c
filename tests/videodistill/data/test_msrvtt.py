from __future__ import annotations

import json
from pathlib import Path

import pytest

from videodistill.data.entries import Broken
from videodistill.data.msrvtt import read_msrvtt
from videodistill.data.record import Question
from videodistill.errors import UserError

NATIVE = {
    "answer": "couch",
    "category_id": 14,
    "id": 158581,
    "question": "what are three people sitting on?",
    "video_id": 6513,
}
LINE = {
    "answer": "couch",
    "question": "what are three people sitting on?",
    "video_id": "video6513",
    "answer_type": "object",
}


def test_native_and_lines(tmp_path: Path) -> None:
    native = tmp_path / "train_qa.json"
    native.write_text(json.dumps([NATIVE]))
    asked = ("video6513.mp4", NATIVE["question"], "couch")
    assert read_msrvtt(native) == [Question("158581", *asked, family="what")]
    lines = tmp_path / "train.jsonl"
    lines.write_text(f"{json.dumps(LINE)}\n\n{json.dumps(LINE)}\n")
    assert read_msrvtt(lines) == [
        Question(name, *asked, family="what", tags=("object",)) for name in ("1", "3")
    ]


def test_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE | {'video_id': 'clip7'})}\n{{\n")
    with pytest.raises(UserError, match=r"train\.jsonl:2: video_id must be a whole number N or"):
        read_msrvtt(path)
    broken: list[Broken] = []
    assert [question.question_id for question in read_msrvtt(path, broken)] == ["1"]
    assert [entry.message.partition(": ")[0] for entry in broken] == [f"{path}:2", f"{path}:3"]
    assert "not valid JSON" in broken[1].message
