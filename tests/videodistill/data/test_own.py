from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videodistill.data.entries import Broken
from videodistill.data.own import read_own
from videodistill.data.record import Question
from videodistill.errors import UserError


def write(folder: Path, *lines: Any, name: str = "mine.csv") -> Path:
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_the_least(tmp_path: Path) -> None:
    expected = [Question("2", "a/b.mkv", "what?"), Question("4", "c.mp4", "who?")]
    path = write(tmp_path, "video,question", "a/b.mkv,what?", "", "c.mp4,who?")
    assert read_own(path) == expected
    lines = [{"video": "a/b.mkv", "question": "what?"}, {"video": "c.mp4", "question": "who?"}]
    path = write(tmp_path, "", lines[0], "", lines[1], name="mine.jsonl")
    assert read_own(path) == expected


def test_everything(tmp_path: Path) -> None:
    expected = Question(
        "x1",
        "a.mp4",
        "what?",
        "red",
        ("blue", "red"),
        family="colour",
        interval=(1.5, 4.0),
        evidence=((2.0, 2.5), (3.0, 4.0)),
    )
    head = "video,question,answer,type,start,end,evidence,question_id"
    rest = "a.mp4,what?,{},colour,1.5,4,2-2.5 | 3-4,x1"
    for answer in ("red", "1"):
        row = rest.format(answer)
        assert read_own(write(tmp_path, f"{head},a0,a1,a2", f"{row},blue,red,")) == [expected]
        assert read_own(write(tmp_path, f"{head},choices", f"{row},blue | red")) == [expected]
    entry = {
        "video": "a.mp4",
        "question": "what?",
        "answer": 1,
        "choices": ["blue", "red"],
        "type": "colour",
        "start": 1.5,
        "end": 4,
        "evidence": [[2, 2.5], [3, 4]],
        "question_id": "x1",
    }
    assert read_own(write(tmp_path, entry, name="mine.jsonl")) == [expected]
    assert read_own(write(tmp_path, f"[{json.dumps(entry)}]", name="mine.json")) == [expected]


def test_a_choice_that_looks_like_an_index_is_meant_as_text(tmp_path: Path) -> None:
    path = write(tmp_path, "video,question,answer,a0,a1", "a.mp4,how many?,1,1,0")
    assert read_own(path)[0].answer == "1"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (",what?,,,,,,", "video must be a text"),
        ("a.mp4,,,,,,,", "question must be a text"),
        ("a.mp4,what?,green,,,red,blue,", "'green' is none of the choices"),
        ("a.mp4,what?,2,,,red,blue,", "'2' is none of the choices"),
        ("a.mp4,what?,red,,,red,,", "choices must be at least two"),
        ("a.mp4,what?,,3,2,,,", "end must be after start 3"),
        ("a.mp4,what?,,-1,2,,,", "must not be negative"),
        ("a.mp4,what?,,1,,,,", "end must be a number of seconds"),
        ("a.mp4,what?,,soon,2,,,", "start must be a number of seconds"),
        ("a.mp4,what?,,,,,,4-2", "evidence: [['4', '2']] is not a list of [start, end]"),
        ("a.mp4,what?,,,,,,2", "evidence: [['2']] is not a list of [start, end]"),
        ("a.mp4,what?", "2 cells where the first line names 8"),
    ],
)
def test_broken_row(tmp_path: Path, row: str, named: str) -> None:
    head = "video,question,answer,start,end,a0,a1,evidence"
    path = write(tmp_path, head, "a.mp4,what?,red,1,2,red,blue,1-2", row)
    with pytest.raises(UserError) as error:
        read_own(path)
    assert str(error.value).startswith(f"{path}:3: ") and named in str(error.value)
    broken: list[Broken] = []
    assert [question.question_id for question in read_own(path, broken)] == ["2"]
    assert [entry.message for entry in broken] == [str(error.value)]


def test_columns_and_ids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.csv:1: no column video"):
        read_own(write(tmp_path, "film,question", "a.mp4,what?"))
    path = write(tmp_path, "video,question,question_id", "a.mp4,what?,1", "a.mp4,who?,1")
    with pytest.raises(UserError, match=r"mine\.csv:3: question id 1 is given at .*:2 already"):
        read_own(path, [])
