"""Break any one promise in a tab and the conformance suite turns red: a mutant is a tab's source with one text replaced.

A row of a table: what the mutant does wrong, the text that is replaced, what replaces it, and optionally the group of
cases that should notice first. The first table holds lines that stand in all five tabs, word for word.
"""

import os
import sys
import types
from functools import cache
from pathlib import Path

import pytest
from conftest import chosen

import kvattn
from kvattn import conformance, dispatch

PACKAGE = Path(kvattn.__file__).parent
TABS = ("numpy", "torch", "tensorflow", "jax", "mxnet")
HIDE = "query, key, value = _hide_padding(allowed, query, key, value)"

EVERYWHERE = [
    ("ignores the scale", "scores = call.scale * (dot_score", "scores = 1.0 * (dot_score", "scale"),
    ("ignores causal", "right = 0 if causal else right", "right = right", "causal"),
    ("is off by one in query_offset", "return query_offset + ", "return query_offset + 1 + ", "causal"),
    ("drops the bias", "return scores + _wide(call.bias) if call.adds_bias else scores", "return scores", "bias"),
    ("adds the bias to raw scores", "if call.adds_bias else", "if call.bias is not None else", "scores out"),
    ("caps raw scores", 'None if self.return_scores == "raw" else self.softcap', "self.softcap", "scores out"),
    ("returns scores of what may not attend", "call.of_scores(tab._scored)", "call.of_scores(tab.identity)", "scores out"),
    ("inverts the mask", "[] if call.mask is None else [call.mask]", "[] if call.mask is None else [~call.mask]", "masks"),
    ("leaks NaN", HIDE, "pass", "padding"),
    ("lets key valid_lens in", "keys < _lengths(call.valid_lens, ndim)", "keys <= _lengths(call.valid_lens, ndim)", "lengths"),
    (
        "projects values as keys",
        'value = tab._split(tab._project(value, params, "v")',
        'value = tab._split(tab._project(value, params, "k")',
        "multi-head",
    ),
    ("forgets the biases of heads", "return x if b is None else", "return x if True else", "multi-head"),
    ("leaks NaN into projections", "hidden = _hide_padding(allowed, *(", "hidden = _hide_padding(None, *(", "multi-head"),
    ("turns the other way", "[-sin, sin]", "[sin, -sin]", "rotary"),
    ("takes features beside each other for halves", "    if interleaved:\n", "    if not interleaved:\n", "rotary"),
    ("lets a sink take nothing", "return left[..., None], ", "return 1.0, ", "sink"),
    ("drops and makes up for nothing", "weights / (1 - rate)", "weights", "dropout"),
    ("drops the same in every block of queries", '"first_query": self.first_query + start', '"first_query": 0', "dropout"),
    ("drops the same in every block of keys", '"first_key": self.first_key + first', '"first_key": 0', "dropout"),
    ("forgets where a cached query stands", "cache.length - query.shape[-2]", "0", "decoding"),
]

