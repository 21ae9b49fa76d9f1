"""The TensorFlow tab. The promises are in kvattn/api.py; the five tabs hold the same functions in the same order."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import partial, reduce

import numpy as np
import tensorflow as tf

from kvattn import multihead, partition, patterns, planning, rotation
from kvattn.call import Call, Choice
from kvattn.kernels.tensorflow import blocks, distances, dropout, few_pairs, nonfinite, quirks, tiles
from kvattn.pairs import Pairs, Segments

HALF = (tf.float16, tf.bfloat16)
GENERATORS = (tuple, list)  # what rng may be beside an int and an array: a stateless seed


# ---- data


def is_array(x):
    return isinstance(x, tf.__internal__.types.Tensor)  # tensors, eager or symbolic, tf.Variable and keras.Variable


def asarray(x, dtype=None, like=None):
    if is_array(x):
        return x if dtype is None or tf.as_dtype(x.dtype) == tf.as_dtype(dtype) else tf.cast(x, dtype)
    x = np.asarray(x, dtype=tf.as_dtype(dtype).as_numpy_dtype if dtype else None)
    with tf.device(like.device) if isinstance(like, tf.Tensor) and like.device else nullcontext():
        return tf.convert_to_tensor(x)


def to_numpy(x):
    x = tf.convert_to_tensor(asarray(x))
    return (tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x).numpy()


def peek(x):
    return to_numpy(x) if tf.executing_eagerly() and "CPU" in tf.convert_to_tensor(x).device else None


def signed(x):
    x = tf.cast(x, tf.int64)  # beyond it uint64 is negative
    return tf.cast(tf.where((x < 0) | (x > 2**30), tf.constant(2**30, tf.int64), x), tf.int32)


def describe():
    return tf.__version__, [*devices().values()][:2][-1]  # TensorFlow's own choice: the first GPU


def devices():
    found = [tf.config.experimental.get_device_details(x) for x in tf.config.list_physical_devices("GPU")]
    return {"cpu": "cpu"} | {f"cuda:{i}": x.get("device_name", "GPU") for i, x in enumerate(found)}


def on(device):
    return tf.device(device.replace("cuda", "GPU"))  # asarray follows it, and so do operations on what lies elsewhere


def tracing():
    return not tf.executing_eagerly()


def converts(x, y):
    return False  # Keras converts what its layers are given


def places(x, first=0, count=None):
    count = quirks.shape(x)[-2] if count is None else count
    if type(first) is type(count) is int:
        return tf.range(first, first + count, dtype=tf.int64)  # one operation in place of four, each of which takes its time
    return tf.cast(first, tf.int64) + tf.range(tf.cast(count, tf.int64))


# ---- shapes and masks


def _heads(query, key):
    """(query heads, key heads): ints, or where the trace does not know them, scalar tensors."""
    heads = planning.heads(query.shape, key.shape)
    return planning.heads(quirks.shape(query), quirks.shape(key)) if None in heads else heads


def _wide(x):
    """Half precision in float32; the rest as it is."""
    x = tf.convert_to_tensor(x)
    return tf.cast(x, tf.float32) if x.dtype in HALF else x


def _fold(x, heads):
    """(..., h, n, c) -> (..., heads, h / heads * n, c): the queries of one key head lie in a row."""
    if len(x.shape) < 3 or _same(x.shape[-3], heads):
        return x
    *lead, h, n, c = quirks.shape(x)
    group = h // (heads if type(heads) is int else tf.maximum(heads, 1))
    return tf.reshape(x, (*lead, heads, group * n, c))


def _unfold(x, heads, n):
    """(..., h / g, g * n, c) -> (..., h, n, c): the inverse of _fold."""
    if len(x.shape) < 3 or _same(x.shape[-3], heads):
        return x
    *lead, _, _, c = quirks.shape(x)
    return tf.reshape(x, (*lead, heads, n, c))


def _same(size, other):
    """Whether two sizes are known to be the same."""
    return type(size) is type(other) is int and size == other


def _lengths(valid_lens, ndim):
    """valid_lens as (batch, 1, ..., 1 or n, 1) of ndim axes."""
    valid_lens = tf.cast(valid_lens, tf.int64)
    if ndim == 2:
        return tf.reshape(valid_lens, (-1, 1))
    batch, *per_query = quirks.shape(valid_lens)
    return tf.reshape(valid_lens, (batch, *[1] * (ndim - 3), *(per_query or [1]), 1))


def _positions(query_offset, n, ndim):
    """Where each query stands: (n, 1), or (batch, 1, ..., n, 1) of ndim axes."""
    if type(query_offset) is type(n) is int:
        return tf.range(query_offset, query_offset + n, dtype=tf.int64)[:, None]
    query_offset = tf.cast(query_offset, tf.int64)
    if len(query_offset.shape):
        query_offset = tf.reshape(query_offset, (-1, *[1] * (ndim - 1)))
    return query_offset + tf.range(tf.cast(n, tf.int64))[:, None]


def _keys(key):
    """The positions of the keys."""
    m = quirks.shape(key)[-2]
    return tf.range(m, dtype=tf.int64) if type(m) is int else tf.range(tf.cast(m, tf.int64))  # each cast is an operation


def _allowed(n, keys, ndim, call):
    """Which pairs may attend: bool, broadcastable to (..., n, m), or None where all may. ``keys``: their positions."""
    allowed = [] if call.mask is None else [call.mask]
    if call.bias is not None:
        allowed.append(tf.not_equal(call.bias, -math.inf))
    if call.valid_lens is not None:
        allowed.append(keys < _lengths(call.valid_lens, ndim))
    if call.windowed:
        ahead = keys - _positions(call.query_offset, n, ndim)  # how far each key lies after each query
        if call.left is not None:
            allowed.append(ahead >= -call.left)
        if call.right is not None:
            allowed.append(ahead <= call.right)
    return tf.convert_to_tensor(reduce(tf.logical_and, allowed)) if allowed else None


def _flags_of_rows(flags, shape):
    """Whether any flag holds for each row of an array of ``shape``: (..., h, r) -> (..., rows), heads and batch folded."""
    if len(flags.shape) >= 2 and len(shape) >= 3 and shape[-3] and flags.shape[-2] not in (1, shape[-3]):
        *lead, h, r = quirks.shape(flags)
        flags = tf.reshape(flags, (*lead, tf.minimum(h, shape[-3]), tf.maximum(h // shape[-3], 1), r))
        flags = tf.reduce_any(flags, axis=-2)
    for axis in range(-len(flags.shape), -1):
        if flags.shape[axis] != 1 and shape[axis - 1] == 1:
            flags = tf.reduce_any(flags, axis=axis, keepdims=True)
    return flags[..., None]


def _hide_padding(allowed, query, key, value):
    """Zeros for keys that no query may attend to and queries with no key: NaN there would leak as 0 * NaN."""
    if 0 in (*query.shape[:-1], *key.shape[:-1]):  # there are no pairs, so what there is meets nobody
        allowed = tf.zeros((1, 1), tf.bool)
    if allowed is None:
        return query, key, value
    if len(allowed.shape) < 2:
        allowed = allowed[None] if len(allowed.shape) else allowed[None, None]
    has_key, has_query = tf.reduce_any(allowed, axis=-1), tf.reduce_any(allowed, axis=-2)
    return (
        tf.where(_flags_of_rows(has_key, query.shape), query, 0),
        tf.where(_flags_of_rows(has_query, key.shape), key, 0),
        tf.where(_flags_of_rows(has_query, value.shape), value, 0),
    )


def _may_leak(*inputs):
    """Whether NaN or inf in rows that meet nobody may reach a gradient: not where all inputs are known to be finite."""
    for x in {id(x): x for x in inputs}.values():  # self-attention gives one array three times
        values = peek(x)
        if values is None or not np.isfinite(values).all():
            return True
    return False


def _hide_unused_rows(query, key, value, call):
    """Zeros for rows (..., n, c) that meet nobody in any head: a weight's gradient, their product with 0, would be NaN."""
    if type(call.mask) is Pairs:
        call = call.mask.whole(query[..., None, :, :], key[..., None, :, :], call, heads=False)
    if call.positions is not None:
        selected = tf.reduce_any(tf.cast(call.positions, tf.int64)[..., None] == _keys(key), axis=-2)
        call = call._replace(mask=selected if call.mask is None else tf.logical_and(call.mask, selected))
    allowed = _allowed(quirks.shape(query)[-2], _keys(key), len(query.shape) + 1, call)
    hidden = _hide_padding(allowed, *(x[..., None, :, :] for x in (query, key, value)))
    return tuple(x[..., 0, :, :] for x in hidden)


