"""How the shared tests of layers speak to each framework's, one file a framework; what is alike in them is here."""

import kvattn
from kvattn.weights import export_weights as weights  # noqa: F401
from kvattn.weights import import_weights as load  # noqa: F401


def shown(layer):
    """The attention weights kept for display."""
    found = getattr(layer, "attention", layer).attention_weights
    if isinstance(found, list):
        return [[kvattn.to_numpy(x) for x in each] for each in found]
    return None if found is None else kvattn.to_numpy(found)


def decoding(layer):
    """Whether a layer takes a decoder's state."""
    return type(getattr(layer, "module", layer)).__name__.startswith("TransformerDecoder")


def with_state(layer, inputs):
    """(X, enc_outputs, enc_valid_lens) of a decoder as its call takes them: (X, state). Else the inputs as they are."""
    if not decoding(layer) or isinstance(inputs[1], list):
        return inputs
    X, *others = inputs
    return X, [*others, *[None] * (2 - len(others)), [None] * getattr(layer, "num_blks", len(getattr(layer, "blks", [0])))]


def without_state(layer, inputs, results):
    """The output alone, where the caller gave no state."""
    return results[0] if decoding(layer) and not isinstance(inputs[1], list) else results
