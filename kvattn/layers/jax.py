"""The layers as flax.linen.Modules. The names and shapes of their weights are in kvattn/layers/__init__.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from kvattn import api, checks, conversion, layers, prepare
from kvattn.backends import jax as tab
from kvattn.kernels.jax import programs
from kvattn.signatures import LayerOptions

# layers.LAYERS, in words that type checkers read
__all__ = [
    "AddNorm", "AdditiveAttention", "DotProductAttention", "GatedAttention", "MultiHeadAttention", "MultiplicativeAttention",
    "PositionWiseFFN", "PositionalEncoding", "TransformerDecoder", "TransformerDecoderBlock", "TransformerEncoder",
    "TransformerEncoderBlock",
]  # fmt: skip

# X and queries (batch, n, d), keys (batch, m, d), values (batch, m, v), valid_lens (batch,) or (batch, n); ``options`` are
# kvattn.attention's: mask, causal, window, ... With training=True give rngs={"dropout": key}. Results have the dtype of the
# inputs, to which weights are cast.

_keyword = partial(dataclasses.field, kw_only=True)


Call = TypeVar("Call", bound=Callable[..., Any])


def _exact(call: Call) -> Call:
    """The tab's precision for a whole call: full float32 products, and float64 where JAX has it off."""
    inner = programs.exact(call)

    @functools.wraps(call)
    def outer(module, *args, **options):
        if module.scope is None and not isinstance(module, DotProductAttention):  # which has no weights
            raise ValueError(
                f"{type(module).__name__} keeps no weights: variables = layer.init(jax.random.key(0), *inputs) makes them, "
                "and layer.apply(variables, *inputs) calls it"
            )
        args, options = jax.tree.map(_array, (args, options))
        wide = not jax.config.jax_enable_x64 and any(_is(np.float64, x) for x in jax.tree.leaves((args, options)))
        if wide and any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(module.variables)):
            raise TypeError(
                "jit and grad of a layer with float64 inputs need JAX's 64 bits for the whole transformation: "
                "jax.config.update('jax_enable_x64', True); or give float32 inputs"
            )
        return inner(module, *args, **options)

    return outer


# ---- what type checkers see of a call

if TYPE_CHECKING:

    class _Attends(Protocol):
        """(output, weights): unless return_weights=False asks for the output alone, and return_lse for the lse too."""

        @overload
        def __call__(
            self, queries: Any, keys: Any, values: Any, valid_lens: Any = None, training: bool = False, *,
            return_weights: Literal[True] | None = None, return_lse: Literal[False] = False, cache: None = None,
            **options: Unpack[LayerOptions],
        ) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip
        @overload
        def __call__(
            self, queries: Any, keys: Any, values: Any, valid_lens: Any = None, training: bool = False, *,
            return_weights: Literal[False], return_lse: Literal[False] = False, cache: None = None,
            **options: Unpack[LayerOptions],
        ) -> jax.Array: ...  # fmt: skip
        @overload
        def __call__(
            self, queries: Any, keys: Any, values: Any, valid_lens: Any = None, training: bool = False, *,
            return_weights: Literal[True] | None = None, return_lse: Literal[True], cache: None = None,
            **options: Unpack[LayerOptions],
        ) -> tuple[jax.Array, jax.Array, jax.Array]: ...  # fmt: skip
        @overload
        def __call__(
            self, queries: Any, keys: Any, values: Any, valid_lens: Any = None, training: bool = False, *,
            return_weights: Literal[False], return_lse: Literal[True], cache: None = None, **options: Unpack[LayerOptions],
        ) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip
        @overload
        def __call__(
            self, queries: Any, keys: Any, values: Any, valid_lens: Any = None, training: bool = False, **options: Any
        ) -> Any: ...

    Plain = TypeVar("Plain", covariant=True)  # what a call returns that says nothing of weights
    With = TypeVar("With", covariant=True)
    Without = TypeVar("Without", covariant=True)

    class _Options(LayerOptions, total=False):
        valid_lens: Any
        training: bool
        cache: None  # with one a call returns more

    class _Calls(Protocol[Plain, With, Without]):
        """A call (X, valid_lens or state, training), of encoders, decoders and their blocks."""

        @overload
        def __call__(self, X: Any, *others: Any, return_weights: None = None, **options: Unpack[_Options]) -> Plain: ...
        @overload
        def __call__(self, X: Any, *others: Any, return_weights: Literal[True], **options: Unpack[_Options]) -> With: ...
        @overload
        def __call__(self, X: Any, *others: Any, return_weights: Literal[False], **options: Unpack[_Options]) -> Without: ...
        @overload
        def __call__(self, X: Any, *others: Any, **options: Any) -> Any: ...

    Weighed = tuple[jax.Array, jax.Array]
    Decoded = tuple[jax.Array, list[Any]]  # a decoder's output, and its state
    DecodedBlock = tuple[jax.Array, list[Any], jax.Array, jax.Array]  # and the weights of both attentions

    def _attends(call: Any) -> _Attends: ...
    def _encodes(call: Any) -> _Calls[Weighed, Weighed, jax.Array]: ...
    def _reads(call: Any) -> _Calls[jax.Array, tuple[jax.Array, list[jax.Array]], jax.Array]: ...
    def _decodes_block(call: Any) -> _Calls[DecodedBlock, DecodedBlock, Decoded]: ...
    def _decodes(call: Any) -> _Calls[Decoded, tuple[jax.Array, list[Any], list[list[jax.Array]]], Decoded]: ...

