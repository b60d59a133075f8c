"""topk_sample and topk_gather against their formulas in loops, and what must hold of them."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vd_kernels import TopKSample, _checks, topk_gather, topk_sample, use_backend
from vd_kernels.backends import load_cpu_kernels

METHODS = ("hard", "perturbed", "gumbel", "lapsum")
CPU = torch.device("cpu")


def best(scores: list[float], k: int, order: str = "time") -> list[int]:
    """The k best frames in Python: -inf never, among equals the lowest index."""
    real = [t for t, s in enumerate(scores) if s > -math.inf]
    chosen = sorted(real, key=lambda t: (-scores[t], t))[:k]
    return sorted(chosen) if order == "time" else chosen


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient(sample: TopKSample, grad: Tensor, scores: Tensor) -> Tensor:
    return torch.autograd.grad(sample.weights, scores, grad, retain_graph=True)[0]


# The choice itself


@pytest.mark.parametrize("order", ["time", "score"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("frames", "k"), [(1, 1), (3, 2), (13, 13), (13, 4), (257, 5)])
def test_hard_takes_the_best(frames: int, k: int, dtype: torch.dtype, order: str) -> None:
    scores = (3 * normal(7, frames)).round().to(dtype)  # rounded: many ties
    scores[scores == 1] = -math.inf
    scores[0] = -0.0
    scores[0, ::2] = 0.0  # equal to -0.0
    scores.requires_grad_()
    weights, indices, slot_mask = topk_sample(scores, k, method="hard", order=order)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not weights.requires_grad
    for row, given in enumerate(scores.tolist()):
        expected = best(given, k, order)
        spare = k - len(expected)
        assert indices[row].tolist() == expected + [-1] * spare
        assert slot_mask[row].tolist() == [True] * len(expected) + [False] * spare
        for slot, frame in enumerate(expected):
            assert weights[row, slot].nonzero().tolist() == [[frame]]
            assert weights[row, slot, frame] == 1
        assert not weights[row, len(expected) :].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_is_the_same_as_minus_infinity(method: str) -> None:
    scores = normal(4, 9)
    mask = normal(4, 9, seed=1) > 0
    mask[1] = False
    mask[2] = True
    junk = scores.masked_fill(~mask, math.nan)
    hidden = scores.masked_fill(~mask, -math.inf)
    leaves = [x.requires_grad_() for x in (scores.clone(), junk, hidden)]
    grad = normal(4, 9) if method == "lapsum" else normal(4, 5, 9)
    results = []
    for x in leaves:
        sample = topk_sample(
            x, 5, method=method, mask=None if x is hidden else mask, sigma=0.5, seed=3
        )
        frames_of = sample.weights if method == "lapsum" else sample.weights.sum(1)
        assert not frames_of[~mask].any()
        grads = []
        if method != "hard":
            grads = [gradient(sample, grad, x)]
            assert not grads[0][~mask].any() and grads[0].isfinite().all()
            assert grads[0][2].any()
        results.append((*sample, *grads))
    with torch.inference_mode():  # nothing lies between the function and the kernel
        bare = topk_sample(leaves[1], 5, method=method, mask=mask, sigma=0.5, seed=3)
        results.append((*bare, *results[0][3:]))
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("method", ["hard", "perturbed", "gumbel"])
def test_spare_slots(method: str) -> None:
    scores = torch.tensor([[0.0, -math.inf, 1.0, -math.inf], [-math.inf] * 4, [0.0, 1.0, 2.0, 3.0]])
    sample = topk_sample(scores.requires_grad_(), 3, method=method, sigma=9.0, seed=0)
    assert sample.indices[:2].tolist() == [[0, 2, -1], [-1, -1, -1]]
    assert sample.slot_mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    torch.testing.assert_close(sample.weights.sum(-1), sample.slot_mask.float())
    # two real frames for three slots leave nothing to choose, whatever a spare slot's gradient says
    if method == "perturbed":
        grad = gradient(
            sample, torch.full((3, 3, 4), 7.0).index_fill(1, torch.tensor(2), -5.0), scores
        )
        assert not grad[:2].any()
    gathered = topk_gather(torch.ones(3, 4, 2), sample)
    torch.testing.assert_close(gathered, sample.slot_mask.float()[..., None].expand(3, 3, 2))


def test_lapsum_spare_slots() -> None:
    scores = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3, [3.0, 1.0, 2.0]])
    sample = topk_sample(scores.requires_grad_(), 2, method="lapsum")
    assert sample.indices.tolist() == [[0, 2], [-1, -1], [0, 2]]
    assert sample.slot_mask.tolist() == [[True, True], [False, False], [True, True]]
    assert sample.weights[:2].tolist() == [[1, 0, 1], [0, 0, 0]]
    grad = gradient(sample, torch.randn(3, 3), scores)
    assert not grad[:2].any() and grad[2].any()
    assert not topk_gather(torch.ones(3, 3, 2), sample)[1].any()


# Perturbed


def perturbed_oracle(
    x: Tensor, k: int, z: Tensor, sigma: float, grad: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    """Weights [K,N] and gradient [N] of one row with noise [n,N]: the text's formulas, in loops."""
    samples, frames = z.shape
    base = best(x.tolist(), k, order)
    weights = torch.zeros(k, frames, dtype=torch.float64)
    gains = []
    for i in range(samples):
        drawn = best((x + sigma * z[i]).tolist(), k, order)
        gains.append(0.0)
        for slot, (frame, usual) in enumerate(zip(drawn, base, strict=True)):
            weights[slot, frame] += 1 / samples
            gains[-1] += float(grad[slot, frame] - grad[slot, usual])
    mean = 0.0 if samples == 1 else sum(gains) / samples
    result = torch.zeros(frames, dtype=torch.float64)
    for t, i in itertools.product(range(frames), range(samples)):
        if x[t] > -math.inf:
            result[t] += (gains[i] - mean) * z[i, t] / (max(1, samples - 1) * sigma)
    return weights, result


