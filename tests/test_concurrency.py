"""Threads, tasks and processes that use kvattn at one time: each has the backend that it chose, and the right numbers."""

import asyncio
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from conftest import chosen

import kvattn
from kvattn import prepare

rng = np.random.default_rng(0)
THREADS, CALLS = 16, 64  # a thousand and 24 calls
INPUTS = [tuple(rng.standard_normal((2, n, d)) for n, d in ((3, 4), (m, 4), (m, 2))) for m in (1, 2, 5, 6)]
OPTIONS = [{}, {"causal": True}, {"window": 1}, {"mask": np.eye(3, 1, dtype=bool)}, {"valid_lens": np.array([1, 0])}]
EXPECTED = {(i, j): kvattn.attention(*x, **o, backend="numpy") for i, x in enumerate(INPUTS) for j, o in enumerate(OPTIONS)}


@pytest.fixture
def forgetful(monkeypatch):
    """What is remembered of calls is emptied all the time, as it is when shapes never end."""
    monkeypatch.setattr(prepare, "REMEMBERED", 2)
    monkeypatch.setattr(prepare, "_frequencies", {})
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def call(draw, expected_backend):
    """One call of neutral data, whose answer is the right one, as an array of the backend that was chosen."""
    i, j = draw.randrange(len(INPUTS)), draw.randrange(len(OPTIONS))
    found = kvattn.attention(*INPUTS[i], **OPTIONS[j])
    homes = {kvattn.dispatch.home(found) or "numpy"}
    assert homes <= expected_backend, (homes, expected_backend)
    np.testing.assert_allclose(kvattn.to_numpy(found), EXPECTED[i, j], rtol=1e-9, atol=1e-12)


def test_a_thousand_calls_of_16_threads_that_switch_backends(forgetful):
    names, began = chosen(), threading.Barrier(THREADS)
    for name in names:  # compiled before, so that threads meet in our code rather than in a framework's compiler
        with kvattn.use_backend(name):
            for i in range(len(INPUTS) * len(OPTIONS)):
                kvattn.attention(*INPUTS[i % len(INPUTS)], **OPTIONS[i // len(INPUTS)])

    def work(seed):
        draw = random.Random(seed)
        began.wait()
        for _ in range(CALLS):
            outer, inner = draw.choice(names), draw.choice(names)
            with kvattn.use_backend(outer):
                assert kvattn.get_backend() == outer
                with kvattn.use_backend(inner):
                    call(draw, {inner})
                    assert kvattn.get_backend() == inner
                assert kvattn.get_backend() == outer
            if seed % 4 == 0:
                kvattn.set_backend(draw.choice(names))  # of the process: other threads see it, and none inside a context
                call(draw, set(names))
            base = draw.choice([10.0, 100.0, 1000.0, 10000.0])
            turned = kvattn.rotary(np.eye(2, 4), positions=draw.randrange(3), base=base, backend="numpy")
            np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), 1)
        return True

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(work, range(THREADS)))
    finally:
        kvattn.set_backend(None)


def test_what_another_thread_empties_in_between_is_not_asked_for_again(monkeypatch):
    class Emptied(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    monkeypatch.setattr(prepare, "_frequencies", Emptied())
    assert kvattn.rotary(np.eye(2, 4), backend="numpy").shape == (2, 4)


def test_tasks_have_each_their_own_backend():
    async def work(name):
        with kvattn.use_backend(name):
            for _ in range(5):
                await asyncio.sleep(0)
                assert kvattn.get_backend() == name

    async def all_of_them():
        await asyncio.gather(*(work(name) for name in chosen() * 8))

    before = kvattn.get_backend()
    asyncio.run(all_of_them())
    assert kvattn.get_backend() == before


LARGE = rng.standard_normal((4, 300, 8))  # is computed in tiles, by threads


def test_spawned_processes():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(kvattn.attention, LARGE, LARGE, LARGE, backend="numpy").result(120)
    np.testing.assert_allclose(found, kvattn.attention(LARGE, LARGE, LARGE, backend="numpy"), rtol=1e-9)


FORKS = """
import os, threading, warnings
import numpy as np, kvattn
from kvattn.kernels.numpy import threads
warnings.simplefilter("ignore")  # Python's, of threads at a fork
threads.count = lambda: 2
q = np.random.default_rng(0).standard_normal((4, 300, 8))
assert kvattn.explain(q, q, q).kernel == "tiles"
first = kvattn.attention(q, q, q)
stop, done = threading.Event(), []
def busy():
    while not stop.is_set():
        done.append(kvattn.attention(q, q, q))
others = [threading.Thread(target=busy) for _ in range(2)]
for each in others:
    each.start()
def below(depth):
    child = os.fork()
    if child == 0:
        np.testing.assert_allclose(kvattn.attention(q, q, q), first, rtol=1e-9)
        grads = kvattn.attention_grad(q, q, q, q)
        kvattn.set_backend("numpy")
        os._exit(below(depth - 1) if depth else 7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
for _ in range(5):  # while the others are in the midst of a call
    assert below(1) == 7
stop.set()
for each in others:
    each.join()
np.testing.assert_allclose(kvattn.attention(q, q, q), first, rtol=1e-9)
assert kvattn.get_backend() == "numpy" and len(done) > 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_and_their_children_compute_while_the_parent_does():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
