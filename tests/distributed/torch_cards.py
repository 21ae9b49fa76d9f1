"""Two GPUs, or more, try ring_attention with NCCL; where there are none, processes do with gloo:

    torchrun --standalone --nproc-per-node 2 tests/distributed/torch_cards.py [--rows 65536]

Answers and gradients of plain, causal, windowed, masked, ... calls beside those of one device, in three dtypes; then the time
of a causal call of so many rows, forward and with gradients; then the last process leaves, and the others have to say so.
"""

import argparse
import os
import time
from functools import partial

import torch
import torch.distributed as dist

import kvattn
from kvattn.distributed.torch import ring_attention, shard, unshard

NEAR = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}  # TF32 may be on
CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "a window, a soft cap": {"window": (9, 4), "softcap": 5.0},
    "lengths, a sink": {"valid_lens": [31, 7], "sink": 0.5},
    "a mask that is a function": {"mask": lambda q, k: (q - k) % 3 > 0},
}


def drawn(device, rows, dtype):
    """Query, key, value and the gradient by the output, the same on every process; heads of the query share keys."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, heads, rows, 64) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype) for shape in shapes]


def check(device, rows=37):
    """Every call, in zigzag and not, forward and backward; an AssertionError for what is not as on one device."""
    for dtype, near in NEAR.items():
        for name, options in CALLS.items():
            options = {x: torch.tensor(y, device=device) if x in ("valid_lens", "sink") else y for x, y in options.items()}
            options |= {"sink": options["sink"].to(dtype).expand(4)} if "sink" in options else {}
            *arrays, loss = drawn(device, rows, dtype)
            whole = [x.requires_grad_() for x in arrays]
            output = kvattn.attention(*whole, **options)
            expected = [output, *torch.autograd.grad(output, whole, loss)]
            for zigzag in (False, True):
                own = [shard(x.detach(), zigzag=zigzag).requires_grad_() for x in whole]
                output = ring_attention(*own, zigzag=zigzag, **options)
                found = [output, *torch.autograd.grad(output, own, shard(loss, zigzag=zigzag))]
                for what, x, y in zip(("output", "by query", "by key", "by value"), found, expected, strict=True):
                    x = unshard(x.detach(), zigzag=zigzag)
                    apart = (x - y).abs().max().item()
                    assert apart <= near * max(1, y.abs().max().item()), (name, zigzag, dtype, what, apart)


def timed(call, device):
    """Milliseconds of a call, the least of five."""
    took = []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return 1000 * min(took[1:])


def forward_backward(attend, arrays, loss):
    torch.autograd.grad(attend(*arrays, causal=True), arrays, loss)


def times(device, rows):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    *whole, loss = (x.requires_grad_() for x in drawn(device, rows, dtype))
    *own, part = (shard(x.detach(), zigzag=True).requires_grad_() for x in (*whole, loss))
    ring = partial(ring_attention, zigzag=True)
    return {
        "ring": timed(lambda: ring(*own, causal=True), device),
        "ring, with gradients": timed(lambda: forward_backward(ring, own, part.detach()), device),
        "one device": timed(lambda: kvattn.attention(*whole, causal=True), device),
        "one device, with gradients": timed(lambda: forward_backward(kvattn.attention, whole, loss.detach()), device),
    }


def a_lost_process(device):
    """Seconds until a process knows that the last has left."""
    *own, _ = drawn(device, 8, torch.float32)
    if dist.get_rank() + 1 == dist.get_world_size():
        os._exit(0)
    start = time.monotonic()
    try:
        for _ in range(10**6):
            ring_attention(*own, timeout=10)
    except ConnectionError:
        return time.monotonic() - start
    raise AssertionError("a lost process was not missed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536 if torch.cuda.is_available() else 1024)
    asked = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or PyTorch's watchdog ends this process with the lost one
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    check(device)
    took = times(device, asked.rows)
    if first := dist.get_rank() == 0:
        print(f"{dist.get_world_size()} x {device.type}, {dist.get_backend()}: answers and gradients are those of one device")
        print(f"{asked.rows} rows, ms:", ", ".join(f"{name} {x:.1f}" for name, x in took.items()), flush=True)
    seconds = a_lost_process(device)
    if first:
        print(f"a process that left was missed after {seconds:.1f} s", flush=True)
    os._exit(0)  # the group is of no use now


if __name__ == "__main__":
    main()
