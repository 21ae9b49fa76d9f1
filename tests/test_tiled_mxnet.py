"""What is MXNet's own where NumPy attends to its arrays: autograd, views of their memory, threads, which calls it serves.

What every backend's fast path promises is in test_tiled.py.
"""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from test_tiled_numpy import results as by_numpy
from tiling import RESTRICTIONS, SIZES, WRT, all_at_once, cached, draw, in_tiles, judge, subject

import kvattn
from kvattn import conformance
from kvattn.call import Call
from kvattn.kernels.numpy import tiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet's own

if "mxnet" not in chosen():
    pytest.skip("this run is without MXNet", allow_module_level=True)
SUBJECT = subject("mxnet")
tab = SUBJECT.tab

import mxnet as mx  # noqa: E402  after the tab, which lends NumPy the names it wants

from kvattn import mxnet as kv  # noqa: E402
from kvattn.kernels.mxnet import views  # noqa: E402


def arrays_of(arrays):
    with mx.util.np_shape(True):
        return [mx.np.array(x, dtype=x.dtype.name) for x in arrays]


def recorded(arrays, grad_req="write", times=1, **options):
    """Output, lse and gradients, by autograd."""
    query, key, value, grad = arrays_of(arrays)
    for x in (query, key, value):
        x.attach_grad(grad_req)
    for _ in range(times):
        with mx.autograd.record():
            output, lse = kvattn.attention(query, key, value, **options, return_lse=True)
        output.backward(grad)
    return [x.asnumpy() for x in (output, lse, query.grad, key.grad, value.grad)]


# ---- the same numbers


@pytest.mark.parametrize("which", RESTRICTIONS)
def test_small_calls_by_numpys_formula(which):
    for n, m in ((9, 7), (1, 1), (1, 7), (7, 1)):
        for way in SUBJECT.ways.values():
            judge(cached(which, n, m), "float64", SUBJECT.found(cached(which, n, m), way=way))


def test_the_conformance_suite_without_views():
    """The tab's own code, which serves what NumPy cannot; known_differences.py says what its gradients let through."""
    known = ("scores of -inf of one ", "a loss of NaN at rows without keys")
    with patch.object(views, "obstacle", lambda *_: "a test"):
        report = conformance.run("mxnet", [case for case in conformance.cases() if not case.name.startswith(known)])
    assert not report.failures, "\n".join(result.message for result in report.failures)


# ---- autograd


@pytest.fixture(params=[views.SMALL, 0], ids=["small", "by an operator"])
def either_way(request, monkeypatch):
    """Recorded as a small call is, and as a larger one."""
    monkeypatch.setattr(views, "SMALL", request.param)


def test_gradients_add_up_where_that_is_asked_for(either_way):
    arrays = draw()
    expected = recorded(arrays)
    for x, y in zip(recorded(arrays, "add", times=3)[2:], expected[2:], strict=True):
        np.testing.assert_allclose(x, 3 * y, rtol=1e-14)


@pytest.mark.parametrize("name", WRT)
def test_gradients_are_given_where_they_are_asked_for(either_way, name):
    arrays = draw()
    *inputs, grad = arrays_of(arrays)
    given = dict(zip(WRT, inputs, strict=True))
    given[name].attach_grad()
    with mx.autograd.record():
        output = kvattn.attention(**given)
    output.backward(grad)
    np.testing.assert_allclose(given[name].grad.asnumpy(), recorded(arrays)[2 + WRT.index(name)], rtol=1e-14)


def test_one_array_in_all_places(either_way):
    x, _, _, grad = draw(n=7, m=7, d=2)
    with all_at_once():
        expected = by_numpy(x, x, x, grad)
    given, grad = arrays_of((x, grad))
    given.attach_grad()
    with mx.autograd.record():
        output = kvattn.attention(given, given, given)
    output.backward(grad)
    np.testing.assert_allclose(given.grad.asnumpy(), sum(expected[2:]), rtol=1e-12)


