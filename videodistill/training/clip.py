"""A small CLIP for the procedural world, trained from nothing and saved as `transformers` does.

Frames of freshly drawn worlds (no video of the benchmark is among them) are paired with short
phrases, each of which is true of a frame or not: "red", "a star", "the red star at the left",
"a red ring carrying a blue cross". One loss is the sigmoid loss of SigLIP (Zhai et al. 2023) on
the pooled embedding, which may have many true phrases; the other is the same on each phrase's best
patch, so that patches, too, know what they show. Whole captions with the usual softmax loss learn
far less in the same time, for frames of one world share most of their caption.

No picture tells "before" from "after", so nothing so far would keep them apart in the text tower:
their tokens came out nearly alike, and no head could learn from them which one was asked. A third
loss lets the states of a question's tokens tell which word each of them is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from videodistill.data.files import write_whole
from videodistill.data.procedural import render as painter
from videodistill.data.procedural.questions import ANSWERS, ask
from videodistill.data.procedural.world import (
    BOX,
    COLOURS,
    RESIDENT_RADIUS,
    SHAPES,
    Drawn,
    World,
    WorldConfig,
    sample_world,
)
from videodistill.precision import cpu_autocast
from videodistill.processes import map_in_processes

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own normalisation."""


@dataclass(frozen=True)
class ClipRecipe:
    """Sizes and schedule of the small CLIP."""

    image_size: int = 48
    patch: int = 8
    width: int = 128
    layers: int = 4
    text_layers: int = 2
    heads: int = 4
    max_tokens: int = 32
    vocabulary: int = 512
    render_size: int = 96
    """Side in pixels at which frames are painted before they are scaled down."""
    worlds: int = 33_000
    stills_per_world: int = 5
    batch: int = 128
    phrases: int = 192
    questions: int = 32
    """Questions a step whose tokens must tell their words."""
    epochs: float = 2.0
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    seed: int = 11


# ---------------------------------------------------------------------------------------------
# Frames with the phrases that are true of them


def true_phrases(drawn: list[Drawn]) -> set[str]:
    """Every short phrase that is true of the objects seen in one frame."""
    phrases = set()
    visitor = next((d for d in drawn if d.role == "visitor"), None)
    for one in drawn:
        thing = one.thing
        if one.role == "box":
            phrases |= {BOX[0], f"{BOX[0]} {BOX[1]}"}
            continue
        phrases |= {thing.colour, thing.shape, thing.name}
        if one.role != "resident":
            phrases.add(f"{thing.size} {thing.name}")
        if one is visitor:
            phrases |= {one.side, f"{thing.name} at the {one.side}"}
            phrases |= {f"{thing.shape} at the {one.side}", f"{thing.colour} at the {one.side}"}
            phrases |= {f"visiting {thing.name}", f"visiting {thing.shape}", "visitor"}
            phrases |= {f"visiting {thing.colour} thing"}
        if one.role == "carried":
            phrases |= {f"{visitor.thing.name} carrying {thing.name}", "carrying"}
            phrases |= {f"{visitor.thing.name} carrying", f"carried {thing.name}"}
        if one.role == "resident" and one.radius < RESIDENT_RADIUS:
            phrases |= {f"{visitor.thing.name} hitting {thing.name}", "hitting"}
            phrases |= {f"shrunken {thing.name}", f"{visitor.thing.name} hitting"}
    return phrases


