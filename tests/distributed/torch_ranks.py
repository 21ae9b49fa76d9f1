"""Ranks of a group of gloo processes: each does what the tasks say, in step with the others, and writes down what was wrong.

Run by test_torch.py: python torch_ranks.py SIZE FOLDER TASK... All is imported and made once: ranks are forks.
"""

import ctypes
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import adapter
import pytest
import torch
import torch.distributed as dist
import torch_cards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import kvattn
from kvattn import torch as kv
from kvattn.backends import torch as tab
from kvattn.distributed.torch import local_positions, ring_attention, shard, unshard
from kvattn.kernels.torch import sinks
from kvattn.kernels.torch.ring import Ring
from kvattn.pairs import Pairs

TIMEOUT = 60.0
NON_GROUP_MEMBER = dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives those whom it leaves out
PLAIN = {"score": tab.scaled_dot_score, "normalize": tab.softmax, "positions": None, "dropout": 0.0, "rng": None}
REFUSES = {
    "score": lambda case: (
        case.call == "nadaraya_watson" or case.keywords.get("score", "scaled_dot_score") != "scaled_dot_score"
    ),
    "normalize": lambda case: case.keywords.get("normalize", "softmax") != "softmax",
    "positions": lambda case: "positions" in case.arguments,
    "dropout": lambda case: case.keywords.get("dropout", 0) > 0,
}


# ---- the suite


class Form:
    """ring_attention as a tab's attention of whole arrays: each rank cuts its own rows, and puts all together again."""

    def __init__(self, group, zigzag):
        self.group, self.zigzag, self.rank = group, zigzag, dist.get_rank(group)
        self.parts = dist.get_world_size(group)

    def own(self, x, dim=-2):
        if self.zigzag:
            return shard(x, dim=dim, group=self.group, zigzag=True)
        return x.split(adapter.cut(x.shape[dim], self.parts), dim=dim)[self.rank]

    def whole(self, x, dim=-2):
        return unshard(x, dim=dim, group=self.group, zigzag=self.zigzag, timeout=TIMEOUT)

    def cut(self, query, options):
        """The options of this rank's queries."""
        options = {name: x for name, x in options.items() if name not in PLAIN or x != PLAIN[name]}
        said = options.get("mask")
        if type(said) is Pairs:
            options |= {"mask": said.mask_function or said.mask, "bias": said.bias_function or options.get("bias")}
            if said.segments is not None:
                of_queries, of_keys = said.segments if query.ndim > 2 else (x[0] for x in said.segments)
                options["segments"] = self.own(of_queries, -1), of_keys
        for name in ("mask", "bias", "sink"):
            x = options.get(name)
            if (
                isinstance(x, torch.Tensor)
                and x.ndim > 1
                and x.shape[-2] == query.shape[-2]
                and (name != "sink" or x.ndim == query.ndim)
            ):
                options[name] = self.own(x)
        lens = options.get("valid_lens")
        if lens is not None and lens.ndim == (2 if query.ndim > 2 else 1):
            options["valid_lens"] = self.own(lens, -1)
        return options

    def ring(self, query, key, value, options):
        return ring_attention(query, key, value, **options, group=self.group, zigzag=self.zigzag, timeout=TIMEOUT)

    def attention(self, query, key, value, *, return_weights=False, return_lse=False, **options):
        options = self.cut(query, options) | {"return_lse": return_lse}
        found = self.ring(self.own(query), self.own(key), self.own(value), options)
        return (self.whole(found[0]), self.whole(found[1], -1)) if return_lse else self.whole(found)

    def attention_grad(self, query, key, value, grad_output, *, wrt, **options):
        shared = {name: options[name].detach().requires_grad_() for name in ("bias", "sink") if name in wrt}
        options = self.cut(query, options | shared)
        own = {"query": self.own(query), "key": self.own(key), "value": self.own(value)}
        own = {name: x.detach().requires_grad_(name in wrt) for name, x in own.items()}
        self.ring(*own.values(), options).backward(self.own(grad_output))
        found = []
        for name in wrt:
            x = (own | shared)[name]
            if name in own:
                found.append(self.whole(x.grad))
            else:
                wide = x.grad.to(torch.promote_types(x.dtype, torch.float32))  # rounded for each rank
                dist.all_reduce(wide, group=self.group)
                found.append(wide.to(x.dtype))
        return tuple(found)


