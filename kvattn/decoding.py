"""Search for the sequences that a model thinks likely, a token at a time: greedy search and beam search, in any framework.

The model is a function, ``step(tokens, state) -> (scores, state)``. ``tokens`` (rows, n) follow those of the calls before: all
of the start at first, then one for each row. ``scores`` (rows, n, vocabulary), or (rows, vocabulary) for the last position, are
logits or log-probabilities: a softmax makes the same probabilities of both. A TransformerDecoder is such a function, with the
state of its ``init_state``; in JAX ``functools.partial(decoder.apply, variables)`` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvattn import checks, conversion, dispatch

__all__ = ["beam_search", "greedy_search"]

Step = Callable[[Any, Any], tuple[Any, Any]]
Reorder = Callable[[Any, np.ndarray], Any]


class Found(NamedTuple):
    """What a search found: NumPy arrays (batch, ...) of greedy search, (batch, beams, ...), the best first, of beam search.

    tokens (..., s): without the start; an ``end`` is among them, and fills what follows it.
    lengths (...): of the sequences, an ``end`` included.
    log_probs (...): the sums of their tokens' log-probabilities, given the start.
    scores (...): log_probs divided by the length penalty, by which beams are compared; -inf where there are fewer
        sequences than beams.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    scores: np.ndarray


def greedy_search(step: Step, tokens: Any, state: Any = None, *, max_steps: int, end: int | None = None,
                  backend: Any = None) -> Found:  # fmt: skip
    """The likeliest token at each step, the lowest of equals, until each sequence of the batch has its ``end``.

    Args:
        step, tokens, state, max_steps, end: as those of `beam_search`.

    >>> table = np.log([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.5, 0.4, 0.1]])  # of the next token, by the last
    >>> greedy_search(lambda tokens, state: (table[tokens], state), [[0]], max_steps=3).tokens
    array([[1, 2, 0]])
    """
    max_steps, steps = checks.count("max_steps", max_steps), _Steps(step, tokens, None, backend)
    scores = steps.first(state, end)
    lengths, log_probs = np.zeros(len(scores), int), np.zeros(len(scores))
    going, chosen = np.ones(len(scores), bool), []
    while going.any():
        token = np.where(going, scores.argmax(axis=1), end or 0)
        log_probs += np.where(going, np.take_along_axis(scores, token[:, None], axis=1)[:, 0], 0.0)
        lengths += going
        chosen.append(token)
        going &= (end is None or token != end) & (len(chosen) < max_steps)
        if going.any():
            scores = steps.next(token, going)
    made = np.stack(chosen, axis=1) if chosen else np.zeros((0, 0), int)
    return Found(made, lengths, log_probs, log_probs)


