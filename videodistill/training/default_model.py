"""The bundled model, made from nothing: data, encoder, features, head, measurements, card.

Every stage leaves its result in the work folder and is skipped when it is there already, made by
the same settings; so a run that was stopped goes on with the stage that it was in. (Only the model
without video is trained each time: it is quick.)
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from videodistill.data.files import clear_errors, write_whole
from videodistill.data.procedural.make import Split as DataSplit
from videodistill.data.procedural.make import make_dataset
from videodistill.data.procedural.questions import ANSWERS, CHOICES
from videodistill.data.procedural.read import load_questions
from videodistill.data.procedural.world import DATA_VERSION
from videodistill.encoders import ImageTextEncoder, load_encoder
from videodistill.errors import UserError
from videodistill.evaluation.blind import question_only
from videodistill.evaluation.priors import priors
from videodistill.model import VideoDistill
from videodistill.processes import map_in_processes
from videodistill.training.card import model_card
from videodistill.training.clip import ClipRecipe, train_clip
from videodistill.training.features import extract
from videodistill.training.head import (
    HeadRecipe,
    Split,
    blanked,
    evaluate,
    prepare,
    shuffled,
    train_head,
)


@dataclass(frozen=True)
class DefaultRecipe:
    """What the bundled model is made of."""

    seed: int = 3
    """Of the videos."""
    videos: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {
            # split: (videos, frames of each). Settings are chosen on "val", never on "test".
            "train": (6000, 64),
            "train-long": (500, 256),
            "val": (250, 64),
            "val-256": (100, 256),
            "test": (250, 64),
            "test-256": (200, 256),
            "test-1024": (100, 1024),
        }
    )
    candidates: dict[str, int] = field(
        # Frames that features are made of; 64 where nothing is said, as in the model's settings.
        default_factory=lambda: {"train-long": 256, "val-256": 256, "test-256": 256}
    )
    clip: ClipRecipe = field(default_factory=ClipRecipe)
    head: HeadRecipe = field(
        default_factory=lambda: HeadRecipe(
            thinking_steps=2000, observing=((5000, 1), (200, 3)), steps=500, learning_rate=2e-3
        )
    )
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "width": 128,
            "heads": 8,
            "sampler_blocks": 2,
            "time_prior": 0.0,  # the bundled model is older than it
            "refiner_blocks": 3,
            "merge": 2,
            "sampling": "gumbel",
            "sigma": 0.25,
            "frames": 64,
            "pick": 4,
        }
    )


_HEAD_FILES = ("config.json", "model.safetensors")

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "videodistill": ({}, {}),
    "uniform": ({"frame_choice": "uniform"}, {"evidence_weight": 0.0}),
    "unsupervised": ({}, {"evidence_weight": 0.0}),
}
"""The bundled model and what it is compared with: changes to model settings and head recipe."""


def train_default(
    work: Path,
    out: Path,
    *,
    recipe: DefaultRecipe | None = None,
    controls: bool = False,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make the bundled model, or what is missing of it.

    Args:
        work: For data, features and measurements: some gigabytes.
        out: The checkpoint's folder, with the encoder inside.
        recipe: The bundled model's when None.
        controls: Train and measure the controls of :data:`ARMS`, too.
        workers: Processes that make videos and features; arms trained at once.
        log: Called with lines of progress.

    Returns:
        What ``training.json`` in ``out`` holds: settings, seconds and measurements.

    Raises:
        UserError: A folder cannot be written, ``work`` holds other data, or a process was killed.
    """
    recipe = recipe or DefaultRecipe()
    if workers < 1:
        raise UserError(f"workers {workers}: use at least 1")
    for folder in (work, out):
        _check_writable(folder)
    try:
        with clear_errors(work):
            return _run_stages(recipe, work, out, controls, workers, log)
    except SafetensorError as error:  # safetensors tells of a full disk this way
        raise UserError(
            f"{work}: {error}; free some space and run the same command again, it goes on where "
            "it stopped"
        ) from error


