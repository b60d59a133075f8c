"""The whole model: thinking, observing, answering over features of a frozen encoder."""

# Annotations stay real here: PyTorchModelHubMixin reads the type of ``config`` from them.

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from vd_kernels import TopKSample, topk_gather
from videodistill.model.answering import AnswerHead
from videodistill.model.config import VideoDistillConfig
from videodistill.model.refiner import VisionRefiner
from videodistill.model.sampler import FrameSampler

if TYPE_CHECKING:
    from videodistill.encoders import ImageTextEncoder


class VideoDistillOutput(NamedTuple):
    """One row per question."""

    answer_embed: Tensor
    """``a`` [B,C_a]: question-related vision in the encoder's joint space."""
    scores: Tensor
    """fp32 [B,N]: how much each candidate frame is wanted; mean 0 and variance 1 over a video. All
    zero where ``config.frame_choice`` leaves the sampler out."""
    sample: TopKSample
    """The choice: weights [B,K,N], indices [B,K] in order of time, slot_mask [B,K]; with
    ``config.frame_choice`` "mean", K is 1."""
    patch_gates: Tensor
    """[B,K,S] in (0,1), 0 in empty slots: the last pooling gates, averaged over heads."""


class VideoDistill(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="videodistill",
    tags=["video-question-answering"],
    license="apache-2.0",
):
    """VideoDistill (Zou et al., CVPR 2024, arXiv 2404.00973), our reconstruction of it.

    ``from_pretrained`` and ``save_pretrained`` read and write a directory (or a hub repository)
    with ``config.json`` and ``model.safetensors``.
    """

    def __init__(self, config: VideoDistillConfig):
        super().__init__()
        self.config = config
        self.sampler = FrameSampler(config)
        self.refiner = VisionRefiner(config)
        self.answering = AnswerHead(config)

    @classmethod
    def for_encoder(cls, encoder: "ImageTextEncoder", **settings: Any) -> "VideoDistill":
        """A fresh model for an encoder's sizes: untrained, it answers as the encoder alone does.

        Args:
            encoder: An ``ImageTextEncoder``.
            **settings: Other fields of :class:`VideoDistillConfig`.
        """
        sizes = {
            "embed_dim": encoder.embed_dim,
            "patch_dim": encoder.patch_dim,
            "token_dim": encoder.token_dim,
            "patch_grid": encoder.grid,
            "logit_scale": encoder.logit_scale,
            "encoder": encoder.name,
            "encoder_fingerprint": encoder.fingerprint,
        }
        return cls(VideoDistillConfig(**(sizes | settings)))

    def forward(
        self,
        frame_embed: Tensor,
        patches: Tensor,
        text_embed: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        *,
        frame_mask: Tensor | None = None,
        times: Tensor | None = None,
        pick: int | None = None,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
        score_bias: Tensor | None = None,
    ) -> VideoDistillOutput:
        """Look at V videos to answer B questions, B/V consecutive ones about each video.

        Args:
            frame_embed: [V,N,C_a], as the encoder gives them.
            patches: [V,N,S,C_v].
            text_embed: [B,C_a].
            tokens: [B,M,C_t]; token_mask: bool [B,M], True where real.
            frame_mask: bool [V,N], True where real, real frames first; None when all are.
                Features of other frames may be anything finite.
            times: [V,N], when each frame is, as a fraction of the video; None means even spacing
                over all N, so give it where there is padding.
            pick: K; ``config.pick`` when None.
            seed: Of the draw of frames in training; see ``vd_kernels.topk_sample``.
            row_offset: Number of the first question, where these are part of a larger batch that
                shares the seed.
            score_bias: [B,N], added to the scores when frames are chosen, e.g. to help
                ground-truth frames into the choice early in training.

        Raises:
            ValueError: B is not a positive multiple of V, or K is not in 1..N.
        """
        videos, frames = frame_embed.shape[:2]
        questions = questions_of_each(frame_embed, text_embed)
        if times is None:
            times = even_times(frame_embed)

        if self.config.frame_choice == "learned":
            scores = self.sampler.score_frames(
                frame_embed, text_embed, tokens, token_mask, times, frame_mask
            )
        else:
            scores = torch.zeros(len(text_embed), frames, device=frame_embed.device)
        pick = self.config.pick if pick is None else pick
        wanted = scores if score_bias is None else scores + score_bias
        mask = None if frame_mask is None else frame_mask.repeat_interleave(questions, dim=0)
        sample = self.sampler.choose(wanted, pick, mask, seed, row_offset)

        # A video's questions gather from it together, so its features are not repeated.
        together = TopKSample(
            *(part.unflatten(0, (videos, questions)).flatten(1, 2) for part in sample)
        )

        def gather(values: Tensor) -> Tensor:
            return topk_gather(values, together).unflatten(1, (questions, -1)).flatten(0, 1)

        e = gather(F.normalize(frame_embed, dim=-1))
        refined = self.refiner(
            gather(patches),
            e,
            gather(times),
            # Of the chosen frames, each question's own; a gradient of the answer reaches them here.
            topk_gather(scores, sample),
            tokens,
            token_mask,
            # Without a mask every slot is filled; attention need not look.
            None if frame_mask is None else sample.slot_mask,
        )
        answer_embed = self.answering(e, sample.slot_mask, refined.grains)
        return VideoDistillOutput(answer_embed, scores, sample, refined.patch_gates)

    def choice_logits(self, answer_embed: Tensor, choice_embed: Tensor) -> Tensor:
        """logit_scale · cosine of answers [B,C_a] with choices [B|1,A,C_a]: [B,A]."""
        return self.answering.choice_logits(answer_embed, choice_embed)

    def vocabulary_logits(self, answer_embed: Tensor) -> Tensor:
        """[B, len(config.answers)]; ValueError when the model has no vocabulary."""
        return self.answering.vocabulary_logits(answer_embed)


def questions_of_each(frame_embed: Tensor, text_embed: Tensor) -> int:
    """How many of the questions [B,C_a] are about each of the videos [V,N,C_a].

    Raises:
        ValueError: B is not a positive multiple of V.
    """
    videos = len(frame_embed)
    questions, extra = divmod(len(text_embed), videos)
    if extra or not questions:
        raise ValueError(f"{len(text_embed)} questions cannot be shared evenly by {videos} videos")
    return questions


def even_times(frame_embed: Tensor) -> Tensor:
    """Times [V,N] of frames [V,N,C_a] that are spread evenly, as fractions of the video."""
    videos, frames = frame_embed.shape[:2]
    times = (torch.arange(frames, device=frame_embed.device) + 0.5) / frames
    return times.expand(videos, frames)
