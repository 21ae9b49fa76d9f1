"""How the shared tests of layers speak to TensorFlow's; NumPy arrays in, NumPy arrays out."""

import keras
import numpy as np
import tensorflow as tf

from adapters import load, shown, weights, with_state, without_state  # noqa: F401
from kvattn import tensorflow as kv


def layer(name, **config):
    """A layer of kvattn's, by the names of its PyTorch arguments."""
    return getattr(kv, name)(**config)


def call(layer, *inputs, training=False, **options):
    """The outputs as NumPy arrays: one, or a tuple. Integer inputs are tokens or lengths; options may hold arrays too."""
    options = {"training": training, **{name: _tensor(x) for name, x in options.items()}}
    return _plain(_called(layer, [*map(_tensor, inputs)], options))


def gradients(layer, inputs, grad_output, **options):
    """(gradients by the floating-point inputs, {weight's name: gradient in its exported shape})."""
    call(layer, *inputs, **options)  # sizes from the first call
    tensors = [_tensor(x) for x in inputs]
    leaves = [x for x in tensors if isinstance(x, tf.Tensor) and x.dtype.is_floating]
    variables = layer.trainable_variables
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        output = _called(layer, tensors, {"training": False, **{name: _tensor(x) for name, x in options.items()}})
        output = output[0] if isinstance(output, tuple) else output
    by_inputs, by_variables = tape.gradient(output, [leaves, [x.value for x in variables]], _tensor(grad_output))
    values = weights(layer)
    for variable, gradient in zip(variables, by_variables, strict=True):
        variable.assign(gradient)  # a weight's gradient is read as a weight is: put it there, export, put the values back
    by_weights = weights(layer)
    load(layer, values)
    return [x.numpy() for x in by_inputs], by_weights


def _called(layer, inputs, options):
    return without_state(layer, inputs, layer(*with_state(layer, inputs), **options))


def _tensor(x):
    if isinstance(x, list):
        return [*map(_tensor, x)]
    return tf.constant(x) if isinstance(x, np.ndarray) else x


def _plain(x):
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):  # a cache stays as it is
        return type(x)(map(_plain, x))
    return kv.to_numpy(x) if tf.is_tensor(x) else x


def classifier(classes, config, tokens):
    """An encoder with a dense layer called head on top, its weights made."""
    inputs = keras.Input(tokens.shape[1:], dtype="int32")
    encoder = kv.TransformerEncoder(**config, name="encoder")
    return keras.Model(inputs, keras.layers.Dense(classes, name="head")(encoder(inputs)))


def train(model, batches, optimizer, lr, seeded=False):
    """Minimise the mean cross-entropy over the (tokens, labels) of each batch in turn; returns the losses and the model.

    ``seeded``: each step draws its dropout from its own number.
    """
    step = {"sgd": keras.optimizers.SGD(lr), "adam": keras.optimizers.Adam(lr, epsilon=1e-8)}[optimizer]
    step.build(model.trainable_variables)

    @tf.function
    def update(tokens, labels, seed):
        with tf.GradientTape() as tape:
            if seeded:
                logits = model.get_layer("head")(model.get_layer("encoder")(tokens, training=True, rng=seed))
            else:
                logits = model(tokens, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        step.apply(tape.gradient(loss, [x.value for x in model.trainable_variables]))
        return loss

    return [float(update(*map(tf.constant, batch), tf.constant(i))) for i, batch in enumerate(batches)], model
