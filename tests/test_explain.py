"""`kvattn.explain` names the kernel that then serves the call: spies on the kernels' entries see the same."""

import importlib
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest

import kvattn
import kvattn.namespace

RNG = np.random.default_rng(0)
SHAPES = {  # query, key, value
    "tiny": ((1, 1, 8, 8), (1, 1, 8, 8), (1, 1, 8, 8)),
    "grouped": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
    "one query of many keys": ((1, 1, 1, 8), (1, 1, 4096, 8), (1, 1, 4096, 8)),
    "one query": ((1, 2, 1, 16), (1, 2, 300, 16), (1, 2, 300, 16)),
    "no keys": ((1, 2, 4, 8), (1, 2, 0, 8), (1, 2, 0, 8)),
    "no batch": ((6, 8), (9, 8), (9, 5)),
    "large": ((2, 2, 1024, 16), (2, 2, 1024, 16), (2, 2, 1024, 16)),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "decoding": lambda q, k: {"causal": True, "query_offset": k[-2] - q[-2]},
    "valid_lens": lambda q, k: {"valid_lens": RNG.integers(1, max(k[-2], 1) + 1, q[:-2][:1])},
    "a length of 0": lambda q, k: {"valid_lens": np.zeros(q[:-2][:1], int)},
    "lengths of queries": lambda q, k: {"valid_lens": RNG.integers(0, k[-2] + 1, (*q[:-2][:1], q[-2]))},
    "causal valid_lens": lambda q, k: {"causal": True, "valid_lens": RNG.integers(1, max(k[-2], 1) + 1, q[:-2][:1])},
    "window": {"window": 3},
    "causal window": {"causal": True, "window": (20, 0)},
    "window, sparsemax": {"window": 3, "normalize": kvattn.sparsemax},
    "window, weights": {"window": 3, "return_weights": True},
    "mask": lambda q, k: {"mask": RNG.random((q[-2], k[-2])) < 0.5},
    "bias": lambda q, k: {"bias": RNG.standard_normal((q[-2], k[-2])).astype("float32")},
    "positions": lambda q, k: {"positions": RNG.integers(-1, k[-2], (q[-2], 4))},
    "positions, sparsemax": lambda q, k: {
        "positions": RNG.integers(-1, min(k[-2], 1), (q[-2], 2)),
        "normalize": kvattn.sparsemax,
    },
    "many positions": lambda q, k: {"positions": RNG.integers(-1, k[-2], (q[-2], 64))},
    "no positions": lambda q, k: {"positions": np.zeros((q[-2], 0), int)},
    "additive": lambda q, k: {"score": _additive(q[-1])},
    "gated": lambda q, k: {"score": partial(kvattn.gated_score, w_g=np.ones(2 * q[-1], "float32"))},
    "dot": {"score": kvattn.dot_score},
    "distance": {"score": kvattn.distance_score},
    "sparsemax": {"normalize": kvattn.sparsemax},
    "scale": {"scale": 0.5},
    "negative scale": {"scale": -0.5},
    "softcap": {"softcap": 3.0},
    "weights": {"return_weights": True},
    "lse": {"return_lse": True},
    "dropout": {"dropout": 0.5},
}


def _additive(d):
    shapes = {"W_q": (d, 4), "W_k": (d, 4), "w_v": (4,)}
    return partial(kvattn.additive_score, **{name: np.ones(shape, "float32") for name, shape in shapes.items()})


LOOP = ("kernels.jax.blocks", "attention")  # of blocks, the formula of which is traced once

