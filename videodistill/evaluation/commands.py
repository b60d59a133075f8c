"""``videodistill score``: score a file of predictions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from videodistill.data.entries import Broken
from videodistill.errors import UserError
from videodistill.evaluation.predictions import Prediction, read_evidence, read_predictions
from videodistill.evaluation.scoring import RULES, Scores, score
from videodistill.evaluation.wups import WordNet
from videodistill.listing import print_some

app = typer.Typer(help="Evaluate answers.")


@app.command(name="score")
def score_command(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset, e.g. nextqa-mc.")],
    path: Annotated[Path, typer.Argument(help="Its folder, or the file of one split.")],
    predictions: Annotated[
        Path, typer.Argument(help="JSON file of answers by question id; docs/data.md: layouts.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Which split, where the folder holds several.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Text file of answers that can be given, one per line.",
            show_default="the commonest of the training split, if the dataset is so scored",
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(help="NExT-GQA: JSON file of predicted stretches by question id."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score predictions, your own or published ones, by the rule of the dataset.

    A question without a usable prediction and an annotation that cannot be read count as wrong;
    both are listed.
    """
    from videodistill.data.datasets import get_dataset
    from videodistill.data.files import read_lines
    from videodistill.data.vocabulary import ceiling, commonest_answers, read_vocabulary

    known = get_dataset(dataset)
    by_wups = RULES[known.rule].by_wups
    if evidence is not None and known.rule != "nextgqa":
        raise UserError(f"--evidence is only for nextgqa, not for {dataset}: drop it")
    found = known.find(path)
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split not in found:
        which = "which split?" if split is None else f"no split {split};"
        raise UserError(f"{path}: {which} give --split with one of {', '.join(found)}")
    given = read_predictions(predictions)
    if evidence is not None:
        given = _with_evidence(given, evidence)
    stop_words = lexicon = None
    if by_wups:
        stop_words, lexicon = read_lines(found[split].with_name("stopwords.txt")), WordNet()
    broken: list[Broken] = []
    questions = known.read(found[split], broken)
    vocabulary, source = None, answers
    if answers is not None:
        if by_wups or all(question.choices is not None for question in questions):
            raise UserError(
                "--answers is only for open-ended questions that are classified: drop it"
            )
        vocabulary = read_vocabulary(answers)
    elif known.vocabulary is not None:
        source = known.training_file(split, path)
        if source is not None:
            vocabulary = commonest_answers(known.read(source, []), known.vocabulary)
    scores = score(
        known.rule,
        questions,
        given,
        broken=broken,
        vocabulary=vocabulary,
        lexicon=lexicon,
        stop_words=stop_words or (),
    )
    classes = None
    if vocabulary:
        share = ceiling(questions, vocabulary)
        classes = {"source": str(source), "answers": len(vocabulary), "ceiling": share}
    if as_json:
        told = asdict(scores) | {
            "dataset": dataset,
            "split": split,
            "vocabulary": classes,
            "metrics": {name: metric._asdict() for name, metric in scores.metrics.items()},
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    _print(scores, "WUPS" if by_wups else "percent")
    if classes:
        print(
            f"ceiling: {share:.1f}%; right answers that are not among the {len(vocabulary)} of "
            f"{source} count as wrong"
        )
    elif known.vocabulary is not None:
        print("any answer may be right: there is no training split here; --answers limits them")


def _with_evidence(given: dict[str, Prediction], path: Path) -> dict[str, Prediction]:
    stretches = read_evidence(path)
    return {
        name: replace(given.get(name, Prediction()), evidence=stretches.get(name))
        for name in given.keys() | stretches.keys()
    }


def _print(scores: Scores, unit: str) -> None:
    print(f"{'group':24}{'questions':>10}{unit:>10}")
    for name, metric in scores.metrics.items():
        print(f"{name:24}{metric.questions:>10}{metric.percent:>10.2f}")
    wrong = [f"{name}: {reason}" for name, reason in scores.unanswered.items()]
    print_some("questions without a usable prediction, counted as wrong", wrong)
    print_some("annotations that cannot be read, counted as wrong", scores.broken)
    print_some("predictions to no question of this split, ignored", scores.unknown)
    if scores.unscored:
        print(f"{scores.unscored} questions whose right answer is not known do not count")


@app.callback()
def _evaluation() -> None:
    """Evaluate answers."""
