"""Gradients for the NumPy tab, derived by hand: each score and normaliser has its vector-Jacobian product here.

Writing P for the weights, S for the scores, O = P V and G for the gradient of a loss by O:
dV = P^T G, dP = G V^T, dS = normaliser's product of dP (softmax: P (dP - sum_j P dP)), and dQ, dK from dS by the score.

Source, of sparsemax's: Martins and Astudillo 2016, "From softmax to sparsemax".
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from kvattn import multihead, partition, planning
from kvattn.call import Call
from kvattn.kernels.numpy import few, memory, threads, tiled, tiled_grad, tiles
from kvattn.pairs import Pairs


def _t(x):
    return x.swapaxes(-1, -2)


# ---- normalisers: (tab, weights, scores, allowed, grad_weights) -> grad_scores


def softmax(tab, weights, scores, allowed, grad):
    return weights * (grad - (weights * grad).sum(axis=-1, keepdims=True))


def sparsemax(tab, weights, scores, allowed, grad):
    support = weights > 0
    count = np.maximum(support.sum(axis=-1, keepdims=True), 1)
    mean = np.where(support, grad, 0).sum(axis=-1, keepdims=True) / count
    return np.where(support, grad - mean, 0).astype(weights.dtype)


def hardmax(tab, weights, scores, allowed, grad):
    return np.zeros_like(grad)


average = hardmax


def proportional(tab, weights, scores, allowed, grad):
    total = tab.identity(scores, allowed).sum(axis=-1, keepdims=True)
    grad = (grad - (weights * grad).sum(axis=-1, keepdims=True)) / np.where(total == 0, 1, total)
    return np.where(total == 0, 0, tab.identity(grad, allowed)).astype(weights.dtype)


def identity(tab, weights, scores, allowed, grad):
    return tab.identity(grad, allowed)


# ---- scores: (tab, query, key, grad_scores, **parameters) -> {"query": ..., "key": ..., parameter: ...}


def dot_score(tab, query, key, grad):
    return {"query": grad @ key, "key": _t(grad) @ query}


def scaled_dot_score(tab, query, key, grad):
    return dot_score(tab, query, key, grad / math.sqrt(query.shape[-1] or 1))


def additive_score(tab, query, key, grad, W_q, W_k, w_v, b=None):
    W_q, W_k, w_v = tab._wide(W_q), tab._wide(W_k), tab._wide(w_v)
    hidden = (query @ W_q)[..., :, None, :] + (key @ W_k)[..., None, :, :]
    hidden = np.tanh(hidden if b is None else hidden + tab._wide(b))
    before = grad[..., None] * w_v * (1 - hidden * hidden)  # (..., n, m, h)
    by_query, by_key = before.sum(axis=-2), before.sum(axis=-3)
    grads = {
        "query": by_query @ W_q.T,
        "key": by_key @ W_k.T,
        "W_q": _outer(query, by_query),
        "W_k": _outer(key, by_key),
        "w_v": _outer(hidden, grad[..., None])[:, 0],
    }
    return grads if b is None else {**grads, "b": by_query.reshape(-1, by_query.shape[-1]).sum(axis=0)}


def multiplicative_score(tab, query, key, grad, W):
    W = tab._wide(W)
    projected = grad @ key
    return {"query": projected @ W.T, "key": _t(grad) @ (query @ W), "W": _outer(query, projected)}


def gated_score(tab, query, key, grad, w_g):
    w_g, d = tab._wide(w_g), query.shape[-1]
    gate = tab._sigmoid((query @ w_g[:d])[..., :, None] + (key @ w_g[d:])[..., None, :])
    grads = dot_score(tab, query, key, grad * gate)
    by_gate = grad * tab.dot_score(query, key) * gate * (1 - gate)
    rows, columns = by_gate.sum(axis=-1)[..., None], by_gate.sum(axis=-2)[..., None]
    both = [_outer(query, rows)[:, 0], _outer(key, columns)[:, 0]]
    return {
        "query": grads["query"] + rows * w_g[:d],
        "key": grads["key"] + columns * w_g[d:],
        "w_g": np.concatenate(both),
    }


def cosine_score(tab, query, key, grad):
    grads = dot_score(tab, tab._unit(query), tab._unit(key), grad)
    return {name: _unit_grad(tab, x, grads[name]) for name, x in (("query", query), ("key", key))}


def _unit_grad(tab, x, grad):
    squares = (x * x).sum(axis=-1, keepdims=True)
    unit = tab._unit(x)
    across = grad - unit * (unit * grad).sum(axis=-1, keepdims=True)
    return np.where(squares == 0, 0, across / np.sqrt(np.where(squares == 0, 1, squares))).astype(x.dtype)


def distance_score(tab, query, key, grad):
    # -(q - k) and (q - k), summed over the pairs; from differences, as the score
    difference = query[..., :, None, :] - key[..., None, :, :]
    weighted = grad[..., None] * difference
    return {"query": -weighted.sum(axis=-2), "key": weighted.sum(axis=-3)}


# kernels: each is a function of |q - k|^2, so its gradient is the distance score's, weighted by -2 times the derivative


def gaussian_kernel(tab, query, key, grad, width=1.0):
    return distance_score(tab, query, key, grad * tab.gaussian_kernel(query, key, width) / (width * width))


def boxcar_kernel(tab, query, key, grad, width=1.0):
    return {"query": np.zeros_like(query), "key": np.zeros_like(key)}


constant_kernel = boxcar_kernel


def triangular_kernel(tab, query, key, grad, width=1.0):
    distance = np.sqrt(tab._squared_distance(query, key))
    inside = (distance > 0) & (distance < width)
    slope = np.where(inside, 1 / (width * np.where(inside, distance, 1)), 0).astype(grad.dtype)
    return distance_score(tab, query, key, grad * slope)


def epanechnikov_kernel(tab, query, key, grad, width=1.0):
    inside = tab._squared_distance(query, key) < width * width
    return distance_score(tab, query, key, np.where(inside, grad * (2 / (width * width)), 0).astype(grad.dtype))


# ---- attention


def _product_in_blocks(product, parts, query, key, grad_scores, args, keywords):
    """A score's vector-Jacobian product in blocks of keys: gradients by key lie side by side, the others add up."""
    if len(parts) == 1:
        return product(query, key, grad_scores, *args, **keywords)
    with threads.one_blas_thread():
        found = [product(query, key[..., i:j, :], grad_scores[..., i:j], *args, **keywords) for i, j in parts]
    grads = {name: sum(grads[name] for grads in found) for name in found[0] if name != "key"}
    return grads | {"key": np.concatenate([grads["key"] for grads in found], axis=-2)}


