"""spacetime_attention against its formula in float64 loops, and what must hold of it."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vd_kernels import backends, spacetime_attention, use_backend
from vd_kernels.spacetime_attention import op

AXES = ("time", "space", "joint")
HALF = torch.randn(1, 8, 6, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
PREFIX = torch.zeros(1, 1, 1, 2, 16)


def sees(axis: str, a: tuple, b: tuple, window: object, grid: object, causal: bool) -> bool:
    """Whether token a = (t, s) attends to token b, by its axis, window and order."""
    (ta, sa), (tb, sb) = a, b
    if axis == "time":
        near = window is None or abs(ta - tb) <= window
        return sa == sb and near and not (causal and tb > ta)
    if axis == "space" and ta != tb:
        return False
    if window is None:
        return True
    (ya, xa), (yb, xb) = divmod(sa, grid[1]), divmod(sb, grid[1])
    return abs(ta - tb) <= window[0] and abs(ya - yb) <= window[1] and abs(xa - xb) <= window[2]


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    if not keys:
        return torch.zeros_like(q)
    scores = [scale * float(torch.dot(q, k)) for k in keys]
    total = sum(math.exp(s) for s in scores)
    return sum(math.exp(s) / total * v for s, v in zip(scores, values, strict=True))


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axis: str,
    window: object = None,
    grid: object = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One token and head at a time, every other token looked at in turn."""
    batch, frames, patches, heads, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    tokens = list(itertools.product(range(frames), range(patches)))
    groups = {"time": patches, "space": frames, "joint": 1}[axis]
    out = torch.zeros_like(q)
    prefix_out = (
        None if prefix is None else q.new_zeros(batch, groups, prefix[1].shape[2], heads, width)
    )

    def group_of(t: int, s: int) -> int:
        return {"time": s, "space": t, "joint": 0}[axis]

    def of_prefix(b: int, g: int, h: int) -> Iterator[list[Tensor]]:
        for x in () if prefix is None else prefix:
            yield [x[b, min(g, x.shape[1] - 1), p, h] for p in range(x.shape[2])]

    for b, h in itertools.product(range(batch), range(heads)):
        real = [
            (t, s)
            for t, s in tokens
            if key_mask is None or (key_mask[b, t] if key_mask.dim() == 2 else key_mask[b, t, s])
        ]
        for t, s in tokens:
            near = [x for x in real if sees(axis, (t, s), x, window, grid, causal)]
            _, pk, pv = of_prefix(b, group_of(t, s), h) if prefix else ([], [], [])
            keys = pk + [k[b, i, j, h] for i, j in near]
            values = pv + [v[b, i, j, h] for i, j in near]
            out[b, t, s, h] = attend(q[b, t, s, h], keys, values, scale)
        for g in range(groups if prefix else 0):
            pq, pk, pv = of_prefix(b, g, h)
            near = [x for x in real if group_of(*x) == g]
            keys = pk + [k[b, i, j, h] for i, j in near]
            values = pv + [v[b, i, j, h] for i, j in near]
            for p, query in enumerate(pq):
                prefix_out[b, g, p, h] = attend(query, keys, values, scale)
    return (out if gate is None else out * gate), prefix_out


def inputs(*shape: int, count: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)
    )


def masks(batch: int, frames: int, patches: int) -> list[Tensor]:
    """Some frames; some patches; and the first row of the batch without anything real."""
    generator = torch.Generator().manual_seed(5)
    of_frames = torch.rand(batch, frames, generator=generator) > 0.4
    of_patches = torch.rand(batch, frames, patches, generator=generator) > 0.4
    of_frames[0], of_patches[0] = False, False
    return [of_frames, of_patches]


SHAPES = [(1, 1, 1, 1, 1), (2, 3, 6, 2, 4), (2, 13, 1, 1, 3), (1, 1, 13, 2, 5)]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula(shape: tuple[int, ...], axis: str) -> None:
    q, k, v = inputs(*shape)
    gate = torch.rand(*shape, dtype=torch.float64)
    for key_mask in [None, *masks(*shape[:3])]:
        expected, _ = oracle(q, k, v, axis, key_mask=key_mask, gate=gate)
        out = spacetime_attention(q, k, v, axis=axis, key_mask=key_mask, gate=gate)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


