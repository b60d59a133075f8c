"""Peak memory of one call, by torch's own books.

What a compiled operator allocates without torch's allocator, and what stays from one call to the
next, is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.calls import Call, Given, Work


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
    """The running sum of what the profiler saw allocated and freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        returned = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return Memory(peak, _size(returned))


def _size(tensors: tuple[torch.Tensor, ...]) -> int:
    """Of what lies behind tensors, each storage once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
