"""The layers as gluon HybridBlocks. The names and shapes of their weights are in kvattn/layers/__init__.py."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import cache, partial
from typing import NamedTuple
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy

from kvattn import api, checks, conversion, layers
from kvattn.backends import mxnet as tab
from kvattn.kernels.mxnet import views
from kvattn.layers import symbols
from kvattn.old_numpy import old_names

with old_names():
    import mxnet as mx
    from mxnet import autograd, np
    from mxnet.gluon import nn
    from mxnet.gluon.parameter import Parameter

__all__ = [*layers.LAYERS]

BULK = 16  # operators of a small call that MXNet's engine is handed at one time, since waking it for each takes longer

# X and queries (batch, n, d), keys (batch, m, d), values (batch, m, v), valid_lens (batch,) or (batch, n); ``options`` are
# kvattn.attention's: mask, causal, window, ... ``kwargs`` are gluon's: prefix and params.


class _Layer(nn.HybridBlock):
    """What the layers share: options in a call, and copies.

    Hybridized, a call without options runs as one graph. With options or a cache it runs part by part, unless the layer is
    itself a part of a hybridized block, whose graph then holds the options. What begins with an underscore and is not
    defined in this file is gluon's own, as read in MXNet 1.9.1.
    """

    def __init__(self, **kwargs):
        if not mx.util.is_np_array():
            raise RuntimeError("kvattn's MXNet layers compute on mx.np arrays: call mxnet.npx.set_np() first")
        super().__init__(**kwargs)

    def __call__(self, *args, **options):
        code = self.hybrid_forward.__code__
        for name in code.co_varnames[2 + len(args) : code.co_argcount]:  # gluon passes on what has a place
            if name not in options:
                break
            args += (options.pop(name),)
        return super().__call__(*args, *([options] if options else []))

    def forward(self, *args):
        args, options = (args[:-1], args[-1]) if isinstance(args[-1], dict) else (args, {})
        while args[-1] is None:
            args = args[:-1]
        if symbols.deferred(args[0]):
            return self.hybrid_forward(mx.symbol, *args, **{name: x.var() for name, x in self._reg_params.items()}, **options)
        if self._active and not options and self._fits_graph(args):
            return super().forward(*args)
        if any(x._deferred_init for x in self._reg_params.values()):  # for sizes, which this first call gives
            self.infer_shape(*args)
            for parameter in self._reg_params.values():
                parameter._finish_deferred_init()
        values = {name: x.data(args[0].ctx) for name, x in self._reg_params.items()}
        with mx.engine.bulk(BULK) if args[0].size < views.SMALL else nullcontext():
            return self.hybrid_forward(mx.ndarray, *args, **values, **options)

    def _fits_graph(self, args):
        """Whether one graph holds calls like this: gluon makes it of the first call, for arrays and Nones in its places.

        MXNet's own products of arrays without elements fail in a graph, and later.
        """
        form = [-1 if x is None else 0 for x in args]
        fit = all(x is None or (tab.is_array(x) and x.size) for x in args)
        return fit and (not self._cached_graph or self._in_format == form)

    @mx.util.use_np
    def __deepcopy__(self, memo):
        """gluon cannot copy graphs, and what it copies of a parameter gets no gradients."""
        parts = list(_parts(self))
        scopes = {id(part._scope) for part in parts}
        for part in parts:
            if isinstance(part, nn.HybridBlock):
                memo |= {id(part._cached_graph): (), id(part._cached_op): None, id(part._cached_op_args): []}
            if (around := id(part._scope._old_scope)) not in scopes:  # which leads to the block around this one
                memo.setdefault(around, None)
        memo |= {id(parameter._trainer): None for parameter in self.collect_params().values()}
        memo[id(self)] = copied = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        for parameter in copied.collect_params().values():
            if parameter._data is not None:
                parameter.reset_ctx(parameter.list_ctx())
        return copied


def _parts(block):
    yield block
    for child in block._children.values():
        yield from _parts(child)


class _First(mx.init.Initializer):
    """The first values of the weight that kvattn calls ``name``, for an array that is ``transposed`` if it is a Dense's.

    Without a seed an initializer that initialize() is given goes first, as in gluon's own layers.
    """

    def __init__(self, name, seed, transposed=False):
        super().__init__(name=name, seed=seed, transposed=transposed)
        self.name, self.seed, self.transposed = name, seed, transposed

    def _init_weight(self, desc, arr):
        shape = arr.shape[::-1] if self.transposed else arr.shape
        if self.seed is not None:
            array = layers.initial(self.seed, self.name, shape)
            arr[:] = np.array(array.T if self.transposed else array)
        elif len(shape) > 1 and desc.global_init not in (None, mx.init.Uniform()):  # gluon's default
            desc.global_init._init_weight(desc, arr)
        elif self.name == "embedding":
            arr[:] = np.random.normal(0, 1 / math.sqrt(shape[-1]), arr.shape)
        else:
            arr[:] = np.random.uniform(-layers.glorot(shape), layers.glorot(shape), arr.shape)


class _Wide:
    """A layer of gluon's whose half precision is computed in float32: Dense has none on a CPU, and LayerNorm overflows."""

    def forward(self, x, *args):
        if not self._active or not tab.is_array(x) or x.size:
            return super().forward(x, *args)
        self._active = False  # a graph of its own cannot hold arrays without elements
        try:
            return super().forward(x, *args)
        finally:
            self._active = True

    def hybrid_forward(self, F, x, **params):
        if tab.is_array(x):
            conversion.floating("X", x, next(iter(params.items())))
            if not x.size:  # which MXNet's operators have no gradient for
                nothing = np.concatenate([a.reshape(a.size)[:0] for a in (x, *params.values())])
                return nothing.reshape(*x.shape[:-1], getattr(self, "_units", x.shape[-1]))
        if numpy.dtype(next(iter(self._reg_params.values())).dtype) != numpy.float16:
            return super().hybrid_forward(F, x, **params)
        y = super().hybrid_forward(F, x.astype("float32"), **{name: p.astype("float32") for name, p in params.items()})
        return y.astype("float16")


