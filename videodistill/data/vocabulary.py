"""Answers as classes: which ones can be given, and how much of a split they cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from videodistill.data.files import read_lines
from videodistill.data.record import Question
from videodistill.errors import UserError


def commonest_answers(questions: Iterable[Question], size: int | None = None) -> list[str]:
    """The commonest answers, the commonest first; answers that are equally frequent, by word.

    Args:
        questions: Those of the training split alone.
        size: How many at most; all by default.
    """
    counted = Counter(question.answer for question in questions if question.answer is not None)
    return sorted(counted, key=lambda answer: (-counted[answer], answer))[:size]


def read_vocabulary(path: str | Path) -> list[str]:
    """The answers in a text file, one on each line.

    Raises:
        UserError: The file cannot be read, or holds no answer.
    """
    answers = read_lines(Path(path))
    if not answers:
        raise UserError(f"{path}: holds no answer; write one on each line")
    return answers


def ceiling(questions: Iterable[Question], vocabulary: Collection[str]) -> float:
    """Percent of the questions whose answer is in a vocabulary: no classifier can do better."""
    known = frozenset(vocabulary)
    inside = [question.answer in known for question in questions if question.answer is not None]
    return 100 * sum(inside) / max(1, len(inside))
