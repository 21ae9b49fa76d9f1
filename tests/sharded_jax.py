"""Attention of arrays that eight devices share, beside NumPy's; prints what differs. Run by test_sharded_jax.py in a process
of its own, since JAX counts its devices once."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0"), "--xla_force_host_platform_device_count=8"]
)

import itertools
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kvattn
from kvattn import jax as kv
from kvattn.kernels.jax import blocks as jax_blocks

B, N, M = 4, 160, 136
draw = np.random.default_rng(0)


def normal(*shape):
    return draw.standard_normal(shape).astype(np.float32)


QUERY, KEY, VALUE, GRAD = normal(B, 4, N, 8), normal(B, 2, M, 8), normal(B, 2, M, 6), normal(B, 4, N, 6)
LENS = np.array([0, 5, 70, M])
ADDITIVE = {"W_q": normal(8, 4), "W_k": normal(8, 4), "w_v": normal(4)}
CALLS = {  # options, and arrays with the axes of batch and heads
    "plain": ({}, {}),
    "causal, lengths": ({"causal": True, "query_offset": -3}, {"valid_lens": LENS}),
    "lengths per query": ({}, {"valid_lens": draw.integers(0, M, (B, N))}),
    "window": ({"window": (9, 4)}, {}),
    "softcap, window to the left": ({"softcap": 2.0, "window": (9, None)}, {"valid_lens": LENS}),
    "bias": ({"causal": True}, {"bias": normal(B, 4, N, M)}),
    "mask": ({}, {"mask": draw.random((B, 1, N, M)) < 0.5}),
    "distance in blocks": ({"score": kvattn.distance_score, "causal": True}, {"valid_lens": LENS}),
    "additive": ({"score": ADDITIVE}, {"valid_lens": LENS}),
    "sparsemax": ({"normalize": kvattn.sparsemax}, {"mask": draw.random((B, 1, N, M)) < 0.5}),
    "positions": ({"positions": draw.integers(-1, M, (N, 5))}, {}),
    "weights, lse": ({"causal": True, "return_weights": True, "return_lse": True}, {}),
    "scores": ({"causal": True, "softcap": 2.0, "return_scores": "capped"}, {}),
}
LAYOUTS = ["manual batch", "manual heads", "manual batch, explicit heads", "explicit batch, heads", "explicit queries", "auto"]


def spec(name, x, layout):
    """Over which axes of the mesh an argument is spread."""
    if layout == "explicit queries":
        return P(None, None, "x") if name in ("query", "grad") else P()
    axes = [None] * x.ndim
    axes[0] = "x" if "batch" in layout or layout == "auto" else None
    if "heads" in layout and x.ndim == 4 and x.shape[1] > 1:
        axes[1] = "y"
    return P(*axes)


def results(call, given):
    """What a call of ``given`` returns, and its gradients, as one program for eight devices."""
    query, key, value, grad, *rest = given
    found, back = jax.vjp(lambda *arrays: call(*arrays, *rest), query, key, value)
    output = found[0] if isinstance(found, tuple) else found
    cotangent = (grad, *jax.tree.map(jnp.zeros_like, found[1:])) if isinstance(found, tuple) else grad
    return (output, *back(cotangent), *(found[1:] if isinstance(found, tuple) else ()))


def shared(call, arrays, layout):
    kinds = [AxisType.Explicit if word in layout else AxisType.Auto for word in ("explicit batch", "explicit")]
    kinds = [AxisType.Explicit] * 2 if layout == "explicit queries" else kinds
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=tuple(kinds))
    specs = [spec(name, x, layout) for name, x in arrays.items()]
    function = lambda *given: results(call, given)  # noqa: E731
    if not layout.startswith("manual"):
        with jax.set_mesh(mesh):
            return jax.jit(function)(
                *(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays.values(), specs, strict=True))
            )
    manual = {"y"} if layout == "manual heads" else {"x"} if "explicit" in layout else {"x", "y"}
    inside = [P(*(axis if axis in manual else None for axis in s)) for s in specs]
    kept = [P(*(axis for axis in ("x" if "batch" in layout else None, "y" if layout == "manual heads" else None)))]
    kept *= 4 + 2 * ("weights" in layout)
    with jax.set_mesh(mesh):
        given = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays.values(), specs, strict=True)]
        count = len(jax.tree.leaves(jax.eval_shape(function, *arrays.values())))
        mapped = jax.shard_map(function, in_specs=tuple(inside), out_specs=(kept[0],) * count, axis_names=manual)
        return jax.jit(mapped)(*given)


def expected(name):
    options, arrays = CALLS[name]
    options = {**options, **arrays}
    if name == "additive":
        options["score"] = partial(kvattn.additive_score, **ADDITIVE)
    bound = {key: x for key, x in options.items() if not key.startswith("return")}
    found = kvattn.attention(QUERY, KEY, VALUE, **options, backend="numpy")
    found = found if isinstance(found, tuple) else (found,)
    return (found[0], *kvattn.attention_grad(QUERY, KEY, VALUE, GRAD, **bound, backend="numpy"), *found[1:])


def compare(name, layout):
    options, arrays = CALLS[name]
    if name == "additive":
        options = {"score": partial(kvattn.additive_score, **{key: jnp.asarray(x) for key, x in ADDITIVE.items()})}
    call = lambda q, k, v, *rest: kvattn.attention(q, k, v, **options, **dict(zip(arrays, rest, strict=True)))  # noqa: E731
    given = {"query": QUERY, "key": KEY, "value": VALUE, "grad": GRAD, **arrays}
    for x, y in zip(shared(call, given, layout), expected(name), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def layer(layout):
    """Multi-head attention over a batch that devices share; with the weights' columns shared too where nothing is explicit."""
    attend, X = kv.MultiHeadAttention(16, 4), normal(8, N, 16)
    variables = attend.init(jax.random.key(0), X[:1], X[:1], X[:1])
    run = lambda X: attend.apply(variables, X, X, X, causal=True)[0]  # noqa: E731
    plain = jax.jit(jax.value_and_grad(lambda X: (run(X) ** 2).mean()))(X)[1]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit if layout == "explicit" else AxisType.Auto,))
    with jax.set_mesh(mesh):
        run = jax.shard_map(run, in_specs=P("x"), out_specs=P("x")) if layout == "manual" else run
        found = jax.jit(jax.grad(lambda X: (run(X) ** 2).mean()))(jax.device_put(X, NamedSharding(mesh, P("x"))))
    np.testing.assert_allclose(found, plain, rtol=2e-5, atol=1e-7)


