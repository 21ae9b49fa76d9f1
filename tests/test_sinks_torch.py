"""Sinks on PyTorch's fused kernel: its backward is given the output and the lse with the sink."""

import pytest
from conftest import chosen

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch

import kvattn
from kvattn.kernels.torch import sinks


def inputs(n=6, heads=2):
    torch.manual_seed(0)
    made = [torch.randn(1, h, n, 4, dtype=torch.float64, requires_grad=True) for h in (heads, heads // 2, heads // 2)]
    return *made, torch.randn(heads, dtype=torch.float64, requires_grad=True)


def attend(query, key, value, sink, **options):
    return kvattn.attention(query, key, value, sink=sink, **options)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (1, 1)}, {"mask": torch.eye(6, dtype=torch.bool)}], ids=str
)
def test_sinks_have_first_and_second_derivatives_on_the_fused_kernel(options):
    *arrays, sink = inputs()
    assert kvattn.explain(*arrays, sink=sink, **options).kernel.startswith("SDPA") or not sinks.KNOWN

    def by_sink_and_value(sink, value):
        return attend(*arrays[:2], value, sink, **options)

    assert torch.autograd.gradcheck(by_sink_and_value, (sink, arrays[2]), fast_mode=True)
    assert torch.autograd.gradgradcheck(by_sink_and_value, (sink, arrays[2]), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sink_is_a_key_of_zeros_whose_score_it_is(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 300, 16).to(dtype) for _ in range(3))
    sink = torch.randn(4).to(dtype)
    key_of_zeros, value_of_zeros = (torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in (key, value))
    bias = torch.zeros(4, 1, 301, dtype=dtype)
    bias[..., 0] = sink[:, None]
    expected = kvattn.attention(query, key_of_zeros, value_of_zeros, bias=bias, causal=True, query_offset=1)
    error = (attend(query, key, value, sink, causal=True).double() - expected.double()).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps


def test_a_sink_that_is_traced_or_transformed_is_the_same():
    *arrays, sink = inputs()
    expected = attend(*arrays, sink, causal=True)
    compiled = torch.compile(lambda *x: attend(*x, causal=True), backend="aot_eager", fullgraph=True)
    assert (compiled(*arrays, sink) - expected).abs().max() < 1e-12
    (by_sink,) = torch.autograd.grad(expected.sum(), sink)
    transformed = torch.func.grad(lambda sink: attend(*arrays, sink, causal=True).sum())(sink)
    assert (transformed - by_sink).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (2, 2, 300, 1), (2, 1, 1, 1)], ids=str)
def test_each_batch_entry_keeps_its_own_sinks_where_lengths_divide_the_batch(shape):
    torch.manual_seed(0)
    arrays = [torch.randn(2, 2, 300, 64, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sink, lens = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.tensor([20, 300])
    assert kvattn.explain(*arrays, sink=sink, valid_lens=lens).kernel == "SDPA, by lengths" or not sinks.KNOWN
    found = attend(*arrays, sink, valid_lens=lens)
    alone = [attend(*(x[i : i + 1] for x in (*arrays, sink)), valid_lens=lens[i : i + 1]) for i in range(2)]
    gradients = (torch.autograd.grad(x.sin().sum(), [*arrays, sink]) for x in (found, torch.cat(alone)))
    for x, y in [(found, torch.cat(alone)), *zip(*gradients, strict=True)]:
        assert (x - y).abs().max() < 1e-12


@pytest.mark.parametrize("lens", [None, torch.tensor([7, 7])], ids=["causal", "lengths"])
def test_a_query_of_nan_beside_few_of_many_keys_and_a_sink_is_nan(lens):
    """Of fewer than 16 keys the kernel gives zeros for it."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 64), *torch.randn(2, 2, 4, 9000, 64)
    query[0, 0, 3] = torch.nan
    options = {"sink": torch.zeros(4), "valid_lens": lens, "causal": lens is None}
    kernel = kvattn.explain(query, key, value, **options).kernel
    assert kernel == ("SDPA" if lens is None else "SDPA, by lengths") or not sinks.KNOWN
    lost = attend(query, key, value, **options).isnan()
    assert lost[0, 0, 3].all()
    assert lost.sum() == 64  # numbers of this row
