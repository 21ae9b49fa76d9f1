"""What is TensorFlow's own in the layers: d2l's calls, training=, Keras's saving, policies and models, graphs, short names."""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import keras
import tensorflow as tf

import kvattn
from kvattn import layers
from kvattn import tensorflow as kv
from kvattn.backends import tensorflow as tab

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, when it saves

RNG = np.random.default_rng(0)
X = tf.constant(RNG.normal(size=(2, 4, 8)).astype("float32"))
LENS = tf.constant([3, 2])
SEGMENTS = np.array([[0, 0, 1, 1], [2, 2, 2, 1]])
TOKENS = tf.constant(RNG.integers(0, 11, (2, 6)))
HEADS = {"num_hiddens": 8, "num_heads": 2}
ENCODER = {"vocab_size": 11, **HEADS, "ffn_num_hiddens": 12, "num_blks": 2}
# every layer with a configuration and its inputs
LAYERS = {
    "DotProductAttention": ({}, (X, X, X, LENS)),
    "AdditiveAttention": ({"num_hiddens": 5}, (X, X, X, LENS)),
    "MultiplicativeAttention": ({}, (X, X, X, LENS)),
    "GatedAttention": ({}, (X, X, X, LENS)),
    "MultiHeadAttention": ({**HEADS, "bias": True}, (X, X, X, LENS)),
    "PositionalEncoding": ({"num_hiddens": 8}, (X,)),
    "AddNorm": ({}, (X, X)),
    "PositionWiseFFN": ({"ffn_num_hiddens": 5, "ffn_num_outputs": 8, "activation": "gelu"}, (X,)),
    "TransformerEncoderBlock": ({**HEADS, "ffn_num_hiddens": 12, "num_kv_heads": 1}, (X, LENS)),
    "TransformerEncoder": (ENCODER, (TOKENS, LENS)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(kind, **more):
    """(layer, its inputs)"""
    config, inputs = LAYERS[kind]
    seeded = {} if kind in ("DotProductAttention", "PositionalEncoding", "AddNorm") else {"seed": 7}
    return getattr(kv, kind)(**config, **seeded, **more), inputs


def far(x, y):
    return np.abs(kv.numpy(x).astype(float) - kv.numpy(y).astype(float)).max()


# ---- d2l's calls


def test_the_calls_of_the_scoring_lesson():
    queries, keys, values = kv.normal((2, 1, 2)), kv.normal((2, 10, 2)), kv.normal((2, 10, 4))
    valid_lens = kv.tensor([2, 6])
    attention = kv.DotProductAttention(dropout=0.5)
    kv.check_shape(attention(queries, keys, values, valid_lens, training=False), (2, 1, 4))
    weights = kv.reshape(attention.attention_weights, (1, 1, 2, 10))
    assert float(kv.abs(weights[0, 0, 0, 2:]).numpy().max()) == 0
    queries = kv.normal((2, 1, 20))
    attention = kv.AdditiveAttention(key_size=2, query_size=20, num_hiddens=8, dropout=0.1)
    kv.check_shape(attention(queries, keys, values, valid_lens, training=False), (2, 1, 4))
    kv.check_shape(kv.reshape(attention.attention_weights, (1, 1, 2, 10)), (1, 1, 2, 10))


def test_the_calls_of_the_multi_head_and_position_lessons():
    attention = kv.MultiHeadAttention(100, 100, 100, 100, 5, 0.5)
    X, Y = kv.ones((2, 4, 100)), kv.ones((2, 6, 100))
    kv.check_shape(attention(X, Y, Y, kv.tensor([3, 2]), training=False), (2, 4, 100))
    kv.check_shape(attention.attention.attention_weights, (10, 4, 6))
    pos_encoding = kv.PositionalEncoding(32, 0)
    X = pos_encoding(kv.zeros((1, 60, 32)), training=False)
    P = pos_encoding.P[:, : X.shape[1], :]
    assert P[0, :, 6:10].T.shape == (4, 60)  # an array of NumPy's, as in d2l
    kv.check_shape(tf.expand_dims(tf.expand_dims(P[0, :, :], axis=0), axis=0), (1, 1, 60, 32))


def test_the_calls_of_the_transformer_lesson():
    kv.check_shape(kv.PositionWiseFFN(4, 8)(kv.ones((2, 3, 4)))[0], (3, 8))
    kv.check_shape(kv.AddNorm([1, 2], 0.5)(kv.ones((2, 3, 4)), kv.ones((2, 3, 4)), training=False), (2, 3, 4))
    X, valid_lens = kv.ones((2, 100, 24)), kv.tensor([3, 2])
    block = kv.TransformerEncoderBlock(24, 24, 24, 24, [1, 2], 48, 8, 0.5)
    kv.check_shape(block(X, valid_lens, training=False), X.shape)
    encoder = kv.TransformerEncoder(200, 24, 24, 24, 24, [1, 2], 48, 8, 2, 0.5)
    kv.check_shape(encoder(kv.ones((2, 100)), valid_lens, training=False), (2, 100, 24))
    kv.check_shape(kv.reshape(kv.concat(encoder.attention_weights, 0), (2, 8, -1, 100)), (2, 8, 200, 100))


class Decoder(keras.Model):
    """d2l's decoder block: masked self-attention, attention to the encoder, a network; its weights by attribute."""

    def __init__(self):
        super().__init__()
        self.attention1 = kv.MultiHeadAttention(8, 8, 8, 8, 2, 0.5)
        self.addnorm1 = kv.AddNorm([2], 0.5)
        self.attention2 = kv.MultiHeadAttention(8, 8, 8, 8, 2, 0.5)
        self.addnorm2 = kv.AddNorm([2], 0.5)
        self.heads = [keras.layers.Dense(3), keras.layers.Dense(2)]

    def call(self, X, memory, valid_lens, **kwargs):
        lens = kv.repeat(kv.reshape(kv.arange(1, X.shape[1] + 1), (1, -1)), X.shape[0], 0)
        Y = self.addnorm1(X, self.attention1(X, X, X, lens, **kwargs), **kwargs)
        Y = self.addnorm2(Y, self.attention2(Y, memory, memory, valid_lens, **kwargs), **kwargs)
        return [head(Y) for head in self.heads]


def test_a_decoder_of_the_users_own():
    decoder = Decoder()
    first, second = decoder(X, X, LENS, training=False)
    assert (first.shape, second.shape) == ((2, 4, 3), (2, 4, 2))
    assert np.triu(decoder.attention1.attention.attention_weights, 1).max() == 0
    other = kv.import_weights(Decoder(), kv.export_weights(decoder))
    np.testing.assert_array_equal(other(X, X, LENS)[1], second)


def test_sizes_may_be_given_by_name_alone():
    by_place = kv.TransformerEncoder(11, None, None, None, 8, None, 12, 2, 2, 0.0, True, seed=3)
    by_name = kv.TransformerEncoder(**ENCODER, use_bias=True, seed=3)
    np.testing.assert_array_equal(by_place(TOKENS), by_name(TOKENS))


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (lambda: kv.MultiHeadAttention(100, 5, 0.5), "num_hiddens and num_heads"),  # as in PyTorch's tab
        (lambda: kv.AdditiveAttention(8, 0.1), "num_hiddens"),
        (lambda: kv.TransformerEncoderBlock(**HEADS), "ffn_num_hiddens"),
        (lambda: kv.TransformerEncoder(11, **HEADS, ffn_num_hiddens=12), "num_blks"),
    ],
)
def test_sizes_that_are_missing_are_named(make, missing):
    with pytest.raises(TypeError, match=rf"needs {missing}: .*key_size"):
        make()