NUMPY = [
    ("ignores sqrt(d)", "return dot_score(query, key) / math.sqrt(query.shape[-1] or 1)", "return dot_score(query, key)"),
    ("divides by no features", "math.sqrt(query.shape[-1] or 1)", "np.sqrt(query.shape[-1])", "shapes"),
    ("ignores query_offset", "return query_offset + ", "return 0 * query_offset + ", "causal"),
    ("does not forbid where the bias is -inf", "allowed.append(call.bias != -math.inf)", "pass", "bias"),
    (
        "masks after the softmax",
        "call.normalize(scores, where=allowed), None",
        "call.normalize(scores) if allowed is None else (call.normalize(scores) * allowed).astype(scores.dtype), None",
        "masks",
    ),
    (
        "puts the lse before the mask",
        "weights, lse = _softmax_lse(scores, allowed)",
        "weights, lse = call.normalize(scores, where=allowed), _softmax_lse(scores, None)[1]",
        "masks",
    ),
    (
        "gives empty rows uniform weights",
        "weights = (shifted / total)",
        "weights = ((shifted + empty / scores.shape[-1]) / total)",
        "empty rows",
    ),
    ("gives empty rows an lse of 0", "lse = np.where(empty, -math.inf,", "lse = np.where(empty, 0,", "empty rows"),
    (
        "caps after the bias",
        "    if call.softcap is not None:\n        scores = call.softcap * np.tanh(scores / call.softcap)\n"
        "    return scores + _wide(call.bias) if call.adds_bias else scores",
        "    scores = scores + _wide(call.bias) if call.adds_bias else scores\n"
        "    return scores if call.softcap is None else call.softcap * np.tanh(scores / call.softcap)",
        "softcap",
    ),
    ("ignores softcap", "scores = call.softcap * np.tanh(scores / call.softcap)", "pass", "softcap"),
    ("subtracts no maximum", "np.where(top == -math.inf, 0, top)", "np.where(top == -math.inf, 0, 0)", "large scores"),
    (
        "subtracts no maximum where all rows share it",
        "np.subtract(shifted, top, out",
        "np.subtract(shifted, 0, out",
        "large scores",
    ),
    ("gives all pairs weight where scores are small", "np.multiply(weights, where, out=weights)", "weights", "masks"),
    ("divides by the sum of an empty row", "else np.maximum(total, LEAST, out=total)", "else total", "empty rows"),
    ("takes no maximum off large scores", "NEAR = 80", "NEAR = 1e9", "large scores"),
    ("lets rows far below the largest lose digits", "SMALL = 2.0**-64", "SMALL = 0", "large scores"),
    ("forgets the maximum in lse", "np.log(total) + top", "np.log(total)", "plain"),
    ("leaks NaN from keys", "np.where(_flags_of_rows(has_query, key.shape), key, 0)", "key", "padding"),
    ("leaks NaN from values", "np.where(_flags_of_rows(has_query, value.shape), value, 0)", "value", "padding"),
    ("leaks NaN from queries", "np.where(_flags_of_rows(has_key, query.shape), query, 0)", "query", "padding"),
    (
        "hides one key too many",
        "has_query, has_key = allowed.any(axis=-2), allowed.any(axis=-1)",
        "has_query, has_key = allowed.all(axis=-2), allowed.any(axis=-1)",
        "masks",
    ),
    ("cleans its arguments in place", HIDE, f"np.copyto(value, 0, where=np.isnan(value)); {HIDE}", "padding"),
    (
        "writes its mask into the scores",
        "return _softmax_lse(scores, where, with",
        "where is None or np.copyto(scores, -1e4, where=~where)\n    return _softmax_lse(scores, where, with",
        "normalisers",
    ),
    (
        "scales the query in place",
        "    query = _fold(query, kv_heads)\n",
        "    query = _fold(query, kv_heads)\n    query *= 2; call = call._replace(scale=(call.scale or 1) / 2)\n",
    ),
    ("returns float32 for half", "_unfold(output, heads, n).astype(dtype, copy=False)", "_unfold(output, heads, n)"),
    ("returns weights in float32 for half", "[weights.astype(dtype, copy=False)]", "[weights]"),
    ("returns lse in half", "+ [lse] * call.return_lse", "+ [lse if lse is None else lse.astype(dtype)] * call.return_lse"),
    (
        "returns a list",
        "return tuple(results) if len(results) > 1 else output",
        "return tuple(results) if len(results) > 1 else output.tolist()",
    ),
    (
        "multiplies in half",
        "return _wide(query) @ _wide(key).swapaxes(-1, -2)",
        "return _wide(query @ key.swapaxes(-1, -2))",
        "half precision",
    ),
    (
        "keeps scores in half",
        "    scores = _scores(query, key, call)\n",
        "    scores = _scores(query, key, call).astype(dtype)\n    scores = _wide(scores)\n",
        "half precision",
    ),
    (
        "computes the softmax in half",
        "call.normalize(scores, where=allowed), None",
        "call.normalize(scores.astype(dtype), where=allowed).astype(scores.dtype), None",
        "half precision",
    ),
    (
        "computes in float32 for float64",
        "    scores = _wide(scores)\n    few_scores",
        "    scores = _wide(scores).astype(np.float32)\n    few_scores",
    ),
    ("looks one key too far left", "ahead >= -left", "ahead >= -left - 1", "window"),
    ("looks one key too near right", "(ahead <= right)", "(ahead < right)", "window"),
    (
        "takes valid_lens 0 for 1",
        "keys < _lengths(call.valid_lens, ndim)",
        "keys < np.maximum(_lengths(call.valid_lens, ndim), 1)",
        "empty rows",
    ),
    (
        "shares heads in turn, not in groups",
        "    return x.reshape(*x.shape[:-3], heads, x",
        "    x = x.reshape(*x.shape[:-3], -1, heads, *x.shape[-2:]).swapaxes(-4, -3).reshape(x.shape)\n"
        "    return x.reshape(*x.shape[:-3], heads, x",
        "grouped heads",
    ),
    (
        "shares selected heads in turn",
        "x = np.repeat(x, lead[-1] // x.shape[-3], axis=-3)",
        "x = np.concatenate([x] * (lead[-1] // x.shape[-3]), axis=-3)",
        "positions",
    ),
    ("counts positions twice", "& ~_repeated(index)", "", "positions"),
    ("takes position -1 for a key", "(index >= 0) & ", "", "positions"),
    (
        "merges without weights",
        "(weights * np.where(weights == 0, 0, _wide(outputs)))",
        "(_wide(outputs) / outputs.shape[-2])",
        "merging",
    ),
    ("forgets b", "    if b is not None:\n        hidden = hidden + _wide(b)\n", "", "scores"),
    ("multiplies by W transposed", "(_wide(query) @ _wide(W))", "(_wide(query) @ _wide(W).T)", "scores"),
    (
        "swaps the gate's halves",
        "(query @ w_g[:d])[..., :, None] + (key @ w_g[d:])[..., None, :]",
        "(query @ w_g[d:])[..., :, None] + (key @ w_g[:d])[..., None, :]",
        "scores",
    ),
    (
        "takes no root in cosine",
        "x / np.sqrt(np.where(squares == 0, 1, squares))",
        "x / np.where(squares == 0, 1, squares)",
        "scores",
    ),
    (
        "cancels in distances",
        "return (difference * difference).sum(axis=-1)",
        "q, k = _wide(query), _wide(key)\n"
        "    return (q * q).sum(-1)[..., :, None] + (k * k).sum(-1)[..., None, :] - 2 * dot_score(q, k)",
        "scores",
    ),
    (
        "takes the triangular kernel for Epanechnikov's",
        "return np.maximum(1 - _squared_distance(query, key) /",
        "return np.maximum(1 - np.sqrt(_squared_distance(query, key)) /",
        "scores",
    ),
    ("compares squares with a width", "(distance < width * width)", "(distance < width)", "scores"),
    ("takes the last of equals", ".argmax(axis=-1)", "[..., ::-1].argmax(axis=-1) * -1 + scores.shape[-1] - 1", "pooling"),
    (
        "averages over padding",
        "identity(np.ones(scores.shape, _wide(scores).dtype), where)",
        "np.ones(scores.shape, _wide(scores).dtype)",
    ),
    ("divides by a sum of 0", "wide / np.where(total == 0, math.inf, total)", "wide / total", "normalisers"),
    ("leaves NaN where nothing may look", "else identity(weights, where), lse", "else weights, lse", "normalisers"),
    ("leaves NaN in proportions", "else identity(weights, where)).astype", "else weights).astype", "normalisers"),
    ("thresholds too early", "(1 + ranks * ordered > sums)", "(0.5 + ranks * ordered > sums)", "normalisers"),
]

