"""The PyTorch tab. The promises are in kvattn/api.py; the five tabs hold the same functions in the same order.

Under torch.autocast the products are taken in its dtype, as everywhere in PyTorch; results keep the query's dtype,
to which arguments of another one are converted there.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import partial, reduce, wraps

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from kvattn import multihead, pairs, partition, patterns, planning, rotation
from kvattn.call import Call, Choice
from kvattn.kernels.torch import distances, dropout, gpu, nonfinite, sdpa, segments, sharded, sinks, traces
from kvattn.pairs import Pairs

HALF = (torch.float16, torch.bfloat16)
GENERATORS = (torch.Generator,)  # what rng may be beside an int and an array


# ---- data


def is_array(x):
    return isinstance(x, torch.Tensor)


def asarray(x, dtype=None, like=None):
    dtype = getattr(torch, dtype) if dtype else None
    if is_array(x):
        return x.to(dtype) if dtype else x
    x, device = np.asarray(x), like.device if is_array(like) else None
    if torch.compiler.is_compiling():  # traces this and none of what follows
        return torch.as_tensor(x, dtype=dtype, device=device)
    if x.dtype.name == "bfloat16":  # ml_dtypes', unknown to from_numpy
        return torch.from_numpy(x.astype(np.float32)).to(device, dtype or torch.bfloat16)
    if not (x.flags.writeable and x.flags.c_contiguous and x.dtype.isnative):  # from_numpy takes no other
        x = np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(x).to(device, dtype)


def to_numpy(x):
    x = asarray(x)
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)  # of what has a gradient, or is elsewhere


def peek(x):
    if not traces.readable(x):
        return None
    try:
        return x.numpy()  # with force=True it takes five times as long
    except (RuntimeError, TypeError):  # it has a gradient, or a dtype that NumPy has not
        return to_numpy(x)


def signed(x):
    x = x.long()  # beyond it uint64 is negative
    return torch.where((x < 0) | (x > 2**30), 2**30, x).int()


def describe():
    return torch.__version__, "cpu"  # where asarray puts what comes from elsewhere


def devices():
    return {"cpu": "cpu"} | {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}


def on(device):
    return nullcontext(torch.zeros((), device=device))


def tracing():
    return traces.tracing()


def converts(x, y):
    """Under torch.autocast arrays of two dtypes meet everywhere; float64 it leaves alone."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return on and torch.float64 not in (x.dtype, y.dtype)


def places(x, first=0, count=None):
    end = first + (x.shape[-2] if count is None else count)
    return torch.arange(first, end, dtype=torch.int32 if pairs.short(first, end) else torch.int64, device=x.device)


# ---- shapes and masks


def _wide(x):
    """Half precision in float32; the rest as it is."""
    return x.float() if x.dtype in HALF else x


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
    if valid_lens.ndim < 2:
        return valid_lens.reshape(-1, *[1] * (ndim - 1))
    return valid_lens[(slice(None), *[None] * (ndim - 3), slice(None), None)]  # no reshape: in ONNX its sizes may not be 0


def _positions(query_offset, n, ndim, device):
    """Where each query stands: (n, 1), or (batch, 1, ..., n, 1) of ndim axes."""
    if is_array(query_offset) and query_offset.ndim:
        query_offset = query_offset.reshape(-1, *[1] * (ndim - 1))
    return query_offset + torch.arange(n, device=device)[:, None]


def _mask_and_bias(query, key, mask, bias, valid_lens, query_offset, left, right):
    """The mask and the bias of a small call, with what the valid lengths and the window forbid in them."""
    n, m = query.shape[-2], key.shape[-2]
    if valid_lens is not None:
        each = (valid_lens.shape[1], 1) if valid_lens.ndim > 1 else [1] * min(2, query.ndim - 1)
        lengths = valid_lens.reshape(-1, *[1] * (query.ndim - 3), *each)  # indices would take twice as long
        keys = sdpa.constant(m, lambda: torch.arange(m, device="cpu"))
        inside = keys < (lengths if lengths.is_cpu else lengths.cpu())
        mask = inside if mask is None else mask & inside
    if left is not None or right is not None:
        place = query_offset, left, right, n, m
        if bias is None:
            return mask, sdpa.constant((*place, query.dtype), lambda: sdpa.window_bias(*place, query))
        inside = sdpa.constant((*place, torch.bool), lambda: sdpa.window_bias(*place, query) == 0)  # else -inf would meet inf
        mask = inside if mask is None else mask & inside
    return mask, bias