def test_within_a_larger_graph(either_way):
    query, key, value, grad = arrays_of(draw())
    query.attach_grad()
    with mx.autograd.record():
        output = mx.np.tanh(2 * kvattn.attention(query * 3, key, value))
    output.backward(grad, retain_graph=True)
    once = query.grad.asnumpy()
    output.backward(grad)
    np.testing.assert_array_equal(query.grad.asnumpy(), once)
    with mx.autograd.record():
        apart = kvattn.attention((query * 3).detach(), key, value) + query.sum(keepdims=True)
    apart.backward(grad)
    np.testing.assert_allclose(query.grad.asnumpy(), np.full(query.shape, grad.asnumpy().sum()), rtol=1e-12)
    with mx.autograd.record(), mx.autograd.pause():
        assert kvattn.attention(query, key, value).shape == grad.shape


def test_gradients_of_the_lse(either_way):
    """Attention over halves of the keys, merged, has the gradients of attention."""
    arrays = draw(m=8)
    with all_at_once():
        expected = by_numpy(*arrays)
    for forced in (partial(in_tiles, SIZES[0]), all_at_once):
        query, key, value, grad = arrays_of(arrays)
        for x in (query, key, value):
            x.attach_grad()
        with forced(), mx.autograd.record():
            parts = [kvattn.attention(query, key[:, i:j], value[:, i:j], return_lse=True) for i, j in ((0, 5), (5, 8))]
            output = kvattn.merge_attention(*zip(*parts, strict=True))
            output.backward(grad)
            mx.nd.waitall()
        for x, y in zip((output, query.grad, key.grad, value.grad), (expected[0], *expected[2:]), strict=True):
            np.testing.assert_allclose(x.asnumpy(), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["additive", "gated", "multiplicative", "distance", "gaussian"])
