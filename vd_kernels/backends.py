"""Which implementation can run here, and what each missing one lacks.

Importing this module is cheap and touches neither CUDA, Triton nor the compiled library: everything
is looked up when it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vd_kernels._version import __version__

BACKENDS = ("reference", "cpp", "cuda", "triton", "sdpa")
LARGEST_HEAD = 256
"""Elements of one head that Triton kernels take at most: a head lies on chip as a whole."""
MOST = 2**31 - 2**12
"""Programs of a launch at most, as grids are no longer; and rows or elements that kernels for GPUs
number in 32 bits, as the last block of up to 4,096 of them may reach beyond their end."""
MOST_PROGRAMS_OF_HIP = 2**23 - 1
"""Programs of a launch at most on AMD's GPUs, where a grid's threads are counted in 32 bits and
programs have up to 8 warps of 64."""
LARGEST_ROW = 4096
"""Frames to choose from that Triton kernels take at most: a row of them lies on chip."""
LARGEST_CUDA_ROW = 1024
"""The same of CUDA kernels: a row lies in the registers of one warp."""
_BUILD_RECORD = Path(__file__).with_name("_build_info.json")
_CPU_KERNELS = Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")
_CUDA_KERNELS = Path(__file__).with_name(f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")


class BackendError(ValueError, RuntimeError):
    """The backend that the user asked for does not exist, or cannot do what is asked of it here."""


@dataclass(frozen=True)
class Backend:
    """One backend.

    operators: those that it implements, if only some of their methods, on machines where it runs.
    lacks: in words, all that keeps it from running here; empty when it runs.
    """

    name: str
    runs_on: str
    operators: tuple[str, ...]
    lacks: tuple[str, ...]

    @property
    def available(self) -> bool:
        return not self.lacks


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. All values are plain, so that it can be printed, compared or stored.

    versions: name to version, or to "not installed".
    backends: one entry for each name in `BACKENDS`, in that order.
    compiled: what `vd_kernels._C` was built for; empty when it cannot be loaded.
    compiled_reason: why `vd_kernels._C` cannot be loaded; empty when it can.
    cpu_isa: levels that this machine can run, lowest first; only the compiled module can tell, so
        empty without it.
    cpu_features: instruction sets with support of processor and operating system; empty likewise.
    cuda_devices: a line for each CUDA device that torch sees.
    """

    versions: dict[str, str]
    backends: tuple[Backend, ...]
    compiled: dict[str, str]
    compiled_reason: str
    cpu_isa: tuple[str, ...]
    cpu_features: tuple[str, ...]
    cuda_devices: tuple[str, ...]


