"""MSRVTT-QA (Xu et al., ACM MM 2017): open-ended questions as a JSON list or as lines.

The list has ``answer``, ``category_id``, ``id``, ``question`` and ``video_id``, a whole number N of
the file "videoN.mp4". The lines (.jsonl), as later models distribute them, have ``answer``,
``question``, ``video_id`` "videoN" and ``answer_type``, and no id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect
from videodistill.data.files import number_in, read_entries
from videodistill.data.msvd import family_of, first_word
from videodistill.data.record import Question


def read_msrvtt(path: str | Path, broken: list[Broken] | None = None) -> list[Question]:
    """The questions of one MSRVTT-QA file, in its order.

    ``family`` is the first word of the question: what, who, how, when, where, or "other". A
    question without an id has the number of its line, or of its entry, as such.

    Args:
        path: The .json or .jsonl file.
        broken: Takes entries that cannot be read; without it the first one is raised.

    Raises:
        UserError: The file or an entry is broken, or two questions have the same id.
    """

    def question(value: Any, where: str) -> Question:
        entry = Entry(value, where)
        name = entry.name("video_id")
        if not name.removeprefix("video").isdecimal():
            raise entry.error("video_id", "a whole number N or videoN")
        return Question(
            question_id=entry.name("id") if "id" in entry else number_in(where),
            video=f"video{name.removeprefix('video')}.mp4",
            question=entry.text("question"),
            answer=entry.text("answer"),
            family=first_word(entry.text("question")),
            tags=(entry.text("answer_type"),) if "answer_type" in entry else (),
        )

    return collect(read_entries(Path(path), broken), question, broken, family_of)
