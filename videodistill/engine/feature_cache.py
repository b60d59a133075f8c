"""Features of a corpus of videos, computed once by the frozen encoder and kept in a folder.

What the encoder sees of a video does not depend on the question, so all training and answering can
share it. docs/data.md describes the files; the rules that keep them whole:

- A shard is written beside its place, moved there, synced, and only then named in the index. It
  tells of itself what the index tells of it, so that one which a kill left out of it is not lost.
- The index is only ever appended to. A last line without an end is what a kill left behind.
- A video is known by the SHA-256 of its file; its features and each line of the index carry a
  CRC-32, which every reading compares.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from videodistill.data.files import clear_errors, sync, write_whole
from videodistill.errors import UserError
from videodistill.processes import map_in_processes
from videodistill.video.container import local_file, printable

SHARD_BYTES, SHARD_VIDEOS = 128 << 20, 500
"""A shard is written when it holds so much or so many; until then memory holds it."""

_INDEX, _UNFINISHED = "index.jsonl", ".unfinished"
_SHARD = re.compile(r"\d{5,}\.safetensors")
_AGAIN = "run the same videodistill extract again"


class VideoFeatures(NamedTuple):
    """What the encoder sees of a video at n frames: N, or all that a shorter video has.

    frame_embed float16 [n,C_a] and patches float16 [n,S,C_v]: as
        `videodistill.encoders.FrameFeatures` has them, rounded.
    seconds float32 [n]: when each frame is, from the first frame of the video, ascending.
    duration: seconds, until the end of the last frame.
    """

    frame_embed: torch.Tensor
    patches: torch.Tensor
    seconds: torch.Tensor
    duration: float


class FeatureCache:
    """The features in a folder, read video by video: ``cache["a.mp4"]``.

    It holds no open file, so that any number of processes, forked or spawned, can use one. It shows
    what was there when it was opened, also while more is being extracted.

    Attributes:
        folder: Where it is.
        encoder: Fingerprint of the encoder that made the features.
        frames: N, how many frames of each video were asked for.
        precision: "fp32" or "bf16", of the encoder's matrix products.
        videos: Names of the videos that have features, in the order they came in.
        failed: Why the others that were asked for have none, by name.
    """

    def __init__(self, folder: Path, index: _Index) -> None:
        self.folder = folder
        self.encoder, self.frames, self.precision = index.settings
        self.failed: dict[str, str] = {}
        self._stored = index.stored
        self._content: dict[str, str] = {}
        for name, known in index.names.items():
            if known.content is None:
                self.failed[name] = known.failed
            else:
                self._content[name] = known.content
        self.videos = tuple(self._content)

    @classmethod
    def open(cls, folder: str | Path, encoder_fingerprint: str | None = None) -> FeatureCache:
        """The cache in a folder.

        Args:
            folder: That `extract_corpus` wrote, or is writing.
            encoder_fingerprint: Of the encoder that the features must be of; None: of any.

        Raises:
            UserError: There is no cache, its index is damaged, or it is of another encoder.
        """
        folder = Path(folder)
        index = _read_index(folder)
        if index is None:
            raise UserError(f"{folder}: holds no features; make them with: videodistill extract")
        if encoder_fingerprint not in (None, index.settings.encoder):
            raise UserError(
                f"{folder}: holds features of the encoder {index.settings.encoder}, not of "
                f"{encoder_fingerprint}; use that encoder, or extract into another folder"
            )
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self.videos)

    def __iter__(self) -> Iterator[str]:
        return iter(self.videos)

    def __contains__(self, name: object) -> bool:
        return name in self._content

    def __getitem__(self, name: str) -> VideoFeatures:
        """Features of a video, checked; tensors on the CPU that are mapped from the file.

        Raises:
            UserError: The video is not in the cache, or its shard is missing or damaged.
        """
        if name not in self:
            reason = self.failed.get(name, f"was not extracted; extract it into {self.folder}")
            raise UserError(f"{printable(name)}: {reason}")
        return self._read(self._content[name])

    def checksum(self, name: str) -> int:
        """CRC-32 of a video's features, as it was noted when they were written."""
        return self._stored[self._content[name]].crc32

    def verify(self) -> None:
        """Read everything and compare it with its checksums.

        Raises:
            UserError: Shards are missing or damaged; it names them and the remedy.
        """
        damaged = {
            self._stored[content].shard: error
            for content in dict.fromkeys(self._content.values())
            if (error := self._error_of(content))
        }
        if len(damaged) == 1:
            raise next(iter(damaged.values()))
        if damaged:
            raise UserError(
                f"{self.folder}: {len(damaged)} shards are missing or damaged "
                f"({', '.join(sorted(damaged))}): delete what is left of them and {_AGAIN}"
            )

    def _error_of(self, content: str) -> UserError | None:
        try:
            self._read(content)
        except UserError as error:
            return error
        return None

    def _read(self, content: str) -> VideoFeatures:
        stored = self._stored[content]
        path = self.folder / stored.shard
        try:
            with safe_open(path, "pt") as shard:
                features = _in_shard(shard, content, stored.duration)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; put it back, or {_AGAIN}") from None
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if _checksum(features) != stored.crc32:
            raise _damaged(path, "its content is not what was written")
        return features


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is damaged ({reason}); delete this file and {_AGAIN}")


