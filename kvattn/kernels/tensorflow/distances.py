"""A bias by how far a key is ahead of a query, as ALiBi's, from one line of n + m - 1 numbers: bias_ij = line[n - 1 + j - i].

A block (r, c) of it is cut from r copies of r + c numbers of the line, put behind one another, at a stride of one number less:
each row begins one number earlier than the row above it. The copies are written and read in order, which a gather is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python import pywrap_tfe  # private; read in TensorFlow 2.21


class Line(NamedTuple):
    """The bias of each distance, (..., n + m - 1), the least first, in the place of a bias (..., n, m)."""

    values: Any

    def whole(self, n, m):
        """(..., n, m)"""
        return tf.gather(self.values, np.arange(m) - np.arange(n)[:, None] + n - 1, axis=-1)


def block(line, rows):
    """The bias (rows, c) of so many queries, of which the last is beside the first c of these numbers (rows + c - 1,)."""
    copy = tf.concat([line[rows - 1 :], tf.zeros([1], line.dtype), line[: rows - 1]], axis=0)  # begins where the first row does
    width = tf.size(copy)
    copies = tf.reshape(tf.broadcast_to(copy, (rows, width)), [-1])
    return tf.reshape(copies[: rows * (width - 1)], (rows, width - 1))[:, : width - rows]


def by_distance(serves, line, query, key, value, call):
    """The Line of a call, where its numbers can be read, forbid nothing and need no gradient; else None. ``serves``: whether
    tiles do."""
    if not tf.executing_eagerly() or pywrap_tfe.TFE_Py_TapeSetPossibleGradientTypes([line]):
        return None
    bias = Line(line)
    if not serves(query, key, value, call._replace(bias=bias, sink=None)):
        return None
    return bias if np.isfinite(line.numpy()).all() else None  # TensorFlow's own operation takes ten times as long
