"""Your own questions, as csv or as JSON lines.

Columns or keys: ``video`` (path in the video folder), ``question`` and, where there are any,
``answer``, the choices as ``a0``, ``a1``, ... or as ``choices`` (a list in JSON; separated by "|"
in csv), ``type``, ``start`` and ``end`` in seconds, ``evidence`` (a list of [start, end] in JSON;
"2-4.5|7-9" in csv), and ``question_id``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect, right_choice
from videodistill.data.files import number_in, read_entries, read_rows, stretches
from videodistill.data.record import Question, Stretch


def read_own(path: str | Path, broken: list[Broken] | None = None) -> list[Question]:
    """The questions of a .csv, .jsonl or .json file, in its order.

    A question without an id has the number of its line (in a .json list, of its entry) as such.
    The answer to a question with choices is the text of one, or else its index from 0. Empty cells
    count as missing.

    Args:
        path: The file.
        broken: Takes rows that cannot be read; without it the first one is raised.

    Raises:
        UserError: The file or a row is broken, or two questions have the same id.
    """
    path = Path(path)
    as_json = path.suffix in (".json", ".jsonl")
    rows = read_entries(path, broken) if as_json else _csv_rows(path, broken)
    return collect(rows, _question, broken, lambda row: isinstance(row, dict) and row.get("type"))


def _csv_rows(path: Path, broken: list[Broken] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for line, row in read_rows(path, ("video", "question"), broken):
        filled: dict[str, Any] = {name: cell for name, cell in row.items() if cell}
        if "choices" in filled:
            filled["choices"] = [choice.strip() for choice in filled["choices"].split("|")]
        if "evidence" in filled:
            filled["evidence"] = [stretch.split("-") for stretch in filled["evidence"].split("|")]
        yield f"{path}:{line}", filled


def _question(value: Any, where: str) -> Question:
    entry = Entry(value, where)
    choices = _choices(entry)
    answer = entry.name("answer") if "answer" in entry else None
    if answer is not None and choices is not None:
        answer = right_choice(answer, choices, where)
    return Question(
        question_id=entry.name("question_id") if "question_id" in entry else number_in(where),
        video=entry.text("video"),
        question=entry.text("question"),
        answer=answer,
        choices=choices,
        family=entry.name("type") if "type" in entry else None,
        interval=_interval(entry),
        evidence=stretches(entry.value.get("evidence") or (), f"{where}: evidence"),
    )


def _choices(entry: Entry) -> tuple[str, ...] | None:
    numbered = [name for name in entry.value if re.fullmatch(r"a\d+", name) and name in entry]
    if "choices" in entry:
        choices = entry.texts("choices")
    elif numbered:
        choices = tuple(entry.name(f"a{number}") for number in range(len(numbered)))
    else:
        return None
    if len(choices) < 2:
        raise entry.error("choices", "at least two")
    return choices


def _interval(entry: Entry) -> Stretch | None:
    if "start" not in entry and "end" not in entry:
        return None
    start, end = entry.seconds("start"), entry.seconds("end")
    if not 0 <= start < end:
        raise entry.error("end", f"after start {start:g}, which must not be negative")
    return start, end
