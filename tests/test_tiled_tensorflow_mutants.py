"""Break any one line of TensorFlow's blocks and a test of them turns red, as in test_mutants.py."""

from functools import partial

import pytest
from conftest import chosen
from test_mutants import PACKAGE, altered, mutate_kernels
from tiling import call, right, subject

if "tensorflow" not in chosen():
    pytest.skip("this run is without TensorFlow", allow_module_level=True)

import tensorflow as tf
import test_tiled
import test_tiled_tensorflow

RED = AssertionError, LookupError, tf.errors.OpError  # or TensorFlow knows no gradient, or XLA no operation


def noticed(test, *given):
    """A test in test_tiled.py that should notice."""
    return partial(getattr(test_tiled, f"test_{test}"), subject("tensorflow"), *given)


def noticed_here(test, *given):
    """One in test_tiled_tensorflow.py."""
    return partial(getattr(test_tiled_tensorflow, f"test_{test}"), *given)


UNSEEN = partial(noticed, "what_nobody_sees_reaches_nothing")
SHAPES = noticed_here("a_trace_knows_the_shapes_of_results")
JACOBIANS = noticed_here("forward_derivatives_and_jacobians")
BY_DISTANCE = noticed_here("derivatives_beside_a_bias_by_distance")
A_SINK = noticed_here("a_sink_joins_the_sums", {"causal": True})
IN_A_GRAPH = partial(noticed_here, "scores_beyond_the_range_of_exp_in_a_graph")
LENGTHS = "lengths per query"
LEFT = {"window": (2, None)}
MUTANTS = [  # what it does wrong, the text, what replaces it, and a restriction, options or a test that should notice
    ("sees too far right", "start + offset + right - low,", "start + offset + right - low + 1,", "causal"),
    ("sees too far left", "low - (start + offset - left),", "low - (start + offset - left) + 1,", LEFT),
    ("reaches every key", "ops.minimum(end + offset + right, high)", "high", UNSEEN("causal")),
    ("reads another entry's lengths", "tf.gather(lens, entry)", "tf.gather(lens, 0 * entry)", "lengths"),
    ("reads another query's length", "(entry * self.n + start, entry * self.n + end)", "(start, end)", LENGTHS),
    ("reads another entry's offset", "self.lead[:1]), entry)", "self.lead[:1]), 0 * entry)", "causal, offset per batch"),
    ("shifts a mask's rows", "((start, 0), (end, 1))", "((0 * start, 0), (end - start, 1))", "mask"),
    ("reads a mask's row as every query's", "mask_rows == self.n, x, y)", "mask_rows == self.n, y, y)", "mask"),
    ("adds over no group", "tf.raw_ops.InplaceAdd(", "tf.raw_ops.InplaceUpdate(", "nothing"),
    ("forgets the maximum in lse", "return kept, top - tf", "return kept, -tf", LENGTHS),
    ("gives an empty row an lse", "block.of_rows_with_keys(lse, other=-math.inf)", "lse",
     noticed("lengths_around_those_of_a_tile", "lengths per query, window", (7, 1))),
    ("forgets the sums' derivative", "delta = tf.reduce_sum(grad", "delta = 0 * tf.reduce_sum(grad", "nothing"),
    ("divides no gradient", "grad, delta = grad / total, delta / total", "pass", "causal"),
    ("forgets softcap's slope", "keep(by_scores if slope is None else by_scores * slope)", "keep(by_scores)", "softcap"),
    ("forgets the lse's gradient", "delta -= block", "block", noticed("gradients_by_the_output_and_the_lse", "nothing")),
    ("reads another head's line", "first = self._of(", "first = 0 * self._of(", BY_DISTANCE),
    ("takes the biases of later queries", "first - end + low,", "first - start + low - 1,", BY_DISTANCE),
    ("forgets the bias beside a soft cap", "if self.kind.biased:", "if self.kind.biased and slope is None:", BY_DISTANCE),
    ("forgets the sink", "if self.kind.sunk:", "if False:", A_SINK),
    ("sums what is outside the window", "elif self.kind.windowed:", "elif False:", A_SINK),
    ("sums what may not attend", "if self.arguments.masked:", "if False:",
     noticed_here("a_sink_joins_the_sums", {"valid_lens": [list(range(9)), list(range(3, 12))]})),
    ("takes no logarithm", "return weights, total, tf.math.log(total)", "return weights, total, total", "nothing"),
    ("takes no maximum in a graph", "value.shape[-1] and tf.executing_eagerly():", "True:", IN_A_GRAPH("nothing")),
    ("loses what is small", ">= LOSSLESS", ">= -1", IN_A_GRAPH("window")),
    ("lets NaN through", "value), hidden)", "value), lambda: (query, key, value))",
     noticed_here("what_nobody_sees_reaches_nothing_in_a_graph", "mask of columns")),
    ("averages values where there is no key", "tf.where(self.empty, tf.constant(other, x.dtype), x)", "x", LENGTHS),
    ("cuts a far offset", "tf.clip_by_value(tf.cast(call.query_offset, tf.int64), -FAR, FAR)", "call.query_offset",
     noticed("an_offset_out_of_sight")),
    ("cuts a long window", "None if side is None else min(side, FAR)", "side", noticed("a_window_without_end")),
    ("cuts a large length", "tf.minimum(tf.cast(call.valid_lens, tf.int64), key.shape[-2])", "call.valid_lens",
     noticed("lengths_far_beyond_the_keys")),
    ("serves XLA", "if quirks.compiles_with_xla() or ", "if ", noticed_here("ways_to_call", "jit_compile", "nothing")),
    ("forgets its results' shapes", "x.set_shape(shape)", "pass", SHAPES),
    ("lets a tape look inside", "[tf.stop_gradient(x) for x in tensors]", "[*tensors]", JACOBIANS),
    ("starts from a constant", "tf.raw_ops.Empty(shape=tf.stack([rows, width]), dtype=arguments.dtype, init=True)",
     "tf.zeros(tf.stack([rows, width]), arguments.dtype)", noticed_here("a_repeated_call_finds_nothing_of_the_last")),
]  # fmt: skip


@pytest.fixture
def mutated(monkeypatch):
    def alter(old, new):
        planned = old not in (PACKAGE / "kernels/tensorflow/tiles.py").read_text()
        mutant = mutate_kernels(monkeypatch, "tensorflow", *(("import", "import") if planned else (old, new)))
        if planned:
            plan = altered("kernels/tensorflow/plan.py", "kvattn_mutants.plan", old, new)
            monkeypatch.setattr(mutant, "plan", plan)
        monkeypatch.setattr(mutant, "absent", lambda *_: True)  # as in a graph, where nothing is computed again
        monkeypatch.setattr(test_tiled_tensorflow, "tiled", mutant)

    return alter


def compared(which):
    if callable(which):
        return which()
    restriction, options = (which, {}) if isinstance(which, str) else ("nothing", which)
    return right(subject("tensorflow"), call(restriction, lead=(2, 4), kv=(2, 2), n=8, **options))


def test_the_unmutated_file_passes(mutated):
    mutated("import", "import")
    for which in (LEFT, LENGTHS, "causal", "lengths", SHAPES):
        compared(which)


@pytest.mark.parametrize(("wrong", "old", "new", "which"), MUTANTS, ids=[row[0] for row in MUTANTS])
def test_blocks_that(mutated, wrong, old, new, which):
    mutated(old, new)
    with pytest.raises(RED):
        compared(which)
