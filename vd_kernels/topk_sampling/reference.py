"""topk_sample and topk_gather in plain PyTorch: the specification, and the oracle of the tests.

All functions take scores [R,N] in float32 or float64 in which a masked frame is -inf, and return
indices that are -1 in spare slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from vd_kernels._checks import full_precision
from vd_kernels.topk_sampling.noise import gumbel_noise, normal_noise

_CHUNK = 1 << 17  # perturbed scores at a time: larger temporaries are page-faulted anew each call

__all__ = ["gather", "gumbel", "gumbel_noise", "hard", "lapsum", "normal_noise", "perturbed"]


def choose(scores: Tensor, k: int, order: str) -> Tensor:
    """The k best of the last dimension [...,N] -> indices [...,k], spare slots -1 and last.

    Slots are in time order (ascending index), or with order "score" best first. Among equal scores
    the lowest index wins.
    """
    indices = _best_first(scores, k)
    spare = scores.gather(-1, indices) == -math.inf
    if order == "time":
        frames = scores.shape[-1]
        indices = indices.masked_fill(spare, frames).sort(-1).values
        spare = indices == frames
    return indices.masked_fill(spare, -1)


def _best_first(scores: Tensor, k: int) -> Tensor:
    """Indices [...,k] by descending score, then ascending index."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # torch.topk leaves ties open. A float32 and its index fit into one int64 whose order is that of
    # score, then index: all keys differ, and the faster topk can do no other than we want.
    last = scores.shape[-1] - 1
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, its equal
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    positions = torch.arange(last, -1, -1, device=scores.device)
    keys = (ascending.to(torch.int64) << 32) | positions
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def one_hot(indices: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
    """Weights [...,K,N] of one choice; zero rows in spare slots."""
    weights = torch.zeros(*indices.shape, frames, dtype=dtype, device=indices.device)
    chosen = (indices >= 0).to(dtype).unsqueeze(-1)
    return weights.scatter_(-1, indices.clamp(min=0).unsqueeze(-1), chosen)


def hard(scores: Tensor, k: int, order: str) -> tuple[Tensor, Tensor]:
    """The k best, without a gradient: weights [R,K,N], indices [R,K]."""
    indices = choose(scores.detach(), k, order)
    return one_hot(indices, scores.shape[-1], scores.dtype), indices


def perturbed(
    scores: Tensor, k: int, noise: Tensor, sigma: float, order: str, gradient: str
) -> tuple[Tensor, Tensor]:
    """Mean choice under noise Z [R,n,N]: weights[k,t] = count_i(I_i[k] = t) / n."""
    return _Perturbed.apply(scores, k, noise, sigma, order, gradient)


class _Perturbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        scores: Tensor,
        k: int,
        noise: Tensor,
        sigma: float,
        order: str,
        gradient: str,
    ) -> tuple[Tensor, Tensor]:
        rows, frames = scores.shape
        samples = noise.shape[1]
        indices = choose(scores, k, order)  # I_0
        # Every sample has as many real frames as its row, so I_i is spare where I_0 is.
        step = max(1, _CHUNK // max(1, samples * frames))
        parts = zip(scores.split(step), noise.split(step), strict=True)
        drawn = torch.cat([choose(x.unsqueeze(1) + sigma * z, k, order) for x, z in parts])
        cells = _cells(drawn, frames).flatten(1)
        counts = scores.new_zeros(rows, k * frames)
        counts.scatter_add_(1, cells, scores.new_ones(()).expand(cells.shape))
        weights = counts.view(rows, k, frames) / samples
        weights *= (indices >= 0).unsqueeze(-1)
        ctx.save_for_backward(scores, noise, indices, drawn)
        ctx.sigma, ctx.gradient = sigma, gradient
        ctx.mark_non_differentiable(indices)
        return weights, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scores, noise, indices, drawn = ctx.saved_tensors
        real = scores > -math.inf
        if ctx.sigma == 0:
            return torch.zeros_like(scores), None, None, None, None, None
        rule = _exact_gradient if ctx.gradient == "exact" else _diagonal_gradient
        grad = grad.masked_fill((indices < 0).unsqueeze(-1), 0.0)  # spare slots have no say
        result = (rule(grad, noise, indices, drawn) / ctx.sigma).masked_fill(~real, 0.0)
        return result, None, None, None, None, None


def _cells(indices: Tensor, frames: int) -> Tensor:
    """Positions of (slot k, frame indices[...,k]) in a flattened [K,N]; spare slots at frame 0."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return indices.clamp(min=0) + slots * frames


def _exact_gradient(grad: Tensor, noise: Tensor, indices: Tensor, drawn: Tensor) -> Tensor:
    """sigma * d loss/d scores, the full vector-Jacobian product with a leave-one-out baseline."""
    samples, frames = noise.shape[1:]
    flat = grad.flatten(1)
    # c_i = Σ_k (G[k,I_i[k]] - G[k,I_0[k]]): the difference first, so that it is exactly 0 where a
    # sample chose as the scores do, and no small sigma can blow up a rounding error.
    at_drawn = flat.gather(1, _cells(drawn, frames).flatten(1)).view(drawn.shape)
    at_best = flat.gather(1, _cells(indices, frames)).unsqueeze(1)
    gains = (at_drawn - at_best).sum(-1)
    if samples > 1:
        gains = (gains - gains.mean(-1, keepdim=True)) / (samples - 1)
    return torch.bmm(gains.unsqueeze(1), noise).squeeze(1)


def _diagonal_gradient(grad: Tensor, noise: Tensor, indices: Tensor, drawn: Tensor) -> Tensor:
    """sigma times what published code returns: 1/n Σ_k G[k,t] Σ_i [I_i[k] = t] Z_it."""
    samples, frames = noise.shape[1:]
    chosen_noise = noise.gather(-1, drawn.clamp(min=0)).flatten(1)
    summed = grad.new_zeros(grad.shape).flatten(1)
    summed.scatter_add_(1, _cells(drawn, frames).flatten(1), chosen_noise)
    return (grad * summed.view(grad.shape)).sum(1) / samples


def gumbel(
    scores: Tensor, k: int, noise: Tensor, temperature: float, order: str
) -> tuple[Tensor, Tensor]:
    """One draw of k frames without replacement; straight through the successive softmax."""
    return _Gumbel.apply(scores, k, noise, temperature, order)


class _Gumbel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, scores: Tensor, k: int, noise: Tensor, temperature: float, order: str
    ) -> tuple[Tensor, Tensor]:
        keys = scores + noise
        indices = choose(keys, k, order)
        ctx.save_for_backward(keys, indices)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(indices)
        return one_hot(indices, scores.shape[-1], scores.dtype), indices

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        keys, indices = ctx.saved_tensors
        k, frames = grad.shape[-2:]
        ranked = choose(keys, k, "score")  # frame picked j-th
        spare = (ranked < 0).unsqueeze(-1)
        # slot(j): where the j-th pick lies among the slots
        slots = (ranked.unsqueeze(-1) == indices.unsqueeze(-2)).to(torch.uint8).argmax(-1)
        paired = grad.gather(1, slots.unsqueeze(-1).expand(grad.shape)).masked_fill(spare, 0.0)
        # p_j = softmax(u / τ) over the frames not picked before j
        picked = one_hot(ranked, frames, torch.int8)
        gone = picked.cumsum(1) - picked > 0
        logits = (keys / ctx.temperature).unsqueeze(1).masked_fill(gone, -math.inf)
        shares = logits.masked_fill(spare, 0.0).softmax(-1)
        mean = (shares * paired).sum(-1, keepdim=True)
        result = (shares * (paired - mean)).sum(1) / ctx.temperature
        return result, None, None, None, None


def lapsum(scores: Tensor, k: int, temperature: float, order: str) -> tuple[Tensor, Tensor]:
    """A deterministic soft set: weights [R,N] in [0,1] that sum to k."""
    return _LapSum.apply(scores, k, temperature, order)


class _LapSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, scores: Tensor, k: int, temperature: float, order: str
    ) -> tuple[Tensor, Tensor]:
        real = scores > -math.inf
        few = real.sum(-1, keepdim=True) <= k  # nothing to choose: p = 1, no gradient
        offsets = _offsets(scores.double(), real, k, temperature)
        weights = _laplace_cdf(offsets).to(scores.dtype)
        weights = weights.masked_fill(few, 1.0).masked_fill(~real, 0.0)
        ctx.save_for_backward(offsets, real & ~few)
        ctx.temperature = temperature
        indices = choose(scores, k, order)
        ctx.mark_non_differentiable(indices)
        return weights, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        offsets, free = ctx.saved_tensors
        distance = offsets.abs().masked_fill(~free, math.inf)
        density = torch.exp(-distance) / (2 * ctx.temperature)  # q
        # Σ qG / Σ q with the largest q scaled to 1: far from b every q underflows, their ratio not
        nearest = distance.amin(-1, keepdim=True).masked_fill(~free.any(-1, keepdim=True), 0.0)
        shifted = torch.exp(nearest - distance)
        total = shifted.sum(-1, keepdim=True).clamp(min=torch.finfo(shifted.dtype).tiny)
        mean = (shifted * grad).sum(-1, keepdim=True) / total
        result = (density * (grad - mean)).masked_fill(~free, 0.0)
        return result.to(grad.dtype), None, None, None


def _offsets(scores: Tensor, real: Tensor, k: int, temperature: float) -> Tensor:
    """(x - b) / α with b such that Σ F((x - b) / α) = k over the real frames, by bisection."""
    # An all-masked row gets a bracket too; its weights are set to 0 afterwards.
    margin = temperature * math.log(2 * scores.shape[-1])
    low = scores.masked_fill(~real, math.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
    high = scores.masked_fill(~real, -math.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    low, high = low - margin, high + margin
    for _ in range(64):
        middle = (low + high) / 2
        too_many = _excess((scores - middle) / temperature, k) > 0
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (scores - (low + high) / 2) / temperature


def _excess(offsets: Tensor, k: int) -> Tensor:
    """Sign of Σ F(offsets) - k, [R,N] -> [R,1]; -inf adds nothing."""
    above = offsets > 0
    surplus = above.sum(-1, keepdim=True) - k
    missing = (-offsets).masked_fill(~above, -math.inf).logsumexp(-1, keepdim=True)
    added = offsets.masked_fill(above, -math.inf).logsumexp(-1, keepdim=True)
    # With exactly k above, the sum is k plus two tails that may be too small for 1 - tail to hold.
    return torch.where(surplus == 0, added - missing, surplus + (added.exp() - missing.exp()) / 2)


def _laplace_cdf(x: Tensor) -> Tensor:
    tail = 0.5 * torch.exp(-x.abs())
    return torch.where(x < 0, tail, 1 - tail)


def gather(values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Chosen values [R,K,E] from values [R,N,E] by weights [R,K,N], or [R,N] for a soft set."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    dtype = torch.promote_types(dtype, weights.dtype)
    with full_precision(values):
        if weights.dim() == 3:
            return torch.bmm(weights.to(dtype), values.to(dtype)).to(values.dtype)
        slots = indices.clamp(min=0)
        shares = weights.gather(1, slots).masked_fill(indices < 0, 0.0).unsqueeze(-1).to(dtype)
        chosen = values.gather(1, slots.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
        return (shares * chosen).to(values.dtype)
