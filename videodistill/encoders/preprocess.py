"""From decoded frames to a vision tower's input, on tensors, on the device of the tower.

The processors of `transformers` work image by image through PIL, or need torchvision. This does
the same arithmetic on whole batches: resize with antialias, centre crop, rescale, normalise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# PIL's numbers for the filters that PyTorch has with antialias.
_FILTERS = {2: "bilinear", 3: "bicubic"}

# What CLIP and SigLIP were trained with, for a directory that does not say.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "clip": {
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "siglip": {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
}

# Resized frames held at once, in bytes: a very wide frame is very wide before the crop as well.
_RESIZED_BYTES = 1 << 26


@dataclass(frozen=True)
class FrameTransform:
    """Resize, centre crop, rescale and normalise frames as an encoder's own processor does.

    keep_aspect: True resizes the shorter edge to `image_size` and crops the centre (CLIP); False
        resizes to the exact square (SigLIP).
    resize_to: the shorter edge after resizing; only with keep_aspect may it exceed `image_size`.
    filter: "bicubic" or "bilinear", with antialias.
    scale: factor from 0..255 levels to the units of mean and std, per channel.
    """

    image_size: int
    resize_to: int
    keep_aspect: bool
    filter: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], *, model_type: str, image_size: int
    ) -> FrameTransform:
        """Read the content of a `preprocessor_config.json`; what it does not say is as published.

        model_type: "clip" or "siglip". image_size: side of the vision tower's input in pixels.
        Raises ValueError, in one line, for settings that cannot give that input.
        """
        switches = ["do_resize", "do_rescale", "do_normalize"]
        if model_type == "clip":
            switches.append("do_center_crop")
        for switch in switches:
            if not settings.get(switch, True):
                raise ValueError(f"{switch} is false; frames must be resized and normalised")
        resample = settings.get("resample", 3)
        if resample not in _FILTERS:
            raise ValueError(f"resample is {resample!r}; 2 (bilinear) and 3 (bicubic) are known")
        keep_aspect, resize_to = _resized_edge(settings.get("size"), model_type, image_size)
        crop = _square(settings.get("crop_size", image_size)) if keep_aspect else resize_to
        if crop != image_size or resize_to < crop:
            raise ValueError(
                f"size {settings.get('size')} and crop_size {settings.get('crop_size')} do not "
                f"give the {image_size}x{image_size} pixels of the vision tower"
            )
        published = _PUBLISHED[model_type]
        return cls(
            image_size=image_size,
            resize_to=resize_to,
            keep_aspect=keep_aspect,
            filter=_FILTERS[resample],
            scale=float(settings.get("rescale_factor", 1 / 255)),
            mean=_per_channel("image_mean", settings.get("image_mean", published["image_mean"])),
            std=_per_channel("image_std", settings.get("image_std", published["image_std"])),
        )

    def __call__(
        self, frames: np.ndarray | torch.Tensor, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """uint8 [n,H,W,3] RGB (numpy or tensor) to float32 [n,3,image_size,image_size].

        Equal to the processor (PIL) within 1 level of 255; in frames of pure noise one value in
        some thousands is 2 levels off. Pillow 13 and later resize some frames, tall ones above
        all, down before across; we keep to across before down, as when the published encoders
        were trained. It makes a difference only where the first pass overshoots 0..255.
        device: where the work is done and the result lies; None: where the frames are.
        Raises ValueError for another dtype or shape.
        """
        frames = _as_tensor(frames)
        if device is not None:
            frames = frames.to(device)
        frames = frames.permute(0, 3, 1, 2)
        height, width = self._resized_shape(frames.shape[2], frames.shape[3])
        group = max(1, _RESIZED_BYTES // (3 * height * width))
        pixels = torch.cat(
            [
                self._centre(_resize(part, height, width, self.filter))
                for part in frames.split(group)
            ]
        )
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return pixels.mul_(self.scale).sub_(mean).div_(std)

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        if not self.keep_aspect:
            return self.resize_to, self.resize_to
        short, long = sorted((height, width))
        long = int(self.resize_to * long / short)  # truncated, as the processor does
        return (self.resize_to, long) if height <= width else (long, self.resize_to)

    def _centre(self, images: torch.Tensor) -> torch.Tensor:
        top = (images.shape[2] - self.image_size) // 2
        left = (images.shape[3] - self.image_size) // 2
        return images[:, :, top : top + self.image_size, left : left + self.image_size]


def _resize(images: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """Resize uint8 [n,3,H,W]; whole levels 0..255, as uint8 on the CPU and float32 elsewhere."""
    if images.shape[2:] == (height, width):
        return images
    if images.device.type == "cpu":
        return F.interpolate(images, size=(height, width), mode=mode, antialias=True)
    return _resize_in_float(images, height, width, mode)


def _resize_in_float(images: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """The same for devices without a uint8 kernel: across, then down, each to whole levels.

    Both passes at once would differ by some 20 levels where the first leaves 0..255: PIL keeps
    bytes between them.
    """
    levels = images.float()
    for size in ((images.shape[2], width), (height, width)):
        levels = F.interpolate(levels, size=size, mode=mode, antialias=True)
        levels = levels.clamp_(0, 255).round_()
    return levels


def _as_tensor(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Check dtype and shape; arrays that torch cannot share (read-only, reversed) are copied."""
    if isinstance(frames, np.ndarray) and frames.dtype == np.uint8:
        frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
    if not isinstance(frames, torch.Tensor) or frames.dtype != torch.uint8:
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise ValueError(f"frames is {kind}; allowed: a uint8 array or tensor")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames has shape {tuple(frames.shape)}; allowed: [n,H,W,3], none of them 0"
        )
    return frames


def _resized_edge(size: Any, model_type: str, image_size: int) -> tuple[bool, int]:
    """(keep_aspect, edge in pixels) of a processor's `size`, in any of its spellings."""
    if isinstance(size, Mapping):
        if set(size) == {"shortest_edge"}:
            return True, int(size["shortest_edge"])
        return False, _square(size)
    # A bare number meant the shorter edge for CLIP and the square for SigLIP.
    return model_type == "clip", image_size if size is None else _square(size)


def _square(size: Any) -> int:
    """Side of a square given as 224 or {"height": 224, "width": 224}."""
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        sides = {int(size["height"]), int(size["width"])}
        if len(sides) == 1:
            return sides.pop()
    elif isinstance(size, int):
        return size
    raise ValueError(f"size {size!r} is not a square; only square inputs are known")


def _per_channel(name: str, values: Any) -> tuple[float, ...]:
    values = tuple(float(value) for value in values)
    if len(values) != 3 or (name == "image_std" and 0 in values):
        raise ValueError(f"{name} is {values}; three numbers are needed, and none 0 in image_std")
    return values
