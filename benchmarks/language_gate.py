"""Cases and baselines of `vd_kernels.language_gate`: most in its usual form, one gate per head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import vd_kernels
from benchmarks.cases import (
    MODES,
    Case,
    Contestant,
    Floor,
    Inputs,
    Task,
    curve,
    normal,
    ours,
    spread_over,
)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    gate_value: Tensor | None = None,
    reduction: str = "softmax",
) -> tuple[Tensor]:
    """The formula as it is usually written."""
    if reduction == "mean":  # of products with words: the product with their mean
        key = key.mean(1, keepdim=True)
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) * query.shape[-1] ** -0.5
    if gate_value is not None:
        logit = torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), gate_value)
        return ((logit + bias).sigmoid().to(value.dtype) * value,)
    soft = reduction == "softmax"
    relevance = (scores.softmax(-1) * scores).sum(-1) if soft else scores.amax(-1)  # [B,H,L]
    gate = (relevance.transpose(1, 2) + bias).sigmoid().to(value.dtype)
    return (gate.unsqueeze(-1) * value,)


def eager_bmm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    gate_value: Tensor | None = None,
    reduction: str = "softmax",
) -> tuple[Tensor]:
    """One batched product for each row: query stays where it is, and the scale goes to the key."""
    key = key * query.shape[-1] ** -0.5
    if reduction == "mean":
        key = key.mean(1, keepdim=True)
    rows = []
    for b, (q, k) in enumerate(zip(query, key, strict=True)):
        scores = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0))  # [H,L,M]
        if gate_value is not None:
            # Of bmm here torch.compile makes an error (torch 2.13).
            rows.append(scores.softmax(-1) @ gate_value[b].transpose(0, 1))
        elif reduction == "softmax":
            rows.append(torch.linalg.vecdot(scores.softmax(-1), scores))
        else:
            rows.append(scores.amax(-1))
    gate = (torch.stack(rows).transpose(1, 2) + bias).sigmoid().to(value.dtype)
    return ((gate if gate_value is not None else gate.unsqueeze(-1)) * value,)


def fused(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor]:
    return (vd_kernels.language_gate(query, key, value, **settings),)


@dataclass(frozen=True)
class LanguageGate(Task):
    """g * value, for query and value [B,L,H,D], key [B,M,H,D], bias [H].

    variant: "scalar", a gate for each head from the softmax of its scores; "max" or "mean" of them
        instead; or "channel", a gate for each channel, with gate_value [B,M,H,D] and bias [H,D].
    """

    variant: str = "scalar"

    operator = "language_gate"
    differentiable = ("query", "key", "value", "bias", "gate_value")
    small: ClassVar = {"B": 2, "L": 13, "M": 3, "H": 2, "D": 8}

    def inputs(self, case: Case, seed: int, *, checking: bool) -> Inputs:
        b, l, m, h, d = (case.sizes[name] for name in "BLMHD")  # noqa: E741
        shapes = {
            "query": (b, l, h, d),
            "key": (b, m, h, d),
            "value": (b, l, h, d),
            "bias": (h,),
        }
        if self.variant == "channel":
            shapes |= {"gate_value": (b, m, h, d), "bias": (h, d)}
        drawn = {name: normal(seed, name, shape, case) for name, shape in shapes.items()}
        reduction = self.variant if self.variant in ("max", "mean") else "softmax"
        return {**drawn, "reduction": reduction}

    def oracle(self, **inputs: Any) -> tuple[Tensor, ...]:
        return eager(**inputs)

    def contestants(self, case: Case) -> list[Contestant]:
        return [
            *ours(fused),
            Contestant("eager", eager),
            Contestant("eager bmm", eager_bmm),
            Contestant("torch.compile", eager, compiled=True),
            Contestant("torch.compile bmm", eager_bmm, compiled=True),
        ]

    def floor(self, case: Case) -> Floor:
        """Forward: query and value in, out out. Backward: those and grad in, two gradients out.

        A gate for each channel has a product more forward; with the mean there is one of one word.
        """
        b, l, m, h, d = (case.sizes[name] for name in "BLMHD")  # noqa: E741
        visual, words = b * l * h * d, b * m * h * d
        passes = {"forward": (3, 1), "backward": (5, 2), "both": (8, 3)}[case.mode]
        products = {"forward": 1, "backward": 3, "both": 4}[case.mode]
        if self.variant == "channel":
            passes, products = (passes[0], 2 * passes[1]), 2 * products
        elif self.variant == "mean":
            m = 1
        return Floor(
            bytes=case.dtype.itemsize * (passes[0] * visual + passes[1] * words),
            operations=2 * products * b * l * m * h * d,
        )


def cases(device: str) -> Iterator[Case]:
    task = LanguageGate()
    sizes = {"B": 16 if device == "cuda" else 2, "L": 16 * 197, "M": 32, "H": 12, "D": 64}
    yield from spread_over(task, sizes, device)
    for variant in ("channel", "max", "mean"):
        yield from spread_over(
            LanguageGate(variant), sizes, device, modes=MODES[:1], dtypes=("float32", "bfloat16")
        )
    tiny = {"B": 1, "L": 1, "M": 1, "H": 1, "D": 8}
    yield Case(task, tiny, torch.float32, MODES[0], device, repeats=200)
    yield from curve(task, sizes, device, "M", (8, 16, 32, 64, 128))
    yield from curve(task, sizes, device, "L", (197, 788, 3152, 12608))
    yield from curve(task, sizes, device, "B", (1, 2, 4, 8))
