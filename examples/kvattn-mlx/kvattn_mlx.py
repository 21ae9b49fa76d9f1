"""Apple MLX as a backend of kvattn. The promises are in kvattn/api.py; the functions stand in the order of the tabs there."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from functools import partial, reduce

import mlx.core as mx
import numpy as np

from kvattn import patterns, planning
from kvattn.call import Call, Choice

HALF = (mx.float16, mx.bfloat16)
MOST = 2**24  # numbers that each query beside keys of its own may take at one time


# ---- data


def is_array(x):
    return isinstance(x, mx.array)


def asarray(x, dtype=None, like=None):
    if not is_array(x):
        x = np.asarray(x)
        if x.dtype.kind not in "biuf" and x.dtype.name != "bfloat16":
            raise TypeError(f"MLX has no dtype {x.dtype}")
        x = mx.array(np.ascontiguousarray(x, x.dtype.newbyteorder("=")), dtype=_dtype(x.dtype.name)).reshape(x.shape)
    return x if dtype is None else x.astype(_dtype(dtype))


def _dtype(name):
    return getattr(mx, {"bool": "bool_"}.get(name, name))


def to_numpy(x):
    if not is_array(x):
        return np.asarray(x)
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def peek(x):
    try:
        return to_numpy(x)
    except ValueError:  # mx.compile and mx.vmap let nobody look at values
        return None


def describe():
    return mx.__version__, mx.default_device().type.name


def devices():
    return {device.name: device.name for device in (mx.cpu, mx.gpu) if mx.is_available(device)}


@contextmanager
def on(device):
    """MLX's arrays lie in memory that all devices share: a device is where one computes."""
    with mx.stream(getattr(mx, device)):
        yield None


# ---- what MLX 0.32 computes otherwise than promised


@mx.custom_function
def _kept(where, x, other):
    """x where ``where`` holds, else ``other``, a number. The gradient of mx.where multiplies by 0, which keeps NaN."""
    return mx.where(where, x, other)


@_kept.vjp
def _kept_vjp(primals, gradient, _):
    where, _, other = primals
    return mx.zeros_like(where), mx.where(where, gradient, mx.zeros_like(gradient)), mx.zeros_like(other)


def _keep(where, x, other=0.0):
    shape = mx.broadcast_shapes(where.shape, x.shape)
    return _kept(mx.broadcast_to(where, shape), mx.broadcast_to(x, shape), mx.array(other, x.dtype))


@mx.custom_function
def _exp64(x):
    """mx.exp of float64 is as exact as float32 only, mx.expm1 as float64."""
    grown = mx.expm1(mx.abs(x)) + 1
    return mx.where(x < 0, 1 / grown, grown)


@_exp64.vjp
def _exp64_vjp(x, gradient, output):
    return gradient * output


def _exp(x):
    return _exp64(x) if x.dtype == mx.float64 else mx.exp(x)


# ---- shapes and masks


def _wide(x):
    """Half precision in float32; the rest as it is."""
    return x.astype(mx.float32) if x.dtype in HALF else x


