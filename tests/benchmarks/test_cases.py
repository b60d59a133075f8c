"""Every registered case can be built, and what is timed in it is right."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from benchmarks import cases, memory, registry
from benchmarks.calls import Call, draw
from benchmarks.cases import DTYPES, MODES, Case, Contestant
from benchmarks.check import Check, fault_of
from benchmarks.goals import goals
from benchmarks.language_gate import LanguageGate
from benchmarks.memory import weigh
from benchmarks.spacetime_attention import Attention
from benchmarks.topk_sampling import TopKSample
from vd_kernels import testing

CPU = registry.cases("cpu")
SHRUNK = {case.shrunk().id: case.shrunk() for case in CPU if not case.curve}
"""One for each task, mode and dtype."""
OPERATORS = [case for case in SHRUNK.values() if case.dtype != torch.float16]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ids_are_unique_and_goals_name_cases(device: str) -> None:
    ids = [case.id for case in registry.cases(device)]
    assert len(ids) == len(set(ids))
    assert set(goals(device)) <= set(ids)


def test_every_operator_has_all_modes_and_dtypes() -> None:
    for operator in ("language_gate", "spacetime_attention"):
        found = {(c.mode, c.dtype) for c in CPU if c.task.operator == operator}
        assert found == {(mode, dtype) for mode in MODES for dtype in DTYPES.values()}
    assert {c.mode for c in CPU if c.task.operator == "topk_sample"} == set(MODES)


def test_growth_curves_cover_every_size_that_measuring_names() -> None:
    assert {case.curve for case in CPU if case.curve} == {"T", "S", "N", "K", "M", "B", "L", "n"}


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.id)
def test_contestants_agree_with_float64(case: Case) -> None:
    check, right = Check(case), []
    for contestant in case.task.contestants(case):
        # Those through torch.compile run what "eager" or "reference" runs.
        # What is skipped is too slow at full sizes, or FlexAttention, which compiles itself.
        if contestant.compiled or contestant.name == "FlexAttention":
            continue
        call = Call.of(case, contestant)
        try:
            assert not check.fault(contestant, call), contestant.name
        except RuntimeError as error:  # a backend without this operator says so
            assert "has no implementation" in str(error)
            continue
        right.append(contestant.name)
    others = {entry.name for entry in case.task.contestants(case) if not entry.ours}
    assert "reference" in right
    assert len(others & set(right)) >= (1 if case.task.operator == "head" else 2)


@pytest.mark.parametrize("case", [c for c in CPU if c.curve], ids=lambda case: case.id)
def test_points_of_curves_are_whole_cases(case: Case) -> None:
    assert case.sizes[case.curve]
    assert case.task.floor(case).bytes > 0
    assert case.task.contestants(case)


def test_what_is_compiled_gives_the_same() -> None:
    compiled = [
        (case, contestant)
        for case in OPERATORS
        if case.mode == "both" and case.dtype == torch.float32 and case.task.operator != "head"
        for contestant in case.task.contestants(case)
        if contestant.compiled
    ]
    assert len(compiled) >= 5
    for case, contestant in compiled:
        torch.compiler.reset()
        assert not fault_of(case, contestant, backend="eager"), f"{case.id}: {contestant.name}"


def test_what_can_be_fused_is_compiled_too() -> None:
    """All of PyTorch's own forms but a bare call of one operator, or what is known to be slow."""
    bare = ("FlexAttention", "permute + SDPA", "published form", "torch.gather")
    for case in OPERATORS:
        others = [c for c in case.task.contestants(case) if not c.ours]
        compiled = {c.function for c in others if c.compiled}
        alone = bare if "-" in case.task.variant else (*bare, "zero-copy SDPA")
        left = [c.name for c in others if c.function not in compiled]
        assert all(name.startswith(alone) for name in left), case.id


def test_a_wrong_contestant_is_found_out() -> None:
    case = SHRUNK["topk_sample/perturbed/both/float32/B3-n40-K3-N12"]
    published = next(c for c in case.task.contestants(case) if c.name == "published form")
    as_if_exact = Contestant("published form", published.function)
    assert "gradient of scores" in fault_of(case, as_if_exact)
    assert not fault_of(case, published)


