"""The scaffold on PyTorch: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import nn

from kvattn import checks, layers, scaffold
from kvattn.backends import torch as tab
from kvattn.layers.torch import _dropped, _Linear
from kvattn.scaffold import data
from kvattn.scaffold.data import Vocab, bleu  # noqa: F401


class _Cell(nn.Module):
    """One layer of a GRU: X (steps, batch, in) and its first state h (batch, num_hiddens) -> every state."""

    def __init__(self, num_hiddens, seed):
        super().__init__()
        self.W_x = _Linear("W_x", 3 * num_hiddens, True, seed)
        self.W_h = _Linear("W_h", 3 * num_hiddens, True, seed)

    def forward(self, X, h):
        outputs = []
        for x in self.W_x(X):
            (x_r, x_z, x_c), (h_r, h_z, h_c) = x.chunk(3, -1), self.W_h(h).chunk(3, -1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            h = (1 - z) * torch.tanh(x_c + r * h_c) + z * h
            outputs.append(h)
        return torch.stack(outputs)


class GRU(nn.Module):
    """A gated recurrent unit of ``num_layers`` cells, d2l's call: (X (steps, batch, in), H=None) -> (outputs, state).

    ``num_inputs`` is d2l's; the first call tells it.
    """

    def __init__(self, num_inputs=None, num_hiddens=None, num_layers=1, dropout=0.0, *, seed=None):
        super().__init__()
        scaffold.check_gru(num_hiddens, num_layers)
        self.num_hiddens, self.dropout = num_hiddens, nn.Dropout(checks.probability("dropout", dropout))
        self.cells = nn.ModuleList(_Cell(num_hiddens, layers.child(seed, f"cells.{i}")) for i in range(num_layers))

    def forward(self, X, H=None, *, rng=None):
        shape, state = scaffold.check_call(X, H, len(self.cells), self.num_hiddens), []
        first = X.new_zeros(shape) if H is None else H
        for i, cell in enumerate(self.cells):
            if i:
                X = _dropped(self.dropout, X, layers.seed_of(tab, rng, i, attends=False))
            X = cell(X, first[i])
            state.append(X[-1])
        return X, torch.stack(state)


class MTFraEng(data.Translations):
    """English sentences and their French ones, PyTorch's tensors."""

    array = staticmethod(torch.as_tensor)
