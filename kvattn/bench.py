"""How long attention takes, as a ratio to PyTorch's scaled_dot_product_attention in the same process, call by call in turn.

Each backend runs in a process of its own, with PyTorch's kernel beside it as the yardstick: every query over every key,
whatever part of them the others are restricted to. A round times each of the yardstick, kvattn and the framework's own
attention (kvattn/timing.py says how); the ratio is taken within the round, and the table shows the median of the rounds with
the quartiles, and kvattn's time over that of the framework's own call. What was timed is checked in the same run. Layers are
timed in the same way, with nn.MultiheadAttention as the yardstick.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from kvattn import dispatch, peers, registry, timing
from kvattn.peers import Problem

SHAPES = {  # batch, heads, queries, keys, features
    "S": (8, 8, 128, 128, 64),
    "M": (2, 8, 512, 512, 64),
    "L": (1, 8, 2048, 2048, 64),
    "XL": (1, 2, 8192, 8192, 64),
    "D": (1, 8, 1, 8192, 64),
    "tiny": (1, 1, 8, 8, 8),
}
KINDS: dict[str, tuple[str, ...]] = {  # and the flags that ask for it
    "full": (),
    "causal": ("causal",),
    "valid": ("valid",),
    "queries": ("per_query",),
    "window": ("window",),
    "mask": ("mask",),
    "pairs": ("mask",),
    "bias": ("bias",),
    "mask+bias": ("mask", "bias"),
}
OF_LAYERS = ("full", "causal", "valid")
WINDOW = 256  # keys to each side of a query
FILLED = 0.6  # the share of the keys that is valid
# of the largest |value|: is what was timed attention at all? How near it is, the conformance suite says
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
YARDSTICKS = ("torch SDPA", "torch MHA")  # of attention, and of layers


class Settings(NamedTuple):
    """What is timed, by names of SHAPES and KINDS, and how."""

    shapes: list[str]
    kinds: list[str]
    dtype: str = "float32"
    grad: bool = False
    device: str = "cpu"
    rounds: int = 15
    layers: bool = False  # MultiHeadAttention instead of attention
    quick: bool = False  # a call or two of each, whose figures mean nothing


def run(
    backends: list[str], settings: Settings, progress: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """A row for every backend, shape, kind and peer: seconds, the ratio to the yardstick, its quartiles, and the error.

    A row of kvattn's has ``own``, the ratios to what its framework has for the call. A backend whose process fails gives one
    row with ``failed``: the last line that it wrote.
    """
    rows: list[dict[str, Any]] = []
    for backend in backends:
        for row in _in_its_process(backend, settings):
            rows.append({"backend": backend, "failed": row["failed"]} if "failed" in row else row)
            progress(rows[-1])
    return rows


def lacking(backends: list[str], device: str) -> dict[str, str]:
    """What each backend that has no such device says; asked in processes of their own, since some take a GPU whole."""
    found = {}
    for backend in backends if device.strip().lower() != "cpu" else ():
        for row in _in_its_process(backend, Settings([], [], device=device)):
            if "words" not in row:  # a backend that cannot be imported is reported when it is to be timed
                found[backend] = row["failed"]
    return found


def _in_its_process(backend: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of a process in which a backend is timed."""
    return timing.in_a_process(["-m", "kvattn.bench", json.dumps([backend, *settings])])


def count(backends: list[str], shapes: list[str], kinds: list[str], layers: bool = False) -> int:
    """How many measurements a run makes: one for each backend, shape and kind."""
    return len(backends) * sum(_meaningful(shape, kind, layers) for shape in shapes for kind in kinds)


def _meaningful(shape: str, kind: str, layers: bool) -> bool:
    """A causal mask needs as many queries as keys: else every framework aligns it in its own way. So does a layer."""
    square = SHAPES[shape][2] == SHAPES[shape][3]
    return (square and kind in OF_LAYERS) if layers else (square or kind != "causal")


