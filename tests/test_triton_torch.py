"""kvattn's kernel in Triton, run by Triton's interpreter on the CPU: its numbers are the other paths' and the suite's.

What only a device can show (bfloat16, which the interpreter's products do not know; speed), benchmarks/gpu.py shows.
"""

import importlib.util
import os
import warnings
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
from conftest import chosen
from device_calls import CALLS, draw, hidden, run

import kvattn
from kvattn import conformance
from kvattn.conformance.cases import NOT_FINITE

if "torch" not in chosen():
    pytest.skip("this run is without PyTorch", allow_module_level=True)

# Triton reads it where functions are defined, its own too: before anything imports it
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this run is without Triton's interpreter, which `tox -e torch` has", allow_module_level=True)

import torch

from kvattn.call import Call
from kvattn.kernels.torch import flash, gpu, plan, tiles

assert flash.INTERPRETED
NAN = float("nan")
SMALL = (16, 16, 4, 1)  # tiles: (queries, keys, ...)
rng = np.random.default_rng(0)
EXTRA = [
    {},
    {"mask": rng.random((3, 1, 20, 40)) < 0.3, "causal": True, "query_offset": 20},
    {"mask": rng.random((1, 1, 20, 40)) < 0.3},
    {"mask": rng.random((3, 1, 1, 40)) < 0.3, "valid_lens": np.array([40, 20, 0])},
    {"bias": rng.standard_normal((20, 40)), "softcap": 2.0, "window": (12, 3), "query_offset": np.array([0, 9, 20])},
    {"mask": np.arange(40) < np.array([40, 25, 0])[:, None, None, None]},
    {"bias": np.where(rng.random((3, 1, 1, 40)) < 0.5, -np.inf, 1.0)},
    {"bias": rng.standard_normal((20, 1)), "scale": 0.3},
]
SOME_FORBIDDEN = {"bias": np.where(rng.random((2, 20, 40)) < 0.3, -np.inf, rng.standard_normal((2, 20, 40)))}


def here(x):
    return torch.tensor(x, dtype=torch.float32 if x.dtype.kind == "f" else None) if isinstance(x, np.ndarray) else x


def attend(query, key, value, **options):
    """The kernel, with attention's own keywords."""
    usual = {"score": None, "normalize": None, "causal": False, "query_offset": 0, "window": None}
    options = {name: here(x) for name, x in options.items()}
    return flash.attention(query, key, value, Call.of(query, key, **usual | options))


@contextmanager
def small_tiles(parts=1, rows=SMALL):
    choice = {"forward_tiles": lambda *_: rows, "query_tiles": lambda *_: SMALL, "key_tiles": lambda *_: SMALL}
    flash._plan.cache_clear()
    with patch.multiple(flash, how_many_parts=lambda *_: parts, **choice), patch.object(flash.Launch, "__call__", silently):
        yield
    flash._plan.cache_clear()