ELSEWHERE = [
    ("kernels/numpy/gradients.py", "gives the values no gradient", '"value": kept_weights @', '"value": 0 * kept_weights @'),
    (
        "kernels/numpy/gradients.py",
        "transposes a gradient",
        '{"query": grad @ key, "key": _t(grad) @ query}',
        '{"query": grad @ key, "key": -_t(grad) @ query}',
    ),
    (
        "kernels/numpy/gradients.py",
        "forgets a softmax's sum",
        "weights * (grad - (weights * grad).sum(axis=-1, keepdims=True))",
        "weights * grad",
    ),
    ("kernels/numpy/gradients.py", "forgets the cap in gradients", "grad_scores * (1 - capped * capped)", "grad_scores"),
    ("kernels/numpy/gradients.py", "forgets the scale in gradients", "grad_scores = grad_scores * scale", "pass"),
    ("kernels/numpy/gradients.py", "forgets the sink in gradients", "left * weights", "weights"),
    ("kernels/numpy/gradients.py", "turns the gradient by the sink round", "0, -weight * delta)", "0, weight * delta)"),
    ("kernels/numpy/few.py", "lets NaN of few numbers leak", "if not tiles.small(x)", "if False"),
    ("kernels/numpy/few.py", "lets NaN of a bias leak", "not tiles.small(slope)", "False"),
    ("kernels/numpy/few.py", "ignores the scale of few scores", "scores *= call.scale", "pass"),
    (
        "kernels/numpy/few.py",
        "ignores the softcap of few scores",
        "scores = call.softcap * np.tanh(scores / call.softcap)",
        "pass",
    ),
    ("kernels/numpy/few.py", "ignores the bias of few scores", "scores += call.bias", "pass"),
    ("kernels/numpy/few.py", "forgets the scale in gradients of few scores", "slope * call.scale", "slope"),
    (
        "kernels/numpy/few.py",
        "forgets the sum in gradients of few scores",
        "slope -= (weights * slope)",
        "slope -= (0 * slope)",
    ),
    ("kernels/numpy/few.py", "gives the bias of few scores no gradient", '"bias": slope}', '"bias": 0 * slope}'),
    ("kernels/numpy/few.py", "caps few scores in gradients", "call.softcap is not None or value", "value"),
    ("planning.py", "gives each block the sinks of all queries", "sink[..., start:end, :]", "sink[..., : end - start, :]"),
    ("planning.py", "cuts a block too short", "offset + end + right", "offset + end - 1 + right"),
    ("planning.py", "counts a block's offset from 0", "query_offset + start - first", "query_offset - first"),
    ("planning.py", "lets every query see one key too far", "m - 1 - offset <= right", "m - 2 - offset <= right"),
    ("planning.py", "asks the window of the first query only", "offset + n - 1 > left", "offset > left"),
]


