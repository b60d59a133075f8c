"""The command line, in process where that is enough: exit status, stdout, stderr, files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.videodistill.engine.material import make_checkpoint, make_video
from tests.videodistill.tiny import tiny_clip
from vd_kernels import backends
from vd_kernels.backends import load_cpu_kernels
from videodistill.cli import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad videos, checkpoints and lists."""
    folder = tmp_path_factory.mktemp("cli")
    whole = make_video(folder / "square.mp4")
    make_video(folder / "-x.mp4")
    make_checkpoint(folder / "head")
    tiny_clip(folder / "other", seed=1)
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    (folder / "one.txt").write_text("yes\n")
    (folder / "twice.txt").write_text("yes\nno\nYes\n")
    (folder / "latin.txt").write_bytes("café\nthé\n".encode("latin-1"))
    damaged = make_checkpoint(folder / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x10" * 64)
    damaged = make_checkpoint(folder / "confused")
    (damaged / "config.json").write_text("{")
    return folder


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.chdir(here)

    def invoke(*args: str):
        return CliRunner().invoke(app, list(args))

    return invoke


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)


HEAD = ("--checkpoint", "head")
BAD_INPUT = {
    "missing file": (["none.mp4", "what?"], ["none.mp4", "no such file"]),
    "directory": (["head", "what?"], ["head", "directory"]),
    "URL": (["https://host/a.mp4", "what?"], ["https://host/a.mp4", "download"]),
    "zero bytes": (["empty.mp4", "what?"], ["empty.mp4", "empty"]),
    "not a video": (["text.mp4", "what?", *HEAD], ["text.mp4"]),
    "sound only": (["sound.wav", "what?", *HEAD], ["sound.wav", "sound"]),
    "truncated": (["cut.mp4", "what?", *HEAD], ["cut.mp4"]),
    "dash without --": (["-x.mp4", "what?"], ["-x"]),
    "empty question": (["square.mp4", ""], ["question is empty"]),
    "one of them empty": (["square.mp4", "what?", "  "], ["question 2 of 2 is empty"]),
    "no question": (["square.mp4"], ["questions", "--help"]),
    "one choice": (["square.mp4", "what?", "--choices", "yes"], ["--choices", "at least two"]),
    "duplicate": (["square.mp4", "what?", "--choices", "a,b, a"], ["'a' is given twice"]),
    "empty choice": (["square.mp4", "what?", "--choices", "a,,b"], ["number 2 is empty"]),
    "one answer": (["square.mp4", "what?", "--answers", "one.txt"], ["one.txt", "at least two"]),
    "duplicate answer": (["square.mp4", "what?", "--answers", "twice.txt"], ["'yes' and 'Yes'"]),
    "answers not UTF-8": (
        ["square.mp4", "what?", "--answers", "latin.txt"],
        ["latin.txt", "UTF-8"],
    ),
    "no answers file": (["square.mp4", "what?", "--answers", "none.txt"], ["none.txt"]),
    "answers is a folder": (["square.mp4", "what?", "--answers", "head"], ["head", "--answers"]),
    "both lists": (
        ["square.mp4", "what?", "--answers", "one.txt", "--choices", "a,b"],
        ["--choices and --answers"],
    ),
    "K > N": (
        ["square.mp4", "what?", *HEAD, "--frames", "3", "--pick", "4"],
        ["--pick 4", "3 frame"],
    ),
    "K > frames": (["square.mp4", "what?", *HEAD, "--frames=99", "--pick=31"], ["--pick 31", "30"]),
    "no frames": (["square.mp4", "what?", "--frames", "0"], ["--frames 0"]),
    "half a frame": (["square.mp4", "what?", "--frames", "1.5"], ["--frames", "--help"]),
    "start after end": (["square.mp4", "what?", "--start=2", "--end=1"], ["--start 2", "--end 1"]),
    "start outside": (["square.mp4", "what?", *HEAD, "--start=9"], ["square.mp4", "9 s"]),
    "another encoder": (
        ["square.mp4", "what?", *HEAD, "--encoder", "other"],
        ["head", "other", "--zero-shot"],
    ),
    "damaged weights": (
        ["square.mp4", "what?", "--checkpoint", "damaged"],
        ["damaged/model.safetensors"],
    ),
    "damaged config": (
        ["square.mp4", "what?", "--checkpoint", "confused"],
        ["confused/config.json"],
    ),
    "no checkpoint": (
        ["square.mp4", "what?", "--checkpoint", "a/b/c"],
        ["a/b/c", "no such folder"],
    ),
    "no network": (["square.mp4", "what?", "--checkpoint", "some/one"], ["some/one", "network"]),
    "no network for an encoder": (
        ["square.mp4", "what?", "--zero-shot", "--encoder", "some/one"],
        ["some/one", "hub"],
    ),
    "zero-shot with a head": (["square.mp4", "what?", *HEAD, "--zero-shot"], ["--zero-shot"]),
    "no such device": (["square.mp4", "what?", *HEAD, "--device", "abacus"], ["abacus"]),
    "no such precision": (["square.mp4", "what?", "--precision", "fp8"], ["fp8", "bf16"]),
    "figure's suffix": (["square.mp4", "what?", "--figure", "a.xyz"], ["a.xyz", ".png"]),
    "figure's folder": (["square.mp4", "what?", "--figure", "no/a.png"], ["no/a.png", "writable"]),
    "unknown option": (["square.mp4", "what?", "--colour"], ["--colour", "--help"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(
    case: str, here: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    args, named = BAD_INPUT[case]
    if "--figure" not in args:
        args = [*args, "--figure", "out.png"]
    before = sorted(here.rglob("*"))
    result = run("answer", "--json", *args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("videodistill: error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert all(part in result.stderr for part in named), result.stderr
    assert sorted(here.rglob("*")) == before


def test_a_figure_without_permission_is_refused_before_the_work(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("videodistill.engine.loading.load", lambda *_, **__: pytest.fail("worked"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere but here
        locked = Path("/proc")
    result = run("answer", "square.mp4", "what?", "--figure", str(locked / "a.png"))
    assert result.exit_code == 2 and result.stdout == ""
    assert str(locked / "a.png") in result.stderr and result.stderr.count("\n") == 1


def test_answers_for_people(run: Callable, here: Path, tmp_path: Path) -> None:
    figure = tmp_path / "out.png"
    result = run("answer", "square.mp4", "What is [red]?", "Где?", *HEAD, "--figure", str(figure))
    assert result.exit_code == 0 and result.stderr == ""
    for part in ("What is [red]?", "Где?", "16 of 30 frames", "%", "decode ", "encode ", "head "):
        assert part in result.stdout
    assert str(figure) in result.stdout.replace("\n", "")
    assert figure.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["VD_BACKEND", "VD_CPU_ISA"])
def test_a_backend_that_cannot_run_is_the_users_mistake(
    run: Callable, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "VD_CPU_ISA" and load_cpu_kernels():
        pytest.skip(load_cpu_kernels())
    monkeypatch.setenv(name, "fast")
    if name == "VD_BACKEND":  # read at import, which is over here
        monkeypatch.setattr(backends, "_environment", "fast")
    result = run("answer", "square.mp4", "What is [red]?", *HEAD)
    assert result.exit_code == 2
    assert result.stderr.startswith("videodistill: error: ") and result.stderr.count("\n") == 1
    assert f"{name} must be one of" in result.stderr


def test_json_is_all_of_stdout(run: Callable) -> None:
    result = run("answer", "square.mp4", "что?", "why " * 10_000, *HEAD, "--pick", "2", "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert [a["question"] for a in told["answers"]] == ["что?", "why " * 10_000]
    assert [len(a["frames"]) for a in told["answers"]] == [2, 2]
    assert told["figure"] is None
    # The notice about the long question goes to people and into the JSON.
    assert result.stderr.startswith("videodistill: note: ") and "10,000 words" in result.stderr
    assert result.stderr.count("\n") == 1 and len(told["notices"]) == 1


def test_choices_once_with_commas_or_several_times(run: Callable) -> None:
    def texts(*choices: str) -> set[str]:
        result = run("answer", "square.mp4", "what?", *HEAD, "--json", *choices)
        return {entry["answer"] for entry in json.loads(result.stdout)["answers"][0]["top"]}

    assert texts("--choices", "a, b,c") == {"a", "b", "c"}
    assert texts("--choices", "yes, he does", "--choices", "no") == {"yes, he does", "no"}


def test_a_name_that_starts_with_a_dash(run: Callable) -> None:
    result = run("answer", *HEAD, "--json", "--", "-x.mp4", "--debug")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["video"]["path"] == "-x.mp4" and told["answers"][0]["question"] == "--debug"


def test_zero_shot_with_choices(run: Callable) -> None:
    result = run(
        *("answer", "square.mp4", "what?", "--zero-shot", "--encoder", "other"),
        *("--choices", "red,blue", "--json"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["answers"][0]["answer"] in ("red", "blue")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("boom"), 1, "RuntimeError: boom"),
        (
            ModuleNotFoundError("x", name="transformers.utils"),
            2,
            "pip install 'videodistill[model]'",
        ),
        (ModuleNotFoundError("x", name="accelerate"), 2, "pip install 'videodistill[train]'"),
        (ModuleNotFoundError("x", name="flux"), 1, "ModuleNotFoundError"),
    ],
)
def test_what_else_can_happen(
    run: Callable, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("videodistill.engine.loading.load", fail)
    result = run("answer", "square.mp4", "what?")
    assert (result.exit_code, result.stdout) == (status, "")
    assert line in result.stderr and result.stderr.count("\n") == 1
    if status == 1:
        assert "--debug" in result.stderr


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback(run: Callable, place: int) -> None:
    args = ["answer", "none.mp4", "what?"]
    args.insert(place, "--debug")
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("videodistill: error: none.mp4")


def test_a_message_stays_one_line_whatever_a_file_is_called(run: Callable) -> None:
    result = run("answer", "two\nlines\x1b[31m.mp4", "what?")
    assert result.stderr.count("\n") == 1 and "\x1b" not in result.stderr


def test_help_and_version(run: Callable) -> None:
    from vd_kernels import __version__

    assert run("--version").stdout == f"videodistill {__version__}\n"
    assert run().stdout == run("--help").stdout
    overview = run("--help").stdout
    assert all(f"│ {command} " in overview for command in ("answer", "data", "train-default"))
    assert run("answer", "--help").exit_code == 0
    assert run("data", "--help").exit_code == 0
    unknown = run("answre")
    assert unknown.exit_code == 2 and "answre" in unknown.stderr
    assert unknown.stdout == "" and unknown.stderr.count("\n") == 1


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_real_command(here: Path) -> None:
    told = python(
        "-m", "videodistill.cli", "answer", "square.mp4", "何色?", *HEAD, "--json", cwd=here
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert json.loads(told.stdout)["answers"][0]["question"] == "何色?"


def test_imports_stay_light(here: Path) -> None:
    code = (
        "import sys, videodistill, videodistill.cli, videodistill.engine.checks\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy', 'av'} & set(sys.modules)))"
    )
    assert python("-c", code, cwd=here).stdout == "[]\n"


@pytest.mark.parametrize(("module", "extra"), [("typer", "model"), ("av", "model")])
def test_a_missing_extra_is_named(here: Path, module: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = 'x answer square.mp4 q'.split()\n"
        "from videodistill.cli import main; main()"
    )
    told = python("-c", code, cwd=here)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.splitlines() == [
        f"videodistill: error: {module} is not installed: pip install 'videodistill[{extra}]'"
    ]
