"""EgoTaskQA (Jia et al., NeurIPS 2022): open-ended questions about clips, as a JSON list.

Each entry has ``interval`` "name|fpvX|start|end" (frames of the recording that the clip was cut
from), ``question``, ``answer``, ``type[]``, ``category[]``, ``semantic``, ``structural``,
``reference`` "direct" or "indirect", ``program``, ``video_id``, ``question_id`` and
``reasoning_type``: type, category, semantic and structural, joined by "$"; the published files
append the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect
from videodistill.data.files import read_entries, stretches, to_json, write_whole
from videodistill.data.record import Question, VideoInfo
from videodistill.errors import UserError


def read_egotaskqa(path: str | Path, broken: list[Broken] | None = None) -> list[Question]:
    """The questions of one EgoTaskQA file, in its order.

    The video of a question is the clip "<interval>.mp4", as that dataset distributes them, unless
    the entry says otherwise with a key ``video``. ``tags`` are the parts of ``reasoning_type``,
    ``family`` is the first of them. Two more keys that the dataset itself does not have are read
    where they exist: ``evidence`` and ``context``, lists of [start, end] in seconds.

    Args:
        path: The JSON file.
        broken: Takes entries that cannot be read; without it the first one is raised.

    Raises:
        UserError: The file or an entry is broken, or two questions have the same id.
    """
    return collect(read_entries(Path(path), broken), _question, broken)


def _question(value: Any, where: str) -> Question:
    entry = Entry(value, where)
    interval = entry.text("interval")
    if len(interval.split("|")) != 4:
        raise UserError(f"{where}: interval {interval!r} is not of the form name|fpvX|start|end")
    reference = value.get("reference")
    if reference not in (None, "direct", "indirect"):
        raise UserError(f"{where}: reference must be direct or indirect, not {reference!r}")
    tags = tuple(entry.text("reasoning_type").split("$"))
    return Question(
        question_id=entry.name("question_id"),
        video=entry.text("video") if "video" in entry else f"{interval}.mp4",
        question=entry.text("question"),
        answer=entry.text("answer"),
        family=tags[0],
        reference=reference,
        evidence=stretches(value.get("evidence", ()), f"{where}: evidence"),
        context=stretches(value.get("context", ()), f"{where}: context"),
        program=entry.text("program") if value.get("program") else None,
        tags=tags,
    )


def write_egotaskqa(
    path: str | Path, questions: Sequence[Question], videos: Mapping[str, VideoInfo]
) -> None:
    """Write questions as EgoTaskQA does, with the extra keys that `read_egotaskqa` knows.

    Args:
        path: The JSON file.
        questions: ``tags`` must be (type, *categories, semantic, structural), what
            ``reasoning_type`` joins; ``question_id`` must be a whole number.
        videos: The frame count of each question's video, by ``Question.video``.
    """
    numbers = {video: number for number, video in enumerate(videos)}
    entries = []
    for question in questions:
        kind, *categories, semantic, structural = question.tags
        name = question.video.removesuffix(".mp4")
        entries.append(
            {
                "interval": f"{name}|fpv1|0|{videos[question.video].frame_count}",
                "question": question.question,
                "answer": question.answer,
                "type": [kind],
                "category": categories,
                "semantic": semantic,
                "structural": structural,
                "reference": question.reference,
                "program": question.program,
                "video_id": numbers[question.video],
                "question_id": int(question.question_id),
                "reasoning_type": "$".join(question.tags),
                "video": question.video,
                "evidence": question.evidence,
                "context": question.context,
            }
        )
    write_whole(Path(path), to_json(entries))
