"""What each Triton kernel takes of a GPU: compiles them for GPUs that need not be here.

    python -m vd_kernels.compile_kernels                    a table of variants that cover all
    python -m vd_kernels.compile_kernels docs/kernels.md    the same, written into that document
    python -m vd_kernels.compile_kernels all [WORD ...]     every variant, or those of these words

"all" takes hours: it uses all cores, writes each row when it is there, and, as Triton caches what
it compiled, goes on where it was stopped. Words are those of a row and its architecture: "all sm_90
float32 D64".

The operators' own code decides what is compiled: it is called with tensors that have no data, and
what it would launch is noted. A kernel that spills registers or takes more shared memory than every
GPU of its maker from compute capability 8.0 or gfx942 on has is an error.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from vd_kernels import _triton
from vd_kernels._triton import Launch
from vd_kernels.language_gate import triton_kernels as language_gate
from vd_kernels.spacetime_attention import triton_kernels as spacetime_attention
from vd_kernels.topk_sampling import triton_kernels as topk_sampling

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 99 * 1024, "sm_90": 99 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that a program may take."""

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Case(NamedTuple):
    """One call of an operator, forward and backward, with tensors that have no data."""

    operator: str
    form: str
    dtype: torch.dtype
    sizes: str
    run: Callable[[], object]


class Usage(NamedTuple):
    """What one kernel takes, in one variant, on one architecture."""

    operator: str
    kernel: str
    form: str
    dtype: str
    sizes: str
    arch: str
    warps: int
    registers: int
    """Of each thread."""
    spills: int
    """Bytes of each thread's stack (NVIDIA) or scratch, and of its registers how many are spilled
    (AMD)."""
    scalars: int
    """Scalar registers that are spilled to lanes of vector registers, not to memory (AMD)."""
    shared: int
    """Bytes of shared memory."""
    products: int
    """Instructions that multiply matrices: mma and wgmma, or mfma."""

    @property
    def fails(self) -> bool:
        return self.shared > SHARED[self.arch] or self.spills > 0


# ---------------------------------------------------------------------------------------------
# What is compiled

FORMS = ("softmax", "max", "mean", "channel", "softmax alone", "channel alone")
"""Of language_gate. "alone": without a value, for the gate alone."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (32, 40, 64, 80, 96, 128)
TOKENS = (16, 32, 64, 128, 200)


def gate_case(form: str, dtype: torch.dtype, width: int, tokens: int) -> Case:
    word, _, alone = form.partition(" ")

    def make(count: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(2, count, 3, width, dtype=dtype, device="meta")

    def run() -> None:
        channel = word == "channel"
        query, key = make(1000), make(tokens)
        value, gate_value = None if alone else make(1000), make(tokens) if channel else None
        mask = torch.empty(2, tokens, dtype=torch.bool, device="meta")
        bias = torch.empty(3, *([width] if channel else []), device="meta")
        shared = query, key, value, gate_value, mask, bias, 0.1, "softmax" if channel else word
        _, gate = language_gate.forward(*shared, True)
        needs = (True, True, not alone, channel, True)
        language_gate.backward(value, gate if alone else None, *shared, needs)

    return Case("language_gate", form, dtype, f"M{tokens} D{width}", run)


ATTENTION_FORMS = (
    "time",
    "time gate",
    "time causal mask prefix channels",
    "space gate prefix",
    "space window mask shared",
    "joint window mask prefix channels",
)
"""Of spacetime_attention: its axis and what is given. "gate": one for each token and head;
"channels": one for each of its channels; "shared": channels' gates that all tokens share."""
LENGTHS = (16, 32, 49, 197)
"""Prefix and tokens of a group: a whole sequence of each size, and one that is tiled."""


