"""Builds with a sanitizer see what they are for; `make sanitize` makes them and runs this."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vd_kernels.backends import explain

LEVELS = explain().compiled.get("CPU levels", "").split()
KIND = os.environ.get("VD_SANITIZE")

PROGRAM = """
import torch
from vd_kernels.backends import load_cpu_kernels

assert not load_cpu_kernels()
values = torch.ones(1, 1000, 1, 16, dtype=torch.{dtype})
{results}
torch.ops.vd._language_gate_cpp.default(
    values, values[:, :3], values, None, None, None, 1.0, 0, out, gate
)
"""
PAST_THE_END = "out, gate = values.new_empty(values.numel() - 1), None"
# Both in one place: where one task writes the first, others write the second.
AT_ONCE = "out = torch.empty_like(values); gate = out.view(-1)[: values.shape[1]]"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("kind", "results", "words"),
    [
        ("address", PAST_THE_END, "ERROR: AddressSanitizer"),
        ("thread", AT_ONCE, "WARNING: ThreadSanitizer: data race"),
    ],
)
def test_what_is_wrong_is_seen(kind: str, results: str, words: str, level: str) -> None:
    if kind != KIND:
        pytest.skip(f"only with VD_SANITIZE={kind}")
    if level not in explain().cpu_isa:
        pytest.skip(f"this machine has no {level}")
    # The last levels have kernels of bfloat16 alone; with float32 those of another level would run.
    dtype = "bfloat16" if level in ("avx512_bf16", "amx") else "float32"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(dtype=dtype, results=results)],
        env=os.environ | {"VD_CPU_ISA": level, "ASAN_OPTIONS": "", "TSAN_OPTIONS": ""},
        cwd=os.environ["PYTHONPATH"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode != 0
    assert words in run.stderr
    assert "cpu_kernels.cpp" in run.stderr
