"""Guessing from questions: a model finds what their words give away."""

from __future__ import annotations

import random

from videodistill.data.record import Question
from videodistill.evaluation.blind import question_only


def asked(question: str, answer: str, family: str = "f") -> Question:
    return Question("0", "v.mp4", question, answer, family=family)


def test_question_only_finds_what_words_give_away():
    """A leak through two words together is found; answers that training lacks count as wrong."""
    rng = random.Random(0)

    def leaky(count: int) -> list[Question]:
        questions = []
        for _ in range(count):
            first, second = rng.choice(["red", "blue"]), rng.choice(["ring", "star"])
            answer = "yes" if (first == "red") == (second == "ring") else "no"
            questions.append(asked(f"is the {first} {second} there?", answer, "leak"))
            questions.append(asked("heads or tails?", rng.choice(["heads", "tails"]), "coin"))
        questions.append(asked(f"a question asked but once: {rng.random()}", "no", "rare"))
        return questions

    report = question_only(leaky(300), [*leaky(200), asked("who?", "nobody", "other")], steps=300)
    assert report["leak"] > 99
    assert 35 < report["coin"] < 65
    assert report["other"] == 0
