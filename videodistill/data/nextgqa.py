"""NExT-GQA (Xiao et al., CVPR 2024): NExT-QA questions with the stretches that show the answer.

A csv of questions in NExT-QA's columns, and a JSON file of evidence beside it:
``{video: {duration, fps, location: {qid: [[start, end], ...]}}}``, all in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken
from videodistill.data.files import to_json, write_whole
from videodistill.data.nextqa import read_nextqa, split_id
from videodistill.data.record import Question, VideoInfo
from videodistill.errors import UserError


def read_nextgqa(
    path: str | Path,
    questions: str | Path | None = None,
    video_map: str | Path | None = None,
    broken: list[Broken] | None = None,
) -> list[Question]:
    """The grounded questions of one split, in the order of its csv file.

    Args:
        path: The JSON file of evidence.
        questions: The csv file of questions; by default the one beside ``path`` that belongs to
            it: "val.csv" beside "gsub_val.json" as published, "nextqa_mc.csv" beside
            "nextgqa.json" as `videodistill data make` writes them.
        video_map, broken: As of `videodistill.data.nextqa.read_nextqa`.

    Raises:
        UserError: A file or an entry is broken or missing, or no question of the csv file has
            evidence.
    """
    path = Path(path)
    questions = Path(questions) if questions is not None else _questions_beside(path)
    asked = read_nextqa(questions, path, video_map, broken=broken)
    grounded = [question for question in asked if question.evidence]
    if not grounded:
        raise UserError(f"{path}: has no evidence for any question of {questions}")
    return grounded


def _questions_beside(path: Path) -> Path:
    name = "nextqa_mc.csv"
    if path.stem.startswith("gsub_"):
        name = path.stem.removeprefix("gsub_") + ".csv"
    questions = path.with_name(name)
    if not questions.is_file():
        raise UserError(f"{path}: no {name} beside it; name the csv file of its questions")
    return questions


def write_nextgqa(
    path: str | Path, questions: Sequence[Question], videos: Mapping[str, VideoInfo]
) -> None:
    """Write the evidence of those questions that have any as NExT-GQA's JSON file.

    The questions themselves belong in a csv file, see `videodistill.data.nextqa`; the arguments
    are those of `write_nextqa_mc` there.
    """
    entries: dict[str, dict[str, Any]] = {}
    for question in questions:
        video, qid = split_id(question)
        info = videos[question.video]
        entry = {"duration": info.duration, "location": {}, "fps": info.fps}
        location = entries.setdefault(video, entry)["location"]
        if question.evidence:
            location[qid] = question.evidence
    write_whole(Path(path), to_json(entries))
