"""What is PyTorch's own in its fast paths: runs of equal lengths, second derivatives, what is held, which calls are cut.

What every backend's fast path promises is in test_tiled.py.
"""

from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from tiling import INF, NAN, call, draw, judge, subject
from torch.utils._python_dispatch import TorchDispatchMode

import kvattn
from kvattn import planning
from kvattn.backends import torch as tab
from kvattn.call import Call
from kvattn.kernels.torch import plan

SUBJECT = subject("torch")
SIZES = SUBJECT.sizes


@contextmanager
def small(sizes):
    """Every call that can be cut is cut, windows too; yields the masks that SDPA is given."""
    masks = []
    with SUBJECT.forced(sizes, masks):
        yield masks


def results(query, key, value, grad_output, **options):
    """The output alone, and gradients, as NumPy arrays."""
    output = kvattn.attention(query, key, value, **options, backend="torch")
    grads = kvattn.attention_grad(query, key, value, grad_output, **options, backend="torch")
    return [kvattn.to_numpy(x) for x in (output, *grads)]


# ---- runs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lens", [(7, 7, 7, 7), (0, 0, 0, 0), (0, 7, 0, 0), (1, 1, 6, 7), (8, 99, 7, 6), (3, 5, 3, 5), (5, 5, 5, 5), (1, 2, 4, 7)]
)
@pytest.mark.parametrize("n", [1, 5, 7, 9])
def test_lengths_of_a_batch(n, lens, causal):
    options = {"n": n, "valid_lens": np.array(lens), "causal": causal}
    cases = [("float64", call(lead=(4,), **options)), ("float64", call(lead=(4, 4), kv=(4, 2), d=5, **options))]
    cases.append(("float32", call(lead=(4, 1, 2), scale=0.3, **options)))
    for sizes in SIZES.values():
        for dtype, case in cases:
            with small(sizes):
                judge(case, dtype, SUBJECT.found(case, dtype))


# ---- derivatives


def my_score(query, key):
    return torch.tanh(query[..., :, None, :] - key[..., None, :, :]).sum(dim=-1)


DIFFERENTIATED = {
    "plain": {},
    "causal": {"causal": True},
    "lengths": {"valid_lens": torch.tensor([3, 1])},
    "window": {"window": (1, 0), "query_offset": 1},
    "softcap": {"softcap": 1.5},
    "own": {"score": my_score, "causal": True, "query_offset": 1},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("which", DIFFERENTIATED)
def test_first_and_second_derivatives(which, sizes):
    inputs = [torch.tensor(x).requires_grad_() for x in draw(n=4, m=3, d=2, v=1)[:3]]
    with small(sizes):
        call = partial(kvattn.attention, **DIFFERENTIATED[which])
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_the_second_derivative_by_one_tensor_that_is_query_key_and_value():
    x = torch.tensor(draw(n=3, m=3)[0]).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: kvattn.attention(x, x, x, causal=True), [x])


def test_first_and_second_backward_of_one_graph():
    query, key, value = (torch.tensor(x).requires_grad_() for x in draw()[:3])
    output = kvattn.attention(query, key, value)
    first = torch.autograd.grad(output.sum(), query, retain_graph=True)
    both = torch.autograd.grad(output.sum(), query, create_graph=True)
    torch.testing.assert_close(first, both)
    assert both[0].requires_grad
    (query * 2).sum().backward()
    assert (query.grad == 2).all()


