"""kvattn as an attention implementation of Hugging Face transformers.

>>> from kvattn.integrations import transformers as integration  # doctest: +SKIP
>>> integration.register()  # doctest: +SKIP
>>> model.set_attn_implementation("kvattn")  # or "kvattn-jax", ...  # doctest: +SKIP

"kvattn" computes on the model's own tensors, gradients and dropout included. "kvattn-numpy", "kvattn-tensorflow",
"kvattn-jax" and "kvattn-mxnet" hand queries, keys and values to that backend, and give the gradients back to PyTorch.
The results are those of ``attn_implementation="eager"``: the model's mask alone says which pairs may attend, and no layer's
``is_causal``. A query that may attend to nothing, as in left padding, gets zeros, where eager averages all values.
What is supported and what is refused, and why: docs/howto/transformers.md.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only  # private: read in PyTorch 2.13; the names of models below in transformers 5.24
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils import output_capturing

import kvattn

OTHER_BACKENDS = ("numpy", "tensorflow", "jax", "mxnet")
REFUSED = {  # arguments of single architectures that change the answer
    "indices": "a sparse indexer's choice of keys, which reaches no mask",
    "block_indices": "a sparse indexer's choice of keys, which reaches no mask",
    "cache": "a paged cache, whose keys lie in blocks",
    "block_table": "a paged cache, whose keys lie in blocks",
}


def register() -> None:
    """Make the names known to transformers. Nothing else is loaded until a model uses one."""
    for name, backend in {"kvattn": "torch", **{f"kvattn-{other}": other for other in OTHER_BACKENDS}}.items():
        AttentionInterface.register(name, partial(forward, backend=backend))
        AttentionMaskInterface.register(name, allowed)


def allowed(*, config: Any = None, **options: Any) -> torch.Tensor | None:
    """The mask that a model builds for its layers: boolean, True where a query may attend, or None where all may.

    "sdpa" leaves out a plain causal mask as well, and then takes a missing mask to be causal where the layer says
    ``is_causal`` or says nothing; for cross-attention that is wrong. Here a plain causal mask is a `Causal`.
    """
    models = _models(type(config))
    if not all(model._can_set_attn_implementation() for model in models):
        raise NotImplementedError(
            f'{models[0].__name__} computes its attention itself, without kvattn: make it with attn_implementation="eager"'
        )
    if not all(model._supports_sdpa or model._supports_attention_backend for model in models):
        return eager_mask(config=config, **options)  # some of its layers may add the mask to scores themselves
    written = partial(sdpa_mask, config=config, **options | {"allow_is_causal_skip": False})
    # a trace is run with other lengths, and holds tensors only
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    packed = None if traced else Packed.read(options.get("mask_function"))
    if packed is not None:
        return Causal.of(written, packed, **options)
    mask = sdpa_mask(config=config, **options)
    if mask is not None or not options.get("allow_is_causal_skip", True):
        return mask
    return written() if traced else Causal.of(written, **options)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _models(config: Any) -> tuple[Any, ...]:
    """The model classes of a configuration; none where transformers lists none, as for parts of a larger model."""
    try:
        found = transformers.MODEL_MAPPING.get(config, ())
    except ValueError:  # a class that it lists and does not have
        return ()
    return found if isinstance(found, tuple) else (found,)


class Packed(NamedTuple):
    """Sequences that lie one after another in a row: the segment of each token (batch, n), and the window within each, None for
    no limit."""

    segments: torch.Tensor
    window: int | None

    @classmethod
    def read(cls, mask_function: Any) -> Packed | None:
        """What transformers made a mask function of, where it is causal within sequences, and within a window; else None."""
        placed, same = _parts(mask_function, and_masks, "mask_functions", (None, None))
        segments = _parts(same, packed_sequence_mask_function, "packed_sequence_mask")
        within = _parts(placed, remap_positions_for_packed_sequence, "mask_function")
        if segments is None:
            return None
        if within is causal_mask_function:  # which is so by positions within a sequence as by places in the row
            return cls(segments, None)
        window, causal = _parts(within, and_masks, "mask_functions", (None, None))
        size = _parts(window, sliding_window_overlay, "sliding_window")
        return None if size is None or causal is not causal_mask_function else cls(segments, size - 1)


def _parts(function: Any, maker: Any, name: str, otherwise: Any = None) -> Any:
    """What a function holds by this name of the call of ``maker`` that made it; of another's, ``otherwise``."""
    made = (
        getattr(function, "__qualname__", "").startswith(f"{maker.__name__}.<locals>.")
        and function.__module__ == maker.__module__
    )
    found = inspect.getclosurevars(function).nonlocals.get(name, otherwise) if made else otherwise
    return found if not isinstance(otherwise, tuple) or len(found) == len(otherwise) else otherwise


