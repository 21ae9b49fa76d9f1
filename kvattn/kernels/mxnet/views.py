"""softmax(scale * query @ key.T) @ value, and all else that the NumPy tab computes, on views of CPU arrays' own memory.

The formulas and their sources are in kernels/numpy, whose tiles and blocks are the ones that run.
MXNet's products of batches are several times slower than BLAS, and hold all the scores at once. While autograd records, the
call is an operator of its own: the engine then knows what it reads, and which gradients are asked for. An operator takes
longer than the work of a small call, which runs at once: of its arrays copies are kept, for MXNet to run backward alone.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import time
import traceback
from functools import partial
from itertools import count
from weakref import WeakValueDictionary

import numpy as np

from kvattn import planning, registry
from kvattn.kernels.numpy import gradients, tiled, tiled_grad, tiles
from kvattn.old_numpy import old_names

with old_names():
    import mxnet as mx
    from mxnet.autograd import Function  # of which the types of callbacks are private, like _LIB: as read in MXNet 1.9.1
    from mxnet.base import _LIB, MXCallbackList, NDArrayHandle, c_handle_array, check_call

OPERATOR = "kvattn_on_views"
numpy_tab = registry.load("numpy")
SMALL = 2**16  # numbers of a call's arrays that copies take less time of than an operator does
MOST = 2**23  # numbers that a block of queries holds at one time: scores, and the features of which they are made
_calls = WeakValueDictionary()  # an operator is given text: the number of its call
_numbers = count(1)  # of which ctypes makes no None


def obstacle(tab, ctx, shapes, call):
    """Why NumPy does not serve a call of ``tab`` on arrays of these shapes that lie on ``ctx``; "" where it does."""
    if call.return_weights or (call.dropout and type(call.rng) is not int):
        return "the weights are asked for" if call.return_weights else "dropout draws from MXNet's own state"
    if call.positions is not None:
        return "each query has keys of its own"
    if _of_numpy(tab, call.score) is None:
        return "the score is a function of one's own, or has parameters that NumPy's has no gradient by"
    if isinstance(call.normalize, partial) or _of_numpy(tab, call.normalize) is None:
        return "the normaliser is a function of one's own"
    if ctx.device_type != "cpu":
        return "the arrays are not on the CPU"
    if any(0 in shape for shape in shapes):
        return "the arrays hold nothing"
    return ""


def _of_numpy(tab, function):
    """NumPy's function of the same name; None where it is none of the tab's, or has gradients that NumPy's has not."""
    if isinstance(function, partial):
        if function.args or tab.is_array(function.keywords.get("width")):
            return None
        function = function.func
    name = getattr(function, "__name__", "")
    return getattr(numpy_tab, name) if getattr(tab, name, None) is function else None


def attention(shapes, query, key, value, call, blocks=()):
    """The output, or (output, lse); ``shapes``: of query, key and value."""
    lent, arrays = _lend(shapes, query, key, value, call)
    if mx.autograd.is_recording():
        results = _record(lent, arrays)
    else:
        results = [mx.np.empty(shape, dtype=dtype, ctx=query.ctx) for shape, dtype in lent.results.values()]
        lent.forward(arrays, results)
    return tuple(results) if call.return_lse else results[0]


def by_distance(tab, line, query, key, value, call):
    """The bias, NumPy's, of such a call, a view of what each distance gives; None where NumPy does not serve it, or MXNet's
    autograd may ask for gradients by it."""
    shapes = query.shape, key.shape, value.shape
    if mx.autograd.is_recording() or obstacle(tab, query.ctx, shapes, call):
        return None
    return tiles.by_distance(view(line, line.shape).copy(), query, key)


def attention_grad(shapes, query, key, value, grad_output, wrt, call):
    """The gradients by what ``wrt`` names, each in its argument's shape and dtype."""
    lent, arrays = _lend(shapes, query, key, value, call)
    grads = lent.backward(arrays, wrt, view(grad_output, grad_output.shape))
    results = [mx.np.empty(grad.shape, dtype=grad.dtype, ctx=query.ctx) for grad in grads]
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
    """``x``, once it is computed, as a NumPy array of that shape on the same memory; NumPy's own as it is."""
    if type(x) is np.ndarray:
        return x
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


