"""CUDA kernels: compiled for absent GPUs, computed by threads of the CPU, and on a GPU."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vd_kernels import topk_sample, use_backend
from vd_kernels.backends import LARGEST_CUDA_ROW, load_cuda_kernels, load_triton, too_many
from vd_kernels.testing import Check, normal, suite
from vd_kernels.topk_sampling import op

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("choice", "sample", "share", "gradient", "gumbel_backward")
ARCHITECTURES = ("80", "90a")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """The object, and what nvcc tells of it."""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        pytest.skip("no nvcc; set NVCC to one")
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    abi = re.search(r'^TORCH_ABI = "(\w+)"', text, re.MULTILINE)[1]
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-DUSE_CUDA", "-Xptxas=-v"]
    command += [f"-DTORCH_TARGET_VERSION={abi}", f"-I{ROOT / 'csrc'}", f"-isystem={include}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    built = tmp_path_factory.mktemp("cuda") / "cuda.o"
    command += ["-c", str(ROOT / "csrc/topk_sampling/cuda.cu"), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return built.read_bytes(), done.stdout + done.stderr


def test_kernels_are_launched_on_the_device_of_their_tensors(compiled: tuple[bytes, str]) -> None:
    assert b"aoti_torch_create_device_guard" in compiled[0]


def test_kernels_compile_without_a_spill(compiled: tuple[bytes, str]) -> None:
    _, told = compiled
    entries = re.findall(r"entry function '(\w+)' for '(\w+)'", told)
    for arch in ARCHITECTURES:
        names = [name for name, found in entries if found == f"sm_{arch}"]
        assert len(names) >= 4 * 5 + 2  # four sizes of a row
        for kernel in KERNELS:
            assert any(f"{kernel}_kernel" in name for name in names)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    assert len(spills) >= len(entries)
    assert set(spills) == {("0", "0")}, told


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for the CPU, whose threads are the lanes of warps."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler; set CXX to one")
    program = tmp_path_factory.mktemp("cuda") / "emulated"
    command = [compiler, "-std=c++20", "-O2", "-ffp-contract=off", "-pthread", "-w"]
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "tests/vd_kernels/emulated.cpp"), "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "barrier: No such file" in done.stderr:
        pytest.skip("this compiler lacks C++20's barriers")
    assert done.returncode == 0, done.stderr
    return program


METHODS = ("hard", "gumbel", "perturbed", "diagonal")


def emulate(
    program: Path, method: str, x: Tensor, grad: Tensor, seed: int, each: int, **options: float
) -> tuple[Tensor, Tensor, Tensor]:
    """indices, weights and the gradient of the scores."""
    (rows, frames), slots = x.shape, grad.shape[1]
    numbers = [METHODS.index(method), rows, frames, slots, options["samples"], each]
    numbers += [options["by_score"], options["row_offset"], options["sigma"], 0.7]
    given = x.numpy().tobytes() + grad.numpy().tobytes() + np.int64(seed).tobytes()
    done = subprocess.run(
        [program, *map(str, numbers)], input=given, capture_output=True, timeout=120, check=True
    )
    cut = 8 * rows * slots
    floats = np.frombuffer(done.stdout[cut:], np.float32)
    weights, gradient = np.split(floats, [rows * slots * frames])
    return (
        torch.from_numpy(np.frombuffer(done.stdout[:cut], np.int64).copy()).view(rows, slots),
        torch.from_numpy(weights.copy()).view(rows, slots, frames),
        torch.from_numpy(gradient.copy()).view(rows, frames),
    )


SIZES = [
    # frames, slots, sigma: tiles for few frames, for twice as many, and for all
    (13, 4, 0.5),
    (200, 5, 0.05),
    (200, 5, 0.4),
    (500, 16, 0.5),
    (1000, 9, 0.1),
]


@pytest.mark.parametrize("order", ["time", "score"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("frames", "slots", "sigma"), SIZES)
def test_emulated_kernels_choose_as_the_reference(
    emulator: Path, frames: int, slots: int, sigma: float, method: str, order: str
) -> None:
    x = normal(4, frames)
    x[1, slots // 2 :] = -math.inf  # fewer real frames than slots
    x[2] = torch.where(normal(frames, seed=1) > 0, 0.0, -0.0)  # all are equal
    x[3] = x[3].round()
    grad, seed, samples, row_offset = normal(4, slots, frames, seed=2), -5, 5, 2**32 - 2
    indices, weights, gradient = emulate(
        *(emulator, method, x, grad, seed, 3),
        samples=samples,
        by_score=int(order == "score"),
        row_offset=row_offset,
        sigma=sigma,
    )
    options = {"sigma": sigma, "num_samples": samples, "temperature": 0.7, "seed": seed}
    options |= {"row_offset": row_offset, "order": order}
    options["method"] = "perturbed" if method == "diagonal" else method
    options["gradient"] = "diagonal" if method == "diagonal" else "exact"
    with use_backend("reference"):
        given = x.clone().requires_grad_()
        expected = topk_sample(given, slots, **options)
    assert torch.equal(indices, expected.indices)
    assert torch.equal(weights, expected.weights)
    if method != "hard":
        (exact,) = torch.autograd.grad(expected.weights, given, grad)
        assert (gradient - exact).abs().max() <= 1e-5 * max(1.0, exact.abs().max().item())


# ---------------------------------------------------------------------------------------------
# Grids


def taken(part: str, rows: int, frames: int, slots: int, samples: int) -> bool:
    """Whether topk_<part> does not find this too much."""
    scores, indices = (torch.empty(rows, n, device="meta") for n in (frames, slots))
    arguments = {
        "hard": (scores, slots),
        "gumbel": (scores, slots, 1.0),
        "gumbel_backward": (scores, scores, indices, 1.0),
        "perturbed": (scores, slots, 0.1, samples),
        "perturbed_backward": (scores, scores, indices, 0.1, samples),
    }
    return not too_many(op._counts(part, arguments[part]))


@pytest.mark.skipif(bool(load_triton()), reason=load_triton() or "is there")
@pytest.mark.parametrize("part", [part for part, x in op.IMPLEMENTATIONS.items() if "cuda" in x])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (512, 16, 500), (1024, 1024, 1), (9, 2, 100_000)])
def test_what_is_taken_fits_a_grid(part: str, sizes: tuple[int, int, int]) -> None:
    from vd_kernels import compile_cuda

    rows, refused = 1, 2**40
    while refused - rows > 1:
        middle = (rows + refused) // 2
        rows, refused = (middle, refused) if taken(part, middle, *sizes) else (rows, middle)
    assert rows > 2**10
    for launch in compile_cuda.launches(part, rows, *sizes):
        assert launch.blocks < 2**31, (rows, launch)


# ---------------------------------------------------------------------------------------------
# Refused, and on a GPU


def test_a_tensor_on_the_cpu_is_refused() -> None:
    x = torch.randn(2, 9)
    for method in ("hard", "perturbed", "gumbel"):
        with use_backend("cuda"), pytest.raises(RuntimeError, match=r"NVIDIA GPU, got one on cpu"):
            topk_sample(x, 3, method=method)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="it has no CUDA implementation"):
        topk_sample(x, 3, method="lapsum")


ON_A_GPU = pytest.mark.skipif(
    not torch.cuda.device_count() or bool(load_cuda_kernels()),
    reason=load_cuda_kernels() or "torch sees no CUDA device",
)
CHECKS = [c for c in suite("cuda", "cuda", operators=["topk_sample"]) if "lapsum" not in c.name]


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_on_a_gpu(check: Check) -> None:
    check()


@pytest.mark.gpu
@ON_A_GPU
def test_too_many_frames_are_refused() -> None:
    x = torch.randn(1, LARGEST_CUDA_ROW + 1, device="cuda")
    with use_backend("cuda"), pytest.raises(RuntimeError, match="up to 1024 frames"):
        topk_sample(x, 3)
