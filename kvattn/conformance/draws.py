"""Calls drawn at random over every option, dtype, edge of the shapes and layer, judged as the cases are: `conform --draws`.

A draw is plain data; its arrays are drawn from its seed and their names. So it can be made smaller, an option or a size at
a time, while the rest stays as it was, and the smallest draw that still fails is printed as code (programs.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvattn import layers
from kvattn.conformance import check, functions, multihead, oracle, oracle_layers, pooling
from kvattn.conformance.cases import DTYPES, NOT_FINITE, Case, attend, grid, kink_free, poisoned

SIZES = (1, 1, 2, 3, 4, 5, 7)
EDGES = (15, 16, 17, 255, 256, 257, 511, 513)  # where the kernels of this package cut their tiles and blocks
LEADS = (
    ((), ()), ((2,), (2,)), ((2, 2), (2, 2)), ((2, 4), (2, 2)), ((2, 3), (2, 1)), ((2, 2), (1, 2)),
    ((1, 2), (3, 1)), ((4,), (2,)), ((2, 1, 2), (1, 2, 2)), ((1, 2, 1, 2), (2, 1, 1, 1)), ((0, 2), (0, 2)),
)  # fmt: skip
PARAMETRISED = ("additive_score", "multiplicative_score", "gated_score")
SCORES = (*pooling.SIMPLE, *PARAMETRISED, *pooling.KERNELS)
NORMALISERS = tuple(name for name in pooling.NORMALISERS if name != "masked_softmax")
HEADS = ((1, 1), (2, 2), (4, 2), (3, 1))
SCORED = {  # layers of one head, and their scores
    "DotProductAttention": "scaled_dot_score", "AdditiveAttention": "additive_score",
    "MultiplicativeAttention": "multiplicative_score", "GatedAttention": "gated_score",
}  # fmt: skip
PLAIN = ("PositionalEncoding", "AddNorm", "PositionWiseFFN")  # layers without attention
DEEP = ("TransformerEncoderBlock", "TransformerEncoder")
DECODERS = ("TransformerDecoderBlock", "TransformerDecoder")
HEADED = (*check.PROJECTED, "MultiHeadAttention", *DEEP, *DECODERS)  # calls of several heads


@dataclass(frozen=True)
class Draw:
    """A call: ``options`` hold its keywords as plain data, where a shape is which axes are full, not 1."""

    seed: tuple[int, ...]
    call: str = "attention"
    dtype: str = "float64"
    lead: tuple[int, ...] = ()
    kv: tuple[int, ...] = ()
    n: int = 1
    m: int = 1
    d: int = 1
    v: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    output_only: bool = False
    grad: bool = True
    large: bool = False

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([*self.seed, zlib.crc32(name.encode())])


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """So many drawn cases; the same ``seed`` gives the same.

    >>> [case.name for case in cases(1)] == [case.name for case in cases(1)]
    True
    """
    return (case(draw(seed, number)) for number in range(count))


class _Dice:
    """The random choices of a draw. Each moves the generator on, so that their order decides what is drawn after."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def choice(self, *of: Any) -> Any:
        return of[self.rng.integers(len(of))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def axes(self, most: int, least: int = 0) -> tuple[bool, ...]:
        """Which of the last axes, so many at most, are full."""
        return tuple(self.chance(0.7) for _ in range(self.rng.integers(least, most + 1)))


def draw(seed: int, number: int) -> Draw:
    """The draw of that number."""
    dice = _Dice(seed, number)
    made = _sized(dice, (seed, number))
    if made.call in layers.LAYERS:  # of a batch; in half precision each framework's dense layers round as they do
        lead = (int(dice.rng.integers(0, 4)),)
        made = replace(made, dtype=dice.choice("float32", "float64"), lead=lead, kv=lead)
    if made.call in PLAIN:
        return _plain_layer(dice, made)
    if made.call in HEADED:
        made = _with_heads(dice, made)
    if made.call in DECODERS:
        return _decoder(dice, made)
    if made.call in (*DEEP, "MultiHeadAttention") and made.n > 1 and dice.chance(0.3):
        options = made.options | {"steps": True} | _given(window=dice.choice(None, (1, 0)))
        return replace(made, options=options, asked=(), grad=False)
    if made.call == "decoding":
        windows = None, None, (1, 0), (2, None)
        options = _given(window=dice.choice(*windows)) | {"capacity": bool(made.lead) and dice.chance(0.5)}
        return replace(made, options=made.options | options, asked=(), grad=False)
    if made.call == "split_attention":
        options = {"splits": sorted(int(dice.rng.integers(0, made.m + 1)) for _ in range(dice.rng.integers(1, 4)))}
        options |= {"softcap": 2.0} if dice.chance(0.3) else {}
        return replace(made, options=options, asked=("lse",), grad=False, output_only=False)
    for add in (_restrictions, _formula, _functions_of_positions, _of_the_layer):
        add(dice, made)
    return made


def _sized(dice: _Dice, seed: tuple[int, int]) -> Draw:
    """A call of attention mostly, its sizes, which may be those where kernels cut, and what it returns."""
    other_functions = ("multi_head_attention", "self_attention", "decoding", "split_attention")
    call = "attention"
    if not dice.chance(0.65):
        call = dice.choice(*other_functions, *layers.LAYERS) if dice.chance(0.5) else dice.choice(*other_functions)
    lead, kv = dice.choice(*LEADS)
    n, m, d, v = (0 if dice.chance(0.05) else dice.choice(*SIZES) for _ in range(4))
    made = Draw(seed, call, dice.choice(*DTYPES), lead, kv, n, m, d, v, {}, output_only=dice.chance(0.5))
    if large := dice.chance(0.02):
        n, m = (int(dice.choice(*EDGES)) if dice.chance(0.7) else dice.choice(1, 3) for _ in range(2))
        lead, kv = dice.choice(((), ()), ((2,), (2,)), ((1, 2), (1, 1)))
        sizes = {"lead": lead, "kv": kv, "n": n, "m": m, "d": dice.choice(1, 2), "v": 1}
        made = replace(made, call="attention", grad=n * m < 70_000, large=True, **sizes)
    return replace(made, asked=tuple(what for what in ("weights", "lse") if dice.chance(0.2 if large else 0.4)))


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: x for name, x in options.items() if x is not None}


