from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from videodistill.model import VideoDistillConfig
from videodistill.training.losses import (
    MaskedLanguageHead,
    MatchingHead,
    evidence_loss,
    needed_frames,
)

CONFIG = VideoDistillConfig(embed_dim=6, token_dim=5, width=8, heads=2, patch_grid=(1, 1))


def test_evidence_counts_more_than_context() -> None:
    seconds = np.array([0.0, 1.0, 2.0, 3.0, 4.0], np.float32)
    needed = needed_frames(seconds, ((1.0, 4.0),), ((3.0, 4.0),))
    assert needed.tolist() == [0, 1, 1, 4, 0]


def test_the_evidence_loss_is_cross_entropy_over_real_frames() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4, requires_grad=True)
    needed = torch.tensor([[0.0, 4, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    scale = torch.tensor(0.7)
    logits = scale.exp() * scores
    by_hand = F.cross_entropy(logits[0], needed[0] / 5) + F.cross_entropy(logits[2], needed[2])
    assert torch.allclose(evidence_loss(scores, needed, scale), by_hand)

    mask = torch.tensor([[True] * 3 + [False]] * 3)
    masked = evidence_loss(scores, needed, scale, mask)
    short = evidence_loss(scores[:, :3], needed[:, :3], scale)
    assert torch.allclose(masked, short)
    (grad,) = torch.autograd.grad(masked, scores)
    assert grad.isfinite().all() and not grad[:, 3].any() and not grad[1].any()
    assert evidence_loss(scores, torch.zeros(3, 4), scale) == 0


def test_matching_looks_at_directions_alone() -> None:
    torch.manual_seed(0)
    head, a, t = MatchingHead(CONFIG), torch.randn(4, 6), torch.randn(4, 6)
    assert head(a, t).shape == (4,)
    assert torch.allclose(head(3 * a, 0.5 * t), head(a, t), atol=1e-5)
    assert not torch.allclose(head(a, t.roll(1, 0)), head(a, t))


def test_masked_words_are_told_from_text_and_vision() -> None:
    torch.manual_seed(0)
    head = MaskedLanguageHead(CONFIG, 11)
    tokens, a = torch.randn(2, 5, 5), torch.randn(2, 6, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    masked = torch.zeros(2, 5, dtype=torch.bool)
    masked[0, 1] = masked[1, 2] = True
    logits = head(tokens, mask, a, masked)
    assert logits.shape == (2, 11)
    changed = tokens.clone()
    changed[1, 3:] = 9.0  # padding
    assert torch.allclose(head(changed, mask, a, masked), logits, atol=1e-6)
    changed[0, 4] = 9.0  # after the masked token, which a causal tower would not see
    assert not torch.allclose(head(changed, mask, a, masked)[0], logits[0], atol=1e-3)
    (grad,) = torch.autograd.grad(logits.square().sum(), a)
    assert (grad != 0).any(1).all()


@pytest.mark.parametrize("frames", [1, 3])
def test_no_frame_of_an_interval_is_no_evidence(frames: int) -> None:
    seconds = np.linspace(0, 1, frames).astype(np.float32)
    assert not needed_frames(seconds, (), ((5.0, 6.0),)).any()
