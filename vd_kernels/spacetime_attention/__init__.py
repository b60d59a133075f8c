"""Attention over video tokens where they lie: over time, over space, or over both."""
