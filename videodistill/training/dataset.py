"""From questions and cached features to batches, in an order that a seed decides.

A step's batch follows from the seed and the number of the step alone. So a run that goes on after
an interruption, with any number of processes and of workers, sees what it would have seen.
"""

from __future__ import annotations

import math
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from videodistill.data.record import Question, Stretch
from videodistill.errors import UserError
from videodistill.training.config import BatchConfig
from videodistill.training.losses import needed_frames
from videodistill.training.texts import TextStore

Chunk = tuple[int, np.ndarray]
"""A group of questions by its number, and rows of some of them."""


class PairBatch(NamedTuple):
    """What the losses of pretraining need beyond a :class:`Batch`, of whose B rows each is a pair
    of a video and a text."""

    other_embed: Tensor
    """[B,C_a]: the text of another pair, which should not match."""
    other_tokens: Tensor
    """[B,M,C_t]."""
    other_mask: Tensor
    """bool [B,M]."""
    other_real: Tensor
    """bool [B]: False where that is a text of the same video, or the same text."""
    masked_ids: Tensor
    """int64 [B,M]: the text with some of its tokens blanked out."""
    masked_target: Tensor
    """int64 [B,M]: the ids that were, -1 at all others."""
    all_embed: Tensor
    """[G,C_a]: the texts of the whole batch, over all processes."""
    candidates: Tensor
    """bool [B,G]: its own text, and those of other videos."""
    own: Tensor
    """int64 [B]: which of G is its own."""


class PairSettings(NamedTuple):
    """How texts are masked in pretraining."""

    masked_share: float
    max_tokens: int
    """Of any text."""
    special_ids: tuple[int, ...]
    """Tokens that are never masked."""
    blank_id: int
    """What stands in place of a masked token."""


