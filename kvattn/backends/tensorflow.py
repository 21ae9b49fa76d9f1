"""The TensorFlow tab. The promises are in kvattn/api.py; the five tabs hold the same functions in the same order."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import partial, reduce, wraps

import numpy as np
import tensorflow as tf

from kvattn import bands, explanation
from kvattn.kernels.tensorflow import blocks, nonfinite
from kvattn.kernels.tensorflow import tiles as tiled

HALF = (tf.float16, tf.bfloat16)


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


# ---- shapes and masks


def _shape(x):
    """The sizes of the axes: ints, or where the trace does not know them, scalar tensors."""
    static = tuple(x.shape)
    if None not in static:
        return static
    dynamic = tf.shape(x)
    return tuple(dynamic[axis] if size is None else size for axis, size in enumerate(static))


def _heads(query, key):
    """(query heads, key heads), or (None, None) where one is unknown: they count as equal, or broadcast."""
    heads = bands.heads(query.shape, key.shape)
    return (None, None) if None in heads else heads


def _wide(x):
    """Half precision in float32; the rest as it is."""
    x = tf.convert_to_tensor(x)
    return tf.cast(x, tf.float32) if x.dtype in HALF else x


def _product(a, b, **options):
    """a @ b; (batch, 1, n, d) loses its second axis meanwhile: oneDNN's product of it with one (d, m) for all crashes."""
    alike = None not in a.shape[:-2] and a.shape[:-2] == b.shape[:-2]  # each has its own
    if alike or len(a.shape) != 4 or a.shape[1] != 1 or (len(b.shape) > 2 and b.shape[1] != 1):
        return tf.matmul(a, b, **options)
    b = tf.squeeze(b, 1) if len(b.shape) > 2 else b  # indexing takes six times as long
    return tf.expand_dims(tf.matmul(tf.squeeze(a, 1), b, **options), 1)


