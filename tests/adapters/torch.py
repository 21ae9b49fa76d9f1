"""How the shared tests of layers speak to PyTorch's; NumPy arrays in, NumPy arrays out."""

import numpy as np
import torch

from adapters import load, shown, weights, with_state, without_state  # noqa: F401
from kvattn import torch as kv


def layer(name, **config):
    """A layer of kvattn's, by the names of its PyTorch arguments."""
    return getattr(kv, name)(**config)


def call(layer, *inputs, training=False, **options):
    """The outputs as NumPy arrays: one, or a tuple. Integer inputs are tokens or lengths; options may hold arrays too."""
    layer.train(training)
    with torch.no_grad():
        return _plain(_called(layer, [*map(_tensor, inputs)], {name: _tensor(x) for name, x in options.items()}))


def gradients(layer, inputs, grad_output, **options):
    """(gradients by the floating-point inputs, {weight's name: gradient in its exported shape})."""
    layer.eval()
    call(layer, *inputs, **options)  # sizes from the first call
    tensors = [_tensor(x) for x in inputs]
    leaves = [x.requires_grad_() for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    layer.zero_grad()
    output = _called(layer, tensors, {name: _tensor(x) for name, x in options.items()})
    (output[0] if isinstance(output, tuple) else output).backward(_tensor(grad_output))
    values = weights(layer)
    with torch.no_grad():  # a weight's gradient is read as a weight is: put it there, export, put the values back
        for parameter in layer.parameters():
            parameter.copy_(parameter.grad)
    by_weights = weights(layer)
    load(layer, values)
    return [x.grad.numpy() for x in leaves], by_weights


def _called(layer, inputs, options):
    return without_state(layer, inputs, layer(*with_state(layer, inputs), **options))


def _tensor(x):
    if isinstance(x, list):
        return [*map(_tensor, x)]
    return torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x


def _plain(x):
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):  # a cache stays as it is
        return type(x)(map(_plain, x))
    if not isinstance(x, torch.Tensor):
        return x
    return kv.to_numpy(x)


class _Classifier(torch.nn.Module):
    """An encoder and a dense layer on top: tokens (batch, n) -> logits (batch, n, classes)."""

    def __init__(self, classes, config):
        super().__init__()
        self.encoder = kv.TransformerEncoder(**config)
        self.head = torch.nn.LazyLinear(classes)

    def forward(self, tokens, rng=None):
        return self.head(self.encoder(tokens, rng=rng))


def classifier(classes, config, tokens):
    """An encoder with a dense layer called head on top, its weights made."""
    model = _Classifier(classes, config)
    model(torch.from_numpy(tokens))
    return model


def train(model, batches, optimizer, lr, seeded=False):
    """Minimise the mean cross-entropy over the (tokens, labels) of each batch in turn; returns the losses and the model.

    ``seeded``: each step draws its dropout from its own number.
    """
    step = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](model.parameters(), lr=lr)
    model.train()
    losses = []
    for i, (tokens, labels) in enumerate(batches):
        loss = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(tokens), i if seeded else None).flatten(0, 1), torch.from_numpy(labels).flatten()
        )
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    return losses, model
