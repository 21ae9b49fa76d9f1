"""The answers of the golden set, by mpmath: ``python tests/golden_answers.py`` writes kvattn/conformance/golden.json again.

They are written from kvattn/api.py a second time: loops over single numbers, gradients by central differences of the whole
loss, good to 30 digits.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from kvattn.conformance.cases import grid
from kvattn.conformance.golden import FILE

DIGITS = 50
STEP = 20  # differences of 1e-20: an error of 1e-40 from the formula, and as much from rounding


def inputs() -> list[dict[str, Any]]:
    """The calls of the golden set, without their answers."""
    rng = np.random.default_rng(2017)
    additive = {"W_q": grid(rng, 2, 2), "W_k": grid(rng, 2, 2), "w_v": grid(rng, 2), "b": grid(rng, 2)}
    mask = np.array([[True, False, True, True], [False] * 4, [True] * 4])
    calls: dict[str, dict[str, Any]] = {
        "plain": {},
        "masked, with an empty row": {"mask": mask},
        "causal, offset per batch": {"causal": True, "query_offset": np.array([1, -1])},
        "valid_lens": {"valid_lens": np.array([3, 0])},
        "bias": {"bias": grid(rng, 2, 3, 4), "scale": 0.75},
        "softcap, bias and mask": {"softcap": 1.0, "bias": np.array([0.5, -np.inf, 1.0, -2.0]), "mask": mask},
        "window": {"window": (1, 0), "query_offset": 1},
        "scores of 1000": {"scale": 512.0},
        "additive": {"score": ("additive_score", additive)},
        "gated": {"score": ("gated_score", {"w_g": grid(rng, 4)})},
        "distance, causal": {"score": "distance_score", "causal": True},
        "cosine": {"score": "cosine_score", "scale": 4.0},
        "gaussian kernel, proportional": {"score": ("gaussian_kernel", {"width": 1.5}), "normalize": "proportional"},
        "sparsemax": {"score": "dot_score", "normalize": "sparsemax", "mask": mask},
    }
    made = []
    for name, options in calls.items():
        arguments = {"query": grid(rng, 2, 2, 3, 2), "key": grid(rng, 2, 1, 4, 2), "value": grid(rng, 2, 1, 4, 2)}
        arguments |= {"grad_output": grid(rng, 2, 2, 3, 2)}
        arguments |= {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
        keywords = {n: x for n, x in options.items() if n not in arguments}
        keywords |= {"return_weights": True} | ({} if "normalize" in options else {"return_lse": True})
        made.append({"name": f"golden: {name}", "arguments": arguments, "keywords": keywords})
    return made


def solve(arguments: dict[str, Any], keywords: dict[str, Any]) -> dict[str, np.ndarray]:
    """The answer to a call, by mpmath."""
    import mpmath

    with mpmath.workdps(DIGITS + 10):
        given = {
            n: _exact(x) if n in ("query", "key", "value", "bias") else x for n, x in arguments.items() if n != "grad_output"
        }
        options = dict(keywords)
        score = options.pop("score", "scaled_dot_score")
        score, parameters = score if isinstance(score, tuple) else (score, {})
        parameters = {n: _exact(x) if isinstance(x, np.ndarray) else x for n, x in parameters.items()}
        output, weights, lse = _attention(score, parameters, **given, **options)
        answer = {"output": output, "weights": weights} | ({"lse": lse} if options.get("return_lse") else {})
        varied = {n: x for n, x in (given | parameters).items() if isinstance(x, np.ndarray) and x.dtype == object}
        h = mpmath.mpf(10) ** -STEP
        for name, x in varied.items():
            grad = np.empty(x.shape, object)
            for at in np.ndindex(*x.shape):
                sides = []
                for step in (h, -h):
                    moved = x.copy()
                    moved[at] += step
                    these = [{n: moved if n == name else y for n, y in part.items()} for part in (parameters, given)]
                    sides.append((_attention(score, these[0], **these[1], **options)[0] * arguments["grad_output"]).sum())
                grad[at] = (sides[0] - sides[1]) / (2 * h)
            answer[f"grad_{name}"] = grad
        return {name: np.array([_double(number) for number in x.ravel()]).reshape(x.shape) for name, x in answer.items()}


def _exact(x: np.ndarray) -> np.ndarray:
    import mpmath

    return np.array([mpmath.mpf(float(number)) for number in x.ravel()], object).reshape(x.shape)


def _double(number: Any) -> float:
    return 0.0 if abs(number) < 1e-30 else float(number)


def _attention(
    score, parameters, query, key, value, *, normalize="softmax", mask=None, bias=None, valid_lens=None, causal=False,
    query_offset=0, window=(None, None), scale=None, softcap=None, return_weights=True, return_lse=True,
):  # fmt: skip
    import mpmath

    (batch, heads, n, _), (kv_heads, m) = query.shape, key.shape[1:3]
    output = np.full((batch, heads, n, value.shape[-1]), mpmath.mpf(0), object)
    weights, lse = np.full((batch, heads, n, m), mpmath.mpf(0), object), np.full((batch, heads, n), mpmath.mpf("-inf"), object)
    for b, h, i in np.ndindex(batch, heads, n):
        scores = {}
        for j in range(m):
            ahead = j - (i + int(np.broadcast_to(query_offset, batch)[b]))
            hidden = mask is not None and not np.broadcast_to(mask, weights.shape)[b, h, i, j]
            hidden |= valid_lens is not None and j >= valid_lens[b]
            hidden |= causal and ahead > 0
            hidden |= window[0] is not None and ahead < -window[0]
            hidden |= window[1] is not None and ahead > window[1]
            added = mpmath.mpf(0) if bias is None else np.broadcast_to(bias, weights.shape)[b, h, i, j]
            if hidden or added == mpmath.mpf("-inf"):
                continue
            s = _score(score, [*query[b, h, i]], [*key[b, h // (heads // kv_heads), j]], scale is not None, **parameters)
            s = s if scale is None else s * scale
            s = s if softcap is None else softcap * mpmath.tanh(s / softcap)
            scores[j] = s + added
        if not scores:
            continue
        if normalize == "sparsemax":
            for size in range(1, len(scores) + 1):
                best = sorted(scores.values(), reverse=True)[:size]
                if 1 + size * best[-1] > sum(best):
                    threshold = (sum(best) - 1) / size
            row = {j: max(s - threshold, mpmath.mpf(0)) for j, s in scores.items()}
        else:
            row = {j: mpmath.exp(s) if normalize == "softmax" else s for j, s in scores.items()}
            total = sum(row.values())
            row = {j: w / total for j, w in row.items()}
            lse[b, h, i] = mpmath.log(total)
        for j, w in row.items():
            weights[b, h, i, j] = w
            for c in range(value.shape[-1]):
                output[b, h, i, c] += w * value[b, h // (heads // kv_heads), j, c]
    return output, weights, lse


def _score(name, q, k, scaled, W_q=None, W_k=None, w_v=None, b=None, w_g=None, width=None):
    import mpmath

    dot = sum(x * y for x, y in zip(q, k, strict=True))
    squares = sum((x - y) ** 2 for x, y in zip(q, k, strict=True))
    if name == "scaled_dot_score":
        return dot if scaled else dot / mpmath.sqrt(len(q))
    if name == "dot_score":
        return dot
    if name == "distance_score":
        return -squares / 2
    if name == "gaussian_kernel":
        return mpmath.exp(-squares / (2 * mpmath.mpf(width) ** 2))
    if name == "cosine_score":
        return dot / mpmath.sqrt(sum(x * x for x in q)) / mpmath.sqrt(sum(y * y for y in k))
    if name == "gated_score":
        return dot / (1 + mpmath.exp(-sum(w * x for w, x in zip(w_g, q + k, strict=True))))
    total = mpmath.mpf(0)
    for unit in range(len(w_v)):
        hidden = b[unit] + sum(x * w for x, w in zip(q, W_q[:, unit], strict=True))
        total += w_v[unit] * mpmath.tanh(hidden + sum(x * w for x, w in zip(k, W_k[:, unit], strict=True)))
    return total


def _encode(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return {"array": x.ravel().tolist(), "shape": x.shape, "dtype": x.dtype.name}
    if isinstance(x, dict):
        return {n: _encode(y) for n, y in x.items()}
    return {"tuple": [_encode(y) for y in x]} if isinstance(x, tuple) else x


def main() -> None:
    entries = [{**_encode(call), "answer": _encode(solve(call["arguments"], call["keywords"]))} for call in inputs()]
    FILE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
