"""How the shared tests of layers speak to each framework's, one file a framework; what is alike in them is here."""

import kvattn
from kvattn.weights import export_weights as weights  # noqa: F401
from kvattn.weights import import_weights as load  # noqa: F401


def shown(layer):
    """The attention weights kept for display."""
    found = getattr(layer, "attention", layer).attention_weights
    return None if found is None else kvattn.to_numpy(found)