def _allowed(n, keys, ndim, call):
    """Which pairs may attend: bool, broadcastable to (..., n, m), or None where all may. ``keys``: their positions."""
    allowed = [] if call.mask is None else [call.mask]
    if call.bias is not None:
        allowed.append(call.bias != -math.inf)
    if call.valid_lens is not None:
        allowed.append(keys < _lengths(call.valid_lens, ndim).to(keys))  # lengths may stay where they can be read
    if call.windowed:
        ahead = keys - _positions(call.query_offset, n, ndim, keys.device)  # how far each key lies after each query
        if call.left is not None:
            allowed.append(ahead >= -call.left)
        if call.right is not None:
            allowed.append(ahead <= call.right)
    return reduce(torch.logical_and, allowed) if allowed else None


def _flags_of_rows(flags, shape):
    """Whether any flag holds for each row of an array of ``shape``: (..., h, r) -> (..., rows), heads and batch folded."""
    if flags.ndim >= 2 and len(shape) >= 3 and flags.shape[-2] > shape[-3] > 0:
        flags = flags.reshape(*flags.shape[:-2], shape[-3], flags.shape[-2] // shape[-3], flags.shape[-1]).any(dim=-2)
    for axis in range(-flags.ndim, -1):
        if flags.shape[axis] > shape[axis - 1] == 1:
            flags = flags.any(dim=axis, keepdim=True)
    return flags[..., None]


def _hide_padding(allowed, query, key, value):
    """Zeros for keys that no query may attend to and queries with no key: NaN there would leak as 0 * NaN."""
    if 0 in (*query.shape[:-1], *key.shape[:-1]):  # there are no pairs, so what there is meets nobody
        allowed = torch.zeros(1, 1, dtype=torch.bool, device=query.device)
    if allowed is None:
        return query, key, value
    if allowed.ndim < 2:
        allowed = allowed[None] if allowed.ndim else allowed[None, None]
    has_query, has_key = allowed.any(dim=-2), allowed.any(dim=-1)
    return (
        torch.where(_flags_of_rows(has_key, query.shape), query, 0),
        torch.where(_flags_of_rows(has_query, key.shape), key, 0),
        torch.where(_flags_of_rows(has_query, value.shape), value, 0),
    )


def _may_leak(*inputs):
    """Whether NaN or inf in rows that meet nobody may reach a gradient: not where none is asked for or all is finite."""
    if traces.tracing() or not torch.is_grad_enabled():
        return traces.tracing()
    different = {id(x): x for x in inputs}.values()  # self-attention gives one array three times
    return not all(traces.readable(x) and nonfinite.finite(x) for x in different)


def _hide_unused_rows(query, key, value, call):
    """Zeros for rows (..., n, c) that meet nobody in any head: a weight's gradient, their product with 0, would be NaN."""
    if type(call.mask) is Pairs:
        call = call.mask.whole(query[..., None, :, :], key[..., None, :, :], call, heads=False)
    keys = torch.arange(key.shape[-2], device=key.device)
    if call.positions is not None:
        selected = (call.positions[..., None] == keys).any(dim=-2)
        call = call._replace(mask=selected if call.mask is None else call.mask & selected)
    allowed = _allowed(query.shape[-2], keys, query.ndim + 1, call)
    hidden = _hide_padding(allowed, *(x[..., None, :, :] for x in (query, key, value)))
    return tuple(x[..., 0, :, :] for x in hidden)


# ---- scores: (query (..., n, d), key (..., m, d)) -> (..., n, m), float32 for half precision


def dot_score(query, key):
    return _wide(query) @ _wide(key).transpose(-1, -2)


def scaled_dot_score(query, key):
    return dot_score(query, key) / math.sqrt(query.shape[-1] or 1)  # without features the scores are 0


def additive_score(query, key, W_q, W_k, w_v, b=None):
    query, key = _wide(query) @ _wide(W_q), _wide(key) @ _wide(W_k)
    hidden = query[..., :, None, :] + key[..., None, :, :]  # (..., n, m, h)
    if b is not None:
        hidden = hidden + _wide(b)
    return torch.tanh(hidden) @ _wide(w_v)


def multiplicative_score(query, key, W):
    return (_wide(query) @ _wide(W)) @ _wide(key).transpose(-1, -2)


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
    return torch.exp(-_squared_distance(query, key) / (2 * width * width))


def boxcar_kernel(query, key, width=1.0):
    distance = _squared_distance(query, key)
    return (distance < width * width).to(distance.dtype)


def triangular_kernel(query, key, width=1.0):
    squares = _squared_distance(query, key)
    distance = torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())  # sqrt has no gradient at 0
    return torch.relu(1 - distance / width)