def _outer(x, grad):
    """sum over every row of x^T grad: (..., r, a), (..., r, b) -> (a, b)."""
    x = np.broadcast_to(x, (*np.broadcast_shapes(x.shape[:-1], grad.shape[:-1]), x.shape[-1]))
    grad = np.broadcast_to(grad, (*x.shape[:-1], grad.shape[-1]))
    rows = math.prod(x.shape[:-1])  # NumPy infers no size where there are no features
    return x.reshape(rows, x.shape[-1]).T @ grad.reshape(rows, grad.shape[-1])


def sum_to(x, shape):
    """``x`` summed over the axes along which an array of ``shape`` was broadcast to it."""
    if x.shape == tuple(shape):
        return x
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return x.sum(axis=stretched, keepdims=True)


def _product(tab, function, products, what):
    """The vector-Jacobian product of a score or normaliser, with the parameters that a partial holds."""
    inner = function.func if isinstance(function, partial) else function
    if getattr(tab, getattr(inner, "__name__", ""), None) is inner:
        name = "softmax" if inner is tab.masked_softmax else inner.__name__
        own = partial(products[name], tab)
    elif callable(own := getattr(inner, "grad", None)):
        own = _users_own(own, what)
    else:
        expected = "query, key, grad_scores" if what == "score" else "weights, scores, where, grad_weights"
        raise NotImplementedError(
            f"NumPy cannot differentiate {what}={getattr(inner, '__name__', inner)}: it has no autodiff. "
            f"Give the function an attribute grad({expected}), or use another backend"
        )
    return own


