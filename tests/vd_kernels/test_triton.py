"""Triton kernels: in the interpreter, compiled for absent GPUs, and on one that is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vd_kernels import language_gate, spacetime_attention, use_backend
from vd_kernels.backends import load_triton
from vd_kernels.testing import Check, suite

if load_triton():
    pytest.skip(load_triton(), allow_module_level=True)

from vd_kernels import _triton

if _triton.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from vd_kernels import compile_kernels
from vd_kernels.language_gate import triton_kernels
from vd_kernels.spacetime_attention import triton_kernels as attention_kernels

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
OPERATORS = ("language_gate", "spacetime_attention")
"""That have Triton kernels."""

# ---------------------------------------------------------------------------------------------
# In the interpreter, which takes a process of its own: it must be chosen before Triton is imported

RUN = """
import json, math, sys, traceback
import torch
from vd_kernels import language_gate, spacetime_attention, use_backend
from vd_kernels.backends import explain
from vd_kernels.testing import normal, suite

def run(name, check):
    try:
        check()
        print("passed", name)
    except Exception:
        print("failed", name)
        traceback.print_exc(file=sys.stdout)
"""

INTERPRETED = """
from vd_kernels.language_gate import op, triton_kernels

triton_kernels._PROGRAMS = 2, 2  # several blocks to a chunk, and several chunks
for dtype, tokens, names in json.loads(sys.argv[1]):
    settings = triton_kernels.Settings(64, tokens, 4)
    triton_kernels.settings = lambda *_, **__: settings
    for check in suite("triton", "cpu", [getattr(torch, dtype)], ["language_gate"]):
        if any(f"language_gate-{name}-" in check.name for name in names):
            run(f"{check.name} in tiles of {tokens}", check)
"""

EDGES = """
def padding_may_hold_anything():
    real = torch.tensor([[True, False, True, False], [False] * 4])
    query, value = normal(2, 5, 1, 8), normal(2, 5, 1, 8, seed=1)

    def results(filling, **form):
        hidden = torch.where(real[..., None, None], 0.0, filling)
        key = (normal(2, 4, 1, 8, seed=2) + hidden).requires_grad_()
        if form.pop("channel", False):
            form["gate_value"] = key.detach() * 2
        out = language_gate(query, key, value, key_mask=real, **form)
        return out, *torch.autograd.grad(out.sum(), key)

    for form in ({}, {"reduction": "max"}, {"reduction": "mean"}, {"channel": True}):
        for one, other in zip(results(0.0, **form), results(torch.nan, **form)):
            assert one.isfinite().all() and torch.equal(one, other), form

def too_large_a_head_is_refused():
    large = normal(1, 2, 1, 257)
    try:
        language_gate(large, large)
    except RuntimeError as error:
        assert "it takes heads of up to 256 elements, got 257" in str(error), error
    else:
        raise AssertionError("not refused")

def it_runs_when_asked_for():
    assert op.choose(op.FORWARD, x, x, None) is op.FORWARD["triton"]
    with use_backend("reference"):
        assert op.choose(op.FORWARD, x, x, None) is op.FORWARD["reference"]
    (triton,) = (backend for backend in explain().backends if backend.name == "triton")
    assert triton.available and "interpreted" in triton.runs_on

def it_does_not_run_unasked():
    assert op.choose(op.FORWARD, x, x, None) is not op.FORWARD["triton"]

x = normal(1, 2, 1, 4)
with use_backend("triton"):
    run("padding", padding_may_hold_anything)
    run("head", too_large_a_head_is_refused)
    run("asked", it_runs_when_asked_for)
run("unasked", it_does_not_run_unasked)
"""


def interpret(script: str, *runs: tuple[str, int, list[str]]) -> None:
    """Run the script, and checks of the suite: dtype, size of a tile, names."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN + script, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") >= sum(len(names) for *_, names in runs), done.stdout
    assert "failed" not in done.stdout, done.stdout


ATTENTION = """
from vd_kernels.spacetime_attention import op, triton_kernels

# Sequences are whole up to so many rows; longer ones are tiled.
for dtype, rows, names in json.loads(sys.argv[1]):
    def whole(arch, dtype, length, size, *, backward, rows=rows):
        cut = max(16, 1 << max(0, length - 1).bit_length())
        return triton_kernels.Whole(cut, 4 if cut < 64 else 1, 4) if length <= rows else None
    triton_kernels.whole = whole
    triton_kernels.tiled = lambda *_: triton_kernels.Tiled(32, 16, 4, 1)
    for check in suite("triton", "cpu", [getattr(torch, dtype)], ["spacetime_attention"]):
        if any(f"spacetime_attention-{name}-" in check.name for name in names):
            run(f"{check.name}, whole up to {rows}", check)
"""

