"""Thinking: which frames does the question need?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vd_kernels import TopKSample, spacetime_attention, topk_sample
from vd_kernels.topk_sampling.noise import gumbel_noise
from videodistill.model.config import VideoDistillConfig
from videodistill.model.layers import (
    LanguageCrossAttention,
    LanguageGate,
    RotaryTime,
    TimeEmbedding,
    feed_forward,
    in_full,
)


class SamplerBlock(nn.Module):
    """Attention over time, the language gate, a feed-forward; pre-norm, residual."""

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.time_norm, self.gate_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.time_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rotary = RotaryTime(width // self.heads)
        if config.time_prior:
            self.rotary.look_aside(*self.qkv.bias.chunk(3)[:2], config.time_prior)
        self._make_language(config)
        self.ffn = feed_forward(width, config.ffn_ratio)

    def _make_language(self, config: VideoDistillConfig) -> None:
        width = config.width
        self.gate = LanguageGate(
            width, config.token_dim, config.heads, channelwise=config.gate == "channel"
        )
        self.value, self.gate_out = nn.Linear(width, width), nn.Linear(width, width)

    def _by_question(self, normed: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """What the question makes of frame states [B,N,C], to be added to them."""
        gate = self.gate(normed, tokens, token_mask)
        value = self.value(normed).unflatten(-1, (self.heads, -1))
        return self.gate_out((gate * value).flatten(2))

    def forward(
        self,
        x: Tensor,
        times: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        frame_mask: Tensor | None,
    ) -> Tensor:
        """Frame states [V,N,C] of videos, or [B,N,C] of questions, to states of questions [B,N,C].

        Until the question gates them, states are the same for all questions about a video.

        Args:
            x: Frame states.
            times: [V,N] in [0,1].
            tokens: [B,M,C_t]; token_mask: bool [B,M].
            frame_mask: bool [V,N]; None when all frames are real.
        """
        rows = len(x) // len(times)
        times = times.repeat_interleave(rows, dim=0)
        if frame_mask is not None:
            frame_mask = frame_mask.repeat_interleave(rows, dim=0)
        qkv = self.qkv(self.time_norm(x)).unflatten(-1, (3, 1, self.heads, -1))
        query, key, value = qkv.unbind(2)
        query, key = self.rotary(query, times), self.rotary(key, times)
        seen = spacetime_attention(query, key, value, axis="time", key_mask=frame_mask)
        x = x + self.time_out(seen.flatten(2))
        x = x.repeat_interleave(len(tokens) // len(x), dim=0)
        x = x + self._by_question(self.gate_norm(x), tokens, token_mask)
        return x + self.ffn(x)


class CrossAttendingSamplerBlock(SamplerBlock):
    """The same with cross-attention to the question's tokens in place of the gate."""

    def _make_language(self, config: VideoDistillConfig) -> None:
        self.language = LanguageCrossAttention(config.width, config.token_dim, config.heads)

    def _by_question(self, normed: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        return self.language(normed, tokens, token_mask)


class FrameSampler(nn.Module):
    """Scores candidate frames by the question and picks the K best.

    A frame's score is its similarity with the question in the encoder's joint space, plus what
    ``sampler_blocks`` of looking at the other frames add; that part starts at zero, so an
    untrained sampler picks the frames that are most similar to the question.
    """

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        self.config = config
        self.state = nn.Linear(3 * config.embed_dim, config.width)
        self.time = TimeEmbedding(config.width)
        gated = config.mixing == "gate"
        block = SamplerBlock if gated else CrossAttendingSamplerBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.sampler_blocks))
        self.norm = nn.LayerNorm(config.width)
        self.similarity = nn.Parameter(torch.tensor(10.0))
        self.score = nn.Linear(config.width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def score_frames(
        self,
        frame_embed: Tensor,
        text_embed: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        times: Tensor,
        frame_mask: Tensor | None,
    ) -> Tensor:
        """Scores [B,N], fp32, of mean 0 and variance 1 over the real frames of each video.

        Args:
            frame_embed: [V,N,C_a], not normalised.
            text_embed: [B,C_a], not normalised; B/V consecutive questions about each video.
            tokens: [B,M,C_t]; token_mask: bool [B,M].
            times: [V,N] in [0,1]; frame_mask: bool [V,N] or None.
        """
        questions = len(text_embed) // len(frame_embed)
        e = F.normalize(frame_embed, dim=-1)
        x = self.state(_frame_states(e, frame_mask)) + self.time(times)
        for block in self.blocks:
            x = block(x, times, tokens, token_mask, frame_mask)
        # [V,questions,C_a] · [V,C_a,N], then one row per question.
        text = F.normalize(text_embed, dim=-1).unflatten(0, (-1, questions))
        single = torch.promote_types(e.dtype, torch.float32)
        with torch.autocast(e.device.type, enabled=False):  # frames differ in the last digits
            cosine = (text.to(single) @ e.to(single).transpose(1, 2)).flatten(0, 1)
        scores = (
            self.similarity * cosine.float() + in_full(self.score, self.norm(x)).squeeze(-1).float()
        )
        if frame_mask is not None:
            frame_mask = frame_mask.repeat_interleave(questions, dim=0)
        return _standardise(scores, frame_mask)

    def choose(
        self,
        scores: Tensor,
        pick: int,
        frame_mask: Tensor | None,
        seed: int | Tensor | None,
        row_offset: int = 0,
    ) -> TopKSample:
        """K frames of N in order of time: drawn in training, the best ones otherwise.

        Two controls choose no frames: "mean" gives one slot with the mean of all, "soft" K mixtures
        of frames, and their indices are those of the middle frame and of each mixture's largest.

        Args:
            scores: [B,N]; a config with another ``frame_choice`` than "learned" leaves them unused.
            pick: K, 1..N.
            frame_mask: bool [B,N], real frames first; None when all are real.
            seed: Of the draw in training, and of "soft" in inference, which draws from 0 without
                one; "random" draws from torch's global generator instead.
            row_offset: Number of the first row in that draw.
        """
        config = self.config
        if config.frame_choice == "mean":
            return _mean_of_all(scores, frame_mask)
        if config.frame_choice == "random":
            scores = torch.rand_like(scores)
        elif config.frame_choice == "uniform":
            scores = _uniform_scores(scores, pick, frame_mask)
        elif config.sampling == "soft":
            if seed is None and not self.training:
                seed = 0
            logits = scores / config.sigma
            return _soft_draws(logits, pick, config.temperature, frame_mask, seed, row_offset)
        elif self.training and config.sampling != "hard":
            # Gumbel noise has a fixed size: divided by sigma, scores meet it as if it were sigma's.
            perturbed = config.sampling == "perturbed"
            sample = topk_sample(
                scores if perturbed else scores / config.sigma,
                pick,
                method=config.sampling,
                sigma=config.sigma,
                num_samples=config.num_samples,
                temperature=config.temperature,
                mask=frame_mask,
                seed=seed,
                row_offset=row_offset,
                gradient=config.gradient,
            )
            return _by_slot(sample) if config.sampling == "lapsum" else sample
        return topk_sample(scores, pick, method="hard", mask=frame_mask)


def _frame_states(e: Tensor, mask: Tensor | None) -> Tensor:
    """What a frame shows, what is new since the one before, what it has that the video has not.

    Args:
        e: [V,N,C_a], unit embeddings.
        mask: bool [V,N], real frames first; None when all are real.

    Returns:
        [V,N,3·C_a], of elements about as large as 1: e_n, e_n − e_(n−1), e_n − mean over the video.
    """
    change = torch.cat([torch.zeros_like(e[:, :1]), e[:, 1:] - e[:, :-1]], dim=1)
    if mask is None:
        mean = e.mean(1, keepdim=True)
    else:
        real = mask[..., None].to(e.dtype)
        mean = (e * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    # Unit vectors have elements of size C_a^-1/2.
    return torch.cat([e, change, e - mean], dim=-1) * e.shape[-1] ** 0.5


def _standardise(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [B,N] brought to mean 0 and variance 1 over the real frames; 0 at the others.

    Equal scores become zeros; otherwise the ranking stays. What it prevents: cross-entropy likes
    scores to grow without end, and with them much larger than the noise of the draw no draw differs
    and the gradient vanishes.
    """
    real = torch.ones_like(scores) if mask is None else mask.to(scores.dtype)
    count = real.sum(-1, keepdim=True).clamp_min(1)
    centred = (scores - (scores * real).sum(-1, keepdim=True) / count) * real
    variance = centred.square().sum(-1, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-6)


def _uniform_scores(scores: Tensor, pick: int, mask: Tensor | None) -> Tensor:
    """Scores whose K best are the frames at the centres of K equal parts of the real frames.

    Those come first in a row, then padding. With fewer real frames than K all of them are best.
    """
    frames = scores.shape[-1]
    count = frames if mask is None else mask.sum(-1, keepdim=True)
    centres = (torch.arange(pick, device=scores.device) + 0.5) * count / pick
    chosen = torch.zeros_like(scores)
    return chosen.scatter(-1, centres.long().expand(*scores.shape[:-1], pick), 1.0)


def _mean_of_all(scores: Tensor, mask: Tensor | None) -> TopKSample:
    """One slot that holds the mean of the real frames; its index is that of the middle one."""
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    count = mask.sum(-1, keepdim=True)
    weights = mask.float() / count.clamp_min(1)
    real = count > 0
    return TopKSample(weights.unsqueeze(-2), torch.where(real, (count - 1) // 2, -1), real)


def _soft_draws(
    logits: Tensor,
    pick: int,
    temperature: float,
    mask: Tensor | None,
    seed: int | Tensor | None,
    row_offset: int = 0,
) -> TopKSample:
    """K Gumbel-softmax draws of mixtures of frames, independent of each other, in order of time.

    Args:
        logits: [B,N]; pick: K; temperature: Of the softmax.
        mask: bool [B,N] or None.
        seed: Of the draws; None takes one from torch's global generator.
        row_offset: Number of the first row.
    """
    rows, frames = logits.shape
    if seed is None:
        seed = torch.randint(2**62, (), device=logits.device)
    noise = gumbel_noise(rows, pick, frames, seed, row_offset, logits.device)
    keys = (logits.float().unsqueeze(1) + noise) / temperature
    if mask is None:
        weights = keys.softmax(-1)
        real = torch.ones(rows, pick, dtype=torch.bool, device=logits.device)
    else:
        # Not -inf: of a row without real frames all would be NaN.
        weights = keys.masked_fill(~mask[:, None], -1e9).softmax(-1) * mask[:, None]
        real = mask.any(-1, keepdim=True).expand(-1, pick)
    indices, order = weights.argmax(-1).sort(stable=True)
    weights = weights.gather(1, order[..., None].expand(-1, -1, frames))
    return TopKSample(weights, indices.masked_fill(~real, -1), real)


def _by_slot(sample: TopKSample) -> TopKSample:
    """A "lapsum" sample with weights for each slot, [B,K,N], in place of the set's [B,N]."""
    weights, indices, real = sample
    at = indices.clamp_min(0)
    own = weights.gather(-1, at).masked_fill(~real, 0.0)
    spread = own.new_zeros(*indices.shape, weights.shape[-1])
    return TopKSample(spread.scatter(-1, at[..., None], own[..., None]), indices, real)
