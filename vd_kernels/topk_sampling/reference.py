"""topk_sample and topk_gather in plain PyTorch: the specification, and the oracle of the tests.

All functions take scores [R,N] in float32 or float64 in which a masked frame is -inf, and return
indices that are -1 in spare slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vd_kernels._checks import full_precision
from vd_kernels.topk_sampling.noise import gumbel_noise, normal_noise

_CHUNK = 1 << 17  # perturbed scores at a time: larger temporaries are page-faulted anew each call


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
    scores: Tensor,
    k: int,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """Mean choice under noise Z [R,n,N]: weights[k,t] = count_i(I_i[k] = t) / n, and I_0.

    `gradient` is for backward alone.
    """
    rows, frames = scores.shape
    indices = choose(scores, k, order)  # I_0
    counts = scores.new_zeros(rows, k * frames)
    for part, z in _parts(normal_noise, scores, samples, seed, row_offset, noise):
        cells = _cells(choose(scores[part].unsqueeze(1) + sigma * z, k, order), frames).flatten(1)
        counts[part].scatter_add_(1, cells, scores.new_ones(()).expand(cells.shape))
    # Every sample has as many real frames as its row, so I_i is spare where I_0 is.
    # By a tensor: on a GPU torch multiplies by the inverse of a number, which is another rounding.
    weights = counts.view(rows, k, frames) / counts.new_full((), samples)
    return weights * (indices >= 0).unsqueeze(-1), indices


def perturbed_backward(
    grad: Tensor,
    scores: Tensor,
    indices: Tensor,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> Tensor:
    """Gradient of the scores from that of the weights; draws the same noise once more."""
    if sigma == 0:
        return torch.zeros_like(scores)
    rule = _exact_gradient if gradient == "exact" else _diagonal_gradient
    grad = grad.masked_fill((indices < 0).unsqueeze(-1), 0.0)  # spare slots have no say
    result = torch.empty_like(scores)
    for part, z in _parts(normal_noise, scores, samples, seed, row_offset, noise):
        drawn = choose(scores[part].unsqueeze(1) + sigma * z, indices.shape[1], order)
        result[part] = rule(grad[part], z, indices[part], drawn) / sigma
    return result.masked_fill(scores == -math.inf, 0.0)


def _parts(
    draw: Callable[..., Tensor],
    scores: Tensor,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, with their noise [rows,n,N] in the scores' dtype."""
    rows, frames = scores.shape
    step = max(1, _CHUNK // max(1, samples * frames))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        if noise is None:
            count = part.stop - part.start
            z = draw(count, samples, frames, seed, row_offset + start, scores.device)
        else:
            z = noise[part]
        yield part, z.to(scores.dtype)


def _cells(indices: Tensor, frames: int) -> Tensor:
    """Positions of (slot k, frame indices[...,k]) in a flattened [K,N]; spare slots at frame 0."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return indices.clamp(min=0) + slots * frames


def _exact_gradient(grad: Tensor, noise: Tensor, indices: Tensor, drawn: Tensor) -> Tensor:
    """sigma * d loss/d scores, the full vector-Jacobian product with a leave-one-out baseline."""
    samples, frames = noise.shape[1:]
    # In float64: where samples gain nearly the same, little is left of their sums.
    flat, noise = grad.double().flatten(1), noise.double()
    # c_i = Σ_k (G[k,I_i[k]] - G[k,I_0[k]]): the difference first, so that it is exactly 0 where a
    # sample chose as the scores do, and no small sigma can blow up a rounding error.
    at_drawn = flat.gather(1, _cells(drawn, frames).flatten(1)).view(drawn.shape)
    at_best = flat.gather(1, _cells(indices, frames)).unsqueeze(1)
    gains = (at_drawn - at_best).sum(-1)
    if samples > 1:
        gains = (gains - gains.mean(-1, keepdim=True)) / (samples - 1)
    return torch.bmm(gains.unsqueeze(1), noise).squeeze(1).to(grad.dtype)


def _diagonal_gradient(grad: Tensor, noise: Tensor, indices: Tensor, drawn: Tensor) -> Tensor:
    """sigma times what published code returns: 1/n Σ_k G[k,t] Σ_i [I_i[k] = t] Z_it."""
    samples, frames = noise.shape[1:]
    chosen_noise = noise.gather(-1, drawn.clamp(min=0)).flatten(1)
    summed = grad.new_zeros(grad.shape).flatten(1)
    summed.scatter_add_(1, _cells(drawn, frames).flatten(1), chosen_noise)
    return (grad * summed.view(grad.shape)).sum(1) / samples


def gumbel(
    scores: Tensor,
    k: int,
    temperature: float,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
) -> tuple[Tensor, Tensor]:
    """One draw of k frames without replacement: weights [R,K,N] and indices [R,K].

    `temperature` is for backward alone.
    """
    indices = choose(_keys(scores, seed, row_offset, noise), k, order)
    return one_hot(indices, scores.shape[-1], scores.dtype), indices


def gumbel_backward(
    grad: Tensor,
    scores: Tensor,
    indices: Tensor,
    temperature: float,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
) -> Tensor:
    """Gradient of the scores from that of the weights, through the successive softmax."""
    keys = _keys(scores, seed, row_offset, noise)
    k, frames = grad.shape[-2:]
    ranked = choose(keys, k, "score")  # frame picked j-th
    spare = (ranked < 0).unsqueeze(-1)
    # slot(j): where the j-th pick lies among the slots
    slots = (ranked.unsqueeze(-1) == indices.unsqueeze(-2)).to(torch.uint8).argmax(-1)
    paired = grad.gather(1, slots.unsqueeze(-1).expand(grad.shape)).masked_fill(spare, 0.0)
    # Less its value at the pick, G says the same, without cancellation where the pick has all of p.
    paired = paired - paired.gather(2, ranked.clamp(min=0).unsqueeze(-1))
    # p_j = softmax(u / τ) over the frames not picked before j
    picked = one_hot(ranked, frames, torch.int8)
    gone = picked.cumsum(1) - picked > 0
    logits = (keys / temperature).unsqueeze(1).masked_fill(gone, -math.inf)
    shares = logits.masked_fill(spare, 0.0).softmax(-1)
    mean = (shares * paired).sum(-1, keepdim=True)
    return (shares * (paired - mean)).sum(1) / temperature


def _keys(scores: Tensor, seed: Tensor, row_offset: int, noise: Tensor | None) -> Tensor:
    """u = x + g [R,N]."""
    rows, frames = scores.shape
    if noise is None:
        noise = gumbel_noise(rows, 1, frames, seed, row_offset, scores.device)
    return scores + noise[:, 0].to(scores.dtype)


def lapsum(scores: Tensor, k: int, temperature: float, order: str) -> tuple[Tensor, Tensor]:
    """A deterministic soft set: weights [R,N] in [0,1] that sum to k, and the k best [R,K]."""
    real = scores > -math.inf
    few = real.sum(-1, keepdim=True) <= k  # nothing to choose: p = 1, no gradient
    offsets = _offsets(scores.double(), real, k, temperature)
    weights = _laplace_cdf(offsets).to(scores.dtype)
    weights = weights.masked_fill(few, 1.0).masked_fill(~real, 0.0)
    return weights, choose(scores, k, order)


def lapsum_backward(grad: Tensor, scores: Tensor, k: int, temperature: float) -> Tensor:
    """Gradient of the scores from that of the weights; solves for b once more."""
    real = scores > -math.inf
    free = real & (real.sum(-1, keepdim=True) > k)
    offsets = _offsets(scores.double(), real, k, temperature)
    distance = offsets.abs().masked_fill(~free, math.inf)
    density = torch.exp(-distance) / (2 * temperature)  # q
    # Σ qG / Σ q with the largest q scaled to 1: far from b every q underflows, their ratio not
    nearest = distance.amin(-1, keepdim=True).masked_fill(~free.any(-1, keepdim=True), 0.0)
    shifted = torch.exp(nearest - distance)
    total = shifted.sum(-1, keepdim=True).clamp(min=torch.finfo(shifted.dtype).tiny)
    mean = (shifted * grad).sum(-1, keepdim=True) / total
    return (density * (grad - mean)).masked_fill(~free, 0.0).to(grad.dtype)


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
    dtype = _common_dtype(values, weights)
    with full_precision(values):
        if weights.dim() == 3:
            return torch.bmm(weights.to(dtype), values.to(dtype)).to(values.dtype)
        shares, chosen = _picked(values, weights, indices)
        return (shares.to(dtype) * chosen).to(values.dtype)


def gather_backward(
    grad: Tensor, values: Tensor, weights: Tensor, indices: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values and weights, those that are needed."""
    dtype = _common_dtype(values, weights)
    grad_values = grad_weights = None
    with full_precision(values):
        grad = grad.to(dtype)
        if weights.dim() == 3:
            if needs[0]:
                grad_values = torch.bmm(weights.to(dtype).transpose(1, 2), grad).to(values.dtype)
            if needs[1]:
                grad_weights = torch.bmm(grad, values.to(dtype).transpose(1, 2)).to(weights.dtype)
            return grad_values, grad_weights
        shares, chosen = _picked(values, weights, indices)
        slots = indices.clamp(min=0)
        if needs[0]:
            # Slots hold different frames; spare ones add 0 to frame 0.
            grad_values = torch.zeros(values.shape, dtype=dtype, device=values.device)
            grad_values.scatter_add_(1, _along(slots, values), shares.to(dtype) * grad)
            grad_values = grad_values.to(values.dtype)
        if needs[1]:
            own = (grad * chosen).sum(-1) * (indices >= 0)
            grad_weights = torch.zeros(weights.shape, dtype=dtype, device=values.device)
            grad_weights = grad_weights.scatter_add_(1, slots, own).to(weights.dtype)
        return grad_values, grad_weights


def _picked(values: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [R,K,1] and values [R,K,E] of the chosen frames; weight 0 in spare slots."""
    slots = indices.clamp(min=0)
    shares = weights.gather(1, slots).masked_fill(indices < 0, 0.0).unsqueeze(-1)
    return shares, values.gather(1, _along(slots, values))


def _along(slots: Tensor, values: Tensor) -> Tensor:
    return slots.unsqueeze(-1).expand(-1, -1, values.shape[-1])


def _common_dtype(values: Tensor, weights: Tensor) -> torch.dtype:
    dtype = torch.promote_types(values.dtype, torch.float32)
    return torch.promote_types(dtype, weights.dtype)
