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
    assert_type(kv.explain(x, x, x).kernel, str)


def layers(x: Array, tokens: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    attention = kv.MultiHeadAttention(8, 2, 0.1, num_kv_heads=1, rotary=True, qk_norm=1e-6, alibi=None, seed=3)
    assert_type(attention, kv.MultiHeadAttention)
    assert_type(attention(x, x, x), Array)
    assert_type(attention(x, x, x, [1, 2], causal=True, bias=x, training=True), Array)
    assert_type(attention(x, x, x, return_weights=True), tuple[Array, Array])
    assert_type(attention(x, x, x, return_lse=True, window=3), tuple[Array, Array])
    assert_type(attention(x, x, x, return_weights=True, return_lse=True), tuple[Array, Array, Array])
    assert_type(attention(x, x, x, cache=kv.KVCache()), Any)  # (output, cache)
    assert_type(attention([[[1.0]]], [[[1.0]]], [[[1.0]]]), Any)
    assert_type(kv.DotProductAttention(0.1, rng=0)(x, x, x, scale=1.0), Array)
    assert_type(kv.AdditiveAttention(8)(x, x, x, mask=x > 0), Array)
    assert_type(kv.MultiplicativeAttention()(x, x, x), Array)
    assert_type(kv.GatedAttention()(x, x, x, return_weights=True), tuple[Array, Array])
    assert_type(kv.PositionalEncoding(8)(x, 3), Array)
    assert_type(kv.AddNorm(8)(x, x), Array)
    assert_type(kv.PositionWiseFFN(8, 8, activation="gelu")(x), Array)
    assert_type(kv.TransformerEncoderBlock(8, 8, 2)(x, [1, 2]), Array)
    assert_type(kv.TransformerDecoderBlock(8, 8, 2)(x, [x, None, [None]]), tuple[Array, list[Any]])
    encoder = kv.TransformerEncoder(9, 8, 8, 2, 1, max_len=20)
    assert_type(encoder(tokens, [1, 2]), np.ndarray[Any, np.dtype[Any]])
    decoder = kv.TransformerDecoder(9, 8, 8, 2, 1)
    state = decoder.init_state(encoder(tokens))
    assert_type(decoder(tokens, state), tuple[np.ndarray[Any, np.dtype[Any]], list[Any]])
    assert attention.backward(x), (attention.weights(), attention.grads, attention.attention.attention_weights)


class Model(kv.Layer):
    def __init__(self) -> None:
        self.attention, self.head = kv.DotProductAttention(), kv.Dense(2)

    def forward(self, X: Array) -> Any:
        return self.head(self.attention(X, X, X))

    def vjp(self, grad: Any) -> Any:
        return sum(self.attention.backward(self.head.backward(grad)))


def training(x: Array) -> None:
    model = Model()
    loss, grad = kv.softmax_cross_entropy(model(x, training=True), [1])
    assert_type(loss, float)
    model.backward(grad)
    kv.Adam(model).step()


def mistakes(x: Array) -> None:
    kvattn.attention(x, x, x, casual=True)  # type: ignore[call-overload]  # pyright: ignore
    kvattn.attention(x, x)  # type: ignore[call-overload]  # pyright: ignore
    kvattn.softmax(x, mask=x)  # type: ignore[call-overload]  # pyright: ignore
