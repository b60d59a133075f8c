"""Tests of the dataset readers and writers."""
