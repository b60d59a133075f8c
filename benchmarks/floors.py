"""What the machine can do at most: measured in the same run, not read from a data sheet."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.timing import Clock, Spread


def copying(bytes_moved: int, device: str, clock: Clock) -> Callable[[int], float]:
    """A timed call that moves so many bytes, half in and half out.

    What it takes is the floor of a case that must move as many. It writes to memory that is there
    already: what page faults add to a clone is no part of a floor.
    """
    size = max(1, bytes_moved // 2)
    count = min(64, 1 + clock.cold_bytes // size)
    sources = [torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(count)]
    targets = [torch.empty_like(source).fill_(1) for source in sources]

    def timed(turn: int) -> float:
        pair = turn % count
        return clock.time(lambda: targets[pair].copy_(sources[pair]), 1)[0]

    return timed


def matmul_rate(dtype: torch.dtype, device: str, clock: Clock) -> float:
    """Operations a second of a square matrix product; two are one multiplication and addition."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [clock.time(lambda: a @ b, 1)[0] for _ in range(6)]
    return 2 * size**3 / Spread.of(seconds[1:]).median
