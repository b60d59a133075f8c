"""Scores of predictions by the rule of each dataset.

Every question with a known answer counts. One without a usable prediction is wrong and is listed,
and so is an annotation that could not be read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from videodistill.data import activitynetqa, agqa, star
from videodistill.data.entries import Broken
from videodistill.data.record import Question, Stretch
from videodistill.errors import UserError
from videodistill.evaluation.predictions import Prediction
from videodistill.evaluation.wups import Lexicon, content_words, wups


class Metric(NamedTuple):
    """One number of a table."""

    percent: float
    questions: int
    """How many it is about."""


@dataclass(frozen=True)
class Scores:
    """How good predictions are, and what was wrong with them."""

    metrics: dict[str, Metric]
    """By group, in the order of the published tables; "all" is over all questions."""
    unanswered: dict[str, str]
    """Why a question has no usable prediction, by its id; it counts as wrong."""
    broken: tuple[str, ...]
    """Annotations that could not be read; each counts as a wrong answer."""
    unknown: tuple[str, ...]
    """Ids of predictions to no question; they do not count."""
    unscored: int
    """Questions whose right answer is not known; they do not count."""


class _Outcome(NamedTuple):
    question: Question
    prediction: Prediction
    credit: float
    """From 0 to 1."""


@dataclass(frozen=True)
class Rule:
    """How the credits of single questions become a dataset's table."""

    groups: Callable[[Question], Iterable[str | None]]
    """The groups that a question counts in, beside "all"."""
    order: tuple[str, ...] = ()
    """Groups in the order of the table; others come after them by name."""
    further: Callable[[Sequence[_Outcome], Mapping[str, Metric]], dict[str, Metric]] | None = None
    """Metrics that are no mean of credits, from all outcomes and the groups' metrics."""
    by_wups: bool = False
    """Open-ended answers are compared by WUPS and not as they stand."""


_NOTHING = Prediction(error="no prediction")


def score(
    rule: str,
    questions: Sequence[Question],
    predictions: Mapping[str, Prediction],
    *,
    broken: Sequence[Broken] = (),
    vocabulary: Collection[str] | None = None,
    lexicon: Lexicon | None = None,
    stop_words: Collection[str] = (),
) -> Scores:
    """Score predictions.

    The answer to a question with choices is right if it is the text of the right choice; others
    must equal the right answer as they stand.

    Args:
        rule: A key of `RULES`.
        questions: All of a split.
        predictions: By question id.
        broken: Annotations of the split that could not be read.
        vocabulary: The answers that can be given to open-ended questions. Where the right answer
            is not one of them, the prediction is wrong whatever it is. By default all can be given.
        lexicon, stop_words: For rules that compare by WUPS.

    Raises:
        UserError: No right answer is known, or no prediction is for one of the questions.
    """
    table = RULES[rule]
    asked = [question for question in questions if question.answer is not None]
    if not asked:
        raise UserError("the right answer is known of none of the questions: nothing to score")
    ids = {question.question_id for question in questions}
    unknown = tuple(name for name in predictions if name not in ids)
    if predictions and len(unknown) == len(predictions):
        raise UserError(
            f"none of the predictions is for one of the questions: they have ids like "
            f"{unknown[0]}, the questions like {asked[0].question_id}; is it another split?"
        )
    known = frozenset(vocabulary) if vocabulary is not None else None
    stop_words = frozenset(stop_words)
    outcomes, unanswered = [], {}
    for question in asked:
        prediction = predictions.get(question.question_id, _NOTHING)
        text, reason = _text(question, prediction)
        if text is None:
            unanswered[question.question_id] = reason
            credit = 0.0
        elif table.by_wups:
            credit = _wups_credit(question, text, lexicon, stop_words)
        else:
            possible = known is None or question.choices is not None or question.answer in known
            credit = float(possible and text in (question.answer, *question.references))
        outcomes.append(_Outcome(question, prediction, credit))
    for entry in broken:
        stub = Question(entry.message, "", "", family=entry.family)
        outcomes.append(_Outcome(stub, _NOTHING, 0.0))
    return Scores(
        metrics=_metrics(table, outcomes),
        unanswered=unanswered,
        broken=tuple(entry.message for entry in broken),
        unknown=unknown,
        unscored=len(questions) - len(asked),
    )


def _text(question: Question, prediction: Prediction) -> tuple[str | None, str]:
    """What was answered, or why that is not known."""
    answer = prediction.answer
    if prediction.error is not None or answer is None:
        return None, prediction.error or "no answer"
    if isinstance(answer, str):
        answer = answer.strip()
    choices = question.choices
    if choices is None or answer in choices:
        return str(answer), ""
    if isinstance(answer, int) or answer.isdecimal():
        if 0 <= int(answer) < len(choices):
            return choices[int(answer)], ""
        return None, f"there is no choice {answer}"
    return None, f"{answer!r} is none of the choices"


def _wups_credit(
    question: Question, text: str, lexicon: Lexicon | None, stop_words: Collection[str]
) -> float:
    if lexicon is None:
        raise ValueError("this rule needs a lexicon")
    given = content_words(text, lexicon, stop_words)
    right = [
        content_words(answer, lexicon, stop_words)
        for answer in (question.answer, *question.references)
    ]
    if question.family in ("DB", "DC"):
        return float(given in right)
    return max(wups(given, words, lexicon) for words in right)


