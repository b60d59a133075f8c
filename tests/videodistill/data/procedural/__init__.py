"""Tests of the procedural benchmark."""