# ---- scores: (query (..., n, d), key (..., m, d)) -> (..., n, m), float32 for half precision


def dot_score(query, key):
    return quirks.matmul(_wide(query), _wide(key), transpose_b=True)


def scaled_dot_score(query, key):
    return dot_score(query, key) / _root(query)


def _root(query):
    """The square root of d; without features the scores are 0."""
    d = quirks.shape(query)[-1]
    return math.sqrt(d or 1) if isinstance(d, int) else tf.sqrt(tf.cast(tf.maximum(d, 1), _wide(query[..., :0]).dtype))


@quirks.few_axes
def additive_score(query, key, W_q, W_k, w_v, b=None):
    query, key = quirks.matmul(_wide(query), _wide(W_q)), quirks.matmul(_wide(key), _wide(W_k))
    hidden = query[..., :, None, :] + key[..., None, :, :]  # (..., n, m, h)
    if b is not None:
        hidden = hidden + _wide(b)
    return quirks.matmul(tf.tanh(hidden), _wide(w_v)[:, None])[..., 0]


def multiplicative_score(query, key, W):
    return quirks.matmul(quirks.matmul(_wide(query), _wide(W)), _wide(key), transpose_b=True)


@quirks.few_axes
def gated_score(query, key, w_g):
    query, key, w_g = _wide(query), _wide(key), _wide(w_g)
    d = quirks.shape(query)[-1]
    gate = quirks.matmul(query, w_g[:d, None]) + tf.linalg.matrix_transpose(quirks.matmul(key, w_g[d:, None]))
    return _sigmoid(gate) * dot_score(query, key)


