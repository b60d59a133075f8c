"""What `FrameReader` promises beyond single frames: choice by time, cost, processes, threads."""

from __future__ import annotations

import os
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.videodistill.video.painted import read_numbers, write_video
from videodistill.errors import UserError
from videodistill.video import FrameReader

FAST = {"preset": "ultrafast", "x264-params": "keyint=12:scenecut=0:bframes=2"}


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 frames of 40 ms: frame i is shown from i / 25 s on."""
    path = tmp_path_factory.mktemp("steady") / "steady.mp4"
    return write_video(path, "libx264", range(100), time_base=Fraction(1, 25), options=FAST)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames at 0, 0.1, 0.2, 1.2, 1.3 s: the third stays for a second."""
    path = tmp_path_factory.mktemp("uneven") / "uneven.mkv"
    return write_video(path, "libx264", [0, 1, 2, 12, 13], time_base=Fraction(1, 10), options=FAST)


def test_times_and_what_follows_from_them(steady: Path) -> None:
    with FrameReader(steady) as reader:
        np.testing.assert_allclose(reader.times, np.arange(100) / 25, atol=1e-9)
        assert reader.times.dtype == np.float64
        assert reader.duration == pytest.approx(4.0)
        assert reader.fps == pytest.approx(25.0)
        assert (reader.width, reader.height, reader.frame_count) == (64, 64, 100)
        assert reader.notices == ()


def test_the_frame_on_screen_is_the_last_that_began(uneven: Path) -> None:
    with FrameReader(uneven) as reader:
        found = reader.indices_at([-1, 0, 0.05, 0.1, 0.3 - 0.2, 0.2, 1.19, 1.2, 9])
        assert found.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4]
        assert found.dtype == np.int64
        with pytest.raises(ValueError, match="NaN"):
            reader.indices_at([float("nan")])


def test_sample_takes_the_centres_of_equal_slices(steady: Path) -> None:
    with FrameReader(steady) as reader:
        frames = reader.sample(4)
        assert frames.indices.tolist() == [12, 37, 62, 87]
        assert read_numbers(frames.images) == [12, 37, 62, 87]
        np.testing.assert_allclose(frames.times, reader.times[[12, 37, 62, 87]])
        assert reader.sample_indices(1).tolist() == [50]
        assert reader.sample_indices(2, 1.0, 2.0).tolist() == [31, 43]
        assert reader.sample_indices(2, 3.0, 99.0).tolist() == [81, 93]


def test_sample_gives_each_frame_once_where_there_are_few(steady: Path, uneven: Path) -> None:
    with FrameReader(steady) as reader:
        assert reader.sample_indices(100).tolist() == list(range(100))
        assert reader.sample_indices(5000).tolist() == list(range(100))
        assert reader.sample_indices(50, 1.0, 1.2).tolist() == [25, 26, 27, 28, 29]
        assert reader.sample_indices(3, 1.01, 1.02).tolist() == [25]
    with FrameReader(uneven) as reader:
        assert reader.sample(8).images.shape == (5, 64, 64, 3)
        # By time, the long frame counts for as much as it lasts.
        assert reader.sample_indices(4).tolist() == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("start", "end", "told"),
    [
        (4.0, None, "lasts 4.000 s"),
        (-1.0, None, "lies outside"),
        (float("nan"), None, "lies outside"),
        (2.0, 2.0, "holds nothing"),
        (2.0, 1.0, "holds nothing"),
        (0.0, float("nan"), "holds nothing"),
    ],
)
def test_an_interval_that_holds_nothing_is_refused(steady: Path, start, end, told) -> None:
    with FrameReader(steady) as reader, pytest.raises(UserError, match=told):
        reader.sample(4, start, end)


def test_wrong_arguments_are_named(steady: Path) -> None:
    with pytest.raises(ValueError, match="backend"):
        FrameReader(steady, backend="opencv")
    with FrameReader(steady) as reader:
        with pytest.raises(ValueError, match="at least 1"):
            reader.sample(0)
        for outside in (100, -1):
            with pytest.raises(IndexError, match="100 frames"):
                reader.read([0, outside])
        with pytest.raises(TypeError, match="integers"):
            reader.read([0.5])
        assert reader.read([]).shape == (0, 64, 64, 3)
    with pytest.raises(ValueError, match="closed"):
        reader.read([0])
    reader.close()
    assert reader.frame_count == 100


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 frames, a keyframe each 12."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    options = {"preset": "ultrafast", "x264-params": "keyint=12:min-keyint=12:scenecut=0"}
    return write_video(path, "libx264", range(6000), size=(32, 32), options=options)


