"""NaN and inf on PyTorch's own paths: SDPA in slices, bands and half precision, its backward, second derivatives, layers.

Which rows are not finite is counted from the pairs; all others are compared with the same call without NaN, which the
conformance suite judges, and whose group "not finite" asks every backend for what it promises.
"""

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch

import kvattn
from kvattn.conformance import oracle
from kvattn.kernels.torch import nonfinite
from kvattn.layers import torch as layers

NAN, INF = float("nan"), float("inf")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def looks(shape, m, **options):
    """Which query may attend to which key, (..., n, m), from the oracle's list."""
    found = np.zeros((*shape[:-1], m), bool)
    for _, at in oracle.pairs(np.zeros(shape), np.zeros((*shape[:-2], m, 1)), **options)[3]:
        found[at] = True
    return torch.from_numpy(found)


def same(got, want, reached):
    """NaN where it reached and what a clean call gives elsewhere."""
    reached = reached.expand(got.shape)
    assert torch.isnan(got[reached]).all()
    torch.testing.assert_close(got[~reached], want[~reached])


LENS = [[3, 7, 40, 40], [40, 12, 12, 1], [9, 9, 9, 9]]
WAYS = {
    "plain": {},
    "causal": {"causal": True},
    **{f"lengths {lens}": {"valid_lens": np.array(lens)} for lens in LENS},
    "causal lengths": {"causal": True, "valid_lens": np.array(LENS[0])},
    "a window": {"window": (3, 2)},
    "a causal window": {"window": 5, "causal": True},
    "a mask": {"mask": np.tri(40, 40, 3, dtype=bool)},
    "a mask with empty rows": {"mask": np.tri(40, 40, -2, dtype=bool)},
}


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("way", WAYS)
def test_the_rows_that_look_and_no_others(way, m):
    options = {name: x[:m, :m] if name == "mask" else x for name, x in WAYS[way].items()}
    x = {name: draw(4, 2, m, 8, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    grad = draw(4, 2, m, 8, seed=9)
    seen = looks((4, 2, m, 8), m, **options)
    options = {name: torch.from_numpy(o) if isinstance(o, np.ndarray) else o for name, o in options.items()}
    want = kvattn.attention(**x, **options)
    clean = kvattn.attention_grad(**x, grad_output=grad, **options)
    for name in ("query", "key", "value", "grad_output"):
        given = {**x, "grad_output": grad}
        given[name] = given[name].clone()
        given[name][1, 0, 2, 3] = NAN
        rows = torch.zeros(4, 2, m, 1, dtype=torch.bool)  # what is not finite
        rows[1, 0, 2] = True
        if name in ("query", "grad_output"):
            rows &= seen.any(dim=-1, keepdim=True)
        else:
            rows = (seen & rows.mT).any(dim=-1, keepdim=True)
        got = kvattn.attention(given["query"], given["key"], given["value"], **options)
        feature = torch.arange(8) == 3 if name == "value" else torch.ones(8, dtype=torch.bool)
        same(got, want, rows & feature if name != "grad_output" else torch.zeros(1, dtype=torch.bool))
        by_query, by_key, by_value = kvattn.attention_grad(**given, **options)
        same(by_query, clean[0], rows)
        same(by_key, clean[1], (seen & rows).any(dim=-2)[..., None])
        reached = (seen & rows).any(dim=-2)[..., None]
        reached = {"value": reached & False, "grad_output": reached & (torch.arange(8) == 3)}.get(name, reached)
        same(by_value, clean[2], reached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": torch.ones(16, 16, dtype=torch.bool).tril()}])
def test_scores_of_inf_in_half_precision_are_nan_not_zeros(dtype, options):
    query, key, value = (draw(1, 1, 16, 8, seed=seed, dtype=dtype).abs() + 1 for seed in range(3))
    want = kvattn.attention(query, key, value, **options)
    key = key.clone()
    key[..., 7, :] = INF
    same(kvattn.attention(query, key, value, **options), want, torch.arange(16)[:, None] >= (7 if options else 0))


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "softcap": 2.0}, {"window": (2, 0)}])
def test_second_derivatives_and_dropout(options):
    query, key, value = (draw(1, 1, 12, 4, seed=seed) for seed in range(3))
    odd = query.clone()
    odd[..., 7, 0] = NAN
    unseen = ~looks((1, 1, 12, 4), 12, **{n: x for n, x in options.items() if n != "softcap"})[0, 0, 7]

    def grads(query, dropout):
        query, keys = query.clone().requires_grad_(), key.clone().requires_grad_()
        rng = {"dropout": dropout, "rng": torch.Generator().manual_seed(1)} if dropout else {}
        output = kvattn.attention(query, keys, value, **options, **rng)
        (grad,) = torch.autograd.grad(output.square().sum(), keys, create_graph=True)
        return grad.detach(), torch.autograd.grad(grad[..., unseen, :].square().sum(), query)[0]

    for dropout in (0.0, 0.4):
        (first, second), (want, want_second) = grads(odd, dropout), grads(query, dropout)
        same(first, want, ~unseen[:, None])
        same(second, want_second, torch.arange(12)[:, None] == 7)


