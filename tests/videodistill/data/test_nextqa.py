from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from videodistill.data.entries import Broken
from videodistill.data.nextqa import read_nextqa, write_nextqa_mc, write_nextqa_oe
from videodistill.data.record import Question, VideoInfo
from videodistill.errors import UserError

HEADER = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
ROW = "7,369,640,480,how many,2,6,DC,one,two,three,four,five"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "val.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "rows", "choices"),
    [
        ("nextqa_mc/val.csv", 4996, 5),
        ("nextqa_mc/test.csv", 8564, 5),
        ("nextqa_oe/val.csv", 5343, 0),
        ("nextqa_oe/test.csv", 9178, 0),
        ("nextgqa/val.csv", 3358, 5),
    ],
)
def test_real_files(shared_data: Path, name: str, rows: int, choices: int) -> None:
    questions = read_nextqa(shared_data / "annotations" / name)
    assert len(questions) == len({question.question_id for question in questions}) == rows
    kinds = {"CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO", "DB"}
    assert {question.family for question in questions} <= kinds
    if choices:
        assert all(len(question.choices) == choices for question in questions)
        assert all(question.answer in question.choices for question in questions)
    else:
        assert all(question.choices is None for question in questions)


def test_real_row(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "nextqa_mc"
    first = read_nextqa(folder / "val.csv", video_map=folder / "map_vid_vidorID.json")[0]
    assert first == Question(
        "4010069381_6",
        "1106/4010069381.mp4",
        "how do the two man play the instrument",
        "roll the handle",
        (
            "roll the handle",
            "tap their feet",
            "strum the string",
            "hit with sticks",
            "pat with hand",
        ),
        family="CH",
    )


def test_real_dialects_agree(shared_data: Path) -> None:
    folder = shared_data / "annotations"
    by_index = {q.question_id: q for q in read_nextqa(folder / "nextqa_mc" / "val.csv")}
    by_text = read_nextqa(folder / "nextgqa" / "val.csv")
    differ = {q.question_id for q in by_text if by_index[q.question_id] != q}
    assert differ == {"7987845241_6"}  # its answer was corrected in the later dataset


def test_real_evidence(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "nextgqa"
    questions = read_nextqa(folder / "val.csv", folder / "gsub_val.json")
    evidence = {question.question_id: question.evidence for question in questions}
    assert evidence["10001787725_3"] == ((12.1, 17.1), (20.0, 23.5), (29.7, 33.2))
    assert all(evidence.values())
    assert Counter(map(len, evidence.values())).most_common(1)[0][0] == 1


@pytest.mark.parametrize("writer", [write_nextqa_mc, write_nextqa_oe])
def test_what_is_written_is_read(tmp_path: Path, writer) -> None:
    choices = (
        ('say "hi", twice', "two\nlines", "三", "4", "five") if writer is write_nextqa_mc else None
    )
    questions = [
        Question(
            f"some_video_{qid}",
            "some_video.mp4",
            "who, when, „why“?",
            choices[qid] if choices else "a, b",
            choices,
            family="TP",
        )
        for qid in range(5)
    ]
    path = tmp_path / "val.csv"
    writer(path, questions, {"some_video.mp4": VideoInfo(48, 12.0, 96, 64)})
    assert read_nextqa(path) == questions
    header = HEADER if choices else HEADER.partition(",a0")[0]
    assert path.read_text().startswith(f"{header}\nsome_video,48,96,64,")


def test_byte_order_mark_blank_lines_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    text = f"{HEADER}\r\n\r\n{ROW.replace('three', ' three ')}\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [question.answer for question in read_nextqa(path)] == ["three"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("how many", "", "question is empty"),
        ("7,369", ",369", "no video"),
        ("three", " ", "a2 is empty"),
        (",2,6,", ",5,6,", "0 to 4, not '5'"),
        (",2,6,", ",three,6,", "0 to 4, not 'three'"),
        (",five", "", "12 cells where the first line names 13"),
        ("five", "five,six", "14 cells where the first line names 13"),
        (",2,6,", ",2,5,", "question id 7_5 is given at"),
        ("how many", '"how" many', "not valid csv"),
    ],
)
def test_broken_row_is_named_with_its_line(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = write(tmp_path, HEADER, ROW.replace(",6,", ",5,"), ROW.replace(old, new))
    with pytest.raises(UserError) as error:
        read_nextqa(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert named in str(error.value)


def test_answer_as_text_must_be_a_choice(tmp_path: Path) -> None:
    header = HEADER.replace("video", "video_id", 1)
    assert read_nextqa(write(tmp_path, header, ROW.replace(",2,6", ",two,6")))[0].answer == "two"
    with pytest.raises(UserError, match=r"val\.csv:2: answer 'six' is none of the choices"):
        read_nextqa(write(tmp_path, header, ROW.replace(",2,6", ",six,6")))


def test_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"val\.csv:1: no column answer, qid; it has video, question"
    ):
        read_nextqa(write(tmp_path, "video,question,type", "1,2,3"))
    with pytest.raises(UserError, match=r"val\.csv:1: no column question"):
        read_nextqa(write(tmp_path, ""))
    with pytest.raises(UserError, match="Is a directory"):
        read_nextqa(tmp_path)


@pytest.mark.parametrize(
    "content",
    ['{"7": 3}', '{"7": {"location": [1]}}', '{"7": {"location": {"6": [[1]]}}}'],
)
def test_broken_evidence_is_named(tmp_path: Path, content: str) -> None:
    gsub = tmp_path / "gsub_val.json"
    gsub.write_text(content)
    with pytest.raises(UserError, match=r"gsub_val\.json: video 7: "):
        read_nextqa(write(tmp_path, HEADER, ROW), gsub)


def json_file(folder: Path, *entries: object, name: str = "val.json") -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    else:
        path.write_text(json.dumps(entries))
    return path


CHOICES = ("one", "two", "three", "four", "five")
NUMBERED = {f"a{place}": choice for place, choice in enumerate(CHOICES)}
SEVILA = {
    "video": "1106/7",
    "num_option": 5,
    "qid": "DC_7_6",
    **NUMBERED,
    "answer": 2,
    "question": "how many",
}
EFFVIDEOQA = {
    "video_id": 7,
    "question": "how many",
    "answer": 2,
    "qid": 6,
    "type": "DC",
    "options": list(CHOICES),
}


def test_all_dialects_of_one_question_agree(tmp_path: Path) -> None:
    (from_csv,) = read_nextqa(write(tmp_path, HEADER, ROW))
    assert read_nextqa(json_file(tmp_path, EFFVIDEOQA)) == [from_csv]
    assert read_nextqa(json_file(tmp_path, EFFVIDEOQA, name="val.jsonl")) == [from_csv]
    as_text = EFFVIDEOQA | {"answer": "three"}
    assert read_nextqa(json_file(tmp_path, as_text)) == [from_csv]
    assert read_nextqa(json_file(tmp_path, SEVILA)) == [replace(from_csv, video="1106/7.mp4")]
    flat = SEVILA | {"video": "7"}
    assert read_nextqa(json_file(tmp_path, flat)) == [from_csv]


def test_the_map_of_videos_counts_before_the_folder_in_the_file(tmp_path: Path) -> None:
    video_map = tmp_path / "map.json"
    video_map.write_text('{"7": "0001/7"}')
    for path in (json_file(tmp_path, SEVILA), write(tmp_path, HEADER, ROW)):
        assert read_nextqa(path, video_map=video_map)[0].video == "0001/7.mp4"


def test_an_id_that_ends_like_a_suffix_keeps_its_letters(tmp_path: Path) -> None:
    row = ROW.replace("7,", "mp4.pm4,", 1)
    assert read_nextqa(write(tmp_path, HEADER, row))[0].video == "mp4.pm4.mp4"


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (3, "not an object"),
        (SEVILA | {"answer": 5}, "0 to 4, not '5'"),
        (SEVILA | {"qid": "DC_6"}, "of the form <type>_<video>_<qid>"),
        (SEVILA | {"video": "1106/8"}, "the one that qid DC_7_6 names"),
        (SEVILA | {"a3": " "}, "a3 must be a text"),
        (SEVILA | {"num_option": 6}, "num_option must be from 2 to 5"),
        (EFFVIDEOQA | {"options": ["one", ""]}, "options must be a list of texts"),
        (EFFVIDEOQA | {"answer": "six"}, "'six' is none of the choices"),
        (EFFVIDEOQA | {"question": None}, "question must be a text"),
    ],
)
def test_broken_entry_of_a_json_dialect_is_named(tmp_path: Path, entry: Any, named: str) -> None:
    path = json_file(tmp_path, EFFVIDEOQA | {"qid": 1}, entry)
    with pytest.raises(UserError) as error:
        read_nextqa(path)
    assert str(error.value).startswith(f"{path}: entry 2: ")
    assert named in str(error.value)


