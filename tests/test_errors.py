"""Every bad input gets its error from the frontend, in every backend: a table of (what is wrong, arguments, error, words)."""

from functools import partial

import numpy as np
import pytest

import kvattn
from kvattn.conformance import native

F, I = np.float32, np.int64


def zeros(*shape, dtype=F):
    return np.zeros(shape, dtype)


GOOD = {"query": zeros(2, 4, 3, 5), "key": zeros(2, 2, 6, 5), "value": zeros(2, 2, 6, 7)}
NAN, INF = float("nan"), float("inf")

# what: (arguments that replace the good ones, error, words that the message must hold)
BAD = {
    "query of rank 1": ({"query": zeros(5)}, ValueError, ["query", "(5,)", "at least 2 axes"]),
    "key of another rank": ({"key": zeros(2, 6, 5)}, ValueError, ["key", "(2, 6, 5)", "(2, 4, 3, 5)", "axes", "key[:, None]"]),
    "value of another rank": ({"value": zeros(6, 7)}, ValueError, ["value", "(6, 7)", "(2, 4, 3, 5)", "value[None, None]"]),
    "query of another rank": ({"query": zeros(2, 3, 5)}, ValueError, ["query", "(2, 3, 5)", "query[:, None]", "axis -3"]),
    "query without leading axes": ({"query": zeros(3, 5)}, ValueError, ["query", "(3, 5)", "query[None, None]", "axis -3"]),
    "features differ": ({"key": zeros(2, 2, 6, 4)}, ValueError, ["key", "(2, 2, 6, 4)", "(2, 4, 3, 5)", "axis -1", "4", "5"]),
    "keys and values differ": ({"value": zeros(2, 2, 5, 7)}, ValueError, ["value", "(2, 2, 5, 7)", "(2, 2, 6, 5)", "axis -2"]),
    "batches differ": (
        {"key": zeros(3, 2, 6, 5), "value": zeros(3, 2, 6, 7)}, ValueError, ["key", "(3, 2, 6, 5)", "(2, 4, 3, 5)", "axis -4"]),
    "heads do not divide": (
        {"key": zeros(2, 3, 6, 5), "value": zeros(2, 3, 6, 7)}, ValueError, ["key", "axis -3", "heads", "3", "4"]),
    "value heads differ": ({"value": zeros(2, 4, 6, 7)}, ValueError, ["value", "axis -3", "4", "2"]),
    "values of a wider batch": (
        {"query": zeros(1, 4, 3, 5), "key": zeros(1, 2, 6, 5)}, ValueError, ["value", "(2, 2, 6, 7)", "axis -4", "expected 1"]),
    "mixed dtypes": ({"key": zeros(2, 2, 6, 5, dtype=np.float64)}, TypeError, ["key", "float64", "query", "float32"]),
    "mixed half": ({"value": zeros(2, 2, 6, 7, dtype=np.float16)}, TypeError, ["value", "float16", "query", "float32"]),
    "integer query": ({"query": zeros(2, 4, 3, 5, dtype=I)}, TypeError, ["query", "int64", "floating point"]),
    "integer key": ({"key": zeros(2, 2, 6, 5, dtype=np.int32)}, TypeError, ["key", "int32", "floating point"]),
    "bool value": ({"value": zeros(2, 2, 6, 7, dtype=bool)}, TypeError, ["value", "bool", "floating point"]),
    "float mask": ({"mask": zeros(3, 6)}, TypeError, ["mask", "float32", "bool", "bias"]),
    "integer mask": ({"mask": zeros(3, 6, dtype=I)}, TypeError, ["mask", "int64", "bool", "!= 0"]),
    "mask that does not broadcast": (
        {"mask": zeros(3, 5, dtype=bool)}, ValueError, ["mask", "(3, 5)", "(2, 4, 3, 6)", "axis -1"]),
    "mask of too many axes": ({"mask": zeros(1, 1, 1, 3, 6, dtype=bool)}, ValueError, ["mask", "(1, 1, 1, 3, 6)", "axes"]),
    "bias that does not broadcast": ({"bias": zeros(2, 3, 6)}, ValueError, ["bias", "(2, 3, 6)", "(2, 4, 3, 6)", "axis -3"]),
    "bias of another dtype": ({"bias": zeros(3, 6, dtype=np.float64)}, TypeError, ["bias", "float64", "float32"]),
    "negative length": ({"valid_lens": [3, -1]}, ValueError, ["valid_lens", "negative", "-1"]),
    "float lengths": ({"valid_lens": [2.5, 1.0]}, TypeError, ["valid_lens", "integer"]),
    "lengths of another batch": ({"valid_lens": [1, 2, 3]}, ValueError, ["valid_lens", "(3,)", "(2,)", "(2, 3)"]),
    "lengths per head": ({"valid_lens": zeros(2, 4, dtype=I)}, ValueError, ["valid_lens", "(2, 4)", "(2, 3)"]),
    "float offset": ({"query_offset": 1.5}, TypeError, ["query_offset", "int", "float"]),
    "offsets of another batch": ({"query_offset": [1, 2, 3]}, ValueError, ["query_offset", "(3,)", "(2,)"]),
    "negative window": ({"window": -1}, ValueError, ["window", "negative", "-1"]),
    "negative side": ({"window": (2, -3)}, ValueError, ["window", "negative"]),
    "float window": ({"window": 1.5}, TypeError, ["window", "int"]),
    "window of three": ({"window": (1, 2, 3)}, ValueError, ["window", "(left, right)"]),
    "window of a flag": ({"window": True}, TypeError, ["window", "int", "True"]),
    "position out of reach": ({"positions": [[0, 6], [1, 2], [3, 4]]}, ValueError, ["positions", "[-1, 6)", "6"]),
    "position below none": ({"positions": [[0, 5], [1, -2], [3, 4]]}, ValueError, ["positions", "[-1, 6)", "-2"]),
    "float positions": ({"positions": zeros(3, 2)}, TypeError, ["positions", "integer"]),
    "positions of other queries": ({"positions": zeros(4, 2, dtype=I)}, ValueError, ["positions", "(4, 2)", "axis -2"]),
    "infinite scale": ({"scale": INF}, ValueError, ["scale", "finite", "inf"]),
    "scale that is not a number": ({"scale": NAN}, ValueError, ["scale", "finite", "nan"]),
    "scale of text": ({"scale": "big"}, TypeError, ["scale", "number", "str"]),
    "scale of a flag": ({"scale": True}, TypeError, ["scale", "number", "bool"]),
    "softcap of zero": ({"softcap": 0.0}, ValueError, ["softcap", "above 0"]),
    "infinite softcap": ({"softcap": INF}, ValueError, ["softcap", "finite"]),
    "sink of another size": ({"sink": zeros(3)}, ValueError, ["sink", "(3,)", "(2, 4)", "axis -1", "expected 1 or 4"]),
    "sink of each query, of another size": (
        {"sink": zeros(2, 4, 5, 1)}, ValueError, ["sink", "(2, 4, 5, 1)", "(2, 4, 3, 1)", "axis -2"]),
    "sink of scores": ({"sink": zeros(2, 4, 3)}, ValueError, ["sink", "(2, 4, 3)", "axes", "(2, 4)"]),
    "sink of another dtype": ({"sink": zeros(4, dtype=np.float64)}, TypeError, ["sink", "float64", "float32"]),
    "sink of integers": ({"sink": zeros(4, dtype=I)}, TypeError, ["sink", "int64", "floating point"]),
    "sink of a flag": ({"sink": True}, TypeError, ["sink", "bool", "floating point"]),
    "sink of another normaliser": ({"sink": 0.0, "normalize": kvattn.sparsemax}, ValueError, ["sink", "softmax"]),
    "gpt-oss's sink": ({"s_aux": zeros(4)}, TypeError, ["'s_aux'", "here it is sink"]),
    "segments too short": ({"segments": zeros(2, 3, dtype=I)}, ValueError, ["segments", "(2, 3)", "(2, 6)", "give a pair"]),
    "segments too long": (
        {"segments": (zeros(2, 4, dtype=I), zeros(2, 6, dtype=I))}, ValueError, ["of the queries", "(2, 4)", "(2, 3)"]),
    "segments of keys too short": (
        {"segments": (zeros(2, 3, dtype=I), zeros(2, 5, dtype=I))}, ValueError, ["segments of the keys", "(2, 5)", "(2, 6)"]),
    "segments without a batch": (
        {"segments": (zeros(3, dtype=I), zeros(6, dtype=I))}, ValueError, ["segments of the queries", "(3,)", "(2, 3)"]),
    "float segments": ({"segments": (zeros(2, 3), zeros(2, 6))}, TypeError, ["segments of the queries", "integer"]),
    "segments beyond 32 bits": (
        {"segments": (zeros(2, 3, dtype=I), zeros(2, 6, dtype=I) + 2**40)}, ValueError, ["segments of the keys", "2^31"]),
    "a mask function of integers": ({"mask": lambda q, k: q - k}, TypeError, ["mask, a function", "expected bool", "!= 0"]),
    "a mask function of one answer": (
        {"mask": lambda q, k: True}, TypeError, ["mask, a function, gives a bool", "(..., 3, 1)", "(1, 6)", "bool array"]),
    "a mask function of another shape": (
        {"mask": lambda q, k: (q <= k)[:, :2]}, ValueError, ["mask, a function", "(3, 2)", "axis -1", "expected 1 or 6"]),
    "a bias function of integers": (
        {"bias": lambda q, k: q - k}, TypeError, ["bias, a function", "int", "expected floating point", "convert"]),
    "a bias function of flags": ({"bias": lambda q, k: q <= k}, TypeError, ["bias, a function", "bool", "is mask="]),
    "a bias function of one number": ({"bias": lambda q, k: 1.0}, TypeError, ["bias, a function, gives a float", "array"]),
    "dropout of one": ({"dropout": 1.0}, ValueError, ["dropout", "[0, 1)"]),
    "negative dropout": ({"dropout": -0.5}, ValueError, ["dropout", "[0, 1)", "-0.5"]),
    "causal of text": ({"causal": "yes"}, TypeError, ["causal", "True or False", "yes"]),
    "causal of a number": ({"causal": 1}, TypeError, ["causal", "True or False", "1"]),
    "score of text": ({"score": "dot_score"}, TypeError, ["score", "function", "kvattn.dot_score"]),
    "normaliser of text": ({"normalize": "softmax"}, TypeError, ["normalize", "function", "kvattn.softmax"]),
    "lse of another normaliser": ({"normalize": kvattn.average, "return_lse": True}, ValueError, ["return_lse", "softmax"]),
    "scores of a flag": ({"return_scores": True}, TypeError, ["return_scores", "'raw', 'capped' or 'biased'", "True"]),
    "scores of another stage": ({"return_scores": "scaled"}, ValueError, ["return_scores", "'raw'", "'scaled'"]),
    "score parameters that do not fit": (
        {"score": partial(kvattn.multiplicative_score, W=zeros(5, 4))}, ValueError, ["W", "(5, 4)", "(5, 5)"]),
    "PyTorch's causal": ({"is_causal": True}, TypeError, ["'is_causal'", "here it is causal"]),
    "PyTorch's mask": ({"attn_mask": zeros(3, 6, dtype=bool)}, TypeError, ["'attn_mask'", "here it is mask", "or bias"]),
    "PyTorch's padding": ({"key_padding_mask": zeros(2, 6, dtype=bool)}, TypeError, ["'key_padding_mask'", "valid_lens"]),
    "PyTorch's dropout": ({"dropout_p": 0.1}, TypeError, ["'dropout_p'", "here it is dropout"]),
    "JAX's lengths": ({"key_value_seq_lengths": [1, 2]}, TypeError, ["'key_value_seq_lengths'", "here it is valid_lens"]),
    "Keras' weights": ({"return_attention_scores": True}, TypeError, ["'return_attention_scores'", "return_weights"]),
    "a name cut short": ({"valid_len": [1, 2]}, TypeError, ["'valid_len'", "here it is valid_lens"]),
    "a name that nobody knows": ({"temperature": 2.0}, TypeError, ["'temperature'", "it has score, normalize, mask"]),
    "a mask without heads": ({"mask": zeros(2, 3, 6, dtype=bool)}, ValueError, ["mask", "(2, 3, 6)", "mask[:, None]"]),
    "a bias without heads": ({"bias": zeros(2, 3, 6)}, ValueError, ["bias", "for all heads alike it is bias[:, None]"]),
    "a mask of padding": ({"mask": zeros(2, 6, dtype=bool)}, ValueError, ["mask", "(2, 6)", "it is mask[:, None, None, :]"]),
    "a bias of booleans": ({"bias": zeros(3, 6, dtype=bool)}, TypeError, ["bias", "bool", "booleans are mask="]),
    "query of text": ({"query": "he saw"}, TypeError, ["query"]),
    "ragged query": ({"query": [[1.0], [1.0, 2.0]]}, TypeError, ["query", "list"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(backend, what):
    replaced, error, words = BAD[what]
    with pytest.raises(error) as caught:
        kvattn.attention(**{**GOOD, **replaced}, backend=backend)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


OWN = {  # the caller's own functions that break their promise
    "a score of features": ({"score": lambda query, key: query}, ValueError, ["score gives", "5)", "here (..., 3, 6)"]),
    "a score of one key": (
        {"score": lambda query, key: kvattn.dot_score(query, key)[..., :2]}, ValueError, ["score gives", "2)", "(..., 3, 6)"]),
    "a score that is no array": ({"score": lambda query, key: "near"}, TypeError, ["score gives a str", "an array"]),
    "a score of one argument": ({"score": lambda query: query}, TypeError, ["score, <lambda>, must take (query, key)"]),
    "a score with parameters": ({"score": kvattn.additive_score}, TypeError, ["additive_score", "partial"]),
    "a normaliser without where": (
        {"normalize": lambda scores: scores}, TypeError, ["normalize, <lambda>, must take (scores, where=None)"]),
    "a normaliser of one key": (
        {"normalize": lambda scores, where=None: scores[..., :2]}, ValueError, ["normalize gives", "2)", "here (..., 3, 6)"]),
}  # fmt: skip


@pytest.mark.parametrize("what", OWN)
def test_own_functions_that_break_their_promise_are_named(backend, tab, what):
    replaced, error, words = OWN[what]
    arrays = {name: tab.asarray(x) for name, x in GOOD.items()}
    for call, given in ((kvattn.attention, {}), (kvattn.attention_grad, {"grad_output": tab.asarray(zeros(2, 4, 3, 7))})):
        with pytest.raises(error) as caught:
            call(**arrays, **given, **replaced)
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_an_error_of_an_own_function_itself_is_its_own(backend):
    def score(query, key):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        kvattn.attention(**GOOD, score=score, backend=backend)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_an_error_of_a_function_of_positions_is_its_own(backend, name):
    def mine(q, k):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        kvattn.attention(**GOOD, **{name: mine}, backend=backend)
    assert caught.traceback[-1].name == "mine"


def test_there_is_no_gradient_by_a_function(backend):
    with pytest.raises(ValueError, match="wrt names 'bias', which is a function here"):
        kvattn.attention_grad(**GOOD, bias=lambda q, k: q, grad_output=zeros(2, 4, 3, 7), wrt=("bias",), backend=backend)


def test_names_of_other_libraries_are_answered_everywhere(backend, tab):
    x, W, wrong = tab.asarray(zeros(2, 3, 4)), np.eye(4, dtype=F), {"is_causal": True}
    for call in (
        lambda: kvattn.multi_head_attention(x, x, x, PARAMS, num_heads=2, **wrong),
        lambda: kvattn.self_attention(x, W, W, W, **wrong),
        lambda: kvattn.explain(x, x, x, **wrong),
        lambda: native.run(backend, "DotProductAttention", {}, {}, [zeros(2, 3, 4)] * 3, **wrong),
    ):
        with pytest.raises(TypeError, match="attention has no argument 'is_causal': here it is causal"):
            call()


def test_the_good_arguments_are_good(backend):
    assert tuple(kvattn.attention(**GOOD, backend=backend).shape) == (2, 4, 3, 7)


@pytest.mark.parametrize("what", [w for w in BAD if not any(name.startswith("return_") for name in BAD[w][0])])
def test_attention_grad_says_the_same(backend, what):
    replaced, error, words = BAD[what]
    with pytest.raises(error) as caught:
        kvattn.attention_grad(**{**GOOD, **replaced}, grad_output=zeros(2, 4, 3, 7), backend=backend)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_gradient_returns_gradients_alone(backend):
    for name, x in (("return_weights", True), ("return_lse", True)):
        with pytest.raises(TypeError, match=f"attention_grad has no argument '{name}': it returns gradients alone"):
            kvattn.attention_grad(**GOOD, grad_output=zeros(2, 4, 3, 7), **{name: x}, backend=backend)


BY_SCORES = zeros(2, 4, 3, 6)
THROUGH_SCORES = {
    "no gradient": ({"return_scores": "raw"}, TypeError, "return_scores is given without grad_scores"),
    "no stage": ({"grad_scores": BY_SCORES}, TypeError, "grad_scores is given without return_scores"),
    "another stage": ({"return_scores": "scaled", "grad_scores": BY_SCORES}, ValueError, "'raw', 'capped' or 'biased'"),
    "another shape": ({"return_scores": "raw", "grad_scores": BY_SCORES[..., :5]}, ValueError, "grad_scores has shape"),
    "another dtype": ({"return_scores": "raw", "grad_scores": BY_SCORES.astype("float16")}, TypeError, "has dtype float16"),
}


@pytest.mark.parametrize("what", THROUGH_SCORES)
def test_a_gradient_by_scores_says_what_is_missing_or_wrong(backend, what):
    given, error, words = THROUGH_SCORES[what]
    with pytest.raises(error, match=words):
        kvattn.attention_grad(**GOOD, grad_output=zeros(2, 4, 3, 7), **given, backend=backend)


@pytest.mark.parametrize("lead", [(2,), (2, 2)])
def test_the_axes_that_an_error_asks_for_are_enough(lead):
    """Run once: the errors are the frontend's, the same for every backend."""
    query, key, value = zeros(*lead, 4, 3, 5), zeros(*lead, 6, 5), zeros(*lead, 6, 7)
    with pytest.raises(ValueError, match="axes that it lacks") as caught:
        kvattn.attention(query, key, value)
    index = (*[slice(None)] * len(lead), None)
    assert f"key[{', '.join([':'] * len(lead))}, None]" in str(caught.value)
    assert kvattn.attention(query, key[index], value[index]).shape == (*lead, 4, 3, 7)
    with pytest.raises(ValueError, match=rf"query\[{', '.join([':'] * len(lead))}, None\]"):
        kvattn.attention(zeros(*lead, 3, 5), key[index], value[index])
    assert kvattn.attention(zeros(*lead, 3, 5)[index], key[index], value[index]).shape == (*lead, 1, 3, 7)


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "uint64"])
def test_the_largest_unsigned_length_means_all_and_the_largest_position_none(backend, dtype):
    far = np.iinfo(dtype).max
    q, k, v = np.eye(2, 4, dtype=F), np.eye(3, 4, dtype=F), np.eye(3, dtype=F)
    out = kvattn.to_numpy(
        kvattn.attention(q, k, v, normalize=kvattn.average, valid_lens=np.array([far, 1], dtype), backend=backend)
    )
    np.testing.assert_allclose(out, [[1 / 3] * 3, [1, 0, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"positions must lie in \[-1, 3\)"):
        kvattn.attention(q, k, v, positions=np.array([[0, far]], dtype), backend=backend)


PARAMS = {"W_q": np.eye(4, dtype=F), "W_k": np.eye(4, dtype=F), "W_v": np.eye(4, dtype=F)}
UNBATCHED = {
    "lengths of each head": ({"valid_lens": np.array([1, 2])}, ["valid_lens", "(2,)", "() or (3,)"]),
    "lengths of two axes": ({"valid_lens": np.array([[1, 2, 3]])}, ["valid_lens", "(1, 3)", "() or (3,)"]),
    "an offset of each head": ({"query_offset": np.array([1, 2])}, ["query_offset", "(2,)", "int"]),
    "an offset of each query": ({"query_offset": np.array([1, 2, 3])}, ["query_offset", "(3,)", "int"]),
    "a query with a batch": ({"query": zeros(2, 3, 4)}, ["key", "(3, 4)", "(2, 3, 4)", "batch"]),
}


@pytest.mark.parametrize("what", UNBATCHED)
def test_without_a_batch_heads_are_no_batch(backend, what):
    replaced, words = UNBATCHED[what]
    given = {name: zeros(3, 4) for name in ("query", "key", "value")} | {"params": PARAMS, "num_heads": 2} | replaced
    with pytest.raises(ValueError, match="expected") as caught:
        kvattn.multi_head_attention(**given, backend=backend)
    assert [word for word in words if word not in str(caught.value)] == []


W = PARAMS["W_q"]
HEADS = {  # what: (arguments of heads that replace the good ones, error, words)
    "no heads": ({"num_heads": 0}, ValueError, ["num_heads", "at least 1", "0"]),
    "no key heads": ({"num_kv_heads": 0}, ValueError, ["num_kv_heads", "at least 1", "0"]),
    "half a head": ({"num_heads": 0.5}, TypeError, ["num_heads", "int", "0.5"]),
    "key heads that do not divide": ({"num_kv_heads": 3}, ValueError, ["num_kv_heads", "3", "num_heads", "2"]),
    "a width that heads do not divide": ({"num_heads": 3}, ValueError, ["W_q", "(4, 4)", "multiple", "num_heads", "3"]),
    "a matrix that is missing": ({"params": {"W_q": W, "W_v": W}}, ValueError, ["params lack W_k"]),
    "a matrix that nobody knows": ({"params": {**PARAMS, "W_z": W}}, ValueError, ["params have W_z"]),
    "a bias alone": ({"params": {**PARAMS, "b_o": W[0]}}, ValueError, ["b_o", "no W_o"]),
    "a matrix of other heads": ({"params": {**PARAMS, "W_o": W[:3]}}, ValueError, ["W_o", "(3, 4)", "joined heads"]),
    "an offset beside a cache": ({"cache": kvattn.KVCache(), "query_offset": 1}, ValueError, ["query_offset", "cache"]),
    "offsets beside a cache": ({"cache": kvattn.KVCache(), "query_offset": [1, 1]}, ValueError, ["query_offset", "cache"]),
    "other keys beside a cache": (
        {"cache": kvattn.KVCache(), "key": zeros(2, 5, 4), "value": zeros(2, 5, 4)}, ValueError, ["cache", "n is 3", "m is 5"]),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADS)
def test_bad_heads_are_named(backend, what):
    replaced, error, words = HEADS[what]
    given = {name: zeros(2, 3, 4) for name in ("query", "key", "value")} | {"params": PARAMS, "num_heads": 2} | replaced
    with pytest.raises(error) as caught:
        kvattn.multi_head_attention(**given, backend=backend)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_wrt_must_be_an_argument(backend):
    with pytest.raises(ValueError, match="wrt names 'bias'; this call has key, query, value"):
        kvattn.attention_grad(**GOOD, grad_output=zeros(2, 4, 3, 7), wrt=("bias",), backend=backend)


def test_grad_output_must_have_the_shape_of_the_output(backend):
    with pytest.raises(ValueError, match=r"grad_output has shape \(2, 4, 3, 6\); expected \(2, 4, 3, 7\)"):
        kvattn.attention_grad(**GOOD, grad_output=zeros(2, 4, 3, 6), backend=backend)


def test_merge_needs_pairs(backend):
    with pytest.raises(ValueError, match="as many outputs as lses"):
        kvattn.merge_attention([zeros(3, 7)], [], backend=backend)
    with pytest.raises(ValueError, match=r"lses\[0\] has shape \(4,\)"):
        kvattn.merge_attention([zeros(3, 7)], [zeros(4)], backend=backend)


def test_the_backends_own_arrays_get_the_same_errors(backend, tab):
    arrays = {name: tab.asarray(x) for name, x in GOOD.items()}
    with pytest.raises(ValueError, match=r"key has shape \(2, 2, 6, 4\) but query has \(2, 4, 3, 5\): axis -1"):
        kvattn.attention(**{**arrays, "key": tab.asarray(zeros(2, 2, 6, 4))})
