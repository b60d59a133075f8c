"""What kernels should take of an H200: how it is counted, and that the documents say so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton

from benchmarks import language_gate, spacetime_attention, topk_sampling
from benchmarks.goals import goals
from vd_kernels.backends import load_triton

if load_triton():
    pytest.skip(load_triton(), allow_module_level=True)

from vd_kernels import _triton

if _triton.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from vd_kernels import compile_cuda, expected
from vd_kernels.expected import Count, Expected
from vd_kernels.language_gate import triton_kernels as gate
from vd_kernels.spacetime_attention import triton_kernels as attention
from vd_kernels.topk_sampling import triton_kernels as topk

DOCS = Path(__file__).resolve().parents[2] / "docs"
FLOORS = {
    case.id: case.task.floor(case)
    for operator in (language_gate, spacetime_attention, topk_sampling)
    for case in operator.cases("cuda")
}

# Two loops, one in the other, then a way that is rare, and one that calls what is not on it.
NESTED = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/               @P2 BRA 0xa0 ;
        /*0080*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   CALL.REL.NOINC 0xf0 ;
        /*00b0*/                   MUFU.RCP R1, R1 ;
        /*00c0*/                   MUFU.RCP R1, R1 ;
        /*00d0*/                   BRA 0x80 ;
        /*00e0*/                   BRA 0xe0 ;
        /*00f0*/                   RET.REL.NODEC R2 0x0 ;
"""


def test_passes_through_nested_loops_are_counted() -> None:
    text = expected.Text(NESTED)
    assert len(text.loops) == 2
    wide, small = 2 * 64 * 32 * 16 / 4, 2 * 16 * 8 * 16
    assert list(text.parts([3, 5])) == [
        (1, Count(10, 1, wide + small)),  # once through all, without the rare way
        (2, Count(6, 1, wide + small)),
        (3 * 4, Count(2, 1, 0)),
    ]
    with pytest.raises(ValueError, match="2 loops were compiled, not 1"):
        list(text.parts([3]))


def test_a_way_may_have_to_lead_through_some_instructions() -> None:
    text = expected.Text(NESTED)
    (_, once), *_ = text.parts([1, 1], [r"MUFU\.RCP"])
    assert (once.instructions, once.special) == (14, 3)
    (_, once), (_, again) = text.parts([2, 1], ["FADD"])
    assert (once.instructions, again.instructions) == (10, 6)


def test_of_two_ways_what_is_named_first_decides() -> None:
    text = expected.Text(
        """
        /*0000*/               @P0 BRA 0x40 ;
        /*0010*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E R3, desc[UR4][R2.64] ;
        /*0030*/                   BRA 0x50 ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/               @P1 BRA 0x70 ;
        /*0060*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0070*/                   EXIT ;
        """
    )
    found = [[count.instructions for _, count in text.parts([], x)] for x in ((), ("LDG",))]
    assert found == [[4], [7]]
    assert [count.instructions for _, count in text.parts([], ("FADD", "LDG"))] == [5]


def test_instructions_in_float64_are_counted() -> None:
    text = expected.Text(
        """
        /*0000*/                   DADD R2, R2, 1 ;
        /*0010*/              @!P0 DFMA R2, R2, R4, -R6 ;
        /*0020*/                   DSETP.GT.AND P0, PT, R2, RZ, PT ;
        /*0030*/                   IDP.4A.U8.U8 R2, R2, R4, RZ ;
        /*0040*/                   EXIT ;
        """
    )
    assert list(text.parts([])) == [(1, Count(5, 0, 0, 3))]


def test_a_loop_that_is_not_passed_through_is_left_out() -> None:
    text = expected.Text(
        NESTED.replace("S2R R0, SR_TID.X", "BRA 0x80").replace("BRA 0x80", "@P3 BRA 0x80", 1)
    )
    assert list(text.parts([0, 0])) == [(1, Count(3, 0, 0))]


def test_a_kernel_may_end_under_a_condition() -> None:
    text = expected.Text(
        """
        /*0000*/               @P0 EXIT ;
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!P1 BRA 0x10 ;
        /*0030*/              @!P2 EXIT ;
        /*0040*/                   BRA 0x30 ;
        """
    )
    assert [count for _, count in text.parts([2, 0])] == [Count(4, 0, 0), Count(2, 0, 0)]


def kernel(programs: int = 132, **given: object) -> Expected:
    usual = dict(warps=4, registers=32, spills=0, shared=0, products=0, bytes=0)
    parts = ((1.0, 1, Count(1000, 0, 0)),)
    return Expected("some", programs, **(usual | {"parts": parts} | given))


