"""Features of a split of videos, computed once by the frozen encoder and kept in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from videodistill.engine.feature_cache import encode_video, start_encoder
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
        parts = []
        with map_in_processes(
            encode_video, jobs, workers, start_encoder, str(encoder_folder)
        ) as results:
            for done, encoded in enumerate(results, start=1):
                parts.append(encoded.features())
                if log and 10 * done // len(jobs) > 10 * (done - 1) // len(jobs):
                    log(f"features of {target.stem}: {done}/{len(jobs)} videos")
        tensors = {
            "frame_embed": torch.stack([part.frame_embed for part in parts]),
            "patches": torch.stack([part.patches for part in parts]),
            "seconds": torch.stack([part.seconds for part in parts]),
            "durations": torch.tensor([part.duration for part in parts], dtype=torch.float32),
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
