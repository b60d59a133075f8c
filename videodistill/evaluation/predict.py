"""A model's answers to all questions of a split, from cached features."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videodistill.data.files import clear_errors, write_whole
from videodistill.data.record import Question, Stretch
from videodistill.engine import checks
from videodistill.engine.answerer import Answerer
from videodistill.engine.feature_cache import FeatureCache
from videodistill.errors import UserError
from videodistill.training.config import BatchConfig
from videodistill.training.dataset import Batch, Examples, Plan, load_batches, text_of
from videodistill.training.texts import TextStore

_QUESTIONS = 8
"""Of one video at once; these share its features."""


@dataclass
class Predicted:
    """What a run did with the questions that it was given; each is counted once."""

    answered: int = 0
    reused: int = 0
    """Were answered by an earlier run that was stopped."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Why there is no answer, by question id."""


def predict(
    model: Answerer,
    questions: Sequence[Question],
    features: Mapping[str, Any],
    out: str | Path,
    *,
    answers: Sequence[str] | None = None,
    pick: int | None = None,
    videos: int = 16,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> Predicted:
    """Answer questions and write the answers as ``read_predictions`` understands them.

    A line is ``{"question_id", "prediction", "evidence", "frames"}``: the index of a choice, or a
    text where there are none to choose from; the stretch around the frame with the best score, see
    :func:`stretch_around_best`; the seconds of the chosen frames. For a question about a video
    without features it has ``error`` instead.

    A run that was stopped, in whatever way, goes on where it was, if it is started with the same
    model, questions and features: what it has so far lies in ``<out>.partial``.

    Args:
        model: From ``videodistill.load``.
        questions: Of one split, each with an id of its own.
        features: By video, as a :class:`FeatureCache` has them.
        out: A .jsonl file.
        answers: Of open-ended questions; the model's own vocabulary by default, or everyday words
            where it has none.
        pick: Frames that an answer may rest on; the model's own number by default.
        videos: How many at once.
        workers: Processes that read features ahead.
        progress: Called with the numbers of videos done and to do.
        log: Called with lines of notice.

    Raises:
        UserError: ``out`` has another name or cannot be written, a question chooses between videos,
            features cannot be read, or the GPU has too little memory.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: name it .jsonl; it gets a line for each question")
    checks.check_count("pick", pick)
    if any(question.clips for question in questions):
        raise UserError("questions that choose between videos cannot be answered from features")
    if answers is None and not model.model.config.answers:
        answers = checks.read_answers(checks.GENERAL_ANSWERS)
    if answers is not None:
        answers = checks.check_choices(answers, source="answers")
    done = Predicted()
    for question in questions:
        if question.video not in features:
            done.unseen[question.question_id] = f"no features of {question.video}"
    asked = [question for question in questions if question.question_id not in done.unseen]
    partial = out.with_name(f"{out.name}.partial")
    with clear_errors(out):
        header = json.dumps({"run": _digest(model, asked, features, answers, pick)})
        known = _known(partial, header, log)
        done.reused = len(known)
        left = [question for question in asked if question.question_id not in known]
        write_whole(partial, "".join(f"{line}\n" for line in (header, *known.values())))
        with partial.open("a", encoding="utf-8") as file:
            settings = BatchConfig(videos, _QUESTIONS)
            lines = _answer(model, left, features, answers, pick, settings, workers, progress)
            try:
                for line in lines:
                    print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
                    done.answered += 1
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{out}: the GPU has too little memory; run the same command again with fewer "
                    "--videos, it goes on where it stopped"
                ) from error
        _, *written = _lines_of(partial)
        written += [
            json.dumps({"question_id": name, "error": reason}, ensure_ascii=False)
            for name, reason in done.unseen.items()
        ]
        write_whole(out, "".join(f"{line}\n" for line in written))
        partial.unlink()
    return done


def _digest(
    model: Answerer,
    questions: Sequence[Question],
    features: Mapping[str, Any],
    answers: Sequence[str] | None,
    pick: int | None,
) -> str:
    """Of all that decides the predictions."""
    digest = hashlib.sha256()
    for name, tensor in model.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    config = asdict(model.model.config)
    about: list[Any] = [config, model.encoder.fingerprint, model.precision, answers, pick]
    digest.update(json.dumps(about).encode())
    for q in questions:
        digest.update(
            json.dumps((q.question_id, q.video, q.question, q.choices, q.interval)).encode()
        )
    if isinstance(features, FeatureCache):
        checksums = [
            features.checksum(video) for video in dict.fromkeys(q.video for q in questions)
        ]
        digest.update(json.dumps(checksums).encode())
    return digest.hexdigest()[:16]


def _known(partial: Path, header: str, log: Callable[[str], None]) -> dict[str, str]:
    """Lines of an earlier run by question id; a last one that was cut off is left out."""
    if not partial.exists():
        return {}
    lines = _lines_of(partial)
    if not lines or lines[0] != header:
        log(f"{partial}: is of another model, other questions or features: begun anew")
        return {}
    return {json.loads(line)["question_id"]: line for line in lines[1:]}


def _lines_of(partial: Path) -> list[str]:
    """Whole lines; not by `splitlines`, which takes some characters of texts for ends of lines."""
    return partial.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


@torch.inference_mode()
def _answer(
    model: Answerer,
    questions: Sequence[Question],
    features: Mapping[str, Any],
    answers: Sequence[str] | None,
    pick: int | None,
    settings: BatchConfig,
    workers: int,
    progress: Callable[[int, int], None],
) -> Iterator[dict[str, Any]]:
    """A line for each question."""
    if not questions:
        return
    config, encoder = model.model.config, model.encoder
    asked = list(dict.fromkeys(text_of(question, False) for question in questions))
    options = dict.fromkeys(
        config.choice_template.replace("{}", choice)
        for question in questions
        for choice in question.choices or ()
    )
    known = frozenset(asked)
    others = [text for text in options if text not in known]
    vocabulary = config.answers if answers is None else answers
    with tempfile.TemporaryDirectory() as folder:
        texts = TextStore.make(Path(folder) / "texts", encoder, asked, others)
        examples = Examples(
            questions, features, texts, [], frames=config.frames, template=config.choice_template
        )
        plan = Plan(examples.rows, settings, 0, shuffled=False)
        steps = math.ceil(plan.chunks / settings.videos)
        cuda = encoder.device.type == "cuda"
        batches = load_batches(examples, plan, range(steps), workers=workers, pin=cuda)
        for step, batch in enumerate(batches):
            for row, line in _found(model, batch.to(encoder.device), answers, vocabulary, pick):
                question = questions[row]
                found = features[question.video]
                start, end = question.interval or (0.0, float(found.duration))
                times, scores, frames = (line.pop(name) for name in ("times", "scores", "frames"))
                seconds = start + times * (end - start)
                stretch = stretch_around_best(scores, seconds, end, start)
                yield {
                    "question_id": question.question_id,
                    **line,
                    "evidence": [round(at, 3) for at in stretch],
                    "frames": [round(float(seconds[frame]), 3) for frame in frames],
                }
            progress(min((step + 1) * settings.videos, plan.chunks), plan.chunks)


def _found(
    model: Answerer,
    batch: Batch,
    answers: Sequence[str] | None,
    vocabulary: Sequence[str],
    pick: int | None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of each question its row, prediction, and the scores, times and choice of frames."""
    output = model.head(
        batch.frame_embed.float(),
        batch.patches.float(),
        batch.text_embed,
        batch.tokens,
        batch.token_mask,
        frame_mask=batch.frame_mask,
        times=batch.times,
        pick=min(pick or model.model.config.pick, batch.times.shape[1]),
    )
    own: list[int] = []
    if batch.choice_mask.shape[1]:
        logits = model.model.choice_logits(output.answer_embed, batch.choice_embed)
        logits = logits.masked_fill(~batch.choice_mask, torch.finfo(logits.dtype).min)
        own = logits.argmax(-1).tolist()
    texts = None if answers is None else model.embed_answers(answers)[0]
    open_ended = model.open_logits(output.answer_embed, texts).argmax(-1).tolist()
    chooses = batch.choice_mask.any(1).tolist()
    frames = frames_of(batch, output.scores)
    chosen, real = output.sample.indices.tolist(), output.sample.slot_mask.tolist()
    for place, (row, (scores, times)) in enumerate(zip(batch.rows.tolist(), frames, strict=True)):
        if row < 0:
            continue
        yield (
            row,
            {
                "prediction": own[place] if chooses[place] else vocabulary[open_ended[place]],
                "scores": scores,
                "times": times,
                "frames": [n for n, there in zip(chosen[place], real[place], strict=True) if there],
            },
        )


def frames_of(batch: Batch, scores: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each row's real frames, on the CPU: float32 scores [n], and times [n] from 0 to 1.

    Args:
        batch: With B rows about V videos of up to N frames.
        scores: Floating [B,N].
    """
    scores, times = scores.float().cpu(), batch.times.float().cpu()
    each = len(scores) // len(times)
    counts = [times.shape[1]] * len(times)
    if batch.frame_mask is not None:
        counts = batch.frame_mask.sum(1).tolist()
    return [
        (of_row[: counts[row // each]], times[row // each, : counts[row // each]])
        for row, of_row in enumerate(scores)
    ]


def stretch_around_best(scores: Tensor, seconds: Tensor, end: float, start: float = 0.0) -> Stretch:
    """The frames around the best one that have at least half its score, in seconds.

    Equal scores, those of a model that does not choose, give all from ``start`` to ``end``.

    Args:
        scores: [N], of mean 0.
        seconds: [N], when each frame is.
        end: Seconds, where the last frame ends.
        start: Seconds, where the first one begins.
    """
    best = int(scores.argmax())
    good = (scores >= scores[best] / 2).tolist()
    first = last = best
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(good) and good[last + 1]:
        last += 1
    # A frame lasts until the next one.
    until = float(seconds[last + 1]) if last + 1 < len(good) else end
    return (float(seconds[first]) if first else start, until)
