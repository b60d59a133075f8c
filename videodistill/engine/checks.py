"""Refuse bad input in one line before any work starts. Imports neither torch nor matplotlib."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from videodistill.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
GENERAL_ANSWERS = ASSETS / "answers.txt"
"""Some 1,000 everyday words: what an open question is answered with when nothing else is given."""

FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


PRECISIONS = ("fp32", "bf16")
"""Of matrix products."""


def check_precision(precision: str) -> str:
    """The same, or a UserError when it is none of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    return precision


def check_questions(questions: str | Sequence[str]) -> list[str]:
    """One question or several, as a list. An empty one, or none at all, is a UserError."""
    asked = [questions] if isinstance(questions, str) else list(questions)
    if not asked:
        raise UserError("no question was given: ask at least one")
    for position, question in enumerate(asked, start=1):
        if not question.strip():
            which = "the question" if len(asked) == 1 else f"question {position} of {len(asked)}"
            raise UserError(f"{which} is empty: write what you want to know about the video")
    return asked


def check_choices(choices: Sequence[str], source: str = "choices") -> list[str]:
    """The answers to choose from, stripped; at least two, none empty, none twice.

    Two choices that differ only in case or spacing are the same: the encoders read lower case.
    `source` is what the message blames.
    """
    if isinstance(choices, str):
        raise TypeError(f"{source} is one string, {choices!r}: give a list of strings")
    cleaned = [" ".join(choice.split()) for choice in choices]
    first_seen: dict[str, str] = {}
    for position, choice in enumerate(cleaned, start=1):
        if not choice:
            raise UserError(f"{source}: number {position} is empty: remove it or fill it in")
        if choice.casefold() in first_seen:
            known = first_seen[choice.casefold()]
            twice = f"{choice!r} is given twice"
            if known != choice:
                twice = f"{known!r} and {choice!r} are the same answer"
            raise UserError(f"{source}: {twice}: keep one of them")
        first_seen[choice.casefold()] = choice
    if len(cleaned) < 2:
        given = f"only {cleaned[0]!r}" if cleaned else "nothing"
        raise UserError(f"{source}: {given} to choose from: give at least two")
    return cleaned


def read_answers(path: str | Path) -> list[str]:
    """The answers in a UTF-8 text file, one per line; blank lines do not count."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file: write one answer per line") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: the answers cannot be read ({reason}): check --answers") from None
    return check_choices([line for line in text.splitlines() if line.strip()], source=str(path))


def check_interval(start: float | None, end: float | None) -> None:
    """`start` and `end` are seconds from the first frame: finite, not negative, start < end."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name} {value:g} is not a time: give seconds from 0 on")
    if start is not None and end is not None and start >= end:
        raise UserError(f"--start {start:g} is not before --end {end:g}: swap or change them")


def check_count(name: str, value: int | None) -> None:
    """A number of frames is at least 1."""
    if value is not None and value < 1:
        raise UserError(f"--{name} {value} is not a number of frames: give at least 1")


def check_figure(path: str | Path) -> Path:
    """A path that a picture can be written to, found out now and not after the work.

    Raises UserError for an unknown suffix, a missing or unwritable folder, a target that is a
    folder, or a missing matplotlib. Leaves nothing behind.
    """
    path = Path(path)
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        allowed = ", ".join(FIGURE_SUFFIXES)
        raise UserError(f"--figure {path}: the name must end with one of {allowed}")
    if path.is_dir():
        raise UserError(f"--figure {path} is a folder: give the name of a file")
    try:
        # Asking the system for permission bits lies for root and on read-only mounts.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"--figure {path}: cannot write into {path.parent} ({reason}): "
            "choose another place or make that folder writable"
        ) from None
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--figure needs matplotlib: pip install 'videodistill[model]'")
    return path
