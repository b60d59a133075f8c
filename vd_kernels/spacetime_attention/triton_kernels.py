"""spacetime_attention in Triton: sequences of tokens, read where they lie.

A sequence is what one head sees of one group: its P prefix tokens, then its L tokens. Row i is a
prefix token if i < P, else token i - P. They differ in where they lie and in what limits them, not
in how they are computed.

Short sequences: a program takes several whole, with the softmax in registers. Backward recomputes
the weights and has all gradients in one pass.

Longer ones: a program takes a block of queries and goes through the keys tile by tile, with running
maxima and sums. Backward takes two kernels: the first, by blocks of queries, has their gradients,
and writes two numbers for each; the second, by blocks of keys, has the gradients of keys and values
without a sum over programs.

What several groups share (a prefix, a gate) gets its gradient in parts, which are added up in
their order: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vd_kernels import _triton
from vd_kernels._checks import empty_like, rows_contiguous
from vd_kernels._triton import product

# ---------------------------------------------------------------------------------------------
# Parts of kernels. Capital letters are those of the api; a group has L tokens, and there are G of
# them. What belongs together is a tuple:
#   queries, keys, values, grads   tensor and strides [B,T,S,H,D], prefix and strides [B,G,P,H,D]
#   sequence                       b, g, h; scalars, or g and h [TILES,1] of several sequences
#   shape                          L, G, S, H, P
#   reach                          what a token sees, see `_near`
# Strides are in units of UNIT elements, those of key_mask in elements. Rows i of a sequence are
# [ROWS], or [1,ROWS] of several sequences.


_LOG2_E = tl.constexpr(1.4426950408889634)
"""exp2(x log2 e) = exp(x), and takes one instruction."""


@triton.jit
def _token(n, g, per_t, per_s, S, AXIS: tl.constexpr):
    """Where token n of group g lies, at so much for each frame and patch."""
    if AXIS == "time":
        at = n.to(tl.int64) * per_t + g * per_s
    elif AXIS == "space":
        at = g * per_t + n.to(tl.int64) * per_s
    else:
        at = (n // S).to(tl.int64) * per_t + (n % S).to(tl.int64) * per_s
    return at


@triton.jit
def _rows(
    source, sequence, shape, i, inside, d,
    D: tl.constexpr, UNIT: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Rows of a sequence [...,D]; 0 where they are not inside."""
    x, steps, prefix, prefix_steps = source
    x_b, x_t, x_s, x_h = steps
    prefix_b, prefix_g, prefix_p, prefix_h = prefix_steps
    b, g, h = sequence
    _, _, S, _, P = shape
    at = x + (b * x_b + h * x_h + _token(i - P, g, x_t, x_s, S, AXIS)) * UNIT
    if prefix is not None:
        row = b * prefix_b + g * prefix_g + h * prefix_h + i.to(tl.int64) * prefix_p
        at = tl.where(i < P, prefix + row * UNIT, at)
    mask = tl.expand_dims(inside, -1) & (d < D)
    return tl.load(tl.expand_dims(at, -1) + d, mask=mask, other=0.0)


@triton.jit
def _put_rows(
    x, prefix, sequence, shape, i, inside, d, D: tl.constexpr, AXIS: tl.constexpr, values
):
    """Writes rows of a sequence to contiguous tensors [B,T,S,H,D] and [B,G,P,H,D], if not None."""
    b, g, h = sequence
    L, G, S, H, P = shape
    if x is not None:
        at = x + ((b * L * G + _token(i - P, g, S, 1, S, AXIS)) * H + h) * D
        mask = tl.expand_dims(inside & (i >= P), -1) & (d < D)
        tl.store(tl.expand_dims(at, -1) + d, values, mask=mask)
    if prefix is not None:
        at = prefix + (((b * G + g) * P + i) * H + h) * D
        mask = tl.expand_dims(inside & (i < P), -1) & (d < D)
        tl.store(tl.expand_dims(at, -1) + d, values, mask=mask)


