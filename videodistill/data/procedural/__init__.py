"""The procedural benchmark: videos, questions, answers and evidence, drawn from a seed.

``world`` decides what happens, ``render`` paints it, ``questions`` asks about it and ``make``
writes it all as mp4 files with annotations in the dialects of real datasets, which ``read`` reads.
"""
