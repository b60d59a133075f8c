"""spacetime_attention in plain PyTorch: the specification, and the oracle of the tests.

Tokens that attend to each other form a group: [B,T,S,H,D] is seen as [B,G,H,L,D], G groups of L
tokens, by permuting axes without a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vd_kernels._checks import full_precision


def spacetime_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    window: int | tuple[int, int, int] | None,
    grid: tuple[int, int] | None,
    causal: bool,
    key_mask: Tensor | None,
    prefix_query: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """out [B,T,S,H,D] and, with prefix queries, prefix_out [B,G,P,H,D], in query's dtype."""
    _, frames, patches, _, _ = query.shape
    dtype = query.dtype
    with full_precision(query):
        q, k, v = (group(_accumulable(x), axis) for x in (query, key, value))
        near = _neighbours(frames, patches, axis, window, grid, causal, query.device)  # [L,L]
        real = None
        if key_mask is not None:
            real = _real_keys(key_mask, patches, axis)  # [B,G,1,L]
            # Padding may hold anything, NaN included: 0 * NaN must not reach a sum.
            k, v = (x.masked_fill(~real.unsqueeze(-1), 0.0) for x in (k, v))
        prefixes = 0
        if prefix_key is not None:
            prefixes = prefix_key.shape[2]
            k = torch.cat([_prefix(prefix_key, k), k], dim=3)
            v = torch.cat([_prefix(prefix_value, v), v], dim=3)
            near, real = (
                None if m is None else F.pad(m, (prefixes, 0), value=True) for m in (near, real)
            )

        out = _attend(q, k, v, near, real, scale)
        out = ungroup(out, axis, frames, patches)
        if gate is not None:
            out = out * gate.to(out.dtype)
        prefix_out = None
        if prefix_query is not None:
            prefix_out = _attend(_prefix(prefix_query, q), k, v, None, real, scale)
            prefix_out = prefix_out.transpose(2, 3).to(dtype)
        return out.to(dtype), prefix_out


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


def _attend(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor | None, real: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * q k^T) v over the keys that each query may see; 0 where it sees none."""
    scores = (q @ k.transpose(-1, -2)).mul_(scale)  # [B,G,H,L,P+L]
    hidden = None if near is None else ~near
    if real is not None:
        absent = ~real.unsqueeze(-2)  # [B,G,1,1,P+L]
        hidden = absent if hidden is None else hidden | absent
    if hidden is None:
        return scores.softmax(-1) @ v
    # Added, so that the gradient needs no mask; the lowest finite number rather than -inf, so that
    # a row that sees nothing is uniform instead of NaN. Its keys and values are zeroed padding, so
    # it gives 0 and sends no gradient, unless a window hides real keys from it as well.
    lowest = torch.finfo(scores.dtype).min
    scores += torch.zeros(hidden.shape, dtype=scores.dtype, device=q.device).masked_fill_(
        hidden, lowest
    )
    weights = scores.softmax(-1)
    if near is not None and real is not None:
        weights = weights.masked_fill(hidden, 0.0)
    return weights @ v


def _neighbours(
    frames: int,
    patches: int,
    axis: str,
    window: int | tuple[int, int, int] | None,
    grid: tuple[int, int] | None,
    causal: bool,
    device: torch.device,
) -> Tensor | None:
    """bool [L,L]: which token of a group each of its tokens may see; None: all."""
    if axis == "time":
        if window is None and not causal:
            return None
        t = torch.arange(frames, device=device)
        back = t[:, None] - t[None, :]
        near = torch.ones_like(back, dtype=torch.bool) if window is None else back.abs() <= window
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
