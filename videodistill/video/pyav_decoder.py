"""Fetches frames with PyAV: seeks to a keyframe, decodes on, tells frames apart by their time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, pairwise
from typing import NamedTuple

import av
import numpy as np
from av.packet import Packet

from videodistill.video.container import open_video, video_error
from videodistill.video.index import FrameIndex, frame_duration

# Seeking empties the decoder, so that it pays only when it jumps over some frames.
_WORTH_A_SEEK = 4
_BEFORE_ALL = -(1 << 63)


class Decoded(NamedTuple):
    """A frame as it comes out of the decoder.

    identity: its presentation time, or its number where the index goes by count. whole: neither it
    nor a frame since the last keyframe, which it may be built on, is damaged.
    """

    identity: int
    picture: av.VideoFrame
    whole: bool


class PyAVDecoder:
    """Reads single frames of one open file, best in ascending order. Not for use across threads.

    frames_decoded counts every frame that came out of the decoder, wanted or on the way.
    """

    def __init__(self, name: str, index: FrameIndex) -> None:
        self.name = name
        self.index = index
        self.frames_decoded = 0
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
        found = self._search(i if self.index.by_count else int(self.index.pts[i]))
        if found is None or not found.whole:
            seconds = float((self.index.pts[i] - self.index.pts[0]) * self.index.time_base)
            raise video_error(
                self.name,
                f"the frame at {seconds:.3f} s cannot be decoded, the data there are "
                f"damaged: choose an interval without it, or get the file again",
            )
        return found.picture

    def first_frame(self) -> Decoded | None:
        """What decoding from the start delivers first; None: nothing."""
        self._restart()
        self._next = next(self._decoded, None)
        return self._next

    def every_frame(self) -> Iterator[Decoded]:
        """All that decoding from the start delivers."""
        self._restart()
        yield from self._decoded

    def lost_at_the_end(self) -> int:
        """How many of the last frames nothing comes out for; looks no further than one keyframe."""
        last = self.index.key_before(int(self.index.pts[-1]))
        self._seek(last)
        delivered = [decoded.identity for decoded in self._decoded if decoded.whole]
        since = self.index.pts[np.searchsorted(self.index.pts, self.index.key_pts[last]) :]
        there = np.isin(since, delivered)
        self._restart()
        return len(there) - int(np.flatnonzero(there)[-1]) - 1 if there.any() else len(there)

    # Where the decoder stands: `_last` is the identity of what came out last, `_key` the number of
    # the keyframe that was last fed to it, `_next` a frame that came out and was not passed yet.

    def _search(self, wanted: int) -> Decoded | None:
        if self.index.by_count:
            if self._is_behind(wanted):
                self._restart()
            return self._advance(wanted)
        key = self.index.key_before(wanted)
        if self._is_behind(wanted) or self._seek_pays(key):
            self._seek(key)
        frame = self._advance(wanted)
        # Not there although the file lists it: the keyframe may be none (an intra refresh, a wrong
        # flag). From further back it can be.
        for earlier in (key - 1, key - 4):
            if key < 0 or (frame is not None and frame.whole):
                break
            self._seek(max(earlier, -1))
            frame = self._advance(wanted)
        return frame

    def _is_behind(self, wanted: int) -> bool:
        if self._next is not None:
            return wanted < self._next.identity
        return self._last is not None and wanted <= self._last

    def _seek_pays(self, key: int) -> bool:
        if key <= self._key:
            return False
        start = self._last if self._last is not None else self.index.pts[0]
        between = np.searchsorted(self.index.pts, [start, self.index.key_pts[key]])
        return int(between[1] - between[0]) > _WORTH_A_SEEK

    def _advance(self, wanted: int) -> Decoded | None:
        """Decodes until `wanted` comes out; None when a later frame or the end comes first."""
        while True:
            if self._next is None:
                self._next = next(self._decoded, None)
                if self._next is None:
                    return None
            if self._next.identity > wanted:
                return None
            self._last = self._next.identity
            if self._last == wanted:
                return self._next  # kept: the same frame may be wanted once more
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
                    first = next(p for p in packets if not p.size or _can_begin(p))
                except (av.error.FFmpegError, StopIteration):
                    continue
                if first.size and first.pts is not None and first.pts <= pts:
                    self._begin(chain([first], packets), self.index.key_before(first.pts))
                    return
        self._restart()

    def _begin(self, packets: Iterator[Packet], key: int) -> None:
        self._key = key
        self._last: int | None = None
        self._next: Decoded | None = None
        self._decoded = self._decode(packets)

    def _decode(self, packets: Iterator[Packet]) -> Iterator[Decoded]:
        by_count, damage = self.index.by_count, _Damage()
        count, latest = 0, _BEFORE_ALL
        for packet in _until_failure(packets):
            where = count if by_count or packet.pts is None else packet.pts
            if packet.size and packet.is_corrupt:
                damage.lies_ahead(where)
                continue
            if packet.size:
                damage.is_reached()
            if packet.size and packet.is_keyframe and packet.pts is not None:
                self._key = max(self._key, self.index.key_before(packet.pts))
            try:
                pictures = self.stream.codec_context.decode(packet if packet.size else None)
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                damage.met(where)
                continue
            for picture in pictures:
                self.frames_decoded += 1
                identity = count if by_count else picture.pts
                count += 1
                if identity is None:
                    continue
                if identity < latest:
                    raise video_error(
                        self.name,
                        "its frames come in another order than their times tell: "
                        "convert it, for example with ffmpeg -i IN -c:v libx264 out.mp4",
                    )
                latest = identity
                yield Decoded(identity, picture, damage.spares(identity, picture))


class _Damage:
    """Which pictures may be built on damaged data: all that come out from the damage on.

    Until the next keyframe, and with the few that were on their way out before it. An incomplete
    packet that nothing follows, where a file is cut off, harms no other.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self.ahead: int | None = None

    def lies_ahead(self, where: int) -> None:
        if self.ahead is None:
            self.ahead = where

    def is_reached(self) -> None:
        if self.ahead is not None:
            self.met(self.ahead)
            self.ahead = None

    def met(self, where: int) -> None:
        if self.since is None:
            self.since = where

    def spares(self, identity: int, picture: av.VideoFrame) -> bool:
        if picture.is_corrupt:
            self.met(identity)
            return False
        if picture.key_frame and self.since is not None and identity > self.since:
            self.since = None
        return bool(picture.key_frame) or self.since is None


