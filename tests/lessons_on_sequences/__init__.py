"""A lesson's decoder with attention in each framework's own words, and how its models are called there.

A framework's file has what is here too, where it is another there; ``d2l`` is the framework's namespace.
"""

import importlib
from types import SimpleNamespace


def of(backend):
    """The lesson in this framework."""
    d2l = importlib.import_module(f"kvattn.{backend}")

    class Heads(d2l.Module):
        def __init__(self, num_heads):
            super().__init__()
            self.num_heads = num_heads

    def model(encoder, decoder, tgt_pad, lr):
        return d2l.Seq2Seq(encoder, decoder, tgt_pad=tgt_pad, lr=lr)

    def predict(model, trainer, batch, num_steps):
        return model.predict_step(batch, d2l.try_gpu(), num_steps, True)

    own = vars(importlib.import_module(f"lessons_on_sequences.{backend}"))
    return SimpleNamespace(**{"Heads": Heads, "model": model, "predict": predict, **own})
