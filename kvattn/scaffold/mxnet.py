"""The scaffold on MXNet and gluon: see kvattn/scaffold/__init__.py. Call mxnet.npx.set_np() first."""

# mypy: ignore-errors

from __future__ import annotations

from kvattn import checks, layers, scaffold
from kvattn.backends import mxnet as tab
from kvattn.layers.mxnet import _Dense, _dropped, mx, nn, np
from kvattn.scaffold import data
from kvattn.scaffold.data import Vocab, bleu  # noqa: F401


class _Cell(nn.Block):
    """One layer of a GRU: X (steps, batch, in) and its first state h (batch, num_hiddens) -> every state."""

    def __init__(self, num_hiddens, seed):
        super().__init__()
        self.W_x = _Dense("W_x", 3 * num_hiddens, True, seed)
        self.W_h = _Dense("W_h", 3 * num_hiddens, True, seed)

    def forward(self, X, h):
        outputs = []
        for x in self.W_x(X):
            (x_r, x_z, x_c), (h_r, h_z, h_c) = np.split(x, 3, axis=-1), np.split(self.W_h(h), 3, axis=-1)
            r, z = mx.npx.sigmoid(x_r + h_r), mx.npx.sigmoid(x_z + h_z)
            h = (1 - z) * np.tanh(x_c + r * h_c) + z * h
            outputs.append(h)
        return np.stack(outputs)


class GRU(nn.Block):
    """A gated recurrent unit of ``num_layers`` cells, d2l's call: (X (steps, batch, in), H=None) -> (outputs, state).

    A Block, which is not hybridized: how many steps there are is seen in each call.
    """

    def __init__(self, num_hiddens=None, num_layers=1, dropout=0.0, *, seed=None):
        super().__init__()
        scaffold.check_gru(num_hiddens, num_layers)
        self.num_hiddens, self.dropout = num_hiddens, nn.Dropout(checks.probability("dropout", dropout))
        self.cells = nn.Sequential()
        for i in range(num_layers):
            self.cells.add(_Cell(num_hiddens, layers.child(seed, f"cells.{i}")))

    def __call__(self, X, H=None, *, rng=None):  # gluon's own takes no names
        return super().__call__(X, H, rng)

    def forward(self, X, H, rng):
        shape, state = scaffold.check_call(X, H, len(self.cells), self.num_hiddens), []
        first = np.zeros(shape, dtype=X.dtype, ctx=X.ctx) if H is None else H
        for i, cell in enumerate(self.cells):
            if i:
                X = _dropped(self.dropout, X, layers.seed_of(tab, rng, i, attends=False))
            X = cell(X, first[i])
            state.append(X[-1])
        return X, np.stack(state)


class MTFraEng(data.Translations):
    """English sentences and their French ones, MXNet's arrays."""

    @staticmethod
    def array(x):
        return np.array(x, dtype="int32")
