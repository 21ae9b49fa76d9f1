"""How the shared tests of layers speak to JAX's; NumPy arrays in, NumPy arrays out."""

import inspect
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from adapters import decoding, with_state, without_state
from kvattn import jax as kv


@dataclass
class Layer:
    """A module and its variables, which JAX keeps apart."""

    module: nn.Module
    variables: Any = None
    shown: Any = None  # of the last call

    @property
    def num_blks(self):
        return getattr(self.module, "num_blks", 1)

    def __call__(self, *inputs, training=False, **options):
        """The outputs as the other frameworks' layers return them: the weights stay here unless asked for."""
        given, options = list(map(_array, inputs)), {name: _array(x) for name, x in options.items()}
        inputs = with_state(self, given)
        if self.variables is None:
            self.variables = self.module.init(kv.get_key(), *inputs, **options)
        if "training" in inspect.signature(self.module.__call__).parameters:
            options["training"] = training
        results, sown = self.module.apply(
            self.variables, *inputs, **options, rngs={"dropout": kv.get_key()}, mutable="intermediates"
        )
        sown = sown.get("intermediates", {})
        if "enc_attention_weights" in sown:
            (self.shown,) = sown["enc_attention_weights"]
        if "dec_attention_weights" in sown:
            (self.shown,) = sown["dec_attention_weights"]
        shows = isinstance(results, tuple) and not isinstance(self.module, kv.GRU)  # whose second result is its state
        if decoding(self):
            results = without_state(self, given, results[:2])
        elif shows and "return_weights" not in options:
            output, self.shown, *rest = results
            results = (output, *rest) if rest else output
        return results


def layer(name, **config):
    """A layer of kvattn's, by the names of its PyTorch arguments."""
    return Layer(getattr(kv, name)(**config))


def call(layer, *inputs, training=False, **options):
    """The outputs as NumPy arrays: one, or a tuple. Integer inputs are tokens or lengths; options may hold arrays too."""
    return _plain(layer(*inputs, training=training, **options))


def gradients(layer, inputs, grad_output, **options):
    """(gradients by the floating-point inputs, {weight's name: gradient in its exported shape})."""
    if layer.variables is None:
        call(layer, *inputs, **options)  # sizes from the first call
    arrays = list(map(_array, inputs))
    floats = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

    def output(variables, *leaves):
        given = dict(enumerate(arrays)) | dict(zip(floats, leaves, strict=True))
        results = layer.module.apply(variables, *with_state(layer, [*given.values()]), **options)
        return results[0] if isinstance(results, tuple) else results

    # one program for all operations takes less to compile than one for each of them
    pulled = jax.jit(lambda grad_output, *at: jax.vjp(output, *at)[1](grad_output))
    by_variables, *by_inputs = pulled(_array(grad_output), layer.variables, *(arrays[i] for i in floats))
    return list(map(np.asarray, by_inputs)), kv.export_weights(by_variables)


def weights(layer):
    """{name: NumPy array}: kvattn.export_weights."""
    return kv.export_weights(layer.variables)


def load(layer, arrays):
    """The layer with these weights: kvattn.import_weights."""
    return Layer(layer.module, kv.import_weights(layer.module if layer.variables is None else layer.variables, arrays))


def shown(layer):
    """The attention weights of the last call."""
    return _plain(layer.shown)


def _array(x):
    if isinstance(x, list):
        return [*map(_array, x)]
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _plain(x):
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):  # a cache stays as it is
        return type(x)(map(_plain, x))
    if not isinstance(x, jax.Array):
        return x
    return kv.to_numpy(x)


class _Classifier(nn.Module):
    """An encoder and a dense layer on top: tokens (batch, n) -> logits (batch, n, classes)."""

    classes: int
    config: dict

    def setup(self):
        self.encoder = kv.TransformerEncoder(**self.config)
        self.head = nn.Dense(self.classes)

    def __call__(self, tokens, training=False, rng=None):
        return self.head(self.encoder(tokens, training=training, rng=rng))


def classifier(classes, config, tokens):
    """An encoder with a dense layer called head on top, its weights made."""
    model = Layer(_Classifier(classes, config))
    model(tokens)
    return model


def train(model, batches, optimizer, lr, seeded=False):
    """Minimise the mean cross-entropy over the (tokens, labels) of each batch in turn; returns the losses and the model.

    ``seeded``: each step draws its dropout from its own number.
    """
    optimizer = {"sgd": optax.sgd, "adam": optax.adam}[optimizer](lr)

    @jax.jit
    def step(params, state, key, seed, tokens, labels):
        def loss(params):
            drops = {"rng": seed} if seeded else {"rngs": {"dropout": key}}
            logits = model.module.apply({"params": params}, tokens, training=True, **drops)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    params = model.variables["params"]
    state, losses = optimizer.init(params), []
    for i, (tokens, labels) in enumerate(batches):
        loss, params, state = step(params, state, kv.get_key(), i, tokens, labels)
        losses.append(float(loss))
    return losses, Layer(model.module, {"params": params})
