"""One trace serves every input: PyTorch's tracers, each given one set of sizes and lengths, and run with others."""

import copy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

import kvattn
import kvattn.numpy

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from traced import RESTRICTIONS, SIZES, D, V, call, draw, empty, full, padded, short

import kvattn.torch
from kvattn import torch as kv

# PyTorch warns of every size that Python compares while torch.jit.trace looks on
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Module(torch.nn.Module):
    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, torch.nn.ModuleList(parts)

    def forward(self, *arrays):
        return self.function(*arrays)


def free(x):
    """Every axis dynamic but the heads and features, and those of size 1."""
    fixed = [1, x.ndim - 1] if x.ndim == 4 and x.shape[-1] in (D, V) else []
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(x.shape) if axis not in fixed and size != 1}


def jit(function, *first, parts=()):
    return torch.jit.trace(Module(function, *parts), first, check_trace=False)


def recorded(mode, pre_dispatch, function, *first):
    return make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(*first)


def exported(strict, function, *first, parts=(), free=free):
    module = Module(function, *parts)
    program = torch.export.export(module, first, dynamic_shapes=(tuple(map(free, first)),), strict=strict)
    # for sizes of every length, as far as an encoder's 1,000 positions reach
    assert [size for size in program.range_constraints.values() if size.lower > 2 or size.upper < 998] == []
    return program.module()


def functional(function, *first):
    return make_fx(torch.func.functionalize(function), tracing_mode="symbolic")(*first)


def compiled(function, *first, parts=()):
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
    changes = [full, short, empty, *[padded] * (which == "lengths")]
    inputs = [change(draw(*FIRST, seed=1)) for change in changes]
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
    attention = layer if name == "DotProductAttention" else layer.attention
    shown = attention.attention_weights.clone()
    with torch.no_grad():
        bias.zero_()  # as an optimiser writes into it
    torch.testing.assert_close(attention.attention_weights, shown, rtol=0, atol=0)


# ---- whole models, and caches


ENCODER = {"vocab_size": 20, "num_hiddens": 8, "ffn_num_hiddens": 6, "num_heads": 2, "num_blks": 2, "seed": 1}
RNG = np.random.default_rng(0)
PARAMS = dict(zip(("W_q", "W_k", "W_v", "W_o"), RNG.standard_normal((4, 8, 8)).astype("float32"), strict=True))


def normal(*shape):
    return RNG.standard_normal(shape).astype("float32")


def tokens(*shape):
    return RNG.integers(0, 20, shape)


def every(x):
    """Every axis dynamic but those of size 1, the features (8, or 4 in a head), and the heads."""
    fixed = [x.ndim - 1, *([1] if x.ndim == 4 else [])] if x.is_floating_point() else []
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(x.shape) if axis not in fixed and size != 1}


def heads(x, y, lens):
    return kvattn.multi_head_attention(x, y, y, PARAMS, num_heads=2, valid_lens=lens)


def itself(x, lens):
    return kvattn.self_attention(x, *list(PARAMS.values())[:3], valid_lens=lens, causal=True)


def twice(x, y):
    """Two steps of attention with a cache that is empty at first."""
    call = {"params": PARAMS, "num_heads": 2, "causal": True}
    first, cache = kvattn.multi_head_attention(x, x, x, **call, cache=kvattn.KVCache())
    second, cache = kvattn.multi_head_attention(y, y, y, **call, cache=cache)
    return first, second, cache.key


def continued(x, key, value):
    """A step with a cache that is full."""
    cache = kvattn.KVCache(key, value, key.shape[-2])
    return kvattn.multi_head_attention(x, x, x, PARAMS, num_heads=2, causal=True, cache=cache)[0]


def extended(key, value, more):
    return kvattn.KVCache().extend(key, value).extend(more, more).seen()


def shifted(query, key):
    return kvattn.attention(query, key, key, causal=True, query_offset=key.shape[-2] - query.shape[-2])


STEPS = {
    "heads": (heads, lambda b, n, m: (normal(b, n, 8), normal(b, m, 8), RNG.integers(0, m + 2, b))),
    "itself": (itself, lambda b, n, m: (normal(b, n, 8), RNG.integers(0, n + 2, b))),
    "twice": (twice, lambda b, n, m: (normal(b, m, 8), normal(b, n, 8))),
    "continued": (continued, lambda b, n, m: (normal(b, n, 8), normal(b, 2, m, 4), normal(b, 2, m, 4))),
    "extended": (extended, lambda b, n, m: (normal(b, 2, m, 4), normal(b, 2, m, 4), normal(b, 2, n, 4))),
    "shifted": (shifted, lambda b, n, m: (normal(b, 2, n, 4), normal(b, 2, m, 4))),
}


