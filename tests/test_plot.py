"""The pictures: by matplotlib's own comparison on NumPy, the numbers in them on every backend; scripts and notebooks.

`python tests/test_plot.py` draws the baselines again.
"""

import inspect
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import nbclient
import nbformat
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.testing.compare import compare_images
from matplotlib.testing.decorators import remove_ticks_and_titles
from matplotlib.text import Text

import kvattn
from kvattn import plot, text
from kvattn.conformance import known_differences
from kvattn.conformance.cases import DTYPES

BASELINE = Path(__file__).parent / "baseline"
WORDS = text.tokenize(
    "When he saw his owner, the dog was happy, so he wagged his tail. Afterwards internationalization "
    "committees extraordinarily disagreed about $100 and antidisestablishmentarianism because nobody "
    "whom they had asked could say at once what was meant."
)
GRID = np.array([[[[9.0, 1, 2], [3, 4, 5], [6, 7, 8]], [[1, 8, 3], [2, 5, 0], [7, 4, 6]]]]) / 8  # exact in bfloat16
WEIGHTS = np.array([[0.75, 0.125, 0.125, 0], [0.125, 0.5, 0.25, 0.125], [0.25] * 4, [0, 0, 0.0625, 0.9375]])
HEADS = np.stack([WEIGHTS, WEIGHTS.T])


@pytest.fixture(autouse=True)
def _style():
    mpl.use("agg")
    with mpl.rc_context():
        mpl.rcdefaults()
        yield
    plt.close("all")


# ---- pictures


def heatmaps(grid=GRID, **options):
    return plot.show_heatmaps(grid, "Keys", "Queries", titles=["a", "b"], figsize=(4, 2), **options)


def attention(heads=HEADS, **options):
    return plot.show_attention(heads, WORDS[:4], WORDS[:4], **options)


def curves(slope=3.0):
    return plot.plot(np.arange(5.0), [np.arange(5.0) ** 2, slope * np.arange(5.0)], "x", "y")


PICTURES = {"heatmaps": heatmaps, "attention": attention, "kernel_shapes": plot.kernel_shapes, "plot": curves}
TOLERANCE = 1  # RMS of 255; matplotlib 3.8 to 3.11 differ by 0, the least change below by 2.6


def save(figure, path):
    """The figure without its text, which matplotlib's releases draw and lay out differently, its maps on whole pixels."""
    remove_ticks_and_titles(figure)
    for label in figure.findobj(Text):
        label.set_visible(False)
    figure.set_layout_engine("none")
    if figure.axes[0].images:
        figure.set_size_inches(4, 1.5)
        for i, axes in enumerate(figure.axes):  # 96 pixels: nothing is interpolated between cells
            axes.set_position([(8 + 100 * i) / 320, 12 / 120, 96 / 320, 96 / 120])
    figure.savefig(path, dpi=80)
    return path


def differ(name, figure, folder):
    """What matplotlib says against the figure; None if nothing."""
    return compare_images(str(BASELINE / f"{name}.png"), str(save(figure, folder / f"{name}.png")), TOLERANCE)


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_the_baseline(name, tmp_path):
    assert differ(name, PICTURES[name](), tmp_path) is None