def _plain_layer(dice: _Dice, made: Draw) -> Draw:
    made = replace(made, d=dice.choice(1, 2, 3, 8), v=max(made.v, 1), asked=())
    if made.call == "PositionWiseFFN":
        return replace(made, options={"activation": dice.choice("relu", "gelu")})
    return replace(made, options=_dropout(dice) if dice.chance(0.5) else {})


def _with_heads(dice: _Dice, made: Draw) -> Draw:
    """The same, of so many heads: one batch axis, or none or two where it is no layer."""
    lead = made.lead
    if made.call in check.PROJECTED:
        lead = () if dice.chance(0.2) else (int(dice.rng.integers(0, 4)),) if dice.chance(0.8) else (2, 1)
    heads, kv_heads = (1, 1) if made.call == "self_attention" else dice.choice(*HEADS)
    options = {"num_heads": heads, "num_kv_heads": kv_heads, "biases": dice.chance(0.5), "W_o": dice.chance(0.8)}
    n = max(made.n, 2) if made.call == "decoding" else made.n
    made = replace(made, lead=lead, kv=lead, n=n, d=dice.choice(1, 2, 3), v=dice.choice(1, 2), options=options)
    if made.call in (*DEEP, *DECODERS):
        options["activation"] = dice.choice("relu", "gelu")
        made = replace(made, asked=(), grad=False)
    return made


