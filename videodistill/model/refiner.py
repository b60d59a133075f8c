"""Observing: what in the chosen frames has to do with the question?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vd_kernels import spacetime_attention
from videodistill.model.config import VideoDistillConfig
from videodistill.model.layers import (
    FrameGate,
    LanguageCrossAttention,
    LanguageGate,
    TimeEmbedding,
    feed_forward,
)

_WAVES = 4
"""Cosines along each side of a frame that tell a place: half a wave to two over the side."""


def grains_width(config: VideoDistillConfig) -> int:
    """Width of all grains together."""
    return config.refiner_blocks * (3 * config.width + 2 * _WAVES * config.heads)


class Refined(NamedTuple):
    """What the refiner hands on."""

    grains: Tensor
    """[B, grains_width]: patches, frames, clip and places, pooled after each block."""
    patch_gates: Tensor
    """[B,K,S]: the last block's pooling gates, averaged over heads; for pictures."""


class RefinerBlock(nn.Module):
    """Attention over time, attention over space, a feed-forward.

    Each attention's output is scaled by the question's gate before it joins the residual.
    """

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        channelwise = config.gate == "channel"
        self.norms = nn.ModuleDict({axis: nn.LayerNorm(width) for axis in ("time", "space")})
        self.gates = nn.ModuleDict(
            {
                axis: LanguageGate(width, config.token_dim, self.heads, channelwise=channelwise)
                for axis in ("time", "space")
            }
        )
        self.qkv = nn.ModuleDict({axis: nn.Linear(width, 3 * width) for axis in ("time", "space")})
        self.out = nn.ModuleDict({axis: nn.Linear(width, width) for axis in ("time", "space")})
        self.ffn = feed_forward(width, config.ffn_ratio)

    def forward(
        self, x: Tensor, tokens: Tensor, token_mask: Tensor, slot_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B,K,S,C] to tokens, and the space gates [B,K,S,H,1|D] that pool them."""
        for axis in ("time", "space"):
            normed = self.norms[axis](x)
            gate = self.gates[axis](normed.flatten(1, 2), tokens, token_mask)
            gate = gate.unflatten(1, x.shape[1:3])
            qkv = self.qkv[axis](normed).unflatten(-1, (3, self.heads, -1))
            seen = spacetime_attention(*qkv.unbind(3), axis=axis, key_mask=slot_mask, gate=gate)
            x = x + self.out[axis](seen.flatten(3))
        return x + self.ffn(x), gate


class CrossAttendingRefinerBlock(nn.Module):
    """Attention over time and over space, cross-attention to the question, a feed-forward.

    The control in place of :class:`RefinerBlock`: one cross-attention has as many parameters as the
    two gates. What it returns as gates is 1, so that all patches count alike.
    """

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(width) for name in ("time", "space", "language")}
        )
        self.qkv = nn.ModuleDict({axis: nn.Linear(width, 3 * width) for axis in ("time", "space")})
        self.out = nn.ModuleDict({axis: nn.Linear(width, width) for axis in ("time", "space")})
        self.language = LanguageCrossAttention(width, config.token_dim, self.heads)
        self.ffn = feed_forward(width, config.ffn_ratio)

    def forward(
        self, x: Tensor, tokens: Tensor, token_mask: Tensor, slot_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B,K,S,C] to tokens, and ones [B,K,S,1,1]."""
        for axis in ("time", "space"):
            qkv = self.qkv[axis](self.norms[axis](x)).unflatten(-1, (3, self.heads, -1))
            seen = spacetime_attention(*qkv.unbind(3), axis=axis, key_mask=slot_mask)
            x = x + self.out[axis](seen.flatten(3))
        normed = self.norms["language"](x).flatten(1, 2)
        x = x + self.language(normed, tokens, token_mask).unflatten(1, x.shape[1:3])
        return x + self.ffn(x), x.new_ones(*x.shape[:3], 1, 1)


