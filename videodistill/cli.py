"""The command line. Start-up stays fast: torch and transformers are imported by the command that
needs them, after its arguments were found good."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import sys
import textwrap
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from videodistill.errors import UserError

try:
    import typer
    from typer.core import TyperGroup
    from typer.main import get_group

    from videodistill.options import Device, Precision
except ModuleNotFoundError as missing:
    sys.stderr.write(
        f"videodistill: error: {missing.name} is not installed: pip install 'videodistill[model]'\n"
    )
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from rich.console import Console

    from videodistill.engine.answerer import Answer, Answered

# Which extra brings a package that may be missing.
_EXTRAS = {
    "model": "transformers tokenizers safetensors huggingface_hub av PIL matplotlib rich yaml",
    "train": "accelerate tensorboard",
}
_DATA_COMMANDS = "videodistill.data.commands"
_MORE_COMMANDS = (
    "videodistill.engine.commands",
    "videodistill.evaluation.commands",
    "videodistill.training.commands",
)
_EPILOG = "--debug anywhere on the line shows tracebacks."
_BARS = "▁▂▃▄▅▆▇█"


class Commands(TyperGroup):
    """The commands, and the one place where errors become a line on stderr and an exit status.

    `data` and the commands of corpora, scoring and training come from their own packages, imported
    only when they are asked for. `--debug` may stand anywhere before a "--": it shows tracebacks.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        more = (name for module in _MORE_COMMANDS for name in _group(module).commands)
        return [*super().list_commands(ctx), "data", *more]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        if cmd_name == "data":
            group = _group(_DATA_COMMANDS)
            group.name = cmd_name
            return group
        groups = (_group(module).commands for module in _MORE_COMMANDS)
        return next((group[cmd_name] for group in groups if cmd_name in group), None)

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        options = given.index("--") if "--" in given else len(given)
        debug = "--debug" in given[:options]
        given = [word for word in given[:options] if word != "--debug"] + given[options:]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a question may be in any script
                stream.reconfigure(errors="replace")
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                warnings.simplefilter("ignore")
            try:
                extra["standalone_mode"] = False
                status = super().main(given or ["--help"], prog_name="videodistill", **extra)
                if status == 130:  # newer versions of typer tell Ctrl-C this way
                    _say("error", "interrupted")
            except (Exception, KeyboardInterrupt) as error:
                if debug:
                    traceback.print_exc()
                status = _report(error)
        raise SystemExit(status if isinstance(status, int) else 0)


app = typer.Typer(
    cls=Commands,
    help="Ask questions about videos.",
    epilog=_EPILOG,
    add_completion=False,
)


def main() -> None:
    """The `videodistill` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from vd_kernels._version import __version__

        typer.echo(f"videodistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Ask questions about videos."""


