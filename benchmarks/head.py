"""The whole model, sampler, refiner and answering: in the reference configuration, and as bundled.

Inference and the training step: forward, cross-entropy over five choices, backward. The
optimiser's update is the same for all and left out. bfloat16 is autocast; the weights of linear
layers are float32 in training, and kept in bfloat16 for inference, as the engine does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vd_kernels
from benchmarks import spacetime_attention, topk_sampling
from benchmarks.cases import (
    Case,
    Contestant,
    Floor,
    Inputs,
    Task,
    emulated,
    normal,
    ours,
    spread_over,
)
from vd_kernels import TopKSample
from videodistill.engine.graphs import GraphRunner
from videodistill.model import VideoDistill, VideoDistillConfig
from videodistill.precision import keep_for_products

CHOICES = 5

# ---------------------------------------------------------------------------------------------
# The operators as users of plain PyTorch would write them, so that torch.compile sees into them


def eager_gate(query: Tensor, key: Tensor, *, key_mask: Tensor, bias: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) * query.shape[-1] ** -0.5
    scores = scores.float().masked_fill(~key_mask[:, None, None], torch.finfo(torch.float32).min)
    relevance = (scores.softmax(-1) * scores).sum(-1)
    return (relevance.transpose(1, 2) + bias).sigmoid().to(query.dtype)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axis: str,
    key_mask: None,
    gate: Tensor | None = None,
) -> Tensor:
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = functools.partial(
        spacetime_attention.viewed, F.scaled_dot_product_attention, axis=axis
    )
    out = attend(query, key, value)
    return out if gate is None else out * gate


def eager_sample(
    scores: Tensor,
    k: int,
    *,
    method: str = "",
    num_samples: int = 1,
    temperature: float = 1.0,
    seed: int | None = None,
    **_: Any,
) -> TopKSample:
    """The hard choice, one under Gumbel noise ("gumbel"), or the mean of many ("perturbed")."""
    if method == "gumbel":
        noise = None
        if seed is not None:  # checked: the operator's own, on which gradients depend
            noise = topk_sampling.noise_of_gumbel(scores, seed)
        weights, indices = topk_sampling.eager_gumbel(scores, noise, k, temperature)
        return TopKSample(weights, indices, torch.ones_like(indices, dtype=torch.bool))
    indices = scores.topk(k).indices.sort(-1).values
    if method == "hard":
        weights = F.one_hot(indices, scores.shape[-1]).to(scores.dtype)
    else:
        draw = topk_sampling.drawing(topk_sampling.WithoutOneHots)
        (weights,) = draw(scores, None, None, k, num_samples)
    return TopKSample(weights, indices, torch.ones_like(indices, dtype=torch.bool))


def eager_gather(values: Tensor, sample: TopKSample) -> Tensor:
    return torch.einsum("bkn,bn...->bk...", sample.weights.to(values.dtype), values)


@contextlib.contextmanager
def eager_operators() -> Iterator[None]:
    """The model on these functions instead of vd_kernels."""
    places = {
        "layers": {"language_gate": eager_gate},
        "refiner": {"spacetime_attention": eager_attention},
        "sampler": {"spacetime_attention": eager_attention, "topk_sample": eager_sample},
        "videodistill": {"topk_gather": eager_gather},
    }
    with contextlib.ExitStack() as stack:
        for name, functions in places.items():
            module = importlib.import_module(f"videodistill.model.{name}")
            stack.enter_context(mock.patch.multiple(module, **functions))
        yield


# ---------------------------------------------------------------------------------------------
# The task


class Head(Task):
    """Logits of choices, in training their cross-entropy, of B questions about V videos, or B."""

    operator, variant = "head", "reference"
    settings: ClassVar[dict[str, Any]] = {}
    """Of the model, besides its sizes."""
    differentiable = ("model",)
    slack = 8.0
    split = True
    small: ClassVar = {"B": 2, "N": 6, "K": 2, "S": 4, "M": 3, "C": 16, "H": 2}

    def inputs(self, case: Case, seed: int, *, checking: bool) -> Inputs:
        model = _model(case, seed, self.settings)
        b, n, k, s, m = (case.sizes[name] for name in "BNKSM")
        videos = case.sizes.get("V", b)
        config = model.config
        single = replace(case, dtype=torch.float32)
        shapes = {
            "frame_embed": (videos, n, config.embed_dim),
            "patches": (videos, n, s, config.patch_dim),
            "text_embed": (b, config.embed_dim),
            "tokens": (b, m, config.token_dim),
            "choice_embed": (b, CHOICES, config.embed_dim),
        }
        inputs = {name: normal(seed, name, shape, single) for name, shape in shapes.items()}
        inputs["token_mask"] = torch.arange(m, device=case.device).expand(b, m) < max(1, 3 * m // 4)
        inputs["target"] = torch.arange(b, device=case.device) % CHOICES
        inputs["score_bias"] = inputs["seed"] = None
        if checking:
            # Far more than scores differ by: all precisions and all noise choose the same frames.
            chosen = torch.arange(n, device=case.device) % (n // k) == 0
            inputs["score_bias"] = 20.0 * chosen.expand(b, n)
            inputs["seed"] = seed
        bf16 = case.dtype == torch.bfloat16
        if bf16 and case.mode == "forward":
            keep_for_products(model, "bf16")
        return {"model": model, **inputs, "bf16": bf16}

    def oracle(self, **inputs: Any) -> tuple[Tensor, ...]:
        with vd_kernels.use_backend("reference"):
            return step(**inputs)

    def contestants(self, case: Case) -> list[Contestant]:
        skipped = ""
        if emulated(case.dtype, case.device):
            skipped = "this processor multiplies bfloat16 by emulation alone"
        chosen = Contestant("vd_kernels", step, ours=True)
        plain = next(entry for entry in ours(step) if entry.name == "reference")
        entries = [
            chosen,
            replace(chosen, name="vd_kernels + torch.compile", compiled=True, graphed=True),
            plain,
            # Not ours: the baseline of a user who has the operators' formulas alone.
            replace(
                plain, name="torch.compile of reference", compiled=True, graphed=True, ours=False
            ),
            Contestant("eager", step, context=eager_operators),
            Contestant("torch.compile", step, True, True, context=eager_operators),
        ]
        if case.device == "cuda" and case.mode == "forward":
            entries.insert(1, replace(chosen, name="vd_kernels + CUDA graphs", function=replayed))
        return [replace(entry, skipped=skipped) for entry in entries]

    def floor(self, case: Case) -> Floor:
        """The linear layers' products; weights, and of the features those of chosen frames.

        Training reads the weights twice and writes their gradients.
        """
        inputs = self.inputs(case, 0, checking=True)
        model, patches = inputs["model"], inputs["patches"]
        passes = {"forward": 1, "backward": 2, "both": 3}[case.mode]
        weights = passes * sum(x.nbytes for x in model.parameters())
        with FlopCounterMode(display=False) as counter:
            out = self.oracle(**inputs | {"model": model.float(), "bf16": False})
            if case.mode != "forward":
                torch.autograd.grad(out, list(model.parameters()))
        # At most: questions about one video may choose the same frames.
        shown = min(case.sizes["N"], case.sizes["B"] // len(patches) * case.sizes["K"])
        chosen = patches.numel() // case.sizes["N"] * shown
        features = inputs["frame_embed"].numel() + chosen
        return Floor(bytes=weights + 4 * features, operations=counter.get_total_flops())


class BundledHead(Head):
    """The bundled model's sizes and a batch of its training: 8 questions about each video."""

    variant = "bundled"
    settings: ClassVar = {"merge": 2, "sampling": "gumbel", "sigma": 0.25}
    small: ClassVar = {"V": 2, "B": 4, "N": 6, "K": 2, "S": 16, "M": 3, "C": 16, "H": 2}


