"""Peak memory of one call, by torch's own books, and the scratch memory of our C++ kernels.

What others' compiled operators allocate without torch's allocator is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.calls import Call, Given, Work
from vd_kernels.backends import load_cpu_kernels


@dataclass(frozen=True)
class Memory:
    """Bytes above what there was before the call."""

    peak: int
    results: int
    """Of the peak, what the call returned: results and gradients."""

    @property
    def extra(self) -> int:
        return max(0, self.peak - self.results)


def weigh(call: Call, given: Given) -> Memory:
    return call(given, _on_cuda if call.case.device == "cuda" else _on_cpu)


def _on_cuda(work: Work) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = work()
    torch.cuda.synchronize()
    return Memory(torch.cuda.max_memory_allocated() - before, _size(returned))


def _on_cpu(work: Work) -> Memory:
    """The running sum of what the profiler saw allocated and freed, and threads' scratch memory.

    That is there all along: what this call asks of it counts, whenever it was allocated.
    """
    _scratch()  # what earlier calls asked for
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        returned = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return Memory(peak + _scratch(), _size(returned))


def _scratch() -> int:
    """Bytes that threads of our C++ kernels have asked for since this was called last."""
    return 0 if load_cpu_kernels() else torch.ops.vd._scratch_bytes_cpp()


def _size(tensors: tuple[torch.Tensor, ...]) -> int:
    """Of what lies behind tensors, each storage once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
