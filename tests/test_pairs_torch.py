"""Functions of positions and segments where PyTorch records a program, and gradients by what a bias function reads."""

from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad

import kvattn
from kvattn import pairs

TENSORS = [torch.from_numpy(x) for x in inputs()]
SAID = said(torch.from_numpy(SLOPES), torch.from_numpy(SEGMENTS), torch.Tensor.float)


class Attend(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return kvattn.attention(query, key, value, **self.options)


WAYS = {
    "compiled": lambda module: torch.compile(module, backend="eager", fullgraph=True),
    "compiled for every size": lambda module: torch.compile(module, backend="eager", dynamic=True),
    "traced": lambda module: torch.jit.trace(module, TENSORS, check_trace=False),
    "exported": lambda module: torch.export.export(module, tuple(TENSORS)).module(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAID)
def test_a_recorded_program_gives_the_answer(name, way):
    torch._dynamo.reset()
    with looked_at():
        got = WAYS[way](Attend(SAID[name]))(*TENSORS)
    np.testing.assert_allclose(got, answers()[name], atol=1e-5)


@pytest.mark.parametrize("name", ["mask", "no window", "bias"])
def test_each_entry_of_vmap_is_its_own(name):
    with looked_at():
        got = torch.func.vmap(Attend(SAID[name]))(*TENSORS)
    np.testing.assert_allclose(got, answers()[name], atol=1e-5)


@pytest.mark.parametrize("most", [10**6, 2000])
def test_what_a_bias_function_reads_has_its_gradient(most):
    slopes = torch.from_numpy(SLOPES.copy()).requires_grad_()
    with looked_at(BIAS=most):
        kvattn.attention(*TENSORS, **said(slopes, None, torch.Tensor.float)["bias"]).sum().backward()
    np.testing.assert_allclose(slopes.grad, answers()["by the slopes"], rtol=1e-4)


def _packed(n=300):
    """query, key, value, the gradient of the output, and segments of which one lies in two places."""
    rng = np.random.default_rng(1)
    arrays = [torch.from_numpy(rng.standard_normal((2, 4 if i in (0, 3) else 2, n, 8))) for i in range(4)]
    return arrays, torch.tensor([[5] * 120 + [2] * 80 + [9] * (n - 200), [1] * 100 + [7] * 150 + [1] * (n - 250)])


PACKED = {"alone": {}, "causal": {"causal": True, "scale": 0.5}, "a window": {"window": (30, 4), "query_offset": 2}}


@pytest.mark.parametrize("name", PACKED)
def test_a_compiled_program_reads_segments_when_it_runs(name):
    arrays, ids = _packed()
    graphs, same = [], (torch.arange(300) // 100).repeat(2, 1)

    def backend(module, inputs):
        graphs.append(module)
        return aot_eager(module, inputs)

    def derived(attend, ids):
        *inputs, grad = (x.clone().requires_grad_(i < 3) for i, x in enumerate(arrays))
        output = attend(*inputs, ids)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad)]

    def attend(query, key, value, ids):
        return kvattn.attention(query, key, value, segments=ids, **PACKED[name])

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for segments in (ids, same):  # one program for both
        mask = segments[:, None, :, None] == segments[:, None, None, :]
        want = derived(lambda *given: kvattn.attention(*given[:3], mask=mask, **PACKED[name]), segments)  # noqa: B023
        for x, y in zip(derived(compiled, segments), want, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    targets = [[node.target for node in graph.graph.nodes] for graph in graphs]
    assert [torch.ops.kvattn.segments in found for found in targets] == [True]


def test_a_compiled_program_leaves_out_what_shares_no_segment():
    (query, key, value, _), sizes = _packed(1024)[0], []
    ids = (torch.arange(1024) // 128).repeat(2, 1)

    def cut(parts, *rest, _of=pairs.cut):
        if len(parts) > 1:  # else it is the one by whose shape a kernel is chosen
            sizes.extend((part.end - part.start) * (part.runs[0][1] - part.runs[0][0]) for part in parts)
        return _of(parts, *rest)

    torch._dynamo.reset()
    with patch.object(pairs, "cut", cut):
        torch.compile(lambda *given: kvattn.attention(*given, segments=ids), backend="eager")(query, key, value)
    assert sum(sizes) == 1024 * 128


def test_programs_for_other_machines_hold_no_operator_of_segments():
    arrays, ids = _packed()
    program = torch.export.export(Attend({"segments": ids}), tuple(arrays[:3]), strict=True)
    assert "kvattn" not in str(program.graph)


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


def _derived_from_segments():
    """Attention of segments where key and value are made of the query, the same by a mask, a query and a direction."""
    (query, _, _, grad), ids = _packed()
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    attend, formula = (
        lambda x, options=options: kvattn.attention(x, x, x.sin(), **options) for options in ({"segments": ids}, {"mask": mask})
    )
    return attend, formula, query, grad


def _formula(derive, formula, query, grad):
    if derive is _by_each:  # one after another
        return torch.stack([_by_vjp(formula, query, x) for x in (grad, 2 * grad)])
    return derive(formula, query, grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("derive", INSIDE + AROUND + REFUSED)
def test_derivatives_of_a_compiled_program_of_segments(derive):
    attend, formula, query, grad = _derived_from_segments()
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


@pytest.mark.parametrize("derive", [_by_dual, _by_jvp])
def test_the_operator_of_segments_refuses_a_tangent(derive):
    query, ids = torch.ones(1, 1, 300, 8), torch.zeros(1, 300, dtype=torch.int64)
    with pytest.raises(RuntimeError):
        derive(lambda x: torch.ops.kvattn.segments(x, query, query, ids, ids, None, None, 0, None), query, query)


def test_the_gradients_of_the_operator_of_segments_refuse_to_be_differentiated():
    query, ids = torch.ones(1, 1, 300, 8, requires_grad=True), torch.zeros(1, 300, dtype=torch.int64)
    given = ids, ids, None, None, 0, None
    with pytest.raises(NotImplementedError, match="has no derivatives"):
        torch.ops.kvattn.segments_backward(query, query, query, *given, query)
    query = query.detach()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no derivatives"):
        torch.ops.kvattn.segments_backward(query, query, query, *given, forward_ad.make_dual(query, query))