def epanechnikov_kernel(query, key, width=1.0):
    return torch.relu(1 - _squared_distance(query, key) / (width * width))


def constant_kernel(query, key, width=1.0):
    return torch.ones_like(_squared_distance(query, key))


def _sigmoid(x):
    return 0.5 * (1 + torch.tanh(0.5 * x))


def _unit(x):
    squares = (x * x).sum(dim=-1, keepdim=True)
    return torch.where(squares == 0, 0, x / torch.where(squares == 0, 1, squares).sqrt())


def _squared_distance(query, key):
    """|q - k|^2 from the differences: |q|^2 + |k|^2 - 2 q.k would cancel."""
    difference = _wide(query)[..., :, None, :] - _wide(key)[..., None, :, :]  # (..., n, m, d)
    return (difference * difference).sum(dim=-1)


# ---- normalisers: (scores (..., n, m), where bool) -> weights


def softmax(scores, where=None):
    weights = nonfinite.softmax(scores, where)
    return (_softmax_lse(scores, where)[0] if weights is None else weights).to(scores.dtype)


def masked_softmax(scores, valid_lens=None, where=None):
    if valid_lens is not None:
        inside = torch.arange(scores.shape[-1], device=scores.device) < _lengths(valid_lens, scores.ndim)
        where = inside if where is None else where & inside
    return softmax(scores, where)


def sparsemax(scores, where=None):
    wide = _wide(scores)
    if wide.shape[-1] == 0:
        return scores
    shifted = (wide - _top(wide, where)).clamp(min=-2)  # what lies 1 below the best has no weight: -2 stands for it
    shifted = shifted if where is None else torch.where(where, shifted, -2)
    ordered = shifted.detach().sort(dim=-1, descending=True).values
    ranks = torch.arange(1, wide.shape[-1] + 1, dtype=wide.dtype, device=wide.device)
    sums = ordered.cumsum(dim=-1)
    count = (1 + ranks * ordered > sums).sum(dim=-1, keepdim=True).clamp(min=1)  # 0 in a row of NaN
    support = shifted.detach() > (sums.gather(-1, count - 1) - 1) / count
    # the threshold again, from its support alone: the gradient passes through no sort
    threshold = (torch.where(support, shifted, 0).sum(dim=-1, keepdim=True) - 1) / support.sum(dim=-1, keepdim=True)
    weights = torch.where(support, shifted - threshold, 0)
    return (weights if where is None else torch.where(where, weights, 0)).to(scores.dtype)


def hardmax(scores, where=None):
    if scores.shape[-1] == 0:
        return scores
    best = (scores if where is None else torch.where(where, scores, -math.inf)).argmax(dim=-1)
    chosen = torch.arange(scores.shape[-1], device=scores.device) == best[..., None]
    return (chosen if where is None else chosen & where).to(scores.dtype)


def proportional(scores, where=None):
    wide = identity(_wide(scores), where)
    total = wide.sum(dim=-1, keepdim=True)
    weights = wide / torch.where(total == 0, math.inf, total)
    return (weights if where is None else nonfinite.cleared(weights, where)).to(scores.dtype)


def average(scores, where=None):
    ones = identity(torch.ones_like(_wide(scores)), where)
    return (ones / ones.sum(dim=-1, keepdim=True).clamp(min=1)).to(scores.dtype)


def identity(scores, where=None):
    return scores if where is None else torch.where(where, scores, 0)


def _top(scores, where):
    """The largest score of each row, 0 where nothing may be attended to; NaN for inf, which makes NaN of the row."""
    scores = scores.detach()  # whatever is taken off, the weights and their gradients are the same
    if scores.shape[-1] == 0:
        return scores.new_zeros((*scores.shape[:-1], 1))
    scores = scores if where is None else torch.where(where, scores, -math.inf)
    top = scores.amax(dim=-1, keepdim=True)
    return top.nan_to_num(math.nan, posinf=math.nan, neginf=0)


