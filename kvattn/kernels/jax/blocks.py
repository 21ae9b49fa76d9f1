"""Attention in blocks of queries, one after another:

    attention(Q)[i : i + s] = attention(Q[i : i + s])

where the scores of all, and the features of which a score is made, would fill the memory. Derivatives compute each block again.

Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvattn import planning
from kvattn.kernels.jax import dropout

PAIRS = 2**22  # numbers that are held at one time: scores, and their features
PAIRS_GPU = 2**26  # where smaller blocks would not keep the device busy


def plan(score, query, key):
    """Blocks of queries, as `planning.memory_blocks`; [] where one block is all, or sizes are unknown (jax.export)."""
    if any(type(size) is not int for size in (*query.shape, *key.shape)):
        return []
    return planning.memory_blocks(score, query.shape, key.shape, PAIRS if jax.default_backend() == "cpu" else PAIRS_GPU)


def attention(attend, query, key, value, call, steps):
    """What ``attend`` returns for all queries, made of what it returns for each block.

    A score of one's own is run as it is, a block at a time, where its arguments are known; else it is traced once for all.
    """
    n, size = query.shape[-2], steps[0][1]
    count = n // size  # whole blocks; what is left is a smaller one
    each = {"query": (query, -2)}  # what each query has of its own, and the axis of queries
    if call.lengths_per_query(query.ndim):
        each["valid_lens"] = (call.valid_lens, -1)
    for name in ("mask", "bias"):
        x = getattr(call, name)
        if getattr(x, "ndim", 0) > 1 and x.shape[-2] == n:
            each[name] = (x, -2)
    rngs = dropout.of_blocks(call.rng, len(steps))

    def block(i, own, rng):
        query, own = own["query"], {name: x for name, x in own.items() if name != "query"}
        places = {"query_offset": call.query_offset + i * size, "first_query": call.first_query + i * size}
        here = call._replace(**places, rng=call.rng if rng is None else rng, **own)
        results = attend(query, key, value, here)
        return results if isinstance(results, tuple) else (results,)

    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((query, key, value, call)))
    stacked = {name: _stacked(*at, count, size) for name, at in each.items()}
    blocks = (jnp.arange(count), stacked, None if rngs is None else rngs[:count])
    parts = jax.lax.map(_checkpointed(block), blocks) if traced else _one_by_one(block, blocks, count)
    axes = [-2 if x.ndim > query.ndim else -1 for x in parts]  # lse has no features
    results = [_side_by_side(x, axis) for x, axis in zip(parts, axes, strict=True)]
    if count < len(steps):
        rest = {name: jax.lax.slice_in_dim(x, count * size, n, axis=x.ndim + axis) for name, (x, axis) in each.items()}
        last = block(count, rest, None if rngs is None else rngs[count])
        results = [jnp.concatenate(x, axis=axis) for *x, axis in zip(results, last, axes, strict=True)]
    return tuple(results) if len(results) > 1 else results[0]


def _checkpointed(block):
    """``block``, of one argument, that keeps nothing for its derivatives but its arguments."""
    inner = jax.checkpoint(block, prevent_cse=False)
    return lambda xs: inner(*xs)


def _one_by_one(block, blocks, count):
    parts = [jax.block_until_ready(block(*jax.tree.map(lambda x, i=i: x[i], blocks))) for i in range(count)]
    return [jnp.stack(x) for x in zip(*parts, strict=True)]


def _stacked(x, axis, count, size):
    """The whole blocks of an array along an axis, as a new first axis."""
    axis = x.ndim + axis
    x = jax.lax.slice_in_dim(x, 0, count * size, axis=axis)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _side_by_side(x, axis):
    """The inverse of _stacked."""
    axis = x.ndim + axis
    return jnp.moveaxis(x, 0, axis - 1).reshape(*x.shape[1:axis], x.shape[0] * x.shape[axis], *x.shape[axis + 1 :])
