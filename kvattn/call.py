"""One description of a call of attention, which every kernel takes; and the kernel that a tab chooses for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kvattn import planning


class Call(NamedTuple):
    """What a call asks for beside query, key and value, checked by the frontend.

    A query that stands at position p = query_offset + its row may attend to the keys p - left ... p + right, where the mask,
    a bias above -inf and the valid lengths let it. ``causal`` is right = 0; None is no limit. ``stage``: which scores, as
    ``return_scores`` names them, the normaliser is given.
    """

    score: Any
    normalize: Any
    mask: Any = None
    bias: Any = None
    valid_lens: Any = None
    query_offset: Any = 0
    left: int | None = None
    right: int | None = None
    positions: Any = None
    scale: Any = None
    softcap: Any = None
    sink: Any = None
    dropout: Any = 0.0
    rng: Any = None
    return_weights: bool = False
    return_lse: bool = False
    return_scores: str | None = None
    stage: str | None = "biased"
    first_query: int = 0  # of a block: which of all queries its first one is, and which of all keys
    first_key: int = 0

    @classmethod
    def of(cls, query: Any, key: Any, *, score: Any, normalize: Any, mask: Any = None, bias: Any = None, valid_lens: Any = None,
           causal: Any = False, query_offset: Any = 0, window: tuple[int | None, int | None] | None = None,
           positions: Any = None, scale: Any = None, softcap: Any = None, sink: Any = None, dropout: Any = 0.0,
           rng: Any = None, return_weights: bool = False, return_lse: bool = False,
           return_scores: str | None = None) -> Call:  # fmt: skip
        """The description of a tab's call with these keywords of `attention`.

        Where causal and the window forbid no pair, as in decoding, they are left out: then there is no mask to build.
        """
        left, right = window or (None, None)
        right = 0 if causal else right
        call = cls(  # by place: by name it takes a microsecond more, in every call
            score, normalize, mask, bias, valid_lens, query_offset, left, right, positions, scale, softcap, sink, dropout,
            rng, return_weights, return_lse, return_scores,
        )  # fmt: skip
        return call if left is right is None else call._of_a_block(query, key)

    def _of_a_block(self, query: Any, key: Any) -> Call:
        """The same, without a window that forbids none of these queries any of these keys."""
        if not self.windowed:
            return self
        unlimited = planning.allows_all(query.shape[-2], key.shape[-2], self.query_offset, self.left, self.right)
        return self._replace(left=None, right=None) if unlimited else self

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords of `attention` that say the same."""
        options = self._asdict()
        del options["first_query"], options["first_key"], options["stage"]
        left, right = options.pop("left"), options.pop("right")
        return options | {"causal": False, "window": None if left is right is None else (left, right)}

    # ---- what is asked of it

    @property
    def windowed(self) -> bool:
        """Whether a query's position limits the keys that it may attend to."""
        return self.left is not None or self.right is not None

    @property
    def masked(self) -> bool:
        """Whether a mask, a bias or lengths, which may forbid any pair, are given."""
        return not (self.mask is None and self.bias is None and self.valid_lens is None)

    @property
    def restricted(self) -> bool:
        """Whether some pairs may be forbidden; a bias counts, since it may hold -inf."""
        return not (self.mask is self.bias is self.valid_lens is self.left is self.right is None)

    @property
    def from_the_first(self) -> bool:
        """Whether query i is known to stand at key i."""
        return type(self.query_offset) is int and self.query_offset == 0

    @property
    def only_causal(self) -> bool:
        """Whether query i attends to the keys up to i and nothing else is forbidden: what frameworks call ``is_causal``."""
        return self.right == 0 and self.left is None and self.from_the_first and not self.masked

    def lengths_per_query(self, axes: int) -> bool:
        """Whether each query has a valid length of its own, not each batch entry; ``axes``: of the query."""
        return self.valid_lens is not None and len(self.valid_lens.shape) == (2 if axes > 2 else 1)

    def beyond_softmax(self, tab: Any, *names: str) -> str:
        """What it asks for beyond softmax of scaled dot products, in words; "" for nothing. ``names``: options that count."""
        if self.score is not tab.scaled_dot_score:
            return "the score is not scaled_dot_score"
        if self.normalize is not tab.softmax:
            return "the normaliser is not softmax"
        for name in names:
            if getattr(self, name):
                return f"{name} is asked for"
        return ""

    # ---- blocks of queries

    def leaves_none_out(self, n: object, m: object) -> bool:
        """Whether the window leaves each query a key and each key a query; False where a size or the offset is unknown."""
        return planning.leaves_none_out(n, m, self.query_offset, self.left, self.right)

    def window_blocks(self, n: object, m: object) -> list[planning.Block]:
        """Blocks (first query, end, first key, end) that hold every pair in the window; [] where they would save nothing."""
        return planning.window_blocks(n, m, self.query_offset, self.left, self.right) if self.windowed else []

    def cut(self, blocks: list[planning.Block], query: Any, key: Any, value: Any) -> Iterator[tuple[Any, Any, Any, Call]]:
        """Each block's own query, key, value and call: slices, with lengths and offset counted from its first key.

        A query by itself is given the keys in its window only: there is no mask to build then.
        """
        where = {name: getattr(self, name) for name in ("mask", "bias", "valid_lens", "query_offset", "sink")}
        cuts = planning.cut(blocks, query, key, value, **where)
        for (start, _, first, _), (arrays, at) in zip(blocks, cuts, strict=True):
            at |= {"first_query": self.first_query + start, "first_key": self.first_key + first}
            yield *arrays, self._replace(**at)._of_a_block(*arrays[:2])

    def of_selected_keys(self, mask: Any, bias: Any, rng: Any = None) -> Call:
        """The call once each query lies beside the keys that ``positions`` selects; ``mask``: those it may attend to."""
        everywhere = self._replace(valid_lens=None, query_offset=0, left=None, right=None, positions=None)
        return everywhere._replace(mask=mask, bias=bias, rng=rng)

    def of_scores(self, normalize: Callable[..., Any]) -> Call:
        """The call whose weights are the scores that are asked for; ``normalize``: it leaves them as they are.

        A bias still says who may attend where it is not added, so that it is kept.
        """
        return self._replace(
            normalize=normalize, softcap=None if self.return_scores == "raw" else self.softcap, sink=None, dropout=0.0,
            rng=None, return_weights=True, return_lse=False, return_scores=None, stage=self.return_scores,
        )  # fmt: skip

    @property
    def adds_bias(self) -> bool:
        """Whether the bias is added to the scores that the normaliser is given."""
        return self.bias is not None and self.stage == "biased"

    # ---- what attention returned

    def joined(self, parts: Sequence[Any], concatenate: Callable[[Any, int], Any]) -> Any:
        """The results of all queries, of those of each block; ``concatenate``: the framework's, (arrays, axis) -> array."""
        if not isinstance(parts[0], tuple):
            return concatenate(parts, -2)
        axes = [-2] * (1 + self.return_weights) + [-1] * self.return_lse
        return tuple(concatenate(x, axis) for x, axis in zip(zip(*parts, strict=True), axes, strict=True))

    def without_query_axis(self, results: Any) -> Any:
        """The results (..., n, 1, c), and lse (..., n, 1), of each query by itself, as those of all: (..., n, c), (..., n)."""
        if not isinstance(results, tuple):
            return results[..., 0, :]
        axes = [-2] * (1 + self.return_weights) + [-1] * self.return_lse
        return tuple(x[..., 0] if axis == -1 else x[..., 0, :] for x, axis in zip(results, axes, strict=True))


