"""A run so small that it takes a second: random features, a tiny encoder, one's own questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.videodistill.tiny import tiny_clip
from videodistill.encoders import ImageTextEncoder
from videodistill.engine import feature_cache
from videodistill.training.config import TrainConfig, read_config

WIDTH, SIDE = 32, 2
COLOURS = ("red", "green", "blue", "yellow")

SETTINGS: dict[str, Any] = {
    "steps": 12,
    "save_every": 100,
    "log_every": 1,
    "precision": "fp32",
    "model": {"width": 16, "heads": 2, "frames": 6, "pick": 2, "num_samples": 8},
    "batch": {"videos": 4, "questions": 2},
    "optimiser": {"learning_rate": 3e-3, "warmup": 2},
    "validation": {"every": 6},
    "data": {"dataset": "own", "workers": 0},
}


PRETRAINING = (
    "losses={answer: 0, choice: 0, matching: 1, masked_language: 1, contrastive: 0.3}",
    "validation.metric=loss",
)


PHASES = (
    "losses.evidence=0.3",
    "optimiser.warmup=1",
    "phases.thinking={steps: 4, others: 0}",
    "phases.observing={steps: 4, sampler: 0, pick: 1, evidence_first: true}",
    "phases.answering={sampler: 0.1, others: 0.5}",
)


@dataclass(eq=False)
class Features:
    """As the feature cache gives them for a video."""

    frame_embed: torch.Tensor
    patches: torch.Tensor
    seconds: torch.Tensor
    duration: float


def features_of(videos: list[str], frames: int = 8) -> dict[str, Features]:
    """Random features; videos at odd places have fewer frames."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for number, video in enumerate(videos):
        count = frames - 3 * (number % 2)
        found[video] = Features(
            torch.randn(count, WIDTH // 2, generator=generator).half(),
            torch.randn(count, SIDE**2, WIDTH, generator=generator).half(),
            (torch.arange(count) + 0.5) * 10 / count,
            10.0,
        )
    return found


def write_cache(folder: Path, encoder: ImageTextEncoder, videos: list[str], frames: int) -> int:
    """A feature cache of random features, in shards of one video; returns their bytes."""
    folder.mkdir()
    writer = feature_cache._Writer(
        folder, feature_cache._Settings(encoder.fingerprint, frames, "fp32"), print
    )
    for number, video in enumerate(videos):
        found = features_of([video], frames)[video]
        values = found.frame_embed, found.patches, found.seconds.float(), found.duration
        writer.add(str(number), feature_cache.VideoFeatures(*values))
        writer.tell(video, feature_cache._Known(str(number), None, [0, 0]))
        writer.flush()
    return sum(path.stat().st_size for path in folder.iterdir())


def question(number: int, video: str, kind: int) -> dict[str, Any]:
    """One with choices, an open-ended one, or one about a stretch of the video."""
    asked = {"question_id": f"q{number}", "video": video}
    colour = COLOURS[number % 4]
    if kind == 0:
        choices = list(COLOURS[:3])
        answer = choices[number % 3]
        return (
            asked
            | {"question": f"which colour is {number}?", "answer": answer}
            | {"choices": choices, "type": "choice"}
        )
    asked |= {"question": f"what colour is thing {number}?", "answer": colour, "type": "open"}
    return asked if kind == 1 else asked | {"start": 2.0, "end": 7.0}


def write_dataset(folder: Path, videos: int = 7) -> list[str]:
    """train.jsonl and val.jsonl; returns the videos' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"v{number}.mp4" for number in range(videos)]
    for split, some in (("train", names[:-2]), ("val", names[-2:])):
        rows = [
            question(100 * names.index(video) + place, video, place % 3)
            for video in some
            for place in range(3 + names.index(video) % 3)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return names


def ground(folder: Path) -> None:
    """Give every third question of train.jsonl evidence."""
    file = folder / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        if number % 3 == 0:
            row["evidence"] = [[2.5 + number % 2, 6.0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_encoder(folder: Path) -> Path:
    """A tiny CLIP of the features' sizes."""
    return tiny_clip(folder, image_size=8 * SIDE, width=WIDTH)


def config_for(folder: Path, encoder: Path, out: Path, *overrides: str) -> TrainConfig:
    """A run on the dataset in a folder."""
    import yaml

    settings = SETTINGS | {"out": str(out), "encoder": str(encoder)}
    settings["data"] = settings["data"] | {"path": str(folder), "features": str(folder)}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return read_config(file, overrides)
