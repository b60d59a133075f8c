"""`FrameReader`: frames of one local video, chosen by time."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import av
import numpy as np

from videodistill.video import decord_decoder
from videodistill.video.container import (
    VideoWarning,
    local_file,
    open_video,
    printable,
    video_error,
)
from videodistill.video.index import index_packets
from videodistill.video.picture import orientation_of, to_rgb
from videodistill.video.pyav_decoder import PyAVDecoder, index_by_decoding, trim_to_decodable

Backend = Literal["auto", "decord", "pyav"]

# Containers in which a cut-off end shows without decoding; elsewhere the end is decoded to see.
_TELLS_ITS_END = {"mp4", "matroska"}

# Times go through decimal text and float arithmetic; a microsecond is far below any frame.
_TOLERANCE = 1e-6


def _holds(container: str, names: set[str]) -> bool:
    """FFmpeg names a family of containers by a list: "mov,mp4,m4a,3gp,3g2,mj2"."""
    return bool(set(container.split(",")) & names)


@dataclass(frozen=True)
class Frames:
    """images: uint8 [n, H, W, 3] RGB; times: float64 [n], seconds; indices: int64 [n]."""

    images: np.ndarray
    times: np.ndarray
    indices: np.ndarray


class FrameReader:
    """Reads frames of one local video file: `reader.read([12, 3])`, `reader.sample(32)`.

    path: any video that FFmpeg decodes; only local files.
    backend: "auto" takes decord where its times and first frame agree with the index and nothing
    in the file is known to mislead it, and PyAV elsewhere; "decord" or "pyav" insist. Only PyAV
    notices damaged bytes inside a frame.

    Opening reads all packets and decodes one frame. Attributes:
        times: float64 [F], seconds from the first frame, ascending; one for each displayed frame.
        duration: seconds, until the end of the last frame. fps: mean frames per second.
        width, height: pixels, after the rotation that the file asks for.
        frame_count: F. Never the count that the container declares.
        backend, backend_reason: "decord" or "pyav", and why.
        notices: tuple of lines that tell what is missing from a damaged file. Each is also given
            as a `VideoWarning` when the file is opened.
        frames_decoded: frames that PyAV decoded so far, wanted or on the way to a wanted one.
            decord does not tell how many it decodes.

    Raises `UserError` for a file that is missing, no video, or damaged; `read` and `sample` also
    for a frame that cannot be decoded. Threads may share a reader: they take turns. After a fork
    each process opens the file anew; nothing of the parent's reader is disturbed.
    """

    def __init__(self, path: str | os.PathLike[str], *, backend: Backend = "auto") -> None:
        if backend not in ("auto", "decord", "pyav"):
            raise ValueError(f"backend: expected 'auto', 'decord' or 'pyav', got {backend!r}")
        self.path = local_file(path)
        self._closed, self._insists_on_decord = False, backend == "decord"
        self._owner, self._lock = os.getpid(), threading.Lock()
        container, stream = open_video(self.path)
        with container:
            index = index_packets(container, stream)
            formats = container.format.name, stream.codec_context.codec.canonical_name
            video_streams = len(container.streams.video)
        if index.by_count:
            index = index_by_decoding(self.path, index)
        self._decoder = PyAVDecoder(self.path, index)
        try:
            first = self._learn_from_first_frame(ends_surely=_holds(formats[0], _TELLS_ITS_END))
            self._decord_obstacle = None
            if backend != "pyav":
                source = decord_decoder.Source(
                    self.path,
                    *formats,
                    first.format.name,
                    video_streams,
                    self._orientation,
                    self._upright(first),
                )
                self._decord_obstacle = decord_decoder.obstacle(source, self._decoder.index)
            self._choose_backend(backend)
        except BaseException:
            self.close()
            raise
        for notice in self.notices:
            warnings.warn(f"{printable(self.path)}: {notice}", VideoWarning, stacklevel=2)

    def _learn_from_first_frame(self, *, ends_surely: bool) -> av.VideoFrame:
        """Completes the index and sets all that describes the video."""
        decoder = self._decoder
        first = decoder.first_frame() if len(decoder.index.pts) else None
        if first is None:
            raise video_error(self.path, "holds no frame that can be decoded: get the file again")
        if not decoder.index.by_count and first.identity not in decoder.index.pts:
            decoder.index = index_by_decoding(self.path, decoder.index)
            first = decoder.first_frame()
        if not decoder.index.by_count:
            decoder.index = trim_to_decodable(
                decoder, first.identity, check_end=bool(decoder.index.notices) or not ends_surely
            )
        index = decoder.index
        self._stored = first.picture.height, first.picture.width
        self._orientation = orientation_of(first.picture)
        self.height, self.width = self._orientation.size(*self._stored)
        self.times = index.seconds()
        self.frame_count = len(self.times)
        self.duration = float(self.times[-1] + index.last_duration * float(index.time_base))
        self.fps = self.frame_count / self.duration
        self.notices = index.notices
        return first.picture

    def _choose_backend(self, asked: Backend) -> None:
        if asked == "pyav":
            self.backend, self.backend_reason = "pyav", "asked for"
        elif self._decord_obstacle is None:
            self.backend, self.backend_reason = "decord", "its times and first frame agree"
        elif asked == "auto":
            self.backend, self.backend_reason = "pyav", self._decord_obstacle
        else:
            raise video_error(
                self.path,
                f"decord cannot read it rightly ({self._decord_obstacle}): "
                f"use backend 'auto' or 'pyav'",
            )

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, height, width, 3] RGB: the frames of these numbers, in this order.

        Any order, repeats allowed; each distinct frame is decoded once, and what lies between two
        wanted ones only as far back as the nearest keyframe. Raises `TypeError` for what is no
        integer, `IndexError` for a number outside [0, frame_count) and `UserError` for a frame that
        cannot be decoded.
        """
        wanted = np.asarray(indices).reshape(-1)
        if len(wanted) and wanted.dtype.kind not in "iu":
            raise TypeError(f"indices: expected integers, got {wanted.dtype}")
        wanted = wanted.astype(np.int64)
        outside = wanted[(wanted < 0) | (wanted >= self.frame_count)]
        if len(outside):
            raise IndexError(f"frame {outside[0]} of {self.path}: it has {self.frame_count} frames")
        distinct, place = np.unique(wanted, return_inverse=True)
        with self._mine():
            if self.backend == "decord" and len(distinct):
                images = self._read_decord(distinct)
            else:
                images = self._read_pyav(distinct)
        return images if np.array_equal(distinct, wanted) else images[place]

    def _read_pyav(self, ascending: np.ndarray) -> np.ndarray:
        images = np.empty((len(ascending), self.height, self.width, 3), np.uint8)
        for image, i in zip(images, ascending.tolist(), strict=True):
            image[:] = self._upright(self._decoder.frame(i))
        return images

    def _read_decord(self, ascending: np.ndarray) -> np.ndarray:
        try:
            return decord_decoder.read(self.path, ascending)
        except Exception as error:  # decord's own errors share no base but Exception
            if self._insists_on_decord:
                raise video_error(
                    self.path,
                    "decord fails on it, its data may be damaged: use backend 'auto' or 'pyav'",
                ) from error
            # What decord stumbles over PyAV reads, or names: damaged data, as a rule.
            self.backend, self.backend_reason = "pyav", f"decord failed ({type(error).__name__})"
            return self._read_pyav(ascending)

    def _upright(self, picture: av.VideoFrame) -> np.ndarray:
        return self._orientation.apply(to_rgb(picture, *self._stored))

    def _mine(self) -> threading.Lock:
        """The lock, with a decoder that belongs to this process."""
        if self._closed:
            raise ValueError(f"the reader of {self.path} is closed")
        if self._owner != os.getpid():
            self._owner, self._lock = os.getpid(), threading.Lock()
            self._decoder = PyAVDecoder(self.path, self._decoder.index)
        return self._lock

    @property
    def frames_decoded(self) -> int:
        return self._decoder.frames_decoded

    def indices_at(self, times: Sequence[float]) -> np.ndarray:
        """int64 [n]: the frame on screen at each of these seconds, clamped to first and last."""
        seconds = np.asarray(times, dtype=np.float64).reshape(-1)
        if np.isnan(seconds).any():
            raise ValueError("times: expected seconds, got NaN")
        found = np.searchsorted(self.times, seconds + _TOLERANCE, side="right") - 1
        return np.clip(found, 0, self.frame_count - 1).astype(np.int64)

    def sample_indices(
        self, n: int, start: float | None = None, end: float | None = None
    ) -> np.ndarray:
        """int64 [≤ n]: frames at the centres of n equal slices of [start, end) seconds, ascending.

        The whole video by default; an `end` past the end means the end. Where the interval holds
        no more than n frames it gives each of them once. With a variable frame rate one frame may
        fill several slices: then it comes several times. Raises `UserError` for an interval that
        holds nothing.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1 frame, got {n}")
        start = 0.0 if start is None else float(start)
        end = self.duration if end is None else min(float(end), self.duration)
        if not 0 <= start < self.duration:
            raise video_error(
                self.path,
                f"start {start:g} s lies outside the video, "
                f"which lasts {self.duration:.3f} s: choose a start inside it",
            )
        if not start < end:
            raise video_error(
                self.path,
                f"the interval from {start:g} to {end:g} s holds nothing: "
                f"choose an end after the start",
            )
        first, last = self.indices_at([start, end - 2 * _TOLERANCE])
        if last - first + 1 <= n:
            return np.arange(first, max(first, last) + 1)
        return self.indices_at(start + (np.arange(n) + 0.5) * ((end - start) / n))

    def sample(self, n: int, start: float | None = None, end: float | None = None) -> Frames:
        """The frames that `sample_indices` names, read."""
        indices = self.sample_indices(n, start, end)
        return Frames(self.read(indices), self.times[indices], indices)

    def close(self) -> None:
        """Closes the file; `times` and the like stay. Closing twice does nothing."""
        self._closed = True
        if self._owner == os.getpid():
            self._decoder.close()

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"FrameReader({self.path!r}: {self.frame_count} frames, {self.duration:.3f} s, "
            f"{self.width}x{self.height}, {self.backend})"
        )
