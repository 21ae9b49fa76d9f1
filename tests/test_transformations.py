"""The frameworks' own transformations of `kvattn.attention` give the answers of the plain call."""

import time
from functools import partial

import numpy as np
import pytest
from near import assert_near
from test_errors import BAD, GOOD

import kvattn

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 3, 8), (2, 2, 6, 8), (2, 2, 6, 5)))
G = RNG.standard_normal((2, 4, 3, 5)).astype(np.float32)
LENS = np.array([6, 2])
OPTIONS = {
    "plain": {},
    "causal, padded": {"causal": True, "query_offset": 3, "valid_lens": LENS},
    "window, softcap": {"window": (2, 1), "softcap": 2.0},
    "additive": {
        "score": partial(
            kvattn.additive_score,
            **{
                name: RNG.standard_normal(shape).astype(np.float32)
                for name, shape in (("W_q", (8, 4)), ("W_k", (8, 4)), ("w_v", 4))
            },
        )
    },
    "sparsemax": {"normalize": kvattn.sparsemax},
}


def torch_compile(**options):
    import torch

    q, k, v = map(torch.tensor, (Q, K, V))
    torch._dynamo.reset()
    return torch.compile(partial(kvattn.attention, **options), fullgraph=True, backend="aot_eager")(q, k, v)


def torch_func_vmap(**options):
    import torch

    lens = options.pop("valid_lens", None)
    one = lambda q, k, v, n: kvattn.attention(q, k, v, **options, **({"valid_lens": n[None]} if lens is not None else {}))  # noqa: E731
    inputs = [torch.tensor(x)[:, None] for x in (Q, K, V)]
    return torch.func.vmap(one)(*inputs, torch.tensor(LENS))[:, 0]


def jax_jit(**options):
    import jax

    return jax.jit(partial(kvattn.attention, **options))(*map(jax.numpy.asarray, (Q, K, V)))


def jax_vmap(**options):
    import jax

    lens = options.pop("valid_lens", None)
    one = lambda q, k, v, n: kvattn.attention(q, k, v, **options, **({"valid_lens": n[None]} if lens is not None else {}))  # noqa: E731
    inputs = [jax.numpy.asarray(x)[:, None] for x in (Q, K, V)]
    return jax.vmap(one)(*inputs, jax.numpy.asarray(LENS))[:, 0]


def jax_checkpoint(**options):
    import jax

    return jax.checkpoint(partial(kvattn.attention, **options))(*map(jax.numpy.asarray, (Q, K, V)))


def tensorflow_function(jit_compile=False, **options):
    import tensorflow as tf

    return tf.function(partial(kvattn.attention, **options), jit_compile=jit_compile)(*map(tf.constant, (Q, K, V)))


def tensorflow_xla(**options):
    return tensorflow_function(jit_compile=True, **options)


def tensorflow_unknown_batch(**options):
    import tensorflow as tf

    free = [tf.TensorSpec((None, *x.shape[1:]), tf.float32) for x in (Q, K, V)]
    return tf.function(partial(kvattn.attention, **options), input_signature=free)(*map(tf.constant, (Q, K, V)))


def tensorflow_keras_functional(**options):
    import keras

    class Attend(keras.layers.Layer):
        def call(self, q, k, v):
            return kvattn.attention(q, k, v, **options)

    inputs = [keras.Input(x.shape[1:]) for x in (Q, K, V)]
    return keras.Model(inputs, Attend()(*inputs))([Q, K, V])


def mxnet_hybrid(hybridize, *inputs, **options):
    """Outputs and gradients of a HybridBlock with these inputs."""
    from kvattn import mxnet as kv

    mx = kv.mx

    class Attend(mx.gluon.HybridBlock):
        def hybrid_forward(self, F, q, k, v):
            return kv.attention(q, k, v, **options)

    net = Attend()
    if hybridize:
        net.hybridize()
    leaves = [mx.nd.array(x, dtype="float32") for x in inputs]
    for leaf in leaves:
        leaf.attach_grad()
    with mx.autograd.record():
        output = net(*leaves)
        loss = (output * mx.nd.array(G, dtype="float32")).sum()
    loss.backward()
    return output, [leaf.grad for leaf in leaves]


def mxnet_hybridize(**options):
    return mxnet_hybrid(True, Q, K, V, **options)[0]


FORWARD = {
    "mxnet": [mxnet_hybridize],
    "torch": [torch_compile, torch_func_vmap],
    "jax": [jax_jit, jax_vmap, jax_checkpoint],
    "tensorflow": [tensorflow_function, tensorflow_xla, tensorflow_unknown_batch, tensorflow_keras_functional],
}


