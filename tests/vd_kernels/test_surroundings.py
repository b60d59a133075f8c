"""What lies beside the tokens in memory is never part of a result: kernels that read whole vectors
or tiles must leave out what they have read too much."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vd_kernels import language_gate, spacetime_attention, use_backend
from vd_kernels.backends import explain, load_cpu_kernels
from vd_kernels.testing import normal

LEVELS = explain().cpu_isa or ("scalar",)
# The last levels differ from the one before in bfloat16 alone.
ON_LEVELS = [(torch.bfloat16, level) for level in LEVELS]
ON_LEVELS += [(torch.float32, level) for level in LEVELS if level not in ("avx512_bf16", "amx")]


def amid_nans(x: Tensor) -> Tensor:
    """The same values in the middle of a larger tensor of NaN."""
    room = torch.full([size + 2 for size in x.shape[:-1]] + [x.shape[-1] + 32], float("nan"))
    inner = room.to(x.dtype)[tuple(slice(1, 1 + size) for size in x.shape[:-1])]
    inner = inner[..., 16 : 16 + x.shape[-1]]
    return inner.copy_(x)


def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9, dtype=out.dtype))]


def check(
    function: Callable[..., Tensor], tensors: list[Tensor], level: str, patch: pytest.MonkeyPatch
) -> None:
    if reason := load_cpu_kernels():
        pytest.skip(reason)
    patch.setenv("VD_CPU_ISA", level)
    with use_backend("cpp"):
        # Scratch memory is not cleared between calls: let it hold NaN.
        run(function, [torch.full_like(x, float("nan")) for x in tensors])
        given = run(function, [amid_nans(x) for x in tensors])
        expected = run(function, tensors)
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "level"), ON_LEVELS, ids=str)
@pytest.mark.parametrize("width", [32, 40, 64])
@pytest.mark.parametrize("length", [9, 16, 31, 50])
@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("gated", ["none", "scalar", "channel"])
def test_attention(
    axis: str,
    length: int,
    width: int,
    gated: str,
    dtype: torch.dtype,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = (1, length, 2, 2) if axis == "time" else (1, 2, length, 2)
    tensors = [normal(*sizes, width, seed=seed, dtype=dtype) for seed in range(3)]
    if gated != "none":
        tensors.append(normal(*sizes, width if gated == "channel" else 1, seed=3, dtype=dtype))

    def function(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None = None) -> Tensor:
        return spacetime_attention(query, key, value, axis=axis, gate=gate)

    check(function, tensors, level, monkeypatch)


@pytest.mark.parametrize(("dtype", "level"), ON_LEVELS, ids=str)
@pytest.mark.parametrize("width", [32, 40, 64])
@pytest.mark.parametrize(("length", "tokens"), [(5, 3), (48, 32), (63, 17), (80, 50)])
@pytest.mark.parametrize("channel", [False, True])
def test_gate(
    length: int,
    tokens: int,
    width: int,
    channel: bool,
    dtype: torch.dtype,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = [
        normal(1, count, 2, width, seed=seed, dtype=dtype)
        for seed, count in enumerate((length, tokens, length))
    ]
    if channel:
        tensors.append(normal(1, tokens, 2, width, seed=3, dtype=dtype))

    def function(
        query: Tensor, key: Tensor, value: Tensor, gate_value: Tensor | None = None
    ) -> Tensor:
        return language_gate(query, key, value, gate_value=gate_value)

    check(function, tensors, level, monkeypatch)
