"""``videodistill train-default``: make the bundled model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train models.")

_ASSETS = Path(__file__).resolve().parent.parent / "assets"


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
