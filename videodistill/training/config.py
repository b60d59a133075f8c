"""What a training run is told: a YAML file, and overrides of single keys from the command line."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from videodistill.data.datasets import get_dataset
from videodistill.data.files import read_text
from videodistill.errors import UserError
from videodistill.model import VideoDistillConfig

RECIPES = Path(__file__).resolve().parent / "recipes"

_OF_THE_ENCODER = {
    *("embed_dim", "patch_dim", "token_dim", "patch_grid", "logit_scale"),
    *("encoder", "encoder_fingerprint", "answers"),
}
"""Fields of the model that follow from encoder and data, and so are no settings."""


def model_settings() -> dict[str, Any]:
    """The fields of VideoDistillConfig that a run may set, with their types."""
    hints = typing.get_type_hints(VideoDistillConfig)
    return {name: hint for name, hint in hints.items() if name not in _OF_THE_ENCODER}


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(config, name)}")


@dataclass(frozen=True)
class DataConfig:
    """Questions, and features of their videos."""

    dataset: str
    """A name that `videodistill data check` knows."""
    path: str
    """Folder of its annotations."""
    features: str
    """Folder of the feature cache of its videos."""
    train: str | None = "train"
    """Split that is learnt from; None where there is none (with ``steps: 0``)."""
    val: str | None = "val"
    """Split that the best checkpoint is chosen on; None for none."""
    holdout: float = 0.0
    """Where ``val`` is None: share of the training videos that is kept for validation."""
    vocabulary: int | None = None
    """How many of the commonest training answers the classifier knows; None: as the dataset is
    scored, which may be all of them. Questions with choices need no classifier."""
    answers: str | None = None
    """Text file with the classifier's answers instead, one per line."""
    workers: int = 2
    """Processes that load features in advance; 0 loads in between the steps."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "workers")
        if self.vocabulary is not None:
            _at_least(self, 1, "vocabulary")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and below 1, not {self.holdout}")
        if self.holdout and self.val is not None:
            raise ValueError("holdout goes with val: null, as the split is there to validate on")
        if self.vocabulary is not None and self.answers is not None:
            raise ValueError("vocabulary and answers both name the answers: set one to null")
        get_dataset(self.dataset)


@dataclass(frozen=True)
class BatchConfig:
    """What one step of the optimiser learns from, over all processes."""

    videos: int = 16
    questions: int = 4
    """At most, about each of the videos; these share its features."""
    accumulate: int = 1
    """Parts that a process works through one after the other, for the sake of memory."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "videos", "questions", "accumulate")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; 0 leaves one out."""

    answer: float = 1.0
    """Cross-entropy of the classifier, over questions whose answer it knows."""
    choice: float = 1.0
    """Cross-entropy between the choices' cosines, over questions with choices."""
    evidence: float = 0.0
    """Cross-entropy of frame scores with annotated evidence, over questions that have any."""
    matching: float = 0.0
    """Pretraining: does the text belong to the video?"""
    masked_language: float = 0.0
    """Pretraining: masked words of the text, guided by vision."""
    contrastive: float = 0.0
    """Pretraining: the text among all texts of the batch."""
    masked_share: float = 0.3
    """Share of a text's tokens that are masked."""

    def __post_init__(self) -> None:
        _at_least(self, 0, *(field.name for field in fields(self)))
        if not 0 < self.masked_share <= 1:
            raise ValueError(f"masked_share must be above 0, at most 1, not {self.masked_share}")
        if not any((self.answer, self.choice, self.evidence, *self.pretraining.values())):
            raise ValueError("all weights are 0: nothing would be learnt")
        pretraining = [name for name, weight in self.pretraining.items() if weight]
        if pretraining and (self.answer or self.choice):
            # The texts of pretraining hold the answers.
            raise ValueError(f"{pretraining[0]} is for pretraining: set answer and choice to 0")

    @property
    def pretraining(self) -> dict[str, float]:
        """The weights of the losses on pairs of video and text."""
        names = ("matching", "masked_language", "contrastive")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Schedule:
    """A number that changes from ``start`` to ``end`` over the first ``steps`` steps."""

    start: float
    end: float
    steps: int | None = None
    """None: all steps of the run."""
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.steps is not None:
            _at_least(self, 1, "steps")

    def at(self, step: int, total: int) -> float:
        """The number at a step of a run of ``total`` steps; both count from 0."""
        steps = total if self.steps is None else self.steps
        done = min(1.0, step / max(1, steps - 1))
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class CurriculumConfig:
    """How the sampler's draw changes in training; null leaves what ``model`` says."""

    sigma: Schedule | None = None
    temperature: Schedule | None = None


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, with a linear warm-up and then a cosine."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    """Of matrices; vectors do not decay."""
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 500
    """Steps."""
    final_share: float = 0.01
    """Of the learning rate, at the last step."""
    sampler_share: float = 1.0
    """Of the learning rate, for the sampler."""
    clip: float = 1.0
    """Largest norm of the gradients, of the sampler and of everything else apart."""

    def __post_init__(self) -> None:
        _at_least(
            self, 0, "learning_rate", "weight_decay", "warmup", "final_share", "sampler_share"
        )
        if self.clip <= 0:
            raise ValueError(f"clip must be above 0, not {self.clip}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, not {self.betas}")

    def share(self, step: int, total: int) -> float:
        """Of the learning rate, at a step of a run of ``total`` steps; both count from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, total - 1 - self.warmup)
        cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return self.final_share + (1 - self.final_share) * cosine


