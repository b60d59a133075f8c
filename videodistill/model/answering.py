"""Answering: from the answer embedding, which holds vision alone, and from nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodistill.model.config import VideoDistillConfig
from videodistill.model.layers import in_full
from videodistill.model.refiner import grains_width


class AnswerHead(nn.Module):
    """Joins the chosen frames and the refiner's grains into one embedding in the joint space.

    ``a`` = mean of the chosen frames' unit embeddings + W(grains), with W starting at zero: an
    untrained head answers as the frozen encoder does.
    """

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        grains = grains_width(config)
        self.adapt = nn.Sequential(
            nn.LayerNorm(grains),
            nn.Linear(grains, config.width),
            nn.GELU(),
            nn.Linear(config.width, config.embed_dim),
        )
        nn.init.zeros_(self.adapt[-1].weight)
        nn.init.zeros_(self.adapt[-1].bias)
        self.classifier = (
            nn.Linear(config.embed_dim, len(config.answers)) if config.answers else None
        )
        self.logit_scale = config.logit_scale

    def forward(self, e: Tensor, slot_mask: Tensor, grains: Tensor) -> Tensor:
        """The answer embedding [B,C_a].

        Args:
            e: [B,K,C_a], unit embeddings of the chosen frames.
            slot_mask: bool [B,K], True where a slot holds a frame.
            grains: [B, grains_width], from the refiner.
        """
        real = slot_mask.sum(1, keepdim=True).clamp_min(1)
        seen = (e * slot_mask[:, :, None]).sum(1) / real
        return seen + self.adapt(grains)

    def choice_logits(self, answer_embed: Tensor, choice_embed: Tensor) -> Tensor:
        """logit_scale · cosine of [B,C_a] with [B|1,A,C_a]: [B,A], in float32."""
        with torch.autocast(answer_embed.device.type, enabled=False):
            full = torch.promote_types(answer_embed.dtype, torch.float32)
            a, c = (F.normalize(x.to(full), dim=-1) for x in (answer_embed, choice_embed))
            return self.logit_scale * torch.einsum("bc,bac->ba", a, c.expand(len(a), -1, -1))

    def vocabulary_logits(self, answer_embed: Tensor) -> Tensor:
        """Logits [B, len(config.answers)], in float32, of answer embeddings [B,C_a].

        Raises:
            ValueError: The model has no vocabulary.
        """
        if self.classifier is None:
            raise ValueError("this model has no answer vocabulary: give choices instead")
        return in_full(self.classifier, answer_embed)
