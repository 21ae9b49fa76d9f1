"""The one place that refuses arguments. Framework-neutral: it reads shapes, dtypes and, where they can be read, values.

Every function takes the tab that serves the call, converts neutral data for it, and returns what the tab is given.
Unknown sizes (None, under tf.function) match anything.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from kvattn import registry, rotation
from kvattn.conversion import (
    FLOATS,
    INTEGERS,
    array,
    dtype_name,
    exact_integers,
    floating,
    in_int32,
    integers,
    is_integer,
    peek,
)  # fmt: skip


def _shape(x: Any) -> tuple[Any, ...]:
    return tuple(x.shape)


def _show(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join("?" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def _differ(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a != b


def _boolean(name: str, x: Any) -> None:
    if (dtype := dtype_name(x)) not in ("bool", "bool_"):
        hint = "a float mask that is added to the scores is bias=" if dtype in FLOATS else f"compare it: {name} != 0"
        raise TypeError(f"{name} has dtype {dtype}; expected bool, True where a query may attend ({hint})")


def seed(tab: Any, rng: Any) -> Any:
    """``rng``, a seed as a Python int or, where it is known later, as an array of ``tab``; generators as they are."""
    if isinstance(rng, (bool, float, str)):
        raise TypeError(f"rng must be an int, the seed of a pattern, or the framework's generator, not {type(rng).__name__}")
    if hasattr(rng, "dtype") and tuple(getattr(rng, "shape", (1,))) == ():
        if (dtype := dtype_name(rng)) in FLOATS or dtype.startswith("bool"):
            raise TypeError(f"rng has dtype {dtype}; expected an integer dtype, or an int")
        rng = rng if dtype not in INTEGERS or tab.is_array(rng) else int(rng)
    if not is_integer(rng):
        kinds = getattr(tab, "GENERATORS", None)  # another backend's own generators are its own affair
        if kinds is not None and not (rng is None or hasattr(rng, "dtype") or isinstance(rng, kinds)):
            others = "".join(f", or a {kind.__name__}" for kind in kinds)
            raise TypeError(f"rng must be an int, the seed of a pattern{others}; not {type(rng).__name__}")
        return rng
    if not 0 <= rng < 2**64:
        raise ValueError(f"rng is {rng}; expected a seed of 64 bits, from 0 to 2^64 - 1")
    return rng if type(rng) is int else int(rng)


def number(name: str, x: Any, *, positive: bool = False) -> float:
    """``x`` as a finite float. Raises TypeError for what is no number, ValueError for one out of range."""
    if isinstance(x, (bool, str)) or not (isinstance(x, (int, float)) or hasattr(x, "__float__")):
        raise TypeError(f"{name} must be a number, not {type(x).__name__}")
    try:
        value = float(x)
    except Exception as error:
        raise TypeError(f"{name} must be a number that is known now, not {type(x).__name__}") from error
    if not -math.inf < value < math.inf or (positive and value <= 0):  # torch.compile has no isfinite of a symbol
        raise ValueError(f"{name} must be finite{' and above 0' if positive else ''}, not {value}")
    return value


def broadcastable(name: str, shape: tuple[Any, ...], full: tuple[Any, ...], what: str, last: int = 2) -> None:
    """Raises ValueError unless ``shape`` broadcasts to ``full``, the shape of ``what``: batch, heads, and ``last`` axes."""
    if len(shape) > len(full):
        raise ValueError(f"{name} has shape {_show(shape)}, of more axes than {what} {_show(full)}")
    for axis in range(-1, -len(shape) - 1, -1):
        if shape[axis] != 1 and _differ(shape[axis], full[axis]):
            raise ValueError(
                f"{name} has shape {_show(shape)}, which does not broadcast to {what} {_show(full)}: "
                f"axis {axis} is {shape[axis]}, expected 1 or {full[axis]}{_headless(name, shape, full, last)}"
            )


def _headless(name: str, shape: tuple[Any, ...], full: tuple[Any, ...], last: int) -> str:
    """The cure where an array has no axis for the heads, or none for heads and queries, and fits without."""
    lead, lacks = len(shape) - last, len(full) - len(shape)
    if not lead and lacks and not any(a != 1 and _differ(a, b) for a, b in zip(shape, (full[0], full[-1]), strict=True)):
        return f"; for padding, the keys of each batch entry, it is {name}[:, {'None, ' * lacks}:]"
    if (
        lead < 1
        or not lacks
        or any(a != 1 and _differ(a, b) for a, b in zip(shape, (*full[:lead], *full[-last:]), strict=True))
    ):
        return ""
    return f"; for all heads alike it is {name}[{', '.join([':'] * lead + ['None'] * lacks)}]"


def _longer(name: str, shape: tuple[Any, ...], axes: int) -> str:
    """How to give an array of ``shape`` as many axes, its own leading axes staying where they are, as batch."""
    index = ", ".join([":"] * (len(shape) - 2) + ["None"] * (axes - len(shape)))
    heads = "one head, which all of the query's share"
    if name == "query":
        heads = "its heads (axis -3) must be a multiple of the key's"
    return f"give {name} the axes that it lacks: {name}[{index}]; {heads}"


def pairs(query: Any, key: Any, value: Any = None) -> tuple[Any, ...]:
    """The shape (..., n, m) of the scores. Raises ValueError, naming the argument, both shapes and the axis."""
    q, k = _shape(query), _shape(key)
    named = [("query", q), ("key", k)] + ([("value", _shape(value))] if value is not None else [])
    for name, shape in named:
        if len(shape) < 2:
            raise ValueError(
                f"{name} has shape {_show(shape)}; expected at least 2 axes: (..., {'n' if name == 'query' else 'm'}, features)"
            )
        if len(shape) != len(q):
            raise ValueError(
                f"{name} has shape {_show(shape)} but query has {_show(q)}: expected the same number of axes; "
                + (_longer("query", q, len(k)) if len(q) < len(shape) else _longer(name, shape, len(q)))
            )
    if value is not None:
        v = named[2][1]
        for axis in range(-2, -len(k) - 1, -1):
            if _differ(k[axis], v[axis]) and (axis >= -3 or 1 not in (k[axis], v[axis])):
                raise ValueError(
                    f"value has shape {_show(v)} but key has {_show(k)}: axis {axis} is {v[axis]}, expected {k[axis]}"
                )
    leading = list(q[:-2])
    for name, shape in named[1:]:
        for axis in range(-3, -len(q) - 1, -1):
            a, b = q[axis], shape[axis]
            if axis == -3 and a is not None and b is not None:
                if a != b and (b == 0 or a % b):
                    raise ValueError(
                        f"{name} has shape {_show(shape)} but query has {_show(q)}: axis -3 (heads) is {b}, "
                        f"which does not divide the query's {a}"
                    )
            elif _differ(a, b) and 1 not in (a, b):
                raise ValueError(f"{name} has shape {_show(shape)} but query has {_show(q)}: axis {axis} is {b}, expected {a}")
            elif axis != -3 and leading[axis + 2] == 1:
                if name == "value" and _differ(b, 1):
                    raise ValueError(f"value has shape {_show(shape)} but query and key have 1 on axis {axis}: expected 1")
                leading[axis + 2] = b
    return (*leading, q[-2], k[-2])


def shape(name: str, x: Any, least: int) -> tuple[Any, ...]:
    """The shape of ``x``. Raises ValueError if it has fewer than ``least`` axes."""
    found = _shape(x)
    if len(found) < least:
        raise ValueError(f"{name} has shape {_show(found)}; expected at least {least} axes")
    return found


def same_shape(name: str, x: Any, expected: tuple[Any, ...], what: str) -> None:
    """Raises ValueError unless ``x`` has the shape of ``what``."""
    found = _shape(x)
    if len(found) != len(expected) or any(map(_differ, found, expected)):
        raise ValueError(f"{name} has shape {_show(found)}; expected {_show(expected)}, as {what}")


def parameters(score: str, d_q: Any, d_k: Any, given: dict[str, Any]) -> None:
    """Raises ValueError unless the parameters of a score fit the query's features, the key's and each other."""
    h = _shape(given["w_v"])[-1] if score == "additive_score" and _shape(given["w_v"]) else None
    expected = {"W_q": (d_q, h), "W_k": (d_k, h), "w_v": (h,), "b": (h,), "W": (d_q, d_k)}
    expected["w_g"] = (None if None in (d_q, d_k) else d_q + d_k,)
    for name, x in given.items():
        if name in expected and x is not None:
            same_shape(name, x, expected[name], f"{score} needs for query (..., {d_q}) and key (..., {d_k})")


def where(tab: Any, given: Any, scores: Any) -> Any:
    """``where`` as a bool array of ``tab`` that broadcasts to the scores."""
    given = array(tab, "where", given, like=scores)
    _boolean("where", given)
    broadcastable("where", _shape(given), _shape(scores), "scores")
    return given


def positions(tab: Any, given: Any, scores: tuple[Any, ...], like: Any) -> Any:
    """positions as an integer array (..., n, s) that broadcasts to the scores' leading axes and queries."""
    x = integers(tab, "positions", given, like)
    found = shape("positions", x, 2)
    broadcastable("positions", found, (*scores[:-1], found[-1]), "(..., n, s)")
    values, m = peek(tab, x), scores[-1]
    if values is not None and values.size and (values.min() < -1 or (m is not None and values.max() >= m)):
        raise ValueError(f"positions must lie in [-1, {m}), -1 for none; got {values.min()} to {values.max()}")
    return x


