"""Train a VideoDistill head on features of a frozen encoder."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodistill.data.record import Question
from videodistill.encoders import ImageTextEncoder
from videodistill.model import VideoDistill, VideoDistillOutput
from videodistill.precision import cpu_autocast
from videodistill.training.features import Features
from videodistill.training.losses import evidence_loss, needed_frames


@dataclass(frozen=True)
class HeadRecipe:
    """Schedule and losses of a head."""

    thinking_steps: int = 1000
    """Steps in which the sampler alone learns from ground-truth frames. None without
    ``evidence_weight``, as none of the phases then knows them."""
    observing: tuple[tuple[int, int], ...] = ((1500, 1), (500, 3))
    """(Steps, frames to choose) of the phases in which refiner and answer head learn, with
    ground-truth frames chosen before all others and the sampler at rest. Few frames hold fewer
    objects that the gates must learn to leave out, and take less time."""
    steps: int = 1500
    """Steps in which all parts learn together on the frames that the sampler draws."""
    videos_per_batch: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    evidence_weight: float = 0.3
    """Of the cross-entropy between frame scores and ground-truth frames; 0 leaves them unused."""
    choice_weight: float = 0.5
    """Of the cross-entropy on cosines with the answers' text embeddings."""
    later_rate: float = 0.5
    """Share of the learning rate in the phases after the first of ``observing``: they begin with
    what has been learnt."""
    sampler_rate: float = 0.1
    """The sampler's learning rate in the last phase, as a share of the others'."""
    bf16: bool | None = None
    """Matrix products in bfloat16; None: where the processor has instructions for them."""
    seed: int = 5

    def schedule(self) -> dict[str, Any]:
        """All but the precision, which the processor may decide."""
        settings = asdict(self)
        del settings["bf16"]
        return settings


@dataclass
class Split:
    """Questions about videos whose features are at hand, as tensors; Q rows."""

    features: Features
    questions: list[Question]
    text_embed: Tensor
    """[Q,C_a]."""
    tokens: Tensor
    """[Q,M,C_t]."""
    token_mask: Tensor
    """bool [Q,M]."""
    video: Tensor
    """int64 [Q]: row of ``features``."""
    answer: Tensor
    """int64 [Q]: number in the vocabulary, -1 when it is not in it."""
    choices: Tensor
    """int64 [Q,A]: numbers in the list of all choices."""
    right_choice: Tensor
    """int64 [Q]."""

    @cached_property
    def needed(self) -> Tensor:
        """uint8 [Q,N]: 4 for frames that show the answer, 1 for those that lead to them, else 0."""
        seconds = self.features.seconds.numpy()
        rows = zip(self.video.tolist(), self.questions, strict=True)
        needed = np.stack([needed_frames(seconds[v], q.context, q.evidence) for v, q in rows])
        return torch.from_numpy(needed)

    def by_video(self) -> list[Tensor]:
        """Rows of the questions of each video."""
        rows = defaultdict(list)
        for row, video in enumerate(self.video.tolist()):
            rows[video].append(row)
        return [torch.tensor(rows[video]) for video in sorted(rows)]

    def in_batches(self, videos: int) -> Iterator[Tensor]:
        """All rows, of ``videos`` videos at a time that have equally many questions each."""
        groups = self.by_video()
        for size in sorted({len(rows) for rows in groups}):
            same = [rows for rows in groups if len(rows) == size]
            for first in range(0, len(same), videos):
                yield torch.cat(same[first : first + videos])


def prepare(
    questions: Sequence[Question],
    features: Features,
    encoder: ImageTextEncoder,
    answers: Sequence[str],
    all_choices: Sequence[str],
) -> Split:
    """Encode the questions' texts and number their videos and answers.

    Args:
        questions: Whose ``video`` is in ``features``.
        features: Of their videos.
        encoder: That made the features.
        answers: The vocabulary.
        all_choices: Every answer that occurs in a question's choices.
    """
    unique = sorted({question.question for question in questions})
    texts = encoder.encode_texts(unique)
    row = {text: number for number, text in enumerate(unique)}
    rows = torch.tensor([row[question.question] for question in questions])
    video = {name: number for number, name in enumerate(features.videos)}
    answer = {name: number for number, name in enumerate(answers)}
    choice = {name: number for number, name in enumerate(all_choices)}
    return Split(
        features=features,
        questions=list(questions),
        text_embed=texts.text_embed[rows],
        tokens=texts.tokens[rows],
        token_mask=texts.mask[rows],
        video=torch.tensor([video[question.video] for question in questions]),
        answer=torch.tensor([answer.get(question.answer, -1) for question in questions]),
        choices=torch.tensor([[choice[c] for c in question.choices] for question in questions]),
        right_choice=torch.tensor([q.choices.index(q.answer) for q in questions]),
    )