def suite(groups, parts, every, first, zigzag=False):
    """Cases of the conformance suite, cut over so many parts."""
    if (group := groups[parts]) is None:
        return None
    form = Form(group, zigzag)
    judged = adapter.backend(tab, form.attention, form.attention_grad, functions=True)
    return adapter.judge(judged, REFUSES, ("query", "key", "value", "bias", "sink"), adapter.cases()[first::every])


# ---- what the suite does not ask


def drawn(*shapes, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def a_group_of_one(groups):
    if (group := groups[1]) is None:
        return
    inputs = [x.requires_grad_() for x in drawn((2, 7, 4), (2, 7, 4), (2, 7, 3))]
    for zigzag in (False, True):
        found = ring_attention(*inputs, group=group, causal=True, zigzag=zigzag)
        expected = kvattn.attention(*inputs, causal=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for x, y in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (found, expected)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def what_is_refused(groups):
    (x,) = drawn((2, 3, 4))
    for words, error, options in (
        ("axis is 'sequence', but group is no DeviceMesh", ValueError, {"axis": "sequence"}),
        ("group must be a ProcessGroup or a DeviceMesh, not int", TypeError, {"group": 1}),
        ("timeout must be", ValueError, {"timeout": 0}),
        ("zigzag must be", TypeError, {"zigzag": "yes"}),
        ("score is not to be had .* there are mask, bias", NotImplementedError, {"score": kvattn.dot_score}),
        ("has no argument 'is_causal': here it is causal", TypeError, {"is_causal": True}),
        ("segments must be a pair here", TypeError, {"segments": torch.zeros(2, 3).int()}),
    ):
        with pytest.raises(error, match=words):
            ring_attention(x, x, x, **options)
    if groups[2] is None:
        with pytest.raises(ValueError, match="this process is not in the group"):
            ring_attention(x, x, x, group=NON_GROUP_MEMBER)
    sharded = DTensor.from_local(x, init_device_mesh("cpu", (4,)), [Shard(1)])
    with pytest.raises(TypeError, match=r"key is a DTensor; expected the rows that this process holds: key.to_local\(\)"):
        ring_attention(x, sharded, x)
    with pytest.raises(ValueError, match="key has shape"):
        ring_attention(x, x[..., :2], x)
    nowhere = x.to("meta")  # for which no backend sends
    for call in (ring_attention, lambda *x: unshard(x[0])):
        with pytest.raises(ValueError, match=r"an array lies on meta, and the group, cpu:gloo.*, sends nothing from there"):
            call(nowhere, nowhere, nowhere)


def over_an_axis_of_a_mesh(groups):
    """Two rings side by side, each of other numbers."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "sequence"))
    query, key, value = drawn((2, 2, 9, 4), (2, 2, 9, 4), (2, 2, 9, 3), seed=mesh.get_local_rank("batch"))
    for axis in ("sequence", 1, -1):
        where = {"group": mesh, "axis": axis}
        own = [shard(x, **where) for x in (query, key, value)]
        output, lse = ring_attention(*own, **where, causal=True, return_lse=True)
        for x, y in zip(
            (output, lse[..., None]), kvattn.attention(query, key, value, causal=True, return_lse=True), strict=True
        ):
            torch.testing.assert_close(unshard(x, **where), y.reshape(2, 2, 9, -1), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="2 axes, batch, sequence: say by axis="):
        ring_attention(query, key, value, group=mesh)
    with pytest.raises(ValueError, match="no axis 'heads'; it has 2 axes, batch, sequence"):
        ring_attention(query, key, value, group=mesh, axis="heads")
    with pytest.raises(ValueError, match="no axis 2"):
        ring_attention(query, key, value, group=mesh, axis=2)


def arguments_that_differ(groups):
    """Every rank raises the same, and the group is as good as before."""
    rank = dist.get_rank()
    other = {"query": drawn((2, 4, 3, 8))[0], "key": drawn((2, 4, 3, 8))[0], "value": drawn((2, 4, 3, 8))[0]}
    narrow = {name: x[:, :2] for name, x in other.items() if name != "query"}
    ids = torch.zeros(2, 12, dtype=torch.int64)
    asked = {
        "number of key heads: 4 on rank 0, 2 on rank 2": narrow,
        "dtype: torch.float64 on rank 0, torch.float32 on rank 2": {name: x.float() for name, x in other.items()},
        "number of axes: 4 on rank 0, 3 on rank 2": {name: x[0] for name, x in other.items()},
        "batch axes as on rank 2": {name: x[:1] for name, x in other.items()},
        "options: .* as on rank 2": {"causal": True},
        "need of gradients as on rank 2": {"query": other["query"].clone().requires_grad_()},
        "mask or bias has 3 columns on rank 2; expected .* 12": {"mask": torch.ones(3, 3, dtype=torch.bool)},
        "segments of the keys are 3 on rank 2; expected .* 12": {"segments": (ids[:, :3], ids[:, :3])},
        "rank 2 holds 5 rows of 14; expected 4": {"query": drawn((2, 4, 5, 8))[0]},
    }
    every = {
        "mask or": {"mask": torch.ones(3, 12, dtype=torch.bool)},
        "segments": {"segments": (ids[:, :3], ids)},
        "rank 2 holds": {"zigzag": True},
    }
    for words, odd in asked.items():
        extra = next((x for start, x in every.items() if words.startswith(start)), {})
        with pytest.raises(ValueError, match=words):
            ring_attention(**{**other, **extra, **(odd if rank == 2 else {})})
    for odd, error in (({"scale": "large"}, TypeError), ({"valid_lens": torch.tensor([1])}, ValueError)):
        with pytest.raises(error if rank == 2 else ValueError, match=next(iter(odd)) if rank == 2 else "rank 2 .* refuses its"):
            ring_attention(**{**other, **(odd if rank == 2 else {})})
    assert ring_attention(**other).shape == (2, 4, 3, 8)


def messages(groups):
    """Each rank sends the keys and values it holds P - 1 times, and as often again, with their gradients, and these home."""
    sent, post = [], Ring.post

    def counted(self, out, back):
        sent.extend(x.numel() * x.element_size() for x, _ in out)
        return post(self, out, back)

    query, key, value = (x.requires_grad_() for x in drawn((2, 5, 8), (2, 5, 8), (2, 5, 6)))
    with patch.object(Ring, "post", counted):
        output = ring_attention(query, key, value)
        sizes, part = sent[:3], 2 * 5 * (8 + 6) * 8
        assert sizes[0] == sizes[1] == sizes[2] <= 128, sizes
        assert sent[3:] == [part] * 3, sent
        sent.clear()
        output.sum().backward()
    assert sent == [part] * 7, sent


def shares_of_a_causal_call(groups):
    """Pairs that a rank's queries may see, of a sequence of 64: query i sees i + 1 keys."""
    pairs = [int((local_positions(64, zigzag=zigzag) + 1).sum()) for zigzag in (False, True)]
    assert pairs == [(136, 392, 648, 904)[dist.get_rank()], 520]


def gradients_by_the_lse(groups):
    """Of a loss that looks at the output and at the lse, and of one that looks at the lse alone; with a sink."""
    lens, (by_output, by_lse) = torch.tensor([6, 0]), drawn((2, 4, 9, 3), (2, 4, 9), seed=1)
    for looks in ((True, True), (False, True)):
        inputs = [x.requires_grad_() for x in drawn((2, 4, 9, 4), (2, 2, 9, 4), (2, 2, 9, 3), (4,))]
        whole = kvattn.attention(*inputs[:3], sink=inputs[3], valid_lens=lens, return_lse=True)
        own = ring_attention(*map(shard, inputs[:3]), sink=inputs[3], valid_lens=lens, return_lse=True)
        losses = [(x * g).sum() for x, g, look in zip(whole, (by_output, by_lse), looks, strict=True) if look]
        expected = torch.autograd.grad(sum(losses), inputs, materialize_grads=True)
        parts = shard(by_output), shard(by_lse, dim=-1)
        losses = [(x * g).sum() for x, g, look in zip(own, parts, looks, strict=True) if look]
        found = torch.autograd.grad(sum(losses), inputs, materialize_grads=True)
        for x, y in zip(found, expected, strict=True):  # shard's backward leaves zeros where other ranks' rows are
            dist.all_reduce(x)
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def all_results(arrays, call, additive, by_output, as_given):
    """What attention returns, and the gradients by all that may have one; the options stay plain tensors."""
    inputs = [as_given(x).requires_grad_() for x in arrays]
    rest = {name: call[name].clone().requires_grad_() for name in ("bias", "sink") if name in call}
    options = call | rest
    if "score" in call:
        rest = {name: x.clone().requires_grad_() for name, x in additive.items()}
        options["score"] = partial(kvattn.additive_score, **rest)
    results = kvattn.attention(*inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    return *results, *torch.autograd.grad(results[0], [*inputs, *rest.values()], as_given(by_output))


def dtensors(groups):
    """What is shared over batch and heads, in every way, gives the answers and the gradients of what is whole."""
    mesh = init_device_mesh("cpu", (2, 2))
    query, key, value, by_output, bias, sink = drawn((3, 4, 5, 4), (3, 2, 6, 4), (3, 2, 6, 3), (3, 4, 5, 3), (4, 1, 6), (4,))
    additive = dict(zip(("W_q", "W_k", "w_v"), drawn((4, 2), (4, 2), (2,)), strict=True))
    lens, each = torch.tensor([6, 0, 4]), torch.arange(15).reshape(3, 5) % 7
    calls = (
        {}, {"causal": True, "return_lse": True}, {"valid_lens": lens, "causal": True, "query_offset": lens - 3},
        {"valid_lens": each, "bias": bias}, {"sink": sink, "window": (2, 1)}, {"mask": each[:, None, :, None] != lens.max()},
        {"positions": each[:1, :, None] % 6, "return_weights": True}, {"score": additive, "normalize": kvattn.sparsemax},
    )  # fmt: skip
    ways = ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Shard(0), Shard(0)], [Shard(1), Shard(1)], [Replicate(), Shard(0)])
    for (turn, call), places in product(enumerate(calls), ways):

        def share(x, places=places):
            return distribute_tensor(x, mesh, places if 1 not in x.shape[:2] else [Replicate()] * 2)

        keys = (key[:1], value[:1]) if turn == 1 else (key[:, :1], value[:, :1]) if turn == 2 else (key, value)
        whole, spread = (all_results((query, *keys), call, additive, by_output, how) for how in (torch.clone, share))
        for x, y in zip(spread, whole, strict=True):
            x = x.full_tensor() if isinstance(x, DTensor) else x
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=f"{call}, {places}, {keys[0].shape}")
    arrays = query, key, value, by_output
    spread = [distribute_tensor(x, mesh, ways[0]) for x in arrays]
    (found,), (expected,) = (kvattn.attention_grad(*x, wrt=["key"]) for x in (spread, arrays))
    torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-12, atol=1e-12)
    assert kvattn.explain(*spread[:3]).kernel == "each device's own part"
    one = [distribute_tensor(x[:1], mesh, ways[0]) for x in arrays[:3]]  # a batch of 1, over two
    torch.testing.assert_close(kvattn.attention(*one).full_tensor(), kvattn.attention(query[:1], key[:1], value[:1]))
    for options in (
        {"mask": lambda q, k: q >= k},
        {"segments": (torch.zeros(3, 5).int(), torch.zeros(3, 6).int())},
        {"dropout": 0.5, "rng": 1},
    ):
        with pytest.raises((TypeError, ValueError), match="not for DTensors"):
            kvattn.attention(*spread[:3], **options)
    with pytest.raises(ValueError, match="devices share over its sequence, axis 2; expected its batch or heads"):
        kvattn.attention(*(distribute_tensor(x, mesh, [Shard(0), Shard(2)]) for x in arrays[:3]))


