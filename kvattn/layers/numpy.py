"""The layers as plain classes with analytic gradients; names and shapes of their weights are in kvattn/layers/__init__.py."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, overload

import numpy as np

from kvattn import api, checks, conversion, layers, patterns, prepare
from kvattn.backends import numpy as tab
from kvattn.call import Call
from kvattn.kernels.numpy import gradients, tiled, tiled_grad
from kvattn.layers import calls
from kvattn.layers.analytic import Dense, Dropout, Embedding, Layer, LayerNorm, parts, source
from kvattn.layers.analytic import slots as declared
from kvattn.signatures import A

# layers.LAYERS, in words that type checkers read
__all__ = [
    "AddNorm", "AdditiveAttention", "DotProductAttention", "GatedAttention", "MultiHeadAttention", "MultiplicativeAttention",
    "PositionWiseFFN", "PositionalEncoding", "TransformerDecoder", "TransformerDecoderBlock", "TransformerEncoder",
    "TransformerEncoderBlock",
]  # fmt: skip

# X and queries (batch, n, d), keys (batch, m, d), values (batch, m, v), valid_lens (batch,) or (batch, n); ``options`` are
# kvattn.attention's: mask, causal, window, ... The vjp of a layer is given what its forward kept.


# ---- what type checkers see of a call

Floats = np.ndarray[Any, np.dtype[Any]]

if TYPE_CHECKING:

    class _Attends(calls.Attends, Layer): ...

    class _Encodes(calls.Encodes, Layer): ...

    class _Reads(Layer):
        """Of tokens an array of floats; with a cache, a tuple."""

        @overload
        def __call__(
            self, X: Any, valid_lens: Any = None, *, cache: None = None, **options: Unpack[calls.Options]
        ) -> Floats: ...
        @overload
        def __call__(self, *args: Any, **options: Any) -> Any: ...
        def __call__(self, *args: Any, **options: Any) -> Any: ...

    class _Changes(calls.Changes, Layer): ...

else:
    _Attends = _Encodes = _Reads = _Changes = Layer


# ---- attention


class _Attention(_Attends):
    """What the attention layers share: dropout in training, and the last call, whose weights can be shown."""

    def __init__(self, dropout=0.0, *, rng=None) -> None:
        self.dropout = Dropout(dropout, rng=rng)
        self._last = self.by_sink = None  # by_sink: the gradient by the sink that the last call was given

    def _score(self, queries, keys):
        return api.scaled_dot_score

    def forward(self, queries, keys, values, valid_lens=None, *, rng=None, **options):
        score, options = self._score(queries, keys), {**options, "valid_lens": valid_lens, "backend": "numpy"}
        computing = {name: x for name, x in options.items() if not name.startswith("return_")}
        self._last = (queries, keys, {**computing, "score": _copied(score)})
        rate, seed = self.dropout.rate if self.training else 0.0, None
        pattern = rng is not None and patterns.is_seed(rng := checks.seed(tab, rng))
        if rate:  # vjp draws the same again
            own = self.dropout.rng if rng is None or pattern else np.random.default_rng(rng)
            seed = rng if pattern else np.random.SeedSequence(int(own.integers(2**63)))
        # weights in one piece would draw in another order than vjp
        apart = rate and not pattern and options.pop("return_weights", False)
        keeps = self.recording and options.get("normalize") is None and not tiled.tiny(queries.shape, keys.shape)
        asked, options["return_lse"] = options.get("return_lse", False), options.get("return_lse", False) or keeps
        results = api.attention(queries, keys, values, score=score, **options, **_drawn(rate, seed))
        output, *rest = results if type(results) is tuple else (results,)
        known = tiled_grad.NOTHING
        if keeps:  # so that vjp need not compute them again
            at = 1 if options.get("return_weights", False) else 0
            known = tiled_grad.Known(output, rest[at] if asked else rest.pop(at))
        self.keep(queries, keys, values, score, computing, (rate, seed), known)
        rest = [layers.last_weights(self._last, "numpy"), *rest] if apart else rest
        return (output, *rest) if rest else output

    def vjp(self, grad, queries, keys, values, score, computing, dropped_by, known):
        sinks = ("sink",) if isinstance(computing.get("sink"), np.ndarray) else ()
        wrt = ("query", "key", "value", *self._state.declared, *sinks)
        options = {**computing, **_drawn(*dropped_by), "score": score}
        if known is tiled_grad.NOTHING:
            grads = api.attention_grad(queries, keys, values, grad, wrt=wrt, **options)
        else:
            del options["backend"]
            query, key, value, scores = prepare.inputs(tab, queries, keys, values, score)
            options = prepare.options(tab, query, scores, (query.shape[-1], key.shape[-1]), **options)
            call = Call.of(query, key, **options)
            grads = gradients.attention_grad(tab, query, key, value, grad, wrt, call, known)
        for key, by_key in zip(wrt[3:], grads[3:], strict=True):
            if key == "sink":
                self.by_sink = by_key
            else:
                self.gradient(key, by_key)
        return grads[:3]

    @property
    def attention_weights(self):
        """The last call's, (batch, n, m) or (batch * heads, n, m): before dropout, computed when read."""
        if self._last is None:
            return None
        return layers.with_one_batch(layers.last_weights(self._last, "numpy"))