def _check_writable(folder: Path) -> None:
    """Find out now, not after an hour of work; leaves nothing behind."""
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        # Asking for permission bits lies for root and on read-only mounts.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{folder}: cannot be written ({reason}); choose another folder") from error


def _run_stages(
    recipe: DefaultRecipe,
    work: Path,
    out: Path,
    controls: bool,
    workers: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    log("stage 1 of 5: videos")
    _timed(work, "data", lambda: _make_data(recipe, work, workers))

    log("stage 2 of 5: encoder")
    encoder_folder = work / "encoder"
    if _read(encoder_folder / "training.json").get("recipe") != asdict(recipe.clip):
        train_clip(recipe.clip, encoder_folder, workers=workers, log=log)

    log("stage 3 of 5: features")
    _timed(
        work,
        "features",
        lambda: [_split(recipe, work, name, workers, log) for name in recipe.videos],
    )

    arms = [name for name in ARMS if name == "videodistill" or controls]
    jobs = [(recipe, work, name) for name in arms if not _is_done(recipe, work, name)]
    log("stage 4 of 5: head")
    if len(jobs) == 1:
        _train_arm(jobs[0], torch.get_num_threads(), log)
    elif jobs:
        log(f"progress of each arm is in {work / 'arms'}/*/log.txt")
        workers = min(workers, len(jobs))
        with map_in_processes(_train_arm, jobs, workers, torch.set_num_threads, 1) as trained:
            for (*_, name), _ in zip(jobs, trained, strict=True):
                log(f"{name} is trained and measured")

    log("stage 5 of 5: answering without the video")
    _timed(work, "blind", lambda: _measure_blind(recipe, work))
    record = _collect(recipe, work)
    _publish(work, out, record)
    return record


def _make_data(recipe: DefaultRecipe, work: Path, workers: int) -> None:
    """Make the videos. Features of other videos go: they are known by names, which are the same."""
    splits = {
        name: DataSplit(videos, (frames, frames))
        for name, (videos, frames) in recipe.videos.items()
    }
    made = make_dataset(work / "data", splits, seed=recipe.seed, workers=workers)
    before = _read(work / "checksums.json")
    checksums = {name: made["splits"][name]["sha256"]["videos"] for name in splits}
    for name, checksum in checksums.items():
        if before.get(name, checksum) != checksum:
            _features_file(work, name).unlink(missing_ok=True)
    _write(work / "checksums.json", before | checksums)


def _features_file(work: Path, split: str) -> Path:
    return work / "features" / f"{split}.safetensors"


def _split(
    recipe: DefaultRecipe,
    work: Path,
    name: str,
    workers: int,
    log: Callable[[str], None] | None = None,
) -> Split:
    """A split ready for training or evaluation; its features are computed when not yet there."""
    questions = load_questions(work / "data", name)
    encoder = load_encoder(work / "encoder")
    features = extract(
        work / "data" / "videos" / name,
        sorted({question.video for question in questions}),
        work / "encoder",
        recipe.candidates.get(name, recipe.model["frames"]),
        _features_file(work, name),
        workers=workers,
        log=log,
    )
    return prepare(questions, features, encoder, ANSWERS, CHOICES)


def _arm(recipe: DefaultRecipe, name: str) -> DefaultRecipe:
    """The recipe with an arm's changes in it."""
    settings, changes = ARMS[name]
    return replace(recipe, model=recipe.model | settings, head=replace(recipe.head, **changes))


def _train_arm(
    job: tuple[DefaultRecipe, Path, str],
    threads: int = 1,
    log: Callable[[str], None] | None = None,
) -> None:
    """Train and measure one arm; record.json is written last and says that it is done."""
    recipe, work, name = job
    torch.set_num_threads(threads)
    arm = _arm(recipe, name)
    folder = work / "arms" / name
    folder.mkdir(parents=True, exist_ok=True)
    # An older record must not speak for the weights that come now.
    (folder / "record.json").unlink(missing_ok=True)
    began = time.perf_counter()
    encoder = load_encoder(work / "encoder")
    choice_embed = encoder.encode_texts(list(CHOICES)).text_embed
    torch.manual_seed(arm.head.seed)
    model = VideoDistill.for_encoder(encoder, answers=list(ANSWERS), **arm.model)
    model.config.encoder = "encoder"
    train = [_split(arm, work, split, 1) for split in arm.videos if split.startswith("train")]
    with (folder / "log.txt").open("w", encoding="utf-8") as lines:

        def say(line: str) -> None:
            print(line, file=lines, flush=True)
            if log:
                log(line)

        train_head(model, train, arm.head, choice_embed, log=say)
    seconds = round(time.perf_counter() - began)
    model.save_pretrained(folder)
    results = _measure(arm, work, model, encoder, choice_embed)
    record = {
        "settings": _settings(arm),
        "encoder": encoder.fingerprint,
        "seconds": seconds,
        "results": results,
    }
    _write(folder / "record.json", record)


def _measure(
    recipe: DefaultRecipe,
    work: Path,
    model: VideoDistill,
    encoder: ImageTextEncoder,
    choice_embed: torch.Tensor,
) -> dict[str, Any]:
    results = {}
    for name in recipe.videos:
        if name.startswith("train"):
            continue
        split = _split(recipe, work, name, 1)
        results[name] = evaluate(model, split, choice_embed)
        for pick in {4, 8} - {model.config.pick}:
            results[f"{name}, K={pick}"] = evaluate(model, split, choice_embed, pick=pick)
        if name == "test":
            results["blank video"] = evaluate(model, blanked(split, encoder), choice_embed)
            results["shuffled video"] = evaluate(model, shuffled(split), choice_embed)
            learned, model.config.frame_choice = model.config.frame_choice, "uniform"
            results["uniform frames"] = evaluate(model, split, choice_embed)
            model.config.frame_choice = learned
    return results


def _measure_blind(recipe: DefaultRecipe, work: Path) -> None:
    train, test = (load_questions(work / "data", split) for split in ("train", "test"))
    record = {"question_only": question_only(train, test), "priors": priors(train, test)}
    _write(work / "blind.json", record)


def _settings(recipe: DefaultRecipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(recipe) | {"data_version": DATA_VERSION}))


