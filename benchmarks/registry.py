"""All cases of a device, in the order in which they are measured."""

from __future__ import annotations

from benchmarks import head, language_gate, spacetime_attention, topk_gathering, topk_sampling
from benchmarks.cases import Case

FILES = (language_gate, topk_sampling, topk_gathering, spacetime_attention, head)


def cases(device: str) -> list[Case]:
    """Every case, points of curves among them; device is "cpu" or "cuda"."""
    return [case for file in FILES for case in file.cases(device)]
