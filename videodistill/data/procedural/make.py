"""Write the procedural benchmark to disk: mp4 files and annotations, in parallel, resumable.

A data set is a folder::

    dataset.json                  data version, seed, arguments and checksums of each split
    videos/<split>/<id>.mp4       H.264
    annotations/<split>/          egotaskqa.json  nextqa_mc.csv  nextqa_oe.csv  nextgqa.json
    parts/<split>/<id>.json       what is known of each finished video; written after its mp4

All annotation files list the same questions in the same order (``nextgqa.json`` only those that
have evidence). A video and its questions depend on the seed, the name of the split and the number
of the video alone, so the files are the same for any number of workers and after any interruption.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from videodistill.data.egotaskqa import write_egotaskqa
from videodistill.data.files import clear_errors, read_json, write_whole
from videodistill.data.nextgqa import write_nextgqa
from videodistill.data.nextqa import write_nextqa_mc, write_nextqa_oe
from videodistill.data.procedural.questions import Asked, ask
from videodistill.data.procedural.render import render
from videodistill.data.procedural.world import DATA_VERSION, World, WorldConfig, sample_world
from videodistill.data.record import Question, Stretch, VideoInfo
from videodistill.errors import UserError
from videodistill.processes import cores, follow_parent

NEXTQA_TYPES = {
    "describe": "DO",
    "where": "DL",
    "count": "DC",
    "before": "TP",
    "after": "TN",
    "change": "TC",
    "cause": "CW",
    "carry": "CH",
}
"""The NExT-QA type that each question family is written as."""

EGOTASKQA_LABELS = {
    "describe": ("descriptive", "object", "query"),
    "where": ("descriptive", "relation", "query"),
    "count": ("descriptive", "object", "count"),
    "before": ("temporal", "object", "query"),
    "after": ("temporal", "object", "query"),
    "change": ("descriptive", "change", "query"),
    "cause": ("explanatory", "object", "query"),
    "carry": ("descriptive", "object", "query"),
}
"""EgoTaskQA's category, semantic and structural of each family; the family itself is the type."""

_ENCODER = {
    "crf": "18",
    "preset": "veryfast",
    "g": "60",  # a key frame each 60 frames: a sparse read decodes little
    "threads": "1",  # x264's output depends on its thread count
    # x264 165's macroblock tree reads memory that it never wrote (seen with B-frames and
    # MALLOC_PERTURB_): the same frames gave different bytes.
    "x264-params": "mbtree=0",
    "flags": "+bitexact",
}
_FRAMES_PER_TASK = 512
"""About as many frames as a worker is given at a time: some 0.5 s of work."""

Progress = Callable[[str, int, int], None]
"""Called with (split, videos finished, videos in all)."""


@dataclass(frozen=True)
class Split:
    """The arguments of one split."""

    videos: int
    frames: tuple[int, int] = (64, 64)
    """Shortest and longest video; each length between them is drawn as often."""
    size: int = 96
    """Side of the square picture in pixels."""
    fps: float = 12.0
    bias: float = 0.0
    reverse_bias: bool = False
    """See `videodistill.data.procedural.world.WorldConfig` for both."""
    questions: int = 8
    """Questions asked about each video, at most."""

    def check(self, name: str) -> None:
        """Raise UserError when an argument is out of range."""
        shortest, longest = self.frames
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
            raise UserError(f"split name {name!r}: use letters, digits, '.' and '-' only")
        if self.videos < 1:
            raise UserError(f"split {name}: {self.videos} videos; ask for at least 1")
        if not 16 <= shortest <= longest <= 1024:
            given = shortest if shortest == longest else f"{shortest}-{longest}"
            raise UserError(
                f"frames {given}: a video has 16 to 1024; give one number or shortest-longest"
            )
        if not 32 <= self.size <= 1024 or self.size % 2:
            raise UserError(f"size {self.size}: use an even number from 32 to 1024")
        if not 1 <= self.fps <= 240:
            raise UserError(f"fps {self.fps}: use 1 to 240")
        if not 0 <= self.bias <= 1:
            raise UserError(f"bias {self.bias}: it is a probability, use 0 to 1")
        if self.questions < 1:
            raise UserError(f"questions {self.questions}: ask at least 1 of each video")


