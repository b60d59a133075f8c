"""What kernels should take of an H200: counted in what they are compiled to, not measured.

    python -m vd_kernels.expected                    each case, kernel by kernel
    python -m vd_kernels.expected docs/kernels.md    the same, written into that document

A kernel is compiled as the case would launch it, and disassembled. The text is taken for a graph:
of each pass through a loop, and of the way around the loops, the shortest counts, so that what
hardly ever runs (a quotient's slow path, equal keys) is left out. How often loops are passed
through is a formula of the launch. From these counts, and the bytes of the tensors that the kernel
is given, follow the times that no run can undercut; `Expected` has the rule. Triton compiles its
kernels, nvcc those in CUDA C++.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vd_kernels import _triton, compile_cuda
from vd_kernels import compile_kernels as compiling
from vd_kernels._triton import Launch
from vd_kernels.language_gate import triton_kernels as language_gate
from vd_kernels.spacetime_attention import triton_kernels as spacetime_attention
from vd_kernels.topk_sampling import triton_kernels as topk_sampling
from vd_kernels.topk_sampling.noise import LARGEST_NORMAL
from vd_kernels.topk_sampling.op import samples_each

ARCH = "sm_90"
# An H200. Of a multiprocessor where it does not say otherwise; a clock is one of it.
MULTIPROCESSORS = 132
CLOCK = 1.755e9
BANDWIDTH = 4.8e12
OPERATIONS = 989e12
"""A second, of bfloat16 in tensor cores, of the whole GPU."""
REGISTERS, SHARED, WARPS, PROGRAMS = 65_536, 228 * 1024, 64, 32
RESERVED = 1024
"""Bytes of shared memory that each program takes besides its own."""
SPECIAL = 16
"""Exponentials, logarithms, roots and inverses a clock, each for one thread."""
ISSUES = 4
"""Instructions of a warp a clock."""
DOUBLES = 2
"""Of these, in float64."""
DEPENDENT = 4
"""Clocks from an instruction to one that needs its result."""


# ---------------------------------------------------------------------------------------------
# Counting in the compiled text


class Count(NamedTuple):
    """Of one warp."""

    instructions: float
    special: float
    operations: float
    """Multiplications and additions of tensor cores."""
    doubles: float = 0
    """Instructions in float64."""

    def plus(self, other: Count, times: float = 1) -> Count:
        return Count(*(a + times * b for a, b in zip(self, other, strict=True)))


class Text:
    """A disassembled kernel, as blocks of instructions that run one after the other."""

    def __init__(self, text: str) -> None:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE)
        at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        lines = [line for _, line in lines]
        after = [_after(i, line, at) for i, line in enumerate(lines)]
        starts = {0}
        for i, then in enumerate(after):
            if then != [i + 1] or " EXIT" in lines[i]:
                starts.update(then, [i + 1])
        starts = sorted(start for start in starts if start < len(lines))
        number = {start: block for block, start in enumerate(starts)}
        ends = [*starts[1:], len(lines)]
        self._lines = [lines[start:end] for start, end in zip(starts, ends, strict=True)]
        self._after = [[number[i] for i in after[end - 1] if i in number] for end in ends]
        self._counts = [_count(own) for own in self._lines]
        self._before = collections.defaultdict(list)
        reached, found = {0}, [0]
        while found:
            block = found.pop()
            for then in self._after[block]:
                self._before[then].append(block)
                if then not in reached:
                    reached.add(then)
                    found.append(then)
        self._blocks = sorted(reached)
        ends = [block for block in self._blocks if not self._after[block]]
        # Where none ends every thread, the one to whose condition the way leads does.
        self._ends = ends or [block for block in self._blocks if " EXIT" in self._lines[block][-1]]
        self.loops = self._find_loops()
        """By their first block, in the order of the text: the blocks of each."""

    def _find_loops(self) -> dict[int, set[int]]:
        # What each block cannot be reached without; who goes back to such a one closes a loop.
        needed = {block: set(self._blocks) for block in self._blocks} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in self._blocks[1:]:
                new = set.intersection(*(needed[x] for x in self._before[block])) | {block}
                changed |= new != needed[block]
                needed[block] = new
        loops: dict[int, set[int]] = {}
        for block in self._blocks:
            for first in self._after[block]:
                if first in needed[block]:
                    body, found = loops.setdefault(first, {first}), [block]
                    while found:
                        x = found.pop()
                        if x not in body:
                            body.add(x)
                            found += self._before[x]
        return dict(sorted(loops.items()))

    def parts(
        self, passes: Sequence[float], through: Sequence[str] = ()
    ) -> Iterator[tuple[float, Count]]:
        """What a program's warp executes: how often, and what.

        First the shortest way from begin to end with each loop passed through once, then the
        further passes through each loop.

        passes: For each loop, how often it is passed through: one that lies in another, for each
            pass through that. 0: the way does not lead there.
        through: What matches instructions that the way does not lead around, unless it cannot
            lead there, too: loops have precedence, then what comes first.
        """
        if len(passes) != len(self.loops):
            raise ValueError(f"{len(self.loops)} loops were compiled, not {len(passes)}")
        taken = [first for first, n in zip(self.loops, passes, strict=True) if n]
        wanted = self._wanted(taken, through)
        yield 1, self._way([0, *wanted], self._ends, set(self._blocks))
        for first, n in zip(self.loops, passes, strict=True):
            body = self.loops[first]
            if n > 1:
                times = n - 1
                for other, m in zip(self.loops, passes, strict=True):
                    times *= m if body < self.loops[other] else 1
                inner = [x for x in wanted if x in body and x != first]
                last = [block for block in self._before[first] if block in body]
                yield times, self._way([first, *inner], last, body)

    def _wanted(self, taken: Sequence[int], through: Sequence[str]) -> list[int]:
        """Blocks that a way leads through, of which each can be reached from those before it."""
        left = [body for first, body in self.loops.items() if first not in taken]
        wanted = set(taken)
        for pattern in through:
            for block in self._blocks:
                if re.search(pattern, "\n".join(self._lines[block])):
                    together = all(
                        x in self._ahead(block) or block in self._ahead(x) for x in wanted
                    )
                    if together and not any(block in body for body in left):
                        wanted.add(block)
        return sorted(wanted)

    def _ahead(self, block: int) -> set[int]:
        """What can be reached from a block, itself included, without another pass of a loop."""
        reached, found = {block}, [block]
        while found:
            x = found.pop()
            for then in self._after[x]:
                if then not in reached and x not in self.loops.get(then, ()):
                    reached.add(then)
                    found.append(then)
        return reached

    def _way(self, through: Sequence[int], ends: Sequence[int], body: set[int]) -> Count:
        """Of the shortest way through some blocks to one of the ends, within a body."""
        total = Count(0, 0, 0)
        for start, goals in zip(through, [*([x] for x in through[1:]), ends], strict=True):
            total = total.plus(self._shortest(start, goals, body))
        return total.plus(self._counts[through[0]])

    def _shortest(self, start: int, goals: Sequence[int], body: set[int]) -> Count:
        """Of the way from a block to a goal, without the block it starts from."""
        waiting, done = [(0.0, start, Count(0, 0, 0))], set()
        while waiting:
            _, block, count = heapq.heappop(waiting)
            if block in goals:
                return count
            if block in done:
                continue
            done.add(block)
            for then in self._after[block]:
                if then in body:
                    longer = count.plus(self._counts[then])
                    heapq.heappush(waiting, (longer.instructions, then, longer))
        raise ValueError("no way leads through these loops")


def _after(i: int, line: str, at: dict[int, int]) -> list[int]:
    """Which instructions may follow one."""
    condition, name, rest = re.match(r"(@\S+\s+)?([A-Z0-9_]+)(.*)", line).groups()
    if name == "BRA":
        target = at[int(re.search(r"0x([0-9a-f]+)", rest)[1], 16)]
        always = not condition and not re.search(r"\.DIV|\bU?P\d", rest)
        return [target] if always else [target, i + 1]
    return [] if name in ("EXIT", "RET") and not condition else [i + 1]


def _count(lines: Sequence[str]) -> Count:
    operations = 0
    for line in lines:
        if found := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", line):  # of four warps together
            operations += 2 * math.prod(map(int, found.groups())) / 4
        elif re.search(r"\bHMMA\.16816\.", line):
            operations += 2 * 16 * 8 * 16
    special = sum(bool(re.search(r"\bMUFU\.", line)) for line in lines)
    doubles = sum(bool(re.search(r"\bD(ADD|MUL|FMA|SETP|MNMX)\b", line)) for line in lines)
    return Count(len(lines), special, operations, doubles)


# ---------------------------------------------------------------------------------------------
# The rule


class Expected(NamedTuple):
    """One kernel of a case. Times are in microseconds."""

    kernel: str
    programs: int
    warps: int
    registers: int
    spills: int
    """Bytes of each thread's stack."""
    shared: int
    products: int
    """Instructions in the text that multiply matrices."""
    bytes: float
    """Read or written by the kernel, what several programs read once: caches hold it."""
    parts: tuple[tuple[float, float, Count], ...]
    """Share of the programs, how often, and what one of their warps executes so often."""

    @property
    def count(self) -> Count:
        """Of one warp, on average."""
        total = Count(0, 0, 0)
        for share, times, count in self.parts:
            total = total.plus(count, share * times)
        return total

    @property
    def fit(self) -> dict[str, int]:
        """How many programs a multiprocessor holds, by what limits them."""
        each = math.ceil(self.registers / 8) * 8 * 32 * self.warps
        return {
            "registers": REGISTERS // each,
            "shared memory": SHARED // (self.shared + RESERVED),
            "warps": WARPS // self.warps,
            "programs": PROGRAMS,
        }

    @property
    def limit(self) -> str:
        return min(self.fit, key=self.fit.__getitem__)

    @property
    def at_once(self) -> int:
        """Programs of a multiprocessor."""
        return self.fit[self.limit]

    @property
    def rounds(self) -> float:
        """Of as many programs as the GPU holds at once."""
        return self.programs / (MULTIPROCESSORS * self.at_once)

    @property
    def idle(self) -> float:
        """How much longer it takes as the last round is not full, or of the only one some
        multiprocessors have more than others."""
        if self.rounds > 1:
            return math.ceil(self.rounds) / self.rounds
        return math.ceil(self.programs / MULTIPROCESSORS) * MULTIPROCESSORS / self.programs

    @property
    def times(self) -> dict[str, float]:
        """What memory, tensor cores, special functions, float64 and the issue of instructions
        take."""
        everywhere = self.programs * self.warps
        count = self.count
        return {
            "memory": self.bytes / BANDWIDTH * 1e6,
            "products": everywhere * count.operations / OPERATIONS * 1e6,
            "special": everywhere * count.special * 32 / (MULTIPROCESSORS * SPECIAL * CLOCK) * 1e6,
            "float64": everywhere * count.doubles / (MULTIPROCESSORS * DOUBLES * CLOCK) * 1e6,
            "issue": everywhere * count.instructions / (MULTIPROCESSORS * ISSUES * CLOCK) * 1e6,
        }

    @property
    def in_turn(self) -> float:
        """What the rounds take if no instruction of a warp runs beside its next one."""
        return math.ceil(self.rounds) * self.count.instructions * DEPENDENT / CLOCK * 1e6

    @property
    def at_least(self) -> float:
        return max(self.times.values())

    @property
    def expected(self) -> float:
        return max(self.at_least * self.idle, self.in_turn)

    @property
    def bound(self) -> str:
        times = self.times
        return max(times, key=times.__getitem__) if self.expected > self.in_turn else "in turn"


