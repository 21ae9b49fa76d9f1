"""What a type checker sees of kvattn on TensorFlow, which has no types: any. No call is an error; it is not run."""

from typing import Any, assert_type

import tensorflow as tf  # type: ignore[import-untyped]

import kvattn
from kvattn import tensorflow as kv


def calls(x: Any) -> None:
    assert x.shape == tf.zeros((2, 3, 4)).shape
    assert_type(kvattn.attention(x, x, x, causal=True), Any)
    assert_type(kv.softmax(x), Any)
    output, lse = kvattn.attention(x, x, x, return_lse=True)
    layer = kv.MultiHeadAttention(8, 2)
    y = layer(x, x, x, valid_lens=tf.constant([1, 2]))
    assert kv.export_weights(layer), (output, lse, y)


def mistakes(x: Any) -> None:
    kvattn.attention(x, x, x, casual=True)  # type: ignore[call-overload]  # pyright: ignore
