"""What is measured: a task at given sizes, in a dtype and mode, by several contestants."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import vd_kernels

MODES = ("forward", "backward", "both")
"""Inference; backward after a forward that is not timed; forward and backward together."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Inputs = dict[str, Any]
"""Keyword arguments of every contestant: tensors, modules, None, or plain numbers."""
Function = Callable[..., tuple[Tensor, ...]]
Context = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Floor:
    """What no implementation can do without."""

    bytes: int
    """Read or written at least once."""
    operations: int = 0
    """Multiplications and additions of matrix products."""


@dataclass(frozen=True)
class Contestant:
    """One way to do a task."""

    name: str
    function: Function
    compiled: bool = False
    """Through torch.compile, as a whole."""
    graphed: bool = False
    """Compiled with CUDA graphs where there is CUDA."""
    ours: bool = False
    context: Context = contextlib.nullcontext
    """What must hold while it runs; entered outside the clock."""
    skipped: str = ""
    """Why it cannot run here; empty when it can."""
    oracle: Function | None = None
    """What it should return, where that is not what the task asks for."""

    def build(self, device: str, backend: str = "inductor") -> Function:
        """The function to call, compiled afresh where it is to be compiled."""
        if not self.compiled:
            return self.function
        mode = None
        if device == "cuda" and backend == "inductor":
            mode = "max-autotune" if self.graphed else "max-autotune-no-cudagraphs"
        return torch.compile(
            self.function, backend=backend, fullgraph=True, dynamic=False, mode=mode
        )


class Task(ABC):
    """Something to compute: its inputs, the truth, the floor, and who can do it."""

    operator: str
    variant: str
    differentiable: tuple[str, ...]
    """Inputs whose gradients count; all parameters of a module among them."""
    small: ClassVar[Mapping[str, int]]
    """Sizes at which everything is checked within moments."""
    slack: float = 4.0
    """Times the error that is allowed of ours, for others' forms: none is to drop out by a hair."""
    split: bool = False
    """Whether to tell the time in linear layers' matrix products from the rest."""

    @abstractmethod
    def inputs(self, case: Case, seed: int, *, checking: bool) -> Inputs:
        """Random inputs on the case's device.

        checking: Add what makes the results of all contestants comparable, e.g. given noise.
        """

    @abstractmethod
    def oracle(self, **inputs: Any) -> tuple[Tensor, ...]:
        """The results in the inputs' precision, by torch's own autograd; the truth in float64."""

    @abstractmethod
    def contestants(self, case: Case) -> list[Contestant]:
        """All that can do it, ours and others."""

    @abstractmethod
    def floor(self, case: Case) -> Floor:
        """What the case cannot do without."""


@dataclass(frozen=True)
class Case:
    """A task at given sizes."""

    task: Task
    sizes: Mapping[str, int]
    dtype: torch.dtype
    mode: str
    device: str = "cpu"
    curve: str = ""
    """The size that grows in the curve this case is a point of; empty when it is of none."""
    repeats: int = 1
    """Calls between two readings of the clock; many where the cost of a call is the question."""

    @property
    def id(self) -> str:
        """Unique among the cases of a device, and the same in every run."""
        sizes = "-".join(f"{name}{size}" for name, size in self.sizes.items())
        task, dtype = self.task, str(self.dtype).removeprefix("torch.")
        point = f"/{self.curve}" * bool(self.curve)
        return f"{task.operator}/{task.variant}/{self.mode}/{dtype}/{sizes}{point}"

    def shrunk(self) -> Case:
        """The same at sizes for a test."""
        return replace(self, sizes=self.task.small, repeats=1)


def spread_over(
    task: Task,
    sizes: Mapping[str, int],
    device: str,
    *,
    modes: Iterable[str] = MODES,
    dtypes: Iterable[str] = tuple(DTYPES),
) -> Iterator[Case]:
    """A case for each mode and dtype."""
    for mode in modes:
        for dtype in dtypes:
            yield Case(task, sizes, DTYPES[dtype], mode, device)


def curve(
    task: Task,
    sizes: Mapping[str, int],
    device: str,
    axis: str,
    values: Iterable[int],
    *,
    mode: str = "forward",
    dtypes: Iterable[str] = ("float32", "bfloat16"),
) -> Iterator[Case]:
    """Cases that differ in one size."""
    for value in values:
        for dtype in dtypes:
            grown = {**sizes, axis: value}
            yield Case(task, grown, DTYPES[dtype], mode, device, curve=axis)


def ours(function: Function) -> list[Contestant]:
    """One contestant for each backend of vd_kernels that can run here."""
    return [
        Contestant(
            backend.name,
            function,
            ours=True,
            context=lambda name=backend.name: vd_kernels.use_backend(name),
        )
        for backend in vd_kernels.explain().backends
        if backend.available and backend.name != "sdpa"  # torch's own, a contestant anyway
    ]


def emulated(dtype: torch.dtype, device: str) -> bool:
    """Whether torch multiplies matrices of a dtype by emulation alone, slowly."""
    features = vd_kernels.explain().cpu_features
    return device == "cpu" and dtype == torch.bfloat16 and "avx512_bf16" not in features


def normal(seed: int, name: str, shape: Iterable[int], case: Case) -> Tensor:
    """Standard normals in the case's dtype on its device; they depend on seed, name and shape."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(case.device).manual_seed(int.from_bytes(digest[:7], "little"))
    drawn = torch.randn(*shape, generator=generator, device=case.device)
    return drawn.to(case.dtype)