@pytest.mark.parametrize("axis", ["time", "space"])
def test_the_oracle_of_attention_is_the_suites(axis: str) -> None:
    task = Attention(axis, gated=True, prefixes=2 * (axis == "space"))
    case = Case(task, task.small, torch.float32, "forward")
    inputs = {k: x.double() for k, x in task.inputs(case, 0, checking=True).items()}
    mine = task.oracle(**inputs)
    theirs = testing.attention_oracle(**inputs, axis=axis)
    torch.testing.assert_close(mine[0], theirs[0])
    if task.prefixes:
        torch.testing.assert_close(mine[1], theirs[1].mean(1))


@pytest.mark.parametrize("variant", ["scalar", "channel", "max", "mean"])
def test_the_oracle_of_the_gate_is_the_suites(variant: str) -> None:
    task = LanguageGate(variant)
    given = task.inputs(Case(task, task.small, torch.float32, "forward"), 0, checking=True)
    inputs = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    torch.testing.assert_close(task.oracle(**inputs)[0], testing.gate_oracle(**inputs)[0])


def test_the_oracle_of_the_choice_is_the_suites() -> None:
    task = TopKSample()
    case = Case(task, task.small, torch.float32, "both")
    given = draw(case, 0, Check(case).results, checking=True)
    weights, grad = Call(case, task.oracle, torch.enable_grad)(given, lambda work: work())
    inputs = given.inputs
    expected = testing.perturbed_oracle(
        inputs["scores"].detach(), given.grads[0], inputs["k"], inputs["noise"], 2.0**-4, "time"
    )
    torch.testing.assert_close(weights.double(), expected[0])
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-4, atol=1e-4)


def at(operator: str, variant: str, mode: str, dtype: str, **sizes: int) -> Case:
    """A case of any size, of a registered task."""
    task = next(c.task for c in CPU if (c.task.operator, c.task.variant) == (operator, variant))
    return Case(task, sizes, DTYPES[dtype], mode)