def _drawn(rate, seed):
    return {"dropout": rate, "rng": np.random.default_rng(seed) if isinstance(seed, np.random.SeedSequence) else seed}


def _copied(score):
    """The score with its parameters as they are now: an optimiser writes into them."""
    if not isinstance(score, partial):
        return score
    return partial(score.func, **{name: x.copy() for name, x in score.keywords.items()})


class DotProductAttention(_Attention):
    """Scaled dot-product attention, d2l's call: layer(queries, keys, values, valid_lens=None, **options)."""


class AdditiveAttention(_Attention):
    """Attention by the score w_v . tanh(q W_q + k W_k) with ``num_hiddens`` hidden units."""

    def __init__(self, num_hiddens, dropout=0.0, *, seed=None, rng=None) -> None:
        super().__init__(dropout, rng=rng)
        self.num_hiddens = num_hiddens
        for key, shape in (("W_k", (None, num_hiddens)), ("W_q", (None, num_hiddens)), ("w_v", (num_hiddens,))):
            self.parameter(key, shape, seed=source(seed, self.dropout.rng))

    def _score(self, queries, keys):
        h, dtype = self.num_hiddens, queries.dtype
        W_k, W_q = self.weight("W_k", (keys.shape[-1], h), dtype), self.weight("W_q", (queries.shape[-1], h), dtype)
        return partial(api.additive_score, W_q=W_q, W_k=W_k, w_v=self.weight("w_v", (h,), dtype))


class MultiplicativeAttention(_Attention):
    """Attention by the score q W k; W takes its sizes from the first call."""

    def __init__(self, dropout=0.0, *, seed=None, rng=None) -> None:
        super().__init__(dropout, rng=rng)
        self.parameter("W", (None, None), seed=source(seed, self.dropout.rng))

    def _score(self, queries, keys):
        return partial(api.multiplicative_score, W=self.weight("W", (queries.shape[-1], keys.shape[-1]), queries.dtype))


class GatedAttention(_Attention):
    """Attention by the score sigmoid(w_g . [q; k]) (q . k); w_g takes its size from the first call."""

    def __init__(self, dropout=0.0, *, seed=None, rng=None) -> None:
        super().__init__(dropout, rng=rng)
        self.parameter("w_g", (None,), seed=source(seed, self.dropout.rng))

    def _score(self, queries, keys):
        return partial(api.gated_score, w_g=self.weight("w_g", (2 * queries.shape[-1],), queries.dtype))


