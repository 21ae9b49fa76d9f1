"""Weights that travel: one name and one shape in every framework (see kvattn/layers/__init__.py), NumPy arrays between."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvattn import layers, layouts, registry
from kvattn.checks import _show

__all__ = ["export_weights", "import_weights", "load_weights", "save_weights"]


def export_weights(layer: Any) -> dict[str, np.ndarray]:
    """Every weight of a layer, or of a model of the framework's own dense, norm and embedding layers around ours.

    JAX keeps weights apart from the layer: give its variables, ``module.init(...)``'s result.

    >>> from kvattn import numpy as kv
    >>> layer = kv.MultiplicativeAttention(seed=0)
    >>> _ = layer(np.ones((1, 2, 3)), np.ones((1, 2, 4)), np.ones((1, 2, 5)))
    >>> {name: x.shape for name, x in export_weights(layer).items()}
    {'W': (3, 4)}
    """
    framework = _framework(layer)
    if hasattr(framework, "check_keeps"):  # where weights can be apart from their layer
        framework.check_keeps(layer)
    found = {name: slot.read() for name, slot in framework.slots(layer).items()}
    layers.check_made(name for name, x in found.items() if x is None)
    return {name: layers.own(name, x).copy() for name, x in found.items()}


def import_weights(layer: Any, weights: Mapping[str, Any], layout: str | None = None, *, prefix: str = "") -> Any:
    """Put exported weights in a layer, which need not have been called before; returns it.

    JAX: give variables, or a module that has none yet; returns new variables.

    A layer that was never called, and so has no values yet for a weight, becomes float64 if one of ``weights`` is, and float32
    otherwise, which holds half precision and bfloat16 exactly. One that has all its values keeps its dtype, to which the new
    ones are rounded, and so does one that was given a dtype: ``.half()``, ``cast("float16")``, Keras's ``dtype=``.

    Args:
        weights: arrays by kvattn's names; any framework's.
        layout: "llama", "gpt2", "bert" or "t5", for a MultiHeadAttention: ``weights`` are then the state of a Hugging Face
            model's attention block, or of the whole model, a dict of arrays or tensors by the model's names.
        prefix: with a layout, the block's name in the state: "model.layers.0.self_attn".

    A Llama block is a layer with ``rotary=`` and without biases, called with ``causal=True``; Qwen3's has ``qk_norm=`` too,
    its rms_norm_eps (Gemma 3 keeps these norms less 1: add it); GPT-2's has biases and is called with ``causal=True``; BERT's
    has biases; T5's has none and is called with ``scale=1.0`` and, in the first block of a stack, with ``bias=``, made of its
    relative_attention_bias.

    Raises TypeError for weights that are no dict, and ValueError, listing every name that is missing or unknown and every
    shape that differs. Raises TypeError for float64 and a Keras layer of float32 that was never called, or a flax module
    that takes tokens, without JAX's 64 bits. Then nothing is changed.
    """
    if not hasattr(weights, "items"):
        raise TypeError(
            f"weights must be a dict of arrays by name, not {type(weights).__name__}: export_weights gives one, "
            "and a PyTorch model's state_dict()"
        )
    if layout is not None:
        weights = layouts.translated(weights, layout, prefix)
    elif prefix:
        raise ValueError(f"prefix is {prefix!r}, but no layout is given, of {', '.join(layouts.LAYOUTS)}")
    framework = _framework(layer)
    arrays = {name: layouts.plain(x) for name, x in weights.items()}
    expected = {name: slot.shape for name, slot in framework.slots(layer).items()}
    wrong = [f"missing: {name} {_show(shape)}" for name, shape in expected.items() if name not in arrays]
    wrong += [f"unknown: {name} {x.shape}" for name, x in arrays.items() if name not in expected]
    wrong += [
        f"{name} has shape {x.shape}; expected {_show(expected[name])}"
        for name, x in arrays.items()
        if name in expected
        and not (len(x.shape) == len(own := expected[name]) and all(b in (None, a) for a, b in zip(x.shape, own, strict=True)))
    ]
    wrong += [f"{name} has dtype {x.dtype}; expected floating point" for name, x in arrays.items() if x.dtype.kind != "f"]
    if wrong:
        raise ValueError("these weights do not fit, and nothing was loaded:\n  " + "\n  ".join(wrong))
    if any(x.dtype.itemsize > 4 for x in arrays.values()):  # one dtype for all, since a layer has one
        arrays = {name: x.astype(np.float64) for name, x in arrays.items()}
    return framework.assign(layer, arrays)


def save_weights(layer: Any, path: str | Path) -> None:
    """`export_weights`, or a dict of arrays, in a .safetensors file. Needs safetensors, of the extra ``weights``."""
    arrays = layer if _plain(layer) else export_weights(layer)
    _safetensors().save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)


def load_weights(path: str | Path, layer: Any = None, layout: str | None = None, *, prefix: str = "") -> Any:
    """The arrays of a .safetensors file by name, or, given a layer, what `import_weights` returns for them.

    bfloat16 comes as float32, which holds it. Raises ValueError, naming the file, for one that is damaged, and for other dtypes
    that NumPy has not.
    """
    read = _safetensors()
    with open(path, "rb"):  # that it is there, and a file, Python says better
        pass
    try:
        arrays = {name: layouts.plain(x) for name, x in _arrays(read, path).items()}
    except OSError:
        raise
    except Exception as error:  # its own class of error, which names no file; and NumPy's, of dtypes that it has not
        raise ValueError(f"{path} is no .safetensors file that can be read: {error}") from None
    return arrays if layer is None else import_weights(layer, arrays, layout, prefix=prefix)


def _arrays(read: Any, path: str | Path) -> Any:
    try:
        return read.load_file(path)
    except (TypeError, AttributeError):  # a dtype that NumPy has not; safetensors 0.4 raises the second, later ones the first
        parts: Any = importlib.import_module("safetensors")
        return {name: _array(**x) for name, x in parts.deserialize(Path(path).read_bytes())}


def _array(dtype: str, shape: list[int], data: bytearray) -> np.ndarray:
    """An array of a .safetensors file, which names dtypes F32, I64, BF16; bfloat16 is half a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(data, "?" if dtype == "BOOL" else f"<{dtype[0].lower()}{int(dtype[1:]) // 8}").reshape(shape)


def _plain(x: Any) -> bool:
    return isinstance(x, Mapping) and all(isinstance(y, np.ndarray) for y in x.values())


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        from kvattn import install

        raise ImportError(f"weights are kept in .safetensors files: {install.line('weights')}") from error
    return safetensors.numpy


_FAMILIES = {"torch": "torch", "keras": "tensorflow", "tensorflow": "tensorflow", "flax": "jax", "mxnet": "mxnet"}
_BASES = {"analytic": "numpy", "keras": "tensorflow"}  # files of kvattn/layers that hold what a framework's layers inherit


def _framework(layer: Any) -> Any:
    """kvattn/layers/<framework>.py, by the layer's own class."""
    for base in type(layer).__mro__:
        package, _, rest = base.__module__.partition(".")
        own = rest.removeprefix("layers.") if rest.startswith("layers.") else ""
        name = _BASES.get(own, own) or _FAMILIES.get(package)
        if name is not None:
            break
    else:
        if not isinstance(layer, Mapping):
            raise TypeError(f"expected a layer of kvattn or of its frameworks, or JAX's variables, not {type(layer).__name__}")
        name = "jax"
    registry.load(name)
    return importlib.import_module(f"kvattn.layers.{name}")
