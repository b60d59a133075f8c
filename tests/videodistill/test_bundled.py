"""What comes with the package: small enough, as its card says, and able to answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import videodistill
from videodistill.training.card import model_card

ASSETS = Path(videodistill.__file__).parent / "assets"


def test_it_is_small():
    total = sum(path.stat().st_size for path in (ASSETS / "default").rglob("*"))
    assert total <= 25e6


def test_the_card_says_what_was_measured():
    record = json.loads((ASSETS / "default" / "training.json").read_text(encoding="utf-8"))
    card = (ASSETS / "default" / "README.md").read_text(encoding="utf-8")
    assert card == model_card(record)


@pytest.fixture(scope="module")
def answered():
    questions = {
        "what shape is the thing that makes the blue star shrink?": "ring",
        "what shape is the purple visitor?": "ring",
    }
    model = videodistill.load(device="cpu")
    return questions, model.answer(ASSETS / "sample.mp4", list(questions))


def test_it_answers_about_the_sample(answered):
    questions, result = answered
    assert {answer.question: answer.answer for answer in result} == questions


def test_it_looks_where_the_answer_is(answered):
    """A purple ring comes in and strikes the star from 3.3 to 3.9 s."""
    for answer in answered[1]:
        assert any(3.33 <= frame.time < 3.92 for frame in answer.frames)
