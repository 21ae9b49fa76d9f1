"""Layers that two replicas train, each on its half of the batch, beside one that has all of it; prints the losses of each.

Run by test_tensorflow.py in a process of its own, since TensorFlow counts its devices once.
"""

import json
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tensorflow as tf

from kvattn import tensorflow as kv

draw = np.random.default_rng(0)
BATCH, N, WIDTH = 8, 6, 8
TOKENS, LENS = draw.integers(0, 20, (BATCH, N)), np.array([6, 5, 4, 3, 2, 6, 0, 6])
X, TARGET = draw.standard_normal((2, BATCH, N, WIDTH))
LAYERS = {
    "MultiHeadAttention": (
        lambda: kv.MultiHeadAttention(
            num_hiddens=WIDTH, num_heads=2, bias=True, num_kv_heads=1, sink=True, seed=1, dtype="float64"
        ),
        3,
    ),
    "AdditiveAttention": (lambda: kv.AdditiveAttention(num_hiddens=6, seed=1, dtype="float64"), 3),
    "TransformerEncoder": (
        lambda: kv.TransformerEncoder(
            20, num_hiddens=WIDTH, norm_shape=[2], ffn_num_hiddens=16, num_heads=2, num_blks=1, seed=1, dtype="float64"
        ),
        1,
    ),
}


def losses(strategy, make, count):
    with strategy.scope():
        layer = make()
        layer(*[TOKENS if count == 1 else X] * count, LENS)
        optimiser = tf.keras.optimizers.Adam(0.01)
        optimiser.build(layer.trainable_variables)

    def step(x, lens, target):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((layer(*[x] * count, lens, training=True) - target) ** 2) / (BATCH * N * WIDTH)
        optimiser.apply_gradients(zip(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables, strict=True))
        return loss

    @tf.function
    def everywhere(*batch):
        return strategy.reduce("SUM", strategy.run(step, batch), axis=None)

    data = tf.data.Dataset.from_tensor_slices((TOKENS if count == 1 else X, LENS, TARGET)).batch(BATCH).repeat(4)
    if strategy.num_replicas_in_sync > 1:
        data = strategy.experimental_distribute_dataset(data)
    return [float(everywhere(*batch)) for batch in data]


def fitted(strategy):
    """By Keras's own loop."""
    with strategy.scope():
        x, lens = tf.keras.Input((N, WIDTH), dtype="float64"), tf.keras.Input((), dtype="int64")
        model = tf.keras.Model([x, lens], LAYERS["MultiHeadAttention"][0]()(x, x, x, lens))
        model.compile("adam", "mse")
    return model.fit([X, LENS], TARGET, BATCH, epochs=3, shuffle=False, verbose=0).history["loss"]


if __name__ == "__main__":
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    one, two = tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found = {name: [losses(strategy, *layer) for strategy in (one, two)] for name, layer in LAYERS.items()}
    found["Keras's fit"] = [fitted(strategy) for strategy in (one, two)]
    page = Path(__file__).parents[2] / "docs" / "howto" / "processes.md"
    with patch.object(tf.distribute, "MirroredStrategy", lambda: two):  # one for each process
        exec(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[-1], {})
    print(json.dumps({"replicas": two.num_replicas_in_sync, "losses": found}))
