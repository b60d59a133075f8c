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


class Listing:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            with PASSED.open("a", encoding="utf-8") as to:
                to.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # what started parallel workers is told of all
        config.pluginmanager.register(Listing())
