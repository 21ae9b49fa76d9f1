"""Greedy and beam search, against every sequence there is, against beams of plain lists, and with decoders and their caches."""

import importlib
import itertools
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
from test_layers import ENCODER, LENS, SOURCE

import kvattn
from kvattn import decoding

WORDS, STEPS, END = 3, 4, 1
RNG = np.random.default_rng(8)
TREE = RNG.normal(size=(2, sum(WORDS**t for t in range(STEPS + 1)), WORDS))  # logits after every beginning, for two entries
GNMT = lambda n: ((5 + n) / 6) ** 0.6  # noqa: E731


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def by_tree(entry, sequence):
    """The log-probabilities of what follows a sequence."""
    node = 0
    for token in sequence:
        node = WORDS * node + token + 1
    return log_softmax(TREE[entry, node])


def tree_in(backend):
    """The tree as a step function of a framework, whose state are arrays: each row's entry, and its node in the tree."""
    array = partial(kvattn.asarray, backend=backend)

    def step(tokens, state):
        entry, node = (kvattn.to_numpy(state["where"][i]).astype(int) for i in range(2))
        if state["begun"]:
            node = WORDS * node + kvattn.to_numpy(tokens).astype(int)[:, -1] + 1
        state = {"where": (array(entry.astype("int32")), array(node.astype("int32"))), "begun": True, "nothing": None}
        return array(TREE[entry, node].astype("float32"))[:, None], state

    return step, {"where": (array(np.array([0, 1], "int32")), array(np.array([0, 0], "int32"))), "begun": False}


def compared(sequence, log_prob, penalty):
    return log_prob / (penalty(len(sequence)) if callable(penalty) else len(sequence) ** penalty)


def every(entry, end, penalty):
    """All sequences: (score, log-probability, tokens), the best first."""
    found = []
    for n in range(1, STEPS + 1):
        for sequence in itertools.product(range(WORDS), repeat=n):
            if end in sequence[:-1] or (n < STEPS and sequence[-1] != end):
                continue
            log_prob = sum(by_tree(entry, sequence[:i])[token] for i, token in enumerate(sequence))
            found.append((compared(sequence, log_prob, penalty), log_prob, sequence))
    return sorted(found, reverse=True)


def of_lists(next_of, beams, steps, end, penalty):
    """Beam search once more, on lists: (score, log-probability, tokens), the best first. It never stops early."""
    going, ended = [(0.0, ())], []
    for t in range(steps):
        grown = [(p + q, (*s, token)) for p, s in going for token, q in enumerate(next_of(s))]
        ended += [(p, s) for p, s in grown if s[-1] == end]
        going = sorted(((p, s) for p, s in grown if s[-1] != end), key=lambda x: -x[0])[:beams]
        ended += going if t + 1 == steps else []
    return sorted(((compared(s, p, penalty), p, s) for p, s in ended), reverse=True)[:beams]


def check(found, entry, expected, end):
    for i, (score, log_prob, sequence) in enumerate(expected):
        n = found.lengths[entry, i]
        assert tuple(found.tokens[entry, i, :n]) == sequence
        assert (found.tokens[entry, i, n:] == end).all()
        np.testing.assert_allclose(found.log_probs[entry, i], log_prob, atol=1e-5)
        np.testing.assert_allclose(found.scores[entry, i], score, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.75, -0.5, GNMT], ids=["none", "power", "against", "gnmt"])
@pytest.mark.parametrize("end", [None, END])
def test_beams_enough_find_the_best_of_every_sequence(backend, end, penalty):
    kv = importlib.import_module(f"kvattn.{backend}")
    step, state = tree_in(backend)
    found = kv.beam_search(step, [[0], [0]], state, max_steps=STEPS, beams=81, end=end, length_penalty=penalty)
    for entry in range(2):
        expected = every(entry, end, penalty)
        check(found, entry, expected[:81], end)
        assert (found.scores[entry, len(expected) :] == -np.inf).all()
        assert (found.lengths[entry, len(expected) :] == 0).all()


@pytest.mark.parametrize("penalty", [0.0, 0.75])
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_few_beams_are_those_of_plain_lists(backend, beams, penalty):
    kv = importlib.import_module(f"kvattn.{backend}")
    step, state = tree_in(backend)
    for end in (None, END):
        found = kv.beam_search(step, [[0], [0]], state, max_steps=STEPS, beams=beams, end=end, length_penalty=penalty)
        for entry in range(2):
            check(found, entry, of_lists(partial(by_tree, entry), beams, STEPS, end, penalty), end)