BY_STEPS = [(way, what) for what in STEPS for way in ("jit", "exported")]
BY_STEPS += [("exported strictly", "continued"), ("exported strictly", "heads"), ("compiled", "twice")]


@pytest.mark.parametrize(("way", "what"), BY_STEPS)
def test_one_trace_of_heads_and_caches_serves_every_input(way, what, monkeypatch):
    function, arrays = STEPS[what]
    first = arrays(6, 3, 5)
    sizes = [(6, 3, 5), (2, 4, 9), (3, 2, 2), (2, 7, 3)] + ([(1, 1, 4), (2, 3, 0), (0, 3, 2)] if way == "jit" else [])
    calls = [arrays(*size) for size in sizes]
    with kvattn.use_backend("numpy"):
        expected = [function(*given) for given in calls]
    monkeypatch.setattr(f"{__name__}.PARAMS", {name: torch.tensor(x) for name, x in PARAMS.items()})
    more = {"free": every} if way.startswith("exported") else {}
    program = WAYS[way](function, *map(torch.tensor, first), **more)
    for given, answers in zip(calls, expected, strict=True):
        found = program(*map(torch.tensor, given))
        for x, y in zip(found, answers, strict=True) if isinstance(answers, tuple) else [(found, answers)]:
            assert_near(x, y, str([x.shape for x in given]), 128)  # of several products in a row


def encoded(encoder, x, y, lens):
    """All of x at one time, and x and then y by steps."""
    whole = encoder(x, lens)
    first, caches = encoder(x, cache=[], causal=True)
    second, caches = encoder(y, cache=caches, causal=True)
    return whole, first, second, caches[-1].key


@pytest.mark.parametrize("way", ["jit", "exported"])
def test_one_trace_of_an_encoder_serves_every_input(way):
    layer, native = kv.TransformerEncoder(**ENCODER).eval(), kvattn.numpy.TransformerEncoder(**ENCODER)

    def arrays(b, n, m):
        return tokens(b, m), tokens(b, n), RNG.integers(0, m + 2, b)

    first = [torch.tensor(x) for x in arrays(6, 3, 5)]
    layer(first[0])  # its weights take their sizes from a call
    more = {"free": every} if way.startswith("exported") else {}
    with torch.no_grad():
        program = WAYS[way](partial(encoded, layer), *first, parts=[layer], **more)
        for size in [(6, 3, 5), (2, 4, 9), (3, 2, 2)] + ([(1, 1, 4), (2, 0, 3), (0, 3, 2), (2, 3, 0)] if way == "jit" else []):
            given = arrays(*size)
            found = program(*map(torch.tensor, given))
            for x, y in zip(found, encoded(native, *given), strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=str(size))


