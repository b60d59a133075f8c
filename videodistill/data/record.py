"""One record for every dataset: a question about a stretch of a video."""

from __future__ import annotations

from dataclasses import dataclass

Stretch = tuple[float, float]
"""Start and end in seconds from the first displayed frame of the video."""


@dataclass(frozen=True)
class Clip:
    """A stretch of a video file, as one of several to choose from."""

    video: str
    """Path of the video file relative to the dataset's video folder."""
    start: float
    end: float


@dataclass(frozen=True)
class Question:
    """A question about a video, whatever dataset it comes from.

    Times are in seconds from the first displayed frame of the video.
    """

    question_id: str
    video: str
    """Path of the video file relative to the dataset's video folder."""
    question: str
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    """The answers to choose from; ``None`` for an open-ended question."""
    family: str | None = None
    """The dataset's own question type ("CW", "count", ...)."""
    reference: str | None = None
    """"direct" or "indirect", where the dataset says."""
    interval: Stretch | None = None
    """The stretch of the video that the question is about; ``None`` is all of it."""
    evidence: tuple[Stretch, ...] = ()
    """Ground-truth stretches that show the answer; empty when none are annotated."""
    context: tuple[Stretch, ...] = ()
    """Further stretches that one must see to know which stretch is the evidence."""
    program: str | None = None
    """The question as nested functions, where the dataset gives them."""
    tags: tuple[str, ...] = ()
    """Further labels of the dataset, e.g. EgoTaskQA's reasoning types."""
    references: tuple[str, ...] = ()
    """Further answers that are as right as ``answer``."""
    clips: tuple[Clip, ...] = ()
    """The clips to choose from where not texts but videos are chosen (EgoMCQ); ``choices`` are then
    their numbers and ``video`` is the file of the first."""
    direct_equivalent: str | None = None
    """Id of the question that asks the same with direct references, where the dataset tells."""

    @property
    def videos(self) -> tuple[str, ...]:
        """The files that one must see: ``video``, or those of all clips."""
        return tuple(dict.fromkeys(clip.video for clip in self.clips)) or (self.video,)


@dataclass(frozen=True)
class VideoInfo:
    """What annotation files repeat about a video file."""

    frame_count: int
    fps: float
    width: int
    height: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frame_count / self.fps
