from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.videodistill.training import small
from videodistill.data.record import Question
from videodistill.encoders import ImageTextEncoder
from videodistill.model import VideoDistill
from videodistill.training.config import BatchConfig, LossConfig, PhaseConfig
from videodistill.training.dataset import (
    Batch,
    Examples,
    PairSettings,
    Plan,
    load_batches,
    text_of,
)
from videodistill.training.losses import Objective
from videodistill.training.texts import TextStore

QUESTIONS = [
    Question("a", "v0", "what colour?", "red", evidence=((2.0, 4.0),), context=((6.0, 8.0),)),
    Question("b", "v0", "which one?", "blue", ("red", "blue", "green")),
    Question("c", "v0", "what colour is it?", "mauve"),
    Question("d", "v1", "which of them?", "red", ("blue", "red")),
    Question("e", "v1", "what now?", "red", interval=(4.0, 8.0)),
    Question("f", "v1", "and now?", "blue", interval=(4.9, 5.1)),
    Question("g", "v2", "what colour?", "blue"),
]


def examples_of(
    encoder: ImageTextEncoder,
    folder: Path,
    *,
    frames: int = 6,
    cached: int = 8,
    pairs: bool = False,
) -> Examples:
    settings = PairSettings(0.3, encoder.max_tokens, (0, 1), 5) if pairs else None
    asked = list(dict.fromkeys(text_of(question, pairs) for question in QUESTIONS))
    choices = dict.fromkeys(f"it is {c}" for q in QUESTIONS for c in q.choices or ())
    return Examples(
        QUESTIONS,
        small.features_of(["v0", "v1", "v2"], cached),
        TextStore.make(folder / "texts", encoder, asked, list(choices)),
        ["red", "blue"],
        frames=frames,
        template="it is {}",
        pairs=settings,
    )


@pytest.fixture
def examples(small_encoder: ImageTextEncoder, tmp_path: Path) -> Examples:
    return examples_of(small_encoder, tmp_path)


def whole(examples: Examples) -> Batch:
    chunks = list(enumerate(examples.rows))
    return examples.batch(chunks, slice(0, len(chunks)), seed=7)


