"""Multi-head attention and self-attention, over the steps that each tab has of its own:

    output = join(attention(split(query W_q + b_q), split(key W_k + b_k), split(value W_v + b_v))) W_o + b_o

Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.2.
"""

from __future__ import annotations

from typing import Any

from kvattn import checks, conversion
from kvattn.call import Call


def multi_head_attention(tab: Any, query: Any, key: Any, value: Any, params: dict[str, Any],
                         counts: tuple[int, int], cache: Any, options: dict[str, Any]) -> Any:  # fmt: skip
    """``counts``: how many heads the query has, and the key and the value."""
    (num_heads, num_kv_heads), like = counts, query
    options = widened(tab, options, params.get("sink"))
    if cache is None:  # else a later call may attend to keys that no query attends to now
        query, key, value = hidden(tab, query, key, value, options)
    else:  # whose keys and values are wide
        query, key, value = tab._wide(query), tab._wide(key), tab._wide(value)
    query = tab._split(tab._project(query, params, "q"), num_heads)  # (..., num_heads, n, d)
    key = tab._split(tab._project(key, params, "k"), num_kv_heads)  # (..., num_kv_heads, m, d)
    value = tab._split(tab._project(value, params, "v"), num_kv_heads)  # (..., num_kv_heads, m, v)
    if cache is not None:
        cache = cache.extend(key, value, backend=tab)
        key, value = cache.seen()
        options["query_offset"] = cache.length - query.shape[-2]
    output, *rest = _several(tab.attention(query, key, value, **options))
    output = tab._project(tab._join(output), params, "o")  # (..., n, o)
    results = _of_dtype(tab, [output, *rest], like, options.get("return_weights", False))
    return _one(results if cache is None else [*results, cache])


def self_attention(tab: Any, x: Any, params: dict[str, Any], options: dict[str, Any]) -> Any:
    """``params``: W_q, W_k and W_v."""
    options = limits = widened(tab, options)
    if options["valid_lens"] is not None and len(x.shape) == 2:  # of the one head there is
        limits = options | {"valid_lens": checks.for_each_head(tab, options["valid_lens"], 1, x)}
    query, key, value = hidden(tab, x, x, x, limits)
    query, key, value = tab._project(query, params, "q"), tab._project(key, params, "k"), tab._project(value, params, "v")
    results = _several(tab.attention(query, key, value, **options))
    return _one(_of_dtype(tab, results, x, options.get("return_weights", False)))


def hidden(tab: Any, query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
    """The inputs with zeros in rows of no pair in any head: NaN in them would reach the matrices' gradients."""
    free = options["mask"] is options["bias"] is options["valid_lens"] is options["window"] is options["positions"] is None
    if (options["causal"] or not free) and tab._may_leak(query, key, value):
        return tab._hide_unused_rows(query, key, value, Call.of(query, key, **options))
    return tab._hide_padding(None, query, key, value)  # hides all keys if there is no query, and all queries if there is no key


def widened(tab: Any, options: dict[str, Any], sink: Any = None) -> dict[str, Any]:
    """The options beside projections, which are wide. ``sink``: of the params, if they have one."""
    bias, sink = options["bias"], options.get("sink") if sink is None else sink
    return options | {"bias": bias if bias is None else tab._wide(bias), "sink": sink if sink is None else tab._wide(sink)}


def _several(results: Any) -> list[Any]:
    return [*results] if isinstance(results, tuple) else [results]


def _one(results: list[Any]) -> Any:
    """A result that is alone by itself."""
    return tuple(results) if len(results) > 1 else results[0]


def _of_dtype(tab: Any, results: list[Any], like: Any, weights: bool) -> list[Any]:
    """The results, output and weights in the dtype of ``like``: lse and scores stay wide."""
    for i in range(1 + weights):
        if results[i].dtype != like.dtype:
            results[i] = tab.asarray(results[i], dtype=conversion.dtype_name(like))
    return results