LAYERS = {
    "MultiHeadAttention": (lambda: kv.MultiHeadAttention(8, 2, bias=True, num_kv_heads=1, sink=True, seed=1), 3),
    "AdditiveAttention": (lambda: kv.AdditiveAttention(6, seed=1), 3),
    "GatedAttention": (lambda: kv.GatedAttention(seed=1), 3),
    "TransformerEncoder": (lambda: kv.TransformerEncoder(20, 8, 16, 2, 2, seed=1), 1),
}


def layers_learn(wrap):
    """Layers that four ranks train, each on its quarter of the batch, have the losses and weights of one process."""
    (X, target), tokens, lens = (
        drawn((8, 5, 8), (8, 5, 8)),
        torch.arange(40).reshape(8, 5) % 20,
        torch.tensor([5, 4, 3, 2, 1, 5, 0, 3]),
    )
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)

    def losses(model, rows):
        optimiser, found = torch.optim.Adam(model.parameters(), 0.01), []
        for _ in range(4):
            optimiser.zero_grad()
            loss = ((model(*(x[rows] for x in inputs), lens[rows]) - target[rows]) ** 2).mean()
            loss.backward()
            optimiser.step()
            found.append(loss.detach())
        return torch.stack(found)

    for make, count in LAYERS.values():
        inputs = [tokens if count == 1 else X] * count
        one, many = make().double(), make().double()
        for model in (one, many):
            model(*(x[:2] for x in inputs), lens[:2])  # some weights take their sizes from a call
            model.double()
        many.load_state_dict(one.state_dict())
        expected, found = losses(one, slice(None)), losses(wrap(many), own)
        dist.all_reduce(found)
        torch.testing.assert_close(found / dist.get_world_size(), expected, rtol=1e-10, atol=1e-12)
        for x, y in zip(many.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(x.full_tensor() if isinstance(x, DTensor) else x, y, rtol=1e-8, atol=1e-9)


def layers_under_ddp(groups):
    layers_learn(DistributedDataParallel)


def layers_under_fsdp2(groups):
    def wrap(model):
        mesh = init_device_mesh("cpu", (4,))
        for part in reversed([*model.modules()]):  # from the inside
            if isinstance(part, (torch.nn.Linear, kv.TransformerEncoderBlock)):
                fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    layers_learn(wrap)


def the_page_of_the_docs(groups):
    """Its code, in a group that is there already."""
    page = Path(__file__).parents[2] / "docs" / "howto" / "processes.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    with patch.object(dist, "init_process_group"), patch.object(dist, "destroy_process_group"):
        exec(code, {})


def the_fused_kernel(groups):
    """It serves what is plain or causal, forward and backward, with the same answers; and nothing that is not finite."""
    calls, attend, derive = [], sinks.ATTEND, sinks.DERIVE
    count = {"ATTEND": lambda *x, **y: calls.append("forward") or attend(*x, **y)}
    count["DERIVE"] = lambda *x, **y: calls.append("backward") or derive(*x, **y)
    for dtype, zigzag, options in product(
        (torch.float64, torch.bfloat16), (False, True), ({}, {"causal": True}, {"causal": True, "window": 4, "scale": 0.5})
    ):
        *arrays, by_output = drawn((2, 4, 13, 8), (2, 2, 13, 8), (2, 2, 13, 8), (2, 4, 13, 8))
        for nan in (False, True):
            if nan:
                arrays[1] = arrays[1].clone()
                arrays[1][0, 0, 6] = math.nan
            whole = [x.to(dtype).requires_grad_() for x in arrays]
            expected = kvattn.attention(*(x.double() for x in whole), **options)
            expected = [expected, *torch.autograd.grad(expected, whole, by_output)]
            own = [shard(x.detach(), zigzag=zigzag).requires_grad_() for x in whole]
            calls.clear()
            with patch.multiple(sinks, **count):
                output = ring_attention(*own, zigzag=zigzag, **options)
                grads = torch.autograd.grad(output, own, shard(by_output, zigzag=zigzag).to(dtype))
            assert nan or "window" in options or {*calls} == {"forward", "backward"}, calls
            near = 1e-12 if dtype == torch.float64 else 0.03
            for x, y in zip((output, *grads), expected, strict=True):
                whole_of_it = unshard(x.detach(), zigzag=zigzag).double()
                torch.testing.assert_close(whole_of_it, y.double(), rtol=near, atol=near, equal_nan=True)


def what_two_cards_try(groups):
    torch_cards.check(torch.device("cpu"))


def second_derivatives(groups):
    query, key, value = (x.requires_grad_() for x in drawn((2, 5, 8), (2, 5, 8), (2, 5, 6)))
    output = ring_attention(query, key, value)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(output.sum(), query, create_graph=True)


def a_rank_that_makes_no_call(groups):
    """The other of two gives up after its timeout, and says why."""
    if dist.get_rank() == 0:
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="has sent nothing for 2 s"):
            ring_attention(*drawn((3, 2), (3, 2), (3, 2)), group=groups[2], timeout=2)
        assert 1.5 < time.monotonic() - start < 10


