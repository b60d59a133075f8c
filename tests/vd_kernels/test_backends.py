"""Backends explain themselves: in Python, and as what `python -m vd_kernels` prints."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vd_kernels import backends, language_gate, use_backend
from vd_kernels.__main__ import render
from vd_kernels._version import __version__
from vd_kernels.language_gate import op as gate
from vd_kernels.spacetime_attention import op as attention
from vd_kernels.topk_sampling import op as topk


@pytest.fixture
def without_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vd_kernels._C", None)
    monkeypatch.setattr(backends, "_CPU_KERNELS", tmp_path / "_cpu.so")
    for load in (backends.load_compiled, backends.load_cpu_kernels):
        load.cache_clear()
    yield
    for load in (backends.load_compiled, backends.load_cpu_kernels):
        load.cache_clear()


def by_name(found: backends.Explanation) -> dict[str, backends.Backend]:
    return {backend.name: backend for backend in found.backends}


def test_every_backend_runs_or_says_why_not() -> None:
    found = backends.explain()
    assert tuple(backend.name for backend in found.backends) == backends.BACKENDS
    assert by_name(found)["reference"].available
    for backend in found.backends:
        assert backend.available == (backend.lacks == ())
        assert all(lack.strip() for lack in backend.lacks)


def test_a_backend_tells_which_operators_it_has() -> None:
    every = ("language_gate", "topk_sample", "topk_gather", "spacetime_attention")
    found = by_name(backends.explain())
    assert found["reference"].operators == found["cpp"].operators == every
    assert found["triton"].operators == every
    assert found["cuda"].operators == ("topk_sample",)
    assert found["sdpa"].operators == ("spacetime_attention",)
    assert 'axis "joint"' in found["sdpa"].runs_on


def test_a_missing_or_broken_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vd_kernels._triton", raising=False)
    backends.load_triton.cache_clear()
    try:
        monkeypatch.setitem(sys.modules, "triton", None)
        assert "triton is not installed" in by_name(backends.explain())["triton"].lacks[0]
        backends.load_triton.cache_clear()
        old = types.ModuleType("triton")
        old.__spec__ = importlib.util.spec_from_loader("triton", loader=None)
        monkeypatch.setitem(sys.modules, "triton", old)  # has nothing of what is needed
        assert "cannot be used" in by_name(backends.explain())["triton"].lacks[0]
        x = torch.randn(1, 2, 1, 4)
        with use_backend("triton"), pytest.raises(RuntimeError, match="cannot be used"):
            language_gate(x, x)
    finally:
        backends.load_triton.cache_clear()


def test_gpu_backends_name_the_missing_gpu() -> None:
    if torch.cuda.device_count():
        pytest.skip("this machine has a GPU")
    for name in ("cuda", "triton"):
        lacks = " ".join(by_name(backends.explain())[name].lacks)
        assert "built for CPUs only" in lacks or "sees no GPU" in lacks


def test_versions_are_the_imported_ones() -> None:
    versions = backends.explain().versions
    assert versions["vd_kernels"] == __version__
    assert versions["torch"] == torch.__version__
    assert versions["Python"] == ".".join(map(str, sys.version_info[:3]))


def test_explaining_does_not_initialise_cuda() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("another test of this process has initialised CUDA")
    backends.explain()
    assert not torch.cuda.is_initialized()


@pytest.mark.usefixtures("without_compiled")
def test_failed_build_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "_build_info.json"
    record.write_text('{"_C": "g++: not found", "_cpu": "torch is missing"}', encoding="utf-8")
    monkeypatch.setattr(backends, "_BUILD_RECORD", record)
    found = backends.explain()
    assert found.compiled == {}
    assert found.compiled_reason == "not built: g++: not found"
    assert by_name(found)["cpp"].lacks == ("not built: torch is missing",)
    assert "not built: g++: not found" in render(found)


@pytest.mark.usefixtures("without_compiled")
@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"_C": "", "_cpu": ""}'])
def test_missing_or_damaged_record_leaves_the_import_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    record = tmp_path / "_build_info.json"
    if text is not None:
        record.write_text(text, encoding="utf-8")
    monkeypatch.setattr(backends, "_BUILD_RECORD", record)
    found = backends.explain()
    assert "vd_kernels._C cannot be loaded" in found.compiled_reason
    assert "_cpu.so is missing" in by_name(found)["cpp"].lacks[0]


@pytest.mark.usefixtures("without_compiled")
def test_a_library_that_torch_cannot_load_is_told_and_left_aside(tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    (lack,) = by_name(backends.explain())["cpp"].lacks
    assert "_cpu.so cannot be loaded into torch" in lack and "install again" in lack
    x = torch.randn(1, 2, 1, 4)
    assert language_gate(x, x).shape == (1, 2, 1)  # the reference takes over
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"_cpu\.so cannot be loaded"):
        language_gate(x, x)


def test_a_backend_says_which_tensors_it_takes() -> None:
    if not by_name(backends.explain())["cpp"].available:
        pytest.skip("the C++ kernels are not built here")
    x = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="float64 runs on the reference"):
        language_gate(x, x)
    assert language_gate(x, x).dtype == torch.float64


def test_command_prints_an_aligned_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vd_kernels"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heading = lines[lines.index("Backends") + 1]
    assert heading.split() == ["backend", "here", "runs", "on", "operators", "lacks"]
    column = heading.index("lacks")
    told = [line for line in lines if "implementation in this version" in line]
    assert [line.index("no operator has") for line in told] == [column] * len(told)
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)


# ---------------------------------------------------------------------------------------------
# What is too large for GPUs. Fakes of tensors there have sizes and no memory.

WIDE = 2**31 - 2**12


def gate_of(batch: int, length: int, tokens: int, width: int) -> Callable:
    visual, question = (torch.empty(batch, n, 1, width) for n in (length, tokens))
    return gate.choose(gate.FORWARD, visual, question, None, None)


def attention_of(axis: str, frames: int, patches: int, prefixes: int = 0) -> Callable:
    x = torch.empty(1, frames, patches, 1, 8)
    prefix = torch.empty(1, 1, prefixes, 1, 8) if prefixes else None
    return attention.choose(attention.BACKWARD, x, axis, (1, 1, 1), None, prefix)


def gather_of(rows: int, slots: int, frames: int, *frame: int) -> Callable:
    values, weights = torch.empty(rows, frames, *frame), torch.empty(rows, slots, frames)
    return topk.choose("gather", values, weights, torch.empty(rows, slots, dtype=torch.int64))


def sample_of(rows: int, frames: int, k: int, samples: int) -> Callable:
    return topk.choose("perturbed", torch.empty(rows, frames), k, 0.1, samples)


LARGE = [
    # what is chosen for it, what is not taken any more, and why
    (partial(gate_of, 1, WIDE, 5, 8), partial(gate_of, 1, WIDE + 1, 5, 8), "visual tokens"),
    (partial(gate_of, WIDE, 1, 5, 8), partial(gate_of, WIDE + 1, 1, 5, 8), "programs"),
    (partial(gate_of, 1, 9, 2**27 - 256, 16), partial(gate_of, 1, 9, 2**27, 16), "question"),
    *(
        (partial(attention_of, *taken), partial(attention_of, *refused), why)
        for taken, refused, why in (
            (("time", WIDE, 1), ("time", WIDE + 1, 1), "tokens of a sequence"),
            (("time", 1, WIDE), ("time", 1, WIDE + 1), "programs"),
            (("joint", WIDE, 1), ("joint", WIDE + 1, 1), "tokens of a sequence"),
            (("space", WIDE, 1, 15), ("space", WIDE, 1, 16), "programs"),
        )
    ),
    (
        partial(gather_of, 1, 1, 2, WIDE),
        partial(gather_of, 1, 1, 2, WIDE + 1),
        "numbers of a frame",
    ),
    (partial(gather_of, WIDE, 1, 1, 3), partial(gather_of, WIDE + 1, 1, 1, 3), "programs"),
    (partial(gather_of, 2**20, 2, 9, 2**17), partial(gather_of, 2**20, 16, 9, 2**17), "programs"),
    (partial(sample_of, WIDE // 16, 9, 2, 1000), partial(sample_of, 2**27, 9, 2, 1000), "programs"),
    (
        partial(sample_of, 2**27 - 256, 1000, 2, 9),
        partial(sample_of, 2**27, 1000, 2, 9),
        "programs",
    ),
]


@pytest.mark.parametrize(("taken", "refused", "why"), LARGE)
def test_what_is_too_large_for_a_gpu_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, taken: Callable, refused: Callable, why: str
) -> None:
    if backends.load_triton():
        pytest.skip(backends.load_triton())
    monkeypatch.setattr(backends, "_too_old", lambda index: "")
    tables = gate.FORWARD, attention.BACKWARD, *topk.IMPLEMENTATIONS.values()
    with FakeTensorMode(), torch.device("cuda"):
        found, other = taken(), refused()
        assert any(found is table["triton"] for table in tables)
        assert any(other is table["reference"] for table in tables)
        for backend in ("triton", "cuda") if refused.func is sample_of else ("triton",):
            monkeypatch.setattr(backends, "load_cuda_kernels", lambda: "")
            limit = pytest.raises(backends.BackendError, match=rf"up to 2\^31 - 2\^12 .*{why}, got")
            with use_backend(backend), limit:
                refused()
