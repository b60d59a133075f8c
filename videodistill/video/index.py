"""The displayed frames of a video and their times, found without decoding.

A container's own frame count, duration and frame rate are hints that real files get wrong. What
counts is the packets: each holds one coded frame with its presentation time. An edit list marks
packets that are decoded but never shown; they are no frames. The packets with the keyframe flag
are the places where decoding can begin.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from videodistill.video.container import reason_of

# FFmpeg's own frame duration for a still picture, used where a file tells none.
_STILL_SECONDS = Fraction(1, 25)


@dataclass(frozen=True)
class FrameIndex:
    """Times of the displayed frames and of the keyframes, in units of `time_base`.

    pts: int64 [F], ascending without repeats. key_pts, key_dts: int64 [G], by ascending pts, the
    places where decoding can begin. last_duration: how long the last frame is shown (≥ 1 unit of
    time or a guess from the other frames). by_count: the file has no usable times, so that frame i
    is the i-th that decoding from the start delivers. notices: what is wrong with the file, one
    line each. damaged: notices tell of missing or broken data, not only of oddities.
    """

    pts: np.ndarray
    key_pts: np.ndarray
    key_dts: np.ndarray
    time_base: Fraction
    last_duration: int
    by_count: bool
    hidden: int
    notices: tuple[str, ...]
    damaged: bool

    def seconds(self) -> np.ndarray:
        """float64 [F]: times from the first frame on."""
        return (self.pts - self.pts[:1]) * float(self.time_base)

    def key_before(self, pts: int) -> int:
        """Number of the last keyframe shown at or before `pts`; -1 means the start of the file.

        A frame that follows a keyframe in the file but is shown before it (open GOP) needs the
        keyframe before that one: comparing presentation times, not positions, gives just this.
        """
        return int(np.searchsorted(self.key_pts, pts, side="right")) - 1


def index_packets(container: InputContainer, stream: VideoStream) -> FrameIndex:
    """Reads all packets of `stream` from a freshly opened `container` and decodes none.

    When some frame has no presentation time the index comes back with `by_count` and no frames:
    only decoding can tell then (`pyav_decoder.index_by_decoding`).
    """
    shown, durations = array("q"), array("q")
    key_pts, key_dts = array("q"), array("q")
    corrupt = timeless = hidden = 0
    failure = None
    codec = stream.codec_context.name
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.error.FFmpegError as error:
            failure = reason_of(error)
            break
        if packet.size == 0:  # the mark of the end, or AVI's "the same picture once more"
            continue
        if packet.is_corrupt:
            corrupt += 1
            continue
        if packet.pts is None:
            timeless += 1
            continue
        if packet.is_keyframe:
            key_pts.append(packet.pts)
            key_dts.append(packet.dts if packet.dts is not None else packet.pts)
        if packet.is_discard or not _is_shown(codec, packet):
            hidden += 1
            continue
        shown.append(packet.pts)
        durations.append(packet.duration or 0)

    notices = []
    if failure:
        notices.append(f"reading stopped at damaged data ({failure}); later frames are missing")
    if corrupt:
        notices.append(f"{corrupt} incomplete packet(s) left out; their frames are missing")
    time_base = Fraction(stream.time_base or Fraction(1, 1000))
    pts, first = np.unique(np.frombuffer(shown, np.int64), return_index=True)
    return FrameIndex(
        pts=np.empty(0, np.int64) if timeless else pts,
        **_by_time(key_pts, key_dts),
        time_base=time_base,
        last_duration=frame_duration(
            pts, durations[first[-1]] if len(first) else 0, time_base, stream
        ),
        by_count=bool(timeless),
        hidden=hidden,
        notices=tuple(notices),
        damaged=bool(notices),
    )


def _by_time(key_pts: array, key_dts: array) -> dict[str, np.ndarray]:
    pts, dts = np.frombuffer(key_pts, np.int64), np.frombuffer(key_dts, np.int64)
    order = np.argsort(pts, kind="stable")
    return {"key_pts": pts[order], "key_dts": dts[order]}


def frame_duration(pts: np.ndarray, told: int, time_base: Fraction, stream: VideoStream) -> int:
    """How long the last frame is shown: as told, else as frames usually are, else by the rate."""
    if told > 0:
        return told
    if len(pts) > 1:
        return max(1, int(np.median(np.diff(pts))))
    seconds = 1 / stream.average_rate if stream.average_rate else _STILL_SECONDS
    return max(1, round(seconds / time_base))


def _is_shown(codec: str, packet: Packet) -> bool:
    """False for a VP8 or VP9 packet that only holds a reference picture, never displayed.

    VP8: frame tag, bit 4 of the first byte (RFC 6386, 9.1). VP9: uncompressed header: marker (2
    bits), profile (2, and a reserved one in profile 3), show_existing_frame, frame_type,
    show_frame. A VP9 superframe hides such pictures inside a packet and always shows one.
    """
    if codec not in ("vp8", "libvpx", "vp9", "libvpx-vp9"):
        return True
    data = memoryview(packet)
    first = data[0]
    if codec in ("vp8", "libvpx"):
        return bool(first >> 4 & 1)
    if data[-1] & 0xE0 == 0xC0:  # the marker of a superframe index ends the packet
        return True
    profile_bits = 5 if first & 0x30 == 0x30 else 4
    show_existing = first >> (7 - profile_bits) & 1
    if show_existing:
        return True
    return bool(first >> (7 - profile_bits - 2) & 1)
