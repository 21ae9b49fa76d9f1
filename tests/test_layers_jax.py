"""What is JAX's own in the layers: d2l's calls, variables apart from modules, jit, keys, dtypes, flax's composition."""

import copy
import functools
import inspect
import random
import re
from functools import partial

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

if "jax" not in chosen():
    pytest.skip("this run is without JAX", allow_module_level=True)

import flax
import jax
import jax.numpy as jnp
import optax
from adapters import reference
from flax import linen as nn
from flax.training.train_state import TrainState

from kvattn import jax as kv
from kvattn import layers
from kvattn.backends import jax as tab

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 4, 8))
LENS = jnp.array([3, 2])
TOKENS = jax.random.randint(KEY, (2, 6), 0, 11)
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
    "TransformerEncoderBlock": ({**HEADS, "ffn_num_hiddens": 12}, (X, LENS)),
    "TransformerEncoder": (ENCODER, (TOKENS, LENS)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@functools.cache
def made(name):
    """(module, its variables, its inputs)"""
    config, inputs = LAYERS[name]
    module = getattr(kv, name)(**config)
    return module, jax.jit(module.init)(KEY, *inputs), inputs


def first(results):
    return results[0] if isinstance(results, tuple) else results


def everything(variables, inputs):
    """{layer's name: its output}, to be compiled at once."""
    return {name: first(made(name)[0].apply(variables[name], *inputs[name])) for name in inputs}


def given(dtype="float32", variables="float32", without=()):
    """(variables, inputs) of every layer by its name."""
    names = [name for name in LAYERS if name not in without]
    return {name: cast(made(name)[1], variables) for name in names}, {name: cast(LAYERS[name][1], dtype) for name in names}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.fixture(scope="module")
def compiled():
    """Every layer's output, in float32."""
    return jax.jit(everything)(*given())


# ---- d2l's calls


ATTEND = "queries, keys, values, valid_lens, training"
CALLS = {
    **dict.fromkeys(("DotProductAttention", "AdditiveAttention", "MultiHeadAttention"), ATTEND),
    "PositionalEncoding": "X, training",
    "AddNorm": "X, Y, training", "PositionWiseFFN": "X", "TransformerEncoderBlock": "X, valid_lens, training",
    "TransformerEncoder": "X, valid_lens, training",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_d2ls_by_position(name):
    kinds = inspect.signature(getattr(kv, name).__call__).parameters.values()
    assert [x.name for x in kinds if x.kind is x.POSITIONAL_OR_KEYWORD] == ["self", *CALLS[name].split(", ")]


def test_the_cells_of_the_scoring_chapter():
    queries, keys, values = (jax.random.normal(kv.get_key(), shape) for shape in ((2, 1, 2), (2, 10, 2), (2, 10, 4)))
    (output, weights), variables = kv.DotProductAttention(dropout=0.5).init_with_output(
        kv.get_key(), queries, keys, values, kv.tensor([2, 6])
    )
    kv.check_shape(output, (2, 1, 4))
    kv.check_shape(kv.reshape(weights, (1, 1, 2, 10)), (1, 1, 2, 10))
    assert variables == {}
    assert (weights[0, :, 2:] == 0).all()
    assert (weights[1, :, 6:] == 0).all()
    queries = jax.random.normal(kv.get_key(), (2, 1, 20))
    (output, weights), variables = kv.AdditiveAttention(num_hiddens=8, dropout=0.1).init_with_output(
        kv.get_key(), queries, keys, values, kv.tensor([2, 6])
    )
    kv.check_shape(weights, (2, 1, 10))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "W_k": {"kernel": (2, 8)}, "W_q": {"kernel": (20, 8)}, "w_v": {"kernel": (8, 1)},
    }  # fmt: skip


def test_the_cells_of_the_multi_head_chapter():
    X, Y = kv.ones((2, 4, 100)), kv.ones((2, 6, 100))
    attention = kv.MultiHeadAttention(100, 5, 0.5)
    (output, weights), variables = jax.eval_shape(
        lambda: attention.init_with_output(kv.get_key(), X, Y, Y, kv.tensor([3, 2]), training=False)
    )
    kv.check_shape(output, (2, 4, 100))
    kv.check_shape(weights, (10, 4, 6))  # batch * heads
    assert jax.tree.map(jnp.shape, variables["params"]) == {f"W_{c}": {"kernel": (100, 100)} for c in "qkvo"}


def test_the_cells_of_the_positional_encoding():
    encoding = kv.PositionalEncoding(32, 0)
    variables = encoding.init(kv.get_key(), kv.zeros((1, 60, 32)))
    X, inside = encoding.apply(variables, kv.zeros((1, 60, 32)), mutable="intermediates")
    P = inside["intermediates"]["P"][0]
    kv.check_shape(P, (1, 1000, 32))
    np.testing.assert_array_equal(P[:, : X.shape[1], :], X)
    np.testing.assert_array_equal(P, encoding.P)


def test_the_cells_of_the_transformer_chapter():
    output, _ = kv.AddNorm(0.5).init_with_output(kv.get_key(), kv.ones((2, 3, 4)), kv.ones((2, 3, 4)))
    kv.check_shape(output, (2, 3, 4))
    kv.check_shape(kv.PositionWiseFFN(4, 8).init_with_output(kv.get_key(), jnp.ones((2, 3, 4)))[0][0], (3, 8))
    X, block = jnp.ones((2, 100, 24)), kv.TransformerEncoderBlock(24, 48, 8, 0.5)
    (output, weights), _ = jax.eval_shape(lambda: block.init_with_output(kv.get_key(), X, LENS, training=False))
    kv.check_shape(output, X.shape)
    kv.check_shape(weights, (16, 100, 100))
    encoder, tokens = kv.TransformerEncoder(200, 24, 48, 8, 2, 0.5), jnp.ones((2, 100), dtype=jnp.int32)
    output, variables = jax.eval_shape(lambda: encoder.init_with_output(kv.get_key(), tokens, LENS))
    kv.check_shape(output, (2, 100, 24))
    assert sorted(variables["params"]) == ["blks_0", "blks_1", "embedding"]
    _, inside = jax.eval_shape(lambda variables: encoder.apply(variables, tokens, LENS, mutable="intermediates"), variables)
    (weights,) = inside["intermediates"]["enc_attention_weights"]
    assert [x.shape for x in weights] == [(16, 100, 100)] * 2


def test_weights_asked_for_by_name_are_kvattns():
    module, variables, inputs = made("MultiHeadAttention")
    output, flat = module.apply(variables, *inputs)
    again, weights = module.apply(variables, *inputs, return_weights=True)
    assert_near(weights.reshape(flat.shape), flat)
    assert weights.shape == (2, 2, 4, 4)
    alone = module.apply(variables, *inputs, return_weights=False)
    for other in (again, alone):
        assert_near(other, output)


def test_caches_follow_the_weights():
    module, variables, _ = made("MultiHeadAttention")
    _, weights, cache = module.apply(variables, X, X, X, cache=kv.KVCache())
    assert (weights.shape, cache.length) == ((4, 4, 4), 4)
    module, variables, _ = made("TransformerEncoder")
    Y, weights, caches = jax.eval_shape(lambda: module.apply(variables, TOKENS, cache=[]))
    assert (Y.shape, weights[1].shape, [x.key.shape for x in caches]) == ((2, 6, 8), (4, 6, 6), [(2, 2, 6, 4)] * 2)
    assert len(jax.eval_shape(lambda: module.apply(variables, TOKENS, cache=[], return_weights=False))) == 2


def test_every_keyword_of_the_other_frameworks_is_a_field():
    kv.MultiHeadAttention(num_hiddens=8, num_heads=4, dropout=0.1, use_bias=True, num_kv_heads=2, seed=1)
    kv.TransformerEncoder(
        vocab_size=11, num_hiddens=8, ffn_num_hiddens=12, num_heads=2, num_blks=2, dropout=0.1, use_bias=True, num_kv_heads=1,
        activation="gelu", max_len=10, seed=1,
    )  # fmt: skip
    kv.AddNorm(norm_shape=(4, 8), dropout=0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: kv.MultiHeadAttention(10, 4), "num_hiddens is 10, no multiple of num_heads, 4"),
        (lambda: kv.TransformerEncoder(11, 8, 12, 4, 2, num_kv_heads=3), "num_kv_heads is 3, which does not divide"),
        (lambda: kv.TransformerEncoderBlock(8, 12, 4, activation="tanh"), "activation must be 'relu' or 'gelu'"),
        (lambda: kv.PositionWiseFFN(8, 8, activation="tanh"), "activation must be 'relu' or 'gelu'"),
        (lambda: kv.AddNorm(8), r"dropout must be in \[0, 1\), not 8"),  # PyTorch's norm_shape
        (lambda: kv.AddNorm(norm_shape=7).init(KEY, X, X), r"X has shape \(2, 4, 8\); expected \(2, 4, 7\), as norm_shape"),
        (lambda: kv.TransformerEncoder(**ENCODER).init(KEY, TOKENS, cache=[kv.KVCache()]), "cache holds 1 blocks'"),
        (lambda: kv.MultiHeadAttention(8, 2)(X, X, X), r"keeps no weights: variables = layer.init\("),
        (lambda: kv.PositionalEncoding(8)(X), r"PositionalEncoding keeps no weights: .* layer.apply\(variables, \*inputs\)"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_norm_over_two_axes():
    module = kv.AddNorm(norm_shape=(4, 8))
    found = module.apply(module.init(KEY, X, X), X, X)
    np.testing.assert_allclose(np.var(found, axis=(1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize("inputs", [1e-3 * X, X + 1000])
def test_the_norm_has_its_epsilon_and_does_not_cancel(inputs):
    module = kv.AddNorm()
    expected = reference.norm({"gamma": 1.0, "beta": 0.0}, np.asarray(inputs, "float64"))
    # a mean of 8 numbers is off by a few eps of the largest, which is divided by the deviation; cancelling loses thousands
    units = np.abs(inputs).max() / np.sqrt(np.var(inputs, axis=-1).min() + layers.EPSILON)
    assert_near(module.apply(module.init(KEY, X, X), inputs, 0 * X), expected, units=16 * max(1, float(units)))


# ---- training and keys


def test_dropout_draws_from_the_key_of_the_call_and_leaves_the_weights_alone(compiled):
    _, variables, inputs = made("MultiHeadAttention")
    module = kv.MultiHeadAttention(**HEADS, bias=True, dropout=0.5)
    call = jax.jit(lambda key: module.apply(variables, *inputs, training=True, rngs={"dropout": key}))
    (one, weights), (same, _), (other, unchanged) = (call(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert jnp.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(weights, unchanged)
    assert_near(weights.sum(axis=-1), 1)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        module.apply(variables, *inputs, training=True)
    assert_near(module.apply(variables, *inputs)[0], compiled["MultiHeadAttention"])  # no key needed


def test_optax_trains_an_encoder_from_its_seed():
    module = kv.TransformerEncoder(**ENCODER | {"num_blks": 1}, dropout=0.1, seed=5)
    inputs = (TOKENS, LENS)
    variables = jax.jit(module.init)(KEY, *inputs)
    np.testing.assert_array_equal(variables["params"]["embedding"]["embedding"], layers.initial(5, "embedding", (11, 8)))
    state = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=optax.adam(1e-2))
    state = state.replace(step=jnp.asarray(0))

    @jax.jit
    def step(state, key):
        def loss(params):
            Y = state.apply_fn({"params": params}, *inputs, training=True, rngs={"dropout": key})
            return ((Y - TOKENS[..., None] / 11) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return value, state.apply_gradients(grads=grads)

    losses = []
    for key in jax.random.split(KEY, 100):
        loss, state = step(state, key)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    assert step._cache_size() == 1


def test_modules_and_variables_can_be_copied_after_a_gradient():
    module, variables, inputs = made("AdditiveAttention")
    jax.grad(lambda variables: module.apply(variables, *inputs)[0].sum())(variables)
    assert copy.deepcopy(module) == module
    jax.tree.map(np.testing.assert_array_equal, copy.deepcopy(variables), variables)


# ---- compilation


@every_layer
def test_jit_gives_the_eager_answer(name, compiled):
    module, variables, inputs = made(name)
    np.testing.assert_allclose(compiled[name], first(module.apply(variables, *inputs)), atol=1e-5)


def costs(function, *args):
    """(flops, exponentials) of the compiled program."""
    program = jax.jit(function).lower(*args).compile()
    return program.cost_analysis()["flops"], program.as_text().count(" exponential(")


@pytest.mark.parametrize("name", ["AdditiveAttention", "TransformerEncoderBlock"])
@pytest.mark.parametrize("transform", [lambda f: f, lambda f: jax.grad(f, argnums=(0, 1))], ids=["forward", "gradient"])
def test_weights_that_nobody_reads_cost_nothing_in_a_compiled_program(name, transform):
    module, variables, inputs = made(name)

    def loss(of, variables, X, **options):
        return of(module.apply(variables, *(X if x is inputs[0] else x for x in inputs), **options))

    unread = costs(transform(partial(loss, lambda results: (results[0] ** 2).sum())), variables, X)
    absent = costs(transform(partial(loss, lambda Y: (Y**2).sum(), return_weights=False)), variables, X)
    read = costs(transform(partial(loss, lambda results: sum((x**2).sum() for x in results))), variables, X)
    assert unread == absent
    assert read > absent


def test_the_encoder_computes_weights_only_where_they_are_sown_or_asked_for(monkeypatch):
    plain, asked = tab.attention, []

    def counting(*args, **options):
        asked.append(options["return_weights"])
        return plain(*args, **options)

    def counted(name, **options):
        module, variables, inputs = made(name)
        asked.clear()
        jax.eval_shape(lambda: module.apply(variables, *inputs, **options))
        return list(asked)

    monkeypatch.setattr(tab, "attention", counting)
    assert counted("TransformerEncoder") == [False] * 2
    assert counted("TransformerEncoder", return_weights=False) == [False] * 2
    assert counted("TransformerEncoder", return_weights=False, cache=[]) == [False] * 2
    assert counted("TransformerEncoder", mutable="intermediates") == [False, True] * 2  # the output by itself, as ever
    assert counted("TransformerEncoderBlock") == [False, True]
    assert counted("TransformerEncoderBlock", return_weights=False) == [False]


def test_weights_have_gradients():
    module, variables, inputs = made("MultiHeadAttention")
    grads = jax.jit(jax.grad(lambda variables: (module.apply(variables, *inputs)[1] ** 2).sum()))(variables)["params"]
    assert jnp.abs(grads["W_q"]["kernel"]).max() > 1e-3
    assert jnp.abs(grads["W_v"]["kernel"]).max() == 0


def test_one_program_decodes_every_step():
    module, variables, _ = made("TransformerEncoder")
    step = jax.jit(lambda tokens, caches: module.apply(variables, tokens, cache=caches, causal=True))
    caches = jax.tree.map(jnp.asarray, [kv.KVCache.allocate((2, 2, 10, 4))] * 2)
    steps = []
    for i in range(6):
        Y, _, caches = step(TOKENS[:, i : i + 1], caches)
        steps.append(Y)
    whole = jax.jit(lambda: module.apply(variables, TOKENS, causal=True))()
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=1e-5)
    assert step._cache_size() == 1


def test_one_program_serves_every_step_of_a_decoder_with_room():
    decoder, programs = kv.TransformerDecoder(**ENCODER, seed=1), []
    variables = decoder.init(KEY, TOKENS, decoder.init_state(X, LENS))
    whole, state = decoder.apply(variables, TOKENS, decoder.init_state(X, LENS))

    @jax.jit
    def step(token, state):
        programs.append(1)
        (logits, state), sown = decoder.apply(variables, token, state, mutable="intermediates")
        return logits, state, sown["intermediates"]["dec_attention_weights"][0]

    state[2], steps = [kv.KVCache.allocate((2, 2, 8, 4))._replace(length=jnp.array(0)) for _ in range(2)], []
    for i in range(6):
        logits, state, weights = step(TOKENS[:, i : i + 1], state)
        steps.append(logits)
    assert_near(jnp.concatenate(steps, 1), whole, units=1024)
    assert len(programs) == 1
    assert [[x.shape for x in each] for each in weights] == [[(4, 1, 8)] * 2, [(4, 1, 4)] * 2]
    same, _, again = decoder.apply(variables, TOKENS, decoder.init_state(X, LENS), return_weights=True)
    assert_near(same, whole)
    assert [x.shape for x in again[0]] == [(2, 2, 6, 6)] * 2


def test_a_decoders_block_returns_its_weights_as_d2ls_does():
    block = kv.TransformerDecoderBlock(8, 12, 2, 0.5, 0)
    (Y, state, own, other), variables = block.init_with_output(KEY, X, [X[:, :3], LENS, [None]])
    assert (Y.shape, own.shape, other.shape) == (X.shape, (4, 4, 4), (4, 4, 3))
    assert len(block.apply(variables, X, [X[:, :3], LENS, [None]], return_weights=False)) == 2
    assert state[2][0].length == 4


# ---- dtypes


@pytest.mark.parametrize(
    ("dtype", "variables", "without"),
    [
        ("float16", "float16", ()),
        ("bfloat16", "bfloat16", ()),
        ("bfloat16", "float32", ("TransformerEncoder",)),  # tokens have no precision: its weights give it
    ],
)
def test_half_precision_comes_back_as_it_went_in(compiled, dtype, variables, without):
    found = jax.jit(everything)(*given(dtype, variables, without))
    for name, x in found.items():
        assert x.dtype == dtype, name
        np.testing.assert_allclose(x.astype("float32"), compiled[name], atol=20 * float(jnp.finfo(dtype).eps), err_msg=name)


@pytest.mark.parametrize("name", ["AdditiveAttention", "MultiplicativeAttention", "GatedAttention", "PositionalEncoding"])
def test_float64_stays_float64_where_jax_has_it_off(name, compiled):
    assert not jax.config.jax_enable_x64
    module, variables, inputs = made(name)
    found = first(module.apply(variables, *(np.asarray(x, "float64") if x.dtype == "float32" else x for x in inputs)))
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, compiled[name], atol=1e-5)


def test_float64_is_computed_in_float64():
    X = np.random.default_rng(0).normal(size=(2, 4, 8))
    module, variables, _ = made("TransformerEncoderBlock")
    found = module.apply(variables, X, LENS, return_weights=False)
    w = {name: x.astype("float64") for name, x in kv.export_weights(variables).items()}
    np.testing.assert_allclose(found, reference.block(w, X, np.asarray(LENS), num_heads=2), atol=1e-13)


def test_float64_under_a_transformation_needs_jax_to_have_it():
    module, variables, _ = made("MultiHeadAttention")
    X = np.ones((2, 4, 8))
    with pytest.raises(TypeError, match="jax_enable_x64"):
        jax.grad(lambda variables: module.apply(variables, X, X, X)[0].sum())(variables)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "PositionWiseFFN", "AddNorm", "PositionalEncoding", "GatedAttention"])
def test_integers_are_refused(name):
    config, inputs = LAYERS[name]
    with pytest.raises(TypeError, match="expected floating point"):
        getattr(kv, name)(**config).init(KEY, *(jnp.ones(x.shape, int) for x in inputs))


# ---- weights and flax's own ways


@every_layer
def test_a_module_without_variables_takes_weights(name):
    module, variables, _ = made(name)
    loaded = kv.import_weights(module, kv.export_weights(variables))
    jax.tree.map(np.testing.assert_array_equal, loaded, {"params": variables.get("params", {})})


class Compact(nn.Module):
    """A model of a user, whose parts are made in its call."""

    @nn.compact
    def __call__(self, tokens, valid_lens=None, training=False):
        X = nn.Embed(11, 8, name="words")(tokens)
        X = nn.LayerNorm(name="ln1")(X)
        X, _ = kv.TransformerEncoderBlock(**HEADS, ffn_num_hiddens=12, name="block")(X, valid_lens, training)
        return nn.Dense(3, name="head")(X)


class Declared(nn.Module):
    """The same model, whose parts are made in its setup."""

    def setup(self):
        self.words, self.ln1, self.head = nn.Embed(11, 8), nn.LayerNorm(), nn.Dense(3)
        self.block = kv.TransformerEncoderBlock(**HEADS, ffn_num_hiddens=12)

    def __call__(self, tokens, valid_lens=None, training=False):
        return self.head(self.block(self.ln1(self.words(tokens)), valid_lens, training)[0])


def test_a_users_model_exports_its_own_dense_norm_and_embedding_layers():
    variables = jax.jit(Compact().init)(KEY, TOKENS)
    weights = kv.export_weights(variables)
    outside = {name: x.shape for name, x in weights.items() if not name.startswith("block.")}
    assert outside == {"words": (11, 8), "ln1.gamma": (8,), "ln1.beta": (8,), "head.W": (8, 3), "head.b": (3,)}
    moved = kv.import_weights(variables, {name: x + 0.5 for name, x in weights.items()})
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old + 0.5), moved, variables)
    jax.tree.map(np.testing.assert_array_equal, kv.import_weights(Declared(), kv.export_weights(moved)), moved)
    shapes = jax.eval_shape(Declared().init, KEY, TOKENS)
    assert jax.tree.structure(shapes) == jax.tree.structure(moved)


def test_weights_keep_the_dtypes_of_the_variables_they_replace():
    _, variables, _ = made("TransformerEncoder")
    loaded = kv.import_weights(cast(variables, "bfloat16"), kv.export_weights(variables))
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {"bfloat16"}


def test_import_changes_nothing_that_was_there():
    _, variables, _ = made("TransformerEncoder")
    before = kv.export_weights(variables)
    kv.import_weights(variables, {name: x + 1 for name, x in before.items()})
    for name, x in kv.export_weights(variables).items():
        np.testing.assert_array_equal(x, before[name])


@pytest.mark.parametrize("bias", [True, False])
def test_flaxs_own_multi_head_attention_lives_on_in_ours(bias):
    theirs = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=12, out_features=10, use_bias=bias)
    inputs = (X, X[:, :3] + 1, X[:, :3] - 1)
    variables = jax.jit(theirs.init)(KEY, *inputs)
    weights = {name: x + 0.25 for name, x in kv.export_weights(variables).items()}
    expected = jax.jit(theirs.apply)(kv.import_weights(variables, weights), *inputs)
    np.testing.assert_allclose(kv.multi_head_attention(*inputs, weights, num_heads=4), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("strange", "error", "message"),
    [
        (lambda: kv.AddNorm(), ValueError, "keeps no weights: give its variables"),
        (lambda: kv.DotProductAttention(), ValueError, "keeps no weights: give its variables"),
        (lambda: {"W_q": {"kernel": jnp.ones((2, 2))}}, TypeError, "variables hold W_q"),
        (lambda: nn.BatchNorm(use_running_average=True).init(KEY, X), TypeError, "variables hold batch_stats"),
        (lambda: nn.Conv(3, (2,)).init(KEY, X), TypeError, r"kernel \(2, 8, 3\) is no dense"),
        (lambda: {"params": {"gamma": {"embedding": X}, "ln": {"scale": X}}}, ValueError, "would both be called gamma"),
    ],
)
def test_what_has_no_name_outside_jax_is_refused(strange, error, message):
    with pytest.raises(error, match=message):
        kv.export_weights(strange())


