"""The pooling against its definition in loops; gates of frames."""

from __future__ import annotations

import math

import pytest
import torch

from videodistill.model import VideoDistillConfig
from videodistill.model.layers import FrameGate
from videodistill.model.refiner import VisionRefiner

B, K, S, H, D = 2, 3, 4, 2, 4
C = H * D


def pooled_in_loops(x: torch.Tensor, gates: torch.Tensor, real: list[int]) -> torch.Tensor:
    """Gated mean of patches; gated sums of frame tokens and of patches over their number."""
    grains = torch.zeros(3, B, C, dtype=torch.float64)
    for b in range(B):
        for c in range(C):
            head, channel = divmod(c, D)
            patches = weights = frames = 0.0
            for k in range(K):
                for token in range(1 + S):
                    own = gates[b, k, token, head]
                    gate = float(own[channel] if len(own) > 1 else own[0])
                    value = gate * float(x[b, k, token, c])
                    if token == 0:
                        frames += value
                    else:
                        patches += value
                        weights += gate
            grains[0, b, c] = patches / weights
            grains[1, b, c] = frames / real[b]
            grains[2, b, c] = patches / (real[b] * S)
    return grains


def places_in_loops(gates: torch.Tensor) -> torch.Tensor:
    """For each head the gated mean of cosines of row and column, here of 2 × 2 patches."""
    places = torch.zeros(B, H, 2, 4, dtype=torch.float64)
    for b in range(B):
        for head in range(H):
            weights = 0.0
            for k in range(K):
                for patch in range(S):
                    gate = float(gates[b, k, 1 + patch, head].mean())
                    weights += gate
                    for side, at in enumerate(divmod(patch, 2)):
                        for wave in range(4):
                            place = math.cos(math.pi * (wave + 1) * (at + 0.5) / 2)
                            places[b, head, side, wave] += gate * place
            places[b, head] /= weights
    return places.flatten(1)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("real", [[3, 3], [3, 1]])
def test_pooling(gate: str, real: list[int]) -> None:
    config = VideoDistillConfig(
        embed_dim=8, patch_dim=8, token_dim=8, patch_grid=(2, 2), width=C, heads=H, gate=gate
    )
    refiner = VisionRefiner(config)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, K, 1 + S, C, generator=generator)
    gates = torch.rand(B, K, 1 + S, H, D if gate == "channel" else 1, generator=generator)
    slot_mask = torch.arange(K) < torch.tensor(real)[:, None]
    gates = gates * slot_mask[:, :, None, None, None]
    grains = refiner._pool(x, gates, None if real == [K, K] else slot_mask)
    expected = pooled_in_loops(x, gates, real)
    *grains, places = grains
    assert [grain.shape for grain in grains] == [(B, C)] * 3
    torch.testing.assert_close(torch.stack(grains).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(places.double(), places_in_loops(gates), rtol=1e-4, atol=1e-5)


def test_frames_behind_the_best_count_less() -> None:
    """In the last head; in the first one a frame's own score decides."""
    gate = FrameGate(H)
    alone, beside = gate(torch.tensor([[1.5, 1.5], [1.5, 4.0]]))[:, 0].tolist()
    assert alone == pytest.approx([1 / (1 + math.exp(-1))] * H)
    assert beside[0] == alone[0]
    assert beside[-1] < 1e-5
