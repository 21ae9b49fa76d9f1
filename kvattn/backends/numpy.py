"""The NumPy tab. The promises are in kvattn/api.py; the five tabs hold the same functions in the same order."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import lru_cache, partial, reduce

import numpy as np

from kvattn import multihead, pairs, partition, patterns, planning, rotation
from kvattn.call import Call, Choice
from kvattn.kernels.numpy import dropout, few, gradients, memory, tiled, tiled_grad, tiles
from kvattn.pairs import Pairs

HALF = ("float16", "bfloat16")
GENERATORS = (np.random.Generator, np.random.RandomState)  # what rng may be beside an int and an array
SMALL = 2.0**-64  # a sum of exp(scores) above this has lost no term that float32 could add to it
NEAR = 80  # exp of a score that is no further from 0 than this is a normal number of float32, and a sum of FEW is finite
LEAST = 2.0**-120  # less than any of these
FEW = 2**12  # scores of which one look at all takes less time than what it may save


# ---- data


def is_array(x):
    # no subclass, such as np.matrix, whose product is another, and no other byte order: asarray makes such arrays plain
    return (type(x) is np.ndarray and x.dtype.isnative) or isinstance(x, np.generic)


def asarray(x, dtype=None, like=None):
    x = np.asarray(x, dtype=np.dtype(dtype) if dtype else None)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def to_numpy(x):
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def peek(x):
    return np.asarray(x)


def signed(x):
    return x.clip(max=2**30).astype(np.int32)


def describe():
    return np.__version__, "cpu"


def devices():
    return {"cpu": "cpu"}


def on(device):
    return nullcontext()


def tracing():
    return False


def converts(x, y):
    return False


def places(x, first=0, count=None):
    end = first + (x.shape[-2] if count is None else count)
    return np.arange(first, end, dtype=np.int32 if pairs.short(first, end) else np.int64)


# ---- shapes and masks


def _wide(x):
    """Half precision in float32; the rest as it is."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.name in HALF else x  # NumPy makes a name anew each time


