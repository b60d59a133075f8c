"""Datasets: one module for each dialect of annotation files, and the procedural benchmark.

Every reader gives a list of `videodistill.data.record.Question`.
"""
