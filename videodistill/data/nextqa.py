"""NExT-QA (Xiao et al., CVPR 2021): multiple-choice and open-ended questions as csv.

Columns ``video,frame_count,width,height,question,answer,qid,type`` and, for multiple choice,
``a0`` to ``a4``, with the index of the right one as the answer. NExT-GQA's csv calls the first
column ``video_id`` and gives the answer as text. ``qid`` counts the questions of one video.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from videodistill.data.files import read_json, read_rows, stretches, write_whole
from videodistill.data.record import Question, Stretch, VideoInfo
from videodistill.errors import UserError

_COLUMNS = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type")
_CHOICES = ("a0", "a1", "a2", "a3", "a4")

Grounding = Mapping[tuple[str, str], tuple[Stretch, ...]]
"""Evidence in seconds by (video, qid)."""


def read_nextqa(
    path: str | Path, gsub: str | Path | None = None, video_map: str | Path | None = None
) -> list[Question]:
    """The questions of one NExT-QA or NExT-GQA csv file, in its order.

    ``question_id`` is "<video>_<qid>", as in published predictions; ``family`` is the type as the
    file gives it (CW, CH, TN, TC, TP, DC, DL, DO, DB); ``choices`` is ``None`` when the file has
    no columns ``a0`` to ``a4``. Cells are stripped of surrounding white space.

    Args:
        path: The csv file.
        gsub: NExT-GQA's JSON file of evidence, for questions that it grounds.
        video_map: The JSON file that maps a video to "<folder>/<video>"; without it the video
            file is "<video>.mp4".

    Raises:
        UserError: A file or a row is broken.
    """
    path = Path(path)
    grounding = read_grounding(gsub) if gsub is not None else {}
    folders = read_json(Path(video_map), dict) if video_map is not None else {}
    questions: list[Question] = []
    first_line: dict[str, int] = {}
    for line, row in read_rows(path, ("question", "answer", "qid", "type")):
        where = f"{path}:{line}"
        video = row.get("video") or row.get("video_id")
        if not video:
            raise UserError(f"{where}: no video; a column video or video_id must name it")
        for name in ("question", "answer", "qid", "type"):
            if not row[name]:
                raise UserError(f"{where}: {name} is empty")
        question_id = f"{video}_{row['qid']}"
        if question_id in first_line:
            raise UserError(
                f"{where}: question {row['qid']} of video {video} is on line "
                f"{first_line[question_id]} already"
            )
        first_line[question_id] = line
        answer, choices = row["answer"], None
        if "a0" in row:
            choices = _choices(row, where)
            answer = _right_choice(answer, choices, as_text="video_id" in row, where=where)
        questions.append(
            Question(
                question_id=question_id,
                video=f"{folders.get(video, video)}.mp4",
                question=row["question"],
                answer=answer,
                choices=choices,
                family=row["type"],
                evidence=grounding.get((video, row["qid"]), ()),
            )
        )
    return questions


def _choices(row: Mapping[str, str], where: str) -> tuple[str, ...]:
    choices = tuple(row.get(name, "") for name in _CHOICES)
    if not all(choices):
        raise UserError(f"{where}: {_CHOICES[choices.index('')]} is empty")
    return choices


def _right_choice(answer: str, choices: tuple[str, ...], as_text: bool, where: str) -> str:
    if as_text:
        if answer not in choices:
            raise UserError(f"{where}: answer {answer!r} is none of the choices {choices}")
        return answer
    if answer not in ("0", "1", "2", "3", "4"):
        raise UserError(f"{where}: answer must be the index of a choice, 0 to 4, not {answer!r}")
    return choices[int(answer)]


def read_grounding(path: str | Path) -> Grounding:
    """Evidence by (video, qid) from ``{video: {duration, fps, location: {qid: [[s, e], ...]}}}``.

    Raises:
        UserError: The file or an entry is broken.
    """
    path = Path(path)
    grounding = {}
    for video, entry in read_json(path, dict).items():
        location = entry.get("location") if isinstance(entry, dict) else None
        if not isinstance(location, dict):
            raise UserError(f"{path}: video {video}: no location {{qid: [[start, end], ...]}}")
        for qid, pairs in location.items():
            where = f"{path}: video {video}: question {qid}"
            grounding[video, qid] = stretches(pairs, where)
    return grounding


def write_nextqa_mc(
    path: str | Path, questions: Sequence[Question], videos: Mapping[str, VideoInfo]
) -> None:
    """Write multiple-choice questions with five choices each as NExT-QA does.

    Args:
        path: The csv file.
        questions: ``question_id`` must be "<video>_<qid>".
        videos: What the file repeats about each video, by ``Question.video``.
    """
    rows = [
        [*_row(question, videos, str(question.choices.index(question.answer))), *question.choices]
        for question in questions
    ]
    _write_csv(Path(path), (*_COLUMNS, *_CHOICES), rows)


def write_nextqa_oe(
    path: str | Path, questions: Sequence[Question], videos: Mapping[str, VideoInfo]
) -> None:
    """Write questions with free-text answers as NExT-QA does; choices are left out.

    The arguments are those of `write_nextqa_mc`.
    """
    rows = [_row(question, videos, question.answer) for question in questions]
    _write_csv(Path(path), _COLUMNS, rows)


def split_id(question: Question) -> tuple[str, str]:
    """(video, qid) of a question in this dialect."""
    video, _, qid = question.question_id.rpartition("_")
    return video, qid


def _row(question: Question, videos: Mapping[str, VideoInfo], answer: str) -> list[str | int]:
    video, qid = split_id(question)
    info = videos[question.video]
    shape = [info.frame_count, info.width, info.height]
    return [video, *shape, question.question, answer, qid, question.family]


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
