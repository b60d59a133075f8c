"""Sizes at which the C++ kernels divide their work in all the ways that they have, and write around
the cache: the same bits for any number of threads, and the reference's results up to rounding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vd_kernels import language_gate, spacetime_attention, topk_gather, topk_sample, use_backend
from vd_kernels.backends import explain, load_cpu_kernels
from vd_kernels.testing import normal

Case = tuple[Callable[..., Any], dict[str, Tensor]]
"""An operator with what needs no gradient, and tensors that do."""


def mask(*shape: int) -> Tensor:
    return normal(*shape, seed=9) > -0.5


def gate(length: int, heads: int, width: int, channel: bool = False, **settings: Any) -> Case:
    batch, tokens = 2, 33
    tensors = {
        "query": normal(batch, length, heads, width),
        "key": normal(batch, tokens, heads, width, seed=1),
        "value": normal(batch, length, heads, width, seed=2),
        "bias": normal(heads, width, seed=3) if channel else normal(heads, seed=3),
    }
    if channel:
        tensors["gate_value"] = normal(batch, tokens, heads, width, seed=4)
    settings |= {"key_mask": mask(batch, tokens), "return_gate": True}
    return partial(language_gate, **settings), tensors


def attention(sizes: tuple[int, ...], axis: str, prefixes: int = 0, **settings: Any) -> Case:
    batch, frames, patches, heads, width = sizes
    names = ("query", "key", "value")
    tensors = {name: normal(*sizes, seed=i) for i, name in enumerate(names)}
    tensors["gate"] = normal(batch, 1, patches, heads, 1, seed=3)
    if prefixes:
        shared = (batch, 1, prefixes, heads, width)
        tensors |= {f"prefix_{name}": normal(*shared, seed=4 + i) for i, name in enumerate(names)}
    settings |= {"axis": axis, "key_mask": mask(batch, frames, patches)}
    return partial(spacetime_attention, **settings), tensors


def choice(rows: int, method: str, **settings: Any) -> Case:
    def weights(scores: Tensor) -> Tensor:
        return topk_sample(scores, 16, method=method, **settings).weights

    return weights, {"scores": normal(rows, 203)}


def gather(method: str) -> Case:
    sample = topk_sample(normal(3, 100), 7, method=method, sigma=0.3, seed=1)

    def gathered(values: Tensor, weights: Tensor) -> Tensor:
        return topk_gather(values, sample._replace(weights=weights))

    return gathered, {"values": normal(3, 100, 5008), "weights": sample.weights}


PERTURBED: dict[str, Any] = {"method": "perturbed", "sigma": 0.5, "seed": 2}
CASES: dict[str, Callable[[], Case]] = {
    "gate": lambda: gate(197, 5, 40),
    "gate-max": lambda: gate(197, 5, 40, reduction="max"),
    "gate-mean": lambda: gate(197, 5, 40, reduction="mean"),
    "gate-channel": lambda: gate(197, 5, 40, channel=True),
    "gate-large": lambda: gate(1051, 8, 64),
    "gate-channel-large": lambda: gate(1051, 8, 64, channel=True),
    "time": lambda: attention((2, 9, 13, 5, 24), "time", prefixes=2),
    "time-large": lambda: attention((2, 16, 67, 8, 64), "time"),
    "space": lambda: attention((2, 9, 13, 5, 24), "space", prefixes=2),
    "space-large": lambda: attention((2, 16, 67, 8, 64), "space"),
    "joint": lambda: attention((2, 9, 13, 5, 24), "joint", prefixes=2),
    "hard": lambda: choice(96, "hard"),
    "perturbed-few": lambda: choice(3, **PERTURBED, num_samples=130),
    "perturbed-many": lambda: choice(70, **PERTURBED, num_samples=3),
    "perturbed-by-score": lambda: choice(3, **PERTURBED, num_samples=130, order="score"),
    "diagonal-few": lambda: choice(3, **PERTURBED, num_samples=130, gradient="diagonal"),
    "gumbel": lambda: choice(13, "gumbel", seed=2),
    "lapsum": lambda: choice(13, "lapsum", temperature=0.2),
    "gather": lambda: gather("perturbed"),
    "gather-lapsum": lambda: gather("lapsum"),
}


def results(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    function, tensors = case
    # Weights of a choice are always float32.
    given = {name: x if name == "weights" else x.to(dtype) for name, x in tensors.items()}
    given = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    found = function(**given)
    found = list(found) if isinstance(found, tuple) else [found]
    if not found[0].requires_grad:  # a hard choice
        return found
    grads = [normal(*x.shape, seed=5, dtype=x.dtype) for x in found]
    return [*found, *torch.autograd.grad(found, list(given.values()), grads)]


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The last levels differ from the one before in bfloat16 alone, and choices are made in float32.
ON_LEVELS = [
    (name, dtype, level)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for level in ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
    if dtype == torch.bfloat16 or level not in ("avx512_bf16", "amx")
    if dtype == torch.float32 or name.startswith(("gate", "time", "space", "joint", "gather"))
]


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize(("name", "dtype", "level"), ON_LEVELS, ids=str)
def test_divided_work(
    name: str, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := load_cpu_kernels():
        pytest.skip(reason)
    if level not in explain().cpu_isa:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv("VD_CPU_ISA", level)
    case = CASES[name]()
    with use_backend("reference"):
        expected = results(case, dtype)
    counts = (1, 2, 5, 5)
    if os.environ.get("VD_SANITIZE") == "thread" and dtype != torch.float32:
        # torch converts tensors on as many threads, whose waiting for each other cannot be seen.
        counts = (1, 1)
    with use_backend("cpp"):
        runs = []
        for threads in counts:
            torch.set_num_threads(threads)
            runs.append(results(case, dtype))
    for true, one, *others in zip(expected, *runs, strict=True):
        assert all(torch.equal(one, other) for other in others)
        if true.dtype == torch.float32:
            allowed = 1e-5 * true.abs().max().item()
            torch.testing.assert_close(one, true, rtol=1e-4, atol=allowed)
        else:  # a few roundings, and now and then another best word
            error = (one.double() - true.double()).norm() / true.double().norm()
            assert error <= 4 * torch.finfo(dtype).eps
