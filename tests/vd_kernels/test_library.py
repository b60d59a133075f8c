"""All operators in torch.library: opcheck, compilation, export, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vd_kernels import (
    backends,
    language_gate,
    spacetime_attention,
    topk_gather,
    topk_sample,
    use_backend,
)

LOW_AND_FULL = (torch.float32, torch.bfloat16, torch.float64)


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    size = sum(n * 31**i for i, n in enumerate(shape))
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(size))
    return x.to(dtype).requires_grad_(grad)


def sliced(x: Tensor) -> Tensor:
    """The same values where neighbours lie twice as far apart, as in a slice of a fused tensor."""
    grad = x.requires_grad
    return x.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_(grad)


def gate_arguments(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    length: int = 13,
    tokens: int = 3,
    channel: bool = False,
    value: bool = True,
    reduction: str = "softmax",
    need_gate: bool = True,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Any, ...]:
    heads, width, channels = 2, 5, 7

    def make(*shape: int) -> Tensor:
        return change(normal(*shape, dtype=dtype, grad=True))

    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[:1, :1] = False
    mask[1:2] = False
    return (
        make(batch, length, heads, width),
        make(batch, tokens, heads, width),
        make(batch, length, heads, channels) if value else None,
        make(batch, tokens, heads, channels) if channel else None,
        mask,
        normal(*((heads, channels) if channel else (heads,)), grad=True),
        0.4,
        reduction,
        need_gate,
    )


def attention_arguments(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    frames: int = 3,
    patches: int = 4,
    axis: str = "time",
    window: list[int] | None = None,
    grid: list[int] | None = None,
    causal: bool = False,
    prefixes: str = "",
    gate: bool = True,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Any, ...]:
    heads, width = 2, 5
    groups = {"time": patches, "space": frames, "joint": 1}[axis]

    def make(*shape: int) -> Tensor:
        return change(normal(*shape, dtype=dtype, grad=True))

    mask = torch.ones(batch, frames, dtype=torch.bool)
    mask[:1, -1:] = False
    prefix = [
        normal(batch, 1 if letter == "v" else groups, 2, heads, width, dtype=dtype, grad=True)
        if letter in prefixes
        else None
        for letter in "qkv"
    ]
    return (
        *(make(batch, frames, patches, heads, width) for _ in range(3)),
        axis,
        window,
        grid,
        causal,
        mask,
        *prefix,
        normal(batch, 1, patches, heads, 1, grad=True) if gate else None,
        0.4,
    )


def scores(rows: int = 3, frames: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    x = normal(rows, frames, dtype=dtype)
    if rows:
        x[0, 1] = -torch.inf
        x[-1, 2:] = -torch.inf
    return x.requires_grad_()


SEED = torch.tensor(5)


def opcheck(name: str, *arguments: Any) -> None:
    torch.library.opcheck(getattr(torch.ops.vd, name).default, arguments)


@pytest.mark.parametrize(
    "settings",
    [
        *({"dtype": dtype} for dtype in LOW_AND_FULL),
        {"channel": True},
        {"channel": True, "value": False},
        {"reduction": "max"},
        {"reduction": "mean", "need_gate": False},
        {"change": sliced},
        {"change": lambda x: x[:, :1].expand(x.shape)},
        {"batch": 0},
        {"length": 0},
        {"tokens": 0},
    ],
)
def test_opcheck_language_gate(settings: dict[str, Any]) -> None:
    opcheck("language_gate", *gate_arguments(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        *({"dtype": dtype} for dtype in LOW_AND_FULL),
        {"axis": "time", "causal": True, "window": [1]},
        {"axis": "space", "window": [0, 1, 1], "grid": [2, 2], "gate": False},
        {"axis": "joint", "window": [1, 0, 1], "grid": [2, 2]},
        {"axis": "space", "prefixes": "kv"},
        {"axis": "time", "prefixes": "qkv"},
        {"axis": "joint", "prefixes": "qkv", "gate": False},
        {"change": sliced},
        {"change": lambda x: x[:, :1].expand(x.shape)},
        {"batch": 0},
        {"frames": 0, "axis": "space"},
        {"patches": 0},
    ],
)
def test_opcheck_spacetime_attention(settings: dict[str, Any]) -> None:
    opcheck("spacetime_attention", *attention_arguments(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("order", ["time", "score"])
def test_opcheck_topk_sampling(dtype: torch.dtype, rows: int, order: str) -> None:
    x = scores(rows, dtype=dtype)
    noise = normal(rows, 4, 9, dtype=dtype)
    opcheck("topk_hard", x.detach(), 3, order)
    for given in (None, noise):
        opcheck("topk_perturbed", x, 3, 0.5, 4, SEED, 2, given, order, "exact")
        opcheck("topk_gumbel", x, 3, 0.7, SEED, 2, None if given is None else given[:, :1], order)
    opcheck("topk_lapsum", x, 3, 0.3, order)
    weights, indices, _ = torch.ops.vd.topk_hard(x.detach(), 3, order)
    soft, *_ = torch.ops.vd.topk_lapsum(x.detach(), 3, 0.3, order)
    for w in (weights, soft):
        values = normal(rows, 9, 5, dtype=torch.bfloat16, grad=True)
        opcheck("topk_gather", values, w.clone().requires_grad_(), indices)


# Derivatives of derivatives, and transforms


def first_gradient(name: str) -> tuple[Tensor, Tensor]:
    """An input and its gradient, with a graph."""
    if name == "language_gate":
        arguments = gate_arguments()
        x, out = arguments[0], torch.ops.vd.language_gate(*arguments)[0]
    elif name == "spacetime_attention":
        arguments = attention_arguments()
        x, out = arguments[0], torch.ops.vd.spacetime_attention(*arguments)[0]
    elif name == "topk_gather":
        x = normal(2, 9, 5, grad=True)
        sample = topk_sample(normal(2, 9), 3, method="hard")
        out = topk_gather(x, sample)
    else:
        x = scores()
        out = topk_sample(x, 3, method=name.removeprefix("topk_"), sigma=0.5, seed=0).weights
    return x, torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]


OPERATORS = [
    "language_gate",
    "spacetime_attention",
    "topk_perturbed",
    "topk_gumbel",
    "topk_lapsum",
    "topk_gather",
]


@pytest.mark.parametrize("name", OPERATORS)
def test_double_backward_is_an_error(name: str) -> None:
    x, gradient = first_gradient(name)
    with pytest.raises(RuntimeError, match=f"vd::{name}_backward cannot be differentiated"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_is_an_error(grad: bool) -> None:
    q = normal(3, 2, 4, 2, 8)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(NotImplementedError, match=r"vd::language_gate has no rule .*vmap"),
    ):
        torch.func.vmap(lambda x: language_gate(x, q[0]))(q)


class Recorded(Tensor):
    """Wraps a tensor and notes which operators meet it."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return cls._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        plain = [x.inner if isinstance(x, cls) else x for x in args]
        return function(*plain, **(kwargs or {}))


