"""The layers as keras.layers.Layers. The names and shapes of their weights are in kvattn/layers/__init__.py."""

from __future__ import annotations

import math
from functools import partial
from weakref import ref

import keras
import tensorflow as tf

from kvattn import api, checks, conversion, layers
from kvattn.backends import tensorflow as tab
from kvattn.kernels.tensorflow import quirks
from kvattn.layers.keras import (  # noqa: F401
    Decoding,
    Layer,
    assign,
    build_once,
    check_cache_sees_no_padding,
    check_given,
    dense,
    dropped,
    hide_padding,
    initializer,
    keeps,
    padding_of,
    parts,
    registered,
    seed_among,
    slots,
    tensors,
)  # fmt: skip

__all__ = [*layers.LAYERS]

# X and queries (batch, n, d), keys (batch, m, d), values (batch, m, v), valid_lens (batch,) or (batch, n); ``options`` are
# kvattn.attention's: mask, causal, window, ..., of which Layer passes tensors on as ``arrays``. key_size, query_size and
# value_size, which come first in d2l's order, may be left out: the first call gives the sizes. Keras gives the masks of
# Embedding(mask_zero=True) and Masking to the arguments queries_mask (batch, n), keys_mask and values_mask (batch, m).


class _Traced:
    """A last call in a graph, which keeps what its weights are computed from: they are shown in it, and in graphs inside."""

    def __init__(self, *last):
        graph = tf.compat.v1.get_default_graph()
        kept = getattr(graph, "_kvattn", ())  # there, so that it goes when the graph goes
        self.graph, self.number = ref(graph), len(kept)
        graph._kvattn = [*kept, last]

    def __getitem__(self, i):
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        while graph is not None and graph is not self.graph():
            graph = getattr(graph, "outer_graph", None)
        if graph is None:
            raise RuntimeError(
                "the last call was in a graph (tf.function, fit, predict, a functional model being made), which leaves no "
                "attention weights: read them in that graph, or call the layer or the model itself, layer(...), then read them"
            )
        return graph._kvattn[self.number][i]


# ---- attention


class _Attention(Layer):
    """What the attention layers share: dropout in training, and the last call, whose weights can be shown."""

    def __init__(self, given, dropout=0.0, **kwargs):
        super().__init__(given, **kwargs)
        self.dropout = keras.layers.Dropout(checks.probability("dropout", dropout))
        self._last = None

    def _score(self, queries, keys):
        return api.scaled_dot_score

    def call(self, queries, keys, values, valid_lens=None, arrays=None, training=None, queries_mask=None, keys_mask=None,
             values_mask=None, **options):  # fmt: skip
        options |= tensors(arrays)
        options |= {"score": self._score(queries, keys), "valid_lens": valid_lens}
        hide_padding(options, queries, keys, (*queries.shape[:-1], keys.shape[-2]), queries_mask, keys_mask, values_mask)
        last = (queries, keys, options) if tf.executing_eagerly() else _Traced(queries, keys, options)
        vars(self)["_last"] = last  # past Keras, which tracks what it finds in a layer
        rate = self.dropout.rate if training else 0.0
        return api.attention(queries, keys, values, **options, dropout=rate, backend="tensorflow")

    @property
    def attention_weights(self):
        """The last call's, (batch, n, m) or (batch * heads, n, m): before dropout, detached, computed when read.

        In a graph, such as fit and predict make, they are a tensor of it. Raises RuntimeError outside: it leaves no values.
        """
        if self._last is None:
            return None
        weights = tf.stop_gradient(layers.last_weights(self._last, "tensorflow"))
        *lead, n, m = keras.ops.shape(weights)  # in a graph some may be unknown
        return tf.reshape(weights, (math.prod(lead), n, m)) if len(lead) > 1 else weights


