"""What a ring of devices costs, on paper: the table of docs/reference/rings.md, and the memory of compiled programs.

    python benchmarks/rings.py            the table, from the formulas below
    python benchmarks/rings.py --measure  memory of compiled programs beside the formula's (a minute; JAX)

n queries and keys, P devices, h heads that share g heads of keys, d features of each, causal, one batch entry.
"""

import argparse
import os

FORWARD, GRADIENTS = (4.6, 6.4), (7.6, 8.6)  # copies of a device's queries, and of its keys and values, as fitted by --measure
SIZES = (2**15, 2**17, 10**6)
DEVICES = (8, 64, 256, 1024)
HEADS, KEY_HEADS, FEATURES, BYTES = 32, 8, 128, 2
SPEED, LINK, MEMORY = 400e12, 50e9, 80e9  # of a device: operations and bytes sent in a second, bytes of memory


def operations(n, devices, heads=HEADS, d=FEATURES, gradients=False):
    """Of one device, causal: two products of half the pairs; with the gradients those again, and five more."""
    return (4.5 if gradients else 1) * 2 * n * n * heads * d / devices


def sent(n, devices, heads=HEADS, key_heads=KEY_HEADS, d=FEATURES, size=BYTES, gradients=False):
    """Bytes that one device sends, causal: keys and values P - 1 times, and all it holds to and from the zig-zag order once;
    for the gradients keys and values as often again, and P times their gradients, which are float32 at least."""
    rows, keys, wide = n / devices * heads * d, n / devices * key_heads * 2 * d, max(size, 4)
    forward = (devices - 1) * keys * size + rows * size + keys * size
    if not gradients:
        return forward + rows * wide  # the output comes back
    back = (devices - 1) * keys * size + devices * keys * wide
    return forward + back + rows * wide + rows * size + keys * size


def memory(n, devices, heads=HEADS, key_heads=KEY_HEADS, d=FEATURES, gradients=False):
    """Bytes of one device, in float32, in which half precision is computed."""
    queries, keys = GRADIENTS if gradients else FORWARD
    return n / devices * d * 4 * (queries * heads + 2 * keys * key_heads)


def first_limit(n, devices):
    """What a step of training meets first: memory that is full, links that are slower than the products, or neither."""
    if memory(n, devices, gradients=True) > MEMORY:
        return "memory"
    return "links" if sent(n, devices, gradients=True) / LINK > operations(n, devices, gradients=True) / SPEED else "products"


def table():
    """The page's table, in Markdown."""
    lines = [
        "| n | devices | operations | sent | memory | computing | sending | bound by |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for n in SIZES:
        for devices in DEVICES:
            work, moved, held = (f(n, devices, gradients=True) for f in (operations, sent, memory))
            lines.append(
                f"| {n:,} | {devices} | {work:.1e} | {moved / 1e9:.3g} GB | {held / 1e9:.3g} GB | {work / SPEED:.2g} s "
                f"| {moved / LINK:.2g} s | {first_limit(n, devices)} |"
            )
    return "\n".join(lines)


# ---- few queries beside very many keys

KEYS, QUERIES, WIDTH, CHUNK = (
    10**9,
    64,
    64,
    10**6,
)  # float32 keys and values of so many features, one head; keys of a Dask chunk
PART = QUERIES * (WIDTH + 1) * 4  # bytes of the outputs and the lse of a chunk, which are all that is sent
RATE = 0.226e-6  # seconds of one thread for a key beside 64 queries, as measured by dask_keys.py on 10^6 keys
TASK = 1e-3  # seconds of Dask's scheduler for a task, as its documentation has it


def of_keys(devices):
    """{limit: seconds} of keys that stay where they are, on Dask, and of a ring; and the bytes that a device holds of them."""
    held, chunks = KEYS / devices * WIDTH * 2 * 4, KEYS // CHUNK
    stay = {"computing": KEYS * RATE / min(devices, chunks), "scheduler": chunks * 8 / 7 * TASK, "links": chunks * PART / LINK}
    ring = {"computing": 4 * QUERIES * KEYS * WIDTH / devices / SPEED, "links": (devices - 1) * held / LINK}
    return stay, ring, held


def table_of_keys():
    """The page's table of many keys, in Markdown."""
    lines = [
        "| devices | each has | Dask: computing | scheduler | links | bound by | ring: held | sent | links | bound by |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for devices in (8, 16, 64, 256, 1024):
        stay, ring, held = of_keys(devices)
        cells = [f"{held / 1e9:.3g} GB", *(f"{seconds:.2g} s" for seconds in stay.values()), max(stay, key=stay.get)]
        bound = "memory" if 2 * held > MEMORY else max(ring, key=ring.get)
        cells += [f"{2 * held / 1e9:.3g} GB", f"{ring['links'] * LINK / 1e9:.3g} GB", f"{ring['links']:.2g} s", bound]
        lines.append(f"| {devices} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure():
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    from functools import partial

    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from kvattn.distributed.jax import ring_attention

    cells = ["n", "devices", "heads", "bytes of the program", "formula", "program / formula"]
    cells += ["gradients: bytes", "formula", "program / formula"]
    print(f"| {' | '.join(cells)} |\n|{' ---: |' * 9}")
    cases = [(n, devices, 2, 1) for n in (1024, 4096, 16384, 32768) for devices in (2, 8)] + [(8192, 8, 8, 1), (8192, 8, 4, 4)]
    for n, devices, heads, key_heads in cases:
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        lies = NamedSharding(mesh, P(None, None, "x", None))
        attend = partial(ring_attention, mesh=mesh, axis="x", causal=True)
        cells = []
        for gradients in (False, True):
            program = (lambda *x: jax.vjp(attend, *x[:3])[1](x[3])) if gradients else attend  # noqa: B023
            shapes = (heads, key_heads, key_heads, heads)[: 4 if gradients else 3]
            given = [jax.ShapeDtypeStruct((1, h, n, 64), "float32", sharding=lies) for h in shapes]
            needs = jax.jit(program, out_shardings=lies).lower(*given).compile().memory_analysis()
            found = needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes
            stated = memory(n, devices, heads, key_heads, 64, gradients)
            cells += [f"{found / 1e6:.2f} MB", f"{stated / 1e6:.2f} MB", f"{found / stated:.2f}"]
        print(f"| {n} | {devices} | {heads} / {key_heads} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true")
    measure() if parser.parse_args().measure else print(table(), table_of_keys(), sep="\n\n")
