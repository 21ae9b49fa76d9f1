"""The JAX tab. The promises are in kvattn/api.py; the five tabs hold the same functions in the same order.

How a function is compiled, and at which precision, its decorators say: kernels/jax/programs.py.
"""

from __future__ import annotations

import math
import sys
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import multihead, partition, patterns, planning, rotation
from kvattn.call import Call, Choice
from kvattn.kernels.jax import blocks, distances, dropout, nonfinite, programs, tiles
from kvattn.kernels.jax import gpu as jax_gpu
from kvattn.pairs import Pairs

HALF = ("float16", "bfloat16")
GENERATORS = (patterns.Wide,)  # what rng may be beside an int and an array: a seed of a layer's part; keys are arrays
EVALUATED = programs.evaluated  # the context of functions of all distances: known numbers stay known under jit
MOST_SHAPES = 4  # of the parts of a call that runs at once: each is a program of its own


# ---- data


def is_array(x):
    return isinstance(x, jax.Array)


def asarray(x, dtype=None, like=None):
    if not is_array(x):  # not placed beside ``like``: JAX moves what was never placed by itself
        x = programs.fitting(np.asarray(x))
        dtype = np.dtype(dtype or x.dtype)
        # copied, as the caller may write to his; by NumPy, since JAX would compile a program for each shape
        x = x.astype(dtype if dtype.isnative else dtype.newbyteorder("="))
        with programs.evaluated(), programs.x64(True):  # now even while tracing, so that checks can look at it
            return jax.device_put(x)
    if dtype is None or x.dtype == np.dtype(dtype):
        return x
    with programs.x64(True):
        return x.astype(dtype)


def to_numpy(x):
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def peek(x):
    if isinstance(x, jax.core.Tracer) or any(device.platform != "cpu" for device in x.devices()):
        return None
    return np.asarray(x)


def signed(x):
    with programs.x64(True):
        return (x if x.dtype.itemsize < 4 else jnp.minimum(x, np.array(2**30, x.dtype))).astype(np.int32)


def describe():
    return jax.__version__, jax.devices()[0].device_kind


def devices():
    return {name: device.device_kind for name, device in programs.devices().items()}


def on(device):
    return jax.default_device(programs.devices()[device])  # asarray places nothing: it follows this


def tracing():
    return False  # sizes are numbers under jit too


def converts(x, y):
    return False


def places(x, first=0, count=None):
    found = jnp.arange(x.shape[-2] if count is None else count)
    return found if type(first) is int and first == 0 else first + found


# ---- shapes and masks


def _wide(x):
    """Half precision in float32; the rest as it is."""
    return x.astype(jnp.float32) if x.dtype.name in HALF else x


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
    batch, *per_query = valid_lens.shape
    return valid_lens.reshape(batch, *[1] * (ndim - 3), *(per_query or [1]), 1)


def _positions(query_offset, n, ndim):
    """Where each query stands: (n, 1), or (batch, 1, ..., n, 1) of ndim axes."""
    if not isinstance(query_offset, int) and query_offset.ndim:
        query_offset = query_offset.reshape(-1, *[1] * (ndim - 1))
    return query_offset + jnp.arange(n)[:, None]


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
    return reduce(jnp.logical_and, allowed) if allowed else None


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
    if 0 in (*query.shape[:-1], *key.shape[:-1]):  # there are no pairs, so what there is meets nobody
        allowed = jnp.zeros((1, 1), bool)
    if allowed is None:
        return query, key, value
    if allowed.ndim < 2:
        allowed = allowed[None] if allowed.ndim else allowed[None, None]
    has_query, has_key = allowed.any(axis=-2), allowed.any(axis=-1)
    return (
        jnp.where(_flags_of_rows(has_key, query.shape), query, 0),
        jnp.where(_flags_of_rows(has_query, key.shape), key, 0),
        jnp.where(_flags_of_rows(has_query, value.shape), value, 0),
    )