ATTENTION_EDGES = """
def results(axis, tensors, options):
    given = [x.clone().requires_grad_() for x in tensors]
    out = spacetime_attention(*given, axis=axis, **options)
    return out, *torch.autograd.grad(out.sum(), given)

def padding_may_hold_anything():
    real = normal(2, 4, 6, seed=5) > 0
    real[0] = False
    for axis, options in (
        ("time", {}), ("time", {"window": 1}), ("joint", {}),
        ("space", {"window": (0, 1, 0), "grid": (2, 3)}),
    ):
        found = []
        for filler in (0.0, math.nan, math.inf):
            query, key, value = (normal(2, 4, 6, 1, 3, seed=i) for i in range(3))
            key, value = (x.masked_fill(~real[..., None, None], filler) for x in (key, value))
            found.append(results(axis, (query, key, value), options | {"key_mask": real}))
        for clean, *dirty in zip(*found):
            assert clean.isfinite().all() and all(torch.equal(clean, x) for x in dirty), axis
        assert not any(x[0].any() for x in found[0])  # nothing real

def neighbours_do_not_touch():
    # Sequences lie in one tile: what is not finite stays in its own.
    tensors = [normal(1, 3, 2, 2, 4, seed=i) for i in range(3)]
    clean = results("time", tensors, {})
    for broken in range(3):
        dirty = [x.clone() for x in tensors]
        dirty[broken][0, 1, 0, 1, 2] = math.nan
        for one, other in zip(clean, results("time", dirty, {})):
            assert torch.equal(one[:, :, 1], other[:, :, 1])
            assert torch.equal(one[:, :, 0, 0], other[:, :, 0, 0])

def a_window_may_be_as_wide_as_an_int():
    tensors = [normal(1, 3, 4, 1, 4, seed=i) for i in range(3)]
    for axis, window in (("time", 2**62), ("space", (2**62,) * 3), ("joint", (2**62,) * 3)):
        options = {"window": window, "grid": (2, 2)}
        for one, other in zip(results(axis, tensors, {}), results(axis, tensors, options)):
            assert torch.allclose(one, other, atol=1e-6)

def prefixes_without_tokens_see_each_other():
    x, prefix = normal(1, 0, 2, 1, 4), [normal(1, 2, 3, 1, 4, seed=i) for i in range(3)]
    for axis in ("time", "joint"):
        given = [p[:, : 2 if axis == "time" else 1] for p in prefix]
        names = dict(zip(("prefix_query", "prefix_key", "prefix_value"), given))
        _, found = spacetime_attention(x, x, x, axis=axis, **names)
        with use_backend("reference"):
            _, expected = spacetime_attention(x, x, x, axis=axis, **names)
        assert torch.allclose(found, expected, atol=1e-6)

def one_result_may_have_no_gradient():
    tensors = [normal(1, 3, 2, 1, 4, seed=i) for i in range(3)]
    names = ("prefix_query", "prefix_key", "prefix_value", "gate")
    others = [*(normal(1, 1, 1, 1, 4, seed=i) for i in range(3, 6)), normal(1, 3, 2, 1, 1)]
    for chosen in (0, 1):
        found = []
        for backend in ("triton", "reference"):
            given = [x.clone().requires_grad_() for x in (*tensors, *others)]
            with use_backend(backend):
                out = spacetime_attention(*given[:3], axis="time", **dict(zip(names, given[3:])))
                grads = torch.autograd.grad(
                    out[chosen].square().sum(), given, materialize_grads=True
                )
            found.append(grads)
        for one, other in zip(*found):
            assert torch.allclose(one, other, atol=1e-5), chosen

def some_gradients_alone():
    given = [normal(1, 3, 2, 1, 4, seed=i).requires_grad_() for i in range(3)]
    gate = torch.rand(4, requires_grad=True)
    out = spacetime_attention(*given, axis="time", gate=gate)
    every = torch.autograd.grad(out.sum(), [*given, gate], retain_graph=True)
    for i, x in enumerate([*given, gate]):
        tensors = [y if y is x else y.detach() for y in (*given, gate)]
        out = spacetime_attention(*tensors[:3], axis="time", gate=tensors[3])
        assert torch.equal(*torch.autograd.grad(out.sum(), x), every[i])

def too_large_a_head_is_refused():
    large = normal(1, 2, 1, 1, 257)
    try:
        spacetime_attention(large, large, large, axis="time")
    except RuntimeError as error:
        assert "it takes heads of up to 256 elements, got 257" in str(error), error
    else:
        raise AssertionError("not refused")

def it_runs_when_asked_for():
    assert op.choose(op.FORWARD, x) is op.FORWARD["triton"]
    assert op.choose(op.BACKWARD, x) is op.BACKWARD["triton"]

def it_does_not_run_unasked():
    assert op.choose(op.FORWARD, x) is not op.FORWARD["triton"]

x = normal(1, 2, 1, 1, 4)
for rows in (0, 64):
    triton_kernels.whole.__kwdefaults__["rows"] = rows
    with use_backend("triton"):
        run("padding", padding_may_hold_anything)
        run("neighbours", neighbours_do_not_touch)
        run("wide", a_window_may_be_as_wide_as_an_int)
        run("no tokens", prefixes_without_tokens_see_each_other)
        run("one result", one_result_may_have_no_gradient)
        run("some gradients", some_gradients_alone)
        run("head", too_large_a_head_is_refused)
        run("asked", it_runs_when_asked_for)
run("unasked", it_does_not_run_unasked)
"""


