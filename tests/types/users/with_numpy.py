"""What a type checker sees of kvattn on NumPy; it is not run."""

from typing import Any, assert_type

import numpy as np

import kvattn
from kvattn import numpy as kv

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def calls(x: Array, y: list[list[float]]) -> None:
    assert_type(kvattn.attention(x, x, x, causal=True), Array)
    assert_type(kvattn.attention(x, x, x, return_weights=True), tuple[Array, Array])
    assert_type(kvattn.attention(x, x, x, return_lse=True, mask=x > 0), tuple[Array, Array])
    assert_type(kvattn.attention(x, x, x, return_weights=True, return_lse=True), tuple[Array, Array, Array])
    assert_type(kvattn.attention(x, x, x, backend="torch"), Any)
    assert_type(kvattn.attention(y, y, y), Any)
    assert_type(kvattn.attention_grad(x, x, x, x, wrt=["query"], window=3), tuple[Array, ...])
    assert_type(kvattn.merge_attention([x], [x]), Array)
    assert_type(kvattn.merge_attention([x], [x], return_lse=True), tuple[Array, Array])
    assert_type(kvattn.nadaraya_watson(x, x, x), tuple[Array, Array])
    assert_type(kvattn.rotary(x), Array)
    assert_type(kvattn.self_attention(x, x, x, x), Array)
    params = {"W_q": x, "W_k": x, "W_v": x}
    assert_type(kvattn.multi_head_attention(x, x, x, params, num_heads=2), Array)
    assert_type(kvattn.multi_head_attention(x, x, x, params, num_heads=2, return_weights=True), tuple[Array, Array])
    assert_type(kvattn.multi_head_attention_grad(x, x, x, params, x, num_heads=2), tuple[Array, ...])
    assert_type(kvattn.softmax(x), Array)
    assert_type(kvattn.softmax(y), Any)
    assert_type(kvattn.masked_softmax(x, [1, 2]), Array)
    assert_type(kvattn.additive_score(x, x, W_q=x, W_k=x, w_v=x), Array)
    assert_type(kvattn.gaussian_kernel(x, x, width=0.5), Array)


def namespace(x: Array) -> None:
    assert_type(kv.attention(x, x, x, return_lse=True), tuple[Array, Array])
    assert_type(kv.sparsemax(x), Array)
    assert_type(kv.MultiHeadAttention(8, 2), kv.MultiHeadAttention)
    assert kv.PositionWiseFFN(8, 8)(kv.MultiHeadAttention(8, 2)(x, x, x, causal=True)).shape
    assert_type(kv.explain(x, x, x).kernel, str)


def mistakes(x: Array) -> None:
    kvattn.attention(x, x, x, casual=True)  # type: ignore[call-overload]  # pyright: ignore
    kvattn.attention(x, x)  # type: ignore[call-overload]  # pyright: ignore
    kvattn.softmax(x, mask=x)  # type: ignore[call-overload]  # pyright: ignore
