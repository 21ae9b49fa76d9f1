"""The pattern of dropout that an int rng draws, beyond what the conformance suite asks: vectors, statistics, compiled steps."""

import importlib

import numpy as np
import pytest

import kvattn
from kvattn import layers
from kvattn.conformance import oracle

# published: SplitMix64 of the seed 1234567 at Rosetta Code, and of 0 as seeds of xoshiro generators
VECTORS = {
    1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821),
    0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC),
}
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("seed", VECTORS)
def test_the_generator_gives_the_published_numbers(seed):
    assert tuple(oracle.splitmix64(seed, number) for number in range(len(VECTORS[seed]))) == VECTORS[seed]


def pattern(backend, seed, rate=0.5, lead=(), n=64, m=80, **options):
    """Which pairs are kept: 1 and 0, through equal weights and values that tell the keys apart."""
    tab = kvattn.dispatch.load(backend)
    x, key = (tab.asarray(np.zeros((*lead, size, 1)), dtype="float32") for size in (n, m))
    values = tab.asarray(np.broadcast_to(np.eye(m), (*lead, m, m)), dtype="float32")
    output = kvattn.attention(x, key, values, dropout=rate, rng=seed, backend=backend, **options)
    return np.asarray(tab.to_numpy(output)) > 0


def by_hand(seed, rate, heads, n, m):
    places = [((), (head, i, j)) for head in range(heads) for i in range(n) for j in range(m)]
    return oracle.survivors(places, (heads,), rate, seed).reshape(heads, n, m) > 0


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_every_framework_drops_the_pairs_that_the_definition_drops(backend, seed):
    assert (pattern(backend, seed, 0.3, (3,), 5, 9) == by_hand(seed, 0.3, 3, 5, 9)).all()


def test_a_pair_is_dropped_or_not_whatever_is_around_it(backend):
    whole = pattern(backend, 5, lead=(2, 3))
    for n, m in ((64, 80), (1, 1), (7, 3), (64, 79), (3, 80)):
        assert (pattern(backend, 5, lead=(2, 3), n=n, m=m) == whole[..., :n, :m]).all()
    assert (pattern(backend, 5, lead=(6,)) == whole.reshape(6, 64, 80)).all()
    assert (pattern(backend, 5, lead=(1, 3)) == whole[:1]).all()
    more = pattern(backend, 5, 0.7, lead=(2, 3))
    assert whole[more].all()  # a higher rate drops the same pairs, and others


def test_no_seed_draws_what_another_draws(backend):
    found = [pattern(backend, seed) for seed in (0, 1, 2**32, 2**32 + 1, 2**63)]
    for i, x in enumerate(found):
        for y in found[:i]:
            assert abs((x == y).mean() - 0.5) < 0.05  # seven standard deviations