class Batch(NamedTuple):
    """A part of a step's batch: V videos, B/V consecutive questions about each."""

    frame_embed: Tensor
    """float16 [V,N,C_a]."""
    patches: Tensor
    """float16 [V,N,S,C_v]."""
    frame_mask: Tensor | None
    """bool [V,N], real frames first; None when all are."""
    times: Tensor
    """float32 [V,N], fractions of what the question is about."""
    text_embed: Tensor
    """[B,C_a]."""
    tokens: Tensor
    """[B,M,C_t]."""
    token_mask: Tensor
    """bool [B,M]."""
    rows: Tensor
    """int64 [B]: number of the question; -1 in rows that only fill up."""
    answer: Tensor
    """int64 [B]: number in the vocabulary, -1 when it is in none."""
    choice_embed: Tensor
    """[B,A,C_a]; A may be 0."""
    choice_mask: Tensor
    """bool [B,A]."""
    right_choice: Tensor
    """int64 [B]; -1 where there are no choices, or the right one is not known."""
    needed: Tensor
    """float32 [B,N]: how much each frame is evidence; 0 where none is annotated."""
    pairs: PairBatch | None
    totals: dict[str, int]
    """How many rows of the whole batch each loss is about."""
    seed: int
    """Of all draws of this step."""
    row_offset: int
    """Rows of the whole batch before these."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return _to(self, device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return type(value)(*(_to(part, device) for part in value))
    return value


class Examples:
    """Questions about videos whose features are at hand, and how a batch is made of some."""

    def __init__(
        self,
        questions: Sequence[Question],
        features: Mapping[str, Any],
        texts: TextStore,
        vocabulary: Sequence[str],
        *,
        frames: int,
        template: str = "{}",
        pairs: PairSettings | None = None,
    ):
        """Args:
        questions: Each about a video in ``features``, at least one.
        features: By video: ``frame_embed`` [N,C_a], ``patches`` [N,S,C_v], ``seconds`` [N] and
            ``duration``, as arrays or tensors. Looked up when a batch is made.
        texts: With all that :func:`text_of` and ``template`` make of the questions.
        vocabulary: The classifier's answers.
        frames: Candidates at most; of more, evenly spaced ones are taken.
        template: What a choice is put into.
        pairs: Given for pretraining.
        """
        self.features, self.texts, self.frames, self.pairs = features, texts, frames, pairs
        number, answers = texts.numbers, {text: i for i, text in enumerate(vocabulary)}
        # Arrays, not objects: a process that loads copies memory of objects just by looking.
        self._text = np.array([number[text_of(q, pairs is not None)] for q in questions])
        self._answer = np.array(
            [-1 if q.choices is not None else answers.get(q.answer, -1) for q in questions]
        )
        counts = [len(q.choices or ()) for q in questions]
        self._choice_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._choices = np.array(
            [number[template.replace("{}", c)] for q in questions for c in q.choices or ()],
            np.int64,
        )
        self._right = np.array(
            [
                -1 if q.choices is None or q.answer is None else q.choices.index(q.answer)
                for q in questions
            ]
        )
        self._evidence = {
            row: (q.context, q.evidence)
            for row, q in enumerate(questions)
            if q.evidence or q.context
        }
        groups: dict[tuple[str, Stretch | None], list[int]] = defaultdict(list)
        for row, question in enumerate(questions):
            groups[question.video, question.interval].append(row)
        self.groups = list(groups)
        videos = {video: i for i, video in enumerate(dict.fromkeys(v for v, _ in groups))}
        self._video_numbers = [videos[video] for video, _ in groups]
        self.rows = [np.array(rows) for rows in groups.values()]

    def batch(
        self, chunks: Sequence[Chunk], mine: slice, seed: int, draws: Sequence[int] = (0,)
    ) -> Batch:
        """A part of the batch that ``chunks`` make.

        Args:
            chunks: Of the whole batch, over all processes.
            mine: Which of them.
            seed: Of the draws in the model.
            draws: What the draws here follow from.
        """
        most = max(len(rows) for _, rows in chunks)
        padded = np.stack([np.pad(rows, (0, most - len(rows)), mode="edge") for _, rows in chunks])
        real = np.stack([np.arange(most) < len(rows) for _, rows in chunks])
        rows, is_real = padded[mine].ravel(), real[mine].ravel()
        looks = [self._look(group) for group, _ in chunks[mine]]
        longest = max(len(seconds) for _, _, seconds, _ in looks)
        frame_mask = np.stack([np.arange(longest) < len(seconds) for _, _, seconds, _ in looks])
        needed = np.zeros((len(rows), longest), np.float32)
        for i, row in enumerate(rows):
            if is_real[i] and row in self._evidence:
                seconds = looks[i // most][2]
                needed[i, : len(seconds)] = needed_frames(seconds, *self._evidence[row])
        tokens, ids, token_mask = self.texts.tokens(self._text[rows])
        choices, choice_mask = self._choices_of(rows)
        everyone = padded[real]
        totals = {
            "answer": int((self._answer[everyone] >= 0).sum()),
            "choice": int((self._right[everyone] >= 0).sum()),
            "evidence": sum(row in self._evidence for row in everyone.tolist()),
        }
        pairs = None
        if self.pairs is not None:
            pairs = self._pair_batch(chunks, padded, real, mine, ids, token_mask, draws, totals)
        start = mine.indices(len(chunks))[0]

        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values))

        def of_frames(name: str) -> Tensor:
            taken = [torch.as_tensor(getattr(found, name))[put(at)] for found, at, *_ in looks]
            return _stack(taken, longest)

        return Batch(
            frame_embed=of_frames("frame_embed"),
            patches=of_frames("patches"),
            frame_mask=None if frame_mask.all() else put(frame_mask),
            times=_stack([put(times) for *_, times in looks], longest),
            text_embed=put(self.texts.embed(self._text[rows])),
            tokens=put(tokens),
            token_mask=put(token_mask),
            rows=put(np.where(is_real, rows, -1)),
            answer=put(np.where(is_real, self._answer[rows], -1)),
            choice_embed=put(self.texts.embed(choices)),
            choice_mask=put(choice_mask),
            right_choice=put(np.where(is_real, self._right[rows], -1)),
            needed=put(needed),
            pairs=pairs,
            totals=totals,
            seed=seed,
            row_offset=start * most,
        )

    def _look(self, group: int) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Features of a group's video, and which of its frames are candidates, with their seconds
        and times."""
        name, interval = self.groups[group]
        found = self.features[name]
        seconds = np.asarray(found.seconds, np.float32)
        start, end = interval or (0.0, float(found.duration))
        inside = np.arange(len(seconds))
        if interval is not None:
            inside = inside[(seconds >= start - 1e-3) & (seconds < end + 1e-3)]
            if not len(inside):  # shorter than the features' spacing
                inside = np.abs(seconds - (start + end) / 2).argmin(keepdims=True)
        if len(inside) > self.frames:
            centres = (np.arange(self.frames) + 0.5) * len(inside) / self.frames
            inside = inside[centres.astype(np.int64)]
        seconds = seconds[inside]
        times = np.clip((seconds - start) / max(end - start, 1e-6), 0, 1).astype(np.float32)
        return found, inside, seconds, times

    def _choices_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the choices' texts [B,A] and which are real; A is the most of any."""
        starts, ends = self._choice_starts[rows], self._choice_starts[rows + 1]
        places = starts[:, None] + np.arange((ends - starts).max())
        mask = places < ends[:, None]
        choices = np.zeros(places.shape, np.int64)
        choices[mask] = self._choices[places[mask]]
        return choices, mask

    def _pair_batch(
        self,
        chunks: Sequence[Chunk],
        padded: np.ndarray,
        real: np.ndarray,
        mine: slice,
        ids: np.ndarray,
        token_mask: np.ndarray,
        draws: Sequence[int],
        totals: dict[str, int],
    ) -> PairBatch:
        """Other texts and masks, drawn for the whole batch so that its split changes nothing."""
        rng = np.random.default_rng(draws)
        texts = self._text[padded]
        videos = np.array([self._video_numbers[group] for group, _ in chunks])
        # The text at the same place of the next chunk, of another video if there is one.
        shift = int(rng.integers(1, max(2, len(chunks))))
        other = np.roll(np.arange(len(chunks)), shift)
        # A text that both have does not tell them apart.
        differs = (videos != videos[other])[:, None] & (texts != texts[other])
        other_tokens, _, other_mask = self.texts.tokens(texts[other[mine]].ravel())
        draw = rng.random((*padded.shape, self.pairs.max_tokens))[mine]
        draw = draw.reshape(len(ids), -1)[:, : ids.shape[1]]
        maskable = token_mask & ~np.isin(ids, self.pairs.special_ids)
        blank = maskable & (draw < self.pairs.masked_share)
        # At least one of each text, where it has any.
        lowest = np.where(maskable, draw, 2.0).argmin(1)
        blank[np.arange(len(ids)), lowest] |= maskable.any(1)
        blank &= real[mine].reshape(-1, 1)
        own = np.arange(real.sum())
        place = np.full(real.shape, 0)
        place[real] = own
        everyone = texts[real]
        video_of = np.broadcast_to(videos[:, None], real.shape)
        same_video = video_of[mine].reshape(-1, 1) == video_of[real]
        same_text = texts[mine].reshape(-1, 1) == everyone
        is_own = place[mine].reshape(-1, 1) == own
        totals |= {
            "matching": int((real * (1 + differs)).sum()),
            "masked_language": int(real.sum()),
            "contrastive": int(real.sum()),
        }
        arrays = (
            self.texts.embed(texts[other[mine]].ravel()),
            other_tokens,
            other_mask,
            (real & differs)[mine].ravel(),
            np.where(blank, self.pairs.blank_id, ids),
            np.where(blank, ids, -1),
            self.texts.embed(everyone),
            is_own | ~(same_video | same_text),
            place[mine].ravel(),
        )
        return PairBatch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def text_of(question: Question, pairs: bool) -> str:
    """What the encoder's text tower sees: the question; in pretraining its answer, too."""
    if pairs and question.answer is not None:
        return f"{question.question} {question.answer}"
    return question.question


