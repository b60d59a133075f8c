"""The encoder's features against transformers' own models, called independently."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, SiglipModel

from tests.videodistill.tiny import tiny_siglip
from videodistill.encoders import ImageTextEncoder, load_encoder

TEXTS = ["What colour is the small circle?", "yes", "", "日本語の質問", "سؤال 😀", "É" * 5]
LONG = "how many objects moved before " * 20


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 45, 70, 3), dtype=np.uint8)


def test_clip_frames(clip: ImageTextEncoder, clip_dir: Path, frames: np.ndarray) -> None:
    model = CLIPModel.from_pretrained(clip_dir).eval()
    with torch.no_grad():
        pixels = clip.preprocess(frames)
        vision = model.vision_model(pixel_values=pixels)
        embed = model.visual_projection(vision.pooler_output)
    features = clip.encode_frames(frames)
    assert features.frame_embed.shape == (5, clip.embed_dim) == (5, 16)
    assert features.patches.shape == (5, clip.grid[0] * clip.grid[1], clip.patch_dim) == (5, 16, 32)
    torch.testing.assert_close(features.frame_embed, embed)
    torch.testing.assert_close(features.patches, vision.last_hidden_state[:, 1:])


def test_siglip_frames(siglip: ImageTextEncoder, siglip_dir: Path, frames: np.ndarray) -> None:
    model = SiglipModel.from_pretrained(siglip_dir).eval()
    with torch.no_grad():
        vision = model.vision_model(pixel_values=siglip.preprocess(frames))
    features = siglip.encode_frames(frames)
    assert features.frame_embed.shape == (5, siglip.embed_dim) == (5, 32)
    assert features.patches.shape == (5, 16, siglip.patch_dim) == (5, 16, 32)
    torch.testing.assert_close(features.frame_embed, vision.pooler_output)
    torch.testing.assert_close(features.patches, vision.last_hidden_state)


def test_patches_go_row_by_row(clip: ImageTextEncoder) -> None:
    """A change in one cell of the grid moves that patch of the embedding layer most."""
    grey = np.full((1, 32, 32, 3), 128, dtype=np.uint8)
    marked = grey.copy()
    marked[:, 8:16, 24:32] = 255  # row 1, column 3
    embeddings = clip.model.vision_model.embeddings
    with torch.no_grad():
        change = embeddings(clip.preprocess(marked)) - embeddings(clip.preprocess(grey))
    assert change[0, 1:].norm(dim=-1).argmax() == 1 * clip.grid[1] + 3


def test_one_pass_of_the_tower_a_batch(clip: ImageTextEncoder, frames: np.ndarray) -> None:
    passes: list[int] = []
    hook = clip.model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    try:
        whole = clip.encode_frames(frames)
        assert len(passes) == 1
        parts = clip.encode_frames(frames, batch_size=2)
        assert len(passes) == 1 + 3
    finally:
        hook.remove()
    torch.testing.assert_close(parts.frame_embed, whole.frame_embed)
    torch.testing.assert_close(parts.patches, whole.patches)


def test_clip_texts(clip: ImageTextEncoder, clip_dir: Path) -> None:
    batch = AutoTokenizer.from_pretrained(clip_dir)(
        [*TEXTS, LONG], padding=True, truncation=True, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(clip_dir).eval()
    with torch.no_grad():
        output = model.get_text_features(**batch)
    features = clip.encode_texts([*TEXTS, LONG])
    assert torch.equal(features.mask, batch["attention_mask"].bool())
    assert features.tokens.shape == (*batch["input_ids"].shape, clip.token_dim)
    assert features.truncated == [False] * len(TEXTS) + [True]
    torch.testing.assert_close(features.text_embed, output.pooler_output)
    real = features.mask
    torch.testing.assert_close(features.tokens[real], output.last_hidden_state[real])


def test_siglip_texts(siglip: ImageTextEncoder, siglip_dir: Path) -> None:
    batch = AutoTokenizer.from_pretrained(siglip_dir)(
        [*TEXTS, LONG], padding="max_length", truncation=True, return_tensors="pt"
    )
    model = SiglipModel.from_pretrained(siglip_dir).eval()
    with torch.no_grad():
        # Without the mask, as SigLIP was trained: its text embedding is read at the last position.
        output = model.get_text_features(input_ids=batch["input_ids"])
    features = siglip.encode_texts([*TEXTS, LONG])
    assert features.tokens.shape == (len(TEXTS) + 1, siglip.max_tokens, siglip.token_dim)
    assert torch.equal(features.mask, batch["attention_mask"].bool())
    assert features.truncated == [False] * len(TEXTS) + [True]
    torch.testing.assert_close(features.text_embed, output.pooler_output)
    torch.testing.assert_close(features.tokens, output.last_hidden_state)


def test_a_text_does_not_depend_on_its_company(
    clip: ImageTextEncoder, siglip: ImageTextEncoder
) -> None:
    for encoder in (clip, siglip):
        together = encoder.encode_texts(TEXTS)
        for index, text in enumerate(TEXTS):
            alone = encoder.encode_texts([text])
            torch.testing.assert_close(alone.text_embed[0], together.text_embed[index])
            assert alone.mask.sum() == together.mask[index].sum()


def test_zero_shot_equals_clip(clip: ImageTextEncoder, clip_dir: Path, frames: np.ndarray) -> None:
    model = CLIPModel.from_pretrained(clip_dir).eval()
    tokens = AutoTokenizer.from_pretrained(clip_dir)(TEXTS, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(clip_dir)(list(frames), return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, **pixels).logits_per_image
    image = torch.nn.functional.normalize(clip.encode_frames(frames).frame_embed, dim=-1)
    text = torch.nn.functional.normalize(clip.encode_texts(TEXTS).text_embed, dim=-1)
    ours = clip.logit_scale * image @ text.T + clip.logit_bias
    # The pixels differ by up to one level, so the features do too.
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02 * clip.logit_scale)
    assert torch.equal(ours.argmax(dim=-1), expected.argmax(dim=-1))


def test_siglip_scale_and_bias(tmp_path: Path, frames: np.ndarray) -> None:
    folder = tiny_siglip(tmp_path)
    model = SiglipModel.from_pretrained(folder).eval()
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-7.0)
    model.save_pretrained(folder)
    encoder = load_encoder(folder)
    assert encoder.logit_scale == pytest.approx(np.exp(2.0))
    assert encoder.logit_bias == -7.0
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model(
            input_ids=tokens["input_ids"], pixel_values=encoder.preprocess(frames)
        ).logits_per_image
    image = torch.nn.functional.normalize(encoder.encode_frames(frames).frame_embed, dim=-1)
    text = torch.nn.functional.normalize(encoder.encode_texts(TEXTS).text_embed, dim=-1)
    torch.testing.assert_close(encoder.logit_scale * image @ text.T + encoder.logit_bias, expected)


def test_ten_thousand_words_are_cut_quickly(clip: ImageTextEncoder) -> None:
    words = [f"word{index}" for index in range(10_000)]
    started = time.perf_counter()
    features = clip.encode_texts([" ".join(words)])
    assert time.perf_counter() - started < 5
    assert features.truncated == [True]
    assert features.mask.shape == (1, clip.max_tokens)
    start = clip.encode_texts([" ".join(words[:30])])
    torch.testing.assert_close(features.text_embed, start.text_embed)


def test_the_longest_text_that_fits_is_whole(clip: ImageTextEncoder) -> None:
    fits = " ".join(["a"] * (clip.max_tokens - 2))  # start and end tokens take two
    assert clip.encode_texts([fits, fits + " a"]).truncated == [False, True]


def test_bytes_that_are_no_utf8_are_replaced(clip: ImageTextEncoder) -> None:
    from_command_line = b"is it \xff red".decode("utf-8", "surrogateescape")
    features = clip.encode_texts([from_command_line, "is it ? red"])
    torch.testing.assert_close(features.text_embed[0], features.text_embed[1])


def test_threads_share_an_encoder(clip: ImageTextEncoder) -> None:
    batches = [TEXTS[:count] + [LONG] * (count % 2) for count in range(1, 7)] * 4
    expected = [clip.encode_texts(batch).text_embed for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        features = list(pool.map(clip.encode_texts, batches))
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours.text_embed, theirs)


def test_frozen_within_a_model_in_training(clip: ImageTextEncoder, frames: np.ndarray) -> None:
    whole = torch.nn.ModuleDict({"encoder": clip, "head": torch.nn.Linear(clip.embed_dim, 1)})
    whole.train()
    assert whole["head"].training
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    features = clip.encode_frames(frames)
    assert not features.frame_embed.requires_grad
    # Ordinary tensors: a layer that is being trained may keep them for its backward pass.
    whole["head"](features.frame_embed).sum().backward()
    assert whole["head"].weight.grad is not None


def test_wrong_inputs(clip: ImageTextEncoder) -> None:
    with pytest.raises(ValueError, match="frames is empty"):
        clip.encode_frames(np.zeros((0, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="texts is empty"):
        clip.encode_texts([])
    with pytest.raises(TypeError, match="list of strings"):
        clip.encode_texts("one text")
    with pytest.raises(TypeError, match="list of strings"):
        clip.encode_texts([b"bytes"])  # type: ignore[list-item]
