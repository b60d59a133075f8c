"""Scores on the scale of the draw's noise, and the control that spreads its frames evenly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vd_kernels import TopKSample, topk_gather, topk_sample
from videodistill.model.config import VideoDistillConfig
from videodistill.model.layers import RotaryTime
from videodistill.model.sampler import (
    FrameSampler,
    SamplerBlock,
    _by_slot,
    _frame_states,
    _mean_of_all,
    _soft_draws,
    _standardise,
    _uniform_scores,
)

MASK = torch.arange(9) < torch.tensor([9, 5, 2])[:, None]
"""Three videos of 9, 5 and 2 real frames."""


@pytest.mark.parametrize("mask", [None, MASK])
def test_frame_states_in_loops(mask: torch.Tensor | None) -> None:
    """A frame, its step from the one before, its distance from the mean of the real ones."""
    e = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    states = _frame_states(e, mask)
    for row, count in enumerate([9, 9, 9] if mask is None else [9, 5, 2]):
        for n in range(count):
            before = e[row, n - 1] if n else e[row, n]
            mean = sum(e[row, m] for m in range(count)) / count
            expected = 2 * torch.cat([e[row, n], e[row, n] - before, e[row, n] - mean])
            torch.testing.assert_close(states[row, n], expected)


@pytest.mark.parametrize("mask", [None, MASK])
def test_real_frames_get_mean_0_and_variance_1(mask: torch.Tensor | None) -> None:
    scores = 3 + 20 * torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    padded = scores if mask is None else scores.masked_fill(~mask, 1e4)
    result = _standardise(padded, mask)
    for row, count in enumerate([9, 9, 9] if mask is None else [9, 5, 2]):
        real = result[row, :count]
        assert abs(real.mean().item()) < 1e-5
        assert abs(real.var(correction=0).item() - 1) < 1e-4
        assert torch.equal(real.argsort(), scores[row, :count].argsort())
        assert result[row, count:].eq(0).all()


def test_equal_scores_one_frame_and_no_frame() -> None:
    assert _standardise(torch.full((2, 7), 0.3), None).abs().max() < 1e-3
    assert _standardise(torch.tensor([[5.0], [-2.0]]), None).eq(0).all()
    one_real, none_real = torch.arange(4) < torch.tensor([1, 0])[:, None]
    result = _standardise(torch.randn(2, 4), torch.stack([one_real, none_real]))
    assert result.eq(0).all()


def test_similarities_keep_their_last_digits_under_autocast() -> None:
    """A fresh sampler's scores are similarities alone; of alike frames in bfloat16 they are few."""
    torch.manual_seed(3)
    config = VideoDistillConfig(embed_dim=16, patch_dim=16, token_dim=16, width=16, heads=2)
    sampler = FrameSampler(config).eval()
    frames = torch.randn(1, 1, 16) + 1e-3 * torch.randn(1, 32, 16)
    text, tokens, times = torch.randn(1, 16), torch.randn(1, 3, 16), torch.rand(1, 32)
    given = (frames, text, tokens, torch.ones(1, 3, dtype=torch.bool), times, None)
    expected = sampler.score_frames(*given)
    assert len(expected.unique()) == 32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sampler.score_frames(*given), expected)


@pytest.mark.parametrize(("width", "heads", "frames"), [(128, 8, 80), (768, 12, 80), (16, 2, 80)])
def test_fresh_heads_prefer_a_distance_of_their_own(width: int, heads: int, frames: int) -> None:
    """A fifth of the video before, a fifth after, a tenth before, ...: whatever frames show."""
    config = VideoDistillConfig(width=width, heads=heads, time_prior=3.0)
    block, head_dim = SamplerBlock(config), width // heads
    times = (torch.arange(frames)[None] + 0.5) / frames
    bias = block.qkv.bias.detach().view(3, 1, heads, head_dim).expand(1, frames, 3, 1, heads, -1)
    query, key = (block.rotary(bias[:, :, i], times)[0, :, 0] for i in (0, 1))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * head_dim**-0.5
    middle = frames // 2
    for head, row in enumerate(scores[:, middle]):
        distance = 0.2 / 2 ** (head // 2 % 4) * frames * (1 if head % 2 else -1)
        assert row.argmax().item() - middle == round(distance)
        assert row.max().item() == pytest.approx(3.0, abs=1e-3)
        weights = row.softmax(0)
        before, after = weights[:middle].sum(), weights[middle + 1 :].sum()
        assert after > before if head % 2 else before > after


def test_without_a_prior_biases_are_torchs_own() -> None:
    torch.manual_seed(0)
    usual = nn.Linear(16, 48)
    biases = []
    for prior in (0.0, 3.0):
        torch.manual_seed(0)
        block = SamplerBlock(VideoDistillConfig(width=16, heads=2, time_prior=prior))
        assert torch.equal(block.qkv.weight, usual.weight)
        biases.append(block.qkv.bias)
    assert torch.equal(biases[0], usual.bias)
    # Values have none of it.
    assert torch.equal(biases[1][32:], usual.bias[32:])
    assert not torch.equal(biases[1][:32], usual.bias[:32])


def test_turned_products_depend_on_the_distance_in_time_alone() -> None:
    rotary = RotaryTime(8)
    q, k = torch.randn(2, 1, 1, 1, 1, 8, generator=torch.Generator().manual_seed(2))

    def product(at: float, seen: float) -> float:
        turned = rotary(q, torch.tensor([[at]])) * rotary(k, torch.tensor([[seen]]))
        return turned.sum().item()

    assert product(0.2, 0.2) == pytest.approx((q * k).sum().item(), abs=1e-5)
    assert product(0.1, 0.4) == pytest.approx(product(0.6, 0.9), abs=1e-4)
    assert abs(product(0.1, 0.4) - product(0.4, 0.1)) > 0.1
    half = rotary(q.bfloat16(), torch.tensor([[0.3]]))
    assert half.dtype == torch.bfloat16 and half.shape == q.shape


def test_scores_stay_as_they_are_when_all_grow_alike() -> None:
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_standardise(50 * scores + 7, None), _standardise(scores, None))


