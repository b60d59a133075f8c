"""Compiles csrc/ into three libraries. Metadata and dependencies are in pyproject.toml.

`vd_kernels._C` tells what was built and what the machine can run; `vd_kernels/_cpu` and
`vd_kernels/_cuda` hold the operators' C++ and CUDA kernels, for LibTorch's stable ABI.

VD_BUILD_CPP    unset: build the first two, and when that fails install without and record why
                1: build them or fail          0: do not build them
VD_BUILD_CUDA   the same for the third; unset, it is built where torch is built for CUDA
VD_SANITIZE     address, thread: let sanitizers watch what they do (`make sanitize`)
CXX, CXXFLAGS, LDFLAGS are honoured; kernels are compiled for what CXX compiles for. NVCC names
CUDA's compiler. The outcome is recorded beside the libraries in `_build_info.json`, where
`python -m vd_kernels` finds it, and so is what compilers warned of.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_STANDARD = "c++17"

OPERATORS = ("spacetime_attention", "language_gate", "topk_sampling")  # what takes longest first
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# Levels that add products of bfloat16 alone are compiled for it alone (by_own_dtype in simd.h).
BFLOAT16 = (*AVX512, "-mavx512bf16", "-DVD_BFLOAT16_ALONE")
LEVELS = {
    # Instruction sets that kernels are compiled for, each into a C++ namespace of this name.
    "scalar": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": BFLOAT16,
    "amx": (*BFLOAT16, "-mamx-tile", "-mamx-bf16"),
}
KERNEL_FLAGS = (
    # The noise is specified without fused operations; where one may be fused, the code says so.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-unknown-warning-option",  # Clang lacks some of those that follow
    "-Wno-psabi",
    "-Wno-uninitialized",  # GCC 12 finds it in its own AVX-512 header
    "-Wno-maybe-uninitialized",
)
CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fmad=false",  # as -ffp-contract=off
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
)
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
SETTINGS = {"VD_BUILD_CPP": ("0", "1"), "VD_BUILD_CUDA": ("0", "1"), "VD_SANITIZE": SANITIZERS}
TORCH_ABI = "0x020b000000000000"  # 2.11, the oldest torch that the library loads into


class BuildError(Exception):
    """A build that could not be done; its text is what the user is told."""


def build_setting(name: str) -> str:
    value, allowed = os.environ.get(name, ""), SETTINGS[name]
    if value and value not in allowed:
        raise SystemExit(f"{name}={value!r}: allowed are {', '.join(allowed)}, or unset")
    return value


def sanitizer_flags() -> tuple[str, ...]:
    wanted = build_setting("VD_SANITIZE")
    return ("-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS[wanted]) if wanted else ()


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [
        "clang++" if sys.platform == "darwin" else "g++"
    ]


def compiles_for_x86() -> bool:
    """Whether the compiler makes code for x86-64; it need not be what it runs on."""
    try:
        told = subprocess.run(
            [*compiler(), "-dumpmachine"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the compiler cannot be run: {error}") from error
    return told.stdout.startswith(("x86_64", "amd64"))


def torch_folder() -> Path:
    """Where torch lies; it is not imported, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch is not installed where this is built: install it first, then this with "
            "--no-build-isolation"
        )
    return Path(spec.origin).parent


def cuda_compiler() -> str:
    """CUDA's compiler, where torch has a use for what it compiles."""
    told = (torch_folder() / "version.py").read_text(encoding="utf-8")
    if not re.search(r"^cuda\b.*= *['\"]", told, re.MULTILINE):
        raise BuildError("this torch is built for CPUs only, or for AMD's GPUs")
    found = shutil.which(os.environ.get("NVCC", "nvcc"))
    if found is None:
        raise BuildError("CUDA's compiler nvcc is not found: set NVCC to where it is")
    return found


class Unit(NamedTuple):
    """One compilation: a source may have several, each for another instruction set."""

    source: str
    object: str
    flags: tuple[str, ...]


