"""topk_sample and topk_gather in torch.library: schemas, fakes, gradients, and backends.

Scores are [R,N] in float32 or float64, -inf in frames that are not to be chosen. One operator for
each method, as their arguments and the shapes of their weights differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vd_kernels import _library, backends
from vd_kernels._checks import rows_contiguous
from vd_kernels.topk_sampling import reference
from vd_kernels.topk_sampling.noise import noise_rows

METHODS = ("hard", "perturbed", "gumbel", "lapsum")

Choice = tuple[Tensor, Tensor, Tensor]
"""Weights, indices and which slots are real, as in `TopKSample`."""

_LAID: dict[str, Callable[[Tensor], Tensor]] = {"cpp": Tensor.contiguous, "cuda": rows_contiguous}
"""How the compiled kernels of a backend want scores and gradients to lie in memory."""


def _hard_cpp(scores: Tensor, k: int, order: str) -> Choice:
    choice = _empty_choice(scores, k)
    wrong = torch.ops.vd._topk_hard_cpp.default(scores.contiguous(), k, order == "score", *choice)
    return _allowed(wrong, scores, choice)


def _gumbel_cpp(
    scores: Tensor,
    k: int,
    temperature: float,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
) -> Choice:
    choice = _empty_choice(scores, k)
    drawn = seed, row_offset, noise_rows(noise)
    wrong = torch.ops.vd._topk_gumbel_cpp.default(
        scores.contiguous(), k, *drawn, order == "score", *choice
    )
    return _allowed(wrong, scores, choice)


def _gumbel_backward(backend: str) -> Callable:
    laid = _LAID[backend]

    def run(
        grad: Tensor,
        scores: Tensor,
        indices: Tensor,
        temperature: float,
        seed: Tensor,
        row_offset: int,
        noise: Tensor | None,
    ) -> Tensor:
        found = scores.new_empty(scores.shape)
        drawn = seed, row_offset, noise_rows(noise)
        kernel = getattr(torch.ops.vd, f"_topk_gumbel_backward_{backend}").default
        kernel(laid(grad), laid(scores), indices.contiguous(), temperature, *drawn, found)
        return found

    return run


def _perturbed_cpp(
    scores: Tensor,
    k: int,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> Choice:
    choice = _empty_choice(scores, k)
    drawn = seed, row_offset, noise_rows(noise)
    wrong = torch.ops.vd._topk_perturbed_cpp.default(
        scores.contiguous(), k, sigma, samples, *drawn, order == "score", *choice
    )
    return _allowed(wrong, scores, choice)


def _perturbed_backward_cpp(
    grad: Tensor,
    scores: Tensor,
    indices: Tensor,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> Tensor:
    if sigma == 0:
        return torch.zeros_like(scores)
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    torch.ops.vd._topk_perturbed_backward_cpp.default(
        grad.contiguous(),
        scores.contiguous(),
        indices.contiguous(),
        sigma,
        samples,
        seed,
        row_offset,
        noise_rows(noise),
        order == "score",
        gradient == "diagonal",
        found,
    )
    return found


def _lapsum_cpp(scores: Tensor, k: int, temperature: float, order: str) -> Choice:
    choice = scores.new_empty(scores.shape), *_empty_slots(scores, k)
    wrong = torch.ops.vd._topk_lapsum_cpp.default(
        scores.contiguous(), k, temperature, order == "score", *choice
    )
    return _allowed(wrong, scores, choice)


def _lapsum_backward_cpp(grad: Tensor, scores: Tensor, k: int, temperature: float) -> Tensor:
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    torch.ops.vd._topk_lapsum_backward_cpp.default(
        grad.contiguous(), scores.contiguous(), k, temperature, found
    )
    return found


def _check_places(weights: Tensor, indices: Tensor) -> None:
    """Of a soft set [R,N] memory is read by indices; of weights for slots it is by their place."""
    frames = weights.shape[-1]
    if weights.dim() == indices.dim() and indices.numel() and indices.max() >= frames:
        raise ValueError(f"indices must be below {frames}, got {indices.max().item()}")


def _gather_cpp(values: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    _check_places(weights, indices)
    out = values.new_empty(*indices.shape, values.shape[2])
    torch.ops.vd._topk_gather_cpp.default(
        rows_contiguous(values), weights.float().contiguous(), indices.contiguous(), out
    )
    return out


def _gather_backward_cpp(
    grad: Tensor, values: Tensor, weights: Tensor, indices: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    _check_places(weights, indices)
    # The kernels read and write weights as floats, which cast ones are not.
    kinds = (values, values.dtype), (weights, torch.float32)
    grads = [
        x.new_empty(x.shape, dtype=dtype) if needed else None
        for (x, dtype), needed in zip(kinds, needs, strict=True)
    ]
    torch.ops.vd._topk_gather_backward_cpp.default(
        rows_contiguous(grad),
        rows_contiguous(values),
        weights.float().contiguous(),
        indices.contiguous(),
        *grads,
    )
    return grads[0], grads[1] if grads[1] is None else grads[1].to(weights.dtype)


def _empty_choice(scores: Tensor, k: int) -> Choice:
    """Weights [R,K,N], in which nothing is chosen yet, and room for what `_empty_slots` has."""
    rows, frames = scores.shape
    return scores.new_zeros(rows, k, frames), *_empty_slots(scores, k)


def _empty_slots(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Room for indices [R,K] and which of them are real [R,K]."""
    rows = scores.shape[0]  # len() would not keep a symbol
    return (
        scores.new_empty(rows, k, dtype=torch.int64),
        scores.new_empty(rows, k, dtype=torch.bool),
    )


