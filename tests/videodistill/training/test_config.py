from __future__ import annotations

from pathlib import Path

import pytest

from videodistill.errors import UserError
from videodistill.training.config import OptimiserConfig, PhaseConfig, Schedule, read_config

BASE = """
out: runs/one
encoder: some/clip
data: {dataset: nextqa-mc, path: annotations, features: cache}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def test_what_is_not_said_is_the_default(file: Path) -> None:
    config = read_config(file)
    assert (config.out, config.data.path, config.data.train) == ("runs/one", "annotations", "train")
    assert config.optimiser == OptimiserConfig()
    assert config.curriculum.sigma is None


def test_overrides_win_and_are_yaml(file: Path) -> None:
    config = read_config(
        file,
        [
            "optimiser.learning_rate=1e-3",  # a text, for YAML 1.1
            "optimiser.betas=[0.8, 0.9]",
            "curriculum.sigma={start: 0.5, end: 0.05, shape: cosine}",
            "curriculum.sigma.steps=100",
            "model.sampling=gumbel",
            "model.frames=1e2",
            "data.val=null",
            "gradient_checkpointing=true",
        ],
    )
    assert config.optimiser.learning_rate == 1e-3
    assert config.optimiser.betas == (0.8, 0.9)
    assert config.curriculum.sigma == Schedule(0.5, 0.05, 100, "cosine")
    assert config.model == {"sampling": "gumbel", "frames": 100}
    assert config.data.val is None and config.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("stepz: 3", "{file}: stepz: no such key; did you mean steps?"),
        ("optimiser: {lerning_rate: 1}", "{file}: optimiser.lerning_rate: no such key; did you"),
        ("model: {widht: 8}", "{file}: model.widht: no such key; did you mean width?"),
        ("model: {embed_dim: 8}", "{file}: model.embed_dim: no such key"),
        ("model: {width: wide}", "{file}: model.width: must be a whole number, not 'wide'"),
        ("steps: 1.5", "{file}: steps: must be a whole number, not 1.5"),
        ("steps: true", "{file}: steps: must be a whole number, not True"),
        ("gradient_checkpointing: 1", "{file}: gradient_checkpointing: must be true or false"),
        ("optimiser: {learning_rate: .nan}", "{file}: optimiser.learning_rate: must be a number"),
        ("precision: fp8", "{file}: precision: must be one of fp32, bf16, not 'fp8'"),
        ("optimiser: 3", "{file}: optimiser: holds 3, where keys are expected"),
        ("optimiser: {betas: [1]}", "{file}: optimiser.betas: must be a list of 2"),
        ("batch: {videos: 0}", "{file}: batch: videos must be at least 1, not 0"),
        ("curriculum: {sigma: {start: 1}}", "{file}: curriculum.sigma.end: is missing"),
        ("losses: {answer: 0, choice: 0}", "{file}: losses: all weights are 0"),
        ("losses: {matching: 1}", "{file}: losses: matching"),
        ("steps: 3\nsteps: 4", "{file}: steps is given again in line 6: keep one"),
        ("steps: [", "{file}: not valid YAML in line 6"),
    ],
)
def test_a_wrong_key_is_one_line_that_names_it(file: Path, lines: str, told: str) -> None:
    file.write_text(BASE + lines + "\n")
    with pytest.raises(UserError) as error:
        read_config(file)
    assert str(error.value).startswith(told.format(file=file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "optimiser.clipp=1",
            "optimiser.clipp=1: optimiser.clipp: no such key; did you mean clip?",
        ),
        ("steps=many", "steps=many: steps: must be a whole number, not 'many'"),
        ("steps", "steps: write key.path=value"),
        (".x=1", ".x=1: write key.path=value"),
        ("steps.more=1", "steps.more=1: steps holds a single value"),
        ("data.dataset=nextqa", "no dataset nextqa"),
        ("data.train=null", "data.train is null"),
        ("data.holdout=0.1", "holdout goes with val: null"),
        ("data.vocabulary=0", "vocabulary must be at least 1"),
    ],
)
def test_a_wrong_override_is_named(file: Path, override: str, told: str) -> None:
    file.write_text(BASE + "steps: 5\n")
    with pytest.raises(UserError) as error:
        read_config(file, [override])
    assert told in str(error.value)


PHASES = """
steps: 50
losses: {evidence: 0.3}
optimiser: {warmup: 5}
phases:
  thinking: {steps: 10, others: 0}
  observing: {steps: 20, sampler: 0, pick: 1, evidence_first: true}
  answering:
