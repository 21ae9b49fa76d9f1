"""Every backend's fast path gives the oracle's numbers: outputs, lse and gradients of softmax of dot products.

Each subject runs each call in every size of its tiles and by every way to ask for gradients. One that compiles a program for a
kind of call meets its other sizes in the first test only. One that compiles a program for each shape meets every length and
every restriction, but few pairs of them, and the first few of other tables.
"""

import os
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
from conftest import chosen
from hypothesis import given
from hypothesis import strategies as st
from tiling import INF, NAN, RESTRICTIONS, WRT, allowed, cached, call, draw, first, judge, made, right, subject, with_arrays

import kvattn
from kvattn import conformance
from kvattn.conformance import known_differences
from kvattn.conformance.cases import grid

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mxnet")

SUBJECTS = [subject(name) for name in chosen()]
FEW = ("nothing", "causal, window, padded")  # restrictions
EVERY = "KVATTN_EVERY" in os.environ


def subjects(*tables, few=FEW, first=True):
    """(subject, restriction, table). NumPy's tiles meet every pair of these, the others every third; where programs are
    compiled for kinds of calls each restriction meets one of six or more; with KVATTN_EVERY all do. Where shapes are compiled
    the ``few`` only, but with the first table all, or as few."""

    def meets(subject, place, at):
        if subject.compiles == "shapes":
            return [*RESTRICTIONS][place] in few or (first and at == 0)
        return subject.name == "numpy" or (place + at) % (max(6, len(tables)) if subject.compiles else 3) == 0 or EVERY

    return [
        pytest.param(subject, name, table, id=f"{subject.name}-{name}-{table}")
        for subject in SUBJECTS
        for place, name in enumerate(RESTRICTIONS)
        for at, table in enumerate(tables)
        if meets(subject, place, at)
    ]


def plain(*which, few=None):
    """(subject, restriction); where shapes are compiled, the ``few``."""
    return [
        pytest.param(subject, name, id=f"{subject.name}-{name}")
        for subject in SUBJECTS for name in which if subject.compiles != "shapes" or few is None or name in few
    ]  # fmt: skip


def table(subject, *entries, most=2):
    """Those that the subject meets."""
    return entries[: most if subject.compiles == "shapes" else None]


def each(where=lambda subject: True):
    """The subjects."""
    return pytest.mark.parametrize("subject", [pytest.param(one, id=one.name) for one in SUBJECTS if where(one)])


# ---- edges

LENGTHS = [(9, 7), (1, 1), (1, 7), (3, 2), (4, 3), (5, 4), (8, 6), (7, 1), (2, 11), (6, 6)]
LEADS = [((2, 4), (2, 2)), ((2, 6), (2, 1)), ((2, 2, 2), (2, 1, 2)), ((2, 2), (1, 2))]


@pytest.mark.parametrize(("subject", "which", "lengths"), subjects(*LENGTHS))
def test_lengths_around_those_of_a_tile(subject, which, lengths):
    right(subject, cached(which, *lengths), subject.sizes.values())


@pytest.mark.parametrize(
    ("subject", "which", "leads"), subjects(*LEADS, few=("nothing", "lengths per query", "all"), first=False)
)
def test_heads_groups_and_batches(subject, which, leads):
    right(subject, cached(which, 5, 4, lead=leads[0], kv=leads[1]))


@each()
def test_features(subject):
    for d, v in table(subject, (1, 1), (5, 7), (16, 3)):
        right(subject, cached("causal", d=d, v=v))


@each()
def test_two_and_three_axes(subject):
    eye, thirds = np.eye(9, 7, k=-1) == 0, np.arange(4 * 9 * 7).reshape(4, 9, 7) % 3 > 0
    offsets, lens, bias = np.array([0, 3, -2, 9]), np.array([0, 3, 7, 5]), np.arange(28).reshape(4, 1, 7) / 32
    one, grouped = {"lead": ()}, {"lead": (4,), "kv": (2,)}
    for options in table(
        subject,
        one | {"causal": True, "query_offset": np.array(2), "valid_lens": np.array(5), "mask": eye},
        grouped | {"valid_lens": lens, "mask": thirds},
        grouped | {"causal": True, "query_offset": offsets, "bias": bias},
        one, one | {"valid_lens": np.array(5)}, one | {"valid_lens": np.arange(9) % 8},
        grouped, grouped | {"causal": True}, grouped | {"causal": True, "query_offset": offsets},
        most=3,
    ):  # fmt: skip
        right(subject, call(**options))


