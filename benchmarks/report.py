"""Tables and plots from results: README's section, docs/performance.md and the pictures in docs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.goals import Goal, best, goals
from benchmarks.results import ROOT, CaseResult, Entry, Environment, Results, committed
from benchmarks.timing import Spread

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
_RUN = "`python -m benchmarks run`"
_REPORT = "`python -m benchmarks report`"


def write(paths: Sequence[Path] | None = None, root: Path = ROOT) -> list[Path]:
    """Write README's section, docs/performance.md and the plots; returns the files written.

    paths: Of results; None takes the committed ones, of each device the newest of each case.
    """
    results = load(paths)
    readme, page = root / "README.md", root / "docs" / "performance.md"
    readme.write_text(within(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    page.write_text(performance(results), encoding="utf-8")
    return [readme, page, *_draw(results, page.parent)]


def load(paths: Sequence[Path] | None = None) -> list[Results]:
    return committed() if paths is None else [Results.load(path) for path in paths]


def within(readme: str, results: Sequence[Results]) -> str:
    """README's text with what stands between the markers made anew.

    Raises:
        ValueError: A marker is missing.
    """
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"README.md has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{summary(results)}\n{END}{after}"


# ---------------------------------------------------------------------------------------------
# Tables


def summary(results: Sequence[Results]) -> str:
    """For README: each case that has a goal on each device, ours against the best other."""
    parts = []
    for kind, name in KINDS.items():
        devices: dict[str, list[Results]] = defaultdict(list)
        for result in results:
            if result.environment.kind == kind:
                devices[result.environment.slug].append(result)
        if not devices:
            parts.append(f"{name}: not yet measured.")
            continue
        columns = {_device(found[0].environment): found for found in devices.values()}
        rows = [[_title(case), *cells] for case, cells in _ratios(kind, columns.values())]
        parts += [
            f"{name}: how many times as fast ours is as the fastest of all others, and in brackets "
            "how many times as long it takes as what nothing can undercut: moving the bytes, or "
            "forming the products.",
            _table(["case", *columns], rows),
            "\n".join(_origin(device, found) for device, found in columns.items()),
        ]
    return "\n\n".join(parts)


def _ratios(kind: str, columns: Iterable[list[Results]]) -> Iterator[tuple[CaseResult, list[str]]]:
    """Cases with goals that some device has, and each device's cell."""
    columns = list(columns)
    for name in goals(kind):
        of_devices = [
            next(((r, r.cases[name]) for r in found if name in r.cases), None) for found in columns
        ]
        known = [pair for pair in of_devices if pair]
        if known:
            yield known[0][1], ["" if pair is None else _ratio_cell(*pair) for pair in of_devices]


def _ratio_cell(result: Results, case: CaseResult) -> str:
    mine, other = best(case, ours=True), best(case, ours=False)
    if mine is None or other is None:
        return "not measured"
    speed = other.spread.median / mine.spread.median
    floors = mine.spread.median / result.floor(case)
    return f"{speed:.2f} ({floors:.1f})" + ", inconclusive" * case.inconclusive


def _device(env: Environment) -> str:
    """Its name as short as can be, with what tells it from others of the name."""
    name = re.sub(r"\(R\)|\(TM\)|\bProcessor\b", "", env.device)
    threads = f", {env.threads} threads" * (env.kind == "cpu")
    return " ".join(f"{name} {env.vectors.replace('_', ' ')}".split()) + threads


def _title(case: CaseResult) -> str:
    sizes = " ".join(f"{name}{size}" for name, size in case.sizes.items())
    mode = {"both": "training"}.get(case.mode, case.mode)
    return f"`{case.operator}` {case.variant}, {mode}, {case.dtype}, {sizes}"


def _origin(device: str, found: Sequence[Results]) -> str:
    commits = ", ".join(dict.fromkeys(result.environment.commit[:10] for result in found))
    last = max(result.date for result in found)[:10]
    return f"- {device}: measured at commit {commits}, until {last}."


def performance(results: Sequence[Results]) -> str:
    """All of docs/performance.md."""
    parts = [
        "# Performance",
        f"Made by {_REPORT} from what {_RUN} measured; [measuring.md](measuring.md) says how, and "
        "how to read it.",
    ]
    for kind, name in KINDS.items():
        found = [r for r in results if r.environment.kind == kind]
        if not found:
            parts += [f"## {name}", "Not yet measured."]
        for result in found:
            parts += [f"## {name}: {result.environment.device}", _where(result)]
            if table := _goal_table(result):
                parts += ["### Goals", table]
            if result.calls:
                parts += ["### Calls", *_call_parts(result)]
            for operator, cases in _by_operator(result).items():
                parts.append(f"### {operator}")
                for case in cases:
                    parts += [f"#### {case.title.removeprefix(operator).strip()}"]
                    parts += _case_parts(result, case)
            for curve in _curves(result):
                parts.append(f"![{curve.title}]({curve.file})")
    return "\n\n".join(parts) + "\n"


