"""What sampler and refiner share: how a question meets vision, feed-forward, sense of time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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


class LanguageCrossAttention(nn.Module):
    """What the question's tokens say to each visual token: the control in place of the gate.

    Args:
        width: C, of the visual tokens.
        token_dim: C_t, of the question's tokens.
        heads: H.
    """

    def __init__(self, width: int, token_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        # A bias of keys would raise all of a row's scores alike.
        self.key = nn.Linear(token_dim, width, bias=False)
        self.value = nn.Linear(token_dim, width)

    def forward(self, visual: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Of visual [B,L,C] and tokens [B,M,C_t], what to add to visual: [B,L,C]."""
        # A weight of zero does not keep out what padding may hold.
        tokens = tokens.masked_fill(~token_mask[..., None], 0.0)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(visual), self.key(tokens), self.value(tokens))
        )
        # By hand: on CPUs the fused function takes several times as long in bfloat16.
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~token_mask[:, None, None], -1e9)
        said = scores.softmax(-1).to(value.dtype) @ value
        return self.out(said.transpose(1, 2).flatten(2))


def in_full(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, whatever autocast is in force and its parameters are kept in.

    For scores and logits, which are compared: rounded to bfloat16 many would be equal.
    """
    with torch.autocast(x.device.type, enabled=False):
        full = torch.promote_types(x.dtype, torch.float32)
        bias = None if layer.bias is None else layer.bias.to(full)
        return F.linear(x.to(full), layer.weight.to(full), bias)


class FrameGate(nn.Module):
    """How much each chosen frame counts: gates in (0, 1) from the scores they were chosen by.

    K frames are chosen whether or not the question needs so many; what only fills up has scores
    near the video's mean, or far behind the best frame's, and is kept out of what the refiner
    pools. A hook on this module sees, and can pin, everything that the question says here.

    Args:
        heads: H.
    """

    def __init__(self, heads: int):
        super().__init__()
        # Scores have variance 1 over a video: frames at the mean start at 0.12 or less, a best one
        # at two deviations above it at 0.88.
        self.slope = nn.Parameter(torch.full((heads,), 2.0))
        self.bias = nn.Parameter(torch.full((heads,), -2.0))
        # From heads that take every high score, as counting needs, to heads that take the best.
        self.behind = nn.Parameter(torch.linspace(0.0, 6.0, heads))

    def forward(self, scores: Tensor) -> Tensor:
        """Gates [B,K,H] of scores [B,K]."""
        scores = scores[..., None]
        behind = scores - scores.amax(1, keepdim=True)
        return torch.sigmoid(scores * self.slope + behind * self.behind + self.bias)


def feed_forward(width: int, ratio: int) -> nn.Sequential:
    """LayerNorm, then two layers with GELU between them."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, ratio * width),
        nn.GELU(),
        nn.Linear(ratio * width, width),
    )


def _rates(count: int) -> Tensor:
    """Angular frequencies [count]: half a cycle to 64 cycles over the video."""
    return 2 * math.pi * torch.logspace(-1, 6, count, base=2.0)


class RotaryTime(nn.Module):
    """Turns queries and keys by when their frames are (Su et al. 2021, arXiv 2104.09864).

    Their products then depend on how far two frames are apart, as a fraction of the video.

    Args:
        head_dim: D, even.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("rates", _rates(head_dim // 2), persistent=False)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """x [B,N,1,H,D] of frames at times [B,N] in [0, 1]; same shape and dtype."""
        phase = (times[..., None] * self.rates)[:, :, None, None]
        cos, sin = phase.cos(), phase.sin()
        first, second = x.float().chunk(2, dim=-1)
        turned = [first * cos - second * sin, first * sin + second * cos]
        return torch.cat(turned, dim=-1).to(x.dtype)

    @torch.no_grad()
    def look_aside(self, query_bias: Tensor, key_bias: Tensor, peak: float) -> None:
        """Set biases [H·D] so that heads prefer frames at distances of their own, on either side.

        What is before or after something is then found by scaling heads, not by first learning to
        tell the sides apart, for which training would wait on a plateau. Turned biases have a
        product that depends on the distance in time alone: a sum of cosines, which we let peak,
        and decay on both sides of it, by leaving out those that would come round again.

        Args:
            peak: Attention score at a head's preferred distance.
        """
        head_dim = 2 * len(self.rates)
        query, key = (bias.view(-1, 2, len(self.rates)) for bias in (query_bias, key_bias))
        for head in range(len(query)):
            distance = 0.2 / 2 ** (head // 2 % 4)  # of the video: 1/5, 1/10, 1/20, 1/40
            angle = self.rates * (distance if head % 2 else -distance)
            slow = angle.abs() <= math.pi
            length = (peak * head_dim**0.5 / slow.sum()).sqrt() * slow
            query[head, 0], query[head, 1] = length, 0.0
            key[head, 0], key[head, 1] = length * angle.cos(), -length * angle.sin()


class TimeEmbedding(nn.Module):
    """When a frame is, as a fraction of the video: sines and cosines, then a linear layer.

    It knows fractions, not frame numbers, so the number of frames may change after training.
    """

    def __init__(self, width: int, frequencies: int = 16):
        super().__init__()
        self.register_buffer("rates", _rates(frequencies), persistent=False)
        self.project = nn.Linear(2 * frequencies, width)

    def forward(self, times: Tensor) -> Tensor:
        """Times in [0, 1], any shape; returns [..., width]."""
        phase = times[..., None] * self.rates
        return self.project(torch.cat([phase.sin(), phase.cos()], dim=-1))
