"""Ring attention over virtual devices is kvattn's attention: its answers, its gradients, its errors; and what it costs."""

import math
import re
import runpy
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kvattn
from kvattn import jax as kv
from kvattn.distributed.jax import ring_attention
from kvattn.kernels.jax import programs

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh(shape=(8,), names=("x",), kind="auto"):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape), devices=devices)


# ---- beside NumPy, where tiles serve the chunks


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


LENS = np.array([1500, 300])
LARGE = {
    "causal, lengths": {"causal": True, "valid_lens": LENS},
    "window on both sides": {"window": (200, 100)},
    "causal, window": {"causal": True, "window": 300, "softcap": 3.0},
}


@pytest.mark.parametrize("options", LARGE.values(), ids=LARGE)
def test_long_sequences(options):
    """Of a length that the devices do not divide, in float64, where nothing but a fault tells two answers apart."""
    arrays = [normal(2, 4, 1523, 8), normal(2, 2, 1523, 8), normal(2, 2, 1523, 5)]
    grad = normal(2, 4, 1523, 5)
    with programs.x64(True):
        ring = jax.jit(lambda *x: ring_attention(*x, mesh=mesh(), axis="x", return_lse=True, **options))
        (output, lse), back = jax.vjp(ring, *arrays)
        found = output, lse, *back((grad, jnp.zeros_like(lse)))
    expected = *kvattn.attention(*arrays, return_lse=True, **options), *kvattn.attention_grad(*arrays, grad, **options)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


# ---- meshes


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_heads_lie_along_other_axes(kind):
    """Explicit axes name themselves. Results lie as the query does, and no program gathers."""
    devices = mesh((2, 2, 2), ("b", "h", "x"), kind)
    lies = NamedSharding(devices, P("b", "h", "x", None))
    arrays = [normal(2, 4, 16, 8), normal(2, 2, 24, 8), normal(2, 2, 24, 5)]
    given = [jax.device_put(x.astype(np.float32), lies) for x in arrays]
    named = {} if kind == "explicit" else {"batch_axis": "b", "head_axis": "h"}
    options = {"valid_lens": np.array([20, 3]), "bias": normal(4, 16, 24).astype(np.float32), "sink": np.float32([0, 1, 2, 3])}
    attend = partial(ring_attention, mesh=devices, axis="x", causal=True, query_offset=np.array([8, -2]), **named)
    program = jax.jit(jax.value_and_grad(lambda *x: (attend(*x, **options) ** 2).sum(), argnums=(0, 1, 2)))
    if kind == "auto":
        gathers = collectives(program.lower(*given).compile().as_text()).keys() - {"collective-permute", "all-reduce"}
        assert not gathers
    output = attend(*given, **options)
    assert output.sharding.is_equivalent_to(lies, 4)
    options |= {"causal": True, "query_offset": np.array([8, -2])}
    expected = kvattn.attention(*arrays, **options | {"bias": normal(4, 16, 24), "sink": np.arange(4.0)})
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    grads = kvattn.attention_grad(*arrays, 2 * expected, **options | {"bias": normal(4, 16, 24), "sink": np.arange(4.0)})
    for x, y in zip(program(*given)[1], grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


X = np.ones((2, 4, 16, 8), np.float32)
THREE = dict.fromkeys(("query", "key", "value"), np.ones((3, 4, 16, 8), np.float32))
HEADS = dict.fromkeys(("query", "key", "value"), np.ones((2, 3, 16, 8), np.float32))
NO_BATCH = dict.fromkeys(("query", "key", "value"), np.ones((16, 8), np.float32))
WRONG = [
    (TypeError, "mesh must be a jax.sharding.Mesh, not int", {"mesh": 8}),
    (ValueError, "axis is 'y', but the mesh has the axes 'b', 'x'", {"axis": "y"}),
    (ValueError, "must be different axes of the mesh, not 'x', 'x'", {"batch_axis": "x"}),
    (ValueError, "axis 0 (batch) is 3, no multiple of the 2 devices of batch_axis 'b'", THREE | {"batch_axis": "b"}),
    (ValueError, "axis -3 (heads) is 3, no multiple of the 2 devices", HEADS | {"head_axis": "b"}),
    (ValueError, "query has shape (16, 8); expected (batch, ...)", NO_BATCH | {"batch_axis": "b"}),
    (TypeError, "ring_attention has no dropout", {"dropout": 0.5}),
    (TypeError, "ring_attention has no return_weights: no device holds", {"return_weights": True}),
    (TypeError, "ring_attention has no segments: give them as a mask", {"segments": X[:, 0, :, 0]}),
    (TypeError, "ring_attention takes mask as an array, not as a function", {"mask": lambda query, key: query >= key}),
    (TypeError, "attention has no argument 'is_causal': here it is causal", {"is_causal": True}),
    (ValueError, "value has shape (2, 4, 15, 8) but key has (2, 4, 16, 8)", {"value": X[:, :, :15]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "given"), WRONG, ids=[message for _, message, _ in WRONG])
def test_what_is_wrong_is_said_with_its_cure(kind, message, given):
    given = {"query": X, "key": X, "value": X, "mesh": mesh((2, 4), ("b", "x")), "axis": "x"} | given
    with pytest.raises(kind, match=re.escape(message)):
        ring_attention(given.pop("query"), given.pop("key"), given.pop("value"), **given)


def test_what_is_cut_already_is_refused():
    lies = P(None, None, "x")
    inside = jax.shard_map(lambda x: ring_attention(x, x, x, mesh=mesh(), axis="x"), mesh=mesh(), in_specs=lies, out_specs=lies)
    with pytest.raises(ValueError, match=r"along which jax.shard_map has cut these arrays: call ring_attention outside"):
        jax.jit(inside)(X)


# ---- what it costs


COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}


def collectives(text):
    """The bytes that each kind of collective of a compiled program moves from a device, as often as it runs."""
    found, bodies, name = Counter(), {}, None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[1]
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)

    def walk(name, times):
        for line in bodies[name]:
            if kind := COLLECTIVE.search(line):
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", line[: kind.start()]):
                    found[kind[1]] += times * SIZES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
            trips = re.search(r"known_trip_count[^\d]*(\d+)", line)
            for called in re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)", line):
                walk(called, times * int(trips[1]) if trips and "body=" in line else times)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for called in group.replace("%", "").split(", "):
                    walk(called, times)

    walk(re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1], 1)
    return dict(found)