REACHES = [
    ("time", {"causal": True}),
    ("time", {"window": 0}),
    ("time", {"window": 1}),
    ("time", {"window": 2, "causal": True}),
    ("space", {"window": (0, 1, 0), "grid": (2, 3)}),
    ("space", {"window": (0, 0, 1), "grid": (2, 3)}),
    ("joint", {"window": (1, 1, 1), "grid": (2, 3)}),
    ("joint", {"window": (0, 9, 9), "grid": (3, 2)}),
]


@pytest.mark.parametrize(("axis", "reach"), REACHES)
def test_window_and_causal_order_are_the_formula(axis: str, reach: dict) -> None:
    shape = (2, 4, 6, 1, 3)
    q, k, v = inputs(*shape)
    for key_mask in [None, *masks(*shape[:3])]:
        expected, _ = oracle(q, k, v, axis, key_mask=key_mask, **reach)
        out = spacetime_attention(q, k, v, axis=axis, key_mask=key_mask, **reach)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("axis", "reach"), [(axis, {}) for axis in AXES] + [REACHES[3], REACHES[6]]
)
def test_prefix_tokens_are_the_formula(axis: str, reach: dict, shared: bool) -> None:
    shape = (2, 4, 6, 2, 3)
    q, k, v = inputs(*shape)
    groups = {"time": 6, "space": 4, "joint": 1}[axis]
    prefix = inputs(2, 1 if shared else groups, 2, 2, 3, seed=1)
    names = {"prefix_query": prefix[0], "prefix_key": prefix[1], "prefix_value": prefix[2]}
    gate = torch.rand(2, 4, 6, 2, 1, dtype=torch.float64)
    for key_mask in [None, *masks(2, 4, 6)]:
        expected, expected_prefix = oracle(
            q, k, v, axis, key_mask=key_mask, prefix=prefix, gate=gate, **reach
        )
        out, prefix_out = spacetime_attention(
            q, k, v, axis=axis, key_mask=key_mask, gate=gate, **names, **reach
        )
        assert prefix_out.shape == (2, groups, 2, 2, 3)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prefix_out, expected_prefix, rtol=1e-12, atol=1e-12)
    del names["prefix_query"]
    alone = spacetime_attention(q, k, v, axis=axis, key_mask=key_mask, gate=gate, **names, **reach)
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("axis", "reach"), [(axis, {}) for axis in AXES] + [REACHES[3]])
def test_gradients(axis: str, reach: dict, masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 3, 2, 1, 2))
    gate = torch.rand(2, 1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    key_mask = masks(2, 3, 2)[1] if masked else None

    def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return spacetime_attention(q, k, v, axis=axis, key_mask=key_mask, gate=gate, **reach)

    assert torch.autograd.gradcheck(attention, (q, k, v, gate))


@pytest.mark.parametrize("axis", AXES)
def test_prefix_gradients(axis: str) -> None:
    tokens = tuple(x.requires_grad_() for x in inputs(1, 2, 2, 1, 2))
    prefix = tuple(x.requires_grad_() for x in inputs(1, 1, 1, 1, 2, seed=1))

    def attention(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> tuple[Tensor, Tensor]:
        names = dict(zip(("prefix_query", "prefix_key", "prefix_value"), prefix, strict=True))
        key_mask = torch.tensor([[True, False]])
        return spacetime_attention(q, k, v, axis=axis, key_mask=key_mask, **names)

    assert torch.autograd.gradcheck(attention, (*tokens, *prefix))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize(("axis", "reach"), [("time", {}), ("joint", {}), REACHES[2], REACHES[4]])
def test_padding_may_hold_anything(axis: str, reach: dict, garbage: float) -> None:
    q, k, v = inputs(2, 4, 6, 1, 3)
    key_mask = masks(2, 4, 6)[1]
    results = []
    for filler in (0.0, garbage):
        padded = [x.masked_fill(~key_mask[..., None, None], filler) for x in (k, v)]
        leaves = [x.clone().requires_grad_() for x in (q, *padded)]
        out = spacetime_attention(*leaves, axis=axis, key_mask=key_mask, **reach)
        out.square().sum().backward()
        results.append((out, *(x.grad for x in leaves)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(("axis", "reach"), [("time", {}), ("space", {}), ("joint", {}), *REACHES])
def test_rows_without_a_real_key_give_nothing(axis: str, reach: dict) -> None:
    leaves = [x.requires_grad_() for x in inputs(2, 4, 6, 1, 3)]
    key_mask = torch.ones(2, 4, 6, dtype=torch.bool)
    key_mask[0] = False
    out = spacetime_attention(*leaves, axis=axis, key_mask=key_mask, **reach)
    assert not out[0].any() and out[1].all()
    out.square().sum().backward()
    for x in leaves:
        assert not x.grad[0].any()
        assert x.grad.isfinite().all()
    assert leaves[2].grad[1].any()


def test_a_window_that_holds_no_real_key_gives_nothing() -> None:
    """The key that is real lies outside: it must not be taken in its stead."""
    leaves = [x.requires_grad_() for x in inputs(1, 4, 1, 1, 3)]
    key_mask = torch.tensor([[False, False, False, True]])
    out = spacetime_attention(*leaves, axis="time", window=1, key_mask=key_mask)
    assert not out[:, :2].any()
    assert torch.equal(out[:, 2:], leaves[2][:, 3:].expand(-1, 2, -1, -1, -1))
    out[:, :2].sum().backward()
    assert not any(x.grad.any() for x in leaves)


@pytest.mark.parametrize("axis", AXES)
def test_equals_scaled_dot_product_attention(axis: str) -> None:
    q, k, v = (x.float() for x in inputs(2, 5, 7, 3, 16))
    flat = {
        "time": lambda x: x.permute(0, 2, 3, 1, 4).reshape(14, 3, 5, 16),
        "space": lambda x: x.permute(0, 1, 3, 2, 4).reshape(10, 3, 7, 16),
        "joint": lambda x: x.flatten(1, 2).transpose(1, 2),
    }[axis]
    expected = F.scaled_dot_product_attention(flat(q), flat(k), flat(v))
    out = flat(spacetime_attention(q, k, v, axis=axis))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(), (1,), (2, 1), (2, 3, 4, 2, 1), (2, 1, 1, 2, 5), (3, 1, 1, 1), (2, 3, 4, 2, 5)]
)
def test_gate_multiplies_and_its_gradient_has_its_shape(shape: tuple[int, ...]) -> None:
    q, k, v = inputs(2, 3, 4, 2, 5)
    gate = torch.rand(shape, dtype=torch.float32, requires_grad=True)
    plain = spacetime_attention(q, k, v, axis="space")
    weight = torch.randn_like(plain)
    gated = spacetime_attention(q, k, v, axis="space", gate=gate)
    torch.testing.assert_close(gated, plain * gate.double())
    (gated * weight).sum().backward()
    expected = (plain * weight).sum_to_size(shape) if shape else (plain * weight).sum()
    torch.testing.assert_close(gate.grad, expected.float())


@pytest.mark.parametrize("axis", AXES)
def test_any_strides_give_the_same(axis: str) -> None:
    q, k, v = inputs(2, 3, 4, 2, 5)
    expected = spacetime_attention(q, k, v, axis=axis)
    fused = torch.stack([q, k, v], dim=3).requires_grad_()  # [B,T,S,3,H,D]: one projection's output
    out = spacetime_attention(*fused.unbind(3), axis=axis)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = inputs(5, 2, 3, 4, 2, count=1, seed=2)[0].permute(
        1, 2, 3, 4, 0
    )  # last dimension strided
    out.backward(grad)
    spacetime_attention(*leaves, axis=axis).backward(grad.contiguous())
    for strided, plain in zip(fused.grad.unbind(3), leaves, strict=True):
        torch.testing.assert_close(strided, plain.grad, rtol=1e-12, atol=1e-12)

    first = k[:, :1].expand(-1, 3, -1, -1, -1)
    turned = v.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)
    out = spacetime_attention(q, first, turned, axis=axis)
    copied = spacetime_attention(q, first.contiguous(), v, axis=axis)
    torch.testing.assert_close(out, copied, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 5), (2, 0, 4, 2, 5), (2, 3, 0, 2, 5)])
