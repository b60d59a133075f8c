"""``videodistill predict`` answers a dataset's questions, ``score`` scores a file of answers."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from videodistill.data.entries import Broken
from videodistill.errors import UserError
from videodistill.evaluation.predictions import Prediction, read_evidence, read_predictions
from videodistill.evaluation.scoring import RULES, Scores, score
from videodistill.evaluation.wups import WordNet
from videodistill.listing import print_some, shown_progress
from videodistill.options import Device, Precision

app = typer.Typer(help="Evaluate answers.")


@app.command(name="predict")
def predict_command(
    dataset: Annotated[str, typer.Argument(help="Name of a dataset, e.g. nextqa-mc.")],
    path: Annotated[Path, typer.Argument(help="Its folder, or the file of one split.")],
    features: Annotated[
        Path, typer.Option(help="Folder that videodistill extract put the videos' features in.")
    ],
    out: Annotated[
        Path, typer.Option(help="A .jsonl file for the answers; a stopped run goes on.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Which split, where the folder holds several.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder or hub id of a trained head; bundled by default.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="That the features are of.", show_default="the checkpoint's"),
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Use the encoder alone, without a trained head.")
    ] = False,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Text file of answers to open-ended questions, one per line.",
            show_default="the head's own",
        ),
    ] = None,
    pick: Annotated[int | None, typer.Option(help="How many frames to answer from.")] = None,
    videos: Annotated[int, typer.Option(min=1, help="How many at once.")] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read features ahead.")] = 2,
    device: Device = None,
    precision: Precision = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer all questions of a split, from features that videodistill extract computed.

    The exit status is 1 when a question has no answer, for want of its video's features or because
    its annotation cannot be read; both are listed.
    """
    from videodistill.data.datasets import get_dataset
    from videodistill.engine.checks import check_count, check_precision, read_answers

    check_count("pick", pick)
    check_precision(precision)
    split, file = get_dataset(dataset).choose(path, split)
    broken: list[Broken] = []
    questions = get_dataset(dataset).read(file, broken)
    options = None if answers is None else read_answers(answers)
    from videodistill.engine.feature_cache import FeatureCache
    from videodistill.engine.loading import load
    from videodistill.evaluation.predict import predict

    model = load(
        checkpoint, encoder=encoder, zero_shot=zero_shot, device=device, precision=precision
    )
    cache = FeatureCache.open(features, model.encoder.fingerprint)
    begin = time.perf_counter()
    with shown_progress() as progress:
        done = predict(
            model,
            questions,
            cache,
            out,
            answers=options,
            pick=pick,
            videos=videos,
            workers=workers,
            progress=lambda done, total: progress("answers", done, total),
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    seconds = time.perf_counter() - begin
    if as_json:
        told = asdict(done) | {"broken": [b.message for b in broken], "dataset": dataset}
        told |= {"split": split, "file": str(out), "seconds": round(seconds, 3)}
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        print(
            f"{out}: {done.answered} questions answered in {seconds:.1f} s"
            + (f", {done.reused} in an earlier run" if done.reused else "")
        )
        unseen = [f"{name}: {reason}" for name, reason in done.unseen.items()]
        print_some("questions without an answer", unseen)
        print_some("annotations that cannot be read", [b.message for b in broken])
    if done.unseen or broken:
        raise typer.Exit(1)


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
    split, file = known.choose(path, split)
    given = read_predictions(predictions)
    if evidence is not None:
        given = _with_evidence(given, evidence)
    stop_words = lexicon = None
    if by_wups:
        stop_words, lexicon = read_lines(file.with_name("stopwords.txt")), WordNet()
    broken: list[Broken] = []
    questions = known.read(file, broken)
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
