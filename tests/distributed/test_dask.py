"""kvattn.distributed.dask: the suite, what is lazy, what is read, the schedulers, a worker that dies, and what is refused."""

import doctest
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import adapter
import dask
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster

import kvattn
from kvattn.backends import numpy as tab
from kvattn.distributed import dask as kd
from kvattn.pairs import Pairs

REFUSES = {
    "normalize": lambda case: case.keywords.get("normalize", "softmax") != "softmax" or case.call == "nadaraya_watson",
    "positions": lambda case: "positions" in case.arguments,
    "dropout": lambda case: "dropout" in case.keywords,
}
ARRAYS = ("query", "mask", "bias", "valid_lens", "query_offset", "sink")


def chunked(x, parts, batches=1):
    sizes = dict(enumerate(x.shape)) | {x.ndim - 2: tuple(adapter.cut(x.shape[-2], parts))}
    if x.ndim > 2 and x.shape[0] > 1:
        sizes[0] = tuple(adapter.cut(x.shape[0], batches))
    return da.from_array(x, chunks=sizes)


def cut(parts, batches, lazy):
    """NumPy's backend with its keys in chunks, by one thread; ``lazy``: what is a dask array beside them."""

    def arguments(query, key, value, options):
        if isinstance(said := options.get("mask"), Pairs):
            segments = said.segments if said.segments is None or query.ndim > 2 else [x[0] for x in said.segments]
            given = {"mask": said.mask_function or said.mask, "bias": said.bias_function or options["bias"]}
            options |= given | {"segments": segments}
        options = {name: da.from_array(x) if name in lazy and np.ndim(x) else x for name, x in options.items()}
        query = chunked(query, parts, batches) if "query" in lazy else query
        return query, chunked(key, parts, batches), chunked(value, parts, batches), options

    def attention(query, key, value, **options):
        *arrays, options = arguments(query, key, value, options)
        return dask.compute(kd.attention(*arrays, **options), scheduler="sync")[0]

    def attention_grad(query, key, value, grad_output, **options):
        *arrays, options = arguments(query, key, value, options)
        return dask.compute(kd.attention_grad(*arrays, grad_output, **options), scheduler="sync")[0]

    return adapter.backend(tab, attention, attention_grad, functions=True)


LAYOUTS = (1, 1, ()), (2, 2, ()), (3, 1, ("query",)), (4, 3, ())


@pytest.mark.parametrize(("parts", "batches", "lazy"), LAYOUTS)
def test_the_suite(parts, batches, lazy):
    """Each case in one way, the next case in the next; in all of them where KVATTN_EVERY is set, once a week."""
    first, every = LAYOUTS.index((parts, batches, lazy)), len(LAYOUTS)
    asked = adapter.cases() if os.environ.get("KVATTN_EVERY") else adapter.cases()[first::every]
    counts = adapter.judge(cut(parts, batches, lazy), REFUSES, asked=asked)
    assert set(counts) == {adapter.JUDGED, *REFUSES}
    assert sum(counts.values()) == len(asked)
    assert counts[adapter.JUDGED] > 380 // every


def test_the_suite_where_options_are_dask_arrays():
    some = [case for case in adapter.cases() if {*ARRAYS[1:]} & {*case.arguments}][::4]
    counts = adapter.judge(cut(3, 2, ARRAYS), REFUSES, asked=some)
    assert sum(counts.values()) == len(some)
    assert counts[adapter.JUDGED] > 40


