"""What is in a procedural data set, and how far one gets without looking at it properly."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from videodistill.data.files import read_json
from videodistill.data.procedural.questions import ANSWERS
from videodistill.errors import UserError
from videodistill.evaluation.blind import priors, question_only

QUESTION_ONLY_LIMIT, ONE_FRAME_LIMIT = 40.0, 45.0
"""Percent that a trained model may reach from the words alone, and from one random frame."""


def check_dataset(
    dataset: Path, train: str, test: str, encoder: str | Path, *, videos: int = 1500, workers: int
) -> dict[str, Any]:
    """Count a data set, and train the two models that it must withstand.

    Args:
        dataset: Folder made by ``videodistill data make``.
        train, test: Names of its splits.
        encoder: For the model that sees one random frame of a video.
        videos: How many training videos that model learns from, at most.
        workers: Processes that compute features.

    Returns:
        ``questions``, ``families`` (percent), ``answers`` (percent of the commonest), ``priors``,
        ``question_only`` and ``one_frame`` (percent right, by family and over all).

    Raises:
        UserError: The folder holds no such data set.
    """
    from videodistill.training.default_model import load_questions

    described = read_json(dataset / "dataset.json", dict)
    for name in (train, test):
        if name not in described["splits"]:
            known = ", ".join(described["splits"])
            raise UserError(f"{dataset}: no split {name}; there are {known}")
    learnt, asked = load_questions(dataset, train), load_questions(dataset, test)
    families = Counter(question.family for question in asked)
    answers = Counter(question.answer for question in asked)
    return {
        "questions": {train: len(learnt), test: len(asked)},
        "families": {name: 100 * n / len(asked) for name, n in sorted(families.items())},
        "answers": 100 * max(answers.values()) / len(asked),
        "priors": priors(learnt, asked),
        "question_only": question_only(learnt, asked),
        "one_frame": _one_frame(dataset, train, test, encoder, videos, workers),
    }


def _one_frame(
    dataset: Path, train: str, test: str, encoder: str | Path, videos: int, workers: int
) -> dict[str, float]:
    """Percent right of the model itself, trained and tested on one random frame of each video."""
    import torch

    from videodistill.encoders import load_encoder
    from videodistill.model import VideoDistill
    from videodistill.training.default_model import CHOICES, load_questions
    from videodistill.training.features import extract
    from videodistill.training.head import HeadRecipe, evaluate, prepare, train_head

    eyes = load_encoder(encoder)
    choice_embed = eyes.encode_texts(list(CHOICES)).text_embed
    splits = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, most in ((train, videos), (test, None)):
            questions = load_questions(dataset, name)
            kept = sorted({question.video for question in questions})[:most]
            features = extract(
                dataset / "videos" / name,
                kept,
                Path(encoder),
                16,  # a random one of these, evenly spread, is a random frame
                Path(scratch) / f"{name}.safetensors",
                workers=workers,
            )
            wanted = set(kept)
            questions = [question for question in questions if question.video in wanted]
            splits.append(prepare(questions, features, eyes, ANSWERS, CHOICES))
    torch.manual_seed(0)
    model = VideoDistill.for_encoder(
        eyes,
        answers=list(ANSWERS),
        width=128,
        heads=4,
        frames=16,
        pick=1,
        frame_choice="random",
    )
    recipe = HeadRecipe(steps=1200, videos_per_batch=12, evidence_weight=0.0)
    train_head(model, splits[:1], recipe, choice_embed, log=lambda line: None)
    report = evaluate(model, splits[1], choice_embed)
    return {family: values["accuracy"] for family, values in report.items()}