# ---------------------------------------------------------------------------------------------
# Cases


class Case(NamedTuple):
    """A call."""

    name: str
    """As benchmarks name it: operator/variant/mode/dtype/sizes."""
    run: Callable[[], object]
    cuda: bool = False
    """Whether it is CUDA C++ kernels that run: `run` then tells how they are launched."""

    @property
    def title(self) -> str:
        operator, variant, mode, *_ = self.name.split("/")
        return f"{operator} {variant} {mode}" + ", CUDA" * self.cuda


MODES = "forward", "backward"


def cases() -> Iterator[Case]:
    yield from _attention_cases()
    sizes = "bfloat16/B16-L3152-M32-H12-D64"
    for way in itertools.product(("scalar", "channel", "max", "mean"), MODES):
        yield Case(f"language_gate/{'/'.join(way)}/{sizes}", lambda way=way: _gate(*way))
    for way in itertools.product(("perturbed", "gumbel", "lapsum"), MODES):
        yield Case(_sampling(*way), lambda way=way: _sample(*way))
    yield Case(_sampling("hard", "forward"), lambda: _sample("hard", "forward"))
    for way in itertools.product(("weights", "soft-set"), MODES):
        name = f"topk_gather/{'/'.join(way)}/bfloat16/B8-K8-N32-E{196 * 768}"
        yield Case(name, lambda way=way: _gather(*way))
    for way in (*(("perturbed", mode) for mode in MODES), ("gumbel", "backward")):
        yield Case(_sampling(*way), lambda way=way: _sample_cuda(*way), cuda=True)


