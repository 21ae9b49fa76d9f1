"""Softmax attention of dot products in tiles, for JAX on the CPU: no array of queries by keys ever exists. With s_ij the
scores, through the soft cap, over the keys j that query i may attend to,

    output_i = sum_j exp(s_ij - top_i) v_j / sum_j exp(s_ij - top_i)        lse_i = top_i + log sum_j exp(s_ij - top_i)

A tile of queries meets the keys block by block, with a running maximum. What causal, window and valid_lens allow is a range
of keys for each query, and so is where the first and the last key of its segment lie: blocks outside every range are left out,
and blocks inside all of them need no mask. The derivative is written forwards, in the same tiles, and rematerialised: JAX
transposes it to the backward pass, and differentiates both. It transposes no loop whose length only the data tell, so that the
derivative looks at each block and leaves some out.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021, "Self-attention
does not need O(n^2) memory"; Dao et al. 2022, "FlashAttention".
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from kvattn import planning
from kvattn.kernels.jax import distances, placement, plans
from kvattn.pairs import Segments

FARTHEST = 2**29  # no array is as long: positions stay within 32 bits


def obstacle(tab, query, key, value, call):
    """Why tiles do not serve a call of ``tab``; "" if they do."""
    if reason := plans.obstacle(tab, query.shape, key.shape, value.shape, call):
        return reason
    if jax.default_backend() != "cpu":
        return "tiles are for the CPU"
    if math.prod(planning.lead(query.shape, key.shape)) > 1 and placement.shared((query, key, value)):
        return "several devices share the arrays, and a loop over batch and heads would gather them"
    return ""


def of_arrays(query, key, call):
    """The call with arrays of all pairs in the place of segments and of a bias by distance, for kernels that read neither."""
    if type(call.mask) is Segments:
        call = call._replace(mask=call.mask.array(query.ndim))
    if type(call.bias) is distances.Line:
        call = call._replace(bias=call.bias.whole(query.shape[-2], key.shape[-2]))
    return call


def attention(tab, query, key, value, call, blocks=()):
    """softmax(scale * query @ key.T) @ value, and the log of the softmax's sums on request."""
    dtype, wide, axes = query.dtype, jnp.promote_types(query.dtype, jnp.float32), query.ndim
    scale = call.scale
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1] or 1) if call.score is tab.scaled_dot_score else 1.0
    plan = plans.plan(query.shape, key.shape, call)
    if axes == 2:
        query, key, value = query[None], key[None], value[None]
    mask, *segments = call.mask if type(call.mask) is Segments else (call.mask,)
    low, high = _bounds(axes, plan.n, plan.m, call, segments)
    if high is None and plan.m % plan.block:
        high = jnp.full(1, plan.m, jnp.int32)  # the last block is not whole
    limits = {"low": low, "high": high, "mask": mask, "scale": jnp.asarray(scale, wide)}
    limits["softcap"] = None if call.softcap is None else jnp.asarray(call.softcap, wide)
    line = call.bias.values if type(call.bias) is distances.Line else None
    limits["line"] = None if line is None else jnp.pad(line, [(0, 0)] * (line.ndim - 1) + [(0, 1)])
    if segments:
        limits["segment"], limits["segment_of_key"] = _spread(segments[0], axes), _spread(segments[1], axes)[..., None]
    inputs = {"query": query, "key": key, "value": value, "bias": call.bias if line is None else None}
    given = [{name: x for name, x in given.items() if x is not None} for given in (inputs, limits)]
    varying = _varying(given)
    output, lse = _attend(plan, *jax.tree.map(lambda x: placement.vary(x, varying), given))
    output = output.astype(dtype)
    if axes == 2:
        output, lse = output[0], lse[0]
    return (output, lse) if call.return_lse else output


def _varying(arrays):
    """The axes of a mesh along which any of these arrays differs from device to device."""
    return frozenset().union(*(placement.varying(jax.typeof(x)) for x in jax.tree.leaves(arrays)))


