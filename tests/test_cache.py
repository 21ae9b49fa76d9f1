"""KVCache: what it keeps, in every backend, with room set aside and without; what does not continue it is refused."""

import numpy as np
import pytest

import kvattn
from kvattn import KVCache

RNG = np.random.default_rng(0)
KEYS, VALUES = RNG.normal(size=(2, 3, 7, 4)).astype("float32"), RNG.normal(size=(2, 3, 7, 5)).astype("float32")
STEPS = ((0, 3), (3, 4), (4, 4), (4, 6))  # one of no keys among them
ROOM = {"no room": None, "just enough": 6, "some to spare": 9, "too little": 5}


def filled(tab, capacity, steps=STEPS):
    """A cache after these steps, and every cache on the way."""
    cache = KVCache()
    if capacity is not None:
        cache = KVCache.allocate((2, 3, capacity, 4), 5, backend=tab)
    for start, end in steps:
        cache = cache.extend(tab.asarray(KEYS[:, :, start:end]), tab.asarray(VALUES[:, :, start:end]))
    return cache


@pytest.mark.parametrize("capacity", ROOM.values(), ids=ROOM)
def test_every_key_and_value_stays_where_it_was_put(tab, capacity):
    for count in range(1, len(STEPS) + 1):
        end = STEPS[count - 1][1]
        cache = filled(tab, capacity, STEPS[:count])
        assert cache.length == end
        key, value = map(kvattn.to_numpy, cache.seen())
        np.testing.assert_array_equal(key, KEYS[:, :, :end])
        np.testing.assert_array_equal(value, VALUES[:, :, :end])


@pytest.mark.parametrize("capacity", [9, 5, None], ids=["some to spare", "too little", "no room"])
def test_what_lies_behind_the_step_stays(tab, capacity):
    """Writing into the middle, as after a step that is taken back: what stood behind it is where it was."""
    cache = filled(tab, capacity)
    behind = [np.array(kvattn.to_numpy(x)) for x in (cache.key, cache.value)]
    step = [tab.asarray(x[:, :, 5:7]) for x in (KEYS, VALUES)]
    cache = cache._replace(length=1).extend(*step)
    assert cache.length == 3
    for x, old, new in zip((cache.key, cache.value), behind, (KEYS, VALUES), strict=True):
        assert tuple(x.shape) == old.shape
        old[:, :, 1:3] = new[:, :, 5:7]
        np.testing.assert_array_equal(kvattn.to_numpy(x), old)


@pytest.mark.parametrize("at", [0, 3, 6, 8])
def test_torch_writes_in_place_unless_autograd_records(backend, tab, at):
    """No copy a step without gradients; with them the step joins what lies before and behind it, and the old cache stays."""
    if backend == "torch":
        cache = filled(tab, 9)._replace(length=at)
        before, expected = cache.key.clone(), cache.key.clone()
        step = [tab.asarray(x[:, :, 6:7].copy()) for x in (KEYS, VALUES)]
        expected[:, :, at] = step[0][:, :, 0]
        for x in step:
            x.requires_grad_()
        recorded = cache.extend(*step)
        np.testing.assert_array_equal(kvattn.to_numpy(recorded.key), expected)
        np.testing.assert_array_equal(kvattn.to_numpy(cache.key), before)
        recorded.key.sum().backward()
        assert (step[0].grad == 1).all()
        plain = cache.extend(*(x.detach() for x in step))
        assert plain.key is cache.key
        np.testing.assert_array_equal(kvattn.to_numpy(cache.key), expected)


@pytest.mark.parametrize("leaf", [True, False])
def test_torch_writes_into_no_cache_that_has_gradients_itself(backend, tab, leaf):
    """Keys that are learned, or computed from what is: the step has no gradient, and the old keys are not overwritten."""
    if backend == "torch":
        learned = [tab.asarray(x[:, :, :5].copy()).requires_grad_() for x in (KEYS, VALUES)]
        cache = KVCache(*(x if leaf else 2 * x for x in learned), 2)
        before, step = cache.key.detach().clone(), [tab.asarray(x[:, :, 6:7].copy()) for x in (KEYS, VALUES)]
        written = cache.extend(*step)
        assert (cache.key == before).all()
        assert (written.key[:, :, 2:3] == step[0]).all()
        for x, own in zip((written.key, written.value), learned, strict=True):
            x.sum().backward()
            expected = np.full(own.shape, 1.0 if leaf else 2.0)
            expected[:, :, 2] = 0
            np.testing.assert_array_equal(own.grad, expected)