def tables(rows: list[dict[str, Any]], width: int) -> list[Any]:
    """Rich tables of the ratios: as many shapes in each as ``width`` characters hold."""
    rows = [row for row in rows if "failed" not in row]
    shapes, many = list(dict.fromkeys(row["shape"] for row in rows)), max(1, (width - 34) // 12)
    parts = [shapes[i : i + many] for i in range(0, len(shapes), many)]
    return [_table([row for row in rows if row["shape"] in part]) for part in parts]


def _table(rows: list[dict[str, Any]]) -> Any:
    """A line for each that was timed, and for kvattn over each of its framework's own; a column a shape, a section a kind."""
    from rich.table import Table

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    device, yardstick = rows[0].get("device", "cpu"), YARDSTICKS["layer" in rows[0]]
    time = f"time / {yardstick}" if any(row.get("ratio") is not None for row in rows) else "time"  # there may be no PyTorch
    made = Table("", "", title=f"on {device}: {time}, all to all: median, quartiles")
    for shape in shapes:
        made.add_column(shape, justify="right", no_wrap=True, min_width=9)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines: dict[str, dict[str, str]] = {}
        for row in (row for row in rows if row["kind"] == kind):
            lines.setdefault(row["what"], {})[row["shape"]] = _cell(row)
            for other, figures in row.get("own", {}).items():
                lines.setdefault(f"{row['what']} / {other}", {})[row["shape"]] = _cell(row | figures)
        for what, found in lines.items():
            made.add_row(kind, what, *(found.get(shape, "") for shape in shapes))
        made.add_section()
    return made


def _cell(row: dict[str, Any]) -> str:
    if not row["right"]:
        return f"WRONG by {row['error']:.1g}"
    if row["ratio"] is None:
        return f"{1e3 * row['seconds']:.3g} ms"
    low, high = row["spread"]
    return f"{_short(row['ratio'])}\n{_short(low)}-{_short(high)}"


def _short(ratio: float) -> str:
    """At most four characters up to 1000, and no digits that mean nothing."""
    return f"{ratio:.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bars of the ratios, a panel for each shape and kind, written to ``path``."""
    from matplotlib.figure import Figure

    yardstick = YARDSTICKS[any("layer" in row for row in rows)]
    rows = [row for row in rows if row.get("ratio")]  # none where PyTorch is not installed
    panels = list(dict.fromkeys(f"{row['shape']} {row['kind']}" for row in rows)) or ["nothing"]
    names = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(1.5 + 2.6 * len(panels), 1 + 0.32 * len(names)), layout="constrained")
    for panel, axes in zip(panels, np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), strict=True):
        of = {row["what"]: row for row in rows if f"{row['shape']} {row['kind']}" == panel}
        for at, name in enumerate(names):
            if name in of:
                low, high = of[name]["spread"]
                colour = "tab:blue" if name.startswith("kvattn") else "tab:gray"
                ratio = of[name]["ratio"]
                axes.barh(at, ratio, color=colour, xerr=[[max(ratio - low, 0)], [max(high - ratio, 0)]])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=panel, yticks=range(len(names)), yticklabels=names, xlabel=f"time / {yardstick}")
        axes.invert_yaxis() if panel == panels[0] else None
    figure.savefig(path)


# ---- in the backend's own process


def _work(backend: str, settings: Settings) -> None:
    tab: Any = registry.load(backend)
    try:
        device = dispatch.device(tab, settings.device)
    except ValueError as error:
        timing.print_row({"backend": backend, "failed": str(error)})
        return
    about = {"dtype": settings.dtype, "grad": settings.grad} | ({"layer": True} if settings.layers else {})
    with dispatch.on(tab, device):
        for shape in settings.shapes:
            for kind in (kind for kind in settings.kinds if _meaningful(shape, kind, settings.layers)):
                given = problem(shape, kind, settings.dtype, settings.grad, device, settings.layers)
                for row in _measure(backend, given, settings.rounds, timing.wall if settings.quick else timing.looped):
                    first = {"backend": backend, "what": row.pop("what"), "shape": shape, "kind": kind}
                    timing.print_row(first | about | row | {"device": tab.devices()[device]})


