"""What Triton kernels share: how they are launched, for which GPU, and products of matrices.

Importing this imports Triton; it wakes no GPU up.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs kernels: TRITON_INTERPRET=1 was set when this was imported."""


class Launch(NamedTuple):
    """A kernel with what it is given."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    """Compile-time arguments, num_warps and num_stages."""


_recording: tuple[str, list[Launch]] | None = None


@contextlib.contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Within it kernels are not run but noted, as they would be launched on a GPU of `arch`.

    Operators may then be given tensors without data, of device "meta". Not for several threads.
    """
    global _recording
    before, _recording = _recording, (arch, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Run a kernel on a one-dimensional grid, on the device of its first tensor.

    settings: Compile-time arguments, num_warps and num_stages. Fused multiply-add is on, whatever
        this version of Triton takes for the usual, unless enable_fp_fusion says otherwise.
    """
    if programs == 0:
        return
    if _recording is not None:
        _recording[1].append(Launch(kernel, programs, arguments, settings))
        return
    tensor = next(x for x in arguments if isinstance(x, Tensor))
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    with torch.cuda.device(tensor.device) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **{"enable_fp_fusion": True, **settings})


def registers(arch: str, most: int) -> dict[str, int]:
    """The setting that gives a thread so many registers at most, where the compiler takes one.

    Without it NVIDIA's may spill some to have more programs on a multiprocessor. 0: as it likes.
    """
    return {"maxnreg": most} if most and arch.startswith("sm_") else {}


def architecture(device: torch.device) -> str:
    """The GPU's, as "sm_90" or "gfx942"; "interpreter" on the CPU."""
    if _recording is not None:
        return _recording[0]
    return _architecture(device.index) if device.type == "cuda" else "interpreter"


@functools.lru_cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def padded(n: int) -> int:
    """The smallest power of two that holds n, at least the 16 that products of matrices need."""
    return max(16, triton.next_power_of_2(n))


def unit(*tensors: Tensor | None) -> int:
    """Elements, at most 16 bytes of them, that all outer strides are multiples of.

    Kernels take strides in units: so the compiler sees where rows may be read in whole vectors.
    """
    given = [x for x in tensors if x is not None]
    strides = (stride for x in given for stride in x.stride()[:-1])
    return math.gcd(16 // given[0].element_size(), *strides)


_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, of operands rounded to OPERAND and summed in float32."""
    a, b = a.to(OPERAND), b.to(OPERAND)
    if _UPCAST:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


def operands(dtype: torch.dtype, arch: str) -> dict[str, Any]:
    """What `product` is given for tensors of a dtype, and for gradients (GRAD_...) with them.

    Float32 is multiplied in full; "tf32" instead of "ieee" would let NVIDIA's tensor cores do it
    with 10 bits of mantissa. They do so for gradients of float16, which can leave the range of
    float16 where losses are scaled: tf32 has as many bits and the range of float32.
    """
    value = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
    grad, precision = value, "ieee"
    if dtype == torch.float16:
        grad, precision = tl.float32, "tf32" if arch.startswith("sm_") else "ieee"
    return {
        "OPERAND": value,
        "PRECISION": "ieee",
        "GRAD_OPERAND": grad,
        "GRAD_PRECISION": precision,
    }
