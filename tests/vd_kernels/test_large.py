"""The C++ kernels beyond 2^31 elements, 65,535 and 262,144 sequences, in little memory.

Inputs lie far apart in memory that is promised and mostly never touched. Results that are written
everywhere go to a few pages that are mapped again and again; their end has pages of its own.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vd_kernels import (
    TopKSample,
    language_gate,
    spacetime_attention,
    topk_gather,
    topk_sample,
    use_backend,
)
from vd_kernels.backends import load_cpu_kernels
from vd_kernels.testing import normal

LIMIT = 2**31
END = 2**20
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # mmap lacks them before Python 3.13
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if reason := load_cpu_kernels():
        pytest.skip(reason)


def promised(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros, as many as there are, that take memory where they are written to."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's way to promise memory")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"this machine promises no more memory than it has: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def far(x: Tensor, apart: int = LIMIT) -> Tensor:
    """The same values, with neighbours in every dimension but the last so many elements apart."""
    steps = [apart + stride for stride in x.stride()[:-1]]
    extent = sum(n * (size - 1) for n, size in zip(steps, x.shape, strict=False)) + x.shape[-1]
    placed = promised(extent, x.dtype).as_strided(x.shape, [*steps, 1])
    return placed.copy_(x)


def room(*shape: int, dtype: torch.dtype, fill: float) -> Tensor:
    """Room for more than 2^31 elements. All but the last of it, END bytes or more, is one and the
    same two megabytes; the last is filled."""
    x = promised(math.prod(shape), dtype)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    pages = os.memfd_create("pages")
    os.truncate(pages, 2 * END)
    repeated = (x.nbytes - END) // (2 * END) * 2 * END
    for address in range(x.data_ptr(), x.data_ptr() + repeated, 2 * END):
        access = mmap.PROT_READ | mmap.PROT_WRITE
        kind = mmap.MAP_SHARED | mmap.MAP_POPULATE | MAP_FIXED
        if libc.mmap(address, 2 * END, access, kind, pages, 0) != address:
            raise OSError(ctypes.get_errno(), "mmap")
    os.close(pages)
    x[repeated // x.itemsize :] = fill
    return x.view(shape)


def gradients(
    function: Callable[..., Any], tensors: dict[str, Tensor], spread: bool
) -> list[Tensor]:
    """Results and gradients; inputs and gradients of results lie far apart if `spread`."""
    place = far if spread else torch.Tensor.clone
    given = {name: place(x).requires_grad_() for name, x in tensors.items()}
    with use_backend("cpp"):
        out = function(**given)
        out = out if isinstance(out, tuple) else (out,)
        grads = [place(normal(*x.shape, seed=50 + i, dtype=x.dtype)) for i, x in enumerate(out)]
        return [*out, *torch.autograd.grad(out, list(given.values()), grads)]


def assert_same_far_apart(function: Callable[..., Any], tensors: dict[str, Tensor]) -> None:
    near, spread = (gradients(function, tensors, spread) for spread in (False, True))
    for one, other in zip(near, spread, strict=True):
        assert torch.equal(one, other)


# Inputs far apart


def tensors_of(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: normal(*s, seed=i, dtype=BF16) for i, (name, s) in enumerate(shapes.items())}


@pytest.mark.parametrize("channel", [False, True])
def test_language_gate_of_inputs_far_apart(channel: bool) -> None:
    visual, question = (2, 50, 3, 16), (2, 5, 3, 16)
    tensors = tensors_of(query=visual, key=question, value=visual)
    if channel:
        tensors |= tensors_of(gate_value=question)
    assert_same_far_apart(partial(language_gate, return_gate=True), tensors)


@pytest.mark.parametrize("axis", ["time", "space", "joint"])
def test_spacetime_attention_of_inputs_far_apart(axis: str) -> None:
    video = (2, 3, 4, 2, 16)
    prefix = (2, {"time": 4, "space": 3, "joint": 1}[axis], 2, 2, 16)
    tensors = tensors_of(query=video, key=video, value=video, gate=video)
    tensors |= tensors_of(prefix_query=prefix, prefix_key=prefix, prefix_value=prefix)
    assert_same_far_apart(partial(spacetime_attention, axis=axis), tensors)


@pytest.mark.parametrize("method", ["perturbed", "lapsum"])
def test_topk_gather_of_inputs_far_apart(method: str) -> None:
    sample = topk_sample(normal(2, 9), 3, method=method, sigma=0.5, seed=0)
    function = partial(topk_gather, sample=sample)
    assert_same_far_apart(function, tensors_of(values=(2, 9, 16)))


@pytest.mark.parametrize("method", ["perturbed", "gumbel"])
def test_topk_sample_of_noise_far_apart(method: str) -> None:
    scores, noise = normal(3, 13), normal(3, 1 if method == "gumbel" else 5, 13, seed=1)

    def choose(scores: Tensor, noise: Tensor) -> Tensor:
        return topk_sample(scores, 4, method=method, sigma=0.5, noise=noise).weights

    results = []
    for given in (noise, far(noise)):
        tensors = {"scores": scores}
        results.append(gradients(partial(choose, noise=given), tensors, spread=False))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# Many sequences

MANY = 262_144 + 7


def assert_independent(function: Callable[..., Any], **tensors: Tensor) -> None:
    """The last sequences have the results and gradients that they have without the others."""

    def run(first: int) -> list[Tensor]:
        with use_backend("cpp"):
            given = {name: x[first:].detach().requires_grad_() for name, x in tensors.items()}
            out = function(**given, first=first)
            grads = torch.autograd.grad(
                out.square().sum(), list(given.values()), materialize_grads=True
            )
            return [out, *grads]

    for one, other in zip(run(0), run(MANY - 5), strict=True):
        assert len(one) == MANY
        assert torch.equal(one[-5:], other)


@pytest.mark.parametrize("axis", ["time", "space"])
def test_spacetime_attention_of_many_sequences(axis: str) -> None:
    def attend(first: int, **video: Tensor) -> Tensor:
        dims = (2, 1, 0, 3) if axis == "time" else (1, 0, 2, 3)
        moved = {name: x.permute(*dims, 4) for name, x in video.items()}
        return spacetime_attention(**moved, axis=axis).permute(*dims, 4)

    names = ("query", "key", "value")
    videos = {name: normal(MANY, 2, 1, 1, 1, seed=i) for i, name in enumerate(names)}
    assert_independent(attend, **videos)


def test_language_gate_of_many_questions() -> None:
    names = ("query", "key", "value")
    tensors = {name: normal(MANY, 1, 1, 1, seed=i) for i, name in enumerate(names)}
    assert_independent(lambda first, **given: language_gate(**given), **tensors)


@pytest.mark.parametrize("method", ["hard", "perturbed", "gumbel", "lapsum"])
def test_topk_of_many_rows(method: str) -> None:
    settings = {"method": method, "sigma": 0.5, "num_samples": 2, "seed": 0}

    def choose(first: int, values: Tensor, scores: Tensor) -> Tensor:
        return topk_gather(values, topk_sample(scores, 2, row_offset=first, **settings))

    assert_independent(choose, values=normal(MANY, 3, 1), scores=normal(MANY, 3, seed=1))


# Results of more than 2^31 elements


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tensors of more than 2^31 elements be rooms."""

    def replace(owner: Any, name: str, fill: float) -> None:
        make = getattr(owner, name)

        def make_or_room(*args: Any, **kwargs: Any) -> Tensor:
            asked = make(*args, **kwargs | {"device": "meta"})
            if asked.numel() > LIMIT:
                return room(*asked.shape, dtype=asked.dtype, fill=fill)
            return make(*args, **kwargs)

        monkeypatch.setattr(owner, name, make_or_room)

    replace(torch, "empty", math.nan)
    replace(torch, "empty_like", math.nan)
    replace(Tensor, "new_empty", math.nan)
    replace(torch, "zeros", 0.0)


