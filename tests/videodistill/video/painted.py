"""Videos whose frames carry their own number, drawn as blocks that survive lossy compression."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_GRID = 4  # 4 x 4 blocks: 16 bits


def paint(number: int, height: int = 64, width: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: bit k of `number` is block k, white for 1, row by row."""
    bits = (number >> np.arange(_GRID * _GRID) & 1).reshape(_GRID, _GRID)
    rows = np.arange(height) * _GRID // height
    columns = np.arange(width) * _GRID // width
    grey = np.where(bits[rows[:, None], columns], 235, 20).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def read_number(image: np.ndarray) -> int:
    """The number that `paint` drew, from the middle of each block."""
    height, width = image.shape[:2]
    rows = ((np.arange(_GRID) + 0.5) * height / _GRID).astype(int)
    columns = ((np.arange(_GRID) + 0.5) * width / _GRID).astype(int)
    bits = image[rows[:, None], columns].mean(-1) > 128
    return int((bits.reshape(-1) << np.arange(_GRID * _GRID)).sum())


def read_numbers(images: np.ndarray) -> list[int]:
    return [read_number(image) for image in images]


def write_video(
    path: Path,
    codec: str,
    pts: Sequence[int],
    *,
    time_base: Fraction = Fraction(1, 30),
    size: tuple[int, int] = (64, 64),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    numbers: Sequence[int] | None = None,
    **context: object,
) -> Path:
    """Encodes frame i with the number i (or numbers[i]) at pts[i]; returns `path`.

    `context` sets attributes of the codec context: gop_size, max_b_frames, colorspace, ...
    """
    height, width = size
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=round(1 / time_base), options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = time_base
        stream.time_base = time_base
        stream.codec_context.thread_count = 1
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for i, when in enumerate(pts):
            number = i if numbers is None else numbers[i]
            frame = av.VideoFrame.from_ndarray(paint(number, height, width), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = int(when), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(source: Path, target: Path, start: float, *, muxer: dict[str, str]) -> Path:
    """Copies packets from the keyframe before `start` on, so that time 0 is `start`.

    What precedes `start` gets negative times: the MP4 muxer writes an edit list that hides it.
    """
    with av.open(str(source)) as reading, av.open(str(target), "w", options=muxer) as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        origin = round(start / stream.time_base)
        reading.seek(origin, stream=stream)
        for packet in reading.demux(stream):
            if packet.size:
                packet.pts -= origin
                packet.dts -= origin
                packet.stream = copy
                writing.mux(packet)
    return target


def set_display_matrix(path: Path, matrix: Sequence[int]) -> Path:
    """Writes a, b, c, d of the display matrix into the first track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    a, b, c, d = (value << 16 for value in matrix)
    # After the type: version and flags (4 bytes), then 36 bytes of times, ids and layers.
    struct.pack_into(">5i", data, header + 44, a, b, 0, c, d)
    path.write_bytes(data)
    return path
