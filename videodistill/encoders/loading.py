"""From a name to a frozen encoder: find the files, offline first, check them, load them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from videodistill.encoders.encoder import ImageTextEncoder
from videodistill.encoders.preprocess import FrameTransform
from videodistill.engine.checks import check_precision
from videodistill.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NEEDED = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
]
_HUB_TIMEOUT_S = 5.0

# What of a configuration decides the features, beside the weights. Named one by one, so that the
# fingerprint does not change when a newer `transformers` writes the same encoder out again.
_DECIDING = (
    "hidden_act",
    "layer_norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
    "image_size",
    "patch_size",
    "max_position_embeddings",
    "eos_token_id",
)
_PROBE = "A photo of 2 red circles, isn't it? Ünïcode 日本語"


def load_encoder(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    local_files_only: bool | None = None,
) -> ImageTextEncoder:
    """Load a frozen CLIP or SigLIP from a directory or the Hugging Face hub.

    A local directory wins over a hub id of the same name. local_files_only: None looks into the
    local hub cache and asks the hub only for what is not there; True never touches the network;
    False always asks the hub for the newest version. The package's docstring says what a
    directory needs. No code from the directory is run, and nothing is unpickled. precision: of
    matrix products; with "bf16" their weights are kept so. Features are float32 either way.
    Raises UserError, naming the directory or file and the remedy, for whatever cannot be used.
    """
    name = str(name_or_path)
    check_precision(precision)
    _check_device(device)
    folder = _find_folder(name, local_files_only)
    config, model_type = _load_config(folder)
    transform = _load_transform(folder, model_type, config.vision_config.image_size)
    tokenizer = _load_tokenizer(folder, config)
    _check_text_end(folder, config, tokenizer)
    weights = _weight_files(folder)
    model = _load_model(folder, config, model_type)
    fingerprint = _fingerprint(config, transform, tokenizer, weights)
    encoder = ImageTextEncoder(
        model, tokenizer, transform, name=name, fingerprint=fingerprint, precision=precision
    )
    return encoder.to(device)


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {str(device)!r} cannot be used ({_first_line(error)}); take cpu"
        ) from error


def _find_folder(name: str, local_files_only: bool | None) -> Path:
    """The local directory, or a folder of the hub cache that holds every file needed."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # os.path, as pathlib raises for a name that is too long
        return Path(path)
    if os.path.exists(path):
        raise UserError(f"{name} is a file; give the encoder's directory or a hub id")
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"no encoder directory at {name!r}; give an existing one or a hub id")
    if local_files_only is not False:
        cached = _from_cache(name)
        if cached is not None:
            return cached
    if local_files_only:
        raise UserError(
            f"{name} is neither a directory nor in the local hub cache; "
            f"download it first (hf download {name}) or give a directory"
        )
    return _from_hub(name)


def _from_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=_NEEDED))
    except (OSError, ValueError):
        return None
    # An interrupted download leaves a snapshot with some of the files.
    complete = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    return folder if complete else None


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        # Ask for the list of files first: one request with a short timeout tells quickly whether
        # there is a network, a repository, and weights worth downloading.
        files = HfApi().model_info(name, timeout=_HUB_TIMEOUT_S).siblings or []
        if not any(re.fullmatch(r"model.*\.safetensors", file.rfilename) for file in files):
            raise UserError(f"hub repository {name} has no model.safetensors; choose one that has")
        return Path(snapshot_download(name, allow_patterns=_NEEDED, etag_timeout=_HUB_TIMEOUT_S))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is no directory here and no public repository on the hub; check the name "
            "(a private or gated one needs: hf auth login)"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{name} is neither a directory nor in the local hub cache, and HF_HUB_OFFLINE keeps "
            "the hub away; unset it or give a local directory"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the HTTP library's own errors share no base with OSError
        raise UserError(
            f"{name} is no directory here, and the hub cannot give it ({_first_line(error)}); "
            "give a local directory, or try again with a network"
        ) from error


