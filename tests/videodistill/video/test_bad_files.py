"""A file that is no whole video gives what it holds, or one line that names it and the remedy."""

from __future__ import annotations

import os
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.videodistill.video.painted import read_numbers, write_video
from videodistill.errors import UserError
from videodistill.video import FrameReader, VideoWarning

OPTIONS = {"preset": "veryfast", "x264-params": "keyint=20:scenecut=0:bframes=3"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    muxer = {"movflags": "faststart"}
    return write_video(path, "libx264", range(60), size=(120, 160), options=OPTIONS, muxer=muxer)


def refusal(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        FrameReader(path)
    line = str(caught.value)
    assert "\n" not in line
    assert ": " in line.removeprefix(str(path)), "no remedy"
    return line


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("zero.mp4", b"", "is empty"),
        ("text.mp4", b"hello\n" * 500, "is not a video"),
        ("notes.txt", b"hello\n" * 500, "is not a video"),
        ("noise.mp4", np.random.default_rng(0).bytes(20_000), "is not a video"),
        ("zeros.mp4", bytes(20_000), "is not a video"),
        ("page.html", b"<html><body>404 not found</body></html>", "is not a video"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile good.mp4\n", "is not a video"),
        ("words.srt", b"1\n00:00:00,000 --> 00:00:02,000\nhello\n", "no video stream"),
        (
            "play.m3u8",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/x.ts\n"
            b"#EXT-X-ENDLIST\n",
            "is not a video",
        ),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    line = refusal(path)
    assert str(path) in line
    assert told in line


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing.mp4", "no such file"),
        (".", "is a directory"),
        ("http://example.com/a.mp4", "not URLs"),
        ("rtsp://example.com/a", "not URLs"),
        ("concat:a.mp4|b.mp4", "no such file"),
        ("", "not a file name"),
        ("a\0b", "not a file name"),
        ("x" * 5000, "cannot be read"),
        (os.devnull, "not a regular file"),
    ],
)
def test_what_is_no_file_is_refused(name: str, told: str) -> None:
    assert told in refusal(name)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.mp4"
    path.write_bytes(good.read_bytes())
    path.chmod(0)
    assert "permissions" in refusal(path)


@pytest.mark.parametrize(
    "name",
    [
        "-i.mp4",
        "concat:a.mp4",
        "http:__.mp4",
        "clip%03d.mp4",
        "a?b#c.mp4",
        "日本 'q\".mp4",
        "a\nb.mp4",
    ],
)
def test_a_name_is_only_a_name(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_bytes(good.read_bytes())
    monkeypatch.chdir(tmp_path)
    with FrameReader(name) as reader:
        assert read_numbers(reader.read([33])) == [33]


def test_a_line_feed_in_a_name_does_not_split_the_message(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\\nb\.mp4") as caught:
        FrameReader(path)
    assert "\n" not in str(caught.value)


def write_sound(path: Path, *, picture: bytes | None = None) -> Path:
    """A second of silence in MP3, with `picture` (a PNG) as cover art."""
    with av.open(str(path), "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        for i in range(40):
            samples = np.zeros((1, 1152 * 2), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 44100, i * 1152, Fraction(1, 44100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if picture is not None:
        body = b"\0image/png\0\x03\0" + picture  # encoding, type, front cover, description
        tag = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
        size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\x03\0\0" + size + tag + path.read_bytes())
    return path


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    assert "sound but no video" in refusal(write_sound(tmp_path / "sound.mp3"))


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    picture = write_video(tmp_path / "cover.png", "png", [0], pix_fmt="rgb24").read_bytes()
    path = write_sound(tmp_path / "song.mp3", picture=picture)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert "cover art but no video" in refusal(path)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("t.mp4", 0.5),
        ("t.mp4", 0.9),
        ("fragments.mp4", 0.5),
        ("t.mkv", 0.5),
        ("t.ts", 0.7),
        ("t.flv", 0.5),
        ("t.mpg", 0.7),
    ],
)
def test_a_cut_off_file_gives_the_frames_it_holds(tmp_path: Path, name: str, share: float) -> None:
    codec = "mpeg2video" if name == "t.mpg" else "libx264"
    muxer = {
        "t.mp4": {"movflags": "faststart"},
        "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    }.get(name, {})
    time_base = Fraction(1, 25)
    options = OPTIONS if codec == "libx264" else {"g": "12", "bf": "2"}
    path = tmp_path / name
    write_video(
        path, codec, range(100), time_base=time_base, options=options, muxer=muxer, size=(120, 160)
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with FrameReader(path) as reader:
            assert 0 < reader.frame_count < 100
            numbers = read_numbers(reader.read(range(reader.frame_count)))
            assert numbers == np.round(reader.times * 25).astype(int).tolist()
            if name == "t.mp4":
                assert f"{reader.frame_count} whole frames of the 100" in reader.notices[0]
    assert [str(w.message) for w in told if w.category is VideoWarning] == [
        f"{path}: {notice}" for notice in reader.notices
    ]


def damage(path: Path, target: Path, victim: int, offset: int, length: int) -> Path:
    """Overwrites bytes of the packet number `victim` (in decoding order) with noise."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        at = packets[victim].pos + offset
        length = min(length, packets[victim].size - offset)
    data = bytearray(path.read_bytes())
    data[at : at + length] = np.random.default_rng(0).bytes(length)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (5, 1), (10, 60)])
def test_a_damaged_frame_is_named_and_never_replaced(
    good: Path, tmp_path: Path, offset: int, length: int
) -> None:
    path = damage(good, tmp_path / "damaged.mp4", 25, offset, length)
    refused = []
    with FrameReader(path, backend="pyav") as reader:
        for i in range(reader.frame_count):
            try:
                assert read_numbers(reader.read([i])) == [i]
            except UserError as error:
                assert str(path) in str(error)
                assert f"{reader.times[i]:.3f} s" in str(error)
                refused.append(i)
    assert refused, "the damage was not noticed"
    # The first group of pictures and the third are whole.
    assert set(refused) <= set(range(18, 40))


def test_a_file_whose_frames_are_all_damaged_is_refused(good: Path, tmp_path: Path) -> None:
    with av.open(str(good)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        first = min(p.pos for p in packets)
    data = good.read_bytes()
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data[:first] + bytes(len(data) - first))
    assert "no frame that can be decoded" in refusal(path)


def test_real_files_give_frames_or_one_line(shared_data: Path) -> None:
    """Every frame of every real file, in two orders; nothing but frames or a refusal comes out."""
    random = np.random.default_rng(0)
    read = refused = 0
    for path in sorted((shared_data / "videos").glob("*/*")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VideoWarning)
                reader = FrameReader(path)
            with reader:
                indices = reader.sample_indices(5)
                images = reader.read(indices)
                assert images.shape == (len(indices), reader.height, reader.width, 3)
                assert (np.diff(reader.times) > 0).all()
                order = random.permutation(len(indices))[:2]
                np.testing.assert_array_equal(reader.read(indices[order]), images[order])
                read += 1
        except UserError as error:
            assert "\n" not in str(error)
            assert path.name in str(error)
            refused += 1
    assert read >= 20
    assert refused >= 3


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("decord/flipping_a_pancake.mkv", 310),
        ("torchcodec/discard_first_keyframe.mp4", 25),
        ("torchcodec/testsrc2_mpeg4.mp4", 1),
        ("torchcodec/av1_video.mkv", 125),
        ("torchcodec/sine_stereo_mp2.mpg", 100),
    ],
)
def test_real_files_hold_as_many_frames_as_decoding_delivers(
    shared_data: Path, name: str, count: int
) -> None:
    with FrameReader(shared_data / "videos" / name) as reader:
        assert reader.frame_count == count
