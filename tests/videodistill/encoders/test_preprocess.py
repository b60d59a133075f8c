"""Our preprocessing against the processors of transformers, in levels of 0..255."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from videodistill.encoders import FrameTransform, preprocess

SIDE = 32
PROCESSORS = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}
CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SIGLIP = {"size": {"height": SIDE, "width": SIDE}}
# (height, width): single pixels, odd sides, up and down, portrait and landscape, thin strips.
SIZES = [
    (1, 1),
    (1, 9),
    (17, 5),
    (31, 33),
    (32, 32),
    (32, 57),
    (48, 64),
    (97, 33),
    (3, 301),
    (241, 427),
    (480, 270),
]


def noise(height: int, width: int, count: int = 2) -> np.ndarray:
    """Frames of noise: the hardest input for a resampling filter.

    Of low contrast where Pillow 13 takes the two passes in the other order: then no pass
    overshoots 0..255 and the order makes no difference.
    """
    generator = np.random.default_rng(height * 1000 + width)
    low, high = (80, 176) if height > 2 * width else (0, 256)
    return generator.integers(low, high, (count, height, width, 3), dtype=np.uint8)


def assert_same_levels(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within one level; of noise, fewer than one value in 2,000 may be two off."""
    difference = (ours.double() - theirs.double()).abs().round()
    assert difference.max() <= 2
    assert (difference > 1).double().mean() < 1 / 2000


def levels(pixels: torch.Tensor, transform: FrameTransform) -> torch.Tensor:
    """Undo normalisation and rescaling."""
    mean = torch.tensor(transform.mean).view(1, 3, 1, 1)
    std = torch.tensor(transform.std).view(1, 3, 1, 1)
    return (pixels.cpu() * std + mean) / transform.scale


def processed(model_type: str, settings: dict[str, Any], frames: np.ndarray) -> torch.Tensor:
    processor = PROCESSORS[model_type](**settings)
    # The layout is named because a processor guesses it, wrongly for frames 1 or 3 pixels high.
    return processor(list(frames), return_tensors="pt", input_data_format="channels_last")[
        "pixel_values"
    ]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("clip", CLIP),
        ("clip", {"size": {"shortest_edge": 40}, "crop_size": CLIP["crop_size"]}),
        ("clip", {**CLIP, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}),
        ("siglip", SIGLIP),
        ("siglip", {**SIGLIP, "resample": 2}),
    ],
    ids=["clip", "clip-crop", "clip-own-mean", "siglip", "siglip-bilinear"],
)
def test_equals_processor(model_type: str, settings: dict[str, Any], size: tuple[int, int]) -> None:
    frames = noise(*size)
    transform = FrameTransform.from_settings(settings, model_type=model_type, image_size=SIDE)
    ours = transform(frames)
    theirs = processed(model_type, settings, frames)
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape == (2, 3, SIDE, SIDE)
    assert ours.is_contiguous()
    assert_same_levels(levels(ours, transform), levels(theirs, transform))


