"""What `kvattn bench` or a script of benchmarks/ wrote (`--json`), as a part of a page: tables and plots.

No number is typed by hand.
"""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from kvattn import bench, plot

KINDS = {
    "full": "All keys",
    "causal": "Causal: each query sees the keys up to its own",
    "valid": "Padding: the first 60% of the keys are real (`valid_lens`)",
    "queries": "Padding: each query has a length of its own (`valid_lens` of (batch, queries))",
    "mask": "A mask of padding, (batch, 1, 1, keys): the first 60%",
    "pairs": "A mask of pairs, (batch, 1, queries, keys): 60% of them, at random",
    "bias": "A bias, (1, heads, queries, keys)",
    "mask+bias": "A mask of padding and a bias",
    "window": "A window (`window`): 256 keys to each side; 32 in the curves below",
    "positions": "32 keys selected for each query (`positions`)",
    "additive": "The additive score",
    "gated": "The gated score",
    "own": "A score of one's own",
    "plain": "No options",
    "scale": "With a scale",
    "valid_lens": "With `valid_lens`",
    "parts": "What the frontend does in between",
    "torch": "PyTorch",
    "jax": "JAX",
}
PLOTTED = ("M", "L", "XL", "D")  # shapes; the others are in the tables


def myst(file, pictures, columns="shape", value="ratio"):
    """The rows of a file as MyST text: what was timed down, ``columns`` across, a table for each kind.

    Plots are written to the folder ``pictures``, one for each kind: bars of ratios, or lines where the columns are numbers.
    """
    if not Path(file).is_file():
        return "Not measured yet.\n"
    document = json.loads(Path(file).read_text(encoding="utf-8"))
    rows, pieces = _rows(document), []
    told = [row for row in rows if "failed" not in row and not row.get("late")]
    for kind in dict.fromkeys(row.get("kind") for row in told):
        these = [row for row in told if row.get("kind") == kind]
        path = Path(pictures, f"{Path(file).stem}-{kind or 'all'}.svg")
        drawn = _draw(these, path, columns, value)
        title = KINDS.get(kind, kind)
        pieces += [f"**{title}**\n"] * (title is not None) + [_table(these, columns, value)] + [_image(path)] * drawn
    pieces += [f"{row['backend']} failed: `{row['failed']}`\n" for row in rows if "failed" in row]
    late = [row for row in rows if row.get("late")]
    for kind in dict.fromkeys(row["kind"] for row in late):
        these = dict.fromkeys(row["what"] for row in late if row["kind"] == kind)
        pieces.append(f"Not measured in {KINDS[kind]}, for want of time: {'; '.join(these)}.\n")
    if "import" in document:
        pieces.append(f"`import kvattn` takes {document.pop('import'):.1f} ms, NumPy's own import not counted.\n")
    about = ", ".join(f"{key} {said}" for key, said in document.items())
    return "\n".join([*pieces, *[f"*Measured with {about}.*\n"] * bool(about)])


