"""Nothing that a test process starts outlives it: not where it is killed, and can clean up nothing."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import dying

SCRIPT = """
import sys
from pathlib import Path

from distributed import LocalCluster

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import test_torch

    cluster = LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0")
    test_torch.run(Path(sys.argv[2]), ("all_wait",))
"""


def alive(processes):
    return [x for x in processes if x.is_running() and x.status() != psutil.STATUS_ZOMBIE]


def test_nothing_outlives_a_test_process_that_is_killed(tmp_path):
    """It has a cluster, and four ranks that wait for it."""
    (script := tmp_path / "tests.py").write_text(SCRIPT)
    process = subprocess.Popen(dying(sys.executable, script, Path(__file__).parent, tmp_path))
    try:
        until, found = time.monotonic() + 100, []
        while len([*tmp_path.glob("[0-3]")]) < 4 and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.2)
        found = psutil.Process(process.pid).children(recursive=True)
        assert len(found) >= 6, found  # a worker, the ranks, and what forked them
    finally:
        process.kill()
        process.wait()
    until = time.monotonic() + 30
    while (left := alive(found)) and time.monotonic() < until:
        time.sleep(0.1)
    for each in left:
        each.kill()
    assert not left
