"""Open a checkpoint and its encoder, and say in one line what is wrong with a bad one.

A checkpoint is a folder: config.json and model.safetensors of the head, and beside them, in
`encoder/`, the image-language encoder that it was trained on. Nothing is read with pickle.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from videodistill.encoders import ImageTextEncoder, load_encoder
from videodistill.engine.answerer import Answerer
from videodistill.engine.checks import ASSETS, check_precision
from videodistill.errors import UserError
from videodistill.model import VideoDistill, VideoDistillConfig

DEFAULT_CHECKPOINT = ASSETS / "default"
"""The model that comes with the package."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_SECONDS = 5.0
"""How long to wait for the hub's first answer before saying that it cannot be reached."""
_HUB_FILES = [
    "config.json",
    "model.safetensors",
    "encoder/*.json",
    "encoder/*.safetensors",
    "encoder/*.txt",
    "encoder/*.model",
]


def load(
    checkpoint: str | Path | None = None,
    *,
    encoder: str | Path | None = None,
    zero_shot: bool = False,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> Answerer:
    """Open a model that answers questions about videos.

    checkpoint: a folder written by `save_pretrained`, or a hub id; the bundled default if None.
    encoder: folder or hub id of a CLIP or SigLIP; by default the one inside the checkpoint, or
        else the one that its config.json names.
    zero_shot: use no trained head but a fresh one, which scores answers as the encoder itself
        does, on the frames that are most similar to the question. Works with any encoder.
    device: "cpu", "cuda", "cuda:1"...; by default "cuda" where there is one.
    precision: of matrix products, "fp32" or "bf16": several times as fast where the device has
        instructions for it, tens of times slower on a CPU that has none.

    Raises UserError for what cannot be found, is damaged, or does not belong together.
    """
    where = pick_device(device)
    check_precision(precision)
    if zero_shot:
        if checkpoint is not None:
            raise UserError(
                f"--zero-shot uses no trained head, but --checkpoint {checkpoint} was given: "
                "drop one of the two"
            )
        eyes = load_encoder(
            encoder or DEFAULT_CHECKPOINT / "encoder", device=where, precision=precision
        )
        with torch.random.fork_rng():  # the same model each time, the caller's draws untouched
            torch.manual_seed(0)
            model = VideoDistill.for_encoder(eyes)
        return Answerer(model.to(where), eyes, trained=False, precision=precision)
    folder = checkpoint_folder(DEFAULT_CHECKPOINT if checkpoint is None else checkpoint)
    model = load_head(folder)
    eyes = load_encoder(
        encoder or encoder_of(folder, model.config.encoder), device=where, precision=precision
    )
    check_pair(model, eyes, folder)
    return Answerer(model.to(where), eyes, precision=precision)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for, once it is known to work; "cuda" where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"--device {device} cannot be used ({reason}): try --device cpu") from error
    return torch.device(device)


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is looked up in the cache, then downloaded."""
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"checkpoint {folder} is a file: give the folder that holds config.json")
    if not _HUB_ID.fullmatch(str(checkpoint)):
        raise UserError(f"checkpoint {checkpoint}: no such folder: check the path")
    return _from_hub(str(checkpoint))


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_HUB_FILES))
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        # One request with a short time limit tells whether there is a network and a repository.
        HfApi().model_info(name, timeout=_HUB_SECONDS)
        found = snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=_HUB_SECONDS)
        return Path(found)
    except Exception as error:  # the hub's client and its transport have no common one
        raise UserError(
            f"checkpoint {name}: no such folder here, not in the local hub cache, and the hub did "
            f"not deliver it ({first_line(error)}): check name and network, or give a local folder"
        ) from error


def load_head(folder: Path) -> VideoDistill:
    """The VideoDistill head in a checkpoint folder, on the CPU, in evaluation mode."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(
                f"checkpoint {folder} has no {file.name}: give a folder that save_pretrained wrote"
            )
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{config} is damaged ({reason}): copy or download it again") from error
    try:
        # Without strict=True the mixin leaves what a file lacks at its random start. It prints
        # that it loads, and stdout may be read as JSON.
        with contextlib.redirect_stdout(io.StringIO()):
            model = VideoDistill.from_pretrained(
                folder, config=VideoDistillConfig(**settings), strict=True
            )
        return model.eval()
    except SafetensorError as error:
        reason = first_line(error)
        raise UserError(f"{weights} is damaged ({reason}): copy or download it again") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{config} describes no VideoDistill model ({first_line(error)}): "
            "copy or download it again"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"{weights} does not fit {config.name} ({first_line(error)}): "
            "take both files from one checkpoint"
        ) from error


def encoder_of(folder: Path, named: str = "") -> str | Path:
    """The encoder inside a checkpoint folder, or else the one that its config.json names."""
    inside = folder / "encoder"
    if inside.is_dir():
        return inside
    # A name of a folder that is elsewhere now says nothing; a hub id can be looked up.
    if (Path(named).is_absolute() and Path(named).is_dir()) or _HUB_ID.fullmatch(named):
        return named
    raise UserError(
        f"checkpoint {folder} has no encoder folder: give --encoder with the one it was trained on"
    )


def check_pair(model: VideoDistill, encoder: ImageTextEncoder, folder: Path) -> None:
    """A head trained on one encoder's features means nothing on another's."""
    trained_on = model.config.encoder_fingerprint
    if trained_on == encoder.fingerprint:
        return
    if not trained_on:
        sizes = {name: name for name in ("embed_dim", "patch_dim", "token_dim")}
        for ours, theirs in (sizes | {"patch_grid": "grid"}).items():
            expected, found = getattr(model.config, ours), getattr(encoder, theirs)
            if expected != found:
                raise UserError(
                    f"checkpoint {folder} takes {ours} {expected}, but encoder {encoder.name} "
                    f"gives {found}: give the encoder it was trained on, or use --zero-shot"
                )
        return
    raise UserError(
        f"checkpoint {folder} was trained on encoder {trained_on}, not on {encoder.name} "
        f"({encoder.fingerprint}): drop --encoder, give the checkpoint for that encoder, or use "
        "--zero-shot"
    )


def first_line(error: BaseException, length: int = 160) -> str:
    """What went wrong, on one line of at most `length` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 1] + "…"