def summary(file, pictures):
    """MyST text, a table and a picture: kvattn's time over that of the quickest call that its users have without it."""
    rows = json.loads(Path(file).read_text(encoding="utf-8"))["rows"]
    ratios = {}
    for backend, kind, shape in dict.fromkeys((row["backend"], row["kind"], row["shape"]) for row in rows):
        of = {row["what"]: row for row in rows if (row["backend"], row["kind"], row["shape"]) == (backend, kind, shape)}
        own = [row["ratio"] for what, row in of.items() if not what.startswith("kvattn") and row.get("ratio") and row["right"]]
        if own and of[f"kvattn {backend}"].get("ratio"):
            ratios.setdefault(backend, {})[kind, shape] = of[f"kvattn {backend}"]["ratio"] / min(own)
    lines = ["| | S to XL: median | least | most | tiny: median |", "|---|---:|---:|---:|---:|"]
    for backend, found in ratios.items():
        tiny = [ratio for (_, shape), ratio in found.items() if shape == "tiny"]
        large = [ratio for (_, shape), ratio in found.items() if shape not in ("tiny", "D")]
        numbers = (statistics.median(large), min(large), max(large), *[statistics.median(tiny)] * bool(tiny))
        lines.append(f"| {backend} | {' | '.join(f'{x:.2f}' for x in numbers)} |")
    path = Path(pictures, f"{Path(file).stem}-summary.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    _dots(ratios, path)
    return "\n".join([*lines, "", _image(path, "A dot for each call of the table above, by framework")])


def _dots(ratios, path):
    """A line of dots for each backend: one for each kind of call and shape."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for at, found in enumerate(ratios.values()):
        for tiny, marker in ((False, "o"), (True, "x")):
            these = [ratio for (_, shape), ratio in found.items() if (shape == "tiny") is tiny]
            axes.plot(these, [at] * len(these), f"C{at}{marker}", alpha=0.6, markersize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    axes.set(xscale="log", yticks=range(len(ratios)), yticklabels=list(ratios))
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("kvattn's time / the framework's own: left of 1 kvattn is faster. Crosses: tiny calls")
    axes.invert_yaxis()
    figure.savefig(path)


def _rows(document):
    """A list of dicts with ``what`` was measured; of overhead.py's calls and gpu.py's rows, each by its kind and part."""
    rows = [_on_gpu(row) if "framework" in row else row for row in document.pop("rows", [])]
    for backend, calls in document.pop("calls", {}).items():
        for name, (median, _) in calls.items():
            part, _, kind = name.partition(" ")
            known = part in ("native", "tab", "api")
            rows.append({"backend": backend, "kind": kind if known else "parts", "part": part if known else name, "us": median})
    rows = [row if "what" in row else {"what": f"kvattn {row['backend']}"} | row for row in rows]
    return [row | {"what": f"{row['what']}, over {row['beside']}"} if "beside" in row else row for row in rows]


def _on_gpu(row):
    passes = "forward + backward" if row["grad"] else "forward"
    return row | {"what": f"{row['shape']}: {row['kind']}, {row['dtype']}", "kind": row["framework"], "shape": passes}


def _image(path, alt="The numbers of the table above as a plot"):
    return f"```{{image}} {path}\n:class: output\n:width: 1000px\n:alt: '{alt}'\n```\n"


def _table(rows, columns, value):
    across = list(dict.fromkeys(row[columns] for row in rows))
    lines = [["", *map(str, across)], ["---", *["---:"] * len(across)]]
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = {row[columns]: _cell(row, value) for row in rows if row["what"] == what}
        lines.append([what, *(cells.get(column, "") for column in across)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row, value):
    if not row.get("right", True):
        return f"wrong by {row['error']:.1g}"
    if "best" in row:  # one of gpu.py's
        took = f"<small>{row['ms']:.3g} ms; {row['best'] or 'no native way'}</small>"
        return took if row["best"] is None else f"{row['ratio']:.2f}<br>{took}"
    if row[value] is None:
        return f"{1e3 * row['seconds']:.3g} ms" if "seconds" in row else "–"
    if value == "ratio":
        return f"{row['ratio']:.2f}<br><small>{row['spread'][0]:.2f}–{row['spread'][1]:.2f}</small>"
    return f"{row[value]:.3g}" if row[value] < 1000 else f"{row[value]:.0f}"


def _draw(rows, path, columns, value):
    """Whether there was something to draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if value == "ratio":
        rows = [row for row in rows if row["ratio"] and row.get("right") and row["shape"] in PLOTTED]
        if rows:
            bench.plot(rows, str(path))
        return bool(rows)
    rows = [row for row in rows if row[value]]
    names = list(dict.fromkeys(row["what"] for row in rows))
    curves = [[(row[columns], row[value]) for row in rows if row["what"] == name] for name in names]
    if not all(isinstance(row[columns], (int, float)) for row in rows) or max(map(len, curves), default=0) < 3:
        return False
    x, y = ([[point[i] for point in curve] for curve in curves] for i in (0, 1))
    styles = [f"C{i % 10}{'o-' if name.startswith('kvattn') else 's:'}" for i, name in enumerate(names)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    plot.plot(x, y, columns, value, names, xscale="log", yscale="log", fmts=styles, axes=figure.subplots())
    figure.savefig(path)
    return True
