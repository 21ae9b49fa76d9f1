"""One trace serves every input: PyTorch's tracers, each given one set of sizes and lengths, and run with others."""

import copy
from functools import partial

import numpy as np
import pytest
from conftest import chosen

import kvattn

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from traced import RESTRICTIONS, SIZES, D, V, call, draw, empty, full, short

from kvattn import torch as kv

# PyTorch warns of every size that Python compares while torch.jit.trace looks on
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arrays):
        return self.function(*arrays)


def free(x):
    """Every axis dynamic but the heads and features, and those of size 1."""
    fixed = [1, x.ndim - 1] if x.ndim == 4 and x.shape[-1] in (D, V) else []
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(x.shape) if axis not in fixed and size != 1}


def jit(function, *first):
    return torch.jit.trace(Module(function), first, check_trace=False)


def recorded(mode, pre_dispatch, function, *first):
    return make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(*first)


def exported(strict, function, *first):
    program = torch.export.export(Module(function), first, dynamic_shapes=(tuple(map(free, first)),), strict=strict)
    return program.module()


def functional(function, *first):
    return make_fx(torch.func.functionalize(function), tracing_mode="symbolic")(*first)


def compiled(function, *first):
    torch._dynamo.reset()
    program = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    program(*first)
    return program


WAYS = {
    "jit": jit,
    "real": partial(recorded, "real", False),
    "real, before dispatch": partial(recorded, "real", True),
    "fake": partial(recorded, "fake", False),
    "symbols": partial(recorded, "symbolic", False),
    "symbols, before dispatch": partial(recorded, "symbolic", True),
    "functional": functional,
    "exported": partial(exported, False),
    "exported strictly": partial(exported, True),
    "compiled": compiled,
}
FIRST = (6, 4, 5)  # no two sizes alike: sizes that are may share a symbol
SOME = ("lengths", "an offset for each", "window", "positions")  # of these every way is tried
PAIRS = [(way, which) for which in RESTRICTIONS for way in ("jit", "symbols", "exported")]
PAIRS += [(way, which) for way in WAYS if way[-2:] not in ("ed", "ly") for which in SOME if (way, which) not in PAIRS]
PAIRS += [(way, which) for way in ("compiled", "exported strictly") for which in ("lengths", "positions")]
FIXED = ("real", "real, before dispatch", "fake")  # a program for one set of sizes
SMALLEST = {"jit": 1, "compiled": 0}  # a symbol stands for two or more


@pytest.mark.parametrize(("way", "which"), PAIRS)
def test_one_trace_serves_every_input(way, which):
    names, options = RESTRICTIONS[which]
    arguments = ["query", "key", "value", *names.values()]

    def attend(query, key, value, *restricting):
        given = {**options, **dict(zip(names, restricting, strict=True))}
        return kvattn.attention(query, key, value, **given)

    first = draw(*FIRST)
    program = WAYS[way](attend, *[torch.tensor(first[name]) for name in arguments])
    inputs = [change(draw(*FIRST, seed=1)) for change in (full, short, empty)]
    if way not in FIXED:
        inputs += [draw(*sizes) for sizes in (*SIZES[1:], (2, 6, 3), (3, 5, 5)) if min(sizes) >= SMALLEST.get(way, 2)]
    for arrays in inputs:
        given = [arrays[name] for name in arguments]
        with kvattn.use_backend("numpy"):
            expected = attend(*given)
        found = program(*map(torch.tensor, given))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(arrays["query"].shape))


@pytest.mark.parametrize(("way", "which"), [("real", "lengths"), *(("symbols", which) for which in RESTRICTIONS)])
def test_one_trace_of_gradients_serves_every_input(way, which):
    names, options = RESTRICTIONS[which]
    arguments = ["query", "key", "value", "grad", *names.values()]
    first = draw(*FIRST)
    program = WAYS[way](partial(call, list(names), options), *[torch.tensor(first[name]) for name in arguments])
    inputs = [change(draw(*FIRST, seed=1)) for change in (full, short, empty)]
    for arrays in inputs + ([draw(3, 6, 7), draw(2, 6, 3)] if way not in FIXED else []):
        given = [arrays[name] for name in arguments]
        found = program(*map(torch.tensor, given))
        with kvattn.use_backend("numpy"):
            expected = call(list(names), options, *given)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=str(arrays["query"].shape))


@pytest.mark.parametrize("dynamic", [False, True])
def test_causal_may_be_a_comparison_of_sizes(dynamic):
    def attend(query, softcap):
        return kvattn.attention(query, query, query, causal=query.shape[-2] > 1, softcap=softcap)

    program = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="eager")
    for n, softcap in ((4, 2.0), (1, 3.0), (6, 2.5)):
        query = draw(2, n, n)["query"]
        expected = kvattn.attention(query, query, query, causal=True, softcap=softcap, backend="numpy")
        np.testing.assert_allclose(program(torch.tensor(query), softcap), expected, rtol=0, atol=1e-5)


def test_export_takes_causal_from_a_comparison_of_sizes():
    program = exported(False, lambda x: kvattn.attention(x, x, x, causal=x.shape[-2] > 1), torch.tensor(draw(6, 4, 4)["query"]))
    query = draw(3, 7, 7)["query"]
    expected = kvattn.attention(query, query, query, causal=True, backend="numpy")
    np.testing.assert_allclose(program(torch.tensor(query)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["jit", "exported"])
def test_a_layer_is_traced_with_one_input_and_keeps_nothing_of_it(way):
    layer = kv.MultiHeadAttention(8, 2, seed=1).eval()
    rng = np.random.default_rng(0)

    def arrays(b, n, lens):
        return [torch.tensor(rng.standard_normal((b, n, 8)).astype("float32")), torch.tensor(lens)]

    layer(*[arrays(6, 4, [4] * 6)[0]] * 3)
    layer.attention._last = None

    class Self(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, lens):
            return self.layer(x, x, x, lens)

    first = arrays(6, 4, [4] * 6)
    if way == "jit":
        program = torch.jit.trace(Self(), first, check_trace=False)
    else:
        free = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
        program = torch.export.export(Self(), tuple(first), dynamic_shapes=free).module()
    assert layer.attention._last is None
    params = kv.export_weights(layer)
    for b, n, lens in ((6, 4, [1, 0, 4, 2, 9, 3]), (3, 7, [7, 0, 2]), (2, 5, [0, 0])):
        x, lens = arrays(b, n, lens)
        expected = kvattn.multi_head_attention(*[x.numpy()] * 3, params, num_heads=2, valid_lens=lens.numpy(), backend="numpy")
        np.testing.assert_allclose(program(x, lens).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["DotProductAttention", "MultiHeadAttention"])
def test_a_layer_is_copied_after_a_call_with_a_learned_bias(name):
    layer = kv.DotProductAttention() if name == "DotProductAttention" else kv.MultiHeadAttention(8, 2, seed=1)
    x, bias = torch.randn(2, 3, 8), torch.randn(3, 3, requires_grad=True)
    output = layer(x, x, x, bias=bias)
    copied = copy.deepcopy(layer)
    torch.testing.assert_close(copied(x, x, x, bias=bias), output, rtol=0, atol=0)
    output.sum().backward()
    assert bias.grad is not None