def _fold(x, heads):
    """(..., h, n, c) -> (..., heads, h / heads * n, c): the queries of one key head lie in a row."""
    if x.ndim < 3 or x.shape[-3] == heads:
        return x
    return x.reshape(*x.shape[:-3], heads, x.shape[-3] // (heads or 1) * x.shape[-2], x.shape[-1])


def _unfold(x, heads, n):
    """(..., h / g, g * n, c) -> (..., h, n, c): the inverse of _fold."""
    if x.ndim < 3 or x.shape[-3] == heads:
        return x
    return x.reshape(*x.shape[:-3], heads, n, x.shape[-1])


def _lengths(valid_lens, ndim):
    """valid_lens as (batch, 1, ..., 1 or n, 1) of ndim axes."""
    if ndim == 2:
        return valid_lens.reshape(-1, 1)
    batch, *per_query = valid_lens.shape
    return valid_lens.reshape(batch, *[1] * (ndim - 3), *(per_query or [1]), 1)


def _positions(query_offset, n, ndim):
    """Where each query stands: (n, 1), or (batch, 1, ..., n, 1) of ndim axes."""
    if isinstance(query_offset, int):  # MLX counts in int32, which is more than any array is long
        query_offset = max(-(2**30), min(query_offset, 2**30))
    elif query_offset.ndim:
        query_offset = query_offset.reshape(-1, *[1] * (ndim - 1))
    return query_offset + mx.arange(n)[:, None]


def _allowed(n, keys, ndim, call):
    """Which pairs may attend: bool, broadcastable to (..., n, m), or None where all may. ``keys``: their positions."""
    allowed = [] if call.mask is None else [call.mask]
    if call.bias is not None:
        allowed.append(call.bias != -math.inf)
    if call.valid_lens is not None:
        allowed.append(keys < _lengths(call.valid_lens, ndim))
    if call.windowed:
        ahead = keys - _positions(call.query_offset, n, ndim)  # how far each key lies after each query
        if call.left is not None:
            allowed.append(ahead >= -call.left)
        if call.right is not None:
            allowed.append(ahead <= call.right)
    return reduce(mx.logical_and, allowed) if allowed else None


def _flags_of_rows(flags, shape):
    """Whether any flag holds for each row of an array of ``shape``: (..., h, r) -> (..., rows), heads and batch folded."""
    if flags.ndim >= 2 and len(shape) >= 3 and flags.shape[-2] > shape[-3] > 0:
        flags = flags.reshape(*flags.shape[:-2], shape[-3], flags.shape[-2] // shape[-3], flags.shape[-1]).any(axis=-2)
    for axis in range(-flags.ndim, -1):
        if flags.shape[axis] > shape[axis - 1] == 1:
            flags = flags.any(axis=axis, keepdims=True)
    return flags[..., None]


def _hide_padding(allowed, query, key, value):
    """Zeros for keys that no query may attend to and queries with no key: NaN there would leak as 0 * NaN."""
    if 0 in (query.shape[-2], key.shape[-2]):  # there is no pair, whatever a mask that is broadcast says
        allowed = mx.array(False)
    if allowed is None:
        return query, key, value
    if allowed.ndim < 2:
        allowed = allowed[None] if allowed.ndim else allowed[None, None]
    has_query, has_key = allowed.any(axis=-2), allowed.any(axis=-1)
    return (
        _keep(_flags_of_rows(has_key, query.shape), query),
        _keep(_flags_of_rows(has_query, key.shape), key),
        _keep(_flags_of_rows(has_query, value.shape), value),
    )


def _finite(*arrays):
    """Whether all numbers are finite, as far as that can be seen: a GPU would have to be waited for, a trace tells nothing."""
    if mx.default_device() == mx.gpu:
        return True
    try:
        return all(mx.isfinite(x).all().item() for x in arrays if x is not None)
    except ValueError:  # in mx.compile and mx.vmap
        return True


def _hide_unused_rows(query, key, value, call):
    """Zeros for rows (..., n, c) that meet nobody in any head: a weight's gradient, their product with 0, would be NaN."""
    if not (call.restricted or call.positions is not None) or _finite(query, key, value):
        return _hide_padding(None, query, key, value)
    keys = mx.arange(key.shape[-2])
    if call.positions is not None:
        selected = (call.positions[..., None] == keys).any(axis=-2)
        call = call._replace(mask=selected if call.mask is None else call.mask & selected)
    allowed = _allowed(query.shape[-2], keys, query.ndim + 1, call)
    hidden = _hide_padding(allowed, *(x[..., None, :, :] for x in (query, key, value)))
    return tuple(x[..., 0, :, :] for x in hidden)


# ---- scores: (query (..., n, d), key (..., m, d)) -> (..., n, m), float32 for half precision


def dot_score(query, key):
    return _wide(query) @ _wide(key).swapaxes(-1, -2)


def scaled_dot_score(query, key):
    return dot_score(query, key) / math.sqrt(query.shape[-1] or 1)  # without features the scores are 0


def additive_score(query, key, W_q, W_k, w_v, b=None):
    query, key = _wide(query) @ _wide(W_q), _wide(key) @ _wide(W_k)
    hidden = query[..., :, None, :] + key[..., None, :, :]  # (..., n, m, h)
    if b is not None:
        hidden = hidden + _wide(b)
    return mx.tanh(hidden) @ _wide(w_v)


def multiplicative_score(query, key, W):
    return (_wide(query) @ _wide(W)) @ _wide(key).swapaxes(-1, -2)


def gated_score(query, key, w_g):
    query, key, w_g = _wide(query), _wide(key), _wide(w_g)
    d = query.shape[-1]
    gate = (query @ w_g[:d])[..., :, None] + (key @ w_g[d:])[..., None, :]
    return 0.5 * (1 + mx.tanh(0.5 * gate)) * dot_score(query, key)  # mx.sigmoid of float64 is as exact as float32


def cosine_score(query, key):
    return dot_score(_unit(_wide(query)), _unit(_wide(key)))


def distance_score(query, key):
    return -_squared_distance(query, key) / 2


# ---- kernels: similarities >= 0 of u = |q - k| / width


def gaussian_kernel(query, key, width=1.0):
    return _exp(-_squared_distance(query, key) / (2 * width * width))


def boxcar_kernel(query, key, width=1.0):
    distance = _squared_distance(query, key)
    return (distance < width * width).astype(distance.dtype)


def triangular_kernel(query, key, width=1.0):
    squares = _squared_distance(query, key)
    distance = _keep(squares != 0, mx.sqrt(_keep(squares != 0, squares, 1)))
    return mx.maximum(1 - distance / width, 0)


def epanechnikov_kernel(query, key, width=1.0):
    return mx.maximum(1 - _squared_distance(query, key) / (width * width), 0)


def constant_kernel(query, key, width=1.0):
    return mx.ones_like(_squared_distance(query, key))


def _unit(x):
    squares = (x * x).sum(axis=-1, keepdims=True)
    return _keep(squares != 0, x / mx.sqrt(_keep(squares != 0, squares, 1)))


def _squared_distance(query, key):
    """|q - k|^2 from the differences: |q|^2 + |k|^2 - 2 q.k would cancel."""
    difference = _wide(query)[..., :, None, :] - _wide(key)[..., None, :, :]  # (..., n, m, d)
    return (difference * difference).sum(axis=-1)


# ---- normalisers: (scores (..., n, m), where bool) -> weights


def softmax(scores, where=None):
    return _softmax_lse(scores, where)[0].astype(scores.dtype)


def masked_softmax(scores, valid_lens=None, where=None):
    if valid_lens is not None:
        inside = mx.arange(scores.shape[-1]) < _lengths(valid_lens, scores.ndim)
        where = inside if where is None else where & inside
    return softmax(scores, where)


def sparsemax(scores, where=None):
    if scores.shape[-1] == 0:
        return scores
    wide = _wide(scores)
    shifted = mx.maximum(wide - _top(wide, where), -2)  # what lies 1 below the best has no weight: -2 stands for it
    shifted = shifted if where is None else _keep(where, shifted, -2)
    ordered = -mx.sort(-shifted, axis=-1)
    ranks = mx.arange(1, wide.shape[-1] + 1).astype(wide.dtype)
    sums = ordered.cumsum(axis=-1)
    count = (1 + ranks * ordered > sums).sum(axis=-1, keepdims=True)
    threshold = (mx.take_along_axis(sums, mx.stop_gradient(mx.maximum(count - 1, 0)), axis=-1) - 1) / count.astype(wide.dtype)
    return identity(mx.maximum(shifted - threshold, 0), where).astype(scores.dtype)


def hardmax(scores, where=None):
    if scores.shape[-1] == 0:
        return scores
    best = _forbidding(scores, where).argmax(axis=-1)
    return identity((mx.arange(scores.shape[-1]) == best[..., None]).astype(scores.dtype), where)


def proportional(scores, where=None):
    wide = identity(_wide(scores), where)
    total = wide.sum(axis=-1, keepdims=True)
    return identity(wide / _keep(total != 0, total, math.inf), where).astype(scores.dtype)


def average(scores, where=None):
    ones = identity(mx.ones_like(_wide(scores)), where)
    return (ones / mx.maximum(ones.sum(axis=-1, keepdims=True), 1)).astype(scores.dtype)


def identity(scores, where=None):
    return scores if where is None else _keep(where, scores)


def _forbidding(scores, where):
    """The scores, -inf where nothing may attend."""
    return scores if where is None else _keep(where, scores, -math.inf)


def _top(scores, where):
    """The largest score of each row, 0 where nothing may be attended to."""
    top = mx.stop_gradient(_forbidding(scores, where).max(axis=-1, keepdims=True))
    return _keep(top != -math.inf, top)


def _softmax_lse(scores, where, sink=None):
    """(weights, log-sum-exp); a row with nothing to attend to has weights 0, lse -inf. ``sink``: a score more, (..., n, 1)."""
    scores, m = _forbidding(_wide(scores), where), scores.shape[-1]
    if sink is not None:
        scores = mx.concatenate([scores, mx.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    if m + (sink is not None) == 0:
        return scores, mx.full(scores.shape[:-1], -math.inf, scores.dtype)
    top = _top(scores, None)
    shifted = _exp(scores - top)
    total = shifted.sum(axis=-1, keepdims=True)
    some = total != 0
    total = _keep(some, total, 1)
    lse = _keep(some, mx.log(total) + top, -math.inf)
    return identity((shifted / total)[..., :m], where), lse[..., 0]


# ---- attention


def attention(query, key, value, *, score=scaled_dot_score, normalize=softmax, mask=None, bias=None, valid_lens=None,
              causal=False, query_offset=0, window=None, positions=None, scale=None, softcap=None, sink=None, dropout=0.0,
              rng=None, return_weights=False, return_lse=False, return_scores=None):  # fmt: skip
    call = Call.of(
        query, key, score=score, normalize=normalize, mask=mask, bias=bias, valid_lens=valid_lens, causal=causal,
        query_offset=query_offset, window=window, positions=positions, scale=scale, softcap=softcap, sink=sink,
        dropout=dropout, rng=rng, return_weights=return_weights, return_lse=return_lse, return_scores=return_scores,
    )  # fmt: skip
    return _attend(query, key, value, call)


def choose(query, key, value, call):
    """What `kvattn.explain` says of a call: the kernel that serves it, and why."""
    if call.return_scores:
        return choose(query, key, value, call._replace(return_scores=None))._replace(run=_with_scores)
    if call.positions is not None:
        return Choice("the formula, of selected keys", "each query beside the keys that it selects", run=_of_selected_keys)
    if call.restricted and not _finite(query, key, value, call.bias, call.sink):
        return Choice("the formula, a query at a time", "NaN or inf is kept from rows that may not see it", run=_apart)
    return Choice("the formula", "MLX makes kernels of its operations", run=_formula)


def _attend(query, key, value, call):
    return choose(query, key, value, call).run(query, key, value, call)


def _formula(query, key, value, call):
    dtype, n, (heads, kv_heads) = query.dtype, query.shape[-2], planning.heads(query.shape, key.shape)
    allowed = _allowed(n, mx.arange(key.shape[-2]), query.ndim, call)
    query, key, value = _hide_padding(allowed, query, key, value)

    # weights = normalize(score(query, key)): (..., h, n, m)
    scores = _scores(query, key, call)
    if call.return_lse or call.sink is not None:
        weights, lse = _softmax_lse(scores, allowed, _sink(call, query.ndim))
    else:
        weights, lse = call.normalize(scores, where=allowed), None

    # output = weights @ value: (..., h, n, v)
    output = _unfold(_fold(_dropout(weights, call), kv_heads) @ _wide(value), heads, n).astype(dtype)
    if allowed is not None:  # and no gradient of NaN comes back from a row without keys
        some = mx.broadcast_to(allowed, weights.shape).any(axis=-1, keepdims=True)
        output = _keep(some, output)
    weights = weights if call.normalize is _scored else identity(weights, allowed)
    results = [output] + [weights.astype(dtype)] * call.return_weights + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else output


def _scores(query, key, call):
    """What the normaliser is given: (..., h, n, m), float32 for half precision."""
    n, (heads, kv_heads) = query.shape[-2], planning.heads(query.shape, key.shape)
    query = _fold(query, kv_heads)
    if call.scale is None:
        scores = call.score(query, key)
    else:
        scores = call.scale * (dot_score if call.score is scaled_dot_score else call.score)(query, key)
    scores = _unfold(scores, heads, n)
    if call.softcap is not None:
        scores = call.softcap * mx.tanh(scores / call.softcap)
    return scores + _wide(call.bias) if call.adds_bias else scores


def _with_scores(query, key, value, call):
    """The results without the scores, and these: the weights of a call that makes none of them."""
    results = _attend(query, key, value, call._replace(return_scores=None))
    scores = _attend(_wide(query), _wide(key), _wide(value)[..., :0], call.of_scores(_scored))[1]
    return (*(results if isinstance(results, tuple) else (results,)), scores)


def _scored(scores, where=None):
    """A normaliser that leaves the scores as they are, and says -inf of the pairs that may not attend."""
    return _forbidding(scores, where)


def _sink(call, ndim):
    """The sink as (..., n, 1) of the scores, or None."""
    if call.sink is None:
        return None
    sink = _wide(call.sink if call.sink.ndim == ndim else call.sink[..., None, None])
    return _keep(sink != -math.inf, sink, -math.inf)  # which has no gradient, whatever is NaN


def _dropout(weights, call):
    rate, rng = call.dropout, call.rng
    if not rate:
        return weights
    if patterns.drawn(rng):  # by NumPy, or of selected keys, already
        kept = mx.array(patterns.kept(weights.shape, call)) if patterns.is_seed(rng) else rng
        rate = patterns.exact(rate)
    else:
        kept = mx.random.uniform(shape=weights.shape, key=rng) >= rate
    return _keep(kept, weights / (1 - rate))


def _apart(query, key, value, call):
    """Each query beside keys of its own, zeros where it may not attend, in blocks of queries that memory holds."""
    n, m = query.shape[-2], key.shape[-2]
    blocks = planning.memory_blocks(None, query.shape, (*key.shape[:-1], max(key.shape[-1], value.shape[-1])), MOST)
    parts = [_of_selected_keys(*block) for block in call.cut(blocks or [(0, n, 0, m)], query, key, value)]
    return call.joined(parts, mx.concatenate)


def _of_selected_keys(query, key, value, call):
    """Each query beside the keys that it selects, as a batch entry of its own."""
    return call.without_query_axis(_formula(*_select(query, key, value, call)))


def _select(query, key, value, call):
    """Each query beside the keys it selects, or beside all: query (..., h, n, 1, d), key (..., h, n, s, d), value, and the
    call of these."""
    n, m, lead = query.shape[-2], key.shape[-2], planning.lead(query.shape, key.shape)
    index = mx.arange(m)[None] if call.positions is None else call.positions
    inside = (index >= 0) & (index < m) if call.positions is None else (index >= 0) & (index < m) & ~_repeated(index)
    if m == 0:  # one key that nobody may attend to, so that there is something to gather
        call = call._replace(mask=None, bias=None)
        key, value = (mx.zeros((*x.shape[:-2], 1, x.shape[-1]), x.dtype) for x in (key, value))
    index = mx.broadcast_to(mx.clip(index, 0, max(m - 1, 0)), (*lead, n, index.shape[-1]))

    def gather(x):
        return mx.take_along_axis(mx.broadcast_to(x, (*lead, n, m)), index, axis=-1)

    mask = inside if call.mask is None else inside & gather(call.mask)
    bias = None if call.bias is None else gather(call.bias)
    allowed = mx.broadcast_to(_allowed(n, index, query.ndim, call._replace(mask=mask, bias=bias)), index.shape)
    key, value = (mx.take_along_axis(_spread(x, lead)[..., None, :, :], index[..., None], axis=-2) for x in (key, value))
    sink = None if call.sink is None else mx.broadcast_to(_sink(call, query.ndim), (*lead, n, 1))[..., None]
    rng = call.rng
    if call.dropout and patterns.is_seed(rng):
        rng = mx.array(patterns.kept_of_selected(np.asarray(index), call))[..., None, :]
    bias = None if bias is None else bias[..., None, :]
    call = call._replace(sink=sink).of_selected_keys(allowed[..., None, :], bias, rng)
    return mx.broadcast_to(query, (*lead, n, query.shape[-1]))[..., None, :], key, value, call


def _spread(x, lead):
    """(..., h_kv, m, c) -> (*lead, m, c): each key head repeated for its queries' heads."""
    if lead and x.shape[-3] != lead[-1]:
        x = mx.repeat(x, lead[-1] // x.shape[-3], axis=-3)
    return mx.broadcast_to(x, (*lead, *x.shape[-2:]))


def _repeated(index):
    """True where the same position stands earlier in its row."""
    size = index.shape[-1]
    order = mx.argsort(index.astype(mx.int64) * size + mx.arange(size), axis=-1)  # equal ones as they stand
    ordered = mx.take_along_axis(index, order, axis=-1)
    again = mx.concatenate([mx.zeros(ordered[..., :1].shape, mx.bool_), ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    return mx.take_along_axis(again[..., :size], mx.argsort(order, axis=-1), axis=-1)


def attention_grad(query, key, value, grad_output, *, wrt=("query", "key", "value"), grad_scores=None, **options):
    call, loss = Call.of(query, key, **options), [grad_output] if grad_scores is None else [grad_output, grad_scores]
    given, score = {"query": query, "key": key, "value": value, "bias": call.bias, "sink": call.sink}, call.score
    sources = {**getattr(score, "keywords", {}), **given}
    apart = call.positions is None and call.restricted and grad_scores is None and not _finite(grad_output)
    attend = _apart if apart else _attend

    def output(*arrays):
        named = dict(zip(wrt, arrays, strict=True))
        bound = {name: named.pop(name) for name in wrt if name not in given}
        rebound = partial(score.func, *score.args, **{**score.keywords, **bound}) if bound else score
        query, key, value, bias, sink = {**given, **named}.values()
        results = attend(query, key, value, call._replace(score=rebound, bias=bias, sink=sink))
        return [results] if grad_scores is None else [*results]

    return tuple(mx.vjp(output, [sources[name] for name in wrt], loss)[1])


def merge_attention(outputs, lses, return_lse=False):
    outputs, lses = mx.stack([*outputs], axis=-2), mx.stack([*lses], axis=-1)  # (..., n, parts, v), (..., n, parts)
    weights, lse = _softmax_lse(lses, lses != -math.inf)
    weights = weights[..., None]
    output = (weights * _keep(weights != 0, _wide(outputs))).sum(axis=-2).astype(outputs.dtype)
    return (output, lse) if return_lse else output


# ---- positions


def rotary(x, positions, frequencies, *, factor=1.0, interleaved=False):
    width, wide = 2 * len(frequencies), _wide(x)
    cos, sin = (
        mx.array(table).astype(wide.dtype) for table in _turns(positions, frequencies, factor, interleaved, x.shape[-2])
    )
    pairs, rest = wide[..., :width], wide[..., width:]
    turned = pairs * cos + _swapped(pairs, interleaved) * sin  # (a, b) -> (a cos - b sin, b cos + a sin)
    return mx.concatenate([turned, rest], axis=-1).astype(x.dtype)


def _turns(positions, frequencies, factor, interleaved, n):
    """Each row's cosines and sines as they lie beside x, the first sine of a pair negative. By NumPy, in float64, since a large
    angle leaves float32 no digits."""
    places = to_numpy(positions)
    places = places if places.ndim else places + np.arange(n)
    angles = places.astype(np.float64)[..., None] * np.array(frequencies)
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    axis, shape = -1 if interleaved else -2, (*angles.shape[:-1], 2 * len(frequencies))
    return asarray(np.stack([cos, cos], axis).reshape(shape)), asarray(np.stack([-sin, sin], axis).reshape(shape))


def _swapped(x, interleaved):
    """Each pair (a, b) as (b, a)."""
    half = x.shape[-1] // 2
    if interleaved:
        return mx.stack([x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return mx.concatenate([x[..., half:], x[..., :half]], axis=-1)


# ---- multi-head attention


def multi_head_attention(query, key, value, params, *, num_heads, num_kv_heads, cache=None, **options):
    dtype, options = query.dtype, _widened(options, params.get("sink"))
    if cache is None:  # else a later call may look at what is nobody's now
        query, key, value = _hide_unused_rows(query, key, value, Call.of(query, key, **options))
    query = _split(_project(query, params, "q"), num_heads)  # (..., num_heads, n, d)
    key = _split(_project(key, params, "k"), num_kv_heads)  # (..., num_kv_heads, m, d)
    value = _split(_project(value, params, "v"), num_kv_heads)  # (..., num_kv_heads, m, v)
    if cache is not None:
        cache = cache.extend(key, value, backend=sys.modules[__name__])
        key, value = cache.seen()
        options["query_offset"] = cache.length - query.shape[-2]
    results = attention(query, key, value, **options)
    output, *rest = results if isinstance(results, tuple) else (results,)
    output = _project(_join(output), params, "o").astype(dtype)  # (..., n, o)
    if options.get("return_weights"):
        rest[0] = rest[0].astype(dtype)
    results = (output, *rest) if cache is None else (output, *rest, cache)
    return results if len(results) > 1 else output


def _widened(options, sink=None):
    """The options beside projections, which are wide. ``sink``: of the params, if they have one."""
    given = {"bias": options.get("bias"), "sink": options.get("sink") if sink is None else sink}
    return options | {name: None if x is None else _wide(x) for name, x in given.items()}


def _project(x, params, name):
    """x W + b, in float32 for half precision; without W, x."""
    x, W, b = _wide(x), params.get(f"W_{name}"), params.get(f"b_{name}")
    x = x if W is None else x @ _wide(W)
    return x if b is None else x + _wide(b)


def _split(x, heads):
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def _join(x):
    """(..., heads, n, c) -> (..., n, heads * c)."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def multi_head_attention_grad(query, key, value, params, grad_output, *, wrt=("query", "key", "value"), **options):
    given = {"query": query, "key": key, "value": value, **params}

    def output(*arrays):
        query, key, value, *rest = (given | dict(zip(wrt, arrays, strict=True))).values()
        return [multi_head_attention(query, key, value, dict(zip(params, rest, strict=True)), **options)]

    return tuple(mx.vjp(output, [given[name] for name in wrt], [grad_output])[1])


def self_attention(x, W_q, W_k, W_v, **options):
    dtype, options = x.dtype, _widened(options)
    lens = options["valid_lens"]
    lens = lens[None] if lens is not None and x.ndim == 2 else lens  # of the one head there is
    query, key, value = _hide_unused_rows(x, x, x, Call.of(x, x, **options | {"valid_lens": lens}))
    results = attention(_wide(query) @ _wide(W_q), _wide(key) @ _wide(W_k), _wide(value) @ _wide(W_v), **options)
    output, *rest = results if isinstance(results, tuple) else (results,)
    if options.get("return_weights"):
        rest[0] = rest[0].astype(dtype)
    output = output.astype(dtype)
    return (output, *rest) if rest else output


def write(buffer, x, at):
    """``buffer`` with x in the places at, at + 1, ... of axis -2; longer, if it does not hold them."""
    if isinstance(at, int) and at + x.shape[-2] > buffer.shape[-2]:
        return mx.concatenate([buffer[..., :at, :], x], axis=-2)
    return mx.slice_update(buffer, x, mx.array([at]), axes=(buffer.ndim - 2,))
