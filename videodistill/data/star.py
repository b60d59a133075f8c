"""STAR (Wu et al., NeurIPS 2021): multiple-choice questions about stretches of Charades videos.

A JSON list of ``question_id`` "<type>_T<template>_<number>", ``question``, ``video_id``, ``start``
and ``end`` in seconds, ``answer`` (the text of the right choice; the test file has none) and
``choices``, a list of ``choice_id`` and ``choice``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect, right_choice
from videodistill.data.files import read_entries
from videodistill.data.record import Question

TYPES = ("Interaction", "Sequence", "Prediction", "Feasibility")


def read_star(path: str | Path, broken: list[Broken] | None = None) -> list[Question]:
    """The questions of one STAR file, in its order.

    ``family`` is the type that the question's id begins with, ``interval`` the stretch that it is
    about; ``choices`` are in the order of their ids.

    Args:
        path: The JSON file.
        broken: Takes entries that cannot be read; without it the first one is raised.

    Raises:
        UserError: The file or an entry is broken, or two questions have the same id.
    """
    return collect(read_entries(Path(path), broken), _question, broken, _family)


def _question(value: Any, where: str) -> Question:
    entry = Entry(value, where)
    name = entry.text("question_id")
    if name.partition("_")[0] not in TYPES:
        raise entry.error("question_id", f"a text that begins with one of {', '.join(TYPES)}")
    start, end = entry.seconds("start"), entry.seconds("end")
    if not 0 <= start <= end:
        raise entry.error("end", f"after start {start:g}, which must not be negative")
    listed = value.get("choices")
    if not isinstance(listed, list) or len(listed) < 2:
        raise entry.error("choices", "a list of at least two")
    numbered = [Entry(choice, f"{where}: choices") for choice in listed]
    numbered.sort(key=lambda choice: choice.whole("choice_id"))
    choices = tuple(choice.text("choice") for choice in numbered)
    answer = right_choice(entry.text("answer"), choices, where) if "answer" in entry else None
    return Question(
        question_id=name,
        video=f"{entry.name('video_id')}.mp4",
        question=entry.text("question"),
        answer=answer,
        choices=choices,
        family=name.partition("_")[0],
        interval=(start, end),
    )


def _family(value: Any) -> str | None:
    name = value.get("question_id") if isinstance(value, dict) else None
    kind = name.partition("_")[0] if isinstance(name, str) else None
    return kind if kind in TYPES else None
