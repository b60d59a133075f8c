"""Answer questions about a video: decode once, encode once, then all questions in one batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from videodistill.encoders import FrameFeatures
from videodistill.engine import checks
from videodistill.engine.graphs import GraphRunner
from videodistill.errors import UserError
from videodistill.precision import keep_for_products, product_autocast
from videodistill.video import FrameReader, VideoWarning

if TYPE_CHECKING:
    from videodistill.encoders import ImageTextEncoder
    from videodistill.model import VideoDistill, VideoDistillOutput

# Questions that go through the head together: its memory grows with them, not its results.
_QUESTIONS_AT_ONCE = 32
# Bytes of decoded frames that are held at once.
_DECODED_BYTES = 256 << 20
_TOP = 5


@dataclass(frozen=True)
class ChosenFrame:
    """A frame that an answer rests on: seconds from the first frame, number in the file, score."""

    time: float
    index: int
    score: float


@dataclass(frozen=True)
class Answer:
    """One question's answer.

    confidence: softmax probability of `answer` among all answers there were to choose from.
    top: the five most probable answers with their probabilities, best first.
    frames: the chosen frames in time order.
    scores: float32 [N], the sampler's score of every frame looked at (`Answered.video.times`).
    gates: float32 [len(frames),h,w] in [0,1]: how far the question opened the gate of each patch.
    """

    question: str
    answer: str
    confidence: float
    top: tuple[tuple[str, float], ...]
    frames: tuple[ChosenFrame, ...]
    scores: np.ndarray
    gates: np.ndarray


@dataclass(frozen=True)
class EncodedVideo:
    """A video as the model sees it: its features serve any number of questions.

    times float64 [N] seconds from the first frame and indices int64 [N] of the frames looked at;
    interval: the seconds that they were spread over; duration in seconds; decode and encode: the
    seconds that took; notices: what was wrong with the file, one line each.
    """

    path: str
    width: int
    height: int
    duration: float
    fps: float
    frame_count: int
    backend: str
    times: np.ndarray
    indices: np.ndarray
    interval: tuple[float, float]
    features: FrameFeatures
    fingerprint: str
    decode: float
    encode: float
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Timings:
    """Seconds spent: reading frames, encoding frames and texts, and in the head."""

    decode: float
    encode: float
    head: float


@dataclass(frozen=True)
class Answered(Sequence[Answer]):
    """The answers, in the order of the questions, and what they share."""

    answers: tuple[Answer, ...]
    video: EncodedVideo
    timings: Timings
    notices: tuple[str, ...]
    trained: bool
    """False for zero-shot, where the gates are still random and mean nothing."""
    seen: tuple[float, float, float, float]
    """Left, top, width, height of what the encoder sees of a frame, in the frame's pixels."""

    def __getitem__(self, position: Any) -> Any:
        return self.answers[position]

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.answers)

    def figure(self, path: str | Path) -> Path:
        """Draw frame scores, chosen frames and gates into a picture; see engine/figure.py."""
        from videodistill.engine.figure import draw

        return draw(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as what JSON can hold."""
        video = self.video
        return {
            "video": {
                "path": video.path,
                "width": video.width,
                "height": video.height,
                "duration": video.duration,
                "fps": video.fps,
                "frame_count": video.frame_count,
                "frames_looked_at": len(video.times),
                "backend": video.backend,
            },
            "answers": [
                {
                    "question": answer.question,
                    "answer": answer.answer,
                    "confidence": answer.confidence,
                    "top": [{"answer": text, "confidence": p} for text, p in answer.top],
                    "frames": [vars(frame) for frame in answer.frames],
                }
                for answer in self.answers
            ],
            "seconds": vars(self.timings),
            "notices": list(self.notices),
        }


class Answerer:
    """A model and its encoder, ready for questions. Made by `videodistill.load`.

    With precision "bf16" the model keeps the weights of its linear layers so from now on.
    """

    def __init__(
        self,
        model: VideoDistill,
        encoder: ImageTextEncoder,
        *,
        trained: bool = True,
        precision: str = "fp32",
    ) -> None:
        self.model = model.eval()
        self.precision = precision
        keep_for_products(model, precision)
        self.encoder = encoder
        # On a GPU its small operators would wait for the host.
        self._head = GraphRunner(model) if encoder.device.type == "cuda" else model
        self.trained = trained
        self._embedded: dict[tuple[str, ...], tuple[torch.Tensor, list[bool]]] = {}

    def watch(
        self,
        video: str | Path,
        *,
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> EncodedVideo:
        """Read and encode a video once, for as many calls of `answer` as you like.

        frames: how many to look at, spread evenly over the seconds from start to end.
        """
        checks.check_count("frames", frames)
        checks.check_interval(start, end)
        return watch(self.encoder, video, frames or self.model.config.frames, start, end)

    @torch.inference_mode()
    def answer(
        self,
        video: str | Path | EncodedVideo,
        questions: str | Sequence[str],
        *,
        choices: Sequence[str] | None = None,
        answers: str | Path | Sequence[str] | None = None,
        frames: int | None = None,
        pick: int | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> Answered:
        """Answer one question or several about a video.

        video: a file, or what `watch` returned. choices: the answers to choose from, for every
        question. answers: a longer list of them, or a text file with one per line. With neither,
        a trained head answers from its own vocabulary, and one without vocabulary (zero-shot)
        from a bundled list of everyday words. frames, start, end: see `watch`. pick: how many
        frames an answer may rest on; the model's own number by default.

        Raises UserError for bad input. A question that is too long for the encoder is cut, and
        `Answered.notices` says so.
        """
        asked = checks.check_questions(questions)
        options = _options(choices, answers)
        checks.check_count("pick", pick)
        if isinstance(video, EncodedVideo):
            if (frames, start, end) != (None, None, None):
                raise TypeError("frames, start and end belong to watch(), which read this video")
            if video.fingerprint != self.encoder.fingerprint:
                raise ValueError("video was encoded by another encoder: watch() it with this one")
        else:
            video = self.watch(video, frames=frames, start=start, end=end)
        available = len(video.times)
        if pick is not None and pick > available:
            raise UserError(
                f"--pick {pick} is more than the {available} frame(s) of {video.path} that are "
                f"looked at: give --pick {available} or less, or a larger --frames"
            )

        clock = _Clock(self.encoder.device)
        vocabulary, notices = options, list(video.notices)
        choice_embed = None
        if vocabulary is None and not self.model.config.answers:
            vocabulary = checks.read_answers(checks.GENERAL_ANSWERS)
        if vocabulary is not None:
            choice_embed, cut = self.embed_answers(vocabulary)
            notices += [
                self._too_long("the answer", t) for t, c in zip(vocabulary, cut, strict=True) if c
            ]
        else:
            vocabulary = self.model.config.answers
        texts = self.encoder.encode_texts(asked)
        notices += [
            self._too_long("the question", q)
            for q, c in zip(asked, texts.truncated, strict=True)
            if c
        ]
        encode = video.encode + clock.lap()

        results: list[Answer] = []
        for first in range(0, len(asked), _QUESTIONS_AT_ONCE):
            rows = slice(first, first + _QUESTIONS_AT_ONCE)
            output = self._run_head(video, texts, rows, pick)
            logits = self.open_logits(output.answer_embed, choice_embed)
            results += self._collect(video, asked[rows], vocabulary, output, logits)
        head = clock.lap()
        return Answered(
            answers=tuple(results),
            video=video,
            timings=Timings(decode=video.decode, encode=encode, head=head),
            notices=tuple(notices),
            trained=self.trained,
            seen=seen_region(self.encoder, video.width, video.height),
        )

    def _run_head(self, video: EncodedVideo, texts: Any, rows: slice, pick: int | None) -> Any:
        """The model's output for some questions, which share the one video's features."""
        frame_embed, patches = video.features
        start, end = video.interval
        times = torch.as_tensor((video.times - start) / (end - start)).clamp(0, 1)
        return self.head(
            frame_embed[None],
            patches[None],
            texts.text_embed[rows],
            texts.tokens[rows],
            texts.mask[rows],
            times=times[None].to(frame_embed),
            pick=pick or min(self.model.config.pick, len(video.times)),
        )

    def head(self, *features: torch.Tensor, **settings: Any) -> VideoDistillOutput:
        """What the model makes of features, as its forward; in our precision, and on a GPU from
        captured graphs."""
        with product_autocast(self.encoder.device, self.precision):
            return self._head(*features, **settings)

    def open_logits(
        self, answer_embed: torch.Tensor, choice_embed: torch.Tensor | None
    ) -> torch.Tensor:
        """[B,A] of answers [B,C_a]: by cosine with A texts [A,C_a], or of the own vocabulary."""
        if choice_embed is not None:
            return self.model.choice_logits(answer_embed, choice_embed[None])
        return self.model.vocabulary_logits(answer_embed)

    def _collect(
        self,
        video: EncodedVideo,
        questions: list[str],
        vocabulary: Sequence[str],
        output: Any,
        logits: torch.Tensor,
    ) -> list[Answer]:
        probabilities = logits.float().softmax(-1)
        best, order = probabilities.topk(min(_TOP, len(vocabulary)), dim=-1)
        best, order = best.tolist(), order.tolist()
        scores = output.scores.float().cpu().numpy()
        chosen = output.sample.indices.tolist()
        gates = output.patch_gates.float().unflatten(-1, self.encoder.grid).cpu().numpy()
        results = []
        for row, question in enumerate(questions):
            top = tuple((vocabulary[i], p) for i, p in zip(order[row], best[row], strict=True))
            results.append(
                Answer(
                    question=question,
                    answer=top[0][0],
                    confidence=top[0][1],
                    top=top,
                    frames=tuple(
                        ChosenFrame(
                            float(video.times[n]), int(video.indices[n]), float(scores[row, n])
                        )
                        for n in chosen[row]
                    ),
                    scores=scores[row],
                    gates=gates[row],
                )
            )
        return results

    def embed_answers(self, answers: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
        """[A,C_a] of the answers in the model's template, and which of them were cut."""
        key = tuple(answers)
        if key not in self._embedded:
            template = self.model.config.choice_template
            texts = self.encoder.encode_texts(
                [template.replace("{}", answer) for answer in answers]
            )
            self._embedded[key] = texts.text_embed, texts.truncated
        return self._embedded[key]

    def _too_long(self, what: str, text: str) -> str:
        start = text if len(text) <= 40 else text[:39] + "…"
        return (
            f'{what} "{start}" ({len(text.split()):,} words) is longer than the '
            f"{self.encoder.max_tokens} tokens that the encoder reads: its end was ignored"
        )


def watch(
    encoder: ImageTextEncoder,
    path: str | Path,
    frames: int,
    start: float | None = None,
    end: float | None = None,
) -> EncodedVideo:
    """Read up to `frames` frames of [start, end) seconds and encode them, part by part.

    Where a video holds fewer frames, or shows one for long, each is taken once.
    """
    clock, decode, encode = _Clock(encoder.device), 0.0, 0.0
    with warnings.catch_warnings():
        # What the reader warns of is among its notices, and these reach the user.
        warnings.simplefilter("ignore", VideoWarning)
        reader = FrameReader(path)
    with reader:
        indices = np.unique(reader.sample_indices(frames, start, end))
        at_once = max(1, min(64, _DECODED_BYTES // (3 * reader.width * reader.height)))
        parts = []
        for first in range(0, len(indices), at_once):
            images = reader.read(indices[first : first + at_once])
            decode += clock.lap()
            parts.append(encoder.encode_frames(images))
            encode += clock.lap()
    return EncodedVideo(
        path=str(path),
        width=reader.width,
        height=reader.height,
        duration=reader.duration,
        fps=reader.fps,
        frame_count=reader.frame_count,
        backend=reader.backend,
        times=reader.times[indices],
        indices=indices,
        interval=(start or 0.0, reader.duration if end is None else min(end, reader.duration)),
        features=FrameFeatures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))),
        fingerprint=encoder.fingerprint,
        decode=decode,
        encode=encode,
        notices=tuple(f"{path}: {notice}" for notice in reader.notices),
    )


def seen_region(
    encoder: ImageTextEncoder, width: int, height: int
) -> tuple[float, float, float, float]:
    """Left, top, width, height in pixels of what the encoder sees of a frame of that size.

    CLIP crops a square from the centre, SigLIP squeezes the whole frame into one.
    """
    transform = encoder.transform
    if not transform.keep_aspect:
        return 0.0, 0.0, float(width), float(height)
    side = min(width, height) * transform.image_size / transform.resize_to
    return (width - side) / 2, (height - side) / 2, side, side


def _options(
    choices: Sequence[str] | None, answers: str | Path | Sequence[str] | None
) -> list[str] | None:
    """What there is to choose from; None when neither list was given."""
    if choices is not None and answers is not None:
        raise UserError("choices and answers were both given: drop one of --choices, --answers")
    if choices is not None:
        return checks.check_choices(choices)
    if isinstance(answers, (str, Path)):
        return checks.read_answers(answers)
    return None if answers is None else checks.check_choices(answers, source="answers")


class _Clock:
    """Seconds since the last lap, with a GPU's queue emptied first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.lap()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        passed = now - getattr(self, "_last", now)
        self._last = now
        return passed
