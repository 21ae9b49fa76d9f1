"""Which pairs an int rng keeps (kvattn/patterns.py), for MXNet, which shifts no bits: NumPy draws."""

from __future__ import annotations

from kvattn import patterns
from kvattn.old_numpy import old_names

with old_names():
    import mxnet as mx


def kept(weights, call):
    """Which of the weights (..., n, m) are kept, bool."""
    if not patterns.is_seed(call.rng):
        return call.rng.reshape(weights.shape)
    return mx.np.array(patterns.kept(weights.shape, call), dtype="bool", ctx=weights.ctx)


def of_selected(call, index):
    """What takes the place of rng where each query lies beside keys of its own, ``index`` (*lead, n, s)."""
    if not (call.dropout and patterns.is_seed(call.rng)):
        return call.rng
    return mx.np.array(patterns.kept_of_selected(index.asnumpy().astype("int64"), call), dtype="bool", ctx=index.ctx)


def derived(rng, number):
    """The seed of part ``number`` of a layer."""
    return patterns.derived(rng, number)
