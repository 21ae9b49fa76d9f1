"""The specification's scores, kernels and normalisers, which each tab has of its own: parts of kvattn/api.py.

weights = normalize(score(query, key))
"""

from __future__ import annotations

from typing import Any, overload

from kvattn import checks, prepare
from kvattn.signatures import A, Array

# ---- scores: (query (..., n, d), key (..., m, d)) -> (..., n, m); parameters multiply from the right


@overload
def dot_score(query: A, key: A, *, backend: None = None) -> A: ...
@overload
def dot_score(query: Array, key: Array, *, backend: Any = None) -> Array: ...
def dot_score(query: Array, key: Array, *, backend: Any = None) -> Array:
    """q . k

    >>> dot_score([[1.0, 2.0]], [[3.0, 4.0]])
    array([[11.]])

    Source: Luong et al. 2015, equation 8.
    """
    return prepare.score("dot_score", query, key, backend)


@overload
def scaled_dot_score(query: A, key: A, *, backend: None = None) -> A: ...
@overload
def scaled_dot_score(query: Array, key: Array, *, backend: Any = None) -> Array: ...
def scaled_dot_score(query: Array, key: Array, *, backend: Any = None) -> Array:
    """q . k / sqrt(d)

    >>> scaled_dot_score([[1.0, 1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]])
    array([[2.]])

    Source: Vaswani et al. 2017, equation 1.
    """
    return prepare.score("scaled_dot_score", query, key, backend)


@overload
def additive_score(
    query: A, key: A, W_q: Array, W_k: Array, w_v: Array, b: Array | None = None, *, backend: None = None
) -> A: ...
@overload
def additive_score(
    query: Array, key: Array, W_q: Array, W_k: Array, w_v: Array, b: Array | None = None, *, backend: Any = None
) -> Array: ...
def additive_score(
    query: Array, key: Array, W_q: Array, W_k: Array, w_v: Array, b: Array | None = None, *, backend: Any = None
) -> Array:
    """w_v . tanh(q W_q + k W_k + b)

    query (..., n, d_q), key (..., m, d_k), W_q (d_q, h), W_k (d_k, h), w_v (h,), b (h,).

    >>> additive_score([[0.5]], [[-0.5]], [[1.0]], [[1.0]], [1.0])
    array([[0.]])

    Source: Bahdanau et al. 2014, appendix A.1.2.
    """
    return prepare.score("additive_score", query, key, backend, same=False, W_q=W_q, W_k=W_k, w_v=w_v, b=b)


@overload
def multiplicative_score(query: A, key: A, W: Array, *, backend: None = None) -> A: ...
@overload
def multiplicative_score(query: Array, key: Array, W: Array, *, backend: Any = None) -> Array: ...
def multiplicative_score(query: Array, key: Array, W: Array, *, backend: Any = None) -> Array:
    """q W k

    query (..., n, d_q), key (..., m, d_k), W (d_q, d_k).

    >>> multiplicative_score([[1.0, 2.0]], [[3.0]], [[1.0], [1.0]])
    array([[9.]])

    Source: Luong et al. 2015, equation 8 ("general").
    """
    return prepare.score("multiplicative_score", query, key, backend, same=False, W=W)


@overload
def gated_score(query: A, key: A, w_g: Array, *, backend: None = None) -> A: ...
@overload
def gated_score(query: Array, key: Array, w_g: Array, *, backend: Any = None) -> Array: ...
def gated_score(query: Array, key: Array, w_g: Array, *, backend: Any = None) -> Array:
    """sigmoid(w_g . [q; k]) (q . k)

    w_g (2 d,): its first half multiplies the query, its second the key; the pairs are never concatenated.

    >>> gated_score([[1.0, 2.0]], [[3.0, 4.0]], [0.0, 0.0, 0.0, 0.0])
    array([[5.5]])

    Source: the gate of Hochreiter and Schmidhuber 1997, applied to a dot product.
    """
    return prepare.score("gated_score", query, key, backend, w_g=w_g)