def test_without_gradients_whoever_watches_still_sees_the_operator() -> None:
    """The way past the dispatcher is for calls that nothing observes."""
    q = normal(1, 3, 2, 4)
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
    video = fake.unsqueeze(2)
    with torch.no_grad():
        assert language_gate(fake, fake).shape == (1, 3, 2)  # outside of its mode
        assert spacetime_attention(video, video, video, axis="time").shape == (1, 3, 1, 2, 4)
        Recorded.seen.clear()
        language_gate(Recorded(q), q)
    assert Recorded.seen[0] == "vd.language_gate.default"
    assert not any("cpp" in name for name in Recorded.seen)


def test_forward_mode_is_an_error() -> None:
    """A tangent must not get lost in silence."""
    q, x = normal(2, 3, 4, 2, 8), normal(2, 9)
    sample = topk_sample(x, 2, method="hard")
    for function, primal in (
        (lambda x: language_gate(x, q[:, 0]), q[:, 1]),
        (lambda x: spacetime_attention(q, q, x, axis="time"), q),
        (lambda x: topk_sample(x, 2, method="lapsum").weights, x),
        (lambda x: topk_gather(x, sample), normal(2, 9, 3)),
    ):
        function(primal)
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(function, (primal,), (primal,))


# Compilation, export, checkpoints


