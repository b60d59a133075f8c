"""For pytest, `-p resumed`: tests that passed, by the list VD_PASSED names, are not run again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PASSED = Path(os.environ["VD_PASSED"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(PASSED.read_text("utf-8").splitlines()) if PASSED.exists() else set()
    config.hook.pytest_deselected(items=[x for x in items if x.nodeid in done])
    items[:] = [x for x in items if x.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Of parallel workers the one that started them is told of all.
    if report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        with PASSED.open("a", encoding="utf-8") as to:
            to.write(f"{report.nodeid}\n")