def problem(
    shape: str, kind: str, dtype: str = "float32", grad: bool = False, device: str = "cpu", layer: bool = False
) -> Problem:
    """The arrays and options of a shape and a kind, drawn alike in each process."""
    b, h, n, m, d = SHAPES[shape]
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype("float32")

    lens = np.full(b, max(1, int(FILLED * m)), dtype="int32")
    options: dict[str, Callable[[], dict[str, Any]]] = {
        "full": dict,
        "causal": lambda: {"causal": True},
        "valid": lambda: {"valid_lens": lens},
        "queries": lambda: {"valid_lens": rng.integers(1, m + 1, (b, n), dtype="int32")},
        "window": lambda: {"window": WINDOW},
        "mask": lambda: {"mask": np.arange(m) < lens[:, None, None, None]},  # of padding
        "pairs": lambda: {"mask": (rng.random((b, 1, n, m)) < FILLED) | (np.arange(m) == 0)},
        "bias": lambda: {"bias": draw(1, h, n, m)},
        "mask+bias": lambda: {"mask": np.arange(m) < lens[:, None, None, None], "bias": draw(1, h, n, m)},
    }
    made = options[kind]()
    if layer:
        matrices = tuple(draw(h * d, h * d) / np.float32(math.sqrt(h * d)) for _ in range(4))
        return Problem([draw(b, n, h * d) for _ in range(1 + grad)], made, dtype, grad, device, matrices, h)
    return Problem([draw(b, h, length, d) for length in (n, m, m, n)][: 3 + grad], made, dtype, grad, device)


def _yardstick(device: str) -> bool:
    """Whether there is a yardstick on this device: else there are times, and no ratios."""
    if not find_spec("torch"):
        return False
    try:
        return bool(dispatch.device(registry.load("torch"), device))
    except ValueError:
        return False


def _measure(
    backend: str, problem: Problem, rounds: int, turn: Callable[[timing.Call], float] = timing.looped
) -> Iterator[dict[str, Any]]:
    layers = bool(problem.matrices)
    # its own first: MXNet's import leaves PyTorch half its threads
    named = dict((peers.LAYERS if layers else peers.ATTENTION)[backend](problem))
    plain, yardstick = problem._replace(options={}), YARDSTICKS[layers]
    calls = ({yardstick: (peers.mha if layers else peers.sdpa)(plain)} if _yardstick(problem.device) else {}) | named
    errors = {what: _error(call(), plain if what == yardstick else problem) for what, call in calls.items()}  # and each is warm
    took = timing.rounds(calls, rounds, turn)
    mine, *theirs = named
    if theirs == [] and backend == "torch" and yardstick in took:
        theirs = [yardstick]  # without options it is torch's own call
    for what, times in took.items():
        if what == yardstick and backend != "torch":
            continue
        row: dict[str, Any] = {"what": what, "seconds": statistics.median(times), "ratio": None, "spread": None}
        row |= timing.ratio(times, took[yardstick]) if yardstick in took else {}
        row |= {"error": errors[what], "right": bool(errors[what] <= TOLERANCE[problem.dtype])}
        yield row | ({"own": {other: timing.ratio(times, took[other]) for other in theirs}} if what == mine else {})


def _error(got: Any, problem: Problem) -> float:
    """The largest difference from float64 NumPy in up to eight rows of the first head, or of a layer's first entry, over the
    largest value."""
    got = got.float().cpu() if hasattr(got, "cpu") else got.asnumpy() if hasattr(got, "asnumpy") else got
    got = np.asarray(got, dtype=float)  # MXNet's arrays, and tensors on a GPU, have no __array__
    allowed, bias = problem.allowed(), problem.options.get("bias")
    n, m = problem.sizes
    rows = np.unique(np.linspace(0, n - 1, 8).astype(int))

    mask = np.broadcast_to(True if allowed is None else allowed, (len(got), 1, n, m))[0, 0]
    if problem.matrices:
        arrays, matrices = (x[:1].astype(float) for x in problem.arrays), [W.astype(float) for W in problem.matrices]
        expected = peers.first(peers.naive_layer(*arrays, matrices=matrices, heads=problem.heads, allowed=mask))
        got = got[:1]
    else:
        query, key, value, *upstream = (x[0, 0].astype(float) for x in problem.arrays)
        given = (query[rows], key, value, *(x[rows] for x in upstream))
        expected = peers.first(peers.naive(*given, allowed=mask[rows], bias=None if bias is None else bias[0, 0][rows]))
        got = got[0, 0][rows]
    return float(np.abs(got - expected).max() / (np.abs(expected).max() or 1))


if __name__ == "__main__":
    name, *given = json.loads(sys.argv[1])
    _work(name, Settings(*given))
