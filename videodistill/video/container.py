"""Opening a local video file, and telling in one line why a file is none."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from videodistill.errors import UserError

# Demuxers that FFmpeg picks for a local file although it holds no pictures of its own: text drawn
# as a terminal would, and play lists that point to other files or hosts.
_NOT_A_VIDEO = {"tty", "concat", "hls", "dash", "imf", "sdp", "rtsp", "applehttp"}
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")


def printable(name: str) -> str:
    """A file name for a message of one line: control characters escaped, no longer than a line."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= 300 else text[:150] + "…" + text[-149:]


def video_error(name: str, reason_and_remedy: str) -> UserError:
    return UserError(f"{printable(name)}: {reason_and_remedy}")


class VideoWarning(UserWarning):
    """A video is readable but not whole; the message says what is missing."""


def local_file(path: str | os.PathLike[str]) -> str:
    """The absolute name of an existing, readable, non-empty regular file.

    Raises `UserError` otherwise. A name is only ever a name here: one that starts with "-" or
    holds ":" or "%" means the file of that name.
    """
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path: expected str or a path of str, got {type(path).__name__}")
    if not name or "\0" in name:
        raise video_error(repr(name), "is not a file name: give the path of a video file")
    try:
        status = os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        if _URL.match(name):
            raise video_error(
                name, "only local files are read, not URLs: download the video first"
            ) from None
        raise video_error(name, "no such file: check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise video_error(name, f"cannot be read ({reason}): check path and permissions") from None
    if stat.S_ISDIR(status.st_mode):
        raise video_error(name, "is a directory: give a video file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise video_error(name, "is not a regular file: save the video to a file first")
    if status.st_size == 0:
        raise video_error(name, "is empty (0 bytes): copy or download it again")
    try:
        os.close(os.open(name, os.O_RDONLY))
    except OSError as error:
        raise video_error(
            name, f"cannot be read ({error.strerror}): check its permissions"
        ) from None
    return os.path.abspath(name)


def open_video(name: str) -> tuple[InputContainer, VideoStream]:
    """Opens the file and its first true video stream (cover art is none).

    `name` comes from `local_file`. Raises `UserError` when the file is damaged beyond opening, is
    no video, or holds only sound or cover art. The caller closes the container.
    """
    try:
        # "file:" keeps FFmpeg from reading a protocol into the name, the whitelist keeps what is
        # inside a file from opening other addresses, and no pattern is seen in "clip%03d.jpg".
        container = av.open(
            "file:" + name, options={"protocol_whitelist": "file", "pattern_type": "none"}
        )
    except (av.error.FFmpegError, UnicodeError, ValueError) as error:
        raise video_error(
            name,
            f"is not a video that can be read ({reason_of(error)}): "
            f"check that it plays, or download it again",
        ) from None
    try:
        stream = _video_stream(name, container)
    except UserError:
        container.close()
        raise
    # One thread: a file holds one slice per picture as a rule, so that slice threads would idle,
    # and frame threads decode ahead of every seek. Several videos are read by several readers.
    stream.codec_context.thread_count = 1
    return container, stream


def _video_stream(name: str, container: InputContainer) -> VideoStream:
    if set(container.format.name.split(",")) & _NOT_A_VIDEO:
        raise video_error(name, f"is not a video but {container.format.long_name}: give a video")
    streams = container.streams.video
    for stream in streams:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise video_error(
                    name,
                    f"no decoder for its video stream: convert it, for example with "
                    f"ffmpeg -i {Path(name).name} -c:v libx264 out.mp4",
                )
            return stream
    if streams:
        raise video_error(name, "holds sound and cover art but no video: give a video file")
    if container.streams.audio:
        raise video_error(name, "holds sound but no video: give a video file")
    raise video_error(name, "holds no video stream: give a video file")


def reason_of(error: BaseException) -> str:
    """What went wrong, in FFmpeg's own words where it has some."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
