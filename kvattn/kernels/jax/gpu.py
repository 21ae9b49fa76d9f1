"""Attention on a CUDA device: cuDNN's fused kernel wherever it keeps the promises; elsewhere XLA compiles the tab's own path.

cuDNN serves float16 and bfloat16 with as many features of values as of keys, a multiple of 8 and at most 128 (256 from Hopper
on), grouped heads, causal from position 0, a window to the left of it, and valid_lens (batch,). Of one query causal is a
length, and beside many keys decoding.py serves it. A mask or a bias, with whatever else restricts the call, becomes one bias in
bfloat16, whose -2^41 forbids as JAX's own does. Not:

- float32 and float64: it has no kernel for them (XLA's products take no TF32 here: the tab asks for the highest precision);
- mask and bias in float16, where what forbids would be -2^15, which scores can reach; of one query, not measured yet;
- softcap, dropout, weights, lse, other scores and normalisers; a window with lengths or to the right; other offsets.
- few scores: XLA's own kernels are faster to launch.

NaN in padding: cuDNN leaves scores beyond the lengths out, but multiplies their values by 0, and in backward their keys; an
entry without keys has zeros from it, whatever is in its queries (seen on cuDNN 9.19). So forward hides values alone, backward
keys as well. Each such pass over an array costs 5 % of cuDNN's time, unless XLA joins it to what made the array.

Where the arrays lie is not known while JAX traces: `platform_dependent` holds both ways until the program is compiled for one
platform, so that a program for the CPU on a machine with a GPU is right too, and eager calls follow their arrays.
"""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from kvattn.kernels.jax import decoding

HALF = ("float16", "bfloat16")
BIASED = ("bfloat16",)
FORBIDDEN = -(2.0**41)  # as JAX's own: of two that are larger cuDNN takes the difference wrongly
PLATFORM = "cuda"
FEW = 2**18  # scores of all heads together: the formula takes half of cuDNN's time, with gradients too (an H200, cuDNN 9.19)
OLDEST = 90000  # cuDNN 9: before, queries shorter than 64 are refused
EMPTY = 91900  # the oldest cuDNN seen to give zeros to an entry without keys


@cache
def device():
    """(compute capability, cuDNN's version) of this process's first CUDA device, or None where cuDNN cannot serve."""
    try:
        capability = jax.local_devices(backend=PLATFORM)[0].compute_capability
        return tuple(int(x) for x in capability.split(".")), _fused().check_cudnn_version()
    except (RuntimeError, ImportError, AttributeError):  # no such device, or a JAX whose own module lies elsewhere
        return None


def _fused():
    # JAX's own function under jax.nn's, which would have the arrays transposed to (batch, n, h, d) first. Private: as read in
    # jax 0.10.2 and 0.7.1.
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def projects(dtype):
    """Whether projections and what they give stay in this dtype, as cuDNN takes nothing wider; elsewhere they are float32."""
    return dtype.name in BIASED and device() is not None


def obstacle(tab, query, key, value, call):
    """Why cuDNN does not serve a call; "" if it does. All but the arrays' values is known while JAX traces."""
    if device() is None:
        return "cuDNN is for CUDA devices"
    if reason := call.beyond_softmax(tab, "dropout", "return_weights", "return_lse"):
        return reason
    if query.dtype.name not in HALF:
        return "cuDNN is for half precision"
    if call.softcap is not None:
        return "cuDNN has no softcap"
    capability, version = device()
    n, m, d = query.shape[-2], key.shape[-2], query.shape[-1]
    if version < OLDEST or capability < (8, 0):
        return "the device or its cuDNN is too old"
    if d % 8 or not 0 < d <= (256 if capability >= (9, 0) else 128) or query.ndim != 4:
        return "cuDNN is for (batch, heads, n, d) with d a multiple of 8, and not large"
    if query.shape[0] != key.shape[0] or key.shape != value.shape or 0 in (*query.shape, *key.shape):
        return "cuDNN is for keys and values of one shape and as many batch entries as the queries'"
    if query.shape[0] * query.shape[1] * n * m <= FEW:
        return "few scores, for which XLA's own kernels are faster to launch"
    if not (call.scale is None or (isinstance(call.scale, float) and call.scale > 0)):
        return "cuDNN's scale is a number above 0"
    if call.mask is not None or call.bias is not None:  # its backward pass takes even numbers of queries and keys only
        served = query.dtype.name in BIASED and n > 1 and n % 2 == m % 2 == 0
        return "" if served else "cuDNN takes a mask or a bias in bfloat16, beside even numbers of queries and keys"
    if call.lengths_per_query(query.ndim):
        return "each query has a length of its own"
    if not call.windowed or _length_of_one(n, call):
        return ""
    if call.right != 0 or n > m or not call.from_the_first:
        return "cuDNN's windows end at the query, and begin with the first key"
    return "" if call.left is None or call.valid_lens is None else "cuDNN takes no window beside lengths"