def _zeros(shape, limits):
    """Where sums begin, in the dtype and along the axes of a mesh that all arrays of the call have in common."""
    return placement.vary(jnp.zeros(shape, limits["scale"].dtype), _varying(limits["scale"]))


def _bounds(axes, n, m, call, segments=()):
    """low and high, broadcastable to (..., n): query i may see the keys low <= j < high. None where nothing limits them."""
    low = high = None
    first, last = (_spread(x, axes) for x in _ranges(*segments)) if segments else (None, None)
    if call.windowed:
        offset = _near(call.query_offset)
        position = offset.reshape(*offset.shape, *[1] * (axes - 1 - offset.ndim)) + jnp.arange(n, dtype=jnp.int32)
        low = None if call.left is None else position - min(call.left, FARTHEST)
        high = None if call.right is None else position + min(call.right, FARTHEST) + 1
    if call.valid_lens is not None:
        lens = _near(call.valid_lens)
        each = n if call.lengths_per_query(axes) else 1
        lens = lens.reshape(*lens.shape[: 0 if axes == 2 else 1], *[1] * (axes - 2 - (axes > 2)), each)
        high = lens if high is None else jnp.minimum(high, lens)
    if segments:
        low, high = first if low is None else jnp.maximum(low, first), last if high is None else jnp.minimum(high, last)
    return low, (high if high is None else jnp.minimum(high, m))


def _spread(x, axes):
    """What each query or key has of its own, (batch or 1, n), broadcastable to (..., n) for queries of so many axes."""
    return x[0] if axes == 2 else x.reshape(x.shape[0], *[1] * (axes - 3), x.shape[1])


def _ranges(of_queries, of_keys):
    """The first key of each query's segment, and the one after the last; m and 0 where it has none."""
    batch, m = max(len(of_queries), len(of_keys)), of_keys.shape[1]

    def ranges(of_queries, of_keys):
        order = jnp.argsort(of_keys).astype(jnp.int32)  # keys of one segment in a row, and in their order
        first, last = (jnp.searchsorted(of_keys[order], of_queries, side=side) for side in ("left", "right"))
        some = first < last
        return jnp.where(some, order[jnp.minimum(first, m - 1)], m), jnp.where(some, order[jnp.maximum(last - 1, 0)] + 1, 0)

    return jax.vmap(ranges)(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in (of_queries, of_keys)))


def _near(x):
    """An integer, or an array of them, as int32: no further from 0 than FARTHEST."""
    if isinstance(x, int):
        return jnp.int32(max(-FARTHEST, min(x, FARTHEST)))
    return jnp.clip(x.astype(jnp.promote_types(x.dtype, jnp.int32)), -FARTHEST, FARTHEST).astype(jnp.int32)


# ---- what is done with a block of keys


def _scores(rows, keys, pairs, limits):
    """(scores, the derivative of the softcap or 1)."""
    scores, slope = _dot(rows["query"], keys["key"].mT), 1
    if "softcap" in limits:
        capped = jnp.tanh(scores / limits["softcap"])
        scores, slope = limits["softcap"] * capped, 1 - capped * capped
    added = pairs.get("bias", pairs.get("line"))
    return scores if added is None else scores + added, slope


def _dot(x, y):
    return jnp.matmul(x, y, precision="highest")