def rows(tab: Any, name: str, given: Any, full: tuple[Any, ...], like: Any) -> Any:
    """Where the rows (..., n) of ``like`` stand: an int or an array () of the first, or an array that broadcasts to them."""
    if given is None:
        return 0
    if isinstance(given, bool):
        raise TypeError(f"{name} must be an integer or an array of them, not bool")
    if type(given) is int and not -(2**53) <= given <= 2**53:
        raise ValueError(f"{name} is {given}; expected within 2^53, up to where float64 holds every integer")
    if is_integer(given):
        return int(given)
    if hasattr(given, "__index__") and not hasattr(given, "shape"):  # a size that is a symbol
        return given
    x = exact_integers(tab, name, given, like)
    broadcastable(name, _shape(x), full, "the rows", last=1)
    return x


def length(tab: Any, positions: Any, n: Any, kind: str) -> int:
    """The largest position and one, for a scaling of this kind. Raises ValueError where it cannot be known now."""
    first = positions if is_integer(positions) else peek(tab, positions)
    if first is None or not is_integer(n):
        raise ValueError(
            f'scaling "{kind}" depends on the largest position, which is not known here: give positions as numbers'
        )
    return int(first.max(initial=0)) + 1 if getattr(first, "shape", ()) else int(first) + n


def count(name: str, x: Any, least: int = 1) -> int:
    """``x`` as an int of at least ``least``."""
    if not is_integer(x):
        raise TypeError(f"{name} must be an int, not {x!r}")
    if x < least:
        raise ValueError(f"{name} must be at least {least}, not {x}")
    return int(x)


