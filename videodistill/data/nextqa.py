"""NExT-QA (Xiao et al., CVPR 2021): multiple-choice and open-ended questions as csv.

Columns ``video,frame_count,width,height,question,answer,qid,type`` and, for multiple choice,
``a0`` to ``a4``, with the index of the right one as the answer. NExT-GQA's csv calls the first
column ``video_id`` and gives the answer as text. ``qid`` counts the questions of one video.

Two dialects are JSON lists (or lines) of multiple-choice questions: SeViLA's has ``video``
("<folder>/<video>"), ``qid`` "<type>_<video>_<qid>" and ``a0`` to ``a4``; EffVideoQA's has
``video_id``, ``qid``, ``type`` and ``options``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from videodistill.data.entries import Broken, Entry, collect, right_choice
from videodistill.data.files import read_entries, read_json, read_rows, stretches, write_whole
from videodistill.data.record import Question, Stretch, VideoInfo
from videodistill.errors import UserError

_COLUMNS = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type")
_CHOICES = ("a0", "a1", "a2", "a3", "a4")

Grounding = Mapping[tuple[str, str], tuple[Stretch, ...]]
"""Evidence in seconds by (video, qid)."""


def read_nextqa(
    path: str | Path,
    gsub: str | Path | None = None,
    video_map: str | Path | None = None,
    references: str | Path | None = None,
    broken: list[Broken] | None = None,
) -> list[Question]:
    """The questions of one NExT-QA or NExT-GQA file, in its order.

    ``question_id`` is "<video>_<qid>", as in published predictions; ``family`` is the type as the
    file gives it (CW, CH, TN, TC, TP, DC, DL, DO, DB); ``choices`` is ``None`` when the file has
    no columns ``a0`` to ``a4``. Cells are stripped of surrounding white space.

    Args:
        path: A csv file, or a .json or .jsonl file in one of the JSON dialects.
        gsub: NExT-GQA's JSON file of evidence, for questions that it grounds.
        video_map: The JSON file that maps a video to "<folder>/<video>"; without it the video
            file is "<video>.mp4".
        references: NExT-QA's JSON file of further answers to open-ended questions,
            ``{video: {qid: answer}}``; they become ``references``.
        broken: Takes rows that cannot be read; without it the first one is raised.

    Raises:
        UserError: A file or a row is broken, or two questions have the same id.
    """
    path = Path(path)
    grounding = read_grounding(gsub) if gsub is not None else {}
    folders = read_json(Path(video_map), dict) if video_map is not None else {}
    further = read_json(Path(references), dict) if references is not None else {}
    as_json = path.suffix in (".json", ".jsonl")
    fields = _fields_of_json if as_json else _fields_of_csv

    def question(row: Any, where: str) -> Question:
        folder, video, qid, kind, text, answer, choices = fields(row, where)
        return Question(
            question_id=f"{video}_{qid}",
            video=f"{folders.get(video, folder + video)}.mp4",
            question=text,
            answer=answer,
            choices=choices,
            family=kind,
            evidence=grounding.get((video, qid), ()),
            references=_further_answers(further, video, qid, references),
        )

    def csv_rows() -> Iterator[tuple[str, dict[str, str]]]:
        for line, row in read_rows(path, ("question", "answer", "qid", "type"), broken):
            yield f"{path}:{line}", row

    rows = read_entries(path, broken) if as_json else csv_rows()
    return collect(rows, question, broken, lambda row: isinstance(row, dict) and row.get("type"))


class _Fields(NamedTuple):
    folder: str
    """Of the video, with a slash at its end, or nothing."""
    video: str
    qid: str
    kind: str
    question: str
    answer: str
    choices: tuple[str, ...] | None


def _fields_of_csv(row: Mapping[str, str], where: str) -> _Fields:
    video = row.get("video") or row.get("video_id")
    if not video:
        raise UserError(f"{where}: no video; a column video or video_id must name it")
    for name in ("question", "answer", "qid", "type"):
        if not row[name]:
            raise UserError(f"{where}: {name} is empty")
    answer, choices = row["answer"], None
    if "a0" in row:
        choices = tuple(row.get(name, "") for name in _CHOICES)
        if not all(choices):
            raise UserError(f"{where}: {_CHOICES[choices.index('')]} is empty")
        if "video_id" in row:
            if answer not in choices:
                raise UserError(f"{where}: answer {answer!r} is none of the choices {choices}")
        else:
            answer = _by_index(answer, choices, where)
    return _Fields("", video, row["qid"], row["type"], row["question"], answer, choices)


def _fields_of_json(value: Any, where: str) -> _Fields:
    entry = Entry(value, where)
    if "options" in entry:
        video, qid, kind = entry.name("video_id"), entry.name("qid"), entry.text("type")
        choices = entry.texts("options")
    else:
        parts = entry.text("qid").split("_")
        if len(parts) < 3 or not (parts[0] and parts[-1]):
            raise entry.error("qid", "of the form <type>_<video>_<qid>")
        kind, qid = parts[0], parts[-1]
        video = entry.text("video")
        if video.rpartition("/")[2] != "_".join(parts[1:-1]):
            raise entry.error("video", f"the one that qid {entry.text('qid')} names")
        if not 2 <= entry.whole("num_option") <= len(_CHOICES):
            raise entry.error("num_option", f"from 2 to {len(_CHOICES)}")
        choices = tuple(entry.text(name) for name in _CHOICES[: entry.whole("num_option")])
    answer = entry.name("answer")
    if isinstance(value["answer"], int):
        answer = _by_index(answer, choices, where)
    folder, slash, video = video.rpartition("/")
    text = entry.text("question")
    return _Fields(
        folder + slash, video, qid, kind, text, right_choice(answer, choices, where), choices
    )


def _by_index(answer: str, choices: tuple[str, ...], where: str) -> str:
    if answer not in map(str, range(len(choices))):
        last = len(choices) - 1
        raise UserError(
            f"{where}: answer must be the index of a choice, 0 to {last}, not {answer!r}"
        )
    return choices[int(answer)]


def _further_answers(
    further: Mapping[str, Any], video: str, qid: str, path: str | Path | None
) -> tuple[str, ...]:
    answers = further.get(video, {})
    answer = answers.get(qid, "") if isinstance(answers, dict) else None
    if not isinstance(answer, str):
        raise UserError(f"{path}: video {video}: question {qid}: not a text by video and qid")
    return (answer.strip(),) if answer.strip() else ()


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
