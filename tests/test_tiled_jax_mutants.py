"""Break any one line of JAX's tiles and the comparison with all at once turns red, as in test_mutants.py."""

from functools import partial

import pytest
from conftest import chosen
from test_mutants import mutate_kernels
from tiling import call, right, subject

if "jax" not in chosen():
    pytest.skip("this run has no jax", allow_module_level=True)

FAR = {"window": (2, 1), "query_offset": 9}
LEFT = {"window": (2, None)}
MUTANTS = [  # what it does wrong, the text, what replaces it, and a restriction or options that should notice
    ("computes no last edge", "            if limited:\n", "            if False:\n", "lengths"),
    (
        "computes no first edge",
        "uneven = -((at - jnp.minimum(inner_lowest",
        "uneven = 0 * -((at - jnp.minimum(inner_lowest",
        LEFT,
    ),
    ("takes the last edge for an inner block", "(inner_highest - at) //", "(highest - at) //", "causal"),
    ("counts keys of two blocks twice", "low = jnp.maximum(low, at)", "low = jnp.maximum(low, start)", "lengths"),
    ("sees too far right", "(position < high[:, None])", "(position < high.max())", "causal"),
    ("sees too far left", "(position >= low[:, None])", "(position >= low.min())", "window"),
    ("keeps sums under an older maximum", "fade * total + _dot", "total + _dot", "nothing"),
    ("forgets the maximum in lse", "top + jnp.log(sums)", "jnp.log(sums)", "nothing"),
    ("divides by nothing", "sums = jnp.where(empty, 1, sums)", "pass", "lengths of 0"),
    ("puts the last tile past the end", "tiles * plan.tile, plan.n - plan.tile)", "tiles * plan.tile, plan.n)", "bias"),
    ("shifts a bias's rows", "(head, 1), (first, plan.tile)", "(head, 1), (0 * first, plan.tile)", "bias"),
    ("reads another entry's lengths", "jnp.asarray(index)[entry]", "jnp.asarray(index)[0]", "lengths"),
    ("takes one head for all", "own = plan.heads_at_once if", "own = 1 if", "nothing"),
    ("counts each head as many times as are computed at once", "tiles) * plan.heads_at_once,", "tiles),", "nothing"),
    ("derives by keys out of reach", "jnp.clip(lowest, 0, len", "jnp.clip(0 * lowest, 0, len", FAR),
    ("derives by no inner block", "jnp.where(whole, 1, 2)", "jnp.where(whole, 0, 2)", "lengths"),
    ("forgets softcap's slope", "[sum(moved) * slope]", "[sum(moved)]", "softcap"),
    ("forgets the sums' derivative", "total - sums * rows", "total - 0 * rows", "nothing"),
]


@pytest.fixture
def mutated(monkeypatch):
    return partial(mutate_kernels, monkeypatch, "jax")


def compared(which):
    restriction, options = (which, {}) if isinstance(which, str) else ("nothing", which)
    right(subject("jax"), call(restriction, lead=(2, 4), kv=(2, 2), n=7, m=23 if which is FAR else 10, **options))


def test_the_unmutated_file_passes(mutated):
    mutated("import", "import")
    for which in (FAR, LEFT, "lengths"):
        compared(which)


@pytest.mark.parametrize(("wrong", "old", "new", "which"), MUTANTS, ids=[row[0] for row in MUTANTS])
def test_tiles_that(mutated, wrong, old, new, which):
    mutated(old, new)
    with pytest.raises(AssertionError):
        compared(which)