def torch_backward(f, *inputs):
    import torch

    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    f(*leaves, torch.tensor(G)).backward()
    return [leaf.grad for leaf in leaves]


def torch_func_grad(f, *inputs):
    import torch

    return torch.func.grad(f, argnums=(0, 1, 2))(*map(torch.tensor, inputs), torch.tensor(G))


def torch_compile_backward(f, *inputs):
    import torch

    torch._dynamo.reset()
    return torch_backward(torch.compile(f, fullgraph=True, backend="aot_eager"), *inputs)


def jax_grad(f, *inputs):
    import jax

    return jax.grad(f, argnums=(0, 1, 2))(*map(jax.numpy.asarray, inputs), jax.numpy.asarray(G))


def jax_jit_grad(f, *inputs):
    import jax

    return jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*map(jax.numpy.asarray, inputs), jax.numpy.asarray(G))


def tensorflow_tape(f, *inputs):
    import tensorflow as tf

    leaves = [tf.Variable(x) for x in inputs]
    with tf.GradientTape() as tape:
        loss = f(*leaves, tf.constant(G))
    return tape.gradient(loss, leaves)


def mxnet_autograd(f, *inputs):
    kvattn.dispatch.load("mxnet")
    import mxnet as mx

    leaves = [mx.np.array(x, dtype="float32") for x in inputs]
    for leaf in leaves:
        leaf.attach_grad()
    with mx.autograd.record():
        loss = f(*leaves, mx.np.array(G, dtype="float32"))
    loss.backward()
    return [leaf.grad for leaf in leaves]


