"""What the whole head should take of an H200: how it is composed, and that the document says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.goals import goals
from vd_kernels import language_gate
from vd_kernels.backends import load_triton

if load_triton():
    pytest.skip(load_triton(), allow_module_level=True)

from vd_kernels import _triton

if _triton.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from benchmarks import expected
from vd_kernels.expected import BANDWIDTH, OPERATIONS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def test_every_goal_of_the_head_has_a_case() -> None:
    assert {case.id for case in expected.cases()} == {x for x in goals("cuda") if "head/" in x}


def test_all_that_is_asked_of_torch_is_noted() -> None:
    with FakeTensorMode(), expected.Trace() as trace:
        a, b = torch.empty(128, 256, dtype=torch.bfloat16), torch.empty(64, 256).bfloat16()
        trace.rest.clear()  # what made these
        c = torch.mm(a, b.t())
        _ = c.view(2, 64, 64).transpose(0, 1) + torch.empty(64).expand(64, 2, 64)
    (product,) = trace.products
    assert product.operations == pytest.approx(2 * 128 * 256 * 64 / OPERATIONS * 1e6)
    moved = 2 * (128 * 256 + 64 * 256 + 128 * 64)
    assert product.memory == pytest.approx(moved / BANDWIDTH * 1e6)
    *_, add = trace.rest
    assert add.time == pytest.approx((2 * 128 * 64 + 4 * 64 + 4 * 128 * 64) / BANDWIDTH * 1e6)


def test_kernels_of_ours_are_noted_forward_and_backward() -> None:
    with FakeTensorMode(), expected.Trace() as trace:
        query, key = (torch.empty(2, n, 3, 16, requires_grad=True) for n in (40, 5))
        torch.autograd.grad(language_gate(query, key).sum(), (query, key))
    names = [launch.kernel.__name__ for launch in trace.launches]
    assert names == ["forward_kernel", "backward_kernel", "sum_kernel"]
    assert not trace.products


@pytest.mark.parametrize("case", list(expected.cases()), ids=lambda case: case.id)
def test_the_document_tells_what_is_composed(case: expected.Case) -> None:
    text = DOCUMENT.read_text("utf-8").partition("<!-- head: begin -->")[2]
    lines = text.partition("<!-- head: end -->")[0].splitlines()
    if next(expected.table()) not in lines:
        pytest.skip("another Triton compiles otherwise")
    found = expected.row(case, expected.compose(case))
    assert found in lines, "python -m benchmarks.expected docs/kernels.md writes it anew"


def test_a_page_that_is_not_there_is_told_of_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert expected.main(["nowhere.md"]) == 2
    assert capsys.readouterr().err.splitlines() == ["nowhere.md is no page to write the table into"]