CONCEPTS = (*COLOURS, *SHAPES, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
"""Phrases that every batch is compared with, whether true of any of its frames or not."""

_WRAPPERS = (
    "{}",
    "{}",
    "a {}",
    "the {}",
    "a picture of a {}",
    "what is the {}?",
    "what colour is the {}?",
    "from which side does the {} come in?",
)


def _stills(job: tuple[ClipRecipe, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    """Frames of ``count`` worlds from ``first`` on, uint8 [n, 3, s, s], and their true phrases."""
    recipe, first, count = job
    frames, phrases = [], []
    for number in range(first, first + count):
        world = sample_world((recipe.seed, number), WorldConfig(frames=64))
        rng = np.random.default_rng((recipe.seed, number, 1))
        for index in _interesting(world, rng, recipe.stills_per_world):
            frames.append(painter.render(world, index, recipe.render_size))
            phrases.append(sorted(true_phrases(world.objects_at(index))))
    return _as_decoded(np.stack(frames), recipe.image_size).numpy(), phrases


def _interesting(world: World, rng: np.random.Generator, count: int) -> list[int]:
    """One frame of ``count - 1`` random events, and one of any time."""
    events = rng.permutation(len(world.events))[: count - 1]
    chosen = [int(rng.integers(world.events[i].start, world.events[i].stop)) for i in events]
    return [*chosen, *rng.integers(0, world.frames, count - len(chosen)).tolist()]


def _as_decoded(frames: np.ndarray, size: int) -> torch.Tensor:
    """Halve the chroma as a video file does, scale down; uint8 [n, 3, size, size]."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    luma = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    chroma = F.interpolate(F.avg_pool2d(pixels - luma, 2), scale_factor=2, mode="bilinear")
    pixels = (luma + chroma).clamp(0, 255).round().to(torch.uint8)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)


def make_stills(recipe: ClipRecipe, workers: int) -> tuple[torch.Tensor, list[list[str]]]:
    """Paint the training frames.

    Returns:
        uint8 [n, 3, image_size, image_size] and, for each frame, its true phrases.
    """
    chunk = 100
    jobs = [
        (recipe, first, min(chunk, recipe.worlds - first))
        for first in range(0, recipe.worlds, chunk)
    ]
    total = recipe.worlds * recipe.stills_per_world
    pixels = torch.empty(total, 3, recipe.image_size, recipe.image_size, dtype=torch.uint8)
    phrases: list[list[str]] = []
    with map_in_processes(_stills, jobs, workers, torch.set_num_threads, 1) as results:
        for frames, labels in results:
            pixels[len(phrases) : len(phrases) + len(labels)] = torch.from_numpy(frames)
            # There are some thousand different phrases, each of them true of many frames.
            phrases += [[sys.intern(phrase) for phrase in true] for true in labels]
    return pixels, phrases


# ---------------------------------------------------------------------------------------------
# The model


def _language(recipe: ClipRecipe) -> tuple[list[str], list[str]]:
    """Questions about some worlds, and true phrases of them."""
    questions, phrases = [], []
    for number in range(2000):
        world = sample_world((recipe.seed, 2, number), WorldConfig(frames=64))
        questions += [asked.question for asked in ask(world)]
        phrases += sorted(true_phrases(world.objects_at(world.events[0].start)))
    return questions, phrases


def _tokenizer(recipe: ClipRecipe, corpus: list[str]) -> Any:
    """A byte-level BPE (any script is some sequence of its tokens) over a corpus."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[start, end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=recipe.max_tokens,
    )


def _build(recipe: ClipRecipe, tokenizer: Any) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_attention_heads": recipe.heads,
        "projection_dim": recipe.width,
    }
    text = tower | {
        "num_hidden_layers": recipe.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": recipe.max_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {
        "num_hidden_layers": recipe.layers,
        "image_size": recipe.image_size,
        "patch_size": recipe.patch,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe.width)
    config._attn_implementation = "eager"  # the fastest for 37 tokens on a CPU
    return CLIPModel(config)


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def embed(model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings in the joint space of frames [n, C_a] and of their patches [n, S, C_a]."""
    vision = model.vision_model(pixel_values=_normalise(pixels))
    patches = model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
    pooled = model.visual_projection(vision.pooler_output)
    return F.normalize(pooled, dim=-1), F.normalize(model.visual_projection(patches), dim=-1)


def embed_text(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Unit embeddings in the joint space, [len(texts), C_a]."""
    tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    text = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return F.normalize(model.text_projection(text.pooler_output), dim=-1)


def word_loss(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Cross-entropy of the text tower's last states, times the words' embeddings, with the words.

    Zero where each token's state tells which token it is.
    """
    tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    states = model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = states @ model.text_model.embeddings.token_embedding.weight.T
    return F.cross_entropy(logits[mask.bool()].float(), ids[mask.bool()])


class _Bias(nn.Module):
    """The sigmoid losses' offsets: part of training, not of the CLIP that is saved."""

    def __init__(self):
        super().__init__()
        self.pooled = nn.Parameter(torch.tensor(-4.0))
        self.patch = nn.Parameter(torch.tensor(-6.0))
        self.patch_scale = nn.Parameter(torch.tensor(10.0).log())


def train_clip(
    recipe: ClipRecipe,
    directory: Path,
    *,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train, and write a CLIP directory that `transformers` and ``load_encoder`` read.

    Args:
        recipe: Sizes and schedule.
        directory: Where to write; made if missing.
        workers: Processes that paint frames.
        log: Called with lines of progress.

    Returns:
        What was measured on held-out frames, see :func:`measure`; ``seconds``, and the ``frames``
        and ``steps`` of training. training.json in ``directory`` holds it, too, with the recipe;
        it is written last and says that the directory is complete.
    """
    torch.manual_seed(recipe.seed)
    began = time.perf_counter()
    pixels, labels = make_stills(recipe, workers)
    log(f"painted {len(labels)} frames in {time.perf_counter() - began:.0f} s")
    held_out = min(4000, len(labels) // 10)
    questions, phrases = _language(recipe)
    tokenizer = _tokenizer(recipe, [*CONCEPTS, *ANSWERS, *questions, *phrases])
    model, bias = _build(recipe, tokenizer), _Bias()
    with torch.no_grad():
        model.logit_scale.fill_(float(np.log(10.0)))

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": [*others, *bias.parameters()], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    trained = len(labels) - held_out
    steps = int(recipe.epochs * trained / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=steps, pct_start=0.08
    )
    rng = np.random.default_rng(recipe.seed)
    order = np.concatenate([rng.permutation(trained) for _ in range(int(recipe.epochs) + 1)])
    model.train()
    first = time.perf_counter()
    for step in range(steps):
        batch = order[step * recipe.batch : (step + 1) * recipe.batch]
        texts, truth = _phrases_for([labels[i] for i in batch], recipe.phrases, rng)
        with cpu_autocast():
            frames, patches = embed(model, pixels[batch])
            words = embed_text(model, tokenizer, texts)
            asked = [questions[i] for i in rng.integers(len(questions), size=recipe.questions)]
            spelling = word_loss(model, tokenizer, asked)
        frames, patches, words = frames.float(), patches.float(), words.float()
        pooled = model.logit_scale.exp() * frames @ words.T + bias.pooled
        best = (patches @ words.T).amax(1)
        local = bias.patch_scale.exp() * best + bias.patch
        loss = spelling + sum(
            F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(batch)
            for logits in (pooled, local)
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step == steps - 1:
            spent = time.perf_counter() - first
            left = spent / (step + 1) * (steps - step - 1)
            log(
                f"clip step {step + 1}/{steps}  loss {loss.item():.3f}  "
                f"{spent:.0f} s, {left:.0f} s to go at this rate"
            )

    model.eval()
    measured = measure(model, tokenizer, pixels[trained:], labels[trained:])
    measured |= {"seconds": round(time.perf_counter() - began), "frames": trained, "steps": steps}
    directory.mkdir(parents=True, exist_ok=True)
    # An older record must not speak for the weights that come now.
    (directory / "training.json").unlink(missing_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": recipe.image_size},
        "crop_size": {"height": recipe.image_size, "width": recipe.image_size},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_whole(directory / "preprocessor_config.json", text)
    record = {"recipe": asdict(recipe), "measured": measured}
    write_whole(directory / "training.json", json.dumps(record, indent=2) + "\n")
    return measured


def _phrases_for(
    labels: list[list[str]], count: int, rng: np.random.Generator
) -> tuple[list[str], torch.Tensor]:
    """The concepts, ``count`` more phrases of the batch, and which are true of which frame."""
    own = sorted({phrase for phrases in labels for phrase in phrases} - set(CONCEPTS))
    further = rng.permutation(len(own))[:count]
    phrases = [*CONCEPTS, *(own[i] for i in further)]
    column = {phrase: number for number, phrase in enumerate(phrases)}
    truth = torch.zeros(len(labels), len(phrases))
    for row, true in enumerate(labels):
        truth[row, [column[phrase] for phrase in true if phrase in column]] = 1.0
    texts = [_WRAPPERS[rng.integers(len(_WRAPPERS))].format(phrase) for phrase in phrases]
    return texts, truth


@torch.no_grad()
def measure(
    model: nn.Module, tokenizer: Any, pixels: torch.Tensor, labels: list[list[str]]
) -> dict[str, float]:
    """How well frames and best patches tell which colour-shape pairs and which shapes they show.

    Returns:
        Areas under the ROC curve over all (frame, phrase) pairs, by name: "auc_frame_..." of the
        pooled embedding, "auc_patch_..." of the best patch; "..._pairs" of colour and shape
        together, "..._shapes" of shapes.
    """
    embeddings = [embed(model, chunk) for chunk in pixels.split(500)]
    frames = torch.cat([frame for frame, _ in embeddings])
    patches = torch.cat([patch for _, patch in embeddings])
    words = embed_text(model, tokenizer, list(CONCEPTS))
    truth = torch.tensor([[concept in set(true) for concept in CONCEPTS] for true in labels])
    pooled, local = frames @ words.T, (patches @ words.T).amax(1)
    pairs = [i for i, concept in enumerate(CONCEPTS) if " " in concept]
    shapes = [CONCEPTS.index(shape) for shape in SHAPES]
    return {
        f"auc_{where}_{what}": round(_auc(scores[:, columns], truth[:, columns]), 4)
        for where, scores in (("frame", pooled), ("patch", local))
        for what, columns in (("pairs", pairs), ("shapes", shapes))
    }


def _auc(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Area under the ROC curve: the share of (true, false) pairs in the right order."""
    order = scores.flatten().argsort()
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    true = truth.flatten()
    positives, negatives = true.sum().double(), (~true).sum().double()
    return float((ranks[true].sum() - positives * (positives + 1) / 2) / (positives * negatives))
