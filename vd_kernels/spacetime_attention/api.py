"""The public function: what it means, what it takes, what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels._checks import (
    autocast,
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_mask,
    check_number,
    check_same_kind,
    check_shape,
    refuse_forward_mode,
)
from vd_kernels.spacetime_attention import op

AXES = ("time", "space", "joint")


def spacetime_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axis: str,
    window: int | tuple[int, int, int] | None = None,
    grid: tuple[int, int] | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    prefix_query: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention among video tokens, within groups that `axis` names.

    - "time": each patch position attends over its T frames (G = S groups);
    - "space": each frame's patches attend to each other (G = T groups);
    - "joint": all T*S tokens attend to each other (G = 1).

    A row whose keys are all masked gives 0 and sends no gradient, never NaN; what masked keys and
    values hold never matters. There is no attention dropout.

    Args:
        query, key, value: [B,T,S,H,D], float16, bfloat16, float32 or float64, one dtype for all
            three and the prefixes (under autocast they are cast to its dtype). Any strides.
        axis: "time", "space" or "joint".
        window: how far a token sees. "time": frames to either side, an int. "space" and "joint":
            half-widths (t, h, w) in frames and in patches of `grid`; "space" stays in its frame.
        grid: (h, w) with h * w = S, patches row by row; the window of "space" and "joint" needs it.
        causal: a frame sees itself and earlier ones; only with axis "time".
        key_mask: bool [B,T] or [B,T,S], True where a token is real and may be seen.
        prefix_key, prefix_value: [B,G or 1,P,H,D], CLS or message tokens that every token of a
            group sees besides its own group; never masked, outside window and causal order.
        prefix_query: [B,G or 1,P,H,D]: the prefix tokens' own queries, which see the prefix and all
            real tokens of the group. Needs prefix_key and prefix_value.
        gate: broadcastable to [B,T,S,H,D], any floating dtype; multiplies `out` alone. Its
            gradient has its own shape.
        scale: factor on the dot products, D ** -0.5 by default.

    Returns:
        out [B,T,S,H,D] in query's dtype; with prefix_query the pair (out, prefix_out [B,G,P,H,D]).
        Sums and exponentials are in float32, in float64 for float64.

    Raises:
        TypeError: a dtype or type that is not allowed, or dtypes that differ.
        ValueError: a shape, device, word or combination that does not fit.

    Source: divided space-time attention as in TimeSformer (Bertasius et al. 2021,
    arXiv 2102.05095); the gate in the epilogue is VideoDistill's vision refinement
    (arXiv 2404.00973).

    Example:
        >>> import torch
        >>> from vd_kernels import spacetime_attention
        >>> q, k, v = torch.randn(3, 2, 8, 36, 4, 32)
        >>> gate = torch.rand(2, 8, 36, 4, 1)
        >>> spacetime_attention(q, k, v, axis="time", gate=gate).shape
        torch.Size([2, 8, 36, 4, 32])
    """
    prefixes = (prefix_query, prefix_key, prefix_value)
    settings = (axis, window, grid, causal, scale)
    if _library.is_observed(query, key, value, key_mask, *prefixes, gate):
        refuse_forward_mode("spacetime_attention", query, key, value, *prefixes, gate)
        query, key, value, *prefixes = autocast(query, key, value, *prefixes)
        _check(query, key, value, key_mask, gate, *prefixes, *settings)
        run = torch.ops.vd.spacetime_attention.default
    else:
        run = backends.planned(_plan, (query, key, value, key_mask, gate, *prefixes), settings)
    if axis == "time" and window is not None:
        window = (window,)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    out, prefix_out = run(
        query, key, value, axis, window, grid, causal, key_mask, *prefixes, gate, scale
    )
    return out if prefix_query is None else (out, prefix_out)


