"""Features of a split of videos, computed once by the frozen encoder and kept in one file."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from videodistill.processes import map_in_processes


@dataclass(frozen=True)
class Features:
    """What the encoder sees in V videos at N frames each; rows in the order of ``videos``."""

    videos: tuple[str, ...]
    frame_embed: Tensor
    """float16 [V,N,C_a]."""
    patches: Tensor
    """float16 [V,N,S,C_v]."""
    seconds: Tensor
    """float32 [V,N]: when each frame is."""
    durations: Tensor
    """float32 [V], seconds."""

    @property
    def times(self) -> Tensor:
        """float32 [V,N]: when each frame is, as a fraction of its video."""
        return self.seconds / self.durations[:, None]


_encoder = None


def _start(encoder_folder: str) -> None:
    from videodistill.encoders import load_encoder

    global _encoder
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # one process a core
    _encoder = load_encoder(encoder_folder)


def _extract_one(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    from videodistill.video import FrameReader

    path, frames = job
    with FrameReader(path) as reader:
        sampled = reader.sample(frames)
        duration = reader.duration
    features = _encoder.encode_frames(sampled.images)
    return (
        features.frame_embed.half().numpy(),
        features.patches.half().numpy(),
        np.asarray(sampled.times, np.float32),
        duration,
    )


def extract(
    folder: Path,
    videos: Sequence[str],
    encoder_folder: Path,
    frames: int,
    target: Path,
    *,
    workers: int,
    log: Callable[[str], None] | None = None,
) -> Features:
    """Features of videos, from ``target`` if it holds those of the same videos and encoder.

    Videos are told apart by their names: whoever makes other videos of the same names removes
    ``target``.

    Args:
        folder: Of the video files.
        videos: Their paths in it; each must hold at least ``frames`` frames.
        encoder_folder: Of the encoder.
        frames: N.
        target: A safetensors file; one that is damaged or of other videos is written anew.
        workers: Processes.
        log: Called with a line for each tenth of the work.

    Raises:
        UserError: The encoder or a video cannot be read.
        OSError, SafetensorError: ``target`` cannot be written.
    """
    from videodistill.encoders import load_encoder

    origin = {
        "videos": list(videos),
        "frames": frames,
        "encoder": load_encoder(encoder_folder).fingerprint,
    }
    tensors = _stored(target, origin)
    if tensors is None:
        jobs = [(str(folder / video), frames) for video in videos]
        parts: tuple[list, ...] = ([], [], [], [])
        with map_in_processes(_extract_one, jobs, workers, _start, str(encoder_folder)) as results:
            for done, result in enumerate(results, start=1):
                for part, value in zip(parts, result, strict=True):
                    part.append(value)
                if log and 10 * done // len(jobs) > 10 * (done - 1) // len(jobs):
                    log(f"features of {target.stem}: {done}/{len(jobs)} videos")
        tensors = {
            "frame_embed": torch.from_numpy(np.stack(parts[0])),
            "patches": torch.from_numpy(np.stack(parts[1])),
            "seconds": torch.from_numpy(np.stack(parts[2])),
            "durations": torch.tensor(parts[3], dtype=torch.float32),
        }
        _store(target, tensors, origin)
    return Features(tuple(videos), **tensors)


def _stored(target: Path, origin: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a file, if it is whole and has that origin."""
    if not target.exists():
        return None
    try:
        with safe_open(target, "pt") as file:
            if json.loads((file.metadata() or {}).get("origin", "null")) == origin:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError):
        pass
    return None


def _store(target: Path, tensors: dict[str, Tensor], origin: dict[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two runs that make the same features at once must not write into one file.
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, temporary, {"origin": json.dumps(origin)})
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