@overload
def cosine_score(query: A, key: A, *, backend: None = None) -> A: ...
@overload
def cosine_score(query: Array, key: Array, *, backend: Any = None) -> Array: ...
def cosine_score(query: Array, key: Array, *, backend: Any = None) -> Array:
    """q . k / (|q| |k|); a zero vector scores 0, with zero gradient.

    >>> cosine_score([[2.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]])
    array([[1., 0.]])

    Source: Graves et al. 2014, "Neural Turing machines", equation 6.
    """
    return prepare.score("cosine_score", query, key, backend)


@overload
def distance_score(query: A, key: A, *, backend: None = None) -> A: ...
@overload
def distance_score(query: Array, key: Array, *, backend: Any = None) -> Array: ...
def distance_score(query: Array, key: Array, *, backend: Any = None) -> Array:
    """-|q - k|^2 / 2, from the differences: near vectors of large norm do not cancel.

    >>> distance_score([[1.0, 2.0]], [[1.0, 4.0]])
    array([[-2.]])

    Source: the exponent of Nadaraya and Watson's Gaussian kernel, 1964.
    """
    return prepare.score("distance_score", query, key, backend)


# ---- kernels: similarities >= 0 of u = |q - k| / width, for Nadaraya-Watson


@overload
def gaussian_kernel(query: A, key: A, width: float = ..., *, backend: None = None) -> A: ...
@overload
def gaussian_kernel(query: Array, key: Array, width: float = ..., *, backend: Any = None) -> Array: ...
def gaussian_kernel(query: Array, key: Array, width: float = 1.0, *, backend: Any = None) -> Array:
    """exp(-u^2 / 2), u = |q - k| / width

    >>> gaussian_kernel([[1.0]], [[1.0]])
    array([[1.]])
    """
    return prepare.score("gaussian_kernel", query, key, backend, width=checks.number("width", width, positive=True))


@overload
def boxcar_kernel(query: A, key: A, width: float = ..., *, backend: None = None) -> A: ...
@overload
def boxcar_kernel(query: Array, key: Array, width: float = ..., *, backend: Any = None) -> Array: ...
def boxcar_kernel(query: Array, key: Array, width: float = 1.0, *, backend: Any = None) -> Array:
    """1 if u < 1 else 0, u = |q - k| / width

    >>> boxcar_kernel([[1.0]], [[1.5], [2.0]])
    array([[1., 0.]])
    """
    return prepare.score("boxcar_kernel", query, key, backend, width=checks.number("width", width, positive=True))


@overload
def triangular_kernel(query: A, key: A, width: float = ..., *, backend: None = None) -> A: ...
@overload
def triangular_kernel(query: Array, key: Array, width: float = ..., *, backend: Any = None) -> Array: ...
def triangular_kernel(query: Array, key: Array, width: float = 1.0, *, backend: Any = None) -> Array:
    """max(1 - u, 0), u = |q - k| / width; d2l calls it "Epanechikov".

    >>> triangular_kernel([[1.0]], [[1.25], [3.0]])
    array([[0.75, 0.  ]])
    """
    return prepare.score("triangular_kernel", query, key, backend, width=checks.number("width", width, positive=True))


@overload
def epanechnikov_kernel(query: A, key: A, width: float = ..., *, backend: None = None) -> A: ...
@overload
def epanechnikov_kernel(query: Array, key: Array, width: float = ..., *, backend: Any = None) -> Array: ...
def epanechnikov_kernel(query: Array, key: Array, width: float = 1.0, *, backend: Any = None) -> Array:
    """max(1 - u^2, 0), u = |q - k| / width

    >>> epanechnikov_kernel([[1.0]], [[1.5]])
    array([[0.75]])

    Source: Epanechnikov 1969.
    """
    return prepare.score("epanechnikov_kernel", query, key, backend, width=checks.number("width", width, positive=True))


@overload
def constant_kernel(query: A, key: A, width: float = ..., *, backend: None = None) -> A: ...
@overload
def constant_kernel(query: Array, key: Array, width: float = ..., *, backend: Any = None) -> Array: ...
def constant_kernel(query: Array, key: Array, width: float = 1.0, *, backend: Any = None) -> Array:
    """1: every key counts the same; the width is ignored.

    >>> constant_kernel([[1.0]], [[9.0]])
    array([[1.]])
    """
    return prepare.score("constant_kernel", query, key, backend, width=checks.number("width", width, positive=True))


