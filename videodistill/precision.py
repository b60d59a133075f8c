"""Which precision matrix products are formed in: float32, or bfloat16 where that is faster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vd_kernels.backends import explain
from videodistill.engine.checks import check_precision


def keep_for_products(module: nn.Module, precision: str) -> None:
    """Keep the parameters of linear layers as their products need them, for inference alone.

    Under autocast they would be converted in each call, which can take longer than the products.
    What else a module holds, its norms, embeddings and convolutions, stays in float32.

    Raises:
        UserError: ``precision`` is none of `PRECISIONS`.
    """
    if check_precision(precision) == "bf16":
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.to(torch.bfloat16)


def product_autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast to bfloat16, or what is in force already."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def cpu_product_dtype(bf16: bool | None = None) -> torch.dtype:
    """bfloat16 or float32, of the operands of matrix products.

    Args:
        bf16: None means where the processor multiplies bfloat16: there it is several times as fast
            as float32. Elsewhere it is emulated, tens of times slower.
    """
    if bf16 is None:
        bf16 = "avx512_bf16" in explain().cpu_features
    return torch.bfloat16 if bf16 else torch.float32


def cpu_autocast(bf16: bool | None = None) -> torch.autocast:
    """Autocast of CPU operations to what :func:`cpu_product_dtype` says."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_product_dtype(bf16) == torch.bfloat16)