def test_greedy_search_takes_the_likeliest_at_each_step(backend):
    kv = importlib.import_module(f"kvattn.{backend}")
    for end in (None, END):
        step, state = tree_in(backend)
        found = kv.greedy_search(step, [[0], [0]], state, max_steps=STEPS, end=end)
        for entry in range(2):
            sequence, log_prob = (), 0.0
            while len(sequence) < STEPS and sequence[-1:] != (end,):
                likely = by_tree(entry, sequence)
                sequence, log_prob = (*sequence, int(likely.argmax())), log_prob + likely.max()
            assert tuple(found.tokens[entry, : len(sequence)]) == sequence
            assert (found.tokens[entry, len(sequence) :] == end).all()
            assert found.lengths[entry] == len(sequence)
            np.testing.assert_allclose((found.log_probs[entry], found.scores[entry]), log_prob, atol=1e-5)


def counted(table, steps):
    def step(tokens, state):
        steps.append(tokens.shape)
        return table[np.asarray(tokens)], state

    return step


def test_a_search_stops_where_nothing_that_goes_on_can_become_better():
    table = np.log([[0.05, 0.05, 0.9], [0.05, 0.9, 0.05], [0.05, 0.9, 0.05]])  # 0, then 2, then the end
    for penalty, most in ((0.0, 4), (0.75, 8)):
        steps = []
        found = decoding.beam_search(counted(table, steps), [[0]], max_steps=12, beams=2, end=1, length_penalty=penalty)
        check(found, 0, of_lists(lambda s: table[s[-1] if s else 0], 2, 12, 1, penalty), 1)
        assert len(steps) <= most
    steps = []
    decoding.greedy_search(counted(table, steps), [[0], [2]], max_steps=12, end=1)
    assert steps == [(2, 1), (2, 1)]


def test_the_whole_start_is_given_at_first_and_one_token_of_each_beam_after():
    steps = []
    decoding.beam_search(counted(np.log(np.full((3, 3), 1 / 3)), steps), [[0, 1, 2]] * 2, max_steps=3, beams=4)
    assert steps == [(2, 3), (8, 1), (8, 1)]


def test_of_equals_the_lowest_token_and_the_earlier_beam_go_first():
    equal = np.log(np.full((2, 2), 0.5))
    found = decoding.beam_search(counted(equal, []), [[0]], max_steps=2, beams=3)
    assert found.tokens[0].tolist() == [[0, 0], [0, 1], [1, 0]]
    assert decoding.greedy_search(counted(equal, []), [[0]], max_steps=2).tokens.tolist() == [[0, 0]]


def test_a_batch_of_nothing_finds_nothing():
    step = counted(np.log(np.full((2, 2), 0.5)), [])
    assert decoding.beam_search(step, np.zeros((0, 1), int), max_steps=2, beams=3).tokens.shape == (0, 3, 0)
    assert decoding.greedy_search(step, np.zeros((0, 1), int), max_steps=2).tokens.shape == (0, 0)


# ---- with decoders


def as_step(adapter, layer):
    """The layer as a step function, as users have it."""
    return partial(layer.module.apply, layer.variables) if hasattr(layer, "module") else layer


def test_the_beams_of_a_decoder_are_those_of_its_whole_passes(backend):
    import kvattn.numpy as plain

    adapter, kv = (importlib.import_module(f"{folder}.{backend}") for folder in ("adapters", "kvattn"))
    config = {**ENCODER, "vocab_size": 5, "num_kv_heads": 2, "rotary": True}
    native = plain.TransformerDecoder(**config, seed=2)
    native([[0], [0]], native.init_state(SOURCE, LENS))
    weights = {name: 2 * x for name, x in kv.export_weights(native).items()}  # further from uniform
    native = plain.import_weights(native, weights)
    layer = adapter.layer("TransformerDecoder", **config)
    start = np.array([[0, 3], [0, 4]], "int32")
    adapter.call(layer, start, SOURCE, LENS)
    layer = adapter.load(layer, weights)
    with np_arrays(backend):
        arrays = [kv.asarray(x) for x in (SOURCE, LENS)]
        state = [*arrays, [None, None]]
        found = kv.beam_search(
            as_step(adapter, layer), kv.asarray(start), state, max_steps=4, beams=3, end=1, length_penalty=0.75
        )
        greedy = kv.greedy_search(as_step(adapter, layer), kv.asarray(start), state, max_steps=4, end=1)

    def next_of(entry, sequence):
        tokens = [[*start[entry], *sequence]]
        logits, _ = native(tokens, native.init_state(SOURCE[entry : entry + 1], LENS[entry : entry + 1]))
        return log_softmax(logits[0, -1].astype(float))

    for entry in range(2):
        expected = of_lists(partial(next_of, entry), 3, 4, 1, 0.75)
        check(found, entry, expected, 1)
        sequence = greedy.tokens[entry, : greedy.lengths[entry]]
        assert all(next_of(entry, sequence[:i]).argmax() == token for i, token in enumerate(sequence))