def cosine_score(query, key):
    return dot_score(_unit(_wide(query)), _unit(_wide(key)))


def distance_score(query, key):
    return -_squared_distance(query, key) / 2


# ---- kernels: similarities >= 0 of u = |q - k| / width


def gaussian_kernel(query, key, width=1.0):
    return tf.exp(-_squared_distance(query, key) / (2 * width * width))


def boxcar_kernel(query, key, width=1.0):
    distance = _squared_distance(query, key)
    return tf.cast(distance < width * width, distance.dtype)


def triangular_kernel(query, key, width=1.0):
    squares = _squared_distance(query, key)
    apart = tf.not_equal(squares, 0)  # where they meet, the square root has no slope
    u = tf.where(apart, tf.sqrt(tf.where(apart, squares, 1)), 0) / width
    return tf.where(u >= 1, tf.zeros_like(u), 1 - u)  # tf.maximum has a slope where u = 1


def epanechnikov_kernel(query, key, width=1.0):
    squares = _squared_distance(query, key) / (width * width)
    return tf.where(squares >= 1, tf.zeros_like(squares), 1 - squares)


def constant_kernel(query, key, width=1.0):
    return tf.ones_like(_squared_distance(query, key))


def _sigmoid(x):
    return tf.sigmoid(x)


def _unit(x):
    squares = tf.reduce_sum(x * x, axis=-1, keepdims=True)
    some = tf.not_equal(squares, 0)
    return tf.where(some, x / tf.sqrt(tf.where(some, squares, 1)), 0)


@quirks.few_axes
def _squared_distance(query, key):
    """|q - k|^2 from the differences: |q|^2 + |k|^2 - 2 q.k would cancel."""
    difference = _wide(query)[..., :, None, :] - _wide(key)[..., None, :, :]  # (..., n, m, d)
    return tf.reduce_sum(difference * difference, axis=-1)


# ---- normalisers: (scores (..., n, m), where bool) -> weights


def softmax(scores, where=None):
    return tf.cast(_softmax_lse(scores, where)[0], scores.dtype)


def masked_softmax(scores, valid_lens=None, where=None):
    if valid_lens is not None:
        inside = tf.range(tf.cast(quirks.shape(scores)[-1], tf.int64)) < _lengths(valid_lens, len(scores.shape))
        where = inside if where is None else tf.where(inside, where, False)  # which broadcasts more axes than logical_and
    return softmax(scores, where)


def sparsemax(scores, where=None):
    wide = _wide(scores)
    if wide.shape[-1] == 0:
        return scores
    shifted = tf.maximum(wide - _top(wide, where), -2)  # what lies 1 below the best has no weight: -2 stands for it
    shifted = shifted if where is None else tf.where(where, shifted, -2)
    fixed = tf.stop_gradient(shifted)
    ordered = tf.sort(fixed, axis=-1, direction="DESCENDING")
    ranks = tf.cast(tf.range(1, quirks.shape(wide)[-1] + 1), wide.dtype)
    above = tf.cast(1 + ranks * ordered > tf.cumsum(ordered, axis=-1), wide.dtype)
    threshold = (tf.reduce_sum(above * ordered, axis=-1, keepdims=True) - 1) / tf.reduce_sum(above, axis=-1, keepdims=True)
    outside, zeros = fixed <= threshold, tf.zeros_like(wide)  # which keys have weight is a constant to the gradient
    total = tf.reduce_sum(tf.where(outside, zeros, shifted), axis=-1, keepdims=True)
    count = tf.reduce_sum(tf.where(outside, zeros, 1), axis=-1, keepdims=True)
    weights = tf.where(outside, zeros, shifted - (total - 1) / count)
    return tf.cast(weights if where is None else tf.where(where, weights, 0), scores.dtype)


def hardmax(scores, where=None):
    if scores.shape[-1] == 0:
        return scores
    scored = scores if where is None else tf.where(where, scores, -math.inf)
    best = tf.argmax(tf.where(tf.equal(scored, scored), scored, math.inf), axis=-1)  # tf.argmax would pass over NaN
    chosen = tf.equal(tf.range(tf.cast(quirks.shape(scores)[-1], tf.int64)), best[..., None])
    return tf.cast(chosen if where is None else tf.logical_and(chosen, where), scores.dtype)


def proportional(scores, where=None):
    wide = identity(_wide(scores), where)
    total = tf.reduce_sum(wide, axis=-1, keepdims=True)
    some = tf.not_equal(total, 0)
    shown = some if where is None else tf.logical_and(some, where)  # a row of NaN has weights where it may attend
    return tf.cast(tf.where(shown, wide / tf.where(some, total, 1), 0), scores.dtype)


def average(scores, where=None):
    ones = identity(tf.ones_like(_wide(scores)), where)
    return tf.cast(ones / tf.maximum(tf.reduce_sum(ones, axis=-1, keepdims=True), 1), scores.dtype)


