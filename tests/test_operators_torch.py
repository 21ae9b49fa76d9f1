"""Operators that programs of torch.compile hold on a CPU: their answers, NaN and all, and their derivatives."""

from functools import partial

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad

import kvattn
from kvattn.kernels.torch import operators, segments  # noqa: F401  (each defines its operators)

NAN, INF = float("nan"), float("inf")
EMPTY = 7  # a query of the first entry that may attend to nothing


def drawn(n, dtype=torch.float64):
    """query, key and value of four heads over two, and the gradient of the output."""
    rng = np.random.default_rng(1)
    return [torch.from_numpy(rng.standard_normal((2, 4 if i in (0, 3) else 2, n, 8))).to(dtype) for i in range(4)]


def options(n):
    rng = np.random.default_rng(2)
    bias = torch.from_numpy(rng.standard_normal((1, 4, n, n)))
    bias[..., 3] = -INF
    mask, lens = torch.from_numpy(rng.random((2, 1, n, n)) < 0.5), torch.tensor([0, n - 9])
    each = torch.from_numpy(rng.integers(0, n, (2, n)))
    mask[0, :, EMPTY], each[0, EMPTY] = False, 0
    return {
        "lengths": {"valid_lens": lens},
        "a length for each query": {"valid_lens": each},
        "a mask, from the left": {"mask": mask, "causal": True, "scale": 0.5},
        "a bias": {"bias": bias, "valid_lens": lens},
    }


def counting(found):
    def backend(module, inputs):
        found.append([node.target for node in module.graph.nodes])
        return aot_eager(module, inputs)

    return backend


def derived(attend, arrays):
    *inputs, grad = (x.clone().requires_grad_(i < 3) for i, x in enumerate(arrays))
    output = attend(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


ODD = {
    "a query": lambda query, key, value, grad: query[1, 0, 5].fill_(NAN),
    "a query that sees nothing": lambda query, key, value, grad: query[0, 0, EMPTY, 2].fill_(INF),
    "a key": lambda query, key, value, grad: key[1, 1, 20, 2].fill_(NAN),
    "a key at the end": lambda query, key, value, grad: key[1, 0, -4].fill_(-INF),
    "a value": lambda query, key, value, grad: value[0, 1, 9, 1].fill_(INF),
    "a value at the end": lambda query, key, value, grad: value[1, 0, -2].fill_(NAN),
    "the gradient": lambda query, key, value, grad: grad[1, 3, 30].fill_(NAN),
}


def wanted(arrays, how):
    """By kvattn's own NumPy, whose formula and gradients are made of NumPy's operations."""
    *inputs, grad = (x.numpy() for x in arrays)
    given = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in how.items()}
    with np.errstate(all="ignore"):
        return [kvattn.attention(*inputs, **given), *kvattn.attention_grad(*inputs, grad, **given)]


def same(found, want):
    for x, y in zip(found, want, strict=True):
        np.testing.assert_array_equal(np.isfinite(x.numpy()), np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("odd", "dynamic"), [((), True), (ODD, False)], ids=["finite", "not finite"])
@pytest.mark.parametrize("name", options(9))
def test_a_compiled_program_sees_nan_where_an_eager_call_does(name, dynamic, odd):
    arrays, how, graphs = drawn(60), options(60)[name], []
    for each in odd:
        ODD[each](*arrays)
    torch._dynamo.reset()
    attend = torch.compile(
        lambda *given: kvattn.attention(*given, **how), backend=counting(graphs), fullgraph=True, dynamic=dynamic
    )
    same(derived(attend, arrays), wanted(arrays, how))
    assert torch.ops.kvattn.masked in graphs[-1]  # with dynamic=True PyTorch may begin anew


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["lengths", "a bias"])
def test_one_number_that_is_not_finite_reaches_what_may_see_it(name, odd):
    arrays, how = drawn(60), options(60)[name]
    arrays[1][0, 0, :, 2] = -1  # beside which the query that sees nothing has scores of -inf by itself
    ODD[odd](*arrays)
    bias = torch.where(torch.arange(60) < how["valid_lens"][:, None, None, None], how.get("bias", 0.0), -INF).double()
    same(derived(lambda *given: torch.ops.kvattn.masked(*given, bias, None, None)[0], arrays), wanted(arrays, how))


