"""EgoMCQ (Lin et al., NeurIPS 2022): which of five clips shows what a narration tells?

A JSON object by number of ``answer`` (the index of the right clip), ``query`` with ``clip_text``,
``choices``, by number, each with ``video_uid``, ``clip_start`` and ``clip_end`` in seconds, and
``types``: 1 where the clips are of different videos ("inter"), 2 where they are of one ("intra").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videodistill.data.entries import Broken, Entry, collect
from videodistill.data.files import read_json
from videodistill.data.record import Clip, Question

TYPES = {1: "inter", 2: "intra"}


def read_egomcq(path: str | Path, broken: list[Broken] | None = None) -> list[Question]:
    """The questions of EgoMCQ, in the order of the file.

    ``question`` is the narration, ``clips`` are the clips to choose from, as stretches of Ego4D's
    "<video_uid>.mp4", and ``choices`` their numbers; ``family`` is "inter" or "intra".

    Args:
        path: The JSON file.
        broken: Takes entries that cannot be read; without it the first one is raised.

    Raises:
        UserError: The file or an entry is broken.
    """
    path = Path(path)
    entries = read_json(path, dict).items()
    rows = ((f"{path}: question {name}", (name, value)) for name, value in entries)
    return collect(rows, _question, broken, _family)


def _question(row: tuple[str, Any], where: str) -> Question:
    name, value = row
    entry = Entry(value, where)
    kind = entry.whole("types")
    if kind not in TYPES:
        raise entry.error("types", "1 (inter) or 2 (intra)")
    listed = value.get("choices")
    if not isinstance(listed, dict) or len(listed) < 2:
        raise entry.error("choices", "an object of at least two clips by number")
    choices = tuple(map(str, range(len(listed))))
    if set(listed) != set(choices):
        raise entry.error("choices", f"numbered from 0 to {choices[-1]}")
    clips = tuple(_clip(Entry(listed[n], f"{where}: choice {n}")) for n in choices)
    if entry.name("answer") not in choices:
        raise entry.error("answer", f"the number of a choice, 0 to {choices[-1]}")
    return Question(
        question_id=name,
        video=clips[0].video,
        question=Entry(value.get("query"), f"{where}: query").text("clip_text"),
        answer=entry.name("answer"),
        choices=choices,
        family=TYPES[kind],
        clips=clips,
    )


def _clip(entry: Entry) -> Clip:
    # Narrations near the beginning of a video have windows that begin before it.
    start, end = max(entry.seconds("clip_start"), 0.0), max(entry.seconds("clip_end"), 0.0)
    if end < start:
        raise entry.error("clip_end", f"after clip_start {start:g}")
    return Clip(f"{entry.text('video_uid')}.mp4", start, end)


def _family(row: tuple[str, Any]) -> str | None:
    kind = row[1].get("types") if isinstance(row[1], dict) else None
    return TYPES.get(kind) if isinstance(kind, int) else None
