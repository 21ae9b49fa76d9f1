"""Pictures of any framework's arrays: heat maps, attention between tokens, kernels, curves.

Needs matplotlib, which the extra ``plot`` names, imported with the first picture. Each function returns its figure, made
through pyplot: ``plt.show()`` opens it in a script, a notebook shows it once, and without a display it can be saved.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvattn import api, checks, conversion, install, prepare, registry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["kernel_shapes", "plot", "set_figsize", "show_attention", "show_heatmaps", "use_svg_display"]

KERNELS = (api.gaussian_kernel, api.boxcar_kernel, api.triangular_kernel, api.epanechnikov_kernel, api.constant_kernel)
SMALL = 8  # points of a token in a grid of heat maps
LONGEST = 16  # letters shown of a token
ANNOTATED = 10  # rows and columns, at most, of a map with its values written in
WIDEST, BAR, GAP = 12.0, 0.9, 0.15  # inches: a figure of several heads, the room of its colour bar, between two heads


# ---- the pictures


def show_heatmaps(
    matrices: Any,
    xlabel: str,
    ylabel: str,
    titles: Sequence[str] | None = None,
    figsize: tuple[float, float] = (2.5, 2.5),
    cmap: Any = "Reds",
    *,
    queries: Sequence[Any] | None = None,
    keys: Sequence[Any] | None = None,
) -> Figure:
    """Matrices as a grid of heat maps that share one colour scale, from the least to the greatest value.

    Args:
        matrices: (rows, cols, n, m), any framework's array or nested lists; NaN and infinities are drawn grey.
        xlabel: what the columns of a matrix are, under the lowest row. ylabel: what its rows are.
        titles: one a column of the grid, repeated in each row.
        figsize: width and height of the whole figure, in inches.
        queries, keys: n and m tokens that label rows and columns, as in `show_attention`; where they would overlap, every
            second of them, or fewer.

    Raises:
        ValueError: another number of axes, an axis of 0, titles or tokens that do not fit them.
        TypeError: what is no array of numbers.
        ImportError: without matplotlib, saying how to install it.

    >>> show_heatmaps([[[[1.0, 0.0], [0.5, 0.5]]]], xlabel="Keys", ylabel="Queries").axes[0].images[0].get_array().shape
    (2, 2)

    Source: d2l's function of this name, whose colour bar tells the scale of the last matrix only.
    """
    pyplot = _pyplot()
    images = _array("matrices", matrices)
    if images.ndim != 4 or not images.size:
        cure = (
            f"; add the axes of the grid: matrices[{', '.join(['None'] * (4 - images.ndim))}]" if 2 <= images.ndim < 4 else ""
        )
        raise ValueError(f"matrices has shape {images.shape}; expected (rows, cols, n, m), none of them 0{cure}")
    rows, cols = images.shape[:2]
    if titles is not None:
        _count("titles", titles, cols, "one a column of the grid")
    n, m = images.shape[2:]
    named = (
        None if keys is None else _tokens("keys", keys, m, f"the columns of matrices (..., {n}, {m})"),
        None if queries is None else _tokens("queries", queries, n, f"the rows of matrices (..., {n}, {m})"),
    )
    figure, grid = pyplot.subplots(rows, cols, figsize=figsize, sharex=True, sharey=True, squeeze=False, layout="compressed")
    limits = _limits(images)
    for i, j in np.ndindex(rows, cols):
        image = _heat(grid[i, j], images[i, j], cmap, limits)
        if i == rows - 1:
            grid[i, j].set_xlabel(xlabel)
        if j == 0:
            grid[i, j].set_ylabel(ylabel)
        if titles is not None:
            grid[i, j].set_title(titles[j])
    for which, tokens, inches, count in zip("xy", named, figsize, (cols, rows), strict=True):
        for axes in grid.flat:
            axis = axes.xaxis if which == "x" else axes.yaxis
            if tokens is None:
                axis.get_major_locator().set_params(integer=True)
                continue
            every = math.ceil(1.3 * SMALL / 72 * len(tokens) * count / (0.7 * inches))  # 0.7: without what labels take
            _label(axis, tokens, every, axis.get_label_text(), rotation=90 if which == "x" else 0)
            axes.tick_params(axis=which, which="both", length=0, labelsize=SMALL)
            axes.grid(axis=which, which="minor", color="0.85", linewidth=0.5)
    flat = _flat(cols * images.shape[3], rows * images.shape[2])
    figure.colorbar(image, ax=grid, shrink=0.6, location="bottom" if flat else "right")
    return _once(figure)


def show_attention(
    weights: Any,
    queries: Sequence[Any],
    keys: Sequence[Any],
    *,
    titles: Sequence[str] | None = None,
    cmap: Any = "Blues",
    vmax: float | None = None,
    pages: bool | None = None,
) -> Any:
    """Attention weights between tokens, one heat map a head, side by side and wrapped into rows; made for 6 to 40 tokens.

    The weights of several layers, {name: weights} as `attention_maps` gives them, are pages to choose from in a notebook that
    has ipywidgets, a layer and a head at a time on one colour scale; elsewhere they are maps of one figure.

    Each row of a map is a query, each column a key it attends to. Up to 10 by 10, the weights stand in their cells. The
    figure is as large as its labels need to be read; past 47 tokens only every second token, or fewer, is labelled.

    Args:
        weights: (n, m), (heads, n, m) or (1, heads, n, m), any framework's array; NaN is drawn grey. Or {name: such}.
        queries: n tokens. keys: m tokens. Shown as they are, the first 16 letters of each.
        titles: one a head; default "head 1", "head 2", ...
        vmax: the weight at the top of the colour scale that the heads share; default the greatest. 1.0 makes figures
            comparable. The scale starts at 0, or at the least weight below.
        pages: True or False, with or without widgets for several layers; default: as said above.

    Returns the figure; of pages, the widget.

    Raises:
        ValueError: weights of another shape, tokens or titles that do not fit them.
        TypeError: what is no array of numbers, a string for a list of tokens.
        ImportError: without matplotlib, saying how to install it.

    >>> figure = show_attention([[1.0, 0.0], [0.25, 0.75]], ["the", "dog"], ["the", "dog"])
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['the', 'dog']
    """
    pyplot = _pyplot()
    if isinstance(weights, Mapping):
        layers = {str(name): _heads(each, f"weights[{name!r}]") for name, each in weights.items()}
        if not layers:
            raise ValueError("weights is empty; expected at least one layer's")
        if titles is not None:
            raise ValueError("titles are for one layer's heads; weights of several have their names")
        highest = max(_limits(maps)[1] for maps in layers.values()) if vmax is None else vmax
        if pages if pages is not None else _has_widgets():
            return _pages(layers, queries, keys, cmap, highest)
        first, *others = layers
        for name in others:
            checks.same_shape(f"a map of weights[{name!r}]", layers[name][0], layers[first].shape[1:], f"weights[{first!r}]")
        titles = [f"{name}, head {i}" for name, maps in layers.items() for i in range(1, len(maps) + 1)]
        weights, vmax = np.concatenate([*layers.values()]), highest
    maps = _heads(weights)
    heads, n, m = maps.shape
    rows_named = _tokens("queries", queries, n, f"the queries of weights (..., {n}, {m})")
    columns_named = _tokens("keys", keys, m, f"the keys of weights (..., {n}, {m})")
    if titles is None:
        titles = [f"head {i + 1}" for i in range(heads)] if heads > 1 else [""]
    _count("titles", titles, heads, "one a head")
    low, greatest = _limits(maps)
    low, high = min(low, 0.0), greatest if vmax is None else checks.number("vmax", vmax)
    if high <= low:
        raise ValueError(f"vmax must be above {low}, where the colour scale starts; got {high}")

    sizes = _Sizes.of(maps.shape, max(map(len, rows_named)), max(map(len, columns_named)), titled=any(titles))
    rows, cols = sizes.grid
    figure, grid = pyplot.subplots(rows, cols, figsize=sizes.figure, squeeze=False, layout="compressed")
    figure.get_layout_engine().set(w_pad=GAP / 2, h_pad=GAP / 2)
    every = math.ceil(1.3 * sizes.points / 72 / sizes.cell)  # 1, unless neighbouring labels would overlap
    for i, axes in enumerate(grid.flat):
        if i >= heads:
            axes.remove()
            continue
        image = _heat(axes, maps[i], cmap, (low, high))
        axes.set_aspect((sizes.map[1] / n) / (sizes.map[0] / m))
        axes.set_title(titles[i], fontsize=max(sizes.points + 1, 9))
        axes.tick_params(which="both", length=0, labelsize=sizes.points)
        _label(axes.xaxis, columns_named, every, "key" if i + cols >= heads else None, rotation=90 if sizes.turned else 0)
        _label(axes.yaxis, rows_named, every, "query" if i % cols == 0 else None, rotation=0)
        axes.grid(which="minor", color="0.85", linewidth=0.5)
        if max(n, m) <= ANNOTATED:
            _write_values(axes, image, sizes.points - 1)
    figure.colorbar(
        image, ax=figure.axes, label="attention weight", location="bottom" if sizes.flat else "right",
        shrink=min(1.0, 4 / sizes.beside_bar), aspect=min(sizes.beside_bar, 4) / 0.13,
        extend="max" if greatest > high else "neither",
    )  # fmt: skip
    return _once(figure)


class _Sizes(NamedTuple):
    """How large the parts of a figure of attention are, in inches: wide and high; letters are in points."""

    cell: float
    map: tuple[float, float]
    points: float  # of the tokens
    turned: bool  # whether those below a map stand upright
    grid: tuple[int, int]  # rows and columns of maps
    flat: bool  # whether the colour bar lies below the maps, not beside them
    beside_bar: float  # how long the maps are along it
    figure: tuple[float, float]

    @classmethod
    def of(cls, shape: tuple[int, int, int], beside: int, below: int, titled: bool) -> _Sizes:
        """For maps (heads, n, m), with tokens of so many letters at most beside and below them."""
        heads, n, m = shape
        cell = min(max((3.6 if heads == 1 else 2.4) / max(n, m), 0.13), 0.45 if heads == 1 else 0.38, 6 / max(n, m))
        width, height = max(m * cell, 0.6), max(n * cell, 0.6)
        points = min(max(40 * cell, 7), 10)
        letter = points / 72 * 0.62
        turned = below * letter > width / m
        left, bottom = beside * letter + 0.4, (below if turned else 2) * letter + 0.4
        cols = min(heads, max(2, int((WIDEST - left - BAR) / (width + GAP))))
        rows = math.ceil(heads / cols)
        cols = math.ceil(heads / rows)  # as many in each row
        flat = _flat(cols * width, rows * height) or rows * height < 1.2
        across, down = cols * (width + GAP), rows * (height + GAP + 0.3 * titled)
        figure = max(left + across + (0 if flat else BAR), 2), bottom + down + (BAR if flat else 0)
        return cls(cell, (width, height), points, turned, (rows, cols), flat, across if flat else down, figure)


def kernel_shapes(kernels: Any = None, width: float = 1.0) -> Figure:
    """Kernels side by side: what each gives a key at every distance from the query.

    Args:
        kernels: functions (query (n, 1), key (1, 1)) -> (n, 1), kvattn's or others, given arrays of the backend that
            serves neutral data; or, as d2l's, of one argument, the differences (n,). Default kvattn's five. Bind parameters
            with functools.partial.
        width: the width given to kernels that have one and no bound one.

    Raises ValueError for a width that is not above 0 and results of another shape, ImportError without matplotlib.

    >>> [axes.get_title() for axes in kernel_shapes([api.boxcar_kernel, api.epanechnikov_kernel]).axes]
    ['boxcar', 'epanechnikov']
    """
    pyplot = _pyplot()
    width = checks.number("width", width, positive=True)
    kernels = KERNELS if kernels is None else [kernels] if callable(kernels) else list(kernels)
    if not kernels:
        raise ValueError("kernels is empty; expected at least one function (query, key) -> similarities")
    x = np.linspace(-2.5 * width, 2.5 * width, 1001)  # odd: the peak is one of them
    curves = [_similarities(f"kernels[{i}]", kernel, x, width) for i, kernel in enumerate(kernels)]
    figure, grid = pyplot.subplots(
        1, len(kernels), figsize=(1.9 * len(kernels) + 0.4, 2.2), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for kernel, curve, axes in zip(kernels, curves, grid.flat, strict=True):
        axes.plot(x, curve)
        axes.set_title(_name(kernel))
        axes.set_xlabel("distance")
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("similarity")
    return _once(figure)


def plot(
    X: Any,
    Y: Any = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    legend: Sequence[str] | None = None,
    xlim: Any = None,
    ylim: Any = None,
    xscale: str = "linear",
    yscale: str = "linear",
    fmts: Sequence[str] = ("-", "m--", "g-.", "r:"),
    figsize: tuple[float, float] = (3.5, 2.5),
    axes: Axes | None = None,
) -> Figure:
    """Curves, one or several, in a new figure or on ``axes``, which is cleared first.

    Args:
        X: (m,), shared by the curves, or one (m,) a curve: (curves, m) or a list. Any framework's arrays, or lists.
        Y: the same; without it, X is drawn over 0, 1, 2, ...
        legend: a name a curve. fmts: matplotlib's formats, used again from the first after the last.
        xlim, ylim, xscale, yscale: matplotlib's.
        figsize: width and height of a new figure, in inches.

    Raises:
        ValueError: curves of another number of axes, or whose X and Y are of different lengths or numbers.
        TypeError: what is no array of numbers.
        ImportError: without matplotlib, saying how to install it.

    >>> [len(line.get_xdata()) for line in plot([0.0, 1.0, 2.0], [[1.0, 2.0, 4.0], [1.0, 3.0, 9.0]]).axes[0].lines]
    [3, 3]

    Source: d2l's function of this name, which changes the size of all later figures and drops curves past the fourth.
    """
    pyplot = _pyplot()
    xs = _curves("X", X)
    if Y is None:
        xs, ys = [np.arange(len(y)) for y in xs], xs
    else:
        ys = _curves("Y", Y)
    if len(xs) == 1:
        xs = xs * len(ys)
    if len(xs) != len(ys):
        raise ValueError(f"X has {len(xs)} curves and Y {len(ys)}; expected one X, or one for each Y")
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if len(x) != len(y):
            raise ValueError(f"curve {i} has {len(x)} points in X and {len(y)} in Y; expected as many")
    if axes is None:
        axes = pyplot.subplots(figsize=figsize, layout="constrained")[1]
    axes.cla()
    for x, y, fmt in zip(xs, ys, cycle(fmts), strict=False):
        axes.plot(x, y, fmt)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale, xlim=xlim, ylim=ylim)
    if legend:
        axes.legend(legend)
    axes.grid()
    return _once(axes.figure)


def use_svg_display() -> None:
    """Show this notebook's figures as SVG; does nothing outside a notebook.

    >>> use_svg_display()

    Source: d2l's function of this name, which outside IPython starts a shell.
    """
    if _shell() is not None:
        import_module("matplotlib_inline.backend_inline").set_matplotlib_formats("svg")


def set_figsize(figsize: tuple[float, float] = (3.5, 2.5)) -> None:
    """The size in inches of later figures that are given none, and `use_svg_display`.

    >>> set_figsize((4.0, 3.0))

    Source: d2l's function of this name.
    """
    use_svg_display()
    _pyplot().rcParams["figure.figsize"] = figsize


# ---- arguments


def _array(name: str, x: Any) -> Any:
    """``x``, any framework's array or nested lists that may hold such, as a float64 NumPy array."""
    if registry.home(x) is not None:
        x = api.to_numpy(x)
    elif _nested(x):
        parts = [_array(f"{name}[{i}]", each) for i, each in enumerate(x)]
        for i, part in enumerate(parts):
            checks.same_shape(f"{name}[{i}]", part, parts[0].shape, f"{name}[0]")
        return np.stack(parts)
    made = np.asarray(x)
    if conversion.dtype_name(made) not in (*conversion.FLOATS, *conversion.INTEGERS, "bool"):
        raise TypeError(f"{name} must be an array of real numbers, not {type(x).__name__} of dtype {made.dtype}")
    return made.astype(np.float64)


