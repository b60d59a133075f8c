"""The public functions: what they mean, what they take, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels._checks import (
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_mask,
    check_number,
    check_shape,
    may_read_values,
    refuse_forward_mode,
)
from vd_kernels.topk_sampling import op


class TopKSample(NamedTuple):
    """A choice of K of N frames. Also what `topk_gather` takes."""

    weights: Tensor
    """[...,K,N], or [...,N] for "lapsum"; float32, float64 for float64 scores."""
    indices: Tensor
    """int64 [...,K]; -1 in spare slots."""
    slot_mask: Tensor
    """bool [...,K]; False in spare slots."""


def topk_sample(
    scores: Tensor,
    k: int,
    *,
    method: str = "perturbed",
    sigma: float = 0.05,
    num_samples: int = 128,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    noise: Tensor | None = None,
    order: str = "time",
    gradient: str = "exact",
) -> TopKSample:
    """Choose K of N frames by their scores, with a gradient for the scores.

    - "hard": the K best, one-hot weights, no gradient. What inference uses.
    - "perturbed": the mean of n choices under noise: I_i = top-K(scores + sigma Z_i) with Z_i
      standard normal, weights[k,t] = count_i(I_i[k] = t) / n. Its gradient is the full
      vector-Jacobian product, with G = d loss/d weights and I_0 the unperturbed choice:
      c_i = sum_k (G[k,I_i[k]] - G[k,I_0[k]]),
      grad_t = 1/((n-1) sigma) sum_i (c_i - mean c) Z_it; c_1 Z_1t / sigma for n = 1. It is exactly
      0 when no sample differs from I_0. sigma = 0 is the hard choice with zero gradient.
    - "gumbel": one draw without replacement, top-K(scores + Gumbel noise), one-hot weights;
      backward goes through the successive softmax p_j = softmax((scores + noise) / temperature over
      the frames not yet picked): grad = 1/temperature sum_j p_j * (G_j - <p_j, G_j>) with G_j the
      row of the slot that holds the j-th pick. For K = 1 this is `F.gumbel_softmax(hard=True)`.
    - "lapsum": a deterministic soft set of size K: weights [...,N] = F((scores - b) / temperature)
      with F the Laplace distribution function and b such that they sum to K.

    Masked frames are never chosen and have zero weight and gradient; a score of -inf counts as
    masked. A row with fewer real frames than K fills its spare slots with zero weights and index
    -1, slot_mask False. Among equal scores the lowest index wins.

    Args:
        scores: [...,N], float16, bfloat16, float32 or float64, any leading dimensions.
        k: frames to choose, 1 <= k <= N.
        method: "hard", "perturbed", "gumbel" or "lapsum".
        sigma: standard deviation of the perturbation, >= 0, in units of the scores.
        num_samples: n of "perturbed", >= 1.
        temperature: of "gumbel" and "lapsum", > 0, in units of the scores.
        mask: bool [...,N], True where a frame is real.
        seed: int, or int64 tensor with one element. With None one is drawn by `torch.randint` on
            scores' device, so that `torch.manual_seed` governs it; the ranks of a data-parallel run
            must not share one.
        row_offset: row number of the first row: a batch cut in two draws the same noise when the
            second part is given the size of the first (rows count over all leading dimensions).
        noise: Z to use instead: [...,n,N] (n then replaces num_samples), for "gumbel" [...,1,N].
        order: "time": slots in ascending index, "score": best first. indices and weights alike.
        gradient: of "perturbed". "exact" as above; "diagonal" keeps only the Jacobian's diagonal as
            published code does (google-research patch selection and its copies), which points
            elsewhere: for comparison with that code alone.

    Returns:
        TopKSample(weights, indices, slot_mask). Weights are float32 (float64 for float64 scores)
        [...,K,N], for "lapsum" [...,N]. indices [...,K] are those of the draw for "gumbel" and of
        the unperturbed choice otherwise.

    The noise is Philox-4x32-10, key the two halves of `seed`, counter (frame div 4, sample, row
    low, row high), word w serving frame 4 (frame div 4) + w; docs/noise.md specifies how words
    become normals and Gumbels. Same seed and row, same bits, whatever the batch split, machine or
    backend.

    Raises:
        TypeError: a dtype or type that is not allowed.
        ValueError: k below 1 or above N, a shape, word or range that does not fit; NaN or +inf in
            the score of a real frame, or a non-finite `noise` (not looked for while compiling or
            capturing, nor with the environment's VD_CHECK=0: then such a frame counts as masked).

    Source: differentiable sparse sampling of VideoDistill (arXiv 2404.00973). "perturbed": Berthet
    et al. 2020 (arXiv 2002.08676), Cordonnier et al. 2021 (arXiv 2104.03059). "gumbel": Kool et
    al. 2019 (arXiv 1903.06059). "lapsum": Struski et al. 2025.

    Example:
        >>> import torch
        >>> from vd_kernels import topk_gather, topk_sample
        >>> scores = torch.tensor([[0.1, 2.0, -1.0, 1.5]], requires_grad=True)
        >>> sample = topk_sample(scores, 2, sigma=0.5, seed=0)
        >>> sample.indices
        tensor([[1, 3]])
        >>> topk_gather(torch.randn(1, 4, 8), sample).sum().backward()
        >>> scores.grad.shape
        torch.Size([1, 4])
    """
    settings = (k, method, order, gradient, row_offset, sigma, num_samples, temperature)
    observed = _library.is_observed(scores, mask, seed, noise)
    if observed:
        refuse_forward_mode("topk_sample", scores)
        _check_sample(scores, mask, noise, *settings)
        run, ready = getattr(torch.ops.vd, f"topk_{method}").default, False
    else:
        run, ready = backends.planned(_plan_sample, (scores, mask, noise), settings)
    _check_seed(seed)
    if noise is not None and may_read_values(noise) and not noise.isfinite().all():
        raise ValueError("noise must be finite, got NaN or infinity")
    rows = scores if ready else _real_scores(scores, mask)
    if has_lead := scores.dim() != 2:
        rows = rows.reshape(math.prod(scores.shape[:-1]), scores.shape[-1])

    if method == "hard":
        choice = run(rows.detach() if observed else rows, k, order)
    elif method == "lapsum":
        choice = run(rows, k, float(temperature), order)
    else:
        if noise is not None:
            num_samples = noise.shape[-2]
            noise = noise.detach().reshape(len(rows), num_samples, rows.shape[1])
        # With noise at hand any seed will do, and none may be drawn.
        drawn = (_seed(0 if noise is not None else seed, scores.device), row_offset, noise)
        if method == "perturbed":
            choice = run(rows, k, float(sigma), num_samples, *drawn, order, gradient)
        else:  # in float32, by which keys are divided: neither it nor they may become 0 or infinite
            choice = run(rows, k, min(max(float(temperature), 2.0**-100), 2.0**127), *drawn, order)
    if has_lead:
        choice = (x.view(*scores.shape[:-1], *x.shape[1:]) for x in choice)
    return TopKSample(*choice)


def topk_gather(values: Tensor, sample: TopKSample) -> Tensor:
    """The chosen frames' values: out[b,k] = sum_n weights[b,k,n] values[b,n].

    Differentiable in values and in the weights, hence in the scores of `topk_sample`. Spare slots
    give 0. For a "lapsum" sample out[b,k] = weights[b,I_k] values[b,I_k]. As a sum over all frames
    it needs finite values in frames that were not chosen, too.

    Args:
        values: [B,N,...], or with the leading dimensions of the scores in place of B; floating.
        sample: what `topk_sample` returned.

    Returns:
        [B,K,...] in values' dtype; products and sums in float32, float64 where either is float64.

    Raises:
        TypeError: values or the sample's weights not floating, its indices not int64, sample not a
            TopKSample.
        ValueError: values' leading dimensions differ from the sample's, its weights' shape does not
            fit its indices, another device, or on a CPU an index that is not below N.

    Example:
        >>> import torch
        >>> from vd_kernels import topk_gather, topk_sample
        >>> patches, scores = torch.randn(2, 64, 36, 128), torch.randn(2, 64)
        >>> topk_gather(patches, topk_sample(scores, 8, method="hard")).shape
        torch.Size([2, 8, 36, 128])
    """
    if not isinstance(sample, TopKSample):
        raise TypeError(f"sample must be a TopKSample, got {type(sample).__name__}")
    weights, indices, _ = sample
    if _library.is_observed(values, weights, indices):
        refuse_forward_mode("topk_gather", values, weights)
        _check_gather(values, weights, indices)
        run = torch.ops.vd.topk_gather.default
    else:
        run = backends.planned(_plan_gather, (values, weights, indices), ())
    if indices.dim() == 2 and values.dim() == 3:
        return run(values, weights, indices)
    lead, frames = indices.shape[:-1], weights.shape[-1]
    inner = values.shape[len(lead) + 1 :]
    rows, slots = math.prod(lead), indices.shape[-1]
    gathered = run(
        values.reshape(rows, frames, math.prod(inner)),
        weights.reshape(rows, *weights.shape[len(lead) :]),
        indices.reshape(rows, slots),
    )
    return gathered.view(*lead, slots, *inner)


def _plan_gather(values: Tensor, weights: Tensor, indices: Tensor) -> Callable:
    """What runs, of checked arguments."""
    _check_gather(values, weights, indices)
    return op.choose("gather", values, weights, indices)


def _check_gather(values: Tensor, weights: Tensor, indices: Tensor) -> None:
    check_floating("values", values, "[B,N,...]")
    if indices.dtype != torch.int64:
        raise TypeError(f"sample.indices must be int64, got {indices.dtype}")
    check_floating("sample.weights", weights, "[...]")
    check_device("sample.indices", indices, "sample.weights", weights)
    lead, frames = indices.shape[:-1], weights.shape[-1]
    if weights.shape not in ((*indices.shape, frames), (*lead, frames)):
        raise ValueError(
            f"sample.weights must have the shape [B,K,N] or [B,N] of sample.indices "
            f"{tuple(indices.shape)}, got shape {tuple(weights.shape)}"
        )
    expected = (*lead, frames)
    if values.shape[: len(expected)] != expected:
        raise ValueError(
            f"values must begin with the scores' shape {expected}, got shape {tuple(values.shape)}"
        )
    check_device("values", values, "sample.weights", weights)


def _real_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores in float32 or float64 with -inf in every frame that is not to be chosen."""
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if not may_read_values(scores):
        return scores.masked_fill(~(scores < math.inf), -math.inf)
    # NaN or +inf; NaN is the maximum where there is one.
    if scores.numel() and not scores.max().item() < math.inf:
        raise op.unordered(int((~(scores < math.inf)).sum()), scores)
    return scores


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 tensor [], made on the device without waiting for it."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        # reshape and to, which change nothing of most seeds, take as long as all checks together
        return seed if seed.dim() == 0 and seed.device == device else seed.reshape(()).to(device)
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.scalar_tensor(signed, dtype=torch.int64, device=device)


def _plan_sample(
    scores: Tensor, mask: Tensor | None, noise: Tensor | None, k: int, method: str, *settings: Any
) -> tuple[Callable, bool]:
    """What runs, of checked arguments, and whether it takes the scores as they are."""
    _check_sample(scores, mask, noise, k, method, *settings)
    *_, sigma, num_samples, _ = settings
    samples = num_samples if noise is None else noise.shape[-2]
    run = op.choose(method, scores, k, sigma, samples)
    checked = run in op.REFUSES_UNORDERED and may_read_values(scores)
    return run, checked and mask is None and scores.dtype == torch.float32


def _check_sample(
    scores: Tensor,
    mask: Tensor | None,
    noise: Tensor | None,
    k: int,
    method: str,
    order: str,
    gradient: str,
    row_offset: int,
    sigma: float,
    num_samples: int,
    temperature: float,
) -> None:
    check_floating("scores", scores, "[...,N]")
    if scores.dim() == 0:
        raise ValueError("scores must be [...,N] with at least one dimension, got a scalar")
    frames = scores.shape[-1]
    check_integer("k", k)
    if not 1 <= k <= frames:
        raise ValueError(f"k must be between 1 and the number of frames N = {frames}, got {k}")
    check_choice("method", method, op.METHODS)
    check_choice("order", order, ("time", "score"))
    check_choice("gradient", gradient, ("exact", "diagonal"))
    check_integer("row_offset", row_offset, minimum=0)
    if mask is not None:
        check_mask("mask", mask)
        check_shape("mask", mask, scores.shape, "scores' shape [...,N]")
        check_device("mask", mask, "scores", scores)
    if noise is not None:
        _check_noise(noise, scores, method)
    if method == "perturbed":
        check_number("sigma", sigma, minimum=0, exclusive=False)
        check_integer("num_samples", num_samples, minimum=1)
    elif method in ("gumbel", "lapsum"):
        check_number("temperature", temperature, minimum=0, exclusive=True)


def _check_seed(seed: int | Tensor | None) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor with one element, "
                f"got {seed.dtype} with shape {tuple(seed.shape)}"
            )
    elif seed is not None:
        check_integer("seed", seed)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit into 64 bits, got {seed}")


def _check_noise(noise: Tensor, scores: Tensor, method: str) -> None:
    if method not in ("perturbed", "gumbel"):
        raise ValueError(f'noise goes with method "perturbed" or "gumbel", got method {method!r}')
    check_floating("noise", noise, "[...,n,N]")
    samples = 1 if method == "gumbel" or noise.dim() < 2 else max(1, noise.shape[-2])
    expected = (*scores.shape[:-1], samples, scores.shape[-1])
    check_shape("noise", noise, expected, "[...,1,N]" if method == "gumbel" else "[...,n,N]")
    check_device("noise", noise, "scores", scores)
