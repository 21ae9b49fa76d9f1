"""Products over the pairs that may attend, where something is NaN or inf: for A (n, m), X (m, c), and bool M (n, m),

    (A X)[i, c] = sum of A[i, j] X[j, c] over the j with M[i, j]

A weight of 0 hides nothing: 0 * NaN is NaN. So a product whose result is not finite is computed again, of those pairs only.
Whether it is, Python sees where calls run at once; a graph asks in a condition.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record  # private; read in TensorFlow 2.21

from kvattn.kernels.tensorflow import quirks

_expected = ContextVar("expected", default=None)  # whether a loss is known to bring something; None: nobody knows


@contextmanager
def expected(known):
    """Calls in here are computed as where something is not finite, if ``known``; else their gradients meet nothing such."""
    token = _expected.set(known)
    try:
        yield
    finally:
        _expected.reset(token)


def may_come():
    """Whether a tape records, which a loss may bring something not finite later, whatever the call itself finds."""
    return _expected.get() is None and record.could_possibly_record()


def absent(*tensors):
    """Whether nothing in tensors with values is NaN, inf, or so large that a product with another could be."""
    return not _expected.get() and all(map(_small, tensors))


def hides(bias):
    """Whether a bias is -inf somewhere."""
    if "CPU" in bias.device and bias.dtype in (tf.float32, tf.float64):
        return np.asarray(memoryview(bias)).min(initial=0) == -math.inf  # no copy
    return bool(tf.reduce_min(bias) == -math.inf)


def _small(x):
    if "CPU" in x.device and x.dtype in (tf.float32, tf.float64):
        flat = np.asarray(memoryview(x)).reshape(-1)  # no copy
        with np.errstate(over="ignore", invalid="ignore"):  # NumPy would warn of what is asked
            return math.isfinite(np.dot(flat, flat))
    return bool(tf.math.is_finite(_squares(x)))


def _if_finite(x, otherwise, *beside):
    """x where it is finite, or those ``beside`` it of which it is made, else ``otherwise()``, which is right for any."""
    if tf.executing_eagerly():
        return x if _small(x) else otherwise()
    if quirks.compiles_with_xla():  # where a condition would copy x
        return otherwise()
    sums = [tf.nn.l2_loss(y) for y in beside] or [tf.reduce_sum(x)]
    return tf.cond(tf.math.is_finite(tf.add_n(sums)), lambda: x, otherwise)


def _squares(x):
    x = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
    return tf.reduce_sum(x * x)


def whole_rows(weights, allowed):
    """weights, with NaN in all ``allowed()`` of a row where there is one: oneDNN's softmax has 0 beside it. None: all are."""

    def repaired():
        rows = tf.reduce_any(tf.math.is_nan(weights), axis=-1, keepdims=True)
        rows = rows if allowed is None else tf.logical_and(rows, allowed())
        return tf.where(rows, tf.constant(math.nan, weights.dtype), weights)

    return tf.cond(tf.math.is_finite(tf.reduce_sum(weights)), lambda: weights, repaired)


def shielded(scores, allowed):
    """scores, whose gradient, if not finite, is 0 for pairs without ``allowed()``: a softmax's is NaN all along a row."""

    @tf.custom_gradient
    def shield(scores):
        def grad(by):
            return _if_finite(by, lambda: tf.where(allowed(), by, tf.zeros_like(by)))

        return tf.identity(scores), grad

    return shield(scores)


class AllowedPairs:
    """Scores and products to which pairs that may not attend give nothing. ``allowed()``: bool, (..., n, m), or None for all.

    ``always``: something is known not to be finite, else results are looked at.
    """

    def __init__(self, allowed, always):
        self.allowed, self.always = allowed, always

    def score(self, tab, score):
        """``score`` as a function of the same arguments."""

        def scores(query, key):
            query, key = _with_all_axes(query, key)
            if score in (tab.dot_score, tab.scaled_dot_score):
                scores = self._dots(tab._wide(query), tab._wide(key))
                return scores if score is tab.dot_score else scores / tab._root(query)
            return self._by_query(score, query, key) if self.always else score(query, key)

        return scores

    def product(self, weights, value):
        """weights (..., n, m) @ value (..., m, v)."""
        return self._product(*_with_all_axes(weights, value))

    def recorded_product(self, weights, value):
        """product(weights, value) where all is finite, but for the gradient by it, maybe."""

        @tf.custom_gradient
        def product(a, x):
            def grad(by):
                by_x = _if_finite(tf.matmul(a, by, transpose_a=True), lambda: self.matmul(a, by, transposed=True))
                return tf.matmul(by, x, transpose_b=True), by_x

            return tf.matmul(a, x), grad

        return product(*_with_all_axes(weights, value))

    def _dots(self, query, key):
        @tf.custom_gradient
        def dots(query, key):
            def grad(by):
                return self._product(by, key), self._product(by, query, transposed=True)

            return tf.matmul(query, key, transpose_b=True), grad

        return dots(query, key)

    def _product(self, a, x, transposed=False):
        """a (..., n, m) @ x (..., m, c); transposed, a^T @ x (..., n, c)."""

        @tf.custom_gradient
        def product(a, x):
            def grad(by):
                by_a = tf.matmul(x, by, transpose_b=True) if transposed else tf.matmul(by, x, transpose_b=True)
                if self.allowed is not None:
                    by_a = _if_finite(by_a, partial(self.zero_others, by_a), x, by)
                return by_a, self._product(a, by, not transposed)

            return self._checked(a, x, transposed), grad

        return product(a, x)

    def _checked(self, a, x, transposed):
        a, x = tf.stop_gradient(a), tf.stop_gradient(x)  # no tape is to look into the condition
        if self.always:
            return self.matmul(a, x, transposed)
        result = tf.matmul(a, x, transpose_a=transposed)
        if self.allowed is None and not transposed:
            return result
        return tf.cond(tf.math.is_finite(tf.reduce_sum(result)), lambda: result, lambda: self.matmul(a, x, transposed))

    def zero_others(self, a):
        """a (..., n, m), with 0 for pairs that may not attend."""
        return a if self.allowed is None else tf.where(self.allowed(), a, tf.zeros_like(a))

    def matmul(self, a, x, transposed=False):
        """a @ x where something is not finite: what is not reaches the rows that may look at it, and NaN is a row's."""
        finite, nan = tf.math.is_finite(x), tf.constant(math.nan, x.dtype)
        a = self.zero_others(a)
        rows = tf.reduce_any(tf.math.is_nan(a), axis=-1, keepdims=True)  # as whole_rows has them
        a = self.zero_others(tf.where(rows, nan, a))
        result = tf.matmul(a, tf.where(finite, x, 0), transpose_a=transposed)
        reached = tf.matmul(self.zero_others(tf.ones_like(a)), tf.cast(~finite, x.dtype), transpose_a=transposed)
        return tf.where(reached > 0, nan, result)

    def _by_query(self, score, query, key):
        """The scores of each query with keys of its own, which are zeros where it may not attend."""
        own = tf.where(tf.expand_dims(self.allowed(), -1), tf.expand_dims(key, -3), 0)  # (..., n, m, d)
        return tf.squeeze(score(tf.expand_dims(query, -2), own), -2)


def _with_all_axes(a, b):
    """Both, broadcast to the leading axes of both."""
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
