"""Triton kernels: in the interpreter, compiled for absent GPUs, and on one that is there."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from vd_kernels import language_gate, spacetime_attention, topk_gather, topk_sample, use_backend
from vd_kernels.backends import LARGEST_ROW, load_triton
from vd_kernels.testing import Check, suite

if load_triton():
    pytest.skip(load_triton(), allow_module_level=True)

from vd_kernels import _triton

if _triton.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from vd_kernels import compile_kernels
from vd_kernels.language_gate import triton_kernels
from vd_kernels.spacetime_attention import triton_kernels as attention_kernels
from vd_kernels.topk_sampling import triton_kernels as topk_kernels

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
OPERATORS = ("language_gate", "topk_sample", "topk_gather", "spacetime_attention")
"""That have Triton kernels."""

# ---------------------------------------------------------------------------------------------
# In the interpreter, which takes a process of its own: it must be chosen before Triton is imported

RUN = """
import functools, json, math, sys, traceback
import torch
from triton.runtime import interpreter
from vd_kernels import language_gate, spacetime_attention, testing, use_backend
from vd_kernels.backends import explain
from vd_kernels.testing import normal, suite

testing.RUNS = 1
# The interpreter replaces what triton.language holds whenever a function is called, which takes
# most of its time: once for each function is enough where nothing is put back.
if hasattr(interpreter, "_LangPatchScope"):
    interpreter._LangPatchScope.restore = lambda self: None
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)

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
    assert op.choose(op.FORWARD, x, x, x, None) is op.FORWARD["triton"]
    with use_backend("reference"):
        assert op.choose(op.FORWARD, x, x, x, None) is op.FORWARD["reference"]
    (triton,) = (backend for backend in explain().backends if backend.name == "triton")
    assert triton.available and "interpreted" in triton.runs_on

def it_does_not_run_unasked():
    assert op.choose(op.FORWARD, x, x, x, None) is not op.FORWARD["triton"]

x = normal(1, 2, 1, 4)
with use_backend("triton"):
    run("padding", padding_may_hold_anything)
    run("head", too_large_a_head_is_refused)
    run("asked", it_runs_when_asked_for)
run("unasked", it_does_not_run_unasked)
"""


CHOICES = """
import itertools, math
import triton
import triton.language as tl
from vd_kernels import topk_gather, topk_sample
from vd_kernels.topk_sampling import noise, triton_kernels

triton_kernels._PROGRAMS = 4  # several tiles of samples to a program, and several programs to a row
(names,) = json.loads(sys.argv[1])
for check in suite("triton", "cpu", [torch.float32], ["topk_sample", "topk_gather"]):
    if any(name in check.name for name in names):
        run(check.name, check)
"""

CHOICE_EDGES = """
@triton.jit
def words_kernel(words, normals, gumbels, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    word = tl.load(words + at).to(tl.uint32)
    tl.store(normals + at, triton_kernels._normal(word))
    tl.store(gumbels + at, triton_kernels._gumbel(word))

def words_become_the_bits_of_the_specification():
    some = torch.arange(500)
    words = torch.cat([some, 2**32 - 1 - some, 2**31 - 250 + some, 2**30 - 250 + some])
    words = torch.cat([words, torch.randint(0, 2**32, (4096 - 2000,))])
    found = torch.empty(2, 4096)
    words_kernel[(1,)](words, *found, BLOCK=4096)
    assert torch.equal(found[0], noise.normal_of(words))
    assert torch.equal(found[1], noise.gumbel_of(words))

def choices(backend, x, k, **options):
    with use_backend(backend):
        x = x.detach().requires_grad_()
        sample = topk_sample(x, k, **options)
        grad = normal(*sample.weights.shape, seed=9)
        return sample.indices, sample.weights.detach(), torch.autograd.grad(sample.weights, x, grad)

def backends_draw_the_same(frames, k, sigma, seed, **options):
    x = normal(4, frames, seed=seed)
    x[1, k // 2 :] = -math.inf  # fewer real frames than k
    x[2] = torch.where(normal(frames) > 0, 0.0, -0.0)  # all are equal
    x[3] = x[3].round()
    options |= {"sigma": sigma, "seed": seed, "row_offset": 2**32 - 2}
    ours = choices("triton", x, k, **options)
    for other in ("reference", "cpp"):
        theirs = choices(other, x, k, **options)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]), other
        allowed = 1e-5 * max(1.0, theirs[2][0].abs().max().item())
        assert (ours[2][0] - theirs[2][0]).abs().max() <= allowed, other

