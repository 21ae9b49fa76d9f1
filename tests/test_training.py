"""Training works: an encoder learns to sort digits with the framework's own optimiser, and five frameworks learn alike."""

import importlib

import numpy as np
import pytest

from kvattn import layers

DIGITS, LENGTH, BATCH = 10, 6, 32
CONFIG = {"vocab_size": DIGITS, "num_hiddens": 32, "ffn_num_hiddens": 64, "num_heads": 4, "num_blks": 2}


def batches(count, seed):
    """Digits, and the same digits sorted."""
    tokens = np.random.default_rng(seed).integers(0, DIGITS, (count, BATCH, LENGTH))
    return list(zip(tokens, np.sort(tokens, axis=-1), strict=True))


def started(adapter, seed, **config):
    """A classifier whose weights are drawn from ``seed``, the same in every framework."""
    model = adapter.classifier(DIGITS, {**CONFIG, "seed": seed, **config}, batches(1, 0)[0][0])
    drawn = {name: x.shape for name, x in adapter.weights(model).items() if name.startswith("head.")}
    w = adapter.weights(model) | {
        name: layers.initial(seed, name.removeprefix("head."), shape) for name, shape in drawn.items()
    }
    return adapter.load(model, w)


def test_an_encoder_learns_to_sort(backend):
    """That it is not luck, NumPy shows by three seeds: each draws the same first values in every framework."""
    adapter = importlib.import_module(f"adapters.{backend}")
    for seed in range(3 if backend == "numpy" else 1):
        _, model = adapter.train(started(adapter, seed), batches(400, seed), "adam", 2e-3)
        right = [np.mean(adapter.call(model, tokens).argmax(axis=-1) == labels) for tokens, labels in batches(8, 100 + seed)]
        assert np.mean(right) > 0.95


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_loss_curves_agree(backends, dropout):
    """With an activation that is smooth: what is rounded to another side of a kink is learnt from in another way."""
    curves = {}
    for name in backends:
        adapter = importlib.import_module(f"adapters.{name}")
        model = started(adapter, 3, activation="gelu", dropout=dropout)
        curves[name], _ = adapter.train(model, batches(50, 3), "sgd", 0.03, seeded=dropout > 0)
    first = next(iter(curves.values()))
    assert first[-1] < (0.9 if dropout else 0.8) * first[0]
    for name, losses in curves.items():
        np.testing.assert_allclose(losses, first, atol=1e-4, err_msg=name)
