"""Break any one line of the tiles and the conformance suite turns red, as in test_mutants.py."""

import importlib
import sys

import pytest
from test_mutants import altered
from tiling import ALWAYS, SIZES

from kvattn import conformance
from kvattn.backends import numpy as tab
from kvattn.kernels import numpy as kernels
from kvattn.kernels.numpy import gradients as blockwise
from kvattn.kernels.numpy import threads, tiled, tiled_grad, tiles

MUTANTS = [
    ("tiles", "sees one key too many", "first + tiling.right - ahead", "first + tiling.right - ahead + 1"),
    ("tiles", "looks one key too far left", "cut_from - tiling.left - ahead", "cut_from - tiling.left - ahead - 1"),
    ("tiles", "ignores valid_lens", "self.lengths = np.clip(call", "np.clip(call"),
    ("tiles", "ignores a query's own length", "if tiling.per_query is not None and first < last:", "if False:"),
    ("tiles", "leaves out the last key of a range", "(last, tile.last, cut_width)", "(last, tile.last - 1, cut_width)"),
    ("tiles", "shifts a mask's rows", "rows.start + part.start, rows.start + part.stop)", "part.start, part.stop)"),
    ("tiles", "takes every block for an inner one", "if start < tile.inner_first or end", "if False and end"),
    ("tiles", "ignores -inf in the bias", "if not (tiling.bias_is_ready or bias.min(initial=0) > -math.inf):", "if False:"),
    ("tiles", "scales the bias", "bias, tiling.dtype.type(UNIT)", "bias, tiling.dtype.type(0.5)"),
    ("tiles", "forgets softcap", "np.tanh(scores, out=scores)", "pass"),
    ("tiles", "reads another entry's lengths", "ranges[number *", "ranges[0 * number *"),
    ("tiled", "forgets what is forbidden", "        tiles.clear_forbidden(block)\n        allowed = ", "        allowed = "),
    ("tiled", "lets NaN through", "None if np.isfinite(values).all() else tiles.allowed_pairs(block)", "None"),
    ("tiled", "stops at a NaN", "if top is None and not sums.max()", "if not sums.max()"),
    ("tiled", "never takes off the maximum", "if not _in_range(tiling, tile, sums, total):", "if False:"),
    ("tiled", "keeps what was summed under an older maximum", "total[:, :, rows] *= fade[..., None]", "pass"),
    ("tiled", "forgets the maximum in lse", "(top + LOG(sums))", "LOG(sums)"),
    ("tiled", "divides by nothing", "    if not sums.all():\n        sums[sums == 0] = 1\n", ""),
    ("tiled", "leaves the keys the sink's share", "total *= EXP(", "EXP("),
    (
        "tiled",
        "leaves the sink out of lse",
        "lse[tile.at] = of_rows",
        "lse[tile.at] = of_rows if tiling.sink is None else of_keys",
    ),
    ("tiled_grad", "forgets the rows' sums", "grad -= delta[:, :, rows, None]", "pass"),
    ("tiled_grad", "scales no gradient by the key", "by_key *= tiling.dtype.type(1 / UNIT)", "pass"),
    ("tiled_grad", "scales no gradient by the query", "tiling.dtype.type(tiling.scale)", "tiling.dtype.type(1)"),
    ("tiled_grad", "adds over no group", "tile.at[-3].start), []).append(tile)", "tile.at[-3].start), [tile])"),
    ("tiles", "drops the same in every block of keys", "tiling.first_key + start", "tiling.first_key"),
    ("tiled", "drops in first blocks alone", "weights.dtype)\n    tiles.drop(block, weights)\n", "weights.dtype)\n"),
    ("tiled", "drops and makes up for nothing", "sums *= tiling.dtype.type(tiling.share)", "pass"),
    ("tiled_grad", "drops no gradient by the weights", "tiles.drop(block, grad)", "pass"),
    ("tiled_grad", "drops no weight", "        tiles.drop(block, weights)\n", ""),
    ("tiled_grad", "makes up for nothing", "grad_output = grad_output / tiling.dtype.type(tiling.share)", "pass"),
    ("tiled_grad", "lets NaN through", "leave_out = bool(block.limits) and not (", "leave_out = False and not ("),
]
MODULES = {"tiles": tiles, "tiled": tiled, "tiled_grad": tiled_grad}


@pytest.fixture
def mutated(monkeypatch):
    """Makes the three files anew, one of them altered, and puts them in the others' place."""

    def alter(file, old, new):
        for name in MODULES:
            monkeypatch.setitem(sys.modules, f"kvattn.kernels.numpy.{name}", MODULES[name])
            change = (old, new) if name == file else ("import", "import")
            module = altered(f"kernels/numpy/{name}.py", f"kvattn.kernels.numpy.{name}", *change)
            monkeypatch.setattr(kernels, name, module)
            for user in (tab, blockwise):
                if hasattr(user, name):
                    monkeypatch.setattr(user, name, module)
        for constant, size in SIZES[0].items():
            monkeypatch.setattr(kernels.tiles, constant, size)
        for constant, size in ALWAYS.items():
            monkeypatch.setattr(kernels.tiled, constant, size)
        monkeypatch.setattr(threads, "count", lambda: 2)

    return alter


CASES = {
    case.name: case
    for case in conformance.cases()
    if case.group in ("plain", "scale", "masks", "bias", "lengths", "causal", "window", "softcap", "large scores", "padding",
                      "grouped heads", "shapes", "empty rows", "merging", "not finite", "dropout")
}  # fmt: skip


def failures():
    """One by one: the first that is no mistake in the mutant is enough."""
    return (r for case in CASES.values() for r in conformance.run("numpy", [case], ("float64",)).failures)


def test_the_unmutated_files_pass(mutated):
    mutated("tiles", "import", "import")
    assert tab.tiled is kernels.tiled is not tiled
    assert not list(failures())


@pytest.mark.parametrize(("file", "wrong", "old", "new"), MUTANTS, ids=[f"{row[0]} {row[1]}" for row in MUTANTS])
def test_tiles_that(mutated, file, wrong, old, new):
    mutated(file, old, new)
    assert any("Error: " not in result.message for result in failures())


def test_the_modules_are_the_real_ones_again():
    assert importlib.import_module("kvattn.kernels.numpy.tiled") is tiled
    assert tab.tiled is tiled
    assert blockwise.tiled is tiled