def _metrics(table: Rule, outcomes: Sequence[_Outcome]) -> dict[str, Metric]:
    credits: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        for group in {*table.groups(outcome.question)} - {None}:
            credits[group].append(outcome.credit)
    places = {group: place for place, group in enumerate(table.order)}
    order = sorted(credits, key=lambda group: (places.get(group, len(places)), group))
    metrics = {group: _mean(credits[group]) for group in order}
    overall = {"all": _mean([outcome.credit for outcome in outcomes])}
    further = table.further(outcomes, metrics | overall) if table.further else {}
    overall = {"all": further.pop("all", overall["all"])}  # comes last
    return metrics | further | overall


def _mean(values: Sequence[float]) -> Metric:
    return Metric(100 * sum(values) / max(1, len(values)), len(values))


def _nextqa_groups(question: Question) -> tuple[str, ...]:
    kind = "TN" if question.family == "TP" else question.family
    return (kind, kind[0]) if kind else ()


def _activitynetqa_groups(question: Question) -> tuple[str | None, ...]:
    free = question.family in activitynetqa.TYPES[3:]
    return (question.family, "free" if free else None)


def _egotaskqa_groups(question: Question) -> tuple[str | None, ...]:
    if not question.tags:
        return ()
    kind = "open" if "query" in question.tags else "binary"
    reference = question.reference
    return (*question.tags, kind, reference, f"{reference} {kind}" if reference else None)


def _agqa_groups(question: Question) -> tuple[str | None, ...]:
    return (*question.tags, question.reference)


def _agqa_precision(
    outcomes: Sequence[_Outcome], metrics: Mapping[str, Metric]
) -> dict[str, Metric]:
    """Of the indirect questions whose direct equivalent was answered rightly: percent right."""
    right = {outcome.question.question_id for outcome in outcomes if outcome.credit}
    credits: dict[str, list[float]] = defaultdict(list)
    for question, _, credit in outcomes:
        if question.reference == "indirect" and question.direct_equivalent in right:
            flags = [flag for flag in agqa.INDIRECT_FLAGS if flag in question.tags]
            for flag in ("indirect", *flags):
                credits[f"{flag} precision"].append(credit)
    return {name: _mean(values) for name, values in sorted(credits.items())}


def _star_mean(outcomes: Sequence[_Outcome], metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The mean of the types' accuracies, and beside it that over all questions."""
    types = [metrics[kind].percent for kind in star.TYPES if kind in metrics]
    overall = metrics["all"]
    mean = Metric(sum(types) / max(1, len(types)), overall.questions)
    return {"over questions": overall, "all": mean}


def _grounding(outcomes: Sequence[_Outcome], metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """NExT-GQA's scores of predicted stretches, over all questions that are grounded."""
    overlaps, right = [], []
    for question, prediction, credit in outcomes:
        if question.evidence or not question.video:  # a broken annotation, too, is wrong
            overlap = best_overlap(prediction.evidence, question.evidence)
            overlaps.append(overlap)
            right.append(credit * (overlap[1] >= 0.5))
    found: dict[str, Metric] = {"Acc@GQA": _mean(right)}
    for place, name in ((1, "IoP"), (0, "IoU")):
        values = [overlap[place] for overlap in overlaps]
        found[f"m{name}"] = _mean(values)
        for threshold in (0.3, 0.5):
            found[f"{name}@{threshold}"] = _mean([float(value >= threshold) for value in values])
    return found


def best_overlap(predicted: Stretch | None, evidence: Sequence[Stretch]) -> tuple[float, float]:
    """(IoU, IoP) of a predicted stretch, each with the one of the true stretches that gives most.

    IoU is the overlap's share of what both cover together, IoP its share of the predicted stretch.
    An instant has an IoU of 0, and an IoP of 1 inside of a true stretch. Without a prediction both
    are 0.
    """
    if predicted is None or not evidence:
        return 0.0, 0.0
    start, end = predicted
    iou, iop = [], []
    for low, high in evidence:
        if start == end:
            iou.append(0.0)
            iop.append(float(low <= start <= high))
            continue
        common = max(0.0, min(end, high) - max(start, low))
        iou.append(common / ((end - start) + (high - low) - common))
        iop.append(common / (end - start))
    return max(iou), max(iop)


_CAUSAL_FIRST = ("CW", "CH", "TN", "TC")

RULES = {
    "nextqa-mc": Rule(_nextqa_groups, (*_CAUSAL_FIRST, "DC", "DL", "DO", "C", "T", "D")),
    "nextqa-oe": Rule(
        _nextqa_groups, (*_CAUSAL_FIRST, "DB", "DC", "DL", "DO", "C", "T", "D"), by_wups=True
    ),
    "nextgqa": Rule(_nextqa_groups, (*_CAUSAL_FIRST, "C", "T"), _grounding),
    "activitynet-qa": Rule(
        _activitynetqa_groups,
        (*activitynetqa.TYPES[:3], "free", *activitynetqa.TYPES[3:]),
    ),
    "egotaskqa": Rule(
        _egotaskqa_groups,
        (
            *("direct open", "direct binary", "direct"),
            *("indirect open", "indirect binary", "indirect"),
            *("open", "binary"),
        ),
    ),
    "agqa": Rule(_agqa_groups, further=_agqa_precision),
    "star": Rule(lambda question: (question.family,), star.TYPES, _star_mean),
    "procedural": Rule(lambda question: (question.family, question.reference)),
    "family": Rule(lambda question: (question.family,)),
}
"""How each dataset is scored, by the name that `videodistill.data.datasets` gives."""
