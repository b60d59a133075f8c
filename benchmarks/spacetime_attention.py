"""Cases and baselines of `vd_kernels.spacetime_attention`: over time, within frames and jointly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import vd_kernels
from benchmarks.cases import (
    Case,
    Contestant,
    Floor,
    Function,
    Inputs,
    Task,
    curve,
    normal,
    ours,
    spread_over,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of query, key and value [B,T,S,H,D] along an axis."""

SDPA_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ),
}

# ---------------------------------------------------------------------------------------------
# How others attend


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, axis: str) -> Tensor:
    """The formula: [B,T,S,H,D] seen as groups [B,G,H,L,D]."""
    if axis == "joint":  # as if one frame had all patches
        q, k, v = (x.flatten(1, 2).unsqueeze(1) for x in (query, key, value))
        return softmax_attention(q, k, v, axis="space").view(query.shape)
    order = (0, 2, 3, 1, 4) if axis == "time" else (0, 1, 3, 2, 4)
    back = (0, 3, 1, 2, 4) if axis == "time" else (0, 1, 3, 2, 4)
    q, k, v = (x.permute(order) for x in (query, key, value))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).permute(back)


def permuted_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Over time as it is usually written: b t s h d -> (b s) h t d, a copy each, and back."""
    batch, _, patches = query.shape[:3]
    q, k, v = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(0, (batch, patches)).permute(0, 3, 1, 2, 4).contiguous()


def viewed(attend: Attend, query: Tensor, key: Tensor, value: Tensor, *, axis: str) -> Tensor:
    """Attention of [batch,heads,length,D] on views of [B,T,S,H,D] that copy nothing.

    Over time a patch's heads are as good as more heads; within frames a frame is a row more;
    jointly all frames are one sequence.
    """
    pair = {"time": (2, 3), "space": (0, 1), "joint": (1, 2)}[axis]
    q, k, v = (x.flatten(*pair).transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v).transpose(1, 2).reshape(query.shape)


def finished(attend: Attend) -> Function:
    """The whole task around an attention: prefixes joined before it, the gate applied after it."""

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None = None,
        prefix_query: Tensor | None = None,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        prefixes, shared = 0, ()
        if prefix_query is not None:
            prefixes = prefix_query.shape[2]
            pairs = ((prefix_query, query), (prefix_key, key), (prefix_value, value))
            query, key, value = (
                torch.cat([prefix.expand(-1, x.shape[1], -1, -1, -1), x], dim=2)
                for prefix, x in pairs
            )
        out = attend(query, key, value)
        if prefixes:
            shared = (out[:, :, :prefixes].mean(1),)
            out = out[:, :, prefixes:]
        return out if gate is None else out * gate, *shared

    return function


def fused(axis: str) -> Function:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None = None,
        **prefixes: Tensor,
    ) -> tuple[Tensor, ...]:
        result = vd_kernels.spacetime_attention(query, key, value, axis=axis, gate=gate, **prefixes)
        if not prefixes:
            return (result,)
        out, prefix_out = result
        return out, prefix_out.mean(1)

    return function


# ---------------------------------------------------------------------------------------------
# The task


@dataclass(frozen=True)
class Attention(Task):
    """Attention along an axis; with a gate for each channel, and a prefix that all frames share.

    With a prefix its outputs of all frames are averaged, as a CLS token's are.
    """

    axis: str
    gated: bool = False
    prefixes: int = 0

    operator = "spacetime_attention"
    small: ClassVar = {"B": 2, "T": 3, "S": 5, "H": 2, "D": 8}
    differentiable = (
        *("query", "key", "value", "gate"),
        *("prefix_query", "prefix_key", "prefix_value"),
    )

    @property
    def variant(self) -> str:
        return self.axis + "-gate" * self.gated + "-prefix" * bool(self.prefixes)

    def inputs(self, case: Case, seed: int, *, checking: bool) -> Inputs:
        b, t, s, h, d = (case.sizes[name] for name in "BTSHD")
        shapes = dict.fromkeys(("query", "key", "value"), (b, t, s, h, d))
        if self.gated:
            shapes["gate"] = (b, t, s, h, d)
        if self.prefixes:
            names = ("prefix_query", "prefix_key", "prefix_value")
            shapes |= dict.fromkeys(names, (b, 1, self.prefixes, h, d))
        drawn = {name: normal(seed, name, shape, case) for name, shape in shapes.items()}
        if self.gated:
            drawn["gate"] = drawn["gate"].sigmoid()
        return drawn

    def oracle(self, **inputs: Any) -> tuple[Tensor, ...]:
        return finished(functools.partial(softmax_attention, axis=self.axis))(**inputs)

    def contestants(self, case: Case) -> list[Contestant]:
        view = functools.partial(functools.partial, viewed, axis=self.axis)
        eager = finished(functools.partial(softmax_attention, axis=self.axis))
        entries = [
            *ours(fused(self.axis)),
            Contestant("eager", eager),
            Contestant("torch.compile", eager, compiled=True),
        ]
        if self.axis == "time":
            entries.append(Contestant("permute + SDPA", finished(permuted_sdpa)))
        sdpa = finished(view(F.scaled_dot_product_attention))
        for backend in SDPA_BACKENDS[case.device]:
            name = f"zero-copy SDPA {backend.name.removesuffix('_ATTENTION').lower()}"
            entries.append(Contestant(name, sdpa, context=functools.partial(sdpa_kernel, backend)))
        if self.gated or self.prefixes:  # what stands around SDPA can be fused
            entries.append(Contestant("zero-copy SDPA + torch.compile", sdpa, compiled=True))
        if case.device == "cuda":
            flex, skipped = flex_attention, ""
        else:
            # There it must see 4-D inputs, not views made in the same graph (torch 2.13).
            flex = torch.compile(flex_attention, dynamic=False)
            skipped = "" if case.mode == "forward" else "on CPUs it has no backward"
        entries.append(
            Contestant(
                "FlexAttention",
                finished(view(flex)),
                compiled=case.device == "cuda",
                skipped=skipped,
            )
        )
        return entries

    def floor(self, case: Case) -> Floor:
        """Forward: three in, one out. Backward: those three and grad in, three gradients out.

        A gate is read in both, and its gradient written; backward forms the scores anew, and the
        output too where the gate's gradient needs it.
        """
        b, t, s, h, d = (case.sizes[name] for name in "BTSHD")
        tokens, prefixes = b * t * s * h * d, b * self.prefixes * h * d
        gate = int(self.gated)
        passes = {"forward": 4 + gate, "backward": 7 + 2 * gate}
        products = {"forward": 2, "backward": 5 + gate}
        if case.mode == "both":
            moved, done = sum(passes.values()), sum(products.values())
        else:
            moved, done = passes[case.mode], products[case.mode]
        groups, length = {"time": (s, t), "space": (t, s), "joint": (1, t * s)}[self.axis]
        length += self.prefixes
        without_gate = moved - gate * {"forward": 1, "backward": 2, "both": 3}[case.mode]
        return Floor(
            bytes=case.dtype.itemsize * (moved * tokens + without_gate * prefixes),
            operations=2 * done * b * groups * h * length**2 * d,
        )


def cases(device: str) -> Iterator[Case]:
    batch = 8 if device == "cuda" else 4
    sizes = {"B": batch, "T": 16, "S": 196, "H": 12, "D": 64}
    time, space = Attention("time"), Attention("space")
    yield from spread_over(time, sizes, device)
    yield from spread_over(Attention("time", gated=True), sizes, device)
    yield from spread_over(time, {**sizes, "B": 1, "T": 4}, device, modes=("forward",))
    yield from spread_over(space, {**sizes, "S": 197}, device)
    yield from spread_over(Attention("space", gated=True, prefixes=1), sizes, device)
    yield from spread_over(
        Attention("joint"),
        {**sizes, "B": 8 if device == "cuda" else 1, "T": 8},
        device,
        modes=("forward",),
        dtypes=("float32", "bfloat16"),
    )
    tiny = {"B": 1, "T": 2, "S": 1, "H": 1, "D": 8}
    yield Case(time, tiny, torch.float32, "forward", device, repeats=200)
    yield from curve(time, {**sizes, "B": 1}, device, "T", (2, 4, 8, 16, 32, 64))
    yield from curve(time, sizes, device, "B", (1, 2, 4, 8))
    yield from curve(space, {**sizes, "B": 1}, device, "S", (49, 98, 196, 392, 576))
