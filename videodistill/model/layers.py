"""What sampler and refiner share: the gate's projections, the feed-forward, the sense of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vd_kernels import language_gate


class LanguageGate(nn.Module):
    """How relevant each visual token is to the question: gates in (0, 1), nothing else.

    The only way by which language reaches vision. The module's output is the gate alone, so that
    a hook on it sees, and can pin, everything that the question says to this layer.

    Args:
        width: C, of the visual tokens.
        token_dim: C_t, of the question's tokens.
        heads: H.
        channelwise: One gate per channel instead of one per head.
    """

    def __init__(self, width: int, token_dim: int, heads: int, *, channelwise: bool = False):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(token_dim, width)
        self.value = nn.Linear(token_dim, width) if channelwise else None
        # Scores of size 2 rather than 1/3, so that gates differ from the first step on.
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=1.5 * layer.in_features**-0.5)
        # No bias at first: a gate opens by how much the question's tokens agree with its input.
        self.bias = nn.Parameter(
            torch.zeros(heads, width // heads) if channelwise else torch.zeros(heads)
        )

    def forward(self, visual: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Gates of visual [B,L,C] by tokens [B,M,C_t]: [B,L,H,1], or [B,L,H,D] channelwise."""
        query = self.query(visual).unflatten(-1, (self.heads, -1))
        key = self.key(tokens).unflatten(-1, (self.heads, -1))
        if self.value is None:
            gate = language_gate(query, key, key_mask=token_mask, bias=self.bias)
            return gate.unsqueeze(-1)
        value = self.value(tokens).unflatten(-1, (self.heads, -1))
        return language_gate(query, key, gate_value=value, key_mask=token_mask, bias=self.bias)


def feed_forward(width: int, ratio: int) -> nn.Sequential:
    """LayerNorm, then two layers with GELU between them."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, ratio * width),
        nn.GELU(),
        nn.Linear(ratio * width, width),
    )


class TimeEmbedding(nn.Module):
    """When a frame is, as a fraction of the video: sines and cosines, then a linear layer.

    It knows fractions, not frame numbers, so the number of frames may change after training.
    """

    def __init__(self, width: int, frequencies: int = 16):
        super().__init__()
        # Half a cycle to 64 cycles over the video.
        rates = 2 * math.pi * torch.logspace(-1, 6, frequencies, base=2.0)
        self.register_buffer("rates", rates, persistent=False)
        self.project = nn.Linear(2 * frequencies, width)

    def forward(self, times: Tensor) -> Tensor:
        """Times in [0, 1], any shape; returns [..., width]."""
        phase = times[..., None] * self.rates
        return self.project(torch.cat([phase.sin(), phase.cos()], dim=-1))
