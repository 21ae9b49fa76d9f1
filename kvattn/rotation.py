"""The frequencies of rotary position embeddings, and how models stretch them to longer texts: plain numbers, for every backend.

Pair i of ``width`` features turns by position * base^(-2 i / width): Su et al. 2021, "RoFormer", equation 34. What a
``scaling`` does to that is written at its function. Its keys are those of Hugging Face's ``rope_scaling``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Numbers = tuple[float, ...]
TRAINED = "original_max_position_embeddings"


def frequencies(width: int, base: float, scaling: dict[str, Any], length: int = 0) -> tuple[Numbers, float]:
    """(the frequency of each pair, what cosine and sine are multiplied by), for a scaling that `checks.scaling` has passed.

    ``length``: of the longest text that the positions come from, where the scaling goes `by_length`.

    >>> frequencies(4, 10000.0, {"rope_type": "linear", "factor": 2.0})
    ((0.5, 0.005), 1.0)
    """
    return SCALINGS[scaling["rope_type"]][0](width, base, scaling, length)


def _plain(width: int, base: float) -> Numbers:
    return tuple(base ** (-2 * i / width) for i in range(width // 2))


def _default(width: int, base: float, s: dict[str, Any], length: int) -> tuple[Numbers, float]:
    return _plain(width, base), 1.0


def _linear(width: int, base: float, s: dict[str, Any], length: int) -> tuple[Numbers, float]:
    """Positions are divided by the factor: Chen et al. 2023, "Extending context window ... via positional interpolation"."""
    return tuple(f / s["factor"] for f in _plain(width, base)), 1.0


def _ntk(width: int, base: float, s: dict[str, Any], length: int) -> tuple[Numbers, float]:
    """The base grows so that the slowest pair alone is divided by the factor: bloc97 2023, "NTK-aware scaled RoPE"."""
    return _plain(width, base * s["factor"] ** (width / max(width - 2, 1))), 1.0


def _dynamic(width: int, base: float, s: dict[str, Any], length: int) -> tuple[Numbers, float]:
    """As "ntk", by a factor that is 1 up to the trained length and grows with the text: emozilla 2023."""
    return _ntk(width, base, as_ntk(s, length), length)


def by_length(scaling: Mapping[str, Any]) -> bool:
    """Whether a scaling depends on how long the text is: "dynamic" does, and "longrope" with factors that differ."""
    kind = scaling.get("rope_type") or scaling.get("type")
    return kind == "dynamic" or (kind == "longrope" and scaling["short_factor"] != scaling["long_factor"])


def of_length(scaling: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The scaling that one `by_length` is for a text of this length."""
    if (scaling.get("rope_type") or scaling.get("type")) == "dynamic":
        return as_ntk(scaling, length)
    factors = scaling["long_factor" if length > scaling[TRAINED] else "short_factor"]
    return {**scaling, "short_factor": factors, "long_factor": factors}


def as_ntk(dynamic: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The scaling "ntk" that "dynamic" is for a text of this length.

    >>> as_ntk({"rope_type": "dynamic", "factor": 2.0, TRAINED: 100}, 200)
    {'rope_type': 'ntk', 'factor': 3.0}
    """
    trained, factor = dynamic[TRAINED], dynamic["factor"]
    others = {key: x for key, x in dynamic.items() if key not in ("rope_type", "type", "factor", TRAINED)}
    return {**others, "rope_type": "ntk", "factor": factor * max(length, trained) / trained - (factor - 1)}


def _yarn(width: int, base: float, s: dict[str, Any], length: int) -> tuple[Numbers, float]:
    """Pairs that turn often in the trained length stay, those that do not turn once are divided: Peng et al. 2023, "YaRN"."""
    trained, factor = s[TRAINED], s["factor"]

    def pair(turns: float) -> float:  # which turns so often in the trained length
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    def temperature(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1

    first, last = pair(s.get("beta_fast", 32.0)), pair(s.get("beta_slow", 1.0))
    if s.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = [min(max((i - first) / ((last - first) or 0.001), 0.0), 1.0) for i in range(width // 2)]
    scaled = tuple(f / factor * r + f * (1 - r) for f, r in zip(_plain(width, base), ramp, strict=True))
    if s.get("mscale") and s.get("mscale_all_dim"):  # DeepSeek's
        multiplied = temperature(s["mscale"]) / temperature(s["mscale_all_dim"])
    else:
        multiplied = temperature(1.0)
    return scaled, s.get("attention_factor", multiplied)


def _llama3(width: int, base: float, s: dict[str, Any], length: int) -> tuple[Numbers, float]:
    """Long waves are divided by the factor, short ones stay, between them it is mixed: Llama 3.1, 2024."""
    trained, factor, slow, fast = (float(s[key]) for key in (TRAINED, "factor", "low_freq_factor", "high_freq_factor"))

    def scaled(f: float) -> float:
        turns = trained * f / (2 * math.pi)  # in the trained length
        if turns < slow:
            return f / factor
        share = 1.0 if turns > fast else (turns - slow) / (fast - slow)
        return (1 - share) * f / factor + share * f

    return tuple(map(scaled, _plain(width, base))), 1.0


def _longrope(width: int, base: float, s: dict[str, Any], length: int) -> tuple[Numbers, float]:
    """Each pair is divided by a factor of its own, another one beyond the trained length: Ding et al. 2024, "LongRoPE"."""
    trained, factor = s[TRAINED], s.get("factor", 1.0)
    divisors = s["long_factor" if length > trained else "short_factor"]
    stretched = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    scaled = tuple(f / by for f, by in zip(_plain(width, base), divisors, strict=True))
    return scaled, s.get("attention_factor", stretched)


# by its rope_type: (the function, the keys that it needs, those that it may have)
SCALINGS: dict[str, tuple[Callable[..., tuple[Numbers, float]], tuple[str, ...], tuple[str, ...]]] = {
    "default": (_default, (), ()),
    "linear": (_linear, ("factor",), ()),
    "ntk": (_ntk, ("factor",), ()),
    "dynamic": (_dynamic, ("factor", TRAINED), ()),
    "yarn": (
        _yarn, ("factor", TRAINED), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (_llama3, ("factor", TRAINED, "low_freq_factor", "high_freq_factor"), ()),
    "longrope": (_longrope, ("short_factor", "long_factor", TRAINED), ("factor", "attention_factor")),
}  # fmt: skip


# ---- tables of cosines and sines, which the layers of a model ask for again and again

KEPT = 8  # tables: each of a step's queries and keys, in each layer, asks for the same one
LARGEST = 2**21  # numbers in one of them: what is larger is not kept


def kept(tables: dict[Any, Any], key: Any, n: int, make: Callable[[], Any]) -> Any:
    """``make()``, a table of n rows for the frequencies that the key begins with; or what it gave for this key before."""
    if (found := tables.get(key)) is None:
        found = make()
        if 2 * n * len(key[0]) <= LARGEST:
            for oldest in [*tables][: max(len(tables) - KEPT + 1, 0)]:
                tables.pop(oldest, None)
            tables[key] = found
    return found
