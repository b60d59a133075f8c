"""Cases and baselines of `vd_kernels.topk_sample`: perturbed top-k and its gradient; one choice.

A fused operator is bound by arithmetic here, a normal for each frame and sample, not by the few
bytes of its floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import vd_kernels
from benchmarks.cases import Case, Contestant, Floor, Inputs, Task, curve, normal, ours, spread_over
from vd_kernels.topk_sampling.noise import gumbel_noise, normal_noise

SIGMA = 2.0**-4
"""A power of two: sigma * z is exact, so that a fused multiply-add chooses the same frames."""


class WithoutOneHots(torch.autograd.Function):
    """Counts by scatter_add, the whole vector-Jacobian product by gather."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, k: int) -> Tensor:
        rows, samples, frames = noise.shape
        drawn = (scores.unsqueeze(1) + SIGMA * noise).topk(k, sorted=False).indices.sort(-1).values
        cells = (drawn + torch.arange(k, device=drawn.device) * frames).flatten(1)
        counts = scores.new_zeros(rows, k * frames)
        counts.scatter_add_(1, cells, scores.new_ones(()).expand(cells.shape))
        ctx.save_for_backward(noise, cells)
        return counts.view(rows, k, frames) / samples

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        noise, cells = ctx.saved_tensors
        rows, samples, _ = noise.shape
        gains = grad.flatten(1).gather(1, cells).view(rows, samples, -1).sum(-1)
        gains = (gains - gains.mean(-1, keepdim=True)) / ((samples - 1) * SIGMA)
        return torch.bmm(gains.unsqueeze(1), noise).squeeze(1), None, None


class _Published(torch.autograd.Function):
    """The form of google-research's patch selection: one-hots, and the Jacobian's diagonal."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, k: int) -> Tensor:
        drawn = torch.topk(scores[:, None] + noise * SIGMA, k, sorted=False).indices
        chosen = F.one_hot(drawn.sort(-1).values, scores.shape[-1]).to(scores.dtype)  # [B,n,K,N]
        ctx.save_for_backward(chosen, noise)
        return chosen.mean(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        chosen, noise = ctx.saved_tensors
        expected = torch.einsum("bnkd,bnd->bkd", chosen, noise) / noise.shape[1] / SIGMA
        return torch.einsum("bkd,bkd->bd", grad, expected), None, None


class _RowByRow(torch.autograd.Function):
    """The definition, for one row after the other; frames are chosen in float32."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, k: int, diagonal: bool) -> Tensor:
        ctx.chosen, ctx.noise, ctx.diagonal = [], noise, diagonal
        for x, z in zip(scores.float(), noise.float(), strict=True):
            drawn = (x + SIGMA * z).sort(dim=-1, descending=True, stable=True).indices[:, :k]
            ctx.chosen.append(F.one_hot(drawn.sort(-1).values, len(x)).to(scores.dtype))
        return torch.stack([hot.mean(0) for hot in ctx.chosen])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows = []
        for hot, z, g in zip(ctx.chosen, ctx.noise, grad, strict=True):
            if ctx.diagonal:
                rows.append((torch.einsum("nkt,nt->kt", hot, z) * g).sum(0) / (len(z) * SIGMA))
            else:
                gains = torch.einsum("nkt,kt->n", hot, g)
                rows.append((gains - gains.mean()) @ z / ((len(z) - 1) * SIGMA))
        return torch.stack(rows), None, None, None


def drawing(method: type[torch.autograd.Function]) -> Any:
    """A method with noise of torch's own, which it pays for, unless noise is given."""

    def function(
        scores: Tensor, noise: Tensor | None, seed: int | None, k: int, samples: int
    ) -> tuple[Tensor]:
        if noise is None:
            rows, frames = scores.shape
            noise = torch.randn(rows, samples, frames, device=scores.device)
        return (method.apply(scores, noise, k),)

    return function


def fused(
    scores: Tensor, noise: Tensor | None, seed: int | None, k: int, samples: int
) -> tuple[Tensor]:
    """Ours makes the very noise of the seed, so it takes none."""
    return (vd_kernels.topk_sample(scores, k, sigma=SIGMA, num_samples=samples, seed=seed).weights,)