def drawn(*shape, dtype="float64", seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def close(x, y):
    return np.abs(x - y).max() <= 1e-12


@pytest.mark.parametrize("packed", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("lazy", [False, True])
def test_functions_that_know_every_entry_are_asked_of_all_where_the_batch_is_cut(lazy, packed):
    """Each with numbers of its own, of queries that stand elsewhere in each entry; of heads that share keys, too."""
    query, key, loss = drawn(3, 4, 5, 6), drawn(3, 2, 31, 6), drawn(3, 4, 5, 6)
    reach, slopes, offset = np.array([4, 9, 30]), drawn(3, 4, 1, 1), np.array([20, -1, 7])
    options = {
        "mask": lambda q, k: (k <= q + 3) & (k > q - reach[:, None, None, None]),
        "bias": lambda q, k: slopes * (k - q),
        "query_offset": offset,
    }
    own = options | {"query_offset": da.from_array(offset)} if lazy else options
    q, k = offset[:, None, None, None] + np.arange(5)[:, None], np.arange(31)
    whole = {"mask": options["mask"](q, k), "bias": options["bias"](q, k)}
    if packed:
        own = {**own, "segments": (of_queries := np.arange(15).reshape(3, 5) % 3, of_keys := np.arange(93).reshape(3, 31) % 3)}
        whole["mask"] = whole["mask"] & (of_queries[:, None, :, None] == of_keys[:, None, None])
    keys = [chunked(x, 4, 3) for x in (key, key)]  # in the second chunk of the batch is no entry
    got = dask.compute(
        *kd.attention(query, *keys, return_lse=True, **own), *kd.attention_grad(query, *keys, loss, **own),
        *kd.topk(query, keys[0], 3, **own), scheduler="sync",
    )  # fmt: skip
    want = (
        *kvattn.attention(query, key, key, return_lse=True, **whole), *kvattn.attention_grad(query, key, key, loss, **whole),
        *dask.compute(*kd.topk(query, keys[0], 3, **whole), scheduler="sync"),
    )  # fmt: skip
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


# ---- what is lazy, and what is read


def unreadable(shape, readable=()):
    """A dask array of chunks of 10 keys, all of which raise when they are read but those whose numbers are ``readable``."""

    def read(x, block_id):
        if block_id[-2] not in readable:
            raise AssertionError(f"chunk {block_id} is read")
        return drawn(*x.shape, seed=block_id[-2])

    chunks = (*shape[:-2], 10, shape[-1])
    return da.zeros(shape, chunks=chunks).map_blocks(read, dtype=float, meta=np.empty((0,) * len(shape)))


def test_nothing_is_computed_before_compute():
    key, query = unreadable((100, 4)), drawn(3, 4)
    mask = da.from_array(np.ones((3, 100), bool), chunks=(3, 10)).map_blocks(
        lambda x: 1 / 0, dtype=bool, meta=np.empty((0, 0), bool)
    )
    results = [
        *kd.attention(query, key, key, mask=mask, return_lse=True),
        *kd.attention_grad(query, key, key, drawn(3, 4)), *kd.topk(query, key, 2),
    ]  # fmt: skip
    assert all(isinstance(x, da.Array) for x in results)
    assert [x.shape for x in results] == [(3, 4), (3,), (3, 4), (100, 4), (100, 4), (3, 2), (3, 2)]
    for x in results:
        with pytest.raises((AssertionError, ZeroDivisionError), match=r"is read|division"):
            x.compute(scheduler="sync")


SEEN = {  # options beside 3 queries and 10 chunks of 10 keys, and the chunks in which there is a key for one of them
    "causal": ({"causal": True, "query_offset": 18}, [0, 1, 2]),
    "window": ({"window": (5, 2), "query_offset": 53}, [4, 5]),
    "window, each its offset": ({"window": 0, "query_offset": np.array([15, 88])}, [1, 8, 9]),
    "lengths": ({"valid_lens": np.array([20, 0])}, [0, 1]),
    "lengths and a window": (
        {"valid_lens": np.array([12, 40]), "window": (5, 2), "query_offset": np.array([11, 41])},
        [0, 1, 3],
    ),
    "mask": ({"mask": np.arange(100) // 10 == 7}, [7]),
    "bias": ({"bias": np.where(np.arange(100) == 99, 0.0, -np.inf)}, [9]),
    "segments": (
        {"segments": (np.array([[3, 3, 5]] * 2), np.repeat([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]], 10).reshape(1, 100).repeat(2, 0))},
        [3, 5],
    ),
    "nothing": ({"valid_lens": np.array([0, 0])}, []),
}


@pytest.mark.parametrize(("options", "chunks"), SEEN.values(), ids=SEEN)
def test_chunks_that_no_query_may_attend_to_are_not_read(options, chunks):
    query, loss = drawn(2, 3, 4), drawn(2, 3, 4)
    key = unreadable((2, 100, 4), chunks)
    whole = np.concatenate([drawn(2, 10, 4, seed=i) for i in range(10)], axis=-2)
    got = dask.compute(
        kd.attention(query, key, key, return_lse=True, **options), kd.attention_grad(query, key, key, loss, **options),
        scheduler="sync",
    )  # fmt: skip
    want = (
        kvattn.attention(query, whole, whole, return_lse=True, **options),
        kvattn.attention_grad(query, whole, whole, loss, **options),
    )
    for x, y in zip(sum(got, ()), sum(want, ()), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    positions, _ = dask.compute(kd.topk(query, key, 3, **options), scheduler="sync")[0]
    assert {*positions.ravel() // 10} - {-1} <= {*chunks}
    if chunks and (missing := unreadable((2, 100, 4), chunks[1:])) is not None:
        with pytest.raises(AssertionError, match="is read"):
            kd.attention(query, missing, missing, **options).compute(scheduler="sync")


@pytest.mark.parametrize("chunks", [70, 700])
def test_the_graph_is_as_large_as_its_docstring_says(chunks):
    key = da.zeros((chunks * 2, 4), chunks=(2, 4))
    output = kd.attention(np.zeros((3, 4)), key, key)
    assert chunks < len(dict(output.__dask_graph__())) <= chunks + chunks / 7 + 10
    reading = len(dict(key.__dask_graph__()))
    halves = kd.attention(da.zeros((6, 4), chunks=(3, 4)), key, key)
    assert len(dict(halves.__dask_graph__())) - reading <= 2 * (chunks + chunks / 7 + 10) + 2


def test_keys_are_read_anew_for_gradients_or_once_where_output_and_lse_are_given():
    reads = []

    def read(x, block_id):
        reads.append(block_id[0])
        return drawn(10, 4, seed=block_id[0])

    key = da.zeros((40, 4), chunks=(10, 4)).map_blocks(read, dtype=float, meta=np.empty((0, 0)))
    query, loss = drawn(3, 4), drawn(3, 4)
    whole = np.concatenate([drawn(10, 4, seed=i) for i in range(4)])
    want = kvattn.attention_grad(query, whole, whole, loss, causal=True, query_offset=30)
    options = {"causal": True, "query_offset": 30}
    output, lse = kd.attention(query, key, key, return_lse=True, **options)
    computed = dask.compute(output, lse, scheduler="sync")
    for again, known in (
        (2, {}),
        (2, {"output": output, "lse": lse}),
        (1, dict(zip(("output", "lse"), computed, strict=True))),
    ):
        reads.clear()
        grads = dask.compute(kd.attention_grad(query, key, key, loss, **known, **options), scheduler="sync")[0]
        assert all(map(close, grads, want))
        if "output" not in known or known["output"] is not output:
            assert sorted(reads) == sorted([*range(4)] * again)


# ---- the k best


def by_sorting(scores, k):
    """Positions and scores of the k best, from all scores; of equal ones the first."""
    at = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    found = np.take_along_axis(scores, at, axis=-1)
    return np.where(found == -np.inf, -1, at), found


@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_topk_is_exact_and_of_equal_scores_has_the_first(k):
    query, key = np.round(drawn(2, 4, 5, 3)), np.round(drawn(2, 2, 23, 3))  # many are equal
    allowed = np.random.default_rng(0).random((5, 23)) < 0.7
    allowed[2, 2:] = False
    scores = np.where(allowed, query @ np.repeat(key, 2, axis=1).swapaxes(-1, -2) / np.sqrt(3) + 0.5, -np.inf)
    scores = np.concatenate([scores, np.full((2, 4, 5, max(0, k - 23)), -np.inf)], axis=-1)
    want = by_sorting(scores, k)
    for parts in adapter.PARTS:
        bias = np.full((5, 23), 0.5)
        positions, found = dask.compute(*kd.topk(query, chunked(key, parts, 2), k, mask=allowed, bias=bias), scheduler="sync")
        np.testing.assert_array_equal(positions, want[0])
        np.testing.assert_allclose(found, want[1], rtol=0, atol=1e-12)
        assert (positions.dtype, found.dtype) == (np.int64, np.float64)


@pytest.mark.parametrize("score", [
    kvattn.distance_score, kvattn.cosine_score, partial(kvattn.multiplicative_score, W=drawn(3, 3).astype("float16")),
])  # fmt: skip
def test_topk_takes_any_score_and_its_positions_are_attention_s(score):
    query, key = drawn(5, 3).astype("float16"), drawn(30, 3).astype("float16")
    positions, scores = dask.compute(
        *kd.topk(query, chunked(key, 3), 4, score=score, causal=True, query_offset=9), scheduler="sync"
    )
    assert scores.dtype == np.float32
    own = partial(score.func, W=score.keywords["W"].astype("float64")) if isinstance(score, partial) else score
    wide = np.where(np.arange(30) <= 9 + np.arange(5)[:, None], own(query.astype("float64"), key.astype("float64")), -np.inf)
    np.testing.assert_array_equal(positions, by_sorting(wide, 4)[0])
    first = dask.compute(*kd.topk(query, chunked(key, 4), 1, score=score), scheduler="sync")[0]
    hard = kvattn.attention(query, key, key, score=score, normalize=kvattn.hardmax)
    np.testing.assert_array_equal(key[first[:, 0]], hard)
    some = kvattn.attention(query, key, key, score=score, positions=positions)
    assert np.isfinite(some).all()


def test_topk_of_nan_is_what_hardmax_finds():
    query, key = drawn(2, 3), drawn(20, 3)
    key[13] = np.nan
    positions, scores = dask.compute(*kd.topk(query, chunked(key, 4), 2), scheduler="sync")
    assert (positions[:, 0] == 13).all()
    assert np.isnan(scores[:, 0]).all()
    assert (positions[:, 1] == np.nanargmax(np.where(np.arange(20) == 13, np.nan, query @ key.T), axis=-1)).all()


# ---- schedulers


def test_threads_give_what_one_thread_gives(tmp_path):
    query, loss = drawn(7, 16, dtype="float32"), drawn(7, 16, dtype="float32")
    np.save(tmp_path / "keys.npy", drawn(5000, 16, dtype="float32"))
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    key = da.from_array(mapped, chunks=(300, -1))
    da.to_npy_stack(tmp_path / "stack", key)
    stack = da.from_npy_stack(tmp_path / "stack")
    results = [
        dask.compute(
            kd.attention(query, keys, keys, return_lse=True),
            kd.attention_grad(query, keys, keys, loss),
            kd.topk(query, keys, 9),
            scheduler=scheduler,
        )
        for scheduler, keys in (("threads", key), ("sync", stack))
    ]
    for x, y in zip(*(sum(map(tuple, result), ()) for result in results), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_less(np.abs(results[0][0][0] - kvattn.attention(query, mapped, mapped)), 1e-5)


def slowly(query, key, folder):
    """Scores of a worker that says so, and takes its time."""
    with open(f"{folder}/{os.getpid()}", "a") as file:
        file.write("x")
    time.sleep(0.1)
    return query @ key.swapaxes(-1, -2)


def test_a_worker_that_is_killed_changes_nothing(tmp_path):
    """Two processes, one of which dies after its third chunk; what it had computed is computed again."""
    stack, said = tmp_path / "keys", tmp_path / "said"
    said.mkdir()
    whole, query = drawn(4000, 8), drawn(5, 8)
    da.to_npy_stack(stack, da.from_array(whole, chunks=(100, -1)))
    key = da.from_npy_stack(stack)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit="1GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        future = client.compute(kd.attention(query, key, key, score=partial(slowly, folder=str(said))))
        until = time.monotonic() + 100
        while not (ready := [file for file in said.iterdir() if file.stat().st_size >= 3]) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(int(ready[0].name), signal.SIGKILL)
        output = future.result(timeout=100)
    assert sum(file.stat().st_size for file in said.iterdir()) > 40  # some chunks were computed twice
    assert close(output, kvattn.attention(query, whole, whole, scale=1.0))


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    """Its code word for word, but for the sizes; the answers are those of all vectors in memory."""
    page = Path(__file__).parents[2] / "docs" / "howto" / "search.md"
    search, *others = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for code in others:
        exec(code, {})
    small = search.replace("10_000_000, 64, 250_000", "3_000, 8, 400")
    assert small != search
    exec(small, found := {"__name__": "search"})
    query, positions, scores, pooled, nearest = found["main"]()
    keys, values = (np.concatenate([np.load(f"{x}/{i}.npy") for i in range(8)]) for x in ("keys", "values"))
    np.testing.assert_allclose(
        pooled, kvattn.attention(*(x.astype("float64") for x in (query, keys, values))), rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(nearest, kvattn.attention(query, keys, values, normalize=kvattn.hardmax))
    want = by_sorting(query @ keys.T / np.sqrt(8).astype("float32"), 10)
    np.testing.assert_array_equal(positions, want[0])
    np.testing.assert_allclose(scores, want[1], rtol=1e-5, atol=0)


# ---- what is refused


KEY = da.zeros((2, 40, 4), chunks=(1, 10, 4))
REFUSED = {
    "keys": (TypeError, r"key must be a dask array, not ndarray: dask.array.from_array\(key", {"key": np.zeros((2, 40, 4))}),
    "values": (TypeError, "value must be a dask array, not ndarray", {"value": np.zeros((2, 40, 4))}),
    "chunks of keys": (
        ValueError, r"value has chunks \(20, 20\) along axis -2 but key has \(10, 10, 10, 10\).*value.rechunk\({1: key.chunks",
        {"value": KEY.rechunk((1, 20, 4))},
    ),
    "chunks of the batch": (
        ValueError, r"value has chunks \(2,\) along axis -3 but key has \(1, 1\)", {"value": KEY.rechunk((2, 10, 4))},
    ),
    "features": (
        ValueError, r"key has chunks \(2, 2\) along axis -1; expected one.*key.rechunk\({2: -1}\)",
        {"key": KEY.rechunk((1, 10, 2))},
    ),
    "unknown sizes": (ValueError, r"key has chunks of unknown sizes.*compute_chunk_sizes", {"key": KEY[KEY[:, 0, 0] > 0]}),
    "shapes": (ValueError, "axis -1 .features. is 4, expected 5", {"query": np.zeros((2, 3, 5))}),
    "dtypes": (TypeError, "key has dtype float64 but query has float32", {"query": np.zeros((2, 3, 4), "float32")}),
    "integers": (TypeError, "query has dtype int64; expected floating point", {"query": np.zeros((2, 3, 4), int)}),
    "a mask": (TypeError, "mask has dtype float64; expected bool", {"mask": da.zeros((3, 40))}),
    "its shape": (ValueError, "mask has shape .3, 30., which does not broadcast", {"mask": da.zeros((3, 30), dtype=bool)}),
    "a score": (TypeError, "score must be a function, not 'dot'", {"score": "dot"}),
    "parameters": (TypeError, "score binds W to a dask array", {"score": partial(kvattn.multiplicative_score, W=KEY[0, :4])}),
    "normalize": (NotImplementedError, "normalize is not to be had .*only softmax", {"normalize": kvattn.hardmax}),
    "weights": (NotImplementedError, "return_weights is not .*topk", {"return_weights": True}),
    "scores": (NotImplementedError, "return_scores is not .*topk", {"return_scores": "raw"}),
    "positions": (NotImplementedError, "positions is not to be had", {"positions": np.zeros((3, 1), int)}),
    "dropout": (NotImplementedError, "dropout is not to be had", {"dropout": 0.1}),
    "another's name": (TypeError, "attention has no argument 'is_causal': here it is causal", {"is_causal": True}),
    "no option": (TypeError, "attention has no argument 'chunks': it has score, mask", {"chunks": 3}),
    "gradients by": (ValueError, "wrt names 'bias'; this call has key, query, value", {"wrt": ["bias"]}),
    "a loss": (ValueError, "grad_output has shape .3, 4.; expected .2, 3, 4.", {"grad_output": np.zeros((3, 4))}),
    "its dtype": (TypeError, "grad_output has dtype float32", {"grad_output": np.zeros((2, 3, 4), "float32")}),
    "output alone": (ValueError, "output and lse go together", {"output": np.zeros((2, 3, 4))}),
    "no k": (ValueError, "k must be at least 1, not 0", {"k": 0}),
    "half a k": (TypeError, "k must be an int, not 1.5", {"k": 1.5}),
    "the sink of topk": (NotImplementedError, "sink: it is no key", {"k": 1, "sink": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "said", "changed"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_at_once(error, said, changed):
    arguments = {"query": np.zeros((2, 3, 4)), "key": KEY, "value": KEY} | changed
    call = kd.attention
    if {"wrt", "grad_output", "output"} & changed.keys():
        call, arguments = kd.attention_grad, {"grad_output": np.zeros((2, 3, 4))} | arguments
    elif "k" in changed:
        call = kd.topk
        del arguments["value"]
    with pytest.raises(error, match=said):
        call(**arguments)


def test_the_example_of_the_module():
    assert doctest.testmod(kd) == (0, 4)


def test_arrays_of_another_framework_are_refused():
    with pytest.raises(TypeError, match=r"query is an array of torch but backend='numpy'.*convert"):
        kd.attention(torch.zeros(3, 4), KEY[0], KEY[0])
