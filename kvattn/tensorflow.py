"""`from kvattn import tensorflow as kv`: kvattn on TensorFlow, its Keras layers, and the short names that d2l's lessons use."""

from typing import TYPE_CHECKING

import tensorflow as tf

# isort: off
from tensorflow import (  # noqa: F401
    abs, argmax, concat, cos, cosh, exp, expand_dims, eye, float32, int32, int64, linspace, matmul, meshgrid, ones, ones_like,
    reduce_mean, reduce_sum, repeat, reshape, sigmoid, sin, sinh, stack, tanh, transpose, zeros, zeros_like,
)  # fmt: skip
# isort: on

from kvattn import api, namespace
from kvattn.layers.tensorflow import *  # noqa: F403
from kvattn.namespace import check_shape  # noqa: F401

if TYPE_CHECKING:  # a type checker cannot see what the next line adds
    from kvattn.api import *  # noqa: F403
    from kvattn.decoding import *  # noqa: F403
    from kvattn.weights import *  # noqa: F403

globals().update(namespace.functions("tensorflow"))
__getattr__, __dir__ = namespace.lazily("tensorflow"), namespace.listing(globals())

arange, astype, batch_matmul, tensor = tf.range, tf.cast, tf.matmul, tf.constant
log, normal, rand = tf.math.log, tf.random.normal, tf.random.uniform


def randn(*shape):
    """Standard normal numbers: randn(2, 3) as in PyTorch, or randn((2, 3))."""
    return tf.random.normal(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)


def numpy(x):
    """The tensor as a NumPy array."""
    return api.to_numpy(x)


def swapaxes(x, a, b):
    return tf.experimental.numpy.swapaxes(x, a, b)


def size(x):
    return int(tf.size(x))


def to(x, device):
    with tf.device(device):
        return tf.identity(x)


def get_key():
    """A seed, as JAX's namespace gives a key: drawn from TensorFlow's own generator."""
    return int(tf.random.uniform((), maxval=2**31 - 1, dtype=tf.int32))