@pytest.mark.parametrize("axis", AXES)
def test_empty_batch_time_or_space(shape: tuple[int, ...], axis: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(*shape)]
    key_mask = torch.ones(shape[:2], dtype=torch.bool)
    out = spacetime_attention(*leaves, axis=axis, key_mask=key_mask)
    assert out.shape == shape
    out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, 5, 4, 2, 32))
    gate = torch.rand(2, 5, 4, 2, 1)
    out = spacetime_attention(q, k, v, axis="time", gate=gate)
    exact = spacetime_attention(q.double(), k.double(), v.double(), axis="time", gate=gate)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_casts_inputs_and_keeps_sums_in_float32() -> None:
    q, k, v = (x.float().requires_grad_() for x in inputs(2, 5, 4, 2, 32))
    low = [x.detach().bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = spacetime_attention(q, low[1], v, axis="space")
    assert torch.equal(out, spacetime_attention(*low, axis="space"))
    out.sum().backward()
    assert v.grad.dtype == torch.float32 and v.grad.any()


@pytest.mark.parametrize("axis", ["time", "space"])
def test_more_sequences_than_a_grid_dimension_holds(axis: str) -> None:
    """300,000 of them: the last ones as they are alone."""
    shape = (1, 2, 300_000, 1, 4) if axis == "time" else (1, 300_000, 2, 1, 4)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = spacetime_attention(q, k, v, axis=axis)
    dim = 2 if axis == "time" else 1
    last = [x.narrow(dim, 299_000, 1000) for x in (q, k, v)]
    alone = spacetime_attention(*last, axis=axis)
    torch.testing.assert_close(out.narrow(dim, 299_000, 1000), alone)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.float() for x in inputs(1, 4, 3, 1, 8))
    out = spacetime_attention(1e4 * q, 1e4 * k, v, axis="time", causal=True)
    assert out.isfinite().all()


