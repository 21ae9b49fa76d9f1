"""The answers of multi-head attention and of a transformer's other layers, in float64, over those of `oracle`.

Projections, norms and rotations, and the way back through them, are sums written out, over values and over absolute values.
The layers that hold them are computed on pairs (value, magnitude), and have no gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvattn.conformance import oracle, tolerance
from kvattn.conformance.oracle import Array, Pair


def multi_head_attention(query: Array, key: Array, value: Array, params: dict[str, Array], num_heads: int, num_kv_heads: int,
                         grad_output: Array | None = None, rotary: dict[str, Any] | None = None, qk_norm: float | None = None,
                         **options: Any) -> oracle.Answer:  # fmt: skip
    """Heads by `attention`; projections and their gradients are sums written out, over values and over absolute values."""
    if "sink" in params:
        options["sink"] = params["sink"]
    size = {name: np.abs(x) for name, x in params.items()}
    inputs, heads = {"query": query, "key": key, "value": value}, (num_heads, num_kv_heads, num_kv_heads)
    projected = [split(project(x, params, n[0]), h) for (n, x), h in zip(inputs.items(), heads, strict=True)]
    absolute = [split(project(np.abs(x), size, n[0]), h) for (n, x), h in zip(inputs.items(), heads, strict=True)]
    steps: list[Any] = []  # the norm and the rotation of queries and keys, for the gradients
    for at, first in enumerate((options.get("query_offset", 0), 0)):
        norm = rotation = None
        if qk_norm is not None:
            norm = _RowNorm(params["qk"[at] + "_norm"], projected[at], absolute[at], qk_norm)
            projected[at], absolute[at] = norm.forward()
        if rotary is not None:
            rotation = _Rotation(projected[at].shape, int(first), **rotary)
            projected[at], absolute[at] = rotation.values(projected[at]), rotation.sizes(absolute[at])
        steps.append((norm, rotation))
    grad_heads: list[Any] = [None, None]  # the gradient of the joined heads' output, and its magnitude
    if grad_output is not None:
        grad_heads = [grad_output, np.abs(grad_output)]
        if "W_o" in params:
            grad_heads = [grad_heads[0] @ params["W_o"].T, grad_heads[1] @ size["W_o"].T]
        grad_heads = [split(x, num_heads) for x in grad_heads]
    if query.ndim == 2 and (lens := options.get("valid_lens")) is not None:  # no batch axis: every head has these lengths
        options["valid_lens"] = np.broadcast_to(lens, (num_heads, *np.shape(lens)))
    with np.errstate(invalid="ignore"):
        q, k, v = projected
        values, sizes, largest = oracle.Attention(q, k, v, grad_heads[0], options, [*absolute, grad_heads[1]]).answer()
    joined, top = join(values["output"]), np.max(sizes["output"])
    values["output"], sizes["output"] = project(joined, params, "o"), project(np.full(joined.shape, top), size, "o")
    if grad_output is not None:
        _grad_of_projected(steps, values, sizes)
        _by_projections(values, params, inputs, joined, grad_output)
        absolute_inputs = {name: np.abs(x) for name, x in inputs.items()}
        _by_projections(sizes, size, absolute_inputs, joined * 0 + top, np.abs(grad_output))
    if "scores" in sizes:
        sizes["scores"] = 3 * sizes["scores"]  # query, key, product: each rounds
    kept = {"output", "weights", "lse", "scores", *(f"grad_{name}" for name in (*inputs, *params))}
    values = {name: x for name, x in values.items() if name in kept}
    sizes = oracle.largest_finite({name: sizes[name] for name in values})
    roundings = 3 + 3 * (qk_norm is not None) + (rotary is not None)  # query, key, product: each rounds
    return oracle.Answer(oracle.with_inf(values), sizes, roundings * largest)


def split(x: Array, heads: int) -> Array:
    """(..., n, heads * c) to (..., heads, n, c)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def join(x: Array) -> Array:
    """(..., heads, n, c) to (..., n, heads * c)."""
    return x.swapaxes(-2, -3).reshape(*x.shape[:-3], x.shape[-2], x.shape[-3] * x.shape[-1])


