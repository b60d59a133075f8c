"""What commands print: long lists, and how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_SHOWN = 10


def print_some(title: str, lines: Sequence[str]) -> None:
    """Print how many lines there are, and the first of them; nothing if there are none."""
    if not lines:
        return
    print(f"{title}: {len(lines)}")
    for line in lines[:_SHOWN]:
        print(f"  {line}")
    if len(lines) > _SHOWN:
        print(f"  and {len(lines) - _SHOWN} more; --json lists all")


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function of (what, videos done, videos in all) that shows them on stderr.

    A bar on a terminal, a line for each tenth elsewhere.
    """
    if not sys.stderr.isatty():
        tenths: dict[str, int] = {}

        def write_line(what: str, done: int, total: int) -> None:
            tenth = 10 * done // total
            if tenths.get(what) != tenth:
                tenths[what] = tenth
                print(f"{what}: {done}/{total} videos", file=sys.stderr, flush=True)

        yield write_line
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as ProgressBar
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} videos/s")

    columns = (BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with ProgressBar("{task.description}", *columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def move_bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, completed=done)
            bar.update(tasks[what], completed=done)

        yield move_bar
