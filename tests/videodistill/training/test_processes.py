"""Several processes, started by torchrun, compute what one computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.videodistill.training import small
from videodistill.training.trainer import train

_RANK = """
import os, signal, sys
from pathlib import Path
from tests.videodistill.training import small
from videodistill.training import trainer

folder, encoder, out, stop = sys.argv[1:5]
config = small.config_for(Path(folder), Path(encoder), Path(out), *sys.argv[5:])
step = trainer._Run._step

def stopping(run, *rest):
    if os.environ["RANK"] == "1" and run.progress.step + 1 == int(stop):
        os.kill(os.getpid(), signal.SIGTERM)
    return step(run, *rest)

trainer._Run._step = stopping
features = small.features_of([f"v{n}.mp4" for n in range(7)])
print(trainer.train(config, features=features, resume=True).ended)
"""


def curve(out: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        (("steps=4", "validation.every=2", "model.sampling=gumbel"), 0),
        ((*small.PHASES, "validation.every=6", "batch={videos: 2, questions: 1}"), 6),
    ],
    ids=["at-once", "phases-interrupted"],
)
def test_two_processes_learn_what_one_learns(
    settings: tuple[str, ...],
    stop: int,
    configure: Any,
    dataset: Path,
    features: Any,
    small_encoder: Any,
    encoder_dir: Path,
) -> None:
    small.ground(dataset)
    one, two = configure("one", *settings), configure("two", *settings)
    train(one, features=features, encoder=small_encoder, log=lambda line: None)
    script = dataset / "rank.py"
    script.write_text(_RANK)
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")

    def run(stop: int) -> str:
        done = subprocess.run(
            [sys.executable, *launch, script, dataset, encoder_dir, two.out, str(stop), *settings],
            env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    if stop:
        assert run(stop).count("interrupted") == 2, "one was asked, both stopped"
        assert curve(two.out)[-1]["step"] == stop
    told = run(0)
    assert told.count(f"step {one.steps}/{one.steps}") == 1, "the first process alone speaks"
    curves = curve(one.out), curve(two.out)
    assert [line["kind"] for line in curves[0]].count("validation") == 2
    for alone, together in zip(*curves, strict=True):
        assert alone.pop("kind") == together.pop("kind")
        assert together == pytest.approx(alone, rel=1e-3)
    if stop:
        assert any("loss/evidence" not in line for line in curves[0][:4]), "no evidence in a batch"