def _may_leak(*inputs):
    """Whether NaN or inf in rows that meet nobody may reach a gradient: not where all inputs are known to be finite."""
    return not all(map(programs.finite, {id(x): x for x in inputs}.values()))


@programs.exact
def _hide_unused_rows(query, key, value, call):
    """Zeros for rows (..., n, c) that meet nobody in any head: a weight's gradient, their product with 0, would be NaN."""
    if type(call.mask) is Pairs:
        call = call.mask.whole(query[..., None, :, :], key[..., None, :, :], call, heads=False)
    named = "mask", "bias", "valid_lens", "query_offset", "left", "right", "positions"  # the rest would make other programs
    return programs.one(_hidden, query, key, value, Call(None, None, **{name: getattr(call, name) for name in named}))


def _hidden(query, key, value, call):
    keys = jnp.arange(key.shape[-2])
    if call.positions is not None:
        chosen = (call.positions[..., None] == keys).any(axis=-2)
        call = call._replace(mask=chosen if call.mask is None else call.mask & chosen)
    allowed = _allowed(query.shape[-2], keys, query.ndim + 1, call)
    hidden = _hide_padding(allowed, *(x[..., None, :, :] for x in (query, key, value)))
    return tuple(x[..., 0, :, :] for x in hidden)


# ---- scores: (query (..., n, d), key (..., m, d)) -> (..., n, m), float32 for half precision


@programs.exact
def dot_score(query, key):
    if query.shape[-2] == 1:  # as in decoding: on the CPU one row takes twice as long as one column
        return (_wide(key) @ _wide(query).swapaxes(-1, -2)).swapaxes(-1, -2)
    return _wide(query) @ _wide(key).swapaxes(-1, -2)


@programs.exact
def scaled_dot_score(query, key):
    return dot_score(query, key) / math.sqrt(query.shape[-1] or 1)  # without features the scores are 0


@programs.exact
def additive_score(query, key, W_q, W_k, w_v, b=None):
    query, key = _wide(query) @ _wide(W_q), _wide(key) @ _wide(W_k)
    hidden = query[..., :, None, :] + key[..., None, :, :]  # (..., n, m, h)
    if b is not None:
        hidden = hidden + _wide(b)
    return jnp.tanh(hidden) @ _wide(w_v)


@programs.exact
def multiplicative_score(query, key, W):
    return (_wide(query) @ _wide(W)) @ _wide(key).swapaxes(-1, -2)


@programs.exact
def gated_score(query, key, w_g):
    query, key, w_g = _wide(query), _wide(key), _wide(w_g)
    d = query.shape[-1]
    gate = (query @ w_g[:d])[..., :, None] + (key @ w_g[d:])[..., None, :]
    return _sigmoid(gate) * dot_score(query, key)


@programs.exact
def cosine_score(query, key):
    return dot_score(_unit(_wide(query)), _unit(_wide(key)))


@programs.exact
def distance_score(query, key):
    return -_squared_distance(query, key) / 2


# ---- kernels: similarities >= 0 of u = |q - k| / width


@programs.exact
def gaussian_kernel(query, key, width=1.0):
    return jnp.exp(-_squared_distance(query, key) / (2 * width * width))


@programs.exact
def boxcar_kernel(query, key, width=1.0):
    distance = _squared_distance(query, key)
    return (distance < width * width).astype(distance.dtype)


@programs.exact
def triangular_kernel(query, key, width=1.0):
    distance = _squared_distance(query, key)
    distance = jnp.where(distance == 0, 0, jnp.sqrt(jnp.where(distance == 0, 1, distance)))  # the root's slope at 0 is inf
    return jax.nn.relu(1 - distance / width)  # maximum would halve the gradient at ties


@programs.exact
def epanechnikov_kernel(query, key, width=1.0):
    return jax.nn.relu(1 - _squared_distance(query, key) / (width * width))


@programs.exact
def constant_kernel(query, key, width=1.0):
    return jnp.ones_like(_squared_distance(query, key))