# The user's choice, innermost last. Not a context variable: backward runs in threads of its own.
_chosen: list[str] = []
# Read once: looking it up at each call would take as long as a tenth of a small call.
_environment = os.environ.get("VD_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let all operators of this process run on one backend, or fail and say why.

    Outside of it the environment's VD_BACKEND, as it was when this package was imported, says the
    same; without either, each operator takes the fastest backend that it has for its inputs.
    Backward follows the choice that holds when it runs.

    Args:
        name: "reference", "cpp", "cuda", "triton" or "sdpa".

    Raises:
        BackendError: There is no backend of that name (a ValueError).

    Example:
        >>> import torch, vd_kernels
        >>> with vd_kernels.use_backend("reference"):
        ...     gate = vd_kernels.language_gate(torch.ones(1, 2, 1, 4), torch.ones(1, 3, 1, 4))
        >>> gate.shape
        torch.Size([1, 2, 1])
    """
    _check_name("use_backend", name)
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


_plans: dict[tuple, Any] = {}


def planned(
    plan: Callable[..., Any], tensors: tuple[Tensor | None, ...], settings: tuple[object, ...]
) -> Any:
    """What `plan(*tensors, *settings)` returns, remembered for arguments alike in all it looks at.

    A plan checks a call's arguments and chooses what runs: it may look at shapes, dtypes and
    devices of tensors, not at their values, at settings as they are, and at the user's choice of a
    backend. Looking it up takes a fraction of the time. Not while compiling, where sizes are
    symbols.
    """
    try:
        key = (
            plan,
            forced(),
            *[None if x is None else (x.shape, x.dtype, x.device) for x in tensors],
            settings,
            *map(type, settings),  # as 1 == 1.0 == True
        )
        found = _plans.get(key)
    except (AttributeError, TypeError):  # no tensors, or a list, which is no key
        return plan(*tensors, *settings)
    if found is None:
        found = plan(*tensors, *settings)
        if len(_plans) >= 4096:  # a service with ever new sizes must not grow
            _plans.clear()
        _plans[key] = found
    return found


def forced() -> str | None:
    """The backend that the user asked for, if any."""
    return _chosen[-1] if _chosen else _environment


def choose(
    operation: str,
    implementations: Mapping[str, Callable],
    tensor: Tensor,
    heads: Sequence[Tensor | None] = (),
    frames: int = 0,
    lacks: Mapping[str, Callable[[], str]] = MappingProxyType({}),
) -> Callable:
    """The implementation of an operation that is to run now.

    Args:
        operation: For the message.
        implementations: By backend, the fastest first; the last one takes everything.
        tensor: Its device and dtype decide which can run.
        heads: Tensors whose last dimension is one head's; its size decides, too.
        frames: How many there are to choose from; that decides likewise.
        lacks: By backend, what tells why it cannot take this call, as far as the operation itself
            knows; "" where it can.

    Raises:
        BackendError: The user chose a backend that the operation does not have here, or VD_BACKEND
            names none.
    """
    name = forced()
    if not name:
        return fastest(implementations, tensor, heads, frames, lacks)
    _check_name("VD_BACKEND", name)
    found = implementations.get(name)
    if found:
        reason = _refuses(name, tensor, heads, frames, forced=True) or lacks.get(name, str)()
        if not reason:
            return found
    else:
        absent = f"it has no {_LANGUAGES[name]} implementation in this version"
        reason = "; ".join([absent, *_INSPECT[name]()[1]])
    raise BackendError(
        f"{operation} cannot run on backend {name!r}: {reason}. Choose another with VD_BACKEND or "
        "vd_kernels.use_backend, or leave the choice to each operator"
    )


def fastest(
    implementations: Mapping[str, Callable],
    tensor: Tensor,
    heads: Sequence[Tensor | None],
    frames: int,
    lacks: Mapping[str, Callable[[], str]],
) -> Callable:
    """As `choose`, where the user has asked for none."""
    able = (
        found
        for name, found in implementations.items()
        if not (_refuses(name, tensor, heads, frames) or lacks.get(name, str)())
    )
    return next(able)


def too_many(counts: Mapping[str, int]) -> str:
    """Why kernels for GPUs cannot take a call with so many of something; empty when they can."""
    for what, count in counts.items():
        most, told = MOST, "2^31 - 2^12"
        if what == "programs" and torch.version.hip:
            most, told = MOST_PROGRAMS_OF_HIP, "2^23 - 1"
        if count > most:
            return f"it takes up to {told} {what}, got {count}"
    return ""


def _refuses(
    name: str,
    tensor: Tensor,
    heads: Sequence[Tensor | None],
    frames: int,
    *,
    forced: bool = False,
) -> str:
    """Why a backend cannot take a tensor; empty when it can."""
    if name == "reference":
        return ""
    if name == "triton":
        return _triton_refuses(tensor, heads, frames, forced)
    if name == "cuda":
        return _cuda_refuses(tensor, frames)
    if name == "sdpa":
        unasked = "" if forced or tensor.is_cuda else "it runs on GPUs alone unless asked for"
        return _refuses_double(tensor) or unasked
    if not tensor.is_cpu:
        return f"it takes tensors on the CPU, got one on {tensor.device}"
    return _refuses_double(tensor) or load_cpu_kernels()


def _triton_refuses(
    tensor: Tensor, heads: Sequence[Tensor | None], frames: int, forced: bool
) -> str:
    # The interpreter is for tests: on the CPU it never runs unasked.
    if not tensor.is_cuda and not (tensor.is_cpu and forced and triton_is_interpreted()):
        lacks = f"it takes tensors on an NVIDIA or AMD GPU, got one on {tensor.device}"
        return "; ".join([lacks, *_INSPECT["triton"]()[1]]) if forced else lacks
    if reason := _refuses_double(tensor) or load_triton():
        return reason
    for x in heads:
        if x is not None and x.shape[-1] > LARGEST_HEAD:
            return f"it takes heads of up to {LARGEST_HEAD} elements, got {x.shape[-1]}"
    if frames > LARGEST_ROW:
        return f"it takes up to {LARGEST_ROW} frames to choose from, got {frames}"
    return _too_old(tensor.device.index) if tensor.is_cuda else ""


def _cuda_refuses(tensor: Tensor, frames: int) -> str:
    if not tensor.is_cuda:
        lacks = f"it takes tensors on an NVIDIA GPU, got one on {tensor.device}"
        return "; ".join([lacks, *_INSPECT["cuda"]()[1]])
    if reason := _refuses_double(tensor) or load_cuda_kernels():
        return reason
    if frames > LARGEST_CUDA_ROW:
        return f"it takes up to {LARGEST_CUDA_ROW} frames to choose from, got {frames}"
    return _too_old(tensor.device.index)


def _refuses_double(tensor: Tensor) -> str:
    if tensor.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16; float64 runs on the reference"
    return ""


@functools.lru_cache
def _too_old(index: int) -> str:
    """Why our kernels do not run on a GPU; empty when they do."""
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and major < 8:
        return f"it takes NVIDIA GPUs from compute capability 8.0 on, got {major}.{minor}"
    return ""


def _check_name(source: str, name: str) -> None:
    if name not in BACKENDS:
        words = ", ".join(f'"{word}"' for word in BACKENDS)
        raise BackendError(f"{source} must be one of {words}, got {name!r}")


def explain(*, name_devices: bool = False) -> Explanation:
    """Tells what each backend can do here.

    name_devices: also name each CUDA device and its compute capability. That initialises CUDA in
        this process, after which it must not be forked; without it devices are only counted.
    """
    module, reason = load_compiled()
    features = module.cpu_features() if module else {}
    return Explanation(
        versions=_versions(),
        backends=tuple(_backend(name) for name in BACKENDS),
        compiled=_compiled_facts(module) if module else {},
        compiled_reason=reason,
        cpu_isa=module.cpu_isa_levels() if module else (),
        cpu_features=tuple(name for name, present in features.items() if present),
        cuda_devices=_cuda_devices(name_devices),
    )


@functools.lru_cache(maxsize=1)
def load_compiled() -> tuple[types.ModuleType | None, str]:
    """The module `vd_kernels._C` and "", or None and the reason why it cannot be loaded.

    The first call decides: a failure is remembered with its cause.
    """
    try:
        return importlib.import_module("vd_kernels._C"), ""
    except ImportError as error:
        return None, _build_failure("_C") or f"vd_kernels._C cannot be loaded: {error}"


@functools.lru_cache(maxsize=1)
def load_cpu_kernels() -> str:
    """Load the C++ kernels, which adds their private operators to torch. Why not, or "".

    The first call decides: a failure is remembered with its cause.
    """
    return _load_kernels("_cpu", _CPU_KERNELS)


@functools.lru_cache(maxsize=1)
def load_cuda_kernels() -> str:
    """The same for the CUDA kernels."""
    return _load_kernels("_cuda", _CUDA_KERNELS)


def _load_kernels(library: str, path: Path) -> str:
    if not path.exists():
        return _build_failure(library) or f"{path.name} is missing beside vd_kernels: install again"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return (
            f"{path.name} cannot be loaded into torch {torch.__version__}, perhaps as it was built "
            f"for another one ({error}): install again to build it anew"
        )
    return ""


@functools.lru_cache(maxsize=1)
def load_triton() -> str:
    """Import Triton and what its kernels share. Why that fails, or "".

    The first call decides: a failure is remembered with its cause.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        importlib.import_module("vd_kernels._triton")
    except (ImportError, AttributeError) as error:
        version = _installed_version("triton")
        return f"triton {version} cannot be used ({error}): install 3.6 or newer"
    return ""


def triton_function(package: str, name: str) -> Callable:
    """A function of an operator's triton_kernels.py, which is imported when it is first called.

    package: The operator's folder in vd_kernels.
    """

    def run(*arguments: Any) -> Any:
        module = importlib.import_module(f"vd_kernels.{package}.triton_kernels")
        return getattr(module, name)(*arguments)

    return run


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: TRITON_INTERPRET=1 before their import."""
    return not load_triton() and importlib.import_module("vd_kernels._triton").INTERPRETED


def _build_failure(library: str) -> str:
    """Why setup.py did not build a library; empty when it built it or left no record."""
    try:
        reason = json.loads(_BUILD_RECORD.read_text(encoding="utf-8"))[library]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"not built: {reason}" if reason else ""


def _compiled_facts(module: types.ModuleType) -> dict[str, str]:
    info = module.build_info()
    return {
        "version": info["version"],
        "compiler": info["compiler"],
        "C++ standard": str(info["cpp_standard"]),
        "CPU levels": " ".join(info["cpu_isa"]),
        "CUDA architectures": " ".join(info["cuda_architectures"]) or "none",
    }


def _versions() -> dict[str, str]:
    return {
        "vd_kernels": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed_version("triton"),
        "numpy": _installed_version("numpy"),
    }


def _installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_devices(name_devices: bool) -> tuple[str, ...]:
    count = torch.cuda.device_count()  # asks the driver, does not initialise CUDA
    if not name_devices:
        return tuple(f"cuda:{index}" for index in range(count))
    lines = []
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return tuple(lines)


def _no_cuda() -> list[str]:
    if torch.version.cuda is None and torch.version.hip is None:
        return ["this torch is built for CPUs only"]
    return [] if torch.cuda.device_count() else ["torch sees no GPU"]


def _backend(name: str) -> Backend:
    runs_on, lacks = _INSPECT[name]()
    operators = tuple(
        operator
        for operator, tables in _implementations().items()
        if any(name in table for table in tables)
    )
    if not operators:
        lacks = (f"no operator has a {_LANGUAGES[name]} implementation in this version", *lacks)
    return Backend(name, runs_on, operators, lacks)


def _implementations() -> dict[str, list[Mapping[str, Callable]]]:
    """For each operator the implementations of its parts, by backend."""
    from vd_kernels.language_gate import op as gate
    from vd_kernels.spacetime_attention import op as attention
    from vd_kernels.topk_sampling import op as topk

    sampling, gathering = [], []
    for part, table in topk.IMPLEMENTATIONS.items():
        (gathering if part.startswith("gather") else sampling).append(table)
    return {
        "language_gate": [gate.FORWARD, gate.BACKWARD],
        "topk_sample": sampling,
        "topk_gather": gathering,
        "spacetime_attention": [attention.FORWARD, attention.BACKWARD],
    }


def _reference() -> tuple[str, tuple[str, ...]]:
    return "every device of torch", ()


def _cpp() -> tuple[str, tuple[str, ...]]:
    reason = load_cpu_kernels()
    return "CPU", (reason,) if reason else ()


def _cuda() -> tuple[str, tuple[str, ...]]:
    lacks = [reason] if (reason := load_cuda_kernels()) else []
    return "NVIDIA GPUs", tuple(lacks + _no_cuda())


def _triton() -> tuple[str, tuple[str, ...]]:
    lacks = [reason] if (reason := load_triton()) else []
    if triton_is_interpreted():
        return "the CPU, interpreted, when asked for", tuple(lacks)
    return "NVIDIA and AMD GPUs", tuple(lacks + _no_cuda())


def _sdpa() -> tuple[str, tuple[str, ...]]:
    return 'GPUs, forward of axis "joint" alone; elsewhere when asked for', ()


_INSPECT: dict[str, Callable[[], tuple[str, tuple[str, ...]]]] = {
    "reference": _reference,
    "cpp": _cpp,
    "cuda": _cuda,
    "triton": _triton,
    "sdpa": _sdpa,
}
"""Where a backend runs, and what this machine lacks for it."""

_LANGUAGES = {
    "reference": "PyTorch",
    "cpp": "C++",
    "cuda": "CUDA",
    "triton": "Triton",
    "sdpa": "scaled_dot_product_attention",
}