else:
    _attends = _encodes = _reads = _decodes_block = _decodes = _exact


def _array(x):
    return tab.asarray(x) if isinstance(x, np.ndarray) else x


def _is(dtype, x):
    return tab.is_array(x) and x.dtype == dtype


def _initializer(name, seed):
    """flax's kind of function for the first values of the weight that kvattn calls ``name``."""

    def init(key, shape, dtype=jnp.float32):
        if seed is not None:
            return jnp.asarray(layers.initial(seed, name, shape), dtype)
        if name == "embedding":
            return jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1])
        return jax.random.uniform(key, shape, dtype, -layers.glorot(shape), layers.glorot(shape))

    return init


def _dense(name, features, bias, seed):
    options = {"kernel_init": _initializer(name, seed), "promote_dtype": _as_inputs, "dot_general": _product}
    return nn.Dense(features, use_bias=bias, **options)


def _product(inputs, kernel, dimensions, precision=None):
    """What flax asks for in place of lax.dot_general, always along the last axis."""
    return programs.product(inputs, kernel)


def _as_inputs(inputs, *weights, dtype=None):
    return (inputs, *(None if x is None else x.astype(inputs.dtype) for x in weights))


def _several(results):
    return results if isinstance(results, tuple) else (results,)


class _Layer(nn.Module):
    """A module that checks its fields when it is made, not in its first call."""

    def __post_init__(self):
        fields = vars(self)
        if "dropout" in fields:
            checks.probability("dropout", self.dropout)
        if "num_heads" in fields:
            width = layers.head_width(self.num_hiddens, self.num_heads, self.num_kv_heads)
            layers.check_rotary(fields.get("rotary"), width)
            layers.check_qk_norm(fields.get("qk_norm", False))
            layers.check_alibi(fields.get("alibi"), self.num_heads)
            checks.flag("sink", fields.get("sink", False))
        if "activation" in fields:
            layers.check_activation(self.activation)
        super().__post_init__()


# ---- attention


class _Attention(_Layer):
    """What the attention layers share. A call returns (output, weights), as d2l's does: weights (batch, n, m), or
    (batch * heads, n, m), before dropout. Given ``return_weights``, it returns what kvattn.attention returns.

    Under jax.jit weights that nobody reads cost nothing; eagerly they cost a second call, which return_weights=False spares.
    """

    def _attend(self, score, queries, keys, values, valid_lens, training, *, rng=None, return_weights=None, **options):
        options |= {"score": score, "valid_lens": valid_lens, "backend": "jax"}
        rate = self.dropout if training else 0.0
        drops = {"dropout": rate, "rng": self.make_rng("dropout") if rate and rng is None else rng}
        if return_weights is not None:
            return api.attention(queries, keys, values, **options, **drops, return_weights=return_weights)
        output, *lse = _several(api.attention(queries, keys, values, **options, **drops))
        # apart from the output: it takes the fused path, and XLA drops what is not read
        weights = api.attention(queries, keys, keys[..., :1], **options | {"return_lse": False}, return_weights=True)[1]
        return output, weights.reshape(math.prod(weights.shape[:-2]), *weights.shape[-2:]), *lse