SHAPES = ((4, 5, 4), (2, 1, 1, 4), (1, 4, 5, 1), (2, 4, 5, 4), (5, 1), (4,), ())


@pytest.mark.parametrize("what", ["mask", "bias"])
@each()
def test_masks_and_biases_of_every_shape(subject, what):
    rng = np.random.default_rng(0)
    for shape in table(subject, *SHAPES):
        given = rng.random(shape) < 0.6 if shape else np.array(True)
        if what == "bias":
            given = np.where(given, grid(rng, *shape), -INF)
        right(subject, call(lead=(2, 4), kv=(2, 2), n=5, m=4, **{what: given}))


@each()
def test_a_window_in_long_arrays_skips_and_keeps_the_right_blocks(subject):
    for offset in (-3, 0, 17):
        right(subject, call("window", 23, 31, query_offset=offset, valid_lens=np.array([20, 31])))


@each()
def test_a_query_of_every_batch_entry(subject):
    query, *keys = (call(lead=(2, 2)).arguments[name] for name in WRT)
    for options in table(subject, {"causal": True}, {"valid_lens": np.array([3, 0])}, most=1):
        right(subject, made(query[:1], *keys, **options))


def empty(subject, **shape):
    arrays = draw(**{"lead": (2, 2)} | shape)
    lens = np.zeros(len(arrays[0]), int)
    for options in table(subject, {"causal": True}, {}, {"valid_lens": lens}, {"window": 1, "causal": True}, most=1):
        for sizes in subject.few:
            with subject.forced(sizes):
                given = [subject.array(x) for x in arrays]
                found = [kvattn.attention(*given[:3], **options), *kvattn.attention_grad(*given, **options)]
                _, lse = kvattn.attention(*given[:3], **options, return_lse=True)
            assert [x.shape for x in found] == [arrays[3].shape, *(x.shape for x in arrays[:3])]
            assert not any(kvattn.to_numpy(x).any() for x in found)
            assert lse.shape == arrays[3].shape[:-1]
            assert (kvattn.to_numpy(lse) == -INF).all()


@each()
def test_no_keys_no_queries_and_no_batch(subject):
    for shape in ({"m": 0}, {"n": 0}, {"n": 0, "m": 0}, {"lead": (0, 2)}):
        empty(subject, **shape)


@each()
def test_no_heads(subject):
    for lead in ((0,), (2, 0)):
        empty(subject, lead=lead)


LAYOUTS = {
    "heads last but one": lambda x: np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2),
    "features first": lambda x: np.ascontiguousarray(x.swapaxes(-2, -1)).swapaxes(-2, -1),
    "Fortran": np.asfortranarray,
    "every other": lambda x: np.repeat(np.repeat(x, 2, axis=-1), 2, axis=-2)[..., ::2, ::2],
    "one head for all": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "one entry for all": lambda x: np.broadcast_to(x[:1], x.shape),
    "one key for all": lambda x: np.broadcast_to(x[..., :1, :], x.shape),
}


LAID = ("nothing", "causal", "causal, from the end", "window", "lengths", "mask of columns")


@pytest.mark.parametrize(("subject", "which"), plain(*LAID, few=("causal",)))
def test_arrays_of_every_layout(subject, which):
    for sizes in subject.few:
        with subject.forced(sizes) as served:
            for layout in LAYOUTS.values():
                arrays = [layout(x) for name, x in cached(which, lead=(2, 3)).arguments.items() if name in WRT]
                case = made(*arrays, **RESTRICTIONS[which](9, 7))
                case = with_arrays(case, grad_output=LAYOUTS["every other"](case.arguments["grad_output"]))
                judge(case, "float64", subject.found(case, array=subject.laid))
        assert set(served) == subject.passes(case)


