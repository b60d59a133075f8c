from __future__ import annotations

import json
from pathlib import Path

import pytest

from videodistill.data.egoschema import read_egoschema
from videodistill.data.entries import Broken
from videodistill.data.record import Question
from videodistill.errors import UserError

OPTIONS = {f"option {number}": f"c does {number}" for number in range(5)}
ENTRY = {"q_uid": "a-1", "google_drive_id": "x", "question": "what does c do?", **OPTIONS}


def files(folder: Path, entries: list, answers: dict) -> tuple[Path, Path]:
    (folder / "questions.json").write_text(json.dumps(entries))
    (folder / "subset_answers.json").write_text(json.dumps(answers))
    return folder / "questions.json", folder / "subset_answers.json"


def test_with_and_without_answers_and_question(tmp_path: Path) -> None:
    silent = {key: value for key, value in ENTRY.items() if key != "question"} | {"q_uid": "a-2"}
    paths = files(tmp_path, [ENTRY, silent], {"a-1": 3})
    choices = tuple(OPTIONS.values())
    first = Question("a-1", "a-1.mp4", "what does c do?", "c does 3", choices)
    second = Question("a-2", "a-2.mp4", "", None, choices)
    assert read_egoschema(*paths) == [first, second]
    assert read_egoschema(paths[0])[0].answer is None


@pytest.mark.parametrize(
    ("entry", "answers", "named"),
    [
        (ENTRY | {"option 4": ""}, {}, "option 4 must be a text"),
        (ENTRY | {"question": ""}, {}, "question must be a text"),
        (ENTRY, {"a-1": 5}, "a-1 must be the index of a choice, not 5"),
        (ENTRY, {"a-1": True}, "a-1 must be the index of a choice, not True"),
    ],
)
def test_broken(tmp_path: Path, entry: dict, answers: dict, named: str) -> None:
    paths = files(tmp_path, [entry], answers)
    with pytest.raises(UserError) as error:
        read_egoschema(*paths)
    assert named in str(error.value)
    broken: list[Broken] = []
    assert read_egoschema(*paths, broken) == []
    assert [entry.message for entry in broken] == [str(error.value)]


def test_answers_to_other_questions(tmp_path: Path) -> None:
    paths = files(tmp_path, [ENTRY], {"b-1": 0})
    with pytest.raises(UserError, match="b-1 is no question of"):
        read_egoschema(*paths, [])
