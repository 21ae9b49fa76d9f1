"""What must hold for any arguments, on every backend; `pytest tests/test_properties.py --examples 10000` looks further."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
from conftest import chosen
from hypothesis import given
from hypothesis import strategies as st

import kvattn

# Few shapes, many contents and options: a framework that compiles for each new shape would spend its time on that.
LEADS = [((), ()), ((2,), (2,)), ((2, 4), (2, 2)), ((2, 2), (2, 1))]
CONVEX = ["softmax", "sparsemax", "hardmax", "average"]


@pytest.fixture(autouse=True, scope="module")
def _few_compilations():
    """JAX's tab compiles each combination of options, 0.1 s that one call does not earn back: here it runs step by step."""
    with pytest.MonkeyPatch.context() as patch:
        if "jax" in chosen():
            programs = kvattn.dispatch.load("jax").programs
            patch.setattr(programs, "_run", programs._run.__wrapped__)
        yield


@dataclass
class Call:
    """One drawn call of attention, on NumPy arrays; ``options`` hold whatever keyword was drawn."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    options: dict = field(default_factory=dict)

    def __call__(self, backend, **more):
        result = kvattn.attention(self.query, self.key, self.value, **self.options, **more, backend=backend)
        return tuple(map(kvattn.to_numpy, result)) if isinstance(result, tuple) else kvattn.to_numpy(result)

    @property
    def tolerance(self):
        """In the output's units: eps times the conditioning of the softmax times the size of the values."""
        finite = [x[np.isfinite(x)] for x in (self.query, self.key, self.value, self.options.get("bias", np.zeros(1)))]
        q, k, v, b = (abs(x.astype(np.float64)).max(initial=0) for x in finite)
        eps = np.finfo(self.query.dtype).eps
        return 4 * eps * (4 + self.query.shape[-1] * q * k + b) * max(v, 1)


@st.composite
def calls(draw, keys=(1, 4), positional=True, dtypes=("float64", "float32", "float16")):
    lead, kv_lead = draw(st.sampled_from(LEADS))
    n, m, dtype = draw(st.sampled_from((1, 3))), draw(st.sampled_from(keys)), draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from((0.1, 1.0, 3.0)))
    q, k, v = (
        (scale * rng.standard_normal(shape)).astype(dtype) for shape in ((*lead, n, 2), (*kv_lead, m, 2), (*kv_lead, m, 3))
    )
    options = {}
    if draw(st.booleans()):
        options["mask"] = rng.random((n, m)) < draw(st.sampled_from((0.3, 0.8)))
    if draw(st.booleans()):
        options["bias"] = rng.standard_normal((*lead, n, m)).astype(dtype)
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from((0.5, 5.0)))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((0.25, 1.0)))
    if positional:
        if draw(st.booleans()):
            shape = draw(st.sampled_from((lead[:1], (*lead[:1], n))))
            options["valid_lens"] = rng.integers(0, m + 2, shape)
        options["causal"] = draw(st.booleans())
        options["query_offset"] = draw(st.integers(-2, m))
        options["window"] = draw(st.sampled_from((None, 0, 1, (1, None), (None, 2))))
    return Call(q, k, v, options)


def close(a, b, tolerance):
    assert a.shape == b.shape
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
    finite = ~np.isneginf(a)
    assert np.isfinite(a[finite]).all()
    assert abs(a[finite] - b[finite]).max(initial=0) <= tolerance


@given(call=calls(positional=False), data=st.data())
def test_permuting_the_pairs_changes_nothing(backend, call, data):
    order = np.array(data.draw(st.permutations(range(call.key.shape[-2]))))
    options = {name: x[..., order] if name in ("mask", "bias") else x for name, x in call.options.items()}
    other = Call(call.query, call.key[..., order, :], call.value[..., order, :], options)
    close(call(backend), other(backend), call.tolerance)


@given(call=calls(positional=False), data=st.data())
def test_permuting_the_queries_permutes_the_outputs(backend, call, data):
    order = np.array(data.draw(st.permutations(range(call.query.shape[-2]))))
    options = {name: x[..., order, :] if name in ("mask", "bias") else x for name, x in call.options.items()}
    close(call(backend)[..., order, :], Call(call.query[..., order, :], call.key, call.value, options)(backend), call.tolerance)


@pytest.mark.parametrize("normalize", CONVEX)
@given(call=calls())
def test_the_output_lies_within_the_values(backend, normalize, call):
    output, weights = call(backend, normalize=getattr(kvattn, normalize), return_weights=True)
    output, weights = output.astype(np.float64), weights.astype(np.float64)
    low, high = (
        np.repeat(f(call.value.astype(np.float64), axis=-2, keepdims=True), _groups(call), axis=max(-3, -call.value.ndim))
        for f in (np.min, np.max)
    )
    attends = (weights != 0).any(axis=-1, keepdims=True)
    slack = call.tolerance
    assert (weights >= 0).all()
    assert ((output >= low - slack) & (output <= high + slack) | ~attends).all()
    assert (output[~attends[..., 0]] == 0).all()
    eps = np.finfo(call.query.dtype).eps
    assert abs(weights.sum(axis=-1, keepdims=True)[attends] - 1).max(initial=0) <= 8 * eps


def _groups(call):
    return call.query.shape[-3] // call.key.shape[-3] if call.key.ndim > 2 else 1


