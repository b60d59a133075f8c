"""Checkpoints that a killed run goes on from, and the folder that its best model is opened from.

A checkpoint is a folder ``step-00001000``: ``weights.safetensors``, ``optimiser.safetensors``,
``state.json``. It is written beside its place and renamed when complete, and older ones are removed
after that: whenever a run is killed, a whole one is there. Nothing is pickled.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from videodistill.data.files import read_json, sync, to_json
from videodistill.errors import UserError
from videodistill.model import VideoDistill

_NAME = re.compile(r"step-\d{8,}")
_PARTIAL = ".partial"


def save_checkpoint(
    folder: Path, step: int, module: nn.Module, optimiser: torch.optim.Optimizer, state: Any
) -> Path:
    """Write a checkpoint, then remove the older ones.

    Args:
        folder: Of the run's checkpoints.
        step: How many steps were done.
        module: Its weights.
        optimiser: Over parameters of ``module``.
        state: Whatever else there is, as a dict that JSON can hold.

    Raises:
        OSError, SafetensorError: It cannot be written; the older ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08}"
    partial = folder / f".{target.name}{_PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        weights = {name: value.contiguous() for name, value in module.state_dict().items()}
        save_file(weights, partial / "weights.safetensors")
        save_file(_optimiser_tensors(module, optimiser), partial / "optimiser.safetensors")
        (partial / "state.json").write_text(to_json({"step": step, **state}), encoding="utf-8")
        for file in partial.iterdir():
            # safetensors lets nobody else read what it writes.
            shutil.copymode(partial / "state.json", file)
            sync(file)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for other in folder.iterdir():
        if other != target and (_NAME.fullmatch(other.name) or other.name.endswith(_PARTIAL)):
            shutil.rmtree(other, ignore_errors=True)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with most steps in a run's folder of checkpoints, if there is any."""
    if not folder.is_dir():
        return None
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``state`` was when a checkpoint was saved, and ``step``."""
    return read_json(checkpoint / "state.json", dict)


def load_checkpoint(checkpoint: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and moments into what it was saved from.

    Raises:
        UserError: A file is damaged or does not fit.
    """
    try:
        module.load_state_dict(load_file(checkpoint / "weights.safetensors"))
        moments: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, value in load_file(checkpoint / "optimiser.safetensors").items():
            name, _, moment = key.rpartition("/")
            moments[name][moment] = value
        for name, parameter in module.named_parameters():
            if name in moments:
                optimiser.state[parameter] = {
                    # AdamW counts its steps on the CPU.
                    moment: value if moment == "step" else value.to(parameter.device)
                    for moment, value in moments[name].items()
                }
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{checkpoint} is damaged ({reason}): start again in another out"
        ) from error


def _optimiser_tensors(
    module: nn.Module, optimiser: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Moments and counts by "parameter/name"."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in module.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def export_model(model: VideoDistill, folder: Path, record: Mapping[str, Any]) -> None:
    """Write a model as `videodistill.load` opens it, with ``training.json`` beside it.

    Its two files are replaced one after the other. What a run writes later differs in its weights
    alone, and in settings that only training uses, so that any mixture can be opened.

    Raises:
        OSError, SafetensorError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        record_file = Path(temporary) / "training.json"
        record_file.write_text(to_json(dict(record)), encoding="utf-8")
        for name in ("config.json", "model.safetensors", "training.json"):
            shutil.copymode(record_file, Path(temporary) / name)
            sync(Path(temporary) / name)
            os.replace(Path(temporary) / name, folder / name)