def _decoder(dice: _Dice, made: Draw) -> Draw:
    """Its lengths are those of the encoder's outputs; the rest is of the self-attention."""
    steps = made.n > 1 and dice.chance(0.5)
    options = {"steps": True} if steps else {}
    options |= _given(window=dice.choice(None, (1, 0), (2, 0)), softcap=dice.choice(None, 2.0))
    if dice.chance(0.6):
        options["valid_lens"] = dice.chance(0.5) and not steps  # whether of each query
    if not steps and dice.chance(0.4):
        options |= _dropout(dice)
    # in float32 the error that three norms allow is too large to show a fault
    return replace(made, options=made.options | options, dtype="float64")


def _restrictions(dice: _Dice, made: Draw) -> None:
    """Add what forbids pairs, and a bias."""
    options, axes = made.options, len(made.lead) + 2 + (made.call in HEADED and made.call != "self_attention")
    if dice.chance(0.3):
        options["mask"] = dice.axes(axes)
    if dice.chance(0.3):
        options["bias"] = dice.axes(axes)
    if dice.chance(0.35):
        options["valid_lens"] = dice.chance(0.5)
    if dice.chance(0.4):
        options["causal"] = True
    if dice.chance(0.3):
        options["window"] = dice.choice(0, 1, (2, 0), (0, None), (None, 1), (None, None))
    if dice.chance(0.4):
        per_entry = bool(made.lead) and dice.chance(0.4)
        options["query_offset"] = "each" if per_entry else int(dice.rng.integers(-2, made.m + 2))


def _formula(dice: _Dice, made: Draw) -> None:
    """Add how pairs are scored and weighed, and NaN in arrays, at pairs that may attend or at others."""
    options, headed, layer = made.options, made.call in HEADED, made.call in layers.LAYERS
    if dice.chance(0.3):
        options["scale"] = dice.choice(0.5, 1.0, 0.3, -1.5, 0.0)
    if dice.chance(0.2):
        options["softcap"] = dice.choice(0.5, 2.0)
    if dice.chance(0.15) and not headed:
        options["positions"] = dice.axes(len(made.lead) + 1, 1), int(dice.rng.integers(0, 4))
    if dice.chance(0.35) and not made.large and not layer:
        options["score"] = dice.choice(*(SCORES if not headed else pooling.SIMPLE))
    if dice.chance(0.25) and "lse" not in made.asked and not made.large and made.call not in DEEP:
        options["normalize"] = dice.choice(*NORMALISERS)
    if dice.chance(0.4) and not headed:
        options["poisoned"] = True
    finite_only = {options.get("score"), options.get("normalize")} & {*pooling.KERNELS, *NORMALISERS}
    if dice.chance(0.15) and made.call == "attention" and made.v and not finite_only:
        options["not_finite"] = dice.choice("query", "key", "value", "bias" if "bias" in options else "key")
    if dice.chance(0.3) and not {"normalize", "score"} & {*options} and not layer:
        options["sink"] = _sink(dice, made)
    if dice.chance(0.2) and not layer:
        options["return_scores"] = dice.choice("raw", "capped", "biased")
    if dice.chance(0.2) and "not_finite" not in options:
        options |= _dropout(dice)


def _dropout(dice: _Dice) -> dict[str, Any]:
    """The options of a call that drops by a seed; a layer has the rate, and its call the seed."""
    return {"dropout": dice.choice(0.1, 0.5, 0.9), "seed": dice.choice(0, 1, 2**64 - 1)}


def _sink(dice: _Dice, made: Draw) -> Any:
    """Which axes of the sink are full; "each": one logit for each query."""
    if made.call == "self_attention":
        return ()
    if made.call in HEADED:
        return (dice.chance(0.7),)
    return dice.choice("each", dice.axes(len(made.lead) + 2)[:-2])


def _functions_of_positions(dice: _Dice, made: Draw) -> None:
    """Add a mask or a bias by a function, and segments."""
    options = made.options
    if made.call in layers.LAYERS or made.large:
        return
    if "mask" not in options and dice.chance(0.15):
        options["mask"] = dice.choice(*functions.MASKS)
    if "bias" not in options and dice.chance(0.1):
        options["bias"] = dice.choice(*functions.BIASES)
    if dice.chance(0.15):
        options["segments"] = dice.choice("sorted", "apart")


