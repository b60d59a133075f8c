from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import videodistill
from tests.videodistill.engine.material import make_checkpoint, make_video
from videodistill import Answered, Answerer, UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    return videodistill.load(make_checkpoint(tmp_path_factory.mktemp("figure")), device="cpu")


@pytest.fixture(scope="module")
def result(model: Answerer, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    video = make_video(tmp_path_factory.mktemp("video") / "square.mp4", width=128, height=64)
    return model.answer(video, ["Costs $5, or $6?", "何が見えますか"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_picture_has_a_block_for_each_question(
    result: Answered, model: Answerer, tmp_path: Path
) -> None:
    path = tmp_path / "two.png"
    assert result.figure(path) == path
    one = model.answer(result.video, "What?").figure(tmp_path / "one.png")
    assert pixels(path).shape[1] == pixels(one).shape[1]
    assert pixels(path).shape[0] > 1.7 * pixels(one).shape[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_the_gate_colours_only_what_the_encoder_sees(
    result: Answered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gates from shut to open in every frame, whatever the random model says.
    ramps = [
        np.broadcast_to(np.linspace(0, 1, a.gates[0].size), (len(a.gates), a.gates[0].size))
        .reshape(a.gates.shape)
        .astype(np.float32)
        for a in result.answers
    ]
    answers = tuple(replace(a, gates=g) for a, g in zip(result.answers, ramps, strict=True))
    result = replace(result, answers=answers)
    drawn = pixels(result.figure(tmp_path / "with.png"))
    # The same picture without gates; whatever differs below the scores is heat-map or its scale.
    plain = pixels(replace(result, trained=False).figure(tmp_path / "without.png"))
    header = 45
    changed = (np.abs(drawn - plain).sum(-1) > 30)[header:]
    columns = changed.mean(0)
    frames = 4
    left, right = round(0.35 * 150), round((11 - 0.35 - 0.55) * 150)
    cell = (right - left) // frames
    for frame in range(frames):
        inside = columns[left + frame * cell : left + (frame + 1) * cell - 12]
        quarter = len(inside) // 4
        # A 2:1 frame: the central square is its middle half.
        assert inside[quarter + 8 : -quarter - 8].max() > 0.02
        assert inside[: quarter - 8].max() == 0 and inside[-quarter + 8 :].max() == 0


def test_the_same_answers_give_the_same_picture(result: Answered, tmp_path: Path) -> None:
    first, second = (result.figure(tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", ["a.pdf", "a.svg", "a.jpg"])
def test_the_suffix_says_the_format(result: Answered, tmp_path: Path, name: str) -> None:
    start = result.figure(tmp_path / name).read_bytes()[:5]
    assert start.startswith({"pdf": b"%PDF-", "svg": b"<?xml", "jpg": b"\xff\xd8"}[name[2:]])


def test_a_failure_leaves_no_partial_file(
    result: Answered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Figure, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    target = tmp_path / "old.png"
    target.write_bytes(b"the old picture")
    with pytest.raises(OSError, match="No space"):
        result.figure(target)
    assert [file.name for file in tmp_path.iterdir()] == ["old.png"]
    assert target.read_bytes() == b"the old picture"


def test_odd_videos_are_drawn(model: Answerer, tmp_path: Path) -> None:
    """One frame has no spread of scores; a tall and a wide video take other layouts."""
    for number, (frames, width, height) in enumerate([(1, 64, 48), (9, 32, 160), (9, 320, 32)]):
        video = make_video(
            tmp_path / f"{number}.mp4", frames=frames, width=width, height=max(height, 32)
        )
        path = model.answer(video, "what?", pick=min(frames, 6)).figure(tmp_path / f"{number}.png")
        assert np.ptp(pixels(path)) > 200


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.bmp3", "must end with one of .png"),
        ("none/a.png", "cannot write into"),
        ("folder.png", "is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(
    result: Answered, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message) as told:
        result.figure(tmp_path / name)
    assert str(tmp_path / name) in str(told.value)