BACKWARD = {
    "torch": [torch_backward, torch_func_grad, torch_compile_backward],
    "jax": [jax_grad, jax_jit_grad],
    "tensorflow": [tensorflow_tape],
    "mxnet": [mxnet_autograd],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compilers' own
@pytest.mark.parametrize("options", OPTIONS)
def test_forward(backend, options):
    expected = kvattn.attention(*(x.astype(np.float64) for x in (Q, K, V)), **_wide(OPTIONS[options]), backend="numpy")
    for transformed in FORWARD.get(backend, []):
        assert_near(kvattn.to_numpy(transformed(**OPTIONS[options])), expected, err_msg=transformed.__name__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet's own
@pytest.mark.parametrize("options", OPTIONS)
def test_hybridize_has_the_gradients_of_the_plain_block(backend, options):
    if backend == "mxnet":
        (output, grads), (hybrid, hybrid_grads) = (mxnet_hybrid(h, Q, K, V, **OPTIONS[options]) for h in (False, True))
        for plain, found in zip([output, *grads], [hybrid, *hybrid_grads], strict=True):
            np.testing.assert_array_equal(found.asnumpy(), plain.asnumpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compilers' own
@pytest.mark.parametrize("options", OPTIONS)
def test_backward(backend, options):
    wide = [x.astype(np.float64) for x in (Q, K, V, G)]
    expected = kvattn.attention_grad(*wide, **_wide(OPTIONS[options]), backend="numpy")

    def loss(q, k, v, g):
        return (kvattn.attention(q, k, v, **OPTIONS[options]) * g).sum() if backend != "tensorflow" else _tf_sum(q, k, v, g)

    def _tf_sum(q, k, v, g):
        import tensorflow as tf

        return tf.reduce_sum(kvattn.attention(q, k, v, **OPTIONS[options]) * g)

    for differentiate in BACKWARD.get(backend, []):
        for found, wanted in zip(differentiate(loss, Q, K, V), expected, strict=True):
            assert_near(kvattn.to_numpy(found), wanted, err_msg=differentiate.__name__)


@pytest.mark.parametrize("options", OPTIONS)
def test_torch_gives_gradients_where_gradients_are_off(backend, options):
    """Tensors made inside inference_mode are taken too, wherever they stand."""
    if backend == "torch":
        import torch

        given = {**OPTIONS[options], "mask": RNG.random((3, 6)) < 0.8}
        expected = kvattn.attention_grad(*map(torch.tensor, (Q, K, V, G)), **given)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                found = kvattn.attention_grad(*map(torch.tensor, (Q, K, V, G)), **given)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0)
                assert not x.requires_grad


def test_torch_gives_gradients_by_parameters_in_inference_mode(backend):
    if backend == "torch":
        import torch

        x = torch.randn(5, 4, generator=torch.manual_seed(0))
        params = {"W_q": x[:4], "W_k": x[1:], "W_v": x[:4] * 2, "W_o": x[1:]}
        expected = kvattn.multi_head_attention_grad(x, x, x, params, x, num_heads=2, wrt=["W_q", "value"])
        with torch.inference_mode():
            inside = {name: W.clone() for name, W in params.items()}
            found = kvattn.multi_head_attention_grad(x, x, x.clone(), inside, x, num_heads=2, wrt=["W_q", "value"])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_torch_autocast_narrows_the_products_and_no_result(backend, options):
    if backend == "torch":
        import torch

        expected = kvattn.attention(Q, K, V, **OPTIONS[options])
        with torch.autocast("cpu", torch.bfloat16):
            found = kvattn.attention(*map(torch.tensor, (Q, K, V)), **OPTIONS[options])
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=0.05)


def test_torch_compile_serves_the_steps_of_decoding_with_one_program(backend):
    """From the second step on the cache's length and the offset are symbols."""
    if backend == "torch":
        import torch

        torch._dynamo.reset()
        programs = []
        step = torch.compile(
            lambda q, k, v, at: kvattn.attention(q, k, v, causal=True, query_offset=at), fullgraph=True,
            backend=lambda graph, _: programs.append(graph) or graph,
        )  # fmt: skip
        query, key, value = map(torch.tensor, (Q[..., :1, :], K, V))
        for m in range(1, 7):
            keys, values = key[..., :m, :], value[..., :m, :]
            torch.testing.assert_close(step(query, keys, values, m - 1), kvattn.attention(query, keys, values))
        assert len(programs) <= 3  # one key, two, and any number


@pytest.mark.parametrize("lens", [np.array(4, "int32"), np.array([2, 0, 6], "int32")], ids=["()", "(n,)"])
def test_lengths_without_a_batch_may_be_traced(backend, tab, lens):
    """Every head has the same lengths: what the frontend makes of them is part of the program."""
    x, y = Q[0, 0], K[0, 0]
    params = {name: tab.asarray(np.eye(8, dtype=np.float32)) for name in ("W_q", "W_k", "W_v")}
    each = [kvattn.attention(x[:, i:j], y[:, i:j], y[:, i:j], valid_lens=lens) for i, j in ((0, 4), (4, 8))]

    def heads(query, key, lens):
        return kvattn.multi_head_attention(query, key, key, params, num_heads=2, valid_lens=lens)

    trace = {"torch": torch_program, "jax": jax_program, "tensorflow": tensorflow_program}.get(
        backend, lambda function: function
    )
    got = trace(heads)(tab.asarray(x), tab.asarray(y), tab.asarray(lens))
    np.testing.assert_allclose(kvattn.to_numpy(got), np.concatenate(each, axis=-1), rtol=1e-4, atol=1e-5)


def torch_program(function):
    import torch

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


def jax_program(function):
    import jax

    return jax.jit(function)


def tensorflow_program(function):
    import tensorflow as tf

    return tf.function(function)


def _wide(options):
    """The same options with float64 parameters, for the answer."""
    score = options.get("score")
    if score is None:
        return options
    return {**options, "score": partial(score.func, **{name: x.astype(np.float64) for name, x in score.keywords.items()})}


def test_second_derivatives(backend):
    """The plain path, in torch and jax: a Hessian-vector product against central differences of the gradient."""
    q, k, v, g = (x[0, :2].astype(np.float64) for x in (Q, K, V, G))
    direction = RNG.standard_normal(q.shape)
    h = 1e-6
    ends = [kvattn.attention_grad(q + s * h * direction, k, v, g, backend="numpy")[0] for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * h)
    if backend in SECOND:
        np.testing.assert_allclose(kvattn.to_numpy(SECOND[backend](q, k, v, g, direction)), expected, rtol=0, atol=1e-7)


def torch_second(q, k, v, g, direction):
    import torch

    q, k, v, g, direction = map(torch.tensor, (q, k, v, g, direction))
    q.requires_grad_()
    (by_query,) = torch.autograd.grad((kvattn.attention(q, k, v) * g).sum(), q, create_graph=True)
    return torch.autograd.grad((by_query * direction).sum(), q)[0]


def jax_second(q, k, v, g, direction):
    import jax

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        q, k, v, g, direction = map(jax.numpy.asarray, (q, k, v, g, direction))
        return jax.jvp(jax.grad(lambda q: (kvattn.attention(q, k, v) * g).sum()), (q,), (direction,))[1]


SECOND = {"torch": torch_second, "jax": jax_second}


def torch_traced(function, *arrays):
    import torch

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")(*arrays)


TRACED = {
    "torch": torch_traced,
    "jax": lambda f, *arrays: __import__("jax").jit(f)(*arrays),
    "tensorflow": lambda f, *arrays: __import__("tensorflow").function(f)(*arrays),
    "mxnet": lambda f, *arrays: mxnet_block(**f.keywords)(*arrays),
}
UNTRACED = {"query of text", "ragged query"}  # no arrays to trace
# values, which these compilers do not show
UNSEEN = {"negative length", "position out of reach", "position below none", "segments beyond 32 bits"}
NARROWED = {"mixed dtypes", "integer query"}  # jax.jit makes 32 bits of 64, before anybody sees them


def mxnet_block(**options):
    """A hybridized block that attends; MXNet's are traced when they first run."""
    from kvattn import mxnet as kv

    class Block(kv.mx.gluon.HybridBlock):
        def hybrid_forward(self, F, *arrays):
            return kv.attention(*arrays, **options)

    block = Block()
    block.hybridize()
    return block


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet's own
@pytest.mark.parametrize("what", [what for what in BAD if what not in UNTRACED])
def test_errors_are_the_same_at_trace_time(backend, tab, what):
    if backend in TRACED and what not in {"torch": UNSEEN, "tensorflow": UNSEEN, "jax": NARROWED}.get(backend, ()):
        replaced, error, _ = BAD[what]
        arrays = [tab.asarray({**GOOD, **replaced}[name]) for name in ("query", "key", "value")]
        call = partial(kvattn.attention, **{name: x for name, x in replaced.items() if name not in GOOD})
        with pytest.raises(error) as plain:
            call(*arrays)
        wrapped = Exception if backend == "torch" else error  # torch.compile raises its own, with the message
        for _ in range(2 if backend == "mxnet" else 1):  # a block's graph is kept
            with pytest.raises(wrapped) as traced:
                TRACED[backend](call, *arrays)
            assert str(plain.value) in str(traced.value)


@pytest.mark.parametrize("what", ["float mask", "float positions", "negative side", "infinite scale", "dropout of one"])
def test_a_symbol_waits_for_its_shape_and_for_nothing_else(backend, tab, what):
    """What is wrong with anything else is raised when the block is traced."""
    if backend == "mxnet":
        from kvattn import mxnet as kv

        replaced, error, words = BAD[what]
        with pytest.raises(error) as traced:
            kv.attention(*map(kv.mx.sym.var, ("query", "key", "value")), **replaced)
        assert [word for word in words if word not in str(traced.value)] == []


def test_a_symbol_is_sent_to_its_namespace(backend, tab):
    if backend == "mxnet":
        import mxnet as mx

        from kvattn import mxnet as kv

        query, key, value = map(mx.sym.var, ("query", "key", "value"))
        with pytest.raises(TypeError, match=r"query must be an array, not Symbol: .*`from kvattn import mxnet`"):
            kvattn.attention(query, key, value)
        with pytest.raises(TypeError, match="query is a Symbol, but key is of class ndarray: a graph takes Symbols"):
            kv.attention(query, K, value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet's own
def test_a_hybridized_block_returns_what_was_asked_for_in_half_precision(backend, tab):
    if backend == "mxnet":
        import mxnet as mx

        inputs = [mx.nd.array(x, dtype="float16") for x in (Q, K, V)]
        chosen = [[0, 2], [1, 3], [5, -1]]
        call = partial(kvattn.attention, positions=chosen, return_weights=True, return_lse=True)
        for found, expected in zip(mxnet_block(**call.keywords)(*inputs), call(*inputs), strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found.asnumpy(), expected.asnumpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MXNet's own
def test_a_score_of_ones_own_is_let_go_with_its_block(backend, tab):
    if backend == "mxnet":
        import gc
        import weakref

        import mxnet as mx

        def score(query, key):
            return kvattn.dot_score(query, key)

        block = mxnet_block(score=score)
        block(*(mx.nd.array(x, dtype="float32") for x in (Q, K, V))).wait_to_read()
        kept = weakref.ref(score)
        del block, score
        for _ in range(100):  # the graph, then its operator, garbage in a cycle once a thread of MXNet's has let go of it
            gc.collect()
            if kept() is None:
                break
            time.sleep(0.1)
        assert kept() is None
