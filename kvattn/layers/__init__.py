"""Native layers, one file a framework: the same classes in the same order. What they share is here.

A weight has one name, one shape and one first distribution in every framework. Matrices multiply from the right,
(features in, features out):

    AdditiveAttention         W_q (d_q, h)   W_k (d_k, h)   w_v (h,)
    MultiplicativeAttention   W (d_q, d_k)
    GatedAttention            w_g (2 d,)
    MultiHeadAttention        W_q  W_k  W_v  W_o  b_q  b_k  b_v  b_o  sink (heads,): the params of kvattn.multi_head_attention;
                              q_norm (d,)   k_norm (d,): of each head's d features
    AddNorm                   gamma (h,)   beta (h,)
    PositionWiseFFN           W_1 (h, f)   b_1 (f,)   W_2 (f, h)   b_2 (h,)
    TransformerEncoderBlock   attention.*   addnorm1.*   ffn.*   addnorm2.*
    TransformerEncoder        embedding (vocabulary, h)   blocks.0.*   blocks.1.*   ...
    TransformerDecoderBlock   attention1.*   addnorm1.*   attention2.*   addnorm2.*   ffn.*   addnorm3.*
    TransformerDecoder        embedding (vocabulary, h)   blocks.0.*   ...   dense.W (h, vocabulary)   dense.b (vocabulary,)

Around them, a framework's own dense layer called ``x`` gives x.W and x.b, its layer norm x.gamma and x.beta, its embedding x.

First values: matrices and w_v, w_g are uniform within sqrt(6 / (in + out)) of 0 (Glorot and Bengio 2010), the embedding
is normal with variance 1 / h, gamma, q_norm and k_norm are 1, biases, beta and sink are 0. ``seed=`` draws them here, the
same in every framework; without it each framework draws from its own generator.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from kvattn import api, checks, conversion, dispatch, distances, patterns, prepare, rotation
from kvattn.cache import KVCache
from kvattn.call import Call

LAYERS = (
    "DotProductAttention", "AdditiveAttention", "MultiplicativeAttention", "GatedAttention", "MultiHeadAttention",
    "PositionalEncoding", "AddNorm", "PositionWiseFFN", "TransformerEncoderBlock", "TransformerEncoder",
    "TransformerDecoderBlock", "TransformerDecoder",
)  # fmt: skip

# What help() says of a layer's arguments, in every framework: made by `describe`, since a class is written five times.
ARGUMENTS = {
    "num_hiddens": "features of the output, of all heads together; of additive attention, hidden units of its score.",
    "num_heads": "heads; it divides num_hiddens.",
    "num_kv_heads": "heads of keys and values, each shared by a group of query heads; it divides num_heads, the default.",
    "dropout": "the rate at which weights, or activations, are dropped in training.",
    "bias": "whether the projections have biases: b_q, b_k, b_v, b_o.",
    "use_bias": "whether the projections have biases: b_q, b_k, b_v, b_o.",
    "rotary": "True, or a dict of kvattn.rotary's keywords (base, interleaved, rotary_dim, scaling), where queries and keys of "
    "each head are turned by their positions, which a cache counts on.",
    "qk_norm": "True, or the epsilon (1e-6): whether queries and keys of each head are divided by the root of their mean "
    "square, before they are turned, and multiplied by the learned q_norm and k_norm, as in Qwen3.",
    "alibi": "True, or a slope for each head (kvattn.alibi_slopes by default), by which its scores fall for each position "
    "between a query and a key: they stand as for `causal`, from query_offset and from 0 on, and a cache counts on.",
    "sink": "whether each head learns a sink of kvattn.attention: a logit, 0 at first, that takes its share of every row.",
    "ffn_num_hiddens": "hidden units of the feed-forward network.",
    "ffn_num_outputs": "features of its output.",
    "vocab_size": "tokens that there are; the inputs are integers below it.",
    "num_blks": "blocks, one after another.",
    "i": "the block's place in a decoder: its cache is state[2][i].",
    "max_len": "positions that have an encoding.",
    "norm_shape": "features of the input, which the input itself tells where that may be left out.",
    "activation": "the function between the two dense layers: 'relu', 'gelu', ...",
    "key_size": "as in d2l; the input itself tells it.",
    "query_size": "as in d2l; the input itself tells it.",
    "value_size": "as in d2l; the input itself tells it.",
    "seed": "an int, for the same first weights in every framework; by default the framework draws them.",
    "rng": "a numpy.random.Generator, the source of dropout.",
    "kwargs": "the framework's own: name, dtype, ...",
}
CALLS = {
    "X": "(batch, n, h); of an encoder or decoder tokens, integers (batch, n).",
    "state": "[enc_outputs, enc_valid_lens, caches], what init_state or the call before returned; it is not written to.",
    "queries": "(batch, n, d).",
    "keys": "(batch, m, d).",
    "values": "(batch, m, v).",
    "valid_lens": "(batch,) or (batch, n): keys from this position on are padding.",
    "cache": "a kvattn.KVCache (of an encoder, one for each block), which a call extends and returns.",
    "rng": "an int, by which all that dropout drops here is the same in every framework; give each step another.",
    "options": "kvattn.attention's own: causal, mask, bias, window, positions, scale, return_weights, ...",
    "offset": "the position of the first of them.",
    "Y": "what is added to X, of its shape.",
    "training": "whether dropout drops.",
    "return_weights": "also return the weights of each block's attention.",
}
# What it says of a layer after its own docstring, where layers keep their weights: JAX's return others, and say so themselves.
DETAILS = {
    "MultiHeadAttention": """
        With ``cache=`` (a kvattn.KVCache, KVCache() at first) a call returns (output, cache); with return_weights=True the
        weights (batch, heads, n, m) follow the output.""",
    "TransformerEncoder": """
        ``causal=True`` makes it a decoder; with ``cache=`` ([] at first) it takes the next tokens and returns (Y, caches).
        ``attention_weights`` lists each block's, (batch * heads, n, m).""",
    "TransformerDecoderBlock": """
        A call takes X and a decoder's state, and returns (Y, state), in which state[2][i] is this block's cache. ``rotary`` and
        ``alibi`` are of the self-attention.""",
    "TransformerDecoder": """
        decoder(X, state) takes the next tokens (batch, n), after those that the state's caches hold, and returns the logits
        (batch, n, vocab_size) of those that follow each, and the state for the next call. ``init_state`` gives the first
        state. ``attention_weights`` are two lists of each block's, (batch * heads, n, m): of the self-attention, and of that
        to the encoder's outputs.

        Source: Vaswani et al. 2017, section 3.1.""",
}
# What others call the arguments of a layer, and what these are here: the first that the layer has. Keras's key_dim is of one
# head, and num_hiddens of all.
ELSEWHERE = {
    "embed_dim": ("num_hiddens",), "d_model": ("num_hiddens",), "units": ("num_hiddens", "ffn_num_outputs"),
    "key_dim": ("num_hiddens",), "qkv_features": ("num_hiddens",), "hidden_size": ("num_hiddens",),
    "nhead": ("num_heads",), "num_key_value_heads": ("num_kv_heads",), "num_layers": ("num_blks",),
    "dropout_rate": ("dropout",), "rate": ("dropout",), "dim_feedforward": ("ffn_num_hiddens",),
    "intermediate_dim": ("ffn_num_hiddens",), "num_embeddings": ("vocab_size",), "normalized_shape": ("norm_shape",),
    "position": ("max_len",), "max_length": ("max_len",),
}  # fmt: skip
METHODS = ("hybrid_forward", "forward", "call", "__call__")  # what a framework calls the call

