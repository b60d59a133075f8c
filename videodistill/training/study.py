"""Does language-awareness help? Arms that differ in one thing, trained and measured alike.

All arms get the same features of the bundled encoder, the same biased training videos, as many
steps, about as many parameters and as many tuning runs: one short training with each of the
learning rates, judged on "val". The test splits are opened when every arm is trained. Each stage
leaves its result in a file that names all settings it came from, so a study that was stopped goes
on, and an arm whose settings changed is run anew.

Arms that are *guided* learn from the generator's evidence in phases, as the bundled model does. The
others see no evidence and spend the same number of steps on answering alone, so that what their
samplers learn comes through the choice of frames.

The size is chosen for 8 hours of 2 cores. Timed on a machine with AMX, both cores busy, a training
takes 10.5 minutes of one core in a guided arm and 12.6 with uniform frames; of 30 steps alone it
was estimated to take 4 with the mean of all, and half as long again as with uniform frames in the
other arms: some 190 for one seed of all arms. Three seeds and the tuning, which is as long as one,
make 760 minutes of one core; testing 39 models at 1 to 2 minutes makes 70; videos, features and
their reading take some 40. That is 870 minutes, a good 7 hours of two cores. A processor without
instructions for bfloat16 takes twice as long: 22 minutes for a guided training.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from videodistill.data.files import clear_errors, write_whole
from videodistill.data.procedural.make import Split as DataSplit
from videodistill.data.procedural.make import make_dataset
from videodistill.data.procedural.questions import ANSWERS, CHOICES
from videodistill.data.procedural.read import load_questions
from videodistill.data.procedural.world import DATA_VERSION
from videodistill.encoders import ImageTextEncoder, load_encoder
from videodistill.engine.checks import ASSETS, check_precision
from videodistill.errors import UserError
from videodistill.evaluation.blind import question_only
from videodistill.evaluation.predict import stretch_around_best
from videodistill.evaluation.predictions import Prediction
from videodistill.evaluation.scoring import score
from videodistill.model import VideoDistill
from videodistill.precision import cpu_product_dtype
from videodistill.processes import map_in_processes
from videodistill.training.features import extract
from videodistill.training.head import (
    HeadRecipe,
    Split,
    blanked,
    evaluate,
    look,
    prepare,
    shuffled,
    train_head,
)
from videodistill.training.study_report import write_report

ENCODER = ASSETS / "default" / "encoder"


@dataclass(frozen=True)
class Arm:
    """A model that is compared with the others."""

    title: str
    about: str
    """What it is, in a line."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to the model's settings."""
    guided: bool = True
    """Whether it learns from ground-truth evidence."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": self.model, "guided": self.guided}

    def head(self, whole: HeadRecipe) -> HeadRecipe:
        """A recipe as this arm follows it: without guide all its steps are in one phase."""
        if self.guided:
            return whole
        steps = whole.thinking_steps + sum(steps for steps, _ in whole.observing) + whole.steps
        return replace(whole, thinking_steps=0, observing=(), steps=steps, evidence_weight=0.0)


ARMS = {
    "videodistill": Arm("VideoDistill", "scalar gates, frames drawn by Gumbel top-k, guided"),
    "cross-attention": Arm(
        "cross-attention",
        "cross-attention to the question's tokens in place of the gates, so that all patches count "
        "alike when they are pooled",
        {"mixing": "cross_attention"},
    ),
    "channel-gate": Arm(
        "channel gate",
        "one gate for each channel; its feed-forward is smaller by as much as its gates are larger",
        {"gate": "channel", "ffn_ratio": 3},
    ),
    "soft": Arm(
        "MIST-style selector",
        "K soft Gumbel-softmax draws with replacement in place of the choice",
        {"sampling": "soft"},
    ),
    "uniform": Arm(
        "uniform frames",
        "frames at even distances in place of the sampler",
        {"frame_choice": "uniform"},
        guided=False,
    ),
    "cross-attention-uniform": Arm(
        "cross-attention, uniform frames",
        "neither the gates nor the sampler: what language-awareness is to be better than",
        {"mixing": "cross_attention", "frame_choice": "uniform"},
        guided=False,
    ),
    "mean": Arm(
        "mean pooling",
        "the mean of all candidates in place of the sampler",
        {"frame_choice": "mean"},
        guided=False,
    ),
    "exact": Arm(
        "perturbed, exact gradient",
        "not guided; the whole vector-Jacobian product of perturbed top-k",
        {"sampling": "perturbed"},
        guided=False,
    ),
    "diagonal": Arm(
        "perturbed, published gradient",
        "not guided; the Jacobian's diagonal alone, as published code has it",
        {"sampling": "perturbed", "gradient": "diagonal"},
        guided=False,
    ),
    "gumbel": Arm(
        "Gumbel top-k",
        "not guided; one draw without replacement, gradient of successive softmaxes",
        {"sampling": "gumbel"},
        guided=False,
    ),
    "lapsum": Arm(
        "LapSum",
        "not guided; a deterministic soft set of size K",
        {"sampling": "lapsum"},
        guided=False,
    ),
    "soft-unguided": Arm(
        "soft draws, not guided",
        "not guided; the MIST-style selector",
        {"sampling": "soft"},
        guided=False,
    ),
    "no-gradient": Arm(
        "no gradient through the choice",
        "not guided; the K best, through whose scores the gates of frames alone send gradients",
        {"sampling": "hard"},
        guided=False,
    ),
}
"""By name, in the order of the tables."""


@dataclass(frozen=True)
class StudyRecipe:
    """What all arms have in common."""

    data_seed: int = 23
    bias: float = 0.5
    """Of all videos but those of "test-reversed", where the opposite rule holds as often."""
    videos: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {
            # split: (videos, frames of each)
            "train": (3000, 64),
            "train-long": (250, 256),
            "val": (150, 64),
            "test": (250, 64),
            "test-reversed": (250, 64),
            "test-long": (50, 1024),
        }
    )
    candidates: dict[str, int] = field(
        # Frames that features are made of; the model's ``frames`` where nothing is said.
        default_factory=lambda: {"train-long": 256, "test-long": 1024}
    )
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "width": 128,
            "heads": 8,
            "sampler_blocks": 2,
            "time_prior": 3.0,
            "refiner_blocks": 3,
            "merge": 2,
            "sampling": "gumbel",
            "sigma": 0.25,
            "frames": 64,
            "pick": 4,
        }
    )
    head: HeadRecipe = field(
        default_factory=lambda: HeadRecipe(
            thinking_steps=1200, observing=((1000, 1), (130, 3)), steps=270
        )
    )
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates that each arm is tuned over."""
    tuning_share: float = 1 / 3
    """Length of a tuning run as a share of a training."""
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    picks: tuple[int, ...] = (1, 2, 4, 8, 16)
    """K that trained models are measured at, on "test"."""
    offered: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """N that they are measured at, on "test-long"."""


