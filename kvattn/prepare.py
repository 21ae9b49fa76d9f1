"""A call's arguments as the tab that serves it takes them: chosen for, converted and checked, in this order.

Every function of api.py goes down from here: `dispatch` chooses the tab, `checks` says no, the tab computes. Arguments whose
classes, shapes and dtypes have passed all the checks before are not checked again.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from kvattn import checks, conversion, dispatch, pairs, registry, rotation

if TYPE_CHECKING:
    from kvattn.backends import Backend

ARRAYS = ("mask", "bias", "valid_lens", "query_offset", "segments", "positions", "sink")  # the options that are arrays
OPTIONS = ("score", "normalize", "mask", "bias", "valid_lens", "causal", "query_offset", "window", "segments",
           "positions", "scale", "softcap", "sink", "dropout", "rng", "return_weights", "return_lse",
           "return_scores")  # fmt: skip
DOT_PRODUCTS = ("dot_score", "scaled_dot_score", "cosine_score")  # for which query and key need as many features
REMEMBERED = 4096  # calls: then it starts anew, since lengths that grow step by step would fill the memory
REMEMBERED_OPTIONS = 64  # sets of options beside each of these

public: dict[str, Any] = {}  # the functions of api.py by name
tabbed: set[Any] = set()  # its scores and normalisers, which each tab has of its own


# ---- attention


def inputs(tab: Any, query: Any, key: Any, value: Any, score: Any) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """query, key and value as arrays of ``tab`` that fit each other, and the shape of their scores."""
    query, key, value = arrays(tab, query=query, key=key, value=value)
    scores = checks.pairs(query, key, value)
    if is_dot_product(score):
        checks.same_features(query, key)
    return query, key, value, scores


def options(tab: Any, query: Any, scores: tuple[Any, ...], features: tuple[Any, Any], score: Any = None, normalize: Any = None,
            mask: Any = None, bias: Any = None, valid_lens: Any = None, causal: Any = False, query_offset: Any = 0,
            window: Any = None, positions: Any = None, scale: Any = None, softcap: Any = None, sink: Any = None,
            dropout: Any = 0.0, rng: Any = None, return_lse: bool = False, batch: tuple[Any, ...] | None = None,
            segments: Any = None, **unknown: Any) -> dict[str, Any]:  # fmt: skip
    """The checked keywords of attention, for scores of this shape between queries and keys of these features.

    ``batch``: the batch axis, (size,), or () where there is none; by default the first of the leading axes.
    """
    if unknown:
        raise checks.unknown(unknown, OPTIONS)
    batch = scores[:-2][:1] if batch is None else batch
    normalize, score = unwrapped(normalize), unwrapped(score)
    softmax = public["softmax"], getattr(tab, "softmax", None)
    if (return_lse or sink is not None) and normalize is not None and getattr(normalize, "func", normalize) not in softmax:
        name = "return_lse" if return_lse else "sink"
        raise ValueError(f"{name} needs normalize=softmax: other normalisers have no log-sum-exp")
    query_offset = checks.offset(tab, query_offset, batch, query)
    if segments is None and not callable(mask) and not callable(bias):
        mask, bias = checks.masks(tab, query, scores, mask, bias)
    else:
        mask, bias = _said_of_pairs(tab, query, scores, mask, bias, segments, batch, query_offset)
    given = {} if sink is None else {"sink": checks.sink(tab, sink, scores, query)}  # other backends may not know it
    return given | {
        "score": getattr(tab, "scaled_dot_score", None) if score is None else _own(tab, "score", score, query, features),
        "normalize": getattr(tab, "softmax", None) if normalize is None else _own(tab, "normalize", normalize, query, features),
        "mask": mask,
        "bias": bias,
        "valid_lens": None if valid_lens is None else checks.lengths(tab, valid_lens, batch, scores[-2], query),
        "causal": checks.flag("causal", causal),
        "query_offset": query_offset,
        "window": None if window is None else checks.window(window),
        "positions": None if positions is None else checks.positions(tab, positions, scores, query),
        "scale": None if scale is None else checks.number("scale", scale),
        "softcap": None if softcap is None else checks.number("softcap", softcap, positive=True),
        "dropout": checks.probability("dropout", dropout) if dropout else 0.0,
        "rng": None if rng is None else checks.seed(tab, rng),
    }


def _said_of_pairs(tab: Any, query: Any, scores: tuple[Any, ...], mask: Any, bias: Any, segments: Any, batch: tuple[Any, ...],
                   query_offset: Any) -> tuple[Any, Any]:  # fmt: skip
    """The mask and the bias where functions or segments are given: a tab's mask holds them, another backend is given arrays."""
    functions = [x if callable(x) else None for x in (mask, bias)]
    mask, bias = checks.masks(tab, query, scores, *(None if callable(x) else x for x in (mask, bias)))
    if segments is not None:
        segments = checks.segments(tab, segments, batch, scores[-2], scores[-1], query)
    said = pairs.Pairs(tab, mask, functions[0], functions[1], segments)
    if hasattr(tab, "places"):
        return said, bias
    mask, made = said.arrays(query, query, scores, query_offset, (0, scores[-2]), [(0, scores[-1])])
    return mask, bias if made is None else made