def _nested(x: Any) -> bool:
    """Whether ``x`` is a list of lists or arrays."""
    return isinstance(x, (list, tuple)) and any(isinstance(each, (list, tuple)) or hasattr(each, "shape") for each in x)


def _heads(weights: Any, name: str = "weights") -> Any:
    """The weights as (heads, n, m)."""
    given = _array(name, weights)
    maps = given[0] if given.ndim == 4 and len(given) == 1 else given[None] if given.ndim == 2 else given
    if maps.ndim != 3 or not maps.size:
        cure = f"; pick one of the batch: {name}[0]" if maps.ndim == 4 else ""
        raise ValueError(
            f"{name} has shape {given.shape}; expected (n, m), (heads, n, m) or (1, heads, n, m), none of them 0{cure}"
        )
    return maps


def _curves(name: str, x: Any) -> list[Any]:
    """One array (m,) a curve."""
    parts = [_array(f"{name}[{i}]", each) for i, each in enumerate(x)] if _nested(x) else [_array(name, x)]
    if _nested(x) and all(part.ndim == 0 for part in parts):  # a list of numbers, some of them a framework's
        parts = [np.stack(parts)]
    elif len(parts) == 1 and parts[0].ndim == 2:
        parts = list(parts[0])
    if not parts or any(part.ndim != 1 for part in parts):
        raise ValueError(f"{name} must be a curve (m,) or several: (curves, m), or a list of them")
    return parts


