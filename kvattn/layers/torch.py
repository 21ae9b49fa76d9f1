"""The layers as torch.nn.Modules. The names and shapes of their weights are in kvattn/layers/__init__.py."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from kvattn import api, checks, conversion, layers
from kvattn.backends import torch as tab
from kvattn.layers import calls

# layers.LAYERS, in words that type checkers read
__all__ = [
    "AddNorm", "AdditiveAttention", "DotProductAttention", "GatedAttention", "MultiHeadAttention", "MultiplicativeAttention",
    "PositionWiseFFN", "PositionalEncoding", "TransformerDecoder", "TransformerDecoderBlock", "TransformerEncoder",
    "TransformerEncoderBlock",
]  # fmt: skip

# X and queries (batch, n, d), keys (batch, m, d), values (batch, m, v), valid_lens (batch,) or (batch, n); ``options`` are
# kvattn.attention's: mask, causal, window, ...


class _Linear(nn.LazyLinear):
    """A Linear that knows its name, by which its first values are drawn; it becomes an nn.Linear in the first call."""

    def __init__(self, name, out_features, bias, seed) -> None:
        self._named, self._seed = name, seed
        super().__init__(out_features, bias=bias)

    def reset_parameters(self):
        if self.in_features == 0 or self.has_uninitialized_params():
            return
        _fill(self.weight.T, self._seed, self._named, (self.in_features, self.out_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _lazy_load_hook(self, state_dict, prefix, *others):
        """PyTorch's own lets a layer that was never called take weights of any size."""
        weight, errors = state_dict.get(f"{prefix}weight"), others[-1]
        if weight is not None and not is_lazy(weight) and len(weight) != self.out_features:
            errors.append(
                f"size mismatch for {prefix}weight: {tuple(weight.shape)} in the file, ({self.out_features}, ...) here"
            )
        else:
            super()._lazy_load_hook(state_dict, prefix, *others)


def _fill(parameter, seed, name, shape):
    """The first values of the weight that kvattn calls ``name``."""
    with torch.no_grad():
        if seed is not None:
            parameter.copy_(torch.from_numpy(layers.initial(seed, name, shape)))
        elif name == "embedding":
            parameter.normal_(std=1 / math.sqrt(shape[-1]))
        else:
            parameter.uniform_(-layers.glorot(shape), layers.glorot(shape))


def _fit(part, **inputs):
    """Raises TypeError for an input of another dtype than the weight of the ``part`` that takes it: PyTorch's error names
    neither. A part that is wrapped, hooked or quantized may convert it."""
    plain = type(part) is _Linear or (type(part) in (nn.Linear, nn.LayerNorm) and not part._forward_pre_hooks)
    if plain and part.weight is not None:  # as a LayerNorm's may be
        for name, x in inputs.items():
            if x.dtype != part.weight.dtype and not (_tensor(name, x).is_floating_point() and tab.converts(x, part.weight)):
                conversion.floating(name, x, ("the layer's weight", part.weight), tab)


def _tensor(name, x):
    """``x`` as it is, or TypeError: layers take tensors alone, as PyTorch's own do."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of {type(x)}; a layer takes tensors: torch.as_tensor({name})")
    return x


class _Layer(nn.Module):
    """A layer that takes float64 from a file as it is, if it was never called: else its weights would be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_widen)


def _widen(layer, state_dict, prefix, *_):
    own = [*layer.parameters()]
    if any(map(is_lazy, own)) and all(x.dtype == torch.float32 for x in own):
        given = (x for name, x in state_dict.items() if name.startswith(prefix) and isinstance(x, Tensor))
        if any(x.dtype == torch.float64 for x in given):
            layer.double()


# ---- what type checkers see of a call, which PyTorch leaves open

if TYPE_CHECKING:

    class _Attends(calls.Attends, _Layer): ...

    class _Encodes(calls.Encodes, _Layer): ...

    class _Decodes(_Layer):
        def __call__(self, X: Tensor, state: list[Any], **options: Any) -> tuple[Tensor, list[Any]]: ...

    class _Changes(calls.Changes, _Layer): ...

