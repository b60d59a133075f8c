from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from videodistill.data.entries import Broken
from videodistill.data.msvd import read_mapping, read_msvd
from videodistill.data.record import Question
from videodistill.errors import UserError

ENTRY = {"answer": "nut", "id": 1, "question": "what is it chewing on?", "video_id": 7}


def write(folder: Path, *entries: object) -> Path:
    path = folder / "val_qa.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize(
    ("split", "rows", "videos"), [("train", 30933, 1161), ("val", 6415, 245), ("test", 13157, 504)]
)
def test_real_files(shared_data: Path, split: str, rows: int, videos: int) -> None:
    questions = read_msvd(shared_data / "annotations" / "msvd_qa" / f"{split}_qa.json")
    assert len(questions) == rows
    assert len({question.video for question in questions}) == videos
    assert all(question.choices is None and question.answer for question in questions)


def test_real_row_and_types(shared_data: Path) -> None:
    questions = read_msvd(shared_data / "annotations" / "msvd_qa" / "test_qa.json")
    assert questions[1] == Question(
        "37349",
        "vid1451.avi",
        "what contains someone opens the lid of a corrugated cardboard?",
        "rifle",
        family="what",
    )
    kinds = Counter(question.family for question in questions)
    assert kinds == {"what": 8149, "who": 4552, "how": 370, "when": 58, "where": 28}


def test_names_of_clips_keep_all_their_letters(tmp_path: Path) -> None:
    mapping = tmp_path / "youtube_mapping.txt"
    mapping.write_text("-4wsuPCjDBc_5_15 vid1\nvid.avi_0_7 vid7\n\n")
    assert read_mapping(mapping) == {1: "-4wsuPCjDBc_5_15", 7: "vid.avi_0_7"}
    assert read_msvd(write(tmp_path, ENTRY), mapping)[0].video == "vid.avi_0_7.avi"
    with pytest.raises(UserError, match=r"entry 1: video_id 8 is not in .*youtube_mapping\.txt"):
        read_msvd(write(tmp_path, ENTRY | {"video_id": 8}), mapping)


@pytest.mark.parametrize("line", ["name", "name 7x", " vid7", "name vid-7"])
def test_a_broken_mapping_is_named(tmp_path: Path, line: str) -> None:
    mapping = tmp_path / "youtube_mapping.txt"
    mapping.write_text(f"good vid1\n{line}\n")
    with pytest.raises(UserError, match=r"youtube_mapping\.txt:2: .* <name> vid<number>"):
        read_mapping(mapping)
    mapping.write_text("good vid1\nother vid1\n")
    with pytest.raises(UserError, match=r"youtube_mapping\.txt:2: vid1 is given twice"):
        read_mapping(mapping)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"answer": 3}, "answer must be a text"),
        ({"question": ""}, "question must be a text"),
        ({"id": None}, "id must be a number or a text"),
        ({"id": True}, "id must be a number or a text"),
        ({"video_id": "one"}, "video_id must be a whole number"),
    ],
)
def test_broken_entry_is_named_or_collected(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = write(tmp_path, ENTRY, ENTRY | {"id": 2} | change)
    with pytest.raises(UserError) as error:
        read_msvd(path)
    assert str(error.value).startswith(f"{path}: entry 2: ") and named in str(error.value)
    broken: list[Broken] = []
    assert len(read_msvd(path, broken=broken)) == 1
    assert broken == [Broken(str(error.value), None if "question" in change else "what")]


def test_duplicate_ids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="entry 2: question id 1 is given at"):
        read_msvd(write(tmp_path, ENTRY, ENTRY), broken=[])