ARRAYS = ("mask", "bias", "valid_lens", "query_offset", "sink")  # the options that may be arrays


def _lend(shapes, query, key, value, call):
    """The call as NumPy takes it, and its arrays, those that its score binds among them.

    Each array is asked for its shape once: that takes a microsecond, and several where the caches are full of keys and values.
    """
    arrays, shapes = {"query": query, "key": key, "value": value}, [*shapes]
    changed, parameters = {"score": call.score, "normalize": getattr(numpy_tab, call.normalize.__name__)}, {}
    for name in ARRAYS:
        if isinstance(x := getattr(call, name), mx.nd.NDArray):
            arrays[name], changed[name] = x, None
    if isinstance(call.score, partial):
        changed["score"], parameters = call.score.func, dict(call.score.keywords)
        for name, x in parameters.items():
            if isinstance(x, mx.nd.NDArray):
                arrays[name], parameters[name] = x, None
    changed["score"] = getattr(numpy_tab, changed["score"].__name__)
    shapes += [x.shape for x in [*arrays.values()][3:]]
    return _Lent(call._replace(**changed), parameters, dict(zip(arrays, shapes, strict=True)), query.dtype), [*arrays.values()]


class _Lent:
    """A call as NumPy takes it, but for its arrays, which are lent to it: the names and shapes of these and of the results.

    ``parameters``: what the call's score is bound to, None for arrays.
    """

    def __init__(self, call, parameters, shapes, dtype):
        self.call, self.parameters, self.shapes = call, parameters, shapes
        query, key, value = shapes["query"], shapes["key"], shapes["value"]
        rows = (*planning.lead(query, key), query[-2])
        self.results = {"output": ((*rows, value[-1]), dtype)}
        if call.return_lse:
            self.results["lse"] = (rows, np.dtype("float32") if dtype.itemsize == 2 else dtype)

    def views_of_results(self, results, write=False):
        return [view(x, shape, write) for x, (shape, _) in zip(results, self.results.values(), strict=True)]

    def _views(self, arrays):
        """query, key, value and the call, of NumPy arrays."""
        query, key, value, *rest = (view(x, shape) for x, shape in zip(arrays, self.shapes.values(), strict=True))
        if not (rest or self.parameters):
            return query, key, value, self.call
        given = dict(zip(list(self.shapes)[3:], rest, strict=True))
        parameters = {name: given.pop(name, x) for name, x in self.parameters.items()}
        score = partial(self.call.score, **parameters) if parameters else self.call.score
        return query, key, value, self.call._replace(**given, score=score)

    def forward(self, arrays, results, keep=False):
        """Writes the results; returns the lse if it was computed, as tiles do where it is to be kept."""
        output, *lse = self.views_of_results(results, write=True)
        *inputs, call = self._views(arrays)
        with np.errstate(all="ignore"):
            choice = numpy_tab.choose(*inputs, call)
            if choice.run is tiled.attention:  # which writes the output where it is to be
                found = tiled.attention(*inputs, call._replace(return_lse=keep or call.return_lse), output=output)
                found = found[1] if keep or call.return_lse else None
            else:
                found = choice.run(*inputs, call, choice.blocks)
                output[...], found = found if call.return_lse else (found, None)
            if lse:
                lse[0][...] = found
        return found

    def backward(self, arrays, wrt, grad_output, **known):
        """The gradients; ``known``: what forward found, and the gradient by the lse."""
        *inputs, call = self._views(arrays)
        with np.errstate(all="ignore"):
            return gradients.attention_grad(numpy_tab, *inputs, grad_output, wrt, call, tiled_grad.Known(**known))


# ---- while autograd records