def _sigmoid(x):
    return 0.5 * (1 + jnp.tanh(0.5 * x))


def _unit(x):
    squares = (x * x).sum(axis=-1, keepdims=True)
    return jnp.where(squares == 0, 0, x / jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def _squared_distance(query, key):
    """|q - k|^2 from the differences: |q|^2 + |k|^2 - 2 q.k would cancel."""
    difference = _wide(query)[..., :, None, :] - _wide(key)[..., None, :, :]  # (..., n, m, d)
    return (difference * difference).sum(axis=-1)


# ---- normalisers: (scores (..., n, m), where bool) -> weights


@programs.exact
def softmax(scores, where=None):
    return identity(_softmax_lse(scores, where)[0], where).astype(scores.dtype)  # a row of NaN has 0 where it may not attend


@programs.exact
def masked_softmax(scores, valid_lens=None, where=None):
    if valid_lens is not None:
        inside = jnp.arange(scores.shape[-1]) < _lengths(valid_lens, scores.ndim)
        where = inside if where is None else where & inside
    return softmax(scores, where)


@programs.exact
def sparsemax(scores, where=None):
    wide = _wide(scores)
    if wide.shape[-1] == 0:
        return scores
    shifted = jnp.maximum(wide - _top(wide, where), -2)  # what lies 1 below the best has no weight: -2 stands for it
    shifted = shifted if where is None else jnp.where(where, shifted, -2)
    ordered = -jnp.sort(-jax.lax.stop_gradient(shifted), axis=-1)
    ranks = jnp.arange(1, wide.shape[-1] + 1, dtype=wide.dtype)
    sums = ordered.cumsum(axis=-1)
    count = (1 + ranks * ordered > sums).sum(axis=-1, keepdims=True)
    threshold = (jnp.take_along_axis(sums, count - 1, axis=-1) - 1) / count.astype(wide.dtype)
    support = jax.lax.stop_gradient(shifted) > threshold
    # the threshold again, from the support: its gradient needs no sort
    threshold = (jnp.where(support, shifted, 0).sum(axis=-1, keepdims=True) - 1) / count.astype(wide.dtype)
    weights = jnp.where(support, shifted - threshold, 0)
    return (weights if where is None else jnp.where(where, weights, 0)).astype(scores.dtype)


@programs.exact
def hardmax(scores, where=None):
    if scores.shape[-1] == 0:
        return scores
    best = (scores if where is None else jnp.where(where, scores, -math.inf)).argmax(axis=-1)
    chosen = jnp.arange(scores.shape[-1]) == best[..., None]
    return (chosen if where is None else chosen & where).astype(scores.dtype)


@programs.exact
def proportional(scores, where=None):
    wide = identity(_wide(scores), where)
    total = wide.sum(axis=-1, keepdims=True)
    return identity(wide / jnp.where(total == 0, math.inf, total), where).astype(scores.dtype)


@programs.exact
def average(scores, where=None):
    ones = identity(jnp.ones(scores.shape, _wide(scores).dtype), where)
    return (ones / jnp.maximum(ones.sum(axis=-1, keepdims=True), 1)).astype(scores.dtype)


@programs.exact
def identity(scores, where=None):
    return scores if where is None else jnp.where(where, scores, 0)


def _top(scores, where):
    """The largest score of each row, 0 where nothing may be attended to."""
    scores = jax.lax.stop_gradient(scores if where is None else jnp.where(where, scores, -math.inf))
    top = scores.max(axis=-1, keepdims=True, initial=-math.inf)
    return jnp.where(top == -math.inf, 0, top)


def _softmax_lse(scores, where):
    """(weights, log-sum-exp); a row with nothing to attend to has weights 0 and lse -inf."""
    scores = _wide(scores)
    top = _top(scores, where)
    shifted = jnp.exp((scores if where is None else jnp.where(where, scores, -math.inf)) - top)
    total = shifted.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -math.inf, jnp.log(total) + top)
    return shifted / total, lse[..., 0]


# ---- attention