def _tokens(name: str, tokens: Sequence[Any], count: int, why: str) -> list[str]:
    """The tokens as labels: printable, of at most 16 letters."""
    if isinstance(tokens, str):
        raise TypeError(f"{name} must be a list of tokens, not a string; split it: {name}.split()")
    _count(name, tokens, count, why)
    # line breaks and the like would tear the labels apart
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in str(token)) for token in tokens]
    return [token if len(token) <= LONGEST else token[: LONGEST - 1] + "…" for token in shown]


def _count(name: str, given: Sequence[Any], expected: int, why: str) -> None:
    if len(given) != expected:
        raise ValueError(f"{name} has {len(given)} entries; expected {expected}, {why}")


def _limits(values: Any) -> tuple[float, float]:
    """The ends of the colour scale: the least and the greatest finite value; with 0 where they are one."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < high:
        return low, high
    return (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)


def _similarities(name: str, kernel: Callable[..., Any], x: Any, width: float) -> Any:
    """The kernel at distances ``x``, (n,)."""
    if prepare.takes_one(kernel):  # as d2l's
        made = _array(name, kernel(api.asarray(x)))
        checks.same_shape(name, made, (len(x),), "the similarities at differences (n,)")
        return made.astype(float)
    named = {"width": width} if "width" in inspect.signature(kernel).parameters else {}
    named |= getattr(kernel, "keywords", {})
    pair = x[:, None], np.zeros((1, 1))
    own = prepare.unwrapped(_function(kernel))
    if not any(own is each for each in prepare.tabbed):  # kvattn's take neutral data
        pair = api.asarray(pair[0]), api.asarray(pair[1])
    made = _array(name, kernel(*pair, **named))
    checks.same_shape(name, made, (len(x), 1), "the similarities of queries (n, 1) and a key (1, 1)")
    return made[:, 0]


def _function(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return kernel.func if isinstance(kernel, partial) else kernel


def _name(kernel: Callable[..., Any]) -> str:
    """What to call a kernel, with what is bound to it."""
    parameters = [f"{name} {x:g}" for name, x in getattr(kernel, "keywords", {}).items() if isinstance(x, (int, float))]
    return "\n".join([getattr(_function(kernel), "__name__", "kernel").removesuffix("_kernel"), *parameters])


# ---- drawing


def _heat(axes: Axes, matrix: Any, cmap: Any, limits: tuple[float, float]) -> AxesImage:
    axes.set_facecolor("0.75")  # seen where a value is not finite: imshow masks it
    return axes.imshow(matrix, cmap=cmap, vmin=limits[0], vmax=limits[1])


def _flat(width: float, height: float) -> bool:
    """Whether the colour bar goes below: beside a flat picture it would be too short to read."""
    return width > 2 * height


def _label(axis: Any, tokens: list[str], every: int, title: str | None, rotation: int) -> None:
    """Lines between the cells and, if the axis has a title (is on the edge of the grid), its tokens."""
    axis.set_ticks(np.arange(len(tokens) + 1) - 0.5 if every == 1 else [], minor=True)  # the lines between cells
    if title is None:
        axis.set_ticks([])
        return
    axis.set_label_text(title)
    axis.set_ticks(range(0, len(tokens), every), tokens[::every], rotation=rotation, parse_math=False)  # a token may be "$"


def _write_values(axes: Axes, image: AxesImage, size: float) -> None:
    """Each value in its cell, in black or white, whichever is the further from the cell's colour."""
    values: Any = image.get_array()
    for i, j in np.argwhere(~np.ma.getmaskarray(values)):
        value = values[i, j]
        colour = "black" if _luminance(image.to_rgba(value)) > 0.179 else "white"  # where the two contrasts meet
        text = f"{value:z.2f}" if abs(value) < 10 else f"{value:.3g}"
        axes.text(j, i, text, color=colour, ha="center", va="center", fontsize=size)


