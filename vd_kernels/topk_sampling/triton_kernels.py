"""topk_sample and topk_gather in Triton: choices in registers, noise drawn where it is used.

A program holds the frames of a row in a tile, and chooses by bisection: it looks for a threshold
that as many keys reach as are to be chosen. Keys are compared as integers in the order of floats,
so a choice is exact, and never sorts.

"perturbed" has a plan for each row: which frames can be chosen at all, as the noise is bounded.
Programs that have some samples of a row draw noise for those frames alone. Counts are integers,
which may be added in any order. Backward draws the same noise again, twice: for the reachable
frames to see what each sample gained, and for all frames to weigh it by that; no two programs add
to one number.

The noise is docs/noise.md's, bit for bit: kernels that draw it are compiled without fused
multiply-add, and `tl.fma` stands where one is meant.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vd_kernels import _triton
from vd_kernels._checks import rows_contiguous
from vd_kernels._triton import product
from vd_kernels.topk_sampling import noise as specification

# ---------------------------------------------------------------------------------------------
# Noise. Nothing in this part may be fused or reordered.

_LOG2 = tl.constexpr(specification.LOG2)
_PROBIT = tl.constexpr(specification.PROBIT)
_MINUS_LN2 = tl.constexpr(-specification.LN2)
_MINUS_LN_LN2 = tl.constexpr(specification.MINUS_LN_LN2)
_LARGEST_NORMAL = tl.constexpr(specification.LARGEST_NORMAL)
_TWO_TO_MINUS_30, _TWO_TO_MINUS_31 = tl.constexpr(2.0**-30), tl.constexpr(2.0**-31)
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)


@triton.jit
def _philox(quad, sample, row, seed):
    """Philox-4x32-10: four words for each quad and sample, which broadcast against each other.

    The first rounds mix little: what they make of the quad alone or of the sample alone has the
    shape of that.
    """
    c0, c1 = quad.to(tl.uint32), sample.to(tl.uint32)
    c2, c3 = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(
    frame, sample, row, seed, ALL: tl.constexpr, SAMPLES: tl.constexpr, FRAMES: tl.constexpr
):
    """A word for each sample and frame. ALL: the frames are 0, 1, 2, ..., so words go in fours."""
    if ALL:
        quad = tl.arange(0, FRAMES // 4)
        w0, w1, w2, w3 = _philox(quad[None, :], sample[:, None], row, seed)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = tl.reshape(words, [SAMPLES, FRAMES])
    else:
        w0, w1, w2, w3 = _philox((frame >> 2)[None, :], sample[:, None], row, seed)
        at = (frame & 3)[None, :]
        words = tl.where(at < 2, tl.where(at == 0, w0, w1), tl.where(at == 2, w2, w3))
    return words


@triton.jit
def _split(y):
    """y = (1 + h) 2^k with 1/sqrt(2) <= 1 + h < sqrt(2)."""
    bits = y.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    return (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0, k


@triton.jit
def _log2(h, k):
    """log2((1 + h) 2^k)."""
    total = h * _LOG2[8] + _LOG2[7]
    for i in tl.static_range(6, -1, -1):
        total = total * h + _LOG2[i]
    return total * h + k.to(tl.float32)


@triton.jit
def _normal(word):
    """The normal that a word stands for."""
    bits = word.to(tl.int32, bitcast=True)
    end = bits ^ (bits >> 31)  # distance from the nearer end
    tail = end.to(tl.float32) + 0.5
    centre = (0x7FFFFFFF - end).to(tl.float32) + 0.5
    h, k = _split((tail * _TWO_TO_MINUS_30) * (1.0 - tail * _TWO_TO_MINUS_32))
    root = tl.sqrt_rn(3.0 - _log2(h, k)) - 4.0
    size = root * _PROBIT[10] + _PROBIT[9]
    for i in tl.static_range(8, -1, -1):
        size = size * root + _PROBIT[i]
    size *= centre * _TWO_TO_MINUS_31
    return tl.where(bits < 0, size, -size)


@triton.jit
def _gumbel(word):
    """The Gumbel that a word stands for."""
    bits = word.to(tl.int32, bitcast=True)
    p = ((bits ^ (bits >> 31)).to(tl.float32) + 0.5) * _TWO_TO_MINUS_32
    h, k = _split(tl.where(bits < 0, 1.0 - p, p))
    h = tl.where(k == 0, -p, h)  # 1 - p so close to 1 that p is known better
    h, k = _split(-_log2(h, k))
    return _log2(h, k) * _MINUS_LN2 + _MINUS_LN_LN2


@triton.jit
def _normals(
    frame, inside, sample, drawn, row, seed, noise, noise_sample,
    ALL: tl.constexpr, SAMPLES: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """Z of some samples and frames: that which was given, or else drawn."""
    if noise is not None:
        at = noise + sample.to(tl.int64)[:, None] * noise_sample + frame[None, :]
        z = tl.load(at, mask=drawn[:, None] & inside[None, :], other=0.0)
    else:
        z = _normal(_words(frame, sample, row, seed, ALL, SAMPLES, FRAMES))
    return z


# ---------------------------------------------------------------------------------------------
# Choices. Keys are int32 [SAMPLES,FRAMES], frames in time order; -inf is what is not to be chosen.

_LOWEST = tl.constexpr(-torch.finfo(torch.float32).max)
_LOWEST_KEY = tl.constexpr(-0x7F800000)  # its ordinal
_NOT_TO_BE_CHOSEN = tl.constexpr(-0x80000000)


@triton.jit
def _scores(scores, frame, inside):
    """Scores of frames; what is no number is not to be chosen, either."""
    x = tl.load(scores + frame, mask=inside, other=float("-inf"))
    return tl.where(x > float("-inf"), x, float("-inf"))


@triton.jit
def _ordinal(x):
    """Integers in the order of floats: + 0.0 makes -0.0 the 0.0 that it equals."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _between(low, high):
    """Their mean, rounded down, though their sum may not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _reaching(keys, threshold):
    """How many keys of each sample are not below a threshold."""
    return tl.sum((keys >= threshold[:, None]).to(tl.int32), 1)


@triton.jit
def _chosen(keys, least, count):
    """Which keys are the `count` best of their sample; as many or more are not below `least`.

    Bisection: `count` keys or more reach `low`, fewer reach `high`.
    """
    high = tl.max(keys, 1) + 1
    low = tl.zeros_like(high) + least
    reached = _reaching(keys, low)
    middle = _between(low, high)
    while tl.max(((reached != count) & (middle > low)).to(tl.int32), 0) > 0:
        passed = _reaching(keys, middle)
        enough = passed >= count
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, passed, reached)
        high = tl.where(enough, high, middle)
        middle = _between(low, high)
    chosen = keys >= low[:, None]
    if tl.max(reached, 0) > count:  # the worst of them are all equal, and the first of these stay
        equal = keys == low[:, None]
        place = tl.cumsum(equal.to(tl.int32), 1)
        stay = tl.sum(equal.to(tl.int32), 1) - (reached - count)
        chosen = chosen & ((place <= stay[:, None]) | (keys > low[:, None]))
    return chosen


@triton.jit
def _best(keys, position, FRAMES: tl.constexpr):
    """Where the best key of each sample lies, the first one of equals."""
    best = tl.max(keys, 1)
    return tl.min(tl.where(keys == best[:, None], position[None, :], FRAMES), 1)


_SIZES = [
    *("scores_row", "noise_row", "noise_sample", "grad_row", "grad_slot", "row_offset"),
    *("values_row", "values_frame", "weights_row", "weights_slot", "size"),
    *("N", "K", "samples", "each", "rows"),
]
"""Not specialised on: one compilation serves all lengths of a bucket."""


# ---------------------------------------------------------------------------------------------
# Kernels of topk_sample. What is None was not given, or is not wanted.


@triton.jit(do_not_specialize=_SIZES)
def choice_kernel(
    scores, seed, noise, indices, weights, plan,
    scores_row, noise_row, row_offset, N, K, sigma,
    GUMBEL: tl.constexpr, BY_SCORE: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The choice of one row, under Gumbel noise if GUMBEL.

    indices [R,K]; one-hot weights [R,K,N]; a plan [R,2N+3] of int32 for "perturbed": how many
    frames can be chosen, a threshold that all choices reach, how many frames are chosen; the frames
    that can be chosen; and for each frame its slot in this choice, or -1.
    """
    row = tl.program_id(0).to(tl.int64)
    frame = tl.arange(0, BLOCK_N)
    inside = frame < N
    score = _scores(scores + row * scores_row, frame, inside)
    real = score > float("-inf")
    found = tl.minimum(tl.sum(real.to(tl.int32), 0), K)
    key = score
    if GUMBEL:
        if noise is not None:
            key += tl.load(noise + row * noise_row + frame, mask=inside, other=0.0)
        else:
            first = tl.zeros([1], tl.int32)
            words = _words(
                frame, first, row + row_offset, tl.load(seed), True, 1, BLOCK_N
            )  # fmt: skip
            key += tl.reshape(_gumbel(words), [BLOCK_N])
    keys = _ordinal(key)[None, :]
    if BY_SCORE:
        slot = tl.full([BLOCK_N], -1, tl.int32)
        for place in range(found):
            picked = frame[None, :] == _best(keys, frame, BLOCK_N)[:, None]
            slot = tl.where(tl.reshape(picked, [BLOCK_N]), place, slot)
            keys = tl.where(picked, _NOT_TO_BE_CHOSEN, keys)
    else:
        chosen = tl.reshape(_chosen(keys, _LOWEST_KEY, found), [BLOCK_N])
        slot = tl.where(chosen, tl.cumsum(chosen.to(tl.int32), 0) - 1, -1)

    if indices is not None:
        tl.store(indices + row * K + slot, frame, mask=slot >= 0)
        spare = (frame >= found) & (frame < K)
        tl.store(indices + row * K + frame, tl.full([BLOCK_N], -1, tl.int64), mask=spare)
    if weights is not None:
        for place in range(K):
            share = tl.where(slot == place, 1.0, 0.0)
            tl.store(weights + (row * K + place) * N + frame, share, mask=inside)
    if plan is not None:
        # A sample's best K keys are at least the worst score less what noise can take from it,
        # rounded, as rounding keeps order. A frame that cannot get there needs no noise.
        reach = tl.cast(sigma, tl.float32) * _LARGEST_NORMAL if BOUNDED else float("inf")
        worst = tl.min(tl.where(slot >= 0, score, float("inf")), 0)
        least = worst - reach
        reachable = real & (score + reach >= least)
        plan += row * (2 * N + 3)
        tl.store(plan, tl.sum(reachable.to(tl.int32), 0))
        tl.store(plan + 1, _ordinal(tl.maximum(least, _LOWEST)))
        tl.store(plan + 2, found)
        place = tl.cumsum(reachable.to(tl.int32), 0) - 1
        tl.store(plan + 3 + place, frame, mask=reachable)
        tl.store(plan + 3 + N + frame, slot, mask=inside)