def run_study(
    work: Path,
    out: Path,
    *,
    recipe: StudyRecipe | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    precision: str | None = None,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> list[Path]:
    """Run the study, or what is missing of it, and write its report.

    Args:
        work: For data, features and checkpoints: some gigabytes.
        out: Gets ``study/<arm>-<seed>.json`` for each trained model, ``study.md`` and its plots.
        recipe: What the arms have in common; the study's own when None.
        arms: Names in :data:`ARMS`; all when None.
        seeds: Those of the recipe when None.
        precision: "fp32" or "bf16", of trainings' matrix products; the recipe's when None, which
            leaves it to the processor.
        workers: Processes of one thread each.
        log: Called with lines of progress.

    Returns:
        The files of the report.

    Raises:
        UserError: An arm or the precision is unknown, a folder cannot be written, or ``work`` holds
            other data.
    """
    recipe = recipe or StudyRecipe()
    if precision is not None:
        bf16 = check_precision(precision) == "bf16"
        recipe = replace(recipe, head=replace(recipe.head, bf16=bf16))
    arms = list(ARMS if arms is None else dict.fromkeys(arms))
    unknown = [name for name in arms if name not in ARMS]
    if unknown:
        raise UserError(f"arm {unknown[0]!r} is not known: use some of {', '.join(ARMS)}")
    seeds = list(recipe.seeds if seeds is None else dict.fromkeys(seeds))
    if not arms or not seeds:
        raise UserError("the study needs at least one arm and one seed")
    if workers < 1:
        raise UserError(f"workers {workers}: use at least 1")
    try:
        with clear_errors(work):
            _run_stages(recipe, work, out, arms, seeds, workers, log)
    except SafetensorError as error:  # safetensors tells of a full disk this way
        raise UserError(
            f"{work}: {error}; free some space and run the same command again, it goes on where "
            "it stopped"
        ) from error
    return write_report(out, recipe=recipe, arms=ARMS)


def _run_stages(
    recipe: StudyRecipe,
    work: Path,
    out: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    log: Callable[[str], None],
) -> None:
    for folder in (work, out / "study"):  # whether they can be written is to be known now
        folder.mkdir(parents=True, exist_ok=True)
    log("stage 1 of 6: videos")
    _make_data(recipe, work, workers)
    log("stage 2 of 6: features")
    for name in recipe.videos:
        _split(recipe, work, name, workers, log)
    log(f"stage 3 of 6: tuning; progress of each run is in {work / 'runs'}/*.log")
    tuning = [run for arm in arms for run in _tuning_runs(recipe, arm)]
    _train_all(tuning, work, workers, log)
    log("stage 4 of 6: training")
    trained = [
        _Run(recipe, arm, seed, _best_rate(recipe, arm, work)) for arm in arms for seed in seeds
    ]
    _train_all(trained, work, workers, log)
    log("stage 5 of 6: testing")
    _test_all(trained, work, out, workers, log)
    log("stage 6 of 6: answering without the video, report")
    _answer_blindly(recipe, work, out)


@dataclass(frozen=True)
class _Run:
    """A training, and all that decides its outcome."""

    recipe: StudyRecipe
    arm: str
    seed: int
    rate: float
    share: float = 1.0
    """Of the recipe's steps."""

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON gives it back. What decides tests alone is not in it.

        Of the recipe's phases there is what the arm makes of them: those of guided arms are
        nothing to the others, as long as all take as many steps. Of the precision there is what
        it comes to, whoever decided it.
        """
        study = asdict(self.recipe)
        for name in ("picks", "offered", "seeds", "head"):
            del study[name]
        products = cpu_product_dtype(self.recipe.head.bf16)
        return _as_json(
            {
                "study": study | {"data_version": DATA_VERSION, "encoder": _fingerprint()},
                "arm": ARMS[self.arm].settings,
                "head": self.head.schedule(),
                "seed": self.seed,
                "rate": self.rate,
                "share": self.share,
                "products": str(products).removeprefix("torch."),
            }
        )

    @property
    def name(self) -> str:
        """Of its files: the arm, and a hash of the settings."""
        return f"{self.arm}-{_hash(self.settings)}"

    @property
    def head(self) -> HeadRecipe:
        """The recipe's, shortened by ``share``, as the arm follows it."""
        whole = self.recipe.head

        def part(steps: int) -> int:
            return max(1, round(self.share * steps)) if steps else 0

        return ARMS[self.arm].head(
            replace(
                whole,
                thinking_steps=part(whole.thinking_steps),
                observing=tuple((part(steps), pick) for steps, pick in whole.observing),
                steps=part(whole.steps),
                learning_rate=self.rate,
                seed=self.seed,
            )
        )


def _make_data(recipe: StudyRecipe, work: Path, workers: int) -> None:
    splits = {
        name: DataSplit(
            count, (frames, frames), bias=recipe.bias, reverse_bias=name.endswith("-reversed")
        )
        for name, (count, frames) in recipe.videos.items()
    }
    make_dataset(work / "data", splits, seed=recipe.data_seed, workers=workers)


def _split(
    recipe: StudyRecipe,
    work: Path,
    name: str,
    workers: int = 1,
    log: Callable[[str], None] | None = None,
) -> Split:
    """A split ready for training or evaluation; its features are computed when not yet there."""
    questions = load_questions(work / "data", name)
    features = extract(
        work / "data" / "videos" / name,
        sorted({question.video for question in questions}),
        ENCODER,
        recipe.candidates.get(name, recipe.model["frames"]),
        # With the videos they are of: other videos have the same names.
        work / "data" / "features" / f"{name}.safetensors",
        workers=workers,
        log=log,
    )
    return prepare(questions, features, _encoder(), ANSWERS, CHOICES)


def _train_all(runs: Sequence[_Run], work: Path, workers: int, log: Callable[[str], None]) -> None:
    """Train those that are not trained yet, each in a process of one thread."""
    left = [run for run in runs if not _record(work, run)]
    done = len(runs) - len(left)
    jobs = [(run, work) for run in left]
    with map_in_processes(
        _train, jobs, min(workers, max(1, len(jobs))), torch.set_num_threads, 1
    ) as records:
        for run, record in zip(left, records, strict=True):
            done += 1
            log(
                f"{done}/{len(runs)}  {run.arm}, seed {run.seed}, rate {run.rate:g}: "
                f"{record['val']['all']['accuracy']:.1f}% of val, {record['seconds']} s"
            )


def _train(job: tuple[_Run, Path]) -> dict[str, Any]:
    """Train one model and measure it on "val"; its record is written last: it is done then."""
    run, work = job
    recipe, folder = run.recipe, work / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    encoder, choice_embed = _encoder(), _choice_embed()
    torch.manual_seed(run.seed)
    settings = recipe.model | ARMS[run.arm].model
    model = VideoDistill.for_encoder(encoder, answers=list(ANSWERS), **settings)
    splits = [_split(recipe, work, name) for name in recipe.videos if name.startswith("train")]
    began = time.process_time()
    with (folder / f"{run.name}.log").open("w", encoding="utf-8") as lines:
        train_head(
            model,
            splits,
            run.head,
            choice_embed,
            log=lambda line: print(line, file=lines, flush=True),
        )
    seconds = round(time.process_time() - began, 1)
    record = {
        "settings": run.settings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "val": evaluate(model, _split(recipe, work, "val"), choice_embed),
    }
    if run.share == 1:  # nobody tests a tuning run
        model.save_pretrained(folder / run.name)
    _write(folder / f"{run.name}.json", record)
    return record


def _record(work: Path, run: _Run) -> dict[str, Any]:
    """What is known of a training; nothing before it is done."""
    record = _read(work / "runs" / f"{run.name}.json")
    return record if record.get("settings") == run.settings else {}


def _tuning_runs(recipe: StudyRecipe, arm: str) -> list[_Run]:
    return [
        _Run(recipe, arm, recipe.tuning_seed, rate, recipe.tuning_share) for rate in recipe.rates
    ]


def _best_rate(recipe: StudyRecipe, arm: str, work: Path) -> float:
    """The learning rate whose tuning run was best on "val"; the smallest of equally good ones."""
    tuned = _tuning(recipe, arm, work)
    return max(sorted(tuned), key=tuned.__getitem__)


def _tuning(recipe: StudyRecipe, arm: str, work: Path) -> dict[float, float]:
    """Percent of "val" right by learning rate."""
    return {
        run.rate: _record(work, run)["val"]["all"]["accuracy"] for run in _tuning_runs(recipe, arm)
    }


def _test_all(
    runs: Sequence[_Run], work: Path, out: Path, workers: int, log: Callable[[str], None]
) -> None:
    """Open the test splits: measure every trained model that has no such record yet."""
    left = [run for run in runs if _read(_result_file(out, run)).get("key") != _test_key(run)]
    jobs = [(run, work, out) for run in left]
    with map_in_processes(
        _test, jobs, min(workers, max(1, len(jobs))), torch.set_num_threads, 1
    ) as tested:
        for run, accuracy in zip(left, tested, strict=True):
            log(f"{run.arm}, seed {run.seed}: {accuracy:.1f}% of test")


def _result_file(out: Path, run: _Run) -> Path:
    return out / "study" / f"{run.arm}-{run.seed}.json"


def _test_key(run: _Run) -> str:
    """Of what was trained and of what is asked of it."""
    return _hash(
        _as_json([run.settings, {"picks": run.recipe.picks, "offered": run.recipe.offered}])
    )


def _test(job: tuple[_Run, Path, Path]) -> float:
    """Measure a trained model on the test splits and write its result."""
    run, work, out = job
    recipe, known = run.recipe, _record(work, run)
    model = VideoDistill.from_pretrained(work / "runs" / run.name).eval()
    began = time.process_time()
    results = _measure(recipe, work, model)
    tuning = [_record(work, tuned) for tuned in _tuning_runs(recipe, run.arm)]
    _write(
        _result_file(out, run),
        {
            "key": _test_key(run),
            "arm": run.arm,
            "seed": run.seed,
            "settings": run.settings,
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "parameters": known["parameters"],
            "tuning": _tuning(recipe, run.arm, work),
            "seconds": {
                "tuning": round(sum(record["seconds"] for record in tuning), 1),
                "training": known["seconds"],
                "testing": round(time.process_time() - began, 1),
            },
            "val": known["val"]["all"],
            "results": results,
        },
    )
    return results["test"]["all"]["accuracy"]


def _measure(recipe: StudyRecipe, work: Path, model: VideoDistill) -> dict[str, Any]:
    """All that is asked of a trained model, by what it is shown."""
    encoder, choice_embed = _encoder(), _choice_embed()
    run = partial(evaluate, model, choice_embed=choice_embed)
    test = _split(recipe, work, "test")
    results: dict[str, Any] = {
        "test": run(test),
        "test-reversed": run(_split(recipe, work, "test-reversed")),
        "blank": run(blanked(test, encoder)),
        "shuffled": run(shuffled(test)),
        "grounding": grounding(model, test, choice_embed),
    }
    for pick in recipe.picks:
        results[f"K={pick}"] = run(test, pick=pick)["all"]
    del test
    long = _split(recipe, work, "test-long")
    total = long.features.seconds.shape[1]
    for count in recipe.offered:
        frames = ((torch.arange(count) + 0.5) * total / count).long()
        # A choice of frames for all questions of many long videos at once is a lot of memory.
        batch = max(1, 512 // count)
        results[f"N={count}"] = run(long, frames=frames, videos_per_batch=batch)["all"]
    return results


@torch.no_grad()
def grounding(model: VideoDistill, split: Split, choice_embed: Tensor) -> dict[str, float]:
    """NExT-GQA's scores of where a model looked, in percent: mIoP, mIoU, Acc@GQA.

    What is predicted is :func:`stretch_around_best`, and the answer among the choices.
    """
    model.eval()
    predictions = {}
    for rows in split.in_batches(8):
        output = look(model, split, rows)
        options = choice_embed[split.choices[rows]]
        chosen = model.choice_logits(output.answer_embed, options).argmax(-1).tolist()
        for row, choice, scores in zip(rows.tolist(), chosen, output.scores, strict=True):
            video = split.video[row]
            stretch = stretch_around_best(
                scores, split.features.seconds[video], float(split.features.durations[video])
            )
            predictions[split.questions[row].question_id] = Prediction(choice, stretch)
    metrics = score("nextgqa", split.questions, predictions).metrics
    return {name: round(metrics[name].percent, 2) for name in ("mIoP", "mIoU", "Acc@GQA")}


def _answer_blindly(recipe: StudyRecipe, work: Path, out: Path) -> None:
    """What the words of the questions give away, in distribution and with the prior reversed."""
    path = out / "study" / "question-only.json"
    settings = _as_json(
        {
            "seed": recipe.data_seed,
            "bias": recipe.bias,
            "videos": recipe.videos,
            "data_version": DATA_VERSION,
        }
    )
    if _read(path).get("settings") == settings:
        return
    train = load_questions(work / "data", "train")
    results = {
        name: question_only(train, load_questions(work / "data", name))
        for name in ("test", "test-reversed")
    }
    _write(path, {"settings": settings, "results": results})


@cache
def _encoder() -> ImageTextEncoder:
    return load_encoder(ENCODER)


@cache
def _choice_embed() -> Tensor:
    return _encoder().encode_texts(list(CHOICES)).text_embed


def _fingerprint() -> str:
    config = json.loads((ENCODER.parent / "config.json").read_text(encoding="utf-8"))
    return config["encoder_fingerprint"]


def _commit() -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "not known"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _read(path: Path) -> dict[str, Any]:
    """What a record holds. One that is missing or damaged holds nothing: its stage runs again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1) + "\n")
