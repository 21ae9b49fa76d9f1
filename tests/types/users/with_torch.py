"""What a type checker sees of kvattn on PyTorch; it is not run."""

from typing import Any, assert_type

from torch import Tensor, nn

import kvattn
from kvattn import torch as kv


def calls(x: Tensor) -> None:
    assert_type(kvattn.attention(x, x, x, causal=True), Tensor)
    assert_type(kvattn.attention(x, x, x, return_weights=True, return_lse=True), tuple[Tensor, Tensor, Tensor])
    assert_type(kv.attention(x, x, x, return_weights=True), tuple[Tensor, Tensor])
    assert_type(kv.attention(x, x, x, score=kv.dot_score, bias=x), Tensor)
    assert_type(kv.softmax(x), Tensor)
    assert_type(kv.gated_score(x, x, x), Tensor)
    assert_type(kv.rotary(x, 3), Tensor)


def layers(x: Tensor, tokens: Tensor) -> None:
    layer: nn.Module = kv.MultiHeadAttention(8, 2)
    assert kv.export_weights(layer)
    attention = kv.MultiHeadAttention(8, 2, 0.1, num_kv_heads=1, rotary=True, qk_norm=1e-6, alibi=None, seed=3)
    assert_type(attention(x, x, x), Tensor)
    assert_type(attention(x, x, x, [1, 2], causal=True, bias=x), Tensor)
    assert_type(kv.AdditiveAttention(8)(x, x, x, mask=x > 0), Tensor)
    assert_type(attention(x, x, x, return_weights=True), tuple[Tensor, Tensor])
    assert_type(attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(kv.DotProductAttention()(x, x, x, return_weights=True, return_lse=True), tuple[Tensor, Tensor, Tensor])
    assert_type(attention(x, x, x, cache=kv.KVCache()), Any)
    assert_type(kv.PositionalEncoding(8)(x), Tensor)
    assert_type(kv.AddNorm(8)(x, x), Tensor)
    assert_type(kv.PositionWiseFFN(8, 8)(x), Tensor)
    assert_type(kv.TransformerEncoder(9, 8, 8, 2, 1)(tokens, [1, 2]), Tensor)
    decoder = kv.TransformerDecoder(9, 8, 8, 2, 1)
    assert_type(decoder(tokens, decoder.init_state(x)), tuple[Tensor, list[Any]])
