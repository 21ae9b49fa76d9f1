"""Functions of positions and segments in MXNet's hybridized blocks, and gradients by what a bias function reads."""

import numpy as np
import pytest
from conftest import chosen

if "mxnet" not in chosen():
    pytest.skip("this run is without MXNet", allow_module_level=True)

from paired import SEGMENTS, SLOPES, answers, inputs, looked_at, said

import kvattn
from kvattn import mxnet as kv
from kvattn.backends.mxnet import asarray, mx

ARRAYS = [asarray(x) for x in inputs()]
FLOATS = lambda x: x.astype("float32")  # noqa: E731
SAID = said(asarray(SLOPES), asarray(SEGMENTS), FLOATS)


class Attend(mx.gluon.HybridBlock):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def hybrid_forward(self, F, query, key, value, segments=None):
        options = self.options if segments is None else {"segments": segments}
        return kv.attention(query, key, value, **options)


@pytest.mark.parametrize("name", SAID)
def test_a_hybridized_block_gives_the_answer(name):
    mx.npx.set_np()
    block = Attend(SAID[name])
    block.hybridize()
    with looked_at():
        got = block(*ARRAYS).asnumpy()
    np.testing.assert_allclose(got, answers()[name], atol=1e-5)


def test_segments_may_be_a_symbol():
    mx.npx.set_np()
    block = Attend({})
    block.hybridize()
    np.testing.assert_allclose(block(*ARRAYS, asarray(SEGMENTS)).asnumpy(), answers()["segments"], atol=1e-5)


@pytest.mark.parametrize("most", [10**6, 2000])
def test_what_a_bias_function_reads_has_its_gradient(most):
    mx.npx.set_np()
    slopes = asarray(SLOPES)
    slopes.attach_grad()
    with looked_at(BIAS=most):
        with mx.autograd.record():
            loss = kvattn.attention(*ARRAYS, **said(slopes, None, FLOATS)["bias"]).sum()
        loss.backward()
    np.testing.assert_allclose(slopes.grad.asnumpy(), answers()["by the slopes"], rtol=1e-4)
