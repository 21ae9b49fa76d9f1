"""Where Hugging Face's checkpoints keep the weights of attention: the names, and how a matrix lies, of each kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kvattn import dispatch

LISTED = 8  # names in an error


class Layout(NamedTuple):
    """The dense layers of an attention block: of q, k, v and o, of which one may hold several, side by side."""

    parts: dict[str, str]
    transposed: bool  # a torch.nn.Linear keeps (features out, in), GPT-2's Conv1D (in, out) as we do
    beside: tuple[str, ...] = ()  # what lies in the block too and is no projection
    norms: tuple[str, ...] = ()  # vectors that some of these models have, by our names


LAYOUTS = {
    "llama": Layout({c: f"{c}_proj" for c in "qkvo"}, True, ("rotary_emb.inv_freq",), ("q_norm", "k_norm")),
    "gpt2": Layout({"qkv": "c_attn", "o": "c_proj"}, False, ("bias", "masked_bias")),  # older files hold causal masks
    "bert": Layout(
        {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}, True,
        ("output.LayerNorm.weight", "output.LayerNorm.bias"),
    ),
    "t5": Layout({c: c for c in "qkvo"}, True, ("relative_attention_bias.weight",)),
}  # fmt: skip


def translated(state: Mapping[str, Any], layout: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The weights of a MultiHeadAttention, by our names, out of the state of an attention block, or of a model.

    ``prefix``: the block's name in the state; names that do not begin with it are left alone.

    >>> eye = np.eye(2, dtype="float32")
    >>> [*translated({f"h.0.attn.{x}.weight": eye for x in "qkvo"}, "t5", prefix="h.0.attn")]
    ['W_q', 'W_k', 'W_v', 'W_o']

    Raises ValueError for a layout that is not known, and where names are missing or left over, which it lists.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, not {layout!r}")
    parts, transposed, beside, norms = LAYOUTS[layout]
    start = f"{prefix.rstrip('.')}." if prefix else ""
    own = {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}
    needed = [f"{part}.weight" for part in parts.values()]
    biases = {f"{part}.bias" for part in parts.values()} | {f"{name}.weight" for name in norms}
    missing, left = [name for name in needed if name not in own], sorted(set(own) - {*needed, *biases, *beside})
    if missing or left:
        wrong = [f"missing: {start}{name}" for name in missing] + [f"left over: {start}{name}" for name in left[:LISTED]]
        wrong += [f"left over: {len(left) - LISTED} more"] if len(left) > LISTED else []
        blocks = sorted(name.removesuffix(needed[0]).rstrip(".") for name in state if name.endswith(f".{needed[0]}"))
        hint = f"\ngive prefix=, the name of one block: {', '.join(map(repr, blocks[:LISTED]))}" if missing and blocks else ""
        raise ValueError(f"this is no {layout} attention block, and nothing was loaded:\n  " + "\n  ".join(wrong) + hint)
    found: dict[str, np.ndarray] = {name: plain(own[f"{name}.weight"]) for name in norms if f"{name}.weight" in own}
    for letters, part in parts.items():
        for kind, name in (("W", f"{part}.weight"), ("b", f"{part}.bias")):
            if name in own:
                x = plain(own[name])
                x = x.T if transposed else x
                if len(letters) > 1 and (not x.ndim or x.shape[-1] % len(letters)):
                    raise ValueError(
                        f"{start}{name} has shape {x.shape}: axis -1 is no multiple of {len(letters)}, for {letters}"
                    )
                each = np.split(x, len(letters), axis=-1) if len(letters) > 1 else [x]
                found |= {f"{kind}_{c}": y for c, y in zip(letters, each, strict=True)}
    return found


def plain(x: Any) -> np.ndarray:
    """Any framework's array as NumPy's; bfloat16 as float32, which holds it."""
    array = np.asarray(dispatch.choose(None, x=x).to_numpy(x))
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