@pytest.mark.parametrize(
    ("frames", "pick", "chosen"),
    [(12, 4, [1, 4, 7, 10]), (5, 5, [0, 1, 2, 3, 4]), (9, 1, [4]), (7, 3, [1, 3, 5])],
)
def test_uniform_frames_are_the_centres_of_equal_parts(
    frames: int, pick: int, chosen: list[int]
) -> None:
    scores = _uniform_scores(torch.randn(2, frames), pick, None)
    assert scores.shape == (2, frames)
    assert scores.unique().tolist() in ([0, 1], [1])
    assert [row.nonzero().flatten().tolist() for row in scores] == [chosen, chosen]


def test_uniform_frames_of_videos_with_padding() -> None:
    """Centres of the real frames; where there are fewer than K, all of them and nothing else."""
    scores = _uniform_scores(torch.randn(3, 9), 3, MASK)
    assert [row.nonzero().flatten().tolist() for row in scores] == [[1, 4, 7], [0, 2, 4], [0, 1]]


@pytest.mark.parametrize("mask", [None, MASK])
def test_mean_of_the_real_frames(mask: torch.Tensor | None) -> None:
    values = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(3))
    sample = _mean_of_all(torch.zeros(3, 9), mask)
    counts = [9, 9, 9] if mask is None else [9, 5, 2]
    expected = torch.stack([row[:count].mean(0) for row, count in zip(values, counts, strict=True)])
    torch.testing.assert_close(topk_gather(values, sample).squeeze(1), expected)
    assert sample.indices.tolist() == [[(count - 1) // 2] for count in counts]
    assert sample.slot_mask.all()
    empty = _mean_of_all(torch.zeros(1, 9), torch.zeros(1, 9, dtype=torch.bool))
    assert empty.weights.eq(0).all() and empty.indices.tolist() == [[-1]]
    assert not empty.slot_mask.any()


def test_soft_draws_are_gumbel_softmax_with_replacement() -> None:
    """As often as softmax says a frame is a draw's largest, and often twice in the same choice."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(4000, 4)
    weights, indices, real = _soft_draws(logits, 3, 0.5, None, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4000, 3))
    assert real.all() and torch.equal(weights.argmax(-1), indices)
    assert (indices.diff(dim=-1) >= 0).all() and (indices.diff(dim=-1) == 0).any()
    shares = indices.flatten().bincount(minlength=4) / indices.numel()
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.015, rtol=0)
    sharp = _soft_draws(logits, 3, 0.01, None, 7)
    assert torch.equal(sharp.indices, indices)
    assert sharp.weights.amax(-1).median() > 0.999 > weights.amax(-1).median()
    assert not torch.equal(_soft_draws(logits, 3, 0.5, None, 8).indices, indices)
    part = _soft_draws(logits[1:], 3, 0.5, None, 7, row_offset=1)
    assert torch.equal(part.weights, weights[1:])


def test_soft_draws_send_gradients_and_leave_padding_out() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(4), requires_grad=True)
    mask = torch.arange(9) < torch.tensor([9, 2, 0])[:, None]
    weights, indices, real = _soft_draws(logits, 4, 1.0, mask, 1)
    assert weights.masked_select(~mask[:, None]).eq(0).all()
    assert real.tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert indices[2].tolist() == [-1] * 4 and indices[1].max() < 2
    (gradient,) = torch.autograd.grad((weights * torch.arange(9)).sum(), logits)
    assert gradient[0].abs().min() > 0 and gradient[1, :2].abs().min() > 0
    assert gradient[~mask].eq(0).all()


def test_a_soft_set_by_slots_gathers_the_same() -> None:
    mask = torch.arange(9) < torch.tensor([9, 5, 2])[:, None]
    values = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(5))
    both = []
    for change in (lambda sample: sample, _by_slot):
        scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(6), requires_grad=True)
        sample: TopKSample = change(topk_sample(scores, 3, method="lapsum", mask=mask))
        gathered = topk_gather(values, sample)
        both.append((gathered, *torch.autograd.grad(gathered.square().sum(), scores)))
    assert sample.weights.shape == (3, 3, 9)
    for whole, by_slot in zip(*both, strict=True):
        torch.testing.assert_close(whole, by_slot)
    assert both[0][1].abs().max() > 0
