"""ring_attention over processes that talk by gloo on the loopback interface; what each of them does is in torch_ranks.py."""

import json
import subprocess
import sys
from pathlib import Path

import adapter
import pytest
import torch

import kvattn
from kvattn.distributed.torch import ring_attention

RANKS = Path(__file__).with_name("torch_ranks.py")
SUITE = ("1 parts", "2 parts", "3 parts", "4 parts", "2 parts in zigzag", "4 parts in zigzag")
REST = ("over_an_axis_of_a_mesh", "arguments_that_differ", "messages", "shares_of_a_causal_call", "second_derivatives")


def run(path, tasks, ranks=4):
    """What each of so many ranks said of each task, and how it ended; they are gone in the end, whatever happens."""
    processes = [
        subprocess.Popen([sys.executable, RANKS, str(rank), str(ranks), path, *tasks], stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        said = [[json.loads(line) for line in process.communicate(timeout=240)[0].splitlines()] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [{x["task"]: x for x in each} for each in said], [process.returncode for process in processes]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "meet", (*SUITE, *REST))


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
    said, codes = run(tmp_path / "meet", tasks)
    all_well(said, tasks[0])
    all_well([said[rank] for rank in (0, 1, 3)], tasks[1])
    assert codes == [0, 0, -9, 0]


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("zigzag", [False, True])
def test_a_group_of_one(zigzag, alone):
    query, key, value = (torch.randn(2, 7, 4, requires_grad=True) for _ in range(3))
    found, expected = (
        ring_attention(query, key, value, causal=True, zigzag=zigzag),
        kvattn.attention(query, key, value, causal=True),
    )
    torch.testing.assert_close(found, expected)
    for x, y in zip(*(torch.autograd.grad(out.sum(), (query, key, value)) for out in (found, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_what_is_refused(alone):
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="axis is 'sequence', but group is no DeviceMesh"):
        ring_attention(x, x, x, axis="sequence")
    with pytest.raises(TypeError, match="group must be a ProcessGroup or a DeviceMesh, not int"):
        ring_attention(x, x, x, group=1)
    with pytest.raises(ValueError, match="timeout"):
        ring_attention(x, x, x, timeout=0)
    whole = torch.distributed.tensor.distribute_tensor(x, torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"key is a DTensor; expected the rows that this process holds: key.to_local\(\)"):
        ring_attention(x, whole, x)
    with pytest.raises(ValueError, match="key has shape"):
        ring_attention(x, x[..., :2], x)


def test_no_process_group():
    with pytest.raises(RuntimeError, match="there is no process group: call torch"):
        ring_attention(*[torch.randn(2, 3, 4)] * 3)