def few_frames_can_be_chosen():
    # tiles for 1/8 and 1/4 of all, and one for all; see how many frames can be chosen
    seen = set()
    for sigma, order in ((0.01, "time"), (0.1, "time"), (0.3, "score"), (0.05, "score")):
        x = normal(4, 200, seed=1)
        plan = torch.empty(4, 403, dtype=torch.int32)
        triton_kernels._choose(x, 5, order, None, None, plan, sigma=sigma)
        seen |= {next(i for i in (32, 64, 256) if n <= i) for n in plan[:, 0].tolist()}
        backends_draw_the_same(200, 5, sigma, 1, num_samples=37, order=order)
    assert seen == {32, 64, 256}

def diagonal_gradients_are_the_same():
    for order in ("time", "score"):
        options = {"gradient": "diagonal", "order": order, "num_samples": 37}
        backends_draw_the_same(70, 3, 0.1, -5, **options)

def where_no_sample_differs_the_gradient_is_zero():
    x = torch.arange(40.0).view(2, 20).requires_grad_()
    for sigma in (0.0, 1e-30, 1e-6, 1e-40, 1e-46):
        sample = topk_sample(x, 3, sigma=sigma, num_samples=7, seed=1)
        assert sample.weights[:, range(3), range(17, 20)].eq(1).all()
        (grad,) = torch.autograd.grad(sample.weights, x, 1e6 * normal(2, 3, 20))
        assert torch.equal(grad, torch.zeros(2, 20)), sigma

def a_temperature_may_leave_the_range_of_float32():
    x = normal(3, 20)
    for method, temperature in itertools.product(("lapsum", "gumbel"), (1e-46, 1e-44, 1e39)):
        options = {"method": method, "temperature": temperature, "seed": 1}
        ours, theirs = (choices(backend, x, 3, **options) for backend in ("triton", "reference"))
        assert torch.allclose(ours[1], theirs[1], atol=1e-6), options
        assert theirs[2][0].isnan().sum() == 0
        assert torch.allclose(ours[2][0], theirs[2][0]), options

def memory_may_be_laid_out_anyhow():
    x, z = normal(3, 26)[:, :13], normal(7, 3, 26)[..., :13].transpose(0, 1)
    results = []
    for make in (lambda t: t, torch.clone):
        given = make(x).requires_grad_()
        sample = topk_sample(given, 4, noise=make(z), sigma=0.5)
        scale = torch.linspace(1, 2, 3)[:, None, None].expand(sample.weights.shape)
        grad = normal(4, 3, 26)[..., ::2].transpose(0, 1)
        results.append([
            *sample,
            *torch.autograd.grad((sample.weights * scale).sum(), given, retain_graph=True),
            *torch.autograd.grad(sample.weights, given, make(grad)),
        ])
    for one, other in zip(*results):
        assert torch.equal(one, other)

def a_seed_is_read_when_the_kernel_runs():
    x, seed = normal(2, 40), torch.tensor(3)
    first = topk_sample(x, 4, sigma=0.5, seed=seed, num_samples=8).weights
    again = topk_sample(x, 4, sigma=0.5, seed=seed, num_samples=8).weights
    other = topk_sample(x, 4, sigma=0.5, seed=seed.add_(1), num_samples=8).weights
    assert torch.equal(first, again) and not torch.equal(first, other)

def slots_may_be_more_than_a_tile():
    sample = topk_sample(normal(1, 130), 100, method="hard")
    values, grad = normal(1, 130, 3).requires_grad_(), normal(1, 100, 3)
    weights = sample.weights.requires_grad_()
    out = topk_gather(values, sample._replace(weights=weights))
    found = torch.autograd.grad(out, (values, weights), grad)
    assert torch.equal(out, weights @ values)
    assert torch.equal(found[0], weights.mT @ grad)
    assert torch.allclose(found[1], grad @ values.mT, atol=1e-6)

