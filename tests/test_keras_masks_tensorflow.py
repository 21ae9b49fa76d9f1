"""Keras's masks, of Embedding(mask_zero=True) and Masking, reach the layers, as they reach keras.layers.MultiHeadAttention."""

from functools import partial

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import keras
import tensorflow as tf
from test_layers_tensorflow import LAYERS, made

from kvattn import tensorflow as kv

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, when it saves

RNG = np.random.default_rng(0)
TOKENS = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [1, 0, 2, 0, 3]])  # 0 is padding
MEMORY = np.array([[1, 2, 0, 0], [4, 5, 6, 7], [9, 0, 1, 2]])
OTHER = np.array([[0, 2, 1, 4], [4, 5, 0, 7], [1, 1, 1, 0]])  # of other padding than MEMORY
CAUSAL = np.tri(5, 4, dtype=bool)
CHOSEN = (RNG.random((3, 5, 4)) < 0.7) | (MEMORY != 0)[:, None]
LENS = np.array([4, 3, 1])
WITHIN = np.arange(4) < LENS[:, None, None]
# what Keras's layer is given beside the embedded tokens, and what ours is
OPTIONS = {
    "the masks alone": ({}, {}),
    "causal": ({"use_causal_mask": True}, {"causal": True}),
    "a mask of one's own": ({"attention_mask": CHOSEN}, {"mask": CHOSEN[:, None]}),
    "lengths": ({"attention_mask": np.broadcast_to(WITHIN, (3, 5, 4))}, {"valid_lens": LENS}),
    "lengths of each query": (
        {"attention_mask": np.arange(4) < np.arange(5)[:, None] + np.zeros((3, 1, 1)) + 1},
        {"valid_lens": np.array([[1, 2, 3, 4, 5]] * 3)},
    ),
}


def embedded(seed=0):
    first = keras.initializers.RandomNormal(0, 1, seed)
    return keras.layers.Embedding(11, 8, mask_zero=True, embeddings_initializer=first)


def pair():
    """Keras's layer and ours with the same weights."""
    theirs, ours = keras.layers.MultiHeadAttention(2, 4), kv.MultiHeadAttention(num_hiddens=8, num_heads=2, bias=True)
    theirs(np.ones((1, 2, 8)), np.ones((1, 2, 8)))
    rng = np.random.default_rng(1)
    theirs.set_weights([rng.normal(size=x.shape) / 2 for x in theirs.get_weights()])
    return theirs, kv.import_weights(ours, kv.export_weights(theirs))


class Attends(keras.Model):
    """A user's own model: queries, keys and values from tokens, each by an embedding."""

    def __init__(self, layer, options=None):
        super().__init__()
        self.layer, self.options = layer, options or {}
        self.embeddings = [embedded(seed) for seed in range(3)]

    def call(self, tokens):
        queries, keys, values = (embedding(x) for embedding, x in zip(self.embeddings, tokens, strict=True))
        if isinstance(self.layer, keras.layers.MultiHeadAttention):
            return self.layer(queries, values, keys, **self.options)
        return self.layer(queries, keys, values, **self.options)


def functional(layer, options):
    symbols = [keras.Input((n,), dtype="int32") for n in (5, 4, 4)]
    queries, keys, values = (embedded(seed)(x) for seed, x in enumerate(symbols))
    return keras.Model(symbols, layer(queries, keys, values, **options))


WAYS = {
    "eager": Attends,
    "subclassed": lambda layer, options: partial(Attends(layer, options).predict, verbose=0),
    "graph": lambda layer, options: tf.function(Attends(layer, options)),
    "functional": lambda layer, options: partial(functional(layer, options).predict, verbose=0),
    "compiled": lambda layer, options: tf.function(functional(layer, options), jit_compile=True),
}
INPUTS = [TOKENS, MEMORY, OTHER]


@pytest.mark.parametrize(
    ("way", "options"), [(way, x) for way in WAYS for x in OPTIONS if way in ("eager", "functional") or x == "lengths"]
)
def test_masks_hide_what_they_hide_from_kerass_own_layer(way, options):
    (for_theirs, for_ours), (theirs, ours) = OPTIONS[options], pair()
    expected = np.asarray(Attends(theirs, for_theirs)(INPUTS))
    found = np.asarray(WAYS[way](ours, for_ours)(INPUTS))
    seen = ((MEMORY != 0) & (OTHER != 0))[:, None] & for_theirs.get("attention_mask", np.True_)
    seen = (seen & np.tri(5, 4, dtype=bool) if "use_causal_mask" in for_theirs else seen) & (TOKENS != 0)[..., None]
    rows = np.broadcast_to(seen, (3, 5, 4)).any(axis=-1)
    assert 5 < rows.sum() < 15
    np.testing.assert_allclose(found[rows], expected[rows], atol=1e-5)
    # where a query sees nothing, Keras averages over all keys, padding too; here the attention is zeros
    assert_near(found[~rows], np.broadcast_to(ours.W_o.bias, found[~rows].shape))


