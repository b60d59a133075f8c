"""Noise that is a function of (seed, row, sample, frame) alone: Philox-4x32-10 in plain PyTorch.

So a row's noise is the same however a batch is split. The words are those of Random123's generator;
the map from words to normals goes through erfinv and may differ in the last bit between machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters at a time: the working set stays in a core's second-level cache


def normal_noise(
    rows: int, samples: int, frames: int, seed: int | Tensor, row_offset: int, device: torch.device
) -> Tensor:
    """Standard normals [rows,samples,frames] in float32."""
    noise = torch.empty(rows, samples, frames, device=device)
    # 1 - 2**-24 is the largest float32 below 1: erfinv stays finite, |z| below 5.5.
    limit = 1 - 2**-24
    for part, words in _words(rows, samples, frames, seed, row_offset, device):
        centred = torch.empty(words.shape, device=device)
        centred.copy_(words.sub_(2**31)).add_(0.5).mul_(2**-31).clamp_(-limit, limit)
        noise[part] = centred.erfinv_().mul_(math.sqrt(2))[..., :frames]
    return noise


def gumbel_noise(
    rows: int, samples: int, frames: int, seed: int | Tensor, row_offset: int, device: torch.device
) -> Tensor:
    """Standard Gumbels [rows,samples,frames] in float32, through float64 for the upper tail."""
    noise = torch.empty(rows, samples, frames, device=device)
    for part, words in _words(rows, samples, frames, seed, row_offset, device):
        uniform = words.double().add_(0.5).mul_(2**-32)
        noise[part] = uniform.log_().neg_().log_().neg_()[..., :frames].float()
    return noise


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
