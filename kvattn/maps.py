"""The attention weights of one forward pass, layer by layer."""

from __future__ import annotations

import importlib
from typing import Any

from kvattn import weights


def attention_maps(model: Any, *inputs: Any, **options: Any) -> dict[str, Any]:
    """Call a model once and give the attention weights of each of its attention layers: {name: weights}.

    Args:
        model: a layer of kvattn, a model of the framework that holds some, or, with attention weights of its own, a model of
            Hugging Face's transformers. JAX's modules take their variables before the inputs. The model is called as it
            stands: dropout is as its mode, or ``training=``, has it, and the weights are those before dropout.
        inputs, options: what the model is called with. PyTorch records no gradients.

    Returns:
        Names as the framework has them for the layers ("blks.block0.attention"; transformers': "layers.0", "encoder.0",
        "decoder.0", "cross.0"), in the model's order; weights (batch, heads, n, m), or (batch, n, m) of a layer without heads.
        Of a layer that was called more than once, those of the last call.

    Raises:
        TypeError: for what is no layer. ValueError: if no attention layer was called, or in a graph, where none leaves weights.

    >>> from kvattn import numpy as kv
    >>> layer = kv.MultiHeadAttention(8, 2)
    >>> x = kv.ones((1, 3, 8))
    >>> {name: weights.shape for name, weights in kv.attention_maps(layer, x, x, x).items()}
    {'attention': (1, 2, 3, 3)}
    """
    bases = {f"{base.__module__}.{base.__name__}" for base in type(model).__mro__}
    if "transformers.modeling_utils.PreTrainedModel" in bases:
        home = importlib.import_module("kvattn.integrations.transformers")
    else:
        home = weights._framework(model)
    found: dict[str, Any] = home.maps(model, inputs, options)
    if not found:
        raise ValueError(
            f"no attention layer of {type(model).__name__} left its weights: it has none of kvattn's that was called outside "
            "of a graph, or a transformers model attends by other means (model.set_attn_implementation('kvattn'))"
        )
    return found