def test_one_sequence_of_a_batch_of_layers():
    layer = layers.TransformerEncoderBlock(8, 16, 2, seed=0)
    X = draw(3, 20, 8, dtype=torch.float32)
    odd = X.clone()
    odd[1, 5, 0] = NAN
    for options in ({"causal": True}, {"valid_lens": torch.tensor([20, 9, 4])}, {}):
        want, got = layer(X, **options), layer(odd, **options)
        rows = torch.zeros(3, 20, 1, dtype=torch.bool)
        rows[1, 5 if options.get("causal") else 0 :] = True
        same(got, want, rows)


def test_large_numbers_in_half_precision_are_finite():
    assert nonfinite.finite(torch.full((2, 1000), 60000.0, dtype=torch.float16))  # though their sum is not, in float16
    assert not nonfinite.finite(torch.tensor([1.0, NAN], dtype=torch.float16))
    assert not nonfinite.finite(torch.tensor([INF, 1.0]))


def test_long_calls_are_cut_in_blocks_of_queries(monkeypatch):
    query, key, value = (draw(2, 33, 4, seed=seed) for seed in range(3))
    want = kvattn.attention_grad(query, key, value, value, causal=True)
    query[0, 20] = NAN
    for size in (33, 2 * 33 * 7, 2**22):
        monkeypatch.setattr(nonfinite, "PAIRS", size)
        for got, clean in zip(kvattn.attention_grad(query, key, value, value, causal=True), want, strict=True):
            same(got[1], clean[1], torch.zeros(1, dtype=torch.bool))
        by_query, *by_keys = kvattn.attention_grad(query, key, value, value, causal=True)
        same(by_query[0], want[0][0], torch.arange(33)[:, None] == 20)
        for got, clean in zip(by_keys, want[1:], strict=True):
            same(got[0], clean[0], torch.arange(33)[:, None] <= 20)


def test_values_are_not_looked_at_where_a_program_is_recorded():
    x = draw(1, 1, 5, 4)
    assert nonfinite.readable(x)
    answers = []
    torch.func.vmap(lambda x: answers.append(nonfinite.readable(x)) or x)(x)
    assert answers == [False]


def test_the_scores_of_allowed_pairs_have_the_derivatives_of_what_they_are():
    query, key = draw(2, 3, 4).requires_grad_(), draw(2, 5, 4, seed=1).requires_grad_()
    allowed = torch.ones(3, 5, dtype=torch.bool).tril(1)

    def scores(query, key):
        return nonfinite._Scores.apply(query, key, allowed)

    torch.testing.assert_close(scores(query, key), torch.where(allowed, query @ key.mT, 0))
    assert torch.autograd.gradcheck(scores, (query, key))
    assert torch.autograd.gradgradcheck(scores, (query, key))


def test_a_row_of_scores_of_minus_inf_has_gradients_of_zero():
    """It attends to nothing; another row's NaN has all of them computed pair by pair."""
    query, key, value = (draw(1, 6, 4, seed=seed).abs() + 1 for seed in range(3))
    query[0, 3], query[0, 5, 0] = -INF, NAN
    output = kvattn.attention(query, key, value, causal=True)
    by_query, _, by_value = kvattn.attention_grad(query, key, value, value, causal=True)
    for x in (output, by_query):
        assert (x[0, 3] == 0).all()
        assert x[0, :3].isfinite().all()
        assert x[0, 5].isnan().all()
    assert by_value.isnan().all()


@pytest.mark.parametrize("where", [None, torch.tensor([True, False, True])])
def test_softmax_is_pytorchs_own_where_no_row_is_empty(where):
    scores = draw(4, 3).requires_grad_()
    weights = kvattn.softmax(scores, where=where)
    assert weights.grad_fn.name() == "SoftmaxBackward0"
    kept = torch.ones(3) if where is None else where
    torch.testing.assert_close(weights, kept * scores.exp() / (kept * scores.exp()).sum(dim=-1, keepdim=True))
    scores = torch.full((2, 3), -INF, dtype=torch.float64).index_fill(0, torch.tensor(1), 1.0).requires_grad_()
    weights = kvattn.softmax(scores, where=where)
    torch.testing.assert_close(weights, torch.stack([torch.zeros(3).double(), kept.double() / kept.sum()]))
    assert not torch.autograd.grad(weights.square().sum(), scores)[0].any()


LENS = torch.tensor([300, 40, 0])
PADDING = (torch.arange(300) < LENS[:, None])[:, None, None]  # of a batch of three
BIASES = {  # beside four heads, of 300 queries and keys
    "no bias": {}, "each its own": {"bias": draw(3, 4, 300, 300)}, "a bias for all": {"bias": draw(4, 300, 300)},
    "one key": {"bias": draw(3, 1, 300, 1)}, "with a sink": {"bias": draw(1, 1, 1, 300), "sink": draw(3, 4)},
    "causal": {"causal": True},
}  # fmt: skip