def test_a_saved_model_keeps_its_masks(tmp_path):
    model = functional(pair()[1], {"causal": True})
    expected = model(INPUTS)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(INPUTS), expected)
    model.export(str(tmp_path / "served"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    for tokens in (TOKENS, np.where(TOKENS == 8, 0, TOKENS)):  # the mask is of the tokens given, not of an example's
        inputs = [tokens, MEMORY, OTHER]
        found = served.serve([tf.constant(x, tf.int32) for x in inputs])
        assert_near(found, model(inputs))


SCORED = ("DotProductAttention", "AdditiveAttention", "MultiplicativeAttention", "GatedAttention", "MultiHeadAttention")


@pytest.mark.parametrize("name", SCORED)
def test_a_mask_of_padding_at_the_end_is_lengths(name):
    layer, _ = made(name)
    tokens, lens = np.array([[3, 1, 4, 1], [5, 9, 0, 0]]), np.array([[4] * 4, [2, 2, 0, 0]])
    x = embedded()(tokens)
    found, shown = layer(x, x, x), getattr(layer, "attention", layer).attention_weights
    x = tf.identity(x)  # without its mask
    np.testing.assert_array_equal(found, layer(x, x, x, lens))
    np.testing.assert_array_equal(shown, getattr(layer, "attention", layer).attention_weights)
    assert not np.asarray(shown)[-1, :, 2:].any()


class Averaged(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, tokens):
        for part in self.parts:
            tokens = part(tokens)
        return tokens


def linked(parts):
    inputs = output = keras.Input((4,), dtype="int32")
    for part in parts:
        output = part(output)
    return keras.Model(inputs, output)


PADDED, ENDS = np.array([[3, 1, 4, 1], [5, 9, 0, 0]]), np.array([4, 2])


@pytest.mark.parametrize("build", [keras.Sequential, linked, Averaged])
def test_every_part_of_a_model_leaves_padding_out(build):
    block = kv.TransformerEncoderBlock(num_hiddens=8, ffn_num_hiddens=12, num_heads=2, seed=1)
    parts = [embedded(), kv.PositionalEncoding(8), block, kv.PositionWiseFFN(5, 8, seed=2)]
    X = parts[3](block(parts[1](tf.identity(parts[0](PADDED))), ENDS))
    expected = [X[0].numpy().mean(0), X[1, :2].numpy().mean(0)]
    model = build([*parts, keras.layers.GlobalAveragePooling1D()])  # which leaves out what its mask does
    np.testing.assert_allclose(model.predict(PADDED, verbose=0), expected, atol=1e-5)


def test_a_mask_of_the_tokens_reaches_the_blocks_of_an_encoder():
    layer, _ = made("TransformerEncoder")
    tokens = tf.constant(PADDED)
    expected = layer(tokens, ENDS)
    tokens._keras_mask = tokens != 0
    found = layer(tokens)
    assert_near(found[0], expected[0])
    assert_near(found[1, :2], expected[1, :2])
    np.testing.assert_array_equal(found._keras_mask, PADDED != 0)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_passes_on_the_mask_of_its_first_input(name):
    layer, inputs = made(name)
    first = tf.identity(inputs[0])
    first._keras_mask = tf.ones(first.shape[:2], "bool")
    np.testing.assert_array_equal(layer(first, *inputs[1:])._keras_mask, first._keras_mask)
    assert not hasattr(layer(*inputs), "_keras_mask")


def test_padding_that_is_no_number_reaches_nothing():
    layer, embedding = made("MultiHeadAttention")[0], embedded()
    embedding.build()
    embedding.embeddings.assign(tf.tensor_scatter_nd_update(embedding.embeddings.value, [[0]], [[np.nan] * 8]))
    with tf.GradientTape() as tape:
        X = embedding(PADDED)
        output = layer(X, X, X)
        loss = kv.reduce_sum(tf.where(X._keras_mask[..., None], output, 0) ** 2)
    assert np.isfinite(output).all()
    by_embedding = tf.convert_to_tensor(tape.gradient(loss, embedding.embeddings.value)).numpy()
    assert np.isfinite(by_embedding).all()
    assert not by_embedding[0].any()


def test_masks_are_checked_as_attentions_own_are():
    layer, X = kv.DotProductAttention(), embedded()(PADDED)
    with pytest.raises(TypeError, match="mask has dtype float"):
        layer(X, X, X, mask=tf.ones((4, 4)))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\)"):
        layer(X, X, X, mask=tf.ones((3, 4), "bool"))
    with pytest.raises(TypeError, match="valid_lens has dtype float"):
        layer(X, X, X, [2.5, 1.0])
    with pytest.raises(ValueError, match=r"valid_lens has shape \(3,\)"):
        layer(X, X, X, [1, 2, 3])


def test_a_cache_asks_for_the_mask_of_the_keys_it_keeps():
    layer = kv.MultiHeadAttention(num_hiddens=8, num_heads=2, seed=3)
    embedding, tokens = embedded(), np.array([[0, 0, 4, 1], [5, 9, 2, 6]])
    X = embedding(tokens)
    whole = layer(X, X, X, causal=True)
    with pytest.raises(ValueError, match="which a cache does not keep"):
        layer(X, X, X, causal=True, cache=kv.KVCache())
    steps, cache = [], kv.KVCache()
    for i, j in ((0, 1), (1, 3), (3, 4)):
        X = embedding(tokens[:, i:j])
        step, cache = layer(X, X, X, causal=True, cache=cache, mask=(tokens[:, :j] != 0)[:, None, None])
        steps.append(step)
    np.testing.assert_allclose(kv.concat(steps, 1), whole, atol=1e-5)