def _softmax_lse(scores, where):
    """(weights, log-sum-exp); a row with nothing to attend to has weights 0 and lse -inf."""
    scores = _wide(scores)
    top = _top(scores, where)
    shifted = torch.exp(scores - top if where is None else torch.where(where, scores - top, -math.inf))
    total = shifted.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = torch.where(total > 0, total, 1)  # where a row is NaN, what it may not attend to is 0 / 1
    lse = torch.where(empty, -math.inf, total.log() + top)
    return shifted / total, lse[..., 0]


# ---- attention


def attention(query, key, value, *, score=scaled_dot_score, normalize=softmax, mask=None, bias=None, valid_lens=None,
              causal=False, query_offset=0, window=None, positions=None, scale=None, softcap=None, sink=None, dropout=0.0,
              rng=None, return_weights=False, return_lse=False, return_scores=None):  # fmt: skip
    left, right = window or (None, None)
    right = 0 if causal else right
    at_once = _at_once(
        query, key, value, score, normalize, mask, bias, valid_lens, query_offset, left, right, positions, scale, softcap, sink,
        dropout, rng, return_weights, return_lse, return_scores,
    )  # fmt: skip
    if at_once:  # to describe so small a call would take longer
        return at_once(query, key, value, mask, bias, valid_lens, query_offset, left, right, scale)
    call = Call.of(
        query, key, score=score, normalize=normalize, mask=mask, bias=bias, valid_lens=valid_lens, causal=causal,
        query_offset=query_offset, window=window, positions=positions, scale=scale, softcap=softcap, sink=sink,
        dropout=dropout, rng=rng, return_weights=return_weights, return_lse=return_lse, return_scores=return_scores,
    )  # fmt: skip
    return _attend(query, key, value, call)


def _at_once(query, key, value, score, normalize, mask, bias, valid_lens, query_offset, left, right, positions, scale, softcap,
             sink, dropout, rng, return_weights, return_lse, return_scores, *_):  # fmt: skip
    """The way of a call that asks SDPA for all keys, or is small and asks it for one mask; None for all others. The options
    are a `Call`'s: `attention` asks before it has made one, and `choose` does."""
    if score is not scaled_dot_score or normalize is not softmax or not positions is sink is return_scores is None:
        return None
    if dropout or softcap or return_weights or return_lse or (type(query) is not torch.Tensor and sharded.spread(query)):
        return None
    if mask is bias is valid_lens is left is None and (right is None or (right == 0 and type(query_offset) is int)):
        if right is None or (traces.known(query_offset == 0) and traces.known(query.shape[-2] == key.shape[-2])):
            return None if sdpa.obstacle(query, key, value, None, scale) else _whole
        if traces.known(query_offset == 0):  # all keys up to the last query's
            return None
    small = sdpa.small(query, key, value, mask, bias, valid_lens, query_offset, left, right, scale)
    return _beside_one_mask if small else None


def _described(at_once, query, key, value, call, blocks=()):
    place = call.query_offset, call.left, call.right
    return at_once(query, key, value, call.mask, call.bias, call.valid_lens, *place, call.scale)


def _whole(query, key, value, mask, bias, valid_lens, query_offset, left, right, scale):
    output = sdpa.fused(query, key, value, None, right == 0, scale)
    return output if output.dtype is query.dtype else output.to(query.dtype)  # autocast's is another


def _beside_one_mask(query, key, value, mask, bias, valid_lens, query_offset, left, right, scale):
    if valid_lens is not None or left is not None or right is not None:
        mask, bias = _mask_and_bias(query, key, mask, bias, valid_lens, query_offset, left, right)
    output = sdpa.masked(query, key, value, mask, bias, scale, _hide_padding, None, True)
    return output if output.dtype is query.dtype else output.to(query.dtype)  # as above