def project(x: Array, params: dict[str, Array], name: str) -> Array:
    """x W + b, by the params of that letter: q, k, v or o; x, where there is no such W."""
    return x @ params[f"W_{name}"] + params.get(f"b_{name}", 0.0) if f"W_{name}" in params else x


def _grad_of_projected(steps: list[Any], values: dict[str, Array], sizes: dict[str, Any]) -> None:
    """The gradients by what is projected, of those by what heads attend to: back through rotations and norms."""
    for name, (norm, rotation) in zip(("query", "key"), steps, strict=True):
        by, by_size = values["grad_" + name], sizes["grad_" + name]
        if rotation is not None:
            by, by_size = rotation.values(by, inverse=True), rotation.sizes(by_size)
        if norm is not None:
            weight = f"grad_{name[0]}_norm"
            by, by_size, values[weight], sizes[weight] = norm.backward(by, by_size)
        values["grad_" + name], sizes["grad_" + name] = by, by_size


def _by_projections(
    found: dict[str, Any], params: dict[str, Array], inputs: dict[str, Array], joined: Array, grad: Array
) -> None:
    """The gradients by the inputs and by the projections, of those by what is projected. ``joined``: the heads' output."""
    for name, x in inputs.items():
        by = join(found["grad_" + name])
        found["grad_W_" + name[0]] = oracle.flat(x).T @ oracle.flat(by)
        found["grad_b_" + name[0]] = oracle.flat(by).sum(axis=0)
        found["grad_" + name] = by @ params["W_" + name[0]].T
    found["grad_W_o"], found["grad_b_o"] = oracle.flat(joined).T @ oracle.flat(grad), oracle.flat(grad).sum(axis=0)


class _RowNorm:
    """RMSNorm of rows, x / sqrt(mean(x^2) + epsilon) * weight, and the way back; ``size``: the magnitude of x."""

    def __init__(self, weight: Array, x: Array, size: Array, epsilon: float) -> None:
        self.weight, self.x, self.size = weight, x, size
        self.scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)

    def forward(self) -> Pair:
        spread = np.abs(self.x) * self.scale**2 * (np.abs(self.x) * self.size).mean(axis=-1, keepdims=True)
        return self.x * self.scale * self.weight, (self.size + spread) * self.scale * np.abs(self.weight)

    def backward(self, by: Array, by_size: Array) -> tuple[Array, Array, Array, Array]:
        """The gradients by x and by the weight, each with its magnitude."""
        d = self.x.shape[-1]
        inner, inner_size = by * self.weight, by_size * np.abs(self.weight)
        along = (inner * self.x).mean(axis=-1, keepdims=True)
        along_size = (inner_size * self.size).mean(axis=-1, keepdims=True)
        by_x = self.scale * (inner - self.x * self.scale**2 * along)
        grown = (1 + self.size * self.scale).max(initial=0)
        by_x_size = self.scale * (inner_size + self.size * self.scale**2 * along_size) * grown
        by_weight = (by * self.x * self.scale).reshape(-1, d).sum(axis=0)
        by_weight_size = (by_size * self.size * self.scale).reshape(-1, d).sum(axis=0)
        return by_x, by_x_size, by_weight, by_weight_size