class MultiHeadAttention(_Attends):
    """Multi-head attention with ``num_hiddens`` features in all heads together; the weights are at ``.attention``.

    Of calls with a cache only the first has a backward.
    """

    def __init__(self, num_hiddens, num_heads, dropout=0.0, bias=False, *, num_kv_heads=None, seed=None, use_bias=None,
                 rotary=None, qk_norm: bool | float = False, alibi=None, sink=False, rng=None) -> None:  # fmt: skip
        bias, rng = bias if use_bias is None else use_bias, np.random.default_rng(rng)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        width = layers.head_width(num_hiddens, num_heads, self.num_kv_heads)
        self.rotary = layers.check_rotary(rotary, width)
        self.qk_norm, self.width = layers.check_qk_norm(qk_norm), width
        self.alibi = layers.check_alibi(alibi, num_heads)
        for name in () if self.qk_norm is None else NORMS:
            self.parameter(name, (width,))
        if checks.flag("sink", sink):
            self.parameter("sink", (num_heads,))
        self.attention = DotProductAttention(dropout, rng=rng)
        self.W_q = Dense(num_hiddens, bias, seed=seed, rng=rng, name="W_q")
        self.W_k = Dense(self.num_kv_heads * width, bias, seed=seed, rng=rng, name="W_k")
        self.W_v = Dense(self.num_kv_heads * width, bias, seed=seed, rng=rng, name="W_v")
        self.W_o = Dense(num_hiddens, bias, seed=seed, rng=rng, name="W_o")

    def forward(self, queries, keys, values, valid_lens=None, *, cache=None, **options):
        if cache is None:  # else a later call may attend to keys that no query attends to now
            queries, keys, values = layers.hide_unseen(tab, queries, keys, values, self.num_heads, valid_lens, **options)
        queries = tab._split(self.W_q(queries), self.num_heads)  # (batch, heads, n, d)
        keys, values = tab._split(self.W_k(keys), self.num_kv_heads), tab._split(self.W_v(values), self.num_kv_heads)
        first, projected = options.get("query_offset", 0), (queries, keys)
        norms = [None, None]
        if self.qk_norm is not None:  # copies, since an optimiser writes into them
            norms = [self.weight(name, (self.width,), queries.dtype).copy() for name in NORMS]
        queries, keys = layers.normed(tab, self.qk_norm, queries, keys, *norms)
        self.keep(cache, first, projected, norms)
        queries, keys, values, cache = layers.placed("numpy", queries, keys, values, cache, self.rotary, options)
        valid_lens = layers.lengths(tab, valid_lens, queries)
        options = layers.with_alibi("numpy", options, self.alibi, queries)
        if "sink" in self._state.declared:  # a copy, since an optimiser writes into it
            options = layers.with_sink(options, self.weight("sink", (self.num_heads,), queries.dtype).copy())
        results = self.attention(queries, keys, values, valid_lens, **options)
        return layers.joined(tab._join, self.W_o, results, cache)

    def vjp(self, grad, cache, first, projected, norms):
        if cache is not None and cache.key is not None:
            raise RuntimeError("a call with a cache has no backward: its keys and values are of earlier calls too")
        grad = tab._split(self.W_o.backward(grad), self.num_heads)
        queries, keys, values = self.attention.backward(grad)
        if "sink" in self._state.declared:
            self.gradient("sink", self.attention.by_sink)
        if self.rotary is not None:  # back by the same angles
            turned = layers.of_one_length("numpy", self.rotary, queries, keys, (first, 0))
            places = -(first + np.arange(queries.shape[-2])), -np.arange(keys.shape[-2])
            queries, keys = (
                api.rotary(x, at, **turned, backend="numpy") for x, at in zip((queries, keys), places, strict=True)
            )
        if self.qk_norm is not None:
            by = [_by_norm(*each, self.qk_norm) for each in zip((queries, keys), projected, norms, strict=True)]
            (queries, keys), by_norms = zip(*by, strict=True)
            for name, by_norm in zip(NORMS, by_norms, strict=True):
                self.gradient(name, by_norm)
        queries, keys, values = map(tab._join, (queries, keys, values))
        return self.W_q.backward(queries), self.W_k.backward(keys), self.W_v.backward(values)


NORMS = ("q_norm", "k_norm")


def _by_norm(grad, x, weight, epsilon):
    """The gradients of an RMSNorm of x (..., d) by x and by the weight."""
    scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    by = grad * weight
    by_x = scale * (by - x * scale * scale * (by * x).mean(axis=-1, keepdims=True))
    return by_x.astype(x.dtype), (grad * x * scale).reshape(-1, x.shape[-1]).sum(axis=0)


