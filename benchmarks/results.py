"""Results as JSON: one file for each state of the sources on a device, written after each case."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import vd_kernels
from benchmarks.memory import Memory
from benchmarks.timing import Spread

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA = 1
_VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Instruction sets that decide how fast kernels are, the widest first, as Linux names them."""


@dataclass(frozen=True)
class Entry:
    """A contestant of a case."""

    name: str
    ours: bool
    note: str = ""
    """Why it was not timed; empty when it was."""
    spread: Spread | None = None
    memory: Memory | None = None
    products: float | None = None
    """Seconds in the matrix products of linear layers; only of the whole head."""
    others: dict[str, float] = field(default_factory=dict)
    """Seconds in the operations that take most besides."""
    functions: dict[str, float] = field(default_factory=dict)
    """Shares of its samples by function of the C++ kernels (profiling.py); none of a whole head."""

    @property
    def rest(self) -> float | None:
        """Seconds outside of them."""
        return None if self.products is None else max(0.0, self.spread.median - self.products)


@dataclass(frozen=True)
class CaseResult:
    """What was measured in a case."""

    id: str
    operator: str
    variant: str
    mode: str
    dtype: str
    sizes: dict[str, int]
    curve: str
    floor_bytes: int
    floor_operations: int
    copy: Spread
    """Of as many bytes as the floor moves."""
    busy_share: float
    """Of empty parallel regions, those that took over a millisecond."""
    inconclusive: bool
    """Other work held the machine meanwhile."""
    entries: list[Entry]

    @property
    def title(self) -> str:
        sizes = " ".join(f"{name}{size}" for name, size in self.sizes.items())
        mode = {"both": "forward + backward"}.get(self.mode, self.mode)
        return f"{self.operator} {self.variant}, {mode}, {self.dtype}, {sizes}"


@dataclass(frozen=True)
class Environment:
    """Where and of what: results of equal ones belong together."""

    kind: str
    """ "cpu" or "cuda"."""
    device: str
    threads: int
    cpu_flags: tuple[str, ...]
    versions: dict[str, str]
    malloc: dict[str, str]
    commit: str
    sources: str
    """Hash of the files that decide what is timed, whether or not they are committed."""
    quick: bool

    @property
    def vectors(self) -> str:
        """The widest instruction set; processors of one name may differ in it."""
        widest = next((flag for flag in _VECTORS if flag in self.cpu_flags), "")
        return widest if self.kind == "cpu" else ""

    @property
    def slug(self) -> str:
        """Names the folder."""
        words = f"{self.device}-{self.vectors}-{self.threads}-threads"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


@dataclass
class Results:
    """All cases measured in one environment."""

    environment: Environment
    date: str = field(
        default_factory=lambda: f"{datetime.datetime.now(datetime.timezone.utc):%F %H:%M}"
    )
    """UTC, when it was begun."""
    matmul_rates: dict[str, float] = field(default_factory=dict)
    """By dtype, operations a second of a large square product."""
    cases: dict[str, CaseResult] = field(default_factory=dict)
    calls: dict[str, dict[str, Spread]] = field(default_factory=dict)
    """By operator, a tiny call through the "public" function and of a backend's, "direct"."""

    def floor(self, case: CaseResult) -> float:
        """Seconds that nothing can undercut: to move the bytes, or to form the products."""
        rate = self.rate(case)
        products = case.floor_operations / rate if rate else 0.0
        return max(case.copy.median, products)

    def rate(self, case: CaseResult) -> float:
        """Operations a second of a large square product in the case's dtype; 0 if not known.

        In float32 where that is faster: the dtype's own products are emulated there.
        """
        return max(self.matmul_rates.get(dtype, 0.0) for dtype in (case.dtype, "float32"))

    def save(self, path: Path) -> None:
        """Write beside the file, then move into place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        content["cases"] = list(content["cases"].values())
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is of another schema.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is not a benchmark result of schema {SCHEMA}")
        environment = content.pop("environment")
        environment["cpu_flags"] = tuple(environment["cpu_flags"])
        cases = (_case(case) for case in content.pop("cases"))
        content["calls"] = {
            name: {how: Spread(**spread) for how, spread in pair.items()}
            for name, pair in content.get("calls", {}).items()
        }
        return cls(Environment(**environment), cases={c.id: c for c in cases}, **content)


def _case(content: dict[str, Any]) -> CaseResult:
    entries = [
        Entry(**{**e, "spread": _maybe(Spread, e["spread"]), "memory": _maybe(Memory, e["memory"])})
        for e in content["entries"]
    ]
    return CaseResult(**{**content, "copy": Spread(**content["copy"]), "entries": entries})


def _maybe(kind: type, content: dict[str, Any] | None) -> Any:
    return None if content is None else kind(**content)


def committed(folder: Path = FOLDER) -> list[Results]:
    """Of each device the newest result, then older ones with what newer ones did not measure."""
    by_device: dict[Path, list[Results]] = defaultdict(list)
    for path in sorted(folder.glob("*/*.json")):
        by_device[path.parent].append(Results.load(path))
    kept = []
    for results in by_device.values():
        seen: set[str] = set()
        for result in sorted(results, key=lambda r: r.date, reverse=True):
            cases = {c.id: c for c in result.cases.values() if _source(c) not in seen}
            calls = {} if "calls" in seen else result.calls
            if cases or calls:
                kept.append(replace(result, cases=cases, calls=calls))
            seen |= {_source(case) for case in cases.values()} | ({"calls"} if calls else set())
    return kept


def _source(case: CaseResult) -> str:
    """What one result has all of or none: a case, or a whole curve."""
    return f"{case.operator}/{case.variant}/{case.curve}" if case.curve else case.id


def default_path(environment: Environment) -> Path:
    name = f"{environment.commit[:10]}-{environment.sources}" + "-quick" * environment.quick
    return FOLDER / environment.slug / f"{name}.json"


def environment(kind: str, *, quick: bool) -> Environment:
    """What this process runs on."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    return Environment(
        kind=kind,
        device=torch.cuda.get_device_name() if kind == "cuda" else _cpu("model name"),
        threads=torch.get_num_threads(),
        cpu_flags=tuple(f for f in _cpu("flags").split() if re.match("avx|amx|fma|f16c|sse4", f)),
        versions=vd_kernels.explain().versions,
        malloc={name: os.environ.get(name, "") for name in names},
        commit=_commit(),
        sources=_sources(),
        quick=quick,
    )


def _cpu(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() if key == "model name" else ""
    found = re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine() if key == "model name" else ""


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "uncommitted"


def _sources() -> str:
    """Of operators, model and contestants; not of what only presents results."""
    folders = ("vd_kernels", "csrc", "videodistill/model", "benchmarks")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    kept = (".py", ".cpp", ".cu", ".h", ".cuh")
    left_out = {ROOT / "benchmarks" / name for name in ("report.py", "__main__.py", "goals.py")}
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.suffix in kept and p not in left_out):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]
