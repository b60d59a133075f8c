"""A head learns from what it is given, and what is measured of it is what happened."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vd_kernels import TopKSample
from videodistill.data.record import Question
from videodistill.model import VideoDistill, VideoDistillConfig, VideoDistillOutput
from videodistill.training.features import Features
from videodistill.training.head import (
    HeadRecipe,
    Split,
    _evidence_loss,
    evaluate,
    shuffled,
    train_head,
)

N, S, C = 16, 4, 16
ANSWERS = ["red", "green", "blue", "white"]


def needle(videos: int, seed: int) -> Split:
    """One frame of each video shows the question's object, with the answer in one of its patches.

    Two questions a video, each about its own object and its own frame, one second a frame.
    """
    g = torch.Generator().manual_seed(seed)
    world = torch.Generator().manual_seed(0)
    objects = torch.randn(6, C, generator=world)
    colours = torch.randn(len(ANSWERS), C, generator=world)
    frame_embed = 0.3 * torch.randn(videos, N, C, generator=g)
    patches = 0.3 * torch.randn(videos, N, S, C, generator=g)
    questions, tokens, answers = [], [], []
    for video in range(videos):
        frames = torch.randperm(N, generator=g)[:2].tolist()
        named = torch.randperm(len(objects), generator=g)[:2].tolist()
        for frame, name in zip(frames, named, strict=True):
            answer = int(torch.randint(len(ANSWERS), (), generator=g))
            frame_embed[video, frame] += objects[name]
            patches[video, frame, int(torch.randint(S, (), generator=g))] += (
                objects[name] + 2 * colours[answer]
            )
            evidence = ((float(frame), float(frame + 1)),)
            questions.append(
                Question(
                    str(len(questions)),
                    str(video),
                    f"colour of {name}?",
                    ANSWERS[answer],
                    tuple(ANSWERS),
                    family="needle",
                    reference="direct",
                    evidence=evidence,
                )
            )
            tokens.append(objects[name])
            answers.append(answer)
    embed = torch.stack(tokens)
    return Split(
        features=Features(
            tuple(str(video) for video in range(videos)),
            frame_embed.half(),
            patches.half(),
            torch.arange(N).float().expand(videos, N),
            torch.full((videos,), float(N)),
        ),
        questions=questions,
        text_embed=embed,
        tokens=embed[:, None],
        token_mask=torch.ones(len(questions), 1, dtype=torch.bool),
        video=torch.arange(videos).repeat_interleave(2),
        answer=torch.tensor(answers),
        choices=torch.arange(len(ANSWERS)).expand(len(questions), -1),
        right_choice=torch.tensor(answers),
    )


def config(**settings) -> VideoDistillConfig:
    sizes = {
        "embed_dim": C,
        "patch_dim": C,
        "token_dim": C,
        "patch_grid": (2, 2),
        "width": 32,
        "heads": 4,
        "refiner_blocks": 1,
        "sampler_blocks": 1,
        "frames": N,
        "pick": 2,
        "num_samples": 16,
        "logit_scale": 10.0,
        "answers": ANSWERS,
    }
    return VideoDistillConfig(**(sizes | settings))


def train(**settings) -> tuple[VideoDistill, torch.Tensor]:
    torch.manual_seed(0)
    model = VideoDistill(config(**settings))
    choice_embed = torch.randn(len(ANSWERS), C)
    recipe = HeadRecipe(
        thinking_steps=100,
        observing=((60, 1),),
        steps=100,
        videos_per_batch=16,
        learning_rate=3e-3,
        bf16=False,
    )
    train_head(model, [needle(400, 1)], recipe, choice_embed, log=lambda line: None)
    return model, choice_embed


@pytest.fixture(scope="module")
def trained():
    return train()


def test_finds_the_frame_and_the_answer(trained):
    """Fresh videos: chance is 25% and 2 of 16 frames are evidence 12.5% of the time."""
    report = evaluate(*trained[:1], needle(100, 2), trained[1])["all"]
    assert report["questions"] == 200
    assert report["evidence"] > 85
    assert report["accuracy"] > 70
    assert report["choice"] > 60


def test_sees_nothing_in_another_video(trained):
    report = evaluate(trained[0], shuffled(needle(100, 2)), trained[1])["all"]
    assert report["accuracy"] < 45


def test_uniform_frames_miss_the_needle():
    model, choice_embed = train(frame_choice="uniform")
    report = evaluate(model, needle(100, 2), choice_embed)["all"]
    assert report["evidence"] < 30
    assert report["accuracy"] < 50


def test_same_seed_same_weights():
    def weights():
        torch.manual_seed(0)
        model = VideoDistill(config())
        recipe = HeadRecipe(thinking_steps=5, observing=((5, 1),), steps=5, videos_per_batch=4)
        train_head(model, [needle(20, 1)], recipe, torch.ones(4, C), log=lambda line: None)
        return model.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_stops():
    torch.manual_seed(0)
    model = VideoDistill(config())
    with torch.no_grad():
        model.answering.classifier.weight.fill_(torch.inf)
    recipe = HeadRecipe(thinking_steps=0, observing=(), steps=2, videos_per_batch=4)
    with pytest.raises(FloatingPointError, match="at step 0 of phase 'answering'"):
        train_head(model, [needle(20, 1)], recipe, torch.ones(4, C), log=lambda line: None)


def test_needed_frames():
    """Frame n is shown from second n on: evidence [3, 5) is frames 3 and 4."""
    split = needle(1, 0)
    asked = Question("0", "0", "?", evidence=((3.0, 5.0),), context=((7.0, 8.0),))
    split.questions[0] = asked
    expected = torch.zeros(N, dtype=torch.uint8)
    expected[3:5], expected[7] = 4, 1
    assert torch.equal(split.needed[0], expected)


def test_evidence_loss_by_hand():
    """Frames with the answer count four times; the mean is over questions that need any frame."""
    split = needle(1, 0)
    split.questions[0] = Question("0", "0", "?", evidence=((3.0, 5.0),), context=((7.0, 8.0),))
    split.questions[1] = Question("1", "0", "?")
    rows, scale = torch.tensor([0, 1]), torch.tensor(0.5)
    scores = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
    log_p = (math.exp(0.5) * scores[0]).log_softmax(-1)
    expected = -(4 * log_p[3] + 4 * log_p[4] + log_p[7]) / 9
    torch.testing.assert_close(_evidence_loss(scores, split, rows, None, scale), expected)
    odd = torch.arange(1, N, 2)
    log_p = (math.exp(0.5) * scores[0, odd]).log_softmax(-1)
    expected = -(4 * log_p[1] + log_p[3]) / 5
    torch.testing.assert_close(_evidence_loss(scores[:, odd], split, rows, odd, scale), expected)
    assert _evidence_loss(scores[1:], split, rows[1:], None, scale) == 0


class Scripted:
    """Stands in for a model: what it says and looks at is written down for each question.

    The number of a question is in its text embedding.
    """

    def __init__(self, answers: list[int], choices: list[int], chosen: list[list[int]]):
        self.answers, self.choices = torch.tensor(answers), torch.tensor(choices)
        self.chosen = torch.tensor(chosen)

    def eval(self) -> Scripted:
        return self

    def __call__(self, frame_embed, patches, text_embed, tokens, token_mask, *, times, pick):
        number = text_embed[:, 0].long()
        indices = self.chosen[number]
        sample = TopKSample(torch.zeros(*indices.shape, times.shape[1]), indices, indices >= 0)
        return VideoDistillOutput(text_embed, torch.zeros(len(number), 1), sample, patches)

    def vocabulary_logits(self, answer_embed):
        return torch.eye(3)[self.answers[answer_embed[:, 0].long()]]

    def choice_logits(self, answer_embed, choice_embed):
        return torch.eye(choice_embed.shape[1])[self.choices[answer_embed[:, 0].long()]]


def asked(family: str, reference: str, *evidence: tuple[float, float]) -> Question:
    return Question("0", "v", "?", family=family, reference=reference, evidence=evidence)


SCRIPT = Split(
    features=Features(
        ("a", "b", "c"),
        torch.zeros(3, 8, 1).half(),
        torch.zeros(3, 8, 1, 1).half(),
        torch.arange(8.0).expand(3, 8),  # a frame a second
        torch.full((3,), 8.0),
    ),
    questions=[
        asked("a", "direct", (2, 4), (6, 7)),
        asked("a", "indirect", (2, 4), (6, 7)),
        asked("b", "direct"),
        asked("b", "direct", (4, 5)),
        asked("b", "indirect", (7, 8)),
    ],
    text_embed=torch.arange(5.0)[:, None],
    tokens=torch.zeros(5, 1, 1),
    token_mask=torch.ones(5, 1, dtype=torch.bool),
    video=torch.tensor([0, 0, 1, 1, 2]),
    answer=torch.tensor([0, 1, 2, -1, 1]),  # the fourth is not in the vocabulary
    choices=torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2], [1, 2]]),
    right_choice=torch.tensor([0, 1, 0, 0, 1]),
)


def test_evaluation_by_hand():
    """Answers right: first and third; choices: all but the third; -1 is a slot without a frame."""
    model = Scripted([0, 0, 2, 2, 0], [0, 1, 1, 0, 1], [[3, 5], [2, 6], [0, 1], [5, -1], [0, -1]])

    def row(questions, accuracy, choice, evidence, covered):
        return {
            "questions": questions,
            "accuracy": accuracy,
            "choice": choice,
            "evidence": evidence,
            "covered": covered,
        }

    expected = {
        "a": row(2, 50.0, 100.0, 100.0, 50.0),
        "b": row(3, 33.33, 66.67, 0.0, 0.0),
        "direct": row(3, 66.67, 66.67, 50.0, 0.0),
        "indirect": row(2, 0.0, 100.0, 50.0, 50.0),
        "all": row(5, 40.0, 80.0, 50.0, 25.0),
    }
    for together in (1, 8):
        report = evaluate(model, SCRIPT, torch.zeros(3, 1), videos_per_batch=together)
        assert report == expected


def test_evidence_of_a_part_of_the_frames():
    """Of seconds 1, 3, 5 and 7 the second frame is second 3; of all seconds it is second 1."""
    model = Scripted([0] * 5, [0] * 5, [[1, 1]] * 5)
    every = evaluate(model, SCRIPT, torch.zeros(3, 1))["all"]
    odd = evaluate(model, SCRIPT, torch.zeros(3, 1), frames=torch.arange(1, 8, 2))["all"]
    assert (every["evidence"], odd["evidence"], odd["covered"]) == (0.0, 50.0, 0.0)


def test_questions_without_evidence_train_too():
    """Nothing to compare the scores with is no reason for a loss of NaN."""
    split = needle(8, 1)
    split.questions = [replace(question, evidence=()) for question in split.questions]
    torch.manual_seed(0)
    model = VideoDistill(config())
    recipe = HeadRecipe(thinking_steps=2, observing=((2, 1),), steps=2, videos_per_batch=4)
    train_head(model, [split], recipe, torch.ones(4, C), log=lambda line: None)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
