"""TensorFlow's and Keras's ways."""

import copy

import keras
import tensorflow as tf
from adapters.tensorflow import call

from kvattn import tensorflow as kv
from saving import LAYERS, arguments, output

ERRORS = (ValueError, AssertionError)  # tf.train.Checkpoint's, where all of a file is asked for, is an assertion


@keras.saving.register_keras_serializable("tests")
class Model(keras.Model):
    """Of layers by attribute: in a list tf.train.Checkpoint finds no layer of Keras's, whoever made it."""

    def __init__(self, **options):
        super().__init__(**options)
        for name, config in LAYERS.items():
            setattr(self, name, getattr(kv, name)(**config))

    def call(self, X, tokens, lens, training=None):
        given = {name: arguments(name, X, tokens, lens) for name in LAYERS}
        return tuple(output(name, getattr(self, name)(*inputs, training=training)) for name, inputs in given.items())

    def build_from_config(self, config):
        shape = config["input_shape"]
        self(tf.zeros(shape), tf.zeros(shape[:2], "int32"), tf.zeros(shape[:1], "int32"))


def model():
    return Model()


def functional(layer, inputs):
    symbols = [keras.Input(x.shape[1:], dtype=x.dtype) for x in inputs]
    return keras.Model(symbols, layer(*symbols))


def called(layer, inputs):
    call(layer, *inputs)
    return layer


def checkpoint(saved, fresh, inputs, path):
    other = called(fresh(), inputs)
    file = tf.train.Checkpoint(layer=saved).save(path / "checkpoint")
    tf.train.Checkpoint(layer=other).restore(file).assert_consumed()
    return other


def checkpoint_before_the_first_call(saved, fresh, inputs, path):
    other = fresh()
    status = tf.train.Checkpoint(layer=other).restore(tf.train.Checkpoint(layer=saved).save(path / "checkpoint"))
    called(other, inputs)
    status.assert_consumed()
    return other


def checkpoint_of_a_functional_model(saved, fresh, inputs, path):
    other = fresh()
    file = tf.train.Checkpoint(model=functional(saved, inputs)).write(path / "checkpoint")
    tf.train.Checkpoint(model=functional(other, inputs)).read(file).assert_consumed()
    return other


def checkpoint_manager(saved, fresh, inputs, path):
    other = called(fresh(), inputs)
    tf.train.CheckpointManager(tf.train.Checkpoint(layer=saved), path, max_to_keep=1).save()
    tf.train.Checkpoint(layer=other).restore(tf.train.latest_checkpoint(path)).assert_consumed()
    return other


def weights_h5(saved, fresh, inputs, path):
    other = fresh()
    functional(saved, inputs).save_weights(path / "layer.weights.h5")
    functional(other, inputs).load_weights(path / "layer.weights.h5")
    return other


def lists_of_weights(saved, fresh, inputs, path):
    other = called(fresh(), inputs)
    other.set_weights(saved.get_weights())
    return other


def configuration(saved, inputs, path):
    config = keras.saving.serialize_keras_object(saved)
    other = called(keras.saving.deserialize_keras_object(config), inputs)
    other.set_weights(saved.get_weights())
    return other


def keras_file(saved, inputs, path):
    functional(saved, inputs).save(path / "model.keras")
    return keras.models.load_model(path / "model.keras").layers[-1]


def deepcopy(saved, inputs, path):
    return copy.deepcopy(saved)


def export(saved, inputs, path):
    functional(saved, inputs).export(str(path / "served"), verbose=False)
    served = tf.saved_model.load(str(path / "served"))
    return lambda *inputs: served.serve([tf.constant(x) for x in inputs]), len(served.variables)


def saved_model(saved, inputs, path):
    """Of a module of TensorFlow's, around the layer."""
    module = tf.Module()
    module.layer, module.run = saved, tf.function(saved.__call__)
    module.run(*map(tf.constant, inputs))
    tf.saved_model.save(module, str(path / "served"))
    served = tf.saved_model.load(str(path / "served"))
    return lambda *inputs: served.run(*map(tf.constant, inputs)), len(saved.weights)
