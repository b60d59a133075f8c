"""Fetches frames with decord, where it is known to fetch the right ones.

decord finds a frame by counting from the keyframe before it and never looks at the time of what it
decoded. That is right only where decoding from a keyframe delivers all that is shown from it on,
and nothing else; everywhere else it returns other frames than asked for and says nothing. A frame
lost to damaged data shifts its count in the same way, which no look at the file from outside tells.

A reader that stays open decodes ahead into memory and does not outlive a fork, so that one is
opened for each call and closed with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from videodistill.video.index import FrameIndex
from videodistill.video.picture import Orientation

_CONTAINERS = {"mp4", "matroska"}
_CODECS = {"h264", "hevc", "vp8", "vp9"}
_PIXELS = {"yuv420p", "yuvj420p"}
# Both convert colours with libswscale; its versions may round differently.
_LEVELS = 3


@dataclass(frozen=True)
class Source:
    """What is known of a file before decord sees it. first: uint8 [H, W, 3], its first frame."""

    name: str
    container: str
    codec: str
    pixels: str
    video_streams: int
    orientation: Orientation
    first: np.ndarray


def obstacle(source: Source, index: FrameIndex) -> str | None:
    """Why decord must not read this file; None: it gives the same frames as PyAV.

    decord opens only what passes every check from outside: on files that are damaged or unusual it
    may hang or crash the process.
    """
    return _outer_obstacle(source, index) or _disagreement(source, index)


def _outer_obstacle(source: Source, index: FrameIndex) -> str | None:
    if index.by_count:
        return "the file has no usable times"
    if index.notices:
        return "the file is damaged"
    if index.hidden:
        return f"{index.hidden} coded frames are never shown (edit list)"
    if not set(source.container.split(",")) & _CONTAINERS:
        return f"decord is not relied on for the container {source.container}"
    if source.codec not in _CODECS:
        return f"decord is not relied on for the codec {source.codec}"
    if source.pixels not in _PIXELS:
        return f"decord is not relied on for the pixel format {source.pixels}"
    if source.video_streams > 1:
        return "there are several video streams"
    if source.orientation != Orientation():
        return "the frames are to be turned"
    if not index.clean_cuts:
        return "some keyframes are no clean cuts (open GOP, intra refresh)"
    return None


def _disagreement(source: Source, index: FrameIndex) -> str | None:
    try:
        with _opened(source.name) as reader:
            if len(reader) != len(index.pts):
                return f"decord counts {len(reader)} frames instead of {len(index.pts)}"
            told = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
            if not _same_times(told - told[0], index.seconds()):
                return "decord's times are others"
            first = _as_numpy(reader.get_batch([0]))[0]
    except ImportError:
        return "decord is not installed"
    except Exception as error:  # decord's own errors share no base but Exception
        return f"decord cannot open it ({_first_line(error)})"
    if first.shape != source.first.shape:
        return "decord's frames have another size"
    if np.abs(first.astype(int) - source.first).max() > _LEVELS:
        return "decord's first frame looks different"
    return None


def _same_times(told: np.ndarray, times: np.ndarray) -> bool:
    """Whether each is nearer to its own time than to a neighbour's: within half a frame."""
    if len(times) < 2:
        return True
    gaps = np.diff(times)
    half = np.minimum(np.append(gaps, gaps[-1]), np.insert(gaps, 0, gaps[0])) / 2
    return bool((np.abs(told - times) < half).all())


def read(name: str, ascending: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3]: the frames of these numbers. Raises whatever decord raises."""
    with _opened(name) as reader:
        return _as_numpy(reader.get_batch(ascending.tolist()))


@contextmanager
def _opened(name: str) -> Iterator[Any]:
    try:
        import decord
    except OSError as error:  # its shared library does not load on this machine
        raise ImportError(str(error)) from error
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(name, ctx=decord.cpu(0), num_threads=1)
    try:
        yield reader
    finally:
        del reader  # decord closes a file when its last reference goes


def _as_numpy(batch: Any) -> np.ndarray:
    """decord's own array, or what another part of the process told its bridge to make of it."""
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rpartition("] ")[2][:120] if lines else type(error).__name__