def compiled(devices, n, gradients, dtype="float32", **options):
    """The program of a call of one batch entry, 2 heads that share a key head, and 16 features, or of its gradients."""
    lies = NamedSharding(mesh((devices,)), P(None, None, "x", None))
    attend = partial(ring_attention, mesh=mesh((devices,)), axis="x", **options)
    program = (lambda *x: jax.vjp(attend, *x[:3])[1](x[3])) if gradients else attend
    heads = (2, 1, 1, 2)[: 4 if gradients else 3]
    given = [jax.ShapeDtypeStruct((1, h, n, 16), dtype, sharding=lies) for h in heads]
    return jax.jit(program, out_shardings=lies).lower(*given).compile()


ADDITIVE = {"W_q": np.ones((16, 4), "float32"), "W_k": np.ones((16, 4), "float32"), "w_v": np.ones(4, "float32")}
NAMED = {  # options that are arrays, of so many queries and keys, and how they lie
    "valid_lens": lambda n: ((4,), jnp.int32, P("b")),
    "each": lambda n: ((4, n), jnp.int32, P("b")),
    "query_offset": lambda n: ((4,), jnp.int32, P("b")),
    "mask": lambda n: ((4, 1, n, n), bool, P("b")),
    "bias": lambda n: ((4, 4, n, n), jnp.float32, P("b", "h")),
    "sink": lambda n: ((4,), jnp.float32, P("h")),
    "positions": lambda n: ((4, 1, n, 5), jnp.int32, P("b")),
    "segments": lambda n: ((4, n), jnp.int32, P("b")),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "lengths": {"valid_lens": "valid_lens"},
    "mask": {"mask": "mask"},
    "window": {"window": (5, 3)},
}
MORE = {
    "a length for each query, a bias": {"valid_lens": "each", "bias": "bias"},
    "offsets, softcap": {"causal": True, "query_offset": "query_offset", "softcap": 2.0},
    "a sink": {"sink": "sink", "window": (9, None)},
    "positions": {"positions": "positions"},
    "scores": {"return_scores": "capped", "softcap": 2.0, "causal": True, "return_lse": True},
    "additive, sparsemax": {"score": partial(kvattn.additive_score, **ADDITIVE), "normalize": kvattn.sparsemax},
    "a function": {"mask": lambda query, key: (query >= key) | (key < 7)},
    "segments, dropout": {"segments": ("segments", "segments"), "dropout": 0.5, "rng": 3},
}


