"""Read a procedural data set back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from videodistill.data.egotaskqa import read_egotaskqa
from videodistill.data.nextqa import read_nextqa
from videodistill.data.record import Question
from videodistill.errors import UserError


def load_questions(dataset: Path, split: str) -> list[Question]:
    """Questions of a split of the procedural benchmark, with choices, evidence and context.

    Raises:
        UserError: The annotations are missing or broken.
    """
    folder = dataset / "annotations" / split
    open_ended = read_egotaskqa(folder / "egotaskqa.json")
    with_choices = read_nextqa(folder / "nextqa_mc.csv")
    if len(open_ended) != len(with_choices):
        raise UserError(
            f"{folder}: {len(open_ended)} questions in egotaskqa.json, {len(with_choices)} in "
            "nextqa_mc.csv; make the data set again"
        )
    return [
        replace(one, choices=other.choices)
        for one, other in zip(open_ended, with_choices, strict=True)
    ]
