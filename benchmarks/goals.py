"""What is to be reached, per case: each goal is a value that must be at least so large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.results import CaseResult, Entry


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals."""

    measure: str
    """What is compared; see `reached`."""
    least: float
    against: str = ""
    """How the others' names begin; of those, the best. Empty: the best of all others."""
    bytes: int = 0
    """Of "memory bound"."""

    def __str__(self) -> str:
        against = f" vs {self.against}" * bool(self.against)
        bound = f" {self.bytes} bytes" * bool(self.bytes)
        return f"{self.measure}{against}{bound} ≥ {self.least:g}"

    def reached(self, result: CaseResult) -> float | None:
        """The value that was measured; None where something that it needs was not.

        speed: time of the best other over ours. copy rate: time of a copy of the floor's bytes
        over ours. extra memory, peak memory: the other's over ours, the first without results.
        memory bound: the bytes that are allowed besides results over ours. rest: time outside
        matrix products of the other that has least of it over ours. Amdahl: of the speed that free
        operators would give, over the best other, the share that was reached.
        """
        mine, other = best(result, ours=True), best(result, ours=False, name=self.against)
        if mine is None:
            return None
        if self.measure == "copy rate":
            return result.copy.median / mine.spread.median
        if self.measure == "memory bound":
            return self.bytes / max(1, mine.memory.extra)
        if other is None:
            return None
        if self.measure == "speed":
            return other.spread.median / mine.spread.median
        if self.measure == "extra memory":
            return other.memory.extra / max(1, mine.memory.extra)
        if self.measure == "peak memory":
            return other.memory.peak / max(1, mine.memory.peak)
        if mine.products is None or other.products is None:
            return None
        if self.measure == "rest":
            others = timed(result, ours=False, name=self.against)
            return min(e.rest for e in others if e.rest is not None) / max(1e-12, mine.rest)
        if self.measure == "Amdahl":
            return other.products / mine.spread.median
        raise ValueError(f"no measure of the name {self.measure!r}")


def best(result: CaseResult, *, ours: bool, name: str = "") -> Entry | None:
    """The fastest of ours, or of the others whose names begin so; None when none was timed.

    The reference counts as ours only where there is nothing else of ours.
    """
    found = timed(result, ours=ours, name=name)
    if ours:
        found = [e for e in found if e.name != "reference"] or found
    return min(found, key=lambda e: e.spread.median, default=None)


def timed(result: CaseResult, *, ours: bool, name: str = "") -> list[Entry]:
    """All of ours, or of the others, that were timed and whose names begin so."""
    entries = (e for e in result.entries if e.spread is not None and e.ours == ours)
    return [e for e in entries if e.name.startswith(name)]


def goals(device: str) -> dict[str, tuple[Goal, ...]]:
    """By case id; device is "cpu" or "cuda"."""
    return dict(_cuda() if device == "cuda" else _cpu())


def _speed(*pairs: tuple[str, float]) -> tuple[Goal, ...]:
    return tuple(Goal("speed", least, against) for against, least in pairs)


def _cpu() -> Iterator[tuple[str, tuple[Goal, ...]]]:
    tokens = "B4-T16-S196-H12-D64"
    for case, single, half in (
        ("time/forward", 2, 3),
        ("time-gate/forward", 2.3, 3),
        ("time/both", 2, 2.5),
        ("space-gate-prefix/forward", 1.2, 1.5),
    ):
        yield f"spacetime_attention/{case}/float32/{tokens}", _speed(("", single))
        yield f"spacetime_attention/{case}/bfloat16/{tokens}", _speed(("", half))
    small = "spacetime_attention/time/forward/float32/B1-T4-S196-H12-D64"
    yield small, _speed(("", 3))
    space = "spacetime_attention/space/forward"
    yield f"{space}/float32/B4-T16-S197-H12-D64", _speed(("zero-copy SDPA", 0.95))
    yield f"{space}/bfloat16/B4-T16-S197-H12-D64", _speed(("zero-copy SDPA", 1.3))

    words = "B2-L3152-M32-H12-D64"
    yield f"language_gate/scalar/forward/float32/{words}", _speed(("", 2))
    yield f"language_gate/scalar/forward/bfloat16/{words}", _speed(("", 2.5))
    for dtype in ("float32", "bfloat16"):
        wanted = (*_speed(("", 2.5)), Goal("extra memory", 100, "eager"))
        yield f"language_gate/scalar/both/{dtype}/{words}", wanted

    choice = (
        *_speed(("", 3), ("published form", 100)),
        Goal("memory bound", 1, bytes=2 * 16 * 500 * 16),
    )
    yield "topk_sample/perturbed/both/float32/B16-n500-K16-N512", choice

    for mode in ("forward", "both"):
        for dtype in ("float32", "bfloat16"):
            case = f"head/reference/{mode}/{dtype}/B1-N32-K8-S196-M32-C768-H12"
            yield case, (Goal("rest", 2, "torch.compile"), Goal("Amdahl", 0.8))


def _cuda() -> Iterator[tuple[str, tuple[Goal, ...]]]:
    def attention(case: str, patches: int = 196) -> str:
        variant, mode = case.split()
        return f"spacetime_attention/{variant}/{mode}/bfloat16/B8-T16-S{patches}-H12-D64"

    sdpa, permuted = "zero-copy SDPA", "permute + SDPA"
    yield (
        attention("time forward"),
        (Goal("copy rate", 0.75), *_speed((sdpa, 2), (permuted, 4), ("torch.compile", 2.5))),
    )
    yield attention("time-gate forward"), _speed((sdpa, 2.5))
    yield attention("time backward"), _speed((sdpa, 4))
    yield attention("space forward", 197), _speed(("", 0.95))
    yield attention("space-gate-prefix forward"), _speed(("", 1.4))
    yield attention("space backward", 197), _speed(("", 0.8))
    for mode in ("forward", "both"):
        yield (
            f"language_gate/scalar/{mode}/bfloat16/B16-L3152-M32-H12-D64",
            (Goal("copy rate", 0.75), *_speed(("torch.compile", 2), ("eager", 4))),
        )
    yield (
        "topk_sample/perturbed/both/float32/B256-n500-K16-N512",
        (*_speed(("published form", 10), ("", 3)), Goal("peak memory", 300, "published form")),
    )
    head = "head/reference/{}/bfloat16/B{}-N32-K8-S196-M32-C768-H12"
    for mode in ("forward", "both"):
        yield head.format(mode, 8), (Goal("Amdahl", 0.8), *_speed(("torch.compile", 1)))
    yield head.format("forward", 1), _speed(("eager", 3))
