"""`python -m vd_kernels`: versions, the machine, and each backend with what it lacks."""

from __future__ import annotations

from collections.abc import Iterable

from vd_kernels.backends import Explanation, explain


def main() -> None:
    print(render(explain(name_devices=True)))


def render(found: Explanation) -> str:
    compiled = found.compiled or {"vd_kernels._C": found.compiled_reason}
    machine = {
        "CPU levels": " ".join(found.cpu_isa) or "unknown without the compiled module",
        "CPU features": " ".join(found.cpu_features) or "none beyond the baseline",
        "CUDA devices": "; ".join(found.cuda_devices) or "none",
    }
    if not found.cpu_isa:
        del machine["CPU features"]
    backends = [("backend", "here", "runs on", "operators", "lacks")]
    every = max(len(backend.operators) for backend in found.backends)
    for backend in found.backends:
        here = "yes" if backend.available else "no"
        first, *more = backend.lacks or ("",)
        operators = "all" if len(backend.operators) == every else ", ".join(backend.operators)
        backends.append((backend.name, here, backend.runs_on, operators or "none", first))
        backends.extend(("", "", "", "", lack) for lack in more)
    parts = {
        "Versions": found.versions.items(),
        "Compiled module": compiled.items(),
        "Machine": machine.items(),
        "Backends": backends,
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in parts.items())


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of one length as lines, columns left-aligned and two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