EPSILON = 1e-5  # of every layer norm

Seed = int | tuple[int, ...] | None


def child(seed: Seed, name: str) -> Seed:
    """The seed of the part called ``name``.

    >>> child(7, "ffn") == child(7, "ffn") != child(7, "attention")
    True
    """
    return None if seed is None else (*((seed,) if isinstance(seed, int) else seed), zlib.crc32(name.encode()))


def glorot(shape: tuple[int, ...]) -> float:
    """The half-width of the uniform distribution of a weight: of a vector as of a matrix with one column.

    >>> glorot((2, 4)), glorot((5,)), glorot((0, 0)) < math.inf
    (1.0, 1.0, True)
    """
    return math.sqrt(6 / max(1, shape[0] + (shape[1] if len(shape) > 1 else 1)))


def initial(seed: Seed | np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The first value of the weight called ``name``, float32, whatever framework asks.

    >>> initial(7, "b_1", (2,))
    array([0., 0.], dtype=float32)
    """
    if re.match("b_|b$|beta|sink$", name):
        return np.zeros(shape, np.float32)
    if name in ("gamma", "q_norm", "k_norm"):
        return np.ones(shape, np.float32)
    draw = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(child(seed, name))
    if name == "embedding":
        return (draw.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)
    return draw.uniform(-glorot(shape), glorot(shape), shape).astype(np.float32)


def encoding(length: int, h: int) -> np.ndarray:
    """P (length, h), float64: sin(i / 10000^(j / h)) in the even columns j, cos of the same angle in the column after.

    >>> encoding(1, 3)
    array([[0., 1., 0.]])

    Source: Vaswani et al. 2017, section 3.5.
    """
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, h, 2) / h)
    P = np.empty((length, h))
    P[:, 0::2], P[:, 1::2] = np.sin(angles), np.cos(angles[:, : h // 2])
    return P


def names(path: tuple[str, ...], kind: str) -> dict[str, str]:
    """The names of a native part's weights: {"weight": ..., "bias": ...} for a part of ``kind`` dense, norm or embedding.

    >>> names(("blks", "block0", "attention", "W_q"), "dense")
    {'weight': 'blocks.0.attention.W_q', 'bias': 'blocks.0.attention.b_q'}
    """
    text = re.sub(r"(^|\.)blks[._](?:block)?(\d+)", r"\1blocks.\2", ".".join(path))
    text = re.sub(r"(^|\.)cells_(\d+)", r"\1cells.\2", text)  # flax's name of what stands in a list
    *parents, last = text.split(".")
    if kind == "embedding":
        found = {"weight": last}
    elif kind == "norm":
        found = {"weight": "gamma", "bias": "beta"} if last == "ln" else {"weight": f"{last}.gamma", "bias": f"{last}.beta"}
    elif re.fullmatch("W_[a-z]", last):
        found = {"weight": last, "bias": f"b_{last[-1]}"}
    elif re.fullmatch(r"dense\d", last):
        found = {"weight": f"W_{last[-1]}", "bias": f"b_{last[-1]}"}
    elif last == "w_v":
        found = {"weight": "w_v", "bias": "b_v"}
    else:
        found = {"weight": f"{last}.W", "bias": f"{last}.b"}
    return {which: ".".join([*parents, name]) for which, name in found.items()}


# Dense layers keep w_v, a vector, as a matrix of one column.


def own_shape(name: str, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape that a weight of a native ``shape`` (features in, out) has here."""
    return shape[:1] if re.search(r"(^|\.)w_v$", name) else shape


def own(name: str, array: np.ndarray) -> np.ndarray:
    """A native weight (features in, out) as it is here."""
    return np.ascontiguousarray(array.reshape(own_shape(name, array.shape)))


def native(name: str, array: np.ndarray) -> np.ndarray:
    """A weight as a dense layer keeps it, (features in, out)."""
    return array[:, None] if re.search(r"(^|\.)w_v$", name) else array


# ---- what a layer refuses


def head_width(num_hiddens: int, num_heads: int, num_kv_heads: int) -> int:
    """The features of one head. Raises ValueError unless the heads divide the features, and each other."""
    checks.heads(num_heads, num_kv_heads)
    if num_hiddens % num_heads:
        raise ValueError(f"num_hiddens is {num_hiddens}, no multiple of num_heads, {num_heads}")
    return num_hiddens // num_heads


ROTARY = ("base", "interleaved", "rotary_dim", "scaling")


def check_rotary(rotary: Any, width: int) -> dict[str, Any] | None:
    """The keywords of kvattn.rotary for heads of ``width`` features, None where they are not turned. Raises what it would."""
    if rotary is None or rotary is False:
        return None
    given = {} if rotary is True else rotary
    if not isinstance(given, Mapping):
        raise TypeError(f"rotary must be True or a dict of kvattn.rotary's keywords, not {rotary!r}")
    if unknown := sorted(set(given) - {*ROTARY}):
        raise TypeError(f"rotary has no {', '.join(unknown)}; it has {', '.join(ROTARY)}")
    checks.scaling(given.get("base", 10000.0), given.get("rotary_dim"), given.get("scaling"), width)
    checks.flag("interleaved", given.get("interleaved", False))
    return dict(given)


def check_qk_norm(given: Any) -> float | None:
    """The epsilon of the norms of queries and keys, None where there are none."""
    if given is None or (isinstance(given, (bool, np.bool_)) and not given):
        return None
    return 1e-6 if isinstance(given, (bool, np.bool_)) else checks.number("qk_norm", given, positive=True)


def normed(tab: Any, epsilon: float | None, queries: Any, keys: Any, q_norm: Any, k_norm: Any) -> tuple[Any, Any]:
    """queries and keys (..., heads, n, d), each row normed by the weight of its own, where there are norms."""
    if epsilon is None:
        return queries, keys
    return tab._normed(queries, q_norm, epsilon), tab._normed(keys, k_norm, epsilon)


def rotated(backend: str, rotary: Any, queries: Any, keys: Any, first: Any, cache: KVCache | None = None) -> Any:
    """queries and keys (..., heads, n, d) turned by their positions: queries stand from ``first`` on, keys from 0 on; with a
    cache, both after what it holds. ``backend`` is named, since NumPy's arrays would be those of any."""
    if cache is not None:
        checks.no_offset(first)
    if rotary is None:
        return queries, keys
    shape = (len(first),) if isinstance(first, (list, tuple)) else tuple(getattr(first, "shape", ()))
    if shape:
        raise ValueError(f"query_offset has shape {shape}; with rotary= it is one for all batch entries")
    if isinstance(first, (bool, float, str)):
        raise TypeError(f"query_offset must be an int, not {first!r}")
    places = (first, 0) if cache is None else (cache.length, cache.length)
    rotary = {**of_one_length(backend, rotary, queries, keys, places), "backend": backend}
    return tuple(api.rotary(x, place, **rotary) for x, place in zip((queries, keys), places, strict=True))


def of_one_length(backend: str, rotary: dict[str, Any], queries: Any, keys: Any, places: tuple[Any, Any]) -> dict[str, Any]:
    """The keywords of rotary, by which queries and keys from these places on turn alike: some scale by the longer."""
    scaling = rotary.get("scaling") or {}
    if not rotation.by_length(scaling):
        return rotary
    tab, kind = dispatch.choose(backend, queries=queries), scaling.get("rope_type") or scaling["type"]
    length = max(checks.length(tab, place, x.shape[-2], kind) for x, place in zip((queries, keys), places, strict=True))
    return {**rotary, "scaling": rotation.of_length(scaling, length)}


def check_alibi(alibi: Any, num_heads: int) -> tuple[float, ...] | None:
    """The slope of each head, None where distance costs nothing."""
    if alibi is None or (isinstance(alibi, (bool, np.bool_)) and not alibi):
        return None
    if isinstance(alibi, (bool, np.bool_)):
        return tuple(distances.slopes(num_heads))
    try:
        slopes = np.asarray(alibi, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"alibi must be True or {num_heads} slopes, not {type(alibi).__name__}: {error}") from error
    if slopes.shape != (num_heads,) or not np.isfinite(slopes).all():
        raise ValueError(f"alibi is {alibi!r}; expected True, or a finite slope for each of the {num_heads} heads")
    return tuple(slopes.tolist())


def with_alibi(backend: str, options: dict[str, Any], slopes: tuple[float, ...] | None, queries: Any) -> dict[str, Any]:
    """attention's options with the layer's own bias by distance, a function of positions; None where it has none.

    Raises ValueError where the call gives a bias too.
    """
    if slopes is None:
        return options
    if options.get("bias") is not None:
        raise ValueError("bias is given beside the layer's own, which alibi= made: leave one of them out")
    dtype = "float64" if conversion.dtype_name(queries) == "float64" else "float32"
    return {**options, "bias": partial(_falling, backend, slopes, dtype)}


def _falling(backend: str, slopes: tuple[float, ...], dtype: str, query: Any, key: Any) -> Any:
    """ALiBi's bias of pairs by their positions; a function of the module, since a layer that keeps its last call is pickled."""
    distance = abs(query - key)
    tab = dispatch.choose(backend, distance=distance)
    by_head = tab.asarray([-slope for slope in slopes], dtype=dtype, like=distance)[:, None, None]
    return by_head * tab.asarray(distance, dtype=dtype)


def with_sink(options: dict[str, Any], sink: Any) -> dict[str, Any]:
    """attention's options with the layer's own sink, None where it has none. Raises ValueError where the call gives one too."""
    if sink is None:
        return options
    if options.get("sink") is not None:
        raise ValueError("sink is given beside the layer's own, which sink=True made: leave one of them out")
    return {**options, "sink": sink}


def seed_of(tab: Any, rng: Any, part: int, attends: bool = True) -> Any:
    """The seed of a part of a layer whose call was given ``rng``; what is no seed serves the parts that attend, as it is."""
    if rng is None or not patterns.is_seed(rng := checks.seed(tab, rng)):
        return rng if attends else None
    return tab.dropout.derived(rng, part)


def dropped(tab: Any, X: Any, rate: float, rng: Any) -> Any:
    """X (..., n, features) with entries dropped as weights are, a feature in the place of a key."""
    if not patterns.is_seed(rng := checks.seed(tab, rng)):
        raise TypeError(f"rng must be an int here, the seed of a pattern, not {type(rng).__name__}")
    return tab._dropout(X, Call(score=None, normalize=None, dropout=rate, rng=rng))


def placed(backend: str, queries: Any, keys: Any, values: Any, cache: Any, rotary: Any, options: dict[str, Any]) -> Any:
    """Projections (..., heads, n, d) as heads attend: turned by their positions, with a cache after what it holds.

    Returns queries, keys, values and the cache; the place of the queries is put among the options.
    """
    queries, keys = rotated(backend, rotary, queries, keys, options.get("query_offset", 0), cache)
    if cache is not None:
        cache = cache.extend(keys, values, backend=backend)
        keys, values = cache.seen()
        options["query_offset"] = cache.length - queries.shape[-2]
    return queries, keys, values, cache


def joined(join: Any, W_o: Any, results: Any, cache: KVCache | None) -> Any:
    """What the heads gave, joined and mixed: the output (batch, n, num_hiddens), and what else attention returned, the cache
    as the last."""
    output, *rest = results if isinstance(results, (tuple, list)) else (results,)
    output = W_o(join(output))
    rest = rest if cache is None else [*rest, cache]
    return (output, *rest) if rest else output


def lengths(tab: Any, valid_lens: Any, queries: Any) -> Any:
    """valid_lens for queries (batch, heads, n, d), or (heads, n, d): then () and (n,) become the lengths of each head."""
    if valid_lens is None or len(queries.shape) != 3:
        return valid_lens
    return checks.for_each_head(tab, valid_lens, queries.shape[0], queries)


# the options that forbid pairs, but for lengths
LIMITS = ("mask", "bias", "causal", "query_offset", "window", "segments", "positions")


def hide_unseen(
    tab: Any, queries: Any, keys: Any, values: Any, num_heads: int, /, valid_lens: Any = None, **options: Any
) -> Any:
    """queries, keys and values (..., n, features) with zeros in rows that are in no pair in any head: NaN in them would
    reach the gradients of the matrices that project them. Raises what attention would."""
    free = valid_lens is None and not options.keys() - {"rng"} and 0 not in (*queries.shape[:-1], *keys.shape[:-1])
    if free or not tab._may_leak(queries, keys, values):
        return queries, keys, values
    limits = {name: options[name] for name in LIMITS if name in options} | {"valid_lens": valid_lens}
    lead = tuple(queries.shape)[:-2]
    *batch, _, n, m = checks.pairs(*(x[..., None, :, :] for x in (queries, keys, values)))
    scores, bias = (*batch, num_heads, n, m), None if callable(limits.get("bias")) else limits.pop("bias", None)
    limits = prepare.options(tab, queries, scores, (None, None), **limits, batch=tuple(batch[:1]))
    if not lead and valid_lens is not None:
        limits["valid_lens"] = checks.for_each_head(tab, limits["valid_lens"], num_heads, queries)
    if bias is not None:  # of the dtype of what is projected, which autocast may choose
        limits["bias"] = conversion.array(tab, "bias", bias, like=queries)
        checks.broadcastable("bias", tuple(limits["bias"].shape), scores, "the scores")
    return tab._hide_unused_rows(queries, keys, values, Call.of(queries, keys, **limits))


def check_activation(activation: str) -> None:
    """Raises ValueError for an activation that not every framework has here."""
    if activation not in ("relu", "gelu"):
        raise ValueError(f"activation must be 'relu' or 'gelu', not {activation!r}")


def check_length(max_len: Any, n: Any, offset: Any) -> None:
    """Raises ValueError, where the numbers are known, for a sequence that runs past the positional encoding."""
    if all(map(conversion.is_integer, (max_len, n, offset))) and n + offset > max_len:
        raise ValueError(f"a sequence of {n} from position {offset} runs past max_len={max_len} of the positional encoding")


def check_made(waiting: Any) -> None:
    """Raises ValueError naming the weights that wait for the first call."""
    if waiting := sorted(waiting):
        raise ValueError(f"no values yet for {', '.join(waiting)}: call the layer once, its inputs give the sizes")


def caches(given: Any, blocks: int) -> list[KVCache]:
    """One cache a block; [] at first."""
    given = list(given)
    if given and len(given) != blocks:
        raise ValueError(f"cache holds {len(given)} blocks' keys and values; this encoder has {blocks} blocks")
    of_one_position(given, "cache")
    return given or [KVCache() for _ in range(blocks)]


ATTENTIONS = ("attention1", "attention2")  # of a decoder's block: to its own positions, and to the encoder's
NOT_KEPT = KVCache(length=None)  # in a state, of a block that was called in a graph which can keep no cache


def parts_of_state(state: Any, blocks: int, exactly: bool = True) -> tuple[Any, Any, list[KVCache]]:
    """The encoder's outputs, their lengths and the blocks' caches in a decoder's state. Raises for what is no such state.

    Not ``exactly``: for the last of these blocks alone, which looks at its own cache.
    """
    if not (isinstance(state, (list, tuple)) and len(state) == 3 and isinstance(state[2], (list, tuple))):
        raise TypeError(f"state must be [enc_outputs, enc_valid_lens, caches], what init_state gives, not {_described(state)}")
    outputs, lens, caches = state
    if outputs is None or isinstance(outputs, (list, tuple)):
        raise TypeError(f"state[0] must be the encoder's outputs, an array, not {_described(outputs)}")
    if blocks < 1 and not exactly:
        raise ValueError(f"i is {blocks - 1}; expected the block's place in the decoder, from 0 on")
    if len(caches) != blocks if exactly else len(caches) < blocks:
        needs = f"this decoder has {blocks} blocks" if exactly else f"this block's is state[2][{blocks - 1}]"
        raise ValueError(f"state[2] holds {len(caches)} blocks' caches; {needs}")
    for i, cache in [*enumerate(caches)][0 if exactly else blocks - 1 : blocks]:
        if not (cache is None or isinstance(cache, KVCache)):
            raise TypeError(f"state[2][{i}] must be None, at first, or a kvattn.KVCache, not {_described(cache)}")
        if cache is not None and cache.length is None:
            raise ValueError(
                f"state[2][{i}] kept nothing: the call before was in a graph of an unknown length, of padding that Keras "
                "masks, or of MXNet's, after which none can follow; give each sequence whole, with a state of init_state's"
            )
    caches = [KVCache() if cache is None else cache for cache in caches]
    if exactly:
        of_one_position(caches, "state[2]")
    return outputs, lens, caches


def of_one_position(caches: list[KVCache], name: str) -> None:
    """Raises ValueError unless all blocks' caches hold as many positions, where lengths are numbers, not of a trace."""
    lengths = [cache.length for cache in caches]
    if all(map(conversion.is_integer, lengths)) and any(length != lengths[0] for length in lengths):
        raise ValueError(f"{name} holds {' and '.join(map(str, lengths))} positions; expected as many for each block")


def _described(x: Any) -> str:
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, (list, tuple)) else type(x).__name__


