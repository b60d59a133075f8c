"""What only a GPU can show: large tensors, captured graphs, equal bits, and the CPU's choices."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from vd_kernels.backends import LARGEST_CUDA_ROW, load_cuda_kernels
from vd_kernels.spacetime_attention import op as attention
from vd_kernels.testing import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.device_count(), reason="torch sees no CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
LIMIT = 2**31


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals, drawn on the device, as large ones would take long elsewhere."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)


def room_for(elements: int) -> None:
    """Skip unless so many elements of two bytes fit, with as much again for what is compared."""
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * elements:
        pytest.skip(f"needs {4 * elements / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} free")


@pytest.fixture(autouse=True)
def _memory_goes_back():
    yield
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------
# One call of each operator: results, and gradients of its inputs


class Gate:
    def __init__(self, dtype: torch.dtype):
        lengths = (300, 21, 300)
        tokens = [draw(2, n, 4, 64, dtype=dtype, seed=i) for i, n in enumerate(lengths)]
        self.inputs = [x.requires_grad_() for x in (*tokens, draw(4))]
        self.grad = draw(2, 300, 4, 64, dtype=dtype, seed=1)

    def __call__(self, seed: Tensor) -> list[Tensor]:
        query, key, value, bias = self.inputs
        out = language_gate(query, key, value, bias=bias)
        return [out, *torch.autograd.grad(out, self.inputs, self.grad)]


class Attention:
    def __init__(self, dtype: torch.dtype, axis: str):
        self.axis = axis
        tokens = [draw(2, 16, 49, 4, 64, dtype=dtype, seed=i) for i in range(4)]
        self.grad = tokens.pop()
        gate = draw(2, 16, 49, 4, 1).sigmoid()
        self.inputs = [x.requires_grad_() for x in (*tokens, gate)]

    def __call__(self, seed: Tensor) -> list[Tensor]:
        *tokens, gate = self.inputs
        out = spacetime_attention(*tokens, axis=self.axis, gate=gate)
        return [out, *torch.autograd.grad(out, self.inputs, self.grad)]


class Choice:
    def __init__(self, dtype: torch.dtype, method: str):
        self.settings = {"method": method, "sigma": 0.3, "num_samples": 50}
        self.inputs = [x.requires_grad_() for x in (draw(5, 200), draw(5, 200, 96, dtype=dtype))]
        self.grad = draw(5, 8, 96, dtype=dtype, seed=1)

    def __call__(self, seed: Tensor) -> list[Tensor]:
        scores, values = self.inputs
        sample = topk_sample(scores, 8, seed=seed, **self.settings)
        out = topk_gather(values, sample)
        grads = torch.autograd.grad(out, self.inputs, self.grad)
        return [sample.weights, sample.indices, out, *grads]


class CudaChoice:
    """By the CUDA kernels, which take float32 and have no topk_gather."""

    def __init__(self, dtype: torch.dtype, method: str, frames: int = 200):
        self.settings = {"method": method, "sigma": 0.3, "num_samples": 50}
        self.inputs = [draw(5, frames).requires_grad_()]
        self.grad = draw(5, 8, frames, seed=1)

    def __call__(self, seed: Tensor) -> list[Tensor]:
        with use_backend("cuda"):
            sample = topk_sample(*self.inputs, 8, seed=seed, **self.settings)
            grads = torch.autograd.grad(sample.weights, self.inputs, self.grad)
        return [sample.weights, sample.indices, *grads]


CALLS: dict[str, Callable[[torch.dtype], Callable[[Tensor], list[Tensor]]]] = {
    "gate": Gate,
    **{axis: partial(Attention, axis=axis) for axis in ("time", "space", "joint")},
    **{method: partial(Choice, method=method) for method in ("perturbed", "gumbel")},
}
CUDA_CALLS = {
    f"cuda {method}": partial(CudaChoice, method=method) for method in ("perturbed", "gumbel")
}
built = pytest.mark.skipif(bool(load_cuda_kernels()), reason=load_cuda_kernels() or "built")
choosers = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=built)])
calls = pytest.mark.parametrize(
    "call",
    [
        *(pytest.param(call, id=name) for name, call in CALLS.items()),
        *(pytest.param(call, id=name, marks=built) for name, call in CUDA_CALLS.items()),
    ],
)


def seed_of(number: int) -> Tensor:
    return torch.tensor(number, device="cuda")


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {i}"


# ---------------------------------------------------------------------------------------------
# Bits


@calls
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_two_runs_are_equal(call: Callable, dtype: torch.dtype) -> None:
    run = call(dtype)
    assert_equal(run(seed_of(3)), run(seed_of(3)))


@pytest.mark.parametrize("size", [(3, 13, 4), (7, 64, 8), (2, 512, 16), (1, 4096, 64)], ids=str)
@pytest.mark.parametrize("method", ["hard", "perturbed", "gumbel"])
@choosers
def test_the_choices_are_those_of_the_cpu(
    backend: str, method: str, size: tuple[int, int, int]
) -> None:
    rows, frames, k = size
    if backend == "cuda" and frames > LARGEST_CUDA_ROW:
        pytest.skip("the CUDA kernels take shorter rows")
    scores = normal(rows, frames)
    scores[:, frames // 2 :: 5] = scores[:, :1].clone()  # ties
    for seed in (0, -1, 2**63 - 1):
        settings = {"method": method, "sigma": 0.2, "num_samples": 33, "seed": seed}
        with use_backend(backend):
            here = topk_sample(scores.cuda(), k, **settings)
        with use_backend("cpp"):
            there = topk_sample(scores, k, **settings)
        assert torch.equal(here.indices.cpu(), there.indices)
        assert torch.equal(here.weights.cpu(), there.weights)


@pytest.mark.parametrize("gated", [False, True])
def test_joint_attention_is_torchs_where_it_takes_it(gated: bool) -> None:
    tokens = draw(2, 16, 49, 3, 4, 64, dtype=BF16).unbind(3)
    assert attention._is_fused(*tokens)
    assert not attention._is_fused(*(x.float() for x in tokens))
    assert not attention._is_fused(*(x[:, :, 1:] for x in tokens))
    gate = draw(2, 16, 49, 4, 1).sigmoid() if gated else None
    found = [spacetime_attention(*tokens, axis="joint", gate=gate)]
    for name in ("sdpa", "triton"):
        with use_backend(name):
            found.append(spacetime_attention(*tokens, axis="joint", gate=gate))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[1], found[2], atol=1e-2, rtol=1e-2)


@calls
def test_tensors_need_not_be_on_the_current_device(call: Callable) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU alone")
    run = call(BF16)
    expected = run(seed_of(3))
    other = torch.device("cuda", 1)
    run.inputs = [x.detach().to(other).requires_grad_() for x in run.inputs]
    run.grad = run.grad.to(other)
    assert_equal([x.to("cuda:0") for x in run(seed_of(3).to(other))], expected)


# ---------------------------------------------------------------------------------------------
# Graphs and compilation


@calls
def test_a_captured_graph_draws_anew_with_each_seed(call: Callable) -> None:
    run, seed = call(BF16), seed_of(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(seed)  # kernels are loaded outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(seed)
        seed += 1
    for number in range(3):
        graph.replay()
        assert_equal(captured, run(seed_of(number)))
    assert seed.item() == 3


def test_compiled_whole() -> None:
    """Through Inductor, which passes numbers to kernels in its own way."""

    def model(query: Tensor, key: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        out = language_gate(query, key, query)
        out = spacetime_attention(*[out.unflatten(1, (8, -1))] * 3, axis="time", scale=0.3)
        sample = topk_sample(out.float().mean((2, 3, 4)), 3, sigma=0.4, seed=seed)
        return topk_gather(out, sample), sample.indices

    key, seed = draw(2, 9, 4, 64, dtype=BF16), seed_of(5)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for patches in (20, 25):
        query = draw(2, 8 * patches, 4, 64, dtype=BF16)
        inputs = query.requires_grad_(), key.requires_grad_()
        results = []
        for function in (model, compiled):
            out, indices = function(query, key, seed)
            results.append([out, *torch.autograd.grad(out.float().sum(), inputs), indices])
        # What is computed around the operators may round otherwise.
        for one, other in zip(*results, strict=True):
            assert (one.double() - other.double()).abs().max() <= 0.02


@choosers
@pytest.mark.parametrize("method", ["perturbed", "gumbel"])
def test_choices_compiled(backend: str, method: str) -> None:
    def choose(scores: Tensor, grad: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        sample = topk_sample(scores, 4, method=method, sigma=0.4, seed=seed)
        return sample.weights, sample.indices, (sample.weights * grad).sum()

    compiled = torch.compile(choose, fullgraph=True, dynamic=True)
    with use_backend(backend):
        for rows, frames in ((3, 20), (4, 300)):
            scores, grad = draw(rows, frames).requires_grad_(), draw(rows, 4, frames, seed=1)
            results = []
            for function in (choose, compiled):
                *choice, loss = function(scores, grad, seed_of(5))
                results.append([*choice, *torch.autograd.grad(loss, scores)])
            assert_equal(*results)


# ---------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.large
def test_more_than_2_31_elements_in_the_gate() -> None:
    length, heads, width = LIMIT // 64 + 3, 2, 32
    room_for(3 * length * heads * width)
    query = draw(1, length, heads, width, dtype=BF16)
    key = draw(1, 5, heads, width, dtype=BF16, seed=1)
    out, factor = language_gate(query, key, query, return_gate=True)
    for part in (slice(0, 70), slice(length - 70, length)):
        expected, exact = language_gate(query[:, part], key, query[:, part], return_gate=True)
        assert torch.equal(out[:, part], expected) and torch.equal(factor[:, part], exact)


@pytest.mark.large
def test_more_than_2_31_elements_back_through_the_gate() -> None:
    length, heads, width = LIMIT // 64 + 3, 2, 32
    room_for(3 * length * heads * width)
    query = draw(1, length, heads, width, dtype=BF16)
    key, grad = (draw(1, n, heads, width, dtype=BF16, seed=n) for n in (5, 1))

    def gradients(query: Tensor) -> tuple[Tensor, ...]:
        given = query.detach().requires_grad_(), query.detach().requires_grad_()
        out = language_gate(given[0], key, given[1])
        return torch.autograd.grad(out, given, grad.expand(query.shape))

    found = gradients(query)
    for part in (slice(0, 70), slice(length - 70, length)):
        assert_equal([x[:, part] for x in found], list(gradients(query[:, part])))


@pytest.mark.large
@pytest.mark.parametrize("axis", ["time", "space"])
def test_more_than_2_31_elements_in_attention(axis: str) -> None:
    heads, width = 8, 32
    many = LIMIT // (3 * heads * width) + 3
    shape = (1, 3, many, heads, width) if axis == "time" else (1, many, 3, heads, width)
    room_for(3 * 3 * many * heads * width)
    x = draw(*shape, dtype=BF16)
    out = spacetime_attention(x, x, x, axis=axis)
    for part in (slice(0, 7), slice(many - 7, many)):
        some = x[:, :, part] if axis == "time" else x[:, part]
        found = out[:, :, part] if axis == "time" else out[:, part]
        assert torch.equal(found, spacetime_attention(some, some, some, axis=axis))


@pytest.mark.large
def test_more_than_2_31_elements_back_through_time() -> None:
    heads, width = 8, 32
    many = LIMIT // (3 * heads * width) + 3
    room_for(3 * 3 * many * heads * width)
    x = draw(1, 3, many, heads, width, dtype=BF16)
    grad = draw(1, 3, 1, heads, width, dtype=BF16, seed=1)

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        given = [x.detach().requires_grad_() for _ in range(3)]
        out = spacetime_attention(*given, axis="time")
        return torch.autograd.grad(out, given, grad.expand(x.shape))

    found = gradients(x)
    for part in (slice(0, 7), slice(many - 7, many)):
        assert_equal([g[:, :, part] for g in found], list(gradients(x[:, :, part])))


@pytest.mark.large
def test_more_than_2_31_elements_to_gather_from() -> None:
    rows, frames, width = 3, 8, LIMIT // 16
    room_for(2 * rows * frames * width)
    values = draw(rows, frames, width, dtype=BF16)
    sample = topk_sample(draw(rows, frames), 2, method="hard")
    out = topk_gather(values, sample)
    for row in range(rows):
        assert torch.equal(out[row], values[row, sample.indices[row]])


@pytest.mark.parametrize("axis", ["time", "space"])
def test_more_than_262144_sequences(axis: str) -> None:
    count = 65_537
    shape = (1, 2, count, 5, 16) if axis == "time" else (1, count, 2, 5, 16)
    inputs = [draw(*shape, dtype=BF16, seed=i).requires_grad_() for i in range(3)]
    found = {}
    for backend in ("", "reference"):
        with use_backend(backend) if backend else contextlib.nullcontext():
            out = spacetime_attention(*inputs, axis=axis)
            found[backend] = [out, *torch.autograd.grad(out.float().sum(), inputs)]
    for one, other in zip(found[""], found["reference"], strict=True):
        assert (one.float() - other.float()).abs().max() <= 0.05


def test_more_than_262144_rows_of_scores() -> None:
    scores = draw(262_145 + 64, 5)
    sample = topk_sample(scores, 2, num_samples=3, seed=1)
    last = topk_sample(scores[-64:], 2, num_samples=3, seed=1, row_offset=len(scores) - 64)
    assert torch.equal(sample.weights[-64:], last.weights)
    assert torch.equal(sample.indices[-64:], last.indices)


# ---------------------------------------------------------------------------------------------
# Memory errors

SMALL = """
import sys, torch
from tests.vd_kernels import test_gpu as tests

for call in getattr(tests, sys.argv[1]).values():
    for dtype in (torch.float32, torch.bfloat16):
        call(dtype)(tests.seed_of(1))
torch.cuda.synchronize()
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("made", [pytest.param("CUDA_CALLS", marks=built), "CALLS"])
def test_nothing_is_read_or_written_beyond_its_end(made: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the path")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL, made],
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
        cwd=ROOT,
        # Its own allocator hands out pieces of larger blocks, whose ends are none to the tool.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