def attention_case(form: str, dtype: torch.dtype, width: int, length: int) -> Case:
    axis, *given = form.split()
    sizes = {"time": (length, 50), "space": (16, length), "joint": (1, length)}[axis]
    tokens = [2, *sizes, 3, width]
    if "prefix" in given:
        tokens[1 if axis == "time" else 2] -= 1

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def run() -> None:
        tensor, grid, window = make(*tokens), None, None
        if "window" in given:
            grid = (tokens[2], 1)
            window = (1,) if axis == "time" else (1, 1, 1)
        groups = {"time": tokens[2], "space": tokens[1], "joint": 1}[axis]
        prefix = make(2, groups, 1, 3, width) if "prefix" in given else None
        gate = None
        for word, shape in (("gate", (*tokens[:4], 1)), ("channels", tokens), ("shared", [width])):
            gate = make(*shape, dtype=torch.float32) if word in given else gate
        mask = make(*tokens[:3], dtype=torch.bool) if "mask" in given else None
        shared = (
            *(tensor, tensor, tensor, axis, window, grid, "causal" in given, mask),
            *(prefix, prefix, prefix, gate, 0.1),
        )
        _, prefix_out = spacetime_attention.forward(*shared)
        needs = [True] * 3 + [prefix is not None] * 3 + [gate is not None]
        spacetime_attention.backward(tensor, prefix_out, *shared, needs)

    return Case("spacetime_attention", form, dtype, f"N{length} D{width}", run)


METHODS = ("hard", "perturbed", "given", "diagonal", "gumbel", "lapsum")
"""Of topk_sample. "given": "perturbed" with noise that is given."""
ORDERS = ("time", "score")
FRAMES = (16, 64, 100, 200, 512, 1000, 2000, 4096)


def choice_case(method: str, frames: int, order: str = "time") -> Case:
    def run() -> None:
        scores, seed = torch.empty(2, frames, device="meta"), _meta(dtype=torch.int64)
        indices, grad = _meta(2, 4, dtype=torch.int64), _meta(2, 4, frames)
        if method == "hard":
            topk_sampling.hard(scores, 4, order)
        elif method == "lapsum":
            topk_sampling.lapsum(scores, 4, 1.0, order)
            topk_sampling.lapsum_backward(scores, scores, 4, 1.0)
        elif method == "gumbel":
            draw = seed, 0, None
            topk_sampling.gumbel(scores, 4, 1.0, *draw, order)
            topk_sampling.gumbel_backward(grad, scores, indices, 1.0, *draw)
        else:
            gradient = "diagonal" if method == "diagonal" else "exact"
            noise = _meta(2, 500, frames) if method == "given" else None
            draws = 0.05, 500, seed, 0, noise, order, gradient
            topk_sampling.perturbed(scores, 4, *draws)
            topk_sampling.perturbed_backward(grad, scores, indices, *draws)

    form = method if order == "time" else f"{method} by score"
    return Case("topk_sample", form, torch.float32, f"N{frames}", run)


WEIGHTS = ("weights", "soft set")
SLOTS = (4, 30, 64)


def gather_case(form: str, dtype: torch.dtype, slots: int, width: int) -> Case:
    def run() -> None:
        values, grad = _meta(2, 100, width, dtype=dtype), _meta(2, slots, width, dtype=dtype)
        weights = _meta(2, slots, 100) if form == "weights" else _meta(2, 100)
        indices = _meta(2, slots, dtype=torch.int64)
        topk_sampling.gather(values, weights, indices)
        topk_sampling.gather_backward(grad, values, weights, indices, (True, True))

    return Case("topk_gather", form, dtype, f"K{slots} E{width}", run)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def covering() -> Iterator[Case]:
    """Few cases in which each form, dtype, size of a head and tile occurs."""
    yield gate_case("softmax", torch.bfloat16, 64, 32)
    yield gate_case("channel", torch.bfloat16, 64, 32)
    yield gate_case("max", torch.float16, 40, 16)
    yield gate_case("mean", torch.float32, 80, 64)
    yield gate_case("softmax", torch.float32, 128, 128)
    yield gate_case("channel", torch.float16, 96, 200)
    yield gate_case("channel alone", torch.float32, 32, 32)
    yield attention_case("time", torch.bfloat16, 64, 16)
    yield attention_case("time gate", torch.bfloat16, 64, 16)
    yield attention_case("time", torch.bfloat16, 64, 197)
    yield attention_case("time", torch.bfloat16, 128, 197)
    yield attention_case("time causal mask prefix channels", torch.float16, 40, 32)
    yield attention_case("space window mask shared", torch.float16, 64, 197)
    yield attention_case("joint window mask prefix channels", torch.bfloat16, 128, 197)
    yield attention_case("space window mask shared", torch.float32, 96, 49)
    yield attention_case("space gate prefix", torch.bfloat16, 64, 197)
    yield attention_case("joint window mask prefix channels", torch.float32, 128, 197)
    yield choice_case("hard", 512, "score")
    yield choice_case("perturbed", 512)
    yield choice_case("given", 100)
    yield choice_case("diagonal", 1000)
    yield choice_case("gumbel", 512)
    yield choice_case("lapsum", 512)
    yield choice_case("perturbed", 4096)
    yield gather_case("weights", torch.bfloat16, 16, 4096)
    yield gather_case("weights", torch.float32, 64, 4096)
    yield gather_case("soft set", torch.float16, 4, 768)


