"""`videodistill train`, `train-default`, `study`: what options become, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from videodistill.cli import app
from videodistill.engine.checks import ASSETS
from videodistill.training import default_model, trainer
from videodistill.training import study as study_module


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls of the training function, which only says that it began."""
    calls = []

    def train(work: Path, out: Path, *, log: Callable[[str], None], **options: object) -> None:
        log("stage 1 of 5: videos")
        calls.append((work, out, options))

    monkeypatch.setattr(default_model, "train_default", train)
    return calls


def test_options(called: list[tuple], tmp_path: Path) -> None:
    out, work = str(tmp_path / "out"), str(tmp_path / "work")
    given = ["--out", out, "--work", work, "--controls", "--workers", "3"]
    result = CliRunner().invoke(app, ["train-default", *given])
    assert result.exit_code == 0, result.output
    assert called == [(Path(work), Path(out), {"controls": True, "workers": 3})]
    first, last = result.stdout.splitlines()
    assert re.fullmatch(r" +0:0\d  stage 1 of 5: videos", first)
    assert re.fullmatch(r" +0:0\d  the model and its card are in .*", last) and out in last


def test_defaults_make_the_bundled_model(called: list[tuple]) -> None:
    assert CliRunner().invoke(app, ["train-default"]).exit_code == 0
    options = {"controls": False, "workers": 2}
    assert called == [(Path("runs/default-model"), ASSETS / "default", options)]


def test_bad_folders_and_workers_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    good = str(tmp_path / "good")
    for arguments, named in (
        (["--work", good, "--out", good, "--workers", "0"], ["--workers", "--help"]),
        (["--work", str(file), "--out", good], [str(file), "choose another folder"]),
        (["--work", good, "--out", str(file / "deep" / "er")], [str(file), "another folder"]),
        (["--work", "/proc/self/work", "--out", good], ["/proc/self/work", "another folder"]),
    ):
        result = CliRunner().invoke(app, ["train-default", *arguments])
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert all(part in result.stderr for part in named), result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run on questions about the bundled video, with the bundled encoder."""
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    shutil.copy(ASSETS / "sample.mp4", annotations)
    rows = [
        {"video": "sample.mp4", "question": f"what {what} turns blue?", "answer": answer}
        for what, answer in (("thing", "ring"), ("shape", "star"), ("object", "ring"))
    ]
    for split in ("train", "val"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (annotations / f"{split}.jsonl").write_text("".join(lines))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
out: {tmp_path / "out"}
encoder: {ASSETS / "default" / "encoder"}
data: {{dataset: own, path: {annotations}, features: {tmp_path / "features"}, workers: 0}}
model: {{width: 16, heads: 2, frames: 8, pick: 2, merge: 2}}
batch: {{videos: 1, questions: 3}}
steps: 3
precision: fp32
"""
    )
    return file


def test_from_videos_to_answers(run_file: Path, tmp_path: Path) -> None:
    def call(*words: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, [*words])
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 else result.stderr

    annotations, out = tmp_path / "annotations", tmp_path / "out"
    told = call("train", str(run_file), status=2)
    assert "features: holds no features; make them with: videodistill extract" in told
    call(
        *("extract", "own", str(annotations), "--out", str(tmp_path / "features")),
        *("--frames", "8", "--workers", "1"),
    )
    told = call("train", str(run_file))
    assert "best all:" in told
    assert f"videodistill answer VIDEO QUESTION --checkpoint {out / 'best'}" in told
    told = call("train", str(run_file), status=2)
    assert "holds a run of 3 steps; go on with --resume" in told
    told = call("train", str(run_file), "steps=4", "--resume", status=2)
    assert "was trained with steps 3, now 4" in told
    others = str(tmp_path / "others")
    call("extract", "own", str(annotations), "--out", others, "--frames", "7", "--workers", "1")
    told = call("train", str(run_file), f"data.features={others}", "--resume", status=2)
    assert "was trained on other questions, answers or features than there are now" in told
    answer = call(
        *("answer", str(ASSETS / "sample.mp4"), "what shape turns blue?", "--json"),
        *("--checkpoint", str(out / "best")),
    )
    assert json.loads(answer)["answers"][0]["answer"] in ("ring", "star")


def test_an_interrupted_run_says_how_to_go_on(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = trainer.TrainResult(2, "interrupted", {}, None, None, signal.SIGTERM)
    monkeypatch.setattr(trainer, "train", lambda *_, **options: ended)
    result = CliRunner().invoke(app, ["train", str(run_file), "seed=3", "--cpu"])
    assert result.exit_code == 128 + signal.SIGTERM
    again = f"videodistill train {run_file} seed=3 --resume --cpu"
    assert result.stdout == f"saved after step 2; go on with: {again}\n"


def test_study_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def run(work: Path, out: Path, *, log: Callable[[str], None], **options: object) -> list[Path]:
        calls.append((work, out, options))
        return [out / "study.md"]

    monkeypatch.setattr(study_module, "run_study", run)
    given = ["--work", str(tmp_path), "--arms", "mean, soft", "--seeds", "4,5", "--workers", "3"]
    given += ["--precision", "fp32"]
    result = CliRunner().invoke(app, ["study", *given])
    assert result.exit_code == 0, result.output
    assert "the report is in docs/study.md" in result.stdout
    assert CliRunner().invoke(app, ["study"]).exit_code == 0
    assert calls == [
        (
            tmp_path,
            Path("docs"),
            {"arms": ["mean", "soft"], "seeds": [4, 5], "precision": "fp32", "workers": 3},
        ),
        (
            Path("runs/study"),
            Path("docs"),
            {"arms": None, "seeds": None, "precision": None, "workers": 2},
        ),
    ]
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, ["study", "--report-only", "--out", out])
    assert result.exit_code == 0, result.output
    assert "not yet run" in (tmp_path / "out" / "study.md").read_text()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "1,b"], "seeds '1,b': give numbers"),
        (["--seeds", "1,-2"], "seeds '1,-2': give numbers"),
        (["--arms", "none"], "arm 'none' is not known"),
        (["--precision", "fp16"], "precision 'fp16': use one of fp32, bf16"),
        (["--report-only", "--arms", "mean"], "drop --arms, --seeds and --precision"),
    ],
)
def test_study_refuses(given: list[str], said: str, tmp_path: Path) -> None:
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["study", *folders, *given])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and said in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []
