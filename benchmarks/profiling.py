"""In which functions of the C++ kernels a call spends its time, as Linux's perf samples it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

SECONDS = 2.0  # of calls: thousands of samples
_FEWEST = 500  # samples that shares are told from
_LEAST = 0.01  # a share that is told
_LINE = re.compile(
    r"^ *(?P<count>\d+) *\|(?P<library>[^|\n]+?) *\|\[.\] (?P<name>[^|\n]+)", re.MULTILINE
)


def sampled(call: Callable[[], object], seconds: float = SECONDS) -> dict[str, float]:
    """Shares of this process's samples by function of the C++ kernels, the largest first.

    Args:
        call: Repeated meanwhile.
        seconds: For how long.

    Returns:
        What is missing to 1 was spent elsewhere: in torch, the interpreter, the system. Empty where
        perf is missing or may not look.
    """
    perf = shutil.which("perf")
    if perf is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        # By the clock: virtual machines have no counters of cycles.
        record = [perf, "record", "-q", "-e", "cpu-clock:u", "-F", "1999", "-o", str(data)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*record, "-p", str(os.getpid())], **quiet) as recorder:
            end = time.monotonic() + seconds
            try:
                while time.monotonic() < end and recorder.poll() is None:
                    call()
            except BaseException:  # it would record for as long as this process lives
                recorder.kill()
                raise
            recorder.send_signal(signal.SIGINT)
        report = [perf, "report", "-i", str(data), "--stdio", "--no-children", "-n", "-q"]
        report += ["--sort", "dso,symbol", "-F", "sample,dso,symbol", "-t", "|"]
        told = subprocess.run(report, capture_output=True, text=True, errors="replace").stdout
    return shares(told)


def shares(report: str) -> dict[str, float]:
    """By function of the C++ kernels, from what `perf report` printed of all libraries."""
    counts: dict[str, int] = defaultdict(int)
    total = 0
    for found in _LINE.finditer(report):
        total += int(found["count"])
        if found["library"].startswith("_cpu."):
            counts[bare(found["name"])] += int(found["count"])
    if total < _FEWEST:
        return {}
    largest = sorted(counts, key=counts.__getitem__, reverse=True)
    return {name: counts[name] / total for name in largest if counts[name] >= _LEAST * total}


def bare(symbol: str) -> str:
    """A function's name without namespaces, arguments and parameters; of a lambda, its home's."""
    name = re.sub(r"\(anonymous namespace\)|::\{lambda.*", "", symbol)
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = shorter
    return re.split(r"::| ", name.strip())[-1]