def _luminance(rgba: Any) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


# ---- matplotlib and notebooks


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ModuleNotFoundError(f"kvattn.plot needs matplotlib, which is not installed: {install.line('plot')}") from error
    return pyplot


def _shell() -> Any:
    """The notebook's IPython shell, or None; starts none and imports none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None


def _has_widgets() -> bool:
    """Whether widgets can be used: in a notebook, and not in a lesson that is run for a page."""
    return _shell() is not None and "kvattn.lesson.watch" not in sys.modules and find_spec("ipywidgets") is not None


def _pages(layers: dict[str, Any], queries: Sequence[Any], keys: Sequence[Any], cmap: Any, vmax: float) -> Any:
    """A widget that shows one layer's heads, or one of them."""
    import ipywidgets
    from IPython.display import display

    def heads(name: str) -> list[Any]:
        return ["all", *range(1, len(layers[name]) + 1)]

    layer = ipywidgets.Dropdown(options=[*layers], description="layer")
    head = ipywidgets.Dropdown(options=heads(layer.value), description="head")

    def show(layer: str, head: Any) -> None:
        maps = layers[layer]
        if head is None or (head != "all" and head > len(maps)):  # the other choice is about to follow
            return
        chosen, titles = (maps, None) if head == "all" else (maps[head - 1], [f"head {head}"])
        figure = show_attention(chosen, queries, keys, titles=titles, cmap=cmap, vmax=vmax)
        display(figure)
        _pyplot().close(figure)

    layer.observe(lambda change: head.set_trait("options", heads(change["new"])), "value")
    shown = ipywidgets.interactive_output(show, {"layer": layer, "head": head})
    return ipywidgets.VBox([ipywidgets.HBox([layer, head]), shown])


def _once(figure: Any) -> Figure:
    """The figure, which a notebook shows once: at the end of its cell, or before, if it is what the cell returns."""
    if _shell() is not None:
        vars(figure)["_ipython_display_"] = partial(_display, figure)  # IPython's own protocol
    shown: Figure = figure
    return shown


def _display(figure: Any) -> None:
    """What IPython calls to show a figure of ours: takes it, and ours before it, off the list of those to show yet."""
    pyplot = _pyplot()
    inline = sys.modules.get("matplotlib_inline.backend_inline")
    config = inline.InlineBackend.instance() if inline is not None and "inline" in pyplot.get_backend() else None
    configured = config is not None and config.shell is not None and config.close_figures
    if configured and getattr(figure, "number", None) in pyplot.get_fignums():
        for earlier in map(pyplot.figure, [n for n in pyplot.get_fignums() if n < figure.number]):
            if hasattr(earlier, "_ipython_display_"):
                sys.modules["IPython"].display.display(earlier)
        pyplot.close(figure)
    raise NotImplementedError  # so IPython goes on to show it, as any figure
