"""TransformerDecoder and its block in every framework: the cache of a state, what it cannot see, its weights, its dropout.

Their numbers and gradients are judged in test_layers.py, beside the other layers'.
"""

import importlib
import itertools
import re
from functools import partial

import numpy as np
import pytest
from adapters import reference
from near import assert_near as within
from test_layers import ENCODER, LENS, SOURCE, TOKENS, X, made, shaken

import kvattn
from kvattn import layers

assert_near = partial(within, units=1024)  # through a dozen norms, which divide by what may be small
BLOCK = {"num_hiddens": 8, "ffn_num_hiddens": 12, "num_heads": 4}
OF_HEADS = {"num_kv_heads": 2, "rotary": True, "qk_norm": True, "alibi": True, "sink": True, "use_bias": True}
DECODER = ("TransformerDecoder", ENCODER, (TOKENS, SOURCE, LENS))


@pytest.fixture(name="adapter")
def fixture_adapter(backend):
    return importlib.import_module(f"adapters.{backend}")


def first_state(caches=2):
    return [SOURCE, LENS, [None] * caches]


@pytest.mark.parametrize(("more", "room"), [({}, True), (OF_HEADS, False)], ids=["allocated", "growing, with options"])
def test_a_token_at_a_time_is_the_whole_pass(adapter, backend, more, room):
    layer, w = made(adapter, "TransformerDecoder", {**ENCODER, **more}, DECODER[2])
    layer = adapter.load(layer, shaken(w))
    whole, state = adapter.call(layer, TOKENS, first_state())
    assert [(cache.length, cache.key.shape) for cache in state[2]] == [(5, (2, more.get("num_kv_heads", 4), 5, 2))] * 2
    parts, state = [], first_state()
    if room:
        shape = (2, more.get("num_kv_heads", 4), 7, 2)
        state[2] = [kvattn.KVCache.allocate(shape, backend=backend) for _ in range(2)]
    for start, end in ((0, 3), (3, 4), (4, 5)):
        logits, state = adapter.call(layer, TOKENS[:, start:end], state)
        parts.append(logits)
    assert_near(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("training", [False, True])
def test_no_position_sees_a_later_one_in_training_or_out_of_it(adapter, training):
    layer, _ = made(adapter, *DECODER)
    changed = TOKENS.copy()
    changed[:, 3:] = (changed[:, 3:] + 1) % 11
    before, after = (adapter.call(layer, each, SOURCE, LENS, training=training) for each in (TOKENS, changed))
    assert_near(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1e-3


def test_padding_of_the_encoder_is_seen_by_nobody(adapter):
    layer, _ = made(adapter, *DECODER)
    padded = SOURCE.copy()
    padded[1, 2:] = np.nan  # of length 2
    assert_near(adapter.call(layer, TOKENS, padded, LENS), adapter.call(layer, TOKENS, SOURCE, LENS))


def test_a_call_leaves_the_state_that_it_was_given(adapter):
    layer, _ = made(adapter, *DECODER)
    _, state = adapter.call(layer, TOKENS[:, :2], first_state())
    kept = [*state[2]]
    again = [adapter.call(layer, TOKENS[:, 2:3], state)[0] for _ in range(2)]
    assert all(x is y for x, y in zip(state[2], kept, strict=True))
    np.testing.assert_array_equal(*again)


def test_the_weights_shown_are_two_lists_of_the_last_call(adapter):
    layer, w = made(adapter, *DECODER)
    own, other = adapter.shown(layer)
    X = w["embedding"][TOKENS] * np.sqrt(8) + layers.encoding(5, 8)
    heads = reference.under(w, "blocks.0.attention1")
    Y, expected = reference.multi_head(heads, X, X, X, num_heads=4, causal=True)
    assert_near(own[0], expected)
    Y = reference.norm(reference.under(w, "blocks.0.addnorm1"), X + Y)
    heads = reference.under(w, "blocks.0.attention2")
    assert_near(other[0], reference.multi_head(heads, Y, SOURCE, SOURCE, LENS, num_heads=4)[1])
    assert [x.shape for x in (own[1], other[1])] == [(8, 5, 5), (8, 5, 3)]
    _, state = adapter.call(layer, TOKENS[:, :2], first_state())
    adapter.call(layer, TOKENS[:, 2:3], state)
    assert [[x.shape for x in each] for each in adapter.shown(layer)] == [[(8, 1, 3)] * 2] * 2


def test_a_block_of_its_own_takes_its_place_in_the_state(adapter):
    layer, _ = made(adapter, "TransformerDecoderBlock", {**BLOCK, "i": 2}, (X, first_state(3)))
    _, state = adapter.call(layer, X, first_state(4))
    assert [cache is None for cache in state[2]] == [True, True, False, True]
    with pytest.raises(ValueError, match=re.escape("state[2] holds 2 blocks' caches; this block's is state[2][2]")):
        adapter.call(layer, X, first_state(2))


WRONG = {
    "no state": (lambda: [SOURCE, LENS], TypeError, r"state must be \[enc_outputs, enc_valid_lens, caches\].*not list of 2"),
    "a cache short": (lambda: first_state(1), ValueError, r"state\[2\] holds 1 blocks' caches; this decoder has 2 blocks"),
    "d2l's arrays": (lambda: [SOURCE, LENS, [X, X]], TypeError, r"state\[2\]\[0\] must be None, at first, or a kvattn.KVCache"),
    "no outputs": (lambda: [None, LENS, [None] * 2], TypeError, r"state\[0\] must be the encoder's outputs, .* not NoneType"),
    "an encoder's cache": (lambda: [(SOURCE, []), LENS, [None] * 2], TypeError, r"state\[0\] must be .*, not tuple of 2"),
    "nothing kept": (lambda: [SOURCE, LENS, [layers.NOT_KEPT] * 2], ValueError, r"state\[2\]\[0\] kept nothing: .* init_state"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_state_is_refused(adapter, case):
    state, error, words = WRONG[case]
    layer, _ = made(adapter, *DECODER)
    with pytest.raises(error, match=words):
        adapter.call(layer, TOKENS, state())


def test_caches_of_different_lengths_are_refused(adapter):
    layer, _ = made(adapter, *DECODER)
    _, state = adapter.call(layer, TOKENS[:, :2], first_state())
    for lengths, caches in (("2 and 0", [state[2][0], None]), ("0 and 2", [None, state[2][1]])):
        with pytest.raises(ValueError, match=f"state.2. holds {lengths} positions; .* as many for each block"):
            adapter.call(layer, TOKENS[:, 2:3], [*state[:2], caches])
    encoder, _ = made(adapter, "TransformerEncoder", ENCODER, (TOKENS,))
    _, caches = adapter.call(encoder, TOKENS[:, :2], causal=True, cache=[])
    with pytest.raises(ValueError, match="cache holds 2 and 0 positions; expected as many for each block"):
        adapter.call(encoder, TOKENS[:, 2:3], causal=True, cache=[caches[0], kvattn.KVCache()])


def test_a_block_has_a_place_from_0_on(adapter):
    layer = adapter.layer("TransformerDecoderBlock", **{**BLOCK, "i": -1})
    with pytest.raises(ValueError, match="i is -1; expected the block's place in the decoder, from 0 on"):
        adapter.call(layer, X, first_state(2))


def test_a_decoder_that_looks_ahead_cannot_be_asked_for(adapter):
    layer, _ = made(adapter, *DECODER)
    with pytest.raises(ValueError, match="causal is False; a decoder attends to no later position: leave it out"):
        adapter.call(layer, TOKENS, first_state(), causal=False)
    windowed, _ = adapter.call(layer, TOKENS, first_state(), causal=True, window=(1, 0))
    assert np.abs(windowed - adapter.call(layer, TOKENS, SOURCE, LENS))[:, 2:].max() > 1e-3


def test_init_state_is_the_first_state(adapter):
    layer, _ = made(adapter, *DECODER)
    layer = getattr(layer, "module", layer)
    assert layer.init_state("outputs", "lengths") == ["outputs", "lengths", [None, None]]
    assert layer.init_state("outputs") == ["outputs", None, [None, None]]


def test_one_seed_draws_the_same_weights_and_the_same_dropout_in_every_framework(adapter):
    import kvattn.numpy as kv

    config = {**ENCODER, "dropout": 0.3}
    native = kv.TransformerDecoder(**config, seed=3)
    native(TOKENS, first_state())
    layer, w = made(adapter, "TransformerDecoder", config, DECODER[2], seed=3)
    expected = kv.export_weights(native)
    assert {*w} == {*expected}
    for name, x in w.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    found = adapter.call(layer, TOKENS, SOURCE, LENS, training=True, rng=5)
    assert_near(found, native(TOKENS, first_state(), training=True, rng=5)[0])
    assert np.abs(found - adapter.call(layer, TOKENS, SOURCE, LENS, training=True, rng=6)).max() > 0.05
    assert_near(adapter.call(layer, TOKENS, SOURCE, LENS, rng=5), adapter.call(layer, TOKENS, SOURCE, LENS))


def test_the_five_parts_of_a_block_that_drop_have_seeds_of_their_own(adapter, backend):
    tab = kvattn.dispatch.load(backend)
    seeds = [int(np.asarray(layers.seed_of(tab, 5, part))) for part in range(5)]
    assert len({5, *seeds}) == 6


def test_a_decoder_carries_its_weights_to_every_other_framework(backends):
    adapters = {name: importlib.import_module(f"adapters.{name}") for name in backends}
    config = {**ENCODER, **OF_HEADS}
    sent = {name: made(adapter, "TransformerDecoder", config, DECODER[2]) for name, adapter in adapters.items()}
    sent = {name: (layer, shaken(w)) for name, (layer, w) in sent.items()}
    for source, target in itertools.permutations(backends, 2):
        layer, w = sent[source]
        there = adapters[source].call(adapters[source].load(layer, w), *DECODER[2])
        here = adapters[target].load(adapters[target].layer("TransformerDecoder", **config), w)
        assert_near(adapters[target].call(here, *DECODER[2]), there, f"{source} to {target}")
