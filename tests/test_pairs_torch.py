"""Functions of positions and segments where PyTorch records a program, and gradients by what a bias function reads."""

from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said
from torch._dynamo.backends.debugging import aot_eager

import kvattn
from kvattn import partition

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

    def cut(parts, *rest, _of=partition.cut):
        if len(parts) > 1:  # else it is the one by whose shape a kernel is chosen
            sizes.extend((part.end - part.start) * (part.runs[0][1] - part.runs[0][0]) for part in parts)
        return _of(parts, *rest)

    torch._dynamo.reset()
    with patch.object(partition, "cut", cut):
        torch.compile(lambda *given: kvattn.attention(*given, segments=ids), backend="eager")(query, key, value)
    assert sum(sizes) == 1024 * 128


def test_programs_for_other_machines_hold_no_operator_of_segments():
    arrays, ids = _packed()
    program = torch.export.export(Attend({"segments": ids}), tuple(arrays[:3]), strict=True)
    assert "kvattn" not in str(program.graph)
