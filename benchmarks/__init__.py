"""How fast the operators and the model are, beside everything else that can do the same.

`python -m benchmarks run` measures, `report` writes the tables, `compare` sets two results side by
side; docs/measuring.md has the method. One file holds each operator's cases and baselines
(`language_gate.py`, `topk_sampling.py`, `topk_gathering.py`, `spacetime_attention.py`, and
`head.py` for the model); `runner.py` measures a case with `check.py`, `timing.py`, `memory.py` and
`floors.py`.
"""
