"""NaN where somebody looks, beyond what the conformance suite asks: a loss's gradient, dropout, the judge."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import chosen

import kvattn
from kvattn import conformance
from kvattn.backends import numpy as by_numpy
from kvattn.conformance.cases import NOT_FINITE, grid

NAN = np.nan
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def draw(n, lead=(2, 2), d=3, v=2):
    rng = np.random.default_rng(n)
    return [grid(rng, *lead, n, size) for size in (d, d, v, v)]


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


analytic = pytest.mark.parametrize("analytic", ["numpy", *sorted({"mxnet", "jax"} & {*chosen()})])


@analytic
@pytest.mark.parametrize(("n", "row"), [(5, 2), (600, 300)])
def test_nan_in_the_gradient_of_a_loss_reaches_its_query_and_the_keys_that_this_sees(analytic, n, row):
    query, key, value, grad_output = draw(n, (1, 1))
    clean = kvattn.attention_grad(query, key, value, grad_output, causal=True)
    grad_output = grad_output.copy()
    grad_output[..., row, 0] = NAN
    grads = kvattn.attention_grad(*(kvattn.convert(x, analytic) for x in (query, key, value, grad_output)), causal=True)
    by_query, by_key, by_value = map(kvattn.to_numpy, grads)
    others = np.arange(n) != row
    same(by_query[..., others, :], clean[0][..., others, :])
    same(by_key[..., row + 1 :, :], clean[1][..., row + 1 :, :])
    same(by_value[..., row + 1 :, :], clean[2][..., row + 1 :, :])
    assert np.isnan(by_query[..., row, :]).all()
    assert np.isnan(by_key[..., : row + 1, :]).all()
    assert np.isnan(by_value[..., : row + 1, 0]).all()
    same(by_value[..., 1], clean[2][..., 1])


@analytic
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_nan_in_a_block_of_keys_that_no_query_of_a_tile_sees(analytic, which):
    arrays = draw(600, (1, 1))
    mask = np.tri(600, dtype=bool)
    mask[:550, 5] = False
    clean = kvattn.attention_grad(*arrays, mask=mask)
    arrays[which] = arrays[which].copy()
    arrays[which][..., 5, 0] = NAN
    grads = kvattn.attention_grad(*(kvattn.convert(x, analytic) for x in arrays), mask=mask)
    by_query = kvattn.to_numpy(grads[0])
    same(by_query[..., :550, :], clean[0][..., :550, :])
    assert np.isnan(by_query[..., 550:, :]).all()


@analytic
def test_gradients_of_a_normaliser_that_weighs_nan_are_nan(analytic):
    query, key, value, grad_output = draw(5)
    key[1, 0, 2, 1] = query[0, 1, 3, 0] = NAN
    arrays = (kvattn.convert(x, analytic) for x in (query, key, value, grad_output))
    by_query, by_key, _ = map(kvattn.to_numpy, kvattn.attention_grad(*arrays, normalize=kvattn.identity, causal=True))
    assert np.isnan(by_query[1, 0, 2:, 1]).all()
    assert np.isfinite(by_query[1, 0, :2]).all()
    assert np.isnan(by_key[0, 1, :4, 0]).all()
    assert np.isfinite(by_key[0, 1, 4:]).all()


def test_nan_changes_its_own_row_under_dropout():
    query, key, value, grad_output = draw(6)
    poisoned = query.copy()
    poisoned[0, 1, 3] = NAN
    results = []
    for x in (query, poisoned):
        options = {"causal": True, "dropout": 0.4}
        output = kvattn.attention(x, key, value, **options, rng=np.random.default_rng(1))
        grads = kvattn.attention_grad(x, key, value, grad_output, **options, rng=np.random.default_rng(1))
        results.append((output, *grads))
    sees = np.zeros((2, 2, 6), bool)
    sees[0, 1, :4] = True
    rows = np.zeros((2, 2, 6), bool)
    rows[0, 1, 3] = True
    for clean, found, reached in zip(*results, (rows, rows, sees, sees), strict=True):
        same(found[~reached], clean[~reached])
    assert np.isnan(results[1][0][rows]).all()
    assert np.isnan(results[1][1][rows]).all()


def test_nan_changes_its_own_row_of_a_score_of_the_users_own():
    def score(query, key):
        return query @ key.swapaxes(-1, -2)

    score.grad = lambda query, key, grad_scores: (grad_scores @ key, grad_scores.swapaxes(-1, -2) @ query)
    query, key, value, grad_output = draw(5)
    key[1, 0, 2] = NAN
    expected = kvattn.attention_grad(query, key, value, grad_output, score=kvattn.dot_score, causal=True)
    found = kvattn.attention_grad(query, key, value, grad_output, score=score, causal=True)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(found[0][1, 0, :2]).all()
    assert np.isnan(found[0][1, 0, 2:]).all()


# ---- the judge

CASES = conformance.cases()


def judged(change):
    """The failures of NumPy's tab, each of whose outputs and gradients ``change`` changes."""

    def changed(function):
        def run(*args, **options):
            results = function(*args, **options)
            return tuple(map(change, results)) if isinstance(results, tuple) else change(results)

        return run

    own = {name: getattr(by_numpy, name) for name in dir(by_numpy) if not name.startswith("__")}
    own |= {name: changed(own[name]) for name in ("attention", "attention_grad")}
    tab = SimpleNamespace(__name__="a.third_party", **own)
    asked = [case for case in CASES if case.group == NOT_FINITE and case.call == "attention"]
    return conformance.run(tab, asked, ["float64", "float32"]).failures