@pytest.mark.parametrize("norm_shape", [None, 2, -1, [2], [1, 2], [-2, -1], 8, [8]])
def test_every_norm_shape_norms_the_features(norm_shape):
    Y = kv.AddNorm(norm_shape)(X, X)
    np.testing.assert_allclose(Y, kv.AddNorm()(X, X))
    assert_near(kv.reduce_mean(Y, -1), np.zeros((2, 4)))


@pytest.mark.parametrize("norm_shape", [1, [1], [0], [4, 8], [1, 2, 3], [0, 2], [5, 2]])
def test_a_norm_over_anything_else_is_refused(norm_shape):
    with pytest.raises(ValueError, match="norm_shape is"):
        kv.AddNorm(norm_shape)(X, X)


# ---- training=


@every_layer
def test_every_layer_takes_training(name):
    layer, inputs = made(name, **({} if name == "PositionWiseFFN" else {"dropout": 0.5}))
    plain = layer(*inputs)
    np.testing.assert_array_equal(layer(*inputs, training=False), plain)
    assert (far(layer(*inputs, training=True), plain) > 0.01) == (name != "PositionWiseFFN")


def test_training_reaches_every_dropout(monkeypatch):
    rates, dropped = [], []
    attention, call = kvattn.api.attention, keras.layers.Dropout.call

    def counted(self, inputs, training=False):
        dropped.append(training)
        return call(self, inputs, training)

    def watched(*args, **options):
        rates.append(options["dropout"])
        return attention(*args, **options)

    monkeypatch.setattr(keras.layers.Dropout, "call", counted)
    monkeypatch.setattr(kvattn.api, "attention", watched)
    layer, inputs = made("TransformerEncoder", dropout=0.25)
    tokens = keras.Input((6,), dtype="int32")
    model = keras.Model(tokens, layer(tokens))
    for training in (True, False):
        rates.clear(), dropped.clear()
        layer(*inputs, training=training)
        assert (rates, dropped) == ([0.25 * training] * 2, [training] * 5)  # the positions, and two in each block
        rates.clear(), dropped.clear()
        model(TOKENS, training=training)
        assert (rates, dropped) == ([0.25 * training] * 2, [training] * 5)
        rates.clear(), dropped.clear()
        layer.call(*inputs, training=training)  # as a layer of one's own does, whose call asks for dropout in predictions
        assert (rates, dropped) == ([0.25 * training] * 2, [training] * 5)
    decoder = kv.TransformerDecoder(**ENCODER, dropout=0.25)
    decoder(TOKENS, decoder.init_state(X, LENS))
    rates.clear(), dropped.clear()
    decoder.call(TOKENS, X, LENS, training=True)
    assert (rates, dropped) == ([0.25] * 4, [True] * 7)


