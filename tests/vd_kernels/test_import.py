"""Importing vd_kernels is light: it adds little to torch's own import and wakes nothing up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import vd_kernels
seconds = time.process_time() - start
print(json.dumps({
    "seconds": seconds,
    "added": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def run(code: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    probe = json.loads(run(PROBE))
    heavy = {
        "triton",
        "transformers",
        "matplotlib",
        "av",
        "decord",
        "PIL",
        "rich",
        "typer",
        "scipy",
    }
    assert not heavy & set(probe["added"])
    assert "videodistill" not in probe["added"], "vd_kernels knows nothing of videodistill"
    assert probe["cuda"] is False
    # CPU seconds of the import alone, so that a busy machine does not count.
    assert probe["seconds"] < 0.3


def test_import_needs_neither_triton_nor_the_compiled_libraries() -> None:
    code = """
import pathlib, sys
sys.modules["triton"] = None           # makes every import of it fail
sys.modules["vd_kernels._C"] = None
import vd_kernels
from vd_kernels import backends
from vd_kernels.backends import explain
backends._CPU_KERNELS = pathlib.Path("no such library")
found = explain()
print([backend.name for backend in found.backends if backend.available], found.compiled)
"""
    assert run(code).strip() == "['reference', 'sdpa'] {}"


def test_the_environment_chooses_the_backend() -> None:
    code = """
import torch, vd_kernels
try:
    vd_kernels.language_gate(torch.ones(1, 2, 1, 4), torch.ones(1, 3, 1, 4))
except vd_kernels.backends.BackendError as error:
    print(error)
"""
    environment = os.environ | {"VD_BACKEND": "cuda"}
    assert run(code, environment).startswith("language_gate cannot run on backend 'cuda'")