def test_a_bias_that_is_not_finite_where_the_mask_forbids_reaches_nobody():
    """The operator adds the two itself, and NaN or inf in a bias less inf is NaN."""
    arrays = drawn(60)
    mask = torch.arange(60) < torch.tensor([40, 50])[:, None, None, None]
    bias = drawn(60)[0].sum(dim=-1, keepdim=True) + torch.zeros(60).double()
    how = {"mask": mask, "bias": torch.where(mask, bias, torch.where(torch.arange(60) % 2 == 0, NAN, INF))}
    found = derived(lambda *given: torch.ops.kvattn.masked(*given, how["bias"], mask, None)[0], arrays)
    assert all(x.isfinite().all() for x in found)
    same(found, wanted(arrays, {"mask": mask, "bias": bias}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_nan_in_a_compiled_program(dtype):
    """A key that is inf makes scores of inf, for which PyTorch's kernel gives zeros."""
    arrays = drawn(60, dtype)
    arrays[1][1, 0, 3] = INF
    torch._dynamo.reset()
    attend = torch.compile(lambda *given: kvattn.attention(*given, valid_lens=torch.tensor([40, 50])), backend="aot_eager")
    output, by_query, *_ = derived(attend, arrays)
    reached = torch.zeros(2, 4, 60, dtype=torch.bool)
    reached[1, :2] = True
    signs = arrays[0][1, :2].sum(dim=-1) > 0
    for x in (output, by_query):
        assert x[~reached].isfinite().all()
        assert not x[1, :2][signs].isfinite().all(dim=-1).any()


def test_few_numbers_and_other_machines_have_no_operator_of_masks():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return kvattn.attention(query, key, value, valid_lens=torch.tensor([1, 3]))

    graphs = []
    torch._dynamo.reset()
    few, many = drawn(8)[:3], drawn(60)[:3]
    torch.compile(Attend(), backend=counting(graphs), fullgraph=True, dynamic=False)(*few)
    assert [torch.ops.kvattn.masked in found for found in graphs] == [False]
    assert "kvattn" not in str(torch.export.export(Attend(), tuple(many), strict=True).graph)


def test_an_operator_takes_arrays_whose_rows_lie_in_pieces():
    query, key, value = (x.mT.contiguous().mT for x in drawn(60)[:3])
    bias = options(60)["a bias"]["bias"]
    given, mask = (query, key, value), torch.arange(60) < torch.tensor([40, 50])[:, None, None, None]
    torch.library.opcheck(torch.ops.kvattn.masked, (*(x.requires_grad_() for x in given), bias, None, None))
    torch.library.opcheck(torch.ops.kvattn.masked, (*given, bias, mask, None))
    found = operators._masked(*(x.detach() for x in given), bias, mask, None)[0]
    with kvattn.use_backend("numpy"):
        want = kvattn.attention(*(x.detach().numpy() for x in given), bias=bias.numpy(), mask=mask.numpy())
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


# ---- derivatives of all kinds


def _by_jvp(attend, query, grad):
    return torch.func.jvp(attend, (query,), (grad,))[1]


def _by_dual(attend, query, grad):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(attend(forward_ad.make_dual(query, grad))).tangent


def _by_grad(attend, query, grad):
    return torch.func.grad(lambda x: (attend(x) * grad).sum())(query)


def _by_vjp(attend, query, grad):
    return torch.func.vjp(attend, query)[1](grad)[0]


def _twice(attend, query, grad):
    query = query.clone().requires_grad_()
    first = torch.autograd.grad((attend(query) * grad).sum(), query, create_graph=True)[0]
    return torch.autograd.grad(first.pow(2).sum(), query)[0]


def _by_hessian(attend, query, grad):
    return torch.func.jvp(torch.func.grad(lambda x: (attend(x) * grad).sum()), (query,), (grad,))[1]


def _forward_over_reverse(attend, query, grad):
    query = query.clone().requires_grad_()
    output = attend(query)
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(torch.autograd.grad(output, query, forward_ad.make_dual(grad, grad))[0]).tangent


def _by_each(attend, query, grad):
    query = query.clone().requires_grad_()
    return torch.autograd.grad(attend(query), query, torch.stack([grad, 2 * grad]), is_grads_batched=True)[0]


INSIDE, AROUND = (_by_jvp, _by_grad, _by_vjp), (_twice, _by_each)
REFUSED = _by_hessian, _by_dual, _forward_over_reverse  # as with the mask of all pairs: SDPA has no forward derivatives


IDS = torch.tensor([[5] * 120 + [2] * 80 + [9] * 100, [1] * 100 + [7] * 150 + [1] * 50])  # one lies in two places
MASK = IDS[:, None, :, None] == IDS[:, None, None, :]
SERVED = {"segments": {"segments": IDS}, "masked": {"mask": MASK}}


def _derived_from(name):
    """Attention where key and value are made of the query, the same by the formula, a query and a direction."""

    def dot(query, key):  # a score of one's own, which only the formula takes
        return query @ key.mT / 8**0.5

    query, _, _, grad = drawn(300)
    return (
        lambda x: kvattn.attention(x, x, x.sin(), **SERVED[name]),
        lambda x: kvattn.attention(x, x, x.sin(), mask=MASK, score=dot),
        query,
        grad,
    )


def _formula(derive, formula, query, grad):
    if derive is _by_each:  # one after another
        return torch.stack([_by_vjp(formula, query, x) for x in (grad, 2 * grad)])
    return derive(formula, query, grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "derive"),
    [("segments", derive) for derive in INSIDE + AROUND + REFUSED] + [("masked", _twice), ("masked", _by_grad)],
)
def test_derivatives_of_a_compiled_program(name, derive):
    attend, formula, query, grad = _derived_from(name)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager")
    compiled(query)  # the program that holds the operator is there before it is asked for more
    run = partial(derive, compiled)
    if derive in INSIDE or derive is _by_hessian:
        run = torch.compile(partial(derive, attend), backend="eager")
    if derive in REFUSED:
        with pytest.raises(NotImplementedError, match="forward"):
            run(query, grad)
    else:
        torch.testing.assert_close(run(query, grad), _formula(derive, formula, query, grad), rtol=0, atol=1e-10)


REST = {"segments": (torch.zeros(1, 300, dtype=torch.int64),) * 2 + (None, None, 0, None), "masked": (None, None, None)}


@pytest.mark.parametrize("derive", [_by_dual, _by_jvp])
@pytest.mark.parametrize("name", REST)
def test_an_operator_refuses_a_tangent(name, derive):
    query = torch.ones(1, 1, 300, 8)
    with pytest.raises(RuntimeError):
        derive(lambda x: getattr(torch.ops.kvattn, name)(x, query, query, *REST[name]), query, query)


@pytest.mark.parametrize("name", REST)
def test_the_gradients_of_an_operator_refuse_to_be_differentiated(name):
    query, back = torch.ones(1, 1, 300, 8, requires_grad=True), getattr(torch.ops.kvattn, f"{name}_backward")
    results = (
        [x.detach() for x in getattr(torch.ops.kvattn, name)(query, query, query, *REST[name])] if name == "masked" else []
    )
    with pytest.raises(NotImplementedError, match="has no derivatives"):
        back(query, query, query, *REST[name], *results, query)
    query = query.detach()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no derivatives"):
        back(query, query, query, *REST[name], *results, forward_ad.make_dual(query, query))