def _sampling(method: str, mode: str) -> str:
    many = f"n{SAMPLES}-" * (method == "perturbed")
    return f"topk_sample/{method}/{mode}/float32/B{ROWS}-{many}K{SLOTS}-N{FRAMES}"


def _attention_cases() -> Iterator[Case]:
    for variant, mode, patches in (
        ("time", "forward", 196),
        ("time-gate", "forward", 196),
        ("time", "backward", 196),
        ("space", "forward", 197),
        ("space-gate-prefix", "forward", 196),
        ("space", "backward", 197),
        ("joint", "forward", 196),
        ("joint", "backward", 196),
    ):
        name = f"spacetime_attention/{variant}/{mode}/bfloat16/B8-T16-S{patches}-H12-D64"
        yield Case(name, lambda way=(variant, mode, patches): _attend(*way))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attend(variant: str, mode: str, patches: int) -> None:
    axis, *given = variant.split("-")
    shape = 8, 16, patches, 12, 64
    rows = [_meta(*shape) for _ in range(3)]
    gate = _meta(*shape) if "gate" in given else None
    prefixes = [_meta(8, 1, 1, 12, 64) if "prefix" in given else None for _ in range(3)]
    shared = *rows, axis, None, None, False, None, *prefixes, gate, 0.125
    if mode == "forward":
        spacetime_attention.forward(*shared)
    else:
        needs = [True] * 3 + [bool(prefixes[0])] * 3 + [gate is not None]
        spacetime_attention.backward(_meta(*shape), None, *shared, needs)


