"""spacetime_attention in torch.library: schemas, fakes, gradient, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels._checks import empty_like, full_precision, rows_contiguous
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
        *map(rows_contiguous, (prefix_query, prefix_key, prefix_value, _narrow_gate(gate))),
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
        x.new_empty(_five_dims(x).shape, dtype=torch.float32) if needed else None
        for x, needed in zip(prefixes_and_gate, needs[3:], strict=True)
    ]
    whole = gate is not None and gate.shape == query.shape and gate.dtype == query.dtype
    whole = whole and gate.shape[-1] > 1  # else it is one number a token
    if summed[3] is not None and whole and grad_out is not None:  # nothing to be summed
        summed[3] = torch.empty_like(summed[3], dtype=gate.dtype)
    torch.ops.vd._spacetime_attention_backward_cpp.default(
        *map(rows_contiguous, (grad_out, grad_prefix_out, query, key, value)),
        *_cpp_settings(axis, window, grid, causal, key_mask),
        *map(rows_contiguous, (prefix_query, prefix_key, prefix_value, _narrow_gate(gate))),
        scale,
        *grads,
        *summed,
    )
    return *grads, *(
        None if grad is None else grad.view(x.shape).to(x.dtype)
        for grad, x in zip(summed, prefixes_and_gate, strict=True)
    )


def _forward_sdpa(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, None]:
    """ "joint" by torch's scaled_dot_product_attention, of [B,T,S,H,D] seen as [B,H,T*S,D].

    Unasked it runs only where a fused kernel takes that view; else a kernel of ours is faster.
    """
    if backends.forced() != "sdpa" and not _is_fused(query, key, value):
        return _without_sdpa(FORWARD, query)(query, key, value, *arguments)
    *_, gate, scale = arguments
    with full_precision(query):
        views = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*views, scale=scale)
        out = out.transpose(1, 2).reshape(query.shape).contiguous()
        return out if gate is None else out.mul_(gate), None


def _is_fused(*tensors: Tensor) -> bool:
    """Whether torch has a fused kernel for query, key and value as they lie.

    In half precision: kernels of ours multiply float32 in full.
    """
    query = tensors[0]
    batch, _, _, heads, width = query.shape
    # Above that, grids and offsets of 32 bits end; and rows are read in vectors of 16 bytes.
    if query.dtype == torch.float32 or max(batch, heads) > 65_535 or query.numel() >= 2**31:
        return False
    if width % 8 or not all(map(_has_joint_view, tensors)):
        return False
    for x in tensors:
        steps = [stride for n, stride in zip(x.shape[:4], x.stride(), strict=False) if n > 1]
        if x.data_ptr() % 16 or any(step % 8 for step in steps):
            return False
    views = [x.flatten(1, 2).transpose(1, 2) for x in tensors]
    call = torch.backends.cuda.SDPAParams(*views, None, 0.0, False, False)
    return any(
        takes(call)
        for takes in (
            torch.backends.cuda.can_use_flash_attention,
            torch.backends.cuda.can_use_efficient_attention,
        )
    )


def _has_joint_view(x: Tensor) -> bool:
    """Whether [B,T,S,H,D] may be seen as [B,T*S,H,D], rows of D being contiguous."""
    _, frames, patches, _, _ = x.shape
    together = 1 in (frames, patches) or x.stride(1) == patches * x.stride(2)
    return together and x.stride(4) == 1


def _backward_without_sdpa(
    grad_out: Tensor | None, grad_prefix_out: Tensor | None, query: Tensor, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """torch's adds up gradients in any order."""
    run = _without_sdpa(BACKWARD, query)
    return run(grad_out, grad_prefix_out, query, *arguments)


def _without_sdpa(table: dict[str, Callable], query: Tensor) -> Callable:
    lacks = {"sdpa": lambda: "left out", "triton": lambda: _too_many(query, "joint")}
    return backends.fastest(table, query, (query,), 0, lacks)


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


def _narrow_gate(gate: Tensor | None) -> Tensor | None:
    """The gate in five dimensions, and of a dtype that the kernels read."""
    gate = _five_dims(gate)
    return gate.float() if gate is not None and gate.dtype == torch.float64 else gate


def _prefix_shape(query: Tensor, axis: str, prefix_query: Tensor) -> tuple[int, ...]:
    batch, frames, patches, heads, width = query.shape
    groups = {"time": patches, "space": frames, "joint": 1}[axis]
    return batch, groups, prefix_query.shape[2], heads, width


def _forward_reference(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    out, prefix_out = reference.forward(query, *arguments)
    return out.contiguous(), prefix_out if prefix_out is None else prefix_out.contiguous()


FORWARD: dict[str, Callable] = {
    "cpp": _forward_cpp,
    "sdpa": _forward_sdpa,
    "triton": backends.triton_function("spacetime_attention", "forward"),
    "reference": _forward_reference,
}
BACKWARD: dict[str, Callable] = {
    "cpp": _backward_cpp,
    "triton": backends.triton_function("spacetime_attention", "backward"),
    "sdpa": _backward_without_sdpa,
    "reference": reference.backward,
}
"""By backend, the fastest first."""


def choose(
    table: dict[str, Callable],
    query: Tensor,
    axis: str,
    window: object,
    key_mask: Tensor | None,
    prefix_key: Tensor | None,
) -> Callable:
    """The function of FORWARD or BACKWARD that is to run now."""

    def sdpa() -> str:
        if axis != "joint":
            return f'it takes axis="joint" alone, got {axis!r}'
        more = {"window": window, "key_mask": key_mask, "prefix_key": prefix_key}
        return next((f"it takes no {name}" for name, x in more.items() if x is not None), "")

    lacks = {"sdpa": sdpa, "triton": lambda: _too_many(query, axis, prefix_key)}
    return backends.choose("spacetime_attention", table, query, (query,), lacks=lacks)


def _too_many(query: Tensor, axis: str, prefix_key: Tensor | None = None) -> str:
    """Why Triton kernels, whose programs have 16 rows at least, cannot take a call; or ""."""
    batch, frames, patches, heads, _ = query.shape
    groups = {"time": patches, "space": frames, "joint": 1}[axis]
    length = frames * patches // max(1, groups) + (0 if prefix_key is None else prefix_key.shape[2])
    programs = batch * groups * heads * -(-length // 16)
    return backends.too_many({"programs": programs, "tokens of a sequence": length})


def _forward(
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
    *others: Any,
) -> tuple[Tensor, Tensor]:
    run = choose(FORWARD, query, axis, window, key_mask, prefix_key)
    settings = axis, window, grid, causal, key_mask
    out, prefix_out = run(query, key, value, *settings, prefix_query, prefix_key, *others)
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
    *others: Any,
) -> tuple[Tensor, ...]:
    run = choose(BACKWARD, query, axis, window, key_mask, prefix_key)
    settings = axis, window, grid, causal, key_mask
    grads = run(
        grad_out, grad_prefix_out, query, key, value, *settings, prefix_query, prefix_key, *others
    )
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