@pytest.mark.parametrize(
    ("case", "megabytes"),
    [
        # 4 · (3BN + 2BKN) bytes
        (at("topk_sample", "perturbed", "both", "float32", B=256, n=500, K=16, N=512), 18.4),
        # tokens of 8 · 16 · 196 · 12 · 64 times 2 bytes = 38.5 MB: four, five, seven of them
        *(
            (at("spacetime_attention", v, m, "bfloat16", B=8, T=16, S=196, H=12, D=64), size)
            for v, m, size in (
                ("time", "forward", 154.1),
                ("time-gate", "forward", 192.7),
                ("time", "backward", 269.7),
                ("time", "both", 423.9),
            )
        ),
        # query, value, out of 2 · 3152 · 768 · 4 bytes = 19.4 MB, and the key's 0.2
        (at("language_gate", "scalar", "forward", "float32", B=2, L=3152, M=32, H=12, D=64), 58.3),
        # gate_value is as large as the key
        (at("language_gate", "channel", "forward", "float32", B=2, L=3152, M=32, H=12, D=64), 58.5),
        # 8 frames of 196 · 768 · 4 bytes = 0.6 MB, read and written; backward 8, 32, and 32 of them
        (at("topk_gather", "hard", "forward", "float32", B=2, N=32, K=8, C=196 * 768), 19.3),
        (at("topk_gather", "hard", "backward", "float32", B=2, N=32, K=8, C=196 * 768), 86.7),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_floors_are_those_counted_by_hand(case: Case, megabytes: float) -> None:
    assert case.task.floor(case).bytes / 1e6 == pytest.approx(megabytes, abs=0.06)


def test_operations_are_those_counted_by_hand() -> None:
    time = at("spacetime_attention", "time", "forward", "float32", B=1, T=2, S=3, H=1, D=4)
    assert time.task.floor(time).operations == 3 * 2 * (2 * 2 * 2 * 4)  # groups · products
    gate = at("language_gate", "scalar", "both", "float32", B=1, L=5, M=3, H=1, D=2)
    assert gate.task.floor(gate).operations == 4 * 2 * 5 * 3 * 2
    joint = at("spacetime_attention", "joint", "forward", "float32", B=1, T=2, S=3, H=1, D=4)
    assert joint.task.floor(joint).operations == 2 * 2 * (6 * 6 * 4)
    gates = {"max": 2 * 5 * 3 * 2, "mean": 2 * 5 * 2, "channel": 2 * 2 * 5 * 3 * 2}
    for variant, operations in gates.items():
        case = at("language_gate", variant, "forward", "float32", B=1, L=5, M=3, H=1, D=2)
        assert case.task.floor(case).operations == operations
    gather = at("topk_gather", "hard", "both", "float32", B=1, N=5, K=3, C=2)
    assert gather.task.floor(gather).operations == 2 * 3 * 5 * 2


def test_every_operator_and_form_has_cases() -> None:
    assert {(c.task.operator, c.task.variant) for c in CPU if c.task.operator != "head"} == {
        *(("language_gate", form) for form in ("scalar", "max", "mean", "channel")),
        *(("topk_sample", method) for method in ("hard", "perturbed", "gumbel")),
        ("topk_gather", "hard"),
        *(("spacetime_attention", axis) for axis in ("time", "space", "joint")),
        *(("spacetime_attention", form) for form in ("time-gate", "space-gate-prefix")),
    }


def test_operators_are_timed_in_bfloat16_where_it_is_multiplied(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", ModuleType("pytest_benchmark"))
    test_operators = importlib.import_module("benchmarks.test_operators")
    monkeypatch.setattr(test_operators, "DEVICE", "cpu")
    for features, expected in (
        ((), {torch.float32}),
        (("avx512_bf16",), {torch.float32, torch.bfloat16}),
    ):
        found = replace(cases.vd_kernels.explain(), cpu_features=features)
        monkeypatch.setattr(cases.vd_kernels, "explain", lambda found=found: found)
        timed = [run.values[0] for run in test_operators.runs()]
        assert {case.dtype for case in timed} == expected
        assert "topk_gather" in {case.task.operator for case in timed}


def test_memory_counts_what_a_call_takes() -> None:
    case = SHRUNK["topk_sample/perturbed/both/float32/B3-n40-K3-N12"]
    given = draw(case, 0, Check(case).results)
    found = {
        contestant.name: weigh(Call.of(case, contestant), given)
        for contestant in case.task.contestants(case)
        if contestant.name in ("published form", "eager without one-hots")
    }
    one_hots = 3 * 40 * 3 * 12
    # Weights [3,3,12] and the gradient [3,12]; one-hots as int64 and again as float32.
    assert found["published form"].results == 4 * (3 * 3 * 12 + 3 * 12)
    assert found["published form"].peak >= (8 + 4) * one_hots
    assert found["eager without one-hots"].peak < found["published form"].peak


def test_sums_of_the_gate_s_backward_need_no_memory_of_torch_s(monkeypatch) -> None:
    """One thread has all chunks of a head: it adds them up where it works."""
    monkeypatch.setattr(memory, "_scratch", lambda: 0)
    case = at("language_gate", "scalar", "both", "bfloat16", B=1, L=200, M=16, H=4, D=32)
    given = draw(case, 0, Check(case).results)
    (own,) = (entry for entry in case.task.contestants(case) if entry.name == "cpp")
    # The bias's sums of 4 heads and 5 chunks, and what autograd itself takes.
    assert weigh(Call.of(case, own), given).extra <= 4 * 4 * 5 + 128


@pytest.mark.parametrize(
    "case",
    [
        at("language_gate", "scalar", "both", "float32", B=2, L=200, M=16, H=4, D=32),
        at("spacetime_attention", "space", "forward", "float32", B=2, T=4, S=49, H=4, D=32),
        at("topk_sample", "perturbed", "both", "float32", B=8, n=100, K=4, N=64),
    ],
    ids=lambda case: case.task.operator,
)
def test_memory_counts_what_threads_keep(case: Case, monkeypatch) -> None:
    given = draw(case, 0, Check(case).results)
    calls = {c.name: Call.of(case, c) for c in case.task.contestants(case) if not c.compiled}
    page = 4096

    def scratch(name: str, threads: int = 1) -> int:
        torch.set_num_threads(threads)
        found = weigh(calls[name], given)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "_scratch", lambda: 0)
            without = weigh(calls[name], given)
        assert found.results == without.results
        assert found.extra - without.extra == found.peak - without.peak
        return found.peak - without.peak

    alone = scratch("cpp")
    assert alone >= page and alone % page == 0
    assert scratch("cpp") == alone  # though the thread has it by now
    assert scratch("cpp", threads=2) == 2 * alone
    assert scratch("eager" if "eager" in calls else "eager without one-hots") == 0