def _masked_step(step, carry, rows, keys, pairs, limits, span, forbids):
    """``step`` with the keys from ``start`` on, of which those before ``at`` are left out; ``span``: (low, high, start, at)."""
    low, high, start, at = span
    position = start + jnp.arange(keys["key"].shape[-2], dtype=jnp.int32)
    low = jnp.maximum(low, at)
    allowed = (position >= low[:, None]) & (position < high[:, None])
    if "mask" in pairs:
        allowed &= pairs["mask"]
    if "bias" in pairs:
        allowed &= pairs["bias"] != -math.inf
    if "segment" in rows:
        allowed &= rows["segment"][:, None] == keys["segment_of_key"][:, 0]
        keys = {name: x for name, x in keys.items() if name != "segment_of_key"}
    if forbids or "segment" in rows or not pairs.keys() <= {"line"}:
        has_key, has_query = allowed.any(axis=-1), allowed.any(axis=-2)
    else:  # the same, in less time
        has_key = jnp.maximum(low, start) < jnp.minimum(high, start + len(position))
        has_query = (low.min() <= position) & (position < high.max())
    # zeros for the rest: 0 * NaN is NaN
    rows = {name: jnp.where(has_key[..., None], x, 0) if name in ("query", "d_query") else x for name, x in rows.items()}
    keys = {name: jnp.where(has_query if name[0] == "d" else has_query[..., None], x, 0) for name, x in keys.items()}
    pairs = {name: x if name == "line" else jnp.where(allowed, x, 0) for name, x in pairs.items() if name != "mask"}
    return step(carry, rows, keys, pairs, limits, allowed)


def _absorb(carry, rows, keys, pairs, limits, allowed):
    """The sums of exp(scores) and of exp(scores) @ value, under the maximum so far."""
    top, sums, total = carry
    scores, _ = _scores(rows, keys, pairs, limits)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -math.inf)
    new = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    weights, fade = jnp.exp(scores - new), jnp.exp(top - new)
    return new, fade * sums + weights.sum(axis=-1, keepdims=True), fade * total + _dot(weights, keys["value"])


def _along(carry, rows, keys, pairs, limits, allowed):
    """The same sums' derivatives along d_query, d_key, d_value and d_bias: linear, and so the backward pass transposed."""
    sums, total = carry
    scores, slope = _scores(rows, keys, pairs, limits)
    lse = jnp.where(rows["lse"] == -math.inf, 0, rows["lse"])[:, None]
    weights = jnp.exp((scores if allowed is None else jnp.where(allowed, scores, -math.inf)) - lse)
    moved = []
    if "d_query" in rows:
        moved.append(_dot(rows["d_query"], keys["key"].T))
    if "d_key" in keys:
        moved.append(_dot(rows["query"], keys["d_key"]))
    moved = [sum(moved) * slope] if moved else []
    moved += [pairs["d_bias"]] if "d_bias" in pairs else []
    if moved:
        moved = weights * sum(moved)
        sums, total = sums + moved.sum(axis=1, keepdims=True), total + _dot(moved, keys["value"])
    if "d_value" in keys:
        total = total + _dot(weights, keys["d_value"].T)
    return sums, total


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(plan, inputs, limits):
    """The output (*lead, n, v) and lse (*lead, n), float32 for half precision."""
    return _forward(plan, inputs, limits)


@partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(plan, primals, tangents):
    inputs, limits = primals
    output, lse = _attend(plan, inputs, limits)
    moved = {f"d_{name}": x for name, x in tangents[0].items() if not isinstance(x, SymbolicZero)}
    if not moved:
        return (output, lse), (jnp.zeros_like(output), jnp.zeros_like(lse))

    def along(moved):
        return _tangent(plan, {**inputs, **moved, "output": output, "lse": lse}, limits)

    if jax.__version_info__ >= (0, 10):
        return (output, lse), along(moved)
    # before, JAX transposes no scan that a rule like this one wrote, but the derivative of one, which is the same: it is linear
    return (output, lse), jax.jvp(along, (jax.tree.map(jnp.zeros_like, moved),), (moved,))[1]


# ---- entries (a batch entry's key head), tiles of their queries, blocks of the keys


ROW = {"query": 1, "d_query": 1, "output": 1, "lse": 0, "low": 0, "high": 0, "segment": 0}  # and how many axes of features
KEY = ("key", "value", "d_key", "d_value", "segment_of_key")
PAIR = ("mask", "bias", "d_bias")