def identity(scores, where=None):
    return scores if where is None else tf.where(where, scores, 0)


def _top(scores, where):
    """The largest score of each row, 0 where nothing may be attended to."""
    scores = scores if where is None else tf.where(where, scores, -math.inf)
    top = tf.stop_gradient(tf.reduce_max(scores, axis=-1, keepdims=True))
    return tf.where(tf.not_equal(top, -math.inf), top, 0)


def _softmax_lse(scores, where):
    """(weights, log-sum-exp); a row with nothing to attend to has weights 0 and lse -inf."""
    scores = _wide(scores)
    scores = scores if where is None else tf.where(where, scores, -math.inf)
    top = _top(scores, None)
    shifted = tf.exp(scores - top)
    total = tf.reduce_sum(shifted, axis=-1, keepdims=True)
    some = tf.not_equal(total, 0)
    total = tf.where(some, total, 1)
    lse = tf.where(some, tf.math.log(total) + top, -math.inf)
    weights = shifted / total
    return weights if where is None else tf.where(where, weights, 0), lse[..., 0]  # a row of NaN has them where it may attend


def _zero_where(flags, x):
    return x if flags is None else tf.where(flags, tf.constant(0, x.dtype), x)


def _softmax_of_dots(scores, where, biased, full=False):
    """(weights, whether each row has nothing to attend to, or None) in few operations: those rows' weights mean nothing.

    ``full``: each row is known to have something, of which scores of nothing but -inf make NaN.
    """
    if where is None and not biased:
        return tf.nn.softmax(scores), None
    if full and not biased:
        return tf.nn.softmax(tf.where(where, scores, -math.inf)), None
    if biased and quirks.compiles_with_xla():  # where a condition would copy the scores
        return _softmax_lse(scores, where)[0], None
    least = scores.dtype.min
    scores = scores if where is None else tf.where(where, scores, least)
    top = tf.stop_gradient(tf.reduce_max(scores, axis=-1, keepdims=True))
    empty = top <= least
    if biased:  # of a row of -inf, TensorFlow's softmax would be NaN
        scores = tf.cond(tf.reduce_any(tf.equal(top, -math.inf)), lambda: _zero_where(empty, scores), lambda: scores)
    return tf.nn.softmax(scores), empty


# ---- attention


def attention(query, key, value, *, score=scaled_dot_score, normalize=softmax, mask=None, bias=None, valid_lens=None,
              causal=False, query_offset=0, window=None, positions=None, scale=None, softcap=None, sink=None, dropout=0.0,
              rng=None, return_weights=False, return_lse=False, return_scores=None):  # fmt: skip
    query, key, value = tf.convert_to_tensor(query), tf.convert_to_tensor(key), tf.convert_to_tensor(value)
    call = Call.of(
        query, key, score=score, normalize=normalize, mask=mask, bias=bias, valid_lens=valid_lens, causal=causal,
        query_offset=query_offset, window=window, positions=positions, scale=scale, softcap=softcap, sink=sink,
        dropout=dropout, rng=rng, return_weights=return_weights, return_lse=return_lse, return_scores=return_scores,
    )  # fmt: skip
    return _attend(query, key, value, call)


def choose(query, key, value, call):
    """The kernel that serves a call: Choice(kernel, why, blocks, run)."""
    if call.return_scores:
        return choose(query, key, value, call._replace(return_scores=None)).with_scores(sys.modules[__name__])
    if type(call.mask) is Pairs:
        return partition.choice(query, key, value, call, _in_parts, partial(distances.by_distance, _in_tiles))
    tab = sys.modules[__name__]
    if call.sink is not None:
        choice = choose(query, key, value, call._replace(sink=None, return_lse=True))
        why, run = f"{choice.why}; the sink takes its share of each row", partial(_with_sink, choice.run)
        if choice.kernel == "blocks" and tiles.takes_sink(query, key, call):
            why, run = f"{choice.why}; the sink joins each block's sums", partial(tiles.attention_with_sink, tab, run)
        return choice._replace(why=why, run=run)
    if len(query.shape) > 4:
        batch = quirks.lead(query, key)[:-1]
        apart = partial(tf.nest.map_structure, lambda x: tf.reshape(x, (*batch, *quirks.shape(x)[1:])))
        call = call._replace(mask=call.mask.array(len(query.shape))) if type(call.mask) is Segments else call
        return _prepared(quirks.one_batch(query, key, value, call), apart)
    if call.positions is not None:
        choice = _prepared(_select(query, key, value, call), call.without_query_axis)
        return choice.of_selected_keys(call.positions.shape[-1], choice.run)

    obstacle = tiles.obstacle(tab, query, key, value, call)
    if not obstacle:
        why = "softmax of dot products, so many that all at once would fill the memory"
        return Choice("blocks", why, run=partial(tiles.attention, tab), compares_segments=True)
    cuttable = not any(None in x.shape[-2:] for x in (call.mask, call.bias) if x is not None)
    if cuttable and not call.return_weights and (plan := call.window_blocks(query.shape[-2], key.shape[-2])):
        return Choice("the formula", obstacle).in_window(plan, _in_the_window)
    if plan := blocks.plan(query, key, value, call):
        return Choice("the formula", obstacle).in_blocks(plan, partial(blocks.attention, tab, _by_formula))
    return Choice("the formula", obstacle, run=_by_formula)