else:
    _Attends = _Encodes = _Decodes = _Changes = _Layer


# ---- attention


class _Attention(_Attends):
    """What the attention layers share: dropout in training, and the last call, whose weights can be shown."""

    def __init__(self, dropout=0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(checks.probability("dropout", dropout))
        self._last = None

    def _score(self, queries, keys):
        return api.scaled_dot_score

    def forward(self, queries, keys, values, valid_lens=None, **options):
        options |= {"score": self._score(queries, keys), "valid_lens": valid_lens}
        if not tab.tracing():  # a program that is recorded must not assign what it would keep
            last = _tensor("queries", queries).detach(), _detached(keys, queries)
            kept = {name: _detached(x, queries, copied=True) for name, x in options.items()}
            kept["score"] = _copied(options["score"], queries)
            vars(self)["_last"] = (*last, kept)  # past nn.Module, which takes its time
        rate = self.dropout.p if self.training else 0.0
        return api.attention(queries, keys, values, **options, dropout=rate, backend="torch")

    @property
    def attention_weights(self):
        """The last call's, (batch, n, m) or (batch * heads, n, m): before dropout, detached, computed when read."""
        if self._last is None:
            return None
        with torch.no_grad():
            return layers.with_one_batch(layers.last_weights(self._last, "torch"))


def _detached(x, queries, copied=False):
    """Without its graph, in the dtype of the queries, from which it differs under autocast: what is kept is read outside.

    ``copied``: as it is now where it is learned, since an optimiser writes into it.
    """
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().clone() if copied and x.requires_grad else x.detach()
    return x.to(queries.dtype) if x.is_floating_point() and x.dtype != queries.dtype else x


def _copied(score, queries):
    """The score with its parameters as they are now: an optimiser writes into them."""
    if not isinstance(score, partial):
        return score
    return partial(score.func, **{name: _detached(x, queries).clone() for name, x in score.keywords.items()})


class DotProductAttention(_Attention):
    """Scaled dot-product attention, d2l's call: layer(queries, keys, values, valid_lens=None, **options)."""


def _only_multiplies(child):
    """Whether a child is its weight and nothing else: not wrapped, hooked, parametrized, sharded or quantized."""
    # its hooks are private: as read in PyTorch 2.13
    return type(child) is nn.Linear and child.bias is None and not (child._forward_hooks or child._forward_pre_hooks)


class AdditiveAttention(_Attention):
    """Attention by the score w_v . tanh(q W_q + k W_k) with ``num_hiddens`` hidden units."""

    def __init__(self, num_hiddens, dropout=0.0, *, seed=None) -> None:
        super().__init__(dropout)
        self.W_k = _Linear("W_k", num_hiddens, False, seed)
        self.W_q = _Linear("W_q", num_hiddens, False, seed)
        self.w_v = _Linear("w_v", 1, False, seed)

    def _score(self, queries, keys):
        if isinstance(self.w_v, _Linear):  # not called yet, though its weights may have been loaded
            _fit(self.W_q, queries=queries, keys=keys)
            self.w_v(self.W_q(queries))
            self.W_k(keys)
        if not all(map(_only_multiplies, (self.W_q, self.W_k, self.w_v))):
            return self._called
        return partial(api.additive_score, W_q=self.W_q.weight.T, W_k=self.W_k.weight.T, w_v=self.w_v.weight[0])

    def _called(self, queries, keys):
        """The score by calls of the children, which may do more than multiply; ``attention_weights`` calls them when read."""
        hidden = self.W_q(queries)[..., :, None, :] + self.W_k(keys)[..., None, :, :]
        return self.w_v(torch.tanh(hidden))[..., 0]


class MultiplicativeAttention(LazyModuleMixin, _Attention):
    """Attention by the score q W k; W takes its sizes from the first call."""

    cls_to_become = None

    def __init__(self, dropout=0.0, *, seed=None) -> None:
        super().__init__(dropout)
        self.W, self._seed = UninitializedParameter(), seed

    def initialize_parameters(self, queries, keys, *args, **options):
        if is_lazy(self.W):
            self.W.materialize((queries.shape[-1], keys.shape[-1]))
            _fill(self.W, self._seed, "W", self.W.shape)

    def _score(self, queries, keys):
        return partial(api.multiplicative_score, W=self.W)


class GatedAttention(LazyModuleMixin, _Attention):
    """Attention by the score sigmoid(w_g . [q; k]) (q . k); w_g takes its size from the first call."""

    cls_to_become = None

    def __init__(self, dropout=0.0, *, seed=None) -> None:
        super().__init__(dropout)
        self.w_g, self._seed = UninitializedParameter(), seed

    def initialize_parameters(self, queries, keys, *args, **options):
        if is_lazy(self.w_g):
            self.w_g.materialize((2 * queries.shape[-1],))
            _fill(self.w_g, self._seed, "w_g", self.w_g.shape)

    def _score(self, queries, keys):
        return partial(api.gated_score, w_g=self.w_g)


class MultiHeadAttention(_Attends):
    """Multi-head attention with ``num_hiddens`` features in all heads together; the weights are at ``.attention``."""

    def __init__(self, num_hiddens, num_heads, dropout=0.0, bias=False, *, num_kv_heads=None, seed=None, use_bias=None,
                 rotary=None, qk_norm: bool | float = False, alibi=None, sink=False) -> None:  # fmt: skip
        super().__init__()
        bias = bias if use_bias is None else use_bias
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        width = layers.head_width(num_hiddens, num_heads, self.num_kv_heads)
        self.rotary = layers.check_rotary(rotary, width)
        self.qk_norm, self.alibi = layers.check_qk_norm(qk_norm), layers.check_alibi(alibi, num_heads)
        self.q_norm, self.k_norm = (None if self.qk_norm is None else nn.Parameter(torch.ones(width)) for _ in "qk")
        self.sink = nn.Parameter(torch.zeros(num_heads)) if checks.flag("sink", sink) else None
        self.attention = DotProductAttention(dropout)
        self.W_q = _Linear("W_q", num_hiddens, bias, seed)
        self.W_k = _Linear("W_k", self.num_kv_heads * width, bias, seed)
        self.W_v = _Linear("W_v", self.num_kv_heads * width, bias, seed)
        self.W_o = _Linear("W_o", num_hiddens, bias, seed)

    def forward(self, queries, keys, values, valid_lens=None, *, cache=None, **options):
        _fit(self.W_q, queries=queries, keys=keys, values=values)
        # With a cache a later call may attend to keys that no query attends to now. Eagerly on a GPU this costs 5 to 15 %.
        if cache is None and (queries.is_cpu or tab.tracing()):
            queries, keys, values = layers.hide_unseen(tab, queries, keys, values, self.num_heads, valid_lens, **options)
        queries = tab._split(self.W_q(queries), self.num_heads)  # (batch, heads, n, d)
        keys, values = tab._split(self.W_k(keys), self.num_kv_heads), tab._split(self.W_v(values), self.num_kv_heads)
        queries, keys = layers.normed(tab, self.qk_norm, queries, keys, self.q_norm, self.k_norm)
        queries, keys, values, cache = layers.placed("torch", queries, keys, values, cache, self.rotary, options)
        valid_lens = layers.lengths(tab, valid_lens, queries)
        options = layers.with_alibi("torch", options, self.alibi, queries)
        options = layers.with_sink(options, None if self.sink is None else self.sink.to(queries.dtype))
        results = self.attention(queries, keys, values, valid_lens, **options)
        return layers.joined(tab._join, self.W_o, results, cache)


# ---- the other parts of a transformer


class PositionalEncoding(_Changes):
    """X + P, then dropout; P (1, max_len, num_hiddens) holds sines and cosines of the position, counted from ``offset``."""

    def __init__(self, num_hiddens, dropout=0.0, max_len=1000) -> None:
        super().__init__()
        self.dropout, self._sizes = nn.Dropout(checks.probability("dropout", dropout)), (max_len, num_hiddens)
        P = torch.from_numpy(layers.encoding(max_len, num_hiddens)).float()
        self.register_buffer("P", P[None], persistent=False)  # computed, so not saved

    def forward(self, X, offset=0, *, rng=None):
        conversion.floating("X", X)
        layers.check_length(self.P.shape[1], X.shape[1], offset)
        P = self.P
        if X.dtype == torch.float64:  # a buffer of float64 could not go to every device
            P = torch.from_numpy(layers.encoding(*self._sizes))[None].to(X.device)
        if isinstance(offset, torch.Tensor):  # a slice that a tensor cuts has a size that no trace knows
            P = P[:, offset + torch.arange(X.shape[1], device=P.device)]
        else:
            P = P[:, offset : offset + X.shape[1]]
        return _dropped(self.dropout, X + P.to(X.dtype), rng)


def _dropped(dropout, X, rng):
    """What an nn.Dropout makes of X; given a seed, by its pattern."""
    if rng is None or not dropout.training:
        return dropout(X)
    return layers.dropped(tab, X, dropout.p, rng)


class AddNorm(_Changes):
    """Layer norm of X + dropout(Y)."""

    def __init__(self, norm_shape, dropout=0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(checks.probability("dropout", dropout))
        self.ln = nn.LayerNorm(norm_shape, eps=layers.EPSILON)

    def forward(self, X, Y, *, rng=None):
        if X.dtype not in tab.HALF:  # which PyTorch norms with weights of float32
            _fit(self.ln, X=X, Y=Y)
        return self.ln(_dropped(self.dropout, Y, rng) + X)


class PositionWiseFFN(_Changes):
    """activation(X W_1 + b_1) W_2 + b_2; the activation is "relu" or "gelu" (by erf)."""

    def __init__(self, ffn_num_hiddens, ffn_num_outputs, *, activation="relu", seed=None) -> None:
        super().__init__()
        layers.check_activation(activation)
        self.activation = activation
        self.dense1 = _Linear("W_1", ffn_num_hiddens, True, seed)
        self.dense2 = _Linear("W_2", ffn_num_outputs, True, seed)

    def forward(self, X):
        _fit(self.dense1, X=X)
        X = self.dense1(X)
        return self.dense2(nn.functional.relu(X) if self.activation == "relu" else nn.functional.gelu(X))


class TransformerEncoderBlock(_Encodes):
    """Self-attention and a position-wise network, each with AddNorm; ``cache=`` returns (Y, cache)."""

    def __init__(self, num_hiddens, ffn_num_hiddens, num_heads, dropout=0.0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False,
                 seed=None) -> None:  # fmt: skip
        super().__init__()
        self.attention = MultiHeadAttention(
            num_hiddens, num_heads, dropout, use_bias, num_kv_heads=num_kv_heads, rotary=rotary, qk_norm=qk_norm, alibi=alibi,
            sink=sink, seed=layers.child(seed, "attention"),
        )  # fmt: skip
        self.addnorm1 = AddNorm(num_hiddens, dropout)
        self.ffn = PositionWiseFFN(ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"))
        self.addnorm2 = AddNorm(num_hiddens, dropout)

    def forward(self, X, valid_lens=None, *, cache=None, rng=None, **options):
        rng, *seeds = (layers.seed_of(tab, rng, part, attends=part == 0) for part in range(3))
        options |= {} if rng is None else {"rng": rng}
        Y = self.attention(X, X, X, valid_lens, cache=cache, **options)
        Y, cache = Y if cache is not None else (Y, None)
        Y = self.addnorm1(X, Y, rng=seeds[0])
        Y = self.addnorm2(Y, self.ffn(Y), rng=seeds[1])
        return Y if cache is None else (Y, cache)


class _Stack(_Layer):
    """What encoder and decoder share: tokens' embedding * sqrt(h), positional encoding, and blocks, which ``_block`` makes."""

    _scores = False  # whether a dense layer gives the scores of the tokens that follow, as a decoder's does

    def __init__(self, vocab_size, num_hiddens, ffn_num_hiddens, num_heads, num_blks, dropout=0.0, use_bias=False, *,
                 num_kv_heads=None, activation="relu", max_len=1000, rotary=None, qk_norm: bool | float = False, alibi=None,
                 sink=False, seed=None) -> None:  # fmt: skip
        super().__init__()
        self.num_hiddens = num_hiddens
        self.embedding = nn.Embedding(vocab_size, num_hiddens)
        _fill(self.embedding.weight, seed, "embedding", (vocab_size, num_hiddens))
        self.pos_encoding = PositionalEncoding(num_hiddens, dropout, max_len)
        self.blks = nn.Sequential()
        for i in range(num_blks):
            block = self._block(
                num_hiddens, ffn_num_hiddens, num_heads, dropout, i=i, use_bias=use_bias, num_kv_heads=num_kv_heads,
                activation=activation, rotary=rotary, qk_norm=qk_norm, alibi=alibi, sink=sink,
                seed=layers.child(seed, f"blocks.{i}"),
            )  # fmt: skip
            self.blks.add_module(f"block{i}", block)
        if self._scores:
            self.dense = _Linear("W", vocab_size, True, layers.child(seed, "dense"))

    def _embedded(self, X, first, seed):
        return self.pos_encoding(self.embedding(X) * math.sqrt(self.num_hiddens), first, rng=seed)


class TransformerEncoder(layers.ShowsBlocks, _Stack, _Encodes):
    """Embedding * sqrt(h), positional encoding, and ``num_blks`` blocks: tokens (batch, n) -> (batch, n, num_hiddens)."""

    def _block(self, *sizes, i, **options):
        return TransformerEncoderBlock(*sizes, **options)

    def forward(self, X, valid_lens=None, *, cache=None, rng=None, **options):
        return layers.encoded(tab, self, X, valid_lens, cache, rng, **options)


class TransformerDecoderBlock(_Decodes):
    """Causal self-attention, attention to an encoder's outputs and a position-wise network, each with AddNorm."""

    def __init__(self, num_hiddens, ffn_num_hiddens, num_heads, dropout=0.0, i=0, use_bias=False, *, num_kv_heads=None,
                 activation="relu", rotary=None, qk_norm: bool | float = False, alibi=None, sink=False,
                 seed=None) -> None:  # fmt: skip
        super().__init__()
        self.i = i
        attention = partial(
            MultiHeadAttention, num_hiddens, num_heads, dropout, use_bias, num_kv_heads=num_kv_heads, qk_norm=qk_norm,
            sink=sink,
        )  # fmt: skip
        self.attention1 = attention(rotary=rotary, alibi=alibi, seed=layers.child(seed, "attention1"))
        self.addnorm1 = AddNorm(num_hiddens, dropout)
        self.attention2 = attention(seed=layers.child(seed, "attention2"))
        self.addnorm2 = AddNorm(num_hiddens, dropout)
        self.ffn = PositionWiseFFN(ffn_num_hiddens, num_hiddens, activation=activation, seed=layers.child(seed, "ffn"))
        self.addnorm3 = AddNorm(num_hiddens, dropout)

    def forward(self, X, state, *, rng=None, **options):
        outputs, lens, caches = layers.parts_of_state(state, self.i + 1, exactly=False)
        seeds = [layers.seed_of(tab, rng, part, attends=part in (0, 2)) for part in range(5)]
        options = layers.with_causal(options)
        Y, cache = self.attention1(X, X, X, cache=caches[self.i], rng=seeds[0], **options)
        Y = self.addnorm1(X, Y, rng=seeds[1])
        Z = self.addnorm2(Y, self.attention2(Y, outputs, outputs, lens, rng=seeds[2]), rng=seeds[3])
        return self.addnorm3(Z, self.ffn(Z), rng=seeds[4]), layers.following(state, self.i, cache)


class TransformerDecoder(layers.KeepsState, _Stack, _Decodes):
    """Embedding * sqrt(h), positional encoding, ``num_blks`` blocks that attend to an encoder's outputs, and a dense layer."""

    _block, _scores = TransformerDecoderBlock, True

    def forward(self, X, state, *, rng=None, **options):
        return layers.decoded(tab, self, X, state, rng, **options)


# ---- weights of a forward pass, for kvattn/maps.py


@torch.no_grad()
def maps(model, inputs, options):
    """kvattn.maps' part."""
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, _Attention)]
    return layers.maps(found, lambda: model(*inputs, **options), torch.reshape)


# ---- weights by kvattn's names, for kvattn/weights.py


class _Slot(NamedTuple):
    parameter: nn.Parameter
    shape: tuple  # here, (features in, out); None where the first call decides
    transposed: bool = False

    def read(self):
        """A NumPy array; None where there are no values yet."""
        if is_lazy(self.parameter):
            return None
        array = api.to_numpy(self.parameter)
        return array.T if self.transposed else array


def slots(module):
    """{name: slot} of every weight in ``module``."""
    found, packed = {}, []
    for path, part in module.named_modules():
        if path in packed:
            continue
        if isinstance(part, nn.MultiheadAttention):
            packed.append(f"{path}.out_proj".lstrip("."))
            found |= {".".join(filter(None, (path, name))): slot for name, slot in _packed(part).items()}
            continue
        path = tuple(path.split(".")) if path else ()
        if isinstance(part, nn.Linear):
            names = layers.names(path, "dense")
            size = (None if is_lazy(part.weight) else part.weight.shape[1], part.out_features)
            found[names["weight"]] = _Slot(part.weight, layers.own_shape(names["weight"], size), True)
            if part.bias is not None:
                found[names["bias"]] = _Slot(part.bias, size[1:])
        elif isinstance(part, (nn.LayerNorm, nn.Embedding)):
            names = layers.names(path, "norm" if isinstance(part, nn.LayerNorm) else "embedding")
            found |= {names[which]: _Slot(x, tuple(x.shape)) for which, x in part.named_parameters(recurse=False)}
        else:
            own = dict(part.named_parameters(recurse=False))
            if own and not isinstance(part, (_Attention, MultiHeadAttention)):
                raise TypeError(f"{'.'.join(path)} is a {type(part).__name__}, whose weights have no name outside PyTorch")
            for name, x in own.items():
                shape = (None,) * (2 if name == "W" else 1) if is_lazy(x) else tuple(x.shape)
                found[layers.names((*path, name), "embedding")["weight"]] = _Slot(x, shape)
    return found


def _packed(part):
    """The slots of PyTorch's own multi-head attention: slices of its in_proj."""
    if part.bias_k is not None or part.add_zero_attn:
        raise TypeError("nn.MultiheadAttention with add_bias_kv or add_zero_attn attends to keys of its own: kvattn has none")
    h = part.embed_dim
    if part.in_proj_weight is None:
        weights = [part.q_proj_weight, part.k_proj_weight, part.v_proj_weight]
    else:
        weights = part.in_proj_weight.split(h)
    weights = {f"W_{c}": x for c, x in zip("qkvo", [*weights, part.out_proj.weight], strict=True)}
    found = {name: _Slot(x, tuple(x.shape)[::-1], True) for name, x in weights.items()}
    if part.in_proj_bias is not None:
        biases = [*part.in_proj_bias.split(h), part.out_proj.bias]
        found |= {f"b_{c}": _Slot(x, (h,)) for c, x in zip("qkvo", biases, strict=True)}
    return found


def assign(module, arrays):
    """Put these arrays, whose names and shapes fit, in the module's weights; returns the module."""
    parameters = {slot.parameter for slot in slots(module).values()}
    fresh = any(map(is_lazy, parameters)) and all(x.dtype == torch.float32 for x in parameters)
    if fresh and any(x.dtype == np.float64 for x in arrays.values()):
        module.double()
    with torch.no_grad():
        for name, slot in slots(module).items():
            array = layers.native(name, arrays[name])
            array = torch.tensor(array.T if slot.transposed else array)
            if is_lazy(slot.parameter):
                slot.parameter.materialize(array.shape)
            slot.parameter.copy_(array)
    return module


layers.describe(globals())
