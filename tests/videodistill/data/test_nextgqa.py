from __future__ import annotations

import json
from pathlib import Path

import pytest

from videodistill.data.nextgqa import read_nextgqa, write_nextgqa
from videodistill.data.nextqa import write_nextqa_mc
from videodistill.data.record import Question, VideoInfo
from videodistill.errors import UserError

VIDEOS = {"a.mp4": VideoInfo(48, 12.0, 96, 96)}
CHOICES = ("1", "2", "3", "4", "5")
GROUNDED = Question(
    "a_0", "a.mp4", "which?", "2", CHOICES, family="TN", evidence=((0.5, 1.25), (2.0, 4.0))
)
UNGROUNDED = Question("a_1", "a.mp4", "how many?", "1", CHOICES, family="DC")


def test_real_file_with_the_csv_beside_it(shared_data: Path) -> None:
    questions = read_nextgqa(shared_data / "annotations" / "nextgqa" / "gsub_val.json")
    assert len(questions) == 3358
    assert len({question.video for question in questions}) == 567


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "nextgqa.json"
    write_nextqa_mc(tmp_path / "nextqa_mc.csv", [GROUNDED, UNGROUNDED], VIDEOS)
    write_nextgqa(path, [GROUNDED, UNGROUNDED], VIDEOS)
    assert read_nextgqa(path) == [GROUNDED]
    assert json.loads(path.read_text()) == {
        "a": {"duration": 4.0, "fps": 12.0, "location": {"0": [[0.5, 1.25], [2.0, 4.0]]}}
    }


def test_questions_are_missing(tmp_path: Path) -> None:
    write_nextgqa(tmp_path / "gsub_test.json", [GROUNDED], VIDEOS)
    with pytest.raises(UserError, match=r"gsub_test\.json: no test\.csv beside it"):
        read_nextgqa(tmp_path / "gsub_test.json")
    write_nextqa_mc(tmp_path / "test.csv", [UNGROUNDED], VIDEOS)
    with pytest.raises(UserError, match=r"no evidence for any question of .*test\.csv"):
        read_nextgqa(tmp_path / "gsub_test.json")
