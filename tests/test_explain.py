"""`kvattn.explain` tells what the tab's `choose` chose, and `attention` runs that: what is tested here is the words."""

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
    "scores": {"return_scores": "biased"},
    "dropout": {"dropout": 0.5},
}


def _additive(d):
    shapes = {"W_q": (d, 4), "W_k": (d, 4), "w_v": (4,)}
    return partial(kvattn.additive_score, **{name: np.ones(shape, "float32") for name, shape in shapes.items()})


KERNELS = {
    "numpy": {"tiles", "the formula"},
    "torch": {"SDPA", "SDPA, by lengths", "the formula"},
    "tensorflow": {"blocks", "the formula"},
    "jax": {"tiles", "the formula"},
    "mxnet": {"NumPy's", "nothing", "the formula"},
}


@pytest.mark.parametrize("shapes", SHAPES)
def test_the_words_tell_what_was_chosen(backend, tab, shapes):
    """That a tab runs what it chose is one line of its `_attend`; here, that what is said of it is true."""
    query, key, value = SHAPES[shapes]
    inputs, chosen, choose = [tab.asarray(np.ones(shape, "float32")) for shape in SHAPES[shapes]], [], tab.choose
    for what, options in OPTIONS.items():
        options = options if isinstance(options, dict) else options((*value[:-3], *query[-3:]), key)
        with patch.object(tab, "choose", lambda *call: chosen.append(choose(*call)) or chosen[-1]):
            said = kvattn.explain(*inputs, **options)
        choice = chosen[-1]
        assert (said.kernel, said.why) == choice[:2], what
        name = said.kernel.removesuffix(", of selected keys").removesuffix(", in blocks")
        assert name in KERNELS[backend], what
        assert ("of selected keys" in said.kernel) == ("positions" in options and name != "nothing"), what
        if "positions" not in options and name != "SDPA, by lengths":
            assert (len(choice.blocks) > 1) == ("in blocks" in said.kernel), what
            assert (len(choice.blocks) > 1) == (f"{len(choice.blocks)} blocks of queries" in said.why), what


@pytest.mark.parametrize("shapes", SHAPES)
def test_what_is_answered_before_a_kernel_is_chosen_is_said_too(backend, tab, shapes):
    """PyTorch's tab looks first whether a call is one of the commonest or small, and `choose` asks the same function."""
    if backend == "torch":
        query, key, value = SHAPES[shapes]
        inputs, found, at_once = [tab.asarray(np.ones(shape, "float32")) for shape in SHAPES[shapes]], [], tab._at_once
        for what, options in OPTIONS.items():
            options = options if isinstance(options, dict) else options((*value[:-3], *query[-3:]), key)
            with patch.object(tab, "_at_once", lambda *call: found.append(at_once(*call)) or found[-1]):
                with patch.object(tab, "_attend"):  # what is not answered before
                    kvattn.attention(*inputs, **options)
                ran = found[0]
                found.clear()
                said = kvattn.explain(*inputs, **options)
            if ran is None and {"valid_lens", "window", "causal"}.isdisjoint(options):
                assert found[0] is None, what
            elif ran is not None:
                assert found == [ran], what
                assert said.kernel == "SDPA", what
            found.clear()


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