def _users_own(grad, what):
    if what == "normalize":
        return grad
    return lambda query, key, grad_scores, *args, **kw: dict(
        zip(("query", "key"), grad(query, key, grad_scores, *args, **kw), strict=True)
    )


def attention_grad(tab, query, key, value, grad_output, wrt, call, known=tiled_grad.NOTHING):
    """The gradients named by ``wrt`` of sum(grad_output * attention(...)), as a tuple, each in its argument's dtype.

    With a gradient by the lse or by the scores among what is ``known`` they are those of sum(grad_lse * lse) or of
    sum(grad_scores * scores) as well.
    """
    if known.grad_lse is known.grad_scores is None and few.serves(tab, query.shape, key.shape, call):
        found = few.attention_grad(tab, query, key, value, grad_output, call)
        if found is not None:
            if call.bias is not None:
                found["bias"] = sum_to(found["bias"], call.bias.shape)
            return tuple([found[name] for name in wrt])
    asked, call = call, call._replace(return_scores=None) if call.return_scores else call
    sources = {"query": query, "key": key, "value": value, "bias": call.bias, "sink": call.sink, **_parameters(call.score)}
    selected = () if call.positions is None else call.positions.shape
    if 0 in (*query.shape[:-1], *key.shape[:-1], *selected):  # no pair, so no gradient
        return tuple(np.zeros(sources[name].shape, sources[name].dtype) for name in wrt)
    parts, of_part = (), _of_part
    if type(call.mask) is Pairs:
        call, parts = partition.resolved(query, key, value, call)
    choice = None if parts or selected else tab._choose(query.shape, key.shape, call, wrt)
    if choice and choice.blocks:
        (call, parts), of_part = partition.of_blocks(tab, choice.blocks, call), _of_block
    if parts:
        zeros = lambda x: np.zeros(x.shape, tab._wide(x).dtype)  # noqa: E731
        of_part = partial(of_part, tab)
        found = partition.gradients(parts, sources, grad_output, wrt, call, zeros, np.concatenate, of_part, known.grad_lse)
    elif selected:
        call = call._replace(return_scores=asked.return_scores)
        found = _of_selected_keys(tab, query, key, value, grad_output, wrt, call, known.grad_scores)
    elif choice.run is tiled.attention:
        found = _in_tiles(tab, query, key, value, grad_output, wrt, call, known)
        found = {name: sum_to(found[name], sources[name].shape) for name in wrt}
    else:
        found = _formula(tab, query, key, value, grad_output, call, known.grad_lse)
    if known.grad_scores is not None and not selected:  # where each query lies beside its own keys, they are among these
        by_scores = _through_scores(tab, query, key, value, known.grad_scores, asked)
        found = {name: found[name] + by_scores.get(name, 0) for name in wrt}
    return tuple(found[name].astype(sources[name].dtype, copy=False) for name in wrt)


def _through_scores(tab, query, key, value, grad_scores, call):
    """The gradients of sum(grad_scores * scores), by name: of weights that are the scores, and of values without features."""
    call = call.mask.whole(query, key, call) if type(call.mask) is Pairs else call
    nothing = np.zeros((*grad_scores.shape[:-1], 0), grad_scores.dtype)
    found = _formula(tab, query, key, value[..., :0], nothing, call.of_scores(tab.identity), None, grad_scores)
    del found["value"]
    return found


