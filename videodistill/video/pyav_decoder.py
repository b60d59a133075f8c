"""Fetches frames with PyAV: seeks to a keyframe, decodes on, tells frames apart by their time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain

import av
import numpy as np
from av.packet import Packet

from videodistill.errors import UserError
from videodistill.video.container import open_video, reason_of
from videodistill.video.index import FrameIndex, frame_duration

# Seeking empties the decoder, so that it pays only when it jumps over some frames.
_WORTH_A_SEEK = 4


class PyAVDecoder:
    """Reads single frames of one open file, best in ascending order. Not for use across threads.

    frames_decoded counts every frame that came out of the decoder, wanted or on the way.
    """

    def __init__(self, name: str, index: FrameIndex) -> None:
        self.name = name
        self.index = index
        self.frames_decoded = 0
        self.damaged_at: int | None = None
        self._open()

    def _open(self) -> None:
        self.container, self.stream = open_video(self.name)
        self._begin(self.container.demux(self.stream), key=-1)

    def close(self) -> None:
        self.container.close()

    def frame(self, i: int) -> av.VideoFrame:
        """The displayed frame number `i`.

        Raises `UserError` when the decoder does not deliver it or calls it damaged.
        """
        wanted = i if self.index.by_count else int(self.index.pts[i])
        frame = self._search(wanted)
        if frame is None or frame.is_corrupt:
            seconds = float((self.index.pts[i] - self.index.pts[0]) * self.index.time_base)
            raise UserError(
                f"{self.name}: the frame at {seconds:.3f} s is damaged and cannot be decoded: "
                f"choose an interval without it, or get the file again"
            )
        return frame

    def first_frame(self) -> tuple[int, av.VideoFrame] | None:
        """What decoding from the start delivers first: (pts or count, frame); None: nothing."""
        self._restart()
        return next(self._decoded, None)

    # Searching. Where the decoder stands: `_last` came out last (pts), `_key` is the number of the
    # keyframe that was last fed to it, `_next` is a frame that came out but was not asked for yet.

    def _search(self, wanted: int) -> av.VideoFrame | None:
        if self.index.by_count:
            if self._next is None and wanted <= self._last:
                self._restart()
            return self._advance(wanted)
        key = self.index.key_before(wanted)
        if self._is_behind(wanted) or self._seek_pays(key):
            self._seek(key)
        frame = self._advance(wanted)
        # Not there although the file lists it: the keyframe was none (an intra refresh, a wrong
        # flag). Decoding from further back is slower and sure.
        for earlier in (key - 1, -1):
            if frame is not None or key < 0:
                break
            self._seek(max(earlier, -1))
            frame = self._advance(wanted)
        return frame

    def _is_behind(self, wanted: int) -> bool:
        if self._next is not None:
            return wanted < self._next[0]
        return self._last is not None and wanted <= self._last

    def _seek_pays(self, key: int) -> bool:
        if key <= self._key:
            return False
        start = self._last if self._last is not None else self.index.pts[0]
        between = np.searchsorted(self.index.pts, [start, self.index.key_pts[key]])
        return int(between[1] - between[0]) > _WORTH_A_SEEK

    def _advance(self, wanted: int) -> av.VideoFrame | None:
        """Decodes until `wanted` comes out; None when a later frame or the end comes first."""
        while True:
            if self._next is None:
                self._next = next(self._decoded, None)
                if self._next is None:
                    return None
            identity, frame = self._next
            if identity > wanted:
                return None
            self._last = identity
            if identity == wanted:
                return frame  # kept as _next: the same frame may be wanted once more
            self._next = None

    def _restart(self) -> None:
        self.container.close()
        self._open()

    def _seek(self, key: int) -> None:
        """Makes the keyframe number `key` the next packet that is decoded, or an earlier one.

        Containers are indexed by presentation time, by decoding time, or not at all. So ask by
        either and look where that led; -1, and whatever does not work, begins at the start.
        """
        if key >= 0:
            pts = int(self.index.key_pts[key])
            before = self.index.key_dts[max(0, key - 2) : key + 1][::-1]
            for offset in dict.fromkeys([pts, *before.tolist()]):
                try:
                    self.container.seek(offset, stream=self.stream)
                    packets = self.container.demux(self.stream)
                    first = next(p for p in packets if p.is_keyframe or p.size == 0)
                except (av.error.FFmpegError, StopIteration):
                    continue
                if first.size and first.pts is not None and first.pts <= pts:
                    self._begin(chain([first], packets), self.index.key_before(first.pts))
                    return
        self._restart()

    def _begin(self, packets: Iterator[Packet], key: int) -> None:
        self._key = key
        self._last: int | None = -1 if self.index.by_count else None
        self._next: tuple[int, av.VideoFrame] | None = None
        self._decoded = self._decode(packets)

    def _decode(self, packets: Iterator[Packet]) -> Iterator[tuple[int, av.VideoFrame]]:
        count = 0
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError:
                return  # the index ends here too
            if packet.is_corrupt and packet.size:
                continue
            if packet.is_keyframe and packet.pts is not None and packet.size:
                self._key = max(self._key, self.index.key_before(packet.pts))
            try:
                frames = self.stream.codec_context.decode(packet if packet.size else None)
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                if self.damaged_at is None:
                    self.damaged_at = packet.pts
                continue
            for frame in frames:
                self.frames_decoded += 1
                identity = count if self.index.by_count else frame.pts
                count += 1
                if identity is not None:
                    yield identity, frame


def index_by_decoding(name: str, index: FrameIndex) -> FrameIndex:
    """Completes an index of a file without usable times by decoding it once.

    Times are those of the decoded frames where they ascend, else multiples of the frame duration
    that the file tells.
    """
    decoder = PyAVDecoder(name, replace(index, by_count=True, pts=np.empty(0, np.int64)))
    try:
        told = [frame.pts for _, frame in decoder._decoded]
        unit, stream = index.time_base, decoder.stream
        if not told:
            raise UserError(f"{name}: holds no frame that can be decoded: get the file again")
        if None in told or any(b <= a for a, b in zip(told, told[1:], strict=False)):
            step = frame_duration(np.empty(0), 0, unit, stream)
            told = [i * step for i in range(len(told))]
        pts = np.array(told, np.int64)
        return replace(index, pts=pts, last_duration=frame_duration(pts, 0, unit, stream))
    finally:
        decoder.close()


def trim_to_decodable(index: FrameIndex, first: int, name: str) -> FrameIndex:
    """Drops the frames before `first` (pts), which nothing in the file can be decoded from."""
    kept = index.pts[np.searchsorted(index.pts, first) :]
    lost = len(index.pts) - len(kept)
    if not lost:
        return index
    seconds = Fraction(int(first - index.pts[0])) * index.time_base
    notice = f"the first {lost} frame(s), {float(seconds):.3f} s, lack the keyframe they need"
    return replace(index, pts=kept, notices=(*index.notices, notice), damaged=True)


__all__ = ["PyAVDecoder", "index_by_decoding", "reason_of", "trim_to_decodable"]