def np_arrays(backend):
    """MXNet's arrays as its users have them."""
    both = ExitStack()
    if backend == "mxnet":
        import mxnet as mx

        both.enter_context(mx.util.np_shape(True))
        both.enter_context(mx.util.np_array(True))
    return both


def test_a_state_of_another_layout_is_reordered_by_the_function_given():
    def step(tokens, state):
        hidden = WORDS * state + np.asarray(tokens)[None, :, -1:] + 1  # (layers, rows, h), as a GRU's
        return TREE[0, hidden[0, :, 0].round().astype(int)], hidden

    def rows_of(state, rows):
        return state[:, rows]

    start = np.full((5, 2, 1), -1 / WORDS)  # so that the first token, 0, leads to the root
    found = decoding.beam_search(step, [[0], [0]], start, max_steps=3, beams=3, reorder=rows_of)
    tree = partial(decoding.beam_search, tree_in("numpy")[0], [[0], [0]], max_steps=3, beams=3)
    of_entry = {"where": (np.zeros(2, int), np.zeros(2, int)), "begun": False}
    np.testing.assert_array_equal(found.tokens, tree(of_entry).tokens)
    with pytest.raises(ValueError, match=r"state has shape \(5, 2, 1\), whose first axis is not the 2 rows .* give reorder="):
        decoding.beam_search(step, [[0], [0]], start, max_steps=3, beams=3)


@pytest.mark.parametrize("ended", [np.nan, -np.inf], ids=["NaN", "no token"])
@pytest.mark.parametrize("search", [decoding.greedy_search, partial(decoding.beam_search, beams=3)], ids=["greedy", "beams"])
def test_nobody_asks_what_follows_an_end_or_a_token_that_cannot_be(search, ended):
    table = np.log([[0.1, 0.6, 0.3], [1.0, 1.0, 1.0], [0.5, 0.4, 0.1]])
    table[1] = ended  # after the end nothing is defined

    def step(tokens, state):
        return table[tokens], state

    both = search(step, [[0], [2]], max_steps=3, end=1)
    for i, start in enumerate((0, 2)):
        alone = search(step, [[start]], max_steps=3, end=1)
        np.testing.assert_array_equal(both.log_probs[i], alone.log_probs[0])
        np.testing.assert_array_equal(both.lengths[i], alone.lengths[0])
    with pytest.raises(ValueError, match="in a row: no probabilities follow"):  # without an end, they are asked for
        search(step, [[0]], max_steps=3)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_a_start_of_a_narrow_dtype_does_not_wrap_the_tokens_that_follow(dtype):
    heard = []

    def step(tokens, state):
        heard.append(int(tokens.max()))
        return np.arange(300.0)[None], state

    for search in (decoding.greedy_search, partial(decoding.beam_search, beams=1)):
        search(step, np.ones((1, 1), dtype), max_steps=2)
    assert heard == [1, 299, 1, 299]


UNIFORM = np.log(np.full((3, 3), 1 / 3))
REFUSED = {
    "tokens of one axis": ({"tokens": [0]}, ValueError, r"tokens has shape \(1,\); expected \(batch, n\)"),
    "no tokens": ({"tokens": np.zeros((2, 0), int)}, ValueError, r"tokens has shape \(2, 0\)"),
    "tokens with fractions": ({"tokens": [[0.5]]}, TypeError, "tokens has dtype float64; expected integers"),
    "no step": ({"max_steps": 0}, ValueError, "max_steps"),
    "no beam": ({"beams": 0}, ValueError, "beams"),
    "an end that is no token": ({"end": 3}, ValueError, "end is 3; expected None, or one of the 3 tokens"),
    "one result": ({"step": lambda tokens, state: UNIFORM}, TypeError, r"step returned ndarray; expected \(scores, state\)"),
    "other rows": ({"step": lambda tokens, state: (UNIFORM, state)}, ValueError, r"shape \(3, 3\); expected .* for 1 rows"),
    "a list": ({"step": lambda tokens, state: ([0.5, 0.5], state)}, ValueError, r"shape \(2,\); expected .* for 1 rows"),
    "NaN": ({"step": lambda tokens, state: (UNIFORM[:1] * np.nan, state)}, ValueError, "largest is nan in a row"),
    "a penalty of 0": ({"length_penalty": lambda n: 0 * n}, ValueError, "length_penalty gave .* expected a divisor above 0"),
    "a penalty in words": ({"length_penalty": "long"}, TypeError, "length_penalty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused(case):
    given, error, words = REFUSED[case]
    whole = {"step": lambda tokens, state: (UNIFORM[:1], state), "tokens": [[0]], "max_steps": 2, **given}
    with pytest.raises(error, match=words):
        decoding.beam_search(**whole)