def attention(query, key, value, *, score=scaled_dot_score, normalize=softmax, mask=None, bias=None, valid_lens=None,
              causal=False, query_offset=0, window=None, positions=None, scale=None, softcap=None, sink=None, dropout=0.0,
              rng=None, return_weights=False, return_lse=False, return_scores=None):  # fmt: skip
    anywhere = mask is None and bias is None and valid_lens is None and window is None and positions is None
    unchanged = scale is None and softcap is None and sink is None and rng is None and return_scores is None and not dropout
    usual = anywhere and unchanged and score is scaled_dot_score and normalize is softmax
    if usual and type(query_offset) is int and query_offset == 0 and programs.at_once(query):  # looking at more would cost more
        flags = {"causal": causal, "return_weights": return_weights, "return_lse": return_lse}
        results = _attend_plainly(query, key, value, **{name: True for name, x in flags.items() if x})
        if not causal or programs.sound(results, query, key, value):
            return results
    call = Call.of(
        query, key, score=score, normalize=normalize, mask=mask, bias=bias, valid_lens=valid_lens, causal=causal,
        query_offset=query_offset, window=window, positions=positions, scale=scale, softcap=softcap, sink=sink,
        dropout=dropout, rng=rng, return_weights=return_weights, return_lse=return_lse, return_scores=return_scores,
    )  # fmt: skip
    return (_of_pairs if type(call.mask) is Pairs else _attend)(query, key, value, call)


def choose(query, key, value, call):
    """The kernel that serves a call. It looks at the call, at shapes and at dtypes, so that a program knows it while traced."""
    if type(call.mask) is Pairs:
        return partition.choice(query, key, value, call, _in_parts, partial(distances.by_distance, _in_tiles))
    tab = sys.modules[__name__]
    if call.return_scores:
        return choose(query, key, value, call._replace(return_scores=None)).with_scores(sys.modules[__name__])
    if call.sink is not None:
        choice = choose(query, key, value, call._replace(sink=None, return_lse=True))
        why = f"{choice.why}; the sink takes its share of each row"
        return choice._replace(why=why, run=partial(_with_sink, choice.run))
    if call.positions is not None:
        choice = choose(*_shapes_selected(query, key, value, call))
        return choice.of_selected_keys(call.positions.shape[-1], _of_selected_keys)
    if nonfinite.pair_by_pair():
        return Choice("the formula, pair by pair", "something is not finite", run=partial(nonfinite.attention, tab))
    why_not_cudnn = jax_gpu.obstacle(tab, query, key, value, call)
    if not why_not_cudnn:
        why = "softmax of scaled dot products in half precision, on a GPU"
        return Choice("cuDNN", why, run=partial(jax_gpu.attention, tab))
    why_not_tiles = tiles.obstacle(tab, query, key, value, call)
    if not why_not_tiles:
        why = "softmax of many dot products, of which no more than the cache holds exist at a time"
        return Choice("tiles", why, run=partial(tiles.attention, tab), compares_segments=True)
    why, n = why_not_tiles if jax_gpu.device() is None else why_not_cudnn, query.shape[-2]
    whole = call.return_weights or programs.serves_other_offsets(call, n, __name__)
    if steps := [] if whole else call.window_blocks(n, key.shape[-2]):
        return Choice("the formula", why).in_window(steps, _in_window_blocks)
    if steps := blocks.plan(call.score, query, key):
        return Choice("the formula", why).in_blocks(steps, partial(blocks.attention, _attend))
    return Choice("the formula", why, run=_formula)


@programs.careful
@programs.compiled(programs.of_results)
def _attend(query, key, value, call):
    choice = choose(query, key, value, call)
    if not choice.compares_segments:  # as it was to be, before several devices were seen to share a part
        call = tiles.of_arrays(query, key, call)
    return choice.run(query, key, value, call, choice.blocks)