def _in_shard(shard: Any, content: str, duration: float) -> VideoFeatures:
    names = ("frame_embed", "patches", "seconds")
    return VideoFeatures(*(shard.get_tensor(f"{content}/{name}") for name in names), duration)


def _checksum(features: VideoFeatures) -> int:
    """CRC-32 over values, shapes and types."""
    crc = zlib.crc32(repr(features.duration).encode())
    for tensor in features[:3]:
        crc = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().numpy(), crc)
    return crc


# ---------------------------------------------------------------------------------------------
# The index


@dataclass(frozen=True)
class _Stored:
    """Where the features of a file's content are."""

    shard: str
    duration: float
    crc32: int


@dataclass(frozen=True)
class _Known:
    """What became of a video that was asked for: its content's SHA-256, or why there is none."""

    content: str | None
    failed: str | None
    stamp: list[int] | None
    """[bytes, mtime in ns] of the file; None where there was none."""


class _Settings(NamedTuple):
    """What features depend on besides the video."""

    encoder: str
    """Its fingerprint."""
    frames: int
    precision: str

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> _Settings:
        """From what an index or a shard holds; KeyError without encoder or frames."""
        return cls(noted["encoder"], noted["frames"], noted.get("precision", "fp32"))

    def __str__(self) -> str:
        return f"{self.encoder} at {self.frames} frames in {self.precision}"


@dataclass
class _Index:
    settings: _Settings
    stored: dict[str, _Stored] = field(default_factory=dict)
    """By content."""
    names: dict[str, _Known] = field(default_factory=dict)
    shards: dict[str, int | None] = field(default_factory=dict)
    """Bytes of each shard."""

    def header(self) -> dict[str, Any]:
        return {"format": 1, **self.settings._asdict()}

    def add(self, line: dict[str, Any]) -> None:
        """What a line of the file says; later lines stand above earlier ones."""
        if "shard" in line:
            self.shards[line["shard"]] = line["bytes"]
            for content, (duration, crc32) in line["videos"].items():
                self.stored[content] = _Stored(line["shard"], duration, crc32)
        else:
            known = _Known(line.get("content"), line.get("failed"), line["stamp"])
            if known.content is not None and known.content not in self.stored:
                raise KeyError(known.content)
            self.names[line["video"]] = known


