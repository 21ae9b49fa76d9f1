"""What `kvattn.explain` returns, and what it says of a call that no fast path of a backend serves."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvattn import bands


class Explanation(NamedTuple):
    """Which kernel serves a call, and why; ``str`` of it is a sentence."""

    backend: str
    device: str
    kernel: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend} on {self.device} serves this call by {self.kernel}: {self.why}"


def unusual(tab: Any, options: dict[str, Any], *names: str) -> str:
    """What a call asks for beyond softmax of scaled dot products; "" for nothing. ``names``: options that count if set."""
    if options["score"] is not tab.scaled_dot_score:
        return "the score is not scaled_dot_score"
    if options["normalize"] is not tab.softmax:
        return "the normaliser is not softmax"
    return next((f"{name} is asked for" for name in names if options[name]), "")


def general(
    why: str, query: Any, key: Any, *, positions: Any = None, causal: Any = False, query_offset: Any = 0, window: Any = None,
    return_weights: bool = False, **_: Any,
) -> tuple[str, str]:  # fmt: skip
    """(kernel, why) of a call that the formula itself serves, since ``why``: no fast path does.

    >>> from types import SimpleNamespace as Array
    >>> general("the normaliser is no softmax", Array(shape=(512, 8)), Array(shape=(1024, 8)), window=(10, 0))
    ('the formula, in blocks', 'the normaliser is no softmax; 2 blocks of queries, each beside the keys in its window')
    """
    if positions is not None:
        return "the formula, of selected keys", f"{why}; each query beside the {positions.shape[-1]} keys it selects"
    steps = [] if return_weights else bands.plan(query.shape[-2], key.shape[-2], causal, query_offset, window)
    if not steps:
        return "the formula", why
    return f"the formula{', in blocks' * (len(steps) > 1)}", f"{why}; {in_blocks(steps)}"


def bounded(name: str, why: str, steps: list[Any]) -> tuple[str, str]:
    """What `general` gave, of a backend that takes these blocks of queries where the formula would hold too much."""
    if name != "the formula" or not steps:
        return name, why
    return "the formula, in blocks", f"{why}; {len(steps)} blocks of queries, as many as keep memory bounded"


def in_blocks(steps: list[Any]) -> str:
    """What `bands.plan` does to a call, in words."""
    if len(steps) == 1:
        return "the queries beside the keys in their window"
    return f"{len(steps)} blocks of queries, each beside the keys in its window"


def selected(kernel: Any, select: Any, query: Any, key: Any, value: Any, **options: Any) -> tuple[str, str]:
    """What a tab's ``kernel`` says of a call with ``positions``, once its ``select`` has put each query beside its keys."""
    names = ("positions", "mask", "bias", "valid_lens", "causal", "query_offset", "window")
    positions, *where = (options.pop(name) for name in names)
    query, key, value, left = select(positions, query, key, value, *where)
    done = {"positions": None, "valid_lens": None, "causal": False, "query_offset": 0, "window": None}
    name, why = kernel(query, key, value, **options, **done, **left)
    return f"{name}, of selected keys", f"{why}; each query beside the {positions.shape[-1]} keys it selects"
