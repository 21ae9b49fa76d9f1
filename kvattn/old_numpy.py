"""MXNet 1.9.1 on today's NumPy: lends numpy, only while ``import mxnet`` runs, the names that release still asks for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def _gone(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("NumPy no longer has this function")


# What is only listed by name in mxnet's tables stands as _gone; what mxnet computes with has its value.
NAMES: dict[str, Any] = {
    "Inf": float("inf"), "NAN": float("nan"), "NINF": -float("inf"), "NZERO": -0.0, "NaN": float("nan"),
    "PINF": float("inf"), "PZERO": 0.0, "alltrue": np.all, "bool": np.bool_, "in1d": _gone, "mirr": _gone,
    "msort": _gone, "npv": _gone, "pmt": _gone, "ppmt": _gone, "product": np.prod, "pv": _gone, "rate": _gone,
    "round_": np.round, "sometrue": np.any, "trapz": _gone,
}  # fmt: skip


def lacking() -> dict[str, Any]:
    """What this NumPy no longer has of it: nothing, where ``import mxnet`` works by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are soon to go
        return {name: x for name, x in NAMES.items() if not hasattr(np, name)}


@contextmanager
def old_names() -> Iterator[None]:
    """Within the block ``import mxnet`` works and is quiet; afterwards numpy is as it was.

    >>> before = set(vars(np))
    >>> with old_names():
    ...     import mxnet  # doctest: +SKIP
    >>> before <= set(vars(np)), "pmt" in set(vars(np)) - before
    (True, False)
    """
    if "mxnet" in sys.modules:
        yield
        return
    for name in [name for name in sys.modules if name.startswith("mxnet.")]:  # what is left of an import that failed
        del sys.modules[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mxnet's own source: invalid escapes, deprecated aliases
        lent = lacking()
        vars(np).update(lent)
        try:
            yield
        finally:
            for name, x in lent.items():
                if vars(np).get(name) is x:
                    del vars(np)[name]
