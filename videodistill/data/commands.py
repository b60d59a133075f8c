"""`videodistill data ...`: make the procedural benchmark, and check what datasets give away."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from videodistill.data.procedural.make import Split, make_dataset
from videodistill.errors import UserError
from videodistill.listing import print_some, shown_progress

app = typer.Typer(help="Make the procedural benchmark, and check datasets.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Make the procedural benchmark, and check datasets."""


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
    with shown_progress() as progress:
        dataset = make_dataset(out, splits, seed=seed, workers=workers, progress=progress)
    for name in splits:
        made = dataset["splits"][name]
        counts = ", ".join(f"{made[what]} {what}" for what in ("videos", "frames", "questions"))
        print(f"{name}: {counts}")
    print(f"{out} is complete, {time.perf_counter() - begin:.1f} s")


@app.command()
def check(
    dataset: Annotated[
        str, typer.Argument(help="Name of a dataset, e.g. msvd-qa; or a folder of `data make`.")
    ],
    path: Annotated[
        Path | None, typer.Argument(help="Folder of the dataset, or the file of one split.")
    ] = None,
    videos: Annotated[Path | None, typer.Option(help="Folder to look for its videos in.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Text file of answers that can be given, one per line.",
            show_default="the commonest of the training split",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    train: Annotated[
        str | None, typer.Option(help="Procedural: split to train on.", show_default="train")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Procedural: split to test on.", show_default="test")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(help="Procedural: folder of an encoder.", show_default="the bundled one"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Procedural: processes that compute features.", show_default="2"),
    ] = None,
) -> None:
    """Count questions and videos, and measure how far one gets without looking.

    For a dataset: its splits, types, videos, broken annotations, the share of answers that a
    vocabulary covers, and how often the commonest answer is right. The exit status is 1 when a
    video is missing or an annotation is broken.

    For the procedural benchmark: trains a model on the words of the questions alone, and one that
    sees a single random frame. The exit status is 1 when either gets too far.
    """
    from videodistill.data.datasets import DATASETS, get_dataset

    if path is None and dataset not in DATASETS:
        dataset, path = "procedural", Path(dataset)
    if path is None:
        raise UserError(f"data check {dataset}: give its folder, too: data check {dataset} FOLDER")
    if dataset == "procedural":
        _refuse("of a dataset", {"--videos": videos, "--answers": answers})
        _check_procedural(path, train or "train", test or "test", encoder, workers or 2, as_json)
        return
    only = {"--train": train, "--test": test, "--encoder": encoder, "--workers": workers}
    _refuse("of the procedural benchmark", only)
    from videodistill.data.summary import summarise

    found = summarise(get_dataset(dataset), path, videos=videos, answers=answers)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print_summary(found)
    missing = found["videos"] is not None and found["videos"]["missing"]
    if missing or any(split["broken"] for split in found["splits"].values()):
        raise typer.Exit(1)


def _refuse(kind: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name} is only for the check {kind}: drop it")


def _print_summary(found: dict[str, Any]) -> None:
    splits = found["splits"]
    columns = ("questions", "videos", "commonest", "two words", "ceiling")
    print(f"{'split':16}" + "".join(f"{column:>11}" for column in columns))
    for name, split in splits.items():
        prior = split["priors"] or {"answer": None, "first_two_words": None}
        shares = (prior["answer"], prior["first_two_words"], split["ceiling"])
        cells = [f"{split['questions']:>11}{split['videos']:>11}", *map(_cell, shares)]
        print(f"{name:16}" + "".join(cells))
    if any(split["priors"] is None for name, split in splits.items() if not name.endswith("train")):
        print("- where there is no training split or no answer to compare with")
    if found["vocabulary"]:
        source, size = found["vocabulary"]["source"], found["vocabulary"]["answers"]
        print(f"ceiling: answers among the {size} of {source}")
    print(f"\n{'type':24}" + "".join(f"{name:>16}" for name in splits))
    for kind in sorted({kind for split in splits.values() for kind in split["types"]}):
        counts = (split["types"].get(kind, 0) for split in splits.values())
        print(f"{kind:24}" + "".join(f"{count:>16}" for count in counts))
    for name, split in splits.items():
        if split["without_answer"]:
            print(f"{name}: the answer to {split['without_answer']} questions is not known")
        if split["without_text"]:
            print(f"{name}: {split['without_text']} questions have no text")
    for name, split in splits.items():
        print_some(f"{name}: annotations that cannot be read", split["broken"])
    if found["videos"]:
        videos = found["videos"]
        print(f"\nvideos in {videos['folder']}: {videos['found']} found")
        print_some("videos missing", videos["missing"])


def _cell(percent: float | None) -> str:
    return f"{'-':>11}" if percent is None else f"{percent:>10.1f}%"


def _check_procedural(
    dataset: Path, train: str, test: str, encoder: Path | None, workers: int, as_json: bool
) -> None:
    from videodistill.data.check import ONE_FRAME_LIMIT, QUESTION_ONLY_LIMIT, check_dataset
    from videodistill.engine.checks import ASSETS

    found = check_dataset(
        dataset,
        train,
        test,
        encoder or ASSETS / "default" / "encoder",
        workers=workers,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    blind, one = found["question_only"]["all"], found["one_frame"]["all"]
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_procedural(found, test, QUESTION_ONLY_LIMIT, ONE_FRAME_LIMIT)
    if blind > QUESTION_ONLY_LIMIT or one > ONE_FRAME_LIMIT:
        print("this data set can be answered without looking properly", file=sys.stderr)
        raise typer.Exit(1)


def _print_procedural(
    found: dict[str, Any], test: str, question_only_limit: float, one_frame_limit: float
) -> None:
    counts = ", ".join(f"{count} in {split}" for split, count in found["questions"].items())
    print(f"questions: {counts}")
    print(f"commonest answer: {found['answers']:.1f}% of {test}")
    print("\n{:10} {:>8} {:>14} {:>10}".format("family", "share", "question only", "one frame"))
    for family, share in (found["families"] | {"all": 100.0}).items():
        blind, one = found["question_only"][family], found["one_frame"][family]
        print(f"{family:10} {share:7.1f}% {blind:13.1f}% {one:9.1f}%")
    print(f"{'limit':10} {'':8} {question_only_limit:13.1f}% {one_frame_limit:9.1f}%")
    prior = found["priors"]
    print(
        f"\nalways the commonest answer: {prior['answer']:.1f}%; "
        f"the commonest by first two words: {prior['first_two_words']:.1f}%"
    )


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
