"""The scaffold on JAX and flax.linen: see kvattn/scaffold/__init__.py."""

# mypy: ignore-errors

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from kvattn import layers, scaffold
from kvattn.backends import jax as tab
from kvattn.jax import get_key
from kvattn.layers.jax import _dense, _dropped, _exact, _initializer, _kernel, _keyword, _Layer
from kvattn.scaffold import data, training
from kvattn.scaffold.data import DataModule, Vocab, bleu  # noqa: F401
from kvattn.scaffold.training import HyperParameters, ProgressBoard, add_to_class, check_len  # noqa: F401


class _Cell(nn.Module):
    """One layer of a GRU: X (steps, batch, in) and its first state h (batch, num_hiddens) -> every state."""

    num_hiddens: int
    seed: layers.Seed

    def setup(self):
        self.W_x = _dense("W_x", 3 * self.num_hiddens, True, self.seed)
        self.W_h = _dense("W_h", 3 * self.num_hiddens, True, self.seed)

    def __call__(self, X, h):
        _kernel(self.W_h, h.shape[-1])  # makes the weights in the first call: flax's layers cannot be called in a scan
        W_h, b_h = (self.W_h.variables["params"][name].astype(h.dtype) for name in ("kernel", "bias"))

        def step(h, x):
            (x_r, x_z, x_c), (h_r, h_z, h_c) = jnp.split(x, 3, -1), jnp.split(h @ W_h + b_h, 3, -1)
            r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
            h = (1 - z) * jnp.tanh(x_c + r * h_c) + z * h
            return h, h

        return jax.lax.scan(step, h, self.W_x(X))[1]


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


class FashionMNIST(data.Pictures):
    """Pictures of ten classes, JAX's arrays, channels last."""

    array = staticmethod(jnp.asarray)
    channels_last = True


# ---- models and their training


def try_gpu(i=0):
    """The GPU of this number, where there is one, else the CPU."""
    found = [x for x in jax.devices() if x.platform == "gpu"]
    return found[i] if len(found) > i else jax.devices("cpu")[0]


class Module(nn.Module, training.Module):
    """The base of models. A subclass has ``loss``, as Classifier's, and ``__call__``, ``forward`` or ``net``, which it calls.

    A field ``training``, if it has one, says whether dropout drops; the Trainer sets it.
    """

    plot_train_per_epoch: int = dataclasses.field(default=2, init=False)
    plot_valid_per_epoch: int = dataclasses.field(default=1, init=False)
    board: ProgressBoard = dataclasses.field(default_factory=ProgressBoard, init=False)

    def forward(self, X, *args, **options):
        return self.net(X, *args, **options)

    def __call__(self, X, *args, **options):
        return self.forward(X, *args, **options)

    def validation_step(self, params, batch, state):
        self.plot("loss", _loss(self, params, batch, state), train=False)

    def configure_optimizers(self):
        return optax.sgd(self.lr)


class TrainState(train_state.TrainState):
    """flax's, with the key of the next step's dropout."""

    dropout_rng: jax.Array


class Trainer(training.Trainer):
    """Trains a model with data for ``max_epochs``: trainer.fit(model, data, key=None), whose parameters are then in
    ``trainer.state.params``.

    ``num_gpus`` of 1 takes a GPU, if there is one; where gradients together are longer than ``gradient_clip_val``, they are
    shortened to it, 0 for never.
    """

    def prepare_model(self, model, key=None):
        for_params, for_dropout = jax.random.split(get_key() if key is None else key)
        self.device = try_gpu() if self.num_gpus else jax.devices("cpu")[0]
        vars(model)["trainer"], self.model = self, model  # past flax, whose modules are frozen
        inputs = self.prepare_batch(next(iter(self.train_dataloader)))[:-1]
        params = jax.jit(_switched(model, False).init)({"params": for_params, "dropout": for_dropout}, *inputs)["params"]
        optimizer = model.configure_optimizers()
        if self.gradient_clip_val:
            optimizer = optax.chain(optax.clip_by_global_norm(self.gradient_clip_val), optimizer)
        self.state = TrainState.create(
            apply_fn=_switched(model, True).apply, params=params, tx=optimizer, dropout_rng=for_dropout
        )
        self.evaluate = jax.jit(_switched(model, False).apply)
        self.step = jax.jit(lambda state, batch: self._step(state, batch))

    def _step(self, state, batch):
        value, grads = jax.value_and_grad(lambda params: _loss(self.model, params, batch, state))(state.params)
        return value, state.apply_gradients(grads=grads).replace(dropout_rng=jax.random.split(state.dropout_rng)[0])

    def prepare_batch(self, batch):
        return jax.device_put(tuple(batch), self.device)

    def training_step(self, batch):
        value, self.state = self.step(self.state, batch)
        self.model.plot("loss", value, train=True)

    def validation_step(self, batch):
        self.model.validation_step(self.state.params, batch, self.state.replace(apply_fn=self.evaluate))