def _gate(variant: str, mode: str) -> None:
    query, value, grad = (_meta(16, 3152, 12, 64) for _ in range(3))
    channel = variant == "channel"
    # A tensor of its own, not the key: its bytes count, too.
    gate_value = _meta(16, 32, 12, 64) if channel else None
    bias = _meta(12, 64) if channel else _meta(12)
    reduction = variant if variant in ("max", "mean") else "softmax"
    shared = query, _meta(16, 32, 12, 64), value, gate_value, None, bias, 0.125, reduction
    if mode == "forward":
        language_gate.forward(*shared, False)
    else:
        language_gate.backward(grad, None, *shared, (True, True, True, channel, True))


ROWS, FRAMES, SLOTS, SAMPLES, SIGMA = 256, 512, 16, 500, 2.0**-4


def _sample(method: str, mode: str) -> None:
    scores, indices = _floats(ROWS, FRAMES), _meta(ROWS, SLOTS, dtype=torch.int64)
    grad = _floats(ROWS, FRAMES) if method == "lapsum" else _floats(ROWS, SLOTS, FRAMES)
    draw = _meta(dtype=torch.int64), 0, None
    many = SIGMA, SAMPLES, *draw, "time", "exact"
    run = getattr(topk_sampling, method if mode == "forward" else f"{method}_backward")
    given = {
        ("hard", "forward"): (scores, SLOTS, "time"),
        ("perturbed", "forward"): (scores, SLOTS, *many),
        ("perturbed", "backward"): (grad, scores, indices, *many),
        ("gumbel", "forward"): (scores, SLOTS, 1.0, *draw, "time"),
        ("gumbel", "backward"): (grad, scores, indices, 1.0, *draw),
        ("lapsum", "forward"): (scores, SLOTS, 1.0, "time"),
        ("lapsum", "backward"): (grad, scores, SLOTS, 1.0),
    }
    run(*given[method, mode])