def every() -> Iterator[Case]:
    yield from itertools.starmap(gate_case, itertools.product(FORMS, DTYPES, WIDTHS, TOKENS))
    yield from itertools.starmap(
        attention_case, itertools.product(ATTENTION_FORMS, DTYPES, WIDTHS, LENGTHS)
    )
    yield from itertools.starmap(choice_case, itertools.product(METHODS, FRAMES, ORDERS))
    widths = (16, 100, 768, 4096)
    yield from itertools.starmap(gather_case, itertools.product(WEIGHTS, DTYPES, SLOTS, widths))


# ---------------------------------------------------------------------------------------------
# Compilation


def source(launch: Launch) -> tuple[ASTSource, dict[str, object]]:
    """A launch as Triton would compile it, and its options. New tensors lie at multiples of 16."""
    kernel, _, arguments, settings = launch
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | settings
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, x = parameter.name, given.pop(parameter.name)
        if parameter.is_constexpr or x is None:
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, Tensor):
            signature[name] = f"*{_TYPES[x.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(x, int) else "fp32"
    return ASTSource(kernel, signature, constants, attributes), given


def launched(case: Case, arch: str) -> list[Launch]:
    """What a case launches, each kernel once unless it is to be compiled in several ways."""
    with _triton.recorded(arch) as launches:
        case.run()
    return list({source(launch)[0].hash(): launch for launch in launches}.values())


def compiled(launch: Launch, arch: str) -> CompiledKernel:
    """A kernel as it would be launched on an architecture."""
    code, options = source(launch)
    return triton.compile(code, target=TARGETS[arch], options={"enable_fp_fusion": True} | options)


def compile_launch(case: Case, launch: Launch, arch: str) -> Usage:
    """What one kernel takes of those that a case launches."""
    kernel = compiled(launch, arch)
    taken = (_of_nvidia if arch.startswith("sm_") else _of_amd)(kernel)
    registers, spills, scalars, products = taken
    return Usage(
        case.operator,
        launch.kernel.__name__.removesuffix("_kernel"),
        case.form,
        str(case.dtype).removeprefix("torch."),
        case.sizes,
        arch,
        launch.settings["num_warps"],
        registers,
        spills,
        scalars,
        kernel.metadata.shared,
        products,
    )


def disassembled(cubin: bytes, *what: str) -> str:
    """What NVIDIA's tool tells of compiled kernels: "-res-usage", "-sass"."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.check_output([tool, *what, file.name], text=True, stderr=subprocess.PIPE)


def registers_and_spills(told: str) -> tuple[int, int]:
    """Of a thread: registers, and bytes of its stack."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def products(kernel: CompiledKernel) -> int:
    """Instructions that multiply matrices, in the text for NVIDIA."""
    return len(re.findall(r"^\s*(?:mma\.sync|wgmma\.mma_async)", kernel.asm["ptx"], re.MULTILINE))


