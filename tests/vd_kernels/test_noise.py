"""The noise against its specification, docs/noise.md, and against the distributions it is to have.

The specification is programmed here once more, in numpy, with the constants that its text gives.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vd_kernels.topk_sampling.noise import (
    gumbel_noise,
    gumbel_of,
    normal_noise,
    normal_of,
    philox,
)

CPU = torch.device("cpu")
SPECIFICATION = (Path(__file__).parents[2] / "docs" / "noise.md").read_text(encoding="utf-8")
F = np.float32


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        high, low = divmod(0xD2511F53 * counter[0], 2**32)
        high2, low2 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high2 ^ counter[1] ^ key[0], low2, high ^ counter[3] ^ key[1], low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123, kat_vectors
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    assert [int(w) for w in philox(tuple(map(torch.tensor, counter)), tuple(key))] == words
    assert philox_in_python(counter, key) == words


# The specification, once more


def coefficients(name: str) -> list[np.float32]:
    block = re.search(rf"^    {name}   ((?:-?0x\S+\s+)+)", SPECIFICATION, re.MULTILINE)
    return [F(float.fromhex(text)) for text in block[1].split()]


def horner(c: list[np.float32], x: np.ndarray) -> np.ndarray:
    result = np.full_like(x, c[-1])
    for coefficient in c[-2::-1]:
        result = result * x
        result = result + coefficient
    return result


def fold(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    upper = w >= 1 << 31
    t = np.where(upper, (1 << 32) - 1 - w, w).astype(np.int32)
    return upper, t.astype(F) + F(0.5), (np.int32(2**31 - 1) - t).astype(F) + F(0.5)


def split(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits = y.view(np.int32)
    k = (bits - np.int32(0x3F3504F3)) >> 23
    return (bits - (k << 23)).view(F) - F(1), k


def log2(h: np.ndarray, k: np.ndarray) -> np.ndarray:
    return horner(coefficients("L"), h) * h + k.astype(F)


def specified_normal(w: np.ndarray) -> np.ndarray:
    upper, tail, centre = fold(w)
    y = (tail * F(2.0**-30)) * (F(1) - tail * F(2.0**-32))
    r = np.sqrt(F(3) - log2(*split(y))) - F(4)
    z = horner(coefficients("Q"), r) * (centre * F(2.0**-31))
    return np.where(upper, z, -z)


def specified_gumbel(w: np.ndarray) -> np.ndarray:
    upper, tail, _ = fold(w)
    p = tail * F(2.0**-32)
    h, k = split(np.where(upper, F(1) - p, p))
    h = np.where(k == 0, -p, h)
    first, second = re.search(r"g = (0x\S+) − log2\(h, k\) · (0x\S+)", SPECIFICATION).groups()
    e = -log2(h, k)
    return F(float.fromhex(first)) - log2(*split(e)) * F(float.fromhex(second))


def bits_of(x: Tensor | np.ndarray) -> list[int]:
    return np.asarray(x, F).view(np.uint32).ravel().tolist()


def many_words() -> Tensor:
    """Random ones, both ends, the middle, and powers of two."""
    random = torch.randint(0, 2**32, (10**6,), generator=torch.Generator().manual_seed(0))
    few = torch.arange(3000)
    powers = 2 ** torch.arange(32)
    return torch.cat([random, few, ONES - few, 2**31 - 1500 + few, powers, powers - 1])


@pytest.mark.parametrize(
    ("ours", "specified"), [(normal_of, specified_normal), (gumbel_of, specified_gumbel)]
)
def test_the_specification_gives_the_same_bits(ours, specified) -> None:
    words = many_words()
    assert bits_of(ours(words)) == bits_of(specified(words.numpy()))


def test_known_answers() -> None:
    rows = re.findall(r"^\| (\w{8}) \| (\w{8}) \| (\w{8}) \|", SPECIFICATION, re.MULTILINE)
    assert len(rows) == 16
    words, normals, gumbels = (
        [int(text, 16) for text in column] for column in zip(*rows, strict=True)
    )
    assert bits_of(normal_of(torch.tensor(words))) == normals
    assert bits_of(gumbel_of(torch.tensor(words))) == gumbels
    draws = re.findall(r"^\| ([01]) \| ((?:\w{8} ){4}\w{8}) \|", SPECIFICATION, re.MULTILINE)
    assert len(draws) == 2
    expected = [int(text, 16) for _, draw in draws for text in draw.split()]
    assert bits_of(normal_noise(1, 2, 5, 42, 7, CPU)) == expected


@pytest.mark.parametrize("seed", [0, 3, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("row_offset", [0, 5, 2**32 - 1])
def test_noise_is_a_function_of_seed_row_sample_and_frame(seed: int, row_offset: int) -> None:
    rows, samples, frames = 2, 3, 6
    key = [seed % 2**32, (seed >> 32) % 2**32]
    words = []
    for r, i, t in itertools.product(range(rows), range(samples), range(frames)):
        row = row_offset + r
        words.append(philox_in_python([t // 4, i, row % 2**32, row >> 32], key)[t % 4])
    words = torch.tensor(words).view(rows, samples, frames)
    size = (rows, samples, frames, seed, row_offset, CPU)
    assert torch.equal(normal_noise(*size), normal_of(words))
    assert torch.equal(gumbel_noise(*size), gumbel_of(words))


# The distributions


def test_errors_are_as_small_as_specified() -> None:
    words = many_words()
    u, rest = (words.double() + 0.5) / 2**32, (ONES - words.double() + 0.5) / 2**32
    quantile = torch.special.ndtri(torch.minimum(u, rest)) * torch.where(u < rest, 1.0, -1.0)
    error = normal_of(words).double() / quantile - 1
    assert error.abs().max() < 8e-6
    exponential = torch.where(u < rest, -u.log(), -torch.log1p(-rest))
    gumbel = -exponential.log()
    error = (gumbel_of(words).double() - gumbel) / gumbel.abs().clamp(min=1)
    assert error.abs().max() < 1e-6


def test_all_words_together_have_the_distribution() -> None:
    """A million evenly spaced words: moments, tails to 5 sigma, Kolmogorov's distance."""
    count = 10**6
    words = (torch.arange(count) * 2**32 + 2**31) // count
    rank = (torch.arange(count) + 0.5) / count
    z = normal_of(words).double()
    moments = [z.pow(n).mean().item() for n in range(1, 7)]
    assert moments == pytest.approx([0, 1, 0, 3, 0, 15], abs=2e-2, rel=1e-3)
    assert (torch.special.ndtr(z) - rank).abs().max() < 1e-5
    g = gumbel_of(words).double()
    assert g.mean().item() == pytest.approx(0.5772157, abs=1e-4)
    assert g.var().item() == pytest.approx(torch.pi**2 / 6, rel=1e-3)
    assert (g.neg().exp().neg().exp() - rank).abs().max() < 1e-5
    tail = torch.arange(2**20)  # every word below 2^20: z from -6.3 to -3.5
    z = normal_of(tail).double()
    for sigma in (4.0, 4.5, 5.0):
        beyond = (z < -sigma).sum().item() / 2**32
        expected = torch.special.ndtr(torch.tensor(-sigma, dtype=torch.float64)).item()
        assert beyond == pytest.approx(expected, rel=1e-3)


def test_a_million_draws_have_the_distribution() -> None:
    normals = normal_noise(10, 100, 1000, 1, 0, CPU).double().flatten()
    assert abs(normals.mean()) < 4e-3  # four standard errors, as in the next two lines
    assert abs(normals.var() - 1) < 6e-3
    assert abs(normals.pow(4).mean() - 3) < 0.04
    assert 4.2 < normals.abs().max() < 6
    rank = (torch.arange(10**6) + 0.5) / 10**6
    assert (torch.special.ndtr(normals.sort().values) - rank).abs().max() < 1e-3
    gumbels = gumbel_noise(10, 100, 1000, 1, 0, CPU).double().flatten()
    assert ((-(-gumbels.sort().values).exp()).exp() - rank).abs().max() < 1e-3
    frames = normals.view(-1, 1000)[:, :8]
    correlation = torch.corrcoef(frames.T) - torch.eye(8)
    assert correlation.abs().max() < 0.16  # five standard errors of 1,000 pairs
