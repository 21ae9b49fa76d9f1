"""The weights of a forward pass, layer by layer, in every framework, against a reference; and as pages."""

import importlib
import re

import numpy as np
import pytest
from adapters import reference
from test_layers import ENCODER, HEADS, KEYS, LENS, QUERIES, TOKENS, VALUES, X, made

import kvattn
from kvattn.maps import attention_maps


@pytest.fixture(name="adapter")
def fixture_adapter(backend):
    return importlib.import_module(f"adapters.{backend}")


def given(adapter, layer, *inputs):
    """The layer and inputs as the framework's users have them."""
    arrays = [kvattn.asarray(x, backend=adapter.__name__.rpartition(".")[2]) for x in inputs]
    return (layer.module, layer.variables, *arrays) if hasattr(layer, "module") else (layer, *arrays)


def test_multi_head_attention_gives_a_map_for_each_head(adapter):
    layer, w = made(adapter, "MultiHeadAttention", HEADS, (X, X, X, LENS))
    found = attention_maps(*given(adapter, layer, X, X, X, LENS))
    assert list(found) == ["attention"]
    expected = reference.multi_head(w, X, X, X, LENS, num_heads=4)[1]
    np.testing.assert_allclose(kvattn.to_numpy(found["attention"]), expected.reshape(2, 4, 4, 4), atol=2e-5)


def test_attention_without_heads_gives_one_for_each_of_the_batch(adapter):
    layer, w = made(adapter, "AdditiveAttention", {"num_hiddens": 8}, (QUERIES, KEYS, VALUES, LENS))
    found = attention_maps(*given(adapter, layer, QUERIES, KEYS, VALUES, LENS))
    expected = reference.attention("AdditiveAttention", w, QUERIES, KEYS, VALUES, LENS)[1]
    np.testing.assert_allclose(kvattn.to_numpy(found["attention"]), expected, atol=2e-5)


def test_an_encoder_gives_those_of_its_blocks_in_order_and_of_this_call_only(adapter):
    layer, _ = made(adapter, "TransformerEncoder", ENCODER, (TOKENS,))
    model = given(adapter, layer, TOKENS)
    first = attention_maps(*model, causal=True)
    assert [re.sub(r"\D+(\d)\W+attention", r"\1", name) for name in first] == ["0", "1"]
    for weights in first.values():
        weights = kvattn.to_numpy(weights)
        assert weights.shape == (2, 4, 5, 5)
        np.testing.assert_allclose(weights.sum(-1), np.ones((2, 4, 5)), atol=1e-5)
        assert np.triu(weights[0, 0], 1).max() == 0
    second = attention_maps(*given(adapter, layer, TOKENS[:1, :3]))
    assert {kvattn.to_numpy(weights).shape for weights in second.values()} == {(1, 4, 3, 3)}


def test_what_holds_no_attention_or_is_no_layer_is_told(adapter):
    layer, _ = made(adapter, "PositionWiseFFN", {"ffn_num_hiddens": 8, "ffn_num_outputs": 8}, (X,))
    with pytest.raises(ValueError, match="no attention layer of PositionWiseFFN left its weights"):
        attention_maps(*given(adapter, layer, X))
    with pytest.raises(TypeError, match="expected a layer of kvattn"):
        attention_maps(object(), X)