def test_a_compact_model_without_variables_is_refused():
    with pytest.raises(TypeError, match="Compact makes its weights in its first call"):
        kv.import_weights(Compact(), {})


def test_remat_changes_nothing(compiled):
    _, variables, inputs = made("TransformerEncoderBlock")
    again = nn.remat(kv.TransformerEncoderBlock, static_argnums=(3,))(**LAYERS["TransformerEncoderBlock"][0])
    found, _ = jax.jit(lambda variables: again.apply(variables, *inputs, False))(variables)
    assert_near(found, compiled["TransformerEncoderBlock"])


def test_scan_stacks_blocks():
    config, inputs = LAYERS["TransformerEncoderBlock"]
    stacked = nn.scan(
        kv.TransformerEncoderBlock, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3
    )(**config)
    variables = jax.jit(stacked.init)(KEY, *inputs)
    Y, weights = jax.jit(stacked.apply)(variables, *inputs)
    expected, block = X, jax.jit(made("TransformerEncoderBlock")[0].apply)
    for i in range(3):
        expected, _ = block(jax.tree.map(lambda x, i=i: x[i], variables), expected, LENS)
    np.testing.assert_allclose(Y, expected, atol=1e-5)
    assert weights.shape == (3, 4, 4, 4)
    with pytest.raises(TypeError, match="no name outside JAX"):
        kv.export_weights(variables)


