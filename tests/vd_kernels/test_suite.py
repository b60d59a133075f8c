"""The suite that every backend must pass, on those that run here; and the suite's own tools."""

from __future__ import annotations

import itertools
import math
import os
import shutil

import pytest
import torch

from vd_kernels import language_gate, spacetime_attention, testing, use_backend
from vd_kernels.backends import explain, load_cpu_kernels
from vd_kernels.testing import Check, suite

LEVELS = explain().cpu_isa or ("scalar",)


@pytest.mark.parametrize("check", suite("reference"), ids=str)
def test_reference(check: Check) -> None:
    check()


# The last levels differ from the one before in bfloat16 alone.
HALF = [check for check in suite("cpp") if "bfloat16" in str(check)]
ON_LEVELS = [(c, level) for level in ("scalar", "avx2", "avx512") for c in suite("cpp")]
ON_LEVELS += [(check, level) for level in ("avx512_bf16", "amx") for check in HALF]


@pytest.mark.parametrize(("check", "level"), ON_LEVELS, ids=str)
def test_cpp(check: Check, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := load_cpu_kernels():
        pytest.skip(reason)
    if level not in LEVELS:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv("VD_CPU_ISA", level)
    check()


LIMITED = ("-window-", "-far-", "-mask-", "-prefix")
JOINT = [
    check
    for check in suite("sdpa", operators=["spacetime_attention"])
    if "-joint-" in check.name and not any(word in check.name for word in LIMITED)
]


@pytest.mark.parametrize("check", JOINT, ids=str)
def test_sdpa(check: Check) -> None:
    check()


def test_where_there_is_a_compiler_the_kernels_are_built() -> None:
    """Else every check of them would be skipped, and nobody would know."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler; set CXX to one")
    reason = load_cpu_kernels()
    if "VD_BUILD_CPP=0" in reason:
        pytest.skip(reason)
    assert reason == ""


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := load_cpu_kernels():
        pytest.skip(reason)
    x = torch.randn(1, 2, 1, 4)
    monkeypatch.setenv("VD_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match=r'VD_CPU_ISA must be one of scalar.*, got "sse9"'):
        language_gate(x, x)


def test_poison_is_seen() -> None:
    with testing.poisoned():
        assert torch.empty(7).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_error_is_told_with_its_place() -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64)
    wrong = torch.zeros(2, 3)
    wrong[1, 2] = 0.5
    with pytest.raises(AssertionError, match=r"x: 1 of 6 differ .* at \(1, 2\): 0.5, expected 0"):
        testing.assert_near("x", wrong, exact, 0.1)
    wrong[0, 1] = torch.nan
    with pytest.raises(AssertionError, match=r"2 of 6 .* at \(0, 1\): nan"):
        testing.assert_near("x", wrong, exact, 0.1)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_near("x", wrong[0], exact, 0.1)


def test_layouts_keep_values_and_change_strides() -> None:
    x = testing.normal(3, 4, 5)
    for name, layout in testing.LAYOUTS.items():
        assert torch.equal(layout(x), x)
        assert (layout(x).stride() == x.stride()) == (name == "contiguous")
    assert testing.expanded(x).stride(0) == 0


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve one gradient of the reference: the suite must notice."""
    from vd_kernels.language_gate import op

    backward = op.BACKWARD["reference"]

    def halved(*arguments):
        query, *others = backward(*arguments)
        return (None if query is None else query / 2), *others

    monkeypatch.setitem(op.BACKWARD, "reference", halved)
    check = next(c for c in suite("reference") if c.name.startswith("language_gate-softmax-2x13"))
    with pytest.raises(AssertionError, match="gradient of query"):
        check()


SHORT = [(torch.float32, level) for level in ("scalar", "avx2", "avx512")]
SHORT += [(torch.bfloat16, level) for level in ("scalar", "avx2", "avx512", "avx512_bf16", "amx")]


@pytest.mark.parametrize(("dtype", "level"), SHORT, ids=str)
@pytest.mark.parametrize("axis", ["time", "space"])
def test_short_sequences(
    axis: str, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have kernels of their own; the suite's lengths meet few of them."""
    if reason := load_cpu_kernels():
        pytest.skip(reason)
    if level not in LEVELS:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv("VD_CPU_ISA", level)
    generator = torch.Generator().manual_seed(0)
    causal = (False, True) if axis == "time" else (False,)
    # The gate's sizes: none, one number a head, one a channel of each token.
    cases = itertools.product(range(1, 10), (16, 21, 64), (0, 2, 3), causal, (0, 1, 2))
    for length, width, mask, ordered, gated in itertools.islice(cases, 0, None, 5):
        shape = (2, length, 3, 2, width) if axis == "time" else (2, 3, length, 2, width)
        query, key, value, grad = (
            torch.randn(shape, generator=generator).to(dtype) for _ in range(4)
        )
        real = None
        if mask:
            real = torch.rand(shape[:mask], generator=generator) > 0.4
            padding = ~(real if mask == 3 else real[..., None].expand(shape[:3]))
            key[padding], value[padding] = math.nan, math.nan
        inputs = {"query": query, "key": key, "value": value}
        if gated:
            sizes = (2, 1, 1, 2, 1) if gated == 1 else shape
            inputs["gate"] = torch.rand(sizes, generator=generator)
        found = []
        for backend, kind in (("cpp", None), ("reference", torch.float64)):
            given = {n: x.detach().to(kind or x.dtype).requires_grad_() for n, x in inputs.items()}
            with use_backend(backend):
                out = spacetime_attention(**given, axis=axis, key_mask=real, causal=ordered)
                grads = torch.autograd.grad(out, list(given.values()), grad.to(out.dtype))
            found.append([out, *grads])
        bound = 1e-5 if dtype == torch.float32 else 3e-2
        for ours, exact in zip(*found, strict=True):
            error = (ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)
            assert error <= bound, (length, width, mask, ordered, gated, error)