def _of_the_layer(dice: _Dice, made: Draw) -> None:
    """Add what MultiHeadAttention's configuration has and no call of a function."""
    options = made.options
    if made.call != "MultiHeadAttention":
        return
    if made.d % 2 == 0 and options.get("query_offset") != "each" and dice.chance(0.4):
        options["rotary"] = dice.choice({}, {"interleaved": True, "base": 50.0})
    if dice.chance(0.3):
        options["qk_norm"] = 0.0625
    if "bias" not in options and dice.chance(0.4):
        options["alibi"] = tuple(0.5 * 2.0**-head for head in range(options["num_heads"]))


def number_of(name: str) -> int:
    """The number of the draw that a case by this name is made of.

    >>> number_of(case(draw(0, 3)).name)
    3
    """
    return int(name.split()[1])


# ---- the arrays of a draw, and its answer


def case(drawn: Draw) -> Case:
    """The call that is drawn, with its answer."""
    options = _options(drawn)
    name = f"draw {drawn.seed[-1]} of seed {drawn.seed[0]}: " + ", ".join([drawn.call, *drawn.options])
    if drawn.call in (*PLAIN, *DEEP, *DECODERS):
        made = _transformers(drawn, name, options)
    elif drawn.call in (*check.PROJECTED, "MultiHeadAttention"):
        made = _headed(drawn, name, options)
    else:
        made = _of_one_head(drawn, name, options)
    return replace(made, usual=(drawn.dtype,), output_only=drawn.output_only and made.call == "attention")


def _of_one_head(drawn: Draw, name: str, options: dict[str, Any]) -> Case:
    """Attention, in parts or not, or a layer that computes it, perhaps with NaN at pairs that may not, or may, attend."""
    q, k, x = (grid(drawn.rng(which), *shape) for which, shape in _shapes(drawn).items())
    if "normalize" in options and not _clear(q, k, x, options=options):
        options.pop("normalize")
    not_finite_array, group = options.pop("not_finite", None), "draws"
    if options.pop("poisoned", False):
        which = {n: x for n, x in options.items() if n not in ("scale", "softcap", "score", "normalize")}
        q, k, x, *bias = poisoned(drawn.rng("poison"), q, k, x, **which)
        options |= {"bias": bias[0]} if bias else {}
    if not_finite_array is not None:
        group, at = NOT_FINITE, {"query": q, "key": k, "value": x, **options}[not_finite_array]
        at.flat[drawn.rng("not_finite").integers(0, max(at.size, 1), min(at.size, 2))] = np.nan
    rng = drawn.rng("grad_output")
    made_with: dict[str, Any] = {"group": group, "rng": rng, "grad": drawn.grad, "asked": drawn.asked}
    if drawn.grad and "return_scores" in options and not_finite_array is None:
        made_with["grad"] = "scores"
    made = attend(name, q, k, x, **made_with, **options)
    made = replace(made, call=drawn.call)
    if drawn.call not in SCORED:
        return made
    weights = options["score"][1] if isinstance(options["score"], tuple) else {}
    return _of_layer(made, {"num_hiddens": len(weights["w_v"])} if drawn.call == "AdditiveAttention" else {}, weights)


def _shapes(drawn: Draw) -> dict[str, tuple[int, ...]]:
    return {
        "query": (*drawn.lead, drawn.n, drawn.d),
        "key": (*drawn.kv, drawn.m, drawn.d),
        "value": (*drawn.kv, drawn.m, drawn.v),
    }