# ---- the namespace


def test_the_names_that_lessons_use():
    names = """abs arange argmax astype batch_matmul check_shape concat cos cosh exp expand_dims eye float32 get_key int32 int64
        linspace log matmul meshgrid normal numpy ones ones_like plt plot rand randn reduce_mean reduce_sum repeat reshape
        show_heatmaps sigmoid sin sinh size stack swapaxes tanh tensor to transpose use_svg_display zeros zeros_like"""
    for name in names.split():
        assert callable(getattr(kv, name)) or name == "plt"
    kv.check_shape(kv.batch_matmul(kv.ones((2, 3, 4)), kv.ones((2, 4, 6))), (2, 3, 6))
    assert kv.size(kv.astype(kv.reshape(kv.arange(6), (2, 3)), kv.float32)) == 6
    assert isinstance(kv.numpy(kv.transpose(kv.eye(3))), np.ndarray)
    assert kv.reduce_sum(kv.ones((2, 3)), 0).tolist() == [2, 2, 2]
    assert kv.concat([kv.ones((1, 2)), kv.ones((1, 2))], 1).shape == (1, 4)
    with pytest.raises(AttributeError, match="nonsense"):
        kv.nonsense  # noqa: B018


def test_draws_follow_pythons_generator():
    drawn = []
    for _ in range(2):
        random.seed(4)
        drawn.append([kv.normal(5, 0.1, (2, 1, 3)), kv.rand(4), kv.randn(2, 3), kv.rand((4, 1)), kv.get_key()])
    for one, same in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, same)
    normal, uniform, standard, column, _ = drawn[0]
    assert [x.shape for x in drawn[0][:4]] == [(2, 1, 3), (4,), (2, 3), (4, 1)]
    assert abs(float(normal.mean()) - 5) < 0.5
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert (uniform != column[:, 0]).all()
    assert standard.min() < 0


