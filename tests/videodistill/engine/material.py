"""Tiny videos and checkpoints that the tests of engine and command line share."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch

from tests.videodistill.tiny import tiny_clip
from videodistill.encoders import load_encoder
from videodistill.model import VideoDistill

VOCABULARY = ["red", "green", "blue", "yes", "no", "left", "right"]


def make_video(
    path: Path, *, frames: int = 30, width: int = 64, height: int = 48, codec: str = "mpeg4"
) -> Path:
    """A red square that crosses a grey field, 10 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            image = np.full((height, width, 3), 60 + 3 * i % 120, np.uint8)
            left = (width - 16) * i // max(frames - 1, 1)
            image[16:32, left : left + 16] = (220, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def make_checkpoint(folder: Path, *, seed: int = 0, **settings: object) -> Path:
    """A head with random weights everywhere, so that its answers depend on the video."""
    encoder = load_encoder(tiny_clip(folder / "encoder"))
    defaults = {"width": 32, "heads": 2, "frames": 16, "pick": 4, "answers": VOCABULARY}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoDistill.for_encoder(encoder, **(defaults | settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder
