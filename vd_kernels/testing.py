"""One suite for every backend: inputs, float64 oracles, tolerances, and the checks themselves.

Whoever adds a backend runs it by name:

    @pytest.mark.parametrize("check", suite("mine", device="cuda"), ids=str)
    def test_mine(check):
        check()

A check calls the public functions under `use_backend` and compares results and gradients with an
oracle: the formula in float64, by torch's own operations and autograd, which share no code with the
reference backend. What is allowed depends on the data: twice the error that the same formula makes
in the inputs' dtype, and a few roundings. Memory is poisoned meanwhile: what an operator forgets to
write is NaN.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vd_kernels.backends import use_backend
from vd_kernels.language_gate.api import language_gate
from vd_kernels.spacetime_attention.api import spacetime_attention
from vd_kernels.topk_sampling.api import TopKSample, topk_gather, topk_sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = ("language_gate", "spacetime_attention", "topk_sample", "topk_gather")
RUNS = 2
"""How often a check calls an operator, for the same bits. Once is enough where one thread computes
all in order."""

# ---------------------------------------------------------------------------------------------
# Inputs


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Standard normals that depend on shape and seed alone, not on device or dtype."""
    generator = torch.Generator().manual_seed(hash((seed, *shape)) % 2**63)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _sliced(x: Tensor) -> Tensor:
    """One of three neighbours in a fused tensor, as query is in the output of a qkv projection."""
    return torch.stack([x, x + 1, x - 1], dim=-2 if x.dim() > 1 else -1).unbind(-2)[0]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def _strided(x: Tensor) -> Tensor:
    """The last dimension, too, is not contiguous."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "sliced": _sliced,
    "transposed": _transposed,
    "strided": _strided,
}
"""The same values in other places of memory."""


def expanded(x: Tensor) -> Tensor:
    """The first row for all rows, with stride 0."""
    return x[:1].expand(x.shape)


# ---------------------------------------------------------------------------------------------
# Oracles: formulas in the dtype that they are given, by torch's own autograd


def gate_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    gate_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "softmax",
) -> tuple[Tensor, ...]:
    """(g ⊙ value, g), or (g,) without value, one question after the other."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for b in range(len(query)):
        words = slice(None) if key_mask is None else key_mask[b].nonzero().flatten()
        q, k = query[b].transpose(0, 1), key[b][words].transpose(0, 1)  # [H,L,D], [H,M,D]
        s = scale * q @ k.mT
        empty = s.shape[-1] == 0
        if gate_value is not None:
            u = gate_value[b][words].transpose(0, 1)
            logit = (s.softmax(-1) @ u).transpose(0, 1)  # [L,H,E]
        elif empty:
            logit = s.sum(-1).T
        elif reduction == "softmax":
            logit = (s.softmax(-1) * s).sum(-1).T
        elif reduction == "mean":
            logit = s.mean(-1).T
        else:
            logit = s.max(-1).values.T
        rows.append(logit if bias is None else logit + bias.to(logit.dtype))
    gate = torch.stack(rows).sigmoid()
    if value is None:
        return (gate,)
    return (gate if gate_value is not None else gate.unsqueeze(-1)) * value, gate


def attention_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axis: str,
    window: int | tuple[int, int, int] | None = None,
    grid: tuple[int, int] | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    prefix_query: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """(out,) or (out, prefix_out), over all tokens at once with a mask [T·S, T·S]."""
    batch, frames, patches = query.shape[:3]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    t = torch.arange(frames * patches, device=query.device) // max(1, patches)
    s = torch.arange(frames * patches, device=query.device) % max(1, patches)

    def apart(x: Tensor) -> Tensor:
        return (x[:, None] - x[None, :]).abs()

    together = torch.ones(len(t), len(t), dtype=torch.bool, device=query.device)
    if axis == "time":
        together &= apart(s) == 0
        if window is not None:
            together &= apart(t) <= window
        if causal:
            together &= t[:, None] >= t[None, :]
    else:
        if axis == "space":
            together &= apart(t) == 0
        if window is not None:
            row, column = s // grid[1], s % grid[1]
            for x, reach in zip((t, row, column), window, strict=True):
                together &= apart(x) <= reach
    visible = together.expand(batch, -1, -1)
    real = torch.ones(batch, len(t), dtype=torch.bool, device=query.device)
    if key_mask is not None:
        full = key_mask if key_mask.dim() == 3 else key_mask[..., None].expand(-1, -1, patches)
        real = full.flatten(1)
        visible = visible & real[:, None]

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(1, 2).transpose(1, 2)  # [B,H,T·S,D]

    q, k, v = map(tokens, (query, key, value))
    k, v = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (k, v))
    groups = {"time": s, "space": t, "joint": torch.zeros_like(t)}[axis]
    count = {"time": patches, "space": frames, "joint": 1}[axis]
    if prefix_key is not None:
        # The prefixes of all groups stand in front; a token sees those of its own group.
        size = prefix_key.shape[2]
        front = torch.arange(count, device=query.device).repeat_interleave(size)
        own = (groups[:, None] == front[None, :]).expand(batch, -1, -1)
        visible = torch.cat([own, visible], dim=-1)
        k, v = (
            torch.cat([p.expand(-1, count, -1, -1, -1).flatten(1, 2).transpose(1, 2), x], dim=2)
            for p, x in ((prefix_key, k), (prefix_value, v))
        )
    out = _attend(q, k, v, visible, scale).transpose(1, 2).unflatten(1, (frames, patches))
    if gate is not None:
        out = out * gate.to(out.dtype)
    if prefix_query is None:
        return (out,)
    queries = prefix_query.expand(-1, count, -1, -1, -1).flatten(1, 2).transpose(1, 2)
    members = (front[:, None] == groups[None, :]) & real[:, None]
    own = (front[:, None] == front[None, :]).expand(batch, -1, -1)
    seen = _attend(queries, k, v, torch.cat([own, members], dim=-1), scale)
    return out, seen.transpose(1, 2).unflatten(1, (count, size))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Weights as exp over their sum, 0 where nothing is visible."""
    scores = (scale * q @ k.mT).masked_fill(~visible[:, None], -math.inf)
    largest = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)
    largest = largest.detach().masked_fill(largest == -math.inf, 0.0)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)) @ v


def best(scores: Sequence[float], k: int, order: str) -> list[int]:
    """The k best frames: -inf never, among equals the lowest index, -1 in spare slots."""
    real = [t for t, score in enumerate(scores) if score > -math.inf]
    chosen = sorted(real, key=lambda t: (-scores[t], t))[:k]
    chosen = sorted(chosen) if order == "time" else chosen
    return chosen + [-1] * (k - len(chosen))


def perturbed_oracle(
    scores: Tensor, grad: Tensor, k: int, noise: Tensor, sigma: float, order: str
) -> tuple[Tensor, Tensor]:
    """Weights [R,K,N] and gradient [R,N] of scores [R,N], as docs/operators.md has them, in loops.

    Choices are made in the scores' dtype, sums in float64.
    """
    weights = torch.zeros(*grad.shape, dtype=torch.float64)
    result = torch.zeros(*scores.shape, dtype=torch.float64)
    samples = noise.shape[1]
    for r, x in enumerate(scores):
        usual = best(x.tolist(), k, order)
        gains = torch.zeros(samples, dtype=torch.float64)
        for i in range(samples):
            drawn = best((x + sigma * noise[r, i]).tolist(), k, order)
            for slot, (frame, base) in enumerate(zip(drawn, usual, strict=True)):
                if frame >= 0:
                    weights[r, slot, frame] += 1 / samples
                    gains[i] += (grad[r, slot, frame] - grad[r, slot, base]).double()
        if samples > 1:
            gains = (gains - gains.mean()) / (samples - 1)
        if sigma:
            result[r] = (gains[:, None] * noise[r].double()).sum(0) / sigma
    return weights, result.masked_fill(scores == -math.inf, 0.0)


# ---------------------------------------------------------------------------------------------
# What is allowed


def tolerance(exact: Tensor, rounded: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of the formula in low precision, and four roundings of the largest value.

    Args:
        exact: By the oracle in float64.
        rounded: By the oracle in ``dtype``.
        dtype: Of the inputs.
    """
    if exact.numel() == 0:
        return 0.0
    error = (rounded.double() - exact).abs().nan_to_num(0.0).max().item()
    return 2 * error + 4 * torch.finfo(dtype).eps * max(1e-3, exact.abs().max().item())


def assert_near(name: str, result: Tensor, exact: Tensor, allowed: float) -> None:
    """AssertionError with what differs, where and by how much."""
    assert result.shape == exact.shape, f"{name}: shape {result.shape}, expected {exact.shape}"
    if result.numel() == 0:
        return
    error = (result.double() - exact).abs()
    wrong = ~(error <= allowed)  # NaN counts as wrong
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} differ by more than {allowed:.3g}, "
            f"the first at {where}: {result[where].item()}, expected {exact[where].item()}"
        )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, or the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


# ---------------------------------------------------------------------------------------------
# The suite


@dataclass(frozen=True)
class Check:
    """One thing that must hold of a backend; call it, it raises AssertionError."""

    name: str
    run: Callable[[], None] = field(repr=False)

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return self.name


def suite(
    backend: str,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = DTYPES,
    operators: Sequence[str] = OPERATORS,
) -> list[Check]:
    """All checks of a backend on a device.

    Args:
        backend: As `use_backend` takes it.
        device: Where inputs lie.
        dtypes: Of query, key, value and the like, and of gathered values.
        operators: That the backend has; a check's name begins with its operator's.
    """
    makers = {
        "language_gate": lambda: _gate_checks(backend, device, dtypes),
        "spacetime_attention": lambda: _attention_checks(backend, device, dtypes),
        "topk_sample": lambda: _choice_checks(backend, device),
        "topk_gather": lambda: _gather_checks(backend, device, dtypes),
    }
    return [check for operator in operators for check in makers[operator]()]


def _compare(
    backend: str,
    function: Callable[..., Any],
    oracle: Callable[..., tuple[Tensor, ...]],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    grad_layout: Callable[[Tensor], Tensor],
) -> None:
    """Results and gradients of a function against its oracle; RUNS times, for the same bits."""
    given = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    runs = []
    with use_backend(backend), poisoned():
        for _ in range(RUNS):
            out = function(**given, **settings)
            out = out if isinstance(out, tuple) else (out,)
            grads = [
                grad_layout(normal(*x.shape, seed=i, dtype=x.dtype, device=x.device))
                for i, x in enumerate(out)
            ]
            runs.append([*out, *torch.autograd.grad(out, list(given.values()), grads)])
    for again in runs[1:]:
        for one, other in zip(runs[0], again, strict=True):
            assert torch.equal(one, other), "a second run gave other bits"

    def by_oracle(precision: Callable[[Tensor], torch.dtype]) -> list[Tensor]:
        inputs = {n: x.detach().to(precision(x)).requires_grad_() for n, x in tensors.items()}
        out = oracle(**inputs, **settings)
        cast = [g.to(x.dtype) for g, x in zip(grads, out, strict=True)]
        found = torch.autograd.grad(out, list(inputs.values()), cast, allow_unused=True)
        return [
            *out,
            *(
                torch.zeros_like(x) if g is None else g
                for g, x in zip(found, inputs.values(), strict=True)
            ),
        ]

    exact = by_oracle(lambda x: torch.float64)
    rounded = by_oracle(lambda x: x.dtype)
    names = [*(f"result {i}" for i in range(len(out))), *(f"gradient of {n}" for n in given)]
    for name, result, true, low in zip(names, runs[0], exact, rounded, strict=True):
        assert_near(name, result, true.detach(), tolerance(true.detach(), low.detach(), dtype))
    for name, x in given.items():
        gradient = runs[0][len(out) + list(given).index(name)]
        assert gradient.dtype == x.dtype and gradient.shape == x.shape


def _gate_checks(backend: str, device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    def check(name: str, dtype: torch.dtype, sizes: Sequence[int], **options: Any) -> Check:
        batch, length, tokens, heads, width, channels = sizes
        layout = options.pop("layout", LAYOUTS["contiguous"])
        grad_layout = options.pop("grad_layout", LAYOUTS["contiguous"])
        channelwise, with_value = options.pop("channel", False), options.pop("value", True)

        def run() -> None:
            def make(*shape: int, seed: int) -> Tensor:
                return layout(normal(*shape, seed=seed, dtype=dtype, device=device))

            tensors = {
                "query": make(batch, length, heads, width, seed=0),
                "key": make(batch, tokens, heads, width, seed=1),
            }
            if with_value:
                tensors["value"] = make(batch, length, heads, channels, seed=2)
            if channelwise:
                tensors["gate_value"] = make(batch, tokens, heads, channels, seed=3)
            shape = (heads, channels) if channelwise else (heads,)
            tensors["bias"] = normal(*shape, seed=4, device=device)
            settings = dict(options)
            if settings.pop("mask", True):
                settings["key_mask"] = normal(batch, tokens, seed=5, device=device) > -0.5
                settings["key_mask"][1:2] = False
            function = language_gate
            if with_value:

                def function(**given: Any) -> Any:
                    return language_gate(**given, return_gate=True)

            _compare(backend, function, gate_oracle, tensors, settings, dtype, grad_layout)

        return Check(f"language_gate-{name}-{str(dtype)[6:]}", run)

    odd = [
        (1, 1, 1, 1, 1, 1),
        (2, 13, 3, 3, 8, 13),
        (3, 197, 13, 2, 64, 64),
        (1, 257, 33, 1, 40, 3),
        (2, 21, 150, 3, 20, 17),
    ]
    for dtype in dtypes:
        for sizes in odd:
            name = "x".join(map(str, sizes))
            for reduction in ("softmax", "max", "mean"):
                yield check(f"{reduction}-{name}", dtype, sizes, reduction=reduction)
            yield check(f"channel-{name}", dtype, sizes, channel=True)
        yield check("gate-alone", dtype, odd[1], value=False)
        yield check("channel-alone", dtype, odd[1], channel=True, value=False)
        yield check("no-mask-scale", dtype, odd[1], mask=False, scale=0.3)
        for layout in ("sliced", "transposed", "strided"):
            yield check(layout, dtype, odd[1], layout=LAYOUTS[layout])
            yield check(f"{layout}-gradient", dtype, odd[1], grad_layout=LAYOUTS[layout])
        yield check("expanded", dtype, odd[1], layout=expanded)
        yield check("expanded-gradient", dtype, odd[1], grad_layout=expanded)
        for empty in range(4):
            sizes = list(odd[1])
            sizes[empty] = 0
            if empty != 0:  # the oracle wants a batch
                yield check(f"empty-{'BLMH'[empty]}", dtype, sizes)


def _attention_checks(backend: str, device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    def check(
        name: str, dtype: torch.dtype, sizes: Sequence[int], axis: str, **options: Any
    ) -> Check:
        batch, frames, patches, heads, width = sizes
        layout = options.pop("layout", LAYOUTS["contiguous"])
        grad_layout = options.pop("grad_layout", LAYOUTS["contiguous"])
        gate, mask = options.pop("gate", None), options.pop("mask", None)
        prefix, shared = options.pop("prefix", 0), options.pop("shared", False)
        with_queries = options.pop("prefix_queries", True)

        def run() -> None:
            def make(*shape: int, seed: int) -> Tensor:
                return layout(normal(*shape, seed=seed, dtype=dtype, device=device))

            tensors = {
                name: make(*sizes, seed=i) for i, name in enumerate(("query", "key", "value"))
            }
            groups = 1 if shared else {"time": patches, "space": frames, "joint": 1}[axis]
            names = ("prefix_query", "prefix_key", "prefix_value")[0 if with_queries else 1 :]
            for i, name in enumerate(names if prefix else ()):
                tensors[name] = make(batch, groups, prefix, heads, width, seed=10 + i)
            if gate is not None:
                shape = [n if kept else 1 for n, kept in zip(sizes, gate, strict=True)]
                tensors["gate"] = normal(*shape, seed=20, device=device)
            settings = {"axis": axis, **options}
            if mask is not None:
                real = normal(*(batch, frames, patches)[:mask], seed=30, device=device) > -0.5
                real[1:2] = False
                settings["key_mask"] = real
            _compare(
                backend,
                spacetime_attention,
                attention_oracle,
                tensors,
                settings,
                dtype,
                grad_layout,
            )

        return Check(f"spacetime_attention-{axis}-{name}-{str(dtype)[6:]}", run)

    odd = [(1, 1, 1, 1, 1), (2, 3, 13, 2, 8), (1, 13, 3, 3, 64), (2, 4, 9, 1, 40)]
    grid = {"grid": (3, 3)}
    for dtype in dtypes:
        for axis, sizes in itertools.product(("time", "space", "joint"), odd):
            yield check("x".join(map(str, sizes)), dtype, sizes, axis)
        yield check("long", dtype, (1, 197, 2, 1, 16), "time")
        yield check("large", dtype, (1, 2, 257, 1, 16), "space")
        yield check("causal", dtype, odd[2], "time", causal=True)
        yield check("causal-window", dtype, odd[2], "time", causal=True, window=2, mask=2)
        yield check("window", dtype, odd[2], "time", window=1)
        yield check("window", dtype, odd[3], "space", window=(0, 1, 1), **grid)
        yield check("window", dtype, odd[3], "joint", window=(1, 0, 2), mask=3, **grid)
        far = {"mask": 3, "prefix": 2}  # reaches over several tiles, not all of them
        yield check("far", dtype, (1, 75, 2, 1, 8), "time", causal=True, window=20, **far)
        near = {"window": (1, 1, 2), "grid": (15, 5)}
        yield check("far", dtype, (1, 2, 75, 1, 8), "space", **near, **far)
        near = {"window": (1, 1, 2), "grid": (3, 5)}
        yield check("far", dtype, (1, 6, 15, 1, 8), "joint", **near, **far, prefix_queries=False)
        for axis in ("time", "space", "joint"):
            for kept in ((1, 1, 1, 1, 0), (1, 0, 1, 1, 1), (0, 0, 0, 1, 1), (1, 1, 1, 1, 1)):
                name = "gate-" + "".join(map(str, kept))
                yield check(name, dtype, odd[1], axis, gate=kept)
            yield check("mask-frames", dtype, odd[1], axis, mask=2)
            yield check("mask-patches-gate", dtype, odd[1], axis, mask=3, gate=(1, 1, 1, 1, 0))
            yield check("prefix", dtype, odd[1], axis, prefix=2, mask=3)
            yield check("prefix-shared", dtype, odd[1], axis, prefix=1, shared=True)
            yield check("prefix-seen", dtype, odd[1], axis, prefix=1, prefix_queries=False)
            for layout in ("sliced", "transposed", "strided"):
                yield check(layout, dtype, odd[1], axis, layout=LAYOUTS[layout])
                yield check(f"{layout}-gradient", dtype, odd[1], axis, grad_layout=LAYOUTS[layout])
            yield check("expanded", dtype, odd[1], axis, layout=expanded)
            yield check("expanded-gradient", dtype, odd[1], axis, grad_layout=expanded)
            yield check("scale", dtype, odd[1], axis, scale=0.9)


def _choice_checks(backend: str, device: str) -> Iterator[Check]:
    def scores(rows: int, frames: int) -> Tensor:
        x = normal(rows, frames, device=device)
        x[:, frames // 2 :: 5] = x[:, :1].clone()  # ties
        if rows > 1:
            x[0, 1::3] = -math.inf
            x[-1, 1:] = -math.inf  # fewer real frames than K
        return x

    def same_as_reference(rows: int, frames: int, k: int, **options: Any) -> None:
        """Backends agree on every choice, bit for bit, and on gradients up to rounding."""
        x = scores(rows, frames)
        found = {}
        for name in ("reference", backend):
            with use_backend(name), poisoned():
                given = x.clone().requires_grad_()
                sample = topk_sample(given, k, **options)
                grad = None
                if sample.weights.requires_grad:
                    grad = normal(*sample.weights.shape, seed=1, device=device)
                    (grad,) = torch.autograd.grad(sample.weights, given, grad)
                found[name] = (*sample, grad)
        weights, indices, slots, grad = found[backend]
        other = found["reference"]
        assert torch.equal(indices, other[1]) and torch.equal(slots, other[2])
        if options["method"] == "lapsum":
            assert_near("weights", weights, other[0].double(), 1e-5)
        else:
            assert torch.equal(weights, other[0])
        if grad is not None:
            allowed = 1e-5 * max(1.0, other[3].abs().max().item())
            assert_near("gradient", grad, other[3].double(), allowed)

    def as_the_formula(samples: int, order: str) -> None:
        x, noise = scores(3, 13), normal(3, samples, 13, seed=2, device=device)
        grad = normal(3, 4, 13, seed=3, device=device)
        with use_backend(backend), poisoned():
            given = x.clone().requires_grad_()
            sample = topk_sample(given, 4, noise=noise, sigma=0.5, order=order)
            (found,) = torch.autograd.grad(sample.weights, given, grad)
        weights, expected = perturbed_oracle(x.cpu(), grad.cpu(), 4, noise.cpu(), 0.5, order)
        assert_near("weights", sample.weights.cpu(), weights, 1e-6)
        assert_near("gradient", found.cpu(), expected, 1e-4 * expected.abs().max().item() + 1e-6)

    for samples, order in itertools.product((1, 7), ("time", "score")):
        yield Check(
            f"topk_sample-formula-{samples}-{order}",
            lambda samples=samples, order=order: as_the_formula(samples, order),
        )
    sizes = [(1, 1, 1), (3, 13, 4), (2, 197, 8), (2, 257, 64), (5, 64, 13)]
    methods: dict[str, dict[str, Any]] = {
        "hard": {"method": "hard"},
        "perturbed": {"method": "perturbed", "sigma": 0.5, "num_samples": 9, "seed": 3},
        "diagonal": {
            "method": "perturbed",
            "sigma": 0.5,
            "num_samples": 9,
            "seed": -7,
            "gradient": "diagonal",
        },
        "gumbel": {"method": "gumbel", "temperature": 0.7, "seed": 2**40 + 1, "row_offset": 5},
        "lapsum": {"method": "lapsum", "temperature": 0.2},
    }
    for (name, options), size, order in itertools.product(
        methods.items(), sizes, ("time", "score")
    ):
        yield Check(
            f"topk_sample-{name}-{'x'.join(map(str, size))}-{order}",
            lambda size=size, options=options, order=order: same_as_reference(
                *size, order=order, **options
            ),
        )


def _gather_checks(backend: str, device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    def gathered(values: Tensor, weights: Tensor, sample: TopKSample) -> Tensor:
        return topk_gather(values, sample._replace(weights=weights))

    def oracle(values: Tensor, weights: Tensor, sample: TopKSample) -> tuple[Tensor, ...]:
        if weights.dim() == 2:
            shares = weights.gather(1, sample.indices.clamp(min=0)) * sample.slot_mask
            weights = F.one_hot(sample.indices.clamp(min=0), weights.shape[1]) * shares[..., None]
        wide = torch.promote_types(values.dtype, weights.dtype)
        return (torch.einsum("bkn,bne->bke", weights.to(wide), values.to(wide)).to(values.dtype),)

    def check(method: str, dtype: torch.dtype, layout: str, grad_layout: str) -> Check:
        def run() -> None:
            x = normal(3, 13, device=device)
            x[0, 2:] = -math.inf
            with use_backend("reference"):
                sample = topk_sample(x, 4, method=method, sigma=0.5, num_samples=7, seed=0)
            values = LAYOUTS[layout](normal(3, 13, 5, dtype=dtype, device=device))
            _compare(
                backend,
                gathered,
                oracle,
                {"values": values, "weights": sample.weights},
                {"sample": sample},
                dtype,
                LAYOUTS[grad_layout],
            )

        return Check(f"topk_gather-{method}-{layout}-{grad_layout}-{str(dtype)[6:]}", run)

    for method, dtype in itertools.product(("hard", "perturbed", "gumbel", "lapsum"), dtypes):
        for layout in LAYOUTS:
            yield check(method, dtype, layout, "contiguous")
            yield check(method, dtype, "contiguous", layout)