def forms(sizes: str) -> list[str]:
    return [f"{form}-{sizes}" for form in ("softmax", "max", "mean", "channel")]


def test_interpreted_in_full_precision() -> None:
    layouts = ["sliced", "transposed-gradient", "strided", "expanded", "expanded-gradient"]
    others = ["gate-alone", "channel-alone", "no-mask-scale", "empty-L", "empty-M", "empty-H"]
    interpret(
        INTERPRETED + EDGES,
        ("float32", 128, [*forms("2x13x3x3x8x13"), "softmax-1x1x1x1x1x1", *layouts, *others]),
        ("float32", 16, forms("1x257x33x1x40x3")),  # several tiles, blocks and chunks
    )


def test_interpreted_in_half_precision() -> None:
    names = [*forms("2x13x3x3x8x13"), "channel-1x257x33x1x40x3", "gate-alone"]
    interpret(INTERPRETED, ("bfloat16", 128, names), ("float16", 128, names))


AXES = ("time", "space", "joint")
LIMITS = ["time-causal", "time-causal-window", *(f"{axis}-window" for axis in AXES)]
GATES = [f"gate-{kept}" for kept in ("11110", "10111", "00011", "11111")]


def test_attention_interpreted_whole() -> None:
    forms = ["2x3x13x2x8", *GATES, "mask-frames", "mask-patches-gate", "prefix", "prefix-shared"]
    names = [f"{axis}-{form}" for axis in AXES for form in [*forms, "prefix-seen"]]
    sizes = ["time-1x1x1x1x1", "joint-1x1x1x1x1", "time-1x13x3x3x64", "space-2x4x9x1x40"]
    layouts = ["sliced", "transposed-gradient", "strided", "strided-gradient", "expanded"]
    layouts = [f"time-{name}" for name in (*layouts, "expanded-gradient", "scale")]
    interpret(ATTENTION + ATTENTION_EDGES, ("float32", 64, [*names, *sizes, *layouts, *LIMITS]))


def test_attention_interpreted_in_tiles() -> None:
    forms = ["2x3x13x2x8", "gate-00011", "gate-10111", "mask-patches-gate", "prefix", "far"]
    names = [f"{axis}-{form}" for axis in AXES for form in forms]
    others = ["time-long", "space-large", "space-sliced", "joint-transposed", "time-prefix-seen"]
    interpret(ATTENTION, ("float32", 0, [*names, *others, *LIMITS]))


def test_attention_interpreted_in_half_precision() -> None:
    names = ["time-1x13x3x3x64", "space-prefix", "joint-gate-00011", "time-mask-patches-gate"]
    runs = [(dtype, rows, names) for dtype in ("bfloat16", "float16") for rows in (0, 64)]
    interpret(ATTENTION, *runs)


