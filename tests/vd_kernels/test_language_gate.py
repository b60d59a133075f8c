"""language_gate against its formula in float64 loops, and what must hold of it."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from vd_kernels import language_gate

REDUCTIONS = ("softmax", "max", "mean")


def oracle(
    query: Tensor,
    key: Tensor,
    gate_value: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "softmax",
) -> Tensor:
    """The gate, one visual token and head at a time, in Python floats."""
    batch, length, heads, width = query.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    channels = () if gate_value is None else gate_value.shape[-1:]
    gate = torch.zeros((batch, length, heads, *channels), dtype=torch.float64)
    q, k = query.tolist(), key.tolist()
    for b, i, h in itertools.product(range(batch), range(length), range(heads)):
        words = [j for j in range(key.shape[1]) if key_mask is None or key_mask[b, j]]
        s = [scale * sum(x * y for x, y in zip(q[b][i][h], k[b][j][h], strict=True)) for j in words]
        total = sum(math.exp(x) for x in s)
        p = [math.exp(x) / total for x in s]
        if gate_value is not None:
            u = sum((pj * gate_value[b, j, h] for pj, j in zip(p, words, strict=True)), 0.0)
            gate[b, i, h] = u + (0.0 if bias is None else bias[h])
            continue
        r = 0.0
        if words and reduction == "softmax":
            r = sum(pj * sj for pj, sj in zip(p, s, strict=True))
        elif words and reduction == "max":
            r = max(s)
        elif words:
            r = sum(s) / len(s)
        gate[b, i, h] = r + (0.0 if bias is None else float(bias[h]))
    return 1 / (1 + torch.exp(-gate))


def inputs(
    batch: int = 2, length: int = 3, tokens: int = 5, heads: int = 2, width: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * length + 100 * tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = normal(batch, length, heads, width)
    return query, normal(batch, tokens, heads, width), normal(batch, length, heads, width + 1)


def some_mask(batch: int, tokens: int) -> Tensor:
    """Row 0 lacks its first and last token, row 1 (if any) has none at all, the others have all."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, [0, -1]] = False
    mask[1:2] = False
    return mask


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 2, 4), (3, 13, 1, 3, 13)])
def test_scalar_gate_is_the_formula(shape: tuple[int, ...], reduction: str) -> None:
    query, key, value = inputs(*shape)
    mask = some_mask(key.shape[0], key.shape[1])
    bias = torch.linspace(-1, 1, query.shape[2]).double()
    for key_mask in (None, mask):
        expected = oracle(query, key, None, key_mask, bias, None, reduction)
        out, gate = language_gate(
            query, key, value, key_mask=key_mask, bias=bias, reduction=reduction, return_gate=True
        )
        torch.testing.assert_close(gate, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out, expected[..., None] * value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 2, 4), (3, 13, 3, 1, 3)])
def test_channel_gate_is_the_formula(shape: tuple[int, ...]) -> None:
    query, key, value = inputs(*shape)
    gate_value = torch.randn(*key.shape[:3], value.shape[-1], dtype=torch.float64)
    bias = torch.randn(query.shape[2], value.shape[-1], dtype=torch.float64)
    for key_mask in (None, some_mask(key.shape[0], key.shape[1])):
        expected = oracle(query, key, gate_value, key_mask, bias)
        gate = language_gate(query, key, gate_value=gate_value, key_mask=key_mask, bias=bias)
        out = language_gate(query, key, value, gate_value=gate_value, key_mask=key_mask, bias=bias)
        torch.testing.assert_close(gate, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out, expected * value, rtol=1e-12, atol=1e-12)


