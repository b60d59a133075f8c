"""Grids: of what GPU kernels take, nothing is launched with more programs than a grid may have.

One size after the other grows to the largest that is still taken, by tensors without memory, and
what would be launched then is looked at. A kernel whose grid grows with something that `too_many`
is not told of is found here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vd_kernels import backends, use_backend
from vd_kernels.backends import MOST, load_triton
from vd_kernels.language_gate import op as gate
from vd_kernels.spacetime_attention import op as attention
from vd_kernels.topk_sampling import op as topk

if load_triton():
    pytest.skip(load_triton(), allow_module_level=True)

import triton

from vd_kernels import _triton
from vd_kernels.language_gate import triton_kernels as gate_kernels
from vd_kernels.spacetime_attention import triton_kernels as attention_kernels
from vd_kernels.topk_sampling import triton_kernels as topk_kernels

Call = tuple[Callable, tuple[Any, ...]]
"""The function that was chosen for a call, and what it is given."""


class Form(NamedTuple):
    """Calls of an operator with sizes of one letter each."""

    name: str
    calls: Callable[..., Iterator[Call]]
    bases: tuple[dict[str, int], ...]
    """Sizes from which one grows at a time."""


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def gates(form: str) -> Callable[..., Iterator[Call]]:
    word, _, alone = form.partition(" ")
    channel = word == "channel"

    def calls(B: int, L: int, M: int, H: int, D: int) -> Iterator[Call]:
        query, key = half(B, L, H, D), half(B, M, H, D)
        value, gate_value = None if alone else query, half(B, M, H, D) if channel else None
        bias = half(H, D) if channel else half(H)
        rest = query, key, value, gate_value, None, bias, 0.1, "softmax" if channel else word
        channels = (D,) if channel else ()
        grads = value, half(B, L, H, *channels) if alone else None
        needs = True, True, not alone, channel, True
        yield gate.choose(gate.FORWARD, *rest[:4]), (*rest, True)
        yield gate.choose(gate.BACKWARD, *rest[:4]), (*grads, *rest, needs)

    return calls


def attentions(form: str) -> Callable[..., Iterator[Call]]:
    axis, *given = form.split()

    def calls(B: int, T: int, S: int, H: int, D: int, P: int = 0) -> Iterator[Call]:
        x = half(B, T, S, H, D)
        prefix = half(B, 1, P, H, D) if P else None
        shared = half(1, 1, 1, 1, D) if "shared" in given else None
        # A window, as torch's kernels take all other calls over both axes.
        rest = x, x, x, axis, (1, 1, 1), (S, 1), False, None, *(prefix,) * 3, shared, 0.1
        needs = [True] * 3 + [prefix is not None] * 3 + [shared is not None]
        chosen = x, axis, rest[4], None, prefix
        yield attention.choose(attention.FORWARD, *chosen), rest
        yield attention.choose(attention.BACKWARD, *chosen), (x, prefix, *rest, needs)

    return calls


DRAWN = 0, None
"""row_offset and noise."""


def samples(method: str) -> Callable[..., Iterator[Call]]:
    def calls(R: int, N: int, K: int, n: int = 1) -> Iterator[Call]:
        scores, indices = torch.empty(R, N), torch.empty(R, K, dtype=torch.int64)
        seed = torch.empty((), dtype=torch.int64)
        grad = torch.empty(R, N) if method == "lapsum" else torch.empty(R, K, N)
        given = {
            "hard": ((K, "time"), None),
            "perturbed": (
                (K, 0.1, n, seed, *DRAWN, "time", "exact"),
                (indices, 0.1, n, seed, *DRAWN, "time", "exact"),
            ),
            "diagonal": (
                (K, 0.1, n, seed, *DRAWN, "time", "diagonal"),
                (indices, 0.1, n, seed, *DRAWN, "time", "diagonal"),
            ),
            "gumbel": ((K, 1.0, seed, *DRAWN, "time"), (indices, 1.0, seed, *DRAWN)),
            "lapsum": ((K, 1.0, "time"), (K, 1.0)),
        }
        name = "perturbed" if method == "diagonal" else method
        forward, backward = given[method]
        yield topk.choose(name, scores, *forward), (scores, *forward)
        if backward is not None:
            arguments = grad, scores, *backward
            yield topk.choose(f"{name}_backward", *arguments), arguments

    return calls


def gathers(form: str) -> Callable[..., Iterator[Call]]:
    def calls(R: int, K: int, N: int, E: int) -> Iterator[Call]:
        values, grad = half(R, N, E), half(R, K, E)
        weights = torch.empty(R, K, N) if form == "weights" else torch.empty(R, N)
        indices = torch.empty(R, K, dtype=torch.int64)
        given = values, weights, indices
        yield topk.choose("gather", *given), given
        given = grad, *given, (True, True)
        yield topk.choose("gather_backward", *given), given

    return calls


GATES = (
    {"B": 1, "L": 1, "M": 1, "H": 1, "D": 1},
    {"B": 2, "L": 500, "M": 40, "H": 3, "D": 64},
    {"B": 3, "L": 20, "M": 5000, "H": 12, "D": 40},
)
VIDEOS = (
    {"B": 1, "T": 1, "S": 1, "H": 1, "D": 1},
    {"B": 2, "T": 16, "S": 50, "H": 3, "D": 64},
    {"B": 2, "T": 300, "S": 300, "H": 12, "D": 40},
)
PREFIXES = tuple(base | {"P": 1} for base in VIDEOS)
ROWS = ({"R": 1, "N": 1, "K": 1}, {"R": 100, "N": 100, "K": 7}, {"R": 9, "N": 1000, "K": 1000})
DRAWS = tuple(base | {"n": n} for base in ROWS for n in (1, 500))
FRAMES = (
    {"R": 1, "K": 1, "N": 1, "E": 1},
    {"R": 8, "K": 8, "N": 32, "E": 5000},
    {"R": 8, "K": 200, "N": 3000, "E": 40},
)
FORMS = [
    *(
        Form(f"gate {form}", gates(form), GATES)
        for form in ("softmax", "max", "mean", "channel", "softmax alone", "channel alone")
    ),
    *(
        Form(f"{axis}{more}", attentions(f"{axis}{more}"), bases)
        for axis in ("time", "space", "joint")
        for more, bases in (("", VIDEOS), (" shared", VIDEOS), (" prefix", PREFIXES))
    ),
    *(
        Form(method, samples(method), DRAWS if method in ("perturbed", "diagonal") else ROWS)
        for method in ("hard", "perturbed", "diagonal", "gumbel", "lapsum")
    ),
    *(Form(f"gather {form}", gathers(form), FRAMES) for form in ("weights", "soft set")),
]


def taken(form: Form, sizes: dict[str, int]) -> list[Call] | None:
    """What is chosen, or None where it is refused."""
    try:
        return list(form.calls(**sizes))
    except backends.BackendError:
        return None


def largest(form: Form, base: dict[str, int], name: str) -> dict[str, int]:
    """The base with one size as large as is taken, or as bytes can be counted."""
    most = 2**56 // math.prod(size for other, size in base.items() if other != name)
    low, high = base[name], most
    if name == "K" and "E" not in base:  # of N
        high = base["N"]
    while low < high:
        middle = (low + high + 1) // 2
        if taken(form, base | {name: middle}) is None:
            high = middle - 1
        else:
            low = middle
    return base | {name: low}


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_too_old", lambda index: "")
    with FakeTensorMode(), torch.device("cuda"):
        yield


def launched(form: Form, sizes: dict[str, int], arch: str) -> list[_triton.Launch]:
    with _triton.recorded(arch) as launches:
        for run, arguments in taken(form, sizes):
            run(*arguments)
    return launches


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_is_taken_fits_a_grid(form: Form, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    amd = arch == "gfx942"
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    with use_backend("triton"):
        for base in form.bases:
            for name in base:
                sizes = largest(form, base, name)
                for kernel, programs, _, settings in launched(form, sizes, arch):
                    threads = programs * settings["num_warps"] * (64 if amd else 32)
                    fits = threads < 2**32 if amd else programs < 2**31
                    assert fits and programs <= MOST, (sizes, kernel.__name__, programs)


def test_every_kernel_is_looked_at() -> None:
    written = {
        x
        for module in (gate_kernels, attention_kernels, topk_kernels)
        for name, x in vars(module).items()
        if name.endswith("_kernel") and isinstance(x, triton.runtime.JITFunction)
    }
    with use_backend("triton"):
        found = {
            launch.kernel
            for form in FORMS
            for base in form.bases
            for launch in launched(form, base, "sm_90")
        }
    assert found == written


def test_a_grid_that_nothing_limits_is_found() -> None:
    def calls(R: int) -> Iterator[Call]:
        def run(x: Tensor) -> None:
            _triton.launch(topk_kernels.share_kernel, x.numel(), x, num_warps=4)

        yield run, (torch.empty(R),)

    form = Form("unlimited", calls, ({"R": 1},))
    (launch,) = launched(form, largest(form, form.bases[0], "R"), "sm_90")
    assert launch.programs > 2**31


def test_amds_grids_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    hard = samples("hard")
    with use_backend("triton"):
        assert list(hard(2**23 - 1, 1, 1))
        with pytest.raises(backends.BackendError, match=r"2\^23 - 1 programs, got 8388608"):
            list(hard(2**23, 1, 1))
