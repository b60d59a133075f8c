"""Compiles csrc/ into `vd_kernels._C`. Metadata and dependencies are in pyproject.toml.

VD_BUILD_CPP    unset: build it, and when that fails install without it and record why
                1: build it or fail            0: do not build it
CXX, CXXFLAGS, LDFLAGS are honoured. The outcome is recorded beside the module in
`_build_info.json`, and `python -m vd_kernels` prints it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_STANDARD = "c++17"


class BuildError(Exception):
    """A build that could not be done; its text is what the user is told."""


def build_setting(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r}: allowed are 0, 1, or unset")
    return value


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [
        "clang++" if sys.platform == "darwin" else "g++"
    ]


def compile_flags() -> list[str]:
    import pybind11

    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    return [
        f"-std={CXX_STANDARD}",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{path}" for path in includes),
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]


def link_flags() -> list[str]:
    # On macOS the interpreter brings Python's symbols when the module is loaded; -s drops the
    # symbol table, which nothing reads.
    darwin = ["-bundle", "-undefined", "dynamic_lookup"]
    flags = darwin if sys.platform == "darwin" else ["-shared", "-s"]
    return [*flags, *shlex.split(os.environ.get("LDFLAGS", ""))]


def ninja_command(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def ninja_plan(ext: Extension, target: Path, version: str) -> str:
    """The build of one extension as a ninja file; object files lie where ninja runs."""
    from ninja.ninja_syntax import escape_path

    compile_command = ninja_command([*compiler(), *compile_flags(), f'-DVD_VERSION="{version}"'])
    lines = [
        "rule compile",
        f"  command = {compile_command} -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = {ninja_command(compiler())} $in {ninja_command(link_flags())} -o $out",
    ]
    objects = []
    for source in ext.sources:
        objects.append(source.replace("/", "_") + ".o")
        lines.append(f"build {objects[-1]}: compile {escape_path(str(ROOT / source))}")
    lines.append(f"build {escape_path(str(target))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compile_extension(ext: Extension, target: Path, folder: Path, version: str) -> None:
    """Build `target` with ninja in `folder`, or raise BuildError with the line that tells why."""
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "build.ninja").write_text(ninja_plan(ext, target, version), encoding="utf-8")
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


class BuildCompiled(build_ext):
    """Builds with ninja and records the outcome; a failure is an error only when asked for."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        reason = self.try_build(ext, target)
        # An editable install loads the module from the source folder, whereto setuptools copies it.
        package = ROOT / "vd_kernels" if self.inplace or self.editable_mode else target.parent
        package.mkdir(parents=True, exist_ok=True)
        if reason:
            for stale in (target, package / target.name):
                stale.unlink(missing_ok=True)
            print(f"vd_kernels._C was not built: {reason}", file=sys.stderr)
        record = {"built": not reason, "reason": reason}
        (package / "_build_info.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def try_build(self, ext: Extension, target: Path) -> str:
        """Empty when built, else why not."""
        wanted = build_setting("VD_BUILD_CPP")
        if wanted == "0":
            return "VD_BUILD_CPP=0 when it was installed"
        try:
            folder = Path(self.build_temp).resolve()
            compile_extension(ext, target, folder, self.distribution.get_version())
        except BuildError as error:
            if wanted == "1":
                raise SystemExit(
                    f"VD_BUILD_CPP=1, but {ext.name} cannot be built: {error}"
                ) from None
            return str(error)
        return ""


setup(
    cmdclass={"build_ext": BuildCompiled},
    ext_modules=[
        Extension(
            "vd_kernels._C",
            sources=["csrc/common/bindings.cpp", "csrc/common/cpu_isa.cpp"],
            depends=["csrc/common/cpu_isa.h"],
            optional=True,
        )
    ],
)
