from __future__ import annotations

import runpy

import pytest

from vd_kernels import __version__


def test_the_package_runs_as_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["videodistill", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("videodistill", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"videodistill {__version__}\n"
