"""`from kvattn import numpy as kv`: kvattn on NumPy, its native layers, and the short names that d2l's lessons use."""

from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

# isort: off
from numpy import (  # noqa: F401
    abs, arange, argmax, cos, cosh, exp, expand_dims, eye, float32, int32, int64, linspace, log, matmul, meshgrid,
    ones, ones_like, sin, sinh, stack, swapaxes, tanh, zeros, zeros_like,
)  # fmt: skip
from kvattn.layers.analytic import (  # type checkers see what is named twice
    Dense as Dense, Dropout as Dropout, Embedding as Embedding, Layer as Layer, LayerNorm as LayerNorm,
)  # fmt: skip
from kvattn.layers.training import SGD as SGD, Adam as Adam, softmax_cross_entropy as softmax_cross_entropy  # fmt: skip
# isort: on

from kvattn import namespace
from kvattn.layers.numpy import *  # noqa: F403
from kvattn.namespace import check_shape  # noqa: F401

if TYPE_CHECKING:  # a type checker cannot see what the next line adds
    from kvattn.api import *  # noqa: F403
    from kvattn.decoding import *  # noqa: F403
    from kvattn.weights import *  # noqa: F403

globals().update(namespace.functions("numpy"))
__getattr__, __dir__ = namespace.lazily("numpy"), namespace.listing(globals())

tensor, concat, batch_matmul = np.asarray, np.concatenate, np.matmul
normal, rand, randn = np.random.normal, np.random.rand, np.random.randn  # of the global generator: np.random.seed


def numpy(x):
    """The array itself: lessons ask every framework for it."""
    return to_numpy(x)  # noqa: F405


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))


astype, reshape, repeat, reduce_sum, reduce_mean = map(namespace.method, ("astype", "reshape", "repeat", "sum", "mean"))
transpose, size = attrgetter("T"), attrgetter("size")


def to(x, device):
    """The array itself: NumPy has the CPU only."""
    return x


def get_key():
    """A seed, as JAX's namespace gives a key: drawn from NumPy's global generator."""
    return int(np.random.randint(2**31))
