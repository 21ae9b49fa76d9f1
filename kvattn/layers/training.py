"""What trains a NumPy model: a loss with its gradient, and optimisers that read ``layer.grads``."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvattn import checks, conversion


def softmax_cross_entropy(logits: Any, labels: Any) -> tuple[float, np.ndarray]:
    """The mean of -log softmax(logits)[label], and its gradient by the logits, in their dtype.

    logits (..., classes), floating point; labels (...), integers in [0, classes).

    >>> loss, grad = softmax_cross_entropy([[0.0, 0.0]], [1])
    >>> round(loss, 4), grad
    (0.6931, array([[ 0.5, -0.5]]))
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    conversion.floating("logits", logits)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels have dtype {labels.dtype}; expected an integer dtype")
    checks.same_shape("labels", labels, logits.shape[:-1], "the logits without their last axis")
    if not labels.size:
        raise ValueError("there are no labels: the mean of nothing has no value")
    if not 0 <= labels.min() <= labels.max() < logits.shape[-1]:
        raise ValueError(f"labels must lie in [0, {logits.shape[-1]}); got {labels.min()} to {labels.max()}")
    dtype, wide = logits.dtype, np.float64 if logits.dtype == np.float64 else np.float32
    shifted = (logits - logits.max(axis=-1, keepdims=True)).astype(wide)
    total = np.exp(shifted).sum(axis=-1, keepdims=True)
    chosen = labels[..., None]
    loss = (np.log(total) - np.take_along_axis(shifted, chosen, axis=-1)).mean()
    grad = np.exp(shifted) / total
    np.put_along_axis(grad, chosen, np.take_along_axis(grad, chosen, axis=-1) - 1, axis=-1)
    return float(loss), (grad / labels.size).astype(dtype)


class SGD:
    """Stochastic gradient descent: step() subtracts lr times its gradient from every weight that backward has reached."""

    def __init__(self, layer: Any, lr: float) -> None:
        self.layer, self.lr = layer, checks.number("lr", lr)

    def step(self) -> None:
        weights = self.layer.weights()
        for name, grad in self.layer.grads.items():
            weights[name] -= self.lr * grad


class Adam:
    """Adam with bias correction; eps is added to the root of the corrected second moment, as in PyTorch.

    Source: Kingma and Ba 2014, "Adam: a method for stochastic optimization", algorithm 1.
    """

    def __init__(self, layer: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.layer, self.lr = layer, checks.number("lr", lr)
        self.betas, self.eps = tuple(checks.probability("betas", beta) for beta in betas), checks.number("eps", eps)
        self.moments: dict[str, tuple[int, Any, Any]] = {}  # by name: steps, and the averages of the gradient and its square

    def step(self) -> None:
        first, second = self.betas
        weights = self.layer.weights()
        for name, grad in self.layer.grads.items():
            t, mean, square = self.moments.get(name, (0, 0.0, 0.0))
            t, mean, square = t + 1, first * mean + (1 - first) * grad, second * square + (1 - second) * grad * grad
            self.moments[name] = t, mean, square
            weights[name] -= self.lr * (mean / (1 - first**t)) / (np.sqrt(square / (1 - second**t)) + self.eps)