def units_of(ext: Extension) -> list[Unit]:
    """What the extension is compiled from."""
    if ext.name.endswith("._C"):
        import pybind11

        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        flags = [f"-isystem{path}" for path in includes]
    else:
        flags = [f"-isystem{torch_folder() / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_ABI}"]
    levels = LEVELS if compiles_for_x86() else {"scalar": ()}
    units = []
    for source in ext.sources:
        name = source.replace("/", "_")
        if source.endswith("_kernels.cpp"):
            for level, isa in levels.items():
                own = (f"-DVD_ISA={level}", *KERNEL_FLAGS, *isa)
                units.append(Unit(source, f"{name}.{level}.o", own))
        else:
            units.append(Unit(source, f"{name}.o", tuple(flags)))
    return units


def compile_flags() -> list[str]:
    return [
        f"-std={CXX_STANDARD}",
        "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        f"-I{ROOT / 'csrc'}",
        *sanitizer_flags(),
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]


def link_flags(ext: Extension) -> list[str]:
    # On macOS the interpreter brings Python's symbols when the module is loaded; torch's own
    # library is there when ours is. The symbol table stays: it is small, and profilers read it.
    darwin = ["-bundle", "-undefined", "dynamic_lookup"]
    flags = darwin if sys.platform == "darwin" else ["-shared"]
    flags += sanitizer_flags()
    if not ext.name.endswith("._C"):
        flags += [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
    return [*flags, *shlex.split(os.environ.get("LDFLAGS", ""))]


def cuda_plan(ext: Extension, target: Path) -> str:
    """The same as `ninja_plan` for CUDA sources."""
    from ninja.ninja_syntax import escape_path

    folder = torch_folder()
    flags = [*CUDA_FLAGS, f"-I{ROOT / 'csrc'}", f"-isystem={folder / 'include'}", "-DUSE_CUDA"]
    flags.append(f"-DTORCH_TARGET_VERSION={TORCH_ABI}")
    libraries = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    lines = [
        "rule compile",
        f"  command = {ninja_command([cuda_compiler(), *flags])} -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = {ninja_command([cuda_compiler(), '-shared'])} $in "
        f"{ninja_command(libraries)} -o $out",
    ]
    objects = [f"{source.replace('/', '_')}.o" for source in ext.sources]
    for source, compiled in zip(ext.sources, objects, strict=True):
        lines.append(f"build {compiled}: compile {escape_path(str(ROOT / source))}")
    lines.append(f"build {escape_path(str(target))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja_command(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def ninja_plan(ext: Extension, target: Path, version: str) -> str:
    """The build of one extension as a ninja file; object files lie where ninja runs."""
    from ninja.ninja_syntax import escape_path

    compile_command = ninja_command([*compiler(), *compile_flags(), f'-DVD_VERSION="{version}"'])
    lines = [
        "rule compile",
        f"  command = {compile_command} $flags -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = {ninja_command(compiler())} $in {ninja_command(link_flags(ext))} -o $out",
    ]
    units = units_of(ext)
    for unit in units:
        lines.append(f"build {unit.object}: compile {escape_path(str(ROOT / unit.source))}")
        lines.append(f"  flags = {ninja_command(list(unit.flags))}")
    objects = " ".join(unit.object for unit in units)
    lines.append(f"build {escape_path(str(target))}: link {objects}")
    return "\n".join(lines) + "\n"


def runs_at_load(compiled: Path) -> bool:
    """Whether an object file has code that is to run before any function of it is called.

    One that holds the compiler's own form (-flto) does not show it.
    """
    contents = compiled.read_bytes()
    return b".init_array" in contents or b"__mod_init_func" in contents  # ELF, Mach-O


def compile_extension(ext: Extension, target: Path, folder: Path, version: str) -> list[str]:
    """Build `target` with ninja in `folder`, or raise BuildError with the line that tells why.

    Returns the lines that warn of something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        cuda = ext.name.endswith("._cuda")
        plan = cuda_plan(ext, target) if cuda else ninja_plan(ext, target, version)
        (folder / "build.ninja").write_text(plan, encoding="utf-8")
    except ImportError as error:
        raise BuildError(f"the build tool {error.name} is not installed") from error
    run = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(folder)],
        capture_output=True,
        text=True,
        errors="replace",
    )
    output = run.stdout + run.stderr
    print(output)  # pip shows it with -v
    if run.returncode:
        told = [line for line in output.splitlines() if "error" in line or "not found" in line]
        raise BuildError((told or ["ninja failed without saying why"])[0].strip())
    # What others ask for may run at load: counters of --coverage, say.
    plain = not (cuda or sanitizer_flags() or os.environ.get("CXXFLAGS"))
    for unit in units_of(ext) if plain else []:
        if unit.source.endswith("_kernels.cpp") and runs_at_load(folder / unit.object):
            raise BuildError(
                f"{unit.object} has code that runs when the library is loaded, whatever the machine"
            )
    return [line for line in output.splitlines() if re.search(r"\bwarning( #\S+)?:", line)]


class BuildCompiled(build_ext):
    """Builds with ninja and records the outcome; a failure is an error only when asked for."""

    def run(self) -> None:
        for name in SETTINGS:  # a wrong one is told of before what takes a minute
            build_setting(name)
        super().run()

    def build_extensions(self) -> None:
        """All at once: what one of them compiles would leave cores idle."""
        targets = [Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions]
        with ThreadPoolExecutor() as threads:
            built = list(threads.map(self.try_build, self.extensions, targets))
        record: dict[str, Any] = {"warnings": []}
        for ext, target, (reason, warnings) in zip(self.extensions, targets, built, strict=True):
            if reason:
                target.unlink(missing_ok=True)
                print(f"{ext.name} was not built: {reason}", file=sys.stderr)
            record[ext.name.rpartition(".")[2]] = reason
            record["warnings"] += warnings
        self.record = targets[0].with_name("_build_info.json")
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(record) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """An editable install loads from the source folder: the record goes there, too."""
        for ext in self.extensions:
            stale = Path(self.get_ext_fullpath(ext.name)).name
            (ROOT / "vd_kernels" / stale).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy(self.record, ROOT / "vd_kernels")

    def try_build(self, ext: Extension, target: Path) -> tuple[str, list[str]]:
        """Empty when built, else why not; and what compilers warned of."""
        setting = "VD_BUILD_CUDA" if ext.name.endswith("._cuda") else "VD_BUILD_CPP"
        wanted = build_setting(setting)
        if wanted == "0":
            return f"{setting}=0 when it was installed", []
        try:
            folder = Path(self.build_temp).resolve() / ext.name
            return "", compile_extension(ext, target, folder, self.distribution.get_version())
        except BuildError as error:
            if wanted == "1":
                raise SystemExit(f"{setting}=1, but {ext.name} cannot be built: {error}") from None
            return str(error), []


COMMON = ["csrc/common/cpu_isa.cpp"]
THREADS = ["csrc/common/tsan_threads.cpp"] if os.environ.get("VD_SANITIZE") == "thread" else []
KERNELS = [
    f"csrc/{operator}/{file}"
    for operator in OPERATORS
    for file in ("cpu_kernels.cpp", "cpu.cpp")
    if (ROOT / "csrc" / operator / file).exists()
]
setup(
    cmdclass={"build_ext": BuildCompiled},
    ext_modules=[
        Extension("vd_kernels._C", sources=["csrc/common/bindings.cpp", *COMMON], optional=True),
        Extension(
            "vd_kernels._cpu",
            sources=[*KERNELS, "csrc/common/levels.cpp", *COMMON, *THREADS],
            optional=True,
        ),
        Extension("vd_kernels._cuda", sources=["csrc/topk_sampling/cuda.cu"], optional=True),
    ],
)