@registered
class DotProductAttention(_Attention):
    """Scaled dot-product attention, d2l's call: layer(queries, keys, values, valid_lens=None, **options)."""

    def __init__(self, dropout=0.0, **kwargs):
        super().__init__(locals(), dropout, **kwargs)
        self.autocast = self.dtype_policy.name != "float32"  # Keras's default must not narrow float64


@registered
class AdditiveAttention(_Attention):
    """Attention by the score w_v . tanh(q W_q + k W_k) with ``num_hiddens`` hidden units."""

    def __init__(self, key_size=None, query_size=None, num_hiddens=None, dropout=0.0, *, seed=None, **kwargs):
        super().__init__(locals(), dropout, **kwargs)
        check_given(self, num_hiddens=num_hiddens)
        self.W_k = dense(self, "W_k", num_hiddens, False, seed)
        self.W_q = dense(self, "W_q", num_hiddens, False, seed)
        self.w_v = dense(self, "w_v", 1, False, seed)

    def build(self, queries_shape, keys_shape):
        build_once(self.W_k, keys_shape)
        build_once(self.W_q, queries_shape)
        build_once(self.w_v, (None, self.W_q.units))

    def _score(self, queries, keys):
        W_q, W_k, w_v = (tf.convert_to_tensor(part.kernel) for part in (self.W_q, self.W_k, self.w_v))
        return partial(api.additive_score, W_q=W_q, W_k=W_k, w_v=w_v[:, 0])


@registered
class MultiplicativeAttention(_Attention):
    """Attention by the score q W k; W takes its sizes from the first call."""

    VARIABLES = (("W", (None, None)),)

    def __init__(self, dropout=0.0, *, seed=None, **kwargs):
        super().__init__(locals(), dropout, **kwargs)
        self.W, self._seed = None, seed

    def build(self, queries_shape, keys_shape):
        if self.W is None:
            self.make((queries_shape[-1], keys_shape[-1]))

    def make(self, shape):
        self.W = self.add_weight(name="W", shape=shape, initializer=initializer(self._seed, "W"))

    def _score(self, queries, keys):
        return partial(api.multiplicative_score, W=tf.convert_to_tensor(self.W))


@registered
class GatedAttention(_Attention):
    """Attention by the score sigmoid(w_g . [q; k]) (q . k); w_g takes its size from the first call."""

    VARIABLES = (("w_g", (None,)),)

    def __init__(self, dropout=0.0, *, seed=None, **kwargs):
        super().__init__(locals(), dropout, **kwargs)
        self.w_g, self._seed = None, seed

    def build(self, queries_shape):
        if self.w_g is None:
            self.make((2 * queries_shape[-1],))

    def make(self, shape):
        self.w_g = self.add_weight(name="w_g", shape=shape, initializer=initializer(self._seed, "w_g", shape))

    def _score(self, queries, keys):
        return partial(api.gated_score, w_g=tf.convert_to_tensor(self.w_g))