class Causal(torch.Tensor):  # type: ignore[misc]
    """A causal mask, plain or of ``packed`` sequences, whose n * m booleans are written only if a model computes with it,
    slices it, moves it."""

    written: Any
    packed: Packed | None

    @classmethod
    def of(cls, written: Any, packed: Packed | None = None, *, batch_size: int, q_length: int, kv_length: int,
           device: Any = "cpu", **_: Any) -> Causal:  # fmt: skip
        one = torch.ones((), dtype=torch.bool, device=device)
        mask: Causal = one.expand(batch_size, 1, q_length, kv_length).as_subclass(cls)
        mask.written, mask.packed = written, packed
        return mask

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function not in SIZES:
                args, kwargs = tree_map_only(cls, lambda x: x.written(), (args, kwargs or {}))
            return function(*args, **kwargs or {})


SIZES = {  # what torch.compile asks of an argument before it traces anything
    *(torch.Tensor.size, torch.Tensor.stride, torch.Tensor.dim),
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "_base")
    ),
}


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    backend: str = "torch",
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls: query (batch, heads, n, d), key and value (batch, kv_heads, m, d) -> (batch, n, heads, d).

    Raises NotImplementedError for what docs/howto/transformers.md says is refused, TypeError for a mask of integers.
    """
    _refuse(others)
    if backend != "torch" and dropout and module.training:
        raise NotImplementedError(
            f"dropout while training needs PyTorch's own random numbers: 'kvattn', not 'kvattn-{backend}'"
        )
    dtype = value.dtype
    if not query.dtype == key.dtype == dtype:  # float32 from a rotation, under autocast
        common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), dtype)
        query, key, value = query.to(common), key.to(common), value.to(common)
    options = _restrictions(query, key, attention_mask, position_bias, others) | {"scale": scaling, "softcap": softcap}
    sink = s_aux if s_aux is not None else sinks  # of each head; of each query, (batch, heads, n, 1)
    for name, x in (("bias", options["bias"]), ("sink", sink)):
        options[name] = None if x is None else x.to(query.dtype)
    shown, weights = output_attentions or _attentions_are_collected(), None
    if backend != "torch":
        bias, sink = options.pop("bias"), options.pop("sink")
        output = _Elsewhere.apply(query, key, value, bias, sink, options, backend)
        if shown:  # each value is one key's unit vector, so that the weights have their gradients as the output has
            unit = torch.eye(key.shape[2], dtype=query.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
            weights = _Elsewhere.apply(query, key, unit, bias, sink, options, backend)
    else:
        options["dropout"] = dropout if module.training else 0.0
        output = kvattn.attention(query, key, value, **options, return_weights=shown)
        if shown:
            output, weights = output
    if output.dtype != dtype:
        output = output.to(dtype)
    return output.transpose(1, 2).contiguous(), weights


def _refuse(others: dict[str, Any]) -> None:
    """Raises NotImplementedError for what a model hands on that kvattn does not know."""
    for name in REFUSED.keys() & others.keys():
        if others[name] is not None:
            raise NotImplementedError(
                f'kvattn does not know {name} ({REFUSED[name]}): use attn_implementation="eager" for this model'
            )


def _restrictions(query: Any, key: Any, mask: Any, bias: Any, others: dict[str, Any]) -> dict[str, Any]:
    """Which pairs may attend, as `kvattn.attention`'s options say it, and what is added to their scores."""
    segments, window, causal = _sequences(query, key, **others), None, isinstance(mask, Causal)
    if isinstance(mask, Causal):
        segments, window = (segments, None) if mask.packed is None else mask.packed
        mask = None
    elif mask is not None and mask.dtype != torch.bool:  # a caller's own 4-d mask, to be added
        if not mask.dtype.is_floating_point:
            raise TypeError(
                f"attention_mask of 4 axes has dtype {mask.dtype}: expected bool (True where a query may attend), or "
                "floats to be added to the scores"
            )
        mask, bias = None, mask if bias is None else mask + bias
    return {
        "mask": mask,
        "bias": bias,
        "causal": causal and query.shape[2] > 1,  # transformers leaves out the mask of one query, which sees all keys
        "segments": segments,
        "window": None if window is None else (window, None),
    }