SWAPPED, HEADS_SWAPPED, DARKER = GRID.copy(), HEADS.copy(), GRID.copy()
SWAPPED[0, 0, 1, [0, 1]] = GRID[0, 0, 1, [1, 0]]
HEADS_SWAPPED[0, 1, [2, 3]] = HEADS[0, 1, [3, 2]]
DARKER[0, 0, 0, 0] += 1 / 8
CHANGES = {
    "two neighbours swapped": ("heatmaps", partial(heatmaps, SWAPPED)),
    "two weights swapped": ("attention", partial(attention, HEADS_SWAPPED)),
    "transposed": ("heatmaps", partial(heatmaps, GRID.swapaxes(2, 3))),
    "the greatest one higher, so the scale": ("heatmaps", partial(heatmaps, DARKER)),
    "the top of the scale": ("attention", partial(attention, vmax=1.0)),
    "the colours": ("heatmaps", partial(heatmaps, cmap="Blues")),
    "the kernels' width": ("kernel_shapes", partial(plot.kernel_shapes, width=1.1)),
    "a curve": ("plot", partial(curves, 3.1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_small_change_is_no_longer_the_baseline(change, tmp_path):
    name, draw = CHANGES[change]
    assert "RMS Value" in differ(name, draw(), tmp_path)


# ---- the numbers in the pictures, on every backend


def images(figure):
    """The matrices that a figure shows, without its colour bar."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def dtypes(backend):
    return [dtype for dtype in DTYPES if known_differences.difference(backend, dtype, "plot", "plot") is None]


def test_heat_maps_show_any_frameworks_arrays(backend):
    for dtype in dtypes(backend):
        matrices = kvattn.asarray(GRID, dtype=dtype, backend=backend)
        np.testing.assert_array_equal(images(heatmaps(matrices)), GRID[0], err_msg=dtype)
        np.testing.assert_array_equal(images(heatmaps([[matrices[0, 0], matrices[0, 1]]])), GRID[0], err_msg=dtype)


def test_attention_shows_any_frameworks_arrays_of_two_three_and_four_axes(backend):
    for dtype in dtypes(backend):
        weights = kvattn.asarray(HEADS, dtype=dtype, backend=backend)
        np.testing.assert_array_equal(images(attention(weights)), HEADS)
        np.testing.assert_array_equal(images(attention(weights[None])), HEADS)
        np.testing.assert_array_equal(images(attention(weights[0])), HEADS[:1])
        np.testing.assert_array_equal(images(attention([weights[0], HEADS[1]])), HEADS)


def test_curves_show_any_frameworks_arrays(backend):
    for dtype in dtypes(backend):
        x = kvattn.asarray([0.0, 0.5, 1.0], dtype=dtype, backend=backend)
        (axes,) = plot.plot(x, [x, [2.0, 3.0, 4.0]]).axes
        np.testing.assert_array_equal([line.get_xdata() for line in axes.lines], [[0, 0.5, 1]] * 2)
        np.testing.assert_array_equal([line.get_ydata() for line in axes.lines], [[0, 0.5, 1], [2, 3, 4]])


def test_kernels_are_those_of_the_backend_that_is_used(backend, tab):
    def mine(query, key):
        assert tab.is_array(query)
        return kvattn.epanechnikov_kernel(query, key, 2.0)

    with kvattn.use_backend(backend):
        figure = plot.kernel_shapes([*plot.KERNELS, mine], width=2.0)
    u = np.abs(figure.axes[0].lines[0].get_xdata()) / 2
    epanechnikov = np.maximum(1 - u**2, 0)
    expected = [np.exp(-(u**2) / 2), u < 1, np.maximum(1 - u, 0), epanechnikov, np.ones_like(u), epanechnikov]
    found = [axes.lines[0].get_ydata() for axes in figure.axes]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert u.max() == 2.5


def test_every_namespace_draws(backend):
    namespace = __import__(f"kvattn.{backend}", fromlist=["show_heatmaps"])
    for name in plot.__all__:
        assert getattr(namespace, name) is getattr(plot, name)


# ---- heat maps


def test_show_heatmaps_has_d2ls_signature():
    found = inspect.signature(plot.show_heatmaps).parameters
    given = {name: parameter.default for name, parameter in found.items() if parameter.kind != parameter.KEYWORD_ONLY}
    empty = inspect.Parameter.empty
    assert given == {
        "matrices": empty, "xlabel": empty, "ylabel": empty, "titles": None, "figsize": (2.5, 2.5), "cmap": "Reds",
    }  # fmt: skip
    assert list(inspect.signature(plot.plot).parameters) == [
        "X", "Y", "xlabel", "ylabel", "legend", "xlim", "ylim", "xscale", "yscale", "fmts", "figsize", "axes",
    ]  # fmt: skip


def test_labels_stand_on_the_edge_and_titles_on_each_map():
    figure = plot.show_heatmaps(np.arange(24.0).reshape(2, 2, 2, 3), "Keys", "Queries", titles=["a", "b"], figsize=(3, 4))
    maps = figure.axes[:4]
    assert [axes.get_xlabel() for axes in maps] == ["", "", "Keys", "Keys"]
    assert [axes.get_ylabel() for axes in maps] == ["Queries", "", "Queries", ""]
    assert [axes.get_title() for axes in maps] == ["a", "b"] * 2
    assert tuple(figure.get_size_inches()) == (3, 4)


def test_maps_share_one_colour_scale_and_what_is_not_finite_is_masked():
    matrices = np.arange(8.0).reshape(1, 2, 2, 2)
    matrices[0, 0, 0, 0], matrices[0, 1, 1, 1] = np.nan, -np.inf
    figure = plot.show_heatmaps(matrices, "x", "y")
    assert [axes.images[0].get_clim() for axes in figure.axes[:2]] == [(1, 6)] * 2
    assert [axes.images[0].get_array().mask.sum() for axes in figure.axes[:2]] == [1, 1]
    assert len(figure.axes) == 3  # one colour bar


@pytest.mark.parametrize(("value", "scale"), [(0.25, (0, 0.25)), (-2.0, (-2, 0)), (0.0, (0, 1)), (np.nan, (0, 1))])
def test_a_constant_has_a_scale_with_0_in_it(value, scale):
    assert plot.show_heatmaps(np.full((1, 1, 2, 2), value), "x", "y").axes[0].images[0].get_clim() == scale


def test_ticks_are_whole_numbers():
    figure = plot.show_heatmaps(np.eye(3)[None, None], "x", "y", figsize=(6, 6))
    figure.draw_without_rendering()
    (axes, _) = figure.axes
    assert all(tick % 1 == 0 for tick in (*axes.get_xticks(), *axes.get_yticks()))


@pytest.mark.parametrize("shape", [(2, 10), (10, 2), (10, 10), (1, 1)])
def test_the_colour_bar_is_long_enough_to_read(shape):
    named = [WORDS[:size] for size in shape]
    for figure in (plot.show_heatmaps(np.ones((1, 1, *shape)), "x", "y"), plot.show_attention(np.ones(shape), *named)):
        figure.draw_without_rendering()
        bar = figure.axes[-1].get_window_extent()
        assert max(bar.width, bar.height) >= 0.6 * figure.dpi  # three tick labels beside each other


def test_the_callers_arrays_are_not_written_to():
    grid, heads = GRID.copy(), HEADS.copy()
    heatmaps(grid), attention(heads)
    np.testing.assert_array_equal(grid, GRID)
    np.testing.assert_array_equal(heads, HEADS)


# ---- attention between tokens


def drawn_labels(axis):
    """The boxes, in pixels, of the tick labels that are drawn along an axis."""
    return [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("count", [1, 6, 12, 24, 40])
def test_labels_are_read_at_any_size(count, heads):
    """Every token labelled, in 7 points at least, no label on another or outside the figure, and at most 13 inches wide."""
    weights = np.random.default_rng(0).dirichlet(np.ones(count), (heads, count))
    figure = plot.show_attention(weights, WORDS[:count], WORDS[:count])
    figure.draw_without_rendering()
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == heads
    left = [axes for axes in maps if axes.get_ylabel()]
    lowest = [axes for axes in maps if axes.get_xlabel()]
    assert len(left) * len(lowest) == heads
    for axis, along in [(axes.yaxis, "y") for axes in left] + [(axes.xaxis, "x") for axes in lowest]:
        boxes = sorted(drawn_labels(axis), key=lambda box: getattr(box, f"{along}0"))
        assert len(boxes) == count
        assert all(getattr(a, f"{along}1") <= getattr(b, f"{along}0") + 0.5 for a, b in pairwise(boxes))
        assert all(label.get_fontsize() >= 7 for label in axis.get_ticklabels())
    drawn, inches = figure.get_tightbbox(), figure.bbox_inches
    assert min(drawn.x0, drawn.y0, inches.x1 - drawn.x1, inches.y1 - drawn.y1) > -0.02
    boxes = [axes.get_window_extent() for axes in maps]
    titles = [axes.title.get_window_extent() for axes in maps if axes.get_title()]
    assert not any(title.overlaps(box) for title in titles for box in boxes)
    assert figure.get_size_inches()[0] <= 13
    cell = maps[0].get_window_extent()
    assert cell.width / count >= 0.1 * figure.dpi
    assert cell.height / count >= 0.1 * figure.dpi


@pytest.mark.parametrize("shape", [(1, 40), (40, 1)])
def test_one_query_or_one_key_is_half_an_inch_at_least(shape):
    n, m = shape
    figure = plot.show_attention(np.full(shape, 1 / m), WORDS[:n], WORDS[:m])
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    assert min(box.width, box.height) >= 0.5 * figure.dpi


def test_past_47_tokens_some_are_labelled():
    names = [f"token{i}" for i in range(100)]
    figure = plot.show_attention(np.full((100, 100), 0.01), names, names)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == names[:: 100 // len(shown) + 1]
    assert 20 < len(shown) < 50


def test_tokens_are_shown_as_they_are_but_for_what_tears_a_label():
    tokens = ["$x$", "a\nb", "_^{", "internationalization", 7, ""]
    figure = plot.show_attention(np.eye(6), tokens, tokens)
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["$x$", "a\\nb", "_^{", "internationaliz…", "7", ""]
    assert not any(label.get_parse_math() for label in labels)
    figure.draw_without_rendering()


def test_heads_are_titled_and_one_head_is_not():
    assert [axes.get_title() for axes in attention().axes[:2]] == ["head 1", "head 2"]
    assert attention(WEIGHTS).axes[0].get_title() == ""
    assert [axes.get_title() for axes in attention(titles=["near", "far"]).axes[:2]] == ["near", "far"]


def contrast(a, b):
    """WCAG 2's contrast of two colours, 1 to 21."""

    def luminance(colour):
        rgb = np.array(mpl.colors.to_rgb(colour))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("cmap", ["Blues", "viridis", "Reds"])
def test_values_are_written_in_small_maps_with_contrast(cmap):
    weights = np.linspace(-1e-4, 1, 100).reshape(10, 10)
    weights[0, 1] = np.nan
    axes = plot.show_attention(weights, WORDS[:10], WORDS[:10], cmap=cmap).axes[0]
    texts = {(int(y), int(x)): value for value in axes.texts for x, y in [value.get_position()]}
    assert len(texts) == 99
    assert texts[0, 0].get_text() == "0.00"
    assert texts[9, 9].get_text() == "1.00"
    for (i, j), value in texts.items():
        assert value.get_text() == f"{weights[i, j]:z.2f}"
        assert contrast(value.get_color(), axes.images[0].to_rgba(weights[i, j])[:3]) >= 4.5
    assert not plot.show_attention(np.eye(11), WORDS[:11], WORDS[:11]).axes[0].texts


@pytest.mark.parametrize(
    ("weights", "vmax", "scale"),
    [
        ([[0.25, 0.75]], None, (0, 0.75)),
        ([[0.25, 0.75]], 1.0, (0, 1)),
        ([[0.25, 0.25]], None, (0, 0.25)),
        ([[-0.5, 1.5]], None, (-0.5, 1.5)),
        ([[0.0, np.nan]], None, (0, 1)),
        ([[0.25, 0.75]], 0.5, (0, 0.5)),
    ],
)
def test_the_scale_starts_at_0_and_is_stated(weights, vmax, scale):
    figure = plot.show_attention(weights, ["a"], ["b", "c"], vmax=vmax)
    assert figure.axes[0].images[0].get_clim() == scale
    bar = figure.axes[-1]
    assert figure.axes[0].images[0].colorbar.extend == ("max" if vmax == 0.5 else "neither")  # an arrow: there is more
    assert "attention weight" in (bar.get_xlabel(), bar.get_ylabel())


def test_heat_maps_have_tokens_as_labels_where_they_are_given():
    tokens = ["the", "$x$", "_^{"]
    figure = plot.show_heatmaps(np.ones((2, 2, 3, 3)), "Keys", "Queries", figsize=(6, 6), keys=tokens, queries=tokens[::-1])
    figure.draw_without_rendering()
    for i, axes in enumerate(figure.axes[:4]):
        columns, rows = axes.get_xticklabels(), axes.get_yticklabels()
        assert [each.get_text() for each in columns] == (tokens if i > 1 else [])  # of the lowest row of maps
        assert [each.get_text() for each in rows] == (tokens[::-1] if i % 2 == 0 else [])
        assert not any(each.get_parse_math() for each in (*columns, *rows))
        assert axes.get_xlabel() == ("Keys" if i > 1 else "")
        assert axes.get_ylabel() == ("Queries" if i % 2 == 0 else "")
    many = plot.show_heatmaps(np.ones((1, 1, 40, 40)), "x", "y", keys=range(40))
    many.draw_without_rendering()
    boxes = [each.get_window_extent() for each in many.axes[0].get_xticklabels()]
    assert 3 < len(boxes) < 20
    assert not any(one.overlaps(two) for one, two in pairwise(boxes))
    assert many.axes[0].get_yticklabels()[0].get_text() != ""


# ---- layers as pages


LAYERS = {"first": np.stack([np.eye(3), np.ones((3, 3)) / 4]), "second": np.full((1, 1, 3, 3), 0.5)}


def test_layers_are_maps_of_one_figure_on_one_scale_where_there_are_no_widgets():
    figure = plot.show_attention(LAYERS, ["a", "b", "c"], list("xyz"))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["first, head 1", "first, head 2", "second, head 1"]
    assert {axes.images[0].get_clim() for axes in figure.axes[:3]} == {(0, 1)}
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), np.full((3, 3), 0.5))


def test_layers_are_pages_of_a_widget(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets")
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    widget = plot.show_attention(LAYERS, list("abc"), list("xyz"), pages=True)
    assert isinstance(widget, ipywidgets.Widget)
    layer, head = widget.children[0].children
    assert (layer.options, head.options) == (("first", "second"), ("all", 1, 2))
    head.value = 2
    layer.value = "second"
    assert head.options == ("all", 1)
    titles = [[axes.get_title() for axes in figure.axes[:-1]] for figure in shown]
    assert titles[0] == ["head 1", "head 2"]
    assert ["head 2"] in titles
    assert titles[-1] == [""]
    assert {axes.images[0].get_clim() for figure in shown for axes in figure.axes[:-1]} == {(0, 1)}
    assert not plt.get_fignums()


# ---- kernels and curves


def test_kernels_are_named_with_what_is_bound_to_them():
    figure = plot.kernel_shapes([partial(kvattn.gaussian_kernel, width=0.5), kvattn.boxcar_kernel], width=2.0)
    assert [axes.get_title() for axes in figure.axes] == ["gaussian\nwidth 0.5", "boxcar"]
    x, y = figure.axes[0].lines[0].get_data()
    np.testing.assert_allclose(y, np.exp(-((x / 0.5) ** 2) / 2))
    assert plot.kernel_shapes(kvattn.boxcar_kernel).axes[0].get_title() == "boxcar"


@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        (([1, 4, 9],), [([0, 1, 2], [1, 4, 9])]),
        (([[1, 4], [2, 3, 5]],), [([0, 1], [1, 4]), ([0, 1, 2], [2, 3, 5])]),
        ((np.ones((2, 3)),), [([0, 1, 2], [1, 1, 1])] * 2),
        (([1.0, 2.0], [3.0, 4.0]), [([1, 2], [3, 4])]),
        (([1.0, np.array(2.0)], (3.0, 4.0)), [([1, 2], [3, 4])]),
        (([np.array([1.0, 2.0])], [np.array([[3.0, 4.0]])]), [([1, 2], [3, 4])]),
        (([1.0, 2.0], [[3.0, 4.0], [5.0, 6.0]]), [([1, 2], [3, 4]), ([1, 2], [5, 6])]),
        (([[1.0], [1.0, 2.0]], [[3.0], [4.0, 5.0]]), [([1], [3]), ([1, 2], [4, 5])]),
    ],
)
def test_plot_takes_one_curve_or_several(arguments, drawn):
    lines = plot.plot(*arguments).axes[0].lines
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in lines] == drawn