class _Rotation:
    """Rotary embedding of rows (..., n, d) from a position on, as cosines and sines written out; back by the same angles."""

    def __init__(self, shape: tuple[int, ...], first: int, base: float = 10000.0, interleaved: bool = False,
                 rotary_dim: int | None = None, scaling: dict[str, Any] | None = None) -> None:  # fmt: skip
        n, d = shape[-2:]
        width = d if rotary_dim is None else rotary_dim
        self.map = np.zeros((n, d, d)) + np.eye(d)  # row i becomes map[i] @ row
        for i in range(n):
            for pair in range(width // 2):
                a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
                frequency, factor = oracle.frequency_of(pair, width, base, scaling or {}, first + n)
                angle = (first + i) * frequency
                cos, sin = factor * math.cos(angle), factor * math.sin(angle)
                self.map[i, a, a], self.map[i, a, b], self.map[i, b, a], self.map[i, b, b] = cos, -sin, sin, cos

    def values(self, x: Array, inverse: bool = False) -> Array:
        return np.einsum("nij,...ni->...nj" if inverse else "nij,...nj->...ni", self.map, x)

    def sizes(self, x: Array) -> Array:
        both = np.maximum(np.abs(self.map), np.abs(self.map).swapaxes(-1, -2))
        return np.einsum("nij,...nj->...ni", both, x)


# ---- the other layers of a transformer, on pairs (value, magnitude)


def layer(name: str, weights: dict[str, Array], inputs: list[Array], config: dict[str, Any], **options: Any) -> oracle.Answer:
    """The output of a layer of kvattn that is no attention on its own: by weights of kvattn's names.

    With a ``dropout`` in its configuration and a seed, ``rng``, it is the output in training.
    """
    X = (inputs[0], np.abs(inputs[0]))
    seed = options.pop("rng", None)
    if name == "AddNorm":
        made = _norm(_added(X, _dropped((inputs[1], np.abs(inputs[1])), config, seed)), weights)
    elif name == "PositionWiseFFN":
        made = _feed_forward(X, weights, config["activation"])
    elif name == "PositionalEncoding":
        made = _dropped(_placed(X, options.get("offset", 0)), config, seed)
    elif name == "TransformerEncoderBlock":
        made = _block(X, weights, config, options, seed)
    elif name.startswith("TransformerDecoder"):
        made = _decoded(name, weights, inputs, config, options, seed)
    else:
        made = _embedded(inputs[0], weights, config, seed)
        for i in range(config["num_blks"]):
            made = _block(made, _under(weights, f"blocks.{i}"), config, options, _part(seed, 1 + i))
    return oracle.Answer({"output": made[0]}, oracle.largest_finite({"output": made[1]}), 0.0)


def _under(weights: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix + "."): x for name, x in weights.items() if name.startswith(prefix + ".")}


def _part(seed: int | None, number: int) -> int | None:
    """The seed of that part of a layer."""
    return None if seed is None else oracle.splitmix64(seed, number)


def _dropped(X: Pair, config: dict[str, Any], seed: int | None) -> Pair:
    """X (batch, n, features) with entries dropped as weights are, a feature in the place of a key."""
    if seed is None:
        return X
    places = [(at, at) for at in np.ndindex(X[0].shape)]
    share = oracle.survivors(places, X[0].shape[:-2], config["dropout"], seed).reshape(X[0].shape)
    return X[0] * share, X[1] * share


def _embedded(tokens: Array, w: dict[str, Array], config: dict[str, Any], seed: int | None) -> Pair:
    X = w["embedding"][tokens] * np.sqrt(config["num_hiddens"])
    return _dropped(_placed((X, np.abs(X))), config, _part(seed, 0))


def _placed(X: Pair, offset: int = 0) -> Pair:
    n, h = X[0].shape[-2:]
    P = np.zeros((n, h))
    for i, j in np.ndindex(n, h):
        angle = (i + offset) / 10000 ** ((j - j % 2) / h)
        P[i, j] = np.cos(angle) if j % 2 else np.sin(angle)
    return X[0] + P, X[1] + np.abs(P)


def _norm(X: Pair, w: dict[str, Array]) -> Pair:
    """Layer norm: an error of X changes the centred features, and the deviation that divides them."""
    centred, size = X[0] - X[0].mean(axis=-1, keepdims=True), X[1] + X[1].mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5)
    unit = centred / deviation
    size = size / deviation + np.abs(unit) * (np.abs(unit) * size / deviation).mean(axis=-1, keepdims=True)
    return unit * w["gamma"] + w["beta"], size * np.abs(w["gamma"]) + np.abs(w["beta"])


def _feed_forward(X: Pair, w: dict[str, Array], activation: str) -> Pair:
    X = _dense(X, w, "1")
    if activation == "relu":
        return _dense((np.maximum(X[0], 0), X[1]), w, "2")
    erfc = np.vectorize(math.erfc, otypes=[float])
    return _dense((X[0] * erfc(-X[0] / math.sqrt(2)) / 2, 2 * X[1]), w, "2")  # of a slope below 1.13, and rounded itself


def _dense(X: Pair, w: dict[str, Array], name: str) -> Pair:
    W, b = w[f"W_{name}"], w[f"b_{name}"]
    return X[0] @ W + b, X[1] @ np.abs(W) + np.abs(b)