def _switched(model, training):
    """The model in training, or out of it."""
    return model.clone(training=training) if "training" in model.__dataclass_fields__ else model


def _loss(model, params, batch, state):
    found = model.loss(params, batch[:-1], batch[-1], state)
    return found[0] if isinstance(found, tuple) else found


class Classifier(Module):
    """The base of models that choose one of several classes: logits (..., classes), labels (...)."""

    def validation_step(self, params, batch, state):
        self.plot("loss", _loss(self, params, batch, state), train=False)
        self.plot("acc", self.accuracy(params, batch[:-1], batch[-1], state), train=False)

    def loss(self, params, X, Y, state, averaged=True):
        """(the loss, {}): ``state`` has the model's apply_fn and the key of dropout."""
        Y_hat = state.apply_fn({"params": params}, *X, rngs={"dropout": state.dropout_rng})
        each = optax.softmax_cross_entropy_with_integer_labels(Y_hat, Y).reshape(-1)
        return (each.mean() if averaged else each), {}

    def accuracy(self, params, X, Y, state, averaged=True):
        Y_hat = state.apply_fn({"params": params}, *X, rngs={"dropout": state.dropout_rng})
        right = (Y_hat.argmax(-1) == Y).astype("float32").reshape(-1)
        return right.mean() if averaged else right


# ---- encoders and decoders


class Encoder(nn.Module):
    """The base of encoders: (X, valid_lens, training=False) -> what a decoder's init_state takes."""

    def __call__(self, X, *args, training=False):
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class Decoder(nn.Module, training.Decoder):
    """The base of decoders: init_state(enc_outputs, valid_lens) gives a state, (X, state, training=False) -> (logits,
    state)."""

    def __call__(self, X, state, *args, training=False):
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class AttentionDecoder(Decoder):
    """The base of decoders with attention, which sow their weights as "dec_attention_weights" in "intermediates"."""


class EncoderDecoder(Classifier):
    """An encoder and a decoder: (src, tgt, valid_lens) -> logits."""

    encoder: nn.Module
    decoder: nn.Module
    training: bool

    def __call__(self, enc_X, dec_X, *args):
        state = self.decoder.init_state(self.encoder(enc_X, *args, training=self.training), *args)
        return self.decoder(dec_X, state, training=self.training)[0]

    def predict_step(self, params, batch, num_steps, save_attention_weights=False):
        """The likeliest next token, ``num_steps`` times: (tokens (batch, num_steps), (the decoder's weights in each step, the
        encoder's)), as both sow them."""
        src, tgt, valid_lens, _ = batch
        if "_programs" not in vars(self):  # compiled once, past flax, whose modules are frozen
            parts = (self.encoder, self.decoder)
            vars(self)["_programs"] = [jax.jit(partial(x.apply, training=False, mutable="intermediates")) for x in parts]
        encode, decode = vars(self)["_programs"]
        enc_outputs, sown = encode({"params": params["encoder"]}, src, valid_lens)
        of_encoder = sown.get("intermediates", {}).get("enc_attention_weights", [[]])[0] if save_attention_weights else []
        state = self.decoder.init_state(enc_outputs, valid_lens)
        outputs, attention_weights = [tgt[:, :1]], []
        for _ in range(num_steps):
            (Y, state), sown = decode({"params": params["decoder"]}, outputs[-1], state)
            outputs.append(Y.argmax(2))
            if save_attention_weights:
                attention_weights.append(sown["intermediates"]["dec_attention_weights"][0])
        return jnp.concatenate(outputs[1:], 1), (attention_weights, of_encoder)


class Seq2SeqEncoder(Encoder):
    """A GRU over embedded tokens: X (batch, steps) -> (outputs (steps, batch, h), state (num_layers, batch, h))."""

    vocab_size: int
    embed_size: int
    num_hiddens: int
    num_layers: int
    dropout: float = 0.0
    seed: layers.Seed = _keyword(default=None)

    def setup(self):
        self.embedding = nn.Embed(self.vocab_size, self.embed_size, embedding_init=_initializer("embedding", self.seed))
        self.rnn = GRU(self.num_hiddens, self.num_layers, self.dropout, seed=layers.child(self.seed, "rnn"))

    def __call__(self, X, *args, training=False):
        return self.rnn(self.embedding(X.T.astype("int32")), training=training)


class Seq2Seq(EncoderDecoder):
    """An encoder and a decoder that learn to translate, by Adam; padding in the labels costs nothing."""

    tgt_pad: int
    lr: float

    def validation_step(self, params, batch, state):
        self.plot("loss", _loss(self, params, batch, state), train=False)

    def loss(self, params, X, Y, state, averaged=False):
        mask = (Y.reshape(-1) != self.tgt_pad).astype("float32")
        return (super().loss(params, X, Y, state, averaged=False)[0] * mask).sum() / mask.sum(), {}

    def configure_optimizers(self):
        return optax.adam(self.lr)
