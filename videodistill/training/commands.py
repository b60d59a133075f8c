"""``videodistill train``, and ``train-default``, which makes the bundled model."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

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

    begin = time.perf_counter()

    def say(line: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - begin), 60)
        print(f"{minutes:3}:{seconds:02}  {line}", flush=True)

    train(work, out, controls=controls, workers=workers, log=say)
    say(f"the model and its card are in {out}")


@app.callback()
def _training() -> None:
    """Train models."""
