"""Features: what is kept is used again, and what is damaged or foreign is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.videodistill.engine.material import make_video
from tests.videodistill.tiny import tiny_clip
from videodistill.encoders import load_encoder
from videodistill.training.features import Features, extract
from videodistill.video import FrameReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    make_video(folder / "a.mp4", frames=12)
    make_video(folder / "b.mp4", frames=30, width=48)
    tiny_clip(folder / "encoder")
    tiny_clip(folder / "other", seed=1)
    return folder


def made(
    folder: Path, target: Path, encoder: str = "encoder", frames: int = 4
) -> tuple[Features, bool]:
    """Features of both videos, and whether they had to be computed."""
    lines: list[str] = []
    features = extract(
        folder, ["a.mp4", "b.mp4"], folder / encoder, frames, target, workers=1, log=lines.append
    )
    return features, bool(lines)


def test_features_are_what_the_encoder_gives(folder: Path, tmp_path: Path) -> None:
    features, _ = made(folder, tmp_path / "deep" / "x.safetensors")
    assert features.videos == ("a.mp4", "b.mp4")
    with FrameReader(folder / "b.mp4") as reader:
        sampled = reader.sample(4)
        seen = load_encoder(folder / "encoder").encode_frames(sampled.images)
        assert features.durations[1].item() == pytest.approx(reader.duration)
    assert torch.equal(features.frame_embed[1], seen.frame_embed.half())
    assert torch.equal(features.patches[1], seen.patches.half())
    assert features.seconds[1].tolist() == pytest.approx(sampled.times.tolist())
    assert features.times[1].tolist() == pytest.approx((sampled.times / reader.duration).tolist())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_what_is_there_is_used_and_what_does_not_fit_is_not(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    first, computed = made(folder, target)
    assert computed
    again, computed = made(folder, target)
    assert not computed
    assert torch.equal(first.patches, again.patches)
    assert torch.equal(first.durations, again.durations)
    other, computed = made(folder, target, "other")
    assert computed and not torch.equal(first.patches, other.patches)
    assert made(folder, target, "other", frames=5)[1]
    for damaged in (b"", target.read_bytes()[:100], b"\x10" * 64):
        target.write_bytes(damaged)
        assert made(folder, target)[1]
    save_file({"patches": torch.zeros(1)}, target)  # says nothing of where it comes from
    assert made(folder, target)[1]


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"the first bytes")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("videodistill.training.features.save_file", full)
    with pytest.raises(SafetensorError):
        made(folder, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