class DotProductAttention(_Attention):
    """Scaled dot-product attention, d2l's call: (queries, keys, values, valid_lens=None, training=False, **options)."""

    dropout: float = 0.0

    @_attends
    def __call__(self, queries, keys, values, valid_lens=None, training=False, **options):
        return self._attend(api.scaled_dot_score, queries, keys, values, valid_lens, training, **options)


class AdditiveAttention(_Attention):
    """Attention by the score w_v . tanh(q W_q + k W_k) with ``num_hiddens`` hidden units."""

    num_hiddens: int
    dropout: float = 0.0
    seed: layers.Seed = _keyword(default=None)

    def setup(self):
        self.W_k = _dense("W_k", self.num_hiddens, False, self.seed)
        self.W_q = _dense("W_q", self.num_hiddens, False, self.seed)
        self.w_v = _dense("w_v", 1, False, self.seed)

    @_attends
    def __call__(self, queries, keys, values, valid_lens=None, training=False, **options):
        sizes = {"W_q": queries.shape[-1], "W_k": keys.shape[-1], "w_v": self.num_hiddens}
        weights = {name: _kernel(getattr(self, name), size).astype(queries.dtype) for name, size in sizes.items()}
        score = partial(api.additive_score, **weights | {"w_v": weights["w_v"][:, 0]})
        return self._attend(score, queries, keys, values, valid_lens, training, **options)


def _kernel(dense, size):
    """The matrix of a Dense layer, made by a call with inputs of this ``size`` where there is none yet."""
    if not dense.has_variable("params", "kernel"):
        dense(jnp.zeros((1, size), jnp.float32))
    return dense.variables["params"]["kernel"]


class MultiplicativeAttention(_Attention):
    """Attention by the score q W k; W takes its sizes from the first call."""

    dropout: float = 0.0
    seed: layers.Seed = _keyword(default=None)

    @_attends
    @nn.compact
    def __call__(self, queries, keys, values, valid_lens=None, training=False, **options):
        W = self.param("W", _initializer("W", self.seed), (queries.shape[-1], keys.shape[-1]))
        score = partial(api.multiplicative_score, W=W.astype(queries.dtype))
        return self._attend(score, queries, keys, values, valid_lens, training, **options)


class GatedAttention(_Attention):
    """Attention by the score sigmoid(w_g . [q; k]) (q . k); w_g takes its size from the first call."""

    dropout: float = 0.0
    seed: layers.Seed = _keyword(default=None)

    @_attends
    @nn.compact
    def __call__(self, queries, keys, values, valid_lens=None, training=False, **options):
        w_g = self.param("w_g", _initializer("w_g", self.seed), (2 * queries.shape[-1],))
        score = partial(api.gated_score, w_g=w_g.astype(queries.dtype))
        return self._attend(score, queries, keys, values, valid_lens, training, **options)


NORMS = ("q_norm", "k_norm")