@registered
class MultiHeadAttention(Layer):
    """Multi-head attention with ``num_hiddens`` features in all heads together; the weights are at ``.attention``."""

    def __init__(self, key_size=None, query_size=None, value_size=None, num_hiddens=None, num_heads=None, dropout=0.0,
                 bias=False, *, num_kv_heads=None, seed=None, use_bias=None, rotary=None, qk_norm: bool | float = False,
                 alibi=None, sink=False, **kwargs):  # fmt: skip
        super().__init__(locals(), **kwargs)
        check_given(self, num_hiddens=num_hiddens, num_heads=num_heads)
        bias = bias if use_bias is None else use_bias
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        width = layers.head_width(num_hiddens, num_heads, self.num_kv_heads)
        self.rotary = layers.check_rotary(rotary, width)
        self.qk_norm, self.alibi = layers.check_qk_norm(qk_norm), layers.check_alibi(alibi, num_heads)
        self.VARIABLES = () if self.qk_norm is None else (("q_norm", (width,)), ("k_norm", (width,)))
        self.VARIABLES += (("sink", (num_heads,)),) if checks.flag("sink", sink) else ()
        self.q_norm = self.k_norm = self.sink = None
        self.attention = DotProductAttention(dropout, dtype=self.dtype_policy)
        self.W_q = dense(self, "W_q", num_hiddens, bias, seed)
        self.W_k = dense(self, "W_k", self.num_kv_heads * width, bias, seed)
        self.W_v = dense(self, "W_v", self.num_kv_heads * width, bias, seed)
        self.W_o = dense(self, "W_o", num_hiddens, bias, seed)

    def build(self, queries_shape, keys_shape, values_shape):
        for part, shape in ((self.W_q, queries_shape), (self.W_k, keys_shape), (self.W_v, values_shape)):
            build_once(part, shape)
        build_once(self.W_o, (*queries_shape[:-1], self._given["num_hiddens"]))
        if type(self.attention) is DotProductAttention:
            self.attention.built = True  # it has nothing to build, and is not called by Keras
        self.make()

    def make(self, shape=None):
        """All of its own weights, whose shapes are known."""
        for name, size in self.VARIABLES:
            if getattr(self, name) is None:
                kind = "zeros" if name == "sink" else "ones"
                setattr(self, name, self.add_weight(name=name, shape=size, initializer=kind))

    def call(self, queries, keys, values, valid_lens=None, arrays=None, cache=None, training=None, queries_mask=None,
             keys_mask=None, values_mask=None, **options):  # fmt: skip
        for name, x in (("queries", queries), ("keys", keys), ("values", values)):
            conversion.floating(name, x)
        options |= tensors(arrays)
        if cache is None:
            options["valid_lens"] = valid_lens
            scores = (*queries.shape[:-2], self.num_heads, queries.shape[-2], keys.shape[-2])
            hide_padding(options, queries, keys, scores, queries_mask, keys_mask, values_mask)
            queries, keys, values = layers.hide_unseen(tab, queries, keys, values, self.num_heads, **options)
            valid_lens = options.pop("valid_lens")
        else:  # a later call may attend to keys that no query attends to now
            options |= {"queries_mask": queries_mask, "keys_mask": keys_mask, "values_mask": values_mask}
        rows = _rows(queries)
        of_keys = rows if keys is queries else _rows(keys)
        of_values = of_keys if values is keys else _rows(values)
        queries = _split(self.W_q(rows if _of_rows(self.W_q) else queries), queries, self.num_heads)  # (batch, heads, n, d)
        keys = _split(self.W_k(of_keys if _of_rows(self.W_k) else keys), keys, self.num_kv_heads)
        values = _split(self.W_v(of_values if _of_rows(self.W_v) else values), values, self.num_kv_heads)
        cache = None if cache is None else cache.cache
        norms = (None if x is None else tf.convert_to_tensor(x) for x in (self.q_norm, self.k_norm))
        queries, keys = layers.normed(tab, self.qk_norm, queries, keys, *norms)
        if cache is not None:
            check_cache_sees_no_padding(options)
        queries, keys, values, cache = layers.placed("tensorflow", queries, keys, values, cache, self.rotary, options)
        valid_lens = layers.lengths(tab, valid_lens, queries)
        options = layers.with_alibi("tensorflow", options, self.alibi, queries)
        options = layers.with_sink(options, None if self.sink is None else tf.cast(self.sink, queries.dtype))
        # a layer inside a layer: Keras's own __call__ would take a third of what attention takes, and change nothing
        attend = (
            self.attention.call if type(self.attention) is DotProductAttention else self.attention
        )  # a user's own may build
        results = attend(queries, keys, values, valid_lens, training=training, **options)
        return layers.joined(tab._swap, self._mixed, results, cache)

    def _mixed(self, output):
        """(batch, n, heads, d) -> (batch, n, num_hiddens)"""
        lead, features = quirks.shape(output)[:-2], self.num_heads * output.shape[-1]
        rows = self.W_o(tf.reshape(output, (math.prod(lead), features) if _of_rows(self.W_o) else (*lead, features)))
        return tf.reshape(rows, (*lead, rows.shape[-1]))


