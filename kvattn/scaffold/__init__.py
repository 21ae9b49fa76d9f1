"""What lessons stand on beside attention: a recurrent layer, text to translate, and the classes that train a model.

Their names and calls are those of d2l's lessons, `from kvattn import torch as d2l` in the place of `from d2l import ...`;
each namespace loads them when they are asked for. One file a framework, over what has no framework: data.py, the text and
its batches, and training.py. No data set is downloaded: what d2l downloads is made here.

GRU, one layer, the same in every framework from one ``seed`` and by the weights' names. In each step and cell, with the
gates' columns of each matrix in the order r, z, c (PyTorch's form, which is Keras's reset_after too):

    r, z = sigmoid(x W_x + b_x + h W_h + b_h)        c = tanh(x W_x + b_x + r * (h W_h + b_h))        h' = (1 - z) c + z h

    cells.0.W_x (in, 3 h)   cells.0.b_x (3 h,)   cells.0.W_h (h, 3 h)   cells.0.b_h (3 h,)   cells.1. ...

X (steps, batch, in), time first -> outputs (steps, batch, h), state: the last h of each cell, (num_layers, batch, h); in
TensorFlow, as in d2l, a list. Between cells is dropout.

Source: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder".
"""

from __future__ import annotations

from typing import Any

_EVERY = (
    "GRU", "MTFraEng", "Vocab", "bleu", "HyperParameters", "ProgressBoard", "add_to_class", "check_len", "DataModule", "Module",
    "Trainer", "Classifier", "try_gpu", "Encoder", "Decoder", "AttentionDecoder", "EncoderDecoder", "Seq2SeqEncoder", "Seq2Seq",
)  # fmt: skip
NAMES = {  # what each namespace has; d2l has a vision transformer in two frameworks
    "numpy": _EVERY,
    "torch": (*_EVERY, "init_seq2seq", "FashionMNIST"),
    "tensorflow": _EVERY,
    "jax": (*_EVERY, "FashionMNIST"),
    "mxnet": _EVERY,
}


def check_gru(num_hiddens: Any, num_layers: Any) -> None:
    """Raises TypeError or ValueError for sizes that are no counts."""
    for name, size in {"num_hiddens": num_hiddens, "num_layers": num_layers}.items():
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"GRU needs {name}, an int, not {size!r}: give it by name, or in the order that help() shows")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")


def check_call(X: Any, H: Any, num_layers: int, num_hiddens: int) -> tuple[Any, ...]:
    """The shape of a first state. Raises ValueError unless X is (steps, batch, features), with a step, and H None or of it."""
    found = tuple(X.shape)
    if len(found) != 3 or found[0] == 0:
        raise ValueError(f"X has shape {found}; expected (steps, batch, features), at least one step")
    shape = (num_layers, found[1], num_hiddens)
    if H is not None:
        state = (len(H), *(H[0].shape if len(H) else ())) if isinstance(H, (list, tuple)) else tuple(H.shape)
        if len(state) != 3 or any(a != b for a, b in zip(state, shape, strict=True) if None not in (a, b)):
            raise ValueError(f"H has shape {state}; expected {shape}: (num_layers, batch, num_hiddens)")
    return shape
