"""The scaffold on NumPy: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from kvattn import conversion, layers, scaffold
from kvattn.backends import numpy as tab
from kvattn.layers.analytic import Dense, Dropout, Embedding, Layer
from kvattn.layers.training import SGD, Adam, softmax_cross_entropy
from kvattn.scaffold import data, training
from kvattn.scaffold.data import DataModule, Vocab, bleu  # noqa: F401
from kvattn.scaffold.training import HyperParameters, ProgressBoard, add_to_class, check_len  # noqa: F401


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
        conversion.floating("X", X)
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


# ---- models and their training


def try_gpu(i=0):
    """NumPy has the CPU only."""
    return "cpu"


class Module(training.Module, Layer):
    """The base of models: a Layer, whose ``loss(Y_hat, Y)`` gives the loss and its gradient by Y_hat."""

    def training_step(self, batch):
        loss, grad = self.loss(self(*batch[:-1], training=True), batch[-1])
        self.backward(grad)
        self.plot("loss", loss, train=True)
        return loss

    def validation_step(self, batch):
        self.plot("loss", self.loss(self(*batch[:-1]), batch[-1])[0], train=False)

    def configure_optimizers(self):
        return SGD(self, self.lr)


class Trainer(training.Trainer):
    __doc__ = training.Trainer.__doc__

    def training_step(self, batch):
        self.model.training_step(batch)
        if self.gradient_clip_val:
            grads = self.model.grads.values()
            norm = np.sqrt(sum((grad * grad).sum() for grad in grads))
            for grad in grads:
                grad *= min(1.0, self.gradient_clip_val / max(norm, 1e-12))
        self.optim.step()


class Classifier(Module):
    """The base of models that choose one of several classes: logits (..., classes), labels (...)."""

    def validation_step(self, batch):
        Y_hat = self(*batch[:-1])
        self.plot("loss", self.loss(Y_hat, batch[-1])[0], train=False)
        self.plot("acc", self.accuracy(Y_hat, batch[-1]), train=False)

    def loss(self, Y_hat, Y):
        return softmax_cross_entropy(Y_hat, Y)

    def accuracy(self, Y_hat, Y, averaged=True):
        right = (Y_hat.argmax(-1) == Y).astype(np.float32).ravel()
        return right.mean() if averaged else right


# ---- encoders and decoders


class Encoder(Layer):
    """The base of encoders: (X, valid_lens) -> what a decoder's init_state takes. Its ``backward`` takes the gradients that the
    decoder's returns."""


class Decoder(training.Decoder, Layer):
    """The base of decoders: init_state(enc_outputs, valid_lens) gives a state, (X, state) -> (logits, state).

    A subclass has ``forward(X, *state)``, and init_state passes what an encoder returned on as it is: ``vjp`` returns the
    gradients by the floating-point arrays of the state, which are the encoder's own.
    """

    def __call__(self, X, state, **options):
        return super().__call__(X, *state, **options)


class AttentionDecoder(training.AttentionDecoder, Decoder):
    __doc__ = training.AttentionDecoder.__doc__


class EncoderDecoder(training.EncoderDecoder, Classifier):
    __doc__ = training.EncoderDecoder.__doc__

    def vjp(self, grad):
        grads = self.decoder.backward(grad)
        self.encoder.backward(*(grads if isinstance(grads, tuple) else (grads,)))
        return ()

    def _likeliest(self, logits, dtype):
        return logits.argmax(2)

    def _joined(self, tokens):
        return np.concatenate(tokens, 1)


class Seq2SeqEncoder(Encoder):
    """A GRU over embedded tokens: X (batch, steps) -> (outputs (steps, batch, h), state (num_layers, batch, h))."""

    _results = 2

    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0.0, *, seed=None, rng=None):
        rng = np.random.default_rng(rng)
        self.embedding = Embedding(vocab_size, embed_size, seed=seed, rng=rng)
        self.rnn = GRU(embed_size, num_hiddens, num_layers, dropout, seed=layers.child(seed, "rnn"), rng=rng)
        self._grad_state = None

    def forward(self, X, *args):
        return self.rnn(self.embedding(X.T))

    def backward(self, grad_output, grad_state=None):
        self._grad_state = grad_state
        return super().backward(grad_output)

    def vjp(self, grad):
        return self.embedding.backward(self.rnn.backward(grad, self._grad_state))


class Seq2Seq(training.Seq2Seq, EncoderDecoder):
    __doc__ = training.Seq2Seq.__doc__

    validation_step = Module.validation_step

    def loss(self, Y_hat, Y):
        counts, grad = self.tgt_pad != Y, np.zeros_like(Y_hat)
        loss, grad[counts] = softmax_cross_entropy(Y_hat[counts], Y[counts])
        return loss, grad

    def configure_optimizers(self):
        return Adam(self, self.lr)