@triton.jit
def _draw(
    scores, plan, seed, noise, grad, indices, counts, gains, sums, row, begin, end, certain,
    noise_sample, grad_slot, N, sigma,
    BY_SCORE: tl.constexpr, ALL: tl.constexpr, SAMPLES: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """What `sample_kernel` does, in tiles of samples and of frames: all of them, or the reachable.

    `certain` more samples choose as the scores do.
    """
    reachable, least, found = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2)
    position = tl.arange(0, FRAMES)
    if ALL:
        inside = position < N
        frame = position
    else:
        inside = position < reachable
        frame = tl.load(plan + 3 + position, mask=inside, other=0)
    score = _scores(scores, frame, inside)
    usual = tl.load(plan + 3 + N + frame, mask=inside, other=-1)
    hits = tl.zeros([SAMPLES, FRAMES], tl.int32)
    total = tl.zeros([SAMPLES, FRAMES], tl.float32)
    for first in range(begin, end, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        drawn = sample < end
        z = _normals(
            frame, inside, sample, drawn, row, seed, noise, noise_sample, ALL, SAMPLES, FRAMES
        )  # fmt: skip
        keys = _ordinal(score[None, :] + z * sigma)  # rounded twice, as specified
        gain = tl.zeros([SAMPLES], tl.float32)
        if BY_SCORE:
            for slot in range(found):
                picked = position[None, :] == _best(keys, position, FRAMES)[:, None]
                t = tl.sum(tl.where(picked, frame[None, :], 0), 1)
                if counts is not None:
                    tl.atomic_add(
                        counts + slot * N + t, drawn.to(tl.int32), mask=drawn, sem="relaxed"
                    )
                else:
                    own = tl.load(grad + slot * grad_slot + t)
                    if gains is not None:
                        gain += own - tl.load(grad + slot * grad_slot + tl.load(indices + slot))
                    else:
                        total += tl.where(picked & drawn[:, None], own[:, None] * z, 0.0)
                keys = tl.where(picked, _NOT_TO_BE_CHOSEN, keys)
        else:
            chosen = _chosen(keys, least, found) & drawn[:, None]
            slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
            same = slot == usual[None, :]
            other = chosen & (slot != usual[None, :])
            if counts is not None:
                hits += (chosen & same).to(tl.int32)
                at = counts + slot * N + frame[None, :]
                tl.atomic_add(at, other.to(tl.int32), mask=other, sem="relaxed")
            else:
                at = grad + slot * grad_slot
                if gains is not None:
                    own = tl.load(at + frame[None, :], mask=other, other=0.0)
                    base = tl.load(indices + slot, mask=other, other=0)
                    own -= tl.load(at + base, mask=other, other=0.0)
                    gain = tl.sum(own, 1)
                else:
                    total += tl.load(at + frame[None, :], mask=chosen, other=0.0) * z
        if gains is not None:
            tl.store(gains + sample, gain, mask=drawn)
    if counts is not None and not BY_SCORE:
        often = tl.sum(hits, 0) + certain
        tl.atomic_add(counts + usual * N + frame, often, mask=usual >= 0, sem="relaxed")
    if sums is not None:
        tl.store(sums + frame, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def sample_kernel(
    scores, plan, seed, noise, grad, indices, counts, gains, sums,
    scores_row, noise_row, noise_sample, grad_row, grad_slot,
    row_offset, N, K, samples, each, sigma,
    BY_SCORE: tl.constexpr, BLOCK_N: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some samples of one row, `each` of them: adds to one of

    counts [R,K,N]: how often a slot held a frame, int32. A choice like the unperturbed one is
        counted in registers.
    gains [R,samples]: what a sample gained over the unperturbed choice, c_i.
    sums [R,groups,N]: of the diagonal gradient, sum_i G[k,t] Z_it over samples with I_i[k] = t.
    """
    groups = tl.cdiv(samples, each)
    program = tl.program_id(0).to(tl.int64)
    row = program // groups
    begin = (program % groups).to(tl.int32) * each
    end = tl.minimum(begin + each, samples)
    scores += row * scores_row
    plan += row * (2 * N + 3)
    number = row + row_offset
    grad_slot = tl.cast(grad_slot, tl.int64)
    sigma = tl.cast(sigma, tl.float32)
    indices += row * K
    key = tl.load(seed)
    if noise is not None:
        noise += row * noise_row
    if counts is not None:
        counts += row * K * N
    else:
        grad += row * grad_row
    if gains is not None:
        gains += row * samples
    if sums is not None:
        sums += program * N
    reachable, found = tl.load(plan), tl.load(plan + 2)
    skips = found == 0
    if not BY_SCORE and sums is None:
        skips = reachable == found  # every sample chooses as the scores do
    certain = tl.where(skips, end - begin, 0)
    end -= certain
    if FEW < BLOCK_N:
        if reachable <= FEW:
            _draw(
                scores, plan, key, noise, grad, indices, counts, gains, sums, number, begin, end,
                certain, noise_sample, grad_slot, N, sigma, BY_SCORE, False, TILE // FEW, FEW,
            )  # fmt: skip
        elif reachable <= 2 * FEW:
            _draw(
                scores, plan, key, noise, grad, indices, counts, gains, sums, number, begin, end,
                certain, noise_sample, grad_slot, N, sigma, BY_SCORE, False, TILE // FEW // 2,
                2 * FEW,
            )  # fmt: skip
        else:
            _draw(
                scores, plan, key, noise, grad, indices, counts, gains, sums, number, begin, end,
                certain, noise_sample, grad_slot, N, sigma, BY_SCORE, True, TILE // BLOCK_N,
                BLOCK_N,
            )  # fmt: skip
    else:
        _draw(
            scores, plan, key, noise, grad, indices, counts, gains, sums, number, begin, end,
            certain, noise_sample, grad_slot, N, sigma, BY_SCORE, True, TILE // BLOCK_N, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["total", "samples"])
def share_kernel(counts, weights, total, samples, BLOCK: tl.constexpr):
    """weights = counts / samples, where the counts lie."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + at, mask=at < total, other=0).to(tl.float32)
    tl.store(weights + at, tl.div_rn(count, samples.to(tl.float32)), mask=at < total)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    gains, scores, seed, noise, to,
    scores_row, noise_row, noise_sample, row_offset, N, samples, sigma,
    SAMPLES: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """1 / ((n - 1) sigma) sum_i (c_i - mean c) Z_it of one row, for some quads of frames."""
    parts = tl.cdiv(N, 4 * QUADS)
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    quad = (program % parts).to(tl.int32) * QUADS + tl.arange(0, QUADS)
    number = row + row_offset
    sigma = tl.cast(sigma, tl.float32)
    gains += row * samples
    key = tl.load(seed)
    if noise is not None:
        noise += row * noise_row

    mean = tl.zeros([256], tl.float32)
    size = tl.zeros([256], tl.float32)
    for first in range(0, samples, 256):
        sample = first + tl.arange(0, 256)
        gain = tl.load(gains + sample, mask=sample < samples, other=0.0)
        mean += gain
        size = tl.maximum(size, tl.abs(gain))
    # Of one sample alone there is no mean to take away.
    mean = tl.where(samples > 1, tl.sum(mean, 0) / samples.to(tl.float32), 0.0)
    count = tl.where(tl.max(size, 0) == 0.0, 0, samples)  # no sample differs: no noise is needed

    a0 = tl.zeros([SAMPLES, QUADS], tl.float32)
    a1, a2, a3 = a0, a0, a0
    for first in range(0, count, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        drawn = sample < samples
        gain = tl.load(gains + sample, mask=drawn, other=0.0)
        gain = tl.where(drawn, gain - mean, 0.0)[:, None]
        if noise is not None:
            at = noise + sample.to(tl.int64)[:, None] * noise_sample + 4 * quad[None, :]
            there = drawn[:, None] & (4 * quad < N)[None, :]
            z0 = tl.load(at, mask=there, other=0.0)
            z1 = tl.load(at + 1, mask=there & (4 * quad + 1 < N)[None, :], other=0.0)
            z2 = tl.load(at + 2, mask=there & (4 * quad + 2 < N)[None, :], other=0.0)
            z3 = tl.load(at + 3, mask=there & (4 * quad + 3 < N)[None, :], other=0.0)
        else:
            w0, w1, w2, w3 = _philox(quad[None, :], sample[:, None], number, key)
            z0, z1, z2, z3 = _normal(w0), _normal(w1), _normal(w2), _normal(w3)
        a0, a1 = tl.fma(gain, z0, a0), tl.fma(gain, z1, a1)
        a2, a3 = tl.fma(gain, z2, a2), tl.fma(gain, z3, a3)

    scores += row * scores_row
    to += row * N
    others = tl.maximum(samples - 1, 1).to(tl.float32)
    _put_gradient(to, scores, 4 * quad, N, a0, others, sigma)
    _put_gradient(to, scores, 4 * quad + 1, N, a1, others, sigma)
    _put_gradient(to, scores, 4 * quad + 2, N, a2, others, sigma)
    _put_gradient(to, scores, 4 * quad + 3, N, a3, others, sigma)


@triton.jit
def _put_gradient(to, scores, frame, N, parts, others, sigma):
    real = _scores(scores, frame, frame < N) > float("-inf")
    # One after the other: their product may be too small for a float.
    grad = tl.div_rn(tl.div_rn(tl.sum(parts, 0), others), sigma)
    tl.store(to + frame, tl.where(real, grad, 0.0), mask=frame < N)


@triton.jit(do_not_specialize=_SIZES)
def gumbel_backward_kernel(
    grad, scores, indices, seed, noise, to,
    grad_row, grad_slot, scores_row, noise_row, row_offset, N, K, temperature,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one row through its successive softmax."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.cast(temperature, tl.float32)
    frame = tl.arange(0, BLOCK_N)
    inside = frame < N
    score = _scores(scores + row * scores_row, frame, inside)
    real = score > float("-inf")
    found = tl.minimum(tl.sum(real.to(tl.int32), 0), K)
    if noise is not None:
        key = score + tl.load(noise + row * noise_row + frame, mask=inside, other=0.0)
    else:
        first = tl.zeros([1], tl.int32)
        words = _words(frame, first, row + row_offset, tl.load(seed), True, 1, BLOCK_N)
        key = score + tl.reshape(_gumbel(words), [BLOCK_N])
    holds = tl.load(indices + row * K + frame, mask=frame < K, other=-1)  # by slot
    grad += row * grad_row
    grad_slot = tl.cast(grad_slot, tl.int64)
    total = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(found):
        best = tl.max(key, 0)
        pick = tl.min(tl.where(key == best, frame, BLOCK_N - 1), 0)
        slot = tl.min(tl.where(holds == pick, frame, K - 1), 0)
        # p = softmax of what is left. G less its value at the pick says the same, without
        # cancellation where the pick has nearly all of p.
        share = tl.exp((key - best) / temperature)
        gain = tl.load(grad + slot * grad_slot + frame, mask=inside, other=0.0)
        gain -= tl.load(grad + slot * grad_slot + pick)
        scale = 1.0 / tl.sum(share, 0)
        mean = tl.sum(share * gain, 0) * scale
        total += share * scale * (gain - mean)
        key = tl.where(frame == pick, float("-inf"), key)
    tl.store(to + row * N + frame, tl.where(real, total / temperature, 0.0), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "alpha"])
def lapsum_kernel(
    scores, grad, to, scores_row, grad_row, N, K, alpha, spread, BLOCK_N: tl.constexpr
):
    """Weights of one row's soft set, or their gradient: in float64, by bisection for b.

    alpha: The temperature's bits as float64; Triton takes numbers in float32, where it may be 0.
    """
    row = tl.program_id(0).to(tl.int64)
    frame = tl.arange(0, BLOCK_N)
    inside = frame < N
    score = _scores(scores + row * scores_row, frame, inside)
    real = score > float("-inf")
    count = tl.sum(real.to(tl.int32), 0)
    alpha = alpha.to(tl.int64).to(tl.float64, bitcast=True)
    margin = alpha * tl.cast(spread, tl.float64)
    x = score.to(tl.float64)
    low = tl.min(tl.where(real, x, float("inf")), 0) - margin
    high = tl.max(x, 0) + margin
    for _ in range(64):
        middle = (low + high) * 0.5
        offset = (x - middle) / alpha
        tail = tl.exp(-tl.abs(offset))
        above = offset > 0
        # Apart from the integer, lest it swallow tails that are all there is besides.
        surplus = tl.sum(above.to(tl.int32), 0) - K
        excess = surplus.to(tl.float64) + 0.5 * tl.sum(tl.where(above, -tail, tail), 0)
        if excess == 0.0:  # tails are as large or too small for float64: the nearer one is larger
            right = tl.min(tl.where(above, offset, float("inf")), 0)
            excess = right + tl.max(tl.where(above, float("-inf"), offset), 0)
        low, high = tl.where(excess > 0, middle, low), tl.where(excess > 0, high, middle)
    offset = (x - (low + high) * 0.5) / alpha
    if grad is None:
        tail = 0.5 * tl.exp(-tl.abs(offset))
        share = tl.where(offset < 0, tail, 1.0 - tail)
        share = tl.where(count <= K, 1.0, share)  # nothing to choose
        result = tl.where(real, share, 0.0)
    else:
        free = real & (count > K)
        distance = tl.where(free, tl.abs(offset), float("inf"))
        # sum qG / sum q with the largest q scaled to 1: all q may underflow, but not it.
        nearest = tl.min(distance, 0)
        nearest = tl.where(count > K, nearest, 0.0)
        share = tl.exp(nearest - distance)
        given = tl.load(grad + row * grad_row + frame, mask=inside, other=0.0).to(tl.float64)
        given = tl.where(free, given, 0.0)
        mean = tl.sum(share * given, 0) / tl.maximum(tl.sum(share, 0), 1.0)
        density = tl.exp(-nearest) / (2.0 * alpha)
        result = tl.where(free, density * share * (given - mean), 0.0)
    tl.store(to + row * N + frame, result.to(tl.float32), mask=inside)


# ---------------------------------------------------------------------------------------------
# Kernels of topk_gather. SOFT: weights are [R,N], and a slot has its frame of `indices`. E and the
# strides of values, out and their gradients are in units of UNIT elements.


@triton.jit(do_not_specialize=_SIZES)
def entries_kernel(weights, entries, counts, weights_row, weights_slot, N, K, BLOCK: tl.constexpr):
    """Which frames have a weight in one slot: entries [R,K,N], and how many they are."""
    program = tl.program_id(0).to(tl.int64)
    weights += program // K * weights_row + program % K * weights_slot
    entries += program * N
    count = 0
    for first in range(0, N, BLOCK):
        frame = first + tl.arange(0, BLOCK)
        used = tl.load(weights + frame, mask=frame < N, other=0.0) != 0.0
        tl.store(entries + count + tl.cumsum(used.to(tl.int32), 0) - 1, frame, mask=used)
        count += tl.sum(used.to(tl.int32), 0)
    tl.store(counts + program, count)


@triton.jit(do_not_specialize=_SIZES)
def gather_kernel(
    values, weights, indices, entries, counts, out,
    values_row, values_frame, weights_row, weights_slot, N, K, size,
    SOFT: tl.constexpr, UNIT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A part of one slot. Slots of a row run side by side: they find frames in the cache."""
    parts = tl.cdiv(size * UNIT, BLOCK_E)
    program = tl.program_id(0).to(tl.int64)
    slot, row = program % K, program // (K * parts)
    e = (program // K % parts).to(tl.int32) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < size * UNIT
    values += row * values_row * UNIT
    weights += row * weights_row
    total = tl.zeros([BLOCK_E], tl.float32)
    if SOFT:
        frame = tl.load(indices + row * K + slot)
        if frame >= 0:
            x = tl.load(values + frame * values_frame * UNIT + e, mask=inside, other=0.0)
            total = tl.load(weights + frame) * x.to(tl.float32)
    else:
        weights += slot * weights_slot
        entries += (row * K + slot) * N
        for i in range(tl.load(counts + row * K + slot)):
            frame = tl.load(entries + i).to(tl.int64)
            x = tl.load(values + frame * values_frame * UNIT + e, mask=inside, other=0.0)
            total = tl.fma(tl.load(weights + frame), x.to(tl.float32), total)
    tl.store(out + (row * K + slot) * size * UNIT + e, total, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def gather_values_kernel(
    grad, weights, indices, to,
    grad_row, grad_slot, weights_row, weights_slot, N, K, size,
    SOFT: tl.constexpr, UNIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of a part of one frame: a sum over the slots that hold it, mostly none."""
    parts = tl.cdiv(size * UNIT, BLOCK_E)
    program = tl.program_id(0).to(tl.int64)
    frame, row = program % N, program // (N * parts)
    e = (program // N % parts).to(tl.int32) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < size * UNIT
    grad += row * grad_row * UNIT
    weights += row * weights_row + frame
    slot = tl.arange(0, BLOCK_K)
    if SOFT:
        holds = tl.load(indices + row * K + slot, mask=slot < K, other=-1) == frame
    else:
        own = weights + slot.to(tl.int64) * weights_slot
        holds = tl.load(own, mask=slot < K, other=0.0) != 0.0
    total = tl.zeros([BLOCK_E], tl.float32)
    # From one slot that holds the frame to the next.
    at = tl.min(tl.where(holds, slot, BLOCK_K), 0)
    while at < BLOCK_K:
        share = tl.load(weights if SOFT else weights + at.to(tl.int64) * weights_slot)
        g = tl.load(grad + at.to(tl.int64) * grad_slot * UNIT + e, mask=inside, other=0.0)
        total = tl.fma(share, g.to(tl.float32), total)
        at = tl.min(tl.where(holds & (slot > at), slot, BLOCK_K), 0)
    tl.store(to + (row * N + frame) * size * UNIT + e, total, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def gather_weights_kernel(
    grad, values, to,
    grad_row, grad_slot, values_row, values_frame, N, K, size, each,
    UNIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the weights, a tile of slots and frames: a product of matrices.

    In parts [R,parts,K,N], of `each` blocks of the frames' E numbers.
    """
    over_k, over_n = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    parts = tl.maximum(tl.cdiv(size * UNIT, each * BLOCK_E), 1)
    program = tl.program_id(0).to(tl.int64)
    part, row = program // (over_k * over_n) % parts, program // (over_k * over_n * parts)
    begin = part.to(tl.int32) * each * BLOCK_E
    slot = (program % over_k).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    frame = (program // over_k % over_n).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad += row * grad_row * UNIT + slot.to(tl.int64)[:, None] * grad_slot * UNIT
    values += row * values_row * UNIT + frame.to(tl.int64)[:, None] * values_frame * UNIT
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    # Its end so that no sum passes 2³¹ where E does not.
    for first in range(begin, begin + tl.minimum(each * BLOCK_E, size * UNIT - begin), BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        inside = (e < size * UNIT)[None, :]
        g = tl.load(grad + e[None, :], mask=(slot < K)[:, None] & inside, other=0.0)
        x = tl.load(values + e[None, :], mask=(frame < N)[:, None] & inside, other=0.0)
        total = product(g, tl.trans(x), total, OPERAND, PRECISION)
    at = to + ((row * parts + part) * K + slot[:, None]) * N + frame[None, :]
    tl.store(at, total, mask=(slot < K)[:, None] & (frame < N)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def gather_shares_kernel(
    grad, values, indices, to,
    grad_row, grad_slot, values_row, values_frame, N, K, size,
    UNIT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of a soft set's weights [R,N], of the frame in one slot."""
    program = tl.program_id(0).to(tl.int64)
    row, slot = program // K, program % K
    frame = tl.load(indices + program)
    if frame >= 0:
        grad += (row * grad_row + slot * grad_slot) * UNIT
        values += (row * values_row + frame * values_frame) * UNIT
        total = tl.zeros([BLOCK_E], tl.float32)
        for first in range(0, size * UNIT, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            inside = e < size * UNIT
            g = tl.load(grad + e, mask=inside, other=0.0).to(tl.float32)
            total = tl.fma(g, tl.load(values + e, mask=inside, other=0.0).to(tl.float32), total)
        tl.store(to + row * N + frame, tl.sum(total, 0))


# ---------------------------------------------------------------------------------------------
# Launches of topk_sample

EXACT = {"enable_fp_fusion": False}
"""How kernels are compiled that draw noise."""


class Settings(NamedTuple):
    """How the work on a row of frames is cut."""

    warps: int
    """Of programs that hold the row."""
    registers: int
    """Of a thread of these, at most."""
    few: int
    """Frames of the smallest tile for those that can be chosen; the next one has twice as many. No
    less than the row has: there is no such tile."""
    tile: int
    """Samples times frames of a tile."""
    quads: int = 16
    """`gradient_kernel`'s tile: so many quads of frames ..."""
    together: int = 16
    """... and samples."""
    gradient_warps: int = 4


_SM_80 = {
    # frames of a row: settings. 16 keys to a thread, and one warp where that is enough: it
    # counts without a barrier.
    64: Settings(1, 168, 64, 512),
    128: Settings(1, 200, 32, 512),
    256: Settings(1, 168, 32, 512),
    512: Settings(1, 168, 64, 512),
    1024: Settings(2, 224, 128, 1024),
    2048: Settings(4, 255, 256, 2048),
    4096: Settings(8, 255, 512, 4096),
}
_TABLES = {"sm_80": _SM_80}  # and every GPU that is not named, and the interpreter

_PROGRAMS, _MOST_SAMPLES = 8192, 64
"""As many programs draw samples at least, where there are samples enough; and as many samples one
of them draws at most."""


def settings(arch: str, frames: int) -> Settings:
    """Settings for rows of so many frames."""
    table = _TABLES.get(arch, _SM_80)
    return table[max(64, triton.next_power_of_2(frames))]


def _whole_row(scores: Tensor) -> dict[str, int]:
    """Settings of a kernel whose programs hold a row each."""
    arch, frames = _triton.architecture(scores.device), scores.shape[1]
    cut = settings(arch, frames)
    return {
        "BLOCK_N": _triton.padded(frames),
        "num_warps": cut.warps,
        "num_stages": 1,
        **_triton.registers(arch, cut.registers),
    }


def _choose(
    scores: Tensor,
    k: int,
    order: str,
    indices: Tensor | None,
    weights: Tensor | None = None,
    plan: Tensor | None = None,
    *,
    gumbel: bool = False,
    seed: Tensor | None = None,
    row_offset: int = 0,
    noise: Tensor | None = None,
    sigma: float = 0.0,
    bounded: bool = True,
) -> None:
    """Launch `choice_kernel`."""
    rows, frames = scores.shape
    _triton.launch(
        choice_kernel,
        rows,
        *(scores, seed, noise, indices, weights, plan),
        *(scores.stride(0), 0 if noise is None else noise.stride(0), row_offset),
        *(frames, k, sigma),
        GUMBEL=gumbel,
        BY_SCORE=order == "score",
        BOUNDED=bounded,
        **_whole_row(scores),
        **EXACT,
    )


def _empty_indices(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(len(scores), k, dtype=torch.int64)


def hard(scores: Tensor, k: int, order: str) -> tuple[Tensor, Tensor]:
    """As `reference.hard`."""
    scores, indices = rows_contiguous(scores), _empty_indices(scores, k)
    weights = scores.new_empty(len(scores), k, scores.shape[1])
    _choose(scores, k, order, indices, weights)
    return weights, indices


class _Draws(NamedTuple):
    """Samples of "perturbed", of which three kernels see something."""

    scores: Tensor
    k: int
    sigma: float
    samples: int
    seed: Tensor
    row_offset: int
    noise: Tensor | None
    order: str

    @property
    def strides(self) -> tuple[int, int, int]:
        given = (0, 0) if self.noise is None else self.noise.stride()[:2]
        return self.scores.stride(0), *given

    def plan(self, indices: Tensor | None) -> Tensor:
        """Each row's plan; its choice goes to `indices`, if given."""
        rows, frames = self.scores.shape
        plan = self.scores.new_empty(rows, 2 * frames + 3, dtype=torch.int32)
        bounded = self.noise is None
        _choose(
            *(self.scores, self.k, self.order, indices, None, plan),
            sigma=self.sigma,
            bounded=bounded,
        )
        return plan

    def each(self) -> int:
        """How many samples a program draws: it depends on shapes and the architecture alone."""
        cut = settings(_triton.architecture(self.scores.device), self.scores.shape[1])
        tile = cut.tile // min(cut.few, _triton.padded(self.scores.shape[1]))
        wanted = triton.cdiv(len(self.scores) * self.samples, _PROGRAMS)
        return triton.cdiv(min(max(wanted, 1), _MOST_SAMPLES), tile) * tile

    def run(
        self,
        plan: Tensor,
        indices: Tensor,
        grad: Tensor | None = None,
        *,
        counts: Tensor | None = None,
        gains: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Launch `sample_kernel`."""
        rows, frames = self.scores.shape
        cut = settings(_triton.architecture(self.scores.device), frames)
        padded, each = _triton.padded(frames), self.each()
        _triton.launch(
            sample_kernel,
            rows * triton.cdiv(self.samples, each),
            *(self.scores, plan, self.seed, self.noise, grad, indices, counts, gains, sums),
            *self.strides,
            *((0, 0) if grad is None else grad.stride()[:2]),
            *(self.row_offset, frames, self.k, self.samples, each, self.sigma),
            BY_SCORE=self.order == "score",
            FEW=min(cut.few, padded),
            TILE=cut.tile,
            **_whole_row(self.scores),
            **EXACT,
        )


def perturbed(
    scores: Tensor,
    k: int,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.perturbed`."""
    scores, noise = rows_contiguous(scores), specification.noise_rows(noise)
    indices = _empty_indices(scores, k)
    weights = scores.new_zeros(len(scores), k, scores.shape[1])
    counts = weights.view(torch.int32)  # 0 in both
    draws = _Draws(scores, k, sigma, samples, seed, row_offset, noise, order)
    draws.run(draws.plan(indices), indices, counts=counts)
    block = 1024
    _triton.launch(
        share_kernel,
        triton.cdiv(counts.numel(), block),
        *(counts, weights, counts.numel(), samples),
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
    return weights, indices


def perturbed_backward(
    grad: Tensor,
    scores: Tensor,
    indices: Tensor,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> Tensor:
    """As `reference.perturbed_backward`."""
    if sigma <= 2.0**-150:  # 0 in float32
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    grad, scores, indices = rows_contiguous(grad), rows_contiguous(scores), indices.contiguous()
    noise = specification.noise_rows(noise)
    rows, frames = scores.shape
    draws = _Draws(scores, indices.shape[1], sigma, samples, seed, row_offset, noise, order)
    plan = draws.plan(None)
    if gradient == "diagonal":
        sums = scores.new_zeros(rows, triton.cdiv(samples, draws.each()), frames)
        draws.run(plan, indices, grad, sums=sums)
        return sums.sum(1).div_(samples).div_(sigma)
    gains = scores.new_zeros(rows, samples)
    draws.run(plan, indices, grad, gains=gains)
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    cut = settings(_triton.architecture(scores.device), frames)
    _triton.launch(
        gradient_kernel,
        rows * triton.cdiv(frames, 4 * cut.quads),
        *(gains, scores, seed, noise, found),
        *draws.strides,
        *(row_offset, frames, samples, sigma),
        SAMPLES=cut.together,
        QUADS=cut.quads,
        num_warps=cut.gradient_warps,
        num_stages=1,
        **EXACT,
    )
    return found


def gumbel(
    scores: Tensor,
    k: int,
    temperature: float,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.gumbel`."""
    scores, indices = rows_contiguous(scores), _empty_indices(scores, k)
    weights = scores.new_empty(len(scores), k, scores.shape[1])
    _choose(
        *(scores, k, order, indices, weights),
        gumbel=True,
        seed=seed,
        row_offset=row_offset,
        noise=specification.noise_rows(noise),
    )
    return weights, indices


def gumbel_backward(
    grad: Tensor,
    scores: Tensor,
    indices: Tensor,
    temperature: float,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
) -> Tensor:
    """As `reference.gumbel_backward`."""
    grad, scores, noise = (
        rows_contiguous(grad),
        rows_contiguous(scores),
        specification.noise_rows(noise),
    )
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    rows, frames = scores.shape
    _triton.launch(
        gumbel_backward_kernel,
        rows,
        *(grad, scores, indices.contiguous(), seed, noise, found),
        *(*grad.stride()[:2], scores.stride(0), 0 if noise is None else noise.stride(0)),
        *(row_offset, frames, indices.shape[1], temperature),
        **_whole_row(scores),
        **EXACT,
    )
    return found


def lapsum(scores: Tensor, k: int, temperature: float, order: str) -> tuple[Tensor, Tensor]:
    """As `reference.lapsum`."""
    scores, indices = rows_contiguous(scores), _empty_indices(scores, k)
    _choose(scores, k, order, indices)
    return _lapsum(scores, None, k, temperature), indices


def lapsum_backward(grad: Tensor, scores: Tensor, k: int, temperature: float) -> Tensor:
    """As `reference.lapsum_backward`."""
    return _lapsum(rows_contiguous(scores), rows_contiguous(grad), k, temperature)


def _lapsum(scores: Tensor, grad: Tensor | None, k: int, temperature: float) -> Tensor:
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    rows, frames = scores.shape
    _triton.launch(
        lapsum_kernel,
        rows,
        *(scores, grad, found, scores.stride(0), 0 if grad is None else grad.stride(0)),
        *(frames, k, *struct.unpack("q", struct.pack("d", temperature)), math.log(2 * frames)),
        **_whole_row(scores),
    )
    return found


# ---------------------------------------------------------------------------------------------
# Launches of topk_gather

_PARTS = 1024, 8
"""About so many programs form the gradient of weights, if each has so many blocks of E at least."""


def _part(values: Tensor) -> dict[str, int]:
    """How much of a frame a program takes: two vectors of 16 bytes for each of its threads."""
    most = 4096 // values.element_size()
    return {"BLOCK_E": min(_triton.padded(values.shape[2]), most), "num_warps": 4, "num_stages": 1}


def _unit(*tensors: Tensor) -> int:
    """What strides and sizes of frames are multiples of; see `_triton.unit`."""
    return math.gcd(_triton.unit(*tensors), tensors[0].shape[2])


def gather(values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """As `reference.gather`."""
    values, weights, indices = (
        rows_contiguous(values),
        rows_contiguous(weights),
        indices.contiguous(),
    )
    (rows, slots), (frames, width) = indices.shape, values.shape[1:]
    out = values.new_empty(rows, slots, width)
    soft = weights.dim() == 2
    entries = counts = None
    strides = weights.stride(0), 0 if soft else weights.stride(1)
    if not soft and width:
        entries = values.new_empty(rows, slots, frames, dtype=torch.int32)
        counts = values.new_empty(rows, slots, dtype=torch.int32)
        _triton.launch(
            entries_kernel,
            rows * slots,
            *(weights, entries, counts, *strides, frames, slots),
            BLOCK=512,
            num_warps=1,
            num_stages=1,
        )
    unit, cut = _unit(values), _part(values)
    _triton.launch(
        gather_kernel,
        rows * slots * triton.cdiv(width, cut["BLOCK_E"]),
        *(values, weights, indices, entries, counts, out),
        *(values.stride(0) // unit, values.stride(1) // unit, *strides),
        *(frames, slots, width // unit),
        SOFT=soft,
        UNIT=unit,
        **cut,
    )
    return out


def gather_backward(
    grad: Tensor, values: Tensor, weights: Tensor, indices: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.gather_backward`."""
    grad, values, weights = map(rows_contiguous, (grad, values, weights))
    indices = indices.contiguous()
    (rows, slots), (frames, width) = indices.shape, values.shape[1:]
    soft = weights.dim() == 2
    unit, cut = _unit(grad, values), _part(values)
    of_grad = grad.stride(0) // unit, grad.stride(1) // unit
    of_values = values.stride(0) // unit, values.stride(1) // unit
    sizes = frames, slots, width // unit
    grad_values = grad_weights = None
    if needs[0]:
        grad_values = values.new_empty(values.shape)
        _triton.launch(
            gather_values_kernel,
            rows * frames * triton.cdiv(width, cut["BLOCK_E"]),
            *(grad, weights, indices, grad_values, *of_grad),
            *(weights.stride(0), 0 if soft else weights.stride(1), *sizes),
            SOFT=soft,
            UNIT=unit,
            BLOCK_K=_triton.padded(slots),
            **cut,
        )
    if needs[1] and soft:
        grad_weights = weights.new_zeros(weights.shape)
        _triton.launch(
            gather_shares_kernel,
            rows * slots,
            *(grad, values, indices, grad_weights, *of_grad, *of_values, *sizes),
            UNIT=unit,
            **cut,
        )
    elif needs[1]:
        tile = _product_tile(values.dtype, slots, _triton.architecture(values.device))
        tiles = rows * triton.cdiv(slots, tile["BLOCK_K"]) * triton.cdiv(frames, tile["BLOCK_N"])
        blocks = triton.cdiv(width, tile["BLOCK_E"])
        wanted, fewest = _PARTS
        each = max(1, min(blocks, max(fewest, triton.cdiv(blocks * tiles, wanted))))
        parts = max(1, triton.cdiv(blocks, each))
        sums = weights.new_empty(rows, parts, slots, frames)
        _triton.launch(
            gather_weights_kernel,
            tiles * parts,
            *(grad, values, sums, *of_grad, *of_values, *sizes, each),
            UNIT=unit,
            **tile,
        )
        grad_weights = sums.view(weights.shape) if parts == 1 else sums.sum(1)
    return grad_values, grad_weights


def _product_tile(dtype: torch.dtype, slots: int, arch: str) -> dict[str, Any]:
    operands = _triton.operands(dtype, arch)
    half = dtype.itemsize == 2
    rows = min(_triton.padded(slots), 64 if half else 32)
    return {
        "BLOCK_K": rows,
        "BLOCK_N": 64,
        "BLOCK_E": 64 if half else 32,
        "OPERAND": operands["OPERAND"],
        "PRECISION": operands["PRECISION"],
        "num_warps": 4,
        "num_stages": 3,
        **_triton.registers(arch, 0 if half and rows != 32 else 128),
    }