@triton.jit
def _gates(
    gate, gate_steps, sequence, shape, i, inside, e,
    E: tl.constexpr, UNIT: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The gate at rows of a sequence [...,E]; 1 at prefix tokens."""
    gate_b, gate_t, gate_s, gate_h = gate_steps
    b, g, h = sequence
    _, _, S, _, P = shape
    at = gate + (b * gate_b + h * gate_h + _token(i - P, g, gate_t, gate_s, S, AXIS)) * UNIT
    mask = tl.expand_dims(inside & (i >= P), -1) & (e < E)
    return tl.load(tl.expand_dims(at, -1) + e, mask=mask, other=1.0).to(tl.float32)


@triton.jit
def _put_gates(
    sums, sequence, shape, i, inside, part, parts, e,
    E: tl.constexpr, COLLAPSED: tl.constexpr, AXIS: tl.constexpr, values,
):  # fmt: skip
    """Writes the gate's gradient, given for each channel.

    To [B,T,S,H,E]; or, where the tokens of a group share a gate, in sums to [B,G,parts,H,E].
    """
    b, g, h = sequence
    _, G, _, H, P = shape
    if E == 1:
        values = tl.sum(values, -1, keep_dims=True)
    if COLLAPSED:
        values = tl.where(tl.expand_dims(inside & (i >= P), -1), values, 0.0)
        at = sums + (((b * G + g) * parts + part) * H + h) * E + e
        tl.store(at, tl.sum(values, -2), mask=(g < G) & (e < E))
    else:
        _put_rows(sums, None, sequence, shape, i, inside, e, E, AXIS, values)


@triton.jit
def _real(key_mask, mask_steps, sequence, shape, j, inside, AXIS: tl.constexpr):
    """Which keys may be seen: prefix tokens, and tokens that are no padding."""
    mask_b, mask_t, mask_s = mask_steps
    b, g, _ = sequence
    _, _, S, _, P = shape
    real = inside
    if key_mask is not None:
        at = key_mask + b * mask_b + _token(j - P, g, mask_t, mask_s, S, AXIS)
        real = inside & ((j < P) | tl.load(at, mask=inside & (j >= P), other=False))
    return real


@triton.jit
def _near(i, j, shape, reach, AXIS: tl.constexpr):
    """Whether query i reaches key j. Prefix tokens reach all and are in everyone's reach.

    n // step is the frame of token n, or for axis "space" its row of patches. It reaches from
    `back` of them behind its own to `ahead` before it, and in a frame so many rows and columns of
    patches to either side.
    """
    step, back, ahead, columns, rows_away, columns_away = reach
    _, _, _, _, P = shape
    n, m = i - P, j - P
    # Bounds for each query, and nothing but comparisons for each pair: there are many of them.
    from_here = n // step * step
    near = (m >= from_here - back * step) & (m < from_here + (ahead + 1) * step)
    if AXIS != "time":
        row, column = n % step // columns, n % step % columns
        other_row, other_column = m % step // columns, m % step % columns
        near &= (other_row >= row - rows_away) & (other_row <= row + rows_away)
        near &= (other_column >= column - columns_away) & (other_column <= column + columns_away)
    return near | (i < P) | (j < P)


@triton.jit
def _span(
    first, start, shape, step, back, ahead,
    LIMITED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What COUNT rows from `first` on reach among the rows from `start` on, in tiles of BLOCK.

    Returns how many tiles of prefix tokens stand apart, from where to where the others go, and the
    number of all tiles.
    """
    L, _, _, _, P = shape
    front, begin, end = 0, start, P + L
    if LIMITED:
        apart = first >= P
        low = tl.maximum((first - P) // step - back, 0) * step + P
        high = ((first - P + COUNT - 1) // step + ahead + 1) * step + P
        front = tl.where(apart, tl.cdiv(P - start, BLOCK), 0)
        begin = tl.where(apart, low, start)
        end = tl.where(apart, tl.minimum(high, P + L), P + L)
    return front, begin, end, front + tl.cdiv(end - begin, BLOCK)


@triton.jit
def _tile(tile, start, front, begin, end, shape, BLOCK: tl.constexpr):
    """Rows of a tile of a span, and which of them are inside."""
    _, _, _, _, P = shape
    first = tl.where(tile < front, start + tile * BLOCK, begin + (tile - front) * BLOCK)
    row = first + tl.arange(0, BLOCK)
    return row, row < tl.where(tile < front, P, end)


@triton.jit
def _whole(
    key_mask, mask_steps, shape, ASKS: tl.constexpr,
    AXIS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sequences of a program, all of one item of the batch, and their rows.

    Of the rows: which there are, which are queries (prefix tokens only if ASKS), and which may be
    seen as keys.
    """
    L, G, _, H, P = shape
    parts = tl.cdiv(G * H, TILES)
    member = tl.program_id(0) % parts * TILES
    i = tl.arange(0, ROWS)
    if TILES > 1:
        member += tl.expand_dims(tl.arange(0, TILES), 1)
        i = tl.expand_dims(i, 0)
    b = (tl.program_id(0) // parts).to(tl.int64)
    sequence = b, (member // H).to(tl.int64), (member % H).to(tl.int64)
    inside = (member < G * H) & (i < P + L)
    asks = inside if ASKS else inside & (i >= P)
    real = _real(key_mask, mask_steps, sequence, shape, i, inside, AXIS)
    return sequence, i, inside, asks, real


@triton.jit
def _zeros(TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a product for all sequences of a program. One alone has all warps for each product."""
    if TILES > 1:
        zeros = tl.zeros([TILES, ROWS, COLUMNS], tl.float32)
    else:
        zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    return zeros


@triton.jit
def _blocks(shape, ASKS: tl.constexpr, BLOCK: tl.constexpr):
    """Into how many blocks a sequence is cut; its prefix tokens count if ASKS."""
    L, _, _, _, P = shape
    return tl.cdiv(P + L if ASKS else L, BLOCK)


@triton.jit
def _block(shape, ASKS: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence and block of a program, the block's first row, its rows, and which there are."""
    L, G, _, H, P = shape
    blocks = _blocks(shape, ASKS, BLOCK)
    program = tl.program_id(0)
    block = program % blocks
    program //= blocks
    sequence = (
        (program // H // G).to(tl.int64), (program // H % G).to(tl.int64),
        (program % H).to(tl.int64),
    )  # fmt: skip
    first = block * BLOCK if ASKS else P + block * BLOCK
    row = first + tl.arange(0, BLOCK)
    return sequence, block, first, row, row < P + L


@triton.jit
def _at_rows(sequence, shape, i):
    """Where rows of a sequence lie in a contiguous tensor [B,G,H,P+L]."""
    b, g, h = sequence
    L, G, _, H, P = shape
    return ((b * G + g) * H + h) * (P + L) + i


@triton.jit
def _finite(top):
    """The largest score, or 0 where nothing is seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _scores(
    a, b, scale, seen, i, j, shape, reach, total,
    LIMITED: tl.constexpr, AXIS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a·b to the base 2 instead of e, for queries i and keys j; -inf where they are not seen."""
    s = product(a, tl.trans(b), total, OPERAND, PRECISION) * (scale * _LOG2_E)
    if LIMITED:
        seen = seen & _near(i, j, shape, reach, AXIS)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _weights(
    q, k, i, real, shape, reach, scale,
    LIMITED: tl.constexpr, AXIS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p [...,ROWS,ROWS] of whole sequences; 0 where nothing is seen."""
    s = _scores(
        q, k, scale, tl.expand_dims(real, -2), tl.expand_dims(i, -1), tl.expand_dims(i, -2),
        shape, reach, _zeros(TILES, ROWS, ROWS), LIMITED, AXIS, OPERAND, PRECISION,
    )  # fmt: skip
    p = tl.exp2(s - _finite(tl.max(s, -1, keep_dims=True)))
    total = tl.sum(p, -1, keep_dims=True)
    return p / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _attend(
    q, first, i, keys, values, key_mask, mask_steps, sequence, shape, reach, scale, d,
    D: tl.constexpr, UNIT: tl.constexpr, AXIS: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_j p_j v_j of a block of queries, and log2 Σ_j exp s_j; 0 where nothing is seen."""
    step, back, ahead, _, _, _ = reach
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    front, begin, end, tiles = _span(
        first, 0, shape, step, back, ahead, LIMITED, BLOCK_Q, BLOCK_K
    )  # fmt: skip
    for tile in range(0, tiles):
        j, inside = _tile(tile, 0, front, begin, end, shape, BLOCK_K)
        real = _real(key_mask, mask_steps, sequence, shape, j, inside, AXIS)
        k = _rows(keys, sequence, shape, j, real, d, D, UNIT, AXIS)
        v = _rows(values, sequence, shape, j, real, d, D, UNIT, AXIS)
        zero = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        s = _scores(
            q, k, scale, real[None, :], i[:, None], j[None, :], shape, reach, zero,
            LIMITED, AXIS, OPERAND, PRECISION,
        )  # fmt: skip
        joint = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp2(top - _finite(joint))
        p = tl.exp2(s - _finite(joint)[:, None])
        total = total * fade + tl.sum(p, 1)
        mixed = product(p, v, mixed * fade[:, None], OPERAND, PRECISION)
        top = joint
    total = tl.where(total == 0.0, 1.0, total)
    return mixed / total[:, None], _finite(top) + tl.log2(total)


_SIZES = [
    *("query_b", "query_t", "query_s", "query_h", "key_b", "key_t", "key_s", "key_h"),
    *("value_b", "value_t", "value_s", "value_h"),
    *("prefix_query_b", "prefix_query_g", "prefix_query_p", "prefix_query_h"),
    *("prefix_key_b", "prefix_key_g", "prefix_key_p", "prefix_key_h"),
    *("prefix_value_b", "prefix_value_g", "prefix_value_p", "prefix_value_h"),
    *("grad_out_b", "grad_out_t", "grad_out_s", "grad_out_h"),
    *("grad_prefix_out_b", "grad_prefix_out_g", "grad_prefix_out_p", "grad_prefix_out_h"),
    *("mask_b", "mask_t", "mask_s", "gate_b", "gate_t", "gate_s", "gate_h"),
    *("L", "G", "S", "H", "P", "step", "back", "ahead", "columns", "rows_away", "columns_away"),
]
"""Not specialised on: one compilation serves all lengths. D is a constant of a model."""


# ---------------------------------------------------------------------------------------------
# Kernels. What is None was not given, or is not wanted. Sizes come one by one: Triton would
# specialise on those in a tuple.


@triton.jit(do_not_specialize=_SIZES)
def short_forward_kernel(
    query, key, value, prefix_query, prefix_key, prefix_value, key_mask, gate, out, prefix_out,
    query_b, query_t, query_s, query_h, key_b, key_t, key_s, key_h,
    value_b, value_t, value_s, value_h,
    prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h,
    prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h,
    prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h,
    mask_b, mask_t, mask_s, gate_b, gate_t, gate_s, gate_h,
    L, G, S, H, P, step, back, ahead, columns, rows_away, columns_away, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, GATE_UNIT: tl.constexpr,
    AXIS: tl.constexpr, LIMITED: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    queries = (
        query, (query_b, query_t, query_s, query_h),
        prefix_query, (prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h),
    )  # fmt: skip
    keys = (
        key, (key_b, key_t, key_s, key_h),
        prefix_key, (prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h),
    )  # fmt: skip
    values = (
        value, (value_b, value_t, value_s, value_h),
        prefix_value, (prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h),
    )  # fmt: skip
    mask_steps, gate_steps = (mask_b, mask_t, mask_s), (gate_b, gate_t, gate_s, gate_h)
    shape = L, G, S, H, P if prefix_key is not None else 0
    reach = step, back, ahead, columns, rows_away, columns_away
    sequence, i, _, asks, real = _whole(
        key_mask, mask_steps, shape, prefix_query is not None, AXIS, TILES, ROWS
    )
    d = tl.arange(0, BLOCK_D)
    q = _rows(queries, sequence, shape, i, asks, d, D, UNIT, AXIS)
    k = _rows(keys, sequence, shape, i, real, d, D, UNIT, AXIS)
    v = _rows(values, sequence, shape, i, real, d, D, UNIT, AXIS)
    scale = tl.cast(scale, tl.float32)
    p = _weights(q, k, i, real, shape, reach, scale, LIMITED, AXIS, TILES, ROWS, OPERAND, PRECISION)
    o = product(p, v, _zeros(TILES, ROWS, BLOCK_D), OPERAND, PRECISION)
    if gate is not None:
        e = tl.arange(0, 1 if E == 1 else BLOCK_D)
        o *= _gates(gate, gate_steps, sequence, shape, i, asks, e, E, GATE_UNIT, AXIS)
    _put_rows(out, prefix_out, sequence, shape, i, asks, d, D, AXIS, o)


@triton.jit(do_not_specialize=_SIZES)
def short_backward_kernel(
    grad_out, grad_prefix_out, query, key, value, prefix_query, prefix_key, prefix_value,
    key_mask, gate,
    grad_query, grad_key, grad_value, prefix_query_sums, prefix_key_sums, prefix_value_sums,
    gate_sums,
    grad_out_b, grad_out_t, grad_out_s, grad_out_h,
    grad_prefix_out_b, grad_prefix_out_g, grad_prefix_out_p, grad_prefix_out_h,
    query_b, query_t, query_s, query_h, key_b, key_t, key_s, key_h,
    value_b, value_t, value_s, value_h,
    prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h,
    prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h,
    prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h,
    mask_b, mask_t, mask_s, gate_b, gate_t, gate_s, gate_h,
    L, G, S, H, P, step, back, ahead, columns, rows_away, columns_away, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, GATE_UNIT: tl.constexpr,
    AXIS: tl.constexpr, LIMITED: tl.constexpr, COLLAPSED: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    GRAD_OPERAND: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    grads = (
        grad_out, (grad_out_b, grad_out_t, grad_out_s, grad_out_h),
        grad_prefix_out,
        (grad_prefix_out_b, grad_prefix_out_g, grad_prefix_out_p, grad_prefix_out_h),
    )  # fmt: skip
    queries = (
        query, (query_b, query_t, query_s, query_h),
        prefix_query, (prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h),
    )  # fmt: skip
    keys = (
        key, (key_b, key_t, key_s, key_h),
        prefix_key, (prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h),
    )  # fmt: skip
    values = (
        value, (value_b, value_t, value_s, value_h),
        prefix_value, (prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h),
    )  # fmt: skip
    mask_steps, gate_steps = (mask_b, mask_t, mask_s), (gate_b, gate_t, gate_s, gate_h)
    shape = L, G, S, H, P if prefix_key is not None else 0
    reach = step, back, ahead, columns, rows_away, columns_away
    sequence, i, inside, asks, real = _whole(
        key_mask, mask_steps, shape, prefix_query is not None, AXIS, TILES, ROWS
    )
    d = tl.arange(0, BLOCK_D)
    q = _rows(queries, sequence, shape, i, asks, d, D, UNIT, AXIS)
    k = _rows(keys, sequence, shape, i, real, d, D, UNIT, AXIS)
    v = _rows(values, sequence, shape, i, real, d, D, UNIT, AXIS)
    grad = _rows(grads, sequence, shape, i, asks, d, D, UNIT, AXIS).to(tl.float32)
    scale = tl.cast(scale, tl.float32)
    p = _weights(q, k, i, real, shape, reach, scale, LIMITED, AXIS, TILES, ROWS, OPERAND, PRECISION)
    zero = _zeros(TILES, ROWS, BLOCK_D)
    if gate is not None:
        e = tl.arange(0, 1 if E == 1 else BLOCK_D)
        if gate_sums is not None:
            o = product(p, v, zero, OPERAND, PRECISION)
            _put_gates(gate_sums, sequence, shape, i, asks, 0, 1, e, E, COLLAPSED, AXIS, grad * o)
        grad *= _gates(gate, gate_steps, sequence, shape, i, asks, e, E, GATE_UNIT, AXIS)
    if grad_value is not None or prefix_value_sums is not None:
        grad_v = product(tl.trans(p), grad, zero, GRAD_OPERAND, GRAD_PRECISION)
        _put_rows(grad_value, prefix_value_sums, sequence, shape, i, inside, d, D, AXIS, grad_v)
    dp = product(grad, tl.trans(v), _zeros(TILES, ROWS, ROWS), GRAD_OPERAND, GRAD_PRECISION)
    ds = p * (dp - tl.sum(p * dp, -1, keep_dims=True)) * scale
    if grad_query is not None or prefix_query_sums is not None:
        grad_q = product(ds, k, zero, GRAD_OPERAND, GRAD_PRECISION)
        _put_rows(grad_query, prefix_query_sums, sequence, shape, i, asks, d, D, AXIS, grad_q)
    if grad_key is not None or prefix_key_sums is not None:
        grad_k = product(tl.trans(ds), q, zero, GRAD_OPERAND, GRAD_PRECISION)
        _put_rows(grad_key, prefix_key_sums, sequence, shape, i, inside, d, D, AXIS, grad_k)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    query, key, value, prefix_query, prefix_key, prefix_value, key_mask, gate, out, prefix_out,
    query_b, query_t, query_s, query_h, key_b, key_t, key_s, key_h,
    value_b, value_t, value_s, value_h,
    prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h,
    prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h,
    prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h,
    mask_b, mask_t, mask_s, gate_b, gate_t, gate_s, gate_h,
    L, G, S, H, P, step, back, ahead, columns, rows_away, columns_away, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, GATE_UNIT: tl.constexpr,
    AXIS: tl.constexpr, LIMITED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    queries = (
        query, (query_b, query_t, query_s, query_h),
        prefix_query, (prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h),
    )  # fmt: skip
    keys = (
        key, (key_b, key_t, key_s, key_h),
        prefix_key, (prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h),
    )  # fmt: skip
    values = (
        value, (value_b, value_t, value_s, value_h),
        prefix_value, (prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h),
    )  # fmt: skip
    mask_steps, gate_steps = (mask_b, mask_t, mask_s), (gate_b, gate_t, gate_s, gate_h)
    shape = L, G, S, H, P if prefix_key is not None else 0
    reach = step, back, ahead, columns, rows_away, columns_away
    sequence, _, first, i, asks = _block(shape, prefix_query is not None, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    q = _rows(queries, sequence, shape, i, asks, d, D, UNIT, AXIS)
    o, _ = _attend(
        q, first, i, keys, values, key_mask, mask_steps, sequence, shape, reach,
        tl.cast(scale, tl.float32), d,
        D, UNIT, AXIS, LIMITED, BLOCK_Q, BLOCK_K, BLOCK_D, OPERAND, PRECISION,
    )  # fmt: skip
    if gate is not None:
        e = tl.arange(0, 1 if E == 1 else BLOCK_D)
        o *= _gates(gate, gate_steps, sequence, shape, i, asks, e, E, GATE_UNIT, AXIS)
    _put_rows(out, prefix_out, sequence, shape, i, asks, d, D, AXIS, o)


@triton.jit(do_not_specialize=_SIZES)
def backward_query_kernel(
    grad_out, grad_prefix_out, query, key, value, prefix_query, prefix_key, prefix_value,
    key_mask, gate, grad_query, prefix_query_sums, gate_sums, levels, means,
    grad_out_b, grad_out_t, grad_out_s, grad_out_h,
    grad_prefix_out_b, grad_prefix_out_g, grad_prefix_out_p, grad_prefix_out_h,
    query_b, query_t, query_s, query_h, key_b, key_t, key_s, key_h,
    value_b, value_t, value_s, value_h,
    prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h,
    prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h,
    prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h,
    mask_b, mask_t, mask_s, gate_b, gate_t, gate_s, gate_h,
    L, G, S, H, P, step, back, ahead, columns, rows_away, columns_away, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, GATE_UNIT: tl.constexpr,
    AXIS: tl.constexpr, LIMITED: tl.constexpr, COLLAPSED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    GRAD_OPERAND: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and gates, and for each query log2 Σ_j exp s_j and Σ_j p_j dL/dp_j."""
    grads = (
        grad_out, (grad_out_b, grad_out_t, grad_out_s, grad_out_h),
        grad_prefix_out,
        (grad_prefix_out_b, grad_prefix_out_g, grad_prefix_out_p, grad_prefix_out_h),
    )  # fmt: skip
    queries = (
        query, (query_b, query_t, query_s, query_h),
        prefix_query, (prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h),
    )  # fmt: skip
    keys = (
        key, (key_b, key_t, key_s, key_h),
        prefix_key, (prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h),
    )  # fmt: skip
    values = (
        value, (value_b, value_t, value_s, value_h),
        prefix_value, (prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h),
    )  # fmt: skip
    mask_steps, gate_steps = (mask_b, mask_t, mask_s), (gate_b, gate_t, gate_s, gate_h)
    shape = L, G, S, H, P if prefix_key is not None else 0
    reach = step, back, ahead, columns, rows_away, columns_away
    sequence, block, first, i, asks = _block(shape, prefix_query is not None, BLOCK_Q)
    scale = tl.cast(scale, tl.float32)
    d = tl.arange(0, BLOCK_D)
    q = _rows(queries, sequence, shape, i, asks, d, D, UNIT, AXIS)
    o, level = _attend(
        q, first, i, keys, values, key_mask, mask_steps, sequence, shape, reach, scale, d,
        D, UNIT, AXIS, LIMITED, BLOCK_Q, BLOCK_K, BLOCK_D, OPERAND, PRECISION,
    )  # fmt: skip
    grad = _rows(grads, sequence, shape, i, asks, d, D, UNIT, AXIS).to(tl.float32)
    if gate is not None:
        e = tl.arange(0, 1 if E == 1 else BLOCK_D)
        if gate_sums is not None:
            parts = _blocks(shape, prefix_query is not None, BLOCK_Q)
            _put_gates(
                gate_sums, sequence, shape, i, asks, block, parts, e, E, COLLAPSED, AXIS, grad * o
            )
        grad *= _gates(gate, gate_steps, sequence, shape, i, asks, e, E, GATE_UNIT, AXIS)
    mean = tl.sum(grad * o, 1)
    at = _at_rows(sequence, shape, i)
    tl.store(levels + at, level, mask=asks)
    tl.store(means + at, mean, mask=asks)
    if grad_query is not None or prefix_query_sums is not None:
        grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        front, begin, end, tiles = _span(
            first, 0, shape, step, back, ahead, LIMITED, BLOCK_Q, BLOCK_K
        )
        for tile in range(0, tiles):
            j, inside = _tile(tile, 0, front, begin, end, shape, BLOCK_K)
            real = _real(key_mask, mask_steps, sequence, shape, j, inside, AXIS)
            k = _rows(keys, sequence, shape, j, real, d, D, UNIT, AXIS)
            v = _rows(values, sequence, shape, j, real, d, D, UNIT, AXIS)
            zero = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            s = _scores(
                q, k, scale, real[None, :], i[:, None], j[None, :], shape, reach, zero,
                LIMITED, AXIS, OPERAND, PRECISION,
            )  # fmt: skip
            dp = product(grad, tl.trans(v), zero, GRAD_OPERAND, GRAD_PRECISION)
            ds = tl.exp2(s - level[:, None]) * (dp - mean[:, None])
            grad_q = product(ds, k, grad_q, GRAD_OPERAND, GRAD_PRECISION)
        grad_q *= scale
        _put_rows(grad_query, prefix_query_sums, sequence, shape, i, asks, d, D, AXIS, grad_q)


@triton.jit(do_not_specialize=_SIZES)
def backward_key_kernel(
    grad_out, grad_prefix_out, query, key, value, prefix_query, prefix_key, prefix_value,
    key_mask, gate, levels, means,
    grad_key, grad_value, prefix_key_sums, prefix_value_sums,
    grad_out_b, grad_out_t, grad_out_s, grad_out_h,
    grad_prefix_out_b, grad_prefix_out_g, grad_prefix_out_p, grad_prefix_out_h,
    query_b, query_t, query_s, query_h, key_b, key_t, key_s, key_h,
    value_b, value_t, value_s, value_h,
    prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h,
    prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h,
    prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h,
    mask_b, mask_t, mask_s, gate_b, gate_t, gate_s, gate_h,
    L, G, S, H, P, step, back, ahead, columns, rows_away, columns_away, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, GATE_UNIT: tl.constexpr,
    AXIS: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    GRAD_OPERAND: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, from what `backward_query_kernel` has written."""
    grads = (
        grad_out, (grad_out_b, grad_out_t, grad_out_s, grad_out_h),
        grad_prefix_out,
        (grad_prefix_out_b, grad_prefix_out_g, grad_prefix_out_p, grad_prefix_out_h),
    )  # fmt: skip
    queries = (
        query, (query_b, query_t, query_s, query_h),
        prefix_query, (prefix_query_b, prefix_query_g, prefix_query_p, prefix_query_h),
    )  # fmt: skip
    keys = (
        key, (key_b, key_t, key_s, key_h),
        prefix_key, (prefix_key_b, prefix_key_g, prefix_key_p, prefix_key_h),
    )  # fmt: skip
    values = (
        value, (value_b, value_t, value_s, value_h),
        prefix_value, (prefix_value_b, prefix_value_g, prefix_value_p, prefix_value_h),
    )  # fmt: skip
    mask_steps, gate_steps = (mask_b, mask_t, mask_s), (gate_b, gate_t, gate_s, gate_h)
    shape = L, G, S, H, P if prefix_key is not None else 0
    reach = step, back, ahead, columns, rows_away, columns_away
    sequence, _, first, j, inside = _block(shape, True, BLOCK_K)
    scale = tl.cast(scale, tl.float32)
    d = tl.arange(0, BLOCK_D)
    real = _real(key_mask, mask_steps, sequence, shape, j, inside, AXIS)
    k = _rows(keys, sequence, shape, j, real, d, D, UNIT, AXIS)
    v = _rows(values, sequence, shape, j, real, d, D, UNIT, AXIS)
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start = 0 if prefix_query is not None else P
    # Who sees these keys: what is behind for the one is ahead for the other.
    front, begin, end, tiles = _span(
        first, start, shape, step, ahead, back, LIMITED, BLOCK_K, BLOCK_Q
    )
    for tile in range(0, tiles):
        i, asks = _tile(tile, start, front, begin, end, shape, BLOCK_Q)
        q = _rows(queries, sequence, shape, i, asks, d, D, UNIT, AXIS)
        grad = _rows(grads, sequence, shape, i, asks, d, D, UNIT, AXIS).to(tl.float32)
        if gate is not None:
            e = tl.arange(0, 1 if E == 1 else BLOCK_D)
            grad *= _gates(gate, gate_steps, sequence, shape, i, asks, e, E, GATE_UNIT, AXIS)
        at = _at_rows(sequence, shape, i)
        level = tl.load(levels + at, mask=asks, other=0.0)
        mean = tl.load(means + at, mask=asks, other=0.0)
        zero = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        s = _scores(
            k, q, scale, real[:, None] & asks[None, :], i[None, :], j[:, None], shape, reach, zero,
            LIMITED, AXIS, OPERAND, PRECISION,
        )  # fmt: skip
        p = tl.exp2(s - level[None, :])
        if grad_value is not None or prefix_value_sums is not None:
            grad_v = product(p, grad, grad_v, GRAD_OPERAND, GRAD_PRECISION)
        if grad_key is not None or prefix_key_sums is not None:
            dp = product(v, tl.trans(grad), zero, GRAD_OPERAND, GRAD_PRECISION)
            ds = p * (dp - mean[None, :])
            grad_k = product(ds, q, grad_k, GRAD_OPERAND, GRAD_PRECISION)
    grad_k *= scale
    _put_rows(grad_key, prefix_key_sums, sequence, shape, j, inside, d, D, AXIS, grad_k)
    _put_rows(grad_value, prefix_value_sums, sequence, shape, j, inside, d, D, AXIS, grad_v)


# ---------------------------------------------------------------------------------------------
# Launches


class Whole(NamedTuple):
    """How short sequences are cut, and what Triton is told."""

    tiles: int
    """Sequences of a program."""
    warps: int
    registers: int = 0
    """Of a thread, at most; see `_triton.registers`."""


class Tiled(NamedTuple):
    """How longer sequences are cut, and what Triton is told."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0
    """As of `Whole`."""


_WHOLE_SM_80 = {
    # (backward, bytes of an element or dtype): size of a head: rows, padded: settings
    (False, 2): {
        16: {16: Whole(4, 4), 32: Whole(4, 4), 64: Whole(1, 4)},
        32: {16: Whole(4, 4), 32: Whole(4, 4), 64: Whole(1, 4)},
        64: {16: Whole(4, 4), 32: Whole(4, 4), 64: Whole(1, 4)},
        128: {16: Whole(4, 4), 32: Whole(1, 4), 64: Whole(1, 8)},
        256: {16: Whole(1, 4), 32: Whole(1, 8)},
    },
    (True, 2): {
        16: {16: Whole(4, 4), 32: Whole(1, 2)},
        32: {16: Whole(4, 4), 32: Whole(1, 2, 168)},
        64: {16: Whole(4, 4), 32: Whole(1, 2)},
        128: {16: Whole(1, 4), 32: Whole(1, 4)},
        256: {16: Whole(1, 8)},
    },
    (False, 4): {
        16: {16: Whole(4, 4), 32: Whole(1, 4)},
        32: {16: Whole(4, 4), 32: Whole(1, 4)},
        64: {16: Whole(4, 4), 32: Whole(1, 4)},
        128: {16: Whole(1, 4), 32: Whole(1, 8)},
        256: {16: Whole(1, 8)},
    },
    (True, 4): {
        16: {16: Whole(1, 4), 32: Whole(1, 8)},
        32: {16: Whole(1, 4), 32: Whole(1, 8)},
        64: {16: Whole(1, 4), 32: Whole(1, 8)},
        128: {16: Whole(1, 8)},
        256: {16: Whole(1, 8)},
    },
}
# Products with a gradient are in tf32, whose operands take twice the registers.
_WHOLE_SM_80[True, torch.float16] = _WHOLE_SM_80[True, 2] | {
    32: {16: Whole(4, 4), 32: Whole(1, 4)},
    64: {16: Whole(4, 4), 32: Whole(1, 4)},
    128: {16: Whole(1, 4), 32: Whole(1, 8)},
}
_TILED_SM_80 = {
    # (kernel, bytes of an element): size of a head: settings, and those of calls with more to them
    ("forward", 2): {
        16: (Tiled(64, 64, 4, 2), Tiled(64, 32, 4, 2)),
        32: (Tiled(64, 64, 4, 2), Tiled(64, 32, 4, 2)),
        64: (Tiled(128, 64, 8, 2), Tiled(64, 32, 4, 2)),
        128: (Tiled(64, 32, 4, 2), Tiled(32, 32, 8, 1, 168)),
        256: (Tiled(32, 32, 8, 1), Tiled(16, 16, 8, 1)),
    },
    ("query", 2): {
        16: (Tiled(64, 64, 4, 2), Tiled(32, 32, 4, 2)),
        32: (Tiled(64, 64, 4, 2), Tiled(32, 32, 4, 2, 200)),
        64: (Tiled(128, 64, 8, 2), Tiled(32, 32, 4, 2)),
        128: (Tiled(32, 32, 8, 1, 168), Tiled(32, 32, 8, 1)),
        256: (Tiled(16, 16, 8, 1), Tiled(16, 16, 8, 1)),
    },
    ("key", 2): {
        16: (Tiled(32, 64, 4, 2), Tiled(32, 32, 8, 1)),
        32: (Tiled(32, 64, 4, 2), Tiled(32, 32, 8, 1)),
        64: (Tiled(32, 64, 8, 2), Tiled(32, 32, 8, 1)),
        128: (Tiled(32, 32, 8, 1), Tiled(16, 32, 8, 1)),
        256: (Tiled(16, 16, 8, 1), Tiled(16, 16, 8, 1)),
    },
    ("forward", 4): {
        16: (Tiled(64, 32, 8, 1), Tiled(32, 32, 8, 1)),
        32: (Tiled(64, 32, 8, 1, 96), Tiled(32, 32, 8, 1, 96)),
        64: (Tiled(64, 32, 8, 1), Tiled(32, 32, 8, 1, 128)),
        128: (Tiled(32, 16, 8, 1), Tiled(32, 16, 8, 1, 128)),
        256: (Tiled(16, 16, 8, 1), Tiled(16, 16, 8, 1)),
    },
    ("query", 4): {
        16: (Tiled(32, 32, 8, 1), Tiled(16, 32, 8, 1)),
        32: (Tiled(32, 32, 8, 1), Tiled(16, 32, 8, 1)),
        64: (Tiled(32, 32, 8, 1), Tiled(16, 32, 8, 1)),
        128: (Tiled(16, 16, 8, 1), Tiled(16, 16, 8, 1)),
        256: (Tiled(16, 16, 8, 1), Tiled(16, 16, 8, 1)),
    },
    ("key", 4): {
        16: (Tiled(32, 32, 4, 1), Tiled(32, 32, 8, 1)),
        32: (Tiled(32, 32, 4, 1), Tiled(32, 32, 8, 1)),
        64: (Tiled(32, 32, 4, 1), Tiled(32, 32, 8, 1)),
        128: (Tiled(16, 32, 8, 1, 128), Tiled(16, 16, 8, 1, 128)),
        256: (Tiled(16, 16, 8, 1), Tiled(16, 16, 8, 1)),
    },
}
_WHOLE_SM_90 = _WHOLE_SM_80 | {
    (True, 2): _WHOLE_SM_80[True, 2] | {64: {16: Whole(4, 4), 32: Whole(1, 2), 64: Whole(1, 8)}},
    (True, torch.float16): _WHOLE_SM_80[True, torch.float16]
    | {64: {16: Whole(4, 4), 32: Whole(1, 4), 64: Whole(1, 8)}},
}
_TILED_SM_90 = _TILED_SM_80 | {
    ("forward", 2): _TILED_SM_80["forward", 2] | {64: (Tiled(128, 64, 8, 2),) * 2},
    ("query", 2): _TILED_SM_80["query", 2] | {64: (Tiled(128, 64, 8, 2), Tiled(64, 32, 4, 2))},
    ("key", 2): _TILED_SM_80["key", 2] | {64: (Tiled(32, 64, 4, 2), Tiled(32, 64, 8, 2))},
    ("forward", 4): _TILED_SM_80["forward", 4] | {128: (Tiled(32, 16, 8, 1),) * 2},
}
# A thread has 512 registers there if its program has 4 warps, and 256 if it has 8.
_WHOLE_GFX942 = _WHOLE_SM_80 | {(True, torch.float16): _WHOLE_SM_80[True, 2]}
_TILED_GFX942 = _TILED_SM_80 | {
    ("query", 2): _TILED_SM_80["query", 2] | {128: (Tiled(32, 32, 8, 1), Tiled(32, 32, 4, 1))},
    ("key", 2): _TILED_SM_80["key", 2]
    | {
        32: (Tiled(32, 64, 4, 2), Tiled(32, 32, 4, 1)),
        64: (Tiled(32, 64, 4, 2), Tiled(32, 32, 4, 1)),
        128: (Tiled(32, 32, 4, 1), Tiled(16, 32, 4, 1)),
    },
}
_WHOLE = {"sm_80": _WHOLE_SM_80, "sm_90": _WHOLE_SM_90, "gfx942": _WHOLE_GFX942}
_TILED = {"sm_80": _TILED_SM_80, "sm_90": _TILED_SM_90, "gfx942": _TILED_GFX942}
"""By architecture; "sm_80" holds for every GPU that is not named. Chosen by what kernels take of a
GPU: as many rows as leave no register spilled."""


def whole(arch: str, dtype: torch.dtype, rows: int, size: int, *, backward: bool) -> Whole | None:
    """Settings for sequences and heads padded to `rows` and `size`; None: they are too long."""
    table = _WHOLE.get(arch, _WHOLE["sm_80"])
    own = (backward, dtype) if (backward, dtype) in table else (backward, dtype.itemsize)
    return table[own][size].get(rows)


def tiled(arch: str, dtype: torch.dtype, size: int, kernel: str, *, laden: bool) -> Tiled:
    """Settings for longer sequences: of "forward", or of backward's "query" and "key".

    laden: Whether a mask, prefix, window, causal order or gates of channels take registers, too.
    """
    return _TILED.get(arch, _TILED["sm_80"])[kernel, dtype.itemsize][size][laden]


class _Call(NamedTuple):
    """What all kernels of one call are given."""

    arch: str
    batch: int
    groups: int
    heads: int
    tokens: int
    """Of one group."""
    prefixes: int
    sizes: tuple[int | float, ...]
    """Strides, `shape`, `reach` and scale."""
    constants: dict[str, Any]
    laden: bool

    @property
    def length(self) -> int:
        return self.prefixes + self.tokens

    @property
    def rows(self) -> int:
        return _triton.padded(self.length)

    @property
    def sequences(self) -> int:
        return self.batch * self.groups * self.heads


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefixes: Sequence[Tensor | None],
    gate: Tensor | None,
    scale: float,
    unit: int,
) -> _Call:
    B, T, S, H, D = query.shape
    L, G = {"time": (T, S), "space": (S, T), "joint": (T * S, 1)}[axis]
    P = 0 if prefixes[1] is None else prefixes[1].shape[2]
    gate_unit = 1 if gate is None else _triton.unit(gate)
    sizes = (
        *(step for x in (query, key, value, *prefixes) for step in _steps(x, unit)),
        *((0, 0, 0) if key_mask is None else (*key_mask.stride(), 0)[:3]),
        *_steps(gate, gate_unit),
        *(L, G, max(1, S), H, P),
        *_reach(axis, window, grid, causal, T, S),
        scale,
    )
    constants = {
        "D": D,
        "E": 1 if gate is None else gate.shape[4],
        "UNIT": unit,
        "GATE_UNIT": gate_unit,
        "AXIS": axis,
        "LIMITED": causal or window is not None,
        "BLOCK_D": _triton.padded(D),
    }
    laden = constants["LIMITED"] or key_mask is not None or P > 0 or constants["E"] > 1
    arch = _triton.architecture(query.device)
    return _Call(arch, B, G, H, L, P, sizes, constants, laden)


def _steps(x: Tensor | None, unit: int) -> tuple[int, ...]:
    """Strides in units, 0 where a dimension has one element that may serve for many."""
    if x is None:
        return (0, 0, 0, 0)
    return tuple(
        0 if size == 1 else stride // unit
        for size, stride in zip(x.shape[:4], x.stride(), strict=False)
    )


def _reach(
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    frames: int,
    patches: int,
) -> tuple[int, ...]:
    """As `_near` has it. A window may be as wide as an int can tell: it is cut to what there is,
    so that `_near` stays within 32 bits."""
    if axis == "time":
        back = frames if window is None else min(window[0], frames)
        return 1, back, 0 if causal else back, 1, 0, 0
    t, h, w = (frames, patches, patches) if window is None else window
    rows, columns = (patches, 1) if grid is None else grid
    h, w = min(h, rows), min(w, columns)
    if axis == "space":
        return columns, h, h, columns, 0, w
    return max(1, patches), min(t, frames), min(t, frames), columns, h, w


def _operands(dtype: torch.dtype, arch: str, *, backward: bool) -> dict[str, Any]:
    given = _triton.operands(dtype, arch)
    return {name: x for name, x in given.items() if backward or not name.startswith("GRAD")}


def _five_dims(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 5 else x[(None,) * (5 - x.dim())]


def forward(
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
    """As `reference.forward`."""
    rows = query, key, value, prefix_query, prefix_key, prefix_value
    query, key, value, *prefixes = rows = [*map(rows_contiguous, rows)]
    gate = rows_contiguous(_five_dims(gate))
    unit = _triton.unit(*rows)
    call = _call(
        query, key, value, axis, window, grid, causal, key_mask, prefixes, gate, scale, unit
    )
    out, prefix_out = empty_like(query), None
    if prefix_query is not None:
        shape = call.batch, call.groups, call.prefixes, call.heads, query.shape[4]
        prefix_out = query.new_empty(shape)
    tensors = *rows, key_mask, gate, out, prefix_out
    arch, size = call.arch, call.constants["BLOCK_D"]
    constants = call.constants | _operands(query.dtype, arch, backward=False)
    cut = whole(arch, query.dtype, call.rows, size, backward=False)
    if cut is not None:
        _launch_whole(short_forward_kernel, cut, call, tensors, call.sizes, constants)
    else:
        cut = tiled(arch, query.dtype, size, "forward", laden=call.laden)
        rows_each = call.length if prefix_query is not None else call.tokens
        blocks = triton.cdiv(rows_each, cut.queries)
        _launch_tiled(forward_kernel, cut, call, blocks, tensors, call.sizes, constants)
    return out, prefix_out


def _launch_whole(
    kernel: Any,
    cut: Whole,
    call: _Call,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[Any],
    constants: dict[str, Any],
) -> None:
    _triton.launch(
        kernel,
        call.batch * triton.cdiv(call.groups * call.heads, cut.tiles),
        *tensors,
        *sizes,
        **constants,
        TILES=cut.tiles,
        ROWS=call.rows,
        num_warps=cut.warps,
        num_stages=1,
        **_triton.registers(call.arch, cut.registers),
    )


def _launch_tiled(
    kernel: Any,
    cut: Tiled,
    call: _Call,
    blocks: int,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[Any],
    constants: dict[str, Any],
) -> None:
    _triton.launch(
        kernel,
        call.sequences * blocks,
        *tensors,
        *sizes,
        **constants,
        BLOCK_Q=cut.queries,
        BLOCK_K=cut.keys,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **_triton.registers(call.arch, cut.registers),
    )


def backward(
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
    """As `reference.backward`."""
    grad_out = _no_gradient(query) if grad_out is None else grad_out
    if prefix_query is not None and grad_prefix_out is None:
        grad_prefix_out = _no_gradient(prefix_query)
    rows = (
        grad_out, grad_prefix_out, query, key, value, prefix_query, prefix_key, prefix_value
    )  # fmt: skip
    grad_out, grad_prefix_out, query, key, value, *prefixes = rows = [*map(rows_contiguous, rows)]
    five = rows_contiguous(_five_dims(gate))
    unit = _triton.unit(*rows)
    call = _call(
        query, key, value, axis, window, grid, causal, key_mask, prefixes, five, scale, unit
    )
    arch, size = call.arch, call.constants["BLOCK_D"]
    constants = call.constants | _operands(query.dtype, arch, backward=True)
    cut = whole(arch, query.dtype, call.rows, size, backward=True)
    sizes = *_steps(grad_out, unit), *_steps(grad_prefix_out, unit), *call.sizes
    if cut is None:
        cut_q, cut_k = (
            tiled(arch, query.dtype, size, kernel, laden=call.laden) for kernel in ("query", "key")
        )
        rows_each = call.length if prefix_query is not None else call.tokens
        blocks = triton.cdiv(rows_each, cut_q.queries)

    grads = [
        empty_like(x) if needed else None
        for x, needed in zip((query, key, value), needs[:3], strict=True)
    ]
    sums = [
        _prefix_sums(x, call) if needed else None
        for x, needed in zip(prefixes, needs[3:6], strict=True)
    ]
    collapsed = needs[6] and _is_shared(five, axis) and call.tokens > 1
    gate_sums = None
    if needs[6]:
        gate_sums = _gate_sums(five, query, call, blocks if cut is None else 1, collapsed)
    gated = constants | {"COLLAPSED": collapsed}
    shared = *rows, key_mask, five
    if cut is not None:
        tensors = *shared, *grads, *sums, gate_sums
        _launch_whole(short_backward_kernel, cut, call, tensors, sizes, gated)
    else:
        each_row = call.batch, call.groups, call.heads, call.length
        levels, means = query.new_empty(2, *each_row, dtype=torch.float32)
        tensors = *shared, grads[0], sums[0], gate_sums, levels, means
        _launch_tiled(backward_query_kernel, cut_q, call, blocks, tensors, sizes, gated)
        if any((*needs[1:3], *needs[4:6])):
            tensors = *shared, levels, means, *grads[1:], *sums[1:]
            blocks = triton.cdiv(call.length, cut_k.keys)
            _launch_tiled(backward_key_kernel, cut_k, call, blocks, tensors, sizes, constants)
    if gate_sums is not None:
        if collapsed:  # to [B,T,S,H,E] with T = 1 or S = 1
            gate_sums = gate_sums.sum(2).unsqueeze(2 if axis == "space" else 1)
        gate_sums = gate_sums.sum_to_size(five.shape).view(gate.shape).to(gate.dtype)
    return *grads, *map(_over_groups, sums, prefixes), gate_sums


def _no_gradient(like: Tensor) -> Tensor:
    """Zeros in the shape of a tensor, of which one row is in memory."""
    return like.new_zeros(like.shape[-1]).expand(like.shape)


def _prefix_sums(prefix: Tensor, call: _Call) -> Tensor:
    """Room for a prefix' gradient; where groups share it, in float32 for each of them."""
    if prefix.shape[1] == call.groups:
        return empty_like(prefix)
    shape = call.batch, call.groups, *prefix.shape[2:]
    return prefix.new_empty(shape, dtype=torch.float32)


def _over_groups(sums: Tensor | None, prefix: Tensor | None) -> Tensor | None:
    if sums is None or sums.shape == prefix.shape:
        return sums
    return sums.sum(1, keepdim=True).to(prefix.dtype)


def _is_shared(gate: Tensor, axis: str) -> bool:
    """Whether the tokens of a group share a gate."""
    _, frames, patches, _, _ = gate.shape
    return (axis == "space" or frames == 1) and (axis == "time" or patches == 1)


def _gate_sums(gate: Tensor, query: Tensor, call: _Call, parts: int, collapsed: bool) -> Tensor:
    """Room for the gate's gradient; where tokens share it, in float32 for each of them or group."""
    shape = *query.shape[:4], gate.shape[4]
    if gate.shape == shape:
        return empty_like(gate)
    if collapsed:
        shape = call.batch, call.groups, parts, call.heads, gate.shape[4]
    return gate.new_empty(shape, dtype=torch.float32)
