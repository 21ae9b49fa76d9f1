"""ring_attention over processes that talk by gloo on the loopback interface; what each of them does is in torch_ranks.py."""

import doctest
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import adapter
import pytest
import torch
from conftest import dying

from kvattn.distributed.torch import ring_attention
from kvattn.kernels.torch.ring import Ring

RANKS = Path(__file__).with_name("torch_ranks.py")
SUITE = ("1 parts", "2 parts", "3 parts", "4 parts", "2 parts in zigzag", "4 parts in zigzag")
REST = (
    "the_page_of_the_docs",
    "what_two_cards_try",
    "a_group_of_one",
    "what_is_refused",
    "over_an_axis_of_a_mesh",
    "arguments_that_differ",
    "messages",
    "shares_of_a_causal_call",
    "second_derivatives",
)


def run(folder, tasks, ranks=4):
    """What each of so many ranks said of each task, and how it ended; they are gone in the end, whatever happens."""
    command = dying(sys.executable, RANKS, ranks, folder, *tasks)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        codes = json.loads(process.communicate(timeout=600)[0])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = [[json.loads(line) for line in (folder / str(rank)).read_text().splitlines()] for rank in range(ranks)]
    return [{x["task"]: x for x in each} for each in said], codes


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), (*SUITE, *REST))


def all_well(said, task):
    for rank, each in enumerate(said):
        assert each[task]["wrong"] is None, f"rank {rank}: {each[task]['wrong']}"


@pytest.mark.parametrize("parts", SUITE)
def test_the_suite_holds_over(parts, four):
    said, _ = four
    all_well(said, parts)
    assert said[0][parts]["found"][adapter.JUDGED] > 30


@pytest.mark.parametrize("task", REST)
def test_four_ranks(task, four):
    said, codes = four
    all_well(said, task)
    assert codes == [0] * 4


def test_a_lost_rank_is_an_error_in_time(tmp_path):
    tasks = ("a_rank_that_makes_no_call", "a_rank_that_is_killed")
    said, codes = run(tmp_path, tasks)
    all_well(said, tasks[0])
    all_well([said[rank] for rank in (0, 1, 3)], tasks[1])
    assert codes == [0, 0, -9, 0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_wait_has_its_timeout(device):
    """NCCL's, which else waits for nothing, too; no card is here, so of a stand-in for what is waited for."""

    class Lost:
        def wait(self, *patience):
            assert patience == (timedelta(seconds=7),)
            raise torch.distributed.DistBackendError("it timed out")

    with pytest.raises(ConnectionError, match=r"has sent nothing for 7 s .*it timed out"):
        Ring(None, 0, 2, 7.0, torch.device(device)).wait([Lost()])


# torchrun's own store listens on every interface, of which a network of the test's own has one, loopback
OF_ITS_OWN = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x41))  # SIOCSIFFLAGS: it is up, and runs
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_the_page_s_script_under_torchrun(tmp_path):
    """Two processes that torchrun starts, by the variables that it sets."""
    page = Path(__file__).parents[2] / "docs" / "howto" / "processes.md"
    (script := tmp_path / "ring.py").write_text(re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1])
    torchrun = "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", script
    command = dying("unshare", "-rnpf", "--kill-child", sys.executable, "-c", OF_ITS_OWN, "-m", *torchrun)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_examples_of_the_module():
    assert doctest.testmod(sys.modules["kvattn.distributed.torch"]) == (0, 2)


def test_no_process_group():
    with pytest.raises(RuntimeError, match="there is no process group: call torch"):
        ring_attention(*[torch.randn(2, 3, 4)] * 3)
