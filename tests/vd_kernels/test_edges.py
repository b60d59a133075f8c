"""Arguments at the edge of what operators take: the C++ kernels give what the reference gives, or
refuse them before any memory is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vd_kernels import (
    language_gate,
    spacetime_attention,
    topk_gather,
    topk_sample,
    use_backend,
)
from vd_kernels.backends import explain, load_cpu_kernels
from vd_kernels.testing import normal

LEVELS = explain().cpu_isa or ("scalar",)
DTYPES = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True, params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := load_cpu_kernels():
        pytest.skip(reason)
    monkeypatch.setenv("VD_CPU_ISA", request.param)


def results(call: Callable[..., object], *tensors: Tensor | None) -> list[Tensor | None]:
    """What a call returns, and the gradients of its tensors."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    found = call(*leaves)
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(
        found, wanted, [torch.ones_like(x) for x in found], allow_unused=True
    )
    return [*found, *grads]


def compare(call: Callable[..., object], *tensors: Tensor | None) -> None:
    with use_backend("reference"):
        expected = results(call, *tensors)
    with use_backend("cpp"):
        found = results(call, *tensors)
    for a, b in zip(found, expected, strict=True):
        # A gradient that nothing reaches may be absent or zero.
        zero = torch.zeros(()) if a is None or b is None else None
        a, b = (zero if x is None else x for x in (a, b))
        if zero is not None:
            assert not a.any() and not b.any()
            continue
        eps = max(torch.finfo(a.dtype).eps, 2.0**-23)  # kernels compute in float32
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=16 * eps * largest)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
def test_torchs_default_dtype_is_nothing_to_kernels() -> None:
    shape = 2, 5, 3, 2, 16
    q, k, v, gate = (normal(*shape, seed=i) for i in range(4))
    bias, prefix = normal(2, seed=5), normal(2, 1, 1, 2, 16, seed=6)
    compare(lambda *x: language_gate(*x[:3], bias=x[3]), q[:, 0], k[:, 1], v[:, 2], bias)

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *prefix: Tensor) -> object:
        names = ("prefix_query", "prefix_key", "prefix_value")
        given = dict(zip(names, prefix, strict=True))
        return spacetime_attention(q, k, v, axis="time", gate=gate, **given)

    compare(attend, q, k, v, gate, prefix, prefix + 1, prefix - 1)
    scores, values = normal(3, 20, seed=7), normal(3, 20, 8, seed=8)
    for method in ("hard", "perturbed", "gumbel", "lapsum"):

        def chosen(scores: Tensor, values: Tensor, method: str = method) -> Tensor:
            return topk_gather(values, topk_sample(scores, 4, method=method, seed=1, sigma=0.3))

        compare(chosen, scores, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("prefixes", [None, 0, 2])
@pytest.mark.parametrize("axis", ["time", "space", "joint"])
@pytest.mark.parametrize("shape", [(2, 0, 4, 2), (2, 3, 0, 2), (0, 3, 4, 2), (2, 3, 4, 2)], ids=str)
def test_attention_without_tokens_or_prefixes(
    shape: tuple[int, ...], axis: str, prefixes: int | None, width: int, dtype: torch.dtype
) -> None:
    q, k, v = (normal(*shape, width, seed=i, dtype=dtype) for i in range(3))
    gate = normal(1, 1, 1, shape[3], 1, seed=3, dtype=dtype)
    names = ("prefix_query", "prefix_key", "prefix_value")
    beside: list[Tensor] = []
    if prefixes is not None:
        sizes = shape[0], 1, prefixes, shape[3], width
        beside = [normal(*sizes, seed=4 + i, dtype=dtype) for i in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *prefix: Tensor) -> object:
        given = dict(zip(names, prefix, strict=True)) if prefix else {}
        return spacetime_attention(q, k, v, axis=axis, gate=gate, **given)

    compare(attend, q, k, v, gate, *beside)
    if beside:  # a loss on the prefixes' results alone
        compare(lambda *x: attend(*x)[1], q, k, v, gate, *beside)


@pytest.mark.parametrize("axis", ["time", "space", "joint"])
@pytest.mark.parametrize("frames", [3, 20])
def test_windows_may_be_as_wide_as_integers_are(axis: str, frames: int) -> None:
    q, k, v = (normal(2, frames, 4, 2, 16, seed=i) for i in range(3))
    grid = None if axis == "time" else (2, 2)
    all_of_it = sys.maxsize if axis == "time" else (sys.maxsize,) * 3

    def attend(*x: Tensor) -> Tensor:
        return spacetime_attention(*x, axis=axis, window=all_of_it, grid=grid)

    compare(attend, q, k, v)


@pytest.mark.parametrize("gate_shape", [(2, 5, 4, 2, 16), (1, 5, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("frames", [5, 20])
def test_a_gate_may_be_of_float64(gate_shape: tuple[int, ...], frames: int) -> None:
    q, k, v = (normal(2, frames, 4, 2, 16, seed=i) for i in range(3))
    sizes = (gate_shape[0], frames, *gate_shape[2:])
    gate = normal(*sizes, seed=3, dtype=torch.float64)
    compare(
        lambda q, k, v, gate: spacetime_attention(q, k, v, axis="time", gate=gate), q, k, v, gate
    )


def test_scores_far_below_zero_are_scores() -> None:
    low = torch.full((1, 1, 1, 16), 1e16)
    with use_backend("cpp"):
        gated = language_gate(low, -low, torch.ones_like(low))
        assert gated.ge(0).all() and gated.le(1e-30).all()
        for frames in (1, 20):
            tokens = low[:, :, None].expand(1, frames, 1, 1, 16)
            value = normal(1, 1, 1, 1, 16).expand_as(tokens)
            out = spacetime_attention(tokens, -tokens, value, axis="time")
            torch.testing.assert_close(out, value.contiguous())


@pytest.mark.parametrize("method", ["hard", "lapsum"])
def test_samples_that_do_not_fit_together(method: str) -> None:
    values = normal(2, 5, 8)
    sample = topk_sample(normal(2, 5), 2, method=method)
    with use_backend("cpp"):
        with pytest.raises(TypeError, match="indices"):
            topk_gather(values, sample._replace(indices=sample.indices.int()))
        with pytest.raises(ValueError, match="weights"):
            topk_gather(values, sample._replace(weights=normal(2, 1, 5)))
        if method == "lapsum":
            with pytest.raises(ValueError, match="indices"):
                topk_gather(values, sample._replace(indices=sample.indices + 5))
