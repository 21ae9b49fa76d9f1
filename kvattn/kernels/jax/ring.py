"""Attention over a sequence that JAX's devices share: keys and values go round the ring of devices, the queries stay.

With o_s and l_s the output and the log-sum-exp of a device's queries beside the keys that came from device s,

    output = sum_s exp(l_s - l) o_s      l = log sum_s exp(l_s)

which is `merge_attention`, done as they come. Each (o_s, l_s) is the tab's own, by whichever kernel serves it. The gradient
goes round once more: with G that of the output, and H that of l, device s takes w_s G and w_s (G . (o_s - output) + H) back,
w_s = exp(l_s - l), so that no device ever holds the keys of two others.

Causal, a device's queries are the chunks i and 2 P - 1 - i of 2 P, so that all P of them have the same number of pairs to
work through at each step. A window's keys travel no further than it reaches.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context"; the order of chunks: Brandon
et al. 2023, "Striped Attention", as zig-zag in Zhu's ring-flash-attention; Milakov and Gimelshein 2018.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kvattn import planning, registry
from kvattn.call import Call
from kvattn.kernels.jax import placement, programs, tiles


class Ring(NamedTuple):
    """What becomes part of a program: the axis of the mesh and its devices, and who meets what."""

    axis: str | None
    size: int  # 1 also where the sequence is spread over no axis
    parts: int  # chunks of the sequence that each device holds: 2 in zig-zag order
    runs: tuple[tuple[int, int, int], ...]  # (first hop, step, stops): keys are of the device so many hops behind
    closed: bool  # whether the last device sends to the first
    call: Call  # without its arrays


def plan(axis: str | None, size: int, call: Call, n: int, m: int) -> Ring:
    """Which device meets whose keys."""
    near = {name: _near(x) for name in ("query_offset", "left", "right") if type(x := getattr(call, name)) is int}
    call = call._replace(**near)
    if call.right is not None and call.left is None and size > 1:
        return Ring(axis, size, 2, ((0, 1, size),), True, call)
    ring = Ring(axis, size, 1, ((0, 1, size),), True, call)
    if not call.windowed or type(call.query_offset) is not int:
        return ring
    rows, columns = -(-n // size), -(-m // size)
    first = np.arange(size)[:, None] * rows + call.query_offset  # of each device's queries, beside those of its keys
    start = np.arange(size) * columns
    reached = np.ones((size, size), bool)
    if call.left is not None:
        reached &= start + columns - 1 >= first - call.left
    if call.right is not None:
        reached &= start <= first + rows - 1 + call.right
    hops = [int(i) - int(j) for i, j in zip(*reached.nonzero(), strict=True)]
    ahead, behind = max([0, *hops]), -min([0, *hops])
    if ahead + behind >= size - 1:
        return ring
    return ring._replace(runs=((0, 1, ahead + 1), (-1, -1, behind))[: 1 + (behind > 0)], closed=False)


def _near(x):
    """An int no further from 0 than positions go within 32 bits."""
    return max(-tiles.FARTHEST, min(x, tiles.FARTHEST))


# ---- the whole arrays


@programs.exact
@partial(jax.jit, static_argnums=(0, 1, 2))
def run(ring, mesh, names, given):
    """What the call returns, as one program."""
    given, query = dict(given), given["query"]
    n, (score, sink) = query.shape[-2], (given.pop(name, None) for name in ("score", "sink"))
    sizes = _padded(ring, names[:1], given)
    placed = {name: _placed(ring, names, sizes, name, x) for name, x in given.items()}
    output, lse = _spread(ring, mesh, names, placed, score)
    if sizes["n"] != n:
        if _explicit(mesh):  # what devices do not divide cannot be spread over them
            output, lse = (jax.sharding.reshard(x, NamedSharding(mesh, P(*names))) for x in (output, lse))
        output, lse = output[..., :n, :], lse[..., :n]
    if sink is not None:
        left, lse = registry.load("jax")._left(lse, sink, query.ndim)
        output = left * output
    output = output.astype(query.dtype)
    return (output, lse) if ring.call.return_lse else output


def _padded(ring, batch, given):
    """n and m, padded to what the devices divide; nobody may attend to the padding, as ``given`` says afterwards."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    n, m, lead = query.shape[-2], key.shape[-2], planning.lead(query.shape, key.shape)
    if any(size not in (1, own) for size, own in zip(value.shape[:-3], lead, strict=False)):
        given["key"] = jnp.broadcast_to(key, (*value.shape[:-2], *key.shape[-2:]))  # values widen a batch axis
    unit = ring.parts * ring.size
    sizes = {"n": -(-n // unit) * unit, "m": -(-m // unit) * unit}
    if sizes != {"n": n, "m": m}:
        lens = jnp.minimum(given.get("valid_lens", jnp.full(lead[:1], m, np.int32)), m)
        if sizes["n"] != n and lens.ndim == len(batch):  # nor does the padding attend
            lens = jnp.broadcast_to(lens[..., None], (*lens.shape, n))
        given["valid_lens"] = lens
    return sizes


def _placed(ring, names, sizes, name, x):
    """An array, padded to ``sizes``, and its PartitionSpec."""
    batch = names[:1]
    if name in ("valid_lens", "query_offset"):
        each = x.ndim > len(batch)  # a length for each query
        return (_filled(x, -1, sizes["n"]), P(*batch, ring.axis)) if each else (x, P(*batch[: x.ndim]))
    x, rows, columns = x.reshape(*[1] * (2 - x.ndim), *x.shape), True, None
    if name in ("mask", "bias"):
        rows, columns = x.shape[-2] != 1, sizes["m"] if x.shape[-1] != 1 else None
    x = _filled(x, -2, sizes["m" if name in ("key", "value") else "n"]) if rows else x
    x = _filled(x, -1, columns) if columns else x
    named = zip(names[len(names) + 2 - x.ndim :], x.shape[:-2], strict=True)
    return x, P(*(axis if size > 1 else None for axis, size in named), ring.axis if rows else None, None)


def _spread(ring, mesh, names, placed, score):
    """The output and lse of padded queries, each device working on its part."""
    arrays, specs = {name: x for name, (x, _) in placed.items()}, {name: spec for name, (_, spec) in placed.items()}
    if explicit := _explicit(mesh):  # whose types say how arrays lie
        typed = {name: P(*(x if x in explicit else None for x in spec)) for name, spec in specs.items()}
        arrays = {name: jax.sharding.reshard(x, NamedSharding(mesh, typed[name])) for name, x in arrays.items()}
    manual, rows = {ring.axis, *names} - {None}, P(*names, ring.axis)
    return jax.shard_map(
        partial(_on_a_device, ring), mesh=mesh, in_specs=(specs, P()), out_specs=(P(*rows, None), rows), axis_names=manual
    )(arrays, score)


def _explicit(mesh):
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}


def _filled(x, axis, size):
    """Zeros at the end of an axis, up to this size."""
    more = size - x.shape[axis]
    return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)]) if more else x