def _load_config(folder: Path) -> tuple[Any, str]:
    """The parsed configuration, a CLIPConfig or SiglipConfig, and which of the two."""
    file = folder / "config.json"
    settings = _read_json(file)
    if settings is None:
        raise UserError(f"{folder} has no config.json; give the directory of a CLIP or SigLIP")
    model_type = settings.get("model_type")
    if model_type not in ("clip", "siglip"):
        hint = " (SigLIP2 of variable resolution)" if model_type == "siglip2" else ""
        raise UserError(
            f"{file}: model_type is {model_type!r}{hint}; encoders are 'clip' or 'siglip' "
            "(SigLIP2 of fixed resolution is 'siglip')"
        )
    with _quiet():
        from transformers import CLIPConfig, SiglipConfig

        try:
            config = (CLIPConfig if model_type == "clip" else SiglipConfig).from_dict(settings)
            side, patch = config.vision_config.image_size, config.vision_config.patch_size
            if not 0 < patch <= side:
                raise ValueError(f"image_size {side} and patch_size {patch} make no grid")
            if config.vision_config.num_channels != 3:
                raise ValueError("num_channels is not 3")
        except Exception as error:  # whatever a damaged file makes transformers raise
            raise UserError(
                f"{file} is damaged ({_first_line(error)}); restore or download it again"
            ) from error
    if model_type == "siglip" and not config.vision_config.vision_use_head:
        raise UserError(f"{file}: vision_use_head is false; choose a SigLIP that pools its frames")
    return config, model_type


def _load_transform(folder: Path, model_type: str, image_size: int) -> FrameTransform:
    file = folder / "preprocessor_config.json"
    settings = _read_json(file)
    if settings is None:
        # Newer versions of transformers write one file for tokenizer and image processor.
        file = folder / "processor_config.json"
        settings = (_read_json(file) or {}).get("image_processor", {})
    try:
        return FrameTransform.from_settings(settings, model_type=model_type, image_size=image_size)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {_first_line(error)}; correct the file") from error


def _load_tokenizer(folder: Path, config: Any) -> Any:
    if not any(
        (folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")
    ):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json, vocab.json or spiece.model); "
            "copy the tokenizer's files there"
        )
    with _quiet():
        try:
            tokenizer = _read_tokenizer(folder, config)
        except ImportError as error:
            raise UserError(
                f"{folder}: its tokenizer needs sentencepiece; pip install sentencepiece, "
                "or add a tokenizer.json"
            ) from error
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise UserError(
                f"{folder}: its tokenizer is damaged ({_first_line(error)}); "
                "restore or download it again"
            ) from error
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{folder}: its tokenizer has no pad_token; name one in tokenizer_config.json"
        )
    return tokenizer


def _read_tokenizer(folder: Path, config: Any) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, **options)
    except Exception:
        # The class named is unknown, or needs sentencepiece: tokenizer.json can stand alone.
        if not (folder / "tokenizer.json").is_file():
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder, **options)


def _check_text_end(folder: Path, config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose texts do not end where CLIP reads their embedding.

    Nothing else would tell: with an end token that never occurs CLIP pools the first position,
    which is the same for all texts.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.text_config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {highest}, the text tower only "
            f"{config.text_config.vocab_size} embeddings; put the model's own tokenizer there"
        )
    if config.model_type != "clip":
        return
    eos = config.text_config.eos_token_id
    pooled = highest if eos == 2 else eos  # 2: the old convention, see CLIPTextModel
    ids = tokenizer(_PROBE, verbose=False)["input_ids"]
    if pooled not in ids or ids.index(pooled) != len(ids) - 1:
        raise UserError(
            f"{folder}: CLIP reads a text's embedding at its first token {pooled} "
            f"(text_config.eos_token_id {eos}), which is not where its tokenizer ends texts; "
            "correct eos_token_id in config.json or tokenizer_class in tokenizer_config.json"
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, sorted by name."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    file = folder / "model.safetensors.index.json"
    index = _read_json(file)
    if index is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{file} has no weight_map; restore or download it again")
        return [folder / shard for shard in sorted(set(shards.values()))]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UserError(
            f"{folder} has pickled weights only, which may run code when loaded; convert them to "
            "model.safetensors (save_pretrained of a trusted copy does)"
        )
    raise UserError(f"{folder} has no model.safetensors; copy the weights there")


def _load_model(folder: Path, config: Any, model_type: str) -> torch.nn.Module:
    with _quiet():
        from transformers import CLIPModel, SiglipModel

        try:
            model, report = (CLIPModel if model_type == "clip" else SiglipModel).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # safetensors, transformers and torch each raise their own
            raise UserError(
                f"{folder}: weights cannot be loaded ({_first_line(error)}); "
                "restore or download them again"
            ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing ({missing[0]} first); "
            "its config.json and its weights do not belong together"
        )
    return model


def _fingerprint(
    config: Any, transform: FrameTransform, tokenizer: Any, weights: list[Path]
) -> str:
    towers = (config.text_config, config.vision_config)
    facts = {
        "model_type": config.model_type,
        "towers": [{key: getattr(tower, key, None) for key in _DECIDING} for tower in towers],
        "transform": repr(transform),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": tokenizer(_PROBE, verbose=False)["input_ids"],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in weights:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def _read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({_first_line(error)}); restore it") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; restore it")
    return content


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' notices and progress bars off the terminal while files are read."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
