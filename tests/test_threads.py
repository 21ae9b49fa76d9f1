"""Tiles are shared by threads that end with the call, and BLAS is as it was."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest
from test_tiled_numpy import results
from tiling import ALWAYS, all_at_once, cached, draw, in_tiles, right, subject

import kvattn
from kvattn.kernels.numpy import threads, tiled


class Blas:
    """What threadpoolctl offers of a BLAS."""

    def __init__(self, size):
        self.size, self.seen = size, set()

    def get_num_threads(self):
        return self.size

    def set_num_threads(self, size):
        self.size = size
        self.seen.add(size)


@pytest.fixture
def blas():
    with patch.object(threads, "_blas", [Blas(2)]):
        yield threads._blas[0]


def test_the_number_of_threads_changes_nothing():
    arrays = draw(lead=(2, 3), n=9, m=7)
    with in_tiles(workers=1):
        expected = results(*arrays, causal=True)
    for workers in (2, 3, 50):
        with in_tiles(workers=workers):
            for x, y in zip(results(*arrays, causal=True), expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-14)


def test_one_head_is_shared_by_threads():
    arrays = draw(lead=(), n=1024, m=40, dtype=np.float64)
    seen = set()
    attend = tiled._attend_tile

    def watched(*args):
        seen.add(args[1].at[-1].start)
        return attend(*args)

    with patch.object(threads, "count", lambda: 2), patch.multiple(tiled, **ALWAYS, _attend_tile=watched):
        kvattn.attention(*arrays[:3])
    assert len(seen) == 4


def test_blas_is_held_to_one_thread_and_put_back(blas):
    arrays = draw()
    with in_tiles(workers=2):
        kvattn.attention(*arrays[:3])
    assert blas.seen == {1, 2}
    assert blas.size == 2
    blas.seen.clear()
    with in_tiles(workers=1):
        kvattn.attention(*arrays[:3])
    assert not blas.seen


def test_as_many_threads_as_blas_would_use_within_the_cores(blas):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    blas.size = 1000
    assert threads.count() == cores
    blas.size = 1  # as OPENBLAS_NUM_THREADS=1 has it
    assert threads.count() == 1
    blas.size = 2
    with threads.one_blas_thread():
        assert blas.size == 1
        assert threads.count() == min(2, cores)


def test_calls_that_overlap_put_blas_back_once(blas):
    with threads.one_blas_thread():
        with threads.one_blas_thread():
            assert blas.size == 1
        assert blas.size == 1
    assert blas.size == 2


def test_any_thread_holds_blas_and_puts_it_back():
    """Though threadpoolctl would let the first that asked alone."""
    libraries = threads._libraries()
    before = [x.get_num_threads() for x in libraries]

    def sizes():
        return [x.get_num_threads() for x in libraries]

    def hold():
        with threads.one_blas_thread():
            return sizes()

    for x in libraries:
        threads._set(x, 2)
    try:
        twice = sizes()
        assert hold() == [1] * len(libraries)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(hold).result() == [1] * len(libraries)
        assert sizes() == twice
    finally:
        for x, size in zip(libraries, before, strict=True):
            threads._set(x, size)


def test_without_threadpoolctl_one_thread_serves():
    with patch.object(threads, "_blas", None), patch.dict(sys.modules, {"threadpoolctl": None}):
        assert threads.count() == 1
        right(subject("numpy"), cached("causal"))


def test_concurrent_calls(blas):
    arrays = [draw(seed, lead=(2, 2), n=9, m=7) for seed in range(8)]
    with all_at_once():
        expected = [results(*x, causal=True) for x in arrays]
    with in_tiles(), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: results(*x, causal=True), arrays * 4))
    for some, those in zip(found, expected * 4, strict=True):
        for x, y in zip(some, those, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)
    assert blas.size == 2


def test_what_a_thread_raises_is_raised_and_all_have_stopped(blas):
    class Stop(BaseException):
        pass

    done = []

    def work(task, buffers):
        done.append(task)
        if task == 3:
            raise Stop

    with pytest.raises(Stop):
        threads.share(range(10_000), work, 3)
    assert len(done) < 10_000
    assert blas.size == 2


def test_where_no_thread_can_be_started_the_caller_does_it_all(blas):
    done = []
    refused = ThreadPoolExecutor(1)
    refused.shutdown()
    with patch.object(threads, "_pool", refused):
        threads.share(range(10), lambda task, buffers: done.append(task), 4)
    assert done == [*range(10)]
    assert blas.size == 2


def run(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import numpy as np, kvattn, os, threading, sys\nfrom kvattn.kernels.numpy import threads, tiled\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


LARGE = """
q = np.random.default_rng(0).standard_normal((4, 300, 8))
threads.count = lambda: 2
def large():
    assert kvattn.explain(q, q, q).kernel == "tiles"
    return kvattn.attention(q, q, q)
"""


def test_no_thread_is_started_at_import_and_none_keeps_the_process():
    result = run(f"{LARGE}\nassert threading.active_count() == 1\nlarge()\nassert threading.active_count() == 2")
    assert result.returncode == 0, result.stderr


def test_calls_at_exit_end():
    result = run(f"{LARGE}\nimport atexit\natexit.register(lambda: print(large().shape))")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(4, 300, 8)\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_afresh():
    """It forks while another thread is in a call: the lock may be held, BLAS is, and the holder is not in the child."""
    code = f"""{LARGE}
class Blas:
    size = 2
    def get_num_threads(self): return self.size
    def set_num_threads(self, size): self.size = size
first = large()
threads._blas = [Blas()]
os.register_at_fork(after_in_child=threads._forget)
with threads.one_blas_thread(), threads._lock:
    child = os.fork()
    if child == 0:
        assert threads._blas[0].size == 2
        np.testing.assert_allclose(large(), first, rtol=1e-9)
        assert threads._blas[0].size == 2
        os._exit(7)
    status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
"""
    result = run("import warnings; warnings.simplefilter('ignore')\n" + code)
    assert result.returncode == 0, result.stderr
