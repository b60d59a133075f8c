"""MSVD-QA (Xu et al., ACM MM 2017): open-ended questions as a JSON list.

Each entry has ``answer``, ``id``, ``question`` and ``video_id``, a whole number. A text file beside
them tells which clip that is, as lines "<name> vid<number>"; the clips are "<name>.avi".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect
from videodistill.data.files import read_entries, read_text
from videodistill.data.record import Question
from videodistill.errors import UserError

_KINDS = ("what", "who", "how", "when", "where")


def read_msvd(
    path: str | Path, mapping: str | Path | None = None, broken: list[Broken] | None = None
) -> list[Question]:
    """The questions of one MSVD-QA file, in its order.

    ``family`` is the first word of the question: what, who, how, when, where, or "other".

    Args:
        path: The JSON file.
        mapping: The text file that maps names of clips to numbers; without it the video of
            number N is "vidN.avi".
        broken: Takes entries that cannot be read; without it the first one is raised.

    Raises:
        UserError: A file or an entry is broken, or two questions have the same id.
    """
    names = read_mapping(mapping) if mapping is not None else None

    def question(value: Any, where: str) -> Question:
        entry = Entry(value, where)
        return Question(
            question_id=entry.name("id"),
            video=_video(entry, names, mapping),
            question=entry.text("question"),
            answer=entry.text("answer"),
            family=first_word(entry.text("question")),
        )

    return collect(read_entries(Path(path), broken), question, broken, family_of)


def _video(entry: Entry, names: Mapping[int, str] | None, mapping: str | Path | None) -> str:
    number = entry.whole("video_id")
    if names is None:
        return f"vid{number}.avi"
    if number not in names:
        raise UserError(f"{entry.where}: video_id {number} is not in {mapping}")
    return f"{names[number]}.avi"


def first_word(question: str) -> str:
    """What MSVD-QA and MSRVTT-QA call the type of a question."""
    word = question.lower().split()[0]
    return word if word in _KINDS else "other"


def family_of(value: Any) -> str | None:
    """The question type of an entry that may be broken."""
    question = value.get("question") if isinstance(value, dict) else None
    return first_word(question) if isinstance(question, str) and question.strip() else None


def read_mapping(path: str | Path) -> dict[int, str]:
    """Names of clips by number from lines "<name> vid<number>".

    Raises:
        UserError: The file cannot be read, a line is of another form, or a number comes twice.
    """
    names: dict[int, str] = {}
    for line, text in enumerate(read_text(Path(path)).splitlines(), start=1):
        if not text.strip():
            continue
        name, _, number = text.strip().rpartition(" ")
        number = number.removeprefix("vid")
        if not name.strip() or not number.isdecimal():
            raise UserError(f"{path}:{line}: {text!r} is not of the form <name> vid<number>")
        if int(number) in names:
            raise UserError(f"{path}:{line}: vid{number} is given twice")
        names[int(number)] = name.strip()
    return names