def _read_index(folder: Path) -> _Index | None:
    """The index of a folder, or None where there is none yet.

    Raises:
        UserError: It cannot be read, is damaged, or of a later version.
    """
    path = folder / _INDEX
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a feature cache") from None
    index = None
    for number, line in enumerate(lines, start=1):
        try:
            value = _parse(line)
            if index is not None:
                index.add(value)
            elif value["format"] == 1:
                index = _Index(_Settings.of(value))
            else:
                raise UserError(
                    f"{path}: is of format {value['format']}, which this version does not know; "
                    "install the newest videodistill"
                )
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number}: is damaged; delete this file and {_AGAIN}: what the shards "
                "hold is found again"
            ) from None
    return index


def _parse(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if value.pop("crc32") != zlib.crc32(json.dumps(value).encode()):
        raise ValueError("not what was written")
    return value


def _line(value: dict[str, Any]) -> bytes:
    crc32 = zlib.crc32(json.dumps(value).encode())
    return json.dumps(value | {"crc32": crc32}).encode() + b"\n"


# ---------------------------------------------------------------------------------------------
# Writing


class _Writer:
    """Appends to a cache, as the only one who does."""

    def __init__(self, folder: Path, settings: _Settings, log: Callable[[str], None]) -> None:
        self._folder, self._path, self._log = folder, folder / _INDEX, log
        index = _read_index(folder)
        self.index = index or _Index(settings)
        self._refuse_others(_INDEX, self.index.settings, settings)
        self._tensors: dict[str, torch.Tensor] = {}
        self._videos: dict[str, tuple[float, int]] = {}
        self._lines: list[dict[str, Any]] = []
        if index is None:
            write_whole(self._path, _line(self.index.header()))
        else:
            whole = self._path.read_bytes()
            os.truncate(self._path, whole.rfind(b"\n") + 1)
        shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
        for shard in sorted(set(os.listdir(folder)) - set(self.index.shards)):
            if _SHARD.fullmatch(shard):
                self._adopt(shard)
        self._check_shards()

    def _refuse_others(self, file: str, settings: _Settings, wanted: _Settings) -> None:
        if settings != wanted:
            raise UserError(
                f"{self._folder / file}: is of the encoder {settings}, not of {wanted}; extract "
                "into another folder"
            )

    def _adopt(self, shard: str) -> None:
        """Take in a shard that is not in the index: a kill came between the two, or it was lost."""
        path = self._folder / shard
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["videodistill"])
                self._refuse_others(shard, _Settings.of(about), self.index.settings)
                for content, (duration, crc32) in about["videos"].items():
                    if _checksum(_in_shard(file, content, duration)) != crc32:
                        raise ValueError("its content is not what was written")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        self._append([self._about(shard, about["videos"])])
        self._log(f"{shard} was not in the index: {len(about['videos'])} videos found again")

    def _check_shards(self) -> None:
        """Forget the contents of shards that were deleted, so that they are made anew."""
        for shard, size in self.index.shards.items():
            try:
                now = (self._folder / shard).stat().st_size
            except FileNotFoundError:
                gone = [c for c, stored in self.index.stored.items() if stored.shard == shard]
                if gone:
                    self._log(f"{shard} is missing: its {len(gone)} videos must be encoded anew")
                for content in gone:
                    del self.index.stored[content]
                continue
            if now != size:
                raise _damaged(self._folder / shard, f"{now} bytes where {size} were written")

    def add(self, content: str, features: VideoFeatures) -> None:
        """Keep features until the next shard is written, which may be now."""
        for name in ("frame_embed", "patches", "seconds"):
            self._tensors[f"{content}/{name}"] = getattr(features, name)
        self._videos[content] = features.duration, _checksum(features)

    def tell(self, name: str, known: _Known) -> None:
        """Note what became of a video; written with the next shard."""
        line = {"video": name, "content": known.content, "failed": known.failed}
        self._lines.append(
            {key: value for key, value in line.items() if value is not None}
            | {"stamp": known.stamp}
        )

    @property
    def is_full(self) -> bool:
        """Whether it is time to write: contents alone decide, so that equal runs give equal shards.

        Only where nothing waits for a shard, what was told counts.
        """
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        return size >= SHARD_BYTES or len(self._videos or self._lines) >= SHARD_VIDEOS

    def flush(self) -> None:
        """Write what was added and told. What cannot be written is forgotten.

        Raises:
            OSError: The disk is full, or the like; the cache is what it was before.
        """
        tensors, videos, lines = self._tensors, self._videos, self._lines
        self._tensors, self._videos, self._lines = {}, {}, []
        if videos:
            numbers = [int(Path(shard).stem) for shard in self.index.shards]
            shard = f"{max(numbers, default=-1) + 1:05}.safetensors"
            about = self.index.settings._asdict() | {"videos": videos}
            self._write(shard, tensors, {"videodistill": json.dumps(about)})
            lines.insert(0, self._about(shard, videos))
        if lines:
            self._append(lines)

    def _write(
        self, shard: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
    ) -> None:
        # In a folder of its own: safetensors leaves files of other names behind when it is killed.
        unfinished = self._folder / _UNFINISHED
        unfinished.mkdir(exist_ok=True)
        try:
            save_file(tensors, unfinished / shard, metadata)
            # safetensors lets nobody else read what it writes.
            shutil.copymode(self._path, unfinished / shard)
            os.replace(unfinished / shard, self._folder / shard)
        except SafetensorError as error:
            told = re.search(r"os error (\d+)", str(error))
            number = int(told[1]) if told else errno.EIO
            raise OSError(number, os.strerror(number), str(self._folder / shard)) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for written in (self._folder / shard, self._folder):
            sync(written)

    def _about(self, shard: str, videos: dict[str, Any]) -> dict[str, Any]:
        size = (self._folder / shard).stat().st_size
        return {"shard": shard, "bytes": size, "videos": videos}

    def _append(self, lines: list[dict[str, Any]]) -> None:
        size = self._path.stat().st_size
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(map(_line, lines)))
            sync(self._path)
        except OSError:
            os.truncate(self._path, size)
            raise
        for line in lines:
            self.index.add(line)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only one who writes into a folder; a killed process does not keep the lock."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run is writing into it; wait until it has ended, or give "
                "another folder"
            ) from None
        yield