@pytest.mark.parametrize("base", ["Encoder", "Decoder", "AttentionDecoder"])
def test_a_base_of_the_scaffold_without_a_call_says_what_lacks(base):
    """As `EncoderDecoder` calls them: Python would say that they are not callable."""
    from kvattn.scaffold import jax as scaffold

    class Own(getattr(scaffold, base)):
        pass

    class Around(nn.Module):
        part: nn.Module

        def __call__(self, x):
            return self.part(x, None)

    with pytest.raises(NotImplementedError, match=r"^Own has no __call__"):
        Around(Own()).init(KEY, X)


def test_products_with_weights_have_two_axes():
    """Of one of three, turned about for the gradient by weights, XLA's CPU makes one that takes half as long again."""
    layer, weight = kv.MultiHeadAttention(8, 2, bias=True), jnp.ones((8, 8))
    variables = layer.init(KEY, X, X, X)

    def attend(variables, weight):
        found = kv.multi_head_attention(X, X, X, {"W_q": weight, "W_k": weight, "W_v": weight}, num_heads=2)
        return (found + layer.apply(variables, X, X, X, return_weights=False)).sum()

    text = jax.jit(jax.grad(attend, argnums=(0, 1))).lower(variables, weight).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "batching_dims" not in line]
    assert len(products) >= 10  # the layer's four and their gradients; the function's share one program
    assert not [line for line in products if len(re.findall(r"tensor<\d+x\d+xf32>", line)) != 3]
