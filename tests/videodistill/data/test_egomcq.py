from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videodistill.data.egomcq import read_egomcq
from videodistill.data.entries import Broken
from videodistill.data.record import Clip, Question
from videodistill.errors import UserError


def clip(video: str, start: float, end: float) -> dict[str, Any]:
    return {
        "video_uid": video,
        "clip_start": start,
        "clip_end": end,
        "clip_text": "#C C does it",
        "tag_verb": "[1]",
        "tag_noun": "[2, 3]",
    }


ENTRY = {
    "answer": 1,
    "query": clip("b", 2.5, 3.5) | {"clip_text": "#C C opens the tap"},
    "choices": {"0": clip("a", -0.25, 1.0), "1": clip("b", 2.5, 3.5), "2": clip("a", 700, 701)},
    "types": 1,
}


def write(folder: Path, entries: dict[str, Any]) -> Path:
    path = folder / "egomcq.json"
    path.write_text(json.dumps(entries))
    return path


def test_fields(tmp_path: Path) -> None:
    first, second = read_egomcq(write(tmp_path, {"0": ENTRY, "1": ENTRY | {"types": 2}}))
    assert first == Question(
        "0",
        "a.mp4",
        "#C C opens the tap",
        "1",
        ("0", "1", "2"),
        family="inter",
        clips=(Clip("a.mp4", 0.0, 1.0), Clip("b.mp4", 2.5, 3.5), Clip("a.mp4", 700.0, 701.0)),
    )
    assert first.videos == ("a.mp4", "b.mp4")
    assert second.family == "intra"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"types": 3}, "types must be 1 (inter) or 2 (intra)"),
        ({"answer": 3}, "answer must be the number of a choice, 0 to 2"),
        ({"query": None}, "query: not an object"),
        ({"choices": {"0": clip("a", 0, 1), "2": clip("a", 0, 1)}}, "numbered from 0 to 1"),
        ({"choices": {"0": clip("a", 2, 1), "1": clip("a", 0, 1)}}, "choice 0: clip_end must be"),
        ({"choices": []}, "choices must be an object"),
    ],
)
def test_broken_entry(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = write(tmp_path, {"0": ENTRY, "1": ENTRY | change})
    with pytest.raises(UserError) as error:
        read_egomcq(path)
    assert str(error.value).startswith(f"{path}: question 1: ") and named in str(error.value)
    broken: list[Broken] = []
    assert len(read_egomcq(path, broken)) == 1
    assert broken[0].family == (None if "types" in change else "inter")