def _allowed(wrong: int, scores: Tensor, choice: Choice) -> Choice:
    """The choice, unless a kernel found `wrong` scores that no choice can be made among."""
    if wrong:
        raise unordered(wrong, scores)
    return choice


def unordered(wrong: int, scores: Tensor) -> ValueError:
    """What is to be said of scores of which `wrong` are NaN or +inf."""
    return ValueError(
        "scores must be finite in real frames (-inf counts as masked), "
        f"got NaN or +inf in {wrong} of {scores.numel()}"
    )


def _contiguous(run: Callable) -> Callable:
    """The function with results that are contiguous, as the fakes say."""

    def contiguous(*arguments: Any) -> Tensor | tuple[Tensor | None, ...]:
        results = run(*arguments)
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(x if x is None else x.contiguous() for x in results)

    return contiguous


def _masked(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Choice]:
    """The function that returns weights and indices, with the slots that are real added."""

    def masked(*arguments: Any) -> Choice:
        weights, indices = run(*arguments)
        return weights, indices, indices >= 0

    return masked


def _hard_cuda(scores: Tensor, k: int, order: str) -> tuple[Tensor, Tensor]:
    weights, indices, _ = _empty_choice(scores, k)
    torch.ops.vd._topk_hard_cuda.default(
        rows_contiguous(scores), k, order == "score", weights, indices
    )
    return weights, indices


def _gumbel_cuda(
    scores: Tensor,
    k: int,
    temperature: float,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
) -> tuple[Tensor, Tensor]:
    weights, indices, _ = _empty_choice(scores, k)
    drawn = seed, row_offset, noise_rows(noise)
    torch.ops.vd._topk_gumbel_cuda.default(
        rows_contiguous(scores), k, *drawn, order == "score", weights, indices
    )
    return weights, indices