def following(state: Any, i: int, cache: KVCache) -> list[Any]:
    """The state after block ``i``."""
    outputs, lens, caches = state
    return [outputs, lens, [*caches[:i], cache, *caches[i + 1 :]]]


def with_causal(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a decoder's self-attention. Raises ValueError for another ``causal``: d2l's decoders looked ahead."""
    if options.get("causal", True) is not True:
        raise ValueError(f"causal is {options['causal']!r}; a decoder attends to no later position: leave it out")
    return {**options, "causal": True}


# ---- what encoders and decoders do in every framework whose layers keep their weights


class ShowsBlocks:
    """An encoder, which shows the weights of its blocks."""

    blks: Any

    @property
    def attention_weights(self) -> list[Any]:
        return [block.attention.attention.attention_weights for block in self.blks]


class KeepsState:
    """A decoder: its first state, and the weights of its blocks, of the one attention and of the other."""

    blks: Any

    def init_state(self, enc_outputs: Any, enc_valid_lens: Any = None) -> list[Any]:
        return [enc_outputs, enc_valid_lens, [None] * len(self.blks)]

    @property
    def attention_weights(self) -> list[list[Any]]:
        return [[getattr(block, name).attention.attention_weights for block in self.blks] for name in ATTENTIONS]


# No option may have a name that stands before the /. ``training`` is TensorFlow's alone, whose layers pass it to their parts.


def encoded(
    tab: Any, encoder: Any, X: Any, valid_lens: Any, cache: Any, rng: Any, training: Any = None, /, **options: Any
) -> Any:
    """Tokens through an encoder's embedding and blocks; with a cache (Y, caches)."""
    mode = {} if training is None else {"training": training}
    kept = None if cache is None else caches(cache, len(encoder.blks))
    X = encoder._embedded(X, kept[0].length if kept else 0, seed_of(tab, rng, 0, attends=False), **mode)
    for i, block in enumerate(encoder.blks):
        given = options | mode | seeded(seed_of(tab, rng, 1 + i))
        if kept is None:
            X = block(X, valid_lens, **given)
        else:
            X, kept[i] = block(X, valid_lens, cache=kept[i], **given)
    return X if kept is None else (X, kept)


def decoded(tab: Any, decoder: Any, X: Any, state: Any, rng: Any, training: Any = None, /, **options: Any) -> tuple[Any, Any]:
    """Tokens through a decoder's embedding, blocks and dense layer: (logits, state)."""
    mode = {} if training is None else {"training": training}
    *_, kept = parts_of_state(state, len(decoder.blks))
    X = decoder._embedded(X, kept[0].length if kept else 0, seed_of(tab, rng, 0, attends=False), **mode)
    for i, block in enumerate(decoder.blks):
        X, state = block(X, state, **options, **mode, **seeded(seed_of(tab, rng, 1 + i)))
    return decoder.dense(X), state


def seeded(seed: Any) -> dict[str, Any]:
    """The options of a part that is given this seed; none without one."""
    return {} if seed is None else {"rng": seed}


def last_weights(last: Any, backend: str) -> Any:
    """The weights of a layer's last call (queries, keys, options), before dropout."""
    queries, keys, options = last
    options = {name: x for name, x in options.items() if not name.startswith("return_")}
    options |= {"return_weights": True, "backend": backend}
    return api.attention(queries, keys, keys[..., :1], **options)[1]


def with_one_batch(weights: Any) -> Any:
    """Weights (batch, n, m) as they are, (batch, heads, n, m) as (batch * heads, n, m)."""
    *lead, n, m = weights.shape
    return weights.reshape(math.prod(lead), n, m) if len(lead) > 1 else weights


def describe(module: dict[str, Any], details: Mapping[str, str] = DETAILS) -> None:
    """Tell, in the docstrings of a framework's layers, what each argument of the layer and of its call is; and, in an error,
    what an argument is called here that has another name elsewhere."""
    for layer in (module[name] for name in LAYERS):
        layer.__init__ = _with_hints(layer.__init__, layer.__name__)
        made = {name: ARGUMENTS[name] for name in inspect.signature(layer).parameters if name not in ("parent", "name")}
        if {"bias", "use_bias"} <= {*made}:
            first, second = (name for name in made if name in ("bias", "use_bias"))
            made[second] = f"another name of {first}, under which other frameworks' lessons know it."
        called = next(vars(cls)[name] for cls in layer.__mro__ for name in METHODS if name in vars(cls))
        taken = ("state" if name == "enc_outputs" else name for name in inspect.signature(called).parameters)
        asked = {name: CALLS[name] for name in taken if name in CALLS}
        arguments = "\n".join(f"    {name}: {text}" for name, text in made.items())
        call = "\n".join(f"- {name}: {text}" for name, text in asked.items())
        docs = [layer.__doc__ or "", *([details[layer.__name__]] if layer.__name__ in details else [])]
        parts = [*map(inspect.cleandoc, docs), f"Args:\n{arguments}", f"A call of the layer takes\n\n{call}"]
        layer.__doc__ = "\n\n".join(parts) + "\n"


def _with_hints(make: Callable[..., None], name: str) -> Callable[..., None]:
    """A layer's __init__ that knows the names of ELSEWHERE."""
    signature = inspect.signature(make)
    here = {other: own for other, names in ELSEWHERE.items() for own in names[::-1] if own in signature.parameters}

    @functools.wraps(make)
    def init(self: Any, *args: Any, **given: Any) -> None:
        if unknown := [f"{other}, which is called {here[other]} here" for other in given if other in here]:
            of_all = "; num_hiddens is of all heads together, num_heads * key_dim" if "key_dim" in given else ""
            raise TypeError(f"{name} has no {', no '.join(unknown)}{of_all}")
        make(self, *args, **given)

    vars(init)["__signature__"] = signature  # which Keras reads
    return init


def maps(found: Iterable[tuple[str, Any]], run: Callable[[], Any], reshape: Callable[..., Any]) -> dict[str, Any]:
    """What `run` leaves in these attention layers, by name: their weights, with the leading axes of their queries.

    A layer that does no more than to attend for another, which calls it "attention", goes by the other's name.
    """
    layers = list(found)
    for _, layer in layers:
        vars(layer)["_last"] = None
    run()
    made = {}
    for name, layer in layers:
        if layer._last is not None:
            weights = layer.attention_weights
            made[map_name(name)] = reshape(weights, (*layer._last[0].shape[:-2], *weights.shape[-2:]))
    return made


def map_name(path: str) -> str:
    """
    >>> map_name("blks.0.attention.attention"), map_name("")
    ('blks.0.attention', 'attention')
    """
    return path.removesuffix(".attention") or "attention"