def choose(query, key, value, call):
    """The kernel that serves a call."""
    if at_once := _at_once(query, key, value, *call):
        return Choice("SDPA", "softmax of scaled dot products", (), partial(_described, at_once))
    if type(query) is not torch.Tensor and sharded.spread(query):
        return sharded.choose(query, _attend)
    if call.return_scores:
        return choose(query, key, value, call._replace(return_scores=None)).with_scores(sys.modules[__name__])
    if type(call.mask) is Pairs:
        choice = distances.choose(sys.modules[__name__], query, key, value, call)
        choice = choice or segments.choose(sys.modules[__name__], query, key, value, call)
        return choice or partition.choice(query, key, value, call, _in_parts)
    if call.sink is not None:
        return _choose_with_sink(query, key, value, call)
    if call.positions is not None:
        selected = _select(query, key, value, call)
        choice = choose(*selected)
        run = partial(_of_selected_keys, choice.run, *selected, choice.blocks)
        return choice.of_selected_keys(call.positions.shape[-1], run)
    tab = sys.modules[__name__]
    on_gpu = query.is_cuda and not call.beyond_softmax(tab, "dropout", "return_weights")
    if on_gpu and (choice := gpu.choose(query, key, value, call)):
        return choice
    obstacle = call.beyond_softmax(tab, "dropout", "return_weights", "softcap")
    obstacle = obstacle or sdpa.obstacle(query, key, value, call.bias, call.scale)
    if call.return_lse and not obstacle:
        if sdpa.gives_lse(query, key, value, call):
            return Choice("SDPA", "softmax of scaled dot products, and its lse", (), partial(sdpa.with_lse, _formula))
        obstacle = "return_lse is asked for"
    if not obstacle:
        return sdpa.choose(query, key, value, call, _masked, _in_blocks)
    blocks = [] if call.return_weights else call.window_blocks(query.shape[-2], key.shape[-2])
    if blocks:
        return Choice("the formula", obstacle).in_window(blocks, _in_blocks)
    if blocks := sdpa.blocks_of_scores(query, key, call.score):
        words = "as many as keep memory bounded, computed again for gradients"
        return Choice("the formula", obstacle).in_blocks(blocks, _in_blocks_computed_again, words)
    return Choice("the formula", obstacle, (), _formula)


def _choose_with_sink(query, key, value, call):
    def otherwise(query, key, value, call):
        choice = choose(query, key, value, call._replace(sink=None, return_lse=True))
        return _with_sink(choice.run, query, key, value, call, choice.blocks)

    tab = sys.modules[__name__]
    on_gpu = query.is_cuda and call.positions is None and not call.beyond_softmax(tab, "dropout", "return_weights")
    if on_gpu and (choice := gpu.choose(query, key, value, call)):
        return choice
    obstacle = call.beyond_softmax(tab, "dropout", "return_weights", "return_lse", "softcap")
    obstacle = "positions are given" if call.positions is not None else obstacle
    obstacle = obstacle or sdpa.obstacle(query, key, value, call.bias, call.scale) or sinks.obstacle(query, key, value)
    if not obstacle:
        choice = sdpa.choose(query, key, value, call, _masked, _in_blocks)
        why = f"{choice.why}; the sink takes its share of each row"
        return choice._replace(why=why, run=partial(sdpa.with_sink, choice.run, otherwise))
    choice = choose(query, key, value, call._replace(sink=None, return_lse=True))
    why = f"{choice.why}; the sink takes its share of each row"
    return choice._replace(why=why, run=partial(_with_sink, choice.run))


def _attend(query, key, value, call):
    choice = choose(query, key, value, call)
    return choice.run(query, key, value, call, choice.blocks)


def _formula(query, key, value, call, blocks=()):
    dtype, n, (heads, kv_heads) = query.dtype, query.shape[-2], planning.heads(query.shape, key.shape)
    allowed = _mask(query, key, call)
    query, key, value = _hide_padding(allowed, query, key, value)

    def pairs():  # as they lie for each key head
        return _fold(allowed.expand(*planning.lead(query.shape, key.shape), n, key.shape[-2]), kv_heads)

    # weights = normalize(score(query, key)): (..., h, n, m)
    scores = _scores(query, key, call)
    if allowed is not None and scores.requires_grad and nonfinite.may_leak(query, key):
        score = dot_score if call.scale is not None and call.score is scaled_dot_score else call.score
        scores = _scores(query, key, call._replace(score=nonfinite.score_pair_by_pair(score, pairs())))
    if call.return_lse:
        weights, lse = _softmax_lse(scores, allowed)
    else:
        weights, lse = call.normalize(scores, where=allowed), None

    # output = weights @ value: (..., h, n, v)
    kept = _fold(_dropout(weights, call), kv_heads)
    output = _unfold(nonfinite.product(kept, _wide(value), None if allowed is None else pairs), heads, n).to(dtype)
    if call.return_weights and allowed is not None and call.normalize is not _scored:
        weights = nonfinite.cleared(weights, allowed)
    results = [output] + [weights.to(dtype)] * call.return_weights + [lse] * call.return_lse
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
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores + _wide(call.bias) if call.adds_bias else scores


