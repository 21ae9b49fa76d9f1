"""The conformance suite asked of a distributed form: of a backend whose attention is cut into parts.

    tab = backend(kvattn.backends.numpy, attention, attention_grad)
    counts = judge(tab, refuses={"positions": lambda case: "positions" in case.arguments}, wrt=("query", "key", "value"))

Every case that reaches a backend's attention is asked. One that a reason of ``refuses`` holds for must be refused by the form
itself, by an error that says that reason; every other must pass. So no case drops out in silence, and no reason is out of date.
"""

from __future__ import annotations

import types
from collections import Counter
from dataclasses import replace
from functools import cache

from kvattn import conformance

CALLS = ("attention", "split_attention", "nadaraya_watson")  # of the cases, those that reach a backend's attention
PARTS = (1, 2, 3, 4)
REFUSALS = (NotImplementedError, TypeError, ValueError)
JUDGED = "judged"


def cut(size, parts):
    """The sizes of so many parts: uneven, and the second of three or more is empty.

    >>> [cut(7, parts) for parts in PARTS]
    [[7], [2, 5], [3, 0, 4], [2, 0, 3, 2]]
    """
    shares = {1: [1], 2: [1, 2], 3: [1, 0, 1], 4: [1, 0, 1, 1]}[parts]
    ends = [size * sum(shares[: i + 1]) // sum(shares) for i in range(parts)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def backend(base, attention, attention_grad, functions=False):
    """The backend ``base``, by whose name known differences go, with these two functions in place of its own.

    They are called as a tab's are, see docs/howto/add-a-backend.md, with whole arrays of ``base``: each cuts them, gives the
    parts to the distributed form, and joins what comes back. Unless it takes ``functions``, and segments, as a
    `kvattn.pairs.Pairs`, it is given masks and biases that are arrays in their place.
    """
    raised = []

    def noted(function):
        def call(*args, **options):
            try:
                return function(*args, **options)
            except Exception as error:
                raised.append(error)
                raise

        return call

    forms = {"attention": noted(attention), "attention_grad": noted(attention_grad), "raised": raised}
    return types.SimpleNamespace(**{name: x for name, x in vars(base).items() if functions or name != "places"} | forms)


@cache
def cases():
    """The cases that reach a backend's attention."""
    return [case for case in conformance.cases() if case.call in CALLS]


def without(case, wrt):
    """The case without what no distributed form gives: weights, scores, gradients by other than ``wrt`` or through scores."""
    wrt = () if "grad_scores" in case.arguments else wrt
    arguments = {name: x for name, x in case.arguments.items() if name != "grad_scores"}
    keywords = {name: x for name, x in case.keywords.items() if name not in ("return_weights", "return_scores")}
    results = tuple(what for what in case.results if what not in ("weights", "scores"))
    answer = {
        what: x for what, x in case.answer.items() if what in (*results, *(f"grad_{name}" for name in wrt))
    }  # fmt: skip
    return replace(case, arguments=arguments, keywords=keywords, results=results, answer=answer)


def judge(tab, refuses, wrt=("query", "key", "value"), asked=None, dtypes=None):
    """How many cases passed and how many were refused, by reason; an AssertionError that names every other.

    ``refuses``: functions of a case by their reason, the first that holds counts; ``asked``: the cases, by default all.
    """
    counts, wrong = Counter(), []
    for case in cases() if asked is None else asked:
        reason = next((reason for reason, holds in refuses.items() if holds(case)), None)
        tab.raised.clear()
        report = conformance.run(tab, [without(case, wrt)], dtypes)
        if reason is None:
            nothing = [] if report.results else [f"{case.name}: nothing was computed"]
            wrong += [result.message for result in report.failures] or nothing
            counts[JUDGED] += report.ok
        else:
            said = all(isinstance(error, REFUSALS) and reason in str(error) for error in tab.raised)
            if report.passed or not said:
                wrong.append(f"{case.name} is to be refused ({reason}): {tab.raised or 'it was computed'}")
            counts[reason] += 1
    assert not wrong, f"{len(wrong)} wrong of {sum(counts.values())}:\n" + "\n".join(wrong[:20])
    return counts
