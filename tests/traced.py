"""Calls that a tracer of any framework records with one set of arrays, and runs with others."""

import numpy as np

import kvattn

D, V = 3, 2
SIZES = ((2, 4, 5), (3, 6, 7), (1, 1, 8), (2, 3, 0), (2, 0, 3), (0, 2, 3))  # batch, n, m: the first is traced


def draw(b, n, m, seed=0):
    """query, key, value, grad_output, and what restricts them, of one batch of two heads."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
    return {
        "query": normal(b, 2, n, D), "key": normal(b, 2, m, D), "value": normal(b, 2, m, V), "grad": normal(b, 2, n, V),
        "lens": rng.integers(0, m + 2, b), "lens of each": rng.integers(0, m + 2, (b, n)),
        "mask": rng.random((b, 1, n, m)) < 0.7, "bias": normal(n, m), "offset": rng.integers(-2, m + 1, b),
        "shift": np.array(m - n), "positions": rng.integers(-1, m, (b, 1, n, 2)),
    }  # fmt: skip


def full(arrays):
    return {**arrays, "lens": np.full_like(arrays["lens"], arrays["key"].shape[-2])}


def short(arrays):
    return {**arrays, "lens": np.minimum(arrays["lens"], 1)}


def empty(arrays):
    return {**arrays, "lens": 0 * arrays["lens"], "mask": arrays["mask"] & False}


def padded(arrays):
    """Short lengths, and NaN in the keys and values behind them."""
    arrays = short(arrays)
    behind = np.arange(arrays["key"].shape[-2]) >= arrays["lens"][:, None]
    return arrays | {x: np.where(behind[:, None, :, None], np.float32("nan"), arrays[x]) for x in ("key", "value")}


# which of the arrays are arguments of the trace, and what else there is
RESTRICTIONS = {
    "nothing": ({}, {}),
    "lengths": ({"valid_lens": "lens"}, {}),
    "lengths of each": ({"valid_lens": "lens of each"}, {"window": (2, None)}),
    "causal": ({"query_offset": "shift"}, {"causal": True}),
    "an offset for each": ({"query_offset": "offset", "valid_lens": "lens"}, {"causal": True}),
    "mask and bias": ({"mask": "mask", "bias": "bias"}, {"softcap": 2.0}),
    "window": ({"query_offset": "shift", "mask": "mask"}, {"window": 1}),
    "positions": ({"positions": "positions", "bias": "bias", "valid_lens": "lens"}, {}),
    "sparsemax": ({"valid_lens": "lens", "mask": "mask"}, {"normalize": kvattn.sparsemax}),
    "another score": ({"query_offset": "offset"}, {"causal": True, "score": kvattn.cosine_score}),
}


def call(which, options, query, key, value, grad, *restricting):
    """Output, lse or weights, and all gradients."""
    options = {**options, **dict(zip(which, restricting, strict=True))}
    output, weights = kvattn.attention(query, key, value, **options, return_weights=True)
    return output, weights, *kvattn.attention_grad(query, key, value, grad, **options)
