"""Calls on CPU arrays: NumPy's tiles and blocks compute them, on views of the arrays' own memory.

MXNet's products of batches are several times slower than BLAS, and hold all the scores at once. While autograd records, the
call is an operator of its own: the engine then knows what it reads, and which gradients are asked for.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import time
from functools import partial
from itertools import count
from weakref import WeakValueDictionary

import numpy as np

from kvattn import bands
from kvattn.backends import numpy as by_numpy
from kvattn.kernels.numpy import tiled
from kvattn.lend import lend

with lend():
    import mxnet as mx
    from mxnet.base import _LIB, check_call

OPERATOR = "kvattn_on_views"
PAIRS = 2**23  # numbers of a block of scores, with the features of which they are made
_calls = WeakValueDictionary()  # an operator is given text: the number of its call
_numbers = count()


def serves(tab, query, key, value, **options):
    """Whether NumPy serves a call of ``tab``: on CPU arrays, with a score and a normaliser of the tab's own."""
    return prepared(tab, query, key, value, **options) is not None


def _by_numpy(tab, function):
    """NumPy's function of the same name; None where it is none of the tab's, or has gradients that NumPy's has not."""
    if isinstance(function, partial):
        if function.args or tab.is_array(function.keywords.get("width")):
            return None
        function = function.func
    name = getattr(function, "__name__", "")
    return getattr(by_numpy, name) if getattr(tab, name, None) is function else None


def attention(call, arrays):
    """The output, or (output, lse), of a call that is prepared."""
    q, k, v = (call.shapes[name] for name in ("query", "key", "value"))
    lead, n, dtype = bands.lead(q, k), q[-2], arrays[0].dtype
    call.results = {"output": ((*lead, n, v[-1]), dtype)}
    if call.with_lse:
        call.results["lse"] = ((*lead, n), np.dtype("float32") if dtype.itemsize == 2 else dtype)
    if mx.autograd.is_recording():
        results = _record(call, arrays)
    else:
        results = [mx.np.empty(shape, dtype=of, ctx=call.ctx) for shape, of in call.results.values()]
        call.forward(call.views(arrays), *call.places(results))
    return tuple(results) if call.with_lse else results[0]


def attention_grad(call, arrays, grad_output, wrt):
    """The gradients by what ``wrt`` names, each in its argument's shape and dtype."""
    grads = call.backward(call.views(arrays), wrt, view(grad_output, grad_output.shape))
    results = [mx.np.empty(grad.shape, dtype=grad.dtype, ctx=call.ctx) for grad in grads]
    for x, grad in zip(results, grads, strict=True):
        view(x, grad.shape, write=True)[...] = grad
    return tuple(results)


# ---- views


class _Memory:
    """An array's memory, in the terms in which NumPy asks for it; it keeps the array."""

    def __init__(self, x, shape, write):
        pointer = ctypes.c_void_p()
        check_call(_LIB.MXNDArrayGetData(x.handle, ctypes.byref(pointer)))
        self.array = x
        self.__array_interface__ = {
            "data": (pointer.value, not write), "shape": shape, "typestr": np.dtype(x.dtype).str, "version": 3,
        }  # fmt: skip


def view(x, shape, write=False):
    """``x``, once it is computed, as a NumPy array of that shape on the same memory."""
    x.wait_to_read()
    if 0 in shape:  # MXNet gives no memory to an array without elements
        return np.empty(shape, x.dtype)
    return np.asarray(_Memory(x, shape, write))


def finite(x):
    """Whether all of ``x`` is, once it is computed: NumPy looks at it several times as fast as MXNet."""
    if x.ctx.device_type == "cpu":
        return bool(np.isfinite(view(x, x.shape)).all())
    with mx.autograd.pause():
        return bool(mx.np.isfinite(x).all())


# ---- the call


def prepared(tab, query, key, value, *, score=None, normalize=None, positions=None, dropout=0.0, rng=None,
             return_weights=False, return_lse=False, **options):  # fmt: skip
    """The call, without its arrays, and these, those that its score binds among them; None where NumPy does not serve it.

    Each array is asked for its shape once: that takes a microsecond, and several where the caches are full of keys and values.
    """
    if positions is not None or dropout or return_weights or isinstance(normalize, partial):
        return None
    options |= {"score": _by_numpy(tab, score or tab.scaled_dot_score), "normalize": _by_numpy(tab, normalize or tab.softmax)}
    if options["score"] is None or options["normalize"] is None:
        return None
    call = _Call()
    call.ctx, call.with_lse = query.ctx, return_lse
    if call.ctx.device_type != "cpu":
        return None
    bound = score.keywords if isinstance(score, partial) else {}
    arrays = {"query": query, "key": key, "value": value}
    arrays |= {name: x for name, x in (*options.items(), *bound.items()) if tab.is_array(x)}
    call.shapes = {name: x.shape for name, x in arrays.items()}
    if any(0 in call.shapes[name] for name in ("query", "key", "value")):
        return None
    call.keywords = {name: None if name in arrays else x for name, x in bound.items()}
    call.options = {name: x for name, x in options.items() if name not in arrays}
    return call, [*arrays.values()]