def defaults(tab: Any) -> dict[str, Any]:
    """What `options` makes of those that are not given, where such a call is remembered."""
    own = {"score": getattr(tab, "scaled_dot_score", None), "normalize": getattr(tab, "softmax", None)}
    return own | {"positions": None, "dropout": 0.0}


def returned(options: dict[str, Any]) -> dict[str, Any]:
    """return_weights, return_lse and, where it is given, return_scores: checked and taken out of the options."""
    found: dict[str, Any] = {name: checks.flag(name, options.pop(name, False)) for name in ("return_weights", "return_lse")}
    stage = options.pop("return_scores", None)  # other backends may not know it
    return found if stage is None else found | {"return_scores": checks.stage("return_scores", stage)}


def through_scores(tab: Any, query: Any, scores: tuple[Any, ...], positions: Any, stage: Any, grad: Any) -> dict[str, Any]:
    """return_scores and grad_scores, the gradient by scores of that stage and shape, for a loss that looks at them."""
    if stage is None or grad is None:
        missing, given = ("return_scores", "grad_scores") if stage is None else ("grad_scores", "return_scores")
        raise TypeError(f"{given} is given without {missing}: a gradient by scores, and which scores it is by, come together")
    stage, grad = checks.stage("return_scores", stage), conversion.array(tab, "grad_scores", grad, like=query)
    found, half = conversion.dtype_name(conversion.floating("grad_scores", grad)), conversion.dtype_name(query)
    if found != (expected := "float32" if half in ("float16", "bfloat16") else half):
        raise TypeError(f"grad_scores has dtype {found}; expected {expected}, in which the scores of a {half} query are")
    selected = scores[-1] if positions is None else positions.shape[-1]
    checks.same_shape("grad_scores", grad, (*scores[:-1], selected), "the scores")
    return {"return_scores": stage, "grad_scores": grad}


def arrays(tab: Any, **arguments: Any) -> list[Any]:
    """The arguments as floating-point arrays of one dtype; lists take the dtype of the arrays beside them."""
    typed = [x for x in arguments.values() if hasattr(x, "dtype")]
    like = next((x for x in typed if tab.is_array(x)), typed[0] if typed else None)
    made = {name: conversion.array(tab, name, x, like) for name, x in arguments.items()}
    first = next(iter(made.items()))
    return [conversion.floating(name, x, first, tab) for name, x in made.items()]


def differentiable(wrt: Any, names: set[str]) -> tuple[str, ...]:
    """``wrt`` as a tuple; a ValueError for a name that is not among ``names``."""
    for name in wrt:
        if name not in names:
            raise ValueError(f"wrt names {name!r}; this call has {', '.join(sorted(names))}")
    return tuple(wrt)


def given_back(tab: Any, given: dict[str, Any], wrt: Any, gradients: Any) -> tuple[Any, ...]:
    """The gradients, each in the dtype of its argument, which is another's where a framework converts them itself."""
    if not isinstance(gradients, (tuple, list)) or len(gradients) != len(wrt):  # a third party's backend
        raise TypeError(f"backend {registry.name_of(tab)!r} returned no tuple of {len(wrt)} gradients, by {', '.join(wrt)}")
    return tuple(
        x
        if getattr(given[name], "dtype", None) is x.dtype or not tab.is_array(given[name]) or given[name].dtype == x.dtype
        else tab.asarray(x, dtype=conversion.dtype_name(given[name]))
        for name, x in zip(wrt, gradients, strict=True)
    )


