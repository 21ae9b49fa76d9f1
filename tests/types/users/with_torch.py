"""What a type checker sees of kvattn on PyTorch; it is not run."""

from typing import assert_type

from torch import Tensor, nn

import kvattn
from kvattn import torch as kv


def calls(x: Tensor) -> None:
    assert_type(kvattn.attention(x, x, x, causal=True), Tensor)
    assert_type(kvattn.attention(x, x, x, return_weights=True, return_lse=True), tuple[Tensor, Tensor, Tensor])
    assert_type(kv.attention(x, x, x, return_weights=True), tuple[Tensor, Tensor])
    assert_type(kv.attention(x, x, x, score=kv.dot_score, bias=x), Tensor)
    assert_type(kv.softmax(x), Tensor)
    assert_type(kv.gated_score(x, x, x), Tensor)
    assert_type(kv.rotary(x, 3), Tensor)
    layer: nn.Module = kv.MultiHeadAttention(8, 2)
    assert kv.export_weights(layer)
