"""Measure a case: check all contestants, weigh them, then time them in turn."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.calls import Call, Given, Work, draw
from benchmarks.cases import Case, Contestant, Inputs
from benchmarks.check import Check
from benchmarks.floors import copying
from benchmarks.memory import weigh
from benchmarks.profiling import sampled
from benchmarks.results import CaseResult, Entry
from benchmarks.timing import Budget, Clock, Quiet, interleaved

_COPY = "copy"
_MOST_SETS = 64
_PARTS = 12  # of a call, that are kept
_CPU_PRODUCTS = re.compile(r"^(aten::(mm|addmm|linear)|mkldnn::_?linear\w*|mkl::_mkl_linear)$")
_CUDA_PRODUCTS = re.compile(r"gemm|nvjet|cutlass|triton_tem|triton_mm")
_CUDA_ATTENTION = re.compile(r"flash|fmha|attention")


def measure(
    case: Case, clock: Clock, budget: Budget, say: Callable[[str], None] = lambda text: None
) -> CaseResult:
    """Everything that is known of a case afterwards.

    say: Told what is being done.
    """
    torch.compiler.reset()  # each case compiles anew, for its own sizes
    check, quiet, floor = Check(case), Quiet(), case.task.floor(case)
    contestants = {c.name: c for c in case.task.contestants(case)}
    entries: dict[str, Entry] = {}
    calls: dict[str, Call] = {}
    for name, contestant in contestants.items():
        say(f"checking {name}")
        entries[name], call = _admit(case, contestant, check)
        if call is not None:
            calls[name] = call

    say("timing")
    sets = _sets(case, check, clock.cold_bytes) if calls else []

    def timed(call: Call) -> Callable[[int], float]:
        def once(turn: int) -> float:
            given = sets[turn % len(sets)]
            return call(given, lambda work: clock.time(work, case.repeats)[0])

        return once

    spreads = interleaved(
        {
            _COPY: copying(floor.bytes, case.device, clock),
            **{name: timed(call) for name, call in calls.items()},
        },
        budget,
        between=quiet.look,
        beside=(_COPY,),
    )
    for name, call in calls.items():
        # What was right before the clock ran must be right after it.
        fault = check.fault(contestants[name], call)
        split = case.task.split and not fault
        products, others = _parts(call, sets[0], spreads[name].median) if split else (None, {})
        entries[name] = replace(
            entries[name],
            note=f"wrong after timing: {fault}" if fault else "",
            spread=None if fault else spreads[name],
            products=products,
            others=others,
            functions={} if fault else _functions(case, contestants[name], call, sets),
        )
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return CaseResult(
        id=case.id,
        operator=case.task.operator,
        variant=case.task.variant,
        mode=case.mode,
        dtype=str(case.dtype).removeprefix("torch."),
        sizes=dict(case.sizes),
        curve=case.curve,
        floor_bytes=floor.bytes,
        floor_operations=floor.operations,
        copy=spreads[_COPY],
        busy_share=quiet.busy_share,
        inconclusive=quiet.busy,
        entries=list(entries.values()),
    )


def _admit(case: Case, contestant: Contestant, check: Check) -> tuple[Entry, Call | None]:
    """Its entry, and the call to time unless it cannot run or returns what is wrong."""
    entry = Entry(contestant.name, contestant.ours)
    if contestant.skipped:
        return replace(entry, note=f"skipped: {contestant.skipped}"), None
    try:
        call = Call.of(case, contestant)
        fault = check.fault(contestant, call)
        if fault:
            return replace(entry, note=f"wrong: {fault}"), None
        return replace(entry, memory=weigh(call, check.given)), call
    except Exception as error:  # whatever a baseline fails with must not end the run
        reason = " ".join(str(error).split())[:200]
        return replace(entry, note=f"cannot run: {type(error).__name__}: {reason}"), None


def _sets(case: Case, check: Check, cold_bytes: int) -> list[Given]:
    """Inputs to use in turn, so many that none is in a cache when it comes again."""
    first = draw(case, 1, check.results)
    count = 1 if case.repeats > 1 else 1 + cold_bytes // max(1, _size(first.inputs))
    more = range(2, 1 + min(count, _MOST_SETS))
    return [first, *(draw(case, seed, check.results) for seed in more)]


def _size(inputs: Inputs) -> int:
    return sum(x.nbytes for x in inputs.values() if isinstance(x, torch.Tensor))


def _functions(
    case: Case, contestant: Contestant, call: Call, sets: list[Given]
) -> dict[str, float]:
    """Where the C++ kernels spend their time; a backward alone cannot be called without forward."""
    if contestant.name != "cpp" or case.curve or case.repeats > 1 or case.mode == "backward":
        return {}
    turns = itertools.cycle(sets)
    return sampled(lambda: call(next(turns), lambda work: work()))


def _parts(call: Call, given: Given, seconds: float) -> tuple[float, dict[str, float]]:
    """Of a call's seconds, those in the matrix products of linear layers, and the largest others.

    On a CPU their shares of a profiled call, as other work slows all parts alike; on a GPU the time
    of the kernels themselves.
    """
    if call.case.device == "cuda":
        times, is_product = call(given, _times_on_cuda), _is_product_on_cuda
    else:
        shares = call(given, _shares_on_cpu)
        times = {name: share * seconds for name, share in shares.items()}
        is_product = _CPU_PRODUCTS.search
    products = sum(time for name, time in times.items() if is_product(name))
    others = {name: time for name, time in times.items() if not is_product(name)}
    largest = sorted(others, key=others.__getitem__, reverse=True)[:_PARTS]
    return products, {name: others[name] for name in largest}


def _is_product_on_cuda(name: str) -> bool:
    return bool(_CUDA_PRODUCTS.search(name)) and not _CUDA_ATTENTION.search(name)


def _shares_on_cpu(work: Work) -> dict[str, float]:
    """By operation, the share of the whole that its own work takes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        work()
        whole = time.perf_counter() - start
    return {e.key: e.self_cpu_time_total / 1e6 / whole for e in profiler.key_averages()}


def _times_on_cuda(work: Work) -> dict[str, float]:
    """Seconds by kernel."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e6
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA
    }