@pytest.mark.parametrize("order", ["time", "score"])
@pytest.mark.parametrize(
    ("samples", "frames", "k"), [(1, 3, 1), (2, 3, 3), (13, 13, 4), (50, 7, 3)]
)
def test_perturbed_is_the_formula(samples: int, frames: int, k: int, order: str) -> None:
    x = 0.5 * normal(3, frames)
    x[1, 0] = -math.inf if frames > k else 0.0
    x.requires_grad_()
    z, grad = normal(3, samples, frames, seed=1), normal(3, k, frames, seed=2)
    sample = topk_sample(x, k, noise=z, sigma=0.4, order=order)
    result = gradient(sample, grad, x)
    for row in range(3):
        weights, expected = perturbed_oracle(x[row].detach(), k, z[row], 0.4, grad[row], order)
        torch.testing.assert_close(sample.weights[row], weights)
        torch.testing.assert_close(result[row], expected, rtol=1e-10, atol=1e-10)
        assert sample.indices[row].tolist() == best(x[row].tolist(), k, order)


def test_perturbed_gradient_is_that_of_the_smoothed_expectation() -> None:
    """Against central differences of E<G, weights> by another 100,000 draws."""
    x, grad = 0.3 * normal(6), normal(2, 6, seed=1)
    z = torch.randn(100_000, 6, generator=torch.Generator().manual_seed(2)).double()
    other = torch.randn(100_000, 6, generator=torch.Generator().manual_seed(3)).double()
    x = x.requires_grad_()
    sigma, step = 0.5, 0.05
    estimate = gradient(topk_sample(x, 2, noise=z, sigma=sigma), grad, x)

    def smoothed(x: Tensor) -> Tensor:
        return (grad * topk_sample(x, 2, noise=other, sigma=sigma).weights).sum()

    with torch.no_grad():
        shifts = step * torch.eye(6, dtype=torch.float64)
        slopes = torch.stack([smoothed(x + e) - smoothed(x - e) for e in shifts]) / (2 * step)
    assert F.cosine_similarity(estimate, slopes, dim=0) > 0.999
    assert 0.95 < estimate.norm() / slopes.norm() < 1.05


