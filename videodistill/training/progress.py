"""How a run tells what it does, and how it is asked to stop."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from videodistill.data.files import write_whole

Show = Callable[[int, float | None], None]


@contextmanager
def show_progress(first: int, total: int, log: Callable[[str], None]) -> Iterator[Show]:
    """A function of (steps done, loss or None) that shows how far a run is.

    A bar on a terminal, on stderr; else a line through ``log`` for each step with a loss.

    Args:
        first: Steps done before.
        total: Of the whole run.
        log: Takes lines.
    """
    if not sys.stderr.isatty():
        began = time.perf_counter()

        def write_line(step: int, loss: float | None) -> None:
            if loss is not None:
                rate = (step - first) / (time.perf_counter() - began)
                log(
                    f"step {step}/{total}  loss {loss:.4g}  {rate:.3g} steps/s, "
                    f"{(total - step) / rate:.0f} s to go at this rate"
                )

        yield write_line
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} steps/s"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=first, loss="-", rate="-")

        def move_bar(step: int, loss: float | None) -> None:
            changes = {} if loss is None else {"loss": f"{loss:.4g}"}
            if bar.tasks[0].speed:
                changes["rate"] = f"{bar.tasks[0].speed:.3g}"
            bar.update(task, completed=step, **changes)

        yield move_bar


class LogFiles:
    """``log.jsonl`` and TensorBoard's files of a run.

    Args:
        out: Its folder.
        step: That it goes on from; later steps are taken out, as they are done again.
        writing: False in all processes but one.
    """

    def __init__(self, out: Path, step: int, writing: bool):
        self._writer = self._lines = None
        if not writing:
            return
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.jsonl"
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError):
                    pass  # half a line, of a run that was killed while it wrote
        write_whole(path, "".join(f"{line}\n" for line in kept))
        self._lines = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Numbers of a step, by name."""
        if self._writer is None:
            return
        self._lines.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> LogFiles:
        before = self._hook = threading.excepthook

        def hook(failed: threading.ExceptHookArgs) -> None:
            # TensorBoard's thread hands a full disk on to this one, which tells it in one line.
            if not isinstance(failed.exc_value, OSError):
                before(failed)

        threading.excepthook = hook
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
                self._lines.close()
        finally:
            threading.excepthook = self._hook


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """A list that takes the first SIGINT or SIGTERM; the second has its usual effect."""
    asked: list[int] = []
    try:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: object) -> None:
            asked.append(number)
            for which, handler in before.items():
                signal.signal(which, handler)

        for number in before:
            signal.signal(number, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
