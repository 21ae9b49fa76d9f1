"""A bias by how far a key is ahead of a query, as ALiBi's, from one line of n + m - 1 numbers: bias_ij = line[n - 1 + j - i].

A block (r, c) of it is cut from r copies of r + c numbers of the line, put behind one another, at a stride of one number less:
each row begins one number earlier than the row above it. The copies are written and read in order, which a gather is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Line(NamedTuple):
    """The bias of each distance, (..., n + m - 1), the least first, in the place of a bias (..., n, m)."""

    values: Any

    def whole(self, n, m):
        """(..., n, m)"""
        return self.values[..., np.arange(m) - np.arange(n)[:, None] + n - 1]


def block(line, rows):
    """The bias (..., rows, c) of so many queries, of which the last is beside the first c of these numbers (..., rows + c)."""
    width = line.shape[-1]
    copies = lax.optimization_barrier(jnp.broadcast_to(line[..., None, :], (*line.shape[:-1], rows, width)))
    flat = copies.reshape(*line.shape[:-1], -1)[..., rows - 1 : rows - 1 + rows * (width - 1)]
    return flat.reshape(*line.shape[:-1], rows, width - 1)[..., : width - rows]


def by_distance(serves, line, query, key, value, call):
    """The Line of a call, where its numbers can be read and forbid nothing; else None. ``serves``: whether tiles do."""
    if isinstance(line, jax.core.Tracer) or not serves(query, key, value, call._replace(sink=None)):
        return None
    return Line(line) if np.isfinite(np.asarray(line)).all() else None