def _record(call, arrays):
    """The results, recorded as an operator's."""
    _Operator.used = True
    flat = [x if x.ndim else x.reshape(1) for x in arrays]  # an operator takes no scalars
    if sum(map(math.prod, call.shapes.values())) <= SMALL:
        return _record_small(call, arrays, flat)
    number = next(_numbers)
    _calls[number] = call
    results = mx.nd.Custom(*(x.as_nd_ndarray() for x in flat), op_type=OPERATOR, call=number)
    return [x.as_np_ndarray() for x in (results if isinstance(results, list) else [results])]


def _record_small(call, arrays, flat):
    """The results, computed here and now. The engine does not know what backward will read, so it reads copies."""
    operator, number = _Operator(call), next(_numbers)
    results = [mx.np.empty(shape, dtype=dtype, ctx=arrays[0].ctx) for shape, dtype in call.results.values()]
    copies = [view(x, shape).copy() for x, shape in zip(arrays, call.shapes.values(), strict=True)]
    operator.forward(True, (), copies, results, ())
    numbers = (ctypes.c_void_p * len(_CALLBACKS))(*[number] * len(_CALLBACKS))
    callbacks = MXCallbackList(len(_CALLBACKS), ctypes.cast(_CALLBACKS, _POINTERS), numbers)
    _recorded[number] = operator, copies, [x.copy() for x in call.views_of_results(results)], callbacks
    handles = c_handle_array(flat), len(results), c_handle_array(results)
    check_call(_LIB.MXCustomFunctionRecord(len(flat), *handles, ctypes.byref(callbacks)))
    return results


_recorded = {}  # what backward needs of each small call, by its number, until MXNet has forgotten it
REQUESTS = ("null", "write", "inplace", "add")


@Function._bwd_functype
def _backward(results, arrays, handles, requests, is_train, number):
    """What MXNet calls for a small call's gradients; ``handles``: of those by its results, then of those by its arrays."""
    try:
        operator, copies, outputs, _ = _recorded[number]
        found = [mx.nd.NDArray(ctypes.cast(handles[i], NDArrayHandle)) for i in range(results + arrays)]
        requests = [REQUESTS[requests[i]] for i in range(arrays)]
        operator.backward(requests, found[:results], copies, outputs, found[results:], ())
    except Exception:  # which MXNet would not see
        traceback.print_exc()
        return False
    return True


@Function._del_functype
def _forget(number, recorded=_recorded):  # which this module has no longer when Python ends
    recorded.pop(number, None)
    return True


_POINTERS = ctypes.POINTER(ctypes.CFUNCTYPE(ctypes.c_int))
_CALLBACKS = (ctypes.c_void_p * 2)(*(ctypes.cast(x, ctypes.c_void_p).value for x in (_backward, _forget)))


def _wait_for_operators():
    """Has the operators finish.

    Before a fork MXNet waits for their threads, and holds Python's lock, which these need for their last steps. At exit it ends
    them, and waits for ever for an operator that comes after.
    """
    if _Operator.used:
        mx.nd.waitall()
        time.sleep(0.05)  # without the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_operators)
atexit.register(_wait_for_operators)  # the last to be registered is the first to run


class _Operator(mx.operator.CustomOp):
    """One call, whose lse backward uses again."""

    used = False

    def __init__(self, call):
        super().__init__()
        self.call, self.lse = call, None

    def forward(self, is_train, req, in_data, out_data, aux):
        self.lse = self.call.forward(in_data, out_data, keep=True)

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        grad_output, *grad_lse = self.call.views_of_results(out_grad)
        known = dict(zip(("grad_lse",), grad_lse, strict=False))
        if self.lse is not None and grad_output.itemsize > 2:  # a half's output is rounded
            known |= {"lse": self.lse, "output": self.call.views_of_results(out_data)[0]}
        wanted = {name: i for i, name in enumerate(self.call.shapes) if req[i] != "null"}
        grads = self.call.backward(in_data, tuple(wanted), grad_output, **known)
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