def test_a_decoder_knows_use_bias_alone():
    """d2l's TensorFlow encoders say bias, its decoders use_bias."""
    config = kv.TransformerDecoder(**ENCODER).get_config()
    assert (config["use_bias"], "bias" in config) == (False, False)
    assert "bias" not in inspect.signature(kv.TransformerDecoder).parameters
    assert kv.TransformerDecoder(**ENCODER, use_bias=True).blks[0].attention1.W_q.use_bias
    with pytest.raises(TypeError, match=r"TransformerDecoder.*bias"):
        kv.TransformerDecoder(**ENCODER, bias=True)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_predicted_tokens_have_the_dtype_of_the_targets(dtype):
    class Reads(kv.Encoder):
        def call(self, X, *args):
            return X

    class Says(kv.Decoder):
        def init_state(self, *args):
            return None

        def call(self, X, state):
            return tf.one_hot(X + 1, 5), state

    tokens = tf.zeros((2, 3), dtype)
    found, _ = kv.EncoderDecoder(Reads(), Says()).predict_step((tokens, tokens, None, None), None, 2)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, [[1, 2]] * 2)


# ---- Keras's models, configurations and files


def test_a_functional_model_has_any_batch_and_takes_lengths_and_masks(tmp_path):
    inputs = [keras.Input((4, 8)), keras.Input((), dtype="int32"), keras.Input((1, 4, 4), dtype="bool")]
    x, lens, mask = inputs
    attention = kv.MultiHeadAttention(**HEADS, seed=1, name="attention")
    block = kv.TransformerEncoderBlock(**HEADS, ffn_num_hiddens=12, seed=2)
    output = block(attention(x, x, x, lens, mask=mask, window=(2, None)), valid_lens=lens, causal=True)
    assert output.shape == (None, 4, 8)
    model = keras.Model(inputs, output)
    mask = tf.constant(RNG.random((2, 1, 4, 4)) < 0.7)
    expected = block(attention(X, X, X, LENS, mask=mask, window=(2, None)), LENS, causal=True)
    np.testing.assert_array_equal(model([X, LENS, mask]), expected)
    assert attention.attention.attention_weights.shape == (4, 4, 4)
    assert_near(model.predict([X, LENS, mask], verbose=0), expected)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")([X, LENS, mask]), expected)


def test_a_sequence_of_unknown_length_in_a_functional_model():
    layer, _ = made("TransformerEncoder")
    tokens = keras.Input((None,), dtype="int32")
    model = keras.Model(tokens, layer(tokens, causal=True))
    assert model.output.shape == (None, None, 8)
    assert_near(model.predict(TOKENS, verbose=0), layer(TOKENS, causal=True))


class Wrapped(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs, training=None):
        return self.layer(*inputs, training=training)


@every_layer
def test_a_configuration_makes_the_layer_again(name):
    layer, inputs = made(name, name="mine", dtype="mixed_bfloat16")
    again = type(layer).from_config(layer.get_config())
    assert (again.name, again.compute_dtype) == ("mine", "bfloat16")
    np.testing.assert_array_equal(again(*inputs), layer(*inputs))


def test_a_subclass_adds_to_the_configuration():
    class Mine(kv.MultiHeadAttention):
        def __init__(self, extra, **kwargs):
            super().__init__(**kwargs)
            self.extra = extra

        def get_config(self):
            return {**super().get_config(), "extra": self.extra}

    again = Mine.from_config(Mine(3, **HEADS, num_kv_heads=1).get_config())
    assert (again.extra, again.num_kv_heads) == (3, 1)