def _of_nvidia(kernel: CompiledKernel) -> tuple[int, int, int, int]:
    told = disassembled(kernel.asm["cubin"], "-res-usage")
    return *registers_and_spills(told), 0, products(kernel)


def _of_amd(kernel: CompiledKernel) -> tuple[int, int, int, int]:
    text = kernel.asm["amdgcn"]
    registers, vectors, scalars, scratch = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in (
            *("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"),
            "private_segment_fixed_size",
        )
    )
    return registers, vectors + scratch, scalars, len(re.findall(r"^\s*v_mfma", text, re.MULTILINE))


def compile_cases(cases: Iterable[Case], archs: Iterable[str] = TARGETS) -> Iterator[Usage]:
    for arch, case in itertools.product(archs, list(cases)):
        for launch in launched(case, arch):
            yield compile_launch(case, launch, arch)


def different(cases: Iterable[Case], words: Iterable[str]) -> list[tuple[Case, Launch, str]]:
    """What several cases launch, each kernel once, with its architecture."""
    found = {}
    for arch, case in itertools.product(TARGETS, list(cases)):
        for launch in launched(case, arch):
            name = launch.kernel.__name__.removesuffix("_kernel")
            dtype = str(case.dtype).removeprefix("torch.")
            told = f"{arch} {case.operator} {name} {case.form} {dtype} {case.sizes}"
            if set(words) <= set(told.split()):
                code, options = source(launch)
                key = arch, code.hash(), *sorted(options.items())
                found.setdefault(key, (case, launch, arch))
    return list(found.values())


def compile_all(words: Iterable[str]) -> Iterator[Usage]:
    """Every variant of which `words` are true, on all cores that this process may use."""
    global _work
    _work = different(every(), words)
    # A forked process has the work as it stands: a case's function cannot be sent to it.
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        yield from pool.imap(_compile_one, range(len(_work)))


_work: list[tuple[Case, Launch, str]] = []


def _compile_one(i: int) -> Usage:
    return compile_launch(*_work[i])


# ---------------------------------------------------------------------------------------------
# The table


def table(usages: Iterable[Usage]) -> Iterator[str]:
    """As lines of Markdown, with the version of Triton, whose compiler the numbers are of."""
    yield f"Triton {triton.__version__}."
    for arch, group in itertools.groupby(usages, lambda usage: usage.arch):
        yield from ("", f"### {arch}", "")
        yield "| kernel | form | dtype | sizes | warps | registers | spills | shared | products |"
        yield "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
        yield from map(row, group)


def row(u: Usage) -> str:
    spills = f"{u.spills}" + f" + {u.scalars}" * (u.scalars > 0)
    return (
        f"| {u.operator} {u.kernel} | {u.form} | {u.dtype} | {u.sizes} | {u.warps} | "
        f"{u.registers} | {spills} | {u.shared:,} | {u.products} |"
    )


def write(path: Path, name: str, lines: Iterable[str]) -> None:
    """Writes lines into a document, between the marks that bear a name."""
    before, begin, rest = path.read_text("utf-8").partition(f"<!-- {name}: begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not end:
        raise ValueError(f"{path} has no marks for {name}")
    text = "".join(f"{line}\n" for line in lines)
    path.write_text(before + begin + text + end + after, "utf-8")


def main(arguments: list[str]) -> int:
    everything = arguments[:1] == ["all"]
    if arguments and not everything and not Path(arguments[0]).is_file():
        print(f'{arguments[0]} is no page to write the table into, nor "all"', file=sys.stderr)
        return 2
    failed = []

    def noted() -> Iterator[Usage]:
        for usage in compile_all(arguments[1:]) if everything else compile_cases(covering()):
            if usage.fails:
                failed.append(usage)
                told = f"spills, or takes too much shared memory: {usage}"
                print(told, file=sys.stderr, flush=True)
            yield usage

    lines = table(noted())
    if arguments and not everything:
        write(Path(arguments[0]), "kernels", lines)
    else:
        for line in lines:
            print(line, flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
