"""One trace serves every input: PyTorch's tracers, each given one set of sizes and lengths, and run with others."""

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
