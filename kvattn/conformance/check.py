"""Run cases on a backend, through the public API, and judge every result. Needs no pytest."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

import kvattn
from kvattn import checks, conversion, dispatch, layers, registry
from kvattn.conformance import functions, mistakes, native, tolerance
from kvattn.conformance.cases import DTYPES, NOT_FINITE, Case
from kvattn.conformance.known_differences import difference

FUNCTIONS = ("score", "normalize", "kernel")  # keywords that name a function of kvattn
PROJECTED = ("multi_head_attention", "self_attention", "decoding")
OUTPUT_ONLY = "output alone"  # the output of a call that returns neither weights nor lse: a tab may take another path to it
# A message that begins so, with the keyword or the reason after it, is no failure of a third party's backend.
NOT_OFFERED, REFUSED = "not offered: ", "refused: "
LACKS = "its asarray makes no {}: cases in that dtype are asked in float32"
EXPLAINED = 20  # failures of a report that are explained: each explanation takes a dozen answers of the oracle


@dataclass(frozen=True)
class Result:
    """One quantity of one case in one dtype; errors in units of eps (see tolerance.py)."""

    case: str
    group: str
    dtype: str
    what: str
    error: float
    allowed: float
    passed: bool
    message: str = ""


@dataclass(frozen=True)
class Agreement:
    """Two backends compared, live: the worst of every quantity that both computed."""

    error: float
    allowed: float
    passed: bool
    compared: int
    message: str = ""


@dataclass
class Report:
    """What a backend did on a set of cases."""

    backend: str
    version: str = ""
    device: str = ""
    results: list[Result] = field(default_factory=list)
    outputs: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)
    tolerances: dict[tuple[str, str, str], tuple[float, float]] = field(default_factory=dict)  # (unit, allowed)
    excused: list[str] = field(default_factory=list)  # the rows of known_differences.py that applied
    suite: str = ""  # the version of the cases: two results with the same one were asked the same

    @property
    def not_offered(self) -> list[Result]:
        return [r for r in self.results if r.message.startswith(NOT_OFFERED)]

    @property
    def refused(self) -> list[Result]:
        """What a third party's backend answered with a NotImplementedError, whose text follows in the message."""
        return [r for r in self.results if r.message.startswith(REFUSED)]

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if not r.passed and not r.message.startswith((NOT_OFFERED, REFUSED))]

    @property
    def failed(self) -> int:
        return len({r.case for r in self.failures})

    @property
    def passed(self) -> int:
        return len({r.case for r in self.results if r.passed} - {r.case for r in self.failures})

    @property
    def ok(self) -> bool:
        return bool(self.passed) and not self.failures

    @property
    def worst_value(self) -> float:
        return max((r.error for r in self.results if not r.what.startswith("grad_")), default=0.0)

    @property
    def worst_gradient(self) -> float:
        return max((r.error for r in self.results if r.what.startswith("grad_")), default=0.0)


class Wrong(Exception):
    """A promise that a result breaks, other than by its numbers."""


def run(backend: Any, cases: Sequence[Case] | None = None, dtypes: Sequence[str] | None = None,
        progress: Callable[[str], None] | None = None, device: str | None = None) -> Report:  # fmt: skip
    """Run the cases on a backend: a name, or a backend itself (a third party's too). Raises only if it does not load.

    Given a ``device``, "cpu", "cuda", "cuda:1", the arrays lie there, and so must the results; ValueError, saying what is
    there, if it is not. By default they lie where the backend puts new arrays.

    Given ``dtypes``, each case runs in all of them that hold its inputs exactly, with and without weights and lse;
    by default one dtype and one way stand for the rest, in turn.

    >>> run("numpy", dtypes=["float64"]).ok
    True
    """
    from kvattn.conformance import suite

    cases = suite.cases() if cases is None else cases
    tab: Any = registry.load(backend) if isinstance(backend, str) else backend
    called = backend if isinstance(backend, str) else getattr(tab, "__name__", type(tab).__name__).rpartition(".")[2]
    name = registry.canonical(called)
    version = device_name = ""
    with suppress(Exception):  # a third party's backend without a version is judged all the same
        version, device_name = as_promised(tab.describe(), ("version", "device"))
    if device is not None:
        device = dispatch.device(tab, device)
        device_name = tab.devices()[device]
    report = Report(name, str(version), str(device_name), suite=suite.version(cases))
    with dispatch.on(tab, device) as like:
        array_device = ""
        with suppress(Exception):  # if asarray of a third party's backend fails, each case will say so
            array_device = _device_of(tab.asarray(np.zeros(()), like=like))
        _run(tab, name, cases, dtypes, progress, report, like, array_device, must_match=device is not None)
    return report