def whole(frames: Tensor, tokens: Tensor, mask: Tensor, gate_bias: Tensor) -> Tensor:
    """All operators in a row: frames [B,N,S,H,D], tokens [B,M,H,D]."""
    count, patches = frames.shape[1:3]
    gate = language_gate(frames.flatten(1, 2), tokens, key_mask=mask, bias=gate_bias)
    gate = gate.unflatten(1, (count, patches)).unsqueeze(-1)
    sample = topk_sample(gate.mean((2, 3, 4)), 3, sigma=0.3, num_samples=5, seed=7)
    chosen = topk_gather(frames, sample)
    seen = spacetime_attention(chosen, chosen, chosen, axis="time", gate=topk_gather(gate, sample))
    gumbel = topk_sample(seen.mean((2, 3, 4)), 2, method="gumbel", seed=torch.tensor(3))
    soft = topk_sample(seen.mean((2, 3, 4)), 2, method="lapsum")
    return topk_gather(seen, gumbel).sum((1, 2)) + topk_gather(seen, soft).sum((1, 2))


def whole_inputs(batch: int, count: int, patches: int = 4) -> list[Tensor]:
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return [
        normal(batch, count, patches, 2, 8, grad=True),
        normal(batch, 6, 2, 8, grad=True),
        mask,
        normal(2, grad=True),
    ]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_sizes(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend=backend)
    counter = torch._dynamo.utils.counters
    counter.clear()
    # No size like another one of the first call: torch would take them for one symbol.
    for batch, count in ((5, 7), (3, 12), (11, 9)):
        inputs = whole_inputs(batch, count)
        for one, other in zip(results(compiled, inputs), results(whole, inputs), strict=True):
            # Of the largest: what is left of terms that cancel keeps their rounding.
            allowed = 1e-6 * max(1.0, other.abs().max().item())
            torch.testing.assert_close(one, other, rtol=1e-5, atol=allowed)
    assert counter["stats"]["unique_graphs"] == 1, "another size was compiled anew"


