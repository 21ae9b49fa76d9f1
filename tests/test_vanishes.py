"""Compiled, the frontend leaves nothing behind: the graph of `kvattn.attention` is the graph of what serves the call.

PyTorch's is scaled_dot_product_attention's own. JAX's and TensorFlow's are compared with the tab's function: their own
attention is another computation.
"""

import numpy as np
import pytest

import kvattn

X = np.random.default_rng(0).standard_normal((3, 1, 2, 4, 8)).astype("float32")
OPTIONS = {"plain": {}, "causal": {"causal": True}}
calls = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def torch_graph(function, inputs):
    """The functions that Dynamo's graph calls."""
    import torch

    seen = []

    def compiler(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=compiler)(*inputs)
    return seen


def torch_aten(function, inputs):
    """Every node of the two graphs that are left to the compiler: forward and backward."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    seen = []

    def compiler(graph, _):
        seen.append([(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))(
        *leaves
    ).sum().backward()
    return seen


@calls
def test_torch_compile_sees_sdpa_alone(backend, options):
    if backend == "torch":
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        def ours(q, k, v):
            return kvattn.attention(q, k, v, **options)

        def native(q, k, v):
            return scaled_dot_product_attention(q, k, v, is_causal="causal" in options)

        inputs = torch.tensor(X).unbind()
        assert torch_graph(ours, inputs) == torch_graph(native, inputs) == [scaled_dot_product_attention]
        assert torch_aten(ours, inputs) == torch_aten(native, inputs)
        assert len(torch_aten(ours, inputs)) == 2


def jax_graph(function, inputs):
    import jax

    return str(jax.make_jaxpr(jax.jit(function))(*inputs))


def tensorflow_graph(function, inputs):
    import tensorflow as tf

    graph = tf.function(function).get_concrete_function(*inputs).graph
    return [(op.type, [x.name for x in op.inputs], [str(x.shape) for x in op.outputs]) for op in graph.get_operations()]


GRAPHS = {"jax": jax_graph, "tensorflow": tensorflow_graph}


@calls
def test_jit_and_tf_function_see_the_tab_alone(backend, tab, options):
    if backend in GRAPHS:
        inputs = [tab.asarray(x) for x in X]
        graph = GRAPHS[backend](lambda q, k, v: kvattn.attention(q, k, v, **options), inputs)
        own = GRAPHS[backend](lambda q, k, v: tab.attention(q, k, v, **options), inputs)
        assert graph == own
        assert "callback" not in str(graph)
        assert "PyFunc" not in str(graph)
