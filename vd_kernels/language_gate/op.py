"""language_gate in torch.library: schemas, fakes, gradient, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels.language_gate import reference

FORWARD: dict[str, Callable] = {"reference": reference.forward}
BACKWARD: dict[str, Callable] = {"reference": reference.backward}
"""By backend, the fastest first."""


def _forward(
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
    run = backends.choose("language_gate", FORWARD)
    out, gate = run(query, key, value, gate_value, key_mask, bias, scale, reduction)
    out = query.new_empty(0) if out is None else out.contiguous()
    return out, gate.contiguous() if need_gate else query.new_empty(0)


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
    run = backends.choose("language_gate", BACKWARD)
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
