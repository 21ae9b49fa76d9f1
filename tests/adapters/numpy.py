"""How the shared tests of layers speak to NumPy's; NumPy arrays in, NumPy arrays out."""

from adapters import load, shown, weights, with_state, without_state  # noqa: F401
from kvattn import numpy as kv


def layer(name, **config):
    """A layer of kvattn's, by the names of its PyTorch arguments."""
    return getattr(kv, name)(**config)


def call(layer, *inputs, training=False, **options):
    """The outputs as NumPy arrays: one, or a tuple. Integer inputs are tokens or lengths; options may hold arrays too."""
    return without_state(layer, inputs, layer(*with_state(layer, inputs), training=training, **options))


def gradients(layer, inputs, grad_output, **options):
    """(gradients by the floating-point inputs, {weight's name: gradient in its exported shape})."""
    layer(*with_state(layer, inputs), record=True, **options)
    by_inputs = layer.backward(grad_output)
    return list(by_inputs) if isinstance(by_inputs, tuple) else [by_inputs], layer.grads


class _Classifier(kv.Layer):
    """An encoder and a dense layer on top: tokens (batch, n) -> logits (batch, n, classes)."""

    def __init__(self, classes, config):
        self.encoder = kv.TransformerEncoder(**config)
        self.head = kv.Dense(classes)

    def forward(self, tokens, *, rng=None):
        return self.head(self.encoder(tokens, rng=rng))

    def vjp(self, grad):
        return self.encoder.backward(self.head.backward(grad))


def classifier(classes, config, tokens):
    """An encoder with a dense layer called head on top, its weights made."""
    model = _Classifier(classes, config)
    model(tokens)
    return model


def train(model, batches, optimizer, lr, seeded=False):
    """Minimise the mean cross-entropy over the (tokens, labels) of each batch in turn; returns the losses and the model.

    ``seeded``: each step draws its dropout from its own number.
    """
    step = {"sgd": kv.SGD, "adam": kv.Adam}[optimizer](model, lr)
    losses = []
    for i, (tokens, labels) in enumerate(batches):
        logits = model(tokens, training=True, rng=i if seeded else None)
        loss, grad = kv.softmax_cross_entropy(logits, labels)
        model.backward(grad)
        step.step()
        losses.append(loss)
    return losses, model
