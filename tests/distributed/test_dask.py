"""kvattn.distributed.dask: the suite, laziness, what is read, a cluster of processes, and what is refused."""

import adapter
import dask
import dask.array as da
import numpy as np
import pytest

from kvattn.backends import numpy as tab
from kvattn.distributed import dask as kd

REFUSES = {
    "normalize": lambda case: case.keywords.get("normalize", "softmax") != "softmax" or case.call == "nadaraya_watson",
    "positions": lambda case: "positions" in case.arguments,
}


def chunked(x, parts, batches=1):
    sizes = {axis: x.shape[axis] for axis in range(x.ndim)} | {x.ndim - 2: tuple(adapter.cut(x.shape[-2], parts))}
    if x.ndim > 2 and x.shape[0] > 1:
        sizes[0] = tuple(adapter.cut(x.shape[0], batches))
    return da.from_array(x, chunks=sizes)


def cut(parts, batches=1, lazy=()):
    """NumPy's backend with keys in chunks, by the synchronous scheduler; ``lazy``: what is a dask array beside them."""

    def arguments(query, key, value, options):
        options = {name: x for name, x in options.items() if name != "return_weights"}
        options = {
            name: da.from_array(x) if name in lazy and x is not None and np.ndim(x) else x for name, x in options.items()
        }
        query = chunked(query, parts, batches) if "query" in lazy else query
        return query, chunked(key, parts, batches), chunked(value, parts, batches), options

    def attention(query, key, value, **options):
        *arrays, options = arguments(query, key, value, options)
        return dask.compute(kd.attention(*arrays, **options), scheduler="sync")[0]

    def attention_grad(query, key, value, grad_output, **options):
        *arrays, options = arguments(query, key, value, options)
        return dask.compute(kd.attention_grad(*arrays, grad_output, **options), scheduler="sync")[0]

    return adapter.backend(tab, attention, attention_grad)


@pytest.mark.parametrize(("parts", "batches", "lazy"), [
    (1, 1, ()), (2, 2, ("query", "mask", "bias", "valid_lens", "query_offset", "sink")), (3, 1, ("query",)), (4, 3, ()),
])  # fmt: skip
def test_the_suite(parts, batches, lazy):
    counts = adapter.judge(cut(parts, batches, lazy), REFUSES)
    assert counts == {
        adapter.JUDGED: len(adapter.cases()) - sum(counts[reason] for reason in REFUSES),
        **{x: counts[x] for x in REFUSES},
    }
    assert counts[adapter.JUDGED] > 330