def _scored(scores, where=None):
    """A normaliser that leaves the scores as they are, and says -inf of the pairs that may not attend."""
    return scores if where is None else torch.where(where, scores, -math.inf)


def _mask(query, key, call):
    """Which pairs may attend, or None where all may: a bias that can be looked at, and holds no -inf, forbids none."""
    if call.bias is not None and not sdpa.forbids(call.bias):
        call = call._replace(bias=None)
    return _allowed(query.shape[-2], torch.arange(key.shape[-2], device=key.device), query.ndim, call)


def _masked(query, key, value, call, blocks=()):
    """SDPA with a mask."""
    mask = call.mask
    if call.windowed or call.valid_lens is not None:
        keys = torch.arange(key.shape[-2], device=key.device)
        mask = _allowed(query.shape[-2], keys, query.ndim, call if call.bias is None else call._replace(bias=None))
    output = sdpa.masked(query, key, value, mask, call.bias, call.scale, _hide_padding, call.sink)
    return output.to(query.dtype)  # autocast's is another


def _in_blocks(query, key, value, call, blocks, attend=None):
    """One block of queries after another."""
    return call.joined([(attend or _attend)(*block) for block in call.cut(blocks, query, key, value)], torch.cat)


def _in_blocks_computed_again(query, key, value, call, blocks):
    """Blocks that keep no scores for their gradients."""
    return _in_blocks(query, key, value, call, blocks, sdpa.recomputed(_attend, call.rng))


def _in_parts(query, key, value, call, parts):
    """One part of the pairs after another, each a call of its own."""
    cuts = partition.cut(parts, query, key, value, call, torch.cat)
    return partition.joined(call, parts, [_attend(*cut) for cut in cuts], torch.cat)


def _of_selected_keys(run, query, key, value, call, blocks, *_):
    """What ``run`` gives for each query beside the keys that it selects."""
    return call.without_query_axis(run(query, key, value, call, blocks))


def _with_sink(run, query, key, value, call, blocks):
    """What ``run`` gives without the sink, less the sink's share of every row: a key of this score whose value is 0."""
    # wide, so that half precision is rounded once; but for a GPU's kernels, which take it
    kernels = query.is_cuda and not (call.return_weights or call.dropout)
    arrays = (x if kernels else _wide(x) for x in (query, key, value))
    output, *weights, lse = run(*arrays, call._replace(sink=None, return_lse=True), blocks)
    left, lse = _left(lse, call.sink, query.ndim, call.return_lse)
    output = (left * _wide(output)).to(query.dtype)
    weights = [torch.where(x == 0, 0, left * _wide(x)).to(query.dtype) for x in weights]  # 0 too where the sink is NaN
    results = [output, *weights] + [lse] * call.return_lse
    return tuple(results) if len(results) > 1 else output


def _left(lse, sink, ndim, with_lse=True):
    """What the sink leaves to the keys of each row's weight, (..., n, 1), and the lse of both; -inf is none, inf makes NaN."""
    sink = _wide(sink[..., 0] if sink.ndim == ndim else sink[..., None])
    sink = sink + torch.where(sink == math.inf, math.nan, torch.zeros_like(sink))
    sink = torch.where(sink == -math.inf, -math.inf, sink)  # which has no gradient, whatever is NaN
    ahead = torch.where(lse == -math.inf, -math.inf, lse - sink)
    left = torch.exp(logsigmoid(ahead))  # its gradient is exact where a sigmoid's, left (1 - left), is rounded to 0
    lse = torch.where(ahead > 0, lse - logsigmoid(ahead), sink - logsigmoid(-ahead)) if with_lse else None
    return left[..., None], lse


def _dropout(weights, call):
    """The weights, some of them dropped, by what rng draws, and the others divided by the share that is kept."""
    rate, rng = call.dropout, call.rng
    if not rate:
        return weights
    if patterns.drawn(rng):
        kept, rate = dropout.kept(weights, call), patterns.exact(rate)
    else:
        kept = torch.rand(weights.shape, generator=rng, dtype=weights.dtype, device=weights.device) >= rate
    return torch.where(kept, weights / (1 - rate), 0)