# ---- the other parts of a transformer


class PositionalEncoding(_Changes):
    """X + P, then dropout; P (1, max_len, num_hiddens) holds sines and cosines of the position, counted from ``offset``."""

    def __init__(self, num_hiddens, dropout=0.0, max_len=1000, *, rng=None) -> None:
        self.dropout = Dropout(dropout, rng=rng)
        self.P = layers.encoding(max_len, num_hiddens)[None]  # float64: rounded to each call's dtype

    def forward(self, X, offset=0, *, rng=None):
        conversion.floating("X", X)
        layers.check_length(self.P.shape[1], X.shape[1], offset)
        return self.dropout(X + self.P[:, offset : offset + X.shape[1]].astype(X.dtype), rng=rng)

    def vjp(self, grad):
        return self.dropout.backward(grad)


class AddNorm(_Changes):
    """Layer norm of X + dropout(Y). ``norm_shape`` may wait for the first call."""

    def __init__(self, norm_shape=None, dropout=0.0, *, rng=None) -> None:
        self.dropout = Dropout(dropout, rng=rng)
        self.ln = LayerNorm(norm_shape)

    def forward(self, X, Y, *, rng=None):
        checks.same_shape("Y", Y, X.shape, "X")
        return self.ln(self.dropout(Y, rng=rng) + X)

    def vjp(self, grad):
        grad = self.ln.backward(grad)
        return grad, self.dropout.backward(grad)


class PositionWiseFFN(_Changes):
    """activation(X W_1 + b_1) W_2 + b_2; the activation is "relu" or "gelu" (by erf).

    NumPy has no erf: gelu takes Python's, number by number, exact but slow.
    """

    def __init__(self, ffn_num_hiddens, ffn_num_outputs, *, activation="relu", seed=None, rng=None) -> None:
        layers.check_activation(activation)
        rng = np.random.default_rng(rng)
        self.activation = activation
        self.dense1 = Dense(ffn_num_hiddens, seed=seed, rng=rng, name="W_1")
        self.dense2 = Dense(ffn_num_outputs, seed=seed, rng=rng, name="W_2")

    def forward(self, X):
        X = self.dense1(X)
        part = (X > 0).astype(X.dtype) if self.activation == "relu" else _normal_cdf(X)
        self.keep(X, part)
        return self.dense2(np.maximum(X, 0) if self.activation == "relu" else X * part)

    def vjp(self, grad, X, part):
        slope = part if self.activation == "relu" else part + X * np.exp(-X * X / 2) / math.sqrt(2 * math.pi)
        return self.dense1.backward(self.dense2.backward(grad) * slope)


_erfc = np.frompyfunc(math.erfc, 1, 1)


def _normal_cdf(X):
    """The chance of a standard normal number below X: (1 + erf(X / sqrt(2))) / 2, without cancelling where X is low."""
    return _erfc(-X / math.sqrt(2)).astype(X.dtype) / 2


class TransformerEncoderBlock(_Encodes):
    """Self-attention and a position-wise network, each with AddNorm; ``cache=`` returns (Y, cache)."""

    def __init__(self, num_hiddens, ffn_num_hiddens, num_heads, dropout=0.0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False, seed=None,
                 rng=None) -> None:  # fmt: skip
        rng = np.random.default_rng(rng)
        self.attention = MultiHeadAttention(
            num_hiddens, num_heads, dropout, use_bias, num_kv_heads=num_kv_heads, rotary=rotary, qk_norm=qk_norm, alibi=alibi,
            sink=sink, seed=layers.child(seed, "attention"), rng=rng,
        )  # fmt: skip
        self.addnorm1 = AddNorm(num_hiddens, dropout, rng=rng)
        self.ffn = PositionWiseFFN(
            ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"), rng=rng
        )  # fmt: skip
        self.addnorm2 = AddNorm(num_hiddens, dropout, rng=rng)

    def forward(self, X, valid_lens=None, *, cache=None, rng=None, **options):
        rng, *seeds = (layers.seed_of(tab, rng, part, attends=part == 0) for part in range(3))
        options |= {} if rng is None else {"rng": rng}
        Y = self.attention(X, X, X, valid_lens, cache=cache, **options)
        Y, cache = Y if cache is not None else (Y, None)
        Y = self.addnorm1(X, Y, rng=seeds[0])
        Y = self.addnorm2(Y, self.ffn(Y), rng=seeds[1])
        return Y if cache is None else (Y, cache)

    def vjp(self, grad):
        grad, by_ffn = self.addnorm2.backward(grad)
        grad, by_attention = self.addnorm1.backward(grad + self.ffn.backward(by_ffn))
        return grad + sum(self.attention.backward(by_attention))


