"""``videodistill extract``: compute the features of a corpus, once for all questions."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from videodistill.engine.checks import ASSETS, check_count, check_precision
from videodistill.errors import UserError
from videodistill.listing import print_some, shown_progress
from videodistill.options import Device, Precision
from videodistill.processes import cores

app = typer.Typer(help="Work on whole corpora.")


@app.command()
def extract(
    videos: Annotated[
        str, typer.Argument(help="Folder of videos; or the name of a dataset, e.g. msvd-qa.")
    ],
    path: Annotated[
        Path | None, typer.Argument(help="Folder of the dataset, or the file of one split.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the features; a stopped run goes on there.")
    ] = ...,
    videos_in: Annotated[
        Path | None,
        typer.Option(
            "--videos", help="Folder to look for the dataset's videos in.", show_default="PATH"
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a CLIP or SigLIP.", show_default="the bundled one"),
    ] = None,
    frames: Annotated[
        int, typer.Option(help="Frames of each video; one that has fewer gives all.")
    ] = 64,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes.", show_default="one for each core, at most 4 with a GPU"
        ),
    ] = None,
    device: Device = None,
    precision: Precision = "fp32",
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again videos that failed in an earlier run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute what the encoder sees in each video of a corpus, and keep it in a folder.

    Nothing is computed twice: what is in the folder already is used, and files of the same content
    share their features. The exit status is 1 when a video has no features in the end, or an
    annotation cannot be read; both are listed.
    """
    check_count("frames", frames)
    check_precision(precision)
    files, broken = _files(videos, path, videos_in)
    begin = time.perf_counter()
    from videodistill.engine.feature_cache import extract_corpus
    from videodistill.engine.loading import pick_device

    where = pick_device(device)
    if workers is None:  # each has an encoder of its own, in the GPU's memory, too
        workers = cores() if where.type == "cpu" else min(cores(), 4)
    with shown_progress() as progress:
        done = extract_corpus(
            files,
            encoder or ASSETS / "default" / "encoder",
            frames,
            out,
            workers=workers,
            device=str(where),
            precision=precision,
            retry=retry,
            progress=lambda done, total: progress("features", done, total),
            log=lambda line: print(f"{out}: {line}", file=sys.stderr, flush=True),
        )
    seconds = time.perf_counter() - begin
    if as_json:
        told = asdict(done) | {"folder": str(out), "broken": broken, "seconds": round(seconds, 3)}
        print(json.dumps(told, indent=2))
    else:
        print(
            f"{out}: {done.encoded} videos encoded, {done.reused} reused, "
            f"{done.duplicates} duplicates, {len(done.failed)} failed; {seconds:.1f} s"
        )
        notices = [notice for notices in done.notices.values() for notice in notices]
        print_some("videos that are not whole", notices)
        print_some(
            "videos without features", [f"{name}: {why}" for name, why in done.failed.items()]
        )
        print_some("annotations that cannot be read", broken)
    if done.failed or broken:
        raise typer.Exit(1)


def _files(
    videos: str, path: Path | None, videos_in: Path | None
) -> tuple[dict[str, Path], list[str]]:
    """The file of each video by its name, and what is wrong with annotations."""
    from videodistill.data.datasets import DATASETS, get_dataset
    from videodistill.data.videos import find_videos, list_videos

    if path is None and videos not in DATASETS:
        if videos_in is not None:
            raise UserError("--videos is only for the videos of a dataset: drop it")
        names = list_videos(videos)
        if not names:
            raise UserError(f"{videos}: holds no videos; give the folder that does")
        return {name: Path(videos) / name for name in names}, []
    if path is None:
        raise UserError(f"extract {videos}: give its folder, too: extract {videos} FOLDER")
    dataset = get_dataset(videos)
    broken = []
    asked = [
        name
        for file in dataset.find(path).values()
        for question in dataset.read(file, broken)
        for name in question.videos
    ]
    folder = videos_in or (path if path.is_dir() else path.parent)
    found = find_videos(folder, dict.fromkeys(asked))
    files = {name: file or folder / name for name, file in found.items()}
    return files, [entry.message for entry in broken]


@app.callback()
def _corpora() -> None:
    """Work on whole corpora."""