def test_a_decoders_step_is_exported_with_the_caches_of_its_state():
    decoder = kv.TransformerDecoder(**ENCODER).eval()
    h, heads = ENCODER["num_hiddens"], ENCODER["num_heads"]
    source, words = torch.tensor(normal(2, 3, h)), torch.tensor(tokens(2, 4))
    with torch.no_grad():
        whole, _ = decoder(words, decoder.init_state(source, torch.tensor([2, 3])))
        room = [
            kv.KVCache.allocate((2, heads, 6, h // heads), like=source)._replace(length=torch.tensor(0)) for _ in decoder.blks
        ]
        state, steps = [source, torch.tensor([2, 3]), room], []
        step = torch.export.export(decoder, (words[:, :1], state)).module()
        for i in range(4):
            logits, state = step(words[:, i : i + 1], state)
            steps.append(logits)
    assert_near(torch.cat(steps, 1), whole, units=1024)


@pytest.mark.parametrize("way", ["exported", "compiled"])
def test_a_cache_with_room_is_written_where_the_trace_is_told(way):
    key, value, x = normal(2, 2, 7, 4), normal(2, 2, 7, 4), normal(2, 1, 8)

    def step(x, key, value, at):
        cache = kvattn.KVCache(key, value, at)
        output, cache = kvattn.multi_head_attention(x, x, x, PARAMS, num_heads=2, causal=True, cache=cache)
        return output, cache.key

    with kvattn.use_backend("numpy"):
        expected = [step(x, key.copy(), value.copy(), at) for at in (4, 0, 6)]
    more = {"free": every} if way == "exported" else {}
    program = WAYS[way](step, *map(torch.tensor, (x, key, value, np.array(4))), **more)
    for at, (output, written) in zip((4, 0, 6), expected, strict=True):
        found = program(*map(torch.tensor, (x, key, value, np.array(at))))
        np.testing.assert_allclose(found[0], output, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found[1][..., : at + 1, :], written[..., : at + 1, :], rtol=0, atol=1e-5)


def test_a_program_outlives_what_eager_calls_of_other_classes_leave_behind(monkeypatch):
    """Also where no call came before it: the first, which loads the tab, would make another program of the second."""
    monkeypatch.setattr(kvattn.registry, "_homes", {})
    monkeypatch.setattr(kvattn.registry, "loaded", {})
    torch._dynamo.reset()
    count = CompileCounter()
    weight = torch.nn.Parameter(torch.ones(4, 4))
    call = torch.compile(
        lambda x: kvattn.attention(x @ weight, x, x, mask=lambda query, key: key <= query, query_offset=0),
        backend=count, fullgraph=True,
    )  # fmt: skip
    for _ in range(3):
        call(torch.ones(2, 3, 4))
        of_a_new_class = np.ones((3, 4)).view(type("New", (np.ndarray,), {}))
        kvattn.attention(*[of_a_new_class] * 3, mask=lambda query, key: key <= query)
    assert count.frame_count == 1


def test_one_compiled_window_serves_every_length():
    programs = []
    torch._dynamo.reset()
    call = torch.compile(
        lambda x: kvattn.attention(x, x, x, causal=True, window=2), fullgraph=True, dynamic=True,
        backend=lambda graph, _: programs.append(graph) or graph,
    )  # fmt: skip
    for n in (5, 7, 9, 30, 31):
        x = normal(2, 2, n, 4)
        expected = kvattn.attention(x, x, x, causal=True, window=2, backend="numpy")
        np.testing.assert_allclose(call(torch.tensor(x)), expected, rtol=0, atol=1e-5)
    assert len(programs) == 1


@pytest.mark.parametrize("given", ["valid_lens", "per query", "mask", "mask and bias"])
@pytest.mark.parametrize(("grows", "programs"), [(0, 1), (1, 2)])
def test_few_programs_serve_twenty_lengths(monkeypatch, given, grows, programs):
    """One, though their dtypes are new; two where sizes grow, which PyTorch takes for unknown from the second on."""
    kvattn.attention(*[torch.zeros(1, 1)] * 3)
    monkeypatch.setattr(kvattn.conversion, "_names", {})
    torch._dynamo.reset()
    count = CompileCounter()
    compiled = torch.compile(lambda q, k, options: kvattn.attention(q, k, k, **options), backend=count, fullgraph=True)
    for n in (20 + i * grows for i in range(20)):
        lens = torch.randint(1, n, (2, n))
        mask = torch.arange(n) < lens[:, None, :1, None]
        options = {
            "valid_lens": {"valid_lens": lens[:, 0]},
            "per query": {"valid_lens": lens},
            "mask": {"mask": mask},
            "mask and bias": {"mask": mask, "bias": torch.randn(4, n, n)},
        }[given]
        q, k = torch.randn(2, 4, n, 8, dtype=torch.float64), torch.randn(2, 4, n, 8, dtype=torch.float64)
        options |= {"bias": options["bias"].double()} if "bias" in options else {}
        torch.testing.assert_close(compiled(q, k, options), kvattn.attention(q, k, k, **options))
    assert count.frame_count == programs


@pytest.mark.parametrize("sizes", [(2, 0, 3), (2, 3, 0), (0, 3, 2)])
def test_layers_take_inputs_without_elements(sizes):
    b, n, m = sizes
    for name in ("torch", "numpy"):
        layer = getattr(kvattn, name).MultiHeadAttention(8, 2, seed=1)
        x, y = (torch.tensor(a) if name == "torch" else a for a in (normal(b, n, 8), normal(b, m, 8)))
        assert tuple(layer(x, y, y).shape) == (b, n, 8)
        assert tuple(layer.attention.attention_weights.shape) == (2 * b, n, m)


def test_a_table_of_rotary_that_an_inference_made_serves_a_differentiated_call():
    with torch.inference_mode():
        kvattn.rotary(torch.zeros(5, 6), 12345)
    leaf = torch.ones(5, 6, requires_grad=True)
    kvattn.rotary(leaf, 12345).sum().backward()
    assert leaf.grad is not None


def test_no_compiler_is_loaded_until_one_is_asked_for():
    # it takes longer to import than all of kvattn, and Triton, which it imports, ends a process that has loaded TensorFlow
    code = """
import sys, torch, kvattn.torch as kv
x = torch.ones(1, 2, 4, 8, requires_grad=True)
kv.attention(x, x, x, causal=True, valid_lens=[3], sink=0.0, dropout=0.5, rng=0).sum().backward()
kv.MultiHeadAttention(8, 2)(x[0], x[0], x[0], None)
print(sorted({"torch._dynamo", "triton"} & {*sys.modules}))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
