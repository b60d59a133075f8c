"""Datasets: one module for each, the registry `datasets`, and the procedural benchmark.

Every reader gives a list of `videodistill.data.record.Question`.
"""
