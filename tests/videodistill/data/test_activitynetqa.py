from __future__ import annotations

import json
from pathlib import Path

import pytest

from videodistill.data.activitynetqa import TYPES, read_activitynetqa
from videodistill.data.entries import Broken
from videodistill.data.record import Question
from videodistill.errors import UserError

ASKED = {"question_id": "v_a_1", "question": "is it red", "video_name": "a"}
ANSWER = {"question_id": "v_a_1", "answer": "no", "type": 3}


def files(folder: Path, asked: list, answers: list) -> tuple[Path, Path]:
    paths = folder / "val_q.json", folder / "val_a.json"
    for path, entries in zip(paths, (asked, answers), strict=True):
        path.write_text(json.dumps(entries))
    return paths


@pytest.mark.parametrize(("split", "rows", "videos"), [("val", 18000, 1800), ("test", 8000, 800)])
def test_real_files(shared_data: Path, split: str, rows: int, videos: int) -> None:
    folder = shared_data / "annotations" / "activitynet_qa"
    questions = read_activitynetqa(folder / f"{split}_q.json", folder / f"{split}_a.json")
    assert len(questions) == rows
    assert len({question.video for question in questions}) == videos
    assert {question.family for question in questions} == set(TYPES)
    assert sum(question.family == "motion" for question in questions) == rows // 10


def test_real_row(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "activitynet_qa"
    assert read_activitynetqa(folder / "test_q.json", folder / "test_a.json")[0] == Question(
        "v_1QIUV7WYKXg_3",
        "v_1QIUV7WYKXg.mp4",
        "is the athlete wearing trousers",
        "no",
        family="yes/no",
    )


def test_without_answers(tmp_path: Path) -> None:
    asked, _ = files(tmp_path, [ASKED], [])
    assert read_activitynetqa(asked) == [Question("v_a_1", "v_a.mp4", "is it red")]


@pytest.mark.parametrize(
    ("asked", "answers", "where", "named"),
    [
        (ASKED | {"question": None}, ANSWER, "val_q.json: entry 1", "question must be a text"),
        (ASKED, ANSWER | {"type": 9}, "val_a.json: entry 1", "type must be a number from 0 to 8"),
        (ASKED, ANSWER | {"answer": ""}, "val_a.json: entry 1", "answer must be a text"),
        (ASKED, ANSWER | {"question_id": "v_a_2"}, "val_q.json: entry 1", "v_a_1 has no answer"),
    ],
)
def test_broken_entries(tmp_path: Path, asked: dict, answers: dict, where: str, named: str) -> None:
    paths = files(tmp_path, [asked], [answers])
    with pytest.raises(UserError) as error:
        read_activitynetqa(*paths)
    assert where in str(error.value) and named in str(error.value)
    broken: list[Broken] = []
    assert read_activitynetqa(*paths, broken) == []
    assert broken[0].message == str(error.value)


def test_each_broken_question_counts_once(tmp_path: Path) -> None:
    paths = files(tmp_path, [ASKED], [ANSWER | {"answer": None}])
    broken: list[Broken] = []
    read_activitynetqa(*paths, broken)
    assert len(broken) == 1


def test_an_answer_without_a_question(tmp_path: Path) -> None:
    paths = files(tmp_path, [ASKED], [ANSWER, ANSWER | {"question_id": "v_b_1"}])
    with pytest.raises(UserError, match=r"val_a\.json: entry 2: question v_b_1 is not in"):
        read_activitynetqa(*paths)
    broken: list[Broken] = []
    assert len(read_activitynetqa(*paths, broken)) == 1 and len(broken) == 1


def test_duplicates(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val_a\.json: entry 2: question id v_a_1 is given at"):
        read_activitynetqa(*files(tmp_path, [ASKED], [ANSWER, ANSWER]), [])
    with pytest.raises(UserError, match=r"val_q\.json: entry 2: question id v_a_1 is given at"):
        read_activitynetqa(*files(tmp_path, [ASKED, ASKED], [ANSWER]), [])
