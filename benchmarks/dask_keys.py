"""kvattn.distributed.dask over keys in files, beside NumPy's own kernel over the same files, mapped, in one process.

    python benchmarks/dask_keys.py --folder /tmp/keys --keys 100000,1000000,10000000

Keys and values of 64 float32 features are generated into the folder from a seed, once (5 GB for ten million), and stay there;
they are attended to by 64 queries. A worker is a process of one thread with its memory limited, and so NumPy's kernel has one
thread too. The calls take turns; a figure is the median of the rounds' ratios. The share of reading is the time of the same
tasks that only touch each page of their chunk: pages in the system's cache, if its memory holds them, or, with --cold, dropped
from it before each call. With --persist, and one number of --workers, the workers hold keys and values in their own memory, and
map no file. CPU is the time of all processes on a processor, the scheduler's too, over the kernel's: on a
busy machine it tells more than the clock. ``apart`` is how far the outputs are from the kernel's at most.

What two workers could reach at best, without Dask, stands beside them: two processes, each of which has half of the keys for
NumPy's kernel of one thread, over one that has all; and the same of products of float32 matrices that a cache holds, which
share nothing but the processor. Dask's sampling of what its workers do, a hundred times a second, is off.

Dask's own cost is some 10 ms for a call and 2 to 4 ms for each chunk, of which the scheduler has a third: --chunk.
"""

import argparse
import os
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

FEATURES, QUERIES, DRAWN = 64, 64, 100_000