class MultiHeadAttention(_Layer):
    """Multi-head attention with ``num_hiddens`` features in all heads together; (output, weights (batch * heads, n, m)).

    With ``cache=`` (a kvattn.KVCache, KVCache() at first) a call returns (output, weights, cache). Given
    ``return_weights``, False leaves the weights out and True returns them as (batch, heads, n, m).
    """

    num_hiddens: int
    num_heads: int
    dropout: float = 0.0
    bias: bool = False
    num_kv_heads: int | None = _keyword(default=None)
    seed: layers.Seed = _keyword(default=None)
    use_bias: bool | None = _keyword(default=None)
    rotary: Any = _keyword(default=None)
    qk_norm: bool | float = _keyword(default=False)
    alibi: Any = _keyword(default=None)
    sink: bool = _keyword(default=False)

    def setup(self):
        bias = self.bias if self.use_bias is None else self.use_bias
        width = self.num_hiddens // self.num_heads
        self._turns, shared = layers.check_rotary(self.rotary, width), self._kv_heads * width
        self._epsilon, self._slopes = layers.check_qk_norm(self.qk_norm), layers.check_alibi(self.alibi, self.num_heads)
        normed = self._epsilon is not None
        self._norms = [self.param(name, nn.initializers.ones, (width,)) if normed else None for name in NORMS]
        self._sink = self.param("sink", nn.initializers.zeros, (self.num_heads,)) if self.sink else None
        self.attention = DotProductAttention(self.dropout)
        self.W_q = _dense("W_q", self.num_hiddens, bias, self.seed)
        self.W_k = _dense("W_k", shared, bias, self.seed)
        self.W_v = _dense("W_v", shared, bias, self.seed)
        self.W_o = _dense("W_o", self.num_hiddens, bias, self.seed)

    @property
    def _kv_heads(self):
        return self.num_kv_heads or self.num_heads

    @_attends
    def __call__(self, queries, keys, values, valid_lens=None, training=False, *, cache=None, **options):
        queries, keys, values = prepare.arrays(tab, queries=queries, keys=keys, values=values)
        if cache is None:  # else a later call may attend to keys that no query attends to now
            queries, keys, values = layers.hide_unseen(tab, queries, keys, values, self.num_heads, valid_lens, **options)
        queries = tab._split(self.W_q(queries), self.num_heads)  # (batch, heads, n, d)
        keys, values = tab._split(self.W_k(keys), self._kv_heads), tab._split(self.W_v(values), self._kv_heads)
        norms = (x.astype(queries.dtype) if _is(np.float64, x) else x for x in self._norms)
        queries, keys = layers.normed(tab, self._epsilon, queries, keys, *norms)
        queries, keys, values, cache = layers.placed("jax", queries, keys, values, cache, self._turns, options)
        valid_lens = layers.lengths(tab, valid_lens, queries)
        options = layers.with_alibi("jax", options, self._slopes, queries)
        options = layers.with_sink(options, None if self._sink is None else self._sink.astype(queries.dtype))
        results = self.attention(queries, keys, values, valid_lens, training, **options)
        return layers.joined(tab._join, self.W_o, results, cache)


# ---- the other parts of a transformer


class PositionalEncoding(_Layer):
    """X + P, then dropout; P (1, max_len, num_hiddens) holds sines and cosines of the position, counted from ``offset``.

    P is computed, no variable; it is sown in "intermediates", as d2l's is.
    """

    num_hiddens: int
    dropout: float = 0.0
    max_len: int = 1000

    def setup(self):
        self.drop = nn.Dropout(self.dropout)

    @property
    def P(self) -> jax.Array:
        return jnp.asarray(_encoding(self.max_len, self.num_hiddens)[None], jnp.float32)

    @_exact
    def __call__(self, X, training=False, *, offset=0, rng=None) -> jax.Array:
        layers.check_length(self.max_len, X.shape[1], offset)
        (X,) = prepare.arrays(tab, X=X)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "P", self.P)
        P = _encoding(self.max_len, self.num_hiddens).astype(X.dtype)
        if conversion.is_integer(offset):
            P = P[offset : offset + X.shape[1]]  # in NumPy: a compiled program keeps these rows only
        else:
            P = jax.lax.dynamic_slice_in_dim(P, offset, X.shape[1])
        return _dropped(self.drop, X + P, training, rng)


def _dropped(drop, X, training, rng):
    """What an nn.Dropout makes of X; given a seed, by its pattern."""
    if rng is None or not (training and drop.rate):
        return drop(X, deterministic=not training)
    return layers.dropped(tab, X, drop.rate, rng)


@functools.lru_cache(maxsize=4)
def _encoding(max_len, num_hiddens):
    return layers.encoding(max_len, num_hiddens)


class _LayerNorm(nn.LayerNorm):
    shape: tuple[int, ...] | None = None  # None: the first call's last axis


class AddNorm(_Layer):
    """Layer norm of X + dropout(Y), over the axes of ``norm_shape``; the last, if none is given."""

    dropout: float = 0.0
    norm_shape: Any = _keyword(default=None)

    def setup(self):
        shape = (self.norm_shape,) if conversion.is_integer(self.norm_shape) else self.norm_shape
        axes = tuple(range(-len(shape or (None,)), 0))
        self.drop = nn.Dropout(self.dropout)
        self.ln = _LayerNorm(  # the fast variance, E[x^2] - E[x]^2, would cancel
            layers.EPSILON, reduction_axes=axes, feature_axes=axes, use_fast_variance=False, shape=shape and tuple(shape)
        )

    @_exact
    def __call__(self, X, Y, training=False, *, rng=None) -> jax.Array:
        X, Y = prepare.arrays(tab, X=X, Y=Y)
        if (shape := self.ln.shape) is not None:
            checks.same_shape("X", X, (*X.shape[: -len(shape)], *shape), "norm_shape says")
        return self.ln(_dropped(self.drop, Y, training, rng) + X).astype(X.dtype)


