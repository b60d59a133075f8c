"""What the three operators share about arguments: one wording for one mistake, and autocast."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Read once: looking it up at each call would take as long as a small call's check.
_CHECKS_VALUES = os.environ.get("VD_CHECK") != "0"

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: object, dims: str) -> None:
    """TypeError unless a floating tensor, ValueError unless it has as many dimensions as `dims`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {_dtype(tensor.dtype)}"
        )
    if "..." not in dims and tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} must be {dims}, got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], dims: str) -> None:
    """ValueError unless the shape is exactly `expected`; `dims` names its letters."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} must be {dims} = {tuple(expected)}, got shape {tuple(tensor.shape)}"
        )


def check_same_kind(**tensors: Tensor | None) -> None:
    """TypeError unless all tensors share the first one's dtype, ValueError unless its device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have {first_name}'s dtype {_dtype(first.dtype)}, "
                f"got {_dtype(tensor.dtype)}; cast one of them"
            )
        check_device(name, tensor, first_name, first)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}"
        )


def check_mask(name: str, mask: object) -> None:
    """TypeError unless a boolean tensor."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = _dtype(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor (True where real), got {given}")


def check_choice(name: str, given: object, allowed: Sequence[str]) -> None:
    """ValueError unless `given` is one of the allowed words."""
    if given not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        raise ValueError(f"{name} must be one of {words}, got {given!r}")


def check_integer(name: str, given: object, minimum: int | None = None) -> None:
    """TypeError unless an int (a bool is none), ValueError below `minimum`."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be an int, got {type(given).__name__}")
    if minimum is not None and given < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {given}")


def check_number(name: str, given: object, *, minimum: float | None, exclusive: bool) -> None:
    """TypeError unless a real number, ValueError unless finite and above `minimum`."""
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(given).__name__}")
    too_small = minimum is not None and (given <= minimum if exclusive else given < minimum)
    if too_small or not -math.inf < given < math.inf:
        bound = "" if minimum is None else f" {'>' if exclusive else '>='} {minimum:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {given}")


def refuse_forward_mode(name: str, *tensors: object) -> None:
    """NotImplementedError where a tensor carries a tangent: an operator would silently drop it."""
    if forward_ad._current_level < 0:  # no forward-mode derivative is being taken
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd): use reverse mode"
            )


def may_read_values(tensor: Tensor) -> bool:
    """Whether a check may look at values: not while tracing or capturing, nor with VD_CHECK=0."""
    if not _CHECKS_VALUES or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors in autocast's dtype where autocast is on; float64 is left alone, as torch does."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in FLOATING[:3] else x for x in tensors
    )


def rows_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied if its last dimension is not contiguous: compiled kernels read rows."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def empty_like(tensor: Tensor) -> Tensor:
    """Room for a contiguous tensor like this one; half the time of `new_empty`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which autocast leaves what is computed on the tensor's device alone."""
    if not torch.amp.is_autocast_available(tensor.device.type):  # the meta device
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