def long_frames_are_multiplied_in_parts():
    sample = topk_sample(normal(2, 70), 5, method="hard")
    values, grad = normal(2, 70, 200), normal(2, 5, 200)
    before = triton_kernels._PARTS
    for wanted in (before, (1000, 1), (8, 2)):  # 1 part, 7 of a block, 2 of 4 blocks
        triton_kernels._PARTS = wanted
        weights = sample.weights.clone().requires_grad_()
        out = topk_gather(values, sample._replace(weights=weights))
        (found,) = torch.autograd.grad(out, weights, grad)
        assert torch.allclose(found, grad @ values.mT, atol=1e-4), wanted
    triton_kernels._PARTS = before

def a_frame_that_has_no_weight_is_not_read():
    values = normal(2, 9, 5)
    sample = topk_sample(normal(2, 9, seed=1), 3, method="hard")
    used = sample.weights.sum(1) > 0
    out = topk_gather(torch.where(used[..., None], values, torch.nan), sample)
    assert torch.equal(out, topk_gather(values, sample))

def what_is_too_much_is_refused():
    x = torch.randn(1, 4097)
    wrongs = (x, "up to 4096 frames to choose from, got 4097"), (x[:, :9].double(), "float64")
    for wrong, reason in wrongs:
        for method in ("hard", "perturbed", "gumbel", "lapsum"):
            try:
                topk_sample(wrong, 3, method=method)
            except RuntimeError as error:
                assert reason in str(error), error
            else:
                raise AssertionError("not refused")
    with use_backend("reference"):
        sample = topk_sample(x[:, :9].double(), 3, method="hard")
    try:
        topk_gather(x[:, :9], sample)
    except RuntimeError as error:
        assert "float64 runs on the reference" in str(error), error
    else:
        raise AssertionError("not refused")

with use_backend("triton"):
    for check in (
        words_become_the_bits_of_the_specification,
        few_frames_can_be_chosen,
        diagonal_gradients_are_the_same,
        where_no_sample_differs_the_gradient_is_zero,
        a_temperature_may_leave_the_range_of_float32,
        memory_may_be_laid_out_anyhow,
        a_seed_is_read_when_the_kernel_runs,
        slots_may_be_more_than_a_tile,
        long_frames_are_multiplied_in_parts,
        a_frame_that_has_no_weight_is_not_read,
        what_is_too_much_is_refused,
    ):
        run(check.__name__, check)
"""


def interpreted(script: str, *runs: object) -> str:
    """What the script prints, in a process where Triton's interpreter is chosen."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN + script, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        cwd=DOCUMENT.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def interpret(script: str, *runs: tuple[str, int, list[str]] | list[str]) -> None:
    """Run the script, and checks of the suite by name: with dtype and size of a tile, or
    those of topk_sample and topk_gather by name alone."""
    told = interpreted(script, *runs)
    expected = [name for run in runs for name in (run if isinstance(run, list) else run[-1])]
    assert told.count("passed") >= len(expected), told
    assert "failed" not in told, told