@app.command(epilog=_EPILOG)
def answer(
    video: Annotated[
        str, typer.Argument(help="A video file (after -- if its name starts with -).")
    ],
    questions: Annotated[
        list[str], typer.Argument(help="One or more; they share one decode and one encoding.")
    ],
    choices: Annotated[
        list[str] | None,
        typer.Option(
            help="Answers to choose from: once, separated by commas, or once for each answer."
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Text file of answers to choose from, one per line.")
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Use the encoder alone, without a trained head.")
    ] = False,
    encoder: Annotated[
        str | None, typer.Option(help="Folder or hub id of a CLIP or SigLIP.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder or hub id of a trained head; bundled by default.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="How many frames to look at.")] = None,
    pick: Annotated[int | None, typer.Option(help="How many of them to answer from.")] = None,
    start: Annotated[float | None, typer.Option(help="Look from this second on.")] = None,
    end: Annotated[float | None, typer.Option(help="Look up to this second.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw frame scores, chosen frames and gates into this picture."),
    ] = None,
    device: Device = None,
    precision: Precision = "fp32",
) -> None:
    """Answer questions about a video."""
    from videodistill.engine import checks

    # All that can be wrong with the arguments is said before anything slow is imported.
    questions = checks.check_questions(questions)
    options = _options_to_choose_from(choices, answers)
    checks.check_count("frames", frames)
    checks.check_count("pick", pick)
    checks.check_interval(start, end)
    checks.check_precision(precision)
    if figure is not None:
        checks.check_figure(figure)
    from videodistill.video.container import local_file

    local_file(video)

    _quiet_libraries()
    from videodistill.engine.loading import load

    model = load(
        checkpoint, encoder=encoder, zero_shot=zero_shot, device=device, precision=precision
    )
    result = model.answer(
        video, questions, choices=options, frames=frames, pick=pick, start=start, end=end
    )
    if figure is not None:
        result.figure(figure)
    for notice in result.notices:
        _say("note", notice)
    if as_json:
        typer.echo(json.dumps(result.to_dict() | {"figure": figure and str(figure)}, indent=2))
    else:
        _print(result, figure)


def _options_to_choose_from(choices: list[str] | None, answers: Path | None) -> list[str] | None:
    from videodistill.engine import checks

    if choices and answers:
        raise UserError("--choices and --answers were both given: drop one of them")
    if answers:
        return checks.read_answers(answers)
    if not choices:
        return None
    # Given several times, each is one answer and may hold commas of its own.
    listed = choices[0].split(",") if len(choices) == 1 else choices
    return checks.check_choices(listed, source="--choices")


def _quiet_libraries() -> None:
    """Progress bars and hints of the libraries are not this command's output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _print(result: Answered, figure: Path | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    video, spent = result.video, result.timings
    console.print(
        Text(
            f"{video.path}  {video.duration:.1f} s  {video.width}x{video.height}  "
            f"{len(video.times)} of {video.frame_count} frames looked at",
            style="dim",
        )
    )
    for answer in result:
        console.print()
        console.print(Text(textwrap.shorten(answer.question, 200, placeholder="…"), style="bold"))
        then = ", ".join(f"{text} {_percent(p)}" for text, p in answer.top[1:])
        console.print(
            Text("  ")
            + Text(f"{answer.answer}  {_percent(answer.confidence)}", style="bold green")
            + Text(f"   then {then}", style="dim")
        )
        if (console.encoding or "").lower().startswith("utf"):
            console.print(Text("  ") + _score_strip(answer, video.indices, console))
        _print_frames(console, answer)
    console.print()
    timings = f"decode {spent.decode:.2f} s  encode {spent.encode:.2f} s  head {spent.head:.2f} s"
    console.print(Text(timings, style="dim"))
    if figure is not None:
        console.print(Text(f"picture: {figure}"))


def _print_frames(console: Console, answer: Answer) -> None:
    from rich.text import Text

    for first in range(0, len(answer.frames), 8):
        group = answer.frames[first : first + 8]
        times = "".join(f"{_clock(frame.time):>9}" for frame in group)
        console.print(Text("  time ") + Text(times, style="yellow"))
        numbers = "".join(f"{frame.index:>9}" for frame in group)
        console.print(Text(f"  frame{numbers}", style="dim"))


def _score_strip(answer: Answer, indices: Any, console: Console) -> Any:
    """Frame scores over time as a row of bars, the chosen frames' in colour."""
    import numpy as np
    from rich.text import Text

    chosen = np.isin(indices, [frame.index for frame in answer.frames])
    low, span = answer.scores.min(), np.ptp(answer.scores) or 1.0
    cells = min(len(answer.scores), max(8, min(console.width - 4, 72)))
    strip = Text()
    for part in np.array_split(np.arange(len(answer.scores)), cells):
        level = int((answer.scores[part].max() - low) / span * (len(_BARS) - 1))
        strip.append(_BARS[level], style="yellow" if chosen[part].any() else "dim")
    return strip


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f}%"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}"


def _group(module: str) -> Any:
    return get_group(importlib.import_module(module).app)


def _say(kind: str, message: str) -> None:
    """One line on stderr, whatever the message holds: file names may hold line breaks."""
    line = "".join(c if c.isprintable() else " " for c in message)
    sys.stderr.write(f"videodistill: {kind}: {' '.join(line.split())}\n")


def _report(error: BaseException) -> int:
    """Say what went wrong; returns the exit status."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        _say("error", "interrupted")
        return 130
    # The class is known where torch has been imported, which this module does not wait for; what
    # the compiled kernels refuse comes without a class.
    wrong_choice = type(error).__name__ == "BackendError" or str(error).startswith("VD_CPU_ISA ")
    if isinstance(error, UserError) or wrong_choice:
        _say("error", str(error))
        return 2
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without its command
        error.show()
        return 2
    if hasattr(error, "format_message"):  # wrong usage, as typer found it
        context = getattr(error, "ctx", None)
        hint = f" (see: {context.command_path} --help)" if context else ""
        _say("error", error.format_message().rstrip(".") + hint)
        return 2
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        for extra, packages in _EXTRAS.items():
            if package in packages.split():
                _say("error", f"{package} is not installed: pip install 'videodistill[{extra}]'")
                return 2
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    _say("error", f"{what} (this should not happen; --debug shows the traceback)")
    return 1


if __name__ == "__main__":
    main()
