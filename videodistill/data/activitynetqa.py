"""ActivityNet-QA (Yu et al., AAAI 2019): open-ended questions and their answers in two JSON lists.

``*_q.json`` has ``question_id``, ``question`` and ``video_name``; ``*_a.json`` has ``question_id``,
``answer`` and ``type``, a number from 0 to 8. The video is ActivityNet's "v_<video_name>".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect
from videodistill.data.files import read_entries
from videodistill.data.record import Question
from videodistill.errors import UserError

TYPES = (
    "motion",
    "spatial relation",
    "temporal relation",
    "yes/no",
    "color",
    "object",
    "location",
    "number",
    "other",
)
"""Names of the types 0 to 8; those from 3 on are the free-form questions, by kind of answer."""


def read_activitynetqa(
    path: str | Path, answers: str | Path | None = None, broken: list[Broken] | None = None
) -> list[Question]:
    """The questions of one split, in the order of their file.

    ``family`` is the name of the type; it and ``answer`` are ``None`` without ``answers``.

    Args:
        path: The JSON file of questions.
        answers: The JSON file of their answers and types.
        broken: Takes entries that cannot be read, questions without an answer and answers without
            a question; without it the first one is raised.

    Raises:
        UserError: A file or an entry is broken, an answer has no id, or two questions or answers
            have the same id.
    """
    given: dict[str, Entry] = {}
    for where, value in read_entries(Path(answers)) if answers is not None else ():
        answer = Entry(value, where)
        name = answer.name("question_id")
        if name in given:
            raise UserError(f"{where}: question id {name} is given at {given[name].where} already")
        given[name] = answer
    asked = set()

    def question(value: Any, where: str) -> Question:
        entry = Entry(value, where)
        name = entry.name("question_id")
        asked.add(name)
        if answers is not None and name not in given:
            raise UserError(f"{where}: question {name} has no answer in {answers}")
        answer = given.get(name)
        return Question(
            question_id=name,
            video=f"v_{entry.text('video_name')}.mp4",
            question=entry.text("question"),
            answer=answer and answer.text("answer"),
            family=answer and _type(answer),
        )

    questions = collect(read_entries(Path(path), broken), question, broken)
    for name in sorted(given.keys() - asked):
        message = f"{given[name].where}: question {name} is not in {path}"
        if broken is None:
            raise UserError(message)
        broken.append(Broken(message))
    return questions


def _type(answer: Entry) -> str:
    kind = answer.whole("type")
    if not 0 <= kind < len(TYPES):
        raise answer.error("type", "a number from 0 to 8")
    return TYPES[kind]