# ---- multi-head attention


def multi_head(backend: Any, inputs: tuple[Any, Any, Any], params: Any, counts: tuple[Any, Any], cache: Any,
               given: dict[str, Any], grad_output: Any = None) -> tuple[Any, ...]:  # fmt: skip
    """The tab, the arrays, the params, the numbers of heads and the options of multi-head attention.

    ``inputs``: query, key and value; ``counts``: num_heads and num_kv_heads.
    """
    query, key, value = inputs
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of arrays by name, not {type(params).__name__}")
    checks.param_names(params)
    if params.get("sink") is not None and given.get("sink") is not None:
        raise ValueError("sink is among the params, and an option too: give one of them")
    tab = dispatch.choose(
        backend, query=query, key=key, value=value, grad_output=grad_output,
        **{**{name: given.get(name) for name in ARRAYS}, **params}, cache=None if cache is None else cache.key,
    )  # fmt: skip
    query, key, value = arrays(tab, query=query, key=key, value=value)
    num_heads, num_kv_heads = checks.heads(*counts)
    params = projections(tab, query, key, value, params, num_heads, num_kv_heads)
    *batch, n, m = checks.scores_shape(query, key, value)
    if cache is not None:
        m = checks.cached(cache, n, m, given)
    features = (params["W_q"].shape[-1] // num_heads, params["W_k"].shape[-1] // num_kv_heads)
    checks.same_projected_features(features, is_dot_product(given.get("score")))
    flags = returned(given)
    scores = (*batch, num_heads, n, m)
    given |= {"sink": params["sink"]} if "sink" in params else {}
    if cache is not None and not hasattr(tab, "places"):  # functions are asked now, of where the step will stand
        given |= {"query_offset": cache.length}
    checked = options(tab, query, scores, features, return_lse=flags["return_lse"], batch=tuple(batch[:1]), **given)
    if cache is not None:
        checked["query_offset"] = 0
    if "sink" in params:
        checked.pop("sink")
    if not batch and checked["valid_lens"] is not None:
        checked["valid_lens"] = checks.for_each_head(tab, checked["valid_lens"], num_heads, query)
    return tab, query, key, value, params, {"num_heads": num_heads, "num_kv_heads": num_kv_heads}, checked | flags


def projections(tab: Any, query: Any, key: Any, value: Any, params: Any, num_heads: int, num_kv_heads: int) -> dict[str, Any]:
    """The projections as arrays of ``tab`` that fit the inputs and each other."""
    made = {name: conversion.array(tab, name, x, query) for name, x in params.items() if x is not None}
    made = {name: conversion.floating(name, x, ("query", query), tab) for name, x in made.items()}
    checks.projections(query, key, value, made, num_heads, num_kv_heads)
    return made


# ---- positions


_frequencies: dict[Any, tuple[tuple[float, ...], float]] = {}  # a model asks for few; it starts anew where they are many


def rotary(backend: Any, x: Any, positions: Any, base: Any, interleaved: Any, rotary_dim: Any,
           scaling: Any) -> tuple[Any, Any, Any, tuple[float, ...], dict[str, Any]]:  # fmt: skip
    """The tab, the arguments and the keywords of a tab's `rotary`: with frequencies in place of what they are made from."""
    tab = dispatch.choose(backend, x=x, positions=positions)
    (x,) = arrays(tab, x=x)
    *rows, d = checks.shape("x", x, 2)
    positions = checks.rows(tab, "positions", positions, tuple(rows), x)
    base, rotary_dim, scaling = checks.scaling(base, rotary_dim, scaling, d)
    length = checks.length(tab, positions, rows[-1], scaling["rope_type"]) if rotation.by_length(scaling) else 0
    turn = {"interleaved": checks.flag("interleaved", interleaved)}
    key = rotary_dim, base, length, *scaling.items()
    if hasattr(tab, "tracing") and tab.tracing():  # torch.compile would watch what is kept
        frequencies, factor = rotation.frequencies(rotary_dim, base, scaling, length)
    else:
        if (found := _frequencies.get(key)) is None:  # once, as another thread may empty it
            found = rotation.frequencies(rotary_dim, base, scaling, length)
            if len(_frequencies) >= REMEMBERED:
                _frequencies.clear()
            _frequencies[key] = found
        frequencies, factor = found
    return tab, x, positions, frequencies, turn | {"factor": factor}


# ---- scores and normalisers


def score(name: str, query: Any, key: Any, backend: Any, same: bool = True, **parameters: Any) -> Any:
    """The score called ``name``; ``same``: query and key need as many features."""
    tab = dispatch.choose(backend, query=query, key=key, **parameters)
    query, key = arrays(tab, query=query, key=key)
    checks.pairs(query, key)
    if same:
        checks.same_features(query, key)
    for parameter, x in parameters.items():
        if x is not None and not isinstance(x, float):
            x = conversion.array(tab, parameter, x, query)
            parameters[parameter] = conversion.floating(parameter, x, ("query", query), tab)
    checks.parameters(name, query.shape[-1], key.shape[-1], parameters)
    return registry.offered(tab, name)(query, key, **parameters)


def weights(name: str, scores: Any, where: Any, backend: Any, **extra: Any) -> Any:
    """The weights that the normaliser called ``name`` makes of the scores."""
    tab = dispatch.choose(backend, scores=scores, where=where, **extra)
    (scores,) = arrays(tab, scores=scores)
    shape = checks.shape("scores", scores, 1)
    if where is not None:
        where = checks.where(tab, where, scores)
    if extra.get("valid_lens") is not None:
        checks.shape("scores", scores, 2)
        extra["valid_lens"] = checks.lengths(tab, extra["valid_lens"], shape[:-2][:1], shape[-2], scores)
    return registry.offered(tab, name)(scores, where=where, **extra)


def unwrapped(function: Any) -> Any:
    """kvattn's own score or normaliser, where a namespace's is given: `from kvattn import torch as kv; kv.dot_score`."""
    if isinstance(function, partial):
        return partial(unwrapped(function.func), *function.args, **function.keywords)
    inner = getattr(function, "__wrapped__", None)
    return inner if inner is not None and inner in tabbed else function


def takes_one(kernel: Any) -> bool:
    """Whether a kernel takes one argument, no query and key.

    >>> takes_one(lambda u: u), takes_one(lambda query, key: query), takes_one(lambda u, width=1.0: u)
    (True, False, False)
    """
    try:
        signature = inspect.signature(kernel)
    except (TypeError, ValueError):  # what is not written in Python has none
        return False
    taken = []
    for args in ((0,), (0, 0)):
        try:
            signature.bind(*args)
            taken.append(True)
        except TypeError:
            taken.append(False)
    return taken == [True, False]


def of_differences(tab: Any, kernel: Any, query: Any, key: Any) -> Any:
    """The score that a kernel of one argument makes: kernel(key - query), of numbers."""
    if query.shape[-1] != 1 or key.shape[-1] != 1:
        raise ValueError(
            f"the kernel takes one argument, the difference of two numbers, but x has {query.shape[-1]} features and x_train "
            f"{key.shape[-1]}: give a kernel of (query, key)"
        )

    def score(query: Any, key: Any) -> Any:
        found = kernel(key[..., None, :, 0] - query[..., :, None, 0])
        if not hasattr(found, "dtype"):
            raise TypeError(f"the kernel gave {type(found).__name__}; expected an array, a number for each difference")
        dtype = conversion.dtype_name(query)
        return found if conversion.dtype_name(found) == dtype else tab.asarray(found, dtype)

    return score


def transposed(tab: Any, matrix: Any) -> Any:
    """The matrix with its axes exchanged; TensorFlow's arrays have no T, but every tab splits rows among heads."""
    return matrix.T if hasattr(matrix, "T") else tab._split(matrix, matrix.shape[-1])[..., 0]


def is_dot_product(score: Any) -> bool:
    """Whether query and key need as many features; not asked of a score with parameters of its own."""
    score = unwrapped(score)
    return score is None or any(score is public[name] for name in DOT_PRODUCTS)


def _own(tab: Any, what: str, function: Any, query: Any, features: tuple[Any, Any]) -> Any:
    return checks.for_backend(tab, function, what, tabbed.__contains__, query, features)


# ---- arguments that have passed every check before


class Remembered(NamedTuple):
    """The tab that served such arguments, the shape of their scores, and what the checks looked at.

    ``layout``: how the numbers lie, where the class, shape and dtype of an array do not tell, as PyTorch's sparse tensors
    have those of dense ones; else None. ``options``: what the checks looked at of options that passed beside them.
    ``defaults``: what `options` makes of those that a remembered call does not give.
    """

    tab: Backend
    scores: tuple[Any, ...]
    layout: Any
    options: set[Any]
    defaults: dict[str, Any]

    def fits(self, query: Any, *options: Any) -> bool:
        """Whether options like these, arrays or None, have passed every check beside such arguments but those of values."""
        try:
            if (layout := self.layout) is not None:
                for x in options:  # PyTorch's kernel would read numbers where a meta tensor has none
                    if x is not None and (x.layout is not layout or x.is_meta is not query.is_meta):
                        return False
            return _kinds(*options) in self.options
        except (AttributeError, RuntimeError, TypeError):
            return False  # as in `remembered`

    def remember(self, given: tuple[Any, ...], made: tuple[Any, ...]) -> None:
        """Remember that options like those ``given`` pass, unless the checks ``made`` others of them, as they must again."""
        if any(x is not None for x in given) and all(map(operator.is_, given, made)):
            if len(self.options) >= REMEMBERED_OPTIONS:
                self.options.clear()
            with suppress(TypeError):  # sizes that are symbols have no hash
                self.options.add(_kinds(*given))


_remembered: dict[Any, Remembered] = {}


def remembered(query: Any, key: Any, value: Any, backend: Any) -> Remembered | None:
    """What is known of arrays of this class, these shapes and dtypes, if such have been served before."""
    try:
        checked = _all_that_is_checked(dispatch.loaded(type(query), backend), query, key, value)
        # while tracing it is not looked into: torch.compile would watch its length
        known = None if checked is None else _remembered.get(checked)
        if known is None or (layout := known.layout) is None:
            return known
        return known if query.layout is layout and key.layout is layout and value.layout is layout else None
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return None  # lists and nested tensors have no shape, symbols no hash; a class or a backend is new


def remember(tab: Backend, query: Any, key: Any, value: Any, scores: tuple[Any, ...]) -> Remembered | None:
    """Remember that these arguments, as they came, are arrays of ``tab`` that pass every check for such scores."""
    if not tab.is_array(query) or (checked := _all_that_is_checked(tab, query, key, value)) is None:
        return None
    if not query.dtype == key.dtype == value.dtype:  # it was their framework that let them pass, here
        return None
    known = Remembered(tab, scores, query.layout if hasattr(query, "is_sparse") else None, set(), defaults(tab))
    if len(_remembered) >= REMEMBERED:
        _remembered.clear()
    with suppress(TypeError):  # sizes that are symbols have no hash
        _remembered[checked] = known
    return known


def _all_that_is_checked(tab: Any, query: Any, key: Any, value: Any) -> tuple[Any, ...] | None:
    """What the checks of query, key and value look at; None where it cannot be told: lists, traced sizes."""
    kind, dtype = type(query), query.dtype
    if kind is not type(key) or kind is not type(value) or (hasattr(tab, "tracing") and tab.tracing()):
        return None
    if key.dtype is not dtype or value.dtype is not dtype:  # TensorFlow takes as long to hash one as for all of the rest
        return None
    return id(tab), kind, dtype, query.shape, key.shape, value.shape


def _kinds(mask: Any, bias: Any, valid_lens: Any, grad: Any = None) -> tuple[Any, ...]:
    """What the checks look at of options; written out, since a loop takes half as long again."""
    return (
        None if mask is None else (type(mask), mask.shape, mask.dtype),
        None if bias is None else (type(bias), bias.shape, bias.dtype),
        None if valid_lens is None else (type(valid_lens), valid_lens.shape, valid_lens.dtype),
        None if grad is None else (type(grad), grad.shape, grad.dtype),
    )
