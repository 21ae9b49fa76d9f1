"""How the shared tests of layers speak to PyTorch's; NumPy arrays in, NumPy arrays out."""

import numpy as np
import torch

from kvattn import torch as kv
from kvattn import weights


def layer(name, **config):
    """A layer of kvattn's, by the names of its PyTorch arguments."""
    return getattr(kv, name)(**config)


def call(layer, *inputs, training=False, **options):
    """The outputs as NumPy arrays: one, or a tuple. Integer inputs are tokens or lengths; options may hold arrays too."""
    layer.train(training)
    with torch.no_grad():
        return _plain(layer(*map(_tensor, inputs), **{name: _tensor(x) for name, x in options.items()}))


def gradients(layer, inputs, grad_output, **options):
    """(gradients by the floating-point inputs, {weight's name: gradient in its exported shape})."""
    layer.eval()
    call(layer, *inputs, **options)  # sizes from the first call
    tensors = [_tensor(x) for x in inputs]
    leaves = [x.requires_grad_() for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    layer.zero_grad()
    layer(*tensors, **{name: _tensor(x) for name, x in options.items()}).backward(_tensor(grad_output))
    values = weights.export_weights(layer)
    with torch.no_grad():  # a weight's gradient is read as a weight is: put it there, export, put the values back
        for parameter in layer.parameters():
            parameter.copy_(parameter.grad)
    by_weights = weights.export_weights(layer)
    weights.import_weights(layer, values)
    return [x.grad.numpy() for x in leaves], by_weights


def shown(layer):
    """The attention weights kept for display."""
    return _plain(layer.attention_weights)


def _tensor(x):
    return torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x


def _plain(x):
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):
        return type(x)(map(_plain, x))
    return x.detach().float().numpy() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else (
        x.detach().numpy() if isinstance(x, torch.Tensor) else x
    )
