"""What a type checker sees of kvattn's layers of flax, where it sees flax; it is not run."""

from typing import Any, assert_type

from flax import linen
from jax import Array

from kvattn import jax as kv


def layers(x: Array, tokens: Array) -> None:
    attention = kv.MultiHeadAttention(8, 2, 0.1, num_kv_heads=1, rotary=True, qk_norm=1e-6, alibi=None, seed=3)
    variables = attention.init(x, x, x, x)
    output, weights = attention.apply(variables, x, x, x)  # flax says that its apply gives anything
    assert output is not weights
    bound = attention.bind(variables)
    assert_type(bound, kv.MultiHeadAttention)
    assert_type(bound(x, x, x), tuple[Array, Array])
    assert_type(bound(x, x, x, [1, 2], True, causal=True, bias=x), tuple[Array, Array])
    assert_type(bound(x, x, x, return_weights=True), tuple[Array, Array])
    assert_type(bound(x, x, x, return_weights=False), Array)
    assert_type(bound(x, x, x, return_lse=True), tuple[Array, Array, Array])
    assert_type(bound(x, x, x, return_weights=False, return_lse=True, window=3), tuple[Array, Array])
    assert_type(bound(x, x, x, cache=kv.KVCache()), Any)  # (output, weights, cache)


class Model(linen.Module):
    """In a module of flax layers are called, and give arrays."""

    def setup(self) -> None:
        self.attention = kv.MultiHeadAttention(8, 2)
        self.others = kv.AdditiveAttention(8), kv.MultiplicativeAttention(), kv.GatedAttention(seed=1)
        self.encoding, self.addnorm = kv.PositionalEncoding(8), kv.AddNorm(0.1, norm_shape=8)
        self.ffn, self.block = kv.PositionWiseFFN(8, 8, activation="gelu"), kv.TransformerEncoderBlock(8, 8, 2)
        self.decoding = kv.TransformerDecoderBlock(8, 8, 2, i=0)
        self.encoder, self.decoder = kv.TransformerEncoder(9, 8, 8, 2, 1), kv.TransformerDecoder(9, 8, 8, 2, 1)

    def __call__(self, x: Array, tokens: Array) -> Array:
        output, weights = self.attention(x, x, x)
        assert_type((output, weights), tuple[Array, Array])
        additive, multiplicative, gated = self.others
        assert_type(additive(x, x, x, mask=x > 0), tuple[Array, Array])
        assert_type(multiplicative(x, x, x, return_weights=False), Array)
        assert_type(gated(x, x, x, return_lse=True), tuple[Array, Array, Array])
        assert_type(kv.DotProductAttention()(x, x, x), tuple[Array, Array])
        assert_type(self.encoding(x, offset=3), Array)
        assert_type(self.addnorm(x, x, True), Array)
        assert_type(self.ffn(x), Array)
        assert_type(self.block(x, causal=True), tuple[Array, Array])
        assert_type(self.block(x, return_weights=False), Array)
        assert_type(self.encoder(tokens, [1, 2]), Array)
        assert_type(self.encoder(tokens, return_weights=True), tuple[Array, list[Array]])
        state = self.decoder.init_state(x)
        assert_type(self.decoder(tokens, state), tuple[Array, list[Any]])
        assert_type(self.decoder(tokens, state, return_weights=True), tuple[Array, list[Any], list[list[Array]]])
        assert_type(self.decoding(x, state), tuple[Array, list[Any], Array, Array])
        assert_type(self.decoding(x, state, return_weights=False), tuple[Array, list[Any]])
        return self.ffn(self.addnorm(x, output))
