"""The specification: every public function is a signature, a promise and one call.

For every framework, score and normaliser::

    attention(q, D) = sum_i a(q, k_i) v_i      weights = normalize(score(query, key));  output = weights @ value

Axis letters: ``...`` batch and heads, n queries, m key-value pairs, d and v features, h hidden units, s selected keys.
Arrays are any one framework's; NumPy arrays, lists and numbers are neutral data, converted for the backend that serves
the call: the ``backend=`` argument, else the arrays' own, else ``use_backend``, ``set_backend``, KVATTN_BACKEND, numpy.

Where every backend must agree:

- Half precision (float16, bfloat16) is computed in float32; scores come back as float32, other results in the dtype of
  the arguments. float64 stays float64. Mixed dtypes and integers are TypeErrors.
- A query with nothing to attend to gets zeros, lse -inf (where there is a sink, the sink) and zero gradients.
- Without features (d = 0) dot products are 0, scaled or not: attention is the average of the values that may be attended to.
- NaN or inf in a key or value that no query of its batch entry may attend to, or in a query with no key, reaches no
  result and no gradient. With a cache it reaches no result, but gradients by what projects a step's keys, values and
  queries, through a framework's autodiff: a later step may look at what nobody does now.
- NaN, inf or a score that overflows changes nothing but the rows that look at it: in query i or row i of the bias that
  row, in a key or value the rows that may attend to it. Other rows, and gradients that depend on them alone, are exact:
  eagerly on a CPU (under jax.grad, vjp and jvp too); what may leak elsewhere stands in conformance/known_differences.py.
- With softmax, a row with a score of NaN or inf has NaN as its output and as the weights of the pairs that may attend (the
  others' are 0), and an lse and gradients that are not finite. A score of -inf weighs nothing, a row of them alone is
  empty; a value that is not finite makes its own feature so, in the rows that may attend to it.
- Arguments are never written to.
- Wrong shapes are ValueErrors and wrong types TypeErrors, raised here before any framework's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Never, Unpack, overload

from kvattn import checks, conversion, dispatch, distances, prepare, registry
from kvattn.cache import KVCache
from kvattn.call import Call, Explanation
from kvattn.dispatch import get_backend, set_backend, use_backend
from kvattn.registry import available_backends
from kvattn.signatures import A, Array, Normalizer, Options, Score

# isort: off
from kvattn.scores import (
    additive_score, average, boxcar_kernel, constant_kernel, cosine_score, distance_score, dot_score, epanechnikov_kernel,
    gated_score, gaussian_kernel, hardmax, identity, masked_softmax, multiplicative_score, proportional, scaled_dot_score,
    softmax, sparsemax, triangular_kernel,
)  # fmt: skip
# isort: on

__all__ = [
    "KVCache", "additive_score", "alibi_slopes", "asarray", "attention", "attention_grad", "available_backends", "average",
    "boxcar_kernel", "constant_kernel", "convert", "cosine_score", "distance_score", "dot_score", "epanechnikov_kernel",
    "explain", "gated_score", "gaussian_kernel", "get_backend", "hardmax", "identity", "masked_softmax", "merge_attention",
    "multi_head_attention", "multi_head_attention_grad", "multiplicative_score", "nadaraya_watson", "proportional",
    "relative_position_bucket", "rotary", "scaled_dot_score", "segments_from_cu_seqlens", "self_attention", "set_backend",
    "softmax", "sparsemax", "to_numpy", "triangular_kernel", "use_backend",
]  # fmt: skip

No = Literal[False]
Yes = Literal[True]


# ---- data


def asarray(x: Array, dtype: str | None = None, *, backend: Any = None) -> Array:
    """``x`` as the array of the backend that serves the call; ``dtype`` as NumPy spells it, or "bfloat16".

    float64 stays float64 in every backend. A backend's own array of that dtype is returned as it is. Anybody else's array
    is read by its `__array__`, or else its `__dlpack__`.

    >>> asarray([[1.0, 2.0]], dtype="float32").dtype
    dtype('float32')
    """
    return conversion.converted(dispatch.choose(backend, x=x), "x", x, dtype)


def to_numpy(x: Array) -> Array:
    """Any framework's array as a NumPy array, detached and on the CPU; bfloat16 comes as float32, which holds it.

    >>> to_numpy([1, 2])
    array([1, 2])
    """
    return conversion.read(dispatch.choose(None, x=x), "x", x)


def convert(x: Array, backend: str) -> Array:
    """Any framework's array as another's, with the same dtype; the way out of "arrays of two frameworks".

    >>> convert([1.5, 2.5], "numpy")
    array([1.5, 2.5])
    """
    source, target = dispatch.choose(None, x=x), registry.load(backend)
    if target.is_array(x):
        return x
    dtype = conversion.dtype_name(x) if source.is_array(x) else None
    return conversion.converted(target, "x", conversion.read(source, "x", x), dtype)


# ---- attention


@overload
def attention(
    query: A, key: A, value: A, *, return_weights: No = False, return_lse: No = False, backend: None = None,
    **options: Unpack[Options],
) -> A: ...  # fmt: skip
@overload
def attention(
    query: A, key: A, value: A, *, return_weights: Yes, return_lse: No = False, backend: None = None, **options: Unpack[Options]
) -> tuple[A, A]: ...
@overload
def attention(
    query: A, key: A, value: A, *, return_weights: No = False, return_lse: Yes, backend: None = None, **options: Unpack[Options]
) -> tuple[A, A]: ...
@overload
def attention(
    query: A, key: A, value: A, *, return_weights: Yes, return_lse: Yes, backend: None = None, **options: Unpack[Options]
) -> tuple[A, A, A]: ...
@overload
def attention(
    query: Array, key: Array, value: Array, *, return_weights: bool = ..., return_lse: bool = ...,
    return_scores: str | None = None, backend: Any = None, **options: Unpack[Options],
) -> Any: ...  # fmt: skip
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    score: Score | None = None,
    normalize: Normalizer | None = None,
    mask: Array | Callable[[Array, Array], Array] | None = None,
    bias: Array | Callable[[Array, Array], Array] | None = None,
    valid_lens: Array | None = None,
    causal: bool = False,
    query_offset: Any = 0,
    window: Any = None,
    segments: Any = None,
    positions: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Array | None = None,
    dropout: float = 0.0,
    rng: Any = None,
    return_weights: bool = False,
    return_lse: bool = False,
    return_scores: str | None = None,
    backend: Any = None,
    **unknown: Never,
) -> Any:
    """Attention: each query's weighted sum of the values, weighted by how well their keys match it.

    Args:
        query: (..., n, d); the leading axes are batch, then heads.
        key: (..., m, d). Fewer heads than the query's (axis -3, dividing) are shared by groups of query heads.
        value: (..., m, v), of the key's heads; a batch axis of 1 is shared, as the query's and the key's are.
        score: a function (query, key) -> scores (..., n, m) that treats each pair on its own; default
            `scaled_dot_score`. Bind parameters with functools.partial.
        normalize: a function (scores, where=None) -> weights; default `softmax`.
        mask: bool, broadcastable to (..., n, m): True where a query may attend. Or a function that gives this of positions,
            integer arrays: of queries, (n, 1), or (batch, 1, ..., n, 1) where each entry has an offset, and of keys, (1, m), of
            int32 or int64 as the framework has them: any in which a product of two positions fits, except where JAX has its
            64 bits off, whose int32 products wrap from position 46,341 on.
            It is asked for some queries and keys at a time, and more than once: what nobody may attend to is left out.
        bias: added to the scores; the query's dtype, broadcastable to (..., n, m). -inf forbids a pair, as the mask does. Or a
            function of positions, as the mask's, that gives floats of any dtype: there is no array (n, m) then.
        valid_lens: int (batch,) or (batch, n): keys from this position on are padding. () or (n,) without a batch axis.
        causal: query i sees keys up to its position, query_offset + i.
        query_offset: the position of the first query: an int, or (batch,), negative allowed. 0 aligns the first query
            with the first key; m - n (or the length of a cache) the last with the last.
        window: an int w, or (left, right), None for no limit: keys within that distance of the query's position.
        segments: int (batch, n), or (n,) without a batch axis, where n is m, or a pair, of the queries and of the keys: a query
            attends only to keys of its own segment. Sorted ones cost the sum of their squares, where they can be read and in
            traces of JAX and TensorFlow on a CPU; in other traces and on a GPU they are a mask of all pairs.
        positions: int, broadcastable to (..., n, s): the only keys each query may attend to, -1 for none; a position
            given twice counts once, where it stands first. Costs O(n s d); weights are (..., n, s).
        scale: replaces 1/sqrt(d) of `scaled_dot_score`; multiplies any other score.
        softcap: softcap * tanh(scores / softcap), after the scale, before bias and mask.
        sink: a logit that joins every row's softmax and has no value, so that the weights sum to less than 1: softmax only. A
            number (0 is softmax-off-by-one), or of the query's dtype: (heads,), or broadcastable to the batch and head axes
            (..., h), or to (..., h, n, 1), one for each query. -inf is none. It is in the lse: merging parts, give it to one.
        dropout: the rate at which weights are dropped; the weights returned are those before.
        rng: the source of dropout. An int, 0 <= seed < 2^64, draws one pattern: the same pairs in every backend, whatever the
            dtype, the blocks and the sizes; `kvattn.patterns` defines it. Inside a compiled function (jax.jit, tf.function) an
            int would be the same in every step: there give an array () of an integer dtype, an argument of that function. Under
            vmap every entry is a call of its own, and draws the same from one seed: map over an array of seeds. Or
            the framework's own: numpy.random.Generator, torch.Generator, a jax key, TensorFlow's stateless seed, a pair of
            ints. None draws from the framework's hidden state; JAX has none.
        return_weights: also return the weights (..., n, m).
        return_lse: also return the log of the sum of exp(scores), (..., n), float32 for half precision: softmax only.
        return_scores: also return the scores (..., n, m), float32 for half precision, at one of three stages: "raw", the score
            times the scale; "capped", after the softcap; "biased", what the normaliser is given. -inf for a pair that may not
            attend, at each of them. With ``positions`` they are (..., n, s). They are computed beside the output, which keeps
            its kernel.
        backend: a name, or a backend itself.

    Returns:
        The output (..., n, v) in the query's dtype; weights, lse and scores follow it, each on request, in this order.

    Mask, bias, valid_lens, causal, window, segments and positions compose: a pair is allowed where all allow.

    Raises:
        ValueError: shapes that do not fit, naming the argument, both shapes and the axis; numbers out of range.
        TypeError: mixed or integer dtypes, a mask that is not bool, arrays of two frameworks. Under torch.autocast mixed
            dtypes are no error: all but float64 are converted to the query's, as PyTorch's own attention converts them.

    >>> attention([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[10.0], [20.0]], normalize=hardmax)
    array([[10.]])
    >>> attention(*[[[0.0], [1.0], [5.0]]] * 3, normalize=average, mask=lambda query, key: key < query)
    array([[0. ],
           [0. ],
           [0.5]])

    Source: Vaswani et al. 2017, "Attention is all you need", equation 1; grouped queries: Ainslie et al. 2023; windows:
    Beltagy et al. 2020; soft caps: Gemma 2, 2024.
    """
    if unknown:  # another library's name of an argument
        raise checks.unknown(unknown, prepare.OPTIONS)
    score = None if score is scaled_dot_score else score  # the default by its name, as layers give it
    known = prepare.remembered(query, key, value, backend)
    plain = score is normalize is segments is positions is sink is return_scores is None
    plain = plain and type(causal) is type(return_weights) is type(return_lse) is bool and type(query_offset) is int
    plain = plain and not dropout
    if plain and known is not None:
        if rng is not None:
            checks.seed(known.tab, rng)
        try:
            bare = mask is bias is valid_lens is None
            if bare and scale is softcap is window is None and not (causal or return_weights or return_lse):
                return known.tab.attention(query, key, value)
            if bare or known.fits(query, mask, bias, valid_lens):
                if valid_lens is not None:
                    checks.not_negative(known.tab, valid_lens)
                return known.tab.attention(
                    query, key, value, mask=mask, bias=bias, valid_lens=valid_lens, causal=causal, query_offset=query_offset,
                    window=None if window is None else checks.window(window),
                    scale=None if scale is None else checks.number("scale", scale),
                    softcap=None if softcap is None else checks.number("softcap", softcap, positive=True),
                    return_weights=return_weights, return_lse=return_lse,
                )  # fmt: skip
        except RuntimeError:
            conversion.same_device("key", key, query)
            conversion.same_device("value", value, query)
            raise
    tab = dispatch.choose(
        backend, query=query, key=key, value=value, mask=mask, bias=bias, valid_lens=valid_lens,
        query_offset=query_offset, segments=segments, positions=positions, sink=sink,
    )  # fmt: skip
    if known is not None and known.tab is tab:
        scores = known.scores
        conversion.same_device("key", key, query)  # which is not remembered
        conversion.same_device("value", value, query)
    else:
        given = query, key, value
        query, key, value, scores = prepare.inputs(tab, query, key, value, score)
        known = prepare.remember(tab, *given, scores) if prepare.is_dot_product(score) else None
    options = prepare.options(
        tab, query, scores, (query.shape[-1], key.shape[-1]), score, normalize, mask, bias, valid_lens, causal, query_offset,
        window, positions, scale, softcap, sink, dropout, rng, return_lse, segments=segments,
    )  # fmt: skip
    if plain and known is not None:
        known.remember((mask, bias, valid_lens), (options["mask"], options["bias"], options["valid_lens"]))
    asked = {"return_weights": return_weights, "return_lse": return_lse, "return_scores": return_scores}
    options |= prepare.returned(asked)
    if score is normalize is None:
        return tab.attention(query, key, value, **options)
    try:
        return tab.attention(query, key, value, **options)
    except Exception:
        checks.user_functions(tab, options, query, key)
        raise


@overload
def attention_grad(
    query: A, key: A, value: A, grad_output: A, *, wrt: Sequence[str] = ..., return_scores: str | None = None,
    grad_scores: A | None = None, backend: None = None, **options: Unpack[Options],
) -> tuple[A, ...]: ...  # fmt: skip
@overload
def attention_grad(
    query: Array, key: Array, value: Array, grad_output: Array, *, wrt: Sequence[str] = ..., return_scores: str | None = None,
    grad_scores: Array | None = None, backend: Any = None, **options: Unpack[Options],
) -> tuple[Array, ...]: ...  # fmt: skip
def attention_grad(
    query: Array,
    key: Array,
    value: Array,
    grad_output: Array,
    *,
    wrt: Sequence[str] = ("query", "key", "value"),
    score: Score | None = None,
    normalize: Normalizer | None = None,
    mask: Array | Callable[[Array, Array], Array] | None = None,
    bias: Array | Callable[[Array, Array], Array] | None = None,
    valid_lens: Array | None = None,
    causal: bool = False,
    query_offset: Any = 0,
    window: Any = None,
    segments: Any = None,
    positions: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Array | None = None,
    dropout: float = 0.0,
    rng: Any = None,
    return_scores: str | None = None,
    grad_scores: Array | None = None,
    backend: Any = None,
    **unknown: Never,
) -> tuple[Array, ...]:
    """The gradients of sum(grad_output * attention(query, key, value, ...)), each in its argument's shape and dtype.

    Args:
        grad_output: (..., n, v), in the query's dtype: the gradient of a loss by attention's output.
        wrt: what to differentiate by, any of "query", "key", "value", "bias", "sink" and the keywords that ``score``, a
            functools.partial, binds to arrays ("W_q", ...).
        return_scores: `attention`'s: the stage of the scores, where the loss looks at these too. It comes with grad_scores.
        grad_scores: (..., n, m), with positions (..., n, s), in the scores' dtype, float32 for half precision: the gradient of
            the loss by them. The results are then the gradients of sum(grad_scores * scores) as well, over the pairs that may
            attend.

    The other arguments are `attention`'s. NumPy's gradients, and MXNet's on the CPU, are analytic and recompute the weights;
    the other backends use their own autodiff, which works through `attention` as well, in MXNet too.

    >>> attention_grad([[1.0]], [[1.0], [1.0]], [[2.0], [4.0]], [[1.0]])[2]
    array([[0.5],
           [0.5]])
    """
    if unknown:
        raise checks.unknown(unknown, prepare.OPTIONS)
    score = None if score is scaled_dot_score else score
    known = prepare.remembered(query, key, value, backend)
    plain = score is normalize is segments is positions is sink is return_scores is None
    plain = plain and grad_scores is None and not dropout and type(wrt) is tuple and wrt == ("query", "key", "value")
    plain = plain and type(causal) is bool and type(query_offset) is int
    if plain and known is not None and known.fits(query, mask, bias, valid_lens, grad_output):
        if known.layout is not None:  # PyTorch's
            for name, x in (("key", key), ("value", value), ("grad_output", grad_output)):
                conversion.same_device(name, x, query)
        checks.not_negative(known.tab, valid_lens)
        gradients = registry.offered(known.tab, "attention_grad")(
            query, key, value, grad_output, mask=mask, bias=bias, valid_lens=valid_lens, causal=causal,
            query_offset=query_offset, window=None if window is None else checks.window(window),
            scale=None if scale is None else checks.number("scale", scale),
            softcap=None if softcap is None else checks.number("softcap", softcap, positive=True),
            rng=None if rng is None else checks.seed(known.tab, rng), wrt=wrt, **known.defaults,
        )  # fmt: skip
        return prepare.given_back(known.tab, {"query": query, "key": key, "value": value}, wrt, gradients)
    tab = dispatch.choose(
        backend, query=query, key=key, value=value, grad_output=grad_output, grad_scores=grad_scores, mask=mask, bias=bias,
        valid_lens=valid_lens, query_offset=query_offset, segments=segments, positions=positions, sink=sink,
    )  # fmt: skip
    given = {"query": query, "key": key, "value": value, "bias": bias, "sink": sink, **getattr(score, "keywords", {})}
    taken = query, key, value, grad_output
    query, key, value, scores = prepare.inputs(tab, query, key, value, score)
    options = prepare.options(
        tab, query, scores, (query.shape[-1], key.shape[-1]), score, normalize, mask, bias, valid_lens, causal, query_offset,
        window, positions, scale, softcap, sink, dropout, rng, segments=segments,
    )  # fmt: skip
    grad_output = conversion.array(tab, "grad_output", grad_output, like=query)
    grad_output = conversion.floating("grad_output", grad_output, ("query", query), tab)
    checks.same_shape("grad_output", grad_output, (*checks.pairs(query, key)[:-1], tuple(value.shape)[-1]), "the output")
    checks.not_by_function(wrt, bias)
    if return_scores is not None or grad_scores is not None:
        options |= prepare.through_scores(tab, query, scores, options["positions"], return_scores, grad_scores)
    bindable = {"query", "key", "value"} | {name for name, x in (("bias", bias), ("sink", sink)) if x is not None}
    bindable |= {name for name, x in getattr(options["score"], "keywords", {}).items() if tab.is_array(x)}
    wrt = prepare.differentiable(wrt, bindable)
    try:
        gradients = registry.offered(tab, "attention_grad")(query, key, value, grad_output, wrt=wrt, **options)
    except Exception:
        checks.user_functions(tab, options, query, key)
        raise
    if plain and (known is None or known.tab is not tab):
        known = prepare.remember(tab, *taken[:3], scores)
    if plain and known is not None:
        checked = options["mask"], options["bias"], options["valid_lens"], grad_output
        known.remember((mask, bias, valid_lens, taken[3]), checked)
    return prepare.given_back(tab, given, wrt, gradients)


def explain(query: Array, key: Array, value: Array, *, backend: Any = None, **options: Any) -> Explanation:
    """Which kernel would serve `attention` of these arguments, and why. No attention is computed.

    Args:
        options: `attention`'s own, all of them.

    Returns:
        (backend, device, kernel, why), a named tuple of strings; ``str`` of it is a sentence. "the formula" holds all
        scores at one time. Inside a trace it describes what is traced. Raises what `attention` raises.

    >>> import numpy as np
    >>> x = np.zeros((1024, 64), "float32")
    >>> explain(x, x, x).kernel
    'tiles'
    >>> print(explain(x, x, x, normalize=sparsemax))
    numpy on cpu serves this call by the formula: the normaliser is no softmax
    """
    arrays = {name: options.get(name) for name in prepare.ARRAYS}
    tab = dispatch.choose(backend, query=query, key=key, value=value, **arrays)
    query, key, value, scores = prepare.inputs(tab, query, key, value, options.get("score"))
    back = prepare.returned(options)
    features = (query.shape[-1], key.shape[-1])
    options = prepare.options(tab, query, scores, features, return_lse=back["return_lse"], **options) | back
    kernel, why = "a kernel of its own", "the backend tells no more, since it has no function choose"
    if hasattr(tab, "choose"):
        kernel, why, *_ = tab.choose(query, key, value, Call.of(query, key, **options))
    return Explanation(registry.name_of(tab), conversion.device_name(query), kernel, why)


@overload
def merge_attention(outputs: Sequence[A], lses: Sequence[A], *, return_lse: No = False, backend: None = None) -> A: ...
@overload
def merge_attention(outputs: Sequence[A], lses: Sequence[A], *, return_lse: Yes, backend: None = None) -> tuple[A, A]: ...
@overload
def merge_attention(outputs: Sequence[Array], lses: Sequence[Array], *, return_lse: bool = ..., backend: Any = None) -> Any: ...
def merge_attention(outputs: Sequence[Array], lses: Sequence[Array], *, return_lse: bool = False, backend: Any = None) -> Any:
    """Attention over a set of keys from (output, lse) pairs over disjoint parts of it, exactly.

    Args:
        outputs: a sequence of (..., n, v), each from ``attention(..., return_lse=True)`` on one part of the keys.
        lses: a sequence of as many (..., n). One of inf, as beside a sink of inf, makes NaN of its row.
        return_lse: also return the whole's lse, so that merges nest.

    Raises ValueError for sequences that are empty, of different lengths or of shapes that do not fit.

    >>> q, k, v = [[1.0]], [[1.0], [2.0]], [[3.0], [4.0]]
    >>> parts = [attention(q, k[:1], v[:1], return_lse=True), attention(q, k[1:], v[1:], return_lse=True)]
    >>> bool((merge_attention(*zip(*parts)) == attention(q, k, v)).all())
    True

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".
    """
    if len(outputs) != len(lses) or not len(outputs):
        raise ValueError(f"merge_attention needs as many outputs as lses, at least one; got {len(outputs)} and {len(lses)}")
    named = {f"outputs[{i}]": x for i, x in enumerate(outputs)}
    lse_named = {f"lses[{i}]": x for i, x in enumerate(lses)}
    tab = dispatch.choose(backend, **named, **lse_named)
    arrays, lse_arrays = prepare.arrays(tab, **named), prepare.arrays(tab, **lse_named)
    for (name, x), (lse_name, lse) in zip(
        zip(named, arrays, strict=True), zip(lse_named, lse_arrays, strict=True), strict=True
    ):
        checks.same_shape(name, x, tuple(arrays[0].shape), "outputs[0]")
        checks.same_shape(lse_name, lse, tuple(x.shape)[:-1], f"{name} without its last axis")
    return registry.offered(tab, "merge_attention")(arrays, lse_arrays, return_lse=checks.flag("return_lse", return_lse))


@overload
def nadaraya_watson(x_train: A, y_train: A, x: A, kernel: Score | None = None, *, backend: None = None) -> tuple[A, A]: ...
@overload
def nadaraya_watson(
    x_train: Array, y_train: Array, x: Array, kernel: Score | None = None, *, backend: Any = None
) -> tuple[Array, Array]: ...
def nadaraya_watson(
    x_train: Array, y_train: Array, x: Array, kernel: Score | None = None, *, backend: Any = None
) -> tuple[Array, Array]:
    """Nadaraya-Watson regression: the average of y_train, weighted by how near x_train lies to x.

    Args:
        x_train: (m,) or (m, d). y_train: (m,) or (m, v). x: (n,) or (n, d).
        kernel: a similarity, for example ``partial(gaussian_kernel, width=0.5)``; default `gaussian_kernel`. Or, as in d2l, a
            function of one argument, the differences of numbers x_train - x.

    Returns:
        The estimates, (n,) or (n, v), and the attention weights (n, m); given a kernel of one argument (m, n), as in d2l. Where
        no training point is near, 0.

    >>> nadaraya_watson([1.0, 2.0, 3.0], [1.0, 4.0, 9.0], [2.0], boxcar_kernel)[0]
    array([4.])
    >>> nadaraya_watson([1.0, 2.0, 3.0], [1.0, 4.0, 9.0], [2.0], lambda u: abs(u) < 0.5)[1].shape
    (3, 1)

    Source: Nadaraya 1964; Watson 1964.
    """
    tab = dispatch.choose(backend, x_train=x_train, y_train=y_train, x=x)
    x_train, y_train, x = prepare.arrays(tab, x_train=x_train, y_train=y_train, x=x)
    column = len(y_train.shape) == 1
    query, key = (a[:, None] if len(a.shape) == 1 else a for a in (x, x_train))
    differs = kernel is not None and prepare.takes_one(kernel)
    if differs:
        kernel = prepare.of_differences(tab, kernel, query, key)
    y, weights = attention(
        query, key, y_train[:, None] if column else y_train, score=kernel or gaussian_kernel, normalize=proportional,
        return_weights=True, backend=tab,
    )  # fmt: skip
    if differs:
        weights = prepare.transposed(tab, weights)
    return (y[:, 0] if column else y), weights


# ---- positions


@overload
def rotary(
    x: A, positions: Any = None, *, base: float = ..., interleaved: bool = ..., rotary_dim: int | None = None,
    scaling: Mapping[str, Any] | None = None, backend: None = None,
) -> A: ...  # fmt: skip
@overload
def rotary(
    x: Array, positions: Any = None, *, base: float = ..., interleaved: bool = ..., rotary_dim: int | None = None,
    scaling: Mapping[str, Any] | None = None, backend: Any = None,
) -> Array: ...  # fmt: skip
def rotary(
    x: Array,
    positions: Any = None,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    scaling: Mapping[str, Any] | None = None,
    backend: Any = None,
) -> Array:
    """Rotary position embedding: each pair of features is a point of the plane, turned by its row's position.

    Queries and keys that are turned so have dot products that depend on how far apart they stand, not on where.

    Args:
        x: (..., n, d), queries or keys.
        positions: where the rows stand: integers that int32 holds, broadcastable to (..., n), or the position of the first
            row, an int or an array without axes; by default 0. Positions (batch, n) of x (batch, heads, n, d) are given as
            ``positions[:, None]``.
        base: pair i turns by position * base^(-2 i / d).
        interleaved: pair i is made of features 2 i and 2 i + 1, as in RoFormer and GPT-J; by default of i and i + d / 2, as
            in GPT-NeoX and Llama.
        rotary_dim: turn this many features, the first ones, and leave the others as they are; it stands for d above.
        scaling: how a model stretches this to longer texts, as Hugging Face's ``rope_scaling`` has it: a dict with a
            "rope_type", one of "default", "linear", "ntk", "dynamic", "yarn", "llama3" and "longrope", and what this one needs:
            "factor", "original_max_position_embeddings", "low_freq_factor", "beta_fast", "short_factor" (a list), ... With
            "rope_theta" and "partial_rotary_factor" in it, a model's ``rope_parameters``, it sets base and rotary_dim too.

    Returns:
        An array of x's shape and dtype. Angles are worked out in float64, so that a position of 1e6 costs float32 no precision;
        half precision is turned in float32. The gradient by x turns back: ``rotary(grad, -positions)`` where positions are
        given, and the scaling is not "dynamic" or "longrope", which go by the largest.

    Raises:
        ValueError: an odd number of features, a rotary_dim that is odd or larger than d, positions that do not broadcast, an
            unknown rope_type, keys of the scaling that are missing or unknown; "dynamic" and "longrope" where the largest
            position is not known, as in a trace or on a GPU; positions that no int32 holds.
        TypeError: x of integers, positions that are no integers.

    >>> rotary([[1.0, 0.0], [1.0, 0.0]]).round(2)
    array([[1.  , 0.  ],
           [0.54, 0.84]])

    Source: Su et al. 2021, "RoFormer", section 3.2.2; each scaling's is in kvattn/rotation.py.
    """
    tab, x, positions, frequencies, how = prepare.rotary(backend, x, positions, base, interleaved, rotary_dim, scaling)
    return registry.offered(tab, "rotary")(x, positions, frequencies, **how)


def alibi_slopes(num_heads: int, *, dtype: str = "float32", backend: Any = None) -> Array:
    """The slope (num_heads,) by which ALiBi lowers a head's scores for each position between query and key.

    As a bias it is ``lambda query, key: -slopes[:, None, None] * abs(query - key)``, a function of positions, for which no
    array (num_heads, n, m) is built; MXNet and TensorFlow need ``asarray(abs(query - key), dtype="float32")`` there.

    Raises TypeError unless num_heads is an int and dtype the name of a floating-point one, ValueError unless num_heads is
    above 0.

    >>> alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625], dtype=float32)

    Source: Press et al. 2021, "Train short, test long", section 3; heads that are no power of two: its code.
    """
    slopes = distances.slopes(checks.count("num_heads", num_heads))
    return dispatch.choose(backend).asarray(slopes, dtype=checks.float_name("dtype", dtype))


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128, backend: Any = None
) -> Array:
    """T5's bucket of each relative position, key's minus query's: where its learned bias stands in the table of a head.

    Args:
        relative_position: integers of any shape, whose values can be read: ``numpy.arange(m) - numpy.arange(n)[:, None]``.
        bidirectional: as in an encoder, with half of the buckets for keys after the query; a decoder has none for them, and
            puts them in the first.
        num_buckets, max_distance: the model's relative_attention_num_buckets and relative_attention_max_distance.

    Returns:
        Integers below num_buckets, of the same shape.

    Raises TypeError for what holds no integers, or none that can be read now, as in a trace; ValueError for too few buckets,
    a max_distance that is not beyond the buckets of one distance each, or distances that no int32 holds.

    >>> relative_position_bucket([[0, 1, 2, -1, 9, 90, 900]])
    array([[ 0, 17, 18,  1, 24, 30, 31]], dtype=int32)

    Source: Raffel et al. 2019, section 2.1; its code. The edges of buckets are exact, the same in every framework.
    """
    tab = dispatch.choose(backend, relative_position=relative_position)
    x, known = checks.known_integers(tab, "relative_position", relative_position)
    bidirectional = checks.flag("bidirectional", bidirectional)
    side = checks.buckets(num_buckets, max_distance, bidirectional)
    return tab.asarray(distances.bucketed(known, side, max_distance, bidirectional), dtype="int32", like=x)


def segments_from_cu_seqlens(cu_seqlens: Array, length: int | None = None, *, backend: Any = None) -> Array:
    """The ``segments`` of sequences that lie one after another, of where they begin, as FlashAttention is told of them.

    Args:
        cu_seqlens: integers (sequences + 1,) whose values can be read: 0, where the second sequence begins, ..., where all end.
        length: of the row; what is beyond the last sequence, padding, is a segment of its own. By default there is nothing.

    Returns:
        An id for each place, int32 (length,): for one row of a batch ``segments[None]``.

    Raises ValueError unless cu_seqlens begin with 0, never decrease and end within the length, TypeError for no integers.

    >>> segments_from_cu_seqlens([0, 2, 5], length=6)
    array([0, 0, 1, 1, 1, 2], dtype=int32)

    Source: Dao et al. 2022, "FlashAttention": its code's variable-length calls.
    """
    tab = dispatch.choose(backend, cu_seqlens=cu_seqlens)
    x, known = checks.known_integers(tab, "cu_seqlens", cu_seqlens)
    length = checks.ends(known, length)
    return tab.asarray(distances.segments(known, length), dtype="int32", like=x)


# ---- multi-head attention


@overload
def multi_head_attention(
    query: A, key: A, value: A, params: Mapping[str, Array], *, num_heads: int, num_kv_heads: int | None = None,
    cache: None = None, return_weights: No = False, return_lse: No = False, backend: None = None, **options: Unpack[Options],
) -> A: ...  # fmt: skip
@overload
def multi_head_attention(
    query: A, key: A, value: A, params: Mapping[str, Array], *, num_heads: int, num_kv_heads: int | None = None,
    cache: None = None, return_weights: Yes, return_lse: No = False, backend: None = None, **options: Unpack[Options],
) -> tuple[A, A]: ...  # fmt: skip
@overload
def multi_head_attention(
    query: A, key: A, value: A, params: Mapping[str, Array], *, num_heads: int, num_kv_heads: int | None = None,
    cache: None = None, return_weights: No = False, return_lse: Yes, backend: None = None, **options: Unpack[Options],
) -> tuple[A, A]: ...  # fmt: skip
@overload
def multi_head_attention(
    query: A, key: A, value: A, params: Mapping[str, Array], *, num_heads: int, num_kv_heads: int | None = None,
    cache: None = None, return_weights: Yes, return_lse: Yes, backend: None = None, **options: Unpack[Options],
) -> tuple[A, A, A]: ...  # fmt: skip
@overload
def multi_head_attention(
    query: A, key: A, value: A, params: Mapping[str, Array], *, num_heads: int, num_kv_heads: int | None = None, cache: KVCache,
    return_weights: No = False, return_lse: No = False, backend: None = None, **options: Unpack[Options],
) -> tuple[A, KVCache]: ...  # fmt: skip
@overload
def multi_head_attention(
    query: Array, key: Array, value: Array, params: Mapping[str, Array], *, num_heads: int, num_kv_heads: int | None = None,
    cache: KVCache | None = None, return_weights: bool = ..., return_lse: bool = ..., return_scores: str | None = None,
    backend: Any = None, **options: Unpack[Options],
) -> Any: ...  # fmt: skip
def multi_head_attention(
    query: Array,
    key: Array,
    value: Array,
    params: Mapping[str, Array],
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    cache: KVCache | None = None,
    backend: Any = None,
    **options: Any,
) -> Any:
    """Attention in several learned projections at once: each head attends by itself, the results are joined and projected.

    Args:
        query: (..., n, d_q), key: (..., m, d_k), value: (..., m, d_v); the leading axes, if any, are batch: without them
            valid_lens is () or (n,), for every head.
        params: the projections by name, as layers export them: W_q (d_q, num_heads * d), W_k (d_k, num_kv_heads * d),
            W_v (d_v, num_kv_heads * v), W_o (num_heads * v, o), and biases b_q, b_k, b_v, b_o, each of its matrix's last
            size. All but W_q, W_k and W_v may be absent; without W_o the joined heads (..., n, num_heads * v) are the output.
        num_heads: head i of the query is the i-th slice of q W_q + b_q.
        num_kv_heads: fewer key and value heads, shared by groups of query heads; it divides num_heads.
        cache: the keys and values of earlier steps (`KVCache`; ``KVCache()`` at first): the new ones are added, and each
            query stands where its own key does. Decoding step by step with ``causal=True`` equals the whole pass.
        options: `attention`'s own: score, mask, bias, valid_lens, causal, ..., return_weights, return_lse. The scores are
            (..., num_heads, n, m).

    Returns:
        The output (..., n, o) in the query's dtype; weights (..., num_heads, n, m), lse (..., num_heads, n), scores
        (..., num_heads, n, m) and the cache follow it, each on request, in this order. Half precision is float32 between the
        input and the output; but in JAX on a CUDA device bfloat16 without a cache is rounded after each projection, which is
        what cuDNN takes.

    Raises what `attention` raises, and ValueError for params that are missing, unknown or do not fit.

    >>> eye = [[1.0, 0.0], [0.0, 1.0]]
    >>> x = asarray([[1.0, 2.0], [1.0, 4.0]])
    >>> multi_head_attention(x, x, x, {"W_q": eye, "W_k": eye, "W_v": eye, "W_o": eye}, num_heads=2, normalize=average)
    array([[1., 3.],
           [1., 3.]])

    Source: Vaswani et al. 2017, section 3.2.2; grouped heads: Ainslie et al. 2023.
    """
    tab, query, key, value, params, heads, options = prepare.multi_head(
        backend, (query, key, value), params, (num_heads, num_kv_heads), cache, options
    )
    if cache is None:
        return registry.offered(tab, "multi_head_attention")(query, key, value, params, **heads, **options)
    return registry.offered(tab, "multi_head_attention")(query, key, value, params, **heads, cache=cache, **options)


@overload
def multi_head_attention_grad(
    query: A, key: A, value: A, params: Mapping[str, Array], grad_output: A, *, num_heads: int,
    num_kv_heads: int | None = None, wrt: Sequence[str] = ..., backend: None = None, **options: Unpack[Options],
) -> tuple[A, ...]: ...  # fmt: skip
@overload
def multi_head_attention_grad(
    query: Array, key: Array, value: Array, params: Mapping[str, Array], grad_output: Array, *, num_heads: int,
    num_kv_heads: int | None = None, wrt: Sequence[str] = ..., backend: Any = None, **options: Unpack[Options],
) -> tuple[Array, ...]: ...  # fmt: skip
def multi_head_attention_grad(
    query: Array,
    key: Array,
    value: Array,
    params: Mapping[str, Array],
    grad_output: Array,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    wrt: Sequence[str] = ("query", "key", "value"),
    backend: Any = None,
    **options: Any,
) -> tuple[Array, ...]:
    """The gradients of sum(grad_output * multi_head_attention(query, key, value, params, ...)).

    ``wrt`` names any of "query", "key", "value" and the params. Gradients come in their order, each in its argument's shape
    and dtype. The other arguments are `multi_head_attention`'s, without a cache.

    >>> one = {"W_q": [[1.0]], "W_k": [[1.0]], "W_v": [[1.0]]}
    >>> multi_head_attention_grad([[2.0]], [[3.0]], [[5.0]], one, [[1.0]], num_heads=1, wrt=["W_v"])
    (array([[5.]]),)
    """
    given, named = {"query": query, "key": key, "value": value}, params
    tab, query, key, value, params, heads, options = prepare.multi_head(
        backend, (query, key, value), params, (num_heads, num_kv_heads), None, options, grad_output
    )
    if any([options.pop("return_weights"), options.pop("return_lse"), options.pop("return_scores", None)]):
        raise ValueError("a gradient returns neither weights nor lse nor scores")
    grad_output = conversion.array(tab, "grad_output", grad_output, like=query)
    grad_output = conversion.floating("grad_output", grad_output, ("query", query), tab)
    width = params["W_o"].shape[-1] if "W_o" in params else params["W_v"].shape[-1] * num_heads // (num_kv_heads or num_heads)
    checks.same_shape("grad_output", grad_output, (*checks.scores_shape(query, key, value)[:-1], width), "the output")
    bindable = {"query", "key", "value", *params}
    wrt = prepare.differentiable(wrt, bindable)
    gradients = registry.offered(tab, "multi_head_attention_grad")(
        query, key, value, params, grad_output, wrt=wrt, **heads, **options
    )
    return prepare.given_back(tab, given | dict(named), wrt, gradients)


@overload
def self_attention(
    x: A, W_q: A, W_k: A, W_v: A, *, return_weights: No = False, return_lse: No = False, backend: None = None,
    **options: Unpack[Options],
) -> A: ...  # fmt: skip
@overload
def self_attention(
    x: A, W_q: A, W_k: A, W_v: A, *, return_weights: Yes, return_lse: No = False, backend: None = None,
    **options: Unpack[Options],
) -> tuple[A, A]: ...  # fmt: skip
@overload
def self_attention(
    x: A, W_q: A, W_k: A, W_v: A, *, return_weights: No = False, return_lse: Yes, backend: None = None,
    **options: Unpack[Options],
) -> tuple[A, A]: ...  # fmt: skip
@overload
def self_attention(
    x: A, W_q: A, W_k: A, W_v: A, *, return_weights: Yes, return_lse: Yes, backend: None = None, **options: Unpack[Options]
) -> tuple[A, A, A]: ...
@overload
def self_attention(
    x: Array, W_q: Array, W_k: Array, W_v: Array, *, return_weights: bool = ..., return_lse: bool = ...,
    return_scores: str | None = None, backend: Any = None, **options: Unpack[Options],
) -> Any: ...  # fmt: skip
def self_attention(x: Array, W_q: Array, W_k: Array, W_v: Array, *, backend: Any = None, **options: Any) -> Any:
    """softmax((x W_q) (x W_k)^T / sqrt(d)) x W_v: every row of x is the query once, and a key and value of all.

    Args:
        x: (..., n, d_x). W_q (d_x, d), W_k (d_x, d), W_v (d_x, v).
        options: `attention`'s own. The scores are (..., n, n).

    Returns:
        (..., n, v), with the weights (..., n, n), lse (..., n) and scores (..., n, n) on request.

    >>> self_attention([[1.0], [3.0]], [[0.0]], [[1.0]], [[1.0]])
    array([[2.],
           [2.]])

    Source: Vaswani et al. 2017, section 3.2.3.
    """
    named = {"W_q": W_q, "W_k": W_k, "W_v": W_v}
    tab = dispatch.choose(backend, x=x, **named, **{name: options.get(name) for name in prepare.ARRAYS})
    (x,) = prepare.arrays(tab, x=x)
    params = prepare.projections(tab, x, x, x, named, 1, 1)
    back = prepare.returned(options)
    features = (params["W_q"].shape[-1], params["W_k"].shape[-1])
    checks.same_projected_features(features, prepare.is_dot_product(options.get("score")))
    options = prepare.options(tab, x, checks.scores_shape(x, x, x), features, return_lse=back["return_lse"], **options)
    return registry.offered(tab, "self_attention")(x, *params.values(), **options, **back)


prepare.public |= {name: globals()[name] for name in __all__}

for _name in __all__:  # TensorFlow's AutoGraph leaves what bears this mark alone: it need not rewrite the frontend
    if _name != "KVCache":
        prepare.public[_name].autograph_info__ = {}