def _prepared(arguments, restore):
    """The choice for a call whose arguments become these first; ``restore``: the results in the shape that was asked for."""
    choice = choose(*arguments)
    return choice._replace(run=lambda *_: restore(choice.run(*arguments, choice.blocks)))


def _attend(query, key, value, call):
    choice = choose(query, key, value, call)
    return choice.run(query, key, value, call, choice.blocks)


def _in_the_window(query, key, value, call, plan):
    """Blocks of queries, each a call of its own with the keys in its window."""
    return call.joined(_one_by_one(call, call.cut(plan, query, key, value), len(plan)), tf.concat)


def _in_tiles(query, key, value, call):
    return len(query.shape) < 5 and not tiles.obstacle(sys.modules[__name__], query, key, value, call)


def _in_parts(query, key, value, call, parts):
    """One part of the pairs after another, each a call of its own."""
    cuts = partition.cut(parts, query, key, value, call, tf.concat)
    return partition.joined(call, parts, _one_by_one(call, cuts, len(parts)), tf.concat)


def _one_by_one(call, cuts, count):
    results = []
    for i, (*arrays, part) in enumerate(cuts):
        results.append(_attend(*arrays, part._replace(rng=dropout.of_block(call.rng, i, count))))
    return results


def _by_formula(query, key, value, call, plan=()):
    """The formula; where it finds NaN or inf and runs at once, again without what nobody looks at, and if it finds some still,
    without the pairs that may not attend: 0 * NaN is NaN."""
    results = _formula(query, key, value, call)
    if not tf.executing_eagerly() or _finite(query, key, call, results):
        return results
    query, key, value = _hide_padding(_pairs(query, key, call), query, key, value)
    results = _formula(query, key, value, call)
    if _finite(query, key, call, results):
        return results
    careful = partial(_formula, careful=True)
    copies = 1 if call.score in (scaled_dot_score, dot_score) else query.shape[-1] or 1  # each query has keys of its own
    plan = blocks.plan(query, key, value, call, copies)
    if not plan:
        return careful(query, key, value, call)
    return blocks.attention(sys.modules[__name__], careful, query, key, value, call, plan)


def _finite(query, key, call, results):
    """Whether nothing is NaN or inf that could reach results, or their gradients, by pairs that may not attend."""
    output = results[0] if isinstance(results, tuple) else results
    hidden = call.restricted or 0 in (*query.shape[:-1], *key.shape[:-1])
    return nonfinite.absent(output, *((query, key) if hidden else ()))


def _formula(query, key, value, call, careful=False):
    """attention by its formula. ``careful``: where something is not finite, it reaches nothing by pairs that may not attend."""
    dtype, n, (heads, kv_heads) = query.dtype, quirks.shape(query)[-2], _heads(query, key)
    traced, dots = not tf.executing_eagerly(), call.score in (scaled_dot_score, dot_score)
    few = dots and call.normalize is softmax and not (careful or call.return_lse)
    recorded = not (traced or careful) and nonfinite.may_come()
    allowed, full = _limits(query, key, call, few)
    if not dots:
        query, key, value = _for_other_scores(query, key, value, call, allowed)
    score, product = _of_allowed_pairs(query, key, call, careful, recorded)

    # weights = normalize(score(query, key)): (..., h, n, m)
    scores = _scores(query, key, call._replace(score=score))
    if few:
        weights, empty = _weights_of_dots(scores, allowed, full, call, recorded)
    else:
        weights, lse = _weights_and_lse(scores, allowed, call, careful)

    # output = weights @ value: (..., h, n, v)
    output = _unfold(product(_fold(_dropout(weights, call), kv_heads), _wide(value)), heads, n)
    if few:
        output = _zero_where(empty, output)
    if few and call.return_weights:
        weights = _zero_where(empty, weights)
        every = partial(_all_pairs, query, key, call) if call.restricted else None
        weights = nonfinite.whole_rows(weights, every) if traced else weights
    results = [tf.cast(output, dtype)]
    results += [tf.cast(weights, dtype)] * call.return_weights + ([lse] if call.return_lse else [])
    return tuple(results) if len(results) > 1 else results[0]


def _pairs(query, key, call):
    """What `_allowed` says of these queries and all keys."""
    keys = _keys(key) if call.windowed or call.valid_lens is not None else None
    return _allowed(quirks.shape(query)[-2], keys, len(query.shape), call)


def _all_pairs(query, key, call):
    """The same for every pair by itself: (..., h, n, m)."""
    shape = (*quirks.lead(query, key), quirks.shape(query)[-2], quirks.shape(key)[-2])
    return tf.broadcast_to(_pairs(query, key, call), shape)