# ---------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.parametrize("arch", compile_kernels.TARGETS)
@pytest.mark.parametrize(
    "case",
    list(compile_kernels.covering()),
    ids=lambda case: f"{case.operator}-{case.form}-{case.sizes}-{str(case.dtype)[6:]}",
)
def test_kernels_fit_and_the_document_tells_what_they_take(
    case: compile_kernels.Case, arch: str
) -> None:
    usages = list(compile_kernels.compile_case(case, arch))
    assert not [usage for usage in usages if usage.fails]
    text = DOCUMENT.read_text(encoding="utf-8")
    title, *_ = compile_kernels.table(usages).splitlines()
    if title in text:  # another Triton compiles otherwise
        section = text.partition(f"### {arch}")[2].partition("###")[0]
        missing = [u for u in usages if compile_kernels.row(u) not in section]
        assert not missing, "python -m vd_kernels.compile_kernels docs/kernels.md writes it anew"


def test_the_document_tells_of_nothing_else() -> None:
    kernels = [
        launch
        for arch in compile_kernels.TARGETS
        for case in compile_kernels.covering()
        for launch in compile_kernels.launched(case, arch)
    ]
    text = DOCUMENT.read_text(encoding="utf-8")
    assert sum(text.count(f"\n| {operator} ") for operator in OPERATORS) == len(kernels)


KERNELS = {
    "language_gate": [{triton_kernels.forward_kernel, triton_kernels.backward_kernel}],
    "spacetime_attention": [
        {attention_kernels.short_forward_kernel, attention_kernels.short_backward_kernel},
        {
            attention_kernels.forward_kernel,
            attention_kernels.backward_query_kernel,
            attention_kernels.backward_key_kernel,
        },
    ],
}
"""What forward and backward launch, in one way or the other."""


SETTINGS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}


def test_every_case_has_a_kernel_for_forward_and_backward() -> None:
    cases = list(compile_kernels.every())
    assert len({case[:4] for case in cases}) == len(cases)
    for case in (*cases[::37], *compile_kernels.covering()):
        launches = compile_kernels.launched(case, "sm_90")
        kernels = {launch.kernel for launch in launches}
        assert any(kernels >= expected for expected in KERNELS[case.operator]), case
        for launch in launches:
            _, options = compile_kernels.source(launch)
            assert {"num_warps", "num_stages"} <= set(options) <= SETTINGS


def hashes(batch: int, length: int, tokens: int) -> list[str]:
    def make(count: int) -> torch.Tensor:
        return torch.empty(batch, count, 2, 40, dtype=torch.bfloat16, device="meta")

    with _triton.recorded("sm_90") as launches:
        query, key = make(length), make(tokens)
        shared = query, key, query, None, None, None, 0.1, "softmax"
        triton_kernels.forward(*shared, True)
        triton_kernels.backward(query, None, *shared, (True, True, True, False, False))
    return [compile_kernels.source(launch)[0].hash() for launch in launches]


def test_one_compilation_serves_all_lengths_of_a_bucket() -> None:
    usual = hashes(2, 1000, 20)
    assert hashes(1, 1, 17) == hashes(3, 1024, 32) == usual
    assert hashes(2, 1000, 33) != usual