def _run(tab: Any, name: str, cases: Sequence[Case], dtypes: Sequence[str] | None, progress: Callable[[str], None] | None,
         report: Report, like: Any, array_device: str, must_match: bool) -> None:  # fmt: skip
    """``array_device``: where arrays lie; ``must_match``: whether results must lie there, too."""
    dtypes_asked = () if _is_ours(tab) else (dtype for dtype in DTYPES if dtype != "float32")
    lacks = {dtype: LACKS.format(dtype) for dtype in dtypes_asked if not _makes(tab, dtype, like)}
    for case in cases:
        if progress is not None:
            progress(case.name)
        wanted = case.usual if dtypes is None else [dtype for dtype in dtypes if dtype in case.dtypes]
        excuses = {dtype: row for dtype in wanted if (row := difference(name, dtype, case.name, case.group, array_device))}
        reasons = {row.reason for row in excuses.values()} | {lacks[dtype] for dtype in wanted if dtype in lacks}
        report.excused += sorted(reasons - {*report.excused})
        supported = [dtype for dtype in wanted if dtype not in excuses and dtype not in lacks]
        if not supported and dtypes is None and "float32" in case.dtypes:  # a case whose dtype is missing is run in float32
            supported = [] if difference(name, "float32", case.name, case.group, array_device) else ["float32"]
        for dtype in supported:
            _judge(
                tab,
                case,
                dtype,
                report,
                thorough=dtypes is not None,
                like=like,
                array_device=array_device if must_match else None,
            )


def pairwise(reports: Sequence[Report]) -> dict[tuple[str, str], Agreement]:
    """Every two backends' live results against each other: each may be off by its allowance, so two by twice it."""
    return {(a.backend, b.backend): _agreement(a, b) for i, a in enumerate(reports) for b in reports[i + 1 :]}


def _agreement(a: Report, b: Report) -> Agreement:
    worst = (0.0, 0.0, 1.0, "")
    shared = [at for at in a.outputs if at in b.outputs]
    for at in shared:
        unit, allowed = a.tolerances[at]
        error = _largest_difference(a.outputs[at], b.outputs[at], unit)
        worst = max(worst, (error / (2 * allowed), error, 2 * allowed, " ".join(at)))
    share, error, allowed, where = worst
    return Agreement(error, allowed, share <= 1, len(shared), where if share > 1 else "")


# ---- one case in one dtype