def test_the_judge_passes_what_changes_nothing():
    assert not judged(lambda x: x)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.where(np.isfinite(x), x, 0).astype(x.dtype),
        lambda x: np.full_like(x, NAN),
        lambda x: np.where(np.isfinite(x), x, np.nan_to_num(x, nan=1e4)).astype(x.dtype),
    ],
    ids=["zeros for NaN", "NaN for all", "numbers for NaN"],
)
def test_the_judge_tells_of_numbers_for_nan_and_nan_for_numbers(change):
    assert len({failure.case for failure in judged(change)}) > 30


def test_the_judge_takes_nan_for_no_answer_that_is_a_number():
    (case,) = [case for case in CASES if case.name == "plain"]
    nowhere = SimpleNamespace(**{name: getattr(by_numpy, name) for name in dir(by_numpy) if not name.startswith("__")})
    nowhere.attention = lambda *args, **options: tuple(np.full_like(x, NAN) for x in by_numpy.attention(*args, **options))
    nowhere.__name__ = "a.third_party"
    assert {failure.what for failure in conformance.run(nowhere, [case], ["float64"]).failures} >= {"output", "weights", "lse"}


@pytest.mark.parametrize("lens", [2, [1, 2, 3, 2]], ids=str)
def test_nan_in_inputs_without_a_batch(backend, lens):
    """One length for all queries, or one for each: it was looked for in a batch axis, where NaN was to be hidden."""
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    x[3, 1] = np.nan
    given = [kvattn.asarray(each, backend=backend) for each in (x, *[np.eye(6, dtype="float32")] * 3)]
    found = kvattn.to_numpy(kvattn.self_attention(*given, valid_lens=np.array(lens)))
    assert np.isnan(found).any(axis=-1).tolist() == [False, False, False, True]
    params = dict(zip(("W_q", "W_k", "W_v"), given[1:], strict=True))
    found = kvattn.multi_head_attention(*given[:1] * 3, params, num_heads=2, valid_lens=np.array(lens))
    assert np.isnan(kvattn.to_numpy(found)).any(axis=-1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 1}, {"mask": np.tri(4, dtype=bool)}, {"valid_lens": [3, 3]}])
@pytest.mark.parametrize("backend", chosen())
def test_a_query_of_minus_inf_whose_scores_are_all_minus_inf_has_no_gradient(backend, options):
    """It attends to nothing: zeros, in its own gradient too; the keys that it sees are told that it is not finite."""
    rng = np.random.default_rng(0)
    query, key, value, grad_output = (rng.random((2, 1, 4, 3)) + 0.5 for _ in range(4))
    query[:, :, 1] = -np.inf
    given = [kvattn.convert(x.astype("float32"), backend) for x in (query, key, value, grad_output)]
    by_query, by_key, by_value = map(kvattn.to_numpy, kvattn.attention_grad(*given, **options))
    assert (by_query[:, :, 1] == 0).all()
    assert np.isfinite(by_query).all()
    assert np.isfinite(by_value).all()
    assert np.isnan(by_key[:, :, :2]).all()
    assert np.isfinite(by_key[:, :, 3]).all()


@pytest.mark.parametrize("n", [4, 600])
@pytest.mark.parametrize("sink", [np.inf, np.nan])
def test_numpy_warns_of_no_sink_beside_a_row_of_minus_inf(sink, n):
    query, key, value = (np.random.default_rng(n).random((1, n, 3)) + 0.5 for _ in range(3))
    query[:, 1] = -np.inf
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        output = kvattn.attention(query, key, value, sink=sink, causal=True, backend="numpy")
    assert not [str(each.message) for each in told if "logaddexp" in str(each.message)]
    assert np.isnan(np.delete(output, 1, axis=1)).all()
    assert (output[:, 1] == 0).all()