class Whole(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return whole(*inputs)


def exported(inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    batch, count = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("count", min=4)
    shapes = ({0: batch, 1: count}, {0: batch}, {0: batch}, None)
    return torch.export.export(Whole(), inputs, dynamic_shapes={"inputs": shapes})


def test_exports_with_dynamic_sizes(tmp_path) -> None:
    inputs = tuple(x.detach() for x in whole_inputs(2, 7))
    torch.export.save(exported(inputs), tmp_path / "whole.pt2")
    again = torch.export.load(tmp_path / "whole.pt2").module()
    for batch, count in ((2, 7), (3, 12)):
        inputs = tuple(x.detach() for x in whole_inputs(batch, count))
        torch.testing.assert_close(again(*inputs), whole(*inputs))


def test_aot_inductor_round_trip(tmp_path) -> None:
    inputs = tuple(x.detach() for x in whole_inputs(2, 7))
    # Headers compiled beforehand pay where many programs are compiled.
    headers = ("cpp_cache_precompile_headers", "aot_inductor.precompile_headers")
    with torch._inductor.config.patch(dict.fromkeys(headers, False)):
        path = torch._inductor.aoti_compile_and_package(
            exported(inputs), package_path=str(tmp_path / "whole.pt2")
        )
    packaged = torch._inductor.aoti_load_package(path)
    for batch, count in ((2, 7), (3, 12)):
        inputs = tuple(x.detach() for x in whole_inputs(batch, count))
        torch.testing.assert_close(packaged(*inputs), whole(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["perturbed", "gumbel"])
def test_a_checkpoint_recomputes_the_same_choice(method: str) -> None:
    """seed=None: what torch's generator gives, and gives again when a checkpoint recomputes."""
    drawn = []

    def choose(x: Tensor) -> Tensor:
        sample = topk_sample(x, 3, method=method, sigma=2.0)
        drawn.append(sample.weights.detach())
        return sample.weights.square().sum() * x.sum()

    x = normal(4, 32, grad=True)
    checkpoint(choose, x, use_reentrant=False).backward()
    assert len(drawn) == 2 and torch.equal(*drawn)
    choose(x)
    assert not torch.equal(drawn[0], drawn[2])


def test_the_global_seed_governs() -> None:
    x = normal(4, 32)
    torch.manual_seed(1)
    first = topk_sample(x, 3, method="gumbel").indices
    torch.manual_seed(1)
    assert torch.equal(first, topk_sample(x, 3, method="gumbel").indices)
    assert not torch.equal(first, topk_sample(x, 3, method="gumbel").indices)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        inputs = [
            normal(4, 12, 49, 2, 64, grad=True),
            normal(4, 33, 2, 64, grad=True),
            torch.ones(4, 33, dtype=torch.bool),
            normal(2, grad=True),
        ]
        return results(whole, inputs)

    before = torch.get_num_threads()
    try:
        runs = [run(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*runs, strict=True):
        assert all(torch.equal(one, other) for other in others)


# Backends

FORCED = {
    "language_gate": lambda: language_gate(normal(1, 2, 1, 4), normal(1, 3, 1, 4)),
    "spacetime_attention": lambda: spacetime_attention(*[normal(1, 2, 3, 1, 4)] * 3, axis="time"),
    "topk_perturbed": lambda: topk_sample(normal(1, 9), 2, seed=0),
    "topk_hard": lambda: topk_sample(normal(1, 9), 2, method="hard"),
    "topk_gather": lambda: topk_gather(
        normal(1, 9, 2), topk_sample(normal(1, 9), 2, method="hard")
    ),
}


@pytest.mark.parametrize("name", FORCED)
def test_a_forced_backend_that_is_missing_says_why(name: str, monkeypatch) -> None:
    FORCED[name]()
    monkeypatch.setattr(backends, "_environment", "triton")
    why = r"(takes tensors on an NVIDIA or AMD|has no Triton implementation)"
    with pytest.raises(RuntimeError, match=rf"cannot run on backend 'triton': it {why}"):
        FORCED[name]()
    with use_backend("reference"):  # the nearer wish holds
        FORCED[name]()
        with use_backend("cuda"), pytest.raises(RuntimeError, match="on backend 'cuda'"):
            FORCED[name]()
        FORCED[name]()


@pytest.mark.parametrize("name", FORCED)
@torch.inference_mode()
def test_what_a_call_is_remembered_by_holds_the_backend(name: str) -> None:
    FORCED[name]()
    for _ in range(2):
        with use_backend("cuda"), pytest.raises(RuntimeError, match="on backend 'cuda'"):
            FORCED[name]()
        FORCED[name]()


@torch.inference_mode()
def test_signatures_do_not_pile_up(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_plans", {})
    for length in range(1, 4200):
        language_gate(torch.ones(1, 1, 1, 2), torch.ones(1, length, 1, 2))
    assert len(backends._plans) < 4096


def test_backward_runs_on_the_forced_backend_too() -> None:
    x = normal(1, 2, 1, 4, grad=True)
    out = language_gate(x, normal(1, 3, 1, 4)).sum()
    with use_backend("cuda"), pytest.raises(RuntimeError, match="language_gate cannot run on"):
        out.backward()


def test_a_backend_without_a_name_is_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match="use_backend must be one of"), use_backend("fast"):
        pass
    monkeypatch.setattr(backends, "_environment", "fast")
    with pytest.raises(ValueError, match='VD_BACKEND must be one of "reference"'):
        FORCED["language_gate"]()
    monkeypatch.setattr(backends, "_environment", "")
    FORCED["language_gate"]()
