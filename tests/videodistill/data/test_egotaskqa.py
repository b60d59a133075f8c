from __future__ import annotations

import json
from pathlib import Path

import pytest

from videodistill.data.egotaskqa import read_egotaskqa, write_egotaskqa
from videodistill.data.entries import Broken
from videodistill.data.record import Question, VideoInfo
from videodistill.errors import UserError

PUBLISHED = {
    "interval": "P1-R2-W3|P1|120|840",
    "question": "What did I do before washing the cup?",
    "answer": "open the tap",
    "type": ["descriptive"],
    "category": ["world"],
    "semantic": "action",
    "structural": "query",
    "reference": "indirect",
    "program": "query(action)",
    "video_id": 17,
    "question_id": 204,
    "reasoning_type": "descriptive$world$action$query",
}
"""An entry with the keys of the published files."""


def write(folder: Path, *entries: object) -> Path:
    path = folder / "qas.json"
    path.write_text(json.dumps(list(entries)))
    return path


def test_published_entry(tmp_path: Path) -> None:
    assert read_egotaskqa(write(tmp_path, PUBLISHED)) == [
        Question(
            question_id="204",
            video="P1-R2-W3|P1|120|840.mp4",
            question="What did I do before washing the cup?",
            answer="open the tap",
            family="descriptive",
            reference="indirect",
            program="query(action)",
            tags=("descriptive", "world", "action", "query"),
        )
    ]


def test_what_is_written_is_read_and_has_every_published_key(tmp_path: Path) -> None:
    questions = [
        Question(
            str(number),
            f"{'ab'[number]}.mp4",
            "what, „genau“?",
            "red",
            family="count",
            reference="direct",
            evidence=((0.25, 1.5), (2.0, 2.25)),
            context=((3.0, 3.5),) * number,
            program="f(g)",
            tags=("count", "x", "object", "query"),
        )
        for number in (0, 1)
    ]
    path = tmp_path / "qas.json"
    videos = {"a.mp4": VideoInfo(48, 12.0, 96, 96), "b.mp4": VideoInfo(60, 12.0, 96, 96)}
    write_egotaskqa(path, questions, videos)
    assert read_egotaskqa(path) == questions
    entry = json.loads(path.read_text())[1]
    assert {key: type(entry[key]) for key in PUBLISHED} == {
        key: type(value) for key, value in PUBLISHED.items()
    }
    assert entry["interval"] == "b|fpv1|0|60"
    assert entry["reasoning_type"] == "count$x$object$query"
    assert entry["category"] == ["x"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"question": " "}, "question must be"),
        ({"answer": None}, "answer must be"),
        ({"interval": "P1|120|840"}, "name|fpvX|start|end"),
        ({"reference": "both"}, "direct or indirect"),
        ({"question_id": None}, "question_id must be"),
        ({"reasoning_type": ["a"]}, "reasoning_type must be"),
        ({"evidence": [[2.0, 1.0]]}, "evidence: [[2.0, 1.0]] is not"),
        ({"evidence": [[2.0, float("nan")]]}, "is not a list of [start, end]"),
        ({"context": 3}, "context: 3 is not"),
    ],
)
def test_broken_entry_is_named(tmp_path: Path, change: dict, named: str) -> None:
    path = write(tmp_path, PUBLISHED, {**PUBLISHED, **change})
    with pytest.raises(UserError) as error:
        read_egotaskqa(path)
    assert str(error.value).startswith(f"{path}: entry 2: ")
    assert named in str(error.value)


def test_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "qas.json"
    with pytest.raises(UserError, match=r"qas\.json: No such file"):
        read_egotaskqa(path)
    path.write_text('[\n{"interval": \n')
    with pytest.raises(UserError, match=r"qas\.json:3: not valid JSON"):
        read_egotaskqa(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="where a list is expected"):
        read_egotaskqa(path)
    path.write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match=r"not UTF-8 text .* at byte 2"):
        read_egotaskqa(path)
    path.write_text("[3]")
    with pytest.raises(UserError, match="entry 1: not an object"):
        read_egotaskqa(path)


def test_broken_entries_are_collected_and_duplicates_are_an_error(tmp_path: Path) -> None:
    broken: list[Broken] = []
    path = write(tmp_path, 3, PUBLISHED, PUBLISHED | {"question_id": 205, "answer": ""})
    assert [question.question_id for question in read_egotaskqa(path, broken)] == ["204"]
    assert [entry.message.partition(": ")[2].partition(":")[0] for entry in broken] == [
        "entry 1",
        "entry 3",
    ]
    path = write(tmp_path, PUBLISHED, PUBLISHED)
    with pytest.raises(UserError, match=r"entry 2: question id 204 is given at .*entry 1"):
        read_egotaskqa(path, broken)