def _limits(query, key, call, few):
    """(what pairs a normaliser is told of, whether each query is known to have one). ``few``: not of those a bias forbids."""
    call = call._replace(bias=None) if few else call
    found = None
    if few and call.restricted and tf.executing_eagerly():
        found = few_pairs.allowed(query.shape[-2], key.shape[-2], len(query.shape), call)
    return found or (_pairs(query, key, call), False)


def _for_other_scores(query, key, value, call, allowed):
    """The arguments for a score that is no dot product: in a trace, where nobody sees what is NaN, without unused rows."""
    n, m = quirks.shape(query)[-2], key.shape[-2]
    if not tf.executing_eagerly() and (call.masked or not call.leaves_none_out(n, m)):
        query, key, value = _hide_padding(allowed, query, key, value)
    if None in (*query.shape[:-1], *key.shape[:-1]):
        some = tf.reduce_all(tf.concat([tf.shape(query)[:-1], tf.shape(key)[:-1]], axis=0) > 0)  # without pairs, no gradient
        query, key = tf.where(some, query, 0), tf.where(some, key, 0)
    return query, key, value


def _of_allowed_pairs(query, key, call, careful, recorded):
    """The score and the product with the values; where something may not be finite, of the pairs that may attend alone.

    ``recorded``: it may come when a tape asks for gradients.
    """
    if tf.executing_eagerly() and not ((careful or recorded) and call.restricted):
        return call.score, quirks.matmul
    _, kv_heads = _heads(query, key)
    folded = (lambda: _fold(_all_pairs(query, key, call), kv_heads)) if call.restricted else None
    pairs = nonfinite.AllowedPairs(folded, careful)
    if recorded:
        return call.score, pairs.recorded_product
    score = dot_score if call.score is scaled_dot_score and call.scale is not None else call.score
    return pairs.score(sys.modules[__name__], score) if call.restricted else call.score, pairs.product


def _weights_of_dots(scores, allowed, full, call, recorded):
    """`_softmax_of_dots` of a call's scores, which its bias is in."""
    traced = not tf.executing_eagerly()
    hides = call.bias is not None and (traced or nonfinite.hides(tf.convert_to_tensor(call.bias)))
    if hides and (traced or recorded):
        scores = nonfinite.shielded(scores, lambda: tf.not_equal(call.bias, -math.inf))
    return _softmax_of_dots(scores, allowed, hides, full)


def _weights_and_lse(scores, allowed, call, careful):
    """The weights by the call's normaliser; and the lse, or None."""
    if call.return_lse or (careful and call.normalize is softmax):
        return _softmax_lse(scores, allowed)
    weights = call.normalize(scores, where=allowed)
    looks = careful or not tf.executing_eagerly()
    if allowed is not None and looks and not blocks.is_kvattns(sys.modules[__name__], call.normalize):
        weights = tf.where(allowed, weights, 0)  # whatever a row of NaN has there, and its gradient
    return weights, None


def _scores(query, key, call):
    """What the normaliser is given: (..., h, n, m), float32 for half precision."""
    n, (heads, kv_heads) = quirks.shape(query)[-2], _heads(query, key)
    query = _fold(query, kv_heads)
    if call.scale is None:
        scores = call.score(query, key)
    else:
        scores = call.scale * (dot_score if call.score is scaled_dot_score else call.score)(query, key)
    scores = _unfold(scores, heads, n)
    if call.softcap is not None:
        scores = call.softcap * tf.tanh(scores / call.softcap)
    return scores + _wide(call.bias) if call.adds_bias else scores


def _scored(scores, where=None):
    """A normaliser that leaves the scores as they are, and says -inf of the pairs that may not attend."""
    return scores if where is None else tf.where(where, scores, -math.inf)


def _with_sink(run, query, key, value, call, blocks):
    """What ``run`` gives without the sink, less the sink's share of every row: a key of this score whose value is 0."""
    wide = (_wide(x) for x in (query, key, value))  # so that half precision is rounded once
    output, *weights, lse = run(*wide, call._replace(sink=None, return_lse=True), blocks)
    left, lse = _left(lse, call.sink, len(query.shape), call.return_lse)
    output = tf.cast(left * _wide(output), query.dtype)
    # 0 too where the sink is NaN
    weights = [tf.cast(tf.where(tf.equal(x, 0), 0, left * _wide(x)), query.dtype) for x in weights]
    results = [output, *weights] + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else output


def _left(lse, sink, ndim, with_lse=True):
    """What the sink leaves to the keys of each row's weight, (..., n, 1), and the lse of both; -inf is none, inf makes NaN."""
    sink = _wide(sink[..., 0] if len(sink.shape) == ndim else sink[..., None])
    sink += tf.where(tf.not_equal(sink, math.inf), tf.zeros_like(sink), math.nan)
    sink = tf.where(tf.not_equal(sink, -math.inf), sink, -math.inf)  # which has no gradient, whatever is NaN
    ahead = tf.where(tf.not_equal(lse, -math.inf), lse - sink, -math.inf)
    left = tf.exp(-tf.nn.softplus(-ahead))  # its gradient is exact where a sigmoid's, left (1 - left), is rounded to 0
    lse = tf.where(ahead > 0, lse + tf.nn.softplus(-ahead), sink + tf.nn.softplus(ahead)) if with_lse else None
    return left[..., None], lse


