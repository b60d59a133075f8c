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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vd_kernels._version import __version__

BACKENDS = ("reference", "cpp", "cuda", "triton")
_BUILD_RECORD = Path(__file__).with_name("_build_info.json")
_CPU_KERNELS = Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")


class BackendError(ValueError, RuntimeError):
    """The backend that the user asked for does not exist, or cannot do what is asked of it here."""


@dataclass(frozen=True)
class Backend:
    """One backend. `lacks` holds, in words, all that keeps it from running; empty when it runs."""

    name: str
    runs_on: str
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
        name: "reference", "cpp", "cuda" or "triton".

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


def choose(operation: str, implementations: Mapping[str, Callable], tensor: Tensor) -> Callable:
    """The implementation of an operation that is to run now.

    Args:
        operation: For the message.
        implementations: By backend, the fastest first; the last one takes everything.
        tensor: Its device and dtype decide which can run.

    Raises:
        BackendError: The user chose a backend that the operation does not have here, or VD_BACKEND
            names none.
    """
    name = _chosen[-1] if _chosen else _environment
    if not name:
        for name, found in implementations.items():
            if not _refuses(name, tensor):
                return found
    _check_name("VD_BACKEND", name)
    found = implementations.get(name)
    if found and not (lacks := _refuses(name, tensor)):
        return found
    if not found:
        lacks = "; ".join(_INSPECT[name]()[1]) or "it has no implementation of it"
    raise BackendError(
        f"{operation} cannot run on backend {name!r}: {lacks}. Choose another with VD_BACKEND or "
        "vd_kernels.use_backend, or leave the choice to each operator"
    )


def _refuses(name: str, tensor: Tensor) -> str:
    """Why a backend cannot take a tensor; empty when it can."""
    if name == "reference":
        return ""
    if not tensor.is_cpu:
        return f"it takes tensors on the CPU, got one on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16; float64 runs on the reference"
    return load_cpu_kernels()


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
        backends=tuple(Backend(name, *_INSPECT[name]()) for name in BACKENDS),
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
    path = _CPU_KERNELS
    if not path.exists():
        return _build_failure("_cpu") or f"{path.name} is missing beside vd_kernels: install again"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return (
            f"{path.name} cannot be loaded into torch {torch.__version__}, perhaps as it was built "
            f"for another one ({error}): install again to build it anew"
        )
    return ""


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


def _reference() -> tuple[str, tuple[str, ...]]:
    return "every device of torch", ()


def _cpp() -> tuple[str, tuple[str, ...]]:
    reason = load_cpu_kernels()
    return "CPU", (reason,) if reason else ()


def _cuda() -> tuple[str, tuple[str, ...]]:
    lacks = ["no operator has a CUDA implementation in this version"]
    return "NVIDIA GPUs", tuple(lacks + _no_cuda())


def _triton() -> tuple[str, tuple[str, ...]]:
    lacks = ["no operator has a Triton implementation in this version"]
    if importlib.util.find_spec("triton") is None:
        lacks.append("triton is not installed (pip install triton)")
    return "NVIDIA and AMD GPUs", tuple(lacks + _no_cuda())


_INSPECT: dict[str, Callable[[], tuple[str, tuple[str, ...]]]] = {
    "reference": _reference,
    "cpp": _cpp,
    "cuda": _cuda,
    "triton": _triton,
}