class _Dense(_Wide, nn.Dense):
    """A Dense that knows its name, by which its first values are drawn."""

    def __init__(self, name, units, bias, seed):
        super().__init__(units, use_bias=bias, flatten=False, weight_initializer=_First(name, seed, transposed=True))


class _Norm(nn.LayerNorm):
    """gluon's; float64 by the formula, since MXNet rounds the epsilon to float32."""

    def hybrid_forward(self, F, x, gamma, beta):
        if numpy.dtype(self.gamma.dtype) != numpy.float64:
            return super().hybrid_forward(F, x, gamma, beta)
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / F.np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + self._epsilon) * gamma + beta


class _LayerNorm(_Wide, _Norm):
    """gluon's, with kvattn's epsilon."""


# ---- attention


class _Attention(_Layer):
    """What the attention layers share: dropout in training, and the last call, whose weights can be shown."""

    def __init__(self, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.dropout = checks.probability("dropout", dropout)
        self._last = None

    def load_parameters(self, filename, ctx=None, allow_missing=False, ignore_extra=False, **options):
        """gluon's own reads the file of a block without parts as mx.nd arrays."""
        self.params.load_dict(mx.npx.load(filename), ctx, allow_missing, ignore_extra, self.prefix, filename, **options)

    _score = staticmethod(api.scaled_dot_score)

    def hybrid_forward(self, F, queries, keys, values, valid_lens=None, **options):
        params = {name: options.pop(name) for name in self._reg_params}
        score = partial(self._score, **params) if params else self._score
        options |= {"score": score, "valid_lens": valid_lens, "rate": self.dropout}
        if not symbols.deferred(queries):
            return _attend(queries, keys, values, layer=self, **options)
        _traced[name := uuid4().hex] = self
        return symbols.defer(_attend, queries, keys, values, layer=name, **options)

    @property
    def attention_weights(self):
        """The last call's, (batch, n, m) or (batch * heads, n, m): before dropout, detached, computed when read."""
        mx.nd.waitall()  # for graphs that still run
        if self._last is None:
            return None
        with autograd.pause():
            return layers.with_one_batch(layers.last_weights(self._last, "mxnet"))


_traced = WeakValueDictionary()  # layers by the name that their graphs, which are text, have for them


# what a graph hands on of the layer's own, and not of the call
OF_THE_LAYER = ("rotary", "qk_norm", "q_norm", "k_norm", "alibi")


def _attend(query, key, value, *, score=None, valid_lens=None, rate=0.0, layer=None, backend="mxnet", **options):
    """kvattn.attention with dropout in training alone, noted as the layer's last call: at once, or when a graph runs."""
    rotary, qk_norm, q_norm, k_norm, alibi = (options.pop(name, None) for name in OF_THE_LAYER)
    if tab.is_array(query):
        query, key = layers.normed(tab, qk_norm, query, key, q_norm, k_norm)
        query, key = layers.rotated("mxnet", rotary, query, key, options.get("query_offset", 0))
        options = layers.with_alibi("mxnet", options, alibi, query)
    options |= {"score": score, "valid_lens": whole_lengths(valid_lens, backend)}
    layer = _traced.get(layer) if isinstance(layer, str) else layer
    if layer is not None and tab.is_array(query):
        layer._last = (query.detach(), key.detach(), {name: _as_it_is_now(x) for name, x in options.items()})
    dropout = rate if autograd.is_training() else 0.0
    return api.attention(query, key, value, **options, dropout=dropout, backend=backend)


symbols.callable_by_name["_attend"] = _attend


def whole_lengths(valid_lens, backend="mxnet"):
    """Lengths as integers: MXNet makes float32 of np.array([3, 2]). Raises TypeError for fractions."""
    backend = tab if backend == "mxnet" else backend
    if not backend.is_array(valid_lens) or "float" not in str(valid_lens.dtype):
        return valid_lens
    values = backend.peek(valid_lens)
    if values is not None and (values != numpy.floor(values)).any():
        raise TypeError(f"valid_lens has dtype {valid_lens.dtype} and fractions; expected whole numbers")
    return backend.asarray(valid_lens, dtype="int64")


def _as_it_is_now(x, learned=False):
    """An option of a call without its graph, and copied where it may be learned, which integers are not, since a Trainer writes
    into it."""
    if isinstance(x, partial):  # as a score is, which holds the layer's weights
        now = partial(_as_it_is_now, learned=True)
        return partial(x.func, *map(now, x.args), **{name: now(y) for name, y in x.keywords.items()})
    if not tab.is_array(x):
        return x
    return x.detach().copy() if learned or (autograd.is_recording() and x.dtype.kind == "f") else x.detach()


class DotProductAttention(_Attention):
    """Scaled dot-product attention, d2l's call: layer(queries, keys, values, valid_lens=None, **options)."""


class AdditiveAttention(_Attention):
    """Attention by the score w_v . tanh(q W_q + k W_k) with ``num_hiddens`` hidden units."""

    _score = staticmethod(api.additive_score)

    def __init__(self, num_hiddens, dropout=0.0, *, seed=None, **kwargs):
        super().__init__(dropout, **kwargs)
        self.W_k = _parameter(self, "W_k", (0, num_hiddens), seed)
        self.W_q = _parameter(self, "W_q", (0, num_hiddens), seed)
        self.w_v = _parameter(self, "w_v", (num_hiddens,), seed)

    def infer_shape(self, queries, keys, *args):
        self.W_q.shape, self.W_k.shape = ((x.shape[-1], self.w_v.shape[0]) for x in (queries, keys))


class MultiplicativeAttention(_Attention):
    """Attention by the score q W k; W takes its sizes from the first call."""

    _score = staticmethod(api.multiplicative_score)

    def __init__(self, dropout=0.0, *, seed=None, **kwargs):
        super().__init__(dropout, **kwargs)
        self.W = _parameter(self, "W", (0, 0), seed)

    def infer_shape(self, queries, keys, *args):
        self.W.shape = (queries.shape[-1], keys.shape[-1])


class GatedAttention(_Attention):
    """Attention by the score sigmoid(w_g . [q; k]) (q . k); w_g takes its size from the first call."""

    _score = staticmethod(api.gated_score)

    def __init__(self, dropout=0.0, *, seed=None, **kwargs):
        super().__init__(dropout, **kwargs)
        self.w_g = _parameter(self, "w_g", (0,), seed)

    def infer_shape(self, queries, *args):
        self.w_g.shape = (2 * queries.shape[-1],)


def _parameter(layer, name, shape, seed):
    """A weight of the layer's own; sizes that are 0 come with the first call."""
    return layer.params.get(name, shape=shape, init=_First(name, seed), allow_deferred_init=True)


class MultiHeadAttention(_Layer):
    """Multi-head attention with ``num_hiddens`` features in all heads together; the weights are at ``.attention``."""

    def __init__(self, num_hiddens, num_heads, dropout=0.0, use_bias=False, *, num_kv_heads=None, seed=None, bias=None,
                 rotary=None, qk_norm: bool | float = False, alibi=None, sink=False, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        bias = use_bias if bias is None else bias
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.width = width = layers.head_width(num_hiddens, num_heads, self.num_kv_heads)
        self.rotary = layers.check_rotary(rotary, width)
        self.qk_norm, self.alibi = layers.check_qk_norm(qk_norm), layers.check_alibi(alibi, num_heads)
        if self.qk_norm is not None:
            self.q_norm, self.k_norm = (self.params.get(x, shape=(width,), init="ones") for x in ("q_norm", "k_norm"))
        self.sink = self.params.get("sink", shape=(num_heads,), init="zeros") if checks.flag("sink", sink) else None
        self.attention = DotProductAttention(dropout)
        self.W_q = _Dense("W_q", num_hiddens, bias, seed)
        self.W_k = _Dense("W_k", self.num_kv_heads * width, bias, seed)
        self.W_v = _Dense("W_v", self.num_kv_heads * width, bias, seed)
        self.W_o = _Dense("W_o", num_hiddens, bias, seed)

    def forward(self, *args):
        if isinstance(args[-1], dict):  # else gluon gives hybrid_forward its own sink in the place of the call's
            layers.with_sink(args[-1], self.sink)
        return super().forward(*args)

    def hybrid_forward(self, F, queries, keys, values, valid_lens=None, *, cache=None, sink=None, q_norm=None, k_norm=None,
                       **options):  # fmt: skip
        if cache is None and tab.is_array(queries):  # a later call may attend to more keys; a Symbol has no values
            valid_lens = whole_lengths(valid_lens)
            queries, keys, values = layers.hide_unseen(tab, queries, keys, values, self.num_heads, valid_lens, **options)
        queries = _split(self.W_q(queries), self.num_heads, self.width)  # (batch, heads, n, d)
        keys, values = (_split(x, self.num_kv_heads, self.width) for x in (self.W_k(keys), self.W_v(values)))
        if symbols.deferred(queries):  # which have no positions yet: when the graph runs
            options |= {} if self.rotary is None else {"rotary": self.rotary}
            options |= {} if self.alibi is None else {"alibi": self.alibi}
            options |= {} if self.qk_norm is None else {"qk_norm": self.qk_norm, "q_norm": q_norm, "k_norm": k_norm}
        else:
            queries, keys = layers.normed(tab, self.qk_norm, queries, keys, q_norm, k_norm)
            queries, keys = layers.rotated("mxnet", self.rotary, queries, keys, options.get("query_offset", 0), cache)
        if cache is not None:
            cache = cache.extend(keys, values)
            keys, values = cache.seen()
            options["query_offset"] = cache.length - queries.shape[-2]
        if not symbols.deferred(queries):
            valid_lens = layers.lengths(tab, whole_lengths(valid_lens), queries)
            options = layers.with_alibi("mxnet", options, self.alibi, queries)
        results = self.attention(queries, keys, values, valid_lens, **layers.with_sink(options, sink))
        return layers.joined(partial(_join, width=self.num_heads * self.width), self.W_o, results, cache)


def _split(X, heads, width):
    """(batch, n, heads * width) -> (batch, heads, n, width)."""
    if symbols.deferred(X):
        return mx.sym.npx.reshape(X, (-2, -2, heads, width)).swapaxes(1, 2)  # -2: a size that stays
    return tab._split(X, heads)


def _join(X, width):
    """(batch, heads, n, d) -> (batch, n, width)."""
    return mx.sym.npx.reshape(X.swapaxes(-2, -3), (-2, -2, width)) if symbols.deferred(X) else tab._join(X)


# ---- the other parts of a transformer


class PositionalEncoding(_Layer):
    """X + P, then dropout; P (1, max_len, num_hiddens) holds sines and cosines of the position, counted from ``offset``."""

    def __init__(self, num_hiddens, dropout=0.0, max_len=1000, **kwargs):
        super().__init__(**kwargs)
        self.dropout = nn.Dropout(checks.probability("dropout", dropout))
        self.P = np.array(_table(max_len, num_hiddens), dtype="float32")  # no parameter: it is computed, so not saved

    def hybrid_forward(self, F, X, offset=0, *, rng=None):
        _, max_len, h = self.P.shape
        if symbols.deferred(X):
            X = F.Custom(X.as_nd_ndarray(), op_type=POSITIONS, max_len=max_len, h=h, offset=offset).as_np_ndarray()
        else:
            conversion.floating("X", X)
            layers.check_length(max_len, X.shape[1], offset)
            P = np.array(_table(max_len, h), dtype="float64") if X.dtype == numpy.float64 else self.P
            X = X + P[:, offset : offset + X.shape[1]].as_in_ctx(X.ctx).astype(X.dtype)
        return _dropped(self.dropout, X, rng)


def _dropped(dropout, X, rng):
    """What an nn.Dropout makes of X; given a seed, by its pattern."""
    if symbols.deferred(X):
        symbols.refuse_seed(rng)
    if rng is None or not (autograd.is_training() and dropout._rate):
        return dropout(X)
    return layers.dropped(tab, X, dropout._rate, rng)


@cache
def _table(max_len, h):
    return layers.encoding(max_len, h)[None]


POSITIONS = "kvattn_positions"


class _Positions(mx.operator.CustomOp):
    """X + P in a graph, where the length and the dtype of X come later."""

    def __init__(self, P):
        super().__init__()
        self.P = P

    @mx.util.use_np_shape  # in a thread of MXNet's own
    def forward(self, is_train, req, in_data, out_data, aux):
        X = in_data[0].as_np_ndarray()
        symbols.put(self, out_data[0], req[0], X + self.P.astype(X.dtype))

    @mx.util.use_np_shape
    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        symbols.put(self, in_grad[0], req[0], out_grad[0].as_np_ndarray())


@mx.operator.register(POSITIONS)
class _PositionsShapes(mx.operator.CustomOpProp):
    def __init__(self, max_len, h, offset):
        super().__init__(need_top_grad=True)
        self.max_len, self.h, self.offset = int(max_len), int(h), int(offset)

    def create_operator(self, ctx, shapes, dtypes):
        n = shapes[0][1]
        with symbols.keeping_the_error():
            layers.check_length(self.max_len, n, self.offset)
        return _Positions(np.array(_table(self.max_len, self.h)[:, self.offset : self.offset + n], dtype="float64"))


class AddNorm(_Layer):
    """Layer norm of X + dropout(Y) over the last axis; ``norm_shape``, its size, may be left to the first call."""

    def __init__(self, dropout=0.0, norm_shape=None, **kwargs):
        super().__init__(**kwargs)
        self.dropout = nn.Dropout(checks.probability("dropout", dropout))
        size = numpy.ravel(0 if norm_shape is None else norm_shape)
        if len(size) != 1:
            raise ValueError(f"norm_shape is {norm_shape}; MXNet's layer norm is over one axis, the last: give its size")
        self.ln = _LayerNorm(epsilon=layers.EPSILON, in_channels=int(size[0]))

    def hybrid_forward(self, F, X, Y, *, rng=None):
        return self.ln(_dropped(self.dropout, Y, rng) + X)


class PositionWiseFFN(_Layer):
    """activation(X W_1 + b_1) W_2 + b_2; the activation is "relu" or "gelu" (by erf)."""

    def __init__(self, ffn_num_hiddens, ffn_num_outputs, *, activation="relu", seed=None, **kwargs):
        super().__init__(**kwargs)
        layers.check_activation(activation)
        self.activation = activation
        self.dense1 = _Dense("W_1", ffn_num_hiddens, True, seed)
        self.dense2 = _Dense("W_2", ffn_num_outputs, True, seed)

    def hybrid_forward(self, F, X):
        X = self.dense1(X)
        if self.activation == "relu":
            return self.dense2(F.npx.relu(X))
        if numpy.dtype(self.dense1.weight.dtype) == numpy.float64:  # MXNet's own rounds the root of 2 to float32
            return self.dense2(X * (1 + F.npx.erf(X / math.sqrt(2))) / 2)
        return self.dense2(F.npx.leaky_relu(X, act_type="gelu"))


class TransformerEncoderBlock(_Layer):
    """Self-attention and a position-wise network, each with AddNorm; ``cache=`` returns (Y, cache)."""

    def __init__(self, num_hiddens, ffn_num_hiddens, num_heads, dropout=0.0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False,
                 seed=None, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        self.attention = MultiHeadAttention(
            num_hiddens, num_heads, dropout, use_bias, num_kv_heads=num_kv_heads, rotary=rotary, qk_norm=qk_norm, alibi=alibi,
            sink=sink, seed=layers.child(seed, "attention"),
        )  # fmt: skip
        self.addnorm1 = AddNorm(dropout, num_hiddens)
        self.ffn = PositionWiseFFN(ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"))
        self.addnorm2 = AddNorm(dropout, num_hiddens)

    def hybrid_forward(self, F, X, valid_lens=None, *, cache=None, rng=None, **options):
        seeds = [layers.seed_of(tab, rng, part, attends=part == 0) for part in range(3)]
        seeds = [layers.seeded(seed) for seed in seeds]
        Y = self.attention(X, X, X, valid_lens, **options, **seeds[0], **({} if cache is None else {"cache": cache}))
        Y, cache = Y if cache is not None else (Y, None)
        Y = self.addnorm1(X, Y, **seeds[1])
        Y = self.addnorm2(Y, self.ffn(Y), **seeds[2])
        return Y if cache is None else (Y, cache)


class _Stack(_Layer):
    """What encoder and decoder share: tokens' embedding * sqrt(h), positional encoding, and blocks, which ``_block`` makes."""

    _scores = False  # whether a dense layer gives the scores of the tokens that follow, as a decoder's does

    def __init__(self, vocab_size, num_hiddens, ffn_num_hiddens, num_heads, num_blks, dropout=0.0, use_bias=False, *,
                 num_kv_heads=None, activation="relu", max_len=1000, rotary=None, qk_norm: bool | float = False, alibi=None,
                 sink=False, seed=None, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        self.num_hiddens = num_hiddens
        self.embedding = nn.Embedding(vocab_size, num_hiddens, weight_initializer=_First("embedding", seed))
        self.pos_encoding = PositionalEncoding(num_hiddens, dropout, max_len)
        self.blks = nn.HybridSequential()
        for i in range(num_blks):
            block = self._block(
                num_hiddens, ffn_num_hiddens, num_heads, dropout, i=i, use_bias=use_bias, num_kv_heads=num_kv_heads,
                activation=activation, rotary=rotary, qk_norm=qk_norm, alibi=alibi, sink=sink,
                seed=layers.child(seed, f"blocks.{i}"),
            )  # fmt: skip
            self.blks.add(block)
        if self._scores:
            self.dense = _Dense("W", vocab_size, True, layers.child(seed, "dense"))

    def forward(self, X, *args):
        if tab.is_array(X) and not _initialized(self.embedding.weight):  # d2l's initializes itself
            self.initialize(ctx=X.ctx)
        return super().forward(X, *args)

    def _embedded(self, X, first, seed):
        place = {} if conversion.is_integer(first) and first == 0 else {"offset": first}
        return self.pos_encoding(self.embedding(X) * math.sqrt(self.num_hiddens), **place, **layers.seeded(seed))


class TransformerEncoder(layers.ShowsBlocks, _Stack):
    """Embedding * sqrt(h), positional encoding, and ``num_blks`` blocks: tokens (batch, n) -> (batch, n, num_hiddens).

    Its first call initializes it, if nobody has.
    """

    def _block(self, *sizes, i, **options):
        return TransformerEncoderBlock(*sizes, **options)

    def hybrid_forward(self, F, X, valid_lens=None, *, cache=None, rng=None, **options):
        return layers.encoded(tab, self, X, valid_lens, cache, rng, **options)


class TransformerDecoderBlock(_Layer):
    """Causal self-attention, attention to an encoder's outputs and a position-wise network, each with AddNorm.

    The graph of a hybridized block around it has no cache.
    """

    def __init__(self, num_hiddens, ffn_num_hiddens, num_heads, dropout=0.0, i=0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False,
                 seed=None, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        self.i = i
        attention = partial(
            MultiHeadAttention, num_hiddens, num_heads, dropout, use_bias, num_kv_heads=num_kv_heads, qk_norm=qk_norm,
            sink=sink,
        )  # fmt: skip
        self.attention1 = attention(rotary=rotary, alibi=alibi, seed=layers.child(seed, "attention1"))
        self.addnorm1 = AddNorm(dropout, num_hiddens)
        self.attention2 = attention(seed=layers.child(seed, "attention2"))
        self.addnorm2 = AddNorm(dropout, num_hiddens)
        self.ffn = PositionWiseFFN(ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"))
        self.addnorm3 = AddNorm(dropout, num_hiddens)

    def hybrid_forward(self, F, X, state, *, rng=None, **options):
        outputs, lens, caches = layers.parts_of_state(state, self.i + 1, exactly=False)
        seeds = [layers.seeded(layers.seed_of(tab, rng, part, attends=part in (0, 2))) for part in range(5)]
        options = layers.with_causal(options) | seeds[0]
        if symbols.deferred(X):
            Y, cache = self.attention1(X, X, X, **options), layers.NOT_KEPT
        else:
            Y, cache = self.attention1(X, X, X, cache=caches[self.i], **options)
        Y = self.addnorm1(X, Y, **seeds[1])
        Z = self.addnorm2(Y, self.attention2(Y, outputs, outputs, lens, **seeds[2]), **seeds[3])
        return self.addnorm3(Z, self.ffn(Z), **seeds[4]), layers.following(state, self.i, cache)


class TransformerDecoder(layers.KeepsState, _Stack):
    """Embedding * sqrt(h), positional encoding, ``num_blks`` blocks that attend to an encoder's outputs, and a dense layer.

    Its first call initializes it, if nobody has.
    """

    _block, _scores = TransformerDecoderBlock, True

    def hybrid_forward(self, F, X, state, *, rng=None, **options):
        return layers.decoded(tab, self, X, state, rng, **options)


def _initialized(parameter):
    """Whether initialize() has been called."""
    return parameter._data is not None or bool(parameter._deferred_init)


# ---- weights of a forward pass, for kvattn/maps.py


@mx.util.use_np
def maps(model, inputs, options):
    """kvattn.maps' part."""
    return layers.maps(_attending(model), lambda: model(*inputs, **options), mx.np.reshape)


def _attending(block, path=""):
    found = [(path, block)] if isinstance(block, _Attention) else []
    return found + [each for name, child in block._children.items() for each in _attending(child, f"{path}.{name}".lstrip("."))]


# ---- weights by kvattn's names, for kvattn/weights.py


class _Slot(NamedTuple):
    parameter: Parameter
    shape: tuple  # here, (features in, out); None where the first call decides
    transposed: bool = False

    def read(self):
        """A NumPy array; None where there are no values yet."""
        if self.parameter._data is None:
            return None
        array = api.to_numpy(self.parameter.data())
        return array.T if self.transposed else array


def slots(block, path=()):
    """{name: slot} of every weight in ``block``."""
    own, found = dict(block._reg_params), {}
    if isinstance(block, (nn.Dense, nn.LayerNorm, nn.Embedding)):
        kind = "dense" if isinstance(block, nn.Dense) else "norm" if isinstance(block, nn.LayerNorm) else "embedding"
        names = layers.names(path, kind)
        own = {names[{"gamma": "weight", "beta": "bias"}.get(which, which)]: x for which, x in own.items()}
    elif own and not isinstance(block, (_Attention, MultiHeadAttention)):
        raise TypeError(f"{'.'.join(path)} is a {type(block).__name__}, whose weights have no name outside MXNet")
    else:
        own = {layers.names((*path, name), "embedding")["weight"]: x for name, x in own.items()}
    for name, parameter in own.items():
        transposed = isinstance(block, nn.Dense) and len(parameter.shape) == 2
        shape = tuple(None if n < 1 else n for n in parameter.shape)
        found[name] = _Slot(parameter, layers.own_shape(name, shape[::-1]) if transposed else shape, transposed)
    for name, child in block._children.items():
        found |= slots(child, (*path, name))
    return found


@mx.util.use_np
def assign(block, arrays):
    """Put these arrays, whose names and shapes fit, in the block's weights; returns the block."""
    parameters = [slot.parameter for slot in slots(block).values()]
    fresh = any(x._data is None for x in parameters) and all(numpy.dtype(x.dtype) == numpy.float32 for x in parameters)
    if fresh and any(x.dtype == numpy.float64 for x in arrays.values()):
        block.cast("float64")
    for name, slot in slots(block).items():
        array = layers.native(name, arrays[name]).T if slot.transposed else arrays[name]
        array = np.array(array, dtype=slot.parameter.dtype)
        slot.parameter._load_init(array, None)  # as load_parameters does
    return block


layers.describe(globals())
