"""Train a model on cached features: steps, validation, checkpoints, and exact resumption.

What a step does follows from the configuration, the number of the step and the weights alone: the
batch, all draws, learning rate, sigma and temperature. So a checkpoint is weights, moments and a
number, and a run that goes on from one computes what it would have computed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from videodistill.data.record import Stretch
from videodistill.encoders import ImageTextEncoder, load_encoder
from videodistill.engine.feature_cache import FeatureCache
from videodistill.errors import UserError
from videodistill.evaluation.predict import frames_of, stretch_around_best
from videodistill.evaluation.predictions import Prediction
from videodistill.model import VideoDistill
from videodistill.training.checkpoint import (
    export_model,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from videodistill.training.config import Phase, PhaseConfig, TrainConfig
from videodistill.training.dataset import Batch, Examples, Plan, load_batches
from videodistill.training.losses import Objective, Outcome
from videodistill.training.material import Material, make_examples, make_model, read_material
from videodistill.training.progress import LogFiles, show_progress, stop_asked

Log = Callable[[str], None]

_RECALL = "evidence recall"
_Answered = tuple[int, int, bool, Stretch | None]
"""Row, guess, whether evidence was seen, the stretch shown as evidence."""

_CHANGEABLE = {
    *("out", "encoder", "data.path", "data.features", "data.answers", "data.workers"),
    *("save_every", "log_every"),
}
"""Keys that a run may be resumed with other values of: they change nothing that is computed. What
the paths lead to is compared by its content."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Steps done, in this and in earlier calls."""
    ended: str
    """"complete", "early" (patience), or "interrupted"."""
    metrics: dict[str, float]
    """Of the last validation of this call; empty if there was none."""
    best: float | None
    """Best value of the validation metric in the whole run."""
    best_step: int | None
    signal: int | None = None
    """That interrupted it."""