def test_the_largest_sizes() -> None:
    """4,096 frames, 64 of them, 1,000 samples: weights are counts, and nothing overflows."""
    x = normal(1, 4096).float().requires_grad_()
    sample = topk_sample(x, 64, sigma=0.3, num_samples=1000, seed=0)
    torch.testing.assert_close(sample.weights.sum(-1), torch.ones(1, 64))
    counts = 1000 * sample.weights.detach()
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
    assert gradient(sample, torch.randn(1, 64, 4096), x).isfinite().all()
    assert best(x[0].tolist(), 64) == sample.indices[0].tolist()


def test_diagonal_gradient_is_the_published_one() -> None:
    """One-hots over samples, as in google-research's patch selection; and not the true gradient."""
    x, z, grad = normal(3, 9).requires_grad_(), normal(3, 40, 9, seed=1), normal(3, 4, 9, seed=2)
    sigma = 0.7
    sample = topk_sample(x, 4, noise=z, sigma=sigma, gradient="diagonal")
    top = (x.detach()[:, None] + sigma * z).topk(4).indices.sort(-1).values
    one_hots = F.one_hot(top, 9).double()  # [B,n,K,N]
    jacobian = torch.einsum("bnkd,bnd->bkd", one_hots, z) / 40 / sigma
    torch.testing.assert_close(gradient(sample, grad, x), (grad * jacobian).sum(1))
    exact = gradient(topk_sample(x, 4, noise=z, sigma=sigma), grad, x)
    assert F.cosine_similarity(exact, gradient(sample, grad, x)).max() < 0.95


@pytest.mark.parametrize("gradient_rule", ["exact", "diagonal"])
def test_sigma_zero_is_the_hard_choice(gradient_rule: str) -> None:
    x = normal(3, 9).requires_grad_()
    sample = topk_sample(x, 4, sigma=0, gradient=gradient_rule)
    for given, expected in zip(sample, topk_sample(x, 4, method="hard"), strict=True):
        assert torch.equal(given, expected)
    assert not gradient(sample, normal(3, 4, 9), x).any()


@pytest.mark.parametrize("sigma", [1e-30, 1e-6])
def test_where_no_sample_differs_the_gradient_is_zero(sigma: float) -> None:
    x = torch.arange(20.0).view(2, 10).requires_grad_()
    sample = topk_sample(x, 3, sigma=sigma, num_samples=7, seed=1)
    assert torch.equal(gradient(sample, 1e6 * torch.randn(2, 3, 10), x), torch.zeros(2, 10))


def test_perturbed_weights_are_counts() -> None:
    weights = topk_sample(normal(5, 33).float(), 8, sigma=1.0, num_samples=100, seed=0).weights
    counts = 100 * weights
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 8))
    assert weights.sum(1).max() <= 1 + 1e-6  # no frame twice in a sample


def test_any_memory_order_and_every_gradient_layout() -> None:
    x = normal(9, 3).t().requires_grad_()
    z = normal(3, 5, 9, seed=1)
    sample = topk_sample(x, 4, noise=z, sigma=0.5)
    copy = x.detach().contiguous().requires_grad_()
    same = topk_sample(copy, 4, noise=z.transpose(0, 1).contiguous().transpose(0, 1), sigma=0.5)
    assert torch.equal(sample.weights, same.weights)
    grad = normal(9, 3, 4, seed=2).permute(1, 2, 0)
    assert torch.equal(gradient(sample, grad, x), gradient(same, grad.contiguous(), copy))
    every_other = normal(3, 18)[:, ::2]
    expected = topk_sample(every_other.contiguous(), 4, method="hard").indices
    assert torch.equal(topk_sample(every_other, 4, method="hard").indices, expected)


# Gumbel


