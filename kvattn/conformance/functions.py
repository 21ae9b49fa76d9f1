"""Masks and biases that are functions of positions, by name.

The functions use what integer arrays of every framework offer: a product of bools is "and", which MXNet has no other for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvattn import conversion

MASKS: dict[str, Callable[[Any, Any], Any]] = {
    "causal": lambda q, k: k <= q,
    "window": lambda q, k: abs(q - k) <= 1,  # TensorFlow 2.18 multiplies no bools
    "strictly before": lambda q, k: k < q,
    "first key and window": lambda q, k: abs(q - k) * k <= 2 * k,
    "prefix": lambda q, k: 2 * k <= q + 1 + abs(q - 1),  # k is at most q or 1
    "every other": lambda q, k: (q + k) % 2 == 0,
    "some keys": lambda q, k: k > 1,
    "some queries": lambda q, k: q > 1,
    "nothing": lambda q, k: q + k < -99,
}
BIASES = ("alibi",)


def function(tab: Any, given: Any, **parameters: Any) -> Callable[[Any, Any], Any]:
    """The function of that name, for arrays of ``tab``, of which the parameters are."""
    if given in MASKS:
        return MASKS[given]
    assert given == "alibi", given
    slopes = parameters["slopes"]
    return lambda q, k: -slopes * tab.asarray(abs(q - k), dtype=conversion.dtype_name(slopes), like=slopes)


# ---- for the oracle, in plain numbers


def allows(mask: Any, position: int, j: int) -> bool:
    """Whether the mask of that name lets the query at ``position`` attend to key j."""
    return bool(MASKS[mask](np.array(position), np.array(j)))


def bias_of(given: tuple[str, dict[str, Any]], lead: tuple[int, ...], n: int, m: int, query_offset: Any) -> np.ndarray:
    """The bias (*lead, n, m) of that function."""
    slopes = np.broadcast_to(given[1]["slopes"], (*lead, 1, 1))
    found = np.zeros((*lead, n, m))
    for at in np.ndindex(*lead, n, m):
        position = at[-2] + int(query_offset[at[0]] if np.ndim(query_offset) else query_offset)
        found[at] = -slopes[(*at[:-2], 0, 0)] * abs(position - at[-1])
    return found
