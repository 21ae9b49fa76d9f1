"""What a type checker sees of kvattn on MXNet, which has no types: any. No call is an error; it is not run."""

from typing import Any, assert_type

import mxnet as mx  # type: ignore[import-untyped]

import kvattn
from kvattn import mxnet as kv


def calls(x: Any) -> None:
    assert x.shape == mx.np.zeros((2, 3, 4)).shape
    assert_type(kvattn.attention(x, x, x, causal=True), Any)
    assert_type(kv.softmax(x), Any)
    output, weights = kv.attention(x, x, x, return_weights=True)
    layer = kv.MultiHeadAttention(8, 2)
    layer.initialize()
    y = layer(x, x, x, causal=True)
    assert kv.export_weights(layer), (output, weights, y)


def mistakes(x: Any) -> None:
    kvattn.attention(x, x, x, casual=True)  # type: ignore[call-overload]  # pyright: ignore
