"""The MXNet tab. The promises are in kvattn/api.py; the five tabs hold the same functions in the same order.

For MXNet 1.9.1, on mx.np arrays; legacy mx.nd arrays are taken too, and answered in kind. Scores and normalisers of
your own are given mx.np arrays. Where the code is longer than NumPy's, an operator of 1.9.1 is wrong, and a comment says how;
what is wrong everywhere is put right in kernels/mxnet/quirks.py.

One of its bugs can reach your own functions, and no guard around them can stop it: backward crashes the process where what
np.where, npx.batch_dot or npx.fully_connected gives is scaled or reshaped and then only compared, or put to another use that
has no gradient. Compare x.detach() there; np.matmul is safe.
"""

from __future__ import annotations

import math
import operator
import sys
from contextlib import nullcontext
from functools import partial, reduce

import numpy

from kvattn import multihead, partition, patterns, planning, rotation
from kvattn.call import Call, Choice
from kvattn.kernels.mxnet import dropout, quirks, views
from kvattn.old_numpy import old_names
from kvattn.pairs import Pairs

with old_names():
    import mxnet as mx
    from mxnet import autograd, np, npx

HALF = ("float16",)
GENERATORS = ()  # what rng may be beside an int and an array: MXNet draws from a state of its own
AND = operator.mul  # of two arrays of bools: MXNet's own "and" takes none in a graph
MOST_AXES = 5  # of an array that is cut
DTYPES = ("float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool")
WIDER = {"int16": "int32", "uint16": "int32", "uint32": "int64", "uint64": "int64"}

mx.util._set_np_shape_logged = True  # the message that np_shape logs once would configure the user's root logger


# ---- data


def is_array(x):
    return isinstance(x, mx.nd.NDArray)


def asarray(x, dtype=None, like=None):
    if dtype == "bfloat16" or str(getattr(x, "dtype", "")) == "bfloat16":
        raise TypeError("MXNet has no bfloat16 here; use float32 or float16")
    if is_array(x):
        with quirks.any_shape():
            return x.as_np_ndarray().astype(dtype, copy=False) if dtype else x.as_np_ndarray()
    if isinstance(x, mx.sym.Symbol):
        raise TypeError(
            "a Symbol has no values: of kvattn's functions only the `attention` of `from kvattn import mxnet`, and the layers "
            "there, wait for them"
        )
    x = numpy.asarray(x, dtype=numpy.dtype(dtype) if dtype else None)
    name = WIDER.get(x.dtype.name, x.dtype.name)
    if name not in DTYPES:
        raise TypeError(f"MXNet has no dtype {x.dtype.name}; it has {', '.join(DTYPES)}")
    if x.dtype.name == "uint64" and x.size and x.max() >= 2**63:
        raise ValueError(f"MXNet has no uint64, and its int64 does not hold {x.max()}")
    with quirks.any_shape():
        return np.array(x, dtype=name, ctx=None if like is None else like.ctx)


def to_numpy(x):
    return x.asnumpy() if is_array(x) else numpy.asarray(x)


def peek(x):
    return to_numpy(x)


def signed(x):
    return asarray(x, "int32")  # its one unsigned dtype has 8 bits


def describe():
    return mx.__version__, "cpu"


def devices():
    return {"cpu": "cpu"}


def on(device):
    return nullcontext()


def tracing():
    return False


def converts(x, y):
    return False  # its amp changes the operators of mx.nd alone


def places(x, first=0, count=None):
    return np.arange(first, first + (x.shape[-2] if count is None else count), dtype="int64", ctx=x.ctx)


# ---- shapes and masks


def _wide(x):
    """Half precision in float32; the rest as it is."""
    return x.astype("float32") if x.dtype.name in HALF else x


