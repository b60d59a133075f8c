"""Tiny random CLIP and SigLIP directories, in the file formats of the real ones.

The weights mean nothing; the files are what `transformers` itself writes, so whatever reads
them reads `openai/clip-vit-base-patch32` and `google/siglip-base-patch16-224` too.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_CORPUS = [
    "What colour is the small circle that entered after the red ring left?",
    "a large blue square at left, a green triangle at right",
    "how many objects moved before the yellow star changed?",
    "a photo of a cat; a photo of a dog; yes; no",
]
_MAX_TOKENS = 24


def _byte_level_bpe(special_tokens: list[str], template: str) -> Tokenizer:
    """A byte-level BPE trained on a few sentences: any script is some sequence of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special_tokens],
    )
    return tokenizer


def _write_preprocessor(directory: Path, settings: dict[str, object]) -> None:
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / "preprocessor_config.json").write_text(text)


def tiny_clip(
    directory: str | Path, *, image_size: int = 32, patch: int = 8, width: int = 32, seed: int = 0
) -> Path:
    """Write a random 2-layer CLIP with its tokenizer and processor settings; returns the folder.

    The joint space has `width // 2` dimensions, so that no test confuses it with the towers'.
    """
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe([start, end], f"{start} $A {end}"),
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=_MAX_TOKENS,
    )
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width // 2,
    }
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"image_size": image_size, "patch_size": patch}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_preprocessor(
        directory,
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": image_size},
            "crop_size": {"height": image_size, "width": image_size},
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    return directory


def tiny_siglip(
    directory: str | Path, *, image_size: int = 32, patch: int = 8, width: int = 32, seed: int = 0
) -> Path:
    """Write a random 2-layer SigLIP with its tokenizer and processor settings; returns the folder.

    The joint space of SigLIP is as wide as its vision tower.
    """
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pad, end = "<pad>", "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe([pad, end], f"$A {end}"),
        eos_token=end,
        pad_token=pad,
        model_max_length=_MAX_TOKENS,
    )
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _MAX_TOKENS,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = SiglipConfig(
        text_config=text, vision_config=tower | {"image_size": image_size, "patch_size": patch}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_preprocessor(
        directory,
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": image_size, "width": image_size},
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    return directory