ATTENTION = """
from vd_kernels.spacetime_attention import op, triton_kernels

# Sequences are whole up to so many rows; longer ones are tiled.
for dtype, rows, names in json.loads(sys.argv[1]):
    def whole(arch, dtype, length, size, *, backward, rows=rows):
        return triton_kernels.Whole(4 if length < 64 else 1, 4) if length <= rows else None
    triton_kernels.whole = whole
    triton_kernels.tiled = lambda *_, **__: triton_kernels.Tiled(32, 16, 4, 1)
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
    real = normal(2, 3, 4, seed=5) > 0
    real[0] = False
    windows = {"time": 1, "space": (0, 1, 0), "joint": None}
    for axis, window in windows.items():
        found = []
        for fillers in ((0.0, 0.0), (math.nan, math.inf)):
            query, key, value = (normal(2, 3, 4, 1, 3, seed=i) for i in range(3))
            key, value = (
                x.masked_fill(~real[..., None, None], filler)
                for x, filler in zip((key, value), fillers)
            )
            options = {"key_mask": real, "window": window, "grid": (2, 2)}
            found.append(results(axis, (query, key, value), options))
        for clean, dirty in zip(*found):
            assert clean.isfinite().all() and torch.equal(clean, dirty), axis
            assert clean[1].any() and not clean[0].any()  # nothing is real

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
    assert op.choose(op.FORWARD, x, "time", None, None, None) is op.FORWARD["triton"]
    assert op.choose(op.BACKWARD, x, "time", None, None, None) is op.BACKWARD["triton"]

def it_does_not_run_unasked():
    assert op.choose(op.FORWARD, x, "time", None, None, None) is not op.FORWARD["triton"]

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


def test_gate_interpreted() -> None:
    layouts = ["sliced", "transposed-gradient", "strided", "expanded", "expanded-gradient"]
    others = ["gate-alone", "channel-alone", "no-mask-scale", "empty-L", "empty-M", "empty-H"]
    half = [*forms("2x13x3x3x8x13"), "channel-1x257x33x1x40x3", "gate-alone"]
    interpret(
        INTERPRETED + EDGES,
        ("float32", 128, [*forms("2x13x3x3x8x13"), "softmax-1x1x1x1x1x1", *layouts, *others]),
        ("bfloat16", 128, half),
        ("float16", 128, half),
        ("float32", 16, forms("1x257x33x1x40x3")),  # several tiles, blocks and chunks
    )


AXES = ("time", "space", "joint")
LIMITS = ["time-causal", "time-causal-window", *(f"{axis}-window" for axis in AXES)]
GATES = [f"gate-{kept}" for kept in ("11110", "10111", "00011", "11111")]


def test_attention_interpreted_whole() -> None:
    forms = ["2x3x13x2x8", *GATES, "mask-frames", "mask-patches-gate", "prefix"]
    names = [f"{axis}-{form}" for axis in ("space", "joint") for form in forms]
    names += [f"time-{form}" for form in ("gate-10111", "mask-patches-gate", "prefix")]
    sizes = ["time-1x1x1x1x1", "joint-1x1x1x1x1", "time-1x13x3x3x64", "space-2x4x9x1x40"]
    layouts = ["sliced", "transposed-gradient", "strided", "strided-gradient", "expanded"]
    layouts = [f"space-{name}" for name in (*layouts, "expanded-gradient", "scale")]
    interpret(ATTENTION + ATTENTION_EDGES, ("float32", 64, [*names, *sizes, *layouts, *LIMITS]))


def test_attention_interpreted_in_tiles_and_in_half_precision() -> None:
    forms = ["2x3x13x2x8", "gate-00011", "gate-10111", "prefix", "transposed"]
    names = [f"joint-{form}" for form in forms] + [f"{axis}-far" for axis in AXES]
    others = ["space-mask-patches-gate", "space-1x1x1x1x1", "space-window", "joint-window"]
    half = ["joint-prefix", "joint-gate-00011", "space-mask-patches-gate"]
    runs = [(dtype, rows, half) for dtype in ("bfloat16", "float16") for rows in (0, 64)]
    interpret(ATTENTION, ("float32", 0, [*names, *others]), *runs)


def test_choices_interpreted() -> None:
    methods = ("hard", "perturbed", "diagonal", "gumbel", "lapsum")
    sizes = [f"{method}-3x13x4" for method in methods]
    others = ["perturbed-1x1x1-time", "hard-2x257x64", "gumbel-2x257x64-time", "formula"]
    gathers = [
        f"topk_gather-{method}-{layouts}-float32"
        for method in ("perturbed", "lapsum")
        for layouts in ("sliced-contiguous", "contiguous-transposed", "strided-contiguous")
    ]
    names = [*sizes, *others, *gathers, "topk_gather-hard-contiguous-contiguous"]
    interpret(CHOICES + CHOICE_EDGES, names)


FAR = """
from functools import partial
import torch
from tests.vd_kernels.test_large import far, tensors_of
from vd_kernels import TopKSample, topk_gather
from vd_kernels.spacetime_attention import triton_kernels as attention

# Strides that 32 bits hold, of rows that are read number by number; and strides of 64 bits, in
# vectors.
(apart, width) = json.loads(sys.argv[1])[0]