def _where(result: Results) -> str:
    env = result.environment
    versions = ", ".join(f"{name} {v}" for name, v in env.versions.items() if v != "not installed")
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in result.matmul_rates.items())
    parts = [
        f"{env.device}, {env.threads} threads, {versions}; commit {env.commit[:10]}, "
        f"sources {env.sources}, {result.date}.",
        f"Matrix products, 10^9 operations a second: {rates}." * bool(rates),
        "A quick run, of few rounds." * env.quick,
    ]
    return " ".join(part for part in parts if part)


def _goal_table(result: Results) -> str:
    """Empty where no case with a goal was measured."""
    rows = []
    for name, wanted in goals(result.environment.kind).items():
        case = result.cases.get(name)
        if case is None:
            continue
        mine, other = best(case, ours=True), best(case, ours=False)
        rows.append(
            [
                case.title,
                _named_time(other),
                _named_time(mine),
                "" if mine is None else f"{mine.spread.median / result.floor(case):.2f}",
                "; ".join(f"{goal}: {_reached(goal, case)}" for goal in wanted),
            ]
        )
    if not rows:
        return ""
    return _table(["case", "best other, ms", "ours, ms", "÷ floor", "goals"], rows, texts=(0, 4))


def _reached(goal: Goal, case: CaseResult) -> str:
    value = goal.reached(case)
    if value is None:
        return "not measured"
    verdict = "missed" if value < goal.least else "met"
    verdict = "inconclusive" if case.inconclusive else verdict
    return f"{value:,.{2 * (value < 1000)}f}, {verdict}"


def _case_parts(result: Results, case: CaseResult) -> Iterator[str]:
    if case.inconclusive:
        yield (
            f"Inconclusive: the machine was busy ({case.busy_share:.0%} of empty parallel regions "
            "took over a millisecond)."
        )
    floor = result.floor(case)
    rate = result.rate(case)
    products = (
        f" ({_ms(case.floor_operations / rate)} ms at the rate of a large one)" if rate else ""
    )
    yield (
        f"Floor {_ms(floor)} ms: {case.floor_bytes / 1e6:,.2f} MB, whose copy took "
        f"{_ms(case.copy.median)} ms ({case.floor_bytes / case.copy.median / 1e9:.1f} GB/s), and "
        f"{case.floor_operations / 1e9:,.2f}·10^9 operations in matrix products{products}."
    )
    split = any(entry.products is not None for entry in case.entries)
    heads = ["", "ms", "quartiles", "rounds", "÷ floor", "peak MB", "besides results MB"]
    heads += ["products ms", "rest ms", "Amdahl bound"] * split
    rows = []
    for entry in sorted((e for e in case.entries if e.spread), key=lambda e: e.spread.median):
        spread = entry.spread
        row = [f"**{entry.name}**" if entry.ours else entry.name, _ms(spread.median)]
        row += [f"{_ms(spread.q1)}–{_ms(spread.q3)}", str(spread.rounds)]
        row += [f"{spread.median / floor:.2f}"]
        row += [f"{entry.memory.peak / 1e6:,.2f}", f"{entry.memory.extra / 1e6:,.2f}"]
        if split:
            row += [_ms(entry.products), _ms(entry.rest), f"{spread.median / entry.products:.2f}"]
        rows.append(row)
    yield _table(heads, rows)
    mine = best(case, ours=True)
    if mine and mine.others:
        parts = (f"`{name}` {_ms(time)}" for name, time in mine.others.items())
        yield f"Outside of products, most of {mine.name}'s ms: {', '.join(parts)}."
    if mine and mine.functions:
        parts = (f"`{name}` {share:.0%}" for name, share in mine.functions.items())
        elsewhere = 1 - sum(mine.functions.values())
        yield f"Samples of {mine.name} by function: {', '.join(parts)}, elsewhere {elsewhere:.0%}."
    left_out = [f"- {entry.name}: {entry.note}" for entry in case.entries if entry.spread is None]
    if left_out:
        yield "\n".join(left_out)


def _call_parts(result: Results) -> Iterator[str]:
    yield (
        "What a call costs in `torch.inference_mode()` at sizes of next to no work: the public "
        "function, which checks its arguments and chooses a backend, and that backend alone, given "
        "the same arguments. Microseconds, medians."
    )
    rows = []
    for name, spread in result.calls.items():
        public, direct = (1e6 * spread[how].median for how in ("public", "direct"))
        rows.append([name, f"{public:.1f}", f"{direct:.1f}", f"{public - direct:.1f}"])
    yield _table(["operator", "public", "backend alone", "difference"], rows)