ENTRIES = {  # a kernel's name: what runs, and nothing else does, where it serves
    "numpy": {"tiles": [("kernels.numpy.tiled", "attention")], "the formula": [("backends.numpy", "_scores")]},
    "torch": {
        "SDPA": [("kernels.torch.sdpa", "fused")],
        "SDPA, by lengths": [("kernels.torch.sdpa", "by_lengths")],
        "SDPA, in bands": [("kernels.torch.sdpa", "in_bands")],
        "the formula": [("backends.torch", "_scores")],
    },
    "tensorflow": {"blocks": [("kernels.tensorflow.tiles", "attention")], "the formula": [("backends.tensorflow", "_scores")]},
    "jax": {"tiles": [("kernels.jax.tiles", "attention")], "the formula": [("backends.jax", "_scores")], "a loop": [LOOP]},
    "mxnet": {
        "NumPy's": [("kernels.mxnet.views", "attention")],
        "nothing": [("backends.mxnet", "_nothing")],
        "the formula": [("backends.mxnet", "_scores")],
    },
}


def served(backend, call):
    """The entries that a call went through, each with how many times."""
    seen = {}
    with ExitStack() as spies:
        for module, name in {entry for entries in ENTRIES[backend].values() for entry in entries}:
            spies.enter_context(_spy(module, name, seen))
        TRACED.get(backend, lambda call: call())(call)
    return seen


def _traced(call):
    """JAX's programs are cached, and no spy sees one run: it is traced anew, and not compiled."""
    import jax

    jax.clear_caches()
    jax.eval_shape(call)


TRACED = {"jax": _traced}
RNGS = {"jax": lambda: __import__("jax").random.key(0)}  # dropout's, where there is no hidden state to draw from


def _spy(module, name, seen):
    home = importlib.import_module(f"kvattn.{module}")
    function = getattr(home, name)

    def spy(*args, **options):
        seen[module, name] = seen.get((module, name), 0) + 1
        return function(*args, **options)

    return patch.object(home, name, spy)


@pytest.mark.parametrize(("shapes", "what"), [(shapes, what) for shapes in SHAPES for what in OPTIONS])
def test_the_kernel_explained_is_the_one_that_runs(backend, tab, shapes, what):
    query, key, value = SHAPES[shapes]
    options = OPTIONS[what] if isinstance(OPTIONS[what], dict) else OPTIONS[what]((*value[:-3], *query[-3:]), key)
    if "dropout" in options and backend in RNGS:
        options = options | {"rng": RNGS[backend]()}
    inputs = [tab.asarray(RNG.standard_normal(shape).astype("float32")) for shape in SHAPES[shapes]]
    said = kvattn.explain(*inputs, **options)
    seen = served(backend, lambda: kvattn.attention(*inputs, **options))
    looped = seen.pop(LOOP, 0)
    name = said.kernel.removesuffix(", of selected keys").removesuffix(" computed again").removesuffix(", in blocks")
    if name in ("SDPA, by lengths", "SDPA, in bands", "nothing"):  # they call others in their turn
        assert set(seen) >= set(ENTRIES[backend][name]), said
    else:
        assert set(seen) == set(ENTRIES[backend][name]), said
        assert bool(looped or max(seen.values()) > 1) == ("in blocks" in said.kernel), said
    assert ("of selected keys" in said.kernel) == ("positions" in options and name != "nothing")


def test_few_queries_in_a_window_from_an_offset(backend, tab):
    """Of JAX, a program that serves other offsets too."""
    query, key = (tab.asarray(RNG.standard_normal((1, 1, n, 8)).astype("float32")) for n in (200, 4096))
    sizes, scores = [], tab._scores

    def spy(query, key, *args):
        sizes.append(key.shape[-2])
        return scores(query, key, *args)

    for score in (None, kvattn.distance_score, lambda query, key: kvattn.dot_score(query, key)):
        options = {"score": score, "window": 3, "query_offset": 50, "normalize": kvattn.sparsemax}
        said = kvattn.explain(query, key, key, **options)
        with patch.object(tab, "_scores", spy):
            TRACED.get(backend, lambda call: call())(lambda options=options: kvattn.attention(query, key, key, **options))
        if sizes:  # else another kernel serves it than the formula
            assert ("beside the keys in" in said.why) == (max(sizes) < 4096), (said, sizes)
        sizes.clear()


