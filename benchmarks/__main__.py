"""`python -m benchmarks`: run, report, compare."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import call_cost, registry, report, results
from benchmarks.cases import DTYPES, Case
from benchmarks.floors import matmul_rate
from benchmarks.goals import goals
from benchmarks.runner import measure
from benchmarks.timing import FULL, QUICK, clock_of

# Above glibc's limit of 32 MB each result would be page-faulted anew at each call.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "KINETO_LOG_LEVEL": "6",
}


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    try:
        arguments.command(arguments)
    except OSError as error:  # a file that is not there, or cannot be written
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="measure cases; what a result file holds is kept")
    run.set_defaults(command=_run)
    run.add_argument(
        "-k", "--only", default="", metavar="REGEX", type=_regex, help="cases whose id matches"
    )
    run.add_argument("-c", "--curves", action="store_true", help="growth curves instead")
    run.add_argument("-g", "--goals", action="store_true", help="only cases that have a goal")
    run.add_argument("-q", "--quick", action="store_true", help="few rounds: to try things out")
    run.add_argument("-a", "--again", action="store_true", help="also what was measured before")
    run.add_argument("-l", "--list", action="store_true", help="print the ids and do nothing")
    run.add_argument("-t", "--threads", type=_positive, default=2, help="of torch on the CPU")
    run.add_argument("-o", "--out", type=Path, metavar="FILE", help="where the result goes")
    run.add_argument("-d", "--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument(
        "-p",
        "--dtype",
        choices=tuple(DTYPES),
        nargs="+",
        help="default: all on cuda; float32 and bfloat16 on the CPU",
    )

    tables = commands.add_parser("report", help="write README's table, docs/performance.md, plots")
    tables.set_defaults(command=_report)
    tables.add_argument("result", nargs="*", type=Path, help="default: the newest of each device")

    compare = commands.add_parser("compare", help="two result files, case by case")
    compare.set_defaults(command=_compare)
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    return parser


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {text!r} ({error})") from None
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def selected(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    names = arguments.dtype or (tuple(DTYPES) if arguments.device == "cuda" else tuple(DTYPES)[:2])
    dtypes = [DTYPES[name] for name in names]
    wanted = goals(arguments.device)
    return [
        case
        for case in registry.cases(arguments.device)
        if bool(case.curve) == arguments.curves
        and case.dtype in dtypes
        and (case.id in wanted or not arguments.goals)
        and re.search(arguments.only, case.id)
    ]


def _wants_calls(arguments: argparse.Namespace) -> bool:
    """Whether the cost of calls is asked for, too: like a case, of no dtype, called "calls"."""
    return not arguments.curves and bool(re.search(arguments.only, "calls"))


def _run(arguments: argparse.Namespace) -> None:
    cases = selected(arguments)
    if arguments.list:
        print("\n".join(["calls"] * _wants_calls(arguments) + [case.id for case in cases]))
        return
    if any(os.environ.get(name) is None for name in _ENVIRONMENT):
        os.environ |= {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])
    torch.set_num_threads(arguments.threads)
    environment = results.environment(arguments.device, quick=arguments.quick)
    path = arguments.out or results.default_path(environment)
    found = results.Results(environment)
    if path.exists():
        earlier = results.Results.load(path)
        if earlier.environment == environment:
            found = earlier
        elif arguments.out:
            sys.exit(f"{path} is of another machine or other sources: name another file")
    clock = clock_of(arguments.device)
    budget = QUICK if arguments.quick else FULL
    todo = [case for case in cases if arguments.again or case.id not in found.cases]
    print(f"{len(todo)} of {len(cases)} cases to measure, into {path}", flush=True)
    if _wants_calls(arguments) and (arguments.again or not found.calls):
        found.calls = call_cost.measure(arguments.device, clock)
        found.save(path)
        for name, spread in found.calls.items():
            over = 1e6 * (spread["public"].median - spread["direct"].median)
            print(f"call of {name}: {over:.1f} us over its backend", flush=True)
    with _progress(len(todo)) as (say, advance):
        for case in todo:
            for dtype in {case.dtype, torch.float32}:
                # The best of all cases: what a busy moment slows down is no floor.
                name = str(dtype).removeprefix("torch.")
                rate = matmul_rate(dtype, arguments.device, clock)
                found.matmul_rates[name] = max(rate, found.matmul_rates.get(name, 0.0))
            measured = measure(case, clock, budget, lambda text, case=case: say(case.id, text))
            found.cases[case.id] = measured
            found.save(path)
            advance(_line(measured))
    busy = [case.id for case in found.cases.values() if case.inconclusive]
    if busy:
        print(f"Inconclusive, the machine was busy: {len(busy)} cases. Run them again when it is")
        print("quiet: " + " ".join(busy))


def _line(measured: results.CaseResult) -> str:
    """A case in one line: the contestants by time."""
    timed = sorted((e for e in measured.entries if e.spread), key=lambda e: e.spread.median)
    times = ", ".join(f"{e.name} {e.spread.median * 1e3:.4g}" for e in timed)
    untimed = [f"{e.name} {e.note[:60]}" for e in measured.entries if not e.spread]
    busy = "BUSY MACHINE, inconclusive; " * measured.inconclusive
    text = f"{measured.id}: {busy}ms: copy {measured.copy.median * 1e3:.4g}, {times}"
    return "; ".join([text, *untimed])


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str, str], None], Callable[[str], None]]]:
    """(say what goes on, end a case with a line): a bar on a terminal, else lines alone."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError:
        Progress = None
    if Progress is None or not sys.stdout.isatty():
        yield lambda case, doing: None, lambda line: print(line, flush=True)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total)

        def advance(line: str) -> None:
            progress.console.print(line, markup=False)
            progress.advance(task)

        yield lambda case, doing: progress.update(task, description=f"{case}: {doing}"), advance


def _report(arguments: argparse.Namespace) -> None:
    for path in report.write(arguments.result or None):
        print(path)


def _compare(arguments: argparse.Namespace) -> None:
    a, b = (results.Results.load(path) for path in (arguments.a, arguments.b))
    print(report.compare(a, b))


if __name__ == "__main__":
    main()