def _fold(x, heads):
    """(..., h, n, c) -> (..., heads, h / heads * n, c): the queries of one key head lie in a row."""
    if x.ndim < 3 or x.shape[-3] == heads:
        return x
    return x.reshape(*x.shape[:-3], heads, x.shape[-3] // heads * x.shape[-2], x.shape[-1])


def _unfold(x, heads, n):
    """(..., h / g, g * n, c) -> (..., h, n, c): the inverse of _fold."""
    if x.ndim < 3 or x.shape[-3] == heads:
        return x
    return x.reshape(*x.shape[:-3], heads, n, x.shape[-1])


def _lengths(valid_lens, ndim):
    """valid_lens as (batch, 1, ..., 1 or n, 1) of ndim axes."""
    if ndim == 2:
        return valid_lens.reshape(-1, 1)
    shape = valid_lens.shape
    return valid_lens.reshape(shape[:1] + (1,) * (ndim - 3) + (shape[1:] or (1,)) + (1,))


def _positions(query_offset, n, ndim):
    """Where each query stands: (n, 1), or (batch, 1, ..., n, 1) of ndim axes."""
    if not isinstance(query_offset, int) and query_offset.ndim:
        query_offset = query_offset.reshape(-1, *[1] * (ndim - 1))
    return query_offset + np.arange(n)[:, None]


def _allowed(n, keys, ndim, call):
    """Which pairs may attend: bool, broadcastable to (..., n, m), or None where all may. ``keys``: their positions."""
    allowed = [] if call.mask is None else [call.mask]
    finite = call.bias is None or tiles.small(call.bias) or call.bias.min(initial=0) > -math.inf  # then it forbids nothing
    if not finite:
        allowed.append(call.bias != -math.inf)
    if call.valid_lens is not None:
        allowed.append(keys < _lengths(call.valid_lens, ndim))
    if call.windowed:
        offset, limits = call.query_offset, (call.left, call.right)
        if keys.ndim == 1 and n * keys.size <= FEW and type(offset) is int:
            allowed.append(_in_small_window(n, keys.size, offset, *limits))
        else:
            allowed.append(_in_window(keys - _positions(offset, n, ndim), *limits))
    return reduce(np.logical_and, allowed) if allowed else None


def _in_window(ahead, left, right):
    """Which pairs are in a window; ``ahead``: how far each key lies after each query."""
    if left is None:
        return ahead <= right
    return ahead >= -left if right is None else (ahead >= -left) & (ahead <= right)


@lru_cache(maxsize=64)
def _in_small_window(n, m, offset, left, right):
    """The same of n queries and m keys, kept for later calls: a small call would take a third of its time to make it."""
    pairs = _in_window(np.arange(m) - _positions(offset, n, 2), left, right)
    pairs.flags.writeable = False
    return pairs


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
        allowed = np.array(False)
    if allowed is None:
        return query, key, value
    if allowed.ndim < 2:
        allowed = allowed[None] if allowed.ndim else allowed[None, None]
    has_query, has_key = allowed.any(axis=-2), allowed.any(axis=-1)
    return (
        np.where(_flags_of_rows(has_key, query.shape), query, 0).astype(query.dtype),
        np.where(_flags_of_rows(has_query, key.shape), key, 0).astype(key.dtype),
        np.where(_flags_of_rows(has_query, value.shape), value, 0).astype(value.dtype),
    )


def _may_leak(*inputs):
    """Whether NaN or inf in rows that meet nobody may reach a gradient: not where all inputs are finite."""
    return not all(tiles.small(x) or np.isfinite(x).all() for x in {id(x): x for x in inputs}.values())


def _hide_unused_rows(query, key, value, call):
    """Zeros for rows (..., n, c) that meet nobody in any head: a weight's gradient, their product with 0, would be NaN."""
    if type(call.mask) is Pairs:
        call = call.mask.whole(query[..., None, :, :], key[..., None, :, :], call, heads=False)
    keys = np.arange(key.shape[-2])
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
    return np.tanh(hidden) @ _wide(w_v)


def multiplicative_score(query, key, W):
    return (_wide(query) @ _wide(W)) @ _wide(key).swapaxes(-1, -2)


def gated_score(query, key, w_g):
    query, key, w_g = _wide(query), _wide(key), _wide(w_g)
    d = query.shape[-1]
    gate = (query @ w_g[:d])[..., :, None] + (key @ w_g[d:])[..., None, :]
    return _sigmoid(gate) * dot_score(query, key)


def cosine_score(query, key):
    return dot_score(_unit(_wide(query)), _unit(_wide(key)))


def distance_score(query, key):
    return -_squared_distance(query, key) / 2


# ---- kernels: similarities >= 0 of u = |q - k| / width


def gaussian_kernel(query, key, width=1.0):
    return np.exp(-_squared_distance(query, key) / (2 * width * width))


def boxcar_kernel(query, key, width=1.0):
    distance = _squared_distance(query, key)
    return (distance < width * width).astype(distance.dtype)


def triangular_kernel(query, key, width=1.0):
    return np.maximum(1 - np.sqrt(_squared_distance(query, key)) / width, 0)


def epanechnikov_kernel(query, key, width=1.0):
    return np.maximum(1 - _squared_distance(query, key) / (width * width), 0)


def constant_kernel(query, key, width=1.0):
    return np.ones_like(_squared_distance(query, key))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def _unit(x):
    squares = (x * x).sum(axis=-1, keepdims=True)
    return np.where(squares == 0, 0, x / np.sqrt(np.where(squares == 0, 1, squares))).astype(x.dtype)


def _squared_distance(query, key):
    """|q - k|^2 from the differences: |q|^2 + |k|^2 - 2 q.k would cancel."""
    difference = _wide(query)[..., :, None, :] - _wide(key)[..., None, :, :]  # (..., n, m, d)
    return (difference * difference).sum(axis=-1)


# ---- normalisers: (scores (..., n, m), where bool) -> weights


def softmax(scores, where=None):
    return _softmax_lse(scores, where, with_lse=False)[0].astype(scores.dtype, copy=False)


def masked_softmax(scores, valid_lens=None, where=None):
    if valid_lens is not None:
        inside = np.arange(scores.shape[-1]) < _lengths(valid_lens, scores.ndim)
        where = inside if where is None else where & inside
    return softmax(scores, where)


def sparsemax(scores, where=None):
    wide = _wide(scores)
    if wide.shape[-1] == 0:
        return scores
    shifted = np.maximum(wide - _top(wide, where), -2)  # what lies 1 below the best has no weight: -2 stands for it
    shifted = shifted if where is None else np.where(where, shifted, -2).astype(wide.dtype)
    ordered = -np.sort(-shifted, axis=-1)
    ranks = np.arange(1, wide.shape[-1] + 1, dtype=wide.dtype)
    sums = ordered.cumsum(axis=-1)
    count = (1 + ranks * ordered > sums).sum(axis=-1, keepdims=True)
    threshold = (np.take_along_axis(sums, count - 1, axis=-1) - 1) / count.astype(wide.dtype)
    weights = np.maximum(shifted - threshold, 0)
    return (weights if where is None else np.where(where, weights, 0)).astype(scores.dtype)


def hardmax(scores, where=None):
    if scores.shape[-1] == 0:
        return scores
    best = (scores if where is None else np.where(where, scores, -math.inf)).argmax(axis=-1)
    chosen = np.arange(scores.shape[-1]) == best[..., None]
    return (chosen if where is None else chosen & where).astype(scores.dtype)


def proportional(scores, where=None):
    wide = identity(_wide(scores), where)
    total = wide.sum(axis=-1, keepdims=True)
    weights = wide / np.where(total == 0, math.inf, total)
    return (weights if np.isfinite(total).all() else identity(weights, where)).astype(scores.dtype)


def average(scores, where=None):
    ones = identity(np.ones(scores.shape, _wide(scores).dtype), where)
    return (ones / np.maximum(ones.sum(axis=-1, keepdims=True), 1)).astype(scores.dtype)


def identity(scores, where=None):
    return scores if where is None else np.where(where, scores, 0).astype(scores.dtype)


def _top(scores, where):
    """The largest score of each row, 0 where nothing may be attended to."""
    scores = scores if where is None else np.where(where, scores, -math.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-math.inf)
    return np.where(top == -math.inf, 0, top).astype(scores.dtype, copy=False)


def _log(total):
    """The logarithm of sums, -inf of 0."""
    with np.errstate(divide="ignore"):
        return np.log(total)


def _softmax_lse(scores, where, with_lse=True):
    """(weights, log-sum-exp); a row with nothing to attend to has weights 0 and lse -inf."""
    scores = _wide(scores)
    few_scores = scores.size <= FEW
    near = few_scores and np.vdot(scores, scores) < NEAR * NEAR
    if few_scores and not near and where is not None:  # what stands at other pairs decides nothing, so that it changes no bit
        scores = identity(scores, where)
        near = np.vdot(scores, scores) < NEAR * NEAR
    if near:  # no maximum need be taken off
        weights = np.exp(scores)
        weights = weights if where is None else np.multiply(weights, where, out=weights)
        total = weights @ memory.ones(scores.shape[-1], scores.dtype)  # in half the time that its sum takes
        lse = _log(total)[..., 0] if with_lse else None
        total = total if where is None else np.maximum(total, LEAST, out=total)  # 0 where a row is empty
        return np.divide(weights, total, out=weights), lse
    shifted = scores if where is None else np.where(where, scores, -math.inf)
    top = shifted.max(initial=-math.inf)  # of all rows: found four times as fast as each row's own
    if math.isfinite(top):
        shifted = np.subtract(shifted, top, out=None if where is None else shifted)
        total = np.exp(shifted, out=shifted).sum(axis=-1, keepdims=True)
        if total.min(initial=1) > SMALL:
            lse = (np.log(total) + top)[..., 0] if with_lse else None
            return np.divide(shifted, total, out=shifted), lse
    top = _top(scores, where)
    with np.errstate(over="ignore", invalid="ignore"):  # inf - inf is NaN
        shifted = np.exp((scores if where is None else np.where(where, scores, -math.inf)) - top)
    total = shifted.sum(axis=-1, keepdims=True)
    empty = total == 0  # and others may be NaN
    total = np.where(empty, 1, total).astype(scores.dtype, copy=False)
    lse = np.where(empty, -math.inf, np.log(total) + top).astype(scores.dtype, copy=False)
    weights = (shifted / total).astype(scores.dtype, copy=False)
    return weights if np.isfinite(total).all() else identity(weights, where), lse[..., 0]


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
    """The kernel that serves a call: Choice(kernel, why, blocks, run). It looks at the call and the shapes of the arrays."""
    if call.return_scores:
        return choose(query, key, value, call._replace(return_scores=None)).with_scores(sys.modules[__name__])
    if type(call.mask) is Pairs:
        return partition.choice(query, key, value, call, _in_parts, tiles.by_distance)
    if call.sink is not None:
        choice = choose(query, key, value, call._replace(sink=None, return_lse=True))
        run = choice.run if choice.run is tiled.attention else partial(_with_sink, choice.run)
        return choice._replace(why=f"{choice.why}; the sink takes its share of each row", run=run)
    if call.positions is None:
        return _choose(query.shape, key.shape, call)
    each, selected = (*planning.lead(query.shape, key.shape), query.shape[-2]), call.positions.shape[-1]
    alone = call.of_selected_keys(mask=call.positions, bias=None)  # that there is a mask counts here, not which
    choice = _choose((*each, 1, query.shape[-1]), (*each, selected, key.shape[-1]), alone)
    return choice.of_selected_keys(selected, partial(_of_selected_keys, choice))


def _choose(query, key, call, wrt=()):
    """The kernel for arrays of these shapes, where no positions are given; ``wrt``: for the gradients by these."""
    if few.serves(sys.modules[__name__], query, key, call):
        return FEW_SCORES
    small = tiled.tiny(query, key)  # then nothing is gained by looking further
    why = tiled.FEW if small else tiled.obstacle(sys.modules[__name__], query, key, call, wrt)
    if not why:
        why = "softmax of dot products, so many that all at once would fill the memory, not the cache"
        return Choice("tiles", why, (), tiled.attention)
    blocks = [] if call.return_weights else call.window_blocks(query[-2], key[-2])
    if blocks:
        return Choice("the formula", why).in_window(blocks, _in_blocks)
    if not small and (blocks := memory.query_blocks(call.score, query, key)):
        return Choice("the formula", why).in_blocks(blocks, _in_blocks)
    return Choice("the formula", why, (), _formula)


def _attend(query, key, value, call):
    choice = choose(query, key, value, call)
    return choice.run(query, key, value, call, choice.blocks)


def _formula(query, key, value, call, blocks=()):
    allowed = _allowed(query.shape[-2], np.arange(key.shape[-2]), query.ndim, call) if call.restricted else None
    if allowed is None or call.beyond_softmax(sys.modules[__name__], "dropout"):
        query, key, value = _hide_padding(allowed, query, key, value)
        return _weighted(query, key, value, allowed, call)
    with np.errstate(over="ignore", invalid="ignore"):  # of pairs that may not attend, which softmax leaves out
        return _weighted(query, key, value, allowed, call)


def _of_few(query, key, value, call, blocks=()):
    """The formula in as few steps as a small call needs, where its numbers let it."""
    results = few.attention(sys.modules[__name__], query, key, value, call)
    return _formula(query, key, value, call) if results is None else results


FEW_SCORES = Choice("the formula", tiled.FEW, (), _of_few)


def _weighted(query, key, value, allowed, call):
    """The results of attention over the pairs allowed."""
    dtype, n, (heads, kv_heads) = query.dtype, query.shape[-2], planning.heads(query.shape, key.shape)

    # weights = normalize(score(query, key)): (..., h, n, m)
    scores = _scores(query, key, call)
    if call.return_lse:
        weights, lse = _softmax_lse(scores, allowed)
    else:
        weights, lse = call.normalize(scores, where=allowed), None

    # output = weights @ value: (..., h, n, v)
    dropped = _fold(_dropout(weights, call), kv_heads)
    output = dropped @ _wide(value)
    # 0 * NaN is NaN: only pairs that may attend
    if allowed is not None and not tiles.small(output):
        weights = identity(weights, allowed)
        output = tiles.product_of_allowed(dropped, _wide(value), _fold(np.broadcast_to(allowed, weights.shape), kv_heads))
    output = _unfold(output, heads, n).astype(dtype, copy=False)
    results = [output] + [weights.astype(dtype, copy=False)] * call.return_weights + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else output


def _scores(query, key, call):
    """What the normaliser is given: (..., h, n, m), float32 for half precision."""
    n, (heads, kv_heads) = query.shape[-2], planning.heads(query.shape, key.shape)
    query = _fold(query, kv_heads)
    if call.scale is None:
        scores = memory.scores(call.score, query, key)
    else:
        scores = call.scale * (dot_score if call.score is scaled_dot_score else partial(memory.scores, call.score))(query, key)
    scores = _unfold(scores, heads, n)
    if call.softcap is not None:
        scores = call.softcap * np.tanh(scores / call.softcap)
    return scores + _wide(call.bias) if call.adds_bias else scores


def _scored(scores, where=None):
    """A normaliser that leaves the scores as they are, and says -inf of the pairs that may not attend."""
    return scores if where is None else np.where(where, scores, -math.inf).astype(scores.dtype)


def _in_blocks(query, key, value, call, blocks):
    """One block of queries after another."""
    return call.joined([_attend(*block) for block in call.cut(blocks, query, key, value)], np.concatenate)


def _in_parts(query, key, value, call, parts):
    """One part of the pairs after another, each a call of its own."""
    cuts = partition.cut(parts, query, key, value, call, np.concatenate)
    return partition.joined(call, parts, [_attend(*cut) for cut in cuts], np.concatenate)


def _of_selected_keys(choice, query, key, value, call, blocks):
    """Each query beside the keys that it selects, by the kernel chosen for that."""
    return call.without_query_axis(choice.run(*_select(query, key, value, call), choice.blocks))


def _with_sink(run, query, key, value, call, blocks):
    """What ``run`` gives without the sink, less the sink's share of every row: a key of this score whose value is 0."""
    wide = (_wide(x) for x in (query, key, value))  # so that half precision is rounded once
    output, *weights, lse = run(*wide, call._replace(sink=None, return_lse=True), blocks)
    left, lse = _left(lse, call.sink, query.ndim, call.return_lse)
    output = (left * output).astype(query.dtype, copy=False)
    weights = [np.where(x == 0, 0, left * x).astype(query.dtype) for x in weights]  # 0 too where the sink is NaN
    results = [output, *weights] + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else output


def _left(lse, sink, ndim, with_lse=True):
    """What the sink leaves to the keys of each row's weight, (..., n, 1), and the lse of both; -inf is none, inf makes NaN."""
    sink = _wide(sink[..., 0] if sink.ndim == ndim else sink[..., None])
    with np.errstate(invalid="ignore"):  # NaN beside -inf
        both = np.logaddexp(lse, np.where(sink == math.inf, math.nan, sink).astype(sink.dtype))
    left = np.exp(lse - np.where(lse == -math.inf, 0, both)).astype(lse.dtype)
    return left[..., None], both


def _dropout(weights, call):
    """The weights, some of them dropped, by what rng draws, and the others divided by the share that is kept."""
    rate, rng = call.dropout, call.rng
    if not rate:
        return weights
    if patterns.drawn(rng):
        kept, rate = dropout.kept(weights, call), patterns.exact(rate)
    else:
        kept = (rng or np.random.default_rng()).random(weights.shape) >= rate
    return np.where(kept, weights / (1 - rate), 0).astype(weights.dtype)


def _select(query, key, value, call):
    """Each query beside the keys it selects: query (..., h, n, 1, d), key (..., h, n, s, d), value, and the call of these."""
    n, m, lead = query.shape[-2], key.shape[-2], planning.lead(query.shape, key.shape)
    index = call.positions
    inside = (index >= 0) & (index < m) & ~_repeated(index)
    if m == 0:  # one key that nobody may attend to, so that there is something to gather
        call = call._replace(mask=None, bias=None)
        key, value = (np.zeros((*x.shape[:-2], 1, x.shape[-1]), x.dtype) for x in (key, value))
    index = np.broadcast_to(np.clip(index, 0, max(m - 1, 0)), (*lead, n, index.shape[-1]))

    def gather(x):
        return np.take_along_axis(np.broadcast_to(x, (*lead, n, m)), index, axis=-1)

    mask = inside if call.mask is None else inside & gather(call.mask)
    bias = None if call.bias is None else gather(call.bias)
    allowed = _allowed(n, index, query.ndim, call._replace(mask=mask, bias=bias))
    key, value = (np.take_along_axis(_spread(x, lead)[..., None, :, :], index[..., None], axis=-2) for x in (key, value))
    rng = dropout.of_selected(call, index)
    call = call.of_selected_keys(allowed[..., None, :], None if bias is None else bias[..., None, :], rng)
    return np.broadcast_to(query, (*lead, n, query.shape[-1]))[..., None, :], key, value, call


def _spread(x, lead):
    """(..., h_kv, m, c) -> (*lead, m, c): each key head repeated for its queries' heads."""
    if lead and x.shape[-3] != lead[-1]:
        x = np.repeat(x, lead[-1] // x.shape[-3], axis=-3)
    return np.broadcast_to(x, (*lead, *x.shape[-2:]))


def _repeated(index):
    """True where the same position stands earlier in its row."""
    order = np.argsort(index, axis=-1, kind="stable")
    ordered, repeated = np.take_along_axis(index, order, axis=-1), np.zeros(index.shape, bool)
    np.put_along_axis(repeated, order[..., 1:], ordered[..., 1:] == ordered[..., :-1], axis=-1)
    return repeated


def attention_grad(query, key, value, grad_output, *, wrt=("query", "key", "value"), grad_scores=None, **options):
    call = Call.of(query, key, **options)
    known = tiled_grad.NOTHING if grad_scores is None else tiled_grad.Known(grad_scores=grad_scores)
    return gradients.attention_grad(sys.modules[__name__], query, key, value, grad_output, wrt, call, known)


def merge_attention(outputs, lses, return_lse=False):
    outputs, lses = np.stack([*outputs], axis=-2), np.stack([*lses], axis=-1)  # (..., n, parts, v), (..., n, parts)
    weights, lse = _softmax_lse(lses, lses != -math.inf)
    weights = weights[..., None]
    output = (weights * np.where(weights == 0, 0, _wide(outputs))).sum(axis=-2).astype(outputs.dtype)
    return (output, lse) if return_lse else output


# ---- positions


def rotary(x, positions, frequencies, *, factor=1.0, interleaved=False):
    width, wide = 2 * len(frequencies), _wide(x)
    cos, sin = _turns(positions, frequencies, factor, interleaved, wide)  # (..., n, width)
    pairs, rest = wide[..., :width], wide[..., width:]
    turned = pairs * cos  # (a, b) -> (a cos - b sin, b cos + a sin)
    turned += _swapped(pairs, interleaved) * sin
    turned = np.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
    return turned.astype(x.dtype, copy=False)


_tables = {}


def _turns(positions, frequencies, factor, interleaved, x):
    """Each row's cosines and sines, of its position times the frequencies, as they lie beside x; the first sine of a pair
    negative. In float64, since a large angle leaves float32 no digits."""
    n = x.shape[-2]

    def make():
        first = isinstance(positions, int) or not positions.ndim
        places = np.add(positions, np.arange(n), dtype=np.float64) if first else positions
        angles = places[..., None] * np.array(frequencies)
        cos, sin = factor * np.cos(angles), factor * np.sin(angles)
        axis, shape = -1 if interleaved else -2, (*angles.shape[:-1], 2 * len(frequencies))
        tables = np.stack([cos, cos], axis).reshape(shape), np.stack([-sin, sin], axis).reshape(shape)
        return tuple(table.astype(x.dtype) for table in tables)

    if not isinstance(positions, int):
        return make()
    return rotation.kept(_tables, (frequencies, factor, interleaved, positions, n, x.dtype), n, make)


def _swapped(x, interleaved):
    """Each pair (a, b) as (b, a)."""
    half = x.shape[-1] // 2
    if interleaved:
        return np.stack([x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return np.concatenate([x[..., half:], x[..., :half]], axis=-1)


# ---- multi-head attention


def multi_head_attention(query, key, value, params, *, num_heads, num_kv_heads, cache=None, **options):
    tab, counts = sys.modules[__name__], (num_heads, num_kv_heads)
    return multihead.multi_head_attention(tab, query, key, value, params, counts, cache, options)


def _project(x, params, name):
    """x W + b, in float32 for half precision; without W, x."""
    x, W, b = _wide(x), params.get(f"W_{name}"), params.get(f"b_{name}")
    x = x if W is None else x @ _wide(W)
    return x if b is None else x + _wide(b)


def _normed(x, weight, epsilon):
    """RMSNorm: x (..., d) over the root of its mean square, times the weight (d,)."""
    wide = _wide(x)
    wide = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + epsilon) * _wide(weight)
    return wide.astype(x.dtype)


def _split(x, heads):
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def _join(x):
    """(..., heads, n, c) -> (..., n, heads * c)."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def multi_head_attention_grad(query, key, value, params, grad_output, *, wrt=("query", "key", "value"), **options):
    inputs = {"query": query, "key": key, "value": value}
    return gradients.multi_head_attention_grad(sys.modules[__name__], inputs, params, grad_output, wrt, **options)


def self_attention(x, W_q, W_k, W_v, **options):
    return multihead.self_attention(sys.modules[__name__], x, {"W_q": W_q, "W_k": W_k, "W_v": W_v}, options)


def write(buffer, x, at):
    """``buffer`` with x in the places at, at + 1, ... of axis -2; longer, if it does not hold them."""
    if at + x.shape[-2] > buffer.shape[-2]:
        return np.concatenate([buffer[..., :at, :], x], axis=-2)
    buffer[..., at : at + x.shape[-2], :] = x
    return buffer
