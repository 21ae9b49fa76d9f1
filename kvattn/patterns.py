"""The pattern of dropout that an int ``rng`` draws: the same pairs in every framework, whatever the blocks, threads or dtype.

The numbers are those of SplitMix64, all modulo 2^64: of the stream seeded s, output number k = 0, 1, ... is

    output(s, k) = mix(s + (k + 1) * 0x9E3779B97F4A7C15)
    mix(z):  z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9;  z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31

Each output can be had without those before it, and outputs seed streams of their own, from the seed down to the pairs:

    head = output(seed, b * heads + h)    row = output(head, i)    word = output(row, j // 4)

for batch entry b (its place among all batch axes together), head h of so many ``heads``, query i and key j; without a batch or
heads b or h is 0, so that (b, n, d) is as (b, 1, n, d), and (h, n, d) as (1, h, n, d). The weight of the pair (i, j) is dropped
where the 16 bits of its word from bit 16 * (j % 4) on, as a number, are less than T = round(2^16 * rate); the others are
divided by 1 - T / 2^16, so that the expected value of the output is the output without dropout, exactly. (A rate is one of
2^16: 0.1 stands for 6554 / 65536; no rate drops all.)

Nothing depends on how many queries, keys or batch entries there are, on blocks, threads or dtypes. SplitMix64 takes two
products for the bits of four pairs, in integers that all five frameworks have; Philox4x32-10, of as good numbers, takes four
times as long.

Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; the constants of mix: Vigna's
splitmix64.c, after Stafford's variant 13.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from kvattn import conversion

STEP = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # (shift, factor), and at last
LAST = 31  # a shift alone
BITS, VALUES, PER_WORD = 16, 65536, 4  # bits of a pair, and values of these, pairs of a word
WORDS = 2**13  # that are made at one time, and lie in the cache

Array = np.ndarray


class Wide(NamedTuple):
    """A seed, or another number of 64 bits, where a framework has 32: high * 2^32 + low."""

    high: Any
    low: Any


def is_seed(rng: Any) -> bool:
    """Whether ``rng`` is a seed: an int, or an array () of an integer dtype."""
    if type(rng) in (int, Wide):
        return True
    return hasattr(rng, "dtype") and tuple(rng.shape) == () and conversion.dtype_name(rng) in conversion.INTEGERS


def drawn(rng: Any) -> bool:
    """Whether the pattern is a seed's: ``rng`` is one, or, where each query has keys of its own, the pairs it keeps, bool."""
    return is_seed(rng) or (hasattr(rng, "dtype") and conversion.dtype_name(rng).startswith("bool"))


def threshold(rate: float) -> int:
    """The bits from which on a pair is kept; never all are dropped.

    >>> threshold(0.1), threshold(0.5)
    (6554, 32768)
    """
    return min(round(rate * VALUES), VALUES - 1)


def exact(rate: float) -> float:
    """The share of pairs that a seed drops for this rate.

    >>> exact(0.5)
    0.5
    """
    return threshold(rate) / VALUES


def derived(seed: Any, number: int) -> int:
    """The seed of part ``number`` of what has this seed: output(seed, number).

    >>> derived(0, 0) == 0xE220A8397B1DCDAF
    True
    """
    return int(_output(np.array([int(seed) % 2**64], np.uint64), np.array([number], np.uint64))[0])


def kept(shape: tuple[int, ...], call: Any) -> Array:
    """Which weights of (..., n, m) are kept, bool: those of a block, whose call says where it begins."""
    *lead, n, m = shape
    return kept_of_rows(_rows(call, lead, n), call.first_key, m, call.dropout).reshape(shape)


def rows(call: Any, lead: tuple[int, ...], n: int) -> Array:
    """The states of the rows (*lead, n), for `kept_of_rows`."""
    return _rows(call, [*lead], n).reshape(*lead, n)


def kept_of_rows(states: Array, first_key: int, m: int, rate: float) -> Array:
    """Which weights (..., m) of these rows (...) are kept, from a key on."""
    rows, shape = states.reshape(-1, 1), (*states.shape, m)
    start, end = first_key // PER_WORD, -(-(first_key + m) // PER_WORD)
    steps, skip = np.arange(start + 1, end + 1, dtype=np.uint64) * np.uint64(STEP), first_key % PER_WORD
    found, least = np.empty((len(rows), m), bool), threshold(rate)
    size = max(1, WORDS // max(len(steps), 1))
    words, shifted = np.empty((2, min(size, len(rows)), len(steps)), np.uint64)
    for i in range(0, len(rows), size):
        some = rows[i : i + size]
        z, at = words[: len(some)], shifted[: len(some)]
        _mix(np.add(some, steps, out=z), at)
        bits = z.astype("<u8", copy=False).view("<u2")
        np.greater_equal(bits[:, skip : skip + m], least, out=found[i : i + size])
    return found.reshape(shape)


def kept_of_selected(index: Array, call: Any) -> Array:
    """Which of the weights of the keys ``index`` (*lead, n, s) are kept."""
    *lead, n, _ = index.shape
    rows, keys = _rows(call, lead, n).reshape(*lead, n, 1), (index + call.first_key).astype(np.uint64)
    words = _output(rows, keys // np.uint64(PER_WORD))
    bits = words >> keys % np.uint64(PER_WORD) * np.uint64(BITS) & np.uint64(VALUES - 1)
    return np.asarray(bits >= threshold(call.dropout))


def _rows(call: Any, lead: list[int], n: int) -> Array:
    """The states of the rows: (batch * heads, n)."""
    heads, queries = (np.arange(x, dtype=np.uint64) for x in (math.prod(lead), n))
    states = _output(np.full(1, int(call.rng) % 2**64, np.uint64), heads)
    return _output(states[:, None], queries + np.uint64(call.first_query))


def _output(states: Array, number: Array) -> Array:
    z: Array = states + (number + np.uint64(1)) * np.uint64(STEP)
    return _mix(z, np.empty_like(z))


def _mix(z: Array, shifted: Array) -> Array:
    """mix(z), in its place."""
    for shift, factor in MIX:
        np.bitwise_xor(z, np.right_shift(z, np.uint64(shift), out=shifted), out=z)
        np.multiply(z, np.uint64(factor), out=z)
    np.bitwise_xor(z, np.right_shift(z, np.uint64(LAST), out=shifted), out=z)
    return z