@partial(jax.jit, static_argnames=("causal", "return_weights", "return_lse"))
def _attend_plainly(query, key, value, causal=False, return_weights=False, return_lse=False):
    """The commonest calls, whose program JAX finds in half the time, since there is no Call to compare."""
    options = {"score": scaled_dot_score, "normalize": softmax, "return_weights": return_weights, "return_lse": return_lse}
    return _attend(query, key, value, Call.of(query, key, causal=causal, window=None, query_offset=0, **options))


def _formula(query, key, value, call, blocks=()):
    dtype, n, (heads, kv_heads) = query.dtype, query.shape[-2], planning.heads(query.shape, key.shape)
    allowed = _allowed(n, jnp.arange(key.shape[-2]), query.ndim, call)
    query, key, value = _hide_padding(allowed, query, key, value)

    # weights = normalize(score(query, key)): (..., h, n, m)
    scores = _scores(query, key, call)
    if call.return_lse:
        weights, lse = _softmax_lse(scores, allowed)
    else:
        weights, lse = call.normalize(scores, where=allowed), None

    # output = weights @ value: (..., h, n, v)
    output = _fold(_dropout(weights, call), kv_heads) @ _wide(value)
    output = _unfold(output, heads, n).astype(dtype)
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
        scores = call.softcap * jnp.tanh(scores / call.softcap)
    return scores + _wide(call.bias) if call.adds_bias else scores


def _scored(scores, where=None):
    """A normaliser that leaves the scores as they are, and says -inf of the pairs that may not attend."""
    return scores if where is None else jnp.where(where, scores, -math.inf)


def _with_sink(run, query, key, value, call, blocks):
    """What ``run`` gives without the sink, less the sink's share of every row: a key of this score whose value is 0."""
    # wide, so that half precision is rounded once; but for a GPU's kernels, which take it
    arrays = (query, key, value) if jax_gpu.device() else map(_wide, (query, key, value))
    output, *weights, lse = run(*arrays, call._replace(sink=None, return_lse=True), blocks)
    left, lse = _left(lse, call.sink, query.ndim, call.return_lse)
    output = (left * _wide(output)).astype(query.dtype)
    weights = [jnp.where(x == 0, 0, left * _wide(x)).astype(query.dtype) for x in weights]  # 0 too where the sink is NaN
    results = [output, *weights] + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else output


def _left(lse, sink, ndim, with_lse=True):
    """What the sink leaves to the keys of each row's weight, (..., n, 1), and the lse of both; -inf is none, inf makes NaN."""
    sink = _wide(sink[..., 0] if sink.ndim == ndim else sink[..., None])
    sink = sink + jnp.where(sink == math.inf, math.nan, jnp.zeros_like(sink))
    sink = jnp.where(sink == -math.inf, -math.inf, sink)  # which has no gradient, whatever is NaN
    ahead = jnp.where(lse == -math.inf, -math.inf, lse - sink)
    left = jnp.exp(-jax.nn.softplus(-ahead))  # its gradient is exact where a sigmoid's, left (1 - left), is rounded to 0
    lse = jnp.where(ahead > 0, lse + jax.nn.softplus(-ahead), sink + jax.nn.softplus(ahead)) if with_lse else None
    return left[..., None], lse


def _dropout(weights, call):
    """The weights, some of them dropped, by what rng draws, and the others divided by the share that is kept."""
    rate, rng = call.dropout, call.rng
    if not rate:
        return weights
    if patterns.drawn(rng):
        kept, rate = dropout.kept(weights, call), patterns.exact(rate)
    else:
        if rng is None:
            cure = "pass rng=jax.random.key(0), say, or an int"
            raise ValueError(f"dropout needs rng, a key: JAX has no hidden state to draw from; {cure}")
        kept = jax.random.uniform(rng, weights.shape, jnp.float32) >= rate  # float32: the same draws for every dtype
    return jnp.where(kept, weights / (1 - rate), 0)


def _in_window_blocks(query, key, value, call, blocks):
    """One block of queries after another, each beside the keys in its window."""
    cuts = _of_own_rng(call, call.cut(blocks, query, key, value), len(blocks))
    return call.joined([_attend(*cut) for cut in cuts], jnp.concatenate)


