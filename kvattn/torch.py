"""`from kvattn import torch as kv`: kvattn on PyTorch, its native layers, and the short names that d2l's lessons use."""

from operator import attrgetter
from typing import TYPE_CHECKING

import torch

# isort: off
from torch import (  # noqa: F401
    abs, arange, argmax, concat, cos, cosh, exp, eye, float32, int32, int64, linspace, log, matmul, meshgrid, normal, ones,
    ones_like, rand, randn, sigmoid, sin, sinh, stack, tanh, tensor, zeros, zeros_like,
)  # fmt: skip
# isort: on

from kvattn import namespace
from kvattn.layers.torch import *  # noqa: F403
from kvattn.namespace import check_shape  # noqa: F401

if TYPE_CHECKING:  # a type checker cannot see what the next line adds
    from kvattn.api import *  # noqa: F403
    from kvattn.decoding import *  # noqa: F403
    from kvattn.weights import *  # noqa: F403

globals().update(namespace.functions("torch"))
__getattr__, __dir__ = namespace.lazily("torch"), namespace.listing(globals())

batch_matmul = torch.bmm


def numpy(x):
    """The tensor as a NumPy array."""
    return to_numpy(x)  # noqa: F405


reshape, swapaxes, repeat, reduce_sum, reduce_mean = map(namespace.method, ("reshape", "swapaxes", "repeat", "sum", "mean"))
astype = to = namespace.method("to")
expand_dims, size, transpose = namespace.method("unsqueeze"), namespace.method("numel"), attrgetter("T")


def get_key():
    """A seed, as JAX's namespace gives a key: drawn from PyTorch's own generator."""
    return int(torch.randint(2**31, ()))