def _can_begin(packet: Packet) -> bool:
    return packet.is_keyframe and not packet.is_corrupt


def _until_failure(packets: Iterator[Packet]) -> Iterator[Packet]:
    """The packets up to where the file cannot be read any further; the index ends there too."""
    with suppress(av.error.FFmpegError):
        yield from packets


def index_by_decoding(name: str, index: FrameIndex) -> FrameIndex:
    """Completes an index of a file without usable times by decoding it once.

    Times are those of the decoded frames where they ascend, else multiples of the frame duration
    that the file tells.
    """
    decoder = PyAVDecoder(name, replace(index, by_count=True, pts=np.empty(0, np.int64)))
    try:
        frames = [(decoded.picture.pts, decoded.whole) for decoded in decoder.every_frame()]
        found = len(frames)
        while frames and not frames[-1][1]:
            frames.pop()
        told = [pts for pts, _ in frames]
        if not told:
            raise video_error(name, "holds no frame that can be decoded: get the file again")
        if None in told or any(b <= a for a, b in pairwise(told)):
            # Only after decoding does a bare stream tell its rate.
            step = frame_duration(
                np.empty(0), 0, index.time_base, decoder.stream.codec_context.framerate
            )
            told = [i * step for i in range(len(told))]
        pts = np.array(told, np.int64)
        duration = frame_duration(pts, 0, index.time_base, decoder.stream.average_rate)
        notices = index.notices + _cut_off(found - len(frames))
        return replace(index, pts=pts, by_count=True, last_duration=duration, notices=notices)
    finally:
        decoder.close()


def _cut_off(lost: int) -> tuple[str, ...]:
    return (f"ends with {lost} frame(s) that cannot be decoded: left out",) if lost else ()


def trim_to_decodable(decoder: PyAVDecoder, first: int, *, check_end: bool) -> FrameIndex:
    """The decoder's index without frames at either end that the file lists but cannot give.

    Before `first` (pts) decoding delivers nothing: such a file begins inside a group of pictures.
    With `check_end` the last group is decoded, to see where a cut-off file ends.
    """
    index = decoder.index
    kept = index.pts[np.searchsorted(index.pts, first) :]
    notices = list(index.notices)
    if len(kept) < len(index.pts):
        lost = len(index.pts) - len(kept)
        notices.append(f"begins with {lost} frame(s) that lack their keyframe: left out")
    if check_end and len(index.key_pts) and len(kept):
        lost = min(decoder.lost_at_the_end(), len(kept) - 1)
        if lost:
            kept = kept[:-lost]
            notices += _cut_off(lost)
    return replace(index, pts=kept, notices=tuple(notices))
