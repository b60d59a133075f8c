"""What a call costs where nothing is to be done: public functions against the backend alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.timing import Budget, Clock, Spread, interleaved
from vd_kernels import backends, language_gate, spacetime_attention, topk_gather, topk_sample

CALLS = 200
"""In a row: one alone takes little longer than looking at the clock."""
BUDGET = Budget(seconds=10.0, rounds=(21, 101))


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """A call of each operator, by name, of sizes at which the work itself takes no time."""
    query, key = torch.randn(1, 4, 2, 16, device=device), torch.randn(1, 3, 2, 16, device=device)
    tokens = torch.randn(1, 2, 3, 2, 16, device=device)
    scores, values = torch.randn(2, 8, device=device), torch.randn(2, 8, 4, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    sample = partial(topk_sample, scores, 2, num_samples=8, seed=seed)
    return {
        "language_gate": partial(language_gate, query, key, query),
        "topk_sample, hard": partial(sample, method="hard"),
        "topk_sample, perturbed": partial(sample, method="perturbed"),
        "topk_sample, gumbel": partial(sample, method="gumbel"),
        "topk_gather": partial(topk_gather, values, sample(method="hard")),
        "spacetime_attention": partial(spacetime_attention, tokens, tokens, tokens, axis="time"),
    }


def direct(call: Callable[[], Any]) -> Callable[[], Any]:
    """The function of a backend that a call ends in, with the arguments that the call gave it."""
    found: list[Callable[[], Any]] = []
    choose = backends.choose

    def spying(*arguments: Any, **settings: Any) -> Callable[..., Any]:
        run = choose(*arguments, **settings)

        def spy(*given: Any) -> Any:
            found.append(partial(run, *given))
            return run(*given)

        return spy

    # Nothing of it may be remembered, and nothing that is may keep it from happening.
    with mock.patch.object(backends, "choose", spying), mock.patch.object(backends, "_plans", {}):
        call()
    (run,) = found
    return run


@torch.inference_mode()
def measure(device: str, clock: Clock, budget: Budget = BUDGET) -> dict[str, dict[str, Spread]]:
    """By operator, seconds of one call through the "public" function and of the "direct" one."""
    measured = {}
    for name, call in calls(device).items():
        entries = {"public": call, "direct": direct(call)}
        timed = {
            how: lambda turn, work=work: clock.time(work, CALLS)[0] for how, work in entries.items()
        }
        measured[name] = interleaved(timed, budget)
    return measured