"""


def test_phases_follow_one_another(file: Path) -> None:
    (alone,) = read_config(file, ["optimiser.sampler_share=0.2"]).all_phases()
    assert alone == ("", PhaseConfig(sampler=0.2), 0, 20000)
    file.write_text(BASE + PHASES)
    config = read_config(file, ["phases.observing.steps=25", "phases.answering.others=0.5"])
    assert config.all_phases() == [
        ("thinking", PhaseConfig(steps=10, others=0), 0, 10),
        ("observing", PhaseConfig(steps=25, sampler=0, pick=1, evidence_first=True), 10, 25),
        ("answering", PhaseConfig(others=0.5), 35, 15),
    ]
    names = [config.phase_at(step).name for step in (0, 9, 10, 34, 35, 49)]
    assert names == ["thinking"] * 2 + ["observing"] * 2 + ["answering"] * 2
    assert read_config(file, ["steps=0"]).steps == 0, "what is only measured needs no phases"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("phases.thinking.stepz=1", "phases.thinking.stepz: no such key; did you mean steps?"),
        ("phases.thinking=3", "phases.thinking: holds 3, where keys are expected"),
        ("phases=[1]", "phases: holds [1], where keys are expected"),
        ("phases.thinking.steps=0", "phases.thinking: steps must be at least 1"),
        ("phases.thinking.sampler=0", "phases.thinking: sampler and others are both 0"),
        ("phases.thinking.pick=2", "phases.thinking: the sampler alone chooses no frames"),
        ("phases.observing.sampler=-1", "phases.observing: sampler must be at least 0"),
        ("phases.observing.pick=33", "phases.observing.pick: is 33, of 32 candidates"),
        ("phases.observing.steps=null", "phases.observing.steps: is missing: only the last"),
        ("phases.answering={steps: 20}", "phases.answering.steps: the last phase takes what is"),
        ("phases.answring={others: 1}", "phases.answering.steps: is missing: only the last phase"),
        ("steps=30", "steps: 30 leave none for phase answering, as those before it take 30"),
        ("optimiser.warmup=10", "optimiser.warmup: 10 steps are all of phase thinking"),
        ("optimiser.sampler_share=0.1", "optimiser.sampler_share: each of phases says this"),
        ("losses.evidence=0", "phases.thinking.others: is 0, so that evidence alone"),
        ("losses={answer: 0, choice: 0, evidence: 1}", "phases.observing.sampler: is 0, and"),
        ("losses={answer: 0, choice: 0, matching: 1}", "phases: pretraining has none"),
        ("model.frame_choice=uniform", "phases.thinking: model.frame_choice uniform leaves the"),
    ],
)
def test_phases_that_make_no_sense_are_refused(file: Path, override: str, told: str) -> None:
    file.write_text(BASE + PHASES)
    with pytest.raises(UserError) as error:
        read_config(file, [override])
    assert f": {told}" in str(error.value) and "\n" not in str(error.value)


def test_missing_keys_and_files_are_named(file: Path, tmp_path: Path) -> None:
    file.write_text("out: x\nencoder: y\n")
    with pytest.raises(UserError, match=r"data\.dataset: is missing: add it, or give data\.data"):
        read_config(file)
    file.write_text("")
    with pytest.raises(UserError, match="holds no keys"):
        read_config(file)
    with pytest.raises(UserError, match=r"no\.yaml: no such file, and no recipe of that name"):
        read_config(tmp_path / "no.yaml")


def test_schedules_begin_and_end_where_they_say() -> None:
    linear, cosine = Schedule(1.0, 0.2), Schedule(1.0, 0.2, 11, "cosine")
    assert [linear.at(step, 5) for step in (0, 2, 4)] == pytest.approx([1.0, 0.6, 0.2])
    assert [cosine.at(step, 99) for step in (0, 5, 10, 50)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert cosine.at(2, 99) > 1.0 - 0.8 * 2 / 10


def test_the_learning_rate_warms_up_and_falls() -> None:
    optimiser = OptimiserConfig(warmup=4, final_share=0.1)
    shares = [optimiser.share(step, 21) for step in range(21)]
    assert shares[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert shares[12] == pytest.approx(0.55)
    assert shares[20] == pytest.approx(0.1)
    assert shares[4:] == sorted(shares[4:], reverse=True)