@pytest.mark.parametrize(
    ("subject", "dtype"), [pytest.param(one, dtype, id=f"{one.name}-{dtype}") for one in SUBJECTS for dtype in one.dtypes]
)
def test_narrower_dtypes(subject, dtype):
    heads, bias = {"lead": (2, 4), "kv": (2, 2), "d": 8}, np.arange(7) / 8
    options = table(subject, {"causal": True}, {}, {"bias": bias}, {"softcap": 2.0}, {"valid_lens": np.array([3, 7])}, most=1)
    cases = [call(**heads, **more) for more in options]
    query, key, value = (cases[0].arguments[name] for name in WRT)
    cases.append(made(query * 128, key * 128, value, scale=2.0**-14))  # products beyond float16
    for case in cases:
        right(subject, case, dtype=dtype)


# ---- numbers


LARGE = ("nothing", "causal", "window", "mask", "lengths of 0", "bias -inf", "softcap")


@pytest.mark.parametrize(("subject", "which"), plain(*LARGE, few=("causal", "bias -inf", "lengths of 0")))
def test_scores_that_need_their_maximum_taken_off(subject, which):
    """One key's scores rise above or sink below the range of exp, in some rows only, in the first block or a later one."""
    for sizes in subject.few:
        with subject.forced(sizes) as served:
            for size in (2.0**7, 2.0**13, -(2.0**13)):
                for at in (0, 5):
                    query, key, value = (cached().arguments[name].copy() for name in WRT)
                    key[:, at] *= size
                    query[:, ::2] /= 64
                    case = made(query, key, value, dtypes=("float64",), **RESTRICTIONS[which](9, 7))
                    judge(case, "float64", subject.found(case))
        assert set(served) == subject.passes(case)


@each()
def test_scores_far_below_zero_lose_nothing(subject):
    bias = np.full((9, 7), -600.0)
    bias[2] = 500.0
    for dtype in table(subject, "float32", "float64", most=1):
        right(subject, call(bias=bias), dtype=dtype)


@each()
def test_scores_that_must_not_be_seen_do_not_drown_those_that_may(subject):
    rng = np.random.default_rng(0)
    query, key, value = np.abs(grid(rng, 2, 9, 3)) + 1, grid(rng, 2, 7, 3), grid(rng, 2, 7, 2)
    key[:, -1] = 512  # its score is some 1,500 above the others
    for options in table(subject, {"causal": True, "query_offset": -3}, {"window": (3, 1)}, most=1):
        right(subject, made(query, key, value, **options))


@each()
def test_the_largest_values_do_not_overflow_and_small_ones_do_not_vanish(subject):
    query, key, value = (cached().arguments[name] for name in WRT)
    for dtype in ("float32", "float64"):
        limits = np.finfo(dtype)
        for number in (float(limits.max) / 2, float(limits.tiny) * 2**30):
            for options in ({}, {"causal": True}):
                with subject.forced(subject.few[0]):
                    given = [subject.array(x, dtype) for x in (query, key, np.full_like(value, number))]
                    output = kvattn.to_numpy(kvattn.attention(*given, **options))
                np.testing.assert_allclose(output / number, 1, rtol=1e-5)


UNSEEN = ("lengths", "lengths per query", "lengths per query, window", "mask", "mask of columns", "causal", "bias -inf", "all",
          "causal, before the start", "window", "window, with holes", "all but a bias")  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "which"),
    plain(*UNSEEN, few=("lengths", "lengths per query", "mask", "causal", "window", "window, with holes", "bias -inf")),
)
def test_what_nobody_sees_reaches_nothing(subject, which):
    """NaN and infinities stand where a key or a query has nothing to do: the numbers are those without them, to the bit."""
    case = cached(which, 9, 12, **({"query_offset": 2} if which == "window" else {}))
    may = allowed(case)
    blind, unseen = ~may.any(axis=-1), ~may.any(axis=-2)
    for sizes in subject.sizes.values() if subject.compiles != "kinds" else subject.few:
        for way in subject.ways.values():
            with subject.forced(sizes) as served:
                clean = subject.found(case, way=way)
                judge(case, "float64", clean)
                for bad in (NAN, INF, -INF):
                    dirty = {name: case.arguments[name].copy() for name in WRT}
                    dirty["query"][blind] = dirty["key"][unseen] = dirty["value"][unseen] = bad
                    for what, x in subject.found(with_arrays(case, **dirty), way=way).items():
                        np.testing.assert_array_equal(kvattn.to_numpy(x), kvattn.to_numpy(clean[what]), what)
            assert set(served) == subject.passes(case)