def _judge(tab: Any, case: Case, dtype: str, report: Report, thorough: bool, like: Any, array_device: str | None) -> None:
    def result(what: str, error: float, allowed: float, message: str = "") -> None:
        passed = not message and error <= allowed
        report.results.append(Result(case.name, case.group, dtype, what, error, allowed, passed, message))

    if missing := _missing(tab, case):
        result("output", 0.0, 0.0, NOT_OFFERED + ", ".join(missing))
        return
    grad = "multi_head_attention_grad" if case.call in PROJECTED else "attention_grad"
    if _wrt(case) and (lacks := _missing_of_gradients(tab, case, grad)):  # the output is judged all the same
        result("gradients", 0.0, 0.0, NOT_OFFERED + lacks)
        case = replace(case, answer={what: x for what, x in case.answer.items() if not what.startswith("grad_")})
    try:
        try:
            got = _call(tab, case, dtype, thorough, like)
        except Warning as warning:  # the result is judged, too: it may explain the warning
            message = f"{type(warning).__name__}: {warning} (every warning is an error here)"
            result("warnings", np.inf, 0.0, f"{case.name} {dtype}: {message}")
            got = _call(tab, case, dtype, thorough, like, "ignore")
    except Exception as error:
        if isinstance(error, NotImplementedError) and not _is_ours(tab):
            result("output", 0.0, 0.0, f"{REFUSED}{error}")
        else:
            result("output", np.inf, 0.0, f"{case.name} {dtype}: {type(error).__name__}: {error}")
        return
    answer, magnitude = dict(case.answer), dict(case.magnitude)
    if OUTPUT_ONLY in got:
        answer[OUTPUT_ONLY], magnitude[OUTPUT_ONLY] = answer["output"], magnitude["output"]
    for what in got:
        want = answer[what]
        promised = tolerance.result_dtype(case.call, what, dtype)
        allowed = tolerance.allowed(what, promised, case.largest_score, 1 + len(case.keywords.get("splits", ())))
        unit = tolerance.unit(promised, magnitude[what])
        try:
            x = _plain(tab, got[what], what, want.shape, promised)
            if array_device is not None and _device_of(got[what]) != array_device:
                raise Wrong(f"lies on {_device_of(got[what])}, the arguments on {array_device}")
        except Exception as error:
            result(what, np.inf, allowed, f"{case.name} {dtype}: {what}: {error}")
            continue
        x = np.where(
            (want == np.inf) & ~np.isfinite(x), want, x
        )  # where the answer is inf, any number that is not finite is right
        x = np.where(case.judged.get("output" if what == OUTPUT_ONLY else what, True), x, want)
        report.outputs[case.name, dtype, what] = x
        report.tolerances[case.name, dtype, what] = (unit, allowed)
        off = _largest_difference(x, want, unit)
        explained = off > allowed and len(report.failures) < EXPLAINED
        message = f"{case.name} {dtype}: {what} is off by {off:.4g} eps, {allowed:.4g} allowed" if off > allowed else ""
        result(what, off, allowed, message + _hint(case, what, dtype, (x, want), unit, allowed) if explained else message)


def _hint(case: Case, what: str, dtype: str, both: tuple[np.ndarray, np.ndarray], unit: float, allowed: float) -> str:
    """Where a result is wrong, and which mistake gives the same. ``both``: the result and the answer."""
    with suppress(Exception), np.errstate(all="ignore"):  # a hint that fails must not change the judgement
        return "; " + mistakes.words(case, what, dtype, *both, lambda x, y: _differences(x, y, unit) <= allowed)
    return ""


def _is_ours(tab: Any) -> bool:
    return str(getattr(tab, "__name__", "")).startswith("kvattn.backends.")


def _makes(tab: Any, dtype: str, like: Any) -> bool:
    """Whether the backend has arrays of this dtype: a framework need have float32 alone."""
    try:
        tab.asarray(np.zeros(1), dtype=dtype, like=like)
    except Exception:
        with suppress(Exception):
            tab.asarray(np.zeros(1), dtype="float32", like=like)
            return False
    return True  # where float32 fails as well, every case will say so


def _missing(tab: Any, case: Case) -> list[str]:
    """The functions that this case needs and a third party's backend lacks. Ours have all of them, or fail."""
    if _is_ours(tab):
        return []
    if case.call in layers.LAYERS:
        return [case.call]
    needed = {case.call.removeprefix("split_")}
    if case.call in PROJECTED:
        needed = {"self_attention" if case.call == "self_attention" else "multi_head_attention"}
        return sorted(
            name
            for name in needed | ({"write"} if case.call == "decoding" else set())
            if not callable(getattr(tab, name, None))
        )
    if case.call == "nadaraya_watson":
        needed = {"attention", "gaussian_kernel", "proportional"}
    needed |= {_named(case.keywords[what])[0] for what in FUNCTIONS if what in case.keywords}
    needed |= {"merge_attention"} if case.call == "split_attention" else set()
    given = {*case.arguments, *case.keywords} if "attention" in needed else set()
    lacks = [f"attention({name}=)" for name in registry.lacking(tab) if name in given]
    return sorted(name for name in needed if not callable(getattr(tab, name, None))) + lacks


