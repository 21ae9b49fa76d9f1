"""One query beside many keys, on a CUDA device: softmax(scale * query @ key.T) @ value in parts of the keys, side by side.

Each part keeps its running maximum and the sums of exp(scores) and of exp(scores) @ value under it, in float32; XLA puts the
parts together. All query heads that share a key head are rows of one product. Keys beyond the lengths are not read, so that
nothing has to be hidden before. In Triton, through JAX's Pallas.

Source: Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference"; jax.experimental.pallas.ops.gpu has
another.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

FEWEST = 2048  # keys that a kernel of its own is worth
BLOCK, WARPS, STAGES = 128, 4, 2  # keys of a block; of five ways the fastest on an H200, at 128 features
PROGRAMS = 512  # of parts and key heads together, which keep the device busy
ROWS = 16  # of a product, at least
INTERPRET = False  # tests run the kernel without a device


def serves(query, key):
    """Whether the kernel is worth its launch; the rest is as cuDNN takes it.

    XLA knows how to split cuDNN's calls between devices, not this one: where there are several, it gathers all keys.
    """
    d, group = query.shape[-1], query.shape[1] // key.shape[1]
    return query.shape[-2] == 1 and key.shape[-2] >= FEWEST and d >= 16 and d & (d - 1) == 0 and group <= 64 and _alone()


def _alone():
    return jax.device_count() == 1


def attention(query, key, value, lens, scale):
    """(batch, h, 1, d), keys and values (batch, kv_heads, m, d), lens (batch,) from 0 to m: (batch, h, 1, d)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (batch, heads, _, d), (kv_heads, m) = query.shape, key.shape[1:3]
    count, group = batch * kv_heads, heads // kv_heads
    parts = max(1, min(PROGRAMS // count, -(-m // (2 * BLOCK))))
    size = -(-m // (parts * BLOCK)) * BLOCK  # keys of a part
    kernel = partial(_part, pl, triton, scale=scale, size=size, rows=max(ROWS, 1 << (group - 1).bit_length()))

    def each(*axes):  # what a program is given of an array: its key head's
        return pl.BlockSpec((None, *axes), lambda head, part: (head, *[0] * len(axes)))

    def every(*axes):  # what it writes: its part's
        return pl.BlockSpec((None, None, *axes), lambda head, part: (head, part, *[0] * len(axes)))

    def made(*axes):
        return jax.ShapeDtypeStruct((count, parts, *axes), jnp.float32)

    total, sums, top = pl.pallas_call(
        kernel,
        grid=(count, parts),
        in_specs=[each(), each(group, d), each(m, d), each(m, d)],
        out_specs=[every(group, d), every(group), every(group)],
        out_shape=[made(group, d), made(group), made(group)],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=INTERPRET,
        name="decoding",
    )(jnp.repeat(lens, kv_heads), query.reshape(count, group, d), key.reshape(count, m, d), value.reshape(count, m, d))
    fade = jnp.exp(top - top.max(axis=1, keepdims=True))
    sums, total = (sums * fade).sum(axis=1), (total * fade[..., None]).sum(axis=1)
    return (total / jnp.where(sums == 0, 1, sums)[..., None]).reshape(query.shape).astype(query.dtype)


def _part(pl, triton, lens, query, key, value, total, sums, top, *, scale, size, rows):
    """One part of one key head's keys."""
    group, d = query.shape
    start = pl.program_id(1) * size
    end = jnp.minimum(start + size, lens[()])
    mine = jnp.arange(rows) < group
    dot = partial(lax.dot, preferred_element_type=jnp.float32)
    q = triton.load(query.at[pl.ds(0, rows), :], mask=mine[:, None], other=0.0)

    def step(i, carry):
        highest, sums, total = carry
        at = start + i * BLOCK
        inside = at + jnp.arange(BLOCK) < end
        k, v = (triton.load(x.at[pl.ds(at, BLOCK), :], mask=inside[:, None], other=0.0) for x in (key, value))
        scores = jnp.where(inside, dot(q, k.T) * scale, -jnp.inf)
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights, fade = jnp.exp(scores - new[:, None]), jnp.exp(highest - new)
        total = fade[:, None] * total + dot(weights.astype(v.dtype), v)
        return new, fade * sums + weights.sum(axis=-1), total

    none = jnp.zeros(rows, jnp.float32)
    first = none + jnp.finfo(jnp.float32).min, none, jnp.zeros((rows, d), jnp.float32)
    blocks = lax.div(jnp.maximum(end - start, 0) + (BLOCK - 1), jnp.int32(BLOCK))  # with 64 bits on, pl.cdiv's are of two sizes
    found = lax.fori_loop(0, blocks, step, first)
    for place, x in zip((top, sums), found, strict=False):
        triton.store(place.at[pl.ds(0, rows)], x, mask=mine)
    triton.store(total.at[pl.ds(0, rows), :], found[2], mask=mine[:, None])
