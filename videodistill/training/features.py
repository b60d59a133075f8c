"""Features of a split of videos, computed once by the frozen encoder and kept in one file."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Job, Result = TypeVar("Job"), TypeVar("Result")


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


@contextmanager
def map_in_processes(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    start: Callable[..., None],
    *arguments: object,
) -> Iterator[Iterator[Result]]:
    """Results of ``function`` on ``jobs``, in order, from processes that ``start`` prepared.

    With one worker everything happens here: starting a process takes seconds of importing torch.
    """
    if workers == 1:
        start(*arguments)
        yield map(function, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, start, arguments) as pool:
        yield pool.imap(function, jobs, chunksize=max(1, min(8, len(jobs) // workers)))


def extract(
    folder: Path,
    videos: Sequence[str],
    encoder_folder: Path,
    frames: int,
    target: Path,
    *,
    workers: int,
) -> Features:
    """Features of videos, from ``target`` if it holds those of the same videos and encoder.

    Args:
        folder: Of the video files.
        videos: Their paths in it; each must hold at least ``frames`` frames.
        encoder_folder: Of the encoder.
        frames: N.
        target: A safetensors file.
        workers: Processes.
    """
    from videodistill.encoders import load_encoder

    origin = {
        "videos": list(videos),
        "frames": frames,
        "encoder": load_encoder(encoder_folder).fingerprint,
    }
    if target.exists():
        with safe_open(target, "pt") as file:
            if json.loads(file.metadata()["origin"]) == origin:
                return Features(
                    tuple(videos),
                    **{name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                )
    jobs = [(str(folder / video), frames) for video in videos]
    parts: tuple[list, ...] = ([], [], [], [])
    with map_in_processes(_extract_one, jobs, workers, _start, str(encoder_folder)) as results:
        for result in results:
            for part, value in zip(parts, result, strict=True):
                part.append(value)
    tensors = {
        "frame_embed": torch.from_numpy(np.stack(parts[0])),
        "patches": torch.from_numpy(np.stack(parts[1])),
        "seconds": torch.from_numpy(np.stack(parts[2])),
        "durations": torch.tensor(parts[3], dtype=torch.float32),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    save_file(tensors, temporary, {"origin": json.dumps(origin)})
    os.replace(temporary, target)
    return Features(tuple(videos), **tensors)
