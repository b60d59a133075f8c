"""Differentiable choice of K of N frames.

`noise.py` is the fifth file: the noise is part of the operator's meaning, and every backend's.
"""
