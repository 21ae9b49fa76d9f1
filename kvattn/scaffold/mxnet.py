"""The scaffold on MXNet and gluon: see kvattn/scaffold/__init__.py. Call mxnet.npx.set_np() first."""

# mypy: ignore-errors

from __future__ import annotations

import math

from kvattn import checks, layers, scaffold
from kvattn.backends import mxnet as tab
from kvattn.layers.mxnet import _Dense, _dropped, _First, autograd, mx, nn, np
from kvattn.scaffold import data, training
from kvattn.scaffold.data import DataModule, Vocab, bleu  # noqa: F401
from kvattn.scaffold.training import HyperParameters, ProgressBoard, add_to_class, check_len  # noqa: F401


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


# ---- models and their training


def try_gpu(i=0):
    """The GPU of this number, where there is one, else the CPU."""
    return mx.gpu(i) if mx.context.num_gpus() > i else mx.cpu()


class Module(training.Module, nn.Block):
    __doc__ = training.Module.__doc__

    def configure_optimizers(self):
        return mx.gluon.Trainer(self.collect_params(), "sgd", {"learning_rate": self.lr})


class Trainer(training.Trainer):
    __doc__ = training.Trainer.__doc__

    def prepare_model(self, model):
        self.device = try_gpu() if self.num_gpus else mx.cpu()
        model.collect_params().reset_ctx(self.device)
        super().prepare_model(model)

    def prepare_batch(self, batch):
        return [x.as_in_ctx(self.device) for x in batch]

    def training_step(self, batch):
        with autograd.record():
            loss = self.model.training_step(batch)
        loss.backward()
        if self.gradient_clip_val:
            grads = [x.grad() for x in self.model.collect_params().values() if x.grad_req != "null"]
            norm = math.sqrt(sum(float((grad * grad).sum()) for grad in grads))
            for grad in grads:
                grad *= min(1.0, self.gradient_clip_val / max(norm, 1e-12))
        self.optim.step(1)


class Classifier(training.Classifier, Module):
    __doc__ = training.Classifier.__doc__

    def loss(self, Y_hat, Y, averaged=True):
        each = mx.gluon.loss.SoftmaxCrossEntropyLoss()(Y_hat.reshape(-1, Y_hat.shape[-1]), Y.reshape(-1))
        return each.mean() if averaged else each

    def accuracy(self, Y_hat, Y, averaged=True):
        right = (Y_hat.argmax(-1).astype(Y.dtype) == Y).astype("float32").reshape(-1)
        return right.mean() if averaged else right


# ---- encoders and decoders


class Encoder(nn.Block):
    """The base of encoders: (X, valid_lens) -> what a decoder's init_state takes."""


class Decoder(training.Decoder, nn.Block):
    __doc__ = training.Decoder.__doc__


class AttentionDecoder(training.AttentionDecoder, Decoder):
    __doc__ = training.AttentionDecoder.__doc__


class EncoderDecoder(training.EncoderDecoder, Classifier):
    __doc__ = training.EncoderDecoder.__doc__

    def predict_step(self, batch, device, num_steps, save_attention_weights=False):
        return super().predict_step([x.as_in_ctx(device) for x in batch], device, num_steps, save_attention_weights)

    def _likeliest(self, logits, dtype):
        return logits.argmax(2).astype("int32")

    def _joined(self, tokens):
        return np.concatenate(tokens, 1)


class Seq2SeqEncoder(Encoder):
    """A GRU over embedded tokens: X (batch, steps) -> (outputs (steps, batch, h), state (num_layers, batch, h))."""

    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0.0, *, seed=None):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_size, weight_initializer=_First("embedding", seed))
        self.rnn = GRU(num_hiddens, num_layers, dropout, seed=layers.child(seed, "rnn"))
        self.initialize()

    def forward(self, X, *args):
        return self.rnn(self.embedding(X.T))


class Seq2Seq(training.Seq2Seq, EncoderDecoder):
    __doc__ = training.Seq2Seq.__doc__

    def loss(self, Y_hat, Y):
        mask = (Y.reshape(-1) != self.tgt_pad).astype("float32")
        return (super().loss(Y_hat, Y, averaged=False) * mask).sum() / mask.sum()

    def configure_optimizers(self):
        return mx.gluon.Trainer(self.collect_params(), "adam", {"learning_rate": self.lr})