def _fold(x, heads):
    """(..., h, n, c) -> (..., heads, h / heads * n, c): the queries of one key head lie in a row."""
    if len(x.shape) < 3 or heads is None or x.shape[-3] == heads:
        return x
    *lead, h, n, c = _shape(x)
    return tf.reshape(x, (*lead, heads, h // heads * n, c))


def _unfold(x, heads, n):
    """(..., h / g, g * n, c) -> (..., h, n, c): the inverse of _fold."""
    if len(x.shape) < 3 or heads is None or x.shape[-3] == heads:
        return x
    *lead, _, _, c = _shape(x)
    return tf.reshape(x, (*lead, heads, n, c))


def _lengths(valid_lens, ndim):
    """valid_lens as (batch, 1, ..., 1 or n, 1) of ndim axes."""
    valid_lens = tf.cast(valid_lens, tf.int64)
    if ndim == 2:
        return tf.reshape(valid_lens, (-1, 1))
    batch, *per_query = _shape(valid_lens)
    return tf.reshape(valid_lens, (batch, *[1] * (ndim - 3), *(per_query or [1]), 1))


def _positions(query_offset, n, ndim):
    """Where each query stands: (n, 1), or (batch, 1, ..., n, 1) of ndim axes."""
    query_offset = tf.cast(query_offset, tf.int64)
    if len(query_offset.shape):
        query_offset = tf.reshape(query_offset, (-1, *[1] * (ndim - 1)))
    return query_offset + tf.range(tf.cast(n, tf.int64))[:, None]


def _allowed(n, keys, ndim, mask, bias, valid_lens, causal, query_offset, window):
    """Which pairs may attend: bool, broadcastable to (..., n, m), or None where all may. ``keys``: their positions."""
    allowed = [] if mask is None else [mask]
    if bias is not None:
        allowed.append(tf.not_equal(bias, -math.inf))
    if valid_lens is not None:
        allowed.append(keys < _lengths(valid_lens, ndim))
    if causal or window is not None:
        ahead = keys - _positions(query_offset, n, ndim)  # how far each key lies after each query
        left, right = window or (None, None)
        right = 0 if causal else right
        if left is not None:
            allowed.append(ahead >= -left)
        if right is not None:
            allowed.append(ahead <= right)
    return tf.convert_to_tensor(reduce(tf.logical_and, allowed)) if allowed else None


def _any_for(flags, shape):
    """Whether any flag holds for each row of an array of ``shape``: (..., h, r) -> (..., rows), heads and batch folded."""
    if len(flags.shape) >= 2 and len(shape) >= 3 and shape[-3] and flags.shape[-2] not in (1, shape[-3]):
        *lead, h, r = _shape(flags)
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
    seen, sees = tf.reduce_any(allowed, axis=-2), tf.reduce_any(allowed, axis=-1)
    return (
        tf.where(_any_for(sees, query.shape), query, 0),
        tf.where(_any_for(seen, key.shape), key, 0),
        tf.where(_any_for(seen, value.shape), value, 0),
    )


def _leaks(*inputs):
    """Whether NaN or inf in rows that meet nobody may reach a gradient: not where all inputs are known to be finite."""
    return any((seen := peek(x)) is None or not np.isfinite(seen).all() for x in {id(x): x for x in inputs}.values())


def _hide_unseen(query, key, value, *, mask, bias, valid_lens, causal, query_offset, window, positions, **_):
    """Zeros for rows (..., n, c) that meet nobody in any head: a weight's gradient, their product with 0, would be NaN."""
    limited = causal or not mask is bias is valid_lens is window is positions is None
    if not limited or not _leaks(query, key, value):
        return _hide_padding(None, query, key, value)
    keys = tf.range(tf.cast(_shape(key)[-2], tf.int64))
    if positions is not None:
        chosen = tf.reduce_any(tf.cast(positions, tf.int64)[..., None] == keys, axis=-2)
        mask = chosen if mask is None else tf.logical_and(mask, chosen)
    allowed = _allowed(_shape(query)[-2], keys, len(query.shape) + 1, mask, bias, valid_lens, causal, query_offset, window)
    hidden = _hide_padding(allowed, *(x[..., None, :, :] for x in (query, key, value)))
    return tuple(x[..., 0, :, :] for x in hidden)


def _few_axes(score):
    """``score`` for inputs of any number of axes: of more than five TensorFlow cannot broadcast, nor of nine take a slice."""

    @wraps(score)
    def flat(query, key, *args, **parameters):
        if len(query.shape) < 5:
            return score(query, key, *args, **parameters)
        lead = _lead(query, key)
        query, key = (tf.reshape(_widen(x, lead, 2), (math.prod(lead), *_shape(x)[-2:])) for x in (query, key))
        scores = score(query, key, *args, **parameters)
        return tf.reshape(scores, (*lead, *_shape(scores)[-2:]))

    return flat


# ---- scores: (query (..., n, d), key (..., m, d)) -> (..., n, m), float32 for half precision


def dot_score(query, key):
    return _product(_wide(query), _wide(key), transpose_b=True)


def scaled_dot_score(query, key):
    return dot_score(query, key) / _root(query)


def _root(query):
    """The square root of d; without features the scores are 0."""
    d = _shape(query)[-1]
    return math.sqrt(d or 1) if isinstance(d, int) else tf.sqrt(tf.cast(tf.maximum(d, 1), _wide(query[..., :0]).dtype))


@_few_axes
def additive_score(query, key, W_q, W_k, w_v, b=None):
    query, key = _product(_wide(query), _wide(W_q)), _product(_wide(key), _wide(W_k))
    hidden = query[..., :, None, :] + key[..., None, :, :]  # (..., n, m, h)
    if b is not None:
        hidden = hidden + _wide(b)
    return _product(tf.tanh(hidden), _wide(w_v)[:, None])[..., 0]


def multiplicative_score(query, key, W):
    return _product(_product(_wide(query), _wide(W)), _wide(key), transpose_b=True)


@_few_axes
def gated_score(query, key, w_g):
    query, key, w_g = _wide(query), _wide(key), _wide(w_g)
    d = _shape(query)[-1]
    gate = _product(query, w_g[:d, None]) + tf.linalg.matrix_transpose(_product(key, w_g[d:, None]))
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


@_few_axes
def _squared_distance(query, key):
    """|q - k|^2 from the differences: |q|^2 + |k|^2 - 2 q.k would cancel."""
    difference = _wide(query)[..., :, None, :] - _wide(key)[..., None, :, :]  # (..., n, m, d)
    return tf.reduce_sum(difference * difference, axis=-1)


# ---- normalisers: (scores (..., n, m), where bool) -> weights


def softmax(scores, where=None):
    return tf.cast(_softmax_lse(scores, where)[0], scores.dtype)


def masked_softmax(scores, valid_lens=None, where=None):
    if valid_lens is not None:
        inside = tf.range(tf.cast(_shape(scores)[-1], tf.int64)) < _lengths(valid_lens, len(scores.shape))
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
    ranks = tf.cast(tf.range(1, _shape(wide)[-1] + 1), wide.dtype)
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
    seen = scores if where is None else tf.where(where, scores, -math.inf)
    best = tf.argmax(tf.where(tf.equal(seen, seen), seen, math.inf), axis=-1)  # tf.argmax would pass over NaN
    chosen = tf.equal(tf.range(tf.cast(_shape(scores)[-1], tf.int64)), best[..., None])
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


def _softmax_of_finite(scores, where):
    """softmax in few operations; a score of one's own may give -inf, for which TensorFlow's has NaN."""
    if where is None:
        return tf.nn.softmax(scores)
    return tf.where(where, tf.nn.softmax(tf.where(where, scores, scores.dtype.min)), 0)


# ---- attention


def attention(
    query,
    key,
    value,
    *,
    score=scaled_dot_score,
    normalize=softmax,
    mask=None,
    bias=None,
    valid_lens=None,
    causal=False,
    query_offset=0,
    window=None,
    positions=None,
    scale=None,
    softcap=None,
    dropout=0.0,
    rng=None,
    return_weights=False,
    return_lse=False,
):
    query, key, value = tf.convert_to_tensor(query), tf.convert_to_tensor(key), tf.convert_to_tensor(value)
    if len(query.shape) > 4:
        options = {"score": score, "normalize": normalize, "causal": causal, "window": window, "scale": scale}
        options |= {"softcap": softcap, "dropout": dropout, "rng": rng}
        options |= {"return_weights": return_weights, "return_lse": return_lse}
        batch = _lead(query, key)[:-1]
        arrays, where = _one_batch(batch, query, key, value, mask, bias, valid_lens, query_offset, positions)
        results = attention(*arrays, **where, **options)
        return tf.nest.map_structure(lambda x: tf.reshape(x, (*batch, *_shape(x)[1:])), results)
    if bands.reaches_all(query.shape[-2], key.shape[-2], causal, query_offset, window):  # as in decoding: no mask to build
        causal, window = False, None
    where = {"mask": mask, "bias": bias, "valid_lens": valid_lens, "query_offset": query_offset}
    reach = {"causal": causal, "window": window}
    how = {"score": score, "normalize": normalize, "scale": scale, "softcap": softcap, "dropout": dropout, "rng": rng}
    back = {"return_weights": return_weights, "return_lse": return_lse}
    if positions is not None:
        query, key, value, where = _select(positions, query, key, value, **where, **reach)
        results = attention(
            query, key, value, **where, **how, **back
        )  # keys of its own: what is hidden, is hidden from one query
        if not isinstance(results, tuple):
            return results[..., 0, :]
        return tuple(x[..., 0] if len(x.shape) < len(query.shape) else x[..., 0, :] for x in results)
    restricted = causal or not mask is valid_lens is window is None
    if tiled.serves(sys.modules[__name__], query, key, value, score, normalize, bias, dropout, return_weights, restricted):
        how = {"score": score, "scale": scale, "softcap": softcap, "return_lse": return_lse}
        return tiled.attention(sys.modules[__name__], query, key, value, **how, **where, **reach)
    whole = return_weights or not _cuttable(mask, bias)
    steps = [] if whole else bands.plan(query.shape[-2], key.shape[-2], causal, query_offset, window)
    if steps:
        parts = []
        for block, (cut, at) in enumerate(bands.cuts(steps, query, key, value, **where)):
            how["rng"] = None if rng is None else (rng, block)  # one seed would drop the same pairs in every block
            parts.append(attention(*cut, **reach, **how, **back, **at))
        if not return_lse:
            return tf.concat(parts, axis=-2)
        return tf.concat([x for x, _ in parts], axis=-2), tf.concat([x for _, x in parts], axis=-1)
    if steps := blocks.plan(score, query, key, value, mask, bias, valid_lens):
        return blocks.attention(sys.modules[__name__], steps, query, key, value, **where, **reach, **how, **back)
    results = _formula(query, key, value, **where, **reach, **how, **back)
    looked = (query, key) if restricted or bias is not None else ()  # nothing is hidden where all may attend
    output = results[0] if isinstance(results, tuple) else results
    if not tf.executing_eagerly() or nonfinite.absent(*looked, output):
        return results
    allowed = _allowed(_shape(query)[-2], tf.range(tf.cast(_shape(key)[-2], tf.int64)), len(query.shape), **where, **reach)
    if nonfinite.absent(*_hide_padding(allowed, query, key, value)[:2], output):  # it lay where nobody looks
        return results
    return _in_blocks(query, key, value, **where, **reach, **how, **back)


def _cuttable(*masks):
    """Whether each can be cut into blocks: its sizes are known."""
    return not any(None in x.shape[-2:] for x in masks if x is not None)


def _in_blocks(query, key, value, **options):
    """The formula where something is not finite, in blocks of queries: its products leave out the pairs that may not attend."""
    careful = partial(_formula, careful=True)
    others = (options[name] for name in ("mask", "bias", "valid_lens"))
    held = 1 if options["score"] in (scaled_dot_score, dot_score) else query.shape[-1] or 1
    steps = blocks.plan(options["score"], query, key, value, *others, held=held)
    if not steps:
        return careful(query, key, value, **options)
    return blocks.attention(sys.modules[__name__], steps, query, key, value, attend=careful, **options)


def _formula(query, key, value, *, score, normalize, mask, bias, valid_lens, causal, query_offset, window, scale, softcap,
             dropout, rng, return_weights, return_lse, careful=False):  # fmt: skip
    """attention by its formula. ``careful``: where something is not finite, it reaches nothing by pairs that may not attend."""
    dtype, n, (heads, kv_heads) = query.dtype, _shape(query)[-2], _heads(query, key)
    limited = causal or window is not None or valid_lens is not None
    keys = tf.range(tf.cast(_shape(key)[-2], tf.int64)) if limited else None
    allowed = _allowed(n, keys, len(query.shape), mask, bias, valid_lens, causal, query_offset, window)
    if not (mask is bias is valid_lens is None and bands.covers(n, key.shape[-2], causal, query_offset, window)):
        query, key, value = _hide_padding(allowed, query, key, value)
    if score not in (scaled_dot_score, dot_score) and None in (*query.shape[:-1], *key.shape[:-1]):
        some = tf.reduce_all(tf.concat([tf.shape(query)[:-1], tf.shape(key)[:-1]], axis=0) > 0)  # without pairs, no gradient
        query, key = tf.where(some, query, 0), tf.where(some, key, 0)
    score = dot_score if score is scaled_dot_score and scale is not None else score
    dots, product = score in (scaled_dot_score, dot_score), _product
    graph = not tf.executing_eagerly()
    if graph or (careful and allowed is not None):
        shape = (*_lead(query, key), n, _shape(key)[-2])
        may = None if allowed is None else lambda: _fold(tf.broadcast_to(allowed, shape), kv_heads)
        pairs = nonfinite.Pairs(may, careful)
        score, product = score if may is None else pairs.score(sys.modules[__name__], score), pairs.product

    # weights = normalize(score(query, key)): (..., h, n, m)
    scores = _scores(query, key, score, scale, softcap, bias)
    if return_lse or (careful and normalize is softmax):
        weights, lse = _softmax_lse(scores, allowed)
    elif normalize is softmax and dots:
        weights, lse = _softmax_of_finite(scores, allowed), None
        weights = nonfinite.spread(weights, allowed) if graph and return_weights else weights
    else:
        weights, lse = normalize(scores, where=allowed), None
        if product is not _product and allowed is not None and not blocks._known(sys.modules[__name__], normalize):
            weights = tf.where(allowed, weights, 0)  # whatever a row of NaN has there, and its gradient

    # output = weights @ value: (..., h, n, v)
    output = product(_fold(_dropout(weights, dropout, rng), kv_heads), _wide(value))
    output = tf.cast(_unfold(output, heads, n), dtype)
    results = [output] + [tf.cast(weights, dtype)] * return_weights + [lse] * return_lse
    return tuple(results) if len(results) > 1 else output


def _scores(query, key, score, scale, softcap, bias):
    """What the normaliser is given: (..., h, n, m), float32 for half precision."""
    n, (heads, kv_heads) = _shape(query)[-2], _heads(query, key)
    query = _fold(query, kv_heads)
    if scale is None:
        scores = score(query, key)
    else:
        scores = scale * (dot_score if score is scaled_dot_score else score)(query, key)
    scores = _unfold(scores, heads, n)
    if softcap is not None:
        scores = softcap * tf.tanh(scores / softcap)
    return scores if bias is None else scores + _wide(bias)


def _dropout(weights, rate, rng):
    if not rate:
        return weights
    seed = rng if rng is None or isinstance(rng, tuple) else (rng, 0)
    draw = tf.random.uniform if seed is None else partial(tf.random.stateless_uniform, seed=seed)
    return tf.where(draw(_shape(weights)) >= rate, weights / (1 - rate), 0)


def _one_batch(batch, query, key, value, mask, bias, valid_lens, query_offset, positions):
    """The arguments with all their batch axes in one: of more than five axes TensorFlow cannot broadcast, nor of nine slice."""

    def one(x):
        if x is None or len(x.shape) < 4:
            return x
        shared = all(size == 1 for size in x.shape[:-3])
        x = x if shared else _widen(x, batch, 3)
        return tf.reshape(x, (1 if shared else math.prod(batch), *_shape(x)[-3:]))

    def each(x):  # numbers by the first axis
        return tf.repeat(x, math.prod(batch[1:]), axis=0) if x is not None and len(getattr(x, "shape", ())) else x

    where = {"mask": one(mask), "bias": one(bias), "positions": one(positions)}
    where |= {"valid_lens": each(valid_lens), "query_offset": each(query_offset)}
    return (one(query), one(key), one(value)), where


def _widen(x, lead, last):
    """x with the axes before its ``last`` broadcast to ``lead``, one after another."""
    own, kept = _shape(x)[:-last], _shape(x)[-last:]
    own = (*[1] * (len(lead) - len(own)), *own)
    for axis, (size, wide) in enumerate(zip(own, lead, strict=True)):
        if not (type(size) is type(wide) is int and size == wide):
            x = tf.reshape(x, (math.prod(lead[:axis]), size, math.prod((*own[axis + 1 :], *kept))))
            x = tf.repeat(x, wide // tf.maximum(size, 1), axis=1)
    return tf.reshape(x, (*lead, *kept))


def _select(positions, query, key, value, mask, bias, valid_lens, causal, query_offset, window):
    """Each query beside the keys it selects: query (..., h, n, 1, d), key (..., h, n, s, d), value, and what may attend."""
    n, m, lead = _shape(query)[-2], _shape(key)[-2], _lead(query, key)
    index = tf.broadcast_to(tf.cast(positions, tf.int64), (*lead, n, _shape(positions)[-1]))
    inside = (index >= 0) & (index < tf.cast(m, tf.int64)) & ~_repeated(index)
    index = tf.clip_by_value(index, 0, tf.cast(tf.maximum(m - 1, 0), tf.int64))
    spare = 0 if key.shape[-2] else 1  # where m may be 0, a key that nobody may attend to: something to gather

    def gather(x):
        x = tf.pad(tf.broadcast_to(x, (*lead, n, m)), [[0, 0]] * (len(lead) + 1) + [[0, spare]])
        return tf.gather(x, index, axis=-1, batch_dims=len(lead) + 1)

    mask = inside if mask is None else inside & gather(mask)
    bias = None if bias is None else gather(bias)
    allowed = _allowed(n, index, len(query.shape), mask, bias, valid_lens, causal, query_offset, window)
    key, value = (tf.pad(_spread(x, lead), [[0, 0]] * len(lead) + [[0, spare], [0, 0]]) for x in (key, value))
    # TensorFlow's gradient of a gather fails where there are neither features nor positions
    key, value = (
        tf.gather(x, index, axis=len(lead), batch_dims=len(lead)) if x.shape[-1] else tf.zeros((*_shape(index), 0), x.dtype)
        for x in (key, value)
    )
    where = {"mask": allowed[..., None, :], "bias": None if bias is None else bias[..., None, :]}
    return tf.broadcast_to(query, (*lead, n, _shape(query)[-1]))[..., None, :], key, value, where


def _lead(query, key):
    """The leading axes (..., h) of the scores, as bands.lead has them, where sizes may be unknown."""
    if None not in (*query.shape[:-2], *key.shape[:-2]):
        return bands.lead(query.shape, key.shape)
    batch = tf.broadcast_dynamic_shape(tf.shape(query)[:-3], tf.shape(key)[:-3])
    return (*tf.unstack(batch), *_shape(query)[:-2][-1:])


def _spread(x, lead):
    """(..., h_kv, m, c) -> (*lead, m, c): each key head repeated for its queries' heads."""
    if lead and type(lead[-1]) is type(x.shape[-3]) is int and x.shape[-3] not in (1, lead[-1]):
        x = tf.repeat(x, lead[-1] // x.shape[-3], axis=-3)
    return tf.broadcast_to(x, (*lead, *_shape(x)[-2:]))


def _repeated(index):
    """True where the same position stands earlier in its row."""
    lead = len(index.shape) - 1
    order = tf.argsort(index, axis=-1, stable=True)
    ordered = tf.gather(index, order, axis=-1, batch_dims=lead)
    again = tf.concat([tf.zeros_like(ordered[..., :1], tf.bool), tf.equal(ordered[..., 1:], ordered[..., :-1])], axis=-1)
    return tf.gather(again, tf.argsort(order, axis=-1), axis=-1, batch_dims=lead)


def attention_grad(query, key, value, grad_output, *, wrt=("query", "key", "value"), **options):
    fine = not tf.executing_eagerly() or nonfinite.absent(tf.convert_to_tensor(grad_output))
    score = options.get("score", scaled_dot_score)
    given = {"query": query, "key": key, "value": value, "bias": options.get("bias"), **getattr(score, "keywords", {})}
    by = {name: tf.identity(given[name]) for name in wrt}  # copies: one tensor may be query, key and value
    with tf.GradientTape(watch_accessed_variables=False) as tape, nullcontext() if fine else nonfinite.expected():
        tape.watch(by)
        given |= by
        query, key, value, bias = (given.pop(name) for name in ("query", "key", "value", "bias"))
        if given:
            score = partial(score.func, *score.args, **given)
        options |= blocks.alone(sys.modules[__name__], score=score, normalize=options.get("normalize", softmax))
        output = attention(query, key, value, **{**options, "bias": bias})
    grads = tape.gradient(output, [by[name] for name in wrt], grad_output, unconnected_gradients="zero")
    return tuple(tf.convert_to_tensor(grad) for grad in grads)  # the gradient of a gather is sparse


def merge_attention(outputs, lses, return_lse=False):
    outputs, lses = tf.stack([*outputs], axis=-2), tf.stack([*lses], axis=-1)  # (..., n, parts, v), (..., n, parts)
    weights, lse = _softmax_lse(lses, tf.not_equal(lses, -math.inf))
    weights = tf.expand_dims(weights, -1)
    parts = tf.where(tf.not_equal(weights, 0), _wide(outputs), 0)
    output = tf.cast(tf.reduce_sum(weights * parts, axis=-2), outputs.dtype)
    return (output, lse) if return_lse else output


def kernel(query, key, value, **options):
    if len(query.shape) > 4:
        names = ("mask", "bias", "valid_lens", "query_offset", "positions")
        (query, key, value), where = _one_batch(_lead(query, key)[:-1], query, key, value, *(options[name] for name in names))
        options |= where
    if options["positions"] is not None:
        return explanation.selected(kernel, _select, query, key, value, **options)
    how = (options[name] for name in ("score", "normalize", "bias", "dropout", "return_weights"))
    restricted = options["causal"] or not options["mask"] is options["valid_lens"] is options["window"] is None
    if tiled.serves(sys.modules[__name__], query, key, value, *how, restricted):
        return "blocks", "softmax of dot products, so many that all at once would fill the memory"
    why = "blocks are for many dot products of known sizes on the CPU, without bias, dropout, weights or XLA"
    others = (options[name] for name in ("mask", "bias", "valid_lens"))
    steps = blocks.plan(options["score"], query, key, value, *others)
    if not _cuttable(options["mask"], options["bias"]):
        options["window"] = None  # by which blocks would be planned
    return explanation.bounded(*explanation.general(why, query, key, **options), steps)


# ---- multi-head attention


def multi_head_attention(query, key, value, params, *, num_heads, num_kv_heads, cache=None, **options):
    dtype, options["bias"] = query.dtype, None if options.get("bias") is None else _wide(options["bias"])
    if cache is None:  # else a later call may look at what is nobody's now
        query, key, value = _hide_unseen(query, key, value, **options)
    query = _split(_project(query, params, "q"), num_heads)  # (..., num_heads, n, d)
    key = _split(_project(key, params, "k"), num_kv_heads)  # (..., num_kv_heads, m, d)
    value = _split(_project(value, params, "v"), num_kv_heads)  # (..., num_kv_heads, m, v)
    if cache is not None:
        cache = cache.extend(key, value, backend="tensorflow")
        key, value = cache.seen()
        options["query_offset"] = cache.length - query.shape[-2]
    results = attention(query, key, value, **options)
    output, *rest = results if isinstance(results, tuple) else (results,)
    output = tf.cast(_project(_join(output), params, "o"), dtype)  # (..., n, o)
    if options.get("return_weights"):
        rest[0] = tf.cast(rest[0], dtype)
    results = (output, *rest) if cache is None else (output, *rest, cache)
    return results if len(results) > 1 else output


def _project(x, params, name):
    """x W + b, in float32 for half precision; without W, x."""
    x, W, b = _wide(x), params.get(f"W_{name}"), params.get(f"b_{name}")
    x = x if W is None else _product(x, _wide(W))
    return x if b is None else x + _wide(b)


def _split(x, heads):
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return _swap(tf.reshape(x, [*_shape(x)[:-1], heads, x.shape[-1] // heads]))


def _swap(x):
    """Axes -2 and -3 exchanged."""
    *lead, a, b, c = range(x.shape.rank)
    return tf.transpose(x, [*lead, b, a, c])


def _join(x):
    """(..., heads, n, c) -> (..., n, heads * c)."""
    x = _swap(x)
    return tf.reshape(x, [*_shape(x)[:-2], x.shape[-2] * x.shape[-1]])


def multi_head_attention_grad(query, key, value, params, grad_output, *, wrt=("query", "key", "value"), **options):
    given = {"query": query, "key": key, "value": value, **params}
    by = {name: tf.identity(given[name]) for name in wrt}  # copies: one tensor may be query, key and value
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(by)
        query, key, value, *rest = (given | by).values()
        output = multi_head_attention(query, key, value, dict(zip(params, rest, strict=True)), **options)
    return tuple(tape.gradient(output, [*by.values()], grad_output, unconnected_gradients="zero"))


def self_attention(x, W_q, W_k, W_v, **options):
    dtype, options["bias"] = x.dtype, None if options.get("bias") is None else _wide(options["bias"])
    lens = options["valid_lens"]
    lens = lens[None] if lens is not None and len(x.shape) == 2 else lens  # of the one head there is
    query, key, value = _hide_unseen(x, x, x, **options | {"valid_lens": lens})
    pairs = ((query, W_q), (key, W_k), (value, W_v))
    results = attention(*(_product(_wide(x), _wide(W)) for x, W in pairs), **options)
    output, *rest = results if isinstance(results, tuple) else (results,)
    if options.get("return_weights"):
        rest[0] = tf.cast(rest[0], dtype)
    output = tf.cast(output, dtype)
    return (output, *rest) if rest else output


def write(buffer, x, at):
    """``buffer`` with x in the places at, at + 1, ... of axis -2; longer, if it does not hold them."""
    return tf.concat([buffer[..., :at, :], x, buffer[..., at + _shape(x)[-2] :, :]], axis=-2)