def test_questions_about_the_same_frames_share_them(examples: Examples) -> None:
    assert examples.groups == [
        ("v0", None),
        ("v1", None),
        ("v1", (4, 8)),
        ("v1", (4.9, 5.1)),
        ("v2", None),
    ]
    batch = whole(examples)
    assert batch.frame_embed.shape == (5, 6, small.WIDTH // 2)
    assert batch.frame_embed.dtype == batch.patches.dtype == torch.float16
    assert batch.rows.tolist() == [0, 1, 2, 3, -1, -1, 4, -1, -1, 5, -1, -1, 6, -1, -1]


def test_candidates_are_spread_over_what_is_asked_about(examples: Examples) -> None:
    batch = whole(examples)
    v0, v1 = (examples.features[name] for name in ("v0", "v1"))
    chosen = [0, 2, 3, 4, 6, 7]  # centres of six equal parts of eight frames
    assert torch.equal(batch.patches[0], v0.patches[chosen])
    assert torch.allclose(batch.times[0], v0.seconds[chosen] / 10)
    assert batch.frame_mask.sum(1).tolist() == [6, 5, 2, 1, 6]
    assert torch.equal(batch.frame_embed[2, :2], v1.frame_embed[2:4])  # at 5 and 7 s of 4 to 8
    assert torch.allclose(batch.times[2, :2], torch.tensor([0.25, 0.75]))
    assert torch.equal(batch.frame_embed[3, 0], v1.frame_embed[2]), "the nearest, at 5 s"
    assert not batch.patches[2, 2:].any()


def test_answers_choices_and_evidence_are_numbered(examples: Examples) -> None:
    batch = whole(examples)
    assert batch.answer.tolist() == [0, -1, -1, -1, -1, -1, 0, -1, -1, 1, -1, -1, 1, -1, -1]
    assert batch.right_choice.tolist() == [-1, 1, -1, 1] + [-1] * 11
    assert batch.choice_mask[:4].tolist() == [
        [False] * 3,
        [True] * 3,
        [False] * 3,
        [True, True, False],
    ]
    number = examples.texts.numbers["it is blue"]
    blue = torch.from_numpy(examples.texts.embed(np.array(number)))
    assert torch.equal(batch.choice_embed[1, 1], blue)
    assert torch.equal(batch.choice_embed[3, 0], blue)
    # Frames at 0.625, 3.125, 4.375, 5.625, 8.125 and 9.375 s.
    assert batch.needed[0].tolist() == [0, 4, 0, 0, 0, 0]
    assert batch.totals == {"answer": 4, "choice": 2, "evidence": 1}


@pytest.mark.parametrize("pairs", [False, True])
def test_parts_make_the_whole(pairs: bool, small_encoder: ImageTextEncoder, tmp_path: Path) -> None:
    examples = examples_of(small_encoder, tmp_path, pairs=pairs)
    chunks = [chunk for chunk in enumerate(examples.rows)][:4]
    one = examples.batch(chunks, slice(0, 4), seed=7, draws=(1, 2))
    parts = [examples.batch(chunks, slice(i, i + 2), seed=7, draws=(1, 2)) for i in (0, 2)]
    assert [part.row_offset for part in parts] == [0, 6]
    assert all((part.totals, part.seed) == (one.totals, 7) for part in parts)
    for name in ("rows", "answer", "right_choice", "text_embed"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(one, name)), name
    if pairs:
        for name in ("other_embed", "other_real", "candidates", "own"):
            together = torch.cat([getattr(part.pairs, name) for part in parts])
            assert torch.equal(together, getattr(one.pairs, name)), name
        masked = [(part.pairs.masked_target >= 0).sum(1) for part in parts]
        assert torch.equal(torch.cat(masked), (one.pairs.masked_target >= 0).sum(1))


def test_pairs_are_masked_and_mismatched(small_encoder: ImageTextEncoder, tmp_path: Path) -> None:
    examples = examples_of(small_encoder, tmp_path, pairs=True)
    chunks = list(enumerate(examples.rows))
    batch = examples.batch(chunks, slice(0, 5), seed=7, draws=(1,))
    pairs, real = batch.pairs, batch.rows >= 0
    masked = pairs.masked_target >= 0
    assert (masked.any(1) == real).all(), "each text has a masked token, what fills up has none"
    assert not (masked & ~batch.token_mask).any()
    assert (pairs.masked_ids[masked] == 5).all()
    assert not torch.isin(pairs.masked_target[masked], torch.tensor([0, 1])).any(), "no special one"
    assert pairs.candidates.shape == (15, 7)
    own = pairs.candidates[real].gather(1, pairs.own[real, None])
    assert own.all() and pairs.own[real].tolist() == list(range(7))
    assert pairs.candidates[0].tolist() == [True, False, False, True, True, True, True]
    assert pairs.candidates[3].tolist() == [True, True, True, True, False, False, True]
    different = (pairs.other_embed != batch.text_embed).any(1)
    assert (different | ~pairs.other_real).all()
    assert batch.totals["matching"] == int(real.sum() + pairs.other_real.sum())


def test_an_epoch_has_each_question_once_in_an_order_of_its_own() -> None:
    rows = [np.arange(0, 7), np.arange(7, 9), np.arange(9, 14)]
    plan = Plan(rows, BatchConfig(videos=2, questions=3), seed=4)
    assert plan.chunks == 6

    def epoch(number: int, seed: int = 4) -> list[list[int]]:
        plan = Plan(rows, BatchConfig(videos=2, questions=3), seed)
        steps = range(3 * number, 3 * number + 3)
        return [chunk.tolist() for step in steps for _, chunk in plan.of_step(step)]

    first, second = epoch(0), epoch(1)
    for chunks in (first, second):
        assert sorted(row for chunk in chunks for row in chunk) == list(range(14))
        assert all(len(chunk) <= 3 for chunk in chunks)
    assert first != second and first != epoch(0, seed=5)
    assert second == epoch(1), "whichever step is asked for first"
    for step in (5, 0, 3):
        again = Plan(rows, BatchConfig(videos=2, questions=3), 4).of_step(step)
        pairs = zip(plan.of_step(step), again, strict=True)
        assert all(a[0] == b[0] and (a[1] == b[1]).all() for a, b in pairs)


def test_a_batch_may_span_epochs_and_an_unshuffled_plan_ends() -> None:
    rows = [np.arange(2), np.arange(2, 5), np.arange(5, 6)]
    plan = Plan(rows, BatchConfig(videos=4, questions=5), seed=0)
    assert [len(plan.of_step(step)) for step in range(3)] == [4, 4, 4]
    groups = [group for step in range(3) for group, _ in plan.of_step(step)]
    assert sorted(groups[:3]) == sorted(groups[3:6]) == [0, 1, 2]
    plain = Plan(rows, BatchConfig(videos=2, questions=2), 0, shuffled=False)
    shown = [[chunk.tolist() for _, chunk in plain.of_step(step)] for step in range(3)]
    assert shown == [[[0, 1], [2, 3]], [[4], [5]], []]


def test_processes_that_load_change_nothing(examples: Examples) -> None:
    plan = Plan(examples.rows, BatchConfig(videos=2, questions=2), seed=1)
    numbers = [0, 1, 2, 5]
    plain = list(load_batches(examples, plan, numbers, parts=2))
    for workers in (1, 2):
        loaded = list(load_batches(examples, plan, numbers, parts=2, workers=workers))
        for one, other in zip(plain, loaded, strict=True):
            assert torch.equal(one.rows, other.rows) and torch.equal(one.patches, other.patches)
            assert (one.seed, one.row_offset) == (other.seed, other.row_offset)
    assert plain[0].seed == plain[1].seed != plain[2].seed


def test_the_text_of_a_pair_holds_the_answer() -> None:
    question: Any = QUESTIONS[0]
    assert text_of(question, False) == "what colour?"
    assert text_of(question, True) == "what colour? red"
    assert text_of(Question("x", "v0", "a red ball"), True) == "a red ball"


def test_a_part_without_choices_joins_in_the_loss_of_those_with_some(
    examples: Examples, small_encoder: ImageTextEncoder
) -> None:
    model = VideoDistill.for_encoder(small_encoder, width=16, heads=2, answers=["red", "blue"])
    objective = Objective(model, LossConfig(), words=10)
    chunks = list(enumerate(examples.rows))
    sums, guesses, *_ = objective(examples.batch(chunks, slice(4, 5), seed=7))
    assert sums.keys() == {"answer", "choice"} and sums["choice"] == 0
    assert sums["choice"].requires_grad and guesses.shape == (3,)
    alone, *_ = objective(examples.batch(chunks[4:], slice(0, 1), seed=7))
    assert alone.keys() == {"answer"}


def test_a_phase_decides_which_frames_are_chosen_and_what_is_looked_at(
    examples: Examples, small_encoder: ImageTextEncoder
) -> None:
    settings = {"width": 16, "heads": 2, "pick": 3, "answers": ["red", "blue"]}
    model = VideoDistill.for_encoder(small_encoder, **settings)
    objective = Objective(model, LossConfig(evidence=0.3), words=10)
    batch = whole(examples)
    chosen: list[torch.Tensor] = []
    model.refiner.register_forward_pre_hook(lambda _, given: chosen.append(given[2]))
    rows = batch.needed.any(1)
    at = batch.times.repeat_interleave(len(rows) // len(batch.times), dim=0)
    assert rows.any()

    def losses(phase: PhaseConfig | None) -> dict[str, torch.Tensor]:
        return objective(batch, None, phase)[0]

    usual, told = losses(None), losses(PhaseConfig(pick=1, evidence_first=True))
    assert usual.keys() == told.keys() == {"answer", "choice", "evidence"}
    assert usual["evidence"] == told["evidence"], "scores are what they were"
    assert chosen[0].shape == (len(rows), 3) and chosen[1].shape == (len(rows), 1)
    best = (batch.needed == 4) & (at == chosen[1])
    assert best.any(1)[rows].all(), "evidence goes before context"
    hard = VideoDistill.for_encoder(small_encoder, **settings, sampling="hard")
    hard.load_state_dict(model.state_dict())
    free = Objective(hard, LossConfig(), words=10)
    hard.refiner.register_forward_pre_hook(lambda _, given: chosen.append(given[2]))
    free(batch), free(batch, None, PhaseConfig(evidence_first=True))
    assert torch.equal(chosen[2][~rows], chosen[3][~rows]), "without evidence as ever"

    assert losses(PhaseConfig(sampler=0)).keys() == {"answer", "choice"}
    del chosen[:]
    alone, guesses, *_ = objective(batch, None, PhaseConfig(others=0))
    assert alone.keys() == {"evidence"} and alone["evidence"] == usual["evidence"]
    assert not chosen and (guesses == -1).all()


def test_evidence_is_chosen_whatever_the_scores(
    small_encoder: ImageTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = VideoDistill.for_encoder(small_encoder, width=16, heads=2, answers=["red", "blue"])
    batch = whole(examples_of(small_encoder, tmp_path, frames=2000, cached=2000))
    scores = torch.zeros(len(batch.rows), 2000)
    scores[:, -1] = 2000**0.5  # as far above the others as standardised scores can be
    assert not batch.needed[:, -1].any()
    monkeypatch.setattr(model.sampler, "score_frames", lambda *_: scores)
    phase = PhaseConfig(pick=1, evidence_first=True)
    seen = Objective(model, LossConfig(), words=10)(batch, None, phase).seen
    assert torch.equal(seen, (batch.needed == 4).any(1)) and seen.any()
