"""What is in a procedural data set, and how far one gets without looking at it properly."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videodistill.data.files import read_json
from videodistill.data.procedural.questions import ANSWERS, CHOICES
from videodistill.data.procedural.read import load_questions
from videodistill.data.record import Question
from videodistill.errors import UserError
from videodistill.evaluation.blind import question_only
from videodistill.evaluation.priors import priors

if TYPE_CHECKING:
    from videodistill.encoders import ImageTextEncoder

QUESTION_ONLY_LIMIT, ONE_FRAME_LIMIT = 40.0, 45.0
"""Percent that a trained model may reach from the words alone, and from one random frame."""

_CANDIDATES = 16
"""Frames of each video that features are made of: no procedural video has fewer. A random one of
these, which are evenly spread, is a random frame."""


def check_dataset(
    dataset: Path,
    train: str,
    test: str,
    encoder: str | Path,
    *,
    videos: int = 1500,
    question_steps: int = 1500,
    frame_steps: int = 1200,
    workers: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Count a data set, and train the two models that it must withstand.

    Args:
        dataset: Folder made by ``videodistill data make``.
        train, test: Names of its splits.
        encoder: Folder of the one for the model that sees one random frame of a video.
        videos: How many training videos that model learns from, at most.
        question_steps: Of training the model that sees the questions' words alone.
        frame_steps: Of training the model that sees one frame.
        workers: Processes that compute features, at least 1.
        log: Called with lines of progress.

    Returns:
        ``questions``: their number by split. ``families``: percent of the test questions by
        family. ``answers``: percent that the commonest answer has. ``priors``: see
        :func:`~videodistill.evaluation.priors.priors`. ``question_only`` and ``one_frame``: percent
        right of the two models, by family and over "all".

    Raises:
        UserError: The folder holds no such data set, or the encoder cannot be loaded.
    """
    from videodistill.encoders import load_encoder

    learnt, asked = _open(dataset, train), _open(dataset, test)
    if len(learnt) < 2:
        raise UserError(f"{dataset}: {train} has a single question; make a larger split")
    eyes = load_encoder(encoder)
    families = Counter(question.family for question in asked)
    answers = Counter(question.answer for question in asked)
    log("training on the questions' words")
    blind = question_only(learnt, asked, steps=question_steps)
    log("training on one random frame of each video")
    one_frame = _one_frame(
        [
            (dataset / "videos" / train, _about(learnt, videos)),
            (dataset / "videos" / test, asked),
        ],
        encoder,
        eyes,
        frame_steps,
        workers,
    )
    return {
        "questions": {train: len(learnt), test: len(asked)},
        "families": {name: 100 * n / len(asked) for name, n in sorted(families.items())},
        "answers": 100 * max(answers.values()) / len(asked),
        "priors": priors(learnt, asked),
        "question_only": blind,
        "one_frame": one_frame,
    }


def _open(dataset: Path, split: str) -> list[Question]:
    """The questions of a split that is known to be complete."""
    if not (dataset / "dataset.json").is_file():
        raise UserError(
            f"{dataset}: no dataset.json there; give a folder made by: videodistill data make"
        )
    splits = read_json(dataset / "dataset.json", dict).get("splits")
    if not isinstance(splits, dict):
        raise UserError(f"{dataset / 'dataset.json'}: lists no splits; make the data set again")
    if split not in splits:
        raise UserError(f"{dataset}: no split {split}; there are {', '.join(splits)}")
    if "sha256" not in splits[split]:  # written when everything else is
        raise UserError(
            f"{dataset}: split {split} is not finished; run the same data make again, it goes on "
            "where it stopped"
        )
    return load_questions(dataset, split)


def _about(questions: list[Question], videos: int) -> list[Question]:
    """Those about the first so many videos."""
    kept = set(sorted({question.video for question in questions})[:videos])
    return [question for question in questions if question.video in kept]


def _one_frame(
    splits: list[tuple[Path, list[Question]]],
    encoder: str | Path,
    eyes: ImageTextEncoder,
    steps: int,
    workers: int,
) -> dict[str, float]:
    """Percent right of the model itself, trained and tested on one random frame of each video.

    ``splits``: the folders of the videos, and the questions, of training and of testing.
    """
    import torch

    from videodistill.model import VideoDistill
    from videodistill.training.features import extract
    from videodistill.training.head import HeadRecipe, evaluate, prepare, train_head

    prepared = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder, questions in splits:
            features = extract(
                folder,
                sorted({question.video for question in questions}),
                Path(encoder),
                _CANDIDATES,
                Path(scratch) / f"{folder.name}.safetensors",
                workers=workers,
            )
            prepared.append(prepare(questions, features, eyes, ANSWERS, CHOICES))
    choice_embed = eyes.encode_texts(list(CHOICES)).text_embed
    torch.manual_seed(0)
    model = VideoDistill.for_encoder(
        eyes,
        answers=list(ANSWERS),
        width=128,
        heads=4,
        frames=_CANDIDATES,
        pick=1,
        frame_choice="random",
    )
    recipe = HeadRecipe(observing=(), steps=steps, videos_per_batch=12, evidence_weight=0.0)
    train_head(model, prepared[:1], recipe, choice_embed, log=lambda line: None)
    report = evaluate(model, prepared[1], choice_embed)
    return {family: values["accuracy"] for family, values in report.items()}