def beam_search(step: Step, tokens: Any, state: Any = None, *, max_steps: int, beams: int = 4, end: int | None = None,
                length_penalty: float | Callable[[Any], Any] = 0.0, reorder: Reorder | None = None,
                backend: Any = None) -> Found:  # fmt: skip
    """The likeliest sequences that are found by keeping the ``beams`` best beginnings at each step.

    A beginning that takes ``end`` is finished, and stays among the ``beams`` best finished ones, while others take its
    place. What is not finished after ``max_steps`` is compared with them as it is. The search stops where none that goes on
    can become better than the worst of them, which is exact: the result is that of all the steps.

    Args:
        step: (tokens, state) -> (logits or log-probabilities, state), as at the top of kvattn.decoding. No gradients are
            taken: call it in torch.no_grad(), and a model as it is out of training.
        tokens: (batch, n), n > 0, integers: where every sequence of the batch begins.
        state: what the first call of ``step`` is given. All arrays of it and of what ``step`` returns, in lists, tuples and
            dicts, a kvattn.KVCache among them, have one row an entry of the batch as their first axis, if they have axes. A
            list of numbers is no array and stays as it is: for more than one beam, give valid_lens as an array.
        max_steps: how many tokens a sequence may have, without the start.
        beams: how many sequences are kept, and found.
        end: the token that ends a sequence; None: all have max_steps.
        length_penalty: a number a: sequences are compared by log_probs / length**a, so that above 0 longer ones are favoured
            (0.75 in d2l; Hugging Face's length_penalty is this too); or a function of an array of lengths that gives the
            divisors: GNMT's is ``lambda n: ((5 + n) / 6) ** a``.
        reorder: (state, rows) -> state: the state with the rows of these numbers, a NumPy array, one for each beam; for states
            whose arrays have their rows elsewhere, as the (layers, batch, h) of a GRU.
        backend: whose arrays ``step`` takes where ``tokens`` are none of a framework.

    Raises:
        TypeError, ValueError: for tokens, counts and scores that cannot be; ValueError for log-probabilities of NaN, and for
            an array of the state with another number of rows.

    Source: Graves 2012, "Sequence transduction with recurrent neural networks", algorithm 1; the length penalty: Wu et al.
    2016, "Google's neural machine translation system", equation 14, which d2l's section 10.8.3 has as a power of the length.

    >>> table = np.log([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.5, 0.4, 0.1]])  # of the next token, by the last
    >>> found = beam_search(lambda tokens, state: (table[tokens], state), [[0]], max_steps=3, beams=2)
    >>> found.tokens[0].tolist(), np.exp(found.log_probs[0]).round(3).tolist()
    ([[1, 2, 0], [1, 2, 1]], [0.18, 0.144])
    """
    max_steps, beams = checks.count("max_steps", max_steps), checks.count("beams", beams)
    penalties = _penalties(length_penalty, max_steps)
    steps = _Steps(step, tokens, reorder, backend)
    scores = steps.first(state, end)
    batch, words = scores.shape
    entry = np.arange(batch)[:, None]
    # beginnings that go on, the best first, of which there is one at first; and the best that are finished, none at first
    nothing = np.full((batch, beams), -np.inf)
    going = _Beams(np.full((batch, beams, max_steps), end or 0), nothing.copy(), np.zeros((batch, beams), int))
    going.log_probs[:, 0] = 0
    ended = going._replace(log_probs=nothing)
    row = np.broadcast_to(entry, (batch, beams))  # of the scores, for each beginning
    for t in range(max_steps):
        total = going.log_probs[..., None] + scores[row]  # (batch, beams, words)
        if end is not None:
            ended = _better(ended, going._replace(log_probs=total[..., end].copy(), lengths=going.lengths + 1), penalties)
            total[..., end] = -np.inf
        total = total.reshape(batch, beams * words)
        best = _descending(total)[:, :beams]
        parent, token = np.divmod(best, words)
        going = _Beams(going.tokens[entry, parent], np.take_along_axis(total, best, axis=1), going.lengths + 1)
        going.tokens[:, :, t] = token
        if t + 1 == max_steps:
            ended = _better(ended, going, penalties)
        elif end is not None and _cannot_improve(ended, going, penalties[t + 1 :], penalties):
            break
        else:
            alive = (going.log_probs > -np.inf).reshape(-1)
            scores = steps.next(token.reshape(-1), alive, row[entry, parent].reshape(-1))
            row = np.arange(batch * beams).reshape(batch, beams)
    exists = ended.log_probs > -np.inf
    lengths = np.where(exists, ended.lengths, 0)
    compared = np.where(exists, ended.log_probs, -np.inf) / penalties[lengths - 1]
    return Found(ended.tokens[..., : lengths.max(initial=0)], lengths, ended.log_probs, compared)


class _Beams(NamedTuple):
    tokens: np.ndarray  # (batch, beams, max_steps), filled with the end
    log_probs: np.ndarray  # (batch, beams); -inf: there is none
    lengths: np.ndarray


def _better(ended: _Beams, more: _Beams, penalties: np.ndarray) -> _Beams:
    """The best of the finished ones and of more, as many as there were; of equals the earlier."""
    candidates = _Beams(*(np.concatenate(x, axis=1) for x in zip(ended, more, strict=True)))
    best = _descending(candidates.log_probs / penalties[candidates.lengths - 1])[:, : ended.lengths.shape[1]]
    return _Beams(*(x[np.arange(len(best))[:, None], best] for x in candidates))


def _cannot_improve(ended: _Beams, going: _Beams, penalties_ahead: np.ndarray, penalties: np.ndarray) -> bool:
    """Whether what goes on, whose log-probabilities can only fall, cannot become better than the worst that is finished."""
    worst = ended.log_probs[:, -1] / penalties[ended.lengths[:, -1] - 1]
    return bool((going.log_probs[:, 0] / penalties_ahead.max() <= worst).all())


def _descending(x: np.ndarray) -> np.ndarray:
    return np.argsort(-x, axis=1, kind="stable")


def _penalties(given: Any, max_steps: int) -> np.ndarray:
    """The divisor of a sequence's log-probability for each length from 1 on."""
    lengths = np.arange(1, max_steps + 1)
    found = given(lengths) if callable(given) else lengths ** checks.number("length_penalty", given)
    found = np.asarray(found, np.float64)
    if found.shape != lengths.shape or not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"length_penalty gave {found} for the lengths 1 to {max_steps}; expected a divisor above 0 for each")
    return found


