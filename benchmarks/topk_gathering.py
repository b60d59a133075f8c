"""Cases and baselines of `vd_kernels.topk_gather`: frames that one-hot weights choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import vd_kernels
from benchmarks.cases import Case, Contestant, Floor, Inputs, Task, normal, ours, spread_over
from vd_kernels import TopKSample


def with_one_hots(values: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor]:
    """As published: a product with the weights of all frames."""
    return (torch.einsum("bkn,bnc->bkc", weights.to(values.dtype), values),)


class _Selected(torch.autograd.Function):
    """Rows by index_select, gradients by index_add and one product."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        rows, frames = values.shape[:2]
        places = (indices + frames * torch.arange(rows, device=indices.device)[:, None]).flatten()
        ctx.save_for_backward(values, weights, places)
        chosen = values.flatten(0, 1).index_select(0, places)
        return chosen.view(*indices.shape, values.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        values, weights, places = ctx.saved_tensors
        spread = torch.zeros_like(values)
        spread.view(-1, values.shape[2]).index_add_(0, places, grad.flatten(0, 1))
        return spread, torch.bmm(grad, values.mT).to(weights.dtype), None


def selected(values: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor]:
    return (_Selected.apply(values, weights, indices),)


def gathered(values: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor]:
    """Without the weights, so that they have no gradient."""
    return (values.gather(1, indices[..., None].expand(-1, -1, values.shape[2])),)


def fused(values: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor]:
    sample = TopKSample(weights, indices, torch.ones_like(indices, dtype=torch.bool))
    return (vd_kernels.topk_gather(values, sample),)


class TopKGather(Task):
    """Of values [B,N,C] the K frames that are chosen, for one-hot weights [B,K,N]."""

    operator, variant = "topk_gather", "hard"
    differentiable = ("values", "weights")
    small: ClassVar = {"B": 2, "N": 7, "K": 3, "C": 20}

    def inputs(self, case: Case, seed: int, *, checking: bool) -> Inputs:
        b, n, k, c = (case.sizes[name] for name in "BNKC")
        scores = normal(seed, "scores", (b, n), case).float()
        indices = scores.topk(k).indices.sort(-1).values
        values = normal(seed, "values", (b, n, c), case)
        return {"values": values, "weights": F.one_hot(indices, n).float(), "indices": indices}

    def oracle(self, **inputs: Any) -> tuple[Tensor, ...]:
        return with_one_hots(**inputs)

    def contestants(self, case: Case) -> list[Contestant]:
        entries = [
            *ours(fused),
            Contestant("eager", with_one_hots),
            Contestant("torch.compile", with_one_hots, compiled=True),
            Contestant("eager without one-hots", selected),
            Contestant("torch.compile without one-hots", selected, compiled=True),
        ]
        if case.mode == "forward":
            entries.append(Contestant("torch.gather", gathered))
        return entries

    def floor(self, case: Case) -> Floor:
        """Forward: chosen frames in and out. Backward: grad and values in, their gradient out.

        The weights' gradient is a product of grad with all frames.
        """
        b, n, k, c = (case.sizes[name] for name in "BNKC")
        frames = {"forward": 2 * k, "backward": k + 2 * n, "both": 3 * k + 2 * n}[case.mode]
        return Floor(
            bytes=case.dtype.itemsize * b * frames * c,
            operations=0 if case.mode == "forward" else 2 * b * k * n * c,
        )


def cases(device: str) -> Iterator[Case]:
    sizes = {"B": 16 if device == "cuda" else 2, "N": 32, "K": 8, "C": 196 * 768}
    yield from spread_over(
        TopKGather(), sizes, device, modes=("forward", "both"), dtypes=("float32", "bfloat16")
    )