def test_plot_sets_what_it_is_told_and_draws_the_fifth_curve():
    figure = plot.plot([1, 2], np.ones((5, 2)), "x", "y", list("abcde"), (1, 3), (0.5, 2), "log", "log", figsize=(5, 3))
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xlim(), axes.get_ylim()) == ("x", "y", (1, 3), (0.5, 2))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [name.get_text() for name in axes.get_legend().get_texts()] == list("abcde")
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-.", ":", "-"]
    assert tuple(figure.get_size_inches()) == (5, 3)
    assert mpl.rcParams["figure.figsize"] == mpl.rcParamsDefault["figure.figsize"]


def test_plot_clears_the_axes_it_is_given():
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3])
    assert plot.plot([1, 2], axes=axes) is figure
    assert len(axes.lines) == 1


def test_set_figsize_is_of_later_figures():
    plot.set_figsize((7, 2))
    assert tuple(plt.figure().get_size_inches()) == (7, 2)


# ---- what is refused


REFUSED = [
    (ValueError, r"matrices has shape \(3, 3\); .*matrices\[None, None\]", lambda: plot.show_heatmaps(np.eye(3), "x", "y")),
    (ValueError, r"matrices has shape \(1, 3, 3\); .*matrices\[None\]", lambda: plot.show_heatmaps([np.eye(3)], "x", "y")),
    (ValueError, r"matrices has shape \(1, 1, 0, 3\)", lambda: plot.show_heatmaps(np.ones((1, 1, 0, 3)), "x", "y")),
    (ValueError, "titles has 3 entries; expected 2", lambda: plot.show_heatmaps(GRID, "x", "y", titles="abc")),
    (ValueError, r"matrices\[0\]\[1\] has shape", lambda: plot.show_heatmaps([[np.eye(2), np.eye(3)]], "x", "y")),
    (TypeError, "matrices must be an array of real numbers, not str", lambda: plot.show_heatmaps("abc", "x", "y")),
    (TypeError, "matrices must be .* complex128", lambda: plot.show_heatmaps(GRID * 1j, "x", "y")),
    (ValueError, r"weights has shape \(3,\); expected \(n, m\)", lambda: plot.show_attention(np.ones(3), "a", "b")),
    (ValueError, r"\(2, 2, 4, 4\); .*weights\[0\]", lambda: attention(np.stack([HEADS, HEADS]))),
    (ValueError, "queries has 2 entries; expected 1, the queries of", lambda: plot.show_attention([[1.0]], ["a", "b"], ["c"])),
    (ValueError, "keys has 0 entries; expected 1, the keys of", lambda: plot.show_attention([[1.0]], ["a"], [])),
    (TypeError, r"queries must be a list of tokens.*queries\.split\(\)", lambda: plot.show_attention([[1.0]], "a", ["b"])),
    (ValueError, "titles has 1 entries; expected 2", lambda: attention(titles=["a"])),
    (ValueError, "weights is empty", lambda: plot.show_attention({}, "a", "b")),
    (ValueError, r"weights\['b'\] has shape \(2, 2, 3, 3\); .*weights\['b'\]\[0\]",
     lambda: plot.show_attention({"b": np.ones((2, 2, 3, 3))}, [1, 2, 3], [1, 2, 3])),
    (ValueError, r"a map of weights\['c'\] has shape \(3, 4\)",
     lambda: plot.show_attention({"b": np.ones((3, 3)), "c": np.ones((3, 4))}, [1, 2, 3], [1, 2, 3])),
    (ValueError, "titles are for one layer's heads", lambda: plot.show_attention(LAYERS, [1] * 3, [1] * 3, titles=["x"])),
    (ValueError, "keys has 2 entries; expected 3, the columns of", lambda: plot.show_heatmaps(GRID, "x", "y", keys=[1, 2])),
    (TypeError, r"queries must be a list of tokens", lambda: plot.show_heatmaps(GRID, "x", "y", queries="abcd")),
    (ValueError, "vmax must be above 0.0", lambda: attention(vmax=-1.0)),
    (TypeError, "vmax must be a number", lambda: attention(vmax="1")),
    (ValueError, "width must be finite and above 0", lambda: plot.kernel_shapes(width=0)),
    (ValueError, "kernels is empty", lambda: plot.kernel_shapes([])),
    (ValueError, r"kernels\[0\] has shape \(1001, 2\)", lambda: plot.kernel_shapes([lambda q, k: np.ones((len(q), 2))])),
    (ValueError, "X has 2 curves and Y 3", lambda: plot.plot(np.ones((2, 4)), np.ones((3, 4)))),
    (ValueError, "curve 1 has 2 points in X and 3 in Y", lambda: plot.plot([[1, 2], [1, 2]], [[1, 2], [1, 2, 3]])),
    (ValueError, "X must be a curve", lambda: plot.plot(3.0)),
    (ValueError, "Y must be a curve", lambda: plot.plot([1, 2], np.ones((1, 2, 2)))),
    (TypeError, "X must be an array of real numbers, not list", lambda: plot.plot(["a", "b"])),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_what_does_not_fit_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
    assert not plt.get_fignums()  # no figure is left half drawn


def test_without_matplotlib_the_cure_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install .*\[plot\]"):
        plot.show_heatmaps(GRID, "x", "y")


# ---- scripts and notebooks


def run_script(code, folder):
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: x for name, x in os.environ.items() if name not in hidden} | {"MPLCONFIGDIR": str(folder)}
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(folder / "figure.png")], check=True, env=environment)


