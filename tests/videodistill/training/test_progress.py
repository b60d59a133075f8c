from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from videodistill.training.progress import LogFiles, show_progress, stop_asked


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    lines: list[str] = []
    with show_progress(10, 40, lines.append) as show:
        for step in range(11, 41):
            show(step, 0.5 if step % 10 == 0 else None)
    bar = capsys.readouterr().err
    if terminal:
        assert "40/40" in bar and "steps/s" in bar and "loss 0.5" in bar and not lines
    else:
        assert [line.split("  ")[:2] for line in lines] == [
            [f"step {step}/40", "loss 0.5"] for step in (20, 30, 40)
        ]
        assert lines[-1].endswith("0 s to go at this rate") and not bar


def test_logs_are_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    with LogFiles(tmp_path, 0, True) as files:
        for step in (1, 2, 3):
            files.write(step, {"loss": 1.0 / step})
        files.write(2, {"all": 50.0}, "validation")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 1, "ki')
    with LogFiles(tmp_path, 2, True) as files:
        files.write(3, {"loss": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
        (3, "train"),
    ]
    assert lines[-1]["loss"] == 9.0


def test_a_full_disk_is_told_by_one_thread_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="No space left"),
        LogFiles(tmp_path, 0, True) as files,
    ):
        patch.setattr(RecordWriter, "write", full)
        for step in range(1, 1000):
            files.write(step, {"loss": 1.0})
            time.sleep(0.01)
    assert told == []
    assert threading.excepthook == told.append
    with LogFiles(tmp_path, 0, True):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert len(told) == 1, "whatever else fails is told"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with LogFiles(tmp_path / "out", 0, False) as files:
        files.write(1, {"loss": 1.0})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_has_its_usual_effect(number: int) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda which, frame: came.append(which))
    try:
        with stop_asked() as asked:
            os.kill(os.getpid(), number)
            assert asked == [number] and not came
            os.kill(os.getpid(), number)
            assert asked == [number] and came == [number]
        os.kill(os.getpid(), number)
        assert came == [number, number]
    finally:
        signal.signal(number, before)


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with stop_asked() as asked:
            seen.append(list(asked))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [[]]
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