def _plan(*arguments: Any) -> Callable:
    """What runs, of the arguments that `_check` takes."""
    _check(*arguments)
    query, _, _, key_mask, _, _, prefix_key, _, axis, window, *_ = arguments
    return op.choose(op.FORWARD, query, axis, window, key_mask, prefix_key)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    gate: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    axis: str,
    window: int | tuple[int, int, int] | None,
    grid: tuple[int, int] | None,
    causal: bool,
    scale: float | None,
) -> None:
    _check_tokens(query, key, value, key_mask, gate, scale)
    _check_reach(query, axis, window, grid, causal)
    _check_prefixes(query, axis, prefix_query, prefix_key, prefix_value)


def _check_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    gate: Tensor | None,
    scale: float | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor, "[B,T,S,H,D]")
        check_shape(name, tensor, query.shape, "query's shape [B,T,S,H,D]")
    if query.shape[-1] == 0:
        raise ValueError("query must have a head size D of at least 1, got D = 0")
    check_same_kind(query=query, key=key, value=value)
    if key_mask is not None:
        check_mask("key_mask", key_mask)
        if key_mask.shape not in (query.shape[:2], query.shape[:3]):
            raise ValueError(
                f"key_mask must be [B,T] = {tuple(query.shape[:2])} or [B,T,S] = "
                f"{tuple(query.shape[:3])}, got shape {tuple(key_mask.shape)}"
            )
        check_device("key_mask", key_mask, "query", query)
    if gate is not None:
        check_floating("gate", gate, "[...]")
        if not _broadcasts(gate.shape, query.shape):
            raise ValueError(
                f"gate must be broadcastable to [B,T,S,H,D] = {tuple(query.shape)}, "
                f"got shape {tuple(gate.shape)}"
            )
        check_device("gate", gate, "query", query)
    if scale is not None:
        check_number("scale", scale, minimum=None, exclusive=False)


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    if len(shape) > len(target):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False))


def _check_reach(
    query: Tensor,
    axis: str,
    window: int | tuple[int, int, int] | None,
    grid: tuple[int, int] | None,
    causal: bool,
) -> None:
    check_choice("axis", axis, AXES)
    if causal and axis != "time":
        raise ValueError(f'causal needs axis="time", got axis={axis!r}')
    if window is not None and axis == "time":
        check_integer("window", window, minimum=0)
    elif window is not None:
        _check_integers("window", window, 3, "(t, h, w)", minimum=0)
        if grid is None:
            raise ValueError(f"window with axis={axis!r} needs grid=(h, w), the patches' layout")
    if grid is not None:
        _check_integers("grid", grid, 2, "(h, w)", minimum=1)
        if grid[0] * grid[1] != query.shape[2]:
            raise ValueError(f"grid must have h * w = S = {query.shape[2]}, got {tuple(grid)}")


def _check_integers(name: str, given: object, count: int, dims: str, minimum: int) -> None:
    if not isinstance(given, Sequence) or len(given) != count:
        raise TypeError(f"{name} must be {count} ints {dims}, got {given!r}")
    for item in given:
        check_integer(name, item, minimum=minimum)


def _check_prefixes(
    query: Tensor,
    axis: str,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> None:
    if (prefix_key is None) != (prefix_value is None):
        raise ValueError("prefix_key and prefix_value go together, got only one of them")
    if prefix_key is None:
        if prefix_query is not None:
            raise ValueError("prefix_query needs prefix_key and prefix_value, got neither")
        return
    batch, frames, patches, heads, width = query.shape
    groups = {"time": patches, "space": frames, "joint": 1}[axis]
    names = {"prefix_query": prefix_query, "prefix_key": prefix_key, "prefix_value": prefix_value}
    for name, prefix in names.items():
        if prefix is None:
            continue
        check_floating(name, prefix, "[B,G,P,H,D]")
        given = groups if prefix.shape[1] == groups else 1
        count = prefix_key.shape[2]
        check_shape(name, prefix, (batch, given, count, heads, width), "[B,G or 1,P,H,D]")
    check_same_kind(query=query, **names)
