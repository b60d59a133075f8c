"""From a contestant to one call of it that can be timed, weighed or checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Contestant, Context, Function, Inputs

T = TypeVar("T")
Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Given:
    """One set of inputs, with gradients of the results where there is a backward."""

    inputs: Inputs
    grads: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Call:
    """A contestant's function in a case, split into what is prepared and what counts."""

    case: Case
    function: Function
    context: Context

    @classmethod
    def of(cls, case: Case, contestant: Contestant, backend: str = "inductor") -> Call:
        return cls(case, contestant.build(case.device, backend), contestant.context)

    def __call__(self, given: Given, measured: Callable[[Work], T]) -> T:
        """Hand the part that counts to `measured`, and return what that returns."""
        mode, inputs = self.case.mode, given.inputs
        if self.case.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with self.context(), torch.set_grad_enabled(mode != "forward"):
            if mode == "forward":
                return measured(lambda: self.function(**inputs))
            parts = leaves(inputs, self.case.task.differentiable)
            sources = [leaf for part in parts.values() for leaf in part]
            if mode == "backward":
                results = self.function(**inputs)
                return measured(lambda: torch.autograd.grad(results, sources, given.grads))

            def both() -> tuple[Tensor, ...]:
                results = self.function(**inputs)
                return *results, *torch.autograd.grad(results, sources, given.grads)

            return measured(both)


def leaves(inputs: Inputs, differentiable: Iterable[str]) -> dict[str, list[Tensor]]:
    """By input, the tensors whose gradients count: itself, or a module's parameters."""
    found = {name: inputs[name] for name in differentiable if inputs.get(name) is not None}
    return {
        name: list(x.parameters()) if isinstance(x, nn.Module) else [x] for name, x in found.items()
    }


def draw(case: Case, seed: int, like: Sequence[Tensor], *, checking: bool = False) -> Given:
    """Random inputs and, where there is a backward, random gradients of results like those."""
    inputs = case.task.inputs(case, seed, checking=checking)
    if case.mode == "forward":
        return Given(inputs)
    for part in leaves(inputs, case.task.differentiable).values():
        for leaf in part:
            leaf.requires_grad_()
    generator = torch.Generator(case.device).manual_seed(seed)
    drawn = (torch.randn(x.shape, generator=generator, device=case.device) for x in like)
    return Given(inputs, tuple(x.to(y.dtype) for x, y in zip(drawn, like, strict=True)))