def _dropout(weights, call):
    """The weights, some of them dropped, by what rng draws, and the others divided by the share that is kept."""
    rate, rng = call.dropout, call.rng
    if not rate:
        return weights
    if patterns.drawn(rng):
        kept, rate = dropout.kept(weights, call), patterns.exact(rate)
    else:
        draw = tf.random.uniform if rng is None else partial(tf.random.stateless_uniform, seed=rng)
        kept = draw(quirks.shape(weights)) >= rate
    return tf.where(kept, weights / (1 - rate), 0)


def _select(query, key, value, call):
    """Each query beside the keys it selects: query (..., h, n, 1, d), key (..., h, n, s, d), value, and the call of these."""
    n, m, lead = quirks.shape(query)[-2], quirks.shape(key)[-2], quirks.lead(query, key)
    index = tf.broadcast_to(tf.cast(call.positions, tf.int64), (*lead, n, quirks.shape(call.positions)[-1]))
    inside = (index >= 0) & (index < tf.cast(m, tf.int64)) & ~_repeated(index)
    index = tf.clip_by_value(index, 0, tf.cast(tf.maximum(m - 1, 0), tf.int64))
    spare = 0 if key.shape[-2] else 1  # where m may be 0, a key that nobody may attend to: something to gather

    def gather(x):
        x = tf.pad(tf.broadcast_to(x, (*lead, n, m)), [[0, 0]] * (len(lead) + 1) + [[0, spare]])
        return tf.gather(x, index, axis=-1, batch_dims=len(lead) + 1)

    mask = inside if call.mask is None else inside & gather(call.mask)
    bias = None if call.bias is None else gather(call.bias)
    allowed = _allowed(n, index, len(query.shape), call._replace(mask=mask, bias=bias))
    key, value = (tf.pad(_spread(x, lead), [[0, 0]] * len(lead) + [[0, spare], [0, 0]]) for x in (key, value))
    # TensorFlow's gradient of a gather fails where there are neither features nor positions
    key, value = (
        tf.gather(x, index, axis=len(lead), batch_dims=len(lead))
        if x.shape[-1]
        else tf.zeros((*quirks.shape(index), 0), x.dtype)
        for x in (key, value)
    )
    rng = dropout.of_selected(call, index)
    call = call.of_selected_keys(allowed[..., None, :], None if bias is None else bias[..., None, :], rng)
    return tf.broadcast_to(query, (*lead, n, quirks.shape(query)[-1]))[..., None, :], key, value, call