@programs.exact
def _of_pairs(query, key, value, call):
    """A call whose functions of positions are run before its program is made, which would freeze what they read."""
    plain, parts = partition.resolved(query, key, value, call, partial(distances.by_distance, _in_tiles))
    return _in_parts(query, key, value, plain, parts) if parts else _attend(query, key, value, plain)


def _in_tiles(query, key, value, call):
    return not tiles.obstacle(sys.modules[__name__], query, key, value, call)


def _in_parts(query, key, value, call, parts):
    """One part of the pairs after another, each a call of its own."""
    cuts = _of_own_rng(call, partition.cut(parts, query, key, value, call, jnp.concatenate), len(parts))
    return partition.joined(call, parts, [_attend(*cut) for cut in cuts], jnp.concatenate)


def _of_own_rng(call, cuts, count):
    """The calls of blocks, each with a key of its own: one would drop the same in all."""
    if (rngs := dropout.of_blocks(call.rng, count)) is None:
        return cuts
    return ((*arrays, part._replace(rng=rng)) for (*arrays, part), rng in zip(cuts, rngs, strict=True))


def _of_selected_keys(query, key, value, call, blocks):
    """Each query beside the keys that it selects, as a batch entry of its own."""
    return call.without_query_axis(_attend(*_select(query, key, value, call)))


def _shapes_selected(query, key, value, call):
    """The shapes and dtypes of what _select returns, and what `choose` asks of its call."""
    lead, selected = (*planning.lead(query.shape, key.shape), query.shape[-2]), call.positions.shape[-1]
    sizes = (1, query.shape[-1]), (selected, key.shape[-1]), (selected, value.shape[-1])
    arrays = (jax.ShapeDtypeStruct((*lead, *size), query.dtype) for size in sizes)
    return *arrays, call.of_selected_keys(mask=call.positions, bias=None)


def _select(query, key, value, call):
    """Each query beside the keys it selects: query (..., h, n, 1, d), key (..., h, n, s, d), value, and the call of these."""
    n, m, lead = query.shape[-2], key.shape[-2], planning.lead(query.shape, key.shape)
    index = jnp.broadcast_to(call.positions, (*lead, *call.positions.shape[-2:]))
    inside = (index >= 0) & (index < m) & ~_repeated(index)
    if m == 0:  # one key that nobody may attend to, so that there is something to gather
        call = call._replace(mask=None, bias=None)
        key, value = (jnp.zeros((*x.shape[:-2], 1, x.shape[-1]), x.dtype) for x in (key, value))
    index = jnp.clip(index, 0, max(m - 1, 0))

    def gather(x):
        return jnp.take_along_axis(jnp.broadcast_to(x, (*lead, n, m)), index, axis=-1)

    mask = inside if call.mask is None else inside & gather(call.mask)
    bias = None if call.bias is None else gather(call.bias)
    allowed = _allowed(n, index, query.ndim, call._replace(mask=mask, bias=bias))
    key, value = (jnp.take_along_axis(_spread(x, lead)[..., None, :, :], index[..., None], axis=-2) for x in (key, value))
    rng = dropout.of_selected(call, index)
    call = call.of_selected_keys(allowed[..., None, :], None if bias is None else bias[..., None, :], rng)
    return jnp.broadcast_to(query, (*lead, n, query.shape[-1]))[..., None, :], key, value, call


