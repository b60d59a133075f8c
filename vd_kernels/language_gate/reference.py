"""language_gate in plain PyTorch: the specification, and the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vd_kernels._checks import full_precision


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """g ⊙ value in value's dtype and g in query's, each if asked for; shapes as in the api."""
    with full_precision(query):
        inside = _Inside(query, key, gate_value, key_mask, bias, scale, reduction)
        gate = inside.gate
        out = None
        if value is not None:
            per_channel = gate if gate_value is not None else gate.unsqueeze(-1)
            out = (per_channel * value).to(value.dtype)
        return out, gate.to(query.dtype) if need_gate else None


def backward(
    grad_out: Tensor | None,
    grad_gate: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    gate_value: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, gate_value and bias, in their dtypes; None where not needed.

    Args:
        grad_out, grad_gate: of `forward`'s results; None means zero.
        needs: which of the five are wanted; never one that is None.
    """
    with full_precision(query):
        inside = _Inside(query, key, gate_value, key_mask, bias, scale, reduction)
        gate, dtype = inside.gate, inside.gate.dtype
        grad_value = grad = None
        if grad_out is not None:
            grad_out = grad_out.to(dtype)
            if needs[2]:
                per_channel = gate if gate_value is not None else gate.unsqueeze(-1)
                grad_value = (per_channel * grad_out).to(value.dtype)
            grad = grad_out * value.to(dtype)  # dL/dg
            if gate_value is None:
                grad = grad.sum(-1)
        if grad_gate is not None:
            grad = grad_gate.to(dtype) if grad is None else grad + grad_gate.to(dtype)
        if grad is None:
            grad = torch.zeros_like(gate)
        grad = grad * gate * (1 - gate)  # dL/d logit

        grad_query = grad_key = grad_gate_value = grad_bias = None
        if needs[4]:
            grad_bias = grad.sum((0, 1)).to(bias.dtype)
        if gate_value is not None and needs[3]:
            grad_gate_value = torch.einsum("bhlm,blhe->bmhe", inside.weights, grad)
            grad_gate_value = _zero_padding(grad_gate_value, key_mask).to(gate_value.dtype)
        if needs[0] or needs[1]:
            grad_scores = scale * inside.scores_gradient(grad)
            if needs[0]:
                grad_query = torch.einsum("bhlm,bmhd->blhd", grad_scores, inside.key)
                grad_query = grad_query.to(query.dtype)
            if needs[1]:
                grad_key = torch.einsum("bhlm,blhd->bmhd", grad_scores, inside.query)
                grad_key = _zero_padding(grad_key, key_mask).to(key.dtype)
        if needs[2] and grad_value is None:
            grad_value = torch.zeros_like(value)
        return grad_query, grad_key, grad_value, grad_gate_value, grad_bias


class _Inside:
    """What forward and backward both compute, in fp32 (float64 for float64)."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        gate_value: Tensor | None,
        key_mask: Tensor | None,
        bias: Tensor | None,
        scale: float,
        reduction: str,
    ):
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.reduction, self.key_mask = reduction, key_mask
        self.query, self.key = query.to(dtype), _zero_padding(key.to(dtype), key_mask)
        self.scores = scale * torch.einsum("blhd,bmhd->bhlm", self.query, self.key)  # s_ij
        # p_ij
        self.weights = _softmax(self.scores, key_mask) if reduction == "softmax" else None
        self.gate_value = None
        if gate_value is None:
            self.reduced = self._reduce()  # r_i [B,H,L]
            logits = self.reduced.transpose(1, 2)
        else:
            self.gate_value = _zero_padding(gate_value.to(dtype), key_mask)
            # Σ_j p_ij u_j [B,L,H,Dv]
            logits = torch.einsum("bhlm,bmhe->blhe", self.weights, self.gate_value)
        if bias is not None:
            logits = logits + bias.to(dtype)
        self.gate = torch.sigmoid(logits)

    def _reduce(self) -> Tensor:
        """One r_i per visual token from its scores [B,H,L,M]; 0 where no token is real."""
        scores, key_mask = self.scores, self.key_mask
        if scores.shape[-1] == 0:
            return scores.sum(-1)
        if self.reduction == "softmax":
            return (self.weights * scores).sum(-1)
        if self.reduction == "mean":
            return scores.sum(-1) / self._count()
        if key_mask is None:
            return scores.amax(-1)
        largest = _hide_padding(scores, key_mask).amax(-1)
        return largest.masked_fill(~key_mask.any(-1)[:, None, None], 0.0)

    def _count(self) -> Tensor | int:
        """Real tokens of each question, at least 1: [B,1,1]."""
        if self.key_mask is None:
            return self.scores.shape[-1]
        return self.key_mask.sum(-1).clamp(min=1)[:, None, None]

    def scores_gradient(self, grad: Tensor) -> Tensor:
        """dL/ds [B,H,L,M] from dL/d logit. What it holds at padding meets only zeroed keys."""
        scores = self.scores
        if scores.shape[-1] == 0:
            return torch.zeros_like(scores)
        if self.gate_value is not None:
            grad = torch.einsum("blhe,bmhe->bhlm", grad, self.gate_value)  # dL/dp
            return self.weights * (grad - (self.weights * grad).sum(-1, keepdim=True))
        grad = grad.transpose(1, 2).unsqueeze(-1)  # dL/dr [B,H,L,1]
        if self.reduction == "softmax":
            # dr/ds_j = p_j (1 + s_j - r)
            return grad * self.weights * (1 + scores - self.reduced.unsqueeze(-1))
        if self.reduction == "mean":
            count = self._count() if self.key_mask is None else self._count().unsqueeze(-1)
            return (grad / count).expand(scores.shape)
        # torch.max(dim) promises the first of equal maxima: the lowest j takes the gradient.
        visible = scores if self.key_mask is None else _hide_padding(scores, self.key_mask)
        best = visible.max(-1, keepdim=True).indices
        return torch.zeros_like(scores).scatter_(-1, best, grad)


def _softmax(scores: Tensor, key_mask: Tensor | None) -> Tensor:
    """p_ij over real j. With no real j it is uniform over padding, whose scores and values are 0:
    so r = 0, and the gradient ends at the zeroed padding."""
    return (scores if key_mask is None else _hide_padding(scores, key_mask)).softmax(-1)


def _hide_padding(scores: Tensor, key_mask: Tensor) -> Tensor:
    return scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)


def _zero_padding(tokens: Tensor, key_mask: Tensor | None) -> Tensor:
    """Padding may hold anything, NaN included: nothing of it may reach a sum."""
    return tokens if key_mask is None else tokens.masked_fill(~key_mask[:, :, None, None], 0.0)
