from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import videodistill
from tests.videodistill.training import small
from videodistill.errors import UserError
from videodistill.training import checkpoint
from videodistill.training.material import read_material
from videodistill.training.trainer import train


def curve(out: Path) -> list[dict[str, float]]:
    """What was logged of each step and validation, but for the times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of a run's only checkpoint, with the moments."""
    (folder,) = (out / "checkpoints").iterdir()
    return load_file(folder / "weights.safetensors") | load_file(folder / "optimiser.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def quiet(line: str) -> None:
    pass


def test_a_run_leaves_logs_a_checkpoint_and_its_best_model(
    configure: Any, features: Any, small_encoder: Any, encoder_dir: Path
) -> None:
    config = configure("one", "curriculum.sigma={start: 0.4, end: 0.1}")
    lines: list[str] = []
    result = train(config, features=features, encoder=small_encoder, log=lines.append)
    out = Path(config.out)
    assert (result.step, result.ended) == (12, "complete")
    logged = curve(out)
    steps = [line for line in logged if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[0]["sigma"] == 0.4 and steps[-1]["sigma"] == pytest.approx(0.1)
    assert all(math.isclose(s["loss"], s["loss/answer"] + s["loss/choice"]) for s in steps)
    validations = [line for line in logged if line["kind"] == "validation"]
    assert [line["step"] for line in validations] == [6, 12]
    assert result.best == max(line["all"] for line in validations)
    assert result.best_step in (6, 12)
    assert list((out / "tensorboard").glob("events.*"))
    assert (out / "checkpoints" / "step-00000012").is_dir()
    record = json.loads((out / "best" / "training.json").read_text())
    assert record["step"] == result.best_step and record["metrics"]["all"] == result.best
    assert any("validation all" in line for line in lines)

    opened = videodistill.load(out / "best")  # with the encoder that its config names
    assert opened.encoder.fingerprint == small_encoder.fingerprint
    assert set(opened.model.config.answers) <= set(small.COLOURS)


@pytest.mark.parametrize(
    "settings",
    [
        ("curriculum.sigma={start: 0.4, end: 0.1}",),
        ("model.sampling=gumbel", "curriculum.temperature={start: 2, end: 0.5}", "precision=bf16"),
        ("model.frame_choice=random", "batch.accumulate=2"),
        small.PRETRAINING,
    ],
    ids=["perturbed", "gumbel", "random", "pretraining"],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    settings: tuple[str, ...], configure: Any, features: Any, small_encoder: Any
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("step 7/"):
            os.kill(os.getpid(), signal.SIGTERM)

    straight, broken = configure("straight", *settings), configure("broken", *settings)
    train(straight, features=features, encoder=small_encoder, log=quiet)
    result = train(broken, features=features, encoder=small_encoder, log=interrupt)
    assert (result.step, result.ended) == (7, "interrupted")
    result = train(broken, features=features, encoder=small_encoder, resume=True, log=quiet)
    assert (result.step, result.ended) == (12, "complete")
    assert curve(Path(broken.out)) == curve(Path(straight.out))
    assert same(weights(Path(broken.out)), weights(Path(straight.out)))


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.videodistill.training import small
from videodistill.training.trainer import train

def kill(line):
    if line.startswith("step 10/"):
        os.kill(os.getpid(), signal.SIGKILL)

folder, encoder, out = map(Path, sys.argv[1:4])
config = small.config_for(folder, encoder, out, *sys.argv[4:])
train(config, features=small.features_of([f"v{n}.mp4" for n in range(7)]), log=kill)
"""


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    configure: Any, dataset: Path, features: Any, small_encoder: Any, encoder_dir: Path
) -> None:
    settings = ("save_every=7", "data.workers=1")
    straight, killed = configure("straight"), configure("killed", *settings)
    train(straight, features=features, encoder=small_encoder, log=quiet)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, dataset, encoder_dir, killed.out, *settings],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    out = Path(killed.out)
    assert len(curve(out)) == 11, "ten steps and a validation, three steps after the checkpoint"
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 1')  # killed while it wrote
    (out / "checkpoints" / ".step-00000010.partial").mkdir()
    train(killed, features=features, encoder=small_encoder, resume=True, log=quiet)
    assert [line["step"] for line in curve(out) if line["kind"] == "train"] == [*range(1, 13)]
    assert curve(out) == curve(Path(straight.out))
    assert same(weights(out), weights(Path(straight.out)))


def test_a_run_is_only_resumed_on_request_and_as_it_was(
    configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    def start(*overrides: str, resume: bool = True) -> Any:
        config = configure("run", "steps=2", "data.workers=0", *overrides)
        return train(config, features=features, encoder=small_encoder, resume=resume, log=quiet)

    assert start().step == 2  # nothing there yet
    with pytest.raises(UserError, match="holds a run of 2 steps; go on with --resume"):
        start(resume=False)
    with pytest.raises(UserError) as error:
        start("optimiser.learning_rate=0.5", "model.gate=channel")
    assert 'model.gate not set, now "channel"; optimiser.learning_rate 0.003, now 0.5' in str(
        error.value
    )
    assert start("data.workers=1", "save_every=3").step == 2
    lines = (dataset / "train.jsonl").read_text().replace("which colour", "what colour")
    (dataset / "train.jsonl").write_text(lines)
    with pytest.raises(UserError, match="was trained on other questions"):
        start()


def test_what_evidence_follows_from_decides_whether_a_run_is_the_same(
    configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    asked = {"question_id": 1, "interval": "v1|fpv1|0|9", "video": "v1.mp4", "question": "what?"}
    asked |= {"answer": "red", "reasoning_type": "query"}
    stretches = ({}, {"evidence": [[1, 2]]}, {"context": [[1, 2]]}, {"context": [[1, 3]]})
    digests = set()
    for more in stretches:
        (dataset / "train_qas.json").write_text(json.dumps([asked | more]))
        config = configure("run", "data.dataset=egotaskqa", "data.val=null")
        digests.add(read_material(config, features, small_encoder, quiet).digest)
    assert len(digests) == len(stretches)


@pytest.mark.parametrize(
    "settings",
    [("batch.accumulate=2",), ("gradient_checkpointing=true",), ("data.workers=2",)],
    ids=lambda settings: settings[0],
)
def test_how_a_batch_is_worked_through_changes_nothing(
    settings: tuple[str, ...], configure: Any, features: Any, small_encoder: Any
) -> None:
    one, other = configure("one", "steps=3"), configure("other", "steps=3", *settings)
    for config in (one, other):
        train(config, features=features, encoder=small_encoder, log=quiet)
    for a, b in zip(curve(Path(one.out)), curve(Path(other.out)), strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-4)


def test_losses_that_are_no_numbers_stop_the_run(
    configure: Any, features: Any, small_encoder: Any
) -> None:
    config = configure("run", "save_every=2", "validation.every=100")

    def spoil(line: str) -> None:
        if line.startswith("step 5/"):
            for found in features.values():
                found.patches.fill_(float("nan"))

    with pytest.raises(UserError) as error:
        train(config, features=features, encoder=small_encoder, log=spoil)
    told = str(error.value)
    assert "not finite in step 6, at learning rate 0.0022" in told
    assert "step-00000004 is the last good checkpoint" in told
    (kept,) = (Path(config.out) / "checkpoints").iterdir()
    assert kept.name == "step-00000004"
    assert all(value.isfinite().all() for value in weights(Path(config.out)).values())


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    configure: Any, features: Any, small_encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("run", "save_every=2")
    saved = checkpoint.save_file

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        if "step-00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved(tensors, path, *rest)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device; free some space and go on with"):
        train(config, features=features, encoder=small_encoder, log=quiet)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    result = train(config, features=features, encoder=small_encoder, resume=True, log=quiet)
    assert result.step == 12


def test_training_stops_when_it_gets_no_better(
    configure: Any, features: Any, small_encoder: Any
) -> None:
    config = configure(
        "run",
        "optimiser.learning_rate=0",
        "validation={every: 2, metric: loss, patience: 2}",
    )
    result = train(config, features=features, encoder=small_encoder, log=quiet)
    assert (result.step, result.ended, result.best_step) == (6, "early", 2)


def test_without_steps_the_model_is_only_measured(
    configure: Any, features: Any, small_encoder: Any
) -> None:
    config = configure("run", "steps=0", "data.train=null", "losses.answer=0")
    result = train(config, features=features, encoder=small_encoder, log=quiet)
    assert result.step == 0 and result.metrics["all"] == result.best
    assert (Path(config.out) / "best" / "model.safetensors").is_file()
    assert not (Path(config.out) / "checkpoints").exists()


def test_a_run_can_begin_with_another_ones_model(
    configure: Any, features: Any, small_encoder: Any
) -> None:
    first = configure("first")
    train(first, features=features, encoder=small_encoder, log=quiet)
    best = Path(first.out) / "best"
    measured = train(
        configure("again", "steps=0", f"init={best}"),
        features=features,
        encoder=small_encoder,
        log=quiet,
    )
    assert measured.metrics == json.loads((best / "training.json").read_text())["metrics"]
    with pytest.raises(UserError, match="has other sizes than model"):
        train(
            configure("wide", "model.width=32", f"init={best}"),
            features=features,
            encoder=small_encoder,
            log=quiet,
        )


def test_parts_learn_in_phases(
    configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    small.ground(dataset)
    config = configure("run", *small.PHASES, "save_every=1", "validation.every=100")
    after: dict[int, dict[str, torch.Tensor]] = {}
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        step = re.match(r"step (\d+)/", line)
        if step and step[1] != "1":
            after[int(step[1]) - 1] = weights(Path(config.out))

    train(config, features=features, encoder=small_encoder, log=note)
    after[12] = weights(Path(config.out))
    assert [line for line in lines if line.startswith("phase")] == [
        *("phase thinking: 4 steps", "phase observing: 4 steps", "phase answering: 4 steps")
    ]

    def moved(first: int, last: int) -> set[str]:
        """Parts whose weights differ between two steps."""
        names = [name for name in after[first] if "/" not in name]
        differ = {n for n in names if not torch.equal(after[first][n], after[last][n])}
        return {".".join(name.split(".")[:2]) for name in differ}

    thinking = {"model.sampler", "evidence_scale"}
    others = {"model.refiner", "model.answering"}
    assert moved(1, 4) == thinking
    assert moved(4, 8) == others
    assert moved(8, 12) == thinking | others
    counts = {name: int(value) for name, value in after[12].items() if name.endswith("/step")}
    assert max(counts.values()) == 4, "moments begin anew with each phase"
    logged = [line for line in curve(Path(config.out)) if line["kind"] == "train"]
    assert [line["phase"] for line in logged] == [0] * 4 + [1] * 4 + [2] * 4
    told = [{name for name in line if name.startswith("loss/")} for line in logged]
    answers = {"loss/answer", "loss/choice"}
    expected = ({"loss/evidence"}, answers, answers | {"loss/evidence"})
    for phase, names in enumerate(expected):
        assert set.union(*told[4 * phase : 4 * phase + 4]) == names
    assert [line["learning_rate"] for line in logged[:4]] == pytest.approx(
        [0.003, 0.003, 0.001515, 0.00003]
    )
    rates = [line["learning_rate"] for line in logged]
    assert rates[:4] == rates[4:8] == rates[8:]


@pytest.mark.parametrize("last", [3, 4, 6])
def test_a_run_goes_on_within_and_between_phases(
    last: int, configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith(f"step {last}/"):
            os.kill(os.getpid(), signal.SIGTERM)

    small.ground(dataset)
    straight, broken = configure("straight", *small.PHASES), configure("broken", *small.PHASES)
    train(straight, features=features, encoder=small_encoder, log=quiet)
    result = train(broken, features=features, encoder=small_encoder, log=interrupt)
    assert (result.step, result.ended) == (last, "interrupted")
    result = train(broken, features=features, encoder=small_encoder, resume=True, log=quiet)
    assert (result.step, result.ended) == (12, "complete")
    assert curve(Path(broken.out)) == curve(Path(straight.out))
    assert same(weights(Path(broken.out)), weights(Path(straight.out)))

    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as error:
            config = configure("broken", *overrides)
            train(config, features=features, encoder=small_encoder, resume=True, log=quiet)
        return str(error.value)

    assert "phases.observing.pick 1, now 2" in refused(*small.PHASES, "phases.observing.pick=2")
    swapped = (*small.PHASES[:2], small.PHASES[3], small.PHASES[2], small.PHASES[4])
    assert 'phases ["thinking", "observing", "answering"], now ["observing", ' in refused(*swapped)


def test_patience_begins_with_the_last_phase(
    configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    small.ground(dataset)
    validation = "validation={every: 2, metric: loss, patience: 1}"
    config = configure("run", *small.PHASES, "optimiser.learning_rate=0", validation)
    result = train(config, features=features, encoder=small_encoder, log=quiet)
    assert (result.step, result.ended, result.best_step) == (10, "early", 2)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["losses.evidence=0.3"], "no question of split train has evidence, as losses.evidence"),
        (["phases={a: {evidence_first: true}}"], "no question of split train has evidence"),
        (["batch.accumulate=3"], "batch.videos 4 cannot be shared"),
        (["data.train=trian"], "no split trian of your own data; it has train, val"),
        (["validation.metric=acc"], "no acc of your own data; there are choice, open, all, loss"),
        (["model.heads=5"], "model: width 16 is not a multiple of heads 5"),
        (["init=nowhere"], "checkpoint nowhere: no such folder"),
    ],
)
def test_bad_runs_are_refused_before_the_first_step(
    overrides: list[str], told: str, configure: Any, features: Any, small_encoder: Any
) -> None:
    config = configure("run", *overrides)
    with pytest.raises(UserError, match=told):
        train(config, features=features, encoder=small_encoder, log=quiet)
    assert not (Path(config.out) / "log.jsonl").is_file()


def test_what_cannot_be_used_is_told_and_counts_as_wrong(
    configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    answers = dataset / "answers.txt"
    answers.write_text("red\ngreen\n")
    del features["v0.mp4"], features["v6.mp4"]
    lines: list[str] = []
    config = configure("run", "steps=1", f"data.answers={answers}")
    result = train(config, features=features, encoder=small_encoder, log=lines.append)
    told = "\n".join(lines)
    assert "train: 3 questions about 1 videos without features, v0.mp4 first: left out" in told
    assert "validation: 3 questions about 1 videos without features, v6.mp4 first" in told
    assert "open answers are among the 2 of the classifier; others give no loss" in told
    asked = sum(line.count("v5.mp4") for line in (dataset / "val.jsonl").read_text().splitlines())
    right = result.metrics["all"] * (asked + 3) / 100
    assert right == pytest.approx(round(right)) and right <= asked

    whole = (dataset / "val.jsonl").read_text()
    (dataset / "val.jsonl").write_text(whole + "{}\n")
    lines.clear()
    worse = train(
        configure("worse", "steps=1"), features=features, encoder=small_encoder, log=lines.append
    )
    assert any("validation: 1 annotations cannot be read: counted as wrong" in s for s in lines)
    assert worse.metrics["all"] * (asked + 4) == pytest.approx(
        100 * round(worse.metrics["all"] * (asked + 4) / 100)
    )
    (dataset / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"train\.jsonl:1: video must be a text"):
        train(configure("broken"), features=features, encoder=small_encoder, log=quiet)
    row = json.dumps(small.question(0, "v1.mp4", 0))
    (dataset / "train.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(UserError, match="question id q0 is given at"):
        train(configure("twice"), features=features, encoder=small_encoder, log=quiet)


def test_validation_tells_how_often_evidence_was_seen(
    configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    evidence = ([[0, 10]], [[0.01, 0.02]], [], [[1, 2], [5, 10]], [[0, 10]])
    rows = [small.question(n, "v6.mp4", 1) | {"evidence": e} for n, e in enumerate(evidence)]
    rows[4]["video"] = "gone.mp4"
    (dataset / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("steps=1", "model.frame_choice=uniform", "model.pick=1")
    lines: list[str] = []
    config = configure("run", *settings, "validation.metric=evidence recall")
    result = train(config, features=features, encoder=small_encoder, log=lines.append)
    assert result.metrics["evidence recall"] == result.best == 50.0, "the first and the fourth"
    assert "step 1: validation evidence recall 50" in lines
    lines.clear()
    train(configure("x", *settings), features=features, encoder=small_encoder, log=lines.append)
    assert any("validation all" in line and "evidence recall 50" in line for line in lines)


def test_validation_scores_the_stretches_that_a_model_shows(
    configure: Any, features: Any, small_encoder: Any, dataset: Path
) -> None:
    """By NExT-GQA's rule; a model that does not choose shows all of the video."""
    heads = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
    for split, video in (("train", 0), ("val", 6)):
        (dataset / f"{split}.jsonl").unlink()
        rows = [f"v{video},80,8,8,why {n},red,{n},CW,red,a,b,c,d" for n in range(3)]
        (dataset / f"{split}.csv").write_text("\n".join([heads, *rows]) + "\n")
    location = {"0": [[0, 10]], "1": [[1, 2], [4, 8]]}
    grounding = {"v6": {"duration": 10, "fps": 8, "location": location}}
    (dataset / "gsub_val.json").write_text(json.dumps(grounding))
    settings = ("data.dataset=nextgqa", "steps=1", "model.frame_choice=uniform")
    features = {name.removesuffix(".mp4"): found for name, found in features.items()} | features
    config = configure("run", *settings, "validation.metric=mIoP")
    result = train(config, features=features, encoder=small_encoder, log=quiet)
    assert result.best == result.metrics["mIoP"] == pytest.approx(70.0)
    assert result.metrics["IoP@0.5"] == 50.0
    assert result.metrics["Acc@GQA"] in (0.0, 50.0)


def test_features_of_another_encoder_are_refused(
    configure: Any, features: Any, small_encoder: Any
) -> None:
    for found in features.values():
        found.patches = found.patches[:, :2]
    with pytest.raises(UserError, match="set encoder to the one that they were made with"):
        train(configure("run"), features=features, encoder=small_encoder, log=quiet)


def test_loading_hides_behind_the_steps(
    configure: Any, features: Any, small_encoder: Any, tmp_path: Path
) -> None:
    here, loaded = os.getpid(), multiprocessing.get_context("fork").Value("i", 0)

    class Slow(dict):
        def __getitem__(self, name: str) -> Any:
            if os.getpid() != here:
                time.sleep(0.1)
                with loaded.get_lock():
                    loaded.value += 1
            return super().__getitem__(name)

    ahead, asked = 4, 4
    """Batches that two processes keep ready; look-ups that a batch takes."""

    def work(line: str) -> None:
        """A step that takes a while."""
        until = time.monotonic() + 60
        while line.startswith("step 4/") and loaded.value < (4 + ahead) * asked:
            assert time.monotonic() < until, "nothing is loaded ahead"
            time.sleep(0.01)

    config = configure("run", "steps=8", "data.workers=2", "data.val=null")
    train(config, features=Slow(features), encoder=small_encoder, log=work)
    lines = [json.loads(s) for s in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    waited = [line["seconds_waiting_for_data"] for line in lines]
    assert waited[0] > 0.3
    assert sum(waited[4:]) < 0.4, "four steps waited for less than it takes to make one batch"


def test_a_corpus_is_never_in_memory_as_a_whole(
    configure: Any, features: Any, small_encoder: Any
) -> None:
    alive: weakref.WeakSet[small.Features] = weakref.WeakSet()
    most = 0

    class OnDisk(dict):
        def __getitem__(self, name: str) -> Any:
            nonlocal most
            found = dataclasses.replace(super().__getitem__(name))
            alive.add(found)
            most = max(most, len(alive))
            return found

    config = configure("run", "batch.videos=2", "steps=6")
    train(config, features=OnDisk(features), encoder=small_encoder, log=quiet)
    assert 2 <= most <= 3, "two videos of a batch, and one that was just let go"


_LIMITED = """
import ctypes, gc, resource, sys
from pathlib import Path
import torch
from tests.videodistill.training import small
from videodistill.encoders import load_encoder
from videodistill.engine import feature_cache
from videodistill.training.trainer import train

MB = 1 << 20
folder, encoder, out = map(Path, sys.argv[1:4])
eyes, videos = load_encoder(encoder), [f"v{number}.mp4" for number in range(82)]

def run(name, features, *settings):
    settings = ("batch.videos=4", "data.workers=1", *settings)
    config = small.config_for(folder, encoder, out / name, *settings)
    return train(config, features=features, encoder=eyes, log=lambda line: None).step

run("before", small.features_of(videos), "steps=2")  # for all that is loaded but once
frames = 2 * MB // (2 * small.WIDTH * small.SIDE**2)
size = small.write_cache(folder / "cache", eyes, videos, frames)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what is free already must not be had beyond the limit
used = {a: int(b.split()[0]) << 10 for a, b in (
    line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line
)}
limit = 16 * MB
assert size > 10 * limit
resource.setrlimit(resource.RLIMIT_DATA, 2 * [used["VmData"] + limit])
assert run("out", feature_cache.FeatureCache.open(folder / "cache"), "steps=21") == 21
try:
    torch.empty(size, dtype=torch.uint8)
except RuntimeError:
    print("trained within the limit")
"""


def test_a_corpus_ten_times_larger_than_memory_trains(
    tmp_path: Path, dataset: Path, encoder_dir: Path
) -> None:
    rows = [json.dumps(small.question(n, f"v{n}.mp4", 1)) + "\n" for n in range(82)]
    (dataset / "train.jsonl").write_text("".join(rows))
    (dataset / "val.jsonl").write_text("".join(rows[:4]))
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, dataset, encoder_dir, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "trained within the limit\n", done.stderr


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "a process that loads features was killed"),
        (lambda: fail(UserError("shard 3 is damaged")), "^shard 3 is damaged$"),
        (lambda: fail(torch.OutOfMemoryError("CUDA out of memory")), "raise batch.accumulate"),
    ],
    ids=["killed", "damaged", "memory"],
)
def test_what_fails_beside_the_steps_is_one_line(
    failure: Callable[[], None], told: str, configure: Any, features: Any, small_encoder: Any
) -> None:
    here = os.getpid()

    class Failing(dict):
        def __getitem__(self, name: str) -> Any:
            if os.getpid() != here:
                failure()
            return super().__getitem__(name)

    config = configure("run", "data.workers=1")
    with pytest.raises(UserError, match=told):
        train(config, features=Failing(features), encoder=small_encoder, log=quiet)


def fail(error: Exception) -> None:
    raise error


@pytest.fixture
def telling(dataset: Path) -> dict[str, small.Features]:
    """Videos of three kinds, whose frames tell the kind; questions and answers, too."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, small.WIDTH // 2, generator=generator).half()
    features = small.features_of([f"v{number}.mp4" for number in range(24)])
    asked = ("a large blue square at left", "how many objects moved?", "yellow star")
    for split, numbers in (("train", range(18)), ("val", range(18, 24))):
        rows = []
        for number in numbers:
            kind = number % 3
            features[f"v{number}.mp4"].frame_embed[:] = kinds[kind]
            row = {"video": f"v{number}.mp4", "question": asked[kind]}
            rows.append(json.dumps(row | {"answer": small.COLOURS[kind]}) + "\n")
        (dataset / f"{split}.jsonl").write_text("".join(rows))
    return features


LEARNING = ("steps=40", "validation.every=40", "optimiser.learning_rate=0.01", "batch.videos=6")


def test_what_can_be_learnt_is_learnt(configure: Any, small_encoder: Any, telling: Any) -> None:
    config = configure("run", *LEARNING)
    result = train(config, features=telling, encoder=small_encoder, log=quiet)
    assert result.metrics["all"] == 100.0


def test_pretraining_learns_and_its_model_can_be_gone_on_with(
    configure: Any, telling: Any, small_encoder: Any
) -> None:
    config = configure("pretrained", *LEARNING, *small.PRETRAINING)
    result = train(config, features=telling, encoder=small_encoder, log=quiet)
    assert set(result.metrics) == {"loss"}
    lines = [line for line in curve(Path(config.out)) if line["kind"] == "train"]
    for name in ("matching", "masked_language", "contrastive"):
        values = [line[f"loss/{name}"] for line in lines]
        assert sum(values[-8:]) < 0.5 * sum(values[:8]), name
    best = Path(config.out) / "best"
    assert not any("masked" in name for name in load_file(best / "model.safetensors"))
    tuned = configure("tuned", "steps=1", f"init={best}")
    assert train(tuned, features=telling, encoder=small_encoder, log=quiet).step == 1
    with pytest.raises(UserError, match="pretraining gives no answers; set it to loss"):
        settings = (*small.PRETRAINING, "validation.metric=all")
        train(configure("x", *settings), features=telling, encoder=small_encoder, log=quiet)
