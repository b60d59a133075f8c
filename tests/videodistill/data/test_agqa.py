from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videodistill.data.agqa import read_agqa
from videodistill.data.entries import Broken
from videodistill.data.record import Question
from videodistill.errors import UserError

TRAIN = {
    "question": "Did they contact a blanket?",
    "answer": "No",
    "video_id": "YSKX3",
    "global": ["exists", "obj-rel"],
    "local": "yes-no-o4",
    "ans_type": "binary",
    "steps": 1,
    "semantic": "object",
    "structural": "verify",
    "novel_comp": 0,
    "more_steps": 0,
    "sg_grounding": {"(9, 16)": ["r1/000123"]},
    "program": "Exists(blanket, Iterate(video, contact))",
}
TEST = TRAIN | {
    "novel_comp": 1,
    "nc_seq": 0,
    "nc_sup": 0,
    "nc_dur": 0,
    "nc_objrel": 1,
    "indirect": 1,
    "i_obj": 1,
    "i_rel": 0,
    "i_act": 0,
    "i_temp": 0,
    "direct_equiv": "YSKX3-2",
}


def write(folder: Path, entries: dict[str, Any]) -> Path:
    path = folder / "test_balanced.txt"
    path.write_text(json.dumps(entries))
    return path


def test_the_fields_of_both_files(tmp_path: Path) -> None:
    asked = ("YSKX3.mp4", TRAIN["question"], "No")
    tags = ("binary", "exists", "obj-rel", "object", "verify")
    expected = Question("YSKX3-1", *asked, family="verify", program=TRAIN["program"], tags=tags)
    assert read_agqa(write(tmp_path, {"YSKX3-1": TRAIN})) == [expected]
    direct = TEST | {"indirect": 0, "i_obj": 0, "novel_comp": 0, "nc_objrel": 0, "direct_equiv": ""}
    first, second = read_agqa(write(tmp_path, {"YSKX3-1": TEST, "YSKX3-2": direct}))
    assert first.tags == (*tags, "novel_comp", "nc_objrel", "i_obj")
    assert (first.reference, first.direct_equivalent) == ("indirect", "YSKX3-2")
    assert (second.tags, second.reference, second.direct_equivalent) == (tags, "direct", None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ans_type": "closed"}, "ans_type must be binary or open"),
        ({"global": "exists"}, "global must be a list"),
        ({"novel_comp": 2}, "novel_comp must be 0 or 1"),
        ({"video_id": None}, "video_id must be a number or a text"),
    ],
)
def test_broken_entry(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = write(tmp_path, {"a": TEST, "b": TEST | change})
    with pytest.raises(UserError) as error:
        read_agqa(path)
    assert str(error.value).startswith(f"{path}: question b: ") and named in str(error.value)
    broken: list[Broken] = []
    assert len(read_agqa(path, broken)) == 1
    assert broken == [Broken(str(error.value), "verify")]


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "test_balanced.txt"
    path.write_text(f'{{"a": {json.dumps(TEST)}, "a": {json.dumps(TEST)}}}')
    with pytest.raises(UserError, match="'a' is given twice"):
        read_agqa(path, [])