def test_scale_is_used_as_given() -> None:
    query, key, _ = inputs()
    expected = oracle(query, key, scale=0.3)
    torch.testing.assert_close(language_gate(query, key, scale=0.3), expected)
    assert not torch.allclose(language_gate(query, key), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scalar_gradients(reduction: str, masked: bool) -> None:
    query, key, value = (x.requires_grad_() for x in inputs())
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    key_mask = some_mask(2, 5) if masked else None

    def gated(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return language_gate(
            query, key, value, key_mask=key_mask, bias=bias, reduction=reduction, return_gate=True
        )

    assert torch.autograd.gradcheck(gated, (query, key, value, bias))


def test_channel_gradients() -> None:
    query, key, value = (x.requires_grad_() for x in inputs())
    gate_value = torch.randn(2, 5, 2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def gated(*args: Tensor) -> Tensor:
        query, key, value, gate_value, bias = args
        return language_gate(
            query, key, value, gate_value=gate_value, bias=bias, key_mask=some_mask(2, 5)
        )

    assert torch.autograd.gradcheck(gated, (query, key, value, gate_value, bias))


def test_softmax_derivative_is_the_stated_one() -> None:
    """dr/ds_j = p_j (1 + s_j - r), seen through D = 1, query 1, scale 1: then s_j = key_j."""
    key = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    gate = language_gate(query, key, scale=1.0)
    gate.sum().backward()
    s = key.detach().flatten()
    p = s.softmax(0)
    r = (p * s).sum()
    g = torch.sigmoid(r)
    expected = g * (1 - g) * p * (1 + s - r)
    torch.testing.assert_close(key.grad.flatten(), expected)


def test_of_equal_maxima_the_lowest_token_takes_the_gradient() -> None:
    key = torch.tensor([0.0, 2.0, 2.0, 2.0], dtype=torch.float64).view(1, 4, 1, 1).requires_grad_()
    query = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    language_gate(query, key, reduction="max").sum().backward()
    assert key.grad.flatten().ne(0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "channel"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_without_a_real_token_the_gate_is_its_bias(reduction: str, tokens: int) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(tokens=5))
    key = key[:, :tokens].detach().requires_grad_()
    key_mask = torch.zeros(2, tokens, dtype=torch.bool)
    kwargs = {"reduction": reduction, "bias": torch.tensor([-0.5, 2.0]).double()}
    if reduction == "channel":
        kwargs = {
            "gate_value": torch.randn(2, tokens, 2, 5).double(),
            "bias": torch.randn(2, 5).double(),
        }
    out, gate = language_gate(query, key, value, key_mask=key_mask, return_gate=True, **kwargs)
    expected = torch.sigmoid(kwargs["bias"]).expand(gate.shape)
    torch.testing.assert_close(gate, expected, rtol=1e-15, atol=0)
    out.sum().backward()
    assert not query.grad.any() and not key.grad.any()
    assert value.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "channel"])
def test_padding_may_hold_anything(reduction: str, garbage: float) -> None:
    query, key, value = inputs()
    key_mask = some_mask(2, 5)
    gate_value = torch.randn(2, 5, 2, 5, dtype=torch.float64)
    results = []
    for filler in (0.0, garbage):
        q, v = query.clone().requires_grad_(), value.clone().requires_grad_()
        k = key.masked_fill(~key_mask[..., None, None], filler).requires_grad_()
        u = gate_value.masked_fill(~key_mask[..., None, None], filler).requires_grad_()
        kwargs = {"gate_value": u} if reduction == "channel" else {"reduction": reduction}
        out = language_gate(q, k, v, key_mask=key_mask, **kwargs)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_language_only_scales() -> None:
    query, key, value = inputs(3, 13, 7, 3, 8)
    out, gate = language_gate(50 * query, 50 * key, value, return_gate=True)
    assert gate.min() >= 0 and gate.max() <= 1
    ratio = out / value
    torch.testing.assert_close(ratio, ratio[..., :1].expand(ratio.shape))
    assert not language_gate(query, key, torch.zeros_like(value)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in inputs(2, 13, 9, 2, 64))
    bias = torch.tensor([0.25, -1.0])
    out, gate = language_gate(query, key, value, bias=bias, return_gate=True)
    expected = oracle(query, key, bias=bias)
    assert gate.dtype == out.dtype == dtype
    step = torch.finfo(dtype).eps  # twice the error of one rounding
    torch.testing.assert_close(gate.double(), expected, rtol=step, atol=1e-6)
    torch.testing.assert_close(out.double(), expected[..., None] * value, rtol=step, atol=1e-6)


def test_autocast_casts_inputs_and_keeps_sums_in_float32() -> None:
    query, key, value = (x.float().requires_grad_() for x in inputs(2, 13, 9, 2, 64))
    low = [x.detach().bfloat16() for x in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        out = language_gate(query, key.detach().bfloat16(), value)
    assert torch.equal(out, language_gate(*low))
    out.sum().backward()
    assert query.grad.dtype == torch.float32 and query.grad.isfinite().all()


def test_any_strides_give_the_same() -> None:
    query, key, value = inputs(2, 6, 5, 3, 4)
    expected = language_gate(query, key, value)
    fused = torch.cat([query, value[..., :4], query], dim=-1)
    assert torch.equal(language_gate(fused[..., 8:], key, value), expected)
    turned = query.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(language_gate(turned, key, value), expected)
    one = key[:1].expand(2, -1, -1, -1)
    assert torch.equal(language_gate(query, one, value), language_gate(query, one.clone(), value))


@pytest.mark.parametrize("shape", [(0, 3, 5, 2, 4), (2, 0, 5, 2, 4), (2, 3, 5, 0, 4)])
def test_empty_batch_length_or_heads(shape: tuple[int, ...]) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(*shape))
    for reduction in REDUCTIONS:
        out = language_gate(query, key, value, reduction=reduction)
        assert out.shape == value.shape
        out.sum().backward()


def test_what_is_returned() -> None:
    query, key, value = inputs()
    gate = language_gate(query, key)
    assert torch.equal(language_gate(query, key, return_gate=True), gate)
    out, same = language_gate(query, key, value, return_gate=True)
    assert torch.equal(same, gate) and out.shape == value.shape
    assert isinstance(language_gate(query, key, value), Tensor)


Q, K, V = torch.zeros(2, 3, 2, 4), torch.zeros(2, 5, 2, 4), torch.zeros(2, 3, 2, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        (("x", K), {}, TypeError, "query must be a tensor"),
        ((Q.long(), K), {}, TypeError, "query must be float16.*got int64"),
        ((Q[0], K), {}, ValueError, r"query must be \[B,L,H,D\], got shape \(3, 2, 4\)"),
        ((Q[..., :0], K[..., :0]), {}, ValueError, "query must have a head size"),
        (
            (Q, K[..., :3]),
            {},
            ValueError,
            r"key must be .*\(2, 5, 2, 4\), got shape \(2, 5, 2, 3\)",
        ),
        ((Q, K[:1]), {}, ValueError, "key must be"),
        ((Q, K.double()), {}, TypeError, "key must have query's dtype float32, got float64"),
        ((Q, K, V[:, :2]), {}, ValueError, "value must be"),
        ((Q, K, V.half()), {}, TypeError, "value must have query's dtype"),
        ((Q, K, V), {"gate_value": K}, ValueError, r"gate_value must be .*\(2, 5, 2, 6\)"),
        ((Q, K), {"gate_value": K, "reduction": "max"}, ValueError, "gate_value needs reduction"),
        ((Q, K), {"reduction": "sum"}, ValueError, 'reduction must be one of "softmax", "max"'),
        ((Q, K), {"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be a bool tensor"),
        ((Q, K), {"key_mask": torch.ones(2, 3).bool()}, ValueError, r"key_mask must be \[B,M\]"),
        ((Q, K), {"bias": torch.zeros(3)}, ValueError, r"bias must be \[H\] = \(2,\)"),
        ((Q, K), {"bias": torch.zeros(2).int()}, TypeError, "bias must be float16"),
        ((Q, K), {"gate_value": K, "bias": torch.zeros(2)}, ValueError, r"bias must be \[H,Dv\]"),
        ((Q, K), {"scale": "1"}, TypeError, "scale must be a number"),
        ((Q, K), {"scale": math.nan}, ValueError, "scale must be a finite number"),
        ((Q, K.to("meta")), {}, ValueError, "key must be on query's device cpu, got meta"),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        language_gate(*args, **kwargs)


def test_the_docstring_example_runs() -> None:
    result = doctest.testmod(importlib.import_module("vd_kernels.language_gate.api"))
    assert result.attempted > 0 and result.failed == 0
