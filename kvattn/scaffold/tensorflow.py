"""The scaffold on TensorFlow and Keras: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import keras
import tensorflow as tf

from kvattn import checks, layers, scaffold
from kvattn.backends import tensorflow as tab
from kvattn.layers.keras import Layer, build_once, dense, dropped, initializer, registered
from kvattn.scaffold import data, training
from kvattn.scaffold.data import DataModule, Vocab, bleu  # noqa: F401
from kvattn.scaffold.training import HyperParameters, ProgressBoard, add_to_class, check_len  # noqa: F401


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


# ---- models and their training


def try_gpu(i=0):
    """The GPU of this number, where there is one, else the CPU: with try_gpu(): ..."""
    return tf.device(f"/GPU:{i}" if len(tf.config.list_physical_devices("GPU")) > i else "/CPU:0")


class _Any(keras.layers.Layer):
    """A layer whose state may be a list with None in it, and whose inputs are called what its author calls them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._allow_non_tensor_positional_args = True

    def build(self, X_shape):
        """Nothing: its parts are built in the first call. Without this Keras would try a call with symbols, and warn."""


class Module(training.Module, _Any):
    """The base of models. A subclass has ``loss(Y_hat, Y)``, and ``call``, ``forward`` or ``net``, which it calls."""

    def call(self, X, *args):
        return self.forward(X, *args)

    def _outputs(self, inputs, training):
        return self(*inputs, training=training)

    def configure_optimizers(self):
        return keras.optimizers.SGD(self.lr)


class Trainer(training.Trainer):
    __doc__ = training.Trainer.__doc__

    def training_step(self, batch):
        with tf.GradientTape() as tape:
            loss = self.model.training_step(batch)
        variables = self.model.trainable_variables
        grads = tape.gradient(loss, [x.value for x in variables])
        if self.gradient_clip_val:
            grads, _ = tf.clip_by_global_norm(grads, self.gradient_clip_val)
        self.optim.apply(grads, variables)


class Classifier(training.Classifier, Module):
    __doc__ = training.Classifier.__doc__

    def loss(self, Y_hat, Y, averaged=True):
        each = tf.reshape(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, Y_hat), -1)
        return tf.reduce_mean(each) if averaged else each

    def accuracy(self, Y_hat, Y, averaged=True):
        right = tf.reshape(tf.cast(tf.cast(tf.argmax(Y_hat, -1), Y.dtype) == Y, "float32"), -1)
        return tf.reduce_mean(right) if averaged else right


# ---- encoders and decoders


class Encoder(_Any):
    """The base of encoders: (X, valid_lens) -> what a decoder's init_state takes."""


class Decoder(training.Decoder, _Any):
    __doc__ = training.Decoder.__doc__


class AttentionDecoder(training.AttentionDecoder, Decoder):
    __doc__ = training.AttentionDecoder.__doc__


class EncoderDecoder(training.EncoderDecoder, Classifier):
    __doc__ = training.EncoderDecoder.__doc__

    _judged = {"training": False}  # noqa: RUF012

    def call(self, enc_X, dec_X, valid_lens=None, training=None):
        state = self.decoder.init_state(self.encoder(enc_X, valid_lens, training=training), valid_lens)
        return self.decoder(dec_X, state, training=training)[0]

    def _likeliest(self, logits, dtype):
        return tf.argmax(logits, 2, output_type=dtype)

    def _joined(self, tokens):
        return tf.concat(tokens, 1)


class Seq2SeqEncoder(Encoder):
    """A GRU over embedded tokens: X (batch, steps) -> (outputs (steps, batch, h), [state of each layer (batch, h)])."""

    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, dropout=0.0, *, seed=None):
        super().__init__()
        drawn = initializer(seed, "embedding", (vocab_size, embed_size))
        self.embedding = keras.layers.Embedding(vocab_size, embed_size, embeddings_initializer=drawn)
        self.rnn = GRU(num_hiddens, num_layers, dropout, seed=layers.child(seed, "rnn"))

    def call(self, X, valid_lens=None, training=None):
        return self.rnn(self.embedding(tf.transpose(X)), training=training)


class Seq2Seq(training.Seq2Seq, EncoderDecoder):
    __doc__ = training.Seq2Seq.__doc__

    def loss(self, Y_hat, Y):
        mask = tf.cast(tf.reshape(Y, -1) != self.tgt_pad, "float32")
        return tf.reduce_sum(super().loss(Y_hat, Y, averaged=False) * mask) / tf.reduce_sum(mask)

    def configure_optimizers(self):
        return keras.optimizers.Adam(self.lr, epsilon=1e-8)  # the epsilon of the other frameworks
