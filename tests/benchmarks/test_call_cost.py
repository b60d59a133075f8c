"""The call that is compared with is the backend's own, and does the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.call_cost import calls, direct, measure
from benchmarks.timing import Budget, CpuClock
from vd_kernels import backends, use_backend
from vd_kernels.language_gate import op


@pytest.mark.parametrize("name", calls("cpu"))
@torch.inference_mode()
def test_the_direct_call_does_the_same(name: str) -> None:
    call = calls("cpu")[name]
    expected = call()
    backend = direct(call)
    assert call is not backend
    found = backend()
    expected, found = (
        [y for y in (x if isinstance(x, tuple) else (x,)) if y is not None]
        for x in (expected, found)
    )
    assert len(expected) == len(found)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@torch.inference_mode()
def test_the_direct_call_is_of_the_chosen_backend() -> None:
    call = calls("cpu")["language_gate"]
    with use_backend("reference"):
        assert direct(call).func is op.FORWARD["reference"]
    assert direct(call).func is next(iter(op.FORWARD.values())) or backends.load_cpu_kernels()


def test_every_call_is_measured_both_ways() -> None:
    asked: list[int] = []

    class Clock(CpuClock):
        def time(self, work, repeats: int) -> tuple[float, Tensor]:
            asked.append(repeats)
            return super().time(work, 1)

    measured = measure("cpu", Clock(), Budget(seconds=0.0, rounds=(2, 2)))
    assert measured.keys() == calls("cpu").keys()
    for pair in measured.values():
        assert pair.keys() == {"public", "direct"}
        assert all(0 < spread.median < 1 and spread.rounds == 2 for spread in pair.values())
    assert set(asked) == {200}