def _perturbed_cuda(
    scores: Tensor,
    k: int,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    weights, indices, _ = _empty_choice(scores, k)
    torch.ops.vd._topk_perturbed_cuda.default(
        rows_contiguous(scores),
        k,
        sigma,
        samples,
        samples_each(len(scores), samples),
        seed,
        row_offset,
        noise_rows(noise),
        order == "score",
        _empty_plan(scores),
        weights,
        indices,
    )
    return weights, indices


def _perturbed_backward_cuda(
    grad: Tensor,
    scores: Tensor,
    indices: Tensor,
    sigma: float,
    samples: int,
    seed: Tensor,
    row_offset: int,
    noise: Tensor | None,
    order: str,
    gradient: str,
) -> Tensor:
    if sigma <= 2.0**-150:  # 0 in float32
        return scores.new_zeros(scores.shape)
    each, diagonal = samples_each(len(scores), samples), gradient == "diagonal"
    groups = -(-samples // each)
    rows, frames = scores.shape
    parts = scores.new_zeros((rows, groups, frames) if diagonal else (rows, samples))
    found = scores.new_empty(scores.shape)
    torch.ops.vd._topk_perturbed_backward_cuda.default(
        rows_contiguous(grad),
        rows_contiguous(scores),
        indices.contiguous(),
        sigma,
        samples,
        each,
        seed,
        row_offset,
        noise_rows(noise),
        order == "score",
        diagonal,
        _empty_plan(scores),
        parts,
        found,
    )
    return parts.sum(1).div_(samples).div_(sigma) if diagonal else found


def _empty_plan(scores: Tensor) -> Tensor:
    """Room for what the CUDA kernels note of each row."""
    rows, frames = scores.shape
    return scores.new_empty(rows, 2 * frames + 3, dtype=torch.int32)


def samples_each(rows: int, samples: int) -> int:
    """How many samples of a row a warp draws: 8,192 warps are to have some, if there are enough."""
    return min(max(1, rows * samples // 8192), 64)


def _by_backend(name: str, cpp: Callable, cuda: Callable | None = None) -> dict[str, Callable]:
    """The implementations of topk_<name>. Of the choices only the C++ ones tell of real slots."""
    complete = _masked if name in METHODS else lambda run: run
    return {
        "cpp": cpp,
        "triton": complete(backends.triton_function("topk_sampling", name)),
        **({"cuda": complete(cuda)} if cuda else {}),
        "reference": _contiguous(complete(getattr(reference, name))),
    }


IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "hard": _by_backend("hard", _hard_cpp, _hard_cuda),
    "perturbed": _by_backend("perturbed", _perturbed_cpp, _perturbed_cuda),
    "perturbed_backward": _by_backend(
        "perturbed_backward", _perturbed_backward_cpp, _perturbed_backward_cuda
    ),
    "gumbel": _by_backend("gumbel", _gumbel_cpp, _gumbel_cuda),
    "gumbel_backward": _by_backend(
        "gumbel_backward", _gumbel_backward("cpp"), _gumbel_backward("cuda")
    ),
    "lapsum": _by_backend("lapsum", _lapsum_cpp),
    "lapsum_backward": _by_backend("lapsum_backward", _lapsum_backward_cpp),
    "gather": _by_backend("gather", _gather_cpp),
    "gather_backward": _by_backend("gather_backward", _gather_backward_cpp),
}
"""For each operator its implementations by backend, the fastest first."""

REFUSES_UNORDERED = frozenset(IMPLEMENTATIONS[method]["cpp"] for method in METHODS)
"""Implementations that find NaN and +inf among the scores themselves, and refuse them."""

_GIVEN_NOISE = "Tensor seed, int row_offset, Tensor? noise"
_WRITTEN_CHOICE = "bool by_score, Tensor(a!) weights, Tensor(b!) indices) -> ()"
# The number of scores that no choice can be made among.
_TRIED_CHOICE = (
    "bool by_score, Tensor(a!) weights, Tensor(b!) indices, Tensor(c!) slot_mask) -> int"
)
for _schema in (
    f"hard_cpp(Tensor scores, int k, {_TRIED_CHOICE}",
    f"perturbed_cpp(Tensor scores, int k, float sigma, int samples, {_GIVEN_NOISE}, "
    f"{_TRIED_CHOICE}",
    "perturbed_backward_cpp(Tensor grad, Tensor scores, Tensor indices, float sigma, int samples, "
    f"{_GIVEN_NOISE}, bool by_score, bool diagonal, Tensor(a!) grad_scores) -> ()",
    f"gumbel_cpp(Tensor scores, int k, {_GIVEN_NOISE}, {_TRIED_CHOICE}",
    "gumbel_backward_cpp(Tensor grad, Tensor scores, Tensor indices, float temperature, "
    f"{_GIVEN_NOISE}, Tensor(a!) grad_scores) -> ()",
    f"lapsum_cpp(Tensor scores, int k, float temperature, {_TRIED_CHOICE}",
    "lapsum_backward_cpp(Tensor grad, Tensor scores, int k, float temperature, "
    "Tensor(a!) grad_scores) -> ()",
    f"hard_cuda(Tensor scores, int k, {_WRITTEN_CHOICE}",
    f"perturbed_cuda(Tensor scores, int k, float sigma, int samples, int each, {_GIVEN_NOISE}, "
    "bool by_score, Tensor(a!) plan, Tensor(b!) weights, Tensor(c!) indices) -> ()",
    "perturbed_backward_cuda(Tensor grad, Tensor scores, Tensor indices, float sigma, int samples, "
    f"int each, {_GIVEN_NOISE}, bool by_score, bool diagonal, Tensor(a!) plan, Tensor(b!) parts, "
    "Tensor(c!) grad_scores) -> ()",
    f"gumbel_cuda(Tensor scores, int k, {_GIVEN_NOISE}, {_WRITTEN_CHOICE}",
    "gumbel_backward_cuda(Tensor grad, Tensor scores, Tensor indices, float temperature, "
    f"{_GIVEN_NOISE}, Tensor(a!) grad_scores) -> ()",
    "gather_cpp(Tensor values, Tensor weights, Tensor indices, Tensor(a!) out) -> ()",
    "gather_backward_cpp(Tensor grad, Tensor values, Tensor weights, Tensor indices, "
    "Tensor(a!)? grad_values, Tensor(b!)? grad_weights) -> ()",
):
    _library.define_private(f"_topk_{_schema}")


def choose(name: str, *arguments: Any) -> Callable:
    """The implementation of topk_<name> that is to run now; one float64 makes sums float64."""
    tensors = [x for x in arguments[:3] if isinstance(x, Tensor)]
    tensor = next((x for x in tensors if x.dtype == torch.float64), tensors[0])
    frames = 0 if name.startswith("gather") else tensor.shape[-1]
    lacks = dict.fromkeys(("cuda", "triton"), lambda: backends.too_many(_counts(name, arguments)))
    return backends.choose(
        f"topk_{name}", IMPLEMENTATIONS[name], tensor, frames=frames, lacks=lacks
    )


def _counts(name: str, arguments: tuple[Any, ...]) -> dict[str, int]:
    """Of what kernels for GPUs have a limit, when topk_<name> is given these arguments.

    There may be several leading dimensions instead of R, and of a frame.
    """
    given = arguments[name.endswith("backward") :]  # without the gradient
    if name.startswith("gather"):
        values, weights, indices, *_ = given
        *lead, slots = indices.shape
        frames, width = weights.shape[-1], math.prod(values.shape[len(lead) + 1 :])
        parts = -(-width * values.element_size() // 4096)
        tiles = -(-slots // 16) * -(-frames // 64)  # at most, of the gradient of weights
        programs = math.prod(lead) * max(slots, slots * parts, frames * parts, tiles)
        return {"programs": programs, "numbers of a frame": width}
    *lead, frames = given[0].shape
    each = -(-frames // 64)
    if name == "perturbed":  # counts become weights in programs of their own
        each = max(each, -(-given[1] * frames // 256))
    if name.startswith("perturbed"):
        each = max(each, -(-given[3] // 64))
    return {"programs": math.prod(lead) * each}


def _define(name: str, schema: str, fake: Callable) -> None:
    def kernel(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        results = choose(name, *arguments)(*arguments)
        if isinstance(results, Tensor):
            return results
        return tuple(arguments[0].new_empty(0) if x is None else x for x in results)

    _library.define(f"topk_{name}{schema}", kernel, fake)


def _choice(scores: Tensor, k: int, *_: Any) -> Choice:
    rows, frames = scores.shape
    return scores.new_empty(rows, k, frames), *_empty_slots(scores, k)


def _soft_choice(scores: Tensor, k: int, *_: Any) -> Choice:
    return scores.new_empty(scores.shape), *_empty_slots(scores, k)


def _like_scores(grad: Tensor, scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape)


_define("hard", "(Tensor scores, int k, str order) -> (Tensor, Tensor, Tensor)", _choice)

_NOISE = "Tensor seed, SymInt row_offset, Tensor? noise"
_define(
    "perturbed",
    f"(Tensor scores, int k, float sigma, int samples, {_NOISE}, str order, str gradient)"
    " -> (Tensor, Tensor, Tensor)",
    _choice,
)
_define(
    "perturbed_backward",
    f"(Tensor grad, Tensor scores, Tensor indices, float sigma, int samples, {_NOISE}, str order, "
    "str gradient) -> Tensor",
    _like_scores,
)
_define(
    "gumbel",
    f"(Tensor scores, int k, float temperature, {_NOISE}, str order) -> (Tensor, Tensor, Tensor)",
    _choice,
)
_define(
    "gumbel_backward",
    f"(Tensor grad, Tensor scores, Tensor indices, float temperature, {_NOISE}) -> Tensor",
    _like_scores,
)
_define(
    "lapsum",
    "(Tensor scores, int k, float temperature, str order) -> (Tensor, Tensor, Tensor)",
    _soft_choice,
)
_define(
    "lapsum_backward",
    "(Tensor grad, Tensor scores, int k, float temperature) -> Tensor",
    _like_scores,
)
_define(
    "gather",
    "(Tensor values, Tensor weights, Tensor indices) -> Tensor",
    lambda values, weights, indices: values.new_empty(*indices.shape, values.shape[2]),
)
_define(
    "gather_backward",
    "(Tensor grad, Tensor values, Tensor weights, Tensor indices, bool[2] needs)"
    " -> (Tensor, Tensor)",
    lambda grad, values, weights, indices, needs: tuple(
        x.new_empty(x.shape) if needed else grad.new_empty(0)
        for x, needed in zip((values, weights), needs, strict=True)
    ),
)


def _setup_perturbed(ctx: Any, inputs: tuple, output: Choice) -> None:
    scores, _, sigma, samples, seed, row_offset, noise, order, gradient = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(scores, output[1], seed, noise)
    ctx.settings = (sigma, samples), row_offset, (order, gradient)


def _perturbed_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    scores, indices, seed, noise = ctx.saved_tensors
    before, row_offset, after = ctx.settings
    found = torch.ops.vd.topk_perturbed_backward(
        grad, scores, indices, *before, seed, row_offset, noise, *after
    )
    return found, *[None] * 8


def _setup_gumbel(ctx: Any, inputs: tuple, output: Choice) -> None:
    scores, _, ctx.temperature, seed, ctx.row_offset, noise, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(scores, output[1], seed, noise)


def _gumbel_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    scores, indices, seed, noise = ctx.saved_tensors
    found = torch.ops.vd.topk_gumbel_backward(
        grad, scores, indices, ctx.temperature, seed, ctx.row_offset, noise
    )
    return found, *[None] * 6


def _setup_lapsum(ctx: Any, inputs: tuple, output: Choice) -> None:
    scores, ctx.k, ctx.temperature, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(scores)


def _lapsum_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (scores,) = ctx.saved_tensors
    return torch.ops.vd.topk_lapsum_backward(grad, scores, ctx.k, ctx.temperature), *[None] * 3


def _setup_gather(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    found = torch.ops.vd.topk_gather_backward(grad, *ctx.saved_tensors, needs)
    return *(g if needed else None for g, needed in zip(found, needs, strict=True)), None


_library.differentiable("topk_perturbed", _perturbed_gradient, _setup_perturbed)
_library.differentiable("topk_gumbel", _gumbel_gradient, _setup_gumbel)
_library.differentiable("topk_lapsum", _lapsum_gradient, _setup_lapsum)
_library.differentiable("topk_gather", _gather_gradient, _setup_gather)
for _name in ("perturbed", "gumbel", "lapsum", "gather"):
    _library.once_differentiable(f"topk_{_name}_backward")
