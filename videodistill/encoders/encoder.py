"""The frozen image-language encoder: frames and texts, apart, into one joint space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from videodistill.encoders.preprocess import FrameTransform
from videodistill.precision import keep_for_products, product_autocast

# Texts that go through the text tower together.
_TEXT_BATCH = 256


class FrameFeatures(NamedTuple):
    """Features of n frames, float32 (outside the caller's autocast), on the encoder's device.

    frame_embed [n,C_a]: pooled and projected into the joint space, not normalised.
    patches [n,S,C_v]: last hidden state of the vision tower without its class token (SigLIP has
        none), row by row from the top left. CLIP's is taken before its post-layernorm, which it
        applies to the class token only; SigLIP's after, as its tower applies it to all.
    """

    frame_embed: torch.Tensor
    patches: torch.Tensor


class TextFeatures(NamedTuple):
    """Features of q texts, float32 (outside the caller's autocast), on the encoder's device.

    text_embed [q,C_a]: pooled and projected into the joint space, not normalised.
    tokens [q,M,C_t]: last hidden state of the text tower (after its final layernorm).
    mask bool [q,M]: True where a token is real, start and end tokens among them.
    truncated: for each text whether it was longer than `max_tokens`; its start was kept.
    """

    text_embed: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    truncated: list[bool]


class ImageTextEncoder(nn.Module):
    """A frozen CLIP or SigLIP: frames and texts, apart, into one joint space.

    As it sees frames and texts apart, a video's features are computed once and serve every
    question. It stays in evaluation mode, its parameters take no gradients, and its features are
    ordinary tensors that training may use as inputs. Made by `load_encoder`.

    Attributes:
        embed_dim, patch_dim, token_dim: C_a, C_v, C_t, widths of joint space, patches, tokens.
        grid: (h, w), patches per column and row, S = h * w.
        image_size: side of the vision tower's input in pixels.
        max_tokens: longest text in tokens, start and end tokens among them.
        logit_scale, logit_bias: similarity of frame and text is logit_scale * cosine + logit_bias
            (SigLIP's model of a matching pair; CLIP has no bias: 0.0).
        name: what the user gave.
        fingerprint: 16 hex digits over everything that decides the features but precision:
            weights, their configuration, tokenizer and preprocessing. It does not depend on the
            folder.
        precision: "fp32" or "bf16", of its matrix products.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        transform: FrameTransform,
        *,
        name: str,
        fingerprint: str,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        config: Any = model.config
        text, vision = config.text_config, config.vision_config
        self.model = model.requires_grad_(False).eval()
        self.precision = precision
        keep_for_products(self.model, precision)
        self.tokenizer = tokenizer
        self.transform = transform
        self.name = name
        self.fingerprint = fingerprint
        self.is_clip = config.model_type == "clip"
        self.embed_dim: int = config.projection_dim if self.is_clip else vision.hidden_size
        self.patch_dim: int = vision.hidden_size
        self.token_dim: int = text.hidden_size
        self.image_size: int = vision.image_size
        side = vision.image_size // vision.patch_size
        self.grid: tuple[int, int] = (side, side)
        self.max_tokens: int = text.max_position_embeddings
        special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self._closing = special[::-1].index(0)  # special tokens after a text: one end token
        self.logit_scale = float(model.logit_scale.exp())
        self.logit_bias = 0.0 if self.is_clip else float(model.logit_bias)

    @property
    def device(self) -> torch.device:
        """Where the encoder computes and its features lie."""
        return self.model.logit_scale.device

    def train(self, mode: bool = True) -> ImageTextEncoder:
        """Stay in evaluation mode, whatever the model around this one is put into."""
        return super().train(False)

    def preprocess(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [n,H,W,3] RGB to float32 [n,3,image_size,image_size]; see `FrameTransform`."""
        return self.transform(frames, self.device)

    @torch.no_grad()  # not inference_mode: its tensors cannot be inputs to training
    def encode_frames(
        self, frames: np.ndarray | torch.Tensor, batch_size: int = 64
    ) -> FrameFeatures:
        """Encode uint8 [n,H,W,3] RGB frames, `batch_size` at a time.

        Raises ValueError for another dtype or shape, and for no frames at all.
        """
        if len(frames) == 0:
            raise ValueError("frames is empty; allowed: at least one frame")
        embeds, patches = [], []
        for start in range(0, len(frames), batch_size):
            pixels = self.preprocess(frames[start : start + batch_size])
            # One pass of the tower gives both; `pooler_output` is the projected embedding.
            with product_autocast(self.device, self.precision):
                output = self.model.get_image_features(pixel_values=pixels)
            embeds.append(output.pooler_output)
            patches.append(output.last_hidden_state[:, 1 if self.is_clip else 0 :])
        return FrameFeatures(self._joined(embeds), self._joined(patches))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Encode texts; those longer than `max_tokens` lose their end and are marked.

        CLIP's texts are padded to the longest, SigLIP's to `max_tokens`, as SigLIP reads a text's
        embedding at the last position and was trained so. Neither tower is given the mask: CLIP's
        tokens never see what follows them, SigLIP's were trained to see the padding.
        Raises TypeError for anything but strings, ValueError for no texts at all.
        """
        rows, mask, truncated = self.tokenize(texts)
        text_embed, tokens = self.encode_ids(rows)
        return TextFeatures(text_embed, tokens, mask.to(self.device), truncated)

    @torch.no_grad()
    def encode_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """text_embed [q,C_a] and tokens [q,M,C_t] of texts as ids int64 [q,M], any device."""
        embeds, tokens = [], []
        for part in ids.to(self.device).split(_TEXT_BATCH):
            with product_autocast(self.device, self.precision):
                output = self.model.get_text_features(input_ids=part)
            embeds.append(output.pooler_output)
            tokens.append(output.last_hidden_state)
        return self._joined(embeds), self._joined(tokens)

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(parts)
        return whole.float() if self.precision == "bf16" else whole

    def tokenize(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Ids int64 [q,M], mask bool [q,M], and which texts were cut; see `encode_texts`.

        Cutting and padding are done here, not by the tokenizer: there both are state of the shared
        object, so that two threads could not use one encoder.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts is not a list of strings")
        if len(texts) == 0:
            raise ValueError("texts is empty; allowed: at least one text")
        # Command-line bytes that are no UTF-8 arrive as lone surrogates, which tokenizers refuse.
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        truncated = [len(row) > self.max_tokens for row in rows]
        rows = [self._cut(row) for row in rows]
        longest = max(len(row) for row in rows) if self.is_clip else self.max_tokens
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        return ids, mask, truncated

    def _cut(self, row: list[int]) -> list[int]:
        """Shorten to `max_tokens`: the start is kept, and so are the closing special tokens."""
        if len(row) <= self.max_tokens:
            return row
        return row[: self.max_tokens - self._closing] + row[len(row) - self._closing :]