class TopKSample(Task):
    """Weights [B,K,N] of perturbed scores [B,N], n samples a row."""

    operator, variant = "topk_sample", "perturbed"
    differentiable = ("scores",)
    small: ClassVar = {"B": 3, "n": 40, "K": 3, "N": 12}

    def inputs(self, case: Case, seed: int, *, checking: bool) -> Inputs:
        b, n, k, frames = (case.sizes[name] for name in "BnKN")
        scores = normal(seed, "scores", (b, frames), case)
        inputs = {"scores": scores, "noise": None, "seed": None, "k": k, "samples": n}
        if checking:
            noise = normal_noise(b, n, frames, seed, 0, scores.device)
            inputs |= {"scores": _without_ties(scores, noise, k), "noise": noise, "seed": seed}
        return inputs

    def oracle(
        self, scores: Tensor, noise: Tensor, k: int, diagonal: bool = False, **_: Any
    ) -> tuple[Tensor, ...]:
        return (_RowByRow.apply(scores, noise, k, diagonal),)

    def contestants(self, case: Case) -> list[Contestant]:
        def only_the_diagonal(**inputs: Any) -> tuple[Tensor, ...]:
            return self.oracle(**inputs, diagonal=True)

        eager = drawing(WithoutOneHots)
        return [
            *ours(fused),
            Contestant("eager without one-hots", eager),
            Contestant("torch.compile without one-hots", eager, compiled=True),
            Contestant("published form", drawing(_Published), oracle=only_the_diagonal),
        ]

    def floor(self, case: Case) -> Floor:
        """Forward: scores in, weights out. Backward: scores and grad in, the gradient out."""
        b, k, frames = (case.sizes[name] for name in "BKN")
        rows, weights = {"forward": (1, 1), "backward": (2, 1), "both": (3, 2)}[case.mode]
        return Floor(bytes=4 * b * frames * (rows + weights * k))


# ---------------------------------------------------------------------------------------------
# One choice a row


def eager_hard(scores: Tensor, noise: None, seed: None, k: int) -> tuple[Tensor]:
    indices = scores.topk(k).indices.sort(-1).values
    return (F.one_hot(indices, scores.shape[-1]).to(scores.dtype),)


def scattered_hard(scores: Tensor, noise: None, seed: None, k: int) -> tuple[Tensor]:
    """Without one-hots in int64."""
    indices = scores.topk(k).indices.sort(-1).values
    weights = scores.new_zeros(len(scores), k, scores.shape[-1])
    return (weights.scatter_(2, indices.unsqueeze(-1), 1.0),)


