"""`from kvattn import mxnet as kv`: kvattn on MXNet, its native layers (gluon), and the short names that d2l's lessons use.

The layers and the short names are MXNet's mx.np: call mxnet.npx.set_np() first, as d2l's lessons do.
"""

import functools
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from kvattn import api, namespace
from kvattn.layers import symbols
from kvattn.layers.mxnet import *  # noqa: F403
from kvattn.layers.mxnet import mx, np, whole_lengths
from kvattn.namespace import check_shape  # noqa: F401

if TYPE_CHECKING:  # a type checker cannot see what the next line adds
    from kvattn.api import *  # noqa: F403
    from kvattn.decoding import *  # noqa: F403
    from kvattn.weights import *  # noqa: F403

globals().update(namespace.functions("mxnet"))
__getattr__, __dir__ = namespace.lazily("mxnet"), namespace.listing(globals())

abs, arange, cos, cosh, exp, expand_dims, eye = np.abs, np.arange, np.cos, np.cosh, np.exp, np.expand_dims, np.eye
float32, int32, int64, linspace, log, meshgrid = np.float32, np.int32, np.int64, np.linspace, np.log, np.meshgrid
ones, ones_like, sin, sinh, stack, tanh = np.ones, np.ones_like, np.sin, np.sinh, np.stack, np.tanh
zeros, zeros_like = np.zeros, np.zeros_like
normal, rand, randn = np.random.normal, np.random.rand, np.random.randn
tensor, concat, matmul = np.array, np.concatenate, np.dot
sigmoid, batch_matmul = mx.npx.sigmoid, mx.npx.batch_dot


def _counting(function):
    """The function with lengths as lessons write them: tensor([3, 2]) is float32 in MXNet."""

    @functools.wraps(getattr(api, function.__name__))
    def call(*args, **options):
        return function(*args, **{name: whole_lengths(x) if name == "valid_lens" else x for name, x in options.items()})

    return call


_of_arrays, attention_grad = _counting(attention), _counting(attention_grad)  # noqa: F405


@functools.wraps(api.attention)
def attention(query: Any, key: Any, value: Any, *, backend: Any = "mxnet", **options: Any) -> Any:
    if symbols.deferred(query):  # while a hybridized block is traced: its graph makes the call whenever it runs
        return symbols.defer(api.attention, query, key, value, **options)
    return _of_arrays(query, key, value, backend=backend, **options)


multi_head_attention, multi_head_attention_grad = map(_counting, (multi_head_attention, multi_head_attention_grad))  # noqa: F405
self_attention = _counting(self_attention)  # noqa: F405


@functools.wraps(api.masked_softmax)
def masked_softmax(scores, valid_lens=None, *args, **options):
    return api.masked_softmax(scores, whole_lengths(valid_lens), *args, **{"backend": "mxnet"} | options)


def numpy(x):
    """The array as a NumPy array."""
    return to_numpy(x)  # noqa: F405


to, reduce_sum, reduce_mean = map(namespace.method, ("as_in_context", "sum", "mean"))

astype, reshape, swapaxes, repeat, argmax = map(namespace.method, ("astype", "reshape", "swapaxes", "repeat", "argmax"))
transpose, size = attrgetter("T"), attrgetter("size")


def get_key():
    """A seed, as JAX's namespace gives a key: drawn from MXNet's own generator."""
    return int(np.random.randint(2**31 - 1, size=(1,))[0])