class _Stack(Layer):
    """What encoder and decoder share: tokens' embedding * sqrt(h), positional encoding, and blocks, which ``_block`` makes."""

    _scores = False  # whether a dense layer gives the scores of the tokens that follow, as a decoder's does

    def __init__(self, vocab_size, num_hiddens, ffn_num_hiddens, num_heads, num_blks, dropout=0.0, use_bias=False, *,
                 num_kv_heads=None, activation="relu", max_len=1000, rotary=None, qk_norm: bool | float = False,
                 alibi=None, sink=False, seed=None, rng=None) -> None:  # fmt: skip
        rng = np.random.default_rng(rng)
        self.num_hiddens = num_hiddens
        self.embedding = Embedding(vocab_size, num_hiddens, seed=seed, rng=rng)
        self.pos_encoding = PositionalEncoding(num_hiddens, dropout, max_len, rng=rng)
        self.blks = [
            self._block(
                num_hiddens, ffn_num_hiddens, num_heads, dropout, i=i, use_bias=use_bias, num_kv_heads=num_kv_heads,
                activation=activation, rotary=rotary, qk_norm=qk_norm, alibi=alibi, sink=sink,
                seed=layers.child(seed, f"blocks.{i}"), rng=rng,
            )
            for i in range(num_blks)
        ]  # fmt: skip
        if self._scores:
            self.dense = Dense(vocab_size, seed=layers.child(seed, "dense"), rng=rng)

    def _embedded(self, X, first, seed):
        return self.pos_encoding(self.embedding(X) * math.sqrt(self.num_hiddens), first, rng=seed)

    def _by_embedded(self, grad):
        return self.embedding.backward(self.pos_encoding.backward(grad) * math.sqrt(self.num_hiddens))


class TransformerEncoder(layers.ShowsBlocks, _Stack, _Reads):
    """Embedding * sqrt(h), positional encoding, and ``num_blks`` blocks: tokens (batch, n) -> (batch, n, num_hiddens).

    Its backward returns (): tokens have no gradient.
    """

    def _block(self, *sizes, i, **options):
        return TransformerEncoderBlock(*sizes, **options)

    def forward(self, X, valid_lens=None, *, cache=None, rng=None, **options):
        return layers.encoded(tab, self, X, valid_lens, cache, rng, **options)

    def vjp(self, grad):
        for block in reversed(self.blks):
            grad = block.backward(grad)
        return self._by_embedded(grad)


