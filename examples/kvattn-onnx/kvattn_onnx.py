"""ONNX's operator Attention as a backend of kvattn: a call becomes a graph of it, which onnxruntime runs.

It is no framework of arrays: what goes in and comes out is NumPy's. There are no gradients, and what the operator cannot
express is a NotImplementedError that says so. Source: https://onnx.ai/onnx/operators/onnx__Attention.html, of opset 24.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from kvattn import planning
from kvattn.call import Call, Choice

OPSET, IR_VERSION = 24, 11
WEIGHTS, SCORES = 3, 2  # what the operator's fourth output holds


def is_array(x):
    return isinstance(x, np.ndarray)


def asarray(x, dtype=None, like=None):
    if dtype == "float64":
        raise TypeError("the operator's scale is a float32, so that float64 has no more digits than that")
    x = np.asarray(x, dtype=None if dtype is None else np.dtype(dtype))
    if x.dtype.kind not in "biuf":
        raise TypeError(f"no input of this graph has dtype {x.dtype}")
    return x


def to_numpy(x):
    return np.asarray(x)


def peek(x):
    return np.asarray(x)


def describe():
    return f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}", "cpu"


def attention(query, key, value, *, score=None, normalize=None, mask=None, bias=None, valid_lens=None, causal=False,
              query_offset=0, window=None, positions=None, scale=None, softcap=None, dropout=0.0, rng=None,
              return_weights=False, return_lse=False):  # fmt: skip
    for name, given in (("score", score), ("normalize", normalize), ("positions", positions is not None), ("dropout", dropout)):
        if given:
            raise NotImplementedError(f"{name}: ONNX's Attention is softmax of dot products, of all keys, in inference")
    if scale is not None and scale <= 0:
        raise NotImplementedError("scale: onnxruntime takes none that is 0 or below")
    if query.dtype == np.float64:
        raise NotImplementedError("float64: the operator's scale is a float32")
    call = Call.of(query, key, score=score, normalize=normalize, mask=mask, bias=bias, valid_lens=valid_lens, causal=causal,
                   query_offset=query_offset, window=window)  # fmt: skip
    lead, n, m = planning.lead(query.shape, key.shape), query.shape[-2], key.shape[-2]
    if 0 in (*lead, n, m, query.shape[-1], value.shape[-1]):
        raise NotImplementedError("sizes of 0: onnxruntime takes none")

    # (batch, heads, n, c) is what the operator takes
    inputs = {name: _four_axes(x, lead) for name, x in (("Q", query), ("K", key), ("V", value))}
    attributes = {"scale": float(query.shape[-1] ** -0.5 if scale is None else scale), "softcap": float(softcap or 0)}
    if call.only_causal:
        attributes["is_causal"] = 1
    elif (
        call.valid_lens is not None
        and not (call.windowed or mask is not None or bias is not None)
        and valid_lens.ndim == 1
        and query.ndim == 4
    ):
        inputs["nonpad_kv_seqlen"] = np.minimum(valid_lens, m).astype(np.int64)
    elif call.restricted:
        inputs["attn_mask"] = np.ascontiguousarray(np.broadcast_to(_mask(call, n, m, query), (*lead, n, m))).reshape(
            -1, *inputs["Q"].shape[1:3], m
        )
    asked = [name for name, wanted in (("weights", return_weights), ("lse", return_lse)) if wanted]
    kinds = tuple((name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for name, x in inputs.items())
    output, *rest = _session(kinds, tuple(asked), tuple(attributes.items())).run(None, inputs)
    if not all(np.isfinite(x).all() for x in (query, key, value, output)):
        raise NotImplementedError("NaN, inf and overflow: the operator multiplies them by weights of 0")
    if return_lse:  # for -inf onnxruntime has the lowest number that there is
        rest[-1] = np.where(rest[-1] < np.finfo(rest[-1].dtype).min / 2, -np.inf, rest[-1]).astype(rest[-1].dtype)
    results = [x.reshape(*lead, *x.shape[2:]) for x in (output, *rest)]
    return tuple(results) if rest else results[0]


def choose(query, key, value, call):
    return Choice("ONNX's operator Attention", "there is no other")


def _four_axes(x, lead):
    """(..., h, n, c) -> (batch, h, n, c); a batch of 1, and no heads, are spread."""
    heads = x.shape[-3:-2] or (1,)
    return np.ascontiguousarray(np.broadcast_to(x, (*lead[:-1], *heads, *x.shape[-2:]))).reshape(-1, *heads, *x.shape[-2:])


def _mask(call, n, m, query):
    """attn_mask: bool, True where a pair may attend, or the bias, -inf where none may."""
    allowed = np.ones((n, m), bool) if call.mask is None else call.mask
    if call.valid_lens is not None:  # (batch,) or (batch, n); () or (n,) where there is no batch axis
        batch = call.valid_lens.shape[: query.ndim > 2]
        per_query = call.valid_lens.shape[len(batch) :] or (1,)
        allowed = allowed & (np.arange(m) < call.valid_lens.reshape(*batch, *[1] * (query.ndim - 3), *per_query, 1))
    if call.windowed:
        offset = call.query_offset
        offset = offset.reshape(-1, *[1] * (query.ndim - 1)) if np.ndim(offset) else offset
        ahead = np.arange(m) - (offset + np.arange(n)[:, None])  # how far each key lies after each query
        allowed = allowed & (call.left is None or ahead >= -call.left) & (call.right is None or ahead <= call.right)
    return allowed if call.bias is None else np.where(allowed, call.bias, -np.inf).astype(call.bias.dtype)


@lru_cache(maxsize=64)
def _session(kinds, asked, attributes):
    """onnxruntime, with the graph of an operator Attention and of what is asked beside the output. Half precision is cast."""
    dtype = kinds[0][1]
    wide = TensorProto.FLOAT if dtype == TensorProto.FLOAT16 else dtype
    nodes = [helper.make_node("Cast", [name], [f"wide_{name}"], to=wide) if kind == dtype else
             helper.make_node("Identity", [name], [f"wide_{name}"]) for name, kind, _ in kinds]  # fmt: skip
    given = {name for name, *_ in kinds}
    takes = [f"wide_{name}" if name in given else "" for name in ("Q", "K", "V", "attn_mask", "", "", "nonpad_kv_seqlen")]
    while not takes[-1]:
        takes.pop()
    makes = ["Y", "", "", "fourth"] if asked else ["Y"]
    for mode in [WEIGHTS] * ("weights" in asked) + [SCORES] * ("lse" in asked) or [0]:
        outputs = [f"{name}_{mode}" if name else "" for name in makes]
        nodes.append(helper.make_node("Attention", takes, outputs, qk_matmul_output_mode=mode, **dict(attributes)))
    results = [(outputs[0], dtype, 4)]
    if "weights" in asked:
        results.append((f"fourth_{WEIGHTS}", dtype, 4))
    if "lse" in asked:
        nodes.append(helper.make_node("ReduceLogSumExp", [f"fourth_{SCORES}", "last"], ["lse"], keepdims=0))
        results.append(("lse", wide, 3))
    nodes += [helper.make_node("Cast", [name], [f"result_{name}"], to=to) for name, to, _ in results]
    graph = helper.make_graph(
        nodes, "attention", [helper.make_tensor_value_info(*each) for each in kinds],
        [helper.make_tensor_value_info(f"result_{name}", to, [None] * axes) for name, to, axes in results],
        [helper.make_tensor("last", TensorProto.INT64, [1], [-1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