def eager_gumbel(
    scores: Tensor, noise: Tensor | None, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The k best of noisy scores, straight through to the softmax that each pick is drawn from.

    Returns weights and indices. Noise that is not given is drawn.
    """
    if noise is None:
        noise = -torch.empty_like(scores).exponential_().log()
    keys = scores + noise.to(scores.dtype)
    ranked = keys.topk(k).indices
    hard = F.one_hot(ranked, scores.shape[-1]).to(scores.dtype)
    gone = (hard.cumsum(1) - hard).bool()
    soft = (keys.unsqueeze(1) / temperature).masked_fill(gone, -torch.inf).softmax(-1)
    indices, order = ranked.sort(-1)
    weights = (hard + soft - soft.detach()).gather(1, order.unsqueeze(-1).expand_as(hard))
    return weights, indices


def noise_of_gumbel(scores: Tensor, seed: int) -> Tensor:
    """The operator's own noise of a seed, as large as scores [B,N]."""
    given = torch.tensor([seed], device=scores.device)
    return gumbel_noise(len(scores), 1, scores.shape[-1], given, 0, scores.device)[:, 0]


def drawn_gumbel(scores: Tensor, noise: Tensor | None, seed: int | None, k: int) -> tuple[Tensor]:
    return eager_gumbel(scores, noise, k, 1.0)[:1]


def ranked_gumbel(scores: Tensor, noise: Tensor | None, seed: int | None, k: int) -> tuple[Tensor]:
    """Without one-hots: what each pick takes, and what is gone by then, by the ranks of frames."""
    if noise is None:
        noise = -torch.empty_like(scores).exponential_().log()
    keys = scores + noise.to(scores.dtype)
    ranked = keys.topk(k).indices
    turns = torch.arange(k, device=keys.device).expand_as(ranked)
    ranks = torch.full_like(keys, k, dtype=torch.int64).scatter_(1, ranked, turns).unsqueeze(1)
    picks = ranked.sort(-1).indices.unsqueeze(-1)  # in which turn a slot's frame was picked
    soft = keys.unsqueeze(1).masked_fill(ranks < picks, -torch.inf).softmax(-1)
    return ((ranks == picks).to(soft.dtype) + soft - soft.detach(),)


@dataclass(frozen=True)
class OneChoice(TopKSample):
    """Weights [B,K,N] of one choice a row: the K best scores, or those under Gumbel noise."""

    variant: str = "hard"

    small: ClassVar = {"B": 3, "K": 3, "N": 12}

    def inputs(self, case: Case, seed: int, *, checking: bool) -> Inputs:
        b, k, n = (case.sizes[name] for name in "BKN")
        scores = normal(seed, "scores", (b, n), case)
        inputs = {"scores": scores, "noise": None, "seed": None, "k": k}
        if checking and self.variant == "gumbel":
            inputs |= {"noise": noise_of_gumbel(scores, seed), "seed": seed}
        return inputs

    def oracle(self, **inputs: Any) -> tuple[Tensor, ...]:
        return (eager_hard if self.variant == "hard" else drawn_gumbel)(**inputs)

    def contestants(self, case: Case) -> list[Contestant]:
        def own(scores: Tensor, noise: Tensor | None, seed: int | None, k: int) -> tuple[Tensor]:
            return (vd_kernels.topk_sample(scores, k, method=self.variant, seed=seed).weights,)

        hard = self.variant == "hard"
        eager, lean = (eager_hard, scattered_hard) if hard else (drawn_gumbel, ranked_gumbel)
        return [
            *ours(own),
            Contestant("eager", eager),
            Contestant("torch.compile", eager, compiled=True),
            Contestant("eager without one-hots", lean),
            Contestant("torch.compile without one-hots", lean, compiled=True),
        ]


def _without_ties(scores: Tensor, noise: Tensor, k: int) -> Tensor:
    """Scores with rows drawn anew in which a sample's K-th and next best are equal.

    torch.topk may take either of them, ours takes the first.
    """
    generator = torch.Generator(scores.device).manual_seed(0)
    scores = scores.clone()
    while k < scores.shape[-1]:
        best = (scores.unsqueeze(1) + SIGMA * noise).topk(k + 1).values
        tied = (best[..., -1] == best[..., -2]).any(-1)
        if not tied.any():
            break
        scores[tied] = torch.randn(
            int(tied.sum()), scores.shape[-1], generator=generator, device=scores.device
        )
    return scores


def cases(device: str) -> Iterator[Case]:
    task = TopKSample()
    sizes = {"B": 256 if device == "cuda" else 16, "n": 500, "K": 16, "N": 512}
    yield from spread_over(task, sizes, device, dtypes=("float32",))
    rows = {name: sizes[name] for name in "BKN"}
    hard, gumbel = OneChoice("hard"), OneChoice("gumbel")
    yield from spread_over(hard, rows, device, modes=("forward",), dtypes=("float32",))
    yield from spread_over(gumbel, rows, device, modes=("forward", "both"), dtypes=("float32",))
    tiny = {"B": 1, "n": 2, "K": 1, "N": 4}
    yield Case(task, tiny, torch.float32, "forward", device, repeats=200)
    for axis, values in {
        "N": (64, 128, 256, 512, 1024, 2048, 4096),
        "K": (1, 4, 16, 64),
        "n": (50, 100, 200, 500, 1000),
        "B": (1, 4, 16, 64),
    }.items():
        yield from curve(task, sizes, device, axis, values, mode="both", dtypes=("float32",))
