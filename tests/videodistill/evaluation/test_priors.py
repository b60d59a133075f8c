from __future__ import annotations

from pathlib import Path

from videodistill.data.msvd import read_msvd
from videodistill.data.record import Question
from videodistill.evaluation.priors import priors


def asked(question: str, answer: str | None, *choices: str) -> Question:
    return Question("0", "v.mp4", question, answer, choices or None)


def test_priors_by_hand() -> None:
    train = [asked("how many rings?", "two")] * 3 + [asked("what colour is it?", "red")] * 2
    train += [asked("what colour is that?", "blue"), asked("what colour?", "blue")]
    test = [asked("how many stars?", "two"), asked("what colour now?", "blue")]
    test += [asked("what colour then?", "red"), asked("is there a ring?", "two")]
    # "blue" and "red" are equally frequent after "what colour": the alphabet decides.
    assert priors(train, test) == {"answer": 50.0, "first_two_words": 75.0}


def test_questions_without_an_answer_do_not_count() -> None:
    train = [asked("is it?", "no"), asked("is it?", None)]
    assert priors(train, [asked("is it?", "no"), asked("is it?", None)])["answer"] == 100.0


def test_among_the_choices() -> None:
    train = [asked("is it red?", "no")] * 3 + [asked("is it red?", "yes")] * 2
    train += [asked("who is it?", "yes")] * 2 + [asked("who is it?", "a man")]
    # Of all answers "yes" is the commonest, after "is it" it is "no", after "who is" of "a man"
    # and "a cat" the one that was ever right, and after "does it" what counts among all.
    test = [asked("is it blue?", "no", "yes", "no"), asked("who is he?", "a man", "a cat", "a man")]
    test += [asked("does it?", "yes", "no", "yes")]
    assert priors(train, test, among_choices=True) == {"answer": 66.67, "first_two_words": 100.0}


def test_real_priors(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "msvd_qa"
    found = priors(read_msvd(folder / "train_qa.json"), read_msvd(folder / "test_qa.json"))
    assert {name: round(value, 1) for name, value in found.items()} == {
        "answer": 14.1,
        "first_two_words": 19.4,
    }
