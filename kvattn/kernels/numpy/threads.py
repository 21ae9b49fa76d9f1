"""A call's work shared by threads, with BLAS held to one thread while several of ours run.

share(tasks, work, workers) does what this does, as far as its results go, since no task writes where another does:

    for task in tasks: work(task, buffers)

The threads are kept from the first large call on, since starting one takes as long as a tile; a forked child has its own.

Source, of how BLAS is held to one thread: threadpoolctl (https://github.com/joblib/threadpoolctl).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np

_lock = threading.Lock()
_blas = None  # NumPy's BLAS, by threadpoolctl; [] without it
_threads_before = []  # (library, how many it used), while calls hold BLAS to one thread
_calls = 0  # that do
_pool = None  # of this process


def _libraries():
    global _blas
    if _blas is None:
        try:
            from threadpoolctl import ThreadpoolController
        except ImportError:
            _blas = []
        else:
            found = ThreadpoolController().select(user_api="blas").lib_controllers
            _blas = [x for x in found if "numpy" in x.filepath] or found
    return _blas


def _forget():
    """In a forked child no call is running and no thread of ours, whatever its parent was doing."""
    global _lock, _calls, _pool
    _lock, _pool = threading.Lock(), None
    _release()
    _calls = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _release():
    for library, before in _threads_before:
        _set(library, before)
    _threads_before.clear()


def _set(library, size):
    """From any thread: threadpoolctl 3.7 and later heed the first that asked alone, for as long as it lives."""
    forget = getattr(library, "clear_controlling_thread", lambda **_: None)
    forget(force=True)
    library.set_num_threads(size)
    forget(force=True)


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count():
    """How many threads of ours may run: as many as BLAS would use, within this process's cores; 1 without threadpoolctl."""
    with _lock:
        blas = [before for _, before in _threads_before] or [x.get_num_threads() for x in _libraries()]
    return min([_cores(), *blas]) if blas else 1


@contextmanager
def one_blas_thread():
    """BLAS by one thread each call, for many small products and for those of several threads; put back as it was."""
    global _calls
    with _lock:
        if not _calls:
            _threads_before[:] = [(x, x.get_num_threads()) for x in _libraries()]
            for library, _ in _threads_before:
                _set(library, 1)
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                _release()


def _start(work, many):
    """Futures of work(), at most ``many``."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, _cores() - 1), thread_name_prefix="kvattn")
        pool = _pool
    started = []
    try:
        for _ in range(many):
            started.append(pool.submit(work))
    except RuntimeError:  # no more threads to be had, as at exit: the caller does it all
        pass
    return started


def share(tasks, work, workers):
    """work(task, buffers) for every task, by this thread and up to ``workers`` - 1 more; each has its own dict of buffers.

    Raises what any of them raises, once all have stopped.
    """
    tasks, failures = deque(tasks), []
    others = min(workers, len(tasks)) - 1

    def take():
        try:
            return tasks.popleft()
        except IndexError:
            return None

    def serve():
        buffers = {}
        try:
            with np.errstate(all="ignore"):
                for task in iter(take, None):
                    work(task, buffers)
        except BaseException as error:
            tasks.clear()
            failures.append(error)

    with one_blas_thread() if others > 0 else nullcontext():
        started = _start(serve, others) if others > 0 else []
        try:
            serve()
        finally:
            tasks.clear()
            for future in started:
                future.cancel() or future.result()
    if failures:
        raise failures[0]