def _sequences(query: Any, key: Any, cu_seq_lens_q: Any = None, cu_seq_lens_k: Any = None, **_: Any) -> Any:
    """The segments of queries and keys, where a collator tells FlashAttention's kernels the ends of sequences in one row."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        return None
    if query.shape[0] > 1:
        raise NotImplementedError(f"cu_seq_lens_q tells of one row of sequences, not of {query.shape[0]}: give position_ids")
    sides = (query, cu_seq_lens_q), (key, cu_seq_lens_k)
    return tuple(
        torch.searchsorted(ends[1:].contiguous(), torch.arange(x.shape[2], device=ends.device, dtype=ends.dtype), right=True)[
            None
        ]
        for x, ends in sides
    )


def _attentions_are_collected() -> bool:
    """Whether the model was asked for its attentions; GPT-2 and others do not hand that on to their layers."""
    collector = output_capturing._active_collector
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


class _Elsewhere(torch.autograd.Function):  # type: ignore[misc]
    """Attention on another backend, with that backend's gradients."""

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, bias: Any, sink: Any, options: dict[str, Any], backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, bias, sink)
        ctx.options, ctx.backend = options, backend
        arrays, given = _to_backend((query, key, value), {"bias": bias, "sink": sink, **options}, backend)
        return _to_torch(kvattn.attention(*arrays, **given), query)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        *tensors, bias, sink = ctx.saved_tensors
        arrays, given = _to_backend((*tensors, grad_output), {"bias": bias, "sink": sink, **ctx.options}, ctx.backend)
        names = ("query", "key", "value", "bias", "sink")
        wrt = [name for name, needed in zip(names, ctx.needs_input_grad, strict=False) if needed]
        found = dict(zip(wrt, kvattn.attention_grad(*arrays, **given, wrt=wrt), strict=True))
        return *(_to_torch(found[x], grad_output) if x in found else None for x in names), None, None


def _to_backend(tensors: Any, options: dict[str, Any], backend: str) -> tuple[list[Any], dict[str, Any]]:
    def convert(x: torch.Tensor) -> Any:
        """NumPy's view of a tensor on the CPU, no copy. bfloat16 goes as float32, in which it would be computed anyway."""
        return kvattn.asarray(kvattn.to_numpy(x), backend=backend)

    given = {name: tree_map_only(torch.Tensor, convert, x) for name, x in options.items()}
    return [convert(x) for x in tensors], given


def _to_torch(x: Any, like: torch.Tensor) -> torch.Tensor:
    if hasattr(x, "__dlpack__"):
        try:
            return torch.from_dlpack(x).to(like.device, like.dtype)
        except (BufferError, RuntimeError, TypeError):  # read-only, or a dtype that this framework does not lend
            pass
    return torch.from_numpy(kvattn.to_numpy(x).copy()).to(like.device, like.dtype)


@torch.no_grad()  # type: ignore[untyped-decorator]
def maps(model: Any, inputs: Any, options: Any) -> dict[str, torch.Tensor]:
    """The attentions that a model gives, by layer, for kvattn.maps."""
    output = model(*inputs, **options | {"output_attentions": True, "return_dict": True})
    found = {}
    for kind in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for i, weights in enumerate(output.get(kind) or ()):
            if weights is not None:
                found[f"{kind.rpartition('_')[0] or 'layers'}.{i}"] = weights
    return found