def _fold(x, heads):
    """(..., h, n, c) -> (..., heads, h / heads * n, c): the queries of one key head lie in a row."""
    if x.ndim < 3 or x.shape[-3] == heads:
        return x
    return x.reshape(*x.shape[:-3], heads, x.shape[-3] // heads * x.shape[-2], x.shape[-1])


def _unfold(x, heads, n):
    """(..., h / g, g * n, c) -> (..., h, n, c): the inverse of _fold."""
    if x.ndim < 3 or x.shape[-2] == n:
        return x
    return x.reshape(*x.shape[:-3], heads, n, x.shape[-1])


def _lengths(valid_lens, ndim):
    """valid_lens as (batch, 1, ..., 1 or n, 1) of ndim axes."""
    valid_lens = valid_lens.astype("int64")  # MXNet compares arrays of one dtype only
    if ndim == 2:
        return valid_lens.reshape(-1, 1)
    batch, *per_query = valid_lens.shape
    return valid_lens.reshape(batch, *[1] * (ndim - 3), *(per_query or [1]), 1)


def _positions(query_offset, n, ndim, ctx):
    """Where each query stands: (n, 1), or (batch, 1, ..., n, 1) of ndim axes."""
    if not isinstance(query_offset, int):
        query_offset = query_offset.astype("int64").reshape(-1, *[1] * (ndim - 1))
    return query_offset + np.arange(n, dtype="int64", ctx=ctx)[:, None]


def _allowed(n, keys, ndim, call):
    """Which pairs may attend: bool, broadcastable to (..., n, m), or None where all may. ``keys``: their positions."""
    with autograd.pause():
        allowed = [] if call.mask is None else [call.mask]
        if call.bias is not None:
            allowed.append(call.bias != -math.inf)
        if call.valid_lens is not None:
            allowed.append(keys < _lengths(call.valid_lens, ndim))
        if call.windowed:
            ahead = keys - _positions(call.query_offset, n, ndim, keys.ctx)  # how far each key lies after each query
            if call.left is not None:
                allowed.append(ahead >= -call.left)
            if call.right is not None:
                allowed.append(ahead <= call.right)
        return reduce(np.multiply, allowed) if allowed else None  # of bools: MXNet has no logical_and


def _flags_of_rows(flags, shape):
    """Whether any flag holds for each row of an array of ``shape``: (..., h, r) -> (..., rows), heads and batch folded."""
    if flags.ndim >= 2 and len(shape) >= 3 and flags.shape[-2] > shape[-3] > 0:
        flags = flags.reshape(*flags.shape[:-2], shape[-3], -1, flags.shape[-1]).any(axis=-2)
    for axis in range(-flags.ndim, -1):
        if flags.shape[axis] > shape[axis - 1] == 1:
            flags = flags.any(axis=axis, keepdims=True)
    return flags[..., None]


def _hide_padding(allowed, query, key, value):
    """Zeros for keys that no query may attend to and queries with no key: NaN there would leak as 0 * NaN."""
    if 0 in (query.shape[-2], key.shape[-2]):  # there are no pairs, so what there is meets nobody
        allowed = np.zeros((1, 1), dtype="bool", ctx=query.ctx)
    if allowed is None:
        return query, key, value
    if allowed.ndim < 2:
        allowed = allowed[None] if allowed.ndim else allowed.reshape(1, 1)
    with autograd.pause():
        has_query, has_key = allowed.any(axis=-2), allowed.any(axis=-1)
        rows = [_flags_of_rows(flags, x.shape) for flags, x in ((has_key, query), (has_query, key), (has_query, value))]
    return tuple(quirks.where(row, x, 0) for row, x in zip(rows, (query, key, value), strict=True))


def _may_leak(*inputs):
    """Whether NaN or inf in rows that meet nobody may reach a gradient: not where none is asked for or all is finite."""
    return autograd.is_recording() and not all(map(views.finite, {id(x): x for x in inputs}.values()))


def _hide_unused_rows(query, key, value, call):
    """Zeros for rows (..., n, c) that meet nobody in any head: a weight's gradient, their product with 0, would be NaN."""
    if type(call.mask) is Pairs:
        call = call.mask.whole(query[..., None, :, :], key[..., None, :, :], call, heads=False)
    keys = np.arange(key.shape[-2], dtype="int64", ctx=key.ctx)
    if call.positions is not None:
        chosen = (call.positions.astype("int64")[..., None] == keys).any(axis=-2)
        call = call._replace(mask=chosen if call.mask is None else call.mask * chosen)
    allowed = _allowed(query.shape[-2], keys, query.ndim + 1, call)
    hidden = _hide_padding(allowed, *(x[..., None, :, :] for x in (query, key, value)))
    return tuple(x[..., 0, :, :] for x in hidden)


# ---- scores: (query (..., n, d), key (..., m, d)) -> (..., n, m), float32 for half precision


@quirks.scoring
def dot_score(query, key):
    return quirks.matmul(_wide(query), _wide(key), transpose=True)


@quirks.scoring
def scaled_dot_score(query, key):
    return dot_score(query, key) / math.sqrt(query.shape[-1] or 1)  # without features the scores are 0


@quirks.scoring
def additive_score(query, key, W_q, W_k, w_v, b=None):
    query, key = np.dot(_wide(query), _wide(W_q)), np.dot(_wide(key), _wide(W_k))
    hidden = query[..., :, None, :] + key[..., None, :, :]  # (..., n, m, h)
    if b is not None:
        hidden = hidden + _wide(b)
    return np.dot(np.tanh(hidden), _wide(w_v))


@quirks.scoring
def multiplicative_score(query, key, W):
    return quirks.matmul(np.dot(_wide(query), _wide(W)), _wide(key), transpose=True)


@quirks.scoring
def gated_score(query, key, w_g):
    query, key, w_g = _wide(query), _wide(key), _wide(w_g)
    d = query.shape[-1]
    gate = np.dot(query, w_g[:d])[..., :, None] + np.dot(key, w_g[d:])[..., None, :]
    return _sigmoid(gate) * dot_score(query, key)


@quirks.scoring
def cosine_score(query, key):
    return dot_score(_unit(_wide(query)), _unit(_wide(key)))


@quirks.scoring
def distance_score(query, key):
    return -_squared_distance(query, key) / 2


# ---- kernels: similarities >= 0 of u = |q - k| / width


@quirks.scoring
def gaussian_kernel(query, key, width=1.0):
    return np.exp(-_squared_distance(query, key) / (2 * width * width))


@quirks.scoring
def boxcar_kernel(query, key, width=1.0):
    with autograd.pause():
        distance = _squared_distance(query, key)
        return (distance < width * width).astype(distance.dtype)


@quirks.scoring
def triangular_kernel(query, key, width=1.0):
    squares = _squared_distance(query, key)
    apart = squares.detach() > 0
    distance = quirks.where(apart, np.sqrt(quirks.where(apart, squares, 1)), 0)  # the slope of sqrt at 0 is infinite
    return np.maximum(1 - distance / width, 0)


@quirks.scoring
def epanechnikov_kernel(query, key, width=1.0):
    return np.maximum(1 - _squared_distance(query, key) / (width * width), 0)


@quirks.scoring
def constant_kernel(query, key, width=1.0):
    with autograd.pause():
        return np.ones_like(_squared_distance(query, key))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def _unit(x):
    squares = (x * x).sum(axis=-1, keepdims=True)
    some = squares.detach() != 0
    return quirks.where(some, x / np.sqrt(quirks.where(some, squares, 1)), 0)


def _squared_distance(query, key):
    """|q - k|^2 from the differences: |q|^2 + |k|^2 - 2 q.k would cancel."""
    difference = _wide(query)[..., :, None, :] - _wide(key)[..., None, :, :]  # (..., n, m, d)
    return (difference * difference).sum(axis=-1)


# ---- normalisers: (scores (..., n, m), where bool) -> weights


@quirks.normalizing
def softmax(scores, where=None):
    return _softmax_lse(scores, where)[0].astype(scores.dtype, copy=False)


@quirks.normalizing
def masked_softmax(scores, valid_lens=None, where=None):
    if valid_lens is not None:
        inside = np.arange(scores.shape[-1], dtype="int64", ctx=scores.ctx) < _lengths(valid_lens, scores.ndim)
        where = inside if where is None else where * inside
    return softmax(scores, where)


@quirks.normalizing
def sparsemax(scores, where=None):
    wide = _wide(scores)
    shifted = wide - _top(wide, where)
    with autograd.pause():  # the support is piecewise constant
        ordered = np.maximum(shifted, -2)  # what lies 1 below the best has no weight: -2 stands for it
        ordered = -np.sort(-(ordered if where is None else quirks.where(where, ordered, -2)), axis=-1)
        ranks = np.arange(1, wide.shape[-1] + 1, dtype=wide.dtype, ctx=wide.ctx)
        inside = 1 + ranks * ordered > ordered.cumsum(axis=wide.ndim - 1)
        count = inside.sum(axis=-1, keepdims=True).astype(wide.dtype)
        support = shifted > (quirks.where(inside, ordered, 0).sum(axis=-1, keepdims=True) - 1) / count
        support = support if where is None else support * where
        count = np.maximum(support.sum(axis=-1, keepdims=True), 1).astype(wide.dtype)
    threshold = (quirks.where(support, shifted, 0).sum(axis=-1, keepdims=True) - 1) / count
    return quirks.where(support, shifted - threshold, 0).astype(scores.dtype, copy=False)


@quirks.normalizing
def hardmax(scores, where=None):
    with autograd.pause():
        best = _wide(scores if where is None else quirks.where(where, scores, -math.inf)).argmax(axis=-1)
        chosen = np.arange(scores.shape[-1], dtype="int64", ctx=scores.ctx) == np.expand_dims(best, -1)
        return (chosen if where is None else chosen * where).astype(scores.dtype)


@quirks.normalizing
def proportional(scores, where=None):
    wide = identity(_wide(scores), where)
    total = wide.sum(axis=-1, keepdims=True)
    weights = wide / quirks.where(total.detach() != 0, total, math.inf)
    shown = where is None or views.finite(total)
    return (weights if shown else identity(weights, where)).astype(scores.dtype, copy=False)


@quirks.normalizing
def average(scores, where=None):
    with autograd.pause():
        ones = identity(np.ones_like(_wide(scores)), where)
        return (ones / np.maximum(ones.sum(axis=-1, keepdims=True), 1)).astype(scores.dtype, copy=False)


@quirks.normalizing
def identity(scores, where=None):
    return scores if where is None else quirks.where(where, scores, 0)


def _top(scores, where):
    """The largest score of each row, 0 where nothing may be attended to."""
    with autograd.pause():
        top = (scores if where is None else quirks.where(where, scores, -math.inf)).max(axis=-1, keepdims=True)
        return quirks.where(top != -math.inf, top, 0)


def _softmax_lse(scores, where):
    """(weights, log-sum-exp); a row with nothing to attend to has weights 0 and lse -inf."""
    scores = _wide(scores) if where is None else quirks.where(where, _wide(scores), -math.inf)
    top = _top(scores, None)
    shifted = np.exp(scores - top)
    total = shifted.sum(axis=-1, keepdims=True)
    some = total.detach() != 0
    total = quirks.where(some, total, 1)
    lse = quirks.where(some, np.log(total) + top, -math.inf)
    weights = shifted / total
    return weights if where is None or views.finite(total) else quirks.where(where, weights, 0), lse[..., 0]


# ---- attention


@quirks.shaped
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
    """The kernel that serves a call. It looks at shapes alone: each costs a microsecond, so it asks for them once."""
    if call.return_scores:
        return choose(query, key, value, call._replace(return_scores=None)).with_scores(sys.modules[__name__])
    if type(call.mask) is Pairs:
        with quirks.any_shape():
            by_distance = partial(views.by_distance, sys.modules[__name__])
            return partition.choice(query, key, value, call, _in_parts, by_distance)
    shapes = query.shape, key.shape, value.shape
    obstacle = views.obstacle(sys.modules[__name__], query.ctx, shapes, call)
    if call.sink is not None and (obstacle or autograd.is_recording()):
        choice = choose(query, key, value, call._replace(sink=None, return_lse=True))
        why = f"{choice.why}; the sink takes its share of each row"
        return choice._replace(why=why, blocks=(), run=_with_sink)
    if not obstacle:
        why = "views of the arrays need no copy, and MXNet's own products of batches are slower"
        return Choice("NumPy's", why, (), partial(views.attention, shapes), partial(views.attention_grad, shapes))
    n, m = shapes[0][-2], shapes[1][-2]
    selected = m if call.positions is None else call.positions.shape[-1]
    if 0 in (*planning.lead(*shapes[:2]), n, m, selected):
        return Choice("nothing", "there is no query, or no key", (), _nothing)
    if call.positions is not None:
        obstacle = views.obstacle(sys.modules[__name__], query.ctx, shapes, call.of_selected_keys(None, None))
        name, why = ("the formula", obstacle) if obstacle else ("NumPy's", "views of what is selected need no copy")
        return Choice(name, why).of_selected_keys(selected, _of_selected_keys)
    blocks = [] if call.return_weights else call.window_blocks(n, m)
    if blocks:
        return Choice("the formula", obstacle).in_window(blocks, _in_blocks)
    if not (call.return_weights or autograd.is_recording()):  # autograd would keep every block
        blocks = planning.memory_blocks(call.score, *shapes[:2], views.MOST)
    if blocks:
        return Choice("the formula", obstacle).in_blocks(blocks, _in_blocks)
    return Choice("the formula", obstacle, (), _formula)


def _attend(query, key, value, call):
    choice = choose(query, key, value, call)
    return choice.run(query, key, value, call, choice.blocks)


@quirks.one_batch_axis
def _formula(query, key, value, call, blocks=()):
    n, dtype, (heads, kv_heads) = query.shape[-2], query.dtype, planning.heads(query.shape, key.shape)
    allowed = _allowed(n, np.arange(key.shape[-2], dtype="int64", ctx=key.ctx), query.ndim, call)
    query, key, value = _hide_padding(allowed, query, key, value)

    # weights = normalize(score(query, key)): (..., h, n, m)
    scores = _scores(query, key, call)
    if call.return_lse:
        weights, lse = _softmax_lse(scores, allowed)
    else:
        weights, lse = call.normalize(scores, where=allowed), None

    # output = weights @ value: (..., h, n, v)
    output = quirks.matmul(_fold(_wide(_dropout(weights, call)), kv_heads), _wide(value))
    if allowed is not None and not views.finite(output):
        if query.shape[:-1] != (*key.shape[:-2], 1):  # queries share keys: products hold 0 * NaN for pairs that may not attend
            return _by_pairs(query, key, value, call)
        weights = quirks.where(allowed, weights, 0)
    output = _unfold(output, heads, n).astype(dtype, copy=False)
    results = [output] + [weights.astype(dtype, copy=False)] * call.return_weights + [lse] * call.return_lse
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
        scores = call.softcap * np.tanh(scores / call.softcap)
    return scores + _wide(call.bias) if call.adds_bias else scores


def _scored(scores, where=None):
    """A normaliser that leaves the scores as they are, and says -inf of the pairs that may not attend."""
    return scores if where is None else quirks.where(where, scores, -math.inf)


@quirks.one_batch_axis
def _with_sink(query, key, value, call, blocks):
    """What is attended to without the sink, less the sink's share of every row: a key of this score whose value is 0."""
    wide = (_wide(x) for x in (query, key, value))  # so that half precision is rounded once
    output, *weights, lse = _attend(*wide, call._replace(sink=None, return_lse=True))
    if lse.size:  # MXNet broadcasts nothing to what has no elements
        left, lse = _left(lse, call.sink, query.ndim, call.return_lse)
    output = left * output if output.size else output
    weights = [quirks.where(x.detach() != 0, left * x, 0) if x.size else x for x in weights]  # 0 too where the sink is NaN
    results = [x.astype(query.dtype, copy=False) for x in (output, *weights)] + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else results[0]


def _left(lse, sink, ndim, with_lse=True):
    """What the sink leaves to the keys of each row's weight, (..., n, 1), and the lse of both; -inf is none, inf makes NaN."""
    sink = _wide(sink[..., 0] if sink.ndim == ndim else sink.reshape(*sink.shape, 1))
    # not != inf: where the C library has left word of an overflow, MXNet 1.9.1 takes inf, not -inf, for a number out of range
    sink = sink + quirks.where(-sink.detach() != -math.inf, np.zeros_like(sink.detach()), math.nan)
    sink = quirks.where(sink.detach() != -math.inf, sink, -math.inf)  # which has no gradient, whatever is NaN
    softplus = partial(npx.activation, act_type="softrelu")
    ahead = quirks.where(lse.detach() != -math.inf, lse - sink, -math.inf)
    left = np.exp(-softplus(-ahead))  # its gradient is exact where a sigmoid's, left (1 - left), is rounded to 0
    if with_lse:
        lse = quirks.safe_backward(np.where(ahead.detach() > 0, lse + softplus(-ahead), sink + softplus(ahead)))
    return left[..., None], lse


def _dropout(weights, call):
    """The weights, some of them dropped, by what rng draws, and the others divided by the share that is kept."""
    rate, rng = call.dropout, call.rng
    if not rate:
        return weights
    if patterns.drawn(rng):
        kept, rate = dropout.kept(weights, call), patterns.exact(rate)
    else:
        if rng is not None:
            raise TypeError(f"rng must be an int, or None for MXNet's own state (mx.random.seed), not {type(rng).__name__}")
        kept = np.random.uniform(size=weights.shape, ctx=weights.ctx) >= rate
    return quirks.where(kept, weights / (1 - rate), 0)


@quirks.one_batch_axis
def _in_blocks(query, key, value, call, blocks):
    """One block of queries after another."""
    return call.joined(_one_by_one(call.cut(blocks, query, key, value)), np.concatenate)


def _in_parts(query, key, value, call, parts):
    """One part of the pairs after another, each a call of its own."""
    cuts = partition.cut(parts, query, key, value, call, np.concatenate)
    return partition.joined(call, parts, _one_by_one(cuts), np.concatenate)


def _one_by_one(cuts):
    results = []
    for block in cuts:
        results.append(_attend(*block))
        (results[-1][0] if isinstance(results[-1], tuple) else results[-1]).wait_to_read()  # else MXNet begins many at one time
    return results


def _by_pairs(query, key, value, call):
    """The formula with a copy of all keys for each query, so that nothing that only others may attend to reaches it."""
    (n, m), keys = (query.shape[-2], key.shape[-2]), np.arange(key.shape[-2], dtype="int64", ctx=key.ctx)[None]
    blocks = planning.memory_blocks(None, query.shape, key.shape, views.MOST) or [(0, n, 0, m)]
    return _in_blocks(query, key, value, call._replace(positions=keys), blocks)


def _nothing(query, key, value, call, blocks):
    """The results where there are no queries or no keys: connected, as backward wants a graph."""
    shape = (*planning.lead(query.shape, key.shape), query.shape[-2])
    keys = key.shape[-2] if call.positions is None else call.positions.shape[-1]
    if 0 in shape:
        none = np.concatenate([x.reshape(x.size)[:0] for x in (query, key, value)])
        output, lse = none.reshape(*shape, value.shape[-1]), _wide(none).reshape(shape)
    else:  # one key that no query may attend to
        zeros = [np.zeros((*x.shape[:-2], 1, x.shape[-1]), dtype=x.dtype, ctx=x.ctx) for x in (key, value)]
        key, value = (np.concatenate([x[..., :0, :], zero], axis=-2) for x, zero in zip((key, value), zeros, strict=True))
        nowhere = np.zeros((1, 1), dtype="bool", ctx=query.ctx)
        alone = call.of_selected_keys(nowhere, None)._replace(return_weights=False, return_lse=True)
        output, lse = _attend(query, key, value, alone)
    weights = np.zeros((*shape, keys), dtype=query.dtype, ctx=query.ctx)
    weights = weights + -math.inf if call.normalize is _scored and weights.size else weights
    results = [output] + [weights] * call.return_weights + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else output


@quirks.one_batch_axis
def _of_selected_keys(query, key, value, call, blocks):
    """Each query beside the keys that it selects, as a batch entry of its own."""
    lead = (*planning.lead(query.shape, key.shape), query.shape[-2])
    results = _attend(*_select(query, key, value, call))
    results = quirks.each(lambda x: x.reshape(*lead, *x.shape[2:]), results)
    return quirks.each(lambda x: x.astype(query.dtype, copy=False) if x.ndim > len(lead) else x, results)  # but for the lse


def _select(query, key, value, call):
    """Each query beside the keys it selects: query (r, 1, d), key (r, s, d), value (r, s, v), a row for each query of each
    head and batch entry, and the call of these."""
    n, m, lead = query.shape[-2], key.shape[-2], planning.lead(query.shape, key.shape)
    query, key, value = _wide(query), _wide(key), _wide(value)  # the gradients of what is selected twice are sums
    index = np.broadcast_to(call.positions.astype("int64"), (*lead, n, call.positions.shape[-1]))
    inside = (index >= 0) * (index < m) * np.logical_not(_repeated(index))
    index = np.clip(index, 0, m - 1)

    mask = inside if call.mask is None else inside * _gather(call.mask, index)
    bias = None if call.bias is None else _gather(_wide(call.bias), index)
    allowed = _allowed(n, index, query.ndim, call._replace(mask=mask, bias=bias))

    def rows(x):
        return x.reshape(math.prod(x.shape[:-1]), 1, x.shape[-1])  # MXNet infers no size where there are no features

    def selected(x):
        first = _spread(x.shape[:-2], lead, index.ctx).reshape(*lead, 1, 1) * m
        found = np.take(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), first + index, axis=0)
        return found.reshape(math.prod(found.shape[:-2]), *found.shape[-2:])

    call = call.of_selected_keys(rows(allowed), None if bias is None else rows(bias), dropout.of_selected(call, index))
    return rows(np.broadcast_to(query, (*lead, *query.shape[-2:]))), selected(key), selected(value), call