# ---------------------------------------------------------------------------------------------
# Extraction


_encoder: Any = None


def start_encoder(encoder: str, device: str = "cpu", precision: str = "fp32") -> None:
    """Load the encoder that `encode_video` uses in this process."""
    from videodistill.encoders import load_encoder

    global _encoder
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # one process a core
    _encoder = load_encoder(encoder, device=device, precision=precision)


class _Encoded(NamedTuple):
    """A video's features as arrays: tensors would go from process to process by open files."""

    frame_embed: np.ndarray
    patches: np.ndarray
    seconds: np.ndarray
    duration: float
    notices: tuple[str, ...]

    def features(self) -> VideoFeatures:
        return VideoFeatures(*map(torch.from_numpy, self[:3]), self.duration)


def encode_video(job: tuple[str, int]) -> _Encoded:
    """Features of a video file, given with the number of its frames to look at.

    Raises:
        UserError: The file cannot be read.
    """
    from videodistill.engine.answerer import watch

    seen = watch(_encoder, *job)
    return _Encoded(
        seen.features.frame_embed.half().cpu().numpy(),
        seen.features.patches.half().cpu().numpy(),
        seen.times.astype(np.float32),
        seen.duration,
        seen.notices,
    )


class _Job(NamedTuple):
    """A content to encode, from the file of the first video that has it."""

    name: str
    path: str
    content: str
    frames: int


class _Failure(NamedTuple):
    """Why a content was not encoded."""

    reason: str
    lasts: bool
    """Whether it will not be otherwise as long as the file is the same."""


