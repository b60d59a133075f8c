"""spacetime_attention in plain PyTorch: the specification, and the oracle of the tests.

Tokens that attend to each other form a group: [B,T,S,H,D] is seen as [B,G,H,L,D], G groups of L
tokens, by permuting axes without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vd_kernels._checks import full_precision


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """out [B,T,S,H,D] and, with prefix queries, prefix_out [B,G,P,H,D], in query's dtype.

    window is (frames,) for axis "time", (t, h, w) otherwise.
    """
    dtype = query.dtype
    with full_precision(query):
        seen = _Seen(
            query, key, value, axis, window, grid, causal, key_mask, prefix_key, prefix_value
        )
        out = ungroup(seen.attend(seen.query, scale) @ seen.value, axis, *query.shape[1:3])
        if gate is not None:
            out = out * gate.to(out.dtype)
        prefix_out = None
        if prefix_query is not None:
            weights = seen.attend(_prefix(prefix_query, seen.query), scale, near=False)
            prefix_out = (weights @ seen.value).transpose(2, 3).to(dtype)
        return out.to(dtype), prefix_out


def backward(
    grad_out: Tensor | None,
    grad_prefix_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, the three prefixes and the gate; None where not needed.

    Args:
        grad_out, grad_prefix_out: of `forward`'s results; None means zero.
        needs: which of the seven are wanted; never one that is None.
    """
    inputs = (query, key, value, prefix_query, prefix_key, prefix_value, gate)
    frames, patches = query.shape[1:3]
    with full_precision(query):
        seen = _Seen(
            query, key, value, axis, window, grid, causal, key_mask, prefix_key, prefix_value
        )
        grad_key, grad_value = torch.zeros_like(seen.key), torch.zeros_like(seen.value)
        grads: list[Tensor | None] = [None] * 7
        if grad_out is not None:
            grad_out = _accumulable(grad_out)
            weights = seen.attend(seen.query, scale)
            if needs[6]:
                out = ungroup(weights @ seen.value, axis, frames, patches)
                grads[6] = (grad_out * out).sum_to_size(gate.shape)
            if gate is not None:
                grad_out = grad_out * gate.to(grad_out.dtype)
            grad_query, *others = seen.gradients(group(grad_out, axis), seen.query, weights, scale)
            grads[0] = ungroup(grad_query, axis, frames, patches)
            grad_key, grad_value = grad_key + others[0], grad_value + others[1]
        if grad_prefix_out is not None:
            queries = _prefix(prefix_query, seen.query)
            weights = seen.attend(queries, scale, near=False)
            grad_query, *others = seen.gradients(
                _accumulable(grad_prefix_out).transpose(2, 3), queries, weights, scale
            )
            grads[3] = grad_query.transpose(2, 3).sum_to_size(prefix_query.shape)
            grad_key, grad_value = grad_key + others[0], grad_value + others[1]
        for i, grad in ((1, grad_key), (2, grad_value)):
            prefix, tokens = grad.split((seen.prefixes, grad.shape[3] - seen.prefixes), dim=3)
            grads[i] = ungroup(tokens, axis, frames, patches)
            if prefix_key is not None:
                grads[3 + i] = prefix.transpose(2, 3).sum_to_size(inputs[3 + i].shape)
        return tuple(
            None if not needed else torch.zeros_like(x) if grad is None else grad.to(x.dtype)
            for grad, x, needed in zip(grads, inputs, needs, strict=True)
        )


