"""NaN and inf reach only the queries that may look at them, in TensorFlow.

A weight of 0 hides nothing: 0 * NaN is NaN. So products of an array over pairs, which is 0 where a pair may not attend, are
computed again where a result is not finite, of the pairs that may. Whether it is, Python sees where calls run at once; a graph
asks in a condition.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import tensorflow as tf

_expected = ContextVar("expected", default=False)


@contextmanager
def expected():
    """Calls in here are computed as where something is not finite."""
    token = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(token)


def absent(*tensors):
    """Whether nothing in tensors with values is NaN, inf, or so large that a product with another could be."""
    return not _expected.get() and all(map(_small, tensors))


def _small(x):
    if "CPU" in x.device and x.dtype in (tf.float32, tf.float64):
        flat = np.asarray(memoryview(x)).reshape(-1)  # no copy
        with np.errstate(over="ignore", invalid="ignore"):  # NumPy would warn of what is asked
            return math.isfinite(np.dot(flat, flat))
    return bool(tf.math.is_finite(_squares(x)))


def _squares(x):
    x = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
    return tf.reduce_sum(x * x)


def spread(weights, may):
    """weights, whose rows with NaN are all NaN where they may attend (bool, or None): oneDNN's softmax has 0 beside NaN."""

    def whole():
        rows = tf.reduce_any(tf.math.is_nan(weights), axis=-1, keepdims=True)
        return tf.where(rows if may is None else tf.logical_and(rows, may), tf.constant(math.nan, weights.dtype), weights)

    return tf.cond(tf.math.is_finite(tf.reduce_sum(weights)), lambda: weights, whole)


class Pairs:
    """Scores and products of pairs, of which those that may not attend give nothing. ``may()``: bool, (..., n, m), or None.

    ``always``: something is known not to be finite, else results are looked at.
    """

    def __init__(self, may, always):
        self.may, self.always = may, always

    def score(self, tab, score):
        """``score`` as a function of the same arguments."""

        def scores(query, key):
            query, key = _alike(query, key)
            if score in (tab.dot_score, tab.scaled_dot_score):
                scores = self._dots(tab._wide(query), tab._wide(key))
                return scores if score is tab.dot_score else scores / tab._root(query)
            return self._apart(score, query, key) if self.always else score(query, key)

        return scores

    def product(self, weights, value):
        """weights (..., n, m) @ value (..., m, v)."""
        return self._product(*_alike(weights, value))

    def _dots(self, query, key):
        @tf.custom_gradient
        def dots(query, key):
            def grad(by):
                return self._product(by, key), self._product(by, query, turned=True)

            return tf.matmul(query, key, transpose_b=True), grad

        return dots(query, key)

    def _product(self, pairs, x, turned=False):
        """pairs (..., n, m) @ x (..., m, c); turned, pairs^T @ x (..., n, c)."""

        @tf.custom_gradient
        def product(pairs, x):
            def grad(by):
                by_pairs = tf.matmul(x, by, transpose_b=True) if turned else tf.matmul(by, x, transpose_b=True)
                return by_pairs, self._product(pairs, by, not turned)

            return self._checked(pairs, x, turned), grad

        return product(pairs, x)

    def _checked(self, pairs, x, turned):
        pairs, x = tf.stop_gradient(pairs), tf.stop_gradient(x)  # no tape is to look into the condition
        if self.always:
            return self.of(pairs, x, turned)
        whole = tf.matmul(pairs, x, transpose_a=turned)
        if self.may is None and not turned:
            return whole
        return tf.cond(tf.math.is_finite(tf.reduce_sum(whole)), lambda: whole, lambda: self.of(pairs, x, turned))

    def only(self, x):
        """x (..., n, m), with 0 for pairs that may not attend."""
        return x if self.may is None else tf.where(self.may(), x, tf.zeros_like(x))

    def of(self, pairs, x, turned=False):
        """pairs @ x where something is not finite: what is not reaches the rows that may look at it, and NaN is a row's."""
        finite, nan = tf.math.is_finite(x), tf.constant(math.nan, x.dtype)
        pairs = self.only(pairs)
        rows = tf.reduce_any(tf.math.is_nan(pairs), axis=-1, keepdims=True)  # as spread has them
        pairs = self.only(tf.where(rows, nan, pairs))
        result = tf.matmul(pairs, tf.where(finite, x, 0), transpose_a=turned)
        reached = tf.matmul(self.only(tf.ones_like(pairs)), tf.cast(~finite, x.dtype), transpose_a=turned)
        return tf.where(reached > 0, nan, result)

    def _apart(self, score, query, key):
        """The scores of each query with keys of its own, which are zeros where it may not attend."""
        own = tf.where(tf.expand_dims(self.may(), -1), tf.expand_dims(key, -3), 0)  # (..., n, m, d)
        return tf.squeeze(score(tf.expand_dims(query, -2), own), -2)


def _alike(a, b):
    """Both with the leading axes of both."""
    if a.shape[:-2].is_fully_defined() and a.shape[:-2] == b.shape[:-2]:
        return a, b
    lead, static = (
        tf.broadcast_dynamic_shape(tf.shape(a)[:-2], tf.shape(b)[:-2]),
        tf.broadcast_static_shape(a.shape[:-2], b.shape[:-2]),
    )
    made = [tf.broadcast_to(x, tf.concat([lead, tf.shape(x)[-2:]], 0)) for x in (a, b)]
    for x, like in zip(made, (a, b), strict=True):
        x.set_shape(static.concatenate(like.shape[-2:]))
    return made
