"""Training works: an encoder learns to sort digits with the framework's own optimiser, and five frameworks learn alike."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from kvattn import layers, lesson
from kvattn.layers import analytic

LESSON = Path(__file__).parent.parent / "docs" / "lessons" / "07-transformer.md"

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


def taught(tab):
    """What the lesson on the Transformer has defined on a tab, up to its first training."""
    made = {}
    for cell in lesson.read(LESSON).on(tab):
        if "def batches" in cell.code:
            return made
        exec(compile(cell.code, f"the lesson for {tab}", "exec"), made)
    raise AssertionError("the lesson has no such cell")


def losses(made, first=None):
    """The losses of 20 steps; ``first``: weights to begin with, of NumPy, which computes in their dtype."""
    for name, part, key in analytic.slots(made["model"]) if first else ():
        part._state.arrays[key] = first[name].copy()
    rng = np.random.default_rng(5)
    batches = [made["examples"](rng.choice(made["seen"], 64)) for _ in range(20)]
    return np.array(made["train"](made["model"], batches, "sgd", 0.1)[1])


def test_the_loss_curves_of_an_encoder_and_a_decoder_agree(backends):
    """Those of the lesson, beside one in float64, as far as float32's rounding allows: what a change of each weight by eps
    does to that curve, and eps of the loss itself, thirty-two times, for the operations that a weight goes through."""
    first = {name: w.astype(np.float64) for name, w in taught("numpy")["first_weights"].items()}
    exact = losses(taught("numpy"), first)
    assert exact[-1] < 0.3 * exact[0]
    rng, eps = np.random.default_rng(0), np.finfo(np.float32).eps
    moved = [{name: w * (1 + eps * rng.choice([-1, 1], w.shape)) for name, w in first.items()} for _ in range(3)]
    apart = np.max([np.abs(losses(taught("numpy"), each) - exact) for each in moved], axis=0)
    allowed = 32 * (np.maximum.accumulate(apart) + eps * exact)
    assert allowed.max() < 1e-4
    for name in backends:
        share = np.abs(losses(taught(name)) - exact) / allowed
        assert share.max() <= 1, f"{name}: {share.max():.1f} times what is allowed, at step {share.argmax() + 1}"