class PositionWiseFFN(_Layer):
    """activation(X W_1 + b_1) W_2 + b_2; the activation is "relu" or "gelu" (by erf)."""

    ffn_num_hiddens: int
    ffn_num_outputs: int
    activation: str = _keyword(default="relu")
    seed: layers.Seed = _keyword(default=None)

    def setup(self):
        self.dense1 = _dense("W_1", self.ffn_num_hiddens, True, self.seed)
        self.dense2 = _dense("W_2", self.ffn_num_outputs, True, self.seed)

    @_exact
    def __call__(self, X) -> jax.Array:
        (X,) = prepare.arrays(tab, X=X)
        X = self.dense1(X)
        return self.dense2(nn.relu(X) if self.activation == "relu" else nn.gelu(X, approximate=False))


class _Block(_Layer):
    """What the blocks of encoder and decoder share: what they are made of, and with."""

    num_hiddens: int
    ffn_num_hiddens: int
    num_heads: int
    dropout: float = 0.0
    num_kv_heads: int | None = _keyword(default=None)
    activation: str = _keyword(default="relu")
    rotary: Any = _keyword(default=None)
    qk_norm: bool | float = _keyword(default=False)
    alibi: Any = _keyword(default=None)
    sink: bool = _keyword(default=False)
    seed: layers.Seed = _keyword(default=None)

    def _attention(self, name, **options):
        return MultiHeadAttention(
            self.num_hiddens, self.num_heads, self.dropout, self.use_bias, num_kv_heads=self.num_kv_heads,
            qk_norm=self.qk_norm, sink=self.sink, seed=layers.child(self.seed, name), **options,
        )  # fmt: skip

    def _addnorm(self):
        return AddNorm(self.dropout, norm_shape=self.num_hiddens)

    def _ffn(self):
        seed = layers.child(self.seed, "ffn")
        return PositionWiseFFN(self.ffn_num_hiddens, self.num_hiddens, activation=self.activation, seed=seed)


class TransformerEncoderBlock(_Block):
    """Self-attention and a position-wise network, each with AddNorm; (Y, weights), with ``cache=`` (Y, weights, cache)."""

    use_bias: bool = False

    def setup(self):
        self.attention = self._attention("attention", rotary=self.rotary, alibi=self.alibi)
        self.addnorm1 = self._addnorm()
        self.ffn = self._ffn()
        self.addnorm2 = self._addnorm()

    @_encodes
    def __call__(self, X, valid_lens=None, training=False, *, cache=None, rng=None, **options):
        rng, *seeds = (layers.seed_of(tab, rng, part, attends=part == 0) for part in range(3))
        options |= {} if rng is None else {"rng": rng}
        Y, *rest = _several(self.attention(X, X, X, valid_lens, training, cache=cache, **options))
        Y = self.addnorm1(X, Y, training, rng=seeds[0])
        Y = self.addnorm2(Y, self.ffn(Y), training, rng=seeds[1])
        return (Y, *rest) if rest else Y