@given(call=calls(), constant=st.sampled_from((-3.0, 0.5, 8.0)))
def test_a_constant_added_to_the_scores_changes_nothing(backend, call, constant):
    bias = call.options.get("bias", np.zeros((1, 1), call.query.dtype))
    shifted = replace(call, options={**call.options, "bias": (bias + constant).astype(bias.dtype)})
    eps = np.finfo(bias.dtype).eps
    spread = 2 * eps * abs(bias + constant).max() * abs(call.value).max()  # the bias itself is rounded
    close(call(backend), shifted(backend), shifted.tolerance + float(spread))


@given(call=calls(keys=(4,), dtypes=("float64", "float32")), cut=st.integers(0, 4))
def test_splitting_the_keys_and_merging_gives_the_whole(backend, call, cut):
    parts = []
    for start, end in ((0, cut), (cut, 4)):
        options = {name: x[..., start:end] if name in ("mask", "bias") else x for name, x in call.options.items()}
        if "valid_lens" in options:
            options["valid_lens"] = np.clip(options["valid_lens"] - start, 0, end - start)
        options["query_offset"] -= start
        parts.append(
            Call(call.query, call.key[..., start:end, :], call.value[..., start:end, :], options)(backend, return_lse=True)
        )
    output, lse = call(backend, return_lse=True)
    merged, merged_lse = map(
        kvattn.to_numpy, kvattn.merge_attention(*zip(*parts, strict=True), return_lse=True, backend=backend)
    )
    close(merged, output, 2 * call.tolerance)
    close(merged_lse, lse, 2 * call.tolerance)


@given(call=calls(keys=(4,), positional=False), absent=st.integers(0, 3))
def test_a_masked_key_equals_an_absent_key(backend, call, absent):
    mask = np.ones((call.query.shape[-2], 4), bool) & call.options.get("mask", True)
    mask[:, absent] = False
    kept = np.arange(4) != absent
    options = {**call.options, "mask": mask[:, kept]}
    if "bias" in options:
        options["bias"] = options["bias"][..., kept]
    without = Call(call.query, call.key[..., kept, :], call.value[..., kept, :], options)
    close(replace(call, options={**call.options, "mask": mask})(backend), without(backend), call.tolerance)


@given(call=calls(dtypes=("float64", "float32")), a=st.sampled_from((-2.0, 0.5, 3.0)))
def test_attention_is_linear_in_the_value(backend, call, a):
    other = np.roll(call.value, 1, axis=-1)
    mixed = replace(call, value=(a * call.value + other).astype(call.value.dtype))
    expected = a * call(backend) + replace(call, value=other)(backend)
    close(mixed(backend), expected.astype(call.value.dtype), 2 * (abs(a) + 1) * call.tolerance)


@given(call=calls(keys=(4,)), bad=st.sampled_from((np.nan, np.inf, -np.inf)), length=st.integers(0, 4))
def test_nan_in_the_padding_changes_nothing(backend, call, bad, length):
    call.options["valid_lens"] = np.full(call.query.shape[:-2][:1], length)
    dirty = replace(call, key=call.key.copy(), value=call.value.copy())
    dirty.key[..., length:, :] = dirty.value[..., length:, :] = bad
    for clean, found in zip(
        call(backend, return_weights=True, return_lse=True), dirty(backend, return_weights=True, return_lse=True), strict=True
    ):
        np.testing.assert_array_equal(found, clean)


@given(call=calls(keys=(4,), dtypes=("float64", "float32")), bad=st.sampled_from((np.nan, np.inf)), length=st.integers(0, 3))
def test_nan_in_the_padding_reaches_no_gradient(backend, call, bad, length):
    call.options["valid_lens"] = np.full(call.query.shape[:-2][:1], length)
    dirty = replace(call, key=call.key.copy(), value=call.value.copy())
    dirty.key[..., length:, :] = dirty.value[..., length:, :] = bad
    ones = np.ones((*call.query.shape[:-1], 3), call.query.dtype)
    gradients = [kvattn.attention_grad(c.query, c.key, c.value, ones, **c.options, backend=backend) for c in (call, dirty)]
    for clean, found in zip(*gradients, strict=True):
        np.testing.assert_array_equal(kvattn.to_numpy(found), kvattn.to_numpy(clean))
    for by_key in gradients[1][1:]:
        assert not kvattn.to_numpy(by_key)[..., length:, :].any()


@given(
    width=st.sampled_from((0.5, 2.0)),
    seed=st.integers(0, 2**32),
    kernel=st.sampled_from(("gaussian", "boxcar", "triangular", "epanechnikov", "constant")),
)
def test_nadaraya_watson_averages(backend, width, seed, kernel):
    rng = np.random.default_rng(seed)
    x_train, x = rng.random(5), rng.random(3)
    y_train = rng.standard_normal(5)
    y, weights = kvattn.nadaraya_watson(
        x_train, y_train, x, partial(getattr(kvattn, f"{kernel}_kernel"), width=width), backend=backend
    )
    y, weights = kvattn.to_numpy(y), kvattn.to_numpy(weights)
    assert weights.shape == (3, 5)
    np.testing.assert_allclose(y, weights @ y_train, rtol=0, atol=8 * 2.0**-52 * np.abs(y_train).max())  # terms may cancel
    empty = weights.sum(axis=-1) == 0
    assert (y[empty] == 0).all()
    assert ((y >= y_train.min() - 1e-12) & (y <= y_train.max() + 1e-12) | empty).all()
