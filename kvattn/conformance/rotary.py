"""The cases of positions: rotary embeddings in both conventions, by every scaling, and in layers, with their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from kvattn.conformance import multihead, oracle, oracle_layers
from kvattn.conformance.cases import DTYPES, Case, grid

TRAINED = "original_max_position_embeddings"
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "dynamic": {"factor": 2.0, TRAINED: 4},
    "yarn": {"factor": 8.0, TRAINED: 256},
    "longrope": {
        "factor": 4.0,
        TRAINED: 32,
        "short_factor": (1.0, 1.0, 1.25, 1.5, 2.0, 2.0, 3.0, 3.0),
        "long_factor": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 8.0, 16.0),
    },
    "llama3": {"factor": 8.0, TRAINED: 128, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def rotary_case(name: str, x: np.ndarray, positions: Any = None, **keywords: Any) -> Case:
    given = {} if positions is None else {"positions": positions}
    arguments = {"x": x} | {n: y for n, y in given.items() if isinstance(y, np.ndarray)}
    plain = {n: y for n, y in given.items() if n not in arguments} | keywords
    answer, largest = oracle.rotary(x, **given, **keywords), np.abs(0 if positions is None else positions).max(initial=0)
    # Angles are float64 whatever the dtype: their rounding shows in float64 alone, and only for large positions.
    dtypes = DTYPES if largest <= 4 else DTYPES[1:]
    return Case(f"rotary: {name}", "rotary", "rotary", arguments, plain, *answer, dtypes)


def cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every form in both conventions, which swap features that lie apart or beside each other."""
    far = np.array([10**6, 0, 999_983, -5])
    rows = rng.integers(0, 4000, (2, 1, 4))  # of each batch entry, for all its heads
    for name, options in (("halves", {}), ("interleaved", {"interleaved": True})):
        yield rotary_case(name, grid(rng, 2, 2, 4, 8), **options)
        yield rotary_case(f"{name}, no batch", grid(rng, 4, 6), **options)
        yield rotary_case(f"{name}, another base", grid(rng, 2, 4, 6), base=500000.0, **options)
        yield rotary_case(f"{name}, from a position", grid(rng, 2, 2, 4, 8), 7, **options)
        yield rotary_case(f"{name}, from a position that is an array", grid(rng, 2, 4, 8), np.array(3), **options)
        yield rotary_case(f"{name}, far out", grid(rng, 2, 2, 4, 8), far, **options)
        case = rotary_case(f"{name}, from far out", grid(rng, 2, 2, 4, 8), 10**6, **options)
        yield case
        size = {"output": 1e6 * case.magnitude["output"]}
        yield replace(case, name=f"{case.name}, float64", magnitude=size, dtypes=DTYPES[:1], usual=DTYPES[:1])
        yield rotary_case(f"{name}, at 0", grid(rng, 2, 4, 8), np.zeros(4, int), **options)
        yield rotary_case(f"{name}, turned back", grid(rng, 2, 4, 8), -np.arange(4), **options)
        yield rotary_case(f"{name}, positions of each entry", grid(rng, 2, 2, 4, 8), rows, **options)
        yield rotary_case(f"{name}, unsigned positions", grid(rng, 2, 4, 8), np.array([3, 200, 0, 9], "uint8"), **options)
        yield rotary_case(f"{name}, positions of each head", grid(rng, 2, 2, 4, 8), rng.integers(0, 99, (2, 2, 4)), **options)
        yield rotary_case(f"{name}, some features", grid(rng, 2, 2, 4, 8), rotary_dim=6, **options)
        yield rotary_case(f"{name}, some of an odd number", grid(rng, 2, 4, 7), rotary_dim=4, **options)
        yield rotary_case(f"{name}, two features", grid(rng, 2, 4, 2), **options)
        yield rotary_case(f"{name}, 7 axes", grid(rng, 2, 1, 2, 1, 2, 3, 4), rng.integers(0, 99, (2, 1, 1, 1, 1, 3)), **options)
        for rope_type, numbers in SCALINGS.items():
            scaling = {"rope_type": rope_type, **numbers}
            yield rotary_case(
                f"{name}, {rope_type}", grid(rng, 2, 4, 16), np.array([5, 900, 0, 31]), scaling=scaling, **options
            )
        yield rotary_case(f"{name}, no rows", grid(rng, 2, 0, 4), **options)
        yield rotary_case(f"{name}, no entries", grid(rng, 0, 3, 4), **options)
        yield rotary_case(f"{name}, no features", grid(rng, 2, 3, 0), **options)
    numbers = SCALINGS["yarn"] | {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}
    yield rotary_case("yarn by numbers of its own", grid(rng, 2, 4, 16), 1000, scaling={"rope_type": "yarn", **numbers})
    numbers = SCALINGS["longrope"] | {"attention_factor": 1.25}
    yield rotary_case("longrope, no longer than before", grid(rng, 2, 4, 16), 28, scaling={"rope_type": "longrope", **numbers})
    yield rotary_case(
        "dynamic, no longer than before", grid(rng, 2, 3, 16), scaling={"rope_type": "dynamic", **SCALINGS["dynamic"]}
    )


