"""Correct before fast: results and gradients against float64, before anything is timed.

What is allowed depends on the data (`vd_kernels.testing.tolerance`): twice the error that the plain
formula makes in the inputs' dtype, and a few roundings; of others' forms `slack` times as much.
"""

from __future__ import annotations

import contextlib
import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.calls import Call, Given, draw, leaves
from benchmarks.cases import Case, Contestant, Function
from vd_kernels.testing import assert_near, poisoned, tolerance


class Check:
    """What every contestant of a case is compared with, on one set of inputs."""

    def __init__(self, case: Case, seed: int = 0):
        self.case, self.seed = case, seed
        self._truths: dict[Function, list[tuple[str, Tensor, float]]] = {}

    @cached_property
    def results(self) -> tuple[Tensor, ...]:
        """What the oracle returns in the inputs' dtype; for their shapes and dtypes."""
        inputs = self.case.task.inputs(self.case, self.seed, checking=True)
        with torch.no_grad():
            return self.case.task.oracle(**inputs)

    @cached_property
    def given(self) -> Given:
        return draw(self.case, self.seed, self.results, checking=True)

    def fault(self, contestant: Contestant, call: Call) -> str:
        """What is wrong with a contestant's results, in words; empty when they are right."""
        truths = self._truth(contestant.oracle or self.case.task.oracle)
        # Only our operators allocate what they might forget to write.
        poison = contestant.ours and not contestant.compiled
        with poisoned() if poison else contextlib.nullcontext():
            found = self._named(call(self.given, lambda work: work()))
        slack = 1.0 if contestant.ours else self.case.task.slack
        try:
            for (name, exact, allowed), result in zip(truths, found.values(), strict=True):
                assert_near(name, result, exact, slack * allowed)
        except AssertionError as error:
            return str(error)
        return ""

    def _truth(self, oracle: Function) -> list[tuple[str, Tensor, float]]:
        """Name, float64 value and allowed error of each result."""
        if oracle not in self._truths:
            call = Call(self.case, oracle, contextlib.nullcontext)
            rounded = self._named(call(self.given, lambda work: work()))
            wide = Given(
                {name: _double(x) for name, x in self.given.inputs.items()},
                tuple(x.double() for x in self.given.grads),
            )
            exact = self._named(call(wide, lambda work: work()))
            self._truths[oracle] = [
                (name, true, tolerance(true, rounded[name], self.case.dtype))
                for name, true in ((name, x.double()) for name, x in exact.items())
            ]
        return self._truths[oracle]

    def _named(self, returned: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Results by name; a module's gradients in one vector."""
        count = 0 if self.case.mode == "backward" else len(self.results)
        named = {f"result {i}": x.detach() for i, x in enumerate(returned[:count])}
        if self.case.mode == "forward":
            return named
        rest = iter(returned[count:])
        for name, part in leaves(self.given.inputs, self.case.task.differentiable).items():
            named[f"gradient of {name}"] = torch.cat([next(rest).flatten() for _ in part])
        return named


def _double(x: Any) -> Any:
    """An input in float64, fit for gradients where it was."""
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).double()
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def fault_of(case: Case, contestant: Contestant, backend: str = "inductor") -> str:
    """One contestant of a case alone; as `Check.fault`."""
    return Check(case).fault(contestant, Call.of(case, contestant, backend))
