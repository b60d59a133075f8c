"""``videodistill train``, ``train-default`` (the bundled model), and ``study``."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from videodistill.errors import UserError

app = typer.Typer(help="Train models.")

_ASSETS = Path(__file__).resolve().parent.parent / "assets"


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or a recipe: nextqa, msvd, star, ...")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.PATH=VALUE", help="Instead of what the file says."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in out, if any.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")] = False,
) -> None:
    """Train a model on features of videos that videodistill extract computed.

    Ctrl-C or SIGTERM finishes the step and saves; docs/training.md tells more.
    """
    from videodistill.training.config import read_config

    settings = read_config(config, overrides or ())
    from videodistill.training.trainer import train as run

    result = run(settings, resume=resume, cpu=cpu, log=_say_first)
    if result.ended == "interrupted":
        options = ["--resume", *(["--cpu"] if cpu else [])]
        words = ["videodistill", "train", config, *(overrides or ()), *options]
        _say_first(f"saved after step {result.step}; go on with: {shlex.join(words)}")
        # Not typer.Exit: of 130 the command line would say "interrupted" once more.
        raise SystemExit(128 + result.signal)
    if result.ended == "early":
        _say_first(f"stopped early, after step {result.step}: it got no better")
    if result.best is not None:
        metric = settings.validation.metric
        _say_first(f"best {metric}: {result.best:.4g}, after step {result.best_step}")
    best = Path(settings.out) / "best"
    _say_first(f"ask it: videodistill answer VIDEO QUESTION --checkpoint {shlex.quote(str(best))}")


def _say_first(line: str) -> None:
    """Of several processes, the first alone speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


@app.command()
def train_default(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = _ASSETS / "default",
    work: Annotated[
        Path, typer.Option(help="Folder for data and features, 7 GB; a killed run goes on.")
    ] = Path("runs/default-model"),
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Also train what the model is compared with (uniform frames, ...)."
        ),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Make the bundled model from nothing: videos, encoder, features, head, model card."""
    from videodistill.training.default_model import train_default as train

    say = _stopwatch()
    train(work, out, controls=controls, workers=workers, log=say)
    say(f"the model and its card are in {out}")


@app.command()
def study(
    work: Annotated[
        Path, typer.Option(help="Folder for videos, features and models, 5 GB.")
    ] = Path("runs/study"),
    out: Annotated[
        Path, typer.Option(help="Folder of results (study/*.json), page (study.md) and plots.")
    ] = Path("docs"),
    arms: Annotated[
        str | None, typer.Option(help="Names of arms, separated by commas; all by default.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Numbers, separated by commas; 1,2,3 by default.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write page and plots of the results there are.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of trainings' matrix products, fp32 or bf16: give it to compare results of "
            "different processors.",
            show_default="bf16 where the processor multiplies it",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
) -> None:
    """Train and test VideoDistill and its controls alike; a killed run goes on."""
    from videodistill.training.study import ARMS, StudyRecipe, run_study
    from videodistill.training.study_report import write_report

    say = _stopwatch()
    if report_only:
        if any(option is not None for option in (arms, seeds, precision)):
            raise UserError("--report-only shows all results: drop --arms, --seeds and --precision")
        files = write_report(out, recipe=StudyRecipe(), arms=ARMS)
    else:
        files = run_study(
            work,
            out,
            arms=None if arms is None else [name.strip() for name in arms.split(",")],
            seeds=None if seeds is None else _numbers(seeds),
            precision=precision,
            workers=workers,
            log=say,
        )
    say(f"the report is in {files[0]}")


def _numbers(seeds: str) -> list[int]:
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise UserError(f"seeds {seeds!r}: give numbers from 0 on, separated by commas")
    return numbers


def _stopwatch() -> Callable[[str], None]:
    """Prints lines with the time since now."""
    begin = time.perf_counter()

    def say(line: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - begin), 60)
        print(f"{minutes:3}:{seconds:02}  {line}", flush=True)

    return say


@app.callback()
def _training() -> None:
    """Train models."""
