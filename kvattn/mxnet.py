"""`from kvattn import mxnet as kv`: kvattn on MXNet, its native layers (gluon), and the short names that d2l's lessons use.

The layers and the short names are MXNet's mx.np: call mxnet.npx.set_np() first, as d2l's lessons do.
"""

import functools

from kvattn import api, namespace
from kvattn.kernels.mxnet import symbols
from kvattn.layers.mxnet import *  # noqa: F403
from kvattn.layers.mxnet import mx, np, whole
from kvattn.namespace import check_shape  # noqa: F401

globals().update(namespace.functions("mxnet"))
__getattr__ = namespace.drawing

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
        return function(*args, **{name: whole(x) if name == "valid_lens" else x for name, x in options.items()})

    return call


_of_arrays, attention_grad = _counting(attention), _counting(attention_grad)  # noqa: F405


@functools.wraps(api.attention)
def attention(query, key, value, *, backend="mxnet", **options):
    if symbols.deferred(query):  # while a hybridized block is traced: its graph makes the call whenever it runs
        return symbols.defer(api.attention, query, key, value, **options)
    return _of_arrays(query, key, value, backend=backend, **options)


multi_head_attention, multi_head_attention_grad = map(_counting, (multi_head_attention, multi_head_attention_grad))  # noqa: F405
self_attention = _counting(self_attention)  # noqa: F405


@functools.wraps(api.masked_softmax)
def masked_softmax(scores, valid_lens=None, *args, **options):
    return api.masked_softmax(scores, whole(valid_lens), *args, **{"backend": "mxnet"} | options)


def numpy(x):
    """The array as a NumPy array."""
    return x.asnumpy()


def astype(x, dtype):
    return x.astype(dtype)


def reshape(x, *shape):
    return x.reshape(*shape)


def transpose(x):
    return x.T


def swapaxes(x, a, b):
    return x.swapaxes(a, b)


def repeat(x, *args, **options):
    return x.repeat(*args, **options)


def argmax(x, *args, **options):
    return x.argmax(*args, **options)


def reduce_sum(x, *args, **options):
    return x.sum(*args, **options)


def reduce_mean(x, *args, **options):
    return x.mean(*args, **options)


def size(x):
    return x.size


def to(x, device):
    return x.as_in_context(device)


def get_key():
    """A seed, as JAX's namespace gives a key: drawn from MXNet's own generator."""
    return int(np.random.randint(2**31 - 1, size=(1,))[0])