def _is_done(recipe: DefaultRecipe, work: Path, name: str) -> bool:
    record = _read(work / "arms" / name / "record.json")
    settings, encoder = _settings(_arm(recipe, name)), load_encoder(work / "encoder").fingerprint
    return record.get("settings") == settings and record.get("encoder") == encoder


def _collect(recipe: DefaultRecipe, work: Path) -> dict[str, Any]:
    arms = {name: _read(work / "arms" / name / "record.json") for name in ARMS}
    encoder = _read(work / "encoder" / "training.json")["measured"]
    return {
        "settings": _settings(recipe),
        "encoder": encoder,
        "seconds": _read(work / "seconds.json") | {"clip": encoder["seconds"]},
        "arms": {
            name: {"seconds": record["seconds"], "results": record["results"]}
            for name, record in arms.items()
            if _is_done(recipe, work, name)
        },
        "blind": _read(work / "blind.json"),
    }


def _publish(work: Path, out: Path, record: dict[str, Any]) -> None:
    """Put the checkpoint, its encoder and its card where they are used, each file whole."""
    files = {name: work / "arms" / "videodistill" / name for name in _HEAD_FILES}
    files |= {f"encoder/{file.name}": file for file in sorted((work / "encoder").iterdir())}
    (out / "encoder").mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        write_whole(out / name, source.read_bytes())
    _write(out / "training.json", record)
    write_whole(out / "README.md", model_card(record))


def _timed(work: Path, stage: str, run: Callable[[], Any]) -> None:
    """Run a stage and keep how long it took, unless an earlier run of it took longer.

    A stage that finds its work done takes no time; what is kept is the time that it took to do.
    """
    began = time.perf_counter()
    run()
    seconds = _read(work / "seconds.json")
    seconds[stage] = max(seconds.get(stage, 0), round(time.perf_counter() - began))
    _write(work / "seconds.json", seconds)


def _read(path: Path) -> dict[str, Any]:
    """What a record holds. One that is missing or damaged holds nothing: its stage runs again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _write(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")
