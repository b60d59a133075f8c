"""A picture of what answers rest on: frame scores over time, chosen frames, gates as heat-maps.

Drawn without pyplot: no window system is touched and no global state is left.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from videodistill.engine.checks import check_figure
from videodistill.video import FrameReader, VideoWarning

if TYPE_CHECKING:
    from videodistill.engine.answerer import Answer, Answered, EncodedVideo

_WIDTH = 11.0  # inches
_MARGIN = 0.35
_PLOT_HEIGHT = 1.35
_PER_ROW = 4  # a row of up to this many frames, and up to twice as many where they are narrow
_DPI = 150
_MOST_PIXELS = 60_000  # Agg's limit is 2**16
_THUMBNAIL = 640  # longest side of a drawn frame in pixels

_INK, _FAINT, _LINE, _CHOSEN = "#1f2430", "#7a8290", "#9db4d6", "#d9480f"
# From invisible to a warm colour: a closed gate leaves the frame as it is.
_HEAT = LinearSegmentedColormap.from_list(
    "gate", [(1.0, 0.85, 0.2, 0.0), (1.0, 0.7, 0.1, 0.22), (0.95, 0.1, 0.05, 0.62)]
)
# Fonts for scripts that matplotlib's own lacks, taken where they are installed.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Devanagari",
    "Noto Sans Arabic",
    "WenQuanYi Micro Hei",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial Unicode MS",
)


def draw(answered: Answered, path: str | Path) -> Path:
    """Write the picture of `answered` to `path` (its suffix says the format); returns the path.

    Reads the chosen frames from the video again. The file appears whole or not at all.
    """
    path = check_figure(path)
    video = answered.video
    images = _read_frames(video, answered.answers)
    with _style():
        figure = Figure(dpi=_DPI, facecolor="white")
        heights = [_block_height(video, len(answer.frames)) for answer in answered.answers]
        height = sum(heights) + _MARGIN + 0.3
        figure.set_size_inches(_WIDTH, height)
        figure.set_dpi(min(_DPI, _MOST_PIXELS / height))
        page = _Page(figure, _WIDTH, height)
        _draw_header(page, answered)
        top = 0.3 + _MARGIN / 2
        for answer, block in zip(answered.answers, heights, strict=True):
            _draw_block(page, top, answer, answered, images)
            top += block
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=figure.dpi)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


class _Page:
    """Axes placed in inches from the top left corner of a figure."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        style = {"va": "top", "ha": "left", "color": _INK, "parse_math": False} | style
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)


@contextmanager
def _style() -> Iterator[None]:
    installed = set(font_manager.get_font_names())
    settings = {
        "font.family": [name for name in _FONTS if name in installed],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _FAINT,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "svg.hashsalt": "videodistill",
    }
    with rc_context(settings), warnings.catch_warnings():
        # A script that no installed font has is drawn as boxes; that is no reason to stop.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        yield


def _read_frames(video: EncodedVideo, answers: tuple[Answer, ...]) -> dict[int, np.ndarray]:
    """uint8 [h,w,3] thumbnails of every chosen frame, by its number in the file."""
    wanted = sorted({frame.index for answer in answers for frame in answer.frames})
    images = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        reader = FrameReader(video.path)
    with reader:
        for index in wanted:
            image = Image.fromarray(reader.read([index])[0])
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            images[index] = np.asarray(image)
    return images