def assert_last_as_alone(
    function: Callable[..., Any], rows: dict[str, Tensor], count: int, needs: str, **others: Tensor
) -> None:
    """Of `count` times the same rows the last has the results and gradients that it has alone.

    Args:
        function: Of `rows` and `others`.
        rows: Tensors [1,...], all but their first dimension as they are to be.
        needs: Names of those whose gradient is wanted.
        others: Tensors [count,...].
    """

    def run(count: int) -> list[Tensor]:
        given = {name: x.expand(count, *x.shape[1:]).detach() for name, x in rows.items()}
        wanted = [given[name].requires_grad_() for name in needs.split()]
        out = function(**given, **{name: x[-count:] for name, x in others.items()})
        out = out if isinstance(out, tuple) else (out,)
        grads = [normal(x.shape[-1], dtype=x.dtype).expand(x.shape) for x in out]
        return [*out, *(torch.autograd.grad(out, wanted, grads) if wanted else ())]

    with use_backend("cpp"):
        large, alone = run(count), run(1)
    assert all(x.numel() > LIMIT for x in large)
    for one, other in zip(large, alone, strict=True):
        end = min(END // one.itemsize, other.numel())
        assert torch.equal(one.view(-1)[-end:], other.view(-1)[-end:])


def only_last(count: int, *shape: int) -> Tensor:
    """A mask that leaves the last row alone: that of the others takes no time."""
    real = torch.zeros(count, *shape, dtype=torch.bool)
    real[-1] = True
    return real


@pytest.mark.usefixtures("rooms")
@pytest.mark.parametrize("channel", [False, True])
def test_language_gate_of_large_results(channel: bool) -> None:
    count, visual, question = 2**11 + 1, (1, 2**10, 1, 1024), (1, 1, 1, 1024)
    token = tensors_of(query=question, value=question)
    rows = {name: x.expand(visual) for name, x in token.items()} | tensors_of(key=question)
    if channel:  # the gate alone
        rows |= tensors_of(gate_value=question)
        del rows["value"]
    needs = "" if channel else "query value"
    assert_last_as_alone(language_gate, rows, count, needs, key_mask=only_last(count, 1))


@pytest.mark.usefixtures("rooms")
def test_spacetime_attention_of_large_results() -> None:
    count, video = 43_700, (1, 1, 48, 1, 1024)
    rows = tensors_of(query=video, key=video, value=video)
    function = partial(spacetime_attention, axis="space")
    assert_last_as_alone(function, rows, count, "query key value", key_mask=only_last(count, 1))


@pytest.mark.usefixtures("rooms")
def test_topk_gather_of_large_results() -> None:
    count = 2**11 + 1
    rows = tensors_of(values=(1, 1, 2**20))
    indices = torch.zeros(count, 1, dtype=torch.int64)

    def gather(values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return topk_gather(values, TopKSample(weights, indices, indices >= 0))

    weights = torch.full((count, 1, 1), 0.5)
    assert_last_as_alone(gather, rows, count, "values", weights=weights, indices=indices)


FEW = (1, 5_000, 70_001, 900_000, 1_000_003, *range(2**20 - 100, 2**20))
"""Frames that are real, in some order of their scores, where there are 2^20."""


@pytest.mark.usefixtures("rooms")
@pytest.mark.parametrize("method", ["perturbed", "gumbel"])
def test_choices_with_large_weights(method: str) -> None:
    rows, k, frames = 33, 64, 2**20
    scores = torch.full((rows, frames), -math.inf)
    scores[:, FEW] = normal(len(FEW))
    # Contiguous, so promised: zeros but for the last row's.
    grad = promised(rows * k * frames, torch.float32).view(rows, k, frames)
    grad[-1, :, FEW] = normal(k, len(FEW), seed=1)

    def run(first: int) -> list[Tensor]:
        x = scores[first:].clone().requires_grad_()
        settings = {"method": method, "sigma": 0.5, "num_samples": 2, "seed": 0}
        with use_backend("cpp"):
            sample = topk_sample(x, k, row_offset=first, **settings)
            (found,) = torch.autograd.grad(sample.weights, x, grad[first:])
        return [sample.indices[-1], sample.weights[-1, -1, -1000:], found[-1]]

    for one, other in zip(run(0), run(rows - 1), strict=True):
        assert other.count_nonzero() > 0
        assert torch.equal(one, other)


@pytest.mark.usefixtures("rooms")
def test_choices_of_many_scores() -> None:
    rows, frames = 2**15 + 1, 2**16
    scores = room(rows, frames, dtype=torch.float32, fill=-math.inf)
    scores[:8] = -math.inf  # and all other rows that are the same memory
    scores[0, 1] = 0.0
    scores[-1, -3] = 0.0
    with use_backend("cpp"):
        sample = topk_sample(scores, 1, method="hard")
    assert sample.indices[-1] == frames - 3 == sample.weights[-1].argmax()
    indices = sample.indices[:-17].view(-1, 8)  # the last have their own memory
    assert indices.unique(dim=0).tolist() == [[1, -1, -1, -1, -1, -1, -1, -1]]