@each()
def test_nan_that_is_seen_is_not_lost(subject):
    case = cached("causal", lead=())
    key = case.arguments["key"].copy()
    key[3, 0] = NAN
    for sizes in subject.few:
        with subject.forced(sizes):
            found = subject.found(with_arrays(case, key=key))
        for what in found.keys() & {"output", "output alone", "lse"}:
            lost = np.isnan(kvattn.to_numpy(found[what])).reshape(9, -1).T
            assert lost[:, 3:].all()
            assert not lost[:, :3].any() or subject.kernel == "SDPA"  # which spreads it to the rows of its own blocks


@each(lambda subject: not subject.compiles)  # the others' arrays cannot be
def test_arguments_are_not_written_to(subject):
    case = call("all", lead=(2, 2), softcap=2.0)
    with subject.forced(subject.few[0]):
        given = {name: subject.array(x) for name, x in case.arguments.items()}
        before = {name: kvattn.to_numpy(x).copy() for name, x in given.items()}
        options = {name: x for name, x in case.keywords.items() if name != "return_lse"}
        kvattn.attention(**{name: x for name, x in given.items() if name != "grad_output"}, **options)
        kvattn.attention_grad(**given, **options)
    for name, x in given.items():
        np.testing.assert_array_equal(kvattn.to_numpy(x), before[name], name)


def far(subject, **options):
    for n, m in table(subject, *LENGTHS, most=1):
        right(subject, call(n=n, m=m, **options))


@each()
def test_a_window_without_end(subject):
    far(subject, window=(2**40, 0))


@each()
def test_an_offset_out_of_sight(subject):
    far(subject, causal=True, query_offset=-(10**12))
    far(subject, causal=True, query_offset=10**12)


@each()
def test_lengths_far_beyond_the_keys(subject):
    far(subject, valid_lens=np.array([0, 2**40]))


# ---- the way back through lse


@pytest.mark.parametrize(("subject", "which"), plain(*RESTRICTIONS, few=("nothing", "lengths of 0", "all")))
def test_gradients_by_the_output_and_the_lse(subject, which):
    """Merged with attention over a key of zeros, whose value is zeros, they are those of attention over one key more."""
    case = cached(which)
    (query, key, value), may = (case.arguments[name] for name in WRT), allowed(case)
    key, value = (np.concatenate([x, np.zeros_like(x[..., :1, :])], axis=-2) for x in (key, value))
    options = {name: x for name, x in case.keywords.items() if name in ("scale", "softcap")}
    if "bias" in case.arguments:
        bias = np.where(may, case.arguments["bias"], 0)
        options["bias"] = np.concatenate([bias, np.zeros_like(bias[..., :1])], axis=-1)
    mask = np.concatenate([may, np.ones_like(may[..., :1])], axis=-1)
    longer = made(query, key, value, mask=mask, **options)
    longer.answer["grad_key"], longer.answer["grad_value"] = (longer.answer[f"grad_{x}"][:, :-1] for x in ("key", "value"))
    for sizes in subject.few:
        with subject.forced(sizes) as served:
            judge(longer, "float64", subject.found(case, way=type(subject).merged))
        assert set(served) == (set() if subject.kernel == "SDPA" else subject.passes(case))  # SDPA gives no lse


# ---- any call


