"""kvattn as an attention implementation of Hugging Face transformers.

>>> from kvattn.integrations import transformers as integration  # doctest: +SKIP
>>> integration.register()  # doctest: +SKIP
>>> model.set_attn_implementation("kvattn")  # or "kvattn-jax", ...  # doctest: +SKIP

"kvattn" computes on the model's own tensors, gradients and dropout included. "kvattn-numpy", "kvattn-tensorflow",
"kvattn-jax" and "kvattn-mxnet" hand queries, keys and values to that backend, and give the gradients back to PyTorch.
Padding, causal and sliding masks are the model's own; a soft cap and a position bias are passed on. A query that may attend
to nothing, as in left padding, gets zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import kvattn

OTHERS = ("numpy", "tensorflow", "jax", "mxnet")
UNKNOWN = ("s_aux", "cache")  # attention sinks, a paged cache: they change the answer, and kvattn has neither


def register() -> None:
    """Make the names known to transformers. Nothing else is loaded until a model uses one."""
    for name, backend in {"kvattn": "torch", **{f"kvattn-{other}": other for other in OTHERS}}.items():
        AttentionInterface.register(name, partial(forward, backend=backend))
        AttentionMaskInterface.register(name, sdpa_mask)  # boolean, True where a query may attend, as kvattn's


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
    *,
    backend: str = "torch",
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls: query (batch, heads, n, d), key and value (batch, kv_heads, m, d) -> (batch, n, heads, d).

    Raises NotImplementedError for attention sinks, paged caches, and dropout on another backend than torch.
    """
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise NotImplementedError(f"kvattn has no {name}: use another attention implementation for this model")
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:  # a caller's own 4-d mask, to be added
        mask, bias = None, mask if bias is None else mask + bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "causal": bool(causal) and attention_mask is None and query.shape[2] > 1,  # else the mask says it
        "scale": scaling,
        "softcap": softcap,
    }
    weights = None
    if backend == "torch":
        output = kvattn.attention(query, key, value, **options, dropout=dropout if module.training else 0.0)
        if output_attentions:
            weights = kvattn.attention(query, key, value, **options, return_weights=True)[1]
    else:
        if dropout and module.training:
            raise NotImplementedError(
                f"dropout while training needs PyTorch's own random numbers: 'kvattn', not 'kvattn-{backend}'"
            )
        output = _Elsewhere.apply(query, key, value, options, backend)
        if output_attentions:
            arrays, given = _there((query, key, value), options, backend)
            weights = _back(kvattn.attention(*arrays, **given, return_weights=True)[1], query)
    return output.transpose(1, 2).contiguous(), weights


class _Elsewhere(torch.autograd.Function):  # type: ignore[misc]
    """Attention on another backend, with that backend's gradients."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, options: dict[str, Any], backend: str) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options, ctx.backend = options, backend
        arrays, given = _there((query, key, value), options, backend)
        return _back(kvattn.attention(*arrays, **given), query)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        arrays, given = _there((*ctx.saved_tensors, grad_output), ctx.options, ctx.backend)
        return *(_back(x, grad_output) for x in kvattn.attention_grad(*arrays, **given)), None, None


def _there(tensors: Any, options: dict[str, Any], backend: str) -> tuple[list[Any], dict[str, Any]]:
    def there(x: torch.Tensor) -> Any:
        dtype = str(x.dtype).removeprefix("torch.")
        return kvattn.asarray(kvattn.to_numpy(x), dtype=dtype, backend=backend)  # NumPy's view of a tensor on the CPU: no copy

    given = {name: there(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return [there(x) for x in tensors], given


def _back(x: Any, like: torch.Tensor) -> torch.Tensor:
    if hasattr(x, "__dlpack__"):
        try:
            return torch.from_dlpack(x).to(like.device, like.dtype)
        except (BufferError, RuntimeError, TypeError):  # read-only, or a dtype that this framework does not lend
            pass
    return torch.from_numpy(kvattn.to_numpy(x).copy()).to(like.device, like.dtype)
