"""What TensorFlow's own operations leave to do: sizes that a trace does not know, and arrays of many axes.

Of more than five axes it cannot broadcast, nor of nine take a slice.
"""

from __future__ import annotations

import math
from functools import wraps

import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # private; read in TensorFlow 2.21

from kvattn import planning


def compiles_with_xla():
    """Whether what is traced now is for XLA: it computes an operation along with its neighbours, but a condition apart."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def shape(x):
    """The sizes of the axes: ints, or where the trace does not know them, scalar tensors."""
    static = tuple(x.shape)
    if None not in static:
        return static
    dynamic = tf.shape(x)
    return tuple(dynamic[axis] if size is None else size for axis, size in enumerate(static))


def lead(query, key):
    """The leading axes (..., h) of the scores, as planning.lead has them, where sizes may be unknown."""
    if None not in (*query.shape[:-2], *key.shape[:-2]):
        return planning.lead(query.shape, key.shape)
    batch = tf.broadcast_dynamic_shape(tf.shape(query)[:-3], tf.shape(key)[:-3])
    return (*tf.unstack(batch), *shape(query)[:-2][-1:])


def matmul(a, b, **options):
    """a @ b; (batch, 1, n, d) loses its second axis meanwhile: oneDNN's product of it with one (d, m) for all crashes."""
    alike = None not in a.shape[:-2] and a.shape[:-2] == b.shape[:-2]  # each has its own
    if alike or len(a.shape) != 4 or a.shape[1] != 1 or (len(b.shape) > 2 and b.shape[1] != 1):
        return tf.matmul(a, b, **options)
    b = tf.squeeze(b, 1) if len(b.shape) > 2 else b  # indexing takes six times as long
    return tf.expand_dims(tf.matmul(tf.squeeze(a, 1), b, **options), 1)


def few_axes(score):
    """``score`` for inputs of any number of axes."""

    @wraps(score)
    def flat(query, key, *args, **parameters):
        if len(query.shape) < 5:
            return score(query, key, *args, **parameters)
        axes = lead(query, key)
        query, key = (tf.reshape(widen(x, axes, 2), (math.prod(axes), *shape(x)[-2:])) for x in (query, key))
        scores = score(query, key, *args, **parameters)
        return tf.reshape(scores, (*axes, *shape(scores)[-2:]))

    return flat


def one_batch(query, key, value, call):
    """The arguments with all their batch axes in one."""
    batch = lead(query, key)[:-1]

    def one(x):
        if x is None or len(x.shape) < 4:
            return x
        shared = all(size == 1 for size in x.shape[:-3])
        x = x if shared else widen(x, batch, 3)
        return tf.reshape(x, (1 if shared else math.prod(batch), *shape(x)[-3:]))

    def each(x):  # numbers by the first axis
        return tf.repeat(x, math.prod(batch[1:]), axis=0) if x is not None and len(getattr(x, "shape", ())) else x

    call = call._replace(
        mask=one(call.mask), bias=one(call.bias), positions=one(call.positions), valid_lens=each(call.valid_lens),
        query_offset=each(call.query_offset),
    )  # fmt: skip
    return one(query), one(key), one(value), call


def widen(x, lead, last):
    """x with the axes before its ``last`` broadcast to ``lead``, one after another."""
    own, kept = shape(x)[:-last], shape(x)[-last:]
    own = (*[1] * (len(lead) - len(own)), *own)
    for axis, (size, wide) in enumerate(zip(own, lead, strict=True)):
        if not (type(size) is type(wide) is int and size == wide):
            x = tf.reshape(x, (math.prod(lead[:axis]), size, math.prod((*own[axis + 1 :], *kept))))
            x = tf.repeat(x, wide // tf.maximum(size, 1), axis=1)
    return tf.reshape(x, (*lead, *kept))