def _spread(x, lead):
    """(..., h_kv, m, c) -> (*lead, m, c): each key head repeated for its queries' heads."""
    if lead and x.shape[-3] != lead[-1]:
        x = jnp.repeat(x, lead[-1] // x.shape[-3], axis=-3)
    return jnp.broadcast_to(x, (*lead, *x.shape[-2:]))


def _repeated(index):
    """True where the same position stands earlier in its row."""
    size = index.shape[-1]
    order = jnp.argsort(index, axis=-1, stable=True)
    ordered = jnp.take_along_axis(index, order, axis=-1)
    repeated = jnp.concatenate([jnp.zeros_like(ordered[..., :1], bool), ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    return jnp.take_along_axis(repeated[..., :size], jnp.argsort(order, axis=-1), axis=-1)


def attention_grad(query, key, value, grad_output, *, wrt=("query", "key", "value"), grad_scores=None, **options):
    call, loss = Call.of(query, key, **options), grad_output if grad_scores is None else (grad_output, grad_scores)
    return (_grad_of_pairs if type(call.mask) is Pairs else _attend_grad)(query, key, value, loss, call, wrt=wrt)


@programs.exact
def _grad_of_pairs(query, key, value, grad_output, call, *, wrt):
    call, parts = partition.resolved(query, key, value, call, partial(distances.by_distance, _in_tiles))
    if not parts:
        return _attend_grad(query, key, value, grad_output, call, wrt=wrt)
    return _by_vjp(partial(_in_parts, parts=parts), query, key, value, grad_output, call, wrt)


@programs.careful
@programs.compiled(programs.of_gradients)
def _attend_grad(query, key, value, grad_output, call, *, wrt):
    return _by_vjp(_attend, query, key, value, grad_output, call, wrt)


def _by_vjp(attend, query, key, value, grad_output, call, wrt):
    given, score = {"query": query, "key": key, "value": value, "bias": call.bias, "sink": call.sink}, call.score
    sources = {**getattr(score, "keywords", {}), **given}

    def output(*arrays):
        named = dict(zip(wrt, arrays, strict=True))
        parameters = {name: named.pop(name) for name in wrt if name not in given}
        rebound = partial(score.func, *score.args, **{**score.keywords, **parameters}) if parameters else score
        query, key, value, bias, sink = {**given, **named}.values()
        return attend(query, key, value, call._replace(score=rebound, bias=bias, sink=sink))

    return jax.vjp(output, *(sources[name] for name in wrt))[1](grad_output)


@programs.exact
def merge_attention(outputs, lses, return_lse=False):
    outputs, lses = jnp.stack([*outputs], axis=-2), jnp.stack([*lses], axis=-1)  # (..., n, parts, v), (..., n, parts)
    weights, lse = _softmax_lse(lses, lses != -math.inf)
    weights = weights[..., None]
    output = (weights * jnp.where(weights == 0, 0, _wide(outputs))).sum(axis=-2).astype(outputs.dtype)
    return (output, lse) if return_lse else output


# ---- positions


@programs.exact
def rotary(x, positions, frequencies, *, factor=1.0, interleaved=False):
    cos, sin = _turns(positions, frequencies, factor, interleaved, x)  # (..., n, width)
    return _turned(x, cos, sin, interleaved)


@partial(jax.jit, static_argnums=3)
def _turned(x, cos, sin, interleaved):
    width, wide = cos.shape[-1], _wide(x)
    pairs, rest = wide[..., :width], wide[..., width:]
    turned = pairs * cos + _swapped(pairs, interleaved) * sin  # (a, b) -> (a cos - b sin, b cos + a sin)
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)


_tables = {}
CONSTANT = 2**20  # numbers of a table that becomes part of a program; larger ones it makes as it runs


def _turns(positions, frequencies, factor, interleaved, x):
    """Each row's cosines and sines, of its position times the frequencies, as they lie beside x; the first sine of a pair
    negative. In float64, since a large angle leaves float32 no digits."""
    n, dtype = x.shape[-2], np.dtype("float64" if x.dtype == np.float64 else "float32")
    known = positions if isinstance(positions, int) else peek(positions)
    if known is None or type(n) is not int or (isinstance(x, jax.core.Tracer) and 2 * n * len(frequencies) > CONSTANT):
        with programs.x64(True):
            return _table(jnp, jnp.asarray(positions), n, frequencies, factor, interleaved, dtype)

    def make():
        return _table(np, np.asarray(known), n, frequencies, factor, interleaved, dtype)

    if not isinstance(positions, int):
        return make()
    return rotation.kept(_tables, (frequencies, factor, interleaved, positions, n, dtype), n, make)


def _table(xp, positions, n, frequencies, factor, interleaved, dtype):
    """What _turns gives, by NumPy where positions are known, else by JAX."""
    places = positions if positions.ndim else positions + xp.arange(n)
    frequencies, factor = np.array(frequencies), np.array(factor, "float64")
    if xp is jnp:  # by their bits, since JAX 0.7 makes float32 of a program's constants
        bits = (x[..., None].view(np.uint32) for x in (frequencies, factor))
        frequencies, factor = (jax.lax.bitcast_convert_type(x, np.float64) for x in bits)
    angles = places.astype(np.float64)[..., None] * frequencies
    cos, sin = ((factor * x).astype(dtype) for x in (xp.cos(angles), xp.sin(angles)))
    if xp is jnp:  # as products, since XLA would make them anew for each batch and head
        cos, sin = (x @ np.eye(len(frequencies), dtype=dtype) for x in (cos, sin))
    axis, shape = -1 if interleaved else -2, (*angles.shape[:-1], 2 * len(frequencies))
    return xp.stack([cos, cos], axis).reshape(shape), xp.stack([-sin, sin], axis).reshape(shape)


def _swapped(x, interleaved):
    """Each pair (a, b) as (b, a)."""
    half = x.shape[-1] // 2
    if interleaved:
        return x.reshape(*x.shape[:-1], half, 2)[..., ::-1].reshape(x.shape)
    return jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)


# ---- multi-head attention


@programs.exact
def multi_head_attention(query, key, value, params, *, num_heads, num_kv_heads, cache=None, **options):
    tab, counts = sys.modules[__name__], (num_heads, num_kv_heads)
    return multihead.multi_head_attention(tab, query, key, value, params, counts, cache, options)


def _project(x, params, name):
    """x W + b, in float32 for half precision, but bfloat16 where cuDNN takes it; without W, x."""
    return _affine(x, params.get(f"W_{name}"), params.get(f"b_{name}"))


@jax.jit
def _affine(x, W=None, b=None):
    """One program, where eager JAX would pay for each operation, and compile it."""
    x, W, b = (y if y is None or jax_gpu.projects(y.dtype) else _wide(y) for y in (x, W, b))
    x = x if W is None else programs.product(x, W)
    return x if b is None else x + b


def _normed(x, weight, epsilon):
    """RMSNorm: x (..., d) over the root of its mean square, times the weight (d,)."""
    wide = _wide(x)
    wide = wide * jax.lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + epsilon) * _wide(weight)
    return wide.astype(x.dtype)