@st.composite
def calls(draw_):
    leads = [((), ()), ((3,), (3,)), ((4,), (2,)), ((2, 4), (2, 2)), ((2, 2), (1, 1)), ((1, 2, 2), (2, 2, 1))]
    lead, kv = draw_(st.sampled_from(leads))
    n, m = draw_(st.integers(1, 10)), draw_(st.integers(1, 10))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32)))
    arrays = [
        draw_(st.sampled_from((0.1, 1.0, 30.0))) * rng.standard_normal((*lead, n, 2)), rng.standard_normal((*kv, m, 2)),
        rng.standard_normal((*kv, m, 3)),
    ]  # fmt: skip
    full = (*(max(a, b) for a, b in zip(lead[:-1], kv[:-1], strict=True)), *lead[-1:], n, m)
    options, batch = {"causal": draw_(st.booleans())}, full[:-2][:1]

    def some(full):
        return tuple(draw_(st.sampled_from((1, size))) for size in full[draw_(st.integers(0, len(full) - 1)) :])

    if draw_(st.booleans()):
        options["mask"] = rng.random(some(full)) < draw_(st.sampled_from((0.2, 0.9)))
    if draw_(st.booleans()):
        shape = some(full)
        options["bias"] = np.where(rng.random(shape) < 0.2, -INF, rng.standard_normal(shape))
    if draw_(st.booleans()):
        options["valid_lens"] = rng.integers(0, m + 3, draw_(st.sampled_from((batch, (*batch, n)))))
    options["query_offset"] = rng.integers(-4, m + 2, batch) if batch and draw_(st.booleans()) else draw_(st.integers(-12, 12))
    options["window"] = draw_(st.sampled_from((None, 0, 2, (1, None), (None, 1), (0, 5))))
    options["scale"] = draw_(st.sampled_from((None, 1.0, -0.5, 0.0)))
    return made(*arrays, dtypes=("float64",), **options)


@each(lambda subject: not subject.compiles)
@given(case=calls(), number=st.integers(0, 5))
def test_any_call(subject, case, number):
    sizes = [*subject.sizes.values()]
    right(subject, case, [sizes[number % len(sizes)]])


# ---- the conformance suite

GROUPS = ("plain", "masks", "bias", "lengths", "causal", "window", "softcap", "padding", "grouped heads", "empty rows")


def long(case):
    """A case that meets several tiles of the usual size, and some ten thousand of these."""
    query, key = (np.shape(case.arguments.get(name)) for name in ("query", "key"))
    return len(query) > 1 and len(key) > 1 and query[-2] * key[-2] > 2**14


def suite(subject):
    """The cases that the subject runs: where shapes are compiled two of each group, of those that ask for no weights; where
    kinds of calls are, every other of those groups and every seventh of the others, and with KVATTN_EVERY all."""
    cases = [case for case in conformance.cases() if not long(case)]
    if subject.compiles != "shapes":
        few, many = (2, 7) if subject.compiles and not EVERY else (1, 1)
        return [case for number, case in enumerate(cases) if number % (few if case.group in GROUPS else many) == 0]
    groups = [[case for case in cases if case.group == group and case.output_only] for group in GROUPS]
    # a long one which in tiles of the usual size meets one block
    rises = [case for case in conformance.cases() if case.name == "a maximum that rises"]
    return [case for cases in groups for case in (cases[0], cases[-1])] + rises


@contextmanager
def watched(subject, served, started, reached):
    """Each call is served as `explain` says; the names of those by the path are ``reached``."""
    attention = kvattn.attention

    def call(*args, **options):
        said, before = kvattn.explain(*args, **options).kernel, len(served)
        subject.forget()
        results = attention(*args, **options)
        if said.startswith(subject.kernel):
            reached.add(started[-1])
        if kvattn.to_numpy(first(results)).any():  # else there may have been nothing left to serve
            assert (len(served) > before) == said.startswith(subject.kernel), said
        return results

    with patch.object(kvattn, "attention", call):
        yield


@pytest.mark.parametrize(
    ("subject", "sizes"),
    [
        pytest.param(subject, x, id=f"{subject.name}-{at}")
        for subject in SUBJECTS
        for at, x in [*subject.sizes.items()][: subject.suites]
    ],
)
def test_the_conformance_suite(subject, sizes):
    cases, started, reached = suite(subject), [], set()
    with subject.forced(sizes) as served, watched(subject, served, started, reached):
        report = conformance.run(subject.name, cases, subject.thorough, started.append)
    assert not report.failures, "\n".join(result.message for result in report.failures)
    asked = {
        case.name for case in cases if subject.passes(case) and (subject.thorough or case.output_only or len(case.results) == 1)
    }
    asked -= {case.name for case in cases if known_differences.difference(subject.name, "float32", case.name, case.group)}
    assert asked <= reached
    assert {*served} == set().union(*map(subject.passes, cases))
    assert {case.group for case in cases if case.name in reached} >= {*GROUPS} - subject.lacks