def silently(launch, *arrays):
    """NumPy, with which Triton interprets, warns of NaN and inf, which a device computes with in silence."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        called_as_it_is(launch, *arrays)


called_as_it_is = flash.Launch.__call__


def called(query, key, value, grad, options, grad_lse=None):
    """Output, lse and the gradients by query, key and value."""
    leaves = [here(x).requires_grad_() for x in (query, key, value)]
    output, lse = attend(*leaves, **options, return_lse=True)
    results, grads = [output], [here(grad)]
    if grad_lse is not None:
        results, grads = [output, lse], [here(grad), here(grad_lse)]
    return [output.detach(), lse.detach(), *torch.autograd.grad(results, leaves, grads)]


def expected(query, key, value, grad, options, grad_lse=None):
    """The same from the formula in float64, which the suite judges."""
    leaves = [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (query, key, value)]
    options = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    output, lse = kvattn.attention(*leaves, **options, return_lse=True)
    results, grads = [output], [torch.tensor(grad)]
    if grad_lse is not None:
        some = lse > -np.inf
        results, grads = [output, lse[some]], [torch.tensor(grad), torch.tensor(grad_lse)[some]]
    return [output.detach(), lse.detach(), *torch.autograd.grad(results, leaves, grads)]


def same(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.to(y.dtype), y, atol=2e-5, rtol=1e-5, equal_nan=True)


# ---- numbers


@pytest.mark.parametrize("options", [*CALLS, *EXTRA], ids=range(len(CALLS) + len(EXTRA)))
def test_outputs_lse_and_gradients_are_the_formulas(options):
    n, m = (20, 40) if any(options is extra for extra in EXTRA) else (9, 11) if "softcap" in options else (20, 24)
    n = 11 if getattr(options.get("valid_lens"), "ndim", 1) == 2 else n
    heads = 1 if any(options is call for call in CALLS) else 2
    arrays = draw(n, m, d=5, v=7, heads=heads, kv_heads=1)
    grad_lse = np.random.default_rng(1).standard_normal(arrays[0].shape[:-1])
    wanted = expected(*arrays, options, grad_lse)
    with small_tiles():
        same(called(*hidden(arrays, options), options, grad_lse), wanted)  # NaN wherever nobody looks


@pytest.mark.parametrize("options", [{"valid_lens": np.array([5, 0, 70])}, {"window": (50, 0), "query_offset": 60}], ids=str)
def test_keys_that_are_split_among_programs_give_the_same(options):
    arrays = draw(2, 70, d=8, v=8, heads=2, kv_heads=1)
    with small_tiles(parts=4):
        same(called(*arrays, options)[:2], expected(*arrays, options)[:2])


SINKS = {
    "of each head": (np.array([0.5, -1.0]), {}),
    "of each entry's head, behind a mask": (np.random.default_rng(1).standard_normal((3, 2)), EXTRA[1]),
    "of each query, with lengths": (np.random.default_rng(2).standard_normal((1, 2, 20, 1)), EXTRA[5]),
    "for all, with a softcap": (np.array(3.0), EXTRA[4]),
    "none, and much": (np.array([-np.inf, 80.0]), {}),
}


def with_sink(attention, dtype, arrays, sink, options):
    """Output, lse and the gradients by query, key, value and the sink, of both results."""
    *leaves, of_sink = (torch.tensor(x, dtype=dtype).requires_grad_() for x in (*arrays[:3], sink))
    output, lse = attention(*leaves, **options, sink=of_sink, return_lse=True)
    grad_lse = np.random.default_rng(3).standard_normal(lse.shape)
    chosen = lse > -np.inf
    grads = torch.tensor(arrays[3], dtype=dtype), torch.tensor(grad_lse, dtype=dtype)[chosen]
    return [output.detach(), lse.detach(), *torch.autograd.grad([output, lse[chosen]], [*leaves, of_sink], grads)]


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_takes_its_share_in_the_kernel(name):
    sink, options = SINKS[name]
    arrays = draw(20, 40, d=5, v=7, heads=2, kv_heads=1)
    given = {option: torch.tensor(x) if isinstance(x, np.ndarray) else x for option, x in options.items()}
    wanted = with_sink(kvattn.attention, torch.float64, arrays, sink, given)
    with small_tiles():
        same(with_sink(attend, torch.float32, arrays, sink, options), wanted)


def test_keys_that_are_split_among_programs_share_with_a_sink():
    arrays, sink = draw(2, 70, d=8, v=8, heads=2, kv_heads=1), np.array([0.5, 2.0])
    with small_tiles(parts=4):
        found = attend(*map(here, arrays[:3]), sink=sink, return_lse=True)
    same(found, kvattn.attention(*map(torch.tensor, arrays[:3]), sink=torch.tensor(sink), return_lse=True))


def test_second_derivatives_with_a_sink():
    arrays, sink = draw(9, 11, d=5, v=5, heads=2, kv_heads=2), np.array([0.5, 2.0])

    def twice(attention, dtype):
        leaves = [torch.tensor(x, dtype=dtype).requires_grad_() for x in (*arrays[:3], sink)]
        first = torch.autograd.grad(attention(*leaves[:3], sink=leaves[3]).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    with small_tiles():
        same(twice(attend, torch.float32), twice(kvattn.attention, torch.float64))


def test_arrays_of_any_strides_of_the_batch_the_heads_and_the_rows():
    query, key, value, grad = draw(20, 40, d=8, v=8)
    options = {"mask": np.random.default_rng(1).random((3, 1, 40, 20)).swapaxes(2, 3) < 0.5}
    wanted = expected(query, key, value, grad, options)
    query, grad = (x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) for x in (query, grad))
    with small_tiles():
        found = called(query, key.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2), value, grad, options)
        spread = [here(x[:1]).expand(3, *x.shape[1:]).requires_grad_() for x in (query, key, value)]
        output = attend(*spread)
        torch.autograd.grad(output.sum(), spread)  # a sum's gradient has strides of 0
    same(found, wanted)
    assert found[0].transpose(1, 2).is_contiguous()  # as the query lies, so that the heads can be joined without a copy


def copied(x):
    """As torch.autograd.graph.save_on_cpu brings a slice back: what was not dense is contiguous, the rest lies as it lay."""
    whole = x.numel() == 0 or x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x.clone() if whole else x.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("first", ["as they are", "copied"])
def test_gradients_of_what_was_kept_elsewhere_and_lies_otherwise(first):
    draws = np.random.default_rng(3)
    joined, grad = draws.standard_normal((2, 20, 3, 4, 8)), draws.standard_normal((2, 4, 20, 8))
    mask = draws.random((2, 1, 20, 40))[..., ::2] < 0.5
    wanted = expected(*(joined[:, :, i].swapaxes(1, 2) for i in range(3)), grad, {"mask": mask})[2:]
    query, key, value = (here(joined).requires_grad_()[:, :, i].transpose(1, 2) for i in range(3))
    options = {"mask": here(np.repeat(mask, 2, axis=-1))[..., ::2], "score": None, "normalize": None}
    call = Call.of(query, key, **options)
    with small_tiles():
        prepared = flash.Prepared(query, key, value, call)
        for way in ("as they are", "copied") if first == "as they are" else ("copied", "as they are"):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, copied if way == "copied" else lambda x: x):
                output = prepared(query, key, value, call)
            same(torch.autograd.grad(output, (query, key, value), here(grad)), wanted)


def test_half_precision_adds_up_in_float32():
    arrays = [x.astype(np.float16) for x in draw(20, 40, d=8, v=8)]
    wanted = expected(*(x.astype(np.float64) for x in arrays), {"causal": True})
    with small_tiles():
        leaves = [torch.tensor(x).requires_grad_() for x in arrays[:3]]
        output = attend(*leaves, causal=True)
        found = [output.detach(), *torch.autograd.grad(output, leaves, torch.tensor(arrays[3]))]
    for x, y in zip(found, [wanted[0], *wanted[2:]], strict=True):
        assert x.dtype == torch.float16
        torch.testing.assert_close(x.double(), y, atol=4e-3, rtol=4e-3)


# ---- NaN


@pytest.mark.parametrize("which", ["query", "key", "value", "grad"])
@pytest.mark.parametrize(
    "options",
    [{"causal": True, "query_offset": 4}, EXTRA[1], {"valid_lens": np.array([40, 30, 20])}, SOME_FORBIDDEN],
    ids=["causal", "mask", "lengths", "bias"],
)
def test_nan_stays_in_the_rows_that_may_attend_to_it(which, options):
    heads, kv_heads = 2, 1
    arrays = draw(20, 40, d=8, v=8, heads=heads, kv_heads=kv_heads)
    clean = expected(*arrays, options)
    arrays = dict(zip(("query", "key", "value", "grad"), arrays, strict=True))
    with small_tiles():
        arrays[which] = arrays[which].copy()
        arrays[which][1, 0, 9, 2] = NAN
        found = called(*arrays.values(), options)
    blank = [np.zeros((3, h, rows, 1)) for h, rows in ((heads, 20), (kv_heads, 40), (kv_heads, 40))]
    seen = kvattn.attention(*blank, return_weights=True, **options)[1] > 0  # (batch, heads, n, m)
    rows = np.zeros((3, heads, 20), bool)  # the queries whose gradients or outputs the NaN may reach
    if which in ("query", "grad"):
        rows[1, 0, 9] = True
    else:
        group = heads // kv_heads
        rows[1, :group] = seen[1, :group, :, 9]
    keys = (seen & rows[..., None]).any(axis=2).reshape(3, kv_heads, -1, 40).any(axis=2)  # the keys that those may attend to
    reached = [rows, rows, rows, keys, keys]
    if which == "grad":
        reached[0] = rows & False
    if which in ("grad", "value"):
        reached[1] = rows & False
    if which == "value":
        reached[4] = keys & False
    for x, y, where in zip(found, clean, reached, strict=True):
        where = torch.tensor(where)
        assert torch.isnan(x[where]).any() == bool(where.any())
        same([x[~where]], [y[~where]])


# ---- around the kernels


def test_second_derivatives_are_the_formulas():
    arrays, options = draw(5, 6, d=4), {"softcap": 2.0, "causal": True, "query_offset": np.array([-2, 0, 3])}

    def twice(attend, dtype):
        leaves = [torch.tensor(x, dtype=dtype).requires_grad_() for x in arrays[:3]]
        grads = torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), leaves)

    given = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    wanted = twice(lambda *x: kvattn.attention(*x, **given), torch.float64)
    with small_tiles():
        found = twice(lambda *x: attend(*x, **options), torch.float32)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-4)


def test_torch_compile_keeps_the_operator_and_sees_its_gradients():
    calls = []

    def counting(graph, inputs):
        calls.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def with_lengths(query, key, value, lens):
        return attend(query, key, value, valid_lens=lens)

    compiled = torch.compile(with_lengths, fullgraph=True, backend="aot_eager")
    seen = torch.compile(with_lengths, fullgraph=True, backend=counting)
    for m in (24, 40, 33):
        query, key, value, grad = draw(20, m, d=8, v=8)
        lens = torch.tensor([m, 5, 0])
        leaves = [here(x).requires_grad_() for x in (query, key, value)]
        with small_tiles():
            output = compiled(*leaves, lens)
            found = [output.detach(), *torch.autograd.grad(output, leaves, here(grad))]
            seen(*leaves, lens)
        wanted = expected(query, key, value, grad, {"valid_lens": lens.numpy()})
        same(found, [wanted[0], *wanted[2:]])
    assert len(calls) == 2  # one for the first length, one for all others
    assert all(torch.ops.kvattn.attention in targets or torch.ops.kvattn.attention.default in targets for targets in calls)


def test_the_operators_are_declared_as_they_are():
    query, key, value, _ = (here(x) for x in draw(5, 6, d=4, v=4))
    rest = (None, None, torch.tensor([3, 6, 0]), None, None, 2, 0.5, None)
    with small_tiles():
        torch.library.opcheck(torch.ops.kvattn.attention, (query.requires_grad_(), key, value, *rest))


# ---- through the tab


@contextmanager
def on_a_device():
    """Tensors say that they are CUDA's, and half precision goes where it goes there. Counts the kernel's calls."""
    counted = []

    def prepared(*args):
        counted.append(args)
        return prepared_as_it_is(*args)

    def flexible(query, key, value):
        return query.dtype != torch.bfloat16 and flexible_as_it_is(query, key, value)

    prepared_as_it_is, flexible_as_it_is = flash.Prepared.__call__, gpu._flexible
    gpu._ready.clear()
    with (
        patch.object(torch.Tensor, "is_cuda", property(lambda x: True)), patch.object(flash.Prepared, "__call__", prepared),
        patch.multiple(gpu, _flexible=flexible, can_compile=lambda device: True, SHORTEST=0), small_tiles(),
        patch.object(plan, "FEW", 0),  # small calls on a CPU have a way of their own
    ):  # fmt: skip
        yield counted
    gpu._ready.clear()


def cases(*asked):
    """Those that ask for something of this; of one of many pairs no gradients, which would take the interpreter a minute."""
    for case in conformance.cases():
        if case.call in ("attention", "attention_grad") and {*asked} & {*case.keywords, *case.arguments}:
            answer = {what: x for what, x in case.answer.items() if what[:5] != "grad_"}
            yield replace(case, answer=answer) if case.name == "a maximum that rises" else case


def test_the_conformance_suite():
    """Every third case, since an interpreter is slow; with KVATTN_EVERY all."""
    every = 1 if "KVATTN_EVERY" in os.environ else 3
    half = [*cases("mask", "bias", "valid_lens", "window", "softcap", "query_offset", "sink")][::every]
    full = [case for case in cases("window", "softcap") if case.group != NOT_FINITE][::every]  # the rest is SDPA's in float32
    with on_a_device() as counted:
        reports = conformance.run("torch", half, dtypes=["float16"]), conformance.run("torch", full, dtypes=["float32"])
    failures = [*reports[0].failures, *reports[1].failures]
    assert not failures, "\n".join(result.message for result in failures)
    assert len(counted) > 100 / every


@pytest.mark.parametrize("options", [{"valid_lens": np.array([5, 9])}, {"mask": np.eye(9, dtype=bool)}], ids=str)
def test_arrays_without_a_head_axis(options):
    arrays = [x[:2, 0] for x in draw(9, 9, d=8, v=8, dtype=np.float16)]
    with on_a_device() as counted:
        found = run("torch", arrays, options)
    assert len(counted) == 2
    for x, y in zip(found, run("numpy", arrays, options), strict=True):
        np.testing.assert_allclose(x, y, atol=4e-3)


LIKE = [  # calls that differ in one thing
    {"valid_lens": np.array([9, 5])},
    {"valid_lens": np.array([3, 9])},
    {"softcap": 1.0},
    {"softcap": 2.0},
    {"softcap": 1.0, "scale": 0.1},
    {"window": (2, 1)},
    {"window": (1, 1)},
    {"window": (2, 1), "query_offset": 3},
    {"mask": np.eye(9, dtype=bool)},
    {"mask": np.eye(18, dtype=bool)[::2, ::2]},
]


def test_what_is_prepared_for_a_call_serves_its_like_alone():
    arrays = draw(9, 9, d=8, v=8, heads=2, batch=2, dtype=np.float16)[:3]
    turned = [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in arrays]
    calls = [(arrays, options) for options in LIKE] + [(turned, LIKE[0])]
    wanted = [kvattn.attention(*inputs, **options) for inputs, options in calls]
    with on_a_device():
        for _ in range(2):  # the second time as prepared
            for (inputs, options), expected_ in zip(calls, wanted, strict=True):
                given = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
                found = kvattn.attention(*map(torch.from_numpy, inputs), **given)
                np.testing.assert_allclose(found.numpy(), expected_, atol=4e-3)
        assert len(gpu._ready) == len(calls) - 1  # two calls differ in the values of their lengths alone


@pytest.mark.parametrize("forgotten", ["softcap", "scale", "left", "query_offset"])
def test_a_memory_of_calls_that_forgets(forgotten):
    def name(query, key, value, call):
        return named(query, key, value, call._replace(**{forgotten: 0 if forgotten == "query_offset" else None}))

    named = gpu._name
    with patch.object(gpu, "_name", name), pytest.raises((AssertionError, RuntimeError)):
        test_what_is_prepared_for_a_call_serves_its_like_alone()


def test_compiled_programs_are_forgotten_before_they_fill_memory():
    device = torch.device("cuda", 0)
    with (
        patch.multiple(flash, INTERPRETED=False, MOST_COMPILED=3), patch.dict(flash._compiled, clear=True),
        patch.object(torch.cuda, "current_device", lambda: 0), patch.object(flash.Launch, "_first", lambda *_: MagicMock()),
    ):  # fmt: skip
        for n in range(8):  # each length has strides of its own
            launch = flash.Launch(tiles.forward, device, (), 1, (n,), (), (), (4, 1))
            launch(torch.empty(4))
            assert launch.run is not None
            assert 1 <= len(flash._compiled) <= 3


# ---- mutants

MUTANTS = [  # what it does wrong, the text, what replaces it, and the options that should notice
    ("sees one key too many", "end = tl.minimum(end, at + last)", "end = tl.minimum(end, at + last + 1)", {"causal": True}),
    ("forgets the window's left", "(cols >= begin) & (cols < end)", "cols < end", {"window": (3, 0)}),
    ("reads another entry's length", "tl.load(Lens + entry)", "tl.load(Lens)", {"valid_lens": np.array([40, 3, 20])}),
    (
        "takes the last edge for inner tiles",
        "ends // SIZE * SIZE",
        "tl.cdiv(ends, SIZE) * SIZE",
        {"valid_lens": np.array([20, 3, 40])},
    ),
    ("computes no edges", "tl.range(low, high - (stop - start), COLS)", "tl.range(low, low, COLS)", {"causal": True}),
    (
        "counts inner tiles again at the edge",
        "tl.where(walked < start, 0, stop - start)",
        "0 * (stop - start)",
        {"valid_lens": np.array([20, 3, 40])},
    ),
    ("keeps sums under an older maximum", "total = total * fade +", "total = total +", {}),
    ("forgets the softcap's slope", "ds = ds * (1 - bent * bent)", "pass", {"softcap": 1.0}),
    (
        "forgets the output's share in gradients",
        "delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)",
        "delta = tl.sum(o.to(tl.float32) * 0, 1)",
        {},
    ),
    (
        "takes the first head's bias for all",
        "(own * bias_h + i_ * bias_n)",
        "(0 * own * bias_h + i_ * bias_n)",
        {"bias": rng.standard_normal((2, 20, 40))},
    ),
    (
        "forgets a mask",
        "(mask != 0)",
        "(mask == mask)",
        {"mask": EXTRA[1]["mask"], "causal": True, "query_offset": 20},
    ),
    ("forgets what the sink leaves", "o = o * left[:, None]", "pass", {"sink": np.array([0.5, 2.0])}),
    ("takes the first head's sink for all", "own * sink_h", "0 * own * sink_h", {"sink": np.array([0.5, 2.0])}),
    ("leaves the sink out of the lse", "lse + tl.log(1 + tl.exp(-ahead))", "lse", {"sink": np.array([0.5, 2.0])}),
    ("adds keys to one member of a group", "for member in tl.range(0, group):", "for member in tl.range(0, 1):", {}),
]


def compared(options):
    arrays = draw(20, 40, d=8, v=8, heads=2, kv_heads=1)
    with small_tiles():
        same(called(*arrays, options), expected(*arrays, options))


@pytest.fixture
def mutated(monkeypatch, tmp_path):
    def mutate(old, new):
        with open(tiles.__file__) as file:
            source = file.read()
        assert old in source, f"tiles.py no longer holds {old!r}"
        path = tmp_path / "mutant.py"  # Triton reads the source of its functions from their file
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("mutant", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(flash, "tiles", module)

    return mutate


def test_the_unmutated_file_passes(mutated):
    mutated("import", "import")
    compared({"causal": True})


@pytest.mark.parametrize(("wrong", "old", "new", "options"), MUTANTS, ids=[row[0] for row in MUTANTS])
def test_a_kernel_that(mutated, wrong, old, new, options):
    mutated(old, new)
    with pytest.raises(AssertionError):
        compared(options)


def test_a_kernel_that_lets_nan_through(mutated):
    mutated("if _any_odd(acc):", "if _any_odd(acc) and False:")
    with pytest.raises(AssertionError):
        test_nan_stays_in_the_rows_that_may_attend_to_it("value", {"causal": True, "query_offset": 4})


def test_a_kernel_that_takes_nan_for_a_pair_that_a_bias_forbids(mutated):
    mutated("if BIAS and CAREFUL:", "if False:")
    with pytest.raises(AssertionError):
        test_nan_stays_in_the_rows_that_may_attend_to_it("key", SOME_FORBIDDEN)


def test_a_kernel_that_keeps_sums_of_nan(mutated):
    mutated("            if BIAS:\n                top =", "            if False:\n                top =")
    with pytest.raises(AssertionError):
        test_nan_stays_in_the_rows_that_may_attend_to_it("key", SOME_FORBIDDEN)