# ---- dtypes


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16", "float64"])
@every_layer
def test_every_layer_obeys_its_dtype_policy(name, policy):
    layer, inputs = made(name, dtype=policy)
    compute = policy.removeprefix("mixed_")
    with tf.GradientTape() as tape:
        output = layer(*inputs, training=True)
        loss = kv.reduce_sum(kv.astype(output, kv.float32) ** 2)
    assert output.dtype == compute
    eps = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-7}[compute]
    assert far(output, made(name)[0](*inputs)) <= 4 * eps * np.abs(kv.numpy(output)).max()
    assert all(x.dtype == (compute if compute == policy else "float32") for x in layer.weights)
    gradients = tape.gradient(loss, [x.value for x in layer.trainable_variables])
    assert all(np.isfinite(kv.numpy(tf.convert_to_tensor(x))).all() for x in gradients)
    for shown in layer.attention_weights if isinstance(layer, kv.TransformerEncoder) else []:
        assert shown.dtype == compute


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_layer_without_weights_keeps_the_dtype_it_is_given(dtype):
    x = tf.cast(X, dtype)
    assert kv.DotProductAttention(0.5)(x, x, x, training=True).dtype == dtype
    assert kv.PositionalEncoding(8, 0.5)(x, training=True).dtype == dtype


def test_the_global_policy_is_obeyed():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        assert all(made(name)[0](*inputs).dtype == "float16" for name, (_, inputs) in LAYERS.items())
    finally:
        keras.config.set_dtype_policy("float32")


def test_tokens_may_be_floats_in_half_precision_too():
    layer = kv.TransformerEncoder(**{**ENCODER, "vocab_size": 5000}, dtype="mixed_float16")
    tokens = np.array([[2049, 4999, 0]])
    np.testing.assert_array_equal(layer(tokens.astype("float32")), layer(tokens))


def test_a_policy_of_the_users_own_is_saved():
    layer, inputs = made("MultiHeadAttention", dtype=keras.DTypePolicy("mixed_bfloat16"))
    expected = layer(*inputs)
    np.testing.assert_array_equal(kv.numpy(copy.deepcopy(layer)(*inputs)), kv.numpy(expected))


# ---- graphs


@pytest.mark.parametrize(("name", "jit_compile"), [*((name, False) for name in LAYERS), ("TransformerEncoderBlock", True)])
def test_a_graph_gives_what_the_layer_gives(name, jit_compile):
    layer, inputs = made(name)
    in_graph = tf.function(layer, jit_compile=jit_compile)(*inputs)  # the first call, so it makes the weights
    np.testing.assert_allclose(in_graph, layer(*inputs), atol=1e-5)


def test_one_graph_serves_every_batch_and_length():
    layer, _ = made("TransformerEncoder")
    free = [tf.TensorSpec((None, None), tf.int64), tf.TensorSpec((None,), tf.int32)]
    in_graph = tf.function(lambda tokens, lens: layer(tokens, lens, causal=True), input_signature=free)
    for tokens, lens in ((TOKENS, LENS), (TOKENS[:1, :3], LENS[:1])):
        np.testing.assert_allclose(in_graph(tokens, lens), layer(tokens, lens, causal=True), atol=1e-5)


def test_one_graph_serves_every_step_of_decoding():
    layer, _ = made("TransformerEncoder", num_kv_heads=1)
    whole, traces = layer(TOKENS, causal=True), []

    @tf.function
    def step(tokens, caches):
        traces.append(1)
        return layer(tokens, causal=True, cache=caches)

    steps, caches = [], [kv.KVCache.allocate((2, 1, 8, 4), backend="tensorflow")._replace(length=tf.constant(0))] * 2
    for i in range(TOKENS.shape[1]):
        output, caches = step(TOKENS[:, i : i + 1], caches)
        steps.append(output)
    np.testing.assert_allclose(kv.concat(steps, 1), whole, atol=1e-5)
    assert len(traces) == 1


