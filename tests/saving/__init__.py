"""Every way in which each framework saves a layer, for tests/test_saving.py: one file a framework, which has them by name.

A file's ``model()`` is a user's own model, which holds every layer, by attribute and in what else the framework looks into.
"""

import os

# (saved, fresh, inputs, path) -> the layer that comes back; fresh() makes one that has other weights, or none yet
WAYS = {
    "numpy": "npz",
    "torch": "state_dict file file_after_a_call safetensors_of_a_dict safetensors_of_a_model",
    "tensorflow": "checkpoint checkpoint_before_the_first_call checkpoint_of_a_functional_model checkpoint_manager weights_h5 "
    "lists_of_weights",
    "jax": "to_bytes msgpack",
    "mxnet": "parameters parameters_after_a_call arrays",
}
# (saved, inputs, path) -> the layer that comes back, of the way's own making
COPIES = {
    "numpy": "deepcopy",
    "torch": "deepcopy pickle",
    "tensorflow": "deepcopy configuration keras_file",
    "jax": "deepcopy pickle npz",
    "mxnet": "deepcopy",
}
# (saved, inputs, path) -> what gives the outputs and is no layer any more, and how many weights it has
SERVED = {"tensorflow": "export saved_model", "jax": "nnx", "mxnet": "export"}

# What a framework does not do with layers of its own either: (framework, way, case).
EXCEPT = {
    # a subclassed keras.Model loses the values that wait for its first call, of keras.layers.Dense too
    ("tensorflow", "checkpoint_before_the_first_call", "a model of all layers"),
    # the serving signature that Keras adds to a subclassed model takes one argument
    ("tensorflow", "saved_model", "a model of all layers"),
    # Keras and flax read what is asked for, and say nothing of the rest
    ("tensorflow", "weights_h5", "a block too many"),
    *(("jax", way, case) for way in ("to_bytes", "msgpack") for case in ("a block too many", "biases")),
}
# What takes long and is asked where KVATTN_EVERY is set: TensorFlow finds a model's layers here as in "checkpoint", which is
# asked each time, and its list of weights as in "configuration".
WEEKLY = {
    ("tensorflow", way, "a model of all layers")
    for way in ("checkpoint_of_a_functional_model", "checkpoint_manager", "lists_of_weights")
}
EXCEPT |= set() if "KVATTN_EVERY" in os.environ else WEEKLY

HEADS = {"num_hiddens": 8, "num_heads": 4}
LAYERS = {
    "DotProductAttention": {},
    "AdditiveAttention": {"num_hiddens": 5},
    "MultiplicativeAttention": {},
    "GatedAttention": {},
    "MultiHeadAttention": {
        **HEADS,
        "num_kv_heads": 2,
        "bias": True,
        "rotary": {"interleaved": True},
        "sink": True,
        "alibi": [0.5, 0.25, 0.125, 1.0],
    },
    "PositionalEncoding": {"num_hiddens": 8},
    "AddNorm": {"norm_shape": 8},
    "PositionWiseFFN": {"ffn_num_hiddens": 5, "ffn_num_outputs": 8},
    "TransformerEncoderBlock": {**HEADS, "ffn_num_hiddens": 12},
    "TransformerEncoder": {**HEADS, "vocab_size": 11, "ffn_num_hiddens": 12, "num_blks": 2},
    "TransformerDecoder": {**HEADS, "vocab_size": 11, "ffn_num_hiddens": 12, "num_blks": 2, "num_kv_heads": 2, "sink": True},
}


def arguments(name, X, tokens, lens):
    """What a layer of this name is called with: X (batch, n, 8), tokens (batch, n) below 11, lens (batch,)."""
    if name == "TransformerEncoder":
        return tokens, lens
    if name == "TransformerDecoder":
        return tokens, [X, lens, [None, None]]
    if name == "TransformerEncoderBlock":
        return X, lens
    return (X, X, X, lens) if name.endswith("Attention") else (X, X) if name == "AddNorm" else (X,)


def output(name, results):
    """What a layer of this name gives, without a decoder's state."""
    return results[0] if name == "TransformerDecoder" else results
