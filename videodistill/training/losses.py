"""What a head learns from: answers, evidence, and in pretraining pairs of videos and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodistill.data.record import Stretch
from videodistill.model import VideoDistill, VideoDistillConfig, VideoDistillOutput

if TYPE_CHECKING:
    from videodistill.training.config import LossConfig, PhaseConfig
    from videodistill.training.dataset import Batch


CONTEXT, EVIDENCE = 1, 4
"""How much frames are needed that lead to those which show the answer, and these themselves."""


def needed_frames(
    seconds: np.ndarray, context: Sequence[Stretch], evidence: Sequence[Stretch]
) -> np.ndarray:
    """uint8 [N]: ``EVIDENCE`` for frames at ``seconds`` [N] that show the answer, ``CONTEXT`` for
    those that lead to them, else 0."""
    needed = np.zeros(len(seconds), np.uint8)
    for weight, stretches in ((CONTEXT, context), (EVIDENCE, evidence)):
        for start, end in stretches:
            needed[(seconds >= start - 1e-3) & (seconds < end - 1e-3)] = weight
    return needed


def evidence_loss(
    scores: Tensor, needed: Tensor, scale: Tensor, frame_mask: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropies between frame scores and the frames that are needed.

    Args:
        scores: [B,N].
        needed: [B,N], how much each frame is; rows of zeros do not count.
        scale: [], logarithm of what turns scores into logits.
        frame_mask: bool [B,N], True where a frame is real; None when all are.
    """
    has_any = needed.any(1)
    target = needed[has_any] / needed[has_any].sum(1, keepdim=True)
    logits = scale.exp() * scores[has_any]
    if frame_mask is not None:
        # Not -inf: that, times a target of zero, is no number.
        logits = logits.masked_fill(~frame_mask[has_any], torch.finfo(logits.dtype).min)
    return -(target * logits.log_softmax(-1)).sum()


class MatchingHead(nn.Module):
    """Does a text belong to a video? From the answer embedding and the text's embedding."""

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * config.embed_dim, config.width), nn.GELU(), nn.Linear(config.width, 1)
        )

    def forward(self, answer_embed: Tensor, text_embed: Tensor) -> Tensor:
        """Logits [B] of answer embeddings and texts [B,C_a]."""
        a, t = F.normalize(answer_embed, dim=-1), F.normalize(text_embed, dim=-1)
        scale = a.shape[-1] ** 0.5  # elements about as large as 1
        return self.layers(torch.cat([a * scale, t * scale, a * t * scale**2], dim=-1)).squeeze(-1)


