"""Several processes, started by torchrun, compute what one computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from videodistill.training.trainer import train

_RANK = """
import sys
from pathlib import Path
from tests.videodistill.training import small
from videodistill.training.trainer import train

folder, encoder, out = map(Path, sys.argv[1:4])
config = small.config_for(folder, encoder, out, *sys.argv[4:])
train(config, features=small.features_of([f"v{n}.mp4" for n in range(7)]))
"""


def test_two_processes_learn_what_one_learns(
    configure: Any, dataset: Path, features: Any, small_encoder: Any, encoder_dir: Path
) -> None:
    settings = ("steps=4", "validation.every=2", "model.sampling=gumbel")
    one, two = configure("one", *settings), configure("two", *settings)
    train(one, features=features, encoder=small_encoder, log=lambda line: None)
    script = dataset / "rank.py"
    script.write_text(_RANK)
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    done = subprocess.run(
        [sys.executable, *launch, script, dataset, encoder_dir, two.out, *settings],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1, "the first process alone speaks"
    curves = [
        [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        for out in (one.out, two.out)
    ]
    assert [line["kind"] for line in curves[0]].count("validation") == 2
    for alone, together in zip(*curves, strict=True):
        for line in (alone, together):
            line.pop("seconds", None), line.pop("seconds_waiting_for_data", None)
        assert alone.pop("kind") == together.pop("kind")
        assert together == pytest.approx(alone, rel=1e-3)