def test_a_mask_of_unknown_sizes_is_not_cut(backend, tab):
    if backend == "tensorflow":
        import tensorflow as tf

        said = []
        x = tf.zeros((1, 1024, 8))

        @tf.function(input_signature=[tf.TensorSpec((None, None), tf.bool)], autograph=False)
        def call(mask):
            said.append(kvattn.explain(x, x, x, mask=mask, window=3, normalize=kvattn.sparsemax))
            return kvattn.attention(x, x, x, mask=mask, window=3, normalize=kvattn.sparsemax)

        with patch("kvattn.planning.cut", side_effect=AssertionError("it was cut")):
            call(tf.ones((1024, 1024), tf.bool))
        assert "window" not in said[0].why


def test_it_says_so_in_a_sentence(backend, tab):
    x = tab.asarray(np.zeros((4, 8), "float32"))
    said = kvattn.explain(x, x, x, normalize=kvattn.sparsemax)
    assert said[:2] == (backend, "cpu")
    assert str(said) == f"{backend} on cpu serves this call by {said.kernel}: {said.why}"


def test_it_tells_of_the_blocks_that_keep_memory_bounded(backend, tab):
    x = tab.asarray(np.zeros((4096, 8), "float32"))
    said = kvattn.explain(x, x, x, score=lambda query, key: kvattn.distance_score(query, key))
    assert said.kernel.startswith("the formula, in blocks"), said


def test_neutral_data_goes_where_attention_takes_it(backend):
    x = [[1.0, 2.0]]
    assert kvattn.explain(x, x, x, backend=backend).backend == backend
    with kvattn.use_backend(backend):
        assert kvattn.explain(x, x, x).backend == backend


def test_a_namespace_explains_its_own(backend):
    assert kvattn.namespace.functions(backend)["explain"]([[1.0]], [[1.0]], [[1.0]]).backend == backend


def test_it_raises_what_attention_raises(backend):
    x = np.zeros((4, 8), "float32")
    for wrong in ({"mask": x}, {"valid_lens": [1, 2, 3]}, {"nonsense": 1}, {"return_lse": True, "normalize": kvattn.average}):
        with pytest.raises((TypeError, ValueError)) as explained:
            kvattn.explain(x, x, x, **wrong, backend=backend)
        with pytest.raises(explained.type) as raised:
            kvattn.attention(x, x, x, **wrong, backend=backend)
        if "nonsense" not in wrong:
            assert str(explained.value) == str(raised.value)


def test_a_backend_that_tells_nothing_is_explained_too():
    class Mine:
        """NumPy's tab without `choose`."""

        def __getattr__(self, name):
            if name in ("choose", "__name__"):
                raise AttributeError(name)
            return getattr(kvattn.dispatch.load("numpy"), name)

    x = np.zeros((1024, 64), "float32")
    told = kvattn.explain(x, x, x, window=3, backend=Mine())
    assert told[:3] == ("Mine", "cpu", "a kernel of its own")
    assert "no function choose" in told.why


def test_what_sdpa_lacks_is_explained(backend, tab):
    if backend == "torch":
        import torch

        x = torch.zeros(4, 8)
        bias = torch.zeros(4, 4, requires_grad=True)
        assert kvattn.explain(x, x, x, bias=bias).kernel == "the formula"
        assert kvattn.explain(x, x, x, bias=bias.detach()).kernel == "SDPA"
        said = []
        torch.func.vmap(lambda x: said.append(kvattn.explain(x, x, x).kernel) or x)(x[None])
        assert said == ["the formula"]


def test_a_trace_explains_what_is_traced(backend, tab):
    """The device of a traced array may be unknown; its kernel is not."""
    x = np.zeros((4, 8), "float32")
    if backend in TRACES:
        said = []
        TRACES[backend](lambda x: said.append(kvattn.explain(x, x, x)) or x)(tab.asarray(x))
        assert said[-1].backend == backend
        assert said[-1].device in ("cpu", "unknown")


TRACES = {
    "jax": lambda f: __import__("jax").jit(f),
    "tensorflow": lambda f: __import__("tensorflow").function(f, autograph=False),
}