def test_scores_of_all_kinds_and_gradients_by_their_parameters_and_the_bias(either_way, name):
    query, key, value, grad = draw(n=5, m=4, d=3)
    rng = np.random.default_rng(1)
    score, shapes = {
        "additive": (kvattn.additive_score, {"W_q": (3, 4), "W_k": (3, 4), "w_v": (4,), "b": (4,)}),
        "gated": (kvattn.gated_score, {"w_g": (6,)}),
        "multiplicative": (kvattn.multiplicative_score, {"W": (3, 3)}),
        "distance": (kvattn.distance_score, {}),
        "gaussian": (partial(kvattn.gaussian_kernel, width=2.0), {}),
    }[name]
    sources = {"query": query, "key": key, "value": value, "bias": rng.standard_normal((5, 4))}
    sources |= {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    options = {"softcap": 2.0, "scale": 0.5, "valid_lens": np.array([2, 4])}

    def call(function, query, key, value, bias, *more, **bound):
        return function(query, key, value, *more, score=partial(score, **bound), bias=bias, **options)

    expected = call(partial(kvattn.attention_grad, wrt=[*sources]), query, key, value, sources["bias"], grad,
                    **{name: sources[name] for name in shapes})  # fmt: skip
    given = dict(zip(sources, arrays_of(sources.values()), strict=True))
    for x in given.values():
        x.attach_grad()
    with mx.autograd.record():
        output = call(kvattn.attention, **given)
    output.backward(*arrays_of([grad]))
    for name, wanted in zip(sources, expected, strict=True):
        np.testing.assert_allclose(given[name].grad.asnumpy(), wanted, rtol=0, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("legacy", [False, True])
def test_hybridized_blocks_are_served_too(legacy):
    class Attend(mx.gluon.HybridBlock):
        def hybrid_forward(self, F, query, key, value):
            return kv.attention(query, key, value, causal=True)

    arrays = draw(dtype=np.float32)
    with in_tiles() as served:
        found = []
        for hybridize in (False, True):
            *inputs, grad = [x.as_nd_ndarray() if legacy else x for x in arrays_of(arrays)]
            for x in inputs:
                x.attach_grad()
            net = Attend()
            net.hybridize(hybridize)
            before = len(served)
            with mx.util.np_shape(not legacy), mx.util.np_array(not legacy), mx.autograd.record():
                output = net(*inputs)
            assert type(output) is type(inputs[0])
            output.backward(grad)
            found.append([x.asnumpy() for x in (output, *(x.grad for x in inputs))])
            assert {*served[before:]} == {"attention", "attention_grad"}
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)


def test_gradients_of_a_graph_add_up_where_that_is_asked_for():
    class Attend(mx.gluon.HybridBlock):
        def hybrid_forward(self, F, query, key, value):
            return kv.attention(query, key, value, causal=True)

    found = []
    for req, times in (("write", 3), ("add", 1), ("add", 3)):
        *inputs, grad = arrays_of(draw())
        for x in inputs:
            x.attach_grad(req)
        net = Attend()
        net.hybridize()
        for _ in range(times):
            with mx.autograd.record():
                output = net(*inputs)
            output.backward(grad)
        found.append([x.grad.asnumpy() for x in inputs])
    for written, once, thrice in zip(*found, strict=True):
        assert np.abs(written).max() > 0.01
        np.testing.assert_array_equal(once, written)
        np.testing.assert_allclose(thrice, 3 * written, rtol=1e-14)


def test_what_is_written_later_does_not_reach_what_was_asked_for_before():
    """The engine knows what a recorded call reads."""
    arrays = [x.astype(np.float32) for x in draw(lead=(4,), n=600, m=600, d=16, v=16)]
    expected = recorded(arrays)
    query, key, value, grad = arrays_of(arrays)
    key.attach_grad()
    with mx.autograd.record():
        output = kvattn.attention(query, key, value)
    output.backward(grad)
    for x in (query, value, grad):
        x[:] = 0
    np.testing.assert_array_equal(key.grad.asnumpy(), expected[3])
    np.testing.assert_array_equal(output.asnumpy(), expected[0])


def test_what_is_written_after_a_small_call_does_not_reach_its_gradients():
    """The engine does not know what it reads."""
    arrays = draw()
    expected = recorded(arrays)
    query, key, value, grad = arrays_of(arrays)
    for x in (query, key, value):
        x.attach_grad()
    with mx.autograd.record():
        output, lse = kvattn.attention(query, key, value, return_lse=True)
    for x in (query, key, value, output, lse):
        x[:] = 7
    mx.autograd.backward([output, lse], [grad, mx.np.zeros_like(lse)])
    for x, y in zip((query, key, value), expected[2:], strict=True):
        np.testing.assert_array_equal(x.grad.asnumpy(), y)


def test_of_a_small_call_nothing_is_kept_once_its_graph_is_gone():
    with patch.dict(views._recorded):
        views._recorded.clear()
        recorded(draw())
        query, key, value, _ = arrays_of(draw())
        query.attach_grad()
        with mx.autograd.record():
            output = kvattn.attention(query, key, value)
        assert views._recorded  # until its output goes
        del output
        assert not views._recorded


# ---- memory


def address(x):
    return views.view(x, x.shape).__array_interface__["data"][0]


def test_views_share_the_arrays_memory():
    x = mx.np.arange(12, dtype="float64").reshape(3, 4)
    view = views.view(x, x.shape)
    np.testing.assert_array_equal(view, x.asnumpy())
    x[1] = 7
    np.testing.assert_array_equal(views.view(x, x.shape), view)
    assert view[1, 0] == 7
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    views.view(x, x.shape, write=True)[0] = 1
    assert x[0].asnumpy().tolist() == [1] * 4
    part = x[1:]
    assert address(part) == address(x) + 4 * 8
    kept = views.view(mx.np.ones((1000, 1000)), (1000, 1000))  # the view keeps what it looks at
    mx.np.zeros((1000, 1000)).wait_to_read()
    assert kept.all()


@pytest.mark.parametrize("record", [False, True])
def test_nothing_is_copied(record, monkeypatch):
    monkeypatch.setattr(views, "SMALL", 0)
    arrays = arrays_of(draw(lead=(2, 2))[:3])
    arrays[0].attach_grad()
    seen = []
    attend = tiled.attention
    with in_tiles(), patch.object(
        tiled, "attention", lambda *args, **options: seen.append((*args[:3], options["output"])) or attend(*args, **options)
    ), mx.autograd.record() if record else mx.autograd.pause():  # fmt: skip
        output = kvattn.attention(*arrays)
        output.wait_to_read()
    for x, y in zip((*arrays, output), seen[0], strict=True):
        assert address(x) == y.__array_interface__["data"][0]


def run(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import warnings; warnings.simplefilter('ignore')\nimport os, sys, numpy as np, kvattn\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


PEAK = """
import resource, threading
tab = kvattn.dispatch.load("mxnet")
mx = tab.mx
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def inputs(n, count=3):
    rng = np.random.default_rng(0)
    made = [tab.asarray(rng.standard_normal((1, 4, n, 32)).astype("float32")) for _ in range(count)]
    mx.nd.waitall()
    return made
"""


@pytest.mark.parametrize(("score", "n", "features"), [("scaled_dot_score", 6000, 1), ("additive", 1500, 8), ("own", 1000, 32)])
def test_memory_beyond_the_output_does_not_grow_with_the_scores(score, n, features):
    code = f"""{PEAK}
from functools import partial
rng = np.random.default_rng(1)
weights = {{x: rng.standard_normal(s).astype("float32") for x, s in (("W_q", (32, 8)), ("W_k", (32, 8)), ("w_v", 8))}}
def own(query, key): return mx.np.tanh(query[..., :, None, :] - key[..., None, :, :]).sum(axis=-1)
score = {{"own": own, "additive": partial(kvattn.additive_score, **weights)}}.get({score!r}, kvattn.scaled_dot_score)
kvattn.attention(*inputs(64), score=score).wait_to_read()
arrays = inputs({n})
before = peak()
kvattn.attention(*arrays, score=score).wait_to_read()
print(peak() - before)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    output = 4 * 4 * n * 32
    assert int(result.stdout) < output + 2**17 * 1000 < 4 * 4 * n * n * features / 2


def test_memory_of_gradients_is_that_of_the_arrays():
    code = f"""{PEAK}
def step(n):
    *arrays, grad = inputs(n, 4)
    for x in arrays: x.attach_grad()
    mx.nd.waitall()
    before = peak()
    with mx.autograd.record(): output = kvattn.attention(*arrays)
    output.backward(grad)
    mx.nd.waitall()
    return peak() - before
step(64)
print(step(6000))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 4 * 3 * 4 * 4 * 6000 * 32 + 40 * 2**20 < 4 * 4 * 6000**2 / 2


# ---- threads, and the end


def test_concurrent_calls():
    arrays = [draw(seed, lead=(2, 2)) for seed in range(4)]
    expected = [recorded(x, causal=True) for x in arrays]
    with in_tiles(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: recorded(x, causal=True), arrays * 4))
    for some, those in zip(found, expected * 4, strict=True):
        for x, y in zip(some, those, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork_and_at_exit():
    code = f"""{PEAK}
def step():
    *arrays, grad = inputs(400, 4)
    for x in arrays: x.attach_grad()
    with mx.autograd.record(): output = kvattn.attention(*arrays)
    output.backward(grad)
    return [x.asnumpy() for x in (output, *(x.grad for x in arrays))]
first = step()
child = os.fork()
if child == 0:
    for x, y in zip(step(), first): np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
kept, small = inputs(400), inputs(8)
for x in kept[0], small[0]: x.attach_grad()
with mx.autograd.record(): graphs = kvattn.attention(*kept), kvattn.attention(*small)
print("done")
"""
    result = run(code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "done\n"
    assert "callback" not in result.stderr


# ---- the condition


def test_which_calls_are_served():
    query, key, value = arrays_of(draw()[:3])

    def serves(score=tab.scaled_dot_score, normalize=tab.softmax, **options):
        call = Call.of(query, key, score=score, normalize=normalize, causal=False, window=None, query_offset=0, **options)
        return tab.choose(query, key, value, call).kernel == "NumPy's"

    assert serves()
    assert serves(score=tab.distance_score, normalize=tab.sparsemax)
    assert serves(score=partial(tab.gaussian_kernel, width=2.0))
    assert not serves(score=partial(tab.gaussian_kernel, width=query))
    assert not serves(score=partial(tab.multiplicative_score, query[0]))
    assert not serves(score=lambda query, key: tab.dot_score(query, key))
    assert not serves(normalize=lambda scores, where: scores)
    assert not serves(normalize=partial(tab.softmax))
    assert not serves(dropout=0.1)
    assert not serves(return_weights=True)
    assert not serves(positions=query)


def test_a_score_of_ones_own_is_given_blocks_of_rows():
    sizes = []

    def score(query, key):
        sizes.append(query.shape[-2])
        return kvattn.dot_score(query, key)

    arrays = draw(lead=(2,), n=600, m=40, d=600)
    expected = kvattn.attention(*arrays[:3], score=kvattn.dot_score)
    given = arrays_of(arrays[:3])
    np.testing.assert_allclose(kvattn.attention(*given, score=score).asnumpy(), expected, rtol=0, atol=1e-11)
    assert sum(sizes) == 600
    assert len(sizes) > 1


def test_a_score_of_ones_own_in_a_window_meets_the_keys_in_it_alone():
    sizes = []

    def score(query, key):
        sizes.append((query.shape[-2], key.shape[-2]))
        return kvattn.dot_score(query, key)

    arrays = draw(lead=(1,), n=600, m=600)[:3]
    expected = kvattn.attention(*arrays, score=kvattn.dot_score, window=3)
    given = arrays_of(arrays)
    said = kvattn.explain(*given, score=score, window=3)
    assert said.kernel == "the formula, in blocks"
    assert said.why.startswith("the score is a function of one's own")
    assert said.why.endswith("; 3 blocks of queries, each beside the keys in its window")
    np.testing.assert_allclose(kvattn.attention(*given, score=score, window=3).asnumpy(), expected, rtol=0, atol=1e-13)
    assert sizes == [(256, 259), (256, 262), (88, 91)]


OWN = f"""{PEAK}
def own(query, key): return mx.np.tanh(query[..., :, None, :] - key[..., None, :, :]).sum(axis=-1)
def step(n):
    *arrays, grad = inputs(n, 4)
    before = peak()
    results = kvattn.attention_grad(*arrays, grad, score=own) if gradients else [kvattn.attention(*arrays, score=own)]
    for x in results: x.wait_to_read()
    return peak() - before
step(64)
print(step(1000))
"""


@pytest.mark.parametrize("gradients", [False, True])
def test_a_score_of_ones_own_holds_one_block_at_a_time(gradients):
    result = run(f"gradients = {gradients}\n{OWN}")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 4 * 4 * 1000**2 * 32 / 2  # half an array of queries by keys by features


@pytest.mark.parametrize("lse", [False, True])
def test_a_block_is_waited_for_before_the_next_begins(lse):
    events, wait = [], mx.nd.NDArray.wait_to_read

    def score(query, key):
        events.append("score")
        return kvattn.dot_score(query, key)

    def waited(x):
        events.append("wait")
        wait(x)

    *inputs, grad = arrays_of(draw(lead=(2,)))
    with patch.object(views, "MOST", 1), patch.object(mx.nd.NDArray, "wait_to_read", waited):
        kvattn.attention(*inputs, score=score, return_lse=lse)
        assert events == ["score", "wait"] * 9
        kvattn.attention_grad(*inputs, grad, score=score)
        assert events[18:] == ["score", *["wait"] * 3] * 9


@pytest.mark.parametrize("which", RESTRICTIONS)
def test_gradients_of_a_score_of_ones_own_in_blocks_of_rows(which):
    sizes = []

    def score(query, key, slope):
        sizes.append(query.shape[-2])
        return kvattn.dot_score(query * slope, key)

    arrays, slope = draw(lead=(2, 4), kv=(2, 2), n=9, d=3), np.array([1.0, -0.5, 2.0])
    options = RESTRICTIONS[which](9, 7)
    wrt = [*WRT, *(["bias"] if "bias" in options else [])]
    product = partial(kvattn.multiplicative_score, W=np.diag(slope))
    expected = kvattn.attention_grad(*arrays, **options, score=product, wrt=[*wrt, "W"])
    bound = partial(score, slope=arrays_of([slope])[0])
    with patch.object(views, "MOST", 4 * 2 * 4 * 7 * 3 * 2):  # two queries of each head
        found = kvattn.attention_grad(*arrays_of(arrays), **options, score=bound, wrt=[*wrt, "slope"])
    for name, x, y in zip([*wrt, "slope"], found, [*expected[:-1], np.diag(expected[-1])], strict=True):
        np.testing.assert_allclose(x.asnumpy(), y, rtol=0, atol=1e-13, err_msg=name)
    assert len(sizes) == (1 if "window" in options else 5)


def test_gradients_by_a_sink_of_each_query_in_blocks_of_rows():
    arrays, sink = draw(lead=(2,), n=9), np.random.default_rng(0).standard_normal((2, 9, 1))
    expected = kvattn.attention_grad(*arrays, score=kvattn.dot_score, sink=sink, wrt=[*WRT, "sink"])
    with patch.object(views, "MOST", 1):
        own, (sink_here,) = lambda query, key: kvattn.dot_score(query, key), arrays_of([sink])
        found = kvattn.attention_grad(*arrays_of(arrays), score=own, sink=sink_here, wrt=[*WRT, "sink"])
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.asnumpy(), y, rtol=0, atol=1e-13)


def test_gradients_in_blocks_keep_their_dtype():
    arrays = draw(lead=(2,), n=9, dtype=np.float16)
    expected = kvattn.attention_grad(*(x.astype(np.float64) for x in arrays), score=kvattn.dot_score)
    with patch.object(views, "MOST", 1):
        found = kvattn.attention_grad(*arrays_of(arrays), score=lambda query, key: kvattn.dot_score(query, key))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == np.float16
        np.testing.assert_allclose(x.asnumpy(), y, rtol=0, atol=16 * 2**-11 * abs(y).max())


@cache
def nan_and_inf():
    (case,) = [case for case in conformance.cases() if case.name == "inf and NaN, causal, grouped heads"]
    return case


@pytest.mark.parametrize("way", ["weights", "own", "graph"])
def test_mxnets_autograd_keeps_nan_in_its_rows(way):
    case = nan_and_inf()
    arrays = {name: kvattn.asarray(x, backend="mxnet") for name, x in case.arguments.items()}
    query, key, value, grad_output = (arrays[name] for name in ("query", "key", "value", "grad_output"))
    call = partial(kvattn.attention, causal=True)
    if way == "weights":
        call = partial(call, return_weights=True)
    elif way == "own":
        call = partial(call, score=lambda query, key: kvattn.dot_score(query, key) / query.shape[-1] ** 0.5)
    else:

        class Block(mx.gluon.HybridBlock):
            def hybrid_forward(self, F, query, key, value):
                return kv.attention(query, key, value, causal=True)

        call = Block()
        call.hybridize()
    for x in (query, key, value):
        x.attach_grad()
    with mx.autograd.record():
        output = call(query, key, value)
        output = output[0] if isinstance(output, tuple) else output
    output.backward(grad_output)
    found = {"output": output, "grad_query": query.grad, "grad_key": key.grad, "grad_value": value.grad}
    for name, x in found.items():
        finite = np.isfinite(case.answer[name])
        np.testing.assert_allclose(x.asnumpy()[finite], case.answer[name][finite], rtol=1e-9, atol=1e-12)
        assert not np.isfinite(x.asnumpy()[~finite]).any(), name


def test_an_overflow_elsewhere_in_the_process_is_not_taken_for_ours():
    """MXNet reads inf as out of range while the C library's errno says so, which stays until something else fails."""
    exp = ctypes.CDLL("libm.so.6").exp
    exp.restype, exp.argtypes = ctypes.c_double, [ctypes.c_double]
    from kvattn.backends import mxnet as tab
    from kvattn.kernels.mxnet import quirks

    lse, sink = (kvattn.convert(x, "mxnet") for x in (np.ones((1, 2, 4)), np.zeros(2)))
    for function in (lambda: tab._left(lse, sink, 4)[0], lambda: 1 / quirks.where(lse == 0, lse, np.inf)):
        assert exp(1000.0) == np.inf
        assert np.isfinite(kvattn.to_numpy(function())).all()
