"""Gated cross-modal scoring: language scales what vision already holds and adds nothing to it."""