def _select(query, key, value, call):
    """Each query beside the keys it selects: query (..., h, n, 1, d), key (..., h, n, s, d), value, and the call of these."""
    n, m, lead = query.shape[-2], key.shape[-2], planning.lead(query.shape, key.shape)
    index = call.positions.long().expand(*lead, n, call.positions.shape[-1])
    inside = (index >= 0) & (index < m) & ~_repeated(index)
    if m == 0:  # one key that nobody may attend to, so that there is something to gather
        call = call._replace(mask=None, bias=None)
        key, value = (x.new_zeros((*x.shape[:-2], 1, x.shape[-1])) for x in (key, value))
    index = index.clamp(0, max(m - 1, 0))

    def gather(x):
        return x.expand(*lead, n, m).gather(-1, index)  # take_along_dim would make numbers of traced sizes

    mask = inside if call.mask is None else inside & gather(call.mask)
    bias = None if call.bias is None else gather(call.bias)
    allowed = _allowed(n, index, query.ndim, call._replace(mask=mask, bias=bias))
    rows = index.flatten(-2)[..., None]  # one gather from (..., m, c): the gradient is not (..., n, m, c)
    key, value = (_spread(x, lead).gather(-2, rows.expand(*rows.shape[:-1], x.shape[-1])) for x in (key, value))
    key, value = (x.unflatten(-2, index.shape[-2:]) for x in (key, value))
    rng = dropout.of_selected(call, index)
    call = call.of_selected_keys(allowed[..., None, :], None if bias is None else bias[..., None, :], rng)
    return query.expand(*lead, n, query.shape[-1])[..., None, :], key, value, call


def _spread(x, lead):
    """(..., h_kv, m, c) -> (*lead, m, c): each key head repeated for its queries' heads."""
    if lead and x.shape[-3] != lead[-1]:
        x = x.repeat_interleave(lead[-1] // x.shape[-3], dim=-3)
    return x.expand(*lead, *x.shape[-2:])


def _repeated(index):
    """True where the same position stands earlier in its row."""
    size = index.shape[-1]
    places = torch.arange(size, device=index.device)
    order = (index * size + places).argsort(dim=-1)  # of equals the first first; a stable sort would be none of ONNX's
    ordered = index.gather(-1, order)
    repeated = torch.cat([torch.zeros_like(ordered[..., :1], dtype=torch.bool), ordered[..., 1:] == ordered[..., :-1]], dim=-1)
    return repeated[..., :size].gather(-1, order.argsort(dim=-1))


def _recording(function):
    """Autograd on, inside no_grad and inference_mode too, where it takes copies of the tensors made there."""

    @wraps(function)
    def call(*args, **options):
        with torch.inference_mode(False), torch.enable_grad():
            return function(*map(_usable, args), **_usable(options))

    return call


def _usable(x):
    if is_array(x):
        return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x
    if isinstance(x, partial):
        return partial(x.func, *map(_usable, x.args), **_usable(x.keywords))
    return {name: _usable(y) for name, y in x.items()} if isinstance(x, dict) else x


@_recording
def attention_grad(query, key, value, grad_output, *, wrt=("query", "key", "value"), grad_scores=None, **options):
    score = options.pop("score", scaled_dot_score)
    parameters = score.keywords if isinstance(score, partial) else {}
    given = {"query": query, "key": key, "value": value, "bias": options.pop("bias", None), "sink": options.pop("sink", None)}
    given |= parameters
    leaves = {name: given[name].detach().requires_grad_() for name in wrt}
    given |= leaves
    if parameters:
        score = partial(score.func, *score.args, **{name: given[name] for name in parameters})
    results = attention(
        *(given[x] for x in ("query", "key", "value")), bias=given["bias"], sink=given["sink"], score=score, **options
    )
    loss = [(results, grad_output)] if grad_scores is None else zip(results, (grad_output, grad_scores), strict=True)
    if not (loss := [(x, grad) for x, grad in loss if x.requires_grad]):
        return tuple(torch.zeros_like(x) for x in leaves.values())
    results, grads = zip(*loss, strict=True)
    return torch.autograd.grad(results, [*leaves.values()], grads, materialize_grads=True)


def merge_attention(outputs, lses, return_lse=False):
    outputs, lses = torch.stack([*outputs], dim=-2), torch.stack([*lses], dim=-1)  # (..., n, parts, v), (..., n, parts)
    weights, lse = _softmax_lse(lses, lses != -math.inf)
    weights = weights[..., None]
    output = (weights * torch.where(weights == 0, 0, _wide(outputs))).sum(dim=-2).to(outputs.dtype)
    return (output, lse) if return_lse else output


# ---- positions


def rotary(x, positions, frequencies, *, factor=1.0, interleaved=False):
    width, wide = 2 * len(frequencies), _wide(x)
    pairs, rest = wide[..., :width], wide[..., width:]
    numbers = _as_complex(pairs) if interleaved else None
    if numbers is not None:  # one product, in a third of the time
        turned = torch.view_as_real(numbers * _turns(positions, frequencies, factor, complex, wide)).flatten(-2)
    else:
        cos, sin = _turns(positions, frequencies, factor, interleaved, wide)  # (..., n, width)
        turned = torch.addcmul(pairs * cos, _swapped(pairs, interleaved), sin)  # (a, b) -> (a cos - b sin, b cos + a sin)
    turned = torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
    return turned.to(x.dtype)


_tables = {}


def _as_complex(x):
    """Pairs (a, b) side by side as the numbers a + bi; None where they do not lie so, and while a program is recorded."""
    if not traces.readable(x):
        return None
    try:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    except RuntimeError:  # its strides are odd
        return None


def _turns(positions, frequencies, factor, interleaved, x):
    """Each row's cosines and sines, of its position times the frequencies, as they lie beside x; the first sine of a pair
    negative; or, where ``interleaved`` is complex, cos + sin i. In float64, since a large angle leaves float32 no digits."""
    n = x.shape[-2]

    def make():
        first = not is_array(positions) or not positions.ndim
        places = positions + torch.arange(n, device=x.device) if first else positions.to(x.device)
        angles = places[..., None] * torch.tensor(frequencies, dtype=torch.float64, device=x.device)
        cos, sin = (factor * angles.cos()).to(x.dtype), (factor * angles.sin()).to(x.dtype)
        if interleaved is complex:
            return torch.complex(cos, sin)
        if torch.compiler.is_dynamo_compiling():  # made first, since inductor would make them anew for each batch and head
            cos, sin = (table.as_strided(table.shape, table.stride()) for table in (cos, sin))
        axis = -1 if interleaved else -2
        return torch.stack([cos, cos], axis).flatten(-2), torch.stack([-sin, sin], axis).flatten(-2)

    if type(positions) is not int or not traces.readable(x):
        return make()
    with torch.inference_mode(False):  # what is kept may serve a call that is differentiated
        return rotation.kept(_tables, (frequencies, factor, interleaved, positions, n, x.dtype), n, make)


def _swapped(x, interleaved):
    """Each pair (a, b) as (b, a)."""
    half = x.shape[-1] // 2
    if interleaved:
        return x.unflatten(-1, (half, 2)).flip(-1).flatten(-2)
    return torch.cat([x[..., half:], x[..., :half]], dim=-1)


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
    wide = wide * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + epsilon) * _wide(weight)
    return wide.to(x.dtype)