def _entries(plan, arrays):
    """Of each array (entries, rest), and which of them serves each entry; rows of all heads in a row, pairs (group, n, m)."""
    axes, heads, group = len(plan.lead), len(plan.lead) - 1, plan.lead[-1] // plan.heads
    parts = {}
    for name, x in arrays.items():
        rest = 1 + ROW[name] if name in ROW else 1 if name == "line" else 2
        x = x.reshape(*[1] * (axes + rest - x.ndim), *x.shape)
        if name in ROW:
            x = jnp.broadcast_to(x, (*x.shape[:heads], max(x.shape[heads], group), plan.n, *x.shape[axes + 1 :]))
        (*batch, h), rest = x.shape[:axes], x.shape[axes:]
        own, full = (*batch, h if name in KEY else max(1, h // group)), (*plan.lead[:-1], plan.heads)
        index = np.broadcast_to(np.arange(math.prod(own), dtype=np.int32).reshape(own), full).reshape(-1)
        if name in ROW:
            rest = (group * plan.n, *rest[1:])
        elif name in PAIR or name == "line":
            rest = (1 if h == 1 else group, *rest)
        parts[name] = x.reshape(-1, *rest), index
    return parts


def _wide(x):
    return x.astype(jnp.float32) if x.dtype.itemsize == 2 else x


def _bounded(rows, limits, m):
    """The rows without low and high, scaled; and those."""
    low, high = rows.pop("low", jnp.zeros(1, jnp.int32)), rows.pop("high", jnp.full(1, m, jnp.int32))
    return {name: x * limits["scale"] if name in ("query", "d_query") else x for name, x in rows.items()}, low, high


def _split(inputs, limits):
    """(arrays, numbers)."""
    given = inputs | limits
    numbers = {name: given.pop(name) for name in ("scale", "softcap") if name in given}
    return given, numbers


def _forward(plan, inputs, limits):
    """Every tile beside the blocks that it reaches, of some heads at once, cut from the arrays as they are."""
    arrays, limits = _split(inputs, limits)
    count, group, tiles = math.prod(plan.lead[:-1]) * plan.heads, plan.lead[-1] // plan.heads, -(-plan.n // plan.tile)
    dtype, parts = limits["scale"].dtype, _entries(plan, arrays)
    pairs = [name for name in PAIR if name in parts]
    share = 0.5 ** (plan.m - 1).bit_length()  # a power of two, so that nothing is rounded but what is nearly 0

    def tile(number, results):
        number = jnp.asarray(number, jnp.int32)  # an int under jax.disable_jit
        entry, head = number // (group * tiles) * plan.heads_at_once, number // tiles % group
        first = jnp.minimum(number % tiles * plan.tile, plan.n - plan.tile)

        def part(name, *places):
            """From and size on each axis; all of one where one place stands for every, and of those not named."""
            x, index = parts[name]
            own = plan.heads_at_once if index[0] != index[plan.heads_at_once - 1] else 1  # of the heads, or one for all
            places = [(entry if len(x) == count else jnp.asarray(index)[entry], own), *places]
            places += [(jnp.int32(0), size) for size in x.shape[len(places) :]]
            sizes = [min(size, most) for (_, size), most in zip(places, x.shape, strict=True)]
            return _wide(lax.dynamic_slice(x, [start for start, _ in places], sizes))

        def keys(start, size):  # values so much smaller that no sum of them exceeds the largest
            return {"key": part("key", (start, size)), "value": part("value", (start, size)) * share}

        def line(start, size):
            if "line" not in parts:
                return {}
            found = part("line", (head, 1), (start - first + plan.n - plan.tile, plan.tile + size))[:, 0]
            return {"line": distances.block(found, plan.tile)}

        def inside(carry, at):
            return _absorb(carry, rows, keys(at, plan.block), line(at, plan.block), limits, None)

        def cut(carry, at):
            start = jnp.minimum(at, plan.m - plan.cut_block)
            here = {name: part(name, (head, 1), (first, plan.tile), (start, plan.cut_block))[:, 0] for name in pairs}
            here |= line(start, plan.cut_block)
            there = keys(start, plan.cut_block)
            there |= {name: part(name, (start, plan.cut_block))[0] for name in ("segment_of_key",) if name in parts}
            return _masked_step(_absorb, carry, rows, there, here, limits, (low, high, start, at), plan.gaps)

        def walk(carry, at, count, size, step):  # as far as the data say: no derivative goes through here
            count = jnp.maximum(0, count)
            return lax.fori_loop(0, count, lambda i, carry: step(carry, at + i * size), carry), at + count * size

        rows = {name: part(name, (head * plan.n + first, plan.tile)) for name in ROW if name in parts}
        rows = {name: x[0] if name in ("low", "high", "segment") else x for name, x in rows.items()}
        rows, low, high = _bounded(rows, limits, plan.m)
        lowest, inner_lowest, inner_highest, highest = low.min(), low.max(), high.min(), high.max()
        shape = plan.heads_at_once, plan.tile
        sums, at = _zeros((*shape, 1), limits), jnp.clip(lowest, 0, plan.m)
        carry = sums + jnp.finfo(dtype).min, sums, _zeros((*shape, inputs["value"].shape[-1]), limits)
        limited = pairs or "low" in arrays or "high" in arrays
        if limited and plan.cut_block == plan.m:
            carry = cut(carry, jnp.int32(0))
        else:
            if "low" in arrays:
                uneven = -((at - jnp.minimum(inner_lowest, highest)) // plan.cut_block)
                carry, at = walk(carry, at, uneven, plan.cut_block, cut)
            if not (pairs or "segment" in rows):
                carry, at = walk(carry, at, (inner_highest - at) // plan.block, plan.block, inside)
            if limited:
                carry, at = walk(carry, at, -((at - highest) // plan.cut_block), plan.cut_block, cut)
        top, sums, total = carry
        empty = sums == 0
        sums = jnp.where(empty, 1, sums)
        found = total / (sums * share), jnp.where(empty, -math.inf, top + jnp.log(sums))[..., 0]
        where = entry, head * plan.n + first, jnp.int32(0)
        return tuple(lax.dynamic_update_slice(x, y, where[: x.ndim]) for x, y in zip(results, found, strict=True))

    shape = count, group * plan.n
    results = _zeros((*shape, inputs["value"].shape[-1]), limits), _zeros(shape, limits)
    results = lax.fori_loop(jnp.int32(0), jnp.int32(count // plan.heads_at_once * group * tiles), tile, results)
    return tuple(x.reshape(*plan.lead, plan.n, *x.shape[2:]) for x in results)


def _tangent(plan, inputs, limits):
    """The derivatives of both results along inputs' d_query, d_key, d_value and d_bias: linear in them, and loops all scans."""
    arrays, limits = _split(inputs, limits)
    count = math.prod(plan.lead[:-1]) * plan.heads
    parts = _entries(plan, arrays)
    own = {name: x for name, (x, _) in parts.items() if len(x) == count}  # the rest is shared by entries
    at = {name: index for name, (_, index) in parts.items() if name not in own}

    @partial(jax.checkpoint, prevent_cse=False)
    def entry(given):
        own, at = given
        return _entry(plan, own | {name: parts[name][0][i] for name, i in at.items()}, limits)

    return tuple(x.reshape(*plan.lead, plan.n, *x.shape[2:]) for x in lax.map(entry, (own, at)))


def _entry(plan, arrays, limits):
    """One entry's results, (group * n, ...)."""
    tiles, group = -(-plan.n // plan.tile), plan.lead[-1] // plan.heads
    n, m = tiles * plan.tile, max(plan.m, plan.cut_blocks * plan.cut_block)
    pairs = {name: _wide(x) for name, x in arrays.items() if name in PAIR}
    for axis, size in ((1, n), (2, m)):
        pairs = {name: x if x.shape[axis] == 1 else _fill(x, axis, size) for name, x in pairs.items()}
    line = None if "line" not in arrays else jnp.pad(arrays["line"], [(0, 0), (n - plan.n, m - plan.m)])
    keys = {name: _fill(_wide(x), 0, m) for name, x in arrays.items() if name in KEY}
    rows = {name: _wide(x) for name, x in arrays.items() if name in ROW}
    if n != plan.n:
        ends = {"low": plan.m}  # a row that is no query sees nothing
        rows = {name: _fill(x.reshape(group, plan.n, *x.shape[1:]), 1, n, ends.get(name, 0)) for name, x in rows.items()}
    rows = {name: x.reshape(group * tiles, plan.tile, *x.shape[2 if n != plan.n else 1 :]) for name, x in rows.items()}

    @partial(jax.checkpoint, prevent_cse=False)
    def tile(given):
        number, rows = given
        head, first = number // tiles, number % tiles * plan.tile
        mine = {name: _cut(_cut(x, 0, head, 1)[0], 0, first, plan.tile) for name, x in pairs.items()}

        def by_distance(start):
            if line is None:
                return {}
            here = _cut(_cut(line, 0, head, 1)[0], 0, start - first + n - plan.tile, plan.tile + plan.cut_block)
            return {"line": distances.block(here, plan.tile)}

        return _tile(plan, rows, keys, mine, by_distance, limits)

    if group * tiles == 1:
        results = [x[None] for x in tile((0, {name: x[0] for name, x in rows.items()}))]
    else:
        results = lax.map(tile, (jnp.arange(group * tiles), rows))
    if n != plan.n:
        results = [x.reshape(group, n, *x.shape[2:])[:, : plan.n] for x in results]
    return tuple(x.reshape(group * plan.n, *x.shape[2:]) for x in results)


def _fill(x, axis, size, value=0):
    """``value`` at the end of an axis up to ``size``."""
    missing = size - x.shape[axis]
    sides = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, sides, constant_values=value) if missing else x


def _cut(x, axis, start, size):
    """The part of that start and size, or all where one place stands for every."""
    return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, size, axis)


def _tile(plan, rows, keys, pairs, by_distance, limits):
    limited = "low" in rows or "high" in rows
    rows, low, high = _bounded(rows, limits, plan.m)
    lowest, inner_lowest, inner_highest, highest = low.min(), low.max(), high.min(), high.max()
    span = plan.cut_blocks * plan.cut_block
    first = jnp.clip(lowest, 0, len(keys["key"]) - span)
    keys = {name: x if len(x) == span else lax.dynamic_slice_in_dim(x, first, span) for name, x in keys.items()}
    keys = {name: x.reshape(plan.cut_blocks, plan.cut_block, -1) for name, x in keys.items()}
    keys = {name: x.swapaxes(1, 2) if name[0] == "d" else x for name, x in keys.items()}  # for the backward pass's products

    @partial(jax.checkpoint, prevent_cse=False)
    def block(carry, given):
        number, keys = given
        start = first + number * plan.cut_block
        end = start + plan.cut_block

        def inside():
            return _along(carry, rows, keys, by_distance(start), limits, None)

        def cut():
            here = {name: _cut(x, 1, start, plan.cut_block) for name, x in pairs.items()} | by_distance(start)
            return _masked_step(_along, carry, rows, keys, here, limits, (low, high, start, start), plan.gaps)

        if not limited:
            return (cut() if pairs else inside()), None
        some, whole = (lowest < end) & (start < highest), (inner_lowest <= start) & (end <= inner_highest)
        if pairs or "segment" in rows:
            return lax.cond(some, cut, lambda: carry), None
        return lax.switch(jnp.where(some, jnp.where(whole, 1, 2), 0), [lambda: carry, inside, cut]), None

    carry = _zeros((plan.tile, 1), limits), _zeros((plan.tile, keys["value"].shape[-1]), limits)
    if plan.cut_blocks == 1:
        carry, _ = block(carry, (0, {name: x[0] for name, x in keys.items()}))
    else:
        carry, _ = lax.scan(block, carry, (jnp.arange(plan.cut_blocks), keys))
    sums, total = carry
    return total - sums * rows["output"], sums[:, 0]