class _Seen:
    """Queries [B,G,H,L,D], and the keys and values [B,G,H,P+L,D] that they see, prefixes first."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        axis: str,
        window: Sequence[int] | None,
        grid: Sequence[int] | None,
        causal: bool,
        key_mask: Tensor | None,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
    ):
        frames, patches = query.shape[1:3]
        q, k, v = (group(_accumulable(x), axis) for x in (query, key, value))
        near = _neighbours(frames, patches, axis, window, grid, causal, query.device)  # [L,L]
        real = None
        if key_mask is not None:
            real = _real_keys(key_mask, patches, axis)  # [B,G,1,L]
            # Padding may hold anything, NaN included: 0 * NaN must not reach a sum.
            k, v = (x.masked_fill(~real.unsqueeze(-1), 0.0) for x in (k, v))
        self.prefixes = 0
        if prefix_key is not None:
            self.prefixes = prefix_key.shape[2]
            k = torch.cat([_prefix(prefix_key, k), k], dim=3)
            v = torch.cat([_prefix(prefix_value, v), v], dim=3)
            near, real = (
                None if m is None else F.pad(m, (self.prefixes, 0), value=True)
                for m in (near, real)
            )
        self.query, self.key, self.value, self.near, self.real = q, k, v, near, real

    def attend(self, query: Tensor, scale: float, near: bool = True) -> Tensor:
        """p = softmax(scale * q k^T) over the keys that each query may see; 0 at the others."""
        scores = (query @ self.key.transpose(-1, -2)).mul_(scale)
        hidden = ~self.near if near and self.near is not None else None
        if self.real is not None:
            absent = ~self.real.unsqueeze(-2)  # [B,G,1,1,P+L]
            hidden = absent if hidden is None else hidden | absent
        if hidden is None:
            return scores.softmax(-1)
        # The lowest finite number rather than -inf: a row that sees nothing is uniform, not NaN.
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill_(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)

    def gradients(
        self, grad: Tensor, query: Tensor, weights: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values, from that of p v and from p itself."""
        grad_value = weights.transpose(-1, -2) @ grad
        grad_weights = grad @ self.value.transpose(-1, -2)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = scale * weights * (grad_weights - mean)
        return grad_scores @ self.key, grad_scores.transpose(-1, -2) @ query, grad_value


def group(x: Tensor, axis: str) -> Tensor:
    """[B,T,S,H,D] -> [B,G,H,L,D]."""
    if axis == "time":
        return x.permute(0, 2, 3, 1, 4)  # G = S, L = T
    if axis == "space":
        return x.permute(0, 1, 3, 2, 4)  # G = T, L = S
    return x.flatten(1, 2).unsqueeze(1).transpose(2, 3)  # G = 1, L = T * S


def ungroup(x: Tensor, axis: str, frames: int, patches: int) -> Tensor:
    """[B,G,H,L,D] -> [B,T,S,H,D]."""
    if axis == "time":
        return x.permute(0, 3, 1, 2, 4)
    if axis == "space":
        return x.permute(0, 1, 3, 2, 4)
    return x.squeeze(1).transpose(1, 2).unflatten(1, (frames, patches))


def _neighbours(
    frames: int,
    patches: int,
    axis: str,
    window: Sequence[int] | None,
    grid: Sequence[int] | None,
    causal: bool,
    device: torch.device,
) -> Tensor | None:
    """bool [L,L]: which token of a group each of its tokens may see; None: all."""
    if axis == "time":
        if window is None and not causal:
            return None
        t = torch.arange(frames, device=device)
        back = t[:, None] - t[None, :]
        near = (
            torch.ones_like(back, dtype=torch.bool) if window is None else back.abs() <= window[0]
        )
        return near & (back >= 0) if causal else near
    if window is None:
        return None
    position = torch.arange(frames * patches if axis == "joint" else patches, device=device)
    width = grid[1]
    near = torch.ones(len(position), len(position), dtype=torch.bool, device=device)
    coordinates = (position // patches, position % patches // width, position % width)
    for coordinate, reach in zip(coordinates, window, strict=True):
        near &= (coordinate[:, None] - coordinate[None, :]).abs() <= reach
    return near


def _real_keys(key_mask: Tensor, patches: int, axis: str) -> Tensor:
    """bool [B,T] or [B,T,S] -> [B,G,1,L]."""
    if key_mask.dim() == 2:
        key_mask = key_mask.unsqueeze(-1).expand(-1, -1, patches)
    return group(key_mask[..., None, None], axis).squeeze(-1)


def _prefix(prefix: Tensor, like: Tensor) -> Tensor:
    """[B,G or 1,P,H,D] -> [B,G,H,P,D]."""
    groups = like.shape[1]
    return _accumulable(prefix).transpose(2, 3).expand(-1, groups, -1, -1, -1)


def _accumulable(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