def blanked(split: Split, encoder: ImageTextEncoder) -> Split:
    """The same questions about videos of black frames."""
    black = np.zeros((1, encoder.image_size, encoder.image_size, 3), np.uint8)
    seen = encoder.encode_frames(black)
    shape = split.features.seconds.shape
    blank = replace(
        split.features,
        frame_embed=seen.frame_embed[0].half().expand(*shape, -1),
        patches=seen.patches[0].half().expand(*shape, -1, -1),
    )
    return replace(split, features=blank)


def shuffled(split: Split) -> Split:
    """The same questions about other videos: each video's go to the next one."""
    return replace(split, video=(split.video + 1) % len(split.features.videos))


def look(
    model: VideoDistill, split: Split, rows: Tensor, frames: Tensor | None = None, **settings
) -> VideoDistillOutput:
    """Run the model on questions ``rows``, which come in equal numbers for each of their videos.

    Args:
        frames: int64 [n]: the candidates to offer; all of them when None.
        **settings: Passed to the model.
    """
    features = split.features
    return model(
        _of_videos(features.frame_embed, split, rows, frames).float(),
        _of_videos(features.patches, split, rows, frames).float(),
        split.text_embed[rows],
        split.tokens[rows],
        split.token_mask[rows],
        times=_of_videos(features.times, split, rows, frames),
        **settings,
    )


def _of_videos(values: Tensor, split: Split, rows: Tensor, frames: Tensor | None) -> Tensor:
    """Of values [V,N,...] those of the videos that questions ``rows`` are about, in their order."""
    chosen = values[torch.unique_consecutive(split.video[rows])]
    return chosen if frames is None else chosen[:, frames]


def _batches(
    splits: Sequence[Split], recipe: HeadRecipe, rng: np.random.Generator
) -> Iterator[tuple[Split, Tensor]]:
    """Endless batches: a split with probability as its number of videos, then videos in turn."""
    groups = [split.by_video() for split in splits]
    # Equal numbers of questions per video let them share the video's features.
    per_video = min(len(rows) for group in groups for rows in group)
    shares = np.array([len(group) for group in groups]) / sum(len(group) for group in groups)
    queues: list[list[int]] = [[] for _ in splits]
    while True:
        which = int(rng.choice(len(splits), p=shares))
        count = min(recipe.videos_per_batch, len(groups[which]))
        if len(queues[which]) < count:
            queues[which] = rng.permutation(len(groups[which])).tolist()
        chosen, queues[which] = queues[which][:count], queues[which][count:]
        rows = [groups[which][video] for video in sorted(chosen)]
        rows = [group[rng.permutation(len(group))[:per_video]] for group in rows]
        yield splits[which], torch.cat(rows)


Losses = dict[str, Tensor]


@dataclass(frozen=True)
class _Phase:
    """A stretch of training with a learning-rate schedule of its own."""

    name: str
    steps: int
    learning: Sequence[tuple[list[nn.Parameter], float]]
    """(Parameters, share of the learning rate); those named nowhere are at rest."""
    losses: Callable[[Split, Tensor, Tensor | None], tuple[Losses, Tensor | None]]
    """Of (split, questions, candidate frames): losses and, if it answers, which are right."""