@pytest.mark.parametrize(
    ("given", "limit", "at_once"),
    [
        ({"registers": 33}, "registers", 12),  # 40 of 128 threads
        ({"shared": 64 * 1024}, "shared memory", 3),  # and 1 KB more for each
        ({"registers": 16}, "warps", 16),
        ({"registers": 16, "warps": 1}, "programs", 32),
    ],
)
def test_what_limits_the_programs_of_a_multiprocessor(
    given: dict[str, int], limit: str, at_once: int
) -> None:
    assert (kernel(**given).limit, kernel(**given).at_once) == (limit, at_once)


def test_rounds_that_are_not_full_take_as_long_as_full_ones() -> None:
    moving = {"bytes": 48e6, "parts": ((1.0, 1, Count(1, 0, 0)),)}
    assert kernel(132 * 16 * 4, **moving).expected == pytest.approx(10)
    assert kernel(132 * 16 * 3 + 132 * 8, **moving).expected == pytest.approx(10 * 4 / 3.5)
    assert kernel(132 * 3, **moving).expected == pytest.approx(10)
    assert kernel(66, **moving).expected == pytest.approx(20)


def test_times_follow_from_counts() -> None:
    count = Count(132 * 4 * 1.755e3, 132 * 16 / 32 * 1.755e3, 989e6, 132 * 2 * 1.755e3)
    whole = kernel(1, warps=1, parts=((0.25, 4, count),), bytes=4.8e6)
    assert whole.times == pytest.approx(dict(memory=1, products=1, special=1, float64=1, issue=1))
    assert whole.in_turn == pytest.approx(132 * 4 * 4)


def test_every_case_with_a_goal_is_expected() -> None:
    names = {case.name for case in expected.cases()}
    wanted = {name for name in goals("cuda") if not name.startswith("head/")}
    both = {name for name in wanted if "/both/" in name}
    parts = {
        name.replace("/both/", f"/{mode}/") for name in both for mode in ("forward", "backward")
    }
    assert names >= wanted - both | parts


def test_every_kernel_is_in_some_case() -> None:
    written = {
        x
        for module in (gate, attention, topk)
        for name, x in vars(module).items()
        if name.endswith("_kernel") and isinstance(x, triton.runtime.JITFunction)
    }
    with _triton.recorded(expected.ARCH) as launches:
        launched = [launch for case in expected.cases() for launch in case.run() or ()]
    assert {launch.kernel for launch in launches} == written
    text = (compile_cuda.SOURCES / "cuda_kernels.cuh").read_text("utf-8")
    written = set(re.findall(r"__global__ void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", text))
    assert {f"{launch.kernel.partition(' ')[0]}_kernel" for launch in launched} == written


@pytest.mark.parametrize("case", list(expected.cases()), ids=lambda case: case.title)
def test_the_documents_tell_what_is_expected(case: expected.Case) -> None:
    if case.cuda and compile_cuda.compiler() is None:
        pytest.skip("no nvcc; set NVCC to one")
    found = list(expected.expect(case))
    assert not [x.kernel for x in found if x.spills]
    if floor := FLOORS.get(case.name):
        assert sum(x.bytes for x in found) >= floor.bytes
        done = sum(x.programs * x.warps * x.count.operations for x in found)
        assert done >= floor.operations
        if "time/" in case.name:  # whose 16 frames need no padding
            assert done == floor.operations
    document = (DOCS / "kernels.md").read_text("utf-8").partition("<!-- expected: begin -->")[2]
    lines = set(document.splitlines())
    if expected.compiler(case) not in lines:
        pytest.skip("another compiler compiles otherwise")
    wrong = {*(expected.taken(case, x) for x in found), *expected.timed(case, found)} - lines
    assert not wrong, "python -m vd_kernels.expected docs/kernels.md writes it anew"
    logged, log = expected.logged(case, found), (DOCS / "tuning-log.md").read_text("utf-8")
    line = next(line for line in log.splitlines() if line.startswith(f"| {case.title} |"))
    assert line == logged or not line.endswith("| not yet |"), logged


def test_a_spill_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected.compiling, "registers_and_spills", lambda told: (32, 8))
    case = next(case for case in expected.cases() if case.title == "topk_gather weights forward")
    assert [(x.kernel, x.spills) for x in expected.expect(case)] == [("entries", 8), ("gather", 8)]


def test_a_page_that_is_not_there_is_told_of_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert expected.main(["nowhere.md"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "nowhere.md is no page to write the tables into"
    ]
