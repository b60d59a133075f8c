"""setup.py, run on a copy of the sources: what it builds, what it does when it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vd_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
# A build of everything takes long where other work shares the processor.
pytestmark = pytest.mark.timeout(400)
MODULE_FILE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


@dataclass(frozen=True)
class Build:
    returncode: int
    output: str
    package: Path

    @property
    def module(self) -> Path:
        return self.package / MODULE_FILE

    @property
    def record(self) -> dict[str, object]:
        return json.loads((self.package / "_build_info.json").read_text(encoding="utf-8"))


def build(
    folder: Path,
    *,
    inplace: bool = False,
    operators: bool = False,
    kernels: str | None = None,
    **environment: str,
) -> Build:
    """Run `setup.py build_ext` in a fresh copy of the sources; the checkout stays as it is.

    Without the operators unless they are asked for: they take minutes. `kernels` stands in for
    those of one.
    """
    source = folder / "source"
    (source / "vd_kernels").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("", encoding="utf-8")
    shutil.copy(ROOT / "vd_kernels" / "_version.py", source / "vd_kernels")
    (source / "vd_kernels" / "__init__.py").write_text("", encoding="utf-8")
    part = "" if operators else "common"
    shutil.copytree(ROOT / "csrc" / part, source / "csrc" / part)
    if kernels is not None:
        (source / "csrc" / "language_gate").mkdir()
        (source / "csrc" / "language_gate" / "cpu_kernels.cpp").write_text(kernels, "utf-8")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("VD_BUILD")}
    where = ["--inplace"] if inplace else ["--build-lib", "lib"]
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", "tmp", *where],
        cwd=source,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=390,
    )
    package = (source if inplace else source / "lib") / "vd_kernels"
    return Build(run.returncode, run.stdout + run.stderr, package)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler; set CXX to one")
    return build(tmp_path_factory.mktemp("build"), VD_BUILD_CPP="1")


@pytest.fixture(scope="module")
def compiled(built: Build) -> ModuleType:
    assert built.returncode == 0, built.output
    spec = importlib.util.spec_from_file_location("_C", built.module)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_is_recorded_and_tells_what_it_is(built: Build, compiled: ModuleType) -> None:
    info = compiled.build_info()
    assert built.record["_C"] == built.record["_cpu"] == ""
    assert info["version"] == __version__
    x86 = platform.machine() in ("x86_64", "AMD64")
    assert info["cpu_isa"] == (LEVELS if x86 else ("scalar",))
    assert info["cuda_architectures"] == ()
    assert info["cpp_standard"] == 201703
    assert any(character.isdigit() for character in info["compiler"])


def test_builds_are_reproducible_and_warnings_recorded(built: Build, tmp_path: Path) -> None:
    again = build(tmp_path, VD_BUILD_CPP="1", CXXFLAGS="-DTWICE=1 -DTWICE=2")
    assert again.returncode == 0, again.output
    assert again.module.read_bytes() == built.module.read_bytes()
    assert built.record["warnings"] == []
    told = again.record["warnings"]
    assert told and all("TWICE" in line for line in told)


def test_the_installed_libraries_were_compiled_without_a_warning() -> None:
    """Of all sources, at the optimisation that finds most; `make` compiles what has changed."""
    record = ROOT / "vd_kernels" / "_build_info.json"
    if not record.exists():
        pytest.skip("setup.py has built nothing here")
    assert json.loads(record.read_text(encoding="utf-8"))["warnings"] == []


def test_the_check_of_portable_kernels_runs(tmp_path: Path) -> None:
    """What `.ci/cross` lets two compilers run: it must give the kernels all that they write to."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler; set CXX to one")
    sources = [
        ROOT / "tests" / "vd_kernels" / "portable.cpp",
        *(
            ROOT / "csrc" / name / "cpu_kernels.cpp"
            for name in ("topk_sampling", "spacetime_attention")
        ),
    ]
    flags = ["-std=c++17", "-O0", "-DVD_ISA=scalar", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    program = tmp_path / "portable"
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True, capture_output=True)
    told = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert "attention: bfloat16" in told and "gumbel: gradient" in told


