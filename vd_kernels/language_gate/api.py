"""The public function: what it means, what it takes, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels._checks import (
    autocast,
    check_choice,
    check_device,
    check_floating,
    check_mask,
    check_number,
    check_same_kind,
    check_shape,
    refuse_forward_mode,
)
from vd_kernels.language_gate import op

REDUCTIONS = ("softmax", "max", "mean")


def language_gate(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    gate_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "softmax",
    return_gate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale visual values by how much each visual token answers to the question.

    Where cross-attention adds language to vision, this gate only multiplies: with
    s_ij = scale * query_i . key_j over the real question tokens j and p = softmax_j(s),

    - scalar gate, one per token and head: g_i = sigmoid(r_i + bias_h), where r_i is
      sum_j p_ij s_ij (`"softmax"`), max_j s_ij (`"max"`; among equals the lowest j takes the
      gradient) or the mean of s_ij over the real j (`"mean"`);
    - channel gate, with `gate_value`: g_i = sigmoid(sum_j p_ij gate_value_j + bias_h).

    The result is g * value: zero values stay zero whatever the question, 0 <= g <= 1, and the
    scalar gate scales all channels of a head alike. A question without a real token has r = 0, so
    g = sigmoid(bias), and sends no gradient to query or key. What padding holds never matters.

    Args:
        query: visual tokens [B,L,H,D], float16, bfloat16, float32 or float64.
        key: question tokens [B,M,H,D].
        value: visual values [B,L,H,Dv] to be scaled; None asks for the gate alone.
        gate_value: [B,M,H,Dv], makes the gate per channel; only with `reduction="softmax"`.
        key_mask: bool [B,M], True where a question token is real; None: all are.
        bias: [H], or [H,Dv] with `gate_value`; any floating dtype.
        scale: factor on the dot products, D ** -0.5 by default.
        reduction: "softmax", "max" or "mean".
        return_gate: also return the gate.

    query, key, value and gate_value share one dtype (under autocast they are cast to its dtype);
    sums and exponentials are in float32, in float64 for float64.

    Returns:
        g * value in value's dtype, [B,L,H,Dv]; with `return_gate` the pair (g * value, g); without
        `value` g alone. g is [B,L,H], or [B,L,H,Dv] with `gate_value`, in query's dtype.

    Raises:
        TypeError: a dtype that is not allowed or differs from query's.
        ValueError: a shape, device or word that does not fit, or `gate_value` with another
            reduction than "softmax".

    Source: the language-aware gate of VideoDistill (arXiv 2404.00973), whose abstract gives the
    idea; the formulas are this project's.

    Example:
        >>> import torch
        >>> from vd_kernels import language_gate
        >>> patches, words = torch.randn(2, 36, 4, 32), torch.randn(2, 7, 4, 32)
        >>> gated, gate = language_gate(patches, words, patches, return_gate=True)
        >>> gated.shape, gate.shape
        (torch.Size([2, 36, 4, 32]), torch.Size([2, 36, 4]))
    """
    settings = (scale, reduction)
    if _library.is_observed(query, key, value, gate_value, key_mask, bias):
        refuse_forward_mode("language_gate", query, key, value, gate_value, bias)
        query, key, value, gate_value = autocast(query, key, value, gate_value)
        _check(query, key, value, gate_value, key_mask, bias, *settings)
        run = torch.ops.vd.language_gate.default
    else:
        run = backends.planned(_plan, (query, key, value, gate_value, key_mask, bias), settings)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    need_gate = return_gate or value is None
    gated, gate = run(query, key, value, gate_value, key_mask, bias, scale, reduction, need_gate)
    if value is None:
        return gate
    return (gated, gate) if return_gate else gated


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    *others: Any,
) -> Callable:
    """What runs, of checked arguments."""
    _check(query, key, value, gate_value, *others)
    return op.choose(op.FORWARD, query, key, value, gate_value)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    reduction: str,
) -> None:
    check_floating("query", query, "[B,L,H,D]")
    check_floating("key", key, "[B,M,H,D]")
    batch, length, heads, width = query.shape
    tokens = key.shape[1]
    if width == 0:
        raise ValueError("query must have a head size D of at least 1, got D = 0")
    check_shape("key", key, (batch, tokens, heads, width), "[B,M,H,D]")
    if value is not None:
        check_floating("value", value, "[B,L,H,Dv]")
        check_shape("value", value, (batch, length, heads, value.shape[-1]), "[B,L,H,Dv]")
    check_choice("reduction", reduction, REDUCTIONS)
    if gate_value is not None:
        check_floating("gate_value", gate_value, "[B,M,H,Dv]")
        channels = gate_value.shape[-1] if value is None else value.shape[-1]
        check_shape("gate_value", gate_value, (batch, tokens, heads, channels), "[B,M,H,Dv]")
        if reduction != "softmax":
            raise ValueError(f'gate_value needs reduction="softmax", got reduction={reduction!r}')
    check_same_kind(query=query, key=key, value=value, gate_value=gate_value)
    if key_mask is not None:
        check_mask("key_mask", key_mask)
        check_shape("key_mask", key_mask, (batch, tokens), "[B,M]")
        check_device("key_mask", key_mask, "query", query)
    if bias is not None:
        dims = "[H]" if gate_value is None else "[H,Dv]"
        expected = (heads,) if gate_value is None else (heads, gate_value.shape[-1])
        check_floating("bias", bias, dims)
        check_shape("bias", bias, expected, dims)
        check_device("bias", bias, "query", query)
    if scale is not None:
        check_number("scale", scale, minimum=None, exclusive=False)