def _options(drawn: Draw) -> dict[str, Any]:
    """The keywords of the call, where they are arrays: drawn."""
    n, m, options = drawn.n, drawn.m, dict(drawn.options)
    lead = oracle.leading(np.empty((*drawn.lead, n, 0)), np.empty((*drawn.kv, m, 0)))
    batch = lead[:1]
    if drawn.call in ("multi_head_attention", "MultiHeadAttention", *DEEP):
        lead = (*lead, options["num_heads"])
    if drawn.call in ("self_attention", *DEEP):
        m = n
    full = (*lead, n, m)

    def shape(axes: tuple[bool, ...], of: tuple[int, ...] = full) -> tuple[int, ...]:
        return tuple(
            size if whole else 1 for size, whole in zip(of[max(0, len(of) - len(axes)) :], axes[-len(of) :], strict=True)
        )

    if "segments" in options:
        kind, made = options["segments"], [drawn.rng(f"segments of {x}").integers(0, 3, (*batch, x)) for x in (n, m)]
        of_queries, of_keys = (np.sort(x) if kind == "sorted" else x for x in made)
        options["segments"] = of_queries if n == m else (of_queries, of_keys)
    if "mask" in options and not isinstance(options["mask"], str):
        rng = drawn.rng("mask")
        options["mask"] = np.asarray(rng.random(shape(options["mask"])) < rng.choice([0.3, 0.7, 1.0]))
    heads = () if drawn.call == "self_attention" else lead[-1:]
    if isinstance(options.get("bias"), str):
        options["bias"] = options["bias"], {"slopes": grid(drawn.rng("slopes"), *heads, 1, 1)}
    elif "bias" in options:
        rng, of = drawn.rng("bias"), shape(options["bias"])
        options["bias"] = np.where(rng.random(of) < rng.choice([0.0, 0.2]), -np.inf, grid(rng, *of))
    if "valid_lens" in options:
        rng, kind = drawn.rng("valid_lens"), drawn.rng("dtype of valid_lens").choice(["int64", "int32", "uint8"])
        of = (*batch, n) if options["valid_lens"] else batch
        options["valid_lens"] = np.asarray(rng.integers(0, m + 2, of)).astype(kind)
    if options.get("query_offset") == "each":
        options["query_offset"] = drawn.rng("query_offset").integers(-2, m + 2, batch)
    if "positions" in options:
        axes, size = options["positions"]
        options["positions"] = drawn.rng("positions").integers(-1, m, (*shape(axes, full[:-1]), size))
    if "sink" in options:
        rng, axes = drawn.rng("sink"), options["sink"]
        of = (*lead, n, 1) if axes == "each" else shape(axes, lead)
        options["sink"] = np.asarray(np.where(rng.random(of) < 0.1, -np.inf, grid(rng, *of)))
    if (name := SCORED.get(drawn.call, options.get("score"))) is not None:
        options["score"] = _score(drawn, name)
    return options


def _score(drawn: Draw, name: str) -> Any:
    """A score's name, with its parameters where it has some."""
    if name in pooling.KERNELS:
        return name, {"width": pooling.WIDTH}
    if name not in PARAMETRISED:
        return name
    _, parameters = next(x for x in pooling.parametrised(drawn.rng(name), drawn.d, drawn.d) if x[0] == name)
    if drawn.call in SCORED:
        parameters.pop("b", None)  # which no layer has
    return name, parameters


def _clear(*inputs: Any, options: dict[str, Any], weights_of: Any = oracle.weights) -> bool:
    """Whether rounding cannot take the normaliser over a kink: only then is there one answer."""
    options_kept = {name: x for name, x in options.items() if name not in ("poisoned", "not_finite", "seed")}
    if options_kept["normalize"] == "hardmax":
        options_kept |= {
            "normalize": "sparsemax",
            "scale": 1e3 * options_kept.get("scale", 1),
        }  # near the best, scores share its weight
        return bool((weights_of(*inputs, **options_kept) % 1 == 0).all())
    if options_kept["normalize"] == "proportional":  # terms that cancel exactly do not once they are rounded
        scores = weights_of(*inputs, **options_kept | {"normalize": "identity"})
        if ((np.abs(scores.sum(axis=-1)) < 0.05) & (scores != 0).any(axis=-1)).any():
            return False
    return kink_free(*inputs, weights_of=weights_of, **options_kept)