def generate(folder, name, size):
    """The file of so many rows, drawn in turns, so that a shorter one begins like a longer."""
    path = Path(folder) / f"{name}-{size}.npy"
    if not path.exists():
        made = np.lib.format.open_memmap(part := path.with_suffix(".part"), "w+", np.float32, (size, FEATURES))
        for start in range(0, size, DRAWN):
            some = made[start : start + DRAWN]
            rng = np.random.default_rng((start // DRAWN, name == "values"))
            some[...] = rng.standard_normal((DRAWN, FEATURES), np.float32)[: len(some)]
        made.flush()
        part.rename(path)
    return str(path)


def read(path, block_info=None):
    (start, end), _ = block_info[None]["array-location"]
    return np.load(path, mmap_mode="r")[start:end]


def chunked(path, size, chunk):
    """The file as a dask array: workers map it by its name, and no rows travel."""
    import dask.array as da

    sizes = (chunk,) * (size // chunk) + ((size % chunk,) if size % chunk else ())
    return da.map_blocks(read, path, chunks=(sizes, (FEATURES,)), dtype=np.float32, meta=np.empty((0, 0), np.float32))


def part(paths, query, start, end):
    """What a process without Dask does of its keys: (output, lse)."""
    import kvattn

    return kvattn.attention(query, *(np.load(path, mmap_mode="r")[start:end] for path in paths), return_lse=True)


def product(times):
    x = np.ones((256, 256), np.float32)
    for _ in range(times):
        x @ x


def one_thread():
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def touched(key, value):
    return np.array([[key[:, ::1024].sum() + value[:, ::1024].sum()]])  # a number of each row, so of each page


def drop(*paths):
    """Take the files out of the system's cache."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def peak():
    """The most memory that this process has had, in MiB; pages of mapped files count while they are mapped."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(asked, size, clients, pool, limits):
    """{what: figure} for so many keys."""
    import dask.array as da
    from distributed import progress

    import kvattn
    from kvattn import timing
    from kvattn.distributed import dask as kd

    paths = [generate(asked.folder, name, size) for name in ("keys", "values")]
    query = np.random.default_rng(0).standard_normal((QUERIES, FEATURES), np.float32)
    key, value = (chunked(path, size, asked.chunk) for path in paths)
    mapped = [np.load(path, mmap_mode="r") for path in paths]

    def by(client, what):
        future = client.compute(what)
        if asked.progress:
            with client.as_current():  # of several, the one whose scheduler knows of it
                progress(future, notebook=False)
        return future.result()

    def kernel(threads):
        with limits(threads, user_api="blas"):
            return kvattn.attention(query, *mapped)

    touch = da.map_blocks(touched, key, value, dtype=np.float32, chunks=((1,) * key.numblocks[0], (1,))).sum()
    calls = {"NumPy": partial(kernel, 1), "NumPy, its own threads": partial(kernel, None)}

    def halves(count):
        ends = [size * i // count for i in range(count + 1)]
        parts = [pool.submit(part, paths, query, start, end) for start, end in pairwise(ends)]
        return kvattn.merge_attention(*zip(*(x.result() for x in parts), strict=True))

    def products(count):
        return [x.result() for x in [pool.submit(product, 600 // count) for _ in range(count)]]

    for count, what in ((1, "a process"), (2, "two processes")):
        calls[what] = partial(halves, count)
        calls[f"{what}, product"] = partial(products, count)
    for workers, client in clients.items():
        held = client.persist([key, value]) if asked.persist else [key, value]
        calls[f"{workers} workers"] = partial(by, client, kd.attention(query, *held))
        calls[f"{workers} workers, reading"] = partial(by, client, touch)

    def turn(call):
        if asked.cold:
            drop(*paths)
        return timing.wall(call)

    first = {name: call() for name, call in calls.items()}  # which is not timed
    outputs = [x for x in first.values() if getattr(x, "shape", None) == query.shape]
    apart = max(float(np.abs(x - first["NumPy"]).max()) for x in outputs)
    took = timing.rounds(calls, asked.rounds, turn)
    row = {"keys": size, "apart": apart, "NumPy, s": min(took["NumPy"])}

    def processor(call, client=None):
        def spent():
            return time.process_time() + (sum(client.run(time.process_time).values()) if client else 0)

        before = spent()
        call()
        return spent() - before

    alone = min(processor(calls["NumPy"]) for _ in range(asked.rounds))
    row["NumPy, its own threads"] = timing.ratio(took["NumPy, its own threads"], took["NumPy"])["ratio"]
    for what, base in (("two processes", "a process"), ("a process", "NumPy")):
        row[f"{what} without Dask"] = timing.ratio(took[what], took[base])["ratio"]
    row["two processes, product"] = timing.ratio(took["two processes, product"], took["a process, product"])["ratio"]
    for workers, client in clients.items():
        row[f"{workers} workers"] = timing.ratio(took[f"{workers} workers"], took["NumPy"])["ratio"]
        row[f"{workers} workers, s"] = min(took[f"{workers} workers"])
        spent = min(processor(calls[f"{workers} workers"], client) for _ in range(asked.rounds))
        row[f"{workers} workers, CPU"] = spent / alone
        row[f"{workers} workers, share of reading"] = timing.ratio(
            took[f"{workers} workers, reading"], took[f"{workers} workers"]
        )["ratio"]
        row[f"{workers} workers, peak MiB"] = max(client.run(peak).values())
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where the files are, or are to be written")
    parser.add_argument("--keys", default="100000,1000000", help="how many (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=500_000, help="how many keys a task has (default: %(default)s)")
    parser.add_argument("--workers", default="1,2", help="processes of one thread (default: %(default)s)")
    parser.add_argument("--memory-limit", default="1GiB", help="of each worker (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each call (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's cache before each call")
    parser.add_argument("--persist", action="store_true", help="let the workers hold keys and values in their memory")
    parser.add_argument("--progress", action="store_true", help="show Dask's progress bar")
    parser.add_argument("--json", help="write the figures to this file")
    asked = parser.parse_args()
    if asked.persist and "," in asked.workers:
        parser.error("--persist needs one number of --workers: what one cluster holds another does not find")

    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import ExitStack

    import dask
    from distributed import Client, LocalCluster
    from threadpoolctl import threadpool_limits

    from kvattn import timing

    dask.config.set({"distributed.worker.profile.enabled": False})
    Path(asked.folder).mkdir(parents=True, exist_ok=True)
    rows = []
    with ExitStack() as stack:
        clients = {}
        for workers in map(int, asked.workers.split(",")):
            options = {"threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
            cluster = stack.enter_context(LocalCluster(n_workers=workers, memory_limit=asked.memory_limit, **options))
            clients[workers] = stack.enter_context(Client(cluster))
        start = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(2, start, initializer=one_thread))
        for size in map(int, asked.keys.split(",")):
            rows.append(measure(asked, size, clients, pool, threadpool_limits))
            print(*(f"{name}: {x:.3g}" for name, x in rows[-1].items()), sep=", ", flush=True)
    if asked.json:
        timing.write(asked.json, timing.machine(), rows=rows)


if __name__ == "__main__":
    main()