# ---- on one device


def _on_a_device(ring, given, score):
    """The output and lse of a device's own queries, in the order in which they came."""
    batch = int(given["query"].ndim > 2)
    along = frozenset().union(*(tiles._varying(x) for x in given.values()))
    given, score = jax.tree.map(lambda x: placement.vary(jnp.asarray(x), along), (given, score))

    def parts(name, x):
        if name in ("valid_lens", "query_offset"):
            axis = -1 if x.ndim > batch else None
        else:
            axis = None if name in ("mask", "bias") and x.shape[-2] == 1 else -2
        return jnp.broadcast_to(x, (ring.parts, *x.shape)) if axis is None else _parts(ring, x, axis)

    cut = {name: parts(name, x) for name, x in given.items()}
    keys = {name: cut.pop(name) for name in ("key", "value")}
    rows = {name: cut.pop(name) for name in ("query", "bias") if name in cut}
    output, lse = _attend(ring, rows, keys, score, cut)
    return _joined(ring, output, -2), _joined(ring, lse, -1)


def _number(ring, device, part):
    """Which chunk of the sequence is this part of a device's."""
    if ring.parts == 1:
        return device
    return jnp.where((device - part) % 2 == 0, device, 2 * ring.size - 1 - device)  # its even chunk, then its odd one