class TransformerDecoderBlock(Layer):
    """Causal self-attention, attention to an encoder's outputs and a position-wise network, each with AddNorm.

    Its backward, of a call whose state held no cache yet, returns the gradients by X and by the encoder's outputs.
    """

    def __init__(self, num_hiddens, ffn_num_hiddens, num_heads, dropout=0.0, i=0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False, seed=None,
                 rng=None) -> None:  # fmt: skip
        rng = np.random.default_rng(rng)
        self.i = i
        attention = partial(
            MultiHeadAttention, num_hiddens, num_heads, dropout, use_bias, num_kv_heads=num_kv_heads, qk_norm=qk_norm,
            sink=sink, rng=rng,
        )  # fmt: skip
        self.attention1 = attention(rotary=rotary, alibi=alibi, seed=layers.child(seed, "attention1"))
        self.addnorm1 = AddNorm(num_hiddens, dropout, rng=rng)
        self.attention2 = attention(seed=layers.child(seed, "attention2"))
        self.addnorm2 = AddNorm(num_hiddens, dropout, rng=rng)
        self.ffn = PositionWiseFFN(
            ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"), rng=rng
        )  # fmt: skip
        self.addnorm3 = AddNorm(num_hiddens, dropout, rng=rng)

    def __call__(self, X: A, state: list[Any], **options: Any) -> tuple[A, list[Any]]:
        outputs, lens, caches = layers.parts_of_state(state, self.i + 1, exactly=False)
        Y, cache = super().__call__(X, outputs, lens, cache=caches[self.i], **options)
        return Y, layers.following(state, self.i, cache)

    def forward(self, X, enc_outputs, enc_valid_lens, *, cache, rng=None, **options):
        seeds = [layers.seed_of(tab, rng, part, attends=part in (0, 2)) for part in range(5)]
        options = layers.with_causal(options)
        Y, cache = self.attention1(X, X, X, cache=cache, rng=seeds[0], **options)
        Y = self.addnorm1(X, Y, rng=seeds[1])
        Z = self.attention2(Y, enc_outputs, enc_outputs, enc_valid_lens, rng=seeds[2])
        Z = self.addnorm2(Y, Z, rng=seeds[3])
        return self.addnorm3(Z, self.ffn(Z), rng=seeds[4]), cache

    def vjp(self, grad):
        grad, by_ffn = self.addnorm3.backward(grad)
        grad, by_attention = self.addnorm2.backward(grad + self.ffn.backward(by_ffn))
        by_queries, by_keys, by_values = self.attention2.backward(by_attention)
        grad, by_attention = self.addnorm1.backward(grad + by_queries)
        return grad + sum(self.attention1.backward(by_attention)), by_keys + by_values


class TransformerDecoder(layers.KeepsState, _Stack):
    """Embedding * sqrt(h), positional encoding, ``num_blks`` blocks that attend to an encoder's outputs, and a dense layer.

    Its backward, of a call whose state held no cache yet, returns the gradient by the encoder's outputs.
    """

    _block, _scores = TransformerDecoderBlock, True

    def __call__(self, X: Any, state: list[Any], **options: Any) -> tuple[Floats, list[Any]]:
        outputs, lens, caches = layers.parts_of_state(state, len(self.blks))
        logits, caches = super().__call__(X, outputs, lens, caches=caches, **options)
        return logits, [outputs, lens, caches]

    def forward(self, X, enc_outputs, enc_valid_lens, *, caches, rng=None, **options):
        logits, state = layers.decoded(tab, self, X, [enc_outputs, enc_valid_lens, caches], rng, **options)
        return logits, state[2]

    def vjp(self, grad):
        grad, by_outputs = self.dense.backward(grad), 0
        for block in reversed(self.blks):
            grad, by_block = block.backward(grad)
            by_outputs = by_outputs + by_block
        self._by_embedded(grad)
        return by_outputs


# ---- weights of a forward pass, for kvattn/maps.py


def maps(model, inputs, options):
    """kvattn.maps' part."""
    found = [(".".join(path), part) for path, part in parts(model) if isinstance(part, _Attention)]
    return layers.maps(found, lambda: model(*inputs, **options), np.reshape)


# ---- weights by kvattn's names, for kvattn/weights.py


class _Slot(NamedTuple):
    array: np.ndarray | None
    shape: tuple[int | None, ...]

    def read(self):
        """The array itself; None where there are no values yet."""
        return self.array


def slots(layer):
    """{name: slot} of every weight."""
    found = {}
    for name, part, key in declared(layer):
        array = part._state.arrays.get(key)
        shape = part._state.declared[key][0] if array is None else array.shape
        found[name] = _Slot(array, layers.own_shape(name, shape))
    return found


def assign(layer, arrays):
    """Put these arrays, whose names and shapes fit, in the layer's weights; returns the layer. New ones keep float64."""
    for name, part, key in declared(layer):
        array = layers.native(name, arrays[name]) if part.kind == "dense" else arrays[name]
        if key in part._state.arrays:
            part._state.arrays[key][...] = array
        else:
            part._state.arrays[key] = np.array(array, np.float64 if array.dtype == np.float64 else np.float32, order="C")
    return layer


layers.describe(globals())
