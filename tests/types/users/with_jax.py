"""What a type checker sees of kvattn on JAX; it is not run."""

from typing import assert_type

from flax import linen
from jax import Array

import kvattn
from kvattn import jax as kv


def calls(x: Array) -> None:
    assert_type(kvattn.attention(x, x, x, causal=True), Array)
    assert_type(kvattn.attention(x, x, x, return_weights=True, return_lse=True), tuple[Array, Array, Array])
    assert_type(kv.attention(x, x, x, return_weights=True), tuple[Array, Array])
    assert_type(kv.softmax(x), Array)
    assert_type(kv.rotary(x, 3), Array)
    layer: linen.Module = kv.MultiHeadAttention(8, 2)
    assert layer
    assert kv.PositionWiseFFN(8, 8).init(x, x)
    assert kv.MultiHeadAttention(8, 2).apply({}, x, x, x)
