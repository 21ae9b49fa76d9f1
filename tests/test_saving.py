"""A layer comes back from every way in which its framework saves, alone and in a user's own model, or is refused aloud."""

import importlib

import numpy as np
import pytest
from conftest import chosen
from saving import COPIES, EXCEPT, LAYERS, SERVED, WAYS, arguments
from test_layers import shaken

# MXNet's and Keras's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Cannot decide type")  # MXNet's own, and Keras's

RNG = np.random.default_rng(2)
X, TOKENS, LENS = RNG.normal(size=(2, 5, 8)).astype("float32"), RNG.integers(0, 11, (2, 5)), np.array([4, 2])
LENS, TOKENS = LENS.astype("int32"), TOKENS.astype("int32")
SAVED = ["a model of all layers", "TransformerEncoder", "MultiHeadAttention", "MultiplicativeAttention"]


def each(cases, *tables):
    """(framework, way, case) of the ways of this run, but for what the framework itself does not do."""
    ways = [(framework, way) for framework in chosen() for table in tables for way in table.get(framework, "").split()]
    found = [(*way, case) for way in ways for case in cases if (*way, case) not in EXCEPT]
    return pytest.mark.parametrize(("framework", "way", "case"), found)


class Saving:
    """A framework's adapters, and layers of one kind."""

    def __init__(self, framework, name, **more):
        self.adapter, self.ways = (importlib.import_module(f"{folder}.{framework}") for folder in ("adapters", "saving"))
        self.name, self.config = name, {**LAYERS.get(name, {}), **more}
        self.inputs = arguments(name, X, TOKENS, LENS) if name in LAYERS else (X, TOKENS, LENS)

    def fresh(self):
        return self.adapter.layer(self.name, **self.config) if self.name in LAYERS else self.ways.model()

    def made(self):
        """One that was called, with weights of its own."""
        layer = self.fresh()
        self.adapter.call(layer, *self.inputs)
        return self.adapter.load(layer, shaken(self.adapter.weights(layer)))

    def outputs(self, layer):
        return several(self.adapter.call(layer, *self.inputs))


def several(outputs):
    return list(map(np.asarray, outputs if isinstance(outputs, (tuple, list)) else [outputs]))


def same(found, expected, atol=0.0):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


@each(SAVED, WAYS, COPIES, SERVED)
def test_what_comes_back_is_the_same_layer(framework, way, case, tmp_path):
    saving = Saving(framework, case)
    layer = saving.made()
    expected, by_name = saving.outputs(layer), saving.adapter.weights(layer)
    fresh = (saving.fresh,) if way in WAYS[framework].split() else ()
    restored = getattr(saving.ways, way)(layer, *fresh, saving.inputs, tmp_path)
    if way in SERVED.get(framework, "").split():
        serve, count = restored
        same(several(serve(*saving.inputs)), expected, 1e-5)  # a compiled graph rounds otherwise
        assert count == len(by_name)
    else:
        same(saving.outputs(restored), expected)
        found = saving.adapter.weights(restored)
        assert list(found) == list(by_name)
        same(found.values(), by_name.values())


MISFITS = {  # what is saved, and into what it does not fit
    "a block too few": ("TransformerEncoder", {"num_blks": 1}, {"num_blks": 2}),
    "a block too many": ("TransformerEncoder", {"num_blks": 2}, {"num_blks": 1}),
    "no biases": ("MultiHeadAttention", {"bias": False}, {"bias": True}),
    "biases": ("MultiHeadAttention", {"bias": True}, {"bias": False}),
    "other sizes": ("PositionWiseFFN", {"ffn_num_hiddens": 6}, {"ffn_num_hiddens": 5}),
}


@each(MISFITS, WAYS)
def test_what_does_not_fit_is_an_error(framework, way, case, tmp_path):
    name, saved, asked = MISFITS[case]
    saving, other = Saving(framework, name, **saved), Saving(framework, name, **asked)
    layer = saving.made()
    with pytest.raises(saving.ways.ERRORS):
        saving.outputs(getattr(saving.ways, way)(layer, other.fresh, saving.inputs, tmp_path))