def train_head(
    model: VideoDistill,
    splits: Sequence[Split],
    recipe: HeadRecipe,
    choice_embed: Tensor,
    *,
    log: Callable[[str], None] = print,
) -> None:
    """Train in place: the sampler alone, refiner and answer head alone, then all together.

    Args:
        model: Fresh, with a vocabulary.
        splits: Training questions; splits may differ in their number of frames.
        recipe: Schedule and losses.
        choice_embed: [answers, C_a]: text embeddings of all that can be a choice, in the order
            that the splits' ``choices`` count in.
        log: Called with lines of progress.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    supervised = bool(recipe.evidence_weight) and model.config.frame_choice == "learned"
    evidence_scale = nn.Parameter(torch.tensor(0.5))
    sampler = [*model.sampler.parameters(), evidence_scale]
    others = [*model.refiner.parameters(), *model.answering.parameters()]

    def think(split: Split, rows: Tensor, frames: Tensor | None) -> tuple[Losses, None]:
        scores = model.sampler.score_frames(
            _of_videos(split.features.frame_embed, split, rows, frames).float(),
            split.text_embed[rows],
            split.tokens[rows],
            split.token_mask[rows],
            _of_videos(split.features.times, split, rows, frames),
            None,
        )
        return {"evidence": _evidence_loss(scores, split, rows, frames, evidence_scale)}, None

    def answer(
        split: Split, rows: Tensor, frames: Tensor | None, pick: int, told: bool
    ) -> tuple[Losses, Tensor]:
        # Above any score, which has variance 1 over a video's frames.
        bias = 10.0 * _needed(split, rows, frames) if told else None
        output = look(model, split, rows, frames, pick=pick, seed=_seed(rng), score_bias=bias)
        losses = _answer_losses(model, output, split, rows, choice_embed, recipe)
        if supervised and not told:
            losses["evidence"] = recipe.evidence_weight * _evidence_loss(
                output.scores, split, rows, frames, evidence_scale
            )
        guesses = model.vocabulary_logits(output.answer_embed).argmax(-1)
        return losses, guesses == split.answer[rows]

    phases = []
    if supervised:
        phases.append(_Phase("thinking", recipe.thinking_steps, [(sampler, 1.0)], think))
    rate, sampler_rate = 1.0, recipe.sampler_rate if supervised else 1.0
    for steps, pick in recipe.observing:
        pick = min(pick, model.config.pick)
        observe = partial(answer, pick=pick, told=supervised)
        learning = [(others, rate)] if supervised else [(others, rate), (sampler, rate)]
        phases.append(_Phase(f"observing {pick} frames", steps, learning, observe))
        rate = recipe.later_rate
    together = partial(answer, pick=model.config.pick, told=False)
    learning = [(others, rate), (sampler, sampler_rate)]
    phases.append(_Phase("answering", recipe.steps, learning, together))

    model.train()
    batches = _batches(splits, recipe, rng)
    for phase in phases:
        _train_phase(phase, [*sampler, *others], batches, recipe, rng, log)
    model.requires_grad_(True).eval()


def _train_phase(
    phase: _Phase,
    parameters: Sequence[nn.Parameter],
    batches: Iterator[tuple[Split, Tensor]],
    recipe: HeadRecipe,
    rng: np.random.Generator,
    log: Callable[[str], None],
) -> None:
    """Train those of ``parameters`` that learn in this phase."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    for learning, _ in phase.learning:
        for parameter in learning:
            parameter.requires_grad_(True)
    optimiser, schedule = _optimiser(phase.learning, recipe, phase.steps)
    running: dict[str, float] = defaultdict(float)
    began, every = time.perf_counter(), 100
    for step in range(phase.steps):
        split, rows = next(batches)
        frames = _some_frames(split.features.seconds.shape[1], rng)
        with cpu_autocast(recipe.bf16):
            losses, right = phase.losses(split, rows, frames)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step} of phase {phase.name!r}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for learning, _ in phase.learning:
            # Apart: the draw's gradient is noisy, and must not shrink everything else's.
            nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        running["loss"] += loss.item() / every
        if right is not None:
            running["right"] += 100 * right.float().mean().item() / every
        if (step + 1) % every == 0:
            spent = time.perf_counter() - began
            left = spent / (step + 1) * (phase.steps - step - 1)
            means = "  ".join(f"{name} {value:.3g}" for name, value in running.items())
            log(
                f"{phase.name}, step {step + 1}/{phase.steps}  {means}  "
                f"{spent:.0f} s, {left:.0f} s to go at this rate"
            )
            running.clear()


