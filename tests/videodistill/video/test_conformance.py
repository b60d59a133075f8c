"""The frame asked for is the frame got: codecs, containers and ways of telling time."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.videodistill.video.painted import cut, read_numbers, set_display_matrix, write_video
from videodistill.video import FrameReader

COUNT = 60
STEADY = tuple(range(COUNT))
UNSTEADY = tuple(
    np.cumsum(np.random.default_rng(7).integers(1, 9, COUNT)).astype(int).tolist()
)  # in 1/120 s: frames last from 8 to 67 ms


def x264(extra: str = "") -> dict[str, str]:
    return {"preset": "veryfast", "x264-params": f"keyint=17:scenecut=0:bframes=3{extra}"}


def x265(extra: str = "") -> dict[str, str]:
    return {
        "preset": "ultrafast",
        "x265-params": f"keyint=17:bframes=3:pools=1:log-level=none{extra}",
    }


@dataclass(frozen=True)
class Case:
    codec: str
    backend: str  # what "auto" must choose, decord being installed
    pts: tuple[int, ...] = STEADY
    time_base: Fraction = Fraction(1, 30)
    size: tuple[int, int] = (64, 64)
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    numbers: tuple[int, ...] | None = None


VFR = {"pts": UNSTEADY, "time_base": Fraction(1, 120)}
B_FRAMES = {"g": "12", "bf": "2"}
CASES = {
    "h264.mp4": Case("libx264", "decord", options=x264()),
    "h264.mkv": Case("libx264", "decord", options=x264()),
    "h264_variable_rate.mp4": Case("libx264", "decord", options=x264(), **VFR),
    "h264_variable_rate.mkv": Case("libx264", "decord", options=x264(), **VFR),
    "h264_late_start.mp4": Case(
        "libx264", "decord", pts=tuple(i + 77 for i in STEADY), options=x264()
    ),
    "h264_open_gop.mp4": Case("libx264", "pyav", options=x264(":open-gop=1:bframes=2")),
    "h264_open_gop.mkv": Case("libx264", "pyav", options=x264(":open-gop=1:bframes=2")),
    "h264_intra_refresh.mp4": Case("libx264", "pyav", options=x264(":intra-refresh=1:bframes=0")),
    "h264_10_bit.mp4": Case("libx264", "pyav", pix_fmt="yuv420p10le", options=x264()),
    "h264_444.mp4": Case("libx264", "pyav", pix_fmt="yuv444p", options=x264()),
    "h264_odd_size.mkv": Case("libx264", "pyav", size=(67, 71), pix_fmt="yuv444p", options=x264()),
    "h264.ts": Case("libx264", "pyav", options=x264(":open-gop=1")),
    "h264.flv": Case("libx264", "pyav", options=x264()),
    "h264.avi": Case("libx264", "pyav", options=x264()),  # no times that could be relied on
    "bare.h264": Case("libx264", "pyav", options=x264()),  # no times at all
    "hevc.mp4": Case("libx265", "decord", options=x265(":open-gop=0")),
    "hevc_open_gop.mp4": Case("libx265", "pyav", options=x265(":open-gop=1")),
    "hevc_leading.mp4": Case("libx265", "decord", options=x265(":open-gop=0:radl=2")),
    "vp9.webm": Case(
        "libvpx-vp9", "decord", options={"deadline": "realtime", "cpu-used": "8", "g": "17"}
    ),
    "vp9_hidden_frames.mp4": Case(
        "libvpx-vp9",
        "decord",
        options={"cpu-used": "8", "g": "17", "auto-alt-ref": "1", "lag-in-frames": "16"},
    ),
    "vp8.webm": Case(
        "libvpx", "decord", options={"deadline": "realtime", "cpu-used": "8", "g": "17"}
    ),
    "av1.mp4": Case("libsvtav1", "pyav", options={"preset": "10", "crf": "20", "g": "17"}),
    "mpeg4.mp4": Case("mpeg4", "pyav", options=B_FRAMES),
    "mpeg4.avi": Case("mpeg4", "pyav", options=B_FRAMES),
    "mpeg2.mpg": Case("mpeg2video", "pyav", time_base=Fraction(1, 25), options=B_FRAMES),
    "mpeg2.ts": Case("mpeg2video", "pyav", time_base=Fraction(1, 25), options=B_FRAMES),
    "wmv2.asf": Case("wmv2", "pyav", time_base=Fraction(1, 25), options={"g": "12"}),
    "animated.gif": Case("gif", "pyav", time_base=Fraction(1, 10), pix_fmt="rgb8"),
    "ffv1.mkv": Case("ffv1", "pyav"),
    "one_frame.mp4": Case("libx264", "decord", pts=(0,), options=x264()),
    "one_pixel.mkv": Case(
        "ffv1", "pyav", size=(1, 1), pix_fmt="yuv444p", numbers=(0, 65535) * (COUNT // 2)
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("painted")


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, folder: Path) -> tuple[Case, Path]:
    case = CASES[request.param]
    path = folder / request.param
    write_video(
        path,
        case.codec,
        case.pts,
        time_base=case.time_base,
        size=case.size,
        pix_fmt=case.pix_fmt,
        options=case.options,
        numbers=case.numbers,
    )
    return case, path


def requests(count: int) -> list[np.ndarray]:
    """Orders in which frames are asked for: each, any, repeated, backwards, sparse, single."""
    random = np.random.default_rng(3)
    sparse = [np.sort(random.choice(count, min(count, n), replace=False)) for n in (3, 9, 20)]
    single = [np.array([i]) for i in random.permutation(count)[:6]]
    return [
        np.arange(count),
        random.permutation(count),
        np.arange(count)[::-1],
        random.integers(0, count, 12),
        *sparse,
        *single,
    ]


def assert_conforms(reader: FrameReader, numbers: np.ndarray) -> None:
    assert reader.frame_count == len(numbers)
    for wanted in requests(len(numbers)):
        assert read_numbers(reader.read(wanted)) == numbers[wanted].tolist()


def test_every_frame_asked_for_is_the_frame_got(written: tuple[Case, Path]) -> None:
    case, path = written
    numbers = np.array(case.numbers or range(len(case.pts)))
    with FrameReader(path, backend="pyav") as reader:
        assert_conforms(reader, numbers)
        times = (np.array(case.pts) - case.pts[0]) * float(case.time_base)
        # Matroska and FLV round to a millisecond.
        np.testing.assert_allclose(reader.times, times, atol=1.01e-3)
        assert (reader.height, reader.width) == case.size
        assert reader.notices == ()


def test_auto_chooses_a_backend_that_is_right(written: tuple[Case, Path]) -> None:
    pytest.importorskip("decord", reason="decord is not available on this machine")
    case, path = written
    numbers = np.array(case.numbers or range(len(case.pts)))
    with FrameReader(path) as reader:
        assert reader.backend == case.backend, reader.backend_reason
        assert_conforms(reader, numbers)
        assert reader.backend == case.backend, reader.backend_reason


def test_an_edit_list_hides_what_lies_before_the_cut(folder: Path) -> None:
    whole = write_video(folder / "whole.mp4", "libx264", STEADY, options=x264())
    muxer = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    path = cut(whole, folder / "cut.mp4", 1.0, muxer=muxer)
    assert b"elst" in path.read_bytes()
    with FrameReader(path) as reader:
        assert (reader.backend, "edit list" in reader.backend_reason) == ("pyav", True)
        assert_conforms(reader, np.arange(30, COUNT))
        assert reader.duration == pytest.approx(1.0)


def test_frames_without_their_keyframe_are_left_out_with_a_notice(folder: Path) -> None:
    """A broadcast that was joined in the middle: HEVC drops what leads the first keyframe."""
    whole = write_video(folder / "w.mp4", "libx265", STEADY, options=x265(":open-gop=1:keyint=15"))
    path = cut(whole, folder / "joined.mkv", 15 / 30, muxer={"avoid_negative_ts": "make_zero"})
    with pytest.warns(UserWarning, match="lack their keyframe"), FrameReader(path) as reader:
        assert_conforms(reader, np.arange(15, COUNT))


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    ],
    ids=["90 clockwise", "180", "90 anticlockwise", "mirrored"],
)
def test_the_display_matrix_is_applied(folder: Path, matrix, turned) -> None:
    path = folder / "matrix.mp4"
    write_video(path, "libx264", range(5), size=(64, 96), options=x264())
    with FrameReader(path) as reader:
        plain = reader.read(range(5))
    with FrameReader(set_display_matrix(path, matrix)) as reader:
        images = reader.read([4, 1])
        assert images.shape[1:3] == (reader.height, reader.width)
        np.testing.assert_array_equal(images, [turned(plain[4]), turned(plain[1])])
