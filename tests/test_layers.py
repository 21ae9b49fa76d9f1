"""The native layers, one suite for the five: a plain reference's numbers, weights by one naming scheme, one seed, decoding."""

import importlib
import inspect
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
from adapters import reference
from near import assert_near

import kvattn
from kvattn import layers, weights

RNG = np.random.default_rng(3)
QUERIES, KEYS, VALUES = (RNG.normal(size=shape).astype("float32") for shape in ((2, 3, 4), (2, 5, 4), (2, 5, 6)))
X = RNG.normal(size=(2, 4, 8)).astype("float32")
TOKENS = RNG.integers(0, 11, (2, 5))
LENS = np.array([4, 2])
SOURCE = np.random.default_rng(4).normal(size=(2, 3, 8)).astype("float32")  # an encoder's outputs, of lengths 3 and 2
GRAD = {"QKV": RNG.normal(size=(2, 3, 6)).astype("float32"), "X": RNG.normal(size=(2, 4, 8)).astype("float32")}

# name: (layer, configuration, inputs, reference of (weights, *inputs) -> output)
SCORED = ("DotProductAttention", "AdditiveAttention", "MultiplicativeAttention", "GatedAttention")
CASES = {
    name: (name, {"num_hiddens": 8} if name == "AdditiveAttention" else {}, (QUERIES, KEYS, VALUES, LENS),
           lambda w, *inputs, name=name: reference.attention(name, w, *inputs)[0])
    for name in SCORED
}  # fmt: skip
HEADS = {"num_hiddens": 8, "num_heads": 4}
SLOPES = (2**-2, 2**-4, 2**-6, 2**-8)
ENCODER = {"vocab_size": 11, "num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4, "num_blks": 2}
CASES |= {
    "MultiHeadAttention": ("MultiHeadAttention", HEADS, (X, X, X, LENS), 
                           lambda w, *x: reference.multi_head(w, *x, num_heads=4)[0]),
    "with biases": (
        "MultiHeadAttention", {**HEADS, "bias": True}, (QUERIES, KEYS, VALUES, LENS),
        lambda w, *x: reference.multi_head(w, *x, num_heads=4)[0],
    ),
    "grouped heads": (
        "MultiHeadAttention", {**HEADS, "num_kv_heads": 2}, (X, X, X, np.array([[1, 2, 3, 4], [4, 0, 2, 1]])),
        lambda w, *x: reference.multi_head(w, *x, num_heads=4, num_kv_heads=2)[0],
    ),
    **{
        f"without a batch, lengths {lens.shape}": (
            "MultiHeadAttention", {**HEADS, "num_kv_heads": 2}, (X[0], X[0], X[0], lens),
            lambda w, *x: reference.multi_head(w, *(a[None] for a in x), num_heads=4, num_kv_heads=2)[0][0],
        )
        for lens in (np.array(3), np.array([1, 0, 2, 4]))
    },
    "rotary": (
        "MultiHeadAttention", {**HEADS, "num_heads": 2, "rotary": True}, (X, X, X, LENS),
        lambda w, *x: reference.multi_head(w, *x, num_heads=2, turned=reference.turned)[0],
    ),
    "rotary, interleaved, grouped heads": (
        "MultiHeadAttention", {**HEADS, "num_kv_heads": 2, "rotary": {"interleaved": True, "base": 50.0}}, (X, X, X, LENS),
        lambda w, *x: reference.multi_head(
            w, *x, num_heads=4, num_kv_heads=2, turned=lambda y: reference.turned(y, 50.0, interleaved=True)
        )[0],
    ),
    "norms, then rotary": (
        "MultiHeadAttention", {**HEADS, "num_heads": 2, "qk_norm": True, "rotary": True}, (X, X, X, LENS),
        lambda w, *x: reference.multi_head(w, *x, num_heads=2, turned=reference.turned)[0],
    ),
    "a sink": (
        "MultiHeadAttention", {**HEADS, "num_kv_heads": 2, "sink": True}, (X, X, X, LENS),
        lambda w, *x: reference.multi_head(w, *x, num_heads=4, num_kv_heads=2)[0],
    ),
    "alibi": (
        "MultiHeadAttention", {**HEADS, "num_kv_heads": 2, "alibi": True}, (X, X, X, LENS),
        lambda w, *x: reference.multi_head(w, *x, num_heads=4, num_kv_heads=2, slopes=SLOPES)[0],
    ),
    "alibi, slopes of one's own, more keys than queries": (
        "MultiHeadAttention", {**HEADS, "num_heads": 2, "alibi": [1.5, -0.5]}, (QUERIES, KEYS, VALUES, LENS),
        lambda w, *x: reference.multi_head(w, *x, num_heads=2, slopes=(1.5, -0.5))[0],
    ),
    "AddNorm": ("AddNorm", {"norm_shape": 8}, (X, X[::-1].copy()), lambda w, x, y: reference.norm(w, x + y)),
    "PositionWiseFFN": ("PositionWiseFFN", {"ffn_num_hiddens": 5, "ffn_num_outputs": 8}, (X,), reference.ffn),
    "TransformerEncoderBlock": (
        "TransformerEncoderBlock", {"num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4}, (X, LENS),
        lambda w, *x: reference.block(w, *x, num_heads=4),
    ),
    "TransformerEncoder": ("TransformerEncoder", ENCODER, (TOKENS, LENS),
                           lambda w, *x: reference.encoder(w, *x, num_blks=2, num_heads=4)),
    "TransformerDecoderBlock": (
        "TransformerDecoderBlock", {"num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4}, (X, SOURCE, LENS),
        lambda w, *x: reference.decoder_block(w, *x, num_heads=4),
    ),
    "a decoder's block that turns, norms and has sinks and biases": (
        "TransformerDecoderBlock",
        {**HEADS, "ffn_num_hiddens": 12, "num_heads": 2, "rotary": True, "qk_norm": True, "sink": True, "use_bias": True},
        (X, SOURCE, np.array([[1, 2, 3, 0], [3, 0, 2, 1]])),
        lambda w, *x: reference.decoder_block(w, *x, num_heads=2, turned=reference.turned),
    ),
    "TransformerDecoder": ("TransformerDecoder", ENCODER, (TOKENS, SOURCE, LENS),
                           lambda w, *x: reference.decoder(w, *x, num_blks=2, num_heads=4)),
    "a decoder of one block": (
        "TransformerDecoder", {**ENCODER, "num_blks": 1, "num_kv_heads": 2}, (TOKENS, SOURCE),
        lambda w, *x: reference.decoder(w, *x, num_blks=1, num_heads=4, num_kv_heads=2),
    ),
}  # fmt: skip


# whose parts' gradients are judged with others: a step aside for every weight takes its time
UNDROPPED = ("PositionWiseFFN", "TransformerDecoderBlock", "TransformerDecoder")  # decoders: in test_decoders.py
UNDERIVED = ("TransformerEncoder", "TransformerDecoderBlock", "TransformerDecoder")


@pytest.fixture
def adapter(backend):
    return importlib.import_module(f"adapters.{backend}")


def made(adapter, name, config, inputs, seed=7):
    """A layer with its weights, and the weights."""
    seeded = {} if name in ("DotProductAttention", "AddNorm") else {"seed": seed}
    layer = adapter.layer(name, **config, **seeded)
    adapter.call(layer, *inputs)
    return layer, adapter.weights(layer)


def shaken(w):
    """The weights moved off their first values: zeros and ones would hide mistakes."""
    rng = np.random.default_rng(5)
    return {name: (x + rng.normal(size=x.shape) / 4).astype("float32") for name, x in w.items()}


PLACES = {  # where d2l has each argument
    "DotProductAttention": "dropout",
    "AdditiveAttention": "num_hiddens dropout",
    "MultiHeadAttention": "num_hiddens num_heads dropout bias",
    "PositionalEncoding": "num_hiddens dropout max_len",
    "AddNorm": "norm_shape dropout",
    "PositionWiseFFN": "ffn_num_hiddens ffn_num_outputs",
    "TransformerEncoderBlock": "num_hiddens ffn_num_hiddens num_heads dropout use_bias",
    "TransformerEncoder": "vocab_size num_hiddens ffn_num_hiddens num_heads num_blks dropout use_bias",
    "TransformerDecoderBlock": "num_hiddens ffn_num_hiddens num_heads dropout i",
    "TransformerDecoder": "vocab_size num_hiddens ffn_num_hiddens num_heads num_blks dropout",
}
SIZES = "key_size query_size value_size num_hiddens"
OWN_PLACES = {  # where its tabs differ
    "mxnet": {"AddNorm": "dropout", "MultiHeadAttention": "num_hiddens num_heads dropout use_bias"},
    "jax": {"AddNorm": "dropout"},
    "tensorflow": {
        "AdditiveAttention": "key_size query_size num_hiddens dropout",
        "MultiHeadAttention": f"{SIZES} num_heads dropout bias",
        "TransformerEncoderBlock": f"{SIZES} norm_shape ffn_num_hiddens num_heads dropout bias",
        "TransformerEncoder": f"vocab_size {SIZES} norm_shape ffn_num_hiddens num_heads num_blks dropout bias",
        "TransformerDecoderBlock": f"{SIZES} norm_shape ffn_num_hiddens num_heads dropout i",
        "TransformerDecoder": f"vocab_size {SIZES} norm_shape ffn_num_hiddens num_heads num_blks dropout",
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_arguments_have_d2ls_names_in_d2ls_places(backend, name):
    places = {**PLACES, **OWN_PLACES.get(backend, {})}[name].split()
    layer = getattr(importlib.import_module(f"kvattn.{backend}"), name)
    assert list(inspect.signature(layer).parameters)[: len(places)] == places


@pytest.mark.parametrize("case", CASES)
def test_a_layer_gives_the_numbers_of_the_reference(adapter, case):
    name, config, inputs, answer = CASES[case]
    layer, w = made(adapter, name, config, inputs)
    w = shaken(w)
    layer = adapter.load(layer, w)
    np.testing.assert_allclose(adapter.call(layer, *inputs), answer(w, *inputs), atol=2e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNDERIVED])
def test_a_layer_gives_the_gradients_of_the_reference(adapter, case):
    name, config, inputs, answer = CASES[case]
    layer, w = made(adapter, name, config, inputs)
    w = shaken(w)
    layer = adapter.load(layer, w)
    grad_output = GRAD["QKV" if name in SCORED else "X"] if name in SCORED or inputs[0] is not QUERIES else GRAD["X"][:, :3]
    grad_output = grad_output[0] if inputs[0].ndim == 2 and name == "MultiHeadAttention" else grad_output
    if name == "TransformerDecoder":
        grad_output = np.random.default_rng(6).normal(size=(2, 5, 11)).astype("float32")
    by_inputs, by_weights = adapter.gradients(layer, inputs, grad_output)
    floats = [i for i, x in enumerate(inputs) if x.dtype.kind == "f"]
    arrays = {name: x.astype(float) for name, x in w.items()} | {f"input {i}": inputs[i].astype(float) for i in floats}

    def function(given):
        return answer(given, *(given.get(f"input {i}", x) for i, x in enumerate(inputs)))

    expected = reference.gradients(function, arrays, grad_output)
    assert set(by_weights) == set(w)
    for name in w:
        np.testing.assert_allclose(by_weights[name], expected[name], atol=1e-4, err_msg=name)
    for i, by_input in zip(floats, by_inputs, strict=True):
        np.testing.assert_allclose(by_input, expected[f"input {i}"], atol=1e-4, err_msg=f"input {i}")


@pytest.mark.parametrize("name", [*SCORED, "MultiHeadAttention", "TransformerEncoderBlock"])
@pytest.mark.parametrize("empty", ["queries", "keys", "batch"])
def test_a_layer_that_was_never_called_takes_arrays_without_rows(adapter, name, empty):
    of_heads = name not in SCORED
    _, config, inputs, _ = CASES[name]
    queries, keys, values = (X, X, X) if of_heads else inputs[:3]
    if empty == "queries":
        queries = queries[:, :0]
    elif empty == "keys":
        keys, values = keys[:, :0], values[:, :0]
    else:
        queries, keys, values = queries[:0], keys[:0], values[:0]
    given = (queries if empty != "keys" else keys,) if name == "TransformerEncoderBlock" else (queries, keys, values)
    output = adapter.call(adapter.layer(name, **config), *given)
    assert output.shape == (*given[0].shape[:2], values.shape[-1])
    assert not output.any()


def test_the_epsilon_of_a_layer_norm_is_1e_5(adapter):
    layer, w = made(adapter, "AddNorm", {"norm_shape": 8}, (X, X))
    small = X / 1000  # of a variance that the epsilon is ten times of
    np.testing.assert_allclose(adapter.call(layer, small, small), reference.norm(w, 2 * small), atol=1e-5)


def test_gelu_is_by_erf(adapter):
    config = {"ffn_num_hiddens": 5, "ffn_num_outputs": 8, "activation": "gelu"}
    layer, w = made(adapter, "PositionWiseFFN", config, (3 * X,))
    np.testing.assert_allclose(adapter.call(layer, 3 * X), reference.ffn(w, 3 * X, "gelu"), atol=1e-5)  # by tanh: 1e-3 off


@pytest.mark.parametrize("name", SCORED)
def test_the_weights_shown_are_those_of_the_last_call(adapter, name):
    _, config, inputs, _ = CASES[name]
    layer, w = made(adapter, name, config, inputs)
    adapter.call(layer, *inputs, training=True)
    np.testing.assert_allclose(adapter.shown(layer), reference.attention(name, w, *inputs)[1], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SCORED if name != "DotProductAttention"])
def test_the_weights_shown_do_not_follow_the_optimiser(adapter, name):
    _, config, inputs, _ = CASES[name]
    layer, w = made(adapter, name, config, inputs)
    expected = reference.attention(name, w, *inputs)[1]
    adapter.call(layer, *inputs)
    adapter.load(layer, shaken(w))  # into the same arrays, as an optimiser writes
    np.testing.assert_allclose(adapter.shown(layer), expected, atol=1e-5)
    assert np.abs(reference.attention(name, shaken(w), *inputs)[1] - expected).max() > 0.01


def test_weights_are_not_computed_unless_they_are_read(adapter, backend, tab, monkeypatch):
    if backend == "jax":  # whose calls return them: tests/test_layers_jax.py asks what they cost
        return
    layer, _ = made(adapter, "TransformerEncoder", {**ENCODER, "dropout": 0.5}, (TOKENS,))
    asked, attention = [], tab.attention
    monkeypatch.setattr(tab, "attention", lambda *x, **how: asked.append(how.get("return_weights")) or attention(*x, **how))
    for training in (False, True):
        adapter.call(layer, TOKENS, training=training)
    assert not any(asked)
    assert len(asked) == 4
    assert [kvattn.to_numpy(x).shape for x in layer.attention_weights] == [(8, 5, 5)] * 2
    assert asked[4:] == [True] * 2


def test_the_weights_of_heads_are_shown_batch_times_heads(adapter):
    layer, w = made(adapter, "MultiHeadAttention", HEADS, (X, X, X, LENS))
    expected = reference.multi_head(w, X, X, X, LENS, num_heads=4)[1]
    np.testing.assert_allclose(adapter.shown(layer), expected, atol=1e-5)


@pytest.mark.parametrize("width", [8, 7, 1])
def test_positions_are_encoded_at_odd_widths_too(adapter, width):
    layer = adapter.layer("PositionalEncoding", num_hiddens=width)
    got = adapter.call(layer, np.zeros((2, 6, width), "float32"))
    assert_near(got, np.broadcast_to(layers.encoding(6, width), (2, 6, width)))


def test_the_angles_of_positions_are_of_base_10000(adapter):
    """The numbers are those of a program of many digits, written down: sin and cos of 3 / 10000^(j / h)."""
    row = [0.1411200081, -0.9899924966, 0.0299955002, 0.9995500337]  # of 3, and of 0.03
    layer = adapter.layer("PositionalEncoding", num_hiddens=4)
    np.testing.assert_allclose(adapter.call(layer, np.zeros((1, 4, 4), "float32"))[0, 3], row, atol=1e-7)
    row = [0.9092974268, -0.4161468365, 0.0502165994, 0.9987383507, 0.0012619144]  # of 2, odd
    layer = adapter.layer("PositionalEncoding", num_hiddens=5)
    np.testing.assert_allclose(adapter.call(layer, np.zeros((1, 3, 5), "float32"))[0, 2], row, atol=1e-7)


def test_a_sequence_longer_than_max_len_is_refused(adapter):
    layer = adapter.layer("PositionalEncoding", num_hiddens=4, max_len=5)
    assert_near(adapter.call(layer, np.zeros((1, 5, 4), "float32"))[0], layers.encoding(5, 4))
    with pytest.raises(ValueError, match="max_len=5"):
        adapter.call(layer, np.zeros((1, 6, 4), "float32"))


@pytest.mark.parametrize("case", [case for case, (name, *_) in CASES.items() if case == name and name not in UNDROPPED])
def test_dropout_works_in_training_alone(adapter, case):
    name, config, inputs, answer = CASES[case]
    layer, w = made(adapter, name, {**config, "dropout": 0.5}, inputs)
    expected = answer(w, *inputs)
    np.testing.assert_allclose(adapter.call(layer, *inputs), expected, atol=2e-5)
    assert np.abs(adapter.call(layer, *inputs, training=True) - expected).max() > 0.05


@pytest.mark.parametrize("name", ["DotProductAttention", "AddNorm", "PositionalEncoding"])
@pytest.mark.parametrize("rate", [1.5, 1, -0.5])
def test_a_rate_of_dropout_that_is_none_is_refused_where_a_layer_is_made(adapter, name, rate):
    sizes = {"PositionalEncoding": {"num_hiddens": 4}, "AddNorm": {"norm_shape": 4}}.get(name, {})
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), not {rate}"):
        adapter.layer(name, **sizes, dropout=rate)


def test_positions_are_dropped_in_training_alone(adapter):
    layer, expected = adapter.layer("PositionalEncoding", num_hiddens=8, dropout=0.5), X + layers.encoding(4, 8)
    np.testing.assert_allclose(adapter.call(layer, X), expected, atol=1e-5)
    assert np.abs(adapter.call(layer, X, training=True) - expected).max() > 0.05


# ---- weights


def expected_names(seed):
    """The encoder's weights as the plan in kvattn/layers/__init__.py draws them."""
    shapes = {
        "attention": {f"W_{c}": (8, 8) for c in "qkvo"},
        "ffn": {"W_1": (8, 12), "b_1": (12,), "W_2": (12, 8), "b_2": (8,)},
    }
    found = {"embedding": layers.initial(seed, "embedding", (11, 8))}
    for i in range(2):
        of_block = layers.child(seed, f"blocks.{i}")
        for part, inside in shapes.items():
            of_part = layers.child(of_block, part)
            found |= {f"blocks.{i}.{part}.{name}": layers.initial(of_part, name, shape) for name, shape in inside.items()}
        for part in ("addnorm1", "addnorm2"):
            found |= {f"blocks.{i}.{part}.{name}": layers.initial(None, name, (8,)) for name in ("gamma", "beta")}
    return found


def test_one_seed_gives_the_same_weights_in_every_framework(adapter):
    _, w = made(adapter, "TransformerEncoder", ENCODER, (TOKENS, LENS), seed=11)
    expected = expected_names(11)
    assert set(w) == set(expected)
    for name, x in w.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


FIRST = {  # the first and the last number of each weight by seed 7, drawn once beside the layers and written down
    "AdditiveAttention": {"W_q": (0.49469156, 0.64787999), "W_k": (-0.564648167, 0.000278418691),
                          "w_v": (-0.08169906, -0.45008675)},
    "MultiplicativeAttention": {"W": (0.20752409, 0.77924825)},
    "GatedAttention": {"w_g": (-0.19206951, 0.31715149)},
    "MultiHeadAttention": {"W_q": (0.42841546, 0.04595702), "W_k": (-0.48899966, 0.48340588),
                           "W_v": (0.10333479, 0.06636308), "W_o": (-0.21428872, 0.17258088)},
    "TransformerEncoder": {
        "embedding": (0.02686391, -0.27858189),
        "blocks.0.attention.W_q": (-0.50639928, -0.2555469), "blocks.0.attention.W_k": (-0.43579804, -0.36241174),
        "blocks.0.attention.W_v": (0.58239581, -0.2943985), "blocks.0.attention.W_o": (0.4839662, -0.25993431),
        "blocks.0.ffn.W_1": (0.4422515, -0.21086681), "blocks.0.ffn.W_2": (0.07692837, -0.51403964),
        "blocks.1.attention.W_q": (-0.35114111, 0.11157256), "blocks.1.attention.W_k": (0.51006385, 0.37873874),
        "blocks.1.attention.W_v": (0.425244, 0.51947747), "blocks.1.attention.W_o": (0.59969048, 0.08304621),
        "blocks.1.ffn.W_1": (0.41114416, -0.42733866), "blocks.1.ffn.W_2": (-0.32612948, 0.18564341),
    },
    "TransformerDecoder": {
        "embedding": (0.02686391, -0.27858189), "dense.W": (0.21946456, 0.007470778655),
        "blocks.0.attention1.W_q": (0.05152807757, 0.361927867), "blocks.1.attention1.W_o": (-0.25562844, -0.12988378),
        "blocks.0.attention2.W_q": (0.3732598722, 0.2117420435), "blocks.1.attention2.W_v": (0.29484016, -0.2174789),
        "blocks.0.ffn.W_1": (0.4422515, -0.21086681), "blocks.1.ffn.W_2": (-0.32612948, 0.18564341),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_a_seed_gives_the_numbers_that_it_has_always_given(adapter, name):
    _, config, inputs, _ = CASES[name]
    _, w = made(adapter, name, config, inputs)
    for which, ends in FIRST[name].items():
        np.testing.assert_allclose(w[which].ravel()[[0, -1]], ends, rtol=1e-6, err_msg=which)


def test_without_a_seed_each_weight_has_its_width_and_its_own_numbers(adapter):
    layer = adapter.layer("MultiHeadAttention", num_hiddens=96, num_heads=4)
    adapter.call(layer, *[np.zeros((1, 2, 96), "float32")] * 3, None)
    drawn = adapter.weights(layer)
    for x in drawn.values():  # sqrt(6 / 192): 9,216 numbers come within 1% of it
        assert 0.175 < np.abs(x).max() < 0.17678
        assert abs(x.std() - 0.10206) < 0.003
    for one, other in itertools.combinations(drawn.values(), 2):
        assert np.abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.06
    layer = adapter.layer("AdditiveAttention", num_hiddens=300)
    adapter.call(layer, QUERIES, KEYS, VALUES, LENS)
    assert 0.13 < np.abs(adapter.weights(layer)["w_v"]).max() < 0.14119  # sqrt(6 / 301)
    layer = adapter.layer("MultiplicativeAttention")
    adapter.call(layer, *[np.zeros((1, 2, 96), "float32")] * 3, None)
    assert 0.175 < np.abs(adapter.weights(layer)["W"]).max() < 0.17678
    layer = adapter.layer("GatedAttention")
    adapter.call(layer, *[np.zeros((1, 2, 150), "float32")] * 3, None)
    assert 0.13 < np.abs(adapter.weights(layer)["w_g"]).max() < 0.14119
    layer = adapter.layer("TransformerEncoder", **{**ENCODER, "vocab_size": 100, "num_hiddens": 64, "num_blks": 1})
    adapter.call(layer, TOKENS, LENS)
    assert abs(adapter.weights(layer)["embedding"].std() - 0.125) < 0.008  # 1 / sqrt(64)


def test_without_a_seed_the_distribution_is_the_same(adapter):
    layer = adapter.layer("PositionWiseFFN", ffn_num_hiddens=300, ffn_num_outputs=100)
    adapter.call(layer, np.zeros((1, 2, 100), "float32"))
    w, bound = adapter.weights(layer)["W_1"], layers.glorot((100, 300))
    assert np.abs(w).max() <= bound
    assert abs(w.std() - bound / np.sqrt(3)) < bound / 100
    assert abs(w.mean()) < bound / 50


def test_weights_go_into_a_layer_that_was_never_called(adapter):
    layer, w = made(adapter, "TransformerEncoder", ENCODER, (TOKENS, LENS))
    other = adapter.load(adapter.layer("TransformerEncoder", **ENCODER), w)
    np.testing.assert_array_equal(adapter.call(other, TOKENS, LENS), adapter.call(layer, TOKENS, LENS))


def test_exported_weights_are_copies_of_their_own(adapter):
    layer, w = made(adapter, "PositionWiseFFN", {"ffn_num_hiddens": 5, "ffn_num_outputs": 8}, (X,))
    kept = {name: x.copy() for name, x in w.items()}
    adapter.load(layer, shaken(w))  # into the same arrays, as an optimiser writes
    for name, x in w.items():
        np.testing.assert_array_equal(x, kept[name], err_msg=name)


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(adapter):
    layer, w = made(adapter, "PositionWiseFFN", {"ffn_num_hiddens": 5, "ffn_num_outputs": 8}, (X,))
    wrong = {"W_1": w["W_1"].T, "b_1": w["b_1"] + 1, "W_2": w["W_2"], "b_3": w["b_2"]}
    with pytest.raises(
        ValueError, match=r"(?s)missing: b_2 \(8,\).*unknown: b_3 \(8,\).*W_1 has shape \(5, 8\); expected \(8, 5\)"
    ):
        adapter.load(layer, wrong)
    np.testing.assert_array_equal(adapter.weights(layer)["b_1"], w["b_1"])


LARGER = [("W_1", 1), ("b_1", 0), ("W_2", 1), ("b_2", 0)]  # names and axes; what goes in is known after a call only


@pytest.mark.parametrize(
    ("name", "axis", "called"), [*((*x, True) for x in (("W_1", 0), ("W_2", 0), *LARGER)), *((*x, False) for x in LARGER)]
)
def test_larger_arrays_are_no_weights(adapter, name, axis, called):
    config = {"ffn_num_hiddens": 5, "ffn_num_outputs": 8}
    layer, w = made(adapter, "PositionWiseFFN", config, (X,))
    target = layer if called else adapter.layer("PositionWiseFFN", **config)
    larger = {n: x + 1 for n, x in w.items()}
    larger[name] = np.concatenate([larger[name], larger[name].take([0], axis)], axis)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        adapter.load(target, larger)
    for n, x in adapter.weights(layer).items():
        np.testing.assert_array_equal(x, w[n])


def test_weights_rest_in_a_safetensors_file(adapter, tmp_path):
    layer, w = made(adapter, "TransformerEncoder", ENCODER, (TOKENS, LENS))
    weights.save_weights(w, tmp_path / "encoder.safetensors")
    loaded = weights.load_weights(tmp_path / "encoder.safetensors")
    other = adapter.load(adapter.layer("TransformerEncoder", **ENCODER), loaded)
    np.testing.assert_array_equal(adapter.call(other, TOKENS, LENS), adapter.call(layer, TOKENS, LENS))


def test_an_encoder_carries_its_weights_to_every_other_framework(backends):
    adapters = {name: importlib.import_module(f"adapters.{name}") for name in backends}
    sent = {
        name: made(adapter, "TransformerEncoder", {**ENCODER, "num_kv_heads": 2}, (TOKENS, LENS))
        for name, adapter in adapters.items()
    }
    sent = {name: (layer, shaken(w)) for name, (layer, w) in sent.items()}
    for source, target in itertools.permutations(backends, 2):
        layer, w = sent[source]
        there = adapters[source].call(adapters[source].load(layer, w), TOKENS, LENS)
        here = adapters[target].load(adapters[target].layer("TransformerEncoder", **ENCODER, num_kv_heads=2), w)
        np.testing.assert_allclose(adapters[target].call(here, TOKENS, LENS), there, atol=2e-5, err_msg=f"{source} to {target}")


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("MultiHeadAttention", {"embed_dim": 8, "num_heads": 2}, "has no embed_dim, which is called num_hiddens here"),
        (
            "MultiHeadAttention",
            {"units": 8, "nhead": 2},
            "units, which is called num_hiddens here, no nhead, which is called num_h",
        ),
        ("MultiHeadAttention", {"num_heads": 2, "key_dim": 4}, r"num_hiddens is of all heads together, num_heads \* key_dim"),
        ("PositionWiseFFN", {"ffn_num_hiddens": 8, "units": 4}, "has no units, which is called ffn_num_outputs here"),
        ("TransformerEncoder", {"num_layers": 2}, "has no num_layers, which is called num_blks here"),
    ],
)
def test_what_other_libraries_call_an_argument_is_told(backend, name, given, said):
    with pytest.raises(TypeError, match=said):
        getattr(importlib.import_module(f"kvattn.{backend}"), name)(**given)


def test_the_params_of_the_function_are_those_of_the_layer(adapter, backend):
    layer, w = made(adapter, "MultiHeadAttention", {**HEADS, "bias": True}, (X, X, X, LENS))
    by_function = kvattn.multi_head_attention(X, X, X, w, num_heads=4, valid_lens=LENS, backend=backend)
    np.testing.assert_allclose(kvattn.to_numpy(by_function), adapter.call(layer, X, X, X, LENS), atol=1e-5)


# ---- padding


EACH = np.array([[5, 0, 2], [2, 1, 0]])
MASK = np.ones((2, 3, 5), bool)
MASK[0, 1] = MASK[0, :, 4] = MASK[1, :, 1] = False
NOTHING = np.zeros((2, 3), bool)
HIDDEN = {  # options, (batch, n) queries that see no key, (batch, m) keys that no query sees; without a batch, of the first
    "lengths": ({"valid_lens": LENS}, NOTHING, np.arange(5) >= LENS[:, None]),
    "lengths of each query": ({"valid_lens": EACH}, EACH == 0, np.arange(5) >= EACH.max(1)[:, None]),
    "a mask": ({"mask": MASK[:, None]}, ~MASK.any(2), ~MASK.any(1)),
    "a bias": ({"bias": np.where(MASK[:1, None], 0.5, -np.inf).astype("float32")}, ~MASK.any(2)[[0, 0]], ~MASK.any(1)[[0, 0]]),
    "causal": ({"causal": True}, NOTHING, np.arange(5) >= np.array([[3], [3]])),
    "a window": ({"window": (1, 0), "query_offset": 4}, NOTHING | [False, False, True], np.arange(5) < np.array([[3], [3]])),
    "positions": (
        {"positions": np.array([[0, 2], [2, -1], [-1, -1]])}, NOTHING | [False, False, True],
        np.array([[False, True, False, True, True]] * 2),
    ),
}  # fmt: skip


def hurt(x, rows):
    """x with NaN and inf in these rows."""
    x = x.copy()
    x[rows] = RNG.choice([np.nan, np.inf, -np.inf], x[rows].shape)
    return x


def same(found, expected, what):
    """Up to rounding: NaN may lead to another program, whose sums are as exact and in another order."""
    top = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=64 * np.finfo("float32").eps * top, err_msg=what)


def same_gradients(adapter, layer, clean, dirty, grad_output, options):
    """Whether output and all gradients are those of clean inputs."""
    same(adapter.call(layer, *dirty, **options), adapter.call(layer, *clean, **options), "output")
    (by_inputs, by_weights), expected = (adapter.gradients(layer, x, grad_output, **options) for x in (dirty, clean))
    for name, x in expected[1].items():
        same(by_weights[name], x, name)
    for i, (x, y) in enumerate(zip(by_inputs, expected[0], strict=True)):
        same(x, y, f"input {i}")


@pytest.mark.parametrize("hidden", [*HIDDEN, "lengths of each query, no batch"])
def test_nan_in_padding_reaches_no_gradient_of_a_head(adapter, hidden):
    options, alone, unseen = HIDDEN[hidden.partition(", no batch")[0]]
    clean, dirty = (QUERIES, KEYS, VALUES), (hurt(QUERIES, alone), hurt(KEYS, unseen), hurt(VALUES, unseen))
    grad_output = GRAD["X"][:, :3]
    if hidden.endswith("no batch"):  # the second of the batch alone
        options, grad_output = {"valid_lens": options["valid_lens"][1]}, grad_output[1]
        clean, dirty = ([x[1] for x in some] for some in (clean, dirty))
    layer, _ = made(adapter, "MultiHeadAttention", {**HEADS, "bias": True, "num_kv_heads": 2}, clean)
    same_gradients(adapter, layer, clean, dirty, grad_output, options)


@pytest.mark.parametrize("name", [name for name in SCORED if name != "DotProductAttention"])
def test_nan_in_padding_reaches_no_gradient_of_a_score(adapter, name):
    options, alone, unseen = HIDDEN["lengths of each query"]
    clean, dirty = (QUERIES, KEYS, VALUES), (hurt(QUERIES, alone), hurt(KEYS, unseen), hurt(VALUES, unseen))
    layer, _ = made(adapter, name, CASES[name][1], clean)
    same_gradients(adapter, layer, clean, dirty, GRAD["QKV"], options)


def test_nan_in_a_padded_position_stays_in_it(adapter):
    """A block's norms and its network treat every position alike, padded or not: NaN in one stays there."""
    layer, _ = made(adapter, "TransformerEncoderBlock", {"num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4}, (X, LENS))
    padded = np.arange(4) >= LENS[:, None]
    clean, dirty = adapter.call(layer, X, LENS), adapter.call(layer, np.where(padded[..., None], np.float32(np.nan), X), LENS)
    assert_near(dirty[~padded], clean[~padded])
    assert np.isnan(dirty[padded]).all()


# ---- decoding


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_step_by_step_is_the_causal_pass(adapter, kv_heads):
    layer, _ = made(adapter, "TransformerEncoder", {**ENCODER, "num_kv_heads": kv_heads}, (TOKENS,))
    whole = adapter.call(layer, TOKENS, causal=True)
    steps, cache = [], []
    for i in range(TOKENS.shape[1]):
        step, cache = adapter.call(layer, TOKENS[:, i : i + 1], causal=True, cache=cache)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, atol=1e-5)


def test_decoding_with_rotary_counts_on_from_the_cache(adapter, backend):
    layer, w = made(adapter, "MultiHeadAttention", {**HEADS, "num_kv_heads": 2, "rotary": True}, (X, X, X))
    whole = adapter.call(layer, X, X, X, causal=True)
    expected = reference.multi_head(w, X, X, X, num_heads=4, num_kv_heads=2, causal=True, turned=reference.turned)[0]
    np.testing.assert_allclose(_first(whole), expected, atol=1e-5)
    steps, cache = [], kvattn.KVCache()
    for start, end in ((0, 2), (2, 3), (3, 4)):
        step, *_, cache = adapter.call(layer, *[X[:, start:end]] * 3, causal=True, cache=cache)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, atol=1e-5)


def _first(results):
    return results[0] if isinstance(results, tuple) else results


def test_a_query_offset_is_where_rotary_has_the_queries(adapter):
    layer, _ = made(adapter, "MultiHeadAttention", {**HEADS, "rotary": True}, (X, X, X))
    whole = _first(adapter.call(layer, X, X, X, causal=True))
    last = _first(adapter.call(layer, X[:, 2:], X, X, causal=True, query_offset=2))
    np.testing.assert_allclose(last, whole[:, 2:], atol=1e-5)
    for several in (np.array([0, 1]), [0, 1]):  # a list of as many as there are queries would do as positions
        with pytest.raises(ValueError, match="query_offset has shape \\(2,\\); with rotary= it is one for all"):
            adapter.call(layer, X[:, 2:], X, X, query_offset=several)
    with pytest.raises(TypeError, match="query_offset must be an int"):
        adapter.call(layer, X, X, X, query_offset=1.5)


@pytest.mark.parametrize("rotary", [None, True])
def test_a_query_offset_beside_a_cache_is_refused(adapter, rotary):
    layer, _ = made(adapter, "MultiHeadAttention", {**HEADS, "rotary": rotary}, (X, X, X))
    with pytest.raises(ValueError, match="query_offset is the cache's length where there is a cache"):
        adapter.call(layer, X, X, X, causal=True, cache=kvattn.KVCache(), query_offset=2)


def test_a_query_offset_may_be_an_array_without_axes(adapter, backend):
    layer, _ = made(adapter, "MultiHeadAttention", {**HEADS, "rotary": True}, (X, X, X))
    given = kvattn.asarray(np.array(2), backend=backend)
    found, expected = (_first(adapter.call(layer, X[:, 2:], X, X, causal=True, query_offset=x)) for x in (given, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dynamic_rotary_turns_queries_and_keys_by_one_length(adapter):
    """By lengths of their own, few queries and many keys would stand at angles that their distance does not tell."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2}
    layer, _ = made(adapter, "MultiHeadAttention", {**HEADS, "num_heads": 2, "rotary": {"scaling": scaling}}, (X, X, X))
    whole = _first(adapter.call(layer, X, X, X))
    np.testing.assert_allclose(_first(adapter.call(layer, X[:, :2], X, X)), whole[:, :2], atol=1e-5)


@pytest.mark.parametrize(
    ("rotary", "error", "words"),
    [
        ("yes", TypeError, "rotary must be True or a dict"),
        ({"theta": 5.0}, TypeError, "rotary has no theta; it has base, interleaved"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim must be even"),
        ({"scaling": {"rope_type": "su"}}, ValueError, "known: default, linear"),
    ],
)
def test_a_rotary_that_cannot_be_is_refused_when_the_layer_is_made(adapter, rotary, error, words):
    with pytest.raises(error, match=words):
        adapter.layer("MultiHeadAttention", **HEADS, rotary=rotary)


def test_rotary_of_heads_of_an_odd_width_is_refused(adapter):
    with pytest.raises(ValueError, match="3 features, an odd number"):
        adapter.layer("MultiHeadAttention", num_hiddens=6, num_heads=2, rotary=True)


def test_a_sink_is_zero_at_first_and_serves_decoding_and_the_weights_shown(adapter, backend):
    layer, w = made(adapter, "MultiHeadAttention", {**HEADS, "sink": True}, (X, X, X))
    assert w["sink"].tolist() == [0.0] * 4
    assert "sink" not in made(adapter, "MultiHeadAttention", HEADS, (X, X, X))[1]
    layer, w = adapter.load(layer, shaken(w)), shaken(w)
    expected, weights = reference.multi_head(w, X, X, X, num_heads=4, causal=True)
    output, *rest = adapter.call(layer, X, X, X, causal=True, return_weights=True)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    np.testing.assert_allclose(rest[0].reshape(weights.shape), weights, atol=1e-5)
    steps, cache = [], kvattn.KVCache()
    for start, end in ((0, 3), (3, 4)):
        step, *_, cache = adapter.call(layer, *[X[:, start:end]] * 3, causal=True, cache=cache)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, atol=1e-5)


def test_a_sink_beside_a_layers_own_is_refused_and_serves_a_layer_without(adapter):
    layer, w = made(adapter, "MultiHeadAttention", {**HEADS, "sink": True}, (X, X, X))
    sink = np.array([0.5, -1.0, 0.0, 2.0], "float32")
    with pytest.raises(ValueError, match="sink is given beside the layer's own"):
        adapter.call(layer, X, X, X, sink=sink)
    plain, _ = made(adapter, "MultiHeadAttention", HEADS, (X, X, X))
    expected = reference.multi_head({**w, "sink": sink}, X, X, X, num_heads=4)[0]
    np.testing.assert_allclose(_first(adapter.call(plain, X, X, X, sink=sink)), expected, atol=1e-5)
    with pytest.raises(TypeError, match="sink must be True or False"):
        adapter.layer("MultiHeadAttention", **HEADS, sink=0.5)


def test_alibi_counts_on_from_the_cache_and_from_a_query_offset(adapter):
    layer, w = made(adapter, "MultiHeadAttention", {**HEADS, "alibi": True, "rotary": True}, (X, X, X))
    expected, weights = reference.multi_head(w, X, X, X, num_heads=4, causal=True, slopes=SLOPES, turned=reference.turned)
    _, *rest = adapter.call(layer, X, X, X, causal=True, return_weights=True)
    np.testing.assert_allclose(rest[0].reshape(weights.shape), weights, atol=1e-5)
    steps, cache = [], kvattn.KVCache()
    for start, end in ((0, 2), (2, 3), (3, 4)):
        step, *_, cache = adapter.call(layer, *[X[:, start:end]] * 3, causal=True, cache=cache)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, atol=1e-5)
    last = _first(adapter.call(layer, X[:, 2:], X, X, causal=True, query_offset=2))
    np.testing.assert_allclose(last, expected[:, 2:], atol=1e-5)


def test_alibi_is_the_bias_that_one_would_write_in_blocks_too(adapter, backend):
    """Of as many pairs that it is built a block at a time: no array (heads, n, m) is held."""
    x = np.random.default_rng(8).normal(size=(1, 600, 8)).astype("float32")
    layer, _ = made(adapter, "MultiHeadAttention", {**HEADS, "alibi": True}, (X, X, X))
    plain, _ = made(adapter, "MultiHeadAttention", HEADS, (X, X, X))
    far = np.abs(np.arange(600)[:, None] - np.arange(600)).astype("float32")
    bias = -np.array(SLOPES, "float32")[:, None, None] * far
    for options in ({}, {"causal": True}, {"valid_lens": np.array([450])}):
        ours = _first(adapter.call(layer, x, x, x, **options))
        np.testing.assert_allclose(ours, _first(adapter.call(plain, x, x, x, bias=bias, **options)), atol=2e-5)


@pytest.mark.parametrize(
    ("alibi", "error", "words"),
    [
        ([0.5, 0.25], ValueError, "expected True, or a finite slope for each of the 4 heads"),
        ([0.5, 0.25, float("nan"), 1.0], ValueError, "a finite slope for each"),
        (0.5, ValueError, "a finite slope for each of the 4 heads"),
        ("steep", TypeError, "alibi must be True or 4 slopes, not str"),
    ],
)
def test_an_alibi_that_cannot_be_is_refused_when_the_layer_is_made(adapter, alibi, error, words):
    with pytest.raises(error, match=words):
        adapter.layer("MultiHeadAttention", **HEADS, alibi=alibi)


def test_a_bias_beside_alibi_is_refused_and_none_is_no_alibi(adapter):
    layer, w = made(adapter, "MultiHeadAttention", {**HEADS, "alibi": True}, (X, X, X))
    with pytest.raises(ValueError, match="bias is given beside the layer's own"):
        adapter.call(layer, X, X, X, bias=np.zeros((4, 4), "float32"))
    for alibi in (None, False):
        plain, _ = made(adapter, "MultiHeadAttention", {**HEADS, "alibi": alibi}, (X, X, X))
        assert_near(_first(adapter.call(plain, X, X, X)), reference.multi_head(w, X, X, X, num_heads=4)[0])


def test_a_causal_encoder_never_sees_the_future_out_of_training(adapter):
    layer, _ = made(adapter, "TransformerEncoder", ENCODER, (TOKENS,))
    changed = TOKENS.copy()
    changed[:, 3:] = (changed[:, 3:] + 1) % 11
    before, after = (adapter.call(layer, tokens, causal=True) for tokens in (TOKENS, changed))
    assert_near(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1e-3


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", [*SCORED, "MultiHeadAttention", "AddNorm", "PositionWiseFFN", "PositionalEncoding"])
def test_integers_are_refused_where_a_layer_takes_floats(adapter, name, called):
    name, config, inputs = {"PositionalEncoding": (name, {"num_hiddens": 8}, (X,))}.get(name) or CASES[name][:3]
    layer = adapter.layer(name, **config)
    if called:
        adapter.call(layer, *inputs)
    with pytest.raises(TypeError, match=r"has dtype int(32|64); expected floating point"):
        adapter.call(layer, *(x.astype("int32") for x in inputs))


@pytest.mark.parametrize("name", ["encoder", "decoder", "tab"])
def test_an_unknown_option_is_told_whatever_its_name(adapter, backend, name):
    layer, _ = made(adapter, "TransformerEncoder", ENCODER, (TOKENS,))
    with pytest.raises(TypeError, match=f"has no argument '{name}'"):
        adapter.call(layer, TOKENS, **{name: 3})


# ---- the namespaces


def test_a_namespace_names_what_is_near(backend):
    kv = importlib.import_module(f"kvattn.{backend}")
    with pytest.raises(AttributeError, match=r"no 'MultiheadAttention': did you mean MultiHeadAttention"):
        kv.MultiheadAttention  # noqa: B018
    with pytest.raises(AttributeError, match=r"no 'qqqqq'$"):
        kv.qqqqq  # noqa: B018


def test_a_namespaces_numpy_takes_lists_as_well(backend):
    kv = importlib.import_module(f"kvattn.{backend}")
    for given in ([1, 2, 3], np.array([1, 2, 3]), kvattn.asarray(np.array([1, 2, 3]), backend=backend)):
        found = kv.numpy(given)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, [1, 2, 3])


def test_a_namespace_loads_no_other_framework(backend):
    others = {"torch", "tensorflow", "keras", "jax", "flax", "mxnet", "matplotlib"}
    code = (
        f"import sys, {BEFORE.get(backend, 'numpy')}; before = set(sys.modules); from kvattn import {backend}; "
        f"print(sorted((set(sys.modules) - before) & {others!r} - {OF_ITS_OWN.get(backend, {backend})!r}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "[]"


BEFORE = {"tensorflow": "tensorflow"}  # which loads others where they are installed
OF_ITS_OWN = {"jax": {"jax", "flax"}, "tensorflow": {"keras"}}


# ---- what help() and completion tell


def test_help_tells_every_argument_of_a_layer_and_completion_what_draws(backend):
    kv = importlib.import_module(f"kvattn.{backend}")
    for name in layers.LAYERS:
        layer = getattr(kv, name)
        text = inspect.getdoc(layer)
        told = set(re.findall(r"^    (\w+): \S", text.partition("Args:")[2], re.MULTILINE))
        assert told == {*inspect.signature(layer).parameters} - {"parent", "name"}, name
        assert "- queries: (batch, n, d)." in text or "- X: (batch, n, h)" in text
    text = inspect.getdoc(kv.MultiHeadAttention)
    assert re.search(r"(use_)?bias: another name of (use_)?bias", text)
    assert "- cache: a kvattn.KVCache" in text
    assert "- options: kvattn.attention's own" in text
    assert {"show_heatmaps", "show_attention", "plot", "attention", "MultiHeadAttention"} <= {*dir(kv)}
    assert all(hasattr(kv, name) for name in dir(kv))


OF_HEADS = {"rotary": {"base": 100.0}, "qk_norm": 1e-3, "alibi": True, "sink": True}


@pytest.mark.parametrize("name", ["TransformerEncoderBlock", "TransformerEncoder"])  # decoders': among the cases
def test_blocks_and_encoders_turn_and_norm_queries_and_keys_and_have_sinks(adapter, name):
    """As NumPy's do, whose block is made of its own parts."""
    sizes = {"num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4, "num_kv_heads": 2, **OF_HEADS}
    sizes |= {"vocab_size": 11, "num_blks": 2} if name == "TransformerEncoder" else {}
    x = TOKENS if name == "TransformerEncoder" else X
    layer, w = made(adapter, name, sizes, (x,))
    assert {"q_norm", "k_norm", "sink"} <= {each.rpartition(".")[2] for each in w}
    w = shaken(w)
    import kvattn.numpy as kv

    native = kv.import_weights(getattr(kv, name)(**sizes), w)
    assert_near(adapter.call(adapter.load(layer, w), x, LENS), native(x, LENS), name)
    if name == "TransformerEncoderBlock":
        attention = kv.MultiHeadAttention(8, 4, num_kv_heads=2, **OF_HEADS)
        own = {each.removeprefix("attention."): y for each, y in w.items() if each.startswith("attention.")}
        attended = kv.import_weights(attention, own)(X, X, X, LENS)
        Y = native.addnorm1(X, attended)
        assert_near(native(X, LENS), native.addnorm2(Y, native.ffn(Y)), "its parts")