def _block(X: Pair, w: dict[str, Array], config: dict[str, Any], options: dict[str, Any], seed: int | None) -> Pair:
    seeds = [_part(seed, part) for part in range(3)]
    Y = _attended(X, X, _under(w, "attention"), config, options, seeds[0])
    Y = _norm(_added(X, _dropped(Y, config, seeds[1])), _under(w, "addnorm1"))
    Z = _feed_forward(Y, _under(w, "ffn"), config["activation"])
    return _norm(_added(Y, _dropped(Z, config, seeds[2])), _under(w, "addnorm2"))


def _decoded(name: str, w: dict[str, Array], inputs: list[Array], config: dict[str, Any], options: dict[str, Any],
             seed: int | None) -> Pair:  # fmt: skip
    """A decoder or its block, of inputs X, the encoder's outputs, and their lengths, if there are three."""
    outputs, lens = (inputs[1], np.abs(inputs[1])), {"valid_lens": inputs[2]} if len(inputs) > 2 else {}

    def block(X: Pair, w: dict[str, Array], seed: int | None) -> Pair:
        seeds = [_part(seed, part) for part in range(5)]
        Y = _attended(X, X, _under(w, "attention1"), config, {**options, "causal": True}, seeds[0])
        Y = _norm(_added(X, _dropped(Y, config, seeds[1])), _under(w, "addnorm1"))
        Z = _attended(Y, outputs, _under(w, "attention2"), config, lens, seeds[2])
        Z = _norm(_added(Y, _dropped(Z, config, seeds[3])), _under(w, "addnorm2"))
        made = _feed_forward(Z, _under(w, "ffn"), config["activation"])
        return _norm(_added(Z, _dropped(made, config, seeds[4])), _under(w, "addnorm3"))

    if name == "TransformerDecoderBlock":
        return block((inputs[0], np.abs(inputs[0])), w, seed)
    made = _embedded(inputs[0], w, config, seed)
    for i in range(config["num_blks"]):
        made = block(made, _under(w, f"blocks.{i}"), _part(seed, 1 + i))
    return _dense(made, {"W_d": w["dense.W"], "b_d": w["dense.b"]}, "d")


def _added(X: Pair, Y: Pair) -> Pair:
    return X[0] + Y[0], X[1] + Y[1]


def _attended(Q: Pair, K: Pair, params: dict[str, Array], config: dict[str, Any], options: dict[str, Any],
              seed: int | None) -> Pair:  # fmt: skip
    """Multi-head attention of Q to K, whose values are its keys."""
    heads = config["num_heads"], config["num_kv_heads"]
    rate = 0.0 if seed is None else config["dropout"]
    options = options if seed is None else {**options, "dropout": rate, "rng": seed}
    attended = multi_head_attention(Q[0], K[0], K[0], params, *heads, **options)
    rounded = attended.magnitude["output"] * (1 + attended.largest_score / tolerance.CONSTANT)  # see tolerance.py
    moved = _moved(Q, K, params, config["num_hiddens"] // heads[0], options.get("scale"))
    return attended.values["output"], rounded + moved / (1 - rate)  # what is left of the weights is as much larger


def _moved(Q: Pair, K: Pair, params: dict[str, Array], d: int, scale: float | None) -> Array:
    """How far an error of Q and K moves the output of attention: a weight by at most twice what any score moves by."""
    top, error = {}, {}
    for name, X in zip("qkv", (Q, K, K), strict=True):
        W = np.abs(params[f"W_{name}"])
        top[name] = (np.abs(X[0]) @ W + np.abs(params.get(f"b_{name}", 0.0))).max(initial=0)
        error[name] = (X[1] @ W).max(initial=0)
    by_score = d * (1 / np.sqrt(d) if scale is None else abs(scale)) * (error["q"] * top["k"] + top["q"] * error["k"])
    return (2 * by_score * top["v"] + error["v"]) * np.abs(params["W_o"]).sum(axis=0)


def weights_of_heads(*inputs: Any, **options: Any) -> Array:
    return multi_head_attention(*inputs, **options).values["weights"]
