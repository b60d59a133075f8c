from __future__ import annotations

from pathlib import Path

from videodistill.data.files import read_lines
from videodistill.data.msvd import read_msvd
from videodistill.data.record import Question
from videodistill.data.vocabulary import ceiling, commonest_answers


def answered(*answers: str | None) -> list[Question]:
    return [Question(str(i), "v.mp4", "?", answer) for i, answer in enumerate(answers)]


def test_ties_fall_by_word() -> None:
    train = answered("pear", "fig", "apple", "fig", None, "pear", "date")
    assert commonest_answers(train) == ["fig", "pear", "apple", "date"]
    assert commonest_answers(train, 3) == ["fig", "pear", "apple"]


def test_an_answer_outside_of_the_vocabulary_stays_in_the_count() -> None:
    assert ceiling(answered("fig", "kiwi", "fig", "plum"), ["fig", "pear"]) == 50.0
    assert ceiling(answered("fig", None), ["fig"]) == 100.0


def test_real_ceilings(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "msvd_qa"
    test = read_msvd(folder / "test_qa.json")
    assert round(ceiling(test, read_lines(folder / "answer_set.txt")), 1) == 90.8
    own = commonest_answers(read_msvd(folder / "train_qa.json"), 1000)
    assert 90.5 <= ceiling(test, own) <= 92.0
