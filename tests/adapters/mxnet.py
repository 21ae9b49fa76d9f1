"""How the shared tests of layers speak to MXNet's; NumPy arrays in, NumPy arrays out."""

import numpy as np

from adapters import load, shown, weights, with_state, without_state  # noqa: F401
from kvattn import mxnet as kv
from kvattn.backends.mxnet import asarray, is_array, mx  # which imports MXNet on today's NumPy


@mx.util.use_np
def layer(name, **config):
    """A layer of kvattn's, by the names of its PyTorch arguments."""
    made = getattr(kv, name)(**config)
    made.initialize()
    return made


@mx.util.use_np
def call(layer, *inputs, training=False, **options):
    """The outputs as NumPy arrays: one, or a tuple. Integer inputs are tokens or lengths; options may hold arrays too."""
    with mx.autograd.train_mode() if training else mx.autograd.predict_mode():
        return _plain(_called(layer, [*map(_tensor, inputs)], {name: _tensor(x) for name, x in options.items()}))


@mx.util.use_np
def gradients(layer, inputs, grad_output, **options):
    """(gradients by the floating-point inputs, {weight's name: gradient in its exported shape})."""
    tensors = [_tensor(x) for x in inputs]
    leaves = [x for x in tensors if is_array(x) and x.dtype.kind == "f"]
    for leaf in leaves:
        leaf.attach_grad()
    with mx.autograd.record(train_mode=False):
        output = _called(layer, tensors, {name: _tensor(x) for name, x in options.items()})
    (output[0] if isinstance(output, tuple) else output).backward(_tensor(grad_output), train_mode=False)
    values = weights(layer)
    for parameter in layer.collect_params().values():  # a weight's gradient is read as a weight is: put it there, export
        parameter.set_data(parameter.grad())
    by_weights = weights(layer)
    load(layer, values)
    return [x.grad.asnumpy() for x in leaves], by_weights


def _called(layer, inputs, options):
    return without_state(layer, inputs, layer(*with_state(layer, inputs), **options))


def _tensor(x):
    if isinstance(x, list):
        return [*map(_tensor, x)]
    return asarray(x) if isinstance(x, np.ndarray) else x


def _plain(x):
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):  # a cache stays as it is
        return type(x)(map(_plain, x))
    return kv.to_numpy(x) if is_array(x) else x


class _Classifier(mx.gluon.Block):
    """An encoder and a dense layer on top: tokens (batch, n) -> logits (batch, n, classes)."""

    def __init__(self, classes, config):
        super().__init__()
        self.encoder = kv.TransformerEncoder(**config)
        self.head = mx.gluon.nn.Dense(classes, flatten=False)

    def forward(self, tokens, rng=None):
        return self.head(self.encoder(tokens, **({} if rng is None else {"rng": rng})))


@mx.util.use_np
def classifier(classes, config, tokens):
    """An encoder with a dense layer called head on top, its weights made."""
    model = _Classifier(classes, config)
    model.initialize()
    model(_tensor(tokens))
    return model


@mx.util.use_np
def train(model, batches, optimizer, lr, seeded=False):
    """Minimise the mean cross-entropy over the (tokens, labels) of each batch in turn; returns the losses and the model.

    ``seeded``: each step draws its dropout from its own number.
    """
    trainer = mx.gluon.Trainer(model.collect_params(), optimizer, {"learning_rate": lr})
    loss_of = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    losses = []
    for i, (tokens, labels) in enumerate(batches):
        with mx.autograd.record():
            loss = loss_of(model(_tensor(tokens), i if seeded else None), _tensor(labels)).mean()
        loss.backward()
        trainer.step(1)
        losses.append(loss.item())
    return losses, model
