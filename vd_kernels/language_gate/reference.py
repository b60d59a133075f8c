"""language_gate in plain PyTorch: the specification, and the oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from vd_kernels._checks import full_precision


def language_gate(
    query: Tensor,
    key: Tensor,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
) -> Tensor:
    """The gate g in fp32 (float64 for float64): [B,L,H], or [B,L,H,Dv] with `gate_value`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with full_precision(query):
        query, key = query.to(dtype), _zero_padding(key.to(dtype), key_mask)
        scores = scale * torch.einsum("blhd,bmhd->bhlm", query, key)  # s_ij, 0 at padding
        if gate_value is None:
            logits = _reduce(scores, key_mask, reduction).transpose(1, 2)  # r_i [B,L,H]
        else:
            gate_value = _zero_padding(gate_value.to(dtype), key_mask)
            weights = _softmax(scores, key_mask)
            logits = torch.einsum("bhlm,bmhe->blhe", weights, gate_value)  # Σ_j p_ij u_j
        if bias is not None:
            logits = logits + bias.to(dtype)
        return torch.sigmoid(logits)


def _reduce(scores: Tensor, key_mask: Tensor | None, reduction: str) -> Tensor:
    """One r_i per visual token from its scores [B,H,L,M]; 0 where no token is real."""
    if scores.shape[-1] == 0:
        return scores.sum(-1)
    if reduction == "softmax":
        return (_softmax(scores, key_mask) * scores).sum(-1)
    if reduction == "mean":
        if key_mask is None:
            return scores.mean(-1)
        return scores.sum(-1) / key_mask.sum(-1).clamp(min=1)[:, None, None]
    # torch.max(dim) promises the first of equal maxima, so the lowest j takes the gradient.
    if key_mask is None:
        return scores.max(-1).values
    largest = _hide_padding(scores, key_mask).max(-1).values
    return largest.masked_fill(~key_mask.any(-1)[:, None, None], 0.0)


def _softmax(scores: Tensor, key_mask: Tensor | None) -> Tensor:
    """p_ij over real j. With no real j it is uniform over padding, whose scores and values are 0:
    so r = 0, and the gradient ends at the zeroed padding."""
    return (scores if key_mask is None else _hide_padding(scores, key_mask)).softmax(-1)


def _hide_padding(scores: Tensor, key_mask: Tensor) -> Tensor:
    return scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)


def _zero_padding(tokens: Tensor, key_mask: Tensor | None) -> Tensor:
    """Padding may hold anything, NaN included: nothing of it may reach a sum."""
    return tokens if key_mask is None else tokens.masked_fill(~key_mask[:, :, None, None], 0.0)