def _headed(drawn: Draw, name: str, options: dict[str, Any]) -> Case:
    """Multi-head attention, and what is made of a case of it: self-attention, decoding, the layer."""
    call, layer, steps = drawn.call, drawn.call in layers.LAYERS, options.pop("steps", False)
    counts = heads, kv_heads = options.pop("num_heads"), options.pop("num_kv_heads")
    biases, with_output, capacity = options.pop("biases"), options.pop("W_o"), options.pop("capacity", False)
    params = _projections(drawn, counts, biases, with_output)
    query = grid(drawn.rng("query"), *drawn.lead, drawn.n, 3)
    apart = call in ("multi_head_attention", "MultiHeadAttention") and not steps
    key, value = (grid(drawn.rng(x), *drawn.lead, drawn.m, 3) if apart else query for x in ("key", "value"))
    if "sink" in options and call != "self_attention":
        params["sink"] = options.pop("sink")
    config: dict[str, Any] = {n: options[n] for n in ("rotary", "qk_norm", "alibi") if n in options}  # not of its call
    if "qk_norm" in config:
        params |= {n: 1 + grid(drawn.rng(n), drawn.d, top=0.5) for n in ("q_norm", "k_norm")}
    if (slopes := options.pop("alibi", None)) is not None:
        options["bias"] = _falling(drawn, slopes, options.get("query_offset", 0))
    options |= {"causal": True} if steps or call == "decoding" else {}
    given = options | _over_heads(call, options)
    inputs = query, key, value
    if "normalize" in options and not _clear(
        *inputs, params, *counts, options=given, weights_of=oracle_layers.weights_of_heads
    ):
        given.pop("normalize")
    make: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "asked": drawn.asked}
    make["grad"] = drawn.grad and not _over_heads(call, options)
    made = multihead.multi_head(name, inputs, params, drawn.rng("grad_output"), **make, **given)
    made = replace(made, call=call)
    if call == "self_attention":
        made = multihead.as_self_attention(made, query)
        made = replace(made, arguments=made.arguments | {n: options[n] for n in _over_heads(call, options)})
    if call == "decoding":
        keywords = {n: x for n, x in made.keywords.items() if n != "causal"}
        keywords |= {"capacity": (*drawn.lead, kv_heads, drawn.n + 1, drawn.d, drawn.v)} if capacity else {}
        made = replace(made, keywords=keywords)
    if layer:
        arguments = {n: x for n, x in made.arguments.items() if n != "bias" or "alibi" not in config}
        keywords = {n: x for n, x in made.keywords.items() if n not in config}
        config |= {"num_hiddens": heads * drawn.d, "num_heads": heads, "num_kv_heads": kv_heads, "bias": biases}
        made = _of_layer(replace(made, arguments=arguments, keywords=keywords), config, params, steps)
    return replace(made, group="draws")


def _projections(drawn: Draw, counts: tuple[int, int], biases: bool, with_output: bool) -> dict[str, np.ndarray]:
    """The params; ``counts``: of heads, and of the heads of keys and values."""
    if drawn.call == "self_attention":
        biases = with_output = False
    sizes: dict[str, Any] = {"d": drawn.d, "v": drawn.v, "o": 2 if with_output else 0}
    if drawn.call in layers.LAYERS:  # whose output is as wide as its heads
        sizes = {"d": drawn.d, "v": drawn.d, "o": counts[0] * drawn.d}
    return multihead.params_of(drawn.rng("params"), *counts, **sizes, biases=multihead.BIASES if biases else ())


def _falling(drawn: Draw, slopes: tuple[float, ...], offset: Any) -> np.ndarray:
    """ALiBi's bias, by which a layer is to lower its scores."""
    distances = np.abs(np.arange(drawn.n)[:, None] + np.reshape(offset, (-1, 1, 1, 1)) - np.arange(drawn.m))
    bias: np.ndarray = -np.array(slopes)[:, None, None] * distances
    return bias