@dataclass(frozen=True)
class ValidationConfig:
    """When the model is measured, and what on."""

    every: int = 1000
    """Steps; the last step is followed by one, too."""
    metric: str = "all"
    """A group of `videodistill score` on this dataset, or "loss"."""
    patience: int | None = None
    """Stop after so many validations in a row without a better one; null never stops early."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every")
        if self.patience is not None:
            _at_least(self, 1, "patience")


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of training in which some parts of the model learn, or learn more slowly.

    It begins with fresh moments, and warm-up and cosine of the learning rate are its own.
    """

    steps: int | None = None
    """Of all phases but the last, which takes what is left of the run's."""
    sampler: float = 1.0
    """Share of the learning rate for the sampler; 0: it rests."""
    others: float = 1.0
    """The same for refiner and answer head. Where they rest the sampler learns from ``evidence``
    alone, without a look at patches."""
    pick: int | None = None
    """Frames that are chosen; None: as many as ``model`` says."""
    evidence_first: bool = False
    """Whether frames of annotated evidence are chosen before all others."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "sampler", "others")
        for name in ("steps", "pick"):
            if getattr(self, name) is not None:
                _at_least(self, 1, name)
        if not (self.sampler or self.others):
            raise ValueError("sampler and others are both 0: nothing would be learnt")
        if not self.others and (self.pick is not None or self.evidence_first):
            raise ValueError("the sampler alone chooses no frames: drop pick and evidence_first")


class Phase(NamedTuple):
    """A phase, and where in the run it is."""

    name: str
    settings: PhaseConfig
    first: int
    """Steps before it."""
    steps: int


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    out: str
    """Folder of the run: checkpoints, logs, the best model."""
    encoder: str
    """Folder or hub id of the CLIP or SigLIP that the features were made with."""
    data: DataConfig
    steps: int = 20000
    """Of the optimiser; 0 only validates, and exports."""
    seed: int = 0
    init: str | None = None
    """Checkpoint to begin with, e.g. a pretrained one; null begins from the encoder alone."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of VideoDistillConfig."""
    batch: BatchConfig = BatchConfig()
    losses: LossConfig = LossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """By name, one after the other; none: all parts learn together all the time."""
    validation: ValidationConfig = ValidationConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward pass instead of keeping what they computed."""
    save_every: int = 500
    """Steps between two checkpoints that a run can go on from."""
    log_every: int = 10
    """Steps between two lines of the log."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "steps", "seed")
        _at_least(self, 1, "save_every", "log_every")
        if self.steps and self.data.train is None:
            raise ValueError("data.train is null: there is nothing to learn from, set steps to 0")
        if self.phases and self.steps:
            self._check_phases()

    def _check_phases(self) -> None:
        """Raise ValueError for phases that do not go together with each other or with the rest."""
        if any(self.losses.pretraining.values()):
            raise ValueError("phases: pretraining has none: drop them")
        if self.optimiser.sampler_share != 1:
            raise ValueError("optimiser.sampler_share: each of phases says this: drop it")
        settings = {name: getattr(VideoDistillConfig, name) for name in ("frames", "frame_choice")}
        settings |= self.model
        last = list(self.phases)[-1]
        for name, phase in self.phases.items():
            where = f"phases.{name}"
            if name == last and phase.steps is not None:
                raise ValueError(f"{where}.steps: the last phase takes what is left: drop it")
            if name != last and phase.steps is None:
                raise ValueError(f"{where}.steps: is missing: only the last phase goes without")
            if not phase.others and not self.losses.evidence:
                raise ValueError(
                    f"{where}.others: is 0, so that evidence alone is learnt from: set "
                    "losses.evidence above 0"
                )
            if not phase.sampler and not (self.losses.answer or self.losses.choice):
                raise ValueError(
                    f"{where}.sampler: is 0, and nothing else learns from evidence: set "
                    "losses.answer or losses.choice above 0"
                )
            if settings["frame_choice"] != "learned" and (phase.evidence_first or not phase.others):
                raise ValueError(
                    f"{where}: model.frame_choice {settings['frame_choice']} leaves the sampler "
                    "out: let others learn, without evidence_first"
                )
            if phase.pick is not None and phase.pick > settings["frames"]:
                raise ValueError(
                    f"{where}.pick: is {phase.pick}, of {settings['frames']} candidates "
                    "(model.frames)"
                )
        before = sum(phase.steps or 0 for phase in self.phases.values())
        if before >= self.steps:
            raise ValueError(
                f"steps: {self.steps} leave none for phase {last}, as those before it take {before}"
            )
        for phase in self.all_phases():
            if phase.steps <= self.optimiser.warmup:
                raise ValueError(
                    f"optimiser.warmup: {self.optimiser.warmup} steps are all of phase "
                    f"{phase.name}, which has {phase.steps}: each phase warms up"
                )

    def all_phases(self) -> list[Phase]:
        """The phases; a run without any is one in which all parts learn."""
        phases = self.phases or {"": PhaseConfig(sampler=self.optimiser.sampler_share)}
        placed, first = [], 0
        for name, settings in phases.items():
            steps = self.steps - first if settings.steps is None else settings.steps
            placed.append(Phase(name, settings, first, steps))
            first += steps
        return placed

    def phase_at(self, step: int) -> Phase:
        """The phase that a step is in, counted from 0."""
        return next(phase for phase in reversed(self.all_phases()) if phase.first <= step)


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def read_config(name: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a file and overrides describe.

    Args:
        name: A YAML file, or the name of a recipe that comes with the package.
        overrides: Each "key.path=value", the value in YAML.

    Raises:
        UserError: There is no such file, or a key is unknown, missing, given twice, or of a wrong
            type. The message begins with the file, or the override, and the key.
    """
    path = Path(name)
    if not path.is_file():
        known = recipes()
        if str(name) not in known:
            hint = _meant(str(name), known)
            raise UserError(
                f"{name}: no such file, and no recipe of that name{hint}; "
                f"there are {', '.join(known)}"
            )
        path = known[str(name)]
    values = _load_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys; write key: value lines")
    origins: dict[str, str] = {}
    for override in overrides:
        _override(values, override, origins)
    return _Parser(str(path), origins).parse(TrainConfig, values, "")


def _load_yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep) for key, _ in node.value]
            for position, key in enumerate(keys):
                if key in keys[:position]:
                    line = node.value[position][0].start_mark.line + 1
                    raise UserError(f"{where}: {key} is given again in line {line}: keep one")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{where}: not valid YAML{line} ({problem})") from None


def _override(values: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    """Set one key, and remember that it was the command line that did so."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{override}: write key.path=value, e.g. optimiser.learning_rate=1e-4")
    value = _load_yaml(text, override)
    for depth, part in enumerate(parts[:-1]):
        # A section that the file leaves out, or sets to null, begins here.
        if values.get(part) is None:
            values[part] = {}
            origins[".".join(parts[: depth + 1])] = override
        values = values[part]
        if not isinstance(values, dict):
            raise UserError(f"{override}: {'.'.join(parts[: depth + 1])} holds a single value")
    values[parts[-1]] = value
    origins[key] = override


