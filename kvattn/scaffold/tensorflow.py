"""The scaffold on TensorFlow and Keras: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import keras
import tensorflow as tf

from kvattn import checks, layers, scaffold
from kvattn.backends import tensorflow as tab
from kvattn.layers.keras import Layer, build_once, dense, dropped, registered
from kvattn.scaffold import data
from kvattn.scaffold.data import Vocab, bleu  # noqa: F401


@registered
class _Cell(Layer):
    """One layer of a GRU: X (steps, batch, in) and its first state h (batch, num_hiddens) -> every state."""

    def __init__(self, num_hiddens, seed, **kwargs):
        super().__init__(locals(), **kwargs)
        self.W_x = dense(self, "W_x", 3 * num_hiddens, True, seed)
        self.W_h = dense(self, "W_h", 3 * num_hiddens, True, seed)

    def build(self, X_shape, h_shape):
        build_once(self.W_x, X_shape)
        build_once(self.W_h, h_shape)

    def call(self, X, h):
        outputs = []
        for x in tf.unstack(self.W_x(X)):
            (x_r, x_z, x_c), (h_r, h_z, h_c) = tf.split(x, 3, -1), tf.split(self.W_h(h), 3, -1)
            r, z = tf.sigmoid(x_r + h_r), tf.sigmoid(x_z + h_z)
            h = (1 - z) * tf.tanh(x_c + r * h_c) + z * h
            outputs.append(h)
        return tf.stack(outputs)


@registered
class GRU(Layer):
    """A gated recurrent unit of ``num_layers`` cells, d2l's call: (X (steps, batch, in), H=None, training=None) ->
    (outputs, state), where the state is a list of each cell's (batch, num_hiddens)."""

    def __init__(self, num_hiddens=None, num_layers=1, dropout=0.0, *, seed=None, **kwargs):
        super().__init__(locals(), **kwargs)
        scaffold.check_gru(num_hiddens, num_layers)
        self.num_hiddens, self.dropout = num_hiddens, keras.layers.Dropout(checks.probability("dropout", dropout))
        dtype = self.dtype_policy
        self.cells = [_Cell(num_hiddens, layers.child(seed, f"cells.{i}"), dtype=dtype) for i in range(num_layers)]

    def build(self, X_shape):
        steps, batch, features = X_shape
        for i, cell in enumerate(self.cells):
            build_once(cell, (steps, batch, self.num_hiddens if i else features), (batch, self.num_hiddens))

    def call(self, X, H=None, arrays=None, training=None, rng=None):
        scaffold.check_call(X, H, len(self.cells), self.num_hiddens)
        rng, state = (arrays or {}).get("rng", rng), []
        first = [tf.zeros((tf.shape(X)[1], self.num_hiddens), X.dtype)] * len(self.cells) if H is None else H
        for i, cell in enumerate(self.cells):
            if i:
                X = dropped(self.dropout, X, training, layers.seed_of(tab, rng, i, attends=False))
            X = cell(X, first[i])
            state.append(X[-1])
        return X, state


class MTFraEng(data.Translations):
    """English sentences and their French ones, TensorFlow's tensors."""

    @staticmethod
    def array(x):
        return tf.constant(x, "int32")