def test_a_build_in_place_leaves_its_record_there(tmp_path: Path) -> None:
    done = build(tmp_path, inplace=True, VD_BUILD_CPP="0")
    assert done.returncode == 0, done.output
    assert all("VD_BUILD_CPP=0" in done.record[library] for library in ("_C", "_cpu"))
    assert not done.module.exists()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
def test_cpu_features_agree_with_the_kernel(compiled: ModuleType) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    found = compiled.cpu_features()
    assert {name for name, present in found.items() if present} == set(found) & set(flags)


def test_cpu_levels_are_nested(compiled: ModuleType) -> None:
    levels = compiled.cpu_isa_levels()
    assert levels == LEVELS[: len(levels)]
    assert len(levels) >= 1
    assert ("avx512" in levels) <= compiled.cpu_features()["avx512f"]
    if platform.machine() not in ("x86_64", "AMD64"):
        assert levels == ("scalar",)


def test_without_compiler_the_install_goes_on_and_says_why(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 0, result.output
    assert not result.module.exists()
    assert "no-such-compiler" in result.record["_C"]
    assert "no-such-compiler" in result.record["_cpu"]
    assert "vd_kernels._C was not built" in result.output


def test_broken_compiler_flag_is_named(tmp_path: Path) -> None:
    result = build(tmp_path, CXXFLAGS="-std=no-such-standard")
    assert result.returncode == 0, result.output
    assert "no-such-standard" in result.record["_C"]


def test_kernels_that_run_when_the_library_is_loaded_are_refused(tmp_path: Path) -> None:
    """A machine that lacks their instructions would die of it, whatever level it runs."""
    constant = build(tmp_path / "constant", VD_BUILD_CPP="1", kernels="const long table = 7;")
    assert constant.returncode == 0, constant.output
    computed = '#include <cstdlib>\nstatic const long table = std::strtol("7", nullptr, 10);'
    result = build(tmp_path / "computed", kernels=computed)
    assert result.returncode == 0, result.output
    assert "runs when the library is loaded" in result.record["_cpu"]
    assert not list(result.package.glob("_cpu.*"))


def test_a_build_that_was_asked_for_must_succeed(tmp_path: Path) -> None:
    result = build(tmp_path, VD_BUILD_CPP="1", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "VD_BUILD_CPP=1" in result.output
    assert "no-such-compiler" in result.output


def test_build_can_be_left_out(tmp_path: Path) -> None:
    result = build(tmp_path, VD_BUILD_CPP="0", CXX="no-such-compiler")
    assert result.returncode == 0, result.output
    assert not result.module.exists()
    assert "VD_BUILD_CPP=0" in result.record["_C"]


def test_without_cuda_the_install_goes_on_and_says_why(built: Build, tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    assert "built for CPUs only" in built.record["_cuda"]
    result = build(tmp_path, VD_BUILD_CPP="0", VD_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "VD_BUILD_CUDA=1, but vd_kernels._cuda cannot be built: this torch" in result.output


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("VD_BUILD_CPP", "yes", "0, 1"),
        ("VD_BUILD_CUDA", "yes", "0, 1"),
        ("VD_SANITIZE", "memory", "address, thread"),
    ],
)
def test_unknown_setting_names_the_allowed_ones(
    name: str, value: str, allowed: str, tmp_path: Path
) -> None:
    result = build(tmp_path, **{name: value})
    assert result.returncode != 0
    assert f"{name}='{value}': allowed are {allowed}, or unset" in result.output


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++", "clang++"])
def test_other_compilers_find_nothing_to_warn_of(compiler: str, tmp_path: Path) -> None:
    """As `make cross` does, but without optimisation, which takes most of its time."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}; `make cross` needs it")
    # To link with where torch's own is for another architecture.
    torch = tmp_path / "libtorch_cpu.so"
    subprocess.run([compiler, "-shared", "-x", "c++", "/dev/null", "-o", torch], check=True)
    flags = {"CXXFLAGS": "-Werror -O0", "LDFLAGS": f"-L{tmp_path}"}
    result = build(tmp_path, operators=True, VD_BUILD_CPP="1", CXX=compiler, **flags)
    assert result.returncode == 0, result.output