def same_far_apart(function, tensors):
    results = []
    for place in (torch.clone, partial(far, apart=apart)):
        given = {name: place(x).requires_grad_() for name, x in tensors.items()}
        out = function(**given)
        out = out if isinstance(out, tuple) else (out,)
        grads = [place(normal(*x.shape, seed=50 + i, dtype=x.dtype)) for i, x in enumerate(out)]
        results.append([*out, *torch.autograd.grad(out, list(given.values()), grads)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)

def the_gate():
    visual, question = (2, 20, 3, width), (2, 5, 3, width)
    tensors = tensors_of(query=visual, key=question, value=visual)
    same_far_apart(partial(language_gate, return_gate=True), tensors)
    tensors |= tensors_of(gate_value=question)
    same_far_apart(partial(language_gate, return_gate=True), tensors)

def attention_over(axis, whole):
    video = (2, 3, 4, 3, width)
    prefix = (2, {"time": 4, "space": 3, "joint": 1}[axis], 3, 3, width)
    tensors = tensors_of(query=video, key=video, value=video, gate=video)
    tensors |= tensors_of(prefix_query=prefix, prefix_key=prefix, prefix_value=prefix)
    if not whole:
        attention.whole = lambda *_, **__: None
        attention.tiled = lambda *_, **__: attention.Tiled(16, 16, 4, 1)
    same_far_apart(partial(spacetime_attention, axis=axis), tensors)

def gathering():
    indices = torch.tensor([[1, 4, 7], [0, 4, 8]])
    weights = torch.zeros(2, 3, 9).scatter_(2, indices[..., None], 0.5)

    def gather(values, weights):
        return topk_gather(values, TopKSample(weights, indices, indices >= 0))

    same_far_apart(gather, {"values": normal(2, 9, width), "weights": weights})

with use_backend("triton"):
    run("gate", the_gate)
    for axis, whole in (("time", True), ("space", False), ("joint", False)):
        run(axis, partial(attention_over, axis, whole))
    run("gather", gathering)
"""


@pytest.mark.parametrize(("apart", "width"), [(2**30, 5), (2**31, 16)])
def test_inputs_far_apart_interpreted(apart: int, width: int) -> None:
    """In every dimension but the last."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's way to promise memory")
    done = interpreted(FAR, [apart, width])
    assert done.count("passed") == 5 and "failed" not in done, done


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
    usages = list(compile_kernels.compile_cases([case], [arch]))
    assert not [usage for usage in usages if usage.fails]
    text = DOCUMENT.read_text(encoding="utf-8")
    title = next(compile_kernels.table(usages))
    if title in text:  # another Triton compiles otherwise
        section = text.partition(f"### {arch}")[2].partition("###")[0]
        missing = [u for u in usages if compile_kernels.row(u) not in section]
        assert not missing, "python -m vd_kernels.compile_kernels docs/kernels.md writes it anew"


@pytest.mark.parametrize(("vectors", "scratch"), [(0, 0), (2, 0), (0, 8)])
def test_spills_to_memory_fail_on_amd(vectors: int, scratch: int) -> None:
    text = f"""
    v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
    .private_segment_fixed_size: {scratch}
    .sgpr_spill_count: 3
    .vgpr_count:     40
    .vgpr_spill_count: {vectors}
    """
    found = compile_kernels._of_amd(types.SimpleNamespace(asm={"amdgcn": text}))
    assert found == (40, vectors + scratch, 3, 1)
    usage = compile_kernels.Usage(*["some"] * 5, "gfx942", 4, *found[:3], 0, found[3])
    assert usage.fails == bool(vectors or scratch)
    assert f"| {vectors + scratch} + 3 |" in compile_kernels.row(usage)


OLDEST = Path(sys.prefix) / "triton-3.6.0"
COMPILE = """
import sys, triton
from vd_kernels import compile_kernels
assert triton.__version__ == "3.6.0", triton.__version__
cases = [c for c in compile_kernels.covering() if f"{c.operator}, {c.form}, {c.sizes}" in sys.argv]
assert len(cases) == len(sys.argv) - 1
for case in cases:
    for usage in compile_kernels.compile_cases([case], ["sm_90"]):
        assert not usage.fails, usage
        print(usage.kernel)
"""


