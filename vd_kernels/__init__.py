"""Operators for video and language: a gate, a choice of frames, attention over space-time."""

from vd_kernels._version import __version__
from vd_kernels.backends import explain, use_backend
from vd_kernels.language_gate.api import language_gate
from vd_kernels.spacetime_attention.api import spacetime_attention
from vd_kernels.topk_sampling.api import TopKSample, topk_gather, topk_sample

__all__ = [
    "TopKSample",
    "__version__",
    "explain",
    "language_gate",
    "spacetime_attention",
    "topk_gather",
    "topk_sample",
    "use_backend",
]
