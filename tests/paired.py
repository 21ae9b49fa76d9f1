"""What is said of pairs by their places, for tests of tracers: options by positions, and the same as arrays of all pairs."""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

import kvattn
from kvattn import partition

N = 40
SLOPES = np.array([0.5, 0.25], "float32")
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (2, N)), axis=1).astype("int32")
ROWS, COLUMNS = np.arange(N)[:, None], np.arange(N)
BIAS = -SLOPES[:, None, None] * abs(ROWS - COLUMNS).astype("float32")


def inputs():
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, 2, N, 4)).astype("float32") for _ in range(3)]


def past(x):
    """0 up to 0, then above it: masks in integers, since TensorFlow 2.18 multiplies no bools, and MXNet has no | of them."""
    return abs(x) + x


def said(slopes, segments, floats):
    """Options by positions, by name; ``slopes`` and ``segments``: the framework's; ``floats``: makes floats of integers."""
    return {
        "mask": {"mask": lambda q, k: k <= q + 1},
        "no window": {"mask": lambda q, k: past(k - q) * past(k - 5) == 0},
        "bias": {"bias": lambda q, k: -slopes[:, None, None] * floats(abs(q - k)), "causal": True},
        "segments": {"segments": segments},
    }


def answers():
    """The output of each, and the gradient of its sum by the slopes."""
    arrays = {
        "mask": {"mask": COLUMNS <= ROWS + 1},
        "no window": {"mask": (COLUMNS <= ROWS) | (COLUMNS <= 5)},
        "bias": {"bias": BIAS, "causal": True},
        "segments": {"mask": SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]},
    }
    found = {name: kvattn.attention(*inputs(), **options) for name, options in arrays.items()}
    grad = kvattn.attention_grad(*inputs(), np.ones((2, 2, N, 4), "float32"), wrt=("bias",), **arrays["bias"])[0]
    return found | {"by the slopes": -(grad * abs(ROWS - COLUMNS)).sum(axis=(1, 2))}


@contextmanager
def looked_at(**more):
    """Calls so small are looked at too."""
    with patch.multiple(partition, FEW=0, **more):
        yield