class MaskedLanguageHead(nn.Module):
    """Which tokens were masked? From the other tokens, under gates of what was seen.

    Vision gates the tokens and is added to them; nothing of the text reaches vision here.
    """

    def __init__(self, config: VideoDistillConfig, vocabulary: int):
        super().__init__()
        width = config.width
        self.token = nn.Linear(config.token_dim, width)
        # CLIP's text tower looks back alone; this layer looks both ways.
        self.context = nn.TransformerEncoderLayer(
            width,
            config.heads,
            config.ffn_ratio * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(config.embed_dim, width)
        self.vision = nn.Linear(config.embed_dim, width)
        self.words = nn.Linear(width, vocabulary)

    def forward(
        self, tokens: Tensor, token_mask: Tensor, answer_embed: Tensor, masked: Tensor
    ) -> Tensor:
        """Logits [n, vocabulary] of the n places where ``masked`` bool [B,M] is True.

        Args:
            tokens: [B,M,C_t] of the text with its masked tokens blanked out.
            token_mask: bool [B,M].
            answer_embed: [B,C_a].
        """
        x = self.context(self.token(tokens), src_key_padding_mask=~token_mask)
        a = F.normalize(answer_embed, dim=-1)[:, None] * answer_embed.shape[-1] ** 0.5
        x = torch.sigmoid(self.gate(a)) * self.norm(x) + self.vision(a)
        return self.words(F.gelu(x[masked]))


class Outcome(NamedTuple):
    """What became of a batch of B rows."""

    losses: dict[str, Tensor]
    """By name, each a sum over the rows that it is about."""
    guesses: Tensor
    """int64 [B]: the number of a choice; for a question without choices, of an answer in the
    vocabulary; -1 where there is neither."""
    seen: Tensor
    """bool [B]: whether one of the chosen frames shows the evidence."""
    scores: Tensor | None = None
    """[B,N], without gradients: of the frames; None where the sampler learns alone."""


class Objective(nn.Module):
    """A model with all that its training adds: the losses of a batch.

    Args:
        model: The model.
        weights: Which losses there are.
        words: Size of the encoder's text vocabulary, for masked language.
    """

    def __init__(self, model: VideoDistill, weights: LossConfig, words: int):
        super().__init__()
        self.model, self.weights = model, weights
        self.evidence_scale = nn.Parameter(torch.tensor(0.5))
        self.matching = MatchingHead(model.config) if weights.matching else None
        self.masked_language = (
            MaskedLanguageHead(model.config, words) if weights.masked_language else None
        )

    def forward(
        self,
        batch: Batch,
        masked_text: tuple[Tensor, Tensor] | None = None,
        phase: PhaseConfig | None = None,
    ) -> Outcome:
        """Look at the videos of a batch and compare what comes of it with what is known.

        Args:
            batch: On the model's device.
            masked_text: text_embed [B,C_a] and tokens [B,M,C_t] of ``batch.pairs.masked_ids``.
            phase: Of training; None as the model will be used.
        """
        sums: dict[str, Tensor] = {}
        guesses = torch.full_like(batch.rows, -1)
        if phase is not None and not phase.others:
            if batch.totals["evidence"]:
                sums["evidence"] = self._evidence_sum(batch, self._scores(batch))
            return Outcome(sums, guesses, torch.zeros_like(guesses, dtype=torch.bool))
        output = self._look(batch, batch.text_embed, batch.tokens, batch.token_mask, 0, phase)
        shows = batch.needed == EVIDENCE
        seen = shows.gather(1, output.sample.indices.clamp_min(0)) & output.sample.slot_mask
        if self.model.config.answers:
            logits = self.model.vocabulary_logits(output.answer_embed).float()
            guesses = logits.argmax(-1)
            if self.weights.answer and batch.totals["answer"]:
                sums["answer"] = F.cross_entropy(
                    logits, batch.answer, ignore_index=-1, reduction="sum"
                )
        wanted = self.weights.choice and batch.totals["choice"]
        if batch.choice_mask.shape[1]:
            logits = self.model.choice_logits(output.answer_embed, batch.choice_embed).float()
            logits = logits.masked_fill(~batch.choice_mask, torch.finfo(logits.dtype).min)
            guesses = torch.where(batch.choice_mask.any(1), logits.argmax(-1), guesses)
            if wanted:
                sums["choice"] = F.cross_entropy(
                    logits, batch.right_choice, ignore_index=-1, reduction="sum"
                )
        elif wanted:
            # Another process has choices, and waits for this one's gradients.
            sums["choice"] = 0.0 * output.answer_embed.sum()
        at_rest = phase is not None and not phase.sampler
        if self.weights.evidence and batch.totals["evidence"] and not at_rest:
            sums["evidence"] = self._evidence_sum(batch, output.scores)
        if batch.pairs is not None:
            sums |= self._pair_losses(batch, output, masked_text)
        return Outcome(sums, guesses, seen.any(1), output.scores.detach())

    def _scores(self, batch: Batch) -> Tensor:
        return self.model.sampler.score_frames(
            batch.frame_embed.float(),
            batch.text_embed,
            batch.tokens,
            batch.token_mask,
            batch.times,
            batch.frame_mask,
        )

    def _evidence_sum(self, batch: Batch, scores: Tensor) -> Tensor:
        mask = batch.frame_mask
        if mask is not None:
            mask = mask.repeat_interleave(len(batch.rows) // len(mask), dim=0)
        return evidence_loss(scores, batch.needed, self.evidence_scale, mask)

    def _look(
        self,
        batch: Batch,
        text_embed: Tensor,
        tokens: Tensor,
        mask: Tensor,
        view: int,
        phase: PhaseConfig | None = None,
    ) -> VideoDistillOutput:
        pick = self.model.config.pick
        if phase is not None and phase.pick is not None:
            pick = phase.pick
        first = phase is not None and phase.evidence_first
        return self.model(
            batch.frame_embed.float(),
            batch.patches.float(),
            text_embed,
            tokens,
            mask,
            frame_mask=batch.frame_mask,
            times=batch.times,
            pick=min(pick, batch.times.shape[1]),
            seed=batch.seed + view,
            row_offset=batch.row_offset,
            # Above any score and noise: of N scores with variance 1 none is larger than sqrt(N).
            score_bias=(10.0 + batch.times.shape[1]) * batch.needed if first else None,
        )

    def _pair_losses(
        self, batch: Batch, output: VideoDistillOutput, masked_text: Any
    ) -> dict[str, Tensor]:
        pairs, real = batch.pairs, batch.rows >= 0
        sums: dict[str, Tensor] = {}
        if self.weights.contrastive:
            logits = self.model.choice_logits(output.answer_embed, pairs.all_embed[None]).float()
            logits = logits.masked_fill(~pairs.candidates, torch.finfo(logits.dtype).min)
            own = torch.where(real, pairs.own, -1)
            sums["contrastive"] = F.cross_entropy(logits, own, ignore_index=-1, reduction="sum")
        if self.matching is not None:
            other = self._look(batch, pairs.other_embed, pairs.other_tokens, pairs.other_mask, 1)
            together = self.matching(output.answer_embed, batch.text_embed).float()
            apart = self.matching(other.answer_embed, pairs.other_embed).float()
            sums["matching"] = (
                F.softplus(-together)[real].sum() + F.softplus(apart)[pairs.other_real].sum()
            )
        if self.masked_language is not None:
            text_embed, tokens = masked_text
            # What gates vision must not hold the words that are to be found.
            seen = self._look(batch, text_embed, tokens, batch.token_mask, 2)
            masked = pairs.masked_target >= 0
            logits = self.masked_language(tokens, batch.token_mask, seen.answer_embed, masked)
            each = F.cross_entropy(logits.float(), pairs.masked_target[masked], reduction="none")
            # The mean over a text's masked tokens, summed over texts.
            share = masked / masked.sum(1, keepdim=True).clamp_min(1)
            sums["masked_language"] = (each * share[masked]).sum()
        return sums