class _Stack(_Layer):
    """What encoder and decoder share: tokens' embedding * sqrt(h), positional encoding, and blocks of the class ``BLOCK``."""

    BLOCK = None

    vocab_size: int
    num_hiddens: int
    ffn_num_hiddens: int
    num_heads: int
    num_blks: int
    dropout: float = 0.0
    use_bias: bool = False
    num_kv_heads: int | None = _keyword(default=None)
    activation: str = _keyword(default="relu")
    max_len: int = _keyword(default=1000)
    rotary: Any = _keyword(default=None)
    qk_norm: bool | float = _keyword(default=False)
    alibi: Any = _keyword(default=None)
    sink: bool = _keyword(default=False)
    seed: layers.Seed = _keyword(default=None)

    def setup(self):
        self.embedding = nn.Embed(self.vocab_size, self.num_hiddens, embedding_init=_initializer("embedding", self.seed))
        self.pos_encoding = PositionalEncoding(self.num_hiddens, self.dropout, self.max_len)
        self.blks = [
            self.BLOCK(
                self.num_hiddens, self.ffn_num_hiddens, self.num_heads, self.dropout, use_bias=self.use_bias,
                num_kv_heads=self.num_kv_heads, activation=self.activation, rotary=self.rotary, qk_norm=self.qk_norm,
                alibi=self.alibi, sink=self.sink, seed=layers.child(self.seed, f"blocks.{i}"), **self._place(i),
            )
            for i in range(self.num_blks)
        ]  # fmt: skip

    def _place(self, i):
        return {}

    def _embedded(self, X, training, first, rng):
        X, seed = self.embedding(X) * math.sqrt(self.num_hiddens), layers.seed_of(tab, rng, 0, attends=False)
        return self.pos_encoding(X, training, offset=first, rng=seed)

    def _asked(self, return_weights):
        """return_weights of the blocks: weights that are neither returned nor sown are not computed."""
        return False if return_weights is None and not self.is_mutable_collection("intermediates") else return_weights


class TransformerEncoder(_Stack):
    """Embedding * sqrt(h), positional encoding, and ``num_blks`` blocks: tokens (batch, n) -> (batch, n, num_hiddens).

    ``causal=True`` makes it a decoder. As d2l's it returns Y, and sows the list of the blocks' weights as
    "enc_attention_weights" where "intermediates" is mutable: else they are not computed. With ``cache=`` ([] at first) it
    takes the next tokens and returns (Y, weights, caches). Given ``return_weights``, the list follows Y, or does not.
    """

    BLOCK = TransformerEncoderBlock

    @_reads
    def __call__(self, X, valid_lens=None, training=False, *, cache=None, return_weights=None, rng=None, **options):
        caches = None if cache is None else layers.caches(cache, self.num_blks)
        X = self._embedded(X, training, caches[0].length if caches else 0, rng)
        sown = return_weights is None and cache is None
        options["return_weights"] = self._asked(return_weights) if sown else return_weights
        rests = []
        for i, block in enumerate(self.blks):
            seed = layers.seed_of(tab, rng, 1 + i)
            X, *rest = _several(block(X, valid_lens, training, cache=caches and caches[i], rng=seed, **options))
            if caches:
                caches[i] = rest.pop()
            rests.append(rest)
        lists = [list(x) for x in zip(*rests, strict=True)]  # of weights, if any, one a block
        if sown and lists:
            self.sow("intermediates", "enc_attention_weights", lists.pop(0))
        results = (X, *lists) if caches is None else (X, *lists, caches)
        return results if len(results) > 1 else X


class TransformerDecoderBlock(_Block):
    """Causal self-attention, attention to an encoder's outputs and a position-wise network, each with AddNorm.

    A call takes X and a decoder's state, and returns (Y, state, weights of the self-attention, weights of the other); in the
    state state[2][i] is this block's cache. Given return_weights=False, no weights. ``rotary`` and
    ``alibi`` are of the self-attention.
    """

    i: int = 0
    use_bias: bool = False

    def setup(self):
        self.attention1 = self._attention("attention1", rotary=self.rotary, alibi=self.alibi)
        self.addnorm1 = self._addnorm()
        self.attention2 = self._attention("attention2")
        self.addnorm2 = self._addnorm()
        self.ffn = self._ffn()
        self.addnorm3 = self._addnorm()

    @_decodes_block
    def __call__(self, X, state, training=False, *, return_weights=None, rng=None, **options):
        outputs, lens, caches = layers.parts_of_state(state, self.i + 1, exactly=False)
        seeds = [layers.seed_of(tab, rng, part, attends=part in (0, 2)) for part in range(5)]
        options, asked = layers.with_causal(options), {"return_weights": return_weights}
        Y, *own, cache = self.attention1(X, X, X, None, training, cache=caches[self.i], rng=seeds[0], **options, **asked)
        Y = self.addnorm1(X, Y, training, rng=seeds[1])
        Z, *other = _several(self.attention2(Y, outputs, outputs, lens, training, rng=seeds[2], **asked))
        Z = self.addnorm2(Y, Z, training, rng=seeds[3])
        return self.addnorm3(Z, self.ffn(Z), training, rng=seeds[4]), layers.following(state, self.i, cache), *own, *other