def altered(file, name, old, new):
    """A module of ``file``'s source with ``old`` replaced, which must stand there."""
    source = (PACKAGE / file).read_text()
    assert old in source, f"{file} no longer holds {old!r}"
    module = types.ModuleType(name)
    module.__file__ = str(PACKAGE / file)
    sys.modules[name] = module  # the tabs look themselves up
    exec(compile(source.replace(old, new), str(PACKAGE / file), "exec"), module.__dict__)
    return module


def mutate_kernels(monkeypatch, backend, old, new):
    """Makes the backend's tiles anew, altered, and puts them in their place."""
    tab, name = dispatch.load(backend), f"kvattn.kernels.{backend}.tiles"
    sound = sys.modules[name]
    monkeypatch.setitem(sys.modules, name, sound)
    module = altered(f"kernels/{backend}/tiles.py", name, old, new)
    monkeypatch.setattr(sys.modules[f"kvattn.kernels.{backend}"], "tiles", module)
    (known,) = (at for at, x in vars(tab).items() if x is sound)
    monkeypatch.setattr(tab, known, module)
    return module


def mutant(backend, old, new):
    dispatch.load(backend)
    tab = altered(f"backends/{backend}.py", f"kvattn_mutants.{backend}", old, new)
    if backend == "mxnet":
        tab.views = types.SimpleNamespace(**{**vars(tab.views), "obstacle": lambda *_: "it is a mutant"})  # NumPy would answer
    if backend == "numpy":  # few scores would go another way
        beside(
            tab, "gradients", altered("kernels/numpy/gradients.py", "kvattn_mutants.gradients", "import math", "import math")
        )
        beside(tab, "few", types.SimpleNamespace(serves=lambda *_: False))
    if backend == "tensorflow":
        tab.few_pairs = types.SimpleNamespace(allowed=lambda *_: None)  # the same
    return tab


def beside(tab, name, module):
    """Puts a module of the kernels in its place in NumPy's tab, and in the gradients beside it."""
    setattr(tab, name, module)
    tab.gradients.few = tab.few