def stays(options, arrays):
    """What lies along batch and heads is sent nowhere, forward or backward, under jit; and comes back as it lay."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    call = lambda q, k, v, *rest: kvattn.attention(q, k, v, **options, **dict(zip(arrays, rest, strict=True)))  # noqa: E731
    lies = NamedSharding(mesh, P("x", "y"))
    given = [jax.device_put(x, lies) for x in (QUERY, KEY, VALUE, GRAD)]
    given += [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in arrays.values()]
    program = jax.jit(lambda *given: results(call, given)).lower(*given).compile().as_text()
    for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute", "collective-broadcast"):
        assert word not in program, word
    at_once = call(*given[:3], *given[4:])
    assert at_once.sharding.is_equivalent_to(lies, 4), at_once.sharding
    np.testing.assert_allclose(at_once, kvattn.attention(QUERY, KEY, VALUE, **options, **arrays, backend="numpy"), atol=2e-5)


def traced_alone(whether, how, name, x, **options):
    """An argument that ``how`` traces, beside arrays that each lie on one device; with gradients or without."""
    n, options = 288, {"causal": True, **options}  # more pairs than of which a mask is made at once
    arrays = [normal(2, 2, n, 8) for _ in range(4)]
    call = lambda x, *arrays: kvattn.attention(*arrays, **options, **{name: x})  # noqa: E731

    *given, grad = map(jnp.asarray, arrays)  # out here, where nothing is traced

    def run(x):
        output, back = jax.vjp(partial(call, x), *given) if whether else (call(x, *given), None)
        return (output, *back(grad)) if whether else (output,)

    found = how(run)(jnp.asarray(x))
    want = [kvattn.attention(*arrays[:3], **options, **{name: x}, backend="numpy")]
    want += kvattn.attention_grad(*arrays, **options, **{name: x}, backend="numpy") if whether else []
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def main():
    chosen = [(name, ("explicit batch, heads", "manual batch")[i % 2]) for i, name in enumerate(CALLS)]
    chosen += itertools.product(["causal, lengths"], LAYOUTS)
    if jax.__version_info__ < (0, 8):  # it makes zeros there whose type lacks the mesh
        chosen.remove(("causal, lengths", "manual batch, explicit heads"))
    tasks = {f"{name}: {layout}": partial(compare, name, layout) for name, layout in dict.fromkeys(chosen)}
    tasks |= {f"the layer: {layout}": partial(layer, layout) for layout in ("manual", "explicit", "auto")}
    tasks |= {
        f"nothing is sent: {name}": partial(stays, *CALLS[name]) for name in ("plain", "causal, lengths", "window", "mask")
    }
    segments, lens = np.sort(draw.integers(0, 5, (2, 288))), np.array([20, 250])
    tasks |= {
        "traced alone: segments": partial(traced_alone, True, jax.jit, "segments", segments),
        "traced alone: lengths beside segments": partial(
            traced_alone, False, jax.jit, "valid_lens", lens, segments=draw.integers(0, 50, (2, 288))
        ),
        "traced alone: lengths beside a bias by distance": partial(
            traced_alone, False, lambda f: lambda x: [y[0] for y in jax.vmap(f)(x[None])], "valid_lens", lens,
            bias=lambda i, j: -0.1 * abs(i - j)
        ),
    }  # fmt: skip
    for what, task in tasks.items():
        try:
            with patch.object(jax_blocks, "PAIRS", 2**16 if "blocks" in what else jax_blocks.PAIRS):
                task()
        except Exception as error:
            print(f"{what}: {type(error).__name__}: {str(error)[:300]}")


if __name__ == "__main__":
    main()