def test_the_pattern_is_that_of_independent_pairs():
    kept = pattern("numpy", 3, 0.25, (8,), 512, 512)
    count, p = 512, 49152 / 65536
    for axis in (-1, -2):
        sums = kept.sum(axis=axis)
        assert abs(sums.mean() - count * p) < 5 * np.sqrt(count * p * (1 - p) / sums.size)
        assert 0.9 < sums.var() / (count * p * (1 - p)) < 1.1
    for x, y in ((kept[..., 1:], kept[..., :-1]), (kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        both = (x & y).mean()
        assert abs(both - p * p) < 5 * np.sqrt(p * p * (1 - p * p) / x.size)


def test_the_output_is_expected_to_be_that_without_dropout():
    query, key, value = (RNG.normal(size=(3, size, 4)) for size in (5, 7, 7))
    repeated = (np.broadcast_to(x, (4000, *x.shape)) for x in (query, key, value))
    draws = kvattn.attention(*repeated, dropout=0.3, rng=1)
    expected = kvattn.attention(query, key, value)
    assert (abs(draws.mean(axis=0) - expected) < 5 * draws.std(axis=0) / np.sqrt(4000)).all()


SEEDS = {
    "bool": (True, TypeError, "bool"),
    "a float": (1.0, TypeError, "float"),
    "text": ("1", TypeError, "str"),
    "negative": (-1, ValueError, "2^64"),
    "beyond 64 bits": (2**64, ValueError, "2^64"),
    "NumPy's negative": (np.int64(-1), ValueError, "2^64"),
    "an array of a float": (np.array(1.0), TypeError, "float64"),
    "an array of a bool": (np.array(True), TypeError, "bool"),
    "no generator": (object(), TypeError, "rng must be an int, the seed of a pattern"),
    "a dict": ({}, TypeError, "not dict"),
}


@pytest.mark.parametrize("bad", SEEDS)
def test_what_is_no_seed_is_refused(backend, bad):
    seed, error, word = SEEDS[bad]
    with pytest.raises(error, match=r"^rng ") as caught:
        pattern(backend, seed)
    assert word in str(caught.value)


def test_numpys_integers_are_seeds(backend):
    assert (pattern(backend, np.uint64(2**63)) == pattern(backend, 2**63)).all()
    assert (pattern(backend, np.array(7, "int32")) == pattern(backend, 7)).all()


def compiled(backend):
    """A function of a seed, which comes later than the program: the pattern of attention."""
    if backend == "torch":
        import torch

        one, eye = torch.zeros(4, 1), torch.eye(6)
        keys = torch.zeros(6, 1)
        step = torch.compile(lambda seed: kvattn.attention(one, keys, eye, dropout=0.5, rng=seed), backend="eager")
        return lambda seed: step(seed).numpy()
    if backend == "tensorflow":
        import tensorflow as tf

        step = tf.function(
            lambda seed: kvattn.attention(tf.zeros((4, 1)), tf.zeros((6, 1)), tf.eye(6), dropout=0.5, rng=seed),
            input_signature=[tf.TensorSpec((), tf.int64)],
        )
        return lambda seed: step(tf.constant(seed, tf.int64)).numpy()
    if backend == "jax":
        import jax
        import jax.numpy as jnp

        step = jax.jit(lambda seed: kvattn.attention(jnp.zeros((4, 1)), jnp.zeros((6, 1)), jnp.eye(6), dropout=0.5, rng=seed))
        return lambda seed: np.asarray(step(seed))
    if backend == "mxnet":
        import mxnet as mx

        zeros = [mx.np.zeros((size, 1)) for size in (4, 6)]
        return lambda seed: kvattn.attention(*zeros, mx.np.eye(6), dropout=0.5, rng=mx.np.array(seed, dtype="int64")).asnumpy()
    return lambda seed: kvattn.attention(np.zeros((4, 1)), np.zeros((6, 1)), np.eye(6), dropout=0.5, rng=np.array(seed))


def test_a_compiled_step_draws_by_the_seed_that_it_is_given(backend):
    step = compiled(backend)
    for seed in (3, 4, 2**31 - 1):
        assert ((step(seed) > 0) == pattern(backend, seed, n=4, m=6)).all()


def test_multi_head_attention_drops_by_the_seed_of_its_call(backend):
    adapter = importlib.import_module(f"adapters.{backend}")
    inputs = [RNG.normal(size=(2, size, 8)).astype("float32") for size in (3, 5, 5)]
    layer = adapter.layer("MultiHeadAttention", num_hiddens=8, num_heads=2, dropout=0.5, seed=1)
    plain, drops = adapter.call(layer, *inputs), {"training": True, "rng": 7}
    params = {name: x.astype("float64") for name, x in adapter.weights(layer).items()}
    wide = [x.astype("float64") for x in inputs]
    expected = kvattn.multi_head_attention(*wide, params, num_heads=2, dropout=0.5, rng=7)
    np.testing.assert_allclose(adapter.call(layer, *inputs, **drops), expected, atol=1e-5)
    np.testing.assert_array_equal(adapter.call(layer, *inputs, rng=7), plain)


@pytest.mark.parametrize("name", ["PositionalEncoding", "AddNorm"])
def test_a_layer_drops_features_by_the_seed_of_its_call(backend, name):
    adapter = importlib.import_module(f"adapters.{backend}")
    X, Y = (RNG.normal(size=(2, 3, 8)).astype("float32") for _ in range(2))
    kept = np.where(by_hand(9, 0.25, 2, 3, 8), 4 / 3, 0)
    if name == "AddNorm":
        layer, inputs = adapter.layer("AddNorm", norm_shape=8, dropout=0.25), (X, Y)
        adapter.call(layer, *inputs)
        summed = X + kept * Y
        expected = summed - summed.mean(axis=-1, keepdims=True)
        expected /= np.sqrt((expected**2).mean(axis=-1, keepdims=True) + layers.EPSILON)
    else:
        layer, inputs = adapter.layer("PositionalEncoding", num_hiddens=8, dropout=0.25), (X,)
        expected = kept * (X + layers.encoding(3, 8))
    np.testing.assert_allclose(adapter.call(layer, *inputs, training=True, rng=9), expected, atol=1e-4)


def test_the_parts_of_an_encoder_have_seeds_of_their_own(backend):
    """Two blocks with the same weights, of which the second is given what the first gave, drop other pairs."""
    adapter = importlib.import_module(f"adapters.{backend}")
    tab = kvattn.dispatch.load(backend)
    seeds = [int(np.asarray(layers.seed_of(tab, 5, part))) for part in range(4)]
    assert len({5, *seeds}) == 5
    assert seeds == [oracle.splitmix64(5, part) for part in range(4)]
    assert layers.seed_of(tab, None, 0) is None
    X = RNG.normal(size=(2, 3, 8)).astype("float32")
    sizes = {"num_hiddens": 8, "ffn_num_hiddens": 8, "num_heads": 2, "dropout": 0.5}
    block = adapter.layer("TransformerEncoderBlock", **sizes, seed=1)
    plain, first = adapter.call(block, X), adapter.call(block, X, training=True, rng=1)
    np.testing.assert_array_equal(adapter.call(block, X, training=True, rng=1), first)
    np.testing.assert_array_equal(adapter.call(block, X, rng=1), plain)
    assert np.abs(adapter.call(block, X, training=True, rng=2) - first).max() > 0.05


def test_each_entry_of_vmap_draws_by_its_own_seed_and_the_same_by_one(backend):
    """An entry of vmap is a call of its own, which knows no place in a batch."""
    if backend not in ("torch", "jax"):
        return
    tab = kvattn.dispatch.load(backend)
    x, key = (tab.asarray(np.zeros((3, n, 1)), dtype="float32") for n in (16, 24))
    value, seeds = (
        tab.asarray(np.broadcast_to(np.eye(24), (3, 24, 24)), dtype="float32"),
        tab.asarray(np.array([5, 9, 5], "int32")),
    )

    def attend(query, key, value, seed):
        return kvattn.attention(query, key, value, dropout=0.5, rng=seed)

    alone = [np.asarray(attend(x[0], key[0], value[0], seed)) for seed in (5, 9, 5)]
    if backend == "torch":
        import torch

        own = torch.func.vmap(attend)(x, key, value, seeds)
        one = torch.func.vmap(attend, in_dims=(0, 0, 0, None))(x, key, value, 5)
    else:
        import jax

        own = jax.vmap(attend)(x, key, value, seeds)
        one = jax.vmap(attend, in_axes=(0, 0, 0, None))(x, key, value, 5)
    np.testing.assert_array_equal(np.asarray(own), alone)
    np.testing.assert_array_equal(np.asarray(one), [alone[0]] * 3)
    assert (alone[0] != alone[1]).any()