def test_room_that_numpy_set_aside_is_filled_by_every_framework(tab):
    cache = KVCache.allocate((2, 3, 9, 4), 5).extend(*(tab.asarray(x) for x in (KEYS, VALUES)))
    assert tab.is_array(cache.key)
    np.testing.assert_array_equal(kvattn.to_numpy(cache.seen()[0]), KEYS)


def test_a_write_at_the_end_grows_by_what_does_not_fit(tab):
    old, new = tab.asarray(KEYS[:, :, :5]), tab.asarray(KEYS[:, :, 4:7])
    np.testing.assert_array_equal(kvattn.to_numpy(tab.write(old, new, 4)), KEYS)


BAD = {  # what: (key, value, words)
    "keys of another width": ((2, 3, 1, 3), (2, 3, 1, 5), ["key", "(2, 3, 1, 3)", "(2, 3, 1, 4)"]),
    "values of another width": ((2, 3, 1, 4), (2, 3, 1, 4), ["value", "(2, 3, 1, 4)", "(2, 3, 1, 5)"]),
    "values of one feature": ((2, 3, 1, 4), (2, 3, 1, 1), ["value", "(2, 3, 1, 1)", "(2, 3, 1, 5)"]),
    "more values than keys": ((2, 3, 1, 4), (2, 3, 2, 5), ["value", "(2, 3, 2, 5)", "(2, 3, 1, 5)"]),
    "fewer values than keys": ((2, 3, 2, 4), (2, 3, 1, 5), ["value", "(2, 3, 1, 5)", "(2, 3, 2, 5)"]),
    "keys of another batch": ((1, 3, 1, 4), (2, 3, 1, 5), ["key", "(1, 3, 1, 4)", "(2, 3, 1, 4)"]),
    "values of another batch": ((2, 3, 1, 4), (1, 3, 1, 5), ["value", "(1, 3, 1, 5)", "(2, 3, 1, 5)"]),
    "keys of other heads": ((2, 1, 1, 4), (2, 3, 1, 5), ["key", "(2, 1, 1, 4)", "(2, 3, 1, 4)"]),
    "values of other heads": ((2, 3, 1, 4), (2, 1, 1, 5), ["value", "(2, 1, 1, 5)", "(2, 3, 1, 5)"]),
    "keys of fewer axes": ((3, 1, 4), (2, 3, 1, 5), ["key", "(3, 1, 4)", "(2, 3, 1, 4)"]),
    "values of fewer axes": ((2, 3, 1, 4), (3, 1, 5), ["value", "(3, 1, 5)", "(2, 3, 1, 5)"]),
}


@pytest.mark.parametrize("capacity", [None, 9], ids=["no room", "some to spare"])
@pytest.mark.parametrize("what", BAD)
def test_what_does_not_continue_the_cache_is_refused(tab, what, capacity):
    *shapes, words = BAD[what]
    with pytest.raises(ValueError, match="the cache continues") as caught:
        filled(tab, capacity).extend(*(tab.asarray(np.ones(shape, "float32")) for shape in shapes))
    assert [word for word in words if word not in str(caught.value)] == []


UNFIT = ["more values than keys", "fewer values than keys", "values of another batch", "values of other heads"]


@pytest.mark.parametrize("what", UNFIT)
def test_keys_and_values_that_do_not_fit_begin_no_cache(tab, what):
    *shapes, words = BAD[what]
    with pytest.raises(ValueError, match="value has shape") as caught:
        KVCache().extend(*(tab.asarray(np.ones(shape, "float32")) for shape in shapes))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64"), ("int32", "float32"), ("float32", "int32")])
def test_another_dtype_is_refused(tab, dtypes, begun):
    refuses_dtypes(tab, filled(tab, 9) if begun else KVCache(), dtypes)


def test_a_cache_keeps_its_dtype(tab):
    refuses_dtypes(tab, filled(tab, 9), ("float64", "float64"))


def refuses_dtypes(tab, cache, dtypes):
    other = next(dtype for dtype in dtypes if dtype != "float32")
    with pytest.raises(TypeError, match=other):
        cache.extend(*(tab.asarray(np.ones((2, 3, 1, size)), dtype=dtype) for size, dtype in zip((4, 5), dtypes, strict=True)))