@pytest.mark.skipif(not OLDEST.is_dir(), reason="`make test` installs Triton 3.6.0 for it")
def test_the_oldest_triton_compiles_every_kernel() -> None:
    """In one variant each; with OLDEST first on PYTHONPATH, compile_kernels does all of them."""
    cases = (
        "language_gate, softmax, M32 D64",
        "spacetime_attention, time gate, N16 D64",
        "spacetime_attention, space gate prefix, N197 D64",
        "topk_sample, given, N100",
        "topk_sample, gumbel, N512",
        "topk_sample, lapsum, N512",
        "topk_gather, weights, K16 E4096",
        "topk_gather, soft set, K4 E768",
    )
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *cases],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        cwd=DOCUMENT.parents[1],
        env={**os.environ, "PYTHONPATH": str(OLDEST)},
    )
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert found >= set.union(*itertools.chain.from_iterable(KERNELS.values()))


def test_the_document_tells_of_nothing_else() -> None:
    kernels = [
        launch
        for arch in compile_kernels.TARGETS
        for case in compile_kernels.covering()
        for launch in compile_kernels.launched(case, arch)
    ]
    text = DOCUMENT.read_text(encoding="utf-8").partition("<!-- kernels: begin -->")[2]
    assert sum(text.count(f"\n| {operator} ") for operator in OPERATORS) == len(kernels)


SETTINGS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}
KERNELS: dict[tuple[str, str], list[set[str]]] = {
    **{("language_gate", form): [{"forward", "backward"}] for form in compile_kernels.FORMS},
    **{
        ("spacetime_attention", axis): [
            {"short_forward", "short_backward"},
            {"forward", "backward_query", "backward_key"},
        ]
        for axis in AXES
    },
    ("topk_sample", "hard"): [{"choice"}],
    ("topk_sample", "perturbed"): [{"choice", "sample", "share", "gradient"}],
    ("topk_sample", "given"): [{"choice", "sample", "share", "gradient"}],
    ("topk_sample", "diagonal"): [{"choice", "sample", "share"}],
    ("topk_sample", "gumbel"): [{"choice", "gumbel_backward"}],
    ("topk_sample", "lapsum"): [{"choice", "lapsum"}],
    ("topk_gather", "weights"): [{"entries", "gather", "gather_values", "gather_weights"}],
    ("topk_gather", "soft"): [{"gather", "gather_values", "gather_shares"}],
}
"""What forward and backward launch, in one way or the other."""


def test_every_case_has_a_kernel_for_forward_and_backward() -> None:
    cases = list(compile_kernels.every())
    assert len({case[:4] for case in cases}) == len(cases)
    for case in (*cases[::37], *compile_kernels.covering()):
        launches = compile_kernels.launched(case, "sm_90")
        kernels = {launch.kernel.__name__.removesuffix("_kernel") for launch in launches}
        ways = KERNELS[case.operator, case.form.partition(" ")[0]]
        assert any(kernels >= way for way in ways), case
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


def choice_hashes(frames: int, k: int, samples: int, dtype: torch.dtype) -> list[str]:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with _triton.recorded("sm_90") as launches:
        scores, grad, seed = meta(3, frames), meta(3, k, frames), meta(dtype=torch.int64)
        draws = 0.1, samples, seed, k, None, "time", "exact"
        _, indices = topk_kernels.perturbed(scores, k, *draws)
        topk_kernels.perturbed_backward(grad, scores, indices, *draws)
        topk_kernels.gumbel_backward(grad, scores, indices, 1.0, seed, 0, None)
        topk_kernels.gather(meta(3, frames, 8 * k, dtype=dtype), grad, indices)
    return [compile_kernels.source(launch)[0].hash() for launch in launches]


def test_one_compilation_serves_all_choices_of_a_bucket() -> None:
    usual = choice_hashes(300, 9, 500, torch.bfloat16)
    assert choice_hashes(512, 16, 1, torch.bfloat16) == usual
    assert choice_hashes(256, 9, 500, torch.bfloat16) != usual


def test_noise_is_never_fused() -> None:
    """A fused multiply-add rounds once where the noise is specified to be rounded twice."""
    for method in ("perturbed", "gumbel"):
        for launch in compile_kernels.launched(compile_kernels.choice_case(method, 512), "sm_90"):
            code, options = compile_kernels.source(launch)
            if launch.kernel is topk_kernels.share_kernel:
                continue
            assert options["enable_fp_fusion"] is False  # for ptxas, too, as --fmad=false
            target = compile_kernels.TARGETS["sm_90"]
            text = compile_kernels.triton.compile(code, target=target, options=options).asm["ptx"]
            meant = (
                4 if launch.kernel is topk_kernels.gradient_kernel else 0
            )  # four frames at a time
            assert len(set(re.findall(r"fma\.rn\.f32", text))) == bool(meant)
            assert "sqrt.approx" not in text
            normals = launch.kernel in (topk_kernels.sample_kernel, topk_kernels.gradient_kernel)
            assert ("sqrt.rn.f32" in text) == normals


