"""Every rule on a handful of questions whose scores are known by hand, and on published files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.videodistill.evaluation.test_wups import TAXONOMY
from videodistill.data.datasets import get_dataset
from videodistill.data.entries import Broken
from videodistill.data.files import read_lines
from videodistill.data.record import Question
from videodistill.errors import UserError
from videodistill.evaluation.predictions import Prediction, read_predictions
from videodistill.evaluation.scoring import best_overlap, score
from videodistill.evaluation.wups import WordNet

CHOICES = ("a", "b", "c", "d", "e")


def asked(name: str, answer: str | None, family: str | None = None, **more) -> Question:
    return Question(name, "v.mp4", "what?", answer, family=family, **more)


def choice(name: str, answer: str | None, family: str | None = None, **more) -> Question:
    return asked(name, answer, family, choices=CHOICES, **more)


def given(**answers: int | str | None) -> dict[str, Prediction]:
    return {name: Prediction(answer) for name, answer in answers.items()}


def percents(rule: str, questions: list, predictions: dict, **options) -> dict[str, float]:
    metrics = score(rule, questions, predictions, **options).metrics
    return {name: round(metric.percent, 2) for name, metric in metrics.items()}


def test_published_predictions_of_hga(shared_data: Path) -> None:
    folder = shared_data / "annotations" / "nextqa_mc"
    dataset = get_dataset("nextqa-mc")
    predictions = read_predictions(folder / "HGA-bert-ft-h256-val-example.json")
    scores = score(dataset.rule, dataset.read(folder / "val.csv"), predictions)
    published = {"C": 46.26, "T": 50.74, "D": 59.33, "all": 49.74}
    assert {name: round(scores.metrics[name].percent, 2) for name in published} == published
    assert scores.metrics["all"].questions == 4996
    groups = ["CW", "CH", "TN", "TC", "DC", "DL", "DO", "C", "T", "D", "all"]
    assert list(scores.metrics) == groups
    assert not scores.unanswered and not scores.unknown and not scores.broken
    for whole, parts in (("C", groups[:2]), ("T", groups[2:4]), ("D", groups[4:7])):
        assert scores.metrics[whole].questions == sum(scores.metrics[p].questions for p in parts)
    assert [scores.metrics[group].questions for group in "CTD"] == [2607, 1612, 777]


def test_choices_by_index_or_text() -> None:
    questions = [choice(str(i), "b", "CW") for i in range(5)]
    predictions = {str(i): Prediction(a) for i, a in enumerate([1, "b", "1", 0, "c"])}
    assert percents("nextqa-mc", questions, predictions) == {"CW": 60.0, "C": 60.0, "all": 60.0}
    numbers = replace(questions[0], choices=("1", "2"), answer="1")
    assert percents("family", [numbers], {"0": Prediction("1")})["all"] == 100
    assert percents("family", [numbers], {"0": Prediction(1)})["all"] == 0
    twice = replace(questions[0], choices=("x", "b", "b"))
    assert percents("family", [twice], {"0": Prediction(2)})["all"] == 100


def test_nextqa_groups_and_micro_average() -> None:
    questions = [
        choice("1", "a", "TP"),
        choice("2", "a", "TN"),
        choice("3", "a", "TC"),
        choice("4", "a", "DO"),
    ]
    assert percents("nextqa-mc", questions, given(**{"1": 0, "2": 1, "3": 0, "4": 1})) == {
        "TN": 50.0,
        "TC": 100.0,
        "DO": 0.0,
        "T": 66.67,
        "D": 0.0,
        "all": 50.0,
    }


def test_what_is_not_answered_is_wrong_and_listed() -> None:
    questions = [choice(name, "a", "CW") for name in "123456"] + [choice("7", None, "CW")]
    predictions = given(**{"1": 0, "3": None, "4": 5, "5": "f", "7": 0, "x": 0}) | {
        "6": Prediction(0, error="v.mp4: the file is empty")
    }
    scores = score("nextqa-mc", questions, predictions)
    assert scores.metrics["CW"] == scores.metrics["all"] == (100 / 6, 6)
    assert scores.unanswered == {
        "2": "no prediction",
        "3": "no answer",
        "4": "there is no choice 5",
        "5": "'f' is none of the choices",
        "6": "v.mp4: the file is empty",
    }
    assert scores.unknown == ("x",) and scores.unscored == 1


def test_broken_annotations_are_wrong_and_listed() -> None:
    broken = [Broken("val.csv:3: type TC, no answer", "TC"), Broken("val.csv:4: four cells")]
    scores = score("nextqa-mc", [choice("1", "a", "TC")], given(**{"1": 0}), broken=broken)
    assert scores.metrics == {"TC": (50, 2), "T": (50, 2), "all": (pytest.approx(100 / 3), 3)}
    assert scores.broken == ("val.csv:3: type TC, no answer", "val.csv:4: four cells")


@pytest.mark.parametrize("rule", ["nextgqa", "activitynet-qa", "egotaskqa", "agqa", "star"])
def test_broken_annotations_count_under_every_rule(rule: str) -> None:
    question = asked("1", "a", "Sequence", evidence=((0.0, 1.0),))
    scores = score(rule, [question], given(**{"1": "a"}), broken=[Broken("x", "Sequence")])
    assert scores.metrics["all"].percent == 50


def test_nothing_to_score() -> None:
    with pytest.raises(UserError, match="the right answer is known of none"):
        score("family", [choice("1", None)], given(**{"1": 0}))
    with pytest.raises(UserError, match="ids like 9, the questions like 1; is it another split"):
        score("family", [choice("1", "a")], given(**{"9": 0}))
    assert score("family", [choice("1", "a")], {}).metrics["all"].percent == 0


def test_exact_match_within_the_vocabulary() -> None:
    questions = [asked(name, answer, "who") for name, answer in zip("1234", "aabc", strict=True)]
    predictions = given(**{"1": "a", "2": "A", "3": "b", "4": "c"})
    assert percents("family", questions, predictions) == {"who": 75.0, "all": 75.0}
    # "c" is no training answer: it counts, as wrong.
    assert percents("family", questions, predictions, vocabulary=["a", "b"])["all"] == 50.0
    numbers = [asked("1", "2")]
    assert percents("family", numbers, {"1": Prediction(2)})["all"] == 100


def test_the_vocabulary_does_not_concern_choices() -> None:
    assert percents("family", [choice("1", "a")], given(**{"1": 0}), vocabulary=["b"])["all"] == 100


def test_activitynet_types() -> None:
    questions = [
        asked("1", "run", "motion"),
        asked("2", "left", "spatial relation"),
        asked("3", "yes", "yes/no"),
        asked("4", "no", "yes/no"),
        asked("5", "two", "number"),
    ]
    predictions = given(**{"1": "run", "2": "right", "3": "yes", "4": "yes", "5": "two"})
    metrics = score("activitynet-qa", questions, predictions).metrics
    assert metrics == {
        "motion": (100, 1),
        "spatial relation": (0, 1),
        "free": (pytest.approx(200 / 3), 3),
        "yes/no": (50, 2),
        "number": (100, 1),
        "all": (60, 5),
    }
    assert list(metrics) == ["motion", "spatial relation", "free", "yes/no", "number", "all"]


def test_activitynet_by_the_order_of_no_file(shared_data: Path) -> None:
    """The free-form group is all of the types 3 to 8, whichever type the file begins with."""
    dataset = get_dataset("activitynet-qa")
    questions = dataset.read(shared_data / "annotations" / "activitynet_qa" / "test_q.json")
    yes = {question.question_id: Prediction("yes") for question in questions}
    metrics = score(dataset.rule, questions, yes).metrics
    assert metrics["free"].questions == 8000 - 3 * 800
    assert metrics == score(dataset.rule, questions[::-1], yes).metrics
    kinds = ("yes/no", "color", "object", "location", "number", "other")
    assert metrics["free"].questions == sum(metrics[kind].questions for kind in kinds)


def test_egotaskqa_tags_kinds_and_references() -> None:
    def ego(name: str, answer: str, kind: str, reference: str, *tags: str) -> Question:
        labels = (*tags, "action", kind, reference)
        return asked(name, answer, tags[0], reference=reference, tags=labels)

    questions = [
        ego("1", "cup", "query", "direct", "descriptive", "world"),
        ego("2", "yes", "verify", "direct", "descriptive", "world"),
        ego("3", "cup", "query", "indirect", "causal", "intent"),
        ego("4", "no", "verify", "indirect", "causal", "intent", "world"),
        ego("5", "yes", "verify", "indirect", "causal", "intent"),
    ]
    predictions = given(**{"1": "cup", "2": "no", "3": "mug", "4": "no", "5": "yes"})
    assert percents("egotaskqa", questions, predictions) == {
        "direct open": 100.0,
        "direct binary": 0.0,
        "direct": 50.0,
        "indirect open": 0.0,
        "indirect binary": 100.0,
        "indirect": 66.67,
        "open": 50.0,
        "binary": 66.67,
        "action": 60.0,
        "causal": 66.67,
        "descriptive": 50.0,
        "intent": 66.67,
        "query": 50.0,
        "verify": 66.67,
        "world": 66.67,
        "all": 60.0,
    }


def test_egotaskqa_averages_over_questions_not_batches() -> None:
    questions = [asked(str(i), "a", tags=("x", "query")) for i in range(65)]
    right_in_the_last = given(**{"64": "a"})
    assert percents("egotaskqa", questions, right_in_the_last)["all"] == round(100 / 65, 2)


def test_agqa_with_precision_of_indirect_questions() -> None:
    def agqa(name: str, equivalent: str | None = None, *flags: str) -> Question:
        return asked(
            name,
            "Yes",
            "verify",
            tags=("binary", "exists", "object", "verify", *flags),
            reference="indirect" if equivalent else "direct",
            direct_equivalent=equivalent,
        )

    questions = [
        agqa("d1"),
        agqa("d2", None, "novel_comp", "nc_seq"),
        agqa("i1", "d1", "i_obj"),
        agqa("i2", "d1", "i_obj", "i_rel"),
        agqa("i3", "d2", "i_rel"),
        agqa("i4", "elsewhere", "i_rel"),
    ]
    predictions = given(d1="Yes", d2="No", i1="Yes", i2="No", i3="Yes", i4="yes")
    metrics = score("agqa", questions, predictions).metrics
    assert metrics["all"] == metrics["binary"] == metrics["exists"] == (50, 6)
    assert metrics["direct"] == (50, 2) and metrics["indirect"] == (50, 4)
    assert metrics["novel_comp"] == metrics["nc_seq"] == (0, 1)
    assert metrics["i_obj"] == (50, 2) and metrics["i_rel"] == (pytest.approx(100 / 3), 3)
    # Of i1 to i4, the direct equivalent of i1 and i2 alone was answered rightly.
    assert metrics["indirect precision"] == metrics["i_obj precision"] == (50, 2)
    assert metrics["i_rel precision"] == (0, 1)


def test_star_is_the_mean_of_the_types() -> None:
    questions = [choice(str(i), "a", "Sequence") for i in range(3)] + [
        choice("3", "a", "Feasibility")
    ]
    predictions = given(**{"0": 0, "1": 0, "2": 1, "3": 1})
    metrics = score("star", questions, predictions).metrics
    assert list(metrics) == ["Sequence", "Feasibility", "over questions", "all"]
    assert metrics["over questions"] == (50, 4)
    assert metrics["all"].percent == pytest.approx(100 / 3)


def test_egomcq_inter_and_intra() -> None:
    questions = [
        asked("0", "3", "inter", choices=tuple("01234")),
        asked("1", "0", "intra", choices=tuple("01234")),
    ]
    assert percents("family", questions, given(**{"0": 3, "1": 1})) == {
        "inter": 100.0,
        "intra": 0.0,
        "all": 50.0,
    }


@pytest.mark.parametrize(
    ("predicted", "evidence", "iou", "iop"),
    [
        ((2.0, 4.0), [(2.0, 4.0)], 1.0, 1.0),
        ((2.0, 4.0), [(3.0, 7.0)], 0.2, 0.5),
        ((2.0, 4.0), [(5.0, 7.0)], 0.0, 0.0),
        ((2.0, 4.0), [(4.0, 7.0)], 0.0, 0.0),
        ((2.0, 4.0), [(0.0, 8.0), (3.0, 4.0)], 0.5, 1.0),  # each from the stretch that is best
        ((3.0, 3.0), [(2.0, 4.0)], 0.0, 1.0),
        ((5.0, 5.0), [(2.0, 4.0)], 0.0, 0.0),
        (None, [(2.0, 4.0)], 0.0, 0.0),
    ],
)
def test_overlap(predicted, evidence, iou: float, iop: float) -> None:
    assert best_overlap(predicted, evidence) == (pytest.approx(iou), pytest.approx(iop))


def test_nextgqa() -> None:
    questions = [choice(name, "a", "CW", evidence=((2.0, 4.0),)) for name in "12345"]
    predictions = {
        "1": Prediction(0, (2.0, 4.0)),  # right, and from the right place
        "2": Prediction(0, (3.0, 7.0)),  # right, IoP 1/4, IoU 1/5
        "3": Prediction(1, (3.0, 4.0)),  # wrong, IoP 1, IoU 1/2
        "4": Prediction(0),  # right, from nowhere
    }
    assert percents("nextgqa", questions, predictions) == {
        "CW": 60.0,
        "C": 60.0,
        "Acc@GQA": 20.0,
        "mIoP": 45.0,
        "IoP@0.3": 40.0,
        "IoP@0.5": 40.0,
        "mIoU": 34.0,
        "IoU@0.3": 40.0,
        "IoU@0.5": 40.0,
        "all": 60.0,
    }


def test_nextgqa_on_real_evidence(shared_data: Path) -> None:
    dataset = get_dataset("nextgqa")
    questions = dataset.read(shared_data / "annotations" / "nextgqa" / "val.csv")
    perfect = {q.question_id: Prediction(q.answer, q.evidence[0]) for q in questions}
    found = percents(dataset.rule, questions, perfect)
    assert {found[name] for name in ("Acc@GQA", "mIoP", "mIoU", "IoU@0.5", "all")} == {100.0}
    half = dict(list(perfect.items())[::2])
    found = percents(dataset.rule, questions, half)
    assert {found[name] for name in ("Acc@GQA", "mIoP", "mIoU", "IoU@0.5", "all")} == {50.0}


def test_published_open_ended_predictions_of_hga(shared_data: Path) -> None:
    try:
        lexicon = WordNet()
    except UserError as missing:
        pytest.skip(str(missing))
    folder = shared_data / "annotations" / "nextqa_oe"
    dataset = get_dataset("nextqa-oe")
    predictions = read_predictions(folder / "HGA-same-att-qns23ans7-val-example.json")
    options = {"lexicon": lexicon, "stop_words": read_lines(folder / "stopwords.txt")}
    metrics = score(dataset.rule, dataset.read(folder / "val.csv"), predictions, **options).metrics
    # A few lemmas depend on the tagger's version.
    for group, published in {"C": 14.76, "T": 14.90, "D": 46.60, "all": 21.48}.items():
        assert metrics[group].percent == pytest.approx(published, abs=0.2)


def test_nextqa_open_ended() -> None:
    questions = [
        asked("1", "two dogs", "DC"),
        asked("2", "the dog", "DB", references=("cat",)),
        asked("3", "dog", "DO", references=("a ball",)),
        asked("4", "the puppies", "TP"),
        asked("5", "dog", "CW"),
    ]
    predictions = given(**{"1": "two dog", "2": "the cats", "3": "balls", "4": "dog", "5": "dogs"})
    options = {"lexicon": TAXONOMY, "stop_words": {"a", "the"}}
    assert percents("nextqa-oe", questions, predictions, **options) == {
        "CW": 100.0,
        "TN": 0.0,
        "DB": 100.0,
        "DC": 100.0,
        "DO": 100.0,
        "C": 100.0,
        "T": 0.0,
        "D": 100.0,
        "all": 80.0,
    }
    # Counts and yes or no must be the same; other answers may be alike.
    predictions = given(**{"1": "two cats", "2": "puppy", "3": "puppy", "5": "cat"})
    metrics = score("nextqa-oe", questions, predictions, **options).metrics
    assert metrics["DC"].percent == metrics["DB"].percent == 0
    assert metrics["DO"].percent == pytest.approx(600 / 7)
    assert metrics["CW"].percent == pytest.approx(400 / 6)
