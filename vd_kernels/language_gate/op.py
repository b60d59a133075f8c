"""language_gate in torch.library: schemas, fakes, gradient, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels._checks import empty_like, rows_contiguous
from vd_kernels.language_gate import reference

_REDUCTIONS = {"softmax": 0, "max": 1, "mean": 2}
"""As the C++ counts them."""


def _forward_cpp(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    out = None if value is None else empty_like(value)
    gate = None
    if need_gate:
        channels = () if gate_value is None else gate_value.shape[3:]
        gate = query.new_empty(*query.shape[:3], *channels)
    torch.ops.vd._language_gate_cpp.default(
        *_cpp_arguments(query, key, value, gate_value, key_mask, bias, scale, reduction), out, gate
    )
    return out, gate


def _backward_cpp(
    grad_out: Tensor | None,
    grad_gate: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    grads = [
        empty_like(x) if needed else None
        for x, needed in zip((query, key, value, gate_value), needs[:4], strict=True)
    ]
    # Sums are in float32.
    grad_bias = bias.new_empty(bias.shape, dtype=torch.float32) if needs[4] else None
    torch.ops.vd._language_gate_backward_cpp.default(
        rows_contiguous(grad_out),
        grad_gate if gate_value is None else rows_contiguous(grad_gate),
        *_cpp_arguments(query, key, value, gate_value, key_mask, bias, scale, reduction),
        *grads,
        grad_bias,
    )
    return *grads, None if grad_bias is None else grad_bias.to(bias.dtype)


def _cpp_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
) -> tuple[Any, ...]:
    return (
        *map(rows_contiguous, (query, key, value, gate_value)),
        None if key_mask is None else key_mask.contiguous(),
        None if bias is None else bias.float().contiguous(),
        scale,
        _REDUCTIONS[reduction],
    )


def _forward_reference(query: Tensor, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    out, gate = reference.forward(query, *arguments)
    return out if out is None else out.contiguous(), gate if gate is None else gate.contiguous()


FORWARD: dict[str, Callable] = {
    "cpp": _forward_cpp,
    "triton": backends.triton_function("language_gate", "forward"),
    "reference": _forward_reference,
}
BACKWARD: dict[str, Callable] = {
    "cpp": _backward_cpp,
    "triton": backends.triton_function("language_gate", "backward"),
    "reference": reference.backward,
}
"""By backend, the fastest first."""


def choose(
    table: dict[str, Callable],
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
) -> Callable:
    """The function of FORWARD or BACKWARD that is to run now."""
    heads = query, value, gate_value
    lacks = {"triton": lambda: backends.too_many(_counts(query, key, gate_value))}
    return backends.choose("language_gate", table, query, heads, lacks=lacks)


def _counts(query: Tensor, key: Tensor, gate_value: Tensor | None) -> dict[str, int]:
    """Of what Triton kernels have a limit: programs have 16 visual tokens at least."""
    batch, length, heads, width = query.shape
    channels = 0 if gate_value is None else gate_value.shape[3]
    question = key.shape[1] * max(width, channels)
    return {
        "programs": batch * heads * max(-(-length // 16), -(-question // 256)),
        "visual tokens": length,
        "numbers of a head's question": question,
    }


def _forward(
    query: Tensor, key: Tensor, value: Tensor | None, gate_value: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    run = choose(FORWARD, query, key, value, gate_value)
    found = run(query, key, value, gate_value, *arguments)
    return tuple(query.new_empty(0) if x is None else x for x in found)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
    need_gate: bool,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(0) if value is None else value.new_empty(value.shape)
    if not need_gate:
        return out, query.new_empty(0)
    channels = () if gate_value is None else gate_value.shape[3:]
    return out, query.new_empty(*query.shape[:3], *channels)


def _backward(
    grad_out: Tensor | None,
    grad_gate: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    run = choose(BACKWARD, query, key, value, gate_value)
    grads = run(
        grad_out, grad_gate, query, key, value, gate_value, key_mask, bias, scale, reduction, needs
    )
    return tuple(query.new_empty(0) if g is None else g.contiguous() for g in grads)


def _backward_fake(
    grad_out: Tensor | None,
    grad_gate: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, gate_value, bias)
    return tuple(
        x.new_empty(x.shape) if needed else query.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    )


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor? value, Tensor? gate_value, Tensor? key_mask, Tensor? bias, "
    "float scale, str reduction"
)
_CPP = _ARGUMENTS.replace("str reduction", "int reduction")
_library.define_private(
    f"_language_gate_cpp({_CPP}, Tensor(a!)? out, Tensor(b!)? gate) -> ()",
)
_library.define_private(
    f"_language_gate_backward_cpp(Tensor? grad_out, Tensor? grad_gate, {_CPP}, "
    "Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
    "Tensor(d!)? grad_gate_value, Tensor(e!)? grad_bias) -> ()"
)
_library.define(
    f"language_gate({_ARGUMENTS}, bool need_gate) -> (Tensor, Tensor)", kernel=_forward, fake=_fake
)
_library.define(
    f"language_gate_backward(Tensor? grad_out, Tensor? grad_gate, {_ARGUMENTS}, bool[5] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.scale, ctx.reduction, need_gate = inputs[6:]
    ctx.returned = (inputs[2] is not None, need_gate)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Results that were not asked for are empty tensors: their gradients say nothing.
    grads = (g if asked else None for g, asked in zip(grads, ctx.returned, strict=True))
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5)]
    found = torch.ops.vd.language_gate_backward(
        *grads, *ctx.saved_tensors, ctx.scale, ctx.reduction, needs
    )
    query, key, value, gate_value, bias = (
        g if needed else None for g, needed in zip(found, needs, strict=True)
    )
    return query, key, value, gate_value, None, bias, None, None, None


_library.differentiable("language_gate", _gradient, _setup_context)
_library.once_differentiable("language_gate_backward")