def test_further_answers(tmp_path: Path) -> None:
    header = HEADER.partition(",a0")[0]
    path = write(tmp_path, header, "7,1,1,1,why,home,0,CW", "7,1,1,1,how,so,1,CH")
    references = tmp_path / "more.json"
    references.write_text('{"7": {"0": " house "}}')
    first, second = read_nextqa(path, references=references)
    assert (first.answer, first.references) == ("home", ("house",))
    assert second.references == ()
    references.write_text('{"7": {"0": 3}}')
    with pytest.raises(UserError, match=r"more\.json: video 7: question 0: not a text"):
        read_nextqa(path, references=references)


def test_real_further_answers(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "nextqa_oe"
    references = folder / "add_reference_answer_test.json"
    questions = {q.question_id: q for q in read_nextqa(folder / "test.csv", references=references)}
    assert questions["7004238086_2"].references == ("house",)
    assert all(len(question.references) <= 1 for question in questions.values())
    assert sum(bool(question.references) for question in questions.values()) > 2000


def test_broken_rows_are_collected_and_the_others_read(tmp_path: Path) -> None:
    broken: list[Broken] = []
    path = write(
        tmp_path,
        HEADER,
        ROW,
        ROW.replace(",2,6,", ",9,7,"),
        "7,1,1,1,too short",
        ROW.replace(",6,", ",8,"),
    )
    questions = read_nextqa(path, broken=broken)
    assert [question.question_id for question in questions] == ["7_6", "7_8"]
    assert [entry.message.partition(": ")[0] for entry in broken] == [f"{path}:3", f"{path}:4"]
    assert [entry.family for entry in broken] == ["DC", None]
    broken.clear()
    path = json_file(tmp_path, EFFVIDEOQA, EFFVIDEOQA | {"answer": 7, "qid": 8}, name="val.jsonl")
    path.write_text(path.read_text() + "{\n")
    assert len(read_nextqa(path, broken=broken)) == 1
    assert [entry.message.partition(": ")[0] for entry in broken] == [f"{path}:2", f"{path}:3"]


def test_a_duplicate_id_is_an_error_even_where_broken_rows_are_collected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val\.csv:3: question id 7_6 is given at .*val\.csv:2"):
        read_nextqa(write(tmp_path, HEADER, ROW, ROW), broken=[])