def test_fit_trains():
    tokens = np.random.default_rng(1).integers(0, 11, (64, 6))
    encoder = kv.TransformerEncoder(**{**ENCODER, "num_blks": 1}, dropout=0.1, seed=7)
    model = keras.Sequential([encoder, keras.layers.Dense(11)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=False)
    losses = model.fit(tokens, tokens, epochs=6, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


# ---- the weights that are shown


def test_a_graph_leaves_no_weights_to_show():
    layer, inputs = made("DotProductAttention")
    assert layer.attention_weights is None
    before = layer(*inputs)
    assert layer.attention_weights.shape == (2, 4, 4)
    tf.function(layer)(*inputs)
    with pytest.raises(RuntimeError, match="in a graph"):
        _ = layer.attention_weights
    np.testing.assert_array_equal(layer(*inputs), before)
    assert layer.attention_weights.shape == (2, 4, 4)


def test_the_weights_of_a_call_in_a_graph_are_a_tensor_of_that_graph():
    layer = kv.MultiHeadAttention(num_hiddens=8, num_heads=2, seed=1)
    inputs = [tf.random.normal((2, n, 8)) for n in (3, 5, 5)]
    layer(*inputs, tf.constant([4, 2]))
    expected = layer.attention.attention_weights.numpy()

    @tf.function(input_signature=[tf.TensorSpec((None, None, 8))] * 2 + [tf.TensorSpec((None,), tf.int32)])
    def shown(queries, keys, lens):
        layer(queries, keys, keys, lens)
        inside = tf.cond(tf.reduce_all(lens >= 0), lambda: layer.attention.attention_weights, lambda: tf.zeros((0, 0, 0)))
        return layer.attention.attention_weights, inside

    for found in shown(*inputs[:2], tf.constant([4, 2])):
        assert_near(found.numpy(), expected)
    with pytest.raises(RuntimeError, match=r"in a graph .* read them in that graph"):
        _ = layer.attention.attention_weights
    other = tf.function(lambda: layer.attention.attention_weights)
    with pytest.raises(RuntimeError, match="read them in that graph"):
        other()


def decoder_and_inputs():
    decoder = kv.TransformerDecoder(vocab_size=11, num_hiddens=8, ffn_num_hiddens=8, num_heads=2, num_blks=2, seed=1)
    inputs = [TOKENS, tf.random.normal((2, 5, 8)), tf.constant([4, 2])]
    return decoder, inputs, decoder(TOKENS, decoder.init_state(*inputs[1:]))[0]


def test_a_functional_model_of_a_decoder_is_saved_and_its_state_says_that_it_kept_nothing(tmp_path):
    decoder, inputs, expected = decoder_and_inputs()
    free = [keras.Input((None,), dtype="int32"), keras.Input((None, 8)), keras.Input((), dtype="int32")]
    logits, state = decoder(free[0], decoder.init_state(*free[1:]))
    model = keras.Model(free, logits)
    assert_near(model(inputs), expected)
    model.save(tmp_path / "model.keras")
    assert_near(keras.models.load_model(tmp_path / "model.keras")(inputs), expected)
    with pytest.raises(ValueError, match=r"state\[2\]\[0\] kept nothing"):
        decoder(free[0], state)


def test_a_decoder_in_a_graph_keeps_a_cache_where_the_length_is_known():
    decoder, (tokens, *source), expected = decoder_and_inputs()

    @tf.function(input_signature=[tf.TensorSpec((2, None), tf.int32)])
    def free(tokens):
        logits, state = decoder(tokens, decoder.init_state(*source))
        with pytest.raises(ValueError, match="kept nothing"):
            decoder(tokens, state)
        return logits

    assert_near(free(tf.cast(tokens, "int32")), expected)
    traces = []

    @tf.function
    def step(token, caches):
        traces.append(1)
        logits, state = decoder(token, [*source, caches])
        return logits, state[2]

    caches, steps = [kv.KVCache.allocate((2, 2, 8, 4)) for _ in range(2)], []
    caches = [cache._replace(length=tf.constant(0)) for cache in caches]
    for i in range(6):
        logits, caches = step(tokens[:, i : i + 1], caches)
        steps.append(logits)
    assert_near(tf.concat(steps, 1), expected, units=1024)
    assert len(traces) == 1


def test_padding_that_keras_masks_is_hidden_from_a_decoders_block():
    block = kv.TransformerDecoderBlock(num_hiddens=8, ffn_num_hiddens=8, num_heads=2, seed=1)
    embedding, source = keras.layers.Embedding(11, 8, mask_zero=True), keras.layers.Embedding(11, 8, mask_zero=True)
    tokens, words = tf.constant([[0, 3, 4], [0, 0, 5]]), tf.constant([[3, 1, 0], [4, 0, 0]])
    X, outputs = embedding(tokens), source(words)
    found, state = block(X, [outputs, None, [None]])
    for i, (first, last) in enumerate(((1, 2), (2, 1))):
        alone, _ = block(embedding(tokens[i : i + 1, first:]), [source(words[i : i + 1, :last]), None, [None]])
        assert_near(found[i, first:], alone[0])
    assert state[2][0] is layers.NOT_KEPT
    assert tf.reduce_all(found._keras_mask == (tokens > 0))


def test_a_model_reads_its_weights_while_it_is_fitted():
    """As d2l's decoders do."""

    @keras.saving.register_keras_serializable("tests")
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.decoder = kv.TransformerDecoder(
                vocab_size=7, num_hiddens=8, ffn_num_hiddens=8, num_heads=2, num_blks=1, dropout=0.1
            )

        def call(self, inputs):
            tokens, outputs = inputs
            logits, _ = self.decoder(tokens, self.decoder.init_state(outputs))
            return logits + 0 * tf.reduce_sum(self.decoder.attention_weights[1][0])

    model = Model()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tokens, outputs = np.ones((4, 3), "int32"), np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
    first, last = model.fit((tokens, outputs), tokens, epochs=2, verbose=0).history["loss"]
    assert last < first


def test_weights_are_computed_only_when_they_are_shown(monkeypatch, tmp_path):
    asked, attention = [], tab.attention

    def watched(*args, **options):
        asked.append(options.get("return_weights", False))
        return attention(*args, **options)

    monkeypatch.setattr(tab, "attention", watched)
    layer, inputs = made("TransformerEncoder")
    model = Wrapped(layer)
    model(inputs)  # Keras traces a model without build()
    asked.clear()
    with tf.GradientTape() as tape:
        loss = kv.reduce_sum(model(inputs, training=True))
    tape.gradient(loss, [x.value for x in layer.trainable_variables])
    model.save_weights(tmp_path / "layer.weights.h5")  # reads every attribute it finds
    copy.deepcopy(layer)
    assert asked == [False, False]
    assert len(layer.attention_weights) == 2
    assert asked == [False, False, True, True]


def test_the_weights_shown_are_detached_and_of_the_time_of_the_call():
    layer, inputs = made("AdditiveAttention", dropout=0.5)
    with tf.GradientTape() as tape:
        tape.watch(inputs[0])
        layer(*inputs, training=True)
        shown = layer.attention_weights
    assert tape.gradient(shown, inputs[0]) is None
    layer.W_q.kernel.assign(2 * layer.W_q.kernel)
    np.testing.assert_array_equal(layer.attention_weights, shown)
    assert_near(kv.reduce_sum(shown, -1), np.ones((2, 4)))  # before dropout


# ---- copies


@every_layer
def test_a_trained_layer_is_copied_with_all_it_holds(name):
    layer, inputs = made(name)
    with tf.GradientTape() as tape:
        loss = kv.reduce_sum(layer(*inputs, training=True) ** 2)
    if layer.trainable_variables:
        step = keras.optimizers.SGD(0.1)
        step.apply(tape.gradient(loss, [x.value for x in layer.trainable_variables]), layer.trainable_variables)
    expected = layer(*inputs)
    copied = copy.deepcopy(layer)
    if hasattr(layer, "attention_weights"):
        for mine, its in zip(layer.attention_weights, copied.attention_weights, strict=True):
            np.testing.assert_array_equal(mine, its)
    for x in layer.trainable_variables:
        x.assign(x + 1)
    np.testing.assert_array_equal(copied(*inputs), expected)


@pytest.mark.parametrize("name", ["AdditiveAttention", "MultiplicativeAttention", "GatedAttention", "TransformerEncoderBlock"])
def test_imported_weights_are_copied_before_the_first_call(name):
    layer, inputs = made(name)
    expected = layer(*inputs)
    fresh = kv.import_weights(getattr(kv, name)(**LAYERS[name][0]), kv.export_weights(layer))
    for _ in range(2):
        fresh = copy.deepcopy(fresh)
    np.testing.assert_array_equal(fresh(*inputs), expected)
    assert not copy.deepcopy(made(name)[0]).weights


# ---- weights by name


def test_a_models_own_layers_have_names():
    tokens = keras.Input((6,), dtype="int32")
    encoder = made("TransformerEncoder")[0]
    encoder.name = "encoder"
    y = keras.layers.LayerNormalization(name="last")(encoder(tokens))
    y = keras.Sequential([keras.layers.Dense(4, name="one"), keras.layers.Dense(3, use_bias=False, name="two")], name="head")(y)
    model = keras.Model(tokens, y)
    exported = kv.export_weights(model)
    own = {f"encoder.{name}" for name in kv.export_weights(encoder)}
    assert set(exported) == own | {"last.gamma", "last.beta", "head.one.W", "head.one.b", "head.two.W"}
    moved = {name: x + 0.25 for name, x in exported.items()}
    kv.import_weights(model, moved)
    np.testing.assert_array_equal(model.get_layer("last").gamma, np.full(8, 1.25, "float32"))
    np.testing.assert_array_equal(model.get_layer("head").get_layer("two").kernel, moved["head.two.W"])


def test_a_model_that_was_never_called_takes_weights():
    class Tagger(keras.Model):
        def __init__(self, seed=None):
            super().__init__()
            self.embed = keras.layers.Embedding(11, 8)
            self.block = kv.TransformerEncoderBlock(**HEADS, ffn_num_hiddens=12, seed=seed)
            self.norm = keras.layers.LayerNormalization()
            self.head = keras.layers.Dense(3)

        def call(self, X):
            return self.head(self.norm(self.block(self.embed(X))))

    model = Tagger(seed=1)
    expected = model(TOKENS)
    exported = kv.export_weights(model)
    assert {"embed", "block.attention.W_q", "norm.gamma", "head.W", "head.b"} <= set(exported)
    np.testing.assert_array_equal(kv.import_weights(Tagger(), exported)(TOKENS), expected)
    with pytest.raises(ValueError, match=r"block\.attention\.W_k"):
        kv.export_weights(Tagger())


def test_a_layer_whose_weights_have_no_name_is_refused():
    model = keras.Sequential([keras.Input((4, 8)), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(3)])
    with pytest.raises(TypeError, match="bn is a BatchNormalization"):
        kv.export_weights(model)


@pytest.mark.parametrize("use_bias", [True, False])
def test_keras_own_multi_head_attention_has_kvattns_names(use_bias):
    layer = keras.layers.MultiHeadAttention(4, 2, value_dim=3, output_shape=7, use_bias=use_bias)
    with pytest.raises(ValueError, match="call it once"):
        kv.export_weights(layer)
    layer(X, X)
    params = {name: x + 0.1 for name, x in kv.export_weights(layer).items()}
    kv.import_weights(layer, params)
    np.testing.assert_allclose(kv.multi_head_attention(X, X, X, params, num_heads=4), layer(X, X), atol=1e-5)


def test_imported_weights_take_the_layers_dtype():
    layer, inputs = made("MultiHeadAttention")
    layer(*inputs)
    half = kv.import_weights(made("MultiHeadAttention", dtype="float16")[0], kv.export_weights(layer))
    assert half.W_q.kernel.dtype == "float16"
    np.testing.assert_allclose(half.W_q.kernel, layer.W_q.kernel, atol=1e-3)


def test_without_a_seed_keras_draws():
    def drawn():
        gated, multiplicative = kv.GatedAttention(), kv.MultiplicativeAttention()
        for layer in (gated, multiplicative):
            layer(*[kv.ones((1, 2, 50))] * 3)
        return kv.numpy(gated.w_g), kv.numpy(multiplicative.W)

    keras.utils.set_random_seed(5)
    first = drawn()
    other = drawn()
    keras.utils.set_random_seed(5)
    for x, y, z in zip(first, drawn(), other, strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.abs(x - z).max() > 0.01
        assert 0.9 * layers.glorot(x.shape) < np.abs(x).max() <= layers.glorot(x.shape)


# ---- options and errors


def test_every_option_of_attention_passes_through_keras():
    mask, bias = RNG.random((4, 4)) < 0.8, RNG.normal(size=(4, 4)).astype("float32")
    positions = np.array([[0, 1], [1, -1], [2, 0], [3, 3]])
    for options in (
        {"mask": mask, "bias": bias, "causal": True, "softcap": 2.0},
        {"mask": mask.tolist(), "scale": 0.3},
        {"positions": positions, "query_offset": np.array([0, 1]), "window": 2},
        {"normalize": kv.sparsemax, "query_offset": 1, "causal": True, "return_weights": True},
    ):
        found = kv.DotProductAttention()(X, X, X, LENS, **options)
        expected = kvattn.attention(X, X, X, valid_lens=LENS, **options)
        assert type(found) is type(expected)
        for x, y in zip(found, expected, strict=True):
            assert_near(x, y)


@pytest.mark.parametrize("segments", [SEGMENTS, SEGMENTS.tolist(), tf.constant(SEGMENTS), (SEGMENTS, tf.constant(SEGMENTS))])
def test_a_function_passes_through_keras_beside_segments(segments):
    same = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tri(4, dtype=bool)
    layer = kv.DotProductAttention()
    expected = kvattn.attention(X, X, X, mask=same, valid_lens=LENS)
    assert_near(layer(X, X, X, LENS, segments=segments, mask=lambda query, key: key <= query), expected)
    assert_near(layer(X, X, X, LENS, segments=segments, causal=True), expected)


def test_a_learned_bias_and_a_layer_as_normaliser():
    class Normaliser(keras.layers.Layer):
        def call(self, scores, where=None):
            return kv.softmax(scores, where)

    layer, bias = kv.DotProductAttention(), keras.Variable(np.eye(4, dtype="float32"))
    for _ in range(2):
        with tf.GradientTape() as tape:
            output = layer(X, X, X, LENS, bias=bias, normalize=Normaliser())
        assert_near(output, kvattn.attention(X, X, X, valid_lens=LENS, bias=np.eye(4, dtype="float32")))
    assert np.abs(tape.gradient(output, bias.value)).max() > 0.01
    shown = layer.attention_weights
    bias.assign(np.ones((4, 4)))
    np.testing.assert_array_equal(layer.attention_weights, shown)


def test_lengths_may_be_lists_and_arrays():
    layer, inputs = made("TransformerEncoderBlock")
    expected = layer(*inputs)
    for lens in ([3, 2], np.array([3, 2]), LENS):
        np.testing.assert_array_equal(layer(X, lens), expected)
        np.testing.assert_array_equal(layer(X, valid_lens=lens), expected)


def test_mistakes_are_kvattns_errors():
    with pytest.raises(TypeError, match="valid_lens has dtype float"):
        kv.DotProductAttention()(X, X, X, [2.5, 1.0])
    with pytest.raises(ValueError, match="must not be negative"):
        kv.DotProductAttention()(X, X, X, [-1, 2])
    with pytest.raises(ValueError, match="no multiple of num_heads, 3"):
        kv.MultiHeadAttention(num_hiddens=8, num_heads=3)
    with pytest.raises(ValueError, match="'relu' or 'gelu', not 'tanh'"):
        kv.PositionWiseFFN(3, 3, activation="tanh")
    with pytest.raises(ValueError, match=r"Unrecognized keyword arguments.*droput"):
        kv.MultiHeadAttention(**HEADS, droput=0.1)


def test_one_head_or_one_query_in_each_entry_of_a_batch():
    """Plain matrix products of these shapes, (batch, 1, n, d) with one (d, m) for all, crash in TensorFlow 2.21's oneDNN."""
    query, key, value = (RNG.normal(size=shape).astype("float32") for shape in ((2, 1, 10, 8), (1, 1, 6, 8), (1, 1, 6, 3)))
    W, w = RNG.normal(size=(8, 8)).astype("float32"), RNG.normal(size=16).astype("float32")
    params = {"W_q": W, "W_k": W, "W_v": W}
    calls = (
        (kvattn.attention, query, key, value),
        (kvattn.multiplicative_score, query, key, W),
        (kvattn.gated_score, query, key, w),
        (kvattn.additive_score, query[:, 0, :1], query[:, 0], W, W, W[0]),
        (partial(kvattn.multi_head_attention, num_heads=2), query, query, query, params),
        (kvattn.self_attention, query, W, W, W),
    )
    for function, *inputs in calls:
        expected = function(*inputs, backend="numpy")
        for _ in range(20):
            np.testing.assert_allclose(function(*inputs, backend="tensorflow"), expected, atol=1e-4)


# ---- the short names


def test_the_short_names_mean_what_they_mean_in_d2l():
    x = kv.arange(6)
    kv.check_shape(kv.reshape(x, (2, 3)), (2, 3))
    kv.check_shape(kv.transpose(kv.reshape(x, (1, 2, 3)), (2, 0, 1)), (3, 1, 2))
    kv.check_shape(kv.batch_matmul(kv.ones((2, 3, 4)), kv.zeros((2, 4, 6))), (2, 3, 6))
    assert kv.astype(x, kv.float32).dtype == kv.float32
    assert float(kv.reduce_sum(kv.eye(3))) == kv.size(kv.ones(3)) == 3
    for shape in (kv.rand((2, 3)), kv.normal((2, 3), 0, 1), kv.randn(2, 3), kv.randn((2, 3))):
        kv.check_shape(shape, (2, 3))
    assert isinstance(kv.numpy(kv.exp(kv.tensor([0.0]))), np.ndarray)
    np.testing.assert_array_equal(kv.concat([kv.tensor([[1]]), kv.tensor([[2]])], 1), [[1, 2]])
    np.testing.assert_array_equal(kv.repeat(kv.expand_dims(kv.tensor([1, 2]), 1), 2, 1), kv.swapaxes([[1, 2], [1, 2]], 0, 1))
    np.testing.assert_array_equal(kv.to(kv.sin(kv.zeros(2)), "cpu"), kv.abs(kv.cos(kv.zeros(2)) - 1))
    assert kv.get_key() != kv.get_key()
    assert kv.softmax([0.0, 0.0]).dtype == tf.float64  # kvattn's functions, on TensorFlow
    assert kv.masked_softmax(kv.rand((2, 2, 4)), kv.tensor([2, 3])).shape == (2, 2, 4)


def test_an_attention_put_into_multi_head_attention_builds_its_weights():
    X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    layer, attention = kv.MultiHeadAttention(num_hiddens=8, num_heads=2, seed=0), kv.AdditiveAttention(num_hiddens=4, seed=0)
    layer.attention = attention
    output = layer(X, X, X)
    q, k, v = (np.swapaxes((X @ part.kernel.numpy()).reshape(2, 5, 2, 4), 1, 2) for part in (layer.W_q, layer.W_k, layer.W_v))
    W_q, W_k, w_v = (part.kernel.numpy() for part in (attention.W_q, attention.W_k, attention.w_v))
    scores = np.tanh((q @ W_q)[..., :, None, :] + (k @ W_k)[..., None, :, :]) @ w_v[:, 0]
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.swapaxes(weights @ v, 1, 2).reshape(2, 5, 8) @ layer.W_o.kernel.numpy()
    np.testing.assert_allclose(output, expected, atol=1e-4)


def test_projections_of_ones_own_are_given_sequences():
    class ByPosition(keras.layers.Layer):
        def call(self, X):
            return X * tf.range(1.0, X.shape[1] + 1)[:, None]  # of (batch, n, features) alone

    X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    plain, layer = (kv.MultiHeadAttention(num_hiddens=8, num_heads=2, seed=0) for _ in range(2))
    for name in ("W_q", "W_k", "W_v", "W_o"):
        old = getattr(layer, name)
        setattr(layer, name, keras.Sequential([ByPosition(), old]) if name != "W_o" else keras.Sequential([old, ByPosition()]))
    places = np.arange(1, 6, dtype="float32")[:, None]
    np.testing.assert_allclose(layer(X, X, X), plain(X * places, X * places, X * places) * places, atol=1e-4)
