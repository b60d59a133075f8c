"""Operators on video tokens: gating by language, choosing frames, attention over space-time."""