def _length_of_one(n, call):
    """Whether causal, for one query that stands elsewhere than at the first key, is a length."""
    return n == 1 and call.right == 0 and call.left is None and not call.from_the_first


def _lengths(query, key, call):
    """How many keys each batch entry may look at, from 0 to all: int32 (batch,); None where nothing limits them."""
    m, lens, offset = key.shape[-2], call.valid_lens, call.query_offset
    if _length_of_one(query.shape[-2], call):
        end = jnp.clip(max(-1, min(offset, m)) if isinstance(offset, int) else offset, -1, m - 1).astype(jnp.int32) + 1
        lens = end if lens is None else jnp.minimum(lens, end)
    return None if lens is None else jnp.broadcast_to(jnp.clip(lens, 0, m).astype(jnp.int32), query.shape[:1])


def attention(tab, query, key, value, call, blocks=()):
    """softmax(scale * query @ key.T) @ value over the keys allowed, where there is no `obstacle`: (batch, h, n, d)."""
    n, m, scale = query.shape[-2], key.shape[-2], 1 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale
    program, added, lens, has_key, has_query = {"causal": False, "left": None, "scale": scale}, None, None, None, None
    if call.mask is not None or call.bias is not None:
        allowed, bias = tab._allowed(n, jnp.arange(m), query.ndim, call), call.bias
        allowed = allowed.reshape(*[1] * (query.ndim - allowed.ndim), *allowed.shape)
        added = jnp.where(allowed, jnp.zeros((), query.dtype) if bias is None else bias.astype(query.dtype), FORBIDDEN)
        added = jnp.broadcast_to(added, (*added.shape[:-2], n, m))
        has_key = tab._flags_of_rows(allowed.any(axis=-1), query.shape)
        has_query = tab._flags_of_rows(allowed.any(axis=-2), key.shape)
    else:
        if call.right == 0 and call.from_the_first:
            program |= {"causal": True, "left": call.left}
            # the keys beyond are seen by nobody, and a square is what cuDNN's causal mask is surest of
            key, value = key[..., :n, :], value[..., :n, :]
        lens = _lengths(query, key, call)
        if lens is not None:
            has_query = (jnp.arange(key.shape[-2]) < lens[:, None])[:, None, :, None]
            if device()[1] < EMPTY and not decoding.serves(query, key):
                has_key, lens = (lens > 0)[:, None, None, None], jnp.maximum(lens, 1)
    plain = partial(formula, **program)

    def whole(query, key, value, added, lens, has_key, has_query):
        return _only(has_key, plain(_only(has_key, query), _only(has_query, key), _only(has_query, value), added, lens))

    if added is None and decoding.serves(query, key):
        lens = jnp.full(query.shape[:1], key.shape[-2], jnp.int32) if lens is None else lens
        fast = _by_formula(lambda query, key, value, _, lens, *rest: decoding.attention(query, key, value, lens, scale), whole)
    else:
        fast = _differentiable(partial(cudnn, **program), plain)
    # recomputed in backward: both ways' intermediate results are kept, and this one's would be the scores
    ways = {PLATFORM: fast, "default": jax.checkpoint(whole)}
    return jax.lax.platform_dependent(query, key, value, added, lens, has_key, has_query, **ways)


def _only(flags, x):
    """``x`` where the flags hold, 0 elsewhere: NaN there would leak as 0 * NaN."""
    return x if flags is None else jnp.where(flags, x, 0)


def cudnn(query, key, value, added, lens, causal, left, scale):
    fused = _fused()
    kind = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    rows = None
    if lens is not None:
        kind = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
        rows = jnp.full(lens.shape, query.shape[-2], jnp.int32)
    return fused.dot_product_attention(
        query, key, value, bias=added, q_seqlen=rows, kv_seqlen=lens, scale=scale, mask_type=kind, qkv_layout="BNTH",
        sliding_window_length=None if left is None else left + 1,
    )  # fmt: skip