def a_rank_that_is_killed(groups):
    """While the others are on their way; each of them raises, one that is nobody's neighbour within the timeout."""
    query, key, value = drawn((2, 64, 8), (2, 64, 8), (2, 64, 8))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="waits for another in vain"):  # noqa: PT012
        for i in range(10**6):
            if dist.get_rank() == 2 and i == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            ring_attention(query, key, value, timeout=10)
    assert time.monotonic() - start < 20


def all_wait(groups):
    """For the test process to be killed."""
    time.sleep(100)


LAYOUTS = ((1, False), (2, False), (3, False), (4, False), (2, True), (4, True))
EVERY = bool(os.environ.get("KVATTN_EVERY"))  # once a week
TASKS = {  # each case in one layout, or in all of them
    f"{parts} parts" + " in zigzag" * zigzag: partial(
        suite, parts=parts, every=1 if EVERY else len(LAYOUTS), first=0 if EVERY else i, zigzag=zigzag
    )
    for i, (parts, zigzag) in enumerate(LAYOUTS)
}
OTHERS = (the_page_of_the_docs, what_two_cards_try, the_fused_kernel, a_group_of_one, what_is_refused, over_an_axis_of_a_mesh,
          arguments_that_differ, messages, shares_of_a_causal_call, gradients_by_the_lse, second_derivatives, dtensors,
          layers_under_ddp, layers_under_fsdp2)  # fmt: skip
LOSSES = (a_rank_that_makes_no_call, a_rank_that_is_killed)
TASKS |= {task.__name__: task for task in (*OTHERS, *LOSSES, all_wait)}


def rank(rank, size, folder, tasks):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    groups = {parts: dist.new_group(range(parts)) for parts in range(1, size)} | {size: dist.group.WORLD}
    groups = {parts: group if rank < parts else None for parts, group in groups.items()}
    with open(f"{folder}/{rank}", "w") as file:
        for task in tasks:
            wrong = found = None
            start = time.monotonic()
            try:
                found = TASKS[task](groups)
            except BaseException:  # pytest's own too
                wrong = traceback.format_exc()
            seconds = round(time.monotonic() - start, 2)
            print(json.dumps({"task": task, "found": found, "wrong": wrong, "seconds": seconds}), file=file, flush=True)
    dist.destroy_process_group()


def main(size, folder, *tasks):
    torch.set_num_threads(1)
    if set(tasks) - {task.__name__ for task in (*LOSSES, all_wait)}:
        adapter.cases()
    children = {}
    for i in range(int(size)):
        if (pid := os.fork()) == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with its parent
            rank(i, int(size), folder, tasks)
            os._exit(0)
        children[i] = pid
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children.values()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