def in_numpy(arrays, grad, options):
    options = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    given = [x.numpy() for x in arrays]
    return kvattn.attention(*given, **options), *kvattn.attention_grad(*given, grad.numpy(), **options)


@pytest.mark.parametrize("given", [{"mask": PADDING}, {"valid_lens": LENS}], ids=["mask", "lengths"])
@pytest.mark.parametrize("name", BIASES)
def test_a_mask_of_padding_is_lengths(name, given):
    arrays, grad = [draw(3, heads, 300, 64, seed=heads) for heads in (4, 2, 2)], draw(3, 4, 300, 64)
    if "bias" in BIASES[name] and BIASES[name]["bias"].shape[-2:] == (300, 300):
        BIASES[name]["bias"][..., 5, :] = -INF
    want = in_numpy(arrays, grad, BIASES[name] | given)
    arrays = [x.clone() for x in arrays]
    arrays[1][1, :, 40:], arrays[2][2] = NAN, INF  # which nobody may attend to
    options = BIASES[name] | given
    assert kvattn.explain(*arrays, **options).kernel == "SDPA, by lengths"
    found = kvattn.attention(*arrays, **options), *kvattn.attention_grad(*arrays, grad, **options)
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", {
    "at the start": PADDING.flip(-1), "with a hole": PADDING & (torch.arange(300) != 20),
    "of queries": PADDING & (torch.arange(300)[:, None] != 20), "of each head": PADDING.expand(3, 4, 1, 300),
}.values())  # fmt: skip
def test_other_masks_are_not_lengths(mask):
    arrays = [draw(3, heads, 300, 64, seed=heads) for heads in (4, 2, 2)]
    assert kvattn.explain(*arrays, mask=mask).kernel == "SDPA"
    np.testing.assert_allclose(kvattn.attention(*arrays, mask=mask), in_numpy(arrays, arrays[0], {"mask": mask})[0], atol=1e-12)
    square = [draw(3, 4, n, 64) for n in (3, 300, 300)]  # as many queries as entries
    mask = PADDING.permute(1, 2, 0, 3)
    np.testing.assert_allclose(kvattn.attention(*square, mask=mask), in_numpy(square, square[0], {"mask": mask})[0], atol=1e-12)


def test_lengths_by_themselves_take_one_number_as_a_bias_and_any_default_device():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 8, 64, 64), *torch.randn(2, 2, 8, 1024, 64)
    mask = torch.arange(1024) < torch.tensor([100, 30])[:, None, None, None]
    assert kvattn.explain(query, key, value, mask=mask).kernel == "SDPA, by lengths"
    expected = kvattn.attention(query, key, value, mask=mask)
    with torch.device("meta"):
        assert torch.equal(kvattn.attention(query, key, value, mask=mask), expected)
    biased = kvattn.attention(query, key, value, mask=mask, bias=torch.tensor(0.5))
    assert (biased - expected).abs().max() < 1e-4


@pytest.mark.parametrize("what", ["mask", "bias", "causal"])
def test_rows_beside_one_that_sees_nan_keep_their_scale(what):
    """They are computed again, pair by pair, which has to be told of a scale that is given."""
    rng = np.random.default_rng(3)
    query, key, value = (rng.standard_normal((1, 2, 5, 8)) for _ in range(3))
    key[0, :, 2] = np.nan
    allowed = np.tri(5, dtype=bool) if what == "causal" else np.arange(5)[:, None] != [[9, 9, 1, 9, 3]]
    allowed[:2, 2] = False  # who does not see it
    bias = np.where(allowed, rng.standard_normal((5, 5)) if what == "bias" else 0.0, -np.inf)
    scores = 0.9 * np.nan_to_num(query @ key.swapaxes(-1, -2)) + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = (weights / weights.sum(axis=-1, keepdims=True)) @ value
    how = {"mask": {"mask": torch.tensor(allowed)}, "bias": {"bias": torch.tensor(bias)}, "causal": {"causal": True}}[what]
    found = kvattn.attention(*(torch.tensor(x) for x in (query, key, value)), scale=0.9, **how)
    assert found[:, :, allowed[:, 2]].isnan().all()
    np.testing.assert_allclose(found[:, :, ~allowed[:, 2]], expected[:, :, ~allowed[:, 2]], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_a_query_of_nan_beside_few_keys_is_nan(m, causal, dtype):
    """PyTorch's kernel takes the largest of nothing but NaN for -inf there, and gives zeros."""
    query, key = draw(1, 2, 5, 8, dtype=dtype), draw(1, 2, m, 8, seed=1, dtype=dtype)
    query[0, 0, 3] = NAN
    found = kvattn.attention(query, key, key, causal=causal)
    assert found[0, 0, 3].isnan().all()
    assert found.isfinite().sum() == found.numel() - 8