def test_settings_are_there_for_whatever_is_taken() -> None:
    for arch in (*compile_kernels.TARGETS, "sm_86", "interpreter"):
        for frames in (1, 16, 17, 512, LARGEST_ROW):
            cut = topk_kernels.settings(arch, frames)
            padded = _triton.padded(frames)
            assert cut.tile % padded == 0 and min(cut.few, padded) >= 16
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


def test_a_wide_window_stays_within_32_bits() -> None:
    """In `_near` and `_span`, whose sizes are integers of 32 bits."""
    grids = ((1, 60_000), (60_000, 1), (240, 250))
    for axis, grid in itertools.product(("space", "joint"), grids):
        reach = attention_kernels._reach(axis, (2**62,) * 3, grid, False, 3, 60_000)
        step, back, ahead, columns, rows_away, columns_away = reach
        assert columns == grid[1] and columns_away >= grid[1] - 1
        assert axis == "space" or rows_away >= grid[0] - 1
        tokens = 60_000 * (3 if axis == "joint" else 1)
        assert back * step >= tokens - step  # all are within reach
        assert tokens + (max(back, ahead) + 1) * step < 2**31


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
                for backward in (False, True):
                    for rows in (16, 4096):
                        cut = attention_kernels.whole(arch, dtype, rows, size, backward=backward)
                        assert (cut is None) == (rows == 4096)
                for kernel, laden in itertools.product(("forward", "query", "key"), (False, True)):
                    cut = attention_kernels.tiled(arch, dtype, size, kernel, laden=laden)
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


ON_A_GPU = pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device")


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("check", suite("triton", "cuda", operators=OPERATORS), ids=str)
def test_on_a_gpu(check: Check) -> None:
    check()


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("method", ["perturbed", "gumbel"])
@pytest.mark.parametrize(("frames", "k"), [(512, 16), (4096, 64), (37, 5)])
@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_a_gpu_draws_what_the_cpu_draws(method: str, frames: int, k: int, sigma: float) -> None:
    x = torch.randn(3, frames, generator=torch.Generator().manual_seed(0))
    options = {"method": method, "sigma": sigma, "seed": 5, "num_samples": 100}
    with use_backend("triton"):
        found = topk_sample(x.cuda(), k, **options)
    for one, other in zip(found, topk_sample(x, k, **options), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.gpu
@ON_A_GPU
def test_a_captured_graph_draws_anew_with_each_seed() -> None:
    x, seed = torch.randn(4, 200, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    values = torch.randn(4, 200, 40, device="cuda")

    def step() -> torch.Tensor:
        given = x.detach().requires_grad_()
        sample = topk_sample(given, 8, sigma=0.3, num_samples=50, seed=seed)
        topk_gather(values, sample).square().sum().backward()
        return given.grad

    with use_backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for number in (1, 2):
            seed.fill_(number)
            graph.replay()
            assert torch.equal(captured, step())


@pytest.mark.gpu
@ON_A_GPU
def test_more_rows_than_a_grid_has_in_its_second_dimension() -> None:
    x = torch.randn(70_000, 16, device="cuda")
    with use_backend("triton"):
        sample = topk_sample(x, 2, sigma=0.3, num_samples=3, seed=0)
        ours = topk_gather(x[..., None], sample)
    with use_backend("reference"):
        assert torch.equal(
            sample.weights, topk_sample(x, 2, sigma=0.3, num_samples=3, seed=0).weights
        )
        torch.testing.assert_close(ours, topk_gather(x[..., None], sample))


@pytest.mark.gpu
@ON_A_GPU
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
@pytest.mark.large
@ON_A_GPU
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


def test_a_page_that_is_not_there_is_told_of_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_kernels.main(["nowhere.md"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        'nowhere.md is no page to write the table into, nor "all"'
    ]