def _over_heads(call: str, options: dict[str, Any]) -> dict[str, Any]:
    """Masks of self-attention with an axis of heads, as those of multi-head attention have."""
    if call != "self_attention":
        return {}
    return {n: x[..., None, :, :] for n, x in options.items() if n in ("mask", "bias") and getattr(x, "ndim", 0) > 2}


def _of_layer(made: Case, config: dict[str, Any], weights: dict[str, np.ndarray], steps: bool = False) -> Case:
    """The case of the function as one of the layer that computes it, whose call gives no gradient by the bias."""
    arguments = {n: x for n, x in made.arguments.items() if n not in weights}
    keywords = {n: x for n, x in made.keywords.items() if n not in ("score", "num_heads", "num_kv_heads", "dropout")}
    config |= {n: x for n, x in made.keywords.items() if n == "dropout"}
    keywords |= {"inputs": ("query", "key", "value"), "config": config, "weights": weights} | ({"steps": True} if steps else {})
    answer = {what: x for what, x in made.answer.items() if what != "grad_bias"}
    return replace(made, arguments=arguments, keywords=keywords, answer=answer)


def _transformers(drawn: Draw, name: str, options: dict[str, Any]) -> Case:
    """The parts of a transformer that are not attention alone, by the output."""
    heads, kv_heads, use_bias = (options.pop(x, 1) for x in ("num_heads", "num_kv_heads", "biases"))
    activation, steps, _ = options.pop("activation", "relu"), options.pop("steps", False), options.pop("W_o", None)
    h, f, call = heads * drawn.d, drawn.v, drawn.call
    weights: dict[str, np.ndarray] = {}

    def add(prefix: str, **shapes: Any) -> None:
        weights.update({prefix + x: grid(drawn.rng(prefix + x), *shape, top=1.0) for x, shape in shapes.items()})

    def add_block(prefix: str) -> None:
        sizes = {"d": drawn.d, "v": drawn.d, "o": h, "biases": multihead.BIASES if use_bias else ()}
        for part in layers.ATTENTIONS if call in DECODERS else ("attention",):
            rng = drawn.rng(prefix if part == "attention" else prefix + part)
            params = multihead.params_of(rng, heads, kv_heads, (h, h, h), **sizes)
            weights.update({f"{prefix}{part}.{x}": W for x, W in params.items()})
        add(prefix + "ffn.", W_1=(h, f), b_1=(f,), W_2=(f, h), b_2=(h,))
        for part in ("addnorm1.", "addnorm2.", "addnorm3.")[: 3 if call in DECODERS else 2]:
            add(prefix + part, gamma=(h,), beta=(h,))

    inputs = {"X": grid(drawn.rng("X"), *drawn.lead, drawn.n, h)}
    dropout, seed = {n: options.pop(n) for n in ("dropout",) if n in options}, options.pop("seed", None)
    options |= {"rng": seed} if dropout else {}
    config: dict[str, Any] = {"num_hiddens": h}
    if call == "PositionalEncoding":
        options["offset"] = int(drawn.rng("offset").integers(0, 900))
    elif call == "AddNorm":
        config = {"norm_shape": h}
        inputs["Y"] = grid(drawn.rng("Y"), *drawn.lead, drawn.n, h)
        add("", gamma=(h,), beta=(h,))
    elif call == "PositionWiseFFN":
        config = {"ffn_num_hiddens": f, "ffn_num_outputs": 3, "activation": activation}
        add("", W_1=(h, f), b_1=(f,), W_2=(f, 3), b_2=(3,))
    else:
        config |= {"ffn_num_hiddens": f, "num_heads": heads, "num_kv_heads": kv_heads, "use_bias": bool(use_bias)}
        config["activation"] = activation
        of_tokens, blocks = call in ("TransformerEncoder", "TransformerDecoder"), 1 if call in DECODERS else 2
        if of_tokens:
            config |= {"vocab_size": 5, "num_blks": blocks}
            inputs["X"] = drawn.rng("X").integers(0, 5, (*drawn.lead, drawn.n))
            add("", embedding=(5, h))
        for prefix in [f"blocks.{i}." for i in range(blocks)] if of_tokens else ("",):
            add_block(prefix)
        if call == "TransformerDecoder":
            add("dense.", W=(h, 5), b=(5,))
    if call in DECODERS:
        inputs["enc_outputs"] = grid(drawn.rng("enc_outputs"), *drawn.lead, drawn.m, h)
        inputs |= {"enc_valid_lens": options.pop("valid_lens")} if "valid_lens" in options else {}
    options |= {"causal": True} if steps else {}
    config |= dropout
    answer = oracle_layers.layer(call, weights, [*inputs.values()], config, **options)
    arrays = {x: y for x, y in options.items() if isinstance(y, np.ndarray)}
    keywords = {x: y for x, y in options.items() if x not in arrays} | ({"steps": True} if steps else {})
    keywords |= {"inputs": (*inputs,), "config": config, "weights": weights}
    return Case(name, "draws", call, inputs | arrays, keywords, answer.values, answer.magnitude)


