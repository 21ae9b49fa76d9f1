"""A call's work shared by threads, with BLAS held to one thread while several of ours run.

The threads live as long as the call: there is none to keep through a fork, to join at exit or to start at import.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import contextmanager, nullcontext

import numpy as np

_lock = threading.Lock()
_blas = None  # NumPy's BLAS, by threadpoolctl; [] without it
_held = []  # [(library, its threads before)] while any call holds BLAS
_holders = 0


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
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_forget)
    return _blas


def _forget():
    """In a forked child no call is running, whatever its parent was doing."""
    global _lock, _holders
    _lock = threading.Lock()
    _release()
    _holders = 0


def _release():
    for library, before in _held:
        library.set_num_threads(before)
    _held.clear()


def count():
    """How many threads of ours may run: as many as BLAS would use, within this process's cores; 1 without threadpoolctl."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with _lock:
        blas = [before for _, before in _held] or [x.get_num_threads() for x in _libraries()]
    return min([cores, *blas]) if blas else 1


@contextmanager
def one_blas_thread():
    """BLAS by one thread each call, for many small products and for those of several threads; put back as it was."""
    global _holders
    with _lock:
        if not _holders:
            _held[:] = [(x, x.get_num_threads()) for x in _libraries()]
            for library, _ in _held:
                library.set_num_threads(1)
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders:
                _release()


def share(tasks, work, workers):
    """work(task, buffers) for every task, by this thread and up to ``workers`` - 1 more; each has its own dict of buffers.

    Raises what any of them raises, once all have stopped.
    """
    tasks, failures, started = deque(tasks), [], []
    helpers = min(workers, len(tasks)) - 1

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

    with one_blas_thread() if helpers > 0 else nullcontext():
        try:
            for _ in range(helpers):
                thread = threading.Thread(target=serve, name="kvattn")
                thread.start()
                started.append(thread)
        except RuntimeError:  # no more threads to be had: this one does it all
            pass
        try:
            serve()
            for thread in started:
                thread.join()
        finally:
            tasks.clear()
    if failures:
        raise failures[0]