class _Parser:
    """From the YAML's values to dataclasses; knows where each value was given."""

    def __init__(self, file: str, origins: Mapping[str, str]):
        self.file, self.origins = file, origins

    def error(self, path: str, message: str) -> UserError:
        parts = path.split(".")
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        source = next((self.origins[p] for p in prefixes if p in self.origins), self.file)
        return UserError(f"{source}: {path}: {message}" if path else f"{source}: {message}")

    def parse(self, kind: type, values: Any, path: str) -> Any:
        """A dataclass of a mapping."""
        if not isinstance(values, dict):
            raise self.error(path, f"holds {values!r}, where keys are expected")
        hints = typing.get_type_hints(kind)
        self.known_keys(values, hints, path)
        given = {
            name: self.convert(hints[name], value, _join(path, name))
            for name, value in values.items()
        }
        for entry in fields(kind):
            required = entry.default is MISSING and entry.default_factory is MISSING
            if required and entry.name not in given:
                key = _join(path, entry.name)
                if is_dataclass(hints[entry.name]):
                    given[entry.name] = self.parse(hints[entry.name], {}, key)
                    continue
                raise self.error(key, f"is missing: add it, or give {key}=...")
        if "model" in given:
            known = model_settings()
            self.known_keys(given["model"], known, _join(path, "model"))
            given["model"] = {
                name: self.convert(known[name], value, _join(path, f"model.{name}"))
                for name, value in given["model"].items()
            }
        try:
            return kind(**given)
        except (ValueError, UserError) as error:
            raise self.error(path, str(error)) from None

    def known_keys(self, values: Mapping[Any, Any], known: Mapping[str, Any], path: str) -> None:
        for name in values:
            if name not in known:
                hint = _meant(str(name), known)
                raise self.error(_join(path, str(name)), f"no such key{hint}")

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        """A value of the type that is annotated."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            if value is None:
                return None
            (hint,) = (arg for arg in args if arg is not type(None))
            return self.convert(hint, value, path)
        if is_dataclass(hint):
            return self.parse(hint, value, path)
        if origin is Literal:
            if value not in args:
                raise self.error(path, f"must be one of {', '.join(args)}, not {value!r}")
            return value
        if origin is tuple:
            if not isinstance(value, list) or len(value) != len(args):
                raise self.error(path, f"must be a list of {len(args)}, not {value!r}")
            return tuple(self.convert(arg, v, path) for arg, v in zip(args, value, strict=True))
        if origin is dict:
            if not isinstance(value, dict):
                raise self.error(path, f"holds {value!r}, where keys are expected")
            if not is_dataclass(args[1]):
                return value
            # A phase of which nothing is said is one, too.
            return {
                str(name): self.parse(args[1], {} if part is None else part, _join(path, str(name)))
                for name, part in value.items()
            }
        converted = _scalar(hint, value)
        if converted is None:
            raise self.error(path, f"must be {_KINDS[hint]}, not {value!r}")
        return converted


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def _scalar(kind: type, value: Any) -> Any:
    """The value as that type, or None where it is another."""
    if kind in (bool, str):
        return value if isinstance(value, kind) else None
    if isinstance(value, bool):
        return None
    try:  # YAML 1.1 takes 1e-4 for a text
        number = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(number):
        return None
    if kind is float:
        return number
    return int(number) if number.is_integer() else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _meant(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