# ---- the smallest that fails


def smaller(drawn: Draw) -> Iterator[Draw]:
    """Draws with one thing less: an option, an axis, a size, a result; what makes most difference first."""
    needed = ("num_heads", "num_kv_heads", "biases", "W_o", "splits", "steps", "seed")
    for name in drawn.options:
        if name not in needed:
            removed = (name, "seed") if name == "dropout" else (name,)  # without a seed there would be no one answer
            yield replace(drawn, options={n: x for n, x in drawn.options.items() if n not in removed})
    of_the_batch = {"query_offset", "capacity"} & {*drawn.options} or drawn.call in layers.LAYERS
    if drawn.lead and not of_the_batch:
        yield replace(drawn, lead=(), kv=())
    if len(drawn.lead) > 1:
        yield replace(drawn, lead=drawn.lead[1:], kv=drawn.kv[1:])
    for size in ("n", "m", "d", "v"):
        now = getattr(drawn, size)
        for less in sorted({1, 2, now // 2, now - 1}):
            if 0 < less < now:
                yield replace(drawn, **{size: less})
    for axis, length in enumerate(drawn.lead):
        if length > 1 and drawn.kv[axis] in (1, length):
            lead, kv = ((*x[:axis], 1, *x[axis + 1 :]) for x in (drawn.lead, drawn.kv))
            yield replace(drawn, lead=lead, kv=kv)
    if drawn.options.get("num_heads", 1) > 1:
        yield replace(drawn, options={**drawn.options, "num_heads": 1, "num_kv_heads": 1})
    for name, less in (("biases", False), ("W_o", False)):
        if drawn.options.get(name):
            yield replace(drawn, options={**drawn.options, name: less})
    if drawn.asked and drawn.call != "split_attention":
        yield replace(drawn, asked=drawn.asked[1:])
    if drawn.grad:
        yield replace(drawn, grad=False)
    if drawn.output_only:
        yield replace(drawn, output_only=False)
    if drawn.dtype != "float64":
        yield replace(drawn, dtype="float64")


def shrink(backend: Any, drawn: Draw, tries: int = 300, device: str | None = None) -> tuple[Case, check.Result]:
    """The smallest case found that the backend fails, and a result of it that is wrong. ``drawn`` has to be one."""
    best, failure = drawn, _failure(backend, drawn, device)
    if failure is None:
        raise ValueError(f"{case(drawn).name}: this backend gives the answer")
    found = True
    while found:
        found = False
        for less in smaller(best):
            if tries <= 0:
                break
            tries -= 1
            try:
                worse = _failure(backend, less, device)
            except Exception:  # an option may need what was taken away: this is no smaller draw
                continue
            if worse is not None:
                best, failure, found = less, worse, True
                break
    assert failure is not None
    return case(best), failure


def _failure(backend: Any, drawn: Draw, device: str | None = None) -> check.Result | None:
    return next(iter(check.run(backend, [case(drawn)], device=device).failures), None)