def _by_operator(result: Results) -> dict[str, list[CaseResult]]:
    grouped = defaultdict(list)
    for case in result.cases.values():
        if not case.curve:
            grouped[case.operator].append(case)
    return grouped


def _named_time(entry: Entry | None) -> str:
    return "not measured" if entry is None else f"{_ms(entry.spread.median)} ({entry.name})"


def _ms(seconds: float) -> str:
    """Milliseconds in three digits."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], texts: Iterable[int] = (0,)) -> str:
    """A table in Markdown; columns ``texts`` are text, the others numbers."""
    heads = list(heads)
    rules = ["---" if column in texts else "---:" for column in range(len(heads))]
    lines = [heads, rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------------------------
# Plots


class Curve:
    """The points of a curve: one task and mode in several dtypes, with one size growing."""

    def __init__(self, result: Results, cases: Sequence[CaseResult]):
        self.result, first = result, cases[0]
        self.axis = first.curve
        self.title = f"{first.operator} {first.variant}, {first.mode}, against {self.axis}"
        name = f"{first.operator}-{first.variant}-{self.axis}"
        self.file = f"performance-{result.environment.slug}-{name}.png"
        self.by_dtype = defaultdict(list)
        for case in sorted(cases, key=lambda c: c.sizes[c.curve]):
            self.by_dtype[case.dtype].append(case)

    def draw(self, path: Path) -> None:
        """Time, and the share of the floor, of each contestant."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(
            2, len(self.by_dtype), figsize=(6 * len(self.by_dtype), 8), squeeze=False, sharex=True
        )
        for (times, shares), (dtype, cases) in zip(axes.T, self.by_dtype.items(), strict=True):
            for name in dict.fromkeys(e.name for case in cases for e in case.entries):
                points = [
                    (case.sizes[self.axis], e, self.result.floor(case))
                    for case in cases
                    for e in case.entries
                    if e.name == name and e.spread
                ]
                if not points:
                    continue
                sizes = [size for size, _, _ in points]
                width = 2.5 if points[0][1].ours else 1.0
                marks = {"label": name, "linewidth": width, "marker": "o", "markersize": 3}
                times.plot(sizes, [e.spread.median * 1e3 for _, e, _ in points], **marks)
                shares.plot(sizes, [floor / e.spread.median for _, e, floor in points], **marks)
            floors = [self.result.floor(case) * 1e3 for case in cases]
            times.plot([c.sizes[self.axis] for c in cases], floors, "k--", label="floor")
            times.set(title=dtype, xscale="log", yscale="log", ylabel="ms")
            times.legend(fontsize="small")
            shares.set(xlabel=self.axis, ylabel="floor ÷ time", ylim=(0, None))
        figure.suptitle(self.title)
        figure.tight_layout()
        figure.savefig(path, dpi=100, metadata={"Software": None})
        pyplot.close(figure)


def _curves(result: Results) -> list[Curve]:
    grouped = defaultdict(list)
    for case in result.cases.values():
        if case.curve:
            grouped[case.operator, case.variant, case.curve].append(case)
    return [Curve(result, cases) for cases in grouped.values()]


def _draw(results: Iterable[Results], folder: Path) -> list[Path]:
    """All curves as pictures; those of earlier reports go."""
    for old in folder.glob("performance-*.png"):
        old.unlink()
    drawn = []
    for curve in (curve for result in results for curve in _curves(result)):
        drawn.append(folder / curve.file)
        curve.draw(drawn[-1])
    return drawn


# ---------------------------------------------------------------------------------------------
# Two results side by side


def compare(a: Results, b: Results) -> str:
    """Time of a over time of b for each case and contestant that both have.

    The ratio's range takes a quartile of one with the opposite one of the other; where it holds 1
    the difference is within noise. Copies, which no change of ours can touch, show what the
    machine itself did between the two.
    """
    rows = []
    for name in (name for name in a.cases if name in b.cases):
        one, two = a.cases[name], b.cases[name]
        busy = " (busy machine)" * (one.inconclusive or two.inconclusive)
        pairs = [("copy", one.copy, two.copy)]
        others = {entry.name: entry.spread for entry in two.entries}
        pairs += [(e.name, e.spread, others.get(e.name)) for e in one.entries]
        for contestant, x, y in pairs:
            if x and y:
                rows.append([name, contestant, _ms(x.median), _ms(y.median), *_ratio(x, y, busy)])
    if not rows:
        return "The two results have no case in common."
    return _table(["case", "contestant", "A, ms", "B, ms", "A ÷ B", "range", "B is"], rows)


def _ratio(a: Spread, b: Spread, busy: str) -> list[str]:
    low, high = a.q1 / b.q3, a.q3 / b.q1
    verdict = "within noise" if low <= 1 <= high else "faster" if low > 1 else "slower"
    return [f"{a.median / b.median:.2f}", f"{low:.2f}–{high:.2f}", verdict + busy]
