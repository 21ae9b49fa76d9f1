"""How far from the float64 answer a result may lie: derived, not tuned.

The unit of an error is eps(dtype) * magnitude, where the oracle computes the magnitude: what the last sum would be if no
term cancelled another. For outputs that is max |value| (the weights are convex), for weights 1, for lse max(1, |lse|),
for gradients the same sums of products over absolute values: |P|^T |G| for the values; P (|dP| + sum_j P |dP|) for the
scores' gradient dS, dP = G V^T; |dS| |ds/dq| for the queries, and so on. Inputs lie on a grid that every dtype holds
exactly, so that one answer serves all and only the arithmetic is judged.

Allowed, in those units:

- values: CONSTANT + S, S = the largest |score| (at every product and with the bias, in absolute values). A score that is
  rounded is off by eps * S, and softmax turns an absolute error of the score into as large a relative error of the
  weight. The rest does not depend on the scores: exp, the sum, the division, the product and the sum over the values are
  half an eps each or a little more, so CONSTANT = 4. Normalisers without exp have S = 0: the score's relative error is
  in their magnitude.
- gradients: twice that, for the weights' error enters dS = P (dP - sum_j P dP) twice.
- half precision: all of that in float32, which computes it (times eps(float32) / eps(dtype)), plus the half unit of
  rounding the result once; a gradient may be rounded once more, before it is summed over a broadcast axis. So a softmax
  computed in half precision, or a score stored in it, is outside. lse and scores stay float32 and are judged so.

A unit is never below the smallest number that dtype holds as a normal (float16: at all), so that flushing to zero passes.
"""

from __future__ import annotations

CONSTANT = 4.0
ROUNDING = 0.5

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FLOOR = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
HALF = ("float16", "bfloat16")


def result_dtype(call: str, what: str, dtype: str) -> str:
    """The dtype that api.py promises for a result: scores and lse of half precision come in float32."""
    wide = dtype in HALF and (what in ("lse", "scores") or call.endswith(("_score", "_kernel")))
    return "float32" if wide else dtype


def unit(dtype: str, magnitude: float) -> float:
    return max(EPS[dtype] * magnitude, FLOOR[dtype])


def allowed(what: str, dtype: str, largest_score: float, roundings: int = 1) -> float:
    """The error that a result of ``dtype`` may have, in units, if it was rounded to ``dtype`` so many times."""
    gradient = what.startswith("grad_")
    steps = (CONSTANT + (0 if what == "scores" else largest_score)) * (2 if gradient else 1)
    return ROUNDING * (roundings + gradient) + steps * EPS["float32"] / EPS[dtype] if dtype in HALF else steps