def _sample_cuda(method: str, mode: str) -> list[compile_cuda.Launch]:
    part = method if mode == "forward" else f"{method}_backward"
    return compile_cuda.launches(part, ROWS, FRAMES, SLOTS, SAMPLES)


def _gather(variant: str, mode: str) -> None:
    values, grad = _meta(8, 32, 196 * 768), _meta(8, 8, 196 * 768)
    weights = _floats(8, 8, 32) if variant == "weights" else _floats(8, 32)
    indices = _meta(8, 8, dtype=torch.int64)
    if mode == "forward":
        topk_sampling.gather(values, weights, indices)
    else:
        topk_sampling.gather_backward(grad, values, weights, indices, (True, True))


def _floats(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.float32)


def _reachable() -> Tensor:
    """How many frames of a row can be chosen, for rows of standard normals."""
    scores = torch.randn(2000, FRAMES, generator=torch.Generator().manual_seed(0))
    worst = scores.topk(SLOTS).values[:, -1:]
    return (scores >= worst - 2 * SIGMA * LARGEST_NORMAL).sum(1)


ROUNDS = 8
"""Of bisection, about, until all samples of a tile have their threshold."""
HELD = 4
"""Frames with a weight in one slot of `topk_gather`'s case, and slots that hold a frame: so many of
its 32 frames for 8 slots, a mean of 1 for each frame."""


class Way(NamedTuple):
    """How some of a kernel's programs go through its text; see `Text.parts`."""

    share: float
    """Of the programs."""
    passes: tuple[float, ...]
    through: tuple[str, ...] = ()


