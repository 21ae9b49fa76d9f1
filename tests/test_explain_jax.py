"""`kvattn.explain` says what runs: which kernels of JAX's a call enters while its program is traced, and in how many parts.

No program is compiled: a call that runs at once is traced in place of its program, as a jitted one is.
"""

import re
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen

if "jax" not in chosen():
    pytest.skip("this run has no jax", allow_module_level=True)

import jax
import jax.numpy as jnp

import kvattn
from kvattn.backends import jax as tab
from kvattn.call import Call
from kvattn.kernels.jax import blocks, nonfinite, programs, tiles

ENTRIES = {  # what enters each kernel, and each way of going through parts of a call, as explain names them
    "tiles": (tiles, "attention"),
    "the formula": (tab, "_formula"),
    "the formula, pair by pair": (nonfinite, "attention"),
    "in blocks of pairs": (tab, "_in_parts"),
    "in blocks beside their windows": (tab, "_in_window_blocks"),
    "in blocks of bounded memory": (blocks, "attention"),
    "the scores": (Call, "of_scores"),
    "of selected keys": (tab, "_of_selected_keys"),
}
PARTS = ("in ", "of ")
SHAPES = {  # query, key: on both sides of every size at which the choice changes
    "few scores": ((1, 2, 100, 8), (1, 2, 100, 8)),
    "many scores, no window": ((1, 2, 130, 8), (1, 2, 130, 8)),
    "many scores": ((1, 4, 1100, 8), (1, 2, 1100, 8)),
    "a block of queries, many keys": ((1, 2, 256, 8), (1, 2, 4200, 8)),
    "few queries, many keys": ((1, 2, 8, 8), (1, 2, 4200, 8)),
    "a query": ((1, 2, 1, 8), (1, 2, 300, 8)),
    "no batch": ((600, 8), (1200, 8)),
    "no keys": ((1, 2, 4, 8), (1, 2, 0, 8)),
}


def _options(n, m):
    near = np.minimum(np.arange(n)[:, None] + np.arange(3), m - 1)
    key_bias = np.zeros((1, m), "float32")
    yield from (
        {}, {"causal": True}, {"causal": True, "query_offset": m - n}, {"causal": True, "query_offset": jnp.int32(m - n)},
        {"window": 3}, {"window": (20, 0), "query_offset": m - n}, {"window": (20, 0), "query_offset": jnp.int32(3)},
        {"window": (None, 5)}, {"window": (20, 0), "query_offset": m - n, "normalize": kvattn.sparsemax},
        {"window": 3, "normalize": kvattn.sparsemax}, {"window": 3, "return_weights": True}, {"normalize": kvattn.sparsemax},
        {"score": kvattn.dot_score}, {"score": kvattn.cosine_score}, {"score": kvattn.distance_score},
        {"return_weights": True}, {"return_lse": True}, {"return_scores": "raw"}, {"softcap": 2.0, "scale": -0.5},
        {"dropout": 0.5, "rng": 1}, {"dropout": 0.5, "rng": 1, "window": 3}, {"sink": np.float32(0.5)},
        {"sink": np.float32(0.5), "window": 3}, {"positions": near}, {"positions": near, "normalize": kvattn.sparsemax},
        {"mask": np.ones((n, m), bool)}, {"bias": key_bias}, {"bias": key_bias, "window": 3, "normalize": kvattn.sparsemax},
        {"mask": lambda q, k: k <= q}, {"mask": lambda q, k: (k <= q) & (k > q - 40)},
        {"mask": lambda q, k: (k < 64) | (k // 300 == q // 300)}, {"bias": lambda q, k: -0.5 * abs(q - k).astype("float32")},
        {"bias": lambda q, k: 0.5 * (q * k).astype("float32")},
    )  # fmt: skip
    if n == m:
        yield from ({"segments": np.arange(n)[None] // 300}, {"segments": np.arange(n)[None] % 3})


@contextmanager
def entered():
    """The names of ENTRIES, as they are entered."""
    names, whole = [], programs._run.__wrapped__

    def named(name, run):
        def spied(*args, **options):
            names.append(name)
            return run(*args, **options)

        return spied

    def traced(function, call, named, traits, arrays, given):
        run = partial(whole, function, call, named, traits)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, arrays, given))

    with ExitStack() as stack:
        stack.enter_context(patch.multiple(programs, _run=traced, _run_exact=programs.exact(traced)))
        stack.enter_context(patch.object(tab, "_attend_plainly", tab._attend_plainly.__wrapped__))
        for name, (module, function) in ENTRIES.items():
            stack.enter_context(patch.object(module, function, named(name, getattr(module, function))))
        yield names


def _ran(names, with_scores):
    """What was entered, in explain's words: the kernel, the ways to it, and how many times the kernel was."""
    assert ("the scores" in names) == with_scores, names
    names = names[: names.index("the scores")] if with_scores else names  # which the formula makes, after the kernel
    kernels, ways = [x for x in names if not x.startswith(PARTS)], {x for x in names if x.startswith(PARTS)}
    of_the_largest_part = "in blocks of pairs" in ways  # which comes first here; what a small last one takes is not told
    assert of_the_largest_part or len({*kernels}) == 1, names
    return kernels[0], ways, len(kernels)


def _said(said):
    """The same of an Explanation; None for how many times where it does not tell, as of a loop, which is traced once."""
    ways, parts = set(), re.search(r"(\d+) blocks of queries, each beside", said.why)
    if "beside the keys in their window" in said.why or "each beside the keys in its window" in said.why:
        ways.add("in blocks beside their windows")
    if "as many as keep memory bounded" in said.why:
        ways.add("in blocks of bounded memory")
    if said.kernel.endswith("in blocks of pairs"):
        ways.add("in blocks of pairs")
    if said.kernel.endswith("of selected keys"):
        ways.add("of selected keys")
    kernel = said.kernel.removesuffix(", of selected keys").removesuffix(", in blocks of pairs").removesuffix(", in blocks")
    return kernel, ways, int(parts[1]) if parts else None


@pytest.mark.parametrize("jitted", [False, True], ids=["at once", "jitted"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_what_is_explained_is_what_is_traced(shapes, jitted):
    (*_, n, _), (*_, m, _) = SHAPES[shapes]
    query, key = (jnp.ones(shape) for shape in SHAPES[shapes])
    for options in _options(n, m):
        explained = []

        def attend(query, key, explained=explained, options=options):
            explained.append(kvattn.explain(query, key, key, **options))
            names.clear()
            return kvattn.attention(query, key, key, **options)

        with entered() as names:
            jax.eval_shape(attend, query, key) if jitted else attend(query, key)
        (*ran, times), (*told, parts) = _ran(names, "the scores beside it" in explained[0].why), _said(explained[0])
        assert ran == told, (options, explained[0], names)
        assert parts in (None, times), (options, explained[0], names)
