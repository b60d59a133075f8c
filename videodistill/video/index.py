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
from av.video.stream import VideoStream

from videodistill.video.bitstream import begins_anew, is_shown, nal_length_size
from videodistill.video.container import reason_of

# FFmpeg's own frame duration for a still picture, used where a file tells none.
_STILL_SECONDS = Fraction(1, 25)


# A cut-off file is one whose frames end this much before the time that it tells.
_SHORT_SECONDS = 1.0


@dataclass(frozen=True)
class FrameIndex:
    """Times of the displayed frames and of the keyframes, in units of `time_base`.

    pts: int64 [F], ascending without repeats. key_pts, key_dts: int64 [G], by ascending pts, the
    places where decoding can begin. last_duration: how long the last frame is shown.
    by_count: the file has no usable times; frame i is the i-th that decoding from the start gives.
    hidden: packets that are decoded but never shown. clean_cuts: every keyframe refreshes the
    decoder wholly, and what follows it in the file is shown after it. notices: what is missing
    from a damaged file, one line each.
    """

    pts: np.ndarray
    key_pts: np.ndarray
    key_dts: np.ndarray
    time_base: Fraction
    last_duration: int
    by_count: bool
    hidden: int
    clean_cuts: bool
    notices: tuple[str, ...]

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

    When the times are missing or contradict each other the index comes back with `by_count` and no
    frames: only decoding can tell then (`pyav_decoder.index_by_decoding`).
    """
    shown, durations = array("q"), array("q")
    key_pts, key_dts = array("q"), array("q")
    codec = stream.codec_context.codec.canonical_name
    length_size = nal_length_size(codec, stream.codec_context.extradata)
    timeless = _lacks_times(container.format.name, codec, stream)
    clean_cuts, failure = True, None
    corrupt = hidden = 0
    last_dts = latest_key = -(1 << 63)
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
        pts, dts = packet.pts, packet.dts
        if pts is None or (dts is not None and dts < last_dts):
            timeless = True
            continue
        last_dts = last_dts if dts is None else dts
        if packet.is_keyframe:
            key_pts.append(pts)
            key_dts.append(pts if dts is None else dts)
            clean_cuts = clean_cuts and begins_anew(codec, packet, length_size)
            latest_key = pts
        clean_cuts = clean_cuts and pts >= latest_key
        if packet.is_discard or not is_shown(codec, packet):
            hidden += 1
            continue
        shown.append(pts)
        durations.append(packet.duration or 0)

    time_base = Fraction(stream.time_base or Fraction(1, 1000))
    pts, first = np.unique(np.frombuffer(shown, np.int64), return_index=True)
    by_count = timeless or len(pts) < len(shown)
    told = durations[first[-1]] if len(first) else 0
    last_duration = frame_duration(pts, told, time_base, stream.average_rate)
    if failure or corrupt:
        notices = [_damage(failure, corrupt, len(pts), stream.frames)]
    else:
        notices = _shortness(container, stream, pts, last_duration * time_base)
    return FrameIndex(
        pts=np.empty(0, np.int64) if by_count else pts,
        **_by_time(key_pts, key_dts),
        time_base=time_base,
        last_duration=last_duration,
        by_count=by_count,
        hidden=hidden,
        clean_cuts=clean_cuts,
        notices=tuple(notices),
    )


def _lacks_times(container: str, codec: str, stream: VideoStream) -> bool:
    """Where FFmpeg fills in times that contradict each other or change after a seek.

    AVI stores no presentation times, which shows where frames are reordered; an MPEG program stream
    stores them for some packets only.
    """
    reorders = codec in ("h264", "hevc") or stream.codec_context.has_b_frames
    return container == "mpeg" or (container == "avi" and reorders)


def _damage(failure: str | None, corrupt: int, found: int, declared: int) -> str:
    what = f"reading stops with: {failure}" if failure else f"{corrupt} incomplete packet(s)"
    of = f" of the {declared} that it declares" if declared > found else ""
    return f"is cut off or damaged ({what}): {found} whole frames{of} are there"


def _shortness(
    container: InputContainer, stream: VideoStream, pts: np.ndarray, last: Fraction
) -> list[str]:
    """A notice when the frames end well before the time that the file tells for its video."""
    if stream.duration is not None:
        told = float(stream.duration * stream.time_base)
    elif not container.streams.audio and container.duration is not None:
        told = container.duration / av.time_base
    else:
        return []
    if not len(pts):
        return []
    start = min(0, int(pts[0]))
    end = float((int(pts[-1]) - start) * stream.time_base + last)
    if told - end <= _SHORT_SECONDS:
        return []
    return [f"is cut off or tells a wrong length: {told:.3f} s told, frames until {end:.3f} s"]


def _by_time(key_pts: array, key_dts: array) -> dict[str, np.ndarray]:
    pts, dts = np.frombuffer(key_pts, np.int64), np.frombuffer(key_dts, np.int64)
    order = np.argsort(pts, kind="stable")
    return {"key_pts": pts[order], "key_dts": dts[order]}


def frame_duration(pts: np.ndarray, told: int, time_base: Fraction, rate: Fraction | None) -> int:
    """How long the last frame is shown: as told, else as frames usually are, else by the rate."""
    if told > 0:
        return told
    if len(pts) > 1:
        return max(1, int(np.median(np.diff(pts))))
    seconds = 1 / rate if rate else _STILL_SECONDS
    return max(1, round(seconds / time_base))
