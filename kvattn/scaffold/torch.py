"""The scaffold on PyTorch: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kvattn import checks, layers, scaffold
from kvattn.backends import torch as tab
from kvattn.layers.torch import _dropped, _fill, _Linear
from kvattn.scaffold import data, training
from kvattn.scaffold.data import DataModule, Vocab, bleu  # noqa: F401
from kvattn.scaffold.training import HyperParameters, ProgressBoard, add_to_class, check_len  # noqa: F401


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


class FashionMNIST(data.Pictures):
    """Pictures of ten classes, PyTorch's arrays."""

    array = staticmethod(torch.as_tensor)


# ---- models and their training


def try_gpu(i=0):
    """The GPU of this number, where there is one, else the CPU."""
    return torch.device(f"cuda:{i}" if torch.cuda.device_count() > i else "cpu")


class Module(training.Module, nn.Module):
    __doc__ = training.Module.__doc__

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Trainer(training.Trainer):
    __doc__ = training.Trainer.__doc__

    def prepare_model(self, model):
        self.device = try_gpu() if self.num_gpus else torch.device("cpu")
        super().prepare_model(model.to(self.device))

    def prepare_batch(self, batch):
        return [x.to(self.device) for x in batch]

    def training_step(self, batch):
        self.model.train()
        loss = self.model.training_step(batch)
        self.optim.zero_grad()
        loss.backward()
        if self.gradient_clip_val:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip_val)
        self.optim.step()

    @torch.no_grad()
    def validation_step(self, batch):
        self.model.eval()
        self.model.validation_step(batch)


class Classifier(training.Classifier, Module):
    __doc__ = training.Classifier.__doc__

    def loss(self, Y_hat, Y, averaged=True):
        how = "mean" if averaged else "none"
        return nn.functional.cross_entropy(Y_hat.flatten(0, -2), Y.flatten(), reduction=how)

    def accuracy(self, Y_hat, Y, averaged=True):
        right = (Y_hat.argmax(-1) == Y).float().flatten()
        return right.mean() if averaged else right


# ---- encoders and decoders


class Encoder(nn.Module):
    """The base of encoders: (X, valid_lens) -> what a decoder's init_state takes."""


class Decoder(training.Decoder, nn.Module):
    __doc__ = training.Decoder.__doc__


class AttentionDecoder(training.AttentionDecoder, Decoder):
    __doc__ = training.AttentionDecoder.__doc__


class EncoderDecoder(training.EncoderDecoder, Classifier):
    __doc__ = training.EncoderDecoder.__doc__

    @torch.no_grad()
    def predict_step(self, batch, device, num_steps, save_attention_weights=False):
        self.eval()
        return super().predict_step([x.to(device) for x in batch], device, num_steps, save_attention_weights)

    def _likeliest(self, logits, dtype):
        return logits.argmax(2)

    def _joined(self, tokens):
        return torch.cat(tokens, 1)


def init_seq2seq(module):
    """Glorot's first values for dense layers and nn.GRU: model.apply(init_seq2seq). What is made in the first call has them."""
    if isinstance(module, nn.Linear) and not is_lazy(module.weight):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, nn.GRU):
        for name, weight in module.named_parameters():
            if "weight" in name:
                nn.init.xavier_uniform_(weight)


class Seq2SeqEncoder(Encoder):
    """A GRU over embedded tokens: X (batch, steps) -> (outputs (steps, batch, h), state (num_layers, batch, h))."""

    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0.0, *, seed=None):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_size)
        _fill(self.embedding.weight, seed, "embedding", (vocab_size, embed_size))
        self.rnn = GRU(embed_size, num_hiddens, num_layers, dropout, seed=layers.child(seed, "rnn"))

    def forward(self, X, *args):
        return self.rnn(self.embedding(X.T.long()))


class Seq2Seq(training.Seq2Seq, EncoderDecoder):
    __doc__ = training.Seq2Seq.__doc__

    def loss(self, Y_hat, Y):
        mask = (self.tgt_pad != Y).flatten().float()
        return (super().loss(Y_hat, Y, averaged=False) * mask).sum() / mask.sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)
