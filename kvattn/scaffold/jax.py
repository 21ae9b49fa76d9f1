"""The scaffold on JAX and flax.linen: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvattn import layers, scaffold
from kvattn.backends import jax as tab
from kvattn.layers.jax import _dense, _dropped, _exact, _keyword, _Layer
from kvattn.scaffold import data
from kvattn.scaffold.data import Vocab, bleu  # noqa: F401


class _Cell(nn.Module):
    """One layer of a GRU: X (steps, batch, in) and its first state h (batch, num_hiddens) -> every state."""

    num_hiddens: int
    seed: layers.Seed

    def setup(self):
        self.W_x = _dense("W_x", 3 * self.num_hiddens, True, self.seed)
        self.W_h = _dense("W_h", 3 * self.num_hiddens, True, self.seed)

    def __call__(self, X, h):
        outputs = []
        for x in self.W_x(X):
            (x_r, x_z, x_c), (h_r, h_z, h_c) = jnp.split(x, 3, -1), jnp.split(self.W_h(h), 3, -1)
            r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
            h = (1 - z) * jnp.tanh(x_c + r * h_c) + z * h
            outputs.append(h)
        return jnp.stack(outputs)


class GRU(_Layer):
    """A gated recurrent unit of ``num_layers`` cells, d2l's call: (X (steps, batch, in), H=None, training=False) ->
    (outputs, state)."""

    num_hiddens: int
    num_layers: int = 1
    dropout: float = 0.0
    seed: layers.Seed = _keyword(default=None)

    def __post_init__(self):
        scaffold.check_gru(self.num_hiddens, self.num_layers)
        super().__post_init__()

    def setup(self):
        self.cells = [_Cell(self.num_hiddens, layers.child(self.seed, f"cells.{i}")) for i in range(self.num_layers)]
        self.drop = nn.Dropout(self.dropout)

    @_exact
    def __call__(self, X, H=None, training=False, *, rng=None):
        shape, state = scaffold.check_call(X, H, self.num_layers, self.num_hiddens), []
        first = jnp.zeros(shape, X.dtype) if H is None else H
        for i, cell in enumerate(self.cells):
            if i:
                X = _dropped(self.drop, X, training, layers.seed_of(tab, rng, i, attends=False))
            X = cell(X, first[i])
            state.append(X[-1])
        return X, jnp.stack(state)


class MTFraEng(data.Translations):
    """English sentences and their French ones, JAX's arrays."""

    array = staticmethod(jnp.asarray)
