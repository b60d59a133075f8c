"""How an operator enters torch.library: schema, kernel, fake, and what it refuses.

All schemas are defined here in Python, in the namespace `vd`; compiled backends only register
private operators of their own, which the kernels given to `define` call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), int})
_LIBRARY = torch.library.Library("vd", "FRAGMENT")


def define(schema: str, kernel: Callable, fake: Callable) -> None:
    """Define vd::<name> for every device.

    Args:
        schema: "name(Tensor x, ...) -> ..."; results never alias arguments.
        kernel: Takes the schema's arguments on any device, below autograd.
        fake: The same for fake tensors: shapes, dtypes and strides of the results.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vd::{name}", fake, lib=_LIBRARY)

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError(
            f"vd::{name} has no rule for torch.func.vmap: give it a batch dimension instead"
        )

    torch.library.register_vmap(f"vd::{name}", no_vmap, lib=_LIBRARY)


def define_private(schema: str) -> None:
    """Define vd::<name> for a compiled backend, which adds the kernel when it is loaded.

    Args:
        schema: As in `define`; results are arguments that are written to, "Tensor(a!) out".
    """
    _LIBRARY.define(schema)


def differentiable(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give vd::<name> its gradient; see `torch.library.register_autograd`."""
    torch.library.register_autograd(
        f"vd::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def once_differentiable(name: str) -> None:
    """Let a gradient of vd::<name>, a backward operator, be an error instead of silently wrong."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"vd::{name} cannot be differentiated: double backward is not supported; "
            "call torch.autograd.grad without create_graph"
        )

    differentiable(name, refuse, lambda ctx, inputs, output: None)


def is_observed(*arguments: Any) -> bool:
    """Whether anything but the kernel takes part in a call: autograd, autocast, a tracer, ...

    When not, an operator's public function may call the kernel itself: the way through the
    dispatcher into Python would take longer than a small call's work.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return True
    # Fake tensors and other subclasses have a say in what an operator does with them.
    return not _PLAIN.issuperset(map(type, arguments)) and any(
        isinstance(x, Tensor) and type(x) not in _PLAIN for x in arguments
    )


# Bytes of scratch memory that the threads of C++ kernels have asked for since it was told last, of
# each thread the most at once. They keep it, and torch does not count it.
define_private("_scratch_bytes_cpp() -> int")
