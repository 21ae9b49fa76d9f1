"""What the tests here start is on the loopback interface, and gone when the tests of a file are over, also after a failure."""

import os
import sys
import threading
import time

import psutil
import pytest

# before JAX counts its devices; PyTorch's processes talk over the loopback interface
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


DIES_TOO = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: it dies with its parent, even one that is killed
os.execvp(sys.argv[1], sys.argv[1:])
"""


def dying(*command):
    """The command, as one of a process that does not outlive the one that starts it."""
    return [sys.executable, "-c", DIES_TOO, *map(str, command)]


def started():
    """The processes that this one started and that still run, but for Python's own, which ends with it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def listening(processes):
    """The addresses, with the port, on which processes listen, but for those that have a network of their own."""
    found, network = set(), os.readlink("/proc/self/ns/net")
    for process in processes:
        try:
            if os.readlink(f"/proc/{process.pid}/ns/net") != network:
                continue
            found |= {(x.laddr.ip, x.laddr.port) for x in process.net_connections("inet") if x.status == psutil.CONN_LISTEN}
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            continue
    return found


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    before, own = {process.pid for process in started()}, listening([psutil.Process()])
    met, over = set(), threading.Event()

    def watch():
        while not over.wait(0.2):
            met.update(listening([psutil.Process(), *started()]))

    (watcher := threading.Thread(target=watch, daemon=True)).start()
    yield
    over.set()
    watcher.join()
    until = time.monotonic() + 10
    while (left := [x for x in started() if x.pid not in before]) and time.monotonic() < until:
        time.sleep(0.1)
    told = [" ".join(process.cmdline()) for process in left]
    for process in left:
        process.kill()
    assert not told, "processes that are left"
    assert not listening([psutil.Process()]) - own, "ports that are left open"
    assert {ip for ip, _ in met - own} <= LOOPBACK
