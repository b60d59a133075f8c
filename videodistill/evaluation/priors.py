"""Guessing without the video and without a model: what the commonest answers alone achieve."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from videodistill.data.record import Question


def priors(
    train: Sequence[Question], test: Sequence[Question], *, among_choices: bool = False
) -> dict[str, float]:
    """Accuracy in percent of always guessing the commonest answer.

    Questions whose answer is not known do not count.

    Args:
        train: Questions to count answers in; at least one.
        test: Questions to guess the answers of.
        among_choices: Guess the commonest of the question's own choices, where it has any.

    Returns:
        "answer": the commonest of all training answers; "first_two_words": the commonest among
        training questions that begin with the same two words (of all, where none does). Ties go
        to the answer that comes first in the alphabet.
    """
    overall: Counter[str] = Counter()
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        if question.answer is not None:
            overall[question.answer] += 1
            groups[_start(question)][question.answer] += 1

    def commonest(counted: Counter[str]) -> str:
        return min(counted, key=lambda answer: (-counted[answer], answer))

    always = commonest(overall)
    by_start = {words: commonest(counted) for words, counted in groups.items()}

    def guesses(question: Question) -> tuple[str, str]:
        start = _start(question)
        if not among_choices or question.choices is None:
            return always, by_start.get(start, always)
        group = groups.get(start, overall)
        return (
            min(question.choices, key=lambda answer: (-overall[answer], answer)),
            min(question.choices, key=lambda answer: (-group[answer], -overall[answer], answer)),
        )

    known = [question for question in test if question.answer is not None]
    right = [[guess == q.answer for guess in guesses(q)] for q in known]
    return {
        name: round(100 * sum(row[place] for row in right) / max(1, len(right)), 2)
        for place, name in enumerate(("answer", "first_two_words"))
    }


def _start(question: Question) -> str:
    return " ".join(question.question.lower().split()[:2])