def layered(rng: np.random.Generator) -> Iterator[Case]:
    """Layers that rotate and normalise queries and keys, through which the gradients by inputs and by weights pass."""
    stretched = {"rope_type": "yarn", "factor": 4.0, TRAINED: 256}
    forms: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "rotary": ({"rotary": True}, {"causal": True}),
        "rotary, interleaved, some features": ({"rotary": {"interleaved": True, "rotary_dim": 2, "base": 50.0}}, {}),
        "rotary, yarn, offset": ({"rotary": {"scaling": stretched}}, {"causal": True, "query_offset": 2}),
        "qk_norm": ({"qk_norm": True}, {"valid_lens": np.array([3, 1])}),
        "qk_norm, rotary, sink": ({"qk_norm": 0.0625, "rotary": True, "sink": True}, {"window": 1}),
    }
    for name, form in forms.items():
        yield _layer(rng, name, *form)


def alibi(rng: np.random.Generator) -> Iterator[Case]:
    """Layers whose scores fall with distance."""
    yield _layer(rng, "alibi", {"alibi": True}, {"valid_lens": np.array([3, 1])})
    yield _layer(rng, "alibi, offset", {"alibi": (0.5, 0.25, 1.0, -0.5)}, {"causal": True, "query_offset": 2})


def _layer(rng: np.random.Generator, name: str, config: dict[str, Any], options: dict[str, Any]) -> Case:
    query, key, value = (grid(rng, 2, rows, 3) for rows in (3, 4, 4))
    weights = multihead.params_of(rng, 4, 2, d=4, v=4, o=16, biases=("b_q", "b_k", "b_v", "b_o"))
    weights |= {"sink": grid(rng, 4)} if "sink" in config else {}
    norms = {"q_norm": 1 + grid(rng, 4, top=0.5), "k_norm": 1 + grid(rng, 4, top=0.5)}
    weights |= norms if "qk_norm" in config else {}
    of_layer: dict[str, Any] = {"rotary": {} if config.get("rotary") is True else config.get("rotary")}
    of_layer["qk_norm"] = 1e-6 if config.get("qk_norm") is True else config.get("qk_norm")
    if "alibi" in config:
        slopes = np.array(config["alibi"] if config["alibi"] is not True else [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
        of_layer["bias"] = -slopes[:, None, None] * np.abs(
            np.arange(3)[:, None] + options.get("query_offset", 0) - np.arange(4)
        )
    grad_output = grid(rng, 2, 3, 16)
    answer = oracle_layers.multi_head_attention(query, key, value, weights, 4, 2, grad_output, **of_layer, **options)
    quantities = [what for what in answer.values if what == "output" or what.startswith("grad_")]
    arrays = {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    keywords = {n: x for n, x in options.items() if n not in arrays}
    keywords |= {"inputs": ("query", "key", "value"), "weights": weights}
    keywords["config"] = {"num_hiddens": 16, "num_heads": 4, "num_kv_heads": 2, "bias": True, **config}
    arguments = {"query": query, "key": key, "value": value, "grad_output": grad_output, **arrays}
    return Case(
        f"a layer: {name}", "layers", "MultiHeadAttention", arguments, keywords,
        {what: answer.values[what] for what in quantities}, {what: answer.magnitude[what] for what in quantities},
        answer.largest_score, DTYPES[:2], usual=DTYPES[:2],
    )  # fmt: skip