def _is_of_the_device(error: Exception) -> bool:
    """Whether other videos would meet it, too, or this one would not on another day."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)):
        return True
    told = re.compile("CUDA|cuBLAS|cuDNN|HIP error|can't allocate memory", re.IGNORECASE)
    return isinstance(error, RuntimeError) and bool(told.search(str(error)))


def _try_to_encode(job: _Job) -> tuple[_Job, _Encoded | _Failure]:
    """What came of one video; what the others would meet, too, is raised."""
    try:
        return job, encode_video((job.path, job.frames))
    except UserError as error:
        return job, _Failure(_reason(error, job.path), lasts=True)
    except Exception as error:  # whatever one video does, the others go on
        if _is_of_the_device(error):
            raise
        return job, _Failure(f"{type(error).__name__}: {error}", lasts=False)


def _reason(error: UserError, path: str) -> str:
    """What a message says after the name of the file."""
    message = str(error)
    for name in (path, os.path.abspath(path)):
        message = message.removeprefix(f"{printable(name)}: ")
    return message


@dataclass
class Extracted:
    """What a run did with the videos that it was asked for; each is counted once."""

    encoded: int = 0
    reused: int = 0
    """Had features already."""
    duplicates: int = 0
    """Have the same bytes as another video, whose features are theirs."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why there are no features, by name; also of those that failed in an earlier run."""
    notices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What is missing from damaged videos that were encoded as far as they can be read."""

    @property
    def done(self) -> int:
        return self.encoded + self.reused + self.duplicates + len(self.failed)


def extract_corpus(
    videos: Mapping[str, str | Path],
    encoder: str | Path,
    frames: int,
    folder: str | Path,
    *,
    workers: int,
    device: str = "cpu",
    precision: str = "fp32",
    retry: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> Extracted:
    """Compute those features of videos that are not in the cache yet.

    A run that was stopped, in whatever way, goes on where it was; at most the shard that was not
    finished is lost. A video whose file has another size or time than before is known by its
    content: the same one is not encoded again. Features of a file that is gone stay. A video that
    cannot be read is recorded with the reason and left alone until its file changes.

    Args:
        videos: File of each video by its name.
        encoder: Folder or hub id.
        frames: N; a video with fewer gives all that it has.
        folder: Of the cache; made if it is not there.
        workers: Processes, each with an encoder and one thread; 1 works in this process. On a GPU
            they share it, so that it encodes one's frames while others read theirs.
        device: Where frames are encoded.
        precision: Of the encoder's matrix products, "fp32" or "bf16".
        retry: Try again what failed before.
        progress: Called with the numbers of videos done and to do.
        log: Called with lines about what was found amiss and mended.

    Raises:
        UserError: The encoder cannot be loaded; the folder cannot be written, holds features of
            another encoder, number of frames or precision, has a damaged index or shard, or another
            run writes into it; the disk is full; a worker was killed.
    """
    from videodistill.encoders import load_encoder

    if workers < 1:
        raise UserError(f"workers {workers}: use at least 1")
    if frames < 1:
        raise UserError(f"frames {frames}: use at least 1")
    folder = Path(folder)
    fingerprint = load_encoder(encoder, precision=precision).fingerprint
    settings = _Settings(fingerprint, frames, precision)
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            run = _Run(_Writer(folder, settings, log), videos, frames, retry, progress)
            try:
                return run.go(workers, str(encoder), device, precision)
            except (MemoryError, RuntimeError) as error:
                if not _is_of_the_device(error):
                    raise
                told = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{folder}: {device} failed or has too little memory ({told}); run the same "
                    "command again, with fewer --workers: it goes on where it stopped"
                ) from error


class _Run:
    """One pass over the videos: which must be encoded, and what came of it."""

    def __init__(
        self,
        writer: _Writer,
        videos: Mapping[str, str | Path],
        frames: int,
        retry: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        self._writer, self._videos, self._frames = writer, videos, frames
        self._retry, self._progress = retry, progress
        self._result = Extracted()
        self._waiting: dict[str, dict[str, list[int] | None]] = {}
        """Videos, with their files' stamps, by the content that is being encoded."""
        self._pending: set[str] = set()
        """Contents that were encoded and are not in a shard yet."""
        self._broken: dict[str, _Failure] = {}
        """Why contents cannot be encoded."""
        self._named = {known.content for known in writer.index.names.values()}
        """Contents that a video is known to have."""

    def go(self, workers: int, *encoder: str) -> Extracted:
        """``encoder``: as `start_encoder` takes it."""
        with map_in_processes(
            _try_to_encode, self._jobs(), workers, start_encoder, *encoder
        ) as results:
            try:
                for job, encoded in results:
                    self._take(job, encoded)
            finally:  # what is ready is kept, whatever ends the run
                self._flush()
        return self._result

    def _jobs(self) -> Iterable[_Job]:
        """What must be encoded; videos for which nothing must be done are dealt with on the way."""
        names, stored = self._writer.index.names, self._writer.index.stored
        for name, path in self._videos.items():
            path = os.fspath(path)
            last = names.get(name)
            stamp = _stamp(path)
            same = last is not None and last.stamp == stamp
            if last is not None and last.content in stored and (same or stamp is None):
                self._result.reused += 1
            elif same and last.failed is not None and not self._retry:
                self._result.failed[name] = last.failed
            elif (content := self._content(name, path, stamp)) is None:
                pass  # it has failed
            elif content in self._waiting:
                self._waiting[content][name] = stamp
                continue
            elif content in self._broken:
                self._fail(name, *self._broken[content], stamp)
            elif content in stored or content in self._pending:
                if content in self._named and (last is None or last.content != content):
                    self._result.duplicates += 1
                else:
                    self._result.reused += 1
                self._tell(name, _Known(content, None, stamp))
            else:
                self._waiting[content] = {name: stamp}
                yield _Job(name, path, content, self._frames)
                continue
            self._progress(self._result.done, len(self._videos))

    def _content(self, name: str, path: str, stamp: list[int] | None) -> str | None:
        """SHA-256 of a file that is not known yet, or None when it cannot be read."""
        try:
            return _sha256(local_file(path))
        except UserError as error:
            self._fail(name, _reason(error, path), True, stamp)
        except OSError as error:
            self._fail(name, f"cannot be read ({error.strerror})", True, stamp)
        return None

    def _take(self, job: _Job, encoded: _Encoded | _Failure) -> None:
        names = self._waiting.pop(job.content)
        if _stamp(job.path) != names[job.name]:
            for name in names:
                self._fail(
                    name, f"{job.path} was changed while it was read: {_AGAIN}", False, stamp=None
                )
        elif isinstance(encoded, _Failure):
            self._broken[job.content] = encoded
            for name, stamp in names.items():
                self._fail(name, *encoded, stamp)
        else:
            self._pending.add(job.content)
            self._writer.add(job.content, encoded.features())
            for name, stamp in names.items():
                self._tell(name, _Known(job.content, None, stamp))
            self._result.encoded += 1
            self._result.duplicates += len(names) - 1
            if encoded.notices:
                self._result.notices[job.name] = encoded.notices
        self._progress(self._result.done, len(self._videos))

    def _fail(self, name: str, reason: str, lasts: bool, stamp: list[int] | None) -> None:
        self._result.failed[name] = reason
        # Without a stamp the next run tries again.
        self._tell(name, _Known(None, reason, stamp if lasts else None))

    def _tell(self, name: str, known: _Known) -> None:
        self._named.add(known.content)
        self._writer.tell(name, known)
        if self._writer.is_full:
            self._flush()

    def _flush(self) -> None:
        self._writer.flush()
        self._pending.clear()


def _stamp(path: str) -> list[int] | None:
    """[bytes, mtime in ns] of a file: what tells quickly that it is not the one it was."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