@dataclass
class _Progress:
    """What a checkpoint knows beside weights and moments."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    worse: int = 0
    """Validations in a row that were no better."""


def train(
    config: TrainConfig,
    *,
    features: Mapping[str, Any] | None = None,
    encoder: ImageTextEncoder | None = None,
    resume: bool = False,
    cpu: bool = False,
    log: Log = print,
) -> TrainResult:
    """Train, or go on training.

    With several processes (torchrun) each calls this; together they compute what one would. torch's
    generator is seeded anew in every step.

    Args:
        config: The run.
        features: By video; see :class:`videodistill.training.dataset.Examples`. By default the
            feature cache in ``config.data.features``.
        encoder: That they were made with; by default ``config.encoder`` is loaded.
        resume: Go on from the newest checkpoint in ``config.out``, or begin where there is none.
        cpu: Leave GPUs alone.
        log: Called with lines of progress, in the first process.

    Raises:
        UserError: Something about the configuration, data or folder is wrong; the loss is not
            finite; a file cannot be written.
    """
    out = Path(config.out)
    try:
        return _train(config, out, features, encoder, resume, cpu, log)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{out}: the GPU has too little memory; raise batch.accumulate, set "
            "gradient_checkpointing=true, or lower batch.videos"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"{out}: a process that loads features was killed, perhaps for lack of memory, or of "
            "room in /dev/shm; go on with --resume and fewer data.workers"
        ) from error
    except (OSError, SafetensorError) as error:
        # safetensors tells of a full disk in words alone.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "os error 28" in str(error) or "No space left" in str(error)
        remedy = "choose another out"
        if full:
            remedy = "free some space and go on with --resume"
        elif not isinstance(error, SafetensorError) and error.errno is None:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        where = getattr(error, "filename", None) or out
        raise UserError(f"{where}: {reason}; {remedy}") from error


def _train(
    config: TrainConfig,
    out: Path,
    features: Mapping[str, Any] | None,
    encoder: ImageTextEncoder | None,
    resume: bool,
    cpu: bool,
    log: Log,
) -> TrainResult:
    accelerator = Accelerator(
        # Without being told, it would take several processes on CPUs for so many runs.
        cpu=cpu or not torch.accelerator.is_available(),
        kwargs_handlers=[
            # A batch without questions of one kind leaves the weights for that kind unused.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # The first process encodes all texts while the others wait.
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )
    if not accelerator.is_main_process:
        log = _no_log
    if accelerator.device.type == "cuda":
        # The same bits again after a resumption. Where CUDA has no such kernel, torch warns.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    parts = accelerator.num_processes * config.batch.accumulate
    if config.batch.videos % parts:
        raise UserError(
            f"batch.videos {config.batch.videos} cannot be shared by {accelerator.num_processes} "
            f"processes times batch.accumulate {config.batch.accumulate}: give a multiple of "
            f"{parts}"
        )
    found = newest_checkpoint(out / "checkpoints")
    if found and not resume:
        raise UserError(
            f"{out}: holds a run of {read_state(found)['step']} steps; go on with --resume, or "
            "choose another out"
        )
    state = read_state(found) if found else None
    if state:
        _refuse_changes(config, state, found)
    if encoder is None:
        encoder = load_encoder(config.encoder)
    encoder = encoder.to(accelerator.device)
    if features is None:
        features = _open_features(config, encoder)
    material = read_material(config, features, encoder, log)
    if state and state["digest"] != material.digest:
        raise UserError(
            f"{found}: was trained on other questions, answers or features than there are now; "
            "restore them, or choose another out"
        )
    model = make_model(config, encoder, material.vocabulary)
    with accelerator.main_process_first():
        train_examples, val_examples = make_examples(
            config, material, features, encoder, model, log
        )
    run = _Run(config, out, accelerator, encoder, material, model, val_examples, log)
    if found:
        progress = {key: state[key] for key in asdict(run.progress)}
        load_checkpoint(found, run.objective, run.optimiser)
        run.progress = _Progress(**progress)
        log(f"going on after step {run.progress.step}")
    return run.all_steps(train_examples, parts)


def _no_log(line: str) -> None:
    """Of all processes but the first."""


def _open_features(config: TrainConfig, encoder: ImageTextEncoder) -> Mapping[str, Any]:
    return FeatureCache.open(Path(config.data.features), encoder_fingerprint=encoder.fingerprint)


def _refuse_changes(config: TrainConfig, state: Mapping[str, Any], found: Path) -> None:
    now, before = (
        # The order of phases counts, too.
        _flat(values) | {"phases": list(values.get("phases", ()))}
        for values in (json.loads(json.dumps(asdict(config))), state["config"])
    )
    changed = [
        f"{key} {_shown(before, key)}, now {_shown(now, key)}"
        for key in sorted(now.keys() | before.keys())
        if key not in _CHANGEABLE and _shown(before, key) != _shown(now, key)
    ]
    if changed:
        raise UserError(
            f"{found}: was trained with {'; '.join(changed)}: give the same values, or choose "
            "another out"
        )


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}{name}.")
        else:
            flat[f"{path}{name}"] = value
    return flat


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not set"


class _Run:
    """One run in one process."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        accelerator: Accelerator,
        encoder: ImageTextEncoder,
        material: Material,
        model: VideoDistill,
        val_examples: Examples | None,
        log: Log,
    ):
        self.config, self.out, self.accelerator, self.log = config, out, accelerator, log
        self.material, self.model, self.val_examples = material, model, val_examples
        self.weights = asdict(config.losses)
        self.pretraining = any(config.losses.pretraining.values())
        self.encoder = encoder if config.losses.masked_language else None
        words = encoder.model.config.text_config.vocab_size
        self.objective = Objective(model, config.losses, words).to(accelerator.device)
        if config.gradient_checkpointing:
            _recompute_blocks(model)
        self.wrapped = accelerator.prepare(self.objective)
        self.clipped, self.optimiser = _optimiser(self.objective, config)
        self.progress = _Progress()
        self.phase: PhaseConfig | None = None
        """That it is in, of a run that has phases."""
        self.metrics: dict[str, float] = {}

    def all_steps(self, examples: Examples | None, parts: int) -> TrainResult:
        """The steps that are left."""
        config, progress = self.config, self.progress
        self._check_metric()
        main = self.accelerator.is_main_process
        with LogFiles(self.out, progress.step, main) as files, stop_asked() as asked:
            if config.steps == 0:
                self._validate(files)
            bar = show_progress(progress.step, config.steps, self.log) if main else nullcontext()
            with bar as show:
                ended = self._ended(False)
                batches = self._batches(examples, parts) if ended is None else ()
                for began, waited, chunk in batches:
                    loss = self._step(chunk, files, began, waited)
                    if main:
                        show(progress.step, loss)
                    due = progress.step % config.validation.every == 0
                    if self.val_examples and (due or progress.step == config.steps):
                        self._validate(files)
                    ended = self._ended(self._any(bool(asked)))
                    if ended or progress.step % config.save_every == 0:
                        self._save()
                    if ended:
                        break
            if ended == "complete" and not self.val_examples:
                self._export({})
        # It may have been another process that the signal came to.
        number = (asked or [signal.SIGTERM])[0] if ended == "interrupted" else None
        best = progress.best, progress.best_step
        return TrainResult(progress.step, ended, self.metrics, *best, number)

    def _ended(self, stop: bool) -> str | None:
        """Why there is no further step; None where there is one."""
        patience = self.config.validation.patience
        if self.progress.step >= self.config.steps:
            return "complete"
        if patience is not None and self.progress.worse >= patience:
            return "early"
        return "interrupted" if stop else None

    def _batches(
        self, examples: Examples, parts: int
    ) -> Iterator[tuple[float, float, list[Batch]]]:
        """Of each step: when it began, seconds that it waited for data, and this process's parts of
        its batch, which follow one another where the process accumulates."""
        config, accelerator = self.config, self.accelerator
        first = accelerator.process_index * config.batch.accumulate
        numbers = [
            step * parts + first + part
            for step in range(self.progress.step, config.steps)
            for part in range(config.batch.accumulate)
        ]
        self.plan = Plan(examples.rows, config.batch, config.seed)
        loader = load_batches(
            examples,
            self.plan,
            numbers,
            parts=parts,
            workers=config.data.workers,
            pin=accelerator.device.type == "cuda",
        )
        for _ in range(self.progress.step, config.steps):
            began = time.perf_counter()
            batches = [next(loader) for _ in range(config.batch.accumulate)]
            yield began, time.perf_counter() - began, batches

    def _step(
        self,
        batches: list[Batch],
        files: LogFiles,
        began: float,
        waited: float,
    ) -> float | None:
        """One step of the optimiser; its loss where that is logged."""
        config, step = self.config, self.progress.step
        phase = config.phase_at(step)
        if config.phases and (step == phase.first or self.phase is None):
            self._begin(phase)
        share = config.optimiser.share(step - phase.first, phase.steps)
        for group in self.optimiser.param_groups:
            full = getattr(phase.settings, group["part"]) * config.optimiser.learning_rate
            group["lr"] = full * share
        for name in ("sigma", "temperature"):
            schedule = getattr(config.curriculum, name)
            if schedule is not None:
                setattr(self.model.config, name, schedule.at(step, config.steps))
        self.wrapped.train()
        self.optimiser.zero_grad(set_to_none=True)
        sums: dict[str, float | Tensor] = defaultdict(float)
        wanted = self._wanted(batches[0].totals)
        for number, batch in enumerate(batches if wanted else ()):
            waits = number < len(batches) - 1
            with self.accelerator.no_sync(self.wrapped) if waits else nullcontext():
                losses = self._outcome(batch).losses
                loss = sum(
                    (self.weights[name] / batch.totals[name] * value)
                    for name, value in losses.items()
                )
                # Gradients are averaged over processes, while these losses are parts of a sum.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            for name, value in losses.items():
                sums[name] += value.detach() / batch.totals[name]
        norms = [
            nn.utils.clip_grad_norm_(parameters, config.optimiser.clip)
            for parameters in self.clipped
        ]
        norm = torch.stack(norms).norm()
        # Gradients are the same in all processes, and so is what each makes of them.
        if not torch.isfinite(norm):
            raise UserError(self._not_finite(step))
        self.optimiser.step()
        self.progress.step += 1
        if self.progress.step % config.log_every == 0 or self.progress.step == config.steps:
            means = self._over_processes(sums, wanted)
            total = sum(self.weights[name] * value for name, value in means.items())
            files.write(
                self.progress.step,
                {
                    "loss": total,
                    **{f"loss/{name}": value for name, value in means.items()},
                    "learning_rate": config.optimiser.learning_rate * share,
                    "sigma": self.model.config.sigma,
                    "temperature": self.model.config.temperature,
                    **({"phase": list(config.phases).index(phase.name)} if self.phase else {}),
                    "gradient_norm": float(norm),
                    "epoch": step * config.batch.videos / self.plan.chunks,
                    "seconds": time.perf_counter() - began,
                    "seconds_waiting_for_data": waited,
                },
            )
            return total
        return None

    def _begin(self, phase: Phase) -> None:
        """Let the parts of the model learn that do so in a phase, the others rest."""
        self.phase = phase.settings
        for group in self.optimiser.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(getattr(phase.settings, group["part"]) > 0)
        if self.progress.step == phase.first:
            self.optimiser.state.clear()
            self.log(f"phase {phase.name}: {phase.steps} steps")

    def _outcome(self, batch: Batch) -> Outcome:
        device = self.accelerator.device
        batch = batch.to(device)
        # "random" frames are drawn by torch's own generator.
        torch.manual_seed((batch.seed + batch.row_offset) % 2**63)
        masked_text = None
        if self.encoder is not None:
            masked_text = self.encoder.encode_ids(batch.pairs.masked_ids)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.wrapped(batch, masked_text, self.phase if self.wrapped.training else None)

    def _wanted(self, totals: Mapping[str, int]) -> list[str]:
        """The losses of this step, all of which the whole batch has questions for."""
        names = [name for name, count in totals.items() if count and self.weights[name]]
        if self.phase is None:
            return names
        shares = {name: self.phase.others for name in names} | {"evidence": self.phase.sampler}
        return [name for name in names if shares[name]]

    def _over_processes(self, sums: Mapping[str, Any], names: list[str]) -> dict[str, float]:
        """Sums over all processes."""
        device = self.accelerator.device
        values = torch.tensor([float(sums.get(name, 0.0)) for name in names], device=device)
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def _any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        value = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(value, "sum") > 0)

    def _not_finite(self, step: int) -> str:
        rate = max(group["lr"] for group in self.optimiser.param_groups)
        found = newest_checkpoint(self.out / "checkpoints")
        kept = f"{found} is the last good checkpoint" if found else "no checkpoint was written yet"
        return (
            f"the loss or its gradient is not finite in step {step + 1}, at learning rate "
            f"{rate:.3g}: {kept}; lower optimiser.learning_rate, or try precision=fp32"
        )

    def _check_metric(self) -> None:
        """Find out before the first step whether the metric will be there."""
        metric = self.config.validation.metric
        if not self.val_examples or metric == "loss":
            return
        if self.pretraining:
            raise UserError(
                f"validation.metric {metric}: pretraining gives no answers; set it to loss"
            )
        known = [*self.material.score({}).metrics, *self._recall(())]
        if metric not in known:
            raise UserError(
                f"validation.metric: no {metric} of {self.material.dataset.title}; there are "
                f"{', '.join(known)}, loss"
            )

    @torch.no_grad()
    def _validate(self, files: LogFiles) -> None:
        """Measure the model; each process answers a share of the questions."""
        config, accelerator = self.config, self.accelerator
        parts = accelerator.num_processes * config.batch.accumulate
        plan = Plan(
            self.val_examples.rows,
            replace(config.batch, videos=config.batch.videos // parts),
            0,
            shuffled=False,
        )
        batches = math.ceil(plan.chunks / plan.batch.videos)
        loader = load_batches(
            self.val_examples,
            plan,
            range(accelerator.process_index, batches, accelerator.num_processes),
            workers=config.data.workers,
            pin=accelerator.device.type == "cuda",
        )
        self.wrapped.eval()
        answers: list[_Answered] = []
        sums: dict[str, float] = defaultdict(float)
        totals: dict[str, int] = defaultdict(int)
        wrapped, self.wrapped = self.wrapped, self.objective  # no gradients to exchange
        for batch in loader:
            outcome = self._outcome(batch)
            for name, value in outcome.losses.items():
                sums[name] += float(value)
                totals[name] += batch.totals[name]
            rows, guesses, seen = (
                column.tolist() for column in (batch.rows, outcome.guesses, outcome.seen)
            )
            answers += zip(rows, guesses, seen, self._stretches(rows, batch, outcome), strict=True)
        self.wrapped = wrapped
        if accelerator.num_processes > 1:
            answers = gather_object(answers)
            gathered = gather_object([(dict(sums), dict(totals))])
            sums, totals = defaultdict(float), defaultdict(int)
            for some_sums, some_totals in gathered:
                for name in some_sums:
                    sums[name] += some_sums[name]
                    totals[name] += some_totals[name]
        loss = sum(self.weights[name] * sums[name] / totals[name] for name in sums)
        self.metrics = {"loss": loss}
        if not self.pretraining:
            self.metrics |= {
                name: metric.percent
                for name, metric in self.material.score(self._predictions(answers)).metrics.items()
            }
            self.metrics |= self._recall(answers)
        files.write(self.progress.step, self.metrics, "validation")
        shown = {self.config.validation.metric: None, _RECALL: None}
        told = (f"{name} {self.metrics[name]:.4g}" for name in shown if name in self.metrics)
        self.log(f"step {self.progress.step}: validation {', '.join(told)}")
        self._keep_best()

    def _stretches(self, rows: list[int], batch: Batch, outcome: Outcome) -> list[Stretch | None]:
        """Of each row the seconds that the model shows as evidence, where evidence is known."""
        found: list[Stretch | None] = [None] * len(rows)
        if outcome.scores is None or not self.material.val.grounded:
            return found
        for place, (scores, times) in enumerate(frames_of(batch, outcome.scores)):
            if rows[place] < 0:
                continue
            question = self.material.val.asked[rows[place]]
            if not question.evidence:
                continue
            duration = float(self.val_examples.features[question.video].duration)
            start, end = question.interval or (0.0, duration)
            found[place] = stretch_around_best(scores, start + times * (end - start), end, start)
        return found

    def _recall(self, answers: Iterable[_Answered]) -> dict[str, float]:
        """Percent of the validation questions with evidence that have a chosen frame in it."""
        grounded = self.material.val.grounded
        if not grounded:
            return {}
        asked = self.material.val.asked
        seen = sum(seen for row, _, seen, _ in answers if row >= 0 and asked[row].evidence)
        return {_RECALL: 100 * seen / grounded}

    def _predictions(self, answers: Iterable[_Answered]) -> dict[str, Prediction]:
        """By question id."""
        predictions: dict[str, Prediction] = {}
        for row, guess, _, stretch in answers:
            if row < 0:
                continue
            question = self.material.val.asked[row]
            answer: int | str | None = guess
            if guess < 0:
                answer = None
            elif question.choices is None:
                answer = self.material.vocabulary[guess]
            predictions[question.question_id] = Prediction(answer, stretch)
        return predictions

    def _keep_best(self) -> None:
        progress, metric = self.progress, self.config.validation.metric
        value = self.metrics[metric]
        sign = -1 if metric == "loss" else 1
        no_better = progress.best is not None and sign * value <= sign * progress.best
        if no_better or not math.isfinite(value):
            # The parts that answers need most may be at rest until the last phase.
            progress.worse += progress.step > self.config.all_phases()[-1].first
            return
        progress.best, progress.best_step, progress.worse = value, progress.step, 0
        self._export(self.metrics)

    def _export(self, metrics: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            record = {
                "step": self.progress.step,
                "metrics": dict(metrics),
                "config": asdict(self.config),
            }
            export_model(self.model, self.out / "best", record)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                **asdict(self.progress),
                "digest": self.material.digest,
                "config": asdict(self.config),
            }
            folder = self.out / "checkpoints"
            save_checkpoint(folder, self.progress.step, self.objective, self.optimiser, state)


def _recompute_blocks(model: VideoDistill) -> None:
    """Gradient checkpointing of all blocks. They draw nothing, so no generator need be restored."""
    for block in (*model.sampler.blocks, *model.refiner.blocks):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def _optimiser(
    objective: Objective, config: TrainConfig
) -> tuple[list[list[nn.Parameter]], torch.optim.Optimizer]:
    """AdamW that decays matrices, and the parameters whose gradients are clipped together.

    Those of the sampler apart: the draw's gradient is noisy, and must not shrink the others.
    """
    settings = config.optimiser
    sampler = [*objective.model.sampler.parameters(), objective.evidence_scale]
    known = {id(parameter) for parameter in sampler}
    others = [p for p in objective.parameters() if id(p) not in known]
    groups = []
    for part, parameters in (("sampler", sampler), ("others", others)):
        for decayed in (True, False):
            groups.append(
                {
                    "params": [p for p in parameters if (p.ndim >= 2) == decayed],
                    "weight_decay": settings.weight_decay if decayed else 0.0,
                    "part": part,
                }
            )
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
    return [sampler, others], optimiser