class TransformerDecoder(_Stack):
    """Embedding * sqrt(h), positional encoding, ``num_blks`` blocks that attend to an encoder's outputs, and a dense layer.

    decoder.apply(variables, X, state) takes the next tokens (batch, n), after those that the state's caches hold, and returns
    the logits (batch, n, vocab_size) of those that follow each, and the state for the next call. ``init_state`` gives the
    first state. Where "intermediates" is mutable it sows "dec_attention_weights": two lists of each block's weights, those
    of the self-attention and those of the attention to the encoder's outputs; given return_weights=True, they follow the state.

    Source: Vaswani et al. 2017, section 3.1.
    """

    BLOCK = TransformerDecoderBlock

    def setup(self):
        super().setup()
        self.dense = _dense("W", self.vocab_size, True, layers.child(self.seed, "dense"))

    def _place(self, i):
        return {"i": i}

    def init_state(self, enc_outputs, enc_valid_lens=None) -> list[Any]:
        return [enc_outputs, enc_valid_lens, [None] * self.num_blks]

    @_decodes
    def __call__(self, X, state, training=False, *, return_weights=None, rng=None, **options):
        *_, caches = layers.parts_of_state(state, self.num_blks)
        X = self._embedded(X, training, caches[0].length if caches else 0, rng)
        options["return_weights"] = self._asked(return_weights)
        weights = []
        for i, block in enumerate(self.blks):
            X, state, *rest = block(X, state, training, rng=layers.seed_of(tab, rng, 1 + i), **options)
            weights.append(rest)
        weights = [list(x) for x in zip(*weights, strict=True)]  # two lists, if any
        if return_weights is None and weights:
            self.sow("intermediates", "dec_attention_weights", weights)
        return (self.dense(X), state, weights) if return_weights else (self.dense(X), state)


# ---- weights of a forward pass, for kvattn/maps.py


