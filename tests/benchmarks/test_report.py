"""Results survive a file, tables say what results say, and the committed pages are their tables."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import report, runner
from benchmarks.__main__ import _ENVIRONMENT, _parser, main, selected
from benchmarks.cases import Case
from benchmarks.goals import Goal, goals
from benchmarks.head import cases
from benchmarks.language_gate import LanguageGate
from benchmarks.memory import Memory
from benchmarks.results import FOLDER, ROOT, CaseResult, Entry, Environment, Results, committed
from benchmarks.timing import Budget, CpuClock, Quiet, Spread, interleaved

ENVIRONMENT = Environment(
    kind="cpu",
    device="Made up",
    threads=2,
    cpu_flags=("avx2",),
    versions={"torch": "0.0"},
    malloc={},
    commit="0123456789abcdef",
    sources="feedbeef",
    quick=False,
)


def spread(ms: float, wide: float = 0.01) -> Spread:
    return Spread(ms / 1e3, ms * (1 - wide) / 1e3, ms * (1 + wide) / 1e3, 7)


def made_up(name: str, ours: float, **changes) -> CaseResult:
    """A result in which the best other took 10 ms and a copy 1 ms."""
    operator, variant, mode, dtype, sizes, *curve = name.split("/")
    known = {size[0]: int(size[1:]) for size in sizes.split("-")}
    memory = Memory(peak=3_000_000, results=1_000_000)
    entries = [
        Entry(
            "cpp",
            True,
            spread=spread(ours),
            memory=Memory(1_010_000, 1_000_000),
            products=2e-3,
            others={"aten::add": 5e-4},
        ),
        Entry("reference", True, spread=spread(40.0), memory=memory, products=2e-3),
        Entry("eager", False, spread=spread(20.0), memory=memory, products=2e-3),
        Entry("torch.compile", False, spread=spread(10.0), memory=memory, products=2e-3),
        Entry("published form", False, note="wrong: result 0: 1 of 2 differ"),
    ]
    result = CaseResult(
        id=name,
        operator=operator,
        variant=variant,
        mode=mode,
        dtype=dtype,
        sizes=known,
        curve=curve[0] if curve else "",
        floor_bytes=10_000_000,
        floor_operations=4_000_000,
        copy=spread(1.0),
        busy_share=0.0,
        inconclusive=False,
        entries=entries,
    )
    return replace(result, **changes)


@pytest.fixture
def results() -> Results:
    names = [name for name in goals("cpu") if "float32" in name]
    found = Results(ENVIRONMENT, date="2000-01-01", matmul_rates={"float32": 1e9})
    found.cases = {name: made_up(name, 4.0) for name in names}
    for size in (4, 8):
        point = f"spacetime_attention/time/forward/float32/B1-T{size}-S2-H1-D8/T"
        found.cases[point] = made_up(point, 4.0)
    found.calls = {"language_gate": {"public": spread(0.012), "direct": spread(0.0075)}}
    return found


def test_results_survive_a_file(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "made-up" / "result.json")
    assert Results.load(tmp_path / "made-up" / "result.json") == results
    assert committed(tmp_path) == [results]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema"):
        Results.load(tmp_path / "result.json")


def test_of_a_device_the_newest_of_each_case_is_taken(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "device" / "b.json")
    again = replace(results, date="2001-01-01 10:00", calls={})
    again.cases = {name: made_up(name, 5.0) for name in list(results.cases)[:1]}
    point = "spacetime_attention/time/forward/float32/B1-T4-S2-H1-D8/T"
    again.cases[point] = made_up(point, 5.0)
    again.save(tmp_path / "device" / "a.json")
    replace(again, date="2001-01-01 09:00").save(tmp_path / "device" / "c.json")
    newest, older = committed(tmp_path)
    assert newest == again
    assert older.calls == results.calls
    # A curve is of one result: its points are compared with each other.
    assert set(older.cases) == {
        name for name in results.cases if name not in again.cases and "/T" not in name[-3:]
    }


def test_a_floor_is_the_larger_of_bytes_and_operations(results: Results) -> None:
    case = next(iter(results.cases.values()))
    assert results.floor(case) == pytest.approx(4e-3)  # 4e6 operations at 1e9 a second
    results.matmul_rates["float32"] = 1e12
    assert results.floor(case) == case.copy.median


def test_a_floor_forms_products_in_float32_where_that_is_faster(results: Results) -> None:
    half = replace(next(iter(results.cases.values())), dtype="float16")
    results.matmul_rates = {"float32": 1e9, "float16": 1e6}  # 4e6 operations; a copy takes 1 ms
    assert results.floor(half) == pytest.approx(4e-3)
    results.matmul_rates["float16"] = 2e9
    assert results.floor(half) == pytest.approx(2e-3)


def test_a_run_in_half_precision_knows_the_rate_of_float32(tmp_path: Path, monkeypatch) -> None:
    for name in _ENVIRONMENT:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(command_line, "matmul_rate", lambda dtype, device, clock: dtype.itemsize)
    monkeypatch.setattr(
        command_line, "measure", lambda case, clock, budget, say: made_up(case.id, 4.0)
    )
    words = ["run", "-p", "float16", "-k", "^language_gate/scalar/forward"]
    words += ["-t", str(torch.get_num_threads()), "-o", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    main()
    assert Results.load(tmp_path / "result.json").matmul_rates == {"float16": 2, "float32": 4}


@pytest.mark.parametrize(
    ("goal", "value"),
    [
        (Goal("speed", 2), 2.5),
        (Goal("speed", 2, "eager"), 5.0),
        (Goal("copy rate", 0.75), 0.25),
        (Goal("extra memory", 100, "eager"), 200.0),
        (Goal("peak memory", 2, "eager"), 3.0 / 1.01),
        (Goal("memory bound", 1, bytes=20_000), 2.0),
        (Goal("rest", 2, "torch.compile"), 4.0),
        (Goal("Amdahl", 0.8), 0.5),
        (Goal("speed", 2, "published form"), None),
    ],
    ids=str,
)
def test_goals_measure_what_they_say(goal: Goal, value: float | None) -> None:
    reached = goal.reached(made_up("head/reference/forward/float32/B1", 4.0))
    assert reached == (value if value is None else pytest.approx(value))


def test_the_rest_is_compared_with_the_least_of_all_that_is_compiled() -> None:
    result = made_up("head/reference/forward/float32/B1", 4.0)  # rest 2 ms; torch.compile 10 - 2
    memory = result.entries[0].memory
    # Slower than torch.compile, by its products alone.
    slow = Entry("torch.compile of reference", False, "", spread(11.0), memory, products=8e-3)
    reached = Goal("rest", 2, "torch.compile").reached(
        replace(result, entries=[*result.entries, slow])
    )
    assert reached == pytest.approx(1.5)


def test_goals_of_measuring_are_all_there() -> None:
    cpu, cuda = goals("cpu"), goals("cuda")
    assert len(cpu) == 8 + 1 + 2 + 4 + 1 + 4
    time = "spacetime_attention/time{}/forward/{}/B4-T16-S196-H12-D64"
    assert cpu[time.format("", "float32")] == (Goal("speed", 2),)
    assert cpu[time.format("-gate", "float32")] == (Goal("speed", 2.3),)
    choice = cpu["topk_sample/perturbed/both/float32/B16-n500-K16-N512"]
    assert Goal("memory bound", 1, bytes=256_000) in choice
    assert sum(map(len, cuda.values())) == 4 + 1 + 1 + 3 + 6 + 3 + 4 + 1


def test_tables_say_what_was_measured(results: Results, tmp_path: Path) -> None:
    name = "spacetime_attention/time/forward/float32/B4-T16-S196-H12-D64"
    busy = next(name for name in results.cases if "language_gate" in name)
    results.cases[busy] = replace(results.cases[busy], inconclusive=True, busy_share=0.5)
    slow = next(name for name in results.cases if "time-gate" in name)
    results.cases[slow] = made_up(slow, 9.0)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nRest.\n")
    (tmp_path / "docs").mkdir()
    results.save(tmp_path / "result.json")
    written = report.write([tmp_path / "result.json"], tmp_path)
    assert all(path.is_file() for path in written)

    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nRest.\n") and "old" not in text
    assert "| case | Made up avx2, 2 threads |" in text
    assert (
        "| `spacetime_attention` time, forward, float32, B4 T16 S196 H12 D64 | 2.50 (1.0) |" in text
    )
    assert "time-gate, forward, float32, B4 T16 S196 H12 D64 | 1.11 (2.2) |" in text
    assert ", inconclusive |" in text and "GPU: not yet measured." in text
    assert "- Made up avx2, 2 threads: measured at commit 0123456789, until 2000-01-01." in text

    page = (tmp_path / "docs" / "performance.md").read_text()
    row = next(line for line in page.splitlines() if f"| {results.cases[name].title}" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["10 (torch.compile)", "4 (cpp)", "1.00", "speed ≥ 2: 2.50, met"]
    row = next(line for line in page.splitlines() if f"| {results.cases[slow].title}" in line)
    assert "1.11, missed" in row and ", inconclusive" in page
    assert "published form: wrong: result 0: 1 of 2 differ" in page
    assert "50% of empty parallel regions" in page
    assert "Outside of products, most of cpp's ms: `aten::add` 0.5." in page
    assert "| language_gate | 12.0 | 7.5 | 4.5 |" in page
    plots = [path.name for path in written if path.suffix == ".png"]
    assert plots == ["performance-made-up-avx2-2-threads-spacetime_attention-time-T.png"]
    assert all(f"({plot})" in page for plot in plots)


def test_readme_sets_devices_side_by_side(results: Results) -> None:
    """Each case from the result that has it, of two files of one device and one of another."""
    first, second, *_ = results.cases
    older = replace(results, cases={first: made_up(first, 2.0)})
    newer = replace(results, cases={second: made_up(second, 4.0)})
    wide = replace(ENVIRONMENT, cpu_flags=("avx2", "avx512f"))
    other = replace(results, environment=wide, cases={second: made_up(second, 8.0)})
    alone = replace(other, environment=replace(wide, threads=1))
    text = report.summary([newer, older, other, alone])
    names = ("Made up avx2, 2 threads", "Made up avx512f, 2 threads", "Made up avx512f, 1 threads")
    assert f"| case | {' | '.join(names)} |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("|")[2:5] for row in rows] == [
        [" 5.00 (0.5) ", "  ", "  "],
        [" 2.50 (1.0) ", " 1.25 (2.0) ", " 1.25 (2.0) "],
    ]


def test_readme_without_markers_is_refused(results: Results) -> None:
    with pytest.raises(ValueError, match="performance: begin"):
        report.within("# Title", [results])


def test_the_committed_pages_are_the_committed_results() -> None:
    found = report.load()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    hint = "run `python -m benchmarks report`"
    assert report.within(readme, found) == readme, hint
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert report.performance(found) == page, hint


def test_compare_tells_a_difference_from_noise(results: Results) -> None:
    other = replace(results, cases=dict(results.cases))
    first, second, *_ = results.cases
    other.cases[first] = made_up(first, 2.0)
    other.cases[second] = made_up(second, 4.02)
    rows = [row.strip("| ").split(" | ") for row in report.compare(results, other).splitlines()]
    verdicts = {(row[0], row[1]): row[-1] for row in rows}
    assert verdicts[first, "cpp"] == "faster"
    assert verdicts[second, "cpp"] == verdicts[first, "copy"] == "within noise"
    empty = replace(results, cases={})
    assert "no case in common" in report.compare(results, empty)


def test_a_busy_machine_makes_a_case_inconclusive(monkeypatch) -> None:
    class Held(Quiet):
        LIMIT = 0.0  # every region takes longer

    class Uncompiled(LanguageGate):
        def contestants(self, case: Case) -> list:
            return [c for c in LanguageGate().contestants(case) if not c.compiled]

    task = Uncompiled()
    case = Case(task, task.small, torch.float32, "forward", repeats=1)
    budget = Budget(seconds=0.0, rounds=(2, 2))
    monkeypatch.setattr(CpuClock, "__init__", lambda self: setattr(self, "cold_bytes", 0))
    quiet = runner.measure(case, CpuClock(), budget)
    assert quiet.busy_share <= 1.0
    assert {e.name for e in quiet.entries if e.spread} >= {"reference", "eager", "eager bmm"}
    monkeypatch.setattr(runner, "Quiet", Held)
    assert runner.measure(case, CpuClock(), budget).inconclusive


def test_a_head_s_time_is_told_by_its_parts(monkeypatch) -> None:
    case = next(case for case in cases("cpu") if case.task.variant == "bundled")
    case = replace(case, sizes=case.task.small, repeats=1)
    chosen = [c for c in case.task.contestants(case) if c.name in ("vd_kernels", "eager")]
    monkeypatch.setattr(case.task, "contestants", lambda case: chosen)
    monkeypatch.setattr(CpuClock, "__init__", lambda self: setattr(self, "cold_bytes", 0))
    result = runner.measure(case, CpuClock(), Budget(seconds=0.0, rounds=(2, 2)))
    mine, other = result.entries
    for entry in (mine, other):
        assert 0 < entry.products < entry.spread.median
        assert sum(entry.others.values()) + entry.products < 1.001 * entry.spread.median
        assert "aten::mm" not in entry.others and "aten::addmm" not in entry.others
        assert list(entry.others.values()) == sorted(entry.others.values(), reverse=True)
    assert any(name.startswith("vd::") for name in mine.others)
    assert not any(name.startswith("vd::") for name in other.others)


def test_contestants_take_turns_and_slow_ones_sit_out() -> None:
    order: list[str] = []
    numbers = itertools.count()

    def entry(name: str, seconds: float):
        def timed(turn: int) -> float:
            assert turn == next(numbers)
            order.append(name)
            return seconds

        return timed

    budget = Budget(seconds=60.0, rounds=(5, 5), slow=30.0, slow_rounds=2)
    entries = {"a": entry("a", 1.0), "b": entry("b", 2.0), "c": entry("c", 100.0)}
    spreads = interleaved(entries, budget)
    assert "".join(order) == "abc" + "abc" + "bca" + "ab" + "ab" + "ba"
    assert spreads["c"].rounds == 2 and spreads["a"].rounds == 5


def test_what_does_another_work_makes_no_contestant_slow() -> None:
    budget = Budget(seconds=60.0, rounds=(5, 5), slow=30.0, slow_rounds=2)
    times = {"copy": 0.001, "a": 1.0, "b": 2.0, "c": 100.0}
    entries = {name: lambda turn, x=x: x for name, x in times.items()}
    spreads = interleaved(entries, budget, beside=("copy",))
    assert {name: x.rounds for name, x in spreads.items()} == {"copy": 5, "a": 5, "b": 5, "c": 2}


def test_the_command_line_selects() -> None:
    def ids(*words: str) -> list[str]:
        return [case.id for case in selected(_parser().parse_args(["run", *words]))]

    assert all("float16" not in name.split("/") for name in ids())
    assert {name.split("/")[3] for name in ids("-p", "float16")} == {"float16"}
    assert all(name.startswith("topk") for name in ids("-k", "^topk"))
    assert all(name.count("/") == 5 for name in ids("-c"))
    for device in ("cpu", "cuda"):
        assert set(ids("-d", device, "--goals")) == set(goals(device))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "-k", "["), "not a regular expression"),
        (("run", "-t", "0"), "at least 1"),
        (("report", "none.json"), "none.json"),
        (("compare", "none.json", "none.json"), "none.json"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_results_lie_in_a_folder_of_their_processor() -> None:
    """One name stands for processors with and without wide vectors: they share no folder."""
    for path in FOLDER.glob("*/*.json"):
        environment = Results.load(path).environment
        assert path.parent.name == environment.slug
        if environment.kind == "cpu":
            flags = ((), ("avx", "avx2"), ("avx2", "avx512f"))
            slugs = {replace(environment, cpu_flags=some).slug for some in flags}
            assert len(slugs) == 3