def test_a_sparse_read_decodes_a_small_share(long: Path) -> None:
    with FrameReader(long, backend="pyav") as reader:
        rare = np.arange(0, 6000, 100)
        before = reader.frames_decoded
        assert read_numbers(reader.read(rare)) == rare.tolist()
        # At most its group of pictures each, and what the decoder holds back.
        assert reader.frames_decoded - before <= len(rare) * 12

        burst = np.concatenate([np.arange(500) * 2, np.arange(5000, 6000, 2)])
        before = reader.frames_decoded
        assert read_numbers(reader.read(burst)) == burst.tolist()
        assert reader.frames_decoded - before <= 2100  # of 6,000; the two stretches hold 2,000


def test_a_dense_read_decodes_each_frame_once(long: Path) -> None:
    with FrameReader(long, backend="pyav") as reader:
        before = reader.frames_decoded
        for start in range(0, 600, 60):  # in portions, as the encoder takes them
            reader.read(range(start, start + 60))
        assert reader.frames_decoded - before <= 610


@pytest.mark.parametrize("backend", ["pyav", "auto"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_reader_survives_a_fork_on_both_sides(steady: Path, backend: str) -> None:
    with FrameReader(steady, backend=backend) as reader:
        assert read_numbers(reader.read([40])) == [40]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                right = read_numbers(reader.read([90, 5, 41])) == [90, 5, 41]
                reader.close()
                status = 0 if right else 2
            finally:
                os._exit(status)
        wanted = [41, 42, 3, 99]
        assert read_numbers(reader.read(wanted)) == wanted
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read_numbers(reader.read(wanted)) == wanted


@pytest.mark.parametrize("backend", ["pyav", "auto"])
def test_threads_take_turns(steady: Path, backend: str) -> None:
    found: dict[int, list[int]] = {}
    orders = {seed: np.random.default_rng(seed).integers(0, 100, 8).tolist() for seed in range(4)}
    with FrameReader(steady, backend=backend) as reader:

        def work(seed: int) -> None:
            found[seed] = read_numbers(reader.read(orders[seed]))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == orders


def test_decord_is_held_open_only_while_it_reads(steady: Path) -> None:
    """An idle decord reader decodes ahead into memory and does not outlive a fork."""
    pytest.importorskip("decord", reason="decord is not available on this machine")
    with FrameReader(steady, backend="decord") as reader:
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
        if before is None:
            pytest.skip("this system does not list open files under /proc")
        reader.read([1, 50])
        assert len(os.listdir("/proc/self/fd")) == before


def test_insisting_on_decord_where_it_is_wrong_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("decord", reason="decord is not available on this machine")
    path = write_video(tmp_path / "b.mp4", "mpeg4", range(30), options={"g": "12", "bf": "2"})
    with pytest.raises(UserError, match=r"not relied on for the codec mpeg4.*'pyav'"):
        FrameReader(path, backend="decord")


def test_without_decord_pyav_reads_everything(
    steady: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "decord", None)  # import decord now fails
    with FrameReader(steady) as reader:
        assert (reader.backend, reader.backend_reason) == ("pyav", "decord is not installed")
        assert read_numbers(reader.read([7, 3])) == [7, 3]


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (128, 128, 128)]


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(
    ("tag", "red", "blue"), [(6, 0.299, 0.114), (1, 0.2126, 0.0722)], ids=["BT.601", "BT.709"]
)
def test_colours_follow_the_matrix_and_range_that_the_file_tells(
    tmp_path: Path, tag: int, red: float, blue: float, full: bool
) -> None:
    import av

    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w") as container:
        options = {"crf": "1", "x264-params": "keyint=1"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = tag
        stream.codec_context.color_range = 2 if full else 1
        for i, (r, g, b) in enumerate(COLOURS):
            luma = red * r + (1 - red - blue) * g + blue * b
            chroma = [(b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
            planes = [luma if full else 16 + luma * 219 / 255]
            planes += [128 + (c if full else c * 224 / 255) for c in chroma]
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane, value in zip(frame.planes, planes, strict=True):
                plane.update(bytes([round(value)]) * plane.buffer_size)
            frame.colorspace, frame.color_range = tag, 2 if full else 1
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for backend in ("pyav", "auto"):
        with FrameReader(path, backend=backend) as reader:
            middle = reader.read(range(len(COLOURS)))[:, 32, 32].astype(int)
        assert np.abs(middle - COLOURS).max() <= 4, backend
