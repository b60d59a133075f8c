"""What the CUDA kernels of topk_sample are compiled to, for a GPU that need not be here.

`csrc/topk_sampling/cuda.cu` is compiled as setup.py does it. How it launches its kernels, and what
it gives them, is told here once more: `expected` counts it, and tests hold it against what a grid
may have.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vd_kernels import compile_kernels as compiling
from vd_kernels.topk_sampling.op import samples_each

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "topk_sampling"


class Launch(NamedTuple):
    """A kernel with its grid."""

    kernel: str
    own: int
    """Frames that each lane of a warp has, where the kernel is a template of that."""
    blocks: int
    warps: int
    """Of a block."""
    bytes: int
    """Of the tensors that it is given, each once."""


def launches(part: str, rows: int, frames: int, slots: int, samples: int = 0) -> list[Launch]:
    """What topk_<part> launches; see `op.IMPLEMENTATIONS`."""
    own = next(own for own in (4, 8, 16, 32) if frames <= 32 * own)
    warps, quads, together = map(constant, ("kWarps", "kQuads", "kTogether"))
    scores, weights, indices = 4 * rows * frames, 4 * rows * slots * frames, 8 * rows * slots
    plan, gains, seed = 4 * rows * (2 * frames + 3), 4 * rows * samples, 8

    def of_warps(kernel: str, count: int, moved: int) -> Launch:
        return Launch(kernel, own, -(-count // warps), warps, moved)

    if part in ("hard", "gumbel"):
        drawn = seed if part == "gumbel" else 0
        return [of_warps("choice", rows, scores + drawn + indices + weights)]
    if part == "gumbel_backward":
        return [of_warps(part, rows, weights + scores + indices + seed + scores)]
    drawing = rows * -(-samples // samples_each(rows, samples))
    drawn = scores + plan + seed + indices
    if part == "perturbed":
        return [
            of_warps("choice", rows, scores + plan + indices),
            of_warps("sample counts", drawing, drawn + weights),
            Launch("share", own, -(-rows * slots * frames // 256), 256 // 32, 2 * weights),
        ]
    return [
        of_warps("choice", rows, scores + plan),
        of_warps("sample gains", drawing, drawn + weights + gains),
        Launch(
            "gradient",
            own,
            rows * -(-frames // (4 * quads)),
            quads * together // 32,
            gains + scores + seed + scores,
        ),
    ]


@functools.lru_cache
def constant(name: str) -> int:
    """A number that cuda_kernels.cuh gives a name."""
    text = (SOURCES / "cuda_kernels.cuh").read_text(encoding="utf-8")
    return int(re.search(rf"\b{name} = (\d+)", text)[1])


def compiler() -> str | None:
    """CUDA's compiler, as setup.py looks for it."""
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def version() -> str:
    """Of the compiler."""
    told = subprocess.check_output([compiler(), "--version"], text=True)
    return re.search(r"\bV(\d[\d.]*)", told)[1]


@functools.lru_cache
def disassembled(arch: str) -> dict[str, str]:
    """What NVIDIA's tool tells of the kernels, by their mangled names: registers, and text."""
    include = Path(torch.__file__).parent / "include"
    command = [compiler(), "-cubin", f"-arch={arch}", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
    command += [flag for flag in _setting("CUDA_FLAGS") if not flag.startswith("-gencode")]
    command += [f"-isystem={include}", f"-DTORCH_TARGET_VERSION={_setting('TORCH_ABI')}"]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "cuda.cubin"
        done = subprocess.run(
            [*command, str(SOURCES / "cuda.cu"), "-o", str(built)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} does not compile cuda.cu: {done.stderr}")
        told = compiling.disassembled(built.read_bytes(), "-res-usage", "-sass")
    # Two lists of the functions: what each takes, and its text.
    found: dict[str, str] = {}
    _, *parts = re.split(r"^\s*Function\s*:?\s*(\w+):?\n", told, flags=re.MULTILINE)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        found[name] = found.get(name, "") + text
    return found


def told_of(launch: Launch, arch: str) -> str:
    """What is told of a kernel that is launched."""
    kernel, _, what = launch.kernel.partition(" ")
    template = "" if kernel in ("share", "gradient") else f"ILi{launch.own}E"
    which = {"": "", "counts": r"\w*WhatE0E", "gains": r"\w*WhatE1E"}[what]
    name = rf"\d{kernel}_kernel{template}{which}E"
    (text,) = (text for mangled, text in disassembled(arch).items() if re.search(name, mangled))
    return text


def _setting(name: str) -> Any:
    """What setup.py assigns to a name."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return next(
        ast.literal_eval(x.value) for x in assigned if getattr(x.targets[0], "id", "") == name
    )