def _owners(ring, part):
    """(from, to): who is sent this half of what each device has of the sequence in its usual order."""
    chunks = [2 * device + part for device in range(ring.size)]
    return [(chunk // 2, min(chunk, 2 * ring.size - 1 - chunk)) for chunk in chunks]


def _parts(ring, x, axis):
    """The chunks that a device works on, as the first axis."""
    if ring.parts == 1:
        return x[None]
    halves = jnp.split(x, 2, axis=axis)
    return jnp.stack([lax.ppermute(half, ring.axis, _owners(ring, part)) for part, half in enumerate(halves)])


def _joined(ring, x, axis):
    """The inverse of _parts."""
    if ring.parts == 1:
        return x[0]
    senders = [[(j, i) for i, j in _owners(ring, part)] for part in range(2)]
    return jnp.concatenate([lax.ppermute(x[part], ring.axis, senders[part]) for part in range(2)], axis=axis)


def _sent(ring, x, hops, closed=True):
    """What the device so many hops behind holds; zeros where there is none, unless the last one is behind the first."""
    pairs = [(i, (i + hops) % ring.size) for i in range(ring.size) if closed or 0 <= i + hops < ring.size]
    return lax.ppermute(x, ring.axis, pairs) if hops % ring.size else x


def _around(ring, visit, own, keys, left):
    """``own`` after ``visit`` of it and the keys of each device that is reached, one after the other; and what travelled along.

    ``visit``: (own, keys, left, hop) -> (own, left). ``left`` begins so, travels with the keys and is brought home.
    """
    home = []
    for first, step, stops in ring.runs:

        def stop(state, hop, step=step):
            own, keys, left = state
            own, left = visit(own, keys, left, hop)
            return (own, _sent(ring, keys, step, ring.closed), _sent(ring, left, step)), None

        last, state = first + step * (stops - 1), (own, _sent(ring, keys, first, ring.closed), left)
        if stops > 1:
            state, _ = lax.scan(stop, state, first + step * jnp.arange(stops - 1, dtype=jnp.int32))
        own, travelled = visit(*state, jnp.int32(last))
        home.append(_sent(ring, travelled, -last))
    return own, home


def _pairs(ring, limits, keys, rows, hop, work, state):
    """``state`` after ``work(state, i, j, row, column)`` of each part i of the queries and j of the keys that some of its
    queries may attend to; row and column are where both begin."""
    device = lax.axis_index(ring.axis) if ring.size > 1 else jnp.int32(0)
    behind = device - hop
    source = behind % ring.size if ring.closed else behind
    n, m = rows["query"].shape[-2], keys["key"].shape[-2]

    def one(state, at):
        i, j = at
        row, column = _number(ring, device, i) * n, _number(ring, source, j) * m
        here = _at(limits, i)
        conditions = [] if ring.closed else [(behind >= 0) & (behind < ring.size)]
        if ring.call.windowed:
            first = row + here.get("query_offset", ring.call.query_offset)
            if ring.call.left is not None:
                conditions.append(column + m - 1 >= first - ring.call.left)
            if ring.call.right is not None:
                conditions.append(column <= first + n - 1 + ring.call.right)
        if "valid_lens" in here:
            lens = here["valid_lens"]
            conditions.append(column < (lens.max(axis=-1) if lens.ndim > (rows["query"].ndim > 3) else lens))
        if not conditions:
            return work(state, i, j, row, column), None
        needed = reduce(jnp.logical_and, conditions).any()
        return lax.cond(needed, lambda state: work(state, i, j, row, column), lambda state: state, state), None

    if ring.parts == 1:
        return one(state, (0, 0))[0]
    return lax.scan(one, state, (jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])))[0]