X, P = torch.zeros(2, 3, 6, 2, 4), torch.zeros(2, 1, 1, 2, 4)


@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "words"),
    [
        ((None, X, X), {}, TypeError, "query must be a tensor"),
        ((X.int(), X, X), {}, TypeError, "query must be float16.*got int32"),
        ((X[0], X, X), {}, ValueError, r"query must be \[B,T,S,H,D\], got shape \(3, 6, 2, 4\)"),
        ((X, X[:, :2], X), {}, ValueError, "key must be query's shape"),
        ((X, X, X.half()), {}, TypeError, "value must have query's dtype float32, got float16"),
        ((X, X, X.to("meta")), {}, ValueError, "value must be on query's device"),
        ((X[..., :0],) * 3, {}, ValueError, "head size"),
        ((X, X, X), {"axis": "depth"}, ValueError, 'axis must be one of "time", "space", "joint"'),
        ((X, X, X), {"axis": "space", "causal": True}, ValueError, 'causal needs axis="time"'),
        ((X, X, X), {"window": (1, 1, 1)}, TypeError, "window must be an int, got tuple"),
        ((X, X, X), {"window": -1}, ValueError, "window must be at least 0, got -1"),
        (
            (X, X, X),
            {"axis": "joint", "window": 1},
            TypeError,
            r"window must be 3 ints \(t, h, w\)",
        ),
        ((X, X, X), {"axis": "joint", "window": (1, 1, 1)}, ValueError, "needs grid"),
        ((X, X, X), {"grid": (2, 2)}, ValueError, r"grid must have h \* w = S = 6, got \(2, 2\)"),
        ((X, X, X), {"grid": 6}, TypeError, r"grid must be 2 ints \(h, w\), got 6"),
        ((X, X, X), {"key_mask": torch.ones(2, 3)}, TypeError, "key_mask must be a bool tensor"),
        ((X, X, X), {"key_mask": torch.ones(2, 6).bool()}, ValueError, r"key_mask must be \[B,T\]"),
        ((X, X, X), {"gate": torch.ones(3)}, ValueError, "gate must be broadcastable"),
        (
            (X, X, X),
            {"gate": torch.ones(1, 1, 1, 1, 1, 1)},
            ValueError,
            "gate must be broadcastable",
        ),
        ((X, X, X), {"gate": torch.ones(1).int()}, TypeError, "gate must be float16"),
        ((X, X, X), {"scale": math.inf}, ValueError, "scale must be a finite number"),
        ((X, X, X), {"prefix_key": P}, ValueError, "prefix_key and prefix_value go together"),
        ((X, X, X), {"prefix_query": P}, ValueError, "prefix_query needs prefix_key"),
        (
            (X, X, X),
            {"prefix_key": P, "prefix_value": P.expand(2, 5, 1, 2, 4)},
            ValueError,
            r"prefix_value must be \[B,G or 1,P,H,D\]",
        ),
        (
            (X, X, X),
            {"prefix_key": P, "prefix_value": P.double()},
            TypeError,
            "prefix_value must have query's dtype",
        ),
    ],
)
def test_bad_input(tokens: tuple, kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        spacetime_attention(*tokens, **{"axis": "time", **kwargs})


# ---------------------------------------------------------------------------------------------
# Joint attention by torch's scaled_dot_product_attention

REFUSED = [
    ({"axis": "time"}, "it takes axis=\"joint\" alone, got 'time'"),
    ({"window": (1, 1, 1), "grid": (2, 3)}, "it takes no window"),
    ({"key_mask": torch.ones(1, 8, dtype=torch.bool)}, "it takes no key_mask"),
    ({"prefix_key": PREFIX, "prefix_value": PREFIX}, "it takes no prefix_key"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=lambda x: "")
def test_what_sdpa_does_not_take_is_refused(options: dict, reason: str) -> None:
    x = HALF.float()
    with use_backend("sdpa"), pytest.raises(RuntimeError, match=re.escape(reason)):
        spacetime_attention(x, x, x, **{"axis": "joint", **options})
    with use_backend("sdpa"), pytest.raises(RuntimeError, match="float64 runs on the reference"):
        spacetime_attention(x.double(), x.double(), x.double(), axis="joint")


class OnAGpu:
    """What is looked at of a tensor on a GPU, where a backend is chosen."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda", 0)
    dtype, shape = HALF.dtype, HALF.shape


def test_on_a_gpu_sdpa_is_chosen_where_it_can_do_the_whole_call(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_too_old", lambda index: "")
    x = OnAGpu()
    plain, mask = ("joint", None, None, None), torch.ones(HALF.shape[:2], dtype=torch.bool)
    assert op.choose(op.FORWARD, x, *plain) is op.FORWARD["sdpa"]
    assert op.choose(op.BACKWARD, x, *plain) is not op.BACKWARD["sdpa"]
    for other in (
        ("time", None, None, None),
        ("space", None, None, None),
        ("joint", (1, 1, 1), None, None),
        ("joint", None, mask, None),
        ("joint", None, None, HALF[:, :1, :1]),
    ):
        assert op.choose(op.FORWARD, x, *other) not in (op.FORWARD["sdpa"], op.FORWARD["cpp"])
    x = HALF
    assert op.choose(op.FORWARD, x, *plain) is not op.FORWARD["sdpa"]  # on the CPU never unasked


def interleaved(x: Tensor) -> Tensor:
    """Patches first, so that no one stride leads from token to token."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


FUSED = torch.stack([HALF, HALF + 1, HALF - 1], dim=3).unbind(3)
"""query, key and value beside each other, as a projection writes them."""

LAID_OUT = {
    "contiguous": ((HALF,) * 3, True),
    "fused": (FUSED, True),
    "one frame": ((interleaved(HALF)[:, :1],) * 3, True),
    "one patch": ((interleaved(HALF)[:, :, 2:3],) * 3, True),
    "interleaved": ((HALF, interleaved(HALF), HALF), False),
    "some patches": ((HALF[:, :, 1:],) * 3, False),
    "float32": ((HALF.float(),) * 3, False),
    "heads of 4": ((HALF[..., :4].contiguous(),) * 3, False),
    "not aligned": ((HALF.flatten()[1:1025].view(1, 8, 4, 2, 16),) * 3, False),
    "strided": ((HALF.repeat_interleave(2, -1)[..., ::2],) * 3, False),
}


@pytest.mark.parametrize(("tensors", "delegated"), LAID_OUT.values(), ids=LAID_OUT)
def test_unasked_sdpa_has_what_needs_no_copy(
    tensors: tuple[Tensor, ...], delegated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where torch has a fused kernel; and without one it is left aside."""
    for takes in (False, True):
        given, sdpa = [], F.scaled_dot_product_attention

        def noted(*views: Tensor, given: list = given, sdpa=sdpa, **options: float) -> Tensor:
            given.extend(views)
            return sdpa(*views, **options)

        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _, t=takes: t)
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", noted)
            gate = torch.rand(1, 1, 1, 2, 1)
            rest = "joint", None, None, False, None, None, None, None, gate, 0.3
            out, _ = op._forward_sdpa(*tensors, *rest)
        assert bool(given) == (takes and delegated)
        for view, x in zip(given, tensors, strict=False):
            assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        with use_backend("reference"):
            expected = spacetime_attention(*tensors, axis="joint", gate=gate, scale=0.3)
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=0)
        assert out.is_contiguous() and out.dtype == expected.dtype


def test_the_docstring_example_runs() -> None:
    result = doctest.testmod(importlib.import_module("vd_kernels.spacetime_attention.api"))
    assert result.attempted > 0 and result.failed == 0