def test_smooth_frames_are_within_one_level() -> None:
    """What videos look like: gradients and edges, no noise."""
    y, x = np.mgrid[0:270, 0:480]
    red = 128 + 100 * np.sin(x / 37) * np.cos(y / 23)
    disc = 255.0 * ((x - 200) ** 2 + (y - 100) ** 2 < 60**2)
    frames = np.stack([red, disc, x * 255 / 479], axis=-1)[None].astype(np.uint8)
    for model_type, settings in (
        ("clip", CLIP),
        ("siglip", SIGLIP),
        ("siglip", {**SIGLIP, "resample": 2}),
    ):
        transform = FrameTransform.from_settings(settings, model_type=model_type, image_size=SIDE)
        theirs = processed(model_type, settings, frames)
        difference = levels(transform(frames), transform) - levels(theirs, transform)
        assert difference.abs().max() < 1.01


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_float_path_equals_pil(size: tuple[int, int]) -> None:
    """The path of devices without a uint8 kernel, against PIL across and then down."""
    frames = noise(*size)
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    ours = preprocess._resize_in_float(images, 28, 44, "bicubic")
    bicubic = Image.Resampling.BICUBIC
    theirs = [
        np.asarray(Image.fromarray(frame).resize((44, size[0]), bicubic).resize((44, 28), bicubic))
        for frame in frames
    ]
    assert_same_levels(ours, torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(("model_type", "settings"), [("clip", CLIP), ("siglip", SIGLIP)])
def test_equals_processor_on_gpu(
    model_type: str, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    frames = noise(*size)
    transform = FrameTransform.from_settings(settings, model_type=model_type, image_size=SIDE)
    ours = transform(frames, "cuda")
    assert ours.device.type == "cuda"
    theirs = processed(model_type, settings, frames)
    assert_same_levels(levels(ours, transform), levels(theirs, transform))


@pytest.mark.parametrize(
    ("model_type", "settings", "same_as"),
    [
        ("clip", {}, CLIP),
        ("clip", {"size": SIDE, "crop_size": SIDE}, CLIP),
        ("clip", {"size": {"height": SIDE, "width": SIDE}}, {**CLIP, **SIGLIP}),
        ("siglip", {}, SIGLIP),
        ("siglip", {"size": SIDE}, SIGLIP),
    ],
)
def test_every_spelling_of_the_size(
    model_type: str, settings: dict[str, Any], same_as: dict[str, Any]
) -> None:
    frames = noise(40, 70)
    transform = FrameTransform.from_settings(settings, model_type=model_type, image_size=SIDE)
    theirs = processed(model_type, same_as, frames)
    assert_same_levels(levels(transform(frames), transform), levels(theirs, transform))


@pytest.mark.parametrize(
    ("model_type", "settings", "named"),
    [
        ("clip", {"do_resize": False}, "do_resize"),
        ("clip", {"do_center_crop": False}, "do_center_crop"),
        ("siglip", {"do_normalize": False}, "do_normalize"),
        ("siglip", {"resample": 0}, "resample is 0"),
        ("clip", {"size": {"shortest_edge": 24}}, "32x32"),
        ("clip", {"crop_size": 48, "size": 48}, "32x32"),
        ("siglip", {"size": {"height": 32, "width": 48}}, "not a square"),
        ("clip", {"size": "large"}, "not a square"),
        ("clip", {"image_mean": [0.5]}, "image_mean"),
        ("clip", {"image_std": [0.5, 0, 0.5]}, "image_std"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    model_type: str, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        FrameTransform.from_settings(settings, model_type=model_type, image_size=SIDE)


def test_any_memory_layout_gives_the_same_pixels() -> None:
    transform = FrameTransform.from_settings({}, model_type="clip", image_size=SIDE)
    frames = noise(50, 81)
    expected = transform(frames)
    read_only = frames.copy()
    read_only.flags.writeable = False
    mirrored_twice = frames[:, :, ::-1].copy()[:, :, ::-1]  # negative strides
    for other in (torch.from_numpy(frames), read_only, mirrored_twice):
        torch.testing.assert_close(transform(other), expected, rtol=0, atol=0)
    assert np.array_equal(frames, noise(50, 81)), "the input was written to"


def test_small_groups_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = FrameTransform.from_settings({}, model_type="clip", image_size=SIDE)
    frames = noise(40, 300, count=5)
    expected = transform(frames)
    monkeypatch.setattr(preprocess, "_RESIZED_BYTES", 1)
    torch.testing.assert_close(transform(frames), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 8, 8, 3), dtype=np.float32),
        torch.zeros(1, 8, 8, 3),
        np.zeros((8, 8, 3), dtype=np.uint8),
        np.zeros((1, 3, 8, 8), dtype=np.uint8),
        np.zeros((1, 0, 8, 3), dtype=np.uint8),
        [[1]],
    ],
)
def test_other_inputs_are_refused(frames: Any) -> None:
    transform = FrameTransform.from_settings({}, model_type="clip", image_size=SIDE)
    with pytest.raises(ValueError, match=r"frames .* allowed"):
        transform(frames)
