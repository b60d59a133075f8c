"""The distribution holds together: versions, commands, pins, and what is under version control."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
INSTALLED_EXTRAS = re.search(r"^EXTRAS \?= (.+)$", MAKEFILE, re.MULTILINE).group(1).split(",")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def texts(tracked: list[Path]) -> dict[Path, str]:
    """Each tracked file that holds no NUL byte, decoded; one that is not UTF-8 is an error here."""
    contents = {path: path.read_bytes() for path in tracked}
    return {path: data.decode("utf-8") for path, data in contents.items() if b"\0" not in data}


def test_both_packages_have_the_distributions_version() -> None:
    versions = {
        name: importlib.import_module(name).__version__
        for name in ("vd_kernels", "videodistill", "vd_kernels._version")
    }
    assert len(set(versions.values())) == 1, versions


def test_installed_metadata_is_of_this_version() -> None:
    try:
        installed = importlib.metadata.version("videodistill")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("videodistill is not installed")
    assert installed == importlib.import_module("vd_kernels._version").__version__


@pytest.mark.parametrize("script", sorted(PROJECT["project"]["scripts"]))
def test_console_script_can_be_imported(script: str) -> None:
    module, function = PROJECT["project"]["scripts"][script].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_installed_requirement_is_pinned_within_its_range(python: str) -> None:
    here = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    pins: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(here):
            assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
            pins[pin.name] = Version(str(pin.specifier).removeprefix("=="))
    wanted = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    for extra in INSTALLED_EXTRAS:
        wanted += PROJECT["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), str(requirement)


def test_torch_is_neither_a_build_requirement_nor_pinned() -> None:
    assert not any(Requirement(r).name == "torch" for r in PROJECT["build-system"]["requires"])
    torch = next(r for r in PROJECT["project"]["dependencies"] if Requirement(r).name == "torch")
    assert "==" not in torch


def make_targets() -> set[str]:
    return set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE).group(1).split())


def test_make_alone_prints_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make ([a-z-]+) +\S", done.stdout, re.MULTILINE)) == make_targets()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_commands_of_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^\s*\$?\s*|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named, f"{document} names no make command"
    assert named <= make_targets()


DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("videodistill/**/*.md"))
)


def commands() -> dict[str, set[str]]:
    """The options of each command by its words: "answer", "data make", ..."""
    from typer.main import get_command

    from videodistill.cli import app

    found: dict[str, set[str]] = {}

    def walk(command: Any, words: str) -> None:
        if hasattr(command, "list_commands"):
            for name in command.list_commands(None):
                walk(command.get_command(None, name), f"{words} {name}".strip())
        else:
            options = {option for parameter in command.params for option in parameter.opts}
            found[words] = {option for option in options if option.startswith("--")}

    walk(get_command(app), "")
    return found


def shown_commands(text: str) -> list[str]:
    """What stands after `videodistill` in blocks of code and between backticks, on one line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    matches = (re.fullmatch(r"(?:\.venv/bin/)?videodistill (.+)", line.strip()) for line in lines)
    return [match[1] for match in matches if match]


def test_there_are_commands_to_compare_with() -> None:
    found = commands()
    assert {"answer", "data make", "data check", "train-default"} <= set(found)
    assert {"--choices", "--figure", "--json"} <= found["answer"]
    assert len(shown_commands((ROOT / "README.md").read_text(encoding="utf-8"))) >= 5


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_options_of_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    known = commands()
    everywhere = {"--help", "--debug"}
    for line in shown_commands(text):
        words = shlex.split(line, comments=True)
        command = next((c for c in known if words[: len(c.split())] == c.split()), None)
        assert command is not None, f"{document}: no command videodistill {line}"
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known[command] | everywhere, f"{document}: videodistill {line}"
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= everywhere.union(*known.values()), document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_files_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


def test_tracked_text_is_utf8_with_unix_line_ends(texts: dict[Path, str]) -> None:
    assert ROOT / "LICENSE" in texts
    assert not [path for path, text in texts.items() if "\r\n" in text]


def test_no_tracked_file_names_a_folder_of_one_machine(texts: dict[Path, str]) -> None:
    private = re.compile(r"(?<![\w.~-])/(?:home|root|work|Users)/\w")
    found = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path, text in texts.items()
        for match in private.finditer(text)
    }
    assert not found


def test_no_tracked_file_is_a_pickle(tracked: list[Path]) -> None:
    pickled = {".pkl", ".pickle", ".pt", ".pth", ".joblib"}
    assert not [path for path in tracked if path.suffix in pickled]


def test_without_a_gpu_make_gpu_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for parts, told in (([], "sees no CUDA device"), (["everything"], "usage: .ci/gpu OUT")):
        done = subprocess.run(
            [sys.executable, ROOT / ".ci" / "gpu", tmp_path / "out", *parts],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def gpu_run() -> types.ModuleType:
    """`.ci/gpu`, which has no ending."""
    loader = importlib.machinery.SourceFileLoader("gpu_run", str(ROOT / ".ci" / "gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_run", loader))
    loader.exec_module(module)
    return module


def test_what_make_gpu_does_is_told_of_and_fits_nine_minutes(gpu_run: types.ModuleType) -> None:
    parts = list(gpu_run.LIMITS)
    assert sum(gpu_run.LIMITS.values()) <= 520
    assert f"all when empty: {' '.join(parts)}." in " ".join(MAKEFILE.replace("\n#", "").split())
    assert f"PART={'|'.join(parts)}`" in (ROOT / "docs" / "measuring.md").read_text("utf-8")


CUT_OFF = """
import os, pathlib, signal, time

def test_a(): pass

def test_ab():
    begun, passed = pathlib.Path(__file__).with_name("begun"), pathlib.Path(os.environ["VD_PASSED"])
    if not begun.exists():
        begun.touch()
        while not passed.exists():  # test_a is told of
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGKILL)
"""


def test_tests_that_were_cut_off_go_on_where_they_were(
    gpu_run: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(CUT_OFF)
    (command,) = gpu_run.commands("tests", tmp_path)
    usual = command[: command.index("-m", 3)]  # without what it chooses and where it looks
    monkeypatch.setattr(gpu_run, "commands", lambda *_: [[*usual, "-n", "1", str(tests)]])
    found = []
    for _ in range(3):
        passes = gpu_run.run("tests", tmp_path, time.monotonic() + 100)
        record = json.loads((tmp_path / "tests.json").read_text())
        listed = (tmp_path / "passed.txt").read_text().splitlines()
        found.append((passes, record.get("passed"), [x.rpartition("::")[2] for x in listed]))
    both = ["test_a", "test_ab"]
    assert found == [(False, None, both[:1]), (True, 1, both), (True, None, both)]


def test_a_part_that_hangs_is_cut_off(
    gpu_run: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(gpu_run, "commands", lambda *_: [hanging])
    assert not gpu_run.run("bench", tmp_path, time.monotonic() + 0.5)
    assert json.loads((tmp_path / "bench.json").read_text())["code"] == 124
