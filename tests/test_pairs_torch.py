"""Functions of positions and segments where PyTorch records a program, and gradients by what a bias function reads."""

import numpy as np
import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said

import kvattn

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
