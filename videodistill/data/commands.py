"""`videodistill data ...`: make datasets, and check what they give away."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from videodistill.data.procedural.make import Progress, Split, make_dataset
from videodistill.errors import UserError

app = typer.Typer(help="Make and check the procedural benchmark.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Make and check the procedural benchmark."""


@app.command()
def make(
    out: Annotated[Path, typer.Argument(help="Folder of the data set; a killed run goes on.")],
    split: Annotated[
        list[str], typer.Option(help="NAME=COUNT: a split and its number of videos; repeatable.")
    ],
    seed: Annotated[int, typer.Option(help="Another seed gives other videos.")] = 0,
    frames: Annotated[
        str, typer.Option(help="Frames of each video: a number, or SHORTEST-LONGEST.")
    ] = "64",
    size: Annotated[int, typer.Option(help="Side of the picture in pixels.")] = 96,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 12.0,
    bias: Annotated[
        float, typer.Option(help="Probability that an answer follows from the question's words.")
    ] = 0.0,
    reverse_bias: Annotated[
        bool, typer.Option("--reverse-bias", help="Bias towards the opposite answers.")
    ] = False,
    questions: Annotated[int, typer.Option(help="Questions about each video, at most.")] = 8,
    workers: Annotated[
        int | None, typer.Option(help="Processes.", show_default="one for each core")
    ] = None,
) -> None:
    """Write videos with questions, answers and evidence in the dialects of real data sets.

    The same arguments give the same files, for any number of workers and after any interruption.
    Splits that need other arguments are added to the same folder by another call.
    """
    lengths = _frames(frames)
    splits: dict[str, Split] = {}
    for argument in split:
        name, count = _split(argument)
        if name in splits:
            raise UserError(f"--split {argument}: split {name} is named twice")
        splits[name] = Split(count, lengths, size, fps, bias, reverse_bias, questions)
    begin = time.perf_counter()
    with _shown_progress() as progress:
        dataset = make_dataset(out, splits, seed=seed, workers=workers, progress=progress)
    for name in splits:
        made = dataset["splits"][name]
        counts = ", ".join(f"{made[what]} {what}" for what in ("videos", "frames", "questions"))
        print(f"{name}: {counts}")
    print(f"{out} is complete, {time.perf_counter() - begin:.1f} s")


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="Folder made by `data make`.")],
    train: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    test: Annotated[str, typer.Option(help="Split to test on.")] = "test",
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of an encoder.", show_default="the bundled one")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compute features.")] = 2,
) -> None:
    """Count questions, and measure how many are answered without looking properly.

    Trains a model on the words of the questions alone, and one that sees a single random frame.
    The exit status is 1 when either gets too far.
    """
    from videodistill.data.check import ONE_FRAME_LIMIT, QUESTION_ONLY_LIMIT, check_dataset
    from videodistill.engine.checks import ASSETS

    folder = encoder or ASSETS / "default" / "encoder"
    found = check_dataset(
        dataset,
        train,
        test,
        folder,
        workers=workers,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    counts = ", ".join(f"{count} in {split}" for split, count in found["questions"].items())
    print(f"questions: {counts}")
    print(f"commonest answer: {found['answers']:.1f}% of {test}")
    print("\n{:10} {:>8} {:>14} {:>10}".format("family", "share", "question only", "one frame"))
    for family, share in found["families"].items():
        blind, one = found["question_only"][family], found["one_frame"][family]
        print(f"{family:10} {share:7.1f}% {blind:13.1f}% {one:9.1f}%")
    blind, one = found["question_only"]["all"], found["one_frame"]["all"]
    print(f"{'all':10} {100:7.1f}% {blind:13.1f}% {one:9.1f}%")
    print(f"{'limit':10} {'':8} {QUESTION_ONLY_LIMIT:13.1f}% {ONE_FRAME_LIMIT:9.1f}%")
    prior = found["priors"]
    print(
        f"\nalways the commonest answer: {prior['answer']:.1f}%; "
        f"the commonest by first two words: {prior['first_two_words']:.1f}%"
    )
    if blind > QUESTION_ONLY_LIMIT or one > ONE_FRAME_LIMIT:
        print("this data set can be answered without looking properly", file=sys.stderr)
        raise typer.Exit(1)


def _split(argument: str) -> tuple[str, int]:
    name, _, count = argument.partition("=")
    try:
        return name, int(count)
    except ValueError:
        raise UserError(f"--split {argument}: write NAME=COUNT, e.g. train=4000") from None


def _frames(argument: str) -> tuple[int, int]:
    shortest, _, longest = argument.partition("-")
    try:
        return int(shortest), int(longest or shortest)
    except ValueError:
        raise UserError(f"--frames {argument}: write 64, or 48-256 for a range") from None


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """A bar on a terminal, a line for each tenth elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        tenths: dict[str, int] = {}

        def write_line(split: str, done: int, total: int) -> None:
            tenth = 10 * done // total
            if tenths.get(split) != tenth:
                tenths[split] = tenth
                print(f"{split}: {done}/{total} videos", file=sys.stderr, flush=True)

        yield write_line
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def move_bar(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = bar.add_task(split, total=total, completed=done)
            bar.update(tasks[split], completed=done)

        yield move_bar
