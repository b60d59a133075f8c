"""`pytest benchmarks`: the operators' cases under pytest-benchmark, one shape a test.

Of each operator the cases with a goal on this device, and all of `topk_gather`, by every contestant
that needs no compiling; bfloat16 where it is not emulated. For tables, floors and memory use
`python -m benchmarks`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import registry
from benchmarks.calls import Call, draw
from benchmarks.cases import Case, Contestant, emulated
from benchmarks.check import Check
from benchmarks.goals import goals

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.timeout(0)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runs() -> list[pytest.param]:
    wanted = goals(DEVICE)
    cases = (
        case
        for case in registry.cases(DEVICE)
        if case.id in wanted or case.task.operator == "topk_gather"
    )
    return [
        pytest.param(case, contestant, id=f"{case.id}-{contestant.name}")
        for case in cases
        if case.task.operator != "head" and not emulated(case.dtype, DEVICE)
        for contestant in case.task.contestants(case)
        if not contestant.compiled and contestant.name != "FlexAttention"
    ]


@pytest.mark.parametrize(("case", "contestant"), runs())
def test_operator(case: Case, contestant: Contestant, benchmark) -> None:
    check, call = Check(case), Call.of(case, contestant)
    try:
        fault = check.fault(contestant, call)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert not fault
    given = draw(case, 1, check.results)
    benchmark.group = case.id

    def finished(work):
        result = work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    call(given, lambda work: benchmark.pedantic(finished, (work,), rounds=5, warmup_rounds=1))