def _optimiser(
    groups: Sequence[tuple[list[nn.Parameter], float]], recipe: HeadRecipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW that decays matrices, over (parameters, share of the learning rate)."""
    settings, rates = [], []
    for parameters, share in groups:
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.ndim >= 2) == decayed]
            decay = recipe.weight_decay if decayed else 0.0
            settings.append({"params": chosen, "weight_decay": decay})
            rates.append(share * recipe.learning_rate)
    # Fused: with small matrices, one call for each operation and parameter takes longer than these.
    optimiser = torch.optim.AdamW(settings, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rates, total_steps=max(1, steps), pct_start=0.06
    )
    return optimiser, schedule


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**62))


def _some_frames(count: int, rng: np.random.Generator) -> Tensor | None:
    """Now and then every second or fourth of many candidates: the model must not count on N."""
    stride = 2 ** int(rng.integers(0, max(1, int(math.log2(count / 64)) + 1)))
    if stride == 1:
        return None
    return torch.arange(int(rng.integers(stride)), count, stride)


def _answer_losses(
    model: VideoDistill,
    output: VideoDistillOutput,
    split: Split,
    rows: Tensor,
    choice_embed: Tensor,
    recipe: HeadRecipe,
) -> Losses:
    losses = {
        "answer": F.cross_entropy(
            model.vocabulary_logits(output.answer_embed), split.answer[rows], ignore_index=-1
        )
    }
    if recipe.choice_weight:
        a = F.normalize(output.answer_embed, dim=-1)
        cosines = a @ F.normalize(choice_embed, dim=-1).T
        truth = split.choices[rows].gather(1, split.right_choice[rows, None]).squeeze(1)
        losses["choice"] = recipe.choice_weight * F.cross_entropy(
            model.config.logit_scale * cosines, truth
        )
    return losses


def _needed(split: Split, rows: Tensor, frames: Tensor | None) -> Tensor:
    """``split.needed`` of some questions and candidates, as floats."""
    needed = split.needed[rows]
    return (needed if frames is None else needed[:, frames]).float()


def _evidence_loss(
    scores: Tensor, split: Split, rows: Tensor, frames: Tensor | None, scale: Tensor
) -> Tensor:
    """Cross-entropy of scores [B,N] with the frames that are needed, as much as they are.

    Zero where no question has any.
    """
    needed = _needed(split, rows, frames)
    return evidence_loss(scores, needed, scale) / needed.any(1).sum().clamp_min(1)


_Result = tuple[bool, bool, list[bool], str | None]
"""Open-ended answer right, choice right, each stretch of evidence seen, reference."""


@torch.no_grad()
def evaluate(
    model: VideoDistill,
    split: Split,
    choice_embed: Tensor,
    *,
    pick: int | None = None,
    frames: Tensor | None = None,
    videos_per_batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Accuracy and evidence recall by family, by reference, and over all questions.

    Args:
        model: Trained; left in evaluation mode.
        split: Questions.
        choice_embed: As in :func:`train_head`.
        pick: K.
        frames: Candidates to offer; all when None.
        videos_per_batch: How many go through the model together.

    Returns:
        For each family, for "direct" and "indirect" questions and for "all": ``questions``, their
        number; ``accuracy``, open-ended, in percent; ``choice``, with choices; ``evidence``,
        percent of the questions with evidence that have a chosen frame in it; ``covered``, percent
        that have one in every stretch of it.
    """
    model.eval()
    kept: dict[str, list[_Result]] = defaultdict(list)
    for rows in split.in_batches(videos_per_batch):
        output = look(model, split, rows, frames, pick=pick)
        guess = model.vocabulary_logits(output.answer_embed).argmax(-1)
        options = choice_embed[split.choices[rows]]
        choice = model.choice_logits(output.answer_embed, options).argmax(-1)
        right, right_choice = guess == split.answer[rows], choice == split.right_choice[rows]
        seconds = split.features.seconds[split.video[rows]]
        if frames is not None:
            seconds = seconds[:, frames]
        for i, row in enumerate(rows.tolist()):
            asked = split.questions[row]
            indices = output.sample.indices[i][output.sample.slot_mask[i]]
            chosen = seconds[i, indices]
            hits = [
                bool(((chosen >= start - 1e-3) & (chosen < end - 1e-3)).any())
                for start, end in asked.evidence
            ]
            result = (bool(right[i]), bool(right_choice[i]), hits, asked.reference)
            kept[asked.family].append(result)
    report = {family: _summary(kept[family]) for family in sorted(kept)}
    everything = [result for results in kept.values() for result in results]
    for reference in ("direct", "indirect"):
        report[reference] = _summary([r for r in everything if r[3] == reference])
    report["all"] = _summary(everything)
    return report


def _summary(results: list[_Result]) -> dict[str, float]:
    with_evidence = [hits for _, _, hits, _ in results if hits]

    def percent(values: list[bool]) -> float:
        return round(100.0 * sum(values) / max(1, len(values)), 2)

    return {
        "questions": len(results),
        "accuracy": percent([right for right, *_ in results]),
        "choice": percent([right for _, right, *_ in results]),
        "evidence": percent([any(hits) for hits in with_evidence]),
        "covered": percent([all(hits) for hits in with_evidence]),
    }