def test_settings_are_there_for_whatever_is_taken() -> None:
    for arch in (*compile_kernels.TARGETS, "sm_86", "sm_120", "interpreter"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for size in (16, 32, 64, 128, 256, 512):
                for tokens in (0, 1, 32, 33, 4096):
                    for backward in (False, True):
                        cut = triton_kernels.settings(arch, dtype, tokens, size, backward=backward)
                        assert min(cut.rows, cut.tokens) >= 16


def attention_hashes(
    batch: int, frames: int, patches: int, prefixes: int, window: int | None
) -> list[str]:
    def make(*shape: int) -> torch.Tensor:
        return torch.empty(batch, *shape, 2, 40, dtype=torch.bfloat16, device="meta")

    with _triton.recorded("sm_90") as launches:
        tokens, prefix = make(frames, patches), make(patches, prefixes)
        shared = tokens, tokens, tokens, "time", (window,), None, True, None, *(prefix,) * 3
        gate = torch.empty(batch, frames, 1, 1, 1, device="meta")
        attention_kernels.forward(*shared, gate, 0.1)
        attention_kernels.backward(tokens, prefix, *shared, gate, 0.1, [True] * 7)
    return [compile_kernels.source(launch)[0].hash() for launch in launches]


def test_one_compilation_of_attention_serves_all_lengths_of_a_bucket() -> None:
    usual = attention_hashes(2, 13, 7, 1, 3)
    assert attention_hashes(1, 1, 1, 0, 0) == attention_hashes(16, 12, 16, 4, 16) == usual
    longer = attention_hashes(2, 100, 7, 1, 3)
    assert longer != usual
    assert longer == attention_hashes(1, 4096, 16, 16, 2**40)


def test_no_size_is_specialised_on() -> None:
    """Triton would make a constant of 1, and look for multiples of 16."""
    for case in compile_kernels.covering():
        for kernel, _, arguments, _ in compile_kernels.launched(case, "sm_90"):
            for parameter, x in zip(kernel.params, arguments, strict=False):
                assert not isinstance(x, tuple)
                assert parameter.do_not_specialize or not isinstance(x, int), parameter.name


def test_settings_of_attention_are_there_for_whatever_is_taken() -> None:
    for arch in (*compile_kernels.TARGETS, "sm_86", "sm_120", "interpreter"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for size in (16, 32, 64, 128, 256):
                for length in (0, 1, 16, 17, 64, 65, 4096):
                    for backward in (False, True):
                        cut = attention_kernels.whole(arch, dtype, length, size, backward=backward)
                        assert cut is None or cut.rows >= max(16, length)
                for kernel in ("forward", "query", "key"):
                    cut = attention_kernels.tiled(arch, dtype, size, kernel)
                    assert min(cut.queries, cut.keys) >= 16


def test_heads_of_any_multiple_of_8_are_read_in_whole_vectors() -> None:
    """Head size 40 in a fused tensor: strides are no multiples of 16, which Triton looks for."""
    fused = torch.empty(2, 9, 3, 4, 40, dtype=torch.bfloat16, device="meta")
    assert _triton.unit(*fused.unbind(2)) == 8
    assert _triton.unit(fused.unbind(2)[0].float()) == 4
    assert _triton.unit(fused[..., :37].unbind(2)[0], None) == 8
    assert _triton.unit(torch.empty(2, 9, 4, 37, device="meta")) == 1
    assert _triton.unit(fused[:1, :, 0].expand(2, 9, 4, 40)) == 8


def test_double_precision_numbers_are_taken() -> None:
    """As torch.compile passes Python's floats."""
    cases = (
        compile_kernels.gate_case("softmax", torch.bfloat16, 32, 16),
        compile_kernels.attention_case("time", torch.bfloat16, 32, 16),
        compile_kernels.attention_case("time", torch.bfloat16, 32, 197),
    )
    for launch in (x for case in cases for x in compile_kernels.launched(case, "sm_80")):
        code, options = compile_kernels.source(launch)
        code.signature = {n: "fp64" if t == "fp32" else t for n, t in code.signature.items()}
        assert "fp64" in code.signature.values()
        compile_kernels.triton.compile(code, compile_kernels.TARGETS["sm_80"], options)


# ---------------------------------------------------------------------------------------------
# Refused, and on a GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_on_the_cpu_is_refused(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 1, 4, dtype=dtype)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"AMD GPU, got one on cpu"):
        language_gate(x, x)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"AMD GPU, got one on cpu"):
        spacetime_attention(x[None], x[None], x[None], axis="time")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("check", suite("triton", "cuda", operators=OPERATORS), ids=str)
def test_on_a_gpu(check: Check) -> None:
    check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device")
def test_double_runs_on_the_reference() -> None:
    x = torch.randn(1, 2, 1, 4, dtype=torch.float64, device="cuda")
    assert language_gate(x, x).dtype == torch.float64
    assert spacetime_attention(x[None], x[None], x[None], axis="time").dtype == torch.float64
    with use_backend("triton"), pytest.raises(RuntimeError, match="float64 runs on the reference"):
        language_gate(x, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("axis", ["time", "space"])
def test_more_sequences_than_a_grid_dimension_holds(axis: str) -> None:
    shape = (1, 2, 300_000, 1, 16) if axis == "time" else (1, 300_000, 2, 1, 16)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with use_backend("triton"):
        out = spacetime_attention(x, x, x, axis=axis)
        dim = 2 if axis == "time" else 1
        last = x.narrow(dim, 299_000, 1000)
        alone = spacetime_attention(last, last, last, axis=axis)
    torch.testing.assert_close(out.narrow(dim, 299_000, 1000), alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("frames", [16, 128])
def test_more_than_2_to_the_31_elements(frames: int) -> None:
    """Of which one head alone is written: queries, keys and values are expanded."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("takes 12 GiB of memory")
    patches = 2**31 // (frames * 64) + 16
    x = torch.randn(1, frames, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    many = x.expand(1, frames, patches, 1, 64)
    with use_backend("triton"):
        out = spacetime_attention(many, many, many, axis="time")
        alone = spacetime_attention(x, x, x, axis="time")
    assert torch.equal(out[:, :, -1:], alone) and torch.equal(out[:, :, :1], alone)