class VisionRefiner(nn.Module):
    """Blocks of attention over the chosen frames, and what they pool, weighted by gates.

    A frame is its patches and one token more, the encoder's embedding of the whole frame: through
    it frames can be compared whatever the position of what they show.
    """

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        width = config.width
        self.grid, self.merge = config.patch_grid, config.merge
        patches = self.grid[0] * self.grid[1] // self.merge**2
        merged = config.patch_dim * self.merge**2
        self.patch = nn.Sequential(nn.LayerNorm(merged), nn.Linear(merged, width))
        self.frame = nn.Linear(config.embed_dim, width)
        # As large as what the patches say: at the usual 0.02 where something is was learnt late.
        self.position = nn.Parameter(torch.randn(1 + patches, width) * 0.5)
        self.time = TimeEmbedding(width)
        gated = config.mixing == "gate"
        block = RefinerBlock if gated else CrossAttendingRefinerBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.refiner_blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.refiner_blocks))
        self.frame_gates = nn.ModuleList(
            FrameGate(config.heads) for _ in range(config.refiner_blocks)
        )
        self.register_buffer("places", self._places(), persistent=False)
        self.heads = config.heads
        self.embed_scale = config.embed_dim**0.5

    def forward(
        self,
        patches: Tensor,
        e: Tensor,
        times: Tensor,
        scores: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        slot_mask: Tensor | None,
    ) -> Refined:
        """Refine the chosen frames.

        Args:
            patches: [B,K,S,C_v].
            e: [B,K,C_a], unit embeddings of the frames.
            times: [B,K] in [0,1].
            scores: [B,K], the sampler's scores of these frames.
            tokens: [B,M,C_t]; token_mask: bool [B,M].
            slot_mask: bool [B,K], False where a video had fewer frames than K; None when none had.
        """
        frame = self.frame(e * self.embed_scale).unsqueeze(2)
        x = torch.cat([frame, self.patch(self._merge(patches))], dim=2)
        x = x + self.position + self.time(times).unsqueeze(2)
        grains = []
        for block, norm, frame_gate in zip(self.blocks, self.norms, self.frame_gates, strict=True):
            x, gates = block(x, tokens, token_mask, slot_mask)
            gates = gates * frame_gate(scores)[:, :, None, :, None]
            if slot_mask is not None:
                gates = gates * slot_mask[:, :, None, None, None]
            grains += self._pool(norm(x), gates, slot_mask)
        patch_gates = self._spread(gates[:, :, 1:].mean(dim=(-2, -1)))
        return Refined(torch.cat(grains, dim=-1), patch_gates)

    def _merge(self, patches: Tensor) -> Tensor:
        """Neighbours side by side: [B,K,S,C_v] to [B,K,S/m²,m²·C_v]."""
        if self.merge == 1:
            return patches
        (rows, columns), m = self.grid, self.merge
        squares = patches.unflatten(2, (rows // m, m, columns // m, m)).transpose(3, 4)
        return squares.flatten(4, 6).flatten(2, 3)

    def _places(self) -> Tensor:
        """Where each token of a frame is, [S/m², 2 · _WAVES]: cosines of its row and column."""
        sides = []
        for count in (side // self.merge for side in self.grid):
            at = (torch.arange(count) + 0.5) / count
            sides.append(torch.cos(math.pi * at[:, None] * torch.arange(1, _WAVES + 1)))
        rows, columns = sides
        down = rows.repeat_interleave(len(columns), dim=0)
        return torch.cat([down, columns.repeat(len(rows), 1)], dim=-1)

    def _spread(self, gates: Tensor) -> Tensor:
        """Gates [B,K,S/m²] of merged patches, to each of them: [B,K,S]."""
        if self.merge == 1:
            return gates
        (rows, columns), m = self.grid, self.merge
        grid = gates.unflatten(2, (rows // m, columns // m))
        return grid.repeat_interleave(m, 2).repeat_interleave(m, 3).flatten(2)

    def _pool(self, x: Tensor, gates: Tensor, slot_mask: Tensor | None) -> list[Tensor]:
        """Four grains of tokens [B,K,1+S,C], each weighted by its gates: three [B,C], one [B,H·P].

        Patches: their gated mean, with the gates as weights that sum to one. Frames and clip:
        sums of gated frame tokens and patches over their number, which shrink with the gates and
        so keep how much there was to see. Places: the gated mean of where patches are, apart from
        what they show.
        """
        gated = gates * x.unflatten(-1, (self.heads, -1))
        frames, patches = gated[:, :, 0], gated[:, :, 1:]
        real: float | Tensor = x.shape[1]
        if slot_mask is not None:
            real = slot_mask.sum(1).clamp_min(1)[:, None, None].to(x.dtype)
        weights = gates[:, :, 1:].sum(1)
        weight = weights.sum(1) + 1e-6
        total = patches.sum(dim=(1, 2))
        by_place = weights.mean(-1).transpose(1, 2) @ self.places.to(weights.dtype)
        grains = [
            total / weight,
            frames.sum(1) / real,
            total / (real * patches.shape[2]),
            by_place / weight.mean(-1, keepdim=True),
        ]
        return [grain.flatten(1) for grain in grains]