def _spread(x, lead):
    """(..., h_kv, m, c) -> (*lead, m, c): each key head repeated for its queries' heads."""
    if lead and type(lead[-1]) is type(x.shape[-3]) is int and x.shape[-3] not in (1, lead[-1]):
        x = tf.repeat(x, lead[-1] // x.shape[-3], axis=-3)
    return tf.broadcast_to(x, (*lead, *quirks.shape(x)[-2:]))


def _repeated(index):
    """True where the same position stands earlier in its row."""
    lead = len(index.shape) - 1
    order = tf.argsort(index, axis=-1, stable=True)
    ordered = tf.gather(index, order, axis=-1, batch_dims=lead)
    repeated = tf.concat([tf.zeros_like(ordered[..., :1], tf.bool), tf.equal(ordered[..., 1:], ordered[..., :-1])], axis=-1)
    return tf.gather(repeated, tf.argsort(order, axis=-1), axis=-1, batch_dims=lead)


def attention_grad(query, key, value, grad_output, *, wrt=("query", "key", "value"), grad_scores=None, **options):
    finite = not tf.executing_eagerly() or nonfinite.absent(tf.convert_to_tensor(grad_output))
    score = options.get("score", scaled_dot_score)
    given = {**getattr(score, "keywords", {}), "query": query, "key": key, "value": value, "bias": options.get("bias")}
    given["sink"] = options.get("sink")
    known = None if finite and given["sink"] is not None else not finite  # a sink may bring NaN, like a loss
    by = {name: tf.identity(given[name]) for name in wrt}  # copies: one tensor may be query, key and value
    with tf.GradientTape(watch_accessed_variables=False) as tape, nonfinite.expected(known):
        tape.watch(by)
        given |= by
        query, key, value, bias, sink = (given.pop(name) for name in ("query", "key", "value", "bias", "sink"))
        if given:
            score = partial(score, **given)
        options |= blocks.self_contained(sys.modules[__name__], score=score, normalize=options.get("normalize", softmax))
        results = attention(query, key, value, **{**options, "bias": bias, "sink": sink})
    loss = grad_output if grad_scores is None else (grad_output, grad_scores)
    grads = tape.gradient(results, [by[name] for name in wrt], loss, unconnected_gradients="zero")
    return tuple(tf.convert_to_tensor(grad) for grad in grads)  # the gradient of a gather is sparse


def merge_attention(outputs, lses, return_lse=False):
    outputs, lses = tf.stack([*outputs], axis=-2), tf.stack([*lses], axis=-1)  # (..., n, parts, v), (..., n, parts)
    weights, lse = _softmax_lse(lses, tf.not_equal(lses, -math.inf))
    weights = tf.expand_dims(weights, -1)
    parts = tf.where(tf.not_equal(weights, 0), _wide(outputs), 0)
    output = tf.cast(tf.reduce_sum(weights * parts, axis=-2), outputs.dtype)
    return (output, lse) if return_lse else output


# ---- positions


def rotary(x, positions, frequencies, *, factor=1.0, interleaved=False):
    width, wide = 2 * len(frequencies), _wide(x)
    cos, sin = _turns(positions, frequencies, factor, interleaved, wide)  # (..., n, width)
    pairs, rest = wide[..., :width], wide[..., width:]
    turned = pairs * cos + _swapped(pairs, interleaved) * sin  # (a, b) -> (a cos - b sin, b cos + a sin)
    turned = tf.concat([turned, rest], axis=-1) if rest.shape[-1] else turned
    return tf.cast(turned, x.dtype)


_tables = {}


def _turns(positions, frequencies, factor, interleaved, x):
    """Each row's cosines and sines, of its position times the frequencies, as they lie beside x; the first sine of a pair
    negative. In float64, since a large angle leaves float32 no digits."""
    n = quirks.shape(x)[-2]

    def make():
        places = tf.cast(positions, tf.int64)
        places = places if len(places.shape) else places + tf.range(tf.cast(n, tf.int64))
        angles = tf.cast(places, tf.float64)[..., None] * tf.constant(frequencies, tf.float64)
        cos, sin = tf.cast(factor * tf.cos(angles), x.dtype), tf.cast(factor * tf.sin(angles), x.dtype)
        axis, shape = -1 if interleaved else -2, (*quirks.shape(angles)[:-1], 2 * len(frequencies))
        return tf.reshape(tf.stack([cos, cos], axis), shape), tf.reshape(tf.stack([-sin, sin], axis), shape)

    if not isinstance(positions, int) or not tf.executing_eagerly():
        return make()
    return rotation.kept(_tables, (frequencies, factor, interleaved, positions, n, x.dtype, x.device), n, make)


def _swapped(x, interleaved):
    """Each pair (a, b) as (b, a)."""
    half = x.shape[-1] // 2
    if interleaved:
        shape = quirks.shape(x)
        return tf.reshape(tf.reverse(tf.reshape(x, (*shape[:-1], half, 2)), [-1]), shape)
    return tf.concat([x[..., half:], x[..., :half]], axis=-1)


# ---- multi-head attention


def multi_head_attention(query, key, value, params, *, num_heads, num_kv_heads, cache=None, **options):
    tab, counts = sys.modules[__name__], (num_heads, num_kv_heads)
    return multihead.multi_head_attention(tab, query, key, value, params, counts, cache, options)


def _project(x, params, name):
    """x W + b, in float32 for half precision; without W, x."""
    x, W, b = _wide(x), params.get(f"W_{name}"), params.get(f"b_{name}")
    x = x if W is None else quirks.matmul(x, _wide(W))
    return x if b is None else x + _wide(b)


def _normed(x, weight, epsilon):
    """RMSNorm: x (..., d) over the root of its mean square, times the weight (d,)."""
    wide = _wide(x)
    wide = wide * tf.math.rsqrt(tf.reduce_mean(wide * wide, axis=-1, keepdims=True) + epsilon) * _wide(weight)
    return tf.cast(wide, x.dtype)


def _split(x, heads):
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return _swap(tf.reshape(x, [*quirks.shape(x)[:-1], heads, x.shape[-1] // heads]))


def _swap(x):
    """Axes -2 and -3 exchanged."""
    *lead, a, b, c = range(x.shape.rank)
    return tf.transpose(x, [*lead, b, a, c])


def _join(x):
    """(..., heads, n, c) -> (..., n, heads * c)."""
    x = _swap(x)
    return tf.reshape(x, [*quirks.shape(x)[:-2], x.shape[-2] * x.shape[-1]])


def multi_head_attention_grad(query, key, value, params, grad_output, *, wrt=("query", "key", "value"), **options):
    given = {"query": query, "key": key, "value": value, **params}
    by = {name: tf.identity(given[name]) for name in wrt}  # copies: one tensor may be query, key and value
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(by)
        query, key, value, *rest = (given | by).values()
        output = multi_head_attention(query, key, value, dict(zip(params, rest, strict=True)), **options)
    return tuple(tape.gradient(output, [*by.values()], grad_output, unconnected_gradients="zero"))


def self_attention(x, W_q, W_k, W_v, **options):
    return multihead.self_attention(sys.modules[__name__], x, {"W_q": W_q, "W_k": W_k, "W_v": W_v}, options)


def write(buffer, x, at):
    """``buffer`` with x in the places at, at + 1, ... of axis -2; longer, if it does not hold them."""
    return tf.concat([buffer[..., :at, :], x, buffer[..., at + quirks.shape(x)[-2] :, :]], axis=-2)
