"""Attention where something is not finite: every query alone, with keys and values of its own:

    attention(Q, K, V)[i] = attention(Q[i], K where i may attend, else 0, V where i may attend, else 0)

In products of all queries and keys a weight of 0 hides nothing: 0 * NaN is NaN, in results and in gradients. Here what a
query may not attend to is zeros, for that query. No derivative needs a rule of its own: JAX has them all, and they keep
queries apart too.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax.numpy as jnp

from kvattn import planning
from kvattn.kernels.jax import blocks, dropout

_pair_by_pair = ContextVar("pair_by_pair", default=False)


def pair_by_pair():
    """Whether calls are to be computed this way."""
    return _pair_by_pair.get()


@contextmanager
def computed_pair_by_pair(whether=True):
    token = _pair_by_pair.set(whether)
    try:
        yield
    finally:
        _pair_by_pair.reset(token)


def attention(tab, query, key, value, call, steps=()):
    """What ``tab._attend`` returns, in blocks of queries, since n * m * d numbers would fill the memory.

    Each block draws its dropout from a key of its own, so that the draws are others than those of a call where all is finite.
    """
    features = max(1, query.shape[-1], value.shape[-1])
    steps = planning.memory_blocks(call.score, query.shape, key.shape, max(1, blocks.PAIRS // features))
    attend = partial(_alone, tab)
    return blocks.attention(attend, query, key, value, call, steps) if steps else attend(query, key, value, call)


def _alone(tab, query, key, value, call):
    lead, n, m = planning.lead(query.shape, key.shape), query.shape[-2], key.shape[-2]
    allowed = tab._allowed(n, jnp.arange(m), query.ndim, call)
    mask, bias = (None if x is None else jnp.broadcast_to(x, (*lead, n, m))[..., None, :] for x in (allowed, call.bias))
    rng = dropout.of_selected(call, jnp.broadcast_to(jnp.arange(m), (*lead, n, m)))
    query = jnp.broadcast_to(query, (*lead, n, query.shape[-1]))[..., None, :]  # (..., n, 1, d)
    key, value = (_for_each(n, tab._spread(x, lead)) for x in (key, value))  # (..., n, m, d), (..., n, m, v)
    with computed_pair_by_pair(False):
        return call.without_query_axis(tab._attend(query, key, value, call.of_selected_keys(mask, bias, rng)))


def _for_each(n, x):
    return jnp.broadcast_to(x[..., None, :, :], (*x.shape[:-2], n, *x.shape[-2:]))
