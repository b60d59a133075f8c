from __future__ import annotations

import pytest

from videodistill.listing import shown_progress


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with shown_progress() as progress:
        for done in range(1, 41):
            progress("train", done, 40)
    shown = capsys.readouterr().err
    assert "40/40" in shown
    assert ("videos/s" in shown) == terminal
    assert terminal or shown.count("\n") == 11
