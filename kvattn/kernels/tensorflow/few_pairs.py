"""Which pairs may attend, where they are few and what says so can be read: asked of NumPy, for an operation of TensorFlow's on
few numbers takes as long as all of NumPy's together."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from kvattn import registry

MOST = 2**14  # pairs


def allowed(n, m, ndim, call):
    """What the tab's `_allowed` gives for a call without a bias, and whether every query has a key; None where it is not asked.

    n and m are numbers.
    """
    given = {name: _read(getattr(call, name)) for name in ("mask", "valid_lens", "query_offset")}
    if n * m > MOST or any(x is NotImplemented for x in given.values()):
        return None
    pairs = registry.load("numpy")._allowed(n, np.arange(m), ndim, call._replace(**given))
    if pairs.size > MOST:
        return None
    return call.mask if pairs is given["mask"] else tf.convert_to_tensor(pairs), bool(pairs.any(axis=-1).all())


def _read(x):
    """A tensor as NumPy's array on the same memory; NotImplemented where it has none here, and what is no array as it is."""
    if x is None or isinstance(x, int):
        return x
    if not isinstance(x, tf.Tensor) or "CPU" not in x.device:
        return NotImplemented
    return np.asarray(memoryview(x))
