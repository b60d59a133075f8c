from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videodistill.data.entries import Broken
from videodistill.data.record import Question
from videodistill.data.star import read_star
from videodistill.errors import UserError

ENTRY = {
    "question_id": "Interaction_T1_13",
    "question": "Which object was tidied up by the person?",
    "video_id": "6H78U",
    "start": 11.1,
    "end": 19.6,
    "answer": "The closet/cabinet.",
    "question_program": [],
    "choices": [
        {"choice_id": 1, "choice": "The blanket."},
        {"choice_id": 0, "choice": "The closet/cabinet."},
    ],
}


def write(folder: Path, *entries: object) -> Path:
    path = folder / "STAR_val.json"
    path.write_text(json.dumps(entries))
    return path


def test_fields(tmp_path: Path) -> None:
    expected = Question(
        "Interaction_T1_13",
        "6H78U.mp4",
        "Which object was tidied up by the person?",
        "The closet/cabinet.",
        ("The closet/cabinet.", "The blanket."),
        family="Interaction",
        interval=(11.1, 19.6),
    )
    assert read_star(write(tmp_path, ENTRY)) == [expected]
    hidden = {key: value for key, value in ENTRY.items() if key != "answer"}
    assert read_star(write(tmp_path, hidden))[0].answer is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"question_id": "Motion_T1_13"}, "begins with one of Interaction"),
        ({"answer": "The phone."}, "'The phone.' is none of the choices"),
        ({"end": 3}, "end must be after start 11.1"),
        ({"start": None}, "start must be a number of seconds"),
        ({"choices": ENTRY["choices"][:1]}, "choices must be a list of at least two"),
        ({"choices": [{"choice_id": 0}, {"choice_id": 1}]}, "choices: choice must be a text"),
    ],
)
def test_broken_entry(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = write(tmp_path, ENTRY, ENTRY | {"question_id": "Sequence_T1_2"} | change)
    with pytest.raises(UserError) as error:
        read_star(path)
    assert str(error.value).startswith(f"{path}: entry 2: ") and named in str(error.value)
    broken: list[Broken] = []
    assert len(read_star(path, broken)) == 1
    assert broken[0].family == (None if "question_id" in change else "Sequence")