@cache
def cases():
    return tuple(conformance.cases())


def notices(tab, group=None):
    """Whether a case turns red, and not for a mistake in the mutant; those of ``group`` are asked first."""
    for case in sorted(cases(), key=lambda case: case.group != group):
        if any("Error: " not in result.message for result in conformance.run(tab, [case]).failures):
            return True
    return False


@pytest.fixture(autouse=True)
def _forget():
    yield
    for name in [name for name in sys.modules if name.startswith("kvattn_mutants.")]:
        del sys.modules[name]


def rows(table):
    return [pytest.param(*row, id=row[0]) for row in ((*row, None)[:4] for row in table)]


def test_the_unmutated_source_passes():
    report = conformance.run(mutant("numpy", "import math", "import math"), cases())
    assert not report.failures
    assert report.backend == "numpy"


@pytest.mark.parametrize(("wrong", "old", "new", "group"), rows(NUMPY))
def test_a_numpy_tab_that(wrong, old, new, group):
    assert notices(mutant("numpy", old, new), group)


@pytest.mark.parametrize(("file", "wrong", "old", "new"), [pytest.param(*row, id=row[1]) for row in ELSEWHERE])
def test_a_numpy_tab_beside_which(file, wrong, old, new):
    tab = mutant("numpy", "import math", "import math")
    if file == "planning.py":
        call = altered("call.py", "kvattn_mutants.call", "import planning", "import planning")
        call.planning = altered(file, "kvattn_mutants.planning", old, new)
        tab.Call = call.Call
    else:
        beside(tab, Path(file).stem, altered(file, f"kvattn_mutants.{Path(file).stem}", old, new))
    assert notices(tab, "blocks" if file == "planning.py" else "plain")


def everywhere():
    """(tab, row): every row of NumPy's tab, and of one of the others, in turn; with KVATTN_EVERY of all. The text stands in all
    five, and the cases are the same."""
    others = [name for name in TABS if name != "numpy"]
    for tab in chosen():
        for number, row in enumerate(EVERYWHERE):
            if tab == "numpy" or others[number % len(others)] == tab or "KVATTN_EVERY" in os.environ:
                yield pytest.param(tab, *row, id=f"{tab}-{row[0]}")


@pytest.mark.parametrize(("backend", "wrong", "old", "new", "group"), [*everywhere()])
def test_any_tab_that(backend, wrong, old, new, group):
    file = next((file for file in ("call.py", "multihead.py") if old in (PACKAGE / file).read_text()), None)
    if file is not None:
        tab, module = mutant(backend, "import math", "import math"), altered(file, f"kvattn_mutants.{file[:-3]}", old, new)
        if file == "call.py":
            tab.Call, tab.Choice = module.Call, module.Choice
        else:
            tab.multihead = module
    else:
        tab = mutant(backend, old, new)
    assert notices(tab, group)


DETACHED = {  # the scores that are returned, as constants
    "torch": "scores.detach()", "jax": "__import__('jax').lax.stop_gradient(scores)",
    "tensorflow": "__import__('tensorflow').stop_gradient(scores)",
    # MXNet refuses to differentiate what detach() has taken out of its graph.
    "mxnet": "__import__('mxnet').nd.BlockGrad(scores.as_nd_ndarray()).as_np_ndarray()",
}  # fmt: skip


@pytest.mark.parametrize("backend", [name for name in TABS if name in chosen()])
def test_a_tab_that_lets_no_gradient_through_scores(backend):
    tab = mutant(backend, "import math", "import math")
    if backend == "numpy":
        through = "grad_scores = grad_scores + by_scores", "pass"
        beside(tab, "gradients", altered("kernels/numpy/gradients.py", "kvattn_mutants.gradients", *through))
    else:
        returned = "(results,)), scores)", f"(results,)), {DETACHED[backend]})"
        module = altered("call.py", "kvattn_mutants.call", *returned)
        tab.Call, tab.Choice = module.Call, module.Choice
    failures = conformance.run(tab, [case for case in cases() if case.name == "a loss of raw scores"]).failures
    assert {failure.what for failure in failures} == {"grad_query", "grad_key"}