def test_gradients_by_what_a_score_closes_over_in_blocks():
    query, key, value, grad = map(torch.tensor, draw(n=5))
    slope = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, requires_grad=True)
    call = partial(kvattn.attention, query, key, value, score=lambda q, k: (q * slope) @ k.mT)
    (expected,) = torch.autograd.grad(call(), slope, grad)
    with small(SIZES["each length by itself"]):
        (found,) = torch.autograd.grad(call(), slope, grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_dropped_is_the_same_forward_and_back(seed):
    query, key, value, _ = map(torch.tensor, draw(lead=(), n=6, m=5))
    value.requires_grad_()
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    with small(SIZES["each length by itself"]):
        output = kvattn.attention(query, key, value, dropout=0.5, rng=rng)
        after = None if rng is None else rng.get_state()
        (by_value,) = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close((by_value * value).sum(), output.sum())  # the output is linear in the values
    assert not torch.allclose(output, kvattn.attention(query, key, value))
    if rng is not None:
        assert torch.equal(after, rng.get_state())


# ---- what is held


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned, and the operations' names."""

    def __init__(self):
        super().__init__()
        self.size, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= x.nbytes:  # not expanded
                self.size = max(self.size, x.numel())
        return found


SCORES = {
    "additive": {
        "score": partial(
            kvattn.additive_score,
            **{name: torch.ones(shape) / 16 for name, shape in {"W_q": (8, 16), "W_k": (8, 16), "w_v": (16,)}.items()},
        )
    },
    "gated": {"score": partial(kvattn.gated_score, w_g=torch.ones(16) / 16)},
    "distance": {"score": kvattn.distance_score},
    "own": {"score": my_score},
    "sparsemax": {"normalize": kvattn.sparsemax},
    "softcap": {"softcap": 3.0},
    "lse": {"return_lse": True},
}
MASKS = {
    "causal": {"causal": True},
    "causal, later": {"causal": True, "query_offset": 40},
    "lengths": {"valid_lens": torch.tensor([300, 77]), "causal": True},
    "nearly equal lengths": {"valid_lens": torch.tensor([300, 299]), "causal": True},
    "window": {"window": (30, 2)},
    "lengths per query": {"valid_lens": torch.arange(600).reshape(2, 300)},
}


@pytest.mark.parametrize("what", SCORES)
def test_no_score_holds_queries_by_keys_forward_or_back(what):
    query, key, value = (torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    with patch.multiple(plan, PAIRS=2**14, ROWS=16), Largest() as held, torch.no_grad():
        kvattn.attention(query, key, value, **SCORES[what])
    assert held.size <= 2**14
    kept = []
    leaves = [x.requires_grad_() for x in (query, key, value)]
    with (
        patch.multiple(plan, PAIRS=2**14, ROWS=16), Largest() as held,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
    ):  # fmt: skip
        output = kvattn.attention(*leaves, **SCORES[what])
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    assert held.size <= 2**14
    assert all(size <= 2 * 300 * 16 for size in kept)


@pytest.mark.parametrize("what", MASKS)
def test_no_mask_of_queries_by_keys_is_built(what):
    query, key, value = (torch.randn(2, 4, 300, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    sizes = {"PAIRS": 2**14, "ROWS": 16, "CALL": 2**16}
    with patch.multiple(plan, **sizes), patch.object(planning, "BLOCK", 32), Largest() as held, torch.no_grad():
        kvattn.attention(query, key, value, **MASKS[what])
    assert held.size <= max(query.numel(), 2 * 2**14)


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_padding_in_one_argument_reaches_nothing(which, bad):
    """One feature: a key of -inf has a score of -inf in every row, and only the gradient tells."""
    arrays = [abs(x) for x in draw(lead=(3, 1), d=1)]
    dirty = [x.copy() for x in arrays]
    dirty[which][0, :, 4:], dirty[which][2, :, 2:] = bad, bad
    for causal in (False, True):
        options = {"valid_lens": np.array([4, 7, 2]), "causal": causal}
        for x, y in zip(results(*dirty, **options), results(*arrays, **options), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-14)


def test_one_call_where_lengths_are_equal_few_where_the_work_is_small():
    def masks(lens, n, **options):
        query, key, value, _ = draw(lead=(len(lens), 2), n=n, m=64, d=8, v=8)
        with small({}) as masks:
            kvattn.attention(query, key, value, valid_lens=np.array(lens), backend="torch", **options)
        return [mask is not None for mask in masks]

    assert masks([64] * 4, 4) == [False]
    assert masks([9] * 4, 4, causal=True) == [False]
    assert masks([9, 9, 30, 5], 4) == [True]
    assert masks([9, 9, 30, 0], 4) == [True]
    with patch.object(plan, "CALL", 1000):
        assert masks([9, 9, 40, 40], 100) == [False, False]
        assert masks([9, 40, 9, 40], 100) == [False] * 4
        assert masks([9, 9, 0, 0], 100) == [False]
        assert masks([64, 64, 60, 60], 100) == [True]
        assert masks([48, 48, 48, 49], 100) == [True]
        assert masks([48, 48, 48, 47], 100) == [False] * 2


def test_the_blocks_of_a_window_share_masks_and_hide_no_padding():
    query, key, value, _ = map(torch.tensor, draw(n=20, m=20))
    with small({}) as masks, Largest() as held:
        kvattn.attention(query, key, value, window=2)
    assert len(masks) == 10
    assert len({mask.data_ptr() for mask in masks}) < 6
    assert "where" not in held.names


def test_a_windows_blocks_compile():
    query, key, value = (torch.randn(1, 2, 600, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    torch._dynamo.reset()
    call = partial(kvattn.attention, window=(20, 3))
    found = torch.compile(call, fullgraph=True, backend="eager")(query, key, value)
    torch.testing.assert_close(found, call(query, key, value))


def test_an_output_may_be_written_to():
    query, key, value, grad = (torch.tensor(x).requires_grad_() for x in draw())
    output = kvattn.attention(query, key, value)
    output += grad
    (by_grad,) = torch.autograd.grad(output.sum(), grad)
    assert (by_grad == 1).all()


def test_causal_from_the_first_key_is_sdpas_own_whatever_the_lengths():
    for n, m in ((4, 4), (3, 9), (9, 3), (1, 5)):
        case = call("causal", n, m)
        with small({}) as masks:
            judge(case, "float64", SUBJECT.found(case))
        assert masks
        assert all(mask is None for mask in masks)


def test_which_calls_are_cut_into_blocks():
    query, key, value = (torch.tensor(x) for x in draw(n=40, m=30, dtype=np.float32)[:3])
    usual = {"score": tab.scaled_dot_score, "normalize": tab.softmax, "causal": False, "window": None, "query_offset": 0}

    def blocks(**options):
        return [*tab.choose(query, key, value, Call.of(query, key, **usual | options)).blocks]

    formula, distance = {"normalize": tab.sparsemax}, {"score": tab.distance_score}
    with patch.multiple(plan, FEW=0, PAIRS=600, ROWS=16):  # no call is small
        assert blocks(**formula) == [(i, i + 10, 0, 30) for i in range(0, 40, 10)]  # two entries
        assert blocks(**distance) == [(i, i + 3, 0, 30) for i in range(0, 39, 3)] + [(39, 40, 0, 30)]
        assert blocks() == []
        assert blocks(causal=True, query_offset=-5) == [(0, 20, 0, 15), (20, 40, 0, 30)]
        assert blocks(mask=torch.ones(30, dtype=torch.bool)) == []
        assert blocks(valid_lens=torch.ones(2, 40)) == [(0, 16, 0, 30), (16, 32, 0, 30), (32, 40, 0, 30)]
        assert blocks(causal=True, mask=torch.ones(40, 30, dtype=torch.bool)) == []  # the caller holds as much
        query.requires_grad_()
        assert blocks(causal=True, valid_lens=torch.ones(2, 40)) == []
    assert blocks(**formula) == []


def test_a_short_window_hides_no_padding_either():
    query, key, value, _ = map(torch.tensor, draw(n=20, m=20))
    for options in ({"window": 2}, {"causal": True, "query_offset": 3}):
        expected = kvattn.attention(*(x.numpy() for x in (query, key, value)), **options)
        with Largest() as held:
            found = kvattn.attention(query, key, value, **options)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
        assert "where" not in held.names


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("n", "m", "causal"), [(5, 7, False), (40, 40, True), (20, 60, True), (60, 20, True)])
def test_the_lse_of_calls_without_gradients_is_the_kernels(dtype, n, m, causal):
    rng = np.random.default_rng(0)
    query, key, value = (torch.from_numpy(rng.standard_normal((2, h, s, 8))) for h, s in ((4, n), (2, m), (2, m)))
    query, key, value = (x.to(getattr(torch, dtype)) for x in (query, key, value))
    query[1, 2, 3, 0] = NAN
    got = kvattn.attention(query, key, value, causal=causal, return_lse=True)
    want = kvattn.attention(*(x.double().numpy() for x in (query, key, value)), causal=causal, return_lse=True)
    eps = torch.finfo(query.dtype).eps
    for x, y, tolerance in zip(got, want, (16 * eps, 64 * torch.finfo(got[1].dtype).eps), strict=True):
        torch.testing.assert_close(x.double(), torch.from_numpy(y), rtol=0, atol=4 * tolerance, equal_nan=True)
    assert ("its lse" in kvattn.explain(query, key, value, causal=causal, return_lse=True).why) == (not causal or n <= m)
    query.requires_grad_()
    assert "its lse" not in kvattn.explain(query, key, value, return_lse=True).why


@pytest.mark.parametrize("lowest", [-INF, -1e38])
@pytest.mark.parametrize(("n", "m", "causal"), [(1, 3, True), (40, 70, False), (600, 700, True)])
def test_the_lse_of_a_row_of_nothing_but_minus_infinity_is_that(n, m, causal, lowest):
    query, key, value = torch.full((1, 1, n, 4), 100.0), torch.zeros(1, 1, m, 4), torch.ones(1, 1, m, 4)
    key[..., 0] = lowest
    query[..., -1:, 0] = 0.0 if lowest > -INF else 100.0  # one row whose scores are 0
    output, lse = kvattn.attention(query, key, value, causal=causal, return_lse=True)
    some = (torch.arange(n) == n - 1) & (lowest > -INF)
    np.testing.assert_allclose(output[0, 0, :, 0], some, rtol=1e-5)
    assert (lse.isfinite() == some).all()
    assert (lse[..., ~some] == -INF).all()


@pytest.mark.parametrize("offset", [70_000, 2**31 - 4, 2**33])
def test_functions_of_far_positions_are_asked_with_integers_that_hold_them(offset):
    query, key = torch.randn(1, 8, 4, dtype=torch.float64), torch.randn(1, 40_000, 4, dtype=torch.float64)
    q, k = offset + torch.arange(8)[:, None], torch.arange(40_000)[None]
    want = kvattn.attention(query, key, key, mask=q * k % 7 < 3)
    found = kvattn.attention(query, key, key, mask=lambda q, k: q * k % 7 < 3, query_offset=offset)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("apart", [1, 2])
def test_functions_that_look_at_the_class_of_positions_are_asked_with_tensors(apart):
    x, positions = torch.randn(1, 300, 4, dtype=torch.float64), (torch.arange(300)[:, None], torch.arange(300)[None])

    def mask(query, key):
        return apart * key <= query if isinstance(query, torch.Tensor) else apart * key <= query + 5

    found = kvattn.attention(x, x, x, mask=mask)
    torch.testing.assert_close(found, kvattn.attention(x, x, x, mask=mask(*positions)))