def gumbel_surrogate(x: Tensor, k: int, g: Tensor, tau: float, order: str) -> Tensor:
    """Weights [K,N] whose values are the draw's and whose gradient is the successive softmax's."""
    u = x + g
    ranked = best(u.tolist(), k, "score")
    slots = best(u.tolist(), k, order)
    rows = [torch.zeros_like(x)] * k
    gone = torch.zeros_like(x)
    for frame in ranked:
        p = ((u + gone) / tau).softmax(0)
        one_hot = F.one_hot(torch.tensor(frame), len(x)).double()
        rows[slots.index(frame)] = one_hot + p - p.detach()
        gone = gone.clone()
        gone[frame] = -math.inf
    return torch.stack(rows)


@pytest.mark.parametrize("order", ["time", "score"])
@pytest.mark.parametrize(("frames", "k"), [(1, 1), (3, 3), (13, 1), (13, 5)])
def test_gumbel_is_straight_through_the_successive_softmax(frames: int, k: int, order: str) -> None:
    x = normal(3, frames)
    if frames > 1:
        x[1, 0] = -math.inf
    x.requires_grad_()
    g, grad = normal(3, 1, frames, seed=1), normal(3, k, frames, seed=2)
    sample = topk_sample(x, k, method="gumbel", noise=g, temperature=0.7, order=order)
    result = gradient(sample, grad, x)
    for row in range(3):
        leaf = x[row].detach().requires_grad_()
        expected = gumbel_surrogate(leaf, k, g[row, 0], 0.7, order)
        torch.testing.assert_close(sample.weights[row], expected)
        expected.backward(grad[row])
        torch.testing.assert_close(result[row], leaf.grad, rtol=1e-10, atol=1e-12)
        drawn = best((x[row] + g[row, 0]).tolist(), k, order)
        assert sample.indices[row].tolist() == drawn + [-1] * (k - len(drawn))


