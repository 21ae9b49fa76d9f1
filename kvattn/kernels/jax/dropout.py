"""Which pairs an int rng keeps (kvattn/patterns.py), in pairs of uint32: JAX has no 64 bits unless it is told to."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import patterns
from kvattn.patterns import Wide, drawn, is_seed


def seed(rng):
    """A seed as a program takes it; whatever else as it is."""
    if isinstance(rng, Wide) or not is_seed(rng):
        return rng
    if isinstance(rng, int):
        return Wide(np.uint32(rng >> 32), np.uint32(rng & 0xFFFFFFFF))
    signs = jnp.zeros_like(rng) if rng.dtype.kind == "u" else rng >> min(31, 8 * rng.dtype.itemsize - 1)
    return Wide((rng >> 32 if rng.dtype.itemsize == 8 else signs).astype(jnp.uint32), rng.astype(jnp.uint32))


def kept(weights, call):
    """Which of the weights (..., n, m) are kept, bool."""
    if not is_seed(call.rng):
        return call.rng
    *lead, n, m = weights.shape
    found = _kept(_rows(call, lead, n), call.first_key + jnp.arange(m), call.dropout)
    return found.reshape(weights.shape)


def of_selected(call, index):
    """What takes the place of rng where each query lies beside keys of its own, ``index`` (*lead, n, s)."""
    if not (call.dropout and is_seed(call.rng)):
        return call.rng
    *lead, n, _ = index.shape
    rows = Wide(*(x.reshape(*lead, n) for x in _rows(call, lead, n)))
    return _kept(rows, call.first_key + index, call.dropout)[..., None, :]


def of_blocks(rng, count):
    """What each of so many blocks draws from: of JAX's own keys, another each, or it would drop the same pairs; else None."""
    return None if rng is None or drawn(rng) else jax.random.split(rng, count)


def _kept(rows, keys, rate):
    """Each pair computes the word that it shares with three others: XLA makes one loop of that, and no array of words."""
    word, at = _number(keys // patterns.PER_WORD), keys % patterns.PER_WORD
    high, low = _output(Wide(*(x[..., None] for x in rows)), word)
    bits = jnp.where(at < 2, low, high) >> (at % 2 * patterns.BITS).astype(jnp.uint32) & _uint32(patterns.VALUES - 1)
    return bits >= _uint32(patterns.threshold(rate))


def _rows(call, lead, n):
    """The states of the rows: (batch * heads, n)."""
    heads = _output(seed(call.rng), _number(jnp.arange(math.prod(lead))))
    return _output(Wide(*(x[:, None] for x in heads)), _number(call.first_query + jnp.arange(n)))


def _number(x):
    return Wide(_uint32(0), x.astype(jnp.uint32))


def _output(states, number):
    z = _sum(states, _product(_sum(number, Wide(_uint32(0), _uint32(1))), patterns.STEP))
    for shift, factor in patterns.MIX:
        z = _product(_xor_shifted(z, shift), factor)
    return _xor_shifted(z, patterns.LAST)


def _sum(x, y):
    low = x.low + y.low
    return Wide(x.high + y.high + (low < x.low), low)


def _product(x, factor):
    """x times an int, modulo 2^64."""
    high, low = _uint32(factor >> 32), _uint32(factor & 0xFFFFFFFF)
    return Wide(_high(x.low, factor & 0xFFFFFFFF) + x.low * high + x.high * low, x.low * low)


def _high(x, factor):
    """The upper 32 bits of a product of uint32 with an int below 2^32: of four products of halves."""
    low, high, half = _uint32(factor & 0xFFFF), _uint32(factor >> 16), _uint32(0xFFFF)
    middle = (x >> 16) * low + ((x & half) * low >> 16)
    other = (x & half) * high + (middle & half)
    return (x >> 16) * high + (middle >> 16) + (other >> 16)


def _xor_shifted(z, by):
    """z ^ z >> by, by less than 32."""
    return Wide(z.high ^ z.high >> by, z.low ^ (z.low >> by | z.high << 32 - by))


def _uint32(x):
    return np.uint32(x)


def derived(rng, number):
    """The seed of part ``number`` of a layer."""
    return patterns.derived(rng, number) if type(rng) is int else _output(seed(rng), _number(jnp.asarray(number)))
