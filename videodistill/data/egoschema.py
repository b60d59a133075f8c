"""EgoSchema (Mangalam et al., NeurIPS 2023): five choices about three-minute videos.

A JSON list of ``q_uid``, ``question`` and ``option 0`` to ``option 4``; the video is
"<q_uid>.mp4". The answers to 500 of the 5,031 questions are public, as an object of indices by
``q_uid``. One version of the list has no ``question``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect
from videodistill.data.files import read_entries, read_json
from videodistill.data.record import Question
from videodistill.errors import UserError

_CHOICES = tuple(f"option {number}" for number in range(5))


def read_egoschema(
    path: str | Path, answers: str | Path | None = None, broken: list[Broken] | None = None
) -> list[Question]:
    """The questions of EgoSchema, in the order of their file.

    ``question`` is empty where the file has no such key.

    Args:
        path: The JSON file of questions.
        answers: The JSON file of answers, of some of them or of all.
        broken: Takes entries that cannot be read; without it the first one is raised.

    Raises:
        UserError: A file or an entry is broken, two questions have the same id, or an answer is
            for a question that is not there.
    """
    right = read_json(Path(answers), dict) if answers is not None else {}
    asked = set()

    def question(value: Any, where: str) -> Question:
        entry = Entry(value, where)
        name = entry.text("q_uid")
        asked.add(name)
        choices = tuple(entry.text(option) for option in _CHOICES)
        index = right.get(name)
        if index is not None and not (type(index) is int and 0 <= index < len(choices)):
            raise UserError(f"{answers}: {name} must be the index of a choice, not {index!r}")
        return Question(
            question_id=name,
            video=f"{name}.mp4",
            question=entry.text("question") if "question" in value else "",
            answer=None if index is None else choices[index],
            choices=choices,
        )

    questions = collect(read_entries(Path(path), broken), question, broken)
    for name in sorted(right.keys() - asked):
        raise UserError(
            f"{answers}: {name} is no question of {path}: take files that belong together"
        )
    return questions