def maps(model, inputs, options):
    """kvattn.maps' part."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, then its variables and inputs, not {type(model).__name__}")

    def attends(module, method):
        return isinstance(module, _Attention) and method == "__call__"

    sown = model.apply(*inputs, **options, capture_intermediates=attends, mutable=["intermediates"])[1]
    found = {}
    for path, (*_, results) in flatten_dict(sown.get("intermediates", {}), sep=".").items():
        if path.split(".")[-1] == "__call__" and isinstance(results, tuple):  # else a call that leaves the weights out
            output, weights, *_ = results
            name = layers.map_name(path.removesuffix("__call__").removesuffix("."))
            found[name] = weights.reshape(*output.shape[:-2], *weights.shape[-2:])
    return found


# ---- weights by kvattn's names, for kvattn/weights.py: of variables {"params": tree}, or of a module that has none yet


def _params(variables):
    """{path: array} of the weights."""
    if isinstance(variables, nnx.Module):  # which does
        return flatten_dict(nnx.to_pure_dict(nnx.state(variables, nnx.Param)))
    strange = sorted(set(variables) - {"params", "intermediates"})
    if strange:
        raise TypeError(f"variables hold {', '.join(strange)}, which has no name outside JAX; weights are {{'params': ...}}")
    return flatten_dict(variables.get("params", {}))


def _sizes(part, path=()):
    """{path: shape} of the weights that a module will have, None for a size that its first inputs give."""
    if isinstance(part, nn.Dense):
        return {(*path, "kernel"): (None, part.features)} | ({(*path, "bias"): (part.features,)} if part.use_bias else {})
    if isinstance(part, nn.LayerNorm):
        shape, has = getattr(part, "shape", None) or (None,), {"scale": part.use_scale, "bias": part.use_bias}
        return {(*path, name): shape for name in has if has[name]}
    if isinstance(part, nn.Embed):
        return {(*path, "embedding"): (part.num_embeddings, part.features)}
    if isinstance(part, MultiplicativeAttention):
        return {(*path, "W"): (None, None)}
    if isinstance(part, GatedAttention):
        return {(*path, "w_g"): (None,)}
    if isinstance(part, nn.Dropout):
        return {}
    kind = type(part)
    if not isinstance(part, nn.Sequential) and any(hasattr(getattr(kind, name, None), "compact") for name in dir(kind)):
        raise TypeError(
            f"{kind.__name__} makes its weights in its first call (it is nn.compact): give variables, module.init(...)'s result"
        )
    own = {(*path, "sink"): (part.num_heads,)} if isinstance(part, MultiHeadAttention) and part.sink else {}
    if isinstance(part, MultiHeadAttention) and layers.check_qk_norm(part.qk_norm) is not None:
        own |= {(*path, name): (part.num_hiddens // part.num_heads,) for name in NORMS}
    part = part if path else part.bind({}, rngs={"params": jax.random.key(0)}, mutable=["params"])  # for weights of its own
    hasattr(part, "anything")  # runs its setup
    inside = jax.tree.leaves(vars(part), is_leaf=lambda x: isinstance(x, nn.Module))
    children = [x for x in inside if isinstance(x, nn.Module) and x.parent is part]
    return own | {name: shape for child in children for name, shape in _sizes(child, (*path, child.name)).items()}


_KINDS = {"scale": "norm", "bias": "norm", "embedding": "embedding"}  # of what has no kernel beside it
_HEADS = {"query": "W_q", "key": "W_k", "value": "W_v", "out": "W_o"}  # flax's own multi-head attention: (d, heads, d / heads)


class _Slot(NamedTuple):
    path: tuple
    shape: tuple  # here, (features in, out); None in it where the first inputs decide
    array: Any  # None of a module

    def read(self):
        return tab.to_numpy(self.array).reshape(self.shape)


def check_keeps(x):
    """Raises ValueError for a module, whose variables hold its weights."""
    if isinstance(x, nn.Module):
        raise ValueError("a flax module keeps no weights: give its variables, what module.init(...) returned")


def slots(x):
    """{name: slot} of every weight."""
    module = isinstance(x, nn.Module)
    arrays = {} if module else _params(x)
    found, sizes = {}, _sizes(x) if module else {path: array.shape for path, array in arrays.items()}
    for path, size in sizes.items():
        *parents, leaf = path
        kernel = sizes.get((*parents, "kernel"), ()) if leaf in ("kernel", "bias") else ()
        if len(kernel) == 2:
            kind = "dense"
        elif len(kernel) == 3 and parents and parents[-1] in _HEADS:
            cut = 0 if leaf == "bias" else 2 if parents[-1] == "out" else 1
            size = tuple(math.prod(part) for part in (size[:cut], size[cut:]) if part)
            kind, parents = "dense", [*parents[:-1], _HEADS[parents[-1]]]
        elif leaf in _KINDS and not kernel:
            kind = _KINDS[leaf]
        elif leaf in ("W", "w_g", "sink", *NORMS):
            kind, parents = "embedding", path  # that kind's only weight has its name
        else:
            raise TypeError(f"{'.'.join(path)} {size} is no dense, norm or embedding layer's: it has no name outside JAX")
        name = layers.names(tuple(parents), kind)["bias" if leaf == "bias" else "weight"]
        if name in found:
            raise ValueError(f"{'.'.join(path)} and {'.'.join(found[name].path)} would both be called {name}: rename one")
        found[name] = _Slot(path, layers.own_shape(name, size), arrays.get(path))
    return found


def assign(x, arrays):
    """New variables with these arrays, whose names and shapes fit, in the dtypes of the old ones, else float64 or float32.

    Raises TypeError for a new embedding of float64 without JAX's 64 bits: calls with tokens would round it.
    """
    wide, found, made = any(array.dtype == np.float64 for array in arrays.values()), slots(x), {}
    embeds = any(path[-1] == "embedding" and old is None for path, _, old in found.values())
    if wide and embeds and not jax.config.jax_enable_x64:
        raise TypeError(
            "weights are float64, which a module that takes tokens computes in JAX's 64 bits only: "
            "jax.config.update('jax_enable_x64', True), or give weights of float32, x.astype('float32')"
        )
    for name, (path, _, old) in found.items():
        array = layers.native(name, arrays[name]) if old is None else arrays[name].reshape(old.shape)
        made[path] = tab.asarray(array, dtype=old.dtype.name if old is not None else "float64" if wide else "float32")
    if isinstance(x, nnx.Module):
        nnx.update(x, unflatten_dict(made))
        return x
    return {**({} if isinstance(x, nn.Module) else x), "params": unflatten_dict(made)}


layers.describe(globals(), details={})