@pytest.mark.parametrize("backend", ["reference", None])
def test_gumbel_where_one_pick_has_nearly_all_of_p(backend: str | None) -> None:
    """What the others have is known to its own precision, not to that of the pick's gradient."""
    x, g = torch.tensor([[18.0, 0.0, 1.0, 2.0]]), torch.zeros(1, 1, 4)
    grad = torch.tensor([[[1000.3, 1001.0, 999.0, 1000.1]]])

    def result(dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        sample = topk_sample(leaf, 1, method="gumbel", noise=g.to(dtype))
        return gradient(sample, grad.to(dtype), leaf)

    with use_backend(backend) if backend else contextlib.nullcontext():
        found = result(torch.float32)
    torch.testing.assert_close(found.double(), result(torch.float64), rtol=2e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gains_that_differ_little_from_each_other_count(backend: str) -> None:
    """All samples leave the base for frames that are worth 10,000 more, and a little: sums of that
    drown what they differ by unless the mean is taken off first, and exactly."""
    if backend == "cpp" and (reason := load_cpu_kernels()):
        pytest.skip(reason)
    scores = torch.tensor([[1.0] + [0.0] * 7])
    noise = normal(1, 40, 8)
    noise[..., 0] = -3
    grad = 1e4 + normal(1, 1, 8, seed=1)
    grad[..., 0] = 0
    grad = grad.float()
    found = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        x = scores.to(dtype, copy=True).requires_grad_()
        with use_backend(name):
            sample = topk_sample(x, 1, sigma=1.0, noise=noise.to(dtype))
            found.append(gradient(sample, grad.to(dtype), x).double())
    one, exact = found
    assert (one - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_gumbel_with_one_slot_is_torchs(tau: float) -> None:
    x, grad = normal(4, 7).requires_grad_(), normal(4, 7, seed=1)
    torch.manual_seed(0)
    noise = -torch.empty_like(x, memory_format=torch.legacy_contiguous_format).exponential_().log()
    torch.manual_seed(0)
    expected = F.gumbel_softmax(x, tau=tau, hard=True)
    sample = topk_sample(x, 1, method="gumbel", noise=noise.detach()[:, None], temperature=tau)
    torch.testing.assert_close(sample.weights[:, 0], expected)
    (other,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(gradient(sample, grad[:, None], x), other)


def test_gumbel_draws_without_replacement_by_softmax() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(50_000, 4)
    first = topk_sample(x, 2, method="gumbel", seed=0, order="score").indices[:, 0]
    share = torch.bincount(first, minlength=4) / 50_000
    torch.testing.assert_close(share, x[0].softmax(0), rtol=0, atol=0.01)


# LapSum


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 30.0])
def test_lapsum_is_the_laplace_cdf_that_sums_to_k(alpha: float) -> None:
    x = normal(4, 13).requires_grad_()
    p = topk_sample(x, 5, method="lapsum", temperature=alpha).weights
    torch.testing.assert_close(p.sum(-1), torch.full((4,), 5.0).double())
    # one b for all frames of a row, read back where the cdf is not saturated
    inside = (p > 1e-9) & (p < 1 - 1e-9)
    quantile = torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log())
    b = (x - alpha * quantile).masked_fill(~inside, math.nan)
    torch.testing.assert_close(
        b,
        b.nanmean(-1, keepdim=True).expand(b.shape).masked_fill(~inside, math.nan),
        rtol=0,
        atol=1e-5,
        equal_nan=True,
    )
    result = gradient(TopKSample(p, p, p), normal(4, 13, seed=1), x)
    assert result.isfinite().all()
    torch.testing.assert_close(result.sum(-1), torch.zeros(4).double(), rtol=0, atol=1e-12 / alpha)


def test_lapsum_gradient() -> None:
    x = normal(2, 7).requires_grad_()

    def weights(x: Tensor) -> Tensor:
        return topk_sample(x, 3, method="lapsum", temperature=0.5).weights

    assert torch.autograd.gradcheck(weights, (x,))


def test_lapsum_far_from_every_score_is_hard_and_finite() -> None:
    """The threshold lies 1,000 temperatures from the nearest score: every density underflows."""
    x = torch.tensor([[0.0, 4.0, 2.0, -3.0]], requires_grad=True)
    sample = topk_sample(x, 2, method="lapsum", temperature=1e-3)
    assert sample.weights.tolist() == [[0, 1, 1, 0]]
    assert torch.equal(gradient(sample, torch.randn(1, 4), x), torch.zeros(1, 4))


# Invariants of all methods


@pytest.mark.parametrize("method", ["gumbel", "lapsum"])
def test_gradient_sums_to_zero(method: str) -> None:
    x = normal(5, 13).requires_grad_()
    sample = topk_sample(x, 4, method=method, seed=0)
    result = gradient(sample, normal(*sample.weights.shape, seed=1), x)
    assert result.any()
    torch.testing.assert_close(result.sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["perturbed", "gumbel", "lapsum"])
def test_a_constant_added_to_the_loss_gradient_changes_nothing(method: str) -> None:
    x = normal(5, 13).requires_grad_()
    sample = topk_sample(x, 4, method=method, sigma=0.5, seed=0)
    grad = normal(*sample.weights.shape, seed=1)
    result = gradient(sample, grad, x)
    assert result.any()
    torch.testing.assert_close(gradient(sample, grad + 3.0, x), result, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["perturbed", "gumbel", "lapsum"])
def test_backward_twice_gives_the_same_bits(method: str) -> None:
    x = normal(5, 13).float().requires_grad_()
    sample = topk_sample(x, 4, method=method, sigma=0.5, seed=0)
    grad = torch.randn(sample.weights.shape)
    assert torch.equal(gradient(sample, grad, x), gradient(sample, grad, x))


@pytest.mark.parametrize("method", ["perturbed", "gumbel", "lapsum"])
def test_a_second_derivative_is_an_error(method: str) -> None:
    x = normal(2, 7).requires_grad_()
    sample = topk_sample(x, 3, method=method, sigma=0.5, seed=0)
    (first,) = torch.autograd.grad(sample.weights.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_leading_dimensions_are_rows(method: str) -> None:
    x = normal(2, 3, 9)
    nested = topk_sample(x, 4, method=method, sigma=0.5, seed=7)
    flat = topk_sample(x.view(6, 9), 4, method=method, sigma=0.5, seed=7)
    for one, other in zip(nested, flat, strict=True):
        assert one.shape[:2] == (2, 3)
        assert torch.equal(one.flatten(0, 1), other)
    single = topk_sample(x[0, 0], 4, method=method, sigma=0.5, seed=7)
    for one, other in zip(single, flat, strict=True):
        assert torch.equal(one, other[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_batch(method: str, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, 9, requires_grad=True)
    sample = topk_sample(x, 4, method=method)
    assert sample.indices.shape == (*lead, 4)
    assert sample.weights.shape == (*lead, *(() if method == "lapsum" else (4,)), 9)
    gathered = topk_gather(torch.randn(*lead, 9, 5), sample)
    assert gathered.shape == (*lead, 4, 5)
    if method != "hard":
        gathered.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_scores_are_worked_on_in_float32(method: str) -> None:
    low = normal(3, 9).bfloat16().requires_grad_()
    full = low.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sample = topk_sample(low, 4, method=method, sigma=0.5, seed=0)
    expected = topk_sample(full, 4, method=method, sigma=0.5, seed=0)
    assert torch.equal(sample.weights, expected.weights)
    if method != "hard":
        grad = torch.randn(sample.weights.shape)
        result = gradient(sample, grad, low)
        assert torch.equal(result, gradient(expected, grad, full).bfloat16())


# Seeds


@pytest.mark.parametrize("method", ["perturbed", "gumbel"])
def test_the_choice_depends_on_seed_and_row_alone(method: str) -> None:
    x = normal(7, 13).float().requires_grad_()
    kwargs = {"method": method, "sigma": 1.0, "num_samples": 9}
    whole = topk_sample(x, 4, seed=11, **kwargs)
    grad = torch.randn(whole.weights.shape)
    again = topk_sample(x, 4, seed=torch.tensor([11]), **kwargs)
    parts = [
        topk_sample(x[a:b], 4, seed=11, row_offset=a, **kwargs) for a, b in ((0, 2), (2, 3), (3, 7))
    ]
    for i in range(3):
        assert torch.equal(whole[i], again[i])
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    split = torch.cat([part.weights for part in parts])
    (from_parts,) = torch.autograd.grad(split, x, grad)
    torch.testing.assert_close(from_parts, gradient(whole, grad, x))
    assert not torch.equal(whole.weights, topk_sample(x, 4, seed=12, **kwargs).weights)
    assert not torch.equal(whole.weights, topk_sample(x, 4, seed=11 + 2**32, **kwargs).weights)
    same_scores = x[:1].expand(7, -1)
    assert len(topk_sample(same_scores, 4, seed=11, **kwargs).weights.unique(dim=0)) > 1


def test_chunks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(9, 13).float()
    expected = topk_sample(x, 4, sigma=1.0, num_samples=5, seed=2)
    monkeypatch.setattr("vd_kernels.topk_sampling.noise._CHUNK", 40)  # two rows of 5 * 4 counters
    monkeypatch.setattr("vd_kernels.topk_sampling.reference._CHUNK", 270)  # four rows of 5 * 13
    for one, other in zip(
        topk_sample(x, 4, sigma=1.0, num_samples=5, seed=2), expected, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_seed_torchs_generator_decides(method: str) -> None:
    x = normal(3, 33).float()
    draws = []
    for torch_seed in (0, 0, 1):
        torch.manual_seed(torch_seed)
        draws.append(topk_sample(x, 4, method=method, sigma=1.0).weights)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) == (method in ("hard", "lapsum"))


@pytest.mark.parametrize("method", METHODS)
def test_with_a_seed_torchs_generator_is_left_alone(method: str) -> None:
    before = torch.get_rng_state()
    topk_sample(normal(3, 33), 4, method=method, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


# Gather


@pytest.mark.parametrize("inner", [(), (1,), (3, 13)])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_gather_is_the_weighted_sum(lead: tuple[int, ...], inner: tuple[int, ...]) -> None:
    sample = topk_sample(normal(*lead, 7), 3, sigma=1.0, num_samples=9, seed=0)
    values = normal(*lead, 7, *inner, seed=1)
    out = topk_gather(values, sample)
    assert out.shape == (*lead, 3, *inner)
    flat = zip(
        out.view(-1, 3, *inner),
        sample.weights.view(-1, 3, 7),
        values.view(-1, 7, *inner),
        strict=True,
    )
    for given, weights, row in flat:
        for slot in range(3):
            expected = sum(weights[slot, t] * row[t] for t in range(7))
            torch.testing.assert_close(given[slot], expected)


@pytest.mark.parametrize("method", ["perturbed", "lapsum"])
def test_gather_gradients(method: str) -> None:
    sample = topk_sample(normal(2, 5), 3, method=method, sigma=1.0, num_samples=9, seed=0)
    weights, values = sample.weights.requires_grad_(), normal(2, 5, 2, seed=1).requires_grad_()

    def gather(values: Tensor, weights: Tensor) -> Tensor:
        return topk_gather(values, sample._replace(weights=weights))

    assert torch.autograd.gradcheck(gather, (values, weights))


def test_gather_of_a_soft_set_takes_the_chosen_share() -> None:
    x, values = normal(2, 7), normal(2, 7, 3, seed=1)
    sample = topk_sample(x, 3, method="lapsum")
    out = topk_gather(values, sample)
    for b, slot in itertools.product(range(2), range(3)):
        t = best(x[b].tolist(), 3)[slot]
        torch.testing.assert_close(out[b, slot], sample.weights[b, t] * values[b, t])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gather_keeps_the_values_dtype(dtype: torch.dtype) -> None:
    x = normal(2, 7).float().requires_grad_()
    sample = topk_sample(x, 3, sigma=1.0, num_samples=9, seed=0)
    values = normal(2, 7, 5, seed=1).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = topk_gather(values, sample)
    assert out.dtype == dtype
    expected = torch.einsum("bkn,bne->bke", sample.weights.double(), values.double())
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    out.double().square().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.any() and values.grad.dtype == dtype


def test_gather_of_a_hard_choice_copies_frames() -> None:
    values = normal(3, 9, 2, 4).float().transpose(2, 3)
    sample = topk_sample(normal(3, 9), 4, method="hard")
    out = topk_gather(values, sample)
    assert torch.equal(out, values[torch.arange(3)[:, None], sample.indices])
    assert torch.equal(topk_gather(values[:1].expand(3, -1, -1, -1), sample)[0], out[0])


# Errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_cannot_be_ranked(
    method: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(2, 5)
    x[1, 2] = bad
    wrong = r"scores must be finite in real frames.*in 1 of 10"
    with pytest.raises(ValueError, match=wrong):
        topk_sample(x, 3, method=method)
    with torch.inference_mode():  # nothing lies between the function and the kernel
        for same in (x, x.double(), x.bfloat16(), x.T.contiguous().T, x[:, None]):
            with pytest.raises(ValueError, match=wrong):
                topk_sample(same, 3, method=method)
        # Every place in a vector, and what is left of the last one.
        for frame in range(70):
            row = torch.full((1, 70), -math.inf)
            row[0, frame] = bad
            with pytest.raises(ValueError, match="in 1 of 70"):
                topk_sample(row, 3, method=method)
    monkeypatch.setattr(_checks, "_CHECKS_VALUES", False)
    unchecked = topk_sample(x, 3, method=method, seed=0)
    x[1, 2] = -math.inf
    for one, other in zip(unchecked, topk_sample(x, 3, method=method, seed=0), strict=True):
        assert torch.equal(one, other)


X = torch.zeros(2, 5)
SAMPLE = topk_sample(X, 2, method="hard")


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        (([1.0, 2.0], 1), {}, TypeError, "scores must be a tensor"),
        ((X.int(), 1), {}, TypeError, "scores must be float16.*got int32"),
        ((torch.tensor(1.0), 1), {}, ValueError, r"scores must be \[...,N\].*got a scalar"),
        ((X, 0), {}, ValueError, "k must be between 1 and the number of frames N = 5, got 0"),
        ((X, 6), {}, ValueError, "k must be between 1 and the number of frames N = 5, got 6"),
        ((X[:, :0], 1), {}, ValueError, "k must be between 1 and the number of frames N = 0"),
        ((X, 2.0), {}, TypeError, "k must be an int, got float"),
        ((X, True), {}, TypeError, "k must be an int, got bool"),
        ((X, 2), {"method": "soft"}, ValueError, 'method must be one of "hard", "perturbed"'),
        ((X, 2), {"order": "rank"}, ValueError, 'order must be one of "time", "score"'),
        ((X, 2), {"gradient": "full"}, ValueError, 'gradient must be one of "exact", "diagonal"'),
        ((X, 2), {"sigma": -0.1}, ValueError, "sigma must be a finite number >= 0, got -0.1"),
        ((X, 2), {"sigma": math.nan}, ValueError, "sigma must be a finite number"),
        ((X, 2), {"sigma": torch.ones(1)}, TypeError, "sigma must be a number, got Tensor"),
        ((X, 2), {"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ((X, 2), {"num_samples": 1.5}, TypeError, "num_samples must be an int"),
        ((X, 2), {"method": "gumbel", "temperature": 0}, ValueError, "temperature must be .* > 0"),
        ((X, 2), {"mask": X}, TypeError, "mask must be a bool tensor"),
        ((X, 2), {"mask": torch.ones(5).bool()}, ValueError, "mask must be scores' shape"),
        ((X, 2), {"seed": 1.0}, TypeError, "seed must be an int, got float"),
        ((X, 2), {"seed": 2**64}, ValueError, "seed must fit into 64 bits"),
        ((X, 2), {"seed": torch.ones(2).long()}, TypeError, "int64 tensor with one element"),
        ((X, 2), {"row_offset": -1}, ValueError, "row_offset must be at least 0"),
        ((X, 2), {"noise": X}, ValueError, r"noise must be \[...,n,N\]"),
        ((X, 2), {"noise": X[:, None, :4]}, ValueError, r"noise must be .*\(2, 1, 5\)"),
        ((X, 2), {"noise": X[:, None].expand(2, 0, 5)}, ValueError, r"noise must be"),
        ((X, 2), {"noise": X[:, None] / 0}, ValueError, "noise must be finite"),
        ((X, 2), {"noise": X[:, None], "method": "hard"}, ValueError, "noise goes with method"),
        (
            (X, 2),
            {"noise": torch.zeros(2, 3, 5), "method": "gumbel"},
            ValueError,
            r"noise must be \[...,1,N\] = \(2, 1, 5\), got shape \(2, 3, 5\)",
        ),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        topk_sample(*args, **kwargs)


@pytest.mark.parametrize(
    ("values", "sample", "error", "words"),
    [
        (X, tuple(SAMPLE), TypeError, "sample must be a TopKSample, got tuple"),
        (X.int(), SAMPLE, TypeError, "values must be float16"),
        (X[:, :4], SAMPLE, ValueError, r"values must begin with the scores' shape \(2, 5\), got"),
        (X[0], SAMPLE, ValueError, r"values must begin with the scores' shape \(2, 5\), got"),
        (X.to("meta"), SAMPLE, ValueError, "values must be on sample.weights's device cpu"),
    ],
)
def test_bad_input_to_gather(
    values: Tensor, sample: TopKSample, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        topk_gather(values, sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_gather_by_weights_of_another_dtype(kind: torch.dtype, dtype: torch.dtype) -> None:
    """As by the reference, in values and gradients."""
    if reason := load_cpu_kernels():
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 9, 40, generator=generator).to(kind)
    scores = torch.randn(2, 9, generator=generator)
    sample = topk_sample(scores, 3, sigma=1.0, num_samples=8, seed=1)
    found = {}
    for backend in ("reference", "cpp"):
        x, weights = values.clone().requires_grad_(), sample.weights.to(dtype).requires_grad_()
        with use_backend(backend):
            out = topk_gather(x, sample._replace(weights=weights))
            found[backend] = out.detach(), *torch.autograd.grad(out.float().sum(), (x, weights))
    for one, other in zip(*found.values(), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_the_docstring_examples_run() -> None:
    result = doctest.testmod(importlib.import_module("vd_kernels.topk_sampling.api"))
    assert result.attempted > 0 and result.failed == 0
