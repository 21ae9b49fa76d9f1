"""Weights of the frameworks' own attention layers come into kvattn's, and reproduce the original's output."""

import importlib

import numpy as np
import pytest
from conftest import chosen
from near import assert_near

import kvattn
from kvattn import weights

RNG = np.random.default_rng(0)
QUERY, MEMORY, OTHER = (RNG.normal(size=(2, n, d)).astype("float32") for n, d in ((3, 8), (5, 8), (5, 6)))


def torch_originals():
    import torch

    def run(layer, *inputs):
        with torch.no_grad():
            return layer(*map(torch.from_numpy, inputs), need_weights=False)[0].numpy()

    def random(**options):
        layer = torch.nn.MultiheadAttention(8, 4, batch_first=True, **options)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return layer

    yield "packed", random(), run, (QUERY, MEMORY, MEMORY)
    yield "without biases", random(bias=False), run, (QUERY, MEMORY, MEMORY)
    yield "sizes of their own", random(kdim=6, vdim=8), run, (QUERY, OTHER, MEMORY)


def tensorflow_originals():
    import keras

    def run(layer, query, key, value):
        return np.asarray(layer(query, value, key))  # Keras' order

    def random(*inputs, **options):
        layer = keras.layers.MultiHeadAttention(4, 2, output_shape=8, **options)
        run(layer, *inputs)
        layer.set_weights([RNG.normal(size=x.shape).astype("float32") / 2 for x in layer.get_weights()])
        return layer

    yield "per head", random(QUERY, MEMORY, MEMORY), run, (QUERY, MEMORY, MEMORY)
    yield "without biases", random(QUERY, MEMORY, MEMORY, use_bias=False), run, (QUERY, MEMORY, MEMORY)
    yield "sizes of their own", random(QUERY, OTHER, MEMORY), run, (QUERY, OTHER, MEMORY)


def jax_originals():
    import jax
    from flax import linen, nnx

    def random(tree):
        return jax.tree.map(lambda x: jax.numpy.asarray(RNG.normal(size=x.shape), "float32") / 2, tree)

    for name, options in (("per head", {}), ("without biases", {"use_bias": False})):
        module = linen.MultiHeadDotProductAttention(num_heads=4, **options)
        variables = random(module.init(jax.random.key(0), QUERY, MEMORY, MEMORY))
        yield name, variables, lambda x, *inputs, module=module: np.asarray(module.apply(x, *inputs)), (QUERY, MEMORY, MEMORY)
        module = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0), **options)
        nnx.update(module, random(nnx.state(module, nnx.Param)))
        yield f"nnx {name}", module, lambda x, *inputs: np.asarray(x(*inputs)), (QUERY, MEMORY, MEMORY)


ORIGINALS = {"torch": torch_originals, "tensorflow": tensorflow_originals, "jax": jax_originals}


@pytest.fixture(params=[name for name in ORIGINALS if name in chosen()])
def originals(request):
    return list(ORIGINALS[request.param]())


def test_a_frameworks_own_layer_lives_on_in_kvattn(originals):
    for name, layer, run, inputs in originals:
        params = weights.export_weights(layer)
        got = kvattn.multi_head_attention(*inputs, params, num_heads=4)
        assert_near(got, run(layer, *inputs), name)


def test_and_takes_weights_back(originals):
    for name, layer, run, inputs in originals:
        moved = {n: x + 0.25 for n, x in weights.export_weights(layer).items()}
        layer = weights.import_weights(layer, moved)
        got = kvattn.multi_head_attention(*inputs, moved, num_heads=4)
        assert_near(got, run(layer, *inputs), name)


def test_in_every_backends_own_layer(originals, backend):
    adapter = importlib.import_module(f"adapters.{backend}")
    for name, layer, run, inputs in originals:
        params = weights.export_weights(layer)
        ours = adapter.load(adapter.layer("MultiHeadAttention", num_hiddens=8, num_heads=4, bias="b_q" in params), params)
        assert_near(adapter.call(ours, *inputs), run(layer, *inputs), name)


def test_a_stranger_is_refused_by_name():
    with pytest.raises(TypeError, match="not object"):
        weights.export_weights(object())