def _missing_of_gradients(tab: Any, case: Case, name: str) -> str:
    """What a third party's backend lacks for the gradients of this case, from the function of that name; "" for nothing."""
    if _is_ours(tab):
        return ""
    if not callable(function := getattr(tab, name, None)):
        return name
    return "".join(f"{name}({each}=)" for each in registry.not_taken(function, ["grad_scores"]) if each in case.arguments)


def _named(x: Any) -> tuple[str, dict[str, Any]]:
    return x if isinstance(x, tuple) else (x, {})


def _wrt(case: Case) -> list[str]:
    return [what.removeprefix("grad_") for what in case.answer if what.startswith("grad_")]


def _device_of(x: Any) -> str:
    """The device on which an array lies, as its framework calls it."""
    return str(getattr(x, "device", ""))


def _call(
    tab: Any, case: Case, dtype: str, thorough: bool, like: Any, warned: Literal["error", "ignore"] = "error"
) -> dict[str, Any]:
    """Every quantity of the case, by name; arguments are compared before and after, bit by bit.

    ``warned``: whether a warning is an error.
    """
    if case.call in layers.LAYERS:
        return _layer(tab, case, dtype, like, warned)
    given: list[tuple[str, Any]] = []
    given_for: list[tuple[np.ndarray, Any]] = []

    def convert(name: str, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        kept = "float32" if name in ("lses", "grad_scores") and dtype in tolerance.HALF else dtype
        for other, one in given_for:  # one array given as query, key and value becomes one array of the backend's
            if other is x and name in ("query", "key", "value"):
                return one
        made = tab.asarray(x.copy(), dtype=kept if x.dtype.kind == "f" else None, like=like)
        given.append((name, made))
        given_for.append((x, made))
        return made

    stacked = ("outputs", "lses")
    arguments: dict[str, Any] = {
        n: [convert(n, part) for part in x] if n in stacked else convert(n, x) for n, x in case.arguments.items()
    }
    keywords = {name: _keyword(tab, name, x, convert) for name, x in case.keywords.items()}
    before = [_bytes(tab, x) for _, x in given]
    with warnings.catch_warnings():
        warnings.simplefilter(warned)
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")  # PyTorch warns once that it has to make a context itself
        if case.group == NOT_FINITE:
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy may warn of NaN and inf
        grad_output = arguments.pop("grad_output", None)
        if case.call == "split_attention":
            results = dict(zip(case.results, _split(tab, arguments, keywords, like), strict=True))
        elif case.call in PROJECTED:
            results = _headed(tab, case, arguments, keywords, grad_output, like)
        else:
            results = _call_without_heads(tab, case, arguments, keywords, grad_output, thorough)
    for (name, x), bits in zip(given, before, strict=True):
        if _bytes(tab, x) != bits:
            raise Wrong(f"the argument {name} was written to")
    return results


def _keyword(tab: Any, name: str, x: Any, convert: Callable[[str, Any], Any]) -> Any:
    """A keyword of a case as it is given to the call; ``convert``: (name, NumPy array) -> the backend's, the rest as it is."""
    if name == "segments":  # of the queries, and of the keys
        return tuple(convert(name, part) for part in x)
    if name not in (*FUNCTIONS, "mask", "bias"):
        return x
    function, parameters = _named(x)
    parameters = {n: convert(n, p) for n, p in parameters.items()}
    if name in ("mask", "bias"):  # functions of positions
        return functions.function(tab, function, **parameters)
    return partial(getattr(kvattn, function), **parameters) if parameters else getattr(kvattn, function)


def _call_without_heads(
    tab: Any, case: Case, arguments: dict[str, Any], keywords: dict[str, Any], grad_output: Any, thorough: bool
) -> dict[str, Any]:
    """The quantities of a case of attention, or of another function of the public API without heads of its own."""
    options = {n: x for n, x in keywords.items() if not n.startswith("return_")}
    results, by_scores = {}, {}
    if "grad_scores" in arguments:
        by_scores = {"grad_scores": arguments.pop("grad_scores"), "return_scores": keywords["return_scores"]}
    if thorough or not case.output_only:
        got = getattr(kvattn, case.call)(**arguments, **keywords, backend=tab)
        results = dict(zip(case.results, as_promised(got, case.results), strict=True))
    if case.output_only or (thorough and case.call == "attention" and len(case.results) > 1):
        results[OUTPUT_ONLY if results else "output"] = kvattn.attention(**arguments, **options, backend=tab)
    if wrt := _wrt(case):
        grads = kvattn.attention_grad(**arguments, grad_output=grad_output, wrt=wrt, **options, **by_scores, backend=tab)
        results |= zip((f"grad_{name}" for name in wrt), as_promised(grads, wrt, single=False), strict=True)
    return results


def _layer(tab: Any, case: Case, dtype: str, like: Any, warned: Literal["error", "ignore"]) -> dict[str, Any]:
    """The quantities of a case of a layer of ours; its weights and its configuration are among the keywords."""
    arguments, keywords = dict(case.arguments), dict(case.keywords)
    names, config, weights = (keywords.pop(name) for name in ("inputs", "config", "weights"))
    inputs, wrt = [arguments.pop(name) for name in names], _wrt(case)
    grad_output = arguments.pop("grad_output", None) if wrt else None
    if "normalize" in keywords:
        keywords["normalize"] = getattr(kvattn, keywords["normalize"])
    with warnings.catch_warnings():
        warnings.simplefilter(warned)
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
        results, by_inputs, by_weights = native.run(
            tab, case.call, config, weights, inputs, dtype=dtype, grad_output=grad_output, like=like, **arguments, **keywords
        )
    grads = dict(zip(names, by_inputs, strict=False)) | by_weights
    return dict(zip(case.results, results, strict=True)) | {f"grad_{name}": grads[name] for name in wrt}


def _split(tab: Any, arguments: dict[str, Any], keywords: dict[str, Any], like: Any) -> Any:
    """Attention over parts of the keys, merged two by two, which is to be attention over all of them."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    ends = [0, *keywords["splits"], int(key.shape[-2])]
    options = {n: x for n, x in keywords.items() if n not in ("splits", "return_lse")}
    merged: Any = None
    dtype, (key, value) = conversion.dtype_name(query), (tab.to_numpy(x) for x in (key, value))
    for start, end in itertools.pairwise(ends):
        keys, values = (tab.asarray(x[..., start:end, :], dtype=dtype, like=like) for x in (key, value))
        part = kvattn.attention(query, keys, values, **options, return_lse=True, backend=tab)
        pair = part if merged is None else tuple(zip(merged, part, strict=True))
        merged = part if merged is None else kvattn.merge_attention(*pair, return_lse=True, backend=tab)
    return merged


def _headed(
    tab: Any, case: Case, arguments: dict[str, Any], keywords: dict[str, Any], grad_output: Any, like: Any
) -> dict[str, Any]:
    """The quantities of a case of multi-head attention, of self-attention, or of multi-head attention step by step."""
    names, wrt = [name for name in checks.PARAMS if name in arguments], _wrt(case)
    if case.call == "self_attention":  # an option of it
        names = [name for name in names if name != "sink"]
    params = {name: arguments[name] for name in names}
    inputs = [arguments["x"]] * 3 if case.call == "self_attention" else [arguments[name] for name in ("query", "key", "value")]
    options = {name: x for name, x in arguments.items() if name not in (*names, "x", "query", "key", "value")} | keywords
    capacity = options.pop("capacity", None)
    query, key, value = inputs
    if case.call == "self_attention":
        got = kvattn.self_attention(inputs[0], *params.values(), **options, backend=tab)
    elif case.call == "decoding":
        return {"output": _steps(tab, inputs, params, capacity, options, like)}
    else:
        got = kvattn.multi_head_attention(query, key, value, params, **options, backend=tab)
    results = dict(zip(case.results, as_promised(got, case.results), strict=True))
    if wrt:
        options = {"num_heads": 1} | {name: x for name, x in options.items() if not name.startswith("return_")}
        by = ["query", "key", "value", *names]
        grads = kvattn.multi_head_attention_grad(query, key, value, params, grad_output, wrt=by, **options, backend=tab)
        found = dict(zip(by, as_promised(grads, by, single=False), strict=True))
        if case.call == "self_attention":
            three = [np.asarray(tab.to_numpy(found[name]), np.float64) for name in ("query", "key", "value")]
            dtype = conversion.dtype_name(found["query"])
            found["x"] = tab.asarray(sum(three), dtype=dtype, like=like)  # as JAX adds no float64 by itself
        results |= {f"grad_{name}": found[name] for name in wrt}
    return results


def _steps(
    tab: Any, inputs: list[Any], params: dict[str, Any], capacity: tuple[int, ...] | None, options: dict[str, Any], like: Any
) -> Any:
    """Causal multi-head attention with a cache: two positions, then one at a time; joined by NumPy."""
    cache = kvattn.KVCache()
    if capacity is not None:
        wide = conversion.dtype_name(inputs[0])
        wide = "float32" if wide in tolerance.HALF else wide
        cache = kvattn.KVCache.allocate(capacity[:-1], capacity[-1], dtype=wide, like=inputs[0], backend=tab)
    outputs, n = [], int(inputs[0].shape[-2])
    for start, end in [(0, 2), *((i, i + 1) for i in range(2, n))]:
        query, key, value = (x[..., start:end, :] for x in inputs)
        output, cache = kvattn.multi_head_attention(query, key, value, params, **options, causal=True, cache=cache, backend=tab)
        outputs.append(tab.to_numpy(output))
    return tab.asarray(np.concatenate(outputs, axis=-2), dtype=conversion.dtype_name(inputs[0]), like=like)


def as_promised(got: Any, names: Sequence[str], single: bool = True) -> Sequence[Any]:
    """What was returned, one for each name; an array that stands where a tuple was promised is not taken apart.

    ``single``: one result comes by itself, as attention's does, and not in a tuple. Raises `Wrong` for what is no such tuple.
    """
    if single and len(names) == 1:
        return [got]
    if not isinstance(got, (tuple, list)) or len(got) != len(names):
        what = f"{len(got)} results" if isinstance(got, (tuple, list)) else f"a {type(got).__name__}"
        raise Wrong(f"returned {what}; promised ({', '.join(names)}{',' * (len(names) == 1)})")
    return got


def _bytes(tab: Any, x: Any) -> bytes:
    return np.array(tab.to_numpy(x)).tobytes()


def _plain(tab: Any, x: Any, what: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A result as float64 NumPy, if it is what was promised."""
    if not tab.is_array(x):
        raise Wrong(f"is a {type(x).__name__}, not the backend's own array")
    if conversion.dtype_name(x) != dtype:
        raise Wrong(f"has dtype {conversion.dtype_name(x)}; promised {dtype}")
    if tuple(x.shape) != shape:
        raise Wrong(f"has shape {tuple(x.shape)}; promised {shape}")
    plain = np.array(tab.to_numpy(x), dtype=np.float64)
    if plain.shape != shape:
        raise Wrong(f"has shape {shape} but to_numpy makes {plain.shape} of it")
    return plain


def _largest_difference(x: np.ndarray, y: np.ndarray, unit: float) -> float:
    """The largest difference in units."""
    return float(_differences(x, y, unit).max(initial=0.0))


def _differences(x: np.ndarray, y: np.ndarray, unit: float) -> np.ndarray:
    """The differences in units; infinities must be equal, and NaN is equal to NaN alone."""
    with np.errstate(invalid="ignore", over="ignore"):
        in_units = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y) / unit)
    return np.where(np.isnan(in_units), np.inf, in_units)