def _split(x, heads):
    """(..., n, heads * c) -> (..., heads, n, c)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-2, -3)


def _join(x):
    """(..., heads, n, c) -> (..., n, heads * c)."""
    x = x.transpose(-2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


@_recording
def multi_head_attention_grad(query, key, value, params, grad_output, *, wrt=("query", "key", "value"), **options):
    given = {"query": query, "key": key, "value": value, **params}
    leaves = {name: given[name].detach().requires_grad_() for name in wrt}
    query, key, value, *rest = (given | leaves).values()
    output = multi_head_attention(query, key, value, dict(zip(params, rest, strict=True)), **options)
    return torch.autograd.grad(output, [*leaves.values()], grad_output, materialize_grads=True)


def self_attention(x, W_q, W_k, W_v, **options):
    return multihead.self_attention(sys.modules[__name__], x, {"W_q": W_q, "W_k": W_k, "W_v": W_v}, options)


def write(buffer, x, at):
    """``buffer`` with x in the places at, at + 1, ... of axis -2; longer, if it does not hold them."""
    if is_array(at) and traces.tracing() and not torch.jit.is_tracing():  # a place that is not known yet: there must be room
        return buffer.index_copy(-2, at + torch.arange(x.shape[-2], device=x.device), x)
    end = at + x.shape[-2]
    if is_array(end) or end > buffer.shape[-2] or (torch.is_grad_enabled() and (x.requires_grad or buffer.requires_grad)):
        return torch.cat([buffer[..., :at, :], x, buffer[..., end:, :]], dim=-2)
    buffer[..., at:end, :] = x
    return buffer