class _Call:
    """A call of NumPy's attention that lacks its arrays: their shapes by name, what else it and its score are given."""

    def views(self, arrays):
        return [view(x, shape) for x, shape in zip(arrays, self.shapes.values(), strict=True)]

    def places(self, results, write=True):
        return [view(x, shape, write) for x, (shape, _) in zip(results, self.results.values(), strict=True)]

    def _given(self, arrays):
        """query, key, value and the options."""
        given = dict(zip(self.shapes, arrays, strict=True))
        inputs = [given.pop(name) for name in ("query", "key", "value")]
        options = self.options
        if self.keywords:
            keywords = {name: given.pop(name, x) for name, x in self.keywords.items()}
            options = {**options, "score": partial(options["score"], **keywords)}
        return inputs, {**options, **given}

    def forward(self, arrays, output, lse=None, keep=False):
        """Writes the results; returns the lse if it was computed, as tiles do where it is to be kept."""
        inputs, options = self._given(arrays)
        found, with_lse = None, lse is not None
        with np.errstate(all="ignore"):
            if inputs[0].size * inputs[1].size > tiled.TINY and tiled.serves(by_numpy, *inputs, **options):
                how = {name: x for name, x in options.items() if name not in ("score", "normalize", "scale")}
                scale = tiled.scale_of(by_numpy, inputs[0], options["score"], options.get("scale"))
                found = tiled.attention(*inputs, scale, **how, return_lse=keep or with_lse, output=output)
                found = found[1] if keep or with_lse else None
            elif with_lse:
                output[...], found = by_numpy.attention(*inputs, **options, return_lse=True)
            else:
                output[...] = by_numpy.attention(*inputs, **options)
            if with_lse:
                lse[...] = found
        return found

    def backward(self, arrays, wrt, grad_output, **known):
        """The gradients; ``known``: what forward found, and the gradient by the lse."""
        inputs, options = self._given(arrays)
        with np.errstate(all="ignore"):
            return by_numpy.attention_grad(*inputs, grad_output, wrt=wrt, **options, **known)


# ---- while autograd records


def _record(call, arrays):
    """The results, recorded as an operator's."""
    number, _Operator.used = next(_numbers), True
    _calls[number] = call
    flat = (x if x.ndim else x.reshape(1) for x in arrays)  # an operator takes no scalars
    results = mx.nd.Custom(*(x.as_nd_ndarray() for x in flat), op_type=OPERATOR, call=number)
    return [x.as_np_ndarray() for x in (results if isinstance(results, list) else [results])]


def _settle():
    """Lets the operators finish.

    Before a fork MXNet waits for their threads, and holds Python's lock, which these need for their last steps. At exit it ends
    them, and waits for ever for an operator that comes after.
    """
    if _Operator.used:
        mx.nd.waitall()
        time.sleep(0.05)  # without the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_settle)
atexit.register(_settle)  # the last to be registered is the first to run


class _Operator(mx.operator.CustomOp):
    """One call, whose lse backward uses again."""

    used = False

    def __init__(self, call):
        super().__init__()
        self.call, self.lse = call, None

    def forward(self, is_train, req, in_data, out_data, aux):
        self.lse = self.call.forward(self.call.views(in_data), *self.call.places(out_data), keep=True)

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        grad_output, *grad_lse = self.call.places(out_grad, write=False)
        known = dict(zip(("grad_lse",), grad_lse, strict=False))
        if self.lse is not None and grad_output.itemsize > 2:  # a half's output is rounded
            known |= {"lse": self.lse, "output": self.call.places(out_data, write=False)[0]}
        wanted = {name: i for i, name in enumerate(self.call.shapes) if req[i] != "null"}
        grads = self.call.backward(self.call.views(in_data), tuple(wanted), grad_output, **known)
        for (name, i), grad in zip(wanted.items(), grads, strict=True):
            target = view(in_grad[i], self.call.shapes[name], write=True)
            np.add(target, grad, out=target) if req[i] == "add" else np.copyto(target, grad)


@mx.operator.register(OPERATOR)
class _Shapes(mx.operator.CustomOpProp):
    def __init__(self, call):
        super().__init__(need_top_grad=True)
        self.call = _calls[int(call)]

    def list_arguments(self):
        return [*self.call.shapes]

    def list_outputs(self):
        return [*self.call.results]

    def infer_shape(self, in_shape):
        return in_shape, [shape for shape, _ in self.call.results.values()], []

    def infer_type(self, in_type):
        return in_type, [dtype.type for _, dtype in self.call.results.values()], []

    def create_operator(self, ctx, shapes, dtypes):
        return _Operator(self.call)