def test_without_a_display_a_script_saves_its_figure(tmp_path):
    code = """if True:
        import sys
        from kvattn import plot
        assert "matplotlib" not in sys.modules
        figure = plot.show_heatmaps([[[[1.0, 0.0], [0.5, 0.5]]]], "Keys", "Queries")
        plot.use_svg_display(), plot.set_figsize()
        figure.savefig(sys.argv[1])
        from matplotlib import pyplot
        assert pyplot.get_fignums() == [figure.number]
        assert "IPython" not in sys.modules
    """
    run_script(code, tmp_path)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_users_matplotlib_backend_stays_and_no_shell_is_started(tmp_path):
    code = """if True:
        import matplotlib
        from IPython.core.interactiveshell import InteractiveShell
        matplotlib.use("svg")
        from kvattn import plot
        plot.use_svg_display(), plot.set_figsize(), plot.kernel_shapes()
        assert matplotlib.get_backend() == "svg"
        assert not InteractiveShell.initialized()
    """
    run_script(code, tmp_path)


CELLS = {
    "from kvattn import plot": [],
    "plot.show_heatmaps([[[[1.0, 0.0]]]], 'x', 'y')": ["png"],
    "figure = plot.show_attention([[1.0]], ['a'], ['b'])": ["png"],
    "figure  # again": ["png"],
    "import matplotlib.pyplot as plt\nplot.kernel_shapes()\nplt.show()": ["png"],
    "axes = plt.subplots()[1]\nplot.plot([1, 2], axes=axes)": ["png"],
    "display(plot.plot([1, 2]))\n'done'": ["png", "plain"],
    "plt.close(plot.plot([1, 2]))": [],
    "plot.use_svg_display()\nfor name in ('one', 'two'):\n    plot.plot([1, 2], xlabel=name)": ["svg one", "svg two"],
    "plot.plot([1, 2], xlabel='one')\nplot.plot([1, 2], xlabel='two')": ["svg one", "svg two"],
}


def shown(output):
    """One output of a cell in a word: png, svg with its label, or plain."""
    if "image/svg+xml" in output.data:
        return "svg " + next(name for name in ("one", "two") if f"<!-- {name} -->" in output.data["image/svg+xml"])
    return "png" if "image/png" in output.data else "plain"


def test_a_notebook_shows_each_figure_once_and_in_order(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert {cell.source: [shown(output) for output in cell.outputs] for cell in notebook.cells} == CELLS


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        save(draw(), BASELINE / f"{name}.png")
