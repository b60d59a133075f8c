from __future__ import annotations

import time

import pytest

from benchmarks.profiling import bare, sampled, shares

REPORT = """\
 1        |libc.so.6 |[.] __memmove_avx_unaligned
 400      |_cpu.cpython-311.so |[.] vd::avx2::columns<false, 2>
 100      |_cpu.cpython-311.so |[.] vd::avx2::columns<false, 1>
 2        |_cpu.cpython-311.so |[.] vd::avx2::gemm<false>(long, long)
 250      |_cpu.cpython-311.so |[.] void vd::(anonymous namespace)::weigh<float>(A<int> const&)
 50       |_cpu.cpython-311.so |[.] vd::run(B const&)::{lambda(auto:1)#1}::operator()<C>(C) const
 197      |[kernel.kallsyms] |[k] clear_page_rep
 199      |libtorch_cpu.so |[.] at::native::add | - -
"""


def test_samples_are_added_up_by_bare_name():
    # Of 1,199; two are too few to be told.
    found = {"columns": 500 / 1199, "weigh": 250 / 1199, "run": 50 / 1199}
    assert shares(REPORT) == pytest.approx(found)


def test_few_samples_tell_nothing():
    assert (
        shares(REPORT.replace(" 400 ", " 4 ").replace(" 250 ", " 2 ").replace(" 197", " 9")) == {}
    )
    assert shares("") == {}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("main", "main"),
        ("vd::avx2::tile<true, 6, 2>", "tile"),
        ("std::vector<std::pair<int, long> >& f<A<B<int> > >(long (*)(int))", "f"),
    ],
)
def test_bare_names(symbol, name):
    assert bare(symbol) == name


def test_a_call_that_fails_ends_the_recording(tmp_path, monkeypatch):
    perf = tmp_path / "perf"
    perf.write_text("#!/bin/sh\nexec sleep 60\n")
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def fail():
        raise MemoryError

    began = time.monotonic()
    with pytest.raises(MemoryError):
        sampled(fail)
    assert time.monotonic() - began < 30


def test_without_perf_nothing_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    began = time.monotonic()
    assert sampled(lambda: pytest.fail("called for nothing")) == {}
    assert time.monotonic() - began < 1
