"""language_gate in Triton: one pass over the visual tokens with the question on chip.

A program has one question and one head, and goes through a chunk of the L visual tokens in blocks
of BLOCK_L. The question's tokens stay on chip all the while if they fit in one tile of BLOCK_M;
else each block goes through them tile by tile, with running maxima and sums.

Backward recomputes scores and gates. What a chunk adds to the gradients of key, gate_value and bias
is summed where it is computed and goes to memory in float32; a second kernel adds up the chunks, in
their order. The division into chunks depends on shapes and the architecture alone: so the same
inputs give the same bits.
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
# Parts of kernels. D and E are the sizes of a head of query and of value, the other letters those
# of the api. x_b, x_l, x_m and x_h are strides in units of UNIT elements (in elements of key_mask
# and of a gradient [B,L,H]); `question` holds what is constant about it.


@triton.jit
def _rows(x, row, stride, inside, column, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Rows of a tensor [rows, columns]; 0 where a row is not inside and past its width."""
    at = x + row.to(tl.int64)[:, None] * stride * UNIT + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _put_rows(x, row, stride, inside, column, WIDTH: tl.constexpr, values):
    """Writes what `_rows` would read with a unit of WIDTH: tensors [..., H, WIDTH] in one piece."""
    at = x + row.to(tl.int64)[:, None] * stride * WIDTH + column[None, :]
    tl.store(at, values, mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _real(token, key_mask, mask_m, M):
    """Which tokens of the question are real."""
    real = token < M
    if key_mask is not None:
        real &= tl.load(key_mask + token.to(tl.int64) * mask_m, mask=real, other=False)
    return real


@triton.jit
def _question(
    first, question, d, e,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of the question: its tokens, which are real, keys and gate values; 0 at padding."""
    key, key_m, gate_value, gate_value_m, key_mask, mask_m, M = question
    token = first + tl.arange(0, BLOCK_M)
    real = _real(token, key_mask, mask_m, M)
    k = _rows(key, token, key_m, real, d, D, UNIT)
    u = k
    if gate_value is not None:
        u = _rows(gate_value, token, gate_value_m, real, e, E, UNIT)
    return token, real, k, u


@triton.jit
def _finite(top):
    """The largest score, or 0 where no token is real."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _look(
    q, whole, question, d, e, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, REDUCTION: tl.constexpr,
    ONE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of visual tokens finds in the question, which is `whole` if it is one tile.

    Returns for each row: the largest score; Σ_j exp(s_j - largest), or of a mean the number of
    real tokens; r; for "max" the first token with the largest score; for gates per channel
    Σ_j p_j u_j.
    """
    _, _, gate_value, _, _, _, M = question
    top = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    pull = tl.zeros([BLOCK_L], tl.float32)
    best = tl.full([BLOCK_L], -1, tl.int32)
    mixed = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, BLOCK_M if ONE else M, BLOCK_M):
        if ONE:
            token, real, k, u = whole
        else:
            token, real, k, u = _question(first, question, d, e, D, E, UNIT, BLOCK_M)
        zero = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
        s = product(q, tl.trans(k), zero, OPERAND, PRECISION) * scale
        if REDUCTION == "mean":
            pull += tl.sum(s, 1)  # padding adds 0
            count += real.to(tl.int32)
        else:
            seen = tl.where(real[None, :], s, float("-inf"))
            largest = tl.max(seen, 1)
            if REDUCTION == "max":
                at = tl.min(tl.where(seen == largest[:, None], token[None, :], M), 1)
                best = tl.where(largest > top, at, best)
                top = tl.maximum(top, largest)
            else:
                joint = tl.maximum(top, largest)
                fade = tl.exp(top - _finite(joint))
                p = tl.exp(seen - _finite(joint)[:, None])
                total = total * fade + tl.sum(p, 1)
                pull = pull * fade + tl.sum(p * s, 1)
                if gate_value is not None:
                    mixed = product(p, u, mixed * fade[:, None], OPERAND, PRECISION)
                top = joint
    total = tl.where(total == 0.0, 1.0, total)
    if REDUCTION == "max":
        pull = _finite(top)
    elif REDUCTION == "mean":
        total = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
        pull = pull / total
    else:
        pull = pull / total
        mixed = mixed / total[:, None]
    return top, total, pull, best, mixed


@triton.jit
def _place(L, H, blocks, BLOCK_L: tl.constexpr):
    """Question, head, and blocks [begin, end) of this program. Heads lie side by side in memory."""
    program = tl.program_id(0)
    all_blocks = tl.cdiv(L, BLOCK_L)
    chunks = tl.maximum(tl.cdiv(all_blocks, blocks), 1)
    b = (program // (H * chunks)).to(tl.int64)
    h = (program % H).to(tl.int64)
    begin = program // H % chunks * blocks
    return b, h, begin, tl.minimum(begin + blocks, all_blocks)


_SIZES = [
    *("query_b", "query_l", "query_h", "key_b", "key_m", "key_h", "value_b", "value_l", "value_h"),
    *("gate_value_b", "gate_value_m", "gate_value_h", "mask_b", "mask_m"),
    *("grad_out_b", "grad_out_l", "grad_out_h", "grad_gate_b", "grad_gate_l", "grad_gate_h"),
    *("L", "M", "H", "blocks", "chunks"),
]
"""Not specialised on: one compilation serves all lengths. D and E are constants of a model."""


# ---------------------------------------------------------------------------------------------
# Kernels. What is None was not given, or is not wanted.


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    query, key, value, gate_value, key_mask, bias, out, gate,
    query_b, query_l, query_h, key_b, key_m, key_h, value_b, value_l, value_h,
    gate_value_b, gate_value_m, gate_value_h, mask_b, mask_m,
    L, M, H, blocks, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, REDUCTION: tl.constexpr,
    ONE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, begin, end = _place(L, H, blocks, BLOCK_L)
    scale = tl.cast(scale, tl.float32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    query += (b * query_b + h * query_h) * UNIT
    key += (b * key_b + h * key_h) * UNIT
    shift = 0.0
    if gate_value is not None:
        gate_value += (b * gate_value_b + h * gate_value_h) * UNIT
    if key_mask is not None:
        key_mask += b * mask_b
    if bias is not None and gate_value is not None:
        shift = tl.load(bias + h * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    elif bias is not None:
        shift = tl.load(bias + h).to(tl.float32)
    question = key, key_m, gate_value, gate_value_m, key_mask, mask_m, M
    whole = _question(0, question, d, e, D, E, UNIT, BLOCK_M)
    for block in range(begin, end):
        row = block * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = row < L
        q = _rows(query, row, query_l, inside, d, D, UNIT)
        if value is not None:  # early, so that it is there when the gate is
            at = value + (b * value_b + h * value_h) * UNIT
            v = _rows(at, row, value_l, inside, e, E, UNIT)
        _, _, r, _, mixed = _look(
            q, whole, question, d, e, scale,
            D, E, UNIT, REDUCTION, ONE, BLOCK_L, BLOCK_M, BLOCK_E, OPERAND, PRECISION,
        )  # fmt: skip
        if gate_value is not None:
            g = tl.sigmoid(mixed + shift)
            if gate is not None:
                _put_rows(gate + (b * L * H + h) * E, row, H, inside, e, E, g)
        else:
            g = tl.sigmoid(r + shift)
            if gate is not None:
                tl.store(gate + (b * L + row) * H + h, g, mask=inside)
            g = g[:, None]
        if value is not None:
            _put_rows(out + (b * L * H + h) * E, row, H, inside, e, E, g * v.to(tl.float32))


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    grad_out, grad_gate, query, key, value, gate_value, key_mask, bias,
    grad_query, key_sums, grad_value, gate_value_sums, bias_sums,
    grad_out_b, grad_out_l, grad_out_h, grad_gate_b, grad_gate_l, grad_gate_h,
    query_b, query_l, query_h, key_b, key_m, key_h, value_b, value_l, value_h,
    gate_value_b, gate_value_m, gate_value_h, mask_b, mask_m,
    L, M, H, blocks, scale,
    D: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, REDUCTION: tl.constexpr,
    ONE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    GRAD_OPERAND: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, begin, end = _place(L, H, blocks, BLOCK_L)
    program = tl.program_id(0).to(tl.int64)
    scale = tl.cast(scale, tl.float32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    query += (b * query_b + h * query_h) * UNIT
    key += (b * key_b + h * key_h) * UNIT
    shift = 0.0
    if gate_value is not None:
        gate_value += (b * gate_value_b + h * gate_value_h) * UNIT
    if key_mask is not None:
        key_mask += b * mask_b
    if bias is not None and gate_value is not None:
        shift = tl.load(bias + h * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    elif bias is not None:
        shift = tl.load(bias + h).to(tl.float32)
    question = key, key_m, gate_value, gate_value_m, key_mask, mask_m, M
    whole = _question(0, question, d, e, D, E, UNIT, BLOCK_M)
    # Sums over this chunk: in registers if the question is one tile, else in memory.
    key_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    gate_value_sum = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if gate_value is not None:
        bias_sum = tl.zeros([BLOCK_E], tl.float32)
    else:
        bias_sum = tl.zeros([BLOCK_L], tl.float32)
    for block in range(begin, end):
        row = block * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = row < L
        q = _rows(query, row, query_l, inside, d, D, UNIT)
        if grad_out is not None:
            at = value + (b * value_b + h * value_h) * UNIT
            v = _rows(at, row, value_l, inside, e, E, UNIT)
            at = grad_out + (b * grad_out_b + h * grad_out_h) * UNIT
            given = _rows(at, row, grad_out_l, inside, e, E, UNIT).to(tl.float32)
        top, total, r, best, mixed = _look(
            q, whole, question, d, e, scale,
            D, E, UNIT, REDUCTION, ONE, BLOCK_L, BLOCK_M, BLOCK_E, OPERAND, PRECISION,
        )  # fmt: skip

        # dL/d value, and dL/d logit
        if gate_value is not None:
            g = tl.sigmoid(mixed + shift)
            grad = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
            if grad_out is not None:
                grad = given * v.to(tl.float32)
                if grad_value is not None:
                    _put_rows(grad_value + (b * L * H + h) * E, row, H, inside, e, E, g * given)
            if grad_gate is not None:
                at = grad_gate + (b * grad_gate_b + h * grad_gate_h) * UNIT
                grad += _rows(at, row, grad_gate_l, inside, e, E, UNIT).to(tl.float32)
            grad *= g * (1.0 - g)
            bias_sum += tl.sum(grad, 0)
            mean = tl.sum(grad * mixed, 1)  # Σ_j p_j dL/dp_j
        else:
            g = tl.sigmoid(r + shift)
            grad = tl.zeros([BLOCK_L], tl.float32)
            if grad_out is not None:
                grad = tl.sum(given * v.to(tl.float32), 1)
                if grad_value is not None:
                    at = grad_value + (b * L * H + h) * E
                    _put_rows(at, row, H, inside, e, E, g[:, None] * given)
            if grad_gate is not None:
                at = grad_gate + b * grad_gate_b + h * grad_gate_h
                at += row.to(tl.int64) * grad_gate_l
                grad += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            grad *= g * (1.0 - g)
            bias_sum += grad

        # dL/ds, and what follows from it
        if grad_query is not None or key_sums is not None or gate_value_sums is not None:
            grad_q = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
            for first in range(0, BLOCK_M if ONE else M, BLOCK_M):
                if ONE:
                    token, real, k, u = whole
                else:
                    token, real, k, u = _question(first, question, d, e, D, E, UNIT, BLOCK_M)
                zero = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
                if REDUCTION == "softmax":
                    s = product(q, tl.trans(k), zero, OPERAND, PRECISION) * scale
                    p = tl.exp(tl.where(real[None, :], s, float("-inf")) - _finite(top)[:, None])
                    p /= total[:, None]
                if gate_value is not None:
                    ds = product(grad, tl.trans(u), zero, GRAD_OPERAND, GRAD_PRECISION)
                    ds = p * (ds - mean[:, None])
                elif REDUCTION == "softmax":
                    ds = p * (1.0 + s - r[:, None]) * grad[:, None]
                elif REDUCTION == "max":
                    ds = tl.where(token[None, :] == best[:, None], grad[:, None], 0.0)
                else:
                    ds = tl.where(real[None, :], (grad / total)[:, None], 0.0)
                if grad_query is not None:
                    grad_q = product(ds, k, grad_q, GRAD_OPERAND, GRAD_PRECISION)
                if key_sums is not None:
                    sums = key_sums + program * M * D
                    old = key_sum
                    if not ONE:
                        old = _rows(sums, token, 1, (token < M) & (block > begin), d, D, D)
                    new = product(tl.trans(ds), q, old, GRAD_OPERAND, GRAD_PRECISION)
                    if ONE:
                        key_sum = new
                    else:
                        _put_rows(sums, token, 1, token < M, d, D, new)
                if gate_value_sums is not None:
                    sums = gate_value_sums + program * M * E
                    old = gate_value_sum
                    if not ONE:
                        old = _rows(sums, token, 1, (token < M) & (block > begin), e, E, E)
                    new = product(tl.trans(p), grad, old, GRAD_OPERAND, GRAD_PRECISION)
                    if ONE:
                        gate_value_sum = new
                    else:
                        _put_rows(sums, token, 1, token < M, e, E, new)
            if not ONE:
                tl.debug_barrier()  # the next block reads what other threads may have written
            if grad_query is not None:
                at = grad_query + (b * L * H + h) * D
                _put_rows(at, row, H, inside, d, D, grad_q * scale)

    token = tl.arange(0, BLOCK_M)
    if key_sums is not None and ONE:
        _put_rows(key_sums + program * M * D, token, 1, token < M, d, D, key_sum)
    if gate_value_sums is not None and ONE:
        _put_rows(gate_value_sums + program * M * E, token, 1, token < M, e, E, gate_value_sum)
    if bias_sums is not None:
        if gate_value is not None:
            tl.store(bias_sums + program * E + e, bias_sum, mask=e < E)
        else:
            tl.store(bias_sums + program, tl.sum(bias_sum, 0))


@triton.jit(do_not_specialize=_SIZES)
def sum_kernel(
    sums, key_mask, to, mask_b, mask_m, M, H, chunks, factor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sums [B,chunks,H,M,WIDTH] over chunks times `factor`, to [B,M,H,WIDTH]; 0 at padding."""
    program = tl.program_id(0)
    parts = tl.cdiv(M * WIDTH, BLOCK)
    b = (program // (parts * H)).to(tl.int64)
    h = program // parts % H
    i = program % parts * BLOCK + tl.arange(0, BLOCK)
    token = i // WIDTH
    total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for first in range(0, chunks, AT_ONCE):
        chunk = first + tl.arange(0, AT_ONCE)
        at = sums + ((b * chunks + chunk) * H + h)[:, None] * M * WIDTH + i[None, :]
        mask = (chunk < chunks)[:, None] & (i < M * WIDTH)[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    if key_mask is not None:
        key_mask += b * mask_b
    sum = tl.where(
        _real(token, key_mask, mask_m, M), tl.sum(total, 0) * tl.cast(factor, tl.float32), 0.0
    )
    tl.store(to + ((b * M + token) * H + h) * WIDTH + i % WIDTH, sum, mask=i < M * WIDTH)


# ---------------------------------------------------------------------------------------------
# Launches


class Settings(NamedTuple):
    """How the work is cut, and what Triton is told."""

    rows: int
    """BLOCK_L."""
    tokens: int
    """The largest BLOCK_M: longer questions take several tiles."""
    warps: int
    registers: int = 0
    """Of a thread, at most; see `_triton.registers`."""


_SM_80 = {
    # (backward, dtype): size: settings, for longer and longer questions
    (False, torch.bfloat16): {
        32: [Settings(64, 128, 4)],
        64: [Settings(64, 128, 4)],
        128: [Settings(64, 64, 4)],
        256: [Settings(64, 64, 8)],
        512: [Settings(32, 32, 8)],
    },
    (True, torch.bfloat16): {
        32: [Settings(64, 64, 4)],
        64: [
            Settings(64, 16, 4, 200),
            Settings(64, 32, 4),
            Settings(64, 64, 4),
            Settings(64, 32, 4),
        ],
        128: [Settings(32, 32, 4, 200), Settings(32, 32, 8)],
        256: [Settings(32, 32, 8), Settings(32, 16, 8)],
        512: [Settings(16, 16, 8)],
    },
    # Products with a gradient are in tf32, whose operands take twice the registers.
    (True, torch.float16): {
        32: [Settings(64, 64, 4)],
        64: [Settings(32, 32, 4), Settings(32, 64, 4), Settings(32, 32, 4, 255)],
        128: [Settings(32, 32, 4), Settings(32, 32, 8)],
        256: [Settings(32, 32, 8), Settings(32, 16, 8)],
        512: [Settings(16, 16, 8)],
    },
    (False, torch.float32): {
        32: [Settings(32, 32, 4), Settings(32, 32, 8, 96)],
        64: [Settings(32, 32, 4), Settings(32, 32, 8)],
        128: [Settings(16, 32, 4)],
        256: [Settings(32, 16, 8)],
        512: [Settings(16, 16, 8)],
    },
    (True, torch.float32): {
        32: [Settings(32, 32, 4, 168), Settings(32, 32, 8)],
        64: [Settings(32, 16, 8), Settings(32, 32, 4), Settings(32, 32, 8, 255)],
        128: [Settings(16, 16, 8)],
        256: [Settings(16, 16, 8)],
        512: [Settings(16, 16, 8)],
    },
}
_SM_80[False, torch.float16] = _SM_80[False, torch.bfloat16]
_GFX942 = _SM_80 | {
    (False, torch.bfloat16): _SM_80[False, torch.bfloat16] | {256: [Settings(64, 32, 8)]},
    (False, torch.float16): _SM_80[False, torch.float16] | {256: [Settings(64, 32, 8)]},
    (True, torch.bfloat16): _SM_80[True, torch.bfloat16]
    | {128: [Settings(32, 32, 4)], 256: [Settings(16, 16, 8)]},
    (True, torch.float16): _SM_80[True, torch.float16]
    | {128: [Settings(32, 32, 4)], 256: [Settings(16, 16, 8)]},
}
_TABLES = {
    "sm_80": _SM_80,  # and every GPU that is not named
    "gfx942": _GFX942,
    "interpreter": {
        key: {size: [Settings(64, 128, 4)] for size in table} for key, table in _SM_80.items()
    },
}
"""Chosen by what they take of a GPU: up to 64 rows, as many as leave no register spilled."""

_PROGRAMS = 2048, 1024
"""As many programs as forward and backward have at least, where there are blocks enough."""


def settings(arch: str, dtype: torch.dtype, tokens: int, size: int, *, backward: bool) -> Settings:
    """Settings for a question of `tokens` tokens: those of the first tile that holds it, or of the
    largest.

    size: What a row of a tile takes on chip: the larger of BLOCK_D and BLOCK_E, twice that where
        there is a gate for each channel.
    """
    table = _TABLES.get(arch, _TABLES["sm_80"])
    rows = table[backward, dtype][max(32, size)]
    return next((row for row in rows if tokens <= row.tokens), rows[-1])


class _Plan(NamedTuple):
    """What a kernel is launched with besides its tensors."""

    programs: int
    chunks: int
    """Of the L tokens of one question and head."""
    sizes: tuple[int | float, ...]
    constants: dict[str, Any]


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    reduction: str,
    unit: int,
    *,
    backward: bool,
) -> _Plan:
    B, L, H, D = query.shape
    M, E = key.shape[1], _channels(value, gate_value)
    block_d, block_e = _triton.padded(D), _triton.padded(E)
    arch = _triton.architecture(query.device)
    size = max(block_d, block_e) * (1 if gate_value is None else 2)
    cut = settings(arch, query.dtype, M, size, backward=backward)
    blocks = triton.cdiv(L, cut.rows)
    wanted = triton.cdiv(_PROGRAMS[backward], max(1, B * H))
    blocks_each = max(1, blocks // wanted)
    chunks = max(1, triton.cdiv(blocks, blocks_each))
    sizes = [stride for x in (query, key, value, gate_value) for stride in _strides(x, unit)]
    sizes += (0, 0) if key_mask is None else key_mask.stride()
    operands = _triton.operands(query.dtype, arch)
    constants = {
        "D": D,
        "E": E,
        "UNIT": unit,
        "REDUCTION": reduction,
        "ONE": cut.tokens >= M,
        "BLOCK_L": cut.rows,
        "BLOCK_M": min(cut.tokens, _triton.padded(M)),
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        **{name: x for name, x in operands.items() if backward or not name.startswith("GRAD")},
        "num_warps": cut.warps,
        "num_stages": 1,
        **_triton.registers(arch, cut.registers),
    }
    return _Plan(B * H * chunks, chunks, (*sizes, L, M, H, blocks_each, scale), constants)


def _strides(x: Tensor | None, unit: int) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else tuple(stride // unit for stride in x.stride()[:3])


def _channels(value: Tensor | None, gate_value: Tensor | None) -> int:
    return next((x.shape[3] for x in (value, gate_value) if x is not None), 1)


def forward(
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
    """As `reference.forward`."""
    query, key, value, gate_value = map(rows_contiguous, (query, key, value, gate_value))
    out = None if value is None else empty_like(value)
    gate = None
    if need_gate:
        channels = () if gate_value is None else gate_value.shape[3:]
        gate = query.new_empty(*query.shape[:3], *channels)
    unit = _triton.unit(query, key, value, gate_value)
    plan = _plan(query, key, value, gate_value, key_mask, scale, reduction, unit, backward=False)
    bias = None if bias is None else bias.contiguous()
    tensors = query, key, value, gate_value, key_mask, bias, out, gate
    _triton.launch(forward_kernel, plan.programs, *tensors, *plan.sizes, **plan.constants)
    return out, gate


def backward(
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
    """As `reference.backward`."""
    grad_out, query, key, value, gate_value = map(
        rows_contiguous, (grad_out, query, key, value, gate_value)
    )
    rows = [grad_out, query, key, value, gate_value]
    if gate_value is not None:
        grad_gate = rows_contiguous(grad_gate)
        rows.append(grad_gate)
    unit = _triton.unit(*rows)
    plan = _plan(query, key, value, gate_value, key_mask, scale, reduction, unit, backward=True)
    batch, length, heads = query.shape[:3]

    def sums(needed: bool, *shape: int) -> Tensor | None:
        if not needed:
            return None
        make = query.new_empty if length else query.new_zeros
        return make(batch, plan.chunks, heads, *shape, dtype=torch.float32)

    channels = _channels(value, gate_value)
    grad_query = empty_like(query) if needs[0] else None
    key_sums = sums(needs[1], *key.shape[1::2])
    grad_value = empty_like(value) if needs[2] else None
    if needs[2] and grad_out is None:
        grad_value.zero_()
    gate_value_sums = sums(needs[3], key.shape[1], channels)
    bias_sums = sums(needs[4], *(() if gate_value is None else (channels,)))
    tensors = (grad_out, grad_gate, query, key, value, gate_value, key_mask)
    tensors += (None if bias is None else bias.contiguous(),)
    tensors += (grad_query, key_sums, grad_value, gate_value_sums, bias_sums)
    sizes = _strides(grad_out, unit) + _strides(grad_gate, 1 if gate_value is None else unit)
    sizes += plan.sizes
    _triton.launch(backward_kernel, plan.programs, *tensors, *sizes, **plan.constants)
    return (
        grad_query,
        _over_chunks(key_sums, key, key_mask, scale),
        grad_value,
        _over_chunks(gate_value_sums, gate_value, key_mask, 1.0),
        None if bias_sums is None else bias_sums.sum((0, 1)).to(bias.dtype),
    )


def _over_chunks(
    sums: Tensor | None, like: Tensor, key_mask: Tensor | None, factor: float
) -> Tensor | None:
    """The gradient of a tensor [B,M,H,D] of the question from its sums [B,chunks,H,M,D]."""
    if sums is None:
        return None
    grad = empty_like(like)
    batch, tokens, heads, width = like.shape
    block = 256
    _triton.launch(
        sum_kernel,
        batch * heads * triton.cdiv(tokens * width, block),
        *(sums, key_mask, grad),
        *((0, 0) if key_mask is None else key_mask.stride()),
        *(tokens, heads, sums.shape[1], factor),
        WIDTH=width,
        BLOCK=block,
        AT_ONCE=4,
        num_warps=4,
        num_stages=1,
    )
    return grad
