"""`from kvattn import jax as kv`: kvattn on JAX, its native layers (flax), and the short names that d2l's lessons use."""

import random  # noqa: I001
from operator import attrgetter
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.numpy import (  # noqa: F401
    abs, arange, argmax, cos, cosh, exp, expand_dims, eye, float32, int32, int64, linspace, log, matmul, meshgrid,
    ones, ones_like, sin, sinh, stack, swapaxes, tanh, zeros, zeros_like,
)  # fmt: skip

from kvattn import namespace
from kvattn.layers.jax import *  # noqa: F403
from kvattn.namespace import check_shape  # noqa: F401

if TYPE_CHECKING:  # a type checker cannot see what the next line adds
    from kvattn.api import *  # noqa: F403
    from kvattn.decoding import *  # noqa: F403
    from kvattn.weights import *  # noqa: F403

globals().update(namespace.functions("jax"))
__getattr__, __dir__ = namespace.lazily("jax"), namespace.listing(globals())

batch_matmul = jax.lax.batch_matmul
concat = jnp.concatenate  # jnp.concat takes its axis by name only
numpy = np.asarray
sigmoid = jax.nn.sigmoid
tensor = jnp.array
to = jax.device_put


def get_key():
    """A key for jax.random, drawn from Python's own generator, which random.seed seeds."""
    return jax.random.PRNGKey(random.randrange(2**31))


def rand(*size):
    """Uniform in [0, 1), by a key of get_key's: rand(2, 3) or rand((2, 3))."""
    return jax.random.uniform(get_key(), _size(size))


def randn(*size):
    """Standard normal, by a key of get_key's: randn(2, 3) or randn((2, 3))."""
    return jax.random.normal(get_key(), _size(size))


def normal(mean, std, size):
    """Normal, by a key of get_key's; jax.random.normal is given one."""
    return mean + std * jax.random.normal(get_key(), size)


def _size(size):
    return size[0] if size and isinstance(size[0], (tuple, list)) else size


astype, reshape, repeat, reduce_sum, reduce_mean = map(namespace.method, ("astype", "reshape", "repeat", "sum", "mean"))
transpose, size = attrgetter("T"), attrgetter("size")