def make_dataset(
    out: str | Path,
    splits: Mapping[str, Split],
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write splits of the procedural benchmark, or what is missing of them.

    Args:
        out: The data set's folder. It may hold the same splits, finished or not, and others.
        splits: The arguments of each split by its name.
        seed: Not negative. A data set has one seed.
        workers: Processes; by default one for each core that this process may use.
        progress: Called now and then.

    Returns:
        What dataset.json holds.

    Raises:
        UserError: An argument is out of range, ``out`` holds other data, or it cannot be written.
    """
    out = Path(out)
    if workers is None:
        workers = cores()
    if workers < 1:
        raise UserError(f"workers {workers}: use at least 1")
    if seed < 0:
        raise UserError(f"seed {seed}: use 0 or more")
    if not splits:
        raise UserError("no split to make: name at least one, e.g. train=4000")
    for name, split in splits.items():
        split.check(name)

    with clear_errors(out):
        dataset = _open(out, splits, seed)
        _make_videos(out, splits, seed, workers, progress or (lambda *counts: None))
        for name, split in splits.items():
            dataset["splits"][name].update(_write_annotations(out, name, split))
        dataset["splits"] = dict(sorted(dataset["splits"].items()))
        write_whole(out / "dataset.json", _indented(dataset))
    return dataset


def _open(out: Path, splits: Mapping[str, Split], seed: int) -> dict[str, Any]:
    """dataset.json with the arguments of the splits in it; refuses data made in another way."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "dataset.json"
    # Another x264 gives other bytes: the encoder counts as an argument.
    asked = {"data_version": DATA_VERSION, "seed": seed, "encoder": f"av {av.__version__}"}
    if not path.exists() and (out / "parts").exists():
        raise UserError(
            f"{out} holds videos but no dataset.json that says how they were made: choose another "
            "folder"
        )
    dataset = read_json(path, dict) if path.exists() else {**asked, "splits": {}}
    differences = _differences(dataset, asked)
    for name, split in splits.items():
        arguments = json.loads(json.dumps(asdict(split)))
        entry = dataset.setdefault("splits", {}).setdefault(name, {"arguments": arguments})
        differences += _differences(entry.get("arguments", {}), arguments, f"{name}: ")
    if differences:
        raise UserError(
            f"{out} holds other data ({'; '.join(differences)}): give the same arguments or "
            "choose another folder"
        )
    # Before the first video, so that a run that was killed cannot be continued differently.
    write_whole(path, _indented(dataset))
    return dataset


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [
        f"{prefix}{key} is {old.get(key)} there, {value} here"
        for key, value in new.items()
        if old.get(key) != value
    ]


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


# Videos


@dataclass(frozen=True)
class _Task:
    """A few videos for one worker."""

    out: Path
    name: str
    split: Split
    seed: int
    numbers: tuple[int, ...]

    def run(self) -> None:
        for number in self.numbers:
            _make_video(self.out, self.name, self.split, self.seed, number)


def _make_videos(
    out: Path, splits: Mapping[str, Split], seed: int, workers: int, progress: Progress
) -> None:
    """Make those videos that are not finished."""
    done, tasks = {}, []
    for name, split in splits.items():
        for kind in ("videos", "parts", "annotations"):
            (out / kind / name).mkdir(parents=True, exist_ok=True)
        missing = [n for n in range(split.videos) if _finished(out, name, n) is None]
        done[name] = split.videos - len(missing)
        progress(name, done[name], split.videos)
        per_task = max(1, 2 * _FRAMES_PER_TASK // sum(split.frames))
        for i in range(0, len(missing), per_task):
            tasks.append(_Task(out, name, split, seed, tuple(missing[i : i + per_task])))
    for task in _run(tasks, min(workers, len(tasks))):
        done[task.name] += len(task.numbers)
        progress(task.name, done[task.name], task.split.videos)


def _run(tasks: Sequence[_Task], workers: int) -> Iterator[_Task]:
    """Run tasks, in this process or in several; yields each when it is finished."""
    if workers <= 1:
        for task in tasks:
            task.run()
            yield task
        return
    with _single_threaded_children():
        # Spawned, not forked: a fork would copy whatever locks the caller's threads hold.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        try:
            running = {pool.submit(task.run): task for task in tasks}
            for future in as_completed(running):
                future.result()
                yield running[future]
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started inside use one thread each: as many workers as cores do not fight."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker() -> None:
    """End with the parent process; leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def _paths(out: Path, name: str, number: int) -> tuple[Path, Path]:
    """The mp4 of a video and the part that says it is finished."""
    video = f"{name}-{number:06d}"
    return out / "videos" / name / f"{video}.mp4", out / "parts" / name / f"{video}.json"


def _finished(out: Path, name: str, number: int) -> dict[str, Any] | None:
    """The part of a video that is whole; None where it has to be made (again)."""
    mp4, part = _paths(out, name, number)
    try:
        known = json.loads(part.read_bytes())
        return known if mp4.stat().st_size == known["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_video(out: Path, name: str, split: Split, seed: int, number: int) -> None:
    mp4, part = _paths(out, name, number)
    world = _world(name, split, seed, number)
    content = encode_mp4(
        (render(world, frame, split.size) for frame in range(world.frames)), split.size, split.fps
    )
    write_whole(mp4, content)
    known = {
        "frame_count": world.frames,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "questions": [asdict(asked) for asked in ask(world, split.questions)],
    }
    write_whole(part, json.dumps(known))


def _world(name: str, split: Split, seed: int, number: int) -> World:
    # The name itself is part of the seed: equal numbers in two splits are different videos.
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    shortest, longest = split.frames
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, key, number, 1))))
    config = WorldConfig(
        frames=int(rng.integers(shortest, longest + 1)),
        fps=split.fps,
        bias=split.bias,
        reverse_bias=split.reverse_bias,
    )
    return sample_world((seed, key, number), config)


def encode_mp4(frames: Iterator[np.ndarray], size: int, fps: float) -> bytes:
    """An H.264 mp4 file (yuv420p) of square uint8 [size, size, 3] RGB frames.

    The same frames give the same bytes: the file holds no date and no name of its writer.
    """
    rate = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=dict(_ENCODER))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


# Annotations


def _write_annotations(out: Path, name: str, split: Split) -> dict[str, Any]:
    """Write a finished split's annotations; returns its counts and checksums."""
    parts = [_finished(out, name, number) for number in range(split.videos)]
    videos, questions = {}, []
    for number, part in enumerate(parts):
        video = _paths(out, name, number)[0].name
        videos[video] = VideoInfo(part["frame_count"], split.fps, split.size, split.size)
        for qid, asked in enumerate(part["questions"]):
            questions.append(_question(video, qid, Asked(**asked)))

    folder = out / "annotations" / name
    as_nextqa = [replace(q, family=NEXTQA_TYPES[q.family]) for q in questions]
    as_egotaskqa = [replace(q, question_id=str(i)) for i, q in enumerate(questions)]
    write_egotaskqa(folder / "egotaskqa.json", as_egotaskqa, videos)
    write_nextqa_mc(folder / "nextqa_mc.csv", as_nextqa, videos)
    write_nextqa_oe(folder / "nextqa_oe.csv", as_nextqa, videos)
    write_nextgqa(folder / "nextgqa.json", as_nextqa, videos)
    checksums = "".join(part["sha256"] for part in parts)
    return {
        "videos": len(parts),
        "frames": sum(info.frame_count for info in videos.values()),
        "questions": len(questions),
        "sha256": {
            "videos": hashlib.sha256(checksums.encode()).hexdigest(),
            **{
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(folder.glob("*.*"))
                if not path.name.startswith(".")
            },
        },
    }


def _question(video: str, qid: int, asked: Asked) -> Question:
    return Question(
        question_id=f"{video.removesuffix('.mp4')}_{qid}",
        video=video,
        question=asked.question,
        answer=asked.answer,
        choices=tuple(asked.choices),
        family=asked.family,
        reference=asked.reference,
        evidence=_pairs(asked.evidence),
        context=_pairs(asked.context),
        program=asked.program,
        tags=(asked.family, *EGOTASKQA_LABELS[asked.family]),
    )


def _pairs(stretches: Sequence[Sequence[float]]) -> tuple[Stretch, ...]:
    """What JSON gave back as lists; not rounded, for an end must not exceed the duration."""
    return tuple((start, end) for start, end in stretches)