@partial(jax.jit, static_argnames="heads")
def _split(x, heads):
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


@jax.jit
def _join(x):
    """(..., heads, n, c) -> (..., n, heads * c)."""
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


@programs.exact
def multi_head_attention_grad(query, key, value, params, grad_output, *, wrt=("query", "key", "value"), **options):
    given = {"query": query, "key": key, "value": value, **params}

    def output(*arrays):
        query, key, value, *rest = (given | dict(zip(wrt, arrays, strict=True))).values()
        return multi_head_attention(query, key, value, dict(zip(params, rest, strict=True)), **options)

    return jax.vjp(output, *(given[name] for name in wrt))[1](grad_output)


@programs.exact
def self_attention(x, W_q, W_k, W_v, **options):
    return multihead.self_attention(sys.modules[__name__], x, {"W_q": W_q, "W_k": W_k, "W_v": W_v}, options)


@programs.exact
def write(buffer, x, at):
    """``buffer`` with x in the places at, at + 1, ... of axis -2; longer, if it does not hold them."""
    if isinstance(at, int) and at + x.shape[-2] > buffer.shape[-2]:
        return jnp.concatenate([buffer[..., :at, :], x], axis=-2)
    return jax.lax.dynamic_update_slice_in_dim(buffer, x, at, axis=buffer.ndim - 2)