def _spread(shape, lead, ctx):
    """Which row of an array of leading axes ``shape`` each of ``lead`` meets: each key head's for its queries' heads."""
    rows = np.arange(math.prod(shape), dtype="int64", ctx=ctx).reshape(shape)
    if shape and shape[-1] not in (1, lead[-1]):
        rows = np.repeat(rows, lead[-1] // shape[-1], axis=-1)
    return np.broadcast_to(rows, lead)


def _gather(x, index):
    """x (..., m), broadcast, at index (..., s): MXNet's take_along_axis is NumPy's, and has no gradient."""
    width = x.shape[-1] if x.ndim else 1
    rows = _spread(x.shape[:-1], index.shape[:-1], index.ctx)[..., None]
    return np.take(x.reshape(-1), rows * width + index * int(width > 1), axis=0)


def _repeated(index):
    """True where the same position stands earlier in its row."""
    size = index.shape[-1]
    order = np.argsort(index * size + np.arange(size, dtype="int64", ctx=index.ctx), axis=-1)  # MXNet's sort is not stable
    ordered = _gather(index, order)
    before = np.concatenate([np.full_like(ordered[..., :1], -2), ordered[..., :-1]], axis=-1)
    return _gather(ordered == before, np.argsort(order, axis=-1))


@quirks.shaped
def attention_grad(query, key, value, grad_output, *, wrt=("query", "key", "value"), grad_scores=None, **options):
    return _attend_grad(query, key, value, grad_output, wrt, Call.of(query, key, **options), grad_scores)


def _attend_grad(query, key, value, grad_output, wrt, call, grad_scores=None):
    call, parts = partition.resolved(query, key, value, call) if type(call.mask) is Pairs else (call, ())
    parameters = call.score.keywords if isinstance(call.score, partial) else {}
    sources = {"query": query, "key": key, "value": value, "bias": call.bias, "sink": call.sink, **parameters}
    choice = None if parts else choose(query, key, value, call)
    if choice and choice.run_grad and grad_scores is None:
        return choice.run_grad(query, key, value, grad_output, wrt, call)
    few = call.positions is not None or call.left is not None or call.right not in (None, 0)  # pairs, in a window
    few = few or grad_scores is not None  # scores that are returned are held anyway
    if not (parts or few) and (blocks := planning.memory_blocks(call.score, query.shape, key.shape, views.MOST // 4)):
        call, parts = partition.of_blocks(sys.modules[__name__], blocks, call)
    if parts:
        zeros = lambda x: np.zeros(x.shape, dtype=_wide(x).dtype, ctx=x.ctx)  # noqa: E731
        found = partition.gradients(parts, sources, grad_output, wrt, call, zeros, np.concatenate, _waited_for)
        return tuple(found[name].astype(sources[name].dtype, copy=False) for name in wrt)

    def attend(query, key, value, bias, sink, **parameters):
        score = call.score
        if isinstance(score, partial):
            score = partial(score.func, *(x.detach() if is_array(x) else x for x in score.args), **parameters)
        return _attend(query, key, value, call._replace(score=score, bias=bias, sink=sink))

    return _grad_by_autograd(attend, sources, grad_output if grad_scores is None else [grad_output, grad_scores], wrt)


def _grad_by_autograd(function, sources, grad_output, wrt):
    """The gradients of sum(grad_output * function(**sources)), of each result's, taken of copies, whose gradients are nobody
    else's."""
    copies = {name: x.detach() if is_array(x) else x for name, x in sources.items()}
    for name in {*wrt, "value"}:  # value: where nothing else is reached, as by hardmax, backward needs a graph
        copies[name].attach_grad()
    with autograd.record():
        results = function(**copies)
        several = isinstance(results, tuple)
        if several:  # scores that depend on nothing, as a constant's, are to be in the graph too
            results = [x + np.zeros_like(copies["value"]).sum().astype(x.dtype) for x in results]
    autograd.backward(results, grad_output)
    return tuple(copies[name].grad for name in wrt)


def _waited_for(*given):
    """The gradients of a part, once they are there: else MXNet begins many at one time."""
    grads = _attend_grad(*given)
    for grad in grads:
        grad.wait_to_read()
    return grads


@quirks.shaped
def merge_attention(outputs, lses, return_lse=False):
    if 0 in lses[0].shape:
        return (outputs[0], lses[0]) if return_lse else outputs[0]
    outputs, lses = np.stack([*outputs], axis=-2), np.stack([*lses], axis=-1)  # (..., n, parts, v), (..., n, parts)
    weights, lse = _softmax_lse(lses, lses.detach() != -math.inf)
    if not outputs.size:  # values without features: MXNet broadcasts nothing to them
        return (outputs[..., 0, :], lse) if return_lse else outputs[..., 0, :]
    weights = weights[..., None]
    output = (weights * quirks.where(weights.detach() != 0, _wide(outputs), 0)).sum(axis=-2).astype(outputs.dtype, copy=False)
    return (output, lse) if return_lse else output


# ---- positions


@quirks.few_axes
def rotary(x, positions, frequencies, *, factor=1.0, interleaved=False):
    width, wide = 2 * len(frequencies), _wide(x)
    cos, sin = _turns(positions, frequencies, factor, interleaved, wide)  # (..., n, width)
    pairs, rest = wide[..., :width], wide[..., width:]
    turned = pairs * cos + _swapped(pairs, interleaved) * sin  # (a, b) -> (a cos - b sin, b cos + a sin)
    turned = np.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
    return turned.astype(x.dtype, copy=False)


_tables = {}


def _turns(positions, frequencies, factor, interleaved, x):
    """Each row's cosines and sines, of its position times the frequencies, as they lie beside x; the first sine of a pair
    negative. In float64, since a large angle leaves float32 no digits."""
    n = x.shape[-2]

    def make():
        places = positions if isinstance(positions, int) else positions.astype("float64")
        if isinstance(places, int) or not places.ndim:
            places = places + np.arange(n, dtype="float64", ctx=x.ctx)
        angles = np.expand_dims(places, -1) * np.array(frequencies, dtype="float64", ctx=x.ctx)
        cos, sin = factor * np.cos(angles), factor * np.sin(angles)
        axis, shape = angles.ndim if interleaved else angles.ndim - 1, (*angles.shape[:-1], 2 * len(frequencies))
        tables = np.stack([cos, cos], axis).reshape(shape), np.stack([-sin, sin], axis).reshape(shape)
        return tuple(table.astype(x.dtype) for table in tables)

    with autograd.pause():
        if not isinstance(positions, int):
            return make()
        return rotation.kept(_tables, (frequencies, factor, interleaved, positions, n, x.dtype.name, str(x.ctx)), n, make)


def _swapped(x, interleaved):
    """Each pair (a, b) as (b, a)."""
    half = x.shape[-1] // 2
    if interleaved:
        return np.stack([x[..., 1::2], x[..., ::2]], axis=x.ndim).reshape(x.shape)
    return np.concatenate([x[..., half:], x[..., :half]], axis=-1)


# ---- multi-head attention


@quirks.shaped
def multi_head_attention(query, key, value, params, *, num_heads, num_kv_heads, cache=None, **options):
    tab, counts = sys.modules[__name__], (num_heads, num_kv_heads)
    return multihead.multi_head_attention(tab, query, key, value, params, counts, cache, options)


def _project(x, params, name):
    """x W + b, in float32 for half precision; without W, x."""
    x, W, b = _wide(x), params.get(f"W_{name}"), params.get(f"b_{name}")
    if W is not None and 0 in (*x.shape[:-1], W.shape[-1]):
        # backward of a product or a sum over nothing gives whatever lay in memory
        nothing = np.concatenate([x.reshape(x.size)[:0], _wide(W).reshape(W.size)[:0]])
        return nothing.reshape(*x.shape[:-1], W.shape[-1])
    x = x if W is None else np.dot(x, _wide(W))
    b = None if 0 in x.shape else b
    return x if b is None else x + _wide(b)


def _normed(x, weight, epsilon):
    """RMSNorm: x (..., d) over the root of its mean square, times the weight (d,)."""
    if not x.size:
        return x
    wide = _wide(x)
    wide = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + epsilon) * _wide(weight)
    return wide.astype(x.dtype, copy=False)


def _split(x, heads):
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def _join(x):
    """(..., heads, n, c) -> (..., n, heads * c)."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


@quirks.shaped
def multi_head_attention_grad(query, key, value, params, grad_output, *, wrt=("query", "key", "value"), **options):
    def attend(query, key, value, **params):
        return multi_head_attention(query, key, value, params, **options)

    return _grad_by_autograd(attend, {"query": query, "key": key, "value": value, **params}, grad_output, wrt)


@quirks.shaped
def self_attention(x, W_q, W_k, W_v, **options):
    return multihead.self_attention(sys.modules[__name__], x, {"W_q": W_q, "W_k": W_k, "W_v": W_v}, options)


@quirks.shaped
def write(buffer, x, at):
    """``buffer`` with x in the places at, at + 1, ... of axis -2; longer, if it does not hold them."""
    return np.concatenate([buffer[..., :at, :], x, buffer[..., at + x.shape[-2] :, :]], axis=-2)
