"""What the whole head should take of an H200: composed, not measured.

    python -m benchmarks.expected                    a line for each case
    python -m benchmarks.expected docs/kernels.md    the same, written into that document

The model runs on tensors without data, and all that it asks of torch is noted. Kernels of ours take
what `vd_kernels.expected` expects of them. Torch's are not compiled here, and go by rates alone: a
product of matrices takes its operations at the rate of the tensor cores, or its bytes at the
memory's bandwidth, whichever is longer; anything else its bytes, as each operation reads what it is
given and writes what it returns. Gaps between kernels and the L2 cache are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import head
from benchmarks.cases import Case
from benchmarks.goals import goals
from vd_kernels import _triton, expected
from vd_kernels import compile_kernels as compiling
from vd_kernels._triton import Launch
from vd_kernels.language_gate import triton_kernels as language_gate
from vd_kernels.spacetime_attention import triton_kernels as spacetime_attention
from vd_kernels.topk_sampling import api
from vd_kernels.topk_sampling import triton_kernels as topk_sampling

FULL = expected.MULTIPROCESSORS * 128 * 2 * expected.CLOCK
"""Operations a second of products in float32, which tensor cores do not form."""
_FREE = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "empty", "empty_like"}
"""Operations besides views that move nothing."""


class Bound(NamedTuple):
    """Of an operation of torch, in microseconds."""

    operations: float
    memory: float

    @property
    def time(self) -> float:
        return max(self)


class Trace(TorchDispatchMode):
    """Notes what is asked of torch while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.products: list[Bound] = []
        self.rest: list[Bound] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.namespace == "vd":
            with _triton.recorded(expected.ARCH) as launches:
                _of_ours(function.__name__.partition(".")[0])(*args, **kwargs)
            self.launches += launches
        elif function.overloadpacket in flop_registry:
            work = flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
            rate = expected.OPERATIONS if out.dtype == torch.bfloat16 else FULL
            self.products.append(Bound(work / rate * 1e6, _moving(args, kwargs, out)))
        elif _moves(function):
            self.rest.append(Bound(0.0, _moving(args, kwargs, out)))
        return out


def _of_ours(name: str) -> Any:
    """The function that launches the kernels of vd::<name>."""
    operators = {"language_gate": language_gate, "spacetime_attention": spacetime_attention}
    for operator, module in operators.items():
        if name.startswith(operator):
            return module.backward if name.endswith("_backward") else module.forward
    return getattr(topk_sampling, name.removeprefix("topk_"))


def _moves(function: Any) -> bool:
    """Whether an operation is one on numbers: not a view, nor a question about a tensor."""
    name = function.overloadpacket.__name__
    return function.namespace == "aten" and not function.is_view and name not in _FREE


def _moving(*trees: Any) -> float:
    """Microseconds for the bytes of all tensors, of expanded ones those that are there."""
    total = 0
    for x in tree_leaves(trees):
        if isinstance(x, Tensor):
            there = x.element_size()
            for size, stride in zip(x.shape, x.stride(), strict=True):
                there *= size if stride or not size else 1
            total += there
    return total / expected.BANDWIDTH * 1e6


def cases() -> Iterator[Case]:
    """Of the head, those that a goal is for."""
    wanted = goals("cuda")
    yield from (case for case in head.cases("cuda") if case.id in wanted)


def traced(case: Case) -> Trace:
    training = case.mode == "both"
    # Sizes and no memory; on the CPU, as autocast asks for a device that is there.
    with FakeTensorMode(), mock.patch.object(api, "may_read_values", lambda tensor: False):
        inputs = _inputs(case)
        model = inputs["model"]
        with Trace() as trace, torch.set_grad_enabled(training):
            out = head.step(**inputs)
            if training:
                torch.autograd.grad(out, list(model.parameters()), allow_unused=True)
    return trace


def _inputs(case: Case) -> dict[str, Any]:
    b, n, s, m = (case.sizes[name] for name in "BNSM")
    config = head.VideoDistillConfig(sigma=head.topk_sampling.SIGMA)
    model = head.VideoDistill(config).train(case.mode == "both")
    if case.mode == "forward":
        _keep_for_products(model)
    return {
        "model": model,
        "frame_embed": torch.empty(b, n, config.embed_dim),
        "patches": torch.empty(b, n, s, config.patch_dim),
        "text_embed": torch.empty(b, config.embed_dim),
        "tokens": torch.empty(b, m, config.token_dim),
        "token_mask": torch.empty(b, m, dtype=torch.bool),
        "choice_embed": torch.empty(b, head.CHOICES, config.embed_dim),
        "target": torch.empty(b, dtype=torch.int64),
        "seed": None,
        "score_bias": None,
        "bf16": True,
    }


def _keep_for_products(model: nn.Module) -> None:
    """As `videodistill.precision` does it, which swaps memory that is not there."""
    for layer in (x for x in model.modules() if isinstance(x, nn.Linear)):
        for name, x in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(x.detach().bfloat16()))


class Composed(NamedTuple):
    """In microseconds."""

    kernels: int
    ours: float
    products: float
    rest: float

    @property
    def together(self) -> float:
        return self.ours + self.products + self.rest


def compose(case: Case) -> Composed:
    trace = traced(case)
    held = expected.HELD if case.mode == "both" else 1  # inference chooses one frame for a slot
    ours, known = 0.0, {}
    for launch in trace.launches:
        code, options = compiling.source(launch)
        sizes = [x for x in launch.arguments if not isinstance(x, Tensor)]
        key = code.hash(), str(options), launch.programs, str(sizes), expected.moved(launch, held)
        if key not in known:
            known[key] = expected.expect_launch(launch, held).expected
        ours += known[key]
    return Composed(
        len(trace.launches) + len(trace.products) + len(trace.rest),
        ours,
        sum(x.time for x in trace.products),
        sum(x.time for x in trace.rest),
    )


def table() -> Iterator[str]:
    yield f"{expected.compiler(next(expected.cases()))}"
    yield ""
    yield "| case | kernels | ours | products | the rest | together |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    yield from (row(case, compose(case)) for case in cases())


def row(case: Case, x: Composed) -> str:
    times = " | ".join(f"{time:.0f}" for time in (*x[1:], x.together))
    mode = {"forward": "inference", "both": "training step"}[case.mode]
    return f"| head B{case.sizes['B']} {mode} | {x.kernels} | {times} |"


def main(arguments: list[str]) -> int:
    if arguments and not Path(arguments[0]).is_file():
        print(f"{arguments[0]} is no page to write the table into", file=sys.stderr)
        return 2
    if arguments:
        compiling.write(Path(arguments[0]), "head", table())
    else:
        print(*table(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
