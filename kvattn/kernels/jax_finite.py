"""Products over pairs of which some may not attend: 0 * NaN is NaN, so what is not finite takes part only where it is seen.

What may not attend has weight 0 and gradient 0. A product with what is not finite set to 0 then is the product of the other
pairs; the rows that look at it are NaN by their scores, or, for values, by a second product, where the first is not finite.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


@custom_vmap
def _all_finite(*arrays):
    # sums of columns, which XLA adds several at a time; 0 * NaN and 0 * inf are NaN
    return jnp.stack([jnp.isfinite((0 * x).sum(axis=range(x.ndim - 1))).all() for x in arrays]).all()


@_all_finite.def_vmap
def _(size, batched, *arrays):  # of all at once: a condition that differs would have both of its branches computed
    return _all_finite(*arrays), False


def all_finite(*arrays):
    """Whether nothing here is NaN or inf: one answer, under vmap too."""
    return _all_finite(*map(jax.lax.stop_gradient, arrays))


@jax.custom_jvp
def finite(x):
    """0 for what is NaN or inf; the derivative goes through all the same."""
    return jnp.where(jnp.isfinite(x), x, 0)


@finite.defjvp
def _(primals, tangents):
    return finite(*primals), tangents[0]


@jax.custom_jvp
def _instead(x, y):
    return y


@_instead.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


def unless(ok, x, repair):
    """``repair(x)`` unless ``ok``, whose derivative is that of ``x``."""
    plain = jax.lax.stop_gradient(x)
    if isinstance(ok, jax.core.Tracer):
        return _instead(x, jax.lax.cond(ok, lambda x: x, repair, plain))
    return x if ok else _instead(x, repair(plain))


@jax.custom_jvp
def dots(query, key):
    """query @ key.T, of which the derivative by a pair that may not attend is 0, whatever the query and the key are."""
    return query @ key.swapaxes(-1, -2)


@dots.defjvp
def _(primals, tangents):
    (query, key), (d_query, d_key) = primals, tangents
    change = d_query @ finite(key).swapaxes(-1, -2) + finite(query) @ d_key.swapaxes(-1, -2)
    return dots(query, key), change


def scores(score, query, key):
    """score(query, key), of which the derivative by a pair that may not attend is 0 too, for any score."""
    clean = finite(query), finite(key)

    def as_given(found):
        either = ~(_row(query)[..., :, None] & _row(key)[..., None, :])
        return jnp.where(either, jax.lax.stop_gradient(score(*map(jax.lax.stop_gradient, (query, key)))), found)

    return unless(all_finite(query, key), score(*clean), as_given)


def _row(x):
    return jnp.isfinite(x).all(axis=-1)


def weighed(product, weights, value, allowed):
    """``product``, of weights and value, over the pairs allowed: of the others' values nothing is seen.

    Weights and their gradients are 0 for the others. Where every sum is finite there was nothing to be seen.
    """

    def repair(_):
        pairs = jnp.broadcast_to(allowed(), weights.shape).astype(weights.dtype)
        reached = product_of(pairs, (~jnp.isfinite(value)).astype(value.dtype))
        return jnp.where(reached > 0, math.nan, product_of(weights, finite(value)))

    product_of = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
    return unless(all_finite(product), product, repair)
