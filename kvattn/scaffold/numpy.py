"""The scaffold on NumPy: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from kvattn import checks, layers, scaffold
from kvattn.backends import numpy as tab
from kvattn.layers.analytic import Dense, Dropout, Layer
from kvattn.scaffold import data
from kvattn.scaffold.data import Vocab, bleu  # noqa: F401


class _Cell(Layer):
    """One layer of a GRU: X (steps, batch, in) and its first state h (batch, num_hiddens) -> every state."""

    def __init__(self, num_hiddens, seed, rng):
        self.W_x = Dense(3 * num_hiddens, seed=seed, rng=rng, name="W_x")
        self.W_h = Dense(3 * num_hiddens, seed=seed, rng=rng, name="W_h")

    def forward(self, X, h):
        kept, outputs = [], []
        for x in self.W_x(X):
            (x_r, x_z, x_c), (h_r, h_z, h_c) = np.split(x, 3, axis=-1), np.split(self.W_h(h), 3, axis=-1)
            r, z = _sigmoid(x_r + h_r), _sigmoid(x_z + h_z)
            c = np.tanh(x_c + r * h_c)
            kept.append((r, z, c, h, h_c))
            h = (1 - z) * c + z * h
            outputs.append(h)
        self.keep(kept)
        return np.stack(outputs)

    def vjp(self, grad, kept):
        by_h, by_x = np.zeros_like(grad[0]), []
        for step, (r, z, c, h, h_c) in zip(grad[::-1], kept[::-1], strict=True):  # backward in time
            by_h = by_h + step
            by_z = by_h * (h - c) * z * (1 - z)
            by_c = by_h * (1 - z) * (1 - c * c)
            by_r = by_c * h_c * r * (1 - r)
            by_x.append(np.concatenate([by_r, by_z, by_c], axis=-1))
            by_h = by_h * z + self.W_h.backward(np.concatenate([by_r, by_z, by_c * r], axis=-1))
        return self.W_x.backward(np.stack(by_x[::-1])), by_h


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


class GRU(Layer):
    """A gated recurrent unit of ``num_layers`` cells, d2l's call: (X (steps, batch, in), H=None) -> (outputs, state).

    ``num_inputs`` is d2l's; the first call tells it. ``backward(grad_output, grad_state)`` takes the gradients of both
    results, and returns that by X, or those by X and by H where H was given.

    >>> outputs, state = GRU(num_hiddens=4, num_layers=2, seed=0)(np.ones((5, 3, 2)))
    >>> outputs.shape, state.shape
    ((5, 3, 4), (2, 3, 4))
    """

    _results = 2

    def __init__(self, num_inputs=None, num_hiddens=None, num_layers=1, dropout=0.0, *, seed=None, rng=None):
        scaffold.check_gru(num_hiddens, num_layers)
        self.num_hiddens, rng = num_hiddens, np.random.default_rng(rng)
        self.cells = [_Cell(num_hiddens, layers.child(seed, f"cells.{i}"), rng) for i in range(num_layers)]
        self.dropout = Dropout(dropout, rng=rng)
        self._grad_state = None

    def forward(self, X, H=None, *, rng=None):
        checks.floating("X", X)
        shape, state = scaffold.check_call(X, H, len(self.cells), self.num_hiddens), []
        first = np.zeros(shape, X.dtype) if H is None else np.asarray(H)
        for i, cell in enumerate(self.cells):
            if i:
                X = self.dropout(X, rng=layers.seed_of(tab, rng, i, attends=False))
            X = cell(X, first[i])
            state.append(X[-1])
        self.keep(H is not None)
        return X, np.stack(state)

    def backward(self, grad_output, grad_state=None):
        self._grad_state = grad_state
        return super().backward(grad_output)

    def vjp(self, grad, given):
        by_state, by_first = self._grad_state, [None] * len(self.cells)
        for i in reversed(range(len(self.cells))):
            if by_state is not None:
                grad = np.concatenate([grad[:-1], grad[-1:] + by_state[i]])
            grad, by_first[i] = self.cells[i].backward(grad)
            if i:
                grad = self.dropout.backward(grad)
        return (grad, np.stack(by_first)) if given else grad


class MTFraEng(data.Translations):
    """English sentences and their French ones, arrays of NumPy."""

    array = staticmethod(np.asarray)