def _at(x, i):
    """Part i of each array."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), x)


def _add(x, more, i):
    """The sums with more in their part i."""
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, i, keepdims=False) + y, i, 0), x, more
    )


def _part(ring, here, rows, keys, score, row, column):
    """The output and lse of one part of the queries beside one part of the keys, by the tab's own kernels."""
    m = keys["key"].shape[-2]
    changed = {"return_lse": True}
    for name, x in {**here, **rows}.items():
        if name in ("mask", "bias"):
            changed[name] = x if x.shape[-1] == 1 else lax.dynamic_slice_in_dim(x, column, m, axis=-1)
        elif name == "valid_lens":
            changed[name] = x - column
    if ring.call.windowed:
        changed["query_offset"] = here.get("query_offset", ring.call.query_offset) + row - column
    if score is not None:
        changed["score"] = score
    arrays, call = (rows["query"], keys["key"], keys["value"]), ring.call._replace(**changed)
    return registry.load("jax").attention(*arrays, **call.keywords)


def _wide(x):
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, rows, keys, score, limits):
    """The output and lse of the device's parts, in float32 for half precision. rows: query, bias; keys: key, value; limits:
    mask, valid_lens, query_offset; all with an axis of parts before the others."""

    def visit(sums, keys, left, hop):
        def work(sums, i, j, row, column):
            output, lse = _part(ring, _at(limits, i), _wide(_at(rows, i)), _wide(_at(keys, j)), score, row, column)
            top, weight, total = _at(sums, i)
            new = jnp.maximum(top, lse)
            shift = jnp.where(new == -math.inf, 0, new)
            fade, share = jnp.exp(top - shift), jnp.exp(lse - shift)
            part = jnp.where(share[..., None] == 0, 0, share[..., None] * output)
            changed = new, fade * weight + share, fade[..., None] * total + part
            return tuple(lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(sums, changed, strict=True))

        return _pairs(ring, limits, keys, rows, hop, work, sums), left

    query, value = rows["query"], keys["value"]
    shape = (ring.parts, *planning.lead(query.shape[1:], keys["key"].shape[1:]), query.shape[-2])
    zeros = _zeros(shape, query)
    sums = zeros - math.inf, zeros, _zeros((*shape, value.shape[-1]), query)
    (top, weight, total), _ = _around(ring, visit, sums, keys, ())
    empty = weight == 0
    weight = jnp.where(empty, 1, weight)
    return total / weight[..., None], jnp.where(empty, -math.inf, top + jnp.log(weight))


def _zeros(shape, like):
    return placement.vary(jnp.zeros(shape, jnp.promote_types(like.dtype, jnp.float32)), tiles._varying(like))


def _attend_fwd(ring, rows, keys, score, limits):
    output, lse = _attend(ring, rows, keys, score, limits)
    return (output, lse), (rows, keys, score, limits, output, lse)


def _attend_bwd(ring, kept, grads):
    rows, keys, score, limits, output, lse = kept
    grad, grad_lse = grads
    along = (grad * output).sum(axis=-1) - grad_lse

    def visit(own, keys, left, hop):
        def work(state, i, j, row, column):
            (d_rows, d_score), d_keys = state

            def part(rows, keys, score):
                return _part(ring, _at(limits, i), rows, keys, score, row, column)

            (output, part_lse), vjp = jax.vjp(part, _wide(_at(rows, i)), _wide(_at(keys, j)), score)
            grad_i, along_i, lse_i = _at((grad, along, lse), i)
            share = jnp.where(part_lse == -math.inf, 0, jnp.exp(part_lse - lse_i))
            more_rows, more_keys, more_score = vjp(
                (share[..., None] * grad_i, share * ((grad_i * output).sum(axis=-1) - along_i))
            )
            return (_add(d_rows, more_rows, i), jax.tree.map(jnp.add, d_score, more_score)), _add(d_keys, more_keys, j)

        return _pairs(ring, limits, keys, rows, hop, work, (own, left))

    d_rows, d_keys, d_score = jax.tree.map(lambda x: _zeros(x.shape, x), (rows, keys, score))
    (d_rows, d_score), home = _around(ring, visit, (d_rows, d_score), keys, d_keys)
    d_keys = jax.tree.map(lambda *x: reduce(jnp.add, x), *home)
    return *jax.tree.map(lambda x, y: y.astype(x.dtype), (rows, keys, score), (d_rows, d_keys, d_score)), None


_attend.defvjp(_attend_fwd, _attend_bwd)