class Choice(NamedTuple):
    """The kernel that a tab chose for a call: its name and why, for users; and how it serves the call, for the tab.

    ``blocks``: the parts of the call that it serves one after another, blocks of queries or others; none for one. ``run``: a
    function (query, key, value, call, blocks) -> the results of attention. ``run_grad``: (query, key, value, grad_output, wrt,
    call) -> the gradients, where the kernel has its own and the framework cannot differentiate it. ``compares_segments``: it
    takes a `kvattn.pairs.Segments` for a mask.
    """

    kernel: str
    why: str
    blocks: Sequence[Any] = ()
    run: Callable[..., Any] | None = None
    run_grad: Callable[..., Any] | None = None
    compares_segments: bool = False

    def in_window(self, blocks: Sequence[Any], run: Callable[..., Any]) -> Choice:
        """The same kernel for each block of `Call.window_blocks`, which ``run`` goes through."""
        if len(blocks) > 1:
            return self.in_blocks(blocks, run, "each beside the keys in its window")
        return Choice(self.kernel, f"{self.why}; the queries beside the keys in their window", blocks, run)

    def in_blocks(self, blocks: Sequence[Any], run: Callable[..., Any], what: str = "as many as keep memory bounded") -> Choice:
        """The same kernel for each of these blocks of queries; ``what``: they are, in words."""
        return Choice(f"{self.kernel}, in blocks", f"{self.why}; {len(blocks)} blocks of queries, {what}", blocks, run)

    def with_scores(self, tab: Any) -> Choice:
        """The same kernel, and the scores beside what it gives: the weights of a call of ``tab`` that makes none of them."""
        attend = self.run
        assert attend is not None

        def run(query: Any, key: Any, value: Any, call: Call, blocks: Sequence[Any]) -> Any:
            results = attend(query, key, value, call._replace(return_scores=None), blocks)
            wide = tab._wide(query), tab._wide(key), tab._wide(value)[..., :0]
            scores = tab._attend(*wide, call.of_scores(tab._scored))[1]
            return (*(results if isinstance(results, tuple) else (results,)), scores)

        return self._replace(why=f"{self.why}; the scores beside it", run=run)

    def of_selected_keys(self, selected: object, run: Callable[..., Any]) -> Choice:
        """The same kernel for each query beside the keys that it selects, so many."""
        why = f"{self.why}; each query beside the {selected} keys it selects"
        return Choice(f"{self.kernel}, of selected keys", why, (), run)


class Explanation(NamedTuple):
    """What `kvattn.explain` returns: which kernel serves a call, and why; ``str`` of it is a sentence."""

    backend: str
    device: str
    kernel: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend} on {self.device} serves this call by {self.kernel}: {self.why}"