def _stack(parts: Sequence[Tensor], length: int) -> Tensor:
    """[V,length,...] of tensors [n,...], with zeros after the end of shorter ones."""
    stacked = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
    for row, part in zip(stacked, parts, strict=True):
        row[: len(part)] = part
    return stacked


class Plan:
    """The order of questions: in chunks of at most ``batch.questions`` about one video.

    Each question comes once in an epoch. A step takes the next ``batch.videos`` chunks, over the
    end of an epoch where need be.
    """

    def __init__(
        self, rows: Sequence[np.ndarray], batch: BatchConfig, seed: int, *, shuffled: bool = True
    ):
        self.rows, self.batch, self.seed, self.shuffled = rows, batch, seed, shuffled
        self.parts = [math.ceil(len(some) / batch.questions) for some in rows]
        self.chunks = sum(self.parts)
        """In an epoch."""
        self._epochs: dict[int, list[Chunk]] = {}

    def of_step(self, step: int) -> list[Chunk]:
        """The chunks of a step's batch; without shuffling the last step's are fewer."""
        first, count = step * self.batch.videos, self.batch.videos
        if not self.shuffled:
            return self._epoch(0)[first : first + count]
        places = (divmod(place, self.chunks) for place in range(first, first + count))
        return [self._epoch(epoch)[place] for epoch, place in places]

    def _epoch(self, epoch: int) -> list[Chunk]:
        if epoch not in self._epochs:
            self._epochs = {e: c for e, c in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._made(epoch)
        return self._epochs[epoch]

    def _made(self, epoch: int) -> list[Chunk]:
        if not self.shuffled:
            return [
                (group, chunk)
                for group, rows in enumerate(self.rows)
                for chunk in np.array_split(rows, self.parts[group])
            ]
        rng = np.random.default_rng((self.seed, epoch))
        chunks = [
            (group, chunk)
            for group, rows in enumerate(self.rows)
            for chunk in np.array_split(rng.permutation(rows), self.parts[group])
        ]
        return [chunks[place] for place in rng.permutation(len(chunks))]


class _Parts(Dataset):
    """Batches by number: ``parts`` for each step."""

    def __init__(self, examples: Examples, plan: Plan, parts: int):
        self.examples, self.plan, self.parts = examples, plan, parts

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self._made(*divmod(number, self.parts))
        except UserError as error:  # raised here, it would come with the process's traceback
            return error

    def _made(self, step: int, part: int) -> Batch:
        chunks = self.plan.of_step(step)
        size = self.plan.batch.videos // self.parts
        seed = int(np.random.SeedSequence((self.plan.seed, step)).generate_state(1, np.uint64)[0])
        return self.examples.batch(
            chunks, slice(part * size, (part + 1) * size), seed >> 2, (self.plan.seed, step)
        )


def load_batches(
    examples: Examples,
    plan: Plan,
    numbers: Sequence[int],
    *,
    parts: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Batches in the order of their numbers, step · parts + part, made ahead by processes.

    Args:
        examples: What they are made of.
        plan: Which of them a step takes.
        numbers: Of the batches that this process wants.
        parts: That a step's batch is cut into; divides ``plan.batch.videos``.
        workers: Processes; 0 makes a batch when it is asked for.
        pin: Keep them where a GPU can copy from without a detour.

    Raises:
        UserError: Features cannot be read.
    """
    loader = DataLoader(
        _Parts(examples, plan, parts),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
        # Maps of features and arrays of questions are inherited, not copied.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _start_worker(number: int) -> None:
    # Ctrl-C reaches the whole group of processes: the one that trains decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
