"""The scores that attention returns: what frameworks' derivatives find through them, in programs, and at no price unasked."""

import numpy as np
import pytest
from conftest import chosen
from tiling import SUBJECTS, subject

import kvattn

rng = np.random.default_rng(0)
SHAPES = (4, 5, 6), (2, 7, 6), (2, 7, 6), (4, 5, 7), (1, 5, 7)
QUERY, KEY, VALUE, GRAD, BIAS = (rng.normal(size=(2, *shape)) for shape in SHAPES)
CAUSAL = np.tri(5, 7, dtype=bool)
STAGES = ("raw", "capped", "biased")
ASKED = {"scale": 0.75, "softcap": 1.5, "causal": True}


def expected(stage, query, key):
    """The scores, and the gradients of sum(GRAD * scores) over the pairs that may attend, by query, key and bias."""
    key = np.repeat(key, 2, axis=1)
    raw = 0.75 * query @ key.swapaxes(-1, -2)
    capped = 1.5 * np.tanh(raw / 1.5)
    scores = {"raw": raw, "capped": capped, "biased": capped + BIAS}[stage]
    by_scores = np.where(CAUSAL, GRAD, 0)
    slope = 0.75 * by_scores * (1 if stage == "raw" else 1 - (capped / 1.5) ** 2)
    each = CAUSAL[..., None]
    by_query = np.where(each, slope[..., None] * key[..., None, :, :], 0).sum(axis=-2)
    by_key = np.where(each, slope[..., None] * query[..., :, None, :], 0).sum(axis=-3)
    by_key = by_key.reshape(2, 2, 2, 7, 6).sum(axis=2)
    return np.where(CAUSAL, scores, -np.inf), by_query, by_key, by_scores.sum(axis=1, keepdims=True) * (stage == "biased")


FRAMEWORKS = [name for name in SUBJECTS if name in chosen()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_differentiates_the_scores(framework, stage):
    differentiated(framework, stage, QUERY, KEY)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "mxnet"])  # a known difference
def test_nan_reaches_no_derivative_by_a_pair_that_may_not_attend(framework, stage):
    query, key = QUERY.copy(), KEY.copy()
    query[:, :, 2], key[:, :, 5:] = np.nan, np.nan
    differentiated(framework, stage, query, key)


def differentiated(framework, stage, query, key):
    this = subject(framework)
    arrays = [this.array(x) for x in (query, key, BIAS)]

    def scores(query, key, bias):
        return kvattn.attention(query, key, this.array(VALUE), bias=bias, **ASKED, return_scores=stage)[1] + 0 * bias

    with np.errstate(invalid="ignore"):
        found, *by = expected(stage, query, key)
    found_here, grads = this.vjp(scores, arrays, this.array(np.where(CAUSAL, GRAD, 0)))
    for got, want in zip((found_here, *grads), (found, *by), strict=True):
        np.testing.assert_allclose(kvattn.to_numpy(got), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("framework", [name for name in ("torch", "tensorflow", "jax") if name in chosen()])
def test_a_recorded_program_returns_scores(framework):
    arrays = [kvattn.asarray(x.astype("float32"), backend=framework) for x in (QUERY, KEY, VALUE)]

    def attend(query, key, value):
        return kvattn.attention(query, key, value, causal=True, return_lse=True, return_scores="capped", softcap=1.5)

    if framework == "tensorflow":
        import tensorflow as tf

        recorded = tf.function(attend)
    elif framework == "jax":
        import jax

        recorded = jax.jit(attend)
    else:
        import torch

        recorded = torch.compile(attend, backend="eager", fullgraph=True)
    for got, want in zip(recorded(*arrays), attend(*arrays), strict=True):
        np.testing.assert_allclose(kvattn.to_numpy(got), kvattn.to_numpy(want), rtol=0, atol=1e-4)


def test_what_computes_the_output_is_what_would_without_scores(backend):
    arrays = [kvattn.asarray(np.ones((1024, 64), "float32"), backend=backend)] * 3
    alone = kvattn.explain(*arrays)
    beside = kvattn.explain(*arrays, return_scores="raw")
    assert beside.kernel == alone.kernel
    assert beside.why == alone.why + "; the scores beside it"