def _grid(video: EncodedVideo, count: int) -> tuple[int, int, float, float]:
    """Columns, rows, and width and height in inches of the chosen frames' cells."""
    per_row = _PER_ROW if video.width > 1.3 * video.height else 2 * _PER_ROW
    rows = -(-count // per_row)
    columns = -(-count // rows) if rows else 1
    width = (_WIDTH - 2 * _MARGIN - 0.55) / max(columns, _PER_ROW)
    height = min(width * video.height / video.width, 3.2)
    return columns, rows, width, height


def _block_height(video: EncodedVideo, count: int) -> float:
    _, rows, _, height = _grid(video, count)
    return 0.7 + _PLOT_HEIGHT + 0.5 + rows * (height + 0.28) + 0.2


def _draw_header(page: _Page, answered: Answered) -> None:
    video = answered.video
    name = textwrap.shorten(Path(video.path).name, 60, placeholder="…")
    looked = f"{len(video.times)} of {video.frame_count} frames looked at"
    facts = f"{name}   ·   {video.duration:.1f} s   ·   {video.width}×{video.height}   ·   {looked}"
    if answered.seen[2:] != (video.width, video.height):
        facts += "   ·   pale: outside the encoder's view"
    if not answered.trained:
        facts += "   ·   zero-shot: the gates are untrained and not drawn"
    page.text(_MARGIN, 0.18, facts, color=_FAINT, fontsize=9)


def _draw_block(
    page: _Page, top: float, answer: Answer, answered: Answered, images: dict[int, np.ndarray]
) -> None:
    video = answered.video
    question = textwrap.shorten(answer.question, 110, placeholder="…")
    page.text(_MARGIN, top, question, fontsize=11.5, fontweight="bold")
    page.text(_MARGIN, top + 0.27, answer.answer, fontsize=11.5, color=_CHOSEN, fontweight="bold")
    runner_up = ",  ".join(f"{text} {p:.0%}" for text, p in answer.top[1:4])
    page.text(
        page.width - _MARGIN,
        top + 0.29,
        f"{answer.confidence:.0%}   ·   then {runner_up}",
        ha="right",
        color=_FAINT,
    )
    top += 0.7
    left, width = _MARGIN + 0.45, page.width - 2 * _MARGIN - 0.45
    _draw_scores(page.axes(left, top, width, _PLOT_HEIGHT), answer, video)
    top += _PLOT_HEIGHT + 0.5
    columns, _, cell_width, cell_height = _grid(video, len(answer.frames))
    norm = _gate_range(answer.gates)
    for number, frame in enumerate(answer.frames):
        row, column = divmod(number, columns)
        axes = page.axes(
            _MARGIN + column * cell_width,
            top + row * (cell_height + 0.28),
            cell_width - 0.08,
            cell_height,
        )
        _draw_frame(axes, images[frame.index], answer.gates[number], norm, answered)
        axes.set_title(
            f"{number + 1}   {_clock(frame.time, video.interval)}",
            fontsize=8.5,
            color=_INK,
            loc="left",
            pad=3,
        )
    if answered.trained:
        bar = page.axes(page.width - _MARGIN - 0.42, top, 0.1, min(cell_height, 1.4))
        _draw_scale(bar, norm)


def _draw_scores(axes: Any, answer: Answer, video: EncodedVideo) -> None:
    axes.plot(video.times, answer.scores, color=_LINE, lw=1.3, marker=".", ms=3.5, zorder=2)
    axes.fill_between(video.times, answer.scores, answer.scores.min(), color=_LINE, alpha=0.18)
    span = float(np.ptp(answer.scores)) or 1.0
    low, high = float(answer.scores.min()), float(answer.scores.max())
    axes.set_ylim(low - 0.08 * span, high + 0.42 * span)
    start, end = video.interval
    axes.set_xlim(start - 0.012 * (end - start), end)
    near = 0.016 * (end - start)
    previous, raised = -np.inf, False
    for number, frame in enumerate(answer.frames, start=1):
        axes.plot(
            [frame.time] * 2, [low - 0.08 * span, frame.score], color=_CHOSEN, lw=0.8, zorder=1
        )
        axes.plot(frame.time, frame.score, "o", color=_CHOSEN, ms=5.5, zorder=3)
        # Neighbours' numbers take turns on two heights, so that they stay legible.
        raised = frame.time - previous < near and not raised
        previous = frame.time
        axes.annotate(
            str(number),
            (frame.time, frame.score),
            xytext=(0, 13 if raised else 5),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=_CHOSEN,
            annotation_clip=False,
        )
    axes.set_ylabel("frame score", color=_FAINT, fontsize=8)
    axes.set_xlabel("seconds", color=_FAINT, fontsize=8, labelpad=1)
    axes.tick_params(labelsize=7.5, length=2.5)
    axes.locator_params(axis="y", nbins=4)


def _draw_frame(
    axes: Any, image: np.ndarray, gate: np.ndarray, norm: Normalize, answered: Answered
) -> None:
    """The frame as displayed, the gate over the part that the encoder sees, the rest dimmed."""
    width, height = answered.video.width, answered.video.height
    axes.imshow(image, extent=(0, width, height, 0), aspect="auto")
    left, top, seen_width, seen_height = answered.seen
    for x, y, w, h in (
        (0, 0, left, height),
        (left + seen_width, 0, width - left - seen_width, height),
        (left, 0, seen_width, top),
        (left, top + seen_height, seen_width, height - top - seen_height),
    ):
        if w > 0 and h > 0:
            axes.add_patch(Rectangle((x, y), w, h, color="white", alpha=0.65, lw=0))
    if answered.trained:
        axes.imshow(
            gate,
            extent=(left, left + seen_width, top + seen_height, top),
            cmap=_HEAT,
            norm=norm,
            interpolation="bilinear",
            aspect="auto",
        )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _gate_range(gates: np.ndarray) -> Normalize:
    """One colour scale for all frames of a question; gates that are all alike get no colour."""
    low, high = float(gates.min()), float(gates.max())
    return Normalize(low, high) if high - low > 1e-3 else Normalize(high, high + 1)


def _draw_scale(axes: Any, norm: Normalize) -> None:
    bar = axes.figure.colorbar(ScalarMappable(norm, _HEAT), cax=axes)
    bar.outline.set_visible(False)
    bar.set_ticks([norm.vmin, norm.vmax], labels=[f"{norm.vmin:.2f}", f"{norm.vmax:.2f}"])
    axes.tick_params(labelsize=7, length=0, pad=2)
    axes.set_title("gate", fontsize=7.5, color=_FAINT, pad=4, loc="left")


def _clock(seconds: float, interval: tuple[float, float]) -> str:
    """Minutes and seconds, finer where the whole stretch is short."""
    digits = 1 if interval[1] - interval[0] > 10 else 2
    minutes, rest = divmod(round(seconds, digits), 60)
    return f"{int(minutes)}:{rest:0{3 + digits}.{digits}f}"