def step(
    model: VideoDistill,
    frame_embed: Tensor,
    patches: Tensor,
    text_embed: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    choice_embed: Tensor,
    target: Tensor,
    seed: int | None,
    score_bias: Tensor | None,
    bf16: bool,
) -> tuple[Tensor]:
    with torch.autocast(frame_embed.device.type, torch.bfloat16, enabled=bf16):
        found = model(
            frame_embed, patches, text_embed, tokens, token_mask, seed=seed, score_bias=score_bias
        )
        logits = model.choice_logits(found.answer_embed, choice_embed)
    if not model.training:
        return (logits,)
    return (F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target),)


_runner = functools.lru_cache(maxsize=2)(GraphRunner)
"""Of the models that are checked and timed."""


def replayed(
    model: VideoDistill,
    choice_embed: Tensor,
    target: Tensor,
    seed: int | None,
    bf16: bool,
    **features: Tensor | None,
) -> tuple[Tensor]:
    """As `step` in inference, by the engine's runner."""
    with torch.autocast(choice_embed.device.type, torch.bfloat16, enabled=bf16):
        found = _runner(model)(**features)
        return (model.choice_logits(found.answer_embed, choice_embed),)


def _model(case: Case, seed: int, settings: dict[str, Any]) -> VideoDistill:
    """With random weights, also where training starts at zero and no gradient would pass."""
    sizes, usual = case.sizes, VideoDistillConfig()
    width, side = sizes["C"], round(sizes["S"] ** 0.5)
    given = {
        "embed_dim": min(width, usual.embed_dim),
        "patch_dim": width,
        "token_dim": min(width, usual.token_dim),
        "patch_grid": (side, side),
        "width": width,
        "heads": sizes["H"],
        "frames": sizes["N"],
        "pick": sizes["K"],
        "sigma": topk_sampling.SIGMA,
    }
    config = VideoDistillConfig(**(given | settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VideoDistill(config)
        for weight in (model.answering.adapt[-1].weight, model.sampler.score.weight):
            torch.nn.init.normal_(weight, std=0.02)
    return model.to(case.device).train(case.mode != "forward")


def cases(device: str) -> Iterator[Case]:
    sizes = {"B": 1, "N": 32, "K": 8, "S": 196, "M": 32, "C": 768, "H": 12}
    batches = {"forward": (1, 8), "both": (8,)}
    if device == "cpu":
        batches = {"forward": (1,), "both": (1,)}
    for mode, counts in batches.items():
        for batch in counts:
            yield from spread_over(
                Head(), {**sizes, "B": batch}, device, modes=(mode,), dtypes=("float32", "bfloat16")
            )
    if device == "cpu":
        sizes = {"V": 10, "B": 80, "N": 64, "K": 4, "S": 36, "M": 18, "C": 128, "H": 8}
        yield from spread_over(
            BundledHead(), sizes, device, modes=("both",), dtypes=("float32", "bfloat16")
        )
