"""Noise that is a function of (seed, row, sample, frame) alone, in plain PyTorch.

So a row's noise is the same however a batch is split, and the same bits on every machine: words of
Philox-4x32-10, and maps from words to normals and Gumbels made of operations that IEEE 754 rounds
in one way only. `docs/noise.md` is their specification; every backend computes the same.

No operation here may be fused or reordered: a multiply-add rounds once where these round twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vd_kernels._checks import rows_contiguous

_WORD = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters at a time: the working set stays in a core's second-level cache

LOG2 = (
    float.fromhex("0x1.715476p+0"),
    float.fromhex("-0x1.715470p-1"),
    float.fromhex("0x1.ec73d6p-2"),
    float.fromhex("-0x1.715c4ep-2"),
    float.fromhex("0x1.26d384p-2"),
    float.fromhex("-0x1.e95be8p-3"),
    float.fromhex("0x1.b9c91cp-3"),
    float.fromhex("-0x1.a87d02p-3"),
    float.fromhex("0x1.01b6c6p-3"),
)
"""log2(1 + h) / h over 1/sqrt(2) <= 1 + h < sqrt(2), lowest power first."""

PROBIT = (
    float.fromhex("0x1.00932ap+2"),
    float.fromhex("0x1.4ef5b6p+0"),
    float.fromhex("-0x1.a90c08p-6"),
    float.fromhex("0x1.5c2a52p-9"),
    float.fromhex("0x1.de2860p-10"),
    float.fromhex("-0x1.c678f4p-9"),
    float.fromhex("0x1.75a73cp-9"),
    float.fromhex("-0x1.db4796p-13"),
    float.fromhex("-0x1.1f54e0p-11"),
    float.fromhex("0x1.0e46cap-14"),
    float.fromhex("0x1.58abc8p-15"),
)
"""|z| / (1 - 2p) in powers of sqrt(3 - log2(4p (1 - p))) - 4, lowest first."""

_SQRT_HALF = 0x3F3504F3  # the bits of 1/sqrt(2) in float32
LN2 = float.fromhex("0x1.62e430p-1")
MINUS_LN_LN2 = float.fromhex("0x1.774f2ap-2")
LARGEST_NORMAL = float.fromhex("0x1.95a1d4p+2")
"""No normal is further from 0."""


def normal_noise(
    rows: int, samples: int, frames: int, seed: int | Tensor, row_offset: int, device: torch.device
) -> Tensor:
    """Standard normals [rows,samples,frames] in float32, -6.34 < z < 6.34."""
    return _noise(normal_of, rows, samples, frames, seed, row_offset, device)


def gumbel_noise(
    rows: int, samples: int, frames: int, seed: int | Tensor, row_offset: int, device: torch.device
) -> Tensor:
    """Standard Gumbels [rows,samples,frames] in float32, -3.13 < g < 22.88."""
    return _noise(gumbel_of, rows, samples, frames, seed, row_offset, device)


def _noise(
    of_words: Callable[[Tensor], Tensor],
    rows: int,
    samples: int,
    frames: int,
    seed: int | Tensor,
    row_offset: int,
    device: torch.device,
) -> Tensor:
    noise = torch.empty(rows, samples, frames, dtype=torch.float32, device=device)
    for part, words in _words(rows, samples, frames, seed, row_offset, device):
        noise[part] = of_words(words)[..., :frames]
    return noise


def noise_rows(noise: Tensor | None) -> Tensor | None:
    """Noise that was given, as compiled kernels read it: rows of float32, whatever lies between."""
    return None if noise is None else rows_contiguous(noise.float())


def normal_of(words: Tensor) -> Tensor:
    """The normal that each word 0 .. 2^32 - 1 (int64) stands for, float32.

    Φ^-1((word + 1/2) / 2^32) with a relative error below 8e-6.
    """
    upper, tail, centre = _fold(words)
    # y = 4p (1 - p) for the tail probability p = tail / 2^32
    y = tail * 2.0**-30 * (1.0 - tail * 2.0**-32)
    h, k = _split(y)
    # Torch may leave a float32 root to MKL, whose last bit is not always the right one. A float64
    # root, even one off by a bit, rounds to the right float32 one.
    root = (3.0 - _log2(h, k)).double().sqrt_().float().sub_(4.0)
    size = _polynomial(PROBIT, root).mul_(centre * 2.0**-31)
    return torch.where(upper, size, -size)


def gumbel_of(words: Tensor) -> Tensor:
    """The Gumbel that each word 0 .. 2^32 - 1 (int64) stands for, float32.

    -ln(-ln((word + 1/2) / 2^32)) with an error below 1e-6 of the larger of itself and 1.
    """
    upper, tail, _ = _fold(words)
    p = tail * 2.0**-32
    # u = p or 1 - p; close below 1 its distance from 1 is known better than itself.
    h, k = _split(torch.where(upper, 1.0 - p, p))
    h = torch.where(k == 0, -p, h)
    exponential = -_log2(h, k)  # in units of ln 2
    h, k = _split(exponential)
    return MINUS_LN_LN2 - _log2(h, k) * LN2


def _fold(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Is the word in the upper half; its distances from the nearer end and from the middle.

    Both are float32, in units of one word, 1/2 to 2^31.
    """
    upper = words >= 2**31
    tail = torch.where(upper, _WORD - words, words)
    centre = (2**31 - 1) - tail
    return upper, tail.float() + 0.5, centre.float() + 0.5


def _split(y: Tensor) -> tuple[Tensor, Tensor]:
    """y = (1 + h) 2^k with 1/sqrt(2) <= 1 + h < sqrt(2): h float32, k int32, of normal y > 0."""
    bits = y.view(torch.int32)
    k = (bits - _SQRT_HALF) >> 23
    return (bits - (k << 23)).view(torch.float32).sub_(1.0), k


def _log2(h: Tensor, k: Tensor) -> Tensor:
    """log2((1 + h) 2^k)."""
    return _polynomial(LOG2, h).mul_(h).add_(k.float())


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule from the highest power, each step a multiplication, then an addition."""
    *lower, highest = coefficients
    result = torch.full_like(x, highest)
    for coefficient in reversed(lower):
        result.mul_(x).add_(coefficient)
    return result


def _words(
    rows: int, samples: int, frames: int, seed: int | Tensor, row_offset: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Words int64 [part of rows, samples, frames rounded up to 4] with the slice of rows."""
    quads = -(-frames // 4)
    key = (seed & _WORD, (seed >> 32) & _WORD)
    quad = torch.arange(quads, device=device)
    sample = torch.arange(samples, device=device).view(-1, 1)
    step = max(1, _CHUNK // max(1, samples * quads))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        row = torch.arange(part.start, part.stop, device=device).view(-1, 1, 1) + row_offset
        words = philox((quad, sample, row & _WORD, (row >> 32) & _WORD), key)
        yield part, torch.stack(words, -1).view(-1, samples, 4 * quads)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011): four words in int64 from four counter words that
    broadcast against each other and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap around in int64, which keeps their 64 bits; words are cut to 32 bits when
        # they are multiplied next, so c1 and c3 may carry more between rounds.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & _WORD, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & _WORD, p0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD
