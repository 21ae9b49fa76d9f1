"""Which pairs an int rng keeps (kvattn/patterns.py), in TensorFlow's uint64."""

from __future__ import annotations

import tensorflow as tf

from kvattn import patterns
from kvattn.kernels.tensorflow import quirks


def kept(weights, call):
    """Which of the weights (..., n, m) are kept, bool."""
    shape = quirks.shape(weights)
    if not patterns.is_seed(call.rng):
        return tf.reshape(call.rng, shape)  # many batch axes may have become one
    *lead, n, m = shape
    first, skip = call.first_key // patterns.PER_WORD, call.first_key % patterns.PER_WORD
    words = _output(_rows(call, lead, n)[..., None], _range(first, -(-(call.first_key + m) // patterns.PER_WORD)))
    bits = tf.bitcast(words, tf.uint16)  # (..., words, 4)
    bits = tf.reshape(bits, (-1, quirks.shape(words)[-1] * patterns.PER_WORD))[:, skip : skip + m]
    return tf.reshape(bits >= tf.constant(patterns.threshold(call.dropout), tf.uint16), shape)


def of_selected(call, index):
    """What takes the place of rng where each query lies beside keys of its own, ``index`` (*lead, n, s)."""
    if not (call.dropout and patterns.is_seed(call.rng)):
        return call.rng
    *lead, n, _ = quirks.shape(index)
    keys, rows = index + tf.cast(call.first_key, index.dtype), tf.reshape(_rows(call, lead, n), (*lead, n, 1))
    words = _output(rows, tf.cast(keys // patterns.PER_WORD, tf.uint64))
    bits = tf.bitwise.right_shift(words, tf.cast(keys % patterns.PER_WORD * patterns.BITS, tf.uint64))
    bits = tf.bitwise.bitwise_and(bits, tf.constant(patterns.VALUES - 1, tf.uint64))
    return tf.expand_dims(bits >= tf.constant(patterns.threshold(call.dropout), tf.uint64), -2)


def of_block(rng, i, count):
    """What block i of so many draws from: of TensorFlow's own seeds, pairs, another each, or it would drop the same pairs."""
    return rng if rng is None or patterns.drawn(rng) else (rng[0], rng[1] * count + i)


def _rows(call, lead, n):
    """The states of the rows: (batch * heads, n)."""
    seed = tf.constant(call.rng, tf.uint64) if isinstance(call.rng, int) else tf.cast(call.rng, tf.uint64)
    heads = _output(seed, _range(0, tf.reduce_prod(tf.stack(lead)) if lead else 1))
    first = tf.cast(call.first_query, tf.int64)
    return _output(heads[:, None], _range(first, first + tf.cast(n, tf.int64)))


def _range(start, end):
    return tf.cast(tf.range(tf.cast(start, tf.int64), tf.cast(end, tf.int64)), tf.uint64)


def _output(states, number):
    z = states + (number + 1) * tf.constant(patterns.STEP, tf.uint64)
    for shift, factor in patterns.MIX:
        z = _xor_shifted(z, shift) * tf.constant(factor, tf.uint64)
    return _xor_shifted(z, patterns.LAST)


def _xor_shifted(z, by):
    return tf.bitwise.bitwise_xor(z, tf.bitwise.right_shift(z, tf.constant(by, tf.uint64)))


def derived(rng, number):
    """The seed of part ``number`` of a layer."""
    return patterns.derived(rng, number) if type(rng) is int else _output(tf.cast(rng, tf.uint64), number)