def _rows(X):
    """(..., n, features) -> (rows, features), as which Keras's Dense would put them itself, each time, by more operations."""
    return tf.reshape(X, (math.prod(quirks.shape(X)[:-1]), X.shape[-1]))


def _of_rows(part):
    """Whether a projection may be given rows: one of a user's own may need (batch, n, features)."""
    return type(part) is keras.layers.Dense


def _split(rows, X, heads):
    """The rows of X (..., n, features), projected, as (..., heads, n, d)."""
    return tab._swap(tf.reshape(rows, (*quirks.shape(X)[:-1], heads, rows.shape[-1] // heads)))


# ---- the other parts of a transformer


@registered
class PositionalEncoding(Layer):
    """X + P, then dropout; P (1, max_len, num_hiddens) holds sines and cosines of the position, counted from ``offset``.

    P is a NumPy array, as in d2l: Keras has no buffers, and it is computed, so not saved.
    """

    def __init__(self, num_hiddens, dropout=0.0, max_len=1000, **kwargs):
        super().__init__(locals(), **kwargs)
        self.autocast = self.dtype_policy.name != "float32"  # Keras's default must not narrow float64
        self.dropout = keras.layers.Dropout(checks.probability("dropout", dropout), autocast=False)
        self.P = layers.encoding(max_len, num_hiddens)[None]

    def call(self, X, offset=0, arrays=None, training=None, rng=None):
        conversion.floating("X", X)
        n = keras.ops.shape(X)[1]
        layers.check_length(self.P.shape[1], n, offset)
        if conversion.is_integer(n) and conversion.is_integer(offset):
            P = tf.convert_to_tensor(self.P[:, offset : offset + n])
        else:
            P = tf.slice(self.P, (0, offset, 0), (1, n, self.P.shape[2]))
        return dropped(self.dropout, X + tf.cast(P, X.dtype), training, (arrays or {}).get("rng", rng))


@registered
class AddNorm(Layer):
    """Layer norm of X + dropout(Y) over the features, the last axis.

    ``norm_shape`` is d2l's for TensorFlow, axes that end with the last one ([2], [1, 2]), or the number of features, and
    selects nothing. Over [1, 2], positions too, d2l's own norm lets padding and the future into every position.
    """

    def __init__(self, norm_shape=None, dropout=0.0, **kwargs):
        super().__init__(locals(), **kwargs)
        self.dropout = keras.layers.Dropout(checks.probability("dropout", dropout), autocast=False)
        self.ln = keras.layers.LayerNormalization(epsilon=layers.EPSILON, dtype=self.dtype_policy)
        self.norm_shape = norm_shape

    def build(self, X_shape):
        axes = [self.norm_shape] if conversion.is_integer(self.norm_shape) else list(self.norm_shape or [-1])
        last = len(X_shape) - 1
        if axes != [X_shape[-1]] and (axes[-1] not in (-1, last) or not all(1 <= abs(axis) <= last for axis in axes)):
            raise ValueError(
                f"norm_shape is {self.norm_shape}; expected {X_shape[-1]}, the number of features, or axes that end with the "
                f"last one, {last}"
            )
        build_once(self.ln, X_shape)

    def call(self, X, Y, arrays=None, training=None, rng=None):
        conversion.floating("X", X)
        conversion.floating("Y", Y)
        return self.ln(dropped(self.dropout, Y, training, (arrays or {}).get("rng", rng)) + X)


@registered
class PositionWiseFFN(Layer):
    """activation(X W_1 + b_1) W_2 + b_2; the activation is "relu" or "gelu" (by erf)."""

    def __init__(self, ffn_num_hiddens, ffn_num_outputs, *, activation="relu", seed=None, **kwargs):
        super().__init__(locals(), **kwargs)
        layers.check_activation(activation)
        self.activation = activation
        self.dense1 = dense(self, "W_1", ffn_num_hiddens, True, seed)
        self.dense2 = dense(self, "W_2", ffn_num_outputs, True, seed)

    def build(self, X_shape):
        build_once(self.dense1, X_shape)
        build_once(self.dense2, (None, self.dense1.units))

    def call(self, X, training=None):
        conversion.floating("X", X)
        X = self.dense1(X)
        # tf.nn.gelu rounds the root of its formula to float32
        return self.dense2(tf.nn.relu(X) if self.activation == "relu" else X * tf.math.erfc(-X * math.sqrt(0.5)) / 2)


@registered
class TransformerEncoderBlock(Layer):
    """Self-attention and a position-wise network, each with AddNorm; ``cache=`` returns (Y, cache)."""

    def __init__(self, key_size=None, query_size=None, value_size=None, num_hiddens=None, norm_shape=None,
                 ffn_num_hiddens=None, num_heads=None, dropout=0.0, bias=False, *, use_bias=None, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False,
                 seed=None, **kwargs):  # fmt: skip
        super().__init__(locals(), **kwargs)
        check_given(self, num_hiddens=num_hiddens, ffn_num_hiddens=ffn_num_hiddens, num_heads=num_heads)
        dtype = self.dtype_policy
        self.attention = MultiHeadAttention(
            key_size, query_size, value_size, num_hiddens, num_heads, dropout, bias, use_bias=use_bias,
            num_kv_heads=num_kv_heads, rotary=rotary, qk_norm=qk_norm, alibi=alibi, sink=sink,
            seed=layers.child(seed, "attention"), dtype=dtype,
        )  # fmt: skip
        self.addnorm1 = AddNorm(norm_shape, dropout, dtype=dtype)
        self.ffn = PositionWiseFFN(
            ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"), dtype=dtype
        )
        self.addnorm2 = AddNorm(norm_shape, dropout, dtype=dtype)

    def build(self, X_shape):
        build_once(self.attention, X_shape, X_shape, X_shape)
        for part in (self.addnorm1, self.ffn, self.addnorm2):
            build_once(part, X_shape)

    def call(self, X, valid_lens=None, arrays=None, cache=None, training=None, rng=None, **options):
        cache, rng, arrays = None if cache is None else cache.cache, *seed_among(arrays, rng)
        rng, *seeds = (layers.seed_of(tab, rng, part, attends=part == 0) for part in range(3))
        options |= {} if rng is None else {"rng": rng}
        Y = self.attention(X, X, X, valid_lens, arrays=arrays, cache=cache, training=training, **options)
        Y, cache = Y if cache is not None else (Y, None)
        Y = self.addnorm1(X, Y, training=training, rng=seeds[0])
        Y = self.addnorm2(Y, self.ffn(Y, training=training), training=training, rng=seeds[1])
        return Y if cache is None else (Y, cache)


class _Stack(Layer):
    """What encoder and decoder share: tokens' embedding * sqrt(h), positional encoding, and blocks, which ``_block`` makes."""

    _scores = False  # whether a dense layer gives the scores of the tokens that follow, as a decoder's does

    def __init__(self, vocab_size, key_size=None, query_size=None, value_size=None, num_hiddens=None, norm_shape=None,
                 ffn_num_hiddens=None, num_heads=None, num_blks=None, dropout=0.0, bias=False, *, use_bias=None,
                 num_kv_heads=None, activation="relu", max_len=1000, rotary=None, qk_norm: bool | float = False, alibi=None,
                 sink=False, seed=None, **kwargs):  # fmt: skip
        super().__init__(locals(), **kwargs)
        check_given(self, num_hiddens=num_hiddens, ffn_num_hiddens=ffn_num_hiddens, num_heads=num_heads, num_blks=num_blks)
        self.autocast = False  # d2l's tokens may be floats: half precision would round them
        self.num_hiddens, dtype = num_hiddens, self.dtype_policy
        drawn = initializer(seed, "embedding", (vocab_size, num_hiddens))
        self.embedding = keras.layers.Embedding(vocab_size, num_hiddens, embeddings_initializer=drawn, dtype=dtype)
        self.embedding.supports_masking = True  # a mask of the tokens reaches the blocks from here
        self.pos_encoding = PositionalEncoding(num_hiddens, dropout, max_len, dtype=dtype)
        self.blks = [
            self._block(
                key_size, query_size, value_size, num_hiddens, norm_shape, ffn_num_hiddens, num_heads, dropout, i=i,
                use_bias=bias if use_bias is None else use_bias, num_kv_heads=num_kv_heads, activation=activation,
                rotary=rotary, qk_norm=qk_norm, alibi=alibi, sink=sink, seed=layers.child(seed, f"blocks.{i}"), dtype=dtype,
            )
            for i in range(num_blks)
        ]  # fmt: skip
        for i, part in enumerate(self.blks):  # Keras finds them in the list, tf.train.Checkpoint does not
            # private: as read in TensorFlow 2.21 and Keras 3.15
            self._track_trackable(part, name=f"blks_{i}")
        if self._scores:
            self.dense = dense(self, "W", vocab_size, True, layers.child(seed, "dense"))

    def _embedded(self, X, first, seed, training=None):
        X = self.embedding(X) * math.sqrt(self.num_hiddens)
        return self.pos_encoding(X, offset=first, training=training, rng=seed)


@registered
class TransformerEncoder(layers.ShowsBlocks, _Stack):
    """Embedding * sqrt(h), positional encoding, and ``num_blks`` blocks: tokens (batch, n) -> (batch, n, num_hiddens)."""

    __init__ = _Stack.__init__  # else Python 3.11.2 reads the arguments of Keras's __new__

    def _block(self, *sizes, i, **options):
        return TransformerEncoderBlock(*sizes, **options)

    def build(self, X_shape):
        build_once(self.embedding, X_shape)
        for block in self.blks:
            build_once(block, (*X_shape, self.num_hiddens))

    def call(self, X, valid_lens=None, arrays=None, cache=None, training=None, rng=None, **options):
        rng, arrays = seed_among(arrays, rng)
        options |= {} if (padding := padding_of(X)) is None else {"queries_mask": padding, "keys_mask": padding}
        cache = None if cache is None else cache.cache
        return layers.encoded(tab, self, X, valid_lens, cache, rng, training, arrays=arrays, **options)


@registered
class TransformerDecoderBlock(Decoding):
    """Causal self-attention, attention to an encoder's outputs and a position-wise network, each with AddNorm."""

    def __init__(self, key_size=None, query_size=None, value_size=None, num_hiddens=None, norm_shape=None,
                 ffn_num_hiddens=None, num_heads=None, dropout=0.0, i=0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False,
                 seed=None, **kwargs):  # fmt: skip
        super().__init__(locals(), **kwargs)
        check_given(self, num_hiddens=num_hiddens, ffn_num_hiddens=ffn_num_hiddens, num_heads=num_heads)
        self.i, dtype = i, self.dtype_policy
        attention = partial(
            MultiHeadAttention, key_size, query_size, value_size, num_hiddens, num_heads, dropout, use_bias,
            num_kv_heads=num_kv_heads, qk_norm=qk_norm, sink=sink, dtype=dtype,
        )  # fmt: skip
        self.attention1 = attention(rotary=rotary, alibi=alibi, seed=layers.child(seed, "attention1"))
        self.addnorm1 = AddNorm(norm_shape, dropout, dtype=dtype)
        self.attention2 = attention(seed=layers.child(seed, "attention2"))
        self.addnorm2 = AddNorm(norm_shape, dropout, dtype=dtype)
        self.ffn = PositionWiseFFN(
            ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"), dtype=dtype
        )
        self.addnorm3 = AddNorm(norm_shape, dropout, dtype=dtype)

    def build(self, X_shape, enc_outputs_shape):
        build_once(self.attention1, X_shape, X_shape, X_shape)
        build_once(self.attention2, X_shape, enc_outputs_shape, enc_outputs_shape)
        for part in (self.addnorm1, self.addnorm2, self.ffn, self.addnorm3):
            build_once(part, X_shape)

    def call(self, X, enc_outputs, enc_valid_lens=None, arrays=None, cache=None, training=None, rng=None, X_mask=None,
             enc_outputs_mask=None, **options):  # fmt: skip
        rng, arrays = seed_among(arrays, rng)
        seeds = [layers.seed_of(tab, rng, part, attends=part in (0, 2)) for part in range(5)]
        seeds = [{"training": training} | layers.seeded(seed) for seed in seeds]
        options = {**layers.with_causal(options), "queries_mask": X_mask, "keys_mask": X_mask, "arrays": arrays}
        caches = [layers.KVCache()] * (self.i + 1) if cache is None else cache.cache
        if keeps(caches[self.i], X, X_mask):
            Y, kept = self.attention1(X, X, X, cache=caches[self.i], **options, **seeds[0])
        else:
            Y, kept = self.attention1(X, X, X, **options, **seeds[0]), layers.NOT_KEPT
        Y = self.addnorm1(X, Y, **seeds[1])
        Z = self.attention2(Y, enc_outputs, enc_outputs, enc_valid_lens, keys_mask=enc_outputs_mask, **seeds[2])
        Z = self.addnorm2(Y, Z, **seeds[3])
        Z = self.addnorm3(Z, self.ffn(Z, training=training), **seeds[4])
        return Z if cache is None else (Z, kept)


@registered
class TransformerDecoder(layers.KeepsState, Decoding, _Stack):
    """Embedding * sqrt(h), positional encoding, ``num_blks`` blocks that attend to an encoder's outputs, and a dense layer."""

    _block, _scores = TransformerDecoderBlock, True

    def __init__(self, vocab_size, key_size=None, query_size=None, value_size=None, num_hiddens=None, norm_shape=None,
                 ffn_num_hiddens=None, num_heads=None, num_blks=None, dropout=0.0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", max_len=1000, rotary=None, qk_norm: bool | float = False, alibi=None, sink=False,
                 seed=None, **kwargs):  # fmt: skip
        given = {name: x for name, x in locals().items() if name not in ("self", "kwargs", "__class__")}
        if "bias" in kwargs:  # an encoder's
            raise TypeError("TransformerDecoder has no argument 'bias': d2l's decoders call it use_bias")
        super().__init__(**given, **kwargs)
        self._given = given

    def build(self, X_shape, enc_outputs_shape):
        build_once(self.embedding, X_shape)
        for block in self.blks:
            build_once(block, (*X_shape, self.num_hiddens), enc_outputs_shape)
        build_once(self.dense, (None, self.num_hiddens))

    def call(self, X, enc_outputs, enc_valid_lens=None, arrays=None, cache=None, training=None, rng=None, X_mask=None,
             enc_outputs_mask=None, **options):  # fmt: skip
        rng, arrays = seed_among(arrays, rng)
        state = self.init_state(enc_outputs, enc_valid_lens) if cache is None else [enc_outputs, enc_valid_lens, cache.cache]
        options |= {"arrays": arrays, "X_mask": X_mask, "enc_outputs_mask": enc_outputs_mask}
        logits, state = layers.decoded(tab, self, X, state, rng, training, **options)
        return logits if cache is None else (logits, state[2])


layers.describe(globals())


# ---- weights of a forward pass, for kvattn/maps.py


def maps(model, inputs, options):
    """kvattn.maps' part."""
    found = [(".".join(path), part) for path, part in parts(model) if isinstance(part, _Attention)]
    return layers.maps(found, lambda: model(*inputs, **options), tf.reshape)
