from __future__ import annotations

from videodistill.data.record import Question
from videodistill.evaluation.predictions import Prediction
from videodistill.evaluation.shortcut import ShortcutReport, shortcut_report


def asked(name: str, reference: str | None) -> Question:
    return Question(name, "v.mp4", "what?", "a", reference=reference)


def given(answers: str) -> dict[str, Prediction]:
    return {str(place): Prediction(answer) for place, answer in enumerate(answers)}


def test_report() -> None:
    references = ("direct", "direct", "indirect", "indirect", "indirect")
    questions = [asked(str(place), reference) for place, reference in enumerate(references)]
    report = shortcut_report("egotaskqa", questions, given("aaabb"), given("abbbb"), given("bbbaa"))
    assert report == ShortcutReport(60.0, 20.0, 40.0, 100.0, 100 / 3)
    assert report.looked == 20.0
    assert report.gap == 100 - 100 / 3


def test_without_references() -> None:
    report = shortcut_report("family", [asked("0", None)], given("a"), given("b"), given("b"))
    assert report == ShortcutReport(100.0, 0.0, 0.0, None, None)
    assert report.looked == 100.0 and report.gap is None


def test_options_are_those_of_scoring() -> None:
    made = given("a")
    report = shortcut_report("family", [asked("0", None)], made, made, made, vocabulary=["b"])
    assert report.video == 0.0
