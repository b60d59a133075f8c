"""From the entries of an annotation file to questions, and what happens to broken ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from videodistill.data.record import Question
from videodistill.errors import UserError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Broken:
    """An annotation that cannot be read."""

    message: str
    """One line: the file, the line or entry, and what is wrong with it."""
    family: str | None = None
    """The question type, where the annotation still tells it."""


def collect(
    rows: Iterable[tuple[str, Row]],
    read: Callable[[Row, str], Question],
    broken: list[Broken] | None,
    family: Callable[[Row], Any] = lambda row: None,
) -> list[Question]:
    """The questions of a file, in its order.

    Args:
        rows: (Where it stands, annotation) of each.
        read: Makes the question of an annotation, or raises a UserError that says where it stands.
        broken: Takes the annotations that cannot be read; without it the first one is raised.
        family: The question type of a broken annotation, if that much can be read.

    Raises:
        UserError: An annotation is broken and ``broken`` is not given, or two have the same id.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    for where, row in rows:
        try:
            question = read(row, where)
        except UserError as error:
            if broken is None:
                raise
            kind = family(row)
            broken.append(Broken(str(error), kind if isinstance(kind, str) and kind else None))
            continue
        if question.question_id in places:
            raise UserError(
                f"{where}: question id {question.question_id} is given at "
                f"{places[question.question_id]} already"
            )
        places[question.question_id] = where
        questions.append(question)
    return questions


class Entry:
    """An object of a JSON file, asked for what its keys must hold.

    Everything raises UserError when a key holds something else; its message begins with ``where``.
    """

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise UserError(f"{where}: not an object with question, answer, ...")
        self.value, self.where = value, where

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def error(self, key: str, wanted: str) -> UserError:
        return UserError(f"{self.where}: {key} must be {wanted}, not {self.value.get(key)!r}")

    def text(self, key: str) -> str:
        """A text that is not empty, stripped of surrounding white space."""
        value = self.value.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "a text that is not empty")
        return value.strip()

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts that are not empty, each stripped."""
        value = self.value.get(key)
        if not isinstance(value, list) or not all(isinstance(t, str) and t.strip() for t in value):
            raise self.error(key, "a list of texts that are not empty")
        return tuple(text.strip() for text in value)

    def name(self, key: str) -> str:
        """A whole number or a text that is not empty, as text."""
        value = self.value.get(key)
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise self.error(key, "a number or a text")
        return str(value).strip()

    def whole(self, key: str) -> int:
        """A whole number, perhaps written as text."""
        try:
            return int(self.name(key))
        except ValueError:
            raise self.error(key, "a whole number") from None

    def seconds(self, key: str) -> float:
        """A time, perhaps written as text."""
        try:
            value = float(self.value.get(key))
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise self.error(key, "a number of seconds")
        return value


def right_choice(answer: str, choices: tuple[str, ...], where: str) -> str:
    """The text of the right choice, which is given as that text or else as an index from 0.

    Raises:
        UserError: It is neither; the message begins with ``where``.
    """
    if answer in choices:
        return answer
    if answer.isdecimal() and int(answer) < len(choices):
        return choices[int(answer)]
    raise UserError(f"{where}: answer {answer!r} is none of the choices {choices} nor its index")
