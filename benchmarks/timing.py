"""Clocks of the devices, the order of calls, and whether the machine was quiet meanwhile.

Everything that depends on the device is here: how a call is timed, and how large the cache is that
inputs must not stay in.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
_MIB = 1 << 20
_HEAD_START = 1_000_000  # GPU cycles in which the host gets ahead, so that launches are not timed


@dataclass(frozen=True)
class Spread:
    """Seconds: the median, the quartiles, and of how many rounds."""

    median: float
    q1: float
    q3: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        if len(seconds) == 1:
            return cls(*seconds * 3, 1)
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3, len(seconds))


@dataclass(frozen=True)
class Budget:
    """How long a case may take."""

    seconds: float
    """After which no further round begins."""
    rounds: tuple[int, int]
    """At least and at most; `slow_rounds` suffice where one alone takes all those seconds."""
    slow: float = 30.0
    """Contestants that take so many times as long as the fastest sit out after `slow_rounds`."""
    slow_rounds: int = 3


FULL = Budget(seconds=20.0, rounds=(7, 100))
QUICK = Budget(seconds=2.0, rounds=(3, 20))


class Clock(Protocol):
    cold_bytes: int
    """Inputs of so many bytes, used in turn, are in no cache when they are used again."""

    def time(self, work: Callable[[], T], repeats: int) -> tuple[float, T]:
        """Seconds of one of `repeats` calls, and what the last one returned."""


class CpuClock:
    def __init__(self) -> None:
        self.cold_bytes = 2 * _last_level_cache()

    def time(self, work: Callable[[], T], repeats: int) -> tuple[float, T]:
        start = time.perf_counter_ns()
        for _ in range(repeats):
            result = work()
        return (time.perf_counter_ns() - start) / repeats / 1e9, result


class CudaClock:
    """Events around the call, after the second-level cache was overwritten."""

    cold_bytes = 0

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(4 * size, dtype=torch.uint8, device="cuda")

    def time(self, work: Callable[[], T], repeats: int) -> tuple[float, T]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if repeats == 1:
            torch.cuda._sleep(_HEAD_START)
        else:  # the host's part is the question
            torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            result = work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats / 1e3, result


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def interleaved(
    entries: Mapping[str, Callable[[int], float]],
    budget: Budget,
    between: Callable[[], Any] = lambda: None,
    beside: Collection[str] = (),
) -> dict[str, Spread]:
    """Time all entries in turn, A B A B ..., each round beginning with another one.

    Args:
        entries: By name, one timed call: takes the number of the call, returns seconds.
        budget: How many rounds.
        between: Called before each round.
        beside: Of the entries those that do another work: none is too slow for being slower.
    """
    turn = 0
    warm = {}
    for name, entry in entries.items():
        warm[name] = entry(turn)
        turn += 1
    fastest = min(seconds for name, seconds in warm.items() if name not in beside)
    slow = {name for name in warm if warm[name] > budget.slow * fastest}
    whole = sum(warm.values())
    least = budget.rounds[0] if whole < budget.seconds else budget.slow_rounds
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    names = list(entries)
    start = time.perf_counter()
    for number in range(budget.rounds[1]):
        if number >= least and time.perf_counter() - start > budget.seconds:
            break
        between()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name in slow and number >= budget.slow_rounds:
                continue
            seconds[name].append(entries[name](turn))
            turn += 1
    return {name: Spread.of(times) for name, times in seconds.items()}


class Quiet:
    """Watches how long a parallel region takes that does next to nothing.

    On a quiet machine it takes some 10 microseconds; where other work holds a core, until that
    gives way.
    """

    LIMIT = 1e-3
    """Seconds; a region that takes longer has met other work."""
    SHARE = 0.1
    """Of the regions that may."""

    def __init__(self, region: Callable[[], Any] | None = None):
        # As many elements as two threads share in torch's loops.
        self._region = region or torch.ones(2 * 32768).zero_
        self.seconds: list[float] = []

    def look(self, times: int = 5) -> None:
        for _ in range(times):
            start = time.perf_counter()
            self._region()
            self.seconds.append(time.perf_counter() - start)

    @property
    def busy_share(self) -> float:
        """Of all regions, those that took longer than the limit."""
        return sum(s > self.LIMIT for s in self.seconds) / max(1, len(self.seconds))

    @property
    def busy(self) -> bool:
        return self.busy_share > self.SHARE


def _last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MiB where Linux does not tell."""
    units = {"K": 1 << 10, "M": _MIB, "G": 1 << 30}
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=64 * _MIB)
