"""Triton kernels: in the interpreter, compiled for absent GPUs, and on one that is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vd_kernels import language_gate, use_backend
from vd_kernels.backends import load_triton
from vd_kernels.testing import Check, suite

if load_triton():
    pytest.skip(load_triton(), allow_module_level=True)

from vd_kernels import _triton

if _triton.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from vd_kernels import compile_kernels
from vd_kernels.language_gate import triton_kernels

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
OPERATORS = ("language_gate",)
"""That have Triton kernels."""

# ---------------------------------------------------------------------------------------------
# In the interpreter, which takes a process of its own: it must be chosen before Triton is imported

INTERPRETED = """
import json, sys, traceback
import torch
from vd_kernels import language_gate, use_backend
from vd_kernels.backends import explain
from vd_kernels.language_gate import op, triton_kernels
from vd_kernels.testing import normal, suite

def run(name, check):
    try:
        check()
        print("passed", name)
    except Exception:
        print("failed", name)
        traceback.print_exc(file=sys.stdout)

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
    """Run the script, and checks of the suite: dtype, largest tile of tokens, names."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") >= sum(len(names) for *_, names in runs), done.stdout
    assert "failed" not in done.stdout, done.stdout


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
    assert DOCUMENT.read_text(encoding="utf-8").count("\n| language_gate ") == len(kernels)


def test_every_case_has_a_kernel_for_forward_and_backward() -> None:
    cases = list(compile_kernels.every())
    assert len({case[:4] for case in cases}) == len(cases)
    for case in (*cases[::37], *compile_kernels.covering()):
        launches = compile_kernels.launched(case, "sm_90")
        kernels = {launch.kernel for launch in launches}
        assert kernels >= {triton_kernels.forward_kernel, triton_kernels.backward_kernel}
        for launch in launches:
            _, options = compile_kernels.source(launch)
            assert set(options) == {"num_warps", "num_stages"}


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
    case = compile_kernels.gate_case("softmax", torch.bfloat16, 32, 16)
    for launch in compile_kernels.launched(case, "sm_80"):
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
    with use_backend("triton"), pytest.raises(RuntimeError, match="float64 runs on the reference"):
        language_gate(x, x)