def formula(query, key, value, added, lens, causal, left, scale):
    """The same with all its scores, in float32; an entry without keys attends to one."""
    (batch, heads, n, d), (kv_heads, m) = query.shape, key.shape[1:3]
    wide = [x.astype(jnp.float32) for x in (query.reshape(batch, kv_heads, heads // kv_heads, n, d), key, value)]
    scores = scale * jnp.einsum("bkgnd,bkmd->bkgnm", *wide[:2], precision="highest")
    if added is not None:
        wider = jnp.broadcast_to(added.astype(jnp.float32), (*added.shape[:1], heads if added.shape[1] > 1 else 1, n, m))
        split = (kv_heads, heads // kv_heads) if added.shape[1] > 1 else (1, 1)
        scores = scores + wider.reshape(added.shape[0], *split, n, m)
    ahead = jnp.arange(m) - jnp.arange(n)[:, None]
    allowed = jnp.ones((n, m), bool) if not causal else ahead <= 0
    allowed = allowed if left is None else allowed & (ahead >= -left)
    if lens is not None:
        allowed = allowed & (jnp.arange(m) < jnp.maximum(lens, 1)[:, None, None, None, None])
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    output = jnp.einsum("bkgnm,bkmd->bkgnd", weights, wide[2], precision="highest")
    return output.reshape(query.shape).astype(query.dtype)


def _differentiable(kernel, plain):
    """``kernel``, whose own backward pass has no derivative, with those of ``plain`` beyond the first.

    Its gradient by what is added to the scores is that of ``plain``, which XLA leaves out where nobody asks for it.
    """

    tree = []  # how the arrays that backward keeps go together: never equal to itself from another trace

    @jax.custom_jvp
    def forward(query, key, value, added, lens):
        output, vjp = jax.vjp(lambda *arrays: kernel(*arrays, added, lens), query, key, value)
        kept, tree[:] = jax.tree.leaves(vjp), [jax.tree.structure(vjp)]
        return output, kept

    @forward.defjvp
    def _(primals, tangents):
        arrays, lens = primals[:4], primals[4]
        output, kept = forward(*primals)
        change = jax.jvp(lambda *arrays: plain(*arrays, lens), arrays, tangents[:4])[1]
        return (output, kept), (change, [_none(x) for x in kept])

    @jax.custom_jvp
    def backward(kept, lens, query, key, value, added, grad):
        by_added = None
        if added is not None:
            by_added = jax.vjp(lambda added: plain(query, key, value, added, lens), added)[1](grad)[0]
        return *jax.tree.unflatten(tree[0], kept)(grad), by_added

    @backward.defjvp
    def _(primals, tangents):
        lens = primals[1]

        def formula(*arrays):
            return jax.vjp(lambda *arrays: plain(*arrays, lens), *arrays[:4])[1](arrays[4])

        return backward(*primals), jax.jvp(formula, primals[2:], tangents[2:])[1]

    @jax.custom_vjp
    def attend(query, key, value, added, lens, has_key, has_query):
        key = key if added is None else _only(has_query, key)  # a score beyond the lengths is left out; NaN + -2^41 is NaN
        return _only(has_key, kernel(query, key, _only(has_query, value), added, lens))

    def run(query, key, value, added, lens, has_key, has_query):
        arrays = _only(has_key, query), _only(has_query, key), _only(has_query, value), added
        output, kept = forward(*arrays, lens)
        return _only(has_key, output), (kept, arrays, lens, has_key, has_query)

    def pull(residuals, grad):
        kept, arrays, *rest = residuals
        lens, has_key, _ = rest
        return *backward(kept, lens, *arrays, _only(has_key, grad)), *(None if x is None else _none(x) for x in rest)

    attend.defvjp(run, pull)
    return attend


def _by_formula(kernel, whole):
    """``kernel`` with the derivatives of ``whole``, which is the same: for what is differentiated seldom."""
    attend = jax.custom_jvp(kernel)

    @attend.defjvp
    def _(primals, tangents):
        rest = primals[3:]
        return attend(*primals), jax.jvp(lambda *arrays: whole(*arrays, *rest), primals[:3], tangents[:3])[1]

    return attend


def _none(x):
    """The tangent of what has none."""
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