def spread_over_batch_and_heads(attend, devices, n, call, gradients):
    """The collectives of the program of a call, or of its gradients, whose arrays lie along the batch and the heads."""
    flat, tree = jax.tree.flatten(dict(call))
    named = [i for i, x in enumerate(flat) if isinstance(x, str) and x in NAMED]
    given = [((4, heads, n, 16), jnp.float32, P("b", "h")) for heads in (4, 2, 2, 4)] + [NAMED[flat[i]](n) for i in named]
    given = [jax.ShapeDtypeStruct(*x, sharding=NamedSharding(devices, lies)) for *x, lies in given]

    def program(query, key, value, grad, *rest):
        options = jax.tree.unflatten(
            tree, [*map({**dict(enumerate(flat)), **dict(zip(named, rest, strict=True))}.get, range(len(flat)))]
        )

        def output(*arrays):
            found = attend(*arrays, **options)
            return found[0] if isinstance(found, tuple) else found

        return jax.vjp(output, query, key, value)[1](grad) if gradients else attend(query, key, value, **options)

    return collectives(jax.jit(program).lower(*given).compile().as_text())


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("call", (OPTIONS | MORE).values(), ids=OPTIONS | MORE)
def test_nothing_is_sent_where_batch_and_heads_are_spread(call, gradients):
    """By `kvattn.attention`, whose arrays may lie anywhere: of more queries than one device would leave to the formula."""
    for kind in KINDS if call in OPTIONS.values() else ("auto",):
        assert spread_over_batch_and_heads(kvattn.attention, mesh((4, 2), ("b", "h"), kind), 144, call, gradients) == {}


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"valid_lens": np.int32([144, 7, 0, 60])}], ids=["plain", "causal", "lengths"]
)
def test_a_call_that_runs_at_once_sends_nothing(options):
    """Of arrays that lie along batch and heads; where one device has all, tiles serve as ever."""
    lies, sent = NamedSharding(mesh((4, 2), ("b", "h")), P("b", "h")), []
    arrays = [normal(4, heads, 144, 16).astype(np.float32) for heads in (4, 2, 2, 4)]
    run = programs._run

    def seen(*args):
        sent.append(collectives(run.lower(*args).compile().as_text()))
        return run(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(programs, "_run", seen)
        given = [jax.device_put(x, lies) for x in arrays]
        output, grads = kvattn.attention(*given[:3], **options), kvattn.attention_grad(*given, **options)
    assert len(sent) >= 2
    assert not any(sent)
    assert all(x.sharding.is_equivalent_to(lies, 4) for x in (output, *grads))
    for x, y in zip(
        (output, *grads), (kvattn.attention(*arrays[:3], **options), *kvattn.attention_grad(*arrays, **options)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert kvattn.explain(*given[:3], **options).kernel == "the formula"
    assert kvattn.explain(*map(jnp.asarray, arrays[:3]), **options).kernel == "tiles"


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_a_program_of_one_device_has_tiles_where_there_are_eight(gradients):
    """Which a jitted call learns when it is compiled: what it holds at a time is not all scores, n times n of four heads."""
    n = 2048

    def loss(*arrays):
        return (kvattn.attention(*arrays, causal=True) ** 2).sum()

    given = [jax.ShapeDtypeStruct((1, 4, n, 8), np.float32)] * 3
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if gradients else loss)
    assert program.lower(*given).compile().memory_analysis().temp_size_in_bytes < 4 * n * n
    assert kvattn.explain(*(jnp.zeros(x.shape) for x in given)).kernel == "tiles"


def looped(attend, X):
    return attend(attend(X))


def second(attend, X):
    return jax.jvp(jax.grad(lambda X: (attend(X) ** 2).sum()), (X,), (X,))[1]


SHAPED = {  # transformations of a function of an array, under jit, and what they are to give, one entry after another
    "vmap": (lambda attend: jax.vmap(attend), lambda attend: lambda X: jnp.stack([attend(x) for x in X])),
    "scan": (
        lambda attend: lambda X: jax.lax.scan(lambda x, _: (attend(x), None), X, None, length=2)[0],
        lambda attend: partial(looped, attend),
    ),
    "gradients through scan": (
        lambda attend: jax.grad(lambda X: (jax.lax.scan(lambda x, _: (attend(x), None), X, None, length=2)[0] ** 2).sum()),
        lambda attend: jax.grad(lambda X: (looped(attend, X) ** 2).sum()),
    ),
    "gradients of vmap": (
        lambda attend: jax.grad(lambda X: (jax.vmap(attend)(X) ** 2).sum()),
        lambda attend: jax.grad(lambda X: sum((attend(x) ** 2).sum() for x in X)),
    ),
    "second derivatives": (lambda attend: partial(second, attend),) * 2,
    "checkpoint": (
        lambda attend: jax.grad(lambda X: (jax.checkpoint(attend)(X) ** 2).sum()),
        lambda attend: jax.grad(lambda X: (attend(X) ** 2).sum()),
    ),
    "shard_map over one of two axes": (
        lambda attend: jax.shard_map(
            attend, mesh=mesh((4, 2), ("b", "h")), in_specs=P(None, None, "h"), out_specs=P(None, None, "h"), axis_names={"h"}
        ),
        lambda attend: attend,
    ),
}


@pytest.mark.parametrize(("transformed", "expected"), SHAPED.values(), ids=SHAPED)
@pytest.mark.parametrize("lies", [None, "b"], ids=["on one device", "over eight"])
def test_a_program_that_is_not_compiled_yet_is_transformed(transformed, expected, lies):
    """Derivatives, batches and loops of what is to be one of two programs, beside calls that run at once on one device."""
    X, lens = normal(2, 8, 4, 160, 8).astype(np.float32), np.int32([0, 7, 20, 60, 99, 111, 150, 160])

    def attend(X):
        return kvattn.attention(X, X, X, causal=True, valid_lens=lens) if X.ndim == 4 else jnp.stack([attend(x) for x in X])

    given = X if lies is None else jax.device_put(X, NamedSharding(mesh((8,), ("b",)), P(None, lies)))
    found, wanted = jax.jit(transformed(attend))(given), expected(attend)(jnp.asarray(X))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=256 * np.finfo(np.float32).eps * np.abs(wanted).max())


def test_a_layer_sends_gradients_of_its_weights_alone():
    """Data lies along the batch; what is summed over it is the weights' gradient, of which every device has all."""
    devices, layer = mesh(names=("b",)), kv.MultiHeadAttention(16, 4, num_kv_heads=2)
    X = normal(8, 144, 16).astype(np.float32)
    variables = layer.init(jax.random.key(0), X[:1], X[:1], X[:1])

    def loss(variables, X):
        return (layer.apply(variables, X, X, X, causal=True)[0] ** 2).sum()

    kept = NamedSharding(devices, P())
    given = jax.tree.map(lambda x: jax.device_put(x, kept), variables), jax.device_put(X, NamedSharding(devices, P("b")))
    program = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(kept, NamedSharding(devices, P("b"))))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables))
    assert collectives(program.lower(*given).compile().as_text()) == {"all-reduce": weights}
    for x, y in zip(*map(jax.tree.leaves, (program(*given), jax.grad(loss, argnums=(0, 1))(variables, X))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("call", OPTIONS.values(), ids=OPTIONS)
def test_tiles_send_nothing_where_batch_and_heads_are_named(call, gradients):
    """Each device then works by its tiles, which XLA would not cut by itself."""
    devices = mesh((4, 2), ("b", "h"))
    attend = partial(ring_attention, mesh=devices, axis=None, batch_axis="b", head_axis="h")
    assert spread_over_batch_and_heads(attend, devices, 144, call, gradients) == {}


# bytes of what a device holds of 128 rows, in float32: of the query and of the output; of the key and value, K; and how often
# K is sent, and the gradients by key and value, which P - 1 hops and one home bring back. Zig-zag order: all there and back.
ROWS, K = 128 // 8 * 2 * 16 * 4, 128 // 8 * (16 + 16) * 4
SENT = {
    "plain": ({}, 7 * K, 7 * K + 7 * K + 8 * K),
    "causal": ({"causal": True}, 7 * K + ROWS + K + ROWS, 7 * K + 7 * K + 8 * K + 2 * (ROWS + K) + ROWS),
    "a window of 3 hops": ({"causal": True, "window": 40}, 3 * K, 3 * K + 3 * K + 4 * K),
}


@pytest.mark.parametrize(("options", "forwards", "backwards"), SENT.values(), ids=SENT)
def test_what_is_sent_is_what_is_stated(options, forwards, backwards):
    """From the compiled program: so much from each device by collective-permute, and nothing by any other collective."""
    assert collectives(compiled(8, 128, False, **options).as_text()) == {"collective-permute": forwards}
    assert collectives(compiled(8, 128, True, **options).as_text()) == {"collective-permute": backwards}


def test_the_page_of_costs_is_its_scripts():
    """docs/reference/rings.md shows the table that benchmarks/rings.py works out, by the bytes that programs send."""
    root = Path(__file__).parents[2]
    script = runpy.run_path(str(root / "benchmarks" / "rings.py"))
    page = (root / "docs" / "reference" / "rings.md").read_text()
    assert script["table"]() in page
    assert script["table_of_keys"]() in page
    for gradients, expected in enumerate(SENT["causal"][1:]):
        assert script["sent"](128, 8, heads=2, key_heads=1, d=16, size=4, gradients=bool(gradients)) == expected


def test_the_page_of_the_docs():
    """Its code, word for word, on eight virtual devices."""
    page = Path(__file__).parents[2] / "docs" / "howto" / "processes.md"
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) if "import jax" in x)
    exec(code, {})


def test_a_window_on_both_sides_sends_both_ways_and_no_further():
    assert collectives(compiled(8, 128, False, window=(40, 10)).as_text()) == {"collective-permute": 4 * K}


def test_a_device_needs_memory_for_its_share():
    """Gradients and all: as much where four times the devices share four times the sequence, and four times for one so long."""
    few, many, long = (
        compiled(devices, n, True, causal=True).memory_analysis().temp_size_in_bytes
        for devices, n in ((2, 1024), (8, 4096), (8, 16384))
    )
    assert few * 0.99 < many < few * 1.01
    assert long < many * 4.2


def test_causal_work_is_balanced():
    """Each of P devices works through 2 P + 1 pairs of chunks, of (2 P)^2 that there are: none that nobody needs."""
    worked = Counter()

    def score(query, key):
        jax.debug.callback(lambda device: worked.update([int(device)]), jax.lax.axis_index("x"))
        return kvattn.scaled_dot_score(query, key)

    x = np.ones((1, 1, 64, 4), np.float32)
    jax.block_until_ready(ring_attention(x, x, x, mesh=mesh(), axis="x", causal=True, score=score))
    jax.effects_barrier()
    assert worked == dict.fromkeys(range(8), 17)