def ways(launch: Launch, held: int) -> list[Way]:
    """The ways of a kernel of Triton."""
    kernel, programs, arguments, settings = launch
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | settings

    def times(size: int, block: str) -> int:
        return math.ceil(size / settings[block])

    name = kernel.__name__.removesuffix("_kernel")
    if kernel in (spacetime_attention.forward_kernel, spacetime_attention.backward_query_kernel):
        tiles = times(given["P"] + given["L"], "BLOCK_K")
        passes = (tiles,) if name == "forward" else (tiles, tiles)
    elif kernel is spacetime_attention.backward_key_kernel:
        passes = (times(given["P"] + given["L"], "BLOCK_Q"),)
    elif kernel in (language_gate.forward_kernel, language_gate.backward_kernel):
        chunks = programs / (given["query"].shape[0] * given["H"])
        passes = (times(given["L"], "BLOCK_L") / chunks,)
    elif kernel is language_gate.sum_kernel:
        passes = (times(given["chunks"], "AT_ONCE"),)
    elif kernel is topk_sampling.choice_kernel:
        passes = (ROUNDS,) if given["weights"] is None else (ROUNDS, given["K"])
    elif kernel is topk_sampling.sample_kernel and settings["FEW"] == settings["BLOCK_N"]:
        passes = (given["each"] * settings["BLOCK_N"] / settings["TILE"], ROUNDS)
    elif kernel is topk_sampling.sample_kernel:
        few, reachable = settings["FEW"], _reachable()
        shares = [(reachable <= few), (reachable > few) & (reachable <= 2 * few)]
        shares.append(reachable > 2 * few)
        found = []
        for i, frames in enumerate((few, 2 * few, settings["BLOCK_N"])):
            passes = [0.0] * 6
            passes[2 * i : 2 * i + 2] = given["each"] * frames / settings["TILE"], ROUNDS
            found.append(Way(shares[i].double().mean().item(), tuple(passes)))
        return [way for way in found if way.share]
    elif kernel is topk_sampling.gradient_kernel:
        # The first loop, over 256 samples at a time, was unrolled four times.
        passes = (given["samples"] // 1024, times(given["samples"], "SAMPLES"))
    elif kernel is topk_sampling.gumbel_backward_kernel:
        passes = (given["K"],)
    elif kernel is topk_sampling.lapsum_kernel:
        passes = (64,)
    elif kernel is topk_sampling.entries_kernel:
        passes = (times(given["N"], "BLOCK"),)
    elif kernel is topk_sampling.gather_kernel and given["SOFT"]:
        return [Way(1.0, (), ("LDG",))]  # each slot has its frame
    elif kernel is topk_sampling.gather_kernel:
        # In float32 the loop was unrolled four times, and one for what is left follows.
        single = given["values"].dtype == torch.float32
        passes = (held // 4, held % 4) if single else (held,)
    elif kernel is topk_sampling.gather_values_kernel and given["SOFT"]:
        share = given["K"] / given["N"]  # in one slot, the others in none
        return [Way(share, (1,)), Way(1 - share, (0,))]
    elif kernel is topk_sampling.gather_values_kernel:
        passes = (held * given["K"] / given["N"],)
    elif kernel is topk_sampling.gather_shares_kernel:
        passes = (times(given["size"] * given["UNIT"], "BLOCK_E"),)
    elif kernel is topk_sampling.gather_weights_kernel:
        passes = (given["each"],)
    else:
        passes = ()
    return [Way(1.0, passes)]


def moved(launch: Launch, held: int) -> int:
    """Bytes of the tensors that a kernel is given, each once; of frames that are gathered, only
    those that a slot may hold."""
    tensors = {id(x): x for x in launch.arguments if isinstance(x, Tensor)}
    total = sum(x.numel() * x.element_size() for x in tensors.values())
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.settings
    if launch.kernel in (topk_sampling.gather_kernel, topk_sampling.gather_shares_kernel):
        values, each = given["values"], held if not given.get("SOFT", True) else 1
        left = max(0, given["N"] - each * given["K"])
        total -= values.numel() * values.element_size() * left // given["N"]
    return total


def expect(case: Case) -> Iterator[Expected]:
    if case.cuda:
        yield from map(_expect_cuda, case.run())
        return
    with _triton.recorded(ARCH) as launches:
        case.run()
    yield from map(expect_launch, launches)


def expect_launch(launch: Launch, held: int = HELD) -> Expected:
    """Of a kernel of Triton.

    held: Frames with a weight in each slot of `topk_gather`.
    """
    compiled = compiling.compiled(launch, ARCH)
    told = compiling.disassembled(compiled.asm["cubin"], "-res-usage", "-sass")
    registers, spills = compiling.registers_and_spills(told)
    text = Text(told)
    parts = [
        (share, times, count)
        for share, passes, through in ways(launch, held)
        for times, count in text.parts(passes, through)
    ]
    return Expected(
        launch.kernel.__name__.removesuffix("_kernel"),
        launch.programs,
        launch.settings["num_warps"],
        registers,
        spills,
        compiled.metadata.shared,
        compiling.products(compiled),
        moved(launch, held),
        tuple(parts),
    )


DRAWN = r"-0x2daee0ad\b"
"""In what draws noise: where a CUDA kernel may also be given it."""


def ways_cuda(launch: compile_cuda.Launch) -> list[Way]:
    """The ways of a CUDA kernel: a warp goes where one of its lanes has to."""
    if launch.kernel == "choice":  # loops by score, of bisection, and of slots that stay empty
        return [Way(1.0, (0, ROUNDS, 0, 0))]
    if launch.kernel.startswith("sample"):
        # Each with a loop by score and one of bisection: of all frames, 128 or less, 64 or less.
        groups = math.ceil(SAMPLES / samples_each(ROWS, SAMPLES))
        passes, none = (SAMPLES / groups, 0, ROUNDS), (0, 0, 0)
        few = (_reachable() <= 64).double().mean().item()
        through = DRAWN, "REDG" if launch.kernel == "sample counts" else "LDG"
        return [
            Way(few, (*none, *none, *passes), through),
            Way(1 - few, (*none, *passes, *none), through),
        ]
    if launch.kernel == "gradient":
        # Loops over gains, for their mean, and over samples. Of the gains some lanes have 15, of
        # which they take 3 one by one, the others 16, which they take at once.
        together = compile_cuda.constant("kTogether")
        return [Way(1.0, (SAMPLES // 32 % 4, 1, SAMPLES / together), (DRAWN,))]
    if launch.kernel == "gumbel_backward":  # of slots, and in it of slots again, 32 at a time
        return [Way(1.0, (SLOTS, 0), (DRAWN, r"MUFU\.EX2"))]
    return [Way(1.0, ())]


def _expect_cuda(launch: compile_cuda.Launch) -> Expected:
    told = compile_cuda.told_of(launch, ARCH)
    registers, spills = compiling.registers_and_spills(told)
    text = Text(told)
    parts = [
        (share, times, count)
        for share, passes, through in ways_cuda(launch)
        for times, count in text.parts(passes, through)
    ]
    return Expected(
        launch.kernel,
        launch.blocks,
        launch.warps,
        registers,
        spills,
        max(0, int(re.search(r"SHARED:(\d+)", told)[1]) - RESERVED),  # the tool adds it
        0,
        launch.bytes,
        tuple(parts),
    )


# ---------------------------------------------------------------------------------------------
# The tables


def compiler(case: Case) -> str:
    """What the numbers of a case are of."""
    used = f"nvcc {compile_cuda.version()}" if case.cuda else f"Triton {triton.__version__}"
    return f"{used}, {ARCH}."


def tables(found: Iterable[tuple[Case, Sequence[Expected]]]) -> Iterator[str]:
    """As lines of Markdown, by compiler: what the kernels take of a multiprocessor, and how long
    they take."""
    for name, group in itertools.groupby(found, key=lambda pair: compiler(pair[0])):
        yield from ("", name, "")
        yield from _tables(list(group))


def _tables(found: list[tuple[Case, Sequence[Expected]]]) -> Iterator[str]:
    yield "| case | kernel | programs | warps | registers | shared | products | at once | " + (
        "warps at once | limited by | rounds |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |"
    for case, kernels in found:
        yield from (taken(case, x) for x in kernels)
    yield ""
    yield (
        "| case | kernel | MB | instructions of a warp | memory | products | special | float64 | "
        + ("issue | in turn | at least | expected |")
    )
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for case, kernels in found:
        yield from timed(case, kernels)


def taken(case: Case, x: Expected) -> str:
    return (
        f"| {case.title} | {x.kernel} | {x.programs:,} | {x.warps} | {x.registers} | "
        f"{x.shared:,} | {x.products} | {x.at_once} | {x.at_once * x.warps} | {x.limit} | "
        f"{x.rounds:.2f} |"
    )


def timed(case: Case, kernels: Sequence[Expected]) -> Iterator[str]:
    for x in kernels:
        times = " | ".join(f"{time:.1f}" for time in x.times.values())
        yield (
            f"| {case.title} | {x.kernel} | {x.bytes / 1e6:.1f} | {_arithmetic(x)} | {times} | "
            f"{x.in_turn:.1f} | {x.at_least:.1f} | {x.expected:.1f} |"
        )
    if len(kernels) > 1:
        yield f"| {case.title} | together | | | | | | | | | {' | '.join(_sums(kernels))} |"


def _arithmetic(x: Expected) -> str:
    ways: dict[float, list[str]] = {}
    for share, times, count in x.parts:
        many = f"{times:,.4g} · " * (times != 1)
        ways.setdefault(share, []).append(f"{many}{count.instructions:,}")
    if len(ways) == 1:
        return " + ".join(*ways.values())
    return " + ".join(f"{share:.3f} · ({' + '.join(sums)})" for share, sums in ways.items())


def _sums(kernels: Sequence[Expected]) -> tuple[str, str]:
    """What a case takes at least, and is expected to take."""
    return f"{sum(x.at_least for x in kernels):.1f}", f"{sum(x.expected for x in kernels):.1f}"


def logged(case: Case, kernels: Sequence[Expected]) -> str:
    """The line of docs/tuning-log.md for a case that was not measured yet."""
    longest = max(kernels, key=lambda x: x.expected)
    least, expected = _sums(kernels)
    sizes = case.name.rpartition("/")[2].replace("-", " ")
    bound = f"`{longest.kernel}`: {longest.bound}"
    return f"| {case.title} | {sizes} | {bound} | {least} | {expected} | not yet |"


def main(arguments: list[str]) -> int:
    if arguments and not Path(arguments[0]).is_file():
        print(f"{arguments[0]} is no page to write the tables into", file=sys.stderr)
        return 2
    if compile_cuda.compiler() is None:
        print("CUDA's compiler nvcc is not found: set NVCC to where it is", file=sys.stderr)
        return 2
    found = [(case, list(expect(case))) for case in cases()]
    if arguments:
        compiling.write(Path(arguments[0]), "expected", tables(found))
    else:
        print(*tables(found), "", *(logged(*pair) for pair in found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