def _in_tiles(tab, query, key, value, grad_output, wrt, call, known):
    """The gradients by query, key and value, and by the sink if asked for, before those of what was broadcast are summed.

    With a sink the formulas of tiles stay as they are, if the output and the lse are those with it.
    """
    output, lse = known.output, known.lse
    if call.sink is not None and output is None:
        wide = (tab._wide(x) for x in (query, key, value))
        output, lse = tab._attend(*wide, call._replace(return_lse=True))
        known = known._replace(output=output, lse=lse)
    found = tiled_grad.attention_grad(query, key, value, grad_output, call, known)
    found = dict(zip(("query", "key", "value"), found, strict=True))
    if "sink" in wrt:
        found["sink"] = _by_sink(tab, call.sink, lse, (tab._wide(grad_output) * output).sum(axis=-1), query.ndim)
    return found


def _of_part(tab, query, key, value, grad_output, wrt, call, grad_lse=None):
    return attention_grad(tab, query, key, value, grad_output, wrt, call, tiled_grad.Known(grad_lse=grad_lse))


def _of_block(tab, query, key, value, grad_output, wrt, call, grad_lse=None):
    found = _formula(tab, query, key, value, grad_output, call, grad_lse)
    return [found[name] for name in wrt]


def _of_selected_keys(tab, query, key, value, grad_output, wrt, call, grad_scores):
    """The gradients of the selected pairs, added up at the keys they came from."""
    (n, m), lead = (query.shape[-2], key.shape[-2]), planning.lead(query.shape, key.shape)
    index = np.broadcast_to(call.positions, (*lead, n, call.positions.shape[-1]))
    index = np.clip(index, 0, m - 1).reshape(-1, n, index.shape[-1])
    *selected, of_these = tab._select(query, key, value, call)
    if call.sink is not None:  # each query has become an entry of its own
        of_these = of_these._replace(sink=call.sink[..., 0] if call.sink.ndim == query.ndim else call.sink[..., None])
    known = tiled_grad.Known(grad_scores=None if grad_scores is None else grad_scores[..., None, :])
    grads = attention_grad(tab, *selected, grad_output[..., None, :], wrt, of_these, known)

    def scatter(grad, shape):  # (*lead, n, s, c) -> (*lead, m, c) -> shape, whose heads may be shared by a group
        total = np.zeros((len(index), m, grad.shape[-1]), grad.dtype)
        np.add.at(total, (np.arange(len(index))[:, None, None], index), grad.reshape(*index.shape, grad.shape[-1]))
        total = total.reshape(*lead, m, grad.shape[-1])
        if lead and shape[-3] != lead[-1]:
            total = total.reshape(*lead[:-1], shape[-3], lead[-1] // shape[-3], m, total.shape[-1]).sum(axis=-3)
        return sum_to(total, shape)

    def place(grad):  # (*lead, n, 1, s) -> (*lead, n, m)
        total = np.zeros((len(index), n, m), grad.dtype)
        np.add.at(total, (np.arange(len(index))[:, None, None], np.arange(n)[:, None], index), grad.reshape(index.shape))
        return sum_to(total.reshape(*lead, n, m), call.bias.shape)

    found, shapes = dict(zip(wrt, grads, strict=True)), {"key": key.shape, "value": value.shape}
    for name in wrt:
        if name == "query":
            found[name] = sum_to(found[name][..., 0, :], query.shape)
        elif name in shapes:
            found[name] = scatter(found[name], shapes[name])
        elif name == "bias":
            found[name] = place(found[name])
        elif name == "sink":
            found[name] = found[name].reshape(call.sink.shape)
    return found


def _parameters(score):
    return dict(score.keywords) if isinstance(score, partial) else {}


def _formula(tab, query, key, value, grad_output, call, grad_lse, by_scores=None):
    """Every gradient, by name, in float32 for half precision, from all scores at one time; ``by_scores``: that by these, which
    is added to what comes through the weights."""
    score, scale, softcap, bias = call.score, call.scale, call.softcap, call.bias
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    n, (heads, kv_heads) = query.shape[-2], planning.heads(query.shape, key.shape)
    allowed = tab._allowed(n, np.arange(key.shape[-2]), query.ndim, call) if call.restricted else None
    query, key, value, grad_output = (tab._wide(x) for x in (query, key, value, grad_output))
    if allowed is not None and (call.beyond_softmax(tab) or not all(tiles.small(x) for x in (query, key, value))):
        query, key, value = tab._hide_padding(allowed, query, key, value)  # else 0 times them is 0, and no score overflows

    # forward again
    scores = tab._scores(query, key, call)
    if call.sink is None:
        weights = tab._wide(call.normalize(scores, where=allowed))
    else:
        weights, lse = tab._softmax_lse(scores, allowed)
        left, lse = tab._left(lse, call.sink, query.ndim)
        weights = np.where(weights == 0, 0, left * weights).astype(weights.dtype)
    kept = tab._dropout(np.ones_like(weights), call) if call.dropout else None

    # and back
    grad_output, folded = tab._fold(grad_output, kv_heads), tab._fold(query, kv_heads)
    normal = _product(tab, call.normalize, NORMALISERS, "normalize")
    scored = tab.dot_score if scale is not None and score is tab.scaled_dot_score else score
    rest, args = _parameters(score), score.args if isinstance(score, partial) else ()
    by_score = _product(tab, scored, SCORES, "score")
    by_score = partial(_product_in_blocks, by_score, memory.key_blocks(score, folded.shape, key.shape))

    def gradients(pairs):
        """By name; given the pairs that may attend, bool (..., n, m), no NaN of another pair reaches them."""
        kept_weights = _t(tab._fold(weights if kept is None else weights * kept, kv_heads))
        grad_weights = tab.identity(tab._unfold(grad_output @ _t(value), heads, n), pairs)
        grad_weights = grad_weights if kept is None else grad_weights * kept
        grad_scores = normal(weights, scores, allowed, grad_weights)
        if grad_lse is not None:
            grad_scores = grad_scores + weights * grad_lse[..., None]
        if by_scores is not None:
            grad_scores = grad_scores + by_scores
        grad_scores = tab.identity(grad_scores, allowed)
        grads = {}
        if call.sink is not None:
            grads["sink"] = _by_sink(tab, call.sink, lse, (weights * grad_weights).sum(axis=-1), query.ndim)
        if call.adds_bias:
            grads["bias"] = sum_to(np.broadcast_to(grad_scores, np.broadcast_shapes(grad_scores.shape, bias.shape)), bias.shape)
        if softcap is not None:
            capped = np.tanh(tab._scores(query, key, call._replace(softcap=None, bias=None)) / softcap)
            grad_scores = tab.identity(grad_scores * (1 - capped * capped), pairs)
        if scale is not None:
            grad_scores = grad_scores * scale
        grad_scores = tab._fold(grad_scores, kv_heads)
        if pairs is None:
            grads |= by_score(folded, key, grad_scores, args, rest) | {"value": kept_weights @ grad_output}
        else:
            pairs = tab._fold(pairs, kv_heads)
            linear = getattr(scored, "func", scored) in (tab.dot_score, tab.scaled_dot_score, tab.multiplicative_score)
            grads |= _of_finite(by_score, folded, key, grad_scores, pairs, args, rest, linear)
            grads["value"] = tiles.product_of_allowed(kept_weights, grad_output, _t(pairs))
        grads["query"] = tab._unfold(grads["query"], heads, n)
        return grads

    grads = gradients(None)
    if allowed is not None and not all(tiles.small(x) or np.isfinite(x).all() for x in grads.values()):
        grads = gradients(np.broadcast_to(allowed, weights.shape))
    return grads | {name: sum_to(grads[name], shape) for name, shape in shapes.items()}


def _by_sink(tab, sink, lse, delta, ndim):
    """The gradient by the sink, whose weight is exp(sink - lse): ``delta`` is G O, of the output with it, for each row."""
    rows = tab._wide(sink[..., 0] if sink.ndim == ndim else sink[..., None])
    weight = np.exp(rows - np.where(lse == -math.inf, 0, lse)).astype(lse.dtype)
    grad = np.where(rows == -math.inf, 0, -weight * delta).astype(lse.dtype)  # a sink of -inf is none, whatever is NaN
    if sink.ndim < ndim:
        grad = grad.sum(axis=-1)
    return sum_to(grad[..., None] if sink.ndim == ndim else grad, sink.shape)


def _of_finite(product, query, key, grad_scores, allowed, args, keywords, linear):
    """A score's product with zeros for queries and keys that are not finite, and NaN for whom these reach.

    ``linear``: of a score that is linear in each, whose gradient by a query is of the keys alone.
    """
    bad_query, bad_key = (~np.isfinite(x).all(axis=-1, keepdims=True) for x in (query, key))
    by_query, by_key = allowed & bad_query, allowed & _t(bad_key)
    bad = by_query | by_key
    query, key = (np.where(hidden, 0, x).astype(x.dtype) for hidden, x in ((bad_query, query), (bad_key, key)))
    grads = product(query, key, grad_scores, args, keywords)
    reached = {"query": (by_key if linear else bad).any(axis=-1)[..., None]}
    reached["key"] = (by_query if linear else bad).any(axis=-2)[..., None]
    for name, x in grads.items():
        reached_by_bad = sum_to(reached[name], (*x.shape[:-1], 1)) if name in reached else bad.any()
        grads[name] = np.where(reached_by_bad, math.nan, x).astype(x.dtype)
    return grads


def multi_head_attention_grad(tab, inputs, params, grad_output, wrt, *, num_heads, num_kv_heads, **options):
    """The gradients named by ``wrt``, among query, key, value and params, of sum(grad_output * multi_head_attention(...))."""
    options = multihead.widened(tab, options, params.get("sink"))
    call = Call.of(inputs["query"], inputs["key"], **options)
    inputs = dict(zip(inputs, multihead.hidden(tab, *inputs.values(), options), strict=True))
    heads = {"query": num_heads, "key": num_kv_heads, "value": num_kv_heads}
    split = {name: tab._split(tab._project(x, params, name[0]), heads[name]) for name, x in inputs.items()}
    grads, grad = {}, tab._wide(grad_output)
    if "W_o" in params:
        if {"W_o", "b_o"} & {*wrt}:
            joined = tab._join(tab.attention(*split.values(), **options))
            grads |= {"W_o": _outer(joined, grad), "b_o": sum_to(grad, grad.shape[-1:])}
        grad = grad @ tab._wide(params["W_o"]).T
    names = (*split, "sink") if "sink" in params else (*split,)
    by_heads = attention_grad(tab, *split.values(), tab._split(grad, num_heads), names, call)
    by_heads = dict(zip(names, by_heads, strict=True))
    grads["sink"] = by_heads.pop("sink", None)
    for name, x in inputs.items():
        letter, grad = name[0], tab._join(by_heads[name])
        grads[f"W_{letter}"], grads[f"b_{letter}"] = _outer(tab._wide(x), grad), sum_to(grad, grad.shape[-1:])
        grads[name] = grad @ tab._wide(params[f"W_{letter}"]).T
    return tuple(grads[name].astype((inputs | params)[name].dtype) for name in wrt)


NORMALISERS = {f.__name__: f for f in (softmax, sparsemax, hardmax, proportional, identity)} | {"average": average}
SCORES = {
    f.__name__: f
    for f in (
        dot_score, scaled_dot_score, additive_score, multiplicative_score, gated_score, cosine_score, distance_score,
        gaussian_kernel, boxcar_kernel, triangular_kernel, epanechnikov_kernel,
    )
} | {"constant_kernel": constant_kernel}  # fmt: skip
