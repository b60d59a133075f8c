"""Which precision matrix products are trained in on this processor."""

from __future__ import annotations

import torch

from vd_kernels.backends import explain


def cpu_products(bf16: bool | None = None) -> torch.dtype:
    """bfloat16 or float32, of the operands of matrix products.

    Args:
        bf16: None means where the processor multiplies bfloat16: there it is several times as fast
            as float32. Elsewhere it is emulated, tens of times slower.
    """
    if bf16 is None:
        bf16 = "avx512_bf16" in explain().cpu_features
    return torch.bfloat16 if bf16 else torch.float32


def cpu_autocast(bf16: bool | None = None) -> torch.autocast:
    """Autocast of CPU operations to what :func:`cpu_products` says."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_products(bf16) == torch.bfloat16)