# ---- normalisers: (scores (..., n, m), where=None) -> weights (..., n, m) in the scores' dtype; a row with nothing gets zeros


@overload
def softmax(scores: A, where: Array | None = None, *, backend: None = None) -> A: ...
@overload
def softmax(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array: ...
def softmax(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array:
    """exp(s_i) / sum_j exp(s_j) over the last axis, over the keys where ``where`` is True.

    >>> softmax([[0.0, 0.0, 5.0]], where=[[True, True, False]])
    array([[0.5, 0.5, 0. ]])
    """
    return prepare.weights("softmax", scores, where, backend)


@overload
def masked_softmax(scores: A, valid_lens: Array | None = None, where: Array | None = None, *, backend: None = None) -> A: ...
@overload
def masked_softmax(
    scores: Array, valid_lens: Array | None = None, where: Array | None = None, *, backend: Any = None
) -> Array: ...
def masked_softmax(scores: Array, valid_lens: Array | None = None, where: Array | None = None, *, backend: Any = None) -> Array:
    """Softmax over the first ``valid_lens`` keys: (batch,), or (batch, n); length 0 gives zeros.

    >>> masked_softmax([[[0.0, 0.0, 5.0]]], [2])
    array([[[0.5, 0.5, 0. ]]])

    Source: d2l's function of this name, with other answers at length 0 and for scores below -1e6.
    """
    return prepare.weights("masked_softmax", scores, where, backend, valid_lens=valid_lens)


@overload
def sparsemax(scores: A, where: Array | None = None, *, backend: None = None) -> A: ...
@overload
def sparsemax(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array: ...
def sparsemax(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array:
    """The point of the simplex nearest to the scores: convex weights, many of them exactly 0.

    >>> sparsemax([[1.0, 0.5, -3.0]])
    array([[0.75, 0.25, 0.  ]])

    Source: Martins and Astudillo 2016, algorithm 1.
    """
    return prepare.weights("sparsemax", scores, where, backend)


@overload
def hardmax(scores: A, where: Array | None = None, *, backend: None = None) -> A: ...
@overload
def hardmax(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array: ...
def hardmax(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array:
    """1 for the best key, the first of equals, and 0 for the rest: a look-up in a database. Its gradient is 0.

    >>> hardmax([[1.0, 3.0, 3.0]])
    array([[0., 1., 0.]])
    """
    return prepare.weights("hardmax", scores, where, backend)


@overload
def proportional(scores: A, where: Array | None = None, *, backend: None = None) -> A: ...
@overload
def proportional(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array: ...
def proportional(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array:
    """s_i / sum_j s_j; a row that sums to 0 gets zeros.

    >>> proportional([[1.0, 3.0], [0.0, 0.0]])
    array([[0.25, 0.75],
           [0.  , 0.  ]])

    Source: Nadaraya 1964; Watson 1964.
    """
    return prepare.weights("proportional", scores, where, backend)


@overload
def average(scores: A, where: Array | None = None, *, backend: None = None) -> A: ...
@overload
def average(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array: ...
def average(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array:
    """1 / m whatever the scores: average pooling.

    >>> average([[7.0, 8.0, 9.0]], where=[[True, False, True]])
    array([[0.5, 0. , 0.5]])
    """
    return prepare.weights("average", scores, where, backend)


@overload
def identity(scores: A, where: Array | None = None, *, backend: None = None) -> A: ...
@overload
def identity(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array: ...
def identity(scores: Array, where: Array | None = None, *, backend: Any = None) -> Array:
    """The scores themselves: a general linear combination; with scores >= 0, a convex cone.

    >>> identity([[2.0, -1.0]], where=[[True, False]])
    array([[2., 0.]])
    """
    return prepare.weights("identity", scores, where, backend)


prepare.tabbed |= {
    dot_score, scaled_dot_score, additive_score, multiplicative_score, gated_score, cosine_score, distance_score,
    gaussian_kernel, boxcar_kernel, triangular_kernel, epanechnikov_kernel, constant_kernel,
    softmax, masked_softmax, sparsemax, hardmax, proportional, average, identity,
}  # fmt: skip
