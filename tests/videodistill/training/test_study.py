"""The study at a tiny size: what is run, what is run again, and what is measured of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from safetensors import SafetensorError

from videodistill import encoders
from videodistill.data.procedural.questions import ANSWERS
from videodistill.errors import UserError
from videodistill.model import VideoDistill, VideoDistillConfig
from videodistill.training import study
from videodistill.training.head import HeadRecipe
from videodistill.training.study import (
    ARMS,
    StudyRecipe,
    _best_rate,
    _Run,
    run_study,
)

TINY = StudyRecipe(
    videos={
        "train": (2, 16),
        "train-long": (1, 32),
        "val": (1, 16),
        "test": (2, 16),
        "test-reversed": (1, 16),
        "test-long": (1, 32),
    },
    candidates={"train-long": 32, "test-long": 32},
    model={"width": 32, "heads": 2, "refiner_blocks": 1, "merge": 2, "frames": 16, "pick": 3},
    head=HeadRecipe(thinking_steps=2, observing=((2, 1),), steps=2, videos_per_batch=2),
    rates=(1e-3, 2e-3),
    tuning_share=0.5,
    seeds=(1, 2),
    picks=(1, 3),
    offered=(16, 32),
)
CHOSEN = ["videodistill", "mean"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Only what takes long and is tested elsewhere is made short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "question_only", partial(study.question_only, steps=20))
        patch.setattr(encoders, "load_encoder", cache(encoders.load_encoder))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    lines = []
    run_study(work, out, recipe=TINY, arms=CHOSEN, workers=1, log=lines.append)
    return work, out, lines


def test_every_arm_and_seed_has_a_result(made):
    work, out, lines = made
    names = {path.name for path in (out / "study").iterdir()}
    trained = {f"{arm}-{seed}.json" for arm in CHOSEN for seed in TINY.seeds}
    assert names == trained | {"question-only.json"}
    record = json.loads((out / "study" / "videodistill-2.json").read_text())
    assert {"K=1", "K=3", "N=16", "N=32", "blank", "shuffled", "test-reversed"} < set(
        record["results"]
    )
    assert record["results"]["test"]["all"]["questions"] == 16
    assert set(record["results"]["grounding"]) == {"mIoP", "mIoU", "Acc@GQA"}
    assert set(record["tuning"]) == {"0.001", "0.002"}
    assert record["settings"]["rate"] in TINY.rates
    assert all(seconds > 0 for seconds in record["seconds"].values())
    # Checkpoints of the trainings alone, and no test before the last training.
    checkpoints = [path for path in (work / "runs").iterdir() if path.is_dir()]
    assert len(checkpoints) == 4
    tested = [place for place, line in enumerate(lines) if line.endswith("% of test")]
    assert len(tested) == 4 and min(tested) > lines.index("stage 5 of 6: testing")


def test_the_prior_is_reversed_in_one_split(made):
    work, _, _ = made
    splits = json.loads((work / "data" / "dataset.json").read_text())["splits"]
    assert {entry["arguments"]["bias"] for entry in splits.values()} == {0.5}
    reversed_ = [name for name in splits if splits[name]["arguments"]["reverse_bias"]]
    assert reversed_ == ["test-reversed"]


def test_a_second_run_does_what_is_missing(made, monkeypatch, tmp_path):
    work, out = (shutil.copytree(made[n], tmp_path / str(n)) for n in (0, 1))
    did = []
    for name in ("_train", "_test"):
        run = getattr(study, name)
        monkeypatch.setattr(
            study, name, lambda job, run=run, name=name: (did.append((name, job[0])), run(job))[1]
        )

    def again(recipe: StudyRecipe = TINY) -> list[tuple]:
        did.clear()
        run_study(work, out, recipe=recipe, arms=CHOSEN, workers=1, log=lambda line: None)
        return [(name, run.arm, run.seed, run.share) for name, run in did]

    assert again() == []
    (out / "study" / "mean-1.json").unlink()
    assert again() == [("_test", "mean", 1, 1.0)]
    (record,) = (work / "runs").glob(f"{did[0][1].name}.json")
    record.write_text(record.read_text()[:100])  # damaged
    assert again() == [("_train", "mean", 1, 1.0)]
    # What is asked of trained models is no reason to train them again.
    assert {name for name, *_ in again(replace(TINY, picks=(2,)))} == {"_test"}
    monkeypatch.setitem(ARMS, "mean", replace(ARMS["mean"], model={"frame_choice": "uniform"}))
    trained = [entry for entry in again() if entry[0] == "_train"]
    seeds = [TINY.tuning_seed] * len(TINY.rates) + [*TINY.seeds]
    assert [(arm, seed) for _, arm, seed, _ in trained] == [("mean", seed) for seed in seeds]
    assert [share for *_, share in trained] == [0.5, 0.5, 1.0, 1.0]


def test_all_arms_take_as_many_steps_tuning_runs_and_parameters():
    sizes, whole = {}, StudyRecipe().head
    expected = whole.thinking_steps + sum(steps for steps, _ in whole.observing) + whole.steps
    for name, arm in ARMS.items():
        config = VideoDistillConfig(
            **StudyRecipe().model | arm.model,
            **dict.fromkeys(("embed_dim", "patch_dim", "token_dim"), 128),
            patch_grid=(6, 6),
            answers=list(ANSWERS),
        )
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in VideoDistill(config).parameters())
        head = _Run(StudyRecipe(), name, 1, 2e-3).head
        steps = head.thinking_steps + sum(steps for steps, _ in head.observing) + head.steps
        assert steps == expected and head.learning_rate == 2e-3 and head.seed == 1
        assert bool(head.evidence_weight) == arm.guided
        if not arm.guided:
            assert head.steps == steps
    for size in sizes.values():
        assert size == pytest.approx(sizes["videodistill"], rel=0.02)


def test_settings_name_what_decides_a_training(monkeypatch):
    run = _Run(TINY, "videodistill", 1, 1e-3)
    here = run.name
    names = []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(study, "cpu_product_dtype", lambda bf16, dtype=dtype: dtype)
        names.append(run.name)
    monkeypatch.undo()
    assert here in names and names[0] != names[1]
    given = [
        replace(run, recipe=replace(TINY, head=replace(TINY.head, bf16=bf16))).name
        for bf16 in (True, False)
    ]
    assert given == names, "who decided the precision is nothing to a result"
    assert run.name == replace(run, recipe=replace(TINY, picks=(9,), seeds=(5,))).name
    others = [
        replace(run, seed=2),
        replace(run, rate=2e-3),
        replace(run, share=0.5),
        replace(run, arm="soft"),
        replace(run, recipe=replace(TINY, bias=0.4)),
        replace(run, recipe=replace(TINY, head=replace(TINY.head, steps=3))),
    ]
    assert len({run.name, *(other.name for other in others)}) == 7


def test_how_guided_arms_spend_their_steps_is_nothing_to_the_others():
    guided, other = (_Run(TINY, arm, 1, 1e-3) for arm in ("videodistill", "uniform"))
    head = replace(TINY.head, thinking_steps=TINY.head.thinking_steps + 1, steps=1)
    moved = replace(TINY, head=head)
    assert replace(other, recipe=moved).name == other.name
    assert replace(guided, recipe=moved).name != guided.name


def test_the_best_rate_of_val_is_taken(monkeypatch):
    of = {1e-3: 40.0, 2e-3: 50.0, 4e-3: 50.0}
    monkeypatch.setattr(study, "_tuning", lambda *_: of)
    assert _best_rate(TINY, "mean", None) == 2e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arms": ["videodistill", "oracle"]}, "arm 'oracle' is not known: use some of"),
        ({"arms": []}, "at least one arm"),
        ({"seeds": []}, "at least one arm and one seed"),
        ({"workers": 0}, "workers 0: use at least 1"),
    ],
)
def test_bad_requests(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        run_study(tmp_path / "work", tmp_path / "out", recipe=TINY, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "features"), "features: No space left on device"),
        (SafetensorError("I/O error: No space left"), "No space left; free some space"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error, said):
    def full(*_):
        raise error

    monkeypatch.setattr(study, "_make_data", full)
    with pytest.raises(UserError, match=said):
        run_study(tmp_path, tmp_path, recipe=TINY, log=lambda line: None)