class _Steps:
    """A step function, its state, and the scores it returns, in NumPy."""

    def __init__(self, step: Step, tokens: Any, reorder: Reorder | None, backend: Any) -> None:
        self.step, self.reorder, self.tokens = step, reorder, tokens
        self.tab = dispatch.choose(backend, tokens=tokens)
        self.like = tokens if self.tab.is_array(tokens) else None  # whose device the next ones share

    def first(self, state: Any, end: Any) -> np.ndarray:
        start = np.asarray(self.tab.to_numpy(self.tokens))
        if start.ndim != 2 or not start.shape[1]:
            raise ValueError(f"tokens has shape {start.shape}; expected (batch, n), n > 0: where each sequence begins")
        if start.dtype.kind not in "iu" and (start.dtype.kind != "f" or (start % 1).any()):  # MXNet's are floats by default
            raise TypeError(f"tokens has dtype {start.dtype}; expected integers")
        self.dtype, self.rows, self.state = start.dtype if start.dtype.kind in "iu" else np.dtype("int32"), len(start), state
        scores = self._scores_of(self.tab.asarray(start) if self.like is None else self.tokens)
        if end is not None and not (conversion.is_integer(end) and 0 <= end < scores.shape[1]):
            raise ValueError(f"end is {end!r}; expected None, or one of the {scores.shape[1]} tokens that step gives scores of")
        if scores.shape[1] - 1 > np.iinfo(self.dtype).max:  # the start's own dtype cannot hold every token
            self.dtype = np.dtype("int32")
        return scores

    def next(self, tokens: np.ndarray, going: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """The scores after these tokens, of which each follows one of the ``rows`` of the state; None: each its own.

        ``going``: whose scores count. What follows an end, or a token that cannot be, may be anything.
        """
        if rows is not None:
            reorder = self.reorder or partial(_reordered, tab=self.tab, count=self.rows)
            self.state = reorder(self.state, rows)
        self.rows = len(tokens)
        return self._scores_of(self.tab.asarray(tokens.astype(self.dtype)[:, None], like=self.like), going)

    def _scores_of(self, tokens: Any, going: np.ndarray | None = None) -> np.ndarray:
        """Log-probabilities (rows, words), float64."""
        results = self.step(tokens, self.state)
        if not (isinstance(results, (tuple, list)) and len(results) == 2):
            raise TypeError(f"step returned {type(results).__name__}; expected (scores, state)")
        scores, self.state = results
        log_probs = np.asarray(self.tab.to_numpy(scores), np.float64)
        shape = log_probs.shape
        log_probs = log_probs[:, -1] if log_probs.ndim == 3 and log_probs.shape[1] else log_probs
        if log_probs.ndim != 2 or len(log_probs) != self.rows:
            raise ValueError(
                f"step gave scores of shape {shape}; expected (rows, n, vocabulary) or (rows, vocabulary), for {self.rows} rows"
            )
        if going is not None and not going.all():
            log_probs = np.where(going[:, None], log_probs, 0.0)
        top = log_probs.max(axis=1, keepdims=True, initial=-np.inf)
        if not np.isfinite(top).all():
            raise ValueError(f"step gave scores whose largest is {top[~np.isfinite(top)][0]} in a row: no probabilities follow")
        log_probs = log_probs - top
        normalised: np.ndarray = log_probs - np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
        return normalised


def _reordered(state: Any, rows: np.ndarray, tab: Any, count: int, where: str = "state") -> Any:
    """The state with these rows of each of its arrays, each of which has ``count``."""
    if isinstance(state, Mapping):
        return {key: _reordered(x, rows, tab, count, f"{where}[{key!r}]") for key, x in state.items()}
    if isinstance(state, (list, tuple)):
        parts = [_reordered(x, rows, tab, count, f"{where}[{i}]") for i, x in enumerate(state)]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    shape = getattr(state, "shape", None)
    if shape is None or not len(shape):  # a length, None, a function
        return state
    if shape[0] != count:
        raise ValueError(
            f"{where} has shape {tuple(shape)}, whose first axis is not the {count} rows of the tokens: give reorder=, "
            "a function (state, rows) -> state"
        )
    home = tab if tab.is_array(state) else dispatch.choose(None, state=state)
    # by the host: any backend can
    return home.asarray(home.to_numpy(state)[rows], dtype=conversion.dtype_name(state), like=state)
