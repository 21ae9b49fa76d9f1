"""What MXNet 1.9.1 does otherwise than NumPy, put right: shapes of no axes or elements, legacy arrays, where, batch_dot.

Nothing is computed here that the tab does not spell out: x @ y, where(condition, x, number), and which shapes a call may have.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial, wraps

from kvattn import planning
from kvattn.old_numpy import old_names

with old_names():
    import mxnet as mx
    from mxnet import autograd, np, npx


def any_shape():
    """Zero sizes and no axes are shapes in the block, whatever npx.set_np says."""
    return nullcontext() if mx.util.is_np_shape() else mx.util.np_shape(True)


def shaped(function, empty=None):
    """Zero sizes and no axes are shapes in it; legacy arrays come in and go out as views."""

    @wraps(function)
    def run(*args, **kwargs):
        first = next(iter((*args, *kwargs.values())))
        first = first[0] if isinstance(first, (list, tuple)) else first
        with any_shape():
            args, kwargs = [_new(x) for x in args], {name: _new(x) for name, x in kwargs.items()}
            results = empty(*args, **kwargs) if empty else None
            results = function(*args, **kwargs) if results is None else results
            return results if isinstance(first, np.ndarray) else _legacy(results)

    return run


def scoring(function):
    """MXNet cannot broadcast what has no elements, and says so only later, in another call; nor two arrays of many axes."""

    def instead(query, key, *args, **kwargs):
        lead, n, m = planning.lead(query.shape, key.shape), query.shape[-2], key.shape[-2]
        if 0 in (*lead, n, m, *key.shape[:-2]):
            shape = (*lead, n, m)
            return np.zeros(shape, dtype="float32" if query.dtype.name == "float16" else query.dtype, ctx=query.ctx)
        if len(lead) > 2 and query.shape[:-2] != key.shape[:-2]:
            query, key = (spread(x, lead).reshape(math.prod(lead), *x.shape[-2:]) for x in (query, key))
            return function(query, key, *args, **kwargs).reshape(*lead, n, m)
        return None

    return shaped(function, instead)


def spread(x, lead):
    """``x`` with these leading axes: one at a time, as where they alternate MXNet broadcasts no more than five."""
    for axis, size in enumerate(lead):
        if x.shape[axis] != size:
            x = np.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
    return x


def one_batch_axis(kernel):
    """MXNet broadcasts and slices arrays of few axes alone: where there are many, a kernel is given all batch axes as one."""

    @wraps(kernel)
    def run(query, key, value, call, blocks=()):
        batch, axes = planning.lead(query.shape, key.shape)[:-1], query.ndim
        many = [x for x in (call.mask, call.bias, call.positions) if x is not None and x.ndim > 3]
        if len(batch) < 2 or (len(batch) == 2 and all(x.shape[:-3] == batch for x in (query, key, value, *many))):
            return kernel(query, key, value, call, blocks)

        def fold(x):
            return spread(x, batch).reshape(math.prod(batch), *x.shape[len(batch) :])

        def fold_pairs(x):
            return x if x is None or x.ndim <= 3 else fold(x.reshape(*[1] * (axes - x.ndim), *x.shape))

        def fold_each(x):  # (batch,) or (batch, n), of the first axis
            return fold(x.reshape(-1, *[1] * (len(batch) - 1), *x.shape[1:])) if getattr(x, "ndim", 0) else x

        def fold_sink(x):
            if x is None or x.ndim < 2:
                return x
            return fold(x if x.ndim == axes else x.reshape(*[1] * (len(batch) + 1 - x.ndim), *x.shape))

        call = call._replace(
            positions=fold_pairs(call.positions), mask=fold_pairs(call.mask), bias=fold_pairs(call.bias),
            valid_lens=fold_each(call.valid_lens), query_offset=fold_each(call.query_offset), sink=fold_sink(call.sink),
        )  # fmt: skip
        results = kernel(fold(query), fold(key), fold(value), call, blocks)
        return each(lambda x: x.reshape(*batch, *x.shape[1:]), results)

    return run


def few_axes(function):
    """``function`` of rows and where they stand, for rows (..., n, c) of any number of axes: MXNet slices few alone."""

    @wraps(function)
    def run(x, positions, *args, **kwargs):
        if not x.size or x.ndim < 5:
            return function(x, positions, *args, **kwargs) if x.size else x
        *lead, n, c = x.shape
        if getattr(positions, "ndim", 0) > 1:
            positions = positions.reshape(*[1] * (len(lead) + 1 - positions.ndim), *positions.shape)
            positions = np.broadcast_to(spread(positions, lead), (*lead, n)).reshape(math.prod(lead), n)
        return function(x.reshape(math.prod(lead), n, c), positions, *args, **kwargs).reshape(x.shape)

    return shaped(run)


def each(change, results):
    """``change`` of each result, of which there may be one."""
    return tuple(map(change, results)) if isinstance(results, tuple) else change(results)


def normalizing(function):
    return shaped(function, lambda scores, *_, **__: None if scores.size else scores)


def _new(x):
    if isinstance(x, mx.nd.NDArray):
        return x.as_np_ndarray()
    if isinstance(x, partial):
        return partial(x.func, *map(_new, x.args), **{name: _new(y) for name, y in x.keywords.items()})
    if isinstance(x, dict):
        return {name: _new(y) for name, y in x.items()}
    if not isinstance(x, (list, tuple)) or not any(isinstance(y, mx.nd.NDArray) for y in x):
        return x
    return x._make(map(_new, x)) if hasattr(x, "_make") else [_new(y) for y in x]


def _legacy(x):
    if isinstance(x, tuple):
        return x if hasattr(x, "_make") else tuple(map(_legacy, x))
    return x.as_nd_ndarray()


def safe_backward(x):
    """The result of where or batch_dot: MXNet crashes the process where only a constant's gradient comes back to these."""
    return npx.reshape_like(x, x) if autograd.is_recording() else x


def where(condition, x, other):
    """np.where(condition, x, number): MXNet swaps its gradients for a number, and has no more than 5 axes."""
    if not x.size:  # MXNet crashes where it broadcasts what has no elements
        return x
    if x.ndim > 5:
        condition = np.broadcast_to(condition, x.shape).reshape(-1)
        return where(condition, x.reshape(-1), other).reshape(x.shape)
    # MXNet 1.9.1 takes inf, not -inf, for a number out of range where the C library has left word of an overflow
    filled = -np.full_like(x.detach(), -other) if other == math.inf else np.full_like(x.detach(), other)
    return safe_backward(np.where(condition, x, filled))


def matmul(x, y, transpose=False):
    """x @ y, or x @ y^T. The gradient of MXNet's own is wrong where leading axes broadcast, and y^T costs it a copy."""
    lead = tuple(b if a == 1 else a for a, b in zip(x.shape[:-2], y.shape[:-2], strict=True))
    x, y = (a if a.shape[:-2] == lead else np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (x, y))
    if 0 in x.shape or 0 in y.shape:
        return np.matmul(x, y.swapaxes(-1, -2) if transpose else y)
    rows, columns = x.shape[-2], y.shape[-2 if transpose else -1]
    x, y = (a.reshape(math.prod(lead), *a.shape[-2:]) for a in (x, y))
    return safe_backward(npx.batch_dot(x, y, transpose_b=transpose)).reshape(*lead, rows, columns)