def float_name(name: str, dtype: Any) -> str:
    """``dtype`` as the name of a floating-point one."""
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, not {dtype!r}")
    return dtype


def known_integers(tab: Any, name: str, given: Any) -> tuple[Any, Any]:
    """``given`` as an array of ``tab``, and its values, as NumPy's int64. Raises TypeError where they cannot be read now."""
    x = exact_integers(tab, name, given, None)
    known = peek(tab, x) if hasattr(tab, "peek") else tab.to_numpy(x)
    if known is None:
        raise TypeError(f"{name} must have values that can be read now, not in a trace or on another device: give NumPy's")
    return x, known.astype("int64")


def ends(cu_seqlens: Any, length: Any) -> int:
    """The length of a row of sequences that begin and end so. Raises ValueError for numbers that are no such places."""
    if cu_seqlens.ndim != 1 or not cu_seqlens.size:
        raise ValueError(f"cu_seqlens has shape {_show(cu_seqlens.shape)}; expected (sequences + 1,)")
    if cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError(f"cu_seqlens must begin with 0 and never decrease, not {cu_seqlens.tolist()}")
    last = int(cu_seqlens[-1])
    return last if length is None else count("length", length, last)


def buckets(num_buckets: Any, max_distance: Any, bidirectional: bool) -> int:
    """The buckets of one side. Raises ValueError unless some hold one distance each and others share the rest."""
    side = count("num_buckets", num_buckets, 4 if bidirectional else 2) // (2 if bidirectional else 1)
    count("max_distance", max_distance, side // 2 + 1)
    return side


def scaling(base: Any, rotary_dim: Any, given: Any, d: Any) -> tuple[float, int, dict[str, Any]]:
    """(base, the number of features that turn, the scaling with its "rope_type") for rotary of d features."""
    base = number("base", base, positive=True)
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"scaling must be a dict, as Hugging Face's rope_scaling, not {type(given).__name__}")
    found = {key: x for key, x in (given or {}).items() if x is not None}
    theta, part = found.pop("rope_theta", None), found.pop("partial_rotary_factor", None)
    kind = found.pop("type", None)  # an older name
    kind = found.pop("rope_type", "default" if kind is None and not found else kind)
    if not isinstance(kind, str) or kind not in rotation.SCALINGS:
        raise ValueError(f"scaling has the rope_type {kind!r}; known: {', '.join(rotation.SCALINGS)}")
    if theta is not None:
        theta = number("rope_theta", theta, positive=True)
        if base not in (10000.0, theta):
            raise ValueError(f"base is {base} but scaling has the rope_theta {theta}; give one of them")
        base = theta
    _, needed, optional = rotation.SCALINGS[kind]
    unknown, missing = sorted(found.keys() - {*needed, *optional}), [key for key in needed if key not in found]
    if unknown or missing:
        lacks = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise ValueError(f"scaling {kind!r} {lacks}; it has {', '.join((*needed, *optional)) or 'no numbers'}")
    if "truncate" in found:
        found["truncate"] = flag("truncate", found["truncate"])
    turned = _turned(rotary_dim, part, d)
    scaled: dict[str, Any] = {key: _of_pairs(key, found.pop(key), turned // 2) for key in [*found] if key in PER_PAIR}
    scaled |= {key: x if key == "truncate" else number(key, x, positive="mscale" not in key) for key, x in found.items()}
    if kind == "yarn" and base <= 1:
        raise ValueError(f'base must be above 1 for the scaling "yarn", not {base}')
    if kind == "llama3" and scaled["high_freq_factor"] <= scaled["low_freq_factor"]:
        raise ValueError(f"high_freq_factor is {scaled['high_freq_factor']}; expected above low_freq_factor")
    if kind == "longrope" and scaled[rotation.TRAINED] <= 1:
        raise ValueError(f"{rotation.TRAINED} must be above 1 for the scaling 'longrope', not {scaled[rotation.TRAINED]}")
    return base, turned, {"rope_type": kind, **scaled}


PER_PAIR = ("short_factor", "long_factor")  # of longrope: numbers, one for each pair


def _of_pairs(name: str, given: Any, pairs: int) -> tuple[float, ...]:
    """A number above 0 for each pair of features that turns."""
    if isinstance(given, (str, Mapping)) or not hasattr(given, "__len__"):
        raise TypeError(f"{name} must be a list of numbers, one for each pair of features that turns, not {given!r}")
    if len(given) != pairs:
        raise ValueError(f"{name} has {len(given)} numbers; expected {pairs}, one for each pair of features that turns")
    return tuple(number(f"{name}[{i}]", x, positive=True) for i, x in enumerate(given))


def _turned(rotary_dim: Any, part: Any, d: Any) -> int:
    """How many of d features rotary turns."""
    if d is None:
        raise ValueError("x has an unknown number of features; rotary needs it: give the axis a size (tf.ensure_shape)")
    if part is not None:
        share = int(d * number("partial_rotary_factor", part, positive=True))
        if rotary_dim not in (None, share):
            raise ValueError(f"rotary_dim is {rotary_dim} but scaling's partial_rotary_factor gives {share}; give one of them")
        rotary_dim = share
    if rotary_dim is None:
        if d % 2:
            raise ValueError(
                f"x has {d} features, an odd number; rotary turns pairs: rotary_dim={d - 1} leaves the last as it is"
            )
        return int(d)
    if not is_integer(rotary_dim):
        raise TypeError(f"rotary_dim must be an int, not {rotary_dim!r}")
    if rotary_dim % 2 or not 0 <= rotary_dim <= d:
        raise ValueError(f"rotary_dim must be even, and no more than x's {d} features, not {rotary_dim}")
    return int(rotary_dim)


PARAMS = ("W_q", "W_k", "W_v", "W_o", "b_q", "b_k", "b_v", "b_o", "sink")


def param_names(params: Any) -> None:
    """Raises ValueError unless multi-head attention knows every name, and has the three it needs."""
    unknown, missing = sorted(set(params) - {*PARAMS}), [name for name in PARAMS[:3] if params.get(name) is None]
    if unknown or missing:
        lacks = f"lack {', '.join(missing)}" if missing else f"have {', '.join(unknown)}"
        raise ValueError(f"params {lacks}; known: {', '.join(PARAMS)}, the first three required")


def heads(num_heads: Any, num_kv_heads: Any) -> tuple[int, int]:
    """(num_heads, num_kv_heads) as ints above 0, the second dividing the first, which it is by default."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    num_heads, num_kv_heads = count("num_heads", num_heads), count("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}, which does not divide num_heads, {num_heads}")
    return num_heads, num_kv_heads


def projections(query: Any, key: Any, value: Any, params: dict[str, Any], num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless the projections fit their inputs, the heads and each other."""
    for name, x, count in (("q", query, num_heads), ("k", key, num_kv_heads), ("v", value, num_kv_heads)):
        found = _shape(params[f"W_{name}"])
        same_shape(f"W_{name}", params[f"W_{name}"], (_shape(x)[-1], found[-1] if found else 0), "its input's features need")
        if found[-1] is not None and found[-1] % count:
            which = "num_heads" if name == "q" else "num_kv_heads"
            raise ValueError(f"W_{name} has shape {_show(found)}: axis -1 is {found[-1]}, no multiple of {which}, {count}")
    if "W_o" in params:
        out, v = _shape(params["W_o"]), _shape(params["W_v"])[-1]
        joined_features = None if v is None else v // num_kv_heads * num_heads
        same_shape("W_o", params["W_o"], (joined_features, out[-1] if out else 0), "the joined heads need")
    for name in ("q", "k", "v", "o"):
        if f"b_{name}" in params:
            if f"W_{name}" not in params:
                raise ValueError(f"params have b_{name} but no W_{name}")
            same_shape(f"b_{name}", params[f"b_{name}"], _shape(params[f"W_{name}"])[-1:], f"W_{name} needs")


def scores_shape(query: Any, key: Any, value: Any) -> tuple[Any, ...]:
    """(..., n, m) for inputs of multi-head attention, which have no heads yet: every leading axis is batch."""
    q, k, v = _shape(query), _shape(key), _shape(value)
    for name, found in (("query", q), ("key", k), ("value", v)):
        if len(found) < 2 or len(found) != len(q):
            raise ValueError(
                f"{name} has shape {_show(found)}; expected as many axes as query {_show(q)}, at least 2; every leading axis "
                "is batch here, of one size in query, key and value: broadcast the array that lacks one"
            )
        for axis in range(-len(q), -1 if name == "value" else -2):
            expected = k[axis] if axis == -2 else q[axis]
            if _differ(found[axis], expected):
                raise ValueError(f"{name} has shape {_show(found)}: axis {axis} is {found[axis]}, expected {expected}")
    return (*q[:-1], k[-2])


def same_projected_features(features: tuple[Any, Any], dots: bool) -> None:
    """Raises ValueError unless projected queries and keys have as many features: a dot product needs it."""
    if dots and _differ(*features):
        raise ValueError(f"W_q gives heads of {features[0]} features but W_k of {features[1]}: a dot product needs as many")


def cached(cache: Any, n: Any, m: Any, options: dict[str, Any]) -> Any:
    """How many keys there are once these m have joined the cache. Raises ValueError for an offset beside it."""
    no_offset(options.get("query_offset", 0))
    if _differ(n, m):
        raise ValueError(f"with a cache, query and key are the same step: n is {n}, m is {m}")
    if cache.key is None:
        return m
    return cache.length + m if is_integer(cache.length) else _shape(cache.key)[-2]


def no_offset(query_offset: Any) -> None:
    """Raises ValueError for an offset beside a cache."""
    if not is_integer(query_offset) or query_offset:
        raise ValueError("query_offset is the cache's length where there is a cache: give one of them")


def same_features(query: Any, key: Any) -> None:
    """Raises ValueError unless query and key have as many features: a dot product needs it."""
    q, k = _shape(query), _shape(key)
    if _differ(q[-1], k[-1]):
        raise ValueError(f"key has shape {_show(k)} but query has {_show(q)}: axis -1 (features) is {k[-1]}, expected {q[-1]}")


def lengths(tab: Any, valid_lens: Any, batch: tuple[Any, ...], n: Any, like: Any) -> Any:
    """valid_lens as an integer array (batch,) or (batch, n); () or (n,) where there is no batch axis."""
    x = integers(tab, "valid_lens", valid_lens, like)
    shape = _shape(x)
    expected = (batch, (*batch, n))
    if len(shape) not in (len(batch), len(batch) + 1) or any(map(_differ, shape, expected[1])):
        raise ValueError(
            f"valid_lens has shape {_show(shape)}; expected {_show(expected[0])} or {_show(expected[1])}, "
            + ("which is (batch,) or (batch, n)" if batch else "one for all queries or one for each: there is no batch axis")
        )
    not_negative(tab, x)
    return x


def not_negative(tab: Any, valid_lens: Any) -> None:
    """Raises ValueError for a length below 0, where there are lengths whose values can be read."""
    values = None if valid_lens is None else peek(tab, valid_lens)
    if values is not None and values.size and (min(values.ravel().tolist()) if values.size <= 32 else values.min()) < 0:
        raise ValueError(f"valid_lens must not be negative; the smallest is {values.min()}")


def for_each_head(tab: Any, valid_lens: Any, num_heads: int, like: Any) -> Any:
    """Lengths () or (n,) as (num_heads,) or (num_heads, n): without a batch axis, attention takes the heads for one."""
    x = integers(tab, "valid_lens", valid_lens, like)
    shape = _shape(x)
    if len(shape) > 1:
        raise ValueError(f"valid_lens has shape {_show(shape)}; expected () or (n,), for inputs without a batch axis")
    nothing = [[0]] * num_heads if shape else [0] * num_heads
    if (values := peek(tab, x)) is not None:  # MXNet adds nothing to an array of no axes
        return tab.asarray(values + nothing, dtype=dtype_name(x), like=x)
    return x + tab.asarray(nothing, dtype=dtype_name(x), like=x)


def offset(tab: Any, query_offset: Any, batch: tuple[Any, ...], like: Any) -> Any:
    """query_offset as a Python int, or as an integer array (batch,)."""
    if is_integer(query_offset):
        return int(query_offset)
    if isinstance(query_offset, (bool, float, str)):
        raise TypeError(f"query_offset must be an int or an integer array (batch,), not {type(query_offset).__name__}")
    if hasattr(query_offset, "__index__") and not hasattr(query_offset, "shape"):  # a size that is a symbol
        return query_offset
    x = integers(tab, "query_offset", query_offset, like)
    shape = _shape(x)
    if shape != () and (len(shape) != 1 or not batch or _differ(shape[0], batch[0])):
        raise ValueError(f"query_offset has shape {_show(shape)}; expected an int, or one per batch entry: {_show(batch)}")
    return x


def window(x: Any) -> tuple[int | None, int | None]:
    """(left, right), each an int >= 0 or None for no limit."""
    if type(x) is int and x >= 0:
        return x, x
    sides = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(sides) != 2:
        raise ValueError(f"window must be an int or a pair (left, right), not {x!r}")
    for side in sides:
        if side is not None and not is_integer(side):
            raise TypeError(f"window must be an int, a pair (left, right) of ints, or None; got {x!r}")
        if side is not None and side < 0:
            raise ValueError(f"window must not be negative; got {x!r}")
    left, right = (None if side is None else int(side) for side in sides)
    return left, right


def probability(name: str, x: Any) -> float:
    """``x`` as a float in [0, 1)."""
    value = number(name, x)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), not {value}")
    return value


def flag(name: str, x: Any) -> bool:
    """``x`` as a bool."""
    if x is not True and x is not False and type(x).__name__ not in ("bool_", "bool", "SymBool"):
        raise TypeError(f"{name} must be True or False, not {x!r}")
    return True if x else False  # noqa: SIM210 (torch.compile leaves bool of a symbol a symbol)


STAGES = ("raw", "capped", "biased")


def stage(name: str, x: Any) -> str:
    """``x``, one of the stages at which scores can be returned."""
    if isinstance(x, str) and x in STAGES:
        return str(x)
    kind = ValueError if isinstance(x, str) else TypeError
    raise kind(f"{name} must be 'raw', 'capped' or 'biased', or None for no scores; not {x!r}")


NAMES_ELSEWHERE = {  # what other libraries call an argument, and what it is called here
    "is_causal": "causal", "use_causal_mask": "causal", "dropout_p": "dropout", "dropout_rate": "dropout", "attn_bias": "bias",
    "window_size": "window", "local_window_size": "window", "sliding_window": "window", "logits_soft_cap": "softcap",
    "softmax_scale": "scale", "sm_scale": "scale", "s_aux": "sink", "sinks": "sink",
    "need_weights": "return_weights", "return_attention_scores": "return_weights",
    "kv_seq_lengths": "valid_lens", "key_value_seq_lengths": "valid_lens", "seq_lens": "valid_lens", "dropout_rng": "rng",
    "attn_mask": "mask, of booleans, True where a query may attend, or bias, of floats that are added to the scores",
    "attention_mask": "mask, of booleans, True where a query may attend, or bias, of floats that are added to the scores",
    "key_padding_mask": "valid_lens, or mask=~key_padding_mask[:, None, None, :], True where a query may attend",
}  # fmt: skip


def unknown(names: Any, known: Any) -> TypeError:
    """The error for keywords that attention has not, which names ours."""
    name = next(iter(names))
    if name in known:  # of a gradient
        return TypeError(f"attention_grad has no argument {name!r}: it returns gradients alone")
    likely = (each for each in known if each.startswith(name) or name.startswith(each))
    name_here = NAMES_ELSEWHERE.get(name) or next(likely, None)
    cure = f"here it is {name_here}" if name_here else f"it has {', '.join(known)}"
    return TypeError(f"attention has no argument {name!r}: {cure}")


def masks(tab: Any, query: Any, scores: tuple[Any, ...], mask: Any, bias: Any) -> tuple[Any, Any]:
    """mask and bias as arrays of ``tab`` that broadcast to the scores."""
    if mask is not None:
        mask = array(tab, "mask", mask, like=query)
        _boolean("mask", mask)
        broadcastable("mask", _shape(mask), scores, "the scores")
    if bias is not None:
        bias = array(tab, "bias", bias, like=query)
        bias = floating("bias", bias, ("query", query), tab)
        broadcastable("bias", _shape(bias), scores, "the scores")
    return mask, bias


def segments(tab: Any, given: Any, batch: tuple[Any, ...], n: Any, m: Any, like: Any) -> tuple[Any, Any]:
    """Segments of the queries (batch or 1, n) and of the keys (batch or 1, m), of int32."""
    pair = isinstance(given, (tuple, list)) and len(given) == 2 and all(hasattr(x, "shape") or _nested(x, batch) for x in given)
    found = []
    for name, x, size in (("queries", given[0] if pair else given, n), ("keys", given[1] if pair else given, m)):
        called = f"segments of the {name}" if pair else "segments"
        x = exact_integers(tab, called, x, like)
        if (values := peek(tab, x)) is not None:
            in_int32(called, values)
        shape, expected = _shape(x), (*batch, size)
        if len(shape) != len(expected) or any(map(_differ, shape, expected)):
            cure = (
                ""
                if pair or not _differ(n, m)
                else "; for queries and keys of different lengths give a pair, (of the queries, of the keys)"
            )
            raise ValueError(
                f"{called} has shape {_show(shape)}; expected {_show(expected)}, an id for each of the {size} {name}{cure}"
            )
        x = tab.asarray(x, dtype="int32", like=like)
        found.append(x if batch else x[None])
    return found[0], found[1]


def _nested(x: Any, batch: tuple[Any, ...]) -> bool:
    return isinstance(x, (list, tuple)) and not (batch and all(map(is_integer, x)))


def not_by_function(wrt: Any, bias: Any) -> None:
    """Raises ValueError for a gradient by a bias that is a function."""
    if "bias" in wrt and callable(bias):
        raise ValueError(
            "wrt names 'bias', which is a function here: a gradient by the arrays that it is made of is the framework's own, "
            "taken through attention; or give the bias as an array"
        )


def flags(tab: Any, made: Any, full: tuple[Any, ...]) -> Any:
    """What a mask that is a function gives, which has to be bool and to broadcast to the pairs asked for, ``full``."""
    _made(tab, "mask", made, "bool", full)
    if (dtype := dtype_name(made)) not in ("bool", "bool_"):
        hint = "a function that is added to the scores is bias=" if dtype in FLOATS else "compare what it gives: != 0"
        raise TypeError(
            f"mask, a function, gives an array of dtype {dtype}; expected bool, True where a query may attend ({hint})"
        )
    return made


def added(tab: Any, made: Any, full: tuple[Any, ...]) -> Any:
    """What a bias that is a function gives, which has to be floating point and to broadcast to the pairs asked for."""
    _made(tab, "bias", made, "floating-point", full)
    if (dtype := dtype_name(made)) not in FLOATS:
        hint = "a function that tells who may attend is mask=" if dtype in ("bool", "bool_") else (
            "positions are integers: convert what is computed from them")  # fmt: skip
        raise TypeError(f"bias, a function, gives an array of dtype {dtype}; expected floating point ({hint})")
    return made


UNREADABLE = ("truth value", "Boolean value of Tensor", "boolean conversion", "as a Python `bool`")  # each framework's words


def asked(name: str, function: Any, query: Any, key: Any) -> Any:
    """What a mask or a bias that is a function gives for these positions. Its own errors stay as they are; that of a function
    that cannot be one of arrays stands behind a TypeError that says so."""
    try:
        return function(query, key)
    except Exception as error:
        _check_parameters(name, function, "(query, key), arrays of positions", 2)
        if any(words in str(error) for words in UNREADABLE):
            raise TypeError(
                f"{name}, {_called(function)}, asks whether an array is true; it is given integer arrays of query positions "
                f"{_show(_shape(query))} and key positions {_show(_shape(key))}: instead of `and`, `or`, `not`, `if` and "
                "a < b < c use &, |, ~ and the framework's where, with comparisons in parentheses"
            ) from error
        raise


def _made(tab: Any, name: str, made: Any, kind: str, full: tuple[Any, ...]) -> None:
    what = f"query positions (..., {full[-2]}, 1) and key positions (1, {full[-1]})"
    if not tab.is_array(made):
        raise TypeError(
            f"{name}, a function, gives a {type(made).__name__} for {what}; expected a {kind} array of the same framework"
        )
    broadcastable(f"{name}, a function, gives an array that", _shape(made), full, f"the pairs of {what},")


def sink(tab: Any, given: Any, scores: tuple[Any, ...], query: Any) -> Any:
    """sink as an array of ``tab`` that broadcasts to the batch and head axes of the scores, or to (..., n, 1)."""
    x = array(tab, "sink", float(given) if is_integer(given) else given, like=query)
    x = floating("sink", x, ("query", query), tab)
    found, lead = _shape(x), scores[:-2]
    if len(found) == len(scores):
        broadcastable("sink", found, (*scores[:-1], 1), "one logit for each query")
    else:
        broadcastable("sink", found, lead, "one logit for each batch entry and head")
    return x


SCORES = tuple(f"{x}_score" for x in ("scaled_dot", "dot", "additive", "multiplicative", "gated", "cosine", "distance"))
SCORES += tuple(f"{x}_kernel" for x in ("gaussian", "boxcar", "triangular", "epanechnikov", "constant"))
NORMALIZERS = ("softmax", "sparsemax", "hardmax", "proportional", "average", "identity")


def _suggestions(name: str, word: Any) -> list[str]:
    """kvattn's functions that may stand for this argument; of a word, those that it may mean."""
    known = SCORES if name == "score" else NORMALIZERS
    word = str(word).lower() if isinstance(word, str) and word else " "
    return [f"kvattn.{each}" for each in [each for each in known if each.startswith(word)] or known]


def for_backend(tab: Any, function: Any, name: str, own: Any, query: Any, features: tuple[Any, Any]) -> Any:
    """A score or normaliser for ``tab``: kvattn's own become the tab's, parameters of a partial become its arrays."""
    if isinstance(function, partial) and own(function.func):
        given = {
            n: x if x is None or isinstance(x, (int, float)) else array(tab, n, x, query) for n, x in function.keywords.items()
        }
        if name == "score":
            for parameter, x in given.items():
                if tab.is_array(x):
                    given[parameter] = floating(parameter, x, ("query", query), tab)
            parameters(function.func.__name__, *features, given)
        return partial(registry.offered(tab, function.func.__name__), *function.args, **given)
    if not callable(function):
        raise TypeError(f"{name} must be a function, not {function!r}: {', '.join(_suggestions(name, function))}, or your own")
    return registry.offered(tab, function.__name__) if own(function) else function


def user_functions(tab: Any, options: dict[str, Any], query: Any, key: Any) -> None:
    """Raises TypeError or ValueError if the caller's own score or normaliser cannot be called, or gives another shape.

    Asked where a call with them has failed: `query` and `key` are its arrays, for which the score is tried once more.
    """
    score, normalize = options["score"], options["normalize"]
    _check_parameters("score", score, "(query, key), its parameters bound by functools.partial", 2)
    _check_parameters("normalize", normalize, "(scores, where=None)", 1, "where")
    if score is None or normalize is None:
        return
    scores = _shape(query)[-2:-1] + _shape(key)[-2:-1]
    if len(_shape(query)) > 2:
        query = query[..., : _shape(key)[-3], :, :]  # of grouped heads, as many as there are keys'
    made = score(query, key)
    _check_result(tab, "score", made, scores)
    _check_result(tab, "normalize", normalize(made, where=None), scores)


def _check_parameters(name: str, function: Any, promised: str, count: int, *keywords: str) -> None:
    if function is None:  # a third party's backend has its own
        return
    try:
        inspect.signature(function).bind(*range(count), **dict.fromkeys(keywords))
    except TypeError:
        raise TypeError(f"{name}, {_called(function)}, must take {promised}") from None
    except ValueError:  # a function without a signature to inspect
        return


def _check_result(tab: Any, name: str, made: Any, scores: tuple[Any, ...]) -> None:
    expected = f"scores (..., n, m), here (..., {scores[0]}, {scores[1]})"
    if not tab.is_array(made):
        raise TypeError(f"{name} gives a {type(made).__name__}; expected an array of {expected}")
    if len(found := _shape(made)) < 2 or any(map(_differ, found[-2:], scores)):
        raise ValueError(f"{name} gives the shape {_show(found)}; expected {expected}")


def _called(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
