"""Draws docs/topk_gradient.png: where two gradients of the perturbed top-k point.

python docs/topk_gradient.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vd_kernels import topk_sample

CASES, FRAMES, CHOSEN, SIGMA = 30, 16, 4, 0.5
SAMPLES = (8, 32, 128, 512, 2048)


def cosines(samples: int, gradient: str, many: int = 40_000) -> Tensor:
    """Of the gradient by so many samples with the true one, [CASES].

    The loss is a random linear function of the weights, so that its true gradient is that of a
    smooth expectation; ``many`` samples of the exact product, drawn apart, stand for it.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(CASES, FRAMES, generator=generator)
    grad = torch.randn(CASES, CHOSEN, FRAMES, generator=generator)

    def estimate(count: int, rule: str, seed: int) -> Tensor:
        x = scores.clone().requires_grad_()
        sample = topk_sample(x, CHOSEN, sigma=SIGMA, num_samples=count, gradient=rule, seed=seed)
        return torch.autograd.grad(sample.weights, x, grad)[0]

    return F.cosine_similarity(estimate(samples, gradient, 1), estimate(many, "exact", 2))


def draw(target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for rule, colour, label in (
        ("exact", "#1b6ca8", "exact: the full vector-Jacobian product"),
        ("diagonal", "#c0392b", "diagonal: what published code keeps of it"),
    ):
        low, middle, high = torch.stack(
            [cosines(n, rule).quantile(torch.tensor([0.25, 0.5, 0.75])) for n in SAMPLES], dim=1
        )
        axes.plot(SAMPLES, middle, "o-", color=colour, label=label)
        axes.fill_between(SAMPLES, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="samples n", ylabel="cosine with the true gradient", ylim=(-0.1, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", frameon=False)
    axes.set_title(f"Perturbed top-{CHOSEN} of {FRAMES}, median and quartiles of {CASES} cases")
    figure.savefig(target, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("topk_gradient.png"))
