"""Long lists in the output of commands."""

from __future__ import annotations

from collections.abc import Sequence

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
