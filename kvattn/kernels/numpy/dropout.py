"""Which pairs an int rng keeps (kvattn/patterns.py), in NumPy."""

from __future__ import annotations

from kvattn import patterns


def kept(weights, call):
    """Which of the weights (..., n, m) are kept, bool."""
    return patterns.kept(weights.shape, call) if patterns.is_seed(call.rng) else call.rng


def of_selected(call, index):
    """What takes the place of rng where each query lies beside keys of its own, ``index`` (*lead, n, s)."""
    return patterns.kept_of_selected(index, call)[..., None, :] if call.dropout and patterns.is_seed(call.rng) else call.rng


def derived(rng, number):
    """The seed of part ``number`` of a layer."""
    return patterns.derived(rng, number)
