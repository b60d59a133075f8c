"""spacetime_attention in torch.library: schemas, fakes, gradient, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels._checks import empty_like, rows_contiguous
from vd_kernels.spacetime_attention import reference

_AXES = {"time": 0, "space": 1, "joint": 2}
"""As the C++ counts them."""


def _forward_cpp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    out = empty_like(query)
    prefix_out = None
    if prefix_query is not None:
        prefix_out = query.new_empty(_prefix_shape(query, axis, prefix_query))
    torch.ops.vd._spacetime_attention_cpp.default(
        *map(rows_contiguous, (query, key, value)),
        *_cpp_settings(axis, window, grid, causal, key_mask),
        *map(rows_contiguous, (prefix_query, prefix_key, prefix_value, _five_dims(gate))),
        scale,
        out,
        prefix_out,
    )
    return out, prefix_out


def _backward_cpp(
    grad_out: Tensor | None,
    grad_prefix_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    prefixes_and_gate = (prefix_query, prefix_key, prefix_value, gate)
    grads = [
        empty_like(x) if needed else None
        for x, needed in zip((query, key, value), needs[:3], strict=True)
    ]
    # Sums over groups and over what the gate is broadcast along are in float32.
    summed = [
        torch.empty(_five_dims(x).shape) if needed else None
        for x, needed in zip(prefixes_and_gate, needs[3:], strict=True)
    ]
    torch.ops.vd._spacetime_attention_backward_cpp.default(
        *map(rows_contiguous, (grad_out, grad_prefix_out, query, key, value)),
        *_cpp_settings(axis, window, grid, causal, key_mask),
        *map(rows_contiguous, (prefix_query, prefix_key, prefix_value, _five_dims(gate))),
        scale,
        *grads,
        *summed,
    )
    return *grads, *(
        None if grad is None else grad.view(x.shape).to(x.dtype)
        for grad, x in zip(summed, prefixes_and_gate, strict=True)
    )


def _cpp_settings(
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
) -> tuple[Any, ...]:
    mask = None if key_mask is None else key_mask.contiguous()
    return _AXES[axis], list(window or ()), grid[1] if grid else 1, causal, mask


def _five_dims(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 5 else x[(None,) * (5 - x.dim())]


def _prefix_shape(query: Tensor, axis: str, prefix_query: Tensor) -> tuple[int, ...]:
    batch, frames, patches, heads, width = query.shape
    groups = {"time": patches, "space": frames, "joint": 1}[axis]
    return batch, groups, prefix_query.shape[2], heads, width


def _forward_reference(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    out, prefix_out = reference.forward(query, *arguments)
    return out.contiguous(), prefix_out if prefix_out is None else prefix_out.contiguous()


FORWARD: dict[str, Callable] = {
    "cpp": _forward_cpp,
    "triton": backends.triton_function("spacetime_attention", "forward"),
    "reference": _forward_reference,
}
BACKWARD: dict[str, Callable] = {
    "cpp": _backward_cpp,
    "triton": backends.triton_function("spacetime_attention", "backward"),
    "reference": reference.backward,
}
"""By backend, the fastest first."""


def choose(table: dict[str, Callable], query: Tensor) -> Callable:
    """The function of FORWARD or BACKWARD that is to run now."""
    return backends.choose("spacetime_attention", table, query, (query,))


def _forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    run = choose(FORWARD, query)
    out, prefix_out = run(query, *arguments)
    return out, query.new_empty(0) if prefix_out is None else prefix_out


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    if prefix_query is None:
        return out, query.new_empty(0)
    return out, query.new_empty(_prefix_shape(query, axis, prefix_query))


def _backward(
    grad_out: Tensor | None, grad_prefix_out: Tensor | None, query: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    run = choose(BACKWARD, query)
    grads = run(grad_out, grad_prefix_out, query, *arguments)
    return tuple(query.new_empty(0) if g is None else g.contiguous() for g in grads)


def _backward_fake(
    grad_out: Tensor | None,
    grad_prefix_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, prefix_query, prefix_key, prefix_value, gate)
    return tuple(
        x.new_empty(x.shape) if needed else query.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    )


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, str axis, SymInt[]? window, SymInt[]? grid, "
    "bool causal, Tensor? key_mask, Tensor? prefix_query, Tensor? prefix_key, "
    "Tensor? prefix_value, Tensor? gate, float scale"
)
_CPP = _ARGUMENTS.replace("str axis", "int axis").replace(
    "SymInt[]? window, SymInt[]? grid", "int[] window, int columns"
)
_library.define_private(
    f"_spacetime_attention_cpp({_CPP}, Tensor(a!) out, Tensor(b!)? prefix_out) -> ()"
)
_library.define_private(
    f"_spacetime_attention_backward_cpp(Tensor? grad_out, Tensor? grad_prefix_out, {_CPP}, "
    "Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
    "Tensor(d!)? grad_prefix_query, Tensor(e!)? grad_prefix_key, "
    "Tensor(f!)? grad_prefix_value, Tensor(g!)? grad_gate) -> ()"
)
_library.define(
    f"spacetime_attention({_ARGUMENTS}) -> (Tensor, Tensor)", kernel=_forward, fake=_fake
)
_library.define(
    f"spacetime_attention_backward(Tensor? grad_out, Tensor? grad_prefix_out, {_ARGUMENTS}, "
    "bool[7] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
)

_TENSORS = (0, 1, 2, 8, 9, 10, 11)
"""Positions of the arguments that have gradients."""


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *inputs[7:12])
    ctx.settings, ctx.scale = inputs[3:7], inputs[12]


def _gradient(
    ctx: Any, grad_out: Tensor | None, grad_prefix_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, key_mask, *rest = ctx.saved_tensors
    if rest[0] is None:  # prefix_out is an empty tensor that nobody asked for
        grad_prefix_out = None
    needs = [ctx.needs_input_grad[i] for i in _TENSORS]
    found = torch.ops.vd.spacetime_attention_backward(
        grad_out,
        grad_prefix_out,
        query,
        key,
        value,
        *ctx.settings,
        key_mask,
        *rest,
        ctx.scale,
        needs,
    )
    grads: list[Tensor | None] = [None] * 13
    for i, grad, needed in zip(_TENSORS, found, needs, strict=True):
        grads[i] = grad if needed else None
    return tuple(grads)


_library.differentiable("spacetime_attention", _gradient, _setup_context)
_library.once_differentiable("spacetime_attention_backward")
